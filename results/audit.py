"""Audit one checkpoint by every detector that needs only a model and clean images.

    bash runs.sh audit SUSPECT --arch preact_resnet18 --dataset cifar10

Each detector runs as a script of its own, with the flags given here. The verdict over all is by
Holm's rule for several p-values. Exit code 0: no evidence, 10: backdoored, 11: inconclusive, 2: bad
input. The folder holds the detectors' folders, their logs, audit.png and audit.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail, make_folder, saved_figure, written_whole

METHODS = Path(__file__).resolve().parents[1] / "methods"
DETECTORS = {"nc": [], "generator_reverse": ["--lpips-net", "none"]}
CODES = {"no evidence": 0, "backdoored": 10, "inconclusive": 11}
ALPHA = 0.05


def holm(p_values):
    """Holm's adjusted p-values of the same order (Holm 1979): {name: p} -> {name: p}."""
    adjusted, largest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def verdict_over_all(found):
    """ "backdoored" where an adjusted p is below .05, else "inconclusive" where any detector is."""
    p_values = {name: m["p_value"] for name, m in found.items() if m["p_value"] is not None}
    adjusted = holm(p_values)
    if any(p < ALPHA for p in adjusted.values()):
        return "backdoored", adjusted
    missing = len(p_values) < len(found)
    return "inconclusive" if missing else "no evidence", adjusted


def suspects(m):
    """The labels that a detector names, else the one with the smallest norm, with their side."""
    named = [f"{label} {side}" for side in ("below", "above") for label in m[side]]
    return ", ".join(named) or f"({m['label']})"


def show(found, adjusted, seconds):
    """The table of all detectors, aligned."""
    rows = [("detector", "label", "ratio", "p", "p (Holm)", "verdict", "seconds")]
    for name, m in found.items():
        p, ratio = m["p_value"], m["ratio"]
        figures = "n/a" if ratio is None else f"{ratio:.2f}", "n/a" if p is None else f"{p:.4f}"
        holm = f"{adjusted[name]:.4f}" if name in adjusted else "n/a"
        rows.append((name, suspects(m), *figures, holm, m["verdict"], f"{seconds[name]:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def draw(path, folder, found):
    """Norms per label of each detector, and what it reversed for the most suspicious ones."""
    import matplotlib.pyplot as plt

    pictures = {"nc": "reversed.png", "generator_reverse": "generated.png"}
    with saved_figure(path, 2, len(found), figsize=(7 * len(found), 8), squeeze=False) as (_, axes):
        for (name, m), (top, below) in zip(found.items(), axes.T):
            named = {*m["below"], *m["above"]}
            labels = range(len(m["norms"]))
            colours = ["C3" if k in named else "C0" for k in labels]
            top.bar(labels, np.array(m["norms"], dtype=float), color=colours)
            p = "n/a" if m["p_value"] is None else f"{m['p_value']:.4f}"
            top.set(title=f"{name}: {m['verdict']}, p = {p}", xlabel="label", ylabel="norm")
            below.imshow(plt.imread(folder / name / pictures[name]))
            below.axis("off")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("suspect", help="checkpoint folder, model.pt or bare state dict")
    p.add_argument("--out", help="folder to write (default: runs/audit-<name>)")
    args, flags = p.parse_known_args()
    if any(flag.startswith("--ckpt") for flag in flags):
        fail("the checkpoint stands without --ckpt: bash runs.sh audit SUSPECT")
    name = Path(args.suspect).resolve()
    folder = make_folder(args.out or f"runs/audit-{name.stem if name.suffix else name.name}")
    found, seconds = {}, {}
    for detector, own in DETECTORS.items():
        print(f"{detector} ...", end=" ", flush=True)
        command = [sys.executable, METHODS / f"{detector}.py", "--ckpt", args.suspect]
        command += ["--out", folder / detector]
        start, log = time.time(), folder / f"{detector}.log"
        with open(log, "w") as file:
            done = subprocess.run([*command, *own, *flags], stdout=file, stderr=subprocess.PIPE)
        seconds[detector] = time.time() - start
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        if done.returncode:
            print("stopped")
            fail(lines[-1].removeprefix("error: ") if lines else f"{detector} failed, see {log}")
        found[detector] = json.loads((folder / detector / "result.json").read_text())["metrics"]
        print(f"{found[detector]['verdict']} ({seconds[detector]:.0f} s, log: {log})")
    answer, adjusted = verdict_over_all(found)
    print()
    show(found, adjusted, seconds)
    draw(folder / "audit.png", folder, found)
    with written_whole(folder / "audit.json") as path:
        summary = {"suspect": args.suspect, "verdict": answer, "p_holm": adjusted}
        path.write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nverdict over all: {answer}. Pictures: {folder / 'audit.png'}")
    sys.exit(CODES[answer])
