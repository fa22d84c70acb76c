"""Evaluation of MKDT (section 5): pre-train a fresh encoder on a small set, then judge it.

    python eval.py --run-dir runs/cifar10/2pct_high_loss                  its set and baselines
    python eval.py --run-dir ... --sets random mkdt subset:sas.pkl --tasks all --paired

A seed fixes the encoder's initial weights, the order of its batches and which images are labelled,
each in a stream of its own and the same for every set: differences are paired."""
import argparse
import copy
import csv
import functools
import io
import itertools
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data import (Log, draw_augmentations, follow, load, load_dataset, restore, save, save_text,
                  share, shift_and_flip, two_views)
from models import (ENCODERS, OBJECTIVES, RANK, RANKS, SSL, InputError, barrier, batches, build,
                    command_line, compiled, encode, encoder, exhaust, first_line, rank_0_first,
                    start, stream, train)

# What to pre-train on: what may follow the name and a colon, and what it is. Each may end in a
# rate: random@0.3, or random@mkdt, the learned one.
SETS = {
    "none": ("", "no pre-training"),
    "random": (r"|ssl(:\d+)?", "as many real images as the distilled set has, redrawn for every "
               "seed; random:ssl: by the teacher's loss, 1000 epochs; random:ssl:80: 80"),
    "subset": (".+", "subset:FILE: training images by index, as SAS's: .pkl, .npy or .txt"),
    "high_loss": ("", "as many, those of the highest loss (section 4.2)"),
    "initial": ("", "the images that distillation began with"),
    "krr_st": (r"|\d+", "KRR-ST's, made here by the teacher, 160000 steps; krr_st:1000: 1000"),
    "dm": (r"|\d+", "DM's without labels, made here likewise, 20000 steps; dm:500: 500"),
    "distilled": (".+", "distilled:PATH: a set of this project, the authors' or KRR-ST's code"),
    "mkdt": (r"|\d+", "the run's distilled set; mkdt:1000: its snapshot after 1000 iterations"),
    "full": ("", "all training images"),
}
DEFAULT_SETS = "none random random@mkdt high_loss high_loss@mkdt initial initial@mkdt mkdt".split()
METHODS = {"none": "No Pre-Training", "random": "Random Subset", "high_loss": "High Loss Subset",
           "random:ssl": "Random Subset (SSL)", "krr_st": "KRR-ST", "mkdt": "MKDT",
           "initial": "Initial Images", "dm": "DM (no labels)", "full": "Full Data"}
TASKS = "cifar10 tinyimagenet cifar100 aircraft cub2011 dogs flowers".split()      # of Table 1

# ---- Pre-training (Eq. 9) and features ---------------------------------------------------------
def pretrain(encoder, loss, order, examples, lr, decay, seed):
    """Trains `encoder` by loss(x, y) on the examples of the `batches` in `order` (Eq. 9): SGD with
    momentum 0.9, a constant rate, that weight decay. Yields as `train`."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr, 0.9, weight_decay=decay)
    return train(lambda batch, step: loss(*examples(batch, (seed, "pretrain views", step))),
                 optimizer, order)

def pretrain_ssl(encoder, order, images, data, lr, s, seed):
    """Trains `encoder` by the teacher's self-supervised loss on uint8 `images` alone: appendix
    B's "Random (SSL Pre-training)". Adam, weight decay 1e-6. Yields as `train`."""
    loss_of, projector, _ = SSL[s.ssl]
    head = build(lambda: projector(encoder.head.out_features), seed, "evaluation projector")
    network = torch.nn.Sequential(encoder, head.to(images.device))
    optimizer = torch.optim.Adam(network.parameters(), lr, weight_decay=1e-6)
    return train(lambda batch, step: loss_of(*project(
        network, images[batch], data, s, (seed, "pretrain views", step)), s),
        optimizer, (o for o in order if len(o[1]) > 1))                     # batch norm needs two

def project(network, images, data, s, draw):
    """A network's outputs for two views x1, x2 ~ A(x) of uint8 images: Eq. 1's z1, z2 [B, k].
    Both views go through it as one batch, so batch norm sees them together."""
    views = two_views(images, stream(*draw).initial_seed(), (s.crop_scale, 1.0), s.gray)
    x = torch.cat([data.normalize(view) for view in views])                  # [2B, 3, H, W]
    return network(x.contiguous(memory_format=torch.channels_last)).float().chunk(2)

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
    if rows is None:
        return lambda batch, draw: views_of(s, data, len(batch), draw)
    return lambda batch, draw: rows[batch]

def views_of(s, data, n, draw):
    """Two augmentations, as functions of n normalised images of `data`."""
    pair = draw_augmentations(n, data.image_size, stream(*draw).initial_seed(),
                              data.train_images.device, (s.crop_scale, 1.0), s.gray)
    return tuple(lambda x, view=view: data.normalize(view(data.denormalize(x))) for view in pair)

def read_targets(s, data, run_dir):
    """(Z_T [n, d], labels [n] or None, by --objective; the dimension of a student's output)."""
    kind = OBJECTIVES[s.objective][1]
    if kind == "representations":
        z = load(Path(run_dir, "representations.pt")).to(s.device)
        return z, z.shape[1]
    if kind == "labels" and int(data.train_labels.min()) < 0:
        raise InputError(f"--objective {s.objective}: {data.name} has images without a label")
    return (data.train_labels, data.classes) if kind == "labels" else (None, 128)

