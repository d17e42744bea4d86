"""Speed: folded against label by label, bfloat16 against float32, throughputs beside the bare net.

python results/bench.py runs/bench/victim

`bash runs.sh bench` trains that victim. What is compared runs in alternation; medians are printed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.checkpoint import load_victim
from common.datasets import pick_device, to_float
from common.metrics import pass_size, predict, verdict
from common.models import build_model, uses_bfloat16
from methods import fine_pruning, freq_backdoor, generator_reverse, nc, strip

BATCHES = 100, 200, 500, 1000, 2000  # of the bare network; its best is what STRIP is held against


def medians(calls, device, repeats):
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


def folding(victim, device, repeats, images=400, steps=20):
    """Seconds, ratio and agreement of folded labels against the same code label by label."""
    model, data = victim.model, victim.data
    x, y = to_float(data.x_train[:images]), data.y_train[:images]
    labels = list(range(data.classes))
    recipe = {"lambdas": (0.1, 1.0, 0.1), "lpips_net": None, "batch_size": 64, "seed": 0}
    goal = {"width": 8, "goal": 0.1, "steps": 10 * steps, "lr": 1e-3}
    origin, *_ = generator_reverse.pretrain(x, **goal, **recipe)

    def triggers(some):
        search = {"steps": steps, "batches": 8, "batch_size": 64, "lr": 0.1, "seed": 0}
        return nc.reverse_triggers(model, x, y, some, **search)[2:]

    def generators(some):
        # a small rate, for Adam's steps at a large one amplify the last digit's rounding
        settings = {
            "steps": steps,
            "lr": 1e-4,
            "lambda1": torch.full((len(some),), 0.1, device=device),
        }
        trained, _ = generator_reverse.train_generators(
            model, origin, x, y, some, **settings, **recipe
        )
        norms, asrs = generator_reverse.evaluate_generators(model, origin, trained, x, y, some)
        return norms, [asr >= 0.8 for asr in asrs]

    at_once = data.classes if device.type == "cuda" else 2
    for name, search in (("nc", triggers), ("generator_reverse", generators)):
        results = {}

        def run(at_once, search=search, results=results):
            parts = [search(labels[k : k + at_once]) for k in range(0, data.classes, at_once)]
            results[at_once] = [[v for part in lists for v in part] for lists in zip(*parts)]

        taken = medians({1: lambda: run(1), at_once: lambda: run(at_once)}, device, repeats)
        (slow, fast), (alone, folded) = taken.values(), (results[1], results[at_once])
        gap = max(abs(p - q) / max(abs(p), 1e-9) for p, q in zip(alone[0], folded[0]))
        flagged = [verdict(*found)["flagged_by_index"] for found in (alone, folded)]
        same = flagged[0] == flagged[1]
        print(
            f"{name}, {victim.arch} on {data.name}, K = {data.classes}, batch 64, {device}, "
            f"median of {repeats}: one label at a time {slow:.1f} s, {at_once} at once "
            f"{fast:.1f} s, ratio {slow / fast:.2f}; {'same' if same else 'OTHER'} verdict, "
            f"largest relative difference of a norm {gap:.1e}"
        )


def precisions(arch, device, repeats, images=128):
    """Seconds of bfloat16 against float32: a training step, Neural Cleanse's and the generators'.

    The network has fresh weights and 10 classes, and the images, 3 x 32 x 32, are noise.
    """
    if not uses_bfloat16("auto", arch, device):
        print(f"{arch}, {device}: --precision auto computes in float32 here")
        return
    model = build_model(arch, 10, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x, y = torch.rand(images, 3, 32, 32, device=device), torch.arange(images, device=device) % 10
    recipe = {"lambdas": (0.1, 1.0, 0.1), "lpips_net": None, "batch_size": 32, "seed": 0}
    origin, *_ = generator_reverse.pretrain(x, width=8, goal=1, steps=1, lr=1e-3, **recipe)

    def training():
        model.train()
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def triggers():
        search = {"steps": 1, "batches": 1, "batch_size": 32, "lr": 0.1, "seed": 0}
        nc.reverse_triggers(model.eval(), x, y, [0, 1], **search)

    def generators():
        settings = {"steps": 1, "lr": 1e-3, "lambda1": torch.full((2,), 0.1, device=device)}
        generator_reverse.train_generators(model.eval(), origin, x, y, [0, 1], **settings, **recipe)

    for name, call in (("training", training), ("nc", triggers), ("generators", generators)):

        def run(half, call=call):
            model.bfloat16 = half
            call()

        taken = medians(
            {half: lambda half=half: run(half) for half in (False, True)}, device, repeats
        )
        print(
            f"{name}, {arch}, a step, {device}, median of {repeats}: float32 {taken[False]:.3f} s, "
            f"bfloat16 {taken[True]:.3f} s, ratio {taken[False] / taken[True]:.2f}"
        )


@torch.no_grad()
def throughputs(victim, device, repeats, images=1000):
    """STRIP and the prune curve beside the bare network, and the heat map's images per second."""
    model, data = victim.model, victim.data
    x, y = data.x_train[:images], data.y_train[:images]
    overlays, inputs = x[: images // 10], x[-images // 25 :]
    floats = to_float(x[: len(inputs)].repeat_interleave(len(overlays), 0))
    layer = fine_pruning.LAYERS[victim.arch][0]
    _, bases = freq_backdoor.fourier_bases(*data.shape[1:])
    bases = bases.to(device)[:64]

    def prune_curve():
        scores, features = fine_pruning.activations(model, layer, x)
        fine_pruning.curve(model, layer, features, y, scores.argsort(stable=True))

    taken = medians(
        {
            **{n: lambda n=n: [model(part) for part in floats.split(n)] for n in BATCHES},
            "strip": lambda: strip.entropies(
                model, inputs, overlays, blend="add", batch_size=pass_size(x)
            ),
            "evaluation": lambda: predict(model, x),
            "curve": prune_curve,
            "map": lambda: freq_backdoor.heat_map(
                model, to_float(overlays), y[: len(overlays)], bases, 4.0
            ),
        },
        device,
        repeats,
    )
    name = f"{victim.arch} on {data.name}"
    best = min(BATCHES, key=taken.get)
    rate = 100 * taken[best] / taken["strip"]
    print(
        f"STRIP, {name}, {pass_size(x)} a pass: {len(floats) / taken['strip']:.0f} superimposed "
        f"images/s, {rate:.0f} % of the bare forward pass at its best batch, {best}"
    )
    channels = model.net.get_submodule(layer.linear).in_features
    print(
        f"prune curve, {channels} points of {len(x)} images: {taken['curve']:.3f} s, "
        f"{taken['curve'] / taken['evaluation']:.2f} evaluations"
    )
    print(f"heat map: {64 * len(overlays) / taken['map']:.0f} images/s")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("victim", type=Path, help="a victim's folder")
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies")
    p.add_argument("--repeats", type=int, default=7, help="of each throughput; the searches half")
    p.add_argument("--arch", nargs="*", default=["preact_resnet18", "airbench"], help="in bfloat16")
    args = p.parse_args()
    device = pick_device("auto")
    absent = dict.fromkeys(["arch", "dataset", "mean", "std", "out", "classes", "image_size"])
    given = argparse.Namespace(ckpt=args.victim, data_dir=args.data_dir, **absent)
    victim = load_victim(given, device)
    folding(victim, device, max(1, args.repeats // 2))
    throughputs(victim, device, args.repeats)
    for arch in args.arch:
        precisions(arch, device, args.repeats)
