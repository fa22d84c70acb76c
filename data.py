"""Data of MKDT: files, progress, devices, data sets and augmentation. The other files use it.

    Progress          accompanies a training loop: resumes it, reports on it, saves its state
    load_dataset      a data set by name, from a folder or from an .npz, as uint8 tensors
    two_views         the augmentations A of Eq. 1, with parameters of its own for every image

A data set is decoded once into <data-dir>/<name>.npz: uint8 train_images, test_images [N, H, H, 3],
integer train_labels, test_labels [N]. Where that file lies, nothing is downloaded or decoded."""
import argparse
import contextlib
import ctypes
import datetime
import functools
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
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.functional import rgb_to_grayscale


# ---- Errors and files -------------------------------------------------------------------------
class InputError(ValueError):
    """Something that a user can put right: a file, a flag, a value. One line that says how."""

class Diverged(InputError):
    """A training loop whose values are no longer finite."""

def first_line(error):
    """The first line of an exception's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

@contextlib.contextmanager
def whole_file(path):
    """A binary file to write as `path`. It is written beside `path` first and then renamed, so
    that `path` is never half written. Raises InputError if it cannot be written."""
    path, beside = Path(path), Path(f"{path}.{os.getpid()}.part")
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
    """Writes a text file in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode())

def load(path, **options):
    """torch.load of plain data onto the CPU. Raises InputError, naming the file, if that fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: either its name is mistyped, or the stage that "
                         "makes it has not been run") from None
    except Exception as error:             # pickle, zip and torch each have their own
        raise InputError(f"{path} is not a whole torch file of tensors and plain values: it is "
                         f"damaged, or another kind of file ({type(error).__name__})") from error

def checksum(*values):
    """Eight hexadecimal digits that tell the contents of tensors, arrays or plain values apart."""
    crc = 0
    for value in values:
        if torch.is_tensor(value):
            value = value.detach().cpu().numpy()
        elif not isinstance(value, np.ndarray):
            value = np.frombuffer(repr(value).encode(), np.uint8)
        crc = zlib.crc32(np.ascontiguousarray(value), crc)
    return f"{crc:08x}"

# ---- Progress of a training loop --------------------------------------------------------------
class Log:
    """Prints progress lines and appends them to the file `path` as JSON, one object a line.
    seconds: the time between two lines; minutes: the time between two checkpoints."""

    def __init__(self, path=None, seconds=10.0, minutes=5.0):
        self.path, self.seconds, self.minutes = path, seconds, minutes
        self.last = -math.inf

    def __call__(self, stage, step, total, speed=0.0, note="", **values):
        """speed: steps a second, 0 if it is not known yet."""
        self.last = time.monotonic()
        line = f"{stage:<8} {step:>6}/{total}"
        for name, value in values.items():
            line += f"  {name} {value:.4g}"
        if speed:
            line += f"  {speed:.3g}/s  {(total - step) / speed / 60:.1f} min left"
        print(f"{line}  {note}".rstrip(), flush=True)
        if self.path and RANK == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

class Progress:
    """Accompanies a training loop: resumes it, reports on it and saves its state.

    stage, total: the loop's name and its number of steps. checkpoint: the file for `state`, tensors
    and objects with a state_dict, written every few minutes and at the end. If it exists, `state`
    is restored from it at once, and the loop goes on from `first_step`. advice: what to do if a
    value is no longer finite. visit(step) is called every `every` steps.

    Call it after each step with the number of steps done and with values to report. They are read
    from the device only when a line is due, as means since the last line."""

    def __init__(self, stage, total, log, checkpoint=None, advice="", every=0, visit=None, **state):
        self.stage, self.total, self.log = stage, total, log
        self.checkpoint, self.state = checkpoint, state
        self.advice, self.every, self.visit = advice, every, visit
        self.first_step = self.restore()
        self.recent = []
        self.timed_steps, self.timed_since = 0, None
        self.saved_at = time.monotonic()

    def __call__(self, step, **values):
        now = time.monotonic()
        self.recent.append(values)
        if self.timed_since is None:       # the first step is not timed: it may compile
            self.timed_since = now
        else:
            self.timed_steps += 1
        last = step == self.total
        line_due = now - self.log.last >= self.log.seconds
        visit_due = self.every > 0 and step % self.every == 0
        save_due = self.checkpoint and (last or now - self.saved_at >= 60 * self.log.minutes)
        if last or line_due or visit_due or save_due:
            self.report(step, line_due or self.checkpoint)
        if save_due and RANK == 0:
            saved = {"step": step, "ranks": RANKS}
            for name, part in self.state.items():
                saved[name] = part if torch.is_tensor(part) else part.state_dict()
            save(self.checkpoint, saved)
        if save_due:
            self.saved_at = time.monotonic()
        if visit_due:
            self.visit(step)

    def report(self, step, print_line):
        """Checks the means since the last report, and prints them if that is wanted. Raises
        Diverged if one is not finite, or if the learned rate alpha_syn, "lr", is not positive."""
        means, latest = {}, self.recent[-1]
        for name in latest:
            means[name] = float(sum(values[name] for values in self.recent)) / len(self.recent)
            if not math.isfinite(means[name]) or (name == "lr" and latest["lr"] <= 0):
                raise Diverged(f"{self.stage}: {name} became {float(latest[name]):.3g} by step "
                               f"{step}. {self.advice}")
        now = time.monotonic()             # reading the values has waited for the device
        if print_line:
            speed = self.timed_steps / max(now - self.timed_since, 1e-9)
            self.log(self.stage, step, self.total, speed, **means)
        self.recent = []
        self.timed_steps, self.timed_since = 0, now

    @torch.no_grad()
    def restore(self):
        """Puts what the checkpoint holds into `state`; returns the number of steps done."""
        if not self.checkpoint or not self.checkpoint.exists():
            return 0
        saved = load(self.checkpoint)
        try:
            if saved["ranks"] != RANKS:
                raise ValueError(f"it was made by {saved['ranks']} processes, not {RANKS}")
            for name, part in self.state.items():
                if torch.is_tensor(part):
                    part.copy_(saved[name])
                else:
                    part.load_state_dict(saved[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.checkpoint} does not fit this run ({first_line(error)}): "
                             "delete it to start the stage again") from error
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
        torch.backends.cudnn.benchmark = True                  # there are few shapes
    else:
        keep_freed_memory()
    if RANKS > 1 and not dist.is_initialized():                # the others wait while rank 0 works
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=7))
    return device

def add_common_flags(parser):
    """The flags that mkdt.py and eval.py have in common."""
    add = parser.add_argument
    add("--data-dir", default="data", help="where data sets are kept (default: data)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction, default=None,
        help="compile students (default: on GPUs, and for students of width 32 and more)")

def compile_pays(args, width):
    """Whether to compile students: narrow ones on a CPU cost more than they save."""
    if args.compile is not None:
        return args.compile
    return args.device.type == "cuda" or width >= 32

def keep_freed_memory():
    """Has glibc keep freed blocks for the next step. By itself it gives large ones back to the
    kernel, which then clears their pages anew: that is much of a step's time on a CPU."""
    with contextlib.suppress(AttributeError, TypeError):   # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)                             # M_TRIM_THRESHOLD: do not trim
        mallopt(-4, 0)                                     # M_MMAP_MAX: no separate blocks

