"""Self-distillation in one file: a network's early layers learn beside its deep ones.

There is no second network: a hook takes an early and a deep feature map (the student's and the
teacher's) out of the one that is trained, for ResNet18 the outputs of layer2 and layer4. The loss
has a second term beside the cross-entropy, in one of two forms:

    loss = (1 - alpha) * CE(logits, labels) + alpha * MSE(resize(student), conv1x1(teacher))
    loss = (1 - alpha) * CE(logits, labels) + alpha * CE(linear(mean(student)), labels)

The first, `SelfDistillationLoss`, is the hint of Romero et al., FitNets, arXiv:1412.6550, equation
3, within one network; in the second, `AuxiliaryClassifierLoss`, the network's own output can teach
the early classifier too, as in Zhang et al., Be Your Own Teacher, arXiv:1905.08094. Copy this file
into a project of your own; it needs only torch and torchvision:

    model = hooked_resnet18(num_classes=10)
    criterion = AuxiliaryClassifierLoss(num_classes=10)
    logits, student, teacher = model(images)
    loss = criterion(logits, labels, student, teacher)

Give the parameters of both, `model` and `criterion`, to the optimiser: the 1x1 convolution or the
early classifier is trained too.
"""
import contextlib
import difflib
import os
import textwrap
import zipfile
from collections import defaultdict
from functools import partial

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn
from torchvision import models
from torchvision.transforms import v2

# The statistics that torchvision's ImageNet weights were trained with, in RGB order.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode of whole numbers as 8-bit RGB, turned upright as its EXIF data ask.

    16-bit values are scaled to 8 bits (Pillow alone would clip them); transparency is dropped.

    Raises:
        ValueError: the pixels are floating-point numbers, whose range is not known.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels, of unknown range: save it with 8 or 16 bits")
    turned = False
    with contextlib.suppress(Exception):  # which damaged EXIF data raise, of many kinds
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    if turned:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of a transparent palette
    return image.convert("RGB")


def normalize(images: Tensor) -> Tensor:
    """uint8 images (..., 3, H, W) as floats, normalised as torchvision's ImageNet weights expect.

    Cheapest for a whole batch at once, on the device that trains.
    """
    images = v2.functional.to_dtype(images, torch.float32, scale=True)
    return v2.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD)


class _RandomResizedCrop(v2.RandomResizedCrop):
    """Resizes a dense copy of the crop, in channels_last if the image is: twice as fast."""

    def transform(self, inpt: Tensor, params: dict[str, int]) -> Tensor:
        crop = v2.functional.crop(inpt, **params).clone()
        return v2.functional.resize(crop, self.size, self.interpolation, antialias=self.antialias)


def _compose(transforms: list[v2.Transform], normalized: bool) -> v2.Compose:
    return v2.Compose([v2.Lambda(to_rgb, Image.Image), v2.PILToTensor(), *transforms,
                       *([v2.Lambda(normalize)] if normalized else [])])


def train_transform(size: int = 224, scale: tuple[float, float] = (0.08, 1.0),
                    normalized: bool = True) -> v2.Compose:
    """Random crop and mirroring: PIL image or uint8 tensor -> float tensor (3, size, size).

    Args:
        size: height and width of the result, in pixels.
        scale: least and largest share of the image's area that a crop takes.
        normalized: False leaves the result in uint8, for `normalize` to do whole batches.
    """
    return _compose([_RandomResizedCrop(size, scale), v2.RandomHorizontalFlip()], normalized)


def val_transform(size: int = 224, normalized: bool = True) -> v2.Compose:
    """Centre crop at 7/8 of the shorter side: PIL image or uint8 tensor -> tensor (3, size, size).

    Args:
        size: height and width of the result, in pixels; 224 is cut out of 256, as is usual.
        normalized: as in `train_transform`.
    """
    return _compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)], normalized)


