"""Networks and losses of MKDT (Joshi, Ni & Mirzasoleiman, ICLR 2025), as plain functions of tensors, and what every
stage stands on: named random numbers, compilation, devices and processes.

    ConvNet                 the student of section 5: what experts, the distilled set and evaluation train
    ResNet, resnet10/18     the teacher, and the larger encoders of Table 5
    projector               the heads of the two self-supervised losses (appendix A.1)
    barlow_twins_loss       Eq. 1
    nt_xent_loss            SimCLR's loss (Chen et al. 2020), for Table 6
    objective               what a student minimises: Eq. 5, cross-entropy, or SimCLR's loss (Fig. 1)
    functional, flat_parameters   a network as a function of one flat parameter vector theta
    join_ranks, average_over_ranks, ...   several processes, as torchrun starts them

Every encoder has `features(x)`, the penultimate representation that is probed, and `forward(x)`, its output.
"""
import datetime
import hashlib
import os
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """Something a user can put right: a file, a flag, a value. Its message is one line and says how."""

    def __init__(self, message):
        super().__init__(" ".join(message.split()))                        # a damaged file's parts may have any name


# ------------------------------------------------------------------------------------------------------------
# Random numbers: each draw has a name
# ------------------------------------------------------------------------------------------------------------
def stream(seed, *name):
    """A 63-bit seed for the draw called `name` (words and numbers), e.g. stream(0, "expert", 3, "order", epoch).

    Every random number of the project comes from a generator seeded so. Nothing then depends on what was drawn
    before, expert i is the same whether 5 or 100 are trained, and an interrupted run needs no generator state.
    """
    digest = hashlib.sha256(repr((int(seed), *name)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed, *name, device="cpu"):
    """A torch.Generator on `device` for the draw called `name`; see `stream`."""
    return torch.Generator(device=device).manual_seed(stream(seed, *name))


def build(make, seed, *name):
    """make() with its initial weights drawn, on the CPU, from the stream called `name`; torch's own generator of the
    CPU is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, *name))
        return make()


# ------------------------------------------------------------------------------------------------------------
# Encoders
# ------------------------------------------------------------------------------------------------------------
class InstanceNorm(nn.Module):
    """Instance norm with affine parameters, GroupNorm with one channel a group (Ulyanov et al. 2016).

    Written out in elementary operations because the compiler fuses those with their neighbours and
    differentiates them twice; nn.GroupNorm is opaque to both.
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x):                                                      # [B, C, H, W]
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)  # [B, C, 1, 1]
        scale = torch.rsqrt(var + self.eps) * self.weight[:, None, None]
        return (x - mean) * scale + self.bias[:, None, None]


class ConvNet(nn.Module):
    """The student: `depth` blocks of 3x3 convolution, instance norm, ReLU and 2x2 average pooling, then one linear
    layer to the teacher's dimension (section 5; depth 3 for 32-pixel images, 4 for 64).

    features: [B, width * (size / 2^depth)^2], the flattened last block, for images of any size.
    forward:  [B, out_dim], the representation that is matched by MSE, for images of `image_size` pixels.
    """

    def __init__(self, out_dim, image_size=32, width=128, depth=None):
        super().__init__()
        depth = depth or convnet_depth(image_size)
        side = image_size // 2**depth
        if side < 1:
            raise InputError(f"{image_size}-pixel images are too small for {depth} poolings of 2x2")
        channels = [3] + [width] * depth
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(channels, channels[1:]))
        self.norms = nn.ModuleList(InstanceNorm(width) for _ in range(depth))
        self.head = nn.Linear(width * side * side, out_dim)

    def features(self, x):                                       # [B, 3, H, W], normalised
        x = x.contiguous(memory_format=torch.channels_last)       # faster for convolutions, on CPUs as on GPUs
        for conv, norm in zip(self.convs, self.norms):
            x = F.avg_pool2d(F.relu(norm(conv(x))), 2)           # [B, width, H/2, W/2]
        return x.flatten(1)

    def forward(self, x):
        return self.head(self.features(x))


