"""Tests of MKDT: every formula against an independent one, every fast path against a naive one, and the real commands.

    python -m pytest
"""
import base64
import collections
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

GPU = os.environ.get("CUDA_VISIBLE_DEVICES")
if "MKDT_GPU" not in os.environ:                                                        # bits are equal on CPUs only
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch import nn

import data
import eval as evaluation
import mkdt
import models
from data import InputError

torch.set_num_threads(2)


def relative(a, b):
    """Norm of the difference over the norm of b."""
    return float((a - b).norm() / b.norm())


# ------------------------------------------------------------------------------------------------------------
# Losses and networks
# ------------------------------------------------------------------------------------------------------------
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
        positive = (i + 5) % 10
        total -= similar[positive] - math.log(sum(math.exp(s) for k, s in enumerate(similar) if k != i))
    assert float(models.nt_xent_loss(z1, z2, 0.5)) == pytest.approx(total / 10, rel=1e-10)


@pytest.mark.parametrize("size,depth,features,parameters", [(32, 3, 2048, 1348608), (64, 4, 2048, None)])
def test_convnet_equals_an_independent_definition(size, depth, features, parameters):
    torch.manual_seed(0)
    ours = models.ConvNet(512, size, 128)
    layers, channels = [], 3
    for _ in range(depth):
        layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128), nn.ReLU(), nn.AvgPool2d(2)]
        channels = 128
    reference = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 512))
    for block in range(depth):
        reference[4 * block].load_state_dict(ours.convs[block].state_dict())
        torch.nn.init.normal_(ours.norms[block].weight)
        torch.nn.init.normal_(ours.norms[block].bias)
        reference[4 * block + 1].load_state_dict(ours.norms[block].state_dict())
    reference[-1].load_state_dict(ours.head.state_dict())
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in reference.parameters())
    assert parameters is None or count == parameters
    x = torch.randn(3, 3, size, size)
    assert ours.features(x).shape == (3, features)
    assert torch.allclose(ours(x), reference(x), atol=1e-5)
    f = models.functional(ours)
    assert torch.equal(f(models.flat_parameters(ours), x), ours(x))


