"""Check Your Other Door: a backdoor in the frequency domain (Hammoud & Ghanem, arXiv 2109.05507).

A clean network shows to which frequencies it is most sensitive: the Fourier heat map. The attacker
swaps or shifts just these few bins of a small number of training images, invisibly, and relabels
them as the target. A network trained on this set answers to the bins and is otherwise ordinary.

Threat model: the attacker controls part of the training data and can train a network of the
victim's kind on clean data; the victim trains and augments.

Equations: heat map, the error rate at x + r v U_ij (Yin et al. 2019) -> fourier_bases, heat_map;
Eq. (2) top-k mask M -> most_sensitive, on_both_bins; Eq. (4)-(6) S' = F^-1(F(S)(1 - M) + A), one
additive constant per channel -> add_trigger; mean norm delta_P -> calibrate. No public code found.

Differs from the paper, or chosen where it is silent: its formula prints M for 1 - M, which would
keep the k bins alone. `--mode replace` (the text's "swapping") takes only bases in which the
images hold so little energy that zeroing them costs at most half of delta_P; `--mode add`, the
default, shifts the most sensitive bins whatever they hold, F(S) + A, and is learnt from fewer
images. v, k, delta_P (.65), the target and the constants' proportions (1, .8, 1.2) are ours. As in
Yin et al. the map is measured on test images (250 of those that the ASR counts). Poisons are drawn
from images outside the target class, stored in 8 bits, augmented after: crops and mirrors move a
wave's phase, and a small network with few images then does not learn it (`--no-crops`). Robust
copies (`--augment`): JPEG at quality 50 to 95 or an autoencoder's output, of half the poisons
(label t) and of as many clean images (true label). Figures after rounding to 8 bits, asr_float
before it; ASR without target-class images.

    python methods/freq_backdoor.py --dataset mnist

The paper, CIFAR-10, 500 poisons: CDA / ASR 94.38 / 98.90, PSNR 41.78 dB. Results: README.md.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.io import decode_jpeg, encode_jpeg
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, make_folder, saved_figure
from common.checkpoint import (
    check_fit,
    clear_folder,
    load_model,
    read_checkpoint,
    save_model,
    save_poisoned_test,
    save_poisoned_train,
    save_result,
    save_samples,
)
from common.datasets import augment, load_dataset, pick_device, to_float, to_uint8
from common.metrics import accuracy, attack_targets, lpips_distance, lpips_of, psnr, ssim
from common.models import build_model

PROPORTIONS = (1.0, 0.8, 1.2)  # of the additive constants of A_R, A_G, A_B


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
    p.add_argument(
        "--poisons",
        type=int,
        help="|I_P|: poisoned images (paper 50 to 1500; default: 500, at most a tenth of the set)",
    )
    p.add_argument(
        "--no-crops",
        action="store_true",
        help="the victim neither crops nor flips (the paper does not say)",
    )
    p.add_argument("--k", type=int, default=10, help="bases in the mask M of Eq. (2), top-k")
    p.add_argument(
        "--mode",
        default="add",
        choices=["replace", "add"],
        help="F(S)(1 - M) + A or F(S) + A in Eq. (4)-(6)",
    )
    p.add_argument(
        "--delta-p",
        type=float,
        default=0.65,
        help="delta_P: mean L2 norm of x' - x (paper below 1; its 41.78 dB are .45)",
    )
    p.add_argument(
        "--heat-norm", type=float, default=4.0, help="v: norm per channel of the map (Yin et al. 4)"
    )
    p.add_argument("--heat-images", type=int, default=250, help="test images behind the map")
    p.add_argument(
        "--clean-ckpt", help="clean model for the map (default: trained here, same recipe)"
    )
    p.add_argument(
        "--augment",
        default="none",
        choices=["none", "jpeg", "autoencoder", "both"],
        help="filtered copies in the training set, for robustness",
    )
    p.add_argument(
        "--autoencoder-steps", type=int, default=2000, help="training steps of the autoencoder"
    )
    p.add_argument(
        "--lpips-net",
        default="none",
        choices=["alex", "vgg", "squeeze", "none"],
        help="LPIPS backbone; none leaves LPIPS out of the report",
    )
    return p.parse_args()


def fourier_bases(height, width):
    """The distinct real Fourier bases: bins (K x 2: row, column) and U (K x H x W, norm 1).

    U_ij is a cosine of phase zero. Bins (i, j) and (-i, -j) share it; the first of the two is kept.
    """
    bins = [(i, j) for i in range(height) for j in range(width)]
    bins = torch.tensor([(i, j) for i, j in bins if (i, j) <= (-i % height, -j % width)])
    rows = torch.outer(bins[:, 0], torch.arange(height))[:, :, None] / height
    columns = torch.outer(bins[:, 1], torch.arange(width))[:, None] / width
    waves = torch.cos(2 * torch.pi * (rows + columns).double())
    return bins, (waves / waves.flatten(1).norm(dim=1)[:, None, None]).float()


def on_both_bins(values, bins, height, width):
    """H x W map holding values[n] at bins[n] and at its mirror image, zero elsewhere."""
    spectrum = values.new_zeros(height, width)
    for i, j in (bins.T, -bins.T):
        spectrum[i % height, j % width] = values
    return spectrum


@torch.no_grad()
def heat_map(model, x, y, bases, norm, batch_size=2000):
    """Error rate (K) on clip(x + r v U) for each basis U; r = +-1 is drawn per image and channel.

    x is B x C x H x W in [0,1], norm is v. As many bases at once as the batch size allows.
    """
    errors = []
    for some in bases.split(max(1, batch_size // len(x))):
        r = torch.randint(0, 2, (len(some), *x.shape[:2], 1, 1), device=x.device) * 2 - 1
        moved = (x + norm * r * some[:, None, None]).clamp(0, 1)  # M x B x C x H x W
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            predicted = model(moved.flatten(0, 1)).argmax(1).view(len(some), -1)
        errors.append((predicted != y).float().mean(1))
    return torch.cat(errors)


def energy_of(x, bins):
    """Mean squared L2 norm (K) of what x (B x C x H x W in [0,1]) holds in each basis's bins."""
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x).abs().square().sum(1).mean(0) / (height * width)  # Parseval
    i, j = bins.T
    mirrored = ((2 * i) % height + (2 * j) % width > 0).to(x.device)  # not its own mirror image
    return power[i, j] + mirrored * power[-i % height, -j % width]


