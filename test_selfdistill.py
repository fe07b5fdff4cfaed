"""The tests: `python -m unittest`, without a network or data from outside."""
import contextlib
import copy
import csv
import doctest
import gc
import importlib.util
import io
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from urllib.error import URLError

import torch
import torchvision
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torch.testing import assert_close
from torchvision import datasets, models, transforms
from torchvision.models import resnet18
from torchvision.transforms.v2 import functional

import evaluate
import selfdistill
import train
from selfdistill import (IMAGENET_MEAN, IMAGENET_STD, AuxiliaryClassifierLoss, HookedModel,
                         SelfDistillationLoss, find_classifier, find_layers, hooked_classifier,
                         hooked_resnet18, train_transform, val_transform)

HERE = Path(__file__).resolve().parent


def setUpModule() -> None:
    """Not to wait for the disk: what tests write need not outlive a power cut."""
    patch = mock.patch("os.fsync")
    patch.start()
    unittest.addModuleCleanup(patch.stop)


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite,
               pattern: str | None) -> unittest.TestSuite:
    tests.addTests(doctest.DocTestSuite(selfdistill))
    return tests


def write_images(folder: Path, classes: tuple[str, ...] = ("circle", "square", "star"),
                 train_count: int = 6, val_count: int = 3) -> Path:
    """An image folder with so many small drawn shapes a class."""
    for split, count in (("train", train_count), ("val", val_count)):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                image = train.draw_shape(name, random.Random(f"{split}{name}{k}"), size=40)
                image.save(folder / split / name / f"{k}.png")
    return folder


def run(main: Callable, *arguments: object) -> str:
    """What a script prints when it is run with these arguments."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main([str(argument) for argument in arguments])
    return output.getvalue()


def tiny(data: Path, out: Path, *arguments: object) -> list[str]:
    """The flags of a short run of a small network, unless `arguments` say otherwise."""
    return [str(argument) for argument in
            ("--data", data, "--out", out, "--arch", "mobilenet_v3_small", "--size", 32,
             "--weights", "none", "--epochs", 1, "--batch-size", 8, "--workers", 0,
             "--precision", "fp32", *arguments)]


RESNET18 = ("--arch", "resnet18")


def run_training(data: Path, out: Path, *arguments: object) -> str:
    return run(train.main, *tiny(data, out, *arguments))


def checkpoint_of(data: Path, arch: str = "resnet18") -> dict:
    """A best.pt of `write_images`, untrained."""
    return {"model": models.get_model(arch, num_classes=3).state_dict(), "arch": arch,
            "classes": ["circle", "square", "star"], "size": 32, "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD), "epoch": 1, "val_acc": 0.5, "data": str(data),
            "args": {"precision": "fp32", "batch_size": 8}}


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


class TestCase(unittest.TestCase):
    """Gives each test a folder of its own, and the check that every wrong input goes through."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

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
    def test_images_of_every_mode_and_shape_become_normalised_tensors(self) -> None:
        low = [-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
        high = [(1 - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
        for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16"):
            for shape in ((37, 53), (300, 20), (1, 1)):
                for transform in (train_transform(48), val_transform(48)):
                    with self.subTest(mode=mode, shape=shape):
                        tensor = transform(Image.new(mode, shape))
                        self.assertEqual(tensor.shape, (3, 48, 48))
                        self.assertEqual(tensor.dtype, torch.float32)
                        for channel, least, most in zip(tensor, low, high):
                            self.assertGreaterEqual(channel.min().item(), least - 1e-5)
                            self.assertLessEqual(channel.max().item(), most + 1e-5)

    def test_16_bit_values_are_scaled_not_clipped(self) -> None:
        for value, expected in ((0, 0), (32896, 128), (65535, 255)):
            pixel = selfdistill.to_rgb(Image.new("I;16", (1, 1), value)).getpixel((0, 0))
            self.assertEqual(pixel, (expected,) * 3)

    def test_floating_point_pixels_are_refused(self) -> None:
        Image.new("F", (8, 8), 0.7).save(self.folder / "depth.tif")
        with self.assertRaisesRegex(evaluate.UnreadableImage, "depth.tif: floating-point pixels"):
            evaluate.load_image(str(self.folder / "depth.tif"))

    def test_damaged_exif_data_do_no_harm(self) -> None:
        Image.new("L", (8, 8), 200).save(self.folder / "image.png", exif=b"Exif\0\0no TIFF")
        image = evaluate.load_image(str(self.folder / "image.png"))
        self.assertEqual(image.unique().tolist(), [200])

    def test_a_picture_turned_by_exif_is_seen_upright(self) -> None:
        stored = Image.new("L", (64, 64))
        stored.paste(255, (32, 0, 64, 64))  # the left half black, the right half white
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6  # shown turned clockwise: the left side at the top
        stored.save(self.folder / "turned.jpg", exif=exif, quality=95)
        with Image.open(self.folder / "turned.jpg") as image:
            for source in (image, evaluate.load_image(str(self.folder / "turned.jpg"))):
                tensor = val_transform(64)(source)[0]
                self.assertLess(tensor[:24].max(), -1.5)
                self.assertGreater(tensor[40:].min(), 1.5)

    def test_they_agree_with_the_published_transforms(self) -> None:
        published = {
            train_transform(96): [transforms.RandomResizedCrop(96),
                                  transforms.RandomHorizontalFlip()],
            val_transform(96): [transforms.Resize(109), transforms.CenterCrop(96)]}
        std = torch.tensor(IMAGENET_STD)[:, None, None]
        for ours, theirs in published.items():
            theirs = transforms.Compose([*theirs, transforms.ToTensor(),
                                         transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
            for seed, name in enumerate(train.SHAPES):
                image = train.draw_shape(name, random.Random(seed), size=160)
                torch.manual_seed(seed)
                tensor = ours(image)
                torch.manual_seed(seed)
                difference = (tensor - theirs(image)).abs() * std
                self.assertLess(difference.mean().item(), 1 / 255)

    def test_uint8_images_normalised_as_a_batch_are_the_same(self) -> None:
        images = [train.draw_shape(name, random.Random(0)) for name in ("star", "square")]
        batch = torch.stack([val_transform(48, normalized=False)(image) for image in images])
        self.assertEqual(batch.dtype, torch.uint8)
        expected = torch.stack([val_transform(48)(image) for image in images])
        assert_close(selfdistill.normalize(batch), expected)
        pixel = selfdistill.normalize(torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None])
        assert_close(pixel.flatten(), torch.tensor([-0.485 / 0.229, (0.2 - 0.456) / 0.224,
                                                    (1 - 0.406) / 0.225]))

    def test_the_val_crop_is_the_middle_224_of_256(self) -> None:
        image = ImageOps.expand(Image.new("RGB", (224, 224)), border=16, fill="white")
        black = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
        assert_close(val_transform(224)(image), black[:, None, None].expand(3, 224, 224))

    def test_no_crop_is_smaller_than_the_scale_asks(self) -> None:
        image = functional.to_pil_image(torch.arange(256, dtype=torch.uint8).expand(256, 256))
        for _ in range(50):
            row = train_transform(64, scale=(0.9, 1.0))(image)[0, 0] * IMAGENET_STD[0]
            width = (row.max() - row.min()).item()  # a share of the image, as it is a ramp
            self.assertGreater(width, 0.8)


class HookedModelTest(unittest.TestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model = resnet18(num_classes=10)
        self.images = torch.randn(2, 3, 64, 64)

    def count_hooks(self) -> int:
        return sum(len(module._forward_hooks) for module in self.model.modules())

    def test_features_and_logits_are_those_of_the_plain_network(self) -> None:
        for training in (True, False):
            model = copy.deepcopy(self.model).train(training)
            logits, student, teacher = HookedModel(self.model).train(training)(self.images)
            stem = model.maxpool(model.relu(model.bn1(model.conv1(self.images))))
            expected_student = model.layer2(model.layer1(stem))
            expected_teacher = model.layer4(model.layer3(expected_student))
            expected_logits = model.fc(model.avgpool(expected_teacher).flatten(1))
            for value, expected in ((logits, expected_logits), (student, expected_student),
                                    (teacher, expected_teacher)):
                assert_close(value, expected, rtol=0, atol=0)

    def test_features_come_from_the_layers_named(self) -> None:
        _, student, teacher = HookedModel(self.model, "layer1", "layer3.0")(self.images)
        self.assertEqual((student.shape, teacher.shape), ((2, 64, 16, 16), (2, 256, 4, 4)))

    def test_a_wrong_name_lists_close_matches(self) -> None:
        with self.assertRaisesRegex(ValueError, r"no layer 'layer2.l' in ResNet.*layer2\.1"):
            HookedModel(self.model, "layer2.l")
        with self.assertRaisesRegex(ValueError, "no layer ''"):
            HookedModel(self.model, "layer2.1", "")

    def test_a_layer_outside_forward_is_an_error_not_a_stale_feature(self) -> None:
        self.model.unused = nn.Identity()
        with self.assertRaisesRegex(RuntimeError, "'unused' took no part"):
            HookedModel(self.model, "unused")(self.images)

    def test_a_layer_used_twice_is_an_error_as_it_has_no_one_feature(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "'layer2.1.relu' is used more than once"):
            HookedModel(self.model, "layer2.1.relu")(self.images)

    def test_the_state_dict_loads_into_plain_torchvision(self) -> None:
        resnet18(num_classes=10).load_state_dict(HookedModel(self.model).model.state_dict())

    def test_a_deep_copy_has_hooks_of_its_own(self) -> None:
        original = HookedModel(self.model).eval()
        duplicate = copy.deepcopy(original)
        original.remove_hooks()
        with torch.no_grad():
            duplicate.model.layer2[1].bn2.weight.zero_()
            duplicate.model.layer2[1].bn2.bias.fill_(3.0)
        _, student, _ = duplicate(self.images)
        self.assertGreaterEqual(student.min(), 3.0)  # relu(3 + what the shortcut brings)
        duplicate.remove_hooks()
        self.assertFalse(any(module._forward_hooks for module in duplicate.modules()))

    def test_wrapping_again_and_again_leaves_no_hook_behind(self) -> None:
        for _ in range(3):
            with HookedModel(self.model) as first, HookedModel(self.model, "layer1") as second:
                self.assertEqual(self.count_hooks(), 4)
                assert_close(first(self.images)[2], second(self.images)[2])
            first.remove_hooks()
            self.assertEqual(self.count_hooks(), 0)
        with self.assertRaisesRegex(RuntimeError, "removed"):
            first(self.images)

    def test_no_feature_outlives_the_step(self) -> None:
        hooked = HookedModel(self.model)
        features = [weakref.ref(tensor) for tensor in hooked(self.images)]
        self.assertEqual([feature() for feature in features], [None, None, None])

    def test_live_tensors_do_not_grow_over_50_steps(self) -> None:
        hooked, criterion = HookedModel(self.model), SelfDistillationLoss()
        optimizer = torch.optim.SGD([*hooked.parameters(), *criterion.parameters()], lr=0.01,
                                    momentum=0.9)

        def live_tensors_after(steps: int) -> int:
            for _ in range(steps):
                logits, student, teacher = hooked(self.images)
                optimizer.zero_grad()
                criterion(logits, torch.tensor([1, 2]), student, teacher).backward()
                optimizer.step()
            del logits, student, teacher
            gc.collect()
            return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

        first = live_tensors_after(2)
        self.assertLessEqual(live_tensors_after(50), first)

    def test_channels_of_other_networks_are_found(self) -> None:
        for arch, student, teacher, channels in (
                ("resnet50", "layer2.3", "layer4.2", (512, 2048)),
                ("mobilenet_v3_small", "features.4", "features.12", (40, 576)),
                ("convnext_tiny", "features.3", "features.7", (192, 768))):
            with self.subTest(arch=arch):
                hooked = HookedModel(models.get_model(arch, num_classes=10), student, teacher)
                self.assertEqual(hooked.feature_channels(), channels)
                criterion = SelfDistillationLoss(0.5, *channels)
                logits, *features = hooked(self.images)
                criterion(logits, torch.tensor([1, 2]), *features).backward()
                self.assertEqual(criterion.adapter.weight.grad.shape, (*channels, 1, 1))

    def test_layers_that_suit_a_network_are_found(self) -> None:
        for arch, layers, classifier in (
                ("resnet18", ("layer2", "layer4"), "fc"),
                ("mobilenet_v3_small", ("features.3", "features"), "classifier.3"),
                ("convnext_tiny", ("features.3", "features"), "classifier.2"),
                ("densenet121", ("features.denseblock2", "features"), "classifier"),
                ("shufflenet_v2_x1_0", ("stage2", "conv5"), "fc")):
            with self.subTest(arch=arch):
                model = models.get_model(arch, num_classes=10)
                self.assertEqual((find_layers(model), find_classifier(model)),
                                 (layers, classifier))
        transformer = models.VisionTransformer(32, 8, num_layers=4, num_heads=2, hidden_dim=16,
                                               mlp_dim=16)
        self.assertEqual(find_layers(transformer, size=32), (
            "encoder.layers.encoder_layer_1", "encoder.layers.encoder_layer_3"))
        self.assertEqual(find_classifier(transformer), "heads.head")
        with self.assertRaisesRegex(ValueError, "no layers of Sequential suggest themselves"):
            find_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()), size=32)

    def test_tokens_are_taken_and_maps_of_another_order_refused(self) -> None:
        tokens = HookedModel(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten(2), nn.Identity()),
                             "1", "2")
        tokens.model[1].register_forward_hook(lambda layer, inputs, output: output.mT,
                                              prepend=True)
        self.assertEqual(tokens.feature_channels(32), (4, 4))
        moved = HookedModel(nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Identity()), "0", "1")
        moved.model[0].register_forward_hook(
            lambda layer, inputs, output: output.permute(0, 2, 3, 1), prepend=True)
        with self.assertRaisesRegex(ValueError, r"layer '0' gives .*\(1, 2, 2, 4\), which are nei"):
            moved.feature_channels(16)

    def test_the_dry_run_leaves_the_network_as_it_was(self) -> None:
        hooked = HookedModel(self.model).train()
        self.model.layer1.eval()
        before = copy.deepcopy(self.model.state_dict())
        self.assertEqual(hooked.feature_channels(), (128, 512))
        assert_close(self.model.state_dict(), before, rtol=0, atol=0)
        self.assertFalse(self.model.layer1[0].bn1.training)
        self.assertTrue(self.model.layer2[0].bn1.training)

    def test_compiling_loses_no_feature(self) -> None:
        hooked = HookedModel(self.model).eval()
        compiled = torch.compile(hooked, backend="eager")
        for images in (self.images, self.images + 1):
            assert_close(compiled(images), hooked(images))

    def test_a_compiled_step_is_that_of_the_network_as_it_is(self) -> None:
        images, labels = self.images.to(memory_format=torch.channels_last), torch.tensor([3, 7])
        distiller = train.Distiller(HookedModel(self.model), SelfDistillationLoss(), "fp32")
        results = []
        for network in (distiller, torch.compile(distiller, backend="aot_eager")):
            distiller.zero_grad()
            logits, loss, _, distillation = network(images, labels)
            loss.backward()
            results.append((logits, distillation, self.model.layer2[0].conv1.weight.grad.clone()))
        assert_close(*results)


class WeightsTest(TestCase):
    def test_random_weights_have_the_classes_asked_for(self) -> None:
        self.assertEqual(hooked_resnet18(7, "none").model.fc.out_features, 7)
        with self.assertRaisesRegex(ValueError, "at least 1, got 0"):
            hooked_resnet18(0, "none")

    def test_imagenet_weights_get_a_new_classifier(self) -> None:
        pretrained = resnet18()
        checkpoints = self.folder / "hub" / "checkpoints"
        checkpoints.mkdir(parents=True)
        torch.save(pretrained.state_dict(), checkpoints / "resnet18-f37072fd.pth")
        with mock.patch.dict(os.environ, TORCH_HOME=str(self.folder)):
            for classes in (10, 1000):
                model = hooked_resnet18(classes).model
                assert_close(model.layer4.state_dict(), pretrained.layer4.state_dict())
                self.assertEqual(model.fc.out_features, classes)
                self.assertFalse(torch.equal(model.fc.weight, pretrained.fc.weight[:classes]))

    def test_other_networks_get_their_weights_and_a_new_classifier(self) -> None:
        pretrained = models.mobilenet_v3_small().state_dict()
        with mock.patch.object(models.MobileNet_V3_Small_Weights.DEFAULT, "get_state_dict",
                               lambda **options: dict(pretrained), create=True):
            model = hooked_classifier("mobilenet_v3_small", 1000)
        self.assertEqual(model.layer_names, ("features.3", "features"))
        differing = {name for name, value in model.model.state_dict().items()
                     if not torch.equal(value, pretrained[name])}
        self.assertEqual(differing, {"classifier.3.weight"})  # biases begin at nought

    def test_what_is_no_classifier_is_refused(self) -> None:
        for arch, message in (("resnet81", "no classifier 'resnet81' .* one of resnet18, "),
                              ("fcn_resnet50", "no classifier 'fcn_resnet50'"),
                              ("googlenet", "returns more than logits")):
            with self.assertRaisesRegex(ValueError, message):
                hooked_classifier(arch, 10, "none")

    def test_a_file_keeps_its_classifier_only_if_that_fits(self) -> None:
        saved = resnet18(num_classes=5)
        for content in (saved.state_dict(), {"model": saved.state_dict()}):
            torch.save(content, self.folder / "weights.pth")
            same = hooked_resnet18(5, self.folder / "weights.pth").model
            assert_close(same.state_dict(), saved.state_dict())
            other = hooked_resnet18(6, self.folder / "weights.pth").model
            assert_close(other.conv1.weight, saved.conv1.weight)
            self.assertEqual(other.fc.out_features, 6)


class LossTest(unittest.TestCase):
    """One student channel, [[1, 2], [3, 6]], resized to its mean 3; a teacher of two channels,
    (2, 1), adapted to 0.5 * 2 - 1 * 1 + 0.25 = 0.25. So the distance is (3 - 0.25)^2 = 7.5625;
    and logits (0, ln 3) give the right class 3/4, so the cross-entropy is ln 4/3."""

    DISTANCE, CROSS_ENTROPY = 7.5625, 0.2876821

    def setUp(self) -> None:
        self.logits = torch.tensor([[0.0, math.log(3.0)]], requires_grad=True)
        self.labels = torch.tensor([1])
        self.student = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]], requires_grad=True)
        self.teacher = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).requires_grad_()

    def loss_of(self, **options: float) -> tuple[SelfDistillationLoss, torch.Tensor]:
        criterion = SelfDistillationLoss(student_channels=1, teacher_channels=2, **options)
        with torch.no_grad():
            criterion.adapter.weight.copy_(torch.tensor([0.5, -1.0]).view(1, 2, 1, 1))
            criterion.adapter.bias.fill_(0.25)
        return criterion, criterion(self.logits, self.labels, self.student, self.teacher)

    def test_the_published_formula_at_three_weights(self) -> None:
        for alpha, expected in ((0.0, self.CROSS_ENTROPY), (0.5, 3.9250911), (1.0, self.DISTANCE)):
            for detach in (False, True):
                _, loss = self.loss_of(alpha=alpha, detach_teacher=detach)
                assert_close(loss, torch.tensor(expected))

    def test_the_default_is_half_and_half_undetached_unnormalised(self) -> None:
        _, loss = self.loss_of()
        assert_close(loss, torch.tensor(3.9250911))
        loss.backward()
        self.assertIsNotNone(self.teacher.grad)

    def test_the_terms_apart_are_not_weighted(self) -> None:
        criterion, _ = self.loss_of(alpha=0.25)
        terms = criterion.terms(self.logits, self.labels, self.student, self.teacher)
        assert_close(terms, (torch.tensor(self.CROSS_ENTROPY), torch.tensor(self.DISTANCE)))

    def test_label_smoothing(self) -> None:
        # 0.9 of the label's -ln 3/4 and 0.1 of the other's -ln 1/4
        _, loss = self.loss_of(alpha=0.0, label_smoothing=0.2)
        assert_close(loss, torch.tensor(0.3975433))

    def test_normalised_features_are_compared_by_direction(self) -> None:
        # (3, 4) becomes (0.6, 0.8), and (5, 0) becomes (1, 0): (0.4^2 + 0.8^2) / 2 = 0.4
        criterion = SelfDistillationLoss(alpha=1.0, student_channels=2, teacher_channels=2,
                                         normalize=True)
        with torch.no_grad():
            criterion.adapter.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
            criterion.adapter.bias.zero_()
        teacher = torch.tensor([5.0, 0.0]).view(1, 2, 1, 1)
        student = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
        for magnitude in (0.01, 1.0, 100.0):
            for size in (1, 4):
                loss = criterion(self.logits, self.labels,
                                 (magnitude * student).expand(1, 2, 2 * size, 2 * size),
                                 teacher.expand(1, 2, size, size))
                assert_close(loss, torch.tensor(0.4))

    def test_gradients_by_hand(self) -> None:
        # alpha * 2 * (3 - 0.25) = 2.75 at the resized student; a quarter of it at each pixel
        criterion, loss = self.loss_of(alpha=0.5)
        loss.backward()
        assert_close(self.student.grad, torch.full((1, 1, 2, 2), 0.6875))
        assert_close(self.teacher.grad.flatten(), torch.tensor([-1.375, 2.75]))
        assert_close(criterion.adapter.weight.grad.flatten(), torch.tensor([-5.5, -2.75]))
        assert_close(self.logits.grad, torch.tensor([[0.125, -0.125]]))

    def test_teacher_gets_no_gradient_when_detached(self) -> None:
        criterion, loss = self.loss_of(detach_teacher=True)
        loss.backward()
        self.assertIsNone(self.teacher.grad)
        assert_close(self.student.grad, torch.full((1, 1, 2, 2), 0.6875))
        assert_close(criterion.adapter.weight.grad.flatten(), torch.tensor([-5.5, -2.75]))

    def test_distillation_alone_reaches_early_layers_only_when_detached(self) -> None:
        for detach in (False, True):
            model = hooked_resnet18(10, "none")
            criterion = SelfDistillationLoss(detach_teacher=detach)
            _, student, teacher = model(torch.randn(2, 3, 64, 64))
            criterion.distillation(None, None, student, teacher).backward()
            self.assertGreater(model.model.layer2[1].conv1.weight.grad.abs().max(), 0)
            self.assertEqual(model.model.layer4[1].conv1.weight.grad is None, detach)

    def test_a_value_out_of_range_is_refused_and_shown(self) -> None:
        for options in ({"alpha": -0.1}, {"alpha": 1.5}, {"alpha": math.nan},
                        {"label_smoothing": 2.0}, {"student_channels": 0},
                        {"teacher_channels": -3}):
            (name, value), = options.items()
            with self.assertRaisesRegex(ValueError, f"{name} must .*{re.escape(str(value))}"):
                SelfDistillationLoss(**options)

    def test_features_of_another_shape_are_refused_and_shown(self) -> None:
        criterion, _ = self.loss_of()
        with self.assertRaisesRegex(ValueError, r"teacher features .*\(N, 2, H, W\), got \(1, 1,"):
            criterion(self.logits, self.labels, self.student, self.student)
        with self.assertRaisesRegex(ValueError, "student features"):
            criterion(self.logits, self.labels, self.student[0], self.teacher)