def test_resnets_have_the_published_shape():
    net = models.resnet18()
    assert net.features(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert sum(p.numel() for p in net.parameters()) == 11_168_832          # torchvision's 11,689,512 - fc - stem change
    assert models.resnet10(out_dim=7, width=8)(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert models.resnet18(width=8, max_pool=True).features(torch.randn(1, 3, 64, 64)).shape == (1, 64)


def test_flat_parameters_round_trip():
    a, b = (models.build(lambda: models.ConvNet(4, 32, 8), 0, name) for name in "ab")
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(models.flat_parameters(a), models.flat_parameters(b))
    assert torch.allclose(models.functional(b)(models.flat_parameters(a), x), a(x), atol=1e-6)
    nn.utils.vector_to_parameters(models.flat_parameters(a), b.parameters())
    assert torch.equal(models.flat_parameters(a), models.flat_parameters(b))


def test_streams_do_not_depend_on_what_was_drawn():
    torch.manual_seed(1)
    a = models.build(lambda: nn.Linear(3, 3), 0, "x", 1).weight
    torch.rand(5)
    assert torch.equal(a, models.build(lambda: nn.Linear(3, 3), 0, "x", 1).weight)
    assert len({models.stream(s, n, i) for s in (0, 1) for n in ("x", "y") for i in (0, 1)}) == 8


# ------------------------------------------------------------------------------------------------------------
# Augmentation against torchvision, image by image
# ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def pictures():
    return torch.rand(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_resized_crop_equals_torchvision(pictures):
    g = torch.Generator().manual_seed(1)
    boxes = data.random_crops(24, 32, (0.08, 1.0), g)
    flip = torch.rand(24, generator=g) < 0.5
    ours = data.resized_crop(pictures, *boxes, 32, flip)
    for i, (top, left, height, width) in enumerate(torch.stack(boxes, 1).int().tolist()):
        assert 0 <= top and top + height <= 32 and 0 <= left and left + width <= 32
        expected = TF.resized_crop(pictures[i], top, left, height, width, [32, 32], antialias=True)
        assert torch.allclose(ours[i], TF.hflip(expected) if flip[i] else expected, atol=1e-5)


def test_random_crops_are_distributed_as_asked():
    top, left, height, width = data.random_crops(20000, 32, (0.2, 0.8), torch.Generator().manual_seed(0))
    share, ratio = height * width / 32**2, width / height
    assert 0.15 < share.min() and share.max() <= 0.85 and abs(share.mean() - 0.5) < 0.02
    assert 0.7 < ratio.min() and ratio.max() < 1.42 and abs(ratio.log().mean()) < 0.01


@pytest.mark.parametrize("ours,theirs,low,high", [
    (data.adjust_brightness, TF.adjust_brightness, 0.6, 1.4), (data.adjust_contrast, TF.adjust_contrast, 0.6, 1.4),
    (data.adjust_saturation, TF.adjust_saturation, 0.6, 1.4), (data.adjust_hue, TF.adjust_hue, -0.5, 0.5)])
def test_colour_operations_equal_torchvision(pictures, ours, theirs, low, high):
    pictures[0] = 0.5                                                                   # grey: hue is undefined
    pictures[1, :, :16] = pictures[1, :1, :16]
    amount = torch.linspace(low, high, 24)
    result = ours(pictures, amount.view(-1, 1, 1, 1))
    for i in range(24):
        assert torch.allclose(result[i], theirs(pictures[i], float(amount[i])), atol=2e-5)
    assert torch.allclose(data.grayscale(pictures), TF.rgb_to_grayscale(pictures), atol=1e-6)


def test_two_views_are_independent_and_reproducible(pictures):
    images = (pictures * 255).byte()
    a, b = data.two_views(images, 7)
    assert a.shape == images.shape and a.min() >= 0 and a.max() <= 1 and not torch.equal(a, b)
    assert torch.equal(a, data.two_views(images, 7)[0]) and not torch.equal(a, data.two_views(images, 8)[0])
    part = data.two_views(images[1::2], 7, part=(1, 2))                        # as a rank draws its share of a batch
    assert torch.allclose(part[0], a[1::2], atol=1e-6) and torch.allclose(part[1], b[1::2], atol=1e-6)
    same = data.two_views(images[:1].expand(24, -1, -1, -1), 7)[0]
    assert len({tuple(x.flatten().tolist()) for x in same}) == 24               # own parameters for every image


# ------------------------------------------------------------------------------------------------------------
# Data sets and files
# ------------------------------------------------------------------------------------------------------------
def test_shapes_is_deterministic_and_balanced():
    a, b = data.make_shapes(200, 100), data.make_shapes(200, 100)
    assert all(np.array_equal(a[k], b[k]) for k in a)
    assert not np.array_equal(a["train_images"], data.make_shapes(200, 100, seed=1)["train_images"])
    assert np.bincount(np.concatenate([a["train_labels"], a["test_labels"]])).tolist() == [30] * 10
    means = [a["train_images"][a["train_labels"] == k].mean() for k in range(10)]
    assert max(means) - min(means) < 40                                          # brightness does not give it away


def make_folder(root, classes=("cat", "dog"), splits=("train", "test"), count=3):
    rng = np.random.default_rng(0)
    for split in splits:
        for name in classes or ("",):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(root / split / name / f"{i}.png")
    return root


def test_folder_is_read_sorted_and_squashed(tmp_path):
    root = make_folder(tmp_path / "pets")
    Image.new("L", (5, 5), 9).save(root / "train/cat/0a.png")                    # grey, sorted between 0 and 1
    d = data.load_dataset(str(root), tmp_path / "cache")
    assert d.name == "pets" and d.train_images.shape == (7, 3, 32, 32) and d.train_labels.tolist() == [0] * 4 + [1] * 3
    assert d.labelled and (d.train_images[1] == 9).all()
    Image.new("L", (5, 5)).save(root / "train/cat/.hidden.png")
    assert len(data.load_dataset(str(root), tmp_path / "cache").train_images) == 7
    for lost in ("test/cow/0.png", "train/0.png", "train/cat/old/0.png"):           # nothing is left out without a word
        (root / lost).parent.mkdir(exist_ok=True)
        Image.new("L", (5, 5)).save(root / lost)
        with pytest.raises(InputError, match=f"{lost} .of 1 such images. has no place"):
            data.load_dataset(str(root), tmp_path / "cache")
        (root / lost).unlink()
    with Image.open(root / "test/dog/2.png") as image:
        expected = torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.LANCZOS)))
    assert torch.equal(d.test_images[-1].permute(1, 2, 0), expected)
    x = d.batch(d.train_images)
    assert torch.allclose(x.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-4)       # its own statistics
    assert torch.allclose(x.std(dim=(0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    assert data.load_dataset(str(root), tmp_path / "cache", image_size=64).image_size == 64


def test_folder_without_classes_is_unlabelled(tmp_path):
    d = data.load_dataset(str(make_folder(tmp_path / "mine", classes=(), splits=("train",))), tmp_path)
    assert len(d.train_images) == 3 and not d.labelled and len(d.test_images) == 0


def test_named_cache_is_used_with_the_authors_constants(tmp_path):
    images = np.full((4, 32, 32, 3), 255, np.uint8)
    np.savez(tmp_path / "cifar10.npz", train_images=images, test_images=images,
             train_labels=np.arange(4), test_labels=np.arange(4))
    d = data.load_dataset("cifar10", tmp_path, train_images=3)
    assert len(d.train_images) == 3
    assert torch.allclose(d.batch(d.train_images)[0, :, 0, 0],
                          torch.tensor([(1 - .4914) / .2023, (1 - .4822) / .1994, (1 - .4465) / .2010]))
    assert torch.allclose(data.denormalize(d.batch(d.train_images), d.mean, d.std), torch.ones(1), atol=1e-6)


def test_tinyimagenet_official_layout(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for w in ("n02", "n01"):
        (root / "train" / w / "images").mkdir(parents=True)
        Image.new("RGB", (64, 64), (int(w[1:]), 0, 0)).save(root / "train" / w / "images" / f"{w}_0.JPEG")
    (root / "val/images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "val/images/val_0.JPEG")
    with pytest.raises(InputError, match="val_annotations.txt is missing"):
        data.load_dataset("tinyimagenet", tmp_path)
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")
    d = data.load_dataset("tinyimagenet", tmp_path)
    assert d.image_size == 64 and d.train_labels.tolist() == [0, 1] and d.test_labels.tolist() == [1]
    assert (tmp_path / "tinyimagenet.npz").exists() and d.mean == data.IMAGENET[0]


# What scipy.io.savemat wrote, compressed: file_list (cells), labels, trnid (uint16), annotations (structs), empty.
MAT_OF_SCIPY = (
    'TUFUTEFCIDUuMCBNQVQtZmlsZSBQbGF0Zm9ybTogcG9zaXgsIENyZWF0ZWQgb246IE1vbiBOb3YgMjMgMTc6Mjc6MTUgMjAyNgAAAAAAAAAAAA'
    'AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABSU0PAAAAVQAAAHic42NgYDgBxGxAzAHEjAwQwArlM0HFQJgTiNMy'
    'c1LjczKLS6Dq+IDYAUk/C5p+kD5eJHMFoPw8A0Ndl/x0/US9rIJ0iswx0nVOLNFPgpoDAO2BDhcPAAAAMgAAAHic42NgYPAAYjYg5oDSIMAK5T'
    'MBMSMUg+RyEpNSc4oZGDiBbAEGGPhgD2U4AAB5sAR9DwAAAIkCAAB4nC2TZXCQBxBE3yMEgiW4E9zd3R2CW3ALEiRACO7u0kIVd2lx6goVXFqo'
    'F6denArOl4GbebOzO3P75+bCgegQSBZoWEAqnk3oc2/AEp9pYpYQHxcbE2jSgMiQxDwJIYELDRqSBxspSBl0pCYN4USQlnSkJwMZyURmspCVbG'
    'QnBznJRSS5yUNe8pGfAhSkEIUpQlGKUZwSlKQUpSlDWcpRngpUpBKVqUJVqlGdGtSkFrWpQ13qUZ8GNKQRjWlCU5rRnCha0JJWtKYNbWlHezrQ'
    'kU5E05kudKUb3elBT3rRmz70JYZ+9GcAA4llEIMZwlDiGMZwRhDPSBIYxWjGMJZxjGcCE5nEZKYwlWlMZwYzmcVs5jCXecxnAQtZxGKWsJQXeJ'
    'FlLOclXuYVXuU1XmcFK1nFatawlnWsZwMb2cRmtrCVbWznDd5kBzvZxW72sJd97Oct3uYd3uU93ucDPuQjPuYTPuUAB/mMz/mCLznEYY5wlGMc'
    '5wQnOcVpvuJrznCWb/iW7/ieH/iRn/iZc5znAhe5xGWucJVf+JXf+J0/+JO/+JtrXOcGN7nFbe5wl3/4l//4n3vc5wEPecRjngTn1ySGmNRQk5'
    'ncMFOY0lSmNo3hRpjWdKY3gxnNZGazmNVsZjeHOc1lpLnNY17zmd8CFrSQhS1iUYtZ3BKWtJSlLWNZy1neCla0kpWtYlWrWd0a1rSWta1jXetZ'
    '3wY2tJGNbWJTm9ncKFvY0la2to1tbWd7O9jRTkbb2S52tZvd7WFPe9nbPvY1xn72d4ADjXWQgx3iUOMc5nBHGO9IExzlaMc41nGOd4ITneRkpz'
    'jVaU53hjOd5WznONd5zneBC13kYhP/5imo7Ku1DwAAAIYAAAB4nONjYGC4wMjAwAakOYCYiQECWKF8RqgYiOYG4sS8vPySxJLM/LxiqDoWsF6Q'
    'vBAQJyXlVzAwJOckFhczpOUl5qZCzeMDYgMGhD3cWOyBYRBggboEXR8nAX1MQBYjVJ8Dkj4WLPo4kfQJQPkGIKCXVZBOgbt1GMlzNxOF7jZEcj'
    'cAo+cTXw8AAAAlAAAAeJzjY2BgsABiNiDmgNIgwArlwwAjVCw1t6CkEkhzQsUBNf8Cpg==')


def test_matlab_files_are_read_as_scipy_writes_them(tmp_path):
    (tmp_path / "x.mat").write_bytes(base64.b64decode(MAT_OF_SCIPY))
    m = data.read_mat(tmp_path / "x.mat")
    assert m["file_list"] == ["n01-Dog/a.jpg", "n02-Cat/b.jpg"] and m["labels"].tolist() == [1, 2]
    assert m["trnid"].tolist() == list(range(1, 400)) and len(m["empty"]) == 0
    assert [(int(car["bbox"][0]), int(car["class"][0]), car["fname"]) for car in m["annotations"]] == [
        (0, 1, "00000.jpg"), (300, 2, "00001.jpg")]
    with pytest.raises(ValueError, match="not a MATLAB 5 file"):
        data.read_mat(__file__)


def mat(**variables):
    """A MATLAB 5 file, uncompressed: arrays of numbers, lists of strings (cells), lists of dicts (structs)."""
    def element(kind, body):
        return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)

    def matrix(value, name=""):
        if isinstance(value, str):
            kind, parts, n = 4, element(4, value.encode("utf-16-le")), len(value)
        elif isinstance(value, list) and isinstance(value[0], dict):
            names = b"".join(key.encode().ljust(32, b"\0") for key in value[0])
            parts = struct.pack("<HHi", 5, 4, 32) + element(1, names)
            kind, n = 2, len(value)
            parts += b"".join(matrix(v) for entry in value for v in entry.values())
        elif isinstance(value[0], str):
            kind, parts, n = 1, b"".join(map(matrix, value)), len(value)
        else:
            kind, parts, n = 6, element(9, np.asarray(value, "<f8").tobytes()), len(value)
        return element(14, element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", 1, n)) +
                       element(1, name.encode()) + parts)

    return b"MATLAB 5.0".ljust(124) + b"\0\1IM" + b"".join(matrix(v, k) for k, v in variables.items())


def lay_out(root, files):
    """Writes {path: bytes, text, or a colour for a picture of it} below root."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (40, 30), content).save(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


RED, GREEN, BLUE = (254, 0, 0), (0, 255, 1), (0, 0, 254)
# name: archives in the official layout, {file: content}; three pictures, of classes 0 and 1 (train) and 1 (test)
LAYOUTS = {
    "tinyimagenet": {"tiny-imagenet-200.zip": {
        "tiny-imagenet-200/train/n01/images/n01_0.JPEG": RED, "tiny-imagenet-200/train/n02/images/n02_0.JPEG": GREEN,
        "tiny-imagenet-200/val/images/val_0.JPEG": BLUE,
        "tiny-imagenet-200/val/val_annotations.txt": "val_0.JPEG\tn02\t0\t0\t62\t62\n"}},
    "aircraft": {"fgvc-aircraft-2013b.tar.gz": {
        "fgvc-aircraft-2013b/data/images/1.jpg": RED, "fgvc-aircraft-2013b/data/images/2.jpg": GREEN,
        "fgvc-aircraft-2013b/data/images/3.jpg": BLUE, "fgvc-aircraft-2013b/data/variants.txt": "707-320\nA 300\n",
        "fgvc-aircraft-2013b/data/images_variant_trainval.txt": "1 707-320\n2 A 300\n",
        "fgvc-aircraft-2013b/data/images_variant_test.txt": "3 A 300\n"}},
    "cub2011": {"CUB_200_2011.tgz": {
        "CUB_200_2011/images/001.A/a.jpg": RED, "CUB_200_2011/images/002.B/b.jpg": BLUE,
        "CUB_200_2011/images/002.B/c.jpg": GREEN, "attributes.txt": "",
        "CUB_200_2011/images.txt": "1 001.A/a.jpg\n2 002.B/b.jpg\n3 002.B/c.jpg\n",
        "CUB_200_2011/image_class_labels.txt": "1 1\n2 2\n3 2\n",
        "CUB_200_2011/train_test_split.txt": "1 1\n2 0\n3 1\n"}},
    "dogs": {"images.tar": {"Images/n01-A/a.jpg": RED, "Images/n02-B/b.jpg": GREEN, "Images/n02-B/c.jpg": BLUE},
             "lists.tar": {"train_list.mat": mat(file_list=["n01-A/a.jpg", "n02-B/b.jpg"], labels=[1, 2]),
                           "test_list.mat": mat(file_list=["n02-B/c.jpg"], labels=[2])}},
    "flowers": {"102flowers.tgz": {"jpg/image_00001.jpg": RED, "jpg/image_00002.jpg": BLUE, "jpg/image_00003.jpg": GREEN},
                "imagelabels.mat": mat(labels=[1, 2, 2]), "setid.mat": mat(trnid=[1, 3], valid=[2], tstid=[2])},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_official_archives(tmp_path, monkeypatch, name):
    folder, split = data.OFFICIAL[name][2], {"tinyimagenet": "val/val_annotations.txt", "flowers": "setid.mat",
                                             "aircraft": "data/images_variant_test.txt", "dogs": "test_list.mat",
                                             "cub2011": "train_test_split.txt"}[name]
    archives, size = data.ARCHIVES[folder]
    for file, content in LAYOUTS[name].items():
        if isinstance(content, bytes):
            (tmp_path / file).write_bytes(content)
            continue
        lay_out(tmp_path / "src" / file, content)
        kind = {".zip": "zip", ".tar": "tar"}.get(Path(file).suffix, "gztar")
        made = shutil.make_archive(str(tmp_path / "made"), kind, tmp_path / "src" / file)
        Path(made).rename(tmp_path / file)
    urls = [url for url, _ in archives]
    assert [url.rsplit("/", 1)[1] for url in urls] == list(LAYOUTS[name])
    md5s = [hashlib.md5((tmp_path / file).read_bytes()).hexdigest() if md5 else None
            for file, (_, md5) in zip(LAYOUTS[name], archives)]
    monkeypatch.setitem(data.ARCHIVES, folder, (list(zip(urls, md5s)), size))

    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    first = tmp_path / next(iter(LAYOUTS[name]))
    whole = first.read_bytes()
    first.write_bytes(whole[:len(whole) // 2])                                                      # a damaged archive
    with pytest.raises(InputError, match=f"cannot fetch {folder}.*undamaged {first.name}"):
        data.load_dataset(name, tmp_path)
    assert not (tmp_path / folder).exists() and not list(tmp_path.glob(".*"))
    first.write_bytes(whole)
    assert data.to_download([name, "shapes"], tmp_path / "empty") == {name: size}
    d = data.load_dataset(name, tmp_path)
    assert d.image_size == data.OFFICIAL[name][1] == (64 if name == "tinyimagenet" else 32)
    assert d.train_labels.tolist() == [0, 1] and d.test_labels.tolist() == [1]
    for image, colour in zip([*d.train_images, *d.test_images], (RED, GREEN, BLUE)):
        assert (image.float().mean(dim=(1, 2)) - torch.tensor(colour)).abs().max() < 3
    assert data.to_download([name], tmp_path) == {} and (tmp_path / f"{name}.npz").exists()
    assert data.load_dataset(name, tmp_path, 48).image_size == 48                   # from the folder that is there now
    (tmp_path / folder / split).unlink()
    with pytest.raises(InputError, match=f"{Path(split).name} is missing"):
        data.load_dataset(name, tmp_path, 24)


def test_stanford_cars_unpacked(tmp_path):
    cars = [{"class": [1.0], "fname": "1.jpg"}, {"class": [2.0], "fname": "2.jpg"}]
    lay_out(tmp_path / "stanford_cars", {
        "cars_train/1.jpg": RED, "cars_train/2.jpg": GREEN, "cars_test/2.jpg": BLUE,
        "devkit/cars_train_annos.mat": mat(annotations=cars),
        "cars_test_annos_withlabels.mat": mat(annotations=cars[1:])})
    d = data.load_dataset("cars", tmp_path)
    assert d.train_labels.tolist() == [0, 1] and d.test_labels.tolist() == [1] and len(d.test_images) == 1


def test_an_archive_cannot_write_outside_its_folder(tmp_path, monkeypatch):
    for url, _ in data.ARCHIVES["stanford-dogs"][0]:
        with tarfile.open(tmp_path / url.rsplit("/", 1)[1], "w") as tar:
            tar.addfile(tarfile.TarInfo("../../escaped"))
    with pytest.raises(InputError, match="outside the destination"):
        data.load_dataset("dogs", tmp_path / "." )
    assert not (tmp_path.parent / "escaped").exists() and not (tmp_path / "escaped").exists()


def test_cifar_at_another_size_is_squashed_from_its_cache(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", train_images=images, train_labels=np.arange(3), test_images=images[:1],
             test_labels=np.arange(1))
    d = data.load_dataset("cifar10", tmp_path, 64)
    expected = np.asarray(Image.fromarray(images[1]).resize((64, 64), Image.Resampling.LANCZOS))
    assert np.array_equal(d.train_images[1].permute(1, 2, 0).numpy(), expected) and d.std == (0.2023, 0.1994, 0.2010)
    assert (tmp_path / "cifar10-64px.npz").exists()


def test_download_failure_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(data.torchvision.datasets.utils, "urlopen", offline, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name, file in (("cifar10", "cifar-10-python.tar.gz"), ("tinyimagenet", "tiny-imagenet-200.zip"),
                       ("flowers", "102flowers.tgz, imagelabels.mat, setid.mat")):
        with pytest.raises(InputError, match=f"cannot fetch .*{file}.*--dataset shapes"):
            data.load_dataset(name, tmp_path)
    with pytest.raises(InputError, match="its official address is dead.*cars_train_annos.mat"):
        data.load_dataset("cars", tmp_path)
    assert not list(tmp_path.glob(".*"))                                                   # nothing half is left behind


@pytest.mark.parametrize("change,message", [
    (dict(train_images=np.zeros((4, 32, 32, 3), np.float32)), "must be uint8"),
    (dict(train_images=np.zeros((4, 3, 32, 32), np.uint8)), "must be uint8"),
    (dict(train_images=np.zeros((1, 32, 32, 3), np.uint8), train_labels=np.zeros(1, int)), "at least 2"),
    (dict(train_images=np.zeros((4, 4, 4, 3), np.uint8)), "4 pixels wide"),
    (dict(train_labels=np.zeros(3, int)), "must be 4 integers"),
    (dict(train_labels=np.zeros(4)), "must be 4 integers"),
    (dict(test_images=np.zeros((4, 16, 16, 3), np.uint8), test_labels=np.zeros(4, int)), "differ in size")])
def test_npz_is_checked(tmp_path, change, message):
    arrays = dict(train_images=np.zeros((4, 32, 32, 3), np.uint8), train_labels=np.zeros(4, int))
    np.savez(tmp_path / "x.npz", **{**arrays, **change})
    with pytest.raises(InputError, match=message):
        data.load_dataset(str(tmp_path / "x.npz"))


def test_broken_inputs_are_named(tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"not a zip")
    root = make_folder(tmp_path / "pets")
    (root / "train/cat/1.png").write_bytes(b"\x89PNG broken")
    for name, message in (("bad.npz", "bad.npz is not a readable"), ("none.npz", "does not exist"),
                          ("pets", "1.png.*repair or remove"), ("nothing", "unknown data set")):
        with pytest.raises(InputError, match=message):
            data.load_dataset(str(tmp_path / name), tmp_path)
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        data.load_dataset(str(tmp_path / "empty"), tmp_path)
    with pytest.raises(InputError, match="has no folder train/"):
        data.load_dataset(str(tmp_path / "empty/train"), tmp_path)
    with pytest.raises(InputError, match="32-pixel images, not --image-size 64"):
        np.savez(tmp_path / "x.npz", train_images=np.zeros((4, 32, 32, 3), np.uint8))
        data.load_dataset(str(tmp_path / "x.npz"), image_size=64)


def test_files_are_whole_or_absent(tmp_path):
    data.save(tmp_path / "a.pt", {"x": torch.arange(1000.0)})

    def fails(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with pytest.raises(InputError, match="a.pt: No space left"):
        data.write_file(tmp_path / "a.pt", fails)
    assert data.load(tmp_path / "a.pt")["x"][-1] == 999 and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(np.float32(500).tobytes())] ^= 1
    (tmp_path / "b.pt").write_bytes(content)
    (tmp_path / "c.pt").write_bytes(content[:1000])
    for name in "bc":
        with pytest.raises(InputError, match=f"{name}.pt"):
            data.load(tmp_path / f"{name}.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        data.save(tmp_path / "file" / "d.pt", 1)


def test_a_hostile_pickle_does_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    torch.save({"x": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(InputError, match="hostile.pt cannot be read"):
        data.load(tmp_path / "hostile.pt")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------------------
# Teacher and experts
# ------------------------------------------------------------------------------------------------------------
def test_warmup_cosine():
    rate = [mkdt.warmup_cosine(s, 100, 10, 1.0, 1e-3) for s in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9] == pytest.approx(1) and rate[10] == pytest.approx(1)
    assert rate[55] == pytest.approx(1e-3 + 0.999 / 2) and 1e-3 < rate[99] < 2e-3
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))


def problem(n=10, d=4, width=4, dtype=torch.float64):
    """A tiny distillation problem: f, loss, theta, images, representations."""
    model = models.build(lambda: models.ConvNet(d, 8, width, depth=2), 0, "test").to(dtype)
    f = models.functional(model)
    g = torch.Generator().manual_seed(0)
    return (f, mkdt.student_loss(f), models.flat_parameters(model), torch.randn(n, 3, 8, 8, generator=g, dtype=dtype),
            torch.randn(n, d, generator=g, dtype=dtype))


def test_sgd_step_is_torchs_and_experts_keep_copies():
    f, loss, theta, images, z = problem()
    step = mkdt.sgd_step(loss, momentum=0.9, decay=1e-4)
    still = torch.zeros_like(theta)
    trajectory = mkdt.train_expert(step, theta, still, images, z, lambda x: x, epochs=3, lr=0.1, batch_size=4, seed=5)
    again = mkdt.train_expert(step, theta, still, images, z, lambda x: x, epochs=2, lr=0.1, batch_size=4, seed=5)
    assert trajectory.shape == (4, len(theta)) and torch.equal(trajectory[:3], again)    # shorter training: a prefix
    assert torch.equal(trajectory[0], theta)
    assert all(not torch.equal(a, b) for a, b in zip(trajectory, trajectory[1:]))        # nothing aliases live weights

    model = models.ConvNet(4, 8, 4, depth=2).double()
    nn.utils.vector_to_parameters(theta, model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for epoch in range(3):
        order = torch.randperm(10, generator=models.generator(5, "expert order", epoch))
        for start in (0, 4, 8):                                                          # the short last batch is kept
            batch = order[start:start + 4]
            optimizer.zero_grad()
            F.mse_loss(model(images[batch]), z[batch]).backward()
            optimizer.step()
    assert relative(models.flat_parameters(model), trajectory[-1]) < 1e-12


@pytest.mark.parametrize("ssl", ["barlow", "simclr"])
def test_teacher_resumes_bit_for_bit(tmp_path, ssl):
    arrays = data.make_shapes(20, 4)
    np.savez(tmp_path / "x.npz", **arrays)
    dataset = data.load_dataset(str(tmp_path / "x.npz"))

    class Killed(data.Log):
        def due(self):
            return True

        def __call__(self, stage, step, *rest, **values):
            if step == self.stop:
                raise KeyboardInterrupt

    def train(name, stop=None):
        encoder = models.build(lambda: models.resnet18(width=2), 0, "teacher")
        head = models.build(lambda: models.projector(ssl, encoder.feature_dim), 0, "head")
        model, log = nn.Sequential(encoder, head), Killed()
        log.stop = stop
        try:
            mkdt.train_teacher(model, dataset, ssl, 3, 8, 1e-2, 1e-6, 0.01, 0.5, 0.2, 0.2, False, 0, log,
                               data.Checkpoint(tmp_path / name, minutes=0))
        except KeyboardInterrupt:
            pass
        return model.state_dict()
    whole, killed = train("a.pt"), train("b.pt", stop=4)
    resumed = train("b.pt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert not torch.equal(whole["1.0.weight"], killed["1.0.weight"])


def test_high_loss_subset_by_hand():
    def f(theta, x):                                                    # representation: theta * mean pixel
        return theta * x.mean(dim=(1, 2, 3))[:, None]
    images = torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0])[:, None, None, None].expand(-1, 3, 2, 2)
    z = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    losses = mkdt.loss_per_image(f, [torch.tensor(1.0), torch.tensor(0.0)], images, z, lambda x: x)
    # theta 1: (4+0)/2, 0, (4+4)/2, (0+9)/2, same;  theta 0: (4+0)/2, 1, 0, 9/2, same
    assert losses.tolist() == [2.0, 0.5, 2.0, 4.5, 4.5]
    assert evaluation.highest(losses, 3).tolist() == [3, 4, 0]          # ties go to the lower index


# ------------------------------------------------------------------------------------------------------------
# The matching gradient and distillation
# ------------------------------------------------------------------------------------------------------------
def unrolled_gradient(loss, theta, target, images, lr, steps):
    """The oracle: Eq. 4 as one function of images and rate, Eq. 8 inside it, differentiated as a whole."""
    def matching_loss(images, lr):
        end = theta
        for batch, y in steps:
            end = end - lr * torch.func.grad(loss)(end, images[batch], y)
        return (end - target).square().sum() / (theta - target).square().sum()
    (grad_images, grad_lr), value = torch.func.grad_and_value(matching_loss, argnums=(0, 1))(images, lr)
    return value, grad_images, grad_lr


def matching_problem(steps, dtype=torch.float64):
    f, loss, theta, images, z = problem(dtype=dtype)
    target = theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(3), dtype=dtype)
    # 10 images in batches of 4: short last batches, and from the fourth step on images that come again
    batches = mkdt.draw_batches(10, steps, 4, torch.Generator().manual_seed(4))
    return loss, theta, target, images, torch.tensor(0.5, dtype=dtype), [(batch, z[batch]) for batch in batches]


@pytest.mark.parametrize("steps", range(1, 9))
def test_matching_gradient_is_exact(steps):
    loss, *rest = matching_problem(steps)
    expected = unrolled_gradient(loss, *rest)
    result = mkdt.matching_gradient(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), *rest)
    for ours, oracle in zip(result, expected):
        assert relative(ours, oracle) < 1e-9


def test_matching_gradient_in_float32():
    loss, *rest = matching_problem(6, torch.float32)
    result = mkdt.matching_gradient(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), *rest)
    for ours, oracle in zip(result, unrolled_gradient(loss, *rest)):
        assert relative(ours, oracle) < 1e-4


class TF32(torch.utils._python_dispatch.TorchDispatchMode):
    """Below it, convolutions get what GPUs give them by torch's default: operands rounded to 10 bits of mantissa."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "convolution" in function.name():
            operands = 3 if "backward" in function.name() else 2            # (the gradient and) the input, the weight
            args = [((x.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32) if i < operands else x
                    for i, x in enumerate(args)]
        return function(*args, **(kwargs or {}))


def test_matching_gradient_with_convolutions_in_tf32():
    loss, *rest = matching_problem(6, torch.float32)
    exact = mkdt.matching_gradient(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), *rest)
    with TF32():
        rounded = mkdt.matching_gradient(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), *rest)
    for a, b in zip(rounded, exact):
        assert 1e-7 < relative(a, b) < 1e-2


def compiled_matching_gradient(device):
    """Asserts that it is exact enough, each time it is called, and compiled once for each size of mini-batch. Returns a
    function that computes it once more."""
    loss, *tensors, steps = matching_problem(6, torch.float32)
    exact = unrolled_gradient(loss, *(x.double() for x in tensors), [(batch, y.double()) for batch, y in steps])
    gradient, adjoint = (models.compiled_step(g(loss), replay=device == "cuda")
                         for g in (mkdt.inner_gradient, mkdt.inner_adjoint))
    tensors, steps = [x.to(device) for x in tensors], [(batch.to(device), y.to(device)) for batch, y in steps]
    results = [mkdt.matching_gradient(gradient, adjoint, *tensors, steps)]      # batches of 4 and of 2: two graphs each
    with torch._dynamo.config.patch(error_on_recompile=True):
        results += [mkdt.matching_gradient(gradient, adjoint, *tensors, steps) for _ in range(3)]
    for result in results:
        assert all(relative(ours.cpu().double(), oracle) < 1e-3 for ours, oracle in zip(result, exact))
    assert device == "cuda" or all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))
    return lambda: mkdt.matching_gradient(gradient, adjoint, *tensors, steps)


def test_compiled_matching_gradient_is_exact_enough_and_compiled_once_per_batch_size():
    compiled_matching_gradient("cpu")


@pytest.mark.parametrize("f", [lambda x: x.sin(), lambda x: (x.sin(), x.cos())])
def test_results_of_a_replayed_function_are_copied(monkeypatch, f):
    asked = []

    def as_cuda_graphs_do(f, **options):                                   # results in the same memory at every call
        memory = {}
        asked.append(options.get("mode"))

        def replayed(x):
            results = f(x)
            kept = memory.setdefault(0, torch.utils._pytree.tree_map(torch.empty_like, results))
            return torch.utils._pytree.tree_map(torch.Tensor.copy_, kept, results)
        return replayed
    monkeypatch.setattr(torch, "compile", as_cuda_graphs_do)
    for replay in (True, False):
        g = models.compiled_step(f, replay)
        first, _ = g(torch.zeros(3)), g(torch.ones(3))
        assert models.agree(first, f(torch.zeros(3))) == replay
    assert asked == ["reduce-overhead", None]


@pytest.mark.parametrize("broken", [lambda f, x: (f(x)[0], 1.3 * f(x)[1]), lambda f, x: (f(x)[0], f(x)[1] * torch.nan),
                                    lambda f, x: f(torch.arange(3.0))], ids=["off", "nan", "stale"])
def test_a_compiler_that_computes_something_else_is_not_used(monkeypatch, capsys, broken):
    monkeypatch.setattr(torch, "compile", lambda f, **options: lambda x: broken(f, x))
    f = lambda x: (x.sin(), x.cos())
    assert models.compile_if_it_pays(f, (torch.arange(3.0),), 1, "on")[:2] == (f, False)
    assert "compiling failed (its results are others than without)" in capsys.readouterr().out


@pytest.mark.parametrize("numbers", [[1.0], [3.0, 1.0, 2.0, 4.0], [math.nan, 2.0, 1.0], [math.nan] * 3,
                                     [1.0, math.inf, math.inf]])
def test_lower_median_is_nanmedian(numbers):
    x = torch.tensor(numbers)
    torch.testing.assert_close(mkdt.lower_median(x), x.nanmedian(), rtol=0, atol=0, equal_nan=True)


def test_distill_itself_never_waits_for_a_gpu_within_an_iteration(monkeypatch):
    """With make-believe tensors on a make-believe GPU: what asks for one's value raises DataDependentOutputException.
    Medians are looked for by name, since torch's kernel for GPUs asks inside; gradient and adjoint are stand-ins."""
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    waited, iterations = [], []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result, name = function(*args, **(kwargs or {})), function.name().split(".")[0]
            tensors = filter(torch.is_tensor, torch.utils._pytree.tree_leaves((args, kwargs, result)))
            moved = name in ("aten::_to_copy", "aten::copy_") and {x.device.type for x in tensors} == {"cpu", "cuda"}
            if (moved and not any(x is True for x in (*args, *(kwargs or {}).values()))) or "median" in name:
                waited.append(name)
            return result

    class Quiet:
        start, due = (lambda self, first: waited.clear()), (lambda self: iterations.append(0))

    drawn = [mkdt.draw_trajectory(1, 2, 10, 3, 4, torch.Generator()) for _ in range(3)]            # real numbers
    monkeypatch.setattr(mkdt, "draw_trajectory", lambda *_: drawn[len(iterations)])
    pinned = []                                                                                 # which needs a real one
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True), Watch():
        images, z = torch.randn(10, 3, 8, 8, device="cuda"), torch.randn(10, 4, device="cuda")
        with pytest.raises(fake_tensor.DataDependentOutputException):                              # the last one's line
            mkdt.distill(lambda theta, x, y: theta * x.mean() * y.mean(), lambda theta, x, y, v: (v, x, theta @ v),
                         lambda i: torch.randn(5, 100), 1, images, z, iterations=3, trajectories=1, syn_steps=3,
                         match_epochs=2, max_start_epoch=2, pixel_lr=3.0, syn_lr=0.1, syn_lr_lr=1e-3, momentum=0.5,
                         batch_size=4, clip=1.0, seed=0, log=Quiet(), checkpoint=mkdt.Forgetful())
    assert len(iterations) == 3 and not waited and len(pinned) == 9                # two epochs of an expert, the batches