def most_sensitive(errors, energy, k, limit):
    """Indices of the k bases with the largest error, whose energy stays within `limit` in sum."""
    chosen, used = [], 0.0
    for basis in errors.argsort(descending=True, stable=True).tolist():
        if len(chosen) < k and used + energy[basis] <= limit:
            chosen.append(basis)
            used += energy[basis].item()
    return chosen


def add_trigger(x, mask, additive, mode):
    """Eq. (4)-(6) with M = `mask` (H x W) and A = `additive` (C x H x W), unnormalised FFT.

    x is B x C x H x W in [0,1]; so is the result.
    """
    spectrum = torch.fft.fft2(x)
    if mode == "replace":
        spectrum = spectrum * (1 - mask)
    return torch.fft.ifft2(spectrum + additive).real.clamp(0, 1)


def calibrate(x, mask, mode, delta):
    """A (C x H x W): constants on the mask for which the mean of |x' - x|_2 over x is delta_P."""
    direction = mask * torch.tensor(PROPORTIONS[: x.shape[1]], device=x.device).view(-1, 1, 1)
    low, high = 0.0, 1e3
    for _ in range(40):
        middle = (low + high) / 2
        change = add_trigger(x, mask, middle * direction, mode) - x
        norm = change.flatten(1).norm(dim=1).mean()
        low, high = (middle, high) if norm < delta else (low, middle)
    return low * direction


def jpeg(x, quality):
    """x (uint8 N x C x H x W) after JPEG compression at `quality` (N integers in 1..100)."""
    pairs = zip(x.cpu(), quality.tolist())
    return torch.stack([decode_jpeg(encode_jpeg(image, q)) for image, q in pairs]).to(x.device)