def convnet_depth(image_size):
    """Depth of the ConvNet for images of `image_size` pixels: 3 at 32 and 4 at 64 (section 5)."""
    return 4 if image_size >= 64 else 3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut (He et al. 2016)."""

    def __init__(self, in_channels, channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False),
                                          nn.BatchNorm2d(channels))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with the CIFAR stem: 3x3 convolution of stride 1; max-pooling only where `max_pool` asks (TinyImageNet).

    features: [B, 8 * width], the pooled last stage (512 at width 64: the teacher's representation, appendix A.1).
    forward:  the features, or a linear map of them to `out_dim` (when the ResNet is itself a student, Table 5).
    """

    def __init__(self, blocks, out_dim=None, width=64, max_pool=False):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, padding=1) if max_pool else nn.Identity()
        layers, channels = [], width
        for stage, count in enumerate(blocks):
            for i in range(count):
                layers.append(BasicBlock(channels, width * 2**stage, stride=2 if stage > 0 and i == 0 else 1))
                channels = width * 2**stage
        self.layers = nn.Sequential(*layers)
        self.feature_dim = channels
        self.head = nn.Linear(channels, out_dim) if out_dim else nn.Identity()

    def features(self, x):                                          # [B, 3, H, W], normalised
        x = self.pool(F.relu(self.bn(self.conv(x))))
        return self.layers(x).mean(dim=(2, 3))                      # [B, 8 * width]

    def forward(self, x):
        return self.head(self.features(x))


def resnet10(out_dim=None, width=64, max_pool=False):
    """ResNet-10: one block a stage (Table 5)."""
    return ResNet([1, 1, 1, 1], out_dim, width, max_pool)


def resnet18(out_dim=None, width=64, max_pool=False):
    """ResNet-18: two blocks a stage (the teacher; Table 5)."""
    return ResNet([2, 2, 2, 2], out_dim, width, max_pool)


def projector(ssl, dim):
    """The head between a teacher's `dim`-wide features and its self-supervised loss (appendix A.1).

    ssl: "barlow": dim -> dim -> 1024, as in mix-bt, which the paper follows; "simclr": dim -> dim -> 128.
    """
    if ssl == "barlow":
        return nn.Sequential(nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(), nn.Linear(dim, 1024))
    if ssl == "simclr":
        return nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim), nn.ReLU(),
                             nn.Linear(dim, 128), nn.BatchNorm1d(128))
    raise InputError(f"unknown self-supervised loss {ssl!r}: choose barlow or simclr")


# ------------------------------------------------------------------------------------------------------------
# Self-supervised losses
# ------------------------------------------------------------------------------------------------------------
def barlow_twins_loss(z1, z2, lambd):
    """Barlow Twins, Eq. 1: sum_i (1 - F_ii)^2 + lambda * sum_{i != j} F_ij^2.

    z1, z2: [B, d], projections of two views of the same B images. F is their [d, d] cross-correlation: each output
    is standardised over the batch first (Zbontar et al. 2021), so that F_ij lies in [-1, 1].
    lambd: weight of the off-diagonal terms; 1/128 on CIFAR, 1/1024 on TinyImageNet.
    """
    z1, z2 = (F.batch_norm(z, None, None, training=True) for z in (z1, z2))    # mean 0, variance 1 per dimension
    corr = z1.T @ z2 / len(z1)                                                 # F                 [d, d]
    on_diagonal = (1 - corr.diagonal()).square().sum()
    off_diagonal = corr.square().sum() - corr.diagonal().square().sum()
    return on_diagonal + lambd * off_diagonal


def nt_xent_loss(z1, z2, temperature=0.5):
    """SimCLR's normalised temperature-scaled cross-entropy (Chen et al. 2020, Eq. 1), averaged over the 2B views.

    z1, z2: [B, d], projections of two views of the same B images. Each view's positive is the other view of its
    image; the remaining 2B - 2 views are its negatives.
    """
    z = F.normalize(torch.cat([z1, z2]))                                       # [2B, d]
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    similarity = (z @ z.T / temperature).masked_fill(itself, float("-inf"))    # a view is no negative of itself
    positive = torch.arange(len(z), device=z.device).roll(len(z1))             # i <-> i + B
    return F.cross_entropy(similarity, positive)


def self_supervised_loss(z1, z2, ssl, lambd, temperature):
    """`barlow_twins_loss` or, for ssl "simclr", `nt_xent_loss`, in float32: L_SSL of Eq. 6."""
    z1, z2 = z1.float(), z2.float()
    return barlow_twins_loss(z1, z2, lambd) if ssl == "barlow" else nt_xent_loss(z1, z2, temperature)


