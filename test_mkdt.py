"""Tests of MKDT: every formula against an independent one, every fast path against a naive one, and the real commands.

    python -m pytest
"""
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    a, b = models.build(lambda: models.ConvNet(4, 32, 8), 0, "a"), models.build(lambda: models.ConvNet(4, 32, 8), 0, "b")
    assert not torch.equal(models.flat_parameters(a), models.flat_parameters(b))
    models.load_flat_parameters(b, models.flat_parameters(a))
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


def test_download_failure_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr(data.torchvision.datasets.utils, "urlopen", offline, raising=False)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name, file in (("cifar10", "cifar-10-python.tar.gz"), ("tinyimagenet", "tiny-imagenet-200.zip")):
        with pytest.raises(InputError, match=f"cannot fetch {name}.*{file}.*--dataset shapes"):
            data.load_dataset(name, tmp_path)


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
    return (f, mkdt.kd_loss(f), models.flat_parameters(model), torch.randn(n, 3, 8, 8, generator=g, dtype=dtype),
            torch.randn(n, d, generator=g, dtype=dtype))


def test_sgd_step_is_torchs_and_experts_keep_copies():
    f, loss, theta, images, z = problem()
    step = mkdt.sgd_step(loss, momentum=0.9, decay=1e-4)
    trajectory = mkdt.train_expert(step, theta, images, z, lambda x: x, epochs=3, lr=0.1, batch_size=4, seed=5)
    again = mkdt.train_expert(step, theta, images, z, lambda x: x, epochs=2, lr=0.1, batch_size=4, seed=5)
    assert trajectory.shape == (4, len(theta)) and torch.equal(trajectory[:3], again)    # shorter training: a prefix
    assert torch.equal(trajectory[0], theta)
    assert all(not torch.equal(a, b) for a, b in zip(trajectory, trajectory[1:]))        # nothing aliases live weights

    model = models.load_flat_parameters(models.ConvNet(4, 8, 4, depth=2).double(), theta)
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
def unrolled_gradient(loss, theta, target, images, z, lr, batches):
    """The oracle: Eq. 4 as one function of images and rate, Eq. 8 inside it, differentiated as a whole."""
    def matching_loss(images, lr):
        end = theta
        for batch in batches:
            end = end - lr * torch.func.grad(loss)(end, images[batch], z[batch])
        return (end - target).square().sum() / (theta - target).square().sum()
    (grad_images, grad_lr), value = torch.func.grad_and_value(matching_loss, argnums=(0, 1))(images, lr)
    return value, grad_images, grad_lr


def matching_problem(steps, dtype=torch.float64):
    f, loss, theta, images, z = problem(dtype=dtype)
    target = theta + 0.1 * torch.randn(len(theta), generator=torch.Generator().manual_seed(3), dtype=dtype)
    # 10 images in batches of 4: short last batches, and from the fourth step on images that come again
    batches = mkdt.draw_batches(10, steps, 4, torch.Generator().manual_seed(4))
    return loss, theta, target, images, z, torch.tensor(0.5, dtype=dtype), batches


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


def test_compiled_matching_gradient_is_exact_enough_and_compiled_once_per_batch_size():
    loss, *rest = matching_problem(6, torch.float32)
    exact = unrolled_gradient(loss, *(x.double() if torch.is_tensor(x) else x for x in rest))
    gradient, adjoint = (torch.compile(g(loss), fullgraph=True, dynamic=False)
                         for g in (mkdt.inner_gradient, mkdt.inner_adjoint))
    result = mkdt.matching_gradient(gradient, adjoint, *rest)             # batches of 4 and of 2: two graphs each
    for ours, oracle in zip(result, exact):
        assert relative(ours.double(), oracle) < 1e-3
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = mkdt.matching_gradient(gradient, adjoint, *rest)
    assert all(torch.equal(a, b) for a, b in zip(result, again))


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
    loss = mkdt.kd_loss(lambda theta, x: theta * x)
    theta, x, z, lr, target = (torch.tensor([v], dtype=torch.float64) for v in (0.5, 2.0, 3.0, 0.1, 1.5))
    stepped = 0.5 - 0.1 * 2 * 2 * (0.5 * 2 - 3)
    value, _, grad_lr, _ = mkdt.matching_gradient(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), theta, target,
                                                  x, z, lr[0], [torch.tensor([0])])
    assert float(value) == pytest.approx((stepped - 1.5) ** 2 / 1.0)
    assert float(grad_lr) == pytest.approx(2 * (stepped - 1.5) * -(2 * 2 * (0.5 * 2 - 3)))


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
    grad[2] = 0                                                        # an image in no mini-batch: no part in the median
    clipped, count = mkdt.clip_per_image(grad, torch.full((5,), float("nan")), 0, 2.0)
    assert count == 1 and clipped.isfinite().all() and (clipped[2] == 0).all()
    spike, count = mkdt.clip_per_image(500 * torch.ones(4, 3, 2, 2), medians, 2, 2.0)         # a whole iteration
    assert count == 4 and torch.allclose(spike, 2 * torch.ones(4, 3, 2, 2))