@contextlib.contextmanager
def command_line(script):
    """Runs a command. What a user can put right ends it with one line and exit code 2. Only rank 0
    reports progress; a character that the console lacks is shown as a question mark."""
    sys.stdout.reconfigure(errors="replace")
    sys.stderr.reconfigure(errors="replace")
    try:
        with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
            yield
    except (InputError, MemoryError, torch.OutOfMemoryError) as error:
        reason = " ".join(str(error).split()) or "there is not enough memory"
        print(f"{script}: {reason}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; run the same command again to go on")

def barrier():
    """Returns when every rank has come here."""
    if RANKS > 1:
        dist.barrier()

@contextlib.contextmanager
def rank_0_first():
    """Rank 0 does what is below first, e.g. it downloads; then the others, who find it done."""
    if RANK > 0:
        barrier()
    try:
        yield
    finally:                               # if rank 0 fails, the others must not wait for ever
        if RANK == 0:
            barrier()

def sum_over_ranks(tensors):
    """Replaces each of `tensors` by its sum over the ranks."""
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
# Means and standard deviations of the authors' code: the pixel rates of Tables 8 and 9 are in
# these units. Any other data set is normalised by its own training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2009, 0.1984, 0.2023)),
    "tinyimagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

@dataclass
class Dataset:
    """Images uint8 [N, 3, H, H], labels int64 [N] from 0 on (-1: unknown), mean and std [3, 1, 1]
    of the pixels. images_id, id: checksums of the training images, and of everything. source: what
    it was loaded by."""
    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    images_id: str = ""
    id: str = ""
    source: str = ""

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
        """The inverse of `normalize`, in [0, 1]."""
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
        read = functools.partial(read_official, name, Path(data_dir))
        arrays = cached(Path(data_dir), name, image_size, OFFICIAL[name].side, read)
    elif path.suffix == ".npz":
        arrays = read_npz(name)
    elif path.is_dir():
        files, version = list_folder(path)
        read = functools.partial(read_folder, path, files)
        arrays = cached(Path(data_dir), f"{title}-{version}", image_size, 32, read)
    else:
        raise InputError(f"unknown data set {name!r}: give one of {', '.join(OFFICIAL)}, a folder "
                         "with train/ (and test/) inside, or an .npz file")
    images = arrays["train_images"]
    if image_size not in (0, images.shape[1]):
        raise InputError(f"{name} has {images.shape[1]}-pixel images: leave out --image-size "
                         f"{image_size}")
    number_classes(name, arrays)
    mean, std = STATISTICS.get(name) or channel_statistics(images)
    if 0 < train_images < len(images):
        chosen = np.sort(np.random.default_rng(0).permutation(len(images))[:train_images])
        arrays["train_images"] = images[chosen]
        arrays["train_labels"] = arrays["train_labels"][chosen]
    print(summary(title, arrays), flush=True)
    tensors = [torch.from_numpy(arrays[key]) for key in ARRAYS]
    for i in (0, 2):
        tensors[i] = tensors[i].permute(0, 3, 1, 2)            # [N, H, H, 3] -> [N, 3, H, H]
    return Dataset(title, *[tensor.to(device) for tensor in tensors],
                   mean=torch.tensor(mean, device=device)[:, None, None],
                   std=torch.tensor(std, device=device)[:, None, None],
                   images_id=checksum(arrays["train_images"]),
                   id=checksum(*[arrays[key] for key in ARRAYS]), source=name)