class AuxiliaryClassifierLossTest(unittest.TestCase):
    """One student channel of mean 3, and a classifier that makes of it (0, ln 3), which gives the
    right class 3/4; the network's own logits give it 1/2, so its cross-entropy is ln 2."""

    def loss_of(self, **options: float) -> torch.Tensor:
        criterion = AuxiliaryClassifierLoss(num_classes=2, student_channels=1, **options)
        with torch.no_grad():
            criterion.classifier.weight.copy_(torch.tensor([[0.0], [math.log(3.0) / 3]]))
            criterion.classifier.bias.zero_()
        self.student = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]], requires_grad=True)
        self.logits = torch.zeros(1, 2, requires_grad=True)
        self.criterion = criterion
        return criterion(self.logits, torch.tensor([1]), self.student)

    def test_the_cross_entropies_are_weighted_by_alpha(self) -> None:
        for alpha, expected in ((0.0, 0.6931472), (0.25, 0.5917809), (1.0, 0.2876821)):
            assert_close(self.loss_of(alpha=alpha), torch.tensor(expected))

    def test_the_soft_part_is_the_divergence_from_the_networks_own_output(self) -> None:
        # (1/2, 1/2) against (1/4, 3/4): (ln 2) / 2 + (ln 2/3) / 2
        divergence = math.log(2 / 3 ** 0.5)
        assert_close(self.loss_of(alpha=1.0, soft=1.0, temperature=1.0), torch.tensor(divergence))
        assert_close(self.loss_of(alpha=1.0, soft=0.25, temperature=1.0),
                     torch.tensor(0.75 * 0.2876821 + 0.25 * divergence))
        # At temperature 2 the logits are (0, ln sqrt 3): softmax (1, sqrt 3) / (1 + sqrt 3)
        odds = 3 ** 0.5
        divergence = math.log((1 + odds) / 2) - 0.5 * math.log(odds)
        assert_close(self.loss_of(alpha=1.0, soft=1.0, temperature=2.0),
                     torch.tensor(4 * divergence))

    def test_the_second_term_moves_the_early_features_and_not_the_logits(self) -> None:
        for soft in (0.0, 0.5):
            self.loss_of(alpha=1.0, soft=soft).backward()
            self.assertEqual(self.logits.grad.abs().max(), 0)
            self.assertGreater(self.student.grad.abs().min(), 0)
            self.assertGreater(self.criterion.classifier.weight.grad.abs().max(), 0)

    def test_tokens_are_averaged_as_maps_are(self) -> None:
        maps = torch.randn(2, 4, 3, 5)
        criterion = AuxiliaryClassifierLoss(num_classes=3, student_channels=4)
        logits, labels = torch.randn(2, 3), torch.tensor([0, 2])
        assert_close(criterion(logits, labels, maps.flatten(2).mT),
                     criterion(logits, labels, maps))
        with self.assertRaisesRegex(ValueError, r"\(N, 4, H, W\) or \(N, L, 4\), got \(2, 4, 3\)"):
            criterion(logits, labels, torch.randn(2, 4, 3))

    def test_both_cross_entropies_are_smoothed(self) -> None:
        # 0.9 of the label's -ln 3/4 and 0.1 of the other's -ln 1/4; ln 2 stays ln 2
        assert_close(self.loss_of(alpha=0.5, label_smoothing=0.2),
                     torch.tensor(0.5 * 0.6931472 + 0.5 * 0.3975433))

    def test_a_value_out_of_range_is_refused_and_shown(self) -> None:
        for options in ({"alpha": 2.0}, {"soft": -0.1}, {"temperature": 0.0}, {"num_classes": 0},
                        {"student_channels": 0}):
            (name, value), = options.items()
            with self.assertRaisesRegex(ValueError, f"{name} must .*{re.escape(str(value))}"):
                AuxiliaryClassifierLoss(**({"num_classes": 10} | options))
        with self.assertRaisesRegex(ValueError, r"student features .*\(N, 128, H, W\)"):
            AuxiliaryClassifierLoss(10)(torch.zeros(1, 10), torch.tensor([0]), torch.ones(1, 128))


