"""Evaluation of MKDT (section 5, appendix A.1): pre-train a fresh encoder on a set of images, then probe it linearly.

    python eval.py --run-dir runs/cifar10/2pct_high_loss                     the set of that run and its baselines
    python eval.py --run-dir runs/cifar10/2pct_high_loss --seeds 0 1 2 3 4   more seeds extend the table

    pretrain        Eq. 9: an encoder from (images, representations) by MSE
    encode          features of a data set under an encoder, in chunks
    linear_probe    the classifier of Eq. 3: full-batch LBFGS
    knn_accuracy    the monitor of the teacher
    evaluate        every cell of a table, kept in results.json and results.md

A cell is (set, encoder, task, labels, seed). The seed fixes the encoder's initial weights, the order of its batches
and which images are labelled, each in a stream of its own and the same for every set: differences are paired.
"""
import argparse
import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (Dataset, InputError, Log, duration, fingerprint, load, load_dataset, read_json, save, save_json,
                  write_file)
from models import (ConvNet, build, compile_if_it_pays, from_rank_0, gather_from_ranks, generator, join_ranks,
                    pick_device, rank, rank_0_first, ranks)

PAPER_NAMES = {"none": "No Pre-Training", "random": "Random Subset", "random@mkdt": "Random Subset, learned rate",
               "high_loss": "High Loss Subset", "high_loss@mkdt": "High Loss Subset, learned rate",
               "initial": "Initial Images", "initial@mkdt": "Initial Images, learned rate",
               "mkdt": "MKDT", "full": "Full Data"}
SETS = ("none", "random", "high_loss", "initial", "mkdt", "full")
DEFAULT_SETS = ("none", "random", "random@mkdt", "high_loss", "mkdt", "full")


# ------------------------------------------------------------------------------------------------------------
# Pre-training (Eq. 9) and features
# ------------------------------------------------------------------------------------------------------------
CHUNK = 250                                                  # images that are encoded at once


def pretrain(encoder, images, representations, lr, epochs, seed, batch_size=256, momentum=0.9, weight_decay=1e-4,
             prepare=lambda x: x, loss=None):
    """Trains `encoder` in place to map `images` to `representations` by MSE (Eq. 9) and returns it in eval mode.

    images [n, 3, H, W] (`prepare` normalises a batch if they are stored as uint8), representations [n, d].
    SGD with constant rate `lr`; min(batch_size, n) images a step, the short last batch kept; `seed` fixes the order.
    loss(x, z): a faster F.mse_loss(encoder(x), z), if it is at hand.
    Raises InputError if the weights end up non-finite.
    """
    loss = loss or (lambda x, z: F.mse_loss(encoder(x), z))
    optimizer = torch.optim.SGD(encoder.parameters(), lr, momentum, weight_decay=weight_decay)
    encoder.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator(seed, "pretrain order", epoch)).to(images.device)
        for batch in order.split(batch_size):
            optimizer.zero_grad()
            loss(prepare(images[batch]), representations[batch]).backward()
            optimizer.step()
    if not all(p.isfinite().all() for p in encoder.parameters()):
        raise InputError(f"pre-training on {len(images)} images at rate {lr:.3g} diverged: give the set a lower rate")
    return encoder.eval()


@torch.no_grad()
def encode(f, images, prepare, chunk=CHUNK):
    """f(prepare(images)) in chunks of `chunk` images: uint8 [n, 3, H, W] -> float32 [n, d]."""
    return torch.cat([f(prepare(part)).float() for part in images.split(chunk)])


# ------------------------------------------------------------------------------------------------------------
# Linear probe (Eq. 3)
# ------------------------------------------------------------------------------------------------------------
def linear_probe(features, labels, classes, weight=1e-3, iterations=100):
    """A linear classifier by full-batch LBFGS: minimises cross-entropy + weight * sum(W^2), the bias left free.

    features [n, d], labels int64 [n] in 0..classes-1. Starts from zero; the objective is strictly convex in W, so
    the start only matters to how far at most `iterations` steps get. The line search keeps it from diverging.
    Returns W [classes, d], b [classes].
    """
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


def accuracy(W, b, features, labels):
    """Percent of `labels` that the linear classifier (W, b) predicts: 100 - Err of Eq. 3."""
    return 100 * ((features @ W.T + b).argmax(1) == labels).float().mean().item()


