"""Tests of MKDT: every formula against an independent one, every fast path against a naive one, the
inputs that people bring, and the real commands.

    python -m pytest"""

import argparse
import ast
import contextlib
import csv
import functools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

if "MKDT_GPU" not in os.environ:  # bits are equal on CPUs only
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# torch's cache does not tell apart what was compiled for another ATEN_CPU_CAPABILITY, and crashes.
CACHE = f"{tempfile.gettempdir()}/mkdt_tests_{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", CACHE)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn

import data
import eval as evaluation
import mkdt
import models
from data import InputError

torch.set_num_threads(2)
FOLDER = Path(mkdt.__file__).parent


def relative(a, b):
    """Norm of the difference over the norm of b."""
    return float((a - b).norm() / b.norm())


def settings(**changes):
    """All settings with the paper's defaults, changed."""
    args, _ = mkdt.parse([])
    values = mkdt.resolve("cifar10", {})
    usual = {**vars(args), **values, "device": torch.device("cpu"), "compile": False}
    return argparse.Namespace(**{**usual, **changes})


class Steps:
    """Stands in for a Progress: keeps what is reported of a loop of so many steps."""

    def __init__(self, total=0):
        self.first_step = 0
        self.total = total
        self.reported = []

    def __call__(self, step, **values):
        assert step == len(self.reported) + 1
        self.reported.append(values)


def tiny_convnet(out_dim=4, size=8, width=4):
    """A ConvNet of two blocks."""
    return models.ConvNet(out_dim, size, channels=[width, width])


def mse_of(network):
    """loss(x, y), the mean of Eq. 5."""
    return functools.partial(models.mean_loss, models.OBJECTIVES["mse"], network)


def loss_of_theta(network, objective="mse"):
    """loss(theta, x, y), the mean of Eq. 5 or of another objective."""
    f = models.functional(network)

    def loss(theta, x, y):
        return models.mean_loss(models.OBJECTIVES[objective], functools.partial(f, theta), x, y)

    return loss


# ---- Losses and networks -----------------------------------------------------------------------
def test_barlow_twins_loss_is_equation_1():
    """The loss equals Eq. 1 written out element by element."""
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 7, 4, generator=g, dtype=torch.float64)
    expected = 0.0
    for i in range(4):
        for j in range(4):
            a = (z1[:, i] - z1[:, i].mean()) / (z1[:, i].var(correction=0) + 1e-5).sqrt()
            b = (z2[:, j] - z2[:, j].mean()) / (z2[:, j].var(correction=0) + 1e-5).sqrt()
            f = (a * b).sum() / 7
            expected += (1 - f) ** 2 if i == j else 0.3 * f**2
    assert torch.allclose(models.barlow_twins_loss(z1, z2, 0.3), expected, rtol=1e-10)


def test_nt_xent_loss_is_simclrs():
    """The loss equals SimCLR's, view by view."""
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    views = F.normalize(torch.cat([z1, z2]))
    total = 0.0
    for i in range(10):
        similar = views @ views[i] / 0.5
        others = [float(similar[k].exp()) for k in range(10) if k != i]
        total -= float(similar[(i + 5) % 10]) - math.log(sum(others))
    assert float(models.nt_xent_loss(z1, z2, 0.5)) == pytest.approx(total / 10, rel=1e-10)


@pytest.mark.parametrize("size,depth,parameters", [(32, 3, 1348608), (64, 4, 1496448)])
def test_convnet_equals_an_independent_definition(size, depth, parameters):
    """The student is the authors' ConvNet, made of torch's own layers."""
    ours = models.build(lambda: models.ConvNet(512, size, 128), 0, "x")
    layers = []
    channels = 3
    for _ in range(depth):
        layers.append(nn.Conv2d(channels, 128, 3, padding=1))
        layers.append(nn.GroupNorm(128, 128))
        layers.append(nn.ReLU())
        layers.append(nn.AvgPool2d(2))
        channels = 128
    reference = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 512))
    for block in range(depth):
        reference[4 * block].load_state_dict(ours.convs[block].state_dict())
        torch.nn.init.normal_(ours.norms[block].weight)
        torch.nn.init.normal_(ours.norms[block].bias)
        reference[4 * block + 1].load_state_dict(ours.norms[block].state_dict())
    reference[-1].load_state_dict(ours.head.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == parameters
    x = torch.randn(3, 3, size, size)
    assert ours.features(x).shape == (3, 2048)
    assert torch.allclose(ours(x), reference(x), atol=1e-5)
    assert torch.equal(models.functional(ours)(models.flat_parameters(ours), x), ours(x))


@pytest.mark.parametrize("size,channels", [(32, [128, 256, 512]), (64, [64, 128, 256, 512])])
def test_convnet_bn_is_lee_et_als(size, channels):
    """KRR-ST's network: these channels, batch norm after each convolution, a linear layer."""
    net = models.encoder("convnet_bn", 7, size)
    assert [conv.out_channels for conv in net.convs] == channels
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in net.norms)
    x = torch.randn(2, 3, size, size)
    by_hand = x
    for conv, norm in zip(net.eval().convs, net.norms):
        by_hand = F.avg_pool2d(norm(conv(by_hand)).relu(), 2)
    assert torch.allclose(net.features(x), by_hand.flatten(1), atol=1e-5)
    assert net(x).shape == (2, 7) and net.head.in_features == 512 * 16


def test_resnets_are_torchvisions_with_another_stem():
    """The teacher equals torchvision's ResNet-18, but for the stem, weight by weight."""
    ours = models.encoder("resnet18", None, 32).eval()
    theirs = torchvision.models.resnet18()
    theirs.conv1 = ours.conv
    theirs.maxpool = nn.Identity()
    theirs.fc = nn.Identity()
    blocks = nn.Sequential(theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    weights = zip(blocks.state_dict(), ours.layers.state_dict().values())
    blocks.load_state_dict(dict(weights))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours.features(x), theirs.eval()(x), atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == 11_168_832
    assert ours.features(torch.randn(1, 3, 64, 64)).shape == (1, 2048)  # 4x4 windows


@pytest.mark.parametrize("size", [8, 9, 24, 31, 57, 60, 63, 64, 89, 113, 127])
def test_encoders_take_any_image_size_from_8_pixels_up(size):
    """The head fits the features at every size, with and without max-pooling."""
    x = torch.randn(2, 3, size, size)
    for name in ("convnet:4", "convnet_bn:4", "resnet10:4"):
        assert models.encoder(name, 7, size)(x).shape == (2, 7), name
    for max_pool in (False, True):
        net = models.ENCODERS["resnet18"](None, size, 4, max_pool)
        assert net(x).shape == (2, net.feature_dim)


SHORTCUT = """
import sys, torch
sys.path.insert(0, {folder!r})
import models
torch.manual_seed(0)
for width in (4, 8, 12):
    for side in (46, 96):
        block = models.ResNet([1, 1], width=width).layers[1].downsample[:2]
        block.to(memory_format=torch.channels_last)
        exact = torch.nn.Conv2d(width, 2 * width, 1, 2, bias=False).double()
        exact.weight.data = block[1].weight.data.double()
        x = torch.randn(32, width, side, side).contiguous(memory_format=torch.channels_last)
        for _ in range(3):
            block.zero_grad()
            block(x).square().sum().backward()
        exact(x.double()).square().sum().backward()
        error = (block[1].weight.grad - exact.weight.grad).norm() / exact.weight.grad.norm()
        assert error < 1e-5, (width, side, error)
print("exact")
"""


def test_the_shortcuts_gradient_corrupts_no_memory():
    """In a process of its own, with glibc's heap checks: oneDNN's gradient of a strided 1x1
    convolution writes past its memory, and the shortcut must not use it."""
    environment = {**os.environ, "MALLOC_CHECK_": "3"}
    if (
        shutil.which("ldconfig")
        and "libc_malloc_debug"
        in subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    ):
        environment["LD_PRELOAD"] = "libc_malloc_debug.so.0"
    script = SHORTCUT.format(folder=str(FOLDER))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "exact" in done.stdout, done.stderr


def test_torchvisions_networks_are_encoders():
    """The last linear layer is the head, its input the features; what cannot be is refused."""
    for name, d in (("squeezenet1_0", None), ("mobilenet_v3_small", 1024), ("resnet18", 512)):
        if d is None:
            with pytest.raises(InputError, match="torchvision:squeezenet1_0 cannot take"):
                models.encoder(f"torchvision:{name}", 5, 32)
            continue
        net = models.encoder(f"torchvision:{name}", 5, 32).eval()
        x = torch.randn(2, 3, 32, 32)
        assert net.features(x).shape == (2, d) and net(x).shape == (2, 5)
        assert torch.allclose(net(x), net.head(net.features(x)))
    for name, size in (("vit_b_16", 32), ("nothing", 32)):
        with pytest.raises(InputError, match=f"torchvision:{name} cannot take 32 pixels"):
            models.encoder(f"torchvision:{name}", 5, size)


def test_networks_that_cannot_work_are_refused_with_the_reason():
    """An unknown name or width; batch norm and dropout, which are not in theta."""
    for name in ("vgg", "convnet:0", "convnet:x", "torchvision:", "resnet18:-1"):
        with pytest.raises(InputError, match="unknown encoder"):
            models.encoder(name, 4, 32)
    for net in (models.encoder("resnet10:8", 4, 32), nn.Sequential(nn.Dropout())):
        with pytest.raises(InputError, match="batch norm or dropout"):
            models.functional(net)


def test_flat_parameters_round_trip():
    """theta of one network makes another compute the same."""
    a = models.build(tiny_convnet, 0, "a")
    b = models.build(tiny_convnet, 0, "b")
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(models.flat_parameters(a), models.flat_parameters(b))
    f = models.functional(b)
    assert torch.allclose(f(models.flat_parameters(a), x), a(x), atol=1e-6)


def test_streams_do_not_depend_on_what_was_drawn():
    """A draw is fixed by its name alone, and names do not collide."""
    a = models.build(lambda: nn.Linear(3, 3), 0, "x", 1).weight
    torch.rand(5)
    assert torch.equal(a, models.build(lambda: nn.Linear(3, 3), 0, "x", 1).weight)
    seeds = set()
    for seed in (0, 1):
        for name in ("x", "y"):
            for i in (0, 1):
                seeds.add(models.stream(seed, name, i).initial_seed())
    assert len(seeds) == 8


def test_without_a_compiler_the_function_runs_as_it_is(capsys, monkeypatch):
    """A failure of the compiler is said once; an error of the function itself is not swallowed."""

    def broken_compiler(f, **options):
        def call(*arguments):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken_compiler)
    f = models.Compiled(lambda x: 2 * x)
    assert f(torch.ones(2)).tolist() == [2, 2] == f(torch.ones(2)).tolist()
    assert capsys.readouterr().out.count("no C++ compiler") == 1

    def out_of_memory(f, **options):
        def call(*arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

        return call

    monkeypatch.setattr(torch, "compile", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        models.Compiled(lambda x: 2 * x)(torch.ones(2))


def test_only_the_first_shapes_are_compiled(monkeypatch):
    """With max_shapes=2 a third shape runs as it is."""
    seen = []

    def spy(f, **options):
        def call(x):
            seen.append(len(x))
            return f(x)

        return call

    monkeypatch.setattr(torch, "compile", spy)
    f = models.Compiled(lambda x: 2 * x, max_shapes=2)
    sums = [f(torch.ones(n)).sum().item() for n in (3, 2, 3, 1, 2)]
    assert sums == [6, 4, 6, 2, 4] and seen == [3, 2, 3, 2]


# ---- Augmentation ------------------------------------------------------------------------------
@pytest.fixture
def pictures():
    """24 random pictures [24, 3, 32, 32] in [0, 1]."""
    return torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_resized_crop_equals_torchvision(pictures):
    """The batched crop equals torchvision's, image by image."""
    g = torch.Generator().manual_seed(1)
    box = data.random_crops(24, 32, (0.08, 1.0), g)
    flip = torch.rand(24, generator=g) < 0.5
    ours = data.resized_crop(pictures, box, 32, flip)
    for i, (top, left, height, width) in enumerate(torch.stack(box, 1).int().tolist()):
        assert 0 <= top and top + height <= 32 and 0 <= left and left + width <= 32
        theirs = TF.resized_crop(pictures[i], top, left, height, width, [32, 32], antialias=True)
        if flip[i]:
            theirs = TF.hflip(theirs)
        assert torch.allclose(ours[i], theirs, atol=1e-5)


@pytest.mark.parametrize(
    "name,low,high",
    [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.5, 0.5),
    ],
)
def test_colour_operations_equal_torchvision(pictures, name, low, high):
    """Each jitter equals torchvision's, image by image."""
    pictures[0] = 0.5  # grey: hue is undefined
    pictures[1, :, :16] = pictures[1, :1, :16]
    amount = torch.linspace(low, high, 24)
    given = 4 * amount if name == "hue" else amount - 1
    ours = data.jitter(name, pictures, given.view(-1, 1, 1, 1))
    for i in range(24):
        theirs = getattr(TF, f"adjust_{name}")(pictures[i], float(amount[i]))
        assert torch.allclose(ours[i], theirs, atol=2e-5)


def test_augmentations_are_drawn_as_a_1_says():
    """The distribution of the draws: crops, flips, jitter and grey have the recipe's strength."""
    for augmentation in data.draw_augmentations(4000, 32, 0, "cpu", (0.08, 1.0), 0.2):
        draw = argparse.Namespace(**augmentation.keywords)
        _, _, height, width = draw.box
        area = height * width / 32**2
        assert area.min() < 0.12 and area.max() > 0.9 and 0.45 < area.mean() < 0.58
        ratio = (width / height).log()
        assert -0.45 < ratio.min() < -0.25 and 0.25 < ratio.max() < 0.45
        assert 0.46 < draw.flip.float().mean() < 0.54
        assert 0.17 < draw.grey.float().mean() < 0.23
        amounts = draw.amounts.flatten(1)
        assert amounts.shape == (4, 4000)
        for amount in amounts:
            assert 0.39 < amount.max() <= 0.4 and -0.4 <= amount.min() < -0.39
            assert 0.17 < (amount == 0).float().mean() < 0.23
            assert 0.19 < amount.std() < 0.22
        assert sorted(draw.order) == ["brightness", "contrast", "hue", "saturation"]


def test_an_augmentation_does_what_was_drawn(pictures):
    """Crop and flip, the jitters in their order, then grey."""
    augmentation, other = data.draw_augmentations(24, 32, 3, "cpu", (0.2, 1.0), 0.3)
    draw = argparse.Namespace(**augmentation.keywords)
    expected = data.resized_crop(pictures, draw.box, 32, draw.flip)
    for name, amount in zip(draw.order, draw.amounts):
        expected = data.jitter(name, expected, amount)
    is_grey = draw.grey.flatten()
    expected[is_grey] = TF.rgb_to_grayscale(expected[is_grey], 3)
    assert 0 < is_grey.sum() < 24 and torch.equal(augmentation(pictures), expected)
    assert not torch.allclose(other(pictures), expected, atol=0.1)


def test_two_views_are_independent_and_reproducible(pictures):
    """The seed fixes both views; they differ, and so do the images of a batch."""
    images = (pictures * 255).byte()
    a, b = data.two_views(images, 7)
    assert a.shape == images.shape and a.min() >= 0 and a.max() <= 1 and not torch.equal(a, b)
    assert torch.equal(a, data.two_views(images, 7)[0])
    assert not torch.equal(a, data.two_views(images, 8)[0])
    same = data.two_views(images[:1].expand(24, -1, -1, -1), 7)[0]
    assert len({tuple(x.flatten().tolist()) for x in same}) == 24
    for wrong in (pictures, images[..., :16], images[:, :1]):
        with pytest.raises(ValueError, match="square uint8"):
            data.two_views(wrong, 0)


def test_projections_are_of_the_two_views(tmp_path):
    """z1 and z2 of Eq. 1 are the network's outputs for the two different views, as one batch."""
    dataset = tiny_data(tmp_path)
    s = settings(crop_scale=0.3, grey=0.5)
    sizes = []

    def network(x):
        sizes.append(len(x))
        return x.flatten(1)

    z1, z2 = models.two_projections(network, dataset.train_images[:6], dataset, s, (0, "views", 1))
    seed = models.stream(0, "views", 1).initial_seed()
    first, second = data.two_views(dataset.train_images[:6], seed, (0.3, 1.0), 0.5)
    assert torch.allclose(z1, dataset.normalize(first).flatten(1))
    assert torch.allclose(z2, dataset.normalize(second).flatten(1))
    assert sizes == [12] and not torch.allclose(z1, z2, atol=0.1)


def test_shift_and_flip_by_hand():
    """Each image is one of the 81 windows of its padded self, or the mirror image of one."""
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6) + 1
    padded = F.pad(images, [4, 4, 4, 4])
    flipped = 0
    for seed in range(20):
        moved = data.shift_and_flip(images, seed)
        for i in range(2):
            windows = []
            for top in range(9):
                for left in range(9):
                    windows.append(padded[i, :, top : top + 6, left : left + 6])
            as_it_is = any(torch.allclose(moved[i], w, atol=1e-4) for w in windows)
            mirrored = any(torch.allclose(moved[i], w.flip(-1), atol=1e-4) for w in windows)
            assert as_it_is or mirrored
            flipped += mirrored and not as_it_is
    assert 8 < flipped < 32


# ---- Files and progress ------------------------------------------------------------------------
def test_files_are_whole_or_absent(tmp_path):
    """A failed write leaves the old file, and the message says the system's reason."""
    data.save(tmp_path / "a.pt", {"x": torch.arange(1000.0)})
    with pytest.raises(InputError, match="cannot write .*a.pt.*No space left"):
        with data.whole_file(tmp_path / "a.pt") as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert data.load(tmp_path / "a.pt")["x"][-1] == 999
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="b.pt is damaged, or not a torch file"):
        data.load(tmp_path / "b.pt")
    with pytest.raises(InputError, match="cannot write"):
        data.save(tmp_path / "a.pt" / "below.pt", 1)