class DataTest(TestCase):
    def test_every_image_comes_once_an_epoch_in_batches_of_like_size(self) -> None:
        for count, batch_size, sizes in ((65, 64, [33, 32]), (10, 4, [4, 3, 3]), (1, 8, [1])):
            batches = list(train.EpochBatches(count, batch_size, seed=0))
            self.assertEqual([len(batch) for batch in batches], sizes)
            indices = sorted(index for batch in batches for index, _ in batch)
            self.assertEqual(indices, list(range(count)))

    def test_order_and_augmentation_change_with_epoch_and_seed(self) -> None:
        def epoch_of(seed: int, epoch: int) -> tuple[list[int], dict[int, int]]:
            batches = train.EpochBatches(100, 10, seed)
            batches.epoch = epoch
            items = [item for batch in batches for item in batch]
            return [index for index, _ in items], dict(items)

        self.assertEqual(epoch_of(0, 0), epoch_of(0, 0))
        for other in (epoch_of(0, 1), epoch_of(1, 0)):
            order, seeds = epoch_of(0, 0)
            self.assertNotEqual(order, other[0])
            # Compared through the generator they seed, which may not use all bits.
            draws = [[torch.rand(1, generator=torch.Generator().manual_seed(by[index])).item()
                      for index in range(100)] for by in (seeds, other[1])]
            self.assertLess(sum(a == b for a, b in zip(*draws)), 5)

    def test_an_epoch_can_start_in_its_middle(self) -> None:
        batches = train.EpochBatches(10, 2, seed=3)
        whole = list(batches)
        batches.start = 3
        self.assertEqual(list(batches), whole[3:])

    def test_augmentation_depends_on_index_and_seed_alone(self) -> None:
        folder = evaluate.ImageFolder(write_images(self.folder) / "train", None)
        data = train.Augmented(folder, train_transform(32, normalized=False))
        state = torch.get_rng_state()
        first, label = data[4, 7]
        assert_close(torch.get_rng_state(), state)
        torch.rand(5)
        self.assertEqual((first.shape, first.dtype), ((32, 32, 3), torch.uint8))
        assert_close(data[4, 7][0], first, rtol=0, atol=0)
        self.assertFalse(torch.equal(data[4, 8][0], first))
        self.assertEqual(label, 0)

    def test_the_shapes_are_drawn_the_same_each_time_and_no_two_alike(self) -> None:
        drawn = [train.draw_shape(name, random.Random(k)).tobytes()
                 for name in train.SHAPES for k in range(3)]
        again = [train.draw_shape(name, random.Random(k)).tobytes()
                 for name in train.SHAPES for k in range(3)]
        self.assertEqual(drawn, again)
        self.assertEqual(len(set(drawn)), 30)

    def test_no_outline_leaves_the_image(self) -> None:
        for name, outline in train.SHAPES.items():
            radii = [outline(2 * math.pi * k / 360) for k in range(360)]
            self.assertGreaterEqual(min(radii), 0, name)
            self.assertLessEqual(max(radii), 1 + 1e-9, name)

    def test_a_linear_classifier_on_pixels_fails_on_the_shapes(self) -> None:
        def draw(split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            images = [functional.pil_to_tensor(train.draw_shape(name, random.Random(split + str(k)),
                                                                size=32))
                      for name in train.SHAPES for k in range(count)]
            pixels = torch.stack(images).flatten(1).double() / 255
            return pixels, torch.arange(len(train.SHAPES)).repeat_interleave(count)

        pixels, labels = draw("train", 100)
        mean = pixels.mean(dim=0)
        kernel = (pixels - mean) @ (pixels - mean).T
        targets = nn.functional.one_hot(labels).double()
        val_pixels, val_labels = draw("val", 40)
        for ridge in (1.0, 100.0, 10_000.0):
            dual = torch.linalg.solve(kernel + ridge * torch.eye(len(kernel)), targets)
            scores = (val_pixels - mean) @ (pixels - mean).T @ dual
            accuracy = (scores.argmax(dim=1) == val_labels).double().mean().item()
            self.assertLess(accuracy, 0.5)

    def test_a_folder_of_images_of_every_kind_is_read(self) -> None:
        folder = self.folder / "val" / "kind"
        folder.mkdir(parents=True)
        for mode, suffix in (("1", "png"), ("L", "jpg"), ("LA", "png"), ("P", "png"),
                             ("RGB", "webp"), ("RGBA", "png"), ("CMYK", "jpg"), ("CMYK", "tiff"),
                             ("I;16", "png"), ("I", "tiff")):
            Image.new(mode, (9, 5)).save(folder / f"{mode.replace(';', '')}.{suffix}")
        data = evaluate.ImageFolder(self.folder / "val", val_transform(32, normalized=False))
        self.assertEqual(len(data), 10)
        self.assertEqual({image.shape for image, _ in data}, {(32, 32, 3)})

    def test_a_jpeg_is_read_as_pillow_reads_it(self) -> None:
        path = self.folder / "image.jpg"
        picture = train.draw_shape("star", random.Random(0))
        for mode in ("RGB", "L", "CMYK"):
            for progressive in (False, True):
                picture.convert(mode).save(path, progressive=progressive)
                with Image.open(path) as image:
                    expected = functional.pil_to_tensor(selfdistill.to_rgb(image))
                with mock.patch.object(Image, "open", side_effect=AssertionError):
                    assert_close(evaluate.load_image(str(path)), expected)
                with mock.patch.object(torchvision.io, "decode_jpeg", side_effect=AttributeError):
                    assert_close(evaluate.load_image(str(path)), expected)

    def test_a_missing_imagenette_is_downloaded_whole_or_not_at_all(self) -> None:
        folder = self.folder / "new" / "imagenette2-160"

        def download(root: str, size: str, download: bool) -> None:
            self.assertEqual((size, download), ("160px", True))
            for split in ("train", "val"):
                (Path(root) / "imagenette2-160" / split).mkdir(parents=True)

        with (mock.patch.object(datasets, "Imagenette", side_effect=URLError("no route")),
              contextlib.redirect_stdout(io.StringIO()),
              self.assertRaisesRegex(evaluate.UserError, "imagenette2-160.tgz and unpack it as")):
            train.find_data(str(folder))
        self.assertEqual(list(folder.parent.iterdir()), [])
        with (mock.patch.object(datasets, "Imagenette", download),
              contextlib.redirect_stdout(io.StringIO())):
            self.assertEqual(train.find_data(str(folder)), folder)
        self.assertEqual(list(folder.parent.iterdir()), [folder])

    def test_the_splits_may_lie_one_folder_deeper(self) -> None:
        write_images(self.folder / "outer" / "inner")
        self.assertEqual(train.find_data(str(self.folder / "outer")), self.folder / "outer/inner")
        write_images(self.folder / "outer" / "other")
        with self.assertRaisesRegex(evaluate.UserError, "several folders .*inner, .*other: name"):
            train.find_data(str(self.folder / "outer"))

    def test_images_are_found_in_linked_folders_too(self) -> None:
        write_images(self.folder / "images", train_count=1, val_count=1)
        (self.folder / "linked").mkdir()
        (self.folder / "linked" / "val").symlink_to(self.folder / "images" / "val")
        self.assertEqual(len(evaluate.find_images([str(self.folder / "linked")])), 3)


class CheckTest(TestCase):
    def check(self, *flags: str) -> tuple[int, list[str]]:
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                train.main(["--data", str(self.folder), "--check", *flags])
            code = 0
        except SystemExit as caught:
            code = caught.code
        return code, output.getvalue().replace(f"{self.folder}/", "").splitlines()

    def test_good_data_are_described_and_pass(self) -> None:
        write_images(self.folder, train_count=2, val_count=1)
        Image.new("L", (30, 50)).save(self.folder / "train" / "star" / "grey.png")
        code, lines = self.check()
        self.assertEqual(code, 0)
        self.assertEqual(lines, [
            "train/ 7 images, 3 classes, of 2 (square) to 3 (star) images",
            "       30 x 40 to 40 x 50 pixels, median 40 x 40; RGB 6, L 1",
            "val/   3 images, 3 classes, of 1 (star) to 1 (circle) images",
            "       40 x 40 to 40 x 40 pixels, median 40 x 40; RGB 3",
            "problems found: none"])

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
        code, lines = self.check()
        self.assertEqual(code, 1)
        self.assertEqual(lines[4:], [
            "note: 1 files in train/ that are ignored, by their suffix no images",
            "  train/circle/photo.heic",
            "note: 1 images twice or more in the same class of the same split",
            "  train/star/1.png = train/star/again.png",
            "problem: 1 classes without readable images in train/",
            "  empty",
            "problem: 1 unreadable images in val/",
            "  cannot read the image val/circle/bad.jpg: cannot identify image file",
            "problem: 1 classes that only one of train/ and val/ has",
            "  empty",
            "problem: 1 images in both train/ and val/, which flatter val accuracy",
            "  train/star/0.png = val/star/leak.bmp",
            "problem: 1 images in more than one class",
            "  val/circle/0.png = val/square/circle.png",
            "problems found: 5"])
        self.assertIn("note: 1 unreadable images in val/", self.check("--skip-unreadable")[1])


class OptimizerTest(unittest.TestCase):
    def make(self, *flags: str) -> tuple[HookedModel, train.Loss, torch.optim.SGD]:
        args, _ = train.parse_args([*flags, "--data", "somewhere", "--device", "cpu"])
        model = hooked_resnet18(10, "none")
        criterion = train.make_criterion(args, model, 10)
        return model, criterion, train.make_optimizer(args, model, criterion)

    def test_the_tuned_recipe_trains_everything_and_decays_no_bias_or_norm(self) -> None:
        model, criterion, optimizer = self.make("--recipe", "tuned", "--lr", "0.01")
        settings = {id(parameter): (group["lr"], group["weight_decay"])
                    for group in optimizer.param_groups for parameter in group["params"]}
        self.assertEqual(len(settings), sum(len(group["params"])
                                            for group in optimizer.param_groups))
        self.assertEqual(settings.keys(), {id(parameter) for parameter in
                                           [*model.parameters(), *criterion.parameters()]})
        for parameter, expected in ((model.model.conv1.weight, (0.01, 5e-4)),
                                    (model.model.bn1.weight, (0.01, 0.0)),
                                    (model.model.fc.weight, (0.01, 5e-4)),
                                    (model.model.fc.bias, (0.01, 0.0)),
                                    (criterion.classifier.weight, (0.01, 5e-4))):
            self.assertEqual(settings[id(parameter)], expected)

    def test_sgd_is_fused_but_in_fp16_whose_scaler_may_skip_the_first_step(self) -> None:
        for precision, fused in (("fp32", True), ("bf16", True), ("fp16", False)):
            self.assertEqual(self.make("--precision", precision)[2].defaults["fused"], fused)

    def test_the_blog_recipe_is_the_published_one(self) -> None:
        model, criterion, optimizer = self.make("--recipe", "blog")
        scheduler = train.make_scheduler(optimizer, one_cycle=False, steps=100)
        trained = {id(parameter) for group in optimizer.param_groups
                   for parameter in group["params"]}
        self.assertEqual(trained, {id(parameter) for parameter in model.parameters()})
        self.assertEqual((criterion.alpha, criterion.detach_teacher, criterion.normalize,
                          criterion.label_smoothing), (0.5, False, False, 0.0))
        for _ in range(3):
            for group in optimizer.param_groups:
                self.assertEqual((group["lr"], group["momentum"], group["weight_decay"],
                                  group["nesterov"]), (0.01, 0.9, 0.0, False))
            optimizer.step()
            scheduler.step()

    def test_the_blog_recipe_takes_the_steps_of_the_published_script(self) -> None:
        torch.manual_seed(0)
        model, criterion, optimizer = self.make("--recipe", "blog")
        plain, conv1x1 = copy.deepcopy(model.model), copy.deepcopy(criterion.adapter)
        batches = [(torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8), torch.randint(10, (4,)))
                   for _ in range(3)]

        plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
        for images, labels in batches:
            plain_optimizer.zero_grad()
            images = selfdistill.normalize(images.permute(0, 3, 1, 2))
            stem = plain.maxpool(plain.relu(plain.bn1(plain.conv1(images))))
            student = plain.layer2(plain.layer1(stem))
            teacher = plain.layer4(plain.layer3(student))
            logits = plain.fc(plain.avgpool(teacher).flatten(1))
            resized = nn.functional.interpolate(student, size=(2, 2), mode="bilinear",
                                                align_corners=False)
            loss = (0.5 * nn.functional.mse_loss(resized, conv1x1(teacher))
                    + 0.5 * nn.functional.cross_entropy(logits, labels))
            loss.backward()
            plain_optimizer.step()

        result = train.Run(model, criterion, optimizer,
                           train.make_scheduler(optimizer, one_cycle=False, steps=3),
                           torch.amp.GradScaler("cpu", enabled=False))
        train.train_epoch(result, train.Distiller(model, criterion, "fp32"), batches,
                          train.EpochBatches(12, 4, seed=0), train.Progress(1, 3, 12))
        assert_close(model.model.state_dict(), plain.state_dict())

    def test_fine_tuning_results_in_a_moving_average_of_the_weights(self) -> None:
        model, criterion, optimizer = self.make("--lr", "0.01")
        model.model.register_buffer("positions", torch.arange(1000))
        fine_tuned = train.Run(model, criterion, optimizer,
                               train.make_scheduler(optimizer, one_cycle=False, steps=3),
                               torch.amp.GradScaler("cpu", enabled=False), decay=0.75)
        states = [copy.deepcopy(model.model.state_dict())]
        optimizer.register_step_post_hook(
            lambda *_: states.append(copy.deepcopy(model.model.state_dict())))
        fine_tuned.start_average()
        batches = [(torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8), torch.randint(10, (4,)))
                   for _ in range(2)]
        train.train_epoch(fine_tuned, train.Distiller(model, criterion, "fp32"), batches,
                          train.EpochBatches(8, 4, seed=0), train.Progress(1, 2, 8))
        start, first, second = states
        for name, value in fine_tuned.result.state_dict().items():
            if value.is_floating_point():
                assert_close(value, 0.5625 * start[name] + 0.1875 * first[name]
                             + 0.25 * second[name])
            else:
                assert_close(value, second[name])

    def test_one_cycle_warms_up_and_ends_near_nought(self) -> None:
        _, _, optimizer = self.make("--lr", "0.01")
        scheduler = train.make_scheduler(optimizer, one_cycle=True, steps=10)
        rates = []
        for _ in range(10):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if len(rates) < 10:
                scheduler.step()
        self.assertLess(rates[0], 0.001)
        assert_close(max(rates), 0.01)
        self.assertLess(rates[-1], 1e-5)


