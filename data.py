"""Data of MKDT: images as one uint8 tensor on the device, normalised and augmented there in whole batches.

    load_dataset            a data set by name (see OFFICIAL), from a folder, or from an .npz file
    Dataset.batch           uint8 -> normalised float images, on the device
    two_views               the augmentations A of Eq. 1, with its own parameters for every image
    write_file, save, load  files that are either whole or not there

Cache format, for every data set: <data-dir>/<name>.npz with uint8 train_images, test_images [N, H, W, 3] and int64
train_labels, test_labels [N] (-1 where there are none). Put such a file there and nothing is downloaded.
"""
import contextlib
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from models import InputError, first_line, rank

try:
    import fcntl                                                            # not on Windows
except ImportError:
    fcntl = None

# Channel means and standard deviations in [0, 1]. Those of the authors' code: the pixel learning rates of Table 8 are
# in units of these deviations. Any other data set is normalised with its own training statistics.
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    "tinyimagenet": IMAGENET,
}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"}


# ------------------------------------------------------------------------------------------------------------
# Files and progress
# ------------------------------------------------------------------------------------------------------------
def write_file(path, write):
    """Writes `path` through write(file): beside it first, flushed to disk, then renamed, so that it is never half."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".beside")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(beside, 0o666 & ~UMASK)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:                 # torch.save turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        size = os.path.getsize(beside) if os.path.exists(beside) else 0
        raise InputError(f"cannot write {path}: {reason}, after {size / 1e6:.1f} MB; earlier files are "
                         "untouched") from error
    finally:
        Path(beside).unlink(missing_ok=True)


UMASK = os.umask(0o022)                         # mkstemp makes private files; the umask can only be read by setting it
os.umask(UMASK)


def save(path, value):
    """torch.save of tensors, numbers, strings, lists and dicts, by way of `write_file`."""
    write_file(path, lambda file: torch.save(value, file))


def save_json(path, value):
    """JSON with an indent of two, by way of `write_file`."""
    write_file(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def read_json(path):
    """The value in a JSON file; InputError if there is none."""
    try:
        return json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None


def fingerprint(*values):
    """Eight hexadecimal digits that change with any of `values`: tensors and files (Path) by their content."""
    digest = hashlib.sha256()
    for value in values:
        if torch.is_tensor(value):
            digest.update(repr((value.dtype, value.shape)).encode())
            digest.update(np.ascontiguousarray(value.cpu().numpy()).tobytes())
        elif isinstance(value, Path):
            try:
                digest.update(value.read_bytes())
            except OSError as error:
                raise InputError(f"cannot read {value}: {error.strerror}") from None
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:8]


def load(path, **options):
    """torch.load of plain data (weights_only) after the zip container's checksums are verified.

    Raises InputError, naming the file, if it is missing, truncated, altered or holds anything but plain data.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()                     # torch.load itself does not notice a flipped byte
        if damaged:
            raise InputError(f"{path} is damaged ({damaged} fails its checksum): delete it and run the stage again")
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist (if it is of a run: --stage all makes what is missing)") from None
    except InputError:
        raise
    except Exception as error:                              # pickle, zip and torch each have a family of their own
        raise InputError(f"{path} cannot be read as a torch file of plain data: {first_line(error)}") from error


