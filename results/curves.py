"""Draw figures of the papers from stored runs; bash runs.sh stealthy and lecture call it.

gtsrb-stealthy-epochs.png: Feng et al. 2022, Fig. 4 (ASR and clean accuracy by epoch and epsilon)
and Fig. 5(a) (the norm of the mask that the attacker's own Neural Cleanse finds, with and without
adversarial training). lecture-mcr-curves.png: Nguyen & Tran 2020, Fig. 6 (what mode connectivity
leaves, by the place t on the curve).

    python results/curves.py
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail, saved_figure

HERE = Path(__file__).resolve().parent
RUN = "runs/gtsrb-nc_gtsrb_cnn-stealthy_{}-s0"
EPSILONS = {"epsilon_0.005": ".005", "adversarial": ".01", "epsilon_0.02": ".02"}
TRAINED = {"adversarial": "adversarial", "no_adversarial": "not adversarial"}
CURVE = "runs/cifar10-wrn16_1-{}-s0/mcr-s0"
ATTACKS = "badnets", "input_aware"


def draw(path, runs):
    """Both panels from {name: metrics} of runs, of which some may be missing."""
    with saved_figure(path, 1, 2, figsize=(9, 3.2)) as (_, (left, right)):
        for colour, (name, epsilon) in enumerate(EPSILONS.items()):
            if name in runs:
                epochs = range(1, len(runs[name]["asrs"]) + 1)
                style = {"color": f"C{colour}"}
                left.plot(epochs, runs[name]["asrs"], label=f"epsilon {epsilon}", **style)
                left.plot(epochs, runs[name]["clean_accuracies"], linestyle="--", **style)
        for name, label in TRAINED.items():
            if name in runs:
                norms = runs[name]["mask_norms"]
                right.plot(range(1, len(norms) + 1), norms, label=label)
        left.set(xlabel="epoch of the injection", ylabel="% of test images")
        right.set(xlabel="epoch of the injection", ylabel="|m*|")
        for axis in (left, right):
            axis.legend()


def draw_connectivity(path, runs):
    """The clean error and the ASR by t, a panel for each of {name: metrics} of mcr.py."""
    with saved_figure(path, 1, len(runs), figsize=(3.4 * len(runs), 3), squeeze=False) as drawn:
        for axis, (name, m) in zip(drawn[1].flat, runs.items()):
            errors = [100 - accuracy for accuracy in m["curve_clean_accuracy"]]
            axis.plot(m["points"], errors, marker=".", label="clean error")
            axis.plot(m["points"], m["curve_asr"], marker=".", label="ASR")
            if m["t"] is not None:
                axis.axvline(m["t"], color="grey", linewidth=0.8, label=f"repaired: t = {m['t']:g}")
            axis.set(xlabel=f"t, {name}", ylabel="% of test images", ylim=(-3, 103))
            axis.legend(fontsize=7)


def stored(name, folder, names, key):
    """{name: metrics} of the runs in results/<name>.json that have the figure `key`."""
    path = HERE / f"{name}.json"
    entries = json.loads(path.read_text()) if path.exists() else []
    folders = {entry["folder"]: entry["metrics"] for entry in entries}
    found = {name: folders.get(folder.format(name), {}) for name in names}
    return {name: metrics for name, metrics in found.items() if key in metrics}


if __name__ == "__main__":
    figures = {
        "gtsrb-stealthy-epochs.png": (draw, stored("gtsrb", RUN, EPSILONS | TRAINED, "asrs")),
        "lecture-mcr-curves.png": (
            draw_connectivity, stored("lecture", CURVE, ATTACKS, "curve_asr")
        ),
    }  # fmt: skip
    if not any(runs for _, runs in figures.values()):
        fail("no stored run with its epochs or its curve; bash runs.sh stealthy or lecture")
    for name, (drawn, runs) in figures.items():
        if runs:
            drawn(HERE / name, runs)
            print(f"wrote {HERE / name}: {', '.join(runs)}")
