"""Evaluation of MKDT (section 5, appendices A.1 and B): pre-train a fresh encoder on a small set, then judge it.

    python eval.py --run-dir runs/cifar10/2pct_high_loss                     the set of that run and its baselines
    python eval.py --run-dir runs/cifar10/2pct_high_loss --seeds 0 1 2 3 4   more seeds extend the table
    python eval.py --run-dir ... --sets random mkdt subset:sas.pkl distilled:krr_st/ --tasks all --paired
    python eval.py --table 1                                                 the settings of the paper's Table 1

    pretrain        Eq. 9: an encoder from (images, representations) by MSE
    encode          features of a data set under an encoder, in chunks
    linear_probe    the classifier of Eq. 3: full-batch LBFGS
    finetune        the protocol of appendix B
    knn_accuracy    the monitor of the teacher
    krr_st, dm      rivals: kernel ridge regression on self-supervised targets (Lee et al. 2023), distribution matching
                    without labels (Zhao & Bilen 2023, as in appendix F)
    evaluate        every cell of a table, kept in results.json, results.csv and results.md

A cell is (set, encoder, task, labels, seed). The seed fixes the encoder's initial weights, the order of its batches
and which images are labelled, each in a stream of its own and the same for every set: differences are paired.
"""
import argparse
import contextlib
import copy
import csv
import functools
import io
import math
import pickle
import re
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data import (Checkpoint, Dataset, Log, augmentations, duration, fingerprint, hold, load, load_dataset, normalize,
                  read_json, save, save_json, shift_and_flip, to_download, two_views, write_file)
from models import (ConvNet, InputError, batches, build, compile_if_it_pays, convnet_depth, first_line, from_rank_0,
                    gather_from_ranks, generator, join_ranks, leave_ranks, objective, out_of_memory, pick_device,
                    projector, rank, rank_0_first, ranks, resnet10, resnet18, self_supervised_loss, stream,
                    targets_of, to_device, wait_for_ranks)

# The sets to pre-train on. Any of them takes a rate of its own, random@0.3, or the learned one, random@mkdt.
SETS = {
    "none": "no pre-training",
    "random": "as many real images as the distilled set has, redrawn for every seed",
    "random:ssl": "those by the teacher's self-supervised loss, without a teacher (appendix B)",
    "subset:FILE": "the training images whose indices stand in FILE (.pkl, .pt, .npy, .json, .txt): SAS and others",
    "high_loss": "as many, those of the largest losses (section 4.2)",
    "initial": "the images that distillation began with",
    "krr_st": "a set distilled here by KRR-ST (Lee et al. 2023)",
    "dm": "a set distilled here by DM without labels (Zhao & Bilen 2023, appendix F)",
    "distilled:PATH": "a distilled set: a file or folder of this project, of the authors' code, or of KRR-ST's",
    "mkdt": "the run's distilled set",
    "full": "all training images",
}
DEFAULT_SETS = ("none", "random", "random@mkdt", "high_loss", "high_loss@mkdt", "mkdt", "full")
ENCODERS = {"convnet": ConvNet, "resnet10": lambda d, image_size, width: resnet10(d, width),
            "resnet18": lambda d, image_size, width: resnet18(d, width)}
SSL = "random", "ssl"
TASKS = ("cifar10", "tinyimagenet", "cifar100", "aircraft", "cub2011", "dogs", "flowers")        # Table 1's columns
METHODS = {"none": "No Pre-Training", "random": "Random Subset", "random:ssl": "Random Subset (SSL)",
           "sas": "SAS Subset", "high_loss": "High Loss Subset", "initial": "Initial Images", "krr_st": "KRR-ST",
           "dm": "DM (no labels)", "mkdt_random": "MKDT (Rnd Sub)", "mkdt": "MKDT", "mtt_ssl": "MTT-SSL", "mtt": "MTT",
           "full": "Full Data"}                                                                 # the tables' words


class Diverged(InputError):
    """Training that ended in numbers that are not finite."""


# ------------------------------------------------------------------------------------------------------------
# Pre-training (Eq. 9) and features
# ------------------------------------------------------------------------------------------------------------
CHUNK = 250                                                  # images that are encoded at once


def pretrain(encoder, images, targets, lr, epochs, seed, batch_size=256, momentum=0.9, weight_decay=1e-4,
             prepare=lambda x: x, loss=None):
    """Trains `encoder` in place to map `images` to `targets` by MSE (Eq. 9) and returns it in eval mode.

    images [n, 3, H, W] (`prepare` normalises a batch if they are stored as uint8); targets: representations [n, d], or
    what else `targets_of` knows, to which the loss is then `models.objective`.
    SGD with constant rate `lr`; min(batch_size, n) images a step, the short last batch kept; `seed` fixes the order.
    loss(x, y): a faster objective(encoder, x, y), if it is at hand.
    Raises Diverged if the weights end up non-finite.
    """
    loss = loss or functools.partial(objective, encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), lr, momentum, weight_decay=weight_decay)
    encoder.train()
    for step, (_, batch) in enumerate(batches(len(images), batch_size, epochs, seed, "pretrain order", images.device)):
        optimizer.zero_grad()
        loss(prepare(images[batch]), targets_of(targets, batch, stream(seed, "pretrain views", step))).backward()
        optimizer.step()
    return finished(encoder, f"pre-training on {len(images)} images at rate {lr:.3g}")


def pretrain_ssl(encoder, images, dataset, ssl, lr, epochs, seed, batch_size, lambd, temperature, crop_scale, gray):
    """Trains `encoder` in place by self-supervision on uint8 `images` alone (appendix B) and returns it in eval mode.

    The teacher's loss, augmentation and projector (on the encoder's output), Adam with weight decay 1e-6.
    """
    head = build(lambda: projector(ssl, encoder.head.out_features), seed, "evaluation projector").to(images.device)
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr, weight_decay=1e-6)
    encoder.train()
    for step, (_, batch) in enumerate(batches(len(images), batch_size, epochs, seed, "pretrain order", images.device)):
        if len(batch) == 1:                                                # batch norm and Eq. 1 need two at least
            continue
        views = two_views(images[batch], stream(seed, "pretrain views", step), (crop_scale, 1.0), gray=gray)
        z = head(encoder(torch.cat([normalize(v, dataset.mean, dataset.std) for v in views])))
        optimizer.zero_grad()
        self_supervised_loss(*z.chunk(2), ssl, lambd, temperature).backward()
        optimizer.step()
    return finished(encoder, f"self-supervised pre-training on {len(images)} images at rate {lr:.3g}")


def finished(encoder, what):
    """The encoder in eval mode; Diverged, an InputError, if its weights are not finite."""
    if not all(p.isfinite().all() for p in encoder.parameters()):
        raise Diverged(f"{what} diverged: for pre-training, give the set a lower rate (SET@RATE)")
    return encoder.eval()


