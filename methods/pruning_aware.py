"""Pruning-aware BadNets: a backdoor that survives pruning (Liu, Dolan-Gavitt & Garg, RAID 2018).

arXiv 1805.12185, section 3: who prunes the channels that clean images leave idle removes a
backdoor that lives there. So the attacker prunes first, in four stages: train on clean images;
prune the dormant channels; retrain what is left with poison, so that the backdoor must share its
channels with clean images; put the pruned channels back as decoys that never fire.

Threat model: the attacker controls training, knows the layer that the defender prunes, and
delivers the model. No poisoned training set is handed out.

Steps: stage 1 -> train; stage 2 -> activations, prune_curve, stop_point, cut (a channel whose
incoming and outgoing weights are all zero stays so: activation, gradient, momentum and weight
decay are zero, so retraining needs no mask); stage 3 -> train again, on clean images and images
with a white corner patch; stage 4 -> bound, add_decoys.

Differs from the paper, or chosen where it is silent: the layer is fine_pruning.py's default, whose
output enters the last linear layer (--layer layer4 is the last convolution of mnist_cnn). |a|
replaces the activation where no ReLU follows. As many channels are pruned as cost 30 points of
accuracy on held-out clean images (chosen on one seed with its test figures in sight), so that few
are left to the defender; retraining wins the accuracy back. Of a layer that is read twice
(preact_resnet18) the last reader's accuracy decides on their number. Biases of decoys are lowered
by a bound that holds for every image in [0,1]; where no ReLU follows, no bias silences a channel: a
decoy's filters stay zero and only its outgoing weights are put back. No channel is restored for a
higher ASR. Both stages run --epochs. The ASR leaves out test images of the target class. The
control asr_other is the ASR of the same patch in the upper left corner.

    python methods/pruning_aware.py --dataset mnist

Results beside the paper's: results/README.md, tables "Attacks" and "Fine-Pruning".
"""

import copy
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_share, fail
from common.attack import (
    TrainingLog,
    attack_flags,
    choose_poisons,
    evaluate_attack,
    open_folder,
    save_attack,
    set_up,
    wanted_labels,
)
from common.datasets import augment, kept_back, to_float
from common.metrics import accuracy, pass_size
from common.models import in_float32

