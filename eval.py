"""Evaluation of MKDT (section 5): pre-train a fresh encoder on a small set, then judge it.

    python eval.py --run-dir runs/cifar10/2pct_high_loss                  its set and baselines
    python eval.py --run-dir ... --sets random mkdt subset:sas.pkl --tasks all --paired

A seed fixes the encoder's initial weights, the order of its batches and which images are labelled,
each in a stream of its own and the same for every set: differences are paired."""
import argparse
import collections
import contextlib
import copy
import csv
import functools
import io
import itertools
import math
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (Checkpoint, Log, denormalize, draw_augmentations, follow, load, load_dataset,
                  normalize, read_json, save, save_text, shift_and_flip, two_views)
from models import (ENCODERS, OBJECTIVES, RANK, RANKS, SSL, InputError, barrier, batches, build,
                    compiled, encoder, first_line, one_line_errors, rank_0_first, start, stream,
                    train)

# What to pre-train on. Each may end in a rate: random@0.3, or random@mkdt, the learned one.
SETS = {
    "none": "no pre-training",
    "random": "as many real images as the distilled set has, redrawn for every seed",
    "random:ssl": "those by the teacher's self-supervised loss, 1000 epochs; random:ssl:80: 80",
    "subset:FILE": "training images by index, as SAS's: .pkl, .npy or .txt",
    "high_loss": "as many, those of the highest loss (section 4.2)",
    "initial": "the images that distillation began with",
    "krr_st": "distilled here by KRR-ST, 160000 iterations; krr_st:1000: 1000",
    "dm": "distilled here by DM without labels, 20000 iterations; dm:500: 500",
    "distilled:PATH": "a set of this project, the authors' code or KRR-ST, used as it is",
    "raw:PATH": "such a set in pixels from 0 to 1, which are normalised first",
    "mkdt": "the run's distilled set",
    "full": "all training images",
}
DEFAULT_SETS = "none random random@mkdt high_loss high_loss@mkdt initial initial@mkdt mkdt".split()
METHODS = {"none": "No Pre-Training", "random": "Random Subset", "high_loss": "High Loss Subset",
           "random:ssl": "Random Subset (SSL)", "krr_st": "KRR-ST", "mkdt": "MKDT",
           "initial": "Initial Images", "dm": "DM (no labels)", "full": "Full Data"}
TASKS = "cifar10 tinyimagenet cifar100 aircraft cub2011 dogs flowers".split()      # of Table 1


# ---- Pre-training (Eq. 9) and features ---------------------------------------------------------
def pretrain(encoder, loss, n, examples, lr, s, seed):
    """Trains `encoder` by loss(x, y) on n examples (Eq. 9); yields as `train`.

    SGD with momentum 0.9, a constant rate, the short last batch kept; `seed` fixes the order."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr, 0.9, weight_decay=s.pretrain_decay)
    order = batches(n, s.pretrain_batch, s.pretrain_epochs, seed, "pretrain order")
    return train(lambda batch, step: loss(*examples(batch, (seed, "pretrain views", step))),
                 optimizer, order)


def pretrain_ssl(encoder, images, data, lr, epochs, s, seed):
    """Trains `encoder` by the teacher's self-supervised loss on uint8 `images` alone: appendix
    B's "Random (SSL Pre-training)". Adam, weight decay 1e-6. Yields as `train`."""
    loss_of, projector, _ = SSL[s.ssl]
    head = build(lambda: projector(encoder.head.out_features), seed, "evaluation projector")
    network = torch.nn.Sequential(encoder, head.to(images.device))
    optimizer = torch.optim.Adam(network.parameters(), lr, weight_decay=1e-6)

    def loss(batch, step):
        draw = stream(seed, "pretrain views", step).initial_seed()
        views = two_views(images[batch], draw, (s.crop_scale, 1.0), s.gray)
        z = network(torch.cat([data.normalize(view) for view in views]))
        return loss_of(*z.chunk(2), s)
    order = batches(len(images), s.pretrain_batch, epochs, seed, "pretrain order")
    return train(loss, optimizer, (o for o in order if len(o[1]) > 1))      # batch norm needs two


def examples_of(s, data, images, rows):
    """examples(batch, draw) -> normalised x, and y of OBJECTIVES (see `targets_of`), for images
    [n, 3, H, W] that are normalised or uint8."""
    targets = targets_of(s, data, rows)

    def examples(batch, draw):
        x = images[batch]
        return data.normalize(x) if x.dtype == torch.uint8 else x, targets(batch, draw)
    return examples


def targets_of(s, data, rows):
    """targets(batch, draw): y of OBJECTIVES for the images `batch`, whose representations or
    labels are `rows`; without rows, two augmentations, drawn from stream(*draw)."""
    def views(batch, draw):
        return views_of(s, data, len(batch), draw)
    return views if rows is None else lambda batch, draw: rows[batch]


def views_of(s, data, n, draw):
    """Two augmentations, as functions of n normalised images of `data`."""
    pair = draw_augmentations(n, data.image_size, stream(*draw).initial_seed(),
                              data.train_images.device, (s.crop_scale, 1.0), s.gray)
    return tuple(lambda x, view=view: normalize(view(denormalize(x, data.mean, data.std)),
                                                data.mean, data.std) for view in pair)


