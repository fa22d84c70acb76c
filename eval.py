"""Evaluation of MKDT (section 5): pre-train a fresh encoder on a small set, then probe it.

    python eval.py runs/cifar10/2pct_high_loss                       its set and baselines
    python eval.py runs/cifar10/2pct_high_loss --sets random sas=subset:sas.pkl mkdt --tasks all

A set may be given a name, sas=subset:sas.pkl, by which the paper's means are found, and a learning
rate for pre-training: random@0.3, or random@mkdt for the learned one.
A seed fixes the encoder's initial weights, the batches and the labels, the same for every set."""
import argparse
import copy
import csv
import io
import itertools
import math
import pickle
import re
import sys
import textwrap
import time
from collections import defaultdict
from functools import cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import SGD, Adam

from data import (RANK, RANKS, Diverged, InputError, Log, Progress, add_common_flags, barrier,
                  checksum, command_line, first_line, load, load_dataset, rank_0_first, save,
                  save_text, share, shift_and_flip, start)
from models import (OBJECTIVES, SSL, Compiled, Examples, Run, augmentations_of_normalized, batches,
                    build, encode, encoder, flat_parameters, mean_loss, read_config,
                    set_learning_rate, stream, student_name, teacher_network, two_projections)

# ---- Pre-training (Eq. 9) ---------------------------------------------------------------------
def pretrain(net, loss, order, examples, lr, decay, seed, progress):
    """Trains `net` by loss(x, y) on examples(batch, draw) for the (step, batch) of `order`
    (Eq. 9): SGD with momentum 0.9 at a constant learning rate."""
    optimizer = SGD(net.parameters(), lr, 0.9, weight_decay=decay)
    for step, batch in order:
        x, y = examples(batch, (seed, "pretrain views", step))
        value = loss(x, y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        progress(step + 1, loss=value.detach())

def pretrain_ssl(net, order, images, data, s, lr, seed, progress):
    """Trains `net` by the teacher's loss on uint8 `images`: "Random (SSL Pre-training)", app. B."""
    head = build(partial(SSL[s.ssl].projector, net.head.out_features), seed, "evaluation projector")
    network = torch.nn.Sequential(net, head).to(images.device)
    optimizer = Adam(network.parameters(), lr, weight_decay=1e-6)
    for step, batch in order:
        if len(batch) == 1:                # batch norm needs two
            continue
        z1, z2 = two_projections(network, images[batch], data, s, (seed, "pretrain views", step))
        loss = SSL[s.ssl].loss(z1, z2, s)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, loss=loss.detach())

# ---- Linear probe (Eq. 3) and fine-tuning (Table 10) ------------------------------------------
def linear_probe(features, labels, classes, weight=1e-3):
    """A linear classifier by full-batch LBFGS on cross-entropy + weight * sum(W^2); the bias is not
    penalised. features [n, d], labels int64 [n]. It starts from zero, and a line search keeps it
    from diverging. Returns W [classes, d], b [classes]. ValueError if features are not finite."""
    if not features.isfinite().all():
        raise ValueError("the features are not finite")
    W = features.new_zeros(classes, features.shape[1], requires_grad=True)
    b = features.new_zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=100, max_eval=2500, history_size=20,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ W.T + b, labels) + weight * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return W.detach(), b.detach()

def linear_scores(net, task, percents, seed, log=None):
    """Yields a linear probe's accuracy with each share of the labels; encodes each image once."""
    drawn = [labelled_subset(task, percent, seed) for percent in percents]
    needed = torch.cat(drawn).unique()                                     # sorted
    features = encode(net.features, task.train_images[needed], task.normalize)
    known = task.test_labels >= 0
    test_features = encode(net.features, task.test_images[known], task.normalize)
    for chosen in drawn:
        rows = features[torch.searchsorted(needed, chosen)]
        W, b = linear_probe(rows, task.train_labels[chosen], task.classes)
        yield accuracy(test_features @ W.T + b, task.test_labels[known])

FINETUNE_STEPS = dict.fromkeys(["cifar10", "cifar100", "tinyimagenet"], 10_000)        # else 5,000

def finetune(net, task, chosen, seed, progress):
    """A copy of `net` with a linear layer, trained as a whole on the labelled images `chosen` for
    progress.total steps, as Lee et al. (2023) do: SGD at 0.01 with a cosine to zero, momentum 0.9,
    weight decay 5e-4, batches of 256; images are shifted by up to four pixels and mirrored."""
    images, labels, steps = task.train_images[chosen], task.train_labels[chosen], progress.total
    net = copy.deepcopy(net).eval()
    d = encode(net.features, images[:1], task.normalize).shape[1]
    net.head = build(partial(torch.nn.Linear, d, task.classes), seed, "fine-tuning head")
    net.to(images.device).train()
    optimizer = SGD(net.parameters(), 0.01, 0.9, weight_decay=5e-4)
    order = batches(len(images), 256, steps, seed, "fine-tuning order", images.device)
    for step, batch in itertools.islice(order, steps):
        draw = stream(seed, "fine-tuning views", step).initial_seed()
        x = task.normalize(shift_and_flip(images[batch].float() / 255, draw))
        loss = F.cross_entropy(net(x), labels[batch])
        set_learning_rate(optimizer, 0.01 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step + 1, loss=loss.detach())
    return net.eval()