def test_a_full_disk_is_called_one(tmp_path, monkeypatch):
    """The system's own reason stands in the message, not that of torch's writer."""

    def full(path, mode):
        return open("/dev/full", mode)

    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    monkeypatch.setattr(data, "open", full, raising=False)
    with pytest.raises(InputError, match="a.pt: .*No space left"):
        data.save(tmp_path / "a.pt", torch.zeros(100_000))


class Hostile:
    """Pickles to a call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_hostile_file_does_not_run(tmp_path):
    """A torch file with a call in it is refused, and the call is not made."""
    torch.save({"x": Hostile(Path.touch, tmp_path / "ran")}, tmp_path / "hostile.pt")
    with pytest.raises(InputError, match="hostile.pt"):
        data.load(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


def test_a_checksum_tells_contents_apart():
    """Equal contents have equal checksums, whatever their memory layout."""
    a = torch.arange(12.0).view(3, 4)
    assert data.checksum(a) == data.checksum(a.T.contiguous().T)
    others = [data.checksum(a + 1), data.checksum("a"), data.checksum(None), data.checksum(1, 2)]
    assert len({data.checksum(a), *others}) == 5


def test_the_speed_is_that_of_the_last_interval(monkeypatch, capsys):
    """The first step, which may compile, does not count; nor does what was before the last line."""
    clock = [0.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: clock[0])
    progress = data.Progress("distill", 100, data.Log(seconds=10))
    for step, seconds in ((1, 500), (2, 5), (3, 5), (4, 1), (5, 9)):
        clock[0] += seconds
        progress(step, loss=torch.tensor(2.0 * step))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "min left" not in lines[0]
    assert "0.2/s  8.1 min left" in lines[1] and "loss 5" in lines[1]  # the mean of 4 and 6
    assert "0.2/s  7.9 min left" in lines[2] and "loss 9" in lines[2]


def test_progress_refuses_what_is_not_finite_before_it_saves(tmp_path):
    """NaN stops the loop with the advice; the checkpoint is that of the step before."""
    weights = torch.zeros(3)
    path = tmp_path / "c.pt"
    progress = data.Progress(
        "teacher", 9, data.Log(minutes=0), path, "Lower --teacher-lr.", weights=weights
    )
    progress(1, loss=torch.tensor(1.0))
    weights += 7
    with pytest.raises(data.Diverged, match="loss became nan by step 2. Lower --teacher-lr."):
        progress(2, loss=torch.tensor(math.nan))
    assert data.load(path)["step"] == 1 and data.load(path)["weights"].sum() == 0
    with pytest.raises(data.Diverged, match="lr became -0.1"):
        data.Progress("distill", 9, data.Log())(1, lr=torch.tensor(-0.1))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    """Another size, or another number of processes: one line that says so."""
    path = tmp_path / "c.pt"
    data.save(path, {"step": 1, "ranks": 1, "weights": torch.zeros(3)})
    with pytest.raises(InputError, match="c.pt does not fit this run"):
        data.Progress("teacher", 9, data.Log(), path, weights=torch.zeros(4))
    data.save(path, {"step": 1, "ranks": 2, "weights": torch.zeros(3)})
    with pytest.raises(InputError, match="ranks 2 -> 1"):
        data.Progress("teacher", 9, data.Log(), path, weights=torch.zeros(3))


# ---- Data sets ---------------------------------------------------------------------------------
def test_shapes_is_deterministic_and_balanced():
    """The same images from the same seed; equal numbers; brightness does not give a form away."""
    images, labels = data.draw_shapes(300, 32, np.random.default_rng(0))
    again, _ = data.draw_shapes(300, 32, np.random.default_rng(0))
    other, _ = data.draw_shapes(300, 32, np.random.default_rng(1))
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert np.bincount(labels).tolist() == [30] * 10
    means = [images[labels == k].mean() for k in range(10)]
    assert max(means) - min(means) < 40


def picture(path, size=(40, 30), seed=0, **options):
    """A random RGB picture; the suffix of `path` is its format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root, classes=("cat", "dog", "fox"), train=6, test=2):
    """train/<class>/*.png and test/<class>/*.png; without classes train/*.png."""
    for split, count in (("train", train), ("test", test)):
        for name in classes or ("",):
            for i in range(count):
                picture(root / split / name / f"{i:03d}.png", seed=i)
    return root


def arrays(n=120, m=30, size=32, classes=3):
    """The four arrays of an .npz."""
    rng = np.random.default_rng(0)
    return {
        "train_images": rng.integers(0, 256, (n, size, size, 3), np.uint8),
        "train_labels": np.arange(n) % classes,
        "test_images": rng.integers(0, 256, (m, size, size, 3), np.uint8),
        "test_labels": np.arange(m) % classes,
    }


def opened(tmp_path, **changes):
    """The Dataset of an .npz with these arrays."""
    np.savez(tmp_path / "x.npz", **{**arrays(), **changes})
    return data.load_dataset(str(tmp_path / "x.npz"), tmp_path)


def tiny_data(tmp_path, n=24, size=16):
    """A small labelled Dataset of shapes."""
    images, labels = data.draw_shapes(n + 10, size, np.random.default_rng(0))
    np.savez(
        tmp_path / "tiny.npz",
        train_images=images[:n],
        train_labels=labels[:n],
        test_images=images[n:],
        test_labels=labels[n:],
    )
    return data.load_dataset(str(tmp_path / "tiny.npz"))


def test_a_folder_is_read_sorted_squashed_and_summed_up(tmp_path, capsys):
    """Sorted by class and name, squashed with Lanczos, normalised by its own statistics."""
    root = make_folder(tmp_path / "pets")
    Image.new("L", (5, 5), 9).save(root / "train/cat/0000.png")  # sorted between 0 and 1
    d = data.load_dataset(str(root), tmp_path / "cache")
    said = "pets: 19 training images of 3 classes (cat 7, dog 6, fox 6), 6 test images, 32 pixels"
    assert capsys.readouterr().out == said + "\n"
    assert d.name == "pets" and d.train_labels.tolist() == [0] * 7 + [1] * 6 + [2] * 6
    assert d.labelled and d.classes == 3 and (d.train_images[1] == 9).all()
    with Image.open(root / "test/fox/001.png") as image:
        expected = np.array(image.resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(d.test_images[-1].permute(1, 2, 0).numpy(), expected)
    x = d.normalize(d.train_images)
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    assert data.load_dataset(str(root), tmp_path / "cache", image_size=64).image_size == 64
    again = data.load_dataset(f"{root}/", tmp_path / "cache")
    assert again.images_id == d.images_id and again.id == d.id and again.name == "pets"


def test_pictures_are_read_as_people_see_them(tmp_path):
    """Names in any script; transparency over white, CMYK, 16-bit grey, EXIF orientation, a GIF."""
    root = tmp_path / "odd ünïcode 图/train"
    root.mkdir(parents=True)
    Image.new("RGBA", (3, 5), (255, 0, 0, 0)).save(root / "a.png")
    Image.new("CMYK", (64, 64)).save(root / "b.jpg")
    Image.fromarray(np.full((4, 4), 257 * 99, np.uint16)).save(root / "c.png")
    half = np.zeros((30, 40, 3), np.uint8)
    half[:15] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    Image.fromarray(half).save(root / "d.jpg", exif=exif)
    Image.new("P", (4, 4)).save(root / "e.gif")
    d = data.load_dataset(str(root.parent), tmp_path)
    means = d.train_images.float().mean(dim=(1, 2, 3))
    assert means[0] == 255 and means[1] == 255 and means[2] == 99 and means[4] == 0
    turned = d.train_images[3].float()
    assert turned[..., -8:].mean() > 250 and turned[..., :8].mean() < 5
    Image.fromarray(np.ones((4, 4), np.float32)).save(root / "f.tif")
    with pytest.raises(InputError, match="f.tif .mode F"):
        data.load_dataset(str(root.parent), tmp_path)


def test_what_the_system_hides_is_no_class_and_no_image(tmp_path, capsys):
    """Hidden files and folders change nothing, not a bit."""
    clean = data.load_dataset(str(make_folder(tmp_path / "clean")), tmp_path)
    root = make_folder(tmp_path / "hidden")
    for name in (".ipynb_checkpoints/0.png", "__MACOSX/0.png", "@eaDir/0.png", "cat/._0.png"):
        picture(root / "train" / name)
    (root / "train/.DS_Store").write_bytes(b"x")
    d = data.load_dataset(str(root), tmp_path)
    assert d.classes == 3 and d.id == clean.id
    assert "left out" not in capsys.readouterr().out


def test_what_is_left_out_is_said(tmp_path, capsys):
    """Text files, loose files, a val/ without test/, classes without test images."""
    root = make_folder(tmp_path / "pets", test=0)
    (root / "train/cat/notes.txt").write_text("a cat")
    picture(root / "train/loose.png")
    picture(root / "train/dog/g.gif")
    (root / "val").mkdir()
    d = data.load_dataset(str(root), tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "cat 6, dog 7, fox 6" in said and len(d.train_images) == 19
    assert "1 files that are not images (.txt)" in said and "1 files that lie in no class" in said
    assert "val/ is not read: call it test/" in said and not d.labelled
    picture(root / "test/cat/0.png")
    data.load_dataset(str(root), tmp_path)
    assert "not in the test split: dog, fox" in " ".join(capsys.readouterr().out.split())


def test_a_class_of_test_images_alone_is_an_error(tmp_path):
    """No probe can get it right."""
    root = make_folder(tmp_path / "pets")
    picture(root / "test/wolf/0.png")
    with pytest.raises(InputError, match="no training images of the test classes wolf"):
        data.load_dataset(str(root), tmp_path)


def test_a_label_split_may_lack_a_class(tmp_path):
    """Where training images are unlabelled, they may be of the test classes without a label."""
    labels = np.where(np.arange(120) % 3 == 1, -1, arrays()["train_labels"])
    d = opened(tmp_path, train_labels=labels)
    assert d.train_labels.unique().tolist() == [-1, 0, 2] and d.classes == 3
    assert d.test_labels.unique().tolist() == [0, 1, 2] and d.labelled
    net = models.build(lambda: models.ConvNet(4, 32, 4), 0, "a").eval()
    (score,) = evaluation.linear_scores(net, d, [100], 0)
    assert score <= 100 * 2 / 3  # the class without a label is never predicted


def test_one_class_counts_as_unlabelled(tmp_path, capsys):
    """A level too many looks like one class: it is not probed, and said."""
    make_folder(tmp_path / "x", train=2)
    for split in ("train", "test"):
        (tmp_path / "deep" / split).mkdir(parents=True)
        (tmp_path / "x" / split).rename(tmp_path / "deep" / split / "images")
    d = data.load_dataset(str(tmp_path / "deep"), tmp_path)
    assert not d.labelled
    said = " ".join(capsys.readouterr().out.split())
    assert "of at most one class, so unlabelled" in said


def test_all_broken_images_are_named_at_once(tmp_path):
    """Truncated files, a dead link and a picture that is none."""
    root = make_folder(tmp_path / "pets")
    for i in range(3):
        path = root / f"train/dog/{i:03d}.png"
        path.write_bytes(path.read_bytes()[:200])
    (root / "train/cat/001.png").write_bytes(b"\x89PNG broken")
    (root / "train/cat/link.png").symlink_to(root / "nowhere.png")
    with pytest.raises(InputError, match="repair or remove 5 images") as error:
        data.load_dataset(str(root), tmp_path)
    for name in ("dog/000.png", "dog/001.png", "dog/002.png", "cat/001.png", "cat/link.png"):
        assert name in str(error.value)


def test_a_named_cache_is_used_with_the_authors_constants(tmp_path):
    """data/cifar10.npz is taken as it is; a part of it is drawn at random, over all classes."""
    images = np.full((100, 32, 32, 3), 255, np.uint8)
    images[50:] = 0
    labels = np.arange(100) // 10
    np.savez(
        tmp_path / "cifar10.npz",
        train_images=images,
        test_images=images,
        train_labels=labels,
        test_labels=labels,
    )
    d = data.load_dataset("cifar10", tmp_path, train_images=60)
    expected = torch.tensor([(1 - 0.4914) / 0.2023, (1 - 0.4822) / 0.1994, (1 - 0.4465) / 0.2010])
    x = d.normalize(d.train_images)
    assert len(x) == 60 and torch.allclose(x[0, :, 0, 0], expected)
    assert torch.allclose(d.denormalize(x)[0], torch.ones(1), atol=1e-6)
    assert d.train_labels.unique().tolist() == list(range(10))
    again = data.load_dataset("cifar10", tmp_path, train_images=60)
    assert torch.equal(d.train_labels, again.train_labels)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(train_images=np.zeros((4, 32, 32, 3), np.float32)), "uint8"),
        (dict(train_images=np.zeros((4, 3, 32, 32), np.uint8)), "uint8"),
        (dict(train_labels=np.zeros(3, int)), "integers"),
        (dict(train_labels=np.zeros(120)), "integers"),
        (dict(test_images=np.zeros((30, 16, 16, 3), np.uint8)), "of one size"),
        (dict(train_images=np.zeros((120, 32, 32, 3), np.uint8)), "not all of one colour"),
        (arrays(size=7), "of 7 pixels"),
        (arrays(n=1), "x.npz: 1 training images"),
    ],
)
def test_an_npz_is_checked(tmp_path, change, message):
    """What cannot be used is refused with the reason."""
    with pytest.raises(InputError, match=message):
        opened(tmp_path, **change)


def test_the_kinds_of_npz_that_people_have(tmp_path, capsys):
    """MedMNIST's labels [N, 1], MNIST's grey images, identity numbers, arrays of objects."""
    usual = opened(tmp_path)
    names = np.array(["cat", "dog", "fox"], object)
    assert opened(tmp_path, class_names=names).id == usual.id
    medical = opened(tmp_path, train_labels=arrays()["train_labels"].astype(np.uint8)[:, None])
    assert medical.id == usual.id
    numbers = {
        key: arrays()[key] * 7_000_000 + 10_000_001 for key in ("train_labels", "test_labels")
    }
    assert opened(tmp_path, **numbers).classes == 3 and opened(tmp_path, **numbers).id == usual.id
    grey = {key: value[:, :28, :28, 0] for key, value in arrays().items() if "images" in key}
    d = opened(tmp_path, **grey)
    assert d.image_size == 28 and torch.equal(d.train_images[:, 0], d.train_images[:, 2])
    assert opened(tmp_path, **{k: v[..., None] for k, v in grey.items()}).id == d.id
    labels = np.where(np.arange(120) < 40, arrays()["train_labels"], -1)
    capsys.readouterr()
    partly = opened(tmp_path, train_labels=labels)
    assert partly.labelled and "80 of them unlabelled" in capsys.readouterr().out
    assert len(evaluation.labelled_subset(partly, 5, 0)) == 2
    assert (partly.train_labels[evaluation.labelled_subset(partly, 100, 0)] >= 0).all()


def test_reading_takes_little_memory(tmp_path):
    """An .npz is opened in not much more than its own size."""
    np.savez(
        tmp_path / "big.npz",
        train_images=np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), np.uint8),
    )
    script = (
        "import resource, sys; sys.path.insert(0, sys.argv[1]); import data; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "before = peak(); data.load_dataset(sys.argv[2]); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(FOLDER), str(tmp_path / "big.npz")],
        capture_output=True,
        text=True,
        check=True,
    )
    taken = int(done.stdout.split()[-1]) / 1024  # MiB
    assert taken < 1.4 * 20_000 * 32 * 32 * 3 / 2**20, taken


def test_what_cannot_be_a_data_set_is_named(tmp_path):
    """A file that is no .npz, none at all, a folder without train/, a size beyond all memory."""
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "pets")
    for name, message in (
        ("bad.npz", "bad.npz: no .npz with train_images"),
        ("none.npz", "none.npz: no .npz with"),
        ("empty", "no images in train/"),
        ("nothing", "unknown data set"),
    ):
        with pytest.raises(InputError, match=message):
            data.load_dataset(str(tmp_path / name), tmp_path)
    with pytest.raises((InputError, MemoryError)):
        data.load_dataset(str(tmp_path / "pets"), tmp_path, image_size=1_000_000)


RED, GREEN, BLUE = (254, 0, 0), (0, 255, 1), (0, 0, 254)
# The official folders: pictures (by colour) and lists, of classes 0 and 1 (train) and 1 (test).
LAYOUTS = {
    "tinyimagenet": (
        "tinyimagenet/tiny-imagenet-200",
        {
            "train/n01/images/n01_0.JPEG": RED,
            "train/n02/images/n02_0.JPEG": GREEN,
            "val/images/val_0.JPEG": BLUE,
            "val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t62\t62\n",
        },
    ),
    "aircraft": (
        "fgvc-aircraft-2013b",
        {
            "data/images/1.jpg": RED,
            "data/images/2.jpg": GREEN,
            "data/images/3.jpg": BLUE,
            "data/variants.txt": "707-320\nA 300\n",
            "data/images_variant_trainval.txt": "1 707-320\n2 A 300\n",
            "data/images_variant_test.txt": "3 A 300\n",
        },
    ),
    "cub2011": (
        "cub2011/CUB_200_2011",
        {
            "images/001.A/a.jpg": RED,
            "images/002.B/b.jpg": BLUE,
            "images/002.B/c.jpg": GREEN,
            "images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n3 002.B/c.jpg\n",
            "image_class_labels.txt": "1 1\n2 2\n3 2\n",
            "train_test_split.txt": "1 1\n2 0\n3 1\n",
        },
    ),
    "dogs": (
        "dogs",
        {
            "Images/n01-A/a.jpg": RED,
            "Images/n02-B/b.jpg": GREEN,
            "Images/n02-B/c.jpg": BLUE,
            "train_list.mat": {
                "file_list": np.array([["n01-A/a.jpg"], ["n02-B/b.jpg"]], object),
                "labels": [[1], [2]],
            },
            "test_list.mat": {
                "file_list": np.array([["n02-B/c.jpg"]] * 2, object),
                "labels": [[2], [2]],
            },
        },
    ),
    "cars": (
        "stanford_cars",
        {  # cars_train twice, as often found
            "cars_train/cars_train/1.jpg": RED,
            "cars_train/cars_train/2.jpg": GREEN,
            "cars_test/cars_test/2.jpg": BLUE,
            "devkit/cars_train_annos.mat": {
                "annotations": [{"class": 1, "fname": "1.jpg"}, {"class": 2, "fname": "2.jpg"}]
            },
            "cars_test_annos_withlabels.mat": {"annotations": [{"class": 2, "fname": "2.jpg"}] * 2},
        },
    ),
    "flowers": (
        "flowers-102",
        {
            "jpg/image_00001.jpg": RED,
            "jpg/image_00002.jpg": GREEN,
            "jpg/image_00003.jpg": BLUE,
            "imagelabels.mat": {"labels": [[1, 2, 2]]},
            "setid.mat": {"trnid": [[1, 2]], "valid": [[1, 2]], "tstid": [[3, 3]]},
        },
    ),
}


