"""Fine-tune an image classifier while the network teaches itself.

    python train.py --data ./data/imagenette2-320 --epochs 5

writes best.pt (best by val accuracy), last.pt (everything needed to go on with --resume) and
log.jsonl (one line an epoch). Without --data it draws a small data set of its own and trains on
that; `--check` only reads the images and tells what is wrong with them. The method is in
selfdistill.py; `python evaluate.py best.pt` tells how good the result is.
On several processes or machines: `torchrun --nproc-per-node N train.py ...`, the same job.
"""
# First of all, as it checks that torch and torchvision fit together.
from evaluate import (DTYPES, SIZES, ImageFolder, Parser, Predictions, UserError, autocast,
                      choose_device, choose_precision, duration, find_splits, listed, load_image,
                      make_folder, make_loader, number, outputs, page, predict, read_checkpoint,
                      rewrite_line, run_script, summarize, to_device, usable_cores, watched,
                      write_file, write_json)

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from math import cos, pi, sin
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, default_collate
from torchvision import datasets

from selfdistill import (IMAGENET_MEAN, IMAGENET_STD, AuxiliaryClassifierLoss, HookedModel,
                         SelfDistillationLoss, find_classifier, hooked_classifier, load_tensors,
                         pooled, train_transform, val_transform)

# What --recipe chooses. Of these alpha, batch_size and lr are flags too, which override it; lr is
# for weights given, scratch_lr for random ones. `soft` is that of the auxiliary classifier's loss;
# fine_tune: a classifier fitted to the weights given comes first, and weights are averaged from it.
TUNED = dict(alpha=0.5, soft=0.0, batch_size=64, lr=0.004, scratch_lr=0.1, one_cycle=True,
             nesterov=True, weight_decay=5e-4, label_smoothing=0.1, crop_scale=(0.35, 1.0),
             fine_tune=True)
RECIPES = {
    "tuned": TUNED,
    "byot": TUNED | dict(soft=0.3),
    "blog": dict(alpha=0.5, batch_size=32, lr=0.01, scratch_lr=0.01, one_cycle=False,
                 nesterov=False, weight_decay=0.0, crop_scale=(0.08, 1.0), fine_tune=False),
}
INITIAL_SHARE = 0.25  # of the weights given in the average of fine-tuned ones, after the last step
COLLAPSED = 0.02  # the spread of features below which they are nearly alike
NONE_YET = {"epoch": -1, "val_acc": -1.0}  # the best epoch before there is one
Loss = AuxiliaryClassifierLoss | SelfDistillationLoss
IMAGENETTES = {"imagenette2": "full", "imagenette2-320": "320px", "imagenette2-160": "160px"}