class Checkpoint:
    """The state of a loop in one file, written every so many minutes: tensors, and anything with a state_dict().

    Inside `with checkpoint:`, Ctrl-C and SIGTERM make it due at once; when it is saved, the loop ends there.
    """

    def __init__(self, path, minutes=5.0, every_rank=False, **made_with):
        """every_rank: each rank has a loop and a file of its own; otherwise all have the same state and rank 0 writes.
        made_with: numbers and words that must be the same when it is resumed."""
        self.path, self.seconds, self.made_with = Path(path), 60 * minutes, made_with
        self.writes, self.last = every_rank or rank() == 0, time.monotonic()
        self.asked, self.handlers = False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_):
        if not self.writes:                                       # the rank that saves stops, torchrun ends the others
            return
        if self.asked:                                                                     # a second time: without it
            raise KeyboardInterrupt
        self.asked = True

    def due(self):
        """True when it is time to save: once in so many minutes, or when the process was asked to stop."""
        return self.asked or time.monotonic() - self.last >= self.seconds

    def save(self, step, **parts):
        """Writes `parts` after `step` steps. Raises KeyboardInterrupt if the process was asked to stop."""
        if self.writes:
            values = {k: p if torch.is_tensor(p) else p.state_dict() for k, p in parts.items()}
            save(self.path, {"step": step, "made_with": self.made_with, **values})
        self.last = time.monotonic()
        if self.asked:
            raise KeyboardInterrupt

    def restore(self, **parts):
        """Puts the saved values into `parts` and returns the step; 0, and nothing changed, if there is no file."""
        if not self.path.exists():
            return 0
        saved = load(self.path)
        if saved.get("made_with") != self.made_with or not parts.keys() <= saved.keys():
            raise InputError(f"{self.path} cannot be resumed: it was made with {saved.get('made_with')}, now it is "
                             f"{self.made_with}; go on as before, or remove the file to begin this stage anew")
        for name, part in parts.items():
            part.copy_(saved[name]) if torch.is_tensor(part) else part.load_state_dict(saved[name])
        print(f"resuming from {self.path} at step {saved['step']}", flush=True)
        return saved["step"]

    def remove(self):
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(folder):
    """Holds `folder` for this process; the system frees it when the process ends, however it ends.

    Raises InputError, saying who holds it, if another one does.
    """
    if fcntl is None:
        yield
        return
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(f"{folder} is in use by {file.read().strip() or 'another process'}: wait until it is "
                             "done, or give another --run-dir") from None
        except OSError as error:                                          # some network file systems
            print(f"{path}: no locks here ({error.strerror}): see to it that one process uses it", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        for lost in Path(folder).rglob(".*.beside"):                      # what a killed process was writing
            below = [path.parent / p for p in lost.relative_to(folder).parents if p != Path(".")]
            if not any((p / ".lock").exists() for p in below):            # of this folder's, not of other runs in it
                lost.unlink(missing_ok=True)
        yield


def require_space(folder, size, what):
    """Raises InputError if there are less than `size` bytes free where `folder` is, or will be made."""
    there = next(p for p in (Path(folder).absolute(), *Path(folder).absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise InputError(f"{what} need {size / 1e6:.0f} MB in {folder}, where {free / 1e6:.0f} MB are free: make room "
                         "or give another --run-dir")


def free_memory(device):
    """Bytes of memory that are free: of the GPU, or of the machine (infinitely many where it does not tell)."""
    if device.type == "cuda":                       # what torch keeps for itself it gives out again
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - graph_memory(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    about = Path("/proc/meminfo")
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", about.read_text()).group(1)) if about.exists() else math.inf


def graph_memory(device):
    """Bytes that CUDA graphs recorded on `device` hold for their replays; torch counts them as reserved, but free."""
    return sum(segment["total_size"] - segment["allocated_size"] for segment in torch.cuda.memory_snapshot()
               if segment["device"] == device.index and segment["segment_pool_id"] != (0, 0))


def require_memory(device, size, what, lower):
    """Raises InputError if less than `size` bytes of memory are free. lower: the flags that would make it less."""
    free = free_memory(device)
    if free < size:
        raise InputError(f"{what} needs at least {size / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free on "
                         f"{device}: lower {lower}")


class Log:
    """Progress on the screen, a line an interval, and the same as JSON lines in `path` (if one is given)."""

    def __init__(self, path=None, interval=10.0, **about):
        """about: what every record says beside its values."""
        self.path, self.interval, self.about = path, interval, about
        self.start()

    def start(self, done=0):
        """Begins timing a loop of which `done` steps were done before (resumed)."""
        self.began = self.last = time.monotonic()
        self.first = done

    def due(self):
        """True once an interval: only then are losses read from the device."""
        return time.monotonic() - self.last >= self.interval

    def __call__(self, stage, step, total, unit="it", **values):
        """Prints `stage step/total`, the values, the rate and the time left."""
        self.last = time.monotonic()
        rate = (step - self.first) / max(self.last - self.began, 1e-9)
        left = duration((total - step) / rate) if rate > 0 else "?"
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        speed = f"{rate:.3g} {unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} s/{unit}"
        print(f"{stage:<8} {step:>6}/{total}  {shown}  {speed}  {left} left", flush=True)
        self.write({"stage": stage, "step": step, "total": total, **values, "rate": rate})

    def write(self, record):
        """Appends one record to the log file."""
        if self.path:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"time": round(time.time(), 1), **self.about, **record}) + "\n")
            except OSError as error:
                raise InputError(f"cannot write {self.path}: {error.strerror}") from error


def duration(seconds):
    """Seconds as 45s, 12m, 3.4h or 2.1d."""
    for limit, unit, size in ((99, "s", 1), (5999, "m", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.{1 if unit == 'h' else 0}f}{unit}"
    return f"{seconds / 86400:.1f}d"


# ------------------------------------------------------------------------------------------------------------
# A data set
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Dataset:
    """Images uint8 [N, 3, H, W] (stored channels last), labels int64 [N] (-1: unknown), and their normalisation."""
    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: tuple
    std: tuple

    @property
    def image_size(self):
        return self.train_images.shape[-1]

    @property
    def labelled(self):
        """True if both splits have images and every label is known, so that the data set can be probed."""
        return all(len(labels) and int(labels.min()) >= 0 for labels in (self.train_labels, self.test_labels))

    def fingerprint(self):
        """Eight hexadecimal digits of the images and their normalisation, not of the labels."""
        return fingerprint(self.train_images, self.test_images, self.mean, self.std)

    def batch(self, images):
        """uint8 [B, 3, H, W] -> normalised float32, in channels-last memory."""
        return normalize(images.float() / 255, self.mean, self.std)


def normalize(images, mean, std):
    """(images - mean) / std per channel, for images [B, 3, H, W] in [0, 1]."""
    mean, std = per_channel(images, mean, std)
    return (images - mean) / std


def denormalize(images, mean, std, clip=True):
    """The inverse of `normalize`, clipped to [0, 1] unless told otherwise."""
    mean, std = per_channel(images, mean, std)
    images = images * std + mean
    return images.clamp(0, 1) if clip else images


def per_channel(images, *values):
    """Each of `values`, a number per channel, as a tensor that broadcasts over images; the host waits for nothing."""
    return (torch.tensor(v, dtype=images.dtype)[:, None, None].to(images.device, non_blocking=True) for v in values)


def load_dataset(name, data_dir="data", image_size=0, device="cpu", train_images=0):
    """The data set called `name`, as tensors on `device`.

    name: a key of OFFICIAL; or the path of a folder with train/ and test/ inside; or of an .npz file.
    image_size: side to which the images are squashed; 0 for their own (64 for TinyImageNet, 32 for other data sets
        by name and for folders). An .npz file is taken as it is and refuses another size.
    train_images: only the first so many of the training images, 0 for all.
    Raises InputError if the data cannot be had.
    """
    path = Path(name)
    given_name = path.stem if path.suffix == ".npz" else path.resolve().name
    if name in OFFICIAL:
        arrays = read_official(name, Path(data_dir), image_size)
    elif path.suffix == ".npz":
        arrays = read_npz(path)
    elif path.is_dir():
        size = image_size or 32
        listing = hashlib.sha256(repr(_listing(path)).encode()).hexdigest()[:8]     # a changed folder is read again
        cache = Path(data_dir) / f"{given_name}-{size}px-{listing}.npz"
        arrays = cached(cache, lambda: read_folder(path, size))
    else:
        raise InputError(f"unknown data set {name!r}: give one of {', '.join(OFFICIAL)}, the path of a folder with "
                         "train/ (and test/) inside, or of an .npz file")
    size = arrays["train_images"].shape[1]
    if image_size and image_size != size:
        raise InputError(f"{name} has {size}-pixel images, not --image-size {image_size}: leave the flag out")
    if name in STATISTICS:
        mean, std = STATISTICS[name]
    else:
        mean, std = channel_statistics(arrays["train_images"])
    for key in ("train_images", "train_labels") if train_images else ():
        arrays[key] = arrays[key][:train_images]
    images = {k: torch.from_numpy(arrays[k]).to(device).permute(0, 3, 1, 2) for k in ("train_images", "test_images")}
    labels = {k: torch.from_numpy(arrays[k]).to(device) for k in ("train_labels", "test_labels")}
    return Dataset(given_name, mean=mean, std=std, **images, **labels)


def channel_statistics(images):
    """Mean and standard deviation per channel, in [0, 1], of uint8 images [N, H, W, 3], from counts of 256 values."""
    value, mean, std = np.arange(256) / 255, [], []
    for channel in range(3):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ value))
        std.append(max(float(share @ (value - mean[-1]) ** 2) ** 0.5, 1e-3))       # a constant channel stays finite
    return tuple(mean), tuple(std)


