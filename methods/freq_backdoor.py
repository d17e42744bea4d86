"""Check Your Other Door: a backdoor in the frequency domain (Hammoud & Ghanem, arXiv 2109.05507).

A clean network shows to which frequencies it is most sensitive: the Fourier heat map. The attacker
swaps or shifts just these few bins of a small number of training images, invisibly, and relabels
them as the target. A network trained on this set answers to these bins.

Threat model: the attacker controls part of the training data and can train a network of the
victim's kind on clean data; the victim trains and augments.

Equations: heat map, the error rate at x + r v U_ij (Yin et al. 2019) -> fourier_bases, heat_map;
Eq. (2) top-k mask M -> most_sensitive, on_both_bins; Eq. (4)-(6) S' = F^-1(F(S)(1 - M) + A), one
additive constant alpha_c per channel -> add_trigger; mean norm delta_P -> calibrated.

Differs from the paper, or chosen where it is silent: its formula prints M for 1 - M, which would
keep the k bins alone. `--mode replace`, the text's "swapping", takes only bases in which the images
hold so little energy that zeroing all k of them costs at most half of delta_P; `--mode add` shifts
the most sensitive bins whatever they hold, F(S) + A. v, k, delta_P, the target and the constants'
proportions (1, .8, 1.2) are ours. The map is measured on training images that its network did not
see. Poisons are no images of the target class; they are stored in 8 bits and augmented afterwards
(`--no-crops`: not at all). Robust copies (`--augment`) are JPEGs at quality 50 to 95 or an
autoencoder's output, of half the poisons and of as many clean images. Figures are measured after
rounding to 8 bits, the ASR without test images of the target class. Controls of the same mean norm:
asr_other_bins (k other bins), asr_grey (one constant a channel). On MNIST both work as well as the
trigger, for the network learnt "not black"; on CIFAR-10 they do not. asr_jpeg75 passes JPEG at
quality 75, asr_autoencoder an autoencoder that is not the attacker's.

    python methods/freq_backdoor.py --dataset mnist

Results beside the paper's: results/README.md, table "Attacks".
"""

import io
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, saved_figure
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
from common.datasets import augment, to_float, to_uint8
from common.metrics import accuracy, pass_size

PROPORTIONS = (1.0, 0.8, 1.2)  # of the additive constants alpha_R, alpha_G, alpha_B


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--poisons", type=int, help="|I_P| (paper 50 to 1500; default 500 or a tenth)")
    p.add_argument("--no-crops", action="store_true", help="the victim neither crops nor flips")
    p.add_argument("--k", type=int, help="bases in the mask M of Eq. (2) (10, or what is quiet)")
    modes, text = ["replace", "add"], "F(S)(1 - M) + A or F(S) + A in Eq. (4)-(6)"
    p.add_argument("--mode", default="replace", choices=modes, help=text)
    p.add_argument("--delta-p", type=float, default=0.65, help="mean L2 norm (paper < 1; .45)")
    p.add_argument("--heat-norm", type=float, default=4.0, help="v per channel (Yin et al. 4)")
    p.add_argument("--heat-images", type=int, default=250, help="held-out images behind the map")
    kinds, text = ["none", "jpeg", "autoencoder", "both"], "filtered copies, for robustness"
    p.add_argument("--augment", default="none", choices=kinds, help=text)
    p.add_argument("--autoencoder-steps", type=int, default=2000, help="its training steps")
    return p.parse_args()


def distinct_bins(height, width):
    """K x 2 (row, column): of bins (i, j) and (-i, -j), which share a real basis, the first."""
    bins = [(i, j) for i in range(height) for j in range(width)]
    return torch.tensor([(i, j) for i, j in bins if (i, j) <= (-i % height, -j % width)])


def fourier_bases(bins, height, width):
    """The real Fourier bases U of the bins, K x H x W of norm 1: cosines of phase zero."""
    rows = torch.outer(bins[:, 0], torch.arange(height))[:, :, None] / height
    columns = torch.outer(bins[:, 1], torch.arange(width))[:, None] / width
    waves = torch.cos(2 * torch.pi * (rows + columns).double())
    return (waves / waves.flatten(1).norm(dim=1)[:, None, None]).float()


def on_both_bins(values, bins, height, width):
    """H x W map holding values[n] at bins[n] and at its mirror image, zero elsewhere."""
    spectrum = values.new_zeros(height, width)
    for i, j in (bins.T, -bins.T):
        spectrum[i % height, j % width] = values
    return spectrum


