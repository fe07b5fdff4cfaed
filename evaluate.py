"""How good a trained classifier is, and where it is wrong.

    python evaluate.py best.pt
    python evaluate.py best.pt --report .              # and a page of figures, charts and mistakes
    python evaluate.py best.pt --predict photo.jpg     # instead: what it says of other images
    python evaluate.py best.pt --export network.pt2    # instead: the network, to carry away

needs nothing else: the data, image size, batch size and precision are in the checkpoint, and the
figures equal those that train.py logged for its epoch. Another folder's `val/`: `--data DIR`.
"""
import sys

try:
    import torch
    import torchvision
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise ImportError(f"torch {torch.__version__} is older than 2.6")
except (ImportError, RuntimeError) as error:  # a torchvision built for another torch: RuntimeError
    sys.exit(f"{sys.argv[0]}: error: torch and torchvision are missing, too old or do not fit "
             f"together ({error}): pip install --upgrade -r requirements.txt")

import argparse
import base64
import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html import escape
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.fx import symbolic_trace, wrap
from torch.fx.experimental.optimization import fuse
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from selfdistill import load_tensors, normalize, pooled, to_rgb, val_transform

SIZES = (32, 2048)  # the least and the most pixels of an image's sides
# In messages of torch's: of accelerators, of CPUs, of a loader's workers, and of what these share.
OUT_OF_MEMORY = ("out of memory", "t allocate memory", "DataLoader worker (pid", "shared memory")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class UserError(Exception):
    """A mistake of the user's, to be told in one line and without a traceback."""


# The data

class UnreadableImage(UserError):
    """An image that cannot be decoded; the message names the file."""

    def __init__(self, message: str) -> None:
        # A loader's worker hands the message on inside its whole traceback.
        super().__init__(message.rpartition("UnreadableImage: ")[2].strip())


def load_image(path: str) -> Tensor:
    """The image in a file, as `to_rgb` turns it upright: uint8 (3, H, W)."""
    if path.lower().endswith((".jpg", ".jpeg")):
        try:
            data = torchvision.io.read_file(path)
            return torchvision.io.decode_jpeg(data, torchvision.io.ImageReadMode.RGB,
                                              apply_exif_orientation=True)
        except (RuntimeError, AttributeError):  # no sound JPEG, or a torchvision without decoders,
            pass  # which it plans to drop; Pillow is slower, but reads all and tells what is wrong
    try:
        with Image.open(path) as image:
            return pil_to_tensor(to_rgb(image))
    except Exception as error:  # a damaged file can raise nearly anything
        reason = (getattr(error, "strerror", None) or str(error).replace(f" {path!r}", "")
                  or type(error).__name__)
        raise UnreadableImage(f"cannot read the image {path}: {reason}") from None


def is_readable(path: str) -> bool:
    try:
        load_image(path)
    except UnreadableImage:
        return False
    return True


class ImageFolder(datasets.ImageFolder):
    """A folder of class folders, whose labels follow `classes` by name, never by position.

    Its items are images (H, W, 3) in uint8, the layout that is fastest to batch, and labels.

    Args:
        root: the folder that holds a folder for each class.
        transform: uint8 tensor (3, H, W) -> uint8 tensor (3, H, W).
        classes: the names that labels are positions in; the folder may have fewer of them.
            Default: those of the folder, sorted.
        allow_empty: let a class have no images. Default: False

    Raises:
        UserError: the folder is missing or empty, or has an empty class or an unknown one.
    """

    def __init__(self, root: str | Path, transform: Callable | None,
                 classes: list[str] | None = None, allow_empty: bool = False) -> None:
        self.known_classes = classes
        try:
            super().__init__(str(root), transform, loader=load_image, allow_empty=allow_empty)
        except OSError as error:
            raise UserError(f"{root}: {error}") from None

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        present = sorted(entry.name for entry in os.scandir(directory)
                         if entry.is_dir() and not entry.name.startswith("."))
        if not present:
            raise UserError(f"{directory} has no class folders: expected one folder of images "
                            "for each class")
        classes = self.known_classes or present
        unknown = sorted(set(present) - set(classes))
        if unknown:
            raise UserError(f"{directory} has classes that the model does not know: "
                            f"{listed(unknown)}; it knows {listed(classes)}")
        labels = {name: label for label, name in enumerate(classes)}
        return classes, {name: labels[name] for name in present}

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.load(index, self.transform)

    def load(self, index: int, transform: Callable) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return transform(load_image(path)).permute(1, 2, 0), label

    def leave_out_unreadable(self, threads: int, share: slice = slice(None),
                             gather: Callable[[list], list] = list) -> None:
        """Go on without the images that cannot be read, having read them all, and say which.

        Args:
            threads: to read with.
            share: of the images, that this process reads.
            gather: makes one list of the lists that several processes have.
        """
        paths = [path for path, _ in self.samples[share]]
        with ThreadPool(max(1, threads)) as pool:
            readable = pool.map(is_readable, paths)
        unreadable = set(gather([path for path, fine in zip(paths, readable) if not fine]))
        if not unreadable:
            return
        print(f"{self.root}: {len(unreadable)} of {len(self)} images cannot be read and are left "
              "out:", *sorted(unreadable), sep="\n  ")
        self.samples = self.imgs = [item for item in self.samples if item[0] not in unreadable]
        self.targets = [label for _, label in self.samples]
        emptied = sorted(set(self.class_to_idx.values()) - set(self.targets))
        if emptied:
            raise UserError(f"{self.root} has no image that can be read for "
                            f"{listed([self.classes[label] for label in emptied])}")


