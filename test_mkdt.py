"""Tests of MKDT: every formula against an independent one, every fast path against a naive one, and
the real commands.

    python -m pytest"""
import argparse
import contextlib
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

if "MKDT_GPU" not in os.environ:                                    # bits are equal on CPUs only
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
    args = mkdt.parse([])
    s = argparse.Namespace(**{**vars(args), **vars(mkdt.resolve("cifar10", {})), **changes})
    s.device = torch.device("cpu")
    return s


# ---- Losses and networks -----------------------------------------------------------------------
def test_barlow_twins_loss_is_equation_1():
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 7, 4, generator=g, dtype=torch.float64)
    lambd, expected = 0.3, 0.0
    for i in range(4):
        for j in range(4):
            a = (z1[:, i] - z1[:, i].mean()) / (z1[:, i].var(correction=0) + 1e-5).sqrt()
            b = (z2[:, j] - z2[:, j].mean()) / (z2[:, j].var(correction=0) + 1e-5).sqrt()
            f = sum(a[k] * b[k] for k in range(7)) / 7
            expected += (1 - f) ** 2 if i == j else lambd * f ** 2
    assert torch.allclose(models.barlow_twins_loss(z1, z2, lambd), expected, rtol=1e-10)


def test_nt_xent_loss_is_simclrs():
    g = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    views, total = [*z1, *z2], 0.0
    for i in range(10):
        similar = [float(views[i] @ v / views[i].norm() / v.norm()) / 0.5 for v in views]
        others = sum(math.exp(s) for k, s in enumerate(similar) if k != i)
        total -= similar[(i + 5) % 10] - math.log(others)
    assert float(models.nt_xent_loss(z1, z2, 0.5)) == pytest.approx(total / 10, rel=1e-10)


@pytest.mark.parametrize("size,depth,parameters", [(32, 3, 1348608), (64, 4, 1496448)])
def test_convnet_equals_an_independent_definition(size, depth, parameters):
    ours = models.build(lambda: models.ConvNet(512, size, 128), 0, "x")
    layers, channels = [], 3
    for _ in range(depth):
        layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128), nn.ReLU(),
                   nn.AvgPool2d(2)]
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


def test_resnets_are_torchvisions_with_another_stem():
    ours = models.encoder("resnet18", None, 32).eval()
    theirs = torchvision.models.resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = ours.conv, nn.Identity(), nn.Identity()
    blocks = nn.Sequential(theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4)
    weights = zip(blocks.state_dict(), ours.layers.state_dict().values())
    blocks.load_state_dict(dict(weights))
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours.features(x), theirs.eval()(x), atol=1e-5)
    assert sum(p.numel() for p in ours.parameters()) == 11_168_832
    assert ours.features(torch.randn(1, 3, 64, 64)).shape == (1, 2048)            # 4x4 windows
    assert models.encoder("resnet10:8", 7, 64)(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    pooled = models.ENCODERS["resnet18"](None, 64, 8, True)
    assert pooled.features(torch.randn(2, 3, 64, 64)).shape == (2, 64) == (2, pooled.feature_dim)


def test_networks_that_cannot_work_are_refused_with_the_reason():
    with pytest.raises(InputError, match="oneDNN"):
        models.encoder("resnet18:4", None, 32)
    with pytest.raises(ValueError, match="batch norm"):
        models.functional(models.encoder("resnet10:8", 4, 32))


def test_flat_parameters_round_trip():
    a, b = (models.build(lambda: models.ConvNet(4, 32, 8), 0, name) for name in "ab")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(models.flat_parameters(a), models.flat_parameters(b))
    f = models.functional(b)
    assert torch.allclose(f(models.flat_parameters(a), x), a(x), atol=1e-6)


def test_streams_do_not_depend_on_what_was_drawn():
    a = models.build(lambda: nn.Linear(3, 3), 0, "x", 1).weight
    torch.rand(5)
    assert torch.equal(a, models.build(lambda: nn.Linear(3, 3), 0, "x", 1).weight)
    names = [(s, n, i) for s in (0, 1) for n in ("x", "y") for i in (0, 1)]
    assert len({models.stream(*name).initial_seed() for name in names}) == 8


def test_what_cannot_be_compiled_runs_as_it_is(capsys, monkeypatch):
    def broken(f, **options):
        def call(*args):
            raise RuntimeError("no C++ compiler")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    f = models.compiled(lambda x: 2 * x)
    assert f(torch.ones(2)).tolist() == [2, 2] == f(torch.ones(2)).tolist()
    assert capsys.readouterr().out.count("no C++ compiler") == 1


def test_the_first_shapes_are_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda x: seen.append(len(x)) or f(x))
    f = models.compiled(lambda x: 2 * x, count=2)
    assert [f(torch.ones(n)).sum().item() for n in (3, 2, 3, 1, 2)] == [6, 4, 6, 2, 4]
    assert seen == [3, 2, 3, 2]


# ---- Augmentation against torchvision, image by image ------------------------------------------
@pytest.fixture
def pictures():
    return torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_resized_crop_equals_torchvision(pictures):
    g = torch.Generator().manual_seed(1)
    box = data.random_crops(24, 32, (0.08, 1.0), g)
    flip = torch.rand(24, generator=g) < 0.5
    ours = data.resized_crop(pictures, box, 32, flip)
    for i, (top, left, height, width) in enumerate(torch.stack(box, 1).int().tolist()):
        assert 0 <= top and top + height <= 32 and 0 <= left and left + width <= 32
        theirs = TF.resized_crop(pictures[i], top, left, height, width, [32, 32], antialias=True)
        assert torch.allclose(ours[i], TF.hflip(theirs) if flip[i] else theirs, atol=1e-5)


@pytest.mark.parametrize("name,low,high", [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4),
                                           ("saturation", 0.6, 1.4), ("hue", -0.5, 0.5)])
def test_colour_operations_equal_torchvision(pictures, name, low, high):
    pictures[0] = 0.5                                                  # grey: hue is undefined
    pictures[1, :, :16] = pictures[1, :1, :16]
    amount = torch.linspace(low, high, 24)
    given = 4 * amount if name == "hue" else amount - 1
    ours = data.JITTERS[name](pictures, given.view(-1, 1, 1, 1))
    for i in range(24):
        theirs = getattr(TF, f"adjust_{name}")(pictures[i], float(amount[i]))
        assert torch.allclose(ours[i], theirs, atol=2e-5)


def test_two_views_are_independent_and_reproducible(pictures):
    images = (pictures * 255).byte()
    a, b = data.two_views(images, 7)
    assert a.shape == images.shape and a.min() >= 0 and a.max() <= 1 and not torch.equal(a, b)
    assert torch.equal(a, data.two_views(images, 7)[0])
    assert not torch.equal(a, data.two_views(images, 8)[0])
    same = data.two_views(images[:1].expand(24, -1, -1, -1), 7)[0]
    assert len({tuple(x.flatten().tolist()) for x in same}) == 24     # parameters of their own


def test_two_views_refuses_other_images(pictures):
    for wrong in (pictures, (pictures * 255).byte()[..., :16], (pictures * 255).byte()[:, :1]):
        with pytest.raises(ValueError, match="square uint8"):
            data.two_views(wrong, 0)


def test_shift_and_flip_by_hand():
    images = torch.arange(2 * 3 * 6 * 6.).view(2, 3, 6, 6) + 1
    padded = F.pad(images, [4] * 4)
    for seed in range(10):
        moved = data.shift_and_flip(images, seed)
        for i in range(2):
            windows = [padded[i, :, t:t + 6, l:l + 6] for t in range(9) for l in range(9)]
            assert any(torch.allclose(moved[i], w, atol=1e-4) for x in windows for w in (
                x, x.flip(-1)))
    assert not torch.equal(moved, data.shift_and_flip(images, 0))


# ---- Data sets and files -----------------------------------------------------------------------
def test_shapes_is_deterministic_and_balanced():
    images, labels = data.draw_shapes(300, 32, np.random.default_rng(0))
    again, _ = data.draw_shapes(300, 32, np.random.default_rng(0))
    assert np.array_equal(images, again)
    assert not np.array_equal(images, data.draw_shapes(300, 32, np.random.default_rng(1))[0])
    assert np.bincount(labels).tolist() == [30] * 10
    means = [images[labels == k].mean() for k in range(10)]
    assert max(means) - min(means) < 40                         # brightness does not give it away