def finetuned_scores(net, task, percents, seed, log):
    """Yields the accuracy after fine-tuning with each share of the labels."""
    known = task.test_labels >= 0
    for percent in percents:
        progress = Progress("finetune", FINETUNE_STEPS.get(task.name, 5_000), log)
        network = finetune(net, task, labelled_subset(task, percent, seed), seed, progress)
        logits = encode(network, task.test_images[known], task.normalize)
        yield accuracy(logits, task.test_labels[known])

class Protocol(NamedTuple):
    """How an encoder is judged, and its defaults; "" or 0: those of the run."""
    name: str
    scores: Callable                       # (encoder, task, shares, seed, log) -> accuracies
    labels: list                           # percentages of them
    encoder: str
    epochs: int                            # of pre-training
    decay: float                           # weight decay of pre-training

PROTOCOLS = {
    "linear": Protocol("linear", linear_scores, [1, 5], "", 0, 1e-4),
    "finetune": Protocol("finetune", finetuned_scores, [100], "convnet_bn", 1000, 1e-3),  # Table 10
}

def accuracy(logits, labels):
    """Percent of `labels` that the largest of `logits` [n, classes] predicts: 100 - Err, Eq. 3."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()

def labelled_subset(task, percent, seed):
    """Sorted indices of the labels that are used: a share, drawn uniformly, of those known."""
    known = (task.train_labels >= 0).nonzero()[:, 0].cpu()
    order = torch.randperm(len(known), generator=stream(seed, "labels", float(percent)))
    return known[order[:share(len(known), percent, "--labels")].sort().values]

# ---- Baselines that are distilled here: KRR-ST, and DM without labels (appendix F) ------------
def krr_loss(f_syn, y_syn, f_real, y_real, ridge=1e-6):
    """MSE of kernel ridge regression from the synthetic set to real images (Lee et al. 2023).
    Features f_syn [n, p], f_real [B, p], targets y_syn [n, d], y_real [B, d]. The kernel is linear
    in the features and a constant; the ridge is relative to the kernel's trace."""
    f_syn = F.pad(f_syn, [0, 1], value=1)
    f_real = F.pad(f_real, [0, 1], value=1)
    kernel = f_syn @ f_syn.T                                               # [n, n]
    penalty = ridge * kernel.trace().detach() * torch.eye(len(kernel), device=kernel.device)
    return F.mse_loss(f_real @ f_syn.T @ torch.linalg.solve(kernel + penalty, y_syn), y_real)

def krr_st(make, images, targets, real, lr, lifetime, progress_of):
    """KRR-ST (Lee et al. 2023): moves images [n, 3, H, W], network input as they are, and targets
    [n, d] to lower `krr_loss` of real images under an encoder out of a pool of ten by make(). That
    one then takes a step on the set itself by MSE, or begins anew after `lifetime` steps; ages are
    random at first. Adam's rate falls linearly from `lr` to lr / 1000. real(step) -> real images,
    augmented and normalised, and the teacher's outputs. progress_of(**state) makes the Progress."""
    images = images.clone().requires_grad_()
    targets = targets.clone().requires_grad_()
    pool = torch.nn.ModuleList(build(make, 0, "krr_st", k, 0) for k in range(10)).to(images.device)
    age = torch.randint(1, lifetime, (len(pool),), generator=stream(0, "krr_st", "ages"))
    outer = Adam([images, targets])
    inner = SGD(pool.parameters(), 0.1, 0.9, weight_decay=1e-3)

    def learn(k):
        loss = F.mse_loss(pool[k].train()(images.detach()), targets.detach())
        inner.zero_grad()
        loss.backward()
        inner.step()

    progress = progress_of(images=images, targets=targets, pool=pool, age=age, outer=outer,
                           inner=inner)
    if progress.first_step == 0:
        for k in torch.arange(len(pool)).repeat_interleave(age):
            learn(k)
    for step in range(progress.first_step, progress.total):
        k = int(torch.randint(len(pool), (), generator=stream(0, "krr_st", "encoder", step)))
        x, y = real(step)
        f_real = encode(pool[k].eval().features, x, chunk=len(x))
        loss = krr_loss(pool[k].features(images), targets, f_real, y)
        images.grad, targets.grad = torch.autograd.grad(loss, (images, targets))
        set_learning_rate(outer, lr * (1 - 0.999 * step / progress.total))
        outer.step()
        age[k] += 1
        if age[k] <= lifetime:
            learn(k)
        else:
            pool[k].load_state_dict(build(make, 0, "krr_st", k, step + 1).state_dict())
            for p in pool[k].parameters():
                inner.state.pop(p, None)
            age[k] = 0
        progress(step + 1, loss=loss.detach())
    return images.detach(), targets.detach()