def read_targets(s, data, run_dir):
    """(Z_T [n, d], labels [n] or None, by --objective; the dimension of a student's output)."""
    kind = OBJECTIVES[s.objective][1]
    if kind == "representations":
        z = load(Path(run_dir, "representations.pt")).to(s.device)
        return z, z.shape[1]
    if kind == "labels" and int(data.train_labels.min()) < 0:
        raise InputError(f"--objective {s.objective}: {data.name} has images without a label")
    return (data.train_labels, data.classes) if kind == "labels" else (None, 128)


@torch.no_grad()
def encode(f, images, prepare, chunk=250):
    """f(prepare(images)) in chunks: [n, 3, H, W] -> float32 [n, d]."""
    return torch.cat([f(prepare(part)).float() for part in images.split(chunk)]
                     or [torch.empty(0, 1)])


def loss_per_image(f, thetas, data, z, objective):
    """Section 4.2: the loss of each training image to its row of z, a mean over `thetas` [n]."""
    losses = []
    for theta in thetas:
        out = encode(functools.partial(f, theta), data.train_images, data.normalize)
        losses.append(objective(lambda x: x, out, z).view(len(z), -1).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def highest(losses, count):
    """Indices of the `count` largest of losses [n], the largest first, ties to the lower index."""
    return losses.cpu().sort(descending=True, stable=True).indices[:count]


# ---- Judging an encoder: linear probe (Eq. 3), fine-tuning (Table 10), nearest neighbours --------
def linear_probe(features, labels, classes, weight=1e-3, iterations=100):
    """A linear classifier by full-batch LBFGS: cross-entropy + weight * sum(W^2), the bias free.

    features [n, d], labels int64 [n]. From zero; a line search keeps it from diverging. Returns W
    [classes, d], b [classes]. Raises ValueError on features that are not finite."""
    if not features.isfinite().all():
        raise ValueError("the features are not finite")
    W, b = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    optimizer = torch.optim.LBFGS([W.requires_grad_(), b.requires_grad_()], max_iter=iterations,
                                  max_eval=25 * iterations, history_size=20, tolerance_grad=1e-7,
                                  tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ W.T + b, labels) + weight * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return W.detach(), b.detach()


def linear_scores(net, task, percents, s, seed):
    """Yields (share of labels, accuracy of a linear probe on it, the encoder's output on the test
    images, or None where they have another size). Each image is encoded once."""
    drawn = [labelled_subset(len(task.train_images), percent, seed) for percent in percents]
    needed = torch.cat([*drawn, torch.empty(0, dtype=torch.int64)]).unique()          # sorted
    test = encode(net.features, task.test_images, task.normalize)
    features = encode(net.features, task.train_images[needed], task.normalize)
    z = net.head(test).detach() if test.shape[1] == net.head.in_features else None
    for percent, chosen in zip(percents, drawn):
        labels = task.train_labels[chosen]
        if (labels == labels[0]).all():
            raise ValueError(f"the {len(labels)} labelled images of {percent:g}% are of one class")
        W, b = linear_probe(features[torch.searchsorted(needed, chosen)], labels, task.classes)
        yield percent, accuracy(test @ W.T + b, task.test_labels), z


def finetune(encoder, task, chosen, s, seed):
    """A copy of `encoder` with a linear layer, trained as a whole on the images `chosen` of a
    labelled Dataset, as Lee et al. (2023) do; it maps images to logits.

    SGD at s.finetune_lr with momentum 0.9, weight decay 5e-4 and a cosine to zero, batches of 256;
    images are shifted by up to four pixels and mirrored, then normalised."""
    encoder, images = copy.deepcopy(encoder), task.train_images[chosen]
    d = encode(encoder.features, images[:1], task.normalize).shape[1]
    head = build(lambda: torch.nn.Linear(d, task.classes), seed, "fine-tuning head")
    encoder.head = torch.nn.Identity()
    network = torch.nn.Sequential(encoder, head.to(images.device)).train()
    optimizer = torch.optim.SGD(network.parameters(), s.finetune_lr, 0.9, weight_decay=5e-4)
    large = task.name in ("cifar10", "cifar100", "tinyimagenet")
    steps = s.finetune_iterations or (10_000 if large else 5_000)

    def loss(batch, step):
        draw = stream(seed, "fine-tuning views", step).initial_seed()
        x = task.normalize(shift_and_flip(images[batch].float() / 255, draw))
        return F.cross_entropy(network(x), task.train_labels[chosen][batch])

    def cosine(step):
        return s.finetune_lr * 0.5 * (1 + math.cos(math.pi * step / steps))
    order = batches(len(images), 256, steps, seed, "fine-tuning order")
    exhaust(train(loss, optimizer, itertools.islice(order, steps), cosine))
    return network.eval()


def finetuned_scores(net, task, percents, s, seed):
    """Yields (share of labels, accuracy after fine-tuning on it, None)."""
    for percent in percents:
        chosen = labelled_subset(len(task.train_images), percent, seed)
        logits = encode(finetune(net, task, chosen, s, seed), task.test_images, task.normalize)
        yield percent, accuracy(logits, task.test_labels), None


def accuracy(logits, labels):
    """Percent of `labels` that the largest of `logits` [n, classes] predicts: 100 - Err, Eq. 3."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()


def labelled_subset(n, percent, seed):
    """Indices of the labelled images: that share of n, drawn uniformly, sorted."""
    count = math.floor(n * percent / 100 + 1e-9)
    if not 1 <= count <= n:
        raise InputError(f"--labels {percent:g}% of {n} training images is {count} images")
    order = torch.randperm(n, generator=stream(seed, "labels", float(percent)))
    return order[:count].sort().values


def knn_accuracy(z, labels, z_test, test_labels, k=200, temperature=0.5):
    """Percent correct of the k nearest neighbours' vote, weighted by exp(cosine / temperature)."""
    bank, correct = F.normalize(z), 0
    for x, y in zip(F.normalize(z_test).split(1000), test_labels.split(1000)):
        similarity, nearest = (x @ bank.T).topk(min(k, len(bank)))                 # [B, k]
        votes = torch.zeros(len(x), int(labels.max()) + 1, device=x.device)
        votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp())
        correct += (votes.argmax(1) == y).sum().item()
    return 100 * correct / len(test_labels)