def can_compile(s):
    """Whether to compile students' steps. Augmentations are other functions in every step."""
    return s.compile and OBJECTIVES[s.objective][1] != "views"

def loss_per_image(f, thetas, data, z, objective):
    """Section 4.2: the loss of each training image to its row of z, a mean over `thetas` [n]."""
    losses = []
    for theta in thetas:
        out = encode(functools.partial(f, theta), data.train_images, data.normalize)
        losses.append(objective(lambda x: x, out, z).view(len(z), -1).mean(dim=1))
    return torch.stack(losses).mean(dim=0)

def highest(losses, count):
    """Indices of the `count` largest of losses [n], the largest first, ties to the lower index."""
    if losses is None:
        raise InputError("high_loss needs a teacher, which only matching representations has")
    return losses.cpu().sort(descending=True, stable=True).indices[:count]

# ---- Judging an encoder: linear probe (Eq. 3), fine-tuning (Table 10) ---------------------------
def linear_probe(features, labels, classes, weight=1e-3, iterations=100):
    """A linear classifier by full-batch LBFGS: cross-entropy + weight * sum(W^2), the bias free.
    features [n, d], labels int64 [n]. From zero; a line search keeps it from diverging. Returns W
    [classes, d], b [classes]. Raises ValueError on features that are not finite."""
    if not features.isfinite().all():
        raise ValueError("the features are not finite")
    W, b = features.new_zeros(classes, features.shape[1]), features.new_zeros(classes)
    optimizer = torch.optim.LBFGS([W.requires_grad_(), b.requires_grad_()], max_iter=iterations,
                                  max_eval=25 * iterations, history_size=20, tolerance_change=1e-12,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ W.T + b, labels) + weight * W.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return W.detach(), b.detach()

def linear_scores(net, task, percents, seed):
    """Yields the accuracy of a linear probe on each share of labels; encodes each image once."""
    drawn = [labelled_subset(len(task.train_images), percent, seed) for percent in percents]
    needed = torch.cat(drawn).unique()                                                # sorted
    features = encode(net.features, task.train_images[needed], task.normalize)
    test = encode(net.features, task.test_images, task.normalize)
    for chosen in drawn:
        rows = features[torch.searchsorted(needed, chosen)]
        W, b = linear_probe(rows, task.train_labels[chosen], task.classes)
        yield accuracy(test @ W.T + b, task.test_labels)

FINETUNE_STEPS = {"cifar10": 10_000, "cifar100": 10_000, "tinyimagenet": 10_000}    # else 5,000

def finetune(encoder, task, chosen, seed):
    """A copy of `encoder` with a linear layer, trained as a whole on the images `chosen` of a
    labelled Dataset, as Lee et al. (2023) do; it maps images to logits.
    SGD at 0.01 with momentum 0.9, weight decay 5e-4 and a cosine to zero, batches of 256;
    images are shifted by up to four pixels and mirrored, then normalised."""
    encoder, images = copy.deepcopy(encoder), task.train_images[chosen]
    labels = task.train_labels[chosen]
    d = encode(encoder.features, images[:1], task.normalize).shape[1]
    head = build(lambda: torch.nn.Linear(d, task.classes), seed, "fine-tuning head")
    encoder.head = torch.nn.Identity()
    network = torch.nn.Sequential(encoder, head.to(images.device)).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)
    steps = FINETUNE_STEPS.get(task.name, 5_000)

    def loss(batch, step):
        draw = stream(seed, "fine-tuning views", step).initial_seed()
        x = task.normalize(shift_and_flip(images[batch].float() / 255, draw))
        return F.cross_entropy(network(x), labels[batch])

    def cosine(step):
        return 0.01 * 0.5 * (1 + math.cos(math.pi * step / steps))
    order = batches(len(images), 256, steps, seed, "fine-tuning order", images.device)
    exhaust(train(loss, optimizer, itertools.islice(order, steps), cosine))
    return network.eval()

def finetuned_scores(net, task, percents, seed):
    """Yields the accuracy after fine-tuning on each share of labels."""
    for percent in percents:
        chosen = labelled_subset(len(task.train_images), percent, seed)
        logits = encode(finetune(net, task, chosen, seed), task.test_images, task.normalize)
        yield accuracy(logits, task.test_labels)

def accuracy(logits, labels):
    """Percent of `labels` that the largest of `logits` [n, classes] predicts: 100 - Err, Eq. 3."""
    return 100 * (logits.argmax(1) == labels).float().mean().item()

def labelled_subset(n, percent, seed):
    """Indices of the labelled images: that share of n, drawn uniformly, sorted."""
    order = torch.randperm(n, generator=stream(seed, "labels", float(percent)))
    return order[:share(n, percent, "--labels")].sort().values

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

