"""Speed beside BackdoorBench's own code, out of a clone of github.com/SCLBD/BackdoorBench.

    python results/bench.py runs/bench/victim --backdoorbench FOLDER

The classes and functions below are taken out of the clone's files by name and run as they stand;
the rest of these files imports packages that they do not need. Their settings are those of its
config/defense/nc/cifar10.yaml and of its call of STRIP.
"""

import argparse
import ast
import contextlib
import copy
import io
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from common import fail
from common.datasets import SPECS, to_float
from common.models import FLOAT32, build_model, uses_bfloat16
from methods import nc, strip
from results.bench import medians

NC = "Normalize", "Denormalize", "RegressionModel", "Recorder", "train_step"
OPTIONS = {"mask_lr": 0.1, "init_cost": 1e-3, "atk_succ_threshold": 98.0, "early_stop": True}
OPTIONS |= {"early_stop_threshold": 0.99, "early_stop_patience": 25, "patience": 5, "use_norm": 1}
OPTIONS |= {"cost_multiplier": 2, "EPSILON": 1e-7, "dataset": "cifar10", "input_channel": 3}
OPTIONS |= {"model": "preactresnet18", "num_classes": 10}
BATCH, EPOCHS, SHARE = 256, 80, 0.05  # of their Neural Cleanse, the last of the training images
SUPERIMPOSED = ("preact_resnet18", "cifar10", 20), ("mnist_cnn", "mnist", 128)  # and inputs
TEXT = """The code of BackdoorBench as shipped, from a clone, against ours: the same weights and
images, float32 there and `--precision auto` here. Neural Cleanse goes once over 192 images for each
of 10 labels; a whole search for one label, the target, ends by each code's own rule, on its own
share of the images; in brackets the norms of the masks, theirs first. STRIP mixes every input with
100 images."""


def definitions(path, names, **given):
    """A namespace with the classes and functions called `names` of a file, and with `given`."""
    try:
        tree = ast.parse(path.read_text())
    except (OSError, SyntaxError, ValueError) as error:
        fail(f"{path} cannot be read: {error}")
    kept = [node for node in tree.body if getattr(node, "name", None) in names]
    missing = set(names) - {node.name for node in kept}
    if missing:
        fail(f"{path} does not define {', '.join(sorted(missing))}")
    space = {"torch": torch, "torchvision": torchvision, "nn": nn, "os": os, "random": random}
    space |= given
    exec(compile(ast.Module(kept, []), str(path), "exec"), space)
    return space


def networks(arch, dataset, device, kept=FLOAT32):
    """Our classifier with fresh weights, and its bare network as their code calls it."""
    spec, shape = SPECS[dataset], (3, 32, 32) if dataset == "cifar10" else (1, 28, 28)
    model = build_model(arch, 10, shape, spec.mean, spec.std).to(device)
    model.eval().requires_grad_(False).bfloat16 = uses_bfloat16("auto", arch, device, kept)
    bare = copy.deepcopy(model.net).to(memory_format=torch.contiguous_format)
    return model, bare, shape