class TrainingTest(TestCase):
    """Runs of the real script on tiny folders."""

    @classmethod
    def setUpClass(cls) -> None:
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.data = write_images(Path(temporary.name, "images"))
        cls.out = Path(temporary.name, "out")
        cls.printed = run_training(cls.data, cls.out, *RESNET18, "--epochs", 2)
        cls.best = torch.load(cls.out / "best.pt", weights_only=True)
        cls.last = torch.load(cls.out / "last.pt", weights_only=True)
        cls.log = read_log(cls.out)

    def state_after(self, *arguments: object) -> dict:
        run_training(self.data, self.folder, *RESNET18, "--epochs", 2, *arguments)
        return torch.load(self.folder / "last.pt", weights_only=True)["run"]

    def test_the_checkpoint_holds_what_the_design_says(self) -> None:
        self.assertEqual({key: type(self.best[key]) for key in self.best},
                         {"model": type(resnet18().state_dict()), "arch": str, "classes": list,
                          "size": int, "mean": list, "std": list, "epoch": int, "val_acc": float,
                          "data": str, "args": dict, "exits": dict})
        self.assertEqual(self.best["classes"], ["circle", "square", "star"])
        resnet18(num_classes=3).load_state_dict(self.best["model"])
        self.assertEqual(self.last["run"]["criterion"].keys(),
                         {"classifier.weight", "classifier.bias"})
        self.assertEqual(sorted(path.name for path in self.out.iterdir()),
                         ["best.pt", "last.pt", "log.jsonl"])

    def test_the_log_has_a_line_an_epoch(self) -> None:
        self.assertEqual([line["epoch"] for line in self.log], [1, 2])
        keys = {"epoch", "train_loss", "ce_loss", "distillation_loss", "train_acc", "val_loss",
                "val_acc", "lr", "images_per_second", "seconds", "gradient_ratio", "student_norm",
                "student_spread", "teacher_norm", "teacher_spread"}
        for line in self.log:
            self.assertEqual(line.keys(), keys)
            assert_close(line["train_loss"],
                         0.5 * line["ce_loss"] + 0.5 * line["distillation_loss"])

    def test_it_prints_a_line_an_epoch_where_there_is_no_terminal(self) -> None:
        lines = self.printed.splitlines()
        self.assertEqual([line.split()[0] for line in lines],
                         ["data", "network", "machine", "recipe", "epoch", "epoch", "best",
                          "python"])
        self.assertIn("18 train and 9 val images, 3 classes", lines[0])
        self.assertNotIn("\r", self.printed)

    def test_a_terminal_gets_a_line_that_is_rewritten(self) -> None:
        output = io.StringIO()
        output.isatty = lambda: True
        with contextlib.redirect_stdout(output):
            train.main(tiny(self.data, self.folder, "--batch-size", 32))
        self.assertRegex(output.getvalue(), r"\r\033\[Kepoch 1/1  batch 1/1  .* images/s  "
                                            r"loss .*  \d+ s left")

    def test_evaluation_agrees_with_the_log_to_the_last_digit(self) -> None:
        printed = run(evaluate.main, self.out / "best.pt", "--json", self.folder / "figures.json")
        figures = json.loads((self.folder / "figures.json").read_text())
        line = self.log[self.best["epoch"] - 1]
        self.assertEqual((figures["top1"], figures["loss"]), (line["val_acc"], line["val_loss"]))
        self.assertEqual(self.best["val_acc"], line["val_acc"])
        self.assertEqual(figures["count"], 9)
        self.assertRegex(printed, f"top-1 {line['val_acc']:.4f} .*  loss {line['val_loss']:.4f}")

    def test_weights_repeat_bit_for_bit_whatever_the_workers(self) -> None:
        state = self.state_after("--workers", 2)
        for part in ("network", "criterion"):
            assert_close(state[part], self.last["run"][part], rtol=0, atol=0)
        other = self.state_after("--seed", 1)
        self.assertFalse(torch.equal(other["network"]["conv1.weight"],
                                     state["network"]["conv1.weight"]))

    def test_the_early_classifier_is_trained_and_the_published_adapter_is_not(self) -> None:
        for flags, name, layer, trained in (
                ((), "classifier", partial(nn.Linear, 128, 3), True),
                (("--no-distillation",), "classifier", partial(nn.Linear, 128, 3), False),
                (("--recipe", "blog"), "adapter", partial(nn.Conv2d, 512, 128, 1), False)):
            torch.manual_seed(0)
            hooked_resnet18(3, "none")  # draws on the generator first, as the script does
            initial = layer().weight
            weight = self.state_after(*flags, "--epochs", 1)["criterion"][f"{name}.weight"]
            self.assertEqual(not torch.equal(weight, initial), trained)

    def test_the_best_epoch_is_the_earlier_of_two_alike(self) -> None:
        model, criterion = hooked_resnet18(2, "none"), SelfDistillationLoss()
        args, _ = train.parse_args(["--data", "somewhere"])
        optimizer = train.make_optimizer(args, model, criterion)
        progress = train.Run(model, criterion, optimizer,
                             train.make_scheduler(optimizer, True, 9), torch.amp.GradScaler("cpu"))
        best = []
        for right in (1, 1, 2, 0):  # of two val images
            progress.totals += 1.0
            progress.seconds = 1.0
            predictions = evaluate.Predictions(
                labels=torch.tensor([0, 0]), losses=torch.zeros(2),
                top=torch.tensor([[0, 1]] * right + [[1, 0]] * (2 - right)),
                probabilities=torch.tensor([[0.75, 0.25]] * 2), seconds=1.0)
            train.finish_epoch(progress, predictions, ["a", "b"], {})
            best.append((progress.best["epoch"], progress.best["val_acc"]))
        self.assertEqual(best, [(1, 0.5), (1, 0.5), (3, 1.0), (3, 1.0)])

    def test_training_begins_with_a_classifier_fitted_to_the_features(self) -> None:
        shutil.copytree(self.data / "train", self.folder / "images" / "train")
        shutil.copytree(self.data / "train", self.folder / "images" / "val")
        torch.manual_seed(0)
        weights = resnet18(num_classes=5).state_dict()
        torch.save(weights, self.folder / "weights.pth")
        printed = run_training(self.folder / "images", self.folder / "out", *RESNET18, "--size", 64,
                               "--lr", 1e-9, "--weights", self.folder / "weights.pth")
        self.assertIn("epoch 0/1  only the classifier fitted  val acc ", printed)
        best = torch.load(self.folder / "out" / "best.pt", weights_only=True)
        self.assertEqual(best["epoch"], 0)
        self.assertGreaterEqual(best["val_acc"], 0.9)  # on the very images it was fitted to
        self.assertEqual(self.evaluate(self.folder / "out" / "best.pt")["top1"], best["val_acc"])
        for name in weights.keys() - {"fc.weight", "fc.bias"}:
            assert_close(best["model"][name], weights[name], rtol=0, atol=0)
        self.assertEqual([line["epoch"] for line in read_log(self.folder / "out")], [1])

    def test_the_report_is_refreshed_after_each_epoch(self) -> None:
        pages = []
        with mock.patch.object(train, "page", lambda *args, **options: pages.append(
                evaluate.page(*args, **options)) or pages[-1]):
            run_training(self.data, self.folder, "--epochs", 2, "--report")
        for k, html in enumerate(pages):
            self.assertIn(f"after epoch {k + 1} of 2", html)
            self.assertEqual('http-equiv="refresh"' in html, k == 0)
            # Nine val images, right or wrong, and all eighteen train images.
            self.assertEqual(html.count("data:image/jpeg;base64,"), 9 + 18)
        self.assertEqual((self.folder / "report.html").read_text(), pages[-1])

    def test_another_network_is_trained_resumed_and_evaluated(self) -> None:
        torch.save(models.mobilenet_v3_small(num_classes=5).state_dict(), self.folder / "given.pth")
        flags = ("--arch", "mobilenet_v3_small", "--weights", self.folder / "given.pth")
        printed = run_training(self.data, self.folder / "out", *flags, "--student-layer",
                               "features.2", "--size", 64)
        self.assertIn("mobilenet_v3_small, weights", printed)
        self.assertIn("student features.2, teacher features\nmachine", printed)
        self.assertIn("epoch 0/1  only the classifier fitted", printed)
        last = torch.load(self.folder / "out" / "last.pt", weights_only=True)
        self.assertEqual(last["exits"].keys(), {"features.2"})
        models.mobilenet_v3_small(num_classes=3).load_state_dict(last["model"])
        run(train.main, "--resume", "--out", self.folder / "out")
        self.assertIn("--student-layer features.3 contradicts the run to resume, which has "
                      "features.2", self.error_of(train.main, "--resume", "--out", self.folder
                                                  / "out", "--student-layer", "features.3"))
        figures = self.evaluate(self.folder / "out" / "last.pt")
        self.assertEqual(figures["top1"], read_log(self.folder / "out")[0]["val_acc"])

    def test_results_of_an_earlier_run_are_kept(self) -> None:
        run_training(self.data, self.folder)
        earlier = {name: (self.folder / name).read_bytes() for name in ("best.pt", "log.jsonl")}
        for suffix in (1, 2):
            printed = run_training(self.data, self.folder, "--seed", suffix)
            self.assertRegex(printed, rf"kept the earlier .*best\.pt.* as .*best\.{suffix}\.pt")
        self.assertEqual((self.folder / "best.1.pt").read_bytes(), earlier["best.pt"])
        self.assertEqual((self.folder / "log.1.jsonl").read_bytes(), earlier["log.jsonl"])

    def test_one_class_one_image_and_a_batch_of_one(self) -> None:
        data = write_images(self.folder / "images", ("circle",), train_count=1, val_count=1)
        run_training(data, self.folder / "out", "--size", 64, "--batch-size", 1)
        figures = self.evaluate(self.folder / "out" / "best.pt")
        self.assertEqual((figures["top1"], figures["top5"], figures["count"]), (1.0, None, 1))
        self.assertIn("leaves a process 1 images, too few",
                      self.error_of(train.main, *tiny(data, self.folder)))

    def test_without_data_it_trains_on_the_shapes(self) -> None:
        self.enter_folder()
        with contextlib.redirect_stdout(io.StringIO()):
            train.draw_shapes(Path("data/shapes"), train=2, val=1)
        run(train.main, "--epochs", 1, "--workers", 0)
        figures = self.evaluate("best.pt")
        self.assertEqual(set(figures["per_class"]), set(train.SHAPES))
        self.assertIsNotNone(figures["top5"])

    def evaluate(self, checkpoint: Path | str, *arguments: object) -> dict:
        run(evaluate.main, checkpoint, "--workers", 0, "--json", self.folder / "figures.json",
            *arguments)
        return json.loads((self.folder / "figures.json").read_text())

    def test_classes_are_matched_by_name(self) -> None:
        expected = self.evaluate(self.out / "best.pt")
        fewer = write_images(self.folder / "fewer", ("square", "star"))
        figures = self.evaluate(self.out / "best.pt", "--data", fewer)
        self.assertEqual(figures["per_class"], {name: expected["per_class"][name]
                                                for name in ("square", "star")})
        write_images(self.folder / "other", ("circle", "cross"))
        self.assertRegex(self.error_of(evaluate.main, self.out / "best.pt", "--data",
                                       self.folder / "other"), "does not know: cross; it knows")

    def test_a_loss_that_is_not_finite_stops_after_the_good_state_is_saved(self) -> None:
        flags = tiny(self.data, self.folder, "--lr", "1e30", "--epochs", 3, "--batch-size", 4)
        self.assertRegex(self.error_of(train.main, *flags),
                         "not finite in epoch 1.*try a lower --lr")
        last = torch.load(self.folder / "last.pt", weights_only=True)
        self.assertTrue(all(value.isfinite().all() for value in last["model"].values()))


class HealthTest(TestCase):
    """The figures that tell whether the distillation term does anything."""

    def setUp(self) -> None:
        super().setUp()
        torch.manual_seed(0)
        self.model = hooked_resnet18(3, "none")
        self.criterion = SelfDistillationLoss(alpha=0.25, detach_teacher=True)
        folder = evaluate.ImageFolder(write_images(self.folder / "images") / "train",
                                      val_transform(64, normalized=False))
        augmented = train.Augmented(folder, train_transform(64, normalized=False))
        loader = SimpleNamespace(dataset=augmented, batch_size=18)
        self.data = train.Data(folder, folder, loader, loader, fingerprints={})
        images, self.labels = torch.utils.data.default_collate(
            [augmented[k, train.mix(train.mix(5, 2), k)] for k in range(18)])
        self.images = evaluate.to_device(images, torch.device("cpu"))

    def health(self) -> dict[str, float]:
        run = SimpleNamespace(model=self.model, criterion=self.criterion, epoch=2,
                              device=torch.device("cpu"))
        return train.health(run, self.data, seed=5)

    def test_the_gradients_are_those_of_the_weighted_terms(self) -> None:
        before = copy.deepcopy(self.model.state_dict())
        ratio = self.health()["gradient_ratio"]
        assert_close(self.model.state_dict(), before, rtol=0, atol=0)  # batch norms, too
        norms = []
        for ce_weight, distillation_weight in ((0, 0.25), (0.75, 0)):
            logits, student, teacher = self.model.train()(self.images)
            student.retain_grad()
            target = self.criterion.adapter(teacher.detach())
            loss = (ce_weight * nn.functional.cross_entropy(logits, self.labels)
                    + distillation_weight * nn.functional.mse_loss(
                        nn.functional.interpolate(student, size=(2, 2), mode="bilinear"), target))
            loss.backward()
            norms.append(student.grad.norm())
        assert_close(torch.tensor(ratio), norms[0] / norms[1])

    def test_norm_and_spread_of_features_alike_opposite_and_orthogonal(self) -> None:
        direction = torch.zeros(18, 128, 2, 2)
        direction[:, 0] = 3.0
        opposite, orthogonal = direction.clone(), direction.clone()
        opposite[9:] *= -1
        orthogonal[9:] = direction[9:].roll(1, dims=1)
        for features, spread in ((direction, 0.0), (opposite, 1.0), (orthogonal, 0.5 ** 0.5)):
            assert_close(train.norm_and_spread(features), (3.0, spread))

    def test_a_collapse_is_told_once(self) -> None:
        def warnings_at(*spreads: float) -> list[bool]:
            log = [{"student_spread": 0.5, "teacher_spread": spread} for spread in spreads]
            told = []
            for k in range(len(log)):
                with contextlib.redirect_stdout(io.StringIO()) as output:
                    train.warn_of_collapse(log[:k + 1])
                told.append("collapsed" in output.getvalue())
            return told

        self.assertEqual(warnings_at(0.5, 0.001, 0.001, 0.5, 0.001),
                         [False, True, False, False, False])
        self.assertEqual(warnings_at(0.5, 0.1), [False, False])


