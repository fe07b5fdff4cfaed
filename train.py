"""Fine-tune an image classifier while the network teaches itself.

    python train.py --data ./data/imagenette2-320 --epochs 5

writes best.pt (best by val accuracy), last.pt (everything needed to go on with --resume) and
log.jsonl (a line an epoch). Without --data it trains on a small data set that it draws itself;
`--check` only reads the images and tells what is wrong with them. The method is in selfdistill.py;
`python evaluate.py best.pt` tells how good the result is. On several processes or machines:
`torchrun --nproc-per-node N train.py ...`, the same job.
"""
import os
import sys

if __name__ == "__main__":  # `python -P` leaves the script's folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

# Before torch, as it checks that torch and torchvision fit together.
from evaluate import (SIZES, ImageFolder, Machine, Parser, Predictions, Progress, UserError,
                      find_folder, find_splits, read_checkpoint, read_names, report_html,
                      run_script, shorten, split_off, write_file)

import argparse
import contextlib
import copy
import hashlib
import io
import itertools
import json
import math
import random
import re
import shlex
import signal
import statistics
import tempfile
import textwrap
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from math import cos, pi, sin
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from torchvision import datasets
from torchvision.models.feature_extraction import create_feature_extractor

from selfdistill import (IMAGENET_MEAN, IMAGENET_STD, HookedModel, SelfDistillationLoss, as_tuple,
                         find_classifier, hooked_classifier, load_tensors, pooled, train_transform,
                         val_transform)

# Settings

# Default values of the flags, except those that the recipe or the data decide.
DEFAULTS = dict(
    data=None, out=".", resume=None, save_every=10.0, compare=None,
    compare_arms=None, report=False, skip_unreadable=False,
    recipe="tuned", epochs=5, distillation=True, seed=0, arch="resnet18", student_layer=None,
    teacher_layer=None, val_split=None, workers=None, device="auto", precision="auto",
    compile=False)

# The first six are flags, too. students: number of student layers. fine_tune: fit the classifiers
# first, let their error decide the lr, and average the weights (only if the last layer is linear;
# else the lr is this one). whiten: begin with a first convolution that whitens the images. muon:
# take orthogonal steps (Muon). scratch: what is different from random weights.
SCRATCH = dict(lr=0.05, fine_tune=False, whiten=True, muon=True)
TUNED = dict(
    alpha=0.5, hint=1.0, labels=1.0, soft=0.0, batch_size=64, lr=0.004, students=2,
    detach_teacher=True, normalize=True, train_adapter=True, one_cycle=True, nesterov=True,
    weight_decay=5e-4, label_smoothing=0.1, crop_scale=(0.35, 1.0), fine_tune=True,
    whiten=False, muon=False, scratch=SCRATCH | dict(hint=0.3))
RECIPES = {
    "tuned": TUNED,
    "byot": TUNED | dict(  # arXiv:1905.08094, its weights
        hint=0.0, labels=0.7, soft=0.3, scratch=SCRATCH),
    "blog": dict(  # the published walk-through
        alpha=0.5, hint=1.0, labels=0.0, soft=0.0, batch_size=32, lr=0.01, students=1,
        detach_teacher=False, normalize=False, train_adapter=False, one_cycle=False,
        nesterov=False, weight_decay=0.0, label_smoothing=0.0, crop_scale=(0.08, 1.0),
        fine_tune=False, whiten=False, muon=False, scratch={}),
}
RECIPE_FLAGS = ("alpha", "hint", "labels", "soft", "batch_size")
# What a resumed run may change; --epochs only as `refuse_contradictions` allows.
CHANGEABLE = ("data", "out", "resume", "save_every", "compare", "compare_arms", "report", "check",
              "skip_unreadable", "epochs", "workers", "device", "compile")
NOT_SAVED = ("out", "resume", "compare")  # in a checkpoint's args
# In fine-tuning, by the val accuracy a of epoch 0: the peak rate is LR_PER_ERROR (1 - a), and the
# share of the given weights in the final average GIVEN_SHARE a ** GIVEN_POWER.
LR_PER_ERROR = 0.025
GIVEN_SHARE, GIVEN_POWER = 0.5, 8
ARMS = {"control": dict(distillation=False), "labels": dict(hint=0.0, soft=0.0),
        "distillation": {}}  # of --compare, by what they change
MEANINGS = {"control": "nothing (--no-distillation)", "labels": "the labels (--hint 0 --soft 0)",
            "distillation": "all that the loss above has"}
VAL_SPLIT = 0.2  # of a folder without val/
LAST_SEED = 2 ** 32 - 1
SPLIT_NAME = r"(?i)(train|val|test|dev|eval)(id|idation|ing|uation)?([-_ \d].*)?"
IMAGENETTES = {"imagenette2": "full", "imagenette2-320": "320px", "imagenette2-160": "160px"}


def recipe_of(name: str, weights: str) -> dict:
    """The settings of a recipe, from given or from random weights."""
    recipe = RECIPES[name]
    return recipe | recipe["scratch"] if weights == "none" else recipe


# The processes: this one alone, or all that torchrun started

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(values: list) -> list:
    """Concatenate the lists of all processes, by rank; each waits for all others."""
    if not dist.is_initialized():
        return values
    lists = [None] * world_size()
    dist.all_gather_object(lists, values)
    return list(itertools.chain.from_iterable(lists))


def broadcast(module: nn.Module) -> None:
    """Give all processes the parameters and buffers that the first has."""
    for tensor in module.state_dict().values() if dist.is_initialized() else ():
        dist.broadcast(tensor, src=0)


def on_rank_zero(function: Callable, *arguments: object) -> object:
    """Call a function in the process of rank 0 only; return its value in all."""
    values = [function(*arguments) if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Let one process of each machine go ahead, to draw or download what the others will find."""
    is_first = dist.get_node_local_rank(fallback_rank=0) == 0
    if not is_first:
        gather([])
    yield
    if is_first:
        gather([])


def store_of_attempt() -> dict:
    """A store for init_process_group that is new at every restart by torchrun.

    torchrun keeps one store for all attempts, so that connecting anew can find the addresses of
    processes that have ended (pytorch/pytorch issue 135712). On several machines, which may count
    attempts differently, torchrun's environment needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
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
    # One process may download or check for long, while the others wait.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=timedelta(days=7), **store_of_attempt())
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank() % torch.cuda.device_count())
    torch.set_num_threads(Machine.usable_cores())  # torchrun leaves each process one thread
    with (open(os.devnull, "w", errors="ignore") as null,
          contextlib.redirect_stdout(null if rank() > 0 else sys.stdout)):
        try:
            yield
        except RuntimeError as error:
            is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if not is_lost or "out of memory" in str(error):
                raise
            reason = str(error).partition(". ")[0]
            raise UserError(f"process {rank()} cannot reach the others ({reason}); if one of them "
                            "has failed or was killed, look there first") from None
    # Before torch 2.8, destroy_process_group waits with the GIL for gloo's threads, which may need
    # it to drop their last tensors (pytorch/pytorch pull request 154976).
    time.sleep(0.2)
    dist.destroy_process_group()


# The data

def open_splits(data: str | None, size: int, skip_unreadable: bool,
                val_split: float | None) -> tuple[ImageFolder, ImageFolder]:
    """Open the images to train on and to validate on; download or draw what is missing."""
    with local_rank_zero_first():
        splits = find_data(data)
    if len(splits) == 2 and val_split:
        raise UserError(f"--val-split {val_split} is for a folder without val/: "
                        f"{splits['val'].parent} has one")
    parts = [ImageFolder(folder.absolute(), val_transform(size, normalized=False))
             for folder in splits.values()]
    for images in parts:
        images.tell()
        if skip_unreadable:
            images.leave_out(gather(images.find_unreadable(slice(rank(), None, world_size()))))
    if len(parts) == 1:
        return split_off(parts[0], val_split or VAL_SPLIT)
    alone = [f"{split}/ alone has {shorten(names)}"
             for split, one, other in zip(splits, parts, parts[::-1])
             if (names := sorted({*one.classes} - {*other.classes}))]
    if alone:
        raise UserError(f"the classes of train/ and val/ in {splits['val'].parent} differ: "
                        f"{', '.join(alone)}")
    return tuple(parts)


