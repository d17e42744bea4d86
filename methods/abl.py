"""ABL: anti-backdoor learning (Li et al., NeurIPS 2021, arXiv 2110.11571).

A backdoor is learnt faster than the task. Stage 1 trains on the poisoned set but holds the loss at
gamma, which only the easiest images can undercut; the share p with the lowest losses is isolated.
Stage 2 trains on the rest and drives the loss of the isolated images up, so that the network
forgets what they have in common: the trigger.

Kind: repairs models, by training a new one. Given: the poisoned training set, no clean image, not
the poison rate. Answers: isolated images, the repaired model. Where it fails: where few isolated
images are poison (feature collision's 25 %, SIG's 14, composite's 0: ASRs of 99, 85, 89) or their
loss is near 0, where -l has no gradient (MNIST's BadNets: 100). A clean WRN-16-1 loses 8 points.

Steps of the paper: local gradient ascent (LGA) sign(l - gamma) l, or flooding |l - gamma| + gamma
-> held_loss; the p lowest losses, eval mode, no augmentation -> sample_losses, isolate; training on
the rest D_c -> fit; global gradient ascent min E_Dc[l] - E_Db[l] -> unlearn.

Differs from the paper: its joint objective comes after training on D_c, as the ascent does in the
authors' code. Stages 1 and 2 share the recipe's epochs 1 : 4 to 5 (paper 1 : 4), rates one-cycle,
weight decay is 5e-4 (code 1e-4), stage 1 does not crop and cuts gradients to norm 1, and D_c is
cropped and mirrored without Cutout. --ascent says what raises the loss of D_b, whose images are
neither cropped nor mirrored: joint (the paper's objective), isolated (the authors' code: -l on D_b
alone), or bounded, which is ours. The first two end where l on D_b is over 2 log K, twice that of a
blind guess, for more steps can ruin the network (chosen on training images of two victims, with two
test figures of one in sight). Bounded ascends on the log-odds m of the given label, l =
log(1 + e^-m), until l = log K: it minimises max(0, m + log(K - 1)), in eval mode, and leaves a
label out of D_c that over 90 % of D_b carries, for there the rest of the poison is. It was designed
on digits and on one MNIST victim with their test figures in sight.

    python methods/abl.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results beside the paper's: results/README.md, table "ABL".
"""

import copy
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_step, fail, make_folder, saved_figure, write_csv
from common.attack import TrainingLog
from common.checkpoint import clear_folder, load_training_set
from common.datasets import augment, to_float
from common.defence import (
    MOST_DROP,
    check_reading,
    defence_flags,
    evaluate,
    open_victim,
    report,
    save_repaired,
)
from common.metrics import accuracy, pass_size
from common.models import build_model, in_float32

RATES, BOUNDED_STEPS = {"joint": 5e-4, "isolated": 5e-4, "bounded": 0.01}, 200  # of the ascent
SURE = math.log(2)  # an image of a lower loss keeps its label with a probability above .5


def parse_args():
    p = defence_flags(__doc__)
    source = "given: the attack's; clean: the dataset's (no isolated.csv); or an .npz with x and y"
    p.add_argument("--train-set", default="given", help=source)
    share = "p: shares, each with a stage 2 of its own; the last is kept (.01)"
    p.add_argument("--isolation", type=float, nargs="+", default=[0.01], help=share)
    p.add_argument("--loss", default="lga", choices=["lga", "flooding"], help="stage 1 (paper lga)")
    held = "gamma holds a batch's mean loss (authors' code) or each image's (paper's formula)"
    p.add_argument("--granularity", default="batch", choices=["batch", "sample"], help=held)
    p.add_argument("--gamma", type=float, default=0.5, help="gamma: loss in stage 1 (paper .5)")
    p.add_argument("--isolation-epochs", type=int, help="of stage 1 (a fifth; paper 20 of 100)")
    p.add_argument("--epochs", type=int, help="epochs on D_c (default: the rest of the recipe's)")
    p.add_argument("--batch-size", type=int, default=128, help="images per step")
    p.add_argument("--lr", type=float, default=0.1, help="peak rate of both (paper .1)")
    p.add_argument("--ascent", default="joint", choices=RATES, help="on D_b, see the header")
    p.add_argument("--unlearn-steps", type=int, help="of the ascent (5 epochs of D_b; bounded 200)")
    p.add_argument("--unlearn-lr", type=float, help="its rate (code .0005; bounded: peak .01)")
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


def fit(model, x, y, *, objective, pad, flip, clip, epochs, batch_size, lr):
    """SGD on uint8 images, in place; `objective` makes the loss of a batch from its l (B).

    Crops (`pad` pixels) and mirrors (`flip`) the images; gradients are cut to the norm `clip`.
    """
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * steps_per_epoch, anneal_strategy="linear", cycle_momentum=False
    )
    log = TrainingLog(epochs, steps_per_epoch)
    model.train()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            logits = model(augment(to_float(x[batch]), pad, flip))
            losses = F.cross_entropy(logits.float(), y[batch], reduction="none")
            optimizer.zero_grad(set_to_none=True)
            objective(losses).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()
            log.step(losses.mean())
        log.epoch(epoch, lines=5)
    return model.eval()