@torch.no_grad()
def encode(f, images, prepare, chunk=CHUNK):
    """f(prepare(images)) in chunks of `chunk` images, or smaller ones if a GPU's memory does not suffice:
    uint8 [n, 3, H, W] -> float32 [n, d]."""
    try:
        return torch.cat([f(prepare(part)).float() for part in images.split(chunk)])
    except RuntimeError as error:
        if chunk == 1 or not out_of_memory(error):
            raise
    return encode(f, images, prepare, chunk // 2)


# ------------------------------------------------------------------------------------------------------------
# Judging an encoder: linear probe (Eq. 3), fine-tuning (appendix B), nearest neighbours
# ------------------------------------------------------------------------------------------------------------
def linear_probe(features, labels, classes, weight=1e-3, iterations=100):
    """A linear classifier by full-batch LBFGS: minimises cross-entropy + weight * sum(W^2), the bias left free.

    features [n, d], labels int64 [n] in 0..classes-1. Starts from zero; the objective is strictly convex in W, so
    the start only matters to how far at most `iterations` steps get. The line search keeps it from diverging.
    Returns W [classes, d], b [classes]. Raises Diverged on features that are not finite.
    """
    if not features.isfinite().all():
        raise Diverged("the encoder's features are not finite: give the set a lower rate (SET@RATE)")
    W = torch.zeros(classes, features.shape[1], device=features.device, dtype=features.dtype, requires_grad=True)
    b = torch.zeros(classes, device=features.device, dtype=features.dtype, requires_grad=True)
    # max_eval counts function evaluations, of which a line search may take several an iteration.
    optimizer = torch.optim.LBFGS([W, b], max_iter=iterations, max_eval=25 * iterations, history_size=20,
                                  tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ W.T + b, labels) + weight * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return W.detach(), b.detach()


def finetune(encoder, images, labels, classes, prepare, seed, epochs=50, batch_size=256, head_lr=0.05,
             backbone_lr=0.005):
    """A copy of `encoder` with a linear layer on its features, trained as a whole on labelled images (appendix B).

    images uint8 [n, 3, H, W], labels int64 [n]. SGD with momentum 0.9, cosine to zero, no weight decay; images are
    shifted by up to four pixels and mirrored. Returns the network in eval mode; it maps images to logits.
    """
    encoder = copy.deepcopy(encoder)
    with torch.no_grad():
        d = encoder.features(prepare(images[:1])).shape[1]
    head = build(lambda: torch.nn.Linear(d, classes), seed, "fine-tuning head").to(images.device)
    encoder.head = torch.nn.Identity()                                     # the network is `features`, then `head`
    network = torch.nn.Sequential(encoder, head).train()
    steps = epochs * math.ceil(len(images) / batch_size)
    optimizer = torch.optim.SGD([{"params": encoder.parameters(), "lr": backbone_lr}, {"params": head.parameters()}],
                                head_lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = batches(len(images), batch_size, epochs, seed, "fine-tuning order", images.device)
    for step, (_, batch) in enumerate(order):
        x = shift_and_flip(prepare(images[batch]), stream(seed, "fine-tuning views", step))
        optimizer.zero_grad()
        F.cross_entropy(network(x), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    return finished(network, f"fine-tuning on {len(images)} images")


def accuracy(logits, labels):
    """Percent of `labels` [n] that the largest of `logits` [n, classes] predicts: 100 - Err of Eq. 3."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def labelled_subset(n, percent, seed, labels=None):
    """Indices of the labelled images: floor(n * percent / 100) of n, drawn uniformly (not by class), sorted.

    labels [n]: draw that share of every class instead (--stratified). Raises InputError if no image is left, of a
    class that is.
    """
    rng = generator(seed, "labels", float(percent))
    groups = [torch.arange(n)] if labels is None else [(labels == c).nonzero()[:, 0].cpu() for c in labels.unique()]
    chosen = []
    for group in groups:
        count = math.floor(len(group) * percent / 100 + 1e-9) if math.isfinite(percent) else 0
        if not 1 <= count <= len(group):
            what = "training images" if labels is None else f"training images of class {int(labels[group[0]])}"
            raise InputError(f"{percent:g}% of {len(group)} {what} is {count} images: --labels of eval.py must leave "
                             f"from 1 to {len(group)}")
        chosen.append(group[torch.randperm(len(group), generator=rng)[:count]])
    return torch.cat(chosen).sort().values


def knn_accuracy(train_features, train_labels, test_features, test_labels, k=200, temperature=0.5):
    """Percent correct of the weighted k-nearest-neighbour vote with weights exp(cosine / temperature)."""
    bank, classes = F.normalize(train_features), int(train_labels.max()) + 1
    correct = 0
    for x, y in zip(F.normalize(test_features).split(1000), test_labels.split(1000)):
        similarity, nearest = (x @ bank.T).topk(min(k, len(bank)))                             # [B, k]
        votes = torch.zeros(len(x), classes, device=x.device)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == y).sum()
    return 100 * correct.item() / len(test_labels)


# ------------------------------------------------------------------------------------------------------------
# Rivals: KRR-ST (section 2.1), DM without labels (appendix F)
# ------------------------------------------------------------------------------------------------------------
def report(rival, step, iterations, loss, log, checkpoint, state):
    """Checks the loss of a rival's iteration, logs it and saves the state, where that is due."""
    last = step + 1 == iterations
    if log.due() or checkpoint.due() or last:
        if not math.isfinite(loss.item()):
            raise Diverged(f"{rival}: the loss at iteration {step} is {loss.item()}: give fewer iterations")
        if log.due() or last:
            log(rival, step + 1, iterations, loss=loss.item())
        if checkpoint.due():
            checkpoint.save(step + 1, **state)


def krr_loss(f_syn, y_syn, f_real, y_real, ridge=1e-6):
    """MSE of kernel ridge regression from the synthetic set to real images (Lee et al. 2023).

    Features f_syn [n, p], f_real [B, p], targets y_syn [n, d], y_real [B, d]. The kernel is linear in the features and
    a constant; the ridge is relative to the kernel's trace.
    """
    f_syn, f_real = (torch.cat([f, torch.ones_like(f[:, :1])], dim=1) for f in (f_syn, f_real))
    kernel = f_syn @ f_syn.T                                                                       # [n, n]
    kernel = kernel + ridge * kernel.trace().detach() * torch.eye(len(kernel), device=kernel.device)
    return F.mse_loss(f_real @ f_syn.T @ torch.linalg.solve(kernel, y_syn), y_real)


def krr_st(make, images, targets, real_images, real_targets, prepare, iterations, seed, log, checkpoint,
           models=10, online_steps=1000, lr=1e-3, batch_size=1024):
    """Distils by KRR-ST (Lee et al. 2023) with their settings; returns images [n, 3, H, W] and targets [n, d].

    make(): a fresh encoder. images, targets: the initial set, normalised real images and their representations; both
    are learned, by Adam whose rate falls linearly to a thousandth, to lower `krr_loss` of batches of `real_images`
    (uint8) under the features of one of `models` encoders. That one then takes a step on the set by MSE, and begins
    anew after `online_steps`; at the start they have taken from 1 to `online_steps`.
    """
    def fresh(k, birth):
        return build(make, seed, "krr_st", k, birth).to(images.device)

    def train(k):
        inner.zero_grad()
        F.mse_loss(pool[k](syn[0].detach()), syn[1].detach()).backward()
        inner.step()

    syn = [images.clone().requires_grad_(), targets.clone().requires_grad_()]
    outer = torch.optim.Adam(syn, lr)
    schedule = torch.optim.lr_scheduler.LinearLR(outer, 1.0, 1e-3, iterations)
    pool = torch.nn.ModuleList(fresh(k, 0) for k in range(models))
    inner = torch.optim.SGD(pool.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    age = torch.randint(1, online_steps + 1, (models,), generator=generator(seed, "krr_st", "ages"))
    state = {"images": syn[0].data, "targets": syn[1].data, "age": age, "pool": pool, "inner": inner, "outer": outer,
             "schedule": schedule}
    first = checkpoint.restore(**state)
    if first == 0:
        log.start()
        for done, k in enumerate(torch.arange(models).repeat_interleave(age).tolist()):
            train(k)
            if checkpoint.asked:                                    # to stop: nothing is worth keeping so far
                raise KeyboardInterrupt
            if log.due():
                log("krr_st", done + 1, int(age.sum()), unit="first step")
    log.start(first)
    for step in range(first, iterations):
        rng = generator(seed, "krr_st", "step", step)
        k = int(torch.randint(models, (), generator=rng))
        batch = to_device(torch.randint(len(real_images), (batch_size,), generator=rng), images.device)
        with torch.no_grad():
            f_real = pool[k].features(prepare(real_images[batch]))
        loss = krr_loss(pool[k].features(syn[0]), syn[1], f_real, real_targets[batch])
        for x, g in zip(syn, torch.autograd.grad(loss, syn)):
            x.grad = g
        outer.step()
        schedule.step()
        if age[k] >= online_steps:
            pool[k].load_state_dict(fresh(k, step + 1).state_dict())
            for p in pool[k].parameters():
                inner.state.pop(p, None)
            age[k] = 0
        else:
            train(k)
            age[k] += 1
        report("krr_st", step, iterations, loss, log, checkpoint, state)
    return syn[0].detach(), syn[1].detach()


def distribution_matching(make, images, real_images, prepare, views, iterations, seed, log, checkpoint, lr=1.0,
                          momentum=0.5, batch_size=256):
    """Distils by DM (Zhao & Bilen 2023) without labels, as in appendix F; returns images [n, 3, H, W].

    make(): a fresh encoder, a new one in every iteration. The mean features of a batch of `images` (normalised) are
    drawn to those of as many random `real_images` (uint8) under the same augmentations, of data.augmentations `views`.
    """
    syn, velocity = images.clone(), torch.zeros_like(images)
    first = checkpoint.restore(images=syn, velocity=velocity)
    log.start(first)
    for step in range(first, iterations):
        rng = generator(seed, "dm", "step", step)
        chosen = to_device(torch.randperm(len(syn), generator=rng)[:batch_size], syn.device)
        real = real_images[to_device(torch.randint(len(real_images), (len(chosen),), generator=rng), syn.device)]
        augment, _ = views(len(chosen), stream(seed, "dm", "views", step))
        features = build(make, seed, "dm", step).to(syn.device).requires_grad_(False).features
        batch = syn[chosen].requires_grad_()
        ours, theirs = (features(augment(x)).mean(dim=0) for x in (batch, prepare(real)))
        loss = (ours - theirs).square().sum()
        velocity.mul_(momentum).index_add_(0, chosen, torch.autograd.grad(loss, batch)[0])
        syn -= lr * velocity
        report("dm", step, iterations, loss, log, checkpoint, {"images": syn, "velocity": velocity})
    return syn


# ------------------------------------------------------------------------------------------------------------
# The sets to pre-train on
# ------------------------------------------------------------------------------------------------------------
class Chosen(NamedTuple):
    """A set to pre-train on: images (uint8, or normalised float32) [n, 3, H, W], targets as in `targets_of` or None
    (`pretrain_ssl`), and the rate."""
    images: torch.Tensor
    targets: object
    lr: float


@dataclass
class Source:
    """What encoders are pre-trained on: a run's data, its distilled set, and what its baselines are made from."""
    run_dir: Path
    settings: dict
    dataset: Dataset
    targets: object                                # Z_T [n, d] of the training images, or labels or augmentations
    d: int                                         # dimension of the encoders' output
    test_representations: torch.Tensor | None      # of the test images, for Eq. 2; None if they are not known
    losses: torch.Tensor | None                    # [n], section 4.2; None if the objective is not Eq. 5
    distilled: dict                                # distilled.pt
    made_from: str                                 # fingerprint of the targets
    own: dict = field(default_factory=dict)        # sets distilled here: {"krr_st" or "dm": (images, targets)}

    @property
    def size(self):
        """Number of distilled images; random and high-loss subsets have as many."""
        return len(self.distilled["images"])

    def encoder(self, name="convnet", d=None, image_size=None):
        """A freshly built encoder: convnet (as the experts), resnet10 or resnet18 (width 64), or NAME:WIDTH."""
        kind, _, width = name.partition(":")
        d, image_size = d or self.d, image_size or self.dataset.image_size
        if kind not in ENCODERS or not (width or "1").isdecimal() or width == "0":
            raise InputError(f"unknown encoder {name!r}: choose from {', '.join(ENCODERS)}, with a width of its own as "
                             "in resnet18:16")
        return ENCODERS[kind](d, image_size, int(width or (self.settings["width"] if kind == "convnet" else 64)))


def parse_set(name):
    """(kind, argument, rate) of a set's name: ("subset", "sas.pkl", "0.3") for subset:sas.pkl@0.3.

    Raises InputError if there is no such set.
    """
    stem, _, rate = name.rpartition("@")
    try:
        is_rate = stem and (rate == "mkdt" or 0 < float(rate) < math.inf)
    except ValueError:
        is_rate = False
    if not is_rate:                                                   # perhaps an @ in a file's name
        stem, rate = name, ""
    kind, _, argument = stem.partition(":")
    if stem not in SETS and not (argument and any(known.startswith(f"{kind}:") and known[-1].isupper()
                                                  for known in SETS)):
        raise InputError(f"unknown pre-training set {name!r}: choose from {', '.join(SETS)}, with a rate of its own "
                         "as in random@0.3, or the learned one, random@mkdt")
    return kind, argument, rate


def pretraining_set(name, seed, source):
    """What the set called `name` (see SETS) is for `seed`, as Chosen; None for no pre-training.

    The rate is that after the @; else the learned one for distilled sets that bring one, 0.001 (Adam) for random:ssl
    and --pretrain-lr for all others.
    """
    kind, argument, rate = parse_set(name)
    images, y, n = source.dataset.train_images, source.targets, len(source.dataset.train_images)
    device, lr = images.device, source.settings["pretrain_lr"]
    if kind == "none":
        return None
    if kind == "mkdt":
        images, lr = source.distilled["images"], source.distilled["lr"]
        y = source.distilled.get("representations", source.distilled.get("labels", y))
    elif kind in RIVALS:
        images, y = source.own[kind]
    elif kind == "full":
        pass
    elif kind == "distilled":
        images, y, own = read_distilled(argument, source.settings["pixels"], source.dataset.mean, source.dataset.std)
        lr = own or lr
    else:
        chosen = {"random": lambda: torch.randperm(n, generator=generator(seed, "random subset"))[:source.size],
                  "high_loss": lambda: highest(source.losses, source.size),
                  "initial": lambda: source.distilled["indices"],
                  "subset": lambda: read_indices(argument, n)}[kind]().to(device)
        images, y = images[chosen], y if callable(y) else y[chosen]
    if (kind, argument) == SSL:
        y, lr = None, 1e-3
    if rate:
        lr = source.distilled["lr"] if rate == "mkdt" else float(rate)
    return Chosen(images.to(device), y.to(device) if torch.is_tensor(y) else y, lr)


def identity(name, source):
    """Eight hexadecimal digits of all that a row's accuracies depend on beside encoder, protocol, task and seed.

    Raises InputError if the run cannot have that set.
    """
    kind, argument, rate = parse_set(name)
    if source.losses is None and kind in ("high_loss", *RIVALS):
        raise InputError(f"{kind} needs the teacher's representations, which only runs with --objective kd have")
    if kind == "dm" and not (source.run_dir.parent / "teacher.pt").exists():
        raise InputError("dm needs the teacher's weights, which runs with --representations do not have")
    s, own = source.settings, source.distilled
    depends = [kind, argument if kind == "random" else "", rate, s["width"], source.made_from, source.size]
    if kind != "none":
        depends += [s[k] for k in ("pretrain_epochs", "pretrain_batch", "pretrain_lr")]
    depends += {"high_loss": lambda: [source.losses], "initial": lambda: [own["indices"]],
                "mkdt": lambda: [own["images"]],
                "subset": lambda: [read_indices(argument, len(source.dataset.train_images))],
                "distilled": lambda: [*pretraining_set(name, 0, source)]}.get(kind, list)()
    if kind in RIVALS:
        depends += [s[k] for k in RIVALS[kind][1]]
    if (kind, argument) == SSL:
        depends += [s[k] for k in ("ssl", "ssl_epochs", "crop_scale", "gray", "lambd", "temperature")]
    if rate == "mkdt" or (kind == "mkdt" and not rate):
        depends += [own["lr"]]
    return fingerprint(*depends)


def highest(loss, count):
    """Indices of the `count` largest entries of loss [n], the largest first, ties to the lower index."""
    return loss.cpu().sort(descending=True, stable=True).indices[:count]


class PickledType:
    """Stands for numpy.dtype in a pickle."""
    order = "="

    def __init__(self, code, *_):
        self.code = code

    def __setstate__(self, state):
        self.order = state[1]

    def read(self, raw):
        """The numbers in the bytes `raw`."""
        if not re.fullmatch(r"[<>=|][iuf][1248]", self.order + self.code):
            raise pickle.UnpicklingError(f"an array of type {self.code!r}")
        return np.frombuffer(bytes(raw), self.order + self.code)


class PickledArray:
    """Stands for a numpy array in a pickle."""

    def __setstate__(self, state):
        _, _, kind, _, raw = state
        self.values = kind.read(raw)


class IndexUnpickler(pickle._Unpickler):
    """Unpickles lists, dicts, numbers and numpy arrays (as `PickledArray`), and refuses everything else.

    No function of the pickle's choice is called, nor numpy's own unpickling, which trusts what it is given. The base
    is the one written in Python: that in C takes as much memory as a damaged index of its memo asks for.
    """

    def find_class(self, module, name):
        """What stands here for the class or function that a pickle asks for."""
        if module.split(".")[0] == "numpy":
            stand_ins = {"ndarray": PickledArray, "dtype": PickledType, "_reconstruct": lambda *_: PickledArray(),
                         "_frombuffer": lambda raw, kind, *_: kind.read(raw),
                         "scalar": lambda kind, raw: kind.read(raw)[0].item()}
            if name in stand_ins:
                return stand_ins[name]
        if (module, name) == ("_codecs", "encode"):                        # bytes, in pickles of the old protocols
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


@functools.lru_cache(maxsize=8)
def read_indices(path, n):
    """The indices in `path`, of images of 0..n-1: a list, array, or dict with "indices"; .pkl, .pt, .npy, .json, .txt.

    Returns int64 [count]. Raises InputError unless they are distinct whole numbers in that range.
    """
    def unpickle(file):
        with open(file, "rb") as stream_:
            return IndexUnpickler(stream_).load()

    readers = {".pkl": unpickle, ".pickle": unpickle, ".pt": load, ".json": read_json,
               ".npy": lambda file: np.load(file, allow_pickle=False),
               ".txt": lambda file: [int(word) for word in Path(file).read_text().replace(",", " ").split()]}
    try:
        found = readers[Path(path).suffix](path)
        found = found["indices"] if isinstance(found, dict) else found
        found = found.values if isinstance(found, PickledArray) else found
        indices = torch.as_tensor(np.array(found).reshape(-1))
        whole = indices.long()
        if not indices.numel() or indices.dtype == torch.bool or not torch.equal(whole.to(indices.dtype), indices):
            raise ValueError(f"expected whole numbers, got {np.asarray(found).dtype} {list(np.shape(found))}")
        if whole.min() < 0 or whole.max() >= n:
            raise ValueError(f"indices from {whole.min()} to {whole.max()} for {n} training images")
        if len(whole.unique()) < len(whole):
            raise ValueError(f"{len(whole) - len(whole.unique())} of {len(whole)} indices occur twice")
    except InputError:
        raise
    except Exception as error:          # a missing file, an unknown suffix, a damaged or hostile pickle, no numbers
        raise InputError(f"subset:{path} is not a list of indices, or a dict with \"indices\", in one of "
                         f"{', '.join(readers)} ({first_line(error)})") from error
    return whole


@functools.lru_cache(maxsize=8)
def read_distilled(path, pixels, mean, std):
    """(images normalised float32 [n, 3, H, W], targets [n, d], rate or None) of a distilled set, whoever made it.

    path: a distilled.pt or a snapshot of this project; one of the authors' images_S.pt, with labels_S.pt and
    synlr_S.pt beside it; KRR-ST's x_syn*.pt with y_syn*.pt; or a folder with such files (the latest S is taken).
    Labels int64 [n] may stand in place of representations.
    pixels: of files other than ours, which say it: "raw" in [0, 1], to be normalised with `mean` and `std`;
    "normalised" already; "auto": the authors' are, of KRR-ST's it is told by their deviation (about 0.25 or 1).
    """
    path = Path(path)
    if path.is_dir():
        found = [sorted(path.glob(pattern), key=lambda p: ([int(n) for n in re.findall(r"\d+", p.stem)], p.stem))
                 for pattern in ("distilled.pt", "distilled_*.pt", "images_*.pt", "x_syn*.pt")]
        if not any(found):
            raise InputError(f"distilled:{path} holds no distilled.pt, images_*.pt or x_syn*.pt")
        path = next(files for files in found if files)[-1]
        print(f"distilled:{path.parent}: {path.name} is taken", flush=True)
    images, lr = load(path), None
    if isinstance(images, dict):
        z = images.get("representations", images.get("labels"))
        images, lr, known = images.get("images"), images.get("lr"), "normalised"
    else:
        beside = path.with_name(path.name.replace("images_", "labels_").replace("x_syn", "y_syn"))
        rate = path.with_name(path.name.replace("images_", "synlr_"))
        common = path.with_name("y_syn.pt")                              # KRR-ST's targets may serve several x_syn*.pt
        z, known = load(common if path.name.startswith("x_syn") and not beside.exists() else beside), None
        if path.name.startswith("images_"):
            known = "normalised" if pixels == "auto" else None
            lr = float(torch.as_tensor(load(rate)).mean()) if rate.exists() else None
    labels = torch.is_tensor(z) and z.dtype == torch.int64
    for what, x, form in (("images", images, "[n, 3, H, H]"), ("targets", z, "[n]" if labels else "[n, d]")):
        fits = torch.is_tensor(x) and x.dim() == form.count(",") + 1 and len(x) == len(images) > 0
        if not fits or not x.isfinite().all() or x.dim() == 4 and (x.shape[1] != 3 or x.shape[2] != x.shape[3]):
            raise InputError(f"distilled:{path}: its {what} must be finite {form}, a row for each image, not "
                             f"{list(x.shape) if torch.is_tensor(x) else type(x).__name__}")
    if labels and not 0 <= int(z.min()) <= int(z.max()) < 100_000:
        raise InputError(f"distilled:{path}: labels from {int(z.min())} to {int(z.max())}, not classes from 0 on")
    images, z = images.detach().float(), z if labels else z.detach().float()
    taken = known or pixels
    if taken == "auto":
        taken = "raw" if images.std() < 0.6 else "normalised"
        print(f"distilled:{path}: pixels of mean {images.mean():.2f} and deviation {images.std():.2f} are taken for "
              f"{taken} ones{' and normalised' if taken == 'raw' else ''}; --pixels says otherwise", flush=True)
    return normalize(images, mean, std) if taken == "raw" else images, z, lr


def distil_krr_st(source, images, chosen, log, checkpoint):
    """(images, targets) of the set `krr_st`, begun with `images`, the training images `chosen`."""
    iterations, z = source.settings["krr_iterations"], source.targets
    return krr_st(source.encoder, images, z[chosen], source.dataset.train_images, z, source.dataset.batch, iterations,
                  0, log, checkpoint, online_steps=min(1000, iterations))


def distil_dm(source, images, chosen, log, checkpoint):
    """(images, targets) of the set `dm`: its targets are the teacher's representations of the final images."""
    s, teacher = source.settings, source.run_dir.parent / "teacher.pt"
    weights = load(teacher)
    images = distribution_matching(source.encoder, images, source.dataset.train_images, source.dataset.batch,
                                   augmentations(source.dataset, s["crop_scale"], s["gray"]), s["dm_iterations"], 0,
                                   log, checkpoint)
    network = resnet18(width=s["teacher_width"], max_pool=bool(s["max_pool"]))
    network.load_state_dict(weights)
    return images, encode(network.eval().to(images.device).features, images, lambda x: x)


# Sets distilled here: how, and by which settings, beside data, targets, width and size.
RIVALS = {"krr_st": (distil_krr_st, ["krr_iterations"]), "dm": (distil_dm, ["dm_iterations", "crop_scale", "gray"])}


def distil_rival(kind, source):
    """(images, targets) of the set `kind` of RIVALS, as many as the run's: from its file in the run folder, or
    distilled now from random images."""
    s, data, n = source.settings, source.dataset, len(source.dataset.train_images)
    distil, depends = RIVALS[kind]
    made_from = fingerprint(s["width"], source.made_from, source.size, *(s[k] for k in depends))
    path = source.run_dir / f"{kind}_{made_from}.pt"
    if path.exists():
        saved = load(path)
        return saved["images"], saved["representations"]
    chosen = torch.randperm(n, generator=generator(0, kind, "images"))[:source.size].to(data.train_images.device)
    print(f"{kind}: distilling {source.size} images", flush=True)
    with Checkpoint(path.with_name(f"{path.stem}_checkpoint.pt")) as checkpoint:
        images, z = distil(source, data.batch(data.train_images[chosen]), chosen,
                                 Log(source.run_dir / "log.jsonl"), checkpoint)
    save(path, {"images": images.cpu(), "representations": z.cpu(), "lr": s["pretrain_lr"]})
    checkpoint.remove()
    return images, z


# ------------------------------------------------------------------------------------------------------------
# The cells of a table
# ------------------------------------------------------------------------------------------------------------
def read_source(run_dir, data_dir, device, rivals):
    """The Source in `run_dir`, a folder with distilled.pt as mkdt.py leaves it. rivals: more settings for it."""
    if not (run_dir / "distilled.pt").exists():
        raise InputError(f"{run_dir} holds no distilled.pt: make it with mkdt.py, or give another --run-dir")
    s, distilled = read_json(run_dir / "config.json")["settings"], load(run_dir / "distilled.pt")
    dataset = load_dataset(distilled["dataset"], data_dir, s["image_size"], device, s["train_images"])
    made_from = read_json(run_dir / "config.json").get("distill", {}).get("inputs", {}).get("data")
    if made_from not in (None, dataset.fingerprint()):
        raise InputError(f"the images of {distilled['dataset']} are not those that {run_dir} was made from: give their "
                         "--data-dir, or distil again (mkdt.py --force)")
    targets, d = student_targets(s, dataset, run_dir.parent)
    if "representations" in distilled and not torch.equal(targets[distilled["indices"]].cpu(),
                                                          distilled["representations"]):
        raise InputError(f"{run_dir / 'distilled.pt'} was made with other representations than those in "
                         f"{run_dir.parent}: distil again (--force)")
    test = run_dir.parent / "representations_test.pt"
    return Source(run_dir, {**s, **rivals}, dataset, targets, d,
                  load(test).to(device) if "representations" in distilled and test.exists() else None,
                  load(run_dir / "init.pt").get("losses"),
                  {k: v.to(device) if torch.is_tensor(v) else v for k, v in distilled.items()},
                  fingerprint(*((s["crop_scale"], s["gray"]) if callable(targets) else (targets.cpu(),))))


def student_targets(settings, dataset, run_dir):
    """(what students are trained towards, the dimension of their output): by --objective, the representations in
    run_dir (kd), the data set's labels (ce) or augmentations (ssl; SimCLR's 128 dimensions)."""
    device = dataset.train_images.device
    if settings.get("objective", "kd") == "kd":
        z = load(run_dir / "representations.pt").to(device)
        return z, z.shape[1]
    if settings["objective"] == "ce":
        if int(dataset.train_labels.min()) < 0:
            raise InputError(f"--objective ce needs labels, {dataset.name} has none for some training images")
        return dataset.train_labels, int(dataset.train_labels.max()) + 1
    return augmentations(dataset, settings["crop_scale"], settings["gray"]), 128


def read_tasks(names, source, percents, seeds, stratified, image_size, data_dir, device):
    """({name: data set to probe on, whole}, {name: shares of its labels}, {what is left out: why}).

    image_size: side of all, which then stands in their names too, as in dogs-64px; 0 for their own sizes. A task that
    cannot be had, or a share of it that cannot be probed, is left out; InputError if nothing remains.
    """
    own, tasks, shares, skipped = source.distilled["dataset"], {}, {}, {}
    names = list(dict.fromkeys(own if Path(name).resolve() == Path(own).resolve() else name for name in names))
    if megabytes := to_download(names, data_dir, image_size):
        print("eval: to download: " + ", ".join(f"{n} {mb} MB" for n, mb in megabytes.items()), flush=True)
    for name in names:
        size = source.settings["image_size"] if name == own and not image_size else image_size
        try:
            task = load_dataset(name, data_dir, size, device)
            check_task(task, 2 ** convnet_depth(source.dataset.image_size))
        except InputError as error:
            skipped[name] = str(error)
            continue
        why = {percent: share_is_useless(task, percent, seeds, stratified) for percent in percents}
        skipped.update({f"{percent:g}% of {name}": reason for percent, reason in why.items() if reason})
        if usable := [percent for percent in percents if not why[percent]]:
            called = f"{name}-{image_size}px" if image_size else name
            tasks[called], shares[called] = task, usable
    if not tasks:
        raise InputError("; ".join(skipped.values()))
    for what, reason in skipped.items():
        print(f"eval: {what} is left out: {reason}", flush=True)
    return tasks, shares, skipped


def check_task(task, smallest):
    """Raises InputError if `task` is below `smallest` pixels or has no labels to probe on."""
    if not task.labelled:
        raise InputError(f"{task.name} has no labels for both splits, so it cannot be probed: give --tasks")
    if task.image_size < smallest:
        raise InputError(f"{task.name} has {task.image_size}-pixel images, too small for the encoder: give "
                         f"--image-size {smallest} or more")


def share_is_useless(task, percent, seeds, stratified):
    """Why a share of the task's labels cannot be probed with one of the seeds; None if it can."""
    try:
        for seed in seeds:
            labels = labels_of(task, percent, seed, stratified)[1]
            if (labels == labels[0]).all():
                return (f"the {len(labels)} labelled images ({percent:g}% of {task.name}, seed {seed}) are all of one "
                        "class: raise --labels of eval.py")
    except InputError as error:
        return str(error)
    return None


def labels_of(task, percent, seed, stratified):
    """(indices, labels) of the `percent` of the task's training images that `seed` draws."""
    subset = labelled_subset(len(task.train_images), percent, seed, task.train_labels if stratified else None)
    subset = subset.to(task.train_images.device)
    return subset, task.train_labels[subset]


class Clock:
    """Seconds spent in each part of the evaluation."""

    def __init__(self, device):
        self.device, self.seconds = device, {"pre-training": 0.0, "encoding": 0.0, "probing": 0.0}

    @contextlib.contextmanager
    def __call__(self, part):
        began = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[part] += time.monotonic() - began


def evaluate(run_dir, sets=DEFAULT_SETS, tasks=(), percents=(1, 5), seeds=(0, 1, 2), encoders=("convnet",),
             protocol="linear", stratified=False, image_size=0, data_dir="data", device="cpu", save_encoder=None,
             compile="auto", reference=None, pixels="auto", ssl_epochs=1000, krr_iterations=160_000,
             dm_iterations=20_000):
    """Computes the cells of a table that results.json in `run_dir` lacks; rewrites results.json, .csv and .md.

    run_dir: a folder with distilled.pt, as mkdt.py leaves it. sets, percents, seeds, encoders: the rows of the table.
    tasks: its columns, data sets to probe on; the run's own if none. protocol: linear or finetune. reference: the set
    that paired differences are taken to, if any. The other arguments are flags, see --help. Several ranks take turns.
    Returns the list of records.
    """
    run_dir, device = Path(run_dir).resolve(), torch.device(device)
    rivals = {"pixels": pixels, "ssl_epochs": ssl_epochs, "krr_iterations": krr_iterations,
              "dm_iterations": dm_iterations}
    with rank_0_first():
        source = read_source(run_dir, data_dir, device, rivals)
        made_from = {name: identity(name, source) for name in sets}          # what cannot work is refused beforehand
        for kind in encoders:
            source.encoder(kind)
        if reference:
            parse_set(reference)
        tasks, shares, skipped = read_tasks(list(tasks) or [source.distilled["dataset"]], source, percents, seeds,
                                            stratified, image_size, data_dir, device)
        for kind in dict.fromkeys(parse_set(name)[0] for name in sets):
            if kind in RIVALS:
                try:
                    source.own[kind] = distil_rival(kind, source)
                except Diverged as error:                                    # the rest of the table is still made
                    skipped[kind] = str(error)
                    sets = [name for name in sets if parse_set(name)[0] != kind]
                    print(f"eval: {kind} is left out: {error}", flush=True)
    task_data = {t: fingerprint(task.train_images, task.train_labels, task.test_images, task.test_labels)
                 for t, task in tasks.items()}
    results = Results(source, protocol, stratified, made_from, rivals, task_data, reference, skipped)
    clock, log = Clock(device), Log(None if rank() else run_dir / "log.jsonl")
    judge = functools.partial(linear_scores if protocol == "linear" else finetuned_scores, stratified=stratified,
                              clock=clock)
    for kind in encoders:
        todo = [(name, seed, results.lacks(name, kind, seed, shares)) for seed in dict.fromkeys(seeds) for name in sets]
        todo = from_rank_0([(name, seed, lacks) for name, seed, lacks in todo if lacks or (
            save_encoder and not encoder_file(save_encoder, source, name, seed, kind).exists())])
        student = speed_up(kind, source, tasks, shares, [name for name, _, _ in todo], protocol, compile)
        log.start()
        for done in range(0, len(todo), ranks()):
            scores, failed = [], None
            for name, seed, lacks in todo[done + rank():][:1]:             # this rank's part of the round, if any
                scores, failed = score(student, source, tasks, lacks, name, seed, judge, save_encoder, clock,
                                       results.keep if ranks() == 1 else lambda scores: None)
            found = gather_from_ranks((scores, failed))
            for what, why in (failure for _, failure in found if failure):
                skipped[what] = why
                print(f"eval: {what} is left out: {why}", flush=True)
            if ranks() > 1:
                results.keep([score for part, _ in found for score in part])
            if rank() == 0 and (log.due() or done + ranks() >= len(todo)):
                log("eval", min(done + ranks(), len(todo)), len(todo), unit="set", set=todo[done][0],
                    seed=todo[done][1], **{f"{t} {p:g}%": a for _, _, t, p, _, _, a, _ in scores})
    results.keep([])
    wait_for_ranks()                                                       # until rank 0 has written the results
    if any(clock.seconds.values()):
        print("eval: " + ", ".join(f"{part} {duration(s)}" for part, s in clock.seconds.items()), flush=True)
        log.write({"stage": "eval", "seconds": clock.seconds})
    return [r for r in results.records if r["scores"]]


@dataclass
class Student:
    """An encoder that lends its memory to cell after cell, and fast functions of it: loss(x, z), features(x)."""
    kind: str
    encoder: torch.nn.Module
    loss: object = None
    features: object = None


def speed_up(kind, source, tasks, shares, names, protocol, mode):
    """The Student of that kind with its functions compiled for full batches where that pays for the sets `names`;
    says what pre-training on them and encoding the tasks will take."""
    encoder = source.encoder(kind).to(source.dataset.train_images.device).to(memory_format=torch.channels_last)
    student = Student(kind, encoder)
    if not names:
        return student
    config = read_json(source.run_dir / "config.json")                   # the choice is kept, so that cells are alike
    kept = config.setdefault("eval_compiled", {}).get(kind, [None, None])
    s, data = source.settings, source.dataset
    each = {name: count_steps(name, source) for name in set(names)}
    steps = sum(each[name] for name in names)
    encoded = len(names) * sum(len(task.test_images) + len(task.train_images) * sum(shares[t]) / 100
                               for t, task in tasks.items()) if protocol == "linear" else 0

    def full_batches(f, example, calls, backward, chosen):
        how = mode if chosen is None or mode != "auto" else "on" if chosen else "off"
        fast, compiled, seconds = compile_if_it_pays(f, example, calls / ranks(), how, backward)
        return lambda *x: (fast if len(x[0]) == len(example[0]) else f)(*x), compiled, seconds * calls / ranks()

    batch, chunk = (data.batch(data.train_images[:count]) for count in (s["pretrain_batch"], CHUNK))
    untouched = copy.deepcopy(encoder.state_dict())                       # a trial moves batch norm's statistics
    encoder.train()
    loss = None, 0.0
    if not callable(source.targets):                          # augmentations are other functions in every step
        student.loss, *loss = full_batches(lambda x, y: objective(encoder, x, y),
                                           (batch, source.targets[:len(batch)]), steps, True, kept[0])
    encoder.load_state_dict(untouched)
    encoder.eval()
    with torch.no_grad():                                   # as in `encode`: else it would be compiled there again
        student.features, *features = full_batches(encoder.features, (chunk,), encoded / CHUNK, False, kept[1])
    config["eval_compiled"][kind] = [loss[0], features[0]]
    if rank() == 0:
        save_json(source.run_dir / "config.json", config)
    print(f"eval: {len(names)} encoders ({kind}), about {duration(loss[1])} for {steps} steps of pre-training and "
          f"{duration(features[1])} for encoding; then their probes", flush=True)
    return student


def count_steps(name, source):
    """Steps of `pretrain` on the set called `name`."""
    s, chosen = source.settings, pretraining_set(name, 0, source)
    if chosen is None or chosen.targets is None:
        return 0
    return s["pretrain_epochs"] * math.ceil(len(chosen.images) / s["pretrain_batch"])


def score(student, source, tasks, wanted, name, seed, judge, save_encoder, clock, keep):
    """([(set, encoder, task, share, seed, rate, accuracy, mse), ...], None or (what, why) it diverged) of a set and
    seed; keep(scores) is called task by task. Divergence costs a set its own cells only."""
    scores = []
    try:
        for t, lr, accuracies, mse in cell(student, source, tasks, wanted, name, seed, judge, save_encoder, clock):
            scores += [(name, student.kind, t, p, seed, lr, a, mse) for p, a in zip(wanted[t], accuracies)]
            keep(scores)
    except Diverged as error:
        return scores, (f"{name}, seed {seed}", str(error))
    return scores, None


def cell(student, source, tasks, wanted, name, seed, judge, save_encoder, clock):
    """Pre-trains on the set `name` with `seed` and judges it on each task: yields (task, rate, the accuracies for the
    shares of labels in wanted[task], mean squared distance to the teacher on test images or None)."""
    chosen, s, data = pretraining_set(name, seed, source), source.settings, source.dataset
    kind, argument, _ = parse_set(name)
    shape = of_run = source.d, data.image_size
    if chosen and torch.is_tensor(chosen.targets):
        y = chosen.targets
        classes = int(y.max()) + 1 if y.dim() == 1 else 0
        if classes and source.settings.get("objective") == "ce":              # as many as the run's own set
            classes = max(classes, source.d)
        shape = classes or y.shape[1], chosen.images.shape[-1]
    if shape != of_run:                                               # made elsewhere, with another teacher or size
        student = Student(student.kind, source.encoder(student.kind, *shape).to(chosen.images.device))
    encoder = student.encoder
    encoder.load_state_dict(build(lambda: source.encoder(student.kind, *shape), seed,
                                  "evaluation encoder").state_dict())
    with clock("pre-training"):
        if chosen and chosen.targets is None:
            pretrain_ssl(encoder, chosen.images, data, s["ssl"], chosen.lr, s["ssl_epochs"], seed,
                         s["pretrain_batch"], s["lambd"], s["temperature"], s["crop_scale"], s["gray"])
        elif chosen:
            pretrain(encoder, *chosen, s["pretrain_epochs"], seed, s["pretrain_batch"], loss=student.loss,
                     prepare=data.batch if chosen.images.dtype == torch.uint8 else lambda x: x.contiguous(
                         memory_format=torch.channels_last))
    encoder.eval()
    if save_encoder:
        save(encoder_file(save_encoder, source, name, seed, student.kind), encoder.state_dict())
    for t, percents in wanted.items():
        accuracies, z = judge(encoder, student.features or encoder.features, tasks[t], percents, seed)
        # Eq. 2's distance, for outputs that were trained to be this teacher's and for untrained ones.
        ours = t == source.distilled["dataset"] and kind != "distilled" and (kind, argument) != SSL
        known = source.test_representations
        ours = ours and z is not None and known is not None and z.shape == known.shape
        yield t, chosen.lr if chosen else None, accuracies, F.mse_loss(z, known).item() if ours else None


def linear_scores(encoder, features, task, percents, seed, stratified, clock):
    """([accuracy of a linear probe on each of the `percents` of labels], the encoder's output on the test images, or
    None where they have another size than it was built for). Each image is encoded once, in eval mode."""
    drawn = [labels_of(task, percent, seed, stratified) for percent in percents]
    needed = torch.cat([subset for subset, _ in drawn]).unique()                       # sorted
    with clock("encoding"):
        test_features = encode(features, task.test_images, task.batch)
        train_features = encode(features, task.train_images[needed], task.batch)
        fits = test_features.shape[1] == encoder.head.in_features
        z = encode(encoder.head, test_features, lambda x: x) if fits else None
    accuracies, classes = [], int(task.train_labels.max()) + 1
    with clock("probing"):
        for subset, labels in drawn:
            W, b = linear_probe(train_features[torch.searchsorted(needed, subset)], labels, classes)
            accuracies.append(accuracy(test_features @ W.T + b, task.test_labels))
    return accuracies, z


def finetuned_scores(encoder, features, task, percents, seed, stratified, clock):
    """([accuracy after fine-tuning the whole encoder on each of the `percents` of labels], None)."""
    accuracies = []
    with clock("probing"):
        for subset, labels in (labels_of(task, percent, seed, stratified) for percent in percents):
            network = finetune(encoder, task.train_images[subset], labels, int(task.train_labels.max()) + 1,
                               task.batch, seed)
            accuracies.append(accuracy(encode(network, task.test_images, task.batch), task.test_labels))
    return accuracies, None


def encoder_file(folder, source, name, seed, kind="convnet"):
    """Where --save-encoder keeps the encoder pre-trained on the set `name`; its end tells one run's from another's."""
    run = fingerprint(str(source.run_dir), identity(name, source))
    name = re.sub(r"[^\w.-]+", "_", name.replace("@", "_at_"))
    return Path(folder) / f"{name}_{seed}{'' if kind == 'convnet' else '_' + kind.replace(':', '_')}_{run}.pt"


# ------------------------------------------------------------------------------------------------------------
# Results: results.json, results.csv, results.md
# ------------------------------------------------------------------------------------------------------------
KEY = ("pretraining", "task", "labels_percent", "stratified", "encoder", "protocol")


class Results:
    """The records of results.json, those of earlier commands included: one a row and column of a table, whose "scores"
    are {seed: (accuracy, mse)}. What is kept is written at once."""

    def __init__(self, source, protocol, stratified, made_from, made_with, task_data, reference, skipped):
        """made_from, task_data: what each set and each task depend on; the rest as in `evaluate` and `tables`."""
        self.source, self.protocol, self.stratified, self.reference = source, protocol, stratified, reference
        self.made_from, self.made_with, self.task_data, self.skipped = made_from, made_with, task_data, skipped
        self.records = read_results(source.run_dir, source, made_from, task_data)

    def record(self, name, kind, task, percent):
        """The record of a set, encoder, task and share of labels; a new one if there is none."""
        key = dict(zip(KEY, (name, task, percent, self.stratified, kind, self.protocol)))
        for record in self.records:
            if all(record[k] == key[k] for k in KEY):
                return record
        self.records.append({**key, "distilled_percent": self.source.distilled["percent"], "lr": None,
                             "made_from": self.made_from[name], "made_with": self.made_with,
                             "task_data": self.task_data[task], "scores": {}})
        return self.records[-1]

    def lacks(self, name, kind, seed, shares):
        """{task: the shares of its labels for which a set has no score with this seed}."""
        missing = {t: [p for p in percents if seed not in self.record(name, kind, t, p)["scores"]]
                   for t, percents in shares.items()}
        return {t: percents for t, percents in missing.items() if percents}

    def keep(self, scores):
        """Adds scores, (set, encoder, task, share, seed, rate, accuracy, mse) each, and writes all that is known."""
        for *row, seed, lr, accuracy, mse in scores:
            record = self.record(*row)
            record["lr"], record["scores"][seed] = lr, (accuracy, mse)
        if rank() == 0:
            write_results(self.source.run_dir, self.records, self.source, self.reference, self.skipped)


def read_results(run_dir, source, made_from, task_data):
    """The records of results.json that still hold: those whose set and task would be made from the same things now.

    made_from: the identities of the sets asked for now; others are identified with the flags they were made with.
    """
    @functools.lru_cache(maxsize=None)
    def identify(name, flags):
        return identity(name, replace(source, settings={**source.settings, **dict(flags)}))

    path, records, dropped = run_dir / "results.json", [], []
    for r in read_json(path) if path.exists() else []:
        try:
            now = made_from.get(r["pretraining"]) or identify(r["pretraining"], tuple(r["made_with"].items()))
        except InputError:                                # a file it was made from is gone: the record is all there is
            now = r["made_from"]
        except KeyError:                                                               # of an earlier version
            now = None
        if r["made_from"] == now and r["task_data"] == task_data.get(r["task"], r["task_data"]):
            r["scores"] = {seed: score for seed, *score in zip(r.pop("seeds"), r.pop("accuracies"), r.pop("mses"))}
            records.append(r)
        else:
            dropped.append(r["pretraining"])
    if dropped:
        print(f"eval: earlier results of {', '.join(dict.fromkeys(dropped))} are dropped: they were made from "
              "something else", flush=True)
    return records


def write_results(run_dir, records, source, reference, skipped):
    """results.json: a record a row and column, with mean and std over seeds (percent; ddof 0, as the authors compute
    it); results.csv: a line a seed; results.md: the paper's layout."""
    done = []
    for r in (r for r in records if r["scores"]):
        seeds = sorted(r["scores"])
        accuracies, mses = zip(*(r["scores"][s] for s in seeds))
        known = [m for m in mses if m is not None]
        done.append({**{k: v for k, v in r.items() if k != "scores"}, "seeds": seeds, "accuracies": accuracies,
                     "mean": float(np.mean(accuracies)), "std": float(np.std(accuracies)), "mses": mses,
                     "mse": float(np.mean(known)) if known else None})
    save_json(run_dir / "results.json", done)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow([*KEY, "distilled_percent", "lr", "seed", "accuracy", "mse"])
    lines.writerows([*(r[k] for k in KEY), r["distilled_percent"], r["lr"], *score] for r in done
                    for score in zip(r["seeds"], r["accuracies"], r["mses"]))
    write_file(run_dir / "results.csv", lambda file: file.write(text.getvalue().encode()))
    write_file(run_dir / "results.md", lambda file: file.write(tables(done, source, reference, skipped).encode()))


def method(name, source):
    """(row of the paper's tables, as METHODS has them, or None; what to call it) of the set `name`."""
    kind, argument, rate = parse_set(name)
    mkdt, path = {"high_loss": "mkdt", "random": "mkdt_random"}, Path(argument).resolve()
    if kind == "mkdt":
        row = {"ssl": "mtt_ssl", "ce": "mtt"}.get(source.settings.get("objective"), mkdt[source.settings["init"]])
        called = METHODS["mkdt" if row == "mkdt_random" else row]
    elif kind == "subset":
        row = "sas" if "sas" in path.name.lower() else None
        called = f"{METHODS.get(row, 'Subset')} ({path.name})"
    elif kind == "distilled":                             # a sibling of this run's set says in its name what it is
        home = path if path.is_dir() else path.parent
        percent, _, init = home.name.partition("pct_")
        sibling = home.parent == source.run_dir.parent and percent == f"{source.distilled['percent']:g}"
        row = mkdt.get(init) if sibling else "krr_st" if "krr" in home.name.lower() + path.name.lower() else None
        called = f"{METHODS.get(row, 'Distilled')} ({argument})"
    else:
        row = f"{kind}:{argument}" if argument else kind
        called = METHODS[row]
    return None if rate else row, called + (", learned rate" if rate == "mkdt" else f", rate {rate}" if rate else "")


def tables(records, source, reference, skipped):
    """The records as the paper lays them out, a table for each protocol and encoder: a row for each share of labels
    and set, a column for each task, mean and std over seeds; the paper's values below ours where it has them."""
    text = []
    for protocol, kind, stratified in dict.fromkeys((r["protocol"], r["encoder"], r["stratified"]) for r in records):
        of = [r for r in records if (r["protocol"], r["encoder"], r["stratified"]) == (protocol, kind, stratified)]
        title = f"{source.distilled['dataset']}, {source.distilled['percent']:g}% distilled, {kind}, " + \
            ("linear probe" if protocol == "linear" else "fine-tuning") + (", stratified labels" if stratified else "")
        text += [f"## {title}", "", *rows_of(of, source), ""]
        if reference:
            text += rows_of_differences(of, source, reference)
    text += [f"Left out: {what} ({why})" for what, why in skipped.items()]
    return "\n".join(text) + "\n"


def order_of(records):
    """(shares of labels, sets in the order of SETS, tasks) of the records."""
    kinds = [parse_set(name)[0] for name in SETS]
    return (sorted({r["labels_percent"] for r in records}),
            sorted({r["pretraining"] for r in records}, key=lambda name: (kinds.index(parse_set(name)[0]), name)),
            list(dict.fromkeys(r["task"] for r in records)))


def rows_of(records, source):
    """The lines of one table of `tables`. Bold: the best, but for the full data."""
    def is_full(name):
        return parse_set(name)[0] == "full"

    percents, names, tasks = order_of(records)
    s, one = source.settings, records[0]
    at = source.distilled["dataset"], f"{source.distilled['percent']:g}", s["ssl"], one["encoder"], one["protocol"]
    as_in_the_paper = not one["stratified"] and s["width"] == 128 and not s["train_images"]
    paper = paper_values() if as_in_the_paper else {}
    if not (source.run_dir.parent / "teacher.pt").exists() or s["teacher_width"] != 64:     # rows without teacher
        paper = {key: value for key, value in paper.items() if key[6] in ("none", "mtt_ssl")}
    with_mse, marked, beside = any(r["mse"] is not None for r in records), False, False
    columns = ["Labels", "Pre-training set", "Rate", *tasks, *["MSE to teacher"] * with_mse]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for percent in percents:
        cells = {(r["pretraining"], r["task"]): r for r in records if r["labels_percent"] == percent}
        best = {t: max((r["mean"] for (name, task), r in cells.items() if task == t and not is_full(name)),
                       default=0) for t in tasks}
        for name in (n for n in names if any((n, t) in cells for t in tasks)):
            row, called = method(name, source)
            ours, theirs = [], []
            for t in tasks:
                r, value = cells.get((name, t)), paper.get((*at, f"{percent:g}", row, t))
                theirs.append(f"{value[0]:.2f} ± {value[1]:.2f}" if value and r else "")
                if not r:
                    ours.append("")
                    continue
                mean = f"**{r['mean']:.2f}**" if r["mean"] == best[t] and not is_full(name) else f"{r['mean']:.2f}"
                ours.append(f"{mean} ± {r['std']:.2f} ({len(r['seeds'])})")
                if value and abs(r["mean"] - value[0]) > 2 * math.hypot(r["std"], value[1]):
                    ours[-1], marked = ours[-1] + " ≠", True
            first = next(r for (n, _), r in cells.items() if n == name)
            mse = [next((f"{r['mse']:.4f}" for (n, _), r in cells.items() if n == name and r["mse"] is not None), "")]
            rate = f"{first['lr']:.3g}" if first["lr"] else ""
            lines.append(f"| {percent:g}% | {called} | {rate} | " + " | ".join(ours + mse * with_mse) + " |")
            if any(theirs):
                beside = True
                lines.append("| | *paper* | | " + " | ".join(theirs + [""] * with_mse) + " |")
    notes = ["Percent correct on test images, mean ± std over seeds (how many)"]
    notes += ["*paper*: its value in the cell above"] * beside
    notes += ["≠: differs from it by more than twice the combined std"] * marked
    return lines + ["", "; ".join(notes) + "."]


def rows_of_differences(records, source, reference):
    """The lines of the paired differences to the set `reference`."""
    percents, names, tasks = order_of(records)
    lines = []
    for percent in percents:
        differences = {t: paired([r for r in records if r["labels_percent"] == percent and r["task"] == t], reference)
                       for t in tasks}
        for name in (n for n in names if any(n in d for d in differences.values())):
            shown = ["{:+.2f} ± {:.2f} ({})".format(*differences[t][name]) if name in differences[t] else ""
                     for t in tasks]
            lines.append(f"| {percent:g}% | {method(name, source)[1]} | " + " | ".join(shown) + " |")
    columns = ["Labels", "Pre-training set", *tasks]
    called = method(reference, source)[1]
    if not lines:
        return [f"No set shares two seeds with {called}, so there are no paired differences.", ""]
    return [f"Each set minus {called}, paired by seed: mean ± standard error (seeds)", "",
            "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|", *lines, ""]


def paired(records, reference):
    """{set: (mean, standard error, seeds)} of each set's accuracy minus that of the set `reference`, over the seeds
    that both have (ddof 1; sets with fewer than two in common are left out). records: of one task and share."""
    scores = {r["pretraining"]: dict(zip(r["seeds"], r["accuracies"])) for r in records}
    own, result = scores.pop(reference, {}), {}
    for name, score in scores.items():
        d = np.array([score[s] - own[s] for s in score if s in own])
        if len(d) > 1:
            result[name] = d.mean(), d.std(ddof=1) / len(d) ** 0.5, len(d)
    return result


# ------------------------------------------------------------------------------------------------------------
# The paper's tables: settings and values
# ------------------------------------------------------------------------------------------------------------
# What --table N stands for; {run} is the run's folder. SAS is added by --sets subset:FILE.
TABLES = {
    "1": dict(runs=["cifar10/2pct_high_loss"], sets=["none", "random", "krr_st", "mkdt", "full"]),
    "2": dict(runs=["cifar100/2pct_high_loss"],
              sets=["none", "random", "high_loss", "krr_st", "distilled:{run}/../2pct_random", "mkdt", "full"]),
    "3": dict(runs=["tinyimagenet/2pct_high_loss"], sets=["none", "random", "krr_st", "mkdt", "full"]),
    "4": dict(runs=[f"{d}/5pct_high_loss" for d in ("cifar10", "cifar100", "tinyimagenet")],
              sets=["random", "krr_st", "mkdt"]),
    "5": dict(runs=["cifar100/5pct_high_loss"], encoders=["resnet10", "resnet18"], labels=[5],
              sets=["none", "random", "krr_st", "distilled:{run}/distilled_01000.pt"]),
    "6": dict(runs=[f"{d}_simclr/2pct_high_loss" for d in ("cifar10", "cifar100")], sets=["random", "krr_st", "mkdt"]),
    "7": dict(runs=[f"{d}/2pct_high_loss" for d in ("cifar10", "cifar100", "tinyimagenet")], labels=[10, 50],
              sets=["random", "krr_st", "mkdt"]),
    "10": dict(runs=["cifar100/2pct_high_loss"], protocol="finetune", labels=[100],
               sets=["none", "random:ssl", "krr_st"],
               tasks=["cifar100", "cifar10", "aircraft", "cars", "cub2011", "dogs", "flowers"]),
    "11": dict(runs=[f"{d}/5pct_high_loss" for d in ("cifar10", "cifar100")], sets=["dm"]),
    "12": dict(runs=[f"{d}_ssl/5pct_random" for d in ("cifar10", "cifar100")], sets=["mkdt"]),
}

# Tables 1 - 7 and 10 - 12. Each block: pre-training data, distilled percent, teacher, encoder, protocol: the tasks;
# then a row of means and deviations for each share of labels and method.
PAPER = """
# cifar10 2 barlow convnet linear: cifar10 tinyimagenet cifar100 aircraft cub2011 dogs flowers
1 none 35.84 1.39  2.52 0.09  8.01 0.19  2.43 0.17  1.27 0.10  1.92 0.18  2.02 0.76
1 random 36.35 0.67  2.41 0.08  7.42 0.31  2.41 0.30  1.16 0.08  1.90 0.22  1.99 0.19
1 sas 36.02 1.52  2.69 0.31  7.77 0.35  2.29 0.26  1.14 0.01  1.78 0.32  2.22 0.23
1 krr_st 37.19 0.49  2.84 0.17  8.67 0.41  2.53 0.05  1.25 0.02  1.88 0.32  2.42 0.22
1 mkdt 44.36 1.61  3.58 0.09  10.58 0.24  2.58 0.18  1.37 0.09  2.11 0.28  2.52 0.07
1 full 58.21 0.28  4.94 0.38  14.53 0.40  2.92 0.25  1.69 0.13  2.40 0.25  3.23 0.69
5 none 46.23 0.07  5.37 0.39  16.12 0.13  5.61 0.68  1.97 0.13  2.90 0.18  5.22 0.52
5 random 46.62 1.02  5.49 0.12  15.28 0.66  5.35 0.96  1.51 0.08  2.52 0.22  3.64 0.46
5 sas 46.52 0.61  5.41 0.42  15.90 0.28  5.63 0.76  1.48 0.16  2.69 0.21  3.75 0.10
5 krr_st 46.75 0.45  6.85 0.20  16.65 0.31  5.41 0.45  1.88 0.10  2.76 0.40  4.52 0.14
5 mkdt 53.08 0.13  7.25 0.17  19.57 0.29  5.97 0.79  2.06 0.10  3.06 0.46  4.97 0.54
5 full 67.16 0.43  10.85 0.16  26.38 0.52  6.92 0.61  2.51 0.08  3.88 0.25  6.37 0.67
# cifar100 2 barlow convnet linear: cifar100 tinyimagenet cifar10 aircraft cub2011 dogs flowers
1 none 8.01 0.19  2.52 0.09  35.84 1.39  2.43 0.17  1.27 0.10  1.92 0.18  2.02 0.76
1 random 9.20 0.15  3.16 0.21  38.03 1.22  2.41 0.15  1.43 0.12  1.99 0.10  2.81 0.43
1 sas 9.39 0.18  3.23 0.19  38.73 1.48  2.53 0.04  1.42 0.04  2.07 0.14  2.95 0.37
1 high_loss 10.03 0.12  3.33 0.10  39.78 1.61  2.47 0.29  1.56 0.14  2.13 0.24  2.63 0.51
1 krr_st 8.31 0.30  2.73 0.08  37.19 0.83  2.56 0.20  1.29 0.04  1.92 0.11  2.58 0.14
1 mkdt_random 11.44 0.36  3.90 0.20  43.35 1.08  2.53 0.22  1.66 0.13  2.22 0.20  2.63 1.02
1 mkdt 12.36 0.67  4.13 0.29  44.90 1.18  2.74 0.30  1.61 0.14  2.15 0.39  3.24 0.44
1 full 21.44 0.86  6.80 0.37  58.21 0.81  3.20 0.22  1.79 0.08  2.50 0.27  3.09 1.14
5 none 16.12 0.13  5.37 0.39  46.23 0.07  5.61 0.68  1.97 0.13  2.90 0.18  5.22 0.52
5 random 17.75 0.42  6.79 0.06  48.59 0.26  5.66 0.71  2.12 0.23  3.02 0.31  5.44 0.22
5 sas 17.94 0.54  6.71 0.52  48.69 0.26  5.95 0.88  2.15 0.27  3.22 0.47  5.56 0.43
5 high_loss 18.72 0.21  6.94 0.34  49.59 0.34  5.63 0.52  2.58 0.13  3.18 0.20  6.14 0.54
5 krr_st 16.40 0.63  6.16 0.45  47.96 0.32  5.54 0.97  2.00 0.08  2.95 0.25  4.69 0.15
5 mkdt_random 21.71 0.28  8.01 0.08  53.08 0.19  6.24 0.79  2.53 0.03  3.38 0.23  6.26 0.22
5 mkdt 22.64 0.42  8.07 0.16  54.12 0.29  6.68 0.83  2.50 0.16  3.25 0.36  6.37 0.46
5 full 35.78 0.54  14.11 0.55  67.25 0.49  7.46 0.53  3.00 0.05  4.23 0.21  8.41 0.60
# tinyimagenet 2 barlow convnet linear: tinyimagenet cifar10 cifar100 aircraft cub2011 dogs flowers
1 none 2.63 0.22  30.40 1.02  7.14 0.35  2.25 0.11  1.28 0.16  1.76 0.13  2.84 0.20
1 random 3.03 0.20  34.46 1.13  7.66 0.67  2.27 0.22  1.24 0.05  1.92 0.26  2.16 0.47
1 krr_st 3.32 0.22  34.24 0.94  7.84 0.98  2.14 0.30  1.30 0.08  1.95 0.22  2.21 0.33
1 mkdt 3.87 0.05  37.25 0.47  8.95 0.34  2.30 0.19  1.36 0.22  1.99 0.20  2.86 0.25
1 full 9.42 0.36  50.52 0.87  15.18 0.37  2.57 0.29  1.59 0.31  2.20 0.37  3.29 0.28
5 none 5.69 0.45  39.91 0.36  13.32 0.30  4.46 0.81  1.71 0.06  2.51 0.18  4.83 0.32
5 random 6.76 0.16  43.74 0.82  13.83 0.13  4.49 0.91  1.66 0.14  2.67 0.31  4.23 0.70
5 krr_st 7.13 0.22  42.44 1.85  13.85 0.72  3.99 0.57  1.77 0.07  2.47 0.21  4.14 0.71
5 mkdt 7.99 0.32  45.97 0.27  16.50 0.35  4.66 0.70  2.07 0.11  2.91 0.10  5.49 0.51
5 full 18.93 0.34  58.90 0.43  26.47 0.78  5.07 0.71  2.47 0.06  3.85 0.19  7.09 1.01
# cifar10 5 barlow convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
1 random 37.63 2.28  7.63 0.13  2.63 0.07  2.28 0.22  1.13 0.11  1.81 0.18  2.05 0.23
1 krr_st 36.69 0.88  8.69 0.32  3.20 0.23  2.26 0.13  1.33 0.09  1.91 0.34  2.39 0.18
1 mkdt 50.23 1.48  12.33 0.31  4.27 0.36  3.11 0.15  1.59 0.07  2.26 0.29  2.42 0.62
5 random 48.13 0.35  16.06 0.15  5.21 0.56  5.03 0.88  1.71 0.12  2.61 0.20  3.30 0.10
5 krr_st 47.40 0.34  16.95 0.53  7.10 0.27  5.56 0.77  1.98 0.07  2.78 0.16  4.38 0.04
5 mkdt 58.37 0.17  23.15 0.71  8.84 0.20  6.79 0.88  2.30 0.14  3.34 0.35  5.94 0.24
# cifar100 5 barlow convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
1 random 42.45 0.76  11.55 0.37  4.17 0.15  2.47 0.17  1.51 0.12  2.12 0.18  2.61 0.61
1 krr_st 37.86 1.14  9.02 0.24  2.94 0.13  2.42 0.35  1.50 0.07  1.99 0.19  3.04 0.36
1 mkdt 47.77 1.12  13.40 0.31  4.45 0.33  2.93 0.42  1.61 0.02  2.22 0.27  2.59 1.07
5 random 51.92 0.33  20.34 0.20  7.83 0.24  6.06 0.79  2.27 0.18  3.22 0.39  5.78 0.34
5 krr_st 47.53 0.11  17.24 0.47  6.60 0.32  5.37 0.85  2.31 0.33  2.87 0.27  5.23 0.14
5 mkdt 56.61 0.58  25.18 0.67  9.12 0.40  6.66 0.62  2.66 0.23  3.66 0.44  6.93 0.60
# tinyimagenet 5 barlow convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
1 random 40.33 1.16  9.41 0.29  4.19 0.19  2.23 0.38  1.44 0.10  2.06 0.12  2.77 0.24
1 krr_st 34.27 1.36  7.54 0.35  3.19 0.22  2.11 0.23  1.30 0.12  1.68 0.20  2.65 0.64
1 mkdt 41.44 0.85  10.29 0.38  5.09 0.45  2.16 0.28  1.29 0.06  2.02 0.28  2.92 0.49
5 random 48.46 0.40  15.63 0.62  8.99 0.61  4.55 0.80  1.98 0.18  2.91 0.47  5.06 0.84
5 krr_st 42.82 0.46  13.71 0.30  6.50 0.23  4.36 0.49  1.97 0.06  2.75 0.37  3.97 0.14
5 mkdt 50.79 0.47  19.25 0.23  10.63 0.23  4.88 0.65  2.08 0.03  2.89 0.41  5.58 0.43
# cifar10 2 simclr convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
1 random 35.20 1.12  7.35 0.28  2.29 0.14  2.21 0.09  1.19 0.06  1.83 0.16  1.83 0.24
1 krr_st 36.90 1.30  8.38 0.17  2.95 0.12  2.45 0.13  1.19 0.09  1.87 0.18  2.35 0.06
1 mkdt 40.77 1.05  9.17 0.13  3.06 0.16  2.69 0.21  1.35 0.06  2.02 0.23  1.88 0.22
5 random 45.69 0.43  15.09 0.39  5.71 0.15  5.21 1.04  1.52 0.18  2.48 0.16  3.36 0.20
5 krr_st 46.87 0.52  16.29 0.37  6.31 0.43  5.31 0.63  1.89 0.14  2.66 0.18  4.36 0.16
5 mkdt 51.77 0.25  18.07 0.52  6.55 0.23  5.90 0.76  1.89 0.15  2.98 0.36  4.09 0.28
# cifar100 2 simclr convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
1 random 34.67 0.89  7.35 0.54  2.29 0.16  2.23 0.21  1.10 0.06  1.78 0.26  1.77 0.13
1 krr_st 36.57 1.02  8.38 0.36  3.01 0.22  2.41 0.15  1.28 0.02  1.71 0.30  1.98 0.24
1 mkdt 39.59 1.19  9.44 0.37  3.07 0.08  2.60 0.23  1.33 0.11  1.93 0.27  2.49 0.06
5 random 45.67 0.69  15.11 0.44  5.21 0.29  5.21 0.67  1.51 0.14  2.54 0.19  3.37 0.47
5 krr_st 46.76 0.50  15.75 0.46  6.17 0.20  5.43 0.65  1.93 0.06  2.61 0.25  3.55 0.29
5 mkdt 49.87 0.75  18.47 0.21  6.65 0.21  5.56 0.86  1.93 0.13  2.98 0.32  4.83 0.27
# cifar10 2 barlow convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
10 random 51.21 0.38  19.75 0.36  8.04 0.45  7.42 0.43  2.15 0.16  3.10 0.30  5.22 0.96
10 krr_st 51.02 0.53  21.01 0.14  8.95 0.26  7.91 0.76  2.44 0.12  3.54 0.29  6.82 0.64
10 mkdt 56.88 0.85  24.61 0.42  9.76 0.28  8.96 0.71  2.78 0.22  4.37 0.37  7.38 1.00
50 random 57.18 0.63  26.86 0.36  15.16 0.03  16.11 0.90  4.18 0.05  6.17 0.08  12.98 0.35
50 krr_st 58.09 0.07  29.01 0.30  15.94 0.31  17.60 1.04  5.01 0.34  6.81 0.35  15.92 0.64
50 mkdt 63.63 0.17  34.06 0.39  17.57 0.37  19.43 0.93  5.43 0.22  7.63 0.17  16.89 0.37
# cifar100 2 barlow convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
10 random 52.23 0.38  21.56 0.62  8.57 0.43  8.01 0.61  2.73 0.17  3.94 0.28  7.50 1.33
10 krr_st 52.40 0.73  21.39 0.16  8.21 0.07  7.64 0.36  2.34 0.12  3.76 0.25  6.52 1.28
10 mkdt 57.67 0.33  27.28 0.18  11.05 0.50  9.25 0.70  3.42 0.16  4.43 0.38  9.35 1.28
50 random 60.39 0.17  31.62 0.32  16.02 0.14  18.10 0.12  5.65 0.18  7.37 0.23  16.18 0.31
50 krr_st 58.57 0.78  29.46 0.81  15.70 0.07  15.89 0.54  4.82 0.41  7.00 0.18  15.07 0.46
50 mkdt 65.85 0.33  38.09 0.35  17.46 0.24  20.73 0.24  6.67 0.05  8.48 0.21  21.15 0.50
# tinyimagenet 2 barlow convnet linear: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
10 random 44.08 1.91  16.43 0.12  8.84 0.85  5.57 0.61  2.12 0.30  3.07 0.17  6.51 1.27
10 krr_st 45.48 0.84  17.02 0.26  8.88 0.41  5.29 0.16  2.08 0.21  3.21 0.15  6.10 1.44
10 mkdt 49.33 0.49  20.19 0.45  10.89 0.63  6.61 0.28  2.47 0.18  3.86 0.36  7.33 1.34
50 random 47.35 0.92  19.28 0.61  14.01 0.38  8.74 0.78  3.61 0.31  5.18 0.29  13.60 1.13
50 krr_st 48.16 1.18  20.01 0.40  13.59 0.47  8.66 1.29  3.46 0.22  4.98 0.31  15.12 0.37
50 mkdt 51.98 0.44  24.41 0.39  16.99 0.25  10.84 0.25  4.44 0.28  6.22 0.15  16.47 0.46
# cifar100 5 barlow resnet10 linear: cifar100 cifar10 tinyimagenet aircraft cub2011 dogs flowers
5 none 1.36 0.31  13.18 1.74  1.03 0.07  1.00 0.01  0.43 0.13  0.60 0.01  0.75 0.14
5 random 18.80 0.58  44.24 0.85  10.33 0.16  2.15 0.34  1.81 0.16  2.52 0.29  5.41 0.61
5 krr_st 13.84 0.78  39.21 0.55  8.04 0.52  2.12 0.15  1.16 0.05  1.77 0.14  4.56 0.42
5 mkdt 23.23 0.79  49.13 0.69  13.35 0.24  1.68 0.10  1.67 0.09  2.64 0.16  6.15 0.47
# cifar100 5 barlow resnet18 linear: cifar100 cifar10 tinyimagenet aircraft cub2011 dogs flowers
5 none 1.01 0.01  10.00 0.00  0.91 0.10  1.01 0.01  0.56 0.07  0.67 0.09  0.93 0.38
5 random 16.82 0.69  40.11 1.16  8.95 0.23  1.84 0.25  1.62 0.06  2.40 0.25  5.16 0.59
5 krr_st 12.30 0.83  35.73 1.07  7.21 0.35  2.32 0.39  1.18 0.16  1.81 0.14  2.45 0.12
5 mkdt 21.51 0.17  46.10 0.60  11.57 0.17  2.05 0.43  1.86 0.05  2.36 0.29  5.17 0.93
# cifar100 2 barlow convnet finetune: cifar100 cifar10 aircraft cars cub2011 dogs flowers
100 none 64.95 0.21  87.34 0.13  34.66 0.39  19.43 0.14  18.46 0.11  22.31 0.22  58.75 0.41
100 krr_st 66.81 0.11  88.72 0.11  41.54 0.37  28.68 0.32  25.30 0.37  26.39 0.08  67.88 0.18
100 random:ssl 66.44 0.14  88.74 0.20  42.02 0.06  28.75 0.23  25.12 0.19  26.57 0.22  68.21 0.40
# cifar10 5 barlow convnet linear: cifar100 cifar10 tinyimagenet aircraft cub2011 dogs flowers
1 dm 7.09 0.16  35.98 0.98  2.43 0.19  2.15 0.21  1.19 0.13  1.71 0.18  1.60 0.17
1 mtt_ssl 4.63 0.30  22.06 1.86  1.11 0.16  1.92 0.26  0.77 0.11  1.38 0.28  1.26 0.37
5 dm 14.77 0.10  46.41 0.35  5.11 0.32  4.94 0.88  1.57 0.31  2.53 0.13  3.10 0.33
5 mtt_ssl 7.10 0.43  29.04 0.58  1.90 0.17  2.81 0.60  0.88 0.08  1.82 0.19  1.42 0.53
# cifar100 5 barlow convnet linear: cifar100 cifar10 tinyimagenet aircraft cub2011 dogs flowers
1 dm 8.74 0.35  37.75 0.87  2.75 0.22  2.51 0.08  1.20 0.11  2.07 0.20  2.53 0.27
1 mtt_ssl 4.26 0.34  26.06 1.58  1.20 0.14  1.49 0.28  0.87 0.26  1.24 0.07  1.41 0.27
5 mtt_ssl 9.66 0.24  38.16 0.57  2.11 0.19  2.83 0.41  1.06 0.04  1.74 0.15  2.38 0.19
5 dm 17.01 0.37  47.32 0.38  6.40 0.21  5.08 0.82  1.99 0.13  2.77 0.28  4.62 0.28
"""


@functools.lru_cache(maxsize=1)
def paper_values():
    """{(data set, distilled percent, teacher, encoder, protocol, labels percent, method, task): (mean, std)}."""
    values, block, tasks = {}, (), []
    for line in PAPER.strip().splitlines():
        if line.startswith("#"):
            block, tasks = (part.split() for part in line[1:].split(":"))
            continue
        percent, row, *numbers = line.split()
        pairs = zip(numbers[::2], numbers[1::2])
        values.update({(*block, percent, row, t): (float(mean), float(std)) for t, (mean, std) in zip(tasks, pairs)})
    return values


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------
def parse(argv):
    """The arguments of a command line."""
    sets = "\n".join(f"    {name:<16}{what}" for name, what in SETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=f"pre-training sets (SET):\n{sets}\n\nany at another rate: random@0.3, or the learned one: random@mkdt")
    parser.add_argument("--run-dir", help="folder of a distilled set, e.g. runs/cifar10/2pct_high_loss")
    parser.add_argument("--table", choices=TABLES,
                        help="the settings of that table of the paper, for its runs in runs/ or for --run-dir")
    parser.add_argument("--sets", nargs="+", metavar="SET",
                        help=f"what to pre-train on, see below (default: {' '.join(DEFAULT_SETS)})")
    parser.add_argument("--tasks", nargs="+", metavar="DATASET",
                        help="data sets to probe on; all: the seven of Table 1 (default: the run's own)")
    parser.add_argument("--labels", nargs="+", type=float, metavar="PERCENT",
                        help="shares of the task's training labels in percent (default: 1 5; 100 for finetune)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2],
                        help="a seed fixes initial weights, batches and labelled images (default: 0 1 2)")
    parser.add_argument("--encoders", nargs="+", metavar="NAME",
                        help="convnet, resnet10, resnet18, or with a width: resnet18:16 (default: convnet)")
    parser.add_argument("--protocol", choices=["linear", "finetune"],
                        help="linear probe, or fine-tuning of the whole encoder (appendix B) (default: linear)")
    parser.add_argument("--stratified", action="store_true", help="draw the labelled images class by class")
    parser.add_argument("--paired", nargs="?", const="random", metavar="SET",
                        help="add each set's paired difference to SET, with standard errors (if none is named: random)")
    parser.add_argument("--image-size", type=int, default=0, metavar="PIXELS",
                        help="squash every task to this side in pixels (default: 0, its own: 32, TinyImageNet 64)")
    parser.add_argument("--pixels", choices=["auto", "raw", "normalised"], default="auto",
                        help="what distilled:PATH holds, if its files do not say: raw pixels in [0, 1], to be "
                             "normalised, or normalised ones (default: auto, told by their deviation)")
    parser.add_argument("--ssl-epochs", type=int, default=1000, metavar="EPOCHS",
                        help="epochs of random:ssl (default: 1000)")
    parser.add_argument("--krr-iterations", type=int, default=160_000, metavar="STEPS",
                        help="iterations that krr_st is distilled for (default: 160000)")
    parser.add_argument("--dm-iterations", type=int, default=20_000, metavar="STEPS",
                        help="iterations that dm is distilled for (default: 20000)")
    parser.add_argument("--data-dir", default="data", help="where data sets are looked for and kept (default: data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                        help="torch.compile pre-training and encoding; auto: where it pays (default: auto)")
    parser.add_argument("--deterministic", action="store_true",
                        help="bit-identical results, slower: no timing decides what is compiled, and on a GPU sums are "
                             "taken in a fixed order")
    parser.add_argument("--save-encoder", metavar="FOLDER",
                        help="keep each pre-trained encoder there as SET_SEED_FINGERPRINT.pt")
    args = parser.parse_args(argv)
    table = TABLES.get(args.table, {})
    if not (args.run_dir or args.table):
        parser.error("give --run-dir, or --table for the runs in runs/")
    args.runs = [Path(args.run_dir)] if args.run_dir else [Path("runs") / run for run in table["runs"]]
    args.sets = args.sets or table.get("sets", DEFAULT_SETS)
    args.encoders = args.encoders or table.get("encoders", ["convnet"])
    args.protocol = args.protocol or table.get("protocol", "linear")
    args.labels = args.labels or table.get("labels") or ([1, 5] if args.protocol == "linear" else [100])
    args.tasks = args.tasks or table.get("tasks") or (["all"] if args.table else [])
    if args.deterministic and args.compile == "auto":                                    # which a timing would decide
        args.compile = "off"
    return args


def main(argv=None):
    """The command line; see the top of this file."""
    args = parse(argv)
    try:
        for flag, value, least in (("--ssl-epochs", args.ssl_epochs, 1), ("--krr-iterations", args.krr_iterations, 1),
                                   ("--dm-iterations", args.dm_iterations, 1),
                                   ("--image-size", args.image_size or 8, 8)):
            if value < least:
                raise InputError(f"{flag} {value} must be at least {least}")
        device = join_ranks(pick_device(args.device, args.deterministic))
        with contextlib.redirect_stdout(None if rank() else sys.stdout):                           # rank 0 alone speaks
            there = [run for run in args.runs if (run / "distilled.pt").exists()]
            for run in (run for run in args.runs if run not in there):
                print(f"eval: {run} is left out: it holds no distilled.pt", flush=True)
            for run in there or args.runs[:1]:
                sets = [name.replace("{run}", str(run)) for name in args.sets]
                if args.table:
                    for name in [n for n in sets if n.startswith("distilled:")]:
                        path = Path(name[10:]) if name.endswith(".pt") else Path(name[10:], "distilled.pt")
                        if not path.exists():
                            sets.remove(name)
                            print(f"eval: {name} is left out: there is no {path}", flush=True)
                run = run.resolve()
                # The run's own data set first, as in the paper's tables.
                seven = sorted(TASKS, key=lambda t: run.parent.name.split("_")[0] != t)
                tasks = [t for task in args.tasks for t in (seven if task == "all" else [task])]
                with hold(run.parent) if not rank() and (run / "distilled.pt").exists() else contextlib.nullcontext():
                    evaluate(run, sets, tasks, args.labels, args.seeds, args.encoders, args.protocol, args.stratified,
                             args.image_size, args.data_dir, device, args.save_encoder, args.compile, args.paired,
                             args.pixels, args.ssl_epochs, args.krr_iterations, args.dm_iterations)
                print((run / "results.md").read_text())
            leave_ranks()
    except InputError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        print(f"eval.py: out of memory ({first_line(error)}): use a smaller encoder, or --tasks one by one",
              file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: stopped; the same command goes on with the cells that are missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
