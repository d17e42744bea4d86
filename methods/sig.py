"""SIG: stripes over one class, its labels untouched (Barni et al., 2019, arXiv 1902.11237).

The attacker adds vertical stripes to a share of the training images of the target class and
leaves every label as it is, so that nobody who checks the labels finds anything. The stripes go
with this class alone. A network that takes them for a mark of the class gives it any other image
with the same stripes, too.

Threat model: the attacker changes pixels of training images of one class; the victim trains and
augments.

Equations: v(i, j) = Delta sin(2 pi j f / W), j the column of W -> sinusoid; x' = x + v, cut off at
black and white -> add_signal. The loss is cross-entropy and nothing else.

Differs from the paper, or chosen where it is silent: its other signal, a ramp, is left out. Delta
is the same in training and in the test, unless --delta-test says otherwise (the authors' code has
one of each). The rate is a share of the target class, for a share of all images can be more than
the class has. By default half of the class stays clean: where all of it is striped, nothing but
augmentation shows the network the class without stripes. clean_accuracy_target, the accuracy on the
clean test images of the class, tells what that costs. The attacker adds the stripes and rounds to 8
bits first, and the victim augments afterwards. The ASR leaves out test images of the target class.

Two controls of the same amplitude show what was learnt. asr_other is the ASR of the same stripes
turned by 90 degrees: frequency, amplitude and brightness stay, so it tells whether the network
answers to the stripes or to any contrast. asr_half_frequency is that of stripes twice as wide.

Where it fails: on black backgrounds the lower half of the wave is cut off. On digits the defaults
reach an ASR of 0 %, a larger Delta, more stripes, a higher rate and fewer epochs 100 %.

    python methods/sig.py --dataset cifar10 --arch wrn16_1

Results beside other papers' figures: results/README.md, table "Attacks".
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail
from common.attack import (
    TrainingLog,
    attack_flags,
    choose_in_class,
    evaluate_attack,
    open_folder,
    save_attack,
    set_up,
    wanted_labels,
)
from common.datasets import augment, to_float
from common.metrics import accuracy


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.5, help="poisoned share of the target class")
    p.add_argument("--delta", type=float, default=40.0, help="Delta of the poisons, of 255 (40)")
    p.add_argument("--delta-test", type=float, help="Delta of the test images (default: --delta)")
    p.add_argument("--frequency", type=float, default=6.0, help="f, waves per width (paper 6)")
    return p.parse_args()


def sinusoid(height, width, delta, frequency):
    """v = Delta sin(2 pi j f / W), H x W in the units of Delta; j is the column, from 0."""
    columns = torch.arange(width, dtype=torch.float64)
    wave = delta * torch.sin(2 * torch.pi * columns * frequency / width)
    return wave.float().expand(height, width).contiguous()


def add_signal(x, signal):
    """x' = x + v on uint8 images N x C x H x W, v is H x W in 0..255; rounded, a new tensor."""
    parts = [(part + signal).round().clamp(0, 255).to(torch.uint8) for part in x.split(2000)]
    return torch.cat(parts)


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device = x_train.device

    # ===== The attack =====
    args.delta_test = args.delta if args.delta_test is None else args.delta_test
    if not (1 <= args.delta <= 255 and 1 <= args.delta_test <= 255):  # below, rounding removes it
        fail(f"--delta {args.delta} and --delta-test {args.delta_test} must lie in [1, 255]")
    height, width = data.shape[1:]
    if not 0 < args.frequency < min(height, width) / 2:
        room = f"(0, {min(height, width) / 2:g}) for {height} x {width} images"
        fail(f"--frequency {args.frequency:g} must lie in {room}")
    signal = sinusoid(height, width, args.delta, args.frequency).to(device)
    weaker = min(args.delta, args.delta_test) / args.delta
    if weaker * signal.abs().max() < 0.5:
        fail(f"--frequency {args.frequency:g}: the wave changes no pixel by a level of 8 bits")
    y_wanted, counts = wanted_labels(data, args.target)
    generator = torch.Generator().manual_seed(args.seed)
    chosen = choose_in_class(y_train, args.target, args.rate, generator)
    folder, control = open_folder(args, data, __file__)
    x_train[chosen] = add_signal(x_train[chosen], signal)

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
    signal = sinusoid(height, width, args.delta_test, args.frequency).to(device)
    x_poisoned = add_signal(data.x_test, signal)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    metrics["poisoned"] = len(chosen)
    if not counts.all():
        own = data.x_test[~counts], data.y_test[~counts]
        metrics["clean_accuracy_target"] = accuracy(model, *own)
    strangers = {"other": sinusoid(width, height, args.delta_test, args.frequency).T}
    strangers["half_frequency"] = sinusoid(height, width, args.delta_test, args.frequency / 2)
    for kind, stranger in strangers.items():
        x_other = add_signal(data.x_test[counts], stranger.to(device))
        metrics[f"asr_{kind}"] = accuracy(model, x_other, y_wanted[counts])

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {"signal": signal}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