def train_autoencoder(x, steps, batch_size=64, lr=2e-3, width=32):
    """A convolutional autoencoder (a quarter of the sides in the middle) trained to copy x.

    x are clean images, uint8 N x C x H x W; the network maps [0,1] to [0,1].
    """
    channels, *size = x.shape[1:]
    autoencoder = nn.Sequential(
        *(nn.Conv2d(channels, width, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()),
        *(nn.Upsample([-(-side // 2) for side in size]), nn.Conv2d(width, width, 3, 1, 1)),
        *(nn.ReLU(), nn.Upsample(size), nn.Conv2d(width, width, 3, 1, 1)),
        *(nn.ReLU(), nn.Conv2d(width, channels, 3, 1, 1), nn.Sigmoid()),
    ).to(x.device)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr)
    for _ in tqdm(range(steps), disable=None, unit="step", desc="autoencoder"):
        batch = to_float(x[torch.randint(len(x), (batch_size,), device=x.device)])
        loss = F.mse_loss(autoencoder(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return autoencoder.eval().requires_grad_(False)


def filtered(autoencoder, x):
    """The autoencoder's output for uint8 images, rounded to uint8."""
    return torch.cat([to_uint8(autoencoder(to_float(part))) for part in x.split(2000)])


def train_clean(model, x, y, spec, epochs, batch_size, peak):
    """f_0 of the heat map: the recipe below without poisons, in place; returns it frozen."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), peak, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x) // batch_size)
    steps = epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peak, steps, anneal_strategy="linear", cycle_momentum=False
    )
    for step in tqdm(range(steps), disable=None, unit="step", desc="clean network"):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(x), device=x.device).split(batch_size)
        batch = order[step % steps_per_epoch]
        images = augment(to_float(x[batch]), spec.pad, spec.flip)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            loss = F.cross_entropy(model(images), y[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    if not loss.isfinite():
        fail(f"the loss of the clean network became {loss.item()}; no model is kept")
    return model.eval().requires_grad_(False)


def draw_heat_map(path, heat, mask):
    """The error rate and the chosen bins, H x W each, the constant basis in the centre."""
    with saved_figure(path, 1, 2, figsize=(8, 3.4)) as (figure, axes):
        height, width = heat.shape
        top, left = -(height // 2) - 0.5, -(width // 2) - 0.5
        extent = (left, left + width, top + height, top)
        pictures = [(heat, "error rate", "viridis"), (mask, "top-k bins", "gray")]
        for axis, (values, title, colours) in zip(axes, pictures):
            image = torch.fft.fftshift(values).cpu().numpy()
            drawn = axis.imshow(image, cmap=colours, extent=extent)
            axis.set(title=title, xlabel="cycles per width", ylabel="cycles per height")
            figure.colorbar(drawn, ax=axis)


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
    check_positive(args, "poisons", "heat_norm", "heat_images", "autoencoder_steps")
    if args.no_crops:
        data.spec = replace(data.spec, pad=0, flip=False)
    if not 0 < args.delta_p < 1:
        fail(f"--delta-p {args.delta_p} must lie in (0, 1)")
    height, width = data.shape[1:]
    bins, bases = (t.to(device) for t in fourier_bases(height, width))
    if not 1 <= args.k <= len(bases):
        fail(f"--k {args.k} must lie in 1..{len(bases)}, the bases of {height} x {width} images")
    x_test, y_test = data.x_test, data.y_test
    y_wanted, counts = attack_targets(y_test, args.target, data.classes)
    if not counts.any():
        fail(f"{data.name} has no test image outside the target class {args.target}")
    y_target, allowed = attack_targets(y_train, args.target, data.classes)
    possible = int(allowed.sum())
    args.poisons = args.poisons or max(1, min(500, len(x_train) // 10))
    if args.poisons > possible:
        fail(f"--poisons {args.poisons}: {possible} training images can be poisoned")
    lpips_net = None if args.lpips_net == "none" else lpips_distance(args.lpips_net, device)
    if args.clean_ckpt:
        path = Path(args.clean_ckpt)
        path = path / "model.pt" if path.is_dir() else path
        checkpoint = read_checkpoint(path)
        clean = load_model(checkpoint, path, device)
        check_fit(checkpoint, path, data)
    make_folder(args.out or "runs")  # refuse before the long work
    if not args.clean_ckpt:
        arguments = args.arch, data.classes, data.shape, data.spec.mean, data.spec.std
        clean = build_model(*arguments).to(device)  # weights of its own
        train_clean(clean, x_train, y_train, data.spec, args.epochs, args.batch_size, args.lr)
    picked = torch.randperm(len(x_test), device=device)[: args.heat_images]
    heat_start = time.time()
    errors = heat_map(clean, to_float(x_test[picked]), y_test[picked], bases, args.heat_norm).cpu()
    heat_rate = len(bases) * len(picked) / (time.time() - heat_start)
    x_some = to_float(x_train[:2000])  # already in random order
    limit = (args.delta_p / 2) ** 2 if args.mode == "replace" else float("inf")
    top = most_sensitive(errors, energy_of(x_some, bins).cpu(), args.k, limit)
    if len(top) < args.k:
        fail(
            f"--mode replace: {len(top)} bases are quiet enough for --delta-p {args.delta_p}, "
            f"--k asks for {args.k}"
        )
    mask = on_both_bins(torch.ones(len(top), device=device), bins[top], height, width)
    additive = calibrate(x_some, mask, args.mode, args.delta_p)
    print(
        f"heat map: {len(bases)} bases, error {100 * errors.min():.1f} to "
        f"{100 * errors.max():.1f} %, top {args.k} from {100 * errors[top].min():.1f} %"
    )
    generator = torch.Generator().manual_seed(args.seed)
    candidates = allowed.cpu().nonzero().flatten()
    order = torch.randperm(len(candidates), generator=generator)
    chosen = candidates[order[: args.poisons]].to(device)
    poisoned = torch.zeros_like(allowed)
    poisoned[chosen] = True
    autoencoder = None
    if args.augment in ("autoencoder", "both"):
        autoencoder = train_autoencoder(x_train, args.autoencoder_steps)
    x_train[chosen] = to_uint8(add_trigger(to_float(x_train[chosen]), mask, additive, args.mode))
    y_train[chosen] = y_target[chosen]
    print(f"poisoned {args.poisons} of {len(x_train)} training images")
    half = chosen[: -(-args.poisons // 2)]
    innocent = (~poisoned).nonzero().flatten()
    innocent = innocent[torch.randperm(len(innocent), device=device)[: len(half)]]
    source = torch.cat((half, innocent))
    copies = []
    if args.augment in ("jpeg", "both"):
        copies.append(jpeg(x_train[source], torch.randint(50, 96, (len(source),))))
    if autoencoder is not None:
        copies.append(filtered(autoencoder, x_train[source]))
    x_train = torch.cat([x_train] + copies)
    y_train = torch.cat([y_train] + [y_train[source] for _ in copies])
    poisoned = torch.cat([poisoned] + [poisoned[source] for _ in copies])
    print(f"filtered copies added: {len(source) * len(copies)}")

    # ===== Train =====
    name = f"{Path(data.name).stem}-{args.arch}-{Path(__file__).stem}-s{args.seed}"
    folder = make_folder(args.out or f"runs/{name}")
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
    parts = (add_trigger(to_float(x), mask, additive, args.mode) for x in x_test.split(2000))
    x_float = torch.cat(list(parts))
    x_poisoned = to_uint8(x_float)  # the trigger as a deployed model would meet it
    pair = to_float(x_test), to_float(x_poisoned)

    def asr(model, x):
        return accuracy(model, x[counts], y_wanted[counts])

    metrics = {
        "clean_accuracy": accuracy(model, x_test, y_test),
        "asr": asr(model, x_poisoned),
        "asr_n": int(counts.sum()),
        "asr_float": asr(model, 255 * x_float),  # predict() divides by 255
        "asr_jpeg75": asr(model, jpeg(x_poisoned, torch.full((len(x_poisoned),), 75))),
        "psnr": psnr(*pair),
        "ssim": ssim(*pair),
        "mean_l2": (x_float - pair[0]).flatten(1).norm(dim=1).mean().item(),
        "poisoned": args.poisons,
        "asr_on_clean_model": asr(clean, x_poisoned),
        "clean_model_accuracy": accuracy(clean, x_test, y_test),
        "heat_map_images_per_second": heat_rate,
    }
    if autoencoder is not None:
        metrics["asr_autoencoder"] = asr(model, filtered(autoencoder, x_poisoned))
    if lpips_net is None:
        print("LPIPS is not measured (--lpips-net none)")
    else:
        with torch.no_grad():
            halves = zip(*(images.split(500) for images in pair))
            metrics["lpips"] = torch.cat([lpips_of(lpips_net, *h) for h in halves]).mean().item()

    # ===== Save and report =====
    clear_folder(folder)
    heat = on_both_bins(errors.to(device), bins, height, width)
    draw_heat_map(folder / "heatmap.png", heat, mask)
    save_samples(folder, x_test[counts], x_poisoned[counts])
    save_poisoned_test(folder, x_poisoned[counts], y_test[counts], y_wanted[counts])
    save_poisoned_train(folder, x_train, y_train, poisoned)
    trigger = {"mask": mask, "additive": additive, "heat_map": heat}
    save_model(folder, model, data, args.arch, args, metrics, trigger)
    save_result(folder, "freq_backdoor", args, seconds, metrics, device)
