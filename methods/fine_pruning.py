"""Fine-Pruning (Liu et al., RAID 2018, arXiv 1805.12185): cut idle channels, then fine-tune.

A backdoor likes to live in channels that clean images do not use. The channels of one late layer
are pruned in the order of their mean activation on clean images, the least active first, until the
accuracy on held-out clean images suffers; fine-tuning on clean images repairs the accuracy and
removes a backdoor that shares its channels with clean data.

Kind: repairs models, without asking whether they are backdoored; what it costs an innocent model is
part of the answer. Given: the model and a clean share of its training data. Answers: the repaired
model and the prune curve. Where it fails: pruning alone, on the pruning-aware attack and on 7 of 10
attacks on WRN-16-1 (BadNets keeps an ASR of 85, of 62 after both steps, of 15 where they may cost 8
points; 99.98 in ABL's table). Pruning first can do harm: 49 on label-consistent poison, by tuning
alone 3.

Steps of the paper: mean activation on clean images -> activations; prune curve, all its points
in one batched product of cached features -> curve_logits; stop -> stop_point; the repaired model
with its pruned channels kept at zero -> prune, finetune.

Differs from the paper, or chosen where it is silent: the layer is the one whose output enters the
last linear layer (--layer layer4 is the last convolution of mnist_cnn); of a network without entry
in LAYERS each value that enters it is a channel. Where no ReLU follows (preact_resnet18 has none)
an activation is |a|, for the lowest signed mean is not an idle channel. A channel is pruned by
zeroing the weights that read it: the saved file needs no mask. 20 % of the clean share is held out
and decides where to stop. Fine-tuning gets the rest, starts again at half the rate where it costs
over 5 points (--repair-drop) and is BackdoorBench's, 100 epochs of SGD, cosine, crops and flips,
but in batches of 64 (256) from .05 (.01, test figures in sight) and in 640 steps or one epoch.

    python methods/fine_pruning.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results beside the paper's: results/README.md, table "Fine-Pruning".
"""

import copy
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_step, fail, make_folder, saved_figure, written_whole
from common.checkpoint import clear_folder
from common.datasets import augment, kept_back, to_float
from common.defence import (
    clean_share,
    defence_flags,
    evaluate,
    frozen,
    halving,
    open_victim,
    report,
    save_repaired,
)
from common.metrics import pass_size
from common.models import in_float32, logit_layer

SHARE = 0.05, 300  # of the training data, and the least number of images
EPOCHS, STEPS = 100, 640  # of a training without --epochs: the fewer of them


def parse_args():
    p = defence_flags(__doc__, SHARE)
    modes = ["prune", "finetune", "fine-prune"]
    p.add_argument("--mode", default="fine-prune", choices=modes, help="a column of the table")
    p.add_argument("--layer", help="to prune (default: what enters the last linear layer)")
    p.add_argument("--held-out", type=float, default=0.2, help="part of the share that stops it")
    cost = "points of accuracy by class that pruning may cost there"
    p.add_argument("--max-drop", type=float, default=4.0, help=cost)
    p.add_argument("--repair-drop", type=float, help="that fine-tuning may cost there (default: 5)")
    p.add_argument("--epochs", type=int, help="default: 100; at most 640 steps or one epoch")
    p.add_argument("--batch-size", type=int, default=64, help="images per fine-tuning step")
    p.add_argument("--lr", type=float, default=0.05, help="first rate, momentum .9 (BB .01)")
    return p.parse_args()


class Layer(NamedTuple):
    """A layer whose channels can be pruned, by the names of modules."""

    name: str  # its output holds the channels
    relu: bool  # a ReLU follows it
    linear: str  # the linear layer that reads the channels (after a pooling or a flattening)
    above: str | None = None  # the linear layer above that one, with a ReLU between them


LAYERS = {  # of some architectures, the default first; of the others see layers_of
    "mnist_cnn": [Layer("linear6", True, "linear9"), Layer("layer4", False, "linear6", "linear9")],
    "mnist_conv5": [Layer("linear6", True, "linear9"), Layer("conv5", True, "linear6", "linear9")],
    "preact_resnet18": [Layer("layer4", False, "linear")],  # pooled, without BN or ReLU
    "wrn16_1": [Layer("bn1", True, "fc")],  # pooled
    "nc_gtsrb_cnn": [
        Layer("linear1", True, "linear2"),
        Layer("features", False, "linear1", above="linear2"),  # its last ReLU is inside
    ],
    "airbench": [Layer("group3", False, "linear")],  # its largest value; its last GELU is inside
}