def find_data(data: str | None) -> dict[str, Path]:
    """Find the splits of a data folder; draw the embedded set or download Imagenette if missing."""
    if data is None:
        data = Path("data/shapes")
        if not data.exists():
            draw_shapes(data)
    elif not Path(data).exists() and Path(data).name in IMAGENETTES:
        download_imagenette(Path(data))
    splits = find_splits(data)
    beside = [path.name for path in sorted(Path(data).glob("[!.]*")) if os.path.isdir(path)]
    if [*splits] == ["train"]:
        for name in ("valid", "validation", "test"):
            if other := find_folder(splits["train"].parent, name):
                raise UserError(f"data folder {data} has {splits['train'].name}/ and {other.name}/ "
                                f"but no val/: rename {other} to val, or give {splits['train']}, "
                                "of which --val-split takes a part")
        others = [name for name in beside if name.lower() != "train"]
        if others:
            print(f"note: {data} has folders beside train/ that are not read: {shorten(others)}")
    elif [*splits] == ["val"]:
        raise UserError(f"data folder {data} has val/ but no train/: it needs both, or class "
                        "folders alone, of which --val-split takes a part")
    elif "all" in splits:
        named = [re.fullmatch(SPLIT_NAME, name) for name in beside]
        if all(named) and len({match[1].lower() for match in named}) > 1:
            raise UserError(f"{data} has no class folders but {shorten(beside)}, splits by their "
                            "names: expected train/ and val/, each with one folder of images for "
                            "each class (if these are classes, put them into train/)")
    return splits


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """Yield a temporary path for a new folder; rename it to `folder` once complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        yield Path(temporary, folder.name)
        if not folder.exists():  # else another run was first
            Path(temporary, folder.name).rename(folder)


def download_imagenette(folder: Path) -> None:
    """Imagenette from its publisher, checked and unpacked by torchvision, whole or not at all."""
    print(f"downloading {folder.name} to {folder} …", flush=True)
    try:
        with made_whole(folder) as temporary:
            datasets.Imagenette(temporary.parent, size=IMAGENETTES[folder.name], download=True)
    except (OSError, RuntimeError) as error:
        url = f"https://s3.amazonaws.com/fast-ai-imageclas/{folder.name}.tgz"
        raise UserError(f"cannot download {folder.name} ({error}): fetch {url} and unpack it "
                        f"as {folder}") from None


def fingerprint(images: ImageFolder) -> str:
    """Number and names of a folder's images, to tell whether they are still the same."""
    names = "\n".join(path[len(images.root):] for path in images.paths)
    digest = hashlib.sha256(os.fsencode(names)).hexdigest()
    return f"{len(images)} images (SHA-256 of their names: {digest[:16]})"


class Augmented(Dataset):
    """Augmented train images, indexed by (index, seed); nothing else affects them."""

    def __init__(self, images: ImageFolder, transform: Callable) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.images.load(index, self.transform)


class EpochBatches(Sampler):
    """The batches of one epoch, in an order that seed and epoch decide, from `start` on.

    Batch sizes differ by at most one image, so that none is too small for batch norm.
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
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        seeds = torch.randint(2 ** 32, (self.count,), generator=generator)
        order = torch.randperm(self.count, generator=generator)
        for batch in order.tensor_split(len(self))[self.start:]:
            part = batch.tensor_split(world_size())[rank()]
            yield list(zip(part.tolist(), seeds[part].tolist()))


def derive_seed(*numbers: int) -> int:
    """A seed made of numbers: 32 bits, as torch's CPU generator ignores all higher ones."""
    return random.Random(" ".join(map(str, numbers))).getrandbits(32)


# Training

class Distiller(nn.Module):
    """Hooked network and loss as one module, so that DDP averages the gradients of both.

    Args:
        hooked: the hooked network.
        criterion: the loss; it is computed in fp32.
        machine: its precision is the network's.

    Shape:
        - images: (N, 3, H, W); labels: (N)
        - returns the loss, a scalar, and the figures (F), means over the batch, in the order of
          `Trainer.figures`
    """

    def __init__(self, hooked: HookedModel, criterion: SelfDistillationLoss,
                 machine: Machine) -> None:
        super().__init__()
        self.hooked, self.criterion, self.machine = hooked, criterion, machine

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self.machine.autocast():
            logits, students, teacher = self.hooked(images)
        logits, teacher = logits.float(), teacher.float()
        students = [features.float() for features in as_tuple(students)]
        early = self.criterion.early_logits(students)
        terms = self.criterion.terms(logits, labels, students, teacher, early)
        loss = sum(terms.values())
        right = [(output.argmax(dim=1) == labels).float().mean() for output in (logits, *early)]
        return loss, torch.stack([torch.ones_like(loss), *terms.values(), *right]).detach()