def neural_cleanse(folder, device, repeats, images=192):
    """The row of Neural Cleanse: a pass over `images` for each of 10 labels, forward and back."""
    model, bare, shape = networks("preact_resnet18", "cifar10", device)
    options = argparse.Namespace(**OPTIONS, device=device)
    given = {"args": options, "generate_cls_model": lambda *_: copy.deepcopy(bare)}
    code = definitions(folder / "defense/nc.py", NC, **given)
    x, y = torch.rand(images, *shape, device=device), torch.arange(images, device=device) % 10
    loader = DataLoader(TensorDataset((x - model.mean) / model.std, y), BATCH, shuffle=True)
    mask, pattern = (np.ones((c, *shape[1:]), np.float32) for c in (1, 3))

    def theirs():
        for options.target_label in range(10):
            state = {"model": bare.state_dict()}
            search = code["RegressionModel"](options, mask, pattern, state).to(device)
            adam = torch.optim.Adam(search.parameters(), options.mask_lr, betas=(0.5, 0.9))
            code["train_step"](search, adam, loader, code["Recorder"](options), 0, options)

    def ours():
        search = {"steps": 1, "batches": images // 32, "batch_size": 32, "lr": 0.1, "seed": 0}
        for labels in torch.arange(10).split(10 if device.type == "cuda" else 2):
            nc.reverse_triggers(model, x, y, labels.tolist(), **search)

    with silent(options):
        taken = medians({"theirs": theirs, "ours": ours}, device, repeats)
    yield line("nc", "preact_resnet18 on CIFAR-10", taken)


@contextlib.contextmanager
def silent(options):
    """Meanwhile their code prints nothing, and the pictures of their triggers go nowhere."""
    with tempfile.TemporaryDirectory() as log, contextlib.redirect_stdout(io.StringIO()):
        options.log = os.path.relpath(log)
        yield


def whole_search(folder, victim, device):
    """The row of the search for the target of a CIFAR-10 victim, from its start to its own end."""
    model, data, label = victim.model, victim.data, int(victim.y_target[0])
    model.eval().requires_grad_(False).bfloat16 = uses_bfloat16("auto", victim.arch, device)
    bare = copy.deepcopy(model.net).to(memory_format=torch.contiguous_format)
    options = argparse.Namespace(**OPTIONS, device=device, target_label=label)
    given = {"args": options, "generate_cls_model": lambda *_: copy.deepcopy(bare)}
    code = definitions(folder / "defense/nc.py", NC, **given)
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    images = [data.x_train[order[: int(share * len(order))]] for share in (SHARE, nc.SHARE[0])]
    labels = data.y_train[order]
    recorder, ours = code["Recorder"](options), []

    def theirs():
        x = (to_float(images[0]) - model.mean) / model.std
        loader = DataLoader(TensorDataset(x, labels[: len(x)]), BATCH, shuffle=True)
        shapes = [(c, *x.shape[2:]) for c in (1, x.shape[1])]
        start = (np.ones(shape, np.float32) for shape in shapes)
        search = code["RegressionModel"](options, *start, {"model": bare.state_dict()}).to(device)
        adam = torch.optim.Adam(search.parameters(), options.mask_lr, betas=(0.5, 0.9))
        for epoch in range(EPOCHS):
            if code["train_step"](search, adam, loader, recorder, epoch, options):
                break

    def own():
        x = to_float(images[1])
        settings = {"steps": 1000, "batches": 8, "batch_size": 32, "lr": 0.1, "seed": 0}
        ours.extend(nc.reverse_triggers(model, x, labels[: len(x)], [label], **settings)[2])

    with silent(options):
        taken = {}
        for name, call in (("theirs", theirs), ("ours", own)):
            start = time.perf_counter()
            call()
            taken[name] = time.perf_counter() - start
    norms = f"norms {float(recorder.reg_best):.1f} and {ours[0]:.1f}"
    yield line(f"nc, a whole search ({norms})", f"{victim.arch} on CIFAR-10", taken)


def superimposed(folder, device, repeats, overlays=100):
    """The rows of STRIP: all overlays on all inputs of a batch."""
    for arch, dataset, count in SUPERIMPOSED:
        model, bare, shape = networks(arch, dataset, device, kept=())
        options = argparse.Namespace(device=device)
        check = definitions(folder / "detection_infer/strip.py", ["STRIP"], args=options)["STRIP"]
        x = torch.randint(256, (count + overlays, *shape), device=device).to(torch.uint8)
        inputs, normal = x[:count], (to_float(x) - model.mean) / model.std
        pairs = [(image, 0) for image in normal[count:]]
        check = check(options, None, pairs, bare, strip_alpha=1.0, N=overlays).check
        own = {"blend": "add", "batch_size": strip.pass_size(model, x)}
        calls = {
            "theirs": lambda check=check, x=normal[:count], pairs=pairs: check(x, None, pairs),
            "ours": lambda m=model, x=inputs, o=x[count:], own=own: strip.entropies(m, x, o, **own),
        }
        yield line(
            f"strip, {count} inputs", f"{arch} on {dataset}", medians(calls, device, repeats)
        )


def line(what, where, taken):
    """A row of the table: their seconds over ours, and both."""
    theirs, ours = taken["theirs"], taken["ours"]
    return [what, where, f"{theirs / ours:.2f}", f"{theirs:.2f} s", f"{ours:.2f} s"]


def rows(folder, victim, device, repeats):
    """All rows of a clone in `folder`; a whole search where there is a CIFAR-10 victim."""
    folder = Path(folder)
    found = [*neural_cleanse(folder, device, repeats), *superimposed(folder, device, repeats)]
    return [*found, *whole_search(folder, victim, device)] if victim else found