def write_layout(root, files):
    """Makes the files of LAYOUTS below `root`; skips the test if scipy is needed and not there."""
    for file, content in files.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (40, 30), content).save(path)
        elif isinstance(content, dict):
            pytest.importorskip("scipy.io").savemat(path, content)
        else:
            path.write_text(content)


def check_colours(dataset):
    """Red and green, of classes 0 and 1, to train on; blue, of class 1, to test on."""
    assert dataset.train_labels.tolist() == [0, 1] and set(dataset.test_labels.tolist()) == {1}
    images = [*dataset.train_images, *dataset.test_images]
    for image, colour in zip(images, (RED, GREEN, BLUE)):
        assert (image.float().mean(dim=(1, 2)) - torch.tensor(colour)).abs().max() < 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_folders(tmp_path, name, monkeypatch):
    """Each unpacked data set is read with its official labels and split, and cached."""
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_check_integrity", lambda self: True)
    folder, files = LAYOUTS[name]
    write_layout(tmp_path / folder, files)
    d = data.load_dataset(name, tmp_path)
    assert d.image_size == (64 if name == "tinyimagenet" else 32)
    check_colours(d)
    assert (tmp_path / f"{name}.npz").exists()
    assert data.load_dataset(name, tmp_path, 48).image_size == 48


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_batches(tmp_path, name, monkeypatch):
    """The pickled batches of CIFAR: pixels channel by channel, fine labels for CIFAR-100."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    make = getattr(torchvision.datasets, name.upper())
    key = "labels" if name == "cifar10" else "fine_labels"
    root = tmp_path / make.base_folder
    root.mkdir(parents=True)
    names = {"label_names": ["a", "b"], "fine_label_names": ["a", "b"]}
    (root / make.meta["filename"]).write_bytes(pickle.dumps(names))
    for number, (file, _) in enumerate(make.train_list + make.test_list):
        colours, labels = [], []
        if number == 0:
            colours, labels = [RED, GREEN], [0, 1]
        elif file == make.test_list[0][0]:
            colours, labels = [BLUE], [1]
        pixels = np.array(colours, np.uint8).reshape(-1, 3, 1).repeat(1024, axis=2)
        batch = {"data": pixels.reshape(-1, 3072), key: labels}
        (root / file).write_bytes(pickle.dumps(batch))
    check_colours(data.load_dataset(name, tmp_path))


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    """Without a network: which places are looked at, and nothing half made is left."""

    def offline(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name, place in (
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cars", "stanford_cars/devkit"),
        ("tinyimagenet", "tinyimagenet/tiny-imagenet-200.zip"),
    ):
        with pytest.raises(InputError, match=f"cannot read {name}.*{place}.*README"):
            data.load_dataset(name, tmp_path)
    assert not list(tmp_path.glob("*.npz"))


def test_a_folder_called_like_an_official_data_set_is_said(tmp_path, monkeypatch, capsys):
    """`flowers` is the official one; the message tells how to name the folder."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "shapes")
    assert data.load_dataset("shapes", "cache").classes == 10
    assert "give ./shapes" in capsys.readouterr().out
    assert data.load_dataset("./shapes", "cache").classes == 3


# ---- Teacher and experts -----------------------------------------------------------------------
def test_warmup_cosine():
    """Ten per cent of warm-up (ten epochs of long runs), then a cosine to a thousandth."""
    rate = [models.warmup_cosine(step, 100, 2, 1.0) for step in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9] == rate[10] == pytest.approx(1)
    assert rate[55] == pytest.approx(1e-3 + 0.999 / 2) and 1e-3 < rate[99] < 2e-3
    assert models.warmup_cosine(0, 10**6, 100, 1.0) == pytest.approx(1e-3)
    assert models.SSL["simclr"].schedule(7, 100, 2, 0.3) == 0.3


class Killed(Exception):
    """What stops a loop in the tests below, as a kill would."""


class KilledAt:
    """A Progress that is killed after `stop` steps."""

    def __init__(self, progress, stop):
        self.progress = progress
        self.stop = stop
        self.first_step = progress.first_step
        self.total = progress.total

    def __call__(self, step, **values):
        self.progress(step, **values)
        if step == self.stop:
            raise Killed


@pytest.mark.parametrize("ssl", ["barlow", "simclr"])
def test_a_teacher_resumes_bit_for_bit(tmp_path, ssl):
    """Killed after five of nine steps and started again, it ends at the same weights."""
    dataset = tiny_data(tmp_path)
    s = settings(ssl=ssl, teacher_epochs=3, teacher_batch=8, teacher_lr=1e-2)

    def learn(name, stop=None):
        encoder = models.build(lambda: models.encoder("resnet18:8", None, 16), 0, "teacher")
        head = models.build(lambda: models.SSL[ssl].projector(encoder.feature_dim), 0, "head")
        model = nn.Sequential(encoder, head)
        optimizer = torch.optim.Adam(model.parameters(), s.teacher_lr, weight_decay=1e-6)
        progress = data.Progress(
            "teacher", 9, data.Log(minutes=0), tmp_path / name, model=model, optimizer=optimizer
        )
        with contextlib.suppress(Killed):
            mkdt.train_teacher(model, optimizer, dataset, 8, s, KilledAt(progress, stop))
        return model.state_dict()

    whole, killed = learn("a.pt"), learn("b.pt", stop=5)
    resumed = learn("b.pt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not torch.equal(whole["1.0.weight"], killed["1.0.weight"])


def problem(dtype=torch.float64):
    """A tiny distillation problem: network, loss(theta, x, y), theta, images, representations."""
    network = models.build(tiny_convnet, 0, "test").to(dtype)
    g = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 8, 8, generator=g, dtype=dtype)
    z = torch.randn(10, 4, generator=g, dtype=dtype)
    return network, loss_of_theta(network), models.flat_parameters(network), images, z


def expert(epochs, objective="mse"):
    """The trajectory and the losses of an expert on the tiny problem."""
    network, _, _, images, z = problem()
    s = settings(objective=objective, expert_epochs=epochs, expert_lr=0.1, expert_batch=4)
    order = list(models.batches(10, 4, epochs, 5, "expert order"))
    return mkdt.train_expert(
        network,
        mse_of(network),
        order,
        lambda batch, draw: (images[batch], z[batch]),
        s,
        5,
        Steps(),
    )


def test_an_expert_is_sgd_by_hand_and_keeps_copies():
    """Eq. 7 by hand: SGD with momentum and weight decay; a snapshot at each epoch."""
    trajectory, losses = expert(3)
    assert trajectory.shape[0] == 4 and len(losses) == 3
    assert torch.equal(trajectory[:3], expert(2)[0])  # shorter training: a prefix
    assert all(not torch.equal(a, b) for a, b in zip(trajectory, trajectory[1:]))
    _, loss, theta, images, z = problem()
    assert torch.equal(trajectory[0], theta)
    velocity = torch.zeros_like(theta)
    for epoch in range(3):
        order = torch.randperm(10, generator=models.stream(5, "expert order", epoch))
        for batch in (order[:4], order[4:8], order[8:]):  # the short last one is kept
            g = torch.func.grad(loss)(theta, images[batch], z[batch])
            velocity = 0.9 * velocity + g + 1e-4 * theta
            theta = theta - 0.1 * velocity
    assert relative(theta, trajectory[-1]) < 1e-12
    assert relative(expert(3, "ssl")[0][-1], trajectory[-1]) > 1e-2  # by Adam


def test_the_objectives_are_what_they_are_called():
    """Eq. 5 is the mean squared error; MTT's the cross-entropy; MTT-SSL's SimCLR's of two views."""
    network, loss, theta, images, z = problem()
    assert torch.allclose(loss(theta, images, z), F.mse_loss(network(images), z))
    labels = torch.arange(10) % 4
    objectives = models.OBJECTIVES
    expected = F.cross_entropy(network(images), labels)
    assert torch.allclose(models.mean_loss(objectives["ce"], network, images, labels), expected)
    views = (lambda x: x.flip(-1), lambda x: 2 * x)
    expected = models.nt_xent_loss(network(images.flip(-1)), network(2 * images))
    assert torch.allclose(models.mean_loss(objectives["ssl"], network, images, views), expected)


def test_the_high_loss_subset_by_hand():
    """Section 4.2 on five images of one colour and two experts."""

    def f(theta, x):  # representation: theta * mean pixel
        return theta * x.mean(dim=(1, 2, 3))[:, None].expand(-1, 2)

    pixels = torch.tensor([0, 1, 2, 3, 3], dtype=torch.uint8)
    images = pixels[:, None, None, None].expand(-1, 3, 2, 2)
    one = torch.ones(3, 1, 1)
    d = data.Dataset("x", images, pixels, images, pixels, 0 * one, one / 255)
    z = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    thetas = [torch.tensor(1.0), torch.tensor(0.0)]
    losses = mkdt.loss_per_image(f, thetas, d, z, models.OBJECTIVES["mse"])
    # theta 1: (4+0)/2, 0, (4+4)/2, (0+9)/2, same;  theta 0: (4+0)/2, 1, 0, 9/2, same
    assert torch.allclose(losses, torch.tensor([2.0, 0.5, 2.0, 4.5, 4.5]), atol=1e-5)
    order = torch.tensor([3, 4, 0, 2, 1])
    chosen, targets = mkdt.high_loss(d, z, order, 3, None)
    assert torch.equal(targets, z[[3, 4, 0]]) and len(chosen) == 3


# ---- The matching gradient and Algorithm 1 -----------------------------------------------------
def differentiated(loss, theta, target, images, lr, steps):
    """The oracle: Eq. 4 as mkdt.py states it in its plain form, differentiated as a whole."""

    def matching_loss(images, lr):
        return mkdt.matching_loss(loss, theta, target, images, lr, steps)

    gradients, value = torch.func.grad_and_value(matching_loss, argnums=(0, 1))(images, lr)
    return value, *gradients


def matching_problem(steps, dtype=torch.float64):
    """The arguments of `matching_loss`. 10 images in batches of 4: short last batches, and from the
    fourth on images that come again."""
    _, loss, theta, images, z = problem(dtype=dtype)
    noise = torch.randn(len(theta), generator=torch.Generator().manual_seed(3), dtype=dtype)
    drawn = mkdt.draw_batches(10, steps, 4, torch.Generator().manual_seed(4))
    pairs = [(batch, z[batch]) for batch in drawn]
    return loss, theta, theta + 0.1 * noise, images, torch.tensor(0.5, dtype=dtype), pairs


def test_the_plain_form_is_equation_4():
    """One step of Eq. 8 and Eq. 4 by autograd, without torch.func."""
    loss, theta, target, images, lr, steps = matching_problem(2)
    theta_n = theta.clone().requires_grad_()
    for batch, y in steps:
        (g,) = torch.autograd.grad(loss(theta_n, images[batch], y), theta_n, create_graph=True)
        theta_n = theta_n - lr * g
    expected = (theta_n - target).norm() ** 2 / (theta - target).norm() ** 2
    assert torch.allclose(mkdt.matching_loss(loss, theta, target, images, lr, steps), expected)


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_matching_gradient_is_exact(steps):
    """In float64 it equals the plain form's gradient to nine digits."""
    loss, *rest = matching_problem(steps)
    ours = mkdt.matching_gradient(mkdt.InnerStep(loss), *rest)
    for a, b in zip(ours, differentiated(loss, *rest)):
        assert relative(a, b) < 1e-9


def test_the_matching_gradient_in_float32_and_compiled():
    """Rounding and the compiler leave it as it is."""
    loss, *rest = matching_problem(6, torch.float32)
    exact = differentiated(loss, *rest)
    for a, b in zip(mkdt.matching_gradient(mkdt.InnerStep(loss), *rest), exact):
        assert relative(a, b) < 1e-4
    step = mkdt.InnerStep(loss)
    step.gradient = models.Compiled(step.gradient, max_shapes=2)
    step.adjoint = models.Compiled(step.adjoint, max_shapes=2)
    for _ in range(2):
        for a, b in zip(mkdt.matching_gradient(step, *rest), exact):
            assert relative(a, b) < 1e-3


@pytest.mark.parametrize("system", ["ce", "ssl"])
def test_the_matching_gradient_is_exact_for_other_objectives(system):
    """Labels and views: the same code, the same exactness; views change with their stream."""
    network, _, theta, images, _ = problem()
    loss = loss_of_theta(network, system)
    labels = torch.arange(10) % 4 if system == "ce" else torch.zeros(10, 0)
    one = torch.ones(3, 1, 1)
    d = data.Dataset("x", *[torch.zeros(2, 3, 8, 8)] * 4, 0.5 * one, 0.3 * one)
    examples = models.Examples(images, labels, d, settings())
    drawn = mkdt.draw_batches(10, 5, 4, torch.Generator().manual_seed(4))
    rest = [theta, theta + 0.1, images, torch.tensor(0.5, dtype=theta.dtype)]

    def steps(seed):
        return [(batch, examples.y(batch, (seed, "views", n))) for n, batch in enumerate(drawn)]

    ours = mkdt.matching_gradient(mkdt.InnerStep(loss), *rest, steps(0))
    for a, b in zip(ours, differentiated(loss, *rest, steps(0))):
        assert b.norm() > 0 and relative(a, b) < 1e-9
    other = mkdt.matching_gradient(mkdt.InnerStep(loss), *rest, steps(1))
    assert (relative(other[1], ours[1]) < 1e-9) == (system == "ce")


def test_the_matching_gradient_detaches_what_it_is_given():
    """Tensors that require gradients, and a rate that is a number, give the same."""
    loss, theta, target, images, lr, steps = matching_problem(3)
    step = mkdt.InnerStep(loss)
    expected = mkdt.matching_gradient(step, theta, target, images, lr, steps)
    attached = [x.clone().requires_grad_() for x in (theta, target, images)]
    for rate in (0.5, lr.clone().requires_grad_()):
        result = mkdt.matching_gradient(step, *attached, rate, steps)
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(result, expected))


def test_an_inner_step_by_hand_on_a_linear_model():
    """L = (theta x - z)^2, one image: theta' = theta - lr * 2 x (theta x - z)."""

    def loss(theta, x, z):
        return (theta * x - z).square().mean()

    theta, x, z, target = (torch.tensor([v], dtype=torch.float64) for v in (0.5, 2.0, 3.0, 1.5))
    stepped = 0.5 - 0.1 * 2 * 2 * (0.5 * 2 - 3)
    steps = [(torch.tensor([0]), z)]
    value, _, grad_lr = mkdt.matching_gradient(mkdt.InnerStep(loss), theta, target, x, 0.1, steps)
    assert float(value) == pytest.approx((stepped - 1.5) ** 2)
    assert float(grad_lr) == pytest.approx(2 * (stepped - 1.5) * -(2 * 2 * (0.5 * 2 - 3)))


def algorithm_1(loss, experts, images, z, iterations, name=lambda iteration: iteration):
    """Lines 4 - 19 naively: SGD of torch on images and rate, all N steps differentiated. Returns
    D_syn, alpha_syn and the starts (i, t). name(iteration): the draw's name."""
    D_syn = images.clone().requires_grad_()
    alpha_syn = torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD(
        [{"params": [D_syn], "lr": 3.0}, {"params": [alpha_syn], "lr": 1e-3}], momentum=0.5
    )
    starts = set()
    for iteration in range(iterations):  # line 5
        rng = models.stream(0, "distill", name(iteration))
        i = int(torch.randint(3, (), generator=rng))  # line 6
        t = int(torch.randint(2 + 1, (), generator=rng))  # line 7: t <= T+
        theta_n = experts[i][t].requires_grad_()  # lines 8, 9
        for batch in mkdt.draw_batches(10, 4, 6, rng):  # lines 10 - 12
            L_MSE = loss(theta_n, D_syn[batch], z[batch])
            (g,) = torch.autograd.grad(L_MSE, theta_n, create_graph=True)
            theta_n = theta_n - alpha_syn * g  # lines 13, 14
        start, target = experts[i][t], experts[i][t + 2]
        L_DD = (theta_n - target).square().sum() / (start - target).square().sum()  # 16, 17
        optimizer.zero_grad()
        L_DD.backward()
        optimizer.step()  # line 18
        starts.add((i, t))
    return D_syn.detach(), alpha_syn.detach(), starts


def distilled_by_us(iterations):
    """(loss, experts, images, z, our Distilled set) of a tiny problem with three experts."""
    _, loss, theta, images, z = problem()
    experts = []
    for i in range(3):
        experts.append(theta + 0.02 * torch.randn(5, len(theta), generator=models.stream(i)))
    s = settings(
        syn_steps=4,
        match_epochs=2,
        max_start_epoch=2,
        pixel_lr=3.0,
        syn_lr=0.1,
        syn_lr_lr=1e-3,
        syn_batch=6,
        clip=0.0,
        iterations=iterations,
    )
    syn, optimizer = mkdt.new_distilled(images, z, s)
    mkdt.distill(
        mkdt.InnerStep(loss), experts, syn, optimizer, lambda batch, draw: z[batch], s, Steps()
    )
    return loss, experts, images, z, syn