def make_folder(root, classes=("cat", "dog"), splits=("train", "test"), count=3):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes or ("",):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def test_a_folder_is_read_sorted_and_squashed(tmp_path):
    root = make_folder(tmp_path / "pets")
    Image.new("L", (5, 5), 9).save(root / "train/cat/0a.png")        # grey, sorted between 0, 1
    d = data.load_dataset(str(root), tmp_path / "cache")
    assert d.name == "pets" and d.train_labels.tolist() == [0] * 4 + [1] * 3 and d.labelled
    assert d.train_images.shape == (7, 3, 32, 32) and (d.train_images[1] == 9).all()
    with Image.open(root / "test/dog/2.png") as image:
        expected = np.array(image.resize((32, 32), Image.Resampling.LANCZOS))
    assert np.array_equal(d.test_images[-1].permute(1, 2, 0).numpy(), expected)
    x = d.normalize(d.train_images)                                   # its own statistics
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(x.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    assert data.load_dataset(str(root), tmp_path / "cache", image_size=64).image_size == 64


def test_odd_images(tmp_path):
    root = tmp_path / "odd ünïcode 图/train"
    root.mkdir(parents=True)
    Image.new("RGBA", (3, 5), (255, 0, 0, 0)).save(root / "b.png")
    Image.new("CMYK", (64, 64)).save(root / "c.jpg")
    d = data.load_dataset(str(root.parent), tmp_path)
    assert d.train_images.amax(dim=(2, 3)).tolist() == [[255, 0, 0], [255, 255, 255]]


def test_a_named_cache_is_used_with_the_authors_constants(tmp_path):
    images = np.full((4, 32, 32, 3), 255, np.uint8)
    np.savez(tmp_path / "cifar10.npz", train_images=images, test_images=images,
             train_labels=np.arange(4), test_labels=np.arange(4))
    d = data.load_dataset("cifar10", tmp_path, train_images=3)
    expected = [(1 - .4914) / .2023, (1 - .4822) / .1994, (1 - .4465) / .2010]
    x = d.normalize(d.train_images)
    assert len(x) == 3 and torch.allclose(x[0, :, 0, 0], torch.tensor(expected))
    assert torch.allclose(d.denormalize(x), torch.ones(1), atol=1e-6)


@pytest.mark.parametrize("change,message", [
    (dict(train_images=np.zeros((4, 32, 32, 3), np.float32)), "uint8"),
    (dict(train_images=np.zeros((4, 3, 32, 32), np.uint8)), "uint8"),
    (dict(train_labels=np.zeros(3, int)), "integers"), (dict(train_labels=np.zeros(4)), "integers"),
    (dict(test_images=np.zeros((4, 16, 16, 3), np.uint8)), "of one size")])
def test_an_npz_is_checked(tmp_path, change, message):
    arrays = dict(train_images=np.zeros((4, 32, 32, 3), np.uint8), train_labels=np.zeros(4, int))
    np.savez(tmp_path / "x.npz", **{**arrays, **change})
    with pytest.raises(InputError, match=message):
        data.load_dataset(str(tmp_path / "x.npz"))


def test_broken_files_are_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    root = make_folder(tmp_path / "pets")
    (root / "train/cat/1.png").write_bytes(b"\x89PNG broken")
    for name, message in (("bad.npz", "bad.npz is not a whole"), ("none.npz", "none.npz is not"),
                          ("pets", "1.png.*repair or remove"), ("nothing", "unknown data set")):
        with pytest.raises(InputError, match=message):
            data.load_dataset(str(tmp_path / name), tmp_path)


def test_files_are_whole_or_absent(tmp_path):
    data.save(tmp_path / "a.pt", {"x": torch.arange(1000.0)})

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="a.pt.*No space left"):
        data.write_file(tmp_path / "a.pt", fails)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert data.load(tmp_path / "a.pt")["x"][-1] == 999
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="b.pt is not a whole torch file"):
        data.load(tmp_path / "b.pt")
    with pytest.raises(InputError, match="cannot write"):
        data.save(tmp_path / "a.pt" / "below.pt", 1)