class Trainer:
    """The state of a training run; `state_dict()` goes into last.pt.

    No random state is part of it: each step is seeded by seed, epoch, batch and rank.

    Args:
        args: the settings.
        machine: to train on.
        train_set, val_set: the images, of the same classes.
        resumed: a state will be loaded, so that no initial weights are needed. Default: False
    """
    COUNTERS = ("epoch", "batch", "seconds", "totals", "log", "best_epoch", "best_acc",
                "start_acc")
    HEADER = ("epoch", "loss", "train acc", "early acc", "hint", "val acc", "images/s", "time")

    def __init__(self, args: argparse.Namespace, machine: Machine, train_set: ImageFolder,
                 val_set: ImageFolder, resumed: bool = False) -> None:
        self.args, self.machine = args, machine
        self.recipe = recipe_of(args.recipe, args.weights)
        self.train_set, self.val_set, self.classes = train_set, val_set, train_set.classes
        self.is_split = train_set.root == val_set.root
        self.data = train_set.root if self.is_split else str(Path(train_set.root).parent)
        self.names = read_names(self.data, self.classes)
        self.fingerprints = {"train": fingerprint(train_set), "val": fingerprint(val_set)}
        self.make_loaders()
        torch.manual_seed(args.seed)
        self.make_network("none" if resumed else args.weights)
        self.make_optimizer()
        self.resumed = resumed
        self.signals, self.stop, self.saved = Signals(), 0, time.monotonic()
        self.epoch = 0  # epochs completed
        self.log: list[dict] = []  # a line for each of them
        self.best_epoch, self.best_acc = -1, -1.0
        self.start_acc = -1.0  # val accuracy of epoch 0, of the classifiers fitted
        self.began = time.monotonic()  # earlier by the seconds before a resume
        self.start_epoch()

    def start_epoch(self) -> None:
        self.batch = 0  # batches of this epoch already trained on
        self.seconds = 0.0  # spent on them
        self.totals = torch.zeros(len(self.figures), device=self.machine.device)

    def fit(self) -> int:
        """Train for the epochs that are left. Returns the signal that stopped it, or 0."""
        with self.signals:
            self.save()  # to see at once whether it can
            # Nothing is learned yet: without these, a start that fails puts the earlier files back.
            for name in () if self.resumed or rank() > 0 else ("last.pt", "log.jsonl"):
                Path(self.args.out, name).unlink()
            if self.average and self.start_acc < 0:
                self.fit_classifiers()
            elif self.recipe["whiten"] and self.epoch == self.batch == 0:
                self.whiten()
            if self.epoch < self.args.epochs:
                self.print_row(*self.HEADER)
            while self.epoch < self.args.epochs and not self.stop:
                self.train_epoch()
                if not self.stop and (predictions := self.validate()):
                    self.finish_epoch(predictions)
            self.attend_to_signals()
            if self.epoch < self.args.epochs:
                self.save()
        return self.stop

    def record_graphs(self) -> None:
        """Record forward and backward as CUDA graphs: one launch a step instead of hundreds.

        Launching them can take the CPU longer than running them takes the GPU. Call it while no
        loader is at work: CUDA calls of its pinning thread would break the recording.
        """
        # A graph keeps autograd's nodes, on the stream of the recording; the wait is negligible.
        warnings.filterwarnings("ignore", "The AccumulateGrad node's stream does not match")
        self.distiller.train()
        buffers = copy.deepcopy([*self.distiller.buffers()])
        pool, size = torch.cuda.graph_pool_handle(), self.args.size
        counts = {self.sampler.size(position) for position in (0, len(self.sampler) - 1)}
        for count in sorted(counts, reverse=True):  # the smaller may reuse the memory
            images = self.machine.prepare(torch.zeros(count, size, size, 3, dtype=torch.uint8))
            labels = torch.zeros(count, dtype=torch.int64, device=images.device)
            try:
                graphed = torch.cuda.make_graphed_callables(
                    copy.copy(self.distiller), (images, labels), allow_unused_input=True, pool=pool)
            except RuntimeError as error:
                cause = error.__context__ or error  # ending a broken recording raises another
                if "out of memory" in str(cause):
                    raise cause
                raise UserError(f"steps of {self.args.arch} cannot be recorded as CUDA graphs "
                                f"({textwrap.shorten(str(cause), 200)}): use --compile, which "
                                "needs none") from None
            # Without its module: the two refer to each other, and would keep the graph alive.
            self.graphs[count] = vars(graphed).pop("forward")
        for buffer, before in zip(self.distiller.buffers(), buffers):
            buffer.copy_(before)  # recording runs it, which moves batch norm's statistics

    def train_epoch(self) -> None:
        """Train on the rest of the epoch's batches, unless asked to stop."""
        if self.machine.on_cuda and self.train_module is self.distiller and not self.graphs:
            self.record_graphs()
        epochs, count = self.args.epochs, self.sampler.count
        progress = Progress(f"epoch {self.epoch + 1}/{epochs}  images", count,
                            done=int(self.totals[0]), later=(epochs - self.epoch - 1) * count)
        start = time.perf_counter() - self.seconds
        if self.average:
            share = GIVEN_SHARE * self.start_acc ** GIVEN_POWER
            self.decay = share ** (1 / (epochs * len(self.sampler)))
        self.distiller.train()
        self.sampler.epoch, self.sampler.start = self.epoch, self.batch
        for images, labels in self.train_loader:
            self.step(images, labels)
            self.seconds = time.perf_counter() - start
            progress.advance(len(labels) * world_size(), self.describe_loss)
            save = self.attend_to_signals()
            if self.stop:
                break
            if save:
                self.save()
        progress.rewrite()
        self.check_finite()  # which waits for the GPU
        self.seconds = time.perf_counter() - start

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take one step on a batch: images (N, H, W, 3) in uint8, labels (N)."""
        torch.manual_seed(derive_seed(self.args.seed, self.epoch, self.batch, rank()))
        images, labels = self.machine.prepare(images), self.machine.move(labels)
        self.optimizer.zero_grad()
        loss, figures = self.graphs.get(len(labels), self.train_module)(images, labels)
        # DDP takes the mean over the processes, whose parts of a batch may differ by one image.
        share = len(labels) * world_size() / self.sampler.size(self.batch)
        self.scaler.scale(loss * share).backward()
        self.scaler.step(self.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        is_last = (self.epoch, self.batch) == (self.args.epochs - 1, len(self.sampler) - 1)
        # If the scale falls, fp16 has overflowed, and no step was taken. No rate follows the last.
        if self.scaler.get_scale() >= scale and not is_last:
            self.scheduler.step()
        if self.average:
            with torch.no_grad():  # like AveragedModel, but without waiting for the GPU
                torch._foreach_lerp_(*self.averaged, 1 - self.decay)
        self.batch += 1

        figures = figures.detach() * len(labels)
        if dist.is_initialized():
            dist.all_reduce(figures)
        self.totals += figures

    def describe_loss(self) -> str:
        self.check_finite()
        images, *terms = self.totals[:1 + len(self.criterion.weights)].tolist()
        return f"loss {sum(terms) / images:.4f}  "

    def attend_to_signals(self) -> bool:
        """Agree with all processes on `stop`; return whether any of them asks for a save now."""
        due = rank() == 0 and time.monotonic() - self.saved >= 60 * self.args.save_every
        wishes = torch.tensor([self.signals.stop, self.signals.save or due])
        if dist.is_initialized():
            dist.all_reduce(wishes, op=dist.ReduceOp.MAX)
        self.stop = self.stop or int(wishes[0])
        return bool(wishes[1])

    def validate(self) -> Predictions | None:
        """Predict the val images, in the order of the folder; None if asked to stop."""
        start = time.perf_counter()
        broadcast(self.result)  # batch norm's statistics differ, and averages by rounding
        columns = self.run_through(fuse(self.result.hooked.model.eval()), self.val_loader,
                                   Predictions.columns, "validating: images")
        return Predictions(*columns, time.perf_counter() - start) if columns else None

    def run_through(self, model: nn.Module, loader: DataLoader, columns_of: Callable,
                    what: str) -> list[Tensor] | None:
        """Run a network over a loader; join columns_of(outputs, labels) from all processes.

        Returns None if asked to stop.
        """
        parts = []
        for outputs, labels in self.machine.outputs(model, loader, what):
            if self.signals.stop:
                break
            parts.append(columns_of(outputs, labels))
        parts = gather([[torch.cat(column).cpu() for column in zip(*parts)]])
        self.attend_to_signals()
        return None if self.stop else [torch.cat(column) for column in zip(*filter(None, parts))]

    def finish_epoch(self, predictions: Predictions) -> None:
        """Log the epoch, save, and print its line."""
        val = predictions.summarize(self.classes)
        if not math.isfinite(val["loss"]):
            raise UserError(f"the val loss is not finite after epoch {self.epoch + 1}: try a lower "
                            "--lr; the last save is intact")
        images = self.totals[0].item()
        means = dict(zip(self.figures, (self.totals / images).tolist()))
        terms = {name: means[name] for name in self.criterion.weights}
        distillation, alpha = sum(terms.values()) - terms["cross_entropy"], self.args.alpha
        self.epoch += 1
        line = {"epoch": self.epoch, "train_loss": sum(terms.values()),
                # Both sides without their weights; None where the weight is 0.
                "ce_loss": terms["cross_entropy"] / (1 - alpha) if alpha < 1 else None,
                "distillation_loss": distillation / alpha if alpha and len(terms) > 1 else None,
                "train_acc": means["train_acc"], "val_loss": val["loss"], "val_acc": val["top1"],
                "lr": self.optimizer.param_groups[0]["lr"],
                "images_per_second": images / self.seconds,
                "seconds": self.seconds + predictions.seconds, "terms": terms,
                "exit_train_acc": {layer: means[layer] for layer in self.exit_layers}}
        self.log.append(line)
        if line["val_acc"] > self.best_acc:  # a tie leaves the earlier epoch the best
            self.best_epoch, self.best_acc = self.epoch, line["val_acc"]
        self.start_epoch()
        self.save()
        self.write_report(predictions)
        early = " ".join(f"{accuracy:.3f}" for accuracy in line["exit_train_acc"].values())
        self.print_row(f"{self.epoch}/{self.args.epochs}", f"{line['train_loss']:.3f}",
                       f"{line['train_acc']:.3f}", early, self.describe_hint(line),
                       f"{line['val_acc']:.4f}", f"{line['images_per_second']:.1f}",
                       Progress.duration(line["seconds"]))

    def describe_hint(self, line: dict) -> str:
        """The mean cosine between student and adapted teacher features, or their distance."""
        if "hint" not in line["terms"]:
            return ""
        weight, layers = self.criterion.weights["hint"], len(self.hooked.student_layers)
        distance = line["terms"]["hint"] / weight / layers
        return f"cos {1 - distance / 2:.3f}" if self.criterion.normalize else f"{distance:.4g}"

    def print_row(self, *cells: str) -> None:
        """Print a line of the table of epochs, of as many cells as HEADER."""
        widths = (6, 8, 10, max(12, 6 * len(self.exit_layers)), 11, 9, 10, 12)
        print("".join(map(str.rjust, cells, widths)), flush=True)

    def remarks(self) -> Iterator[str]:
        """Yield warnings that a user could miss in the log."""
        first, last = self.log[0], self.log[-1]
        if self.best_epoch == 0:
            yield (f"training gained nothing over epoch 0, which best.pt holds "
                   f"({self.start_acc:.4f}, after the last epoch {last['val_acc']:.4f}): the given "
                   "features suit these images already, or the images are too few to improve them")
        stuck = [f"the classifier at {layer}" for layer in self.exit_layers
                 if last["exit_train_acc"][layer] <= first["exit_train_acc"][layer] < 1]
        if last["terms"].get("hint", -1.0) >= first["terms"].get("hint", 0.0):
            stuck.append("the hint")
        if stuck and len(self.log) > 1 and self.best_epoch != 0:
            yield (f"no better at the end than in epoch 1: {shorten(stuck)}; more --epochs or a "
                   "higher --lr may help")

    def fit_classifiers(self) -> None:
        """Epoch 0: fit classifiers and adapters to the features of the weights given, and validate.

        Random ones would distort the features first: Kumar et al., Fine-Tuning can Distort
        Pretrained Features and Underperform Out-of-Distribution, arXiv:2202.10054. A sample of the
        train images is enough.
        """
        start = time.perf_counter()
        loader = self.sample_loader(min(400 * len(self.classes), 20_000))
        headless = copy.deepcopy(self.hooked)  # gives what the linear layers see: (N, C)
        headless.model.set_submodule(find_classifier(self.model), nn.Identity())
        headless.register_forward_hook(lambda module, images, outputs: torch.cat(
            [*map(pooled, (*as_tuple(outputs[1]), outputs[2])), outputs[0]], dim=1))
        columns = self.run_through(headless, loader, lambda *pair: pair,
                                   "fitting the classifiers: images")
        if columns is None:
            return
        features, labels = (column.to(self.machine.device) for column in columns)
        if not features.isfinite().all():
            raise UserError(f"the features of the weights {self.args.weights} are not finite in "
                            f"{self.machine.precision}: try --precision fp32")
        criterion = self.criterion
        *students, teacher, last = features.split(
            [*criterion.student_channels, criterion.teacher_channels, self.head.in_features], dim=1)
        fit_logistic_regression(self.head, last, labels)
        for classifier, means in zip(criterion.classifiers, students):
            fit_logistic_regression(classifier, means, labels)
        adapters = [layer for layer in criterion.modules() if isinstance(layer, nn.Conv2d)]
        for adapter, means in zip(adapters, students):
            fit_adapter(adapter, teacher, means)
        broadcast(self.distiller)  # as machines may round differently
        self.average.load_state_dict(self.distiller.state_dict())
        predictions = self.validate()
        if predictions:
            self.start_acc = self.best_acc = predictions.summarize(self.classes)["top1"]
            self.best_epoch = 0
            error = max(1 - self.start_acc, 1 / len(self.val_set))  # one image at least
            for group in self.optimizer.param_groups if self.args.lr is None else ():
                for name in ("lr", "initial_lr", "max_lr", "min_lr"):  # all that OneCycleLR reads
                    group[name] *= LR_PER_ERROR * error / self.recipe["lr"]
            self.save()
            self.write_report(predictions)
            print(f"epoch 0    val acc {self.start_acc:.4f}, only the classifiers fitted, "
                  f"{Progress.duration(time.perf_counter() - start)}; "
                  f"{'so ' * (self.args.lr is None)}peak lr "
                  f"{self.optimizer.param_groups[0]['max_lr']:.2g}", flush=True)

    def whiten(self) -> None:
        """Begin with a first convolution that whitens patches of the images.

        Its filters are their principal components, scaled to give a variance of 1, and these with
        the opposite sign: Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU,
        arXiv:2404.00498, section 3.2.
        """
        first = next(layer for layer in self.model.modules() if isinstance(layer, nn.Conv2d))
        grid = nn.Unfold(first.kernel_size, stride=(self.args.size - first.kernel_size[0]) // 7)
        columns = self.run_through(grid, self.sample_loader(1000), lambda patches, _:
                                   [patches.mT.flatten(0, 1)], "whitening: images")
        if columns is None:
            return
        variances, axes = (part.flip(-1) for part in torch.linalg.eigh(columns[0].T.cov()))
        count = min(first.out_channels // 2, int((variances > 1e-3).sum()))
        filters = (axes / (variances + 0.01).sqrt()).T[:count].unflatten(1, first.weight.shape[1:])
        with torch.no_grad():
            first.weight[:2 * count] = torch.cat([filters, -filters])
        broadcast(first)  # as machines may round differently

    def sample_loader(self, count: int) -> DataLoader:
        """Make a loader of `count` random train images, in each process of its share."""
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = torch.randperm(len(self.train_set), generator=generator)[:count].tolist()
        return self.machine.loader(Subset(self.train_set, chosen[rank()::world_size()]),
                                   batch_size=self.val_loader.batch_size)

    def is_best(self) -> bool:
        """Whether the epoch just ended is the best so far."""
        return self.epoch == self.best_epoch and self.batch == 0

    def check_finite(self, *tensors: Tensor) -> None:
        if not all(tensor.isfinite().all() for tensor in (self.totals, *tensors)):
            rate = max(group["lr"] for group in self.optimizer.param_groups)
            raise UserError(f"the loss is not finite in epoch {self.epoch + 1}, by batch "
                            f"{self.batch} (learning rate {rate:.3g}): try a lower --lr; the last "
                            "save is intact")

    def save(self) -> None:
        """Write last.pt and log.jsonl; before them best.pt, if the epoch just ended is the best."""
        self.signals.save, self.saved = False, time.monotonic()
        self.check_finite(*self.distiller.parameters())
        if rank() > 0:
            return
        out, checkpoint = Path(self.args.out), self.checkpoint()
        if self.is_best():
            write_checkpoint(out / "best.pt", checkpoint)
        write_checkpoint(out / "last.pt", checkpoint | {"run": self.state_dict()})
        lines = "".join(json.dumps(line) + "\n" for line in self.log)
        write_file(out / "log.jsonl", lines.encode())

    def checkpoint(self) -> dict:
        """The content of best.pt, as of now."""
        args = self.args
        settings = {name: value for name, value in vars(args).items() if name not in NOT_SAVED} | {
            "data": self.data, "precision": self.machine.precision,
            "val_split": (args.val_split or VAL_SPLIT) if self.is_split else None,
            "student_layer": list(self.hooked.student_layers),
            "teacher_layer": self.hooked.teacher_layer}
        last_acc = self.log[-1]["val_acc"] if self.log else self.best_acc
        optional = {"start_acc": self.start_acc} if self.start_acc >= 0 else {}
        if self.exit_layers:
            optional["exits"] = {layer: classifier.state_dict() for layer, classifier
                                 in zip(self.exit_layers, self.result.criterion.classifiers)}
        return optional | {
            "model": self.result.hooked.model.state_dict(), "arch": args.arch,
            "classes": self.classes, "names": self.names, "size": args.size,
            "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), "epoch": self.epoch,
            "val_acc": max(0.0, last_acc), "data": self.data, "args": settings}

    def state_dict(self) -> dict:
        return ({name: part.state_dict() for name, part in self.parts().items()}
                | {name: getattr(self, name) for name in self.COUNTERS}
                | {"data": self.fingerprints, "elapsed": time.monotonic() - self.began})

    def load_state_dict(self, state: dict) -> None:
        steps = getattr(self.scheduler, "total_steps", None)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for name in self.COUNTERS:
            if type(state[name]) is not type(getattr(self, name)):
                raise TypeError(f"{name} is a {type(state[name]).__name__}")
            setattr(self, name, state[name])
        self.began -= float(state["elapsed"])
        if (len(self.totals) != len(self.figures) or self.epoch != len(self.log)
                or getattr(self.scheduler, "total_steps", None) != steps):
            raise ValueError("other figures, or other epochs")
        self.totals = self.totals.to(self.machine.device)

    def parts(self) -> dict:
        parts = {"distiller": self.distiller, "optimizer": self.optimizer,
                 "scheduler": self.scheduler, "scaler": self.scaler}
        return parts | ({"average": self.average} if self.average else {})

    def restore(self, checkpoint: dict) -> None:
        """Go on from a last.pt, provided that the data are still the same."""
        try:
            changed = [f"{split}/ has {now} now, {then} then"
                       for split, now in self.fingerprints.items()
                       if now != (then := checkpoint["run"]["data"][split])]
            classes = sorted(set(self.classes) ^ set(checkpoint["classes"]))
            if classes:
                changed.append(f"classes added or removed: {shorten(classes)}")
            if changed:
                raise UserError(f"{self.data} has changed since the run began: "
                                f"{'; '.join(changed)}")
            self.load_state_dict(checkpoint["run"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError("the checkpoint cannot be resumed, as it is damaged or of another "
                            f"version ({error!r})") from None
        has_best = self.is_best() or Path(self.args.out, "best.pt").exists()
        if not has_best and self.epoch < self.args.epochs:
            self.best_epoch, self.best_acc = -1, -1.0  # without its file, it counts from here

    def write_report(self, predictions: Predictions) -> None:
        """Write report.html, if it is asked for."""
        if not self.args.report or rank() > 0:
            return
        seed, count = self.args.seed, len(self.train_set)
        augmented = [self.train_loader.dataset[index, derive_seed(seed, self.epoch, index)]
                     for index in range(0, count, math.ceil(count / 20))]
        title = (f"{Path(self.args.out).resolve().name}: {self.args.arch} after epoch {self.epoch} "
                 f"of {self.args.epochs}")
        write_file(Path(self.args.out, "report.html"), report_html(
            title, self.checkpoint(), predictions, self.val_set, self.log, augmented=augmented,
            refresh=self.epoch < self.args.epochs))

    def make_loaders(self) -> None:
        args, processes = self.args, world_size()
        self.sampler = EpochBatches(len(self.train_set), args.batch_size, args.seed)
        if args.batch_size % processes:
            raise UserError(f"--batch-size {args.batch_size} cannot be split evenly among "
                            f"{processes} processes: use a multiple of {processes}")
        least = self.sampler.size(len(self.sampler) - 1) // processes
        if least < (2 if args.size < 64 else 1):  # batch norm may have one value an image
            raise UserError(f"the smallest batch leaves a process {least} images, too few for "
                            f"batch norm at {args.size} pixels: use a larger --batch-size or "
                            "--size")
        transform = train_transform(args.size, self.recipe["crop_scale"], normalized=False)
        self.train_loader = self.machine.loader(Augmented(self.train_set, transform),
                                                batch_sampler=self.sampler)
        share = torch.arange(len(self.val_set)).tensor_split(processes)[rank()].tolist()
        self.val_loader = self.machine.loader(Subset(self.val_set, share),
                                              batch_size=args.batch_size // processes)

    def make_network(self, weights: str) -> None:
        """Make the hooked network and its loss."""
        args, recipe, device = self.args, self.recipe, self.machine.device
        self.hooked = load_hooked(args.arch, self.classes, weights, args.student_layer,
                                  args.teacher_layer, recipe["students"])
        self.model = self.hooked.model
        # MobileNetV3 and MNASNet come with 0.01 and less: in a short run, statistics would lag.
        for layer in self.model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = max(layer.momentum, 0.1)
        self.head = self.model.get_submodule(find_classifier(self.model))
        distills = args.distillation and args.alpha > 0
        terms = {name: getattr(args, name) if distills else 0.0
                 for name in ("hint", "labels", "soft")}
        try:
            self.criterion = SelfDistillationLoss(
                args.alpha, *self.hooked.feature_channels(args.size), recipe["detach_teacher"],
                recipe["normalize"], **terms, num_classes=len(self.classes),
                label_smoothing=recipe["label_smoothing"])
            self.exit_layers = self.hooked.student_layers if self.criterion.classifiers else ()
            if self.exit_layers:
                create_feature_extractor(self.model, list(self.exit_layers))  # as EarlyExit does
        except (ValueError, RuntimeError, AssertionError) as error:
            raise UserError(f"{args.arch} cannot be trained at --size {args.size} by --recipe "
                            f"{args.recipe}: {textwrap.shorten(str(error), 200)}") from None
        for name, parameter in self.criterion.named_parameters():
            parameter.requires_grad_(recipe["train_adapter"] or not name.startswith("adapter"))
        self.figures = ("images", *self.criterion.weights, "train_acc", *self.exit_layers)
        if self.machine.on_cuda and world_size() > 1:
            self.hooked.remove_hooks()  # as a batch norm converted has none
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
            names, teacher = self.hooked.student_layers, self.hooked.teacher_layer
            self.hooked = HookedModel(self.model, names if self.hooked.several else names[0],
                                      teacher)
        self.distiller = Distiller(self.hooked, self.criterion, self.machine)
        self.distiller.to(device, memory_format=torch.channels_last)
        self.train_module = torch.compile(self.distiller) if args.compile else self.distiller
        if dist.is_initialized():
            self.train_module = DistributedDataParallel(
                self.train_module, device_ids=[device] if self.machine.on_cuda else None)
        self.graphs: dict[int, Callable] = {}  # what a step calls instead, by the batch's length

    def make_optimizer(self) -> None:
        """Make the optimizer, its schedule and the average of the weights.

        Weights decay that SGD trains and that have more than one dimension.
        """
        recipe, steps = self.recipe, self.args.epochs * len(self.sampler)
        classifiers = {self.head, *self.criterion.classifiers}
        mixing = {layer.weight for layer in self.distiller.modules()  # of all channels
                  if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer not in classifiers
                  and getattr(layer, "groups", 1) == 1}
        hidden, matrices, others = [], [], []
        for tensor in self.distiller.parameters():
            if tensor.requires_grad:
                group = (others if tensor.ndim <= 1 else
                         hidden if recipe["muon"] and tensor in mixing else matrices)
                group.append(tensor)
        groups = [{"params": matrices, "weight_decay": recipe["weight_decay"]}, {"params": others}]
        is_fp16 = self.machine.precision == "fp16"
        self.lr = lr = recipe["lr"] if self.args.lr is None else self.args.lr
        # Fused, a first step that fp16's scaler skips would leave the momentum uninitialised.
        options = dict(lr=lr, momentum=0.9, nesterov=recipe["nesterov"], fused=not is_fp16)
        dtype = torch.bfloat16 if self.machine.precision == "bf16" else torch.get_default_dtype()
        self.optimizer = (Muon(groups, hidden, dtype, **options) if hidden
                          else SGD(groups, **options))
        self.scheduler = (OneCycleLR(self.optimizer, max_lr=lr, total_steps=max(2, steps),
                                     cycle_momentum=False) if recipe["one_cycle"]
                          else ConstantLR(self.optimizer, factor=1.0, total_iters=0))
        self.scaler = torch.amp.GradScaler(self.machine.device.type, enabled=is_fp16)
        fine_tunes = recipe["fine_tune"] and isinstance(self.head, nn.Linear)
        counters = {id(buffer): buffer for buffer in self.distiller.buffers()
                    if not buffer.is_floating_point()}  # which the average shares
        self.average = copy.deepcopy(self.distiller, counters) if fine_tunes else None
        self.result = self.average or self.distiller  # validated, saved
        # Listed once, as that takes as long as averaging them does.
        self.averaged = [[tensor for tensor in (*part.parameters(), *part.buffers())
                          if tensor.is_floating_point()] for part in (self.result, self.distiller)]


class Muon(SGD):
    """SGD whose steps in hidden layers are orthogonal matrices, which pays from random weights.

    All directions of a layer then learn at one rate, however unequal they are in its gradient:
    Jordan et al., Muon: An Optimizer for Hidden Layers in Neural Networks,
    kellerjordan.github.io/posts/muon. torch.optim.Muon (torch 2.9) does not take filters.

    Args:
        groups: groups of parameters that take steps of SGD.
        hidden: matrices (K, C) and filters (K, C, H, W) that take orthogonal steps, undecayed.
        dtype: in which these are computed; bf16 is exact enough.
        options: of SGD.
    """

    def __init__(self, groups: list[dict], hidden: list[Tensor], dtype: torch.dtype,
                 **options) -> None:
        super().__init__([*groups, {"params": hidden, "momentum": 0.0}], **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        momentum = self.defaults["momentum"]
        for tensor in self.param_groups[-1]["params"]:
            if tensor.grad is not None:
                state = self.state[tensor]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(tensor)
                sums = state["momentum_buffer"].mul_(momentum).add_(tensor.grad)
                wanted = tensor.grad.add(sums, alpha=momentum).to(self.dtype)  # Nesterov's
                wanted = wanted.movedim(1, -1)  # as channels_last lies in memory
                tensor.grad.copy_(orthogonal(wanted).movedim(-1, 1))
        super().step(closure)


def orthogonal(filters: Tensor) -> Tensor:
    """Roughly the orthogonal matrix nearest to filters (K, ...), its K rows about 1 long.

    Where K exceeds the length of a filter, its columns are orthogonal instead. By three Newton-
    Schulz steps with Muon's coefficients, which multiply small singular values by up to 41 and take
    those above a fiftieth of the norm to between 0.68 and 1.21. The steps are taken by products of
    the rows with each other, a small square matrix.
    """
    rows = filters.flatten(1)
    count, length = rows.shape
    if count > length:
        return (orthogonal(rows.T).T * (count / length) ** 0.5).reshape(filters.shape)
    square, factors = rows @ rows.T, []
    norm = square.diagonal().sum().sqrt().clamp(min=1e-7)  # of all rows
    square /= norm ** 2
    for _ in range(3):
        factor = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        factors.append(factor)
        square = factor @ square @ factor
    return torch.linalg.multi_dot([factors[0] / norm, *factors[1:], rows]).reshape(filters.shape)


def load_hooked(arch: str, classes: list[str], weights: str, student_layer: list[str] | None,
                teacher_layer: str | None, students: int) -> HookedModel:
    """Call `hooked_classifier`, whose errors are the user's; reset a head for other classes."""
    names = student_layer[0] if student_layer and len(student_layer) == 1 else student_layer
    try:
        with local_rank_zero_first():
            hooked = hooked_classifier(arch, len(classes), weights, names, teacher_layer, students)
        known = None if weights in ("imagenet", "none") else load_tensors(weights).get("classes")
        if known not in (None, classes):
            hooked.model.get_submodule(find_classifier(hooked.model)).reset_parameters()
            print("head       made anew, as the weights are for other classes")
    except ValueError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"cannot get the weights {weights!r} ({error}): give a FILE, imagenet, or "
                        "none for random weights") from None
    if not all(tensor.isfinite().all() for tensor in hooked.state_dict().values()):
        raise UserError(f"{weights}: not all of its weights are finite")
    return hooked


