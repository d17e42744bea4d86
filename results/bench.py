"""Speed: the fast path against the plain one, folded labels, throughputs beside the bare network.

    python results/bench.py runs/bench/victim     # write results/speed.md
    python results/bench.py runs/bench/victim --backdoorbench CLONE     # beside its code, too
    python results/bench.py ... --search runs/cifar10-wrn16_1-badnets-s1    # over a whole search
    python results/bench.py ... --whole runs/cifar10-airbench-clean-s0/nc-s0    # its time

`bash runs.sh bench` trains that victim. What is compared runs in alternation, and medians are kept.
"""

import argparse
import contextlib
import copy
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail, written_whole
from common.checkpoint import load_victim, read_checkpoint
from common.datasets import RECIPES, pick_device, to_float
from common.metrics import predict, verdict
from common.models import UNet, build_model, uses_bfloat16
from methods import (
    abl,
    fine_pruning,
    finetune,
    freq_backdoor,
    generator_reverse,
    mcr,
    nad,
    nc,
    strip,
)
from results.level import markdown

HERE, DASH = Path(__file__).resolve().parent, "–"
SETS = {"CIFAR-10": (10, 50_000, (3, 32, 32)), "GTSRB": (43, 39_209, (3, 32, 32))}
SETS |= {"MNIST": (10, 60_000, (1, 28, 28))}  # classes, training images and their shape
NETWORKS = [("preact_resnet18", "CIFAR-10"), ("airbench", "CIFAR-10"), ("wrn16_1", "CIFAR-10")]
NETWORKS += [("nc_gtsrb_cnn", "GTSRB"), ("mnist_cnn", "MNIST"), ("mnist_conv5", "MNIST")]
FLAGS = "avx2", "avx512f", "avx512_bf16", "amx_bf16"  # of a CPU, what its speed depends on
TEXT = """# Speed

`bash runs.sh bench` writes this page. The machine: {machine}, {threads} threads.
What a row compares was run in alternation, and the figures are medians, but for whole searches,
which were run once. A ratio is the first of the two times over the second.

## The fast path

"plain" is float32 with plain strides. "by default" is what the scripts do: channels_last, and
bfloat16 where the processor has it, but for the training and the searches of the smallest networks.
An epoch is estimated from {steps} steps of 128 images; `nc.py` takes 8 such steps of a search
before each change of its weight."""
REPAIRS = """A try of each repair by training, estimated from an epoch on 256 images. `nad.py`,
`mcr.py` and `fine_pruning.py` try again at half the rate where it costs more than 5 points on
images kept back. `abl.py` trains a new network on the whole training set."""
WHOLE = "Without imports and evaluation; of a detector with the repair where it named a label."
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
    origin = UNet(x.shape[1], 8).to(device)
    generator_reverse.pretrain(origin, x, goal=0.1, steps=10 * steps, lr=1e-3, **recipe)

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
        same = "same" if flagged[0] == flagged[1] else "other"
        row = [name, f"{victim.arch} on {data.name}", f"{slow / fast:.2f}", f"{slow:.1f} s"]
        yield [*row, f"{fast:.1f} s ({at_once})", same, f"{gap:.0e}"]


def steps_of(model, layout, x, y, classes):
    """{what: a call}: a step of training on the images x, and of both searches for all labels.

    A search takes as many steps for two labels at a time, as on a CPU, as there are such pairs. The
    U-Nets get the images in the memory format `layout`.
    """
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    recipe = {"lambdas": (0.1, 1.0, 0.1), "lpips_net": None, "batch_size": 32, "seed": 0}
    pair, steps = [0, 1], math.ceil(classes / 2)
    origin = UNet(x.shape[1], 8, skip=x.shape[1] == 3).to(x.device)
    images = x.contiguous(memory_format=layout)

    def training():
        model.train().requires_grad_(True)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def triggers():
        search = {"steps": 1, "batches": steps, "batch_size": 32, "lr": 0.1, "seed": 0}
        model.eval().requires_grad_(False)
        nc.reverse_triggers(model, x, y, pair, **search)

    def generators():
        model.eval().requires_grad_(False)
        settings = {"steps": steps, "lr": 1e-3, "lambda1": torch.full((2,), 0.1, device=x.device)}
        generator_reverse.train_generators(model, origin, images, y, pair, **settings, **recipe)

    return {"training": training, "nc": triggers, "generator_reverse": generators}


def fast_path(arch, name, device, repeats, images=128):
    """Rows: seconds of float32 with plain strides, and of what the scripts do by default.

    The network has fresh weights, and the images are noise.
    """
    classes, count, shape = SETS[name]
    mean = (0.5,) * shape[0]
    fast = build_model(arch, classes, shape, mean, mean).to(device)
    plain = copy.deepcopy(fast).to(memory_format=torch.contiguous_format)
    fast.bfloat16 = uses_bfloat16("auto", arch, device)
    x = torch.rand(images, *shape, device=device)
    y = torch.arange(images, device=device) % classes
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    kinds = (plain, torch.contiguous_format), (fast, layout)
    calls = [steps_of(*kind, x, y, classes) for kind in kinds]
    parts = {"training": ("an epoch", count / images)}
    parts |= dict.fromkeys(["nc", "generator_reverse"], ("a step of 32 images for each label", 1))
    for what, (part, times) in parts.items():
        taken = medians({k: steps[what] for k, steps in enumerate(calls)}, device, repeats)
        slow, quick = (times * seconds for seconds in taken.values())
        kind = "bfloat16" if fast.bfloat16 else "float32"
        row = [f"{what}, {part}", f"{arch} on {name}", f"{slow / quick:.2f}"]
        yield [*row, f"{slow:.2f} s", f"{quick:.2f} s ({kind})"]


