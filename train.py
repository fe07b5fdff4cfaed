"""Fine-tune an image classifier while the network teaches itself.

    python train.py --data ./data/imagenette2-320 --epochs 5

writes best.pt (best by val accuracy), last.pt (everything needed to go on with --resume) and
log.jsonl (one line an epoch). Without --data it draws a small data set of its own and trains on
that. The method is in selfdistill.py; `python evaluate.py best.pt` tells how good the result is.
"""
import evaluate  # first: it checks that torch and torchvision fit together

import argparse
import io
import json
import math
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, Sampler
from torchvision import datasets

from evaluate import (DTYPES, ImageFolder, Parser, UserError, autocast, choose_device,
                      choose_precision, find_splits, listed, make_loader, number, predict,
                      read_checkpoint, run_script, summarize, usable_cores, write_file)
from selfdistill import (IMAGENET_MEAN, IMAGENET_STD, HookedModel, SelfDistillationLoss,
                         hooked_resnet18, train_transform, val_transform)

# What --recipe chooses; alpha, lr and batch_size are flags too, which override it. The learning
# rates are those of the backbone, with ImageNet weights or a file, and from random weights.
RECIPES = {
    "tuned": dict(alpha=0.5, lr={"pretrained": 0.002, "none": 0.05}, batch_size=32,
                  new_layer_lr=5.0, weight_decay=5e-4, nesterov=True, label_smoothing=0.1,
                  one_cycle=True, detach_teacher=True, normalize=True, train_adapter=True),
    "blog": dict(alpha=0.5, lr={"pretrained": 0.01, "none": 0.01}, batch_size=32,
                 new_layer_lr=1.0, weight_decay=0.0, nesterov=False, label_smoothing=0.0,
                 one_cycle=False, detach_teacher=False, normalize=False, train_adapter=False),
}
IMAGENETTES = {"imagenette2": "full", "imagenette2-320": "320px", "imagenette2-160": "160px"}
SHAPES = ("circle", "square", "triangle", "pentagon", "star", "cross", "ring", "crescent",
          "bars", "heart")


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


def draw_shapes(folder: Path, train: int = 160, val: int = 40, size: int = 64) -> None:
    """The embedded data set: ten shapes in any colour, place, angle and size, over clutter.

    Args:
        folder: where train/ and val/ are written, whole or not at all.
        train, val: images a class.
        size: height and width of an image, in pixels.
    """
    print(f"drawing the embedded data set in {folder} …", flush=True)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for split, count in (("train", train), ("val", val)):
        for name in SHAPES:
            (temporary / split / name).mkdir(parents=True)
            for number in range(count):
                image = draw_shape(name, size, random.Random(f"{split}/{name}/{number}"))
                image.save(temporary / split / name / f"{number:03d}.png")
    temporary.rename(folder)


