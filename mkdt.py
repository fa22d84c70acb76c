"""MKDT (Joshi, Ni & Mirzasoleiman, ICLR 2025): dataset distillation by matching trajectories.

    python mkdt.py --stage all --dataset shapes      minutes on a laptop: no GPU, no network
    python mkdt.py --stage all --dataset cifar10     the paper's CIFAR-10 at 2%: for a GPU

This file begins with Algorithm 1, from top to bottom; the rest ties it to files. The stages are:

    teacher   line 1      train f_T by self-supervision (Eq. 1, 6); encode the data: Z_T
    experts   line 2      train K students to match Z_T (Eq. 5, 7); keep theta*_0 .. theta*_T
    init      line 3      D_syn: real images, e.g. of highest loss (4.2); Z_syn: their part of Z_T
    distill   lines 4-19  match N steps on D_syn at alpha_syn to M epochs on all images (Eq. 4, 8)
    eval      section 5   pre-train an encoder on D_syn and probe it linearly (eval.py)
    figure1   Figure 1    why trajectories of self-supervision are hard to match (not in "all")

Each stage up to "distill" writes its result last, and is skipped if that exists. If the program is
interrupted, repeat the command: it resumes from its last checkpoint."""
import argparse
import ast
import contextlib
import json
import re
import textwrap
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.utils import make_grid, save_image

from data import (RANK, RANKS, Diverged, InputError, Log, Progress, add_common_flags, barrier,
                  checksum, command_line, first_line, load, load_dataset, rows_of_all_ranks, save,
                  save_text, share, start, sum_over_ranks, whole_file)
from eval import evaluate, linear_scores
from models import (OBJECTIVES, SSL, Compiled, Examples, Run, batches, build, encode, encoder,
                    flat_parameters, functional, mean_loss, read_config, set_learning_rate, stream,
                    student_name, teacher_network, two_projections)

# ---- 1. Teacher (Algorithm 1, line 1; Eq. 1 and 6) --------------------------------------------
def train_teacher(model, optimizer, data, batch_size, s, progress):
    """Trains `model`, an encoder and its projection head, by self-supervision (Eq. 6). The ranks
    share each batch; the loss, in float32, is of the projections of all of them."""
    method = SSL[s.ssl]
    steps_per_epoch = len(data.train_images) // batch_size
    on_gpu = s.device.type == "cuda"
    half = s.bf16 == "on" or (s.bf16 == "auto" and on_gpu)
    network = model
    if on_gpu and s.compile is not False and RANKS == 1:
        network = Compiled(model)

    def project(x):
        with torch.autocast(s.device.type, torch.bfloat16, enabled=half):
            return network(x)

    order = batches(len(data.train_images), batch_size, s.teacher_epochs, s.seed, "teacher order",
                    s.device, drop_last=True, first=progress.first_step)
    for step, batch in order:
        images = data.train_images[batch[RANK::RANKS]]
        draw = s.seed, "teacher views", step * RANKS + RANK
        z1, z2 = two_projections(project, images, data, s, draw)
        loss = method.loss(rows_of_all_ranks(z1), rows_of_all_ranks(z2), s)
        lr = method.schedule(step, progress.total, steps_per_epoch, s.teacher_lr)
        set_learning_rate(optimizer, lr)
        optimizer.zero_grad()
        loss.backward()
        sum_over_ranks([p.grad for p in model.parameters()])
        optimizer.step()
        progress(step + 1, loss=loss.detach())

# ---- 2. Experts (Algorithm 1, line 2; Eq. 5 and 7) --------------------------------------------
def train_expert(student, loss, order, examples, s, seed, progress):
    """One expert trajectory (Eq. 7): `student` by SGD at a constant rate on loss(x, y), the mean of
    Eq. 5, or by Adam for MTT-SSL (A.2). order: all (step, batch). examples(batch, draw) -> x, y.
    Returns theta*_0 .. theta*_T, [T + 1, P] on the CPU, and the mean loss of each epoch."""
    if s.objective == "ssl":
        optimizer = torch.optim.Adam(student.parameters(), s.expert_lr, weight_decay=s.expert_decay)
    else:
        optimizer = torch.optim.SGD(student.parameters(), s.expert_lr, s.expert_momentum,
                                    weight_decay=s.expert_decay)
    steps_per_epoch = len(order) // s.expert_epochs
    trajectory = [flat_parameters(student).cpu()]
    losses = []
    for step, batch in order:
        x, y = examples(batch, (seed, "expert views", step))
        value = loss(x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.detach())
        if (step + 1) % steps_per_epoch == 0:
            trajectory.append(flat_parameters(student).cpu())  # a copy, not the live weights
        progress(step + 1, loss=value.detach())
    losses = torch.stack(losses).view(s.expert_epochs, -1)
    return torch.stack(trajectory), losses.mean(dim=1)

# ---- 3. Initial distilled set (Algorithm 1, line 3; section 4.2) ------------------------------
def loss_per_image(f, thetas, data, z, objective):
    """Each training image's loss (section 4.2), [n]: between f(theta, image) and its row of
    Z_T, z [n, d], averaged over the experts' weights `thetas` [P] after their first epoch."""
    losses = []
    for theta in thetas:
        outputs = encode(partial(f, theta), data.train_images, data.normalize)
        losses.append(objective.loss(outputs, z).view(len(z), -1).mean(dim=1))
    return torch.stack(losses).mean(dim=0)