# The processes: this one alone, or all that torchrun started

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """The rank among the processes of this machine."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_initialized() else 0


def gather(values: list) -> list:
    """The values of all processes in one list, by rank; it also makes them wait for one another."""
    if not dist.is_initialized():
        return values
    lists = [None] * world_size()
    dist.all_gather_object(lists, values)
    return list(itertools.chain.from_iterable(lists))


def from_first(function: Callable, *arguments: object) -> object:
    """What a function returns in the process of rank 0, the only one where it runs."""
    values = [function(*arguments) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def first_on_its_machine_first() -> Iterator[None]:
    """Let one process of each machine go ahead, to draw or download what the others will find."""
    is_first = local_rank() == 0
    if not is_first:
        gather([])
    yield
    if is_first:
        gather([])


def refuse_shared_gpu(device: torch.device) -> None:
    if device.type == "cuda" and dist.is_initialized() and device.index != local_rank():
        raise UserError(f"process {rank()} has no GPU of its own: start at most "
                        f"{torch.cuda.device_count()} on this machine, and name no index in "
                        "--device")


def store_of_attempt() -> dict:
    """Where the processes find each other: not where those of the attempt before a restart did.

    torchrun keeps one store for all attempts, so that connecting anew can find the addresses of
    processes that have ended (pytorch/pytorch issue 135712). Machines may count attempts
    differently; several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment.
    """
    environ = os.environ
    if (environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            or environ["WORLD_SIZE"] != environ["LOCAL_WORLD_SIZE"]):
        return {}
    store = dist.TCPStore(environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), is_master=False)
    return {"store": dist.PrefixStore(environ["TORCHELASTIC_RESTART_COUNT"], store),
            "rank": int(environ["RANK"]), "world_size": int(environ["WORLD_SIZE"])}


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun started, if it did; only that of rank 0 prints."""
    if not dist.is_torchelastic_launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            **store_of_attempt())
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    # torchrun leaves each process one thread.
    torch.set_num_threads(max(1, usable_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            null = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(null))
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            reason = str(error).partition(". ")[0]
            raise UserError(f"process {rank()} has lost the others; one of them tells why, or was "
                            f"killed ({reason})") from None
    dist.destroy_process_group()


# The data

def find_data(data: str | None) -> Path:
    """The folder with train/ and val/; the embedded set is drawn, an Imagenette downloaded."""
    if data is None:
        folder = Path("data/shapes")
        if not folder.exists():
            draw_shapes(folder)
        data = folder
    elif not Path(data).exists() and Path(data).name in IMAGENETTES:
        download_imagenette(Path(data))
    return find_splits(data, "train", "val")


def download_imagenette(folder: Path) -> None:
    """Imagenette from its publisher, checked and unpacked by torchvision, whole or not at all."""
    print(f"downloading {folder.name} to {folder} …", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
            datasets.Imagenette(temporary, size=IMAGENETTES[folder.name], download=True)
            Path(temporary, folder.name).rename(folder)
    except (OSError, RuntimeError) as error:
        url = f"https://s3.amazonaws.com/fast-ai-imageclas/{folder.name}.tgz"
        raise UserError(f"cannot download {folder.name} ({error}): fetch {url} and unpack it "
                        f"as {folder}") from None


def polygon(corners: int) -> Callable[[float], float]:
    wedge = 2 * pi / corners
    return lambda angle: cos(wedge / 2) / cos(angle % wedge - wedge / 2)


# The embedded data set: each shape by its radius at an angle in radians; no radius is above 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "bow": lambda angle: 0.15 + 0.85 * abs(cos(angle)),
    "circle": lambda angle: 0.85,
    "clover": lambda angle: 0.6 + 0.4 * cos(3 * angle),
    "cross": lambda angle: min(0.95, 0.3 / max(0.01, min(abs(sin(angle)), abs(cos(angle))))),
    "drop": lambda angle: 1 - 0.6 * abs(sin(angle / 2)) ** 0.4,
    "ellipse": lambda angle: 0.44 / math.sqrt(1 - 0.8 * cos(angle) ** 2),
    "flower": lambda angle: 0.8 + 0.2 * cos(7 * angle),
    "square": polygon(4),
    "star": lambda angle: 0.4 + 0.6 * abs(1 - angle * 5 / pi % 2) ** 1.3,
    "triangle": polygon(3),
}


def draw_shapes(folder: Path, train: int = 350, val: int = 50) -> None:
    """Write the embedded data set, train/ and val/ with so many images a class, or nothing."""
    print(f"drawing the embedded data set in {folder} …", flush=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        for split, count in (("train", train), ("val", val)):
            for name in SHAPES:
                (temporary / split / name).mkdir(parents=True)
                for k in range(count):
                    image = draw_shape(name, random.Random(f"{split}/{name}/{k}"))
                    image.save(temporary / split / name / f"{k:03d}.png")
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write the embedded data set to {folder}: {error.strerror}; run "
                        "in a folder of your own, or give --data") from None


def draw_shape(name: str, rng: random.Random, size: int = 64) -> Image.Image:
    """A bright shape of any colour, place, size and tilt over dark scribbles, size px square."""
    large = 4 * size  # drawn large and then shrunk, so that edges are smooth
    ground = [rng.randrange(110) for _ in range(3)]
    image = Image.new("RGB", (large, large), tuple(ground))
    canvas = ImageDraw.Draw(image)
    for _ in range(12):
        shade = tuple(value + rng.randint(0, 60) for value in ground)
        ends = [rng.randrange(large) for _ in range(4)]
        canvas.line(ends, fill=shade, width=rng.randint(2, large // 12))
    radius = rng.uniform(0.25, 0.45) * large
    x, y = (rng.uniform(radius, large - radius) for _ in range(2))
    tilt = rng.uniform(-pi / 6, pi / 6)
    angles = [2 * pi * k / 360 for k in range(360)]
    radii = [radius * SHAPES[name](angle) for angle in angles]
    canvas.polygon([(x + r * cos(angle + tilt), y + r * sin(angle + tilt))
                    for r, angle in zip(radii, angles)],
                   fill=tuple(rng.randrange(150, 256) for _ in range(3)))
    return image.resize((size, size), Image.Resampling.LANCZOS)


class Examined(NamedTuple):
    """What is found on reading an image: Pillow's mode, width and height, or an error."""
    mode: str = ""
    size: tuple[int, int] = (0, 0)  # in pixels
    digest: bytes = b""  # of size and pixels
    error: str = ""


def examine(path: str) -> Examined:
    try:
        pixels = load_image(path)
        with Image.open(path) as image:
            digest = hashlib.sha256(repr(image.size).encode() + pixels.numpy().tobytes())
            return Examined(image.mode, image.size, digest.digest())
    except Exception as error:  # a damaged file can raise nearly anything
        return Examined(error=str(error))


def check(args: argparse.Namespace) -> int:
    """Read all images; tell what would make training fail or mislead. Returns the exit code."""
    folder = find_data(args.data)
    problems, notes, classes, copies = {}, {}, {}, defaultdict(list)
    for split in ("train", "val"):
        images = ImageFolder(folder / split, transform=None, allow_empty=True)
        paths = [path for path, _ in images.samples]
        with ThreadPool(args.workers or usable_cores()) as pool:
            examined = list(watched(pool.imap(examine, paths, chunksize=8), len(paths),
                                    f"{split} images", size=lambda item: 1))
        print_examined(split, images, examined)
        classes[split] = set(images.classes)
        used = {label for label, image in zip(images.targets, examined) if not image.error}
        problems[f"classes without readable images in {split}/"] = [
            name for label, name in enumerate(images.classes) if label not in used]
        (notes if args.skip_unreadable else problems)[f"unreadable images in {split}/"] = [
            image.error for image in examined if image.error]
        notes[f"files in {split}/ that are ignored, by their suffix no images"] = sorted(
            str(file) for file in Path(images.root).rglob("[!.]*") if file.is_file()
            and file.suffix.lower() not in datasets.folder.IMG_EXTENSIONS)
        for (path, label), image in zip(images.samples, examined):
            if not image.error:
                copies[image.digest].append((split, images.classes[label], path))
    problems["classes that only one of train/ and val/ has"] = sorted(
        classes["train"] ^ classes["val"])
    leaked, ambiguous, repeated = sort_copies(copies.values())
    problems["images in both train/ and val/, which flatter val accuracy"] = leaked
    problems["images in more than one class"] = ambiguous
    notes["images twice or more in the same class of the same split"] = repeated
    for kind, found in (("note", notes), ("problem", problems)):
        for what, items in found.items():
            if items:
                print(f"{kind}: {len(items)} {what}", *items[:20], sep="\n  ")
                print(f"  and {len(items) - 20} more\n" * (len(items) > 20), end="")
    count = sum(map(len, problems.values()))
    print(f"problems found: {count or 'none'}")
    return int(count > 0)


def sort_copies(groups: Iterable[list[tuple[str, str, str]]]) -> tuple[list[str], ...]:
    """Of images that are alike, each as split, class and path: those in both splits, those in two
    classes or more, and those that are together in one class of one split."""
    leaked, ambiguous, repeated = [], [], []
    for group in groups:
        splits, names, paths = zip(*group)
        line = " = ".join(paths)
        if len(set(splits)) > 1:
            leaked.append(line)
        if len(set(names)) > 1:
            ambiguous.append(line)
        if len(group) > len(set(zip(splits, names))):
            repeated.append(line)
    return leaked, ambiguous, repeated


def print_examined(split: str, images: ImageFolder, examined: list[Examined]) -> None:
    counts = Counter(images.targets).most_common()
    print(f"{split + '/':7}{len(images)} images, {len(images.classes)} classes" + (
        f", of {counts[-1][1]} ({images.classes[counts[-1][0]]}) to {counts[0][1]} "
        f"({images.classes[counts[0][0]]}) images" if counts else ""))
    sizes = [image.size for image in examined if not image.error]
    if sizes:
        least, median, most = ("{} x {}".format(*map(function, zip(*sizes)))
                               for function in (min, statistics.median_low, max))
        modes = Counter(image.mode for image in examined if not image.error).most_common()
        print(f"       {least} to {most} pixels, median {median}; "
              + ", ".join(f"{mode} {times}" for mode, times in modes))


class Augmented(Dataset):
    """The images of a folder asked for as (index, seed), which alone decide their augmentation."""

    def __init__(self, folder: ImageFolder, transform: Callable) -> None:
        self.folder, self.transform = folder, transform

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.folder.load(index, self.transform)


class EpochBatches(Sampler):
    """The batches of one epoch, in an order that seed and epoch decide, from `start` on.

    All batches are of the same size within one image, so that none is too small for batch norm.
    Each process gets its part of every batch. Set `epoch` and `start` before iterating.

    Args:
        count: images in the data set.
        batch_size: images in a batch, at most, on all processes together.
        seed: of the order and of every image's augmentation.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def size(self, position: int) -> int:
        """Images in the batch at a position, on all processes together."""
        return self.count // len(self) + (position < self.count % len(self))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        seeds = torch.randint(2 ** 32, (self.count,), generator=generator)
        order = torch.randperm(self.count, generator=generator)
        for batch in order.tensor_split(len(self))[self.start:]:
            part = batch.tensor_split(world_size())[rank()]
            yield list(zip(part.tolist(), seeds[part].tolist()))


def mix(*numbers: int) -> int:
    """A seed made of numbers: 32 bits, as torch's CPU generator ignores all higher ones."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)


class Data(NamedTuple):
    """Both splits, loaders of this process's share of them, and what tells if they change."""
    train_set: ImageFolder
    val_set: ImageFolder
    train_loader: DataLoader  # augmented
    val_loader: DataLoader
    fingerprints: dict[str, str]

    @property
    def classes(self) -> list[str]:
        return self.train_set.classes

    def augmented(self, count: int, seed: int) -> list[tuple[Tensor, int]]:
        """So many train images (H, W, 3) from all over the folder, and their labels."""
        indices = torch.linspace(0, len(self.train_set) - 1, min(count, len(self.train_set)))
        return [self.train_loader.dataset[index, mix(seed, index)]
                for index in indices.long().tolist()]


def fingerprint(dataset: ImageFolder) -> str:
    """What tells whether the images of a folder are still the same: number and names."""
    names = "\n".join(path[len(dataset.root):] for path, _ in dataset.samples)
    digest = hashlib.sha256(os.fsencode(names)).hexdigest()
    return f"{len(dataset)} images (SHA-256 of their names: {digest[:16]})"


def make_data(args: argparse.Namespace, device: torch.device) -> Data:
    """Both splits, whose classes must be the same, and their loaders."""
    with first_on_its_machine_first():
        folder = find_data(args.data)
    args.data = str(folder.resolve())
    transform = val_transform(args.size, normalized=False)
    train_set, val_set = (ImageFolder(folder / split, transform) for split in ("train", "val"))
    unmatched = sorted(set(train_set.classes) ^ set(val_set.classes))
    if unmatched:
        raise UserError(f"the classes of train/ and val/ in {folder} differ: only one of them "
                        f"has {listed(unmatched)}")
    share = slice(rank(), None, world_size())
    workers = args.workers
    if workers is None:
        workers = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.skip_unreadable:
        for dataset in (train_set, val_set):
            dataset.leave_out_unreadable(workers, share, gather)
    batches = EpochBatches(len(train_set), args.batch_size, args.seed)
    refuse_small_batches(batches, args.size)
    scale = RECIPES[args.recipe]["crop_scale"]
    augmented = Augmented(train_set, train_transform(args.size, scale, normalized=False))
    return Data(train_set, val_set, make_loader(augmented, device, workers, batch_sampler=batches),
                make_loader(Subset(val_set, range(len(val_set))[share]), device, workers,
                            batch_size=args.batch_size // world_size()),
                {"train": fingerprint(train_set), "val": fingerprint(val_set)})


def refuse_small_batches(batches: EpochBatches, size: int) -> None:
    if batches.batch_size % world_size():
        raise UserError(f"--batch-size {batches.batch_size} cannot be split evenly among "
                        f"{world_size()} processes: use a multiple of {world_size()}")
    least = batches.size(len(batches) - 1) // world_size()
    if least < (2 if size <= 32 else 1):  # at 32 pixels, batch norm has one value an image
        raise UserError(f"the smallest batch leaves a process {least} images, too few for batch "
                        f"norm at {size} pixels: use a larger --batch-size or --size")


# The network and its optimiser

def make_model(args: argparse.Namespace, num_classes: int, weights: str,
               device: torch.device) -> HookedModel:
    try:
        with first_on_its_machine_first():
            model = hooked_classifier(args.arch, num_classes, weights, args.student_layer,
                                      args.teacher_layer)
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot get the weights {weights!r} ({error}): give a FILE, or none for "
                        "random weights") from None
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f"{weights}: not all of its weights are finite")
    args.student_layer, args.teacher_layer = model.layer_names
    if device.type == "cuda" and world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(device, memory_format=torch.channels_last)


def make_criterion(args: argparse.Namespace, model: HookedModel, num_classes: int) -> Loss:
    recipe = RECIPES[args.recipe]
    try:
        logits, *features = model.dry_run(args.size)
        student_channels, teacher_channels = (pooled(output).shape[1] for output in features)
        if args.recipe == "blog":
            criterion = SelfDistillationLoss(args.alpha, student_channels, teacher_channels)
        else:
            criterion = AuxiliaryClassifierLoss(num_classes, args.alpha, student_channels,
                                                recipe["soft"],
                                                label_smoothing=recipe["label_smoothing"])
        criterion.to(logits.device)(logits, logits.argmax(dim=1), *features)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{args.arch} cannot be trained at --size {args.size} by --recipe "
                        f"{args.recipe}: {textwrap.shorten(str(error), 200)}") from None
    # The published adapter is never trained; without distillation, nothing of the loss is.
    return criterion.requires_grad_(args.recipe != "blog" and args.distillation)


class Distiller(nn.Module):
    """The hooked network and its loss as one module, so that DDP averages the gradients of both.

    Args:
        distill: False only measures the distillation term, which is then not part of the loss.

    Shape:
        - images: (N, 3, H, W); labels: (N)
        - returns logits (N, K), and the loss and its two terms, scalars, which are computed in
          fp32 whatever the precision
    """

    def __init__(self, model: HookedModel, criterion: Loss, precision: str,
                 distill: bool = True) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion
        self.precision, self.distill = precision, distill

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with autocast(images.device, self.precision):
            logits, student, teacher = self.model(images)
        logits = logits.float()
        ce, distillation = self.criterion.terms(logits, labels, student.float(), teacher.float())
        loss = self.criterion.combine(ce, distillation if self.distill else torch.zeros_like(ce))
        return logits, loss, ce, distillation


def make_optimizer(args: argparse.Namespace, model: HookedModel,
                   criterion: Loss) -> SGD:
    """SGD, with no decay of biases and norms."""
    recipe = RECIPES[args.recipe]
    parameters = [parameter for parameter in [*model.parameters(), *criterion.parameters()]
                  if parameter.requires_grad]
    groups = [{"params": [parameter for parameter in parameters
                          if (parameter.ndim > 1) == is_matrix],
               "weight_decay": recipe["weight_decay"] if is_matrix else 0.0}
              for is_matrix in (True, False)]
    # Fused, a first step that fp16's scaler skips would leave the momentum uninitialised.
    return SGD(groups, lr=args.lr, momentum=0.9, nesterov=recipe["nesterov"],
               fused=args.precision != "fp16")


def make_scheduler(optimizer: SGD, one_cycle: bool, steps: int) -> LRScheduler:
    """A warm-up and a cosine down to nought over all steps of the run, or a constant."""
    if not one_cycle:
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    return OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups],
                      total_steps=max(2, steps), cycle_momentum=False)


