"""Reversed backdoor generators: detect and remove dynamic, invisible triggers (Zheng et al., 2022,
"Detecting and Mitigating Backdoor Attacks with Dynamic and Invisible Triggers").

For every label an image-to-image network is trained to change clean images as little as possible
and still send them there. For a backdoor's target very little should do, whatever the trigger; the
MAD anomaly index detects that. Fine-tuning on the generated images with true labels removes it.

Kind: detects models, then repairs them. Given: the model and a small clean share of training data.
Answers: is it backdoored, to which label, and the repaired model. It assumes one target. Where it
fails: on MNIST the paper's rule flags 3 of 9 clean models; p < .05 flags none, but misses Blend in
3 of 3, the stealthy and the input-aware attack in 2 of 3 (once with 3 wrong labels); 7 of 9 public
targets, 11 of 12 attacks on WRN-16-1, WaNet on airbench, a patch on GTSRB. Most patches survive.

Equations: Eq. (2)-(4) L = l1 CE + l2 MSE + l3 LPIPS -> train_generators; Eq. (5) m_y, mean L1 norm
of G_y(x) - x over clean images not of class y -> evaluate_generators; Eq. (6) anomaly index ->
common.metrics.verdict; Sec. 3.3 binary search of l1 -> search_lambda1; mitigation -> finetune.

Differs from the paper, or fills its gaps: pre-training ends where G copies images to within 10 % of
their L1 spread around the mean, or after 3,000 steps; then "nothing stands out" is inconclusive. On
CIFAR-10 U-Nets (--no-skip) missed it; so G(x) of colour images is sigmoid(U(x) + logit x), and
Adam's rate .003. U has width 8 and 200 steps a label. A label without an ASR of .8, or without
images and of the largest norm, has no say. The p-value decides, by --rule index the paper's. The
label farthest below is repaired, checked on a fifth of --repair-fraction. No run has true LPIPS.

    python methods/generator_reverse.py --ckpt runs/mnist-mnist_cnn-wanet-s0 --lpips-net none

Results beside the paper's: results/README.md, tables "Detectors" and "Repairs".
"""

