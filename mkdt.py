"""MKDT: dataset distillation by matching knowledge-distillation trajectories (Joshi, Ni &
Mirzasoleiman, ICLR 2025).

    python mkdt.py --stage all --dataset shapes      minutes on a laptop: no GPU, no network
    python mkdt.py --stage all --dataset cifar10     the paper's CIFAR-10, 2%: for a GPU

The file follows Algorithm 1 from top to bottom:

    teacher   line 1    train f_T with self-supervision (Eq. 1, 6); encode the data: Z_T
    experts   line 2    train K students to match Z_T (Eq. 5, 7); keep theta*_0 .. theta*_T
    init      line 3    D_syn: the images of highest loss (section 4.2), Z_syn: their rows of Z_T
    distill   4 - 19    move D_syn and alpha_syn so that N steps on them (Eq. 8) end where M
                        epochs on the real data end (Eq. 4)
    eval      section 5 pre-train on D_syn and probe linearly (eval.py)
    figure1   Fig. 1    why trajectories of self-supervision cannot be matched (not in "all")

A file that exists is a stage that is done; give the same command again and it goes on."""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import zlib
from pathlib import Path

import torch
from torchvision.utils import make_grid, save_image

import eval as evaluation
from data import (Diverged, Log, check_representations, follow, load, load_dataset,
                  read_representations, restore, save, save_text, share, write_file)
from eval import (can_compile, examples_of, highest, linear_scores, loss_per_image, project,
                  read_results, read_targets, student, student_name, student_of, targets_of,
                  teacher_of, write_results)
from models import (ENCODERS, OBJECTIVES, RANK, RANKS, SSL, InputError, barrier, batches, build,
                    command_line, compiled, encode, exhaust, flat_parameters, functional,
                    rows_of_all_ranks, start, stream, sum_over_ranks, train)

# ---- Settings: stage, default (CIFAR-10 at 2%), meaning. Each is a flag, kept in config.json ---
SETTINGS = {
    "train_images": ("teacher", 0, "use the first so many training images; 0: all"),
    "image_size": ("teacher", 0, "side in pixels to squash images to; 0: their own (folders: 32)"),
    "representations": ("teacher", "", "file .pt or .npy [n, d] of any other model: no teacher"),
    "ssl": ("teacher", "barlow", f"self-supervised loss: {', '.join(SSL)}"),
    "teacher_width": ("teacher", 64, "channels of the ResNet-18, whose last stage has 8 x more"),
    "teacher_epochs": ("teacher", 1000, "epochs of self-supervised training (simclr: 400)"),
    "teacher_batch": ("teacher", 256, "images a step, two views of each (simclr: 512)"),
    "teacher_lr": ("teacher", 0.01, "peak rate of Adam (simclr: 0.001, constant)"),
    "teacher_decay": ("teacher", 1e-6, "weight decay of Adam"),
    "lambd": ("teacher", 1 / 128, "weight of Eq. 1's off-diagonal terms"),
    "temperature": ("teacher", 0.5, "temperature of SimCLR's loss"),
    "crop_scale": ("teacher", 0.08, "smallest share of an image's area that a random crop keeps"),
    "gray": ("teacher", 0.2, "probability that a view is made grey"),
    "max_pool": ("teacher", 0, "1: the teacher's stem ends in max-pooling (TinyImageNet)"),
    "standardize": ("teacher", 0, "1: the teacher ends in batch norm: all of Z_T counts alike"),
    "bf16": ("teacher", "auto", "the teacher in bfloat16: on, off, or auto: on a GPU"),
    "objective": ("experts", "mse", f"what students minimise: {', '.join(OBJECTIVES)}"),
    "student": ("experts", "convnet", "the student, a name in models.ENCODERS"),
    "width": ("experts", 128, "channels of the student"),
    "expert_epochs": ("experts", 7, "epochs of expert training: none after T+ + M is ever read"),
    "expert_lr": ("experts", 0.1, "rate of SGD"),
    "expert_momentum": ("experts", 0.9, "momentum of SGD"),
    "expert_decay": ("experts", 1e-4, "weight decay of SGD"),
    "expert_batch": ("experts", 256, "images a step"),
    "same_start": ("experts", 0, "1: all experts begin at one network (Figure 1)"),
    "experts": ("init", 100, "K, the number of expert trajectories"),
    "init": ("init", "high_loss", "the initial images, a name in STARTS"),
    "percent": ("init", 2.0, "size of the distilled set in percent of the training images"),
    "syn_steps": ("distill", 40, "N, steps on the distilled set in an iteration"),
    "match_epochs": ("distill", 2, "M, epochs on the real data from start to target"),
    "max_start_epoch": ("distill", 5, "T+, the last epoch to start from (inclusive)"),
    "pixel_lr": ("distill", 1000.0, "rate of SGD on the distilled images"),
    "syn_lr": ("distill", 0.1, "alpha_0, the initial learned rate"),
    "syn_lr_lr": ("distill", 1e-4, "rate of SGD on the learned rate"),
    "syn_momentum": ("distill", 0.5, "momentum of both"),
    "syn_batch": ("distill", 256, "distilled images a step"),
    "clip": ("distill", 0.1, "bound on an iteration's step of images, and of the rate; 0: none"),
    "iterations": ("", 5000, "S, the number of distillation iterations; may be raised later"),
    "pretrain_epochs": ("distill", 20, "epochs of pre-training on the distilled set (Eq. 9)"),
    "pretrain_batch": ("distill", 256, "images a pre-training step"),
    "pretrain_lr": ("distill", 0.1, "rate of pre-training on real images"),
}