def exhaust(loop):
    """Runs a loop to its end."""
    collections.deque(loop, maxlen=0)


# ---- Rivals: KRR-ST, and DM without labels (appendix F) ------------------------------------------
def krr_loss(f_syn, y_syn, f_real, y_real, ridge=1e-6):
    """MSE of kernel ridge regression from the synthetic set to real images (Lee et al. 2023).

    Features f_syn [n, p], f_real [B, p], targets y_syn [n, d], y_real [B, d]. The kernel is linear
    in the features and a constant; the ridge is relative to the kernel's trace."""
    f_syn, f_real = (torch.cat([f, torch.ones_like(f[:, :1])], dim=1) for f in (f_syn, f_real))
    kernel = f_syn @ f_syn.T                                                       # [n, n]
    penalty = ridge * kernel.trace().detach() * torch.eye(len(kernel), device=kernel.device)
    return F.mse_loss(f_real @ f_syn.T @ torch.linalg.solve(kernel + penalty, y_syn), y_real)


def krr_state(make, images, targets, iterations, seed, models=10):
    """What `krr_st` changes: the set, a pool of encoders by make() and their ages, from 1 to 1,000
    steps, and the optimisers of both."""
    images, targets = (x.clone().requires_grad_() for x in (images, targets))
    pool = torch.nn.ModuleList(build(make, seed, "krr_st", k, 0) for k in range(models))
    online, rng = min(1000, iterations), stream(seed, "krr_st", "ages")
    return argparse.Namespace(
        images=images, targets=targets, outer=torch.optim.Adam([images, targets]),
        pool=pool.to(images.device), age=torch.randint(1, online + 1, (models,), generator=rng),
        inner=torch.optim.SGD(pool.parameters(), 0.1, momentum=0.9, weight_decay=1e-3))


def krr_st(state, make, real, iterations, lr, seed, first=0):
    """KRR-ST (Lee et al. 2023): moves images and targets of `state` to lower `krr_loss` of real
    images under one of its encoders, which then takes a step on the set itself by MSE, and begins
    anew at the age of 1,000. Adam, its rate falling linearly from `lr`.

    real(draw, rng) -> augmented real images, their targets. Yields as `train`."""
    images, targets, pool, online = state.images, state.targets, state.pool, min(1000, iterations)

    def learn(k):
        state.inner.zero_grad()
        F.mse_loss(pool[k](images.detach()), targets.detach()).backward()
        state.inner.step()

    for k in torch.arange(len(pool)).repeat_interleave(state.age) if first == 0 else ():
        learn(k)
    for step in range(first, iterations):
        rng = stream(seed, "krr_st", "step", step)
        k = int(torch.randint(len(pool), (), generator=rng))
        x, y = real((seed, "krr_st", "views", step), rng)
        with torch.no_grad():
            f_real = pool[k].features(x)
        loss = krr_loss(pool[k].features(images), targets, f_real, y)
        images.grad, targets.grad = torch.autograd.grad(loss, (images, targets))
        state.outer.param_groups[0]["lr"] = lr * (1 - step / iterations)
        state.outer.step()
        if state.age[k] < online:
            learn(k)
            state.age[k] += 1
        else:
            pool[k].load_state_dict(build(make, seed, "krr_st", k, step + 1).state_dict())
            for p in pool[k].parameters():
                state.inner.state.pop(p, None)
            state.age[k] = 0
        yield step + 1, {"loss": loss.detach()}