class Pictures(Dataset):
    """Images by path; of one that cannot be read, black instead and the reason, which else is "".

    Args:
        paths: of the images.
        transform: uint8 tensor (3, H, W) -> uint8 tensor (3, size, size).
        size: in pixels.
    """

    def __init__(self, paths: list[str], transform: Callable, size: int) -> None:
        self.paths, self.transform, self.size = paths, transform, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.transform(load_image(self.paths[index])).permute(1, 2, 0), ""
        except UnreadableImage as error:
            return torch.zeros(self.size, self.size, 3, dtype=torch.uint8), str(error)


def find_images(paths: list[str]) -> list[str]:
    """The files named, and those with the suffix of an image in the folders named, by name."""
    found = []
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            inside = sorted(os.path.join(folder, name)
                            for folder, _, names in os.walk(path, followlinks=True)
                            for name in names if datasets.folder.is_image_file(name))
            if not inside:
                raise UserError(f"the folder {path} has no images in it")
        found += inside
    return found


def listed(names: list[str], most: int = 10) -> str:
    """The first names of a list, for a message."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest


def find_splits(data: str | Path, *splits: str) -> Path:
    """The folder that holds the splits: `data` itself, or the one folder in it that does."""
    def holds_them(folder: Path) -> bool:  # by isdir, as Path.is_dir raises where it may not look
        return all(os.path.isdir(folder / split) for split in splits)

    data = Path(data)
    if not os.path.isdir(data):
        raise UserError(f"data folder {data} does not exist")
    found = [data] if holds_them(data) else sorted(filter(holds_them, data.iterdir()))
    named = " and ".join(f"{split}/" for split in splits)
    if not found:
        raise UserError(f"data folder {data} has no {named} in it, each with one folder of images "
                        "for each class")
    if len(found) > 1:
        raise UserError(f"data folder {data} has several folders with {named} in it, "
                        f"{listed(found)}: name one of them")
    return found[0]


def usable_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches a loader's workers too, which the main process still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset: Dataset, device: torch.device, workers: int, **batching) -> DataLoader:
    # The loader's own generator keeps it from drawing on the global random state.
    return DataLoader(dataset, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=device.type == "cuda", generator=torch.Generator(),
                      worker_init_fn=ignore_ctrl_c, **batching)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """A loader's images (N, H, W, 3) on the device: (N, 3, H, W), normalised, in channels_last."""
    return normalize(images.to(device, non_blocking=True).permute(0, 3, 1, 2))


# The machine