def cached(path, make):
    """The arrays in the .npz `path`; if there is none, make()'s, checked and written there once."""
    if path.exists():
        return read_npz(path)
    arrays = make()
    check_arrays(arrays, path)
    write_file(path, lambda file: np.savez(file, **arrays))
    return arrays


def read_npz(path):
    """The four arrays of an .npz cache; absent labels and an absent test split are filled in (-1, empty)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {k: file[k] for k in file.files if k in
                      ("train_images", "test_images", "train_labels", "test_labels")}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:                                       # zip, zlib, pickle, struct: a damaged file
        raise InputError(f"{path} is not a readable .npz ({first_line(error)}): delete it to have it made again, or "
                         "replace it (--dataset shapes needs no file)") from error
    if "train_images" not in arrays:
        raise InputError(f"{path} has no array train_images (uint8 [N, H, W, 3])")
    train = arrays["train_images"]
    arrays.setdefault("test_images", np.empty((0, *train.shape[1:]), train.dtype))
    for split in ("train", "test"):
        arrays.setdefault(f"{split}_labels", np.full(arrays[f"{split}_images"].shape[:1], -1, np.int64))
    check_arrays(arrays, path)
    return arrays


def check_arrays(arrays, path):
    """Raises InputError unless the four arrays have the cache format's types and shapes."""
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8 or images.shape[1] != images.shape[2]:
            raise InputError(f"{path}: {split}_images must be uint8 [N, H, H, 3], "
                             f"not {images.dtype} {list(images.shape)}")
        if images.shape[1] < 8:
            raise InputError(f"{path}: {split}_images are {images.shape[1]} pixels wide: at least 8 are needed")
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(f"{path}: {split}_labels must be {len(images)} integers, "
                             f"not {labels.dtype} {list(labels.shape)}")
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    number_classes(arrays, path)
    if len(arrays["train_images"]) < 2:
        raise InputError(f"{path}: {len(arrays['train_images'])} training images: at least 2 are needed")
    if len(arrays["test_images"]) and arrays["test_images"].shape[1:] != arrays["train_images"].shape[1:]:
        raise InputError(f"{path}: train_images and test_images differ in size")


def number_classes(arrays, path):
    """Numbers the classes from 0 without gaps, in the order of their labels; negative labels (unknown) become -1."""
    train, test = (arrays[f"{split}_labels"] for split in ("train", "test"))
    classes = np.unique(train[train >= 0])
    strange = test[(test >= 0) & ~np.isin(test, classes)]
    if len(classes) and len(strange):
        raise InputError(f"{path}: test_labels hold {strange[0]}, a class without a training image")
    for split, labels in (("train", train), ("test", test)):
        arrays[f"{split}_labels"] = np.where((labels >= 0) & (len(classes) > 0), np.searchsorted(classes, labels), -1)