class Hostile:
    """Pickles to a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_hostile_file_does_not_run(tmp_path):
    torch.save({"x": Hostile(Path.touch, tmp_path / "ran")}, tmp_path / "hostile.pt")
    with pytest.raises(InputError, match="hostile.pt"):
        data.load(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


RED, GREEN, BLUE = (254, 0, 0), (0, 255, 1), (0, 0, 254)
# The official folders: pictures (by colour) and lists, of classes 0 and 1 (train) and 1 (test).
LAYOUTS = {
    "tinyimagenet": ("tinyimagenet/tiny-imagenet-200", {
        "train/n01/images/n01_0.JPEG": RED, "train/n02/images/n02_0.JPEG": GREEN,
        "val/images/val_0.JPEG": BLUE,
        "val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t62\t62\n"}),
    "aircraft": ("fgvc-aircraft-2013b", {
        "data/images/1.jpg": RED, "data/images/2.jpg": GREEN, "data/images/3.jpg": BLUE,
        "data/variants.txt": "707-320\nA 300\n",
        "data/images_variant_trainval.txt": "1 707-320\n2 A 300\n",
        "data/images_variant_test.txt": "3 A 300\n"}),
    "cub2011": ("cub2011/CUB_200_2011", {
        "images/001.A/a.jpg": RED, "images/002.B/b.jpg": BLUE, "images/002.B/c.jpg": GREEN,
        "images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n3 002.B/c.jpg\n",
        "image_class_labels.txt": "1 1\n2 2\n3 2\n", "train_test_split.txt": "1 1\n2 0\n3 1\n"}),
    "dogs": ("dogs", {
        "Images/n01-A/a.jpg": RED, "Images/n02-B/b.jpg": GREEN, "Images/n02-B/c.jpg": BLUE,
        "train_list.mat": {"file_list": np.array([["n01-A/a.jpg"], ["n02-B/b.jpg"]], object),
                           "labels": [[1], [2]]},
        "test_list.mat": {"file_list": np.array([["n02-B/c.jpg"]] * 2, object),
                          "labels": [[2], [2]]}}),
    "cars": ("stanford_cars", {
        "cars_train/1.jpg": RED, "cars_train/2.jpg": GREEN, "cars_test/2.jpg": BLUE,
        "devkit/cars_train_annos.mat": {"annotations": [{"class": 1, "fname": "1.jpg"},
                                                        {"class": 2, "fname": "2.jpg"}]},
        "devkit/cars_meta.mat": {"class_names": np.array(["A", "B"], object)},
        "cars_test_annos_withlabels.mat": {"annotations": [{"class": 2, "fname": "2.jpg"}] * 2}}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_folders(tmp_path, name, monkeypatch):
    monkeypatch.setattr(data, "download_and_extract_archive", lambda *args, **kwargs: None)
    folder, files = LAYOUTS[name]
    for file, content in files.items():
        path = tmp_path / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (40, 30), content).save(path)
        elif isinstance(content, dict):
            pytest.importorskip("scipy.io").savemat(path, content)
        else:
            path.write_text(content)
    d = data.load_dataset(name, tmp_path)
    assert d.image_size == (64 if name == "tinyimagenet" else 32)
    assert d.train_labels.tolist() == [0, 1] and set(d.test_labels.tolist()) == {1}
    for image, colour in zip([*d.train_images, *d.test_images], (RED, GREEN, BLUE)):
        assert (image.float().mean(dim=(1, 2)) - torch.tensor(colour)).abs().max() < 3
    assert (tmp_path / f"{name}.npz").exists()
    assert data.load_dataset(name, tmp_path, 48).image_size == 48


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name in ("cifar10", "tinyimagenet", "cars"):
        with pytest.raises(InputError, match=f"cannot read {name}.*{name}.npz.*README"):
            data.load_dataset(name, tmp_path)
    assert not list(tmp_path.glob("*.npz"))


# ---- Teacher and experts -----------------------------------------------------------------------
def tiny_data(tmp_path, n=24, size=16):
    """A small labelled Dataset."""
    images, labels = data.draw_shapes(n + 10, size, np.random.default_rng(0))
    np.savez(tmp_path / "tiny.npz", train_images=images[:n], train_labels=labels[:n],
             test_images=images[n:], test_labels=labels[n:])
    return data.load_dataset(str(tmp_path / "tiny.npz"))


def test_warmup_cosine():
    rate = [models.warmup_cosine(step, 100, 2, 1.0) for step in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9] == rate[10] == pytest.approx(1)
    assert rate[55] == pytest.approx(1e-3 + 0.999 / 2) and 1e-3 < rate[99] < 2e-3
    assert models.warmup_cosine(0, 10**6, 100, 1.0) == pytest.approx(1e-3)          # ten epochs


@pytest.mark.parametrize("ssl", ["barlow", "simclr"])
def test_a_teacher_resumes_bit_for_bit(tmp_path, ssl):
    dataset = tiny_data(tmp_path)
    s = settings(ssl=ssl, teacher_epochs=3, teacher_batch=8, teacher_lr=1e-2)

    def learn(name, stop=None):
        encoder = models.build(lambda: models.encoder("resnet18:8", None, 16), 0, "teacher")
        head = models.build(lambda: models.SSL[ssl][1](encoder.feature_dim), 0, "head")
        model = nn.Sequential(encoder, head)
        optimizer = torch.optim.Adam(model.parameters(), s.teacher_lr, weight_decay=1e-6)
        state = dict(model=model, optimizer=optimizer)
        first = data.restore(tmp_path / name, **state)
        loop = mkdt.train_teacher(model, optimizer, dataset, s, first)
        log = data.Log(minutes=0)
        for step, _ in data.follow("teacher", loop, 9, log, tmp_path / name, **state):
            if step == stop:                                   # killed: the step before is saved
                break
        return model.state_dict()
    whole, killed = learn("a.pt"), learn("b.pt", stop=5)
    resumed = learn("b.pt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not torch.equal(whole["1.0.weight"], killed["1.0.weight"])


def problem(n=10, d=4, width=4, dtype=torch.float64):
    """A tiny distillation problem: model, loss(theta, x, y), theta, images, representations."""
    model = models.build(lambda: models.ConvNet(d, 8, width, depth=2), 0, "test").to(dtype)
    g = torch.Generator().manual_seed(0)
    return (model, mkdt.student_loss(models.functional(model), models.mse),
            models.flat_parameters(model), torch.randn(n, 3, 8, 8, generator=g, dtype=dtype),
            torch.randn(n, d, generator=g, dtype=dtype))


def expert(epochs, objective="mse"):
    model, _, _, images, z = problem()
    s = settings(objective=objective, expert_epochs=epochs, expert_lr=0.1, expert_batch=4)
    return mkdt.train_expert(model, lambda x, y: models.mse(model, x, y).mean(),
                             models.batches(10, 4, epochs, 5, "expert order"),
                             lambda batch, draw: (images[batch], z[batch]), s, 5)


def test_an_expert_is_sgd_by_hand_and_keeps_copies():
    thetas, losses = expert(3)
    assert thetas.shape[0] == 4 and len(losses) == 3
    assert torch.equal(thetas[:3], expert(2)[0])                     # shorter training: a prefix
    assert all(not torch.equal(a, b) for a, b in zip(thetas, thetas[1:]))
    model, loss, theta, images, z = problem()
    assert torch.equal(thetas[0], theta)
    velocity = torch.zeros_like(theta)
    for epoch in range(3):
        order = torch.randperm(10, generator=models.stream(5, "expert order", epoch))
        for batch in (order[:4], order[4:8], order[8:]):              # the short last one is kept
            g = torch.func.grad(loss)(theta, images[batch], z[batch])
            velocity = 0.9 * velocity + g + 1e-4 * theta
            theta = theta - 0.1 * velocity
    assert relative(theta, thetas[-1]) < 1e-12
    assert relative(expert(3, "ssl")[0][-1], thetas[-1]) > 1e-2                      # by Adam


def test_the_loss_of_eq_5_is_the_mean_squared_error():
    model, loss, theta, images, z = problem()
    assert torch.allclose(loss(theta, images, z), F.mse_loss(model(images), z))
    labels = torch.arange(10) % 4
    expected = F.cross_entropy(model(images), labels)
    assert torch.allclose(models.cross_entropy(model, images, labels).mean(), expected)
    views = (lambda x: x.flip(-1), lambda x: 2 * x)
    expected = models.nt_xent_loss(model(images.flip(-1)), model(2 * images))
    assert torch.allclose(models.simclr(model, images, views), expected)


def test_the_high_loss_subset_by_hand():
    def f(theta, x):                                           # representation: theta * mean pixel
        return theta * x.mean(dim=(1, 2, 3))[:, None].expand(-1, 2)
    pixels = torch.tensor([0, 1, 2, 3, 3], dtype=torch.uint8)
    images, one = pixels[:, None, None, None].expand(-1, 3, 2, 2), torch.ones(3, 1, 1)
    d = data.Dataset("x", images, pixels, images, pixels, 0 * one, one / 255)
    z = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    thetas = [torch.tensor(1.0), torch.tensor(0.0)]
    losses = evaluation.loss_per_image(f, thetas, d, z, models.mse)
    # theta 1: (4+0)/2, 0, (4+4)/2, (0+9)/2, same;  theta 0: (4+0)/2, 1, 0, 9/2, same
    assert torch.allclose(losses, torch.tensor([2.0, 0.5, 2.0, 4.5, 4.5]), atol=1e-5)
    tied = torch.tensor([2.0, 0.5, 2.0, 4.5, 4.5])
    assert evaluation.highest(tied, 3).tolist() == [3, 4, 0]          # ties: the lower index


# ---- The matching gradient and Algorithm 1 -----------------------------------------------------
def unrolled_gradient(loss, theta, target, images, lr, steps):
    """The oracle: Eq. 4 as one function of images and rate, Eq. 8 inside it, differentiated as a
    whole."""
    def matching_loss(images, lr):
        end = theta
        for batch, y in steps:
            end = end - lr * torch.func.grad(loss)(end, images[batch], y)
        return (end - target).square().sum() / (theta - target).square().sum()
    gradients, value = torch.func.grad_and_value(matching_loss, argnums=(0, 1))(images, lr)
    return value, *gradients


def matching_problem(steps, dtype=torch.float64):
    _, loss, theta, images, z = problem(dtype=dtype)
    noise = torch.randn(len(theta), generator=torch.Generator().manual_seed(3), dtype=dtype)
    # 10 images in batches of 4: short last batches, and from the fourth on images that come again
    drawn = mkdt.draw_batches(10, steps, 4, torch.Generator().manual_seed(4))
    return (loss, theta, theta + 0.1 * noise, images, torch.tensor(0.5, dtype=dtype),
            [(batch, z[batch]) for batch in drawn])


def ours(loss, *rest):
    return mkdt.matching_gradient(*mkdt.inner_steps(loss), *rest)


@pytest.mark.parametrize("steps", range(1, 9))
def test_the_matching_gradient_is_exact(steps):
    loss, *rest = matching_problem(steps)
    for a, b in zip(ours(loss, *rest), unrolled_gradient(loss, *rest)):
        assert relative(a, b) < 1e-9


def test_the_matching_gradient_in_float32_and_compiled():
    loss, *rest = matching_problem(6, torch.float32)
    exact = unrolled_gradient(loss, *rest)
    for a, b in zip(ours(loss, *rest), exact):
        assert relative(a, b) < 1e-4
    steps = [models.compiled(step, count=2) for step in mkdt.inner_steps(loss)]
    for _ in range(2):
        for a, b in zip(mkdt.matching_gradient(*steps, *rest), exact):
            assert relative(a, b) < 1e-3


@pytest.mark.parametrize("system", ["ce", "ssl"])
def test_the_matching_gradient_is_exact_for_other_objectives(tmp_path, system):
    model, _, theta, images, _ = problem()
    loss = mkdt.student_loss(models.functional(model), models.OBJECTIVES[system][0])
    rows = torch.arange(10) % 4 if system == "ce" else None
    one = torch.ones(3, 1, 1)
    d = data.Dataset("x", *[torch.zeros(2, 3, 8, 8)] * 4, 0.5 * one, 0.3 * one)
    targets = evaluation.targets_of(settings(), d, rows)
    drawn = mkdt.draw_batches(10, 5, 4, torch.Generator().manual_seed(4))
    rest = [theta, theta + 0.1, images, torch.tensor(0.5, dtype=theta.dtype)]
    steps = [(b, targets(b, (0, "views", n))) for n, b in enumerate(drawn)]
    for a, b in zip(ours(loss, *rest, steps), unrolled_gradient(loss, *rest, steps)):
        assert b.norm() > 0 and relative(a, b) < 1e-9
    others = [(b, targets(b, (1, "views", n))) for n, b in enumerate(drawn)]
    same = relative(ours(loss, *rest, others)[1], ours(loss, *rest, steps)[1]) < 1e-9
    assert same == (system == "ce")


def test_the_matching_gradient_detaches_what_it_is_given():
    loss, theta, target, images, lr, steps = matching_problem(3)
    expected = ours(loss, theta, target, images, lr, steps)
    attached = [x.clone().requires_grad_() for x in (theta, target, images)]
    for rate in (0.5, lr.clone().requires_grad_()):
        result = ours(loss, *attached, rate, steps)
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(result, expected))


def test_an_inner_step_by_hand_on_a_linear_model():
    # L = (theta x - z)^2, one image: theta' = theta - lr * 2 x (theta x - z)
    loss = mkdt.student_loss(lambda theta, x: theta * x, models.mse)
    theta, x, z, target = (torch.tensor([v], dtype=torch.float64) for v in (0.5, 2.0, 3.0, 1.5))
    stepped = 0.5 - 0.1 * 2 * 2 * (0.5 * 2 - 3)
    value, _, grad_lr = ours(loss, theta, target, x, 0.1, [(torch.tensor([0]), z)])
    assert float(value) == pytest.approx((stepped - 1.5) ** 2)
    assert float(grad_lr) == pytest.approx(2 * (stepped - 1.5) * -(2 * 2 * (0.5 * 2 - 3)))


def test_distillation_is_algorithm_1():
    """Lines 4 - 19 naively: torch.optim.SGD on images and rate, all N steps differentiated."""
    _, loss, theta, images, z = problem()
    experts = [theta + 0.02 * torch.randn(5, len(theta), generator=models.stream(i))
               for i in range(3)]
    s = settings(syn_steps=4, match_epochs=2, max_start_epoch=2, pixel_lr=3.0, syn_lr=0.1,
                 syn_lr_lr=1e-3, syn_batch=6, clip=0.0, iterations=9)
    ours = mkdt.new_syn(images, s)
    for _ in mkdt.distill(*mkdt.inner_steps(loss), experts, ours, lambda batch, draw: z[batch], s):
        pass

    D_syn, alpha_syn = images.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [D_syn], "lr": 3.0},
                                 {"params": [alpha_syn], "lr": 1e-3}], momentum=0.5)
    starts = set()
    for step in range(9):                                                       # line 5
        rng = models.stream(0, "distill", step)
        i = int(torch.randint(3, (), generator=rng))                            # line 6
        t = int(torch.randint(2 + 1, (), generator=rng))                        # line 7: t <= T+
        theta_n = experts[i][t].requires_grad_()                                # lines 8, 9
        for batch in mkdt.draw_batches(10, 4, 6, rng):                          # lines 10 - 12
            L_MSE = loss(theta_n, D_syn[batch], z[batch])
            g, = torch.autograd.grad(L_MSE, theta_n, create_graph=True)
            theta_n = theta_n - alpha_syn * g                                   # lines 13, 14
        start, target = experts[i][t], experts[i][t + 2]
        L_DD = (theta_n - target).square().sum() / (start - target).square().sum()   # 16, 17
        optimizer.zero_grad()
        L_DD.backward()
        optimizer.step()                                                        # line 18
        starts.add((i, t))
    assert {t for _, t in starts} == {0, 1, 2} == {i for i, _ in starts}        # T+ included
    assert relative(ours.images - images, D_syn.detach() - images) < 1e-5
    assert float(ours.lr) == pytest.approx(alpha_syn.item(), rel=1e-5)


def run_distill(tmp_path, iterations, name="a", minutes=5, stop=None, **changes):
    """(the state, the logged values) of `iterations` on a tiny problem, with a checkpoint."""
    s = settings(**{**dict(syn_steps=6, max_start_epoch=2, pixel_lr=3.0, syn_batch=8, clip=0.0,
                           syn_lr_lr=1e-3, iterations=iterations), **changes})
    model, loss, theta, images, z = problem(dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    real, z_real = torch.randn(40, 3, 8, 8, generator=g), torch.randn(40, 4, generator=g)
    few, order = settings(expert_epochs=4, expert_lr=0.05), models.batches(40, 8, 4, 0, "order")
    thetas, _ = mkdt.train_expert(model, lambda x, y: models.mse(model, x, y).mean(), order,
                                lambda batch, draw: (real[batch], z_real[batch]), few, 0)
    syn, values = mkdt.new_syn(images, s), []
    path, log = tmp_path / f"{name}.pt", data.Log(minutes=minutes)
    loop = mkdt.distill(*mkdt.inner_steps(loss), [thetas], syn, lambda batch, draw: z[batch], s,
                        data.restore(path, **vars(syn)))
    for step, value in data.follow("distill", loop, iterations, log, path, **vars(syn)):
        values.append({k: float(v) for k, v in value.items()})
        if step == stop:
            break
    return syn, values


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_distillation_resumes_bit_for_bit(tmp_path, clip):
    whole, _ = run_distill(tmp_path, 6, clip=clip)
    run_distill(tmp_path, 4, "extended", clip=clip)
    run_distill(tmp_path, 6, "killed", minutes=0, stop=4, clip=clip)
    for name in ("extended", "killed"):
        resumed, values = run_distill(tmp_path, 6, name, clip=clip)
        assert len(values) in (2, 3)
        assert torch.equal(whole.images, resumed.images) and whole.lr == resumed.lr
    assert not torch.equal(whole.images, run_distill(tmp_path, 6, "other", seed=1)[0].images)


def test_the_bound_is_per_image_and_leaves_the_ordinary_alone():
    s, lr = settings(clip=0.1, pixel_lr=10.0, syn_lr_lr=1.0), torch.tensor(0.5)
    grad = torch.full((4, 3, 2, 2), 0.005)
    same, rate, touched = mkdt.bound(grad, torch.tensor(0.02), lr, s)
    assert torch.equal(same, grad) and float(rate) == pytest.approx(0.02) and touched == 0
    grad[1], grad[2], grad[3] = 500, 0, torch.nan
    bounded, rate, touched = mkdt.bound(grad, torch.tensor(-7.0), lr, s)
    assert touched == 1 and torch.equal(bounded[0], grad[0]) and (bounded[2] == 0).all()
    assert torch.allclose(10 * bounded[1], torch.full((3, 2, 2), 0.1))
    assert bounded[3].isnan().all() and float(rate) == pytest.approx(-0.05)
    plain = mkdt.bound(grad[:3], torch.tensor(-7.0), lr, settings(clip=0.0))
    assert torch.equal(plain[0], grad[:3]) and plain[1] == -7 and plain[2] == 0


def test_a_run_that_breaks_stops_with_a_reason_and_keeps_the_state_before(tmp_path):
    with pytest.raises(InputError, match="distill: .*nan.*lower its rate"):
        run_distill(tmp_path, 50, pixel_lr=1e20)
    assert not (tmp_path / "a.pt").exists()                            # nothing was good enough
    with pytest.raises(InputError, match="'lr': -"):
        run_distill(tmp_path, 50, "b", minutes=0, syn_lr_lr=0.03)
    assert data.load(tmp_path / "b.pt")["lr"] > 0                       # of the last good step
    syn, _ = run_distill(tmp_path, 20, "c", syn_lr_lr=10.0, clip=0.1)
    moved = syn.images - problem(dtype=torch.float32)[3]
    assert syn.lr > 0 and moved.square().mean(dim=(1, 2, 3)).max() < 16


# ---- Theorem 4.1 and Proposition D.1: by autograd and simulation -------------------------------
def supervised_loss(W, x, y):
    """L_SL of Theorem 4.1 on a batch x [B, d] with one-hot targets y [B, K]."""
    return (x @ W.T - y).square().sum(dim=1).mean()


def spectral_loss(W, x1, x2, x, itself):
    """L_SSL of Theorem 4.1: views x1, x2 [B, d] of the batch, which stands in the second term as
    x; with i = j or not."""
    squares = (x @ W.T @ W @ x.T).square()                                          # [B, B]
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
    rng = torch.Generator().manual_seed(0)
    (x, y), W = sparse_coding_batches(n, d, noise, rng), torch.eye(d, dtype=torch.float64)
    supervised, error = variance(gradients(supervised_loss, W, x, y))
    # g = sum of e x^T over the two, e the noise of x: 2 (E |e|^2 |x|^2 - |E e x^T|^2)
    assert abs(supervised - 2 * (d * noise + noise**2 * (d * d + d))) < error
    for itself in (True, False):
        for strength in (0.0, 1.0):                          # 0: what many views tend to
            x1, x2 = (x + strength * torch.randn(x.shape, generator=rng, dtype=torch.float64)
                      for _ in range(2))
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
        "spectral, views": lambda theta, x, y, a, b: spectral_loss(theta, a, b, a, False)}
    for name, loss in losses.items():
        for batch in (size, n):                             # n: a single part, nothing can vary
            parts = torch.stack([torch.randperm(n, generator=rng) for _ in range(200)])
            parts = parts.view(-1, batch)
            g = gradients(loss, theta, *(values[parts] for values in (x, labels, a, b)))
            ends = theta - rate * g.view(200, -1, *theta.shape).sum(dim=1)
            spread, error = variance(ends)
            if "spectral" in name and batch < n:
                assert spread - error > 1e-3, name
            else:
                assert spread < 1e-24, name


# ---- Judging an encoder ------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_linear_probe_finds_the_optimum(scale):
    g = torch.Generator().manual_seed(0)
    x = scale * torch.randn(60, 5, generator=g, dtype=torch.float64)
    y = torch.randint(3, (60,), generator=g)
    W, b = evaluation.linear_probe(x, y, 3)

    def objective(p):
        penalty = 1e-3 * p[:15].square().sum()
        return F.cross_entropy(x @ p[:15].view(3, 5).T + p[15:], y) + penalty
    best = reached = torch.cat([W.flatten(), b])
    for _ in range(50):                             # Newton, the bias's null direction damped
        hessian = torch.func.hessian(objective)(best) + 1e-9 * torch.eye(18, dtype=x.dtype)
        best = best - torch.linalg.solve(hessian, torch.func.grad(objective)(best))
    assert float(objective(reached)) <= float(objective(best)) + 1e-7


@pytest.mark.parametrize("scale", [30.0, 1e6])
def test_linear_probe_does_not_diverge(scale):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(10, (300,), generator=g)
    x = 50 + scale * (torch.randn(300, 40, generator=g) + 3 * F.one_hot(y, 40))
    W, b = evaluation.linear_probe(x, y, 10)
    assert evaluation.accuracy(x @ W.T + b, y) > 90
    with pytest.raises(ValueError, match="not finite"):
        evaluation.linear_probe(x * torch.nan, y, 10)


def test_labelled_subset():
    counts = [(50000, 1, 500), (1020, 5, 51), (700, 1, 7), (30, 100, 30)]
    assert all(len(evaluation.labelled_subset(n, p, 0)) == count for n, p, count in counts)
    draws = [evaluation.labelled_subset(700, 5, seed) for seed in (0, 1, 0)]
    assert torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[1])
    with pytest.raises(InputError, match="is 0"):
        evaluation.labelled_subset(50, 1, 0)


def test_pretraining_is_plain_sgd_with_momentum():
    model, loss, theta, images, z = problem()
    models.exhaust(evaluation.pretrain(
        model, lambda x, y: models.mse(model, x, y).mean(), models.batches(10, 256, 3, 0, ""),
        lambda batch, draw: (images[batch], z[batch]), 0.2, 1e-4, 0))
    velocity = torch.zeros_like(theta)
    for _ in range(3):                              # 10 images are one batch: order is nothing
        velocity = 0.9 * velocity + torch.func.grad(loss)(theta, images, z) + 1e-4 * theta
        theta = theta - 0.2 * velocity
    assert relative(theta, models.flat_parameters(model)) < 1e-10


def test_finetuning_is_lee_et_als(tmp_path, monkeypatch):
    d = tiny_data(tmp_path)
    encoder = models.build(lambda: models.ConvNet(4, 16, 8), 0, "a").eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    made = []
    monkeypatch.setattr(evaluation, "train", lambda loss, optimizer, order, rate: made.append(
        (optimizer, [rate(0), rate(5000)], sum(1 for _ in order),
         loss(torch.arange(4), 0).item())
    ) or ())
    network = evaluation.finetune(encoder, d, torch.arange(20), 0)
    optimizer, rates, steps, loss = made[0]
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], len(optimizer.param_groups)) == (0.9, 5e-4, 1)
    assert rates == [0.01, pytest.approx(0, abs=1e-9)] and steps == 5000 and not network.training
    draw = models.stream(0, "fine-tuning views", 0).initial_seed()
    x = d.normalize(data.shift_and_flip(d.train_images[:4].float() / 255, draw))
    expected = F.cross_entropy(network.train()(x), d.train_labels[:4]).item()
    assert loss == pytest.approx(expected)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())     # a copy
    d.name = "cifar10"
    evaluation.finetune(encoder, d, torch.arange(20), 0)
    assert made[1][2] == 10_000


# ---- Rivals ------------------------------------------------------------------------------------
def test_krr_loss_is_kernel_ridge_regression():
    g = torch.Generator().manual_seed(0)
    f_syn, y_syn, f_real, y_real = (torch.randn(n, d, generator=g, dtype=torch.float64)
                                    for n, d in ((7, 4), (7, 3), (9, 4), (9, 3)))
    X, X_real = (torch.cat([f, torch.ones(len(f), 1).double()], 1) for f in (f_syn, f_real))
    ridge = 0.01 * float((X @ X.T).trace())
    W = torch.linalg.solve(X.T @ X + ridge * torch.eye(5).double(), X.T @ y_syn)
    result = evaluation.krr_loss(f_syn, y_syn, f_real, y_real, ridge=0.01)
    assert torch.allclose(result, (X_real @ W - y_real).square().mean())


def test_krr_st_lowers_its_loss_and_resumes_bit_for_bit(tmp_path):
    g = torch.Generator().manual_seed(0)
    parts, share = torch.rand(3, 3, 8, 8, generator=g), torch.rand(60, 3, generator=g)
    noisy = share + 0.05 * torch.randn(60, 3, generator=g)
    real = 4 * torch.einsum("nk,kchw->nchw", share / 3, parts) - 1       # targets: the shares
    make = lambda: models.ConvNet(3, 8, 4, depth=2)

    def draw(name, rng):
        batch = torch.randint(60, (30,), generator=rng)
        return real[batch], noisy[batch]

    def run(name, stop=None):
        state = evaluation.krr_state(make, real[:8], noisy[:8], 60, 0, models=3)
        state, path, log = vars(state), tmp_path / name, data.Log(minutes=0)
        loop = evaluation.krr_st(argparse.Namespace(**state), make, draw, 60, 0.003, 0,
                                 data.restore(path, **state))
        for step, _ in data.follow("krr_st", loop, 60, log, path, **state):
            if step == stop:
                break
        return argparse.Namespace(**state)

    @torch.no_grad()
    def quality(images, targets):                        # under encoders it has never seen
        judges = [models.build(make, k, "judge").features for k in range(10)]
        return sum(float(evaluation.krr_loss(f(images), targets, f(real), share)) for f in judges)
    whole = run("a.pt")
    before, after = quality(real[:8], noisy[:8]), quality(whole.images, whole.targets)
    assert after < 0.9 * before, (after, before)
    run("b.pt", stop=37)
    resumed = run("b.pt")
    assert torch.equal(whole.images, resumed.images) and torch.equal(whole.targets, resumed.targets)


def test_dm_moves_every_image_in_every_iteration(tmp_path):
    d, s = tiny_data(tmp_path, 60), settings(crop_scale=0.5)
    make = lambda: models.ConvNet(4, 16, 8, depth=2)
    begin = 0.2 * torch.randn(12, 3, 16, 16, generator=models.stream(0))

    def run(iterations, first=0, syn=None):
        images = begin.clone().requires_grad_()
        syn = syn or argparse.Namespace(
            images=images, optimizer=torch.optim.SGD([images], 1.0, momentum=0.5))
        models.exhaust(evaluation.dm(syn, make, d, s, 4, iterations, 0, first))
        return syn

    def distance(images):
        judges = [models.build(make, 7, k).features for k in range(5)]
        real = d.normalize(d.train_images)
        return sum(float((f(images).mean(dim=0) - f(real).mean(dim=0)).square().sum())
                   for f in judges)
    one, whole = run(1).images.detach(), run(40).images.detach()
    assert ((one - begin).flatten(1).abs().amax(dim=1) > 0).all()
    assert distance(whole) < 0.8 * distance(begin)
    assert torch.equal(whole, run(40, 20, run(20)).images.detach())
    # The first group by hand: its mean against that of 256 real images
    batch = torch.randint(60, (256,), generator=models.stream(0, "dm", "step", 0))
    (real, _), (ours, _) = (evaluation.views_of(s, d, n, (0, "dm", "views", 0, 0)) for n in (256, 3))
    net, x = models.build(make, 0, "dm", 0), begin[:3].clone().requires_grad_()
    theirs = net.features(real(d.normalize(d.train_images[batch]))).mean(dim=0)
    (net.features(ours(x)).mean(dim=0) - theirs).square().sum().backward()
    assert torch.allclose(one[:3], begin[:3] - x.grad, atol=1e-5)


# ---- Sets to pre-train on ----------------------------------------------------------------------
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_index_files(tmp_path, protocol):
    path = str(tmp_path / "x.pkl")
    for content in ([3, 1, 2], {"indices": [3, 1, 2]}, np.array([3, 1, 2]), np.array([3.0, 1, 2]),
                    np.array([3, 1, 2], np.int32), [np.int64(3), np.int64(1), np.int64(2)]):
        Path(path).write_bytes(pickle.dumps(content, protocol))
        assert evaluation.read_indices(path, 4).tolist() == [3, 1, 2]
    np.save(tmp_path / "x.npy", np.array([3, 1, 2]))
    (tmp_path / "x.txt").write_text("3 1\n2\n")
    for kind in ("npy", "txt"):
        assert evaluation.read_indices(str(tmp_path / f"x.{kind}"), 4).tolist() == [3, 1, 2]


@pytest.mark.parametrize("content", [
    [0, 9], [-1], [0.5], [1, 1], [], "abc", {"x": [1]}, Hostile(eval, "open('hacked', 'w')"),
    Hostile(os.system, "touch hacked")])
def test_bad_index_files_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="subset:x.pkl is not a list of indices"):
        evaluation.read_indices("x.pkl", 4)
    assert not Path("hacked").exists()


def test_distilled_sets_of_three_systems(tmp_path):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, 8, 8, generator=g), torch.randn(6, 5, generator=g)
    data.save(tmp_path / "distilled.pt", {"images": x, "targets": y, "lr": 0.2})
    for name, value in (("images_300", nn.Parameter(x)), ("labels_300", y),
                        ("synlr_300", torch.tensor(0.36)), ("x_syn_final", nn.Parameter(x)),
                        ("y_syn", nn.Parameter(y))):
        data.save(tmp_path / f"{name}.pt", value)
    for name, rate in (("distilled.pt", 0.2), ("images_300.pt", 0.36), ("x_syn_final.pt", None)):
        images, targets, lr = evaluation.read_distilled(tmp_path / name)
        assert torch.equal(images, x) and torch.equal(targets, y) and not images.requires_grad
        assert lr == (rate and pytest.approx(rate))
    for bad in ({"images": x, "targets": y[:4]}, {"images": x * torch.nan, "targets": y}, {}):
        data.save(tmp_path / "distilled.pt", bad)
        with pytest.raises(InputError, match="expected finite images"):
            evaluation.read_distilled(tmp_path / "distilled.pt")


def test_set_names():
    for name, parts in (("random", ("random", "", None)), ("random@0.3", ("random", "", "0.3")),
                        ("random:ssl@mkdt", ("random", "ssl", "mkdt")), ("dm:5", ("dm", "5", None)),
                        ("random:ssl:80", ("random", "ssl:80", None)),
                        ("mkdt:1000", ("mkdt", "1000", None)),
                        ("subset:a@b/sas.pkl", ("subset", "a@b/sas.pkl", None)),
                        ("distilled:x:y@0.5", ("distilled", "x:y", "0.5"))):
        assert evaluation.parse_set(name) == parts
    for bad in ("moco", "random:moco", "subset:", "subset", "full:1", "krr_st:x", "@0.3", ""):
        with pytest.raises(InputError, match="unknown set"):
            evaluation.parse_set(bad)


def test_what_leaves_the_paper_is_known():
    def changed(*flags):
        args = mkdt.parse(["--dataset", "shapes", *flags])
        args.device = "cpu"
        return mkdt.open_run(args, args.given).s.changed
    assert changed() == [] == changed("--clip", "0", "--expert-epochs", "20", "--width", "16")
    assert changed("--syn-steps", "3", "--teacher-lr", "1") == ["teacher_lr", "syn_steps"]


def test_the_papers_values():
    paper = evaluation.PAPER
    for key, value in (
            (("cifar10", "2", "barlow", "convnet", "5", "mse_high_loss", "cifar10"), "53.08"),
            (("cifar100", "2", "barlow", "convnet", "1", "mse_random", "cub2011"), "1.66"),
            (("tinyimagenet", "5", "barlow", "convnet", "5", "krr_st", "aircraft"), "4.36"),
            (("cifar100", "5", "barlow", "resnet18", "5", "none", "cifar10"), "10.00"),
            (("cifar10", "2", "simclr", "convnet", "1", "random", "flowers"), "1.83"),
            (("cifar100", "2", "barlow", "finetune", "100", "random:ssl", "cars"), "28.75"),
            (("cifar10", "5", "barlow", "convnet", "1", "ssl_random", "cifar10"), "22.06")):
        assert paper[key] == value
    assert len(paper) == 7 * (12 + 16 + 10 + 18 + 8 + 12 + 18 + 3 + 4 + 4)
    assert {key[-1] for key in paper} == {*evaluation.TASKS, "cars"}


def test_the_papers_value_stands_only_beside_the_same_setting():
    def value(name="mkdt", how="convnet:128, linear, 20 epochs", iterations=5000, paper=True,
              experts=True, **changes):
        s = settings(dataset="cifar10", paper=paper, **changes)
        r = argparse.Namespace(s=s, mkdt={"iterations": iterations},
                               experts_are_the_papers=experts)
        return evaluation.paper_value(r, name, how, "cifar10", "5")
    assert value() == " (53.08)" and value("random", paper=False) == " (46.62)"
    assert value("subset:sas/cifar10.pkl") == " (46.52)" == value("subset:SAS_2pct.pkl")
    assert value("distilled:krr/x_syn_final.pt") == " (46.75)" == value("krr_st")
    for changes in (dict(paper=False), dict(experts=False, name="random"), dict(percent=3.0),
                    dict(init="random"), dict(iterations=400), dict(objective="ce"),
                    dict(how="convnet:64, linear, 20 epochs"), dict(name="mkdt@0.3"),
                    dict(how="convnet:128, linear, 40 epochs"), dict(name="krr_st:1000"),
                    dict(how="convnet:128, finetune, 20 epochs"), dict(name="subset:other.pkl"),
                    dict(objective="ssl", name="random"), dict(name="mkdt:1000"),
                    dict(name="subset:sas.pkl@0.3")):
        assert value(**changes) == "", changes
    assert value("none", objective="ssl") == " (46.23)"                            # no teacher
    assert value(ssl="simclr") == " (51.77)"


def test_paired_difference_by_hand():
    ours, theirs = {"2": 6.0, "1": 4.0, "0": 2.0}, {"0": 1.0, "1": 2.0, "2": 3.0, "7": 9.0}
    assert evaluation.paired(ours, theirs) == f"+2.00 ± {1 / math.sqrt(3):.2f}"
    assert evaluation.paired({"0": 1.0}, theirs) == "" == evaluation.paired(ours, ours)


# ---- The real commands, tiny -------------------------------------------------------------------
TINY = ("--dataset shapes --train-images 200 --teacher-width 8 --teacher-epochs 1 "
        "--teacher-batch 64 --width 4 --experts 2 --percent 5 --init high_loss --expert-epochs 2 "
        "--match-epochs 1 --max-start-epoch 1 --syn-steps 2 --iterations 2 --pretrain-epochs 1 --no-compile").split()
SET = "5pct_high_loss"


def at(root, to="run"):
    """Where a run lies, and its data: `shapes` with few test images, which each probe encodes."""
    path = root / "data/shapes.npz"
    if not path.exists():
        images, labels = data.draw_shapes(400, 32, np.random.default_rng(0))
        path.parent.mkdir(parents=True)
        np.savez(path, train_images=images[:300], train_labels=labels[:300],
                 test_images=images[300:], test_labels=labels[300:])
    return ["--data-dir", str(root / "data"), "--run-dir", str(root / to)]


def run(*arguments):
    mkdt.main([str(a) for a in arguments])


def judge(root, *arguments, name=SET):
    evaluation.main(["--run-dir", str(root / "run" / name), "--data-dir", str(root / "data"),
                     "--no-compile", *map(str, arguments)])


def refused(capsys, call, *arguments):
    """The one line with which a command is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "\n" not in said, said
    return said