def high_loss(data, targets, order, count, rng):
    """The images of the highest loss (section 4.2), the largest first."""
    return subset(data, targets, order[:count])

def random_images(data, targets, order, count, rng):
    """Images drawn uniformly: "MKDT (Rnd Sub)" in Table 2."""
    return subset(data, targets, torch.randperm(len(data.train_images), generator=rng)[:count])

def subset(data, targets, chosen):
    """(normalised images [n, 3, H, W], their targets) of the indices `chosen`."""
    return data.normalize(data.train_images[chosen]), targets[chosen]

# By --init: (data, Z_T or labels, indices by loss or None, count, rng) -> what `subset` returns.
STARTS = {"high_loss": high_loss, "random": random_images}

# ---- 4. Distillation (Algorithm 1, lines 4 - 19; Eq. 4 and 8) ---------------------------------
def matching_loss(loss, theta, target, images, lr, steps):
    """L_DD of Eq. 4 as the paper states it: N steps of Eq. 8 on loss(theta, x, y), then the squared
    distance to `target` relative to the start's. Differentiable, in memory that grows with N."""
    theta_n = theta
    for batch, y in steps:
        gradient = torch.func.grad(loss)(theta_n, images[batch], y)
        theta_n = theta_n - lr * gradient                                              # Eq. 8
    return (theta_n - target).square().sum() / (theta - target).square().sum()         # Eq. 4

class InnerStep:
    """A step of Eq. 8 of a loss(theta, x, y), and what is needed to go back through it:
    gradient(theta, x, y) = g = dL/dtheta, of which Eq. 8 subtracts alpha_syn g
    adjoint(theta, x, y, v) = ((H v, d(g . v)/dx), g . v), where H = dg/dtheta. Differentiating the
        scalar g . v, itself made of a gradient, gives all three; H is never formed."""

    def __init__(self, loss):
        gradient = torch.func.grad(loss)

        def g_dot_v(theta, x, y, v):
            return gradient(theta, x, y) @ v

        self.gradient = gradient
        self.adjoint = torch.func.grad_and_value(g_dot_v, argnums=(0, 1))

@torch.no_grad()
def matching_gradient(inner, theta, target, images, lr, steps):
    """L_DD of Eq. 4 and its exact gradient with respect to the images and the learned rate: what
    differentiating `matching_loss` gives, in the memory of one step and N vectors [P].

    inner: an InnerStep. theta, target: theta*_t and theta*_{t+M}, [P]. images [n, ...]. lr:
    alpha_syn. steps: the N pairs (b_n, y_n) of image indices and their part of Z_syn.

    Forward, Eq. 8:   theta_{n+1} = theta_n - lr g_n,  g_n = g(theta_n, x_{b_n}, y_n)
    Backward, v_n = dL_DD / dtheta_n, H_n = dg_n / dtheta_n:
        v_N = 2 (theta_N - target) / ||theta_0 - target||^2                         (Eq. 4)
        v_n = (I - lr H_n)^T v_{n+1} = v_{n+1} - lr H_n v_{n+1}           (H_n is symmetric)
        dL_DD / dx_{b_n} += -lr d(g_n . v_{n+1}) / dx      dL_DD / dlr += -g_n . v_{n+1}

    Returns (loss, gradient of the images, gradient of the learned rate)."""
    thetas = [theta]
    for batch, y in steps:
        thetas.append(thetas[-1] - lr * inner.gradient(thetas[-1], images[batch], y))

    end = thetas.pop()
    scale = (theta - target).square().sum()
    v = 2 * (end - target) / scale
    grad_images = torch.zeros_like(images)
    grad_lr = torch.zeros_like(scale)
    for theta_n, (batch, y) in zip(thetas[::-1], steps[::-1]):
        (hv, gx), gv = inner.adjoint(theta_n, images[batch], y, v)
        grad_images.index_add_(0, batch.to(images.device), gx * -lr)
        grad_lr -= gv
        v = v - lr * hv
    return (end - target).square().sum() / scale, grad_images, grad_lr

def bound(grad_images, grad_lr, lr, pixel_lr, syn_lr_lr, limit):
    """The gradients [n, 3, H, W] and [], scaled down where need be; the number of images that were.
    Before momentum, SGD at pixel_lr and syn_lr_lr then moves no image by more than `limit` (root
    mean square, in standard deviations), and `lr` by no more than `limit` of itself; 0: no bound.
    Not in the paper: a start at t = 0 can have gradients hundreds of times larger than usual."""
    limit = limit or float("inf")
    rms = pixel_lr * grad_images.square().mean((1, 2, 3), keepdim=True).sqrt()     # [n, 1, 1, 1]
    scale = (limit / rms).clamp(max=1)
    most = limit * lr.abs() / syn_lr_lr
    return grad_images * scale, grad_lr.clamp(-most, most), (scale < 1).sum()

def draw_batches(n, count, batch_size, rng, device="cpu"):
    """`count` mini-batches of 0..n-1: permutations, cut into pieces of `batch_size`."""
    drawn = []
    while len(drawn) < count:
        drawn += torch.randperm(n, generator=rng).to(device).split(batch_size)
    return drawn[:count]

@dataclass
class Distilled:
    """A distilled set: D_syn [n, 3, H, W], normalised; Z_syn [n, d] (labels [n]; [n, 0] for views),
    which stays fixed; alpha_syn []; and D_syn as it began."""
    images: torch.Tensor
    targets: torch.Tensor
    lr: torch.Tensor
    initial: torch.Tensor