def dm(syn, make, data, views, groups, iterations, seed, first=0):
    """DM (Zhao & Bilen 2023) without labels (appendix F): moves `syn.images` [n, 3, H, W].

    Every iteration takes a fresh encoder of make(), and draws the mean features of each of as many
    `groups` of images as there would be classes to those of 256 real images, both augmented by
    views(n, draw); the losses are summed. SGD at rate 1, momentum 0.5. Yields as `train`."""
    parts = torch.arange(len(syn.images)).chunk(groups)
    for step in range(first, iterations):
        rng = stream(seed, "dm", "step", step)
        net = build(make, seed, "dm", step).to(syn.images.device).requires_grad_(False)
        images, total = syn.images.detach().requires_grad_(), 0.0
        for g, part in enumerate(parts):
            batch = torch.randint(len(data.train_images), (256,), generator=rng)
            (augment, _), (ours, _) = (views(n, (seed, "dm", "views", step, g))
                                       for n in (256, len(part)))
            mean = net.features(augment(data.normalize(data.train_images[batch]))).mean(dim=0)
            loss = (net.features(ours(images[part])).mean(dim=0) - mean).square().sum()
            loss.backward()
            total += loss.detach()
        syn.velocity.mul_(0.5).add_(images.grad)
        syn.images.sub_(syn.velocity)
        yield step + 1, {"loss": total}


def distil_krr_st(r, chosen, iterations, checkpoint):
    """KRR-ST's (images, targets). Real images are cropped and mirrored, and their targets are the
    teacher's of what comes out; the fixed representations where there is no teacher."""
    f_T, real = read_teacher(r), r.data.train_images
    if f_T is None:
        print("krr_st: no teacher.pt: the targets of augmented images are those of the originals")

    def draw(name, rng):
        batch = torch.randint(len(real), (1024,), generator=rng)
        x = shift_and_flip(real[batch].float() / 255, stream(*name).initial_seed())
        x = r.data.normalize(x)
        return x, r.rows[batch] if f_T is None else encode(f_T.features, x, lambda x: x)
    state = krr_state(r.make, r.data.normalize(real[chosen]), r.rows[chosen], iterations, 0)
    checkpoint = Checkpoint(checkpoint, 5, **vars(state))
    lr = 1e-5 if r.data.name == "tinyimagenet" else 1e-4
    loop = krr_st(state, r.make, draw, iterations, lr, 0, checkpoint.restore())
    exhaust(follow("krr_st", loop, iterations, r.log, checkpoint))
    return state.images, state.targets


def distil_dm(r, chosen, iterations, checkpoint):
    """DM's images, and the teacher's representations of them."""
    f_T, images = read_teacher(r), r.data.normalize(r.data.train_images[chosen])
    if f_T is None:
        raise InputError("dm needs teacher.pt, which runs with --representations do not have")
    syn = argparse.Namespace(images=images, velocity=torch.zeros_like(images))
    checkpoint = Checkpoint(checkpoint, 5, **vars(syn))
    views, groups = functools.partial(views_of, r.s, r.data), r.s.dm_groups or r.data.classes
    loop = dm(syn, r.make, r.data, views, max(1, groups), iterations, 0, checkpoint.restore())
    exhaust(follow("dm", loop, iterations, r.log, checkpoint))
    return syn.images, encode(f_T.features, syn.images, lambda x: x)


RIVALS = {"krr_st": (distil_krr_st, 160_000), "dm": (distil_dm, 20_000)}


def read_teacher(r):
    """The teacher of a run in eval mode; None if it was made with --representations."""
    if not (r.dir.parent / "teacher.pt").exists():
        return None
    f_T = ENCODERS["resnet18"](None, r.data.image_size, r.s.teacher_width, bool(r.s.max_pool))
    f_T.load_state_dict(load(r.dir.parent / "teacher.pt"))
    return f_T.to(r.s.device).eval()


# ---- The sets to pre-train on --------------------------------------------------------------------
def parse_set(name):
    """(kind, argument, rate) of a set's name: ("subset", "sas.pkl", "0.3") for
    subset:sas.pkl@0.3. Raises InputError if there is no such set."""
    stem, rate = re.fullmatch(r"(.*?)(?:@(mkdt|\d*\.?\d+(?:e-?\d+)?))?", name).groups()
    kind, _, argument = stem.partition(":")
    allowed = {"random": r"|ssl(:[1-9]\d*)?", "krr_st": r"|[1-9]\d*", "dm": r"|[1-9]\d*",
               "subset": ".+", "distilled": ".+", "raw": ".+"}.get(kind, "")
    if kind not in [known.partition(":")[0] for known in SETS] or not re.fullmatch(
            allowed, argument):
        raise InputError(f"unknown set {name!r}: choose from {', '.join(SETS)}, with a rate as in "
                         "random@0.3 or random@mkdt, the learned one")
    return kind, argument, rate


def pretraining_set(r, name, seed):
    """(images, normalised or uint8 [n, 3, H, W], targets or None, rate) of the set called `name`
    for `seed` in the run `r`; (None, None, "") for no pre-training."""
    kind, argument, rate = parse_set(name)
    real, n, lr = r.data.train_images, len(r.data.train_images), None
    if kind == "none":
        return None, None, ""
    if (kind, argument) in r.made:
        images, y, lr = r.made[kind, argument]
    elif kind == "high_loss" and r.losses is None:
        raise InputError("high_loss needs a teacher, which a run by its representations has")
    else:
        count = len(r.made["mkdt", ""][0])
        chosen = {"random": lambda: torch.randperm(
                      n, generator=stream(seed, "random subset"))[:count],
                  "high_loss": lambda: highest(r.losses, count),
                  "subset": lambda: read_indices(argument, n),
                  "full": lambda: torch.arange(n)}[kind]()
        images, y = real[chosen], None if r.rows is None else r.rows[chosen]
    lr = 1e-3 if kind == "random" and argument else lr or r.s.pretrain_lr
    lr = r.made["mkdt", ""][2] if rate == "mkdt" else float(rate or lr)
    return images.to(real.device), None if y is None else y.to(real.device), lr


class IndexUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, numbers and numpy arrays, and refuses everything else."""

    def find_class(self, module, name):
        if (module.split(".")[0], name) not in {
                *itertools.product(["numpy"], ["ndarray", "dtype", "scalar", "_reconstruct",
                                               "_frombuffer"]), ("_codecs", "encode")}:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read_indices(path, n):
    """Distinct indices of 0..n-1 in a .pkl, .npy or .txt: a list, array, or dict of "indices"."""
    try:
        with open(path, "rb") as file:
            found = IndexUnpickler(file).load() if path.endswith(".pkl") else \
                np.load(file) if path.endswith(".npy") else file.read().split()
        found = found["indices"] if isinstance(found, dict) else found
        numbers = torch.from_numpy(np.array(found, float).reshape(-1))
        indices = numbers.long()
        if not torch.equal(indices.double(), numbers) or not len(indices) or not (
                0 <= indices.min() <= indices.max() < n) or len(indices.unique()) < len(indices):
            raise ValueError(f"expected distinct whole numbers from 0 to {n - 1}")
    except Exception as error:                 # no file, a damaged pickle, a hostile one
        raise InputError(f"subset:{path} is not a list of indices ({first_line(error)})") from error
    return indices


def read_distilled(path):
    """(images [n, 3, H, W], targets [n, d] or labels [n], rate or None) of a distilled set.

    path: a distilled.pt or a snapshot of this project; images_S.pt with labels_S.pt and synlr_S.pt
    beside it, as the authors' code leaves them; KRR-ST's x_syn*.pt with y_syn*.pt."""
    path = Path(path)
    images, lr = load(path), None
    if isinstance(images, dict):
        images, y, lr = (images.get(k) for k in ("images", "targets", "lr"))
    else:
        own = path.with_name(path.name.replace("images_", "labels_").replace("x_syn", "y_syn"))
        y = load(own if own.exists() else path.with_name("y_syn.pt"))
        rate = path.with_name(path.name.replace("images_", "synlr_"))
        if rate != path and rate.exists():
            lr = float(torch.as_tensor(load(rate)).mean())
    for x, dims in ((images, (4,)), (y, (1, 2))):
        if not torch.is_tensor(x) or x.dim() not in dims or len(x) != len(images) or \
                not x.isfinite().all() or images.dim() != 4 or images.shape[1] != 3:
            raise InputError(f"{path}: expected finite images [n, 3, H, H] and targets [n, d], or "
                             "labels [n]")
    y = y.detach().long() if y.dim() == 1 else y.detach().float()
    return images.detach().float(), y, lr


def read_made(r, name):
    """(images, targets, rate) of a set that lies in files, or is distilled here by a rival."""
    kind, argument, _ = parse_set(name)
    if kind in ("distilled", "raw"):
        images, y, lr = read_distilled(argument)
        return r.data.normalize(images) if kind == "raw" else images, y, lr
    distil, default = RIVALS[kind]
    path = r.dir / f"{kind}_{argument or default}.pt"
    with rank_0_first():
        if not path.exists():
            if OBJECTIVES[r.s.objective][1] != "representations":
                raise InputError(f"{kind} needs representations, which this run has not")
            chosen = torch.randperm(len(r.rows), generator=stream(0, kind, "images"))
            chosen = chosen[:len(r.made["mkdt", ""][0])]
            images, y = distil(r, chosen, int(argument or default), f"{path}.checkpoint")
            save(path, {"images": images.detach().cpu(), "targets": y.detach().cpu()})
        return read_distilled(path)


# ---- The cells of a table: the lines of results.csv ----------------------------------------------
KEY = "set", "encoder", "protocol", "epochs", "task", "labels", "seed"
COLUMNS = *KEY, "rate", "accuracy", "mse"


def read_run(args):
    """A run's settings, data, distilled set and what its baselines are made from."""
    run_dir = Path(args.run_dir).resolve()
    made = read_json(run_dir / "config.json").get("distill")
    if not made or not (run_dir / "distilled.pt").exists():
        raise InputError(f"{run_dir} holds no distilled.pt: make it with mkdt.py, or give another "
                         "--run-dir")
    s = argparse.Namespace(**{**made, **vars(args)})
    s.pretrain_epochs = args.epochs or (1000 if s.protocol == "finetune" else s.pretrain_epochs)
    s.pretrain_decay = 1e-3 if s.protocol == "finetune" else 1e-4
    data = load_dataset(s.dataset, s.data_dir, s.image_size, s.device, s.train_images)
    rows, d = read_targets(s, data, run_dir.parent)
    test, init = run_dir.parent / "representations_test.pt", load(run_dir / "init.pt")
    mkdt, student = load(run_dir / "distilled.pt"), f"{s.student}:{s.width}"
    r = argparse.Namespace(
        dir=run_dir, s=s, data=data, rows=rows, d=d, losses=init.get("losses"), student=student,
        make=functools.partial(encoder, student, d, data.image_size),
        log=Log(run_dir / "log.jsonl"),
        z_test=load(test).to(s.device) if test.exists() and rows is not None else None,
        iterations=mkdt["iterations"], made={
            ("mkdt", ""): (mkdt["images"], mkdt.get("targets"), mkdt["lr"]),
            ("initial", ""): (init["images"], init.get("targets"), None)})
    for kind in s.encoders or ():
        encoder(kind, d, data.image_size)
    for name in s.sets:                                    # what cannot work is refused first
        kind, argument, _ = parse_set(name)
        if kind in ("distilled", "raw", *RIVALS):
            r.made[kind, argument] = read_made(r, name)
        pretraining_set(r, name, 0)
    return r


