"""How good a trained classifier is, and where it is wrong.

    python evaluate.py best.pt
    python evaluate.py best.pt --report .              # and a page of figures, charts and mistakes
    python evaluate.py best.pt --predict photo.jpg     # instead: the classes of other images
    python evaluate.py best.pt --export network.pt2    # instead: the network for other programs

needs nothing else: the data, image size, batch size and precision are in the checkpoint. On the
machine of training, the figures equal those that train.py logged, if its device and precision were
those chosen by default. For another folder's `val/`: `--data DIR`.
"""
import os
import sys

if __name__ == "__main__":  # `python -P` leaves the script's folder out
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

try:
    import torch
    import torchvision
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        raise ImportError(f"torch {torch.__version__} is older than 2.6")
except (ImportError, RuntimeError) as error:  # a torchvision built for another torch: RuntimeError
    sys.exit(f"{sys.argv[0]}: error: torch and torchvision are missing, too old or do not fit "
             f"together ({error}): pip install --upgrade -r requirements.txt")

import argparse
import atexit
import base64
import contextlib
import copy
import csv
import ctypes
import errno
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import re
import shutil
import signal
import statistics
import tempfile
import textwrap
import time
import unicodedata
import warnings
from collections import Counter, defaultdict
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
from torchvision import datasets
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from selfdistill import (IMAGENET_MEAN, IMAGENET_STD, channels_first, load_classifier, load_tensors,
                         normalize, pooled, to_rgb, turn_of, val_transform)

# First half: what train.py shares (messages, images, the machine, predictions, files, the report).
# The script alone begins at "Second half".

SIZES = (32, 2048)  # least and greatest height and width of an image, in pixels
IMAGE_SUFFIXES = (*datasets.folder.IMG_EXTENSIONS, ".jfif", ".jpe", ".gif",
                  *({".avif"} & Image.registered_extensions().keys()))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Advice for known failures, and parts of torch's messages by which they are known.
FAILURES = {
    "too many open files: use fewer --workers, or raise the limit (ulimit -n)":
        ("Too many open files", "ancdata"),
    "--compile needs a C++ compiler here: install one, or go without --compile":
        ("C++ compiler", "C compiler"),
    "out of memory: use a smaller --batch-size, fewer --workers, more shared memory (docker run "
    "--shm-size), or train at a smaller --size":
        ("out of memory", "t allocate memory", "DataLoader worker (pid", "shared memory(shm)",
         "shared memory object")}


class UserError(Exception):
    """A user's mistake, reported in one line without a traceback."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; a user's mistake ends in one line on stderr and exit code 1."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by `>&-`
            setattr(sys, name, open(os.devnull, "w"))
        elif type(stream) is io.TextIOWrapper:
            setattr(sys, name, Output(stream.buffer, stream.encoding, "backslashreplace",
                                      line_buffering=stream.line_buffering,
                                      write_through=stream.write_through))

    def fail(message: str) -> None:
        message = printable(message).replace("\n", "\\n")
        sys.exit(f"{Path(sys.argv[0]).name}: error: {message}")

    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        hint = " (--skip-unreadable leaves such images out)"
        fail(str(error) + hint * isinstance(error, UnreadableImage))
    except (RuntimeError, OSError) as error:
        for advice, signs in FAILURES.items():
            if any(sign in str(error) for sign in signs):
                fail(advice)
        if getattr(error, "filename", None):  # as of a file that the user may not read
            fail(f"{error.filename}: {error.strerror}")
        raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        atexit.register(kill_workers)  # now, to come before torch's own, which wait for each worker


class Output(io.TextIOWrapper):
    """Standard output or error, whose failure stops no run.

    What follows is discarded, with one warning; without one after a closed pipe (`| head`).
    """

    def write(self, text: str) -> int:
        self.attempt(super().write, text if text == Progress.CLEAR else printable(text))
        return len(text)

    def flush(self) -> None:
        self.attempt(super().flush)

    def attempt(self, function: Callable, *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, BrokenPipeError):
                with contextlib.suppress(OSError):  # of the same lost terminal
                    print(f"standard output is lost: {error.strerror}", file=sys.stderr)


def printable(text: str) -> str:
    """Escape the control characters of a text, but for newlines."""
    return re.sub(r"[\x00-\t\v-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


class Parser(argparse.ArgumentParser):
    """An argument parser with errors of one line, and the flags that both scripts share."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n")

    @staticmethod
    def number(kind: type, low: float, high: float = 1_000_000) -> Callable[[str], int | float]:
        """Make an argparse type: a number in [low, high]."""
        def parse(text: str) -> int | float:
            try:
                value = kind(text)
            except ValueError:
                value = math.nan
            if not low <= value <= high:
                what = "a whole number" if kind is int else "a number"
                raise argparse.ArgumentTypeError(f"{text!r} is not {what} between {low} and {high}")
            return value
        return parse

    def parse_args(self, arguments: list[str] | None = None) -> argparse.Namespace:
        for argument in sys.argv[1:] if arguments is None else arguments:
            if re.fullmatch("(--[a-z-]+=)?", argument):
                self.error("an argument is empty, as of a shell variable that is not set")
        return super().parse_args(arguments)

    def add_machine_arguments(self) -> None:
        group = self.add_argument_group("machine")
        group.add_argument("--workers", type=Parser.number(int, 0, 1024), metavar="N",
                           help="processes that load images, for each that computes; 0: none "
                           f"(default: the CPU cores available, {Machine.usable_cores()} here)")
        group.add_argument("--device", help="cpu, cuda, cuda:1, mps, ... (default: auto, the best "
                           "there is)")
        group.add_argument("--precision", choices=["auto", *DTYPES], help="of the network; losses "
                           "are in fp32 (default: auto, bf16 or fp16 where the device has it)")


class Progress:
    """A line on a terminal, rewritten at most twice a second; silent elsewhere.

    Args:
        what: text before the count, with the unit.
        total: number of items.
        done: items processed before. Default: 0
        later: items after `total`, for the time left. Default: 0
    """

    CLEAR = "\r\033[K"  # the line

    def __init__(self, what: str, total: int, done: int = 0, later: int = 0) -> None:
        self.what, self.total, self.done, self.later = what, total, done, later
        self.done_before, self.start, self.due = done, time.perf_counter(), 0.0

    def advance(self, count: int, note: Callable[[], str] = str) -> None:
        """Count on. `note` adds to the line; it is called only when that is due."""
        self.done += count
        now = time.perf_counter()
        if now < self.due:
            return
        self.due = now + 0.5
        speed = (self.done - self.done_before) / (now - self.start)
        left = (self.total + self.later - self.done) / speed
        self.rewrite(f"{self.what} {self.done}/{self.total}  {speed:.1f} images/s  {note()}"
                     f"{self.duration(left)} left")

    @staticmethod
    def duration(seconds: float) -> str:
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return (f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes
                else f"{seconds} s")

    @staticmethod
    def rewrite(text: str = "") -> None:
        """Replace the line, by nothing unless a text is given, and within the terminal's width."""
        if sys.stdout.isatty():
            print(Progress.CLEAR, end="")
            print(text[:shutil.get_terminal_size().columns - 1], end="", flush=True)


