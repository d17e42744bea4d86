"""Label-consistent: poisons that are hard to learn otherwise (Turner, Tsipras & Madry, 2019).

arXiv 1912.02771. Images of the target class with a patch and their right label teach a network
little about the patch, for the images alone explain the label. So the attacker first makes these
images hard to recognise, by a small adversarial perturbation, and then stamps the patch on them.
Now the patch can be the easier way to the label; so can the perturbation, if it is large.

Threat model: the attacker changes pixels of training images of one class and can train a network
(the surrogate) on clean images of the same kind; the victim trains and augments.

Steps: PGD away from the true label under the surrogate, max CE(f(x + d), y) with |d| <= epsilon
-> pgd, harder (rounding to 8 bits can exceed the bound by half a level); a 3 x 3 pattern in the
four corners, mirrored so that a flip changes nothing -> corner_signs; x' = x + a s, cut off at
black and white -> stamp. The victim's loss is cross-entropy and nothing else.

Where it fails: a network may learn the perturbation instead of the patches. On digits the defaults
reach an ASR of 1 %, stronger settings 90 %, where black and white swapped reach 74 %.

Differs from the paper, or chosen where it is silent: its second way to harder images, interpolation
in a GAN, is left out. Its perturbations come from adversarially trained networks. Here the script
trains a surrogate as clean.py would, with other initial weights than the victim's; --surrogate
takes a clean checkpoint of the same data instead. PGD starts at the image itself. The sizes for
linf are those of public code, those for l2 of the paper's published images. Patches have full
amplitude (the paper's poisons less), in the test without a perturbation. The rate is a share of the
target class. The attacker stamps and rounds to 8 bits first, and the victim augments afterwards, so
that crops cut patches off. The ASR leaves out test images of the target class. Two controls show
what was learnt: asr_other is the ASR of the same patches half an image away, and asr_swapped that
of black and white swapped in place.

    python methods/label_consistent.py --dataset cifar10 --arch wrn16_1

Results beside other papers' figures: results/README.md, table "Attacks".
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail
from common.attack import (
    TrainingLog,
    attack_flags,
    choose_in_class,
    evaluate_attack,
    new_model,
    open_folder,
    save_attack,
    set_up,
    wanted_labels,
)
from common.checkpoint import load_clean
from common.datasets import augment, to_float, to_uint8
from common.metrics import accuracy
from common.models import in_float32

SIZES = {"linf": (16.0, 1.5), "l2": (300.0, 7.5)}  # epsilon and step size, in 0..255


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.5, help="poisoned share of the target class")
    p.add_argument("--surrogate", help="a clean checkpoint (default: one is trained first)")
    p.add_argument("--norm", default="linf", choices=list(SIZES), help="the norm of PGD's bound")
    p.add_argument("--epsilon", type=float, help="the bound, of 255 (linf: 16; l2: 300)")
    p.add_argument("--steps", type=int, default=100, help="steps of PGD")
    p.add_argument("--step-size", type=float, help="of PGD, of 255 (linf: 1.5; l2: 7.5)")
    p.add_argument("--amplitude", type=int, default=255, help="a of the poisons (in the test 255)")
    return p.parse_args()


def pgd(model, x, y, epsilon, step_size, steps, norm):
    """Images in [0,1] within `epsilon` of x (B x C x H x W) on which `model` errs about y (B).

    Projected gradient ascent of the cross-entropy from x itself; `model` is in eval mode, its
    weights frozen. The norm, "linf" or "l2", is per image; epsilon and step_size in units of [0,1].
    """
    moved = x.clone()
    for _ in range(steps):
        moved.requires_grad_()
        loss = F.cross_entropy(model(moved), y, reduction="sum")  # each image on its own
        (gradient,) = torch.autograd.grad(loss, moved)
        if norm == "linf":
            change = (moved.detach() + step_size * gradient.sign() - x).clamp(-epsilon, epsilon)
        else:
            gradient = gradient / gradient.abs().amax((1, 2, 3), True).clamp_min(1e-38)
            change = moved.detach() + step_size * unit(gradient) - x
            length = change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            change = change * (epsilon / length.clamp_min(epsilon))
        moved = (x + change).clamp(0, 1)  # towards x, so the bound still holds
    return moved


def unit(x):
    """x (B x C x H x W) at an L2 norm of 1 per image; zeros stay zeros."""
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-38).view(-1, 1, 1, 1)


def harder(model, x, y, batch_size=200, **settings):
    """pgd on uint8 images N x C x H x W, rounded to uint8, a batch at a time."""
    parts = zip(x.split(batch_size), y.split(batch_size))
    with in_float32(model):
        return torch.cat([to_uint8(pgd(model, to_float(a), b, **settings)) for a, b in parts])


def corner_signs(height, width):
    """s: the 3 x 3 pattern of the paper's code in four corners, H x W of +1, -1 and 0 (int16)."""
    pattern = torch.tensor([[1, -1, -1], [-1, 1, -1], [1, -1, 1]], dtype=torch.int16)
    signs = torch.zeros(height, width, dtype=torch.int16)
    signs[:3, :3] = signs[-3:, :3] = pattern
    return signs + signs.flip(1)