def read_tasks(r):
    """({task: Dataset}, {what is left out: why})."""
    tasks, left_out = {}, {}
    for name in r.s.tasks or [r.s.dataset]:
        try:
            own_size = r.s.image_size if name == r.s.dataset else 0
            task = load_dataset(name, r.s.data_dir, own_size, r.s.device)
            if not task.labelled:
                raise InputError(f"{name} has no labels for both splits")
            tasks[task.name] = task
        except InputError as error:
            left_out[name] = str(error)
    if not tasks:
        raise InputError("; ".join(left_out.values()))
    return tasks, left_out


def read_results(run_dir):
    """{KEY: line of results.csv, and of the other ranks' files, as a dict}."""
    lines = {}
    for path in sorted(run_dir.glob("results*.csv")):
        text = path.read_text()
        whole = text[:text.rfind("\n") + 1]
        if whole != text:                                  # the last line was cut off by a kill
            save_text(path, whole)
        for line in csv.DictReader(io.StringIO(whole)):
            lines[tuple(line[k] for k in KEY)] = line
    return lines


def evaluate(args):
    """Computes the cells that results.csv lacks; returns the table and keeps it as results.md."""
    r = read_run(args)
    (tasks, left_out), there, jobs = read_tasks(r), read_results(r.dir), []
    barrier()                                              # until every rank has read
    for kind, seed, name in itertools.product(args.encoders or [r.student], args.seeds, args.sets):
        key = name, kind, args.protocol, str(r.s.pretrain_epochs)
        wanted = {t: [p for p in args.labels if (*key, t, f"{p:g}", str(seed)) not in there]
                  for t in tasks}
        jobs += [(key, seed, wanted)] * any(wanted.values())
    mine, path = jobs[RANK::RANKS], r.dir / f"results{f'_{RANK}' if RANK else ''}.csv"
    for done, (key, seed, wanted) in enumerate(mine):
        try:
            for task, percent, *values in cells(r, *key[:2], seed, tasks, wanted):
                new = not path.exists() or not path.stat().st_size
                with open(path, "a", newline="") as file:
                    csv.writer(file, lineterminator="\n").writerows(
                        [COLUMNS] * new + [(*key, task, f"{percent:g}", seed, *values)])
        except ValueError as error:                        # it diverged, or a share has no image
            left_out[f"{key[0]}, seed {seed}"] = str(error)
        if r.log.due() or done + 1 == len(mine):
            r.log("eval", done + 1, len(mine), set=key[0], seed=seed)
    barrier()
    text = tables(r, list(read_results(r.dir).values())) if RANK == 0 else ""
    text += "".join(f"Left out: {what} ({why})\n" for what, why in left_out.items())
    if RANK == 0:
        save_text(r.dir / "results.md", text)
    return text


@functools.lru_cache(maxsize=4)
def student(kind, d, image_size, objective, device, compile):
    """(an encoder that lends its memory to cell after cell, its loss(x, y) to be minimised)."""
    net = encoder(kind, d, image_size).to(device).to(memory_format=torch.channels_last)
    return net, compiled(lambda x, y: OBJECTIVES[objective][0](net, x, y).mean(), compile)


