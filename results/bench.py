"""Speed: folded against label by label, and throughputs beside the bare network's.

python results/bench.py runs/bench

Reads the runs that `bash runs.sh bench` made in that folder; the throughputs are measured here, on
its victim, in alternation, and medians are printed.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import load_victim
from common.datasets import pick_device, to_float
from common.metrics import predict
from methods import fine_pruning, freq_backdoor, strip

BATCH = 2000  # STRIP's default


def folding(folder):
    """Seconds, ratio and agreement of the folded and the label-by-label runs."""
    for method in ("nc", "generator_reverse"):
        alone, folded = (
            [json.loads(p.read_text()) for p in sorted(folder.glob(f"{method}-{kind}-*/*.json"))]
            for kind in ("1", "default")
        )
        a, b = alone[0]["metrics"], folded[0]["metrics"]
        slow, fast = (
            statistics.median(run["metrics"]["search_seconds"] for run in runs)
            for runs in (alone, folded)
        )
        gap = max(abs(p - q) / max(abs(p), 1e-9) for p, q in zip(a["norms"], b["norms"]))
        same = "same" if (a["verdict"], a["flagged"]) == (b["verdict"], b["flagged"]) else "OTHER"
        print(
            f"{method}, K = {len(a['norms'])}, {folded[0]['device']}, median of {len(alone)}: one "
            f"label at a time {slow:.1f} s, folded {fast:.1f} s, ratio {slow / fast:.2f}; "
            f"{same} verdict, largest relative difference of a norm {gap:.1e}"
        )


def medians(calls, device, repeats=7):
    """Median seconds of each of the named calls, taken in turn after one warm-up of each."""
    seconds = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def throughputs(folder):
    """STRIP and the prune curve beside the bare network, and the heat map's images per second."""
    device = pick_device("auto")
    given = {"ckpt": folder / "victim", "arch": None, "dataset": None, "data_dir": "data"}
    victim = load_victim(argparse.Namespace(**given, mean=None, std=None, out=None), device)
    model, data = victim.model, victim.data
    x, y = data.x_train[:1000], data.y_train[:1000]
    overlays, inputs = x[:100], x[100:140]
    floats = to_float(x.repeat(4, 1, 1, 1)).split(BATCH)
    relu, linear, above = next(iter(fine_pruning.LAYERS[victim.arch].values()))
    layer = next(iter(fine_pruning.LAYERS[victim.arch]))
    _, bases = freq_backdoor.fourier_bases(*data.shape[1:])
    bases = bases.to(device)[:64]

    def prune_curve():
        scores, features = fine_pruning.activations(model, layer, relu, linear, x)
        order = scores.argsort(stable=True)
        fine_pruning.curve(model, linear, above, features, y, order)

    taken = medians(
        {
            "bare": lambda: [model(part) for part in floats],
            "strip": lambda: strip.entropies(
                model, inputs, overlays, "add", BATCH, tqdm(disable=True)
            ),
            "evaluation": lambda: predict(model, x),
            "curve": prune_curve,
            "map": lambda: freq_backdoor.heat_map(model, to_float(x[:100]), y[:100], bases, 4.0),
        },
        device,
    )
    name = f"{victim.arch} on {data.name}"
    rate = 100 * taken["bare"] / taken["strip"]
    print(
        f"STRIP, {name}, batch {BATCH}: {4000 / taken['strip']:.0f} superimposed images/s, "
        f"{rate:.0f} % of the bare forward pass"
    )
    channels = model.net.get_submodule(linear).in_features
    print(
        f"prune curve, {channels} points of {len(x)} images: {taken['curve']:.3f} s, "
        f"{taken['curve'] / taken['evaluation']:.2f} evaluations"
    )
    print(f"heat map: {64 * 100 / taken['map']:.0f} images/s")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, help="the folder of `bash runs.sh bench`")
    args = p.parse_args()
    folding(args.folder)
    throughputs(args.folder)
