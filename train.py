"""Fine-tune an image classifier while the network teaches itself.

    python train.py --data ./data/imagenette2-320 --epochs 5

writes best.pt (best by val accuracy), last.pt (everything needed to go on with --resume) and
log.jsonl (one line an epoch). Without --data it draws a small data set of its own and trains on
that. The method is in selfdistill.py; `python evaluate.py best.pt` tells how good the result is.
"""
# First of all, as it checks that torch and torchvision fit together.
from evaluate import (DTYPES, ImageFolder, Parser, Predictions, UserError, autocast,
                      choose_device, choose_precision, find_splits, listed, make_loader, number,
                      predict, read_checkpoint, run_script, summarize, usable_cores, write_file)

import argparse
import io
import itertools
import json
import math
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from math import cos, pi, sin
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Sampler
from torchvision import datasets

from selfdistill import (IMAGENET_MEAN, IMAGENET_STD, HookedModel, SelfDistillationLoss,
                         hooked_resnet18, train_transform, val_transform)

# What --recipe chooses. Of these alpha, batch_size and lr are flags too, which override it; lr is
# the backbone's, scratch_lr that of all layers where the weights are random.
RECIPES = {
    "tuned": dict(alpha=0.5, batch_size=64, lr=0.004, new_layers_lr=5.0, scratch_lr=0.1,
                  one_cycle=True, nesterov=True, weight_decay=5e-4, label_smoothing=0.1,
                  crop_scale=(0.35, 1.0), detach_teacher=True, normalize=True, train_adapter=True),
    "blog": dict(alpha=0.5, batch_size=32, lr=0.01, new_layers_lr=1.0, scratch_lr=0.01,
                 one_cycle=False, nesterov=False, weight_decay=0.0, label_smoothing=0.0,
                 crop_scale=(0.08, 1.0), detach_teacher=False, normalize=False,
                 train_adapter=False),
}
IMAGENETTES = {"imagenette2": "full", "imagenette2-320": "320px", "imagenette2-160": "160px"}


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


class AugmentedFolder(ImageFolder):
    """Images asked for as (index, seed); their augmentation depends on these two alone."""

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return super().__getitem__(index)


