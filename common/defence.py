"""What every defence script shares and no paper describes: flags, loading, verdicts, reports."""

import math
from functools import partial

import torch

from common import checkpoint as ckpt
from common import fail, parser, seed
from common.datasets import defender_split, kept_back, pick_device
from common.metrics import accuracy, case_of, pass_size
from common.models import FLOAT32, PRECISION, uses_bfloat16

NOTHING = "nothing is flagged, so nothing is repaired"
NEAR_CHANCE, POOR = 0.1, 0.5  # of the way from chance to perfect
KEPT_BACK, MOST_DROP, TRIES = 0.2, 5.0, 4  # share of the images, points of accuracy, rates


def defence_flags(doc, share=None, detector=False):
    """The ArgumentParser of a defence with the flags that all of them have; `doc` is its header.

    `share` is --data-fraction's default and its least number of images; None: no such flag.
    `detector`: it has one norm per label, and --rule and --threshold.
    """
    p = parser(doc)
    p.add_argument("--ckpt", required=True, help="checkpoint folder, model.pt or bare state dict")
    p.add_argument("--arch", help="of a bare state dict: name, torchvision:NAME, FILE.py:NAME")
    p.add_argument("--dataset", help="dataset of a bare state dict, or the path of its images")
    p.add_argument("--classes", type=int, help="of a bare state dict (default: the labels')")
    p.add_argument("--image-size", type=int, help="side of a folder's images (default: 32)")
    p.add_argument("--mean", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--std", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--seed", type=seed, default=0, help="of every random draw, 0..2^32-1")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--precision", **PRECISION)
    p.add_argument("--out", help="folder to write (default: <checkpoint folder>/<defence>-s<seed>)")
    if share is not None:
        default = f"(default: {share[0]:g}, at least about {share[1]} images)"
        p.add_argument("--data-fraction", type=float, help=f"share of the training data {default}")
    if detector:
        rules = "what makes a repair: p < .05 below the other norms, or the paper's index"
        p.add_argument("--rule", default="p", choices=["p", "index"], help=rules)
        p.add_argument("--threshold", type=float, default=2.0, help="index that flags (paper 2)")
    return p


def open_victim(args, forward=False):
    """Seed every draw, load checkpoint and data onto the device; `forward`: for passes alone."""
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    victim = ckpt.load_victim(args, device)
    if not forward:
        ckpt.check_gradient(victim.model.requires_grad_(True), victim.data, victim.arch)
        victim.model.requires_grad_(False)
    kept = () if forward else FLOAT32  # long passes gain by it on small networks, too
    victim.model.bfloat16 = uses_bfloat16(args.precision, victim.arch, device, kept)
    victim.data.spec = victim.data.spec.of(victim.arch)
    args.precision = "bfloat16" if victim.model.bfloat16 else "float32"
    return victim


def clean_share(args, victim, share):
    """Indices of the defender's clean images, which the network must read; see `defence_flags`."""
    x, y = victim.data.x_train, victim.data.y_train
    if args.data_fraction is None:
        args.data_fraction = max(share[0], min(1.0, share[1] / len(x)))
    split = defender_split(y, args.data_fraction, args.seed)
    check_reading(victim.model, x[split], y[split])
    return split


def check_reading(model, x, y):
    """Print the accuracy on own images (uint8); by class, fail near chance, warn where poor."""
    print(f"accuracy on {len(x)} given images: {accuracy(model, x, y):.2f}")
    chance = 1 / max(2, len(y.unique()))
    skill = (accuracy(model, x, y, balanced=True) / 100 - chance) / (1 - chance)
    causes = "are --arch, --mean, --std and the order of the labels right?"
    if skill < NEAR_CHANCE:
        fail(f"the network is near chance on these images, so no verdict would mean much: {causes}")
    if skill < POOR:
        print(f"warning: this is poor, and the verdict with it; {causes}")


def report_verdict(decision, args, notes, doubt=False):
    """Print a detector's norms, one note per label, and its verdict by both rules.

    `decision` is that of common.metrics.verdict; in `doubt` only a named label makes a verdict.
    Returns it as metrics for result.json, with `flagged`, the labels that --rule repairs.
    """
    metrics = {key: value for key, value in decision.items() if key != "conclusive"}
    metrics["flagged"] = decision["below" if args.rule == "p" else "flagged_by_index"]
    for label, note in enumerate(notes):
        index = decision["indices"] and decision["indices"][label]
        print(f"label {label}: index {'n/a' if index is None else f'{index:.2f}'} {note}")
    if not decision["conclusive"]:
        print("verdict: inconclusive, for it needs 5 successful searches and half of the labels")
        print(NOTHING)
        return metrics | {"verdict": "inconclusive"}
    named = [f"labels {decision[k]} {k} the others" for k in ("below", "above") if decision[k]]
    metrics["verdict"] = "backdoored" if named else "inconclusive" if doubt else "no evidence"
    by_index = decision["flagged_by_index"]
    answer = f"backdoored, labels {by_index}" if by_index else "clean"
    own = ", ".join([f"{metrics['verdict']}, p = {decision['p_value']:.3g}", *named])
    print(f"verdict: {own}; by the paper's rule (index > {args.threshold:g}): {answer}")
    ratio = "undefined" if decision["ratio"] is None else f"{decision['ratio']:.2f}"
    index = f"index {decision['index']:.2f}, ratio to the median {ratio}"
    print(f"smallest norm: label {decision['label']}, {index}")
    if not metrics["flagged"]:
        print("a large norm is no shortcut to undo: no repair" if decision["above"] else NOTHING)
    elif not decision["below"]:
        print(f"--rule index: the repair follows the paper's rule, label {metrics['flagged'][0]}")
    return metrics