@torch.no_grad()
def heat_map(model, x, y, bins, norm, batch_size=2000):
    """Error rate (K) on clip(x + r v U) for each bin's U; r = +-1 is drawn per image and channel.

    x is B x C x H x W in [0,1], norm is v. Bases are made as many at once as give batch_size.
    """
    errors = []
    for some in bins.split(max(1, batch_size // len(x))):
        some = fourier_bases(some, *x.shape[-2:]).to(x.device)
        r = torch.randint(0, 2, (len(some), *x.shape[:2], 1, 1), device=x.device) * 2 - 1
        moved = (x + norm * r * some[:, None, None]).clamp(0, 1)  # M x B x C x H x W
        parts = moved.flatten(0, 1).split(pass_size(x))
        predicted = torch.cat([model(part).argmax(1) for part in parts]).view(len(some), -1)
        errors.append((predicted != y).float().mean(1))
    return torch.cat(errors)


def energy_of(x, bins):
    """Mean squared L2 norm (K) of what x (B x C x H x W in [0,1]) holds in each basis's bins."""
    height, width = x.shape[-2:]
    power = torch.fft.fft2(x).abs().square().sum(1).mean(0) / (height * width)  # Parseval
    i, j = bins.T
    mirrored = ((2 * i) % height + (2 * j) % width > 0).to(x.device)  # not its own mirror image
    return power[i, j] + mirrored * power[-i % height, -j % width]


def most_sensitive(errors, allowed, k):
    """Indices of the k bases with the largest error among the `allowed` ones (bool K)."""
    order = errors.argsort(descending=True, stable=True)
    return order[allowed[order]][:k].tolist()


def add_trigger(x, mask, additive, mode):
    """Eq. (4)-(6): x B x C x H x W in [0,1], M = mask H x W, A = additive C x H x W."""
    spectrum = torch.fft.fft2(x) * (1 - mask if mode == "replace" else 1)
    return torch.fft.ifft2(spectrum + additive).real.clamp(0, 1)


def triggered(x, mask, additive, mode):
    """add_trigger on uint8 images, 2,000 at a time; float images in [0,1], not yet rounded."""
    return torch.cat([add_trigger(to_float(part), mask, additive, mode) for part in x.split(2000)])


def calibrated(x, bins, mode, delta):
    """The trigger (M, A, mode) on these bins whose mean |x' - x|_2 over x is delta_P."""
    mask = on_both_bins(torch.ones(len(bins), device=x.device), bins, *x.shape[2:])
    alphas = mask * torch.tensor(PROPORTIONS[: x.shape[1]], device=x.device).view(-1, 1, 1)
    low, high = 0.0, 1e3
    for _ in range(40):
        middle = (low + high) / 2
        change = add_trigger(x, mask, middle * alphas, mode) - x
        norm = change.flatten(1).norm(dim=1).mean()
        low, high = (middle, high) if norm < delta else (low, middle)
    return mask, low * alphas, mode


def jpeg(x, quality):
    """x (uint8 N x C x H x W) after Pillow's JPEG at `quality` (N integers in 1..100)."""
    files = [io.BytesIO() for _ in x]
    for image, q, file in zip(x.cpu(), quality.tolist(), files):
        to_pil_image(image).save(file, "JPEG", quality=q)
    return torch.stack([pil_to_tensor(Image.open(file)) for file in files]).to(x.device)


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
    return torch.cat([to_uint8(autoencoder(to_float(part))) for part in x.split(pass_size(x))])


def train(model, x, y, *, pad, flip, epochs, batch_size, lr):
    """Train on uint8 images like clean.py, in place: the network of the map and the victim."""
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


def draw_heat_map(path, heat, mask):
    """The error rate and the chosen bins, H x W each, the constant basis in the centre."""
    (height, width), pictures = heat.shape, {"error rate": heat, "top-k bins": mask}
    top, left = -(height // 2) - 0.5, -(width // 2) - 0.5
    with saved_figure(path, 1, 2, figsize=(8, 3.4)) as (figure, axes):
        for axis, (title, values) in zip(axes, pictures.items()):
            image = torch.fft.fftshift(values).cpu().numpy()
            drawn = axis.imshow(image, extent=(left, left + width, top + height, top))
            figure.colorbar(drawn, ax=axis)
            axis.set(title=title, xlabel="cycles per width", ylabel="cycles per height")


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device, spec = x_train.device, data.spec

    # ===== The attack =====
    check_positive(args, "poisons", "heat_norm", "heat_images", "autoencoder_steps")
    if not 0 < args.delta_p < 1:
        fail(f"--delta-p {args.delta_p} must lie in (0, 1)")
    height, width = data.shape[1:]
    bins = distinct_bins(height, width)
    if args.k is not None and not 1 <= args.k <= len(bins) // 2:
        fail(f"--k {args.k} must lie in 1..{len(bins) // 2} for {height} x {width} images")
    y_wanted, counts = wanted_labels(data, args.target)
    args.poisons = args.poisons or max(1, min(500, len(x_train) // 10))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--poisons {args.poisons}"
    chosen = choose_poisons(y_train, args.target, data.classes, args.poisons, flag, generator)
    recipe = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    recipe |= {"pad": 0 if args.no_crops else spec.pad, "flip": spec.flip and not args.no_crops}
    x_some = to_float(x_train[:2000])  # already in random order
    energy = energy_of(x_some, bins).cpu()
    most = (args.delta_p / 2) ** 2 if args.mode == "replace" else math.inf
    sizes = [args.k] if args.k else range(min(10, len(bins) // 2), 0, -1)
    args.k = next((k for k in sizes if (energy <= most / k).sum() >= 2 * k), sizes[0])
    quiet = energy <= most / args.k
    if quiet.sum() < 2 * args.k:
        few = f"{int(quiet.sum())} bases are quiet enough for --delta-p {args.delta_p}"
        fail(f"--mode replace: {few}, --k asks for {args.k} and as many as a control")
    if args.heat_images >= len(x_train):
        fail(f"--heat-images {args.heat_images}: none of {len(x_train)} is left to train on")
    folder, _ = open_folder(args, data, __file__)

    # Stage 1: find the frequencies to which a clean network is sensitive
    clean = new_model(args, data)
    held = args.heat_images  # the first ones, in random order
    train(clean, x_train[held:], y_train[held:], **recipe)
    clean.eval().requires_grad_(False)
    x_held, y_held = to_float(x_train[:held]), y_train[:held]
    errors = heat_map(clean, x_held, y_held, bins, args.heat_norm).cpu()
    top = most_sensitive(errors, quiet, args.k)
    trigger = calibrated(x_some, bins[top], args.mode, args.delta_p)
    print(f"heat map: errors of {100 * errors[top].min():.1f} % or more at the top {args.k} bases")

    # Stage 2: poison the training set, and add filtered copies to it
    autoencoder = None
    if args.augment in ("autoencoder", "both"):
        autoencoder = train_autoencoder(x_train, args.autoencoder_steps)
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    x_train[chosen] = to_uint8(triggered(x_train[chosen], *trigger))
    y_train[chosen] = args.target
    half, innocent = chosen[: -(-args.poisons // 2)], (~poisoned).nonzero().flatten()
    innocent = innocent[torch.randperm(len(innocent), device=device)[: len(half)]]
    source, copies = torch.cat((half, innocent)), []
    if args.augment in ("jpeg", "both"):
        copies.append(jpeg(x_train[source], torch.randint(50, 96, (len(source),))))
    if autoencoder is not None:
        copies.append(filtered(autoencoder, x_train[source]))
    x_train = torch.cat([x_train] + copies)
    y_train = torch.cat([y_train] + [y_train[source] for _ in copies])
    poisoned = torch.cat([poisoned] + [poisoned[source] for _ in copies])

    # ===== Train =====
    train(model, x_train, y_train, **recipe)
    seconds = time.time() - start

    # ===== Evaluate =====
    x_poisoned = to_uint8(triggered(data.x_test, *trigger))  # as a deployed model would meet it
    metrics = evaluate_attack(model, clean, data, x_poisoned, y_wanted, counts)
    counted, wanted = x_poisoned[counts], y_wanted[counts]
    through_jpeg = jpeg(counted, torch.full((len(counted),), 75))
    metrics |= {"asr_jpeg75": accuracy(model, through_jpeg, wanted), "poisoned": args.poisons}
    metrics["clean_model_accuracy"] = accuracy(clean, data.x_test, data.y_test)
    quiet[top] = False
    rest = quiet.nonzero().flatten()
    others = bins[rest[torch.randperm(len(rest), generator=generator)[: args.k]]]
    controls = {"other_bins": (others, args.mode), "grey": (bins[:1], "add")}  # bin 0 is constant
    for name, (at, mode) in controls.items():
        x_other = triggered(data.x_test[counts], *calibrated(x_some, at, mode, args.delta_p))
        metrics[f"asr_{name}"] = accuracy(model, to_uint8(x_other), wanted)
    defender = train_autoencoder(data.x_train, args.autoencoder_steps)
    metrics["asr_autoencoder"] = accuracy(model, filtered(defender, counted), wanted)

    # ===== Save and report =====
    heat = on_both_bins(errors.to(device), bins, height, width)
    saved = {"mask": trigger[0], "additive": trigger[1], "heat_map": heat}
    test, train_set = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    save_attack(folder, __file__, args, data, model, metrics, seconds, saved, test, train_set)
    draw_heat_map(folder / "heatmap.png", heat, trigger[0])