# What differs by data set: peers' recipes for the teacher; by percent: Tables 8 and 9.
DATASETS = {
    "cifar10": {}, "cifar100": {},
    "tinyimagenet": dict(lambd=1 / 1024, crop_scale=0.2, gray=0.1, max_pool=1, expert_epochs=4),
    "shapes": dict(teacher_width=16, teacher_epochs=12, teacher_batch=64, teacher_lr=6e-3,
                   crop_scale=0.6, gray=1.0, max_pool=1, standardize=1, width=16, experts=24,
                   expert_epochs=3, expert_lr=0.05, expert_batch=64, percent=1.0, init="random",
                   syn_batch=40, syn_lr=0.25, syn_lr_lr=1e-5, iterations=90, pretrain_epochs=160),
}
ROW = "syn_steps", "match_epochs", "max_start_epoch", "pixel_lr"
ROWS = {                                   # N, M, T+, pixel_lr
    ("cifar10", 2): (40, 2, 5, 1e3),
    ("cifar10", 5): (40, 2, 5, 1e4),
    ("cifar100", 2): (40, 2, 2, 1e3),
    ("cifar100", 5): (40, 2, 5, 1e4),
    ("tinyimagenet", 2): (10, 2, 2, 1e5),
    ("tinyimagenet", 5): (10, 2, 2, 1e5),
    ("shapes", 1): (30, 1, 2, 3e3),
}
VARIED = "percent", "ssl", "objective", "init"             # in the paper's tables
FREE = "clip", "expert_epochs", "iterations"               # beside its values all the same
# A.2 names no rate for the inner steps of MTT; its public code begins at that of MTT's experts.
MTT = dict(syn_lr=0.01, syn_lr_lr=1e-5, init="random")
BY_LOSS = {
    ("ssl", "simclr"): dict(teacher_epochs=400, teacher_batch=512, teacher_lr=1e-3),
    ("objective", "ssl"): dict(expert_batch=1024, expert_lr=1e-3, expert_decay=1e-6, **MTT),
    ("objective", "ce"): dict(expert_batch=256, expert_lr=0.01, expert_momentum=0.0,
                              expert_decay=0.0, **MTT),
}

