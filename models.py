"""Networks, losses and the training loop of MKDT (Joshi, Ni & Mirzasoleiman, ICLR 2025).

    ENCODERS        ConvNet, the student of section 5; ResNet-10/18, the teacher and Table 5
    SSL             what a teacher learns by: Barlow Twins (Eq. 1), SimCLR (Table 6)
    OBJECTIVES      what a student minimises: Eq. 5; cross-entropy and SimCLR's loss for Figure 1
    functional      a network as a function of one flat parameter vector theta
    train           the one training loop: teacher, experts, pre-training, fine-tuning

To try an idea, write a function or a class and add a line to the dict of its kind."""
import contextlib
import ctypes
import datetime
import functools
import hashlib
import math
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, conv1x1

class InputError(ValueError):
    """Something a user can put right: a file, a flag, a value. One line that says how."""

# ---- Random numbers: each draw has a name ----------------------------------------------------
def stream(seed, *name):
    """A torch.Generator for the draw called `name`, e.g. stream(0, "expert order", epoch).
    Every random number of the project comes from one of these. Nothing then depends on what was
    drawn before, expert i is the same whether 5 or 100 are trained, and an interrupted run needs
    no generator's state. `.initial_seed()` is the number to seed something else with."""
    digest = hashlib.sha256(repr((int(seed), *name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

def build(make, seed, *name):
    """make() with its initial weights drawn from the stream called `name`, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, *name).initial_seed())
        return make()

# ---- Encoders --------------------------------------------------------------------------------
class InstanceNorm(nn.Module):
    """Instance norm with affine parameters: GroupNorm with one channel a group (the authors' code).
    Written out, because the compiler fuses these operations with their neighbours and
    differentiates them twice; nn.GroupNorm is opaque to both, and torch.var_mean is slow."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):                                                      # [B, C, H, W]
        x = x - x.mean((2, 3), keepdim=True)
        var = x.square().mean((2, 3), keepdim=True)                            # [B, C, 1, 1]
        scale = torch.rsqrt(var + self.eps) * self.weight[:, None, None]
        return x * scale + self.bias[:, None, None]

class ConvNet(nn.Module):
    """The student: blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then
    one linear layer to the teacher's dimension. Depth 3 for 32 pixels, 4 for 64 (section 5).
    features: [B, width * (size / 2^depth)^2], the flattened last block, for images of any size.
    forward:  [B, out_dim], the representation that is matched, for images of `image_size` pixels.
    """

    def __init__(self, out_dim, image_size=32, width=128, depth=None):
        super().__init__()
        depth = depth or (4 if image_size >= 64 else 3)
        side = image_size // 2**depth
        channels = [3] + [width] * depth
        convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, channels[1:])]
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(InstanceNorm(width) for _ in range(depth))
        self.head = nn.Linear(width * side * side, out_dim)

    def features(self, x):                                       # [B, 3, H, W], normalised
        x = x.contiguous(memory_format=torch.channels_last)      # faster, on CPUs as on GPUs
        for conv, norm in zip(self.convs, self.norms):
            x = F.avg_pool2d(F.relu(norm(conv(x))), 2)           # [B, width, H/2, W/2]
        return x.flatten(1)

    def forward(self, x):
        return self.head(self.features(x))

class ResNet(nn.Module):
    """ResNet for small images: the stem is one 3x3 convolution of stride 1, and max-pooling only
    where `max_pool` asks (the teacher of TinyImageNet). `blocks`: how many in each stage.
    features: [B, 8 * width * k^2], the last stage under 4x4 average pooling. k = 1 at 32 pixels:
              at width 64 the teacher's 512 numbers (A.1); k = 2 at 64 without max-pooling.
    forward:  a linear map of the features to `out_dim`; the features where that is None."""

    def __init__(self, blocks, out_dim=None, image_size=32, width=64, max_pool=False):
        super().__init__()
        if width < 8:     # github.com/uxlfoundation/oneDNN/issues/6035, on CPUs without AVX-512
            raise InputError(f"a ResNet of width {width}: below 8, oneDNN's gradient of its "
                             "shortcuts writes past its memory")
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if max_pool else nn.Identity()
        layers, channels = [], width
        for stage, count in enumerate(blocks):
            for i in range(count):
                out, stride = width * 2**stage, 2 if stage > 0 and i == 0 else 1
                layers.append(BasicBlock(channels, out, stride))
                if stride > 1:
                    layers[-1].downsample = nn.Sequential(
                        conv1x1(channels, out, stride), nn.BatchNorm2d(out))
                channels = out
        self.layers = nn.Sequential(*layers)
        k = max(1, image_size // (64 if max_pool else 32))
        self.feature_dim = channels * k**2
        self.head = nn.Linear(self.feature_dim, out_dim) if out_dim else nn.Identity()

    def features(self, x):                                       # [B, 3, H, W], normalised
        x = self.pool(F.relu(self.bn(self.conv(x))))
        x = self.layers(x)                                       # [B, 8 * width, H/8, W/8], or /16
        return F.adaptive_avg_pool2d(x, max(1, x.shape[-1] // 4)).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))

# Name: make(out_dim, image_size, width). One that is distilled with has no batch norm. Each has
# `features(x)`, the penultimate representation that is probed, `head` and `forward(x)`.
ENCODERS = {"convnet": ConvNet,
            "resnet10": functools.partial(ResNet, [1, 1, 1, 1]),
            "resnet18": functools.partial(ResNet, [2, 2, 2, 2])}

def encoder(name, out_dim, image_size):
    """A freshly built encoder of ENCODERS; `name` may end in a width, as in resnet18:16."""
    kind, _, width = name.partition(":")
    if kind not in ENCODERS or not (width or "1").isdecimal():
        raise InputError(f"unknown encoder {name!r}: choose from {', '.join(ENCODERS)}, with a "
                         "width if you like, as in resnet18:16")
    return ENCODERS[kind](out_dim, image_size, *([int(width)] if width else []))

# ---- Self-supervision: what the teacher learns by --------------------------------------------
def barlow_twins_loss(z1, z2, lambd):
    """Barlow Twins, Eq. 1: sum_i (1 - F_ii)^2 + lambda * sum_{i != j} F_ij^2.
    z1, z2: [B, d], projections of two views of the same B images. F is their [d, d]
    cross-correlation: each output is standardised over the batch first (Zbontar et al. 2021).
    lambd: weight of the off-diagonal terms; 1/128 on CIFAR, 1/1024 on TinyImageNet."""
    z1, z2 = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))
    corr = z1.T @ z2 / len(z1)                                           # F          [d, d]
    on_diagonal = (1 - corr.diagonal()).square().sum()
    off_diagonal = corr.square().sum() - corr.diagonal().square().sum()
    return on_diagonal + lambd * off_diagonal

def nt_xent_loss(z1, z2, temperature=0.5):
    """SimCLR's temperature-scaled cross-entropy (Chen et al. 2020), a mean over the 2B views.
    z1, z2: [B, d], projections of two views of the same B images. Each view's positive is the
    other view of its image; the remaining 2B - 2 views are its negatives."""
    z = F.normalize(torch.cat([z1, z2]))                                         # [2B, d]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, float("-inf"))
    positive = torch.arange(len(z), device=z.device).roll(len(z1))               # i <-> i + B
    return F.cross_entropy(similarity, positive)

def barlow_projector(d):
    """d -> d -> 1024, as in mix-bt, whose recipe the paper follows (A.1)."""
    return nn.Sequential(nn.Linear(d, d, bias=False), nn.BatchNorm1d(d), nn.ReLU(),
                         nn.Linear(d, 1024))

def simclr_projector(d):
    """d -> d -> 128, with batch norm after both layers (A.1)."""
    return nn.Sequential(nn.Linear(d, d), nn.BatchNorm1d(d), nn.ReLU(),
                         nn.Linear(d, 128), nn.BatchNorm1d(128))

def warmup_cosine(step, steps, per_epoch, peak):
    """Rate at `step`: linear for 10 epochs (10% of short runs), then cosine to peak / 1000."""
    warmup, floor = min(10 * per_epoch, max(1, steps // 10)), 1e-3 * peak
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

# Name of --ssl: the loss of two views' projections under the settings s, the head, the schedule.
SSL = {
    "barlow": (lambda z1, z2, s: barlow_twins_loss(z1, z2, s.lambd),
               barlow_projector, warmup_cosine),
    "simclr": (lambda z1, z2, s: nt_xent_loss(z1, z2, s.temperature),
               simclr_projector, lambda step, steps, per_epoch, peak: peak),
}

# ---- What a student f minimises: the mean of these over images (and dimensions) --------------
def mse(f, x, y):
    """L_MSE of Eq. 7 before its mean: [B, d] for images x and the teacher's representations y."""
    return (f(x) - y).square()

def cross_entropy(f, x, y):
    """[B] for labels y: MTT (Cazenavette et al. 2022)."""
    return F.cross_entropy(f(x), y, reduction="none")

def simclr(f, x, y):
    """SimCLR's loss of two views, y being two augmentations as functions: MTT-SSL (app. F)."""
    return nt_xent_loss(*(f(augment(x)) for augment in y))

# Name of --objective: the loss, and what y is.
OBJECTIVES = {"mse": (mse, "representations"), "ce": (cross_entropy, "labels"),
              "ssl": (simclr, "views")}

# ---- A network as a function of one flat vector ----------------------------------------------
def flat_parameters(model):
    """All parameters of `model` copied into one vector theta [P], in their own order."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def functional(model):
    """The function f(theta, x) = model(x) with parameters theta [P]: what Eq. 8 differentiates.
    `model` lends its architecture only. Raises InputError if it has batch norm, whose running
    statistics are not in theta: a trajectory of theta would not say what the network is."""
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise InputError("a network with batch norm is no function of its parameters alone, so "
                         "it cannot be distilled with: use InstanceNorm")
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()))
    sizes = [shape.numel() for shape in shapes]

    def f(theta, x):
        parameters = {n: v.view(s) for n, v, s in zip(names, theta.split(sizes), shapes)}
        return torch.func.functional_call(model, parameters, (x,))

    return f

# ---- The training loop -----------------------------------------------------------------------
def batches(n, batch_size, epochs, seed, name, device="cpu", drop_last=False):
    """(step, indices on `device`) of the mini-batches of `epochs` random passes over n images."""
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(n, generator=stream(seed, name, epoch)).to(device)
        for batch in order.split(batch_size):
            if len(batch) == batch_size or not drop_last:
                yield step, batch
                step += 1

def train(loss, optimizer, order, rate=None):
    """One step of `optimizer` on loss(batch, step) for each (step, batch) of `order`.
    rate(step): the learning rate, if it changes. Yields (steps done, {"loss": ...})."""
    for step, batch in order:
        if rate:
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
        optimizer.zero_grad()
        value = loss(batch, step)
        value.backward()
        optimizer.step()
        yield step + 1, {"loss": value.detach()}

def exhaust(loop):
    """Runs a loop to its end."""
    for _ in loop:
        pass

@torch.no_grad()
def encode(f, images, prepare=lambda images: images, chunk=250):
    """f(prepare(images)) in chunks: [n, 3, H, W] -> float32 [n, d]."""
    return torch.cat([f(prepare(part)).float() for part in images.split(chunk)])

def compiled(f, on=True, count=1):
    """f, compiled by torch for the first `count` shapes of its arguments; f itself for others (an
    epoch's short last batch), and for all if there is no compiler that works."""
    fast, known = torch.compile(f, fullgraph=True, dynamic=False) if on else f, []

    def call(*args):
        nonlocal fast
        shapes = [a.shape for a in args if torch.is_tensor(a)]
        if shapes not in known and len(known) < count:
            known.append(shapes)
        if shapes in known and fast is not f:
            try:
                return fast(*args)
            except Exception as error:
                print(f"not compiled ({first_line(error)}): going on without", flush=True)
                fast = f
        return f(*args)
    return call

def first_line(error):
    """The first line of an exception's message, or its type where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

# ---- Devices and processes: alone, or one of the ranks that torchrun starts ------------------
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

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
        torch.backends.cudnn.benchmark = True                  # shapes are few
    else:
        keep_freed_memory()
    if RANKS > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=datetime.timedelta(days=7))      # while rank 0 works
    return device

def keep_freed_memory():
    """Has glibc keep freed blocks for the next step. By itself it gives large ones back to the
    kernel, which clears their pages anew: much of a step's time on a CPU."""
    with contextlib.suppress(AttributeError, TypeError):           # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)                                     # M_TRIM_THRESHOLD: do not trim
        mallopt(-4, 0)                                             # M_MMAP_MAX: no separate blocks

@contextlib.contextmanager
def command_line(script):
    """What a user can put right ends the program with one line and exit code 2. Rank 0 prints."""
    try:
        with contextlib.redirect_stdout(None if RANK else sys.stdout):
            yield
    except InputError as error:
        print(f"{script}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; the same command goes on")

def barrier():
    """Returns when every rank has come here."""
    if RANKS > 1:
        dist.barrier()

@contextlib.contextmanager
def rank_0_first():
    """Rank 0 does what is below first (it downloads), then the others (they find it there)."""
    if RANK:
        barrier()
    yield
    if not RANK:
        barrier()

def sum_over_ranks(tensors):
    """Replaces each of `tensors` by its sum over the ranks."""
    for tensor in tensors if RANKS > 1 else ():
        dist.all_reduce(tensor)

def rows_of_all_ranks(z):
    """The rows z [b, d] of every rank, [RANKS * b, d]; gradients flow to this rank's own only.
    A loss of them all has on each rank the gradient of its share: the sum over ranks is whole."""
    if RANKS == 1:
        return z
    rows = [torch.empty_like(z) for _ in range(RANKS)]
    dist.all_gather(rows, z.detach().contiguous())
    rows[RANK] = z
    return torch.cat(rows)