def lines(root, name=SET):
    return list(evaluation.read_results(root / "run" / name).values())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished tiny run of every stage."""
    root = tmp_path_factory.mktemp("run")
    run(*at(root), *TINY)
    return root


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_all_stages_leave_what_readme_promises(finished):
    folder, runs = finished / "run" / SET, finished / "run"
    for name in ("teacher.pt", "representations.pt", "representations_test.pt", "config.json",
                 "experts/expert_000.pt", f"{SET}/init.pt", f"{SET}/distilled.pt",
                 f"{SET}/log.jsonl", f"{SET}/distilled.png", f"{SET}/results.csv"):
        assert (runs / name).stat().st_size > 0, name
    d = data.load(folder / "distilled.pt")
    assert d["images"].shape == (10, 3, 32, 32) and d["targets"].shape == (10, 64)
    pixels = d["images"] * d["std"][:, None, None] + d["mean"][:, None, None]
    assert 0.3 < pixels.mean() < 0.7 and d["lr"] > 0 and d["iterations"] == 2
    init, z = data.load(folder / "init.pt"), data.load(runs / "representations.pt")
    order = evaluation.highest(init["losses"], 10)
    assert torch.equal(init["targets"], z[order]) and torch.equal(d["targets"], z[order])
    thetas = data.load(runs / "experts/expert_001.pt")
    assert thetas.shape[0] == 3 and thetas.dtype == torch.float32
    text = (folder / "results.md").read_text()
    assert "| No Pre-Training |" in text and "| MKDT |" in text and "− mkdt" in text
    assert len(lines(finished)) == 2 * 3 * 8
    with Image.open(folder / "distilled.png") as picture:
        assert picture.size[0] > 900 and picture.size[1] > 190


def test_equation_2s_distance_is_that_of_the_encoder(finished):
    d = data.load_dataset("shapes", finished / "data")
    net = models.build(lambda: models.ConvNet(64, 32, 4), 0, "evaluation encoder")
    z = models.encode(net, d.test_images, d.normalize)
    known = data.load(finished / "run/representations_test.pt")
    mse = [float(x["mse"]) for x in lines(finished) if x["set"] == "none" and x["seed"] == "0"]
    assert mse == pytest.approx([F.mse_loss(z, known).item()] * 2, rel=1e-4)


def test_nothing_finished_is_run_again(copied, monkeypatch):
    before = {p: p.read_bytes() for p in copied.rglob("*.pt")}
    for module, name in ((mkdt, "train"), (mkdt, "matching_gradient"), (evaluation, "train")):
        monkeypatch.setattr(module, name, None)
    run(*at(copied), *TINY)
    assert before == {p: p.read_bytes() for p in copied.rglob("*.pt")}


def test_other_settings_are_refused_and_told(copied, capsys):
    for flag, value, told in (("--expert-lr", "0.3", "expert_lr 0.05 -> 0.3"),
                              ("--teacher-epochs", "2", "teacher_epochs 1 -> 2"),
                              ("--train-images", "100", "train_images 200 -> 100"),
                              ("--pixel-lr", "7", "pixel_lr 3000.0 -> 7.0"),
                              ("--seed", "1", "seed")):
        assert told in refused(capsys, run, *at(copied), *TINY, flag, value)
    run(*at(copied), *TINY, "--pixel-lr", "7", "--name", "slow", "--stage", "init")
    run(*at(copied), *TINY, "--pixel-lr", "7", "--name", "slow", "--stage", "distill")
    slow, usual = (data.load(copied / "run" / name / "distilled.pt") for name in ("slow", SET))
    assert not torch.equal(slow["images"], usual["images"])


def test_other_code_is_said(copied, capsys):
    path = copied / "run/config.json"
    config = json.loads(path.read_text())
    config["experts"]["code"] = "00000000"
    path.write_text(json.dumps(config))
    run(*at(copied), *TINY, "--stage", "init")
    assert re.search("experts: .* was made by other code", capsys.readouterr().out)


def test_more_iterations_and_seeds_extend(copied, capsys):
    run(*at(copied), *TINY, "--iterations", "4", "--stage", "distill")
    assert "resuming from" in capsys.readouterr().out
    assert not any("mkdt" in x["set"] for x in lines(copied)) and len(lines(copied)) == 2 * 3 * 4
    run(*at(copied, "fresh"), *TINY, "--iterations", "4")
    one, other = (data.load(copied / f / SET / "distilled.pt") for f in ("run", "fresh"))
    assert torch.equal(one["images"], other["images"]) and one["lr"] == other["lr"]
    judge(copied, "--sets", "random", "mkdt", "--seeds", 0)
    kept = lines(copied)
    judge(copied, "--sets", "random", "mkdt", "--seeds", 0, 5, "--labels", 5)
    assert len(kept) == 26 and len(lines(copied)) == 28 and lines(copied)[:26] == kept


def test_snapshots_are_kept_every_thousand_iterations(copied, monkeypatch):
    s = TINY + ["--name", "long", "--iterations", "2001"]
    zero = lambda theta, target, images, lr: (torch.ones(()), 0 * images, 0 * lr)
    monkeypatch.setattr(mkdt, "matching_gradient", lambda g, a, *rest: zero(*rest[:4]))
    for stage in ("init", "distill"):
        run(*at(copied), *s, "--stage", stage)
    found = sorted(p.name for p in (copied / "run/long").glob("distilled_*.pt"))
    assert found == ["distilled_01000.pt", "distilled_02000.pt"]


def test_experts_are_extended_and_remade_identically(copied):
    first = copied / "run/experts/expert_000.pt"
    before = first.read_bytes()
    first.unlink()
    run(*at(copied), *TINY, "--stage", "experts", "--experts", "3")
    assert first.read_bytes() == before and (copied / "run/experts/expert_002.pt").exists()


def test_representations_of_another_model(tmp_path, capsys):
    z = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    np.save(tmp_path / "z.npy", z)
    run(*at(tmp_path), *TINY, "--representations", tmp_path / "z.npy")
    assert not (tmp_path / "run/teacher.pt").exists()
    assert data.load(tmp_path / "run" / SET / "distilled.pt")["targets"].shape == (10, 6)
    flags = "--sets", "krr_st:2", "--seeds", 0
    assert "teacher.pt does not exist" in refused(capsys, judge, tmp_path, *flags)
    for bad, told in ((z[:100], "must be [200, d]"), (z * np.nan, "not all alike"),
                      (np.ones_like(z), "not all alike")):
        np.save(tmp_path / "bad.npy", bad)
        flags = *at(tmp_path, "other"), *TINY, "--representations", tmp_path / "bad.npy"
        assert told in refused(capsys, run, *flags)
        shutil.rmtree(tmp_path / "other")


def test_unlabelled_images_of_ones_own(tmp_path, capsys):
    root = make_folder(tmp_path / "mine", classes=(), splits=("train",), count=30)
    run("--dataset", root, *at(tmp_path), *TINY[4:], "--percent", "20", "--ssl", "simclr",
        "--teacher-batch", "10", "--init", "random")
    assert "mine has no labels in both splits" in capsys.readouterr().out
    judge(tmp_path, "--tasks", "shapes", "--sets", "mkdt", "--seeds", 0, name="20pct_random")
    assert {x["task"] for x in lines(tmp_path, "20pct_random")} == {"shapes"}


@pytest.mark.parametrize("objective", ["ce", "ssl"])
def test_mtt_and_mtt_ssl_run_end_to_end(tmp_path, objective, capsys):
    flags = [*at(tmp_path), *TINY[:-1], "--init", "random", "--objective", objective]
    flags += ["--expert-batch", "50"]
    run(*flags, "--no-compile", "--stage", "experts")
    for stage in ("init", "distill", "eval"):
        run(*flags, "--no-compile", "--stage", stage)
    sets = {x["set"] for x in lines(tmp_path, "5pct_random")}
    assert sets == {x for x in evaluation.DEFAULT_SETS if "high_loss" not in x}
    (tmp_path / "run/5pct_random/results.csv").unlink()
    judge(tmp_path, "--seeds", 0, "--sets", "random", "initial", "mkdt", name="5pct_random")
    d = data.load(tmp_path / "run/5pct_random/distilled.pt")
    assert not (tmp_path / "run/teacher.pt").exists()
    assert ("targets" in d) == (objective == "ce") and d["images"].isfinite().all()
    assert len(lines(tmp_path, "5pct_random")) == 6
    told = refused(capsys, judge, *[tmp_path, "--sets", "high_loss"])
    assert "5pct_high_loss holds no distilled.pt" in told


def test_figure_1(copied):
    run(*at(copied), *TINY[:10], "--no-compile", "--stage", "figure1", "--width", "4",
        "--iterations", "2", "--syn-steps", "2", "--match-epochs", "1", "--expert-epochs", "3",
        "--percent", "5", "--syn-lr-lr", "1e-7")
    table = (copied / "run/figure1/figure1.csv").read_text().splitlines()
    rows = [line.split(",") for line in table[1:]]
    assert {row[1] for row in rows} == set(mkdt.FIGURE1)
    assert len(rows) == 4 * (3 + 2 + 2)
    assert all(float(row[3]) > 0 for row in rows if row[0] == "variance")
    one, other = (data.load(copied / f"run/figure1/mkdt/experts/expert_00{i}.pt") for i in (0, 1))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_rivals_sets_and_any_rate(copied, capsys):
    d = data.load(copied / "run" / SET / "distilled.pt")
    data.save(copied / "theirs/x_syn.pt", d["images"])
    data.save(copied / "theirs/y_syn.pt", d["targets"])
    (copied / "sas.txt").write_text(" ".join(map(str, range(12))))
    sets = ["full", "krr_st:3", "dm:2", "random:ssl:2", f"distilled:{copied}/theirs/x_syn.pt",
            "mkdt@0.1", "random@0.3", f"subset:{copied}/sas.txt"]
    judge(copied, "--sets", *sets, "--seeds", 0, "--labels", 5)
    scores = {x["set"]: x for x in lines(copied)}
    assert set(sets) < set(scores)
    assert scores["random@0.3"]["rate"] == "0.3" and scores["random:ssl:2"]["mse"] == ""
    assert scores[sets[4]]["accuracy"] == scores["mkdt@0.1"]["accuracy"]     # taken as they are
    made = data.load(copied / "run" / SET / "krr_st_3.pt")
    assert made["images"].shape == (10, 3, 32, 32) and made["targets"].shape == (10, 64)
    assert "KRR-ST" not in (copied / "run" / SET / "results.md").read_text()   # another length


def test_krr_sts_targets_are_recomputed_on_augmented_images(copied, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation, "krr_st", lambda state, make, real, *rest, **more: iter([
        (i + 1, {"loss": torch.zeros(()), "x": seen.append(real((0, "views", i), models.stream(i)))
                 or torch.zeros(())}) for i in range(2)]))
    judge(copied, "--sets", "krr_st:2", "--seeds", 0, "--labels", 5)
    f_T = evaluation.teacher_of(settings(teacher_width=8, max_pool=1, standardize=1), 32)
    f_T.load_state_dict(data.load(copied / "run/teacher.pt"))
    for x, y in seen:
        z = models.encode(f_T.eval().features, x)
        expected = (z - f_T.head.running_mean) / (f_T.head.running_var + 1e-5).sqrt()
        assert len(x) == 1024 and torch.allclose(y, expected, atol=1e-4)
        assert not torch.allclose(y, z, atol=1e-2)


def test_encoders_tasks_and_protocols_of_the_paper(copied, capsys, monkeypatch):
    images, labels = data.draw_shapes(60, 32, np.random.default_rng(3))
    np.savez(copied / "other.npz", train_images=images[:40], train_labels=labels[:40],
             test_images=images[40:], test_labels=labels[40:])
    tasks = ["--tasks", "shapes", str(copied / "other.npz"), "cars"]
    judge(copied, *tasks, "--sets", "none", "mkdt", "--seeds", 0, 1, "--labels", 10,
          "--encoders", "convnet:4", "resnet10:8", "--paired", "none")
    said = capsys.readouterr().out
    assert "left out: cannot read cars" in said
    assert said.count("| shapes | − none | other | − none | MSE |") == 2
    monkeypatch.setattr(evaluation, "FINETUNE_STEPS", {"shapes": 2})
    judge(copied, "--protocol", "finetune", "--sets", "none", "mkdt", "--seeds", 0, "--labels", 5,
          "--epochs", 2)
    assert "convnet:4, finetune, 2 epochs" in capsys.readouterr().out


def test_a_set_that_diverges_costs_its_own_cells_only(copied, capsys):
    judge(copied, "--sets", "random@1e30", "random@0.2", "--seeds", 7, "--labels", 5)
    said = capsys.readouterr().out
    assert "left out: random@1e30, seed 7: " in said and "not finite" in said
    assert [x["set"] for x in lines(copied) if x["seed"] == "7"] == ["random@0.2"]


def test_cells_are_kept_and_those_that_lack_are_made_again(copied):
    path, whole = copied / "run" / SET / "results.csv", lines(copied)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]))
    judge(copied)
    assert sorted(map(str, lines(copied))) == sorted(map(str, whole))


def test_one_place_to_change(tmp_path, monkeypatch, capsys):
    """A loss, an objective, a student and a start of one's own, as README shows, in all stages."""
    readme = (FOLDER / "README.md").read_text()
    code = readme.split("## Make it yours")[1].split("```python")[1].split("```")[0]
    before = [dict(d) for d in (models.SSL, models.OBJECTIVES, models.ENCODERS, mkdt.STARTS)]
    try:
        exec(code, {**vars(models), **vars(mkdt)})
        run(*at(tmp_path), *TINY, "--ssl", "vicreg", "--objective", "cosine", "--student", "mlp",
            "--init", "kmeans", "--width", "16")
        name = "5pct_kmeans"
        assert {x["how"] for x in lines(tmp_path, name)} == {"mlp:16, linear, 1 epochs"}
        init = data.load(tmp_path / "run" / name / "init.pt")
        z = data.load(tmp_path / "run/representations.pt")
        net = models.build(lambda: models.encoder("mlp:16", 64, 32), 0, "evaluation encoder")
        d = data.load_dataset("shapes", tmp_path / "data")
        out = models.encode(net, d.test_images, d.normalize)
        known = data.load(tmp_path / "run/representations_test.pt")
        distance = (1 - F.cosine_similarity(out, known)).mean().item()
        mse = next(float(x["mse"]) for x in lines(tmp_path, name)
                   if x["set"] == "none" and x["seed"] == "0")
        assert mse == pytest.approx(distance, rel=1e-4)                     # Eq. 2 follows
        theta = [data.load(tmp_path / f"run/experts/expert_00{i}.pt")[1] for i in range(2)]
        some = data.load_dataset("shapes", tmp_path / "data", train_images=200)
        f = models.functional(net)
        x = some.normalize(some.train_images)
        losses = [1 - F.cosine_similarity(f(t, x), z) for t in theta]
        assert torch.allclose(init["losses"], torch.stack(losses).mean(dim=0), atol=1e-5)
    finally:
        for d, kept in zip((models.SSL, models.OBJECTIVES, models.ENCODERS, mkdt.STARTS), before):
            d.clear()
            d.update(kept)
    for flag, value in (("--ssl", "moco"), ("--objective", "l1"), ("--init", "best"),
                        ("--student", "vit")):
        z = "--representations", tmp_path / "run/representations.pt"
        assert value in refused(capsys, run, *at(tmp_path, value), *TINY, *z, flag, value)
    flags = "--student", "resnet10", "--width", "8"
    assert "batch norm" in refused(capsys, run, *at(tmp_path, "bn"), *TINY, *flags)