def dm(state, make, data, s, groups, iterations, seed, first=0):
    """DM (Zhao & Bilen 2023) without labels (appendix F): moves `state.images` [n, 3, H, W].
    Every iteration takes a fresh encoder of make(), and draws the mean features of each of as many
    `groups` of images as there would be classes to those of 256 real images, both augmented by
    `views_of`; the losses are summed. SGD at rate 1, momentum 0.5. Yields as `train`."""
    images = state.images
    parts = torch.arange(len(images)).chunk(max(1, groups))
    for step in range(first, iterations):
        rng = stream(seed, "dm", "step", step)
        net = build(make, seed, "dm", step).to(images.device).requires_grad_(False)
        state.optimizer.zero_grad()
        total = 0.0
        for g, part in enumerate(parts):
            batch = torch.randint(len(data.train_images), (256,), generator=rng)
            (augment, _), (ours, _) = (views_of(s, data, n, (seed, "dm", "views", step, g))
                                       for n in (256, len(part)))
            mean = net.features(augment(data.normalize(data.train_images[batch]))).mean(dim=0)
            loss = (net.features(ours(images[part])).mean(dim=0) - mean).square().sum()
            loss.backward()
            total += loss.detach()
        state.optimizer.step()
        yield step + 1, {"loss": total}

RIVALS = {"krr_st": 160_000, "dm": 20_000}                                        # iterations

def make_rival(r, kind, iterations, path):
    """Distils a rival's set into `path`: {"images", "targets"}.
    KRR-ST's real images are cropped and mirrored, their targets the teacher's of what comes out;
    DM's images get the teacher's targets in the end."""
    f_T, real, n = teacher_of(r.s, r.data.image_size), r.data.train_images, len(r.mkdt["images"])
    f_T.load_state_dict(load(r.dir.parent / "teacher.pt"))
    f_T.to(r.s.device).eval()
    chosen = torch.randperm(len(real), generator=stream(0, kind, "images"))[:n]
    images = r.data.normalize(real[chosen])

    def augmented(draw, rng):
        batch = torch.randint(len(real), (1024,), generator=rng)
        x = shift_and_flip(real[batch].float() / 255, stream(*draw).initial_seed())
        x = r.data.normalize(x)
        return x, encode(f_T, x)
    checkpoint = f"{path}.checkpoint"
    if kind == "krr_st":
        state = krr_state(r.make, images, r.rows[chosen], iterations, 0)
        lr = 1e-5 if r.data.name == "tinyimagenet" else 1e-4
        begin = functools.partial(krr_st, state, r.make, augmented, iterations, lr)
    else:
        optimizer = torch.optim.SGD([images.requires_grad_()], 1.0, momentum=0.5)
        state = argparse.Namespace(images=images, optimizer=optimizer)
        begin = functools.partial(dm, state, r.make, r.data, r.s, r.data.classes, iterations)
    loop = begin(seed=0, first=restore(checkpoint, **vars(state)))
    exhaust(follow(kind, loop, iterations, r.log, checkpoint, **vars(state)))
    targets = state.targets if kind == "krr_st" else encode(f_T, state.images)
    save(path, {"images": state.images.detach().cpu(), "targets": targets.detach().cpu()})

# ---- The sets to pre-train on --------------------------------------------------------------------
def parse_set(name):
    """(kind, argument, rate) of a set's name: ("subset", "sas.pkl", "0.3") for
    subset:sas.pkl@0.3. Raises InputError if there is no such set."""
    stem, rate = re.fullmatch(r"(.*?)(?:@(mkdt|\d*\.?\d+(?:e-?\d+)?))?", name).groups()
    kind, _, argument = stem.partition(":")
    if kind not in SETS or not re.fullmatch(SETS[kind][0], argument):
        raise InputError(f"unknown set {name!r}: choose from {', '.join(SETS)}, with a rate as in "
                         "random@0.3 or random@mkdt, the learned one")
    return kind, argument, rate

def pretraining_set(r, name, seed):
    """(images, normalised or uint8 [n, 3, H, W], targets or None, rate) of the set called `name`
    for `seed` in the run `r`; (None, None, "") for no pre-training."""
    kind, argument, rate = parse_set(name)
    real, n, lr = r.data.train_images, len(r.mkdt["images"]), r.s.pretrain_lr
    if kind == "none":
        return None, None, ""
    if kind in ("random", "high_loss", "subset", "full"):
        chosen = torch.arange(len(real))
        if kind == "random":
            chosen = torch.randperm(len(real), generator=stream(seed, "random subset"))[:n]
        elif kind == "high_loss":
            chosen = highest(r.init.get("losses"), n)
        elif kind == "subset":
            chosen = read_indices(argument, len(real))
        images, y = real[chosen], None if r.rows is None else r.rows[chosen]
        lr = 1e-3 if kind == "random" and argument else lr
    else:
        images, y, own = read_distilled(made_file(r, kind, argument))
        lr = own or lr
    lr = r.mkdt["lr"] if rate == "mkdt" else float(rate or lr)
    return images.to(real.device), None if y is None else y.to(real.device), lr

def made_file(r, kind, argument):
    """The file of a distilled set, which for a rival is made now if it is not there."""
    if kind == "mkdt":
        return r.dir / (f"distilled_{argument:0>5}.pt" if argument else "distilled.pt")
    if kind not in RIVALS:
        return r.dir / "init.pt" if kind == "initial" else Path(argument)
    iterations = int(argument or RIVALS[kind])
    path = r.dir / f"{kind}_{iterations}.pt"
    if not path.exists():
        make_rival(r, kind, iterations, path)
    return path

class IndexUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, numbers and numpy arrays, and refuses everything else."""

    def find_class(self, module, name):
        if module.split(".")[0] + "." + name not in (
                "numpy.ndarray numpy.dtype numpy.scalar numpy._reconstruct numpy._frombuffer "
                "_codecs.encode".split()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)

def read_indices(path, n):
    """Distinct indices of 0..n-1 in a .pkl, .npy or .txt: a list, array, or dict of "indices"."""
    try:
        with open(path, "rb") as file:
            found = IndexUnpickler(file).load() if path.endswith(".pkl") else \
                np.load(file) if path.endswith(".npy") else file.read().split()
        found = found["indices"] if isinstance(found, dict) else found
        indices = np.array(found, float).ravel().tolist()
        if not indices or len({*indices}) < len(indices) or not {*indices} <= {*range(n)}:
            raise ValueError(f"expected distinct whole numbers from 0 to {n - 1}")
    except Exception as error:                 # no file, a damaged pickle, a hostile one
        raise InputError(f"subset:{path} is not a list of indices ({first_line(error)})") from error
    return torch.tensor(indices).long()

def read_distilled(path):
    """(images [n, 3, H, W], targets [n, d] or labels [n] or None, rate or None) of a set in files.
    path: a distilled.pt, a snapshot or an init.pt of this project; images_S.pt with labels_S.pt
    and synlr_S.pt beside it, as the authors' code leaves them; KRR-ST's x_syn.pt with y_syn.pt."""
    path, images = Path(path), load(path)
    if isinstance(images, dict):
        images, y, lr = (images.get(k) for k in ("images", "targets", "lr"))
    else:
        krr_st = path.name.startswith("x_syn")
        labels, rate = (path.name.replace("images_", name) for name in ("labels_", "synlr_"))
        y = load(path.with_name("y_syn.pt" if krr_st else labels))
        lr = None if krr_st else float(load(path.with_name(rate)).mean())
    if not torch.is_tensor(images) or images.dim() != 4 or images.shape[1] != 3 or \
            not images.isfinite().all() or y is not None and len(y) != len(images):
        raise InputError(f"{path}: expected finite images [n, 3, H, H] and targets [n, d], or "
                         "labels [n]")
    if y is not None:
        y = y.detach().long() if y.dim() == 1 else y.detach().float()
    return images.detach().float(), y, lr

# ---- The cells of a table: the lines of results.csv ----------------------------------------------
KEY = "set", "how", "task", "labels", "seed"
COLUMNS = *KEY, "rate", "accuracy", "mse"

def read_run(args):
    """A run's settings, data, distilled set and what its baselines are made from."""
    run_dir = Path(args.run_dir).resolve()
    if not (run_dir / "distilled.pt").exists():
        raise InputError(f"{run_dir} holds no distilled.pt: make it with mkdt.py, or give another "
                         "--run-dir")
    made, shared = (json.loads((folder / "config.json").read_text())
                    for folder in (run_dir, run_dir.parent))
    s = argparse.Namespace(**{**made["distill"], **vars(args)})
    tuned = s.protocol == "finetune"
    s.pretrain_epochs = args.epochs or (1000 if tuned else s.pretrain_epochs)
    s.pretrain_decay = 1e-3 if tuned else 1e-4
    s.labels = args.labels or ([100] if tuned else [1, 5])
    s.how = f"{s.protocol}, {s.pretrain_epochs} epochs"
    data = load_dataset(s.dataset, s.data_dir, s.image_size, s.device, s.train_images)
    rows, d = read_targets(s, data, run_dir.parent)
    init = load(run_dir / "init.pt")
    s.sets = args.sets or [x for x in DEFAULT_SETS if "losses" in init or "high_loss" not in x]
    s.encoders = args.encoders or [student_name(s)]
    test = run_dir.parent / "representations_test.pt"
    r = argparse.Namespace(
        dir=run_dir, s=s, data=data, rows=rows, d=d, log=Log(run_dir / "log.jsonl"),
        make=student_of(s, d, data.image_size), students={},
        mkdt=load(run_dir / "distilled.pt"), init=init,
        experts_are_the_papers=shared["experts"]["paper"],
        z_test=load(test).to(s.device) if test.exists() and rows is not None else None)
    for kind in s.encoders:                                # what cannot work is refused first
        encoder(kind, d, data.image_size)
    with rank_0_first():                                   # it distils the rivals
        for name in s.sets:
            pretraining_set(r, name, 0)
    return r

def read_tasks(r):
    """{name: Dataset} to probe on; what cannot be had is left out, and said."""
    s, tasks = r.s, {}
    for name in TASKS if s.tasks == ["all"] else s.tasks or [s.dataset]:
        try:
            task = load_dataset(name, s.data_dir, s.image_size * (name == s.dataset), s.device)
            if not task.labelled:
                raise InputError(f"{name} has no labels for both splits")
            tasks[task.name] = task
        except InputError as error:
            print(f"left out: {error}")
    if not tasks:
        raise InputError("none of the tasks can be probed on")
    return tasks