def fit_logistic_regression(classifier: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Fit a linear layer to features (N, C) and labels (N), with a penalty of 0.01 |weight|²."""
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


@torch.no_grad()
def fit_adapter(adapter: nn.Conv2d, inputs: Tensor, targets: Tensor) -> None:
    """Fit a 1x1 convolution to inputs (N, C) and targets (N, D) by ridge regression."""
    mean, target_mean = inputs.mean(dim=0), targets.mean(dim=0)
    gram = (inputs - mean).T @ (inputs - mean)
    gram.diagonal().add_(0.1 * gram.diagonal().mean() + 1e-6)
    products = (inputs - mean).T @ (targets - target_mean)
    weight = torch.linalg.solve(gram.cpu(), products.cpu()).to(mean)  # (C, D); MPS may lack it
    adapter.weight.copy_(weight.T[:, :, None, None])
    adapter.bias.copy_(target_mean - mean @ weight)


class Signals:
    """Records what signals ask for: SIGINT (Ctrl-C), SIGTERM and SIGHUP to stop, SIGUSR1 to save.

    `stop` is the number of the first signal to stop by, or 0. A second SIGINT stops at once. What
    is ignored from the start, as SIGHUP is under nohup, stays so; not SIGINT, which shells ignore
    in jobs in the background.
    """

    def __init__(self) -> None:
        self.stop, self.save, self.interrupted = 0, False, False

    def __enter__(self) -> "Signals":
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
                   if hasattr(signal, name)]
        self.previous = {number: signal.signal(number, self.note) for number in numbers
                         if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *exception) -> None:
        for which, handler in self.previous.items():
            signal.signal(which, handler)

    def note(self, which: int, frame: object) -> None:
        if which == getattr(signal, "SIGUSR1", None):
            self.save = True
        elif which == signal.SIGINT and self.interrupted:
            raise KeyboardInterrupt
        else:
            self.stop = self.stop or which
            self.interrupted = self.interrupted or which == signal.SIGINT


def write_checkpoint(path: Path, checkpoint: dict) -> None:
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getbuffer())


LOCKS: list[int] = []  # descriptors of the folders that this process keeps to itself
if fcntl:  # a loader's worker may outlive a run that is killed, by seconds
    os.register_at_fork(after_in_child=lambda: [*map(os.close, LOCKS)])


@contextlib.contextmanager
def claim(out: Path) -> Iterator[None]:
    """Lock an output folder for this run; remove it in the end if made here and empty."""
    if rank() > 0:
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write to {out}: Permission denied")
    if fcntl:
        LOCKS.append(os.open(out, os.O_RDONLY))
        with contextlib.suppress(OSError):  # network file systems may lock no folders
            try:
                fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(LOCKS.pop())
                raise UserError(f"another run is writing to {out}: wait for it, or choose another "
                                "--out") from None
    try:
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # as it is not empty
                folder.rmdir()
        if fcntl:
            os.close(LOCKS.pop())


@contextlib.contextmanager
def earlier_kept(out: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Rename an earlier run's files of these names; restore them if this run writes none."""
    gather([])  # all processes have read --weights, which may be among them
    earlier = [out / name for name in names if (out / name).exists()] if rank() == 0 else []
    suffix = next(k for k in itertools.count(1)
                  if not any(path.with_suffix(f".{k}{path.suffix}").exists() for path in earlier))
    renamed = {}
    try:
        for path in earlier:
            renamed[path] = path.rename(path.with_suffix(f".{suffix}{path.suffix}"))
        if renamed:
            print(f"kept the earlier {shorten(renamed)} as {shorten(renamed.values())}")
        yield
    finally:
        if renamed and not any((out / name).exists() for name in names):
            for path, kept in renamed.items():
                kept.rename(path)
            print("put the earlier files back, as this run has written none")


def fine_tune(args: argparse.Namespace, checkpoint: dict | None) -> int:
    """Train as the settings say, from a checkpoint if there is one; returns the exit code."""
    out = Path(args.out)
    goes_on = checkpoint and resumed_path(args.resume, out).resolve() == (out / "last.pt").resolve()
    with claim(out):
        machine = Machine(args.device, args.precision, args.workers)
        refuse_unfit_device(machine.device)
        if machine.on_cuda:
            torch.cuda.reset_peak_memory_stats(machine.device)
        splits = open_splits(args.data, args.size, args.skip_unreadable, args.val_split)
        trainer = Trainer(args, machine, *splits, resumed=checkpoint is not None)
        names = () if goes_on else ("best.pt", "last.pt", "log.jsonl", "report.html")
        with earlier_kept(out, names):
            return run_training(trainer, checkpoint)


def run_training(trainer: Trainer, checkpoint: dict | None) -> int:
    """Train, in a folder already claimed, and say what is done; returns the exit code."""
    args, machine = trainer.args, trainer.machine
    if checkpoint:
        trainer.restore(checkpoint)
        checkpoint.clear()  # to free its memory
    loss = " + ".join(f"{weight:g} {name}" for name, weight in trainer.criterion.weights.items())
    print(f"data       {trainer.data}: {len(trainer.train_set)} train and "
          f"{len(trainer.val_set)} val images{' split off by their content' * trainer.is_split}, "
          f"{len(trainer.classes)} classes")
    print(f"network    {args.arch}, weights: {args.weights}, student "
          f"{', '.join(trainer.hooked.student_layers)}, teacher {trainer.hooked.teacher_layer}")
    print(f"machine    {machine.device}, {machine.precision}, {machine.workers} workers"
          + (f" for each of {world_size()} processes" if dist.is_initialized() else ""))
    print(f"recipe     {args.recipe}: {args.size} px, batch {args.batch_size}, lr "
          f"{'by epoch 0' if args.lr is None and trainer.average else f'{trainer.lr:g}'}, "
          f"loss {loss}, seed {args.seed}", flush=True)
    if trainer.resumed:
        print(f"resumed    after {trainer.epoch} epochs and {trainer.batch} batches of the next")
    stop = trainer.fit()
    if trainer.epoch < args.epochs:
        launcher = "torchrun ..." if dist.is_initialized() else "python"
        again = ("the same command and --resume" if args.compare else
                 f"{launcher} {shlex.quote(sys.argv[0])} --resume "
                 f"{shlex.quote(str(Path(args.out, 'last.pt')))}")
        print(f"stopped in epoch {trainer.epoch + 1} after batch {trainer.batch}; go on with: "
              f"{again}", flush=True)
        return 128 + stop
    for remark in trainer.remarks():
        print(f"note: {remark}")
    print(f"best       val accuracy {trainer.best_acc:.4f} in epoch {trainer.best_epoch} (on "
          f"{len(trainer.val_set)} val images; ties go to the earlier epoch)")
    memory = torch.cuda.max_memory_reserved(machine.device) if machine.on_cuda else 0
    print(f"time       {Progress.duration(time.monotonic() - trainer.began)}"
          + f", GPU memory at most {memory / 2 ** 30:.2f} GiB" * machine.on_cuda)
    best, last = (Path(args.out, name) for name in ("best.pt", "last.pt"))
    # A run that had ended writes no report anew, and best.pt only if its last epoch is the best.
    has_best, has_report = best.exists(), args.report and Path(args.out, "report.html").exists()
    print(f"wrote      in {args.out}: {'best.pt (the best epoch, for use), ' * has_best}last.pt "
          f"(to resume), log.jsonl (figures){', report.html' * has_report}")
    print(f"next       python {shlex.quote(str(Path(sys.argv[0]).with_name('evaluate.py')))} "
          f"{shlex.quote(str(best if has_best else last))}")
    return 128 + stop if stop and args.compare else 0  # a signal that came too late for this run


def refuse_unfit_device(device: torch.device) -> None:
    """Refuse devices that several processes cannot train on."""
    if not dist.is_initialized():
        return
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"several processes train on CUDA or on the CPU, not on {device.type}: use "
                        "--device cpu, or go without torchrun")
    if device.type == "cuda" and device.index != dist.get_node_local_rank():
        raise UserError(f"process {rank()} has no GPU of its own: start at most "
                        f"{torch.cuda.device_count()} on this machine, and name no index in "
                        "--device")


