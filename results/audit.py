"""Audit one checkpoint by every detector that needs only a model and clean images.

    bash runs.sh audit SUSPECT --arch preact_resnet18 --dataset cifar10

Each detector runs as a script of its own, with the flags given here, which all of them must have:
--arch, --dataset, --classes, --image-size, --mean, --std, --data-dir, --data-fraction, --seed,
--device, --precision, --rule and others (`python methods/nc.py -h` tells about them). The verdict
over all is by Holm's rule for several p-values. Exit code 0: no evidence, 10: backdoored, 11:
inconclusive, 2: bad input, or a detector refused to go on, 1: a detector crashed, 130: interrupted.
The folder holds the detectors' folders, their logs, audit.png and audit.json.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail, make_folder, saved_figure, written_whole
from common.datasets import read_npz

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
    missing = any(m["verdict"] == "inconclusive" for m in found.values())
    return "inconclusive" if missing else "no evidence", adjusted


def suspects(m):
    """The labels that a detector names, else the one with the smallest norm, with their side."""
    named = [f"{label} {side}" for side in ("below", "above") for label in m[side]]
    return ", ".join(named) or ("n/a" if m["label"] is None else f"({m['label']})")


def show(found, adjusted, seconds):
    """The table of all detectors, aligned."""
    rows = [("detector", "label", "ratio", "p", "p (Holm)", "verdict", "seconds")]
    for name, m in found.items():
        p, ratio = m["p_value"], m["ratio"]
        figures = "n/a" if ratio is None else f"{ratio:.2f}", "n/a" if p is None else f"{p:.3g}"
        holm = f"{adjusted[name]:.3g}" if name in adjusted else "n/a"
        rows.append((name, suspects(m), *figures, holm, m["verdict"], f"{seconds[name]:.0f}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def shown_labels(m):
    """Up to four labels for the picture: those that the detector names, then the smallest norms."""
    norms = np.array(m["norms"], dtype=float)
    order = [*m["below"], *m["above"], *norms.argsort().tolist()]
    return list(dict.fromkeys(order))[:4]


def stamped(folder, labels):
    """A clean image and Neural Cleanse's reversed triggers on it, side by side (H x W x C)."""
    masks, patterns, image = read_npz(folder / "reversed.npz", ["masks", "patterns", "image"])
    made = [image / 255, *((1 - masks[k]) * image / 255 + masks[k] * patterns[k] for k in labels)]
    made = np.concatenate([np.pad(x, ((0, 0), (0, 0), (0, 2)), constant_values=1) for x in made], 2)
    return made[:, :, :-2].transpose(1, 2, 0)  # two white columns between them


def draw(path, folder, found):
    """Norms per label of each detector (grey: its search failed), and what it reversed."""
    from matplotlib.image import imread

    with saved_figure(path, 2, len(found), figsize=(7 * len(found), 8), squeeze=False) as (_, axes):
        for (name, m), (top, below) in zip(found.items(), axes.T):
            named, labels = {*m["below"], *m["above"]}, range(len(m["norms"]))
            colours = ["C3" if k in named else "C0" if m["found"][k] else "0.7" for k in labels]
            top.bar(labels, np.array(m["norms"], dtype=float), color=colours)
            p = "n/a" if m["p_value"] is None else f"{m['p_value']:.3g}"
            top.set(title=f"{name}: {m['verdict']}, p = {p}", xlabel="label", ylabel="norm")
            if name == "nc":
                below.imshow(stamped(folder / name, shown_labels(m)), cmap="gray", vmin=0, vmax=1)
                names = ", ".join(map(str, shown_labels(m)))
                below.set_title(f"a clean image, and the triggers of {names} on it")
            else:
                below.imshow(imread(folder / name / "generated.png"))
            below.axis("off")


def check_flags(suspect, flags):
    """Every detector must know every flag, before the first of them runs."""
    for detector, own in DETECTORS.items():
        sys.argv = [f"{detector}.py", "--ckpt", suspect, *own, *flags]
        importlib.import_module(f"methods.{detector}").parse_args()