def test_the_unrolled_gradient_of_the_bench_is_the_oracle():
    loss, *rest = matching_problem(3)
    for ours, oracle in zip(mkdt.unrolled_gradient(loss, *rest), unrolled_gradient(loss, *rest)):
        assert relative(ours, oracle) < 1e-12


def test_dropping_the_later_steps_terms_is_another_gradient():
    loss, *rest = matching_problem(6)

    def truncated(theta, x, z, v):                                       # TESLA's: v is carried back unchanged
        hv, gx, gv = mkdt.inner_adjoint(loss)(theta, x, z, v)
        return torch.zeros_like(hv), gx, gv
    exact = unrolled_gradient(loss, *rest)
    result = mkdt.matching_gradient(mkdt.inner_gradient(loss), truncated, *rest)
    assert relative(result[0], exact[0]) < 1e-9 and relative(result[1], exact[1]) > 1e-2


def test_inner_step_by_hand_on_a_linear_model():
    # L = mean((theta * x - z)^2), one image: theta' = theta - lr * 2 x (theta x - z)
    loss = mkdt.student_loss(lambda theta, x: theta * x)
    theta, x, z, lr, target = (torch.tensor([v], dtype=torch.float64) for v in (0.5, 2.0, 3.0, 0.1, 1.5))
    stepped = 0.5 - 0.1 * 2 * 2 * (0.5 * 2 - 3)
    value, _, grad_lr, _ = mkdt.matching_gradient(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), theta, target,
                                                  x, lr[0], [(torch.tensor([0]), z)])
    assert float(value) == pytest.approx((stepped - 1.5) ** 2 / 1.0)
    assert float(grad_lr) == pytest.approx(2 * (stepped - 1.5) * -(2 * 2 * (0.5 * 2 - 3)))


@pytest.mark.parametrize("system", ["ce", "ssl"])
def test_matching_gradient_is_exact_for_the_other_objectives(tmp_path, system):
    f, loss, theta, images, z = problem()
    if system == "ce":
        targets = torch.arange(10) % 4
    else:
        np.savez(tmp_path / "x.npz", train_images=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
        targets = data.augmentations(data.load_dataset(str(tmp_path / "x.npz")), 0.3, 0.2)
    target = theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(3), dtype=theta.dtype)
    batches = mkdt.draw_batches(10, 5, 4, torch.Generator().manual_seed(4))
    steps = [(b, evaluation.targets_of(targets, b, n)) for n, b in enumerate(batches)]
    rest = theta, target, images, torch.tensor(0.5, dtype=theta.dtype), steps
    result = mkdt.matching_gradient(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), *rest)
    for ours, oracle in zip(result, unrolled_gradient(loss, *rest)):
        assert oracle.norm() > 0 and relative(ours, oracle) < 1e-9
    again = [(b, evaluation.targets_of(targets, b, n + 1)) for n, b in enumerate(batches)]             # other draws
    other = unrolled_gradient(loss, *rest[:-1], again)
    assert (relative(other[1], result[1]) > 1e-3) == (system == "ssl")


def test_adam_step_is_torchs():
    _, loss, theta, images, z = problem()
    step, p = mkdt.adam_step(loss, 1e-2), theta.clone().requires_grad_()
    optimizer, state = torch.optim.Adam([p], 1e-3, weight_decay=1e-2), torch.zeros(2 * len(theta) + 1, dtype=theta.dtype)
    for _ in range(5):
        theta, state = step(theta, state, images, z, 1e-3)
        optimizer.zero_grad()
        loss(p, images, z).backward()
        optimizer.step()
    assert relative(theta, p.detach()) < 1e-12


def test_objectives_by_what_the_targets_are():
    f, loss, theta, images, z = problem()
    out, y = f(theta, images), torch.arange(10) % 4
    views = (lambda x: x.flip(-1), lambda x: 2 * x)
    assert torch.allclose(loss(theta, images, z), ((out - z) ** 2).sum() / 40)
    assert torch.allclose(loss(theta, images, y), -torch.log_softmax(out, 1)[range(10), y].mean())
    assert torch.allclose(loss(theta, images, views),
                          models.nt_xent_loss(f(theta, images.flip(-1)), f(theta, 2 * images)))


def test_batches_are_permutations_cut_up():
    batches = mkdt.draw_batches(10, 7, 4, torch.Generator().manual_seed(0))
    assert [len(b) for b in batches] == [4, 4, 2, 4, 4, 2, 4]
    assert sorted(torch.cat(batches[:3]).tolist()) == list(range(10)) == sorted(torch.cat(batches[3:6]).tolist())
    assert [len(b) for b in mkdt.draw_batches(3, 2, 256, torch.Generator())] == [3, 3]


def test_clipping_is_per_image_and_leaves_the_ordinary_alone():
    medians = torch.full((5,), float("nan"))
    grad = torch.ones(4, 3, 2, 2)
    same, count = mkdt.clip_per_image(grad, medians, 0, 2.0)
    assert torch.equal(same, grad) and count == 0
    grad[1] *= 100
    clipped, count = mkdt.clip_per_image(grad, medians, 1, 2.0)
    assert count == 1 and torch.allclose(clipped[1], 2 * torch.ones(3, 2, 2)) and torch.equal(clipped[0], grad[0])
    grad[2] = 0                                                       # an image in no mini-batch: no part in the median
    clipped, count = mkdt.clip_per_image(grad, torch.full((5,), float("nan")), 0, 2.0)
    assert count == 1 and clipped.isfinite().all() and (clipped[2] == 0).all()
    still, count = mkdt.clip_per_image(torch.zeros(4, 3, 2, 2), torch.full((5,), float("nan")), 0, 2.0)
    assert count == 0 and (still == 0).all()                                                  # no gradient at all
    spike, count = mkdt.clip_per_image(500 * torch.ones(4, 3, 2, 2), medians, 2, 2.0)         # a whole iteration
    assert count == 4 and torch.allclose(spike, 2 * torch.ones(4, 3, 2, 2))


def run_distill(tmp_path, iterations, seed=0, name="a", minutes=5, **changes):
    f, loss, theta, images, z = problem(dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    real, z_real = torch.randn(40, 3, 8, 8, generator=g), torch.randn(40, 4, generator=g)
    step = mkdt.sgd_step(loss, 0.9, 0.0)
    trajectory = mkdt.train_expert(step, theta, torch.zeros_like(theta), real, z_real, lambda x: x, 4, 0.05, 8, seed=0)
    settings = dict(trajectories=1, syn_steps=6, match_epochs=2, max_start_epoch=2, pixel_lr=3.0, syn_lr=0.1,
                    syn_lr_lr=1e-3, momentum=0.5, batch_size=8, clip=0.0)
    return mkdt.distill(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), lambda i: trajectory, 1, images, z,
                        iterations, **{**settings, **changes}, seed=seed, log=data.Log(tmp_path / f"{name}.jsonl", 0),
                        checkpoint=data.Checkpoint(tmp_path / f"{name}.pt", minutes))


def test_distillation_lowers_equation_4(tmp_path):
    run_distill(tmp_path, 30)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and np.mean(losses[-9:]) < 0.95 * np.mean(losses[:9])


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_distillation_resumes_bit_for_bit(tmp_path, monkeypatch, clip):
    images, lr, _ = run_distill(tmp_path, 6, clip=clip)
    assert clip == 0 or not torch.equal(images, run_distill(tmp_path, 6, name="plain")[0])              # it did clip
    run_distill(tmp_path, 4, name="b", clip=clip)
    saved = data.Checkpoint.save

    def killed(checkpoint, step, **parts):
        saved(checkpoint, step, **parts)
        if step == 4:
            raise SystemExit
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(data.Checkpoint, "save", killed)
        run_distill(tmp_path, 6, name="killed", clip=clip, minutes=0)
    for name in ("b", "killed"):                                                       # extended; stopped on the way
        resumed, resumed_lr, _ = run_distill(tmp_path, 6, name=name, clip=clip)
        assert torch.equal(images, resumed) and lr == resumed_lr
    assert not torch.equal(images, run_distill(tmp_path, 6, seed=1, name="c", clip=clip)[0])


def test_distillation_is_algorithm_1(tmp_path):
    """Lines 4 - 19 once more, naively: torch.optim.SGD on images and rate, all N steps differentiated at once."""
    f, loss, theta, images, z = problem()
    trajectories = [theta + 0.02 * torch.randn(5, len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(i))
                    for i in range(3)]
    ours, rate, _ = mkdt.distill(
        mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), lambda i: trajectories[i], 3, images, z, 6, trajectories=2,
        syn_steps=4, match_epochs=2, max_start_epoch=2, pixel_lr=3.0, syn_lr=0.1, syn_lr_lr=1e-3, momentum=0.5, batch_size=6,
        clip=0.0, seed=0, log=data.Log(), checkpoint=data.Checkpoint(tmp_path / "x.pt"))
    syn, alpha, drawn = images.clone().requires_grad_(), torch.tensor(0.1).requires_grad_(), set()
    optimizer = torch.optim.SGD([{"params": [syn], "lr": 3.0}, {"params": [alpha], "lr": 1e-3}], momentum=0.5)
    for s in range(6):
        rng = models.generator(0, "distill", s)
        optimizer.zero_grad()
        for _ in range(2):
            i, t, batches = mkdt.draw_trajectory(3, 2, 10, 4, 6, rng)
            drawn.add((i, t))
            start, target = trajectories[i][t], trajectories[i][t + 2]
            theta_n = start
            for batch in batches:
                theta_n = theta_n.detach().requires_grad_() if theta_n is start else theta_n
                g, = torch.autograd.grad(loss(theta_n, syn[batch], z[batch]), theta_n, create_graph=True)
                theta_n = theta_n - alpha * g
            ((theta_n - target).square().sum() / (start - target).square().sum() / 2).backward()
        optimizer.step()
    assert len({i for i, _ in drawn}) == 3 and len({t for _, t in drawn}) == 3              # each is drawn, T+ included
    assert relative(ours - images, syn.detach() - images) < 1e-5 and float(rate) == pytest.approx(alpha.item(), rel=1e-5)


def test_distillation_stops_with_a_reason(tmp_path):
    with pytest.raises(InputError, match=r"iteration \d+ is not usable: loss .*gradient norm nan.*expert 0 from epoch \d"):
        run_distill(tmp_path, 50, pixel_lr=1e20)
    with pytest.raises(InputError, match="new rate -") as stopped:
        run_distill(tmp_path, 50, syn_lr_lr=10.0, name="b")
    iteration = int(re.search(r"iteration (\d+)", str(stopped.value)).group(1))
    saved = data.load(tmp_path / "b.pt")                      # the state before the bad iteration, and nothing of it
    images, lr, _ = run_distill(tmp_path, iteration, syn_lr_lr=10.0, name="c")
    assert saved["step"] == iteration and torch.equal(saved["images"], images) and saved["lr"] == lr > 0
    _, lr, _ = run_distill(tmp_path, 50, syn_lr_lr=10.0, name="d", clip=10.0)              # clipped, it stays positive
    assert lr > 0


# ------------------------------------------------------------------------------------------------------------
# Theorem 4.1 and Proposition D.1: by autograd and simulation
# ------------------------------------------------------------------------------------------------------------
def supervised_loss(W, x, y):
    """L_SL of Theorem 4.1 on a batch x [B, d] with one-hot targets y [B, K]."""
    return (x @ W.T - y).square().sum(dim=1).mean()


def spectral_loss(W, x1, x2, x, itself):
    """L_SSL of Theorem 4.1: views x1, x2 [B, d] of the batch, which stands in the second term as x; with i = j or not."""
    squares = (x @ W.T @ W @ x.T).square()                                                                  # [B, B]
    second = squares.mean() if itself else (squares.sum() - squares.trace()) / (len(x) * (len(x) - 1))
    return -2 * ((x1 @ W.T) * (x2 @ W.T)).sum(dim=1).mean() + second


def gradients(loss, W, *batches):
    """The gradient in W for each of many batches, [n, *W.shape]."""
    many = (None, *(None if isinstance(b, bool) else 0 for b in batches))
    return torch.func.vmap(torch.func.grad(loss), many)(W, *batches)


def variance(g):
    """(E ||g - E g||^2, half the width of its 99.9% confidence interval) from samples g [n, ...]."""
    q = (g - g.mean(dim=0)).square().flatten(1).sum(dim=1) * len(g) / (len(g) - 1)
    return float(q.mean()), 3.29 * float(q.std()) / len(q) ** 0.5


def sparse_coding_batches(n, d, noise, rng):
    """n batches of two of the theorem's data: (x, one-hot y), [n, 2, d]; the noise has variance `noise`."""
    y = torch.eye(d, dtype=torch.float64)[torch.randint(2, (n, 2), generator=rng)]
    return y + noise**0.5 * torch.randn(n, 2, d, generator=rng, dtype=torch.float64), y


@pytest.mark.parametrize("noise", [1e-4, 0.01, 0.1, 1.0])
def test_theorem_4_1(noise, d=10, n=20000):
    rng = torch.Generator().manual_seed(0)
    (x, y), W = sparse_coding_batches(n, d, noise, rng), torch.eye(d, dtype=torch.float64)
    supervised, error = variance(gradients(supervised_loss, W, x, y))
    # g = sum of e x^T over the two, e the noise of x: 2 (E |e|^2 |x|^2 - |E e x^T|^2)
    assert abs(supervised - 2 * (d * noise + noise**2 * (d * d + d))) < error
    print(f"\nnoise {noise:g}: SL {supervised:.4g} +- {error:.2g}", end="")
    for itself in (True, False):
        for augmentation in (0.0, 1.0):          # 0: what many views tend to, since the first term is bilinear in them
            x1, x2 = (x + augmentation * torch.randn(x.shape, generator=rng, dtype=torch.float64) for _ in range(2))
            contrastive, wide = variance(gradients(spectral_loss, W, x1, x2, x, itself))
            assert contrastive - wide > supervised + error, (noise, itself, augmentation)
            print(f"; SSL{'' if itself else ', i != j'}{', finite noise' * bool(augmentation)} {contrastive:.4g} +- "
                  f"{wide:.2g}", end="")