def choose_device(name: str) -> torch.device:
    """The device of that name, set to be fast; "auto" is CUDA, else MPS, else the CPU."""
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ValueError):
        raise UserError(f"device {name!r} is not available here; --device auto takes what "
                        "is") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions use by default
        torch.backends.cudnn.benchmark = True
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """The precision of that name; "auto" is bf16 where it is fast, fp16 on older CUDA, or fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                 or torch.cpu._is_amx_tile_supported()):
        bf16, fp32 = seconds_of_steps(["bf16", "fp32"])
        return "bf16" if bf16 < 0.8 * fp32 else "fp32"
    return "fp32"


def seconds_of_steps(precisions: list[str]) -> list[float]:
    """The shortest of some forward and backward passes of one convolution on the CPU, for each.

    They take turns, so that what else the machine does slows all of them alike.
    """
    layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    images = torch.zeros(8, 64, 56, 56).to(memory_format=torch.channels_last)
    times = {precision: [] for precision in precisions}
    for precision in precisions * 10:
        start = time.perf_counter()
        with autocast(images.device, precision):
            output = layer(images)
        output.sum().backward()
        times[precision].append(time.perf_counter() - start)
    return [min(taken) for taken in times.values()]


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


# The checkpoint

def read_checkpoint(path: str | Path) -> dict:
    """A best.pt or last.pt that train.py wrote. Nothing in the file is ever executed."""
    try:
        checkpoint = load_tensors(path)
    except OSError as error:
        raise UserError(f"cannot open the checkpoint {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    kinds = {"model": dict, "arch": str, "classes": list, "size": int, "mean": list, "std": list,
             "epoch": int, "val_acc": float, "data": str, "args": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if not wrong:
        classes, args = checkpoint["classes"], checkpoint["args"]
        batch_size = args.get("batch_size")
        sound = {"classes": all(isinstance(name, str) for name in classes)
                            and 0 < len(set(classes)) == len(classes),
                 "size": SIZES[0] <= checkpoint["size"] <= SIZES[1],
                 "args": args.get("precision") in list(DTYPES)
                         and isinstance(batch_size, int) and batch_size > 0}
        wrong = [key for key, is_sound in sound.items() if not is_sound]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of train.py: no usable {listed(wrong)} in it")
    return checkpoint


# What the page shows of a line of log.jsonl.
LOGGED = ("epoch", "train_loss", "ce_loss", "distillation_loss", "train_acc", "val_loss", "val_acc",
          "lr")


def read_log(checkpoint: Path) -> list[dict]:
    """The lines of the log.jsonl beside a checkpoint, of log.1.jsonl beside best.1.pt; or none."""
    path = checkpoint.with_name(re.sub("^(best|last)", "log", f"{checkpoint.stem}.jsonl"))
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: float(line[key]) for key in LOGGED} for line in lines]
    except (OSError, ValueError, TypeError, LookupError):
        return []


def build_model(checkpoint: dict, path: str | Path) -> nn.Module:
    """The plain torchvision network of a checkpoint, with its weights, in eval mode."""
    try:
        model = models.get_model(checkpoint["arch"], num_classes=len(checkpoint["classes"]))
        model.load_state_dict(checkpoint["model"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold the weights of a {checkpoint['arch']} with "
                        f"{len(checkpoint['classes'])} classes: "
                        f"{textwrap.shorten(str(error), 200)}") from None
    return model.eval()


wrap("pooled")  # a trace does not look inside


class EarlyExit(nn.Module):
    """A network up to one of its layers, and a classifier of that layer's mean over the image.

    Shape: images (N, 3, H, W) -> logits (N, K)
    """

    def __init__(self, model: nn.Module, layer: str, classifier: nn.Linear) -> None:
        super().__init__()
        self.extractor = create_feature_extractor(model, {layer: "features"})
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(pooled(self.extractor(images)["features"]))


def build_exits(model: nn.Module, checkpoint: dict, path: str | Path) -> dict[str, nn.Module]:
    """The smaller networks that a checkpoint also holds, by the layers that they end with."""
    exits = {}
    try:
        for layer, state in checkpoint.get("exits", {}).items():
            classifier = nn.Linear(state["weight"].shape[1], len(checkpoint["classes"]))
            classifier.load_state_dict(state)
            # Traced, as a copy of what create_feature_extractor returns falls back to train mode.
            exits[layer] = symbolic_trace(EarlyExit(model, layer, classifier).eval())
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold classifiers of the layers of its network: "
                        f"{textwrap.shorten(str(error), 200)}") from None
    return exits


SUFFIXES = (".pt2", ".onnx", ".pth")


def export(model: nn.Module, checkpoint: dict, path: Path, images: Tensor) -> float:
    """Write a network in the format of a suffix, once it has been read again and compared.

    Args:
        model: in eval mode, on the CPU.
        checkpoint: whose classes, size, mean and std go into the file, but for a .pth.
        path: ends in one of SUFFIXES.
        images: to compare outputs on, normalised: (N, 3, H, W), at least 2.

    Returns: the largest difference of a logit.
    """
    metadata = {key: json.dumps(checkpoint[key])
                for key in ("arch", "classes", "size", "mean", "std")}
    dynamic = ({0: torch.export.Dim("batch")},)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"network{path.suffix}")
        if path.suffix == ".pth":
            torch.save(model.state_dict(), file)
            found = build_model(checkpoint | {"model": load_tensors(file)}, path)(images)
        elif path.suffix == ".pt2":
            program = torch.export.export(model, (images[:2],), dynamic_shapes=dynamic)
            torch.export.save(program, file, extra_files=metadata)
            found = torch.export.load(file).module()(images)
        else:
            found = export_onnx(model, images, dynamic, metadata, file)
        difference = (found - model(images)).abs().max().item()
        if not difference <= 1e-4:
            raise UserError(f"{path} is not written: its outputs would differ from the network's "
                            f"by up to {difference:.2g}")
        write_file(path, file.read_bytes())
    return difference


def export_onnx(model: nn.Module, images: Tensor, dynamic: tuple, metadata: dict[str, str],
                file: Path) -> Tensor:
    """Write a network as ONNX; returns what ONNX's own evaluator then makes of the images."""
    try:
        import onnx.reference
        import onnxscript  # noqa: F401, what torch.onnx needs
    except ImportError as error:
        raise UserError(f"a .onnx needs the packages onnx and onnxscript ({error}): pip install "
                        "onnx onnxscript") from None
    with contextlib.redirect_stdout(io.StringIO()):
        program = torch.onnx.export(model, (images[:2],), dynamo=True, dynamic_shapes=dynamic,
                                    input_names=["images"], output_names=["logits"])
    program.model.metadata_props.update(metadata)
    program.save(file)
    logits, = onnx.reference.ReferenceEvaluator(str(file)).run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


# The figures

class Predictions(NamedTuple):
    """What a network says of N images, on the CPU."""
    labels: Tensor  # (N) int64
    losses: Tensor  # (N) float32, cross-entropy in nats
    top: Tensor  # (N, min(5, K)) int64, the best classes, best first
    probabilities: Tensor  # (N, min(5, K)) float32, of these
    seconds: float

    @property
    def confidences(self) -> Tensor:
        return self.probabilities[:, 0].double()  # (N)

    @property
    def correct(self) -> Tensor:
        return self.top[:, 0] == self.labels  # (N) bool


