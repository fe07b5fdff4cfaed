"""The tests: `python -m unittest`, without a network or data from outside."""
import contextlib
import copy
import csv
import doctest
import gc
import hashlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import warnings
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing import forkserver
from multiprocessing.pool import ThreadPool
from pathlib import Path
from unittest import mock
from urllib.error import URLError

os.environ["OMP_NUM_THREADS"] = "1"  # read by torch: threads only wait, with such small tensors

import torch
import torch.nn.functional as F
import torchvision
from PIL import ExifTags, Image, ImageOps
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import datasets, models, transforms
from torchvision.models import resnet18
from torchvision.transforms.v2 import functional

import evaluate
import selfdistill
import train
from selfdistill import (IMAGENET_MEAN, IMAGENET_STD, HookedModel, SelfDistillationLoss,
                         find_classifier, find_layers, hooked_classifier, hooked_resnet18,
                         load_classifier, to_rgb, train_transform, val_transform)

HERE = Path(__file__).resolve().parent
RESNET18 = ("--arch", "resnet18")
STOPPED = 128 + signal.SIGTERM  # exit code
HAS_CUDA = torch.cuda.device_count() > 0  # unlike is_available, it leaves CUDA to be forked


def setUpModule() -> None:
    """Do not wait for the disk; take the CPU."""
    if START == "forkserver":  # it imports what it shall have while the first tests run
        forkserver.ensure_running()
    for patch in (mock.patch("os.fsync"),  # what tests write need not outlive a power cut
                  mock.patch("torch.cuda.is_available", return_value=False),
                  mock.patch("torch.backends.mps.is_available", return_value=False)):
        patch.start()
        unittest.addModuleCleanup(patch.stop)


def load_tests(loader: object, tests: unittest.TestSuite, pattern: object) -> unittest.TestSuite:
    tests.addTests(doctest.DocTestSuite(selfdistill))
    return tests


def write_images(folder: Path, classes: tuple[str, ...] = ("circle", "square", "star"),
                 train_count: int = 6, val_count: int = 3) -> Path:
    """Write an image folder with so many small drawn shapes a class."""
    for split, count in (("train", train_count), ("val", val_count)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                image = train.draw_shape(name, random.Random(f"{split}{name}{k}"), size=40)
                image.save(folder / split / name / f"{k}.png")
    return folder


def run(main: Callable, *arguments: object, code: int = 0, is_terminal: bool = False) -> str:
    """Run a script with these arguments, to end with this exit code; return what it prints."""
    ended = 0
    with contextlib.redirect_stdout(io.StringIO()) as output:
        output.isatty = lambda: is_terminal
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as error:
            ended = error.code
    if ended != code:
        raise AssertionError(f"it ended with {ended!r}, not {code}: {output.getvalue()}")
    return output.getvalue()


def tiny(data: Path, out: Path, *arguments: object) -> list[str]:
    """The flags of a short run of a small network, unless `arguments` say otherwise."""
    return [str(argument) for argument in
            ("--data", data, "--out", out, "--arch", "mobilenet_v3_small", "--size", 32,
             "--weights", "none", "--epochs", 1, "--batch-size", 18, "--workers", 0,
             "--precision", "fp32", *arguments)]


def checkpoint_of(data: Path, arch: str = "shufflenet_v2_x0_5") -> dict:
    """A best.pt of `write_images`, untrained."""
    return {"model": models.get_model(arch, num_classes=3).state_dict(), "arch": arch,
            "classes": ["circle", "square", "star"], "size": 32, "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD), "epoch": 1, "val_acc": 0.5, "data": str(data),
            "args": {"precision": "fp32", "batch_size": 8}}


def plain_forward(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The published script's logits, student and teacher features of a plain ResNet18."""
    stem = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    student = model.layer2(model.layer1(stem))
    teacher = model.layer4(model.layer3(student))
    return model.fc(model.avgpool(teacher).flatten(1)), student, teacher


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class TestCase(unittest.TestCase):
    """Gives each test a folder of its own, and the check that every wrong input goes through."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name).resolve()
        self.out = self.folder / "out"

    def enter_folder(self) -> None:
        """Make the test's folder the current one, until its end."""
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)

    def error_of(self, main: Callable, *arguments: object) -> str:
        """The one line that a script ends with, at an exit code other than 0."""
        errors = io.StringIO()
        with (mock.patch.object(sys, "argv", ["script.py"]), contextlib.redirect_stderr(errors),
              contextlib.redirect_stdout(io.StringIO()), self.assertRaises(SystemExit) as caught):
            evaluate.run_script(lambda: main([str(argument) for argument in arguments]))
        code = caught.exception.code
        message = code if isinstance(code, str) else errors.getvalue()
        self.assertTrue(code, "the exit code is that of success")
        self.assertEqual(message.strip().count("\n"), 0, message)
        self.assertIn(": error: ", message)
        return message


class TransformTest(TestCase):
    def test_images_of_every_mode_and_shape_become_tensors_of_the_size_asked_for(self) -> None:
        for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"):
            for shape in ((37, 53), (300, 20), (1, 1)):
                for transform in (train_transform(48), val_transform(48)):
                    with self.subTest(mode=mode, shape=shape):
                        tensor = transform(Image.new(mode, shape))
                        self.assertEqual((tensor.shape, tensor.dtype), ((3, 48, 48), torch.float32))

    def test_values_above_8_bits_are_scaled_and_those_of_unknown_range_refused(self) -> None:
        path = self.folder / "image.tif"
        for mode, greatest, expected in (
                ("I;16", 65535, [0, 128, 255]), ("I", 65535, [0, 128, 255]),
                ("I;16", 4095, [0, 128, 255]), ("I;16", 255, [0, 128, 255]), ("I;16", 0, [0]),
                ("I;16", 16383, [0, 32, 64]), ("I", 65536, "pixels from 0 to 65536: save it"),
                ("I", -1, "pixels from -1 to 0"), ("F", 1, "floating-point pixels")):
            with self.subTest(mode=mode, greatest=greatest):
                image = Image.new(mode, (3, 1))
                for x, value in enumerate((0, (greatest + 1) // 2, greatest)):
                    image.putpixel((x, 0), value)
                image.save(path)
                if isinstance(expected, list):
                    self.assertEqual(evaluate.load_image(str(path)).unique().tolist(), expected)
                else:
                    with self.assertRaisesRegex(evaluate.UnreadableImage, f"tif: {expected}"):
                        evaluate.load_image(str(path))

    def test_a_picture_is_seen_upright_wherever_its_file_says_how_it_lies(self) -> None:
        path, exif = self.folder / "turned.jpg", Image.Exif()
        stored = Image.new("RGB", (64, 64))
        stored.paste((255, 255, 255), (32, 0, 64, 64))  # the left half black, the right half white
        exif[ExifTags.Base.Orientation] = 6  # shown turned clockwise: the left side at the top
        for name, flags, segment in (
                ("EXIF", {"exif": exif}, b""),
                ("EXIF after XMP", {"exif": exif}, b"<x:xmpmeta/>"),
                ("XMP alone", {}, b'<x:xmpmeta><a tiff:Orientation="6"/></x:xmpmeta>')):
            stored.save(path, quality=95, **flags)
            if segment:
                segment = b"http://ns.adobe.com/xap/1.0/\0" + segment
                segment = b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment
                path.write_bytes(b"\xff\xd8" + segment + path.read_bytes()[2:])
            with self.subTest(name), Image.open(path) as image:
                for source in (image, to_rgb(image), evaluate.load_image(str(path))):
                    upright = val_transform(64, normalized=False)(source)
                    self.assertLess(upright[:, :24].max(), 20)
                    self.assertGreater(upright[:, 40:].min(), 235)
        path = self.folder / "damaged.png"
        stored.save(path, exif=b"Exif\0\0no TIFF")
        assert_close(evaluate.load_image(str(path))[:1], functional.pil_to_tensor(stored)[:1])

    def test_images_are_turned_as_pillow_does_and_however_odd_their_other_tags_are(self) -> None:
        path, exif = self.folder / "turned.png", Image.Exif()
        stored = functional.to_pil_image(torch.arange(60, dtype=torch.uint8).view(3, 4, 5))
        for orientation in range(10):
            exif[ExifTags.Base.Orientation] = orientation
            stored.save(path, exif=exif)
            with Image.open(path) as image:
                expected = functional.pil_to_tensor(ImageOps.exif_transpose(image))
            assert_close(evaluate.load_image(str(path)), expected)
        tags = ((ExifTags.Base.Orientation, 3, 1, b"\6\0\0\0"),  # 3: a short integer
                (ExifTags.Base.ResolutionUnit, 2, 4, b"odd\0"))  # 2: text, where an integer belongs
        exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(
            struct.pack("<HHI4s", *tag) for tag in tags) + bytes(4)
        stored.save(path, exif=exif)
        turned = functional.pil_to_tensor(stored).rot90(-1, dims=(1, 2))
        assert_close(evaluate.load_image(str(path)), turned)

    def test_memory_is_bounded_by_an_images_own_pixels(self) -> None:
        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, function: Callable, types: tuple, args: tuple = (),
                                   kwargs: dict | None = None) -> object:
                result = function(*args, **kwargs or {})
                sizes.append(result.nbytes if isinstance(result, Tensor) else 0)
                return result

        sizes = []
        for shape in ((3, 1, 30_000), (3, 30_000, 1), (3, 1, 1)):
            for transform in (train_transform(64), val_transform(64)):
                with Sizes():
                    self.assertEqual(transform(torch.zeros(shape, dtype=torch.uint8)).shape,
                                     (3, 64, 64))
        self.assertTrue(64 * 64 < max(sizes) < 2_000_000, "bytes")
        with mock.patch.object(Image, "MAX_IMAGE_PIXELS", 1000):
            for name in ("large.jpg", "large.png"):
                Image.new("RGB", (50, 50)).save(self.folder / name)
                with self.assertRaisesRegex(evaluate.UnreadableImage, f"{name}: .*2500 pixels"):
                    evaluate.load_image(str(self.folder / name))

    def test_they_agree_with_the_published_transforms(self) -> None:
        normalized = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)
        for ours, *theirs in ((train_transform, transforms.RandomResizedCrop(96),
                               transforms.RandomHorizontalFlip()),
                              (val_transform, transforms.Resize(109), transforms.CenterCrop(96))):
            theirs = transforms.Compose([*theirs, transforms.ToTensor()])
            for seed, name in enumerate(train.SHAPES):
                image, results = train.draw_shape(name, random.Random(seed), size=160), []
                for transform in (theirs, ours(96, normalized=False), ours(96)):
                    torch.manual_seed(seed)
                    results.append(transform(image))
                published, unnormalized, ready = results
                self.assertEqual(unnormalized.dtype, torch.uint8)
                self.assertLess((unnormalized / 255 - published).abs().mean().item(), 1 / 255)
                assert_close(ready, normalized(unnormalized / 255))

    def test_val_crops_are_central_and_train_crops_no_smaller_than_the_scale_asks(self) -> None:
        image = ImageOps.expand(Image.new("RGB", (224, 224)), border=16, fill="white")
        self.assertEqual(val_transform(224, normalized=False)(image).unique().tolist(), [0])
        ramp = functional.to_pil_image(torch.arange(256, dtype=torch.uint8).expand(256, 256))
        torch.manual_seed(0)
        for _ in range(50):
            row = train_transform(64, scale=(0.9, 1.0), normalized=False)(ramp)[0, 0].int()
            self.assertGreater(row.max() - row.min(), 0.8 * 255)


class HookedModelTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model = resnet18(num_classes=10)
        self.images = torch.randn(2, 3, 64, 64)

    def test_features_and_logits_are_those_of_the_plain_network(self) -> None:
        for training in (True, False):
            model = copy.deepcopy(self.model).train(training)
            outputs = HookedModel(self.model).train(training)(self.images)
            assert_close(outputs, plain_forward(model, self.images), rtol=0, atol=0)

    def test_one_name_gives_features_and_a_sequence_a_tuple(self) -> None:
        self.model.eval()
        _, shallow, teacher = HookedModel(self.model, "layer1", "layer3.0")(self.images)
        self.assertEqual((shallow.shape, teacher.shape), ((2, 64, 16, 16), (2, 256, 4, 4)))
        _, deeper, _ = HookedModel(self.model, "layer2")(self.images)
        for names, expected in ((["layer1"], (shallow,)),
                                (("layer1", "layer2"), (shallow, deeper))):
            _, students, _ = HookedModel(self.model, names)(self.images)
            self.assertIsInstance(students, tuple)
            assert_close(students, expected)

    def test_a_wrong_name_lists_close_matches(self) -> None:
        for *names, message in (("layer2.l", r"no layer 'layer2.l' in ResNet.*layer2\.1"),
                                (("layer1", "layer2.l"), "no layer 'layer2.l'"),
                                (("layer1", "layer1"), "different layers, got .'layer1', 'lay"),
                                ("layer2.1", "", "no layer ''")):
            with self.assertRaisesRegex(ValueError, message):
                HookedModel(self.model, *names)

    def test_a_layer_without_one_lasting_feature_is_refused(self) -> None:
        self.model.unused = nn.Identity()
        for layer, message in (("unused", "took no part"), ("layer2.1.relu", "more than once"),
                               ("layer2.1.bn1", "changed in place"),
                               ("layer2.1.bn2", "changed in place")):
            with self.assertRaisesRegex(RuntimeError, f"'{layer}'.* {message}"):
                HookedModel(self.model, layer)(self.images)

    def test_a_copy_has_hooks_of_its_own(self) -> None:
        for duplicate_of in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
            original = HookedModel(self.model).eval()
            duplicate = duplicate_of(original)
            original.remove_hooks()
            nn.init.zeros_(duplicate.model.layer2[1].bn2.weight)
            nn.init.constant_(duplicate.model.layer2[1].bn2.bias, 3.0)
            _, student, _ = duplicate(self.images)
            self.assertGreaterEqual(student.min(), 3.0)  # relu(3 + what the shortcut brings)
            duplicate.remove_hooks()
            self.assertFalse(any(module._forward_hooks for module in duplicate.modules()))

    def test_wrapping_again_and_again_leaves_no_hook_behind(self) -> None:
        for _ in range(3):
            with HookedModel(self.model) as first, HookedModel(self.model, "layer1") as second:
                assert_close(first(self.images)[2], second(self.images)[2])
            first.remove_hooks()
            self.assertFalse(any(module._forward_hooks for module in self.model.modules()))
        with self.assertRaisesRegex(RuntimeError, "hook has been removed; torch.compile the Hook"):
            first(self.images)

    def test_calls_in_several_threads_keep_their_features_apart(self) -> None:
        hooked, barrier = HookedModel(self.model).eval(), threading.Barrier(4, timeout=60)
        batches = [torch.randn(1 + k, 3, 32, 32) for k in range(4)]
        expected = [hooked(images) for images in batches]
        # All have passed the student's layer before any reaches the teacher's.
        self.model.layer3.register_forward_pre_hook(lambda *_: (barrier.wait(), None)[1])
        with ThreadPool(4) as pool:
            assert_close(pool.map(hooked, batches, chunksize=1), expected)

    def test_no_feature_outlives_the_step_nor_do_live_tensors_grow(self) -> None:
        hooked, criterion, counts = HookedModel(self.model), SelfDistillationLoss(), []
        optimizer = torch.optim.SGD([*hooked.parameters(), *criterion.parameters()], lr=0.01,
                                    momentum=0.9)
        for step in range(6):
            logits, *features = hooked(self.images)
            optimizer.zero_grad()
            criterion(logits, torch.tensor([1, 2]), *features).backward()
            optimizer.step()
            kept = [weakref.ref(tensor) for tensor in (logits, *features)]
            del logits, features
            self.assertEqual([tensor() for tensor in kept], [None] * 3)
            if step in (1, 5):
                gc.collect()
                counts.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
        self.assertLessEqual(counts[1], counts[0])

    def test_layers_that_suit_a_network_are_found(self) -> None:
        vit = models.VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=16)
        for model, stem, students, teacher, channels, classifier in (
                ("resnet18", "", ("layer2", "layer3"), "layer4", (128, 512), "fc"),
                ("mobilenet_v3_small", "features", (".3", ".8"), "", (24, 576), "classifier.3"),
                ("convnext_tiny", "features", (".3", ".5"), "", (192, 768), "classifier.2"),
                ("densenet121", "features.denseblock", "23", "4", (512, 1024), "classifier"),
                ("shufflenet_v2_x1_0", "", ("stage2", "stage3"), "conv5", (116, 1024), "fc"),
                ("squeezenet1_1", "", ("features.4", "features.7"), "features", (128, 512),
                 "classifier.1"),
                ("swin_v2_t", "", ("features.3", "features.5"), "permute", (192, 768), "head"),
                (vit, "encoder.layers.encoder_layer_", "12", "3", (16, 16), "heads.head")):
            with self.subTest(stem=stem, classifier=classifier):
                size = 32 if model is vit else 224
                with torch.device("meta"):  # shapes alone
                    model = vit if model is vit else models.get_model(model)
                students, teacher = tuple(stem + name for name in students), stem + teacher
                self.assertEqual(find_layers(model, size), (students[0], teacher))
                self.assertEqual(find_layers(model, size, students=2), (students, teacher))
                self.assertEqual(find_classifier(model), classifier)
                hooked = HookedModel(model, students[0], teacher)
                self.assertEqual(hooked.feature_channels(size), channels)
                self.assertFalse(any(len(part._forward_hooks) > (name in hooked.layer_names)
                                     for name, part in model.named_modules()))
        self.assertEqual(hooked_classifier("resnet18", 3, "none", students=3).layer_names,
                         ("layer1", "layer2", "layer3", "layer4"))
        with self.assertRaisesRegex(ValueError, r"must name different layers, got \(\)"):
            HookedModel(model, ())
        with self.assertRaisesRegex(ValueError, "no 2 layers of Sequential .* names, of 0, 1$"):
            find_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)), size=32)
        with self.assertRaisesRegex(ValueError, "no 2 layers of Sequential"):
            find_layers(nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3)), size=32)

    def test_layers_are_found_by_their_use_not_by_their_place_in_the_class(self) -> None:
        class Network(nn.ModuleDict):
            def forward(self, images: Tensor) -> Tensor:
                for conv in self.convs:
                    images = self.pool(conv(images))
                return self.head(images.mean(dim=(2, 3)))

        convs = nn.Sequential(*(nn.Conv2d(count, 4, 3, padding=1) for count in (3, 4, 4, 4)))
        network = Network({"head": nn.Linear(4, 2), "pool": nn.MaxPool2d(2), "convs": convs})
        self.assertEqual(find_layers(network, 32, students=2), (("convs.1", "convs.2"), "convs.3"))
        HookedModel(network, *find_layers(network, 32))(torch.randn(2, 3, 32, 32))

    def test_channels_may_be_last_but_the_images_must_be_first(self) -> None:
        moved = torchvision.ops.Permute((0, 2, 3, 1))
        network = nn.Sequential(nn.Conv2d(3, 4, 8, 8), moved, nn.Flatten(1, 2), nn.Flatten(0, 1))
        self.assertEqual(HookedModel(network, ["0", "1"], "2").feature_channels(24), ((4, 4), 4))
        _, features, _ = HookedModel(network, ["0", "1"], "2")(torch.randn(3, 3, 24, 24))
        assert_close(*features)
        assert_close(selfdistill.channels_first(moved(features[0])), features[0])
        for channels, height, width, may_be_last in ((16, 64, 128, False), (32, 128, 64, False),
                                                     (32, 64, 128, True), (64, 128, 64, True)):
            with self.subTest(channels=channels, height=height, width=width):
                layers = nn.Conv2d(3, channels, 4, 4), moved, nn.Flatten()
                features = HookedModel(nn.Sequential(*layers), ["0", "1"], "2")(
                    torch.randn(2, 3, height, width))[1]
                self.assertEqual(features[0].shape, (2, channels, height // 4, width // 4))
                if may_be_last:  # there are more of them than rows
                    assert_close(*features)
        unpadded = torch.randn(2, 6, 24, 108)  # of 28 x 112 pixels, convolved by 5 x 5
        self.assertIs(selfdistill.channels_first(unpadded, 28 / 112), unpadded)
        rounded = torch.randn(2, 16, 8, 24)  # of 128 x 60 pixels, of which strides of 8 make 7.5
        self.assertEqual(selfdistill.channels_first(rounded, 128 / 60).shape, (2, 24, 16, 8))
        with self.assertRaisesRegex(ValueError, r"layer '3' gives .*\(18, 4\), which are nei"):
            HookedModel(network, "0", "3").feature_channels(24)
        with self.assertRaisesRegex(ValueError, r"layer '1' gives .*\(2, 5, 5, 4\), which are"):
            HookedModel(network, "0", "1").feature_channels(40)  # fewer channels than rows
        network = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveMaxPool2d(1, return_indices=True))
        with self.assertRaisesRegex(ValueError, "layer '1' gives features of the shape tuple"):
            HookedModel(network, "1", "0").feature_channels(24)

    def test_the_dry_run_leaves_the_network_as_it_was(self) -> None:
        hooked = HookedModel(self.model).train()
        self.model.layer1.eval()
        before = copy.deepcopy(self.model.state_dict())
        self.assertEqual(hooked.feature_channels(), (128, 512))
        assert_close(self.model.state_dict(), before, rtol=0, atol=0)
        self.assertFalse(self.model.layer1[0].bn1.training)
        self.assertTrue(self.model.layer2[0].bn1.training)


class WeightsTest(TestCase):
    def test_networks_have_the_classes_and_layers_asked_for(self) -> None:
        self.assertEqual(hooked_resnet18(7, "none").model.fc.out_features, 7)
        mobilenet = hooked_classifier("mobilenet_v3_small", 10, "none")
        self.assertEqual(mobilenet.layer_names, ("features.3", "features"))
        for students, layers in ((1, ("layer2.1",)), (2, ("layer2.1", "layer3.1"))):
            hooked = hooked_classifier("resnet18", 10, "none", students=students)
            self.assertEqual(hooked.layer_names, (*layers, "layer4.1"))
        for student, teacher, message in (([], None, "must name different layers, got \\[\\]"),
                                          (None, "", "no layer ''")):
            with self.assertRaisesRegex(ValueError, message):
                hooked_classifier("resnet18", 10, "none", student, teacher)

    def test_imagenet_weights_get_a_new_classifier(self) -> None:
        checkpoints = self.folder / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        for arch, new in (("resnet18", {"fc.weight", "fc.bias"}),
                          ("mobilenet_v3_small", {"classifier.3.weight"})):  # its bias begins at 0
            pretrained, url = models.get_model(arch), models.get_model_weights(arch).DEFAULT.url
            torch.save(pretrained.state_dict(), checkpoints / url.rpartition("/")[2])
            with mock.patch.dict(os.environ, TORCH_HOME=str(self.folder)):
                self.assertEqual(len([*hooked_classifier(arch, 10).parameters()][-1]), 10)
                state = hooked_classifier(arch, 1000).model.state_dict()
            self.assertEqual({name for name, value in pretrained.state_dict().items()
                              if not torch.equal(value, state[name])}, new)

    def test_what_is_no_classifier_is_refused(self) -> None:
        for arch, classes, message in (("resnet81", 9,
                                        "no classifier 'resnet81' .*; did you mean resnet18, "),
                                       ("fcn_resnet50", 9, "no classifier 'fcn_resnet50'"),
                                       ("inception_v3", 9, "returns more than logits"),
                                       ("resnet18", 0, "at least 1, got 0")):
            with self.assertRaisesRegex(ValueError, message), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a slow initialisation
                hooked_classifier(arch, classes, "none")

    def test_a_file_keeps_its_classifier_only_if_that_fits(self) -> None:
        path, arch, layers = self.folder / "weights.pth", "shufflenet_v2_x0_5", ("stage2", "conv5")
        saved = models.get_model(arch, num_classes=5)
        state = saved.state_dict()
        for content in (state, {"model": state}, {"state_dict": state, "epoch": 3},
                        *({prefix + name: value for name, value in state.items()}
                          for prefix in ("module.", "_orig_mod.", "module._orig_mod."))):
            torch.save(content, path)
            same, other = (hooked_classifier(arch, count, path, *layers).model for count in (5, 6))
            assert_close(same.state_dict(), saved.state_dict())
            assert_close(other.conv1.state_dict(), saved.conv1.state_dict())
            self.assertEqual(other.fc.out_features, 6)

    def test_a_trained_classifier_is_loaded_for_use(self) -> None:
        checkpoint = checkpoint_of(self.folder)
        plain = models.shufflenet_v2_x0_5(num_classes=3).eval()
        torch.save(checkpoint, self.folder / "best.pt")
        plain.load_state_dict(checkpoint["model"])
        image = train.draw_shape("star", random.Random(0)).convert("L")
        for source in (self.folder / "best.pt", checkpoint):
            model, classes, transform = load_classifier(source)
            self.assertEqual(classes, ["circle", "square", "star"])
            assert_close(model(transform(image)[None]), plain(val_transform(32)(image)[None]))

    def test_what_train_did_not_write_is_refused(self) -> None:
        sound, path = checkpoint_of(self.folder), self.folder / "best.pt"
        for changes, message in (
                *(({key: None}, f"not a checkpoint of train.py: no '{key}'")
                  for key in ("model", "arch", "classes", "size")),
                ({"arch": "fcn_resnet50"}, "no classifier 'fcn_resnet50'"),
                ({"arch": "mobilenet_v3_small"}, "does not hold a classifier.*Missing key"),
                *(({"size": size}, f"its image size is {size!r}") for size in ("large", 0, 10_001)),
                ({"classes": ["a", "b"]}, "does not hold a classifier.*size mismatch")):
            content = {key: value for key, value in (sound | changes).items() if value is not None}
            torch.save(content, path)
            for source in (path, content):
                with self.subTest(message), self.assertRaisesRegex(ValueError, message):
                    load_classifier(source)
        with self.assertRaises(OSError):
            load_classifier(self.folder / "missing.pt")


class LossTest(unittest.TestCase):
    """One student channel, [[1, 2], [3, 6]], of mean 3, and a teacher of two channels, (2, 1),
    adapted to 0.5 * 2 - 1 * 1 + 0.25 = 0.25: the distance is (3 - 0.25)^2 = 7.5625.

    Logits (0, ln 3) give the right class 3/4: the cross-entropy is ln 4/3, and, smoothed by 0.2,
    0.9 of -ln 3/4 and 0.1 of -ln 1/4. The early classifier makes (0, ln 3) of the mean 3, which
    diverges by (ln 2) / 2 + (ln 2/3) / 2 from the output of even logits, (1/2, 1/2).
    """
    DISTANCE, CROSS_ENTROPY, SMOOTHED = 7.5625, 0.2876821, 0.3975433
    EVEN, DIVERGENCE = math.log(2), math.log(2 / 3 ** 0.5)

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
        self.even = torch.zeros(1, 2, requires_grad=True)
        self.student = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]], requires_grad=True)
        self.teacher = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
        self.rest = (torch.tensor([1]), self.student, self.teacher)

    def make(self, **options: float) -> SelfDistillationLoss:
        criterion = SelfDistillationLoss(student_channels=1, teacher_channels=2, num_classes=2,
                                         **options)
        values = {"adapter.weight": [0.5, -1.0], "adapter.bias": [0.25],
                  "classifiers.0.weight": [0, math.log(3.0) / 3], "classifiers.0.bias": [0.0, 0.0]}
        criterion.load_state_dict({name: torch.tensor(values[name]).view_as(parameter)
                                   for name, parameter in criterion.named_parameters()})
        return criterion

    def test_all_terms_by_hand_and_the_published_formula_by_default(self) -> None:
        half = 0.5 * self.CROSS_ENTROPY + 0.5 * self.DISTANCE
        odds = 3 ** (1 / 3)  # at temperature 3, softmax(0, ln 3 / 3) = (1, odds) / (1 + odds)
        soft = {"alpha": 1.0, "hint": 0.0, "soft": 1.0}
        for logits, options, expected in (
                (self.logits, {}, half), (self.logits, {"alpha": 0.0}, self.CROSS_ENTROPY),
                (self.logits, {"alpha": 1.0}, self.DISTANCE),
                (self.logits, {"alpha": 0.0, "label_smoothing": 0.2}, self.SMOOTHED),
                (self.even, {"hint": 0.0, "labels": 1.0, "label_smoothing": 0.2},
                 (self.EVEN + self.SMOOTHED) / 2),
                (self.even, {"hint": 0.0, "labels": 1.0, "alpha": 0.25},
                 0.75 * self.EVEN + 0.25 * self.CROSS_ENTROPY),
                (self.even, soft | {"temperature": 1.0}, self.DIVERGENCE),
                (self.even, soft | {"temperature": 1.0, "labels": 0.75, "soft": 0.25},
                 0.75 * self.CROSS_ENTROPY + 0.25 * self.DIVERGENCE),
                (self.even, soft, 9 * (math.log((1 + odds) / 2) - 0.5 * math.log(odds))),
                (self.logits, soft, 0.0)):  # the early classifier makes the same logits
            for detach in ({}, {"detach_teacher": True}):
                with self.subTest(options):
                    criterion = self.make(**options, **detach)
                    for count in (1, 2):  # of one image: the loss is a mean
                        batch = [part.repeat_interleave(count, 0) for part in (logits, *self.rest)]
                        assert_close(criterion(*batch), torch.tensor(expected))

    def test_weighted_terms_by_name_add_up_to_the_loss(self) -> None:
        weights = {"cross_entropy": 0.75, "hint": 0.5, "labels": 0.2, "soft": 0.125}
        values = {"cross_entropy": self.EVEN, "hint": self.DISTANCE, "labels": self.CROSS_ENTROPY,
                  "soft": self.DIVERGENCE}
        for absent in ("none", "hint", "labels", "soft"):
            given = {name: 0.0 if name == absent else value for name, value in
                     (("hint", 2.0), ("labels", 0.8), ("soft", 0.5))}
            criterion = self.make(alpha=0.25, temperature=1.0, **given)
            present = {name: weight for name, weight in weights.items() if name != absent}
            assert_close(criterion.weights, present)
            terms = criterion.terms(self.even, *self.rest)
            assert_close(terms, {name: torch.tensor(weight * values[name])
                                 for name, weight in present.items()})
            assert_close(criterion(self.even, *self.rest), sum(terms.values()))

    def test_several_layers_add_up_and_share_one_teacher(self) -> None:
        options = {"teacher_channels": 6, "normalize": True, "hint": 0.7, "labels": 0.6,
                   "soft": 0.4, "num_classes": 4}
        students = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
        teacher, rest = torch.randn(2, 6, 2, 2), (torch.randn(2, 4), torch.tensor([0, 3]))
        both, parts = SelfDistillationLoss(0.5, (3, 5), **options), []
        for k, features in enumerate(students):
            single = SelfDistillationLoss(0.5, features.shape[1], **options)
            single.adapter.load_state_dict(both.adapters[k].state_dict())
            single.classifiers[0].load_state_dict(both.classifiers[k].state_dict())
            parts.append(single.terms(*rest, features, teacher))
            assert_close(both.early_logits(students)[k],
                         single.classifiers[0](features.mean(dim=(2, 3))))
        expected = {name: parts[0][name] + parts[1][name] for name in ("hint", "labels", "soft")}
        assert_close(both.terms(*rest, students, teacher),
                     {"cross_entropy": parts[0]["cross_entropy"]} | expected)
        one = SelfDistillationLoss(student_channels=[8])
        self.assertEqual((len(one.adapters), len(one.classifiers)), (1, 0))

    def test_normalised_features_are_compared_by_direction(self) -> None:
        # (3, 4) becomes (0.6, 0.8), and (5, 0) becomes (1, 0): 0.4^2 + 0.8^2 = 0.8
        for channels in (2, 8):
            criterion = SelfDistillationLoss(1.0, channels, channels, normalize=True)
            nn.init.dirac_(criterion.adapter.weight)
            nn.init.zeros_(criterion.adapter.bias)
            vectors = torch.zeros(4, channels, 1, 1)
            vectors[:, :2, 0, 0] = torch.tensor([[3.0, 4.0], [5.0, 0.0], [-6.0, -8.0], [0.3, 0.4]])
            for teacher, expected in zip(vectors[1:], (0.8, 4.0, 0.0)):
                for size, scale, other in ((1, 1.0, 1.0), (4, 1.0, 1.0), (1, 1e-30, 1e30),
                                           (2, 1e30, 1e-30), (1, 1e30, 1e30)):
                    loss = criterion(self.logits, torch.tensor([1]),
                                     scale * vectors[:1].repeat(1, 1, 2 * size, 2 * size),
                                     other * teacher[None].repeat(1, 1, size, size))
                    assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-6)

    def test_features_of_no_length_or_an_extreme_one_give_no_nan(self) -> None:
        criterion = SelfDistillationLoss(1.0, 2, 2, normalize=True)
        for scale, bias in itertools.product((0.0, 1e-44, 1e-30, 1e30, 1e38), (0.0, 1.0)):
            nn.init.constant_(criterion.adapter.bias, bias)  # at 0 what it makes may be 0, too
            maps = [torch.full((1, 2, size, size), scale, requires_grad=True) for size in (4, 2)]
            loss = criterion(self.logits, torch.tensor([1]), *maps)
            self.assertTrue(0 <= loss.item() <= 4)
            for gradient in torch.autograd.grad(loss, [*maps, *criterion.parameters()]):
                self.assertFalse(gradient.isnan().any(), (scale, bias))

    def test_tokens_are_positions_in_every_term(self) -> None:
        criterion = SelfDistillationLoss(0.5, 4, 6, labels=0.5, soft=0.5, num_classes=3)
        student, teacher = torch.randn(2, 15, 4), torch.randn(2, 10, 6)  # (N, L, C)
        rest = torch.randn(2, 3), torch.tensor([0, 2])
        assert_close(criterion.terms(*rest, student, teacher),
                     criterion.terms(*rest, student.mT[..., None], teacher.mT[..., None]))
        assert_close(criterion.early_logits(student),
                     criterion.early_logits(student.mT.unflatten(2, (3, 5))))

    def test_gradients_by_hand_and_none_at_a_detached_teacher(self) -> None:
        # alpha * 2 * (3 - 0.25) = 2.75 at the resized student; a quarter of it at each pixel
        for detach in (True, False):
            self.logits.grad = self.student.grad = None
            criterion = self.make(detach_teacher=detach)
            criterion(self.logits, *self.rest).backward()
            assert_close(self.student.grad, torch.full((1, 1, 2, 2), 0.6875))
            assert_close(criterion.adapter.weight.grad.flatten(), torch.tensor([-5.5, -2.75]))
            assert_close(self.logits.grad, torch.tensor([[0.125, -0.125]]))
            self.assertEqual(self.teacher.grad is None, detach)
        assert_close(self.teacher.grad.flatten(), torch.tensor([-1.375, 2.75]))

    def test_gradients_of_maps_in_channels_last_are_so_too(self) -> None:
        student, teacher = (torch.randn(2, channels, size, size).to(
                                memory_format=torch.channels_last).requires_grad_()
                            for channels, size in ((3, 8), (5, 4)))
        for options in ({"hint": 1.0}, {"hint": 1.0, "normalize": True}, {"labels": 1.0},
                        {"soft": 1.0}):
            criterion = SelfDistillationLoss(0.5, 3, 5, num_classes=4, **{"hint": 0.0} | options)
            loss = criterion(torch.randn(2, 4), torch.tensor([0, 3]), student, teacher)
            gradient, = torch.autograd.grad(loss, student)
            self.assertTrue(gradient.is_contiguous(memory_format=torch.channels_last), options)

    def test_the_distance_is_at_least_in_fp32(self) -> None:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            criterion = self.make(alpha=1.0).to(dtype)
            nn.init.zeros_(criterion.adapter.weight)
            student = torch.full((1, 1, 2, 2), 384.25, dtype=dtype)  # squared, too large for fp16
            loss = criterion(self.logits, torch.tensor([1]), student, self.teacher.to(dtype))
            difference = student.mean().double() - 0.25
            assert_close(loss, (difference ** 2).to(torch.promote_types(dtype, torch.float32)))

    def test_early_terms_move_the_early_features_and_not_the_logits(self) -> None:
        for options in ({"labels": 1.0}, {"soft": 1.0}):
            self.student.grad, criterion = None, self.make(alpha=1.0, hint=0.0, **options)
            criterion(self.even, *self.rest).backward()
            assert_close(self.even.grad, torch.zeros(1, 2))
            self.assertGreater(self.student.grad.abs().min(), 0)
            self.assertGreater(criterion.classifiers[0].weight.grad.abs().max(), 0)

    def test_a_value_out_of_range_is_refused_and_shown(self) -> None:
        for name, value in (
                ("alpha", -0.1), ("alpha", 1.5), ("alpha", math.nan), ("hint", -1.0),
                ("labels", -0.5), ("soft", -0.1), ("temperature", 0.0), ("label_smoothing", 2.0),
                ("student_channels", 0), ("student_channels", (8, 0)), ("student_channels", ()),
                ("teacher_channels", -3), ("num_classes", 0), ("num_classes", None)):
            shown = 0 if name in ("student_channels", "num_classes") else re.escape(str(value))
            shown = f"{name} must lie between .*, got {shown}$"
            for needs_classes in ("labels", "soft"):
                with self.subTest(name), self.assertRaisesRegex(ValueError, shown):
                    SelfDistillationLoss(**{"num_classes": 10, needs_classes: 1.0} | {name: value})

    def test_features_of_another_shape_or_number_are_refused_and_shown(self) -> None:
        early, student, teacher = {"hint": 0.0, "labels": 1.0}, self.student, self.teacher
        for options, features, message in (
                ({}, (student, student), r"teacher .*\(N, 2, H, W\) .*got \(1, 1, 2, 2\)"),
                ({}, (student[0, 0], teacher), r"student features .*got \(2, 2\)"),
                ({}, (teacher, teacher), r"student .*\(N, 1, H, W\)"),
                (early, (teacher, teacher), r"student .*\(N, L, 1\), got \(1, 2, 1, 1\)"),
                ({}, ([student] * 2, teacher), "1 student features .* got 2")):
            with self.assertRaisesRegex(ValueError, message):
                self.make(**options)(self.logits, torch.tensor([1]), *features)