def dm(make, images, data, s, groups, progress_of):
    """DM (Zhao & Bilen 2023) without labels (appendix F): moves images [n, 3, H, W] by SGD at 1. In
    each iteration, under a fresh encoder of make(), it brings the mean feature of each of `groups`
    groups of them closer to that of 256 real images, equally augmented. progress_of: as above."""
    images = images.clone().requires_grad_()
    optimizer = SGD([images], 1.0, momentum=0.5)
    progress = progress_of(images=images, optimizer=optimizer)
    for step in range(progress.first_step, progress.total):
        rng = stream(0, "dm", "step", step)
        net = build(make, 0, "dm", step).to(images.device).requires_grad_(False)
        optimizer.zero_grad()
        total = 0.0
        for g, part in enumerate(torch.arange(len(images)).chunk(max(1, groups))):
            batch = torch.randint(len(data.train_images), (256,), generator=rng)
            augment, _ = augmentations_of_normalized(data, s, 1, (0, "dm", "views", step, g))
            real = net.features(augment(data.normalize(data.train_images[batch])))
            ours = net.features(augment(images[part]))
            loss = (ours.mean(0) - real.mean(0)).square().sum()
            loss.backward()
            total += loss.detach()
        optimizer.step()
        progress(step + 1, loss=total)
    return images.detach()

def baseline_file(run, set_name, n):
    """The file of n images that KRR-ST or DM distils, as a SetName says; made if need be."""
    s, data, method = run.s, run.data, set_name.kind
    count, _, architecture = set_name.argument.partition(":")
    iterations = int(count or ITERATIONS[method])
    architecture = architecture or {"krr_st": "convnet_bn", "dm": student_name(s)}[method]
    path = run.set_dir / f"{method}_{iterations}_{architecture.replace(':', '_')}.pt"
    if path.exists():
        return path
    if not (run.run_dir / "teacher.pt").exists():
        raise InputError(f"{method} needs a teacher trained here, {run.run_dir}/teacher.pt")
    f_T = teacher_network(s, data.image_size)
    f_T.load_state_dict(load(run.run_dir / "teacher.pt"))
    f_T.to(s.device).eval()
    make = partial(encoder, architecture, run.out_dim, data.image_size)
    chosen = torch.randperm(len(data.train_images), generator=stream(0, method, "images"))[:n]
    images = data.train_images[chosen].float() / 255
    checkpoint = path.with_suffix(".checkpoint")
    progress_of = partial(Progress, method, iterations, run.log, checkpoint)

    def real(step):
        rng = stream(0, method, "real images", step)
        batch = torch.randint(len(data.train_images), (1024,), generator=rng)
        x = data.train_images[batch].float() / 255
        x = data.normalize(shift_and_flip(x, rng.initial_seed()))
        return x, encode(f_T, x)

    if method == "krr_st":
        lr = 1e-5 if s.dataset == "tinyimagenet" else 1e-4
        lifetime = min(1000, iterations + 1)
        images, targets = krr_st(make, images, run.targets[chosen], real, lr, lifetime, progress_of)
    else:
        images = dm(make, data.normalize(images), data, s, data.classes, progress_of)
        targets = encode(f_T, images)
    save(path, {"images": images.cpu(), "targets": targets.cpu()})
    checkpoint.unlink(missing_ok=True)
    return path

# ---- The sets to pre-train on -----------------------------------------------------------------
# {kind of set: (a regular expression of what may follow the kind and a colon, help)}
SETS = {
    "none": ("", "no pre-training"),
    "random": (r"|ssl|ssl:[1-9]\d*", "as many real images as the distilled set has, redrawn for "
               "each seed; random:ssl by the teacher's loss for 1000 epochs; random:ssl:80 for 80"),
    "subset": (".+", "subset:FILE, the first of a list of training images: .pkl, .npy or .txt"),
    "high_loss": ("", "as many real images, those of the highest loss (section 4.2)"),
    "initial": ("", "the images that distillation began with"),
    "krr_st": (r"|[1-9]\d*(:.+)?", "KRR-ST's, distilled here in 160000 steps; krr_st:1000 in 1000; "
               "krr_st:1000:convnet with a pool of another encoder than convnet_bn"),
    "dm": (r"|[1-9]\d*", "DM's without labels, distilled here in 20000 steps; dm:500 in 500"),
    "distilled": (".+", "distilled:PATH, a set of this code or MKDT's, KRR-ST's, MTT's or DATM's"),
    "mkdt": (r"|[1-9]\d*", "the run's distilled set; mkdt:1000 after 1000 iterations"),
    "full": ("", "all training images"),
}
ITERATIONS = {"krr_st": 160_000, "dm": 20_000}
DEFAULT_SETS = "none random random@mkdt high_loss high_loss@mkdt initial initial@mkdt mkdt".split()

