"""Data of MKDT: images as one uint8 tensor on the device, augmented there in whole batches;
files that are whole or absent, checkpoints and progress.

    load_dataset      by name (see OFFICIAL), from a folder, or from an .npz file
    two_views         the augmentations A of Eq. 1, with their own draw for every image
    follow            wraps a training loop: progress, refusal of NaN, checkpoints

Every data set is decoded once into <data-dir>/<name>.npz: uint8 train_images, test_images
[N, H, H, 3] and int64 train_labels, test_labels [N]. Where it lies, nothing is downloaded."""
import json
import math
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS, default_loader, make_dataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import (InterpolationMode, resize, rgb_to_grayscale,
                                               to_pil_image)

from models import RANK, InputError, first_line, rank_0_first

# ---- Files -----------------------------------------------------------------------------------
def write_file(path, write):
    """Writes `path` by write(file): beside it first, then renamed, so that it is never half."""
    path, beside = Path(path), Path(f"{path}.{os.getpid()}.beside")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:            # torch.save makes a RuntimeError of both
        if beside.exists():
            beside.unlink()
        raise InputError(f"cannot write {path}: {first_line(error)}") from error

def save(path, value):
    """torch.save of tensors, numbers, strings, lists and dicts."""
    write_file(path, lambda file: torch.save(value, file))

def save_text(path, text):
    """A text file."""
    write_file(path, lambda file: file.write(text.encode()))

def load(path, **options):
    """torch.load of plain data. Raises InputError, naming the file, on anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run the stage that makes it first") from None
    except Exception as error:                      # pickle, zip and torch each have their own
        raise InputError(f"{path} is not a whole torch file of plain data "
                         f"({first_line(error)})") from error

class Diverged(InputError):
    """A loop whose values are no longer finite."""

# ---- Training loops are generators of (step, {name: value}); this is what follows them -------
class Log:
    """A progress line every so many seconds on the screen, and the same as JSON lines in `path`.
    minutes: between two checkpoints of `follow`."""

    def __init__(self, path=None, seconds=10.0, minutes=5.0):
        self.path, self.seconds, self.minutes, self.last = path, seconds, minutes, -math.inf

    def __call__(self, stage, step, total, rate=0.0, **values):
        """rate: steps a second."""
        self.last = time.monotonic()
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        speed = f"{rate:.3g} it/s  {(total - step) / rate / 60:.1f} min left" if rate else ""
        print(f"{stage:<8} {step:>6}/{total}  {shown}  {speed}", flush=True)
        if self.path and RANK == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

def follow(stage, loop, total, log, path=None, **state):
    """Yields what `loop` yields, (step, {name: value}); when due, logs it and saves `state` (see
    `restore`) in the file `path`. Only then are values read from the device: means since the last
    line. Raises Diverged where one is not finite, or a learned rate "lr" not positive."""
    recent, began, saved = [], time.monotonic(), time.monotonic()
    for done, (step, values) in enumerate(loop, 1):
        yield step, values                     # the caller may take a snapshot first
        recent.append(values)
        now = time.monotonic()
        due = path and (now - saved >= 60 * log.minutes or step == total)
        if not due and now - log.last < log.seconds and step < total:
            continue
        means = {k: float(sum(v[k] for v in recent)) / len(recent) for k in values}
        rate, recent = float(values.get("lr", 1)), []
        if not all(map(math.isfinite, means.values())) or rate <= 0:
            raise Diverged(f"{stage}: {means} at step {step}: lower its rate (distill: or "
                           "--clip); the last checkpoint is of before")
        log(stage, step, total, done / max(now - began, 1e-9), **means)
        if due and RANK == 0:
            tensors = {k: v if torch.is_tensor(v) else v.state_dict() for k, v in state.items()}
            save(path, {"step": step, **tensors})
            saved = time.monotonic()

@torch.no_grad()
def restore(path, **state):
    """Puts what `follow` saved into `state`: tensors, changed in place, and what has a state_dict.
    Returns the step it was saved at, 0 if there is no such file."""
    if not Path(path).exists():
        return 0
    saved = load(path)
    for name, part in state.items():
        (part.copy_ if torch.is_tensor(part) else part.load_state_dict)(saved[name])
    print(f"resuming from {path} at step {saved['step']}", flush=True)
    return saved["step"]

# ---- A data set ------------------------------------------------------------------------------
# Means and deviations of the authors' code: the pixel rates of Tables 8 and 9 are in units of
# these deviations. Any other data set is normalised by its own training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    "tinyimagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

@dataclass
class Dataset:
    """Images uint8 [N, 3, H, H], labels int64 [N] (-1: unknown), pixels' mean, std [3, 1, 1]."""
    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def image_size(self):
        return self.train_images.shape[-1]

    @property
    def labelled(self):
        """Whether every label of both splits is known, so that it can be probed."""
        return all(len(labels) and labels.min() >= 0
                   for labels in (self.train_labels, self.test_labels))

    @property
    def classes(self):
        return int(self.train_labels.max()) + 1

    def normalize(self, images):
        """uint8 [B, 3, H, H], or floats in [0, 1] -> normalised float32."""
        images = images if images.is_floating_point() else images.float() / 255
        return (images - self.mean) / self.std

    def denormalize(self, images):
        """The inverse of `normalize`, in [0, 1]."""
        return images * self.std + self.mean