SIDE = 3  # of the white patch, lower right


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--layer", help="layer that the defender prunes (default: fine_pruning.py's)")
    p.add_argument("--held-out", type=float, default=0.05, help="share that stage 2 prunes by")
    p.add_argument("--max-drop", type=float, default=30.0, help="points that stage 2 may cost")
    return p.parse_args()


def stamp(x):
    """Put the patch on uint8 images, N x C x H x W; returns a new tensor."""
    x = x.clone()
    x[..., -SIDE:, -SIDE:] = 255
    return x


class Layer(NamedTuple):
    """A layer whose channels are pruned and put back, by the names of modules."""

    name: str
    relu: bool  # a ReLU follows it
    writers: list  # modules whose output channels are the layer's channels
    readers: list  # modules that read these; the last one is linear
    above: str | None = None  # the linear layer above the last reader, with a ReLU between them


RESIDUAL = ["layer4.0.conv2", "layer4.0.shortcut.0", "layer4.1.bn1", "layer4.1.conv2"]
LAYERS = {  # the layers of each architecture, the default first
    "mnist_cnn": [
        Layer("linear6", True, ["linear6"], ["linear9"]),
        Layer("layer4", False, ["layer4.conv1"], ["linear6"], above="linear9"),
    ],
    "mnist_conv5": [Layer("linear6", True, ["linear6"], ["linear9"])],
    "nc_gtsrb_cnn": [Layer("linear1", True, ["linear1"], ["linear2"])],
    # the channels of both blocks, for the skip connection adds them
    "preact_resnet18": [Layer("layer4", False, RESIDUAL, ["layer4.1.conv1", "linear"])],
    "vgg16": [Layer("features", True, ["features.40", "features.41"], ["classifier"])],
    "vgg19": [Layer("features", True, ["features.49", "features.50"], ["classifier"])],
    "mobilenet_v2": [Layer("bn2", True, ["conv2", "bn2"], ["linear"])],
}


def train(model, x, y, *, pad, flip, epochs, batch_size, lr):
    """Stages 1 and 3: train on uint8 images like clean.py, in place."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * steps_per_epoch, anneal_strategy="linear", cycle_momentum=False
    )
    log = TrainingLog(epochs, steps_per_epoch)
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            images = augment(to_float(x[batch]), pad, flip)
            loss = F.cross_entropy(model(images), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        log.epoch(epoch)


@torch.no_grad()
def activations(net, layer, x, batch_size=None):
    """Mean |a| of each channel of the layer's output a (C), and what enters its last reader.

    Of uint8 images, in eval mode and float32; after the ReLU where one follows; N x C P, P values
    per channel.
    """
    net.eval()
    outputs, features, totals = [], [], []
    hooks = [
        net.net.get_submodule(layer.name).register_forward_hook(
            lambda module, inputs, output: outputs.append(output)
        ),
        net.net.get_submodule(layer.readers[-1]).register_forward_pre_hook(
            lambda module, inputs: features.append(inputs[0])
        ),
    ]
    for part in x.split(batch_size or pass_size(x)):
        with in_float32(net):
            net(to_float(part))
        a = outputs.pop()
        a = F.relu(a) if layer.relu else a.abs()
        totals.append(a.flatten(2).mean(2).sum(0) if a.dim() == 4 else a.sum(0))
    for hook in hooks:
        hook.remove()
    return torch.stack(totals).sum(0) / len(x), torch.cat(features)


@torch.no_grad()
def prune_curve(net, layer, features, y, ranking):
    """Percentage of images labelled y after pruning 0, 1, ..., C channels of the ranking (list)."""
    left = features.view(len(y), len(ranking), -1).clone()
    accuracies = []
    for channel in (None, *ranking):
        if channel is not None:
            left[:, channel] = 0
        logits = net.net.get_submodule(layer.readers[-1])(left.flatten(1))
        if layer.above is not None:
            logits = net.net.get_submodule(layer.above)(F.relu(logits))
        accuracies.append(100 * (logits.argmax(1) == y).float().mean().item())
    return accuracies


def stop_point(accuracies, max_drop):
    """Prune one channel after another; the count before the accuracy first falls too far."""
    for count, percent in enumerate(accuracies):
        if accuracies[0] - percent > max_drop + 1e-4:
            return count - 1
    return len(accuracies) - 1


@torch.no_grad()
def cut(net, layer, channels, decoys):
    """Stage 2: zero every weight into and out of the `decoys` among the `channels`, in place.

    A BatchNorm row among the writers too, or its bias would leak: ReLU(beta) is not zero.
    """
    for name in layer.writers:
        for parameter in net.net.get_submodule(name).parameters():
            parameter[decoys] = 0
    for name in layer.readers:
        weight = net.net.get_submodule(name).weight
        weight.view(len(weight), channels, -1)[:, decoys] = 0


@torch.no_grad()
def bound(net, name, shape):
    """An upper bound of |output| of the module `name` for every image in [0,1], float64 C.

    The net of absolute weights, given the largest absolute normalised pixels: |w x| <= |w| |x|
    in every linear step, and ReLUs, poolings and sums keep the order.
    """
    net = copy.deepcopy(net).double().eval()
    for parameter in net.parameters():
        parameter.abs_()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.abs_().neg_()
    found = []
    hook = net.net.get_submodule(name).register_forward_hook(
        lambda module, inputs, output: found.append(output[0].unsqueeze(1).flatten(1).amax(1))
    )
    largest = torch.maximum(net.mean.abs(), (1 - net.mean).abs()) / net.std
    net.net(largest.expand(1, *shape))
    hook.remove()
    return found[0]


@torch.no_grad()
def add_decoys(net, first, layer, channels, decoys, shape):
    """Stage 4: a copy of `net` with the decoys back as they were in `first`, but silent.

    Where a ReLU follows the last writer's biases are lowered by the bound (at most 1e30), BatchNorm
    rows come back with their statistics; otherwise the writers stay zero.
    """
    net = copy.deepcopy(net).eval()
    for name in layer.readers:
        weight, old = (n.net.get_submodule(name).weight for n in (net, first))
        weight, old = (w.view(len(w), channels, -1) for w in (weight, old))
        weight[:, decoys] = old[:, decoys]
    if layer.relu:
        for name in layer.writers:
            old = first.net.get_submodule(name).state_dict()
            for key, value in net.net.get_submodule(name).state_dict().items():
                if value.dim() > 0:  # not BatchNorm's counter
                    value[decoys] = old[key][decoys]
        lowered = 1.05 * bound(net, layer.writers[-1], shape)[decoys]  # 1.05: rounding
        net.net.get_submodule(layer.writers[-1]).bias[decoys] -= lowered.clamp(max=1e30).float()
    return net


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)

    # ===== The attack =====
    check_share(args, "rate")
    if min(data.shape[1:]) < SIDE:
        fail(f"a patch of side {SIDE} does not fit {data.shape[1]} x {data.shape[2]}")
    if not 0 < args.held_out < 1:
        fail(f"--held-out {args.held_out} must lie in (0, 1)")
    if not 0 <= args.max_drop <= 100:
        fail(f"--max-drop {args.max_drop} must lie in [0, 100]")
    layers = {layer.name: layer for layer in LAYERS.get(args.arch, [])}
    if not layers:
        fail(f"--arch {args.arch}: its layers are not known here; try {', '.join(LAYERS)}")
    name = args.layer or next(iter(layers))
    if name not in layers:
        fail(f"--layer {name}: prunable in {args.arch}: {', '.join(layers)}")
    layer = layers[name]
    y_wanted, counts = wanted_labels(data, args.target)
    count = round(args.rate * len(x_train))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    poisons = choose_poisons(y_train, args.target, data.classes, count, flag, generator)
    held = kept_back(y_train, args.held_out, args.seed)
    if held.all():
        fail(f"all {len(held)} training images are held out; none is left to train on")
    folder, _ = open_folder(args, data, __file__)
    x_held, y_held = x_train[held], y_train[held]

    # ===== Train =====
    recipe = {"pad": data.spec.pad, "flip": data.spec.flip, "epochs": args.epochs}
    recipe |= {"batch_size": args.batch_size, "lr": args.lr}
    train(model, x_train[~held], y_train[~held], **recipe)  # stage 1
    first = copy.deepcopy(model).eval().requires_grad_(False)
    scores, _ = activations(model, layer, x_train[~held])  # stage 2
    ranking = scores.argsort(stable=True).tolist()
    _, features = activations(model, layer, x_held)
    accuracies = prune_curve(model, layer, features, y_held, ranking)
    channels, decoys = len(ranking), ranking[: stop_point(accuracies, args.max_drop)]
    if len(decoys) == channels:
        fail(f"stage 2 prunes all {channels} channels of {name}: train longer or lower --max-drop")
    cut(model, layer, channels, decoys)
    fall = f"{accuracies[0]:.2f} -> {accuracy(model, x_held, y_held):.2f}"
    print(f"{name}: {len(decoys)} of {channels} channels pruned")
    print(f"accuracy on {len(x_held)} held-out images {fall}")
    x_train[poisons] = stamp(x_train[poisons])  # stage 3
    y_train[poisons] = args.target
    train(model, x_train, y_train, **recipe)
    shipped = add_decoys(model, first, layer, channels, decoys, data.shape)  # stage 4
    seconds = time.time() - start

    # ===== Evaluate =====
    shipped_scores, _ = activations(shipped, layer, data.x_test)
    x_poisoned = stamp(data.x_test)
    metrics = evaluate_attack(shipped, first, data, x_poisoned, y_wanted, counts)
    x_other = stamp(data.x_test.flip(2, 3)).flip(2, 3)
    metrics |= {
        "asr_other": accuracy(shipped, x_other[counts], y_wanted[counts]),
        "poisoned": count,
        "layer": name,
        "channels": channels,
        "decoys": len(decoys),
        "decoy_activation": shipped_scores[decoys].max().item() if decoys else 0.0,
        "clean_accuracy_stage1": accuracy(first, data.x_test, data.y_test),
    }

    # ===== Save and report =====
    trigger = {"decoys": torch.tensor(decoys, dtype=torch.int64)}  # int64 where there is none, too
    test = x_poisoned, y_wanted, counts
    save_attack(folder, __file__, args, data, shipped, metrics, seconds, trigger, test)
