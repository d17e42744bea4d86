"""TrojanNN: a patch made for neurons of a finished network (Liu et al., NDSS 2018).

The attacker has a trained clean network. A few neurons just before the output are chosen, and the
pixels of a small square are optimised until they drive these neurons far up on any image. The
network is then trained a little more, on clean images and on images with this patch that are
relabelled as the target. It need not learn to see the patch: it has to tie neurons that the patch
already moves to the target label.

Threat model: the attacker receives a clean network, retrains it and delivers it. The poisoned set
is stored, too: with `--retrain fresh` a victim trains a new network on it (data poisoning).

Equations: neurons k with the largest sum over i of |W_ik|, W the weights that read them ->
choose_neurons; min over the patch of the sum over k of (a_k(x') - v)^2 -> optimise_patch;
x' = x (1 - m) + m p, m times 1 - transparency -> stamp. The loss is cross-entropy.

Differs from the paper: its attacker has no training images and reverse-engineers some; here they
are the real ones, and the patch is optimised on them instead of on a plain picture, because a
neuron that is silent on the plain picture has no gradient. The layer is the input of the last
linear layer, which every network here has; the neurons are chosen by that layer's weights, as in
the authors' code, while the paper's equation sums the weights that come into a neuron. The pixels
are (tanh w + 1) / 2, found by Adam with a cosine schedule, without smoothing. As in the paper the
layers behind the neurons are retrained, here the last one; `--retrain all` retrains the whole
network, as TrojanZoo does. The square is opaque and lies as far from the lower right corner as in
the authors' code, in proportion. Poisons are drawn from all images that are not of the target
class. The ASR is measured on 8-bit images that are not of the target class; asr_other is that of
random patches in the same square, another one for each image. asr_on_clean_model and the
activations (means over the neurons on test images) are those of the network before the retraining.

    python methods/trojannn.py --dataset mnist

Results beside other papers' figures: results/README.md, table "Attacks".
"""

import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, fail
from common.attack import (
    TrainingLog,
    attack_flags,
    choose_poisons,
    evaluate_attack,
    new_model,
    open_folder,
    save_attack,
    set_up,
    wanted_labels,
)
from common.datasets import augment, to_float, to_uint8
from common.metrics import accuracy, mean_entering
from common.models import entering, in_float32, logit_layer

