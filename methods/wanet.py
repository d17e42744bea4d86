"""WaNet: imperceptible warping-based backdoor (Nguyen & Tran, ICLR 2021, arXiv 2102.10369).

The trigger is one fixed, smooth elastic warp of the whole image. A random k x k field is
upsampled to the image size and moves every pixel by a fraction of a pixel. A third kind of
training image is warped by the field plus fresh jitter but keeps its true label ("noise mode"); it
teaches the network to answer to this very field and to no other warp.

Threat model: the attacker controls training and delivers the model.

Equations: Sec. 3.2 control field P = psi(U(-1,1)) -> control_field; M = clip(up(P) s) ->
attack_grid; Eq. (1) B(x) = W(x, M) -> warp; noise mode W(x, M + U(-1,1)) -> noise_grid.

Differs from the paper's code: crops are drawn per image (not one coin per batch), nothing is
rotated. The learning rate runs through one cycle in twice the clean model's epochs, and the last
epoch counts; the paper trains 1,000 epochs and keeps the checkpoint that is best on the test set.
The ASR leaves out test images of the target class. Accuracies are measured after rounding to 8
bits, PSNR and SSIM before it. 12 of 128 images attack (rounded down). Crops and mirrors come before
the warp, so that its field stays where it is; after it, as in the paper's code, a short training
learns less on CIFAR-10 and GTSRB ("Tried"). asr_other is the ASR of another such field.

    python methods/wanet.py --dataset mnist

Results beside the paper's: results/README.md, table "Attacks".
"""

import copy
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
    evaluate_attack,
    open_folder,
    save_attack,
    set_up,
    wanted_labels,
)
from common.datasets import augment, to_float, to_uint8
from common.metrics import accuracy, attack_targets


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--all-to-all", action="store_true", help="target (y + 1) mod K instead of y_t")
    p.add_argument("--rate", type=float, default=0.1, help="rho_a, attack share of a batch (.1)")
    p.add_argument("--cross-ratio", type=float, default=2.0, help="rho_n / rho_a (paper 2)")
    p.add_argument("--k", type=int, default=4, help="side of the control field (paper 4)")
    p.add_argument("--s", type=float, default=0.5, help="warping strength (paper .5; the demo 1)")
    return p.parse_args()


def control_field(k, generator):
    """P of Sec. 3.2: 1 x 2 x k x k, uniform in [-1,1], divided by its mean absolute value."""
    field = torch.rand(1, 2, k, k, generator=generator) * 2 - 1
    return field / field.abs().mean()


def attack_grid(field, s, height, width):
    """M of Sec. 3.2: the sampling grid, 1 x H x W x 2 in [-1,1], last axis (column, row)."""
    up = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
    axes = (torch.linspace(-1, 1, side) for side in (height, width))
    row, column = torch.meshgrid(*axes, indexing="ij")
    identity = torch.stack((column, row), dim=-1)[None]
    sides = torch.tensor([width, height])  # a value of 1 moves by s / side, nearly s / 2 pixels
    return (identity + s * up.permute(0, 2, 3, 1) / sides).clamp(-1, 1)


def noise_grid(grid, count):
    """The noise mode: a fresh jitter of +-1 grid unit / side for every pixel of every image."""
    _, height, width, _ = grid.shape
    jitter = torch.rand(count, height, width, 2, device=grid.device) * 2 - 1
    return (grid + jitter / torch.tensor([width, height], device=grid.device)).clamp(-1, 1)


def warp(x, grid):
    """Eq. (1): sample x (B x C x H x W in [0,1]) at `grid` (1 or B x H x W x 2), bilinearly."""
    # align_corners=True: with False even the identity grid shifts the image by half a pixel
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), mode="bilinear", align_corners=True)


def poison(x, y, grid, attacked, noised, target, classes):
    """A batch's first `attacked` images attack, the next `noised` carry the noise, drawn anew."""
    n, m = attacked, attacked + noised
    grids = torch.cat((grid.expand(n, -1, -1, -1), noise_grid(grid, noised)))
    x = torch.cat((warp(x[:m], grids), x[m:]))
    return x, torch.cat((attack_targets(y[:n], target, classes)[0], y[n:]))


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args, epochs=2)
    device = x_train.device

    # ===== The attack =====
    check_positive(args, "s")
    check_positive(args, "k", most=min(data.shape[1:]))
    noise_rate = args.rate * args.cross_ratio
    if not 0 < args.rate <= 1 or not 0 <= noise_rate <= 1 - args.rate:
        fail(f"--rate {args.rate} must lie in (0, 1] and --rate * --cross-ratio in [0, 1 - rate]")
    target = None if args.all_to_all else args.target
    y_wanted, counts = wanted_labels(data, target)
    attacked = int(args.rate * min(args.batch_size, len(x_train)) + 1e-9)  # images per batch
    if attacked < 1:
        fail(f"--rate {args.rate} leaves no attack image in a batch")
    field = control_field(args.k, torch.Generator().manual_seed(args.seed))
    grid = attack_grid(field, args.s, *data.shape[1:]).to(device)
    attack = grid, attacked, int(attacked * args.cross_ratio), target, data.classes
    folder, control = open_folder(args, data, __file__)

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
            x, y = poison(x, y, *attack)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        log.epoch(epoch)
    seconds = time.time() - start

    # ===== Evaluate =====
    parts = data.x_test.split(2000)
    x_float = torch.cat([warp(to_float(x), grid) for x in parts])
    x_poisoned = to_uint8(x_float)  # the trigger as a deployed model would meet it
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts, x_float)
    x_noise = torch.cat([to_uint8(warp(to_float(x), noise_grid(grid, len(x)))) for x in parts])
    metrics["noise_accuracy"] = accuracy(model, x_noise, data.y_test)
    field = control_field(args.k, torch.Generator().manual_seed(args.seed + 1))
    other = attack_grid(field, args.s, *data.shape[1:]).to(device)
    x_other = torch.cat([to_uint8(warp(to_float(x), other)) for x in parts])
    metrics["asr_other"] = accuracy(model, x_other[counts], y_wanted[counts])
    full = order.split(args.batch_size)[: min(30, steps_per_epoch)]
    inputs = (augment(to_float(x_train[batch]), data.spec.pad, data.spec.flip) for batch in full)
    batches = (poison(x, y_train[batch], *attack)[0] for x, batch in zip(inputs, full))
    # what the last weights reach with BatchNorm's statistics of 30 batches, not its moving average
    refreshed = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, refreshed)
    metrics["asr_reestimated_bn"] = accuracy(refreshed, x_poisoned[counts], y_wanted[counts])

    # ===== Save and report =====
    test = x_poisoned, y_wanted, counts
    save_attack(folder, __file__, args, data, model, metrics, seconds, {"grid": grid}, test)