def test_distillation_is_algorithm_1():
    """`distill` moves images and learned rate as the naive form of Algorithm 1 does."""
    loss, experts, images, z, ours = distilled_by_us(9)
    D_syn, alpha_syn, starts = algorithm_1(loss, experts, images, z, 9)
    assert {t for _, t in starts} == {0, 1, 2} == {i for i, _ in starts}  # T+ included
    assert relative(ours.images - images, D_syn - images) < 1e-5
    assert float(ours.lr) == pytest.approx(float(alpha_syn), rel=1e-5)


def test_ranks_average_their_gradients(monkeypatch):
    """Rank 0 of two, with an equal gradient from the other: the mean, not the sum, is applied, and
    each iteration of each rank has a draw of its own."""

    def the_other_rank_has_the_same(tensors):
        for tensor in tensors:
            tensor *= 2

    monkeypatch.setattr(mkdt, "RANKS", 2)
    monkeypatch.setattr(mkdt, "sum_over_ranks", the_other_rank_has_the_same)
    loss, experts, images, z, ours = distilled_by_us(4)
    D_syn, alpha_syn, _ = algorithm_1(loss, experts, images, z, 4, lambda iteration: 2 * iteration)
    assert relative(ours.images - images, D_syn - images) < 1e-5
    assert float(ours.lr) == pytest.approx(float(alpha_syn), rel=1e-5)


