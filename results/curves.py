"""Draw gtsrb-stealthy-epochs.png: the stealthy attack by epoch, of the stored runs.

    python results/curves.py      # bash runs.sh stealthy calls it

Feng et al. 2022, Fig. 4 (ASR and clean accuracy by epoch and epsilon) and Fig. 5(a) (the norm of
the mask that the attacker's own Neural Cleanse finds, with and without adversarial training).
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


if __name__ == "__main__":
    stored = HERE / "gtsrb.json"
    entries = json.loads(stored.read_text()) if stored.exists() else []
    folders = {entry["folder"]: entry["metrics"] for entry in entries}
    runs = {name: folders.get(RUN.format(name), {}) for name in EPSILONS | TRAINED}
    runs = {name: metrics for name, metrics in runs.items() if "asrs" in metrics}
    if not runs:
        fail("results/gtsrb.json holds no stealthy run with its epochs; bash runs.sh stealthy")
    draw(HERE / "gtsrb-stealthy-epochs.png", runs)
    print(f"wrote {HERE / 'gtsrb-stealthy-epochs.png'}: {', '.join(runs)}")