@torch.no_grad()
def throughputs(victim, device, repeats, images=1000):
    """STRIP and the prune curve beside the bare network, and the heat map's images per second."""
    model, data = victim.model, victim.data
    x, y = data.x_train[:images], data.y_train[:images]
    overlays, inputs = x[: images // 10], x[-images // 25 :]
    floats = to_float(x[: len(inputs)].repeat_interleave(len(overlays), 0))
    layer = next(iter(fine_pruning.layers_of(model, victim.arch, x).values()))
    model.bfloat16 = uses_bfloat16("auto", victim.arch, device, kept=())
    size = strip.pass_size(model, x)
    bins = freq_backdoor.distinct_bins(*data.shape[1:])[:64]

    def prune_curve():
        scores, features = fine_pruning.activations(model, layer, x)
        fine_pruning.curve(model, layer, features, y, scores.argsort(stable=True))

    bare = {n: lambda n=n: [model(part) for part in floats.split(n)] for n in BATCHES}
    sizes = medians(bare, device, repeats)
    best = min(BATCHES, key=sizes.get)  # then run anew: the least of several medians is too small
    calls = {
        "bare": bare[best],
        "strip": lambda: strip.entropies(model, inputs, overlays, blend="add", batch_size=size),
    }
    taken = medians(calls, device, repeats)
    model.bfloat16 = uses_bfloat16("auto", victim.arch, device)
    calls = {
        "evaluation": lambda: predict(model, x),
        "curve": prune_curve,
        "map": lambda: freq_backdoor.heat_map(
            model, to_float(overlays), y[: len(overlays)], bins, 4.0
        ),
    }
    taken |= medians(calls, device, repeats)
    rate, channels = (
        taken["bare"] / taken["strip"],
        model.net.get_submodule(layer.linear).in_features,
    )
    yield [
        f"STRIP, {size} superimposed images a pass",
        f"{rate:.2f} of the bare network's rate at its best batch ({best})",
        f"{len(floats) / taken['strip']:.0f} images/s",
    ]
    yield [
        f"prune curve of {channels} points on {len(x)} images",
        f"{taken['curve'] / taken['evaluation']:.2f} evaluations of these images",
        f"{taken['curve']:.3f} s",
    ]
    yield ["heat map", DASH, f"{64 * len(overlays) / taken['map']:.0f} images/s"]


def repairs(device, repeats, images=256, arch="wrn16_1"):
    """Rows: minutes of a try of each repair by training, from one epoch on `images` of noise.

    Its default epochs and batches, on the 2,000 CIFAR-10 images that are left of 5 % where a fifth
    is kept back; ABL on all 50,000.
    """
    model = build_model(arch, 10, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).to(device)
    model.bfloat16 = uses_bfloat16("auto", arch, device)
    x = torch.randint(256, (images, 3, 32, 32), device=device).to(torch.uint8)
    y = torch.arange(images, device=device) % 10
    own = {"pad": 4, "flip": True, "epochs": 1, "lr": 1e-4, "batch_size": 64}
    aim = {"teacher": model, "betas": dict(zip(nad.BLOCKS[arch], nad.BETAS))}
    cutout, weights = {"cutout": round(32 * nad.CUTOUT)}, mcr.weights_of(model)
    (layer,) = fine_pruning.LAYERS[arch]
    pruned = {"linear": layer.linear, "channels": 64, "pruned": torch.arange(16, device=device)}
    plain = own | {"batch_size": 128, "objective": torch.mean, "clip": 1}
    calls = {
        "tuning": lambda: finetune.finetune(model, x, y, **own),
        "student": lambda: nad.finetune(model, x, y, **aim, **own | cutout),
        "teacher": lambda: nad.finetune(model, x, y, **own | cutout),
        "other end": lambda: mcr.finetune(model, x, y, **own | {"batch_size": 32}),
        "curve": lambda: mcr.connect(model, weights, weights, x, y, **own | {"batch_size": 32}),
        "pruned": lambda: fine_pruning.finetune(model, x, y, **pruned, **own),
        "anew": lambda: abl.fit(copy.deepcopy(model), x, y, **plain),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # the lines of their epochs
        taken = medians(calls, device, repeats)
    ends, cut = (
        min(script.EPOCHS, script.STEPS // (2000 // size))
        for script, size in ((mcr, 32), (fine_pruning, 64))
    )
    new = RECIPES[arch]["epochs"]
    sums = {
        f"finetune.py, {len(finetune.LRS)} rates of 10 epochs": {"tuning": 10 * len(finetune.LRS)},
        "nad.py, 10 epochs of the teacher, 20 of both students": {"teacher": 30, "student": 20},
        f"mcr.py, {ends} epochs of the other end and of the curve": {
            "other end": ends,
            "curve": ends,
        },
        f"fine_pruning.py, {cut} epochs with and without the mask": {"pruned": 2 * cut},
        f"abl.py, {new} epochs of all images, without the ascent": {"anew": 25 * new},
    }
    for what, epochs in sums.items():
        seconds = 2000 / images * sum(count * taken[name] for name, count in epochs.items())
        yield [what, f"{arch} on CIFAR-10", f"{seconds / 60:.1f} min"]


def whole_runs(folders):
    """Rows: minutes of finished runs of the defences, without imports and evaluation."""
    for folder in folders:
        path = folder / "result.json"
        result = json.loads(path.read_text()) if path.is_file() else {"arguments": {}}
        if not os.path.isdir(ckpt := result["arguments"].get("ckpt", "")):
            fail(f"--whole {folder}: it holds no result.json of a defence of a victim's folder")
        victim = read_checkpoint(Path(ckpt) / "model.pt")
        where = f"{victim['arch']} on {victim['dataset']}, {victim['classes']} labels"
        minutes = f"{result['seconds'] / 60:.1f} min"
        yield [f"{result['script']}.py", where, minutes, result["device"]]


def start_up(repeats):
    """Median seconds from the start of clean.py on digits to the end of its first step."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            short = ["--dataset", "digits", "--epochs", "1", "--train-images", "128"]
            command = [
                sys.executable,
                "-u",
                HERE.parent / "methods/clean.py",
                *short,
                "--out",
                folder,
            ]
            start = time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
                if not any(line.startswith("epoch 1/1") for line in run.stdout):
                    fail("clean.py on digits did not end its first epoch")
                seconds.append(time.perf_counter() - start)
                run.communicate()
    return statistics.median(seconds)


def machine(device):
    """What a reader must know of the machine: the GPU's name, or the CPU's count and flags."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    known = info.read_text().split() if info.exists() else []
    return f"{os.cpu_count()} CPUs with {', '.join(f for f in FLAGS if f in known) or 'no vectors'}"


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("victim", type=Path, help="a victim's folder")
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies")
    p.add_argument(
        "--backdoorbench", help="a clone of BackdoorBench, whose code is run beside ours"
    )
    p.add_argument(
        "--whole", type=Path, nargs="+", default=[], help="folders of defences whose times to print"
    )
    p.add_argument("--search", type=Path, help="a CIFAR-10 victim that both search to their end")
    p.add_argument("--repeats", type=int, default=7, help="of each throughput; the searches half")
    args = p.parse_args()
    whole = list(whole_runs(args.whole))
    device = pick_device("auto")
    absent = dict.fromkeys(["arch", "dataset", "mean", "std", "out", "classes", "image_size"])
    victim, searched = (
        load_victim(argparse.Namespace(ckpt=path, data_dir=args.data_dir, **absent), device)
        if path
        else None
        for path in (args.victim, args.search)
    )
    if searched and (searched.data.name != "cifar10" or searched.y_target is None):
        fail(f"--search {args.search}: it must be the folder of an attack on CIFAR-10")
    seconds = start_up(max(1, args.repeats // 2))
    paths = [row for pair in NETWORKS for row in fast_path(*pair, device, args.repeats)]
    folded = list(folding(victim, device, max(1, args.repeats // 2)))
    passes = list(throughputs(victim, device, args.repeats))
    mended = list(repairs(device, max(1, args.repeats // 2)))
    names = {"machine": machine(device), "threads": torch.get_num_threads()}
    head = ["what", "network and data", "ratio"]
    parts = [TEXT.format(**names, steps=args.repeats)]
    parts += [markdown([*head, "plain", "by default"], paths)]
    parts += ["## Labels one at a time against folded"]
    ends = ["one at a time", "folded (labels at once)", "verdict", "largest difference of a norm"]
    parts += [markdown([*head, *ends], folded)]
    parts += [f"## Passes, {victim.arch} on {victim.data.name}"]
    parts += [markdown(["what", "relative", "absolute"], passes)]
    parts += ["## Repairs", REPAIRS, markdown(["what", "network and data", "time"], mended)]
    if args.backdoorbench:
        from results import peers

        beside = peers.rows(args.backdoorbench, searched, device, args.repeats)
        table = markdown([*head, "theirs", "ours"], beside)
        parts += ["## Beside BackdoorBench", peers.TEXT, table]
    if whole:
        rows = markdown(["what", "network and data", "time", "device"], whole)
        parts += ["## Whole runs", WHOLE, rows]
    step = f"From the start of a script on digits to the end of its first step: {seconds:.1f} s."
    page = "\n\n".join([*parts, "## Start", step]) + "\n"
    with written_whole(HERE / "speed.md") as temporary:
        temporary.write_text(page)
    print(page)