@torch.inference_mode()
def outputs(model: nn.Module, batches: Iterable[tuple[Tensor, object]], device: torch.device,
            precision: str) -> Iterator[tuple[Tensor, object]]:
    """What a network makes of a loader's images, logits (N, K) in fp32; and what came with them."""
    # A copy, with batch norms folded into the convolutions before them.
    model = fuse(model.eval()).to(device, memory_format=torch.channels_last)
    for images, others in batches:
        with autocast(device, precision):
            logits = model(to_device(images, device))
        yield logits.float(), others


def predict(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device,
            precision: str, gather: Callable[[list], list] = list) -> Predictions:
    """What a network says of a loader's images.

    Args:
        gather: makes one list of the lists that several processes have, each from its own batches.
    """
    start = time.perf_counter()
    parts = []
    for logits, labels in outputs(model, batches, device, precision):
        labels = labels.to(device, non_blocking=True)
        losses = F.cross_entropy(logits, labels, reduction="none")
        probabilities, top = best_classes(logits)
        parts.append((labels, losses, top, probabilities))
    parts = gather([[column.cpu() for column in part] for part in parts])
    return Predictions(*map(torch.cat, zip(*parts)), time.perf_counter() - start)


def predict_images(model: nn.Module, pictures: Pictures, loader: Iterable, classes: list[str],
                   device: torch.device, precision: str) -> list[dict]:
    """The best classes of each picture, or why it cannot be read; also printed, a line each."""
    results = []
    for logits, errors in outputs(model, watched(loader, len(pictures)), device, precision):
        probabilities, top = best_classes(logits)
        for error, *row in zip(errors, probabilities.tolist(), top.tolist()):
            result = {"path": pictures.paths[len(results)]}
            if error:
                result["error"] = error
            else:
                result["classes"] = [{"class": classes[position], "probability": probability}
                                     for probability, position in zip(*row)]
            results.append(result)
            best = ", ".join("{class} {probability:.4f}".format(**guess)
                             for guess in result.get("classes", []))
            rewrite_line()
            print(error or f"{result['path']}: {best}")
    return results


def best_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and positions of up to five classes, best first: (N, min(5, K)) each."""
    return logits.softmax(dim=1).topk(min(5, logits.shape[1]))


def summarize(predictions: Predictions, classes: list[str]) -> dict:
    """The figures of predictions, as `--json` writes them; accuracies are fractions."""
    labels, correct, count = predictions.labels, predictions.correct, len(predictions.labels)
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    rights = torch.bincount(labels[correct], minlength=len(classes)).tolist()
    in_top5 = (predictions.top == labels[:, None]).any(dim=1)
    mistakes = Counter(zip(labels[~correct].tolist(), predictions.top[~correct, 0].tolist()))
    shares, confidences, accuracies = calibrate(predictions)
    return {"top1": sum(rights) / count,
            "top1_interval": wilson_interval(sum(rights), count),
            "top5": in_top5.sum().item() / count if len(classes) > 5 else None,
            "loss": predictions.losses.double().mean().item(),
            "count": count,
            "per_class": {name: {"count": counts[position], "correct": rights[position]}
                          for position, name in enumerate(classes) if counts[position]},
            "most_confused": [{"label": classes[label], "prediction": classes[prediction],
                               "count": times}
                              for (label, prediction), times in mistakes.most_common(5)],
            "calibration_error": (shares * (confidences - accuracies).abs()).sum().item(),
            "confidence_when_right": mean_or_none(predictions.confidences[correct]),
            "confidence_when_wrong": mean_or_none(predictions.confidences[~correct]),
            "images_per_second": count / predictions.seconds}


def calibrate(predictions: Predictions, bins: int = 15) -> Tensor:
    """Shares of the images, mean confidences and accuracies by confidence, (3, bins).

    Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599, section 2; a bin without
    images has nought of each.
    """
    confidences = predictions.confidences
    positions = (confidences * bins).ceil().long().clamp(1, bins) - 1
    counts, *sums = (torch.bincount(positions, weights, bins) for weights in
                     (torch.ones_like(confidences), confidences, predictions.correct.double()))
    return torch.stack([counts / len(positions), *(sum / counts.clamp(min=1) for sum in sums)])


def wilson_interval(rights: int, count: int, z: float = 1.959964) -> list[float]:
    """Wilson's 95 % score interval of a proportion."""
    centre = rights + z ** 2 / 2
    spread = z * math.sqrt(rights * (count - rights) / count + z ** 2 / 4)
    return [(centre - spread) / (count + z ** 2), (centre + spread) / (count + z ** 2)]


def confusion_matrix(predictions: Predictions, classes: int) -> Tensor:
    """Images by label (rows) and prediction (columns): (classes, classes)."""
    cells = predictions.labels * classes + predictions.top[:, 0]
    return torch.bincount(cells, minlength=classes ** 2).view(classes, classes)


def mean_or_none(values: Tensor) -> float | None:
    return values.mean().item() if len(values) else None