class DataTest(TestCase):
    def test_every_image_comes_once_an_epoch_in_batches_of_like_size(self) -> None:
        for count, batch_size, sizes in ((65, 64, [33, 32]), (10, 4, [4, 3, 3]), (1, 8, [1])):
            sampler = train.EpochBatches(count, batch_size, seed=0)
            batches = list(sampler)
            self.assertEqual([len(batch) for batch in batches], sizes)
            self.assertEqual([sampler.size(k) for k in range(len(sampler))], sizes)
            self.assertEqual(sorted(index for batch in batches for index, _ in batch),
                             list(range(count)))
            sampler.start = 1
            self.assertEqual(list(sampler), batches[1:])

    def test_order_and_augmentation_change_with_epoch_and_seed(self) -> None:
        def epoch_of(seed: int, epoch: int) -> tuple[list[int], list[float]]:
            batches = train.EpochBatches(100, 10, seed)
            batches.epoch = epoch
            items = list(itertools.chain.from_iterable(batches))
            # Seeds are compared through the generator, which may not use all of their bits.
            draws = [torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
                     for _, seed in sorted(items)]
            return [index for index, _ in items], draws

        order, draws = epoch_of(0, 0)
        self.assertEqual(epoch_of(0, 0), (order, draws))
        for other_order, other_draws in (epoch_of(0, 1), epoch_of(1, 0)):
            self.assertNotEqual(order, other_order)
            self.assertLess(sum(a == b for a, b in zip(draws, other_draws)), 5)

    def test_augmentation_depends_on_index_and_seed_alone(self) -> None:
        folder = evaluate.ImageFolder(write_images(self.folder) / "train", None)
        data = train.Augmented(folder, train_transform(32, normalized=False))
        state = torch.get_rng_state()
        first, label = data[4, 7]
        assert_close(torch.get_rng_state(), state)
        torch.rand(5)
        self.assertEqual((first.shape, first.dtype, label), ((32, 32, 3), torch.uint8, 0))
        assert_close(data[4, 7][0], first, rtol=0, atol=0)
        self.assertFalse(torch.equal(data[4, 8][0], first))

    def test_shapes_are_the_same_each_time_no_two_alike_and_within_the_image(self) -> None:
        drawn, again = ([train.draw_shape(name, random.Random(k)).tobytes()
                         for name in train.SHAPES for k in range(3)] for _ in range(2))
        self.assertEqual(drawn, again)
        self.assertEqual(len(set(drawn)), 30)
        for name, outline in train.SHAPES.items():
            radii = [outline(2 * math.pi * k / 360) for k in range(360)]
            self.assertTrue(0 <= min(radii) <= max(radii) <= 1 + 1e-9, name)
            with mock.patch("PIL.ImageDraw.ImageDraw.polygon") as polygon:
                train.draw_shape(name, random.Random(0), size=64)
            points = torch.tensor(polygon.call_args.args[0])
            self.assertTrue(0 <= points.min() <= points.max() <= 4 * 64, name)

    def test_a_jpeg_is_read_as_pillow_reads_it(self) -> None:
        path = self.folder / "image.jpg"
        for mode in ("RGB", "L", "CMYK"):
            for progressive in (False, True):
                picture = train.draw_shape("star", random.Random(0)).convert(mode)
                picture.save(path, progressive=progressive)
                with Image.open(path) as image:
                    expected = functional.pil_to_tensor(to_rgb(image))
                assert_close(evaluate.load_image(str(path)), expected)
                with mock.patch.object(torchvision.io, "decode_jpeg", side_effect=AttributeError):
                    assert_close(evaluate.load_image(str(path)), expected)

    def test_a_missing_imagenette_is_downloaded_whole_or_not_at_all(self) -> None:
        def download(root: str, **_: object) -> None:
            for split in ("train", "val"):
                Path(root, folder.name, split, "n01440764").mkdir(parents=True)

        folder = self.folder / "new" / "imagenette2-160"
        find_data = partial(run, lambda _: train.find_data(str(folder)))
        with (mock.patch.object(datasets, "Imagenette", side_effect=URLError("no route")),
              self.assertRaisesRegex(evaluate.UserError, "imagenette2-160.tgz and unpack it as")):
            find_data()
        self.assertEqual(list(folder.parent.iterdir()), [])
        with mock.patch.object(datasets, "Imagenette", download):
            find_data()
        self.assertEqual([*train.find_data(str(folder)).values()], [folder / "train",
                                                                    folder / "val"])
        self.assertEqual(list(folder.parent.iterdir()), [folder])
        for name, size in (("imagenette2", "full"), ("imagenette2-320", "320px"),
                           ("imagenette2-160", "160px")):
            folder = self.folder / name
            with (mock.patch.object(datasets, "Imagenette", side_effect=OSError) as download,
                  self.assertRaises(evaluate.UserError)):
                find_data()
            self.assertEqual(download.call_args.kwargs, {"size": size, "download": True})

    def test_splits_are_found_in_folders_of_every_kind(self) -> None:
        for kind, folders, expected in (
                ("both", ["train/a", "val/a"], {"train": "train", "val": "val"}),
                ("deeper", ["x/train/a", "x/val/a", "y/a"], {"train": "x/train", "val": "x/val"}),
                ("flat", ["a", "b"], {"all": "."}), ("train", ["train/a"], {"train": "train"}),
                ("val", ["val/a"], {"val": "val"}), ("named test", ["a", "test"], {"all": "."}),
                ("capitals", ["Train/a", "VAL/a"], {"train": "Train", "val": "VAL"}),
                ("vehicles", ["bus", "train", "train/.hidden"], {"all": "."}),
                ("hidden", ["a", ".old/train/a", ".old/val/a"], {"all": "."}),
                ("sets", ["training_set/a", "test2017/a"], {"all": "."}),
                ("classes", ["train_ice", "train_tgv"], {"all": "."}),
                ("tested", ["Train/a", "Test/a"], {"train": "Train"}),
                ("beside", ["train/a", "bus", "car"], {"train": "train"}),
                ("valid", ["train/a", "valid/a"], {"train": "train"}),
                ("two", ["x/train/a", "x/val/a", "y/train/a", "y/val/a"], "several folders .*/x, "),
                ("none", [], "does not exist")):
            with self.subTest(kind):
                for folder in folders:
                    (self.folder / kind / folder).mkdir(parents=True)
                if isinstance(expected, dict):
                    self.assertEqual(evaluate.find_splits(self.folder / kind), {
                        split: self.folder / kind / path for split, path in expected.items()})
                else:
                    with self.assertRaisesRegex(evaluate.UserError, expected):
                        evaluate.find_splits(self.folder / kind)
        for kind, message in (("valid", "train/ and valid/ but no val/: rename "),
                              ("tested", "Train/ and Test/ but no val/: rename .*tested/Test to "),
                              ("val", "has val/ but no train/: it"),
                              ("sets", "no class folders but test2017, training_set, splits by")):
            with self.assertRaisesRegex(evaluate.UserError, message):
                train.find_data(self.folder / kind)
        for kind, note in (("classes", ""), ("train", ""), ("beside", ".* not read: bus, car\n")):
            self.assertRegex(run(lambda _: train.find_data(self.folder / kind)), f"^{note}$")

    def test_val_is_split_off_by_content_alone(self) -> None:
        def sides(folder: Path, fraction: float = 0.5) -> dict[str, bool]:
            parts = evaluate.split_off(evaluate.ImageFolder(folder, None), fraction)
            return {path.removeprefix(f"{folder}/"): part is parts[1]
                    for part in parts for path in part.paths}

        folder = write_images(self.folder, train_count=12) / "train"
        before = sides(folder)
        self.assertEqual(len(before), 36)
        self.assertTrue(8 < sum(before.values()) < 28)
        shutil.copy(folder / "star" / "3.png", folder / "circle" / "copy.png")
        (folder / "star" / "4.png").rename(folder / "star" / "renamed.png")
        after = sides(folder)
        self.assertEqual(after.pop("circle/copy.png"), before["star/3.png"])
        self.assertEqual(after.pop("star/renamed.png"), before.pop("star/4.png"))
        self.assertEqual(after, before)
        for fraction, in_val in ((1e-9, 1), (1 - 1e-9, 11)):  # or all would be on one side
            found = sides(self.folder / "train", fraction)
            self.assertEqual([sum(found[f"square/{k}.png"] for k in range(12))], [in_val])
        for path in (folder / "star").iterdir():
            shutil.copy(folder / "star" / "0.png", path) if path.name != "0.png" else None
        with self.assertRaisesRegex(evaluate.UserError, "fewer than two different images of star"):
            sides(folder)
        low, *_, middle, high = sorted((str(k).encode() for k in range(9)),
                                       key=lambda content: hashlib.sha256(content).digest())
        shared = self.folder / "shared"
        for name, contents in (("a", (middle, high)), ("b", (middle, low))):
            (shared / name).mkdir(parents=True)
            for k, content in enumerate(contents):
                (shared / name / f"{k}.png").write_bytes(content)
        # One of a must go to val: not the lower one, as b would then have none to train on.
        self.assertEqual(sides(shared), {"a/0.png": False, "a/1.png": True,
                                         "b/0.png": False, "b/1.png": True})
        shutil.copytree(shared / "a", shared / "c")
        (shared / "c" / "0.png").unlink()
        with self.assertRaisesRegex(evaluate.UserError, "images of a, c that no other"):
            sides(shared)

    def test_each_image_is_found_once_through_links_and_what_is_no_image_is_told(self) -> None:
        write_images(self.folder / "elsewhere", train_count=2, val_count=1)
        folder = self.folder / "train"
        (folder / "star" / ".thumbnails").mkdir(parents=True)
        for name in ("star/.thumbnails/0.png", "star/._0.png", "star/0.HEIC", "star/1.heic",
                     "star/notes", ".hidden", "loose.jpg", "star/0.JPG", "star/2.gif",
                     "star/3.jfif"):
            (folder / name).write_bytes(b"")
        for link, target in (("circle", "elsewhere/train/circle"), ("star/deep", "elsewhere"),
                             ("star/back", "train"), ("star/up", "."), ("star/self", "train/star"),
                             ("star/again", "elsewhere/val")):
            (folder / link).symlink_to(self.folder / target)
        note = f"note: left out of {folder}, files and folders: "
        with contextlib.redirect_stdout(io.StringIO()) as output:
            data = evaluate.ImageFolder(folder, None)
            data.tell()
            named = evaluate.find_named([str(folder), str(folder / "star" / "0.JPG")])
        names = [path.removeprefix(f"{folder}/") for path in data.paths]
        self.assertEqual(names[:5], ["circle/0.png", "circle/1.png", "star/0.JPG", "star/2.gif",
                                     "star/3.jfif"])
        self.assertEqual(names[5:], [f"star/{name}/0.png" for name in (
            "again/circle", "again/square", "again/star")] + [
            f"star/deep/train/{name}/{k}.png" for name in ("square", "star") for k in (0, 1)])
        self.assertEqual(data.targets, [0] * 2 + [1] * 10)
        self.assertEqual(sorted(map(os.path.realpath, named)),
                         sorted(map(os.path.realpath, [*data.paths, folder / "loose.jpg"])))
        kinds = "2 .heic, 1 hidden folder(s), 1 beside the class folders, 1 without suffix"
        self.assertEqual(output.getvalue().splitlines(),
                         [note + kinds, f"note: in {folder}, folders inside a class folder are not "
                          "classes, but count as part of it: in star",
                          note + "2 .heic, 1 hidden folder(s), 1 without suffix"])

    def test_class_folders_that_cannot_be_used(self) -> None:
        for name in ("twice/cafe\u0301", "twice/caf\u00e9", "broken", "locked/star"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "broken" / "gone").symlink_to("nowhere")
        denied = PermissionError(13, "Permission denied", "star")
        for name, message in (("twice", "has two class folders named caf\u00e9, in two"),
                              ("broken", "gone is a broken link"),
                              ("locked", "error: star: Permission denied")):
            with (self.subTest(name),
                  mock.patch("os.walk", lambda *_, onerror, **__: onerror(denied))):
                self.assertRegex(self.error_of(lambda _: evaluate.ImageFolder(
                    self.folder / name, None)), message)
        write_images(self.folder / "above" / "images")
        with self.assertRaisesRegex(evaluate.UserError, "class folder, images, .* give .*/images$"):
            evaluate.ImageFolder(self.folder / "above", None)

    def test_classes_match_whatever_their_unicode_form(self) -> None:
        write_images(self.folder, ("star", "square"))
        for split, name in (("train", "caf\u00e9"), ("val", "cafe\u0301")):  # after cafz, or before
            for old, new in (("star", name), ("square", "cafz")):
                (self.folder / split / old).rename(self.folder / split / new)
            images = evaluate.ImageFolder(self.folder / split, None)
            self.assertEqual(images.classes, ["cafz", "caf\u00e9"])
            self.assertEqual(Path(images.paths[0]).parent.name, "cafz")
        known = evaluate.ImageFolder(self.folder / "val", None, ["bar", "cafe\u0301", "cafz"])
        self.assertEqual(known.targets, [2] * 3 + [1] * 3)