def labelled_subset(n, percent, seed):
    """Indices of the labelled images: floor(n * percent / 100) of n, drawn uniformly (not by class), sorted."""
    count = math.floor(n * percent / 100 + 1e-9) if math.isfinite(percent) else 0
    if not 1 <= count <= n:
        raise InputError(f"{percent:g}% of {n} training images is {count} images: --labels must leave from 1 to {n}")
    return torch.randperm(n, generator=generator(seed, "labels", float(percent)))[:count].sort().values


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
# The sets to pre-train on
# ------------------------------------------------------------------------------------------------------------
def parse_set(name):
    """(base, rate) of a set's name: ("random", "0.3") for random@0.3; InputError if there is no such set."""
    base, _, rate = name.partition("@")
    try:
        if base not in SETS or (rate and rate != "mkdt" and not 0 < float(rate) < math.inf):
            raise ValueError
    except ValueError:
        raise InputError(f"unknown pre-training set {name!r}: choose from {', '.join(SETS)}, with a rate of its own as "
                         "in random@0.3, or the learned one, random@mkdt") from None
    return base, rate


def pretraining_set(name, seed, source):
    """(images, representations, lr) of the set called `name`, or None for `none`.

    name: none; random (as many images as the distilled set has, redrawn per seed); high_loss (as many, those with the
        largest losses); initial (those that distillation began with); mkdt (the distilled set); full. name@0.3 sets the
        rate, name@mkdt takes the learned one; otherwise it is the learned rate for mkdt, --pretrain-lr for real images.
    """
    base, rate = parse_set(name)
    distilled, n = source.distilled, len(source.representations)
    learned = rate == "mkdt" or (base == "mkdt" and not rate)
    lr = distilled["lr"] if learned else float(rate or source.settings["pretrain_lr"])
    if base == "none":
        return None
    if base == "mkdt":
        return distilled["images"], distilled["representations"], lr
    chosen = {"full": lambda: torch.arange(n),
              "random": lambda: torch.randperm(n, generator=generator(seed, "random subset"))[:source.size],
              "high_loss": lambda: highest(source.losses, source.size),
              "initial": lambda: distilled["indices"]}[base]()
    chosen = chosen.to(source.dataset.train_images.device)
    return source.dataset.train_images[chosen], source.representations[chosen], lr


def highest(loss, count):
    """Indices of the `count` largest entries of loss [n], the largest first, ties to the lower index."""
    return loss.cpu().sort(descending=True, stable=True).indices[:count]


# ------------------------------------------------------------------------------------------------------------
# A table
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Source:
    """What encoders are pre-trained on: a run's data, its distilled set, and what its baselines are made from."""
    settings: dict
    dataset: Dataset
    representations: torch.Tensor                  # Z_T [n, d], of the training images
    test_representations: torch.Tensor | None      # of the test images, for Eq. 2; None if they are not known
    losses: torch.Tensor                           # [n], section 4.2
    distilled: dict                                # distilled.pt

    @property
    def size(self):
        """Number of distilled images; random and high-loss subsets have as many."""
        return len(self.distilled["images"])


def read_source(run_dir, data_dir, device):
    """The Source in `run_dir`, a folder with distilled.pt as mkdt.py leaves it."""
    s, distilled = read_json(run_dir / "config.json")["settings"], load(run_dir / "distilled.pt")
    z, test = load(run_dir.parent / "representations.pt"), run_dir.parent / "representations_test.pt"
    if not torch.equal(z[distilled["indices"]], distilled["representations"]):
        raise InputError(f"{run_dir / 'distilled.pt'} was made with other representations than those in "
                         f"{run_dir.parent}: distil again (--force)")
    return Source(s, load_dataset(distilled["dataset"], data_dir, s["image_size"], device, s["train_images"]),
                  z.to(device), load(test).to(device) if test.exists() else None, load(run_dir / "init.pt")["losses"],
                  {k: v.to(device) if torch.is_tensor(v) else v for k, v in distilled.items()})


def read_tasks(names, own, image_size, percents, data_dir, device):
    """{name: data set to probe on}: each whole and at its own size. InputError if one cannot be probed so."""
    tasks = {}
    for name in names:
        tasks[name] = load_dataset(name, data_dir, image_size if name == own else 0, device)
        if not tasks[name].labelled:
            raise InputError(f"{name} has no labels for both splits, so it cannot be probed: give --tasks")
        for percent in percents:
            labelled_subset(len(tasks[name].train_images), percent, 0)      # refuses what cannot be drawn, beforehand
    return tasks