def shorten(names: Iterable) -> str:
    """Join the first ten of the names, and count the rest."""
    names = list(map(str, names))
    rest = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + rest


# Images

# Pillow warns of large images, which are fine here; those twice as large it refuses.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class UnreadableImage(UserError):
    """An image that cannot be decoded; the message names the file."""

    def __init__(self, message: str) -> None:
        # From a loader's worker, the message comes in a whole traceback.
        super().__init__(message.rpartition("UnreadableImage: ")[2].strip())


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Raise UnreadableImage for whatever reading an image raises."""
    try:
        yield
    except Exception as error:  # a damaged file can raise nearly anything
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE):  # too many open files
            raise
        reason = (getattr(error, "strerror", None) or str(error).replace(f" {path!r}", "")
                  or type(error).__name__)
        raise UnreadableImage(f"cannot read the image {path}: {reason}") from None


def load_image(path: str) -> Tensor:
    """Read an image as `to_rgb` converts it: uint8 (3, H, W)."""
    with reading(path), Image.open(path) as image:  # which reads no more than the header
        if image.format == "JPEG" and image.mode == "RGB" and turn_of(image) is None:
            # Faster than Pillow, which has better messages, and will be there when torchvision has
            # dropped its decoders.
            with contextlib.suppress(RuntimeError, AttributeError):
                return torchvision.io.decode_jpeg(torchvision.io.read_file(path))
        return pil_to_tensor(to_rgb(image))


def find_images(folder: str, left_out: Counter, seen: set[str]) -> list[str]:
    """Find the images in a folder and below, ordered by name, each folder once wherever links lead.

    Args:
        folder: to look in.
        left_out: counts what is not read: other files by suffix, and hidden folders.
        seen: real paths of folders already visited; updated.
    """
    def refuse(error: OSError) -> None:
        raise error

    seen.add(os.path.realpath(folder))
    above = set(map(str, Path(folder).resolve().parents))
    found = []
    for parent, inside, names in os.walk(folder, onerror=refuse, followlinks=True):
        left_out["hidden folder(s)"] += sum(name.startswith(".") for name in inside)
        folders, files = (sorted(name for name in part if not name.startswith("."))
                          for part in (inside, names))
        reached = {os.path.realpath(os.path.join(parent, name)): name for name in folders[::-1]}
        inside[:] = sorted(reached[real] for real in reached.keys() - seen - above)
        seen.update(reached)
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES):
                found.append(os.path.join(parent, name))
            else:
                left_out[os.path.splitext(name)[1].lower() or "without suffix"] += 1
    return found


def tell_left_out(folder: str, left_out: Counter) -> None:
    """Print what `find_images` has left out of a folder, in a line, if anything."""
    if left_out.total():
        kinds = (f"{count} {kind}" for kind, count in left_out.most_common() if count)
        print(f"note: left out of {folder}, files and folders: {shorten(kinds)}")


class ImageFolder(datasets.ImageFolder):
    """A folder of class folders, whose labels follow `classes` by name, never by position.

    Its items are images (H, W, 3) in uint8, the layout that is fastest to batch, and labels.

    Args:
        root: the folder that holds a folder for each class.
        transform: uint8 tensor (3, H, W) -> uint8 tensor (3, H, W); None if no item is taken.
        classes: the names that labels are positions in; the folder may have fewer of them.
            Default: those of the folder, sorted
        allow_empty: let a class have no images. Default: False

    Raises:
        UserError: the folder is empty, or has an empty class or an unknown one.
        OSError: it, or a folder in it, cannot be read.
    """

    def __init__(self, root: str | Path, transform: Callable | None,
                 classes: list[str] | None = None, allow_empty: bool = False) -> None:
        self.known_classes, self.left_out = classes, Counter()
        super().__init__(str(root), transform, loader=load_image, allow_empty=allow_empty)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        folders = {}
        for entry in os.scandir(directory):
            name = unicodedata.normalize("NFC", entry.name)
            if name.startswith("."):
                self.left_out["hidden folder(s)"] += entry.is_dir()
            elif not os.path.exists(entry.path):
                raise UserError(f"{entry.path} is a broken link: fix or remove it")
            elif name in folders:
                raise UserError(f"{directory} has two class folders named {name}, in two Unicode "
                                "forms of the same letters: put their images into one")
            elif entry.is_dir():
                folders[name] = entry.path
            elif name != "classes.txt":
                self.left_out["beside the class folders"] += 1
        if not folders:
            raise UserError(f"{directory} has no class folders: expected one folder of images "
                            "for each class, in it or in its train/ and val/")
        classes = self.known_classes or sorted(folders)  # by NFC, whatever form the disk has
        labels = {unicodedata.normalize("NFC", name): label for label, name in enumerate(classes)}
        unknown = sorted(folders.keys() - labels.keys())
        if unknown:
            raise UserError(f"{directory} has classes that the model does not know: "
                            f"{shorten(unknown)}; it knows {shorten(classes)}")
        return classes, {folders[name]: labels[name] for name in sorted(folders)}

    def make_dataset(self, directory: str, class_to_idx: dict[str, int], *, allow_empty: bool,
                     **others: object) -> list[tuple[str, int]]:
        seen = set(map(os.path.realpath, [directory, *class_to_idx]))
        found = {folder: find_images(folder, self.left_out, seen) for folder in class_to_idx}
        empty = [Path(folder).name for folder, paths in found.items() if not paths]
        if empty and not allow_empty:
            raise UserError(f"{directory} has no images of the classes {shorten(empty)}: expected "
                            f"files that end in {', '.join(IMAGE_SUFFIXES)} (results, as of --out, "
                            "belong elsewhere)")
        self.nested = [Path(folder).name for folder, paths in found.items()  # its own come first
                       if paths and os.path.dirname(paths[-1]) != folder]
        if len(found) == len(self.nested) == 1 and not self.known_classes:
            raise UserError(f"{directory} has one class folder, {self.nested[0]}, with folders in "
                            f"it: if these are the classes, give {Path(*found)}")
        return [(path, class_to_idx[folder]) for folder, paths in found.items() for path in paths]

    def tell(self) -> None:
        """Print notes on files left out, and on folders inside class folders."""
        tell_left_out(self.root, self.left_out)
        if self.nested:
            print(f"note: in {self.root}, folders inside a class folder are not classes, but count "
                  f"as part of it: in {shorten(self.nested)}")

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.load(index, self.transform)

    def load(self, index: int, transform: Callable) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return transform(self.loader(path)).permute(1, 2, 0), label

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.samples]

    def read_all(self, part: slice = slice(None), workers: int | None = None) -> list[bytes | str]:
        """Read all images, or a part: a digest of the pixels of each, or why it cannot be read."""
        def read(path: str) -> bytes | str:
            try:
                pixels = self.loader(path)
            except UnreadableImage as error:
                return str(error)
            return hashlib.sha256(repr(pixels.shape).encode() + pixels.numpy().tobytes()).digest()

        paths, results = self.paths[part], []
        progress = Progress(f"reading {self.root}: images", len(paths))
        with ThreadPool(workers or Machine.usable_cores()) as pool:
            for result in pool.imap(read, paths, chunksize=8):
                results.append(result)
                progress.advance(1)
        progress.rewrite()
        return results

    def find_unreadable(self, part: slice = slice(None)) -> list[str]:
        """The paths of the images, or of a part of them, that cannot be read."""
        return [path for path, result in zip(self.paths[part], self.read_all(part))
                if isinstance(result, str)]

    def keep(self, chosen: list[bool]) -> None:
        """Go on with some of the images only."""
        self.samples = list(itertools.compress(self.samples, chosen))
        self.targets = [label for _, label in self.samples]

    def leave_out(self, paths: list[str]) -> None:
        """Go on without these images, and say which."""
        if not paths:
            return
        print(f"{self.root}: {len(paths)} of {len(self)} images cannot be read and are left out: "
              f"{shorten(sorted(paths))}")
        unreadable = set(paths)
        self.keep([path not in unreadable for path in self.paths])
        emptied = sorted(set(self.class_to_idx.values()) - set(self.targets))
        if emptied:
            raise UserError(f"{self.root} has no image that can be read for "
                            f"{shorten(self.classes[label] for label in emptied)}")


def find_folder(parent: Path, name: str) -> Path | None:
    """The folder of this name, in lower case, title case or upper case, or None."""
    return next((path for path in (parent / name, parent / name.title(), parent / name.upper())
                 if os.path.isdir(path)), None)  # os.path, as Path.is_dir may raise


def find_splits(data: str | Path) -> dict[str, Path]:
    """Find train/ and val/ (or Train/, TRAIN/ ...), or either, in a data folder: paths by split.

    They are in `data` or, if both, in the one folder in it that has them. Where there is neither,
    or no folder in them, as in a class called train, `data` is taken for a folder of class folders,
    the split "all".

    Raises:
        UserError: it is missing, or has several such folders.
    """
    def splits_in(folder: Path) -> dict[str, Path]:
        found = {split: path for split in ("train", "val")
                 if (path := find_folder(folder, split))}
        has_classes = any(os.path.isdir(inside) for path in found.values()
                          for inside in path.glob("[!.]*"))
        return found if has_classes else {}

    data = Path(data)
    if not os.path.isdir(data):
        raise UserError(f"data folder {data} does not exist: give the right one by --data")
    folders = [data] if splits_in(data) else [
        folder for folder in sorted(data.glob("[!.]*")) if len(splits_in(folder)) == 2] or [data]
    if len(folders) > 1:
        raise UserError(f"data folder {data} has several folders with train/ and val/ in it, "
                        f"{shorten(folders)}: name one of them")
    folder, = folders
    return splits_in(folder) or {"all": data}


def split_off(images: ImageFolder, fraction: float) -> tuple[ImageFolder, ImageFolder]:
    """Split images into train and val by a hash of each file's content.

    An image goes to val if its hash, scaled to [0, 1], is below `fraction`: renaming
    moves no image, and copies stay together. A class entirely on one side gives one image to the
    other, one that no other class has if there is any.

    Raises:
        UserError: a class would have images on one side alone, or a file cannot be read.
    """
    def place_of(path: str) -> float:
        with reading(path):
            digest = hashlib.sha256(Path(path).read_bytes()).digest()
        return int.from_bytes(digest[:8], "big") / 2 ** 64

    with ThreadPool(Machine.usable_cores()) as pool:
        places = pool.map(place_of, images.paths)
    in_val, by_label = {place: place < fraction for place in places}, defaultdict(set)
    for place, label in zip(places, images.targets):
        by_label[label].add(place)
    shared = Counter(place for found in by_label.values() for place in found)
    for found in by_label.values():
        own = [place for place in found if shared[place] == 1] or found  # of no other class
        if not any(in_val[place] for place in found):
            in_val[min(own)] = True
        elif all(in_val[place] for place in found):
            in_val[max(own)] = False
    whole = [images.classes[label] for label, found in by_label.items()
             if len({in_val[place] for place in found}) < 2]
    if whole:
        raise UserError(f"cannot split off val images in {images.root}: fewer than two different "
                        f"images of {shorten(whole)} that no other class has")
    parts = copy.copy(images), copy.copy(images)
    for part, side in zip(parts, (False, True)):
        part.keep([in_val[place] == side for place in places])
    return parts


def read_names(data: str | Path, classes: list[str]) -> list[str]:
    """Human-readable class names, from classes.txt in the data folder or from torchvision.

    A line of the file has a class folder, a comma, and the name. torchvision knows Imagenette's.

    Raises:
        UserError: the file cannot be read, or has other lines.
    """
    known = getattr(datasets.Imagenette, "_WNID_TO_CLASS", {})
    names = {folder: words[0] for folder, words in known.items()}
    given, file = {}, Path(data, "classes.txt")
    if Path(data).name.lower() == "train" and not file.is_file():
        file = Path(data).parent / "classes.txt"  # as train/ is the data where there is no val/
    if file.is_file():
        try:
            for line in filter(str.strip, file.read_text(encoding="utf-8-sig").splitlines()):
                folder, name = map(str.strip, line.split(",", 1))
                given[unicodedata.normalize("NFC", folder)] = name
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be used: expected lines of a class folder, a comma and "
                            f"a name ({error})") from None
    if unknown := given.keys() - classes:
        print(f"note: {file} names {shorten(sorted(unknown))}, which are no class folders")
    names |= given
    return [names.get(name, name) for name in classes]


def labelled(classes: list[str], names: list[str]) -> list[str]:
    """Names of classes with their folders, where these differ: "tench (n01440764)"."""
    return [folder if folder == name else f"{name} ({folder})"
            for folder, name in zip(classes, names)]


# The machine

class Machine:
    """A device, the precision it computes in, and how batches get to it.

    Args:
        device: a name of torch's, such as "cuda:1", or "auto": CUDA, else MPS, else the CPU.
        precision: "fp32", "bf16", "fp16", or "auto": bf16 where the device has instructions for
            it, fp16 on older CUDA, else fp32.
        workers: processes that load images. Default: one a usable core

    Raises:
        UserError: the device is not available.
    """

    def __init__(self, device: str, precision: str, workers: int | None = None) -> None:
        if device == "auto":
            device = ("cuda" if torch.cuda.is_available() else
                      "mps" if torch.backends.mps.is_available() else "cpu")
        try:
            tensor = torch.zeros(1, device=device)
            tensor.item()  # "meta" has none
            self.device = tensor.device
        except (RuntimeError, AssertionError, ValueError):
            raise UserError(f"device {device!r} is not available here; --device auto takes what "
                            "is") from None
        self.on_cuda = self.device.type == "cuda"
        self.precision = self.best_precision() if precision == "auto" else precision
        self.workers = self.usable_cores() if workers is None else workers
        self.statistics = [torch.tensor(values, device=self.device)
                           for values in (IMAGENET_MEAN, IMAGENET_STD)]
        if self.on_cuda:
            torch.cuda.set_device(self.device)  # streams, and so graphs, are the current device's
            torch.set_float32_matmul_precision("high")  # TF32, which convolutions use by default
            torch.backends.cudnn.benchmark = True
        elif self.device.type == "cpu":
            keep_freed_memory()

    @staticmethod
    def usable_cores() -> int:
        """CPU cores available to this process, or its share of them under torchrun."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def best_precision(self) -> str:
        if self.on_cuda:
            return "bf16" if torch.cuda.get_device_capability(self.device) >= (8, 0) else "fp16"
        has_bf16 = self.device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                                  or torch.cpu._is_amx_tile_supported())
        return "bf16" if has_bf16 else "fp32"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, DTYPES[self.precision],
                              enabled=self.precision != "fp32")

    def loader(self, dataset: Dataset, **batching) -> DataLoader:
        # Forked, as a fork server (Python 3.14's default) would not outlive a signal to all. The
        # loader's own generator keeps it from drawing on the global random state.
        context = "fork" if self.workers and sys.platform == "linux" else None
        return DataLoader(dataset, num_workers=self.workers, persistent_workers=self.workers > 0,
                          multiprocessing_context=context, pin_memory=self.on_cuda,
                          generator=torch.Generator(), worker_init_fn=leave_signals_to_main,
                          **batching)

    def move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=self.on_cuda)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (N, H, W, 3) of a loader as (N, 3, H, W) here, normalised, in channels_last."""
        return normalize(self.move(images).permute(0, 3, 1, 2), *self.statistics)

    @torch.inference_mode()
    def outputs(self, model: nn.Module, loader: DataLoader,
                what: str = "images") -> Iterator[tuple[Tensor, object]]:
        """Yield fp32 outputs of a network in eval mode, and the rest of each batch; show `what`."""
        model.eval().to(self.device, memory_format=torch.channels_last)
        progress = Progress(what, len(loader.dataset))
        try:
            for images, others in loader:
                with self.autocast():
                    outputs = model(self.prepare(images))
                # A worker's tensor, if kept, would keep a file open.
                yield outputs.float(), others.clone() if isinstance(others, Tensor) else others
                progress.advance(len(images))
        finally:
            progress.rewrite()


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory for large tensors, instead of mapping new pages for them.

    The kernel fills those with zeros: about a quarter of a training step at 224 px in bf16.
    """
    with contextlib.suppress(TypeError, AttributeError):  # no glibc, as on Windows and macOS
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: never map
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back