def read_results(run_dir):
    """{KEY: line of results.csv, and of the other ranks' files, as a dict}."""
    lines = {}
    for path in sorted(run_dir.glob("results*.csv")):
        for line in csv.DictReader(io.StringIO(path.read_text())):
            lines[tuple(line[k] for k in KEY)] = line
    return lines

def write_results(path, lines):
    """results.csv of {KEY: line}."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines.values())
    save_text(path, text.getvalue())

def evaluate(args):
    """Computes the cells that results.csv lacks; returns the table and keeps it as results.md."""
    r = read_run(args)
    s, tasks, lines = r.s, read_tasks(r), read_results(r.dir)
    barrier()                                              # until every rank has read
    jobs = [job for job in itertools.product(s.encoders, s.seeds, s.sets) if any(
        key not in lines for key in keys_of(s, tasks, *job))]
    path = r.dir / f"results{f'_{RANK}' * (RANK > 0)}.csv"

    def loop():
        for done, (kind, seed, name) in enumerate(jobs[RANK::RANKS]):
            try:
                scores = cells(r, name, kind, seed, tasks)
                for key, values in zip(keys_of(s, tasks, kind, seed, name), scores):
                    lines[key] = dict(zip(COLUMNS, (*key, *map(str, values))))
            except ValueError as error:                    # it diverged, or a share has no image
                print(f"left out: {name}, seed {seed}: {error}")
            write_results(path, lines)
            yield done + 1, {}
    exhaust(follow("eval", loop(), len(jobs[RANK::RANKS]), r.log))
    barrier()
    text = tables(r, [*read_results(r.dir).values()])
    if RANK == 0:
        save_text(r.dir / "results.md", text)
    return text

def keys_of(s, tasks, kind, seed, name):
    """The KEYs of one pre-training, in the order of `cells`."""
    return [(name, f"{kind}, {s.how}", task, f"{percent:g}", str(seed))
            for task in tasks for percent in s.labels]

def teacher_of(s, image_size):
    """The ResNet-18 of the settings, a function of images to representations [B, d]."""
    f_T = ENCODERS["resnet18"](None, image_size, s.teacher_width, s.max_pool)
    if s.standardize:
        f_T.head = torch.nn.BatchNorm1d(f_T.feature_dim, affine=False)
    return f_T

def student_name(s):
    """The student of the settings, as `encoder` knows it."""
    return f"{s.student}:{s.width}"

def student_of(s, d, image_size):
    """Makes a student of the settings."""
    return functools.partial(encoder, student_name(s), d, image_size)

def student(kind, d, image_size, s):
    """(an encoder that lends its memory to training after training, its loss(x, y), a mean)."""
    net = encoder(kind, d, image_size).to(s.device).to(memory_format=torch.channels_last)
    objective = OBJECTIVES[s.objective][0]
    return net, compiled(lambda x, y: objective(net, x, y).mean(), can_compile(s))

def cells(r, name, kind, seed, tasks):
    """Pre-trains an encoder of that kind on the set `name` and judges it: yields (rate, accuracy,
    distance of Eq. 2 to the teacher on test images) for each task and share of labels. Raises
    ValueError if it diverges."""
    s, (images, y, lr), ssl = r.s, pretraining_set(r, name, seed), name.startswith("random:ssl")
    d, size, mse = r.d, r.data.image_size, ""
    if y is not None:                                     # a set made elsewhere brings its own
        size, d = images.shape[-1], y.shape[1] if y.dim() == 2 else d
    if (kind, d, size) not in r.students:
        r.students[kind, d, size] = student(kind, d, size, s)
    net, loss = r.students[kind, d, size]
    fresh = build(lambda: encoder(kind, d, size), seed, "evaluation encoder")
    net.train().load_state_dict(fresh.state_dict())
    if images is not None:
        epochs = int(parse_set(name)[1][4:] or 1000) if ssl else s.pretrain_epochs
        order = batches(len(images), s.pretrain_batch, epochs, seed, "pretrain order", s.device)
        examples = examples_of(s, r.data, images, y)
        exhaust(pretrain_ssl(net, order, images, r.data, lr, s, seed) if ssl else
                pretrain(net, loss, order, examples, lr, s.pretrain_decay, seed))
    if not all(p.isfinite().all() for p in net.parameters()):
        raise ValueError(f"pre-training at rate {lr:.3g} diverged: try {name}@RATE")
    net.eval()
    if r.z_test is not None and (d, size) == (r.d, r.data.image_size) and not ssl:
        z = encode(net, r.data.test_images, r.data.normalize)
        mse = OBJECTIVES[s.objective][0](lambda x: x, z, r.z_test).mean().item()
    judge = linear_scores if s.protocol == "linear" else finetuned_scores
    for task in tasks.values():
        for score in judge(net, task, s.labels, seed):
            yield lr, score, mse

# ---- The table -----------------------------------------------------------------------------------
def tables(r, lines):
    """results.md: a table for each encoder, protocol and length of pre-training. A row for each
    share of labels and set, a column for each task: percent correct, mean ± std over seeds, the
    best in bold, and in brackets the paper's value where it has one; with --paired, the difference
    to that set, mean ± standard error."""
    text, minus = [], [f"− {r.s.paired}"] * bool(r.s.paired)
    for how in dict.fromkeys(x["how"] for x in lines):
        of = [x for x in lines if x["how"] == how]
        tasks = list(dict.fromkeys(x["task"] for x in of))
        columns = [column for task in tasks for column in (task, *minus)]
        head = ["Labels", "Pre-training set", "Rate", "Seeds", *columns, "MSE"]
        text += [f"## {r.data.name}, {r.s.percent:g}% distilled: {how}", "",
                 "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        for percent in sorted({x["labels"] for x in of}, key=float):
            text += table_rows(r, [x for x in of if x["labels"] == percent], tasks)
        text += ["", "Percent correct, mean ± std over seeds, in brackets the paper's mean; "
                 "differences: paired by seed, ± standard error.", ""]
    return "\n".join(text) + "\n"

def table_rows(r, lines, tasks):
    """The rows of one share of labels."""
    text, scores = [], {}
    for x in lines:
        scores.setdefault((x["set"], x["task"]), {})[x["seed"]] = float(x["accuracy"])
    mean = {key: np.mean([*of.values()]) for key, of in scores.items()}
    best = {t: max((mean[key] for key in mean if key[1] == t and key[0] != "full"), default=None)
            for t in tasks}
    for _, name in sorted({([*SETS].index(parse_set(x["set"])[0]), x["set"]) for x in lines}):
        own = [x for x in lines if x["set"] == name]
        rate, mse = own[0]["rate"], [float(x["mse"]) for x in own if x["mse"]]
        cells = [f"{own[0]['labels']}%", METHODS.get(name, name), rate and f"{float(rate):.3g}",
                 str(len({x["seed"] for x in own}))]
        for t in tasks:
            of, cell = scores.get((name, t), {}), ""
            if of:
                bold = "**" if mean[name, t] == best[t] else ""
                theirs = paper_value(r, name, own[0]["how"], t, own[0]["labels"])
                cell = f"{bold}{mean[name, t]:.2f}{bold} ± {np.std([*of.values()]):.2f}{theirs}"
            cells += [cell, *[paired(of, scores.get((r.s.paired, t), {}))] * bool(r.s.paired)]
        cells += [f"{np.mean(mse):.4f}" if mse else ""]
        text += ["| " + " | ".join(cells) + " |"]
    return text

def paired(ours, theirs):
    """Mean ± standard error of the differences of two {seed: accuracy} over the seeds that both
    have; "" for fewer than two, or the same set."""
    d = np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    if len(d) < 2 or ours is theirs:
        return ""
    return f"{d.mean():+.2f} ± {d.std(ddof=1) / len(d) ** 0.5:.2f}"

# Tables 1 - 7 and 10 - 12. A head: pre-training data, percent, teacher, one of HOW, shares of
# labels: tasks; then for each row its means, share by share. MKDT's are called by objective and
# start. Of Table 10, none and krr_st are copied from Lee et al. (2023): another network (ConvNet
# 128-256-512, batch norm).
HOW = {"convnet:128, linear, 20 epochs": "convnet", "resnet10, linear, 20 epochs": "resnet10",
       "resnet18, linear, 20 epochs": "resnet18", "convnet:128, finetune, 1000 epochs": "finetune"}
TABLES = """
cifar10 2 barlow convnet 1 5: cifar10 tinyimagenet cifar100 aircraft cub2011 dogs flowers
none 35.84 2.52 8.01 2.43 1.27 1.92 2.02 46.23 5.37 16.12 5.61 1.97 2.90 5.22
random 36.35 2.41 7.42 2.41 1.16 1.90 1.99 46.62 5.49 15.28 5.35 1.51 2.52 3.64
sas 36.02 2.69 7.77 2.29 1.14 1.78 2.22 46.52 5.41 15.90 5.63 1.48 2.69 3.75
krr_st 37.19 2.84 8.67 2.53 1.25 1.88 2.42 46.75 6.85 16.65 5.41 1.88 2.76 4.52
mse_high_loss 44.36 3.58 10.58 2.58 1.37 2.11 2.52 53.08 7.25 19.57 5.97 2.06 3.06 4.97
full 58.21 4.94 14.53 2.92 1.69 2.40 3.23 67.16 10.85 26.38 6.92 2.51 3.88 6.37
cifar100 2 barlow convnet 1 5: cifar100 tinyimagenet cifar10 aircraft cub2011 dogs flowers
none 8.01 2.52 35.84 2.43 1.27 1.92 2.02 16.12 5.37 46.23 5.61 1.97 2.90 5.22
random 9.20 3.16 38.03 2.41 1.43 1.99 2.81 17.75 6.79 48.59 5.66 2.12 3.02 5.44
sas 9.39 3.23 38.73 2.53 1.42 2.07 2.95 17.94 6.71 48.69 5.95 2.15 3.22 5.56
high_loss 10.03 3.33 39.78 2.47 1.56 2.13 2.63 18.72 6.94 49.59 5.63 2.58 3.18 6.14
krr_st 8.31 2.73 37.19 2.56 1.29 1.92 2.58 16.40 6.16 47.96 5.54 2.00 2.95 4.69
mse_random 11.44 3.90 43.35 2.53 1.66 2.22 2.63 21.71 8.01 53.08 6.24 2.53 3.38 6.26
mse_high_loss 12.36 4.13 44.90 2.74 1.61 2.15 3.24 22.64 8.07 54.12 6.68 2.50 3.25 6.37
full 21.44 6.80 58.21 3.20 1.79 2.50 3.09 35.78 14.11 67.25 7.46 3.00 4.23 8.41
tinyimagenet 2 barlow convnet 1 5: tinyimagenet cifar10 cifar100 aircraft cub2011 dogs flowers
none 2.63 30.40 7.14 2.25 1.28 1.76 2.84 5.69 39.91 13.32 4.46 1.71 2.51 4.83
random 3.03 34.46 7.66 2.27 1.24 1.92 2.16 6.76 43.74 13.83 4.49 1.66 2.67 4.23
krr_st 3.32 34.24 7.84 2.14 1.30 1.95 2.21 7.13 42.44 13.85 3.99 1.77 2.47 4.14
mse_high_loss 3.87 37.25 8.95 2.30 1.36 1.99 2.86 7.99 45.97 16.50 4.66 2.07 2.91 5.49
full 9.42 50.52 15.18 2.57 1.59 2.20 3.29 18.93 58.90 26.47 5.07 2.47 3.85 7.09
cifar10 5 barlow convnet 1 5: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 37.63 7.63 2.63 2.28 1.13 1.81 2.05 48.13 16.06 5.21 5.03 1.71 2.61 3.30
krr_st 36.69 8.69 3.20 2.26 1.33 1.91 2.39 47.40 16.95 7.10 5.56 1.98 2.78 4.38
mse_high_loss 50.23 12.33 4.27 3.11 1.59 2.26 2.42 58.37 23.15 8.84 6.79 2.30 3.34 5.94
dm 35.98 7.09 2.43 2.15 1.19 1.71 1.60 46.41 14.77 5.11 4.94 1.57 2.53 3.10
ssl_random 22.06 4.63 1.11 1.92 0.77 1.38 1.26 29.04 7.10 1.90 2.81 0.88 1.82 1.42
cifar100 5 barlow convnet 1 5: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 42.45 11.55 4.17 2.47 1.51 2.12 2.61 51.92 20.34 7.83 6.06 2.27 3.22 5.78
krr_st 37.86 9.02 2.94 2.42 1.50 1.99 3.04 47.53 17.24 6.60 5.37 2.31 2.87 5.23
mse_high_loss 47.77 13.40 4.45 2.93 1.61 2.22 2.59 56.61 25.18 9.12 6.66 2.66 3.66 6.93
dm 37.75 8.74 2.75 2.51 1.20 2.07 2.53 47.32 17.01 6.40 5.08 1.99 2.77 4.62
ssl_random 26.06 4.26 1.20 1.49 0.87 1.24 1.41 38.16 9.66 2.11 2.83 1.06 1.74 2.38
tinyimagenet 5 barlow convnet 1 5: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 40.33 9.41 4.19 2.23 1.44 2.06 2.77 48.46 15.63 8.99 4.55 1.98 2.91 5.06
krr_st 34.27 7.54 3.19 2.11 1.30 1.68 2.65 42.82 13.71 6.50 4.36 1.97 2.75 3.97
mse_high_loss 41.44 10.29 5.09 2.16 1.29 2.02 2.92 50.79 19.25 10.63 4.88 2.08 2.89 5.58
cifar10 2 simclr convnet 1 5: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 35.20 7.35 2.29 2.21 1.19 1.83 1.83 45.69 15.09 5.71 5.21 1.52 2.48 3.36
krr_st 36.90 8.38 2.95 2.45 1.19 1.87 2.35 46.87 16.29 6.31 5.31 1.89 2.66 4.36
mse_high_loss 40.77 9.17 3.06 2.69 1.35 2.02 1.88 51.77 18.07 6.55 5.90 1.89 2.98 4.09
cifar100 2 simclr convnet 1 5: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 34.67 7.35 2.29 2.23 1.10 1.78 1.77 45.67 15.11 5.21 5.21 1.51 2.54 3.37
krr_st 36.57 8.38 3.01 2.41 1.28 1.71 1.98 46.76 15.75 6.17 5.43 1.93 2.61 3.55
mse_high_loss 39.59 9.44 3.07 2.60 1.33 1.93 2.49 49.87 18.47 6.65 5.56 1.93 2.98 4.83
cifar10 2 barlow convnet 10 50: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 51.21 19.75 8.04 7.42 2.15 3.10 5.22 57.18 26.86 15.16 16.11 4.18 6.17 12.98
krr_st 51.02 21.01 8.95 7.91 2.44 3.54 6.82 58.09 29.01 15.94 17.60 5.01 6.81 15.92
mse_high_loss 56.88 24.61 9.76 8.96 2.78 4.37 7.38 63.63 34.06 17.57 19.43 5.43 7.63 16.89
cifar100 2 barlow convnet 10 50: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 52.23 21.56 8.57 8.01 2.73 3.94 7.50 60.39 31.62 16.02 18.10 5.65 7.37 16.18
krr_st 52.40 21.39 8.21 7.64 2.34 3.76 6.52 58.57 29.46 15.70 15.89 4.82 7.00 15.07
mse_high_loss 57.67 27.28 11.05 9.25 3.42 4.43 9.35 65.85 38.09 17.46 20.73 6.67 8.48 21.15
tinyimagenet 2 barlow convnet 10 50: cifar10 cifar100 tinyimagenet aircraft cub2011 dogs flowers
random 44.08 16.43 8.84 5.57 2.12 3.07 6.51 47.35 19.28 14.01 8.74 3.61 5.18 13.60
krr_st 45.48 17.02 8.88 5.29 2.08 3.21 6.10 48.16 20.01 13.59 8.66 3.46 4.98 15.12
mse_high_loss 49.33 20.19 10.89 6.61 2.47 3.86 7.33 51.98 24.41 16.99 10.84 4.44 6.22 16.47
cifar100 5 barlow resnet10 5: cifar100 cifar10 tinyimagenet aircraft cub2011 dogs flowers
none 1.36 13.18 1.03 1.00 0.43 0.60 0.75
random 18.80 44.24 10.33 2.15 1.81 2.52 5.41
krr_st 13.84 39.21 8.04 2.12 1.16 1.77 4.56
mse_high_loss:1000 23.23 49.13 13.35 1.68 1.67 2.64 6.15
cifar100 5 barlow resnet18 5: cifar100 cifar10 tinyimagenet aircraft cub2011 dogs flowers
none 1.01 10.00 0.91 1.01 0.56 0.67 0.93
random 16.82 40.11 8.95 1.84 1.62 2.40 5.16
krr_st 12.30 35.73 7.21 2.32 1.18 1.81 2.45
mse_high_loss:1000 21.51 46.10 11.57 2.05 1.86 2.36 5.17
cifar100 2 barlow finetune 100: cifar100 cifar10 aircraft cars cub2011 dogs flowers
none 64.95 87.34 34.66 19.43 18.46 22.31 58.75
krr_st 66.81 88.72 41.54 28.68 25.30 26.39 67.88
random:ssl 66.44 88.74 42.02 28.75 25.12 26.57 68.21
"""

PAPER = {}                   # {(data set, percent, teacher, how, labels, row, task): mean}
for line in TABLES.strip().splitlines():
    if ": " in line:
        head, tasks = (part.split() for part in line.split(": "))
        block, shares = head[:4], head[4:]
    else:
        row, *means = line.split()
        for (labels, task), mean in zip(itertools.product(shares, tasks), means):
            PAPER[(*block, labels, row, task)] = mean

def paper_value(r, name, how, task, labels):
    """The paper's mean for a cell, " (53.08)"; "" where it has none for exactly this setting.
    config.json says of each stage whether all settings that led to it are the paper's."""
    s, (kind, argument, rate) = r.s, parse_set(name)
    file, row = "/".join(Path(argument).parts[-2:]), name
    if kind == "mkdt":
        row = name.replace("mkdt", f"{s.objective}_{s.init}")
    elif kind == "subset" and "sas" in file.lower():
        row = "sas"
    elif kind == "distilled" and "x_syn" in file:
        row = "krr_st"
    if rate or s.objective != "mse" and kind not in ("none", "mkdt"):
        return ""
    same = s.paper if kind in ("mkdt", "high_loss") else (
        r.experts_are_the_papers and (s.pretrain_batch, s.pretrain_lr) == (256, 0.1))
    if not same or name == "mkdt" and r.mkdt["iterations"] != 5000:
        return ""
    value = PAPER.get((s.dataset, f"{s.percent:g}", s.ssl, HOW.get(how), labels, row, task))
    return f" ({value})" if value else ""