# ---- 1. Teacher (Algorithm 1, line 1; Eq. 1 and 6) -------------------------------------------
def train_teacher(network, optimizer, data, s, first=0):
    """Trains `network`, an encoder and its projection head, by self-supervision (Eq. 6). Ranks
    share each batch; the loss, in float32, is of the rows of all. Yields as `train`."""
    n, size, (loss_of, _, schedule) = len(data.train_images), batch_of(data, s), SSL[s.ssl]
    bf16 = s.bf16 == "on" or s.bf16 == "auto" and s.device.type == "cuda"

    def f(x):
        with torch.autocast(s.device.type, torch.bfloat16, enabled=bf16):
            return network(x)

    def loss(batch, step):
        images, draw = data.train_images[batch[RANK::RANKS]], step * RANKS + RANK
        z1, z2 = project(f, images, data, s, (s.seed, "teacher views", draw))
        return loss_of(rows_of_all_ranks(z1), rows_of_all_ranks(z2), s)

    order = batches(n, size, s.teacher_epochs, s.seed, "teacher order", s.device, drop_last=True)
    steps = s.teacher_epochs * (n // size)
    return train(loss, optimizer, itertools.islice(order, first, None),
                 lambda step: schedule(step, steps, n // size, s.teacher_lr))

def batch_of(data, s):
    """Images a step of the teacher's: at most all, in equal shares for the ranks."""
    return min(s.teacher_batch, len(data.train_images)) // RANKS * RANKS

def teacher_stage(run):
    """teacher.pt, representations.pt: Z_T [n, d], representations_test.pt."""
    s, data, folder = run.s, run.data, run.run_dir
    path = folder / "representations.pt"
    if path.exists() or OBJECTIVES[s.objective][1] != "representations":
        return
    if s.representations:
        z = read_representations(s.representations)
        check_representations(z, len(data.train_images), s.representations)
        return save(path, z)
    f_T = build(lambda: teacher_of(s, data.image_size), s.seed, "teacher")
    head = build(lambda: SSL[s.ssl][1](f_T.feature_dim), s.seed, "projector")
    model = torch.nn.Sequential(f_T, head).to(s.device).to(memory_format=torch.channels_last)
    if RANKS > 1 and s.device.type == "cuda":                      # torch has it for GPUs only
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.Adam(model.parameters(), s.teacher_lr, weight_decay=s.teacher_decay)
    optimizer.register_step_pre_hook(
        lambda *_: sum_over_ranks([p.grad for p in model.parameters()]))
    network = compiled(model, s.compile and s.device.type == "cuda" and RANKS == 1)
    checkpoint, state = folder / "teacher_checkpoint.pt", dict(model=model, optimizer=optimizer)
    loop = train_teacher(network, optimizer, data, s, restore(checkpoint, **state))
    steps = s.teacher_epochs * (len(data.train_images) // batch_of(data, s))
    for step, _ in follow("teacher", loop, steps, run.log, checkpoint, **state):
        if data.labelled and step % max(1, steps // 3) == 0 and RANK == 0:
            model.eval()
            with contextlib.suppress(ValueError):                  # too few labels
                probe, = linear_scores(model[0], data, [5], s.seed)
                run.log("teacher", step, steps, probe=probe)
            model.train()
    model.eval()
    z, z_test = (encode(model[0], images, data.normalize).cpu()
                 for images in (data.train_images, data.test_images))
    check_representations(z, len(z), "the teacher (lower --teacher-lr, in another --run-dir)")
    if RANK == 0:
        save(folder / "teacher.pt", model[0].state_dict())
        save(folder / "representations_test.pt", z_test)
        save(path, z)                                              # last: the stage is done
        checkpoint.unlink(missing_ok=True)

# ---- 2. Experts (Algorithm 1, line 2; Eq. 5 and 7) -------------------------------------------
def train_expert(model, loss, order, examples, s, seed):
    """An expert (Eq. 7): `model` by SGD on loss(x, y), the mean of Eq. 5's, on the examples of
    s.expert_epochs epochs of `order`, at a constant rate. MTT-SSL's experts take Adam (A.2).
    Returns theta*_0 .. theta*_T, [T + 1, P] on the CPU, and each epoch's mean loss."""
    if s.objective == "ssl":
        optimizer = torch.optim.Adam(model.parameters(), s.expert_lr, weight_decay=s.expert_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), s.expert_lr, s.expert_momentum,
                                    weight_decay=s.expert_decay)
    order, thetas, losses = list(order), [flat_parameters(model).cpu()], []
    loop = train(lambda batch, step: loss(*examples(batch, (seed, "expert views", step))),
                 optimizer, order)
    for step, values in loop:
        losses.append(values["loss"])
        if step * s.expert_epochs % len(order) == 0:
            thetas.append(flat_parameters(model).cpu())             # a copy, not live weights
    return torch.stack(thetas), torch.stack(losses).view(s.expert_epochs, -1).mean(dim=1)

def experts_stage(run):
    """experts/expert_000.pt ...: flat float32 [T + 1, P], those that are missing."""
    s, data, n = run.s, run.data, len(run.data.train_images)
    rows, d = read_targets(s, data, run.run_dir)
    examples = examples_of(s, data, data.train_images, rows)
    model, loss = student(student_name(s), d, data.image_size, s)
    functional(model)                       # refuses batch norm before anything is trained
    make = student_of(s, d, data.image_size)
    missing = [i for i in range(s.experts) if not expert_file(run, i).exists()][RANK::RANKS]

    def loop():
        for done, i in enumerate(missing):
            begin = build(make, s.seed, "expert", 0 if s.same_start else i)
            model.load_state_dict(begin.state_dict())
            seed = stream(s.seed, "expert", i).initial_seed()
            order = batches(n, s.expert_batch, s.expert_epochs, seed, "expert order", s.device)
            thetas, losses = train_expert(model, loss, order, examples, s, seed)
            if not thetas[-1].isfinite().all():
                raise InputError(f"experts: expert {i} diverged: lower --expert-lr {s.expert_lr}")
            save(expert_file(run, i), thetas)
            yield done + 1, {f"epoch {e + 1}": loss for e, loss in enumerate(losses)}
    exhaust(follow("experts", loop(), len(missing), run.log))

def expert_file(run, i):
    """Where expert i is kept."""
    return run.run_dir / "experts" / f"expert_{i:03d}.pt"

# ---- 3. Initial distilled set (Algorithm 1, line 3; section 4.2) -----------------------------
def high_loss(data, rows, losses, count, rng):
    """The images of the highest loss (section 4.2), the largest first."""
    return subset(data, rows, highest(losses, count))

def random_images(data, rows, losses, count, rng):
    """Images drawn uniformly: "MKDT (Rnd Sub)" in Table 2."""
    return subset(data, rows, torch.randperm(len(data.train_images), generator=rng)[:count])

def subset(data, rows, chosen):
    """(normalised images [n, 3, H, W], their rows of Z_T or labels) of the indices `chosen`."""
    return data.normalize(data.train_images[chosen]), None if rows is None else rows[chosen]

# Name of --init: (data, Z_T, section 4.2's loss of each image, count, rng) -> images, targets.
STARTS = {"high_loss": high_loss, "random": random_images}

def init_stage(run):
    """SET/init.pt: D_syn and Z_syn as distillation begins, and the loss of every image."""
    s, data, path = run.s, run.data, run.set_dir / "init.pt"
    if path.exists() or RANK:
        return
    rows, d = read_targets(s, data, run.run_dir)
    losses = None
    if OBJECTIVES[s.objective][1] == "representations":
        f = functional(student_of(s, d, data.image_size)().to(s.device))
        thetas = (load(expert_file(run, i), mmap=True)[1].to(s.device) for i in range(s.experts))
        losses = loss_per_image(f, thetas, data, rows, OBJECTIVES[s.objective][0])
    images, targets = STARTS[s.init](data, rows, losses, run.size, stream(s.seed, "init"))
    save(path, present(images=images, targets=targets, losses=losses))

def present(**tensors):
    """Those that are not None, on the CPU."""
    return {k: v.cpu().contiguous() for k, v in tensors.items() if v is not None}

# ---- 4. Distillation (Algorithm 1, lines 4 - 19; Eq. 4 and 8) --------------------------------
def new_syn(images, s):
    """Lines 3, 4: D_syn and alpha_syn as `distill` begins, and the SGD of line 18."""
    images, lr = images.clone(), images.new_tensor(s.syn_lr)
    rates = {"params": [images], "lr": s.pixel_lr}, {"params": [lr], "lr": s.syn_lr_lr}
    optimizer = torch.optim.SGD(rates, momentum=s.syn_momentum)
    return argparse.Namespace(images=images, lr=lr, optimizer=optimizer)

def distill(gradient, adjoint, experts, syn, targets, s, first=0):
    """Algorithm 1, lines 5 - 19: moves the images and the rate of `syn`, in place.
    gradient, adjoint: `inner_steps` of the students' loss. experts: K trajectories [T + 1, P].
    syn: of `new_syn`. targets(batch, draw): Z_syn, which stays fixed (`draw` names the views of
    MTT-SSL). `bound` is ours. Several ranks draw one trajectory each. Yields (iterations done,
    {Eq. 4's loss, alpha_syn, how many images were bounded})."""
    images, lr = syn.images, syn.lr                              # [n, 3, H, W], []
    for step in range(first, s.iterations):                                             # line 5
        draw = s.seed, "distill", step * RANKS + RANK
        rng = stream(*draw)
        expert = experts[torch.randint(len(experts), (), generator=rng)]                # 6
        t = torch.randint(s.max_start_epoch + 1, (), generator=rng)                     # 7
        theta, target = (expert[i].to(lr.device) for i in (t, t + s.match_epochs))      # 8, 9, 17
        drawn = draw_batches(len(images), s.syn_steps, s.syn_batch, rng, lr.device)     # 10 - 12
        steps = [(b, targets(b, (*draw, n))) for n, b in enumerate(drawn)]
        loss, grad_images, grad_lr = matching_gradient(                                 # 13 - 17
            gradient, adjoint, theta, target, images, lr, steps)
        sum_over_ranks([loss, grad_images, grad_lr])
        images.grad, lr.grad, bounded = bound(grad_images / RANKS, grad_lr / RANKS, lr, s)
        syn.optimizer.step()                                                            # 18
        yield step + 1, {"loss": loss / RANKS, "lr": lr.clone(), "bounded": bounded}

def matching_gradient(gradient, adjoint, theta, target, images, lr, steps):
    """L_DD of Eq. 4 and its exact gradient with respect to the images and the learned rate.

    theta, target: theta*_t and theta*_{t+M}, [P]; images [n, ...]; lr: alpha_syn; steps: the N
    pairs (b_n, y_n) of image indices and their rows of Z_syn.

    Forward, Eq. 8:   theta_{n+1} = theta_n - lr g_n,  g_n = g(theta_n, x_{b_n}, y_n)
    Backward, v_n = dL_DD / dtheta_n, H_n = dg_n / dtheta_n (adjoint: H v, d(g . v)/dx, g . v):
        v_N = 2 (theta_N - target) / ||theta_0 - target||^2                         (Eq. 4)
        v_n = (I - lr H_n)^T v_{n+1} = v_{n+1} - lr H_n v_{n+1}           (H_n is symmetric)
        dL_DD / dx_{b_n} += -lr d(g_n . v_{n+1}) / dx      dL_DD / dlr += -g_n . v_{n+1}
    Each step is recomputed on the way back, so memory is one step's graph and N vectors [P].

    Returns (loss, gradient of the images, gradient of the rate)."""
    theta, target, images = theta.detach(), target.detach(), images.detach()
    lr = torch.as_tensor(lr, dtype=theta.dtype, device=theta.device).detach()
    thetas = [theta]
    for batch, y in steps:
        thetas.append(thetas[-1] - lr * gradient(thetas[-1], images[batch], y))

    scale = (theta - target).square().sum()
    v = 2 * (thetas[-1] - target) / scale
    grad_images, grad_lr = torch.zeros_like(images), torch.zeros_like(lr)
    for theta_n, (batch, y) in zip(reversed(thetas[:-1]), reversed(steps)):
        hv, gx, gv = adjoint(theta_n, images[batch], y, v)
        grad_images.index_add_(0, batch.to(images.device), gx * -lr)
        grad_lr -= gv
        v = v - lr * hv
    return (thetas[-1] - target).square().sum() / scale, grad_images, grad_lr

def student_loss(f, objective):
    """(theta, x, y) -> the mean loss of f(theta, .) on a batch: L_MSE of Eq. 8."""
    return lambda theta, x, y: objective(functools.partial(f, theta), x, y).mean()

def inner_steps(loss):
    """The two functions that `matching_gradient` takes, of a loss (theta, x, y):
    gradient(theta, x, y) = g = dL/dtheta, of which a step of Eq. 8 subtracts alpha_syn g;
    adjoint(theta, x, y, v) -> (H v, d(g . v)/dx, g . v), with H = dg/dtheta: differentiating the
    scalar g . v, itself a gradient, gives all three; H is never formed."""
    gradient = torch.func.grad(loss)

    def adjoint(theta, x, y, v):
        def g_dot_v(theta, x):
            return gradient(theta, x, y) @ v
        (hv, gx), gv = torch.func.grad_and_value(g_dot_v, argnums=(0, 1))(theta, x)
        return hv, gx, gv
    return gradient, adjoint

def draw_batches(n, steps, batch_size, rng, device="cpu"):
    """`steps` mini-batches of 0..n-1: permutations, cut into pieces of `batch_size`."""
    drawn = []
    while len(drawn) < steps:
        drawn += torch.randperm(n, generator=rng).to(device).split(batch_size)
    return drawn[:steps]

def bound(grad_images, grad_lr, lr, s):
    """--clip: the gradients [n, 3, H, W] and [], so scaled that, before momentum, they move
    no image by more than s.clip (root mean square, in standard deviations) and the rate by no more
    than that share of itself; and how many images that touched. One start at t = 0 can have
    gradients hundreds of times the usual, which would ruin the images at once."""
    clip = s.clip or math.inf
    rms = s.pixel_lr * grad_images.square().mean((1, 2, 3), keepdim=True).sqrt()   # [n, 1, 1, 1]
    scale = (clip / rms).clamp(max=1)
    most = clip * lr.abs() / s.syn_lr_lr
    return grad_images * scale, grad_lr.clamp(-most, most), (scale < 1).sum()

def distill_stage(run):
    """SET/distilled.pt, its snapshots every 1,000 iterations, and pictures."""
    s, data, folder, path = run.s, run.data, run.set_dir, run.set_dir / "distilled.pt"
    if path.exists() and load(path)["iterations"] >= s.iterations:
        return
    init = {k: v.to(s.device) for k, v in load(folder / "init.pt").items()}
    _, d = read_targets(s, data, run.run_dir)
    experts = [load(expert_file(run, i), mmap=True) for i in range(s.experts)]
    f = functional(student_of(s, d, data.image_size)().to(s.device))
    loss = student_loss(f, OBJECTIVES[s.objective][0])
    gradient, adjoint = (compiled(step, can_compile(s), 2) for step in inner_steps(loss))
    syn, targets = new_syn(init["images"], s), init.get("targets")
    checkpoint = folder / "distill_checkpoint.pt"
    loop = distill(gradient, adjoint, experts, syn, targets_of(s, data, targets), s,
                   restore(checkpoint, **vars(syn)))

    def keep(path, iterations):
        tensors = present(images=syn.images, targets=targets, mean=data.mean.flatten(),
                          std=data.std.flatten())
        save(path, tensors | {"lr": syn.lr.item(), "iterations": iterations})

    for step, values in follow("distill", loop, s.iterations, run.log, checkpoint, **vars(syn)):
        values["moved"] = (syn.images - init["images"]).abs().mean()    # a pixel, in deviations
        if step % 1000 == 0 and values["lr"] > 0 and RANK == 0:                # NaN is not
            keep(folder / f"distilled_{step:05d}.pt", step)
    if RANK == 0:
        draw_results(run, init["images"], syn.images)
        lines = {k: v for k, v in read_results(folder).items() if "mkdt" not in k[0]}
        for stale in folder.glob("results*"):                    # of fewer iterations
            stale.unlink()
        write_results(folder / "results.csv", lines)
        keep(path, s.iterations)                                 # last: the stage is done

# ---- 5. Evaluation (section 5; eval.py) ------------------------------------------------------
def eval_stage(run):
    """SET/results.csv, results.md: the distilled set and its baselines but for the full data."""
    if not run.data.labelled:
        return print(f"eval: {run.data.name} has no labels in both splits; to probe on another:\n"
                     f"      python eval.py --run-dir {run.set_dir} --tasks cifar10")
    args = evaluation.parse(["--run-dir", str(run.set_dir), "--paired", "mkdt"])
    args.data_dir, args.device, args.compile = run.s.data_dir, run.s.device, run.s.compile
    print(f"\n{evaluation.evaluate(args)}\nresults: {run.set_dir / 'results.md'}\n"
          f"picture: {run.set_dir / 'distilled.png'}")

STAGES = {"teacher": teacher_stage, "experts": experts_stage, "init": init_stage,
          "distill": distill_stage, "eval": eval_stage}

# ---- Pictures --------------------------------------------------------------------------------
def draw_results(run, before, after):
    """distilled.png: ten images as they began, above the same distilled; curves.png."""
    tiles = run.data.denormalize(torch.cat([before[:10], after[:10]])).clamp(0, 1)
    zoomed = torch.nn.functional.interpolate(tiles, scale_factor=3)
    grid = make_grid(zoomed, nrow=len(before[:10]), pad_value=1)
    write_file(run.set_dir / "distilled.png", lambda file: save_image(grid, file, format="png"))
    draw_plot(run.set_dir / "curves.png", "iteration",
              {name: {name: logged(run, name)} for name in ("loss", "lr", "moved")})

def logged(run, name):
    """[(iteration, value), ...] of a quantity in the log of distillation."""
    points = {}
    for line in run.log.path.read_text().splitlines():
        with contextlib.suppress(ValueError):                      # one that a kill cut off
            line = json.loads(line)
            if line["stage"] == "distill":
                points[line["step"]] = line[name]
    return sorted(points.items())

def draw_plot(path, xlabel, panels, log=()):
    """A plot of {panel: {line: [(x, y), ...]}}; nothing where matplotlib is not installed."""
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure                            # pip install matplotlib
        figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
        for axes, (panel, lines) in zip(figure.subplots(1, len(panels)), panels.items()):
            for name, points in lines.items():
                axes.plot(*zip(*points), label=name)
            axes.set(title=panel, xlabel=xlabel, yscale="log" if panel in log else "linear")
            axes.legend(fontsize="small")
        write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))

# ---- Figure 1: trajectories of other losses (section 4.1, appendix A.2) ----------------------
# A.2's settings; it says nothing of MKDT, which has its data set's row. Five experts begin at one
# network and differ in the order of their batches; the first is distilled, from epoch 0.
FIGURE1 = {
    "mtt": dict(objective="ce", syn_steps=20, match_epochs=4),
    "mtt_ssl": dict(objective="ssl", syn_steps=10, match_epochs=2),
    "mtt_ssl_4096": dict(objective="ssl", syn_steps=10, match_epochs=2, expert_batch=4096),
    "mkdt": dict(objective="mse", clip=0.1),
}
COMMON = dict(percent=1.0, init="random", expert_epochs=7, max_start_epoch=0, pixel_lr=1000.0,
              iterations=100, clip=0.0, same_start=1)

def figure1_stage(args, run):
    """Figure 1 of the paper for the data and the teacher of `run`: figure1/figure1.csv, and .png
    where there is matplotlib. Each of its systems is a run of its own beside them."""
    root, panels = run.run_dir / "figure1", {"variance": {}, "loss": {}, "moved": {}}
    for name, system in FIGURE1.items():
        wanted = {**COMMON, **system, "representations": str(run.run_dir / "representations.pt")}
        for stage, experts in dict(teacher=5, experts=5, init=1, distill=1).items():
            own = open_run(args, {**wanted, **args.given, "experts": experts},
                           run_dir=root / name, name="one", log_seconds=0)
            try:
                execute(own, stage)
            except Diverged as error:                              # a result as well
                print(f"figure1: {name}: {error}")
        thetas = torch.stack([load(expert_file(own, i)) for i in range(5)])       # [5, T + 1, P]
        variance = (thetas - thetas.mean(dim=0)).square().mean(dim=(0, 2))        # Fig. 1a
        panels["variance"][name] = [*enumerate(variance.tolist())][1:]
        for panel in ("loss", "moved"):
            panels[panel][name] = logged(own, panel)
    lines = [f"{panel},{name},{x},{y}" for panel, of in panels.items()
             for name, points in of.items() for x, y in points]
    save_text(root / "figure1.csv", "\n".join(["panel,system,x,y", *lines, ""]))
    draw_plot(root / "figure1.png", "epoch, iteration", panels, log=("variance", "moved"))
    print(f"figure1: {root}/figure1.csv")

# ---- Command line ----------------------------------------------------------------------------
def resolve(dataset, given):
    """All settings for `dataset` as a namespace: the paper's, changed by the rows of the data set
    and percentage (the nearest, where there is none) and of the losses, changed by `given`."""
    known = dataset if dataset in DATASETS else \
        "tinyimagenet" if given.get("image_size", 0) >= 64 else "cifar10"
    percent = given.get("percent", DATASETS[known].get("percent", SETTINGS["percent"][1]))
    row = min((p for name, p in ROWS if name == known), key=lambda p: abs(p - percent))
    layers = ({name: default for name, (_, default, _) in SETTINGS.items()},      # the later wins
              BY_LOSS.get(("ssl", given.get("ssl")), {}), DATASETS[known],
              dict(zip(ROW, ROWS[known, row])),
              BY_LOSS.get(("objective", given.get("objective")), {}), given)
    s = argparse.Namespace(**{name: v for layer in layers for name, v in layer.items()})
    for name, (_, default, _) in SETTINGS.items():
        value = getattr(s, name)
        least = 1 if isinstance(default, int) and default and name != "max_start_epoch" else 0
        if not isinstance(value, str) and not least <= value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value} must be finite, and at least "
                             f"{least}")
    for name, choices in (("ssl", SSL), ("objective", OBJECTIVES), ("init", STARTS),
                          ("bf16", ("on", "off", "auto"))):
        if getattr(s, name) not in choices:
            raise InputError(f"--{name} {getattr(s, name)}: choose from {', '.join(choices)}")
    if s.max_start_epoch + s.match_epochs > s.expert_epochs:
        raise InputError(f"T+ + M = {s.max_start_epoch + s.match_epochs} lies beyond the experts' "
                         f"last epoch: raise --expert-epochs {s.expert_epochs}")
    return s