def run_distill(tmp_path, iterations, name="a", minutes=5, stop=None, **changes):
    """(the Distilled set, what was reported) after `iterations` with a checkpoint."""
    s = settings(
        **{
            **dict(
                syn_steps=6,
                max_start_epoch=2,
                pixel_lr=3.0,
                syn_batch=8,
                clip=0.0,
                syn_lr_lr=1e-3,
                iterations=iterations,
            ),
            **changes,
        }
    )
    network, loss, theta, images, z = problem(dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    real, z_real = torch.randn(40, 3, 8, 8, generator=g), torch.randn(40, 4, generator=g)
    order = list(models.batches(40, 8, 4, 0, "order"))
    trajectory, _ = mkdt.train_expert(
        network,
        mse_of(network),
        order,
        lambda batch, draw: (real[batch], z_real[batch]),
        settings(expert_epochs=4, expert_lr=0.05),
        0,
        Steps(),
    )
    syn, optimizer = mkdt.new_distilled(images, z, s)
    progress = data.Progress(
        "distill",
        iterations,
        data.Log(minutes=minutes, seconds=0),
        tmp_path / f"{name}.pt",
        "Lower --pixel-lr.",
        images=syn.images,
        lr=syn.lr,
        optimizer=optimizer,
    )
    with contextlib.suppress(Killed):
        mkdt.distill(
            mkdt.InnerStep(loss),
            [trajectory],
            syn,
            optimizer,
            lambda batch, draw: z[batch],
            s,
            KilledAt(progress, stop),
        )
    return syn


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_distillation_resumes_bit_for_bit(tmp_path, clip):
    """Killed and started again, or with more iterations, it ends at the same bits."""
    whole = run_distill(tmp_path, 6, clip=clip)
    run_distill(tmp_path, 4, "extended", clip=clip)
    run_distill(tmp_path, 6, "killed", minutes=0, stop=4, clip=clip)
    for name in ("extended", "killed"):
        resumed = run_distill(tmp_path, 6, name, clip=clip)
        assert torch.equal(whole.images, resumed.images) and whole.lr == resumed.lr
    assert not torch.equal(whole.images, run_distill(tmp_path, 6, "other", seed=1).images)


def test_the_bound_is_per_image_and_leaves_the_ordinary_alone():
    """An image's step is scaled down to the bound, NaN stays NaN, and 0 is no bound."""
    lr = torch.tensor(0.5)
    grad = torch.full((4, 3, 2, 2), 0.005)
    same, rate, touched = mkdt.bound(grad, torch.tensor(0.02), lr, 10.0, 1.0, 0.1)
    assert torch.equal(same, grad) and float(rate) == pytest.approx(0.02) and touched == 0
    grad[1], grad[2], grad[3] = 500, 0, torch.nan
    bounded, rate, touched = mkdt.bound(grad, torch.tensor(-7.0), lr, 10.0, 1.0, 0.1)
    assert touched == 1 and torch.equal(bounded[0], grad[0]) and (bounded[2] == 0).all()
    assert torch.allclose(10 * bounded[1], torch.full((3, 2, 2), 0.1))
    assert bounded[3].isnan().all() and float(rate) == pytest.approx(-0.05)
    plain = mkdt.bound(grad[:3], torch.tensor(-7.0), lr, 10.0, 1.0, 0.0)
    assert torch.equal(plain[0], grad[:3]) and plain[1] == -7 and plain[2] == 0


def test_a_distillation_that_breaks_stops_and_keeps_the_state_before(tmp_path):
    """NaN or a rate below zero: one line, and the last checkpoint is that of a good step."""
    with pytest.raises(data.Diverged, match="distill: .*became .*nan.*Lower --pixel-lr"):
        run_distill(tmp_path, 50, pixel_lr=1e20)
    assert not (tmp_path / "a.pt").exists()  # nothing was good enough
    with pytest.raises(data.Diverged, match="lr became -"):
        run_distill(tmp_path, 50, "b", minutes=0, syn_lr_lr=0.03)
    assert data.load(tmp_path / "b.pt")["lr"] > 0
    syn = run_distill(tmp_path, 20, "c", syn_lr_lr=10.0, clip=0.1)
    assert syn.lr > 0 and (syn.images - syn.initial).square().mean(dim=(1, 2, 3)).max() < 16


# ---- Theorem 4.1 and Proposition D.1: by autograd and simulation -------------------------------
def supervised_loss(W, x, y):
    """L_SL of Theorem 4.1 on a batch x [B, d] with one-hot targets y [B, K]."""
    return (x @ W.T - y).square().sum(dim=1).mean()


def spectral_loss(W, x1, x2, x, itself):
    """L_SSL of Theorem 4.1: views x1, x2 [B, d] of the batch, which stands in the second term as
    x; with i = j or not."""
    squares = (x @ W.T @ W @ x.T).square()  # [B, B]
    others = (squares.sum() - squares.trace()) / (len(x) * (len(x) - 1))
    first = -2 * ((x1 @ W.T) * (x2 @ W.T)).sum(dim=1).mean()
    return first + (squares.mean() if itself else others)


def gradients(loss, W, *batches):
    """The gradient in W for each of many batches, [n, *W.shape]."""
    many = (None, *(None if isinstance(b, bool) else 0 for b in batches))
    return torch.func.vmap(torch.func.grad(loss), many)(W, *batches)


def variance(g):
    """(E |g - E g|^2, half the width of its 99.9% confidence interval) from samples [n, ...]."""
    q = (g - g.mean(dim=0)).square().flatten(1).sum(dim=1) * len(g) / (len(g) - 1)
    return float(q.mean()), 3.29 * float(q.std()) / len(q) ** 0.5


def sparse_coding_batches(n, d, noise, rng):
    """n batches of two of the theorem's data: (x, one-hot y), [n, 2, d]."""
    y = torch.eye(d, dtype=torch.float64)[torch.randint(2, (n, 2), generator=rng)]
    return y + noise**0.5 * torch.randn(n, 2, d, generator=rng, dtype=torch.float64), y


@pytest.mark.parametrize("noise", [1e-4, 0.01, 0.1, 1.0])
def test_theorem_4_1(noise, d=10, n=20000):
    """The supervised gradient varies less than that of the spectral contrastive loss."""
    rng = torch.Generator().manual_seed(0)
    (x, y), W = sparse_coding_batches(n, d, noise, rng), torch.eye(d, dtype=torch.float64)
    supervised, error = variance(gradients(supervised_loss, W, x, y))
    # g = sum of e x^T over the two, e the noise of x: 2 (E |e|^2 |x|^2 - |E e x^T|^2)
    assert abs(supervised - 2 * (d * noise + noise**2 * (d * d + d))) < error
    for itself in (True, False):
        for strength in (0.0, 1.0):  # 0: what many views tend to
            x1, x2 = (
                x + strength * torch.randn(x.shape, generator=rng, dtype=torch.float64)
                for _ in range(2)
            )
            contrastive, wide = variance(gradients(spectral_loss, W, x1, x2, x, itself))
            assert contrastive - wide > supervised + error, (noise, itself, strength)


def test_proposition_d_1(K=5, d=8, n=40, size=8, rate=0.01):
    """One epoch of synchronous parallel SGD over 200 random partitions of a fixed data set."""
    rng = torch.Generator().manual_seed(0)
    labels, one_hot = torch.arange(n) % K, torch.eye(K, dtype=torch.float64)
    x = F.one_hot(labels, d).double() + torch.randn(n, d, generator=rng, dtype=torch.float64)
    a, b = (x + torch.randn(n, d, generator=rng, dtype=torch.float64) for _ in range(2))
    theta = torch.randn(K, d, generator=rng, dtype=torch.float64)
    losses = {
        "mse": lambda theta, x, y, a, b: supervised_loss(theta, x, one_hot[y]),
        "cross-entropy": lambda theta, x, y, a, b: F.cross_entropy(x @ theta.T, y),
        "spectral": lambda theta, x, y, a, b: spectral_loss(theta, x, x, x, False),
        "spectral, views": lambda theta, x, y, a, b: spectral_loss(theta, a, b, a, False),
    }
    for name, loss in losses.items():
        for batch in (size, n):  # n: a single part, nothing can vary
            parts = torch.stack([torch.randperm(n, generator=rng) for _ in range(200)])
            parts = parts.view(-1, batch)
            g = gradients(loss, theta, *(values[parts] for values in (x, labels, a, b)))
            ends = theta - rate * g.view(200, -1, *theta.shape).sum(dim=1)
            spread, error = variance(ends)
            if "spectral" in name and batch < n:
                assert spread - error > 1e-3, name
            else:
                assert spread < 1e-24, name


def test_the_gradient_noise_of_figure_1_by_hand():
    """tr Cov / |E g|^2 of gradients whose mean and covariance are known."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, 3, generator=g, dtype=torch.float64)
    gradients = torch.tensor([2.0, 0.0, 0.0]) + 0.5 * noise  # tr Cov = 0.75, |E g|^2 = 4

    def examples(batch, draw):
        return batch, draw[-1]

    found = mkdt.gradient_noise(
        lambda theta, x, k: gradients[k], torch.zeros(3), examples, 9, 0, 4, count=4000
    )
    assert found == pytest.approx(0.75 / 4, rel=0.05)


# ---- Linear probe and fine-tuning --------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_linear_probe_finds_the_optimum(scale):
    """LBFGS reaches the loss that Newton's method reaches."""
    g = torch.Generator().manual_seed(0)
    x = scale * torch.randn(60, 5, generator=g, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=g)
    W, b = evaluation.linear_probe(x, y, 3)

    def objective(p):
        penalty = 1e-3 * p[:15].square().sum()
        return F.cross_entropy(x @ p[:15].view(3, 5).T + p[15:], y) + penalty

    best = reached = torch.cat([W.flatten(), b])
    for _ in range(50):  # Newton, the bias's null direction damped
        hessian = torch.func.hessian(objective)(best) + 1e-9 * torch.eye(18, dtype=x.dtype)
        best = best - torch.linalg.solve(hessian, torch.func.grad(objective)(best))
    assert float(objective(reached)) <= float(objective(best)) + 1e-7


@pytest.mark.parametrize("scale", [30.0, 1e6])
def test_linear_probe_does_not_diverge(scale):
    """Features of any scale are separated; features that are not finite are refused."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(10, (300,), generator=g)
    x = 50 + scale * (torch.randn(300, 40, generator=g) + 3 * F.one_hot(y, 40))
    W, b = evaluation.linear_probe(x, y, 10)
    assert evaluation.accuracy(x @ W.T + b, y) > 90
    with pytest.raises(ValueError, match="not finite"):
        evaluation.linear_probe(x * torch.nan, y, 10)


def with_labels(count):
    """A Dataset of which only the labels matter."""
    labels = torch.arange(count) % 10
    one = torch.ones(3, 1, 1)
    images = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
    return data.Dataset("x", images, labels, images, labels, one, one)


def test_labelled_subset():
    """The share of the labels, fixed by the seed; a share of nothing is refused."""
    for n, percent, count in ((50000, 1, 500), (1020, 5, 51), (700, 1, 7), (30, 100, 30)):
        assert len(evaluation.labelled_subset(with_labels(n), percent, 0)) == count
    draws = [evaluation.labelled_subset(with_labels(700), 5, seed) for seed in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    with pytest.raises(InputError, match="is 0"):
        evaluation.labelled_subset(with_labels(50), 1, 0)


def test_a_probe_uses_the_labelled_images_only(tmp_path):
    """Unknown labels of training and test images change nothing but what is drawn from."""
    d = tiny_data(tmp_path, 60)
    net = models.build(lambda: models.ConvNet(4, 16, 8), 0, "a").eval()
    d.train_labels[40:] = -1
    d.test_labels[6:] = -1
    few = data.Dataset(
        "few",
        d.train_images[:40],
        d.train_labels[:40],
        d.test_images[:6],
        d.test_labels[:6],
        d.mean,
        d.std,
    )
    scores = [list(evaluation.linear_scores(net, x, [50], 0)) for x in (d, few)]
    assert scores[0] == scores[1]


def test_pretraining_is_plain_sgd_with_momentum():
    """Eq. 9 by hand, weight decay included."""
    network, loss, theta, images, z = problem()
    evaluation.pretrain(
        network,
        mse_of(network),
        models.batches(10, 256, 3, 0, ""),
        lambda batch, draw: (images[batch], z[batch]),
        0.2,
        1e-4,
        0,
        Steps(),
    )
    velocity = torch.zeros_like(theta)
    for _ in range(3):  # 10 images are one batch: order is nothing
        velocity = 0.9 * velocity + torch.func.grad(loss)(theta, images, z) + 1e-4 * theta
        theta = theta - 0.2 * velocity
    assert relative(theta, models.flat_parameters(network)) < 1e-10


def test_self_supervised_pretraining_is_adam_on_two_views(tmp_path):
    """Appendix B's baseline, step by step by hand; a batch of one image is passed over."""
    d = tiny_data(tmp_path)
    s = settings(crop_scale=0.5)

    def fresh():
        return models.build(lambda: models.ConvNet(6, 16, 4), 0, "x")

    net = fresh()
    order = [(0, torch.arange(8)), (1, torch.arange(1)), (2, torch.arange(8, 16))]
    evaluation.pretrain_ssl(net, order, d.train_images, d, s, 1e-3, 0, lambda step, loss: None)
    by_hand = fresh()
    head = models.build(lambda: models.barlow_projector(6), 0, "evaluation projector")
    both = nn.Sequential(by_hand, head)
    optimizer = torch.optim.Adam(both.parameters(), 1e-3, weight_decay=1e-6)
    for step, batch in (order[0], order[2]):
        z1, z2 = models.two_projections(
            both, d.train_images[batch], d, s, (0, "pretrain views", step)
        )
        optimizer.zero_grad()
        models.barlow_twins_loss(z1, z2, 1 / 128).backward()
        optimizer.step()
    assert torch.equal(models.flat_parameters(net), models.flat_parameters(by_hand))


def test_finetuning_is_lee_et_als(tmp_path):
    """Rate 0.01 with a cosine to zero, momentum 0.9, decay 5e-4, batches of 256, crops and flips;
    5,000 steps, 10,000 on CIFAR and TinyImageNet. The encoder itself is left as it was."""
    d = tiny_data(tmp_path)
    encoder = models.build(lambda: models.ConvNet(4, 16, 8), 0, "a").eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    chosen = torch.arange(20)
    network = evaluation.finetune(encoder, d, chosen, 0, Steps(3))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    by_hand = models.build(lambda: models.ConvNet(4, 16, 8), 0, "a")
    by_hand.head = models.build(lambda: nn.Linear(32, d.classes), 0, "fine-tuning head")
    theta = models.flat_parameters(by_hand)
    velocity = torch.zeros_like(theta)
    loss = loss_of_theta(by_hand, "ce")
    order = list(models.batches(20, 256, 3, 0, "fine-tuning order"))
    for step, batch in order:
        draw = models.stream(0, "fine-tuning views", step).initial_seed()
        x = d.normalize(data.shift_and_flip(d.train_images[batch].float() / 255, draw))
        g = torch.func.grad(loss)(theta, x, d.train_labels[batch])
        velocity = 0.9 * velocity + g + 5e-4 * theta
        theta = theta - 0.01 * 0.5 * (1 + math.cos(math.pi * step / 3)) * velocity
    assert relative(models.flat_parameters(network), theta) < 1e-4 and not network.training
    assert evaluation.FINETUNE_STEPS == {
        "cifar10": 10_000,
        "cifar100": 10_000,
        "tinyimagenet": 10_000,
    }


# ---- Baselines ---------------------------------------------------------------------------------
def test_krr_loss_is_kernel_ridge_regression():
    """It equals ridge regression in the primal form."""
    g = torch.Generator().manual_seed(0)
    f_syn, f_real = torch.randn(16, 4, generator=g, dtype=torch.float64).split([7, 9])
    y_syn, y_real = torch.randn(16, 3, generator=g, dtype=torch.float64).split([7, 9])
    X = torch.cat([f_syn, torch.ones(7, 1)], dim=1)
    X_real = torch.cat([f_real, torch.ones(9, 1)], dim=1)
    ridge = 0.01 * float((X @ X.T).trace())
    W = torch.linalg.solve(X.T @ X + ridge * torch.eye(5), X.T @ y_syn)
    result = evaluation.krr_loss(f_syn, y_syn, f_real, y_real, ridge=0.01)
    assert torch.allclose(result, (X_real @ W - y_real).square().mean())


class KRRSTProblem:
    """Targets that are the shares of three parts of which the images are mixed."""

    def __init__(self, folder):
        g = torch.Generator().manual_seed(0)
        parts = torch.rand(3, 3, 8, 8, generator=g)
        self.share = torch.rand(60, 3, generator=g)
        self.noisy = self.share + 0.05 * torch.randn(60, 3, generator=g)
        self.real = 4 * torch.einsum("nk,kchw->nchw", self.share / 3, parts) - 1
        self.folder = folder
        self.seen = []

    def make(self):
        return models.ConvNet(3, 8, channels=[4, 4])

    def draw(self, step):
        batch = torch.randint(60, (30,), generator=models.stream(0, "real", step))
        return self.real[batch], self.noisy[batch]

    def run(self, name="a", steps=60, stop=None, lifetime=20):
        """KRR-ST's images and targets; keeps the rate and the ages after each step in `seen`."""

        def progress_of(**state):
            progress = data.Progress(
                "krr_st", steps, data.Log(minutes=0), self.folder / name, **state
            )
            return Seen(KilledAt(progress, stop), state, self.seen)

        with contextlib.suppress(Killed):
            return evaluation.krr_st(
                self.make, self.real[:8], self.noisy[:8], self.draw, 0.003, lifetime, progress_of
            )

    @torch.no_grad()
    def quality(self, images, targets):
        """The loss under encoders that were never seen."""
        total = 0.0
        for k in range(10):
            f = models.build(self.make, k, "judge").features
            total += float(evaluation.krr_loss(f(images), targets, f(self.real), self.share))
        return total


class Seen:
    """A Progress that keeps Adam's rate, the ages and the pool of KRR-ST after each step."""

    def __init__(self, progress, state, seen):
        self.progress = progress
        self.state = state
        self.seen = seen
        self.first_step = progress.first_step
        self.total = progress.total

    def __call__(self, step, **values):
        rate = self.state["outer"].param_groups[0]["lr"]
        self.seen.append((rate, self.state["age"].clone(), self.state["pool"]))
        self.progress(step, **values)


def test_krr_st_lowers_its_loss_and_resumes_bit_for_bit(tmp_path):
    """The distilled set explains real images better than the real images it began as."""
    problem = KRRSTProblem(tmp_path)
    images, targets = problem.run("a")
    before = problem.quality(problem.real[:8], problem.noisy[:8])
    assert problem.quality(images, targets) < 0.9 * before
    problem.run("b", stop=37)
    resumed = problem.run("b")
    assert torch.equal(images, resumed[0]) and torch.equal(targets, resumed[1])


def test_krr_st_lowers_its_rate_and_renews_its_pool(tmp_path):
    """Adam's rate falls linearly to a thousandth; an encoder of `lifetime` steps begins anew."""
    problem = KRRSTProblem(tmp_path)
    problem.run(steps=100, lifetime=6)
    rates = [rate for rate, _, _ in problem.seen]
    expected = [0.003 * (1 - 0.999 * step / 100) for step in range(100)]
    assert rates == pytest.approx(expected)
    ages = torch.stack([age for _, age, _ in problem.seen])
    assert ages.max() == 6 and ages.min() == 0 and (ages == 0).any(dim=0).sum() >= 8
    fresh_at = [(step, k) for step in range(100) for k in range(10) if ages[step, k] == 0]
    step, k = fresh_at[0]
    again = KRRSTProblem(tmp_path)
    again.run("c", steps=100, lifetime=6, stop=step + 1)
    fresh = models.build(again.make, 0, "krr_st", k, step + 1)
    kept = again.seen[-1][2][k]
    assert torch.equal(models.flat_parameters(kept), models.flat_parameters(fresh))


def test_dm_moves_every_image_in_every_iteration(tmp_path):
    """Each group's mean feature is drawn to that of real images under the same augmentation."""
    d = tiny_data(tmp_path, 60)
    s = settings(crop_scale=0.5)
    begin = 0.2 * torch.randn(12, 3, 16, 16, generator=models.stream(0))

    def make():
        return models.ConvNet(4, 16, channels=[8, 8])

    def run(name, iterations, stop=None):
        def progress_of(**state):
            progress = data.Progress(
                "dm", iterations, data.Log(minutes=0), tmp_path / name, **state
            )
            return KilledAt(progress, stop)

        with contextlib.suppress(Killed):
            return evaluation.dm(make, begin, d, s, 4, progress_of)

    def distance(images):
        total = 0.0
        for k in range(5):
            f = models.build(make, 7, k).features
            real = f(d.normalize(d.train_images)).mean(dim=0)
            total += float((f(images).mean(dim=0) - real).square().sum())
        return total

    one, whole = run("one", 1), run("whole", 40)
    assert ((one - begin).flatten(1).abs().amax(dim=1) > 0).all()
    assert distance(whole) < 0.8 * distance(begin)
    run("killed", 40, stop=20)
    assert torch.equal(whole, run("killed", 40))
    # The first group by hand: its mean against that of 256 real images, under one transform
    batch = torch.randint(60, (256,), generator=models.stream(0, "dm", "step", 0))
    augment, _ = models.augmentations_of_normalized(d, s, 1, (0, "dm", "views", 0, 0))
    net = models.build(make, 0, "dm", 0)
    x = begin[:3].clone().requires_grad_()
    theirs = net.features(augment(d.normalize(d.train_images[batch]))).mean(dim=0)
    (net.features(augment(x)).mean(dim=0) - theirs).square().sum().backward()
    assert torch.allclose(one[:3], begin[:3] - x.grad, atol=1e-5)


# ---- Sets to pre-train on ----------------------------------------------------------------------
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_index_files(tmp_path, protocol):
    """Lists, dicts and arrays of indices, in every pickle protocol, .npy and .txt."""
    path = str(tmp_path / "x.pkl")
    for content in (
        [3, 1, 2],
        {"indices": [3, 1, 2]},
        np.array([3, 1, 2]),
        np.array([3.0, 1, 2]),
        np.array([3, 1, 2], np.int32),
        [np.int64(3), np.int64(1), np.int64(2)],
    ):
        Path(path).write_bytes(pickle.dumps(content, protocol))
        assert evaluation.read_indices(path, 4).tolist() == [3, 1, 2]
    np.save(tmp_path / "x.npy", np.array([3, 1, 2]))
    (tmp_path / "x.txt").write_text("3 1\n2\n")
    for kind in ("npy", "txt"):
        assert evaluation.read_indices(str(tmp_path / f"x.{kind}"), 4).tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    "content",
    [
        [0, 9],
        [-1],
        [0.5],
        [1, 1],
        [],
        "abc",
        {"x": [1]},
        Hostile(eval, "open('hacked', 'w')"),
        Hostile(os.system, "touch hacked"),
    ],
)
def test_bad_index_files_are_refused(tmp_path, monkeypatch, content):
    """Out of range, twice, no numbers, or hostile: one line, and nothing runs."""
    monkeypatch.chdir(tmp_path)
    Path("x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="subset:x.pkl is not a list of indices"):
        evaluation.read_indices("x.pkl", 4)
    assert not Path("hacked").exists()


def test_distilled_sets_of_other_systems(tmp_path):
    """This project's, MKDT's, KRR-ST's, MTT's without a rate and DATM's with one; hard labels."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, 8, 8, generator=g), torch.randn(6, 5, generator=g)
    labels = torch.arange(6) % 3
    files = {
        "distilled": {"images": x, "targets": y, "lr": 0.2},
        "images_300": nn.Parameter(x),
        "labels_300": y,
        "synlr_300": torch.tensor(0.36),
        "x_syn_final": nn.Parameter(x),
        "y_syn": nn.Parameter(y),
        "images_best": x,
        "labels_best": labels,
        "images_9": x,
        "labels_9": labels.float(),
        "lr_9": torch.tensor([0.05]),
    }
    for name, value in files.items():
        data.save(tmp_path / f"{name}.pt", value)
    for name, expected, rate in (
        ("distilled", y, 0.2),
        ("images_300", y, 0.36),
        ("x_syn_final", y, None),
        ("images_best", labels, None),
        ("images_9", labels, 0.05),
    ):
        found = evaluation.read_distilled(tmp_path / f"{name}.pt", "cpu")
        assert torch.equal(found.images, x) and torch.equal(found.targets, expected), name
        assert not found.images.requires_grad and not found.targets.requires_grad
        assert found.lr == (rate and pytest.approx(rate))


@pytest.mark.parametrize(
    "content",
    [
        {"images": torch.zeros(6, 3, 8, 8), "targets": torch.zeros(4, 5)},
        {"images": torch.full((6, 3, 8, 8), math.nan), "targets": torch.zeros(6, 5)},
        {},
        {"images": torch.zeros(0, 3, 8, 8), "targets": torch.zeros(0, 5)},
        {"images": torch.zeros(6, 3, 8, 9), "targets": torch.zeros(6, 5)},
        {"images": torch.zeros(6, 3, 8, 8), "targets": torch.zeros(6, 5, 2)},
        {"data": [1, 2]},
    ],
)
def test_bad_distilled_sets_are_refused(tmp_path, content):
    """Sizes that differ, NaN, nothing, images that are not square: what was expected is said."""
    data.save(tmp_path / "distilled.pt", content)
    with pytest.raises(InputError, match="expected finite images"):
        evaluation.read_distilled(tmp_path / "distilled.pt", "cpu")
    good = {"images": torch.zeros(6, 3, 8, 8), "targets": torch.zeros(6, 5), "lr": 0.0}
    data.save(tmp_path / "distilled.pt", good)
    with pytest.raises(InputError, match="its learned rate is 0"):
        evaluation.read_distilled(tmp_path / "distilled.pt", "cpu")


def test_set_names():
    """[NAME=]KIND[:ARGUMENT][@RATE]"""
    for text, parts in (
        ("random", ("random", "random", "", "")),
        ("random@0.3", ("random@0.3", "random", "", "0.3")),
        ("random:ssl@mkdt", ("random:ssl@mkdt", "random", "ssl", "mkdt")),
        ("dm:5", ("dm:5", "dm", "5", "")),
        ("mkdt:1000", ("mkdt:1000", "mkdt", "1000", "")),
        ("krr_st:3:convnet:4", ("krr_st:3:convnet:4", "krr_st", "3:convnet:4", "")),
        ("sas=subset:a@b/sas.pkl", ("sas", "subset", "a@b/sas.pkl", "")),
        ("subset:a=b.pkl", ("subset:a=b.pkl", "subset", "a=b.pkl", "")),
        ("kip=distilled:x:y@0.5", ("kip", "distilled", "x:y", "0.5")),
    ):
        assert tuple(evaluation.parse_set(text)) == parts
    for bad in (
        "moco",
        "random:moco",
        "subset:",
        "subset",
        "full:1",
        "krr_st:x",
        "krr_st:0",
        "@0.3",
        "",
        "x=",
        "random@0",
        "random@nan",
    ):
        with pytest.raises(InputError, match="unknown set"):
            evaluation.parse_set(bad)


# ---- The table and the paper's values ----------------------------------------------------------
# Sums of the printed tables, independent of the file that eval.py reads: of each row (the shares of
# labels one after the other), then of each column.
SUMS = """
cifar10 2 barlow convnet: 54.01 83.42 53.64 80.41 53.91 81.38 56.78 84.82 67.10 95.96 87.92
    124.07 96.89 138.64 101.69 148.38 114.74 164.64 247.97 18.98 56.98 15.16 7.88 11.99 14.40
    306.36 41.22 109.90 34.89 11.41 17.81 28.47 159.11 65.37 26.75 24.29 7.37 11.01 19.42 178.90
    89.93 48.67 53.14 14.62 20.61 45.79
cifar100 2 barlow convnet: 54.01 83.42 59.03 89.37 60.32 90.22 61.93 92.78 56.58 85.70 67.73
    101.21 71.13 103.63 97.03 140.24 104.54 155.33 102.26 146.51 122.45 178.43 90.18 29.80
    336.03 20.87 12.03 16.90 21.95 167.06 62.16 415.51 48.77 18.85 26.13 48.09 162.30 70.23
    27.83 24.90 8.49 12.13 23.37 184.81 99.17 49.18 54.72 17.14 22.85 52.40
tinyimagenet 2 barlow convnet: 48.30 72.43 52.74 77.38 53.00 75.79 58.58 85.59 84.77 122.78
    86.62 111.77 88.06 113.98 100.68 131.35 22.27 186.87 46.77 11.53 6.77 9.82 13.36 46.50
    230.96 83.97 22.67 9.68 14.41 25.78 138.89 53.64 28.61 17.47 6.67 10.14 19.94 147.49 63.70
    44.59 28.24 11.51 16.38 45.19
cifar10 5 barlow convnet: 55.16 82.05 56.47 86.15 76.21 108.73 52.15 78.43 160.53 35.74 12.53
    9.80 5.24 7.69 8.46 200.31 70.93 26.26 22.32 7.56 11.26 16.72
cifar100 5 barlow convnet: 66.88 97.42 58.77 87.15 74.97 110.82 57.55 85.19 165.83 42.71 14.31
    10.33 5.82 8.40 10.77 203.38 79.77 29.95 23.17 9.23 12.52 22.56
tinyimagenet 5 barlow convnet: 62.43 87.58 52.74 76.08 65.21 96.10 116.04 27.24 12.47 6.50 4.03
    5.76 8.34 142.07 48.59 26.12 13.79 6.03 8.55 14.61
cifar10 2 simclr convnet: 51.90 79.06 56.09 83.69 60.94 91.25 112.87 24.90 8.30 7.35 3.73 5.72
    6.06 144.33 49.45 18.57 16.42 5.30 8.12 11.81
cifar100 2 simclr convnet: 51.19 78.62 55.34 82.20 60.45 90.29 110.83 25.17 8.37 7.24 3.71 5.42
    6.24 142.30 49.33 18.03 16.20 5.37 8.13 11.75
cifar100 5 barlow resnet10: 18.35 85.26 70.70 97.85 57.23 145.76 32.75 6.95 5.07 7.53 16.87
cifar100 5 barlow resnet18: 15.09 76.90 63.00 90.62 51.64 131.94 28.64 7.22 5.22 7.24 13.71
cifar100 2 barlow convnet_bn: 305.90 345.32 345.85 198.20 264.80 118.22 76.86 68.88 75.27 194.84
cifar10 5 ssl convnet: 33.13 44.97 22.06 4.63 1.11 1.92 0.77 1.38 1.26 29.04 7.10 1.90 2.81 0.88
    1.82 1.42
cifar100 5 ssl convnet: 36.53 57.94 26.06 4.26 1.20 1.49 0.87 1.24 1.41 38.16 9.66 2.11 2.83
    1.06 1.74 2.38
"""


def test_the_papers_values_are_those_of_its_tables():
    """All 735 values, by the sums of the rows and of the columns of each table."""
    expected = {}
    for line in SUMS.replace("\n    ", " ").strip().splitlines():
        block, sums = line.split(": ")
        expected[tuple(block.split())] = [float(value) for value in sums.split()]
    count = 0
    for block in expected:
        protocol = evaluation.PROTOCOLS["finetune" if block[3] == "convnet_bn" else "linear"]
        dataset, percent, teacher, encoder = block
        objective = "ssl" if teacher == "ssl" else "mse"
        s = settings(dataset=dataset, percent=float(percent), ssl=teacher, objective=objective)
        table = evaluation.paper_means(argparse.Namespace(s=s), encoder, protocol)
        count += len(table)
        rows, columns = {}, {}
        for (labels, row, task), value in table.items():
            rows[labels, row] = rows.get((labels, row), 0) + float(value)
            columns[labels, task] = columns.get((labels, task), 0) + float(value)
        assert [*rows.values(), *columns.values()] == pytest.approx(expected[block]), block
    assert count == 735


def test_the_papers_column_is_found_by_name_alone():
    """By data set, percentage, teacher, encoder and the row's name; never guessed from a file."""

    def means(kind="convnet:128", protocol="linear", **changes):
        run = argparse.Namespace(s=settings(dataset="cifar10", **changes))
        return evaluation.paper_means(run, kind, evaluation.PROTOCOLS[protocol])

    assert means()["5", "mkdt", "cifar10"] == "53.08" and means()["5", "sas", "cifar10"] == "46.52"
    assert means(syn_steps=1)["5", "mkdt", "cifar10"] == "53.08"  # whatever our settings
    assert means(ssl="simclr")["5", "mkdt", "cifar10"] == "51.77"
    assert means(objective="ssl", percent=5.0)["5", "mkdt", "cifar10"] == "29.04"  # Table 12
    assert means(kind="resnet10") == {} == means(percent=3.0) == means(kind="convnet:64")
    assert means(representations="z.pt") == {} == means(objective="ce")

    def means_100(kind, protocol="linear", percent=2.0):
        run = argparse.Namespace(s=settings(dataset="cifar100", percent=percent))
        return evaluation.paper_means(run, kind, evaluation.PROTOCOLS[protocol])

    assert means_100("convnet_bn:128", "finetune")["100", "random:ssl", "cars"] == "28.75"
    assert means_100("convnet:128", "finetune") == {} == means_100("convnet_bn")
    assert means_100("resnet18", percent=5.0)["5", "mkdt:1000", "cifar10"] == "46.10"


def test_a_cell_by_hand():
    """Mean, standard deviation of a sample, bold for the best."""
    scores = {"0": 1.0, "1": 2.0, "2": 6.0}
    assert evaluation.mean_and_deviation(scores, 3.0) == "**3.00** ± 2.65"
    assert evaluation.mean_and_deviation(scores, 4.0) == "3.00 ± 2.65"
    assert evaluation.mean_and_deviation({"0": 1.0}, 4.0) == "1.00"
    assert evaluation.mean_and_deviation({}, 4.0) == ""


def test_paired_difference_by_hand():
    """Over the seeds that both have; no error from fewer than three."""
    ours, theirs = {"2": 6.0, "1": 4.0, "0": 2.0}, {"0": 1.0, "1": 2.0, "2": 3.0, "7": 9.0}
    assert evaluation.paired_difference(ours, theirs) == f"+2.00 ± {1 / math.sqrt(3):.2f}"
    assert evaluation.paired_difference({"0": 1.0, "1": 3.0}, theirs) == "+0.50"
    assert (
        evaluation.paired_difference(ours, ours) == "" == evaluation.paired_difference({}, theirs)
    )


# ---- The real commands, tiny -------------------------------------------------------------------
TINY = (
    "--dataset shapes --train-images 200 --teacher-width 8 --teacher-epochs 1 --teacher-batch 64 "
    "--width 4 --experts 2 --percent 5 --init high_loss --expert-epochs 2 --match-epochs 1 "
    "--max-start-epoch 1 --syn-steps 2 --iterations 2 --pretrain-epochs 1"
).split()
SET = "5pct_high_loss"


def write_shapes(root):
    """data/shapes.npz with few test images, which each probe encodes."""
    images, labels = data.draw_shapes(400, 32, np.random.default_rng(0))
    (root / "data").mkdir()
    np.savez(
        root / "data/shapes.npz",
        train_images=images[:300],
        train_labels=labels[:300],
        test_images=images[300:],
        test_labels=labels[300:],
    )


def at(root, to="run"):
    """The flags that say where a run lies, and its data."""
    if not (root / "data").exists():
        write_shapes(root)
    return ["--data-dir", str(root / "data"), "--run-dir", str(root / to)]


def run(*arguments):
    """mkdt.py with these arguments."""
    mkdt.main([str(argument) for argument in arguments])


def judge(root, *arguments, name=SET):
    """eval.py on a set of the run in `root`."""
    evaluation.main(
        [str(root / "run" / name), "--data-dir", str(root / "data"), *map(str, arguments)]
    )


def refused(capsys, call, *arguments, **options):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*arguments, **options)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in said, said
    return said


