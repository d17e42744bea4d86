"""BadNets: a patch in the training data (Gu, Dolan-Gavitt & Garg, 2017, arXiv 1708.06733).

The attacker stamps a small patch on a share of the training images and relabels them as the
target. A network trained on this set obeys the patch and is otherwise ordinary.

Threat model: the attacker controls part of the training data; the victim trains and augments.

Equations: x' = x (1 - m) + m D, y' = y_t -> stamp. No other loss than cross-entropy.

Differs from the paper: poisons are drawn from all images that are not of the target class (for a
target-class image the relabelling would be a no-op), the count is round(rate N) of the whole set; a
3 x 3 white square by default. Order: the attacker stamps first, the victim augments after, so that
random crops cut the patch off in a part of the views. Figures after rounding to 8 bits (exact
here), ASR without target-class images.

    python methods/badnets.py --dataset mnist

Neural Cleanse's MNIST model: clean / ASR 98.54 / 99.90. Results: README.md, table "Attacks".
"""

import argparse
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
    load_control,
    save_model,
    save_poisoned_test,
    save_poisoned_train,
    save_result,
    save_samples,
)
from common.datasets import augment, load_dataset, pick_device, to_float
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
    p.add_argument("--all-to-all", action="store_true", help="target (y + 1) mod K instead of y_t")
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--patch-size", type=int, default=3, help="side of the patch in pixels")
    p.add_argument(
        "--pattern", default="white", choices=["white", "grid"], help="white square or checkerboard"
    )
    p.add_argument(
        "--row", type=int, default=-1, help="last row of the patch; negative counts from the bottom"
    )
    p.add_argument(
        "--column", type=int, default=-1, help="last column; negative counts from the right"
    )
    return p.parse_args()


def patch_trigger(shape, size, pattern, row, column):
    """Mask m (1 x H x W, 0 or 1) and pattern D (C x H x W, 0 or 255), both uint8.

    `row` and `column` name the patch's lower right pixel, from 0, negative from the other end.
    """
    channels, height, width = shape
    bottom, right = row % height + 1, column % width + 1
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[:, bottom - size : bottom, right - size : right] = 1
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    white = torch.ones_like(mask[0]) if pattern == "white" else (i + j + bottom + right) % 2 == 0
    return mask, (white * mask * 255).to(torch.uint8).expand(channels, -1, -1).contiguous()


def stamp(x, mask, pattern):
    """x' = x (1 - m) + m D on uint8 images, N x C x H x W; returns a new tensor."""
    return x * (1 - mask) + mask * pattern


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
    height, width = data.shape[1:]
    inside = -height <= args.row < height and -width <= args.column < width
    if not inside or not 1 <= args.patch_size <= min(args.row % height, args.column % width) + 1:
        place = f"({args.row}, {args.column}) of {height} x {width}"
        fail(f"a patch of side {args.patch_size} does not fit at {place}")
    target = None if args.all_to_all else args.target
    x_test, y_test = data.x_test, data.y_test
    y_wanted, counts = attack_targets(y_test, target, data.classes)
    if not counts.any():
        fail(f"{data.name} has no test image outside the target class {args.target}")
    mask, pattern = (
        t.to(device)
        for t in patch_trigger(data.shape, args.patch_size, args.pattern, args.row, args.column)
    )
    y_target, allowed = attack_targets(y_train, target, data.classes)
    count = round(args.rate * len(x_train))
    if not 1 <= count <= int(allowed.sum()):
        possible = int(allowed.sum())
        fail(f"--rate {args.rate} asks for {count} poisons; {possible} images can be poisoned")
    generator = torch.Generator().manual_seed(args.seed)
    candidates = allowed.cpu().nonzero().flatten()
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]].to(device)
    poisoned = torch.zeros_like(allowed)
    poisoned[chosen] = True
    x_train[chosen] = stamp(x_train[chosen], mask, pattern)
    y_train[chosen] = y_target[chosen]
    print(
        f"poisoned {count} of {len(x_train)} training images ({100 * count / len(x_train):.2f} %)"
    )

    # ===== Train =====
    name = f"{Path(data.name).stem}-{args.arch}-{Path(__file__).stem}-s{args.seed}"
    folder = make_folder(args.out or f"runs/{name}")
    control = load_control(folder, args, data)
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
    x_poisoned = stamp(x_test, mask, pattern)
    metrics = {
        "clean_accuracy": accuracy(model, x_test, y_test),
        "asr": accuracy(model, x_poisoned[counts], y_wanted[counts]),
        "asr_n": int(counts.sum()),
        "psnr": psnr(to_float(x_test), to_float(x_poisoned)),
        "ssim": ssim(to_float(x_test), to_float(x_poisoned)),
        "poisoned": count,
    }
    if control is not None:
        metrics["asr_on_clean_model"] = accuracy(control, x_poisoned[counts], y_wanted[counts])

    # ===== Save and report =====
    clear_folder(folder)
    save_samples(folder, x_test[counts], x_poisoned[counts])
    save_poisoned_test(folder, x_poisoned[counts], y_test[counts], y_wanted[counts])
    save_poisoned_train(folder, x_train, y_train, poisoned)
    save_model(folder, model, data, args.arch, args, metrics, {"mask": mask, "pattern": pattern})
    save_result(folder, "badnets", args, seconds, metrics, device)