def run(detector, command, log):
    """One detector, its output and errors in `log`; its metrics. A refusal is passed on.

    An earlier audit of the same folder stays until a detector has taken its input.
    """
    result = Path(command[command.index("--out") + 1]) / "result.json"
    before = result.stat().st_mtime_ns if result.is_file() else None
    with open(log, "w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE)
        errors = done.stderr.decode(errors="replace")
        file.write(errors)
    if done.returncode == 2 and errors.strip():
        print("stopped")
        fail(errors.strip().splitlines()[-1].removeprefix("error: "))
    for old in ("audit.json", "audit.png"):
        (log.parent / old).unlink(missing_ok=True)
    if done.returncode or not result.is_file() or result.stat().st_mtime_ns == before:
        print("stopped")
        sys.exit(f"error: {detector} crashed: see {log}")
    return json.loads(result.read_text())["metrics"]


if __name__ == "__main__":
    usage = "bash runs.sh audit SUSPECT [--out OUT] [flags that all of the detectors have]"
    whole = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=whole)
    p.error = fail
    p.add_argument("suspect", help="checkpoint folder, model.pt or bare state dict; stands first")
    p.add_argument("--out", help="folder to write (default: runs/audit-<name>)")
    if sys.argv[1:2] and sys.argv[1].startswith("-") and sys.argv[1] not in ("-h", "--help"):
        fail("the suspect stands first: bash runs.sh audit SUSPECT [FLAGS]")
    args, flags = p.parse_known_args()
    if any(flag.split("=")[0] in ("--ck", "--ckp", "--ckpt") for flag in flags):
        fail("the checkpoint stands without --ckpt: bash runs.sh audit SUSPECT")
    check_flags(args.suspect, flags)
    name = Path(args.suspect).resolve()
    name = name.parent if name.name == "model.pt" else name
    folder = Path(args.out or f"runs/audit-{name.name if name.is_dir() else name.stem}")
    held = folder / "audit.json"
    try:
        other = json.loads(held.read_text())["suspect"] if held.exists() else args.suspect
    except (OSError, ValueError, TypeError, KeyError):
        fail(f"{held} is no audit's: --out names another folder")
    if Path(other).resolve() != Path(args.suspect).resolve():
        fail(f"{folder} holds the audit of {other}; --out names another folder")
    fresh = not folder.exists()
    make_folder(folder)
    found, seconds = {}, {}
    for detector, own in DETECTORS.items():
        print(f"{detector} ...", end=" ", flush=True)
        command = [sys.executable, METHODS / f"{detector}.py", "--ckpt", args.suspect]
        command += ["--out", folder / detector, *own, *flags]
        start, log = time.time(), folder / f"{detector}.log"
        try:
            found[detector] = run(detector, command, log)
        except (SystemExit, KeyboardInterrupt) as stop:
            stopped = isinstance(stop, KeyboardInterrupt)
            if fresh and not found and (stopped or stop.code == 2):
                shutil.rmtree(folder)
            if stopped:
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            raise
        seconds[detector] = time.time() - start
        print(f"{found[detector]['verdict']} ({seconds[detector]:.0f} s, log: {log})")
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith(("accuracy on", "warning:")):
                print(f"  {line}")
    answer, adjusted = verdict_over_all(found)
    print()
    show(found, adjusted, seconds)
    draw(folder / "audit.png", folder, found)
    with written_whole(folder / "audit.json") as path:
        accuracy = next(iter(found.values())).get("clean_accuracy")
        summary = {"suspect": args.suspect, "verdict": answer, "p_holm": adjusted}
        path.write_text(json.dumps(summary | {"clean_accuracy": accuracy}, indent=1) + "\n")
    print(f"\nverdict over all: {answer}. Pictures: {folder / 'audit.png'}")
    if answer != "backdoored" and any(m["verdict"] == "backdoored" for m in found.values()):
        print("A detector alone says backdoored; Holm's rule over all of them does not.")
    if answer == "no evidence":
        print("This is no proof of innocence: see 'Where it fails' in the detectors' headers.")
    sys.exit(CODES[answer])
