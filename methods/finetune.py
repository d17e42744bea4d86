"""Plain fine-tuning on clean images, at several rates: the baseline of every repair.

The suspect is trained on, with the true labels of a few clean images. Nothing in them asks for the
backdoor, so that the network may forget it, and the learning rate decides whether it does. Zheng et
al. ("Detecting and Mitigating Backdoor Attacks with Dynamic and Invisible Triggers", 2022, Fig. 5)
show the clean accuracy and the ASR by rate: fine-tuning lowers the ASR only at larger rates, where
beyond some value the clean accuracy collapses. This script draws that figure for any checkpoint.

Kind: repairs models, without asking whether they are backdoored; what it costs an innocent model
is part of the answer. Given: the model and a clean share of its training data. Answers: the
repaired model and the sweep over the rates.

Steps: cross-entropy on clean images, all layers -> finetune; the saved model is that of the largest
rate that costs the clean images which were kept back at most --max-drop points -> choose.

Differs from the paper, or chosen where it is silent: the paper states SGD with momentum .9 for 10
epochs at rate .001 on 1 to 5 % of the training data; it names no schedule, no weight decay and no
choice among the rates. Here the rate falls by a cosine, weight decay is .0005 (both
BackdoorBench's), the images are cropped and mirrored by the data set's recipe, whatever the
victim's was, and BatchNorm is in training mode. 20 % of the clean share are kept back and choose
the rate, never the test images. Every rate gets the same draws. `fine_pruning.py` trains by the
same loop, and so does `nad.py`, there with Cutout.

Where it fails: at small rates and after few updates. On digits no rate removed BadNets in 10
epochs, which are 30 updates there; with --epochs 40 --batch-size 32 a rate of .1 did, .03 left an
ASR of 85, and those below left it whole. The rate .1 cost an innocent model 5 points. Where the
victim was trained on the images kept back, it is better there than on new ones, and the choice is
too careful: NAD's public network loses 5.2 points of them at .03 and 1.3 on test images, so .01 is
saved, with the backdoor whole.

    python methods/finetune.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results: results/README.md, table "Fine-tuning, NAD and MCR".
"""

import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_step, fail, make_folder, saved_figure
from common.attack import TrainingLog
from common.checkpoint import clear_folder
from common.datasets import augment, kept_back, to_float
from common.defence import (
    clean_share,
    defence_flags,
    evaluate,
    frozen,
    open_victim,
    report,
    save_repaired,
)
from common.metrics import accuracy

SHARE = 0.05, 300  # of the training data, and the least number of images
LRS = [0.001, 0.003, 0.01, 0.03, 0.1]


def parse_args():
    p = defence_flags(__doc__, SHARE)
    p.add_argument("--lrs", type=float, nargs="+", default=LRS, help="first rates (paper .001)")
    p.add_argument("--held-out", type=float, default=0.2, help="part of the share that chooses")
    p.add_argument("--max-drop", type=float, default=5.0, help="points that a rate may cost there")
    p.add_argument("--epochs", type=int, default=10, help="fine-tuning epochs (paper 10)")
    p.add_argument("--batch-size", type=int, default=64, help="images per step (paper: not stated)")
    return p.parse_args()


