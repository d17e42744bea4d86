"""Mode connectivity repair (Zhao et al., ICLR 2020, arXiv 2005.00060): a model between two others.

Two networks of one architecture are joined by a curve in the space of their weights. Its middle is
trained so that every point of the curve reads the defender's clean images well. Nothing asks the
points to obey a trigger, so a point away from the ends can keep the accuracy and lose the backdoor.
Where it fails: after few updates (on digits the middle kept an ASR of BadNets of 3 after 700 of
them, of 74 after 300); near the suspect (three WRN-16-1 kept ASRs of BadNets of 11, 7 and 100 where
up to 5 points may be lost, of 4, 4 and 15 where up to 8); between ends that obey one trigger.

Kind: repairs models, without asking whether they are backdoored. Given: the suspect, a clean share
of its training data and, with --second, another network of the same architecture and data, which
may be backdoored too; without it the other end is the suspect's own fine-tuned copy. Answers: the
repaired model and the curve of accuracies.

Equations: phi(t) = (1-t)^2 w1 + 2t(1-t) theta + t^2 w2 -> bezier; the mean over t ~ U(0,1) of the
cross-entropy of phi(t) plus .5 wd |phi(t)|^2, over theta alone -> connect; the statistics of
BatchNorm, taken anew at each t -> refresh, point (on crops in random order, as in training).

Differs from the paper, or chosen where it is silent: the clean images come from the training data,
and a fifth of them is kept back. Of the inner points that cost at most 5 points (--max-drop) of
balanced accuracy, the repaired model is the one furthest from both ends; where there is none, all
is made again at half the rate. --rule loss takes the inner point with the lowest cross-entropy: on
digits and our WRN-16-1 this was t = .1, where nearly always most of the backdoor is left, for the
suspect has been trained on these images. Weight decay is 5e-4 (code 1e-4). The rate of theta is 4
times that of fine-tuning, for in the middle phi moves half as far, along half of its gradient.
Rates fall by a cosine; images are cropped and mirrored by the data set's recipe. Rate, batch and
rule were chosen on digits with the test figures of three victims in sight. The curve gets 100
epochs of the share (700 updates on digits), at most 1,250 updates or one epoch; public code fills
an epoch up to 10,000 images, 7,900 updates, and comparisons take t = .1. Fine-tuning alone stands
beside every repair.

    python methods/mcr.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results: results/README.md, tables "Fine-tuning, NAD and MCR", "Ten attacks and four repairs".
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_step, fail, make_folder, saved_figure
from common.checkpoint import clear_folder, load_victim
from common.datasets import augment, kept_back, to_float, to_uint8
from common.defence import (
    KEPT_BACK,
    MOST_DROP,
    TRIES,
    check_reading,
    clean_share,
    defence_flags,
    evaluate,
    frozen,
    open_victim,
    report,
    save_repaired,
)
from common.metrics import accuracy, pass_size
from common.models import Whitening, in_float32

SHARE = 0.05, 300  # of the training data, and the least number of images
EPOCHS, STEPS = 100, 1250  # of a training without --epochs: the fewer of them
WEIGHT_DECAY = 5e-4  # of the point phi(t), not of theta


def parse_args():
    p = defence_flags(__doc__, SHARE)
    p.add_argument("--second", help="the other end, as --ckpt (default: a fine-tuned copy)")
    p.add_argument("--epochs", type=int, help="of both (100; at most 1,250 steps or one epoch)")
    p.add_argument("--batch-size", type=int, default=32, help="images per step (code 128)")
    p.add_argument("--lr", type=float, default=0.05, help="first rate, momentum .9 (code .01)")
    p.add_argument("--rule", default="middle", choices=["middle", "loss"], help="see the header")
    p.add_argument("--max-drop", type=float, help="points that a repair may cost (default: 5)")
    p.add_argument("--points", type=int, default=11, help="t = 0, ..., 1 of the curve (code 11)")
    return p.parse_args()


def check_same(first, second):
    """Fail unless two Victims are of one architecture, data and normalisation; say what differs."""
    pairs = {"architecture": (first.arch, second.arch)}
    pairs["data set"] = first.data.name, second.data.name
    for name in ("mean", "std"):
        pairs[name] = [
            victim.model.get_buffer(name).flatten().tolist() for victim in (first, second)
        ]
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            fail(f"the ends differ in their {what}: {ours} (--ckpt), {theirs} (--second)")


def bezier(first, theta, second, t):
    """phi(t) of three sets of weights, dicts of the same names; t in [0,1], a number or tensor."""
    a, b, c = (1 - t) ** 2, 2 * t * (1 - t), t**2
    return {name: a * first[name] + b * theta[name] + c * second[name] for name in theta}


def weights_of(net):
    """The parameters of a network by name, detached."""
    return {name: value.detach() for name, value in net.named_parameters()}


def finetune(net, x, y, *, pad, flip, epochs, lr, batch_size):
    """SGD on clean uint8 images, BatchNorm in training mode; a tuned copy, None if it diverges."""
    net = copy.deepcopy(net).requires_grad_(True).train()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    with tqdm(total=epochs * steps_per_epoch, disable=None, unit="step") as bar:
        for _ in range(epochs):
            total_loss = torch.zeros((), device=x.device)
            order = torch.randperm(len(x), device=x.device)
            for batch in order.split(batch_size)[:steps_per_epoch]:
                loss = F.cross_entropy(net(augment(to_float(x[batch]), pad, flip)), y[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total_loss += loss.detach()
                bar.update()
            if not total_loss.isfinite():
                return None
    return frozen(net, to_float(x[:500]))


def connect(net, first, second, x, y, *, pad, flip, epochs, lr, batch_size):
    """theta of the curve from `first` to `second`, trained on clean uint8 images.

    Weights are dicts by name, `net` a network that takes them (it is left alone). A batch has one
    t, and its BatchNorm the statistics of the batch. Fixed filters stay halfway, for no loss but
    the decay would move them. None if it diverges.
    """
    net = copy.deepcopy(net).train()
    fixed = {f"{n}.weight" for n, part in net.named_modules() if isinstance(part, Whitening)}
    theta = {n: ((first[n] + second[n]) / 2).requires_grad_(n not in fixed) for n in first}
    moved = [value for value in theta.values() if value.requires_grad]
    optimizer = torch.optim.SGD(moved, lr, momentum=0.9)
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    with tqdm(total=epochs * steps_per_epoch, disable=None, unit="step") as bar:
        for _ in range(epochs):
            total_loss = torch.zeros((), device=x.device)
            order = torch.randperm(len(x), device=x.device)
            for batch in order.split(batch_size)[:steps_per_epoch]:
                phi = bezier(first, theta, second, torch.rand((), device=x.device))
                logits = functional_call(net, phi, (augment(to_float(x[batch]), pad, flip),))
                norm = sum(value.square().sum() for name, value in phi.items() if name not in fixed)
                loss = F.cross_entropy(logits, y[batch]) + WEIGHT_DECAY / 2 * norm
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total_loss += loss.detach()
                bar.update()
            if not total_loss.isfinite():
                return None
    return {name: value.detach() for name, value in theta.items()}


@torch.no_grad()
def refresh(net, x, batch_size=None):
    """Take the running statistics of BatchNorm anew from clean uint8 images, in place.

    They are the means over batches (of pass_size, 32 at least), weighted by their size. Dropout
    stays off.
    """
    net.eval()
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
    seen = 0
    for part in x.split(batch_size or max(32, pass_size(x))) if norms else []:
        if seen and len(part) == 1:
            continue  # a single vector has no variance
        seen += len(part)
        for norm in norms:
            norm.momentum = len(part) / seen
        with in_float32(net):
            net(to_float(part))
    return net.eval()


def point(net, phi, x):
    """A copy of `net` with the weights phi and BatchNorm refreshed on x, in eval mode, frozen.

    None if its outputs are not finite.
    """
    net = copy.deepcopy(net)
    net.load_state_dict(net.state_dict() | phi)  # the buffers stay
    return frozen(refresh(net, x), to_float(x[:500]))


@torch.no_grad()
def mean_loss(net, x, y):
    """Mean cross-entropy of uint8 images, in float32."""
    size = pass_size(x)
    with in_float32(net):
        losses = [
            F.cross_entropy(net(to_float(part)), labels, reduction="sum")
            for part, labels in zip(x.split(size), y.split(size))
        ]
    return torch.stack(losses).sum().item() / len(x)


def choose(t, losses, accuracies, least, rule):
    """Index of the inner point of the repaired model, or None where all fall below `least` (%).

    "middle": the point furthest from both ends, of two the one with the lower loss; "loss": the
    lowest loss.
    """
    inner = [i for i in range(1, len(t) - 1) if accuracies[i] >= least]
    if rule == "loss":
        return min(inner, key=lambda i: losses[i], default=None)
    return min(inner, key=lambda i: (round(abs(t[i] - 0.5), 6), losses[i]), default=None)


def draw_curve(path, t, named, chosen):
    """Percentages against t; a line at the chosen point, where there is one."""
    with saved_figure(path, figsize=(5, 3.2)) as (_, axis):
        for name, values in named.items():
            axis.plot(t, values, marker=".", label=name)
        if chosen is not None:
            axis.axvline(chosen, color="grey", linewidth=0.8, label=f"repaired: t = {chosen:g}")
        axis.set(xlabel="t, from the suspect to the other end", ylabel="%", ylim=(-3, 103))
        axis.legend()


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size", "lr", "max_drop")
    check_step(args)
    if not 3 <= args.points <= 1001:
        fail(f"--points {args.points} must lie in 3..1001: the two ends and what lies between them")
    start = time.time()
    victim = open_victim(args)
    model, data, second = victim.model, victim.data, None
    if args.second:
        second = load_victim(
            argparse.Namespace(**vars(args) | {"ckpt": args.second}), data.x_train.device
        )
        check_same(victim, second)
    split = clean_share(args, victim, SHARE)
    if second:
        check_reading(second.model, data.x_train[split], data.y_train[split])
    kept = kept_back(data.y_train[split], KEPT_BACK, args.seed)
    if kept.all():
        fail(f"all {len(split)} clean images are kept back; none is left to train the curve on")
    x_clean, y_clean = data.x_train[split[~kept]], data.y_train[split[~kept]]
    x_kept, y_kept = data.x_train[split[kept]], data.y_train[split[kept]]
    steps_per_epoch = max(1, len(x_clean) // args.batch_size)
    args.epochs = args.epochs or min(EPOCHS, max(1, STEPS // steps_per_epoch))
    folder = make_folder(args.out or victim.folder / f"mcr-s{args.seed}")

    # ===== Connect =====
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size}
    recipe |= {"pad": data.spec.pad, "flip": data.spec.flip}
    t = np.linspace(0, 1, args.points).tolist()
    first, before = weights_of(model), accuracy(model, x_kept, y_kept, balanced=True)
    least = before - (args.max_drop or MOST_DROP) - 1e-9
    for part in range(TRIES):
        lr = args.lr / 2**part
        torch.manual_seed(args.seed)  # the same draws, whatever ran before
        tuned = finetune(model, x_clean, y_clean, lr=lr, **recipe)
        end, nets = second.model if second else tuned, [None]
        if end is not None:
            last = weights_of(end)
            # in the middle phi moves half as far as theta, along half of its own gradient: hence 4
            theta = connect(model, first, last, x_clean, y_clean, lr=4 * lr, **recipe)
            if theta is not None:
                mixed = to_float(x_clean[torch.randperm(len(x_clean), device=x_clean.device)])
                x_seen = to_uint8(augment(mixed, data.spec.pad, data.spec.flip))  # as in training
                nets = [point(model, bezier(first, theta, last, at), x_seen) for at in t]
        if None in nets:
            print(f"rate {lr:g}: the training diverged")
            continue
        losses = [mean_loss(net, x_kept, y_kept) for net in nets]
        accuracies = [accuracy(net, x_kept, y_kept, balanced=True) for net in nets]
        chosen = choose(t, losses, accuracies, least, args.rule)
        print(f"rate {lr:g}, {len(x_kept)} clean images that were kept back:")
        for at, loss, percent in zip(t, losses, accuracies):
            print(f"t = {at:.2f}: loss {loss:.4f}, accuracy {percent:.2f}")
        if chosen is not None:
            break
    if None in nets:
        fail(f"the training diverged at the rate {lr:g}, too; no model is kept")
    models = {"": model} | ({} if tuned is None else {"_clean_only": tuned})
    models |= {"_second": second.model} if second else {}
    if chosen is None:
        print("every inner point cost too much, so none is saved")
    else:
        print(f"the repaired model is the point t = {t[chosen]:g}")
        models["_repaired"] = nets[chosen]
    metrics = {"t": None if chosen is None else t[chosen], "points": t, "kept_back": len(x_kept)}
    metrics |= {"kept_back_loss": losses, "kept_back_accuracy": accuracies, "repair_lr": lr}
    clear_folder(folder)
    save_repaired(folder, models, victim, args, metrics)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models)
    metrics["curve_clean_accuracy"] = [accuracy(net, data.x_test, data.y_test) for net in nets]
    curves = {"clean accuracy": metrics["curve_clean_accuracy"]}
    if victim.x_poisoned is not None:
        x, y = victim.x_poisoned, victim.y_target
        curves["ASR"] = metrics["curve_asr"] = [accuracy(net, x, y) for net in nets]
        metrics["largest_gap"] = max(a - b for a, b in zip(*curves.values()))
    draw_curve(folder / "curve.png", t, curves, metrics["t"])

    # ===== Report =====
    report(folder, "mcr", args, metrics, seconds, kinds=("second", "clean_only", "repaired"))
