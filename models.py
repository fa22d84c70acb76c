"""Networks and losses of MKDT (Joshi, Ni & Mirzasoleiman, ICLR 2025). To try an idea, write a
function or a class and add it to the dict of its kind: ENCODERS, SSL or OBJECTIVES."""
import hashlib
import json
import math
import re
from argparse import Namespace
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, resnet

from data import Dataset, InputError, Log, draw_augmentations, first_line, load, two_views

# ---- Random numbers: every draw has a name ----------------------------------------------------
def stream(seed, *name):
    """A torch.Generator for the draw called `name`, e.g. stream(0, "expert order", epoch). All
    random numbers of training come from these, so nothing depends on what was drawn before: expert
    i is the same whether 5 or 100 are trained, an interrupted run needs no generator's state."""
    digest = hashlib.sha256(repr((int(seed),) + name).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

def build(make, seed, *name):
    """make() with its initial weights drawn from the stream called `name`, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, *name).initial_seed())
        return make()

# ---- Encoders ---------------------------------------------------------------------------------
class InstanceNorm(nn.GroupNorm):
    """Instance norm with affine parameters, as in the authors' code. `forward` is written out: the
    compiler can neither fuse GroupNorm's nor differentiate it twice, and torch.var_mean is slow."""

    def __init__(self, channels):
        super().__init__(channels, channels)

    def forward(self, x):                                                  # [B, C, H, W]
        x = x - x.mean((2, 3), keepdim=True)
        var = x.square().mean((2, 3), keepdim=True)                        # [B, C, 1, 1]
        scale = torch.rsqrt(var + self.eps) * self.weight[:, None, None]
        return x * scale + self.bias[:, None, None]

class ConvNet(nn.Module):
    """The student: blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then
    one linear layer to the teacher's dimension. Depth 3 for 32 pixels, 4 for 64 (section 5).
    features: [B, channels * (size / 2^depth)^2], the flattened last block, for any image size.
    forward:  [B, out_dim], the representation that is matched, for images of `image_size`."""

    def __init__(self, out_dim, image_size=32, width=128, channels=None, norm=InstanceNorm):
        super().__init__()
        channels = channels or [width] * (4 if image_size >= 64 else 3)
        self.convs = nn.ModuleList()
        for before, after in zip([3] + channels, channels):
            self.convs.append(nn.Conv2d(before, after, 3, padding=1))
        self.norms = nn.ModuleList(map(norm, channels))
        side = image_size // 2 ** len(channels)
        self.head = nn.Linear(channels[-1] * side**2, out_dim)

    def features(self, x):                                                 # normalised
        x = x.contiguous(memory_format=torch.channels_last)    # faster, on CPUs as on GPUs
        for conv, norm in zip(self.convs, self.norms):
            x = F.avg_pool2d(F.relu(norm(conv(x))), 2)         # [B, C, H, W] -> [B, C', H/2, W/2]
        return x.flatten(1)

    def forward(self, x):
        return self.head(self.features(x))

def convnet_bn(out_dim, image_size=32, width=128):
    """KRR-ST's network (Lee et al. 2023): batch norm, 128-256-512; at 64 pixels 64-128-256-512."""
    channels = [width, 2 * width, 4 * width]
    if image_size >= 64:
        channels.insert(0, max(1, width // 2))
    return ConvNet(out_dim, image_size, channels=channels, norm=nn.BatchNorm2d)

class ResNet(nn.Module):
    """ResNet for small images: a stem of one 3x3 convolution of stride 1, with max-pooling if asked
    for (TinyImageNet), blocks[i] blocks in stage i, and a linear map to `out_dim` if there is one.
    features: [B, 8 * width * k^2], the last stage under 4x4 average pooling; k = 1 at 32 pixels
    (512 numbers at width 64, as in A.1), 2 at 64 pixels without max-pooling."""

    def __init__(self, blocks, out_dim=None, image_size=32, width=64, max_pool=False):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if max_pool else nn.Identity()
        self.layers = nn.Sequential()
        for stage, count in enumerate(blocks):
            if stage > 0:
                block = resnet.BasicBlock(width, 2 * width, stride=2)
                # Picking every second pixel with a pooling window of one equals a convolution of
                # stride 2, whose gradient writes past its memory in oneDNN (its issue 6035).
                block.downsample = nn.Sequential(
                    nn.AvgPool2d(1, 2), resnet.conv1x1(width, 2 * width), nn.BatchNorm2d(2 * width))
                self.layers.append(block)
                width *= 2
                count -= 1
            for _ in range(count):
                self.layers.append(resnet.BasicBlock(width, width))
        side = math.ceil(image_size / 2 ** (len(blocks) - 1 + max_pool))
        self.feature_dim = width * max(1, side // 4) ** 2
        self.head = nn.Linear(self.feature_dim, out_dim) if out_dim else nn.Identity()

    def features(self, x):                                                 # normalised
        x = self.layers(self.pool(F.relu(self.bn(self.conv(x)))))          # [B, 8 * width, h, w]
        return F.adaptive_avg_pool2d(x, max(1, x.shape[-1] // 4)).flatten(1)

    def forward(self, x):
        return self.head(self.features(x))

def torchvision_net(name, out_dim, image_size):
    """torchvision's network `name`: its last linear layer is the head, the input of that layer the
    features. Raises InputError if it cannot take images of that size."""
    try:
        body = get_model(name, num_classes=out_dim)
        linear = [key for key, layer in body.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise ValueError("it has no linear layer")
        net = nn.Sequential(OrderedDict(features=body, head=body.get_submodule(linear[-1])))
        body.set_submodule(linear[-1], nn.Identity())
        net.eval()(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:             # each network has its own reasons
        reason = f"torchvision:{name} cannot take {image_size} pixels ({first_line(error)})"
        raise InputError(reason) from error
    return net.train()

# Name: make(out_dim, image_size, width) -> a module with `features`, which are probed, and `head`.
ENCODERS = {
    "convnet": ConvNet,
    "convnet_bn": convnet_bn,
    "resnet10": partial(ResNet, [1, 1, 1, 1]),
    "resnet18": partial(ResNet, [2, 2, 2, 2]),
}

def encoder(name, out_dim, image_size):
    """A freshly built encoder: a name of ENCODERS, which may end in a width, as in resnet18:16, or
    one of torchvision's, as in torchvision:vgg11_bn. Raises InputError for any other name."""
    kind, _, argument = name.partition(":")
    if kind == "torchvision" and argument:
        return torchvision_net(argument, out_dim, image_size)
    if kind not in ENCODERS or not re.fullmatch(r"|[1-9]\d*", argument):
        raise InputError(f"unknown encoder {name!r}: choose from {', '.join(ENCODERS)}, with a "
                         "width if you like, as in resnet18:16, or give torchvision:NAME")
    if argument:
        return ENCODERS[kind](out_dim, image_size, int(argument))
    return ENCODERS[kind](out_dim, image_size)

def student_name(s):
    return f"{s.student}:{s.width}"

def teacher_network(s, image_size):
    """The ResNet-18 of the settings: images to representations [B, feature_dim]."""
    f_T = ENCODERS["resnet18"](None, image_size, s.teacher_width, s.max_pool)
    if s.standardize:
        f_T.head = nn.BatchNorm1d(f_T.feature_dim, affine=False)
    return f_T

# ---- Self-supervision: what the teacher learns by ---------------------------------------------
def barlow_twins_loss(z1, z2, lambd):
    """Barlow Twins, Eq. 1: sum_i (1 - F_ii)^2 + lambda * sum_{i != j} F_ij^2. F is the [d, d]
    cross-correlation of z1, z2 [B, d], projections of two views of the same B images, standardised
    over the batch first (Zbontar et al. 2021). lambd: 1/128 on CIFAR, 1/1024 on TinyImageNet."""
    z1 = F.batch_norm(z1, None, None, training=True)
    z2 = F.batch_norm(z2, None, None, training=True)
    corr = z1.T @ z2 / len(z1)                                             # F          [d, d]
    on_diagonal = (1 - corr.diagonal()).square().sum()
    off_diagonal = corr.square().sum() - corr.diagonal().square().sum()
    return on_diagonal + lambd * off_diagonal

def nt_xent_loss(z1, z2, temperature=0.5):
    """SimCLR's temperature-scaled cross-entropy (Chen et al. 2020), a mean over the 2B views.
    z1, z2: [B, d], two views of B images. Each view's positive is the other one."""
    z = F.normalize(torch.cat([z1, z2]))                                   # [2B, d]
    similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)         # not with itself
    positive = torch.arange(len(z), device=z.device).roll(len(z1))         # i <-> i + B
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
    """The learning rate: linear for 10 epochs, at most 10% of the steps; then a cosine to 0.1%."""
    warmup = min(10 * per_epoch, max(1, steps // 10))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    floor = 1e-3 * peak
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))

class SSLMethod(NamedTuple):
    loss: Callable                         # (z1, z2, settings) -> a number
    projector: Callable                    # the encoder's dimension -> the head that makes z
    schedule: Callable                     # (step, steps, steps an epoch, peak) -> learning rate

SSL = {                                    # the names of --ssl
    "barlow": SSLMethod(lambda z1, z2, s: barlow_twins_loss(z1, z2, s.lambd),
                        barlow_projector, warmup_cosine),
    "simclr": SSLMethod(lambda z1, z2, s: nt_xent_loss(z1, z2, s.temperature),
                        simclr_projector, lambda step, steps, per_epoch, peak: peak),
}

def two_projections(network, images, data, s, draw):
    """A network's outputs for two views x1, x2 ~ A(x) of uint8 images, drawn from stream(*draw):
    z1, z2 of Eq. 1, each [B, d]. Both go through it as one batch: batch norm sees them together."""
    views = two_views(images, stream(*draw).initial_seed(), (s.crop_scale, 1.0), s.grey)
    x = data.normalize(torch.cat(views))                                   # [2B, 3, H, W]
    return network(x.contiguous(memory_format=torch.channels_last)).float().chunk(2)

# ---- What a student minimises -----------------------------------------------------------------
class Objective(NamedTuple):
    """What a student f minimises on images x and what belongs to them, y. target: what y is: the
    teacher's "representations", "labels", or two "views", which are functions of x. loss: (f(x), y)
    -> the loss of each image or dimension; for "views", (f(x1), f(x2)) -> the mean."""
    loss: Callable
    target: str

OBJECTIVES = {                             # the names of --objective
    "mse": Objective(partial(F.mse_loss, reduction="none"), "representations"),     # Eq. 5 and 7
    "ce": Objective(partial(F.cross_entropy, reduction="none"), "labels"),          # MTT
    "ssl": Objective(nt_xent_loss, "views"),                               # MTT-SSL (appendix F)
}

def mean_loss(objective, f, x, y):
    """The mean loss of a network f on a batch of images x and y, see Objective."""
    if objective.target == "views":
        first, second = y
        return objective.loss(f(first(x)), f(second(x)))
    return objective.loss(f(x), y).mean()

def augmentations_of_normalized(data, s, n, draw):
    """Two augmentations of n normalised images, drawn from stream(*draw); n = 1: of all alike."""
    pair = draw_augmentations(n, data.image_size, stream(*draw).initial_seed(),
                              data.train_images.device, (s.crop_scale, 1.0), s.grey)
    return [lambda x, view=view: data.normalize(view(data.denormalize(x))) for view in pair]

class Examples(NamedTuple):
    """What a student trains on: examples(batch, draw) is (x, y) of `Objective` for the images
    `batch`. images: [n, 3, H, W], uint8 or normalised. targets: the teacher's representations
    [n, d], labels [n], or [n, 0] for two views, drawn from stream(*draw)."""
    images: torch.Tensor
    targets: torch.Tensor
    data: Dataset
    s: Namespace

    def __call__(self, batch, draw):
        x = self.images[batch]
        if x.dtype == torch.uint8:
            x = self.data.normalize(x)
        return x, self.y(batch, draw)

    def y(self, batch, draw):
        if self.targets.numel() == 0:
            return augmentations_of_normalized(self.data, self.s, len(batch), draw)
        return self.targets[batch]

# ---- A network as a function of one flat vector -----------------------------------------------
def flat_parameters(model):
    """All parameters of `model` copied into one vector theta [P], in their own order."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def functional(model):
    """The function f(theta, x): model(x) with parameters theta [P], which Eq. 8 differentiates.
    Raises InputError if `model` has dropout, or batch norm, whose statistics are not in theta."""
    for layer in model.modules():
        if isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            raise InputError("a student cannot have batch norm or dropout: use InstanceNorm")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def f(theta, x):
        parts = theta.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shapes[name]) for name, part in zip(shapes, parts)}
        return torch.func.functional_call(model, parameters, (x,))

    return f

# ---- Tools of the training loops --------------------------------------------------------------
def batches(n, batch_size, epochs, seed, name, device="cpu", drop_last=False, first=0):
    """Yields (step, indices) of `epochs` random passes over n images, from step `first` on."""
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(n, generator=stream(seed, name, epoch)).to(device)
        for batch in order.split(batch_size):
            if len(batch) < batch_size and drop_last:
                continue
            if step >= first:
                yield step, batch
            step += 1

def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr

@torch.no_grad()
def encode(f, images, prepare=nn.Identity(), chunk=250):
    """f(prepare(images)) in chunks: [n, 3, H, W] -> float32 [n, d]."""
    return torch.cat([f(prepare(part)).float() for part in images.split(chunk)])

class Compiled:
    """f, compiled by torch for the first `max_shapes` shapes of its arguments. Others, such as an
    epoch's short last batch, run as they are, and everything does if no compiler works."""

    def __init__(self, f, max_shapes=1):
        self.f = f
        self.fast = torch.compile(f, fullgraph=True, dynamic=False)
        self.shapes = set()
        self.max_shapes = max_shapes

    def __call__(self, *arguments):
        shapes = tuple(a.shape for a in arguments if torch.is_tensor(a))
        if len(self.shapes) < self.max_shapes:
            self.shapes.add(shapes)
        if shapes in self.shapes:
            try:
                return self.fast(*arguments)
            except torch._dynamo.exc.TorchDynamoException as error:
                print(f"torch.compile failed ({first_line(error)}): going on without", flush=True)
                self.fast = self.f
        return self.f(*arguments)

# ---- A run ------------------------------------------------------------------------------------
@dataclass
class Run:
    """A run: its settings, its data and where its files lie. run_dir holds what all distilled sets
    of a data set share, the teacher and the experts; set_dir, below it, one distilled set."""
    s: Namespace
    data: Dataset
    run_dir: Path
    set_dir: Path
    log: Log

    @property
    def objective(self):
        return OBJECTIVES[self.s.objective]

    @cached_property
    def targets(self):
        """What students match: Z_T [n, d], the labels [n], or [n, 0] for views; on the device."""
        if self.objective.target == "representations":
            return load(self.run_dir / "representations.pt").to(self.s.device)
        if self.objective.target == "labels":
            return self.data.train_labels
        return torch.zeros(len(self.data.train_images), 0, device=self.s.device)

    @property
    def out_dim(self):
        """The dimension of a student's output: of its targets, or 128 (A.1) for views."""
        if self.targets.dim() == 1:
            return self.data.classes
        return self.targets.shape[1] or 128

    @property
    def can_compile(self):
        """Whether to compile: never views, which change; narrow students on a CPU only if asked."""
        pays = self.s.device.type == "cuda" or self.s.width >= 32
        wanted = pays if self.s.compile is None else self.s.compile
        return wanted and self.objective.target != "views"

    def student(self):
        """A student of the settings, on the device; its weights are arbitrary."""
        return encoder(student_name(self.s), self.out_dim, self.data.image_size).to(self.s.device)

    def expert_file(self, i):
        return self.run_dir / "experts" / f"expert_{i:03d}.pt"

def read_config(path):
    """The contents of a config.json, {section: entry}; {} if there is none."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({first_line(error)}): restore it, or delete "
                         "it and the results beside it") from error
