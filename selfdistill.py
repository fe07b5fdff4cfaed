"""Self-distillation in one file: a network's early layers learn from its own deep ones.

There is no second network: hooks take early and deep features (the student's and the teacher's)
out of the one that is trained, for ResNet18 those of layer2 and layer4, and a loss beside the
cross-entropy makes the early layers learn from the deep features (Romero et al., FitNets,
arXiv:1412.6550, within one network), from the labels (Lee et al., Deeply-Supervised Nets,
arXiv:1409.5185) or from the network's own output (Zhang et al., Be Your Own Teacher,
arXiv:1905.08094). Copy this file into a project of your own; it needs only torch and torchvision:

    model = hooked_resnet18(num_classes=10)
    criterion = SelfDistillationLoss()
    logits, student, teacher = model(images)
    loss = criterion(logits, labels, student, teacher)

Give the parameters of both, `model` and `criterion`, to the optimiser.
"""
import copy
import difflib
import itertools
import math
import os
import textwrap
import threading
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torchvision import models
from torchvision.transforms import v2

# The statistics that torchvision's ImageNet weights were trained with, in RGB order.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# How to turn an image upright, by its EXIF orientation, from 2 on. ImageOps.exif_transpose fails if
# any EXIF data are odd, as it writes all of them anew.
TURNS = (Image.FLIP_LEFT_RIGHT, Image.ROTATE_180, Image.FLIP_TOP_BOTTOM, Image.TRANSPOSE,
         Image.ROTATE_270, Image.TRANSVERSE, Image.ROTATE_90)


# Images