# ------------------------------------------------------------------------------------------------------------
# Where the named data sets come from
# ------------------------------------------------------------------------------------------------------------
# The folder that a data set is unpacked to: [(address, md5, or None where none is known for certain), ...], megabytes.
ARCHIVES = {
    "tiny-imagenet-200": ([("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                            "90528d7ca1a48142e341f4ef8d21d0de")], 248),
    "fgvc-aircraft-2013b": ([("https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/"
                              "fgvc-aircraft-2013b.tar.gz", None)], 2750),
    "CUB_200_2011": ([("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                       "97eceeb196236b17998738112f37df78")], 1150),
    "stanford-dogs": ([("http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar", None),
                       ("http://vision.stanford.edu/aditya86/ImageNetDogs/lists.tar", None)], 794),
    "flowers-102": ([("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz",
                      "52808999861908f626f3c1f4e79d11fa"),
                     ("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/imagelabels.mat",
                      "e0620be6f572b9609742df49c70aed4d"),
                     ("https://www.robots.ox.ac.uk/~vgg/data/flowers/102/setid.mat",
                      "a5357ecc9cb78c4bef273ce3793fc85c")], 345),
}


def read_official(name, data_dir, size=0):
    """The four arrays of a data set of OFFICIAL at `size` pixels (0: its own), from its cache or fetched, once."""
    read, own, _ = OFFICIAL[name]
    return cached(cache_of(name, data_dir, size), lambda: read(data_dir, size or own))


def to_download(names, data_dir, size=0):
    """{name: megabytes} of those data sets of which neither the cache, nor the unpacked folder, nor the archives lie
    in `data_dir`."""
    cifar = {"cifar-10-batches-py": ([("cifar-10-python.tar.gz", None)], 170),
             "cifar-100-python": ([("cifar-100-python.tar.gz", None)], 169)}
    found = {}
    for name in (name for name in names if name in OFFICIAL):
        folder, sources = OFFICIAL[name][2], {**cifar, **ARCHIVES}
        files = [url.rsplit("/", 1)[-1] for url, _ in sources.get(folder, ([], 0))[0]]
        there = [cache_of(name, data_dir, size), Path(data_dir, folder)]
        there += [cache_of(name, data_dir)] if folder in cifar else []          # squashed from that of its own size
        if files and not any(p.exists() for p in there) and not all(Path(data_dir, file).exists() for file in files):
            found[name] = sources[folder][1]
    return found


def cache_of(name, data_dir, size=0):
    """The cache of a data set of OFFICIAL at `size` pixels (0: its own)."""
    return Path(data_dir, f"{name}.npz" if size in (0, OFFICIAL[name][1]) else f"{name}-{size}px.npz")


def unpacked(data_dir, folder):
    """The path data_dir/folder: as it lies there, or fetched and unpacked; whole or not there at all."""
    if (data_dir / folder).is_dir():
        return data_dir / folder
    files, beside = ARCHIVES[folder][0], None
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=data_dir, prefix=f".{folder}."))
        (beside / "unpacked").mkdir()
        for url, md5 in files:
            file = data_dir / url.rsplit("/", 1)[1]
            if not file.exists():                                # a part of a file is thus never taken for the whole
                file = beside / file.name
                torchvision.datasets.utils.download_url(url, beside, md5=md5)
            elif md5 and not torchvision.datasets.utils.check_integrity(file, md5):
                raise OSError(f"{file} is damaged, its md5 is not {md5}")
            if file.suffix == ".mat":
                shutil.copy(file, beside / "unpacked")
            else:                                                # neither kind may write outside the folder
                shutil.unpack_archive(file, beside / "unpacked",
                                      **({} if file.suffix == ".zip" else {"filter": "data"}))
        inside = beside / "unpacked" / folder
        try:
            (inside if inside.is_dir() else beside / "unpacked").rename(data_dir / folder)
        except OSError:
            if not (data_dir / folder).is_dir():                 # another process was faster
                raise
    except Exception as error:                                   # no network, a damaged archive, a full disk
        names = ", ".join(url.rsplit("/", 1)[1] for url, _ in files)
        raise InputError(f"cannot fetch {folder} ({first_line(error)}): put whole and undamaged {names} into "
                         f"{data_dir}/, or the unpacked folder {folder}; --dataset shapes needs no file") from error
    finally:
        if beside:
            shutil.rmtree(beside, ignore_errors=True)
    return data_dir / folder


def _cifar(make, name):
    """A reader of CIFAR: torchvision's data set `make`, squashed from the cache `name` to other sizes."""
    def read(data_dir, size):
        if size != 32:
            arrays = read_official(name, data_dir)
            return {k: v if v.ndim == 1 else np.stack([_squash(Image.fromarray(x), size) for x in v])
                    for k, v in arrays.items()}
        try:
            splits = {split: make(data_dir, train=split == "train", download=True) for split in ("train", "test")}
        except Exception as error:                          # no network, a broken archive, a folder without the right
            raise InputError(f"cannot fetch {name} ({first_line(error)}): put {make.filename} into {data_dir}/ "
                             f"(or {name}.npz; README, 'Data'); --dataset shapes needs no file") from error
        return {**{f"{s}_images": d.data for s, d in splits.items()},
                **{f"{s}_labels": np.array(d.targets, np.int64) for s, d in splits.items()}}
    return read


def _folder(folder, list_files):
    """A reader of an official folder: list_files(root) -> {split: [(path, label from 0), ...]}."""
    def read(data_dir, size):
        root = unpacked(data_dir, folder) if folder in ARCHIVES else data_dir / folder
        try:
            splits = list_files(root)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{error.filename} is missing: {root} is not the official folder; delete it to have it "
                             "fetched again, or put it there unpacked") from error
        except Exception as error:                          # of any kind: the lists of a damaged or a strange folder
            raise InputError(f"the lists in {root} are not the official ones ({first_line(error)}): delete it to have "
                             "it fetched again") from error
        return _decode(splits, size)
    return read


def _list_tinyimagenet(root):
    """train/<wnid>/images/*.JPEG; val/images with val/val_annotations.txt, which is the test split."""
    wnids = sorted(p.name for p in (root / "train").iterdir() if p.is_dir())
    train = [(p, i) for i, w in enumerate(wnids) for p in sorted((root / "train" / w / "images").iterdir())]
    val = [line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    return {"train": train, "test": [(root / "val" / "images" / file, wnids.index(wnid)) for file, wnid in val]}


def _list_aircraft(root):
    """torchvision's lists: 100 variants, trainval and test."""
    splits = {"train": "trainval", "test": "test"}
    lists = {k: torchvision.datasets.FGVCAircraft(root.parent, split, "variant") for k, split in splits.items()}
    return {k: list(zip(d._image_files, d._labels)) for k, d in lists.items()}


def _list_cub(root):
    """images.txt, image_class_labels.txt and train_test_split.txt, each a line "number value" an image."""
    paths, classes, in_train = (dict(line.split() for line in (root / name).read_text().splitlines())
                                for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    return {split: [(root / "images" / paths[i], int(classes[i]) - 1) for i in paths if in_train[i] == flag]
            for split, flag in (("train", "1"), ("test", "0"))}


def _list_dogs(root):
    """Images/<breed>/*.jpg with train_list.mat and test_list.mat."""
    lists = {split: read_mat(root / f"{split}_list.mat") for split in ("train", "test")}
    return {split: [(root / "Images" / file, int(label) - 1) for file, label in zip(m["file_list"], m["labels"])]
            for split, m in lists.items()}


def _list_flowers(root):
    """jpg/image_00001.jpg ... with imagelabels.mat and setid.mat (torchvision reads those only through scipy)."""
    labels, sets = read_mat(root / "imagelabels.mat")["labels"], read_mat(root / "setid.mat")
    return {split: [(root / "jpg" / f"image_{i:05d}.jpg", int(labels[i - 1]) - 1) for i in map(int, sets[name])]
            for split, name in (("train", "trnid"), ("test", "tstid"))}


def _list_cars(root):
    """torchvision's layout: cars_train/, cars_test/, devkit/cars_train_annos.mat, cars_test_annos_withlabels.mat."""
    if not root.is_dir():
        raise InputError(f"cannot fetch Stanford Cars, its official address is dead: unpack a copy as {root}/ with "
                         "cars_train/, cars_test/, devkit/cars_train_annos.mat and cars_test_annos_withlabels.mat")
    lists = {"train": read_mat(root / "devkit" / "cars_train_annos.mat"),
             "test": read_mat(root / "cars_test_annos_withlabels.mat")}
    return {split: [(root / f"cars_{split}" / car["fname"], int(car["class"][0]) - 1) for car in m["annotations"]]
            for split, m in lists.items()}


MAT_NUMBERS = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8",
               16: "u1", 17: "<u2"}


def read_mat(path):
    """The variables of a MATLAB 5 file, as official lists come in: {name: flat array, string, list (cell array) or
    list of dicts (struct array)}. Raises ValueError on anything else."""
    raw = Path(path).read_bytes()
    if raw[:10] != b"MATLAB 5.0" or raw[126:128] != b"IM":
        raise ValueError(f"{path} is not a MATLAB 5 file")
    return dict(_mat_value(body) for _, body in _mat_elements(raw[128:]))


def _mat_elements(raw):
    """(type, bytes) of the data elements in `raw`, compressed ones unpacked."""
    at = 0
    while at < len(raw):
        kind, size = struct.unpack_from("<II", raw, at)
        start, end = at + 8, at + 8 + size + (-size % 8 if kind != 15 else 0)
        if kind >> 16:                                       # a small element: its bytes stand in the tag itself
            kind, size, start, end = kind & 0xffff, kind >> 16, at + 4, at + 8
        body, at = raw[start:start + size], end
        if kind == 15:
            yield from _mat_elements(zlib.decompress(body))
        else:
            yield kind, body


def _mat_value(body):
    """(name, value) of one matrix element."""
    if not body:
        return "", []
    (_, flags), _, (_, name), *parts = _mat_elements(body)
    kind, name = flags[0], name.decode()
    if kind == 1:                                                                          # cell array
        return name, [_mat_value(part)[1] for _, part in parts]
    if kind == 2:                                                                          # struct array
        (_, width), (_, names), *parts = parts
        width = int.from_bytes(width, "little")
        fields = [names[i:i + width].split(b"\0")[0].decode() for i in range(0, len(names), width)]
        values = [_mat_value(part)[1] for _, part in parts]
        return name, [dict(zip(fields, values[i:i + len(fields)])) for i in range(0, len(values), len(fields))]
    numbers = np.frombuffer(parts[0][1], MAT_NUMBERS[parts[0][0]])
    return name, "".join(map(chr, numbers)) if kind == 4 else numbers                      # 4: characters


def _listing(folder):
    """Every file below folder/train and folder/test with its size and time of change, sorted."""
    return [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns)
            for split in ("train", "test") for p in sorted((folder / split).rglob("*")) if p.is_file()]


def read_folder(folder, size):
    """The four arrays from train/<class>/* and test/<class>/* (or train/* without classes), in sorted order."""
    if not (folder / "train").is_dir():
        raise InputError(f"{folder} has no folder train/: expected train/<class>/* (and test/<class>/*), or train/*")
    def images(root, pattern):
        return [p for p in sorted(root.glob(pattern)) if p.suffix.lower() in SUFFIXES and not any(
            part.startswith(".") for part in p.relative_to(folder).parts)]                  # hidden, or in hidden ones

    classes = sorted({p.parent.name for p in images(folder / "train", "*/*")})
    splits = {}
    for split in ("train", "test"):
        splits[split] = [(p, i) for i, name in (enumerate(classes) if classes else [(-1, "")])
                         for p in images(folder / split / name, "*")]
        if left := set(images(folder / split, "**/*")) - {p for p, _ in splits[split]}:
            raise InputError(f"{folder}: {min(left)} (of {len(left)} such images) has no place: expected <class>/* "
                             "with the classes of train/ in both splits, or no folders in either")
    if not splits["train"]:
        raise InputError(f"{folder / 'train'} holds no images ({', '.join(sorted(SUFFIXES))})")
    return _decode(splits, size)


def _squash(image, size):
    """A PIL image as uint8 [size, size, 3], squashed with Lanczos."""
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))


def _rgb(image):
    """A PIL image in RGB. Those of 16 bit, which PIL would cut off at 255, keep their upper eight; so do those in 32
    bit (mode I, which files of 16 have in older versions) if any pixel is above 255."""
    if image.mode.startswith("I"):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}")
        image = Image.fromarray((pixels >> 8 if image.mode != "I" or pixels.max() > 255 else pixels).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    return image.convert("RGB")


def _decode(splits, size):
    """{split: [(path, label), ...]} -> the four arrays: RGB, squashed to `size` with Lanczos, by several threads."""
    def decode(path):
        try:
            with Image.open(path) as image:
                return _squash(_rgb(image), size)
        except Exception as error:                          # PIL raises almost anything on a damaged file
            raise InputError(f"cannot read the image {path} ({first_line(error)}): repair or remove it") from error

    arrays = {}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for split, files in splits.items():
            images = np.empty((len(files), size, size, 3), np.uint8)
            log = Log(interval=5)
            for i, image in enumerate(pool.map(decode, [path for path, _ in files])):
                images[i] = image
                if log.due():
                    log("decode", i + 1, len(files), unit="images", split=split)
            arrays[f"{split}_images"] = images
            arrays[f"{split}_labels"] = np.array([label for _, label in files], np.int64).reshape(-1)
    return arrays


# ------------------------------------------------------------------------------------------------------------
# shapes: the embedded data set
# ------------------------------------------------------------------------------------------------------------
SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "star", "crescent", "hourglass", "dumbbell")