class SetName(NamedTuple):
    """A set as it is typed: [ROW=]KIND[:ARGUMENT][@RATE]."""
    row: str                               # printed, saved, and looked up in the paper's tables
    kind: str
    argument: str
    rate: str                              # "", a number, or "mkdt"

    @property
    def ssl_epochs(self):
        """The epochs of random:ssl:80, 1000 for random:ssl, and 0 for other sets."""
        if self.kind == "random" and self.argument:
            return int(self.argument[4:] or 1000)
        return 0

def parse_set(text):
    """The SetName of `text`. Raises InputError if there is no such set."""
    rate = r"mkdt|\d*\.?\d+(?:e-?\d+)?"
    parts = re.fullmatch(rf"(?:([\w.-]+)=)?(\w+)(?::(.+?))?(?:@({rate}))?", text)
    row, kind, argument, rate = parts.groups("") if parts else [""] * 4
    possible = kind in SETS and re.fullmatch(SETS[kind][0], argument)
    if not possible or rate not in ("", "mkdt") and float(rate) == 0:
        raise InputError(f"unknown set {text!r}: choose from {', '.join(SETS)}; see eval.py --help")
    return SetName(row or text, kind, argument, rate)

class PretrainingSet(NamedTuple):
    """What an encoder is pre-trained on. images: [n, 3, H, W], normalised or uint8, or None for no
    pre-training. targets: those of `Examples`. lr: the rate; None: not known. id: a checksum."""
    images: torch.Tensor
    targets: torch.Tensor
    lr: float
    id: str

class Sets:
    """The sets of a run, each read from its files once."""

    def __init__(self, run):
        self.run = run
        self.mkdt = read_distilled(run.set_dir / "distilled.pt", run.s.device)
        self.by_loss = load(run.set_dir / "init.pt")["order"]
        self.real_id = checksum(run.data.id, run.targets, len(self.mkdt.images))
        self.load_set = cache(self.load_set)

    def get(self, set_name, seed):
        """The PretrainingSet of a SetName for `seed`."""
        if set_name.kind == "none":
            return PretrainingSet(None, None, 0.0, self.real_id)
        if set_name.kind == "random":
            order = torch.randperm(len(self.run.targets), generator=stream(seed, "random subset"))
            found = self.real_subset(order)._replace(id=self.real_id)      # the seed says which
        else:
            found = self.load_set(set_name)
        lr = found.lr or (1e-3 if set_name.ssl_epochs else self.run.s.pretrain_lr)
        if set_name.rate:
            lr = self.mkdt.lr if set_name.rate == "mkdt" else float(set_name.rate)
        return found._replace(lr=lr)

    def real_subset(self, order):
        """The first of the training images in that order, as many as the distilled set has."""
        chosen = order[:len(self.mkdt.images)]
        return PretrainingSet(self.run.data.train_images[chosen], self.run.targets[chosen], None,
                              checksum(self.real_id, chosen))

    def load_set(self, set_name):
        """A set that is the same for every seed; KRR-ST's and DM's are distilled if need be."""
        run, kind, n = self.run, set_name.kind, len(self.mkdt.images)
        if kind == "full":
            return PretrainingSet(run.data.train_images, run.targets, None, self.real_id)
        if kind == "high_loss":
            if self.by_loss is None:
                raise InputError(f"high_loss needs a teacher, which {run.s.objective} lacks")
            return self.real_subset(self.by_loss)
        if kind == "subset":
            total = len(run.data.train_images)
            order = read_indices(set_name.argument, total)
            print(f"{set_name.row}: the first {min(n, len(order)):,} of {len(order):,} indices of "
                  f"{total:,} training images; the distilled set has {n:,}", flush=True)
            return self.real_subset(order)
        if kind == "mkdt" and not set_name.argument:
            return self.mkdt
        path = Path(set_name.argument)                         # distilled:PATH
        if kind == "initial":
            path = run.set_dir / "init.pt"
        elif kind == "mkdt":
            path = run.set_dir / f"distilled_{set_name.argument:0>5}.pt"
        elif kind in ITERATIONS:
            path = baseline_file(run, set_name, n)
        found = read_distilled(path, run.s.device)
        if kind == "distilled" and found.lr is None and not set_name.rate:
            print(f"{set_name.row}: no learned rate, so at {run.s.pretrain_lr:g}; or add @RATE")
        return found

class IndexUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, numbers and numpy arrays, and refuses everything else."""

    def find_class(self, module, name):
        allowed = "ndarray dtype scalar _reconstruct _frombuffer encode".split()
        if module.split(".")[0] not in ("numpy", "_codecs") or name not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)

def read_indices(path, n):
    """Distinct indices of 0..n-1 in a .pkl, .npy or .txt: a list, array, or dict of "indices"."""
    try:
        with open(path, "rb") as file:
            if path.endswith(".npy"):
                found = np.load(file)
            elif path.endswith(".pkl"):
                found = IndexUnpickler(file).load()
            else:
                found = file.read().replace(b",", b" ").split()
        if isinstance(found, dict):
            found = found["indices"]
        indices = np.array(found, float).ravel()
        if not 0 < len(indices) == len(np.intersect1d(indices, np.arange(n))):
            raise ValueError(f"expected distinct whole numbers from 0 to {n - 1}")
    except Exception as error:             # no file, a damaged pickle, a hostile one
        raise InputError(f"subset:{path} is not a list of indices ({first_line(error)})") from error
    return torch.from_numpy(indices).long()

def read_distilled(path, device):
    """The PretrainingSet in files; its lr is None if they have none. path: a distilled.pt, snapshot
    or init.pt of this project; images_S.pt, beside it labels_S.pt and maybe synlr_S.pt or lr_S.pt,
    as the code of MKDT, MTT and DATM leaves them; x_syn.pt and y_syn.pt beside it, as KRR-ST's."""
    images, targets, lr = load(path), None, None
    if isinstance(images, dict):
        images, targets, lr = (images.get(key) for key in ("images", "targets", "lr"))
    elif path.name.startswith("x_syn"):
        targets = load(path.with_name("y_syn.pt"))
    elif path.name.startswith("images_"):
        targets = load(path.with_name(path.name.replace("images_", "labels_")))
        for prefix in ("synlr_", "lr_"):
            rate = path.with_name(path.name.replace("images_", prefix))
            if rate.exists():
                lr = float(torch.as_tensor(load(rate)).float().mean())
    good = torch.is_tensor(images) and torch.is_tensor(targets) and images.dim() == 4 and \
        targets.dim() in (1, 2) and images.shape[:3] == (len(targets), 3, images.shape[3]) and \
        len(images) > 0 and images.isfinite().all() and targets.isfinite().all()
    if not good:
        raise InputError(f"{path}: expected finite images [n, 3, H, H], with targets [n, d] or [n]")
    if lr is not None and not 0 < lr < math.inf:
        raise InputError(f"{path}: its learned rate is {lr}")
    images = images.detach().to(device, torch.float)
    targets = targets.detach().to(device, torch.long if targets.dim() == 1 else torch.float)
    return PretrainingSet(images, targets, lr and float(lr), checksum(images, targets))

# ---- Results: what is asked for, and the lines of results.csv ---------------------------------
TASKS = "cifar10 tinyimagenet cifar100 aircraft cub2011 dogs flowers".split()          # of Table 1

class Line(NamedTuple):
    """A line of results.csv: one accuracy. The first five fields tell lines apart."""
    set: str
    how: str                               # the encoder, the protocol, the epochs
    task: str
    labels: str                            # in percent
    seed: str
    rate: str
    accuracy: str
    mse: str                               # the `distance`
    made_of: str                           # a checksum of the set, of its use and of the task

class Table:
    """What can be computed of the table that the flags of eval.py ask for; the rest is left out,
    and reported. Raises InputError if nothing is left, or a set or an encoder cannot be made.
    tasks: {name: (Dataset, its shares of labels)}. jobs: {(encoder, seed, SetName): its lines}."""

    def __init__(self, run, flags):
        self.run, self.protocol, self.paired = run, PROTOCOLS[flags.protocol], flags.paired
        encoders = flags.encoders or [self.protocol.encoder or student_name(run.s)]
        for architecture in encoders:
            encoder(architecture, run.out_dim, run.data.image_size)
        self.sets = Sets(run)
        texts = flags.sets or [text for text in DEFAULT_SETS
                               if self.sets.by_loss is not None or "high_loss" not in text]
        set_names = [parse_set(text) for text in texts]
        self.rows = [set_name.row for set_name in set_names]
        if len(set(self.rows)) < len(self.rows):
            raise InputError(f"two of the sets have one name: {' '.join(self.rows)}")
        if self.paired and self.paired not in self.rows:
            raise InputError(f"--paired {self.paired} is not one of the sets {' '.join(self.rows)}")
        with rank_0_first():               # it distils the baselines
            for set_name in set_names:
                self.sets.get(set_name, flags.seeds[0])
        self.tasks, self.left_out = {}, set()
        for task in flags.tasks or [run.s.dataset]:
            for name in TASKS if task == "all" else [task]:
                try:
                    self.open_task(name, flags.labels or self.protocol.labels)
                except InputError as error:
                    self.leave_out(name, error)
        if not self.tasks:
            raise InputError("nothing can be evaluated: there is no task with enough labels")
        jobs = itertools.product(encoders, flags.seeds, set_names)
        self.jobs = {job: list(self.lines_of(*job)) for job in jobs}
        self.lines = list(itertools.chain(*self.jobs.values()))

    def open_task(self, name, labels):
        """Adds a task, with those shares of its labels that leave an image."""
        s, task = self.run.s, self.run.data
        if name != s.dataset:
            task = load_dataset(name, s.data_dir, device=s.device)
        elif s.train_images:               # a task has all of its labels
            task = load_dataset(task.source, s.data_dir, s.image_size, s.device)
        if not task.labelled:
            raise InputError("a probe needs test labels, and two classes or more")
        if task.name in self.tasks:
            raise InputError(f"there is another task called {task.name}")
        count = int((task.train_labels >= 0).sum())
        shares = [percent for percent in labels if percent * count >= 100]
        for percent in set(labels).difference(shares):
            self.leave_out(f"{name} at {percent:g}% of the labels", f"it has {count} in all")
        if shares:
            self.tasks[task.name] = task, shares

    def leave_out(self, what, reason):
        """Reports, once, that something is left out of the table."""
        if what not in self.left_out:
            self.left_out.add(what)
            print(f"left out: {what} ({first_line(reason)})", flush=True,
                  file=sys.stdout if RANK == 0 else sys.stderr)

    def lines_of(self, architecture, seed, set_name):
        """Yields the lines of one pre-training, as they are before it is done."""
        chosen, s = self.sets.get(set_name, seed), self.run.s
        how = f"{architecture}, {self.protocol.name}, {s.pretrain_epochs} epochs"
        rate = str(chosen.lr or "")
        for task, shares in self.tasks.values():
            made_of = checksum(chosen.id, chosen.lr, set_name.ssl_epochs, s.pretrain_batch, s.ssl,
                               s.objective, task.id)
            for percent in shares:
                yield Line(set_name.row, how, task.name, f"{percent:g}", str(seed), rate, "", "",
                           made_of)