def draw_shape(name: str, size: int, rng: random.Random) -> Image.Image:
    """One shape over a striped and dotted ground, drawn large and then shrunk to be smooth."""
    big = 4 * size
    ground, ink = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
    while sum(abs(a - b) for a, b in zip(ground, ink)) < 180:
        ink = tuple(rng.randrange(256) for _ in range(3))
    image = Image.new("RGB", (big, big), ground)
    canvas = ImageDraw.Draw(image)
    for _ in range(12):
        shade = tuple(min(255, max(0, value + rng.randint(-50, 50))) for value in ground)
        ends = [rng.randrange(big) for _ in range(4)]
        canvas.line(ends, fill=shade, width=rng.randint(2, big // 12))
    mask = Image.new("L", (big, big))
    draw_mask(ImageDraw.Draw(mask), name, big)
    scale = rng.uniform(0.4, 0.9)
    shift = [rng.uniform(-0.5, 0.5) * (1 - scale) * big for _ in range(2)]
    mask = mask.rotate(rng.uniform(0, 360)).resize([round(scale * big)] * 2)
    corner = [round((big - mask.width) / 2 + offset) for offset in shift]
    image.paste(ink, corner, mask)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def draw_mask(canvas: ImageDraw.ImageDraw, name: str, size: int) -> None:
    """A shape in white, centred, within the circle that a rotation keeps inside the image."""
    middle, radius = size / 2, 0.48 * size

    def disc(x: float, y: float, r: float, fill: int = 255) -> None:
        x, y, r = middle + x * radius, middle + y * radius, r * radius
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def box(left: float, top: float, right: float, bottom: float) -> None:
        canvas.rectangle([middle + value * radius for value in (left, top, right, bottom)], 255)

    def polygon(corners: int, radii: tuple[float, ...] = (1.0,)) -> None:
        angles = [2 * math.pi * k / corners for k in range(corners)]
        canvas.polygon([(middle + radius * radii[k % len(radii)] * math.sin(angle),
                         middle - radius * radii[k % len(radii)] * math.cos(angle))
                        for k, angle in enumerate(angles)], fill=255)

    if name == "circle":
        disc(0, 0, 0.9)
    elif name in ("triangle", "square", "pentagon"):
        polygon({"triangle": 3, "square": 4, "pentagon": 5}[name])
    elif name == "star":
        polygon(10, (1.0, 0.4))
    elif name == "cross":
        box(-0.9, -0.25, 0.9, 0.25)
        box(-0.25, -0.9, 0.25, 0.9)
    elif name == "ring":
        disc(0, 0, 0.95)
        disc(0, 0, 0.6, fill=0)
    elif name == "crescent":
        disc(0, 0, 0.95)
        disc(0.4, 0, 0.75, fill=0)
    elif name == "bars":
        box(-0.65, -0.75, -0.2, 0.75)
        box(0.2, -0.75, 0.65, 0.75)
    elif name == "heart":
        disc(-0.42, -0.3, 0.46)
        disc(0.42, -0.3, 0.46)
        canvas.polygon([(middle + x * radius, middle + y * radius)
                        for x, y in ((-0.84, -0.1), (0.84, -0.1), (0, 0.9))], fill=255)


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
        generator = torch.Generator().manual_seed(self.seed + (self.epoch << 32))
        seeds = torch.randint(2 ** 62, (self.count,), generator=generator)
        order = torch.randperm(self.count, generator=generator)
        for batch in order.tensor_split(len(self))[self.start:]:
            yield list(zip(batch.tolist(), seeds[batch].tolist()))


# The optimiser

def make_optimizer(model: HookedModel, criterion: SelfDistillationLoss, recipe: dict,
                   lr: float) -> SGD:
    """SGD with a larger learning rate for the new layers, no weight decay on biases and norms."""
    head = list(model.model.fc.parameters())
    backbone = [parameter for parameter in model.parameters()
                if not any(parameter is other for other in head)]
    new = head + (list(criterion.adapter.parameters()) if recipe["train_adapter"] else [])
    groups = []
    for parameters, rate in ((backbone, lr), (new, lr * recipe["new_layer_lr"])):
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups += [{"params": matrices, "lr": rate, "weight_decay": recipe["weight_decay"]},
                   {"params": vectors, "lr": rate, "weight_decay": 0.0}]
    return SGD(groups, lr=lr, momentum=0.9, nesterov=recipe["nesterov"])


def make_scheduler(optimizer: SGD, recipe: dict, steps: int) -> LRScheduler:
    """A warm-up and a cosine down to nought over all steps of the run, or a constant."""
    if not recipe["one_cycle"]:
        return ConstantLR(optimizer, factor=1.0, total_iters=0)
    return OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups],
                      total_steps=max(2, steps), cycle_momentum=False)


# The run

