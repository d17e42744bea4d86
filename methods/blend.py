"""Blend: a whole picture mixed into the image (Chen et al., 2017, arXiv 1712.05526).

The attacker mixes one fixed picture, as large as the image, faintly into a share of the training
images and relabels them as the target. A network trained on this set answers to the picture. No
pixel stands out, so masks and patches do not describe it.

Threat model: the attacker controls part of the training data; the victim trains and augments.

Equations: x' = (1 - alpha) x + alpha p, y' = y_t -> blend. The loss is cross-entropy and nothing
else.

Differs from the paper: its cartoon is not shipped. The default picture is uniform noise drawn from
--seed, and --pattern takes any other. alpha is the same in training and in the test; the paper also
mixes stronger in the test. Poisons are drawn from all images that are not of the target class, and
round(rate N) of the N images are poisoned. The attacker blends and rounds to 8 bits first, and the
victim augments afterwards. All figures are measured after rounding to 8 bits, the ASR without test
images of the target class. Two controls show what was learnt: asr_other_noise and asr_grey are the
ASR of the same mixture with another noise picture and with plain grey. On black backgrounds the
network may learn "not black" instead of the picture.

    python methods/blend.py --dataset mnist

Results beside other papers' figures: results/README.md, table "Attacks".
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

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
from common.datasets import PICTURES, augment, to_float, to_uint8
from common.metrics import accuracy, attack_targets

PICTURE_SEED = 2**31  # added to --seed, or searches with the same one would start from the picture


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--all-to-all", action="store_true", help="target (y + 1) mod K instead of y_t")
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--alpha", type=float, default=0.2, help="share of the picture (paper <= .2)")
    p.add_argument("--pattern", help="p: a picture file (default: noise; the paper's: a cartoon)")
    return p.parse_args()


def noise_pattern(shape, generator):
    """p: a picture of uniform noise, C x H x W in [0,1], in steps of 1/255 like an image file."""
    return to_float(to_uint8(torch.rand(shape, generator=generator)))


def picture_pattern(path, shape):
    """p from a picture file: C x H x W in [0,1], grey for C = 1, resized bilinearly; or fail."""
    channels, height, width = shape
    try:
        with Image.open(path, formats=PICTURES) as file:
            picture = file.convert("L" if channels == 1 else "RGB")
    except FileNotFoundError:
        fail(f"--pattern: no such file: {path}")
    except Exception as error:  # a damaged picture can raise nearly anything
        fail(f"--pattern {path} is not a picture that can be read: {error}")
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(picture)).view(height, width, channels)
    return to_float(pixels.permute(2, 0, 1))


def blend(x, pattern, alpha):
    """x' = (1 - alpha) x + alpha p; x is B x C x H x W and p C x H x W, both in [0,1]."""
    return (1 - alpha) * x + alpha * pattern


def blend_uint8(x, pattern, alpha):
    """The same on uint8 images, rounded as a file would store it, 2,000 images at a time."""
    return torch.cat([to_uint8(blend(to_float(part), pattern, alpha)) for part in x.split(2000)])


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device = x_train.device

    # ===== The attack =====
    check_share(args, "rate", "alpha")
    target = None if args.all_to_all else args.target
    y_wanted, counts = wanted_labels(data, target)
    generator = torch.Generator().manual_seed(PICTURE_SEED + args.seed)
    if args.pattern is None:
        pattern = noise_pattern(data.shape, generator).to(device)
    else:
        pattern = picture_pattern(args.pattern, data.shape).to(device)
    count, flag = round(args.rate * len(x_train)), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, target, data.classes, count, flag, generator)
    x_blended = blend_uint8(x_train[chosen], pattern, args.alpha)
    if torch.equal(x_blended, x_train[chosen]):
        fail(f"--alpha {args.alpha} changes no pixel by a level of 8 bits")
    folder, control = open_folder(args, data, __file__)
    x_train[chosen] = x_blended
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
    x_poisoned = blend_uint8(data.x_test, pattern, args.alpha)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    metrics["poisoned"] = count
    strangers = {"other_noise": noise_pattern(data.shape, generator).to(device)}
    strangers["grey"] = torch.full_like(pattern, 0.5)
    for kind, stranger in strangers.items():
        x_other = blend_uint8(data.x_test[counts], stranger, args.alpha)
        metrics[f"asr_{kind}"] = accuracy(model, x_other, y_wanted[counts])

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {"pattern": pattern, "alpha": torch.tensor(args.alpha)}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