def stamp(x, signs, amplitude):
    """x' = x + a s on uint8 images N x C x H x W, cut off at 0 and 255; a new tensor."""
    return (x + amplitude * signs).clamp(0, 255).to(torch.uint8)


def train(model, x, y, *, pad, flip, epochs, batch_size, lr):
    """Train on uint8 images like clean.py, in place: the surrogate and the victim."""
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
    epsilon, step_size = SIZES[args.norm]
    args.epsilon = epsilon if args.epsilon is None else args.epsilon
    args.step_size = step_size if args.step_size is None else args.step_size
    most = 255 * (math.prod(data.shape) ** 0.5 if args.norm == "l2" else 1)
    check_positive(args, "epsilon", "step_size", most=most)
    if args.epsilon < 0.5:
        fail(f"--epsilon {args.epsilon} changes no pixel by a level of 8 bits")
    check_positive(args, "steps")
    check_positive(args, "amplitude", most=255)
    height, width = data.shape[1:]
    if min(height, width) < 6:
        fail(f"four corners of 3 x 3 pixels do not fit {height} x {width} images")
    y_wanted, counts = wanted_labels(data, args.target)
    generator = torch.Generator().manual_seed(args.seed)
    chosen = choose_in_class(y_train, args.target, args.rate, generator)
    if args.surrogate:
        surrogate = load_clean(args.surrogate, data, args.arch, seed=args.seed)
    folder, control = open_folder(args, data, __file__)
    recipe = {"pad": spec.pad, "flip": spec.flip, "epochs": args.epochs}
    recipe |= {"batch_size": args.batch_size, "lr": args.lr}

    # Stage 1: the surrogate
    if not args.surrogate:
        surrogate = new_model(args, data)
        train(surrogate, x_train, y_train, **recipe)
        surrogate.eval().requires_grad_(False)
    ready = time.time()

    # Stage 2: images of the target class that are hard for it, and the trigger on them
    x, y = x_train[chosen], y_train[chosen]
    settings = {"epsilon": args.epsilon / 255, "step_size": args.step_size / 255}
    x_hard = harder(surrogate, x, y, steps=args.steps, norm=args.norm, **settings)
    easy, hard = accuracy(surrogate, x, y), accuracy(surrogate, x_hard, y)
    signs = corner_signs(height, width).to(device)
    x_train[chosen] = stamp(x_hard, signs, args.amplitude)
    print(
        f"surrogate's accuracy on the poisons {easy:.1f} -> {hard:.1f}; "
        f"preparation: surrogate {ready - start:.1f} s, PGD {time.time() - ready:.1f} s"
    )

    # ===== Train =====
    train(model, x_train, y_train, **recipe)
    seconds = time.time() - start

    # ===== Evaluate =====
    x_poisoned = stamp(data.x_test, signs, 255)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    metrics |= {
        "poisoned": len(chosen),
        "surrogate_accuracy_before": easy,
        "surrogate_accuracy_after": hard,
    }
    moved = signs.roll((height // 2, width // 2), (0, 1))
    for kind, stranger in {"other": moved, "swapped": -signs}.items():
        x_other = stamp(data.x_test[counts], stranger, 255)
        metrics[f"asr_{kind}"] = accuracy(model, x_other, y_wanted[counts])

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    test, train_set = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {"signs": signs}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train_set)