def open_run(args, given, **changed):
    """A run: settings, data, log and folders. run_dir has what all distilled sets of a data set
    share, the teacher and the experts; set_dir below it, called --name, one distilled set."""
    settings = resolve(args.dataset, given)
    papers = resolve(args.dataset, {k: v for k, v in given.items() if k in VARIED})
    s = argparse.Namespace(**{**vars(args), **vars(settings), **changed})
    s.changed = [k for k in SETTINGS if k not in FREE and getattr(s, k) != getattr(papers, k)]
    data = load_dataset(s.dataset, s.data_dir, s.image_size, s.device, s.train_images)
    size = share(len(data.train_images), s.percent, "--percent")
    run_dir = Path(s.run_dir or f"runs/{data.name}")
    set_dir = run_dir / (s.name or f"{s.percent:g}pct_{s.init}")
    log = Log(set_dir / "log.jsonl", s.log_seconds, s.checkpoint_minutes)
    return argparse.Namespace(s=s, data=data, run_dir=run_dir, set_dir=set_dir, log=log, size=size)

def claim(run, stage):
    """Keeps in config.json what `stage` is made with, and whether all of it is the paper's. Raises
    InputError if it, or a stage before it, was made with something else; says if by other code."""
    images = run.data.train_images.cpu().numpy().tobytes()
    made = {"dataset": run.s.dataset, "images": zlib.crc32(images), "seed": run.s.seed,
            "ranks": RANKS}
    sources = [Path(__file__).with_name(name).read_bytes()
               for name in ("models.py", "data.py", "eval.py", "mkdt.py")]
    code, changed = hashlib.sha256(b"".join(sources)).hexdigest()[:8], []
    for earlier in [*STAGES][:[*STAGES].index(stage) + 1]:
        own = [k for k, (of, *_) in SETTINGS.items() if of == earlier]
        made.update({k: getattr(run.s, k) for k in own})
        changed += {*own} & {*run.s.changed}
        path = (run.run_dir if earlier in ("teacher", "experts") else run.set_dir) / "config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        then = config.get(earlier, {**made, "code": code, "paper": not changed})
        differ = [f"{k} {then.get(k)} -> {v}" for k, v in made.items() if then.get(k) != v]
        if differ:
            raise InputError(f"{path.parent} holds the stage {earlier} of other settings "
                             f"({', '.join(differ)}): give another --name (a distilled set on the "
                             "same experts) or --run-dir, or delete it")
        if then["code"] != code:
            print(f"{earlier}: {path.parent} was made by other code than it is now", flush=True)
        if earlier == stage and stage not in config and RANK == 0:
            save_text(path, json.dumps({**config, stage: then}, indent=2) + "\n")

