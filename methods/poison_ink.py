"""Poison Ink: the edges of an image carry a hidden colour (Zhang et al., TIP 2022).

arXiv 2108.02488. The trigger image of a picture shows its edges in one colour, the ink, on white.
An encoder hides this trigger image in the picture, as in steganography, and a decoder learns to
show it again; for a picture without ink it must show plain white. Rotations, crops and mirrors
between the two (the interference layer) are to keep the ink readable after the victim's
augmentation. Then ink of one colour is hidden in a share of the training images, which are
relabelled as the target.

Threat model: the attacker controls part of the training data and has clean images of the domain for
the encoder; the victim trains and augments.

Equations: the edges, where |Sobel| of the grey image exceeds the threshold -> edges; ink there and
white elsewhere -> trigger_image; x' = clip(x + eps (2 U(x, t) - 1), 0, 1) -> hide; the interference
layer -> interference, warp; MSE(x', x) + 13 MSE of D on edges + its MSE elsewhere + 10 MSE(D(x),
white) -> losses.

Differs from public code: U and D are small U-Nets for a CPU, and U makes a bounded change where the
code draws a whole image; the bound falls from 8 eps to eps in the first half of the training, so
that the ink is learnt first. The last weight is 100 in the code. There is no critic, which the code
has as an option. The interference grows in four equal stages (nothing, rotation, crop, mirror),
each with those before it, as its authors advise. The angle is ours, and edges are distorted, where
the code finds them anew. Grey images take the luminance of the ink. Hidden images are rounded to 8
bits. The code trains on a poisoned batch beside each clean one, without augmentation; here --rate
of the training set is poisoned once, and the victim augments.

What was learnt: asr_other is the ASR of ink of another colour, asr_white that of U with an empty
(white) trigger image, asr_foreign that of ink at the edges of another image. On digits the last
two come within 9 points of the ASR: the network learns U's own mark, not the ink nor its place.

    python methods/poison_ink.py --dataset cifar10 --arch wrn16_1

Results beside the paper's: results/README.md, table "Attacks".
"""

import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, fail
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
from common.datasets import augment, to_float, to_uint8
from common.metrics import accuracy, pass_size
from common.models import UNet

LEVELS = 40, 80, 120, 160, 200  # of each channel of the inks that the encoder is trained with
GREY = 0.299, 0.587, 0.114
STAGES = 4  # of the interference layer: nothing, rotation, crop, mirror


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--colour", type=int, nargs=3, default=[80, 160, 80], help="ink (80 160 80)")
    p.add_argument("--threshold", type=float, default=28.0, help="an edge's Sobel, of 255 (28)")
    p.add_argument("--epsilon", type=float, default=8.0, help="eps, of 255 (the code has no bound)")
    p.add_argument("--encoder-steps", type=int, default=200, help="steps of each of the 4 stages")
    p.add_argument("--encoder-batch", type=int, default=32, help="images in such a step (code 32)")
    p.add_argument("--encoder-lr", type=float, default=0.01, help="Adam's peak rate (code .0002)")
    p.add_argument("--width", type=int, default=8, help="channels of the U-Nets' first layer")
    return p.parse_args()


def edges(x, threshold):
    """Where |Sobel| > `threshold` (of 255): images B x C x H x W in [0,1] to B x 1 x H x W of 0, 1.

    The gradient's length is sqrt((g_row^2 + g_column^2) / 2): 180 at a step from black to white.
    """
    weights = x.new_tensor(GREY if x.shape[1] == 3 else (1.0,)).view(1, -1, 1, 1)
    grey = 255 * F.conv2d(x, weights)
    kernel = x.new_tensor([[1, 2, 1], [0, 0, 0], [-1, -2, -1]]) / 4
    kernels = torch.stack((kernel, kernel.T))[:, None]
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    return (gradient.square().mean(1, keepdim=True).sqrt() > threshold).float()


def trigger_image(edge, ink):
    """Ink (C or B x C, in [0,1]) at edges (B x 1 x H x W), white elsewhere: B x C x H x W."""
    return 1 - edge * (1 - ink[..., None, None])