def print_summary(summary: dict) -> None:
    width = max(len("class"), *map(len, summary["per_class"]))
    print(f"{'class':{width}}  accuracy  correct  count")
    for name, row in summary["per_class"].items():
        accuracy = row["correct"] / row["count"]
        print(f"{name:{width}}  {accuracy:8.4f}  {row['correct']:7d}  {row['count']:5d}")
    print(*describe(summary), sep="\n")


def describe(summary: dict) -> list[str]:
    """The figures of all classes together, in lines."""
    low, high = summary["top1_interval"]
    top5 = "" if summary["top5"] is None else f"  top-5 {summary['top5']:.4f}"
    lines = [f"top-1 {summary['top1']:.4f} (95 % interval {low:.4f} to {high:.4f}){top5}  "
             f"loss {summary['loss']:.4f}  {summary['count']} images  "
             f"{summary['images_per_second']:.1f} images/s"]
    confidences = [f"{summary[f'confidence_when_{which}']:.4f} when {which}"
                   for which in ("right", "wrong") if summary[f"confidence_when_{which}"]]
    lines.append(f"mean confidence {', '.join(confidences)}; expected calibration error "
                 f"{summary['calibration_error']:.4f}")
    pairs = ["{label} taken for {prediction} {count}".format(**pair)
             for pair in summary["most_confused"]]
    return lines + ([f"most confused: {'; '.join(pairs)}"] if pairs else [])


# The page

STYLE = """
:root { color-scheme: light dark; --ink: #222; --rule: #ddd;
        --c0: #2563b0; --c1: #c2500c; --c2: #2e7d32; --c3: #8e3fa8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --rule: #444; --c0: #7cb2f5; --c1: #f5a066; --c2: #81c784; --c3: #d59be8 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 64rem; margin: auto;
       padding: 0 1rem 2rem; overflow-wrap: break-word }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
section { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; flex: 1 1 17rem }
section > div { flex: 1 1 100% }
section > figure { max-width: 30rem; overflow-x: auto } section > figure.wide { max-width: none }
section > figure.image { flex: 0 0 6.5rem; font-size: .8rem; line-height: 1.3;
                         overflow-wrap: anywhere }
figcaption span { margin-right: .6em } img { width: 100%; border-radius: 4px }
svg { display: block; width: 100%; fill: var(--ink); font-size: 11px }
line { stroke: var(--rule) } polyline { fill: none; stroke-width: 2 }
"""