def evaluate(run, flags=None):
    """Computes what results.csv lacks of the table that `flags` ask for; returns it as Markdown."""
    table = Table(run, flags or parse([str(run.set_dir), "--paired"]))
    path = run.set_dir / "results.csv"
    with rank_0_first():
        results = valid_results(table, path)
    missing = [job for job, lines in table.jobs.items()
               if any(line[:5] not in results for line in lines)][RANK::RANKS]
    for done, (architecture, seed, set_name) in enumerate(missing, 1):
        began = time.monotonic()
        lines = list(compute(table, architecture, seed, set_name))
        with open(path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)
        scores = {f"{line.task} {line.labels}%": float(line.accuracy) for line in lines}
        run.log("eval", done, len(missing), 1 / (time.monotonic() - began),
                f"{set_name.row}, seed {seed}, {architecture}", **scores)
    barrier()                              # until every rank has written
    text = table_text(table, valid_results(table, path))
    save_text(run.set_dir / "results.md", text)
    return text

def valid_results(table, path):
    """{the first five fields: Line} of results.csv, to which several processes may append lines.
    Lines whose files or settings have changed since are dropped, and reported."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    header, *rows = csv.reader(before.splitlines() or [",".join(Line._fields)])
    if tuple(header) != Line._fields:
        raise InputError(f"{path} is not as this program writes it: move it away to get a new one")
    whole = [Line(*row) for row in rows if len(row) == len(header)]        # a kill can cut one off
    planned = {(line.set, line.task): line.made_of for line in table.lines}
    results, dropped = {}, set()
    for line in whole:
        if planned.get((line.set, line.task), line.made_of) == line.made_of:
            results[line[:5]] = line
        else:
            dropped.add(line.set)
    if dropped:
        print(f"dropped from results.csv, as files or settings differ: {' '.join(sorted(dropped))}")
    after = io.StringIO()
    csv.writer(after, lineterminator="\n").writerows([Line._fields, *results.values()])
    if after.getvalue() != before:
        save_text(path, after.getvalue())
    return results

def compute(table, architecture, seed, set_name):
    """Yields the lines of one pre-training on each task; what fails is left out, and reported."""
    try:
        net, mse = pretrained(table, architecture, seed, set_name)
    except Exception as error:             # each network has its own
        table.leave_out(set_name.row, error)
        return
    planned = table.jobs[architecture, seed, set_name]
    for task, shares in table.tasks.values():
        lines = [line for line in planned if line.task == task.name]
        try:
            scores = table.protocol.scores(net, task, shares, seed, table.run.log)
            for line, score in zip(lines, scores):
                yield line._replace(accuracy=str(score), mse=str(mse))
        except Exception as error:
            table.leave_out(f"{set_name.row} on {task.name}", error)

def pretrained(table, architecture, seed, set_name):
    """(an encoder that is pre-trained on a set, its `distance`). Raises Diverged if it diverges."""
    run, s = table.run, table.run.s
    chosen = table.sets.get(set_name, seed)
    usual = run.objective, run.out_dim, run.data.image_size
    objective, d, size = usual
    if chosen.images is not None:                              # it may have been made elsewhere
        size, targets = chosen.images.shape[-1], chosen.targets
        d, other = targets.shape[-1] or 128, OBJECTIVES["mse" if targets.numel() else "ssl"]
        if targets.dim() == 1:
            d, other = int(targets.max()) + 1, OBJECTIVES["ce"]
        if objective.target != other.target:
            objective = other
    net, loss = encoder_and_loss(architecture, d, size, objective, s.device, run.can_compile)
    fresh = build(partial(encoder, architecture, d, size), seed, "evaluation encoder")
    net.train().load_state_dict(fresh.state_dict())
    torch.manual_seed(stream(seed, "dropout").initial_seed())  # some of torchvision's have it
    if chosen.images is not None:
        epochs = set_name.ssl_epochs or s.pretrain_epochs
        order = list(batches(len(chosen.images), s.pretrain_batch, epochs, seed, "pretrain order",
                             s.device))
        advice = f"Give a lower rate than {chosen.lr:.3g} after the set's name, as in random@0.01."
        progress = Progress(set_name.row, len(order), run.log, advice=advice)
        if set_name.ssl_epochs:
            pretrain_ssl(net, order, chosen.images, run.data, s, chosen.lr, seed, progress)
        else:
            examples = Examples(chosen.images, chosen.targets, run.data, s)
            pretrain(net, loss, order, examples, chosen.lr, table.protocol.decay, seed, progress)
        if not flat_parameters(net).isfinite().all():
            raise Diverged(f"pre-training diverged. {advice}")
    net.eval()
    comparable = (objective, d, size) == usual and not set_name.ssl_epochs
    return net, distance(run, net) if comparable else ""

def distance(run, net):
    """Eq. 2's distance of `net` to the teacher on the test images; "" if that never saw these."""
    path = run.run_dir / "representations_test.pt"
    teacher = load(path) if path.exists() else {}
    seen = teacher.get("images") == checksum(run.data.test_images)
    if run.objective.target != "representations" or not seen:
        return ""
    z = encode(net, run.data.test_images, run.data.normalize)
    return run.objective.loss(z, teacher["representations"].to(z.device)).mean().item()