def _shape_distance(kind, x, y):
    """Signed distance (negative inside, in units of the shape's radius) at points x, y of one form of SHAPES."""
    def polygon(corners, phase=0.0):                                       # regular, circumscribed radius 1
        angle = np.mod(np.arctan2(y, x) - phase, 2 * np.pi / corners) - np.pi / corners
        return np.hypot(x, y) * np.cos(angle) - np.cos(np.pi / corners)

    r, square = np.hypot(x, y), np.maximum(np.abs(x), np.abs(y))
    if kind == "disc":
        return r - 0.85
    if kind == "ring":
        return np.abs(r - 0.75) - 0.2
    if kind == "square":
        return square - 0.75
    if kind == "frame":
        return np.abs(square - 0.68) - 0.18
    if kind == "triangle":
        return polygon(3)
    if kind == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.minimum(np.maximum(x - 0.27, y - 0.95), np.maximum(x - 0.95, y - 0.27))
    if kind == "star":
        angle = np.abs(np.mod(np.arctan2(y, x), 2 * np.pi / 5) - np.pi / 5)     # 0 in a notch, pi/5 on a tip
        return r - (0.42 + 0.58 * (angle / (np.pi / 5)) ** 1.5)
    if kind == "crescent":
        return np.maximum(r - 0.95, 0.75 - np.hypot(x - 0.5, y))
    if kind == "hourglass":
        return np.maximum(np.abs(y) - 0.85, np.abs(x) - np.abs(y) * 0.9 - 0.08)
    if kind == "dumbbell":
        balls = np.hypot(np.abs(x) - 0.62, y) - 0.4
        return np.minimum(balls, np.maximum(np.abs(x) - 0.6, np.abs(y) - 0.14))
    raise ValueError(kind)