# The comparison

def compare(given: dict) -> int:
    """Train runs that share seeds, an arm each; print what distillation gains."""
    out = Path(given.get("out", "."))
    if given.get("resume") in ("", "auto"):
        first = on_rank_zero(first_settings, out)
        if not first and given["resume"] == "":
            raise UserError(f"{out / 'compare'} has no run to go on with: --resume auto begins one "
                            "with the flags given")
        given = first | given
    given = {"compare_arms": ["control", "distillation"]} | given
    args, _ = settle(given | {"resume": None})
    if given.get("resume") not in (None, "", "auto") or not args.distillation or args.alpha == 0:
        raise UserError("--compare trains with distillation and without, in the folder compare in "
                        "--out: it takes no --no-distillation, no --alpha 0 and no FILE to resume")
    if not {"control", "distillation"} <= set(args.compare_arms):
        raise UserError(f"--compare-arms {' '.join(args.compare_arms)}: control and distillation "
                        "must be among them")
    for arm in args.compare_arms:
        settle(given | ARMS[arm] | {"resume": None})  # to refuse it before the first run
    if args.seed + args.compare - 1 > LAST_SEED:
        raise UserError(f"--compare {args.compare} from --seed {args.seed} goes beyond the last "
                        f"seed, {LAST_SEED}")
    names = () if "resume" in given else ("compare", "compare.json")
    if names and (out / "compare").absolute() in Path(args.weights).parents:
        raise UserError(f"--weights {args.weights} is part of the comparison that this one "
                        "replaces: copy it, or choose another --out")
    with claim(out), earlier_kept(out, names):
        return run_comparison(given, args)