def run_distill(tmp_path, iterations, seed=0, name="a", **changes):
    f, loss, theta, images, z = problem(dtype=torch.float32)
    g = torch.Generator().manual_seed(1)
    real, z_real = torch.randn(40, 3, 8, 8, generator=g), torch.randn(40, 4, generator=g)
    step = mkdt.sgd_step(loss, 0.9, 0.0)
    trajectory = mkdt.train_expert(step, theta, real, z_real, lambda x: x, 4, 0.05, 8, seed=0)
    settings = dict(trajectories=1, syn_steps=6, match_epochs=2, max_start_epoch=2, pixel_lr=3.0, syn_lr=0.1, syn_lr_lr=1e-3,
                    momentum=0.5, batch_size=8, clip=0.0)
    return mkdt.distill(mkdt.inner_gradient(loss), mkdt.inner_adjoint(loss), lambda i: trajectory, 1, images, z,
                        iterations, **{**settings, **changes}, seed=seed, log=data.Log(tmp_path / f"{name}.jsonl", 0),
                        checkpoint=data.Checkpoint(tmp_path / f"{name}.pt", changes.pop("minutes", 5)))


def test_distillation_lowers_equation_4(tmp_path):
    run_distill(tmp_path, 30)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert len(losses) == 30 and np.mean(losses[-9:]) < 0.95 * np.mean(losses[:9])


def test_distillation_resumes_bit_for_bit(tmp_path):
    images, lr, _ = run_distill(tmp_path, 6)
    run_distill(tmp_path, 4, name="b")
    resumed, resumed_lr, _ = run_distill(tmp_path, 6, name="b")
    assert torch.equal(images, resumed) and lr == resumed_lr
    assert not torch.equal(images, run_distill(tmp_path, 6, seed=1, name="c")[0])


def test_distillation_stops_with_a_reason(tmp_path):
    with pytest.raises(InputError, match=r"iteration \d+ is not usable: loss .*gradient norm nan.*expert 0 from epoch \d"):
        run_distill(tmp_path, 50, pixel_lr=1e20)
    with pytest.raises(InputError, match="new rate -") as stopped:
        run_distill(tmp_path, 50, syn_lr_lr=10.0, name="b")
    iteration = int(re.search(r"iteration (\d+)", str(stopped.value)).group(1))
    saved = data.load(tmp_path / "b.pt")                                 # the state before the bad iteration, and nothing of it
    images, lr, _ = run_distill(tmp_path, iteration, syn_lr_lr=10.0, name="c")
    assert saved["step"] == iteration and torch.equal(saved["images"], images) and saved["lr"] == lr > 0
    _, lr, _ = run_distill(tmp_path, 50, syn_lr_lr=10.0, name="d", clip=10.0)              # clipped, it stays positive
    assert lr > 0


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


def test_paired_difference_by_hand():
    records = [dict(pretraining=p, task="t", labels_percent=5, seeds=[0, 1, 2], accuracies=a)
               for p, a in (("random", [1.0, 2.0, 3.0]), ("mkdt", [2.0, 4.0, 6.0]))]
    mean, error, n = evaluation.paired(records, "mkdt", "t", 5)["random"]
    assert mean == pytest.approx(2) and error == pytest.approx(1 / math.sqrt(3)) and n == 3


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
    torch.set_num_threads(1)                                       # as torchrun's ranks have: threads change the rounding
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


def test_a_rank_that_fails_ends_the_run(tmp_path):
    run = torchrun(*at(tmp_path), *TINY, "--pixel-lr", "1e30", "--iterations", "50")
    assert run.returncode != 0 and "is not usable" in run.stderr


# ------------------------------------------------------------------------------------------------------------
# The real command line, tiny
# ------------------------------------------------------------------------------------------------------------
TINY = ("--train-images 200 --teacher-width 2 --teacher-epochs 1 --teacher-batch 64 --width 4 --experts 2 --percent 5 --init high_loss "
        "--expert-epochs 2 --match-epochs 1 --max-start-epoch 1 --syn-steps 2 --iterations 2 --pretrain-epochs 1").split()


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
    with Image.open(folder / "distilled.png") as image:
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


def test_nothing_finished_is_run_again(finished):
    files = {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.pt")}
    assert mkdt.main(["--stage", "all", "--dataset", "shapes", *at(finished), *TINY]) == 0
    assert files == {p: p.stat().st_mtime_ns for p in (finished / "run").rglob("*.pt")}


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


def test_more_iterations_and_seeds_extend(finished, tmp_path):
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
    model.load_state_dict(data.load(Path(folder) / "encoders/random_at_0.3_5.pt"))


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


@pytest.mark.parametrize("flags,message", [
    ("--sets moco", "unknown pre-training set 'moco'"), ("--sets random@-1", "random@-1"), ("--labels nan", "0 images"),
    ("--labels 0.001", "0 images"), ("--device tpu", "--device tpu"), ("--tasks nothing", "unknown data set"),
    ("--run-dir /no/such", "cannot read /no/such/config.json")])
def test_bad_evaluation_flags_are_one_clear_line(finished, capsys, flags, message):
    argv = ["--run-dir", str(finished / "run/5pct_high_loss"), "--data-dir", str(finished / "data"), *flags.split()]
    assert evaluation.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


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