def lines(root, name=SET):
    """The lines of results.csv."""
    with open(root / "run" / name / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished tiny run of every stage."""
    root = tmp_path_factory.mktemp("run")
    run(*at(root), *TINY)
    return root


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_all_stages_leave_what_readme_promises(finished):
    """Every file, with what it should hold."""
    folder, runs = finished / "run" / SET, finished / "run"
    for name in (
        "teacher.pt",
        "representations.pt",
        "representations_test.pt",
        "config.json",
        "experts/expert_000.pt",
        f"{SET}/init.pt",
        f"{SET}/distilled.pt",
        f"{SET}/log.jsonl",
        f"{SET}/distilled.png",
        f"{SET}/results.csv",
        f"{SET}/config.json",
    ):
        assert (runs / name).stat().st_size > 0, name
    d = data.load(folder / "distilled.pt")
    assert d["images"].shape == (10, 3, 32, 32) and d["targets"].shape == (10, 64)
    pixels = d["images"] * d["std"][:, None, None] + d["mean"][:, None, None]
    assert 0.3 < pixels.mean() < 0.7 and d["lr"] > 0 and d["iterations"] == 2
    init, z = data.load(folder / "init.pt"), data.load(runs / "representations.pt")
    chosen = init["order"][:10]
    assert torch.equal(init["targets"], z[chosen]) and torch.equal(d["targets"], z[chosen])
    trajectory = data.load(runs / "experts/expert_001.pt")
    assert trajectory.shape[0] == 3 and trajectory.dtype == torch.float32
    text = (folder / "results.md").read_text()
    assert "| none |" in text and "| mkdt |" in text and "mkdt - row" in text
    assert len(lines(finished)) == 2 * 3 * 8
    with Image.open(folder / "distilled.png") as image:
        assert image.size[0] > 900 and image.size[1] > 190


def test_high_loss_is_section_4_2_of_the_real_experts(finished):
    """The order in init.pt is that of the mean loss over the experts after their first epoch."""
    d = data.load_dataset("shapes", finished / "data", train_images=200)
    z = data.load(finished / "run/representations.pt")
    f = models.functional(models.encoder("convnet:4", 64, 32))
    losses = []
    for i in range(2):
        theta = data.load(finished / f"run/experts/expert_00{i}.pt")[1]
        losses.append((f(theta, d.normalize(d.train_images)) - z).square().mean(dim=1))
    mean = torch.stack(losses).mean(dim=0)
    order = data.load(finished / "run" / SET / "init.pt")["order"]
    assert (mean[order].diff() <= 1e-6).all() and sorted(order.tolist()) == list(range(200))


def test_equation_2s_distance_is_that_of_the_encoder(finished):
    """MSE in results.csv is between the untrained encoder and the teacher on test images."""
    d = data.load_dataset("shapes", finished / "data")
    net = models.build(lambda: models.ConvNet(64, 32, 4), 0, "evaluation encoder")
    z = models.encode(net, d.test_images, d.normalize)
    known = data.load(finished / "run/representations_test.pt")["representations"]
    mse = [float(x["mse"]) for x in lines(finished) if x["set"] == "none" and x["seed"] == "0"]
    assert mse == pytest.approx([F.mse_loss(z, known).item()] * 2, rel=1e-4)


def test_nothing_finished_is_run_again(copied, monkeypatch):
    """The same command again trains nothing and changes no file of tensors."""
    before = {path: path.read_bytes() for path in copied.rglob("*.pt")}
    for module, name in (
        (mkdt, "train_teacher"),
        (mkdt, "train_expert"),
        (mkdt, "distill"),
        (evaluation, "pretrain"),
    ):
        monkeypatch.setattr(module, name, None)
    run(*at(copied), *TINY)
    assert before == {path: path.read_bytes() for path in copied.rglob("*.pt")}


def test_other_settings_are_refused_and_told(copied, capsys):
    """What differs, which files to delete, and --name only where that helps."""
    for flag, value, told in (
        ("--expert-lr", "0.3", "expert_lr 0.05 -> 0.3"),
        ("--teacher-epochs", "2", "teacher_epochs 1 -> 2"),
        ("--train-images", "100", "images "),
        ("--seed", "1", "seed 0 -> 1"),
    ):
        said = refused(capsys, run, *at(copied), *TINY, flag, value)
        assert told in said and "Give another --run-dir" in said and "--name" not in said
        assert "experts/*.pt" in said and "distill*.pt" in said
    said = refused(capsys, run, *at(copied), *TINY, "--pixel-lr", "7")
    assert "pixel_lr 3000.0 -> 7.0" in said and "Give another --name" in said
    for stage in ("init", "distill"):
        run(*at(copied), *TINY, "--pixel-lr", "7", "--name", "slow", "--stage", stage)
    slow = data.load(copied / "run/slow/distilled.pt")
    assert not torch.equal(
        slow["images"], data.load(copied / "run" / SET / "distilled.pt")["images"]
    )


def test_conflicts_are_found_before_anything_is_computed(copied, capsys):
    """A setting of a late stage is compared before an early one trains another expert."""
    said = refused(capsys, run, *at(copied), *TINY, "--experts", "3")
    assert "experts 2 -> 3" in said and "Give another --name" in said
    assert not (copied / "run/experts/expert_002.pt").exists()


def test_an_entry_comes_with_the_first_result(copied, capsys):
    """What a stage leaves when it fails says nothing about its settings, but for a checkpoint."""
    flags = [*at(copied, "new"), *TINY, "--stage", "teacher"]
    refused(capsys, run, *flags, "--teacher-lr", "1e9")
    assert not (copied / "new/config.json").exists()
    run(*flags, "--teacher-lr", "0.002")
    assert "teacher" in json.loads((copied / "new/config.json").read_text())
    (copied / "run/teacher.pt").rename(copied / "run/teacher_checkpoint.pt")
    data.save(copied / "run/teacher_checkpoint.pt", {"step": 1, "ranks": 1, "seed": 7})
    for path in [*(copied / "run").glob("rep*.pt"), *(copied / "run/experts").iterdir()]:
        path.unlink()
    shutil.rmtree(copied / "run" / SET)
    said = refused(capsys, run, *at(copied), *TINY, "--stage", "teacher")
    assert "teacher_checkpoint.pt does not fit this run" in said


def test_results_without_an_entry_are_refused(copied, capsys):
    """Without config.json nobody knows what they were made from."""
    (copied / "run/config.json").unlink()
    assert "the teacher in" in refused(capsys, run, *at(copied), *TINY)
    (copied / "run/config.json").write_text("{")
    assert "config.json is damaged" in refused(capsys, run, *at(copied), *TINY)


def test_no_stage_is_made_before_what_it_builds_on(copied, capsys):
    """New representations beside old experts are refused."""
    for path in (copied / "run").glob("*.pt"):
        path.unlink()
    said = refused(capsys, run, *at(copied), *TINY)
    assert "the experts in" in said and "made before the results that it builds on" in said


def test_a_failure_can_be_mended_by_its_own_advice(copied, capsys):
    """Experts that diverge leave nothing behind: with a lower rate the run goes on."""
    flags = [*at(copied), *TINY, "--name", "again"]
    shutil.rmtree(copied / "run/experts")
    shutil.rmtree(copied / "run" / SET)
    said = refused(capsys, run, *flags, "--expert-lr", "1e9")
    assert "Lower --expert-lr" in said and "expert 0" in said
    run(*flags, "--expert-lr", "0.02", "--stage", "experts")
    assert (copied / "run/experts/expert_001.pt").exists()


def test_a_run_knows_its_images_by_their_contents(copied, tmp_path, capsys):
    """A copy elsewhere, under another name, and --image-size as it is anyway: the run goes on."""
    shutil.copy(copied / "data/shapes.npz", copied / "elsewhere.npz")
    flags = [*TINY[2:], "--run-dir", copied / "run", "--teacher-lr", 6e-3, "--crop-scale", 0.6]
    given = mkdt.resolve("shapes", {})
    for name in (
        "grey",
        "max_pool",
        "standardize",
        "expert_lr",
        "expert_batch",
        "syn_lr",
        "syn_lr_lr",
        "pixel_lr",
        "syn_batch",
    ):
        flags += [f"--{name.replace('_', '-')}", given[name]]
    run("--dataset", copied / "elsewhere.npz", *flags, "--image-size", 32, "--stage", "distill")
    (copied / "data/shapes.npz").rename(copied / "moved.npz")
    judge(copied, "--dataset", copied / "moved.npz", "--sets", "mkdt", "--seeds", 0)
    images, labels = data.draw_shapes(400, 32, np.random.default_rng(1))
    np.savez(copied / "other.npz", train_images=images, train_labels=labels)
    said = refused(capsys, judge, copied, "--dataset", copied / "other.npz")
    assert "are not those that" in said and "--dataset" in said


def test_eval_knows_what_a_set_was_made_with(copied, capsys):
    """Other representations are refused; another test split has no distance; later settings of
    the evaluation are those that eval.py goes on with."""
    run(*at(copied), *TINY, "--stage", "eval", "--pretrain-lr", 0.2)
    judge(copied, "--sets", "random", "--seeds", 0, "--labels", 5)
    assert "| random | 0.2 |" in capsys.readouterr().out
    images, labels = data.draw_shapes(400, 32, np.random.default_rng(0))
    np.savez(
        copied / "data/shapes.npz",
        train_images=images[:300],
        train_labels=labels[:300],
        test_images=images[300:390],
        test_labels=labels[300:390],
    )
    judge(copied, "--sets", "none", "--seeds", 3, "--labels", 5)
    assert [x["mse"] for x in lines(copied) if x["seed"] == "3"] == [""]
    z = data.load(copied / "run/representations.pt")
    data.save(copied / "run/representations.pt", z + 1)
    assert "made with other representations" in refused(capsys, judge, copied, "--sets", "none")


def test_the_normalisation_belongs_to_the_images(tmp_path):
    """The same pixels under the authors' statistics and under their own are told apart."""
    np.savez(tmp_path / "cifar10.npz", **arrays())
    official = data.load_dataset("cifar10", tmp_path)
    own = data.load_dataset(str(tmp_path / "cifar10.npz"))
    assert torch.equal(official.train_images, own.train_images)
    assert official.images_id != own.images_id and official.id != own.id


def test_rows_and_tasks_have_names_of_their_own(copied, capsys):
    """Two sets of one name are refused, a second task of one name is left out; the same name for
    another set is computed again."""
    said = refused(capsys, judge, copied, "--sets", "a=random", "a=initial")
    assert "two of the sets have one name: a a" in said
    (copied / "other").mkdir()
    shutil.copy(copied / "data/shapes.npz", copied / "other/shapes.npz")
    tasks = "--tasks", "shapes", copied / "other/shapes.npz"
    judge(copied, "--sets", "none", "--seeds", 0, "--labels", 5, *tasks)
    assert "there is another task called shapes" in capsys.readouterr().out
    for epochs in (1, 2):
        judge(copied, "--sets", f"a=random:ssl:{epochs}", "--seeds", 0, "--labels", 5)
        assert re.search(r"^eval +1/1 ", capsys.readouterr().out, re.MULTILINE)


def test_other_code_is_said_and_comments_are_not_code(copied, capsys, monkeypatch):
    """A note where the code has changed; comments, docstrings and layout do not count."""
    path = copied / "run/config.json"
    config = json.loads(path.read_text())
    config["experts"]["code"] = "00000000"
    path.write_text(json.dumps(config))
    run(*at(copied), *TINY, "--stage", "init")
    assert re.search("note: other code made the experts in ", capsys.readouterr().out)
    copy = copied / "code"
    copy.mkdir()
    for name in ("data.py", "models.py", "eval.py", "mkdt.py"):
        text = (FOLDER / name).read_text()
        (copy / name).write_text(text.replace("def start(", "# a comment\ndef start("))
    monkeypatch.setattr(mkdt, "__file__", str(copy / "mkdt.py"))
    before = mkdt.code_version()
    mkdt.code_version.cache_clear()
    assert mkdt.code_version() == before
    (copy / "data.py").write_text((copy / "data.py").read_text() + "\nX = 1\n")
    mkdt.code_version.cache_clear()
    assert mkdt.code_version() != before
    mkdt.code_version.cache_clear()


def test_more_iterations_and_seeds_extend(copied, capsys):
    """More iterations resume and give the bits of a fresh run; results of the old set go; more
    seeds leave the other lines as they are."""
    run(*at(copied), *TINY, "--iterations", "4", "--stage", "distill")
    assert "resuming from" in capsys.readouterr().out
    run(*at(copied, "fresh"), *TINY, "--iterations", "4", "--stage", "teacher")
    for stage in ("experts", "init", "distill"):
        run(*at(copied, "fresh"), *TINY, "--iterations", "4", "--stage", stage)
    one, other = (data.load(copied / f / SET / "distilled.pt") for f in ("run", "fresh"))
    assert torch.equal(one["images"], other["images"]) and one["lr"] == other["lr"]
    before = {str(x) for x in lines(copied) if x["set"] == "none"}
    judge(copied, "--sets", "random", "mkdt", "--seeds", 0)
    assert "as files or settings differ: mkdt" in capsys.readouterr().out
    kept = lines(copied)
    assert len([x for x in kept if x["set"] == "mkdt"]) == 2  # of seed 0; those of the old set went
    judge(copied, "--sets", "random", "mkdt", "--seeds", 0, 5, "--labels", 5)
    assert len(lines(copied)) == len(kept) + 2 and lines(copied)[: len(kept)] == kept
    assert before <= {str(x) for x in lines(copied)}
    (copied / "run" / SET / "distilled.pt").unlink()
    run(*at(copied), *TINY, "--iterations", "3", "--stage", "distill")  # fewer than were done
    assert "distill: the set has 4 iterations, not 3" in capsys.readouterr().out
    assert data.load(copied / "run" / SET / "distilled.pt")["iterations"] == 4


def test_snapshots_are_kept_every_thousand_iterations(copied, monkeypatch):
    """Every 1,000 iterations and at the end: what mkdt:1000 evaluates."""

    def nothing(step, theta, target, images, lr, steps):
        return torch.ones(()), 0 * images, 0 * lr

    monkeypatch.setattr(mkdt, "matching_gradient", nothing)
    for stage in ("init", "distill"):
        run(*at(copied), *TINY, "--name", "long", "--iterations", "2001", "--stage", stage)
    found = sorted(path.name for path in (copied / "run/long").glob("distilled_*.pt"))
    assert found == [f"distilled_0{count}.pt" for count in (1000, 2000, 2001)]
    judge(copied, "--sets", "mkdt:1000", "--seeds", 0, name="long")
    assert {x["set"] for x in lines(copied, "long")} == {"mkdt:1000"}


def test_experts_are_extended_and_remade_identically(copied):
    """A lost expert comes back bit for bit; more of them do not change the others."""
    first = copied / "run/experts/expert_000.pt"
    before = first.read_bytes()
    first.unlink()
    run(*at(copied), *TINY, "--stage", "experts", "--experts", "3")
    assert first.read_bytes() == before and (copied / "run/experts/expert_002.pt").exists()


def test_representations_of_another_model(tmp_path, capsys):
    """Any array [n, d] replaces the teacher; an overwritten file is noticed."""
    z = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    usual = [flag for flag in TINY if not flag.startswith("--teacher")]
    flags = [*at(tmp_path), *TINY, "--representations", tmp_path / "z.npy"]
    run(*flags, "--standardize", 0)
    assert not (tmp_path / "run/teacher.pt").exists() and usual
    assert data.load(tmp_path / "run" / SET / "distilled.pt")["targets"].shape == (10, 6)
    said = refused(capsys, judge, tmp_path, "--sets", "krr_st:2", "--seeds", 0)
    assert "krr_st needs a teacher trained here" in said
    np.save(tmp_path / "z.npy", z + 1)
    assert "representations " in refused(capsys, run, *flags, "--standardize", 0)
    assert "--standardize 1" in refused(capsys, run, *flags, "--standardize", 1)
    (tmp_path / "z.csv").write_text("1,2\n3,4\n")
    attached = torch.from_numpy(z).requires_grad_() * 1.0
    torch.save(attached, tmp_path / "z.pt")
    run(
        *at(tmp_path, "attached"),
        *TINY,
        "--standardize",
        0,
        "--stage",
        "teacher",
        "--representations",
        tmp_path / "z.pt",
    )
    assert not data.load(tmp_path / "attached/representations.pt").requires_grad
    np.save(tmp_path / "small.npy", z / 1e5)
    run(
        *at(tmp_path, "small"),
        *TINY,
        "--standardize",
        0,
        "--stage",
        "teacher",
        "--representations",
        tmp_path / "small.npy",
    )
    assert "standard deviation, 9.78e-06" in capsys.readouterr().out
    for bad, told in (
        (z[:100], "must be [200, d]"),
        (z * np.nan, "not all alike"),
        (np.ones_like(z), "not all alike"),
        (None, "z.csv is damaged, or not a torch file"),
    ):
        path = tmp_path / "z.csv"
        if bad is not None:
            path = tmp_path / "bad.npy"
            np.save(path, bad)
        other = [*at(tmp_path, "other"), *TINY, "--standardize", 0, "--representations", path]
        assert told in refused(capsys, run, *other)
        assert not (tmp_path / "other/representations.pt").exists()


def test_unlabelled_images_of_ones_own(tmp_path, capsys):
    """They are distilled, and the set is probed on another data set."""
    root = make_folder(tmp_path / "mine", classes=(), train=30, test=0)
    run(
        "--dataset",
        root,
        *at(tmp_path),
        *TINY[4:],
        "--percent",
        "20",
        "--ssl",
        "simclr",
        "--teacher-batch",
        "10",
        "--init",
        "random",
    )
    said = capsys.readouterr().out
    assert (
        "mine cannot be probed without labels" in said
        and "of at most one class, so unlabelled" in said
    )
    assert "using those for cifar10" in said
    judge(tmp_path, "--tasks", "shapes", "--sets", "mkdt", "--seeds", 0, name="20pct_random")
    assert {x["task"] for x in lines(tmp_path, "20pct_random")} == {"shapes"}


@pytest.mark.parametrize("objective", ["ce", "ssl"])
def test_mtt_and_mtt_ssl_run_end_to_end(tmp_path, objective, capsys):
    """Without a teacher: labels or views, in all stages."""
    flags = [*at(tmp_path), *TINY, "--init", "random", "--objective", objective]
    flags += ["--expert-batch", "50"]
    run(*flags)
    run(*flags)  # once more: nothing is refused, nothing is missing
    sets = {x["set"] for x in lines(tmp_path, "5pct_random")}
    assert sets == {x for x in evaluation.DEFAULT_SETS if "high_loss" not in x}
    assert not (tmp_path / "run/teacher.pt").exists()
    d = data.load(tmp_path / "run/5pct_random/distilled.pt")
    assert d["targets"].shape == ((10,) if objective == "ce" else (10, 0))
    assert d["images"].isfinite().all()
    said = refused(capsys, judge, tmp_path, "--sets", "high_loss", name="5pct_random")
    assert "high_loss needs a teacher" in said
    said = refused(capsys, run, *at(tmp_path, "b"), *TINY, "--objective", objective)
    assert "needs a teacher" in said


def test_figure_1(copied, monkeypatch):
    """Its systems are runs of their own; the panels hold what they say."""
    monkeypatch.setattr(mkdt.gradient_noise, "__defaults__", (256, 4))  # batches
    run(
        *at(copied),
        *TINY[:10],
        "--stage",
        "figure1",
        "--width",
        "4",
        "--iterations",
        "2",
        "--syn-steps",
        "2",
        "--match-epochs",
        "1",
        "--expert-epochs",
        "3",
        "--percent",
        "5",
        "--syn-lr-lr",
        "1e-7",
        "--objective",
        "ce",  # each system has its own
    )
    root = copied / "run/figure1"
    with open(root / "figure1.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["system"] for row in rows} == set(mkdt.FIGURE_1)
    count = {}
    for row in rows:
        count[row["panel"]] = count.get(row["panel"], 0) + 1
    assert count == {
        "gradient noise": 3 * 4,
        "trajectory variance": 3 * 3,
        "loss": 4 * 2,
        "moved": 4 * 2,
    }
    experts = [data.load(root / f"mtt/experts/expert_00{i}.pt") for i in range(5)]
    assert torch.equal(experts[0][0], experts[1][0])  # they begin at one network
    assert not torch.equal(experts[0][1], experts[1][1])
    at_the_end = torch.stack([expert[3] for expert in experts])
    expected = float(at_the_end.var(dim=0, correction=0).mean())
    found = [
        float(row["y"])
        for row in rows
        if row["panel"] == "trajectory variance" and row["system"] == "mtt" and row["x"] == "3"
    ]
    assert found == pytest.approx([expected], rel=1e-4, abs=0)


def test_figure_1_has_the_settings_of_appendix_a_2():
    """N, M, batches and rates of MTT and MTT-SSL; 100 iterations from epoch 0 at 1%."""
    common = mkdt.FIGURE_1_COMMON
    assert (
        common["iterations"],
        common["max_start_epoch"],
        common["pixel_lr"],
        common["percent"],
        common["same_start"],
    ) == (100, 0, 1000, 1, 1)
    for name, N, M, batch, lr, momentum, decay in (
        ("mtt", 20, 4, 256, 0.01, 0, 0),
        ("mtt_ssl", 10, 2, 1024, 1e-3, 0.9, 1e-6),
        ("mtt_ssl_4096", 10, 2, 4096, 1e-3, 0.9, 1e-6),
    ):
        values = mkdt.resolve("cifar100", {**common, **mkdt.FIGURE_1[name]})
        assert (
            values["syn_steps"],
            values["match_epochs"],
            values["expert_batch"],
            values["expert_lr"],
            values["expert_momentum"],
            values["expert_decay"],
        ) == (N, M, batch, lr, momentum, decay)
        assert "clip" not in mkdt.FIGURE_1[name]  # one bound for all systems


def test_baselines_sets_and_any_rate(copied, capsys):
    """KRR-ST, DM, SSL, subsets, sets of others with representations or labels, rates, names."""
    d = data.load(copied / "run" / SET / "distilled.pt")
    data.save(copied / "theirs/x_syn.pt", d["images"])
    data.save(copied / "theirs/y_syn.pt", d["targets"])
    data.save(copied / "dm/x_syn.pt", d["images"])
    data.save(copied / "dm/y_syn.pt", torch.arange(10))
    views = {"images": d["images"], "targets": torch.zeros(10, 0), "lr": torch.tensor(0.1)}
    data.save(copied / "views.pt", views)
    (copied / "sas.txt").write_text(" ".join(map(str, range(30, 130))))
    (copied / "few.txt").write_text("0 1 2")
    sets = [
        "full",
        "krr_st:3:convnet_bn:4",
        "dm:2",
        "random:ssl:2",
        "mkdt@0.1",
        "random@0.3",
        f"theirs=distilled:{copied}/theirs/x_syn.pt",
        f"hard=distilled:{copied}/dm/x_syn.pt",
        f"views=distilled:{copied}/views.pt",
        f"sas=subset:{copied}/sas.txt",
        f"few=subset:{copied}/few.txt",
    ]
    judge(copied, "--sets", *sets, "--seeds", 0, "--labels", 5)
    said = capsys.readouterr().out
    assert "sas: the first 10 of 100 indices" in said
    assert "few: the first 3 of 3 indices of 200 training images; the distilled set has 10" in said
    assert "hard: no learned rate, so at 0.1" in said
    scores = {x["set"]: x for x in lines(copied)}
    assert {"full", "theirs", "hard", "views", "sas", "few", "random@0.3", "dm:2"} <= set(scores)
    assert scores["random@0.3"]["rate"] == "0.3" and scores["random:ssl:2"]["mse"] == ""
    assert scores["hard"]["mse"] == "" and scores["full"]["mse"] != ""
    assert scores["theirs"]["accuracy"] == scores["mkdt@0.1"]["accuracy"]
    made = data.load(copied / "run" / SET / "krr_st_3_convnet_bn_4.pt")
    assert made["images"].shape == (10, 3, 32, 32) and made["targets"].shape == (10, 64)
    d = data.load_dataset("shapes", copied / "data", train_images=200)
    chosen = torch.randperm(200, generator=models.stream(0, "krr_st", "images"))[:10]
    raw = d.train_images[chosen].float() / 255  # it begins as raw pixels
    assert (made["images"] - raw).abs().max() < 0.01
    chosen = torch.randperm(200, generator=models.stream(0, "dm", "images"))[:10]
    made = data.load(copied / "run" / SET / "dm_2_convnet_4.pt")
    start = d.normalize(d.train_images[chosen])
    assert (made["images"] - start).abs().mean() < (made["images"] - start.flip(0)).abs().mean()


def opened_sets(root, *flags):
    """The Sets of the finished run."""
    arguments = [
        str(root / "run" / SET),
        "--data-dir",
        str(root / "data"),
        "--device",
        "cpu",
        *flags,
    ]
    flags = evaluation.parse(arguments)
    flags.device = torch.device("cpu")
    return evaluation.Sets(evaluation.open_set(flags))


def test_sets_are_what_they_are_called(copied):
    """Images and targets of each kind; a set made elsewhere is taken as network input as it is."""
    data.save(copied / "x_syn.pt", 3 * torch.randn(10, 3, 32, 32))
    data.save(copied / "y_syn.pt", torch.randn(10, 64))
    sets = opened_sets(copied)
    z = sets.run.targets
    real = sets.run.data.train_images

    def get(text, seed=0):
        return sets.get(evaluation.parse_set(text), seed)

    theirs = get(f"distilled:{copied}/x_syn.pt")
    assert torch.equal(theirs.images, data.load(copied / "x_syn.pt"))
    examples = models.Examples(theirs.images, theirs.targets, sets.run.data, sets.run.s)
    assert torch.equal(examples(torch.arange(10), None)[0], theirs.images)  # not normalised again
    order = data.load(copied / "run" / SET / "init.pt")["order"]
    assert torch.equal(get("high_loss").images, real[order[:10]])
    assert torch.equal(get("high_loss").targets, z[order[:10]])
    drawn = torch.randperm(200, generator=models.stream(4, "random subset"))[:10]
    assert torch.equal(get("random", 4).images, real[drawn])
    assert not torch.equal(get("random", 5).images, real[drawn])  # redrawn for each seed
    assert get("full").images is real and get("none").images is None
    mkdt_rate = data.load(copied / "run" / SET / "distilled.pt")["lr"]
    rates = [get(text).lr for text in ("mkdt", "random", "random@mkdt", "mkdt@0.3", "random:ssl")]
    assert rates == pytest.approx([mkdt_rate, 0.1, mkdt_rate, 0.3, 1e-3])


def test_results_are_computed_again_when_a_file_changes(copied, capsys):
    """Another content under the same name, of a set or of a task, gives new numbers."""

    def write_task(seed):
        images, labels = data.draw_shapes(60, 32, np.random.default_rng(seed))
        np.savez(
            copied / "task.npz",
            train_images=images[:40],
            train_labels=labels[:40],
            test_images=images[40:],
            test_labels=labels[40:],
        )

    def computed(*flags):
        capsys.readouterr()
        judge(
            copied, "--sets", f"mine=subset:{copied}/list.txt", "--seeds", 0, "--labels", 50, *flags
        )
        return len(re.findall(r"^eval +\d", capsys.readouterr().out, re.MULTILINE))

    (copied / "list.txt").write_text("0 1 2 3 4 5 6 7 8 9")
    write_task(3)
    task = "--tasks", copied / "task.npz"
    assert computed() == 1 and computed() == 0
    (copied / "list.txt").write_text("10 11 12 13 14 15 16 17 18 19")
    assert computed() == 1 and computed() == 0
    assert computed(*task) == 1 and computed(*task) == 0
    write_task(4)
    assert computed(*task) == 1 and computed() == 0


def test_krr_sts_targets_are_recomputed_on_augmented_images(copied, monkeypatch):
    """Real images are cropped and mirrored; the teacher, in eval mode, sees what comes out."""
    seen = []

    def spy(make, images, targets, real, lr, lifetime, progress_of):
        seen.append(real(0))
        seen.append(real(1))
        return images, targets

    monkeypatch.setattr(evaluation, "krr_st", spy)
    judge(copied, "--sets", "krr_st:2", "--seeds", 0, "--labels", 5)
    s = settings(teacher_width=8, max_pool=1, standardize=1)
    f_T = models.teacher_network(s, 32)
    f_T.load_state_dict(data.load(copied / "run/teacher.pt"))
    for x, y in seen:
        z = models.encode(f_T.eval().features, x)
        expected = (z - f_T.head.running_mean) / (f_T.head.running_var + 1e-5).sqrt()
        assert len(x) == 1024 and torch.allclose(y, expected, atol=1e-4)
        assert not torch.allclose(y, z, atol=1e-2)
    assert not torch.equal(seen[0][0], seen[1][0])


def test_encoders_tasks_and_protocols_of_the_paper(copied, capsys, monkeypatch):
    """Several encoders and tasks in one command; fine-tuning by its own encoder."""
    images, labels = data.draw_shapes(60, 32, np.random.default_rng(3))
    np.savez(
        copied / "other.npz",
        train_images=images[:40],
        train_labels=labels[:40],
        test_images=images[40:],
        test_labels=labels[40:],
    )
    judge(
        copied,
        "--tasks",
        "shapes",
        copied / "other.npz",
        "cars",
        "--sets",
        "none",
        "mkdt",
        "--seeds",
        0,
        1,
        "--labels",
        10,
        "--encoders",
        "convnet:4",
        "resnet10:8",
        "torchvision:mobilenet_v3_small",
        "--paired",
        "none",
    )
    said = capsys.readouterr().out
    assert "left out: cars (cannot read cars" in said
    assert said.count("| shapes | none - row | other | none - row | MSE |") == 3
    monkeypatch.setattr(evaluation, "FINETUNE_STEPS", {"shapes": 2})
    judge(
        copied,
        "--protocol",
        "finetune",
        "--sets",
        "none",
        "mkdt",
        "--seeds",
        0,
        "--labels",
        5,
        "--epochs",
        2,
        "--encoders",
        "convnet_bn:4",
    )
    assert "convnet_bn:4, finetune, 2 epochs" in capsys.readouterr().out


def test_an_encoder_is_probed_in_eval_mode(copied):
    """Batch norm uses its running statistics: features do not depend on the rest of a batch."""
    sets = opened_sets(copied)
    flags = evaluation.parse(["", "--sets", "mkdt"])
    table = evaluation.Table(sets.run, flags)
    name = evaluation.parse_set("mkdt")
    net, _ = evaluation.pretrained(table, "resnet10:4", 0, name)
    x = sets.run.data.normalize(sets.run.data.test_images[:8])
    assert not net.training and torch.allclose(net.features(x)[:2], net.features(x[:2]), atol=1e-5)


def test_what_fails_costs_its_own_cells_only(copied, capsys, monkeypatch):
    """A set that diverges, a task that fails, torch's own errors: said once, the rest computed."""
    judge(copied, "--sets", "random@1e30", "random@0.2", "--seeds", 7, 8, "--labels", 5)
    said = capsys.readouterr().out
    assert said.count("left out: random@1e30 ") == 1 and "not finite" in said
    assert {x["set"] for x in lines(copied) if x["seed"] in "78"} == {"random@0.2"}

    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setitem(
        evaluation.PROTOCOLS,
        "linear",
        evaluation.PROTOCOLS["linear"]._replace(scores=out_of_memory),
    )
    said = refused(capsys, judge, copied, "--sets", "random", "--seeds", 9)
    assert "no cell of the table could be computed" in said


def test_an_encoder_that_fails_leaves_the_others(copied, capsys, monkeypatch):
    """Its table is missing, and said; those of the other encoders are printed."""
    pretrained = evaluation.pretrained

    def fails_for_resnets(table, kind, seed, name):
        if kind == "resnet10:4":
            raise ValueError("it diverged")
        return pretrained(table, kind, seed, name)

    monkeypatch.setattr(evaluation, "pretrained", fails_for_resnets)
    encoders = ["--encoders", "resnet10:4", "convnet:4"]
    judge(copied, "--sets", "none", "--seeds", 0, "--labels", 5, *encoders)
    said = capsys.readouterr().out
    assert "left out: none (it diverged)" in said and "convnet:4, linear" in said
    assert "resnet10:4, linear" not in said


def test_a_share_of_labels_that_leaves_nothing_drops_its_column(copied, capsys):
    """Said at the start; the other shares are computed; nothing at all is an error."""
    judge(copied, "--sets", "none", "--seeds", 3, "--labels", 0.1, 5)
    assert "left out: shapes at 0.1% of the labels" in capsys.readouterr().out
    assert {x["labels"] for x in lines(copied) if x["seed"] == "3"} == {"5"}
    said = refused(capsys, judge, copied, "--seeds", 3, "--labels", 0.1)
    assert "no task with enough labels" in said


def test_cells_are_kept_and_those_that_lack_are_made_again(copied, capsys):
    """A results.csv that was cut off is filled up to the same lines; a spreadsheet's is refused."""
    path, whole = copied / "run" / SET / "results.csv", lines(copied)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]) + "random,conv")
    judge(copied)
    assert sorted(map(str, lines(copied))) == sorted(map(str, whole))
    path.write_text(path.read_text().replace(",", ";"))
    assert "results.csv is not as this program writes it" in refused(capsys, judge, copied)