# ---- Trust -------------------------------------------------------------------------------------
def test_bad_flags_are_one_clear_line(copied, capsys):
    for flags, told in ((["--dataset", "nothing"], "unknown data set 'nothing'"),
                        (["--percent", "0.1"], "of 200 training images is 0"),
                        (["--percent", "101"], "is 202"), (["--syn-lr", "nan"], "finite"),
                        (["--expert-lr", "-1"], "--expert-lr -1.0 must be"),
                        (["--iterations", "0"], "at least 1"), (["--device", "tpu"], "--device tpu"),
                        (["--max-start-epoch", "5"], "beyond the experts' last epoch"),
                        (["--objective", "ce", "--run-dir", str(copied / "ce")], "needs a teacher"),
                        (["--run-dir", str(copied / "run/teacher.pt")], "cannot")):
        assert told in refused(capsys, run, *at(copied), *TINY, *flags), flags
    for flags, told in ((["--sets", "moco"], "unknown set 'moco'"),
                        (["--tasks", "x"], "unknown data"), (["--encoders", "vgg"], "unknown enc"),
                        (["--labels", "0.01"], "--labels 0.01 of"),
                        (["--sets", "distilled:none.pt"], "none.pt does not exist")):
        with contextlib.suppress(SystemExit):                       # or said beside the table
            judge(copied, "--seeds", 9, *flags)
        assert told in "".join(capsys.readouterr()), flags