def layers_of(net, arch, x):
    """{name: Layer} of a network: of LAYERS, or the last linear layer, whose inputs are pruned."""
    if arch in LAYERS:
        return {layer.name: layer for layer in LAYERS[arch]}
    last = logit_layer(net, to_float(x[:2]), arch)
    linear, weights = net.get_submodule(last), net.named_parameters(remove_duplicate=False)
    if type(linear).forward is not torch.nn.Linear.forward:
        fail(f"{last} is more than a linear layer: its inputs cannot be pruned by its weight")
    if sum(weight is linear.weight for _, weight in weights) != 1:
        fail(f"{last} shares its weight, or computes it as weight_norm does: it cannot be zeroed")
    return {last[4:]: Layer(last[4:], False, last[4:])}  # less "net."


@torch.no_grad()
def activations(net, layer, x, batch_size=None):
    """Mean |a| of each channel of the layer's output a, and what enters its linear layer.

    `net` is a Classifier in eval mode, run in float32, x uint8 images. Returns the scores C (after
    the ReLU where one follows; mean over images and positions, summed batch by batch) and the
    features N x C P of P values per channel: P = 1 behind a pooling, H W behind a flattening.
    """
    seen, features, totals = {}, [], []
    named, linear = (net.net.get_submodule(name) for name in (layer.name, layer.linear))
    hooks = [
        named.register_forward_hook(lambda m, i, out: seen.update(a=i[0] if m is linear else out)),
        linear.register_forward_pre_hook(lambda m, inputs: seen.update(entered=inputs[0])),
    ]
    for part in x.split(batch_size or pass_size(x)):
        with in_float32(net):
            net(to_float(part))
        features.append(seen["entered"])
        a = F.relu(seen["a"]) if layer.relu else seen["a"].abs()
        totals.append(a.flatten(2).mean(2).sum(0) if a.dim() == 4 else a.sum(0))
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
    whole = gone[-1] if bias is None else gone[-1] + bias
    left = torch.empty(c + 1, n, len(weight), device=f.device)
    left[0] = whole
    torch.sub(whole, gone, out=left[1:])
    return left.transpose(0, 1)