import copy
import math
import sys
import time
from argparse import BooleanOptionalAction
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, check_weights, fail, make_folder, saved_figure
from common.checkpoint import clear_folder, draw_rows
from common.datasets import defender_split, to_float
from common.defence import (
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
from common.metrics import LPIPS_NETS, lpips_distance, lpips_of, pass_size, verdict, with_a_say
from common.models import UNet

SHARE = 0.01, 300  # of the training data, and the least number of images


def parse_args():
    p = defence_flags(__doc__, SHARE, detector=True)
    p.add_argument("--width", type=int, default=8, help="channels of the U-Net's first stage")
    p.add_argument("--skip", action=BooleanOptionalAction, help="G adds x to U (default: colour)")
    p.add_argument("--pretrain-steps", type=int, default=3000, help="most steps of pre-training")
    p.add_argument("--pretrain-residual", type=float, default=0.1, help="goal: residual / spread")
    p.add_argument("--steps", type=int, default=200, help="steps per label")
    p.add_argument("--batch-size", type=int, default=64, help="clean images per step")
    p.add_argument("--lr", type=float, help="Adam's rate (paper and default .001, --skip .003)")
    p.add_argument("--lambdas", type=float, nargs=3, default=[0.1, 1, 0.1], help="l1 l2 l3 (paper)")
    p.add_argument("--search-lambda1", action="store_true", help="Sec. 3.3: smallest l1 per label")
    p.add_argument("--asr-goal", type=float, default=0.8, help="below it no label is flagged")
    p.add_argument("--lpips-net", default="alex", choices=LPIPS_NETS, help="none: no LPIPS term")
    p.add_argument("--labels-at-once", type=int, help="stacked generators (default: all; CPU: 2)")
    p.add_argument("--repair-fraction", type=float, nargs="+", help="shares; last is saved (.05)")
    p.add_argument("--repair-epochs", type=int, default=10, help="fine-tuning epochs (paper 10)")
    p.add_argument("--repair-lr", type=float, default=1e-3, help="SGD's, momentum .9 (paper .001)")
    return p.parse_args()


def reconstruction(generated, x, lpips_net):
    """MSE and LPIPS per image between generated images (... x B x C x H x W) and x (same)."""
    mse = (generated - x).square().mean((-3, -2, -1))
    if lpips_net is None:
        return mse, torch.zeros_like(mse)
    flat = generated.flatten(0, -4)
    return mse, lpips_of(lpips_net, flat, x.expand_as(generated).flatten(0, -4)).view_as(mse)


def pretrain(generator, x, *, lambdas, lpips_net, goal, steps, batch_size, lr, seed):
    """G_0: minimise l2 MSE + l3 LPIPS on all clean images (N x C x H x W in [0,1]), in place.

    Returns its mean L1 residual per image, the images' spread around their mean colour, the steps.
    """
    optimizer = torch.optim.Adam(generator.parameters(), lr)
    spread = (x - x.mean((0, 2, 3), keepdim=True)).abs().sum((1, 2, 3)).mean().item()
    order = torch.Generator().manual_seed(seed)
    for step in tqdm(range(steps + 1), disable=None, unit="step", desc="pre-training"):
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                parts = [(generator(b) - b).abs().sum((1, 2, 3)) for b in x.split(pass_size(x))]
            residual = torch.cat(parts).mean().item()
            if not math.isfinite(residual):
                fail("pre-training diverged: the residual is not finite")
            if residual <= goal * spread or step == steps:
                break
        pick = torch.randperm(len(x), generator=order)[:batch_size].to(x.device)
        mse, perceptual = reconstruction(generator(x[pick]), x[pick], lpips_net)
        loss = lambdas[1] * mse.mean() + lambdas[2] * perceptual.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return residual, spread, step


def generate(skeleton, parameters, x):
    """All generators on the same x, B x C x H x W: stacked parameters -> K x B x C x H x W."""
    if x.is_cuda:  # a CPU is quicker one by one
        return torch.vmap(lambda p: functional_call(skeleton, p, (x,)))(parameters)
    alone = [dict(zip(parameters, values)) for values in zip(*parameters.values())]
    return torch.stack([functional_call(skeleton, own, (x,)) for own in alone])


def train_generators(
    model, start, x, y, labels, *, lambda1, lambdas, lpips_net, steps, batch_size, lr, seed
):
    """Eq. (2)-(4): one generator per label, all from `start`, stacked and trained together.

    lambda1 holds one weight per label. Images of a label do not train its own generator. Neither
    the order of the labels nor how many are stacked changes a label's result. Returns the stacked
    parameters and the last batch's mean CE, MSE and LPIPS per label (K x 3).
    """
    parameters, _ = torch.func.stack_module_state([start for _ in labels])
    skeleton = copy.deepcopy(start).to("meta")
    optimizer = torch.optim.Adam(parameters.values(), lr)
    order = torch.Generator().manual_seed(seed)
    goal = torch.tensor(labels, device=x.device)[:, None]  # K x 1
    for _ in tqdm(range(steps), disable=None, desc=f"labels {labels[0]}-{labels[-1]}"):
        pick = torch.randperm(len(x), generator=order)[:batch_size].to(x.device)
        weight = (y[pick] != goal).float()  # K x B
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1)
        generated = generate(skeleton, parameters, x[pick])
        logits = model(generated.flatten(0, 1))
        targets = goal.expand(-1, len(pick)).flatten()
        attack = F.cross_entropy(logits, targets, reduction="none").view_as(weight)
        mse, perceptual = reconstruction(generated, x[pick], lpips_net)
        terms = torch.stack([(weight * term).sum(1) for term in (attack, mse, perceptual)], 1)
        loss = lambda1 * terms[:, 0] + lambdas[1] * terms[:, 1] + lambdas[2] * terms[:, 2]
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        optimizer.step()
    return {k: v.detach() for k, v in parameters.items()}, terms.detach()


@torch.no_grad()
def evaluate_generators(model, start, parameters, x, y, labels):
    """Eq. (5): m_y (mean over x not of class y of the summed |G_y(x) - x|) and ASR per label."""
    norms, asrs = [], []
    for i, label in enumerate(labels):
        own = {name: value[i] for name, value in parameters.items()}
        change, hits = [], []
        for part in x[y != label].split(pass_size(x)):
            generated = functional_call(start, own, (part,))
            change.append((generated - part).abs().sum((1, 2, 3)))
            hits.append(model(generated).argmax(1) == label)
        norms.append(torch.cat(change).mean().item())
        asrs.append(torch.cat(hits).float().mean().item())
    return norms, asrs