def cells(r, name, kind, seed, tasks, wanted):
    """Pre-trains an encoder of that kind on the set `name` and judges it: yields (task, share of
    labels, rate, accuracy, distance of Eq. 2 to the teacher on test images) for what is wanted of
    each task. Raises ValueError if it diverges."""
    s, (_, argument, _), (images, y, lr) = r.s, parse_set(name), pretraining_set(r, name, seed)
    d, size, objective = r.d, r.data.image_size, s.objective
    if y is not None:                                     # a set made elsewhere brings its own
        size, objective = images.shape[-1], "ce" if y.dim() == 1 else objective
        d = y.shape[1] if y.dim() == 2 else max(int(y.max()) + 1, d if s.objective == "ce" else 0)
    compile = s.compile and OBJECTIVES[objective][1] != "views"
    net, loss = student(kind, d, size, objective, s.device, compile)
    fresh = build(lambda: encoder(kind, d, size), seed, "evaluation encoder")
    net.train().load_state_dict(fresh.state_dict())
    loop, ssl = (), parse_set(name)[0] == "random" and argument
    if ssl:
        loop = pretrain_ssl(net, images, r.data, lr, int(argument[4:] or 1000), s, seed)
    elif images is not None:
        loop = pretrain(net, loss, len(images), examples_of(s, r.data, images, y), lr, s, seed)
    for step, values in loop:
        if r.log.due():
            r.log("pretrain", step, "", set=name, seed=seed, loss=float(values["loss"]))
    if not all(p.isfinite().all() for p in net.parameters()):
        raise ValueError(f"pre-training at rate {lr:.3g} diverged: try {name}@RATE")
    judge = {"linear": linear_scores, "finetune": finetuned_scores}[s.protocol]
    for task, percents in wanted.items():
        for percent, score, z in judge(net.eval(), tasks[task], percents, s, seed):
            mse, known = "", r.z_test if task == r.data.name and not ssl else None
            if known is not None and z is not None and z.shape == known.shape:
                mse = OBJECTIVES[s.objective][0](lambda x: x, z, known).mean().item()
            yield task, percent, lr, score, mse