def evaluate(run_dir, sets=DEFAULT_SETS, tasks=(), percents=(1, 5), seeds=(0, 1, 2), data_dir="data", device="cpu",
             save_encoder=None, compile="auto"):
    """Computes the cells of a table that results.json in `run_dir` lacks, and rewrites results.json and results.md.

    run_dir: a folder with distilled.pt, as mkdt.py leaves it. sets, percents, seeds: the rows of the table. tasks: its
    columns, data sets to probe on; the run's own if none. save_encoder: a folder that receives each pre-trained
    encoder as SET_SEED.pt. Several ranks take turns. Returns the list of records.
    """
    run_dir = Path(run_dir).resolve()
    with rank_0_first():
        source = read_source(run_dir, data_dir, device)
        own, s = source.distilled["dataset"], source.settings
        tasks = read_tasks(tasks or [own], own, s["image_size"], percents, data_dir, device)
    records = read_results(run_dir, lambda name: identity(name, source))
    made_from = {name: identity(name, source) for name in sets}

    def missing(name, seed):
        return any(seed not in find(records, name, t, p, made_from[name])["seeds"] for t in tasks for p in percents) or \
            (save_encoder and not encoder_file(save_encoder, name, seed).exists())

    todo = from_rank_0([(name, seed) for seed in dict.fromkeys(seeds) for name in sets if missing(name, seed)])
    log, encoder = Log(None if rank() else run_dir / "log.jsonl"), student(source).to(device)
    encoder = encoder.to(memory_format=torch.channels_last)
    loss, features = speed_up(encoder, source, tasks, percents, [name for name, _ in todo], compile)
    for done in range(0, len(todo), ranks()):
        mine = todo[done + rank():][:1]                                        # this rank's cell of the round, if any
        scores = [score for name, seed in mine
                  for score in cell(encoder, loss, features, source, tasks, percents, name, seed, save_encoder)]
        for score in (score for found in gather_from_ranks(scores) for score in found):
            record = find(records, score["set"], score["task"], score["percent"], made_from[score["set"]])
            if score["seed"] not in record["seeds"]:
                record["seeds"].append(score["seed"])
                record["accuracies"].append(score["accuracy"])
                record["mses"].append(score["mse"])
                record["lr"] = score["lr"]
        if rank() == 0:
            write_results(run_dir, records, source.distilled["percent"])
            if log.due() or done + ranks() >= len(todo):
                log("eval", min(done + ranks(), len(todo)), len(todo), unit="set", set=mine[0][0], seed=mine[0][1],
                    **{f"{score['percent']:g}%": score["accuracy"] for score in scores})
    if rank() == 0:
        write_results(run_dir, records, source.distilled["percent"])
    return records


def student(source):
    """A freshly built ConvNet as the run's experts are."""
    return ConvNet(source.representations.shape[1], source.dataset.image_size, source.settings["width"])


def cell(encoder, loss, features, source, tasks, percents, name, seed, save_encoder=None):
    """Pre-trains on the set `name` with `seed` and probes: a list with a dict for each task and share of labels.

    encoder: lends its memory; it is given fresh weights, the same for every set. loss, features: its, see `speed_up`.
    """
    encoder.load_state_dict(build(lambda: student(source), seed, "evaluation encoder").state_dict())
    s, chosen = source.settings, pretraining_set(name, seed, source)
    if chosen:
        prepare = source.dataset.batch if chosen[0].dtype == torch.uint8 else lambda x: x
        pretrain(encoder, *chosen, s["pretrain_epochs"], seed, s["pretrain_batch"], prepare=prepare, loss=loss)
    encoder.eval()
    if save_encoder:
        save(encoder_file(save_encoder, name, seed), encoder.state_dict())
    scores = []
    for t, task in tasks.items():
        test_features, mse = encode(features, task.test_images, task.batch), None
        if t == source.distilled["dataset"] and source.test_representations is not None:       # Eq. 2, on test images
            mse = F.mse_loss(encode(encoder.head, test_features, lambda x: x), source.test_representations).item()
        for percent in percents:
            scores.append({"set": name, "task": t, "percent": percent, "seed": seed, "mse": mse,
                           "lr": chosen[2] if chosen else None,
                           "accuracy": probe(features, task, test_features, percent, seed)})
    return scores