def turn_of(image: Image.Image) -> int | None:
    """How to transpose an image to turn it upright, by its EXIF orientation; None if it is."""
    try:
        orientation = image.getexif().get(0x0112, 1)
        return TURNS[orientation - 2] if orientation in range(2, 9) else None
    except Exception:  # damaged EXIF data raise errors of many kinds
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB, upright by its EXIF orientation.

    Integers of more than 8 bits, which Pillow alone would clip, are scaled from 8, 12 or 16 bits,
    the fewest that hold the largest of them. Transparency is dropped.

    Raises:
        ValueError: the range of the pixels is not known: floats, or integers beyond 16 bits.
    """
    if (turn := turn_of(image)) is not None:
        image = image.transpose(turn)
        image.info = {}  # whose orientation would turn it again
    if image.mode.startswith("I"):
        image = image.convert("I")
        least, greatest = image.getextrema()
        if least < 0 or greatest > 65535:
            raise ValueError(f"pixels from {least} to {greatest}: save it with 8 or 16 bits")
        limit = next(limit for limit in (255, 4095, 65535) if greatest <= limit)
        image = image.point(lambda value: value * (255 / limit) + 0.5).convert("L")
    elif image.mode == "F":
        raise ValueError("floating-point pixels, of unknown range: save it with 8 or 16 bits")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of a transparent palette
    return image.convert("RGB")


def normalize(images: Tensor, mean: Tensor | Sequence[float] = IMAGENET_MEAN,
              std: Tensor | Sequence[float] = IMAGENET_STD) -> Tensor:
    """Turn uint8 images (..., 3, H, W) into floats with ImageNet's mean and deviation removed.

    Cheapest for a whole batch at once, on the device that trains. `mean` and `std` as tensors there
    avoid a blocking copy of them.
    """
    # By rows of pixels, which are a view in channels_last: torch is slow along rows of three.
    width = images.shape[-1]
    mean, std = (torch.as_tensor(values, device=images.device).repeat(width)
                 for values in (mean, std))
    rows = v2.functional.to_dtype(images.movedim(-3, -1).flatten(-2), torch.float32, scale=True)
    return (rows - mean).div_(std).unflatten(-1, (width, 3)).movedim(-1, -3)


class _RandomResizedCrop(v2.RandomResizedCrop):
    """RandomResizedCrop that copies the crop before resizing it, which is twice as fast."""

    def transform(self, inpt: Tensor, params: dict[str, int]) -> Tensor:
        crop = v2.functional.crop(inpt, **params).clone()
        return v2.functional.resize(crop, self.size, self.interpolation, antialias=self.antialias)


def _compose(transforms: list[v2.Transform], normalized: bool) -> v2.Compose:
    return v2.Compose([v2.Lambda(to_rgb, Image.Image), v2.PILToTensor(), *transforms,
                       *([v2.Lambda(normalize)] if normalized else [])])


def train_transform(size: int = 224, scale: tuple[float, float] = (0.08, 1.0),
                    normalized: bool = True) -> v2.Compose:
    """Random crop and horizontal flip: PIL image or uint8 tensor -> tensor (3, size, size).

    Args:
        size: height and width of the result, in pixels. Default: 224
        scale: range of a crop's share of the image's area. Default: (0.08, 1.0)
        normalized: False keeps uint8, for `normalize` to convert whole batches. Default: True
    """
    return _compose([_RandomResizedCrop(size, scale), v2.RandomHorizontalFlip()], normalized)


def val_transform(size: int = 224, normalized: bool = True) -> v2.Compose:
    """Centre crop of 7/8 of the shorter side: PIL image or uint8 tensor -> tensor (3, size, size).

    Args:
        size: height and width of the result, in pixels (224 is cut out of 256). Default: 224
        normalized: as in `train_transform`. Default: True
    """
    return _compose([v2.Lambda(_middle, Tensor), v2.Resize(size * 256 // 224),
                     v2.CenterCrop(size)], normalized)


def _middle(image: Tensor) -> Tensor:
    """Crop a long image to its middle, as resizing the whole of it could fill the memory."""
    height, width = image.shape[-2:]
    return v2.functional.center_crop(image, [min(height, 4 * width), min(width, 4 * height)])


# The network and its hooks

class HookedModel(nn.Module):
    """Wraps a network so that its forward also returns the features of some of its layers.

    The network itself is untouched and stays at `.model`. No feature is kept between two calls, and
    calls in several threads do not mix. As a context manager it removes its hooks at the end.

    Args:
        model: any network that maps images to logits.
        student_layer: dotted name of the early layer, as in `model.named_modules()`, or a sequence
            of names, shallow first. Default: "layer2.1"
        teacher_layer: dotted name of the deep layer. Default: "layer4.1"

    Shape:
        - images: (N, 3, H, W)
        - returns logits (N, K), student features (N, C_s, H_s, W_s), or a tuple of them for a
          sequence of names, and teacher features (N, C_t, H_t, W_t); those of vision transformers
          are tokens (N, L, C), those of Swin transformers, (N, H, W, C), are turned into maps

    Raises:
        ValueError: a layer is not in the network (the message lists close matches), or named twice.
        RuntimeError: in forward, a layer is not used, is used more than once, or its output is
            changed in place.

    Example:
        >>> with HookedModel(models.resnet18(num_classes=10)) as hooked:
        ...     logits, student, teacher = hooked(torch.randn(2, 3, 64, 64))
        >>> logits.shape, student.shape, teacher.shape
        (torch.Size([2, 10]), torch.Size([2, 128, 8, 8]), torch.Size([2, 512, 2, 2]))
    """

    def __init__(self, model: nn.Module, student_layer: str | Sequence[str] = "layer2.1",
                 teacher_layer: str = "layer4.1") -> None:
        super().__init__()
        self.several = not isinstance(student_layer, str)
        self.student_layers = tuple(student_layer) if self.several else (student_layer,)
        if not self.student_layers or len(set(self.student_layers)) < len(self.student_layers):
            raise ValueError(f"student_layer must name different layers, got {student_layer!r}")
        self.teacher_layer = teacher_layer
        self.layer_names = (*self.student_layers, teacher_layer)
        layers = {name: layer for name, layer in model.named_modules() if name}
        for name in self.layer_names:
            if name not in layers:
                raise ValueError(f"no layer {name!r} in {type(model).__name__}; "
                                 + _did_you_mean(name, list(layers)))
        self.model = model
        self._features: dict[int, dict[str, tuple]] = {}  # by thread, while it is in forward
        # partial, not a lambda: copy.deepcopy then ties a copy's hooks to the copy.
        self._handles = [layers[name].register_forward_hook(partial(self._record, name))
                         for name in dict.fromkeys(self.layer_names)]

    def _record(self, name: str, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        features = self._features.get(_thread())
        if features is not None:
            if name in features:
                raise RuntimeError(f"layer {name!r} is used more than once")
            features[name] = output, _version(output)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | tuple[Tensor, ...], Tensor]:
        recorded = self._features[_thread()] = {}
        try:
            logits = self.model(images)
        finally:
            del self._features[_thread()]
        features = []
        for name in self.layer_names:
            if name not in recorded:
                raise RuntimeError(f"layer {name!r} took no part in the network's forward, or its "
                                   "hook has been removed; torch.compile the HookedModel, not the "
                                   "network in it")
            output, version = recorded[name]
            if version != _version(output):
                raise RuntimeError(f"the output of layer {name!r} is changed in place by a later "
                                   "layer: name that one")
            features.append(channels_first(output, images.shape[-2] / images.shape[-1]))
        *students, teacher = features
        return logits, tuple(students) if self.several else students[0], teacher

    def feature_channels(self, size: int = 224) -> tuple[int | tuple[int, ...], int]:
        """Channels of the student and teacher features, as SelfDistillationLoss takes them.

        Raises:
            ValueError: a layer gives neither maps nor tokens.
            RuntimeError: as in forward.
        """
        _, students, teacher = dry_run(self, size)
        channels = []
        students = students if self.several else [students]
        for name, features in zip(self.layer_names, (*students, teacher)):
            if not _is_features(features) or len(features) != 2:
                shape = tuple(getattr(features, "shape", ())) or type(features).__name__
                raise ValueError(f"layer {name!r} gives features of the shape {shape}, which are "
                                 "neither maps (N, C, H, W) nor tokens (N, L, C) of N = 2 images")
            channels.append(pooled(features).shape[1])
        return tuple(channels[:-1]) if self.several else channels[0], channels[-1]

    def remove_hooks(self) -> None:
        """Leave the network as it was; calling it twice is fine."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "HookedModel":
        return self

    def __exit__(self, *exception) -> None:
        self.remove_hooks()


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def _version(output: object) -> int:
    """Number of in-place changes to a tensor, where torch counts them."""
    if torch.compiler.is_compiling() or not isinstance(output, Tensor) or output.is_inference():
        return 0
    return output._version