@cache                           # compiling takes longer than training
def encoder_and_loss(architecture, d, size, objective, device, compiled):
    """(an encoder on the device, its loss(x, y)): made once, and trained again and again."""
    net = encoder(architecture, d, size).to(device, memory_format=torch.channels_last)
    loss = partial(mean_loss, objective, net)
    if compiled and objective.target != "views":
        loss = Compiled(loss)
    return net, loss

# ---- Printing the table -----------------------------------------------------------------------
def table_text(table, results):
    """results.md: a table for each encoder. A row for each share of labels and set, a column for
    each task: percent correct, mean ± standard deviation over seeds, the best in bold. Beside it
    the paper's mean, if the paper has such a table, and the difference of the set `paired`."""
    lines = [results[line[:5]] for line in table.lines if line[:5] in results]
    if not lines:
        raise InputError("no cell of the table could be computed: see the lines above")
    text = ""
    for how in dict.fromkeys(line.how for line in lines):
        own = [line for line in lines if line.how == how]
        paper = paper_means(table.run, how.partition(",")[0], table.protocol)
        head = ["labels", "set", "learning rate", "seeds"]
        for task in table.tasks:
            head += [task] + ["paper"] * bool(paper)
            head += [f"{table.paired} - row"] * bool(table.paired)
        head.append("MSE")
        rows = [head, ["---"] * len(head)]
        for percent in sorted({line.labels for line in own}, key=float):
            rows += table_rows(table, [line for line in own if line.labels == percent], paper)
        text += f"## {table.run.data.name}, {table.run.s.percent:g}% distilled: {how}\n\n"
        for cells in rows:
            text += f"| {' | '.join(cells)} |\n"
        text += "\n"
    text += "Percent correct: mean ± standard deviation over seeds; best except full in bold.\n"
    if table.paired:
        text += (f"{table.paired} - row: mean difference, paired by seed, ± its standard error "
                 "where there are three seeds or more (with three it is rough).\n")
    return text

def table_rows(table, lines, paper):
    """Yields the rows, lists of cells, of one encoder and one share of labels: of these lines."""
    scores = defaultdict(dict)                                 # {(set, task): {seed: accuracy}}
    for line in lines:
        scores[line.set, line.task][line.seed] = float(line.accuracy)
    best = defaultdict(float)
    for (row, task), by_seed in scores.items():
        if row != "full":
            best[task] = max(best[task], np.mean(list(by_seed.values())))
    for row in table.rows:
        own = [line for line in lines if line.set == row]
        if not own:
            continue
        percent = own[0].labels
        rate = own[0].rate and f"{float(own[0].rate):.3g}"
        cells = [f"{percent}%", row, rate, str(len({line.seed for line in own}))]
        for task in table.tasks:
            cells.append(mean_and_deviation(scores[row, task], best.get(task)))
            if paper:
                cells.append(paper.get((percent, row, task), ""))
            if table.paired:
                cells.append(paired_difference(scores[table.paired, task], scores[row, task]))
        distances = [float(line.mse) for line in own if line.mse]
        cells.append(f"{np.mean(distances):.4f}" if distances else "")
        yield cells