def probe(features, task, test_features, percent, seed):
    """Test accuracy of a linear probe on the `percent` of the task's training labels that `seed` draws."""
    subset = labelled_subset(len(task.train_images), percent, seed).to(task.train_images.device)
    labels = task.train_labels[subset]
    if (labels == labels[0]).all():
        raise InputError(f"the {len(labels)} labelled images ({percent:g}% of {task.name}, seed {seed}) are all of one "
                         "class: raise --labels")
    classifier = linear_probe(encode(features, task.train_images[subset], task.batch), labels,
                              int(task.train_labels.max()) + 1)
    return accuracy(*classifier, test_features, task.test_labels)


def speed_up(encoder, source, tasks, percents, names, mode):
    """(loss(x, z), features(x)) of `encoder`, compiled for full batches where that pays, to be used for each of the
    sets `names`; says what pre-training on them and encoding the tasks will take."""
    if not names:
        return None, encoder.features
    n, size, epochs = len(source.representations), source.settings["pretrain_batch"], source.settings["pretrain_epochs"]
    images = {"none": 0, "full": n}
    steps = epochs * sum(math.ceil(images.get(parse_set(name)[0], source.size) / size) for name in names)
    encoded = len(names) * sum(len(task.test_images) + len(task.train_images) * sum(percents) / 100
                               for task in tasks.values())

    def full_batches(f, example, calls, backward):
        fast, _, seconds = compile_if_it_pays(f, example, calls / ranks(), mode, backward)
        return lambda *x: (fast if len(x[0]) == len(example[0]) else f)(*x), seconds * calls / ranks()

    batch, chunk = (source.dataset.batch(source.dataset.train_images[:count]) for count in (size, CHUNK))
    encoder.train()
    loss, training = full_batches(lambda x, z: F.mse_loss(encoder(x), z), (batch, source.representations[:len(batch)]),
                                  steps, True)
    encoder.eval()
    features, encoding = full_batches(torch.no_grad()(encoder.features), (chunk,), encoded / CHUNK, False)
    print(f"eval: {len(names)} encoders, about {duration(training)} for {steps} steps of pre-training and "
          f"{duration(encoding)} for encoding; then their probes", flush=True)
    return loss, features


def encoder_file(folder, name, seed):
    """Where --save-encoder keeps the encoder pre-trained on the set `name`."""
    return Path(folder) / f"{name.replace('@', '_at_')}_{seed}.pt"


def identity(name, source):
    """Eight hexadecimal digits of all that a row's accuracies depend on beside task and seed."""
    base, rate = parse_set(name)
    depends = [name, source.settings["width"], source.representations, source.size]
    if base != "none":
        depends += [source.settings[k] for k in ("pretrain_epochs", "pretrain_batch", "pretrain_lr")]
    if base == "mkdt":
        depends += [source.distilled["images"]]
    if base == "mkdt" or rate == "mkdt":
        depends += [source.distilled["lr"]]
    own = {"high_loss": [source.losses], "initial": [source.distilled["indices"]]}
    return fingerprint(*depends, *own.get(base, []))


def find(records, name, task, percent, made_from):
    """The record of one row and column of the table, appended to `records` if it is new."""
    key = {"pretraining": name, "task": task, "labels_percent": percent, "encoder": "convnet", "protocol": "linear"}
    for record in records:
        if all(record[k] == v for k, v in key.items()):
            return record
    records.append({**key, "made_from": made_from, "lr": None, "seeds": [], "accuracies": [], "mses": []})
    return records[-1]


def read_results(run_dir, identify):
    """The records of results.json that still hold: those whose set would be made from the same things now."""
    path = run_dir / "results.json"
    return [r for r in (read_json(path) if path.exists() else []) if r["made_from"] == identify(r["pretraining"])]


def write_results(run_dir, records, percent):
    """results.json, with means and deviations (percent; ddof 0, as the authors compute them), and results.md."""
    for r in (r for r in records if r["seeds"]):
        scores = torch.tensor(r["accuracies"], dtype=torch.float64)
        known = [m for m in r["mses"] if m is not None]
        r.update(distilled_percent=percent, mean=scores.mean().item(), std=scores.std(correction=0).item(),
                 mse=sum(known) / len(known) if known else None)
    done = [r for r in records if r["seeds"]]
    save_json(run_dir / "results.json", done)
    write_file(run_dir / "results.md", lambda file: file.write(table(done, percent).encode()))