@torch.no_grad()
def sample_losses(model, x, y):
    """Cross-entropy of every uint8 image in x's order (float64 N): eval mode, float32, no crops."""
    model.eval()
    parts = zip(x.split(pass_size(x)), y.split(pass_size(x)))
    with in_float32(model):
        return torch.cat([F.softplus(-log_odds(model(to_float(a)).double(), b)) for a, b in parts])


def isolate(losses, share):
    """Mask (N) of the round(share N) lowest losses."""
    chosen = torch.zeros_like(losses, dtype=torch.bool)
    chosen[losses.argsort(stable=True)[: round(share * len(losses))]] = True
    return chosen


def bounded_ascent(logits, y):
    """What replaces -l on D_b: mean of max(0, m + log(K - 1)), zero from l = log K on."""
    return F.relu(log_odds(logits, y) + math.log(logits.shape[1] - 1)).mean()


def draw(members, count):
    """`count` of the indices `members` at random, all of them where they are fewer."""
    return members[torch.randperm(len(members), device=members.device)[:count]]


def unlearn(model, x, y, isolated, *, pad, flip, ascent, steps, batch_size, lr):
    """Global gradient ascent: a copy of the model after `steps` of a batch of D_c and one of D_b.

    x uint8 N x C x H x W, y N, isolated N. `ascent`: joint minimises E_Dc[l] - E_Db[l], isolated
    -E_Db[l] on D_b alone, in training mode until l > 2 log K; bounded E_Dc[l] + bounded_ascent in
    eval mode, its rate in one cycle, gradients cut to norm 1. Only images of D_c are cropped.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    members, others = isolated.nonzero().flatten(), (~isolated).nonzero().flatten()
    if ascent == "bounded":
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, lr, steps, anneal_strategy="linear", cycle_momentum=False
        )
        suspected = y[members].bincount(minlength=int(y.max()) + 1) > 0.9 * len(members)
        rest = (~isolated & ~suspected[y]).nonzero().flatten()
        others = rest if len(y[rest].unique()) > 1 else others  # of two labels none is left out
    some = members[:: -(-len(members) // 500)]
    most = 2 * math.log(model.eval()(to_float(x[:1])).shape[1])
    for _ in tqdm(range(steps), disable=None, unit="step"):
        if ascent != "bounded" and sample_losses(model, x[some], y[some]).mean() > most:
            break
        model.train(ascent != "bounded")
        kept, chosen = draw(others, batch_size), draw(members, batch_size)
        kept = kept[: 0 if ascent == "isolated" else None]
        images = augment(to_float(x[kept]), pad, flip), to_float(x[chosen])
        of_rest, of_isolated = model(torch.cat(images)).float().split([len(kept), len(chosen)])
        if ascent == "bounded":
            loss = bounded_ascent(of_isolated, y[chosen])
        else:
            loss = -F.cross_entropy(of_isolated, y[chosen])
        if len(kept):
            loss = loss + F.cross_entropy(of_rest, y[kept])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if ascent == "bounded":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        schedule.step()
    return model.eval()


def draw_losses(path, groups, isolated):
    """Histograms of log10 l after stage 1, one per group; a line at the isolation's border."""
    with saved_figure(path, figsize=(5, 3.2)) as (_, axis):
        low, high = (f(f(l) for l in groups.values()) for f in (min, max))
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
    check_step(args)
    check_positive(args, "unlearn_steps", "unlearn_lr")
    start = time.time()
    victim = open_victim(args)
    data, spec = victim.data, victim.data.spec
    if args.train_set == "clean":
        x_train, y_train, flags = data.x_train, data.y_train, None
        if any(victim.folder.glob("poisoned_*.npz")):
            fail(f"--train-set clean is for models of clean.py; {victim.folder} is an attack's")
    else:
        path = None if args.train_set == "given" else args.train_set
        x_train, y_train, flags = load_training_set(victim, path)
    least = 2 if args.ascent == "isolated" else 1  # BatchNorm needs two
    for share in args.isolation:
        if not 0 < share < 1 or not least <= round(share * len(x_train)) < len(x_train):
            fail(f"--isolation {share} of {len(x_train)} images must be {least} or more, not all")
    if len(y_train.unique()) < 2:
        fail("the training set holds one label; at least two are needed")
    drawn = torch.Generator().manual_seed(args.seed + 2**30)  # not as the attack drew its poisons
    order = torch.randperm(len(x_train), generator=drawn).to(x_train.device)
    check_reading(victim.model, x_train[order[:2000]], y_train[order[:2000]])
    args.isolation_epochs = args.isolation_epochs or max(1, spec.epochs // 5)
    args.epochs = args.epochs or max(1, spec.epochs - args.isolation_epochs)
    args.unlearn_lr = args.unlearn_lr or RATES[args.ascent]
    mean, std = (part.flatten().tolist() for part in (victim.model.mean, victim.model.std))
    model = build_model(victim.arch, data.classes, data.shape, mean, std).to(x_train.device)
    model.bfloat16, model.softmax = victim.model.bfloat16, victim.model.softmax
    folder = make_folder(args.out or victim.folder / f"abl-s{args.seed}")

    # ===== Isolate =====
    held = {"kind": args.loss, "granularity": args.granularity, "gamma": args.gamma}
    plain = {"pad": 0, "flip": False, "clip": 1, "epochs": args.isolation_epochs}
    rates = {"batch_size": args.batch_size, "lr": args.lr}
    fit(model, x_train, y_train, objective=partial(held_loss, **held), **plain, **rates)
    losses = sample_losses(model, x_train, y_train)
    metrics = {"median_loss": losses.median().item(), "mean_loss": losses.mean().item()}
    print(f"stage 1: median loss {metrics['median_loss']:.4g}, mean {metrics['mean_loss']:.4g}")

    # ===== Repair =====
    crops, masks = {"pad": spec.pad, "flip": spec.flip}, {}
    models = {"": victim.model, "_stage1": model}
    suffixes = {s: f"_{s:g}" for s in args.isolation if s != args.isolation[-1]}
    for share, suffix in [*suffixes.items(), (args.isolation[-1], "")]:
        torch.manual_seed(args.seed)  # the same draws, whatever ran before
        masks[suffix] = isolated = isolate(losses, share)
        count = int(isolated.sum())
        labels = y_train[isolated].bincount(minlength=data.classes)
        most, label = 100 * labels.max().item() / count, labels.argmax().item()
        print(f"isolated {count} of {len(x_train)} images; {most:.1f} % are labelled {label}")
        rest, plainly = (x_train[~isolated], y_train[~isolated]), {"clip": math.inf}
        plainly |= {"objective": torch.mean, "epochs": args.epochs}
        trained = fit(copy.deepcopy(model), *rest, **plainly, **crops, **rates)
        steps = BOUNDED_STEPS if args.ascent == "bounded" else 5 * -(-count // args.batch_size)
        ascent = {"ascent": args.ascent, "steps": args.unlearn_steps or steps}
        rate = {"batch_size": args.batch_size, "lr": args.unlearn_lr}
        members = x_train[isolated], y_train[isolated]
        before = sample_losses(trained, *members).mean().item()
        repaired = unlearn(trained, x_train, y_train, isolated, **crops, **ascent, **rate)
        after = sample_losses(repaired, *members)
        sure, after = 100 * (after < SURE).double().mean().item(), after.mean().item()
        if not math.isfinite(after):
            fail(f"the loss of the isolated images became {after} in the ascent; no model is kept")
        metrics |= {f"isolated{suffix}": count, f"isolated_label_share{suffix}": most}
        metrics[f"isolated_loss_trained{suffix}"] = before
        metrics |= {f"isolated_loss_repaired{suffix}": after, f"isolated_sure{suffix}": sure}
        print(f"mean loss of the isolated images: {before:.3g} -> {after:.3g} after the ascent;")
        print(f"{sure:.1f} % of them keep their label with a probability above .5")
        if sure > 10:
            cure = "" if args.ascent == "bounded" else ": try --ascent bounded"
            print(f"warning: a trigger that these share may be left, too{cure}")
        some = order[~isolated[order] & (y_train[order] != label)][:2000]
        read = [accuracy(net, x_train[some], y_train[some]) for net in (trained, repaired)]
        if read[0] - read[1] > MOST_DROP:
            print("warning: of other images {:.1f} % were read before, {:.1f} % now".format(*read))
        models |= {"_trained" + suffix: trained, "_repaired" + suffix: repaired}
    metrics |= {"isolation": args.isolation, "images": len(x_train)}
    clear_folder(folder)
    border = losses[isolated].cpu().numpy()
    draw_losses(folder / "losses.png", {"all images": losses.cpu().numpy()}, border)
    rows = [(k, y_train[k].item(), losses[k].item()) for k in losses.argsort(stable=True).tolist()]
    if args.train_set != "clean":  # whose images may be a part of a file's
        write_csv(folder / "isolated.csv", ("image", "label", "loss"), rows[:count])
    save_repaired(folder, models, victim, args, metrics)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models)
    if flags is not None:
        for suffix, mask in masks.items():
            metrics["isolation_precision" + suffix] = 100 * flags[mask].float().mean().item()
        print(f"isolation precision: {metrics['isolation_precision']:.2f} %")
        metrics["poisoned"] = int(flags.sum())
        groups = {"clean": losses[~flags].cpu().numpy(), "poisoned": losses[flags].cpu().numpy()}
        groups = {name: group for name, group in groups.items() if len(group)}
        draw_losses(folder / "losses.png", groups, border)

    # ===== Report =====
    report(folder, "abl", args, metrics, seconds, kinds=("stage1", "trained", "repaired"))