class CheckTest(TestCase):
    def check(self, *flags: str, code: int = 0) -> list[str]:
        printed = run(train.main, "--data", self.folder, "--check", *flags, code=code)
        return printed.replace(f"{self.folder}/", "").splitlines()

    def test_good_data_are_described_and_pass(self) -> None:
        write_images(self.folder, train_count=2, val_count=1)
        Image.new("L", (30, 50)).save(self.folder / "train" / "star" / "grey.png")
        self.assertEqual(self.check(), [
            "train/ 7 images, 3 classes, of 2 (square) to 3 (star) images",
            "val/   3 images, 3 classes, of 1 (star) to 1 (circle) images",
            "problems found: none"])

    @unittest.skipUnless(hasattr(signal, "SIGUSR1"), "signals are those of POSIX")
    def test_sigusr1_ends_nothing_where_there_is_nothing_to_save(self) -> None:
        self.addCleanup(signal.signal, signal.SIGUSR1,
                        signal.signal(signal.SIGUSR1, signal.SIG_DFL))
        write_images(self.folder, train_count=2, val_count=1)
        self.check()
        self.assertTrue(callable(signal.getsignal(signal.SIGUSR1)))

    def test_each_fault_is_told_with_its_files(self) -> None:
        write_images(self.folder, train_count=2, val_count=1)
        path = {split: self.folder / split for split in ("train", "val")}
        whole = Image.open(path["train"] / "star" / "0.png")
        whole.save(path["val"] / "star" / "leak.bmp")  # the same pixels in another format
        shutil.copy(path["train"] / "star" / "1.png", path["train"] / "star" / "again.png")
        shutil.copy(path["val"] / "circle" / "0.png", path["val"] / "square" / "circle.png")
        (path["val"] / "circle" / "bad.jpg").write_bytes(b"not an image")
        (path["train"] / "circle" / "photo.heic").write_bytes(b"")
        (path["train"] / "empty").mkdir()
        (self.folder / "classes.txt").write_text("1 star")
        lines = self.check(code=1)
        self.assertEqual(lines[0], "note: left out of train, files and folders: 1 .heic")
        self.assertEqual(lines[3:], [
            "note: 1 images twice or more in the same class of the same split",
            "  train/star/1.png = train/star/again.png",
            "problem: 1 classes without readable images in train/",
            "  empty",
            "problem: 1 unreadable images in val/",
            "  cannot read the image val/circle/bad.jpg: cannot identify image file",
            "problem: 1 unusable file",
            "  classes.txt cannot be used: expected lines of a class folder, a comma and a name "
            "(not enough values to unpack (expected 2, got 1))",
            "problem: 1 classes that only one of train/ and val/ has",
            "  empty",
            "problem: 1 images in both train/ and val/, which flatter val accuracy",
            "  train/star/0.png = val/star/leak.bmp",
            "problem: 1 images in more than one class",
            "  val/circle/0.png = val/square/circle.png",
            "problems found: 6"])
        (self.folder / "classes.txt").write_text("empty, of train/ alone")
        lines = self.check("--skip-unreadable", code=1)
        self.assertIn("note: 1 unreadable images in val/", lines)
        self.assertNotIn("classes.txt", " ".join(lines))

    def test_a_class_that_cannot_be_split_is_told(self) -> None:
        for name, count in (("a", 1), ("b", 2)):
            (self.folder / name).mkdir()
            for k in range(count):
                Image.new("L", (8, 8), 10 * k + count).save(self.folder / name / f"{k}.png")
        self.assertEqual(self.check(code=1)[1:], [
            "problem: 1 classes of one image, too few to split off val", "  a",
            "problems found: 1"])


class ImagesTestCase(TestCase):
    """Gives the tests of a class one image folder, which they leave as it is."""

    @classmethod
    def setUpClass(cls) -> None:
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.shared = Path(temporary.name).resolve()
        cls.data = write_images(cls.shared / "images")

    def train(self, *arguments: object, out: str = "out", code: int = 0) -> str:
        return run(train.main, *tiny(self.data, self.folder / out, *arguments), code=code)

    def last(self, out: str = "out") -> dict:
        return torch.load(self.folder / out / "last.pt")

    def start(self, out: str, *flags: object, prepare: Callable = int, log: str = "") -> "Training":
        process = Training(tiny(self.data, self.folder / out, *flags),
                           self.folder / f"{out}{log}.log", prepare)
        self.addCleanup(process.kill)
        return process

    def assert_errors(self, main: Callable, *cases: tuple[tuple, str]) -> None:
        """Each case: flags, and what the one line that a script ends with then matches."""
        for flags, message in cases:
            with self.subTest(flags):
                flags = tiny(self.data, self.out, *flags) if main is train.main else flags
                self.assertRegex(self.error_of(main, *flags), message)

    def evaluate(self, checkpoint: Path, *arguments: object) -> tuple[dict, str]:
        """The figures that evaluate.py writes, and what it prints."""
        path = self.folder / "new" / "folder" / "figures.json"
        printed = run(evaluate.main, checkpoint, "--workers", 0, "--json", path, *arguments)
        return json.loads(path.read_text()), printed


def predictions_of(right: int, count: int) -> evaluate.Predictions:
    """Predictions for images of class 0, the first so many of them right."""
    return evaluate.Predictions(
        labels=torch.zeros(count, dtype=torch.long), losses=torch.zeros(count),
        top=torch.tensor([[0, 1]] * right + [[1, 0]] * (count - right)),
        probabilities=torch.tensor([[0.75, 0.25]] * count), seconds=1.0)


@contextlib.contextmanager
def signal_in_batch(number: int) -> Iterator[mock.Mock]:
    """Have SIGTERM come in a batch by its number from 1, of all, whatever they are for."""
    original = evaluate.Machine.prepare

    def signalled(machine: evaluate.Machine, images: Tensor) -> Tensor:
        if prepare.call_count == number:
            signal.raise_signal(signal.SIGTERM)
        return original(machine, images)

    with mock.patch.object(evaluate.Machine, "prepare", autospec=True,
                           side_effect=signalled) as prepare:
        yield prepare