def _texture(rng, n, grid):
    """n smooth random fields of mean 0 and deviation 1: sums of four plane waves of random direction and length."""
    field = np.zeros((n, *grid.shape[1:]), np.float32)
    for _ in range(4):
        angle, frequency, phase = (rng.uniform(a, b, (n, 1, 1)) for a, b in ((0, np.pi), (0.2, 1.1), (0, 2 * np.pi)))
        field += np.sin(frequency * (np.cos(angle) * grid[0] + np.sin(angle) * grid[1]) + phase).astype(np.float32)
    return field[..., None] / np.sqrt(2)


def make_shapes(train=4000, test=1000, size=32, seed=0):
    """The four arrays of `shapes`: one of ten forms an image, drawn by numpy alone.

    Position, size, rotation, the colours of form and ground, their textures, the lighting and the noise are random
    and independent of the class, so that neither colour nor brightness nor any single pixel gives it away.
    """
    n, rng = train + test, np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % len(SHAPES))
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="xy")).astype(np.float32)
    radius = rng.uniform(0.28, 0.40, (n, 1, 1)) * size
    centre = rng.uniform(-0.1, 0.1, (2, n, 1, 1)) * size + (size - 1) / 2
    angle = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    dx, dy = (grid[:, None] - centre) / radius
    x, y = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    distance = np.empty((n, size, size), np.float32)
    for k, kind in enumerate(SHAPES):
        distance[labels == k] = _shape_distance(kind, x[labels == k], y[labels == k])
    cover = np.clip(0.5 - distance * radius, 0, 1)[..., None].astype(np.float32)          # one pixel of antialiasing
    # A random hue on each, their luma a set distance apart with either one the brighter.
    hues = rng.normal(0, 0.06, (2, n, 1, 1, 3))
    hues -= hues @ np.array([[0.299], [0.587], [0.114]])
    contrast = rng.choice([-1, 1], (n, 1, 1, 1)) * rng.uniform(0.16, 0.2, (n, 1, 1, 1))
    ground, form = (0.5 + luma + hue for luma, hue in zip((-contrast, contrast), hues))
    tint = rng.normal(0, 0.02, (2, n, 1, 1, 3))
    ground, form = (c + t * _texture(rng, n, grid) for c, t in zip((ground, form), tint))
    images = ground + cover * (form - ground) + rng.normal(0, 0.06, (n, size, size, 3))
    images = np.clip(np.round(images * 255), 0, 255).astype(np.uint8)
    labels = labels.astype(np.int64)
    return {"train_images": images[:train], "train_labels": labels[:train],
            "test_images": images[train:], "test_labels": labels[train:]}