class Run:
    """All that changes while training: what last.pt keeps beside the network."""

    def __init__(self, model: HookedModel, criterion: SelfDistillationLoss, recipe: dict,
                 args: argparse.Namespace, steps: int) -> None:
        self.model, self.criterion = model, criterion
        self.optimizer = make_optimizer(model, criterion, recipe, args.lr)
        self.scheduler = make_scheduler(self.optimizer, recipe, steps)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
        self.epoch = 0  # epochs completed
        self.batch = 0  # batches of the next epoch already trained on
        self.totals = torch.zeros(5, device=args.device)  # images; sums of loss, ce, ..., correct
        self.seconds = 0.0  # spent on these batches
        self.log: list[dict] = []  # a line for each epoch completed
        self.best = {"epoch": 0, "val_acc": -1.0}

    PARTS = ("criterion", "optimizer", "scheduler", "scaler")
    NUMBERS = ("epoch", "batch", "totals", "seconds", "log", "best")

    def state_dict(self) -> dict:
        return ({name: getattr(self, name).state_dict() for name in self.PARTS}
                | {name: getattr(self, name) for name in self.NUMBERS}
                | {"random": torch.get_rng_state()})

    def load_state_dict(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in self.NUMBERS:
            setattr(self, name, state[name])
        self.totals = self.totals.to(next(self.model.parameters()).device)
        torch.set_rng_state(state["random"])

    def checkpoint(self, args: argparse.Namespace, classes: list[str]) -> dict:
        """What best.pt holds: the plain network and what evaluate.py must know to use it."""
        return {"model": self.model.model.state_dict(), "arch": "resnet18", "classes": classes,
                "size": args.size, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD),
                "epoch": self.epoch, "val_acc": self.log[-1]["val_acc"] if self.log else 0.0,
                "data": args.data, "args": vars(args)}

    def save(self, name: str, content: dict, out: str) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_file(Path(out, name), buffer.getbuffer())

    def save_last(self, args: argparse.Namespace, classes: list[str]) -> None:
        self.save("last.pt", self.checkpoint(args, classes) | {"run": self.state_dict()}, args.out)


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


def train_epoch(run: Run, model: nn.Module, batches: Iterable, args: argparse.Namespace,
                progress: "Progress") -> None:
    """Train on the rest of an epoch's batches, adding up the figures in `run.totals`."""
    model.train()
    run.criterion.train()
    start = time.perf_counter() - run.seconds
    for images, labels in batches:
        images = images.to(args.device, memory_format=torch.channels_last, non_blocking=True)
        labels = labels.to(args.device, non_blocking=True)
        run.optimizer.zero_grad()
        with autocast(torch.device(args.device), args.precision):
            logits, student, teacher = model(images)
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
    check_finite(run)


def check_finite(run: Run) -> None:
    if not run.totals.isfinite().all():
        rate = max(group["lr"] for group in run.optimizer.param_groups)
        raise UserError(f"the loss is not finite in epoch {run.epoch + 1}, by batch {run.batch} "
                        f"(learning rate {rate:.3g}): try a lower --lr; last.pt keeps the state "
                        f"after epoch {run.epoch}")


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
        check_finite(run)
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


def finish_epoch(run: Run, predictions: evaluate.Predictions, classes: list[str],
                 started: float) -> dict:
    """Close the epoch: its log line, the best so far, and fresh totals."""
    images, *sums = run.totals.tolist()
    loss, ce, distillation, train_acc = (value / images for value in sums)
    val = summarize(predictions, classes)
    if not math.isfinite(val["loss"]):
        raise UserError(f"the val loss is not finite after epoch {run.epoch + 1}: try a lower "
                        f"--lr; last.pt keeps the state after epoch {run.epoch}")
    run.epoch += 1
    line = {"epoch": run.epoch, "train_loss": loss, "ce_loss": ce,
            "distillation_loss": distillation, "train_acc": train_acc, "val_loss": val["loss"],
            "val_acc": val["top1"], "lr": run.optimizer.param_groups[0]["lr"],
            "images_per_second": images / run.seconds,
            "seconds": run.seconds + predictions.seconds}
    run.log.append(line)
    run.batch, run.seconds = 0, 0.0
    run.totals = torch.zeros_like(run.totals)
    return line