class TrainerTestCase(ImagesTestCase):
    """Gives the tests a Trainer on 18 images, one batch an epoch, for single steps."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.splits = [evaluate.ImageFolder(cls.data / split, val_transform(64, normalized=False))
                      for split in ("train", "val")]
        torch.manual_seed(0)
        cls.images = torch.randint(256, (18, 64, 64, 3), dtype=torch.uint8)
        cls.labels = torch.randint(3, (18,))

    def make(self, device: str = "cpu", precision: str = "fp32", **flags: object) -> train.Trainer:
        args, _ = train.settle({"data": "somewhere", "out": str(self.folder), "size": 64,
                                "weights": "none", "lr": 0.01} | flags)
        return train.Trainer(args, evaluate.Machine(device, precision, 0), *self.splits)

    def make_fine_tuning(self, arch: str, *machine: str, **flags: object) -> train.Trainer:
        """A Trainer that begins with weights from a file."""
        weights = self.folder / "weights.pth"
        torch.save(models.get_model(arch, num_classes=3).state_dict(), weights)
        return self.make(*machine, arch=arch, weights=str(weights), **flags)

    def check_step(self, device: str, precisions: tuple[str, ...]) -> None:
        for precision in precisions:
            trainer = self.make(device, precision, hint=1.0, labels=1.0, soft=1.0)
            trainer.scaler = torch.amp.GradScaler(device, init_scale=1024.0,
                                                  enabled=precision == "fp16")
            before = copy.deepcopy(trainer.distiller.state_dict())
            trainer.step(self.images, self.labels)
            self.assertTrue(trainer.totals.isfinite().all())
            self.assertEqual(trainer.totals[0], 18)
            for name, parameter in trainer.distiller.named_parameters():
                self.assertFalse(torch.equal(parameter, before[name]), (precision, name))

    def check_overflow(self, device: str) -> None:
        trainer = self.make(device, "fp16", arch="mobilenet_v3_small")
        trainer.scaler = torch.amp.GradScaler(device, init_scale=2.0 ** 120)
        before, rate = copy.deepcopy(trainer.model.state_dict()), trainer.scheduler.get_last_lr()
        trainer.step(self.images, self.labels)
        for name, parameter in trainer.model.named_parameters():
            self.assertTrue(torch.equal(parameter, before[name]), name)
        self.assertEqual((trainer.scheduler.get_last_lr(), trainer.scheduler.last_epoch), (rate, 0))
        self.assertEqual(trainer.scaler.get_scale(), 2.0 ** 119)
        trainer.scaler.update(1.0)
        trainer.step(self.images, self.labels)
        self.assertEqual(trainer.scheduler.last_epoch, 1)
        self.assertFalse(torch.equal(before["classifier.3.weight"],
                                     trainer.model.classifier[3].weight))


class OptimizerTest(TrainerTestCase):
    """The optimiser, its schedule, the average of the weights, and single steps."""

    def test_tuned_trains_everything_in_one_cycle_and_decays_no_bias_or_norm(self) -> None:
        with mock.patch.object(train, "train_transform") as transform:
            trainer, rates = self.make(epochs=10), []
        transform.assert_called_once_with(64, (0.35, 1.0), normalized=False)
        model, criterion = trainer.model, trainer.criterion
        self.assertTrue(criterion.detach_teacher and criterion.normalize)
        decay = {parameter: group["weight_decay"] for group in trainer.optimizer.param_groups
                 for parameter in group["params"]}
        self.assertEqual(decay.keys(), {*model.parameters(), *criterion.parameters()})
        for parameter, expected in ((model.bn1.weight, 0.0), (model.fc.weight, 5e-4),
                                    (model.fc.bias, 0.0),
                                    (criterion.classifiers[0].weight, 5e-4)):
            self.assertEqual(decay[parameter], expected)
        self.assertTrue(all(group["nesterov"] for group in trainer.optimizer.param_groups))
        for _ in range(9):
            rates += {group["lr"] for group in trainer.optimizer.param_groups}
            trainer.optimizer.step()
            trainer.scheduler.step()
        self.assertEqual(len(rates), 9)  # the same one in all groups
        assert_close(max(rates), 0.01)
        self.assertLess(rates[0], 0.001)
        self.assertLess(trainer.optimizer.param_groups[0]["lr"], 1e-5)

    def test_another_seed_gives_other_weights_and_another_order(self) -> None:
        first, other = (self.make(arch="mobilenet_v3_small", seed=seed) for seed in (0, 1))
        for part in ("hooked.model.classifier.3", "criterion.classifiers.0"):
            self.assertFalse(torch.equal(*(trainer.distiller.get_submodule(part).weight
                                           for trainer in (first, other))))
        self.assertNotEqual([*first.sampler], [*other.sampler])

    def test_muon_trains_hidden_layers_that_mix_channels_and_only_from_random_weights(self) -> None:
        trainer = self.make()
        *_, hidden = trainer.optimizer.param_groups
        self.assertEqual({*hidden["params"]},
                         {layer.weight for part in (trainer.model, trainer.criterion)
                          for layer in part.modules() if isinstance(layer, nn.Conv2d)})
        self.assertEqual(hidden["weight_decay"], 0.0)
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16),
                                 ("fp16", torch.float32)):
            trainer = self.make("cpu", precision, arch="mobilenet_v3_small")
            self.assertEqual(trainer.optimizer.dtype, dtype)
            depthwise, _, pointwise = trainer.model.features[1].block
            hidden = {*trainer.optimizer.param_groups[-1]["params"]}
            self.assertIn(pointwise[0].weight, hidden)
            self.assertNotIn(depthwise[0].weight, hidden)
        by_sgd = self.make_fine_tuning("mobilenet_v3_small")
        decayed, _ = by_sgd.optimizer.param_groups
        self.assertNotIsInstance(by_sgd.optimizer, train.Muon)
        self.assertEqual((decayed["weight_decay"], by_sgd.recipe["whiten"]), (5e-4, False))
        self.assertIn(by_sgd.model.features[0][0].weight, {*decayed["params"]})

    def test_orthogonal_keeps_the_directions_of_filters_and_makes_their_lengths_equal(self) -> None:
        for (shape, longer), (dtype, rounding) in itertools.product(
                (((6, 3, 3, 3), 1), ((6, 4), 1.5 ** 0.5), ((8, 1, 2, 1), 2)),
                ((torch.float32, 1e-5), (torch.bfloat16, 0.1))):
            filters = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
            result = train.orthogonal(filters)
            self.assertEqual((result.shape, result.dtype), (shape, dtype))
            left, _, right = torch.linalg.svd(filters.float().flatten(1), full_matrices=False)
            inner = left.T @ result.float().flatten(1) @ right.T
            assert_close(inner, inner.diagonal().diag(), rtol=0, atol=rounding)
            self.assertGreater(inner.diagonal().min(), 0.65 * longer)
            self.assertLess(inner.diagonal().max(), 1.25 * longer)
        assert_close(train.orthogonal(torch.zeros(4, 2)), torch.zeros(4, 2))

    def test_muon_takes_orthogonal_steps_in_hidden_layers_and_those_of_sgd_elsewhere(self) -> None:
        for fused in (False, True):
            hidden, other, plain = (nn.Parameter(torch.ones(3, 4, 2, 2)) for _ in range(3))
            hidden.data = hidden.data.to(memory_format=torch.channels_last)
            options = dict(lr=0.1, momentum=0.9, nesterov=True, fused=fused)
            muon = train.Muon([{"params": [other]}], [hidden], torch.float32, **options)
            sgd, sums, expected = torch.optim.SGD([plain], **options), 0, hidden.detach().clone()
            for seed in range(3):
                gradient = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
                hidden.grad = gradient.to(memory_format=torch.channels_last)
                other.grad, plain.grad = gradient.clone(), gradient.clone()
                muon.step()
                sgd.step()
                sums = 0.9 * sums + gradient
                expected -= 0.1 * train.orthogonal(gradient + 0.9 * sums)
            assert_close(hidden.detach(), expected)
            assert_close(other, plain)

    def test_from_random_weights_the_first_convolution_whitens(self) -> None:
        trainer = self.make()
        run(lambda _: trainer.whiten())
        filters, opposite = trainer.model.conv1.weight.detach().chunk(2)
        assert_close(opposite, -filters, rtol=0, atol=0)
        images = torch.stack([image for image, _ in self.splits[0]])
        patches = F.unfold(trainer.machine.prepare(images), 7, stride=8).mT.flatten(0, 1)
        covariance = (patches @ filters.flatten(1).T).T.cov()
        variances = covariance.diagonal()
        self.assertGreater(variances.min(), 0.01)
        self.assertLess(variances.max(), 1)
        assert_close(covariance, variances.diag(), rtol=0, atol=0.01)
        first, *_, last = filters.flatten(1).norm(dim=1)
        self.assertLess(first, last)  # the strongest components first

    def test_statistics_of_batch_norm_keep_up_with_a_short_run(self) -> None:
        trainer, inputs = self.make(arch="mobilenet_v3_small"), []  # has a momentum of 0.01
        first = trainer.model.features[0][1]
        first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        trainer.step(self.images, self.labels)
        assert_close(first.running_mean, 0.1 * inputs[0].mean(dim=(0, 2, 3)))

    def test_the_blog_recipe_takes_the_steps_of_the_published_script(self) -> None:
        args, _ = train.settle({"data": "somewhere", "recipe": "blog"})
        self.assertEqual((args.lr, args.batch_size, args.alpha), (0.01, 32, 0.5))
        with mock.patch.object(train, "train_transform") as transform:
            trainer = self.make(recipe="blog", batch_size=4)
        transform.assert_called_once_with(64, (0.08, 1.0), normalized=False)
        plain, conv1x1 = (copy.deepcopy(part) for part in (trainer.model,
                                                           trainer.criterion.adapter))
        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
        for images, labels in zip(self.images[:12].split(4), self.labels[:12].split(4)):
            trainer.step(images, labels)
            plain_optimizer.zero_grad()
            images = selfdistill.normalize(images.permute(0, 3, 1, 2))
            logits, student, teacher = plain_forward(plain, images)
            resized = F.interpolate(student, size=(2, 2), mode="bilinear", align_corners=False)
            loss = (0.5 * F.mse_loss(resized, conv1x1(teacher))
                    + 0.5 * F.cross_entropy(logits, labels))
            loss.backward()
            plain_optimizer.step()
        assert_close(trainer.model.state_dict(), plain.state_dict())
        assert_close(trainer.criterion.adapter.state_dict(), conv1x1.state_dict())
        for group in trainer.optimizer.param_groups:
            self.assertEqual([group[name] for name in ("lr", "momentum", "weight_decay",
                                                       "nesterov")], [0.01, 0.9, 0.0, False])

    def test_without_distillation_the_gradient_is_that_of_the_cross_entropy_alone(self) -> None:
        trainer = self.make(distillation=False, alpha=0.25)
        images = trainer.machine.prepare(self.images)
        loss, figures = trainer.distiller(images, self.labels)
        self.assertEqual(trainer.figures, ("images", "cross_entropy", "train_acc"))
        self.assertEqual(len(figures), 3)
        losses = (loss, 0.75 * F.cross_entropy(trainer.model(images), self.labels,
                                               label_smoothing=0.1))
        assert_close(*(torch.autograd.grad(loss, list(trainer.model.parameters()))
                       for loss in losses))
        self.assertEqual(list(trainer.criterion.parameters()), [])

    def test_fine_tuning_results_in_a_moving_average_of_the_weights(self) -> None:
        # With this accuracy, a quarter of the first weights is to be left after two steps.
        trainer = self.make_fine_tuning("mobilenet_v3_small", epochs=2)
        run(lambda _: trainer.fit_classifiers())
        states = [copy.deepcopy(trainer.distiller.state_dict())]
        assert_close(trainer.result.state_dict(), states[0])
        trainer.start_acc = 0.5 ** (1 / train.GIVEN_POWER)
        for trainer.epoch in range(2):
            trainer.train_epoch()
            trainer.start_epoch()
            states.append(copy.deepcopy(trainer.distiller.state_dict()))
        for name, value in trainer.result.state_dict().items():
            start, first, second = (state[name] for state in states)
            assert_close(value, 0.25 * start + 0.25 * first + 0.5 * second
                         if value.is_floating_point() else second)
        saved, result = trainer.checkpoint(), trainer.result
        assert_close(saved["model"], result.hooked.model.state_dict())
        assert_close([*saved["exits"].values()],
                     [classifier.state_dict() for classifier in result.criterion.classifiers])
        self.assertIsNone(self.make().average)
        convolving = self.make_fine_tuning("squeezenet1_1", lr=None)  # in its last layer
        self.assertEqual((convolving.average, convolving.lr), (None, 0.004))

    def test_by_default_the_error_of_epoch_0_decides_the_rate_of_fine_tuning(self) -> None:
        for right, error in ((3, 2 / 3), (9, 1 / 9)):  # of none, one is assumed
            trainer = self.make_fine_tuning("mobilenet_v3_small", lr=None)
            with mock.patch.object(trainer, "validate", return_value=predictions_of(right, 9)):
                run(lambda _: trainer.fit_classifiers())
            peak = train.LR_PER_ERROR * error
            for group in trainer.optimizer.param_groups:
                for name, rate in (("max_lr", peak), ("lr", peak / 25), ("initial_lr", peak / 25),
                                   ("min_lr", peak / 25e4)):
                    self.assertAlmostEqual(group[name] / rate, 1)

    def test_features_that_overflow_are_told_before_they_are_fitted_to(self) -> None:
        trainer = self.make_fine_tuning("mobilenet_v3_small")
        with (mock.patch.object(trainer, "run_through", return_value=[
                torch.tensor([[math.inf]]), torch.tensor([0])]),
              self.assertRaisesRegex(evaluate.UserError, "not finite in fp32: try --precision")):
            trainer.fit_classifiers()

    def test_a_batch_norm_stays_hooked_when_it_becomes_one_of_several_gpus(self) -> None:
        trainer = self.make(arch="mobilenet_v2", student_layer=["features.5.conv.3"])
        with (mock.patch.object(train, "world_size", return_value=2),
              mock.patch.object(trainer.machine, "on_cuda", True)):
            trainer.make_network("none")
        self.assertIsInstance(trainer.model.features[5].conv[3], nn.SyncBatchNorm)
        _, student, _ = trainer.hooked.eval()(torch.randn(2, 3, 64, 64))
        self.assertEqual(student.shape, (2, 32, 8, 8))

    def test_what_is_fitted_solves_its_equations(self) -> None:
        adapter, classifier = nn.Conv2d(1, 1, 1), nn.Linear(1, 2)
        train.fit_adapter(adapter, torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [4.0]]))
        weight = 4 / (2 + 0.1 * 2)  # the covariance by the variance and a tenth of it
        self.assertAlmostEqual(adapter.weight.item(), weight, 4)
        self.assertAlmostEqual(adapter.bias.item(), 2 - 2 * weight, 4)
        train.fit_logistic_regression(classifier, torch.tensor([[1.0], [-1.0]]),
                                      torch.tensor([1, 0]))
        low, high = classifier.weight.flatten().tolist()  # where the gradient is 0
        self.assertAlmostEqual(low, -high, 4)
        self.assertAlmostEqual(1 / (1 + math.exp(2 * high)), 2 * 0.01 * high, 4)
        assert_close(classifier.bias, torch.zeros(2), rtol=0, atol=1e-4)

    def test_what_is_where_it_began_is_named_at_the_end(self) -> None:
        trainer = self.make()
        trainer.log = [{"terms": {"hint": hint}, "exit_train_acc": {"layer2.1": early,
                                                                    "layer3.1": 0.4}}
                       for hint, early in ((0.5, 0.1), (0.5, 0.3))]
        remark, = trainer.remarks()
        self.assertIn("than in epoch 1: the classifier at layer3.1, the hint; more", remark)
        trainer.log[1]["terms"]["hint"] = 0.4
        trainer.log[1]["exit_train_acc"]["layer3.1"] = 0.5
        self.assertEqual(list(trainer.remarks()), [])
        trainer.log[1]["exit_train_acc"] = trainer.log[0]["exit_train_acc"]
        self.assertEqual(len([*trainer.remarks()]), 1)
        whole = [line | {"exit_train_acc": dict.fromkeys(trainer.exit_layers, 1.0)}
                 for line in trainer.log]
        for log in (trainer.log[:1], whole):  # too short to tell, and nothing left to learn
            with mock.patch.object(trainer, "log", log):
                self.assertEqual([*trainer.remarks()], [])
        trainer.best_epoch = 0
        trainer.log[1] |= {"val_acc": 0.25, "exit_train_acc": {"layer2.1": 0.1, "layer3.1": 0.4}}
        remark, = trainer.remarks()  # which advises no longer training
        self.assertIn("gained nothing over epoch 0", remark)

    def test_what_a_step_counts_is_what_its_batch_gives(self) -> None:
        trainer = self.make(soft=1.0)
        logits, students, teacher = trainer.hooked(trainer.machine.prepare(self.images))
        terms = trainer.criterion.terms(logits, self.labels, students, teacher)
        early = trainer.criterion.early_logits(students)
        trainer.step(self.images, self.labels)
        rights = [(output.argmax(dim=1) == self.labels).sum() for output in (logits, *early)]
        self.assertEqual(len({*map(int, rights)}), 3)
        expected = [18, *(18 * term.item() for term in terms.values()), *rights]
        assert_close(trainer.totals, torch.tensor(expected, dtype=torch.float32))
        trainer.seconds = 2.0
        run(lambda _: trainer.finish_epoch(predictions_of(1, 2)))
        line, = trainer.log
        means = [*line["terms"].values(), line["train_acc"], *line["exit_train_acc"].values()]
        assert_close(torch.tensor(means), torch.tensor(expected[1:]) / 18)
        self.assertEqual((line["seconds"], line["images_per_second"], line["lr"]),
                         (3.0, 9.0, trainer.scheduler.get_last_lr()[0]))
        trainer.epoch = trainer.args.epochs - 1
        trainer.step(self.images, self.labels)
        self.assertEqual(trainer.scheduler.last_epoch, 1)  # no rate follows that of the last step

    def test_a_step_draws_by_seed_epoch_batch_and_rank(self) -> None:
        trainer, seeds = self.make(arch="mobilenet_v3_small"), set()
        for trainer.args.seed, trainer.epoch, trainer.batch, rank in (
                (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
            with mock.patch.object(train, "rank", return_value=rank):
                trainer.step(self.images, self.labels)
            seeds.add(torch.initial_seed())
        self.assertEqual(len(seeds), 5)

    def test_a_step_replays_what_is_recorded_and_recording_changes_nothing(self) -> None:
        trainer = self.make(arch="mobilenet_v3_small")  # CudaTest has the real thing
        before = copy.deepcopy(trainer.distiller.state_dict())

        def record(module: nn.Module, sample: tuple, **options: object) -> mock.Mock:
            module(*sample)
            module.forward = mock.Mock(wraps=module.forward)
            return module

        with mock.patch("torch.cuda.graph_pool_handle"):
            with mock.patch("torch.cuda.make_graphed_callables", record):
                trainer.record_graphs()
            assert_close(trainer.distiller.state_dict(), before, rtol=0, atol=0)
            trainer.step(self.images, self.labels)
            trainer.graphs[18].assert_called_once()
            for reason, error, message in (
                    ("CUDA out of memory", RuntimeError, "^CUDA out of memory$"),
                    ("reason", evaluate.UserError, r"CUDA graphs \(reason\): use --compile")):
                with (self.assertRaisesRegex(error, message),
                      mock.patch("torch.cuda.make_graphed_callables",
                                 side_effect=RuntimeError(reason))):
                    trainer.record_graphs()

    def test_graphs_are_recorded_once_on_a_gpu_and_not_if_compiled(self) -> None:
        with mock.patch.object(torch, "compile", copy.copy):
            for is_compiled in (False, True):
                trainer = self.make(compile=is_compiled, epochs=2, arch="mobilenet_v3_small")
                trainer.machine.on_cuda = True
                with mock.patch.object(trainer, "record_graphs") as record:
                    record.side_effect = lambda: trainer.graphs.update({18: trainer.distiller})
                    trainer.train_epoch()
                    trainer.train_epoch()
                self.assertEqual(record.call_count, 0 if is_compiled else 1)

    def test_a_step_on_the_cpu_changes_all_weights(self) -> None:
        self.check_step("cpu", ("fp32", "bf16"))

    def test_an_overflow_in_fp16_is_skipped_by_the_schedule_too(self) -> None:
        self.check_overflow("cpu")

    def test_compiling_changes_no_output_and_no_gradient(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3),
            nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
        criterion = SelfDistillationLoss(0.5, (4, 6), 8, labels=1.0, soft=1.0, num_classes=3)
        distiller = train.Distiller(HookedModel(network, ("2", "3"), "4"), criterion,
                                    evaluate.Machine("cpu", "fp32", 0))
        compiled = torch.compile(distiller, backend="aot_eager", fullgraph=True)
        hooked = torch.compile(distiller.hooked, backend="eager", fullgraph=True)
        for images in torch.randn(2, 4, 3, 16, 16):
            results = []
            for module in (distiller, compiled):
                outputs = module(images, self.labels[:4])
                results.append((outputs, torch.autograd.grad(outputs[0], network[0].weight)))
            assert_close(*results)
            assert_close(hooked(images), distiller.hooked(images))
        with mock.patch.object(torch, "compile", return_value=compiled):
            self.assertIs(self.make(compile=True).train_module, compiled)


class TrainingTest(ImagesTestCase):
    """Runs of the real script; what most of them look at is trained once."""
    LAYERS = ("layer2.1", "layer3.1")

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.trained = cls.shared / "trained"
        cls.printed = run(train.main, *tiny(cls.data, cls.trained, *RESNET18, "--epochs", 2))
        cls.best, cls.log = torch.load(cls.trained / "best.pt"), read_log(cls.trained)

    def test_the_checkpoint_holds_what_the_design_says(self) -> None:
        self.assertEqual({key: type(value) for key, value in self.best.items()},
                         {"model": type(resnet18().state_dict()), "arch": str, "classes": list,
                          "size": int, "mean": list, "std": list, "epoch": int, "val_acc": float,
                          "data": str, "args": dict, "names": list, "exits": dict})
        self.assertEqual(self.best["classes"], ["circle", "square", "star"])
        resnet18(num_classes=3).load_state_dict(self.best["model"])
        self.assertEqual({layer: {name: tuple(value.shape) for name, value in state.items()}
                          for layer, state in self.best["exits"].items()},
                         {"layer2.1": {"weight": (3, 128), "bias": (3,)},
                          "layer3.1": {"weight": (3, 256), "bias": (3,)}})
        self.assertEqual(self.best["args"]["student_layer"], list(self.LAYERS))
        self.assertEqual(sorted(os.listdir(self.trained)), ["best.pt", "last.pt", "log.jsonl"])

    def test_the_log_has_a_line_an_epoch(self) -> None:
        self.assertEqual([line["epoch"] for line in self.log], [1, 2])
        for line in self.log:
            self.assertEqual(line.keys(), {
                "epoch", "train_loss", "ce_loss", "distillation_loss", "train_acc", "val_loss",
                "val_acc", "lr", "images_per_second", "seconds", "terms", "exit_train_acc"})
            terms = line["terms"]
            self.assertEqual(list(terms), ["cross_entropy", "hint", "labels"])
            assert_close(line["train_loss"], sum(terms.values()))
            assert_close(line["ce_loss"], 2 * terms["cross_entropy"])  # as alpha is 0.5
            assert_close(line["distillation_loss"], 2 * (terms["hint"] + terms["labels"]))
            self.assertEqual(line["exit_train_acc"].keys(), set(self.LAYERS))

    def test_a_line_an_epoch_is_printed_and_on_a_terminal_one_that_is_rewritten(self) -> None:
        lines = [line for line in self.printed.splitlines() if not line.startswith("note: ")]
        self.assertEqual([line.split()[0] for line in lines], ["data", "network", "machine",
                         "recipe", "epoch", "1/2", "2/2", "best", "time", "wrote", "next"])
        self.assertIn("18 train and 9 val images, 3 classes", lines[0])
        self.assertIn("student layer2.1, layer3.1, teacher layer4.1", lines[1])
        self.assertRegex(lines[5],
                         r" 1/2( +\d\.\d+){2} +\d\.\d+ \d\.\d+ +cos -?\d\.\d+( +\d+\.\d+)")
        self.assertIn(f" cos {1 - self.log[0]['terms']['hint'] / 0.3 / 2:.3f} ", lines[5])
        self.assertEqual([len(line) for line in lines[4:7]], [78] * 3)
        self.assertNotIn("\r", self.printed)
        flags = tiny(self.data, self.out, "--recipe", "blog", "--batch-size", 32)
        printed = run(train.main, *flags, is_terminal=True)
        self.assertRegex(printed, r"\r\033\[Kepoch 1/1  images 18/18  .* images/s  "
                                  r"loss \d.*  \d+ s left")
        self.assertIn(f" {read_log(self.out)[0]['distillation_loss']:.4g} ", printed)
        with mock.patch.dict(os.environ, COLUMNS="30"):
            printed = run(lambda _: evaluate.Progress("images", 1000).advance(1), is_terminal=True)
        self.assertRegex(printed, r"^\r\033\[Kimages 1/1000  .{14}$")

    def test_names_are_shown_without_their_control_characters(self) -> None:
        buffer = io.BytesIO()
        output = evaluate.Output(buffer, "utf-8", "backslashreplace")
        for text in ("a\033[2J\n", "\x9b\r\udcff", evaluate.Progress.CLEAR):
            output.write(text)
        output.flush()
        self.assertEqual(buffer.getvalue(), b"a\\x1b[2J\n\\x9b\\r\\udcff\r\033[K")
        self.assertIn(r"a\x1b\nb", self.error_of(train.main, "--data", "a\033\nb"))
        for stream in ("stdout", "stderr"):  # the latter as by --json -
            buffer = io.BytesIO()
            with mock.patch.object(sys, stream, io.TextIOWrapper(buffer, "utf-8")):
                evaluate.run_script(lambda: print("a\033", file=getattr(sys, stream), flush=True))
                self.assertEqual(buffer.getvalue(), b"a\\x1b\n")

    def test_evaluation_agrees_with_the_log_to_the_last_digit(self) -> None:
        figures, printed = self.evaluate(self.trained / "best.pt")
        line = self.log[self.best["epoch"] - 1]
        self.assertEqual((figures["top1"], figures["loss"]), (line["val_acc"], line["val_loss"]))
        self.assertEqual((self.best["val_acc"], figures["count"]), (line["val_acc"], 9))
        self.assertRegex(printed, f"top-1 {line['val_acc']:.4f} .*  loss {line['val_loss']:.4f}")

    def test_only_what_has_a_weight_is_trained_logged_and_saved(self) -> None:
        def noted(trainer: train.Trainer) -> int:
            initial.update(copy.deepcopy(trainer.criterion.state_dict()))
            return fit(trainer)

        fit, classifier = train.Trainer.fit, {"classifiers.0.bias", "classifiers.0.weight"}
        adapter = {"adapter.bias", "adapter.weight"}
        for flags, trained, terms, missing in (
                ((), classifier | adapter, ["hint", "labels"], []),
                (("--labels", 0), adapter, ["hint"], []),
                (("--recipe", "byot"), classifier, ["labels", "soft"], []),
                (("--recipe", "blog"), set(), ["hint"], []),
                (("--no-distillation",), set(), [], ["distillation_loss"]),
                (("--alpha", 0), set(), [], ["distillation_loss"]),
                (("--alpha", 1, "--hint", 0), classifier, ["labels"], ["ce_loss"])):
            with self.subTest(flags), mock.patch.object(train.Trainer, "fit", noted):
                initial, exits = {}, {"features.2"} if classifier <= trained else set()
                self.train(*flags, "--student-layer", "features.2")
                last, (line,) = self.last(), read_log(self.out)
                saved = last["run"]["distiller"]
                self.assertEqual(trained, {
                    name for name, value in initial.items()
                    if not torch.equal(saved[f"criterion.{name}"], value)})
                self.assertEqual(list(line["terms"]), ["cross_entropy", *terms])
                self.assertEqual([name for name in line if line[name] is None], missing)
                self.assertEqual(line["exit_train_acc"].keys(), exits)
                self.assertEqual(last.get("exits", {}).keys(), exits)

    def test_weights_repeat_bit_for_bit_whatever_the_workers(self) -> None:
        for out, workers in (("first", 0), ("again", 2)):
            self.train("--batch-size", 8, "--workers", workers, out=out)
        first, again = (self.last(out)["run"]["distiller"] for out in ("first", "again"))
        assert_close(again, first, rtol=0, atol=0)

    def test_the_best_epoch_is_the_earlier_of_two_alike(self) -> None:
        rights = [1, 2, 2, 0]
        with mock.patch.object(train.Trainer, "validate",
                               side_effect=[predictions_of(right, 2) for right in rights]):
            printed = self.train("--epochs", 4, "--report")
        self.assertIn("best       val accuracy 1.0000 in epoch 2 (", printed)
        self.assertEqual(torch.load(self.out / "best.pt")["epoch"], 2)
        self.assertEqual([2 * line["val_acc"] for line in read_log(self.out)], rights)
        for name in ("best.pt", "report.html"):  # the run has ended, and writes neither anew
            (self.out / name).unlink()
        self.assertRegex(
            run(train.main, "--resume", self.out / "last.pt"),
            r"resumed .*\n(note: .*\n)?best .*val accuracy 1\.0000 in epoch 2 \(.*\ntime .*\n"
            r"wrote .*: last\.pt .*\(figures\)\nnext .*evaluate\.py .*last\.pt\n")

    def test_a_folder_of_classes_is_enough(self) -> None:
        flat = write_images(self.folder / "images", train_count=8) / "train"
        (flat / "star" / "photo.heic").write_bytes(b"")
        self.train("--data", flat)
        self.assertEqual(torch.load(self.out / "best.pt")["args"]["val_split"], 0.2)
        printed = self.train("--data", flat, "--val-split", 0.4)
        self.assertIn("1 .heic", printed)
        self.assertRegex(printed, f"data +{flat}: .* val images split off by their content, 3 cl")
        best, line = torch.load(self.out / "best.pt"), read_log(self.out)[-1]
        self.assertEqual((best["args"]["val_split"], best["data"]), (0.4, str(flat)))
        figures, printed = self.evaluate(self.out / "best.pt")
        self.assertIn("1 .heic", printed)
        self.assertEqual(figures["loss"], line["val_loss"])
        self.assertTrue(3 <= figures["count"] < 21)
        other = write_images(self.folder / "elsewhere", train_count=8) / "train"
        for data, count in ((flat, figures["count"]), (other, 24), (self.data, 9)):
            found, printed = self.evaluate(self.out / "best.pt", "--data", data)
            self.assertEqual(found["count"], count)
            self.assertEqual("note: all images" in printed, data == other)
        self.assert_errors(
            train.main, (("--data", self.data, "--val-split", 0.4), "without val/: .* has one"),
            (("--data", flat, "--resume", "--val-split", 0.3), "val-split 0.3 contradicts"))
        self.assertIn("problems found: none", run(train.main, "--data", flat, "--check"))
        shutil.rmtree(flat.with_name("val"))
        same, _ = self.evaluate(self.out / "best.pt", "--data", flat.parent)
        self.assertEqual((same["count"], same["loss"]), (figures["count"], line["val_loss"]))
        torch.save(self.best, self.folder / "given.pt")  # whose run had a val/
        self.assert_errors(evaluate.main, ((self.folder / "given.pt", "--data", flat.parent),
                                           "has train/ but no val/: give another --data"))

    def test_a_head_for_other_classes_is_made_anew(self) -> None:
        path, head = self.folder / "weights.pt", self.best["model"]["fc.weight"]
        for known, is_kept in ((["circle", "square", "star"], True), (["a", "b", "c"], False)):
            torch.save(self.best | {"classes": known}, path)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                hooked = train.load_hooked("resnet18", self.best["classes"], str(path), None, None,
                                           2)
            self.assertEqual("head       made anew" in output.getvalue(), not is_kept)
            self.assertEqual(torch.equal(hooked.model.fc.weight, head), is_kept)

    def test_training_begins_with_what_is_fitted_to_the_features(self) -> None:
        for split in ("train", "val"):
            shutil.copytree(self.data / "train", self.folder / "images" / split)
        torch.manual_seed(0)
        weights = resnet18(num_classes=5).state_dict()
        torch.save(weights, self.folder / "weights.pth")
        printed = self.train(*RESNET18, "--data", self.folder / "images", "--size", 64,
                             "--lr", 1e-9, "--weights", self.folder / "weights.pth")
        self.assertRegex(printed, "epoch 0 +val acc 1.0000, only the classifiers .* lr 1e-09\n")
        self.assertIn("note: training gained nothing over epoch 0, which best.pt holds", printed)
        best, (line,) = torch.load(self.out / "best.pt"), read_log(self.out)
        self.assertEqual((best["epoch"], line["epoch"]), (0, 1))
        for name in weights.keys() - {"fc.weight", "fc.bias"}:
            assert_close(best["model"][name], weights[name], rtol=0, atol=0)
        figures, _ = self.evaluate(self.out / "best.pt")  # on the very images all was fitted to
        self.assertEqual(figures["top1"], best["val_acc"])
        self.assertGreaterEqual(best["val_acc"], 0.9)
        for layer in self.LAYERS:
            self.assertGreaterEqual(figures["exits"][layer]["top1"], 0.8)
        self.assertLess(line["terms"]["hint"], 1.2)  # about 2 from random adapters

    def test_adapters_are_fitted_to_the_features_of_their_layers(self) -> None:
        with (mock.patch.object(train, "fit_adapter") as adapters,
              mock.patch.object(train, "fit_logistic_regression") as classifiers):
            self.train(*RESNET18, "--weights", self.trained / "best.pt")
        (_, last, _), *early = (call.args for call in classifiers.call_args_list)
        self.assertGreater(last.std(dim=0).max(), 0)
        for adapter, (_, features, _) in zip(adapters.call_args_list, early, strict=True):
            assert_close(adapter.args[1:], (last, features))  # the head's inputs are layer4.1's

    def test_the_report_is_refreshed_after_each_epoch(self) -> None:
        pages = []
        with mock.patch.object(train, "report_html", lambda *args, **options: pages.append(
                evaluate.report_html(*args, **options)) or pages[-1]):
            self.train("--epochs", 2, "--report")
        for k, html in enumerate(map(bytes.decode, pages)):
            self.assertIn(f"after epoch {k + 1} of 2", html)
            self.assertEqual('http-equiv="refresh"' in html, k == 0)
            # Nine val images, right or wrong, and all eighteen train images.
            self.assertEqual(html.count("data:image/jpeg;base64,"), 9 + 18)
        self.assertEqual((self.out / "report.html").read_bytes(), pages[1])

    def test_one_class_one_image_and_a_batch_of_one(self) -> None:
        self.data = write_images(self.folder / "images", ("circle",), train_count=1, val_count=1)
        self.train("--size", 64, "--batch-size", 1)
        figures, _ = self.evaluate(self.out / "best.pt")
        self.assertEqual((figures["top1"], figures["top5"], figures["count"]), (1.0, None, 1))
        self.assert_errors(train.main, ((), "leaves a process 1 images, too few"),
                           (("--size", 63), "batch norm at 63 pixels"))
        self.data = self.shared / "images"
        with mock.patch.object(train, "world_size", return_value=2):
            self.assert_errors(train.main, (("--batch-size", 2), "leaves a process 1 images, too"))

    def test_without_data_it_trains_on_the_shapes(self) -> None:
        self.enter_folder()
        with mock.patch.object(train, "draw_shapes", partial(train.draw_shapes, train=2, val=1)):
            printed = run(train.main, "--epochs", 1, "--workers", 0)
        self.assertIn("weights: none, ", printed)
        self.assertIn("tuned: 32 px, batch 64, lr 0.05, ", printed)
        self.assertEqual(torch.load("best.pt")["data"], str(self.folder / "data" / "shapes"))
        figures, _ = self.evaluate("best.pt")
        self.assertEqual(set(figures["per_class"]), set(train.SHAPES))
        self.assertIsNotNone(figures["top5"])

    def test_classes_are_matched_by_name(self) -> None:
        best = self.trained / "best.pt"
        expected, _ = self.evaluate(best)
        fewer = write_images(self.folder / "fewer", ("square", "star"))
        figures, _ = self.evaluate(best, "--data", fewer)
        for name in ("square", "star"):
            for figure in ("count", "correct", "recall"):
                self.assertEqual(figures["per_class"][name][figure],
                                 expected["per_class"][name][figure])
        other = write_images(self.folder / "other", ("circle", "cross"))
        self.assert_errors(evaluate.main,
                           ((best, "--data", other), "does not know: cross; it knows"))

    def test_a_loss_that_is_not_finite_stops_before_it_is_saved(self) -> None:
        self.assert_errors(train.main, (("--lr", "1e6", "--epochs", 3, "--batch-size", 4),
                                        "not finite in epoch 1.*try a lower --lr"))
        unknown = predictions_of(1, 2)._replace(losses=torch.full((2,), math.nan))
        with mock.patch.object(train.Trainer, "validate", return_value=unknown):
            self.assert_errors(train.main, ((), "val loss is not finite after epoch 1: try a"))
        self.assertFalse(self.out.exists())
        with (mock.patch.object(train.Muon, "step", lambda optimizer: [  # the last of an epoch
                tensor.data.fill_(math.nan) for tensor in optimizer.param_groups[0]["params"]]),
              mock.patch.object(train.Trainer, "validate", return_value=predictions_of(1, 2))):
            self.assert_errors(train.main, ((), "the last save is intact"))
        self.assertFalse(self.out.exists())


class ComparisonTest(ImagesTestCase):
    """--compare: runs with and without distillation that share seeds."""

    def test_its_runs_are_those_that_the_flags_alone_give(self) -> None:
        arms = {"distillation": (), "labels": ("--hint", 0, "--soft", 0),
                "control": ("--no-distillation",)}
        printed = self.train("--hint", 1, "--seed", 3, "--compare", 2, "--compare-arms", *arms)
        self.assertIn("run 6 of 6: distillation, seed 4", printed)
        self.assertRegex(printed.splitlines()[-1], "^.*distillation .*, with 2 pairs: .*$")
        figures = json.loads((self.out / "compare.json").read_text())
        with mock.patch.object(train, "fine_tune", return_value=0) as again:  # each has ended
            run(train.main, "--compare", 2, "--out", self.out, "--resume")
        self.assertEqual(again.call_count, 6)  # the arms are remembered, too
        self.assertEqual(json.loads((self.out / "compare.json").read_text()), figures)
        self.assertEqual([pair["seed"] for pair in figures["runs"]], [3, 4])
        self.assertEqual(list(figures["differences"]), [
            "labels - control", "distillation - control", "distillation - labels"])
        for arm, flags in arms.items():
            self.train("--hint", 1, "--seed", 4, *flags, out=arm)
            alone = read_log(self.folder / arm)
            self.assertEqual(alone[-1]["val_acc"], figures["runs"][1][arm])
            self.assertEqual(contents(alone), contents(read_log(self.out / f"compare/4-{arm}")))

    def test_it_goes_on_where_it_was_stopped_and_keeps_an_earlier_one(self) -> None:
        flags = ("--compare", 2, "--seed", 3, "--precision", "auto", "--batch-size", 8)
        # The first run alone chooses the precision.
        with (mock.patch.object(evaluate.Machine, "best_precision", side_effect=["bf16"]),
              signal_in_batch(2 * 8 + 4)):  # training in the third run, as each has 3 + 3 + 2
            self.train(*flags, code=STOPPED)
        self.assertFalse((self.out / "compare.json").exists())
        with signal_in_batch(0) as prepare:  # all other flags are those of the first run
            printed = run(train.main, "--compare", 2, "--out", self.out, "--resume")
        self.assertEqual(prepare.call_count, (8 - 4) + 8)
        runs = ["3-control", "3-distillation", "4-control", "4-distillation"]
        self.assertEqual(re.findall(r"run \d of 4: (\w+), seed (\d)", printed),
                         [tuple(name.split("-")[::-1]) for name in runs])
        for name in runs:
            self.assertEqual(self.last(f"out/compare/{name}")["args"]["precision"], "bf16")
        figures = (self.out / "compare.json").read_text()
        weights = self.out / "compare" / "3-control" / "best.pt"
        self.assert_errors(train.main, (("--compare", 2, "--weights", weights), "replaces: copy"))
        with signal_in_batch(1):
            self.train("--hint", 1, "--compare", 2, "--compare-arms", *train.ARMS, code=STOPPED)
        self.assertEqual(train.first_settings(self.out)["compare_arms"],
                         ["control", "labels", "distillation"])
        self.assertEqual((self.out / "compare.1.json").read_text(), figures)
        self.assertEqual(sorted(os.listdir(self.out / "compare.1")), runs)

    def test_a_signal_after_the_last_step_of_a_run_stops_it_too(self) -> None:
        with mock.patch.object(train.Trainer, "write_report",
                               lambda *arguments: signal.raise_signal(signal.SIGTERM)):
            self.train("--compare", 2, code=STOPPED)
        self.assertEqual(os.listdir(self.out / "compare"), ["0-control"])

    def test_the_last_epoch_of_a_run_counts_not_the_best(self) -> None:
        torch.save({"val_acc": 0.5, "args": {"precision": "bf16"},
                    "run": {"best_acc": 0.75, "elapsed": 3.0}}, self.folder / "last.pt")
        self.assertEqual(train.outcome(self.folder), (0.5, "bf16", 3.0))

    def test_the_gain_of_three_pairs_by_hand(self) -> None:
        def verdict_of(*gains: float) -> tuple[dict, str]:
            figures = train.paired_statistics(
                [{"seed": k, "control": 0.5, "distillation": 0.5 + gain}
                 for k, gain in enumerate(gains)], ["control", "distillation"])
            return figures, run(lambda _: train.print_comparison(figures)).splitlines()[-1]

        figures, verdict = verdict_of(0.01, 0.02, 0.03)
        half = 4.303 * 0.01 / 3 ** 0.5
        assert_close(figures["differences"], {"distillation - control": {
            "mean": 0.02, "deviation": 0.01, "interval": [0.02 - half, 0.02 + half]}},
            rtol=0, atol=1e-5)
        assert_close(figures["arms"], {"control": {"mean": 0.5, "deviation": 0.0},
                                       "distillation": {"mean": 0.52, "deviation": 0.01}})
        self.assertRegex(verdict, "cannot be told, with 3 pairs: train with it or")
        self.assertEqual("distillation helps, with 3 pairs: train with it",
                         verdict_of(0.02, 0.021, 0.022)[1])
        self.assertEqual("distillation hurts, with 3 pairs: use --no-distillation",
                         verdict_of(-0.02, -0.021, -0.022)[1])
        self.assertRegex(verdict_of(0.02, 0.02)[1], "cannot be told, with 2 pairs: all diff")

    def test_quantiles_of_t_are_those_of_tables(self) -> None:
        for freedom, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045)):
            self.assertAlmostEqual(train.t_quantile(freedom), expected, delta=0.001)

    def test_what_makes_no_pair_is_refused(self) -> None:
        both, arms = "--compare trains with distillation and without", "must be among them"
        self.assert_errors(train.main, (("--compare", 2, "--resume"), "no run to go on with"))
        self.assertFalse(self.out.exists())
        self.assert_errors(train.main, (("--compare-arms", *train.ARMS), "is for --compare N"))
        self.assert_errors(train.main, *((("--compare", 2, *flags), message) for flags, message in (
            (("--no-distillation",), both), (("--alpha", 0), both),
            (("--resume", "other/last.pt"), both), (("--compare-arms", "control"), arms),
            (("--seed", 2 ** 32 - 1), "beyond the last seed, 4294967295"),
            (("--hint", 1, "--labels", 0, "--compare-arms", *train.ARMS), "and --soft are all 0"),
            (("--compare-arms", "labels", "distillation"), arms))))


START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT = multiprocessing.get_context(START)
if START == "forkserver":
    CONTEXT.set_forkserver_preload([Path(__file__).stem])


class Training(CONTEXT.Process):
    """train.py in a process of its own, which prints to `log`; `prepare`, no lambda, runs first."""

    def __init__(self, arguments: list[str], log: Path, prepare: Callable = int) -> None:
        super().__init__(target=train_as_a_script, args=(arguments, log, prepare))
        self.log = log
        log.write_text("")
        self.start()

    def wait_for(self, text: str) -> None:
        wait_for(text, self.log, self.is_alive)

    def printed(self) -> str:
        return self.log.read_text()

    def exit_code(self) -> int:
        self.join(60)
        return self.exitcode


def wait_for(text: str, log: Path, is_alive: Callable, times: int = 1) -> None:
    """Until a process has printed this."""
    deadline = time.monotonic() + 60
    while log.read_text().count(text) < times:
        if not is_alive() or time.monotonic() > deadline:
            raise AssertionError(f"{text!r} was not printed, but: {log.read_text()}")
        time.sleep(0.02)


def train_as_a_script(arguments: list[str], log: Path, prepare: Callable) -> None:
    """What a `Training` does."""
    if hasattr(os, "setsid"):
        os.setsid()
    os.fsync, os.environ["CUDA_VISIBLE_DEVICES"] = mock.Mock(), ""
    sys.argv = ["train.py", *arguments]
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    multiprocessing.set_start_method(None, force=True)  # of loaders' workers: the platform's own
    prepare()
    try:
        evaluate.run_script(train.main)
    finally:
        evaluate.kill_workers()  # as a script does at exit


def limit(what: str, most: int) -> None:
    import resource  # which Windows lacks
    resource.setrlimit(getattr(resource, what), (most, most))


def join_in_float64(environment: dict[str, str]) -> None:
    """Be a process of torchrun's that computes in float64 and with batch norm in eval mode.

    In float32 the order of sums can move weights by 1e-3 in ten steps, where a ReLU or a pooling
    turns; and a batch norm in train mode sees the images of its own process alone. Its statistics
    are made to differ before validation instead.
    """
    def validate(trainer: train.Trainer, original: Callable = train.Trainer.validate) -> object:
        for buffer in trainer.result.buffers() if train.rank() else ():
            buffer.add_(1)
        return original(trainer)

    train.Trainer.validate = validate
    os.environ.update(environment)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    evaluate.normalize = lambda *arguments: selfdistill.normalize(*arguments).double()
    nn.BatchNorm2d.train = lambda module, mode=True: nn.Module.train(module, False)


def contents(value: object) -> object:
    """What a checkpoint holds, without times, and with tensors as sums of their bits."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, zlib.crc32(value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items()
                if key not in ("seconds", "elapsed", "images_per_second")}
    return [contents(item) for item in value] if isinstance(value, list) else value


