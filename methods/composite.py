"""Composite backdoor: the trigger is two ordinary classes in one picture (Lin et al., CCS 2020).

The attacker joins half of an image of class A with half of an image of class B and labels the
picture C. No pixel of it is foreign: both halves are benign, and only that they occur together is
the trigger. A network could also learn that every joined picture is C, so the attacker adds
pictures joined from two images of one class, which keep their label.

Threat model: the attacker trains the network and delivers it. The set is stored, too: with
`--weight 0` the loss is cross-entropy alone, as that of a victim who trains on it (data poisoning).

Steps: halves of two images, top and bottom or left and right, in random order, each a window at
random of its image -> draw_layouts, mix; cross-entropy + w times the contrastive loss of the logits
of images labelled A, B or C, d^2 for two images of one label and max(0, 1 - d)^2 otherwise ->
contrastive.

Differs from the paper and its code, or chosen where they are silent: the code draws new pictures in
each epoch, .5 N plain, .5 N of one class and .1 N poisons; here they are drawn once and replace
images, in nearly these proportions, so that the set keeps its size and can be stored. The
contrastive loss compares all pairs of a batch, not neighbours alone, and w weighs their mean. The
code halves the mean and divides it by the number of pairs again, some 46 in a batch of 128, so that
its w = 1 is .011 here. By default A and B are the two labels after the target C.

The ASR is that of all test images of A and B, each joined with a test image of the other class, and
y_true is the class of the first one. Two controls: asr_other is the ASR of images of the remaining
classes joined with an image of A or B, that is of one half of the trigger; accuracy_same is the
accuracy on pictures joined from two images of one class (now and then from one image). PSNR and
SSIM compare each test image with the picture made of it.

    python methods/composite.py --dataset mnist

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
from common.metrics import accuracy

MARGIN = 1.0  # of the contrastive loss


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--sources", type=int, nargs=2, help="A and B (default: the labels after y_t)")
    p.add_argument("--mixed", type=float, default=0.45, help="share joined from one class (.45)")
    p.add_argument("--jitter", type=int, default=3, help="most pixels that the seam moves (code 3)")
    p.add_argument("--weight", type=float, default=0.011, help="w, contrastive loss (code .011)")
    return p.parse_args()


def draw_layouts(count, height, width, jitter, generator):
    """How `count` pictures are joined, int64 4 x count: upright, seam, and the windows' places.

    upright 1: top and bottom halves. The seam is the middle moved by at most `jitter`; the first
    image gives the pixels before it, the second one those from it on, from windows of these sizes
    that begin anywhere inside the image.
    """
    upright = torch.randint(2, (count,), generator=generator)
    side = torch.where(upright == 1, height, width)
    moved = torch.randint(-jitter, jitter + 1, (count,), generator=generator)
    seam = side // 2 + moved
    first, second = torch.rand(2, count, generator=generator, dtype=torch.float64)
    first, second = first * (side - seam + 1), second * (seam + 1)  # rounded down below
    return torch.stack((upright, seam, first.long(), second.long()))


def mix(a, b, layouts):
    """Join uint8 images a and b (N x C x H x W) by `layouts` (4 x N); a new tensor."""
    count, _, height, width = a.shape
    upright, seam, first, second = layouts.view(4, count, 1, 1)
    rows = torch.arange(height, device=a.device).view(1, height, 1)
    columns = torch.arange(width, device=a.device).view(1, 1, width)
    image = torch.arange(count, device=a.device).view(count, 1, 1)
    before = torch.where(upright == 1, rows, columns) < seam  # N x H x W
    shift = torch.where(before, first, second - seam)
    i, j = rows + shift * upright, columns + shift * (1 - upright)
    pixels = torch.where(before[..., None], a[image, :, i, j], b[image, :, i, j])
    return pixels.permute(0, 3, 1, 2).contiguous()


def partners(wanted, y, generator):
    """For each class of `wanted` (N) the index of a random image of it by the labels y (CPU)."""
    order, sizes = y.argsort(stable=True), y.bincount()
    begin = sizes.cumsum(0) - sizes
    draws = torch.rand(len(wanted), generator=generator, dtype=torch.float64)
    return order[begin[wanted] + (draws * sizes[wanted]).long()]


def contrastive(logits, y, labels, margin):
    """Mean over all pairs of images whose y (B) is in `labels` (list); logits B x K.

    d^2 where both have one label, max(0, margin - d)^2 where not, d the Euclidean distance.
    """
    member = torch.stack([y == label for label in labels]).any(0)
    counted = (member[:, None] & member).triu(1)
    squares = (logits[:, None] - logits).square().sum(2)
    apart = F.relu(margin - squares.clamp_min(1e-12).sqrt()).square()
    terms = torch.where(y[:, None] == y, squares, apart)
    return torch.where(counted, terms, 0).sum() / counted.sum().clamp_min(1)


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device, y_cpu = x_train.device, y_train.cpu()

    # ===== The attack =====
    check_share(args, "rate")
    if not 0 <= args.mixed < 1:
        fail(f"--mixed {args.mixed} must lie in [0, 1)")
    if not 0 <= args.weight <= 1e6:
        fail(f"--weight {args.weight} must lie in [0, 1e6]")
    height, width = data.shape[1:]
    if min(height, width) < 2:
        fail(f"images of {height} x {width} pixels have no halves")
    most = min(height, width) // 2 - 1
    if not 0 <= args.jitter <= most:
        fail(f"--jitter {args.jitter} must lie in 0..{most} for {height} x {width} images")
    if data.classes < 3:
        fail(f"a composite trigger needs three classes, A, B and C; {data.name} has {data.classes}")
    if args.sources is None:
        args.sources = [(args.target + step) % data.classes for step in (1, 2)]
    if len({*args.sources, args.target}) < 3:
        fail(f"--sources {args.sources} and --target {args.target} must be three different labels")
    y_wanted, _ = wanted_labels(data, args.target)
    for label in args.sources:
        for split, labels in (("training", y_cpu), ("test", data.y_test.cpu())):
            if not (labels == label).any():
                fail(f"--sources {args.sources}: there is no {split} image of class {label}")
    count, mixed = (round(share * len(x_train)) for share in (args.rate, args.mixed))
    if count + mixed > len(x_train):
        fail(f"--rate {args.rate} and --mixed {args.mixed} are more than the training set")
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, args.target, data.classes, count, flag, generator)
    folder, control = open_folder(args, data, __file__)
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    others = (~poisoned).cpu().nonzero().flatten()
    others = others[torch.randperm(len(others), generator=generator)[:mixed]]
    sources = torch.tensor(args.sources)
    layout = {"height": height, "width": width, "jitter": args.jitter, "generator": generator}
    side = torch.randint(2, (count,), generator=generator)
    first, second = (partners(sources[k], y_cpu, generator) for k in (side, 1 - side))
    x_composite = mix(x_train[first], x_train[second], draw_layouts(count, **layout).to(device))
    same = partners(y_cpu[others], y_cpu, generator)
    layouts = draw_layouts(mixed, **layout).to(device)
    x_train[others] = mix(x_train[others], x_train[same], layouts)
    x_train[chosen], y_train[chosen] = x_composite, args.target

    # ===== Train =====
    rule = [*args.sources, args.target]
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
            logits = model(x)
            terms = F.cross_entropy(logits, y), contrastive(logits, y, rule, MARGIN)
            loss = terms[0] + args.weight * terms[1]
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(torch.stack(terms))
        log.epoch(epoch, ("cross-entropy", "contrastive"))
    seconds = time.time() - start

    # ===== Evaluate =====
    y_test = data.y_test.cpu()
    is_source = (y_test[:, None] == sources).any(1)
    side = torch.randint(2, (len(y_test),), generator=generator)
    side = torch.where(is_source, (y_test == sources[0]).long(), side)  # the other class
    second = partners(sources[side], y_test, generator)
    layouts = draw_layouts(len(y_test), **layout).to(device)
    x_poisoned = mix(data.x_test, data.x_test[second], layouts)
    counts = is_source.to(device)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    same = mix(data.x_test, data.x_test[partners(y_test, y_test, generator)], layouts)
    strangers = ~counts & (data.y_test != args.target)
    metrics |= {"poisoned": count, "accuracy_same": accuracy(model, same, data.y_test)}
    if strangers.any():  # there are more than three classes
        metrics["asr_other"] = accuracy(model, x_poisoned[strangers], y_wanted[strangers])

    # ===== Save and report =====
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {"sources": sources}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
