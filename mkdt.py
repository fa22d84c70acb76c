"""MKDT: dataset distillation by matching knowledge-distillation trajectories (Joshi, Ni & Mirzasoleiman, ICLR 2025).

    python mkdt.py --stage all --dataset shapes      minutes on a laptop: no GPU, no network
    python mkdt.py --stage all --dataset cifar10     the paper's CIFAR-10, 2%: for a GPU; README, "What it costs"

The file follows Algorithm 1 from top to bottom:

    teacher   line 1    train f_T with self-supervision (Eq. 1, 6); encode the data: Z_T
    experts   line 2    train K students to match Z_T by MSE (Eq. 5, 7); keep theta*_0 .. theta*_T of each
    init      line 3    D_syn: the images of highest loss across experts (section 4.2), Z_syn: their rows of Z_T
    distill   4 - 19    move D_syn and alpha_syn so that N steps on them (Eq. 8) end where M epochs end (Eq. 4)
    eval      section 5 pre-train on D_syn and probe linearly (eval.py)
    bench               what all of that will cost on this machine
    figure1   Fig. 1    why self-supervised trajectories cannot be matched: the same, by other losses

Bare defaults are the paper's but for --clip and --bf16. Everything is written below --run-dir; a run that was stopped
goes on where it was.
"""
import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import re
import statistics
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import models
from data import (Checkpoint, Log, denormalize, duration, fingerprint, free_memory, graph_memory, hold, load,
                  load_dataset, normalize, read_json, require_memory, require_space, save, save_json, two_views,
                  write_file)
from models import (ConvNet, InputError, activation_bytes, average_over_ranks, batches, build, compile_if_it_pays,
                    first_line, flat_parameters, from_rank_0, functional, generator, join_ranks, leave_ranks,
                    objective, out_of_memory, pick_device, rank, rank_0_first, ranks, rows_of_all_ranks,
                    seconds_a_call, self_supervised_loss, stream, targets_of, to_device, wait_for_ranks)

# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------
# Every setting with its stage, its default (the paper's value; of clip, bf16 and expert_epochs see README) and its
# meaning. Each is a flag (--syn-steps 40) and is kept in the run folder's config.json. A stage depends on its own
# settings and on those of the stages above it.
SETTINGS = {
    "train_images":       ("data", 0, "use the first so many training images (of folders: the first classes); 0: all"),
    "image_size":         ("data", 0, "side in pixels to which images are squashed; 0: their own (folders: 32)"),
    "ssl":                ("teacher", "barlow", "self-supervised loss: barlow (Eq. 1) or simclr (Table 6)"),
    "teacher_width":      ("teacher", 64, "channels of the ResNet-18's first stage; representations have 8 times more"),
    "teacher_epochs":     ("teacher", 1000, "epochs of self-supervised training (simclr: 400)"),
    "teacher_batch":      ("teacher", 256, "images a step, two views of each (simclr: 512)"),
    "teacher_lr":         ("teacher", 0.01, "peak rate of Adam (simclr: 0.001, constant)"),
    "teacher_decay":      ("teacher", 1e-6, "weight decay of Adam"),
    "lambd":              ("teacher", 1 / 128, "weight of Eq. 1's off-diagonal terms"),
    "temperature":        ("teacher", 0.5, "temperature of SimCLR's loss"),
    "crop_scale":         ("teacher", 0.08, "smallest share of an image's area that a random crop keeps"),
    "gray":               ("teacher", 0.2, "probability that a view is made grey"),
    "max_pool":           ("teacher", 0, "1: the teacher's stem ends in max-pooling (TinyImageNet)"),
    "bf16":               ("teacher", "auto", "bfloat16 autocast for the teacher: auto (GPUs that have it), on or off"),
    "objective":          ("experts", "kd", "what students minimise: kd (Eq. 5), ssl (MTT-SSL, app. F) or ce (MTT)"),
    "width":              ("experts", 128, "channels of the student ConvNet"),
    "expert_epochs":      ("experts", 7, "epochs of expert training; T+ + M is the last one that is read (paper: 20)"),
    "expert_lr":          ("experts", 0.1, "rate of SGD"),
    "expert_momentum":    ("experts", 0.9, "momentum of SGD"),
    "expert_decay":       ("experts", 1e-4, "weight decay of SGD"),
    "expert_batch":       ("experts", 256, "images a step"),
    "experts":            ("init", 100, "K, the number of expert trajectories"),
    "init":               ("init", "high_loss", "initial images: high_loss (section 4.2) or random"),
    "percent":            ("init", 2.0, "size of the distilled set in percent of the training images"),
    "syn_steps":          ("distill", 40, "N, steps on the distilled set in an iteration"),
    "match_epochs":       ("distill", 2, "M, epochs on the real data from start to target"),
    "max_start_epoch":    ("distill", 5, "T+, the last epoch to start from (inclusive)"),
    "pixel_lr":           ("distill", 1000.0, "rate of SGD on the distilled images"),
    "syn_lr":             ("distill", 0.1, "alpha_0, the initial learned rate"),
    "syn_lr_lr":          ("distill", 1e-4, "rate of SGD on the learned rate"),
    "syn_momentum":       ("distill", 0.5, "momentum of both"),
    "syn_batch":          ("distill", 256, "distilled images a step"),
    "clip":               ("distill", 10.0, "limit on an image's gradient, in medians of its norm; 0: none (paper)"),
    "trajectories_per_step": ("distill", 1, "draws of expert and start epoch averaged in an iteration, on each rank"),
    "iterations":         ("length", 5000, "S, the number of distillation iterations"),
    "pretrain_epochs":    ("eval", 20, "epochs of pre-training (Eq. 9)"),
    "pretrain_batch":     ("eval", 256, "images a pre-training step"),
    "pretrain_lr":        ("eval", 0.1, "rate of pre-training on real images; distilled ones bring their own"),
}

# What differs from the defaults above, by data set: peers' recipes for the teacher, and Tables 8 and 9 by percent.
DATASETS = {
    "cifar10": {},
    "cifar100": {},
    "tinyimagenet": dict(lambd=1 / 1024, crop_scale=0.2, gray=0.1, max_pool=1),
    "shapes": dict(teacher_width=16, teacher_epochs=12, teacher_batch=128, teacher_lr=3e-3, crop_scale=0.4, gray=1.0,
                   max_pool=1, width=16, experts=4, expert_lr=0.05, expert_batch=64, percent=5.0, init="random",
                   syn_batch=40, syn_lr=0.25, syn_lr_lr=1e-5, clip=1.0, iterations=180, pretrain_batch=50),
}
SIMCLR = dict(teacher_epochs=400, teacher_batch=512, teacher_lr=1e-3)
# Students of other systems, as in appendix A.2: self-supervised ones are trained by Adam. It names no rate for inner
# steps; MTT's public code begins at that of its experts.
MTT = dict(syn_lr=0.01, syn_lr_lr=1e-5, init="random")
OBJECTIVES = {
    "kd": {},
    "ssl": dict(expert_batch=1024, expert_lr=1e-3, expert_decay=1e-6, **MTT),
    "ce": dict(expert_batch=256, expert_lr=0.01, expert_momentum=0.0, expert_decay=0.0, **MTT),
}
ROWS = {
    ("cifar10", 2): dict(syn_steps=40, match_epochs=2, max_start_epoch=5, pixel_lr=1e3),
    ("cifar10", 5): dict(syn_steps=40, match_epochs=2, max_start_epoch=5, pixel_lr=1e4),
    ("cifar100", 2): dict(syn_steps=40, match_epochs=2, max_start_epoch=2, pixel_lr=1e3),
    ("cifar100", 5): dict(syn_steps=40, match_epochs=2, max_start_epoch=5, pixel_lr=1e4),
    ("tinyimagenet", 2): dict(syn_steps=10, match_epochs=2, max_start_epoch=2, pixel_lr=1e5),
    ("tinyimagenet", 5): dict(syn_steps=10, match_epochs=2, max_start_epoch=2, pixel_lr=1e5),
    ("shapes", 5): dict(syn_steps=30, match_epochs=1, max_start_epoch=2, pixel_lr=3e3),
}


# ------------------------------------------------------------------------------------------------------------
# 1. Teacher (Algorithm 1, line 1; Eq. 1 and 6)
# ------------------------------------------------------------------------------------------------------------
def teacher_loss(z, ssl, lambd, temperature):
    """L_SSL of Eq. 6, Barlow Twins' or SimCLR's, from the projections z [2B, k] of two views of B images.

    With several ranks, F or the negatives are taken over the images of all of them.
    """
    return self_supervised_loss(*(rows_of_all_ranks(half) for half in z.chunk(2)), ssl, lambd, temperature)