def mean_and_deviation(scores, best):
    """A cell of {seed: accuracy}: the mean, bold if it is `best`, ± standard deviation (n - 1)."""
    if not scores:
        return ""
    values = list(scores.values())
    text = f"{np.mean(values):.2f}"
    if np.mean(values) == best:
        text = f"**{text}**"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2f}"
    return text

def paired_difference(ours, theirs):
    """Mean of ours - theirs over common seeds, ± its standard error from three on; "" if none."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if ours is theirs or not differences:
        return ""
    text = f"{round(np.mean(differences), 2) + 0.0:+.2f}"      # never -0.00
    if len(differences) >= 3:
        text += f" ± {np.std(differences, ddof=1) / len(differences) ** 0.5:.2f}"
    return text

def paper_means(run, architecture, protocol):
    """The paper's means for this run's data set, percentage and teacher and for such an encoder,
    whatever our settings: {(share of labels, set, task): mean}; {} without such a table or file."""
    s = run.s
    teacher = s.representations or (s.ssl if s.objective == "mse" else s.objective)
    width = ":128" if architecture.startswith("convnet") else ":64"        # the usual one
    wanted = [s.dataset, f"{s.percent:g}", teacher, architecture.removesuffix(width), protocol.name]
    path = Path(__file__).with_name(".assets") / "paper_tables.txt"
    means = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        *made, percent, row, task, mean = line.split()
        if made == wanted:
            means[percent, row, task] = mean
    return means

# ---- Command line -----------------------------------------------------------------------------
def parse(argv=None):
    sets = [textwrap.fill(what, 96, initial_indent=f"  {name:<11}", subsequent_indent=" " * 13)
            for name, (_, what) in SETS.items()]
    parser = argparse.ArgumentParser(
        usage="python eval.py SET_DIR [--sets SET ...] [--tasks DATASET ...] [...]",
        description=__doc__, epilog="sets:\n" + "\n".join(sets), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("set_dir", help="the folder of a distilled set, e.g. runs/cifar10/2pct_high_loss")
    add("--sets", nargs="+", metavar="SET",
        help=f"what to pre-train on, see below (default: {' '.join(DEFAULT_SETS)})")
    add("--tasks", nargs="+", metavar="DATASET",
        help="what to probe on; all: the seven of Table 1 (default: the run's own data set)")
    add("--labels", nargs="+", type=float, metavar="PERCENT", help="(default: 1 5; finetune: 100)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--encoders", nargs="+", metavar="NAME",
        help="resnet18:16, torchvision:vgg11_bn, ... (default: the student; finetune: convnet_bn)")
    add("--protocol", choices=PROTOCOLS, default="linear",
        help="linear probe, or fine-tuning as Lee et al. (Table 10) (default: linear)")
    add("--paired", nargs="?", const="mkdt", metavar="SET",
        help="add the paired differences of SET and each row (if none is named: mkdt)")
    add("--epochs", type=int, help="of pre-training (default: the run's own; finetune: 1000)")
    add("--dataset", help="where the run's images are now (default: where they were)")
    add_common_flags(parser)
    return parser.parse_args(argv)

def open_set(flags):
    """The Run whose distilled set lies in flags.set_dir, as its config.json describes it."""
    set_dir = Path(flags.set_dir).resolve()
    entry = read_config(set_dir / "config.json").get("set")
    if entry is None:
        raise InputError(f"{set_dir}/config.json describes no distilled set: give a set's folder")
    if flags.epochs is not None and flags.epochs < 1:
        raise InputError(f"--epochs {flags.epochs} must be at least 1")
    for percent in flags.labels or []:
        if not 0 < percent <= 100:
            raise InputError(f"--labels {percent:g} must be above 0 and at most 100")
    s = argparse.Namespace(**entry["settings"], dataset=entry["dataset"], data_dir=flags.data_dir,
                           device=flags.device, compile=flags.compile)
    s.pretrain_epochs = flags.epochs or PROTOCOLS[flags.protocol].epochs or s.pretrain_epochs
    where = flags.dataset or s.dataset
    data = load_dataset(where, s.data_dir, s.image_size, s.device, s.train_images)
    run = Run(s, data, set_dir.parent, set_dir, Log(set_dir / "log.jsonl"))
    if data.images_id != entry["made"]["images"]:
        raise InputError(f"the images of {where} are not those that {set_dir} was made with: say "
                         "where these lie with --dataset")
    target = run.objective.target
    if entry["made"].get(target) != checksum(run.targets):
        raise InputError(f"{set_dir} was made with other {target} than those that are there now")
    return run

def main(argv=None):
    flags = parse(argv)
    with command_line("eval.py"):
        flags.device = start(flags.device)
        print("\n" + evaluate(open_set(flags), flags))

if __name__ == "__main__":
    main()