def test_the_rows_of_a_table():
    """The best mean apart from full is bold; the paper's mean and the paired difference follow."""
    scores = {"none": (10, 12), "mkdt": (20, 24), "full": (90, 90)}
    lines = []
    for row, accuracies in scores.items():
        for seed, accuracy in enumerate(accuracies):
            key = (row, "convnet, linear, 1 epochs", "shapes", "5", str(seed))
            lines.append(evaluation.Line(*key, "0.1", str(accuracy), "0.5", ""))
    table = argparse.Namespace(rows=list(scores), tasks=["shapes"], paired="mkdt")
    paper = {("5", "none", "shapes"): "9.90"}
    assert list(evaluation.table_rows(table, lines, paper)) == [
        ["5%", "none", "0.1", "2", "11.00 ± 1.41", "9.90", "+11.00", "0.5000"],
        ["5%", "mkdt", "0.1", "2", "**22.00** ± 2.83", "", "", "0.5000"],
        ["5%", "full", "0.1", "2", "90.00 ± 0.00", "", "-68.00", "0.5000"],
    ]


def test_lines_of_another_process_are_kept(copied, monkeypatch):
    """Two processes may evaluate one set at a time: each adds its lines to results.csv."""
    path, compute = copied / "run" / SET / "results.csv", evaluation.compute
    other = path.read_text().splitlines()[-1].replace(",2,", ",77,")

    def while_another_writes(*job):
        path.write_text(f"{path.read_text()}{other}\n")
        return compute(*job)

    monkeypatch.setattr(evaluation, "compute", while_another_writes)
    judge(copied, "--sets", "none", "--seeds", 9)
    assert {"9", "77"} <= {line["seed"] for line in lines(copied)}