def test_a_truncated_file_is_named_and_nothing_is_lost(copied, capsys):
    expert = copied / "run/experts/expert_001.pt"
    expert.write_bytes(expert.read_bytes()[:500])
    shutil.rmtree(copied / "run" / SET)
    assert "expert_001.pt is not a whole" in refused(capsys, run, *at(copied), *TINY)
    expert.unlink()
    run(*at(copied), *TINY, "--stage", "experts")
    assert data.load(expert).shape[0] == 3


def command(script, *arguments, **environment):
    return subprocess.Popen([sys.executable, script, *map(str, arguments)], cwd=FOLDER, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env={**os.environ, **environment})


def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(tmp_path):
    """SIGKILL at a random moment of each stage, and the same command: the same bits."""
    images, labels = data.draw_shapes(440, 16, np.random.default_rng(0))
    np.savez(tmp_path / "x.npz", train_images=images[:400], train_labels=labels[:400],
             test_images=images[400:], test_labels=labels[400:])
    flags = ["--dataset", tmp_path / "x.npz", *TINY[4:], "--train-images", 100,
             "--teacher-epochs", 6, "--teacher-batch", 20,
             "--expert-epochs", 8, "--experts", 4, "--iterations", 20, "--checkpoint-minutes", 1e-4,
             "--percent", 10, "--log-seconds", 0]
    whole = command("mkdt.py", "--run-dir", tmp_path / "run", *flags)
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
        one, other = (data.load(p) for p in (path, tmp_path / "killed" / path.relative_to(
            tmp_path / "run")))
        assert str(one) == str(other) and pickle.dumps(leaves(one)) == pickle.dumps(leaves(other))
    one, other = (sorted(map(str, evaluation.read_results(folder).values())) for folder in (
        tmp_path / "run/10pct_high_loss", tmp_path / "killed/10pct_high_loss"))
    assert one == other and len(one) == 2 * 3 * 8