def first_settings(out: Path) -> dict:
    """Settings of the first run of the comparison in `out`; empty if there is none."""
    first = min(out.glob("compare/[0-9]*-*/last.pt"), default=None,
                key=lambda path: (int(path.parent.name.partition("-")[0]), path.parent.name))
    if first is None:
        return {}
    return {name: value for name, value in saved_settings(read_checkpoint(first)).items()
            if name not in (*NOT_SAVED, "distillation") and value is not None}


def run_comparison(given: dict, args: argparse.Namespace) -> int:
    """Run the comparison, in a folder already claimed."""
    out, arms = Path(args.out), [arm for arm in ARMS if arm in args.compare_arms]
    runs, precision, total, seconds = [], args.precision, args.compare * len(arms), 0.0
    for seed in range(args.seed, args.seed + args.compare):
        run = {"seed": seed}
        for arm in arms:
            done = len(runs) * len(arms) + len(run) - 1
            left = f", {Progress.duration((total - done) * seconds)} to go" if done else ""
            print(f"\nrun {done + 1} of {total}: {arm}, seed {seed}{left}")
            folder = out / "compare" / f"{seed}-{arm}"
            code = fine_tune(*settle(given | ARMS[arm] | {
                "seed": seed, "out": str(folder), "precision": precision, "resume": "auto"}))
            if code:
                return code
            # The same precision for all runs.
            run[arm], precision, seconds = on_rank_zero(outcome, folder)
        runs.append(run)
        if rank() == 0 and len(runs) > 1:
            figures = paired_statistics(runs, arms)
            write_file(out / "compare.json", json.dumps(figures, indent=2).encode())
    if rank() == 0:
        print(f"\nwrote      {out / 'compare.json'}, and the runs in {out / 'compare'}")
        print_comparison(figures)
    return 0