class ComparisonTest(TestCase):
    """--compare: pairs of runs with and without distillation."""

    def setUp(self) -> None:
        super().setUp()
        self.data = write_images(self.folder / "images")

    def compare(self, out: str, *arguments: object) -> str:
        return run_training(self.data, self.folder / out, "--compare", 2, "--seed", 3, *arguments)

    def test_the_control_has_the_gradient_of_the_weighted_cross_entropy_alone(self) -> None:
        torch.manual_seed(0)
        model, criterion = hooked_resnet18(3, "none"), SelfDistillationLoss(alpha=0.25)
        criterion.adapter.requires_grad_(False)
        images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
        _, loss, ce, distillation = train.Distiller(model, criterion, "fp32", False)(images, labels)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        assert_close(loss, 0.75 * ce)
        loss = 0.75 * nn.functional.cross_entropy(model(images)[0], labels)
        loss.backward()
        assert_close(gradients, [parameter.grad for parameter in model.parameters()])
        self.assertGreater(distillation, 0)

    def test_its_runs_are_those_that_the_flags_alone_give(self) -> None:
        printed = self.compare("out")
        self.assertIn("run 4 of 4: control, seed 4", printed)
        self.assertRegex(printed.splitlines()[-1], "with 2 pairs: 95 % interval")
        figures = json.loads((self.folder / "out" / "compare.json").read_text())
        self.assertEqual([pair["seed"] for pair in figures["pairs"]], [3, 4])
        for arm, flag in (("distillation", "--distillation"), ("control", "--no-distillation")):
            run_training(self.data, self.folder / arm, "--seed", 4, flag)
            alone = read_log(self.folder / arm)
            self.assertEqual(alone[-1]["val_acc"], figures["pairs"][1][arm])
            self.assertEqual(contents(alone),
                             contents(read_log(self.folder / "out" / "compare" / f"4-{arm}")))

    def test_it_goes_on_where_it_was_stopped_and_keeps_an_earlier_one(self) -> None:
        begun = []

        def stopped_once(arguments: list[str]) -> int:
            args = train.make_parser().parse_args(arguments)
            self.assertEqual(args.resume, "auto")
            begun.append(f"{args.seed}-{'distillation' if args.distillation else 'control'}")
            self.assertEqual(args.out, str(self.folder / "out" / "compare" / begun[-1]))
            self.assertEqual(args.precision, "fp32" if begun[-1] == "3-distillation" else "bf16")
            if len(begun) == 3:
                return 143
            Path(args.out).mkdir(parents=True, exist_ok=True)
            torch.save({"val_acc": len(begun) / 10, "args": {"precision": "bf16"}},
                       Path(args.out, "last.pt"))
            return 0

        with mock.patch.object(train, "fine_tune", stopped_once):
            with self.assertRaises(SystemExit) as caught:
                self.compare("out")
            self.assertEqual(caught.exception.code, 143)
            self.assertFalse((self.folder / "out" / "compare.json").exists())
            self.compare("out", "--resume")
            runs = ["3-distillation", "3-control", "4-distillation", "4-control"]
            self.assertEqual(begun, runs[:3] + runs)
            figures = (self.folder / "out" / "compare.json").read_text()
            self.compare("out")
        self.assertEqual((self.folder / "out" / "compare.1.json").read_text(), figures)
        self.assertEqual(len(list((self.folder / "out" / "compare.1").iterdir())), 4)

    def test_a_signal_after_the_last_step_of_a_run_stops_it_too(self) -> None:
        def signalled(*arguments: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

        with mock.patch.object(train, "report", signalled), self.assertRaises(SystemExit) as caught:
            self.compare("out")
        self.assertEqual(caught.exception.code, 143)
        self.assertEqual([path.name for path in (self.folder / "out" / "compare").iterdir()],
                         ["3-distillation"])

    def test_the_gain_of_three_pairs_by_hand(self) -> None:
        def verdict_of(*differences: float) -> tuple[dict, str]:
            figures = train.gain([{"seed": k, "distillation": 0.5 + difference, "control": 0.5,
                                   "difference": difference}
                                  for k, difference in enumerate(differences)])
            return figures, run(lambda _: train.print_gain(figures)).splitlines()[-1]

        figures, verdict = verdict_of(0.01, 0.02, 0.03)
        half = 4.303 * 0.01 / 3 ** 0.5
        assert_close(figures["difference"]["interval"], [0.02 - half, 0.02 + half],
                     rtol=0, atol=1e-5)
        assert_close(figures["distillation"], {"mean": 0.52, "deviation": 0.01})
        self.assertIn("cannot be told, with 3 pairs", verdict)
        self.assertIn("distillation helps, with 3 pairs", verdict_of(0.02, 0.021, 0.022)[1])
        self.assertIn("distillation hurts, with 3 pairs", verdict_of(-0.02, -0.021, -0.022)[1])

    def test_quantiles_of_t_are_those_of_tables(self) -> None:
        for freedom, expected in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (29, 2.045)):
            self.assertAlmostEqual(train.t_quantile(freedom), expected, delta=0.001)

    def test_what_makes_no_pair_is_refused(self) -> None:
        for flags in (("--no-distillation",), ("--alpha", 0), ("--resume", "other/last.pt")):
            self.assertIn("--compare trains with distillation and without",
                          self.error_of(train.main, *tiny(self.data, self.folder / "out",
                                                          "--compare", 2, *flags)))


