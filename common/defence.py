"""What every defence script shares and no paper describes: flags, loading, verdicts, reports."""

import argparse

import torch

from common import fail
from common.checkpoint import load_model, load_victim, read_checkpoint, save_model, save_result
from common.datasets import defender_split, pick_device
from common.metrics import accuracy, case_of


def defence_flags(doc, share=None):
    """The ArgumentParser of a defence with the flags that all of them have; `doc` is its header.

    `share` is --data-fraction's default and its least number of images; None: no such flag.
    """
    p = argparse.ArgumentParser(description=doc.splitlines()[0])
    p.add_argument("--ckpt", required=True, help="checkpoint folder, model.pt or bare state dict")
    p.add_argument("--arch", help="architecture of a bare state dict")
    p.add_argument("--dataset", help="dataset of a bare state dict, or its path")
    p.add_argument("--mean", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--std", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--out", help="folder to write (default: <checkpoint folder>/<defence>-s<seed>)")
    if share is not None:
        default = f"(default: {share[0]:g}, at least {share[1]} images)"
        p.add_argument("--data-fraction", type=float, help=f"share of the training data {default}")
    return p


def open_victim(args):
    """Seed every random draw and load the checkpoint and its data onto the device."""
    torch.manual_seed(args.seed)
    return load_victim(args, pick_device(args.device))


def clean_share(args, data, share):
    """Indices of the defender's clean images; fills in --data-fraction from `share`, as above."""
    if args.data_fraction is None:
        args.data_fraction = max(share[0], min(1.0, share[1] / len(data.x_train)))
    return defender_split(data.y_train, args.data_fraction, args.seed)


def report_verdict(decision, threshold, notes):
    """Print a detector's norms, one note per label, and its verdict by both rules.

    `decision` is that of common.metrics.verdict. Returns it as metrics for result.json.
    """
    indices, flagged = decision["indices"], decision["flagged"]
    for label, note in enumerate(notes):
        index = "n/a" if indices is None else f"{indices[label]:.2f}"
        print(f"label {label}: index {index} {note}")
    metrics = {k: decision[k] for k in ("index", "indices", "label", "ratio", "p_value", "flagged")}
    if not decision["applicable"]:
        print(f"verdict: not applicable, {len(notes)} labels are fewer than the index's 5")
        return metrics | {"verdict": "not-applicable"}
    metrics["verdict"] = "backdoored" if flagged else "clean"
    target = f", target label {flagged[0]}" if flagged else ""
    print(f"verdict by the paper's rule (index > {threshold:g}): {metrics['verdict']}{target}")
    ratio = "undefined" if decision["ratio"] is None else f"{decision['ratio']:.2f}"
    print(
        f"smallest norm: label {decision['label']}, anomaly index {decision['index']:.2f}, "
        f"p = {decision['p_value']:.4f} under a clean model, ratio to the median {ratio}"
    )
    if not flagged:
        print("nothing is flagged, so nothing is repaired")
    return metrics


def frozen(model, x):
    """The repaired model in eval mode, frozen; fails if its outputs on floats x are not finite."""
    model = model.eval().requires_grad_(False)
    if not model(x).isfinite().all():
        fail("the repaired model's outputs are not finite; no model is kept")
    return model


def save_repaired(folder, model, victim, args, metrics, trigger=None):
    """Write the repaired model as a checkpoint and return it as it is read back."""
    save_model(folder, model, victim.data, victim.arch, args, metrics, trigger)
    path = folder / "model.pt"
    return load_model(read_checkpoint(path), path, victim.data.x_train.device)


def evaluate(victim, models, decision=None):
    """Figures of each of `models` (suffix -> network) on test images, for below the oracle wall.

    clean_accuracy, asr (the target is predicted) and robust_accuracy (the true label), in per cent;
    the last two where the attack left its triggered test images. With a detector's `decision` also
    the true target and the case of Zheng et al., where the attack has one target label.
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
    if decision is not None and decision["applicable"] and len(targets) == 1:
        metrics |= {"target": targets[0], "case": case_of(decision["flagged"], targets[0])}
    return metrics


def report(folder, script, args, metrics, seconds, kinds=("repaired",)):
    """Print accuracy and ASR before and after (`kinds`: the metrics' suffixes), save the result."""
    for name in ("clean_accuracy", "asr"):
        if name in metrics:
            found = [(metrics.get(f"{name}_{kind}"), kind.replace("_", " ")) for kind in kinds]
            after = ", ".join(f"{value:.2f} {kind}" for value, kind in found if value is not None)
            arrow = f" -> {after}" if after else ""
            print(f"{name.replace('_', ' ')}: {metrics[name]:.2f}{arrow}")
    print(f"figures: {', '.join(map(str, sorted(folder.glob('*.png'))))}")
    save_result(folder, script, args, seconds, metrics, pick_device(args.device))