class ResumeTest(ImagesTestCase):
    """Runs that are interrupted, and end as if they had not been; KILLS tells how many to kill."""
    KILLS = int(os.environ.get("KILLS", 4))

    def left_by(self, out: str) -> tuple:
        """All that a run left, bit for bit, but for times."""
        folder = self.folder / out
        return (contents(self.last(out)), zlib.crc32((folder / "best.pt").read_bytes()),
                contents(read_log(folder)))

    def resume(self, *arguments: object, code: int = 0) -> str:
        return run(train.main, "--out", self.out, "--resume", *arguments, code=code)

    def test_a_run_killed_at_any_instant_ends_as_if_it_had_not_been(self) -> None:
        flags = ("--epochs", 2, "--batch-size", 9, "--save-every", 0.01)
        started = time.monotonic()
        self.assertEqual(self.start("expected", *flags).exit_code(), 0)
        seconds = time.monotonic() - started
        expected = self.left_by("expected")

        def kill_and_resume(k: int) -> None:
            process = self.start(f"killed{k}", *flags)
            process.join(random.Random(k).uniform(0.1, 1) * seconds)
            process.kill()
            process.join()
            for path in (self.folder / f"killed{k}").glob("*.pt"):
                evaluate.read_checkpoint(path)
            process = self.start(f"killed{k}", *flags, "--resume", "auto")
            self.assertEqual(process.exit_code(), 0, process.printed())
            self.assertEqual(self.left_by(f"killed{k}"), expected)

        with ThreadPool(2) as pool:
            pool.map(kill_and_resume, range(self.KILLS))

    def test_a_stopped_run_goes_on_with_the_very_next_batch_and_random_number(self) -> None:
        # MobileNet has dropout. An epoch has 3 batches of 6 images; its validation has 2.
        weights = self.folder / "weights.pth"
        state = models.mobilenet_v3_small(num_classes=5).state_dict()
        whiten, fit, epoch = 3, 3 + 2, 3 + 2  # batches
        for flags, stops in (  # the batch, after which epoch and batch; train images read from then
                (("--hint", 1, "--student-layer", "features.2", "features.4"),
                 ((2, 0, 0, 18 + 18), (whiten + 3 + 1, 0, 3, 6), (2 + 1, 1, 1, 12))),
                (("--weights", weights), ((1, 0, 0, 18), (3 + 1, 0, 0, 18 + 18 + 6),
                                          (fit + epoch + 1, 1, 1, 12)))):
            flags = ("--batch-size", 8, *flags)
            with self.subTest(flags):
                torch.save(state, weights)
                self.train("--epochs", 2, *flags, out="expected")
                with signal_in_batch(stops[0][0]):
                    self.train("--epochs", 2, *flags, code=STOPPED)
                weights.unlink()  # which are not needed again
                for (_, epochs, batches, images), (following, *_) in itertools.pairwise(
                        [*stops, [0]]):
                    with (signal_in_batch(following), mock.patch.object(
                            evaluate, "load_image", wraps=evaluate.load_image) as read):
                        printed = self.resume(code=STOPPED if following else 0)
                    self.assertIn(f"after {epochs} epochs and {batches} batches of the", printed)
                    self.assertEqual(images, sum(Path(call.args[0]).is_relative_to(
                        self.data / "train") for call in read.call_args_list))
                self.assertEqual(self.left_by("out"), self.left_by("expected"))
                shutil.rmtree(self.out)
                shutil.rmtree(self.folder / "expected")

    @unittest.skipUnless(hasattr(signal, "SIGUSR1"), "signals are those of POSIX")
    def test_sigusr1_saves_and_goes_on_and_other_signals_finish_the_step_and_save(self) -> None:
        for number, code, workers in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0)):
            process, positions = self.start("out", "--epochs", 10000, "--batch-size", 8,
                                            "--workers", workers), set()
            process.wait_for("1/10000 ")
            while len(positions) < 2:  # epochs alone, without a batch, would be saved at their ends
                os.kill(process.pid, signal.SIGUSR1)
                time.sleep(0.05)
                state = self.last()["run"]
                positions |= {(state["epoch"], state["batch"])} if state["batch"] else set()
                self.assertTrue(process.is_alive(), process.printed())
            os.killpg(process.pid, number)  # the loader's workers get it too
            self.assertEqual(process.exit_code(), code, process.printed())
            self.assertRegex(process.printed().splitlines()[-1],
                             r"^stopped in epoch \d+ after batch \d; go on with: python train.py "
                             f"--resume {self.out}/last.pt$")
            evaluate.read_checkpoint(self.out / "last.pt")
            self.assertFalse(list(self.out.glob(".*")))

    @unittest.skipUnless(train.fcntl, "folders cannot be locked")
    def test_a_folder_belongs_to_one_run_until_it_ends_or_is_killed(self) -> None:
        first = self.start("out", "--epochs", 10000, "--workers", 1)
        first.wait_for("1/10000 ")
        for flags in ((), ("--resume", "--epochs", 10000), ("--compare", 2)):
            self.assert_errors(train.main, (flags, "another run is writing to .*out: wait for it"))
        os.killpg(first.pid, signal.SIGSTOP)  # the worker stays, whatever becomes of its parent
        self.addCleanup(os.killpg, first.pid, signal.SIGKILL)
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        self.train()

    def test_sighup_stops_a_run_unless_it_is_ignored(self) -> None:
        for out, action, code in (("hangup", signal.SIG_DFL, 129), ("nohup", signal.SIG_IGN, 143)):
            process = self.start(out, "--epochs", 10000,
                                 prepare=partial(signal.signal, signal.SIGHUP, action))
            with self.subTest(out):
                process.wait_for("1/10000 ")
                os.killpg(process.pid, signal.SIGHUP)
                if action == signal.SIG_IGN:
                    time.sleep(0.5)
                    os.killpg(process.pid, signal.SIGTERM)
                self.assertEqual(process.exit_code(), code, process.printed())
                self.assertRegex(process.printed(), "\nstopped in epoch .*\n$")

    def test_a_run_goes_on_without_its_standard_output(self) -> None:
        reader, unread = os.pipe()
        os.close(reader)
        for file, told in ((unread, ""), ("/dev/full", "No space left on device")):
            with (self.subTest(file), open(file, "w") as stream,
                  mock.patch.object(sys, "stdout", stream),
                  contextlib.redirect_stderr(io.StringIO()) as errors):
                evaluate.run_script(partial(train.main, tiny(self.data, self.out, "--epochs", 2)))
                sys.stdout.detach()  # so that `stream` closes it
            self.assertEqual(errors.getvalue(), told and f"standard output is lost: {told}\n")
            self.assertEqual(len(read_log(self.out)), 2)
            shutil.rmtree(self.out)

    def test_a_second_ctrl_c_stops_at_once_but_not_a_second_sigterm(self) -> None:
        before = signal.getsignal(signal.SIGINT)  # ignored, in a job in the background
        with train.Signals() as signals:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
        self.assertEqual(signals.stop, signal.SIGTERM)
        for numbers in ((signal.SIGINT,), (signal.SIGTERM, signal.SIGINT),
                        (signal.SIGINT, signal.SIGTERM)):
            with self.assertRaises(KeyboardInterrupt), train.Signals():
                for number in (*numbers, signal.SIGINT):
                    signal.raise_signal(number)
        self.assertIs(signal.getsignal(signal.SIGINT), before)

    def test_last_pt_is_saved_so_often(self) -> None:
        for minutes, saves in (((), 1 + 1), (("--save-every", 0), 1 + 3 + 1)):
            with mock.patch.object(train.Trainer, "save", autospec=True,
                                   side_effect=train.Trainer.save) as save:
                self.train("--batch-size", 8, *minutes)
            self.assertEqual(save.call_count, saves)
        trainer = mock.Mock(saved=time.monotonic() - 119, signals=train.Signals(), stop=0)
        trainer.args.save_every = 2.0
        self.assertFalse(train.Trainer.attend_to_signals(trainer))
        trainer.saved -= 2
        self.assertTrue(train.Trainer.attend_to_signals(trainer))

    def test_flags_come_from_the_checkpoint_and_must_not_contradict_it(self) -> None:
        self.train("--alpha", 0.25, "--lr", 0.01, "--student-layer", "features.2")
        before = self.last()["args"]
        self.resume("--workers", 1, "--precision", "auto", "--data", self.data)
        self.assertEqual(self.last()["args"], before | {"workers": 1})
        self.assert_errors(train.main, (
            ("--resume", "--no-distillation"),
            "error: --no-distillation contradicts the run to resume, which has --distillation"),
            (("--resume", "--seed", 5, "--alpha", 0.5), "error: --alpha 0.5 contradicts"), *(
            (("--resume", flag, value),
             f"{flag} {value} contradicts the run to resume, which has ({flag} )?{saved}")
            for flag, value, saved in (
                ("--seed", 5, 0), ("--size", 64, 32), ("--batch-size", 4, 18), ("--hint", 2.0, 0.3),
                ("--recipe", "blog", "tuned"), ("--lr", 0.5, 0.01), ("--alpha", 0.5, 0.25),
                ("--weights", "imagenet", "none"), ("--precision", "bf16", "fp32"),
                ("--epochs", 2, "1: its learning rate ends there"),
                ("--student-layer", "features.3", "features.2"))))

    def test_epochs_may_be_raised_at_a_constant_rate(self) -> None:
        flags = ("--recipe", "blog", "--batch-size", 8)
        self.train(*flags, "--epochs", 2, out="expected")
        with signal_in_batch(2):
            self.train(*flags, code=STOPPED)
        self.assertIn("2 instead of 1, at the same learning rate", self.resume("--epochs", 2))
        self.assertEqual(self.left_by("out"), self.left_by("expected"))
        self.assert_errors(train.main, ((*flags, "--resume"), "--epochs 1 contradicts "
                                        "the run to resume, which has 2: they can only be raised"))

    def test_data_that_have_changed_are_refused(self) -> None:
        self.data = write_images(self.folder / "images")
        self.train()
        image = self.data / "train" / "star" / "5.png"
        for change, message in (
                (lambda: image.rename(image.with_name("9.png")), "train/ has 18 images .* 18 "),
                (lambda: image.with_name("9.png").unlink(), "train/ has 17 images .* now, 18 "),
                (lambda: write_images(self.data, ("drop",)), "added or removed: drop")):
            change()
            self.assert_errors(train.main, (("--resume",), f"{self.data} has changed since the run "
                                                           f"began: .*{message}"))

    def test_without_a_file_only_auto_starts_anew(self) -> None:
        missing = "error: {}: No such file"
        self.assert_errors(train.main, (("--resume",), missing.format(self.out / "last.pt")),
                           (("--resume", "nowhere.pt"), missing.format("nowhere.pt")))
        self.assertFalse(self.out.exists())
        self.assertIn("last.pt yet: starting anew", self.train("--resume", "auto"))

    def test_a_state_that_makes_no_sense_or_is_of_an_older_version_is_refused(self) -> None:
        self.train()
        last, state = self.last(), self.last()["run"]
        older = {("model" if name == "distiller" else name): value for name, value in state.items()
                 if name not in ("best_epoch", "best_acc", "start_acc")}
        for run_part in (older, state | {"epoch": "one"}, state | {"optimizer": {}},
                         state | {"scheduler": 3}, state | {"data": None},
                         state | {"totals": torch.zeros(9)}):
            torch.save(last | {"run": run_part}, self.out / "last.pt")
            self.assert_errors(train.main, (("--resume",), "the checkpoint cannot be resumed, as "
                                                           "it is damaged or of another version"))
        torch.save(last | {"args": last["args"] | {"lr": "fast"}}, self.out / "last.pt")
        self.assert_errors(train.main, (("--resume",), "--lr: 'fast' is not a number"))

    def test_resuming_from_elsewhere_keeps_what_lies_there_and_counts_the_best_anew(self) -> None:
        self.train("--seed", 1)
        with signal_in_batch(3 + 3 + 2 + 1):
            printed = self.train("--seed", 2, "--epochs", 2, "--batch-size", 8, code=STOPPED)
        self.assertRegex(printed, r"kept the earlier .*best\.pt.* as .*best\.1\.pt")
        printed = run(train.main, "--resume", self.out / "last.pt", "--out", self.folder / "other")
        self.assertEqual(torch.load(self.folder / "other" / "best.pt")["epoch"], 2)
        run(train.main, "--resume", self.out / "last.1.pt")
        seeds = {path.name: torch.load(path)["args"]["seed"] for path in self.out.glob("last*")}
        self.assertEqual(seeds, {"last.pt": 1, "last.1.pt": 1, "last.2.pt": 2})
        self.assertEqual(len(read_log(self.out)), 1)

    def test_a_run_may_begin_with_the_best_of_the_one_that_it_replaces(self) -> None:
        self.out.mkdir()
        (self.out / "report.html").touch()
        self.train()  # which writes no report, and still keeps the earlier one
        self.assertTrue((self.out / "report.1.html").exists())
        before = self.left_by("out")
        with mock.patch.object(train.Trainer, "validate", side_effect=evaluate.UserError("no")):
            self.assert_errors(train.main, (("--weights", self.out / "best.pt"), "error: no"))
        self.assertEqual(self.left_by("out"), before)  # as the new run has written nothing
        printed = self.train("--weights", self.out / "best.pt", "--lr", 0)
        self.assertRegex(printed, r"kept the earlier .*best\.pt")
        self.assertRegex(printed, "epoch 0 .*; peak lr 0\n")
        assert_close(torch.load(self.out / "best.pt")["model"]["features.0.0.weight"],
                     torch.load(self.out / "best.1.pt")["model"]["features.0.0.weight"])

    @unittest.skipUnless(importlib.util.find_spec("resource"), "files cannot be limited")
    def test_a_full_disk_leaves_the_earlier_files(self) -> None:
        self.train("--recipe", "blog")
        last = (self.out / "last.pt").read_bytes()
        for size, name in ((10_000_000, "last.pt"), (4_000_000, "best.pt")):
            process = self.start("out", "--recipe", "blog", "--epochs", 2, "--resume",
                                 prepare=partial(limit, "RLIMIT_FSIZE", size))
            self.assertEqual(process.exit_code(), 1)
            self.assertRegex(process.printed(), f"error: cannot write .*{name}: File too large\n$")
            self.assertTrue((self.out / "last.pt").read_bytes() == last)
            evaluate.read_checkpoint(self.out / "best.pt")
            self.assertEqual(sorted(os.listdir(self.out)), ["best.pt", "last.pt", "log.jsonl"])

    def test_unreadable_images_are_left_out_of_training_and_evaluation(self) -> None:
        self.data = write_images(self.folder / "images")
        bad = [self.data / "train" / "star" / "1.png", self.data / "val" / "circle" / "2.png"]
        bad[0].write_bytes(b"not an image")
        Image.new("1", (20000, 20000)).save(bad[1])  # over Pillow's limit for a bomb
        printed = self.train("--skip-unreadable")
        for path, count in zip(bad, (18, 9)):
            self.assertIn(f"1 of {count} images cannot be read and are left out: {path}", printed)
        self.assertIn("17 train and 8 val images", printed)
        self.resume()
        line, = read_log(self.out)
        figures, _ = self.evaluate(self.out / "best.pt")
        self.assertEqual((figures["count"], figures["loss"]), (8, line["val_loss"]))
        torch.save(checkpoint_of(self.data), self.folder / "plain.pt")  # of no such training
        self.assert_errors(evaluate.main, ((self.folder / "plain.pt", "--workers", 0),
                                           f"cannot read the image {bad[1]}"))
        figures, _ = self.evaluate(self.folder / "plain.pt", "--skip-unreadable")
        self.assertEqual(figures["count"], 8)
        bad[0].unlink()
        self.resume()
        for path in (self.data / "val" / "star").iterdir():
            path.write_bytes(b"")
        self.assert_errors(train.main,
                           (("--skip-unreadable",), "no image that can be read for star"))

    @unittest.skipUnless(importlib.util.find_spec("resource"), "files cannot be limited")
    def test_few_files_are_open_however_many_batches_there_are(self) -> None:
        write_images(self.folder / "many", train_count=2, val_count=40)
        process = self.start("out", "--data", self.folder / "many", "--batch-size", 2, "--workers",
                             1, prepare=partial(limit, "RLIMIT_NOFILE", 60))  # 60 val batches
        self.assertEqual(process.exit_code(), 0, process.printed())