def leaves(value):
    """All tensors and numbers in a nested value, as bytes and words."""
    if torch.is_tensor(value):
        return value.detach().contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return [leaves(v) for v in value.values()]
    return [leaves(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


# ---- Several processes -------------------------------------------------------------------------
def ssl_gradient(loss_of, z, rank=0, ranks=1):
    """The gradient of a projection head by a self-supervised loss over two views z [2B, 6]."""
    head = nn.Linear(6, 5).double()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 30).view(5, 6).sin())
        head.bias.zero_()
    halves = [models.rows_of_all_ranks(head(view[rank::ranks])) for view in z.chunk(2)]
    loss_of(*halves, settings(lambd=0.1)).backward()
    models.sum_over_ranks([head.weight.grad])
    return head.weight.grad


def shared_loss(rank, folder):
    """What each of two processes does: its share of the batch, and the result to a file."""
    models.RANK, models.RANKS = rank, 2
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank,
                                         world_size=2)
    z = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {name: ssl_gradient(models.SSL[name][0], z, rank, 2) for name in ("barlow", "simclr")}
    torch.save(made, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_self_supervised_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(shared_loss, (tmp_path,), nprocs=2)
    z = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rank in range(2):
        for name, grad in data.load(tmp_path / f"{rank}.pt").items():
            assert relative(grad, ssl_gradient(models.SSL[name][0], z)) < 1e-10


def test_two_ranks_make_a_run_and_its_experts_are_those_of_one(tmp_path):
    two = command("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "mkdt.py",
                  *at(tmp_path), *TINY, "--device", "cpu", OMP_NUM_THREADS="1")
    said = two.communicate(timeout=200)[0]
    assert two.returncode == 0, said
    assert said.count("distill:") == 1 and "| MKDT |" in said                # rank 0 alone speaks
    assert len(lines(tmp_path)) == 2 * 3 * 8
    assert (tmp_path / "run" / SET / "results_1.csv").exists()
    z = tmp_path / "run/representations.pt"
    torch.set_num_threads(1)                        # as the ranks have: threads change the rounding
    for stage in ("teacher", "experts"):
        run(*at(tmp_path, "one"), *TINY, "--stage", stage, "--representations", z)
    torch.set_num_threads(2)
    for name in ("experts/expert_000.pt", "experts/expert_001.pt"):
        one, other = (data.load(tmp_path / f / name) for f in ("run", "one"))
        assert torch.equal(one, other)


# ---- What is documented is true ----------------------------------------------------------------
@pytest.mark.parametrize("script", [mkdt, evaluation])
def test_help_lists_each_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = re.findall(r" (--[a-z0-9-]+) ", text.split("options:")[1])
    assert len(flags) > 12
    if script is mkdt:
        for name, (_, default, meaning) in mkdt.SETTINGS.items():
            assert f"--{name.replace('_', '-')} {type(default).__name__.upper()}" in text
            assert " ".join(meaning.split()) in text, name


def test_settings_are_tables_8_and_9():
    for (dataset, percent), (N, M, T, pixel_lr) in {
            ("cifar10", 2): (40, 2, 5, 1e3), ("cifar100", 2): (40, 2, 2, 1e3),
            ("tinyimagenet", 2): (10, 2, 2, 1e5), ("cifar10", 5): (40, 2, 5, 1e4),
            ("cifar100", 5): (40, 2, 5, 1e4), ("tinyimagenet", 5): (10, 2, 2, 1e5)}.items():
        s = mkdt.resolve(dataset, {"percent": float(percent)})
        assert (s.syn_steps, s.match_epochs, s.max_start_epoch, s.pixel_lr) == (N, M, T, pixel_lr)
        assert (s.experts, s.iterations, s.syn_lr, s.syn_batch, s.pretrain_epochs) == (
            100, 5000, 0.1, 256, 20)
        assert s.max_start_epoch + s.match_epochs <= s.expert_epochs
    assert mkdt.resolve("cifar10", {"ssl": "simclr"}).teacher_batch == 512
    assert mkdt.resolve("mine", {"image_size": 64}).syn_steps == 10


def test_every_command_of_the_readme_can_be_parsed():
    text = (FOLDER / "README.md").read_text()
    commands = re.findall(r"python (mkdt|eval)\.py ([^#`|\n]*)", text)
    assert len(commands) > 15
    for script, flags in commands:
        if "..." not in flags and "--help" not in flags:
            flags = shlex.split(flags.replace("\\", ""), comments=True)
            (mkdt if script == "mkdt" else evaluation).parse(flags)


# ---- With a GPU: MKDT_GPU=1 python -m pytest -k gpu --------------------------------------------
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or MKDT_GPU not set")


@needs_gpu
def test_the_matching_gradient_on_a_gpu():
    loss, *tensors, steps = matching_problem(6)
    exact = unrolled_gradient(loss, *tensors, steps)
    on_gpu = [x.cuda() for x in tensors]
    model = models.build(lambda: models.ConvNet(4, 8, 4, depth=2), 0, "test").double().cuda()
    loss = mkdt.student_loss(models.functional(model), models.mse)
    result = ours(loss, *on_gpu, [(b.cuda(), y.cuda()) for b, y in steps])
    for a, b in zip(result, exact):
        assert relative(a.cpu(), b) < 1e-9


@needs_gpu
@pytest.mark.parametrize("flags", [[], ["--no-compile"]])
def test_all_stages_run_on_a_gpu(tmp_path, flags):
    run(*at(tmp_path), *TINY[:-1], *flags)
    assert len(lines(tmp_path)) == 2 * 3 * 8