def objective(f, x, y):
    """What a student f minimises on a batch x [B, 3, H, W] of normalised images; y says which.

    The teacher's representations, float [B, d]: their mean squared error over batch and dimensions, L_KD of Eq. 5.
    Labels, int64 [B]: cross-entropy, what MTT (Cazenavette et al. 2022) matches the trajectories of.
    Two augmentations, functions of x: SimCLR's loss (temperature 0.5) of the two views, MTT-SSL's (appendix F).
    """
    if isinstance(y, tuple):
        return nt_xent_loss(*(f(augment(x)) for augment in y))
    return F.mse_loss(f(x), y) if y.is_floating_point() else F.cross_entropy(f(x), y)


def batches(n, batch_size, epochs, seed, name, device):
    """(epoch, indices) of the mini-batches of `epochs` passes over n images, the short last batch of each kept."""
    for epoch in range(epochs):
        order = to_device(torch.randperm(n, generator=generator(seed, name, epoch)), device)
        for batch in order.split(batch_size):
            yield epoch, batch


def targets_of(targets, batch, draw):
    """y of `objective` for the images `batch`: the rows of a tensor, representations [n, d] or labels [n]; or
    targets(len(batch), draw), the augmentations that the seed `draw` stands for."""
    return targets(len(batch), draw) if callable(targets) else targets[batch]


# ------------------------------------------------------------------------------------------------------------
# A network as a function of one flat vector
# ------------------------------------------------------------------------------------------------------------
def flat_parameters(model):
    """All parameters of `model` copied into one vector theta [P], in the order of model.parameters()."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def activation_bytes(model, x):
    """Bytes (float32) of what the convolutions and linear layers of `model` put out for the images x [B, 3, H, W]: a
    gradient keeps at least these, compiled or not."""
    sizes, layers = [], [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [m.register_forward_hook(lambda m, x, out: sizes.append(4 * out.numel())) for m in layers]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(sizes)


def functional(model):
    """The function f(theta, x) = model(x) with parameters theta [P]: what Eq. 8 differentiates.

    Pure and without in-place operations, so that it can be differentiated twice and compiled. `model` lends only
    its architecture; it must have no buffers that training changes (no batch norm).
    """
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()))
    sizes = [shape.numel() for shape in shapes]

    def f(theta, x):
        parameters = {n: v.view(s) for n, v, s in zip(names, theta.split(sizes), shapes)}
        return torch.func.functional_call(model, parameters, (x,))

    return f


# ------------------------------------------------------------------------------------------------------------
# Compilation
# ------------------------------------------------------------------------------------------------------------
def seconds_a_call(f, example, backward=False):
    """Seconds that f(*example) takes, with the backward pass of its (summed) result where `backward` says so."""
    began = time.monotonic()
    result = f(*example)
    if backward:
        result.float().sum().backward()
    if example[0].is_cuda:
        torch.cuda.synchronize(example[0].device)
    return time.monotonic() - began


def compiled_step(f, replay=False):
    """f by torch.compile: whole, and once for each shape of its arguments.

    replay: on a GPU the kernels of a call are recorded too and launched together from then on (CUDA graphs). Each
    replay writes its results where the last one did, so they are copied.
    """
    if not replay:
        return torch.compile(f, fullgraph=True, dynamic=False)
    replayed = torch.compile(f, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def copied(*args):
        results = replayed(*args)
        return tuple(x.clone() for x in results) if isinstance(results, tuple) else results.clone()
    return copied


def agree(results, expected):
    """Whether two results of a function, tensors or tuples of them, can be the same but for rounding: within 20% in
    norm. TF32, which a GPU may take for one and not for the other, moves the gradient of a gradient by several percent.
    """
    pairs = zip(results, expected) if isinstance(expected, tuple) else [(results, expected)]
    return all((a - b).norm() <= 0.2 * b.norm() for a, b in pairs)


def compile_if_it_pays(f, example, steps, mode, backward=False, compile_seconds=12):
    """f or its compiled version, whether it is compiled, and seconds a call.

    example: arguments to try f on, a tensor the first, no tensor twice (the compiler would take that for a rule).
    mode: "on", "off", or "auto": compiled if `steps` calls, as they are, take more than three times the
    `compile_seconds`; about half of that time is what compiling saves. backward: the backward pass of f's result
    belongs to the call. If it does not, a GPU replays f, and what is compiled has to agree with f on other arguments
    than it was compiled with. Where nothing works (no C++ compiler, no Triton, ...), says so and returns f.
    """
    seconds_a_call(f, example, backward)
    seconds = from_rank_0(seconds_a_call(f, example, backward))
    if mode == "off" or (mode == "auto" and seconds * steps <= 3 * compile_seconds):
        return f, False, seconds
    other = tuple(x.flip(0) if torch.is_tensor(x) else x for x in example)       # other numbers in another place
    expected = None if backward else f(*other)
    for replay in [True, False] if example[0].is_cuda and not backward else [False]:
        try:
            fast = compiled_step(f, replay)
            for _ in range(1 + replay):                                # compiles; then records what is to be replayed
                seconds_a_call(fast, example, backward)
            if not backward and not agree(fast(*other), expected):
                raise RuntimeError("its results are others than without")
            return fast, True, seconds_a_call(fast, example, backward)
        except Exception as error:
            reason = " ".join(str(error).splitlines()[:2])             # the first line often names the backend alone
            print(f"{'replaying' if replay else 'compiling'} failed ({reason}): going on without", flush=True)
    return f, False, seconds


# ------------------------------------------------------------------------------------------------------------
# Devices and processes: alone, or as one of the ranks that torchrun starts
# ------------------------------------------------------------------------------------------------------------
def pick_device(name, deterministic=False):
    """The torch.device called `name`; "auto" is the GPU if there is one. Raises InputError if it cannot be used.

    deterministic: from here on torch computes the same sums in the same order in every run, which costs time on a GPU;
    an operation that it cannot do so is named by a warning. (On a CPU it always does.)
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")           # cuBLAS asks for it, before it starts
        torch.use_deterministic_algorithms(True, warn_only=True)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":                                                         # torchrun: a GPU for each process
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    elif name.startswith("cuda:") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        raise InputError(f"--device {name} is one GPU for all processes of torchrun: give --device cuda")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.backends.cudnn.allow_tf32 = True                # convolutions alone; README, "Precision", has why
            torch.backends.cudnn.benchmark = not deterministic    # shapes are few: the fastest algorithm for each
        torch.ones(1, device=device).item()
    except Exception as error:
        raise InputError(f"--device {name} cannot be used here ({first_line(error)}): try auto or cpu") from error
    return device


