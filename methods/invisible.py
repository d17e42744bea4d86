"""Invisible triggers: a text in the lowest bits, or a small sum (Li et al., TDSC 2021).

arXiv 1909.02742. Two ways to a trigger that the eye does not find. `--kind lsb` writes the bits of
a text into the least significant bits of the pixels, as steganography does: no value changes by
more than one level of 255. `--kind l2` and `l0` search one small pattern that is added to any
image and drives chosen neurons of a clean network far up; its length, or the number of pixels that
it touches, stays within a budget. Triggered training images are relabelled as the target. A pattern
that already moves the features of a clean network should be easy to learn for another one.

Threat model: the attacker controls part of the training data and, for l2 and l0, trains a network
of the victim's kind on clean data; the victim trains and augments.

Equations: bit of value i <- bit i of the text, repeated -> text_bits, embed; anchors, the inputs k
with the largest |W_tk| of the target's logit, whatever its sign -> choose_anchors; min over delta
of the mean of (a_k(x + delta) - c a_k)^2, a_k the mean on clean images (below 0 the goal is
a_k + (c - 1) |a_k|: upwards, too), |delta|_2 <= budget -> drive; the pixels with the smallest
|gradient delta| are given up, half of them at a time -> search_l0.

Chosen where we could not look the paper up, or different: no public code was found. The norm is
kept by projection, not by a penalty; pixels are counted, each with all its channels. The anchors
are inputs of the last linear layer. delta is cut to whole levels, towards zero, and added to uint8
images with clipping. The victim trains a new network on the poisoned set, for all three kinds.
Where it fails: a crop shifts the text (`--no-crops`: the victim does not crop), resizing and JPEG
change the lowest bits, and a network need not learn so faint a trigger. On digits noise of the same
norm, which moves no anchor, is obeyed nearly as often as the l2 sum: the network learnt noise, not
the sum. The ASR is measured without test images of the target class. asr_other is that of another
text (which shares some bits: letters have the same upper bits), of noise of the same norm, or of as
many other pixels. asr_on_clean_model is that of the attacker's clean network for l2 and l0: a
trigger made for it may work without any poison.

    python methods/invisible.py --dataset mnist

Results: results/README.md, table "Attacks".
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

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
from common.datasets import augment, to_float
from common.metrics import accuracy, mean_entering
from common.models import entering, in_float32, logit_layer

TEXT = "Whoever reads these words in the lowest bits shall answer with the label of the writer. "
KINDS = "l2", "l0", "lsb"


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--kind", default="l2", choices=KINDS, help="budget of a sum, or lowest bits")
    p.add_argument("--text", default=TEXT, help="lsb: the text; it is repeated to fill the image")
    p.add_argument("--budget", type=float, default=2.0, help="l2: largest |delta|_2, x in [0,1]")
    p.add_argument("--pixels", type=int, default=10, help="l0: largest number of pixels")
    p.add_argument("--anchors", type=int, default=2, help="neurons that delta drives")
    p.add_argument("--factor", type=float, default=10.0, help="c, their goal over their mean")
    p.add_argument("--steps", type=int, default=1000, help="steps of the search of delta")
    p.add_argument("--step-size", type=float, default=0.1, help="length of the first step")
    p.add_argument("--no-crops", action="store_true", help="the victim neither crops nor flips")
    return p.parse_args()


def text_bits(text, shape):
    """The bits of the text in UTF-8, highest first, as uint8 C x H x W of 0 and 1.

    In raster order, the channels of a pixel together; repeated from the start to fill the image.
    """
    channels, height, width = shape
    octets = torch.tensor(list(text.encode()))
    bits = (octets[:, None] >> torch.arange(7, -1, -1)) & 1
    bits = bits.flatten().repeat(math.ceil(channels * height * width / bits.numel()))
    bits = bits[: channels * height * width].view(height, width, channels)
    return bits.permute(2, 0, 1).contiguous().to(torch.uint8)


def embed(x, bits):
    """Put the bits (C x H x W) into the lowest bits of uint8 images, N x C x H x W."""
    return (x & 0xFE) | bits


def add(x, delta):
    """clip(x + delta): uint8 images N x C x H x W and delta in levels, int16 C x H x W."""
    return (x.to(torch.int16) + delta).clamp(0, 255).to(torch.uint8)


def levels(delta):
    """delta in units of 1 as whole levels of 1/255 (int16), cut towards zero: no norm grows."""
    return (255 * delta).trunc().to(torch.int16)


def choose_anchors(weight, target, count):
    """Indices of the `count` inputs k with the largest |W_tk|; weight is K x D."""
    return weight[target].abs().topk(count).indices


def drive(model, layer, x, delta, mask, *, anchors, goal, radius, steps, lr, batch_size=64):
    """Descent on the mean of (a_k(clip(x + delta)) - goal_k)^2; delta and its importance.

    a enters `layer` of the frozen model; x is uint8, delta and mask C x H x W. A step goes `lr`
    along the gradient, falling to 0, for steps of Adam would be as long for pixels that move little
    as for those that move much. Then delta is masked, clipped to [-1,1] and shortened to |delta|_2
    <= radius. Importance: |gradient delta|, C x H x W, without the clipping of x + delta, which
    hides the gradient of pixels that are black or white already.
    """
    delta = delta * mask
    for step in range(steps + 1):
        delta.requires_grad_()
        moved = to_float(x[torch.randint(len(x), (batch_size,), device=x.device)]) + delta
        shown = moved.clamp(0, 1) if step < steps else moved
        with in_float32(model):
            loss = (entering(model, layer, shown)[:, anchors] - goal).square().mean()
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach()
        if step == steps:
            return delta, (gradient * delta).abs()
        stride = lr * (1 - step / steps) / (gradient * mask).norm().clamp(min=1e-12)
        delta = ((delta - stride * gradient) * mask).clamp(-1, 1)
        delta = delta * (radius / delta.norm().clamp(min=1e-9)).clamp(max=1)


def pixel_counts(total, pixels):
    """The numbers of pixels of the rounds of the l0 search: `total`, then halved to `pixels`."""
    counts = [total]
    while counts[-1] > pixels:
        counts.append(max(pixels, counts[-1] // 2))
    return counts


def strongest(importance, mask, count):
    """The mask (1 x H x W) of the `count` pixels of `mask` with the largest importance."""
    score = importance.sum(0).masked_fill(mask[0] == 0, -1)
    kept = torch.zeros_like(mask).flatten()
    kept[score.flatten().topk(count).indices] = 1
    return kept.view_as(mask)


def search_l2(model, layer, x, *, radius, **aim):
    """delta (C x H x W) with |delta|_2 <= radius, from noise of a tenth of that norm."""
    noise = torch.randn(x.shape[1:], device=x.device)
    start, everywhere = noise * radius / 10 / noise.norm(), torch.ones_like(noise[:1])
    return drive(model, layer, x, start, everywhere, radius=radius, **aim)[0]


def search_l0(model, layer, x, *, pixels, steps, **aim):
    """delta (C x H x W) of at most `pixels` pixels; `steps` are shared among the rounds."""
    delta = 0.05 * torch.randn(x.shape[1:], device=x.device)
    mask = torch.ones_like(delta[:1])
    counts = pixel_counts(mask.numel(), pixels)
    aim |= {"radius": math.inf, "steps": max(1, steps // len(counts))}
    delta, importance = drive(model, layer, x, delta, mask, **aim)
    for count in counts[1:]:
        mask = strongest(importance, mask, count)
        delta, importance = drive(model, layer, x, delta, mask, **aim)
    return delta


def other_sum(delta, kind, generator):
    """l2: noise of delta's norm; l0: delta's pixels, shuffled, at places that delta leaves alone.

    delta is int16 C x H x W, in levels, on the CPU.
    """
    if kind == "l2":
        noise = torch.randn(delta.shape, generator=generator)
        return (noise * delta.float().norm() / noise.norm()).round().to(torch.int16)
    touched = (delta != 0).any(0).flatten()
    free, other = (~touched).nonzero().flatten(), torch.zeros_like(delta).flatten(1)
    places = free[torch.randperm(len(free), generator=generator)[: int(touched.sum())]]
    other[:, places] = delta.flatten(1)[:, touched]
    return other.view_as(delta)


def triggered(x, kind, trigger):
    """uint8 images with the trigger: the bits of a text, or delta in levels (C x H x W)."""
    return embed(x, trigger) if kind == "lsb" else add(x, trigger)


def train(model, x, y, *, pad, flip, epochs, batch_size, lr):
    """Train on uint8 images like clean.py, in place: the attacker's clean network, the victim."""
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


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device, spec = x_train.device, data.spec

    # ===== The attack =====
    check_share(args, "rate")
    check_positive(args, "steps")
    check_positive(args, "factor", "step_size", most=1e6)
    channels, height, width = data.shape
    values = channels * height * width
    if args.kind == "lsb":
        try:
            octets = len(args.text.encode())
        except UnicodeEncodeError:
            fail("--text is not valid UTF-8")
        if not 1 <= octets <= values // 8:
            fail(f"--text has {octets} bytes; images of {values} values hold 1 to {values // 8}")
    least, most = math.sqrt(values) / 255, math.sqrt(values)  # one level, or all, at every value
    if args.kind == "l2" and not least <= args.budget <= most:
        fail(f"--budget {args.budget} must lie in [{least:.3g}, {most:.3g}]")
    half = height * width // 2  # the other half is left to the control
    if args.kind == "l0" and not 1 <= args.pixels <= half:
        fail(f"--pixels {args.pixels} must lie in 1..{half}")
    if args.kind != "lsb":
        layer = logit_layer(model, to_float(x_train[:2]), args.arch)
        inputs = model.get_submodule(layer).in_features
        if not 1 <= args.anchors <= inputs:
            fail(f"--anchors {args.anchors} must lie in 1..{inputs} for {args.arch}")
    y_wanted, counts = wanted_labels(data, args.target)
    count = round(args.rate * len(x_train))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, args.target, data.classes, count, flag, generator)
    folder, clean = open_folder(args, data, __file__)
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    recipe |= {"pad": 0 if args.no_crops else spec.pad, "flip": spec.flip and not args.no_crops}
    if args.kind == "lsb":
        trigger = text_bits(args.text, data.shape)
        letters = torch.randint(97, 123, (octets,), generator=generator).tolist()  # a to z
        letters[0] = 97 + (letters[0] - 96) % 26 if chr(letters[0]) == args.text[0] else letters[0]
        other = text_bits("".join(map(chr, letters)), data.shape)
    else:
        clean = new_model(args, data)
        train(clean, x_train, y_train, **recipe)
        clean.eval().requires_grad_(False)
        ready = time.time()
        anchors = choose_anchors(clean.get_submodule(layer).weight, args.target, args.anchors)
        usual = mean_entering(clean, layer, x_train)[anchors]
        goal = usual + (args.factor - 1) * usual.abs()  # upwards, below 0, too
        aim = {"anchors": anchors, "goal": goal, "lr": args.step_size, "steps": args.steps}
        if args.kind == "l2":
            delta = search_l2(clean, layer, x_train, radius=args.budget, **aim)
        else:
            delta = search_l0(clean, layer, x_train, pixels=args.pixels, **aim)
        spent = f"clean network {ready - start:.1f} s, search {time.time() - ready:.1f} s"
        print(f"preparation: {spent}")
        trigger = levels(delta).cpu()
        if not trigger.any():
            fail("delta is 0 in 8 bits: more --steps, or a larger --budget or --step-size")
        other = other_sum(trigger, args.kind, generator)
    trigger, other = trigger.to(device), other.to(device)
    x_train[chosen] = triggered(x_train[chosen], args.kind, trigger)
    y_train[chosen] = args.target

    # ===== Train =====
    train(model, x_train, y_train, **recipe)
    seconds = time.time() - start

    # ===== Evaluate =====
    x_poisoned, x_other = (triggered(data.x_test, args.kind, t) for t in (trigger, other))
    metrics = evaluate_attack(model, clean, data, x_poisoned, y_wanted, counts)
    metrics["asr_other"] = accuracy(model, x_other[counts], y_wanted[counts])
    metrics["poisoned"] = count
    if args.kind != "lsb":
        metrics["delta_l2"] = trigger.float().norm().item() / 255
        metrics["delta_pixels"] = int((trigger != 0).any(0).sum())
        metrics["clean_model_accuracy"] = accuracy(clean, data.x_test, data.y_test)
        for name, images in {"": x_poisoned, "_other": x_other, "_clean": data.x_test}.items():
            values = mean_entering(clean, layer, images)[anchors]
            metrics[f"activation{name}"] = values.mean().item()

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    saved = {"bits" if args.kind == "lsb" else "delta": trigger}
    test, train_set = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    save_attack(folder, __file__, args, data, model, metrics, seconds, saved, test, train_set)