# ---- The table -----------------------------------------------------------------------------------
def tables(r, lines):
    """results.md: a table for each protocol, encoder and length of pre-training. A row for each
    share of labels and set, a column for each task: percent correct, mean ± std over seeds, the
    best in bold, and the paper's value below where it has one; with --paired, the difference to
    that set, mean ± standard error."""
    text = []
    for about in dict.fromkeys((x["protocol"], x["encoder"], x["epochs"]) for x in lines):
        of = [x for x in lines if (x["protocol"], x["encoder"], x["epochs"]) == about]
        tasks, minus = list(dict.fromkeys(x["task"] for x in of)), [f"− {r.s.paired}"]
        columns = [c for t in tasks for c in (t, *minus * bool(r.s.paired))]
        head = ["Labels", "Pre-training set", "Rate", *columns, "MSE"]
        text += [f"## {r.data.name}, {r.s.percent:g}% distilled: {about[1]}, {about[0]}, "
                 f"{about[2]} epochs", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for percent in sorted({x["labels"] for x in of}, key=float):
            text += rows(r, [x for x in of if x["labels"] == percent], tasks, about, percent)
        text += ["", f"Percent correct, mean ± std over {len({x['seed'] for x in of})} seeds" + (
            "; differences: paired by seed, ± standard error." if r.s.paired else "."), ""]
    return "\n".join(text) + "\n"


def rows(r, lines, tasks, about, percent):
    """The rows of one share of labels."""
    order, text = [known.partition(":")[0] for known in SETS], []
    scores = collections.defaultdict(dict)                 # {(set, task): {seed: accuracy}}
    for x in lines:
        scores[x["set"], x["task"]][x["seed"]] = float(x["accuracy"])
    names = sorted({x["set"] for x in lines}, key=lambda n: (order.index(parse_set(n)[0]), n))
    best = {t: max((np.mean([*scores[n, t].values()]) for n in names
                    if n != "full" and scores[n, t]), default=0) for t in tasks}
    for name in names:
        cells, theirs = [], []
        for t in tasks:
            values = [*scores[name, t].values()]
            bold = "**" * bool(values and np.mean(values) == best[t])
            cells += [f"{bold}{np.mean(values):.2f}{bold} ± {np.std(values):.2f}" * bool(values)
                      if values else ""]
            theirs += [paper_value(r, name, about, t, percent)]
            if r.s.paired:
                difference = paired(scores[name, t], scores[r.s.paired, t])
                cells += ["{:+.2f} ± {:.2f}".format(*difference) if difference else ""]
                theirs += [""]
        rate = next(x["rate"] for x in lines if x["set"] == name)
        mse = [float(x["mse"]) for x in lines if x["set"] == name and x["mse"]]
        cells = [f"{percent}%", METHODS.get(name, name), f"{float(rate):.3g}" if rate else "",
                 *cells, f"{np.mean(mse):.4f}" if mse else ""]
        text += ["| " + " | ".join(cells) + " |"]
        text += ["| | *paper* | | " + " | ".join([*theirs, ""]) + " |"] * any(theirs)
    return text


def paired(ours, theirs):
    """(mean, standard error) of the differences of two {seed: accuracy} over the seeds that both
    have; None for fewer than two, or the same set."""
    d = np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    return (d.mean(), d.std(ddof=1) / len(d) ** 0.5) if len(d) > 1 and ours is not theirs else None


# Tables 1 - 7 and 10 - 12. Each block: pre-training data, percent, teacher, encoder, protocol:
# tasks; then, for each share of labels and row, means and deviations. Of Table 10, none and
# krr_st are copied from Lee et al. (2023): another network (ConvNet 128-256-512, batch norm).
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
    """{(data set, percent, teacher, encoder, protocol, labels, row, task): (mean, std)}."""
    values, block, tasks = {}, (), []
    for line in PAPER.strip().splitlines():
        if line.startswith("#"):
            block, tasks = (part.split() for part in line[1:].split(":"))
            continue
        labels, row, *numbers = line.split()
        pairs = zip(numbers[::2], numbers[1::2])
        values.update({(*block, labels, row, task): pair for task, pair in zip(tasks, pairs)})
    return values


def paper_row(r, name):
    """(the row of the paper's tables that a set belongs to, the iterations it had) or None."""
    kind, argument, rate = parse_set(name)
    started, path = {"high_loss": "mkdt", "random": "mkdt_random"}, Path(argument).resolve()
    if rate or kind in ("krr_st", "dm") and argument:
        return None
    if kind == "mkdt":
        return {"ssl": "mtt_ssl", "mse": started.get(r.s.init)}.get(r.s.objective), r.iterations
    if kind == "subset":
        return "sas" if "sas" in f"{path.parent.name}/{path.name}".lower() else None, None
    if kind in ("distilled", "raw") and path.parent.parent == r.dir.parent:   # a set beside this
        percent, _, init = path.parent.name.partition("pct_")
        made = int((re.findall(r"distilled_(\d+)", path.stem) or [load(path)["iterations"]])[0])
        return started.get(init) if percent == f"{r.s.percent:g}" else None, made
    if kind in ("distilled", "raw"):
        return "krr_st" if path.name.startswith("x_syn") else None, None
    return f"{kind}:{argument}" if argument else kind, None


def paper_value(r, name, about, task, labels):
    """The paper's "mean ± std" for a cell; "" where it has none for exactly this setting."""
    s, (protocol, kind, epochs), row = r.s, about, paper_row(r, name)
    if not row or s.train_images or s.image_size or (s.student, s.width) != ("convnet", 128):
        return ""
    if epochs != ("1000" if protocol == "finetune" else "20"):
        return ""
    kind, (row, iterations) = "convnet" if kind == "convnet:128" else kind, row
    if (s.teacher_width, s.representations) != (64, "") and row not in ("none", "mtt_ssl"):
        return ""
    if s.objective != "mse" and row not in ("none", "mtt_ssl"):
        return ""
    if s.teacher_epochs != {"barlow": 1000, "simclr": 400}.get(s.ssl) and row != "none":
        return ""
    if row in ("mkdt", "mkdt_random") and s.experts != 100:
        return ""
    if iterations not in (None, 5000 if kind == "convnet" else 1000):
        return ""
    block = s.dataset, f"{s.percent:g}", s.ssl, kind, protocol
    return " ± ".join(paper_values().get((*block, labels, row, task), ()))


# ---- Command line --------------------------------------------------------------------------------
def parse(argv):
    """The arguments of a command line."""
    sets = "\n".join(f"    {name:<16}{what}" for name, what in SETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog=f"sets:\n{sets}\n\nat another rate: random@0.3; at the learned "
        "one: random@mkdt")
    add = parser.add_argument
    add("--run-dir", required=True, help="folder of a distilled set: runs/cifar10/2pct_high_loss")
    add("--sets", nargs="+", metavar="SET", default=DEFAULT_SETS, help="what to pre-train on, see "
        f"below (default: {' '.join(DEFAULT_SETS)})")
    add("--tasks", nargs="+", metavar="DATASET", default=[], help="data sets to probe on; all: the "
        "seven of Table 1 (default: the run's own)")
    add("--labels", nargs="+", type=float, metavar="PERCENT", help="shares of the task's labels "
        "(default: 1 5; finetune: 100)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--encoders", nargs="+", metavar="NAME", help="names in models.ENCODERS, with a width as "
        "in resnet18:16 (default: the run's student)")
    add("--protocol", choices=["linear", "finetune"], default="linear", help="linear probe, or "
        "fine-tuning as Lee et al. (Table 10) (default: linear)")
    add("--paired", nargs="?", const="random", metavar="SET", help="add each set's paired "
        "difference to SET, with standard errors (if none is named: random)")
    add("--epochs", type=int, default=0, help="of pre-training (default: 0, the run's own; "
        "finetune: 1000)")
    add("--finetune-lr", type=float, default=0.01, help="rate of fine-tuning (default: 0.01)")
    add("--finetune-iterations", type=int, default=0, help="(default: 0, that is 10000 on CIFAR "
        "and TinyImageNet, else 5000)")
    add("--dm-groups", type=int, default=0, help="groups that dm matches (default: 0, one a class)")
    add("--data-dir", default="data", help="where data sets are kept (default: data)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile alone")
    args = parser.parse_args(argv)
    own = Path(args.run_dir).resolve().parent.name.split("_")[0]
    args.tasks = [task for name in args.tasks for task in (                    # its own first
        sorted(TASKS, key=lambda task: own != task) if name == "all" else [name])]
    args.labels = args.labels or ([1, 5] if args.protocol == "linear" else [100])
    return args


def main(argv=None):
    """The command line; see the top of this file."""
    args = parse(argv)
    with one_line_errors("eval.py"), contextlib.redirect_stdout(None if RANK else sys.stdout):
        args.device = start(args.device)
        print(f"\n{evaluate(args)}")


if __name__ == "__main__":
    main()