def new_distilled(images, targets, s):
    """Lines 3 and 4: the Distilled set as distillation begins, and the SGD of line 18."""
    syn = Distilled(images.clone(), targets, images.new_tensor(s.syn_lr), images)
    rates = [{"params": syn.images, "lr": s.pixel_lr}, {"params": syn.lr, "lr": s.syn_lr_lr}]
    return syn, torch.optim.SGD(rates, momentum=s.syn_momentum)

def distill(inner, experts, syn, optimizer, targets_of, s, progress):
    """Algorithm 1, lines 5 - 19: moves syn.images and syn.lr, in place, by `optimizer`.
    inner: the InnerStep of the students' loss. experts: K trajectories [T + 1, P], on any device.
    targets_of(batch, draw): Z_syn[batch] (for MTT-SSL two views, drawn from the random stream
    called `draw`). Several ranks draw one trajectory each and average their gradients."""
    device = syn.images.device
    for iteration in range(progress.first_step, s.iterations):                         # line 5
        draw = s.seed, "distill", iteration * RANKS + RANK
        rng = stream(*draw)
        expert = experts[torch.randint(len(experts), (), generator=rng)]               # line 6
        t = torch.randint(s.max_start_epoch + 1, (), generator=rng)                    # line 7
        theta = expert[t].to(device)                                                   # 8, 9
        target = expert[t + s.match_epochs].to(device)         # theta*_{t+M}, of line 17
        steps = []
        drawn = draw_batches(len(syn.images), s.syn_steps, s.syn_batch, rng, device)
        for n, batch in enumerate(drawn):                                              # 10 - 12
            z_syn = targets_of(batch, (*draw, n))
            steps.append((batch, z_syn))
        loss, grad_images, grad_lr = matching_gradient(                                # 13 - 17
            inner, theta, target, syn.images, syn.lr, steps)
        sum_over_ranks([loss, grad_images, grad_lr])
        syn.images.grad, syn.lr.grad, bounded = bound(
            grad_images / RANKS, grad_lr / RANKS, syn.lr, s.pixel_lr, s.syn_lr_lr, s.clip)
        optimizer.step()                                                               # line 18
        moved = (syn.images - syn.initial).abs().mean()        # of a pixel, in standard deviations
        progress(iteration + 1, loss=loss / RANKS, lr=syn.lr.clone(), bounded=bounded, moved=moved)

# ---- Settings: each is a flag of the command line and is kept in config.json -------------------
# The defaults are the paper's for CIFAR-10 at 2%, except expert_epochs (20 there) and clip (none).
class Setting(NamedTuple):
    default: object
    help: str
    low: float = 0
    high: float = 1e9
    choices: tuple = ()
    not_for: str = ""                      # the --ssl that ignores it

SETTINGS = {
    "data": {                              # not in `identity`, which has checksums instead
        "train_images": Setting(0, "use only this many training images, drawn at random; 0: all"),
        "image_size": Setting(0, "side in pixels to resize images to; 0: their own (folders: 32)"),
        "representations": Setting("", "a .pt or .npy file [n, d] to use instead of a teacher"),
    },
    "teacher": {
        "ssl": Setting("barlow", "self-supervised loss", choices=SSL),
        "teacher_width": Setting(64, "channels of the ResNet-18; 8 x as many in its last stage", 1),
        "teacher_epochs": Setting(1000, "epochs of self-supervised training (simclr: 400)", 1),
        "teacher_batch": Setting(256, "images a step, two views of each (simclr: 512)", 2),
        "teacher_lr": Setting(0.01, "peak learning rate of Adam (simclr: 0.001, constant)"),
        "teacher_decay": Setting(1e-6, "weight decay of Adam"),
        "lambd": Setting(1 / 128, "lambda, the weight of Eq. 1's off-diagonals", not_for="simclr"),
        "temperature": Setting(0.5, "temperature of the teacher's SimCLR", 1e-6, not_for="barlow"),
        "crop_scale": Setting(0.08, "smallest share of an image that a random crop keeps", 1e-6, 1),
        "grey": Setting(0.2, "probability that a view is made grey", 0, 1),
        "max_pool": Setting(0, "1: the teacher's stem ends in max-pooling (TinyImageNet)", 0, 1),
        "standardize": Setting(0, "1: the teacher ends in batch norm (as for shapes)", 0, 1),
        "bf16": Setting("auto", "the teacher in bfloat16", choices=("auto", "on", "off")),
    },
    "experts": {
        "objective": Setting("mse", "what students minimise (ce: MTT's)", choices=OBJECTIVES),
        "student": Setting("convnet", "the student, a name in models.ENCODERS, without a width"),
        "width": Setting(128, "channels of the student", 1),
        "expert_epochs": Setting(7, "epochs of training; none after T+ + M is ever read", 1),
        "expert_lr": Setting(0.1, "learning rate of SGD"),
        "expert_momentum": Setting(0.9, "momentum of SGD"),
        "expert_decay": Setting(1e-4, "weight decay of SGD"),
        "expert_batch": Setting(256, "images a step", 1),
        "same_start": Setting(0, "1: all experts begin with the same weights (Figure 1)", 0, 1),
    },
    "init": {
        "experts": Setting(100, "K, expert trajectories; another K needs another --name", 1),
        "init": Setting("high_loss", "the initial images", choices=STARTS),
        "percent": Setting(2.0, "size of the distilled set, in percent of the images", 0, 100),
    },
    "distill": {
        "syn_steps": Setting(40, "N, steps on the distilled set in an iteration", 1),
        "match_epochs": Setting(2, "M, epochs on the real data from start to target", 1),
        "max_start_epoch": Setting(5, "T+, the last epoch to start from (inclusive)"),
        "pixel_lr": Setting(1000.0, "learning rate of SGD on the distilled images"),
        "syn_lr": Setting(0.1, "alpha_0, the initial value of the learned rate alpha_syn"),
        "syn_lr_lr": Setting(1e-4, "learning rate of SGD on alpha_syn"),
        "syn_momentum": Setting(0.5, "momentum of both"),
        "syn_batch": Setting(256, "distilled images a step", 1),
        "clip": Setting(0.1, "bound on how far an iteration moves images, alpha_syn; 0: none"),
        "iterations": Setting(5000, "S, distillation iterations; may be raised later", 1),
    },
    "eval": {
        "pretrain_epochs": Setting(20, "epochs of pre-training on the distilled set (Eq. 9)", 1),
        "pretrain_batch": Setting(256, "images a step of pre-training", 1),
        "pretrain_lr": Setting(0.1, "learning rate of pre-training on real images"),
    },
}
ALL_SETTINGS = {name: setting for group in SETTINGS.values() for name, setting in group.items()}