def finetune(net, x, y, *, pad, flip, epochs, lr, batch_size):
    """SGD on clean uint8 images x N x C x H x W with labels y; returns a tuned, frozen copy.

    Crops (`pad` pixels) and mirrors (`flip`) the images. BatchNorm is in training mode. None where
    the loss diverges.
    """
    net = copy.deepcopy(net).requires_grad_(True).train()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    log = TrainingLog(epochs, steps_per_epoch)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            loss = F.cross_entropy(net(augment(to_float(x[batch]), pad, flip)), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        if not log.total.isfinite():
            log.bar.close()
            return None
        log.epoch(epoch, note=f" at first rate {lr:g}", lines=1)
    return frozen(net, to_float(x[:500]))


def choose(kept, before, max_drop):
    """The largest rate that costs `before` at most `max_drop` points, or None.

    `kept`: rate -> accuracy in per cent on images that were kept back. A larger rate moves the
    network further away from its backdoor.
    """
    cheap = [lr for lr, after in kept.items() if before - after <= max_drop + 1e-9]
    return max(cheap, default=None)


def draw_sweep(path, lrs, named, chosen):
    """Percentages by learning rate; a line where the saved model was trained."""
    with saved_figure(path, figsize=(5, 3.2)) as (_, axis):
        for name, values in named.items():
            axis.plot(lrs, values, marker="o", markersize=4, label=name)
        if chosen is not None:
            axis.axvline(chosen, color="grey", linewidth=0.8, label=f"saved: {chosen:g}")
        axis.set(xlabel="first learning rate", ylabel="%", ylim=(-3, 103))
        if len(lrs) > 1:
            axis.set_xscale("log")
        axis.legend()


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size")
    check_step(args)
    if not all(0 < lr <= 1e36 for lr in args.lrs):
        fail(f"--lrs must lie in (0, 1e+36]; got {args.lrs}")
    if not 0 < args.held_out < 1:
        fail(f"--held-out {args.held_out} must lie in (0, 1)")
    if not 0 <= args.max_drop <= 100:
        fail(f"--max-drop {args.max_drop} must lie in [0, 100]")
    start = time.time()
    victim = open_victim(args)
    if len({f"{lr:g}" for lr in args.lrs}) < len({*args.lrs}):
        fail(f"--lrs {args.lrs}: two of them have the same six digits")
    model, data = victim.model, victim.data
    split = clean_share(args, victim, SHARE)
    held = kept_back(data.y_train[split], args.held_out, args.seed)
    if held.all():
        fail(f"all {len(split)} clean images are held out; none is left to train on")
    x_clean, y_clean = data.x_train[split], data.y_train[split]
    x_held, y_held = x_clean[held], y_clean[held]
    folder = make_folder(args.out or victim.folder / f"finetune-s{args.seed}")

    # ===== Repair =====
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size}
    recipe |= {"pad": data.spec.pad, "flip": data.spec.flip}
    tuned, kept, before = {}, {}, accuracy(model, x_held, y_held, balanced=True)
    for lr in sorted({*args.lrs}, reverse=True):
        torch.manual_seed(args.seed)  # the same draws, whatever ran before
        net = finetune(model, x_clean[~held], y_clean[~held], lr=lr, **recipe)
        if net is None:
            print(f"fine-tuning at rate {lr:g}: the loss diverged, so this rate is left out")
            continue
        tuned[lr] = net
        kept[lr] = accuracy(tuned[lr], x_held, y_held, balanced=True)
        fall = f"{before:.2f} -> {kept[lr]:.2f} on {len(x_held)} clean images that were kept back"
        print(f"fine-tuning at rate {lr:g}: {fall}")
    if not tuned:
        fail(f"the loss diverged at every rate of --lrs {args.lrs}; no model is kept")
    chosen, lrs = choose(kept, before, args.max_drop), sorted(kept)
    models = {"": model} | {f"_{lr:g}": tuned[lr] for lr in lrs}
    if chosen is None:
        print(f"every rate cost more than {args.max_drop:g} points, so no model is saved")
    else:
        models["_repaired"] = tuned[chosen]
    metrics = {
        "lrs": lrs,
        "held_out": len(x_held),
        "held_out_accuracy": before,
        "held_out_accuracies": [kept[lr] for lr in lrs],
        "repair_lr": chosen,
    }
    clear_folder(folder)
    save_repaired(folder, models, victim, args, metrics)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models)
    curves = {"held-out accuracy": metrics["held_out_accuracies"]}
    for title, name in (("clean accuracy", "clean_accuracy"), ("ASR", "asr")):
        if name in metrics:
            curves[title] = [metrics[f"{name}_{lr:g}"] for lr in lrs]
    for lr, *figures in zip(lrs, *curves.values()):
        shown = ", ".join(f"{title} {value:.2f}" for title, value in zip(curves, figures))
        print(f"rate {lr:g}: {shown}")
    draw_sweep(folder / "sweep.png", lrs, curves, chosen)

    # ===== Report =====
    report(folder, "finetune", args, metrics, seconds)