def test_steps_of_the_printed_proofs():
    """The limit of the gradient is as printed; four other steps are not. README has the numbers."""
    rng, d, I = torch.Generator().manual_seed(0), 4, torch.eye(4, dtype=torch.float64)
    x, y = sparse_coding_batches(200_000, d, 0.04, rng)
    M = (x[..., None] * x[..., None, :]).mean(dim=1)
    assert relative(gradients(spectral_loss, I, x, x, x, True), -4 * M + 4 * M @ M) < 1e-12             # as printed
    # (20) - (27): E of the supervised gradient is 2 (mu mu^T - e mu^T) = 0; the term E[noise noise^T] is missing.
    assert torch.allclose(gradients(supervised_loss, I, x, y).mean(dim=0), 2 * 0.04 * I, atol=2e-3)
    # (47): for one example of each class -2 - 2 + 2 + 2 = 0 on the classes' diagonal; without noise it is -1.
    mixed = I[None, :2]
    assert torch.allclose(gradients(spectral_loss, I, mixed, mixed, mixed, True)[0], -torch.diag(I[0] + I[1]))
    # "As m -> infinity, M = M~": the covariance of m views with noise N(0, I) exceeds that of their means by I.
    views = I[:2, None] + torch.randn(2, 100_000, d, generator=rng, dtype=torch.float64)               # [B, m, d]
    means = views.mean(dim=1)
    M, M_tilde = torch.einsum("bmi,bmj->ij", views, views) / 200_000, means.T @ means / 2
    assert torch.allclose(M - M_tilde, I, atol=0.02)
    # D.1: the gradient is -4 theta M + 4 theta M' theta^T theta M' with M of the views and M' of their means; the loss
    # has them the other way round.
    theta, few = torch.randn(3, d, generator=rng, dtype=torch.float64), views[:, :5]

    def whole(theta):                            # first term over the views of an image, second over all pairs of views
        f = few @ theta.T
        flat = f.flatten(0, 1)
        return -2 * torch.einsum("bmk,bnk->", f, f) / (2 * 25) + (flat @ flat.T).square().mean()
    M, means = torch.einsum("bmi,bmj->ij", few, few) / 10, few.mean(dim=1)
    M_tilde, g = means.T @ means / 2, torch.func.grad(whole)(theta)
    assert relative(-4 * theta @ M_tilde + 4 * theta @ M @ theta.T @ theta @ M, g) < 1e-12
    assert relative(-4 * theta @ M + 4 * theta @ M_tilde @ theta.T @ theta @ M_tilde, g) > 0.1


def test_proposition_d_1(K=5, d=8, n=40, size=8, rate=0.01):
    """One epoch of synchronous parallel SGD over 200 random partitions of a fixed data set."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % K
    x = F.one_hot(labels, d).double() + torch.randn(n, d, generator=rng, dtype=torch.float64)
    views = [x + torch.randn(n, d, generator=rng, dtype=torch.float64) for _ in range(2)]       # fixed: P alone varies
    theta = torch.randn(K, d, generator=rng, dtype=torch.float64)
    def limit(theta, x, y, a, b):              # (56) with many views: their covariance exceeds that of their means by I
        M_tilde = x.T @ x / len(x)
        M = M_tilde + torch.eye(d, dtype=theta.dtype)
        return -2 * (theta @ M_tilde @ theta.T).trace() + (M @ theta.T @ theta @ M @ theta.T @ theta).trace()
    losses = {
        "many views": limit,
        "mse": (lambda theta, x, y, a, b: supervised_loss(theta, x, torch.eye(K).double()[y])),
        "cross-entropy": (lambda theta, x, y, a, b: F.cross_entropy(x @ theta.T, y)),
        "Theorem 4.1's limit": (lambda theta, x, y, a, b: spectral_loss(theta, x, x, x, False)),
        "Theorem 4.1's limit, i = j": (lambda theta, x, y, a, b: spectral_loss(theta, x, x, x, True)),
        "views": (lambda theta, x, y, a, b: spectral_loss(theta, a, b, a, False)),
        "views, i = j": (lambda theta, x, y, a, b: spectral_loss(theta, a, b, a, True))}
    for name, loss in losses.items():
        for batch in (size, n):                                                # n: a single partition, nothing can vary
            parts = torch.stack([torch.randperm(n, generator=rng) for _ in range(200)]).view(-1, batch)
            g = gradients(loss, theta, *(values[parts] for values in (x, labels, *views)))
            spread, error = variance(theta - rate * g.view(200, -1, *theta.shape).sum(dim=1))
            if name in ("mse", "cross-entropy") or batch == n:
                assert spread < 1e-24, name
            else:
                assert spread - error > 1e-3, name
            print(f"\n{name}, batches of {batch}: {spread:.3g} +- {error:.1g}", end="")


# ------------------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_linear_probe_finds_the_optimum(scale):
    g = torch.Generator().manual_seed(0)
    x, y = scale * torch.randn(60, 5, generator=g, dtype=torch.float64), torch.randint(3, (60,), generator=g)
    W, b = evaluation.linear_probe(x, y, 3, iterations=100)
    parameters = torch.cat([W.flatten(), b]).requires_grad_()

    def objective(p):
        return F.cross_entropy(x @ p[:15].view(3, 5).T + p[15:], y) + 1e-3 * p[:15].square().sum()
    reached = objective(parameters).item()
    best = parameters.detach()
    for _ in range(50):                                                    # Newton, the bias's null direction damped
        gradient = torch.func.grad(objective)(best)
        hessian = torch.func.hessian(objective)(best) + 1e-9 * torch.eye(18, dtype=torch.float64)
        best = best - torch.linalg.solve(hessian, gradient)
    assert reached <= float(objective(best)) + 1e-7


def test_knn_accuracy_by_brute_force():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 4, generator=g), torch.randn(20, 4, generator=g)
    labels, truth = torch.randint(3, (30,), generator=g), torch.randint(3, (20,), generator=g)
    labels[0] = 2
    correct = 0
    for q, y in zip(queries, truth):
        similarity = [(float(F.cosine_similarity(q, x, dim=0)), int(c)) for x, c in zip(bank, labels)]
        votes = [0.0] * 3
        for s, c in sorted(similarity, reverse=True)[:7]:
            votes[c] += math.exp(s / 0.5)
        correct += votes.index(max(votes)) == int(y)
    assert evaluation.knn_accuracy(bank, labels, queries, truth, k=7) == pytest.approx(100 * correct / 20)


def test_labelled_subset():
    assert len(evaluation.labelled_subset(50000, 1, 0)) == 500 and len(evaluation.labelled_subset(1020, 5, 0)) == 51
    assert len(evaluation.labelled_subset(700, 1, 0)) == 7                              # 700 * 1 / 100 is not below 7
    assert not torch.equal(evaluation.labelled_subset(700, 5, 0), evaluation.labelled_subset(700, 5, 1))
    with pytest.raises(InputError, match="0 images"):
        evaluation.labelled_subset(50, 1, 0)
    labels = torch.tensor([0, 1, 1, 2, 2, 2] * 20)
    drawn = labels[evaluation.labelled_subset(120, 10, 3, labels)]
    assert torch.bincount(drawn).tolist() == [2, 4, 6]
    assert torch.equal(evaluation.labelled_subset(120, 10, 3, labels), evaluation.labelled_subset(120, 10, 3, labels))
    with pytest.raises(InputError, match="training images of class 0 is 0 images"):
        evaluation.labelled_subset(120, 4, 0, labels)


def test_pretraining_is_plain_sgd_with_momentum():
    encoder = models.build(lambda: models.ConvNet(4, 8, 4, depth=2), 0, "a")
    twin = models.build(lambda: models.ConvNet(4, 8, 4, depth=2), 0, "a")
    _, _, _, images, z = problem(dtype=torch.float32)
    evaluation.pretrain(encoder, images, z, lr=0.1, epochs=2, seed=0, batch_size=256)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):                                                     # 10 images are one batch: order is nothing
        optimizer.zero_grad()
        F.mse_loss(twin(images), z).backward()
        optimizer.step()
    assert relative(models.flat_parameters(twin), models.flat_parameters(encoder)) < 1e-5
    with pytest.raises(InputError, match="diverged"):
        evaluation.pretrain(encoder, images, 1e9 * z, lr=1e9, epochs=30, seed=0)


@pytest.mark.parametrize("make", ["unscaled", "huge", "untrained resnet"])
def test_linear_probe_does_not_diverge(make):
    g = torch.Generator().manual_seed(0)
    y = torch.randint(10, (300,), generator=g)
    if make == "untrained resnet":
        network = models.build(lambda: models.resnet10(4, 8), 0, "untrained").eval()
        images = torch.randn(300, 3, 16, 16, generator=g) + torch.linspace(-3, 3, 10)[y].view(-1, 1, 1, 1)
        x = evaluation.encode(network.features, images, lambda x: x)
    else:
        x = torch.randn(300, 40, generator=g) + 3 * F.one_hot(y, 40)
        x = 50 + 30 * x if make == "unscaled" else 1e6 * x
    W, b = evaluation.linear_probe(x, y, 10)
    assert W.isfinite().all() and b.isfinite().all()
    assert evaluation.accuracy(x @ W.T + b, y) > {"untrained resnet": 25}.get(make, 90)           # chance is 10


def test_finetuning_moves_the_backbone_at_a_tenth_of_the_heads_rate():
    images = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 3
    images[:, 0] = (100 * labels).view(-1, 1, 1).byte()                                    # the class is in the red
    encoder = models.build(lambda: models.ConvNet(4, 8, 4, depth=2), 0, "a").eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    prepare = lambda x: x.float() / 128 - 1
    one_step = evaluation.finetune(encoder, images, labels, 3, prepare, 0, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())                # it trains a copy
    x = data.shift_and_flip(prepare(images[torch.randperm(24, generator=models.generator(0, "fine-tuning order", 0))]),
                            models.stream(0, "fine-tuning views", 0))
    y = labels[torch.randperm(24, generator=models.generator(0, "fine-tuning order", 0))]
    head = models.build(lambda: nn.Linear(16, 3), 0, "fine-tuning head")
    F.cross_entropy(head(encoder.features(x)), y).backward()
    assert torch.allclose(one_step[1].weight, head.weight - 0.05 * head.weight.grad, atol=1e-6)
    conv = encoder.convs[0].weight
    assert torch.allclose(one_step[0].convs[0].weight, conv - 0.005 * conv.grad, atol=1e-7)
    network = evaluation.finetune(encoder, images, labels, 3, prepare, 0, epochs=60, batch_size=8)
    assert evaluation.accuracy(network(prepare(images)), labels) > 90


def test_shift_and_flip_by_hand():
    images = torch.arange(2 * 3 * 6 * 6.).view(2, 3, 6, 6) + 1
    moved = [data.shift_and_flip(images, seed) for seed in range(40)]
    padded = F.pad(images, [4] * 4)
    for i in range(2):
        options = [w for top in range(9) for left in range(9) for w in
                   (padded[i, :, top:top + 6, left:left + 6], padded[i, :, top:top + 6, left:left + 6].flip(-1))]
        found = [next(k for k, w in enumerate(options) if torch.allclose(w, m[i], atol=1e-4)) for m in moved]
        assert len(set(found)) > 25                                               # 162 places, some of them all zero


# ------------------------------------------------------------------------------------------------------------
# Sets to pre-train on
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_index_files(tmp_path, protocol):
    for name, content in (("list", [3, 1, 2]), ("dict", {"indices": [3, 1, 2]}), ("array", np.array([3, 1, 2])),
                          ("ints", np.array([3, 1, 2], np.int32)), ("scalars", [np.int64(3), np.int64(1), np.int64(2)]),
                          ("dict of array", {"indices": np.array([3., 1, 2]), "note": "x"})):
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol))
        assert evaluation.read_indices(str(tmp_path / f"{name}.pkl"), 4).tolist() == [3, 1, 2], name


def test_index_files_of_other_kinds(tmp_path):
    old = b"cnumpy.core.multiarray\n_reconstruct\n"                            # as numpy 1 calls it, protocol 0
    (tmp_path / "numpy1.pkl").write_bytes(pickle.dumps(np.array([3, 1, 2]), 0).replace(
        b"cnumpy._core.multiarray\n_reconstruct\n", old))
    assert old in (tmp_path / "numpy1.pkl").read_bytes()
    np.save(tmp_path / "a.npy", np.array([3, 1, 2]))
    data.save(tmp_path / "a.pt", {"indices": torch.tensor([3, 1, 2])})
    data.save(tmp_path / "b.pt", torch.tensor([3, 1, 2]))
    (tmp_path / "a.json").write_text('{"indices": [3, 1, 2]}')
    (tmp_path / "a.txt").write_text("3, 1\n2\n")
    for file in ("numpy1.pkl", "a.npy", "a.pt", "b.pt", "a.json", "a.txt"):
        assert evaluation.read_indices(str(tmp_path / file), 4).tolist() == [3, 1, 2], file
    (tmp_path / "memo.pkl").write_bytes(b"\x80\x02K\x01r\xff\xff\xff\x07.")       # entry 134,217,727 of the memo: 2 GB
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert evaluation.read_indices(str(tmp_path / "memo.pkl"), 4).tolist() == [1]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000                                    # kB


class Hostile:
    """Pickles to a call of a function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("content,message", [
    ([0, 9], "indices from 0 to 9 for 4"), ([-1], "indices from -1"), ([0.5], "whole numbers"), ([1, 1], "twice"),
    ([], "whole numbers"), ([True], "whole numbers"), (np.array([None]), "an array of type 'O8'"),
    ("abc", "whole numbers|not a list"), ({"x": [1]}, "'indices'"),
    (Hostile(eval, "open('hacked', 'w')"), "builtins.eval"), (Hostile(np.ndarray, (1,), "O", b"12345678"), "not a list"),
    (Hostile(np.save, "hacked", [1]), "numpy.*save"), (collections.OrderedDict(), "collections.OrderedDict")])
def test_bad_index_files_are_refused(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message) as refused:
        evaluation.read_indices(str(tmp_path / "x.pkl"), 4)
    assert "subset:" in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "hacked").exists()


def test_distilled_sets_of_three_systems(tmp_path, capsys):
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
    g = torch.Generator().manual_seed(0)
    raw, z = torch.rand(6, 3, 8, 8, generator=g), torch.randn(6, 5, generator=g)
    normalised = data.normalize(raw, mean, std)

    def read(path, pixels="auto"):
        return evaluation.read_distilled(str(tmp_path / path), pixels, mean, std)
    data.save(tmp_path / "ours/distilled.pt", {"images": normalised, "representations": z, "lr": 0.2})
    data.save(tmp_path / "ours/distilled_01000.pt", {"images": 2 * normalised, "representations": z, "lr": 0.3})
    for s in (100, 2000, 300):
        data.save(tmp_path / f"theirs/images_{s}.pt", nn.Parameter(normalised * s))
        data.save(tmp_path / f"theirs/labels_{s}.pt", z)
        data.save(tmp_path / f"theirs/synlr_{s}.pt", torch.tensor(0.36))
    data.save(tmp_path / "krr/x_syn_final.pt", raw.clone().requires_grad_())
    data.save(tmp_path / "krr/y_syn.pt", z.clone().requires_grad_())
    data.save(tmp_path / "unfinished/distilled_01000.pt", {"images": raw, "representations": z, "lr": 0.4})
    for path, images, rate in (("ours", normalised, 0.2), ("ours/distilled_01000.pt", 2 * normalised, 0.3),
                               ("theirs", 2000 * normalised, 0.36), ("theirs/images_300.pt", 300 * normalised, 0.36),
                               ("unfinished", raw, 0.4)):
        x, y, lr = read(path)
        assert torch.allclose(x, images) and torch.equal(y, z) and lr == pytest.approx(rate), path
        said = capsys.readouterr().out
        assert ("is taken" in said) == (tmp_path / path).is_dir() and "normalised" not in said
    assert torch.equal(read("ours", "raw")[0], normalised)                                 # our files say what they are
    assert torch.allclose(read("theirs/images_300.pt", "raw")[0], data.normalize(300 * normalised, mean, std))
    x, y, lr = read("krr")
    assert torch.allclose(x, normalised) and not x.requires_grad and not y.requires_grad and lr is None
    assert "taken for raw ones and normalised" in capsys.readouterr().out
    assert torch.equal(read("krr", "normalised")[0], raw) and torch.allclose(read("krr", "raw")[0], normalised)
    data.save(tmp_path / "bad/distilled.pt", {"images": normalised, "representations": z[:4], "lr": 0.2})
    (tmp_path / "empty").mkdir()
    for path, message in (("bad", "targets must be finite"), ("empty", "holds no distilled.pt"), ("none.pt", "not exist")):
        with pytest.raises(InputError, match=message):
            read(path)


def test_krr_loss_is_kernel_ridge_regression():
    g = torch.Generator().manual_seed(0)
    f_syn, y_syn, f_real, y_real = (torch.randn(n, d, generator=g, dtype=torch.float64)
                                    for n, d in ((7, 4), (7, 3), (9, 4), (9, 3)))
    bias = lambda f: torch.cat([f, torch.ones(len(f), 1, dtype=f.dtype)], 1)
    X, ridge = bias(f_syn), 0.01 * float((bias(f_syn) @ bias(f_syn).T).trace())
    W = torch.linalg.solve(X.T @ X + ridge * torch.eye(5, dtype=X.dtype), X.T @ y_syn)         # ridge regression itself
    assert torch.allclose(evaluation.krr_loss(f_syn, y_syn, f_real, y_real, ridge=0.01),
                          (bias(f_real) @ W - y_real).square().mean())