def to_device(x, device):
    """The tensor x on `device`. The host does not wait: a GPU fetches it from pinned (page-locked) memory."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def join_ranks(device):
    """`device`. If torchrun started this process, it also joins the others: by nccl on GPUs, by gloo on CPUs."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # Ranks wait for rank 0 while it works alone; torchrun itself ends them all when one of them fails.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=7),
                                device_id=device if device.type == "cuda" else None)
    return device


def leave_ranks():
    """The end of the work that `join_ranks` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The number of this process, 0 if it is alone. Rank 0 writes the files that are shared, and the log."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_ranks():
    """Returns when every rank has come here."""
    if ranks() > 1:
        dist.barrier()


@contextmanager
def rank_0_first():
    """What is done below is done by rank 0 first (it downloads, writes), then by the others (they find it there)."""
    if rank():
        wait_for_ranks()
    yield
    if not rank():
        wait_for_ranks()


def from_rank_0(value):
    """Rank 0's `value`, any picklable object, on every rank."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_from_ranks(value):
    """[value of rank 0, value of rank 1, ...] on every rank."""
    values = [value]
    if ranks() > 1:
        values = [None] * ranks()
        dist.all_gather_object(values, value)
    return values


def average_over_ranks(tensor):
    """The mean of `tensor` over the ranks, on every rank."""
    if ranks() > 1:
        dist.all_reduce(tensor)
        tensor /= ranks()
    return tensor


def rows_of_all_ranks(z):
    """The rows z [b, d] of every rank, [ranks * b, d]; the gradient flows to this rank's own rows only.

    A loss of them all has on each rank the gradient of its own share; the sum over ranks is the whole.
    """
    if ranks() == 1:
        return z
    rows = [torch.empty_like(z) for _ in range(ranks())]
    dist.all_gather(rows, z.detach().contiguous())
    rows[rank()] = z
    return torch.cat(rows)


def out_of_memory(error):
    """Whether an exception says that memory did not suffice: torch's on GPUs and on CPUs, or Python's."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED"))


def first_line(error):
    """The first line of an exception's message, cut at 200 characters, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