def search_lambda1(train, evaluate, *, count, goal, device):
    """Sec. 3.3: per label the smallest l1 in [.001, 10] whose generator reaches the ASR goal."""
    low, high = torch.full((count,), 1e-3, device=device), torch.full((count,), 10.0, device=device)
    for _ in range(6):  # bisections
        middle = (low * high).sqrt()
        parameters, _ = train(lambda1=middle)
        reached = torch.tensor(evaluate(parameters)[1], device=device) >= goal
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    return high


def reverse(model, origin, x, y, labels, *, goal, lambdas, **recipe):
    """Eq. (2)-(5) for some labels: lists of norms m_y, ASRs, the three terms, l1 and parameters.

    With a `goal` each label first gets the smallest lambda1 that reaches this ASR.
    """
    train = partial(train_generators, model, origin, x, y, labels, lambdas=lambdas, **recipe)
    measure = partial(evaluate_generators, model, origin, x=x, y=y, labels=labels)
    lambda1 = torch.full((len(labels),), lambdas[0], device=x.device)
    if goal is not None:
        lambda1 = search_lambda1(train, measure, count=len(labels), goal=goal, device=x.device)
    trained, terms = train(lambda1=lambda1)
    parameters = [{k: v[i] for k, v in trained.items()} for i in range(len(labels))]
    return *measure(trained), terms.tolist(), lambda1.tolist(), parameters


def finetune(model, x, y, *, generator, epochs, lr, batch_size=64):
    """The paper's mitigation: SGD on {(x, y)} and {(G_t(x), y)}. Returns a fine-tuned copy.

    Without one (the baseline) (x, y) stand there twice: as many updates. x uint8 N x C x H x W.
    """
    model, x = copy.deepcopy(model).requires_grad_(True).train(), to_float(x)
    with torch.no_grad():
        second = [part if generator is None else generator(part) for part in x.split(pass_size(x))]
    x, y = torch.cat([x, *second]), torch.cat((y, y))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), device=x.device).split(batch_size):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            if not loss.isfinite():
                return None
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return frozen(model, x[:500])


def residual_rows(name, images, x):
    """Two rows of a figure: images, and their difference from x mapped from [-1,1] to [0,1]."""
    return [(name, images), ("residual", (images - x + 1) / 2)]


