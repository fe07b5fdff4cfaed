"""How good a trained classifier is, and where it is wrong.

    python evaluate.py best.pt

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
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.fx.experimental.optimization import fuse
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import pil_to_tensor

from selfdistill import load_tensors, normalize, to_rgb, val_transform

SIZES = (32, 2048)  # the least and the most pixels of an image's sides
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
    """The image in a file, of any mode, as upright RGB: uint8 (3, H, W)."""
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
        reason = str(error).replace(repr(path), "the file") or type(error).__name__
        raise UnreadableImage(f"cannot read the image {path}: {reason} (--skip-unreadable leaves "
                              "such images out)") from None


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

    Raises:
        UserError: the folder is missing or empty, or has an empty class or an unknown one.
    """

    def __init__(self, root: str | Path, transform: Callable,
                 classes: list[str] | None = None) -> None:
        self.known_classes = classes
        try:
            super().__init__(str(root), transform=transform, loader=load_image)
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


def listed(names: list[str], most: int = 10) -> str:
    """The first names of a list, for a message."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + rest


def find_splits(data: str | Path, *splits: str) -> Path:
    """The folder that holds the splits: `data` itself, or the one folder in it that does."""
    data = Path(data)
    if not data.is_dir():
        raise UserError(f"data folder {data} does not exist")
    inside = sorted(path for path in data.iterdir() if path.is_dir())
    for folder in (data, *inside):
        if all((folder / split).is_dir() for split in splits):
            return folder
    raise UserError(f"data folder {data} has no {' and '.join(f'{split}/' for split in splits)} "
                    "in it, each with one folder of images for each class")


def usable_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ignore_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches a loader's workers too, which the main process still needs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset: ImageFolder, device: torch.device, workers: int, **batching) -> DataLoader:
    # The loader's own generator keeps it from drawing on the global random state.
    return DataLoader(dataset, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=device.type == "cuda", generator=torch.Generator(),
                      worker_init_fn=ignore_ctrl_c, **batching)


def to_device(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """A loader's batch on the device: images (N, 3, H, W), normalised, in channels_last."""
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return normalize(images), labels.to(device, non_blocking=True)


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
        return "bf16" if seconds_of_step("bf16") < 0.8 * seconds_of_step("fp32") else "fp32"
    return "fp32"


def seconds_of_step(precision: str) -> float:
    """The shortest of some forward and backward passes of one convolution on the CPU."""
    layer = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    images = torch.zeros(8, 64, 56, 56).to(memory_format=torch.channels_last)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with autocast(images.device, precision):
            output = layer(images)
        output.sum().backward()
        times.append(time.perf_counter() - start)
    return min(times)


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


def build_model(checkpoint: dict, path: str | Path) -> nn.Module:
    """The plain torchvision network of a checkpoint, with its weights, in eval mode."""
    try:
        model = models.get_model(checkpoint["arch"], num_classes=len(checkpoint["classes"]))
        model.load_state_dict(checkpoint["model"])
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold the weights of a {checkpoint['arch']} with "
                        f"{len(checkpoint['classes'])} classes: {reason}") from None
    return model.eval()


class EarlyExit(nn.Module):
    """A network up to one of its layers, and a classifier of that layer's mean over the image.

    Shape: images (N, 3, H, W) -> logits (N, K)
    """

    def __init__(self, model: nn.Module, layer: str, classifier: nn.Linear) -> None:
        super().__init__()
        self.extractor = create_feature_extractor(model, {layer: "features"})
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.extractor(images)["features"].mean(dim=(2, 3)))


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
                        f"{' '.join(str(error).split())[:200]}") from None
    return exits


# The figures

class Predictions(NamedTuple):
    """What a network says of N images, on the CPU."""
    labels: Tensor  # (N) int64
    losses: Tensor  # (N) float32, cross-entropy in nats
    top: Tensor  # (N, min(5, K)) int64, the best classes, best first
    seconds: float

    @property
    def correct(self) -> Tensor:
        return self.top[:, 0] == self.labels  # (N) bool


@torch.inference_mode()
def outputs(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device,
            precision: str) -> Iterator[tuple[Tensor, Tensor]]:
    """What a network makes of a loader's batches, in fp32: logits (N, K); and their labels (N)."""
    model = fuse(model.eval())  # a copy, with batch norms folded into the convolutions before them
    for images, labels in batches:
        images, labels = to_device(images, labels, device)
        with autocast(device, precision):
            logits = model(images)
        yield logits.float(), labels