def in_parts(search, labels, at_once):
    """[search(part), ...] for parts of `at_once` labels, of fewer where GPU memory runs out."""
    if len(labels) < 5:
        print(f"warning: {len(labels)} labels are too few for a verdict; their triggers are drawn")
    results, done, told = [], 0, False
    while done < len(labels):
        try:
            results.append(search(labels[done : done + at_once]))
            done += at_once
        except torch.OutOfMemoryError:
            if at_once == 1:
                fail("the GPU's memory does not hold one label: try a smaller --batch-size")
            if not told:
                print("the GPU's memory does not hold so many labels at once: halving them")
            at_once, told = at_once // 2, True
            torch.cuda.empty_cache()
    return results


def halving(repair, lr, model, x, y, seed, max_drop=None, what="repair"):
    """repair(lr=lr), at half the rate again while it diverges (None) or costs over max_drop (5).

    Points of balanced accuracy, for a rare class would be lost unseen, on clean images x, y that
    it does not see; all tries have the same draws. Returns the model, or None, and the last rate.
    """
    before, max_drop = accuracy(model, x, y, balanced=True), max_drop or MOST_DROP
    for part in range(TRIES):
        torch.manual_seed(seed)
        repaired = repair(lr=lr / 2**part)
        after = math.nan if repaired is None else accuracy(repaired, x, y, balanced=True)
        fall = f"{before:.2f} -> {after:.2f} on {len(x)} clean images that were kept back"
        print(f"{what} at rate {lr / 2**part:g}: {fall}")
        if after >= before - max_drop - 1e-9:
            return repaired, lr / 2**part
    print(f"every {what} diverged or cost over {max_drop:g} points, so none is saved")
    return None, lr / 2**part


def careful_repair(repair, control, model, x, y, *, lr, seed, suffix=""):
    """repair(model, x, y, lr=...) on four fifths of the clean images x (uint8), y, by class.

    It is checked on the last fifth, see `halving`. Returns {"_repaired": model, "_clean_only": that
    of `control` at the same rate}, with the suffix, and the rate; no "_repaired" where every repair
    cost too much, and nothing where no image can be kept back.
    """
    kept = kept_back(y, KEPT_BACK, seed)
    if kept.all():
        print(f"no repair: each of the {len(y)} clean images is the only one of its class")
        return {}, lr
    part = model, x[~kept], y[~kept]
    repaired, lr = halving(partial(repair, *part), lr, model, x[kept], y[kept], seed)
    torch.manual_seed(seed)
    made = {"_repaired": repaired, "_clean_only": control(*part, lr=lr)}
    return {kind + suffix: net for kind, net in made.items() if net is not None}, lr


def frozen(model, x):
    """The repaired model in eval mode, frozen; None if its outputs on floats x are not finite."""
    model = model.eval().requires_grad_(False)
    return model if all(model(part).isfinite().all() for part in x.split(pass_size(x))) else None


def save_repaired(folder, models, victim, args, metrics, trigger=None):
    """Write models["_repaired"], where there is one, as a checkpoint, and put it as read back."""
    if "_repaired" in models:
        path, data = folder / "model.pt", victim.data
        ckpt.save_model(folder, models["_repaired"], data, victim.arch, args, metrics, trigger)
        read = ckpt.read_checkpoint(path)
        models["_repaired"] = ckpt.load_model(read, path, data.x_train.device, victim.arch)


def evaluate(victim, models, decision=None):
    """Figures of each of `models` (suffix -> network) on test images, for below the oracle wall.

    clean_accuracy, asr (the target is predicted) and robust_accuracy (the true label), in per cent;
    the last two where the attack left its triggered test images. With a detector's `decision` also
    the true target, the case of Zheng et al. (by the paper's rule) and whether the p-value names
    the target on either side, where the attack has one target label.
    """
    data, metrics = victim.data, {}
    for suffix, net in models.items():
        metrics["clean_accuracy" + suffix] = accuracy(net, data.x_test, data.y_test)
        if victim.x_poisoned is not None:
            metrics["asr" + suffix] = accuracy(net, victim.x_poisoned, victim.y_target)
            metrics["robust_accuracy" + suffix] = accuracy(net, victim.x_poisoned, victim.y_true)
    if victim.x_poisoned is None:
        print("no poisoned test images beside the checkpoint: the ASR cannot be measured")
        return metrics
    metrics["asr_n"], targets = len(victim.x_poisoned), victim.y_target.unique().tolist()
    if decision is not None and len(targets) == 1:
        (metrics["target"],) = (target,) = targets
        if decision["conclusive"]:
            metrics["case"] = case_of(decision["flagged_by_index"], target)
            metrics["target_found"] = target in decision["below"] + decision["above"]
    return metrics


def report(folder, script, args, metrics, seconds, kinds=("repaired",)):
    """Print accuracy and ASR before and after (`kinds`: the metrics' suffixes), save the result."""
    for name in ("clean_accuracy", "asr"):
        if name in metrics:
            found = [(metrics.get(f"{name}_{kind}"), kind.replace("_", " ")) for kind in kinds]
            after = ", ".join(f"{value:.2f} {kind}" for value, kind in found if value is not None)
            arrow = f" -> {after}" if after else ""
            print(f"{name.replace('_', ' ')}: {metrics[name]:.2f}{arrow}")
    written = [f for kind in ("*.png", "*.csv", "*.npz", "model.pt") for f in folder.glob(kind)]
    print(f"written: {', '.join(sorted(map(str, written)))}")
    ckpt.save_result(folder, script, args, seconds, metrics, pick_device(args.device))