def page(title: str, summary: dict, predictions: Predictions, dataset: ImageFolder,
         log: list[dict], augmented: Iterable[tuple[Tensor, str]] = (),
         refresh: bool = False) -> str:
    """A self-contained HTML page: the figures, how training went, and what is wrong, in pictures.

    Args:
        title: what was evaluated.
        summary: of the predictions, by `summarize`.
        dataset: the images predicted, in the same order.
        log: of the training, the lines of log.jsonl; may be empty.
        augmented: train images (H, W, 3) in uint8 and their classes, to be shown.
        refresh: have the browser load the page again every 10 seconds.
    """
    classes, correct = dataset.classes, predictions.correct
    order = predictions.confidences.argsort(descending=True)
    wrong, least = order[~correct[order]][:20].tolist(), order[correct[order]].flip(0)[:10].tolist()

    def thumbnails(indices: list[int]) -> str:
        return "".join(thumbnail(dataset[index][0], f"{classes[predictions.labels[index]]}: "
                                 f"{classes[predictions.top[index, 0]]} "
                                 f"{predictions.confidences[index]:.3f}") for index in indices)

    sections = [("How good it is", "".join(f"<div>{escape(line)}</div>"
                                           for line in describe(summary))),
                ("Training", training_charts(log) if log else ""),
                ("Where it is right", class_bars(summary) + reliability_diagram(predictions)),
                ("Where it is wrong: rows are labels, columns predictions",
                 heat_map(confusion_matrix(predictions, len(classes)), classes)),
                ("The most confident mistakes, with label: prediction", thumbnails(wrong)),
                ("The least certain right answers", thumbnails(least)),
                ("Augmented train images",
                 "".join(thumbnail(*item) for item in augmented))]
    body = "".join(f"<h2>{heading}</h2><section>{content}</section>\n"
                   for heading, content in sections if content)
    reload = '<meta http-equiv="refresh" content="10">' if refresh else ""
    return (f'<!doctype html><html lang="en"><meta charset="utf-8">{reload}<meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n{body}</html>\n")


def thumbnail(image: Tensor, caption: str) -> str:
    """An image (H, W, 3) in uint8, small, and what is written under it."""
    picture, buffer = to_pil_image(image.permute(2, 0, 1)), io.BytesIO()
    picture.thumbnail((160, 160))
    picture.save(buffer, "JPEG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure class="image"><img src="data:image/jpeg;base64,{data}" alt="">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def training_charts(log: list[dict[str, float]]) -> str:
    """Losses, accuracies and learning rate by epoch."""
    def lines(**keys: str) -> dict[str, list[tuple[float, float]]]:
        return {name: [(line["epoch"], line[key]) for line in log] for name, key in keys.items()}

    losses = lines(train="train_loss", cross_entropy="ce_loss", distillation="distillation_loss",
                   val="val_loss")
    accuracies = lines(train="train_acc", val="val_acc")
    *trained, val = (max(y for _, y in line) for line in losses.values())
    least = min(y for line in accuracies.values() for _, y in line)
    # A val loss far above the others, as of an early epoch, leaves the chart.
    return (line_chart("loss by epoch", losses, high=max(*trained, min(val, 2 * max(trained))))
            + line_chart("accuracy by epoch", accuracies, high=1,
                         low=min(0.9, math.floor(10 * least) / 10))
            + line_chart("learning rate by epoch", lines(rate="lr")))


def line_chart(title: str, lines: dict[str, list[tuple[float, float]]], low: float = 0,
               high: float | None = None, radii: dict[str, list[float]] | None = None) -> str:
    """Lines through points (x, y), by name.

    Args:
        low, high: ends of the vertical axis; by default 0 and the largest y.
        radii: of the points of the lines named; by default 2.5
    """
    points = [point for line in lines.values() for point in line]
    left, right = min(x for x, _ in points), max(x for x, _ in points)
    high, wide = high or max(y for _, y in points) or 1, right - left or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return (round(50 + 260 * (x - left) / wide, 1),
                round(165 - 150 * (y - low) / (high - low), 1))

    drawn = [f'<line x1="50" x2="310" y1="{y}" y2="{y}"/><text x="44" y="{y + 4}" '
             f'text-anchor="end">{value:.2g}</text>'
             for value in (low, (low + high) / 2, high) for _, y in [place(left, value)]]
    drawn += [f'<text x="{place(x, low)[0]}" y="182" text-anchor="middle">{x:g}</text>'
              for x in sorted({left, right})]
    for k, (name, line) in enumerate(lines.items()):
        path = " ".join("{},{}".format(*place(*point)) for point in line)
        drawn.append(f'<polyline points="{path}" stroke="var(--c{k})"/>')
        sizes = (radii or {}).get(name, [2.5] * len(line))
        drawn += ['<circle cx="{}" cy="{}" r="{:.1f}" fill="var(--c{})"><title>{}: {:.4g} at {:.4g}'
                  "</title></circle>".format(*place(x, y), radius, k, name, y, x)
                  for (x, y), radius in zip(line, sizes)]
    legend = "".join(f'<span style="color: var(--c{k})">{name.replace("_", " ")}</span>'
                     for k, name in enumerate(lines))
    return (f'<figure><svg viewBox="0 0 320 190">{"".join(drawn)}</svg>'
            f"<figcaption>{title}: {legend}</figcaption></figure>")


def reliability_diagram(predictions: Predictions) -> str:
    shares, *points = calibrate(predictions)
    used = shares > 0
    return line_chart("accuracy by confidence (large: many images)",
                      {"measured": list(zip(*(axis[used].tolist() for axis in points))),
                       "ideal": [(0, 0), (1, 1)]}, high=1,
                      radii={"measured": (2 + 10 * shares[used].sqrt()).tolist()})


def class_bars(summary: dict, most: int = 30) -> str:
    """Accuracy by class, the worst first."""
    rows = sorted(((row["correct"] / row["count"], name, row)
                   for name, row in summary["per_class"].items()), key=lambda row: row[0])
    drawn = [f'<text x="98" y="{18 * k + 13}" text-anchor="end">{short(name)}</text><rect x="104" '
             f'y="{18 * k + 3}" height="13" width="{130 * accuracy:.1f}" fill="var(--c0)"/><text '
             f'x="{110 + 130 * accuracy:.1f}" y="{18 * k + 13}">{accuracy:.3f} of {row["count"]}'
             "</text>" for k, (accuracy, name, row) in enumerate(rows[:most])]
    title = "accuracy by class" + (f", the worst {most} of {len(rows)}" if len(rows) > most else "")
    return (f'<figure><svg viewBox="0 0 320 {18 * len(drawn) + 4}">{"".join(drawn)}</svg>'
            f"<figcaption>{title}</figcaption></figure>")


def heat_map(matrix: Tensor, classes: list[str], most: int = 30) -> str:
    """A confusion matrix, of the classes with the most mistakes if there are many."""
    mistakes = matrix.sum(dim=0) + matrix.sum(dim=1) - 2 * matrix.diagonal()
    chosen = mistakes.argsort(descending=True, stable=True)[:most].sort().values
    totals = matrix[chosen].sum(dim=1, keepdim=True).clamp(min=1)
    matrix, names = matrix[chosen][:, chosen], [short(classes[k]) for k in chosen]
    counts, shares = matrix.tolist(), (matrix / totals).tolist()
    drawn = []
    for k, name in enumerate(names):
        middle = 106 + 24 * k
        drawn.append(f'<text x="90" y="{middle + 4}" text-anchor="end">{name}</text><text '
                     f'transform="translate({middle + 4} 90) rotate(-90)">{name}</text>')
        drawn += [f'<rect x="{94 + 24 * j}" y="{94 + 24 * k}" width="23" height="23" fill="var('
                  f'--c{int(j != k)})" fill-opacity="{max(0.05, share ** 0.5):.2f}"/><text '
                  f'x="{106 + 24 * j}" y="{middle + 4}" text-anchor="middle" fill="'
                  f'{"Canvas" if share > 0.25 else "var(--ink)"}">{count or ""}</text>'
                  for j, (share, count) in enumerate(zip(shares[k], counts[k]))]
    size = 96 + 24 * len(names)
    title = f", the {most} classes with the most mistakes" if len(classes) > most else ""
    return (f'<figure class="wide"><svg viewBox="0 0 {size} {size}" style="width: {1.5 * size}px; '
            f'max-width: max(100%, {size}px)">{"".join(drawn)}</svg>'
            f"<figcaption>images by label and prediction{title}</figcaption></figure>")


def short(name: str) -> str:
    return escape(name if len(name) < 16 else f"{name[:14]}…")


# The command line

def rewrite_line(text: str = "") -> None:
    """Put a text in the place of a terminal's last line; nothing elsewhere."""
    if sys.stdout.isatty():
        print(f"\r\033[K{text}", end="", flush=True)


def watched(items: Iterable, total: int, what: str = "images",
            size: Callable[[object], int] = lambda batch: len(batch[0])) -> Iterator:
    """The items, and on a terminal a line that is rewritten: how many are done, what is left.

    Args:
        total: the sum of all items' sizes.
        size: of an item. Default: that of a loader's batch
    """
    start, shown, done = time.perf_counter(), 0.0, 0
    for item in items:
        yield item
        done += size(item)
        now = time.perf_counter()
        if now - shown >= 0.5:
            shown, speed = now, done / (now - start)
            rewrite_line(f"{what} {done}/{total}  {speed:.1f} images/s  "
                         f"{duration((total - done) / speed)} left")
    rewrite_line()


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes
            else f"{seconds} s")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], int | float]:
    """An argparse type: a finite number in [low, high]."""
    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"between {low} and {high}" if math.isfinite(high) else f"of at least {low}"
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {limit}")
        return value
    return parse


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed."""
    path = Path(path)
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = target.parent / f".{target.name}.tmp"
    try:
        if path.exists() and not path.is_file():  # a pipe or a device, which stays what it is
            path.write_bytes(content)
            return
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself is the trouble, which the first error tells
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: str | Path, figures: dict | list) -> None:
    write_file(path, json.dumps(figures, indent=2).encode())


def make_folder(path: str | Path) -> Path:
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
    return path


def write_csv(path: str | Path, rows: Iterable[tuple]) -> None:
    """Write path, label, prediction and confidence of images as a table."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "label", "prediction", "confidence"), *rows])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a user's mistake ends in one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be no text at all
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        hint = " (--skip-unreadable leaves such images out)"
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}"
                 + (hint if isinstance(error, UnreadableImage) else ""))
    except RuntimeError as error:
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: out of memory: use a smaller --batch-size, "
                 "fewer --workers, more shared memory (docker run --shm-size), or train at a "
                 "smaller --size")
    except BrokenPipeError:  # of `evaluate.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description="How good a trained classifier is, and where "
                    "it is wrong; or what it says of other images; or the network, to carry away.")
    parser.add_argument("checkpoint", help="a best.pt or last.pt that train.py wrote")
    parser.add_argument("--data", metavar="DIR",
                        help="folder with val/ in it (default: the one trained on)")
    parser.add_argument("--exit", metavar="LAYER", help="the smaller network that ends with this "
                        "layer (default: the whole one, and a line for each smaller one)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--report", metavar="DIR", help="write report.html there, too: the "
                         "figures, charts, how training went, and images that it is wrong about")
    instead.add_argument("--predict", nargs="+", metavar="PATH", help="instead, print the best "
                         "classes of these images, or of those in these folders")
    instead.add_argument("--export", metavar="FILE", type=Path, help="instead, write the network: "
                         "FILE.pt2 (torch.export), FILE.onnx, or FILE.pth (torchvision state dict)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, too")
    parser.add_argument("--save-predictions", metavar="FILE", help="write a table (CSV) of path, "
                        "label, prediction and confidence of each image")
    parser.add_argument("--batch-size", type=number(int, 1), metavar="N",
                        help="images at a time (default: as in training)")
    parser.add_argument("--workers", type=number(int, 0, 1024), metavar="N", default=usable_cores(),
                        help="processes that load images; 0: none beside this one (default: the "
                        f"cores usable here, {usable_cores()})")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that "
                        "cannot be read, as training did if it had this flag")
    parser.add_argument("--device", default="auto",
                        help="cpu, cuda, cuda:1, mps, ... (default: auto, the best there is)")
    parser.add_argument("--precision", choices=["auto", *DTYPES],
                        help="auto: the fastest here (default: auto, but fp32 if trained in that)")
    args = parser.parse_args(arguments)
    if args.export:
        if args.export.suffix not in SUFFIXES:
            parser.error(f"--export {args.export} must end in one of {', '.join(SUFFIXES)}")
        if args.export.suffix == ".pth" and args.exit:
            parser.error("--export: a .pth is a network of torchvision's, an exit is none: use "
                         ".pt2 or .onnx")
    for name, useless in (("export", ("json", "save_predictions", "batch_size", "precision")),
                          ("predict", ("data", "skip_unreadable"))):
        given = [f"--{flag.replace('_', '-')}" for flag in useless if getattr(args, flag)]
        if getattr(args, name) and given:
            parser.error(f"--{name} takes no {' or '.join(given)}")
    return args