def test_krr_st_lowers_its_loss_and_resumes_bit_for_bit(tmp_path):
    g = torch.Generator().manual_seed(0)
    parts = torch.rand(3, 3, 8, 8, generator=g)                            # images are mixtures, targets the shares
    share = torch.rand(60, 3, generator=g)
    real = (255 * torch.einsum("nk,kchw->nchw", share / 3, parts)).byte()
    prepare, z = lambda x: x.float() / 64 - 1, share + 0.02 * torch.randn(60, 3, generator=g)
    make = lambda: models.ConvNet(3, 8, 4, depth=2)

    def run(checkpoint):
        return evaluation.krr_st(make, prepare(real[:8]), z[:8], real, z, prepare, 100, 0, data.Log(interval=1e9),
                                 checkpoint, models=3, online_steps=5, batch_size=30, lr=0.003)

    @torch.no_grad()
    def quality(images, targets):                                              # under ten encoders it has never seen
        judges = [models.build(make, k, "judge") for k in range(10)]
        return sum(float(evaluation.krr_loss(f.features(images), targets, f.features(prepare(real)), z)) for f in judges)
    images, targets = run(data.Checkpoint(tmp_path / "a.pt"))
    assert quality(images, targets) < 0.9 * quality(prepare(real[:8]), z[:8])

    class Interrupted(data.Checkpoint):
        def due(self):
            return True

        def save(self, step, **parts):
            super().save(step, **parts)
            if step == 57:
                raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(tmp_path / "b.pt"))
    resumed = run(data.Checkpoint(tmp_path / "b.pt"))
    assert torch.equal(resumed[0], images) and torch.equal(resumed[1], targets)


def test_distribution_matching_draws_the_mean_features_together(tmp_path):
    arrays = data.make_shapes(60, 4, size=16)
    np.savez(tmp_path / "x.npz", **arrays)
    dataset = data.load_dataset(str(tmp_path / "x.npz"))
    make = lambda: models.ConvNet(4, 16, 8, depth=2)
    images = torch.zeros(12, 3, 16, 16)

    def distil(name, iterations):
        return evaluation.distribution_matching(make, images, dataset.train_images, dataset.batch,
                                                data.augmentations(dataset, 0.5, 0.2), iterations, 0, data.Log(interval=1e9), data.Checkpoint(tmp_path / name, minutes=0))

    def distance(images):
        judges = [models.build(make, 7, k).features for k in range(5)]
        real = dataset.batch(dataset.train_images)
        return sum(float((f(images).mean(dim=0) - f(real).mean(dim=0)).square().sum()) for f in judges)
    whole = distil("a.pt", 60)
    assert distance(whole) < 0.5 * distance(images)
    distil("b.pt", 20)
    assert torch.equal(whole, distil("b.pt", 60))
    # One step by hand: the mean over the batch of both, under the first draw of augmentations.
    rng = models.generator(0, "dm", "step", 0)
    chosen, real = torch.randperm(12, generator=rng), torch.randint(60, (12,), generator=rng)
    augment, _ = data.draw_augmentations(12, 16, models.stream(0, "dm", "views", 0), "cpu", (0.5, 1.0), 0.2)
    f = models.build(make, 0, "dm", 0).features
    x = images.clone().requires_grad_()
    views = [data.normalize(augment(v), dataset.mean, dataset.std) for v in (
        x[chosen] * torch.tensor(dataset.std)[:, None, None] + torch.tensor(dataset.mean)[:, None, None],
        dataset.train_images[real].float() / 255)]
    (f(views[0]).mean(dim=0) - f(views[1]).mean(dim=0)).square().sum().backward()
    assert relative(distil("c.pt", 1), images - x.grad) < 1e-5


def test_pretraining_by_self_supervision_uses_no_targets():
    dataset = data.Dataset("x", *(torch.randint(256, (30, 3, 16, 16), dtype=torch.uint8,
                                                generator=torch.Generator().manual_seed(0)), torch.zeros(30).long()) * 2,
                           (0.5, 0.5, 0.5), (0.3, 0.3, 0.3))
    encoders = []
    for ssl in ("barlow", "simclr"):
        encoder = models.build(lambda: models.ConvNet(8, 16, 4, depth=2), 0, "a")
        before = models.flat_parameters(encoder)
        evaluation.pretrain_ssl(encoder, dataset.train_images, dataset, ssl, 1e-3, 2, 0, 16, 0.01, 0.5, 0.2, 0.2)
        encoders.append(models.flat_parameters(encoder))
        assert not torch.equal(before, encoders[-1]) and not encoder.training
    assert not torch.equal(*encoders)


def test_set_names():
    parse = evaluation.parse_set
    assert parse("random") == ("random", "", "") and parse("random@0.3") == ("random", "", "0.3")
    assert parse("random:ssl@mkdt") == ("random", "ssl", "mkdt") and parse("mkdt") == ("mkdt", "", "")
    assert parse("subset:a@b/sas.pkl") == ("subset", "a@b/sas.pkl", "")
    assert parse("distilled:x:y@0.5") == ("distilled", "x:y", "0.5")
    for bad in ("moco", "random:moco", "subset:", "subset", "full@", "mkdt@-1", "@0.3", "random@nan", ""):
        with pytest.raises(InputError, match="unknown pre-training set"):
            parse(bad)


def test_the_papers_values():
    paper = evaluation.paper_values()
    assert paper["cifar10", "2", "barlow", "convnet", "linear", "5", "mkdt", "cifar10"] == (53.08, 0.13)       # Table 1
    assert paper["cifar100", "2", "barlow", "convnet", "linear", "1", "mkdt_random", "cub2011"] == (1.66, 0.13)      # 2
    assert paper["tinyimagenet", "5", "barlow", "convnet", "linear", "5", "krr_st", "aircraft"] == (4.36, 0.49)      # 4
    assert paper["cifar100", "5", "barlow", "resnet18", "linear", "5", "none", "cifar10"] == (10.0, 0.0)             # 5
    assert paper["cifar10", "2", "simclr", "convnet", "linear", "1", "random", "flowers"] == (1.83, 0.24)            # 6
    assert paper["tinyimagenet", "2", "barlow", "convnet", "linear", "50", "mkdt", "tinyimagenet"] == (16.99, 0.25)  # 7
    assert paper["cifar100", "2", "barlow", "convnet", "finetune", "100", "random:ssl", "cars"] == (28.75, 0.23)    # 10
    assert paper["cifar100", "5", "barlow", "convnet", "linear", "5", "dm", "cub2011"] == (1.99, 0.13)              # 11
    assert paper["cifar10", "5", "barlow", "convnet", "linear", "1", "mtt_ssl", "cifar10"] == (22.06, 1.86)         # 12
    assert len(paper) == 7 * (12 + 16 + 10 + 18 + 8 + 12 + 18 + 3 + 4 + 4)
    tasks = {key[-1] for key in paper}
    assert tasks == {*evaluation.TASKS, "cars"} and all(t in data.OFFICIAL for t in tasks)
    assert {key[-2] for key in paper} <= evaluation.METHODS.keys()


def test_paired_difference_by_hand():
    records = [dict(pretraining=p, seeds=s, accuracies=a)
               for p, s, a in (("random", [0, 1, 2, 7], [1.0, 2.0, 3.0, 9.0]), ("mkdt", [2, 1, 0], [6.0, 4.0, 2.0]))]
    mean, error, n = evaluation.paired(records, "random")["mkdt"]
    assert mean == pytest.approx(2) and error == pytest.approx(1 / math.sqrt(3)) and n == 3


# ------------------------------------------------------------------------------------------------------------
# Odd and broken inputs: read right, or refused in one line
# ------------------------------------------------------------------------------------------------------------
def test_odd_images(tmp_path):
    root, ramp = tmp_path / "odd one ünïcode 图", np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    folder = root / "train/a class"
    folder.mkdir(parents=True)
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    Image.new("L", (5, 7), 9).save(folder / "0 grey.png")
    Image.new("RGBA", (5, 7), (*RED, 128)).save(folder / "1 alpha.png")
    Image.new("CMYK", (5, 7), (0, 255, 255, 0)).save(folder / "2 cmyk.jpg")
    Image.fromarray(ramp).save(folder / "3 sixteen bit.png")
    frames[0].save(folder / "4 animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1), GREEN).save(folder / "5 one pixel.bmp")
    Image.new("1", (3000, 4000), 1).save(folder / "6 huge.png")
    Image.new("RGB", (8, 8), BLUE).save(folder / "7.png")
    (folder / "7.png").rename(folder / "7 wrong suffix.JPG")
    Image.new("P", (8, 8)).save(folder / "8 ünïcode 图.png")
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(folder / "9 dark sixteen bit.png")
    (folder / "notes.txt").write_text("not an image")
    (folder / ".DS_Store").write_bytes(b"\0")
    d = data.load_dataset(str(root), tmp_path)
    colours = d.train_images.float().mean(dim=(2, 3)).round().tolist()
    for found, expected in zip(colours, ([9] * 3, RED, RED, [127] * 3, RED, GREEN, [255] * 3, BLUE, [0] * 3, [0] * 3), strict=True):
        assert np.abs(np.subtract(found, expected)).max() <= 2, (found, expected)
    assert d.train_images[3, 0, 0, 0] < 20 and d.train_images[3, 0, -1, -1] > 235
    for name, content, message in (("x.png", b"", "x.png"), ("y.jpg", b"\xff\xd8\xff", "y.jpg"), ("z.png", b"text", "z.png")):
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=f"cannot read the image .*{message}.*repair or remove"):
            data.load_dataset(str(root), tmp_path)
        (folder / name).unlink()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tif")
    with pytest.raises(InputError, match="float.tif.*floating-point pixels"):
        data.load_dataset(str(root), tmp_path)


def broken(rng, content):
    """`content` with some bytes flipped, cut off, repeated or put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, kind = rng.randrange(len(content) + 1), rng.randrange(5)
        if kind == 0:
            content[at:at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            del content[at:at + rng.randrange(1, 50)]
        elif kind == 3:
            content[at:at] = content[at - 20:at]
        else:
            content[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(content)


def odd_value(rng, depth=0):
    """Some value that may stand in a file: numbers, words, arrays, tensors, lists and dicts of them."""
    kind = rng.randrange(8 if depth < 2 else 6)
    if kind == 0:
        return rng.choice([None, True, -1, 0, 3, 10**30, 0.5, math.nan, math.inf, "", "3", b"x", 1j])
    if kind in (1, 2):
        shape = [rng.choice([0, 1, 3, 4, 8, 16]) for _ in range(rng.randrange(5))]
        return np.zeros(shape, rng.choice(["u1", "i4", "i8", "f2", "f4", "f8", "c8", "U3", "?", "<M8[s]"]))
    if kind in (3, 4):
        shape = [rng.choice([0, 1, 3, 8]) for _ in range(rng.randrange(5))]
        return torch.ones(shape).to(rng.choice([torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64]))
    if kind == 5:
        return [rng.randrange(-2, 12) for _ in range(rng.randrange(6))]
    if kind == 6:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    keys = ["indices", "images", "representations", "lr", "train_images", "train_labels", "test_images", "x"]
    return {key: odd_value(rng, depth + 1) for key in rng.sample(keys, rng.randrange(5))}


def odd_file(rng, folder):
    """(reader, a file for it that is odd, or was right before bytes of it were changed)."""
    kind = rng.choice(["npz", "pt", "npy", "pkl", "json", "txt", "mat", "png", "distilled"])
    value, right = odd_value(rng), rng.random() < 0.6
    path = folder / f"x.{'pt' if kind == 'distilled' else kind}"
    if kind == "npz":
        arrays = {"train_images": np.zeros((4, 8, 8, 3), np.uint8), "train_labels": np.arange(4)}
        odd = value if isinstance(value, dict) else {"train_images": value}
        odd = {k: v for k, v in odd.items() if isinstance(v, (np.ndarray, int, float, str))}
        np.savez(path, **arrays if right else {**(arrays if rng.random() < 0.5 else {}), **odd})
    elif kind in ("pt", "distilled"):
        whole = {"images": torch.randn(3, 3, 8, 8), "representations": torch.randn(3, 2), "lr": 0.1}
        torch.save((whole if kind == "distilled" else torch.tensor([1, 2, 3])) if right else value, path)
    elif kind == "npy":
        np.save(path, np.array([3, 1]) if right or not isinstance(value, np.ndarray) else value)
    elif kind == "pkl":
        path.write_bytes(pickle.dumps([3, 1, 2] if right else value, rng.randrange(6)))
    elif kind in ("json", "txt"):
        path.write_text("[3, 1, 2]" if kind == "json" and right else "3 1 2" if right else repr(value))
    elif kind == "mat":
        path.write_bytes(base64.b64decode(MAT_OF_SCIPY))
    else:
        path = folder / "set/train/x.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(rng.choice(["L", "RGB", "RGBA", "P", "1"]), (rng.choice([1, 3, 40]), 3)).save(path)
        shutil.copy(path, path.with_name("y.png"))
    if right or kind in ("mat", "png"):
        path.write_bytes(broken(rng, path.read_bytes()))
    readers = [lambda: evaluation.read_indices.__wrapped__(str(path), 10)]
    readers += [lambda: mkdt.read_representations(str(path), 3)] if kind in ("pt", "npy") else []
    return {"npz": lambda: data.load_dataset(str(path)), "mat": lambda: odd_mat(path),
            "png": lambda: data.load_dataset(str(folder / "set"), folder / "cache"),
            "distilled": lambda: evaluation.read_distilled.__wrapped__(str(path), "auto", (0.5,) * 3, (0.2,) * 3)}.get(
                kind, rng.choice(readers)), path


def odd_mat(path):
    """Reads a MATLAB file as the official lists are read."""
    (path.parent / "dogs").mkdir(exist_ok=True)
    for split in ("train", "test"):
        shutil.copy(path, path.parent / f"dogs/{split}_list.mat")
    data._folder("dogs", data._list_dogs)(path.parent, 8)


def test_odd_files_are_read_or_refused_in_one_line(tmp_path, capsys):
    """150 of them, or for as many seconds as MKDT_FUZZ says, from another seed on."""
    seconds, first, tried, refused = os.environ.get("MKDT_FUZZ"), int(os.environ.get("MKDT_FUZZ_SEED", 0)), 0, 0
    end = time.monotonic() + float(seconds or 0)
    while time.monotonic() < end if seconds else tried < 150:
        rng, folder = random.Random(first + tried), tmp_path / "x"
        folder.mkdir()
        reader, path = odd_file(rng, folder)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader()
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 600, (first + tried, str(error))
        except Exception as error:
            raise AssertionError(f"MKDT_FUZZ_SEED={first + tried}: {path.name}: {error!r}") from error
        tried += 1
        shutil.rmtree(folder)
    print(f"{tried} files, {refused} refused")
    assert refused > tried / 4


# ------------------------------------------------------------------------------------------------------------
# Several ranks
# ------------------------------------------------------------------------------------------------------------
def ssl_gradient(loss, z):
    """The projection head of `shared_loss`: the gradient of a self-supervised loss over two views z [2B, 6]."""
    head = nn.Linear(6, 5).double()
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 30).view(5, 6).sin())
        head.bias.zero_()
    network = nn.parallel.DistributedDataParallel(head) if models.ranks() > 1 else head
    views = [v[models.rank()::models.ranks()] for v in z.chunk(2)]
    value = mkdt.teacher_loss(network(torch.cat(views)).double(), loss, 0.1, 0.5)
    (value * models.ranks()).backward()
    return value.detach(), head.weight.grad


def shared_loss(rank, folder):
    """What each of two processes does: its share of the batch, and the result to a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    z = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data.save(folder / f"{rank}.pt", [ssl_gradient(loss, z) for loss in ("barlow", "simclr")])
    torch.distributed.destroy_process_group()