ARRAYS = ["train_images", "train_labels", "test_images", "test_labels"]
EXTRAS = ["mkdt_class_names", "mkdt_notes"]                    # what only our own .npz files have

def number_classes(name, arrays):
    """Renumbers the labels from 0 on, in place; -1 stays unknown. Raises InputError if there are
    test classes without a training image, which a probe can only get wrong."""
    train, test = arrays["train_labels"], arrays["test_labels"]
    names = arrays["mkdt_class_names"]
    classes = np.unique(train[train != -1])
    unseen = np.setdiff1d(test[test != -1], classes)
    if len(classes) == 0:
        test[:] = -1
    elif len(unseen):
        raise InputError(f"{name}: there are test images, but no training images, of the classes "
                         f"{listed(unseen, names)}")
    for labels in (train, test):
        labels[:] = np.where(labels == -1, -1, np.searchsorted(classes, labels))
    if len(names):
        arrays["mkdt_class_names"] = names[classes]

def listed(classes, names):
    """The first ten of some classes, by their names if these are known."""
    return ", ".join(str(k) for k in (names[classes] if len(names) else classes)[:10])

def summary(title, arrays):
    """What was read, in lines of at most 100 columns."""
    labels, test = arrays["train_labels"], arrays["test_labels"]
    names, notes = arrays["mkdt_class_names"], arrays["mkdt_notes"]
    counts = np.bincount(labels[labels >= 0])
    told = [f"{name} {count}" for name, count in zip(names, counts)]
    text = f"{title}: {len(labels):,} training images"
    if len(counts) < 2:
        text += " of one class, which count as unlabelled" if len(counts) else " without labels"
    else:
        text += f" of {len(counts)} classes" + f" ({', '.join(told)})" * (0 < len(told) <= 10)
    if 0 < counts.sum() < len(labels):
        text += f", {len(labels) - counts.sum():,} of them unlabelled"
    text += f", {len(test):,} test images, {arrays['train_images'].shape[1]} pixels"
    absent = np.setdiff1d(np.arange(len(counts)), test)
    if (test >= 0).any() and len(absent):
        text += f"; not in the test split: {listed(absent, names)}"
    return textwrap.fill("; ".join([text, *notes]), 100, subsequent_indent="    ")