# Data sets by name: how they are read, their side in pixels, and the folder that is fetched or must lie in data_dir.
OFFICIAL = {
    "cifar10": (_cifar(torchvision.datasets.CIFAR10, "cifar10"), 32, "cifar-10-batches-py"),
    "cifar100": (_cifar(torchvision.datasets.CIFAR100, "cifar100"), 32, "cifar-100-python"),
    "tinyimagenet": (_folder("tiny-imagenet-200", _list_tinyimagenet), 64, "tiny-imagenet-200"),
    "aircraft": (_folder("fgvc-aircraft-2013b", _list_aircraft), 32, "fgvc-aircraft-2013b"),
    "cub2011": (_folder("CUB_200_2011", _list_cub), 32, "CUB_200_2011"),
    "dogs": (_folder("stanford-dogs", _list_dogs), 32, "stanford-dogs"),
    "flowers": (_folder("flowers-102", _list_flowers), 32, "flowers-102"),
    "cars": (_folder("stanford_cars", _list_cars), 32, "stanford_cars"),
    "shapes": (lambda data_dir, size: make_shapes(size=size), 32, ""),
}


# ------------------------------------------------------------------------------------------------------------
# Augmentation, a batch at a time with independent parameters per image
# ------------------------------------------------------------------------------------------------------------
def random_crops(n, size, scale, rng):
    """Boxes of torchvision's RandomResizedCrop: top, left, height, width, each [n], for images of `size` pixels.

    A box covers a share of the image drawn from `scale` at an aspect ratio drawn from [3/4, 4/3] in the logarithm;
    the first of ten draws that fits is taken, the whole image if none does.
    """
    area = torch.empty(n, 10, device=rng.device).uniform_(*scale, generator=rng) * size * size
    ratio = torch.empty(n, 10, device=rng.device).uniform_(math.log(3 / 4), math.log(4 / 3), generator=rng).exp()
    width, height = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (width <= size) & (height <= size) & (width >= 1) & (height >= 1)
    first = fits.int().argmax(dim=1, keepdim=True)                                   # [n, 1]
    any_fits = fits.any(dim=1)
    width, height = (torch.where(any_fits, v.gather(1, first)[:, 0], size) for v in (width, height))
    place = torch.rand(2, n, device=rng.device, generator=rng)
    top, left = (place * torch.stack([size - height + 1, size - width + 1])).floor()
    return top, left, height, width


def resized_crop(images, top, left, height, width, size, flip):
    """Crops box i out of image i, resizes it to size x size bilinearly and mirrors it where `flip`.

    images [B, C, H, W] float; the rest [B]. Interpolation is linear in each direction, so the whole batch is two
    batched products with [size, H] and [size, W] matrices of hat functions. Coordinates are clamped to the box:
    nothing from beyond its edge bleeds in. Equal to torchvision's resized_crop wherever that does not shrink.
    """
    def weights(start, length, pixels, mirror=None):
        out = (torch.arange(size, device=images.device) + 0.5) / size                        # centres in (0, 1)
        out = out.expand(len(images), size)
        if mirror is not None:
            out = torch.where(mirror[:, None], 1 - out, out)
        position = (out * length[:, None] - 0.5).clamp(min=0).minimum(length[:, None] - 1) + start[:, None]
        pixel = torch.arange(pixels, device=images.device)
        return (1 - (position[:, :, None] - pixel).abs()).clamp(min=0).to(images.dtype)     # [B, size, pixels]

    rows = weights(top, height, images.shape[2])
    columns = weights(left, width, images.shape[3], flip)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)                        # [B, C, size, size]


