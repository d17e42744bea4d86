"""Fine-Pruning (Liu et al., RAID 2018, arXiv 1805.12185): cut idle channels, then fine-tune.

A backdoor likes to live in channels that clean images do not use. The channels of one late layer
are pruned in the order of their mean activation on clean images, the least active first, until the
accuracy on held-out clean images suffers; fine-tuning on clean images repairs the accuracy and
removes a backdoor that shares its channels with clean data.

Kind: repairs models, without asking whether they are backdoored; what it costs an innocent model
is part of the answer. Given: the model and a clean share of its training data. Answers: the
repaired model and the prune curve. Known to fail: pruning alone on the pruning-aware attack, on
input-aware and frequency triggers; both steps on BadNets in ABL's table (ASR 99.98).

Steps of the paper: mean activation on clean images -> activations; prune curve, all its points
in one batched product of cached features -> curve_logits; stop -> stop_point; the repaired model
with its pruned channels kept at zero -> prune, finetune.

Differs from the paper, or chosen where it is silent: the layer is the one whose output enters the
last linear layer (LAYERS; --layer layer4 is the last convolution of mnist_cnn). Where no ReLU
follows it (preact_resnet18 has none) an activation is |a|, for the lowest signed mean is not an
idle channel. A channel is pruned by zeroing the weights that read it: the saved file needs no
mask. 20 % of the clean share is held out and decides where to stop, never the test images; the
fine-tuning then gets the whole share. It is BackdoorBench's, 100 epochs of SGD, cosine, with the
victim's crops and flips, but at rate .05, not .01: the rate decides more than the pruning. It was
chosen with the test figures of digits (.01 leaves a BadNets backdoor whole, .05 does not) and of
one MNIST victim in sight.

    python methods/fine_pruning.py --ckpt runs/mnist-mnist_cnn-badnets-s0

The paper, faces: clean / ASR .978 / 1.000 -> .978 / .000. Results: README.md.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, make_folder, saved_figure, written_whole
from common.checkpoint import (
    clear_folder,
    load_model,
    load_victim,
    read_checkpoint,
    save_model,
    save_result,
)
from common.datasets import augment, defender_split, pick_device, to_float
from common.metrics import accuracy


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--ckpt", required=True, help="checkpoint folder, model.pt or bare state dict")
    p.add_argument("--arch", help="architecture of a bare state dict")
    p.add_argument("--dataset", help="dataset of a bare state dict, or its path")
    p.add_argument("--mean", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--std", type=float, nargs="+", help="normalisation (default: the dataset's)")
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--out", help="folder to write (default: <checkpoint folder>/<defence>-s<seed>)")
    p.add_argument(
        "--data-fraction",
        type=float,
        help="the defender's share of the training data (default: .05, at least 300 images)",
    )
    p.add_argument(
        "--mode",
        default="fine-prune",
        choices=["prune", "finetune", "fine-prune"],
        help="the columns of the paper's table: pruning alone, fine-tuning alone, both",
    )
    p.add_argument(
        "--layer", help="layer whose channels are pruned (default: the last, see LAYERS)"
    )
    p.add_argument(
        "--held-out", type=float, default=0.2, help="part of the share that decides where to stop"
    )
    p.add_argument(
        "--max-drop",
        type=float,
        default=4.0,
        help="points of held-out accuracy that pruning may cost",
    )
    p.add_argument("--epochs", type=int, default=100, help="fine-tuning epochs (BackdoorBench 100)")
    p.add_argument("--batch-size", type=int, default=64, help="images per fine-tuning step")
    p.add_argument(
        "--lr", type=float, default=0.05, help="SGD's first rate, momentum .9 (BackdoorBench .01)"
    )
    return p.parse_args()


# architecture -> layers, the default first:
# name -> (a ReLU follows it, linear layer it enters, linear layer above that one and a ReLU)
LAYERS = {
    "mnist_cnn": {"linear6": (True, "linear9", None), "layer4": (False, "linear6", "linear9")},
    "mnist_conv5": {"linear6": (True, "linear9", None), "conv5": (True, "linear6", "linear9")},
    "preact_resnet18": {"layer4": (False, "linear", None)},  # pooled, without BN or ReLU
    "resnet18": {"layer4": (False, "linear", None)},  # pooled; its last ReLU is inside
    "resnet34": {"layer4": (False, "linear", None)},
    "wide_resnet34": {"bn1": (True, "linear", None)},  # pooled
    "densenet121": {"bn": (True, "linear", None)},  # pooled
    "vgg16": {"features": (False, "classifier", None)},  # pooled; its last ReLU is inside
    "vgg19": {"features": (False, "classifier", None)},
    "mobilenet_v2": {"bn2": (True, "linear", None)},  # pooled
}


@torch.no_grad()
def activations(net, layer, relu, linear, x, batch_size=500):
    """Mean |a| of each channel of `layer`'s output a, and what enters `linear`, on uint8 images.

    `net` is a Classifier in eval mode. Returns the scores C (after the ReLU where one follows;
    mean over images and positions, summed batch by batch) and the features N x C P of P values
    per channel: P = 1 behind a pooling, H W behind a flattening.
    """
    totals, features = [], []

    def add(module, inputs, output):
        a = F.relu(output) if relu else output.abs()
        totals.append(a.flatten(2).mean(2).sum(0) if a.dim() == 4 else a.sum(0))

    def keep(module, inputs):
        features.append(inputs[0])

    hooks = [getattr(net.net, layer).register_forward_hook(add)]
    hooks.append(getattr(net.net, linear).register_forward_pre_hook(keep))
    for part in x.split(batch_size):
        net(to_float(part))
    for hook in hooks:
        hook.remove()
    return torch.stack(totals).sum(0) / len(x), torch.cat(features)


@torch.no_grad()
def curve_logits(features, weight, bias, order):
    """The linear layer's outputs after pruning 0, 1, ..., C channels in this order, all at once.

    Every channel's contribution to every output is one batched product, (C x N x P) (C x P x O);
    what is left after k prunings is the whole sum less the first k. Returns N x (C + 1) x O.
    """
    n, c = len(features), len(order)
    f = features.view(n, c, -1)[:, order].transpose(0, 1)  # C x N x P
    w = weight.view(len(weight), c, -1)[:, order].permute(1, 2, 0)  # C x P x O
    gone = torch.bmm(f.double(), w.double()).cumsum_(0)  # row k: the order's first k + 1 channels
    whole = gone[-1] + bias
    left = torch.empty(c + 1, n, len(weight), device=f.device)
    left[0] = whole
    torch.sub(whole, gone, out=left[1:])
    return left.transpose(0, 1)


@torch.no_grad()
def curve(net, linear, above, features, y, order):
    """Percentage of images labelled y after pruning 0, 1, ..., C channels (float64, C + 1)."""
    entered = getattr(net.net, linear)
    size = max(1, 1_000_000 // (len(order) + 1) // entered.out_features)  # 8 MB at a time
    hits = torch.zeros(len(order) + 1, device=y.device)
    for part, labels in zip(features.split(size), y.split(size)):
        logits = curve_logits(part, entered.weight, entered.bias, order)
        if above is not None:
            logits = getattr(net.net, above)(F.relu(logits))
        hits += (logits.argmax(2) == labels[:, None]).sum(0)
    return 100 * hits.double().cpu().numpy() / len(y)


def stop_point(accuracies, max_drop):
    """Prune one channel after another; the count before the accuracy first falls too far."""
    too_far = accuracies[0] - np.asarray(accuracies) > max_drop + 1e-9
    return int(too_far.argmax()) - 1 if too_far.any() else len(accuracies) - 1


def silence(net, linear, channels, pruned):
    """Zero the weights of `linear` that read the `pruned` ones of its `channels`, in place."""
    weight = getattr(net.net, linear).weight.data
    weight.view(len(weight), channels, -1)[:, pruned] = 0


def prune(net, linear, channels, pruned):
    """A copy of the model without these channels; equal to multiplying each of them by 0."""
    net = copy.deepcopy(net)
    silence(net, linear, channels, pruned)
    return net


def finetune(net, linear, channels, pruned, x, y, spec, epochs, lr, batch_size, bar):
    """SGD on clean uint8 images with the pruned channels kept at zero; returns a tuned copy.

    The weights that read a pruned channel are zeroed again after every step, for momentum and
    weight decay would move them. BatchNorm is in training mode.
    """
    net = copy.deepcopy(net).requires_grad_(True).train()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    for epoch in range(1, epochs + 1):
        total_loss = torch.zeros((), device=x.device)
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            loss = F.cross_entropy(net(augment(to_float(x[batch]), spec.pad, spec.flip)), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            silence(net, linear, channels, pruned)
            total_loss += loss.detach()
            bar.update()
        if not total_loss.isfinite():
            fail(f"the loss became {total_loss.item()} in epoch {epoch}; no model is kept")
    net = net.eval().requires_grad_(False)
    if not net(to_float(x[:500])).isfinite().all():
        fail("the model's outputs are not finite after fine-tuning; no model is kept")
    return net


def draw_curve(path, named, count):
    """Percentages against the number of pruned channels; a line where pruning stops."""
    with saved_figure(path, figsize=(5, 3.2)) as (_, axis):
        for name, values in named.items():
            axis.plot(range(len(values)), values, label=name)
        axis.axvline(count, color="grey", linewidth=0.8, label=f"stop at {count}")
        axis.set(xlabel="pruned channels", ylabel="%", ylim=(-3, 103))
        axis.legend()


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size", "lr")
    if not 0 < args.held_out < 1:
        fail(f"--held-out {args.held_out} must lie in (0, 1)")
    if not 0 <= args.max_drop <= 100:
        fail(f"--max-drop {args.max_drop} must lie in [0, 100]")
    start = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    victim = load_victim(args, device)
    model, data = victim.model, victim.data
    layers = LAYERS.get(victim.arch, {})
    layer = args.layer or next(iter(layers), None)
    if layer not in layers:
        fail(f"--layer {layer}: prunable in {victim.arch}: {', '.join(layers) or 'no layer'}")
    relu, linear, above = layers[layer]
    if args.data_fraction is None:
        args.data_fraction = max(0.05, min(1.0, 300 / len(data.x_train)))
    split = defender_split(data.y_train, args.data_fraction, args.seed)
    held = torch.zeros(len(split), dtype=torch.bool, device=device)
    held[defender_split(data.y_train[split], args.held_out, args.seed)] = True
    if held.all():
        fail(f"all {len(split)} clean images are held out; none is left to rank the channels on")
    x_clean, y_clean = data.x_train[split], data.y_train[split]
    x_held, y_held = x_clean[held], y_clean[held]
    folder = make_folder(args.out or victim.folder / f"fine_pruning-s{args.seed}")

    # ===== Prune =====
    search_start = time.time()
    scores, _ = activations(model, layer, relu, linear, x_clean[~held])
    order = scores.argsort(stable=True)  # fixed by the unpruned network; ties by channel number
    _, features = activations(model, layer, relu, linear, x_held)
    accuracies = curve(model, linear, above, features, y_held, order)
    search_seconds = time.time() - search_start
    stop = stop_point(accuracies, args.max_drop)
    count = 0 if args.mode == "finetune" else stop
    pruned = prune(model, linear, len(order), order[:count])
    print(
        f"{layer}: {len(order)} channels, {int((scores == 0).sum())} silent on "
        f"{len(split) - len(x_held)} clean images; {count} pruned, held-out accuracy on "
        f"{len(x_held)} images "
        f"{accuracies[0]:.2f} -> {accuracies[count]:.2f} (the next: "
        f"{accuracies[min(count + 1, len(order))]:.2f}, at most {args.max_drop:g} points)"
    )

    # ===== Repair =====
    def tune(net, channels):
        """Fine-tune with the same random draws, whatever ran before."""
        torch.manual_seed(args.seed)
        total = args.epochs * max(1, len(x_clean) // args.batch_size)
        arguments = x_clean, y_clean, data.spec, args.epochs, args.lr, args.batch_size
        with tqdm(total=total, disable=None, unit="step") as bar:
            return finetune(net, linear, len(order), channels, *arguments, bar)

    repaired = pruned if args.mode == "prune" else tune(pruned, order[:count])
    baseline = tune(model, order[:0]) if args.mode == "fine-prune" else None
    metrics = {
        "mode": args.mode,
        "layer": layer,
        "channels": len(order),
        "silent": int((scores == 0).sum()),
        "pruned": count,
        "held_out": len(x_held),
        "held_out_accuracy": accuracies[0],
        "held_out_accuracy_pruned": accuracies[count],
        "search_seconds": search_seconds,
    }
    clear_folder(folder)
    draw_curve(folder / "curve.png", {"held-out accuracy": accuracies}, count)
    save_model(folder, repaired, data, victim.arch, args, metrics)
    repaired = load_model(read_checkpoint(folder / "model.pt"), folder / "model.pt", device)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    models = {"": model, "_repaired": repaired}
    if args.mode == "fine-prune":
        models |= {"_pruned": pruned, "_clean_only": baseline}
    for suffix, net in models.items():
        metrics["clean_accuracy" + suffix] = accuracy(net, data.x_test, data.y_test)
        if victim.x_poisoned is not None:
            metrics["asr" + suffix] = accuracy(net, victim.x_poisoned, victim.y_target)
            metrics["robust_accuracy" + suffix] = accuracy(net, victim.x_poisoned, victim.y_true)
    curves = {"held-out accuracy": accuracies}
    _, features = activations(model, layer, relu, linear, data.x_test)
    curves["clean accuracy"] = curve(model, linear, above, features, data.y_test, order)
    if victim.x_poisoned is None:
        print("no poisoned test images beside the checkpoint: only the cost can be evaluated")
    else:
        metrics["asr_n"] = len(victim.x_poisoned)
        _, features = activations(model, layer, relu, linear, victim.x_poisoned)
        curves["ASR"] = curve(model, linear, above, features, victim.y_target, order)
    draw_curve(folder / "curve.png", curves, count)
    with written_whole(folder / "curve.npz") as path:
        vectors = {name.replace(" ", "_").replace("-", "_"): v for name, v in curves.items()}
        vectors |= {"scores": scores.cpu().numpy(), "order": order.cpu().numpy()}
        np.savez_compressed(path, **vectors)

    # ===== Report =====
    for name in ("clean_accuracy", "asr"):
        if name in metrics:
            kinds = ("pruned", "clean_only", "repaired")
            parts = [
                f"{metrics[f'{name}_{kind}']:.2f} {kind.replace('_', ' ')}"
                for kind in kinds
                if f"{name}_{kind}" in metrics
            ]
            print(f"{name.replace('_', ' ')}: {metrics[name]:.2f} -> {', '.join(parts)}")
    print(f"figures: {', '.join(map(str, sorted(folder.glob('*.png'))))}")
    save_result(folder, "fine_pruning", args, seconds, metrics, device)