def warmup_cosine(step, steps, warmup, peak, floor):
    """Rate at `step` of `steps`: linear from 0 to `peak` over `warmup` steps, then cosine down to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def train_teacher(model, dataset, ssl, epochs, batch_size, peak_lr, decay, lambd, temperature, crop_scale, gray, bf16,
                  seed, log, checkpoint, speed_up=lambda f, *rest, **options: f, monitor=None):
    """Trains `model`, an encoder followed by its projection head, in place on dataset.train_images (Eq. 6).

    Adam; Barlow Twins warms up for min(10 epochs, 10% of the steps), then follows a cosine to 0.001 of the peak;
    SimCLR keeps a constant rate. The last short batch of an epoch is dropped. Both views go through the network as
    one batch, so batch norm sees them together, in bfloat16 if `bf16`; the loss is float32. Several ranks share each
    batch and train one network. monitor(encoder) -> {name: value} is logged about ten times. Raises InputError on a
    non-finite loss.
    """
    images = dataset.train_images
    batch_size = min(batch_size, len(images)) // ranks() * ranks()
    if batch_size < 2 * ranks():
        raise InputError(f"teacher: {len(images)} images in batches of {batch_size} for {ranks()} processes: batch "
                         "norm and Eq. 1 need two images each (--teacher-batch, --train-images)")
    per_epoch = len(images) // batch_size
    steps = epochs * per_epoch
    warmup = min(10 * per_epoch, max(1, steps // 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=peak_lr, weight_decay=decay)

    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return to_device(torch.randperm(len(images), generator=generator(seed, "teacher order", epoch)), images.device)

    def views(step):
        epoch, i = divmod(step, per_epoch)
        batch = images[order(epoch)[i * batch_size:(i + 1) * batch_size][rank()::ranks()]]       # this rank's part
        pair = two_views(batch, stream(seed, "teacher views", step), (crop_scale, 1.0), gray, (rank(), ranks()))
        return torch.cat([normalize(v, dataset.mean, dataset.std) for v in pair]).contiguous(
            memory_format=torch.channels_last)

    precision = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
    untouched = copy.deepcopy(model.state_dict())                    # trial calls would move batch norm's statistics
    example = views(0)
    with precision:
        network = speed_up(model, (example,), steps, backward=True, compile_seconds=40)
    optimizer.zero_grad()
    model.load_state_dict(untouched)
    first = checkpoint.restore(model=model, optimizer=optimizer)
    if ranks() > 1:
        network = torch.nn.parallel.DistributedDataParallel(network)
    log.start(first)
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, warmup, peak_lr, 1e-3 * peak_lr) if ssl == "barlow" else peak_lr
        x = views(step)                                                             # [2B, 3, H, W], in float32
        with precision:
            z = network(x)                                                          # [2B, k]
        loss = teacher_loss(z, ssl, lambd, temperature)
        optimizer.zero_grad()
        (loss * ranks()).backward()                       # each rank has the gradient of its share; DDP averages them
        optimizer.step()
        judge = (step + 1) % max(1, steps // 10) == 0 or step + 1 == steps
        if log.due() or checkpoint.due() or judge:
            value = finite(loss, f"teacher: the loss at step {step}", f"lower --teacher-lr, {peak_lr:g}")
            if log.due() or judge:
                judged = monitor(model.eval()[0]) if judge and monitor else {}
                model.train()
                log("teacher", step + 1, steps, epoch=step // per_epoch, loss=value, **judged)
            if checkpoint.due():
                checkpoint.save(step + 1, model=model, optimizer=optimizer)
    return model.eval()


# ------------------------------------------------------------------------------------------------------------
# 2. Experts (Algorithm 1, line 2; Eq. 5 and 7)
# ------------------------------------------------------------------------------------------------------------
def student_loss(f):
    """What students minimise as a function of (theta, x, y): L_KD of Eq. 5 if y are representations [B, d].

    theta [P], normalised images x [B, 3, H, W]; for other y see `models.objective`.
    """
    return lambda theta, x, y: objective(functools.partial(f, theta), x, y)


def sgd_step(loss, momentum, decay):
    """One step of SGD with momentum on `loss`, as a pure function of flat parameters (and torch.optim.SGD's update)."""
    def step(theta, velocity, x, y, lr):
        g = torch.func.grad(loss)(theta, x, y) + decay * theta
        velocity = momentum * velocity + g
        return theta - lr * velocity, velocity
    return step


def adam_step(loss, decay, betas=(0.9, 0.999), eps=1e-8):
    """One step of torch.optim.Adam in the form of `sgd_step`. Its state [2P + 1]: both moments, the steps taken."""
    def step(theta, state, x, y, lr):
        m, v, t = state.split([len(theta), len(theta), 1])
        g = torch.func.grad(loss)(theta, x, y) + decay * theta
        m, v, t = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g, t + 1
        scale = (v / (1 - betas[1] ** t)).sqrt() + eps
        return theta - lr * m / (1 - betas[0] ** t) / scale, torch.cat([m, v, t])
    return step


def optimizer_of(loss, settings, theta):
    """(step, its first state) of a student's optimiser: SGD, but Adam for self-supervision (A.2)."""
    if settings["objective"] == "ssl":
        return adam_step(loss, settings["expert_decay"]), torch.zeros(2 * len(theta) + 1, device=theta.device)
    return sgd_step(loss, settings["expert_momentum"], settings["expert_decay"]), torch.zeros_like(theta)


def train_expert(step, theta, state, images, targets, prepare, epochs, lr, batch_size, seed, checkpoint=None):
    """One expert trajectory: theta*_0 .. theta*_epochs, the weights after each epoch, as [epochs + 1, P] (Eq. 7).

    step, state: the update of `sgd_step` and its velocity, zeros at first. images uint8 [n, 3, H, W], `prepare`
    normalises a batch; targets: Z_T [n, d], or what else `targets_of` knows.
    A fresh order each epoch, the short last batch kept, no augmentation of the images, constant rate.
    """
    trajectory = torch.empty(epochs + 1, len(theta), dtype=theta.dtype)
    trajectory[0] = theta                                     # on the CPU; rows are copies, not the live weights
    per_epoch = math.ceil(len(images) / batch_size)
    first = checkpoint.restore(theta=theta, velocity=state, trajectory=trajectory) if checkpoint else 0
    steps = enumerate(batches(len(images), batch_size, epochs, seed, "expert order", images.device))
    for s, (epoch, batch) in itertools.islice(steps, first, None):
        y = targets_of(targets, batch, stream(seed, "expert views", s))
        theta, state = step(theta, state, prepare(images[batch]), y, lr)
        if (s + 1) % per_epoch == 0:
            trajectory[epoch + 1] = theta
        if checkpoint and checkpoint.due():
            checkpoint.save(s + 1, theta=theta, velocity=state, trajectory=trajectory)
    return trajectory


def mean_loss(f, theta, images, targets, prepare):
    """What students minimise, of the first thousand images at most: a number for the log."""
    parts = torch.arange(min(1000, len(images)), device=images.device).split(evaluation.CHUNK)
    with torch.no_grad():
        return sum(len(part) * student_loss(f)(theta, prepare(images[part]), targets_of(targets, part, 0))
                   for part in parts) / min(1000, len(images))


# ------------------------------------------------------------------------------------------------------------
# 3. Initial distilled set (Algorithm 1, line 3; section 4.2)
# ------------------------------------------------------------------------------------------------------------
def loss_per_image(f, thetas, images, representations, prepare):
    """MSE of each image averaged over the experts' weights `thetas` after epoch 1 (section 4.2) -> [n]."""
    losses = [(evaluation.encode(lambda x: f(theta, x), images, prepare) - representations).square().mean(dim=1)
              for theta in thetas]
    return torch.stack(losses).mean(dim=0)


# ------------------------------------------------------------------------------------------------------------
# 4. Distillation (Algorithm 1, lines 4 - 19; Eq. 4 and 8)
# ------------------------------------------------------------------------------------------------------------
def inner_gradient(loss):
    """g(theta, x, y) = dL/dtheta: what one step of Eq. 8 subtracts, alpha_syn times."""
    return lambda theta, x, y: torch.func.grad(loss)(theta, x, y)


def inner_adjoint(loss):
    """(theta, x, y, v) -> (H v, d(g . v)/dx, g . v) with g = dL/dtheta and H = dg/dtheta.

    Differentiating the scalar g . v, itself a gradient, gives all three; H is never formed. (Forward over reverse does
    not compile; reverse over forward, by torch.func.jvp, leaves torch unusable where compiling fails.)
    """
    def adjoint(theta, x, y, v):
        def g_dot_v(theta, x):
            return torch.func.grad(loss)(theta, x, y) @ v
        (hv, gx), gv = torch.func.grad_and_value(g_dot_v, argnums=(0, 1))(theta, x)
        return hv, gx, gv
    return adjoint


def matching_gradient(gradient, adjoint, theta, target, images, lr, steps):
    """L_DD of Eq. 4 and its exact gradient with respect to the distilled images and the learned rate.

    theta, target: theta*_t and theta*_{t+M}, [P]; images [n, ...]; lr: alpha_syn, a scalar tensor; steps: the N pairs
    (b_n, y_n) of image indices and what belongs to them, rows of Z_syn for L_MSE; gradient, adjoint: `inner_gradient`
    and `inner_adjoint` of the loss.

    Forward, Eq. 8:   theta_{n+1} = theta_n - lr g_n,  g_n = g(theta_n, x_{b_n}, y_n);  all N + 1 are kept.
    Backward, with    v_n = dL_DD / dtheta_n:
        v_N = 2 (theta_N - target) / ||theta_0 - target||^2                                   (Eq. 4)
        v_n = (I - lr H_n)^T v_{n+1} = v_{n+1} - lr H_n v_{n+1}                 (H_n is symmetric)
        dL_DD / dx_{b_n} += -lr d(g_n . v_{n+1}) / dx          dL_DD / dlr += -g_n . v_{n+1}
    Each step is recomputed on the way back, so memory is one step's graph and N parameter vectors.

    Returns (loss, gradient of the images, gradient of the rate, distance), distance = ||theta_N - theta_0||^2 in the
    unit of Eq. 4's denominator.
    """
    thetas = [theta]
    for batch, y in steps:
        thetas.append(thetas[-1] - lr * gradient(thetas[-1], images[batch], y))

    scale = (theta - target).square().sum()
    v = 2 * (thetas[-1] - target) / scale
    grad_images, grad_lr = torch.zeros_like(images), torch.zeros_like(lr)
    for theta_n, (batch, y) in zip(reversed(thetas[:-1]), reversed(steps)):
        hv, gx, gv = adjoint(theta_n, images[batch], y, v)
        grad_images.index_add_(0, batch, gx * -lr)
        grad_lr -= gv
        v = v - lr * hv

    loss = (thetas[-1] - target).square().sum() / scale
    return loss, grad_images, grad_lr, (thetas[-1] - theta).square().sum() / scale


def draw_batches(n, steps, batch_size, rng):
    """`steps` mini-batches of 0..n-1: permutations cut in pieces of `batch_size` (the short one kept), as needed."""
    drawn = []
    while len(drawn) < steps:
        drawn += torch.randperm(n, generator=rng).split(batch_size)
    return drawn[:steps]


def draw_trajectory(experts, max_start_epoch, n, syn_steps, batch_size, rng):
    """Lines 6, 7 and 10 - 12: an expert, a start epoch t <= T+ and the mini-batches of N steps."""
    return (int(torch.randint(experts, (), generator=rng)), int(torch.randint(max_start_epoch + 1, (), generator=rng)),
            draw_batches(n, syn_steps, batch_size, rng))


def lower_median(x):
    """Median of the numbers in x [n] that are not NaN: torch.nanmedian, for which the host would wait on a GPU."""
    return x.nanquantile(0.5, interpolation="lower")


def clip_per_image(grad, medians, step, factor):
    """Scales each image's gradient [n, ...] to at most `factor` running medians of the per-image gradient norm.

    medians [W]: the medians of the last W iterations, NaN where there is none yet; this one's is written to it. A
    start at t = 0 can have gradients hundreds of times the usual, and one such step ruins the images.
    Returns (clipped gradient, number of images whose gradient was clipped).
    """
    norms = grad.flatten(1).norm(dim=1)                                                                        # [n]
    medians[step % len(medians)] = lower_median(torch.where(norms > 0, norms, torch.nan))     # 0: not in any mini-batch
    limit = (factor * lower_median(medians)).nan_to_num(torch.inf)              # no image has had a gradient yet: none
    scale = (limit / norms.clamp(min=1e-30)).clamp(max=1)
    return grad * scale.view(-1, *[1] * (grad.dim() - 1)), (scale < 1).sum()


def update(state, grad_images, grad_lr, step, pixel_lr, syn_lr_lr, momentum, clip):
    """Line 18, one step of SGD with momentum on D_syn and alpha_syn: (the new state, number of images clipped).

    state: images, lr, the velocity of both, and clip_per_image's medians. clip: see `clip_per_image`; one step then
    changes the rate by at most a factor of two. 0 is the plain update of the paper.
    """
    lr, medians, clipped = state["lr"], state["medians"].clone(), torch.zeros_like(grad_lr)
    if clip:
        grad_images, clipped = clip_per_image(grad_images, medians, step, clip)
    velocity = momentum * state["velocity"] + grad_images
    lr_velocity = momentum * state["lr_velocity"] + grad_lr
    new_lr = lr - syn_lr_lr * lr_velocity
    if clip:
        new_lr = new_lr.clamp(lr / 2, lr * 2)
    return {"images": state["images"] - pixel_lr * velocity, "velocity": velocity, "lr": new_lr,
            "lr_velocity": lr_velocity, "medians": medians}, clipped


def distill(gradient, adjoint, expert, experts, images, targets, iterations, trajectories, syn_steps,
            match_epochs, max_start_epoch, pixel_lr, syn_lr, syn_lr_lr, momentum, batch_size, clip, seed, log,
            checkpoint, snapshot=lambda iteration, images, lr: None):
    """Algorithm 1, lines 4 to 19. Returns the distilled images [n, 3, H, W], the learned rate and the iterations done.

    gradient, adjoint: see `matching_gradient`. expert(i): trajectory i of `experts`, [T + 1, P], on any device.
    images, targets: D_syn as initialised and Z_syn, which stays fixed (or what else `targets_of` knows).
    trajectories: draws of expert and start epoch whose gradients an iteration averages, divided over the ranks; one in
    Algorithm 1. pixel_lr, syn_lr_lr, momentum, clip: see `update`. snapshot(iteration, images, lr) is called every
    1,000 iterations and before one that is not usable.
    Logged, as means since the last line: Eq. 4's loss; the learned rate; mean absolute change of the pixels (in
    standard deviations); the inner loop's distance from theta*_t over the expert's; images clipped an iteration.
    Raises InputError at an iteration whose loss or gradient is not finite or whose rate is not positive; the state
    before it is saved.
    """
    device, initial = images.device, images
    state = {"images": images.clone(), "velocity": torch.zeros_like(images),
             "lr": torch.tensor(float(syn_lr), device=device), "lr_velocity": torch.zeros((), device=device),
             "medians": torch.full((101,), float("nan"), device=device)}
    first = checkpoint.restore(**state)
    images, lr, recent = state["images"], state["lr"], []
    broken = torch.tensor([-1.0, 0, 0, 0], device=device)          # first bad iteration, its loss, gradient and rate

    def draw(s):
        rng = generator(seed, "distill", s)
        return [draw_trajectory(experts, max_start_epoch, len(images), syn_steps, batch_size, rng)
                for _ in range(trajectories)]

    log.start(first)
    for s in range(first, iterations):                                                             # line 5
        results = []
        for k, (i, t, drawn) in list(enumerate(draw(s)))[rank()::ranks()]:              # lines 6, 7 and 10 - 12
            theta, target = (to_device(expert(i)[epoch], device) for epoch in (t, t + match_epochs))    # lines 8, 9
            drawn = to_device(torch.cat(drawn), device).split([len(b) for b in drawn])
            steps = [(b, targets_of(targets, b, stream(seed, "distill views", s, k, n)))        # (b_n, Z_syn[b_n])
                     for n, b in enumerate(drawn)]
            results.append(matching_gradient(gradient, adjoint, theta, target, images, lr, steps))  # lines 13 - 17
        loss, grad_images, grad_lr, travelled = (average_over_ranks(torch.stack(r).mean(dim=0)) for r in zip(*results))
        new, clipped = update(state, grad_images, grad_lr, s, pixel_lr, syn_lr_lr, momentum, clip)      # line 18
        # Whether all is well is decided on the device: the host does not wait, and a bad update is never made.
        norm = grad_images.norm() + grad_lr.abs()
        good = (broken[0] < 0) & loss.isfinite() & norm.isfinite() & new["lr"].isfinite() & (new["lr"] > 0)
        good &= new["images"].isfinite().all()
        found = torch.stack([torch.full_like(loss, s), loss, norm, new["lr"]])
        broken = torch.where(good | (broken[0] >= 0), broken, found)
        for name, value in new.items():
            state[name].copy_(torch.where(good, value, state[name]))

        recent.append(torch.stack([loss, travelled.sqrt(), clipped.to(loss)]))
        last, milestone = s + 1 == iterations, (s + 1) % 1000 == 0
        show = log.due() or last
        if show or milestone or checkpoint.due():                    # only here does the host wait for the device
            if rank() == 0 and broken[0] >= 0:
                at = int(broken[0])
                checkpoint.save(at, **state)
                snapshot(at, images, lr)
                raise not_usable(broken.tolist(), lr.item(), draw(at), pixel_lr, syn_lr, syn_lr_lr, clip)
            means = torch.stack(recent).mean(dim=0).tolist()
            if show:
                log("distill", s + 1, iterations, loss=means[0], lr=lr.item(),
                    moved=(images - initial).abs().mean().item(), travelled=means[1],
                    **({"clipped": means[2]} if clip else {}))
                recent = []
            if milestone:
                snapshot(s + 1, images, lr)
            if checkpoint.due() or last:                             # kept at the end, so that it can be extended
                checkpoint.save(s + 1, **state)
    return images, lr, max(first, iterations)


def not_usable(broken, lr, trajectories, pixel_lr, syn_lr, syn_lr_lr, clip):
    """The InputError for an iteration of `distill` that is not applied: its [number, loss, gradient norm, new rate]."""
    at, loss, norm, new_lr = broken
    starts = ", ".join(f"expert {i} from epoch {t}" for i, t, _ in trajectories)
    return InputError(
        f"distill: iteration {at:.0f} is not usable: loss {loss:.3g}, gradient norm {norm:.3g}, new rate {new_lr:.3g}, "
        f"old {lr:.3g}, {starts}. The state before it is saved. Lower --pixel-lr {pixel_lr:g}, --syn-lr-lr "
        f"{syn_lr_lr:g} or --syn-lr {syn_lr:g}, or give a smaller --clip (now {clip:g}; 0: none), with --force, which "
        "begins anew and removes distilled_*.pt")


def finite(tensor, what, remedy):
    """The number in `tensor`, or InputError naming `what` and the remedy if it is NaN or infinite."""
    value = tensor.item()
    if not math.isfinite(value):
        raise InputError(f"{what} is {value}: {remedy}")
    return value


# ------------------------------------------------------------------------------------------------------------
# Pictures
# ------------------------------------------------------------------------------------------------------------
def draw_picture(named, columns=16, bands=3, zoom=3):
    """A picture (PIL) of bands of `columns` images, each with a row for every one of `named`: {name: [n, 3, H, W]}, in
    [0, 1], the first of each below one another."""
    n = min(len(next(iter(named.values()))), columns * bands)
    columns, bands = min(columns, n), math.ceil(n / columns)
    pixels = {name: (x[:n] * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for name, x in named.items()}
    side, margin, gap = next(iter(named.values())).shape[-1] * zoom, 62, 8
    height = len(named) * (side + 2) + gap
    canvas = Image.new("RGB", (margin + columns * (side + 2), bands * height + gap), "white")
    pen = ImageDraw.Draw(canvas)
    for band in range(bands):
        for row, (name, tiles) in enumerate(pixels.items()):
            top = gap + band * height + row * (side + 2)
            pen.text((3, top + side // 2 - 6), name, fill="black")
            for column, i in enumerate(range(band * columns, min(n, (band + 1) * columns))):
                tile = Image.fromarray(tiles[i]).resize((side, side), Image.Resampling.NEAREST)
                canvas.paste(tile, (margin + column * (side + 2), top))
    return canvas


def nearest(images, real, prepare, count=4):
    """Indices [n, count] of the real images (uint8) nearest to each of `images` in normalised pixels."""
    distance = evaluation.encode(lambda x: torch.cdist(x.flatten(1), images.flatten(1)), real, prepare)
    return distance.topk(count, dim=0, largest=False).indices.T


def draw_curves(log):
    """A figure of the numbers in log.jsonl against steps, a panel for each. ImportError where matplotlib is missing."""
    from matplotlib.figure import Figure
    records = []
    for line in log.read_text().splitlines():
        with contextlib.suppress(ValueError):                                          # cut off by a kill
            new = json.loads(line)
            about = new["stage"], new.get("set")              # what was done again since is what counts
            records = [r for r in records
                       if (r["stage"], r.get("set")) != about or r.get("step", 0) < new.get("step", 0)] + [new]
    panels = [(stage, name) for stage in ("teacher", "experts", "distill") for name in dict.fromkeys(
        k for r in records if r["stage"] == stage for k, v in r.items() if isinstance(v, (float, str)) and k not in (
            "stage", "time", "rate", "set"))]
    figure = Figure(figsize=(4 * min(4, len(panels)), 3 * math.ceil(len(panels) / 4)), layout="constrained")
    for at, (stage, name) in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / 4), min(4, len(panels)), at + 1)
        mine = [r for r in records if r["stage"] == stage and name in r]
        for of in dict.fromkeys(r.get("set") for r in mine):                   # one line for each distilled set
            of_set = [r for r in mine if r.get("set") == of]
            if isinstance(of_set[-1][name], str):                              # the last expert's loss at each epoch
                axes.plot([float(v) for v in of_set[-1][name].split()])
                axes.set(title=f"experts: {name.replace('_', ' ')}", xlabel="epoch")
            else:
                axes.plot([r["step"] for r in of_set], [r[name] for r in of_set], label=of)
                axes.set(title=f"{stage}: {name}", xlabel="step" if stage == "teacher" else "iteration")
        if stage == "distill" and len(axes.lines) > 1:
            axes.legend(fontsize="small")
    return figure


# ------------------------------------------------------------------------------------------------------------
# Stages: the functions above, tied to files
# ------------------------------------------------------------------------------------------------------------
class Run:
    """A run: its settings, data and folders. `run_dir` is shared by every distilled set of one data set (teacher,
    experts); `set_dir` below it holds one distilled set."""

    def __init__(self, args, settings, device):
        self.settings, self.seed, self.force = settings, args.seed, args.force
        # Augmentations are other functions in every step, which cannot be compiled once.
        self.compile = "off" if settings["objective"] == "ssl" else args.compile
        if args.deterministic and self.compile == "auto":                            # which a timing would decide
            self.compile = "off"
        if args.representations and settings["objective"] != "kd":
            raise InputError(f"--representations are for --objective kd, {settings['objective']} has no teacher")
        self.data_dir, self.minutes, self.device = args.data_dir, args.checkpoint_minutes, device
        self.dataset_name = args.dataset
        with rank_0_first():                                                         # one rank downloads and decodes
            self.dataset = load_dataset(args.dataset, args.data_dir, settings["image_size"], self.device,
                                        settings["train_images"])
        system = "" if settings["objective"] == "kd" else f"_{settings['objective']}"
        self.run_dir = Path(getattr(args, "run_dir", Path("runs") / (self.dataset.name + system)))
        self.set_dir = self.run_dir / f"{settings['percent']:g}pct_{settings['init']}"
        self.size = math.floor(len(self.dataset.train_images) * settings["percent"] / 100 + 1e-9)
        if not 1 <= self.size <= len(self.dataset.train_images):
            raise InputError(f"--percent {settings['percent']:g} of {len(self.dataset.train_images)} training images "
                             f"is {self.size} images: it must leave at least one and at most all")
        self.representations_file = args.representations
        self.data_fingerprint = self.dataset.fingerprint()
        self.log = Log(None if rank() else self.run_dir / "log.jsonl", args.log_seconds, set=self.set_dir.name)

    def folder(self, stage):
        """Where a stage's files and the config.json that describes them lie."""
        return self.run_dir if stage in ("teacher", "experts") else self.set_dir

    def inputs(self, stage, complete=False):
        """What `stage` depends on: its settings and those of the stages above it, the seed, the data, and the content
        of the files that it reads from the stages above (InputError if one is missing and it must be `complete`)."""
        upstream = ["data", *STAGES][:list(STAGES).index(stage) + 2]
        values = {k: self.settings[k] for k, (s, *_) in SETTINGS.items() if s in upstream}
        if "trajectories_per_step" in values:
            values["trajectories_per_step"] *= ranks()           # two ranks with one each are one rank with two
        without_teacher = self.settings["objective"] != "kd"
        if self.representations_file or without_teacher:
            kept = ("crop_scale", "gray") if self.settings["objective"] == "ssl" else ()
            values = {k: v for k, v in values.items() if SETTINGS[k][0] != "teacher" or k in kept}
        if not without_teacher:
            values.pop("objective", None)                       # Eq. 5, as it always was: an older run goes on
        if self.settings["objective"] == "ce":
            values["labels"] = fingerprint(self.dataset.train_labels)
        if self.representations_file:
            values["representations_file"] = fingerprint(Path(self.representations_file))
        reads = {"representations": self.run_dir / "representations.pt"}
        if stage == "teacher" or without_teacher:
            reads = {}
        if stage in ("distill", "eval"):
            reads["initial_images"] = self.set_dir / "init.pt"
        for path in reads.values():
            if complete and not path.exists():
                raise InputError(f"{path} does not exist: run the stage that makes it first (--stage all)")
        return {"dataset": self.dataset.name, "data": self.data_fingerprint, "seed": self.seed, **values,
                **{k: fingerprint(path) for k, path in reads.items() if path.exists()}}

    def differences(self, stage):
        """What `stage` was made with that is otherwise now, as {name: (then, now)}; empty if it was not made yet."""
        config = self.config(self.folder(stage)).get(stage)
        then, now = (config["inputs"], self.inputs(stage)) if config else ({}, {})
        return {k: (then.get(k), now.get(k)) for k in [*then, *now] if then.get(k) != now.get(k)}

    def check(self, requested):
        """Refuses, before anything runs, to mix `requested` stages with others made with other settings."""
        last = list(STAGES).index(requested[-1])
        for stage in list(STAGES)[:last + 1]:
            differs = self.differences(stage)
            if differs and not (self.force and stage in requested):
                told = ", ".join(f"{k} {then} -> {now}" for k, (then, now) in differs.items())
                told += " counting all processes" * ("trajectories_per_step" in differs)
                raise InputError(f"{self.folder(stage)} holds the stage {stage} of another run ({told}): give another "
                                 "--run-dir, or --force to make it (and, with --stage all, what follows) again")

    def claim(self, stage, *outputs):
        """Ties the files `outputs` (patterns) of `stage` to its inputs; with --force, removes those of other inputs."""
        with rank_0_first():
            self.check([stage])
            if rank():
                return
            folder, config, differs = self.folder(stage), self.config(self.folder(stage)), self.differences(stage)
            inputs = self.inputs(stage, complete=True)
            if differs:
                print(f"{stage}: made again ({', '.join(differs)})", flush=True)
                for file in (f for pattern in outputs for f in folder.glob(pattern)):
                    file.unlink()
            if differs or stage not in config:
                config[stage] = {"inputs": inputs}
            # The protocol of evaluation is kept as it is unless evaluation itself is asked for with another.
            kept = {k: v for k, v in config.get("settings", {}).items()
                    if stage != "eval" and SETTINGS.get(k, ("",))[0] == "eval"}
            config["settings"] = {"dataset": self.dataset_name, "seed": self.seed, **self.settings, **kept}
            config["versions"] = {"torch": torch.__version__, "device": str(self.device), "ranks": ranks(),
                                  "threads": torch.get_num_threads(),
                                  "deterministic": torch.are_deterministic_algorithms_enabled()}
            save_json(folder / "config.json", config)

    def config(self, folder):
        """The content of a folder's config.json; empty if there is none."""
        return read_json(folder / "config.json") if (folder / "config.json").exists() else {}

    def require_step_memory(self, stage, model, images, lower, beside=0):
        """Refuses a stage whose step on so many images cannot fit into memory: what the layers of `model` put out is
        kept for the way back, `beside` that many bytes. lower: the flags that would make it less."""
        model.eval()                                                            # a train mode would count the image
        one = activation_bytes(model, self.dataset.batch(self.dataset.train_images[:1]))
        model.train()
        require_memory(self.device, images * one + beside, f"{stage}: a step", lower)

    def speed_up(self, stage):
        """A function speed_up(f, example, steps) that times f, says what the stage will take, and compiles f if that
        pays. The choice is kept in config.json, so that a resumed run computes the same numbers."""
        folder = self.folder(stage)

        def choose(f, example, steps, name="step", **options):
            config = self.config(folder)
            kept = config[stage].setdefault("compiled", {})
            known = name in kept and self.compile == "auto"
            mode = ("on" if kept[name] else "off") if known else self.compile
            f, kept[name], seconds = compile_if_it_pays(f, example, steps, mode, **options)
            if rank() == 0:
                save_json(folder / "config.json", config)
            how = ("compiled" if kept[name] else "eager") + ", as before" * known
            print(f"{stage}: {steps} x {name}, {how}, about "
                  f"{duration(seconds * steps)}", flush=True)
            return f
        return choose


def teacher_stage(run):
    """Trains the teacher and encodes the data: teacher.pt, representations.pt [n, d], representations_test.pt."""
    s, data, folder = run.settings, run.dataset, run.run_dir
    if s["objective"] != "kd":
        return print(f"teacher: --objective {s['objective']} needs none", flush=True)
    given = run.representations_file and read_representations(run.representations_file, len(data.train_images))
    run.claim("teacher", "teacher*.pt", "representations*.pt")
    if (folder / "representations.pt").exists():
        return
    if given is not None:
        return None if rank() else save(folder / "representations.pt", given)
    size = len(data.train_images) * 8 * s["teacher_width"] * 4
    print(f"teacher: {size / 1e6:.0f} MB of representations on disk")
    require_space(folder, size, "teacher: the representations")
    encoder = build(lambda: models.resnet18(width=s["teacher_width"], max_pool=bool(s["max_pool"])),
                    run.seed, "teacher")
    head = build(lambda: models.projector(s["ssl"], encoder.feature_dim), run.seed, "projector")
    model = torch.nn.Sequential(encoder, head).to(run.device).to(memory_format=torch.channels_last)
    bf16, speed_up = use_bf16(s, run.device), run.speed_up("teacher")
    if ranks() > 1 and run.device.type == "cuda":               # torch has it for GPUs only: on CPUs each rank's own
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        speed_up = lambda f, *rest, **options: f                # and cannot compile it into one graph
    if (folder / "teacher.pt").exists():
        encoder.load_state_dict(load(folder / "teacher.pt"))
    else:
        views = 2 * min(s["teacher_batch"], len(data.train_images)) // ranks()
        run.require_step_memory("teacher", encoder, views / 2 if bf16 else views, "--teacher-batch")
        monitor = (lambda encoder: {"knn": teacher_knn(encoder, data)}) if data.labelled else None
        with Checkpoint(folder / "teacher_checkpoint.pt", run.minutes, bf16=bf16, processes=ranks()) as checkpoint:
            train_teacher(model, data, s["ssl"], s["teacher_epochs"], s["teacher_batch"], s["teacher_lr"],
                          s["teacher_decay"], s["lambd"], s["temperature"], s["crop_scale"], s["gray"], bf16, run.seed,
                          run.log, checkpoint, speed_up, monitor)
    if rank():
        return
    encoder.eval()
    z = evaluation.encode(encoder.features, data.train_images, data.batch)                               # Z_T  [n, d]
    z = check_representations(z.cpu(), "the teacher's representations (give another --teacher-lr, with --force)")
    save(folder / "teacher.pt", encoder.state_dict())
    if len(data.test_images):
        save(folder / "representations_test.pt",
             evaluation.encode(encoder.features, data.test_images, data.batch).cpu())
    save(folder / "representations.pt", z)
    (folder / "teacher_checkpoint.pt").unlink(missing_ok=True)


def use_bf16(settings, device):
    """Whether the teacher runs in bfloat16: --bf16, which means on GPUs that have it if it is auto."""
    return settings["bf16"] == "on" or (settings["bf16"] == "auto" and device.type == "cuda"
                                        and torch.cuda.is_bf16_supported(including_emulation=False))


def teacher_knn(encoder, data, bank=10000, queries=2000):
    """kNN accuracy in percent of the encoder's features, on so many training and test images: the teacher's health."""
    train, test = (torch.randperm(len(images), generator=generator(0, "knn"))[:count].to(images.device)
                   for images, count in ((data.train_images, bank), (data.test_images, queries)))
    z, z_test = (evaluation.encode(encoder.features, images, data.batch)
                 for images in (data.train_images[train], data.test_images[test]))
    return evaluation.knn_accuracy(z, data.train_labels[train], z_test, data.test_labels[test])


def check_representations(z, source, n=None):
    """z as float32 [n, d], or InputError if it has another shape, is not finite, or is constant."""
    if z.dim() != 2 or (n is not None and len(z) != n):
        raise InputError(f"{source}: expected [n, d], a row for each of the {n} training images, not {list(z.shape)}")
    z = z.detach().float()
    if not z.isfinite().all():
        raise InputError(f"{source}: {int((~z.isfinite()).sum())} of {z.numel()} numbers are NaN or infinite")
    if (z == z[0]).all():
        raise InputError(f"{source}: every image has the same representation, so there is nothing to learn from them")
    return z


def read_representations(path, n):
    """--representations FILE: [n, d] numbers from .npy or .pt, by any model, in the order of the training images."""
    if Path(path).suffix == ".npy":
        try:
            z = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        except Exception as error:                             # numpy's parser of the header has a family of its own
            raise InputError(f"{path} is not a readable .npy file of numbers ({first_line(error)})") from error
    else:
        z = load(path)
        if not torch.is_tensor(z):
            raise InputError(f"{path} holds a {type(z).__name__}, not a tensor [n, d]")
    return check_representations(z, path, n)


def student(run, d):
    """A freshly built ConvNet with output dimension d, for its architecture, and the function f(theta, x)."""
    model = ConvNet(d, run.dataset.image_size, run.settings["width"]).to(run.device)
    return model, functional(model)


def experts_stage(run):
    """Trains the expert trajectories that are missing: experts/expert_000.pt ..., each flat float32 [T + 1, P]."""
    s, data, folder = run.settings, run.dataset, run.run_dir
    run.claim("experts", "experts/*.pt", "experts/*.checkpoint")
    missing = from_rank_0([] if rank() else [i for i in range(s["experts"]) if not whole(expert_file(folder, i))])
    if not missing:
        return
    targets, d = evaluation.student_targets(s, data, folder)
    (model, f), n = student(run, d), len(data.train_images)
    size, P, epochs = min(s["expert_batch"], n), flat_parameters(model).numel(), s["expert_epochs"]
    steps = math.ceil(len(missing) / ranks()) * epochs * math.ceil(n / size)
    print(f"experts: {len(missing)} of {epochs} epochs, {len(missing) * (epochs + 1) * P * 4 / 1e6:.0f} MB on disk",
          flush=True)
    require_space(folder, len(missing) * (epochs + 1) * P * 4, "experts: the trajectories")
    run.require_step_memory("experts", model, size, "--expert-batch")
    theta, first = flat_parameters(model), torch.arange(size, device=run.device)
    step, state = optimizer_of(student_loss(f), s, theta)
    y = targets_of(targets, first, 0)
    example = theta, state, data.batch(data.train_images[:size]), y, s["expert_lr"]
    step = run.speed_up("experts")(step, example, steps)
    missing = missing[rank()::ranks()]
    run.log.start()
    for done, i in enumerate(missing):
        theta = flat_parameters(build(lambda: student(run, d)[0], run.seed, "expert", i))
        path = expert_file(folder, i)
        with Checkpoint(path.with_suffix(".checkpoint"), run.minutes, every_rank=True) as checkpoint:
            trajectory = train_expert(step, theta, torch.zeros_like(state), data.train_images, targets, data.batch,
                                      epochs, s["expert_lr"], size, stream(run.seed, "expert", i), checkpoint)
        if not trajectory[-1].isfinite().all():
            raise InputError(f"experts: expert {i} diverged (lower --expert-lr, now {s['expert_lr']})")
        save(path, trajectory)
        checkpoint.remove()
        if run.log.due() or done + 1 == len(missing):
            losses = [mean_loss(f, theta.to(run.device), data.train_images, targets, data.batch)
                      for theta in trajectory]
            run.log("experts", done + 1, len(missing), unit="expert",
                    loss_per_epoch=" ".join(f"{loss:.4f}" for loss in losses))


def expert_file(folder, i):
    """Where expert i is kept."""
    return folder / "experts" / f"expert_{i:03d}.pt"


def whole(path):
    """Whether the file is there and undamaged; a damaged one is said to be made again."""
    try:
        return path.exists() and load(path, mmap=True) is not None
    except InputError as error:
        print(f"{error}; it is made again", flush=True)
        return False


def init_stage(run):
    """Chooses the initial distilled set: SET/init.pt, their indices and the loss of every training image."""
    s, data, folder, n = run.settings, run.dataset, run.run_dir, len(run.dataset.train_images)
    z, d = evaluation.student_targets(s, data, folder)
    run.claim("init", "init.pt")
    if from_rank_0((run.set_dir / "init.pt").exists()):
        return
    chosen = torch.randperm(n, generator=generator(run.seed, "init"))[:run.size]
    if s["objective"] != "kd":                                               # section 4.2's loss is to the teacher
        return None if rank() else save(run.set_dir / "init.pt", {"indices": chosen})
    model, f = student(run, d)
    example = flat_parameters(model), data.batch(data.train_images[:evaluation.CHUNK])
    print(f"init: {len(z)} images under {s['experts']} experts, {len(z) * 4 / 1e6:.1f} MB on disk", flush=True)
    with torch.no_grad():                                   # as in `encode`: else it would be compiled there again
        fast = run.speed_up("init")(f, example, s["experts"] * math.ceil(len(z) / evaluation.CHUNK), "loss")
    if rank():
        return

    def represent(theta, x):
        return (fast if len(x) == len(example[1]) else f)(theta, x)
    thetas = (load(expert_file(folder, i), mmap=True)[1].to(run.device) for i in range(s["experts"]))
    losses = loss_per_image(represent, thetas, data.train_images, z, data.batch).cpu()
    if s["init"] == "high_loss":
        chosen = evaluation.highest(losses, run.size)
    save(run.set_dir / "init.pt", {"indices": chosen, "losses": losses})


def distill_stage(run):
    """Distils: SET/distilled.pt, its snapshots every 1,000 iterations, and pictures."""
    s, data, folder = run.settings, run.dataset, run.set_dir
    run.claim("distill", "distill*", "neighbours.png", "curves.png")
    result = folder / "distilled.pt"
    done = from_rank_0(load(result)["iterations"] if result.exists() else -1)
    if done >= s["iterations"]:
        if done > s["iterations"]:
            print(f"distill: {result} has {done} iterations already; earlier ones are in distilled_*.pt", flush=True)
        return
    targets, d = evaluation.student_targets(s, data, run.run_dir)
    chosen = load(folder / "init.pt")["indices"]
    images = data.batch(data.train_images[chosen.to(run.device)])
    targets = targets if callable(targets) else targets[chosen.to(run.device)]                              # Z_syn
    model, f = student(run, d)
    trajectories = [load(expert_file(run.run_dir, i), mmap=True) for i in range(s["experts"])]
    if run.device.type != "cpu" and s["experts"] * trajectories[0].nbytes < free_memory(run.device) / 2:
        trajectories = [t.to(run.device) for t in trajectories]              # then no iteration waits for the disk
    print(f"distill: {len(images)} images, {3 * images.numel() * 4 / 1e6:.0f} MB on disk and "
          f"{images.numel() * 4 / 1e6:.0f} MB every 1,000 iterations", flush=True)
    require_space(folder, (5 + s["iterations"] // 1000) * images.numel() * 4, "distill: the distilled sets")
    speed_up, size = run.speed_up("distill"), min(s["syn_batch"], len(images))
    run.require_step_memory("distill", model, 2 * size, "--syn-batch or --syn-steps",          # there and back, twice
                            beside=4 * (s["syn_steps"] * trajectories[0].shape[1] + 4 * images.numel()))
    theta, steps = trajectories[0][0].to(run.device), s["iterations"] * s["syn_steps"]
    example = theta, images[:size], targets_of(targets, torch.arange(size, device=run.device), 0)
    gradient = speed_up(inner_gradient(student_loss(f)), example, steps, name="gradient")
    adjoint = speed_up(inner_adjoint(student_loss(f)), (*example, theta.clone()), steps, name="adjoint")

    def write(iteration, images, lr, path):
        if rank():
            return
        y = {"kd": "representations", "ce": "labels"}.get(s["objective"])
        save(path, {"images": images.cpu().contiguous(), **({y: targets.cpu()} if y else {}), "lr": lr.item(),
                    "mean": data.mean, "std": data.std, "indices": chosen, "dataset": run.dataset_name,
                    "percent": s["percent"], "iterations": iteration})

    def snapshot(iteration, images, lr):
        write(iteration, images, lr, folder / f"distilled_{iteration:05d}.pt")

    with Checkpoint(folder / "distill_checkpoint.pt", run.minutes) as checkpoint:
        final, lr, done = distill(
            gradient, adjoint, lambda i: trajectories[i], s["experts"], images, targets, s["iterations"],
            trajectories=s["trajectories_per_step"] * ranks(), syn_steps=s["syn_steps"],
            match_epochs=s["match_epochs"], max_start_epoch=s["max_start_epoch"], pixel_lr=s["pixel_lr"],
            syn_lr=s["syn_lr"], syn_lr_lr=s["syn_lr_lr"], momentum=s["syn_momentum"], batch_size=s["syn_batch"],
            clip=s["clip"], seed=run.seed, log=run.log, checkpoint=checkpoint, snapshot=snapshot)
    if rank():
        return
    draw_results(run, images, final)
    write(done, final, lr, result)                                       # last: it is what marks the stage as finished


def draw_results(run, initial, final):
    """Writes distilled.png, neighbours.png and, where matplotlib is installed, curves.png."""
    data = run.dataset
    before, after = (denormalize(x, data.mean, data.std) for x in (initial, final))
    change = (after - before + 0.5).clamp(0, 1)                                           # grey: where nothing changed
    pictures = {"distilled.png": draw_picture({"initial": before, "distilled": after, "difference": change})}
    found = nearest(final[:16], data.train_images, data.batch, min(4, len(data.train_images)))
    rows = {f"nearest {k + 1}": data.train_images[column].float() / 255 for k, column in enumerate(found.T)}
    pictures["neighbours.png"] = draw_picture({"distilled": after[:16], **rows}, bands=1)
    for name, picture in pictures.items():
        write_file(run.set_dir / name, lambda file: picture.save(file, "PNG"))
    try:
        figure = draw_curves(run.log.path)
        write_file(run.set_dir / "curves.png", lambda file: figure.savefig(file, format="png", dpi=120))
    except ImportError:
        pass
    except Exception as error:                                                       # nothing that is needed is lost
        print(f"distill: curves.png is left out ({first_line(error)})", flush=True)


def eval_stage(run):
    """Evaluates the distilled set beside its baselines (eval.py) and prints the table and where the picture is."""
    run.claim("eval", "results.*")
    if not run.dataset.labelled:
        return print(f"eval: {run.dataset.name} has no labels in both splits; to probe on another data set:\n"
                     f"      python eval.py --run-dir {run.set_dir} --tasks cifar10")
    sets = [name for name in evaluation.DEFAULT_SETS if run.settings["objective"] == "kd" or "high_loss" not in name]
    evaluation.evaluate(run.set_dir, sets, data_dir=run.data_dir, device=run.device, compile=run.compile,
                        reference="random")
    print(f"\n{(run.set_dir / 'results.md').read_text()}\nresults: {run.set_dir / 'results.md'}\n"
          f"picture: {run.set_dir / 'distilled.png'}")


STAGES = {"teacher": teacher_stage, "experts": experts_stage, "init": init_stage, "distill": distill_stage,
          "eval": eval_stage}


# ------------------------------------------------------------------------------------------------------------
# Bench: what the run will cost on this machine
# ------------------------------------------------------------------------------------------------------------
def unrolled_gradient(loss, theta, target, images, lr, steps):
    """What `matching_gradient` computes, as other implementations do: back-propagation through all N steps at once.

    Equal up to rounding; its memory grows with N. For comparison only. Returns (loss, images' and rate's gradient).
    """
    images, lr, theta_n = (x.detach().requires_grad_() for x in (images, lr, theta))
    for batch, y in steps:
        g, = torch.autograd.grad(loss(theta_n, images[batch], y), theta_n, create_graph=True)
        theta_n = theta_n - lr * g
    value = (theta_n - target).square().sum() / (theta - target).square().sum()
    return value.detach(), *torch.autograd.grad(value, (images, lr))


def measure(f, example, backward=False, calls=3, enough=5.0):
    """(median seconds of so many calls of f, fewer where they take `enough` seconds; peak bytes meanwhile: of the GPU,
    with those of all graphs that it can replay, or of this process)."""
    device, status = example[0].device, Path("/proc/self/status")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):                                # Linux: sets the peak to what is in use now
            Path("/proc/self/clear_refs").write_text("5")
    taken = []
    while len(taken) < calls and sum(taken) < enough:
        taken.append(seconds_a_call(f, example, backward))
    seconds = statistics.median(taken)
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated(device) + graph_memory(device)
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.exists() else None
    return seconds, 1024 * int(peak.group(1)) if peak else math.nan


def steps_to_time(run, z):
    """What a run does over and over: (name, function, arguments, FLOPs and images of a call, calls in the whole run,
    backward pass too, compiled if it pays). z: any representations [n, d]."""
    s, data, n = run.settings, run.dataset, len(run.dataset.train_images)
    encoder = models.resnet18(width=s["teacher_width"], max_pool=bool(s["max_pool"]))
    teacher = torch.nn.Sequential(encoder, models.projector(s["ssl"], encoder.feature_dim))
    teacher = teacher.to(run.device).to(memory_format=torch.channels_last)
    model, f = student(run, z.shape[1])
    loss, theta = student_loss(f), flat_parameters(model)
    real, expert, syn, chunk = (data.train_images[:min(count, limit)] for count, limit in (
        (s["teacher_batch"], n), (s["expert_batch"], n), (s["syn_batch"], run.size), (evaluation.CHUNK, n)))
    x, x_expert, views = data.batch(syn), data.batch(expert), data.batch(real).repeat(2, 1, 1, 1)
    chunks, S_N = math.ceil(n / len(chunk)), s["iterations"] * s["syn_steps"]
    teacher_steps = s["teacher_epochs"] * (n // len(real))
    expert_steps = s["expert_epochs"] * math.ceil(n / len(expert))
    pre = data.train_images[:min(s["pretrain_batch"], n)]
    x_pre = data.batch(pre)
    sizes = {"none": 0, "full": n}                                                     # the default table, three seeds
    table_steps = 3 * s["pretrain_epochs"] * sum(math.ceil(sizes.get(name, run.size) / len(pre))
                                                 for name in evaluation.DEFAULT_SETS)

    def project(views):
        with torch.autocast(run.device.type, torch.bfloat16, enabled=use_bf16(s, run.device)):
            return teacher(views)

    def augment(images):
        return two_views(images, 0, (s["crop_scale"], 1.0), gray=s["gray"])[0]

    def flops(network, x, passes):
        """FLOPs of so many forward passes: 3 for a gradient, 9 for an adjoint, which goes back through a gradient."""
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x)
        return passes * counter.get_total_flops()

    encode = torch.no_grad()(lambda x: encoder.features(data.batch(x)))
    views = views.contiguous(memory_format=torch.channels_last)
    velocity, z_expert, z_syn = torch.zeros_like(theta), z[:len(expert)], z[:len(x)]
    step = sgd_step(loss, s["expert_momentum"], s["expert_decay"])
    return [
        ("teacher: two views", augment, (real,), 0, len(views), teacher_steps, False, False),
        ("teacher: step", project, (views,), flops(teacher, views, 3), len(views), teacher_steps, True, True),
        ("teacher: encode", encode, (chunk,), flops(encoder, data.batch(chunk), 1), len(chunk), chunks, False, False),
        ("experts: step", step, (theta, velocity, x_expert, z_expert, s["expert_lr"]), flops(model, x_expert, 3),
         len(expert), s["experts"] * expert_steps, False, True),
        ("init: loss", torch.no_grad()(f), (theta, data.batch(chunk)), flops(model, data.batch(chunk), 1), len(chunk),
         s["experts"] * chunks, False, True),
        ("distill: gradient", inner_gradient(loss), (theta, x, z_syn), flops(model, x, 3), len(x), S_N, False, True),
        ("distill: adjoint", inner_adjoint(loss), (theta, x, z_syn, theta.clone()), flops(model, x, 9), len(x), S_N,
         False, True),
        ("eval: pre-training", lambda x, z: F.mse_loss(model(x), z), (x_pre, z[:len(pre)]), flops(model, x_pre, 3),
         len(pre), table_steps, True, True),
    ]


def compare_gradients(run, z, gradient, adjoint):
    """Time and peak memory of Eq. 4's gradient against N: plain unrolling, eager and with group norm, and ours."""
    s = run.settings
    model, _ = student(run, z.shape[1])
    plain, theta = copy.deepcopy(model), flat_parameters(model)
    plain.norms = torch.nn.ModuleList(torch.nn.GroupNorm(s["width"], s["width"]) for _ in plain.norms).to(run.device)
    versions = {"exact adjoint": functools.partial(matching_gradient, gradient, adjoint),
                "unrolled, eager": functools.partial(unrolled_gradient, student_loss(functional(plain)))}
    images, target = run.dataset.batch(run.dataset.train_images[:run.size]), theta + 0.01 * torch.randn_like(theta)
    rows = []
    for name, version in versions.items():
        growth = 0                                                                                # bytes a step more
        for N in (1, 2, 4, 8):
            drawn = draw_batches(run.size, N, s["syn_batch"], generator(run.seed, "bench"))
            steps = [(batch.to(run.device), z[:run.size][batch]) for batch in drawn]
            example = theta, target, images, torch.tensor(s["syn_lr"], device=run.device), steps
            try:
                if growth * N > free_memory(run.device):
                    raise MemoryError
                for _ in range(1 + images.is_cuda):                           # a GPU records at the second call
                    version(*example)
                seconds, peak = measure(version, example)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                print(f"{name}: N = {N} and more are left out, not enough memory is free")
                break
            rows.append({"gradient": name, "N": N, "s/iteration": seconds, "s/step": seconds / N,
                         "peak GB": peak / 1e9})
            growth = max(0, peak - 1e9 * rows[-2]["peak GB"]) / (N / 2) if N > 1 else 0
            print_row(rows[-1], rows[0])
            if seconds > 5 and N < 8:
                print(f"{name}: N = {2 * N} and more are left out, they take longer in proportion")
                break
    return rows


def bench_stage(run):
    """Runs a few warm steps of every stage, prints what the whole run will take, and writes SET/bench.json."""
    s, n = run.settings, len(run.dataset.train_images)
    if s["objective"] != "kd":
        raise InputError(f"bench: it measures MKDT itself, --objective kd, not {s['objective']}")
    given = run.representations_file and read_representations(run.representations_file, n)
    z = torch.randn(n, 8 * s["teacher_width"], device=run.device) if given is None else given.to(run.device)
    d, rows, made, work = z.shape[1], [], {}, 0
    for name, f, example, flops, images, calls, backward, may_compile in steps_to_time(run, z):
        if given is not None and name.startswith("teacher"):
            continue
        mode = run.compile if may_compile else "off"
        made[name], compiled, _ = compile_if_it_pays(f, example, calls, mode, backward)
        seconds, peak = measure(made[name], example, backward)
        rows.append({"step": name, "compiled": "yes" if compiled else "no", "ms": 1000 * seconds, "images": images,
                     "images/s": images / seconds, "GFLOP/s": flops / seconds / 1e9,
                     "peak GB": peak / 1e9, "calls": calls, "in all": duration(seconds * calls)})
        work += flops * calls
        print_row(rows[-1], rows[0])
    P = flat_parameters(student(run, d)[0]).numel()
    disk = {"representations": n * d * 4, "experts": s["experts"] * (s["expert_epochs"] + 1) * P * 4,
            "distilled sets": (4 + s["iterations"] // 1000) * run.size * run.dataset.train_images[0].numel() * 4}
    seconds = sum(row["ms"] * row["calls"] for row in rows) / 1000
    print(f"the whole run: about {duration(seconds)} for {work / 1e15:.3g} PFLOP, and the probes; on disk "
          + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in disk.items()) + "\n", flush=True)
    gradients = compare_gradients(run, z, made["distill: gradient"], made["distill: adjoint"])
    if rank():
        return
    save_json(run.set_dir / "bench.json", {
        "torch": torch.__version__, "device": device_name(run.device), "threads": torch.get_num_threads(),
        "settings": s, "steps": rows, "disk_bytes": disk, "matching_gradient": gradients})
    print(f"\n{device_name(run.device)}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"written: {run.set_dir / 'bench.json'}")


def device_name(device):
    """What the device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    found = about.exists() and re.search(r"model name\s*: (.*)", about.read_text())
    return found.group(1) if found else "CPU"


def print_row(row, first):
    """Prints a dict as a row of a table, below its keys if it is the `first`."""
    if row is first:
        print("  ".join(f"{key:>{18 if i == 0 else 11}}" for i, key in enumerate(row)))
    shown = (f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values())
    print("  ".join(f"{v:>{18 if i == 0 else 11}}" for i, v in enumerate(shown)), flush=True)


# ------------------------------------------------------------------------------------------------------------
# Figure 1: the same functions, trajectories of other losses (section 4.1, appendix A.2)
# ------------------------------------------------------------------------------------------------------------
# Settings of appendix A.2, which says nothing of MKDT: that has its data set's row, with one expert from epoch 0 too.
FIGURE1 = {
    "MTT": dict(objective="ce", expert_batch=256, syn_steps=20, match_epochs=4),
    "MTT-SSL": dict(objective="ssl", expert_batch=1024, syn_steps=10, match_epochs=2),
    "MKDT": dict(objective="kd"),
}
FIGURE1_COMMON = dict(percent=1.0, expert_epochs=7, max_start_epoch=0, pixel_lr=1000.0, clip=0.0, iterations=100)


def figure1_systems(dataset, given):
    """{name: settings} of what Fig. 1 compares, changed by `given` (flags). Raises InputError where they cannot be."""
    if wrong := {"objective", "init"} & given.keys():
        raise InputError(f"figure1 compares all objectives from random images: leave out --{wrong.pop()}")
    if ranks() > 1:
        raise InputError(f"figure1 runs in one process, not {ranks()}")
    systems = {name: resolve(dataset, {**FIGURE1_COMMON, "init": "random", **system, **given})
               for name, system in FIGURE1.items()}
    large = {**systems["MTT-SSL"], "expert_batch": 4 * systems["MTT-SSL"]["expert_batch"]}
    for s in (*systems.values(), large):
        check_settings(s)
    return {"MTT": systems["MTT"], "MTT-SSL": systems["MTT-SSL"], "MTT-SSL, 4x batch": large, "MKDT": systems["MKDT"]}


def variance_of_trajectories(trajectories):
    """Fig. 1a: E |theta_t - E theta_t|^2 per weight at each epoch, over trajectories [R, T + 1, P] -> [T + 1]."""
    return (trajectories - trajectories.mean(dim=0)).square().mean(dim=(0, 2))


class Forgetful:
    """A checkpoint of a loop that is too short to be kept."""
    due, restore, save = (lambda self: False), (lambda self, **parts: 0), (lambda self, step, **parts: None)


class Recorder(Log):
    """A log that keeps the values of every step in `records` and prints as often as any other."""
    records = ()

    def due(self):
        return True

    def __call__(self, stage, step, total, **values):
        self.records = [*self.records, values]
        if super().due():
            super().__call__(stage, step, total, **values)


def figure1_system(run, s, trajectories=5):
    """Fig. 1 for the settings `s` of one system: {"variance": at each epoch, "loss", "moved": at each iteration}."""
    data, n = run.dataset, len(run.dataset.train_images)
    targets, d = evaluation.student_targets(s, data, run.run_dir)
    model = build(lambda: ConvNet(d, data.image_size, s["width"]), run.seed, "figure1").to(run.device)
    f, theta, size = functional(model), flat_parameters(model), min(s["expert_batch"], n)
    step, state = optimizer_of(student_loss(f), s, theta)
    first = torch.arange(n, device=run.device)
    chosen = torch.randperm(n, generator=generator(run.seed, "figure1", "images"))[:run.size].to(run.device)
    images, syn = data.batch(data.train_images[chosen]), min(s["syn_batch"], run.size)
    syn_targets = targets if callable(targets) else targets[chosen]

    def speed_up(g, example, steps):
        mode = "off" if callable(targets) else run.compile
        g, compiled, seconds = compile_if_it_pays(g, example, steps, mode)
        print(f"figure1: {steps} steps, {'compiled' if compiled else 'eager'}, about {duration(seconds * steps)}",
              flush=True)
        return g

    steps = trajectories * s["expert_epochs"] * math.ceil(n / size)
    step = speed_up(step, (theta, state, data.batch(data.train_images[:size]),
                           targets_of(targets, first[:size], 0), s["expert_lr"]), steps)
    experts = torch.stack([train_expert(step, theta, torch.zeros_like(state), data.train_images, targets, data.batch,
                                        s["expert_epochs"], s["expert_lr"], size, stream(run.seed, "figure1", k))
                           for k in range(trajectories)])
    example = theta, images[:syn], targets_of(syn_targets, first[:syn], 0)
    steps = s["iterations"] * s["syn_steps"]
    gradient = speed_up(inner_gradient(student_loss(f)), example, steps)
    adjoint = speed_up(inner_adjoint(student_loss(f)), (*example, theta.clone()), steps)
    log = Recorder(interval=run.log.interval)
    try:
        distill(gradient, adjoint, lambda i: experts[0], 1, images, syn_targets, s["iterations"], trajectories=1,
                syn_steps=s["syn_steps"], match_epochs=s["match_epochs"], max_start_epoch=s["max_start_epoch"],
                pixel_lr=s["pixel_lr"], syn_lr=s["syn_lr"], syn_lr_lr=s["syn_lr_lr"], momentum=s["syn_momentum"],
                batch_size=s["syn_batch"], clip=s["clip"], seed=run.seed, log=log, checkpoint=Forgetful())
    except InputError as error:                                       # that it cannot be matched is a result as well
        print(f"figure1: {error}", flush=True)
    return {"variance": variance_of_trajectories(experts).tolist(), "loss": [r["loss"] for r in log.records],
            "moved": [r["moved"] for r in log.records]}


def figure1_stage(run, systems):
    """Figure 1 for `systems`, {name: settings}: figure1/figure1.json, .csv and, where matplotlib is installed, .png."""
    folder = run.run_dir / "figure1"
    path = folder / "figure1.json"
    found = read_json(path) if path.exists() else {}
    for name, s in systems.items():
        made_from = fingerprint(s, run.seed, run.inputs("teacher"))
        if found.get(name, {}).get("made_from") == made_from:
            continue
        print(f"figure1: {name}: {describe(s, 'experts')}  {describe(s, 'distill')}", flush=True)
        found[name] = {"made_from": made_from, **figure1_system(run, s)}
        save_json(path, found)
    panels = {"variance": ("epoch", "variance per weight"), "loss": ("iteration", "Eq. 4"),
              "moved": ("iteration", "mean |change| of a pixel (deviations)")}
    rows = ["panel,system,x,y"] + [f'{panel},"{name}",{x},{y}' for panel in panels for name in systems
                                   for x, y in enumerate(found[name][panel], start=panel != "variance")]
    write_file(folder / "figure1.csv", lambda file: file.write(("\n".join(rows) + "\n").encode()))
    for name in systems:
        last = [f"{panel} {found[name][panel][-1]:.3g}" for panel in panels if found[name][panel]]
        print(f"figure1: {name:<18} at the end: {', '.join(last)}")
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure
        figure = Figure(figsize=(14, 4), layout="constrained")
        for axes, (panel, (x, y)) in zip(figure.subplots(1, 3), panels.items()):
            for name in systems:
                values = found[name][panel][panel == "variance":]                  # none at epoch 0: one initialisation
                axes.plot(range(1, len(values) + 1), values, label=name)
            axes.set(xlabel=x, ylabel=y, yscale="linear" if panel == "loss" else "log")
            axes.legend(fontsize="small")
        write_file(folder / "figure1.png", lambda file: figure.savefig(file, format="png", dpi=120))
    print(f"figure1: {folder}")


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------
def resolve(dataset, given):
    """All settings for `dataset`: the paper's, changed by its rows, changed by `given` (flags). Returns a dict."""
    known = dataset if dataset in DATASETS else "tinyimagenet" if given.get("image_size", 0) >= 64 else "cifar10"
    percent = {"percent": SETTINGS["percent"][1], **DATASETS[known], **given}["percent"]
    if not 0 < percent <= 100:
        raise InputError(f"--percent {percent:g} must be positive and at most 100")
    rows = [p for d, p in ROWS if d == known]
    row = min(rows, key=lambda p: abs(p - percent))
    if dataset not in DATASETS or row != percent:
        print(f"settings: no row for {dataset} at {percent:g}%, taking that of {known} at {row}%")
    settings = {k: default for k, (_, default, _) in SETTINGS.items()}
    if given.get("ssl") == "simclr":
        settings.update(SIMCLR)
    settings.update(DATASETS[known])
    settings.update(ROWS[known, row])
    settings.update(OBJECTIVES.get(given.get("objective"), {}))
    # Only epochs 0 .. T+ + M of an expert are ever read; the rate is constant, so training may stop at the largest
    # T+ + M of the data set's rows and the trajectories are those of longer training.
    settings["expert_epochs"] = max(row["max_start_epoch"] + row["match_epochs"]
                                    for (name, _), row in ROWS.items() if name == known)
    settings.update(given)
    return settings


def unused(args, given):
    """The flags on the command line that change nothing this run makes (eval.py's random:ssl apart), in words."""
    without_teacher = bool(args.representations) or given.get("objective", "kd") != "kd"
    flags = {k for k in given if SETTINGS[k][0] == "teacher" and without_teacher}
    if given.get("objective") == "ssl":                      # Adam; augmentations, which change, are not compiled
        flags = flags - {"crop_scale", "gray"} | {"expert_momentum"} & given.keys()
        flags |= {"compile"} if args.compile == "on" else set()
    return ", ".join(sorted(f"--{flag.replace('_', '-')}" for flag in flags))


def describe(settings, stage):
    """One line with the settings of a stage."""
    own = (stage, "length") if stage == "distill" else (stage,)
    return "  ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items()
                     if SETTINGS[k][0] in own)


def check_settings(settings):
    """Raises InputError for values that cannot work."""
    zero_is_fine = {"train_images", "image_size", "max_pool", "max_start_epoch", "clip", "teacher_decay", "gray",
                    "lambd", "expert_decay", "expert_momentum", "syn_momentum", "syn_lr_lr", "pixel_lr", "iterations"}
    below_one = {"expert_momentum", "syn_momentum", "crop_scale", "gray"}
    for name, value in settings.items():
        if isinstance(value, str):
            continue
        if name in below_one and value > 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at most 1")
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in zero_is_fine):
            least = "at least 0" if name in zero_is_fine else "positive"
            raise InputError(f"--{name.replace('_', '-')} {value} must be {least}")
    if settings["teacher_batch"] < 2:
        raise InputError("--teacher-batch 1 must be at least 2: batch norm and Eq. 1 need more than one image")
    last_read = settings["max_start_epoch"] + settings["match_epochs"]
    if last_read > settings["expert_epochs"]:
        raise InputError(f"T+ + M = {last_read} lies beyond the experts' last epoch, {settings['expert_epochs']}: "
                         f"raise --expert-epochs to {last_read}")
    for name, choices in (("ssl", ("barlow", "simclr")), ("init", ("high_loss", "random")),
                          ("bf16", ("auto", "on", "off")), ("objective", tuple(OBJECTIVES))):
        if settings[name] not in choices:
            raise InputError(f"--{name} {settings[name]} must be one of {', '.join(choices)}")
    if settings["init"] == "high_loss" and settings["objective"] != "kd":
        raise InputError("--init high_loss needs the loss to a teacher, --objective kd: give --init random")


def parse(argv):
    """(args, the settings given as flags) from a command line."""
    class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("--stage", choices=[*STAGES, "all", "bench", "figure1"], default="all",
                        help="one stage, all of them in order, bench: what the whole run will cost on this machine, or "
                             "figure1: after the teacher, Fig. 1 of the paper")
    parser.add_argument("--dataset", default="cifar10",
                        help=f"{', '.join(DATASETS)}; another task of eval.py by name; a folder with train/ and test/ "
                             "inside; or an .npz file")
    parser.add_argument("--data-dir", default="data", help="where data sets are looked for and kept")
    parser.add_argument("--run-dir", default=argparse.SUPPRESS, help="where results go (default: runs/DATASET)")
    parser.add_argument("--representations", metavar="FILE",
                        help=".pt or .npy [n, d] of any other model, instead of the teacher stage")
    parser.add_argument("--seed", type=int, default=0, help="fixes every random draw")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                        help="torch.compile the steps, and replay them as CUDA graphs on a GPU; auto: where it pays")
    parser.add_argument("--deterministic", action="store_true",
                        help="bit-identical runs, slower: no timing decides what is compiled, and on a GPU sums are "
                             "taken in a fixed order")
    parser.add_argument("--force", action="store_true", help="make again what was made with other settings")
    parser.add_argument("--checkpoint-minutes", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--log-seconds", type=float, default=10.0, help="seconds between progress lines")
    groups = {}
    for name, (stage, default, text) in SETTINGS.items():
        if stage not in groups:
            groups[stage] = parser.add_argument_group(f"settings: {stage}")
        groups[stage].add_argument(f"--{name.replace('_', '-')}", type=type(default), default=argparse.SUPPRESS,
                                   metavar=type(default).__name__.upper(), help=f"{text} (default: {default:.4g})"
                                   if isinstance(default, float) else f"{text} (default: {default})")
    args = parser.parse_args(argv)
    return args, {k: v for k, v in vars(args).items() if k in SETTINGS}


def main(argv=None):
    """The command line. Exit code 2 and one line on stderr for anything the user can put right."""
    args, given = parse(argv)
    name = args.stage
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")         # torch's own, of its own parts
    try:
        device = join_ranks(pick_device(args.device, args.deterministic))
        with contextlib.redirect_stdout(None if rank() else sys.stdout):                           # rank 0 alone speaks
            systems = figure1_systems(args.dataset, given) if args.stage == "figure1" else {}
            settings = systems["MKDT"] if systems else resolve(args.dataset, given)
            check_settings(settings)
            if not systems and (flags := unused(args, given)):
                print(f"settings: no effect on teacher, experts or distillation here: {flags}", flush=True)
            run = Run(args, settings, device)
            if args.stage == "bench":
                bench_stage(run)
            else:
                stages = {"all": list(STAGES), "figure1": ["teacher"]}.get(args.stage, [args.stage])
                with hold(run.run_dir) if not rank() else contextlib.nullcontext():
                    run.check(stages)
                    for name in stages:
                        print(f"{name}: {describe(settings, name)}", flush=True)
                        STAGES[name](run)
                        wait_for_ranks()
                    if systems:
                        figure1_stage(run, systems)
            leave_ranks()
    except InputError as error:
        print(f"mkdt.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        lower = {"teacher": "--teacher-batch", "experts": "--expert-batch", "distill": "--syn-batch or --syn-steps",
                 "eval": "--pretrain-batch"}.get(name, "--width")
        print(f"mkdt.py: {name}: out of memory ({first_line(error)}): lower {lower}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mkdt.py: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
