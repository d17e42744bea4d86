"""ABL: anti-backdoor learning (Li et al., NeurIPS 2021, arXiv 2110.11571).

A backdoor is learnt faster than the task. Stage 1 trains on the poisoned set but holds the loss at
gamma, which only the easiest images can undercut; the share p with the lowest losses is isolated.
Stage 2 trains on the rest and drives the loss of the isolated images up, so that the network
forgets what they have in common: the trigger.

Kind: repairs models, by training a new one on the attacker's data. Given: the poisoned training
set, no clean image, not the poison rate. Answers: the isolated images and the repaired model.
Known to fail: Blend at high rates, dynamic triggers; a wrong isolation costs a clean class.

Steps of the paper: local gradient ascent (LGA) sign(l - gamma) l, or flooding |l - gamma| + gamma
-> held_loss; the p lowest losses, eval mode, no augmentation -> sample_losses, isolate; the rest
D_c -> fit; global gradient ascent min E_Dc[l] - E_Db[l] -> unlearn.

Differs from the paper: its joint objective comes after training on D_c, as in the authors' code
(which ascends on D_b alone): from stage 1 on, the poison left in D_c wins. Even so D_b, the easiest
poison, may stem from few classes, and the descent keeps the trigger alive in the others; so it
leaves out a label that over 90 % of D_b carries. D_b's loss is 0 in float32 by then, and so is its
gradient: the ascent is on the log-odds m of the given label, l = log(1 + e^-m), and has no gradient
beyond l = log K, a blind guess: max(0, m + log(K - 1)); momentum carries it further (MNIST: 3 to
15). It runs in eval mode; stage 1 does not crop. Stages 1 and 2 take the recipe's epochs together,
1 : 4 as in the paper; rates are one-cycle; gradients are cut to norm 1 in stage 1 and the ascent.
The ascent was designed on digits and on one MNIST victim with their test figures in sight.

    python methods/abl.py --ckpt runs/mnist-mnist_cnn-badnets-s0

The paper, CIFAR-10: BadNets' ASR 100 -> 3.04, Blend's 100 -> 16.23. Results: README.md.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, make_folder, saved_figure
from common.checkpoint import (
    clear_folder,
    load_model,
    load_training_set,
    load_victim,
    read_checkpoint,
    save_model,
    save_result,
)
from common.datasets import augment, pick_device, to_float
from common.metrics import accuracy
from common.models import build_model


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", required=True, help="checkpoint folder, model.pt or bare state dict")
    p.add_argument("--arch", help="architecture of a bare state dict")
    p.add_argument("--dataset", help="dataset of a bare state dict, or its path")
    p.add_argument("--mean", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--std", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--out", help="folder to write (default: <checkpoint folder>/<defence>-s<seed>)")
    p.add_argument(
        "--train-set",
        default="given",
        choices=["given", "clean"],
        help="the attack's training set, or (for models of clean.py) the dataset's own",
    )
    p.add_argument(
        "--isolation",
        type=float,
        nargs="+",
        default=[0.01],
        help="p: isolated shares, each with a stage 2 of its own; the last is kept (paper .01)",
    )
    p.add_argument(
        "--loss", default="lga", choices=["lga", "flooding"], help="stage 1's loss (paper lga)"
    )
    p.add_argument(
        "--granularity",
        default="batch",
        choices=["batch", "sample"],
        help="gamma holds a batch's mean loss (authors' code) or each image's (paper's formula)",
    )
    p.add_argument("--gamma", type=float, default=0.5, help="gamma: loss in stage 1 (paper .5)")
    p.add_argument(
        "--isolation-epochs",
        type=int,
        help="epochs of stage 1 (default: a fifth of the recipe's; paper 20 of 100)",
    )
    p.add_argument("--epochs", type=int, help="epochs on D_c (default: the rest of the recipe's)")
    p.add_argument("--batch-size", type=int, default=128, help="images per step")
    p.add_argument("--lr", type=float, default=0.1, help="peak rate of both (paper .1)")
    p.add_argument(
        "--unlearn-steps", type=int, default=200, help="steps of the ascent (code: 5 epochs of D_b)"
    )
    p.add_argument("--unlearn-lr", type=float, default=0.01, help="its peak rate (code .0005)")
    return p.parse_args()


def held_loss(losses, kind, granularity, gamma):
    """Stage 1's loss of a batch from its cross-entropies l (B): both kinds have one gradient.

    lga: sign(l - gamma) l; flooding: |l - gamma| + gamma; l of the batch's mean or of each image.
    """
    l = losses.mean() if granularity == "batch" else losses
    if kind == "lga":
        return (torch.sign(l - gamma).detach() * l).mean()
    return ((l - gamma).abs() + gamma).mean()


def log_odds(logits, y):
    """m = log(p_y / (1 - p_y)) of the labels y (B) from logits B x K; cross-entropy is log(1+e^-m).

    Unlike 1 - p it is not rounded to zero where the network is sure.
    """
    own = logits.gather(1, y[:, None]).squeeze(1)
    return own - logits.scatter(1, y[:, None], -math.inf).logsumexp(1)


def fit(model, x, y, objective, transform, clip, epochs, batch_size, lr, bar):
    """SGD on uint8 images, in place; `objective` makes the loss of a batch from its l (B)."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * steps_per_epoch, anneal_strategy="linear", cycle_momentum=False
    )
    model.train()
    for epoch in range(1, epochs + 1):
        total_loss = torch.zeros((), device=x.device)
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
                logits = model(transform(to_float(x[batch])))
            losses = F.cross_entropy(logits.float(), y[batch], reduction="none")
            optimizer.zero_grad(set_to_none=True)
            objective(losses).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            total_loss += losses.detach().mean()
            bar.update()
        if not total_loss.isfinite():
            fail(f"the loss became {total_loss.item()} in epoch {epoch}; no model is kept")
        if epoch % max(1, epochs // 5) == 0:
            bar.write(f"epoch {epoch}/{epochs} loss {total_loss.item() / steps_per_epoch:.4f}")
    return model.eval()


@torch.no_grad()
def sample_losses(model, x, y):
    """Cross-entropy of every uint8 image in the order of x (float64 N): eval mode, no crops."""
    model.eval()
    parts = zip(x.split(2000), y.split(2000))
    return torch.cat([F.softplus(-log_odds(model(to_float(a)).double(), b)) for a, b in parts])


def isolate(losses, share):
    """Mask (N) of the round(share N) lowest losses."""
    chosen = torch.zeros_like(losses, dtype=torch.bool)
    chosen[losses.argsort(stable=True)[: round(share * len(losses))]] = True
    return chosen


def bounded_ascent(logits, y):
    """What replaces -l on D_b: mean of max(0, m + log(K - 1)), zero from l = log K on."""
    return F.relu(log_odds(logits, y) + math.log(logits.shape[1] - 1)).mean()


def unlearn(model, x, y, isolated, transform, steps, batch_size, lr, bar):
    """min E_Dc[l] - E_Db[l], bounded: a copy of the model after `steps` of a batch of each.

    x uint8 N x C x H x W, y N, isolated N. A label that over 90 % of D_b carries is left out of
    D_c, for there the rest of the poison is. Eval mode: BatchNorm's statistics stay.
    """
    model = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, steps, anneal_strategy="linear", cycle_momentum=False
    )
    members = isolated.nonzero().flatten()
    suspected = y[members].bincount(minlength=int(y.max()) + 1) > 0.9 * len(members)
    rest = (~isolated & ~suspected[y]).nonzero().flatten()
    for _ in range(steps):
        kept, chosen = (
            part[torch.randperm(len(part), device=x.device)[:batch_size]]
            for part in (rest, members)
        )
        batch = torch.cat((kept, chosen))
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits = model(transform(to_float(x[batch])))
        logits = logits.float()
        descent = F.cross_entropy(logits[: len(kept)], y[kept])
        loss = descent + bounded_ascent(logits[len(kept) :], y[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        schedule.step()
        bar.update()
    return model


def draw_losses(path, groups, isolated):
    """Histograms of log10 l after stage 1, one per group; a line at the isolation's border."""
    with saved_figure(path, figsize=(5, 3.2)) as (_, axis):
        low, high = (
            f(l.min() if f is min else l.max() for l in groups.values()) for f in (min, max)
        )
        bins = np.linspace(np.log10(max(low, 1e-30)), np.log10(max(high, 1e-29)), 60)
        for name, losses in groups.items():
            axis.hist(np.log10(np.maximum(losses, 1e-30)), bins, alpha=0.6, label=name)
        border = math.log10(max(isolated.max(), 1e-30))
        axis.axvline(border, color="grey", linewidth=0.8, label=f"isolated: {len(isolated)}")
        axis.set(xlabel="log10 of the loss after stage 1", ylabel="images", yscale="log")
        axis.legend()


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "gamma", "isolation_epochs", "epochs", "batch_size", "lr")
    check_positive(args, "unlearn_steps", "unlearn_lr")
    start = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    victim = load_victim(args, device)
    data = victim.data
    if args.train_set == "clean":
        x_train, y_train, flags = data.x_train, data.y_train, None
        if any(victim.folder.glob("poisoned_*.npz")):
            fail(f"--train-set clean is for models of clean.py; {victim.folder} is an attack's")
    else:
        x_train, y_train, flags = load_training_set(victim)
    for share in args.isolation:
        if not 0 < share < 1 or not 1 <= round(share * len(x_train)) < len(x_train):
            fail(f"--isolation {share} of {len(x_train)} images must be some of them, not all")
    if len(y_train.unique()) < 2:
        fail("the training set holds one label; at least two are needed")
    if args.isolation_epochs is None:
        args.isolation_epochs = max(1, data.spec.epochs // 5)
    if args.epochs is None:
        args.epochs = max(1, data.spec.epochs - args.isolation_epochs)
    arguments = data.classes, data.shape, data.spec.mean, data.spec.std
    model = build_model(victim.arch, *arguments).to(device)
    folder = make_folder(args.out or victim.folder / f"abl-s{args.seed}")

    # ===== Isolate =====
    def crops(x):
        return augment(x, data.spec.pad, data.spec.flip)

    def held(losses):
        return held_loss(losses, args.loss, args.granularity, args.gamma)

    per_epoch = max(1, len(x_train) // args.batch_size)
    with tqdm(total=args.isolation_epochs * per_epoch, disable=None, unit="step") as bar:
        settings = args.isolation_epochs, args.batch_size, args.lr, bar
        fit(model, x_train, y_train, held, lambda x: x, 1, *settings)
    losses = sample_losses(model, x_train, y_train)
    metrics = {"median_loss": losses.median().item(), "mean_loss": losses.mean().item()}
    print(f"stage 1: median loss {metrics['median_loss']:.4g}, mean {metrics['mean_loss']:.4g}")

    # ===== Repair =====
    trained, repaired, masks = {}, {}, {}
    suffixes = {share: f"_{share:g}" for share in args.isolation[:-1]} | {args.isolation[-1]: ""}
    for share, suffix in suffixes.items():
        torch.manual_seed(args.seed)  # the same draws, whatever ran before
        masks[share] = isolated = isolate(losses, share)
        x_rest, y_rest = x_train[~isolated], y_train[~isolated]
        border, count = losses[isolated].max().item(), int(isolated.sum())
        labels = y_train[isolated].bincount(minlength=data.classes)
        most, label = 100 * labels.max().item() / count, labels.argmax().item()
        print(
            f"isolated {count} of {len(x_train)} images with losses up to {border:.3g}; "
            f"{most:.1f} % are labelled {label}"
        )
        metrics |= {f"isolated{suffix}": count, f"isolated_label_share{suffix}": most}
        total = args.epochs * max(1, len(x_rest) // args.batch_size) + args.unlearn_steps
        with tqdm(total=total, disable=None, unit="step") as bar:
            settings = args.epochs, args.batch_size, args.lr, bar
            net = copy.deepcopy(model)
            trained[share] = fit(net, x_rest, y_rest, torch.mean, crops, math.inf, *settings)
            settings = args.unlearn_steps, args.batch_size, args.unlearn_lr, bar
            repaired[share] = unlearn(net, x_train, y_train, isolated, crops, *settings)
        before, after = (
            sample_losses(net, x_train[isolated], y_train[isolated]).mean().item()
            for net in (trained[share], repaired[share])
        )
        if not math.isfinite(after):
            fail(f"the loss of the isolated images became {after} in the ascent; no model is kept")
        metrics |= {
            f"isolated_loss_trained{suffix}": before,
            f"isolated_loss_repaired{suffix}": after,
        }
        print(
            f"loss of the isolated images: {before:.3g} before the ascent, {after:.3g} after it "
            f"(a blind guess: {math.log(data.classes):.3g})"
        )
    metrics |= {"isolation": args.isolation, "images": len(x_train)}
    clear_folder(folder)
    draw_losses(
        folder / "losses.png",
        {"all images": losses.cpu().numpy()},
        losses[isolated].cpu().numpy(),
    )
    save_model(folder, repaired[share], data, victim.arch, args, metrics)
    repaired[share] = load_model(read_checkpoint(folder / "model.pt"), folder / "model.pt", device)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    models = {"": victim.model, "_stage1": model}
    for share, suffix in suffixes.items():
        models["_trained" + suffix] = trained[share]
        models["_repaired" + suffix] = repaired[share]
        if flags is not None:
            hits = int((flags & masks[share]).sum())
            metrics["isolation_precision" + suffix] = 100 * hits / int(masks[share].sum())
    for suffix, net in models.items():
        metrics["clean_accuracy" + suffix] = accuracy(net, data.x_test, data.y_test)
        if victim.x_poisoned is not None:
            metrics["asr" + suffix] = accuracy(net, victim.x_poisoned, victim.y_target)
            metrics["robust_accuracy" + suffix] = accuracy(net, victim.x_poisoned, victim.y_true)
    if victim.x_poisoned is None:
        print("no poisoned test images beside the checkpoint: only the cost can be evaluated")
    else:
        metrics["asr_n"] = len(victim.x_poisoned)
    if flags is not None:
        metrics["poisoned"] = int(flags.sum())
        groups = {"clean": losses[~flags].cpu().numpy(), "poisoned": losses[flags].cpu().numpy()}
        groups = {name: group for name, group in groups.items() if len(group)}
        draw_losses(folder / "losses.png", groups, losses[isolated].cpu().numpy())

    # ===== Report =====
    if flags is not None:
        print(f"isolation precision: {metrics['isolation_precision']:.2f} %")
    for name in ("clean_accuracy", "asr"):
        if name in metrics:
            kinds = [f"{metrics[f'{name}_{k}']:.2f} {k}" for k in ("stage1", "trained", "repaired")]
            print(f"{name.replace('_', ' ')}: {metrics[name]:.2f} -> {', '.join(kinds)}")
    print(f"figures: {', '.join(map(str, sorted(folder.glob('*.png'))))}")
    save_result(folder, "abl", args, seconds, metrics, device)