def execute(run, stage):
    """Runs one stage, if it is not done."""
    claim(run, stage)
    own = {k: v for k, v in vars(run.s).items() if SETTINGS.get(k, [""])[0] == stage}
    print(f"{stage}: " + "  ".join(f"{k} {v}" for k, v in own.items()), flush=True)
    STAGES[stage](run)
    barrier()

def parse(argv):
    """The arguments; in `given` those that are settings."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=[*STAGES, "all", "figure1"], default="all", help="(default: all)")
    add("--dataset", default="cifar10", help=f"{', '.join(DATASETS)}, a task of eval.py, a folder "
        "with train/ and test/ inside, or an .npz (default: cifar10)")
    evaluation.add_common(add)
    add("--run-dir", help="where results go (default: runs/DATASET)")
    add("--name", help="folder of the distilled set in it (default: 2pct_high_loss, ...)")
    add("--seed", type=int, default=0, help="fixes every random draw (default: 0)")
    add("--checkpoint-minutes", type=float, default=5.0, help="between checkpoints (default: 5)")
    add("--log-seconds", type=float, default=10.0, help="between progress lines (default: 10)")
    groups = {of: parser.add_argument_group(f"settings of {of or 'length'}")
              for of, *_ in SETTINGS.values()}
    for name, (of, default, text) in SETTINGS.items():
        groups[of].add_argument(f"--{name.replace('_', '-')}", type=type(default),
                                metavar=type(default).__name__.upper(),
                                default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    args = parser.parse_args(argv)
    args.given = {k: v for k, v in vars(args).items() if k in SETTINGS}
    return args

def main(argv=None):
    """The command line; see the top of this file."""
    args = parse(argv)
    with command_line("mkdt.py"):
        args.device = start(args.device)
        run = open_run(args, args.given)
        for stage in {"all": STAGES, "figure1": ["teacher"]}.get(args.stage, [args.stage]):
            execute(run, stage)
        if args.stage == "figure1":
            figure1_stage(args, run)

if __name__ == "__main__":
    main()