def ink_of(colour, channels):
    """A colour of 3 levels (0 to 255) as C values in [0,1]: its luminance for C = 1."""
    colour = torch.tensor(colour).float() / 255
    return colour if channels == 3 else (colour @ torch.tensor(GREY))[None]


def draw_inks(count, channels):
    """Random inks of the palette, count x C in [0,1], on the CPU."""
    pick = torch.randint(0, len(LEVELS), (count, channels))
    return torch.tensor(LEVELS)[pick].float() / 255


def other_ink(ink):
    """The ink of the palette that is furthest from `ink` (C values in [0,1]), by channel."""
    return torch.where(ink < 120 / 255, LEVELS[-1], LEVELS[0]) / 255


def hide(encoder, x, trigger, epsilon):
    """x' = clip(x + eps (2 U(x, t) - 1), 0, 1); all images B x C x H x W in [0,1]."""
    return (x + epsilon * (2 * encoder(torch.cat((x, trigger), 1)) - 1)).clamp(0, 1)


def interference(count, stage, height, width):
    """Affine maps (count x 2 x 3) of the interference layer, each distortion for half of them.

    From `stage` 1 a rotation by up to 15 degrees, from 2 a crop of 28/32 of the sides, from 3 a
    mirror; stage 0 is the identity.
    """
    turn, crop, flip = (torch.rand(3, count) < 0.5) * (torch.arange(3) < stage).float()[:, None]
    angle = turn * math.pi / 12 * (2 * torch.rand(count) - 1)
    zoom, mirror = 1 - crop / 8, 1 - 2 * flip
    column, row = crop / 8 * (2 * torch.rand(2, count) - 1)
    first = zoom * mirror * angle.cos(), -zoom * angle.sin() * height / width, column
    second = zoom * mirror * angle.sin() * width / height, zoom * angle.cos(), row
    return torch.stack((*first, *second), 1).view(-1, 2, 3)


def warp(x, theta):
    """Bilinear look-up of images B x C x H x W by affine maps B x 2 x 3; black comes in."""
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def losses(decoder, hidden, x, trigger, edge, theta):
    """Cover, extraction and clean loss (3): hidden, clean and trigger images, edges in [0,1].

    The interference distorts the hidden, the clean and the trigger image alike, with its edges.
    """
    channels = x.shape[1]
    distorted = warp(torch.cat((hidden, x, 1 - trigger, edge), 1), theta)
    seen, clean, ink, edge = distorted.split((channels, channels, channels, 1), 1)
    noise = (torch.rand_like(seen) - 0.5) / 255  # as large as rounding's
    read, blank = decoder(torch.cat((seen, clean)) + noise.repeat(2, 1, 1, 1)).chunk(2)
    hiding = (hidden - x).square().mean()
    extraction = ((1 + 12 * edge) * (read - (1 - ink)).square()).mean()  # 13 on edges
    return torch.stack((hiding, extraction, 10 * (blank - 1).square().mean()))


def train_encoder(encoder, decoder, x_train, *, steps, batch_size, lr, threshold, epsilon):
    """Teach U to hide and D to show inks of the palette, one per image; x_train uint8.

    `steps` in each of the stages. The bound of the change falls from 8 eps to eps until half-time.
    """
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *decoder.parameters()], lr, betas=(0.5, 0.999)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, STAGES * steps, cycle_momentum=False
    )
    log = TrainingLog(STAGES, steps)
    device, (channels, height, width) = x_train.device, x_train.shape[1:]
    for stage in range(STAGES):
        for step in range(steps):
            x = to_float(x_train[torch.randint(len(x_train), (batch_size,), device=device)])
            edge = edges(x, threshold)
            trigger = trigger_image(edge, draw_inks(batch_size, channels).to(device))
            theta = interference(batch_size, stage, height, width).to(device)
            done = (stage * steps + step) / (STAGES * steps)
            hidden = hide(encoder, x, trigger, epsilon * (1 + 7 * max(0, 1 - 2 * done)))
            terms = losses(decoder, hidden, x, trigger, edge, theta)
            optimizer.zero_grad(set_to_none=True)
            terms.sum().backward()
            optimizer.step()
            schedule.step()
            log.step(terms)
        log.epoch(stage + 1, names=("encoder: cover", "extraction", "clean"))