def test_two_ranks_have_the_self_supervised_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(shared_loss, (tmp_path,), nprocs=2)
    z = torch.randn(16, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for rank in range(2):
        for loss, (value, grad) in zip(("barlow", "simclr"), data.load(tmp_path / f"{rank}.pt")):
            whole, whole_grad = ssl_gradient(loss, z)
            assert relative(value, whole) < 1e-6 and relative(grad, whole_grad) < 1e-5      # the losses are float32


def torchrun(*arguments):
    """mkdt.py on two ranks, as the README says; the finished process."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           "mkdt.py", "--dataset", "shapes", "--device", "cpu", *arguments],
                          cwd=Path(mkdt.__file__).parent, capture_output=True, text=True, timeout=300)


def test_two_ranks_make_what_one_makes(tmp_path):
    two = torchrun(*at(tmp_path), *TINY)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("distill:") == 4 and "| MKDT |" in two.stdout                       # rank 0 alone speaks
    z = tmp_path / "run/representations.pt"
    torch.set_num_threads(1)                                     # as torchrun's ranks have: threads change the rounding
    assert mkdt.main(["--dataset", "shapes", "--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "one"),
                      *TINY, "--representations", str(z), "--trajectories-per-step", "2"]) == 0
    torch.set_num_threads(2)
    load = [lambda name, d=d: data.load(tmp_path / d / name) for d in ("run", "one")]
    for name in ("experts/expert_000.pt", "experts/expert_001.pt"):
        assert torch.equal(*(f(name) for f in load))
    ours, alone = (f("5pct_high_loss/distilled.pt") for f in load)
    assert torch.equal(ours["indices"], alone["indices"])
    assert relative(ours["images"], alone["images"]) < 1e-5 and ours["lr"] == pytest.approx(alone["lr"], rel=1e-5)
    tables = [json.loads((tmp_path / d / "5pct_high_loss/results.json").read_text()) for d in ("run", "one")]
    for a, b in zip(*tables):
        assert sorted(a["seeds"]) == sorted(b["seeds"]) == [0, 1, 2] and a["mean"] == pytest.approx(b["mean"], abs=0.5)


@pytest.mark.parametrize("flags, told", [(["--pixel-lr", "1e30", "--iterations", "50"], "is not usable"),
                                         ([], "expert_001.pt")], ids=["rank 0", "rank 1"])
def test_a_rank_that_fails_ends_the_run(tmp_path, flags, told):
    if not flags:                                                      # a folder where rank 1's expert is to be written
        (tmp_path / "run/experts/expert_001.pt").mkdir(parents=True)
    run = torchrun(*at(tmp_path), *TINY, *flags)
    assert run.returncode != 0 and told in run.stderr


# ------------------------------------------------------------------------------------------------------------
# The real command line, tiny
# ------------------------------------------------------------------------------------------------------------
TINY = ("--train-images 200 --teacher-width 2 --teacher-epochs 1 --teacher-batch 64 --width 4 --experts 2 --percent 5 "
        "--init high_loss --expert-epochs 2 --match-epochs 1 --max-start-epoch 1 --syn-steps 2 --iterations 2 "
        "--pretrain-epochs 1").split()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished tiny run of every stage."""
    root = tmp_path_factory.mktemp("run")
    assert mkdt.main(["--stage", "all", "--dataset", "shapes", *at(root), *TINY]) == 0
    return root


def at(root):
    return ["--data-dir", str(root / "data"), "--run-dir", str(root / "run")]


def test_all_stages_leave_what_readme_promises(finished):
    run, folder = finished / "run", finished / "run/5pct_high_loss"
    for file in ("config.json", "log.jsonl", "teacher.pt", "representations.pt", "representations_test.pt",
                 "experts/expert_000.pt", "experts/expert_001.pt"):
        assert (run / file).exists(), file
    d = data.load(folder / "distilled.pt")
    z = data.load(run / "representations.pt")
    assert d["images"].shape == (10, 3, 32, 32) and d["images"].dtype == torch.float32 and d["lr"] > 0
    assert torch.equal(d["representations"], z[d["indices"]]) and z.shape == (200, 16)
    assert (d["dataset"], d["percent"], d["iterations"]) == ("shapes", 5.0, 2)
    assert data.load(run / "experts/expert_000.pt", mmap=True).shape[0] == 3
    for picture in ("distilled.png", "neighbours.png"):
        with Image.open(folder / picture) as image:
            assert image.width > 500
    records = json.loads((folder / "results.json").read_text())
    keys = {"pretraining", "task", "labels_percent", "encoder", "protocol", "distilled_percent", "lr", "seeds",
            "accuracies", "mean", "std", "mse"}
    assert all(keys <= r.keys() and len(r["accuracies"]) == 3 for r in records)
    assert {r["pretraining"] for r in records} >= {"none", "random", "high_loss", "mkdt", "full"}
    table = (folder / "results.md").read_text()
    assert "| MKDT |" in table and "paired by seed" in table
    stages = [json.loads(line)["stage"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert {"teacher", "experts", "distill"} <= set(stages)


def test_pictures_show_what_they_say():
    named = {"a": torch.zeros(3, 3, 4, 4), "b": torch.full((3, 3, 4, 4), 0.5), "c": torch.full((3, 3, 4, 4), 0.2)}
    picture = np.asarray(mkdt.draw_picture(named, columns=2, zoom=2))[:, 62:]                # beside the names
    band = 3 * (8 + 2) + 8
    assert picture.shape == (2 * band + 8, 2 * 10, 3)
    for k, value in enumerate((0, 128, 51)):
        for top, left in ((0, 0), (0, 10), (band, 0)):
            assert (picture[top + 8 + 10 * k:top + 16 + 10 * k, left:left + 8] == value).all()
    assert (picture[band + 8:, 10:] == 255).all()                                            # the fourth is not there
    real = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    found = mkdt.nearest(torch.tensor([0.1, 3.4])[:, None, None, None].expand(-1, 3, 2, 2), real, lambda x: x.float(), 3)
    assert found.tolist() == [[0, 1, 2], [3, 4, 2]]


def test_curves_are_drawn_from_the_log(finished, tmp_path):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.jsonl"
    log.write_text((finished / "run/log.jsonl").read_text() + '{"stage": "tea')
    titles = [axes.get_title() for axes in mkdt.draw_curves(log).axes]
    assert {"teacher: loss", "experts: loss per epoch", "distill: loss", "distill: lr"} <= set(titles)


def test_initial_images_have_the_largest_loss_after_epoch_1(finished):
    run = finished / "run"
    dataset, z = data.load_dataset("shapes", finished / "data", train_images=200), data.load(run / "representations.pt")
    f = models.functional(models.ConvNet(16, 32, 4))
    x = dataset.batch(dataset.train_images)
    losses = torch.stack([(f(data.load(run / f"experts/expert_00{i}.pt")[1], x) - z).square().mean(dim=1) for i in (0, 1)])
    init = data.load(run / "5pct_high_loss/init.pt")
    assert torch.allclose(init["losses"], losses.mean(dim=0), rtol=1e-4)
    assert init["losses"].argsort(descending=True)[:10].tolist() == init["indices"].tolist()


def test_equation_2s_distance_is_that_of_the_encoder_and_no_cell_is_made_twice(finished, tmp_path, monkeypatch):
    cells, cell = [], evaluation.cell
    monkeypatch.setattr(evaluation, "cell", lambda *args: cells.append(args[4:6]) or cell(*args))
    folder = str(shutil.copytree(finished, tmp_path / "x") / "run/5pct_high_loss")
    argv = ["--run-dir", folder, "--data-dir", str(finished / "data"), "--sets", "mkdt", "--seeds", "4", "--labels", "10",
            "--compile", "off", "--save-encoder", str(tmp_path / "encoders")]
    for _ in range(2):
        assert evaluation.main(argv) == 0 and cells == [("mkdt", 4)]
    encoder = models.ConvNet(16, 32, 4)
    encoder.load_state_dict(data.load(next((tmp_path / "encoders").iterdir())))
    dataset = data.load_dataset("shapes", finished / "data", train_images=200)
    with torch.no_grad():
        expected = F.mse_loss(encoder(dataset.batch(dataset.test_images)), data.load(finished / "run/representations_test.pt"))
    record, = (r for r in data.read_json(folder + "/results.json") if r["labels_percent"] == 10)
    assert record["mses"] == [pytest.approx(float(expected), rel=1e-4)]


def test_nothing_finished_is_run_again(finished, monkeypatch):
    files = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.pt")}
    monkeypatch.setattr(evaluation, "cell", None)
    assert mkdt.main(["--stage", "all", "--dataset", "shapes", *at(finished), *TINY]) == 0
    assert files == {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.pt")}


def with_gpu(*command):
    """The finished process of `command`, python's arguments, which sees the GPUs that the tests themselves do not."""
    env = {k: v for k, v in {**os.environ, "CUDA_VISIBLE_DEVICES": GPU, "MKDT_GPU": "1"}.items() if v is not None}
    return subprocess.run([sys.executable, *command], cwd=Path(mkdt.__file__).parent, env=env, capture_output=True,
                          text=True)


needs_gpu = pytest.mark.skipif("True" not in with_gpu("-c", "import torch; print(torch.cuda.is_available())").stdout,
                               reason="there is no GPU")


@needs_gpu
def test_matching_gradient_on_a_gpu_replayed_and_without_waiting():
    run = with_gpu("-c", "import torch, test_mkdt; torch.backends.cudnn.allow_tf32 = False; "
                         "again = test_mkdt.compiled_matching_gradient('cuda'); "
                         "assert not torch._dynamo.utils.counters['inductor']['cudagraph_skips']; "
                         "torch.cuda.set_sync_debug_mode('error'); again()")
    assert run.returncode == 0, run.stderr


@needs_gpu
@pytest.mark.parametrize("flags", [[], ["--compile", "on"], ["--deterministic"]])
def test_all_stages_run_on_a_gpu(tmp_path, flags):
    run = with_gpu("mkdt.py", "--dataset", "shapes", "--device", "cuda", *at(tmp_path), *TINY, *flags)
    assert run.returncode == 0 and "ing failed (" not in run.stdout, run.stdout + run.stderr
    d = data.load(tmp_path / "run/5pct_high_loss/distilled.pt")
    assert d["images"].isfinite().all() and d["lr"] > 0 and "| MKDT |" in run.stdout


def test_asked_to_stop_a_loop_saves_and_ends(tmp_path):
    state, path, before = torch.zeros(2), tmp_path / "x.pt", signal.getsignal(signal.SIGINT)
    with data.Checkpoint(path) as checkpoint:
        assert not checkpoint.due()
        signal.raise_signal(signal.SIGINT)                                                           # once: Ctrl-C
        assert checkpoint.due()
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(3, state=state + 1)
    with pytest.raises(KeyboardInterrupt), data.Checkpoint(path) as checkpoint:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)                                              # twice: at once, and without it
    assert data.Checkpoint(path).restore(state=state) == 3 and state.tolist() == [1, 1]
    assert signal.getsignal(signal.SIGINT) is before


def start(*arguments):
    """mkdt.py in a process of its own."""
    return subprocess.Popen([sys.executable, "mkdt.py", *arguments], text=True, cwd=Path(mkdt.__file__).parent,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


LONGER = ("--teacher-epochs 8 --teacher-batch 16 --expert-epochs 10 --expert-batch 8 --iterations 30 --percent 10 "
          "--checkpoint-minutes 0.0003").split()
KILLS = int(os.environ.get("MKDT_KILLS", 1))                                    # rounds of kills; many take hours


@pytest.mark.parametrize("compiled", ["off"] if KILLS == 1 else ["off", "on"])
def test_killed_at_any_moment_it_goes_on_as_if_nothing_had_happened(compiled, tmp_path):
    """Stopped in every stage at a random moment, by SIGKILL or SIGTERM, and started again: the same tensors."""
    np.savez(tmp_path / "x.npz", **data.make_shapes(100, 20, size=16))
    flags = ["--dataset", str(tmp_path / "x.npz"), *SMALLEST, *LONGER, "--compile", compiled]
    whole = start("--run-dir", str(tmp_path / "run"), *flags)
    error = whole.communicate()[1]
    assert whole.returncode == 0, error
    rng, resumed = random.Random(KILLS), set()
    for _ in range(KILLS):
        where = ["--run-dir", str(tmp_path / "killed"), *flags]
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        all_five = ("teacher", "experts", "init", "distill", "eval")
        for stage in ("teacher", "experts", "distill") if KILLS == 1 else all_five:
            process, said = start(*where), []
            for line in process.stdout:
                said.append(line)
                if line.startswith(f"{stage}:"):
                    break
            saved = {"teacher": "teacher_checkpoint.pt", "experts": "experts/*.checkpoint",
                     "distill": "*/distill_checkpoint.pt"}.get(stage, "*")
            while process.poll() is None and not list((tmp_path / "killed").glob(saved)):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3))
            process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
            resumed |= set(re.findall(r"resuming from .*/(teacher|expert|distill)_", "".join(said) + process.stdout.read()))
            process.communicate()
        last = start(*where)
        out, error = last.communicate()
        assert last.returncode == 0, error
        resumed |= set(re.findall(r"resuming from .*/(teacher|expert|distill)_", out))
        for file in sorted(p.relative_to(tmp_path / "run") for p in (tmp_path / "run").rglob("*.pt")):
            one, other = (data.load(tmp_path / folder / file) for folder in ("run", "killed"))
            same(one, other, file)
        one, other = (json.loads((tmp_path / d / "10pct_high_loss/results.json").read_text()) for d in ("run", "killed"))
        assert one == other
        assert not list((tmp_path / "killed").rglob("*.beside")) and not list((tmp_path / "killed").rglob("*.checkpoint"))
    assert len(resumed) >= 2, resumed                         # at moments at which there was something to go on with


def same(a, b, where):
    """Asserts that a and b, nested tensors, numbers and words, are equal."""
    if torch.is_tensor(a):
        assert a.shape == b.shape and (a.isnan() & b.isnan() | (a == b)).all(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            same(a[k], b[k], (where, k))
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for x, y in zip(a, b):
            same(x, y, where)
    else:
        assert a == b, where


# ------------------------------------------------------------------------------------------------------------
# What is documented is executed
# ------------------------------------------------------------------------------------------------------------
UNITS = re.compile(r"\b(epochs?|images?|steps?|percent|pixels?|rate|weight|probability|share|channels|minutes|seconds|seed|"
                   r"iterations|momentum|temperature|medians|trajectories|draws?|pooling)\b")


@pytest.mark.parametrize("script", [mkdt, evaluation])
def test_help_lists_each_flag_with_its_default_and_unit(script, monkeypatch, capsys):
    parsers = []
    monkeypatch.setattr("argparse.ArgumentParser.parse_args", lambda parser, argv: parsers.append(parser) or sys.exit(0))
    with pytest.raises(SystemExit):
        script.parse([])
    text, actions = " ".join(parsers[0].format_help().split()), parsers[0]._actions[1:]
    without = {"--run-dir", "--table", "--representations", "--save-encoder", "--paired"}         # no default, or told
    for action in actions:
        flag, told = action.option_strings[0], parsers[0]._get_formatter()._expand_help(action)
        assert " ".join(told.split()) in text and len(told) > 15, flag
        assert flag in without or action.nargs == 0 or "(default" in told, flag
        assert action.type not in (int, float) or UNITS.search(told), flag
    assert len(actions) > (40 if script is mkdt else 15)


SMALLEST = ("--teacher-width 1 --teacher-epochs 1 --teacher-batch 32 --width 2 --experts 2 --expert-epochs 2 --match-epochs 1 "
            "--max-start-epoch 1 --syn-steps 2 --iterations 2 --pretrain-epochs 1 --compile off --bf16 off "
            "--train-images 100").split()


def outcome(run):
    """Every tensor and score that a run leaves, by file; not the settings they were made with."""
    found = {str(p.relative_to(run)): data.load(p) for p in run.rglob("*.pt")}
    for p in run.rglob("results.json"):
        found[p.name] = [(r["accuracies"], r["mses"]) for r in data.read_json(p)]
    return found


def images(outcome):
    """The distilled images of an `outcome`."""
    return next(v["images"] for k, v in outcome.items() if k.endswith("/distilled.pt"))


def differ(a, b):
    """Whether `same` finds a difference."""
    try:
        same(a, b, "")
    except AssertionError:
        return True
    return False


def test_every_setting_changes_something(tmp_path, monkeypatch):
    arrays = data.make_shapes(100, 20, size=8)
    np.savez(tmp_path / "x.npz", **arrays)
    for i in range(20):                                                           # a folder, for --image-size
        path = tmp_path / f"pets/{'train' if i < 16 else 'test'}/{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(arrays["train_images"][i]).save(path)

    def run(name, *changes, dataset="x.npz", begin=None):
        if begin:                                                                # what does not depend on it stays
            shutil.copytree(tmp_path / begin, tmp_path / name)
        argv = ["--dataset", str(tmp_path / dataset), "--data-dir", str(tmp_path), "--run-dir", str(tmp_path / name),
                *SMALLEST, "--train-images", "0", "--percent", "10", "--clip", "1", "--syn-batch", "4", "--iterations", "6",
                "--force", *changes]
        with monkeypatch.context() as patch:                            # evaluation only where its settings are changed
            if not any("pretrain" in word for word in changes):
                patch.setitem(mkdt.STAGES, "eval", lambda run: None)
            assert mkdt.main(argv) == 0, changes
        return outcome(tmp_path / name)
    base, simclr = run("base"), run("simclr", "--ssl", "simclr")
    assert differ(images(base), images(run("objective", "--objective", "ce")))
    judged = run("judged", "--pretrain-epochs", "1")
    changed = {
        "train_images": 80, "teacher_width": 2, "teacher_epochs": 2, "teacher_batch": 16, "teacher_lr": 0.02,
        "teacher_decay": 0.1, "lambd": 0.5, "crop_scale": 0.5, "gray": 1, "max_pool": 1, "bf16": "on", "width": 3,
        "expert_epochs": 3, "expert_lr": 0.05, "expert_momentum": 0, "expert_decay": 0.1, "expert_batch": 10, "experts": 3,
        "init": "random", "percent": 20, "syn_steps": 3, "match_epochs": 2, "max_start_epoch": 0, "pixel_lr": 1,
        "syn_lr": 0.2, "syn_lr_lr": 1e-3, "syn_momentum": 0, "syn_batch": 5, "clip": 0, "trajectories_per_step": 2,
        "iterations": 7, "pretrain_epochs": 2, "pretrain_batch": 3, "pretrain_lr": 0.01}
    assert {*changed, "ssl", "objective", "temperature", "image_size"} == mkdt.SETTINGS.keys()
    for name, value in changed.items():
        more = ["--expert-epochs", "3"] if name == "match_epochs" else []
        begin = "judged" if "pretrain" in name else None if name in ("init", "percent") else "base"
        other = run(name, f"--{name.replace('_', '-')}", str(value), *more, begin=begin)
        if "pretrain" in name:
            assert differ(judged["results.json"], other["results.json"]), name
        else:                                         # experts trained for longer are read no further: README says so
            assert differ(images(base), images(other)) == (name != "expert_epochs"), name
    hot = run("temperature", "--ssl", "simclr", "--temperature", "0.1")
    assert differ(images(base), images(simclr)) and differ(images(simclr), images(hot))
    assert differ(images(base), images(run("seed", "--seed", "1")))
    sizes = [run(f"pets{size}", "--image-size", str(size), "--percent", "50", dataset="pets") for size in (8, 12)]
    assert [r["50pct_high_loss/distilled.pt"]["images"].shape[-1] for r in sizes] == [8, 12]
    try:
        same(base, run("again", "--deterministic", "--checkpoint-minutes", "0.0001", "--log-seconds", "0"), "again")
    finally:
        torch.use_deterministic_algorithms(False)
    config, log = (tmp_path / "again/config.json").read_text(), (tmp_path / "again/log.jsonl").read_text()
    assert '"deterministic": true' in config and log.count("\n") > (tmp_path / "base/log.jsonl").read_text().count("\n")


def readme_commands():
    """The commands of README: those of its bash blocks, its shell functions filled in, and those in its lines, as lists of
    words."""
    text = (Path(mkdt.__file__).parent / "README.md").read_text()
    lines = [line.split("#")[0] for block in re.findall(r"```bash\n(.*?)```", text, re.S)
             for line in block.replace("\\\n", " ").splitlines()]
    for name, body in re.findall(r'(\w+)\(\) \{ (.*?) "\$@"; \}', "\n".join(lines)):
        lines = [re.sub(rf"^{name}(?= )", body, line) for line in lines]
    lines += [" ".join(code.split()) for code in re.findall(r"`(python (?:mkdt|eval)\.py [^`]*)`", text)]
    lines = [part.split() for line in lines for part in line.split("&&")]
    return [words for words in lines if words and words[0] in ("python", "torchrun", "pip")]


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    """Tiny, in the order they stand there; several processes as one, pip and pytest apart."""
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.chdir(tmp_path)
    shapes = data.make_shapes(100, 20, size=16)
    Path("data").mkdir()
    for name in ("data/cifar10.npz", "data/cifar100.npz", "data/shapes.npz", "mine.npz"):
        np.savez(name, **shapes)
    make_folder(Path("path/to/images"), count=50)
    np.save("z.npy", np.random.default_rng(0).normal(size=(100, 5)))
    Path("sas_cifar10.pkl").write_bytes(pickle.dumps([3, 1, 2]))
    data.save("krr_st/x_syn.pt", torch.rand(4, 3, 32, 32))
    data.save("krr_st/y_syn.pt", torch.randn(4, 8))
    whole = evaluation.evaluate
    commands = readme_commands()
    assert len(commands) > 15
    for words in sorted(commands, key=lambda words: "eval.py" in words):                # what they evaluate comes first
        if words[:3] == ["python", "-m", "pytest"] or words[0] == "pip" or "--help" in words:
            continue
        script = next(word for word in words if word.endswith(".py"))
        argv = words[words.index(script) + 1:]
        if script == "mkdt.py":
            with monkeypatch.context() as patch:
                patch.setattr(evaluation, "evaluate",
                              lambda folder, sets, **rest: whole(folder, ["none", "mkdt"], seeds=(0,), **rest))
                code = mkdt.main([*argv, *SMALLEST])
        else:
            code = evaluation.main([*argv, "--seeds", "0", "--krr-iterations", "2", "--dm-iterations", "2", "--ssl-epochs", "1",
                                    "--compile", "off"])
        assert code == 0, (words, capsys.readouterr().err)
    text = (Path(mkdt.__file__).parent / "README.md").read_text()
    snippet = re.search(r"```python\n(import torch\nd = .*?)```", text, re.S).group(1)
    encoder = models.ConvNet(8, 16, 2)
    before = models.flat_parameters(encoder)
    exec(snippet.replace("range(20)", "range(1)"), {"YourEncoder": lambda out_dim: encoder})
    assert not torch.equal(before, models.flat_parameters(encoder))


# ------------------------------------------------------------------------------------------------------------
# Random small configurations: each works, or is refused with the reason
# ------------------------------------------------------------------------------------------------------------
CONFIGURATIONS = int(os.environ.get("MKDT_CONFIGURATIONS", 12))


def random_configuration(rng, root):
    """(flags of a tiny run with anything odd about it, number of distilled images that it asks for)."""
    n, size, labels = rng.choice([2, 7, 40, 100, 100]), rng.choice([8, 9, 16]), rng.choice([1, 2, 3, 10])
    g = np.random.default_rng(rng.getrandbits(32))
    arrays = {"train_images": g.integers(0, 256, (n, size, size, 3), dtype=np.uint8)}
    if rng.random() < 0.1:
        arrays["train_images"][:] = 7                                                          # all images are alike
    if rng.random() < 0.8:
        arrays["test_images"] = g.integers(0, 256, (rng.choice([1, 5, 30]), size, size, 3), dtype=np.uint8)
    if rng.random() < 0.8:
        gaps = g.choice(10**9, labels, replace=False)
        arrays["train_labels"] = gaps[np.arange(n) % labels]
        if "test_images" in arrays:
            arrays["test_labels"] = g.choice(arrays["train_labels"], len(arrays["test_images"]))
    np.savez(root / "x.npz", **arrays)
    M, T, percent = rng.choice([1, 2]), rng.choice([0, 1, 2]), rng.choice([3, 10, 50, 50, 100])
    flags = {
        "teacher-width": rng.choice([1, 2]), "teacher-epochs": 1, "teacher-batch": rng.choice([2, 4, 64]),
        "ssl": rng.choice(["barlow", "simclr"]), "max-pool": rng.choice([0, 1]), "gray": rng.choice([0, 0.5, 1]),
        "crop-scale": rng.choice([0.01, 1]), "teacher-lr": rng.choice([1e-3] * 9 + [1e3]), "width": rng.choice([1, 3]),
        "experts": rng.choice([1, 2]), "expert-epochs": T + M, "expert-batch": rng.choice([1] + [8, 64] * 4),
        "expert-momentum": rng.choice([0, 0.9]), "expert-lr": rng.choice([0.01, 0.05] * 5 + [1e4]), "percent": percent,
        "init": rng.choice(["random", "high_loss"]), "syn-steps": rng.choice([1, 2, 5]), "match-epochs": M,
        "max-start-epoch": T, "pixel-lr": rng.choice([0, 1, 1e3]), "syn-momentum": rng.choice([0, 0.5]),
        "syn-lr": rng.choice([1e-3, 0.1]), "syn-lr-lr": rng.choice([0, 1e-4]), "syn-batch": rng.choice([1, 3, 64]),
        "clip": rng.choice([0, 1, 10]), "trajectories-per-step": rng.choice([1, 1, 2]),
        "iterations": rng.choice([0, 1, 3]), "pretrain-epochs": 1, "pretrain-batch": rng.choice([1] + [8, 64] * 4),
        "train-images": rng.choice([0] * 6 + [2, 5])}
    argv = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    if rng.random() < 0.6:
        z = g.normal(size=(n if not flags["train-images"] else min(n, flags["train-images"]), rng.choice([1, 5])))
        if rng.random() < 0.2:
            z[0, 0] = rng.choice([np.nan, np.inf])
        np.save(root / "z.npy", z)
        argv += ["--representations", str(root / "z.npy")]
    return argv, math.floor(min(n, flags["train-images"] or n) * percent / 100 + 1e-9)


def test_random_small_configurations_work_or_are_refused_with_a_reason(tmp_path, capsys, monkeypatch):
    worked, whole = 0, evaluation.evaluate
    for i in range(CONFIGURATIONS):
        rng, root = random.Random(i), tmp_path / str(i)
        root.mkdir()
        argv, size = random_configuration(rng, root)
        few = ["mkdt", *rng.sample(evaluation.DEFAULT_SETS, 2)]
        monkeypatch.setattr(evaluation, "evaluate", lambda folder, sets, **rest: whole(folder, few, seeds=(0,), **rest))

        def run(folder, seed, stage):
            code = mkdt.main(["--dataset", str(root / "x.npz"), "--compile", "off", "--stage", stage, "--seed", str(seed),
                              "--run-dir", str(root / folder), *argv])
            return code, capsys.readouterr().err
        told = f"configuration {i}: {' '.join(argv)}"
        code, error = run("a", 0, "all")
        assert code in (0, 2), told
        assert error == "" if code == 0 else error.startswith("mkdt.py: ") and error.count("\n") == 1, (told, error)
        found = list((root / "a").glob("*/distilled.pt"))
        if not found:
            assert code == 2 and "Traceback" not in error, told
            continue
        worked += 1                                                    # labels may still not suffice for evaluation
        d = data.load(found[0])
        assert len(d["images"]) == size == len(set(d["indices"].tolist())) and d["images"].isfinite().all(), told
        assert d["lr"] > 0 and torch.equal(d["representations"],
                                           data.load(root / "a/representations.pt")[d["indices"]]), told
        for expert in (root / "a/experts").glob("*.pt"):
            assert data.load(expert).isfinite().all(), told
        if i % 5 == 0:                                                # the same seed, the same tensors; another, others
            run("b", 0, "all"), run("c", 1, "all")
            for file in (root / "a").rglob("*.pt"):
                same(data.load(file), data.load(root / "b" / file.relative_to(root / "a")), (told, file.name))
            other = root / "c/experts/expert_000.pt"
            assert not other.exists() or not torch.equal(data.load(root / "a/experts/expert_000.pt"), data.load(other))
        shutil.rmtree(root)
    assert worked > CONFIGURATIONS / 3


def test_a_run_folder_has_one_holder(finished, capsys):
    with data.hold(finished / "run"):
        assert mkdt.main(["--dataset", "shapes", *at(finished), *TINY]) == 2
        assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
        assert evaluation.main(["--run-dir", str(finished / "run/5pct_high_loss")]) == 2
        assert "wait until it is done" in capsys.readouterr().err
    (finished / "run/experts/.expert_000.pt.x.beside").write_bytes(b"left by a killed process")
    with data.hold(finished / "run"):                                                          # free again, and tidied
        assert not (finished / "run/experts/.expert_000.pt.x.beside").exists()


def test_a_damaged_expert_is_made_again(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    file = tmp_path / "x/run/experts/expert_001.pt"
    whole = file.read_bytes()
    for damaged in (whole[:len(whole) // 2], whole[:900] + bytes([whole[900] ^ 1]) + whole[901:]):
        file.write_bytes(damaged)
        assert mkdt.main(["--stage", "experts", "--dataset", "shapes", *at(tmp_path / "x"), *TINY]) == 0
        assert "expert_001.pt" in capsys.readouterr().out
        assert torch.equal(data.load(file), data.load(finished / "run/experts/expert_001.pt"))


def test_what_a_disk_cannot_hold_is_refused_beforehand(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert mkdt.main(["--dataset", "shapes", "--data-dir", str(finished / "data"), "--run-dir", str(tmp_path / "x"),
                      *TINY]) == 2
    assert re.search(r"representations need 0 MB in .*x, where 0 MB are free: make room", capsys.readouterr().err)


def test_what_memory_cannot_hold_is_refused_beforehand(finished, tmp_path, monkeypatch, capsys):
    net = models.ConvNet(5, 32, 4)
    assert models.activation_bytes(net, torch.zeros(2, 3, 32, 32)) == 2 * 4 * (4 * (32**2 + 16**2 + 8**2) + 5)
    shutil.copytree(finished, tmp_path / "x")
    monkeypatch.setattr(data, "free_memory", lambda device: 1000)
    for stage, changed, flag in (("teacher", [], "--teacher-batch"), ("experts", ["--experts", "3"], "--expert-batch"),
                                 ("distill", ["--iterations", "3"], "--syn-batch")):
        where = at(tmp_path / "x") if stage != "teacher" else [*at(finished)[:2], "--run-dir", str(tmp_path / "new")]
        assert mkdt.main(["--stage", stage, "--dataset", "shapes", *where, *TINY, *changed]) == 2
        assert f"{stage}: a step needs at least 0.0 GB of memory, 0.0 GB are free on cpu: lower {flag}" in capsys.readouterr().err


def test_a_run_made_before_there_were_objectives_goes_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "x")
    for path in (tmp_path / "x/run").rglob("config.json"):
        path.write_text(re.sub(r'\s*"objective": "kd",', "", path.read_text()))
        assert "objective" not in path.read_text()
    assert mkdt.main(["--dataset", "shapes", *at(tmp_path / "x"), *TINY]) == 0


def test_encoding_takes_smaller_chunks_when_memory_is_short():
    sizes = []

    def small(x):
        sizes.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.flatten(1)
    images = torch.arange(10 * 3 * 2 * 2, dtype=torch.uint8).view(10, 3, 2, 2)
    assert torch.equal(evaluation.encode(small, images, lambda x: x, chunk=8), images.flatten(1).float())
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        evaluation.encode(lambda x: small(x.repeat(4, 1, 1, 1)), images, lambda x: x)


def test_bench_measures_every_stage(tmp_path, capsys):
    assert mkdt.main(["--stage", "bench", "--dataset", "shapes", *at(tmp_path), *TINY]) == 0
    bench = json.loads((tmp_path / "run/5pct_high_loss/bench.json").read_text())
    assert {row["step"].split(":")[0] for row in bench["steps"]} == {"teacher", "experts", "init", "distill", "eval"}
    assert all(row["ms"] > 0 and row["images/s"] > 0 for row in bench["steps"])
    assert [row["N"] for row in bench["matching_gradient"]] == 2 * [1, 2, 4, 8]
    assert "the whole run: about" in capsys.readouterr().out and list((tmp_path / "run").iterdir()) == [
        tmp_path / "run/5pct_high_loss"]                                                     # nothing else is kept


def test_other_settings_stop_and_say_what_differs(finished, capsys):
    assert mkdt.main(["--dataset", "shapes", *at(finished), *TINY, "--expert-lr", "0.2"]) == 2
    message = capsys.readouterr().err
    assert "experts" in message and "expert_lr 0.05 -> 0.2" in message and message.count("\n") == 1


def test_stages_one_by_one_in_any_order(tmp_path, capsys):
    where = ["--dataset", "shapes", *at(tmp_path), *TINY]
    for stage in ("experts", "init", "distill", "eval"):                   # too early: refused, and nothing is spoilt
        assert mkdt.main(["--stage", stage, *where]) == 2
        assert re.search(r"representations.pt does not exist.*--stage all", capsys.readouterr().err)
    for stage in ("teacher", "experts", "init", "distill"):
        assert mkdt.main(["--stage", stage, *where, "--iterations", "0"]) == 0
    d = data.load(tmp_path / "run/5pct_high_loss/distilled.pt")
    assert d["iterations"] == 0 and d["lr"] == pytest.approx(0.25)                  # the initial set, as it was chosen
    dataset = data.load_dataset("shapes", tmp_path / "data")
    assert torch.equal(d["images"], dataset.batch(dataset.train_images[d["indices"]]))
    sets = {json.loads(line)["set"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()}
    assert sets == {"5pct_high_loss"}


def test_more_iterations_and_seeds_extend(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    where = ["--dataset", "shapes", *at(tmp_path / "x"), *TINY]
    before = data.load(tmp_path / "x/run/5pct_high_loss/distilled.pt")
    assert mkdt.main(["--stage", "distill", *where, "--iterations", "3"]) == 0
    after = data.load(tmp_path / "x/run/5pct_high_loss/distilled.pt")
    assert after["iterations"] == 3 and not torch.equal(before["images"], after["images"])
    folder = str(tmp_path / "x/run/5pct_high_loss")
    assert evaluation.main(["--run-dir", folder, "--data-dir", str(tmp_path / "x/data"), "--seeds", "0", "5",
                            "--sets", "random@0.3", "mkdt", "--labels", "10", "--save-encoder", folder + "/encoders"]) == 0
    records = json.loads((Path(folder) / "results.json").read_text())
    new = {(r["pretraining"], tuple(r["seeds"])) for r in records if r["labels_percent"] == 10}
    assert new == {("random@0.3", (0, 5)), ("mkdt", (0, 5))}
    kept = {r["pretraining"] for r in records if r["labels_percent"] == 5}      # rows that the new images do not touch
    assert kept == {"none", "random", "high_loss", "full"}
    model = models.ConvNet(16, 32, 4)
    kept, = (Path(folder) / "encoders").glob("random_at_0.3_5_*.pt")
    model.load_state_dict(data.load(kept))
    shutil.move(tmp_path / "x/run", tmp_path / "x/another")                          # another run's are other files
    assert evaluation.main(["--run-dir", str(tmp_path / "x/another/5pct_high_loss"), "--data-dir", str(tmp_path / "x/data"),
                            "--seeds", "5", "--sets", "random@0.3", "--save-encoder", str(tmp_path / "encoders")]) == 0
    assert kept.name not in {p.name for p in (tmp_path / "encoders").iterdir()}
    Path(tmp_path / "x/data/shapes.npz").unlink()
    np.savez(tmp_path / "x/data/shapes.npz", **data.make_shapes(400, 100, seed=7))
    capsys.readouterr()
    assert evaluation.main(["--run-dir", str(tmp_path / "x/another/5pct_high_loss"), "--data-dir",
                            str(tmp_path / "x/data")]) == 2
    assert "the images of shapes are not those that" in capsys.readouterr().err


def test_experts_extend_are_remade_identically_and_forced(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "x")
    where, files = ["--dataset", "shapes", *at(tmp_path / "x"), *TINY], tmp_path / "x/run/experts"
    before = [data.load(files / f"expert_00{i}.pt") for i in range(2)]
    (files / "expert_001.pt").unlink()
    assert mkdt.main(["--stage", "experts", *where, "--experts", "3"]) == 0
    assert all(torch.equal(before[i], data.load(files / f"expert_00{i}.pt")) for i in range(2))
    assert not torch.equal(before[0][0], data.load(files / "expert_002.pt")[0])
    old = data.load(tmp_path / "x/run/5pct_high_loss/distilled.pt")["images"]
    assert mkdt.main(["--stage", "all", *where, "--expert-lr", "0.2", "--force"]) == 0
    assert not torch.equal(before[0][1], data.load(files / "expert_000.pt")[1])
    assert not torch.equal(old, data.load(tmp_path / "x/run/5pct_high_loss/distilled.pt")["images"])


def test_a_stage_refuses_what_was_made_from_another_teacher(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    where = ["--dataset", "shapes", *at(tmp_path / "x"), *TINY]
    assert mkdt.main(["--stage", "distill", *where, "--teacher-width", "4", "--force"]) == 2
    assert "teacher_width 2 -> 4" in capsys.readouterr().err
    z = data.load(tmp_path / "x/run/representations.pt")
    data.save(tmp_path / "x/run/representations.pt", z + 1)                    # not the ones the experts learned from
    assert mkdt.main(["--stage", "all", *where]) == 2
    assert "the stage experts of another run (representations" in capsys.readouterr().err
    assert evaluation.main(["--run-dir", str(tmp_path / "x/run/5pct_high_loss"), "--data-dir", str(finished / "data")]) == 2
    assert "other representations" in capsys.readouterr().err


def test_unlabelled_images_with_simclr_and_random_initialisation(tmp_path, capsys):
    np.savez(tmp_path / "mine.npz", train_images=data.make_shapes(100, 1)["train_images"])
    flags = ["--dataset", str(tmp_path / "mine.npz"), *at(tmp_path), *TINY, "--train-images", "0", "--ssl", "simclr"]
    assert mkdt.main([*flags, "--init", "random"]) == 0
    assert "has no labels" in capsys.readouterr().out
    assert len(data.load(tmp_path / "run/5pct_random/distilled.pt")["images"]) == 5
    assert evaluation.main(["--run-dir", str(tmp_path / "run/5pct_random"), "--tasks", "shapes", "--seeds", "0",
                            "--data-dir", str(tmp_path / "data")]) == 0
    assert "| MKDT |" in (tmp_path / "run/5pct_random/results.md").read_text()


def test_any_rivals_set_through_the_same_door(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    folder = tmp_path / "x/run/5pct_high_loss"
    d, g = data.load(folder / "distilled.pt"), torch.Generator().manual_seed(0)
    (tmp_path / "sas.pkl").write_bytes(pickle.dumps({"indices": d["indices"].tolist()}))
    data.save(tmp_path / "krr/x_syn.pt", torch.rand(10, 3, 32, 32, generator=g))
    data.save(tmp_path / "krr/y_syn.pt", torch.randn(10, 7, generator=g))                         # of another teacher
    argv = ["--run-dir", str(folder), "--data-dir", str(tmp_path / "x/data"), "--seeds", "0", "1", "--labels", "5"]
    sas, ours, krr = f"subset:{tmp_path}/sas.pkl", f"distilled:{folder}", f"distilled:{tmp_path}/krr@0.05"
    assert evaluation.main([*argv, "--sets", "random", "initial", sas, "mkdt", ours, krr, "krr_st", "random:ssl",
                            "dm", "--krr-iterations", "3", "--dm-iterations", "2", "--ssl-epochs", "1", "--paired"]) == 0
    scores = {r["pretraining"]: r for r in json.loads((folder / "results.json").read_text()) if r["labels_percent"] == 5}
    assert scores[sas]["accuracies"] == scores["initial"]["accuracies"]                       # the same images and rate
    assert scores[ours]["accuracies"] == scores["mkdt"]["accuracies"][:2] and scores[ours]["lr"] == d["lr"]
    assert scores[krr]["lr"] == 0.05 and scores[krr]["mse"] is None and scores["krr_st"]["mse"] is not None
    assert len({tuple(scores[name]["accuracies"][:2]) for name in ("random", "mkdt", krr, "krr_st", "dm", "random:ssl")}) == 6
    table = capsys.readouterr().out
    for row in ("SAS Subset", "KRR-ST", "DM (no labels)", "Random Subset (SSL)", "MKDT", "taken for raw ones", "minus Random Subset"):
        assert row in table, row
    file, = folder.glob("krr_st_*.pt")
    made = data.load(file)
    assert made["images"].shape == (10, 3, 32, 32) and not torch.equal(made["images"], d["images"])
    lines = (folder / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(r["seeds"]) for r in json.loads((folder / "results.json").read_text()))
    before = file.stat().st_mtime_ns
    assert evaluation.main([*argv, "--sets", "krr_st", "--krr-iterations", "3", "--seeds", "2"]) == 0   # not made again
    assert file.stat().st_mtime_ns == before
    assert evaluation.main([*argv, "--sets", "mkdt"]) == 0                   # with other --krr-iterations: all are kept
    assert "dropped" not in capsys.readouterr().out and "KRR-ST" in (folder / "results.md").read_text()
    assert evaluation.main([*argv, "--sets", "random:ssl", "--ssl-epochs", "2"]) == 0
    assert "earlier results of random:ssl are dropped" in capsys.readouterr().out


def test_encoders_tasks_and_protocols_of_the_paper(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    folder, g = tmp_path / "x/run/5pct_high_loss", np.random.default_rng(0)
    np.savez(tmp_path / "x/data/cifar10.npz", **{f"{s}_{k}": v for s in ("train", "test") for k, v in (
        ("images", g.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)), ("labels", np.arange(40) % 4))})
    argv = ["--run-dir", str(folder), "--data-dir", str(tmp_path / "x/data"), "--seeds", "0", "--sets", "none", "mkdt"]
    assert evaluation.main([*argv, "--encoders", "resnet10:4", "convnet", "--tasks", "shapes", "cifar10", "cars",
                            "--labels", "10", "--stratified"]) == 0
    out = capsys.readouterr().out
    assert "cars is left out: cannot fetch Stanford Cars" in out and "Left out: cars" in out
    assert "resnet10:4, linear probe, stratified labels" in out and "| shapes | cifar10 |" in out
    assert evaluation.main([*argv, "--tasks", "cifar10", "--protocol", "finetune", "--image-size", "16"]) == 0
    records = json.loads((folder / "results.json").read_text())
    tuned = [r for r in records if r["protocol"] == "finetune"]
    assert {(r["task"], r["labels_percent"], r["mse"]) for r in tuned} == {("cifar10-16px", 100, None)}
    assert {r["encoder"] for r in records if r["stratified"]} == {"resnet10:4", "convnet"}


def test_a_table_of_the_paper_beside_its_values(finished, tmp_path, monkeypatch, capsys):
    """Table 1's command, on a run that pretends to be of CIFAR-10."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "run", "runs/cifar10")
    shutil.move("runs/cifar10/5pct_high_loss", "runs/cifar10/2pct_high_loss")
    Path("runs/cifar10/2pct_high_loss/results.json").unlink()
    config = data.read_json("runs/cifar10/2pct_high_loss/config.json")
    run = Path("runs/cifar10/2pct_high_loss")
    Path("data").mkdir()
    shapes = data.read_npz(finished / "data/shapes.npz")
    np.savez("data/cifar10.npz", **{k: v[:200 if "train" in k else 100] for k, v in shapes.items()})
    config["settings"].update(width=128, teacher_width=64, train_images=0)     # the paper's values are for its settings
    config["distill"]["inputs"]["data"] = data.load_dataset("cifar10").fingerprint()
    data.save_json("runs/cifar10/2pct_high_loss/config.json", config)
    data.save(run / "distilled.pt", {**data.load(run / "distilled.pt"), "dataset": "cifar10", "percent": 2.0})

    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    assert evaluation.main(["--table", "1", "--krr-iterations", "1", "--seeds", "0", "1"]) == 0
    out, table = capsys.readouterr().out, (run / "results.md").read_text()
    assert "to download: tinyimagenet 248 MB, cifar100 169 MB, aircraft 2750 MB" in out
    assert out.count("is left out") == 6 and "| Labels | Pre-training set | Rate | cifar10 |" in table
    rows = table.splitlines()
    five = next(i for i, row in enumerate(rows) if row.startswith("| 5% | MKDT |"))
    assert "≠" in rows[five] and rows[five + 1].startswith("| | *paper* | | 53.08 ± 0.13 |")
    best = [row for row in rows if row.startswith("| 5%") and "**" in row]
    assert len(best) == 1 and "Full" not in best[0]
    assert evaluation.main(["--table", "4"]) == 2 and "5pct_high_loss" in capsys.readouterr().err
    assert evaluation.main(["--table", "7", "--tasks", "cifar10", "--sets", "none", "--seeds", "0"]) == 0
    out = capsys.readouterr().out
    assert "runs/cifar100/2pct_high_loss is left out" in out and "| 50% | No Pre-Training |" in out
    assert evaluation.main(["--table", "7", "--run-dir", str(run), "--tasks", "cifar10", "--sets", "none"]) == 0
    assert "| 50% | No Pre-Training |  | " in capsys.readouterr().out and len(data.read_json(run / "results.json")) > 10
    Path("runs/cifar10/teacher.pt").unlink()                                                   # another model's teacher
    assert evaluation.main(["--run-dir", str(run), "--sets", "none", "mkdt", "--tasks", "cifar10", "--seeds", "0", "1"]) == 0
    rows = (run / "results.md").read_text().splitlines()
    beside = {rows[i - 1].split("|")[2].strip() for i, row in enumerate(rows) if row.startswith("| | *paper*")}
    assert beside == {"No Pre-Training"}
    with pytest.raises(SystemExit):
        evaluation.main(["--sets", "none"])


def test_a_set_that_diverges_costs_its_own_cells_only(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "x")
    folder = tmp_path / "x/run/5pct_high_loss"
    assert evaluation.main(["--run-dir", str(folder), "--data-dir", str(tmp_path / "x/data"), "--seeds", "7",
                            "--sets", "random@1e30", "none"]) == 0
    out = capsys.readouterr().out
    assert "random@1e30, seed 7 is left out: " in out
    assert {r["pretraining"] for r in json.loads((folder / "results.json").read_text()) if 7 in r["seeds"]} == {"none"}


@pytest.mark.parametrize("flags,message", [
    ("--sets moco", "unknown pre-training set 'moco'"), ("--sets random@-1", "random@-1"), ("--labels nan", "0 images"),
    ("--labels 0.001", "0 images"), ("--device tpu", "--device tpu"), ("--tasks nothing", "unknown data set"),
    ("--run-dir /no/such", "/no/such holds no distilled.pt"), ("--encoders vgg", "unknown encoder 'vgg'"),
    ("--sets subset:/no/such.pkl", "subset:/no/such.pkl"), ("--sets subset:", "unknown pre-training set"),
    ("--sets distilled:/no/such.pt", "/no/such.pt does not exist"), ("--krr-iterations 0", "must be at least 1"),
    ("--image-size -3", "must be at least 8"),
    ("--labels 0.025", "all of one class"), ("--stratified --labels 0.1", "of class 0 is 0 images")])
def test_bad_evaluation_flags_are_one_clear_line(finished, capsys, flags, message):
    argv = ["--run-dir", str(finished / "run/5pct_high_loss"), "--data-dir", str(finished / "data"), *flags.split()]
    assert evaluation.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("system", ["ce", "ssl"])
def test_other_objectives_run_end_to_end(tmp_path, system, capsys):
    np.savez(tmp_path / "x.npz", **data.make_shapes(100, 100, size=16))
    argv = ["--dataset", str(tmp_path / "x.npz"), *SMALLEST, "--objective", system, "--run-dir", str(tmp_path / "run"),
            "--percent", "10", "--pretrain-epochs", "5", "--pretrain-batch", "10"]
    assert mkdt.main(argv) == 0
    said = capsys.readouterr().out
    assert "needs none" in said and not (tmp_path / "run/teacher.pt").exists()
    assert "no effect on teacher, experts or distillation here: --bf16, --teacher-batch, --teacher-epochs, --teacher-width" in said
    folder = tmp_path / "run/10pct_random"
    d, losses = data.load(folder / "distilled.pt"), data.load(folder / "init.pt")
    dataset = data.load_dataset(str(tmp_path / "x.npz"))
    assert "representations" not in d and "losses" not in losses and ("labels" in d) == (system == "ce")
    if system == "ce":
        assert torch.equal(d["labels"], dataset.train_labels[d["indices"]])
    assert not torch.equal(d["images"], dataset.batch(dataset.train_images[d["indices"]]))
    rows = {r["pretraining"]: r for r in data.read_json(folder / "results.json")}
    assert rows.keys() == {"none", "random", "random@mkdt", "mkdt", "full"} and rows["mkdt"]["mse"] is None
    assert len({tuple(r["accuracies"]) for r in rows.values()}) > 2
    assert f"| {'MTT' if system == 'ce' else 'MTT-SSL'} |" in (folder / "results.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.pt")}
    assert mkdt.main(argv) == 0
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*.pt")}         # nothing is made again
    one = data.load(tmp_path / "run/experts/expert_000.pt")
    (tmp_path / "run/experts/expert_000.pt").unlink()
    assert mkdt.main(argv) == 0 and torch.equal(one, data.load(tmp_path / "run/experts/expert_000.pt"))
    capsys.readouterr()
    assert evaluation.main(["--run-dir", str(folder), "--sets", "high_loss", "--seeds", "0"]) == 2
    assert "only runs with --objective kd" in capsys.readouterr().err
    assert evaluation.main(["--run-dir", str(folder), "--sets", f"distilled:{folder}", "random:ssl", "--seeds", "0",
                            "--ssl-epochs", "1"]) == (0 if system == "ce" else 2)
    assert mkdt.main([*argv, "--init", "high_loss"]) == 2 and "--init random" in capsys.readouterr().err
    assert mkdt.main([*argv, "--representations", "z.npy"]) == 2 and "has no teacher" in capsys.readouterr().err


def test_figure_1_of_four_systems(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", **data.make_shapes(300, 10, size=16))
    argv = ["--stage", "figure1", "--dataset", str(tmp_path / "x.npz"), "--run-dir", str(tmp_path / "run"), "--percent", "4",
            "--pixel-lr", "1", "--syn-lr-lr", "0", "--teacher-width", "1", "--teacher-epochs", "1", "--teacher-batch", "32",
            "--width", "2", "--expert-epochs", "4", "--syn-steps", "2", "--iterations", "3", "--compile", "off"]
    assert mkdt.main([*argv, "--objective", "ce"]) == 2 and "leave out --objective" in capsys.readouterr().err
    for name in mkdt.DATASETS:
        batches = {k: s["expert_batch"] for k, s in mkdt.figure1_systems(name, {"expert_batch": 32}).items()}
        assert batches == {"MTT": 32, "MTT-SSL": 32, "MTT-SSL, 4x batch": 128, "MKDT": 32}
    assert mkdt.main(argv) == 0
    found = data.read_json(tmp_path / "run/figure1/figure1.json")
    assert list(found) == list(batches)
    for name, values in found.items():
        assert len(values["variance"]) == 5 and values["variance"][0] < 1e-12 < min(values["variance"][1:]), name
        assert len(values["loss"]) == len(values["moved"]) == 3 and values["moved"][-1] > 0, name
    rows = (tmp_path / "run/figure1/figure1.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 * (5 + 3 + 3) and rows[1].startswith('variance,"MTT",0,')
    before = (tmp_path / "run/figure1/figure1.json").read_text()
    capsys.readouterr()
    assert mkdt.main(argv) == 0 and before == (tmp_path / "run/figure1/figure1.json").read_text()
    assert "figure1: MTT:" not in capsys.readouterr().out                                        # nothing is made again
    t = torch.tensor([[[0.0, 0.0], [1.0, 3.0]], [[0.0, 0.0], [3.0, 3.0]]])                           # [R, T + 1, P]
    assert mkdt.variance_of_trajectories(t).tolist() == [0.0, 0.5]


def test_representations_of_another_model(finished, tmp_path, capsys):
    z = np.random.default_rng(0).normal(size=(200, 6))
    np.save(tmp_path / "z.npy", z)
    where = ["--dataset", "shapes", "--data-dir", str(finished / "data"), "--run-dir", str(tmp_path / "run"), *TINY]
    assert mkdt.main([*where, "--representations", str(tmp_path / "z.npy")]) == 0
    d = data.load(tmp_path / "run/5pct_high_loss/distilled.pt")
    assert d["representations"].shape == (10, 6) and not (tmp_path / "run/teacher.pt").exists()
    for bad, message in ((z[:-1], "each of the 200 training images"), (z * np.nan, "NaN"), (z * 0, "the same")):
        np.save(tmp_path / "bad.npy", bad)
        capsys.readouterr()
        assert mkdt.main([*where, "--run-dir", str(tmp_path / "bad"), "--representations", str(tmp_path / "bad.npy")]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("flags,message", [
    ("--dataset nothing", "unknown data set 'nothing'"), ("--percent 0.1", "is 0 images"), ("--percent -1", "positive"),
    ("--percent 200", "at most 100"), ("--percent inf", "at most 100"), ("--gray 5", "at most 1"),
    ("--teacher-batch 1", "at least 2"), ("--width 0", "positive"), ("--syn-steps -3", "positive"),
    ("--expert-lr nan", "positive"), ("--ssl moco", "barlow, simclr"), ("--device tpu", "--device tpu"),
    ("--match-epochs 9", "raise --expert-epochs to 10"), ("--run-dir /proc/nothing", "cannot write"),
    ("--representations /no/such.pt", "/no/such.pt")])
def test_bad_flags_are_one_clear_line(finished, capsys, flags, message):
    argv = ["--dataset", "shapes", *at(finished), *TINY, *flags.split()]
    assert mkdt.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unknown_flags_fail():
    with pytest.raises(SystemExit) as stop:
        mkdt.main(["--iteration", "3"])
    assert stop.value.code == 2


def test_settings_are_tables_8_and_9(capsys):
    for (name, percent), (N, M, T_plus, pixel_lr) in {
            ("cifar10", 2): (40, 2, 5, 1e3), ("cifar100", 2): (40, 2, 2, 1e3), ("tinyimagenet", 2): (10, 2, 2, 1e5),
            ("cifar10", 5): (40, 2, 5, 1e4), ("cifar100", 5): (40, 2, 5, 1e4), ("tinyimagenet", 5): (10, 2, 2, 1e5),
    }.items():
        s = mkdt.resolve(name, {"percent": float(percent)})
        assert (s["syn_steps"], s["match_epochs"], s["max_start_epoch"], s["pixel_lr"]) == (N, M, T_plus, pixel_lr)
        assert s["expert_epochs"] == {"cifar10": 7, "cifar100": 7, "tinyimagenet": 4}[name] and s["clip"] == 10
    assert capsys.readouterr().out == ""
    assert mkdt.resolve("cifar10", {"percent": 4.0})["pixel_lr"] == 1e4 and "taking" in capsys.readouterr().out
    assert mkdt.resolve("cifar10", {"ssl": "simclr"})["teacher_epochs"] == 400
    assert mkdt.resolve("pictures", {"image_size": 64})["pixel_lr"] == 1e5