# What differs by data set (the teacher: as in mix-bt), and by percentage (Tables 8 and 9).
DATASETS = {
    "cifar10": {},
    "cifar100": {},
    "tinyimagenet": dict(lambd=1 / 1024, crop_scale=0.2, grey=0.1, max_pool=1, expert_epochs=4),
    "shapes": dict(teacher_width=16, teacher_epochs=12, teacher_batch=64, teacher_lr=6e-3,
                   crop_scale=0.6, grey=1.0, max_pool=1, standardize=1, width=16, experts=24,
                   expert_epochs=3, expert_lr=0.05, expert_batch=64, percent=1.0, init="random",
                   syn_batch=40, syn_lr=0.25, syn_lr_lr=1e-5, iterations=90, pretrain_epochs=160),
}
ROW = "syn_steps", "match_epochs", "max_start_epoch", "pixel_lr"
TABLES_8_AND_9 = {                         # N, M, T+, pixel_lr
    ("cifar10", 2): (40, 2, 5, 1e3),
    ("cifar10", 5): (40, 2, 5, 1e4),
    ("cifar100", 2): (40, 2, 2, 1e3),
    ("cifar100", 5): (40, 2, 5, 1e4),
    ("tinyimagenet", 2): (10, 2, 2, 1e5),
    ("tinyimagenet", 5): (10, 2, 2, 1e5),
    ("shapes", 1): (30, 1, 2, 3e3),        # ours
}
# A.2 names no learning rate for the inner steps of MTT; MTT's code begins at 0.01 on CIFAR-10.
MTT = dict(syn_lr=0.01, syn_lr_lr=1e-5, init="random")
BY_LOSS = {                                # by --ssl, and by --objective
    "simclr": dict(teacher_epochs=400, teacher_batch=512, teacher_lr=1e-3),
    "ssl": dict(expert_batch=1024, expert_lr=1e-3, expert_decay=1e-6, **MTT),
    "ce": dict(expert_batch=256, expert_lr=0.01, expert_momentum=0.0, expert_decay=0.0, **MTT),
}

def resolve(dataset, given, image_size=32):
    """All settings of a run, {name: value}. Prints what was chosen where the paper names none."""
    known = dataset
    if dataset not in DATASETS:
        known = "tinyimagenet" if image_size >= 64 else "cifar10"
    defaults = {name: setting.default for name, setting in ALL_SETTINGS.items()}
    percent = {**defaults, **DATASETS[known], **given}["percent"]
    published = [p for name, p in TABLES_8_AND_9 if name == known]
    nearest = min(published, key=lambda p: abs(p - percent))
    if known != dataset:
        print(f"there are no settings for {dataset}: using those for {known} at {nearest}%")
    elif percent not in published:
        print(f"there are no settings for {percent:g}% of {known}: using those for {nearest}%")
    return {**defaults, **BY_LOSS.get(given.get("ssl"), {}), **DATASETS[known],
            **dict(zip(ROW, TABLES_8_AND_9[known, nearest])),
            **BY_LOSS.get(given.get("objective"), {}), **given}

def check_settings(given):
    """Raises InputError for an impossible setting."""
    for name, value in given.items():
        setting = ALL_SETTINGS[name]
        flag = f"--{name.replace('_', '-')} {value}"
        if setting.choices and value not in setting.choices:
            raise InputError(f"{flag}: choose from {', '.join(setting.choices)}")
        if not isinstance(value, str) and not setting.low <= value <= setting.high:
            raise InputError(f"{flag} must be between {setting.low:g} and {setting.high:g}")
    if given.get("representations") and given.get("standardize"):
        raise InputError("--standardize 1 needs a teacher, which --representations replaces")

def settings_of(s, stage):
    """{name: value} of a stage's settings that make a difference to it."""
    if stage == "teacher" and s.representations and s.objective != "ssl":
        return {}
    return {name: vars(s)[name] for name, setting in SETTINGS[stage].items()
            if setting.not_for != s.ssl}