def load_dataset(name, data_dir="data", image_size=0, device="cpu", train_images=0):
    """The Dataset called `name`, on `device`.
    name: a key of OFFICIAL; the path of a folder with train/ and test/ inside; or of an .npz.
    image_size: the side to squash to; 0: its own (32 for folders). train_images: the first so
    many only, 0 for all. Raises InputError if it cannot be had."""
    path, title = Path(name), Path(name).resolve().name
    if path.suffix == ".npz":
        arrays, title = read_npz(path), path.stem
    else:
        if name in OFFICIAL:
            items, version = lambda: official(name, data_dir), ""
        elif path.is_dir():
            found = folder_items(path)
            listing = [(p, os.path.getmtime(p)) for split in found.values() for p, _ in split]
            items, version = lambda: found, f"-{zlib.crc32(repr(listing).encode()):08x}"
        else:
            raise InputError(f"unknown data set {name!r}: give one of {', '.join(OFFICIAL)}, a "
                             "folder with train/ (and test/) inside, or an .npz file")
        side = {"tinyimagenet": 64, "shapes": 24}.get(name, 32)
        size = image_size or side
        called = f"{title}{version}" + f"-{size}px" * (size != side)
        arrays = cached(Path(data_dir, f"{called}.npz"), items, size)
    images = arrays["train_images"][:train_images or None]
    if image_size not in (0, images.shape[1]):
        raise InputError(f"{name} has {images.shape[1]}-pixel images: leave out --image-size "
                         f"{image_size}")
    mean, std = STATISTICS.get(name) or channel_statistics(arrays["train_images"])
    arrays.update(train_images=images, train_labels=arrays["train_labels"][:len(images)])
    tensors = {k: torch.from_numpy(v).to(device) for k, v in arrays.items()}
    tensors = {k: v.permute(0, 3, 1, 2) if v.dim() == 4 else v for k, v in tensors.items()}
    return Dataset(title, **tensors, mean=torch.tensor(mean, device=device)[:, None, None],
                   std=torch.tensor(std, device=device)[:, None, None])