class EpochBatches(Sampler):
    """The batches of one epoch, in an order that seed and epoch decide, from `start` on.

    All batches are of the same size within one image, so that none is too small for batch norm.
    Set `epoch` and `start` before iterating.

    Args:
        count: images in the data set.
        batch_size: images in a batch, at most.
        seed: of the order and of every image's augmentation.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return math.ceil(self.count / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Seeds are 32 bits, as torch's CPU generator ignores all higher ones.
        mixed = random.Random(f"{self.seed} {self.epoch}").getrandbits(32)
        generator = torch.Generator().manual_seed(mixed)
        seeds = torch.randint(2 ** 32, (self.count,), generator=generator)
        order = torch.randperm(self.count, generator=generator)
        for batch in order.tensor_split(len(self))[self.start:]:
            yield list(zip(batch.tolist(), seeds[batch].tolist()))


def make_data(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, list[str]]:
    """The loaders of both splits, and the classes, which must be the same in both."""
    folder = find_data(args.data)
    args.data = str(folder.resolve())
    scale = RECIPES[args.recipe]["crop_scale"]
    train_set = AugmentedFolder(folder / "train", train_transform(args.size, scale))
    val_set = ImageFolder(folder / "val", val_transform(args.size))
    unmatched = sorted(set(train_set.classes) ^ set(val_set.classes))
    if unmatched:
        raise UserError(f"the classes of train/ and val/ in {folder} differ: only one of them "
                        f"has {listed(unmatched)}")
    batches = EpochBatches(len(train_set), args.batch_size, args.seed)
    if args.size <= 32 and len(train_set) < 2 * len(batches):
        raise UserError("batches of one image at 32 pixels leave batch norm one value a channel: "
                        "use a larger --size or --batch-size")
    device = torch.device(args.device)
    return (make_loader(train_set, device, args.workers, batch_sampler=batches),
            make_loader(val_set, device, args.workers, batch_size=args.batch_size),
            train_set.classes)


# The network and its optimiser

def make_model(args: argparse.Namespace, num_classes: int) -> HookedModel:
    try:
        model = hooked_resnet18(num_classes, args.weights)
    except ValueError as error:
        raise UserError(f"--weights {error}") from None
    except OSError as error:
        raise UserError(f"cannot get the weights {args.weights!r} ({error}): give a FILE, or "
                        "none for random weights") from None
    return model.to(args.device, memory_format=torch.channels_last)


def make_criterion(args: argparse.Namespace, model: HookedModel) -> SelfDistillationLoss:
    recipe = RECIPES[args.recipe]
    criterion = SelfDistillationLoss(
        args.alpha, *model.feature_channels(), detach_teacher=recipe["detach_teacher"],
        normalize=recipe["normalize"], label_smoothing=recipe["label_smoothing"])
    criterion.adapter.requires_grad_(recipe["train_adapter"])
    return criterion.to(args.device)


def make_optimizer(args: argparse.Namespace, model: HookedModel,
                   criterion: SelfDistillationLoss) -> SGD:
    """SGD, with a learning rate of its own for new layers and no decay of biases and norms."""
    recipe = RECIPES[args.recipe]
    new_lr = args.lr if args.weights == "none" else args.lr * recipe["new_layers_lr"]
    new = [*model.model.fc.parameters(), *criterion.parameters()]
    old = [parameter for name, parameter in model.model.named_parameters()
           if not name.startswith("fc.")]
    groups = [{"params": [parameter for parameter in parameters
                          if parameter.requires_grad and (parameter.ndim > 1) == is_matrix],
               "lr": lr, "weight_decay": recipe["weight_decay"] if is_matrix else 0.0}
              for parameters, lr in ((old, args.lr), (new, new_lr)) for is_matrix in (True, False)]
    return SGD(groups, momentum=0.9, nesterov=recipe["nesterov"])


def make_scheduler(optimizer: SGD, one_cycle: bool, steps: int) -> LRScheduler:
    """A warm-up and a cosine down to nought over all steps of the run, or a constant."""
    if not one_cycle:
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    return OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups],
                      total_steps=max(2, steps), cycle_momentum=False)


# The run

class Run:
    """All that changes while training; what last.pt keeps of it is `state_dict()`."""

    PARTS = ("criterion", "optimizer", "scheduler", "scaler")
    FIGURES = ("epoch", "batch", "totals", "seconds", "log", "best")

    def __init__(self, model: HookedModel, criterion: SelfDistillationLoss, optimizer: SGD,
                 scheduler: LRScheduler, scaler: torch.amp.GradScaler) -> None:
        self.model, self.criterion, self.optimizer = model, criterion, optimizer
        self.scheduler, self.scaler = scheduler, scaler
        self.device = next(model.parameters()).device
        self.epoch = 0  # epochs completed
        self.log: list[dict] = []  # a line for each of them
        self.best = {"epoch": 0, "val_acc": -1.0}
        self.start_epoch()

    def start_epoch(self) -> None:
        self.batch = 0  # batches of this epoch already trained on
        self.seconds = 0.0  # spent on them
        # Sums over their images: 1, loss, cross-entropy, distillation, correct.
        self.totals = torch.zeros(5, device=self.device)

    def state_dict(self) -> dict:
        return ({name: getattr(self, name).state_dict() for name in self.PARTS}
                | {name: getattr(self, name) for name in self.FIGURES}
                | {"random": torch.get_rng_state()})

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.FIGURES:
            setattr(self, name, state[name])
        self.totals = self.totals.to(self.device)
        torch.set_rng_state(state["random"])

    def check_finite(self) -> None:
        if not self.totals.isfinite().all():
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            raise UserError(f"the loss is not finite in epoch {self.epoch + 1}, by batch "
                            f"{self.batch} (learning rate {rate:.3g}): try a lower --lr; last.pt "
                            "keeps the last good state")


class Stopped(Exception):
    """The run was asked to stop, by the signal whose number is the argument."""


class StopSignals:
    """Notes Ctrl-C and SIGTERM, so that the step under way is finished; a second stops at once."""

    def __enter__(self) -> "StopSignals":
        self.received = 0
        self.previous = {number: signal.signal(number, self.note)
                         for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number

    def until_received(self, batches: Iterable) -> Iterator:
        """The batches, as long as no signal has come; then Stopped is raised between two."""
        for batch in batches:
            if self.received:
                raise Stopped(self.received)
            yield batch


class Progress:
    """One line on a terminal, rewritten as training goes on; nothing elsewhere."""

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
        if sys.stdout.isatty():
            images, loss = run.totals[:2].tolist()
            speed = images / run.seconds
            left = ((self.epochs - run.epoch) * self.count - images) / speed
            print(f"\r\033[Kepoch {run.epoch + 1}/{self.epochs}  "
                  f"batch {run.batch}/{self.batches}  {speed:.1f} images/s  "
                  f"loss {loss / images:.4f}  {duration(left)} left", end="", flush=True)

    @staticmethod
    def clear() -> None:
        if sys.stdout.isatty():
            print("\r\033[K", end="")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes
            else f"{seconds} s")


def train_epoch(run: Run, network: nn.Module, batches: Iterable, precision: str,
                progress: Progress) -> None:
    """Train on the rest of an epoch's batches, adding up the figures in `run.totals`."""
    network.train()
    run.criterion.train()
    start = time.perf_counter() - run.seconds
    for images, labels in batches:
        images = images.to(run.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(run.device, non_blocking=True)
        run.optimizer.zero_grad()
        with autocast(run.device, precision):
            logits, student, teacher = network(images)
        logits = logits.float()  # the losses are computed in fp32 whatever the precision
        ce, distillation = run.criterion.terms(logits, labels, student.float(), teacher.float())
        loss = run.criterion.combine(ce, distillation)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.scheduler.step()

        correct = (logits.argmax(dim=1) == labels).float().mean()
        figures = torch.stack([torch.ones_like(loss), loss, ce, distillation, correct])
        run.totals += figures.detach() * len(labels)
        run.batch += 1
        run.seconds = time.perf_counter() - start
        progress.show(run)
    run.check_finite()


def finish_epoch(run: Run, predictions: Predictions, classes: list[str]) -> dict:
    """Close the epoch: its log line, and whether it is the best so far."""
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
            "seconds": run.seconds + predictions.seconds}
    run.log.append(line)
    if line["val_acc"] > run.best["val_acc"]:  # a tie leaves the earlier epoch the best
        run.best = {"epoch": run.epoch, "val_acc": line["val_acc"]}
    run.start_epoch()
    return line