def predict(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device,
            precision: str, gather: Callable[[list], list] = list) -> Predictions:
    """What a network says of a loader's images.

    Args:
        gather: makes one list of the lists that several processes have, each from its own batches.
    """
    start = time.perf_counter()
    parts = []
    for logits, labels in outputs(model, batches, device, precision):
        losses = F.cross_entropy(logits, labels, reduction="none")
        parts.append((labels, losses, logits.topk(min(5, logits.shape[1])).indices))
    parts = gather([[column.cpu() for column in part] for part in parts])
    labels, losses, top = (torch.cat(columns) for columns in zip(*parts))
    return Predictions(labels, losses, top, time.perf_counter() - start)


def summarize(predictions: Predictions, classes: list[str]) -> dict:
    """The figures of predictions, as `--json` writes them; accuracies are fractions."""
    labels, correct, count = predictions.labels, predictions.correct, len(predictions.labels)
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    rights = torch.bincount(labels[correct], minlength=len(classes)).tolist()
    in_top5 = (predictions.top == labels[:, None]).any(dim=1)
    return {"top1": correct.sum().item() / count,
            "top5": in_top5.sum().item() / count if len(classes) > 5 else None,
            "loss": predictions.losses.double().mean().item(),
            "count": count,
            "per_class": {name: {"count": counts[position], "correct": rights[position]}
                          for position, name in enumerate(classes) if counts[position]},
            "images_per_second": count / predictions.seconds}


def print_summary(summary: dict) -> None:
    width = max(len("class"), *map(len, summary["per_class"]))
    print(f"{'class':{width}}  accuracy  correct  count")
    for name, row in summary["per_class"].items():
        accuracy = row["correct"] / row["count"]
        print(f"{name:{width}}  {accuracy:8.4f}  {row['correct']:7d}  {row['count']:5d}")
    top5 = "" if summary["top5"] is None else f"  top-5 {summary['top5']:.4f}"
    print(f"top-1 {summary['top1']:.4f}{top5}  loss {summary['loss']:.4f}  "
          f"{summary['count']} images  {summary['images_per_second']:.1f} images/s")


# The command line

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
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # the folder itself is the trouble, which the first error tells
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a user's mistake ends in one line on stderr and exit code 1."""
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description="How good a trained classifier is.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("checkpoint", help="a best.pt or last.pt that train.py wrote")
    parser.add_argument("--data", metavar="DIR",
                        help="folder with val/ in it (default: the one trained on)")
    parser.add_argument("--exit", metavar="LAYER", help="the smaller network that ends with this "
                        "layer (default: the whole one, and a line for each smaller one)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE, too")
    parser.add_argument("--batch-size", type=number(int, 1), metavar="N",
                        help="images at a time (default: as in training)")
    parser.add_argument("--workers", type=number(int, 0, 1024), metavar="N", default=usable_cores(),
                        help="processes that load images; 0: none beside this one")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that "
                        "cannot be read, as training did if it had this flag")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ...")
    parser.add_argument("--precision", choices=["auto", *DTYPES],
                        help="auto: the fastest here (default: auto, but fp32 if trained in that)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    checkpoint = read_checkpoint(args.checkpoint)
    model, classes = build_model(checkpoint, args.checkpoint), checkpoint["classes"]
    exits = build_exits(model, checkpoint, args.checkpoint)
    if args.exit:
        if args.exit not in exits:
            raise UserError(f"{args.checkpoint} has no exit {args.exit}; it has "
                            f"{listed(list(exits)) or 'none'}")
        model, exits = exits[args.exit], {}
    device = choose_device(args.device)
    as_trained = "fp32" if checkpoint["args"]["precision"] == "fp32" else "auto"
    precision = choose_precision(args.precision or as_trained, device)
    folder = find_splits(args.data or checkpoint["data"], "val") / "val"
    dataset = ImageFolder(folder, val_transform(checkpoint["size"], normalized=False), classes)
    if args.skip_unreadable or checkpoint["args"].get("skip_unreadable"):
        dataset.leave_out_unreadable(args.workers)
    loader = make_loader(dataset, device, args.workers,
                         batch_size=args.batch_size or checkpoint["args"]["batch_size"])
    print(f"{args.checkpoint}: {checkpoint['arch']}, {len(classes)} classes, "
          f"epoch {checkpoint['epoch']}, {checkpoint['size']} px, {precision} on {device}")
    print(f"{folder}: {len(dataset)} images")

    def evaluate(network: nn.Module) -> dict:
        network = network.to(device, memory_format=torch.channels_last)
        return summarize(predict(network, loader, device, precision), classes)

    summary = evaluate(model)
    print_summary(summary)
    for layer, network in exits.items():
        figures = evaluate(network)
        summary.setdefault("exits", {})[layer] = figures
        print(f"exit {layer}: top-1 {figures['top1']:.4f}  "
              f"{figures['images_per_second']:.1f} images/s")
    if args.json:
        write_file(args.json, json.dumps(summary, indent=2).encode())


if __name__ == "__main__":
    run_script(main)