def channel_statistics(images):
    """Mean and deviation per channel, in [0, 1], of uint8 images [N, H, W, 3], or of 10,000 of
    them at even distances."""
    sample = images[::len(images) // 10_000 + 1] / 255
    return sample.mean(axis=(0, 1, 2)).tolist(), sample.std(axis=(0, 1, 2)).clip(1e-3).tolist()

def cached(path, items, size):
    """The arrays in the .npz `path`; if there is none, of items(), decoded and kept there."""
    with rank_0_first():
        if not path.exists():
            arrays = decode(items(), size)
            write_file(path, lambda file: np.savez(file, **arrays))
        return read_npz(path)

def read_npz(path):
    """The four arrays of an .npz, checked; labels (-1) and test images may be missing."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        train = arrays["train_images"][:]                      # it has rows
    except Exception as error:                                 # zip, zlib, pickle, numpy
        raise InputError(f"{path} is not a whole .npz with train_images "
                         f"({first_line(error)})") from error
    checked = {}
    for split in ("train", "test"):
        x = arrays.get(f"{split}_images", train[:0])
        y = arrays.get(f"{split}_labels", np.full(x.shape[:1], -1))
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1:] != (train.shape[1],) * 2 + (3,) or \
                y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            raise InputError(f"{path}: expected {split}_images uint8 [N, H, H, 3] of one size and "
                             f"{split}_labels integers [N], not {x.dtype} {list(x.shape)} and "
                             f"{y.dtype} {list(y.shape)}")
        checked.update({f"{split}_images": x, f"{split}_labels": y.astype(np.int64)})
    return checked

def read_representations(path):
    """The array in a .npy or torch file."""
    try:
        return torch.as_tensor(np.load(path) if path.endswith(".npy") else load(path)).float()
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"--representations {path} holds no array of numbers ({error})") from error

def check_representations(z, n, source):
    """InputError if representations of n images are not [n, d], finite, and more than one point."""
    if z.dim() != 2 or len(z) != n or not z.isfinite().all() or (z == z[0]).all():
        raise InputError(f"{source}: representations must be [{n}, d], finite and not all alike, "
                         f"unlike these {list(z.shape)}")

def share(n, percent, flag):
    """How many that percentage of n images is. Raises InputError where it is none, or over all."""
    count = math.floor(n * percent / 100 + 1e-9)
    if not 1 <= count <= n:
        raise InputError(f"{flag} {percent:g} of {n} training images is {count}: it must leave at "
                         "least one and at most all")
    return count

# ---- Where images come from: {"train": [(picture or path, label), ...], "test": [...]} -------
def decode(items, size):
    """The four arrays of `items`: RGB, squashed to `size` with Lanczos, by several threads."""
    def read(item):
        picture, _ = item
        try:
            open_as = to_pil_image if isinstance(picture, np.ndarray) else default_loader
            return np.asarray(resize(open_as(picture), [size, size], InterpolationMode.LANCZOS))
        except Exception as error:                         # PIL raises almost anything
            raise InputError(f"cannot read the image {picture} ({first_line(error)}): repair or "
                             "remove it") from error

    arrays = {}
    with ThreadPoolExecutor() as pool:
        for split, pairs in items.items():
            images = np.array([*pool.map(read, pairs)], np.uint8).reshape(-1, size, size, 3)
            labels = np.array([label for _, label in pairs], np.int64)
            arrays.update({f"{split}_images": images, f"{split}_labels": labels})
    return arrays

def folder_items(folder):
    """train/<class>/* and test/<class>/*, or train/* without classes, in sorted order."""
    splits, items = [folder / split for split in ("train", "test")], {}
    classes = {path.name: i for i, path in enumerate(
        sorted(path for path in splits[0].glob("*") if path.is_dir()))}
    for split in splits:
        if classes:
            items[split.name] = make_dataset(str(split), classes, IMG_EXTENSIONS, allow_empty=True)
        else:
            items[split.name] = [(path, -1) for path in sorted(split.glob("*"))
                                 if path.suffix.lower() in IMG_EXTENSIONS]
    if len(items["train"]) < 2:
        raise InputError(f"{folder}/train holds {len(items['train'])} images: expected <class>/*, "
                         "or images without folders")
    return items

def official(name, data_dir):
    """The items of a data set of OFFICIAL, downloaded if they do not lie in `data_dir`."""
    try:
        return OFFICIAL[name](Path(data_dir))
    except Exception as error:                      # no network, a damaged archive, no scipy
        raise InputError(f"cannot read {name} ({first_line(error)}): put its official archive or "
                         f"{name}.npz into {data_dir}/ (README, Your own images)") from error

def fetched(folder, *archives):
    """`folder`, into which the archives ((address, md5), ...) are downloaded and unpacked."""
    for url, md5 in archives:
        download_and_extract_archive(url, folder, md5=md5)
    return folder

def from_torchvision(make, pairs, train, test, **both):
    """A reader of one of torchvision's data sets, make(root, **train) and make(root, **test), of
    which pairs(it) are the items."""
    return lambda data_dir: {split: list(pairs(make(data_dir, **own, **both)))
                             for split, own in (("train", train), ("test", test))}

def tinyimagenet(data_dir):
    """The validation images are the test split, as everywhere."""
    address = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    folder = fetched(data_dir / "tinyimagenet", (address, "90528d7ca1a48142e341f4ef8d21d0de"))
    root = folder / "tiny-imagenet-200"
    classes = {path.name: i for i, path in enumerate(sorted((root / "train").iterdir()))}
    lines = (root / "val/val_annotations.txt").read_text().splitlines()
    val = [line.split("\t")[:2] for line in lines]
    return {"train": make_dataset(str(root / "train"), classes, IMG_EXTENSIONS),
            "test": [(root / "val/images" / file, classes[wnid]) for file, wnid in val]}

def cub2011(data_dir):
    """CUB-200-2011 in its official split."""
    address = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
    folder = fetched(data_dir / "cub2011", (address, "97eceeb196236b17998738112f37df78"))
    root = folder / "CUB_200_2011"
    paths, classes, in_train = (
        dict(line.split() for line in (root / file).read_text().splitlines())
        for file in ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    return {split: [(root / "images" / paths[i], int(classes[i]) - 1)
                    for i in paths if in_train[i] == flag]
            for split, flag in (("train", "1"), ("test", "0"))}

def dogs(data_dir):
    """Stanford Dogs in its official split."""
    address = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
    root = fetched(data_dir / "dogs", (address + "images.tar", None), (address + "lists.tar", None))
    from scipy.io import loadmat                    # pip install scipy
    lists = {k: loadmat(root / f"{k}_list.mat", squeeze_me=True) for k in ("train", "test")}
    return {split: [(root / "Images" / str(file), int(label) - 1)
                    for file, label in zip(m["file_list"], m["labels"])]
            for split, m in lists.items()}

# ---- shapes: the embedded data set -----------------------------------------------------------
def forms(x, y):
    """Signed distances of points x, y to ten forms about 0, in radii."""
    r, u, v = np.hypot(x, y), abs(x), abs(y)
    third, fifth = (np.arctan2(y, x) % (2 * np.pi / k) - np.pi / k for k in (3, 5))  # of a turn
    return [r - 0.85,                                                             # disc
            abs(r - 0.75) - 0.2,                                                  # ring
            np.maximum(u, v) - 0.75,                                              # square
            abs(np.maximum(u, v) - 0.68) - 0.18,                                  # frame
            r * np.cos(third) - 0.5,                                              # triangle
            np.minimum(np.maximum(u - 0.27, v - 0.95), np.maximum(u - 0.95, v - 0.27)),  # cross
            r - 0.42 - 0.58 * abs(fifth * 5 / np.pi) ** 1.5,                      # star
            np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.5, y)),                    # crescent
            np.maximum(v - 0.85, u - 0.9 * v - 0.08),                             # hourglass
            np.minimum(np.hypot(u - 0.62, y) - 0.4, np.maximum(u - 0.6, v - 0.14))]  # dumbbell

def draw_shapes(n, size, rng):
    """(uint8 [n, size, size, 3], labels [n]): one of ten forms an image, in equal numbers.
    Position, size, rotation, colours and noise are random and independent of the form, so that
    neither brightness nor any single pixel gives it away."""
    labels = rng.permutation(np.arange(n) % 10)
    radius = rng.uniform(0.28, 0.4, (n, 1, 1)) * size
    centre = rng.uniform(0.4, 0.6, (2, n, 1, 1)) * size
    turn = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    dx, dy = (np.mgrid[:size, :size][:, None] + 0.5 - centre) / radius         # [n, size, size]
    x, y = np.cos(turn) * dx + np.sin(turn) * dy, np.cos(turn) * dy - np.sin(turn) * dx
    distance = np.choose(labels[:, None, None], forms(x, y)) * radius          # in pixels
    cover = np.clip(0.5 - distance, 0, 1)[..., None]                           # antialiased
    hues = rng.normal(0, 0.06, (2, n, 1, 1, 3))
    contrast = rng.choice([-1, 1], (n, 1, 1, 1)) * rng.uniform(0.16, 0.2, (n, 1, 1, 1))
    ground, ink = 0.5 + hues - hues.mean(axis=-1, keepdims=True) + [-contrast, contrast]
    images = ground + cover * (ink - ground) + rng.normal(0, 0.06, (n, size, size, 3))
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8), labels

def shapes(data_dir):
    """The items of `shapes`."""
    pairs = list(zip(*draw_shapes(8000, 24, np.random.default_rng(0))))
    return {"train": pairs[:4000], "test": pairs[4000:]}

CIFAR = dict(pairs=lambda d: zip(d.data, d.targets), download=True,
             train={"train": True}, test={"train": False})
FILES = dict(pairs=lambda d: zip(d._image_files, d._labels), download=True, test={"split": "test"})
OFFICIAL = {                                        # name: a reader of its items in a data_dir
    "cifar10": from_torchvision(datasets.CIFAR10, **CIFAR),
    "cifar100": from_torchvision(datasets.CIFAR100, **CIFAR),
    "tinyimagenet": tinyimagenet,
    "aircraft": from_torchvision(datasets.FGVCAircraft, train={"split": "trainval"}, **FILES),
    "cub2011": cub2011,
    "dogs": dogs,
    "flowers": from_torchvision(datasets.Flowers102, train={"split": "train"}, **FILES),
    "cars": from_torchvision(datasets.StanfordCars, lambda d: d._samples, {"split": "train"},
                             {"split": "test"}),
    "shapes": shapes,
}

# ---- Augmentation: a batch at a time, with its own parameters for every image ----------------
def random_crops(n, size, scale, rng):
    """Boxes of torchvision's RandomResizedCrop, (top, left, height, width), each [n].
    A box covers a share of the image drawn from `scale` at an aspect ratio from [3/4, 4/3],
    uniform in the logarithm; the first of ten draws that fits, the whole image if none does."""
    area = torch.empty(n, 10, device=rng.device).uniform_(*scale, generator=rng) * size * size
    ratio = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3), generator=rng).exp()
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= size) & (height <= size) & (width >= 1) & (height >= 1)
    first, any_fits = fits.int().argmax(dim=1, keepdim=True), fits.any(dim=1)
    width, height = (torch.where(any_fits, v.gather(1, first)[:, 0], size) for v in (width, height))
    place = torch.rand(2, n, device=rng.device, generator=rng)
    top, left = (place * torch.stack([size - height + 1, size - width + 1])).floor()
    return top, left, height, width

def resized_crop(images, box, size, flip):
    """Crops box i out of image i, resizes it bilinearly to `size` and mirrors it where `flip`.
    images [B, C, H, W] float; box: top, left, height, width, each [B]. Interpolation is linear
    in each direction, so the whole batch is two batched products with matrices of hat functions.
    Nothing from beyond a box bleeds in. Equal to torchvision's where that does not shrink."""
    def weights(start, length, pixels, mirror=None):
        out = (torch.arange(size, device=images.device) + 0.5) / size      # centres in (0, 1)
        out = out.expand(len(images), size)
        if mirror is not None:
            out = torch.where(mirror[:, None], 1 - out, out)
        length, start = length[:, None], start[:, None]
        position = (out * length - 0.5).clamp(min=0).minimum(length - 1) + start
        pixel = torch.arange(pixels, device=images.device)
        distance = (position[:, :, None] - pixel).abs()                    # [B, size, pixels]
        return (1 - distance).clamp(min=0).to(images.dtype)

    top, left, height, width = box
    rows = weights(top, height, images.shape[2])
    columns = weights(left, width, images.shape[3], flip)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)       # [B, C, size, size]

def away(images, other, amount):
    """Moves images in [0, 1] away from `other` by `amount` [B, 1, 1, 1] of the difference."""
    return (images + amount * (images - other)).clamp(0, 1)

def adjust_hue(images, shift):
    """Turns the hue by shift [B, 1, 1, 1], in turns, at equal HSV saturation and value."""
    value, low = images.amax(1), images.amin(1)                            # [B, H, W]
    chroma = value - low
    r, g, b = images.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    below = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, below)                   # sixths of a turn
    hue = hue + shift[:, 0] * 6
    channels = []
    for offset in (5, 3, 1):              # HSV -> RGB: one trapezoid of the hue per channel
        k = (hue + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)

# torchvision's jitters as (images, amount): its factor is 1 + amount, its shift of hue amount / 4.
JITTERS = {
    "brightness": lambda x, amount: away(x, 0, amount),
    "contrast": lambda x, amount: away(
        x, rgb_to_grayscale(x).mean(dim=(1, 2, 3), keepdim=True), amount),
    "saturation": lambda x, amount: away(x, rgb_to_grayscale(x), amount),
    "hue": lambda x, amount: adjust_hue(x, amount / 4),
}

def two_views(images, seed, scale=(0.08, 1.0), gray=0.2):
    """Two augmented views of a batch: the draw x1, x2 ~ A(x) of Eq. 1.
    images: uint8 [B, 3, H, H]. Returns two float tensors in [0, 1], not normalised. The rest as
    in `draw_augmentations`. Raises ValueError on other images."""
    n, channels, height, width = images.shape
    if images.dtype != torch.uint8 or channels != 3 or height != width:
        raise ValueError("two_views takes square uint8 images [B, 3, H, H], not "
                         f"{images.dtype} {list(images.shape)}")
    views = draw_augmentations(n, width, seed, images.device, scale, gray)
    images = images.float() / 255
    return tuple(augment(images) for augment in views)

def draw_augmentations(n, size, seed, device, scale=(0.08, 1.0), gray=0.2):
    """Two draws from A of Eq. 1 for n images, as functions of images [n, 3, size, size] in [0, 1].
    Random resized crop (share of the area in `scale`), flip (p 0.5), jitter of brightness,
    contrast, saturation (0.4) and hue (0.1; all p 0.8), grey (p `gray`), the recipe of A.1.
    Every image has its own parameters, which `seed` fixes; only the order of the jitters is
    drawn once a view. The functions are differentiable and the same at every call."""
    rng, orders = torch.Generator(device).manual_seed(seed), np.random.default_rng(seed)

    def uniform(*shape):
        return torch.rand(*shape, n, device=device, generator=rng)[..., None, None, None]

    def draw():
        box, flip = random_crops(n, size, scale, rng), uniform().flatten() < 0.5
        amounts = (0.8 * uniform(4) - 0.4) * (uniform() < 0.8)
        grey, order = uniform() < gray, orders.permutation([*JITTERS])

        def augment(images):
            images = resized_crop(images, box, size, flip)
            for name, amount in zip(order, amounts):
                images = JITTERS[name](images, amount)
            return torch.where(grey, rgb_to_grayscale(images), images)
        return augment
    return draw(), draw()

def shift_and_flip(images, seed):
    """Float images [B, C, H, H] in [0, 1], each shifted by up to four pixels (black comes in)
    and mirrored or not: random crop with padding, and flip. `seed` fixes the draw."""
    rng, (n, _, _, size) = torch.Generator(images.device).manual_seed(seed), images.shape
    top, left = torch.randint(9, (2, n), device=images.device, generator=rng)
    flip = torch.rand(n, device=images.device, generator=rng) < 0.5
    whole = torch.full((n,), size, device=images.device)
    padded = F.pad(images, [4] * 4)
    return resized_crop(padded, (top, left, whole, whole), size, flip)