def choose_machine(args: argparse.Namespace, checkpoint: dict) -> tuple[torch.device, str]:
    """The device and the precision to compute with."""
    device = choose_device(args.device)
    as_trained = "fp32" if checkpoint["args"]["precision"] == "fp32" else "auto"
    return device, choose_precision(args.precision or as_trained, device)


def make_dataset(args: argparse.Namespace, checkpoint: dict) -> ImageFolder:
    """The val images."""
    dataset = ImageFolder(find_splits(args.data or checkpoint["data"], "val") / "val",
                          val_transform(checkpoint["size"], normalized=False),
                          checkpoint["classes"])
    if args.skip_unreadable or checkpoint["args"].get("skip_unreadable"):
        dataset.leave_out_unreadable(args.workers)
    return dataset


def evaluate(args: argparse.Namespace, checkpoint: dict, model: nn.Module,
             exits: dict[str, nn.Module]) -> None:
    """How good a network is on the val images, and its exits."""
    classes, dataset = checkpoint["classes"], make_dataset(args, checkpoint)
    device, precision = choose_machine(args, checkpoint)
    loader = make_loader(dataset, device, args.workers,
                         batch_size=args.batch_size or checkpoint["args"]["batch_size"])
    title = (f"{args.checkpoint}: {checkpoint['arch']}, {len(classes)} classes, "
             f"epoch {checkpoint['epoch']}, {checkpoint['size']} px, {precision} on {device}")
    print(title, f"{dataset.root}: {len(dataset)} images", sep="\n")

    def predictions_of(network: nn.Module) -> Predictions:
        return predict(network, watched(loader, len(dataset)), device, precision)

    predictions = predictions_of(model)
    summary = summarize(predictions, classes)
    print_summary(summary)
    for layer, network in exits.items():
        figures = summarize(predictions_of(network), classes)
        summary.setdefault("exits", {})[layer] = figures
        print(f"exit {layer}: top-1 {figures['top1']:.4f}  "
              f"{figures['images_per_second']:.1f} images/s")
    if args.report:
        log = read_log(Path(args.checkpoint))
        write_file(make_folder(args.report) / "report.html", page(
            title, summary, predictions, dataset, log).encode(errors="backslashreplace"))
    if args.json:
        matrix = confusion_matrix(predictions, len(classes)).tolist()
        write_json(args.json, summary | {"classes": classes, "confusion_matrix": matrix})
    if args.save_predictions:
        names = [[classes[position] for position in column.tolist()]
                 for column in (predictions.labels, predictions.top[:, 0])]
        paths = [path for path, _ in dataset.samples]
        write_csv(args.save_predictions, zip(paths, *names, predictions.confidences.tolist()))