def test_one_place_to_change(tmp_path, capsys):
    """A loss, an objective, a student and a start of one's own, as README shows, in all stages."""
    readme = (FOLDER / "README.md").read_text()
    code = readme.split("## Make it yours")[1].split("```python")[1].split("```")[0]
    tables = models.SSL, models.OBJECTIVES, models.ENCODERS, mkdt.STARTS
    before = [dict(table) for table in tables]
    try:
        exec(code, {**vars(models), **vars(mkdt)})
        run(
            *at(tmp_path),
            *TINY,
            "--ssl",
            "spectral",
            "--objective",
            "cosine",
            "--student",
            "mlp",
            "--init",
            "extremes",
            "--width",
            "16",
        )
        check_own_ideas(tmp_path)
    finally:
        for table, kept in zip(tables, before):
            table.clear()
            table.update(kept)
    for flag, value in (
        ("--ssl", "moco"),
        ("--objective", "l1"),
        ("--init", "best"),
        ("--student", "vit"),
    ):
        assert value in refused(capsys, run, *at(tmp_path, value), *TINY, flag, value)
    said = refused(capsys, run, *at(tmp_path, "bn"), *TINY, "--student", "resnet10")
    assert "batch norm" in said and not (tmp_path / "bn").exists()  # before the teacher


def check_own_ideas(root):
    """The student, the objective and the start of README reach every stage."""
    name = "5pct_extremes"
    assert {x["how"] for x in lines(root, name)} == {"mlp:16, linear, 1 epochs"}
    z = data.load(root / "run/representations.pt")
    net = models.build(lambda: models.encoder("mlp:16", 64, 32), 0, "evaluation encoder")
    d = data.load_dataset("shapes", root / "data")
    out = models.encode(net, d.test_images, d.normalize)
    known = data.load(root / "run/representations_test.pt")["representations"]
    distance = (1 - F.cosine_similarity(out, known)).mean().item()
    mse = [float(x["mse"]) for x in lines(root, name) if x["set"] == "none" and x["seed"] == "0"]
    assert mse[0] == pytest.approx(distance, rel=1e-4)  # Eq. 2 follows the objective
    some = data.load_dataset("shapes", root / "data", train_images=200)
    x = some.normalize(some.train_images)
    f = models.functional(net)
    losses = []
    for i in range(2):
        theta = data.load(root / f"run/experts/expert_00{i}.pt")[1]
        losses.append(1 - F.cosine_similarity(f(theta, x), z))
    order = data.load(root / "run" / name / "init.pt")["order"]
    assert (torch.stack(losses).mean(dim=0)[order].diff() <= 1e-5).all()


# ---- Trust -------------------------------------------------------------------------------------
def test_bad_flags_are_one_clear_line(copied, capsys):
    """Exit code 2, the flag and what it must be, before anything is computed."""
    for flags, told in (
        (["--dataset", "nothing"], "unknown data set 'nothing'"),
        (["--percent", "0.1"], "is 0 of 200 images"),
        (["--percent", "101"], "and 100"),
        (["--syn-lr", "nan"], "between 0 and 1e+09"),
        (["--expert-lr", "-1"], "--expert-lr -1.0 must be"),
        (["--iterations", "0"], "between 1 and"),
        (["--device", "tpu"], "--device tpu"),
        (["--teacher-batch", "1"], "between 2 and"),
        (["--name", "a/b"], "--name a/b"),
        (["--crop-scale", "1.5"], "and 1"),
        (["--ssl", "x"], "choose from"),
        (["--max-start-epoch", "5"], "must be at least T+ + M = 6"),
        (["--image-size", "7"], "--image-size 7: it must be at least 8"),
        (["--objective", "ce", "--run-dir", str(copied / "ce")], "needs a teacher"),
        (["--run-dir", str(copied / "run/teacher.pt")], "Not a directory"),
    ):
        assert told in refused(capsys, run, *at(copied), *TINY, *flags), flags
    for flags, told in (
        (["--sets", "moco"], "unknown set 'moco'"),
        (["--epochs", "-3"], "--epochs -3"),
        (["--tasks", "x"], "no task with"),
        (["--encoders", "vgg"], "unknown enc"),
        (["--labels", "inf"], "--labels inf"),
        (["--labels", "0.01"], "no task with"),
        (["--paired", "full"], "--paired full is not one of the sets"),
        (["--sets", "distilled:none.pt"], "none.pt does not exist"),
        (["--sets", "mkdt:7"], "distilled_00007.pt does not exist"),
    ):
        assert told in refused(capsys, judge, copied, "--seeds", 9, *flags), flags


def test_a_set_without_its_run_is_one_line(copied, capsys):
    """Its folder copied away, or another folder altogether."""
    shutil.copytree(copied / "run" / SET, copied / "away")
    said = refused(
        capsys, evaluation.main, [str(copied / "away"), "--data-dir", str(copied / "data")]
    )
    assert "representations.pt does not exist" in said
    said = refused(capsys, evaluation.main, [str(copied)])
    assert "describes no distilled set" in said


def test_files_that_cannot_be_used_are_named_and_nothing_is_lost(copied, capsys):
    """A truncated expert, one of another size, a lost log."""
    expert = copied / "run/experts/expert_001.pt"
    expert.write_bytes(expert.read_bytes()[:500])
    shutil.rmtree(copied / "run" / SET)
    assert "expert_001.pt is damaged" in refused(capsys, run, *at(copied), *TINY)
    data.save(expert, torch.zeros(3, 5))
    assert "expert_001.pt holds [3, 5]" in refused(capsys, run, *at(copied), *TINY)
    expert.unlink()
    for stage in ("experts", "init", "distill"):
        run(*at(copied), *TINY, "--stage", stage)
    assert data.load(expert).shape[0] == 3
    (copied / "run" / SET / "log.jsonl").unlink()
    run(*at(copied), *TINY, "--iterations", "3", "--stage", "distill")


def command(script, *arguments, **environment):
    """A process of its own."""
    return subprocess.Popen(
        [sys.executable, script, *map(str, arguments)],
        cwd=FOLDER,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
        errors="replace",
    )


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(tmp_path):
    """SIGKILL at a random moment of each stage, and the same command: the same bits."""
    images, labels = data.draw_shapes(440, 16, np.random.default_rng(0))
    np.savez(
        tmp_path / "x.npz",
        train_images=images[:400],
        train_labels=labels[:400],
        test_images=images[400:],
        test_labels=labels[400:],
    )
    flags = [
        "--dataset",
        tmp_path / "x.npz",
        *TINY[4:],
        "--train-images",
        100,
        "--teacher-epochs",
        6,
        "--teacher-batch",
        20,
        "--expert-epochs",
        8,
        "--experts",
        4,
        "--iterations",
        20,
        "--checkpoint-minutes",
        1e-4,
        "--percent",
        10,
        "--log-seconds",
        0,
    ]
    whole = command("mkdt.py", "--run-dir", tmp_path / "run", *flags, PYTHONIOENCODING="cp1252")
    said = whole.communicate()[0]
    assert whole.returncode == 0, said
    rng, resumed = random.Random(0), ""
    for stage in ("teacher", "experts", "distill", "eval"):
        process = command("mkdt.py", "--run-dir", tmp_path / "killed", *flags)
        for line in process.stdout:
            resumed += line
            if re.match(rf"{stage} +\d", line) and rng.random() < 0.4:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = command("mkdt.py", "--run-dir", tmp_path / "killed", *flags)
    said = last.communicate()[0]
    assert last.returncode == 0, said
    assert "resuming from" in resumed + said
    for path in sorted((tmp_path / "run").rglob("*.pt")):
        one = data.load(path)
        other = data.load(tmp_path / "killed" / path.relative_to(tmp_path / "run"))
        assert leaves(one) == leaves(other), path
    results = [
        (tmp_path / f / "10pct_high_loss/results.csv").read_text() for f in ("run", "killed")
    ]
    assert sorted(results[0].split()) == sorted(results[1].split())
    assert len(results[0].splitlines()) == 2 * 3 * 8 + 1


def leaves(value):
    """All tensors and numbers in a nested value, as bytes and words."""
    if torch.is_tensor(value):
        return value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: leaves(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [leaves(v) for v in value]
    return repr(value)


# ---- Several processes -------------------------------------------------------------------------
def ssl_gradient(loss_of, z, rank=0, ranks=1):
    """The gradient of a projection head by a self-supervised loss over two views z [2B, 6]."""
    head = nn.Linear(6, 5).double()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 30).view(5, 6).sin())
        head.bias.zero_()
    halves = [data.rows_of_all_ranks(head(view[rank::ranks])) for view in z.chunk(2)]
    loss_of(*halves, settings(lambd=0.1)).backward()
    data.sum_over_ranks([head.weight.grad])
    return head.weight.grad


def shared_loss(rank, folder):
    """What each of two processes does: its share of the batch, and the result to a file."""
    data.RANK, data.RANKS = rank, 2
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    z = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {}
    for name in ("barlow", "simclr"):
        made[name] = ssl_gradient(models.SSL[name].loss, z, rank, 2)
    torch.save(made, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_self_supervised_gradient_of_the_whole_batch(tmp_path):
    """Each rank projects half of the batch; the summed gradient is that of one process."""
    torch.multiprocessing.spawn(shared_loss, (tmp_path,), nprocs=2)
    z = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rank in range(2):
        for name, grad in data.load(tmp_path / f"{rank}.pt").items():
            assert relative(grad, ssl_gradient(models.SSL[name].loss, z)) < 1e-10


def test_two_ranks_make_a_run_that_one_goes_on_with(tmp_path, capsys):
    """Rank 0 alone speaks, the experts are those of one process, and one process can go on."""
    two = command(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "mkdt.py",
        *at(tmp_path),
        *TINY,
        "--device",
        "cpu",
        OMP_NUM_THREADS="1",
    )
    said = two.communicate(timeout=200)[0]
    assert two.returncode == 0, said
    assert said.count("distill:") == 1 and "| mkdt |" in said
    assert len(lines(tmp_path)) == 2 * 3 * 8
    run(*at(tmp_path), *TINY)
    assert "eval          1/" not in capsys.readouterr().out  # nothing was left to do
    z = tmp_path / "run/representations.pt"
    torch.set_num_threads(1)  # as the ranks have: threads change the rounding
    for stage in ("teacher", "experts"):
        run(
            *at(tmp_path, "one"),
            *TINY,
            "--stage",
            stage,
            "--representations",
            z,
            "--standardize",
            0,
        )
    torch.set_num_threads(2)
    for name in ("experts/expert_000.pt", "experts/expert_001.pt"):
        one, other = (data.load(tmp_path / f / name) for f in ("run", "one"))
        assert torch.equal(one, other)


# ---- What is documented is true ----------------------------------------------------------------
def test_help_lists_each_flag_with_the_default_that_is_used(capsys):
    """mkdt.py's defaults are those of CIFAR-10 at 2%; eval.py's those of its parser."""
    with pytest.raises(SystemExit):
        mkdt.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    used = mkdt.resolve("cifar10", {})
    assert capsys.readouterr().out == ""  # nothing was chosen
    for name, value in used.items():
        told = re.search(rf"--{name.replace('_', '-')} [A-Z]+ (.*?)\(default: (.*?)\)", text)
        assert told and told[2] == str(value), name
    with pytest.raises(SystemExit):
        evaluation.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in evaluation.SETS:
        assert f" {name} " in text.split("sets:")[-1]
    assert f"(default: {' '.join(evaluation.DEFAULT_SETS)})" in text


def test_settings_are_those_of_appendix_a(capsys):
    """A.1's teacher, experts, distillation and evaluation; Tables 8 and 9."""
    paper = dict(
        ssl="barlow",
        teacher_batch=256,
        teacher_lr=0.01,
        teacher_decay=1e-6,
        lambd=1 / 128,
        teacher_width=64,
        temperature=0.5,
        crop_scale=0.08,
        grey=0.2,
        expert_lr=0.1,
        expert_momentum=0.9,
        expert_decay=1e-4,
        expert_batch=256,
        experts=100,
        syn_batch=256,
        syn_lr=0.1,
        syn_lr_lr=1e-4,
        syn_momentum=0.5,
        iterations=5000,
        pretrain_epochs=20,
        pretrain_batch=256,
        pretrain_lr=0.1,
        width=128,
        init="high_loss",
        percent=2.0,
    )
    values = mkdt.resolve("cifar10", {})
    assert {name: values[name] for name in paper} == paper
    for (dataset, percent), row in {
        ("cifar10", 2): (40, 2, 5, 1e3),
        ("cifar100", 2): (40, 2, 2, 1e3),
        ("tinyimagenet", 2): (10, 2, 2, 1e5),
        ("cifar10", 5): (40, 2, 5, 1e4),
        ("cifar100", 5): (40, 2, 5, 1e4),
        ("tinyimagenet", 5): (10, 2, 2, 1e5),
    }.items():
        s = mkdt.resolve(dataset, {"percent": float(percent)})
        assert row == (s["syn_steps"], s["match_epochs"], s["max_start_epoch"], s["pixel_lr"])
        assert s["max_start_epoch"] + s["match_epochs"] <= s["expert_epochs"]
    assert capsys.readouterr().out == ""
    tiny = mkdt.resolve("tinyimagenet", {})
    assert (tiny["lambd"], tiny["crop_scale"], tiny["grey"], tiny["max_pool"]) == (
        1 / 1024,
        0.2,
        0.1,
        1,
    )
    simclr = mkdt.resolve("cifar10", {"ssl": "simclr"})
    assert (simclr["teacher_batch"], simclr["teacher_lr"], simclr["teacher_epochs"]) == (
        512,
        1e-3,
        400,
    )


def test_what_is_chosen_for_the_user_is_said(capsys):
    """A percentage without a row, and a data set without settings."""
    mkdt.resolve("cifar10", {"percent": 1.0})
    said = capsys.readouterr().out
    assert said == "there are no settings for 1% of cifar10: using those for 2%\n"
    for size, known in ((32, "cifar10"), (63, "cifar10"), (64, "tinyimagenet")):
        values = mkdt.resolve("pets", {}, size)
        said = capsys.readouterr().out
        assert said == f"there are no settings for pets: using those for {known} at 2%\n"
        assert values["syn_steps"] == (40 if known == "cifar10" else 10)


def test_the_settings_that_matter_are_printed(finished, capsys):
    """As name=value, in lines of at most 100 columns, without those that play no role."""
    run(*at(finished), *TINY)
    said = capsys.readouterr().out
    assert "ssl=barlow" in said and "lambd=" in said and "temperature=" not in said
    assert "representations=" not in said and "syn_steps=2" in said
    assert max(len(line) for line in said.split("## shapes")[0].splitlines()) <= 100


def readme_commands():
    """The commands in README.md, continuation lines included: [(script, arguments)]."""
    text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
    found = re.findall(r"^(?:RUN=\S+ )?python (mkdt|eval)\.py ([^#`|\n]*)", text, re.MULTILINE)
    return [(script, shlex.split(flags, comments=True)) for script, flags in found]


def test_every_command_of_the_readme_can_be_parsed():
    """Each flag exists, and each set that a command names."""
    commands = readme_commands()
    assert len(commands) > 15
    for script, flags in commands:
        if "--help" in flags:
            continue
        if script == "mkdt":
            _, given = mkdt.parse(flags)
            mkdt.check_settings(given)
            continue
        args = evaluation.parse(flags)
        for text in args.sets or []:
            evaluation.parse_set(text)
        for name in args.tasks or []:
            assert name in [*data.OFFICIAL, "all"] or name.endswith(".npz"), name


def test_the_code_keeps_its_promises():
    """Files use each other one way, lines are at most 100 columns, functions one screen."""
    order = ["data", "models", "eval", "mkdt"]
    total = 0
    for name in order:
        text = (FOLDER / f"{name}.py").read_text()
        total += len(text.splitlines())
        assert max(map(len, text.splitlines())) <= 100, name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module in order:
                assert order.index(node.module) < order.index(name)
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 45, node.name
                assert len(node.args.args) <= 8, node.name


# ---- With a GPU: MKDT_GPU=1 python -m pytest -k gpu --------------------------------------------
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or MKDT_GPU not set")


@needs_gpu
def test_the_matching_gradient_on_a_gpu():
    """In float64 it equals the plain form's gradient on the CPU."""
    loss, theta, target, images, lr, steps = matching_problem(6)
    exact = differentiated(loss, theta, target, images, lr, steps)
    network = models.build(tiny_convnet, 0, "test").double().cuda()
    on_gpu = [(batch.cuda(), y.cuda()) for batch, y in steps]
    result = mkdt.matching_gradient(
        mkdt.InnerStep(loss_of_theta(network)),
        theta.cuda(),
        target.cuda(),
        images.cuda(),
        lr.cuda(),
        on_gpu,
    )
    for a, b in zip(result, exact):
        assert relative(a.cpu(), b) < 1e-9


@needs_gpu
@pytest.mark.parametrize("flag", ["--compile", "--no-compile"])
def test_all_stages_run_on_a_gpu(tmp_path, flag):
    """The whole pipeline, compiled and not."""
    run(*at(tmp_path), *TINY, flag)
    assert len(lines(tmp_path)) == 2 * 3 * 8