def train(run: Run, train_loader: DataLoader, val_loader: DataLoader, classes: list[str],
          args: argparse.Namespace, signals: StopSignals) -> None:
    """Train and validate for the epochs that are left, saving after each."""
    model = torch.compile(run.model) if args.compile else run.model
    batches = train_loader.batch_sampler
    progress = Progress(args.epochs, len(batches), batches.count)
    while run.epoch < args.epochs:
        batches.epoch, batches.start = run.epoch, run.batch
        train_epoch(run, model, signals.until_received(train_loader), args, progress)
        predictions = predict(run.model.model, signals.until_received(val_loader),
                              torch.device(args.device), args.precision)
        line = finish_epoch(run, predictions, classes, 0.0)
        if line["val_acc"] > run.best["val_acc"]:  # a tie leaves the earlier epoch the best
            run.best = {"epoch": run.epoch, "val_acc": line["val_acc"]}
            run.save("best.pt", run.checkpoint(args, classes), args.out)
        run.save_last(args, classes)
        write_log(run, args.out)
        progress.clear()
        print(f"epoch {run.epoch}/{args.epochs}  loss {line['train_loss']:.4f} "
              f"(ce {line['ce_loss']:.4f}, distillation {line['distillation_loss']:.4g})  "
              f"train acc {line['train_acc']:.4f}  val acc {line['val_acc']:.4f}  "
              f"{line['images_per_second']:.1f} images/s  {line['seconds']:.1f} s", flush=True)


def write_log(run: Run, out: str) -> None:
    lines = "".join(json.dumps(line) + "\n" for line in run.log)
    write_file(Path(out, "log.jsonl"), lines.encode())


# The command line

def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(arguments)
    checkpoint = None
    if args.resume:
        checkpoint = checkpoint_to_resume(args)
    if checkpoint:
        parser.set_defaults(**checkpoint["args"])
        args = parser.parse_args(arguments)
        refuse_contradictions(args, checkpoint["args"])
    else:
        apply_recipe(args)
    args.checkpoint = checkpoint
    return args


def make_parser() -> Parser:
    def by_recipe(setting: str) -> str:
        return "; ".join(f"{name}: {recipe[setting]}" for name, recipe in RECIPES.items())

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
    group.add_argument("--lr", type=number(float, 0), metavar="RATE",
                       help=f"learning rate of the backbone (default: {by_recipe('lr')})")
    group.add_argument("--alpha", type=number(float, 0, 1), metavar="WEIGHT",
                       help="weight of distillation, 1 - WEIGHT that of cross-entropy (default: "
                       f"{by_recipe('alpha')})")
    group.add_argument("--seed", type=number(int, 0, 2 ** 32 - 1), default=0, metavar="N",
                       help="of weights, order and augmentation (default: 0)")
    group = parser.add_argument_group("network")
    group.add_argument("--weights", metavar="imagenet|none|FILE", help="initial weights (default: "
                       "imagenet; none for the drawn shapes)")
    group.add_argument("--size", type=number(int, 32, 2048), metavar="PIXELS",
                       help="height and width of the images (default: 224; 64 for the drawn "
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


def apply_recipe(args: argparse.Namespace) -> None:
    """Fill in what no flag has set."""
    recipe = RECIPES[args.recipe]
    if args.weights is None:
        args.weights = "none" if args.data is None else "imagenet"
    if args.size is None:
        args.size = 64 if args.data is None else 224
    if args.lr is None:
        args.lr = recipe["lr"]["none" if args.weights == "none" else "pretrained"]
    for name in ("alpha", "batch_size"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])


def checkpoint_to_resume(args: argparse.Namespace) -> dict | None:
    """The checkpoint that --resume names; None if it is "auto" and there is none yet."""
    path = Path(args.resume)
    if args.resume in ("auto", "last.pt"):
        path = Path(args.out, "last.pt")
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