# The run

class Run:
    """All that changes while training; what last.pt keeps of it is `state_dict()`.

    No random state is among it: seed, epoch, batch and rank decide that of every step.

    Args:
        decay: of a moving average of the network's weights, a step, in [0, 1]. It is then the
            average that is validated and saved. Default: None, the weights themselves
    """

    FIGURES = ("epoch", "batch", "totals", "seconds", "log", "best")

    def __init__(self, model: HookedModel, criterion: Loss, optimizer: SGD, scheduler: LRScheduler,
                 scaler: torch.amp.GradScaler, decay: float | None = None) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.scheduler, self.scaler = scheduler, scaler
        self.average = None if decay is None else AveragedModel(
            model.model, multi_avg_fn=moving_average(decay), use_buffers=True)
        self.result = self.average.module if self.average else model.model  # what is validated
        self.device = next(model.parameters()).device
        self.epoch = 0  # epochs completed
        self.log: list[dict] = []  # a line for each of them
        self.best = dict(NONE_YET)
        self.start_epoch()

    def start_epoch(self) -> None:
        self.batch = 0  # batches of this epoch already trained on
        self.seconds = 0.0  # spent on them
        # Sums over their images: 1, loss, cross-entropy, distillation, correct.
        self.totals = torch.zeros(5, device=self.device)

    def start_average(self) -> None:
        """Let the average begin with the weights as they are now."""
        self.average.n_averaged.zero_()
        self.average.update_parameters(self.model.model)

    def parts(self) -> dict:
        parts = {"network": self.model.model, "criterion": self.criterion,
                 "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}
        return parts | {"average": self.average} if self.average else parts

    def state_dict(self) -> dict:
        return ({name: part.state_dict() for name, part in self.parts().items()}
                | {name: getattr(self, name) for name in self.FIGURES})

    def load_state_dict(self, state: dict) -> None:
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for name in self.FIGURES:
            if type(state[name]) is not type(getattr(self, name)):
                raise TypeError(f"{name} is a {type(state[name]).__name__}")
            setattr(self, name, state[name])
        self.totals = self.totals.to(self.device)

    def check_finite(self, *tensors: Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in (self.totals, *tensors)):
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            raise UserError(f"the loss is not finite in epoch {self.epoch + 1}, by batch "
                            f"{self.batch} (learning rate {rate:.3g}): try a lower --lr; last.pt "
                            "keeps the last good state")


def moving_average(decay: float) -> Callable:
    """The update of an AveragedModel: of whole numbers, such as positions, a copy.

    As a mean of two equal ones, torch's rounding can make another of them.
    """
    average = get_ema_multi_avg_fn(decay)

    def update(averages: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        if averages[0].is_floating_point():
            average(averages, values, count)
        else:
            for old, new in zip(averages, values):
                old.copy_(new)
    return update


class Stopped(Exception):
    """The run was asked to stop, by the signal whose number is the argument."""


class Checkpointer:
    """Saves a run after each epoch, every so often, and on signals; always between two steps.

    SIGINT (Ctrl-C) and SIGTERM save and stop it, SIGUSR1 saves and goes on; a second SIGINT stops
    at once. A signal to any of several processes is one to all.

    Args:
        run: to save.
        args: the settings of the run; its `save_every` is in minutes.
        data: that it is trained on.
    """

    def __init__(self, run: Run, args: argparse.Namespace, data: Data) -> None:
        self.run, self.args, self.data = run, args, data

    def __enter__(self) -> "Checkpointer":
        self.stop, self.wanted, self.saved = 0, False, time.monotonic()
        self.previous = {getattr(signal, name): signal.signal(getattr(signal, name), self.note)
                         for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.wanted = True
        elif number == signal.SIGINT and self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = self.stop or number

    def attend(self, batches: Iterable, steps: int) -> Iterator:
        """The batches; between two of them the run is saved or, by Stopped, left when asked to.

        Args:
            batches: those of this process.
            steps: the number of batches of the process that has the most of them.
        """
        batches = itertools.chain.from_iterable([batches])  # starts its workers when first asked
        for _ in range(steps):
            batch = self.fetch(batches)
            due = rank() == 0 and time.monotonic() - self.saved >= 60 * self.args.save_every
            wishes = torch.tensor([self.stop, self.wanted or due])
            if dist.is_initialized():
                dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
            stop, save = wishes.tolist()
            if stop:
                raise Stopped(stop)
            if save:
                self.save()
            if batch is not None:
                yield batch

    def fetch(self, batches: Iterator) -> tuple[Tensor, Tensor] | None:
        """The next batch; None after the last, or where this process has been asked to stop."""
        if self.stop:
            return None
        try:
            batch = next(batches, None)
        except (RuntimeError, OSError, EOFError) as error:  # what comes of a worker's death
            if isinstance(error, RuntimeError) and not str(error).startswith(
                    ("DataLoader worker", "Pin memory thread")):
                raise
            time.sleep(1)  # a signal to all processes may reach this one last
            if self.stop:
                return None
            raise UserError(f"a process that loads images has died ({error}), maybe for want of "
                            "memory: try fewer --workers; last.pt keeps the last state "
                            "saved") from None
        if hasattr(signal, "SIGCHLD"):  # by torch's handler a worker's death would break up a step
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        return batch

    def save(self) -> None:
        """Write last.pt and log.jsonl; before them best.pt, if the epoch just ended is the best."""
        self.wanted, self.saved = False, time.monotonic()
        run, args = self.run, self.args
        run.check_finite(*run.model.parameters())
        if rank() > 0:
            return
        settings = {name: value for name, value in vars(args).items()
                    if name not in ("out", "resume", "compare", "check")}
        checkpoint = {"model": run.result.state_dict(), "arch": args.arch,
                      "classes": self.data.classes, "size": args.size, "mean": list(IMAGENET_MEAN),
                      "std": list(IMAGENET_STD), "epoch": run.epoch,
                      "val_acc": max(0.0, (run.log or [run.best])[-1]["val_acc"]),
                      "data": args.data, "args": settings}
        has_exit = run.epoch and args.distillation and args.alpha
        if has_exit and isinstance(run.criterion, AuxiliaryClassifierLoss):
            layer = run.model.layer_names[0]
            checkpoint["exits"] = {layer: run.criterion.classifier.state_dict()}
        if (run.epoch, run.batch) == (run.best["epoch"], 0):
            write_checkpoint(Path(args.out, "best.pt"), checkpoint)
        state = run.state_dict() | {"data": self.data.fingerprints}
        write_checkpoint(Path(args.out, "last.pt"), checkpoint | {"run": state})
        lines = "".join(json.dumps(line) + "\n" for line in run.log)
        write_file(Path(args.out, "log.jsonl"), lines.encode())


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with buffer.getbuffer() as content:
        write_file(path, content)


class Progress:
    """One line on a terminal, rewritten as training goes on; elsewhere only a check of the loss."""

    def __init__(self, epochs: int, batches: int, count: int) -> None:
        self.epochs, self.batches, self.count = epochs, batches, count
        self.shown = 0.0

    def show(self, run: Run) -> None:
        """At most twice a second, as reading the figures makes an accelerator wait."""
        now = time.perf_counter()
        if now - self.shown < 0.5:
            return
        self.shown = now
        run.check_finite()
        images, loss = run.totals[:2].tolist()
        speed = images / run.seconds
        left = ((self.epochs - run.epoch) * self.count - images) / speed
        rewrite_line(f"epoch {run.epoch + 1}/{self.epochs}  batch {run.batch}/{self.batches}  "
                     f"{speed:.1f} images/s  loss {loss / images:.4f}  {duration(left)} left")


def train_epoch(run: Run, network: nn.Module, batches: Iterable, sampler: EpochBatches,
                progress: Progress) -> None:
    """Train on the rest of an epoch's batches, adding up the figures in `run.totals`."""
    network.train()
    start = time.perf_counter() - run.seconds
    for images, labels in batches:
        torch.manual_seed(mix(sampler.seed, run.epoch, run.batch, rank()))
        images = to_device(images, run.device)
        labels = labels.to(run.device, non_blocking=True)
        run.optimizer.zero_grad()
        logits, loss, ce, distillation = network(images, labels)
        # DDP takes the mean over the processes, whose parts of a batch may differ by one image.
        share = len(labels) * world_size() / sampler.size(run.batch)
        run.scaler.scale(loss * share).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.scheduler.step()
        if run.average:
            run.average.update_parameters(run.model.model)

        correct = (logits.argmax(dim=1) == labels).float().mean()
        figures = torch.stack([torch.ones_like(loss), loss, ce, distillation, correct])
        figures = figures.detach() * len(labels)
        if dist.is_initialized():
            dist.all_reduce(figures)
        run.totals += figures
        run.batch += 1
        run.seconds = time.perf_counter() - start
        progress.show(run)
    run.check_finite()


def validate(run: Run, data: Data, args: argparse.Namespace,
             checkpointer: Checkpointer) -> Predictions:
    """Predictions for the val images, each by one of the processes, in the order of the folder."""
    if dist.is_initialized():
        # Processes differ in batch norm's statistics, and rounding may differ in their averages.
        for tensor in run.result.state_dict().values():
            dist.broadcast(tensor, src=0)
    steps = math.ceil(len(data.val_set) / args.batch_size)
    loader = watched(data.val_loader, len(data.val_loader.dataset), "validating: images")
    batches = checkpointer.attend(loader, steps)
    predictions = predict(run.result, batches, run.device, args.precision, gather)
    indices = torch.arange(len(data.val_set))
    order = torch.cat([indices[first::world_size()] for first in range(world_size())]).argsort()
    *columns, seconds = predictions
    return Predictions(*(column[order] for column in columns), seconds)


def fit_classifier(run: Run, data: Data, args: argparse.Namespace,
                   checkpointer: Checkpointer) -> None:
    """Fit a logistic regression to the features that the weights given yield.

    A random classifier would distort them first: Kumar et al., Fine-Tuning can Distort Pretrained
    Features and Underperform Out-of-Distribution, arXiv:2202.10054. A sample of the train images is
    enough, seen as in validation.
    """
    count = min(len(data.train_set), 400 * len(data.classes), 20_000)
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(data.train_set), generator=generator)[:count].tolist()
    loader = make_loader(Subset(data.train_set, chosen[rank()::world_size()]), run.device,
                         data.val_loader.num_workers, batch_size=data.val_loader.batch_size)
    watched_loader = watched(loader, len(loader.dataset), "fitting the classifier: images")
    batches = checkpointer.attend(watched_loader, math.ceil(count / args.batch_size))
    name = find_classifier(run.model.model)
    classifier = run.model.model.get_submodule(name)
    headless = copy.deepcopy(run.model.model)  # a copy, as the run may be saved meanwhile
    headless.set_submodule(name, nn.Identity())
    parts = [(features.cpu(), labels) for features, labels
             in outputs(headless, batches, run.device, args.precision)]
    features, labels = (torch.cat(part).to(run.device) for part in zip(*gather(parts)))
    for parameter in classifier.parameters():
        nn.init.zeros_(parameter)
    optimizer = LBFGS(classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels)
        loss = loss + 0.01 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def begin(run: Run, data: Data, args: argparse.Namespace, checkpointer: Checkpointer) -> None:
    """Epoch 0: the accuracy of the weights given, once a classifier is fitted to them."""
    start = time.perf_counter()
    fit_classifier(run, data, args, checkpointer)
    run.start_average()
    predictions = validate(run, data, args, checkpointer)
    val = summarize(predictions, data.classes)
    run.best = {"epoch": 0, "val_acc": val["top1"]}
    checkpointer.save()
    report(run, data, args, predictions)
    rewrite_line()
    print(f"epoch 0/{args.epochs}  only the classifier fitted  val acc {val['top1']:.4f}  "
          f"{time.perf_counter() - start:.1f} s", flush=True)


def report(run: Run, data: Data, args: argparse.Namespace, predictions: Predictions) -> None:
    """Write the page of the run so far, if it is asked for."""
    if not args.report or rank() > 0:
        return
    augmented = [(image, data.classes[label])
                 for image, label in data.augmented(20, mix(args.seed, run.epoch))]
    title = f"{Path(args.out).resolve().name}: {args.arch} after epoch {run.epoch} of {args.epochs}"
    html = page(title, summarize(predictions, data.classes), predictions, data.val_set, run.log,
                augmented, refresh=run.epoch < args.epochs)
    write_file(Path(args.out, "report.html"), html.encode(errors="backslashreplace"))


def health(run: Run, data: Data, seed: int) -> dict[str, float]:
    """How the distillation term does, on some augmented train images, at most a batch or 32.

    The ratio of its gradient to that of the cross-entropy, both as weighted in the loss, with
    respect to the student features; then, of the student and the teacher features, what
    `norm_and_spread` tells. It is the weights trained that are looked at, not their average, in a
    copy of the network, so that nothing of the run changes.
    """
    seed = mix(seed, run.epoch)
    torch.manual_seed(seed)  # of dropout
    images, labels = default_collate(data.augmented(min(32, data.val_loader.batch_size), seed))
    images, labels = to_device(images, run.device), labels.to(run.device)
    logits, student, teacher = copy.deepcopy(run.model).train()(images)
    zero = torch.zeros((), device=run.device)
    ce, distillation = run.criterion.terms(logits, labels, student, teacher)
    ce, distillation = (torch.autograd.grad(term, student, retain_graph=True)[0].norm().item()
                        for term in (run.criterion.combine(ce, zero),
                                     run.criterion.combine(zero, distillation)))
    figures = {"gradient_ratio": distillation / ce if ce else None}
    for name, features in (("student", student), ("teacher", teacher)):
        figures[f"{name}_norm"], figures[f"{name}_spread"] = norm_and_spread(features)
    return figures


@torch.no_grad()
def norm_and_spread(features: Tensor) -> tuple[float, float]:
    """The mean length of features over the channels, and the spread of their directions.

    The spread is the root mean square distance from their mean, from 0 (all alike) to 1. Features
    are maps (N, C, H, W) or tokens (N, L, C).
    Features that collapse are alike: Chen & He, SimSiam, arXiv:2011.10566, section 4.1.
    """
    features = features.flatten(2) if features.ndim == 4 else features.mT  # (N, C, positions)
    directions = F.normalize(features, dim=1)
    away = directions - directions.mean(dim=(0, 2), keepdim=True)
    return features.norm(dim=1).mean().item(), away.square().sum(dim=1).mean().sqrt().item()


def finish_epoch(run: Run, predictions: Predictions, classes: list[str],
                 figures: dict[str, float]) -> dict:
    """Close the epoch: its log line, with the further figures; and whether it is the best yet."""
    images, *sums = run.totals.tolist()
    loss, ce, distillation, train_acc = (value / images for value in sums)
    val = summarize(predictions, classes)
    if not math.isfinite(val["loss"]):
        raise UserError(f"the val loss is not finite after epoch {run.epoch + 1}: try a lower "
                        "--lr; last.pt keeps the last good state")
    run.epoch += 1
    line = {"epoch": run.epoch, "train_loss": loss, "ce_loss": ce,
            "distillation_loss": distillation, "train_acc": train_acc, "val_loss": val["loss"],
            "val_acc": val["top1"], "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_second": images / run.seconds,
            "seconds": run.seconds + predictions.seconds} | figures
    run.log.append(line)
    if line["val_acc"] > run.best["val_acc"]:  # a tie leaves the earlier epoch the best
        run.best = {"epoch": run.epoch, "val_acc": line["val_acc"]}
    run.start_epoch()
    return line


def train(run: Run, data: Data, args: argparse.Namespace, checkpointer: Checkpointer) -> None:
    """Train and validate for the epochs that are left, saving after each."""
    network = make_network(run, args)
    sampler = data.train_loader.batch_sampler
    progress = Progress(args.epochs, len(sampler), sampler.count)
    while run.epoch < args.epochs:
        sampler.epoch, sampler.start = run.epoch, run.batch
        batches = checkpointer.attend(data.train_loader, len(sampler) - run.batch)
        train_epoch(run, network, batches, sampler, progress)
        predictions = validate(run, data, args, checkpointer)
        line = finish_epoch(run, predictions, data.classes, health(run, data, args.seed))
        checkpointer.save()
        report(run, data, args, predictions)
        rewrite_line()
        print(f"epoch {run.epoch}/{args.epochs}  loss {line['train_loss']:.4f} "
              f"(ce {line['ce_loss']:.4f}, distillation {line['distillation_loss']:.4g})  "
              f"train acc {line['train_acc']:.4f}  val acc {line['val_acc']:.4f}  "
              f"{line['images_per_second']:.1f} images/s  {line['seconds']:.1f} s", flush=True)
        warn_of_collapse(run.log)


def warn_of_collapse(log: list[dict]) -> None:
    """Once, after the first epoch of which it is true."""
    spreads = [min(line["student_spread"], line["teacher_spread"]) for line in log]
    if spreads[-1] < COLLAPSED and min(spreads[:-1], default=1) >= COLLAPSED:
        print(f"warning: the features have collapsed, they are nearly alike for all images (spread "
              f"{spreads[-1]:.2g} of at most 1): try a lower --alpha or --lr", flush=True)


def make_network(run: Run, args: argparse.Namespace) -> nn.Module:
    """The network and its loss, compiled and distributed as asked."""
    network = Distiller(run.model, run.criterion, args.precision, args.distillation)
    if args.compile:
        network = torch.compile(network)
    if dist.is_initialized():
        devices = [run.device] if run.device.type == "cuda" else None
        network = DistributedDataParallel(network, device_ids=devices)
    return network


# The command line

def make_parser() -> Parser:
    def by_recipe(setting: str) -> str:
        return ", ".join(f"{name}: {recipe[setting]:g}" for name, recipe in RECIPES.items())

    parser = Parser(prog="train.py", description="Fine-tune an image classifier while the "
                    "network teaches itself.")
    group = parser.add_argument_group("data and results")
    group.add_argument("--data", metavar="DIR", help="folder with train/ and val/, each with one "
                       "folder of images a class; a missing imagenette2, imagenette2-320 or "
                       "imagenette2-160 is downloaded (default: drawn shapes in ./data/shapes)")
    group.add_argument("--out", metavar="DIR", default=".",
                       help="for best.pt, last.pt and log.jsonl (default: the current folder)")
    group.add_argument("--resume", metavar="FILE", nargs="?", const="",
                       help="go on from FILE (default: last.pt in --out), by default in its "
                       "folder; auto: from last.pt, or anew if there is none yet")
    group.add_argument("--save-every", type=number(float, 0), metavar="MINUTES", default=10.0,
                       help="write last.pt so often, besides after each epoch (default: 10)")
    group.add_argument("--compare", type=number(int, 2), metavar="N", help="train N pairs of runs, "
                       "seeds from --seed on, with and without distillation, and tell what it "
                       "gains, in compare.json; what was stopped goes on with --resume added")
    group.add_argument("--report", action=argparse.BooleanOptionalAction, default=False,
                       help="write report.html in --out, anew after each epoch: figures, charts "
                       "and images, to be watched in a browser")
    group.add_argument("--check", action="store_true", help="instead of training, read every image "
                       "and tell what would make it fail or mislead: unreadable images, classes "
                       "without images or in one split only, copies within and across splits")
    group.add_argument("--skip-unreadable", action=argparse.BooleanOptionalAction, default=False,
                       help="leave out images that cannot be read, having tried all at the start")
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=list(RECIPES), default="tuned", help="the defaults of "
                       "the flags below, and the form of the loss (default: tuned)")
    group.add_argument("--epochs", type=number(int, 1), default=5, metavar="N",
                       help="passes over the images (default: 5)")
    group.add_argument("--batch-size", type=number(int, 1), metavar="N", help="images a step, on "
                       f"all processes together (default: {by_recipe('batch_size')})")
    group.add_argument("--lr", type=number(float, 0), metavar="RATE", help="peak learning rate "
                       f"(default: {by_recipe('lr')}; from random weights: "
                       f"{by_recipe('scratch_lr')})")
    group.add_argument("--alpha", type=number(float, 0, 1), metavar="WEIGHT",
                       help="weight of distillation, 1 - WEIGHT that of cross-entropy (default: "
                       f"{by_recipe('alpha')})")
    group.add_argument("--distillation", action=argparse.BooleanOptionalAction, default=True,
                       help="--no-distillation trains by the cross-entropy alone, its weight as "
                       "it is: the control of --compare")
    group.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, metavar="N",
                       help="of weights, order and augmentation (default: 0)")
    group = parser.add_argument_group("network")
    group.add_argument("--arch", metavar="NAME", default="resnet18", help="any classifier of "
                       "torchvision.models, such as resnet50 or vit_b_16 (default: resnet18)")
    group.add_argument("--student-layer", metavar="NAME", help="the early layer that the second "
                       "term acts on (default: found; of resnet18, layer2.1)")
    group.add_argument("--teacher-layer", metavar="NAME", help="the deep layer that --recipe blog "
                       "compares it with (default: found; of resnet18, layer4.1)")
    group.add_argument("--weights", metavar="imagenet|none|FILE", help="initial weights (default: "
                       "imagenet; none for the drawn shapes)")
    group.add_argument("--size", type=number(int, *SIZES), metavar="PIXELS",
                       help="height and width of the images (default: 224; 32 for the drawn "
                       "shapes)")
    group = parser.add_argument_group("machine")
    group.add_argument("--workers", type=number(int, 0, 1024), metavar="N", help="processes that "
                       "load images, for each that trains; 0: none beside that (default: its "
                       f"share of the cores usable here, {usable_cores()})")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: "
                       "auto, the best there is)")
    group.add_argument("--precision", choices=["auto", *DTYPES], default="auto",
                       help="of the network; the losses are in fp32 (default: auto, the fastest)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="torch.compile the network")
    return parser


def parse_args(arguments: list[str]) -> tuple[argparse.Namespace, dict | None]:
    """The settings of the run, and the checkpoint to resume, whose settings are the defaults."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    checkpoint = None if args.resume is None else from_first(read_resumed, args)
    if checkpoint:
        saved = [f"--out={resumed_path(args).parent}", *as_flags(checkpoint["args"])]
        args, before = parser.parse_args([*saved, *arguments]), parser.parse_args(saved)
        apply_defaults(before)
        refuse_contradictions(args, before)
    apply_defaults(args)
    return args, checkpoint


def as_flags(settings: dict) -> list[str]:
    """Settings as flags, so that what a file says is checked like what a user types."""
    flags = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value}")
    return flags


def apply_defaults(args: argparse.Namespace) -> None:
    """Fill in what no flag has set, from the recipe and the data."""
    recipe = RECIPES[args.recipe]
    embedded = args.data is None
    args.weights = args.weights or ("none" if embedded else "imagenet")
    defaults = {"size": 32 if embedded else 224, "alpha": recipe["alpha"],
                "batch_size": recipe["batch_size"],
                "lr": recipe["scratch_lr" if args.weights == "none" else "lr"]}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def resumed_path(args: argparse.Namespace) -> Path:
    return Path(args.out, "last.pt") if args.resume in ("", "auto") else Path(args.resume)


def read_resumed(args: argparse.Namespace) -> dict | None:
    """The checkpoint that --resume names; None if it is "auto" and there is none yet."""
    path = resumed_path(args)
    if args.resume == "auto" and not path.exists():
        if not args.compare:  # which has just said what it begins
            print(f"no {path} yet: starting anew")
        return None
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("run"), dict):
        raise UserError(f"{path} cannot be resumed: it holds no training state (resume from "
                        "last.pt)")
    return checkpoint


def refuse_contradictions(args: argparse.Namespace, before: argparse.Namespace) -> None:
    """Where a run may not change between its parts."""
    if args.precision == "auto":
        args.precision = before.precision
    for name in ("recipe", "batch_size", "lr", "alpha", "distillation", "arch", "student_layer",
                 "teacher_layer", "size", "weights", "seed", "precision"):
        if getattr(args, name) != getattr(before, name):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the run "
                            f"to resume, which has {getattr(before, name)}")
    one_cycle = RECIPES[args.recipe]["one_cycle"]
    if args.epochs < before.epochs or (args.epochs > before.epochs and one_cycle):
        reason = "its learning rate ends there" if one_cycle else "they can only be raised"
        raise UserError(f"--epochs {args.epochs} contradicts the run to resume, which has "
                        f"{before.epochs}: {reason}; for a new run from what it has learned, give "
                        "--weights best.pt")
    if args.epochs > before.epochs:
        print(f"epochs     {args.epochs} instead of {before.epochs}, at the same learning rate")


def make_out(out: Path, names: tuple[str, ...], resumed: bool) -> None:
    """Make the folder --out; what an earlier run left there is kept under other names."""
    make_folder(out)
    earlier = [out / name for name in names if (out / name).exists()]
    if resumed or not earlier:
        return
    suffix = next(k for k in itertools.count(1)
                  if not any(path.with_suffix(f".{k}{path.suffix}").exists() for path in earlier))
    try:
        kept = [path.rename(path.with_suffix(f".{suffix}{path.suffix}")) for path in earlier]
    except OSError as error:
        raise UserError(f"cannot rename the earlier {listed(earlier)}: {error.strerror}") from None
    print(f"kept the earlier {listed(earlier)} as {listed(kept)}")


def make_run(args: argparse.Namespace, device: torch.device, data: Data, resumed: bool) -> Run:
    """A run at its start; one to be resumed needs no initial weights."""
    torch.manual_seed(args.seed)
    weights = "none" if resumed else args.weights
    model = make_model(args, len(data.classes), weights, device)
    criterion = make_criterion(args, model, len(data.classes))
    optimizer = make_optimizer(args, model, criterion)
    steps = args.epochs * len(data.train_loader)
    scheduler = make_scheduler(optimizer, RECIPES[args.recipe]["one_cycle"], steps)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    classifier = model.model.get_submodule(find_classifier(model.model))
    fine_tuned = (RECIPES[args.recipe]["fine_tune"] and args.weights != "none"
                  and isinstance(classifier, nn.Linear))
    return Run(model, criterion, optimizer, scheduler, scaler,
               decay=INITIAL_SHARE ** (1 / steps) if fine_tuned else None)


def restore(run: Run, checkpoint: dict, data: Data, args: argparse.Namespace) -> None:
    """Put a run where a checkpoint has left it, provided that its data are still the same."""
    try:
        changeable = [("its classes are", data.classes, checkpoint["classes"])]
        changeable += [(f"{split}/ has", now, checkpoint["run"]["data"][split])
                       for split, now in data.fingerprints.items()]
        for what, now, then in changeable:
            if now != then:
                raise UserError(f"{args.data} has changed since the run began: {what} {now} now, "
                                f"{then} then")
        run.load_state_dict(checkpoint["run"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"the checkpoint cannot be resumed, as it is damaged or of another version "
                        f"({error!r})") from None


def forget_lost_best(run: Run, out: Path) -> None:
    """A best epoch without its best.pt no longer counts."""
    best = run.best["epoch"]
    if best >= 0 and not (out / "best.pt").exists() and (run.epoch, run.batch) != (best, 0):
        print(f"there is no best.pt of epoch {best} in {out}: the best is counted from here")
        run.best = dict(NONE_YET)


def fine_tune(arguments: list[str]) -> int:
    """Train as the command line asks; returns the exit code."""
    started = time.perf_counter()
    args, checkpoint = parse_args(arguments)
    device = choose_device(args.device)
    refuse_shared_gpu(device)
    args.precision = from_first(choose_precision, args.precision, device)
    data = make_data(args, device)
    run = make_run(args, device, data, resumed=checkpoint is not None)
    out, in_place = Path(args.out), False
    if checkpoint:
        restore(run, checkpoint, data, args)
        in_place = resumed_path(args).resolve() == (out / "last.pt").resolve()
    if rank() == 0:
        make_out(out, ("best.pt", "last.pt", "log.jsonl", "report.html"), resumed=in_place)
    forget_lost_best(run, out)

    print(f"data       {args.data}: {len(data.train_set)} train and {len(data.val_set)} val "
          f"images, {len(data.classes)} classes")
    print(f"network    {args.arch}, weights: {args.weights}, student {args.student_layer}, "
          f"teacher {args.teacher_layer}")
    print(f"machine    {device}, {args.precision}, {data.train_loader.num_workers} workers"
          + (f" for each of {world_size()} processes" if dist.is_initialized() else ""))
    print(f"recipe     {args.recipe}: {args.size} px, batch {args.batch_size}, lr {args.lr:g}, "
          f"alpha {args.alpha:g}{'' if args.distillation else ' (no distillation)'}, "
          f"seed {args.seed}", flush=True)
    if checkpoint:
        print(f"resumed    after {run.epoch} epochs and {run.batch} batches of the next")
    with Checkpointer(run, args, data) as checkpointer:
        try:
            checkpointer.save()
            if run.average and (run.best, run.epoch, run.batch) == (NONE_YET, 0, 0):
                begin(run, data, args, checkpointer)
            train(run, data, args, checkpointer)
        except Stopped as stopped:
            rewrite_line()
            checkpointer.save()
            launcher = "torchrun ..." if dist.is_initialized() else "python"
            again = ("the same command and --resume" if args.compare else
                     f"{launcher} {shlex.quote(sys.argv[0])} --resume "
                     f"{shlex.quote(str(out / 'last.pt'))}")
            print(f"stopped in epoch {run.epoch + 1} after batch {run.batch}; go on with: {again}",
                  flush=True)
            return 128 + stopped.args[0]
    print(f"best val accuracy {run.best['val_acc']:.4f} in epoch {run.best['epoch']} (on "
          f"{len(data.val_set)} val images; ties go to the earlier epoch), "
          f"{duration(time.perf_counter() - started)}")
    print(f"python {shlex.quote(str(Path(sys.argv[0]).with_name('evaluate.py')))} "
          f"{shlex.quote(str(out / 'best.pt'))}")
    stop = max(gather([checkpointer.stop]))  # by a signal that came too late for this run
    return 128 + stop if stop and args.compare else 0


def compare(args: argparse.Namespace, arguments: list[str]) -> int:
    """Train pairs of runs as the command line asks, and tell what distillation gains."""
    if args.resume not in (None, "", "auto") or not args.distillation or args.alpha == 0:
        raise UserError("--compare trains with distillation and without, in the folder compare in "
                        "--out: it takes no --no-distillation, no --alpha 0 and no FILE to resume")
    out = Path(args.out)
    if rank() == 0:
        make_out(out, ("compare", "compare.json"), resumed=args.resume is not None)
    pairs, precision = [], args.precision
    for seed in range(args.seed, args.seed + args.compare):
        pair = {"seed": seed}
        for arm, flag in (("distillation", "--distillation"), ("control", "--no-distillation")):
            print(f"\nrun {2 * len(pairs) + len(pair)} of {2 * args.compare}: {arm}, seed {seed}")
            folder = out / "compare" / f"{seed}-{arm}"
            code = fine_tune([*arguments, flag, f"--seed={seed}", f"--out={folder}",
                              f"--precision={precision}", "--resume=auto"])
            if code:
                return code
            pair[arm], precision = from_first(outcome, folder)  # the same one for all runs
        pairs.append(pair | {"difference": pair["distillation"] - pair["control"]})
        if rank() == 0 and len(pairs) > 1:
            figures = gain(pairs)
            write_json(out / "compare.json", figures)
    if rank() == 0:
        print_gain(figures)
    return 0


def outcome(out: Path) -> tuple[float, str]:
    """The val accuracy of a run's last epoch, and the run's precision."""
    checkpoint = load_tensors(out / "last.pt")
    return checkpoint["val_acc"], checkpoint["args"]["precision"]


def gain(pairs: list[dict]) -> dict:
    """The figures of paired runs: mean, deviation, and the 95 % t-interval of the difference."""
    figures = {"pairs": pairs}
    for name in ("distillation", "control", "difference"):
        values = [pair[name] for pair in pairs]
        figures[name] = {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}
    mean, deviation = figures["difference"].values()
    half = t_quantile(len(pairs) - 1) * deviation / math.sqrt(len(pairs))
    figures["difference"]["interval"] = [mean - half, mean + half]
    return figures


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution, to 0.001."""
    t = torch.linspace(0, 13, 130_001, dtype=torch.float64)
    density = torch.distributions.StudentT(freedom).log_prob(t).exp()
    above_0 = torch.cumulative_trapezoid(density, t)
    return t[torch.searchsorted(above_0, 0.475)].item()


def print_gain(figures: dict) -> None:
    print("\nval accuracy after the last epoch\n     seed  distillation  control  difference")
    for pair in figures["pairs"]:
        print("{seed:9}  {distillation:12.4f}  {control:7.4f}  {difference:+10.4f}".format(**pair))
    for name in ("mean", "deviation"):
        row = [figures[column][name] for column in ("distillation", "control", "difference")]
        print("{:9}  {:12.4f}  {:7.4f}  {:+10.4f}".format(name, *row))
    low, high = figures["difference"]["interval"]
    verdict = ("distillation helps" if low > 0 else "distillation hurts" if high < 0 else
               "whether distillation helps or hurts cannot be told")
    print(f"{verdict}, with {len(figures['pairs'])} pairs: 95 % interval of the difference "
          f"{low:+.4f} to {high:+.4f}")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    with process_group():
        args = make_parser().parse_args(arguments)
        code = (from_first(check, args) if args.check else
                compare(args, arguments) if args.compare else fine_tune(arguments))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_script(main)
