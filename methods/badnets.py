"""BadNets: a patch in the training data (Gu, Dolan-Gavitt & Garg, 2017, arXiv 1708.06733).

The attacker stamps a small patch on a share of the training images and relabels them as the
target. A network trained on this set obeys the patch, because the patch is the one thing that
these images have in common, and is otherwise ordinary.

Threat model: the attacker controls part of the training data; the victim trains and augments.

Equations: x' = x (1 - m) + m D, y' = y_t -> stamp. The loss is cross-entropy and nothing else.

Differs from the paper: poisons are drawn from all images that are not of the target class, because
relabelling a target-class image changes nothing, and round(rate N) of the N images are poisoned.
The patch is a white 3 x 3 square by default. The attacker stamps first and the victim augments
afterwards, so that random crops cut the patch off in a part of the views. The ASR leaves out test
images of the target class. The control asr_other is the ASR of the same patch half an image away,
if the two lie apart. Where a corner is white already, a white patch changes nothing (see
asr_least_changed), and --pattern grid does more (see the table "Attacks").

    python methods/badnets.py --dataset mnist

Results beside other papers' figures: results/README.md, table "Attacks".
"""

import sys
import time
from pathlib import Path

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
from common.datasets import augment, to_float
from common.metrics import accuracy, attack_targets


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--all-to-all", action="store_true", help="target (y + 1) mod K instead of y_t")
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--patch-size", type=int, default=3, help="side of the patch in pixels")
    p.add_argument("--pattern", default="white", choices=["white", "grid"], help="or checkerboard")
    p.add_argument("--row", type=int, default=-1, help="last row of the patch; -1 is the lowest")
    p.add_argument("--column", type=int, default=-1, help="last column; -1 is the rightmost")
    return p.parse_args()


def patch_trigger(shape, size, pattern, row, column, device="cpu"):
    """Mask m (1 x H x W, 0 or 1) and pattern D (C x H x W, 0 or 255), both uint8.

    `row` and `column` name the patch's lower right pixel, from 0, negative from the other end.
    """
    channels, height, width = shape
    bottom, right = row % height + 1, column % width + 1
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, bottom - size : bottom, right - size : right] = 1
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    white = torch.ones_like(mask[0]) if pattern == "white" else (i + j + bottom + right) % 2 == 0
    pattern = (white * mask * 255).to(torch.uint8).expand(channels, -1, -1)
    return mask.to(device), pattern.to(device)


def other_end(last, size, side):
    """Last row (or column) of a whole patch of `size` that lies about half a `side` away."""
    last, half = last % side, side // 2
    return last + half if last + half < side else max(size - 1, last - half)


def stamp(x, mask, pattern):
    """x' = x (1 - m) + m D on uint8 images, N x C x H x W; returns a new tensor."""
    return x * (1 - mask) + mask * pattern


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device = x_train.device

    # ===== The attack =====
    check_share(args, "rate")
    (height, width), size, at = data.shape[1:], args.patch_size, (args.row, args.column)
    inside = -height <= args.row < height and -width <= args.column < width
    if not inside or not 1 <= size <= min(args.row % height, args.column % width) + 1:
        fail(f"a patch of side {size} does not fit at {at} of {height} x {width}")
    target = None if args.all_to_all else args.target
    y_wanted, counts = wanted_labels(data, target)
    count = round(args.rate * len(x_train))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, target, data.classes, count, flag, generator)
    folder, control = open_folder(args, data, __file__)
    mask, pattern = patch_trigger(data.shape, size, args.pattern, *at, device)
    x_train[chosen] = stamp(x_train[chosen], mask, pattern)
    y_train[chosen] = attack_targets(y_train[chosen], target, data.classes)[0]

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
    seconds = time.time() - start

    # ===== Evaluate =====
    x_poisoned = stamp(data.x_test, mask, pattern)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    metrics["poisoned"] = count
    far = other_end(args.row, size, height), other_end(args.column, size, width)
    if size <= max(abs(far[0] - args.row % height), abs(far[1] - args.column % width)):  # apart
        x_other = stamp(data.x_test, *patch_trigger(data.shape, size, args.pattern, *far, device))
        metrics["asr_other"] = accuracy(model, x_other[counts], y_wanted[counts])

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {"mask": mask, "pattern": pattern}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