def table(records, percent):
    """The records as the paper's Table 1: a row per share of labels and set, a column per task; mean +- std."""
    tasks = list(dict.fromkeys(r["task"] for r in records))
    mse = any(r["mse"] is not None for r in records)
    lines = [f"Pre-training on {percent:g}% of the data: linear probe accuracy in percent, mean +- std over seeds", "",
             "| Labels | Pre-training set | Rate | " + " | ".join(tasks) + (" | MSE to teacher |" if mse else " |"),
             "|---|---|---|" + "---|" * (len(tasks) + mse)]
    for labels in sorted({r["labels_percent"] for r in records}):
        rows = [r for r in records if r["labels_percent"] == labels]
        names = sorted({r["pretraining"] for r in rows}, key=lambda n: ([*PAPER_NAMES, n].index(n), n))
        for name in names:
            cells = {r["task"]: r for r in rows if r["pretraining"] == name}
            one = next(iter(cells.values()))
            shown = [f"{cells[t]['mean']:.2f} +- {cells[t]['std']:.2f} ({len(cells[t]['seeds'])})" if t in cells
                     else "" for t in tasks]
            if mse:
                shown.append(f"{one['mse']:.4f}" if one["mse"] is not None else "")
            rate = f"{one['lr']:.3g}" if one["lr"] else ""
            lines.append(f"| {labels:g}% | {PAPER_NAMES.get(name, name)} | {rate} | " + " | ".join(shown) + " |")
    lines += ["", "MKDT minus each set, paired by seed: mean +- standard error over seeds", "",
              "| Labels | Pre-training set | " + " | ".join(tasks) + " |", "|---|---|" + "---|" * len(tasks)]
    for labels in sorted({r["labels_percent"] for r in records}):
        differences = {t: paired(records, "mkdt", t, labels) for t in tasks}
        for name in dict.fromkeys(n for d in differences.values() for n in d):
            shown = ["{:+.2f} +- {:.2f} ({})".format(*differences[t][name]) if name in differences[t] else ""
                     for t in tasks]
            lines.append(f"| {labels:g}% | {PAPER_NAMES.get(name, name)} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def paired(records, name, task, percent):
    """{other set: (mean, standard error, seeds)} of the accuracy of `name` minus the other's, over the seeds that both
    have (ddof 1; sets with fewer than two in common are left out)."""
    rows = {r["pretraining"]: dict(zip(r["seeds"], r["accuracies"])) for r in records
            if r["task"] == task and r["labels_percent"] == percent}
    own, result = rows.get(name, {}), {}
    for other, scores in rows.items():
        d = torch.tensor([own[s] - scores[s] for s in scores if s in own], dtype=torch.float64)
        if other != name and len(d) > 1:
            result[other] = d.mean().item(), (d.std(correction=1) / len(d) ** 0.5).item(), len(d)
    return result


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------
def main(argv=None):
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--run-dir", required=True, help="folder of a distilled set, e.g. runs/cifar10/2pct_high_loss")
    parser.add_argument("--sets", nargs="+", default=DEFAULT_SETS, metavar="SET",
                        help=f"pre-training sets: {', '.join(SETS)}, or any at another rate: random@0.3, random@mkdt "
                             f"(default: {' '.join(DEFAULT_SETS)})")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="DATASET",
                        help="data sets to probe on (default: the run's own)")
    parser.add_argument("--labels", nargs="+", type=float, default=[1, 5], metavar="PERCENT",
                        help="shares of the task's training labels in percent (default: 1 5)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument("--data-dir", default="data", help="where data sets are looked for and kept (default: data)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    parser.add_argument("--compile", choices=["auto", "on", "off"], default="auto",
                        help="torch.compile pre-training and encoding; auto: where it pays (default: auto)")
    parser.add_argument("--save-encoder", metavar="FOLDER", help="keep each pre-trained encoder there as SET_SEED.pt")
    args = parser.parse_args(argv)
    try:
        device = join_ranks(pick_device(args.device))
        with contextlib.redirect_stdout(None if rank() else sys.stdout):                           # rank 0 alone speaks
            evaluate(args.run_dir, args.sets, args.tasks, args.labels, args.seeds, args.data_dir, device,
                     args.save_encoder, args.compile)
            print((Path(args.run_dir) / "results.md").read_text())
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("eval.py: stopped; the same command goes on with the cells that are missing", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