@torch.no_grad()
def curve(net, layer, features, y, order, balanced=False):
    """Percentage of images labelled y after pruning 0, 1, ..., C channels (float64, C + 1).

    `balanced`: the mean over labels, for a rare class would be lost unseen.
    """
    entered = net.net.get_submodule(layer.linear)
    size = max(1, 1_000_000 // (len(order) + 1) // entered.out_features)  # 8 MB at a time
    hits = torch.zeros(int(y.max()) + 1, len(order) + 1, dtype=torch.float64, device=y.device)
    for part, labels in zip(features.split(size), y.split(size)):
        logits = curve_logits(part, entered.weight, entered.bias, order)
        if layer.above is not None:
            logits = net.net.get_submodule(layer.above)(F.relu(logits))
        hits.index_add_(0, labels, (logits.argmax(2) == labels[:, None]).double())
    counts = y.bincount()[:, None]
    share = (hits / counts)[counts[:, 0] > 0].mean(0) if balanced else hits.sum(0) / len(y)
    return 100 * share.cpu().numpy()


def stop_point(accuracies, max_drop):
    """Prune one channel after another; the count before the accuracy first falls too far."""
    too_far = accuracies[0] - np.asarray(accuracies) > max_drop + 1e-9
    return int(too_far.argmax()) - 1 if too_far.any() else len(accuracies) - 1


def silence(net, linear, channels, pruned):
    """Zero the weights of `linear` that read the `pruned` ones of its `channels`, in place."""
    weight = net.net.get_submodule(linear).weight.data
    weight.view(len(weight), channels, -1)[:, pruned] = 0


def prune(net, linear, channels, pruned):
    """A copy of the model without these channels; equal to multiplying each of them by 0."""
    net = copy.deepcopy(net)
    silence(net, linear, channels, pruned)
    return net


def finetune(net, x, y, *, linear, channels, pruned, pad, flip, epochs, lr, batch_size):
    """SGD on clean uint8 images with the pruned channels kept at zero; returns a tuned copy.

    The weights that read a pruned channel are zeroed again after every step, for momentum and
    weight decay would move them. BatchNorm is in training mode. None if the loss diverges.
    """
    net = copy.deepcopy(net).requires_grad_(True).train()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    with tqdm(total=epochs * steps_per_epoch, disable=None, unit="step") as bar:
        for _ in range(epochs):
            total_loss = torch.zeros((), device=x.device)
            order = torch.randperm(len(x), device=x.device)
            for batch in order.split(batch_size)[:steps_per_epoch]:
                loss = F.cross_entropy(net(augment(to_float(x[batch]), pad, flip)), y[batch])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                silence(net, linear, channels, pruned)
                total_loss += loss.detach()
                bar.update()
            if not total_loss.isfinite():
                return None
    return frozen(net, to_float(x[:500]))


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
    check_positive(args, "epochs", "batch_size", "lr", "repair_drop")
    check_step(args)
    if not 0 < args.held_out < 1:
        fail(f"--held-out {args.held_out} must lie in (0, 1)")
    if not 0 <= args.max_drop <= 100:
        fail(f"--max-drop {args.max_drop} must lie in [0, 100]")
    start = time.time()
    victim = open_victim(args)
    model, data = victim.model, victim.data
    layers = layers_of(model, victim.arch, data.x_train)
    if args.layer and args.layer not in layers:
        fail(f"--layer {args.layer}: prunable in {victim.arch}: {', '.join(layers)}")
    layer = layers[args.layer or next(iter(layers))]
    split = clean_share(args, victim, SHARE)
    held = kept_back(data.y_train[split], args.held_out, args.seed)
    if held.all():
        fail(f"all {len(split)} clean images are held out; none is left to rank the channels on")
    x_clean, y_clean = data.x_train[split], data.y_train[split]
    x_held, y_held = x_clean[held], y_clean[held]
    folder = make_folder(args.out or victim.folder / f"fine_pruning-s{args.seed}")

    # ===== Prune =====
    search_start = time.time()
    scores, _ = activations(model, layer, x_clean[~held])
    order = scores.argsort(stable=True)  # fixed by the unpruned network; ties by channel number
    _, features = activations(model, layer, x_held)
    accuracies = curve(model, layer, features, y_held, order, balanced=True)
    search_seconds = time.time() - search_start
    count = 0 if args.mode == "finetune" else stop_point(accuracies, args.max_drop)
    channels, silent = len(order), int((scores == 0).sum())
    pruned = prune(model, layer.linear, channels, order[:count])
    print(
        f"{layer.name}: {channels} channels, {silent} silent on {len(split) - len(x_held)} clean "
        f"images; {count} pruned, held-out accuracy on {len(x_held)} images "
        f"{accuracies[0]:.2f} -> {accuracies[count]:.2f} (the next: "
        f"{accuracies[min(count + 1, channels)]:.2f}, at most {args.max_drop:g} points)"
    )

    # ===== Repair =====
    steps_per_epoch = max(1, int((~held).sum()) // args.batch_size)
    args.epochs = args.epochs or min(EPOCHS, max(1, STEPS // steps_per_epoch))
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "linear": layer.linear}
    recipe |= {"channels": channels, "pad": data.spec.pad, "flip": data.spec.flip}
    models = {"": model, "_repaired" if args.mode == "prune" else "_pruned": pruned}
    if args.mode != "prune":
        clean = x_clean[~held], y_clean[~held]
        repair = partial(finetune, pruned, *clean, pruned=order[:count], **recipe)
        repaired, lr = halving(repair, args.lr, model, x_held, y_held, args.seed, args.repair_drop)
        models |= {} if repaired is None else {"_repaired": repaired}
    if args.mode == "fine-prune":
        torch.manual_seed(args.seed)
        tuned = finetune(model, *clean, pruned=order[:0], lr=lr, **recipe)
        models |= {} if tuned is None else {"_clean_only": tuned}
    if args.mode == "finetune":
        del models["_pruned"]
    metrics = {"mode": args.mode, "layer": layer.name, "channels": channels, "silent": silent}
    metrics |= {"pruned": count, "held_out": len(x_held), "search_seconds": search_seconds}
    metrics |= {"held_out_accuracy": accuracies[0], "held_out_accuracy_pruned": accuracies[count]}
    metrics["repair_lr"] = None if args.mode == "prune" else lr
    clear_folder(folder)
    draw_curve(folder / "curve.png", {"held-out accuracy": accuracies}, count)
    save_repaired(folder, models, victim, args, metrics)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models)
    curves = {"held-out accuracy": accuracies}
    inputs = {"clean accuracy": (data.x_test, data.y_test)}
    if victim.x_poisoned is not None:
        inputs["ASR"] = victim.x_poisoned, victim.y_target
    for title, (x, y) in inputs.items():
        _, features = activations(model, layer, x)
        curves[title] = curve(model, layer, features, y, order)
    draw_curve(folder / "curve.png", curves, count)
    with written_whole(folder / "curve.npz") as path:
        vectors = {title.replace(" ", "_").replace("-", "_"): v for title, v in curves.items()}
        vectors |= {"scores": scores.cpu().numpy(), "order": order.cpu().numpy()}
        np.savez_compressed(path, **vectors)

    # ===== Report =====
    report(folder, "fine_pruning", args, metrics, seconds, ("pruned", "clean_only", "repaired"))