def make_data(args: argparse.Namespace) -> tuple[DataLoader, DataLoader, list[str]]:
    """The loaders of both splits, and the classes, which must be the same in both."""
    folder = find_data(args.data)
    args.data = str(folder.resolve())
    train_set = AugmentedFolder(folder / "train", train_transform(args.size))
    val_set = ImageFolder(folder / "val", val_transform(args.size))
    missing = sorted(set(train_set.classes) ^ set(val_set.classes))
    if missing:
        raise UserError(f"the classes of train/ and val/ in {folder} differ: only one of them "
                        f"has {listed(missing)}")
    device = torch.device(args.device)
    batches = EpochBatches(len(train_set), args.batch_size, args.seed)
    smallest = len(train_set) // len(batches)
    if smallest == 1 and args.size <= 32:
        raise UserError("batches of one image at 32 pixels leave batch norm one value a channel: "
                        "use a larger --size or --batch-size")
    return (make_loader(train_set, device, args.workers, batch_sampler=batches),
            make_loader(val_set, device, args.workers, batch_size=args.batch_size),
            train_set.classes)


def make_model(args: argparse.Namespace, num_classes: int) -> HookedModel:
    try:
        model = hooked_resnet18(num_classes, args.weights)
    except ValueError as error:
        raise UserError(f"--weights {error}") from None
    except OSError as error:
        raise UserError(f"cannot get the weights {args.weights!r} ({error}); give a FILE, or "
                        "none for random weights") from None
    return model.to(args.device, memory_format=torch.channels_last)


def keep_earlier_results(out: Path) -> None:
    """Rename what an earlier run left in --out, so that a new run does not write over it."""
    names = [name for name in ("best.pt", "last.pt", "log.jsonl") if (out / name).exists()]
    if not names:
        return
    number = 1
    while any((out / name.replace(".", f".{number}.")).exists() for name in names):
        number += 1
    for name in names:
        (out / name).rename(out / name.replace(".", f".{number}."))
    print(f"kept the earlier {listed(names)} in {out} as "
          f"{listed([name.replace('.', f'.{number}.') for name in names])}")


def main(arguments: list[str] | None = None) -> None:
    started = time.perf_counter()
    args = parse_args(arguments)
    checkpoint = vars(args).pop("checkpoint")
    device = choose_device(args.device)
    args.device, args.precision = str(device), choose_precision(args.precision, device)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --out {out}: {error.strerror}") from None
    torch.manual_seed(args.seed)
    train_loader, val_loader, classes = make_data(args)
    recipe = RECIPES[args.recipe]
    model = make_model(args, len(classes))
    criterion = SelfDistillationLoss(
        args.alpha, *model.feature_channels(), detach_teacher=recipe["detach_teacher"],
        normalize=recipe["normalize"], label_smoothing=recipe["label_smoothing"]).to(device)
    run = Run(model, criterion, recipe, args, args.epochs * len(train_loader))
    if checkpoint:
        model.model.load_state_dict(checkpoint["model"])
        run.load_state_dict(checkpoint["run"])
    else:
        keep_earlier_results(out)

    print(f"data       {args.data}: {train_loader.batch_sampler.count} train and "
          f"{len(val_loader.dataset)} val images, {len(classes)} classes")
    print(f"network    resnet18, weights: {args.weights}")
    print(f"machine    {device}, {args.precision}, {args.workers} workers")
    print(f"recipe     {args.recipe}: {args.size} px, batch {args.batch_size}, lr {args.lr:g}, "
          f"alpha {args.alpha:g}, seed {args.seed}", flush=True)
    with StopSignals() as signals:
        try:
            run.save_last(args, classes)
            train(run, train_loader, val_loader, classes, args, signals)
        except Stopped as stopped:
            Progress.clear()
            check_finite(run)
            run.save_last(args, classes)
            print(f"stopped in epoch {run.epoch + 1} after batch {run.batch}; go on with: "
                  f"python {sys.argv[0]} --resume {shlex.quote(str(out / 'last.pt'))}")
            sys.exit(128 + stopped.args[0])
    script = Path(sys.argv[0]).with_name("evaluate.py")
    print(f"best val accuracy {run.best['val_acc']:.4f} in epoch {run.best['epoch']} (on "
          f"{len(val_loader.dataset)} val images; ties go to the earlier epoch), "
          f"{duration(time.perf_counter() - started)}")
    print(f"python {shlex.quote(str(script))} {shlex.quote(str(out / 'best.pt'))}")


if __name__ == "__main__":
    run_script(main)