def train(run: Run, train_loader: DataLoader, val_loader: DataLoader, classes: list[str],
          args: argparse.Namespace, signals: StopSignals) -> None:
    """Train and validate for the epochs that are left, saving after each."""
    network = torch.compile(run.model) if args.compile else run.model
    batches = train_loader.batch_sampler
    progress = Progress(args.epochs, len(batches), batches.count)
    while run.epoch < args.epochs:
        batches.epoch, batches.start = run.epoch, run.batch
        train_epoch(run, network, signals.until_received(train_loader), args.precision, progress)
        predictions = predict(run.model.model, signals.until_received(val_loader), run.device,
                              args.precision)
        line = finish_epoch(run, predictions, classes)
        save(run, args, classes)
        progress.clear()
        print(f"epoch {run.epoch}/{args.epochs}  loss {line['train_loss']:.4f} "
              f"(ce {line['ce_loss']:.4f}, distillation {line['distillation_loss']:.4g})  "
              f"train acc {line['train_acc']:.4f}  val acc {line['val_acc']:.4f}  "
              f"{line['images_per_second']:.1f} images/s  {line['seconds']:.1f} s", flush=True)


def save(run: Run, args: argparse.Namespace, classes: list[str]) -> None:
    """Write last.pt and log.jsonl; before them best.pt, where the epoch just ended is the best."""
    checkpoint = {"model": run.model.model.state_dict(), "arch": "resnet18", "classes": classes,
                  "size": args.size, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
                  "epoch": run.epoch, "val_acc": run.log[-1]["val_acc"] if run.log else 0.0,
                  "data": args.data, "args": vars(args)}
    if run.batch == 0 and run.epoch == run.best["epoch"] > 0:
        write_checkpoint(Path(args.out, "best.pt"), checkpoint)
    write_checkpoint(Path(args.out, "last.pt"), checkpoint | {"run": run.state_dict()})
    lines = "".join(json.dumps(line) + "\n" for line in run.log)
    write_file(Path(args.out, "log.jsonl"), lines.encode())


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getvalue())


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
    group.add_argument("--resume", metavar="FILE", nargs="?", const="last.pt",
                       help="go on from FILE (default: last.pt in --out); auto: from last.pt if "
                       "there is one")
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=list(RECIPES), default="tuned", help="the defaults of "
                       "the flags below, and the form of the loss (default: tuned)")
    group.add_argument("--epochs", type=number(int, 1), default=5, metavar="N",
                       help="passes over the images (default: 5)")
    group.add_argument("--batch-size", type=number(int, 1), metavar="N",
                       help=f"images a step (default: {by_recipe('batch_size')})")
    group.add_argument("--lr", type=number(float, 0), metavar="RATE", help="peak learning rate of "
                       f"the layers that have weights (default: {by_recipe('lr')}; from random "
                       f"weights: {by_recipe('scratch_lr')})")
    group.add_argument("--alpha", type=number(float, 0, 1), metavar="WEIGHT",
                       help="weight of distillation, 1 - WEIGHT that of cross-entropy (default: "
                       f"{by_recipe('alpha')})")
    group.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, metavar="N",
                       help="of weights, order and augmentation (default: 0)")
    group = parser.add_argument_group("network")
    group.add_argument("--weights", metavar="imagenet|none|FILE", help="initial weights (default: "
                       "imagenet; none for the drawn shapes)")
    group.add_argument("--size", type=number(int, 32, 2048), metavar="PIXELS",
                       help="height and width of the images (default: 224; 32 for the drawn "
                       "shapes)")
    group = parser.add_argument_group("machine")
    group.add_argument("--workers", type=number(int, 0, 1024), metavar="N", default=usable_cores(),
                       help="processes that load images; 0: none beside this one (default: "
                       f"{usable_cores()}, the cores usable here)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps, ... (default: "
                       "auto, the best there is)")
    group.add_argument("--precision", choices=["auto", *DTYPES], default="auto",
                       help="of the network; the losses are in fp32 (default: auto, the fastest)")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    return parser