def outcome(out: Path) -> tuple[float, str, float]:
    """The val accuracy of a run's last epoch, the run's precision, and the seconds it took."""
    checkpoint = load_tensors(out / "last.pt")
    return checkpoint["val_acc"], checkpoint["args"]["precision"], checkpoint["run"]["elapsed"]


def paired_statistics(runs: list[dict], arms: list[str]) -> dict:
    """Mean and deviation of each arm, and of the paired differences with a 95 % t-interval."""
    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.mean(values), "deviation": statistics.stdev(values)}

    figures = {"runs": runs, "arms": {arm: spread([run[arm] for run in runs]) for arm in arms},
               "differences": {}}
    for first, second in itertools.combinations(arms, 2):
        gain = spread([run[second] - run[first] for run in runs])
        half = t_quantile(len(runs) - 1) * gain["deviation"] / math.sqrt(len(runs))
        figures["differences"][f"{second} - {first}"] = gain | {
            "interval": [gain["mean"] - half, gain["mean"] + half]}
    return figures


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t distribution, to 0.001."""
    t = torch.linspace(0, 13, 130_001, dtype=torch.float64)
    density = torch.distributions.StudentT(freedom).log_prob(t).exp()
    above_0 = torch.cumulative_trapezoid(density, t)
    return t[torch.searchsorted(above_0, 0.475)].item()


def print_comparison(figures: dict) -> None:
    arms, runs = figures["arms"], figures["runs"]
    print("\nval accuracy after the last epoch, by seed and by what early layers learn from:")
    print(*(f"  {arm}: {MEANINGS[arm]}" for arm in arms), sep="\n")
    print("     seed" + "".join(f"{arm:>14}" for arm in arms))
    for run in runs:
        print(f"{run['seed']:9}" + "".join(f"{run[arm]:14.4f}" for arm in arms))
    for name in ("mean", "deviation"):
        print(f"{name:>9}" + "".join(f"{arm[name]:14.4f}" for arm in arms.values()))
    for name, difference in figures["differences"].items():
        low, high = difference["interval"]
        print(f"{name}: {difference['mean']:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}")
    low, high = figures["differences"]["distillation - control"]["interval"]
    unknown = "whether distillation helps or hurts cannot be told"
    verdict, advice = (
        (unknown, "all differences are equal, so the interval says nothing; use more val images or "
                  "more seeds") if high - low < 1e-9 else
        ("distillation helps", "train with it") if low > 0 else
        ("distillation hurts", "use --no-distillation") if high < 0 else
        (unknown, "train with it or without, or compare more seeds"))
    print(f"{verdict}, with {len(runs)} pairs: {advice}")


# The check of a folder

def check(args: argparse.Namespace) -> int:
    """Read all images; print what would make training fail or mislead. Returns the exit code."""
    problems, notes, classes, copies = {}, {}, {}, defaultdict(list)
    for split, folder in find_data(args.data).items():
        images = ImageFolder(folder, transform=None, allow_empty=True)
        images.tell()
        classes[split], found = set(images.classes), images.read_all(workers=args.workers)
        counts = Counter(images.classes[label] for label in images.targets).most_common()
        print(f"{split + '/':7}{len(images)} images, {len(images.classes)} classes"
              + (f", of {counts[-1][1]} ({counts[-1][0]}) to {counts[0][1]} ({counts[0][0]}) images"
                 if counts else ""))
        readable = [(path, images.classes[label], digest) for (path, label), digest
                    in zip(images.samples, found) if isinstance(digest, bytes)]
        for path, name, digest in readable:
            copies[digest].append((split, name, path))
        problems[f"classes without readable images in {split}/"] = sorted(
            classes[split] - {name for _, name, _ in readable})
        (notes if args.skip_unreadable else problems)[f"unreadable images in {split}/"] = [
            error for error in found if isinstance(error, str)]
    in_any = set.union(*classes.values())
    try:
        read_names(folder if len(classes) == 1 else folder.parent, sorted(in_any))
    except UserError as error:
        problems["unusable file"] = [str(error)]
    problems["classes that only one of train/ and val/ has"] = sorted(
        in_any - set.intersection(*classes.values()))
    if len(classes) == 1:
        different = Counter(name for name, _ in {(name, digest) for digest, group in copies.items()
                                                 for _, name, _ in group})
        problems["classes of one image, too few to split off val"] = sorted(
            name for name, count in different.items() if count == 1)
    for group in copies.values():
        splits, names, paths = zip(*group)
        for kind, what, found in (
                (problems, "images in both train/ and val/, which flatter val accuracy",
                 len(set(splits)) > 1),
                (problems, "images in more than one class", len(set(names)) > 1),
                (notes, "images twice or more in the same class of the same split",
                 len(group) > len(set(zip(splits, names))))):
            if found:
                kind.setdefault(what, []).append(" = ".join(paths))
    for kind, found in (("note", notes), ("problem", problems)):
        for what, items in found.items():
            if items:
                print(f"{kind}: {len(items)} {what}", *items[:20], sep="\n  ")
                print(f"  and {len(items) - 20} more\n" * (len(items) > 20), end="")
    count = sum(map(len, problems.values()))
    print(f"problems found: {count or 'none'}")
    return int(count > 0)


# The embedded data set

def polygon(corners: int) -> Callable[[float], float]:
    wedge = 2 * pi / corners
    return lambda angle: cos(wedge / 2) / cos(angle % wedge - wedge / 2)


# The radius of each shape, at most 1, by the angle in radians.
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
    try:
        with made_whole(folder) as temporary:
            for split, count in (("train", train), ("val", val)):
                for name in SHAPES:
                    (temporary / split / name).mkdir(parents=True)
                    for k in range(count):
                        image = draw_shape(name, random.Random(f"{split}/{name}/{k}"))
                        image.save(temporary / split / name / f"{k:03d}.png")
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
    return image.resize((size, size), Image.LANCZOS)


# The command line

def make_parser() -> Parser:
    """A parser whose result has the flags that are given, and no others."""
    number = Parser.number

    def weights_named(text: str) -> str:
        return text if text in ("imagenet", "none") else os.path.abspath(text)

    def by_recipe(setting: str) -> str:
        values = ((name, *(recipe_of(name, weights)[setting] for weights in ("imagenet", "none")))
                  for name in RECIPES)
        return ", ".join(f"{name} {given:g}" + f" ({scratch:g} from random weights)"
                         * (scratch != given) for name, given, scratch in values)

    parser = Parser(prog="train.py", argument_default=argparse.SUPPRESS,
                    description="Fine-tune an image classifier while the network teaches itself.")
    group = parser.add_argument_group("data and results")
    group.add_argument("--data", metavar="DIR", help="folder with train/ and val/, each with one "
                       "folder of images a class, or of class folders alone; a missing "
                       "imagenette2, imagenette2-320 or imagenette2-160 is downloaded (default: "
                       "drawn shapes in ./data/shapes)")
    group.add_argument("--val-split", type=number(float, 0.001, 0.999), metavar="FRACTION",
                       help="part to validate on of a folder without val/, which is split by the "
                       f"images' content, without moving any (default: {VAL_SPLIT:g})")
    group.add_argument("--out", metavar="DIR", help="for best.pt, last.pt and log.jsonl (default: "
                       "the current folder)")
    group.add_argument("--resume", metavar="FILE", nargs="?", const="",
                       help="go on from FILE (default: last.pt in --out), by default in its "
                       "folder; auto: from last.pt, or anew if there is none yet")
    group.add_argument("--save-every", type=number(float, 0), metavar="MINUTES",
                       help="between saves of last.pt within an epoch; each epoch ends with one "
                       "(default: 10)")
    group.add_argument("--report", action=argparse.BooleanOptionalAction,
                       help="write report.html in --out, anew after each epoch: figures, charts "
                       "and images, to be watched in a browser")
    group.add_argument("--check", action="store_true", help="instead of training, read every image "
                       "and tell what would make training fail or mislead: unreadable images, "
                       "classes without images or in one split only, copies within and across "
                       "splits")
    group.add_argument("--skip-unreadable", action=argparse.BooleanOptionalAction,
                       help="leave out images that cannot be read, having tried all at the start")
    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=list(RECIPES), help="the loss and how to train, "
                       "unless a flag below says otherwise (default: tuned; byot: Be Your Own "
                       "Teacher; blog: the published walk-through)")
    group.add_argument("--epochs", type=number(int, 1), metavar="N",
                       help="passes over the images (default: 5)")
    group.add_argument("--batch-size", type=number(int, 1), metavar="N", help="images a step, on "
                       f"all processes together (default: {by_recipe('batch_size')})")
    group.add_argument("--lr", type=number(float, 0), metavar="RATE", help="peak learning rate "
                       f"(default: {LR_PER_ERROR:g} times the val error of epoch 0; from random "
                       f"weights {SCRATCH['lr']:g}; blog {RECIPES['blog']['lr']:g})")
    group.add_argument("--alpha", type=number(float, 0, 1), metavar="WEIGHT", help="weight of the "
                       "three terms below, 1 - WEIGHT of the cross-entropy (default: "
                       f"{by_recipe('alpha')})")
    for name, what in (("hint", "the distance of early features from adapted deep ones"),
                       ("labels", "the early classifiers' cross-entropy"),
                       ("soft", "what the early classifiers learn from the network's output")):
        group.add_argument(f"--{name}", type=number(float, 0), metavar="WEIGHT",
                           help=f"weight of {what} (default: {by_recipe(name)})")
    group.add_argument("--distillation", action=argparse.BooleanOptionalAction,
                       help="--no-distillation trains on the cross-entropy alone, its weight as it "
                       "is: the control of --compare")
    group.add_argument("--seed", type=number(int, 0, LAST_SEED), metavar="N",
                       help="of weights, order and augmentation (default: 0)")
    group.add_argument("--compare", type=number(int, 2), metavar="N", help="train N pairs of runs, "
                       "seeds from --seed on, with and without distillation, and print what it "
                       "gains (also in compare.json); to go on after a stop, add --resume")
    group.add_argument("--compare-arms", nargs="+", choices=list(ARMS), metavar="ARM",
                       help="of --compare: control (without distillation), labels (--hint 0 --soft "
                       "0), distillation (default: control distillation)")
    group = parser.add_argument_group("network")
    group.add_argument("--arch", metavar="NAME", help="any classifier of torchvision.models, such "
                       "as resnet50 or vit_b_16 (default: resnet18)")
    group.add_argument("--student-layer", nargs="+", metavar="NAME", help="early layers that "
                       "learn, shallow first (default: found, two of them, for resnet18 layer2.1 "
                       "and layer3.1; blog: one)")
    group.add_argument("--teacher-layer", metavar="NAME", help="deep layer that --hint compares "
                       "them with (default: found; layer4.1 for resnet18)")
    group.add_argument("--weights", metavar="imagenet|none|FILE", type=weights_named,
                       help="initial weights (default: imagenet; none for the drawn shapes)")
    group.add_argument("--size", type=number(int, *SIZES), metavar="PIXELS",
                       help="height and width of the images (default: 224; 32 for the drawn "
                       "shapes)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="torch.compile the network (one GPU is faster without, by CUDA "
                       "graphs)")
    parser.add_machine_arguments()
    return parser


def settle(given: dict) -> tuple[argparse.Namespace, dict | None]:
    """Complete the flags given to a run's final settings; load the checkpoint it resumes, if any.

    The settings of a checkpoint come before the defaults, and flags before both.
    """
    checkpoint = None if given.get("resume") is None else on_rank_zero(read_resumed, given)
    if checkpoint:
        path = resumed_path(given["resume"], given.get("out", "."))
        saved = saved_settings(checkpoint) | {"out": str(path.parent)}
        refuse_contradictions(given, saved)
        given = given | saved | {name: given[name] for name in CHANGEABLE if name in given}
    settings = DEFAULTS | given
    embedded = settings["data"] is None
    weights = settings.get("weights", "none" if embedded else "imagenet")
    recipe = recipe_of(settings["recipe"], weights)
    decided = {"size": 32 if embedded else 224, "weights": weights,
               "lr": None if recipe["fine_tune"] else recipe["lr"]}
    args = argparse.Namespace(**decided | {name: recipe[name] for name in RECIPE_FLAGS} | settings)
    if args.alpha == 1 and not args.distillation:
        raise UserError("--no-distillation with --alpha 1 leaves nothing to train on: use a "
                        "smaller --alpha")
    if args.distillation and not (args.hint or args.labels or args.soft):
        raise UserError("--hint, --labels and --soft are all 0: use --no-distillation to train on "
                        "the cross-entropy alone")
    return args, checkpoint


def saved_settings(checkpoint: dict) -> dict:
    """The settings of the run that wrote a checkpoint."""
    flags = as_flags({name: value for name, value in checkpoint["args"].items()
                      if name not in NOT_SAVED})
    return DEFAULTS | vars(make_parser().parse_args(flags)) | {"data": checkpoint["data"]}


def as_flags(settings: dict) -> list[str]:
    """Settings as flags, so that what a file says is checked like what a user types."""
    flags = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif value is not None:
            flags.append(f"{flag}={value}")
    return flags


def resumed_path(resume: str, out: str) -> Path:
    return Path(out, "last.pt") if resume in ("", "auto") else Path(resume)


def read_resumed(given: dict) -> dict | None:
    """The checkpoint that --resume names; None if it is "auto" and there is none yet."""
    path = resumed_path(given["resume"], given.get("out", "."))
    if given["resume"] == "auto" and not path.exists():
        if "compare" not in given:  # which has just announced the run
            print(f"no {path} yet: starting anew")
        return None
    checkpoint = read_checkpoint(path)
    if not isinstance(checkpoint.get("run"), dict):
        raise UserError(f"{path} cannot be resumed: it holds no training state (resume from "
                        "last.pt)")
    return checkpoint


def refuse_contradictions(given: dict, saved: dict) -> None:
    """Refuse flags that contradict the run to resume; print what a higher --epochs changes."""
    for name in sorted(given.keys() - set(CHANGEABLE)):
        if given[name] != saved.get(name) and (name, given[name]) != ("precision", "auto"):
            asked, had = (" ".join(as_flags({name: values.get(name)})).replace("=", " ", 1)
                          for values in (given, saved))
            raise UserError(f"{asked} contradicts the run to resume, which has "
                            f"{had or 'the default'}")
    epochs, before = given.get("epochs", saved["epochs"]), saved["epochs"]
    one_cycle = RECIPES[saved["recipe"]]["one_cycle"]
    if epochs < before or epochs > before and one_cycle:
        reason = "its learning rate ends there" if one_cycle else "they can only be raised"
        raise UserError(f"--epochs {epochs} contradicts the run to resume, which has {before}: "
                        f"{reason}; for a new run from what it has learned, give --weights best.pt")
    if epochs > before:
        print(f"epochs     {epochs} instead of {before}, at the same learning rate")


def main(arguments: list[str] | None = None) -> None:
    if hasattr(signal, "SIGUSR1"):  # there is nothing to save before a run and between two
        signal.signal(signal.SIGUSR1, lambda *_: None)
    with process_group():
        given = vars(make_parser().parse_args(arguments))
        if "check" in given:
            code = on_rank_zero(check, settle(given)[0])
        elif "compare" in given:
            code = compare(given)
        elif "compare_arms" in given:
            raise UserError("--compare-arms is for --compare N")
        else:
            code = fine_tune(*settle(given))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_script(main)