class HookedModel(nn.Module):
    """Wraps a network so that its forward also returns the output of two of its layers.

    The network itself is untouched and stays at `.model`. The wrapper keeps no feature alive
    between two calls. Usable as a context manager, which removes the hooks at its end.

    Args:
        model: any network that maps images to logits.
        student_layer: dotted name of the shallow layer, as in `model.named_modules()`.
        teacher_layer: dotted name of the deep layer.

    Shape:
        - images: (N, 3, H, W)
        - returns logits (N, num_classes), student features (N, C_s, H_s, W_s) and teacher
          features (N, C_t, H_t, W_t); or tokens (N, L, C), if that is what the layers give

    Raises:
        ValueError: a layer is not in the network; the message lists close matches.

    Example:
        >>> with HookedModel(models.resnet18(num_classes=10)) as hooked:
        ...     logits, student, teacher = hooked(torch.randn(2, 3, 64, 64))
        >>> logits.shape, student.shape, teacher.shape
        (torch.Size([2, 10]), torch.Size([2, 128, 8, 8]), torch.Size([2, 512, 2, 2]))
    """

    def __init__(self, model: nn.Module, student_layer: str = "layer2.1",
                 teacher_layer: str = "layer4.1") -> None:
        super().__init__()
        layers = [_find_layer(model, name) for name in (student_layer, teacher_layer)]
        self.model = model
        self.layer_names = (student_layer, teacher_layer)
        self._features: list[Tensor | None] | None = None  # a list only while forward runs
        # partial, not a lambda: copy.deepcopy then ties a copy's hooks to the copy.
        self._handles = [layer.register_forward_hook(partial(self._record, position))
                         for position, layer in enumerate(layers)]

    def _record(self, position: int, layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        if self._features is not None:
            if self._features[position] is not None:
                raise RuntimeError(f"layer {self.layer_names[position]!r} is used more than once")
            self._features[position] = output

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self._handles:
            raise RuntimeError("the hooks have been removed: wrap the network in a new HookedModel")
        self._features = [None, None]
        try:
            logits = self.model(images)
            student, teacher = self._features
        finally:
            self._features = None
        for name, features in zip(self.layer_names, (student, teacher)):
            if features is None:
                raise RuntimeError(f"layer {name!r} took no part in the network's forward")
        return logits, student, teacher

    def dry_run(self, size: int = 224) -> tuple[Tensor, Tensor, Tensor]:
        """What forward returns for one black image, in eval mode; the network stays as it is.

        Args:
            size: height and width of that image, in pixels.

        Raises:
            ValueError: a layer gives neither maps nor tokens.
        """
        logits, *features = _dry_run(self, size)
        for name, output in zip(self.layer_names, features):
            if not (_is_map(output) or isinstance(output, Tensor) and output.ndim == 3):
                shape = tuple(getattr(output, "shape", ())) or type(output).__name__
                raise ValueError(f"layer {name!r} gives features of the shape {shape}, which are "
                                 "neither maps (N, C, H, W) nor tokens (N, L, C)")
        return logits, *features

    def feature_channels(self, size: int = 224) -> tuple[int, int]:
        """Channels of the student's and the teacher's features, from a `dry_run`."""
        _, student, teacher = self.dry_run(size)
        return pooled(student).shape[1], pooled(teacher).shape[1]

    def remove_hooks(self) -> None:
        """Leave the network as it was; calling it twice is fine."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "HookedModel":
        return self

    def __exit__(self, *exception) -> None:
        self.remove_hooks()


def _find_layer(model: nn.Module, name: str) -> nn.Module:
    layers = dict(model.named_modules())
    if not name or name not in layers:
        raise ValueError(f"no layer {name!r} in {type(model).__name__}; "
                         + _did_you_mean(name, list(layers)[1:]))
    return layers[name]


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]
    return f"did you mean one of {', '.join(close)}?"


@torch.no_grad()
def _dry_run(network: nn.Module, size: int) -> object:
    training = {module: module.training for module in network.modules()}
    network.eval()  # in training mode it would move the batch norms' statistics
    like = next(network.parameters())
    try:
        return network(torch.zeros(1, 3, size, size, device=like.device, dtype=like.dtype))
    finally:
        for module, mode in training.items():
            module.training = mode


def _is_map(output: object) -> bool:
    """Whether this is a feature map (N, C, H, W) of a square image; (N, H, W, C) is none."""
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3]


def find_layers(model: nn.Module, size: int = 224) -> tuple[str, str]:
    """Names of the student's and the teacher's layer that suit a network.

    The teacher is the last layer with the smallest maps, the student the last one with maps of four
    times their height: of ResNets, layer4 and layer2. Of a network whose maps are all alike, such
    as a vision transformer, they are the last of its blocks and the one half-way.

    Args:
        size: height and width, in pixels, of an image that the network takes.

    Raises:
        ValueError: there are no such layers.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    outputs: dict[str, Tensor] = {}  # of each module, in the order in which they finish

    def record(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output

    handles = [module.register_forward_hook(partial(record, name))
               for name, module in modules.items()]
    try:
        _dry_run(model, size)
    finally:
        for handle in handles:
            handle.remove()

    outermost = {id(output): name for name, output in outputs.items()}  # of those that hand it on
    sides = {name: outputs[name].shape[-1] for name in outermost.values()
             if _is_map(outputs[name]) and outputs[name].shape[-1] > 1}
    if len(set(sides.values())) > 2:
        smallest, _, four_times, *_ = sorted(set(sides.values()))
        return tuple(min(reversed([name for name in sides if sides[name] == side]),
                         key=lambda name: name.count(".")) for side in (four_times, smallest))
    alike = defaultdict(list)
    for name, output in outputs.items():
        if output.ndim == 3:
            alike[name.rpartition(".")[0], type(modules[name])].append(name)
    blocks = max(alike.values(), key=len, default=[])
    if len(blocks) < 2:
        raise ValueError(f"no layers of {type(model).__name__} suggest themselves as student and "
                         "teacher: give their names")
    return blocks[len(blocks) // 2 - 1], blocks[-1]


def find_classifier(model: nn.Module) -> str:
    """The name of the layer that gives the logits: the last one that is linear or convolves."""
    return [name for name, module in model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))][-1]


def hooked_classifier(arch: str, num_classes: int, weights: str | os.PathLike = "imagenet",
                      student_layer: str | None = None,
                      teacher_layer: str | None = None) -> HookedModel:
    """A classifier of torchvision's with `num_classes` outputs, hooked at two of its layers.

    Args:
        arch: name of a function in torchvision.models, such as "resnet50".
        num_classes: outputs of the classifier, at least 1.
        weights: "imagenet" (torchvision's best, downloaded once), "none" (random), or a file that
            holds a state dict of this network, alone or under the key "model". A file's
            classifying layer is kept if it has `num_classes` outputs; otherwise it is made anew.
        student_layer: see `HookedModel`. Default: as published, "layer2.1", of resnet18, of others
            that of `find_layers`
        teacher_layer: the same; of resnet18 "layer4.1".

    Raises:
        ValueError: there is no such network or layer, num_classes is below 1, or the file holds
            something else.
        OSError: the weights cannot be downloaded, or the file cannot be read.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    known = models.list_models(module=models)
    if arch not in known:
        raise ValueError(f"no classifier {arch!r} in torchvision.models; "
                         + _did_you_mean(arch, known))
    model = models.get_model(arch, num_classes=num_classes)
    if hasattr(model, "aux_logits"):
        raise ValueError(f"{arch} returns more than logits in training, which no loss here takes")
    if weights != "none":
        _load_weights(model, arch, weights)
    if student_layer is None or teacher_layer is None:
        found = ("layer2.1", "layer4.1") if arch == "resnet18" else find_layers(model)
        student_layer, teacher_layer = student_layer or found[0], teacher_layer or found[1]
    return HookedModel(model, student_layer, teacher_layer)


def _load_weights(model: nn.Module, arch: str, weights: str | os.PathLike) -> None:
    if weights == "imagenet":
        try:
            state = models.get_model(arch, weights="DEFAULT").state_dict()
        except RuntimeError as error:  # what came has another hash than it should
            raise OSError(str(error)) from None
    else:
        state = load_tensors(weights)
    try:
        state, own, head = state.get("model", state), model.state_dict(), find_classifier(model)
        for name in own.keys() & {f"{head}.weight", f"{head}.bias"}:
            if weights == "imagenet" or state[name].shape != own[name].shape:
                state[name] = own[name]
        model.load_state_dict(state)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{weights}: not the weights of a torchvision {arch}: "
                         f"{textwrap.shorten(str(error), 200)}") from None


def hooked_resnet18(num_classes: int, weights: str | os.PathLike = "imagenet") -> HookedModel:
    """`hooked_classifier` of ResNet18, at layer2.1 and layer4.1, as published."""
    return hooked_classifier("resnet18", num_classes, weights)


def load_tensors(path: str | os.PathLike) -> dict:
    """The dict in a file that torch.save wrote. Nothing in the file is ever executed.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is damaged, or holds more than a dict of tensors and plain types.
    """
    with open(path, "rb") as file:
        try:
            if zipfile.is_zipfile(file):  # torch.save compresses nothing; a zip bomb does
                with zipfile.ZipFile(file) as archive:
                    unpacked = sum(entry.file_size for entry in archive.infolist())
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


class _TwoTermLoss(nn.Module):
    """(1 - alpha) * cross-entropy + alpha * a second term, which subclasses define."""

    def __init__(self, alpha: float, label_smoothing: float, **channels: int) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("label_smoothing", label_smoothing)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        for name, value in channels.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.alpha = alpha
        self.label_smoothing = label_smoothing

    def forward(self, student_logits: Tensor, labels: Tensor, student_intermediate: Tensor,
                teacher_intermediate: Tensor | None = None) -> Tensor:
        ce, distillation = self.terms(student_logits, labels, student_intermediate,
                                      teacher_intermediate)
        return self.combine(ce, distillation)

    def terms(self, student_logits: Tensor, labels: Tensor, student_intermediate: Tensor,
              teacher_intermediate: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two terms apart, neither weighted: cross-entropy, distillation."""
        return self.cross_entropy(student_logits, labels), self.distillation(
            student_logits, labels, student_intermediate, teacher_intermediate)

    def combine(self, ce: Tensor, distillation: Tensor) -> Tensor:
        """The loss from its two terms."""
        return self.alpha * distillation + (1 - self.alpha) * ce

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def pooled(features: Tensor) -> Tensor:
    """The mean of maps (N, C, H, W) over the image, or of tokens (N, L, C): (N, C)."""
    return features.mean(dim=(2, 3) if features.ndim == 4 else 1)


def _check_channels(name: str, features: Tensor, channels: int, tokens: bool = False) -> None:
    if not (features.ndim == 4 and features.shape[1] == channels
            or tokens and features.ndim == 3 and features.shape[2] == channels):
        raise ValueError(f"{name} features must have the shape (N, {channels}, H, W)"
                         + f" or (N, L, {channels})" * tokens + f", got {tuple(features.shape)}")


class SelfDistillationLoss(_TwoTermLoss):
    r"""Cross-entropy plus the distance of early features from adapted deep ones.

    .. math::
        L = \alpha \, \mathrm{MSE}(\mathrm{resize}(S), \mathrm{adapter}(T))
            + (1 - \alpha) \, \mathrm{CE}(\mathrm{logits}, \mathrm{labels})

    The adapter is a 1x1 convolution from the teacher's channels to the student's; resize is
    bilinear, with align_corners=False, to the teacher's height and width. The defaults give the
    published formula exactly.

    Args:
        alpha: weight of the distillation term, in [0, 1]. Default: 0.5
        student_channels: channels of the student features. Default: 128 (ResNet18's layer2)
        teacher_channels: channels of the teacher features. Default: 512 (ResNet18's layer4)
        detach_teacher: stop the gradient at the teacher features, so that the deep layers are
            not drawn towards the early ones (Chen & He, SimSiam, arXiv:2011.10566, section 4.1).
            The adapter still learns. Default: False
        normalize: scale both features to unit length over the channels before they are compared,
            so that the term changes neither with their magnitude nor with the resolution; it then
            lies between 0 and 4 / student_channels. Default: False
        label_smoothing: of the cross-entropy, in [0, 1]. Default: 0.0

    Shape:
        - student_logits: (N, K); labels: (N)
        - student_intermediate: (N, student_channels, H, W)
        - teacher_intermediate: (N, teacher_channels, h, w)
        - returns a scalar

    Raises:
        ValueError: an argument, or the number of channels of a feature, is out of range.

    Example:
        >>> criterion = SelfDistillationLoss(alpha=0.5)
        >>> logits, labels = torch.randn(2, 10, requires_grad=True), torch.tensor([3, 7])
        >>> student, teacher = torch.randn(2, 128, 28, 28), torch.randn(2, 512, 7, 7)
        >>> loss = criterion(logits, labels, student, teacher)
        >>> loss.backward()
        >>> loss.shape, criterion.adapter.weight.grad.shape
        (torch.Size([]), torch.Size([128, 512, 1, 1]))
    """

    def __init__(self, alpha: float = 0.5, student_channels: int = 128,
                 teacher_channels: int = 512, detach_teacher: bool = False,
                 normalize: bool = False, label_smoothing: float = 0.0) -> None:
        super().__init__(alpha, label_smoothing, student_channels=student_channels,
                         teacher_channels=teacher_channels)
        self.detach_teacher = detach_teacher
        self.normalize = normalize
        self.adapter = nn.Conv2d(teacher_channels, student_channels, kernel_size=1)

    def distillation(self, logits: Tensor, labels: Tensor, student: Tensor,
                     teacher: Tensor) -> Tensor:
        """MSE between the resized student features and the adapted teacher features, a scalar."""
        _check_channels("student", student, self.adapter.out_channels)
        _check_channels("teacher", teacher, self.adapter.in_channels)
        if self.detach_teacher:
            teacher = teacher.detach()
        teacher = self.adapter(teacher)  # (N, C_s, h, w)
        student = F.interpolate(student, size=teacher.shape[2:], mode="bilinear",
                                align_corners=False)  # (N, C_s, h, w)
        if self.normalize:
            student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        return F.mse_loss(student, teacher)


class AuxiliaryClassifierLoss(_TwoTermLoss):
    r"""Cross-entropy plus that of a linear classifier on the early features.

    The classifier sees the mean of the student features over the image, and learns from the
    labels and, if `soft` is above 0, from the network's own output:

    .. math::
        L = (1 - \alpha) \, \mathrm{CE}(\mathrm{logits}, \mathrm{labels})
            + \alpha \, [(1 - s) \, \mathrm{CE}(a, \mathrm{labels})
            + s \, \tau^2 \, \mathrm{KL}(\mathrm{softmax}(\mathrm{logits} / \tau) \,\|\,
            \mathrm{softmax}(a / \tau))]

    No gradient flows from the second term into the logits. With soft at 0 this is deep supervision
    (Lee et al., Deeply-Supervised Nets, arXiv:1409.5185); above, the loss of Zhang et al., Be Your
    Own Teacher, arXiv:1905.08094, for one shallow classifier and without its hints.

    Args:
        num_classes: outputs of the classifier.
        alpha: weight of the second term, in [0, 1]. Default: 0.5
        student_channels: channels of the student features. Default: 128 (ResNet18's layer2)
        soft: share *s* of the network's own output in the second term, in [0, 1]; Be Your Own
            Teacher has 0.3. Default: 0.0
        temperature: :math:`\tau`, above 0. Default: 3.0
        label_smoothing: of both cross-entropies, in [0, 1]. Default: 0.0

    Shape:
        - student_logits: (N, num_classes); labels: (N)
        - student_intermediate: (N, student_channels, H, W), or tokens (N, L, student_channels)
        - teacher_intermediate: not used; here for the same call as `SelfDistillationLoss`
        - returns a scalar

    Raises:
        ValueError: an argument, or the number of channels of the features, is out of range.

    Example:
        >>> criterion = AuxiliaryClassifierLoss(num_classes=10)
        >>> logits, labels = torch.randn(2, 10, requires_grad=True), torch.tensor([3, 7])
        >>> criterion(logits, labels, torch.randn(2, 128, 28, 28)).shape
        torch.Size([])
    """

    def __init__(self, num_classes: int, alpha: float = 0.5, student_channels: int = 128,
                 soft: float = 0.0, temperature: float = 3.0, label_smoothing: float = 0.0) -> None:
        super().__init__(alpha, label_smoothing, num_classes=num_classes,
                         student_channels=student_channels)
        if not 0 <= soft <= 1:
            raise ValueError(f"soft must lie in [0, 1], got {soft}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.soft = soft
        self.temperature = temperature
        self.classifier = nn.Linear(student_channels, num_classes)

    def distillation(self, logits: Tensor, labels: Tensor, student: Tensor,
                     teacher: Tensor | None = None) -> Tensor:
        """The loss of the early classifier, a scalar."""
        _check_channels("student", student, self.classifier.in_features, tokens=True)
        early = self.classifier(pooled(student))  # (N, K)
        hard = self.cross_entropy(early, labels)
        if not self.soft:
            return hard
        kl = F.kl_div((early / self.temperature).log_softmax(dim=1),
                      (logits.detach() / self.temperature).softmax(dim=1), reduction="batchmean")
        return (1 - self.soft) * hard + self.soft * self.temperature ** 2 * kl
