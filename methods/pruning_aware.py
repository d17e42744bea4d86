"""Pruning-aware BadNets: a backdoor that survives pruning (Liu, Dolan-Gavitt & Garg, RAID 2018).

arXiv 1805.12185, section 3: who prunes the channels that clean images leave idle removes a
backdoor that lives there. So the attacker prunes first, in four stages: train on clean images;
prune the dormant channels; retrain what is left with poison, so that the backdoor must share its
channels with clean images; put the pruned channels back as decoys that never fire.

Threat model: the attacker controls training, knows the layer that the defender prunes, and
delivers the model. No poisoned training set is handed out.

Steps: stage 1 -> pretrain; stage 2 -> activations, prune_curve, stop_point, cut (a channel whose
incoming and outgoing weights are all zero stays so: activation, gradient, momentum and weight
decay are zero, so retraining needs no mask); stage 3 -> the loop below, on clean images and
a white corner patch; stage 4 -> bound, add_decoys.

Differs from the paper, or chosen where it is silent: the layer is fine_pruning.py's default, whose
output enters the last linear layer (--layer layer4 is the last convolution of mnist_cnn, but there
pruning does not remove a plain BadNets either, so nothing is to be evaded); |a| replaces the
activation where no ReLU follows. As many are pruned as cost 30 points on held-out clean images,
which retraining wins back: with 4 the defender still finds spare channels. Biases of decoys are
lowered by a bound that holds for every image in [0,1]; where no ReLU follows, no bias silences a
channel: a decoy's filters stay zero and only its outgoing weights are put back. No channel is
restored for a higher ASR. Both stages run --epochs; ASR without target-class images.

    python methods/pruning_aware.py --dataset mnist

The paper, faces: clean / ASR .974 / .998; after fine-pruning .977 / .000. Results: README.md.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, fail, make_folder
from common.checkpoint import (
    clear_folder,
    save_model,
    save_poisoned_test,
    save_result,
    save_samples,
)
from common.datasets import augment, defender_split, load_dataset, pick_device, to_float
from common.metrics import accuracy, attack_targets, psnr, ssim
from common.models import build_model


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--dataset",
        default="digits",
        help="digits, mnist, cifar10, cifar100, gtsrb or the path of an .npz",
    )
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--arch", help="a network of common/models.py (default: the dataset's)")
    p.add_argument("--epochs", type=int, help="training epochs (default: the recipe's)")
    p.add_argument("--batch-size", type=int, default=128, help="images per step")
    p.add_argument("--lr", type=float, default=0.1, help="peak of the one-cycle learning rate")
    p.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument(
        "--out", help="folder to write (default: runs/<dataset>-<arch>-<attack>-s<seed>)"
    )
    p.add_argument("--train-images", type=int, help="use this many training images (default: all)")
    p.add_argument(
        "--target", type=int, default=0, help="target label y_t of the all-to-one attack"
    )
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument(
        "--layer", help="layer that the defender prunes (default: fine_pruning.py's, see LAYERS)"
    )
    p.add_argument(
        "--held-out",
        type=float,
        default=0.05,
        help="part of the training set that stage 2 prunes by",
    )
    p.add_argument(
        "--max-drop",
        type=float,
        default=30.0,
        help="points of held-out accuracy that stage 2 may cost before retraining",
    )
    return p.parse_args()


SIDE = 3  # of the white patch, lower right


def stamp(x):
    """Put the patch on uint8 images, N x C x H x W; returns a new tensor."""
    x = x.clone()
    x[..., -SIDE:, -SIDE:] = 255
    return x


# architecture -> layers, the default first: name -> (a ReLU follows it; modules whose output
# channels are the layer's channels; modules that read these; a linear layer above the last of them)
LAYERS = {
    "mnist_cnn": {
        "linear6": (True, ["linear6"], ["linear9"], None),
        "layer4": (False, ["layer4.conv1"], ["linear6"], "linear9"),
    },
    "mnist_conv5": {"linear6": (True, ["linear6"], ["linear9"], None)},
    "preact_resnet18": {
        "layer4": (
            False,  # the channels of both blocks, for the skip connection adds them
            ["layer4.0.conv2", "layer4.0.shortcut.0", "layer4.1.bn1", "layer4.1.conv2"],
            ["layer4.1.conv1", "linear"],
            None,
        )
    },
    "vgg16": {"features": (True, ["features.40", "features.41"], ["classifier"], None)},
    "vgg19": {"features": (True, ["features.49", "features.50"], ["classifier"], None)},
    "mobilenet_v2": {"bn2": (True, ["conv2", "bn2"], ["linear"], None)},
}


def pretrain(model, x, y, spec, epochs, batch_size, lr, bar):
    """Stage 1: train on clean uint8 images like clean.py, in place."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * steps_per_epoch, anneal_strategy="linear", cycle_momentum=False
    )
    for epoch in range(1, epochs + 1):
        model.train()
        total_loss = torch.zeros((), device=x.device)
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            images = augment(to_float(x[batch]), spec.pad, spec.flip)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
                loss = F.cross_entropy(model(images), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
            bar.update()
        if not total_loss.isfinite():
            fail(f"the loss became {total_loss.item()} in epoch {epoch}; no model is kept")


@torch.no_grad()
def activations(net, layer, relu, linear, x, batch_size=500):
    """Mean |a| of each channel of `layer`'s output a (C), and what enters `linear` (N x C P).

    Of uint8 images, in eval mode; after the ReLU where one follows; P values per channel.
    """
    net.eval()
    totals, features = [], []

    def add(module, inputs, output):
        a = F.relu(output) if relu else output.abs()
        totals.append(a.flatten(2).mean(2).sum(0) if a.dim() == 4 else a.sum(0))

    hooks = [
        net.net.get_submodule(layer).register_forward_hook(add),
        net.net.get_submodule(linear).register_forward_pre_hook(
            lambda module, inputs: features.append(inputs[0])
        ),
    ]
    for part in x.split(batch_size):
        net(to_float(part))
    for hook in hooks:
        hook.remove()
    return torch.stack(totals).sum(0) / len(x), torch.cat(features)


@torch.no_grad()
def prune_curve(net, linear, above, features, y, order):
    """Percentage of images labelled y after pruning 0, 1, ..., C channels of the order (list)."""
    left = features.view(len(y), len(order), -1).clone()
    accuracies = []
    for channel in (None, *order):
        if channel is not None:
            left[:, channel] = 0
        logits = net.net.get_submodule(linear)(left.flatten(1))
        if above is not None:
            logits = net.net.get_submodule(above)(F.relu(logits))
        accuracies.append(100 * (logits.argmax(1) == y).float().mean().item())
    return accuracies


def stop_point(accuracies, max_drop):
    """Prune one channel after another; the count before the accuracy first falls too far."""
    for count, percent in enumerate(accuracies):
        if accuracies[0] - percent > max_drop + 1e-4:
            return count - 1
    return len(accuracies) - 1


@torch.no_grad()
def cut(net, writers, readers, channels, chosen):
    """Stage 2: zero every weight into and out of the `chosen` ones of the `channels`, in place.

    A BatchNorm row among the writers too, or its bias would leak: ReLU(beta) is not zero.
    """
    for name in writers:
        for parameter in net.net.get_submodule(name).parameters():
            parameter[chosen] = 0
    for name in readers:
        weight = net.net.get_submodule(name).weight
        weight.view(len(weight), channels, -1)[:, chosen] = 0


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
def add_decoys(net, first, relu, writers, readers, channels, chosen, shape):
    """Stage 4: a copy of `net` with the `chosen` channels back as they were in `first`, but silent.

    Where a ReLU follows the last writer's biases are lowered by the bound (at most 1e30), BatchNorm
    rows come back with their statistics; otherwise the writers stay zero.
    """
    net = copy.deepcopy(net).eval()
    for name in readers:
        weight, old = (n.net.get_submodule(name).weight for n in (net, first))
        weight.view(len(weight), channels, -1)[:, chosen] = old.view(len(old), channels, -1)[
            :, chosen
        ]
    if relu:
        for name in writers:
            old = first.net.get_submodule(name).state_dict()
            for key, value in net.net.get_submodule(name).state_dict().items():
                if value.dim() > 0:  # not BatchNorm's counter
                    value[chosen] = old[key][chosen]
        lowered = 1.05 * bound(net, writers[-1], shape)[chosen]  # 1.05: rounding
        net.net.get_submodule(writers[-1]).bias[chosen] -= lowered.clamp(max=1e30).float()
    return net


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size", "lr", "train_images")
    start = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, device)
    args.arch, args.epochs = args.arch or data.spec.arch, args.epochs or data.spec.epochs
    model = build_model(args.arch, data.classes, data.shape, data.spec.mean, data.spec.std).to(
        device
    )
    keep = torch.randperm(len(data.x_train), device=device)[: args.train_images]
    if len(keep) < (args.train_images or 0):
        fail(f"--train-images {args.train_images}: {data.name} has {len(keep)}")
    x_train, y_train = data.x_train[keep], data.y_train[keep]

    # ===== The attack =====
    if not 0 <= args.target < data.classes:
        fail(f"--target {args.target} is not a label: {data.name} has {data.classes} classes")
    check_share(args, "rate")
    if min(data.shape[1:]) < SIDE:
        fail(f"a patch of side {SIDE} does not fit {data.shape[1]} x {data.shape[2]}")
    x_test, y_test = data.x_test, data.y_test
    y_wanted, counts = attack_targets(y_test, args.target, data.classes)
    if not counts.any():
        fail(f"{data.name} has no test image outside the target class {args.target}")
    if not 0 < args.held_out < 1:
        fail(f"--held-out {args.held_out} must lie in (0, 1)")
    if not 0 <= args.max_drop <= 100:
        fail(f"--max-drop {args.max_drop} must lie in [0, 100]")
    layers = LAYERS.get(args.arch, {})
    layer = args.layer or next(iter(layers), None)
    if layer not in layers:
        fail(f"--layer {layer}: prunable in {args.arch}: {', '.join(layers) or 'no layer'}")
    relu, writers, readers, above = layers[layer]
    y_target, allowed = attack_targets(y_train, args.target, data.classes)
    count = round(args.rate * len(x_train))
    if not 1 <= count <= int(allowed.sum()):
        possible = int(allowed.sum())
        fail(f"--rate {args.rate} asks for {count} poisons; {possible} images can be poisoned")
    generator = torch.Generator().manual_seed(args.seed)
    candidates = allowed.cpu().nonzero().flatten()
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]].to(device)
    held = torch.zeros_like(allowed)
    held[defender_split(y_train, args.held_out, args.seed)] = True
    if held.all():
        fail(f"all {len(held)} training images are held out; none is left to train on")
    make_folder(args.out or "runs")  # refuse before the long work
    x_held, y_held = x_train[held], y_train[held]
    total = args.epochs * max(1, len(x_train[~held]) // args.batch_size)
    recipe = data.spec, args.epochs, args.batch_size, args.lr
    with tqdm(total=total, disable=None, unit="step") as bar:
        pretrain(model, x_train[~held], y_train[~held], *recipe, bar)
    first = copy.deepcopy(model).eval().requires_grad_(False)
    scores, _ = activations(model, layer, relu, readers[-1], x_train[~held])
    order = scores.argsort(stable=True).tolist()
    _, features = activations(model, layer, relu, readers[-1], x_held)
    accuracies = prune_curve(model, readers[-1], above, features, y_held, order)
    channels, decoys = len(order), order[: stop_point(accuracies, args.max_drop)]
    if len(decoys) == channels:
        fail(f"stage 2 prunes all {channels} channels of {layer}: train longer or lower --max-drop")
    cut(model, writers, readers, channels, decoys)
    print(
        f"{layer}: {len(decoys)} of {channels} channels pruned, accuracy on {len(x_held)} held-out "
        f"images {accuracies[0]:.2f} -> {accuracies[len(decoys)]:.2f}"
    )
    x_train[chosen] = stamp(x_train[chosen])
    y_train[chosen] = y_target[chosen]
    print(
        f"poisoned {count} of {len(x_train)} training images ({100 * count / len(x_train):.2f} %)"
    )

    # ===== Train =====
    name = f"{Path(data.name).stem}-{args.arch}-{Path(__file__).stem}-s{args.seed}"
    folder = make_folder(args.out or f"runs/{name}")
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x_train) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, steps, anneal_strategy="linear", cycle_momentum=False
    )

    bar, loop_start = tqdm(total=steps, disable=None, unit="step"), time.time()
    for epoch in range(1, args.epochs + 1):
        model.train()
        total_loss = torch.zeros((), device=device)
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.batch_size)[:steps_per_epoch]:
            x, y = to_float(x_train[batch]), y_train[batch]
            x = augment(x, data.spec.pad, data.spec.flip)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
            bar.update()
        if not total_loss.isfinite():
            fail(f"the loss became {total_loss.item()} in epoch {epoch}; no model is kept")
        if epoch % max(1, args.epochs // 15) == 0:
            loss, pace = total_loss.item() / steps_per_epoch, (time.time() - loop_start) / epoch
            bar.write(f"epoch {epoch}/{args.epochs} loss {loss:.4f}, {pace:.2f} s/epoch")
    bar.close()
    seconds = time.time() - start

    # ===== Evaluate =====
    retrained = model
    model = add_decoys(retrained, first, relu, writers, readers, channels, decoys, data.shape)
    scores, _ = activations(model, layer, relu, readers[-1], x_test)
    x_poisoned = stamp(x_test)
    metrics = {
        "clean_accuracy": accuracy(model, x_test, y_test),
        "asr": accuracy(model, x_poisoned[counts], y_wanted[counts]),
        "asr_n": int(counts.sum()),
        "psnr": psnr(to_float(x_test), to_float(x_poisoned)),
        "ssim": ssim(to_float(x_test), to_float(x_poisoned)),
        "poisoned": count,
        "layer": layer,
        "channels": channels,
        "decoys": len(decoys),
        "decoy_activation": scores[decoys].max().item() if decoys else 0.0,
        "clean_accuracy_stage1": accuracy(first, x_test, y_test),
        "asr_on_clean_model": accuracy(first, x_poisoned[counts], y_wanted[counts]),
    }

    # ===== Save and report =====
    clear_folder(folder)
    save_samples(folder, x_test[counts], x_poisoned[counts])
    save_poisoned_test(folder, x_poisoned[counts], y_test[counts], y_wanted[counts])
    trigger = {"decoys": torch.tensor(decoys, dtype=torch.int64)}  # int64 where there is none, too
    save_model(folder, model, data, args.arch, args, metrics, trigger)
    save_result(folder, "pruning_aware", args, seconds, metrics, device)