def draw_norms(path, norms, flagged):
    """m_y per label as bars, flagged labels marked."""
    labels = range(len(norms))
    with saved_figure(path, figsize=(max(4, 0.35 * len(norms)), 3)) as (_, axis):
        axis.bar(labels, norms, color=["C3" if k in flagged else "C0" for k in labels])
        axis.axhline(torch.tensor(norms).quantile(0.5), color="grey", linewidth=0.8)
        axis.set(xlabel="label y (flagged: red)", ylabel="$m_y$, mean L1 norm", xticks=labels)


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "threshold", "width", "pretrain_steps", "steps", "batch_size", "lr")
    check_positive(args, "labels_at_once", "pretrain_residual", "repair_epochs", "repair_lr")
    check_share(args, "data_fraction", "asr_goal")
    if args.width % 4:
        fail(f"--width must be a multiple of 4, GroupNorm's groups; got {args.width}")
    check_weights(args, "lambdas")
    start = time.time()
    victim = open_victim(args)
    model, data, device = victim.model, victim.data, victim.data.x_train.device
    args.repair_fraction = args.repair_fraction or [max(0.05, min(1.0, 300 / len(data.x_train)))]
    repair_splits = [defender_split(data.y_train, f, args.seed) for f in args.repair_fraction]
    split = clean_share(args, victim, SHARE)
    x_clean, y_clean = to_float(data.x_train[split]), data.y_train[split]
    if device.type == "cpu":  # where a U-Net is quicker so
        x_clean = x_clean.contiguous(memory_format=torch.channels_last)
    args.skip = len(x_clean[0]) == 3 if args.skip is None else args.skip
    args.lr = args.lr or (3e-3 if args.skip else 1e-3)
    lpips_net = None if args.lpips_net == "none" else lpips_distance(args.lpips_net, device)
    folder = make_folder(args.out or victim.folder / f"generator_reverse-s{args.seed}")

    # ===== Reverse =====
    print(f"LPIPS term: {args.lpips_net}")
    recipe = {"lambdas": args.lambdas, "lpips_net": lpips_net, "batch_size": args.batch_size}
    recipe |= {"lr": args.lr, "seed": args.seed}
    origin = UNet(x_clean.shape[1], args.width, skip=args.skip).to(device)
    goal = {"goal": args.pretrain_residual, "steps": args.pretrain_steps}
    residual, spread, taken = pretrain(origin, x_clean, **goal, **recipe)
    print(f"pre-training: {taken} steps, residual {residual:.1f} of spread {spread:.1f}")
    if doubt := residual > args.pretrain_residual * spread:
        print("warning: pre-training missed its goal; its residual can hide small triggers")
    labels, search_start = list(range(data.classes)), time.time()
    recipe |= {"steps": args.steps, "goal": args.asr_goal if args.search_lambda1 else None}
    search = partial(reverse, model, origin, x_clean, y_clean, **recipe)
    at_once = args.labels_at_once or (data.classes if device.type == "cuda" else 2)
    parts = zip(*in_parts(search, labels, at_once))
    norms, asrs, terms, lambda1, parameters = ([v for some in part for v in some] for part in parts)

    # ===== Verdict =====
    found = with_a_say(norms, [asr >= args.asr_goal for asr in asrs], y_clean)
    decision, notes = verdict(norms, found, args.threshold), []
    for norm, asr, (ce, mse, perceptual), sound in zip(norms, asrs, terms, found):
        note = f"m_y {norm:.2f} ASR {asr:.1%} CE {ce:.3f} MSE {mse:.5f} LPIPS {perceptual:.4f}"
        notes.append(note + ("" if sound else "  (goal missed or without images: no say)"))
    metrics = report_verdict(decision, args, notes, doubt)
    metrics |= dict(norms=norms, found=found, asrs=asrs, ce_mse_lpips=terms, lambda1=lambda1)
    metrics |= {"pretrain_steps": taken, "pretrain_residual": residual, "spread": spread}
    metrics["search_seconds"], flagged = time.time() - search_start, metrics["flagged"]
    rows = [("clean", x_shown := x_clean[torch.randperm(len(x_clean), device=device)[:8]])]
    for label in list(dict.fromkeys(flagged[:1] + sorted(labels, key=norms.__getitem__)))[:3]:
        made = functional_call(origin, parameters[label], x_shown)
        rows += residual_rows(f"$G_{{{label}}}(x)$", made, x_shown)

    # ===== Repair =====
    models, trigger = {"": model}, None
    if flagged:
        best = parameters[flagged[0]]
        trigger = {f"generator.{k}": v for k, v in best.items()}
        control = partial(finetune, generator=None, epochs=args.repair_epochs)
        repair = partial(control, generator=partial(functional_call, origin, best))
        rates = {"lr": args.repair_lr, "seed": args.seed}
        for fraction, part in zip(args.repair_fraction, repair_splits):
            suffix = "" if fraction == args.repair_fraction[-1] else f"_{fraction:g}"
            clean = {"model": model, "x": data.x_train[part], "y": data.y_train[part]}
            made, lr = careful_repair(repair, control, **clean, **rates, suffix=suffix)
            models, metrics["repair_lr" + suffix] = models | made, lr
    clear_folder(folder)
    draw_norms(folder / "norms.png", norms, flagged)
    draw_rows(folder / "generated.png", rows)
    save_repaired(folder, models, victim, args, metrics, trigger)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models, decision)
    if "target" in metrics:
        counts = data.y_test != metrics["target"]  # poisoned_test.npz keeps the test set's order
        if int(counts.sum()) == len(victim.x_poisoned):
            x_shown, x_true = to_float(data.x_test[counts][:8]), to_float(victim.x_poisoned[:8])
            made = functional_call(origin, parameters[metrics["target"]], x_shown)
            rows = [("clean", x_shown), *residual_rows("poisoned", x_true, x_shown)]
            draw_rows(folder / "triggers.png", rows + residual_rows("reversed", made, x_shown))

    # ===== Report =====
    report(folder, "generator_reverse", args, metrics, seconds)
