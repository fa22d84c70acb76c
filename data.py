"""Data of MKDT: files, progress, devices, data sets and augmentation.

A data set is decoded once into <data-dir>/<name>.npz: uint8 train_images, test_images [N, H, H, 3],
integer train_labels, test_labels [N]. If that file exists, nothing is downloaded or decoded."""
import argparse
import contextlib
import ctypes
import datetime
import glob
import io
import json
import math
import os
import sys
import textwrap
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision import datasets
from torchvision.transforms.functional import rgb_to_grayscale, to_pil_image

# ---- Errors and files -------------------------------------------------------------------------
class InputError(ValueError):
    """An error that the user can mend: a file, a flag, a value. Its one line says how."""

class Diverged(InputError):
    """A training loop whose values are no longer finite."""

def first_line(error):
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

@contextlib.contextmanager
def whole_file(path):
    """A binary file to write, at `path` once it is complete. Raises InputError if that fails."""
    path, beside = Path(path), Path(f"{path}.{RANK}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        if beside.exists():
            beside.unlink()

def save(path, value):
    """torch.save of tensors, numbers, strings, lists and dicts."""
    buffer = io.BytesIO()                  # torch.save to a full disk would hide the reason
    torch.save(value, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())

def save_text(path, text):
    with whole_file(path) as file:
        file.write(text.encode())

def load(path, **options):
    """torch.load of plain data onto the CPU. Raises InputError, naming the file, if that fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: is it mistyped, or its stage not run?") from None
    except Exception as error:             # pickle, zip and torch each have their own
        raise InputError(f"{path} is damaged, or not a torch file of plain data") from error

def checksum(*values):
    """Eight hexadecimal digits that tell the contents of tensors or plain values apart."""
    crc = 0
    for value in values:
        is_tensor = torch.is_tensor(value)
        content = value.detach().cpu().contiguous().numpy() if is_tensor else repr(value).encode()
        crc = zlib.crc32(content, crc)
    return f"{crc:08x}"

# ---- Progress of a training loop --------------------------------------------------------------
class Log:
    """Prints progress lines and appends them to the file `path` as JSON, one object a line.
    seconds: between two lines; minutes: between checkpoints; speed: steps a second, 0: unknown."""

    def __init__(self, path=None, seconds=10.0, minutes=5.0):
        self.path, self.seconds, self.minutes = path, seconds, minutes
        self.last = -math.inf

    def __call__(self, stage, step, total, speed=0.0, note="", **values):
        self.last = time.monotonic()
        line = f"{stage:<8} {step:>6}/{total}"
        for name, value in values.items():
            line += f"  {name} {value:.4g}"
        if speed:
            line += f"  {speed:.3g}/s  {(total - step) / speed / 60:.1f} min left"
        print(f"{line}  {note}".rstrip(), flush=True)
        if self.path and RANK == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

class Progress:
    """Accompanies a training loop of `total` steps. Call it after each step with the number of
    steps done and with values to report; they are read from the device only when that is due, as
    means. Raises Diverged, with `advice`, if one is not finite or "lr" (alpha_syn) not positive.
    visit(step) is called every `every` steps and at the end. checkpoint: the file for `state`,
    written every few minutes and at the end. If it exists, tensors and objects with a state_dict
    are restored, anything else must be as it was, and the loop goes on from `first_step`."""

    def __init__(self, stage, total, log, checkpoint=None, advice="", every=0, visit=None, **state):
        self.stage, self.total, self.log = stage, total, log
        self.checkpoint, self.state = checkpoint, {"ranks": RANKS, **state}
        self.advice, self.every, self.visit = advice, every, visit
        self.first_step = self.restore()
        self.recent = []
        self.timed = None                  # the step and the time from which the speed is taken
        self.saved_at = time.monotonic()

    def __call__(self, step, **values):
        now = time.monotonic()
        self.recent.append(values)
        if not self.timed:                 # the first step is left out: it may compile
            self.timed = step, now
        last = step == self.total
        line_due = now - self.log.last >= self.log.seconds
        visit_due = self.visit and (last or step % self.every == 0)
        save_due = self.checkpoint and (last or now - self.saved_at >= 60 * self.log.minutes)
        if not (last or line_due or visit_due or save_due):
            return
        means = {}
        for name, latest in values.items():
            means[name] = float(sum(each[name] for each in self.recent)) / len(self.recent)
            value = float(latest) if name == "lr" else means[name]
            if not math.isfinite(value) or (name == "lr" and value <= 0):
                raise Diverged(f"{self.stage}: {name} became {value:.3g} by step {step}. "
                               f"{self.advice}")
        now = time.monotonic()             # reading the values has waited for the device
        if line_due or self.checkpoint:
            first, since = self.timed
            speed = (step - first) / max(now - since, 1e-9)
            self.log(self.stage, step, self.total, speed, **means)
        self.recent = []
        self.timed = step, now
        if visit_due:
            self.visit(step)
        if save_due:
            saved = {"step": step}
            for name, part in self.state.items():
                saved[name] = part.state_dict() if hasattr(part, "state_dict") else part
            if RANK == 0:
                save(self.checkpoint, saved)
            self.saved_at = time.monotonic()

    @torch.no_grad()
    def restore(self):
        """Puts what the checkpoint holds into `state`; returns the number of steps done."""
        if not self.checkpoint or not self.checkpoint.exists():
            return 0
        saved = load(self.checkpoint)
        try:
            for name, part in self.state.items():
                if torch.is_tensor(part):
                    part.copy_(saved[name])
                elif hasattr(part, "state_dict"):
                    part.load_state_dict(saved[name])
                elif part != saved[name]:
                    raise ValueError(f"{name} {saved[name]} -> {part}")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.checkpoint} does not fit this run ({first_line(error)}); "
                             "without it, the stage starts again") from error
        print(f"resuming from {self.checkpoint} at step {saved['step']}", flush=True)
        return saved["step"]

# ---- Devices and processes: alone, or one of the ranks that torchrun starts -------------------
RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))

def start(device):
    """The torch.device called `device` (auto: the GPU if there is one); joins the other ranks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.ones(1, device=device).device
    except Exception as error:
        raise InputError(f"--device {device} cannot be used here ({first_line(error)})") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True                  # the shapes are few
    else:
        with contextlib.suppress(AttributeError, TypeError):   # another C library
            mallopt = ctypes.CDLL(None).mallopt                # fresh pages cost much of a step
            mallopt(-1, 2**31 - 1)                             # M_TRIM_THRESHOLD: keep freed blocks
            mallopt(-4, 0)                                     # M_MMAP_MAX: no separate blocks
    if RANKS > 1 and not dist.is_initialized():
        wait = datetime.timedelta(days=7)                      # the others wait while rank 0 works
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
    return device

def add_common_flags(parser):
    add = parser.add_argument
    add("--data-dir", default="data", help="where data sets are kept (default: data)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="torch.compile (default: on GPUs, and students of width 32 and more)")

@contextlib.contextmanager
def command_line(script):
    """Runs a command, of which only rank 0 prints. A user's error is one line and exit code 2."""
    sys.stdout.reconfigure(errors="replace")                   # "?" for what a console lacks
    sys.stderr.reconfigure(errors="replace")
    try:
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
            yield
    except (InputError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split()) or "there is not enough memory"
        print(f"{script}: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; run the same command again to go on")

def barrier():
    if RANKS > 1:
        dist.barrier()

@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block first, e.g. it downloads; then the others, who find it done."""
    if RANK > 0:
        barrier()
    try:
        yield
    finally:                               # an error is caught further up, and all go on
        if RANK == 0:
            barrier()

def sum_over_ranks(tensors):
    if RANKS > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)

def rows_of_all_ranks(z):
    """The rows z [b, d] of every rank, [RANKS * b, d]. Gradients flow to this rank's own rows only:
    summed over the ranks, the gradients of a loss of all rows are the whole gradient."""
    if RANKS == 1:
        return z
    rows = [torch.empty_like(z) for _ in range(RANKS)]
    dist.all_gather(rows, z.detach().contiguous())
    rows[RANK] = z
    return torch.cat(rows)

# ---- A data set -------------------------------------------------------------------------------
# Means and standard deviations of the authors' code: the units of Tables 8 and 9's pixel rates.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    "tinyimagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
ARRAYS = ["train_images", "train_labels", "test_images", "test_labels"]
EXTRAS = ["mkdt_class_names", "mkdt_notes"]                    # what only our own .npz files have

@dataclass
class Dataset:
    """uint8 images [N, 3, H, H]; int64 labels [N] from 0 on, -1: unknown; mean, std [3, 1, 1]."""
    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    images_id: str = ""                    # a checksum of the normalised training images
    id: str = ""                           # a checksum of everything
    source: str = ""                       # the name that it was loaded by

    @property
    def image_size(self):
        return self.train_images.shape[-1]

    @property
    def classes(self):
        return int(self.train_labels.max()) + 1

    @property
    def labelled(self):
        """Whether an encoder can be probed on it: two classes or more, and labelled test images."""
        return self.classes >= 2 and bool((self.test_labels >= 0).any())

    def normalize(self, images):
        """uint8 [B, 3, H, H], or floats in [0, 1] -> normalised float32."""
        if not images.is_floating_point():
            images = images.float() / 255
        return (images - self.mean) / self.std

    def denormalize(self, images):
        return images * self.std + self.mean

def load_dataset(name, data_dir="data", image_size=0, device="cpu", train_images=0):
    """The Dataset called `name`, on `device`; prints what was read.
    name: a key of OFFICIAL, the path of a folder with train/ and test/ inside, or of an .npz.
    image_size: the side in pixels to squash to, 0 for its own (folders: 32). train_images: use so
    many, drawn at random once and for all; 0 for all. Raises InputError if it cannot be had."""
    if 0 < image_size < 8:
        raise InputError(f"--image-size {image_size}: it must be at least 8 pixels")
    path = Path(name)
    title = path.resolve().name.removesuffix(".npz")
    if name in OFFICIAL:
        if path.is_dir():
            print(f"{name} is the official data set; for the folder of that name give ./{name}")
        path = cached(data_dir, name, image_size, partial(read_official, name, Path(data_dir)))
    elif path.is_dir():
        files, version = list_folder(path)
        path = cached(data_dir, f"{title}-{version}", image_size, partial(read_folder, path, files))
    elif path.suffix != ".npz":
        raise InputError(f"unknown data set {name!r}: give {', '.join(OFFICIAL)}, a folder or .npz")
    arrays = read_npz(path)
    number_classes(name, arrays)
    images = arrays["train_images"]
    if image_size not in (0, images.shape[1]):
        raise InputError(f"--image-size {image_size}: {name} has {images.shape[1]} pixels")
    statistics = torch.tensor(STATISTICS.get(name) or channel_statistics(images))
    if 0 < train_images < len(images):
        chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:train_images])
        arrays.update(train_images=images[chosen], train_labels=arrays["train_labels"][chosen])
    print(summary(title, arrays), flush=True)
    tensors = [torch.from_numpy(arrays[key]) for key in ARRAYS]
    ids = checksum(tensors[0], statistics), checksum(*tensors, statistics)
    for i in (0, 2):
        tensors[i] = tensors[i].permute(0, 3, 1, 2)            # [N, H, H, 3] -> [N, 3, H, H]
    tensors += statistics[:, :, None, None]                    # mean, std: [3, 1, 1]
    return Dataset(title, *[tensor.to(device) for tensor in tensors], *ids, source=name)

def number_classes(name, arrays):
    """Renumbers labels from 0, in place. Raises InputError if a class is only in the test split."""
    train, test = arrays["train_labels"], arrays["test_labels"]
    names = arrays["mkdt_class_names"]
    if (train < 0).all():
        test[:] = -1
    classes = np.union1d(train[train >= 0], test[test >= 0])
    unseen = np.setdiff1d(classes, train)
    if len(unseen) and (train >= 0).all():     # else unlabelled ones may be of these classes
        raise InputError(f"{name}: no training images of the test classes {listed(unseen, names)}")
    for labels in (train, test):
        labels[:] = np.where(labels < 0, -1, np.searchsorted(classes, labels))
    if len(names):
        arrays["mkdt_class_names"] = names[classes]

def listed(classes, names):
    """The first ten of some classes, by their names if these are known."""
    return ", ".join(str(k) for k in (names[classes] if len(names) else classes)[:10])

def summary(title, arrays):
    labels, test = arrays["train_labels"], arrays["test_labels"]
    names, side = arrays["mkdt_class_names"], arrays["train_images"].shape[1]
    counts = np.bincount(labels[labels >= 0])
    kinds = f"{len(counts)} classes"
    if len(counts) < 2:
        kinds = "at most one class, so unlabelled"
    elif 0 < len(names) <= 10:
        kinds += f" ({', '.join(f'{name} {count}' for name, count in zip(names, counts))})"
    text = f"{title}: {len(labels):,} training images of {kinds}"
    if 0 < counts.sum() < len(labels):
        text += f", {len(labels) - counts.sum():,} of them unlabelled"
    text += f", {len(test):,} test images, {side} pixels"
    absent = np.setdiff1d(np.arange(len(counts)), test)
    if (test >= 0).any() and len(absent):
        text += f"; not in the test split: {listed(absent, names)}"
    return textwrap.fill("; ".join([text, *arrays["mkdt_notes"]]), 100, subsequent_indent="    ")

def channel_statistics(images):
    """Mean and standard deviation of each channel, in [0, 1], of images or, if large, of some."""
    sample = images[::images.size // 10_000_000 + 1]
    statistics = []
    for channel in range(3):
        values = sample[..., channel] / 255
        statistics.append((values.mean(), max(values.std(), 1e-3)))
    return np.transpose(statistics).tolist()

def cached(data_dir, name, size, read):
    """The path of the .npz `name` in data_dir. If there is none, read(size) makes its arrays."""
    usual_size = {"tinyimagenet": 64, "shapes": 24}.get(name, 32)
    suffix = f"-{size}px" if size not in (0, usual_size) else ""
    path = Path(data_dir, f"{name}{suffix}.npz")
    with rank_0_first():
        if not path.exists():
            with whole_file(path) as file:
                np.savez(file, **read(size or usual_size))
    return path

def read_npz(path):
    """The arrays of an .npz, checked. Labels (-1) and test images may be missing. Images may be
    grey, [N, H, H] or [N, H, H, 1]; labels [N] or [N, 1], of any integer type."""
    arrays = dict.fromkeys(EXTRAS, np.array([], str))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays.update({key: file[key] for key in ARRAYS + EXTRAS if key in file})
        train = arrays["train_images"]
    except Exception as error:             # zip, zlib, pickle and numpy each have their own
        raise InputError(f"{path}: no .npz with train_images ({first_line(error)})") from error
    side = train.shape[1:2]
    for split in ("train", "test"):
        images = arrays.get(f"{split}_images", train[:0])
        labels = arrays.get(f"{split}_labels", np.full(len(images), -1))
        if images.ndim == 3 or images.shape[3:] == (1,):
            images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
        if images.dtype != np.uint8 or images.shape[1:] != (*side, *side, 3):
            raise InputError(f"{path}: {split}_images must be uint8 [N, H, H, 3] or [N, H, H], all "
                             f"of one size, not {images.dtype} {list(images.shape)}")
        if labels.size != len(images) or labels.dtype.kind not in "biu":
            raise InputError(f"{path}: {split}_labels must be {len(images)} integers")
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = labels.ravel().astype(np.int64)
    if len(train) < 2 or side < (8,) or train.min() == train.max():
        raise InputError(f"{path}: {len(train)} training images of {side[0]} pixels: there must be "
                         "two or more, of 8 pixels or more, and not all of one colour")
    return arrays

def share(n, percent, flag):
    """How many images `percent` of n is. Raises InputError unless that is 1 to n."""
    count = math.floor(n * percent / 100 + 1e-9)
    if not 1 <= count <= n:
        raise InputError(f"{flag} {percent:g} is {count} of {n} images: it must be 1 to {n} images")
    return count

# ---- Pictures and folders of them -------------------------------------------------------------
def as_people_see_it(image):
    """A PIL image in RGB, 8 bit: turned as its EXIF data say, transparency over white, 16-bit
    grey scaled. Raises ValueError for a mode that has no such form."""
    from PIL import Image, ImageOps                            # torchvision brings Pillow
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = np.asarray(image)
        if image.mode == "F" or grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"mode {image.mode} has no known range, or its values pass 16 bits")
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def decode(splits, size, class_names=(), notes=()):
    """The arrays of {"train": pairs, "test": pairs}: sequences of (path or PIL image, label).
    Squashes to `size` by Lanczos; leaves out what is not an image. InputError if one is broken."""
    from PIL import Image, UnidentifiedImageError
    suffixes = Image.registered_extensions()
    arrays, broken, left_out = {}, [], []

    def read(pairs, i, row):
        picture = f"image {i}"
        try:
            picture, label = pairs[i]
            image = Image.open(picture) if isinstance(picture, Path) else picture
            row[:] = as_people_see_it(image).resize((size, size), Image.Resampling.LANCZOS)
            return label
        except Exception as error:         # PIL raises almost anything; the label is then None
            suffix = Path(str(picture)).suffix.lower()
            if isinstance(error, UnidentifiedImageError) and suffix not in suffixes:
                left_out.append(suffix or "no suffix")
            else:
                broken.append(f"{picture} ({first_line(error)})")

    for split, pairs in splits.items():
        images = np.empty((len(pairs), size, size, 3), np.uint8)
        with ThreadPoolExecutor() as pool:
            labels = list(pool.map(partial(read, pairs), range(len(pairs)), images))
        good = [i for i, label in enumerate(labels) if label is not None]
        arrays[f"{split}_images"] = images if len(good) == len(images) else images[good]
        arrays[f"{split}_labels"] = np.array(labels)[good].astype(np.int64)
    if broken:
        raise InputError(f"repair or remove {len(broken)} images: {', '.join(sorted(broken)[:20])}")
    if left_out:
        kinds = ", ".join(sorted(set(left_out)))
        notes = [*notes, f"left out: {len(left_out)} files that are not images ({kinds})"]
    arrays.update(mkdt_class_names=np.array(class_names, str), mkdt_notes=np.array(notes, str))
    return arrays

def list_folder(folder):
    """Sorted files of train/ and test/, relative to `folder`; a checksum with sizes and times."""
    system_files = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}
    files, state = [], []
    for split in ("train", "test"):
        found = glob.glob("**", root_dir=folder / split, recursive=True)   # nothing that is hidden
        for path in sorted(Path(split, name) for name in found):
            if system_files.isdisjoint(path.parts) and not (folder / path).is_dir():
                files.append(path)
                if (folder / path).exists():                   # no dead link
                    stat = (folder / path).stat()
                    state.append((str(path), stat.st_size, stat.st_mtime))
    return files, checksum(state)

def read_folder(folder, files, size):
    """The arrays of train/<class>/* and test/<class>/*, or of train/* if there are no classes."""
    names = sorted({path.parts[1] for path in files if len(path.parts) > 2})
    splits = {"train": [], "test": []}
    for path in files:
        label = names.index(path.parts[1]) if len(path.parts) > 2 else -1
        if label >= 0 or not names:
            splits[path.parts[0]].append((folder / path, label))
    if not splits["train"]:
        raise InputError(f"{folder}: no images in train/ (if there are classes, in train/<class>/)")
    notes = []
    loose = len(files) - len(splits["train"]) - len(splits["test"])
    if loose:
        notes.append(f"left out: {loose} files that lie in no class folder")
    if not splits["test"] and (folder / "val").is_dir():
        notes.append("val/ is not read: call it test/ to use it as such")
    return decode(splits, size, names, notes)

# ---- Official data sets -----------------------------------------------------------------------
def read_official(name, data_dir, size):
    """The arrays of a data set of OFFICIAL, downloaded if it does not lie in `data_dir`."""
    archives, read, train, test = OFFICIAL[name]
    try:
        splits = {"train": read(data_dir, train), "test": read(data_dir, test)}
    except Exception as error:             # no network, a damaged archive, no scipy
        raise InputError(f"cannot read {name} ({first_line(error)}); looked for {archives} in "
                         f"{data_dir}, see README. Delete interrupted downloads") from error
    return decode(splits, size)

def fetched(path, *addresses, md5=None):
    """`path`, which is unpacked from the archives at these addresses if it is not there."""
    if not path.exists():
        for address in addresses:
            datasets.utils.download_and_extract_archive(address, path.parent, md5=md5)
    return path

def tinyimagenet(data_dir, split):
    root = fetched(data_dir / "tinyimagenet/tiny-imagenet-200",
                   "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                   md5="90528d7ca1a48142e341f4ef8d21d0de")
    train = datasets.ImageFolder(root / "train")
    if split == "train":
        return train                       # the test split is the validation images, as everywhere
    rows = np.loadtxt(root / "val/val_annotations.txt", str, usecols=(0, 1), ndmin=2)
    return [(root / "val/images" / file, train.class_to_idx[name]) for file, name in rows]

def cub2011(data_dir, in_train):
    root = fetched(data_dir / "cub2011/CUB_200_2011",
                   "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                   md5="97eceeb196236b17998738112f37df78")
    files = np.loadtxt(root / "images.txt", str)[:, 1]         # all three are in one order
    labels = np.loadtxt(root / "image_class_labels.txt", int)[:, 1] - 1
    chosen = np.loadtxt(root / "train_test_split.txt", int)[:, 1] == in_train
    return [(root / "images" / file, label) for file, label in zip(files[chosen], labels[chosen])]

def dogs(data_dir, split):
    from scipy.io import loadmat                               # pip install scipy
    address = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
    fetched(data_dir / "dogs/train_list.mat", address + "images.tar", address + "lists.tar")
    table = loadmat(data_dir / f"dogs/{split}_list.mat", squeeze_me=True)
    paths = [data_dir / "dogs/Images" / str(file) for file in table["file_list"]]
    return list(zip(paths, table["labels"].astype(int) - 1))

def cars(data_dir, split):
    """Stanford Cars, whose official download no longer works: a copy below stanford_cars/."""
    from scipy.io import loadmat                               # pip install scipy
    root = data_dir / "stanford_cars"
    paths = {path.name: path for path in (root / f"cars_{split}").rglob("*.jpg")}
    name = "cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat"
    lists = sorted(root.rglob(name))
    if not paths or not lists:
        raise FileNotFoundError(f"there is no {name} or no image in cars_{split}")
    rows = loadmat(lists[0], squeeze_me=True)["annotations"]
    return [(paths[str(row["fname"])], int(row["class"]) - 1) for row in rows]

# ---- shapes: the data set that is drawn here --------------------------------------------------
def signed_distances(x, y):
    """Signed distances of points x, y to ten shapes centred on 0, in radii."""
    r, u, v = np.hypot(x, y), abs(x), abs(y)
    angle = np.arctan2(y, x)
    third = angle % (2 * np.pi / 3) - np.pi / 3
    fifth = angle % (2 * np.pi / 5) - np.pi / 5
    return [r - 0.85,                                                      # disc
            abs(r - 0.75) - 0.2,                                           # ring
            np.maximum(u, v) - 0.75,                                       # square
            abs(np.maximum(u, v) - 0.68) - 0.18,                           # frame
            r * np.cos(third) - 0.5,                                       # triangle
            np.minimum(np.maximum(u - 0.27, v - 0.95), np.maximum(u - 0.95, v - 0.27)),    # cross
            r - 0.42 - 0.58 * abs(fifth * 5 / np.pi) ** 1.5,               # star
            np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.5, y)),             # crescent
            np.maximum(v - 0.85, u - 0.9 * v - 0.08),                      # hourglass
            np.minimum(np.hypot(u - 0.62, y) - 0.4, np.maximum(u - 0.6, v - 0.14))]     # dumbbell

def draw_shapes(n, size, rng):
    """(uint8 [n, size, size, 3], labels [n]): one of ten forms an image, in equal numbers. All
    else is random, so that neither brightness nor any single pixel gives the form away."""
    labels = rng.permutation(np.arange(n) % 10)
    radius = rng.uniform(0.28, 0.4, (n, 1, 1)) * size
    centre = rng.uniform(0.4, 0.6, (2, n, 1, 1)) * size
    turn = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    dx, dy = (np.mgrid[:size, :size][:, None] + 0.5 - centre) / radius     # [n, size, size]
    x = np.cos(turn) * dx + np.sin(turn) * dy
    y = np.cos(turn) * dy - np.sin(turn) * dx
    distance = np.choose(labels[:, None, None], signed_distances(x, y)) * radius   # in pixels
    cover = np.clip(0.5 - distance, 0, 1)[..., None]                       # antialiased
    hues = rng.normal(0, 0.06, (2, n, 1, 1, 3))
    contrast = rng.choice([-1, 1], (n, 1, 1, 1)) * rng.uniform(0.16, 0.2, (n, 1, 1, 1))
    ground, ink = 0.5 + hues - hues.mean(axis=-1, keepdims=True) + [-contrast, contrast]
    images = ground + cover * (ink - ground) + rng.normal(0, 0.06, (n, size, size, 3))
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8), labels

all_shapes = cache(partial(draw_shapes, 8000, 24, np.random.default_rng(0)))

def shapes(data_dir, split):
    images, labels = all_shapes()
    return list(zip(map(to_pil_image, images[split]), labels[split]))

# Archives in data_dir; a reader, (data_dir, split) -> pairs as `decode` takes them; the two splits.
OFFICIAL = {
    "cifar10": ("cifar-10-python.tar.gz", partial(datasets.CIFAR10, download=True), True, False),
    "cifar100": ("cifar-100-python.tar.gz", partial(datasets.CIFAR100, download=True), True, False),
    "tinyimagenet": ("tinyimagenet/tiny-imagenet-200.zip", tinyimagenet, "train", "test"),
    "aircraft": ("fgvc-aircraft-2013b.tar.gz", partial(datasets.FGVCAircraft, download=True),
                 "trainval", "test"),
    "cub2011": ("cub2011/CUB_200_2011.tgz", cub2011, True, False),
    "dogs": ("dogs/images.tar, dogs/lists.tar", dogs, "train", "test"),
    "flowers": ("flowers-102/102flowers.tgz, flowers-102/imagelabels.mat, flowers-102/setid.mat",
                partial(datasets.Flowers102, download=True), "train", "test"),
    "cars": ("stanford_cars/cars_train, stanford_cars/cars_test, stanford_cars/devkit, "
             "stanford_cars/cars_test_annos_withlabels.mat", cars, "train", "test"),
    "shapes": ("", shapes, slice(0, 4000), slice(4000, 8000)),
}

# ---- Augmentation: a batch at a time, with parameters of its own for every image --------------
def random_crops(n, size, scale, rng):
    """Boxes of torchvision's RandomResizedCrop: (top, left, height, width), each [n].
    A box covers a share of the image drawn from `scale` at an aspect ratio from [3/4, 4/3],
    uniform in the logarithm: the first of ten draws that fits, or the whole image if none does."""
    area = torch.empty(n, 10, device=rng.device).uniform_(*scale, generator=rng) * size * size
    ratio = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3), generator=rng).exp()
    sides = torch.stack([area / ratio, area * ratio]).sqrt().round()       # heights, widths
    fits = ((sides >= 1) & (sides <= size)).all(dim=0)                     # [n, 10]
    first = fits.int().argmax(dim=1)[None, :, None]                        # [1, n, 1]
    sides = sides.take_along_dim(first, dim=2)[..., 0]                     # [2, n]
    sides = torch.where(fits.any(dim=1), sides, size)
    corners = torch.rand(2, n, device=rng.device, generator=rng) * (size - sides + 1)
    return torch.cat([corners.floor(), sides]).unbind()

def linear_weights(start, length, pixels, size, mirror):
    """[B, size, pixels]: the weights of linear interpolation from each image's `length` pixels,
    from `start` on, to `size` pixels; backwards where `mirror`. start, length, mirror: [B]."""
    centres = (torch.arange(size, device=start.device) + 0.5) / size       # in (0, 1)
    centres = torch.where(mirror[:, None], 1 - centres, centres)           # [B, size]
    length, start = length[:, None], start[:, None]
    position = (centres * length - 0.5).clamp(min=0).minimum(length - 1) + start
    pixel = torch.arange(pixels, device=start.device)
    return (1 - (position[:, :, None] - pixel).abs()).clamp(min=0)         # [B, size, pixels]

def resized_crop(images, box, size, flip):
    """Crops box i out of image i, resizes it bilinearly to `size` and mirrors it where `flip`.
    images [B, C, H, W] float; box: top, left, height, width, each [B]. Linear in each direction,
    so that a batch is two products. Equal to torchvision's where that does not shrink."""
    top, left, height, width = box
    rows = linear_weights(top, height, images.shape[2], size, torch.zeros_like(flip))
    columns = linear_weights(left, width, images.shape[3], size, flip)
    return rows[:, None].to(images) @ images @ columns[:, None].to(images).mT

def jitter(name, images, amount):
    """torchvision's adjust_<name> by the factor 1 + amount [B, 1, 1, 1], or the hue amount / 4."""
    if name == "hue":
        return adjust_hue(images, amount / 4)
    other = 0.0                                                # brightness: away from black
    if name == "contrast":
        other = rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    elif name == "saturation":
        other = rgb_to_grayscale(images)
    return (images + amount * (images - other)).clamp(0, 1)

def adjust_hue(images, shift):
    """Turns the hue by shift [B, 1, 1, 1], in turns, at equal HSV saturation and value."""
    value = images.amax(1)                                                 # [B, H, W]
    chroma = value - images.amin(1)
    r, g, b = images.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    below = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, below) + shift[:, 0] * 6     # sixths of a turn
    channels = []
    for offset in (5, 3, 1):               # HSV -> RGB: one trapezoid of the hue per channel
        k = (hue + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)

def augment(images, box, flip, amounts, order, grey):
    """One draw of `draw_augmentations`, applied to images [n, 3, H, H] in [0, 1]; differentiable.
    box, flip: of `resized_crop`. amounts [4, n, 1, 1, 1]: of the jitters. grey: [n, 1, 1, 1]."""
    images = resized_crop(images, box, images.shape[-1], flip)
    for name, amount in zip(order, amounts):
        images = jitter(name, images, amount)
    return torch.where(grey, rgb_to_grayscale(images), images)

def draw_augmentations(n, size, seed, device, scale, grey):
    """Yields two draws from A of Eq. 1 for n images of `size` pixels, as in mix-bt, cited in A.1:
    random resized crop (share of the area in `scale`), flip (p 0.5), jitter of brightness,
    contrast, saturation (0.4) and hue (0.1), all or none (p 0.8), grey (p `grey`). Parameters are
    each image's own, but the order of the jitters is the batch's. All follow from `seed`."""
    rng = torch.Generator(device).manual_seed(seed)
    order_rng = np.random.default_rng(seed)
    uniform = partial(torch.rand, device=device, generator=rng)
    for _ in range(2):
        box = random_crops(n, size, scale, rng)
        flip = uniform(n) < 0.5
        amounts = (0.8 * uniform(4, n, 1, 1, 1) - 0.4) * (uniform(n, 1, 1, 1) < 0.8)
        is_grey = uniform(n, 1, 1, 1) < grey
        order = order_rng.permutation(["brightness", "contrast", "saturation", "hue"])
        yield partial(augment, box=box, flip=flip, amounts=amounts, order=order, grey=is_grey)

def two_views(images, seed, scale=(0.08, 1.0), grey=0.2):
    """Two views x1, x2 ~ A(x) of Eq. 1 of a batch uint8 [B, 3, H, H]: floats in [0, 1], not
    normalised. Arguments: see `draw_augmentations`. Raises ValueError for other images."""
    n, _, _, size = images.shape
    if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
        raise ValueError(f"not square uint8 images [B, 3, H, H]: {images.dtype} {images.shape}")
    first, second = draw_augmentations(n, size, seed, images.device, scale, grey)
    images = images.float() / 255
    return first(images), second(images)

def shift_and_flip(images, seed):
    """Float images [B, C, H, H] in [0, 1], each shifted by up to four pixels (black comes in) and
    mirrored or not: random crop with padding, and flip. `seed` fixes the draw."""
    n, _, _, size = images.shape
    rng = torch.Generator(images.device).manual_seed(seed)
    top, left = torch.randint(9, (2, n), device=images.device, generator=rng)
    flip = torch.rand(n, device=images.device, generator=rng) < 0.5
    whole = torch.full_like(top, size)
    return resized_crop(F.pad(images, [4, 4, 4, 4]), (top, left, whole, whole), size, flip)