def as_tuple(features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The student features as a tuple, of one or several layers."""
    return (features,) if isinstance(features, Tensor) else tuple(features)


def pooled(features: Tensor) -> Tensor:
    """Mean of maps (N, C, H, W) over the image, or of tokens (N, L, C): (N, C)."""
    if features.ndim == 3:
        return features.mean(dim=1)
    return F.avg_pool2d(features, features.shape[2:]).flatten(1)  # its gradient keeps their layout


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]
    return f"did you mean {', '.join(close)}?"


@torch.no_grad()
def dry_run(network: nn.Module, size: int = 224) -> object:
    """Forward two images of zeros, `size` pixels square, through a copy in eval mode."""
    network = copy.deepcopy(network).eval()
    return network(next(network.parameters()).new_zeros(2, 3, size, size))


def _is_features(output: object) -> bool:
    """Whether these are maps (N, C, H, W) of square images, or tokens (N, L, C)."""
    return isinstance(output, Tensor) and (
        output.ndim == 3 or output.ndim == 4 and output.shape[2] == output.shape[3])


def channels_first(features: Tensor, aspect: float = 1.0) -> Tensor:
    """Permute maps (N, H, W, C > H) to (N, C, H, W); return all else unchanged.

    Args:
        features: maps of images of this aspect, by which the two layouts are told apart.
        aspect: the images' height divided by their width. Default: 1.0
    """
    if not isinstance(features, Tensor) or features.ndim != 4:
        return features
    _, first, second, third = features.shape
    rounding = max(1, aspect)  # as strides round up; convolutions without padding cut more
    cut = rounding if aspect == 1 else rounding + 8
    may_be_last = abs(first - aspect * second) < rounding and first < third
    may_be_first = abs(second - aspect * third) < cut
    return features.permute(0, 3, 1, 2) if may_be_last and not may_be_first else features


def find_layers(model: nn.Module, size: int = 224,
                students: int = 1) -> tuple[str | tuple[str, ...], str]:
    """Find student and teacher layers that suit a network, as `HookedModel` takes them.

    The teacher is the last layer with the smallest maps, the students are the last ones with maps
    of four times and of twice that height: of ResNets, layer2 and layer3, and layer4. Where maps
    are all alike, as in a vision transformer, the teacher is the last block, and the students are
    those half-way and at three quarters.

    Args:
        size: height and width, in pixels, of an image that the network takes. Default: 224
        students: number of student layers; 1 gives a name instead of a tuple. Default: 1

    Raises:
        ValueError: there are no such layers.
    """
    model = copy.deepcopy(model)  # for hooks that leave no trace
    modules = {name: module for name, module in model.named_modules() if name}
    outputs: dict[str, tuple[Tensor, int]] = {}  # by module, in the order in which they finish
    calls = Counter()

    def record(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        calls[name] += 1
        if isinstance(output, Tensor) and output.shape[:1] == (2,):  # images
            outputs[name] = channels_first(output), _version(output)

    for name, module in modules.items():
        module.register_forward_hook(partial(record, name))
    dry_run(model, size)
    classifying = [name for name in outputs if isinstance(modules[name], (nn.Linear, nn.Conv2d))]
    # Neither the last of these nor what follows is a candidate, nor what is used more than once.
    outputs = {name: output for name, output in itertools.takewhile(
        lambda item: item[0] not in classifying[-1:], outputs.items()) if calls[name] == 1}
    stages: dict[int, str] = {}  # by the height of maps, the last of the outermost layers
    blocks = defaultdict(list)  # of tokens, by parent and type
    for name, (output, version) in outputs.items():
        height = output.shape[-1]
        if output.ndim == 4 and output.shape[2] == height > 1 and version == _version(output):
            if name.count(".") <= stages.get(height, name).count("."):
                stages[height] = name
        elif output.ndim == 3:
            blocks[name.rpartition(".")[0], type(modules[name])].append(name)
    depth = max(2, students)
    if len(stages) > depth:
        layers = [stages[height] for height in sorted(stages, reverse=True)][-1 - depth:]
        found = layers[:students]
    else:
        layers = max(blocks.values(), key=len, default=[])
        if len(layers) < 2 * students:
            usable = [name for name, (output, _) in outputs.items() if _is_features(output)]
            raise ValueError(f"no {students + 1} layers of {type(model).__name__} suggest "
                             "themselves as student and teacher: give their names, of "
                             f"{', '.join(usable[:5]) or 'layers that give maps or tokens'}"
                             + f" or {len(usable) - 5} more" * (len(usable) > 5))
        found = [layers[len(layers) * (students + k) // (2 * students) - 1]
                 for k in range(students)]
    return found[0] if students == 1 else tuple(found), layers[-1]


def find_classifier(model: nn.Module) -> str:
    """Name of the layer that gives the logits: the last one that is linear or convolves."""
    return [name for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def hooked_classifier(arch: str, num_classes: int, weights: str | os.PathLike = "imagenet",
                      student_layer: str | Sequence[str] | None = None,
                      teacher_layer: str | None = None, students: int = 1) -> HookedModel:
    """Make a torchvision classifier with `num_classes` outputs and hooked layers.

    Args:
        arch: name of a function in torchvision.models, such as "resnet50".
        num_classes: outputs of the classifier, at least 1.
        weights: "imagenet" (torchvision's best, downloaded once), "none" (random), or a file that
            holds a state dict of this network, alone or under "model" or "state_dict", as saved
            from DistributedDataParallel or torch.compile, too. A file's classifying layer is kept
            if it has `num_classes` outputs; otherwise it is made anew. Default: "imagenet"
        student_layer: see `HookedModel`. Default: as published, "layer2.1" for resnet18 (and
            "layer3.1" for a second one); for others as `find_layers` has it
        teacher_layer: the same; for resnet18 "layer4.1".
        students: number of student layers to find. Default: 1

    Raises:
        ValueError: there is no such network or layer, num_classes is below 1, or the file holds
            something else.
        OSError: the weights cannot be downloaded, or the file cannot be read.
    """
    model = _make_classifier(arch, num_classes)
    if hasattr(model, "aux_logits"):
        raise ValueError(f"{arch} returns more than logits in training, which no loss here takes")
    if weights != "none":
        _load_weights(model, arch, weights)
    if student_layer is None or teacher_layer is None:
        published = {1: "layer2.1", 2: ("layer2.1", "layer3.1")}
        found = ((published[students], "layer4.1") if arch == "resnet18" and students in published
                 else find_layers(model, students=students))
        student_layer = found[0] if student_layer is None else student_layer
        teacher_layer = found[1] if teacher_layer is None else teacher_layer
    return HookedModel(model, student_layer, teacher_layer)


def hooked_resnet18(num_classes: int, weights: str | os.PathLike = "imagenet") -> HookedModel:
    """`hooked_classifier` of ResNet18, at layer2.1 and layer4.1, as published."""
    return hooked_classifier("resnet18", num_classes, weights)


def _make_classifier(arch: str, num_classes: int) -> nn.Module:
    known = models.list_models(module=models)
    if arch not in known:
        raise ValueError(f"no classifier {arch!r} in torchvision.models; "
                         + _did_you_mean(arch, known))
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return models.get_model(arch, num_classes=num_classes)


def _load_weights(model: nn.Module, arch: str, weights: str | os.PathLike) -> None:
    if weights == "imagenet":
        try:
            content = models.get_model(arch, weights="DEFAULT").state_dict()
        except RuntimeError as error:  # the download has another hash than it should
            raise OSError(str(error)) from None
    else:
        content = load_tensors(weights)
    try:
        state = content.get("model", content.get("state_dict", content))
        for prefix in ("module.", "_orig_mod.", "module."):
            consume_prefix_in_state_dict_if_present(state, prefix)
        own, head = model.state_dict(), find_classifier(model)
        for name in own.keys() & {f"{head}.weight", f"{head}.bias"}:
            if weights == "imagenet" or state[name].shape != own[name].shape:
                state[name] = own[name]
        model.load_state_dict(state)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        held = content.get("arch", arch)  # as a best.pt says
        raise ValueError(f"{weights}: not the weights of a torchvision {arch}"
                         + f", but of {held}" * (held != arch)
                         + f": {textwrap.shorten(str(error), 200)}") from None


def load_tensors(path: str | os.PathLike) -> dict:
    """Load the dict in a file that torch.save wrote. Nothing in the file is ever executed.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds more than a dict of tensors and plain types.
    """
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file):  # torch.save compresses nothing; a zip bomb does
                unpacked = sum(entry.file_size for entry in zipfile.ZipFile(file).infolist())
                if unpacked > os.fstat(file.fileno()).st_size:
                    raise ValueError("compressed")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:  # a damaged file can raise nearly anything
            content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a checkpoint: damaged, or not a dict of tensors and plain "
                         "types saved by torch.save")
    return content


# The loss

class SelfDistillationLoss(nn.Module):
    r"""Cross-entropy plus what early layers learn from deep features, labels and own outputs.

    .. math::
        L = (1 - \alpha) \, \mathrm{CE}(z, y) + \alpha \sum_l \big[
            \mathrm{hint} \cdot d(S_l, \mathrm{adapter}_l(T)) + \mathrm{labels} \cdot
            \mathrm{CE}(e_l, y) + \mathrm{soft} \cdot \tau^2 \, \mathrm{KL}(
            \mathrm{softmax}(z / \tau) \,\|\, \mathrm{softmax}(e_l / \tau)) \big]

    for logits *z*, labels *y*, teacher features *T* and, for each student layer *l*, its features
    *S*, brought to the height and width of *T* (bilinear, align_corners=False), an adapter, a 1x1
    convolution, and early logits *e*, a linear classifier of the mean of *S* over the image. The
    distance *d* is the mean square; no gradient flows from the soft term into *z*. The defaults
    are the published formula exactly.

    Args:
        alpha: weight of all but the cross-entropy, in [0, 1]. Default: 0.5
        student_channels: channels of the student features, or a sequence of them, for as many
            layers. Default: 128 (ResNet18's layer2)
        teacher_channels: channels of the teacher features. Default: 512 (ResNet18's layer4)
        detach_teacher: stop the hint's gradient at the teacher features, so that the deep layers
            are not drawn towards the early ones (Chen & He, SimSiam, arXiv:2011.10566, section
            4.1). The adapter still learns. Default: False
        normalize: compare directions: *d* is the mean over positions of the squared distance
            between unit vectors over the channels, 2 - 2 cos, from 0 to 4 (Grill et al., BYOL,
            arXiv:2006.07733, equation 2). Default: False
        hint: weight of the distance of features, at least 0. Default: 1.0
        labels: weight of the early classifiers' cross-entropy, at least 0. Default: 0.0
        soft: weight of the divergence from the network's own output, at least 0. Default: 0.0
        num_classes: outputs of an early classifier; needed if labels or soft is above 0.
        temperature: :math:`\tau` of the soft term, above 0. Default: 3.0
        label_smoothing: of all cross-entropies, in [0, 1]. Default: 0.0

    There are adapters if hint is above 0, `.adapter` for an int student_channels and `.adapters`
    for a sequence, and `.classifiers`, one a layer, if labels or soft is.

    Shape:
        - student_logits: (N, K); labels: (N)
        - student_intermediate: (N, C_s, H, W), or a sequence of them, shallow first
        - teacher_intermediate: (N, teacher_channels, h, w)
        - features may be tokens (N, L, C) instead; for the hint a token is a position
        - returns a scalar

    Raises:
        ValueError: an argument, or the shape of a feature, is out of range.

    Example:
        >>> criterion = SelfDistillationLoss(alpha=0.5)
        >>> logits, labels = torch.randn(2, 10, requires_grad=True), torch.tensor([3, 7])
        >>> student, teacher = torch.randn(2, 128, 28, 28), torch.randn(2, 512, 7, 7)
        >>> loss = criterion(logits, labels, student, teacher)
        >>> loss.backward()
        >>> loss.shape, criterion.adapter.weight.grad.shape
        (torch.Size([]), torch.Size([128, 512, 1, 1]))
    """

    def __init__(self, alpha: float = 0.5, student_channels: int | Sequence[int] = 128,
                 teacher_channels: int = 512, detach_teacher: bool = False,
                 normalize: bool = False, *, hint: float = 1.0, labels: float = 0.0,
                 soft: float = 0.0, num_classes: int | None = None, temperature: float = 3.0,
                 label_smoothing: float = 0.0) -> None:
        super().__init__()
        several = not isinstance(student_channels, int)
        self.student_channels = tuple(student_channels) if several else (student_channels,)
        classifies = labels > 0 or soft > 0
        for name, value, low, high in (
                ("alpha", alpha, 0, 1), ("label_smoothing", label_smoothing, 0, 1),
                ("hint", hint, 0, math.inf), ("labels", labels, 0, math.inf),
                ("soft", soft, 0, math.inf), ("temperature", temperature, 1e-6, math.inf),
                *(("student_channels", count, 1, math.inf)
                  for count in self.student_channels or [0]),
                ("teacher_channels", teacher_channels, 1, math.inf),
                ("num_classes", num_classes or 0, int(classifies), math.inf)):
            if not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
        self.alpha, self.detach_teacher, self.normalize = alpha, detach_teacher, normalize
        self.teacher_channels = teacher_channels
        self.hint, self.labels, self.soft = hint, labels, soft
        self.temperature, self.label_smoothing = temperature, label_smoothing
        if hint:
            adapters = [nn.Conv2d(teacher_channels, channels, kernel_size=1)
                        for channels in self.student_channels]
            if several:
                self.adapters = nn.ModuleList(adapters)
            else:
                self.adapter, = adapters
        self.classifiers = nn.ModuleList(nn.Linear(channels, num_classes)
                                         for channels in self.student_channels if classifies)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term in the loss, by name."""
        weights = {"hint": self.hint, "labels": self.labels, "soft": self.soft}
        return {"cross_entropy": 1 - self.alpha} | {
            name: self.alpha * weight for name, weight in weights.items() if weight}

    def forward(self, student_logits: Tensor, labels: Tensor,
                student_intermediate: Tensor | Sequence[Tensor],
                teacher_intermediate: Tensor) -> Tensor:
        return sum(self.terms(student_logits, labels, student_intermediate,
                              teacher_intermediate).values())

    def terms(self, student_logits: Tensor, labels: Tensor,
              student_intermediate: Tensor | Sequence[Tensor], teacher_intermediate: Tensor,
              early_logits: list[Tensor] | None = None) -> dict[str, Tensor]:
        """Return the parts that add up to the loss, weighted: a dict of scalars.

        Its keys are cross_entropy and those of hint, labels and soft that are above 0. Pass
        `early_logits` if they are already computed.
        """
        students = as_tuple(student_intermediate)
        if len(students) != len(self.student_channels):
            raise ValueError(f"{len(self.student_channels)} student features were expected, one a "
                             f"layer, got {len(students)}")
        early = self.early_logits(students) if early_logits is None else early_logits
        terms = {"cross_entropy": self._cross_entropy(student_logits, labels)}
        if self.hint:
            terms["hint"] = self._distance(students, teacher_intermediate)
        if self.labels:
            terms["labels"] = sum(self._cross_entropy(logits, labels) for logits in early)
        if self.soft:
            own = (student_logits.detach() / self.temperature).softmax(dim=1)
            terms["soft"] = self.temperature ** 2 * sum(
                F.kl_div((logits / self.temperature).log_softmax(dim=1), own,
                         reduction="batchmean") for logits in early)
        return {name: weight * terms[name] for name, weight in self.weights.items()}

    def early_logits(self, student_intermediate: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """Return the logits (N, num_classes) of each early classifier, if there are any."""
        early = []
        for classifier, features in zip(self.classifiers, as_tuple(student_intermediate)):
            _check_channels("student", features, classifier.in_features)
            early.append(classifier(pooled(features)))
        return early

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def _distance(self, students: Sequence[Tensor], teacher: Tensor) -> Tensor:
        _check_channels("teacher", teacher, self.teacher_channels)
        if self.detach_teacher:
            teacher = teacher.detach()
        teacher = _as_map(teacher)  # (N, C_t, h, w)
        adapters = self.adapters if hasattr(self, "adapters") else [self.adapter]
        total = 0
        for features, adapter in zip(students, adapters):
            _check_channels("student", features, adapter.out_channels)
            features, target = _as_map(features), adapter(teacher)  # target: (N, C_s, h, w)
            features = F.interpolate(features, size=target.shape[2:], mode="bilinear",
                                     align_corners=False)
            weight = 1
            if self.normalize:  # the mean square is then 1 / C_s of the squared distance
                features, target, weight = _unit(features), _unit(target), adapter.out_channels
            # As F.mse_loss, whose gradient, like that of mean, would not keep channels_last.
            dtype = torch.promote_types(features.dtype, torch.float32)
            square = (features.to(dtype) - target.to(dtype)).square()
            total += weight * square.sum() / square.numel()
        return total


def _check_channels(name: str, features: Tensor, channels: int) -> None:
    if features.ndim not in (3, 4) or _as_map(features).shape[1] != channels:
        raise ValueError(f"{name} features must have the shape (N, {channels}, H, W) or "
                         f"(N, L, {channels}), got {tuple(features.shape)}")


def _as_map(features: Tensor) -> Tensor:
    """Maps as they are; tokens (N, L, C) as maps (N, C, L, 1)."""
    return features if features.ndim == 4 else features.mT[..., None]


def _unit(features: Tensor) -> Tensor:
    """Features (N, C, H, W) at unit length over the channels, at any scale that is finite."""
    scale = features.detach().abs().amax(dim=1, keepdim=True)
    return F.normalize(features / scale.clamp(min=torch.finfo(scale.dtype).tiny), dim=1, eps=0.5)


# A trained classifier

def load_classifier(checkpoint: str | os.PathLike | dict) -> tuple[nn.Module, list[str],
                                                                   v2.Compose]:
    """Load a best.pt that train.py wrote, for use: `(model, classes, transform)`.

    Args:
        checkpoint: the file, or the dict in it.

    Returns:
        The torchvision network in eval mode, on the CPU; the names of its classes, in the order of
        its logits; and the transform that turns a PIL image, as `to_rgb` takes it, into its input.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or not a checkpoint of train.py.

    Example:
        >>> model, classes, transform = load_classifier("best.pt")  # doctest: +SKIP
        >>> logits = model(transform(Image.open("cat.jpg"))[None])  # doctest: +SKIP
        >>> classes[logits.argmax()]                                # doctest: +SKIP
        'cat'
    """
    name = "the checkpoint" if isinstance(checkpoint, dict) else checkpoint
    content = checkpoint if isinstance(checkpoint, dict) else load_tensors(checkpoint)
    try:
        arch, classes = content["arch"], list(content["classes"])
        model = _make_classifier(arch, len(classes))
        model.load_state_dict(content["model"])
        size = content["size"]
        if not isinstance(size, int) or not 0 < size <= 10_000:
            raise ValueError(f"its image size is {size!r}")
    except LookupError as error:
        raise ValueError(f"{name} is not a checkpoint of train.py: no {error} in it") from None
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{name} does not hold a classifier of train.py: "
                         f"{textwrap.shorten(str(error), 200)}") from None
    return model.eval(), classes, val_transform(size)