class Training(multiprocessing.get_context("forkserver").Process):
    """train.py in a process of its own, as its command line would run it.

    Args:
        arguments: of the command line.
        log: the file that gets what it prints, errors too.
        prepare: called in the process before; it must not be a lambda.
    """

    def __init__(self, arguments: list[str], log: Path, prepare: Callable = int) -> None:
        super().__init__(target=train_as_a_script, args=(arguments, log, prepare))
        self.log = log
        log.unlink(missing_ok=True)
        self.start()

    def wait_for(self, text: str) -> None:
        """Until it has printed this."""
        deadline = time.monotonic() + 60
        while text not in self.printed():
            if not self.is_alive() or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} was not printed, but: {self.printed()}")
            time.sleep(0.02)

    def printed(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def exit_code(self) -> int:
        self.join(60)
        return self.exitcode


def train_as_a_script(arguments: list[str], log: Path, prepare: Callable) -> None:
    """What a `Training` does. On one thread, so that two of them do not slow each other down."""
    os.setsid()
    os.fsync = mock.Mock()
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    sys.stdout = sys.stderr = open(log, "w", buffering=1)
    prepare()
    evaluate.run_script(train.main)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def join_in_float64(environment: dict[str, str]) -> None:
    """Be a process of torchrun's that computes in float64 and with batch norm in eval mode.

    In float32 the order of sums can move weights by 1e-3 in ten steps, where a ReLU or a pooling
    turns; and a batch norm in train mode sees the images of its own process alone.
    """
    os.environ.update(environment)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    evaluate.normalize = lambda images: selfdistill.normalize(images).double()
    nn.BatchNorm2d.train = lambda module, mode=True: nn.Module.train(module, False)


multiprocessing.get_context("forkserver").set_forkserver_preload(["test_selfdistill"])


def contents(value: object) -> object:
    """What a checkpoint holds, without times, and with tensors as sums of their bits."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, zlib.crc32(value.contiguous().numpy().tobytes())
    if isinstance(value, dict):
        return {key: contents(item) for key, item in value.items()
                if key not in ("seconds", "images_per_second")}
    return [contents(item) for item in value] if isinstance(value, list) else value


class ResumeTest(TestCase):
    """Runs that are interrupted, and end as if they had not been; KILLS tells how many to kill."""
    KILLS = int(os.environ.get("KILLS", 6))

    def setUp(self) -> None:
        super().setUp()
        self.data = write_images(self.folder / "images")

    def start(self, out: str, *arguments: object, prepare: Callable = int) -> Training:
        flags = tiny(self.data, self.folder / out, "--epochs", 2, *arguments)
        process = Training(flags, self.folder / f"{out}.log", prepare)
        self.addCleanup(process.kill)
        return process

    def assert_same_run(self, out: Path, expected: Path) -> None:
        self.assertEqual(self.left_by(out), self.left_by(expected))

    def left_by(self, out: Path) -> tuple:
        """All that a run left, bit for bit, but for times."""
        return (contents(torch.load(out / "last.pt", weights_only=True)),
                zlib.crc32((out / "best.pt").read_bytes()), contents(read_log(out)))

    def test_a_run_killed_at_any_instant_ends_as_if_it_had_not_been(self) -> None:
        flags = ("--batch-size", 9, "--save-every", 0.01)
        started = time.monotonic()
        self.assertEqual(self.start("expected", *flags).exit_code(), 0)
        seconds = time.monotonic() - started
        expected = self.left_by(self.folder / "expected")

        def kill_and_resume(k: int) -> None:
            process = self.start(f"killed{k}", *flags)
            process.join(random.Random(k).uniform(0.1, 1) * seconds)
            process.kill()
            process.join()
            out = self.folder / f"killed{k}"
            for path in out.glob("*.pt"):
                evaluate.read_checkpoint(path)
            process = self.start(out.name, *flags, "--resume", "auto")
            self.assertEqual(process.exit_code(), 0, process.printed())
            self.assertEqual(self.left_by(out), expected)
            shutil.rmtree(out)

        with ThreadPool(2) as pool:
            pool.map(kill_and_resume, range(self.KILLS))

    def stop_after(self, steps: int, *arguments: object) -> dict:
        """Stop a run in the middle of its epoch 2, and return what last.pt then holds of it."""
        class Stopping(train.Checkpointer):
            def fetch(self, batches: object) -> object:
                nonlocal steps
                steps -= 1
                if steps < 0:
                    self.note(signal.SIGTERM, None)
                return super().fetch(batches)

        with (mock.patch.object(train, "Checkpointer", Stopping),
              self.assertRaises(SystemExit) as caught):
            run_training(self.data, self.folder / "out", "--epochs", 2, *arguments)
        self.assertEqual(caught.exception.code, 143)
        return torch.load(self.folder / "out" / "last.pt", weights_only=True)["run"]

    def test_it_goes_on_with_the_very_next_batch_and_random_number(self) -> None:
        def with_dropout(*arguments: object) -> HookedModel:
            model = hooked_classifier(*arguments)
            model.model.avgpool.register_forward_hook(
                lambda layer, inputs, output: nn.functional.dropout(output, 0.5, layer.training))
            return model

        with mock.patch.object(train, "hooked_classifier", with_dropout):
            run_training(self.data, self.folder / "expected", "--epochs", 2)
            stopped = self.stop_after(3 + 2 + 1)  # batches of epoch 1, of its val, of epoch 2
            self.assertEqual((stopped["epoch"], stopped["batch"]), (1, 1))
            with mock.patch.object(evaluate, "load_image", wraps=evaluate.load_image) as load:
                printed = run(train.main, "--out", self.folder / "out", "--resume")
        self.assertIn("resumed    after 1 epochs and 1 batches of the next", printed)
        read = [path for (path,), _ in load.call_args_list if "/train/" in path]
        self.assertEqual(len(read), 18 - 6 + 8)  # the rest of the epoch, then those of `health`
        self.assert_same_run(self.folder / "out", self.folder / "expected")

    def test_a_run_stopped_while_it_validates_goes_on_there(self) -> None:
        run_training(self.data, self.folder / "expected", "--epochs", 2)
        stopped = self.stop_after(3 + 1)
        self.assertEqual((stopped["epoch"], stopped["batch"]), (0, 3))
        run(train.main, "--resume", self.folder / "out" / "last.pt")
        self.assert_same_run(self.folder / "out", self.folder / "expected")

    def test_fine_tuning_goes_on_wherever_it_is_stopped(self) -> None:
        torch.save(models.mobilenet_v3_small(num_classes=5).state_dict(),
                   self.folder / "weights.pth")
        weights = ("--weights", self.folder / "weights.pth")
        run_training(self.data, self.folder / "expected", "--epochs", 2, *weights)
        fit, epoch_0, epoch_1 = 3, 2, 3 + 2  # batches
        for steps, expected in ((1, (0, 0, -1)), (fit + 1, (0, 0, -1)),
                                (fit + epoch_0 + epoch_1 + 1, (1, 1, 0))):
            stopped = self.stop_after(steps, *weights)
            self.assertEqual((stopped["epoch"], stopped["batch"],
                              min(0, stopped["best"]["epoch"])), expected)
            run(train.main, "--resume", self.folder / "out" / "last.pt")
            self.assert_same_run(self.folder / "out", self.folder / "expected")
            shutil.rmtree(self.folder / "out")

    def test_a_save_while_the_classifier_is_fitted_is_of_the_whole_network(self) -> None:
        network = models.mobilenet_v3_small(num_classes=5)
        torch.save(network.state_dict(), self.folder / "weights.pth")
        with mock.patch.object(train, "write_checkpoint") as write:
            run_training(self.data, self.folder / "out", "--save-every", 0,
                         "--weights", self.folder / "weights.pth")
        for call in write.call_args_list:
            self.assertEqual(call.args[1]["model"].keys(), network.state_dict().keys())

    def test_a_signal_finishes_the_step_and_saves(self) -> None:
        for number, code, workers in ((signal.SIGTERM, 143, 2), (signal.SIGINT, 130, 0)):
            process = self.start("out", "--epochs", 10000, "--workers", workers)
            process.wait_for("epoch 1/10000")
            os.killpg(process.pid, number)  # the loader's workers get it too
            self.assertEqual(process.exit_code(), code, process.printed())
            last_line = process.printed().splitlines()[-1]
            self.assertRegex(last_line, r"^stopped in epoch \d+ after batch \d; go on with: python "
                             f"train.py --resume {self.folder}/out/last.pt$")
            evaluate.read_checkpoint(self.folder / "out" / "last.pt")
            self.assertFalse(list((self.folder / "out").glob(".*")))

    def test_sigusr1_saves_and_goes_on(self) -> None:
        process = self.start("out", "--epochs", 10000)
        process.wait_for("epoch 1/10000")
        positions = set()
        while len(positions) < 3:  # epochs alone, without a batch, would be saved at their ends
            os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.1)
            state = evaluate.read_checkpoint(self.folder / "out" / "last.pt")["run"]
            positions |= {(state["epoch"], state["batch"])} if state["batch"] else set()
            self.assertTrue(process.is_alive(), process.printed())
        process.kill()

    def test_a_second_ctrl_c_stops_at_once_but_not_a_second_sigterm(self) -> None:
        before = signal.getsignal(signal.SIGINT)  # ignored, in a job in the background
        checkpointer = train.Checkpointer(mock.Mock(), mock.Mock(), mock.Mock())
        with checkpointer:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        self.assertEqual(checkpointer.stop, signal.SIGTERM)
        with self.assertRaises(KeyboardInterrupt), checkpointer:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        self.assertIs(signal.getsignal(signal.SIGINT), before)

    def test_last_pt_is_saved_so_often(self) -> None:
        for minutes, saves in (((), 1 + 1), (("--save-every", 0), 1 + (3 + 2) + 1)):
            with mock.patch.object(train.Checkpointer, "save", autospec=True,
                                   side_effect=train.Checkpointer.save) as save:
                run_training(self.data, self.folder / "out", *minutes)
            self.assertEqual(save.call_count, saves)

    def test_flags_not_given_come_from_the_checkpoint(self) -> None:
        run_training(self.data, self.folder / "out", "--alpha", 0.25, "--lr", 0.001,
                     "--save-every", 3)
        before = torch.load(self.folder / "out" / "last.pt", weights_only=True)["args"]
        run(train.main, "--resume", self.folder / "out" / "last.pt", "--workers", 1)
        after = torch.load(self.folder / "out" / "last.pt", weights_only=True)["args"]
        self.assertEqual(after, before | {"workers": 1})

    def test_a_contradiction_names_both_values(self) -> None:
        run_training(self.data, self.folder / "out")
        resume = ("--resume", self.folder / "out" / "last.pt")
        for flag, value, saved in (("--seed", 5, 0), ("--size", 64, 32), ("--batch-size", 4, 8),
                                   ("--recipe", "blog", "tuned"), ("--alpha", 0.25, 0.5),
                                   ("--lr", 0.5, 0.1), ("--weights", "imagenet", "none"),
                                   ("--precision", "bf16", "fp32"), ("--epochs", 2, 1)):
            self.assertIn(f"{flag} {value} contradicts the run to resume, which has {saved}",
                          self.error_of(train.main, *resume, flag, value))
        run(train.main, *resume, "--precision", "auto", "--data", self.data)

    def test_epochs_may_be_raised_at_a_constant_rate(self) -> None:
        run_training(self.data, self.folder / "expected", "--recipe", "blog", "--epochs", 2)
        run_training(self.data, self.folder / "out", "--recipe", "blog")
        printed = run(train.main, "--out", self.folder / "out", "--resume", "--epochs", 2)
        self.assertIn("2 instead of 1, at the same learning rate", printed)
        self.assert_same_run(self.folder / "out", self.folder / "expected")
        self.assertIn("--epochs 1 contradicts the run to resume, which has 2: they can only be",
                      self.error_of(train.main, "--out", self.folder / "out", "--resume",
                                    "--epochs", 1))

    def test_data_that_have_changed_are_refused(self) -> None:
        run_training(self.data, self.folder / "out")
        resume = ("--resume", self.folder / "out" / "last.pt")
        image = self.data / "train" / "star" / "5.png"
        for change, message in (
                (lambda: image.rename(image.with_name("9.png")), "train/ has 18 images .* 18 "),
                (lambda: image.with_name("9.png").unlink(), "train/ has 17 images .* now, 18 "),
                (lambda: write_images(self.data, ("drop",)), "classes are .*'drop'.* now, .*"),
        ):
            change()
            self.assertRegex(self.error_of(train.main, *resume),
                             f"{self.data} has changed since the run began: .*{message}")

    def test_without_a_file_only_auto_starts_anew(self) -> None:
        flags = tiny(self.data, self.folder / "out")
        self.assertIn(f"cannot open the checkpoint {self.folder}/out/last.pt: No such file",
                      self.error_of(train.main, *flags, "--resume"))
        self.assertIn("cannot open the checkpoint nowhere.pt: No such file",
                      self.error_of(train.main, *flags, "--resume", "nowhere.pt"))
        self.assertFalse((self.folder / "out").exists())
        self.assertIn("out/last.pt yet: starting anew", run(train.main, *flags, "--resume", "auto"))

    def test_a_state_that_makes_no_sense_is_refused(self) -> None:
        run_training(self.data, self.folder / "out")
        last = torch.load(self.folder / "out" / "last.pt", weights_only=True)
        for change in ({"epoch": "one"}, {"optimizer": {}}, {"scheduler": 3}, {"data": None}):
            torch.save(last | {"run": last["run"] | change}, self.folder / "last.pt")
            self.assertIn("the checkpoint cannot be resumed, as it is damaged",
                          self.error_of(train.main, "--resume", self.folder / "last.pt"))
        torch.save(last | {"args": last["args"] | {"lr": "fast"}}, self.folder / "last.pt")
        self.assertIn("--lr: 'fast' is not a number",
                      self.error_of(train.main, "--resume", self.folder / "last.pt"))

    def test_the_initial_weights_are_not_needed_again(self) -> None:
        torch.save(models.mobilenet_v3_small(num_classes=3).state_dict(),
                   self.folder / "weights.pth")
        run_training(self.data, self.folder / "out", "--weights", self.folder / "weights.pth")
        (self.folder / "weights.pth").unlink()
        run(train.main, "--out", self.folder / "out", "--resume")

    def test_a_best_epoch_without_its_file_no_longer_counts(self) -> None:
        self.stop_after(3 + 2 + 1)
        printed = run(train.main, "--resume", self.folder / "out" / "last.pt",
                      "--out", self.folder / "other")
        self.assertIn(f"no best.pt of epoch 1 in {self.folder}/other", printed)
        self.assertEqual(evaluate.read_checkpoint(self.folder / "other" / "best.pt")["epoch"], 2)

    def test_resuming_a_run_from_elsewhere_keeps_what_lies_in_the_folder(self) -> None:
        for seed in (1, 2):
            run_training(self.data, self.folder / "out", "--seed", seed)
        run(train.main, "--resume", self.folder / "out" / "last.1.pt")
        seeds = {name: torch.load(self.folder / "out" / name, weights_only=True)["args"]["seed"]
                 for name in ("last.pt", "last.1.pt", "last.2.pt", "best.2.pt")}
        self.assertEqual(seeds, {"last.pt": 1, "last.1.pt": 1, "last.2.pt": 2, "best.2.pt": 2})

    def test_a_full_disk_leaves_the_earlier_files(self) -> None:
        for limit, name in ((10_000_000, "last.pt"), (4_000_000, "best.pt")):
            run_training(self.data, self.folder / "out", "--recipe", "blog")
            last = (self.folder / "out" / "last.pt").read_bytes()
            process = self.start("out", "--recipe", "blog", "--resume",
                                 prepare=partial(limit_file_size, limit))
            self.assertEqual(process.exit_code(), 1)
            self.assertRegex(process.printed(), f"error: cannot write .*/{name}: File too large\n$")
            self.assertTrue((self.folder / "out" / "last.pt").read_bytes() == last)
            evaluate.read_checkpoint(self.folder / "out" / "best.pt")
            self.assertEqual(sorted(os.listdir(self.folder / "out")),
                             ["best.pt", "last.pt", "log.jsonl"])
            shutil.rmtree(self.folder / "out")

    def test_a_loader_whose_worker_died_is_an_error_unless_a_signal_killed_it(self) -> None:
        checkpointer = train.Checkpointer(mock.Mock(), mock.Mock(), mock.Mock())
        for error in (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
                      ConnectionResetError("by peer")):
            with mock.patch("time.sleep"), checkpointer:
                with self.assertRaisesRegex(evaluate.UserError, "loads images has died .*workers"):
                    checkpointer.fetch(mock.MagicMock(__next__=mock.Mock(side_effect=error)))
                with mock.patch("time.sleep", lambda seconds: os.kill(os.getpid(), signal.SIGTERM)):
                    self.assertIsNone(checkpointer.fetch(
                        mock.MagicMock(__next__=mock.Mock(side_effect=error))))

    def test_unreadable_images_are_left_out_of_training_and_evaluation(self) -> None:
        bad = [self.data / "train" / "star" / "1.png", self.data / "val" / "circle" / "2.png"]
        bad[0].write_bytes(b"not an image")
        Image.new("1", (20000, 20000)).save(bad[1])  # over Pillow's limit for a bomb
        printed = run_training(self.data, self.folder / "out", "--skip-unreadable")
        for path, count in zip(bad, (18, 9)):
            self.assertIn(f"1 of {count} images cannot be read and are left out:\n  {path}",
                          printed)
        self.assertIn("17 train and 8 val images", printed)
        run(train.main, "--out", self.folder / "out", "--resume")
        line, = read_log(self.folder / "out")
        run(evaluate.main, self.folder / "out/best.pt", "--json", self.folder / "figures.json")
        figures = json.loads((self.folder / "figures.json").read_text())
        self.assertEqual((figures["count"], figures["loss"]), (8, line["val_loss"]))
        bad[0].unlink()
        run(train.main, "--out", self.folder / "out", "--resume")
        for path in (self.data / "val" / "star").iterdir():
            path.write_bytes(b"")
        self.assertRegex(self.error_of(train.main, *tiny(self.data, self.folder / "out"),
                                       "--skip-unreadable"), "no image that can be read for star")


class ProcessesTest(TestCase):
    """Several processes that train together as one would."""

    def start(self, count: int, out: str, *arguments: object) -> list[Training]:
        """So many processes, as torchrun starts them; the first prints to `out`0.log."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                           "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
                           "TORCHELASTIC_RUN_ID": "test"} if count > 1 else {}
        flags = tiny(self.folder / "images", self.folder / out, "--arch", "shufflenet_v2_x0_5",
                     "--size", 64, "--lr", 0.01, *arguments)  # it has no dropout
        processes = [Training(flags, self.folder / f"{out}{rank}.log", partial(
            join_in_float64, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}))
            for rank in range(count)]
        for process in processes:
            self.addCleanup(process.kill)
        return processes

    def finish(self, processes: list[Training], code: int = 0) -> None:
        for process in processes:
            self.assertEqual(process.exit_code(), code, process.printed())

    def assert_close_runs(self, out: str, expected: str) -> None:
        ours, theirs = (torch.load(self.folder / name / "last.pt", weights_only=True)
                        for name in (out, expected))
        for part in ("network", "criterion"):
            assert_close(ours["run"][part], theirs["run"][part], rtol=0, atol=1e-9)
        assert_close(ours["model"], theirs["model"], rtol=0, atol=1e-9)
        for line, other in zip(*(read_log(self.folder / name) for name in (out, expected)),
                               strict=True):
            self.assertEqual((line["val_acc"], line["train_acc"]),
                             (other["val_acc"], other["train_acc"]))
            assert_close([line[key] for key in ("train_loss", "ce_loss", "val_loss")],
                         [other[key] for key in ("train_loss", "ce_loss", "val_loss")],
                         rtol=1e-6, atol=0)

    def test_two_processes_learn_and_measure_what_one_does(self) -> None:
        write_images(self.folder / "images", train_count=6, val_count=3)  # 5 steps; 9 val images
        torch.manual_seed(0)
        torch.save(models.shufflenet_v2_x0_5(num_classes=5).state_dict(),
                   self.folder / "weights.pth")
        for count in (1, 2):
            self.finish(self.start(count, f"of{count}", "--batch-size", 4,
                                   "--weights", self.folder / "weights.pth"))
        self.assert_close_runs("of2", "of1")
        self.assertEqual((self.folder / "of21.log").read_text(), "")  # only the first prints

    def test_more_processes_than_val_images_count_each_once(self) -> None:
        write_images(self.folder / "images", train_count=4, val_count=1)
        for count in (1, 4):
            self.finish(self.start(count, f"of{count}", "--batch-size", 12))
        self.assert_close_runs("of4", "of1")

    def test_a_run_of_two_processes_goes_on_as_one(self) -> None:
        write_images(self.folder / "images")
        flags = ("--batch-size", 4, "--recipe", "blog")
        self.finish(self.start(1, "expected", *flags, "--epochs", 2))
        processes = self.start(2, "out", *flags, "--epochs", 2)
        processes[0].wait_for("epoch 1/2")
        os.kill(processes[1].pid, signal.SIGTERM)  # a signal to one stops all
        self.finish(processes, code=143)
        self.assertIn("go on with: torchrun ... train.py", processes[0].printed())
        self.finish(self.start(1, "out", *flags, "--epochs", 2, "--resume"))
        self.assert_close_runs("out", "expected")

    def test_batches_that_cannot_be_split_are_refused(self) -> None:
        write_images(self.folder / "images")
        for flags, message in (
                (("--batch-size", 9), "--batch-size 9 cannot be split evenly among 2 processes: "
                                      "use a multiple of 2"),
                (("--size", 32, "--batch-size", 2), "leaves a process 1 images, too few")):
            processes = self.start(2, "out", *flags)
            self.finish(processes, code=1)
            for process in processes:
                self.assertIn(message, process.printed())

    def torchrun(self, *arguments: object) -> subprocess.Popen:
        self.log = self.folder / "torchrun.log"
        flags = tiny(self.folder / "images", self.folder / "out", "--epochs", 10000)
        with open(self.log, "w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc-per-node", "2", *arguments, HERE / "train.py", *flags,
                 "--resume", "auto"], stdout=log, stderr=log)

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 60
        while self.log.read_text().count(text) < times:
            self.assertLess(time.monotonic(), deadline, self.log.read_text())
            time.sleep(0.05)

    def test_torchrun_restarts_from_the_last_save_and_stops_with_one(self) -> None:
        write_images(self.folder / "images")
        with self.torchrun("--max-restarts", "1") as process:
            self.wait_for("epoch 2/10000")
            ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(ranks[1]), signal.SIGKILL)
            self.wait_for("data   ", times=2)
            epochs = self.log.read_text().count("\nepoch")
            self.wait_for("\nepoch", times=epochs + 1)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        printed = self.log.read_text()
        self.assertEqual(printed.count("yet: starting anew"), 1)
        numbers = re.findall(r"^epoch (\d+)/", printed, re.MULTILINE)
        self.assertEqual(numbers, [str(k + 1) for k in range(len(numbers))])
        self.assertEqual(printed.count("stopped in epoch"), 1)
        evaluate.read_checkpoint(self.folder / "out" / "last.pt")

    def test_a_process_that_fails_ends_all_with_its_own_error(self) -> None:
        data = write_images(self.folder / "images")
        (data / "train" / "star" / "3.png").write_bytes(b"not an image")
        processes = self.start(2, "out")
        self.finish(processes, code=1)
        errors = sorted(process.printed().splitlines()[-1] for process in processes)
        self.assertRegex(errors[0], "train.py: error: cannot read the image .*3.png")
        self.assertRegex(errors[1], r"train.py: error: process \d has lost the others")