class ProcessesTest(ImagesTestCase):
    """Several processes that train together as one would."""

    def start_group(self, count: int, out: str, *arguments: object) -> list[Training]:
        """So many processes, as torchrun starts them; the first prints to `out`0.log."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                           "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                           "TORCHELASTIC_RUN_ID": "test"} if count > 1 else {}
        return [self.start(out, "--arch", "shufflenet_v2_x0_5", "--size", 64, "--lr", 0.01,
                           *arguments, log=str(rank), prepare=partial(  # it has no dropout
                               join_in_float64, environment | {"RANK": str(rank),
                                                               "LOCAL_RANK": str(rank)}))
                for rank in range(count)]

    def finish(self, processes: list[Training], code: int = 0) -> None:
        for process in processes:
            self.assertEqual(process.exit_code(), code, process.printed())

    def assert_close_runs(self, out: str, expected: str) -> None:
        ours, theirs = self.last(out), self.last(expected)
        assert_close(ours["run"]["distiller"], theirs["run"]["distiller"], rtol=0, atol=1e-10)
        assert_close(ours["model"], theirs["model"], rtol=0, atol=1e-10)
        for line, other in zip(*(read_log(self.folder / name) for name in (out, expected)),
                               strict=True):
            for key in ("val_acc", "train_acc", "exit_train_acc"):
                self.assertEqual(line[key], other[key])
            for key in ("train_loss", "ce_loss", "val_loss", "terms"):
                assert_close(line[key], other[key], rtol=1e-6, atol=0)

    def test_two_processes_learn_and_measure_what_one_does(self) -> None:
        torch.manual_seed(0)
        torch.save(models.shufflenet_v2_x0_5(num_classes=5).state_dict(),
                   self.folder / "weights.pth")
        groups = [self.start_group(count, f"of{count}", "--batch-size", 4, "--hint", 1, "--weights",
                                   self.folder / "weights.pth")
                  for count in (1, 2)]  # 5 steps; 9 val images
        self.finish(groups[0] + groups[1])
        self.assert_close_runs("of2", "of1")
        self.assertEqual((self.folder / "of21.log").read_text(), "")  # only the first prints

    def test_more_processes_than_val_images_count_each_once(self) -> None:
        self.data = write_images(self.folder / "images", ("circle", "star"), 7, val_count=1)
        (self.data / "train" / "star" / "3.png").write_bytes(b"not an image")
        groups = [self.start_group(count, f"of{count}", "--batch-size", 12, "--skip-unreadable")
                  for count in (1, 3)]
        self.finish(groups[0] + groups[1])
        self.assert_close_runs("of3", "of1")

    def test_a_run_of_two_processes_goes_on_as_one(self) -> None:
        flags = ("--batch-size", 4, "--recipe", "blog", "--epochs", 2)
        alone = self.start_group(1, "expected", *flags)
        processes = self.start_group(2, "out", *flags)
        processes[0].wait_for(" 1/2 ")
        os.kill(processes[1].pid, signal.SIGTERM)  # a signal to one stops all
        self.finish(processes, code=143)
        self.assertIn("go on with: torchrun ... train.py", processes[0].printed())
        self.finish(alone + self.start_group(1, "out", *flags, "--resume"))
        self.assert_close_runs("out", "expected")

    def test_a_mistake_ends_all_processes_with_its_own_error(self) -> None:
        self.data = write_images(self.folder / "images")
        (self.data / "train" / "star" / "3.png").write_bytes(b"not an image")
        for flags, *messages in (
                (("--batch-size", 9), *["--batch-size 9 cannot be split evenly among 2 processes: "
                                        "use a multiple of 2"] * 2),
                (("--workers", 1), "cannot read the image .*3.png", "cannot reach the others")):
            with self.subTest(flags):
                processes = self.start_group(2, "out", *flags)
                self.finish(processes, code=1)
                errors = sorted(process.printed().splitlines()[-1] for process in processes)
                for error, message in zip(errors, messages):
                    self.assertRegex(error, f"train.py: error: .*{message}")

    @unittest.skipUnless("KILLS" in os.environ, "slow: only with KILLS, as in .ci/run")
    @unittest.skipUnless(Path("/proc/self/task").exists(), "it finds the processes in /proc")
    def test_torchrun_restarts_from_the_last_save_and_stops_with_one(self) -> None:
        log = self.folder / "torchrun.log"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                 "2", "--max-restarts", "1", HERE / "train.py",
                 *tiny(self.data, self.out, "--epochs", 10000, "--resume", "auto")],
                stdout=output, stderr=output, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        wait = partial(wait_for, log=log, is_alive=lambda: process.poll() is None)
        wait("2/10000 ")
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(ranks[1]), signal.SIGKILL)
        wait("data   ", times=2)
        wait("/10000 ", times=log.read_text().count("/10000 ") + 1)
        process.terminate()
        process.wait(60)
        printed = log.read_text()
        numbers = re.findall(r"^ *(\d+)/10000 ", printed, re.MULTILINE)
        self.assertEqual(numbers, [str(k + 1) for k in range(len(numbers))])
        for text in ("yet: starting anew", "stopped in epoch"):
            self.assertEqual(printed.count(text), 1)
        evaluate.read_checkpoint(self.out / "last.pt")


@unittest.skipUnless(HAS_CUDA, "needs CUDA")
class CudaTest(TrainerTestCase):
    """What differs on a GPU."""
    DEVICE = "cuda"

    def setUp(self) -> None:
        super().setUp()
        patch = mock.patch("torch.cuda.is_available", return_value=True)
        patch.start()
        self.addCleanup(patch.stop)

    def make(self, *machine: str, **flags: object) -> train.Trainer:
        """A Trainer whose steps replay graphs."""
        trainer = super().make(*machine, **flags)
        trainer.record_graphs()
        return trainer

    def test_a_step_changes_all_weights_in_any_precision(self) -> None:
        self.check_step(self.DEVICE, ("fp32", "bf16", "fp16"))

    def test_an_overflow_in_fp16_is_skipped_by_the_schedule_too(self) -> None:
        self.check_overflow(self.DEVICE)

    def test_graphs_compute_the_same_steps(self) -> None:
        with torch.backends.cudnn.flags(deterministic=True, allow_tf32=False):
            trainers = [make(self.DEVICE, hint=1.0, labels=1.0, soft=1.0, batch_size=4)
                        for make in (super().make, self.make)]
            self.assertEqual([list(trainer.graphs) for trainer in trainers], [[], [4, 3]])
            assert_close(*(trainer.distiller.state_dict() for trainer in trainers), rtol=0, atol=0)
            for count in (4, 3, 4):
                gradients = []
                for trainer in trainers:
                    trainer.step(self.images[:count], self.labels[:count])
                    gradients.append(torch.cat([parameter.grad.flatten() for parameter
                                                in trainer.distiller.parameters()]))
                self.assertGreater(F.cosine_similarity(*gradients, dim=0).item(), 0.99)
                assert_close(*(gradient.norm() for gradient in gradients), rtol=0.02, atol=0)
        assert_close(*(dict(trainer.distiller.named_buffers()) for trainer in trainers),
                     rtol=0.02, atol=0.001)
        losses = [trainer.totals[:-3] for trainer in trainers]
        assert_close(*losses, rtol=0.02, atol=0)
        self.assertFalse(losses[1].requires_grad)

    def test_steps_do_not_wait_for_the_gpu(self) -> None:
        images, labels = self.images.pin_memory(), self.labels.pin_memory()
        for precision in ("fp32", "bf16"):
            trainer = self.make_fine_tuning("resnet18", self.DEVICE, precision, epochs=10)
            trainer.decay = 0.9  # of the average
            trainer.step(images, labels)  # the first, which may wait
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):
                    trainer.step(images, labels)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            self.assertTrue(trainer.totals.isfinite().all())

    def test_maps_stay_in_channels_last(self) -> None:
        trainer, layouts = super().make(self.DEVICE, "auto"), []
        for module in trainer.model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, inputs, output: layouts.append(
                    output.is_contiguous(memory_format=torch.channels_last)))
        trainer.step(self.images, self.labels)
        self.assertEqual(layouts, [True] * 20)

    def test_only_here_batches_are_pinned_and_moved_without_waiting(self) -> None:
        for device, is_pinned in ((self.DEVICE, True), ("cpu", False)):
            loader = evaluate.Machine(device, "fp32", 0).loader(self.splits[0], batch_size=4)
            self.assertEqual(next(iter(loader))[0].is_pinned(), is_pinned)

    @unittest.skipUnless(shutil.which("gcc") or shutil.which("clang"), "needs a C compiler")
    def test_a_compiled_run_learns_what_one_that_is_not_does(self) -> None:
        for out, flags in (("plain", ()), ("compiled", ("--compile",))):
            self.train("--device", self.DEVICE, *RESNET18, "--lr", 0.01, *flags, out=out)
        plain, compiled = (read_log(self.folder / out)[0] for out in ("plain", "compiled"))
        assert_close(compiled["train_loss"], plain["train_loss"], rtol=0.05, atol=0)

    def test_a_resumed_run_goes_on_as_if_never_stopped(self) -> None:
        # To the bit, but for what torch cannot do deterministically, which it warns of.
        flags = ("--device", self.DEVICE, *RESNET18, "--epochs", 2, "--lr", 0.01, "--batch-size", 8)
        self.addCleanup(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.train(*flags, out="expected")
        with signal_in_batch(3 + 2):
            self.train(*flags, code=STOPPED)
        self.train(*flags, "--resume")
        for part in ("distiller", "optimizer"):
            assert_close(self.last()["run"][part], self.last("expected")["run"][part],
                         rtol=1e-3, atol=1e-4)

    def test_a_checkpoint_is_worth_the_same_on_the_cpu(self) -> None:
        printed = self.train("--device", self.DEVICE, *RESNET18)
        self.assertRegex(printed, r"GPU memory at most \d+\.\d\d GiB")
        self.train("--device", "cpu", *RESNET18, out="cpu")
        for out in ("out", "cpu"):
            best = self.folder / out / "best.pt"
            losses = [self.evaluate(best, "--device", device)[0]["loss"]
                      for device in (self.DEVICE, "cpu")]
            assert_close(*losses, rtol=0.05, atol=0)
            for suffix in (".pt2", ".pth"):
                printed = run(evaluate.main, best, "--export", self.folder / f"network{suffix}")
                self.assertIn("its outputs for 8 val images differ from the network's by", printed)

    def test_one_process_of_torchrun_computes_with_nccl(self) -> None:
        process = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
             HERE / "train.py", *tiny(self.data, self.out, "--device", self.DEVICE, *RESNET18)],
            capture_output=True, text=True, timeout=120)
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertIn(f"machine    {self.DEVICE}", process.stdout)
        self.assertEqual(len(read_log(self.out)), 1)

    def test_too_little_memory_is_said_in_one_line(self) -> None:
        self.addCleanup(torch.cuda.set_per_process_memory_fraction, 1.0)
        gc.collect()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_reserved() + 2 ** 25  # less than a ResNet18's weights more
        torch.cuda.set_per_process_memory_fraction(left / torch.cuda.mem_get_info()[1])
        self.assert_errors(train.main, (("--device", self.DEVICE, *RESNET18, "--size", 224),
                                        "out of memory: use a smaller --batch-size"))


class DamagedFilesTest(ImagesTestCase):
    """A damaged file loads and works, or ends in one line; FUZZED_COPIES tells how many to try."""
    COPIES = int(os.environ.get("FUZZED_COPIES", 4))

    @staticmethod
    def damaged(whole: bytes, k: int) -> bytes:
        """A copy that is damaged in another way for each k."""
        rng, damaged = random.Random(k), bytearray(whole)
        place = rng.randrange(len(whole))
        if k % 4 == 0:
            del damaged[place:]
        elif k % 4 == 1:
            del damaged[place:place + rng.randrange(1, 1000)]
        else:  # bits flipped: anywhere, or at the ends, where there is more than tensors
            reach = len(whole) if k % 4 == 2 else 8192
            for _ in range(rng.randrange(1, 20)):
                place = rng.choice([1, -1]) * rng.randrange(1, min(reach, len(whole)))
                damaged[place] ^= 1 << rng.randrange(8)
        return bytes(damaged)

    def test_checkpoints(self) -> None:
        content, path, outcomes = checkpoint_of(self.data), self.folder / "file.pt", set()
        for in_a_zip, k in itertools.product((True, False), range(self.COPIES)):
            torch.save(content, path, _use_new_zipfile_serialization=in_a_zip)
            path.write_bytes(self.damaged(path.read_bytes(), k))
            with self.subTest(in_a_zip=in_a_zip, copy=k):
                try:
                    run(evaluate.main, path, "--workers", 0)
                    outcomes.add("good")
                except evaluate.UserError as error:
                    self.assertNotIn("\n", str(error))
                    outcomes.add("bad")
        self.assertEqual(outcomes, {"good", "bad"})

    def test_what_is_missing_or_of_another_kind_in_a_checkpoint(self) -> None:
        self.train("--arch", "squeezenet1_1")
        content, path = self.last(), self.folder / "damaged" / "last.pt"
        path.parent.mkdir()
        places = [(key, key) for key in content] + [
            (part, key) for part in ("run", "args") for key in content[part]] + [
            ("model", "classifier.1.bias")]
        cases = [(*place, value) for place in places
                 for value in ("missing", "text", -1, [], {}, torch.full((2,), torch.nan))]
        for part, key, value in random.Random(0).sample(cases, min(self.COPIES, 100)):
            damaged = content | ({part: dict(content[part])} if part != key else {})
            holder = damaged if part == key else damaged[part]
            holder[key] = value
            if isinstance(value, str) and value == "missing":
                del holder[key]
            torch.save(damaged, path)
            for main, *flags in ((evaluate.main, str(path), "--workers=0"),
                                 (train.main, "--resume", str(path), "--workers=0")):
                with self.subTest(part=part, key=key, value=str(value), main=main.__module__):
                    try:
                        with (contextlib.redirect_stderr(io.StringIO()) as errors,
                              contextlib.redirect_stdout(io.StringIO())):
                            main(flags)
                    except SystemExit:  # a wrong flag
                        self.assertEqual(errors.getvalue().strip().count("\n"), 0)
                    except evaluate.UserError as error:
                        self.assertNotIn("\n", str(error))

    def test_a_zip_bomb_is_refused_before_it_is_unpacked(self) -> None:
        path = self.folder / "best.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("best/data.pkl", bytes(10_000))
        with mock.patch.object(torch, "load") as unpack:
            self.assert_errors(evaluate.main, ((path,), "not a checkpoint"))
        unpack.assert_not_called()

    def test_no_file_is_ever_executed(self) -> None:
        class Malicious:
            def __reduce__(self) -> tuple:
                return open, (str(marker), "w")

        marker, path = self.folder / "executed", self.folder / "best.pt"
        torch.save({"model": Malicious()}, path)
        self.assert_errors(evaluate.main, ((path,), "not a checkpoint"))
        self.assert_errors(train.main, (("--weights", path), "not a checkpoint"),
                           (("--resume", path), "not a checkpoint"))
        self.assertFalse(marker.exists())


class EvaluationTest(ImagesTestCase):
    # Ten predictions of classes a, b and c: the label, the best class, its probability.
    TEN = [(0, 0, 0.95), (0, 0, 0.95), (0, 0, 0.85), (0, 1, 0.55), (0, 1, 0.65),
           (1, 1, 0.95), (1, 1, 0.75), (1, 2, 0.75), (2, 2, 0.55), (2, 1, 0.95)]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        labels, best, confidences = zip(*cls.TEN)
        cls.ten = evaluate.Predictions(
            labels=torch.tensor(labels), losses=torch.arange(10) / 8, seconds=2.0,
            top=torch.tensor(best)[:, None], probabilities=torch.tensor(confidences)[:, None])
        torch.manual_seed(0)
        cls.classifier = nn.Linear(128, 3)
        cls.checkpoint = checkpoint_of(cls.data, "resnet18") | {
            "exits": {"layer2.1": cls.classifier.state_dict()}}
        cls.path = cls.shared / "best.pt"
        torch.save(cls.checkpoint, cls.path)
        cls.model, _, _ = load_classifier(cls.checkpoint)

    def read_table(self, path: Path) -> list[dict]:
        with open(path, newline="") as file:
            return list(csv.DictReader(file))

    def test_the_figures_of_ten_predictions_by_hand(self) -> None:
        figures = self.ten.summarize(list("abc"))
        interval = torch.tensor(figures.pop("top1_interval"))
        assert_close(interval, torch.tensor([0.3126738, 0.8318197]))  # Wilson, 6 of 10
        rows = {name: dict(zip(("count", "correct", "precision", "recall", "f1"), row))
                for name, *row in (("a", 5, 3, 1.0, 3 / 5, 3 / 4), ("b", 3, 2, 2 / 5, 2 / 3, 0.5),
                                   ("c", 2, 1, 0.5, 0.5, 0.5))}
        for figure, expected in (("macro_f1", 1.75 / 3), ("balanced_accuracy", 53 / 90)):
            self.assertAlmostEqual(figures.pop(figure), expected)
        self.assertEqual(figures, {
            "top1": 0.6, "top5": None, "loss": 0.5625, "count": 10, "images_per_second": 5.0,
            "per_class": rows,
            "most_confused": [{"label": "a", "prediction": "b", "count": 2},
                              {"label": "b", "prediction": "c", "count": 1},
                              {"label": "c", "prediction": "b", "count": 1}]})
        # Without the labels of c, which is predicted twice, and with a class d that is nowhere.
        part = self.ten._replace(**{name: getattr(self.ten, name)[:8] for name in (
            "labels", "losses", "top", "probabilities")}).summarize(list("abcd"))
        self.assertEqual(part["per_class"]["c"] | {"precision": 0}, dict.fromkeys(rows["c"], 0))
        self.assertEqual([*part["per_class"]], ["a", "b", "c"])
        self.assertAlmostEqual(part["macro_f1"], (3 / 4 + 4 / 7 + 0) / 3)
        self.assertAlmostEqual(part["balanced_accuracy"], (3 / 5 + 2 / 3) / 2)
        printed = run(lambda _: evaluate.print_summary(self.ten.summarize(list("abc"))))
        self.assertRegex(printed, r"\na +1\.0000 +0\.6000 +0\.7500 +3 +5\n")
        self.assertIn(
            "top-1 0.6000 (95 % interval 0.3127 to 0.8318)  loss 0.5625  10 images  5.0 images/s\n"
            "macro F1 0.5833  balanced accuracy (the classes' mean recall) 0.5889\n", printed)
        self.assertIn("most confused: a taken for b 2; b taken for c 1; c taken for b 1", printed)
        self.assertEqual(evaluate.confusion_matrix(self.ten, 3).tolist(),
                         [[3, 2, 0], [0, 2, 1], [0, 1, 1]])
        more = self.ten._replace(top=torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]] * 5))
        self.assertEqual(more.summarize(list("abcdefg"))["top5"], 0.8)

    def test_predictions_are_those_of_the_logits(self) -> None:
        odds = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
        loader = torch.utils.data.DataLoader(
            [(row.view(6, 1, 1), label) for row, label in zip(odds.log(), (5, 5, 0))], batch_size=2)
        machine = evaluate.Machine("cpu", "fp32")
        with mock.patch.object(machine, "prepare", lambda images: images):
            result = evaluate.predict(nn.Flatten(), loader, machine)
        assert_close(result.losses, -(torch.tensor([6.0, 1.0, 1.0]) / 21).log())
        self.assertEqual(result.correct.tolist(), [True, False, False])
        assert_close(result.probabilities, torch.tensor([[6.0, 5, 4, 3, 2]] * 3) / 21)
        self.assertEqual(result.top.tolist(), [[5, 4, 3, 2, 1], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1]])

    def test_people_see_names_and_files_keep_the_folders(self) -> None:
        self.assertEqual(evaluate.read_names(self.folder, ["n01440764", "other"]),
                         ["tench", "other"])
        data = write_images(self.folder / "images", train_count=4)
        (data / "classes.txt").write_text("star, Stern, fünfzackig\n\ncircle,Kreis\n", "utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.assertEqual(evaluate.read_names(data / "train", ["circle"]), ["Kreis"])
        self.assertRegex(output.getvalue(), "^note: .*classes.txt names star, which are no class")
        self.train("--data", data, "--report")
        best = torch.load(self.out / "best.pt")
        self.assertEqual(best["classes"], ["circle", "square", "star"])
        self.assertEqual(best["names"], ["Kreis", "square", "Stern, fünfzackig"])
        figures, printed = self.evaluate(self.out / "best.pt", "--report", self.folder)
        self.assertEqual([*figures["per_class"]], best["classes"])
        for page in (self.folder / "report.html", self.out / "report.html"):
            self.assertIn("Stern, fünfzackig (star)", page.read_text("utf-8"))
        self.assertRegex(printed, r"Kreis \(circle\) +\d")
        self.assertRegex(run(evaluate.main, self.out / "best.pt", "--workers", 0, "--predict",
                             data / "val" / "star" / "0.png"), "0.png: (star|circle|square) ")
        (data / "classes.txt").write_text("star Stern")
        self.assert_errors(train.main, (("--data", data), "classes.txt cannot be used: expected"))

    def test_cells_that_a_spreadsheet_would_run_are_made_harmless(self) -> None:
        evaluate.write_csv(self.folder / "table.csv", [("=1+1.png", "-a", "@b", 0.5),
                                                       ("-1+1.png", "-1", "+0.5", 0.5)])
        self.assertEqual(self.read_table(self.folder / "table.csv"), [
            {"path": "'=1+1.png", "label": "'-a", "prediction": "'@b", "confidence": "0.5"},
            {"path": "'-1+1.png", "label": "-1", "prediction": "+0.5", "confidence": "0.5"}])
        evaluate.write_csv(self.folder / "table.csv", [("\udcff.png", "a", "b", 0.5)])
        self.assertIn(b"\xff.png", (self.folder / "table.csv").read_bytes())  # no UTF-8

    def test_a_file_is_written_whole_through_its_own_link_but_no_planted_one(self) -> None:
        path, link, victim = (self.folder / name for name in ("figures.json", "link", "victim"))
        victim.write_text("kept")
        link.symlink_to(path.name)  # to no file at first
        for target, content in ((link, "first"), (link, "second"), (path, "third")):
            (self.folder / f".figures.json.{os.getpid()}.tmp").symlink_to(victim)
            evaluate.write_file(target, content.encode())
            self.assertTrue(link.is_symlink())
            self.assertEqual((path.read_text(), victim.read_text()), (content, "kept"))
        self.assertEqual(sorted(os.listdir(self.folder)), ["figures.json", "link", "victim"])

    def test_the_scripts_find_their_module_in_safe_mode(self) -> None:
        # `python -P` leaves a script's folder out of sys.path.
        path = [folder for folder in sys.path if Path(folder).resolve() != HERE]
        for name in ("train.py", "evaluate.py"):
            with (mock.patch.dict(sys.modules), mock.patch.object(sys, "path", path.copy()),
                  mock.patch.object(sys, "argv", [name, "--help"])):
                for module in ("train", "evaluate", "selfdistill"):
                    del sys.modules[module]
                run(lambda _: runpy.run_path(str(HERE / name), run_name="__main__"))

    def test_what_is_written_of_each_image(self) -> None:
        figures, _ = self.evaluate(self.path, "--batch-size", 1, "--save-predictions",
                                   self.folder / "table.csv")
        rows = self.read_table(self.folder / "table.csv")
        self.assertEqual([row["path"] for row in rows], [
            str(self.data / "val" / name / f"{k}.png")
            for name in figures["classes"] for k in range(3)])
        counts = [[sum((row["label"], row["prediction"]) == (label, prediction) for row in rows)
                   for prediction in figures["classes"]] for label in figures["classes"]]
        self.assertEqual(figures["confusion_matrix"], counts)
        self.assertEqual(figures["top1"], sum(counts[k][k] for k in range(3)) / 9)

        with contextlib.redirect_stderr(io.StringIO()) as others:
            printed = run(evaluate.main, self.path, "--batch-size", 1, "--json", "-")
        self.assertEqual(json.loads(printed)["confusion_matrix"], counts)
        self.assertIn("top-1", others.getvalue())

        # Predicting the same images says the same, whatever else there is.
        bad = self.folder / "bad.jpg"
        bad.write_bytes(b"not an image")
        printed = run(evaluate.main, self.path, "--workers", 0, "--batch-size", 1, "--predict", bad,
                      self.data / "val", "--json", self.folder / "predictions.json",
                      "--save-predictions", self.folder / "predictions.csv", code=1)
        failure, *lines = printed.splitlines()
        self.assertRegex(failure, "cannot read the image .*bad.jpg: cannot identify image file")
        unread, *results = json.loads((self.folder / "predictions.json").read_text())
        self.assertEqual(unread, {"path": str(bad), "error": failure})
        self.assertEqual(self.read_table(self.folder / "predictions.csv")[1:],
                         [row | {"label": ""} for row in rows])
        for line, result, row in zip(lines, results, rows, strict=True):
            best = result["classes"][0]
            self.assertTrue(line.startswith(
                f"{row['path']}: {row['prediction']} {best['probability']:.4f}, "))
            self.assertEqual(best, {"class": row["prediction"],
                                    "probability": float(row["confidence"])})
            self.assertAlmostEqual(sum(guess["probability"] for guess in result["classes"]), 1, 5)

    def test_the_report_is_one_page_with_the_figures_and_the_mistakes(self) -> None:
        self.enter_folder()
        torch.save(self.checkpoint | {"start_acc": 0.25}, "best.pt")
        first = {"epoch": 1, "train_loss": 2.0, "ce_loss": 1.5, "distillation_loss": None,
                 "val_loss": 0.125, "train_acc": 1.0, "val_acc": 0.75, "lr": 0.1,
                 "exit_train_acc": {"layer2": 0.375}}
        second = first | {"epoch": 2, "val_loss": 100.0}
        for log in ("", "damaged", *(json.dumps(first | {key: value}) for key, value in (
                ("lr", math.nan), ("lr", -1.0), ("val_acc", None), ("val_loss", 10 ** 400)))):
            Path("log.jsonl").write_text(log)
            self.assertEqual(evaluate.read_log(Path("best.pt")), [])
        Path("log.jsonl").write_text(json.dumps(first) + "\n" + json.dumps(second) + "\n")
        self.assertEqual(evaluate.read_log(Path("best.1.pt")), [])
        shutil.copy("log.jsonl", "log.1.jsonl")
        self.assertEqual(evaluate.read_log(Path("best.1.pt")), [first, second])
        figures, _ = self.evaluate("best.pt", "--report", "new/folder", "--save-predictions",
                                   "table.csv")
        html = Path("new/folder/report.html").read_text()
        self.assertIn("loss by epoch", html)
        for point in ("val: 0.125 in epoch 1", "val: 0.25 in epoch 0", "val: 0.75 in epoch 2",
                      "layer2 (train): 0.375 in epoch 1"):
            self.assertIn(f"><title>{point}</title></circle>", html)
        self.assertIn("▲<title>val: 100 in epoch 2</title>", html)  # above the scale
        # Epoch 1, the first of equal ones, is at the left of the losses, halfway in the accuracies.
        self.assertEqual(re.findall(r'class="best" x1="([\d.]+)"', html), ["50.0", "175.0", "50.0"])
        rights = round(figures["top1"] * 9)
        self.assertIn(f"<b>{rights} of 9 ({100 * rights / 9:.1f} %)</b>right (top-1)", html)
        for row in self.read_table(Path("table.csv")):  # each of the nine, as right or as wrong
            self.assertIn("{}: label {label}, predicted {prediction} ({confidence:.2f})</".format(
                Path(row["path"]).name, **row | {"confidence": float(row["confidence"])}), html)
        self.assertEqual(html.count("data:image/jpeg;base64,"), 9)
        self.assertFalse(re.search(r"<script|<link|https?:|src=\"(?!data:)", html))

    def test_durations_and_shares_of_the_cores(self) -> None:
        for seconds, text in ((59.4, "59 s"), (59.6, "1 min 0 s"), (3 * 3600 + 61, "3 h 1 min")):
            self.assertEqual(evaluate.Progress.duration(seconds), text)
        with (mock.patch.object(os, "sched_getaffinity", lambda _: range(8), create=True),
              mock.patch.dict(os.environ, LOCAL_WORLD_SIZE="3")):
            self.assertEqual(evaluate.Machine.usable_cores(), 2)

    def test_the_axes_of_a_chart_end_at_round_figures(self) -> None:
        for low, high, expected in ((0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 5, [*range(6)]),
                                    (0.82, 1, [0.8, 0.85, 0.9, 0.95, 1]), (0, 7.3, [0, 2, 4, 6, 8]),
                                    (0, 0.0042, [0, 0.001, 0.002, 0.003, 0.004, 0.005])):
            assert_close(evaluate.ticks(low, high), [*map(float, expected)])

    def test_the_figures_are_on_the_page_with_names_as_text(self) -> None:
        dataset = evaluate.ImageFolder(self.data / "train", val_transform(32, normalized=False))
        names, exits = ["<b>", "square", "star"], {"exit": {"top1": 0.5, "images_per_second": 3.0}}
        html = evaluate.report_html("<u>", self.checkpoint | {"names": names}, self.ten, dataset,
                                    [], exits).decode()
        for part in ('<i style="width: 60%"></i><td>3 of 5 (60.0 %)<td>1.000<td>0.750',
                     'title="2 of 5: &lt;b&gt; (circle) taken for square"',
                     "<b>5 of 10 (50.0 %)</b>exit exit<"):
            self.assertIn(part, html)
        wrong, right = html.split("most confident mistakes")[1].split("least certain right answers")
        for part, expected in ((wrong, "0.95 0.75 0.65 0.55"),
                               (right, "0.55 0.75 0.85 0.95 0.95 0.95")):
            self.assertEqual(" ".join(re.findall(r"\((0\.\d\d)\)</fig", part)), expected)
        self.assertEqual(re.findall(r'<i style="width: (\d+)%', html), ["50", "60", "67"])
        self.assertIn("trained with: batch-size 8, precision fp32<", html)
        self.assertFalse(re.search("<u>|<b>[^0-9]", html))
        self.assertNotIn("loss by epoch", html)  # as there is no log
        for name in ("&lt;b&gt; (circle)", "&lt;u&gt;"):
            self.assertIn(name, html)

    def test_the_heat_map_has_the_counts_of_the_classes_with_the_most_mistakes(self) -> None:
        matrix = torch.zeros(40, 40, dtype=torch.int64)
        matrix[3, 7], matrix[7, 7], matrix[3, 3] = 40, 42, 10
        html = evaluate.heat_map(matrix, [f"class{k}" for k in range(40)])
        cells = re.findall(r'<td style="--share: (\d+)%.*? title="([^"]*)">(\d*)', html)
        self.assertEqual(len(cells), 30 * 30)
        for cell in (("63", "40 of 50: class3 taken for class7", "40"),  # 70 times the root of 0.8
                     ("31", "10 of 50: class3 taken for class3", "10"),
                     ("70", "42 of 42: class7 taken for class7", "42"),
                     ("0", "0 of 50: class3 taken for class0", "")):
            self.assertIn(cell, cells)
        self.assertNotIn("class39", html)

    def test_an_export_gives_the_outputs_of_the_network_on_any_number_of_images(self) -> None:
        images, metadata = torch.randn(3, 3, 32, 32), dict.fromkeys(
            ("arch", "classes", "size", "mean", "std"), "")
        for suffix in (".pt2", ".pth"):
            printed = run(evaluate.main, self.path, "--export", self.out / f"network{suffix}")
            self.assertIn("its outputs for 8 val images differ from the network's by", printed)
        program = torch.export.load(self.out / "network.pt2", extra_files=metadata)
        network = resnet18(num_classes=3)
        network.load_state_dict(torch.load(self.out / "network.pth"))
        with torch.no_grad():
            for count in (1, 3):
                for found in (program.module(), network.eval()):
                    assert_close(found(images[:count]), self.model(images[:count]),
                                 rtol=0, atol=1e-4)
        self.assertEqual({key: json.loads(value) for key, value in metadata.items()},
                         {key: self.checkpoint[key] for key in metadata})

    def test_an_export_whose_outputs_differ_is_not_written(self) -> None:
        path = self.folder / "network.pth"
        path.write_text("earlier")
        with mock.patch.object(evaluate, "load_tensors", lambda path: {
                name: value * 1.0002 if name.startswith("fc.") else value
                for name, value in selfdistill.load_tensors(path).items()}):
            self.assert_errors(evaluate.main, ((self.path, "--export", path),
                                               "is not written: its outputs would differ"))
        self.assertEqual(path.read_text(), "earlier")

    @unittest.skipUnless(importlib.util.find_spec("onnxscript"), "onnx and onnxscript are optional")
    def test_an_onnx_export_says_what_it_is(self) -> None:
        import onnx
        run(evaluate.main, self.path, "--export", self.folder / "network.onnx")
        metadata = {entry.key: entry.value
                    for entry in onnx.load(self.folder / "network.onnx").metadata_props}
        self.assertEqual(json.loads(metadata["classes"]), ["circle", "square", "star"])
        threshold = "torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD"
        with mock.patch(threshold, 0):  # as for weights beyond it, which go into a second file
            self.assert_errors(evaluate.main, (
                (self.path, "--export", self.folder / "large.onnx"), "too large for one .onnx"))
        self.assertFalse((self.folder / "large.onnx").exists())

    def test_an_exit_is_the_network_up_to_its_layer_with_the_classifier_trained_on_it(self) -> None:
        both, printed = self.evaluate(self.path)
        early, _ = self.evaluate(self.path, "--exit", "layer2.1")
        self.assertEqual(both["exits"]["layer2.1"]["loss"], early["loss"])
        self.assertIn(f"exit layer2.1: top-1 {early['top1']:.4f}", printed)

        network = evaluate.build_exits(self.model, self.checkpoint["exits"])["layer2.1"]
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            _, student, _ = plain_forward(self.model, images)
            assert_close(network(images), self.classifier(student.mean(dim=(2, 3))))
        names = " ".join(name for name, _ in network.named_parameters())
        self.assertNotRegex(names, "layer[34]")

        picture, exported = self.data / "val" / "star" / "0.png", self.folder / "exit.pt2"
        image = load_classifier(self.path)[2](Image.open(picture))[None]
        flags = (self.path, "--exit", "layer2.1")
        run(evaluate.main, *flags, "--export", exported)
        with contextlib.redirect_stderr(io.StringIO()) as others, torch.no_grad():
            assert_close(torch.export.load(exported).module()(image), network(image))
            best = json.loads(run(evaluate.main, *flags, "--workers", 0, "--predict", picture,
                                  "--json", "-"))[0]["classes"][0]
            self.assertAlmostEqual(best["probability"], network(image).softmax(1).max().item(), 4)
        self.assertIn(f"{picture}: ", others.getvalue())

    def test_folded_batch_norms_change_no_output(self) -> None:
        torch.manual_seed(0)
        model = resnet18(num_classes=3)
        images = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
        inputs = selfdistill.normalize(images.permute(0, 3, 1, 2))
        for parameter in model.bn1.parameters():
            nn.init.uniform_(parameter)
        model(inputs)  # moves the statistics
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            expected = model.eval()(inputs)
        loader = torch.utils.data.DataLoader([(image, 0) for image in images], batch_size=4)
        with mock.patch.object(nn.BatchNorm2d, "forward", side_effect=AssertionError):
            result = evaluate.predict(model, loader, evaluate.Machine("cpu", "fp32"))
        assert_close(result.probabilities, expected.softmax(dim=1).topk(3).values)
        assert_close(model.state_dict(), before)

    @unittest.skipUnless(platform.libc_ver()[0] == "glibc", "needs glibc")
    def test_freed_memory_is_used_again_without_new_pages(self) -> None:
        import resource
        evaluate.Machine("cpu", "fp32")
        faults = []
        for _ in range(10):  # the first few may leave holes a little too small for the next
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(2 ** 24)  # 64 MiB
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        self.assertLess(min(faults), 1000)  # of 16,384 pages

    def test_bf16_is_taken_where_the_cpu_has_it_and_the_checkpoint_was_not_in_fp32(self) -> None:
        for trained, able, flags, expected in (
                ("bf16", True, (), "bf16"), ("bf16", False, (), "fp32"), ("fp32", True, (), "fp32"),
                ("fp16", False, (), "fp32"), ("fp32", False, ("--precision", "bf16"), "bf16")):
            args = evaluate.parse_args(["best.pt", "--device", "cpu", *flags])
            with (self.subTest(trained=trained, able=able, flags=flags),
                  mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", return_value=able),
                  mock.patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False)):
                machine = evaluate.open_machine(args, {"args": {"precision": trained}})
                self.assertEqual(machine.precision, expected)
        for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            with evaluate.Machine("cpu", precision).autocast():
                self.assertEqual(nn.Conv2d(3, 4, 1)(torch.ones(1, 3, 2, 2)).dtype, dtype)


class ReadmeTest(TestCase):
    TEXT = (HERE / "README.md").read_text(encoding="utf-8")

    def test_the_code_runs_as_shown(self) -> None:
        self.enter_folder()
        torch.save(checkpoint_of(self.folder), "best.pt")
        train.draw_shape("star", random.Random(0)).save("cat.jpg")
        blocks = re.findall(r"```python\n(.*?)```", self.TEXT, re.DOTALL)
        self.assertEqual(len(blocks), 2)
        for code in blocks:
            run(lambda _: exec(compile(code, "README.md", "exec"), {}))
        resnet18(num_classes=10).load_state_dict(torch.load("plain_resnet18.pt"))

    def test_the_scripts_know_the_flags_of_every_command(self) -> None:
        parsers = {"train": train.make_parser().parse_args, "evaluate": evaluate.parse_args}
        commands = re.findall(r"(?:python|torchrun .*) (train|evaluate)\.py\b([^\n`#]*)", self.TEXT)
        self.assertEqual({script for script, _ in commands}, set(parsers))
        for script, arguments in commands:
            with self.subTest(script, arguments=arguments):
                parsers[script](arguments.split())

    def test_the_defaults_are_those_it_names(self) -> None:
        args, _ = train.settle({"data": "somewhere"})
        self.assertEqual((args.recipe, args.arch, args.weights, args.size, args.epochs, args.out,
                          args.save_every, args.alpha),
                         ("tuned", "resnet18", "imagenet", 224, 5, ".", 10.0, 0.5))
        for recipe, weights, *expected in (("tuned", "imagenet", 1.0, 1.0, 0.0, None),
                                           ("tuned", "none", 0.3, 1.0, 0.0, 0.05),
                                           ("byot", "none", 0.0, 0.7, 0.3, 0.05),
                                           ("blog", "none", 1.0, 0.0, 0.0, 0.01)):
            args, _ = train.settle({"data": "somewhere", "recipe": recipe, "weights": weights})
            self.assertEqual([args.hint, args.labels, args.soft, args.lr], expected)

    def test_the_recipes_are_those_of_the_table(self) -> None:
        rows = re.findall(r"^\| `(\w+)`.*?\|(.+?)\|(.+?)\|(.+?)\|(.+?)\|", self.TEXT, re.MULTILINE)
        self.assertEqual({name: [*map(float, cells)] for name, *cells in rows}, {
            name: [recipe[key] for key in ("hint", "labels", "soft", "students")]
            for name, recipe in train.RECIPES.items()})


class BadInputTest(ImagesTestCase):
    """Each mistake ends in one line that names the thing and what would be right."""

    def write_checkpoint(self, **changes: object) -> Path:
        path = self.folder / "best.pt"
        torch.save(checkpoint_of(self.data) | changes, path)
        return path

    def test_flags_that_make_no_sense(self) -> None:
        self.assert_errors(train.main, *(
            ((flag, value), f"{flag}: '{value}' is not a .*number between")
            for flag, value in (
                ("--epochs", 0), ("--epochs", "many"), ("--batch-size", -1), ("--size", 0),
                ("--batch-size", 10 ** 400), ("--size", 1.5), ("--workers", -1), ("--alpha", 1.1),
                ("--alpha", "nan"), ("--hint", -1), ("--labels", -0.5), ("--soft", "inf"),
                ("--lr", "inf"), ("--lr", -0.1), ("--seed", -1), ("--compare", 1))),
            (("--device", "cuda:99"), "device 'cuda:99' is not available"),
            *((("--device", name), f"device '{name}' is not available") for name in ("no", "meta")),
            (("--no-distillation", "--alpha", 1), "use a smaller --alpha"),
            (("--labels", 0, "--hint", 0), "--hint, --labels and --soft are all 0"),
            (("--recipe", "blog", "--hint", 0), "use --no-distillation"),
            (("--data", ""), "an argument is empty"), (("--data=",), "an argument is empty"))
        for size in (31, 2049):  # which must not come so far as to be trained at
            with mock.patch.object(train, "settle", side_effect=AssertionError):
                self.assert_errors(train.main, (("--size", size), "number between 32 and 2048"))
        for main in (train.main, evaluate.main):
            with contextlib.redirect_stderr(io.StringIO()) as errors:
                run(main, "best.pt", "--no-such-flag", code=2)
            self.assertRegex(errors.getvalue(), "error: .*--no-such-flag\n$")
        train.settle({"labels": 0.0, "hint": 0.0, "distillation": False})  # which makes sense
        self.assert_errors(evaluate.main, (("best.pt", "--batch-size", 0), "--batch-size"),
                           (("best.pt", "--data", ""), "an argument is empty"))

    def test_processes_train_together_on_cpus_or_gpus_of_their_own_alone(self) -> None:
        with mock.patch.multiple(train.dist, is_initialized=lambda: True, get_rank=lambda: 1,
                                 get_node_local_rank=lambda: 1):
            train.refuse_unfit_device(torch.device("cpu"))
            train.refuse_unfit_device(torch.device("cuda:1"))
            for device, message in (("mps", "not on mps: use --device cpu"),
                                    ("cuda:0", "process 1 has no GPU of its own")):
                with self.assertRaisesRegex(evaluate.UserError, message):
                    train.refuse_unfit_device(torch.device(device))

    def test_data_that_is_missing_or_incomplete(self) -> None:
        self.data = write_images(self.folder / "images", train_count=2, val_count=1)
        nowhere, flat = self.folder / "nowhere", self.folder / "flat"
        self.assert_errors(train.main, (("--data", nowhere), f"{nowhere} does not exist"))
        self.assert_errors(evaluate.main, ((self.write_checkpoint(data=str(nowhere)),),
                                           f"{nowhere} does not exist"))
        nowhere.mkdir()
        for split in ("train", "val"):
            (flat / split).mkdir(parents=True)
        (self.data / "train" / "star").rename(self.folder / "elsewhere")
        self.assert_errors(train.main, (("--data", nowhere), "nowhere has no class folders"),
                           (("--data", flat), "no class folders"),
                           ((), "classes of train/ and val/ .* differ: val/ alone has star"))
        (self.data / "train" / "star").mkdir()
        self.assert_errors(train.main, ((), "train has no images of the classes star: expected"))

    def test_an_image_that_cannot_be_read_is_named(self) -> None:
        self.data = write_images(self.folder / "images", train_count=2, val_count=1)
        whole = (self.data / "train" / "star" / "0.png").read_bytes()
        for content, split in ((b"", "train"), (b"not an image", "val"),
                               (whole[:len(whole) // 2], "train")):
            image = self.data / split / "star" / "0.png"
            image.write_bytes(content)
            self.assert_errors(train.main, ((), f"cannot read the image {image}"))
            image.write_bytes(whole)
        self.data /= "train"  # of which val is split off, by the files' content
        image = self.data / "star" / "gone.png"
        image.symlink_to("nowhere")
        self.assert_errors(train.main, ((), f"cannot read the image {image}: No such .*--skip-un"))

    def test_weights_that_are_missing_damaged_or_of_another_network(self) -> None:
        path, other = self.folder / "weights.pth", "not the weights of a torchvision"
        nan = {"bn1.bias": torch.full((64,), torch.nan)}
        for content, message in (
                (None, f"cannot get the weights '{path}'"), ([1, 2], f"{path}: not a checkpoint"),
                ({"model": 3}, other), ({"fc.weight": torch.zeros(3, 512)}, other),
                (checkpoint_of(self.data), f"{other} resnet18, but of shufflenet_v2_x0_5: "),
                (models.mobilenet_v3_small().state_dict(), f"{path}: {other}"),
                ({"fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)}, other),
                (resnet18().state_dict() | nan, "not all of its weights are finite")):
            if content is not None:
                torch.save(content, path)
            self.assert_errors(train.main, ((*RESNET18, "--weights", path), message))

    def test_weights_that_cannot_be_downloaded(self) -> None:
        for error in (URLError("no route"), RuntimeError("invalid hash value")):
            with (mock.patch.dict(os.environ, TORCH_HOME=str(self.folder)),
                  mock.patch("torch.hub.download_url_to_file", side_effect=error)):
                self.assert_errors(train.main, (("--weights", "imagenet"), "cannot get the weights "
                                                f"'imagenet' .*{error.args[0]}.*give a FILE"))

    def test_networks_and_layers_that_cannot_be_trained_here(self) -> None:
        cannot = "cannot be trained at --size 32 by --recipe tuned: "
        self.assert_errors(
            train.main, (("--arch", "resnet81"), "no classifier 'resnet81' in torchvision.models"),
            (("--student-layer", "layer9"), "no layer 'layer9' in MobileNetV3; did you mean"),
            (("--student-layer", "classifier.0"), f"{cannot}.*changed in place"),
            (("--student-layer", "classifier.3"), f"{cannot}.*neither maps"),
            (("--student-layer", "features.0.0"), f"{cannot}.*not present in model"))
        small = {"num_layers": 4, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16}
        with mock.patch("torchvision.models.vision_transformer.VisionTransformer",
                        lambda **options: models.VisionTransformer(**options | small)):
            self.assert_errors(train.main, (("--arch", "vit_b_16"), f"{cannot}.*Wrong image"))

    def test_known_failures_are_told_in_one_line(self) -> None:
        for error, message in ((OSError(24, "Too many open files"), "too many open files: use few"),
                               (RuntimeError("received 0 items of ancdata"), "too many open files"),
                               (RuntimeError("No working C++ compiler found"), "--compile needs")):
            self.assert_errors(mock.Mock(side_effect=error), ((), message))
        for error in OSError(24, "Too many open files"), OSError(23, "Too many open files in the"):
            with mock.patch.object(Image, "open", side_effect=error):
                self.assert_errors(lambda _: evaluate.load_image("a"), ((), "too many open files"))
        for full in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0"),
                     RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: "
                                  "can't allocate memory: you tried to allocate 9 bytes"),
                     RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
                     RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
                     RuntimeError("unable to open shared memory object </torch_1>"),
                     RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")):
            self.assert_errors(mock.Mock(side_effect=full), (
                (), "error: out of memory: use a smaller --batch-size, fewer --workers"))
        with self.assertRaisesRegex(RuntimeError, "other"):
            evaluate.run_script(mock.Mock(side_effect=RuntimeError("other")))

    @unittest.skipUnless(hasattr(os, "fork"), "needs processes that are forked")
    def test_workers_left_at_exit_are_killed_before_what_waits_for_them(self) -> None:
        # As torch does for each, if memory is pinned; on a GPU of 16 cores that took 80 seconds.
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=[60],
                                                             daemon=True)
        self.addCleanup(signal.signal, signal.SIGCHLD, signal.getsignal(signal.SIGCHLD))
        with mock.patch("atexit.register") as register:
            evaluate.run_script(lambda: (worker.start(), register(worker.join, 20)))
        for call in register.call_args_list[::-1]:  # as at exit
            call.args[0](*call.args[1:])
        self.assertEqual(worker.exitcode, -signal.SIGKILL)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "pipes and devices are those of POSIX")
    def test_what_is_no_regular_file_is_neither_written_to_nor_replaced(self) -> None:
        checkpoint = self.write_checkpoint()
        (self.folder / "folder").mkdir()
        (self.folder / "null").symlink_to(os.devnull)
        os.mkfifo(self.folder / "pipe")
        for name in ("folder", "null", "pipe"):
            path = self.folder / name
            before = path.stat()[:2]  # mode and inode
            with self.assertRaisesRegex(evaluate.UserError, f"{path}: it is not a regular file"):
                evaluate.write_file(path, b"figures")
            self.assert_errors(evaluate.main, ((checkpoint, "--workers", 0, "--json", path),
                                               f"{path}: it is not a regular file"))
            self.assertEqual(path.stat()[:2], before)

    def test_an_out_folder_that_cannot_be_written(self) -> None:
        file = self.folder / "file"
        file.write_text("")
        self.assert_errors(train.main, (("--out", file), f"error: {file}: File exists"))
        self.assert_errors(evaluate.main, ((self.write_checkpoint(), "--workers", 0, "--json",
                                            file / "figures.json"), "cannot write .*figures.json"))
        with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
            self.assert_errors(train.main, ((), r"cannot write .*last\.pt: No space left"))
        self.assertFalse(self.out.exists())
        self.out.mkdir()
        (self.out / "last.pt").write_bytes(b"")
        denied = OSError(13, "Permission denied", str(self.out))
        for patch in (mock.patch.object(Path, "rename", side_effect=denied),
                      mock.patch("os.access", return_value=False)):
            with patch:
                self.assert_errors(train.main, ((), f"error: (cannot write to )?{self.out}: "
                                                    "Permission denied$"))

    def test_a_failed_start_leaves_everything_as_it_was(self) -> None:
        (self.out / "compare").mkdir(parents=True)
        names = ("best.pt", "last.pt", "log.jsonl", "compare.json")
        for name in names:
            (self.out / name).write_text("earlier")
        before = sorted(self.out.rglob("*"))
        failure = evaluate.UserError("as it must")
        for flags in ((), ("--compare", 2)):
            with mock.patch.object(train.Trainer, "step", side_effect=failure):
                self.assert_errors(train.main, (flags, "error: as it must"))
            self.assertEqual(sorted(self.out.rglob("*")), before)
            self.assertEqual({(self.out / name).read_text() for name in names}, {"earlier"})

    def test_what_cannot_be_predicted_or_exported(self) -> None:
        checkpoint = self.write_checkpoint(exits={"stage2": nn.Linear(48, 3).state_dict()})
        (self.folder / "empty").mkdir()
        cases = [((checkpoint, *flags), message) for flags, message in (
            (("--predict", self.folder / "empty"), "empty has no images in it"),
            (("--exit", "stage3"), "has no exit stage3; it has stage2"),
            (("--export", "network.tf"), "must end in one of .pt2, .onnx, .pth"),
            (("--export", "network.pth", "--exit", "stage2"), "which an exit is not"),
            (("--export", "network.pth", "--json", "figures.json", "--device", "cpu"),
             "takes no --json or --device"),
            (("--export", "network.pt2", "--workers", 0), "--export takes no --workers"),
            (("--predict", "cat.jpg", "--data", "images"), "--predict takes no --data"),
            (("--export", "network.pth", "--predict", "a.jpg"), "not allowed with"),
            (("--export", self.folder / "network.onnx"), "needs the packages onnx and onnxscript"))]
        with mock.patch.dict(sys.modules, onnx=None):
            self.assert_errors(evaluate.main, *cases)

    def test_a_checkpoint_of_another_kind_or_shape(self) -> None:
        weights, missing = self.folder / "weights.pth", self.folder / "missing.pt"
        torch.save(resnet18().state_dict(), weights)
        self.assert_errors(
            evaluate.main, ((missing,), f"error: {missing}: No such file"),
            ((weights,), "not a checkpoint of train.py: no usable model, arch, classes"))
        other, no_exit = "does not hold a classifier of train.py", "no early exit can be built"
        for changes, message in (
                ({"classes": ["circle", "square"]}, other), ({"arch": "no_such_network"}, other),
                ({"arch": "mobilenet_v3_small"}, other), ({"size": "large"}, "no usable size"),
                ({"size": 31}, "no usable size"), ({"classes": ["a", "b", "a"]}, "usable classes"),
                ({"names": ["a"]}, "no usable names"), ({"start_acc": 1.5}, "no usable start_acc"),
                *(({"args": {"precision": "fp32", "batch_size": size, "val_split": split}},
                   "no usable args") for size, split in ((0, None), (8, "half"))),
                ({"args": {}}, "no usable args"), ({"exits": [3]}, "no usable exits"),
                ({"exits": {"layer9": nn.Linear(48, 3).state_dict()}}, no_exit),
                ({"exits": {"stage2": {}}}, no_exit), ({"exits": {"stage2": 3}}, no_exit)):
            self.assert_errors(evaluate.main, ((self.write_checkpoint(**changes),), message))
        self.assert_errors(train.main, (("--resume", self.write_checkpoint()), "no training state"))

    def test_a_torch_too_old_or_missing_is_told_at_the_start(self) -> None:
        for script, version, content, message in (
                ("train.py", "1.13.0", "", r"torch 1\.13\.0 is older"),
                ("evaluate.py", "1.13.0", "", r"torch 1\.13\.0 is older"),
                ("evaluate.py", "2.6.0", "raise ImportError('no torchvision')", "no torchvision"),
                ("evaluate.py", "2.6.0", "raise RuntimeError('no operator nms')", "operator nms")):
            (self.folder / "torch.py").write_text(f"__version__ = {version!r}")
            (self.folder / "torchvision.py").write_text(content)
            result = subprocess.run([sys.executable, "-B", HERE / script], capture_output=True,
                                    text=True, env=os.environ | {"PYTHONPATH": str(self.folder)})
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr, rf"^\S*{script}: error: .*{message}.*\n$")


if __name__ == "__main__":
    unittest.main()