# ---- The stages: what ties the above to files -------------------------------------------------
def teacher_stage(run):
    """teacher.pt, representations.pt: Z_T [n, d], representations_test.pt."""
    s, data = run.s, run.data
    n = len(data.train_images)
    path = run.run_dir / "representations.pt"
    if path.exists() or run.objective.target != "representations":
        return
    if s.representations:
        record(run, "teacher")
        save(path, read_representations(s.representations, n))
        return
    f_T = build(partial(teacher_network, s, data.image_size), s.seed, "teacher")
    head = build(partial(SSL[s.ssl].projector, f_T.feature_dim), s.seed, "projector")
    model = torch.nn.Sequential(f_T, head).to(s.device, memory_format=torch.channels_last)
    if RANKS > 1 and s.device.type == "cuda":                  # torch cannot do this on CPUs
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.Adam(model.parameters(), s.teacher_lr, weight_decay=s.teacher_decay)
    batch_size = max(RANKS, min(s.teacher_batch, n) // RANKS * RANKS)      # as many for each rank
    steps = s.teacher_epochs * (n // batch_size)
    checkpoint = run.run_dir / "teacher_checkpoint.pt"
    advice = f"Lower --teacher-lr (now {s.teacher_lr:g}), and delete {checkpoint} if it exists."

    def probe(step):
        model.eval()
        with contextlib.suppress(ValueError):      # too few labels, or features are not finite
            accuracy, = linear_scores(model[0], data, [5], s.seed)
            run.log("teacher", step, steps, probe=accuracy)
        model.train()

    progress = Progress("teacher", steps, run.log, checkpoint, advice, max(1, steps // 3),
                        probe if data.labelled else None, model=model, optimizer=optimizer,
                        **identity(run, "teacher"))
    train_teacher(model, optimizer, data, batch_size, s, progress)
    if RANK == 0:                          # on CPUs each rank has a batch norm of its own
        save_teacher(run, model[0].eval())
        checkpoint.unlink(missing_ok=True)

def save_teacher(run, f_T):
    """teacher.pt, representations_test.pt and, last, representations.pt, of a trained teacher."""
    data = run.data
    z = encode(f_T, data.train_images, data.normalize).cpu()
    check_representations(z, len(z), f"the teacher failed (--teacher-lr {run.s.teacher_lr:g})")
    record(run, "teacher")
    save(run.run_dir / "teacher.pt", f_T.state_dict())
    if len(data.test_images):
        z_test = encode(f_T, data.test_images, data.normalize)
        save(run.run_dir / "representations_test.pt",
             {"images": checksum(data.test_images), "representations": z_test.cpu()})
    save(run.run_dir / "representations.pt", z)

def read_representations(path, n):
    """The array [n, d] in a .npy or torch file, detached."""
    try:
        z = np.load(path) if path.endswith(".npy") else load(path)
        z = torch.as_tensor(z).detach().float()
    except Exception as error:             # numpy, zip and torch each have their own
        raise InputError(f"--representations {path}: expected a .npy or .pt file with an array "
                         f"[n, d] of numbers ({first_line(error)})") from error
    check_representations(z, n, f"--representations {path}")
    return z

def check_representations(z, n, source):
    """InputError if representations of n images are not [n, d], finite, and more than one point."""
    if z.dim() != 2 or len(z) != n or not z.isfinite().all() or (z == z[0]).all():
        raise InputError(f"{source}: representations must be [{n}, d], finite and not all alike, "
                         f"unlike these {list(z.shape)}")
    if not 1e-3 < z.std() < 1e3:
        print(f"note: the representations' standard deviation, {z.std():.3g}, is far from 1: scale "
              "them, or change --expert-lr and --syn-lr")

def experts_stage(run):
    """experts/expert_000.pt ...: flat float32 [T + 1, P], those that are missing."""
    s, data = run.s, run.data
    missing = [i for i in range(s.experts) if not run.expert_file(i).exists()][RANK::RANKS]
    barrier()                              # until every rank has looked
    student = run.student().to(memory_format=torch.channels_last)
    loss = partial(mean_loss, run.objective, student)
    if run.can_compile:
        loss = Compiled(loss)
    examples = Examples(data.train_images, run.targets, data, s)
    advice = f"Lower --expert-lr (now {s.expert_lr:g}), and delete the experts if there are any."
    for done, i in enumerate(missing):
        began = time.monotonic()
        fresh = build(run.student, s.seed, "expert", 0 if s.same_start else i)
        student.load_state_dict(fresh.state_dict())
        seed = stream(s.seed, "expert", i).initial_seed()
        order = list(batches(len(data.train_images), s.expert_batch, s.expert_epochs, seed,
                             "expert order", s.device))
        progress = Progress(f"expert {i}", len(order), run.log, advice=advice)
        trajectory, losses = train_expert(student, loss, order, examples, s, seed, progress)
        if not trajectory[-1].isfinite().all():
            raise Diverged(f"expert {i} diverged. {advice}")
        record(run, "experts")
        save(run.expert_file(i), trajectory)
        epochs = {f"epoch {e + 1}": float(value) for e, value in enumerate(losses)}
        run.log("experts", done + 1, len(missing), 1 / (time.monotonic() - began), **epochs)

def load_experts(run, count):
    """The first experts, [T + 1, P] each; they are read from their files as they are used."""
    expected = run.s.expert_epochs + 1, len(flat_parameters(run.student()))
    experts = [load(run.expert_file(i), mmap=True) for i in range(count)]
    for i, expert in enumerate(experts):
        if expert.shape != expected:
            raise InputError(f"{run.expert_file(i)} holds {list(expert.shape)}, not the trajectory "
                             f"[T + 1, P] = {list(expected)}: delete it")
    return experts

def init_stage(run):
    """SET/init.pt: D_syn and Z_syn as distillation begins, and the order of all images by loss."""
    s, data = run.s, run.data
    path = run.set_dir / "init.pt"
    if path.exists():
        return
    order = None
    if run.objective.target == "representations":
        after_one_epoch = (expert[1].to(s.device) for expert in load_experts(run, s.experts))
        losses = loss_per_image(functional(run.student()), after_one_epoch, data, run.targets,
                                run.objective)
        order = losses.cpu().sort(descending=True, stable=True).indices        # ties: lower index
    count = share(len(data.train_images), s.percent, "--percent")
    images, targets = STARTS[s.init](data, run.targets, order, count, stream(s.seed, "init"))
    record(run, "set")
    save(path, {"images": images.contiguous(), "targets": targets, "order": order})

def loss_of_theta(run):
    """loss(theta, x, y), the objective's mean for a student with weights theta: L_MSE of Eq. 8."""
    f = functional(run.student())
    return lambda theta, x, y: mean_loss(run.objective, partial(f, theta), x, y)

def distill_stage(run):
    """SET/distilled.pt, its snapshots every 1,000 iterations, and a picture."""
    s, data = run.s, run.data
    path = run.set_dir / "distilled.pt"
    done = load(path)["iterations"] if path.exists() else 0
    if done >= s.iterations:
        print(f"distill: {path} has {done} iterations already")
        return
    init = load(run.set_dir / "init.pt")
    syn, optimizer = new_distilled(init["images"].to(s.device), init["targets"].to(s.device), s)
    experts = load_experts(run, s.experts)

    def keep(iteration, path=None):
        save(path or run.set_dir / f"distilled_{iteration:05d}.pt",
             {"images": syn.images.cpu(), "targets": init["targets"], "lr": syn.lr.item(),
              "iterations": iteration, "mean": data.mean.flatten().cpu(),
              "std": data.std.flatten().cpu()})

    inner = InnerStep(loss_of_theta(run))
    if run.can_compile:                    # two shapes: full batches, and a pass's last one
        inner.gradient = Compiled(inner.gradient, max_shapes=2)
        inner.adjoint = Compiled(inner.adjoint, max_shapes=2)
    advice = (f"Under another --name, lower --pixel-lr (now {s.pixel_lr:g}) or --syn-lr-lr (now "
              f"{s.syn_lr_lr:g}), or bound the steps with --clip (now {s.clip:g}).")
    progress = Progress("distill", s.iterations, run.log, run.set_dir / "distill_checkpoint.pt",
                        advice, 1000, keep, images=syn.images, lr=syn.lr, optimizer=optimizer)
    if progress.first_step > s.iterations:
        print(f"distill: the set has {progress.first_step} iterations, not {s.iterations}")
    targets_of = Examples(syn.images, syn.targets, data, s).y
    distill(inner, experts, syn, optimizer, targets_of, s, progress)
    pairs = torch.cat([syn.initial[:10], syn.images[:10]])     # ten images, before and after
    tiles = data.denormalize(pairs).clamp(0, 1)
    zoomed = torch.nn.functional.interpolate(tiles, scale_factor=3)
    with whole_file(run.set_dir / "distilled.png") as file:
        save_image(make_grid(zoomed, len(pairs) // 2, pad_value=1), file, format="png")
    record(run, "set")
    keep(max(s.iterations, progress.first_step), path)         # last: the stage is done

def eval_stage(run):
    """SET/results.csv, results.md: the distilled set and its baselines but for the full data."""
    if not run.data.labelled:
        print(f"eval: {run.data.name} cannot be probed without labels in both splits. To probe on "
              f"another data set:\n    python eval.py {run.set_dir} --tasks cifar10")
        return
    print(f"\n{evaluate(run)}\nresults: {run.set_dir / 'results.md'}\n"
          f"picture: {run.set_dir / 'distilled.png'}")
    record(run, "set")                     # eval.py goes on with these settings

STAGES = {"teacher": teacher_stage, "experts": experts_stage, "init": init_stage,
          "distill": distill_stage, "eval": eval_stage}

# ---- Runs: their folders, and what config.json says of them -----------------------------------
def open_run(args, given, **changed):
    """The Run of a command line. InputError for what cannot work, before anything is computed."""
    data = load_dataset(args.dataset, args.data_dir, given.get("image_size", 0), args.device,
                        given.get("train_images", 0))
    settings = resolve(args.dataset, given, data.image_size)
    s = argparse.Namespace(**{**vars(args), **settings, **changed})
    share(len(data.train_images), s.percent, "--percent")
    last = s.max_start_epoch + s.match_epochs
    if last > s.expert_epochs:
        raise InputError(f"--expert-epochs {s.expert_epochs} must be at least T+ + M = {last}")
    target = OBJECTIVES[s.objective].target
    if target == "labels" and int(data.train_labels.min()) < 0:
        raise InputError(f"--objective {s.objective}: {data.name} has images without a label")
    if target != "representations" and s.init == "high_loss":
        raise InputError(f"--init high_loss needs a teacher, which --objective {s.objective} lacks")
    functional(encoder(student_name(s), 1, data.image_size))   # refuses batch norm
    run_dir = Path(s.run_dir or f"runs/{data.name}")
    name = s.name or f"{s.percent:g}pct_{s.init}"
    if Path(name).name != name or name in ("..", "experts", "figure1"):
        raise InputError(f"--name {name}: give the name of a folder in {run_dir}, without slashes")
    log = Log(run_dir / name / "log.jsonl", s.log_seconds, s.checkpoint_minutes)
    return Run(s, data, run_dir, run_dir / name, log)

# The sections of config.json: the files that they are about, the stages whose settings they hold.
FILES = {"teacher": ["teacher.pt", "representations*.pt"], "experts": ["experts/*.pt"],
         "set": ["init.pt", "distill*.pt", "krr_st_*", "dm_*"]}
MADE_BY = {"teacher": ["teacher"], "experts": ["teacher", "experts"],
           "set": ["teacher", "experts", "init", "distill"]}

def folder_of(run, section):
    """A distilled set has a folder, and so a config.json, of its own."""
    return run.set_dir if section == "set" else run.run_dir

def existing(run, section):
    """The files of a section that are there, as patterns."""
    folder = folder_of(run, section)
    return [str(folder / pattern) for pattern in FILES[section] if any(folder.glob(pattern))]

def identity(run, section):
    """What a section's results are made from, {name: value}; arrays by checksum, not by name."""
    s = run.s
    made = {"images": run.data.images_id, "seed": s.seed}
    for stage in MADE_BY[section]:
        made.update(settings_of(s, stage))
    made.pop("iterations", None)
    if section != "teacher":
        made[run.objective.target] = checksum(run.targets)
    elif s.representations:
        z = read_representations(s.representations, len(run.data.train_images))
        made["representations"] = checksum(z)
    return made

def check(run, stages):
    """Raises InputError if the stages would build on, or go on with, results of other settings."""
    sections = [section for section in FILES
                if section != "teacher" or run.objective.target == "representations"]
    wanted = {stage if stage in FILES else "set" for stage in stages}
    for position, section in enumerate(sections):
        for later in sections[position + 1:]:
            if section in wanted and not existing(run, section) and existing(run, later):
                refuse(run, later, "made before the results that it builds on")
        if not existing(run, section) or wanted.isdisjoint(sections[position:]):
            continue
        folder = folder_of(run, section)
        entry = read_config(folder / "config.json").get(section)
        if entry is None:
            refuse(run, section, "not described in config.json")
        then, now = entry["made"], identity(run, section)
        differences = [f"{name} {then.get(name)} -> {now.get(name)}" for name in {**then, **now}
                       if then.get(name) != now.get(name)]
        if differences:
            refuse(run, section, f"made with other settings ({', '.join(differences)})")
        if entry["code"] != code_version():
            print(f"note: other code made the {section} in {folder}")

def refuse(run, section, reason):
    """Raises InputError: a section cannot be used, for this reason; and what can be done."""
    sections = list(FILES)
    files = []
    for later in sections[sections.index(section):]:
        files += existing(run, later)
    flag = "--name" if section == "set" else "--run-dir"
    raise InputError(f"cannot use the {section} in {folder_of(run, section)}, {reason}. Give "
                     f"another {flag}, or delete {' '.join(files)}")

def record(run, section):
    """Writes into config.json how a section is made, before its first result, and the settings."""
    path = folder_of(run, section) / "config.json"
    entries = read_config(path)
    if not existing(run, section):
        entries[section] = {"made": identity(run, section), "code": code_version()}
    settings = {name: vars(run.s)[name] for name in ALL_SETTINGS}
    entries[section].update(dataset=run.s.dataset, settings=settings)
    save_text(path, json.dumps(entries, indent=2) + "\n")

@cache
def code_version():
    """A checksum of the code without its comments, docstrings and layout."""
    code = []
    for name in ("data.py", "models.py", "eval.py", "mkdt.py"):
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        text = re.sub('""".*?"""', "0", text, flags=re.DOTALL)             # the docstrings
        code.append(ast.unparse(ast.parse(text)))
    return checksum(*code)

def execute(run, stages):
    """Runs stages, each if it is not done."""
    check(run, stages)
    run.set_dir.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        told = "  ".join(f"{name}={value}" for name, value in settings_of(run.s, stage).items())
        print(textwrap.fill(f"{stage}: {told}", 100, subsequent_indent="    "), flush=True)
        STAGES[stage](run)
        barrier()

# ---- Figure 1: why trajectories of self-supervision are hard to match (4.1, appendix A.2) ------
# A.2's settings for MTT and MTT-SSL, and the usual ones for MKDT. Five experts begin at one network
# and differ in the order of their batches; the first is distilled, from epoch 0, with --clip.
FIGURE_1 = {
    "mtt": dict(objective="ce", syn_steps=20, match_epochs=4),
    "mtt_ssl": dict(objective="ssl", syn_steps=10, match_epochs=2),
    "mtt_ssl_4096": dict(objective="ssl", syn_steps=10, match_epochs=2, expert_batch=4096),
    "mkdt": dict(objective="mse"),
}
FIGURE_1_COMMON = dict(percent=1.0, init="random", expert_epochs=7, max_start_epoch=0,
                       pixel_lr=1000.0, iterations=100, same_start=1)

def figure1_stage(args, given, run):
    """figure1/figure1.csv, and .png with matplotlib. Each system is a run of its own in there."""
    root = run.run_dir / "figure1"
    panels = {"gradient noise": {}, "trajectory variance": {}, "loss": {}, "moved": {}}
    for name, system in FIGURE_1.items():
        own = open_run(args, {**FIGURE_1_COMMON, **system, **given,
                              "representations": str(run.run_dir / "representations.pt"),
                              "objective": system["objective"]}, run_dir=root / name, name="one")
        own.s.experts = 5
        execute(own, ["teacher", "experts"])
        own.s.experts = 1                  # the first is distilled
        execute(own, ["init"])
        own.log.seconds = 0
        try:
            execute(own, ["distill"])
        except Diverged as error:
            print(f"figure1: {name}: {error}")                 # a result too
        experts = torch.stack(load_experts(own, 5))            # [5, T + 1, P]
        if name != "mtt_ssl_4096":                             # it differs in its batch alone
            gradient = torch.func.grad(loss_of_theta(own))
            examples = Examples(own.data.train_images, own.targets, own.data, own.s)
            noise = [gradient_noise(gradient, theta.to(own.s.device), examples, len(own.targets),
                                    own.s.seed) for theta in experts[0]]
            panels["gradient noise"][name] = list(enumerate(noise))
        if name != "mkdt":                                     # its optimiser carries it farther
            variance = experts.var(dim=0, correction=0).mean(dim=1)                    # Fig. 1a
            panels["trajectory variance"][name] = list(enumerate(variance.tolist()))[1:]
        for panel in ("loss", "moved"):
            panels[panel][name] = logged(own, panel)
    text = "panel,system,x,y\n"
    for panel, systems in panels.items():
        for name, points in systems.items():
            for x, y in points:
                text += f"{panel},{name},{x},{y}\n"
    save_text(root / "figure1.csv", text)
    draw_plot(root / "figure1.png", panels)
    print(f"figure1: {root}/figure1.csv")

def gradient_noise(gradient, theta, examples, n, seed, batch_size=256, count=32):
    """tr Cov(g_B) / |E g_B|^2 of the gradient at theta [P]; nan where noise hides the mean."""
    gradients = []
    for k in range(count):
        batch = torch.randperm(n, generator=stream(seed, "gradient noise", k))[:batch_size]
        x, y = examples(batch, (seed, "gradient noise views", k))
        gradients.append(gradient(theta, x, y).double())
    gradients = torch.stack(gradients)                                     # [count, P]
    covariance = float(gradients.var(dim=0).sum())
    mean_square = float(gradients.mean(dim=0).square().sum()) - covariance / count
    return covariance / mean_square if mean_square > 0 else float("nan")

def logged(run, name):
    """[(iteration, value), ...] of a quantity in the log of distillation, the latest of each."""
    points = {}
    for line in run.log.path.read_text().splitlines():
        with contextlib.suppress(ValueError):                  # a line that a kill cut off
            values = json.loads(line)
            if values["stage"] == "distill" and name in values:
                points[values["step"]] = values[name]
    return sorted(points.items())

def draw_plot(path, panels):
    """A plot of {panel: {system: [(x, y), ...]}}, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path.name}: it takes matplotlib (pip install matplotlib)")
        return
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    for axes, (panel, systems) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name, points in systems.items():
            colour = f"C{list(FIGURE_1).index(name)}"          # the same in all panels
            axes.plot(*zip(*points), label=name, color=colour)
        axes.set(title=panel, xlabel="epoch or step", yscale="linear" if panel == "loss" else "log")
        axes.legend(fontsize="small")
    with whole_file(path) as file:
        figure.savefig(file, format="png", dpi=120)

# ---- Command line -----------------------------------------------------------------------------
def parse(argv=None):
    """The arguments of a command line, and of them those that are settings: {name: value}."""
    parser = argparse.ArgumentParser(
        usage="python mkdt.py [--stage STAGE] [--dataset DATASET] [settings]", description=__doc__,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=[*STAGES, "all", "figure1"], default="all",
        help="which stage to run (default: all)")
    add("--dataset", default="cifar10", help=f"{', '.join(DATASETS)}, a task of eval.py, a folder "
        "with train/ and test/ inside, or an .npz file (default: cifar10)")
    add("--run-dir", help="where results go (default: runs/DATASET)")
    add("--name", help="the distilled set's folder in it (default: 2pct_high_loss or the like)")
    add("--seed", type=int, default=0, help="fixes the draws of all stages but eval (default: 0)")
    add("--log-seconds", type=float, default=10.0, help="between progress lines (default: 10)")
    add("--checkpoint-minutes", type=float, default=5.0, help="between checkpoints (default: 5)")
    add_common_flags(parser)
    for stage, settings in SETTINGS.items():
        group = parser.add_argument_group(stage)
        for name, setting in settings.items():
            kind = type(setting.default)
            choices = f": {', '.join(setting.choices)}" if setting.choices else ""
            group.add_argument(f"--{name.replace('_', '-')}", type=kind, default=argparse.SUPPRESS,
                               metavar=kind.__name__.upper(),
                               help=f"{setting.help}{choices} (default: {setting.default})")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in ALL_SETTINGS}
    return args, given

def main(argv=None):
    args, given = parse(argv)
    with command_line("mkdt.py"):
        check_settings(given)
        if args.stage == "figure1":        # its systems have objectives of their own
            given.update(objective="mse", init="random")
        args.device = start(args.device)
        run = open_run(args, given)
        execute(run, {"all": list(STAGES), "figure1": ["teacher"]}.get(args.stage, [args.stage]))
        if args.stage == "figure1":
            figure1_stage(args, given, run)

if __name__ == "__main__":
    main()