def leave_signals_to_main(worker: int) -> None:
    """Have a loader's worker ignore signals to all processes: the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # ends it in 30 s


def kill_workers() -> None:
    """Kill loaders' workers that are left at exit, instead of waiting until they end."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for worker in multiprocessing.active_children():
        worker.kill()


# Predictions and their figures

class Predictions(NamedTuple):
    """Predictions for N images, on the CPU."""
    labels: Tensor  # (N) int64
    losses: Tensor  # (N) float32, cross-entropy in nats
    top: Tensor  # (N, min(5, K)) int64, the best classes, best first
    probabilities: Tensor  # (N, min(5, K)) float32, of these
    seconds: float  # for all images; `predict` extrapolates from those after the first batch

    @property
    def confidences(self) -> Tensor:
        return self.probabilities[:, 0]  # (N)

    @property
    def correct(self) -> Tensor:
        return self.top[:, 0] == self.labels  # (N) bool

    @staticmethod
    def columns(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The columns above for logits (N, K) and labels (N), on the device of the logits."""
        labels = labels.to(logits.device, non_blocking=logits.is_cuda)
        losses = F.cross_entropy(logits, labels, reduction="none")
        probabilities, top = best_classes(logits)
        return labels, losses, top, probabilities

    def summarize(self, classes: list[str]) -> dict:
        """Compute the figures that `--json` writes; all but counts and the loss are fractions.

        A class that is never predicted has a precision of 0; one that is in neither labels nor
        predictions is left out.
        """
        labels, correct, count = self.labels, self.correct, len(self.labels)
        counts, guesses, rights = (torch.bincount(values, minlength=len(classes)).tolist()
                                   for values in (labels, self.top[:, 0], labels[correct]))
        per_class = {
            name: {"count": counts[k], "correct": rights[k],
                   "precision": rights[k] / max(1, guesses[k]),
                   "recall": rights[k] / max(1, counts[k]),
                   "f1": 2 * rights[k] / (counts[k] + guesses[k])}
            for k, name in enumerate(classes) if counts[k] + guesses[k]}
        in_top5 = (self.top == labels[:, None]).any(dim=1)
        mistakes = Counter(zip(labels[~correct].tolist(), self.top[~correct, 0].tolist()))
        return {"top1": sum(rights) / count,
                "top1_interval": wilson_interval(sum(rights), count),
                "top5": in_top5.sum().item() / count if len(classes) > 5 else None,
                "loss": self.losses.double().mean().item(),
                "count": count,
                "macro_f1": statistics.mean(row["f1"] for row in per_class.values()),
                "balanced_accuracy": statistics.mean(
                    row["recall"] for row in per_class.values() if row["count"]),
                "per_class": per_class,
                "most_confused": [{"label": classes[label], "prediction": classes[prediction],
                                   "count": times}
                                  for (label, prediction), times in mistakes.most_common(5)],
                "images_per_second": count / self.seconds}


def best_classes(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and positions of up to five classes, best first: (N, min(5, K)) each."""
    return logits.softmax(dim=1).topk(min(5, logits.shape[1]))


def wilson_interval(rights: int, count: int) -> list[float]:
    """Wilson's 95 % score interval of a proportion."""
    z = 1.959964  # the 0.975 quantile of the normal distribution
    centre = rights + z ** 2 / 2
    spread = z * math.sqrt(rights * (count - rights) / count + z ** 2 / 4)
    return [(centre - spread) / (count + z ** 2), (centre + spread) / (count + z ** 2)]


# Checkpoints and files

def read_checkpoint(path: str | Path) -> dict:
    """Read a best.pt or last.pt of train.py. Nothing in the file is ever executed."""
    try:
        checkpoint = load_tensors(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    kinds = {"model": dict, "arch": str, "classes": list, "size": int, "mean": list, "std": list,
             "epoch": int, "val_acc": float, "data": str, "args": dict, "exits": dict,
             "names": list}
    checkpoint = {"exits": {}, "names": checkpoint.get("classes")} | checkpoint
    wrong = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if not wrong:
        classes, args = checkpoint["classes"], checkpoint["args"]
        batch_size, val_split = args.get("batch_size"), args.get("val_split")
        sound = {"classes": all(isinstance(name, str) for name in classes)
                            and 0 < len(set(classes)) == len(classes),
                 "size": SIZES[0] <= checkpoint["size"] <= SIZES[1],
                 "names": len(checkpoint["names"]) == len(classes)
                          and all(isinstance(name, str) for name in checkpoint["names"]),
                 "start_acc": isinstance(start_acc := checkpoint.get("start_acc", 0.0), float)
                              and 0 <= start_acc <= 1,
                 "args": args.get("precision") in list(DTYPES)
                         and isinstance(batch_size, int) and batch_size > 0
                         and (val_split is None or isinstance(val_split, float))
                         and isinstance(args.get("skip_unreadable", False), bool)}
        wrong = [key for key, is_sound in sound.items() if not is_sound]
    if wrong:
        raise UserError(f"{path} is not a checkpoint of train.py: no usable {shorten(wrong)} in it")
    return checkpoint


def write_file(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all, under another name first; make its folder if needed."""
    target = Path(os.path.realpath(path))  # a link stays one
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"cannot write {path}: it is not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:  # x: rather fail than follow a link
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    finally:
        with contextlib.suppress(OSError):  # the first error says what is wrong
            temporary.unlink(missing_ok=True)


# The report

STYLE = """
:root { color-scheme: light dark; --ink: #222; --rule: #ddd;
        --c0: #2563b0; --c1: #c2500c; --c2: #2e7d32; --c3: #8e3fa8 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ddd; --rule: #444; --c0: #7cb2f5; --c1: #f5a066; --c2: #81c784; --c3: #d59be8 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 64rem; margin: auto;
       padding: 0 1rem 2rem; overflow-wrap: break-word }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
section { display: flex; flex-wrap: wrap; gap: 1rem } section > * { max-width: 100% }
.tile { border: 1px solid var(--rule); border-radius: 6px; padding: .4rem .8rem }
.tile b { display: block; font-size: 1.2rem } small { display: block; opacity: .75 }
figure { margin: 0; flex: 1 1 17rem; max-width: 30rem } figcaption span { margin-right: .6em }
figure.image { flex: 0 0 6.5rem; font-size: .8rem; line-height: 1.3; overflow-wrap: anywhere }
img { width: 100%; border-radius: 4px }
svg { display: block; width: 100%; fill: var(--ink); font-size: 11px }
line { stroke: var(--rule) } .best { stroke: var(--ink); stroke-dasharray: 3 3 }
polyline { fill: none; stroke-width: 2 }
.table { overflow-x: auto } table { border-spacing: 1px; font-size: .8rem; line-height: 1.4 }
th { font-weight: normal; min-width: 5rem; max-width: 12rem } tbody th { text-align: right }
.bars td { padding: 0 .3rem; text-align: right; white-space: nowrap }
.bar { width: clamp(3rem, 15vw, 9rem) } i { display: block; height: .8em; background: var(--c0) }
.heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); min-width: 0;
                 max-height: 12rem; text-align: left }
.heat td { min-width: 1.7em; text-align: center; --color: var(--c1);
           background: color-mix(in srgb, var(--color) var(--share), transparent) }
"""
SHOWN = 30  # classes in a table of the page, at most
# The settings in a checkpoint's args that the page shows.
SETTINGS = ("data", "recipe", "weights", "size", "epochs", "batch_size", "lr", "alpha", "hint",
            "labels", "soft", "distillation", "seed", "precision", "val_split")


def report_html(title: str, checkpoint: dict, predictions: Predictions, dataset: ImageFolder,
                log: list[dict], exits: dict[str, dict] | None = None,
                augmented: Iterable[tuple[Tensor, int]] = (), refresh: bool = False) -> bytes:
    """Make a self-contained HTML page: figures, how training went, and mistakes, in pictures.

    Args:
        title: what was evaluated.
        checkpoint: as `read_checkpoint` returns it; for the classes, their names and the settings.
        predictions: for the images of `dataset`, in its order.
        dataset: the images predicted.
        log: lines of log.jsonl; may be empty.
        exits: `summarize`'s figures of early exits, by layer. Default: none
        augmented: train images (H, W, 3) in uint8 and their labels, to be shown. Default: none
        refresh: have the browser load the page again every 10 seconds. Default: False
    """
    classes = labelled(checkpoint["classes"], checkpoint["names"])
    correct = predictions.correct
    summary = predictions.summarize(classes)
    order = predictions.confidences.argsort(descending=True)
    wrong, least = order[~correct[order]][:20].tolist(), order[correct[order]].flip(0)[:10].tolist()
    settings = [f"{name.replace('_', '-')} {value}" for name in SETTINGS
                if (value := checkpoint["args"].get(name)) is not None]

    def thumbnails(indices: list[int]) -> str:
        return "".join(thumbnail(
            dataset[index][0], f"{os.path.basename(dataset.paths[index])}: label "
            f"{classes[predictions.labels[index]]}, predicted "
            f"{classes[predictions.top[index, 0]]} "
            f"({predictions.confidences[index]:.2f})") for index in indices)

    sections = [("How good it is", tiles(summary, exits or {})),
                ("Training", training_charts(log, checkpoint.get("start_acc")) if log else ""),
                ("By class, the lowest recall first", class_bars(summary)),
                ("Labels (rows) and predictions (columns)",
                 heat_map(confusion_matrix(predictions, len(classes)), classes)),
                ("The most confident mistakes", thumbnails(wrong)),
                ("The least certain right answers", thumbnails(least)),
                ("Augmented train images",
                 "".join(thumbnail(image, classes[label]) for image, label in augmented))]
    body = "".join(f"<h2>{heading}</h2><section>{content}</section>\n"
                   for heading, content in sections if content)
    reload = '<meta http-equiv="refresh" content="10">' if refresh else ""
    page = (f'<!doctype html><html lang="en"><meta charset="utf-8">{reload}<meta name="viewport" '
            f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f"<style>{STYLE}</style>\n<h1>{escape(title)}</h1>\n"
            f"<div>of {len(dataset)} images in {escape(dataset.root)}; trained with: "
            f"{escape(', '.join(settings))}</div>\n{body}</html>\n")
    return page.encode(errors="backslashreplace")


def confusion_matrix(predictions: Predictions, classes: int) -> Tensor:
    """Count images by label (rows) and prediction (columns): (classes, classes)."""
    cells = predictions.labels * classes + predictions.top[:, 0]
    return torch.bincount(cells, minlength=classes ** 2).view(classes, classes)


def part_of(rights: float, count: int) -> str:
    return f"{rights:.0f} of {count} ({100 * rights / count:.1f} %)"


def tiles(summary: dict, exits: dict[str, dict]) -> str:
    """The figures of all classes together, those of the early exits beside them."""
    count = summary["count"]
    low, high = (f"{100 * end:.1f}" for end in summary["top1_interval"])
    figures = [(part_of(summary["top1"] * count, count), "right (top-1)",
                f"95 % interval {low} to {high} %"),
               (f"{summary['macro_f1']:.3f}", "macro F1", "mean over the classes"),
               (f"{summary['balanced_accuracy']:.3f}", "balanced accuracy", "mean recall"),
               (f"{summary['loss']:.3f}", "loss", "cross-entropy"),
               (f"{summary['images_per_second']:.1f} images/s", "speed", "loading included")]
    if summary["top5"] is not None:
        figures.insert(1, (part_of(summary["top5"] * count, count), "among the best five", "top-5"))
    figures += [(part_of(figure["top1"] * count, count), f"exit {layer}",
                 f"{figure['images_per_second']:.1f} images/s") for layer, figure in exits.items()]
    return "".join(f'<div class="tile"><b>{figure}</b>{escape(name)}<small>{note}</small></div>'
                   for figure, name, note in figures)


def thumbnail(image: Tensor, caption: str) -> str:
    """An image (H, W, 3) in uint8, small, with its caption."""
    picture, buffer = to_pil_image(image.permute(2, 0, 1)), io.BytesIO()
    picture.thumbnail((160, 160))
    picture.save(buffer, "JPEG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure class="image"><img src="data:image/jpeg;base64,{data}" alt="">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")


def training_charts(log: list[dict], start_acc: float | None) -> str:
    """Charts of losses, accuracies (`start_acc` in epoch 0) and learning rate by epoch."""
    def lines(**keys: str) -> dict[str, list[tuple[int, float]]]:
        return {name: [(line["epoch"], line[key]) for line in log] for name, key in keys.items()
                if all(line[key] is not None for line in log)}

    losses = lines(**{"train": "train_loss", "cross entropy": "ce_loss",
                      "distillation": "distillation_loss", "val": "val_loss"})
    accuracies = lines(train="train_acc", val="val_acc") | {
        f"{layer} (train)": [(line["epoch"], line["exit_train_acc"][layer]) for line in log]
        for layer in log[0]["exit_train_acc"]}
    if start_acc is not None:
        accuracies["val"].insert(0, (0, start_acc))
    best, _ = max(accuracies["val"], key=lambda point: point[1])  # the earlier of equal ones
    fitted = "" if start_acc is None else " (0: only the classifiers fitted)"
    *trained, val = (max(y for _, y in line) for line in losses.values())
    # A val loss far above the others, as in an early epoch, is cut off.
    highest = max(*trained, min(val, 2 * max(trained)))
    return (line_chart("loss by epoch", losses, best, high=highest)
            + line_chart(f"accuracy by epoch{fitted}", accuracies, best, high=1,
                         low=min(0.9, *(y for line in accuracies.values() for _, y in line)))
            + line_chart("learning rate by epoch", lines(rate="lr"), best))


def ticks(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, in at most five steps from `low` to `high`."""
    tenth = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(step for step in (tenth, 2 * tenth, 5 * tenth, 10 * tenth)
                if high - low <= 5 * step)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [k * step for k in range(first, last + 1)]


def line_chart(title: str, lines: dict[str, list[tuple[int, float]]], best: int, low: float = 0,
               high: float | None = None) -> str:
    """Lines through points (epoch, y), by name.

    Args:
        best: the epoch to be marked.
        low, high: range that the vertical axis covers at least; points above the axis are drawn as
            arrows. Default: 0 and the largest y
    """
    points = [point for line in lines.values() for point in line]
    left, right = min(best, *(x for x, _ in points)), max(x for x, _ in points)
    heights = ticks(low, high or max(y for _, y in points) or 1)
    low, high = heights[0], heights[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (round(50 + 250 * (x - left) / max(1, right - left), 1),
                round(165 - 145 * (min(y, high) - low) / (high - low), 1))

    drawn = []
    for value in heights:
        _, y = place(left, value)
        drawn.append(f'<line x1="50" x2="300" y1="{y}" y2="{y}"/>'
                     f'<text x="44" y="{y + 4}" text-anchor="end">{value:g}</text>')
    drawn += [f'<text x="{place(x, low)[0]}" y="182" text-anchor="middle">{x}</text>'
              for x in range(left, right + 1, math.ceil((right - left + 1) / 10))]
    x, _ = place(best, low)
    drawn.append(f'<line class="best" x1="{x}" x2="{x}" y1="14" y2="165"/>'
                 f'<text x="{x}" y="10" text-anchor="middle">best</text>')
    legend = ""
    for k, (name, line) in enumerate(lines.items()):
        name, colour = escape(name), f"var(--c{k % 4})"
        legend += f'<span style="color: {colour}">{name}</span>'
        path = " ".join("{},{}".format(*place(*point)) for point in line)
        drawn.append(f'<polyline points="{path}" stroke="{colour}"/>')
        for epoch, y in line:
            x, height = place(epoch, y)
            note = f"<title>{name}: {y:.4g} in epoch {epoch}</title>"
            drawn.append(f'<text x="{x}" y="{height}" text-anchor="middle" fill="{colour}">▲{note}'
                         "</text>" if y > high else
                         f'<circle cx="{x}" cy="{height}" r="2.5" fill="{colour}">{note}</circle>')
    return (f'<figure><svg viewBox="0 0 320 190">{"".join(drawn)}</svg>'
            f"<figcaption>{title}: {legend}</figcaption></figure>")


def class_bars(summary: dict) -> str:
    """A table of the figures by class, of those with the lowest recall if there are many."""
    rows = sorted((row["recall"], escape(name), row) for name, row in summary["per_class"].items()
                  if row["count"])
    some = f" ({SHOWN} of {len(rows)})" if len(rows) > SHOWN else ""
    return (f'<div class="table"><table class="bars"><thead><tr><th>class{some}<th><th>right '
            "(recall)<th>precision<th>F1<tbody>" + "".join(
                f'<tr><th>{name}<td class="bar"><i style="width: {recall:.0%}"></i><td>'
                f'{part_of(row["correct"], row["count"])}<td>{row["precision"]:.3f}<td>'
                f'{row["f1"]:.3f}' for recall, name, row in rows[:SHOWN]) + "</table></div>")


def heat_map(matrix: Tensor, classes: list[str]) -> str:
    """A table of a confusion matrix, of the classes with the most mistakes if there are many."""
    mistakes = matrix.sum(dim=0) + matrix.sum(dim=1) - 2 * matrix.diagonal()
    chosen = mistakes.argsort(descending=True, stable=True)[:SHOWN].sort().values
    names = [escape(classes[k]) for k in chosen]
    totals = matrix[chosen].sum(dim=1).clamp(min=1).tolist()
    rows = []
    for name, counts, total in zip(names, matrix[chosen][:, chosen].tolist(), totals):
        cells = [f'<td style="--share: {70 * (count / total) ** 0.5:.0f}%'
                 f'{"; --color: var(--c0)" if name == other else ""}" title="{count} of {total}: '
                 f'{name} taken for {other}">{count or ""}' for other, count in zip(names, counts)]
        rows.append(f'<tr><th>{name}{"".join(cells)}')
    head = "".join(f"<th>{name}" for name in names)
    some = f"{SHOWN} of {len(classes)}" if len(classes) > SHOWN else ""
    return (f'<div class="table"><table class="heat"><thead><tr><td>{some}'
            f"{head}<tbody>{''.join(rows)}</table></div>")


# Second half: the script

wrap("channels_first"), wrap("pooled")  # one node of a trace each


class EarlyExit(nn.Module):
    """A network up to one of its layers, and a linear classifier of the mean over the image.

    Shape: images (N, 3, H, W) -> logits (N, K)
    """

    def __init__(self, model: nn.Module, layer: str, classifier: nn.Linear) -> None:
        super().__init__()
        self.extractor = create_feature_extractor(model, {layer: "features"})
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(pooled(channels_first(self.extractor(images)["features"])))


def build_exits(model: nn.Module, exits: dict[str, dict[str, Tensor]]) -> dict[str, nn.Module]:
    """Build the early-exit networks of a checkpoint, keyed by layer.

    Args:
        model: the whole network.
        exits: weight (K, C) and bias (K) of a linear classifier, by layer.

    Raises:
        ValueError: these are no classifiers of layers that the network can end at.
    """
    networks = {}
    try:
        for layer, state in exits.items():
            classifier = nn.Linear(*state["weight"].T.shape)
            classifier.load_state_dict(state)
            # Traced, as a copy of what create_feature_extractor returns falls back to train mode.
            networks[layer] = symbolic_trace(EarlyExit(model, layer, classifier).eval())
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(f"no early exit can be built: {textwrap.shorten(str(error), 200)}"
                         ) from None
    return networks


EXPORTS = (".pt2", ".onnx", ".pth")


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description="How good a trained classifier is, and where "
                    "it is wrong; or the classes of other images; or the network, exported.")
    parser.add_argument("checkpoint", help="a best.pt or last.pt that train.py wrote")
    parser.add_argument("--data", metavar="DIR", help="folder with val/ in it, or of classes alone "
                        "(default: the val images of training)")
    parser.add_argument("--exit", metavar="LAYER", help="the early exit at this layer in place of "
                        "the whole network (default: the network, and a line for each exit)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--report", metavar="DIR", help="also write report.html there: figures, "
                         "charts, how training went, and the images that it gets wrong")
    instead.add_argument("--predict", nargs="+", metavar="PATH", help="instead, print the best "
                         "classes of these images, or of those in these folders")
    instead.add_argument("--export", metavar="FILE", type=Path, help="instead, write the network: "
                         "FILE.pt2 (torch.export), FILE.onnx, or FILE.pth (torchvision state dict)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE; -: to "
                        "standard output, and all else to standard error")
    parser.add_argument("--save-predictions", metavar="FILE", help="write a table (CSV) of path, "
                        "label, prediction and confidence of each image")
    parser.add_argument("--batch-size", type=Parser.number(int, 1), metavar="N",
                        help="images at a time (default: as in training)")
    parser.add_argument("--skip-unreadable", action="store_true", help="leave out images that "
                        "cannot be read, as training did if it had this flag")
    parser.add_machine_arguments()
    args = parser.parse_args(arguments)
    if args.export:
        if args.export.suffix not in EXPORTS:
            parser.error(f"--export {args.export} must end in one of {', '.join(EXPORTS)}")
        if args.export.suffix == ".pth" and args.exit:
            parser.error("--export: a .pth is a torchvision network, which an exit is not: use "
                         ".pt2 or .onnx")
    for name, useless in (("export", ("json", "save_predictions", "batch_size", "precision",
                                      "device", "workers")),
                          ("predict", ("data", "skip_unreadable"))):
        given = [f"--{flag.replace('_', '-')}" for flag in useless
                 if (value := getattr(args, flag)) is not None and value is not False]
        if getattr(args, name) and given:
            parser.error(f"--{name} takes no {' or '.join(given)}")
    return args


def open_val(args: argparse.Namespace, checkpoint: dict) -> ImageFolder:
    """The val images to evaluate on."""
    data = args.data or checkpoint["data"]
    splits, fraction = find_splits(data), checkpoint["args"].get("val_split")
    *_, folder = splits.values()  # val/, if there is one
    if "val" in splits:
        fraction = None
    elif "train" in splits and not fraction:
        raise UserError(f"data folder {data} has train/ but no val/: give another --data")
    elif fraction and os.path.realpath(folder) != os.path.realpath(checkpoint["data"]):
        fraction = None
        print(f"note: all images of {data} are evaluated, as training had {checkpoint['data']}; "
              "those of them that it learned from flatter the figures")
    dataset = ImageFolder(folder, val_transform(checkpoint["size"], normalized=False),
                          checkpoint["classes"])
    dataset.tell()
    if args.skip_unreadable or checkpoint["args"].get("skip_unreadable"):
        dataset.leave_out(dataset.find_unreadable())
    return split_off(dataset, fraction)[1] if fraction else dataset


def open_machine(args: argparse.Namespace, checkpoint: dict) -> Machine:
    """The machine asked for, in the precision of training where that is fast here."""
    machine = Machine(args.device or "auto", args.precision or "auto", args.workers)
    trained_in = checkpoint["args"]["precision"]
    if not args.precision and (trained_in == "fp32" or trained_in == "fp16" and machine.on_cuda):
        machine.precision = trained_in
    return machine


def evaluate(args: argparse.Namespace, checkpoint: dict, model: nn.Module,
             exits: dict[str, nn.Module]) -> dict:
    """Print how good a network and its early exits are on the val images; return the figures."""
    classes, dataset = checkpoint["classes"], open_val(args, checkpoint)
    machine = open_machine(args, checkpoint)
    loader = machine.loader(dataset,
                            batch_size=args.batch_size or checkpoint["args"]["batch_size"])
    title = (f"{args.checkpoint}: {checkpoint['arch']}, {len(classes)} classes, epoch "
             f"{checkpoint['epoch']}, {checkpoint['size']} px, {machine.precision} on "
             f"{machine.device}")
    print(title, f"{dataset.root}: {len(dataset)} images", sep="\n")
    predictions = predict(model, loader, machine)
    summary = predictions.summarize(classes)
    print_summary(predictions.summarize(labelled(classes, checkpoint["names"])))
    for layer, network in exits.items():
        figures = predict(network, loader, machine).summarize(classes)
        summary.setdefault("exits", {})[layer] = figures
        print(f"exit {layer}: top-1 {figures['top1']:.4f}  "
              f"{figures['images_per_second']:.1f} images/s")
    if args.save_predictions:
        names = [[classes[position] for position in column.tolist()]
                 for column in (predictions.labels, predictions.top[:, 0])]
        write_csv(args.save_predictions,
                  zip(dataset.paths, *names, predictions.confidences.tolist()))
    if args.report:
        write_file(Path(args.report, "report.html"),
                   report_html(title, checkpoint, predictions, dataset,
                               read_log(Path(args.checkpoint)), summary.get("exits")))
    matrix = confusion_matrix(predictions, len(classes)).tolist()
    return summary | {"classes": classes, "confusion_matrix": matrix}


def predict(model: nn.Module, loader: DataLoader, machine: Machine) -> Predictions:
    """Predict the images of a loader."""
    count = timed = len(loader.dataset)
    parts, start = [], time.perf_counter()
    for logits, labels in machine.outputs(fuse(model), loader):
        parts.append(Predictions.columns(logits, labels))
        if len(parts) == 1 < len(loader):  # the workers have started, and the network is set up
            start, timed = time.perf_counter(), count - len(labels)
    columns = [torch.cat(column).cpu() for column in zip(*parts)]
    return Predictions(*columns, (time.perf_counter() - start) * count / timed)


def print_summary(summary: dict) -> None:
    width = max(len("class"), *map(len, summary["per_class"]))
    print(f"{'class':{width}}  precision  recall      F1  correct  count")
    for name, row in summary["per_class"].items():
        print(f"{name:{width}}  {row['precision']:9.4f}  {row['recall']:6.4f}  {row['f1']:.4f}  "
              f"{row['correct']:7d}  {row['count']:5d}")
    low, high = summary["top1_interval"]
    top5 = "" if summary["top5"] is None else f"  top-5 {summary['top5']:.4f}"
    print(f"top-1 {summary['top1']:.4f} (95 % interval {low:.4f} to {high:.4f}){top5}  "
          f"loss {summary['loss']:.4f}  {summary['count']} images  "
          f"{summary['images_per_second']:.1f} images/s")
    print(f"macro F1 {summary['macro_f1']:.4f}  balanced accuracy (the classes' mean recall) "
          f"{summary['balanced_accuracy']:.4f}")
    if summary["most_confused"]:
        print("most confused:", "; ".join("{label} taken for {prediction} {count}".format(**pair)
                                          for pair in summary["most_confused"]))


def read_log(checkpoint: Path) -> list[dict]:
    """The lines of the log.jsonl beside a best.pt, or of log.1.jsonl beside best.1.pt; or none."""
    path = checkpoint.with_name(re.sub("^(best|last)", "log", f"{checkpoint.stem}.jsonl"))
    try:
        log = [json.loads(line) for line in path.read_text().splitlines()]
        for line in log:
            exits = [line["exit_train_acc"][layer] for layer in log[0]["exit_train_acc"]]
            sides = [line[key] for key in ("ce_loss", "distillation_loss") if line[key] is not None]
            rest = [line[key] for key in ("train_loss", "train_acc", "val_loss", "val_acc", "lr")]
            if not (isinstance(line["epoch"], int) and all(
                    math.isfinite(value) and value >= 0 for value in exits + sides + rest)):
                return []
        return log
    except (OSError, ValueError, TypeError, LookupError, OverflowError):
        return []


class Pictures(Dataset):
    """Images at `size` pixels, each with "", or black ones with why the file cannot be read."""

    def __init__(self, paths: list[str], size: int) -> None:
        self.paths, self.transform = paths, val_transform(size, normalized=False)
        self.black = torch.zeros(size, size, 3, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.transform(load_image(self.paths[index])).permute(1, 2, 0), ""
        except UnreadableImage as error:
            return self.black, str(error)


def find_named(paths: list[str]) -> list[str]:
    """The files named, and the images in the folders named, each once."""
    found = {}  # by real path
    for path in paths:
        inside = [path]
        if os.path.isdir(path):
            left_out = Counter()
            inside = find_images(path, left_out, set())
            tell_left_out(path, left_out)
            if not inside:
                raise UserError(f"the folder {path} has no images in it")
        for name in inside:
            found.setdefault(os.path.realpath(name), name)
    return list(found.values())


def predict_paths(args: argparse.Namespace, checkpoint: dict, model: nn.Module) -> list[dict]:
    """Print and return the best classes of each image that --predict names, or its error."""
    pictures = Pictures(find_named(args.predict), checkpoint["size"])
    machine = open_machine(args, checkpoint)
    loader = machine.loader(pictures,
                            batch_size=args.batch_size or checkpoint["args"]["batch_size"])
    results = []
    for logits, errors in machine.outputs(fuse(model), loader):
        Progress.rewrite()  # clear it, as lines follow
        for error, *row in zip(errors, *(column.tolist() for column in best_classes(logits))):
            path = pictures.paths[len(results)]
            guesses = [{"class": checkpoint["classes"][position], "probability": probability}
                       for probability, position in zip(*row)]
            results.append({"path": path} | ({"error": error} if error else {"classes": guesses}))
            print(error or f"{path}: " + ", ".join("{class} {probability:.4f}".format(**guess)
                                                   for guess in guesses))
    if args.save_predictions:
        unread = [{"class": "", "probability": ""}]
        write_csv(args.save_predictions, [
            (result["path"], "", *result.get("classes", unread)[0].values()) for result in results])
    return results


def write_csv(path: str, rows: Iterable[tuple]) -> None:
    def harmless(cell: object) -> object:  # what a spreadsheet would run as a formula; -1 is none
        runs = isinstance(cell, str) and re.match(r"[=@\t\r]|[+-](?![\d.]+$)", cell)
        return f"'{cell}" if runs else cell

    text = io.StringIO(newline="")
    csv.writer(text).writerows([("path", "label", "prediction", "confidence"),
                                *(map(harmless, row) for row in rows)])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def export(args: argparse.Namespace, checkpoint: dict, model: nn.Module) -> None:
    """Export a network, once the file's outputs for eight val images match its own."""
    path, size, dataset = args.export, checkpoint["size"], open_val(args, checkpoint)
    chosen = torch.linspace(0, len(dataset) - 1, 8).long().tolist()
    images = Machine("cpu", "fp32").prepare(torch.stack([dataset[index][0] for index in chosen]))
    metadata = {key: json.dumps(checkpoint[key])
                for key in ("arch", "classes", "size", "mean", "std")}
    dynamic = ({0: torch.export.Dim("batch")},)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"network{path.suffix}")
        if path.suffix == ".pth":
            torch.save(model.state_dict(), file)
            found = load_classifier(checkpoint | {"model": load_tensors(file)})[0](images)
        elif path.suffix == ".pt2":
            program = torch.export.export(model, (images[:2],), dynamic_shapes=dynamic)
            torch.export.save(program, file, extra_files=metadata)
            found = torch.export.load(file).module()(images)
        else:
            found = export_onnx(model, images, dynamic, metadata, file)
        expected = model(images)
        difference = ((found - expected).abs().max() / expected.abs().max()).item()
        if not difference <= 1e-4:
            raise UserError(f"{path} is not written: its outputs would differ from the network's "
                            f"by up to {difference:.2g} of the largest")
        write_file(path, file.read_bytes())
    print(f"{path}: {checkpoint['arch']}, {len(checkpoint['classes'])} classes; takes normalised "
          f"images (N, 3, {size}, {size}); its outputs for {len(images)} val images differ from "
          f"the network's by at most {difference:.1g} of the largest")


def export_onnx(model: nn.Module, images: Tensor, dynamic: tuple, metadata: dict[str, str],
                file: Path) -> Tensor:
    """Write a network as ONNX; return the outputs of ONNX's reference evaluator on the images."""
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
    if len(os.listdir(file.parent)) > 1:  # torch puts weights of above 1.5 GiB into another file
        raise UserError("the network is too large for one .onnx: export a .pt2")
    logits, = onnx.reference.ReferenceEvaluator(str(file)).run(None, {"images": images.numpy()})
    return torch.from_numpy(logits)


def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr if args.json == "-" else sys.stdout):
        figures = run(args)
    if args.json == "-":
        print(json.dumps(figures, indent=2))
    elif args.json:
        write_file(args.json, json.dumps(figures, indent=2).encode())
    if args.predict and any("error" in result for result in figures):
        sys.exit(1)


def run(args: argparse.Namespace) -> dict | list[dict] | None:
    """Evaluate, predict or export, as the flags say; return the figures for --json."""
    checkpoint = read_checkpoint(args.checkpoint)
    try:
        model, _, _ = load_classifier(checkpoint)
        exits = build_exits(model, checkpoint["exits"])
    except ValueError as error:
        raise UserError(f"{args.checkpoint}: {error}") from None
    if args.exit:
        if args.exit not in exits:
            raise UserError(f"{args.checkpoint} has no exit {args.exit}; it has "
                            f"{shorten(exits) or 'none'}")
        model, exits = exits[args.exit], {}
        checkpoint["arch"] += f" up to {args.exit}"
    if args.export:
        return export(args, checkpoint, model)
    if args.predict:
        return predict_paths(args, checkpoint, model)
    return evaluate(args, checkpoint, model, exits)


if __name__ == "__main__":
    run_script(main)
