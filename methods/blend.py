"""Blend: a whole picture mixed into the image (Chen et al., 2017, arXiv 1712.05526).

The attacker mixes one fixed picture, as large as the image, faintly into a share of the training
images and relabels them as the target. A network trained on this set answers to the picture. No
pixel stands out, so masks and patches do not describe it.

Threat model: the attacker controls part of the training data; the victim trains and augments.

Equations: x' = (1 - alpha) x + alpha p, y' = y_t -> blend. No other loss than cross-entropy.

Differs from the paper: its cartoon is not shipped; the default picture is uniform noise drawn from
--seed, --pattern takes any other. alpha is the same in training and in the test (the paper also
mixes stronger in the test). Poisons are drawn from all images that are not of the target class, the
count is round(rate N) of the whole set. Order: the attacker blends and rounds to 8 bits first, the
victim augments after. Figures after rounding to 8 bits, ASR without target-class images.
asr_other_noise and asr_grey: the same mixture with another noise picture and with plain grey. On
black backgrounds the network may learn "not black" instead of the picture.

    python methods/blend.py --dataset mnist

ABL's table, CIFAR-10: clean / ASR 84.51 / 100. Results: README.md, table "Attacks".
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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
from common.datasets import augment, load_dataset, pick_device, to_float, to_uint8
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
    p.add_argument(
        "--alpha",
        type=float,
        default=0.2,
        help="alpha: share of the picture in the mixture (paper at most .2 in training)",
    )
    p.add_argument(
        "--pattern",
        help="p: a picture file, resized to the images (default: noise; paper a cartoon)",
    )
    return p.parse_args()


def noise_pattern(shape, generator):
    """p: a picture of uniform noise, C x H x W in [0,1], in steps of 1/255 like an image file."""
    return to_float(to_uint8(torch.rand(shape, generator=generator)))


def picture_pattern(path, shape):
    """p from a picture file: C x H x W in [0,1], grey for C = 1, resized bilinearly; or fail."""
    channels, height, width = shape
    try:
        with Image.open(path) as file:
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
    check_share(args, "rate", "alpha")
    target = None if args.all_to_all else args.target
    x_test, y_test = data.x_test, data.y_test
    y_wanted, counts = attack_targets(y_test, target, data.classes)
    if not counts.any():
        fail(f"{data.name} has no test image outside the target class {args.target}")
    generator = torch.Generator().manual_seed(args.seed)
    if args.pattern is None:
        pattern = noise_pattern(data.shape, generator).to(device)
    else:
        pattern = picture_pattern(args.pattern, data.shape).to(device)
    y_target, allowed = attack_targets(y_train, target, data.classes)
    count = round(args.rate * len(x_train))
    if not 1 <= count <= int(allowed.sum()):
        possible = int(allowed.sum())
        fail(f"--rate {args.rate} asks for {count} poisons; {possible} images can be poisoned")
    candidates = allowed.cpu().nonzero().flatten()
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]].to(device)
    poisoned = torch.zeros_like(allowed)
    poisoned[chosen] = True
    x_train[chosen] = blend_uint8(x_train[chosen], pattern, args.alpha)
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
    x_poisoned = blend_uint8(x_test, pattern, args.alpha)
    metrics = {
        "clean_accuracy": accuracy(model, x_test, y_test),
        "asr": accuracy(model, x_poisoned[counts], y_wanted[counts]),
        "asr_n": int(counts.sum()),
        "psnr": psnr(to_float(x_test), to_float(x_poisoned)),
        "ssim": ssim(to_float(x_test), to_float(x_poisoned)),
        "max_change": (to_float(x_test) - to_float(x_poisoned)).abs().max().item(),
        "poisoned": count,
    }
    strangers = {"other_noise": noise_pattern(data.shape, generator).to(device)}
    strangers["grey"] = torch.full_like(pattern, 0.5)
    for kind, stranger in strangers.items():
        x_other = blend_uint8(x_test[counts], stranger, args.alpha)
        metrics[f"asr_{kind}"] = accuracy(model, x_other, y_wanted[counts])
    if control is not None:
        metrics["asr_on_clean_model"] = accuracy(control, x_poisoned[counts], y_wanted[counts])

    # ===== Save and report =====
    trigger = {"pattern": pattern, "alpha": torch.tensor(args.alpha)}
    clear_folder(folder)
    save_samples(folder, x_test[counts], x_poisoned[counts])
    save_poisoned_test(folder, x_poisoned[counts], y_test[counts], y_wanted[counts])
    save_poisoned_train(folder, x_train, y_train, poisoned)
    save_model(folder, model, data, args.arch, args, metrics, trigger)
    save_result(folder, "blend", args, seconds, metrics, device)