def channel_statistics(images):
    """Mean and standard deviation of each channel, in [0, 1], of uint8 images [N, H, W, 3], or of
    about 10,000 of them at even distances."""
    sample = images[::len(images) // 10_000 + 1]
    mean = sample.mean(axis=(0, 1, 2)) / 255
    squares = np.zeros(3)
    for part in np.array_split(sample, 40):                    # all at once take twice the memory
        squares += np.square(part, dtype=np.uint16).sum(axis=(0, 1, 2), dtype=np.float64)
    mean_square = squares / sample[..., 0].size / 255**2
    return mean.tolist(), np.sqrt(mean_square - mean**2).clip(1e-3).tolist()

def cached(data_dir, name, size, usual_size, read):
    """The arrays of the .npz `name` in data_dir. If there is none, read(size) makes it."""
    if size not in (0, usual_size):
        name = f"{name}-{size}px"
    path = data_dir / f"{name}.npz"
    with rank_0_first():
        if not path.exists():
            with whole_file(path) as file:
                np.savez(file, **read(size or usual_size))
        return read_npz(path)

def read_npz(path):
    """The arrays of an .npz, checked. Labels (-1) and test images may be missing. Images may be
    grey, [N, H, H] or [N, H, H, 1]; labels [N] or [N, 1], of any integer type."""
    arrays = {key: np.array([], str) for key in EXTRAS}
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays.update({key: file[key] for key in ARRAYS + EXTRAS if key in file})
        train = arrays["train_images"]
    except Exception as error:             # zip, zlib, pickle and numpy each have their own
        raise InputError(f"{path} is not a whole .npz with train_images "
                         f"({first_line(error)})") from error
    side = train.shape[1:2]
    for split in ("train", "test"):
        images = arrays.get(f"{split}_images", train[:0])
        labels = arrays.get(f"{split}_labels", np.full(len(images), -1))
        if images.ndim == 3 or images.shape[3:] == (1,):
            images = np.repeat(images.reshape(*images.shape[:3], 1), 3, axis=3)
        if images.dtype != np.uint8 or images.shape[1:] != (*side, *side, 3):
            raise InputError(f"{path}: {split}_images must be uint8 [N, H, H, 3] or [N, H, H], all "
                             f"of one size, not {images.dtype} {list(images.shape)}")
        if labels.shape not in ((len(images),), (len(images), 1)) or labels.dtype.kind not in "biu":
            raise InputError(f"{path}: {split}_labels must be {len(images)} integers, not "
                             f"{labels.dtype} {list(labels.shape)}")
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = labels.reshape(-1).astype(np.int64)
    if len(train) < 2 or side < (8,) or train.min() == train.max():
        raise InputError(f"{path}: nothing can be learnt from {len(train)} training images of "
                         f"{side[0]} pixels: at least two of 8 pixels, not all of one colour")
    return arrays

def share(n, percent, flag):
    """How many that percentage of n images is. Raises InputError if it is none, or over all."""
    count = math.floor(n * percent / 100 + 1e-9)
    if not 1 <= count <= n:
        raise InputError(f"{flag} {percent:g} of {n} images is {count}: it must leave at least one "
                         "and at most all")
    return count

# ---- Decoding pictures ------------------------------------------------------------------------
def as_people_see_it(image):
    """A PIL image in RGB, 8 bit: turned as its EXIF data say, transparency over white, 16-bit
    grey scaled. Raises ValueError for a mode that has no such form."""
    from PIL import Image, ImageOps                            # torchvision brings Pillow
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        deep = np.asarray(image)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("its grey values are beyond 16 bits")
        image = Image.fromarray((deep / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("mode F, 32-bit floating point, has no range of its own")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")

def decode(splits, size, class_names=(), notes=()):
    """The arrays of a data set from {"train": [(picture, label), ...], "test": ...}. Pictures are
    paths or uint8 arrays [H, W, 3]; they are squashed to `size` with Lanczos. Files that are no
    images are left out; InputError, naming all of them, if images cannot be read."""
    from PIL import Image, UnidentifiedImageError
    suffixes = Image.registered_extensions()
    arrays, broken, left_out = {}, [], []

    def read(row, picture):
        """Puts the picture into `row`; returns whether it is an image."""
        try:
            if isinstance(picture, np.ndarray):
                image = Image.fromarray(picture)
            else:
                image = as_people_see_it(Image.open(picture))
            row[:] = image.resize((size, size), Image.Resampling.LANCZOS)
            return True
        except Exception as error:                             # PIL raises almost anything
            suffix = Path(picture).suffix.lower()
            if isinstance(error, UnidentifiedImageError) and suffix not in suffixes:
                left_out.append(suffix or "no suffix")
            else:
                broken.append(f"{picture} ({first_line(error)})")
            return False

    for split, pairs in splits.items():
        pictures, labels = zip(*pairs) if pairs else ((), ())
        images = np.empty((len(pairs), size, size, 3), np.uint8)
        with ThreadPoolExecutor() as pool:
            good = np.array(list(pool.map(read, images, pictures)), bool)
        arrays[f"{split}_images"] = images if good.all() else images[good]
        arrays[f"{split}_labels"] = np.array(labels, np.int64)[good]
    if broken:
        raise InputError(f"{len(broken)} images cannot be read; repair or remove "
                         f"{', '.join(sorted(broken)[:20])}")
    if left_out:
        told = f"left out: {len(left_out)} files that are not images ({', '.join(set(left_out))})"
        notes = [*notes, told]
    extras = zip(EXTRAS, (np.array(class_names, str), np.array(notes, str)))
    return {**arrays, **dict(extras)}

# ---- Folders of images ------------------------------------------------------------------------
def hidden(name):
    """Whether a file or folder is the system's own."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")

def list_folder(folder):
    """(the files below train/ and test/ in sorted order, relative to `folder`; a checksum of their
    names, sizes and times). Hidden files and folders do not count."""
    files, state = [], []
    for split in ("train", "test"):
        for root, folders, names in os.walk(folder / split, followlinks=True):
            folders[:] = sorted(name for name in folders if not hidden(name))
            for path in [Path(root, name) for name in sorted(names) if not hidden(name)]:
                files.append(path.relative_to(folder))
                if path.exists():                              # no dead link
                    state.append((str(files[-1]), path.stat().st_size, path.stat().st_mtime))
    return files, checksum(state)

def read_folder(folder, files, size):
    """The arrays of train/<class>/* and test/<class>/*, or of train/* if there are no classes."""
    if not (folder / "train").is_dir():
        raise InputError(f"{folder} holds no folder called train: images are looked for in "
                         f"{folder}/train/<class>/ (or {folder}/train/) and {folder}/test/<class>/")
    names = sorted({path.parts[1] for path in files if len(path.parts) > 2})
    splits = {"train": [], "test": []}
    for path in files:
        if len(path.parts) > 2:
            splits[path.parts[0]].append((folder / path, names.index(path.parts[1])))
        elif not names:
            splits[path.parts[0]].append((folder / path, -1))
    notes = []
    loose = len(files) - len(splits["train"]) - len(splits["test"])
    if loose:
        notes.append(f"left out: {loose} files that lie in no class folder")
    if not splits["test"] and (folder / "val").is_dir():
        notes.append("val/ is not read: call it test/ to use it as such")
    if len(names) == 1:
        notes.append(f"the only class folder is {names[0]}/")
    return decode(splits, size, names, notes)

# ---- Official data sets -----------------------------------------------------------------------
class Source(NamedTuple):
    """An official data set."""
    read: Callable                         # data_dir -> {"train": [(picture, label), ...], "test"}
    places: str                            # where in data_dir its archives are looked for
    side: int = 32                         # in pixels

def read_official(name, data_dir, size):
    """The arrays of a data set of OFFICIAL, downloaded if it does not lie in `data_dir`."""
    try:
        splits = OFFICIAL[name].read(data_dir)
    except Exception as error:             # no network, a damaged archive, no scipy
        places = ", ".join(f"{data_dir}/{place}" for place in OFFICIAL[name].places.split())
        raise InputError(f"cannot read {name} ({first_line(error)}). It is looked for in {places}, "
                         f"or decoded in {data_dir}/{name}.npz (README, Your own images). Delete a "
                         "download that was interrupted") from error
    return decode(splits, size)

def from_torchvision(make, train, test, pictures, labels):
    """A reader of one of torchvision's data sets: make(root, **train) and make(root, **test), which
    keep what is wanted in their fields `pictures` and `labels`."""
    def read(data_dir):
        splits = {}
        for split, options in (("train", train), ("test", test)):
            dataset = make(data_dir, download=True, **options)
            splits[split] = list(zip(getattr(dataset, pictures), getattr(dataset, labels)))
        return splits
    return read

def fetched(path, *archives):
    """`path`, which is unpacked from the archives (url, md5) if it is not there."""
    if not path.exists():
        for url, md5 in archives:
            download_and_extract_archive(url, path.parent, md5=md5)
    return path

def tinyimagenet(data_dir):
    """The validation images are the test split, as everywhere."""
    root = fetched(data_dir / "tinyimagenet/tiny-imagenet-200",
                   ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                    "90528d7ca1a48142e341f4ef8d21d0de"))
    train = datasets.ImageFolder(root / "train")
    test = []
    for line in (root / "val/val_annotations.txt").read_text().splitlines():
        file, name = line.split("\t")[:2]
        test.append((root / "val/images" / file, train.class_to_idx[name]))
    return {"train": train.samples, "test": test}

def cub2011(data_dir):
    """CUB-200-2011 in its official split."""
    root = fetched(data_dir / "cub2011/CUB_200_2011",
                   ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                    "97eceeb196236b17998738112f37df78"))
    tables = []
    for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt"):
        tables.append(dict(line.split() for line in (root / name).read_text().splitlines()))
    paths, labels, in_train = tables
    splits = {"train": [], "test": []}
    for number, flag in in_train.items():
        pair = root / "images" / paths[number], int(labels[number]) - 1
        splits["train" if flag == "1" else "test"].append(pair)
    return splits

def dogs(data_dir):
    """Stanford Dogs in its official split."""
    from scipy.io import loadmat                               # pip install scipy
    address = "http://vision.stanford.edu/aditya86/ImageNetDogs/"
    root = fetched(data_dir / "dogs/train_list.mat", (address + "images.tar", None),
                   (address + "lists.tar", None)).parent
    splits = {}
    for split in ("train", "test"):
        table = loadmat(root / f"{split}_list.mat", squeeze_me=True)
        paths = [root / "Images" / str(file) for file in table["file_list"]]
        splits[split] = list(zip(paths, table["labels"].astype(int) - 1))
    return splits

def cars(data_dir):
    """Stanford Cars, whose official download no longer works: a copy, however deep it lies."""
    from scipy.io import loadmat                               # pip install scipy
    root = data_dir / "stanford_cars"
    splits = {}
    for split, name in (("train", "cars_train_annos"), ("test", "cars_test_annos_withlabels")):
        paths = {path.name: path for path in (root / f"cars_{split}").rglob("*.jpg")}
        lists = sorted(root.rglob(f"{name}.mat"))
        if not paths or not lists:
            raise FileNotFoundError(f"there is no {name}.mat or no image in cars_{split}")
        rows = loadmat(lists[0], squeeze_me=True)["annotations"]
        splits[split] = [(paths[str(row["fname"])], int(row["class"]) - 1) for row in rows]
    return splits

# ---- shapes: the data set that is drawn here --------------------------------------------------
def signed_distances(x, y):
    """Signed distances of points x, y to ten forms about 0, in radii."""
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
    """(uint8 [n, size, size, 3], labels [n]): one of ten forms an image, in equal numbers.
    Position, size, rotation, colours and noise are random and independent of the form, so that
    neither brightness nor any single pixel gives it away."""
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
    sign = rng.choice([-1, 1], (n, 1, 1, 1))
    contrast = sign * rng.uniform(0.16, 0.2, (n, 1, 1, 1))
    ground, ink = 0.5 + hues - hues.mean(axis=-1, keepdims=True) + [-contrast, contrast]
    images = ground + cover * (ink - ground) + rng.normal(0, 0.06, (n, size, size, 3))
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8), labels

def shapes(data_dir):
    """4,000 images to train on and 4,000 to test on."""
    pairs = list(zip(*draw_shapes(8000, 24, np.random.default_rng(0))))
    return {"train": pairs[:4000], "test": pairs[4000:]}

CIFAR = {"train": True}, {"train": False}, "data", "targets"
FILES = {"split": "test"}, "_image_files", "_labels"
OFFICIAL = {
    "cifar10": Source(from_torchvision(datasets.CIFAR10, *CIFAR), "cifar-10-python.tar.gz"),
    "cifar100": Source(from_torchvision(datasets.CIFAR100, *CIFAR), "cifar-100-python.tar.gz"),
    "tinyimagenet": Source(tinyimagenet, "tinyimagenet/tiny-imagenet-200.zip", side=64),
    "aircraft": Source(from_torchvision(datasets.FGVCAircraft, {"split": "trainval"}, *FILES),
                       "fgvc-aircraft-2013b.tar.gz"),
    "cub2011": Source(cub2011, "cub2011/CUB_200_2011.tgz"),
    "dogs": Source(dogs, "dogs/images.tar dogs/lists.tar"),
    "flowers": Source(from_torchvision(datasets.Flowers102, {"split": "train"}, *FILES),
                      "flowers-102/102flowers.tgz flowers-102/imagelabels.mat "
                      "flowers-102/setid.mat"),
    "cars": Source(cars, "stanford_cars/cars_train stanford_cars/cars_test stanford_cars/devkit "
                   "stanford_cars/cars_test_annos_withlabels.mat"),
    "shapes": Source(shapes, "", side=24),
}

# ---- Augmentation: a batch at a time, with parameters of its own for every image --------------
def random_crops(n, size, scale, rng):
    """Boxes of torchvision's RandomResizedCrop: (top, left, height, width), each [n].
    A box covers a share of the image drawn from `scale` at an aspect ratio from [3/4, 4/3],
    uniform in the logarithm: the first of ten draws that fits, or the whole image if none does."""
    area = torch.empty(n, 10, device=rng.device).uniform_(*scale, generator=rng) * size * size
    log_ratio = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3), generator=rng)
    ratio = log_ratio.exp()
    widths = (area * ratio).sqrt().round()                                 # [n, 10]
    heights = (area / ratio).sqrt().round()
    fits = (widths <= size) & (heights <= size) & (widths >= 1) & (heights >= 1)
    first = fits.int().argmax(dim=1, keepdim=True)                         # [n, 1]
    any_fits = fits.any(dim=1)
    width = torch.where(any_fits, widths.gather(1, first)[:, 0], size)
    height = torch.where(any_fits, heights.gather(1, first)[:, 0], size)
    place = torch.rand(2, n, device=rng.device, generator=rng)
    top, left = (place * torch.stack([size - height + 1, size - width + 1])).floor()
    return top, left, height, width

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
    images [B, C, H, W] float; box: top, left, height, width, each [B] (or [1], one for all).
    Interpolation is linear in each direction, so that the whole batch is two batched products.
    Nothing from beyond a box bleeds in. Equal to torchvision's where that does not shrink."""
    top, left, height, width = box
    never = torch.zeros_like(flip)
    rows = linear_weights(top, height, images.shape[2], size, never).to(images.dtype)
    columns = linear_weights(left, width, images.shape[3], size, flip).to(images.dtype)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)       # [B, C, size, size]

def jitter(name, images, amount):
    """torchvision's adjust_<name> of images in [0, 1], with the factor 1 + amount; for "hue", whose
    share is a quarter, with the shift amount / 4. amount: [B, 1, 1, 1]."""
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
    hue = torch.where(value == r, (g - b) / safe, below)                   # sixths of a turn
    hue = hue + shift[:, 0] * 6
    channels = []
    for offset in (5, 3, 1):               # HSV -> RGB: one trapezoid of the hue per channel
        k = (hue + offset) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1)

JITTERS = ["brightness", "contrast", "saturation", "hue"]

@dataclass
class Augmentation:
    """One draw from A of Eq. 1, as a differentiable function of images [n, 3, H, H] in [0, 1].
    size: H. box: top, left, height, width, each [n]. flip: [n]. amounts: of the four jitters,
    [4, n, 1, 1, 1]. order: of the jitters, one for the batch. grey: [n, 1, 1, 1]."""
    size: int
    box: tuple
    flip: torch.Tensor
    amounts: torch.Tensor
    order: list
    grey: torch.Tensor

    def __call__(self, images):
        images = resized_crop(images, self.box, self.size, self.flip)
        for name, amount in zip(self.order, self.amounts):
            images = jitter(name, images, amount)
        return torch.where(self.grey, rgb_to_grayscale(images), images)

def draw_augmentations(n, size, seed, device, scale=(0.08, 1.0), grey=0.2):
    """Two draws from A of Eq. 1 for n images of `size` pixels, fixed by `seed`, as in mix-bt, which
    A.1 cites: random resized crop (share of the area in `scale`), flip (p 0.5), jitter of
    brightness, contrast, saturation (0.4) and hue (0.1; all p 0.8), grey (p `grey`). Every image
    has its own parameters; only the order of the jitters is drawn once for the batch."""
    rng = torch.Generator(device).manual_seed(seed)
    order_rng = np.random.default_rng(seed)
    draws = []
    for _ in range(2):
        box = random_crops(n, size, scale, rng)
        flip = torch.rand(n, device=device, generator=rng) < 0.5
        strength = torch.rand(4, n, 1, 1, 1, device=device, generator=rng)
        applied = torch.rand(n, 1, 1, 1, device=device, generator=rng) < 0.8
        is_grey = torch.rand(n, 1, 1, 1, device=device, generator=rng) < grey
        amounts = (0.8 * strength - 0.4) * applied
        order = order_rng.permutation(JITTERS)
        draws.append(Augmentation(size, box, flip, amounts, order, is_grey))
    return draws

def two_views(images, seed, scale=(0.08, 1.0), grey=0.2):
    """Two augmented views of a batch: the draw x1, x2 ~ A(x) of Eq. 1.
    images: uint8 [B, 3, H, H]. Returns two float tensors in [0, 1], not normalised. The rest as
    in `draw_augmentations`. Raises ValueError for other images."""
    n, channels, height, width = images.shape
    if images.dtype != torch.uint8 or channels != 3 or height != width:
        raise ValueError("two_views takes square uint8 images [B, 3, H, H], not "
                         f"{images.dtype} {list(images.shape)}")
    first, second = draw_augmentations(n, width, seed, images.device, scale, grey)
    images = images.float() / 255
    return first(images), second(images)

def shift_and_flip(images, seed):
    """Float images [B, C, H, H] in [0, 1], each shifted by up to four pixels (black comes in) and
    mirrored or not: random crop with padding, and flip. `seed` fixes the draw."""
    n, _, _, size = images.shape
    rng = torch.Generator(images.device).manual_seed(seed)
    top, left = torch.randint(9, (2, n), device=images.device, generator=rng)
    flip = torch.rand(n, device=images.device, generator=rng) < 0.5
    whole = torch.full((n,), size, device=images.device)
    padded = F.pad(images, [4, 4, 4, 4])
    return resized_crop(padded, (top, left, whole, whole), size, flip)