# ---- Command line --------------------------------------------------------------------------------
def add_common(add):
    """The flags that mkdt.py has as well."""
    add("--data-dir", default="data", help="where data sets are kept (default: data)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile alone")

def parse(argv):
    """The arguments of a command line."""
    sets = "\n".join(f"    {name:<12}{what}" for name, (_, what) in SETS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog=f"sets:\n{sets}\n\nat another rate: random@0.3; at the learned "
        "one: random@mkdt")
    add = parser.add_argument
    add("--run-dir", required=True, help="folder of a distilled set: runs/cifar10/2pct_high_loss")
    add("--sets", nargs="+", metavar="SET", help="what to pre-train on, see below (default: "
        f"{' '.join(DEFAULT_SETS)})")
    add("--tasks", nargs="+", metavar="DATASET", default=[],
        help="what to probe on; all: the seven of Table 1 (default: the run's own data set)")
    add("--labels", nargs="+", type=float, metavar="PERCENT",
        help="shares of the labels (default: 1 5; finetune: 100)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--encoders", nargs="+", metavar="NAME",
        help="of models.ENCODERS, with a width as in resnet18:16 (default: the run's student)")
    add("--protocol", choices=["linear", "finetune"], default="linear",
        help="linear probe, or fine-tuning as Lee et al. (Table 10) (default: linear)")
    add("--paired", nargs="?", const="random", metavar="SET",
        help="add paired differences to SET, with standard errors (if none is named: random)")
    add("--epochs", type=int, default=0,
        help="of pre-training (default: 0, the run's own; finetune: 1000)")
    add_common(add)
    return parser.parse_args(argv)

def main(argv=None):
    """The command line; see the top of this file."""
    args = parse(argv)
    with command_line("eval.py"):
        args.device = start(args.device)
        print(f"\n{evaluate(args)}")

if __name__ == "__main__":
    main()