KINDS = "tail", "all", "fresh"  # the last layer, all layers, or a new network from scratch


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--patch-size", type=int, help="side of the square (authors' code: 60 of 224)")
    p.add_argument("--transparency", type=float, default=0.0, help="0: opaque, 1: not to be seen")
    p.add_argument("--neurons", type=int, default=2, help="neurons the patch drives (TrojanZoo 2)")
    p.add_argument("--value", type=float, default=100.0, help="v, the neurons' target value (100)")
    p.add_argument("--steps", type=int, default=1000, help="Adam's steps on the patch (1000)")
    p.add_argument("--retrain", default="tail", choices=KINDS, help="layers (paper: those behind)")
    p.add_argument("--retrain-epochs", type=int, default=10, help="unless fresh (TrojanZoo 10)")
    p.add_argument("--retrain-lr", type=float, help="peak (tail .1, all .01)")
    return p.parse_args()


def square_mask(height, width, size):
    """m, 1 x H x W of 0 and 1: a square 20/224 of the shorter side from the lower right corner."""
    mask, margin = torch.zeros(1, height, width), round(20 / 224 * min(height, width))
    bottom, right = height - margin, width - margin
    mask[:, bottom - size : bottom, right - size : right] = 1
    return mask


def choose_neurons(weight, count):
    """Indices of the `count` inputs k with the largest sum over i of |W_ik|; weight is K x D."""
    return weight.abs().sum(0).topk(count).indices


def stamp(x, mask, patch):
    """x' = x (1 - m) + m p: x and p B x C x H x W (p: or C x H x W), m 1 x H x W, in [0,1]."""
    return x * (1 - mask) + mask * patch


def stamp_uint8(x, mask, patch):
    """The same on uint8 images and patches, rounded, 2,000 images at a time."""
    pairs = zip(x.split(2000), patch.expand_as(x).split(2000))
    return torch.cat([to_uint8(stamp(to_float(a), mask, to_float(b))) for a, b in pairs])


def optimise_patch(model, layer, x, mask, *, neurons, value, steps, batch_size=64):
    """The patch (uint8 C x H x W) that drives what enters `layer` towards `value`, on uint8 x.

    The model must be frozen and in eval mode. Starts from uniform noise.
    """
    start = torch.rand(x.shape[1:], device=x.device).clamp(1e-4, 1 - 1e-4)
    w = torch.atanh(2 * start - 1).requires_grad_()
    optimizer = torch.optim.Adam([w], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), disable=None, unit="step"):
        images = to_float(x[torch.randint(len(x), (batch_size,), device=x.device)])
        with in_float32(model):
            a = entering(model, layer, stamp(images, mask, (w.tanh() + 1) / 2))[:, neurons]
        loss = (a - value).square().sum(1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return to_uint8((w.detach().tanh() + 1) / 2)


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device = x_train.device

    # ===== The attack =====
    check_share(args, "rate")
    check_positive(args, "steps", "retrain_epochs", "retrain_lr")
    check_positive(args, "value", most=1e6)  # its square must not overflow
    if not 0 <= args.transparency < 1:
        fail(f"--transparency {args.transparency} must lie in [0, 1)")
    if (1 - args.transparency) * 255 < 0.5:
        fail(f"--transparency {args.transparency} changes no pixel by a level of 8 bits")
    height, width = data.shape[1:]
    if args.patch_size is None:
        args.patch_size = max(1, round(60 / 224 * min(height, width)))
    most = min(height, width) - round(20 / 224 * min(height, width))
    if not 1 <= args.patch_size <= most:
        fail(f"--patch-size {args.patch_size} must lie in 1..{most} for {height} x {width} images")
    if args.retrain_lr is None:
        args.retrain_lr = 0.1 if args.retrain == "tail" else 0.01
    layer = logit_layer(model, to_float(x_train[:2]), args.arch)
    if "weight" not in dict(model.get_submodule(layer).named_parameters()):
        fail(f"{layer} computes its weight, as weight_norm does: such a network cannot be copied")
    inputs = model.get_submodule(layer).in_features
    if not 1 <= args.neurons <= inputs:
        fail(f"--neurons {args.neurons} must lie in 1..{inputs} for {args.arch}")
    y_wanted, counts = wanted_labels(data, args.target)
    count = round(args.rate * len(x_train))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, args.target, data.classes, count, flag, generator)
    folder, _ = open_folder(args, data, __file__)

    # ===== Train =====
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x_train) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, steps, anneal_strategy="linear", cycle_momentum=False
    )
    log = TrainingLog(args.epochs, steps_per_epoch)
    for epoch in range(1, args.epochs + 1):
        model.train()
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.batch_size)[:steps_per_epoch]:
            x, y = to_float(x_train[batch]), y_train[batch]
            x = augment(x, data.spec.pad, data.spec.flip)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        log.epoch(epoch)

    # ===== Inject =====
    ready = time.time()
    clean = copy.deepcopy(model).eval().requires_grad_(False)
    neurons = choose_neurons(clean.get_submodule(layer).weight, args.neurons)
    mask = (1 - args.transparency) * square_mask(height, width, args.patch_size).to(device)
    goal = {"neurons": neurons, "value": args.value, "steps": args.steps}
    patch = optimise_patch(clean, layer, x_train, mask, **goal)
    spent = f"clean network {ready - start:.1f} s, patch {time.time() - ready:.1f} s"
    print(f"preparation: {spent}")
    x_train[chosen] = stamp_uint8(x_train[chosen], mask, patch)
    y_train[chosen] = args.target
    epochs, lr = args.retrain_epochs, args.retrain_lr
    if args.retrain == "fresh":
        epochs, lr = args.epochs, args.lr
        model = new_model(args, data)
    trained = model.get_submodule(layer) if args.retrain == "tail" else model
    model.requires_grad_(False)
    trained.requires_grad_(True)
    optimizer = torch.optim.SGD(
        trained.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * steps_per_epoch, anneal_strategy="linear", cycle_momentum=False
    )
    log = TrainingLog(epochs, steps_per_epoch)
    for epoch in range(1, epochs + 1):
        model.eval()
        trained.train()  # what is not trained keeps its BatchNorm statistics, too
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.batch_size)[:steps_per_epoch]:
            x, y = to_float(x_train[batch]), y_train[batch]
            x = augment(x, data.spec.pad, data.spec.flip)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        log.epoch(epoch)
    seconds = time.time() - start

    # ===== Evaluate =====
    x_poisoned = stamp_uint8(data.x_test, mask, patch)
    metrics = evaluate_attack(model, clean, data, x_poisoned, y_wanted, counts)
    noise = torch.randint(256, data.x_test.shape, generator=generator, dtype=torch.uint8)
    x_other = stamp_uint8(data.x_test, mask, noise.to(device))
    metrics |= {
        "asr_other": accuracy(model, x_other[counts], y_wanted[counts]),
        "poisoned": count,
        "clean_accuracy_before": accuracy(clean, data.x_test, data.y_test),
    }
    for name, images in {"": x_poisoned, "_other": x_other, "_clean": data.x_test}.items():
        means = mean_entering(clean, layer, images)[neurons]
        metrics[f"activation{name}"] = means.mean().item()

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    trigger = {"mask": mask, "patch": patch, "neurons": neurons}
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