class DamagedFilesTest(TestCase):
    """A damaged file loads and works, or ends in one line; FUZZED_COPIES tells how many to try."""
    COPIES = int(os.environ.get("FUZZED_COPIES", 8))

    def damaged(self, path: Path) -> Iterator[None]:
        """Damage the file anew, in another way, before each step of the iteration."""
        whole = path.read_bytes()
        for k in range(self.COPIES):
            rng = random.Random(k)
            content = bytearray(whole)
            place = rng.randrange(len(whole))
            if k % 4 == 0:
                del content[place:]
            elif k % 4 == 1:
                del content[place:place + rng.randrange(1, 1000)]
            else:  # bits flipped: anywhere, or at the ends, where there is more than tensors
                reach = len(whole) if k % 4 == 2 else 8192
                for _ in range(rng.randrange(1, 20)):
                    place = rng.choice([1, -1]) * rng.randrange(1, min(reach, len(whole)))
                    content[place] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
            with self.subTest(path.name, copy=k):
                yield

    def outcome(self, main: Callable, *arguments: object) -> str:
        """What a script prints at its end, well or in one line of error."""
        try:
            return run(main, *arguments)
        except evaluate.UserError:
            return self.error_of(main, *arguments)

    def test_checkpoints(self) -> None:
        data = write_images(self.folder / "images", train_count=1, val_count=1)
        path, outcomes = self.folder / "best.pt", set()
        for in_a_zip in (True, False):
            torch.save(checkpoint_of(data, "shufflenet_v2_x0_5"), path,
                       _use_new_zipfile_serialization=in_a_zip)
            for _ in self.damaged(path):
                printed = self.outcome(evaluate.main, path, "--workers", 0)
                outcomes.add("error: " in printed)
        self.assertEqual(outcomes, {True, False})

    def test_weights(self) -> None:
        path = self.folder / "weights.pth"
        for in_a_zip in (True, False):
            torch.save(resnet18(num_classes=3).state_dict(), path,
                       _use_new_zipfile_serialization=in_a_zip)
            for _ in self.damaged(path):
                with contextlib.suppress(ValueError):
                    hooked_resnet18(3, path)

    def test_a_zip_bomb_is_refused_before_it_is_unpacked(self) -> None:
        path = self.folder / "best.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("best/data.pkl", "w", force_zip64=True) as record:
                for _ in range(30):
                    record.write(bytes(10_000_000))
        self.assertLess(path.stat().st_size, 1_000_000)
        started = time.monotonic()
        self.assertIn("not a checkpoint", self.error_of(evaluate.main, path))
        self.assertLess(time.monotonic() - started, 1)

    def test_other_formats(self) -> None:
        Image.new("RGB", (64, 64)).save(self.folder / "image.png")
        with zipfile.ZipFile(self.folder / "archive.zip", "w") as archive:
            archive.writestr("a.txt", "text")
        with tarfile.open(self.folder / "archive.tar", "w") as archive:
            archive.add(self.folder / "image.png")
        (self.folder / "text.csv").write_text("epoch,loss\n1,2\n")
        (self.folder / "module.pickle").write_bytes(pickle.dumps({"model": os.getcwd}))
        (self.folder / "empty.pt").write_bytes(b"")
        (self.folder / "folder.pt").mkdir()
        for path in sorted(self.folder.iterdir()):
            self.assertRegex(self.error_of(evaluate.main, path),
                             f"{path}: (not a checkpoint|Is a directory)")