def predict_paths(args: argparse.Namespace, checkpoint: dict, model: nn.Module) -> None:
    """What a network says of the images that --predict names."""
    size = checkpoint["size"]
    pictures = Pictures(find_images(args.predict), val_transform(size, normalized=False), size)
    device, precision = choose_machine(args, checkpoint)
    loader = make_loader(pictures, device, args.workers,
                         batch_size=args.batch_size or checkpoint["args"]["batch_size"])
    results = predict_images(model, pictures, loader, checkpoint["classes"], device, precision)
    if args.json:
        write_json(args.json, results)
    if args.save_predictions:
        write_csv(args.save_predictions,
                  [(result["path"], "", *result["classes"][0].values()) if "classes" in result
                   else (result["path"], "", "", "") for result in results])
    if any("error" in result for result in results):
        sys.exit(1)


def export_checked(args: argparse.Namespace, checkpoint: dict, model: nn.Module) -> None:
    """Export a network, and tell how its outputs compare on some of the val images."""
    dataset = make_dataset(args, checkpoint)
    chosen = torch.linspace(0, len(dataset) - 1, 8).long().tolist()
    images = torch.stack([dataset[index][0] for index in chosen])
    difference = export(model, checkpoint, args.export, to_device(images, torch.device("cpu")))
    size = checkpoint["size"]
    print(f"{args.export}: {checkpoint['arch']}, {len(checkpoint['classes'])} classes; takes "
          f"normalised images (N, 3, {size}, {size}); its outputs for {len(images)} val images are "
          f"the network's, to {difference:.1g}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    checkpoint = read_checkpoint(args.checkpoint)
    model = build_model(checkpoint, args.checkpoint)
    exits = build_exits(model, checkpoint, args.checkpoint)
    if args.exit:
        if args.exit not in exits:
            raise UserError(f"{args.checkpoint} has no exit {args.exit}; it has "
                            f"{listed(list(exits)) or 'none'}")
        model, exits = exits[args.exit], {}
        checkpoint["arch"] += f" up to {args.exit}"
    if args.export:
        export_checked(args, checkpoint, model)
    elif args.predict:
        predict_paths(args, checkpoint, model)
    else:
        evaluate(args, checkpoint, model, exits)


if __name__ == "__main__":
    run_script(main)