def grayscale(images):
    """Luma of RGB images [B, 3, H, W] -> [B, 1, H, W], with torchvision's weights."""
    r, g, b = images.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def adjust_brightness(images, factor):
    """images * factor, in [0, 1]; factor [B, 1, 1, 1]."""
    return (images * factor).clamp(0, 1)


def adjust_contrast(images, factor):
    """Blends each image with its mean luma."""
    mean = grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return (images * factor + mean * (1 - factor)).clamp(0, 1)


def adjust_saturation(images, factor):
    """Blends each pixel with its luma."""
    return (images * factor + grayscale(images) * (1 - factor)).clamp(0, 1)


def adjust_hue(images, shift):
    """Turns the hue by shift [B, 1, 1, 1], in turns (-0.5 .. 0.5), at equal HSV saturation and value."""
    value, low = images.amax(1), images.amin(1)                                      # [B, H, W]
    chroma = value - low
    r, g, b = images.unbind(1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == r, (g - b) / safe,
                      torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))   # in sixths of a turn
    hue = hue + shift[:, 0] * 6
    channels = []
    for offset in (5, 3, 1):                                     # HSV -> RGB: one trapezoid of the hue per channel
        k = (hue + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)


JITTERS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def two_views(images, seed, scale=(0.08, 1.0), gray=0.2, part=(0, 1)):
    """Two augmented views of a batch: the draw x1, x2 ~ A(x) of Eq. 1, for uint8 images [B, 3, H, W].

    part: (r, R) if the images are rows r, r + R, ... of a larger batch, the views of which they then get. The rest as
    in `draw_augmentations`. Returns two float tensors in [0, 1], not normalised.
    """
    r, R = part
    views = draw_augmentations(len(images) * R, images.shape[-1], seed, images.device, scale, gray, slice(r, None, R))
    images = images.float() / 255
    return tuple(augment(images) for augment in views)


def draw_augmentations(n, size, seed, device, scale=(0.08, 1.0), gray=0.2, rows=slice(None)):
    """Two draws from A of Eq. 1 for a batch of n images, as functions of the images [n, 3, size, size] in [0, 1].

    Random resized crop (share of the area in `scale`), horizontal flip (p 0.5), colour jitter of brightness, contrast,
    saturation (by up to 0.4) and hue (0.1, p 0.8), grey (p `gray`), as in the recipe of appendix A.1. Every image has
    its own parameters, which `seed` fixes; only the order of the colour operations is drawn once a view. rows: those
    images of the batch that the functions will get. They are differentiable, and the same whenever they are called.
    """
    rng, orders = torch.Generator(device).manual_seed(seed), random.Random(seed)
    return tuple(_draw_augmentation(n, size, rng, orders.sample(range(4), 4), scale, gray, rows) for _ in range(2))


def augmentations(dataset, crop_scale, gray):
    """targets(n, draw): `draw_augmentations` for n normalised images of `dataset`, the seed being `draw`."""
    def targets(n, draw):
        views = draw_augmentations(n, dataset.image_size, draw, dataset.train_images.device, (crop_scale, 1.0), gray)
        return tuple(lambda x, view=view: normalize(view(denormalize(x, dataset.mean, dataset.std, clip=False)),
                                                    dataset.mean, dataset.std) for view in views)
    return targets


def _draw_augmentation(n, size, rng, order, scale, gray, rows):
    def chance(p):
        return torch.rand(n, device=rng.device, generator=rng) < p

    box, flip, jittered = random_crops(n, size, scale, rng), chance(0.5), chance(0.8)
    spread = torch.tensor([0.4, 0.4, 0.4, 0.1])[:, None].to(rng.device, non_blocking=True)
    amount = (torch.rand(4, n, device=rng.device, generator=rng) * 2 - 1) * spread * jittered    # 0: left as it is
    grey = chance(gray)

    def augment(images):
        images = resized_crop(images, *(edge[rows] for edge in box), size, flip[rows])
        for i in order:
            neutral = 0 if JITTERS[i] is adjust_hue else 1                 # hue is a shift, the others are factors
            images = JITTERS[i](images, neutral + amount[i, rows].view(-1, 1, 1, 1))
        return torch.where(grey[rows].view(-1, 1, 1, 1), grayscale(images), images)
    return augment


def shift_and_flip(images, seed, most=4):
    """Each of the normalised images [B, C, H, H] shifted by up to `most` pixels each way (zeros come in) and mirrored
    or not; `seed` fixes the draw."""
    rng, (n, _, _, size) = torch.Generator(images.device).manual_seed(seed), images.shape
    top, left = torch.randint(2 * most + 1, (2, n), device=images.device, generator=rng)
    flip = torch.rand(n, device=images.device, generator=rng) < 0.5
    whole = torch.full((n,), size, device=images.device)
    return resized_crop(torch.nn.functional.pad(images, [most] * 4), top, left, whole, whole, size, flip)