def parse_args(arguments: list[str] | None) -> tuple[argparse.Namespace, dict | None]:
    """The settings of the run, and the checkpoint to resume, whose settings are the defaults."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    checkpoint = read_resumed(args) if args.resume else None
    if checkpoint:
        parser.set_defaults(**checkpoint["args"])
        args = parser.parse_args(arguments)
        refuse_contradictions(args, checkpoint["args"])
    else:
        apply_defaults(args)
    return args, checkpoint


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


def read_resumed(args: argparse.Namespace) -> dict | None:
    """The checkpoint that --resume names; None if it is "auto" and there is none yet."""
    path = Path(args.out, "last.pt") if args.resume in ("auto", "last.pt") else Path(args.resume)
    if args.resume == "auto" and not path.exists():
        print(f"no {path} yet: starting anew")
        return None
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("run"), dict):
        raise UserError(f"{path} cannot be resumed: it holds no training state (resume from "
                        "last.pt)")
    return checkpoint


def refuse_contradictions(args: argparse.Namespace, saved: dict) -> None:
    """Where a run may not change between its parts."""
    for name in ("recipe", "batch_size", "lr", "alpha", "size", "weights", "seed", "precision",
                 "epochs"):
        if getattr(args, name) != saved[name]:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} contradicts the run "
                            f"to resume, which has {saved[name]}")


def make_out(out: Path, resumed: bool) -> None:
    """Make the folder --out; what an earlier run left there is kept under other names."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    earlier = [out / name for name in ("best.pt", "last.pt", "log.jsonl") if (out / name).exists()]
    if resumed or not earlier:
        return
    suffix = next(k for k in itertools.count(1)
                  if not any(path.with_suffix(f".{k}{path.suffix}").exists() for path in earlier))
    kept = [path.rename(path.with_suffix(f".{suffix}{path.suffix}")) for path in earlier]
    print(f"kept the earlier {listed(earlier)} as {listed(kept)}")


def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    args, checkpoint = parse_args(arguments)
    device = choose_device(args.device)
    args.device, args.precision = str(device), choose_precision(args.precision, device)
    torch.manual_seed(args.seed)
    train_loader, val_loader, classes = make_data(args)
    recipe = RECIPES[args.recipe]
    model = make_model(args, len(classes))
    criterion = make_criterion(args, model)
    optimizer = make_optimizer(args, model, criterion)
    scheduler = make_scheduler(optimizer, recipe["one_cycle"], args.epochs * len(train_loader))
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    run = Run(model, criterion, optimizer, scheduler, scaler)
    if checkpoint:
        model.model.load_state_dict(checkpoint["model"])
        run.load_state_dict(checkpoint["run"])
    make_out(Path(args.out), resumed=checkpoint is not None)

    print(f"data       {args.data}: {train_loader.batch_sampler.count} train and "
          f"{len(val_loader.dataset)} val images, {len(classes)} classes")
    print(f"network    resnet18, weights: {args.weights}")
    print(f"machine    {device}, {args.precision}, {args.workers} workers")
    print(f"recipe     {args.recipe}: {args.size} px, batch {args.batch_size}, lr {args.lr:g}, "
          f"alpha {args.alpha:g}, seed {args.seed}", flush=True)
    with StopSignals() as signals:
        try:
            save(run, args, classes)
            train(run, train_loader, val_loader, classes, args, signals)
        except Stopped as stopped:
            Progress.clear()
            run.check_finite()
            save(run, args, classes)
            last = shlex.quote(str(Path(args.out, "last.pt")))
            print(f"stopped in epoch {run.epoch + 1} after batch {run.batch}; go on with: "
                  f"python {shlex.quote(sys.argv[0])} --resume {last}")
            sys.exit(128 + stopped.args[0])
    best = shlex.quote(str(Path(args.out, "best.pt")))
    print(f"best val accuracy {run.best['val_acc']:.4f} in epoch {run.best['epoch']} (on "
          f"{len(val_loader.dataset)} val images; ties go to the earlier epoch), "
          f"{duration(time.perf_counter() - started)}")
    print(f"python {shlex.quote(str(Path(sys.argv[0]).with_name('evaluate.py')))} {best}")


if __name__ == "__main__":
    run_script(main)