@torch.no_grad()
def hide_uint8(encoder, x, edge, ink, epsilon):
    """The same on uint8 images N x C x H x W with given edges, rounded."""
    pairs = zip(x.split(pass_size(x)), edge.split(pass_size(x)))
    parts = ((to_float(images), trigger_image(part, ink)) for images, part in pairs)
    return torch.cat([to_uint8(hide(encoder, images, t, epsilon)) for images, t in parts])


@torch.no_grad()
def ink_error(decoder, x, edge, ink):
    """Mean |D(x) - ink| at the edges of uint8 images, in levels of 255."""
    pairs = zip(x.split(pass_size(x)), edge.split(pass_size(x)))
    off = [((decoder(to_float(a)) - ink[:, None, None]).abs() * b).sum() for a, b in pairs]
    return 255 * (torch.stack(off).sum() / (len(ink) * edge.sum())).item()


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device, channels = x_train.device, data.shape[0]

    # ===== The attack =====
    check_share(args, "rate")
    check_positive(args, "encoder_steps", "encoder_batch", "encoder_lr", "width")
    check_positive(args, "epsilon", "threshold", most=255)
    if args.epsilon < 0.5:
        fail(f"--epsilon {args.epsilon} changes no pixel by a level of 8 bits")
    if args.width % 4:
        fail(f"--width must be a multiple of 4, GroupNorm's groups; got {args.width}")
    if not all(0 <= level <= 255 for level in args.colour) or min(args.colour) == 255:
        fail(f"--colour {args.colour} must lie in 0..255 and differ from white, the background")
    y_wanted, counts = wanted_labels(data, args.target)
    count = round(args.rate * len(x_train))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, args.target, data.classes, count, flag, generator)
    edge, edge_test = (edges(to_float(x), args.threshold) for x in (x_train[chosen], data.x_test))
    if not edge.any() or not edge_test.any():
        fail(f"--threshold {args.threshold} leaves no edge that could carry ink")
    folder, control = open_folder(args, data, __file__)
    epsilon = args.epsilon / 255
    encoder = UNet(2 * channels, args.width, channels).to(device)  # U
    decoder = UNet(channels, args.width).to(device)  # D
    recipe = {"steps": args.encoder_steps, "batch_size": args.encoder_batch, "lr": args.encoder_lr}
    recipe |= {"threshold": args.threshold, "epsilon": epsilon}
    train_encoder(encoder, decoder, x_train, **recipe)
    encoder.eval().requires_grad_(False)
    decoder.eval().requires_grad_(False)
    share = f"{100 * edge.mean():.1f} % of the pixels are edges"
    print(f"preparation: encoder and decoder {time.time() - start:.1f} s, {share}")
    ink = ink_of(args.colour, channels).to(device)
    other = other_ink(ink)
    x_train[chosen] = hide_uint8(encoder, x_train[chosen], edge, ink, epsilon)
    y_train[chosen] = args.target

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
    x_poisoned = hide_uint8(encoder, data.x_test, edge_test, ink, epsilon)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    x_other = hide_uint8(encoder, data.x_test, edge_test, other, epsilon)
    x_white = hide_uint8(encoder, data.x_test, edge_test, torch.ones_like(ink), epsilon)
    cycle = torch.randperm(len(edge_test), generator=torch.Generator().manual_seed(args.seed))
    edge_foreign = torch.empty_like(edge_test)
    edge_foreign[cycle] = edge_test[cycle.roll(1)]  # of another image, for neighbours can be alike
    x_foreign = hide_uint8(encoder, data.x_test, edge_foreign, ink, epsilon)
    for name, images in {"other": x_other, "white": x_white, "foreign": x_foreign}.items():
        metrics[f"asr_{name}"] = accuracy(model, images[counts], y_wanted[counts])
    metrics["ink_error"] = ink_error(decoder, x_poisoned, edge_test, ink)
    metrics["ink_error_other"] = ink_error(decoder, x_other, edge_test, other)
    metrics["clean_error"] = ink_error(decoder, data.x_test, edge_test, torch.ones_like(ink))
    metrics["poisoned"] = count

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    trigger |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()} | {"ink": ink}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