class EvaluationTest(TestCase):
    # Ten predictions of classes a, b and c: the label, the best class, its probability.
    TEN = [(0, 0, 0.95), (0, 0, 0.95), (0, 0, 0.85), (0, 1, 0.55), (0, 1, 0.65),
           (1, 1, 0.95), (1, 1, 0.75), (1, 2, 0.75), (2, 2, 0.55), (2, 1, 0.95)]

    def setUp(self) -> None:
        super().setUp()
        labels, best, confidences = zip(*self.TEN)
        self.ten = evaluate.Predictions(
            labels=torch.tensor(labels), losses=torch.arange(10) / 8,
            top=torch.tensor(best)[:, None], probabilities=torch.tensor(confidences)[:, None],
            seconds=2.0)

    def test_the_figures_of_ten_predictions_by_hand(self) -> None:
        figures = evaluate.summarize(self.ten, list("abc"))
        for name, expected in (
                ("top1_interval", [0.3126738, 0.8318197]),  # Wilson, 6 of 10
                # In fifteenths: 4 of 0.95, right 3; 1 of 0.85, right; 2 of 0.75, right 1; 1 of
                # 0.65, wrong; 2 of 0.55, right 1.
                ("calibration_error", (0.8 + 0.15 + 0.5 + 0.65 + 0.1) / 10),
                ("confidence_when_right", (0.95 * 3 + 0.85 + 0.75 + 0.55) / 6),
                ("confidence_when_wrong", (0.55 + 0.65 + 0.75 + 0.95) / 4)):
            assert_close(torch.tensor(figures.pop(name)), torch.tensor(expected))
        self.assertEqual(figures, {
            "top1": 0.6, "top5": None, "loss": 0.5625, "count": 10, "images_per_second": 5.0,
            "per_class": {"a": {"count": 5, "correct": 3}, "b": {"count": 3, "correct": 2},
                          "c": {"count": 2, "correct": 1}},
            "most_confused": [{"label": "a", "prediction": "b", "count": 2},
                              {"label": "b", "prediction": "c", "count": 1},
                              {"label": "c", "prediction": "b", "count": 1}]})
        self.assertEqual(evaluate.confusion_matrix(self.ten, 3).tolist(),
                         [[3, 2, 0], [0, 2, 1], [0, 1, 1]])

    def test_intervals_of_wilson_are_those_of_tables(self) -> None:
        for rights, count, expected in (  # Newcombe 1998, table I, method 3
                (81, 263, [0.2553, 0.3662]), (15, 148, [0.0624, 0.1605]), (0, 20, [0.0, 0.1611]),
                (1, 29, [0.0061, 0.1718])):
            assert_close(torch.tensor(evaluate.wilson_interval(rights, count)),
                         torch.tensor(expected), rtol=0, atol=5e-5)

    def test_top5_counts_the_five_best_of_more_classes(self) -> None:
        predictions = self.ten._replace(top=torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]] * 5))
        self.assertEqual(evaluate.summarize(predictions, list("abcdefg"))["top5"], 0.8)

    def test_predictions_are_those_of_the_logits(self) -> None:
        logits = torch.tensor([[0.0, math.log(3.0)], [math.log(3.0), 0.0], [0.0, math.log(3.0)]])
        batches = [(logits[:2].view(2, 2, 1, 1), torch.tensor([1, 1])),
                   (logits[2:].view(1, 2, 1, 1), torch.tensor([0]))]
        with mock.patch.object(evaluate, "to_device", lambda images, device: images):
            result = evaluate.predict(nn.Flatten(), batches, torch.device("cpu"), "fp32")
        assert_close(result.losses, torch.tensor([0.2876821, 1.3862944, 1.3862944]))
        self.assertEqual(result.correct.tolist(), [True, False, False])
        assert_close(result.probabilities, torch.tensor([[0.75, 0.25]] * 3))
        self.assertEqual(result.top.tolist(), [[1, 0], [0, 1], [1, 0]])

    def test_what_is_written_of_each_image(self) -> None:
        torch.save(checkpoint_of(write_images(self.folder / "images")), self.folder / "best.pt")
        flags = ("--workers", 0, "--batch-size", 1)
        run(evaluate.main, self.folder / "best.pt", *flags, "--json",
            self.folder / "figures.json", "--save-predictions", self.folder / "table.csv")
        figures = json.loads((self.folder / "figures.json").read_text())
        with open(self.folder / "table.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([Path(row["path"]).relative_to(self.folder / "images" / "val").as_posix()
                          for row in rows],
                         [f"{name}/{k}.png" for name in figures["classes"] for k in range(3)])
        counts = [[sum((row["label"], row["prediction"]) == (label, prediction) for row in rows)
                   for prediction in figures["classes"]] for label in figures["classes"]]
        self.assertEqual(figures["confusion_matrix"], counts)
        self.assertEqual(figures["top1"], sum(counts[k][k] for k in range(3)) / 9)

        # Predicting the same images says the same, whatever else there is.
        (self.folder / "bad.jpg").write_bytes(b"not an image")
        output = io.StringIO()
        with contextlib.redirect_stdout(output), self.assertRaises(SystemExit) as caught:
            evaluate.main([str(argument) for argument in (
                self.folder / "best.pt", *flags, "--predict", self.folder / "bad.jpg",
                self.folder / "images" / "val", "--json", self.folder / "predictions.json",
                "--save-predictions", self.folder / "predictions.csv")])
        self.assertEqual(caught.exception.code, 1)
        lines = output.getvalue().splitlines()
        self.assertRegex(lines[0], "cannot read the image .*bad.jpg: cannot identify image file")
        self.assertEqual(len(lines), 10)
        unread, *results = json.loads((self.folder / "predictions.json").read_text())
        self.assertEqual(unread, {"path": str(self.folder / "bad.jpg"), "error": lines[0]})
        with open(self.folder / "predictions.csv", newline="") as file:
            table = list(csv.DictReader(file))
        self.assertEqual(table[1:], [row | {"label": ""} for row in rows])
        for line, result, row in zip(lines[1:], results, rows):
            best = result["classes"][0]
            self.assertTrue(line.startswith(
                f"{row['path']}: {row['prediction']} {best['probability']:.4f}, "))
            self.assertEqual(best, {"class": row["prediction"],
                                    "probability": float(row["confidence"])})
            self.assertAlmostEqual(sum(guess["probability"] for guess in result["classes"]), 1, 5)

    def test_the_report_is_one_page_with_the_figures_and_the_mistakes(self) -> None:
        data = write_images(self.folder / "images")
        torch.save(checkpoint_of(data), self.folder / "best.pt")
        self.enter_folder()
        for log in ("", "damaged", json.dumps({
                "epoch": 1, "train_loss": 2.0, "ce_loss": 1.5, "distillation_loss": 2.5,
                "val_loss": 0.125, "train_acc": 1.0, "val_acc": 1.0, "lr": 0.1}) + "\n"):
            Path("log.jsonl").write_text(log)
            run(evaluate.main, "best.pt", "--workers", 0, "--report", "new/folder", "--json",
                "figures.json", "--save-predictions", "table.csv")
            html = Path("new/folder/report.html").read_text()
            self.assertEqual("loss by epoch" in html, "train_loss" in log)
        self.assertIn("val: 0.125 at 1", html)
        figures = json.loads(Path("figures.json").read_text())
        self.assertIn(f"top-1 {figures['top1']:.4f} (95 % interval", html)
        with open("table.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:  # each of the nine images is among the mistakes or the right answers
            self.assertIn("{label}: {prediction} {confidence:.3f}</figcaption>".format(
                **row | {"confidence": float(row["confidence"])}), html)
        self.assertEqual(html.count("data:image/jpeg;base64,"), 9)
        self.assertFalse(re.search(r"<script|<link|https?:|src=\"(?!data:)", html))

    def test_names_are_text_on_the_page(self) -> None:
        write_images(self.folder)
        (self.folder / "train" / "circle").rename(self.folder / "train" / "<b>")
        dataset = evaluate.ImageFolder(self.folder / "train", val_transform(32, normalized=False))
        html = evaluate.page("<i>", evaluate.summarize(self.ten, dataset.classes), self.ten,
                             dataset, [])
        self.assertNotIn("<b>", html)
        self.assertNotIn("<i>", html)
        self.assertIn("&lt;b&gt;", html)

    def test_the_heat_map_has_the_counts_of_the_classes_with_the_most_mistakes(self) -> None:
        matrix = torch.zeros(40, 40, dtype=torch.int64)
        matrix[3, 7], matrix[7, 7], matrix[0, 0] = 41, 42, 43
        svg = evaluate.heat_map(matrix, [f"class{k}" for k in range(40)])
        self.assertEqual(svg.count("<rect"), 30 * 30)
        for text, shown in (("41", True), ("42", True), ("43", True), ("class7", True),
                            ("class39", False)):
            self.assertEqual(f">{text}</text>" in svg, shown)

    def test_an_export_gives_the_outputs_of_the_network_on_any_number_of_images(self) -> None:
        checkpoint = checkpoint_of(write_images(self.folder / "images"))
        torch.save(checkpoint, self.folder / "best.pt")
        model = evaluate.build_model(checkpoint, "best.pt")
        images = torch.randn(3, 3, 32, 32)
        for suffix in (".pt2", ".pth"):
            path = self.folder / f"network{suffix}"
            printed = run(evaluate.main, self.folder / "best.pt", "--export", path)
            self.assertIn("its outputs for 8 val images are the network's", printed)
        program = torch.export.load(self.folder / "network.pt2", extra_files=(metadata := {
            key: "" for key in ("arch", "classes", "size", "mean", "std")}))
        network = resnet18(num_classes=3)
        network.load_state_dict(torch.load(self.folder / "network.pth", weights_only=True))
        with torch.no_grad():
            for count in (1, 3):
                for found in (program.module(), network.eval()):
                    assert_close(found(images[:count]), model(images[:count]), rtol=0, atol=1e-4)
        self.assertEqual({key: json.loads(value) for key, value in metadata.items()},
                         {key: checkpoint[key] for key in metadata})

    def test_an_export_whose_outputs_differ_is_not_written(self) -> None:
        torch.save(checkpoint_of(write_images(self.folder / "images")), self.folder / "best.pt")
        (self.folder / "network.pth").write_text("earlier")
        with mock.patch.object(evaluate, "load_tensors", side_effect=lambda path: {
                name: value * 1.01 for name, value in selfdistill.load_tensors(path).items()}):
            checkpoint = selfdistill.load_tensors(self.folder / "best.pt")
            model = evaluate.build_model(checkpoint, "best.pt")
            with self.assertRaisesRegex(evaluate.UserError, "is not written: its outputs would"):
                evaluate.export(model, checkpoint, self.folder / "network.pth",
                                torch.randn(2, 3, 32, 32))
        self.assertEqual((self.folder / "network.pth").read_text(), "earlier")

    @unittest.skipUnless(importlib.util.find_spec("onnxscript"), "onnx and onnxscript are optional")
    def test_an_onnx_export_says_what_it_is(self) -> None:
        import onnx
        torch.save(checkpoint_of(write_images(self.folder / "images")), self.folder / "best.pt")
        run(evaluate.main, self.folder / "best.pt", "--export", self.folder / "network.onnx")
        metadata = {entry.key: entry.value
                    for entry in onnx.load(self.folder / "network.onnx").metadata_props}
        self.assertEqual(json.loads(metadata["classes"]), ["circle", "square", "star"])

    def test_an_exit_is_the_network_up_to_its_layer_with_the_classifier_trained_on_it(self) -> None:
        checkpoint = checkpoint_of(write_images(self.folder / "images"))
        torch.manual_seed(0)
        classifier = nn.Linear(128, 3)
        checkpoint["exits"] = {"layer2.1": classifier.state_dict()}
        torch.save(checkpoint, self.folder / "best.pt")
        printed = run(evaluate.main, self.folder / "best.pt", "--json", self.folder / "both.json")
        run(evaluate.main, self.folder / "best.pt", "--exit", "layer2.1", "--json",
            self.folder / "exit.json")
        both, early = (json.loads((self.folder / name).read_text())
                       for name in ("both.json", "exit.json"))
        self.assertEqual(both["exits"]["layer2.1"]["loss"], early["loss"])
        self.assertIn(f"exit layer2.1: top-1 {early['top1']:.4f}", printed)

        model = evaluate.build_model(checkpoint, "best.pt")
        exits = evaluate.build_exits(model, checkpoint, "best.pt")
        images = torch.randn(2, 3, 64, 64)
        with HookedModel(model) as hooked, torch.no_grad():
            _, student, _ = hooked(images)
            assert_close(exits["layer2.1"](images), classifier(student.mean(dim=(2, 3))))
        names = {name for name, _ in exits["layer2.1"].named_parameters()}
        self.assertFalse([name for name in names if "layer3" in name or "layer4" in name])
        self.assertIn("has no exit layer3.1; it has layer2.1",
                      self.error_of(evaluate.main, self.folder / "best.pt", "--exit", "layer3.1"))
        for exits in ({"layer9": classifier.state_dict()}, {"layer2.1": {}}, {"layer2.1": 3}):
            torch.save(checkpoint | {"exits": exits}, self.folder / "best.pt")
            self.assertIn("does not hold classifiers",
                          self.error_of(evaluate.main, self.folder / "best.pt"))

    def test_folded_batch_norms_change_no_output(self) -> None:
        torch.manual_seed(0)
        model = resnet18(num_classes=3)
        images = torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
        for parameter in model.bn1.parameters():
            nn.init.uniform_(parameter)
        model(selfdistill.normalize(images.permute(0, 3, 1, 2)))  # moves the statistics
        before = copy.deepcopy(model.state_dict())
        with torch.no_grad():
            expected = model.eval()(selfdistill.normalize(images.permute(0, 3, 1, 2)))
        batches = [(images, torch.zeros(4, dtype=torch.int64))]
        with mock.patch.object(nn.BatchNorm2d, "forward", side_effect=AssertionError):
            (logits, _), = evaluate.outputs(model, batches, torch.device("cpu"), "fp32")
        assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert_close(model.state_dict(), before)

    def test_bf16_is_taken_where_it_is_fast_and_a_checkpoint_does_not_force_it(self) -> None:
        data = write_images(self.folder / "images")
        checkpoint = checkpoint_of(data)
        checkpoint["args"]["precision"] = "bf16"
        torch.save(checkpoint, self.folder / "best.pt")
        for seconds, expected in (({"bf16": 1.0, "fp32": 2.0}, "bf16"),
                                  ({"bf16": 12.0, "fp32": 1.0}, "fp32")):
            with (mock.patch.object(torch.cpu, "_is_avx512_bf16_supported", return_value=True),
                  mock.patch.object(evaluate, "seconds_of_steps",
                                    lambda precisions: [seconds[name] for name in precisions])):
                printed = run(evaluate.main, self.folder / "best.pt", "--workers", 0, "--device",
                              "cpu")
            self.assertIn(f"{expected} on cpu", printed)

    def test_auto_takes_a_device_and_precision_that_work(self) -> None:
        device = evaluate.choose_device("auto")
        precision = evaluate.choose_precision("auto", device)
        with evaluate.autocast(device, precision):
            result = nn.Conv2d(3, 4, 1).to(device)(torch.ones(1, 3, 2, 2, device=device))
        self.assertEqual(result.dtype, evaluate.DTYPES[precision])


class ReadmeTest(TestCase):
    def test_the_code_runs_as_shown(self) -> None:
        code = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
        self.enter_folder()
        exec(compile(code, "README.md", "exec"), {})
        resnet18(num_classes=10).load_state_dict(torch.load("plain_resnet18.pt"))


class BadInputTest(TestCase):
    """Each mistake ends in one line that names the thing and what would be right."""

    def setUp(self) -> None:
        super().setUp()
        self.data = write_images(self.folder / "images", train_count=2, val_count=1)

    def train_error(self, *arguments: object) -> str:
        flags = tiny(self.data, self.folder / "out", *RESNET18, *arguments)
        return self.error_of(train.main, *flags)

    def write_checkpoint(self, **changes: object) -> Path:
        path = self.folder / "best.pt"
        torch.save(checkpoint_of(self.data) | changes, path)
        return path

    def test_numbers_that_make_no_sense(self) -> None:
        for flag, value in (("--epochs", 0), ("--epochs", "many"), ("--batch-size", -1),
                            ("--size", 0), ("--size", 1.5), ("--workers", -1), ("--alpha", 1.1),
                            ("--alpha", "nan"), ("--lr", "inf"), ("--lr", -0.1), ("--seed", -1),
                            ("--compare", 1)):
            with self.subTest(flag=flag, value=value):
                self.assertRegex(self.train_error(flag, value),
                                 f"{flag}: '{value}' is not a .*number (of at least|between)")
        self.assertIn("--batch-size", self.error_of(evaluate.main, "best.pt", "--batch-size", 0))

    def test_data_that_is_missing_or_incomplete(self) -> None:
        nowhere = self.folder / "nowhere"
        self.assertIn(f"{nowhere} does not exist", self.train_error("--data", nowhere))
        nowhere.mkdir()
        self.assertIn("no train/ and val/ in it", self.train_error("--data", nowhere))
        (self.data / "train" / "star").rename(self.folder / "elsewhere")
        self.assertRegex(self.train_error(), "classes of train/ and val/ .* differ: .* star")
        (self.data / "train" / "star").mkdir()
        self.assertRegex(self.train_error(), "images.train: .*no valid file for the classes star")
        for split in ("train", "val"):
            (self.folder / "flat" / split).mkdir(parents=True)
        self.assertIn("no class folders", self.train_error("--data", self.folder / "flat"))

    def test_an_image_that_cannot_be_read_is_named(self) -> None:
        whole = (self.data / "train" / "star" / "0.png").read_bytes()
        for content, split, workers in ((b"", "train", 0), (b"not an image", "val", 0),
                                        (whole[:len(whole) // 2], "train", 1)):
            image = self.data / split / "star" / "0.png"
            image.write_bytes(content)
            self.assertIn(f"cannot read the image {image}", self.train_error("--workers", workers))
            image.write_bytes(whole)

    def test_a_run_that_fails_in_a_worker_ends_at_once_in_one_line(self) -> None:
        image = self.data / "train" / "star" / "1.png"
        image.write_bytes(b"not an image")
        command = [sys.executable, HERE / "train.py",
                   *tiny(self.data, self.folder, "--batch-size", 2, "--workers", 2)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 1)
        self.assertRegex(result.stderr,
                         rf"^train\.py: error: cannot read the image {image}: .*\n$")

    def test_a_device_that_is_not_there(self) -> None:
        for device in ("cuda:99", "no-such-device"):
            self.assertIn(f"device '{device}' is not available", self.train_error(
                "--device", device))

    def test_weights_that_are_missing_damaged_or_of_another_network(self) -> None:
        path = self.folder / "weights.pth"
        self.assertIn(f"cannot get the weights '{path}'", self.train_error("--weights", path))
        for content, message in (
                ([1, 2], "not a checkpoint"), ({"model": 3}, "not the weights of a torchvision"),
                (models.mobilenet_v3_small().state_dict(), "not the weights of a torchvision"),
                ({"fc.weight": torch.zeros(3, 512)}, "not the weights of a torchvision"),
                (resnet18().state_dict() | {"bn1.bias": torch.full((64,), torch.nan)},
                 "not all of its weights are finite"),
                ({"model": torch.zeros(3)}, "not the weights of a torchvision")):
            torch.save(content, path)
            self.assertIn(f"error: {path}: {message}", self.train_error("--weights", path))
        path.write_bytes(path.read_bytes()[:200])
        self.assertIn("not a checkpoint: damaged", self.train_error("--weights", path))

    def test_networks_that_cannot_be_trained_here(self) -> None:
        for flags, message in (
                (("--arch", "resnet81"), "no classifier 'resnet81' in torchvision.models"),
                (("--student-layer", "layer9"), "no layer 'layer9' in ResNet; did you mean"),
                (("--arch", "vit_b_16"), "vit_b_16 cannot be trained at --size 32 .*Wrong image")):
            self.assertRegex(self.train_error(*flags), message)

    def test_weights_that_cannot_be_downloaded(self) -> None:
        for error in (URLError("no route"), RuntimeError("invalid hash value")):
            with (mock.patch.dict(os.environ, TORCH_HOME=str(self.folder)),
                  mock.patch("torch.hub.download_url_to_file", side_effect=error)):
                message = f"cannot get the weights 'imagenet' .*{error.args[0]}.*give a FILE"
                self.assertRegex(self.train_error("--weights", "imagenet"), message)

    def test_too_little_memory_is_told_in_one_line(self) -> None:
        for full in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0"),
                     RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: "
                                  "can't allocate memory: you tried to allocate 9 bytes")):
            self.assertIn("error: out of memory: use a smaller --batch-size",
                          self.error_of(mock.Mock(side_effect=full)))
        with self.assertRaisesRegex(RuntimeError, "other"):
            evaluate.run_script(mock.Mock(side_effect=RuntimeError("other")))

    def test_a_link_stays_one_to_the_file_written(self) -> None:
        (self.folder / "link").symlink_to("file")
        for content in (b"first", b"second"):
            evaluate.write_file(self.folder / "link", content)
            self.assertTrue((self.folder / "link").is_symlink())
            self.assertEqual((self.folder / "file").read_bytes(), content)

    def test_a_pipe_is_written_to_and_not_replaced(self) -> None:
        os.mkfifo(self.folder / "pipe")
        with ThreadPool(1) as pool:
            read = pool.apply_async((self.folder / "pipe").read_bytes)
            evaluate.write_file(self.folder / "pipe", b"figures")
            self.assertEqual(read.get(10), b"figures")
        self.assertTrue((self.folder / "pipe").is_fifo())
        read, write = os.pipe()
        evaluate.write_file(f"/dev/fd/{write}", b"figures")  # as --json /dev/stdout | ...
        self.assertEqual(os.read(read, 7), b"figures")
        os.close(read)
        os.close(write)

    def test_an_out_folder_that_cannot_be_written(self) -> None:
        (self.folder / "file").write_text("")
        self.assertIn("cannot make the folder", self.train_error("--out", self.folder / "file"))
        with mock.patch("os.replace", side_effect=OSError(28, "No space left on device")):
            self.assertRegex(self.train_error(), r"cannot write .*last\.pt: No space left")
        self.assertEqual(list((self.folder / "out").iterdir()), [])
        (self.folder / "out" / "last.pt").write_bytes(b"")
        with mock.patch.object(Path, "rename", side_effect=OSError(13, "Permission denied")):
            self.assertRegex(self.train_error(), r"cannot rename .*last\.pt: Permission denied")
        self.assertRegex(self.error_of(evaluate.main, self.write_checkpoint(), "--workers", 0,
                                       "--json", self.folder / "file" / "figures.json"),
                         "cannot write .*figures.json")

    def test_a_checkpoint_that_is_missing_or_damaged(self) -> None:
        path = self.folder / "best.pt"
        self.assertIn(f"cannot open the checkpoint {path}: No such file",
                      self.error_of(evaluate.main, path))
        whole = self.write_checkpoint().read_bytes()
        for content in (b"", b"some other file", whole[:1000], whole[:-1000]):
            path.write_bytes(content)
            self.assertIn("not a checkpoint", self.error_of(evaluate.main, path))

    def test_what_cannot_be_predicted_or_exported(self) -> None:
        checkpoint = self.write_checkpoint(exits={"layer2.1": nn.Linear(128, 3).state_dict()})
        (self.folder / "empty").mkdir()
        for flags, message in (
                (("--predict", self.folder / "empty"), "empty has no images in it"),
                (("--export", "network.tf"), "must end in one of .pt2, .onnx, .pth"),
                (("--export", "network.pth", "--exit", "layer2.1"), "an exit is none"),
                (("--export", "network.pth", "--json", "figures.json"), "takes no --json"),
                (("--predict", "cat.jpg", "--data", "images"), "--predict takes no --data"),
                (("--export", "network.pth", "--predict", "a.jpg"), "not allowed with")):
            self.assertIn(message, self.error_of(evaluate.main, checkpoint, *flags))
        with mock.patch.dict(sys.modules, onnx=None):
            self.assertIn("needs the packages onnx and onnxscript", self.error_of(
                evaluate.main, checkpoint, "--export", self.folder / "network.onnx"))

    def test_a_checkpoint_of_another_kind_or_shape(self) -> None:
        torch.save(resnet18().state_dict(), self.folder / "weights.pth")
        self.assertIn("not a checkpoint of train.py: no usable model, arch, classes",
                      self.error_of(evaluate.main, self.folder / "weights.pth"))
        for changes, message in (
                ({"classes": ["circle", "square"]}, "weights of a resnet18 with 2 classes"),
                ({"arch": "no_such_network"}, "weights of a no_such_network"),
                ({"arch": "mobilenet_v3_small"}, "weights of a mobilenet_v3_small"),
                ({"size": "large"}, "no usable size"), ({"args": {}}, "no usable args")):
            self.assertIn(message, self.error_of(evaluate.main, self.write_checkpoint(**changes)))
        self.assertIn("holds no training state", self.train_error(
            "--resume", self.write_checkpoint()))
        self.assertIn("cannot open the checkpoint", self.train_error("--resume"))

    def test_the_data_of_a_checkpoint_gone(self) -> None:
        checkpoint = self.write_checkpoint(data=str(self.folder / "gone"))
        self.assertRegex(self.error_of(evaluate.main, checkpoint),
                         "data folder .*gone does not exist")

    def test_no_file_is_ever_executed(self) -> None:
        class Malicious:
            def __reduce__(self) -> tuple:
                return open, (str(marker), "w")

        marker = self.folder / "executed"
        path = self.folder / "best.pt"
        torch.save({"model": Malicious()}, path)
        self.assertIn("not a checkpoint", self.error_of(evaluate.main, path))
        self.assertIn("not a checkpoint", self.train_error("--weights", path))
        self.assertIn("not a checkpoint", self.train_error("--resume", path))
        self.assertFalse(marker.exists())

    def test_a_torch_too_old_or_missing_is_told_at_the_start(self) -> None:
        for name, content in (("torch", "__version__ = '1.13.0'"), ("torchvision", "")):
            (self.folder / f"{name}.py").write_text(content)
        for script in ("train.py", "evaluate.py"):
            result = subprocess.run([sys.executable, HERE / script], capture_output=True, text=True,
                                    env=os.environ | {"PYTHONPATH": str(self.folder)})
            self.assertEqual(result.returncode, 1)
            self.assertRegex(result.stderr, rf"^\S*{script}: error: .*torch 1\.13\.0 is older.*\n$")


if __name__ == "__main__":
    unittest.main()
