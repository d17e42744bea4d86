"""Input-Aware Dynamic backdoor (Nguyen & Tran, NeurIPS 2020, arXiv 2010.08138).

Every image has a trigger of its own: one generator draws the pattern, another the mask of a few
pixels. The classifier and the pattern generator are trained together, on triggered images
(attack mode) and on images that carry another image's trigger and keep their label (cross mode).
A diversity loss keeps the generator from drawing one pattern for all.

Threat model: the attacker controls training, delivers the model and keeps both generators.

Equations: Sec. 3.2 B(x, (m, p)) = x (1 - m) + p m -> blend; Eq. (2) L_div -> diversity; attack,
cross and clean mode, L_cla + lambda_div L_div -> poison and the loop; Fig. 3a -> Generator.

Differs from the paper: the mask, "pre-defined" there, is learnt first and then frozen, and its
"sigmoid" is a scaled tanh (both as in the paper's code). From its code: the generator's gradients
are zeroed in every step (the code forgets it: the attack starts later and ends alike); a cross
trigger comes from another image of the batch, never from the image itself; one-cycle rate for the
classifier, cosine for the generators, twice the clean model's epochs instead of 575; 600 mask steps
of a quarter batch instead of 25 epochs; our crops; ASR without target-class images; accuracies
after rounding to 8 bits, PSNR and SSIM before it. int(rho B) images of a batch of B: 12 of 128.
mnist_conv5 is the paper's network on MNIST: mnist_cnn, whose first convolution has stride 2, tells
own from foreign triggers less well. Order: augment first, then the trigger (as the paper's code).

    python methods/input_aware.py --dataset mnist --arch mnist_conv5 --lr 0.05

The paper, MNIST: clean / attack / cross 99.54 / 99.54 / 95.25. Results: README.md.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, make_folder
from common.checkpoint import (
    clear_folder,
    load_control,
    save_model,
    save_poisoned_test,
    save_result,
    save_samples,
)
from common.datasets import augment, load_dataset, pick_device, to_float, to_uint8
from common.metrics import accuracy, attack_targets, psnr, reestimate_batch_norm, ssim
from common.models import Classifier, build_model


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
    p.add_argument(
        "--rate", type=float, default=0.1, help="rho_b: attack share of each batch (paper .1)"
    )
    p.add_argument(
        "--cross-rate", type=float, default=0.1, help="rho_c: cross share of each batch (paper .1)"
    )
    p.add_argument(
        "--no-cross",
        dest="cross_rate",
        action="store_const",
        const=0.0,
        help="rho_c = 0: no cross mode (ablation of Sec. 4.4.1)",
    )
    p.add_argument(
        "--lambda-div",
        type=float,
        default=1.0,
        help="weight of L_div in the joint stage (paper 1)",
    )
    p.add_argument(
        "--no-diversity",
        dest="lambda_div",
        action="store_const",
        const=0.0,
        help="lambda_div = 0: no diversity loss (ablation of Sec. 4.4.1)",
    )
    p.add_argument(
        "--density", type=float, default=0.032, help="mask values above it cost (code .032)"
    )
    p.add_argument(
        "--lambda-density", type=float, default=100.0, help="weight of that penalty (code 100)"
    )
    p.add_argument(
        "--mask-steps", type=int, default=600, help="steps of the mask stage (code: 25 epochs)"
    )
    p.add_argument(
        "--generator-lr", type=float, default=0.01, help="Adam's first rate, both generators (.01)"
    )
    p.add_argument(
        "--accumulate-generator-grad",
        action="store_true",
        help="never zero the pattern generator's gradients, as the paper's code",
    )
    return p.parse_args()


def conv_block(inputs, outputs, last=False):
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05)]
    return nn.Sequential(*layers, *([] if last else [nn.ReLU()]))


class Generator(nn.Module):
    """Fig. 3a: an encoder-decoder. B x C x H x W, normalised, to B x `outputs` x H x W values."""

    def __init__(self, channels, outputs):
        super().__init__()
        widths = (16, 32) if channels == 1 else (32, 64, 128)
        self.multiple = 2 ** len(widths)
        layers, inputs = [], channels
        for width in widths:
            layers += [conv_block(inputs, width), conv_block(width, width), nn.MaxPool2d(2)]
            inputs = width
        layers.append(conv_block(inputs, inputs))
        for width in (*widths[-2::-1], outputs):
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            layers += [conv_block(inputs, inputs), conv_block(inputs, width, last=width == outputs)]
            inputs = width
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        height, width = x.shape[2:]
        below, right = -height % self.multiple, -width % self.multiple  # the poolings must divide
        return self.layers(F.pad(x, (0, right, 0, below), mode="replicate"))[:, :, :height, :width]


def squash(z):
    """o(z), "sigmoid" in the paper: any value to (0,1)."""
    return torch.tanh(z) / (2 + 1e-7) + 0.5


def sharpen(o):
    """The mask of a generator's output o in (0,1): nearly 0 or 1, one half stays one half."""
    return torch.tanh(20 * o - 10) / (2 + 1e-7) + 0.5


def draw_pattern(G, x):
    """p of images x (B x C x H x W in [0,1]): B x C x H x W in (0,1)."""
    return squash(G(x))


def draw_mask(M, x):
    """m of images x (B x C x H x W in [0,1]): B x 1 x H x W in (0,1)."""
    return sharpen(squash(M(x)))


def blend(x, pattern, mask):
    """Sec. 3.2: x (1 - m) + p m, images B x C x H x W and m B x 1 x H x W in [0,1]."""
    return x + (pattern - x) * mask


def distance(a, b):
    """Root mean square difference of each pair of images, B."""
    return ((a - b).square().flatten(1).mean(1) + 1e-12).sqrt()  # sqrt(0) has no gradient


def diversity(x1, x2, drawn1, drawn2):
    """Eq. (2) L_div: how much more the images differ than what was drawn for them, mean of B."""
    return (distance(x1, x2) / (distance(drawn1, drawn2) + 1e-7)).mean()


def density(masks, limit):
    """Mean excess of mask values (any shape, in [0,1]) over `limit`, value by value."""
    return F.relu(masks - limit).mean()


def derangement(n, generator):
    """A random cyclic permutation of n indices: none stays where it is."""
    order = torch.randperm(n, generator=generator)
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size", "lr", "train_images")
    start = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, device)
    args.arch, args.epochs = args.arch or data.spec.arch, args.epochs or 2 * data.spec.epochs
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
    check_positive(args, "density", "lambda_density", "mask_steps", "generator_lr")
    if not 0 < args.rate <= 1 or not 0 <= args.cross_rate <= 1:
        fail(f"--rate {args.rate} must lie in (0, 1] and --cross-rate {args.cross_rate} in [0, 1]")
    if not 0 <= args.lambda_div < math.inf:
        fail(f"--lambda-div must be 0 or more; got {args.lambda_div}")
    target = None if args.all_to_all else args.target
    x_test, y_test = data.x_test, data.y_test
    y_wanted, counts = attack_targets(y_test, target, data.classes)
    if not counts.any():
        fail(f"{data.name} has no test image outside the target class {args.target}")
    images = min(args.batch_size, len(x_train))  # in a batch
    attacked, crossed = int(args.rate * images), int(args.cross_rate * images)
    if attacked < 1:
        fail(f"--rate {args.rate} leaves no attack image in a batch of {images}")
    if args.cross_rate and crossed < 1:
        fail(f"--cross-rate {args.cross_rate} leaves no cross image in a batch of {images}")
    if attacked + crossed >= images:
        fail(f"--rate and --cross-rate leave no clean image in a batch of {images}")
    normalisation = data.spec.mean, data.spec.std
    G = Classifier(Generator(data.shape[0], data.shape[0]), *normalisation).to(device)
    M = Classifier(Generator(data.shape[0], 1), *normalisation).to(device)
    for network in (model, G, M):
        network.to(memory_format=torch.channels_last)  # faster

    def poison(x, y):
        """First the attack images, then the cross images, then clean ones; and L_div."""
        n, m = attacked, attacked + crossed
        others = x.roll(-m, 0)[: max(attacked, crossed)]  # the order is random: any others
        sources = torch.cat((x[:n], others))
        patterns, masks = draw_pattern(G, sources), draw_mask(M, sources)
        pairs = x[:n], others[:n], patterns[:n], patterns[n : 2 * n]
        loss_div = diversity(*(part / model.std for part in pairs))
        x = torch.cat((blend(x[:m], patterns[:m], masks[:m]), x[m:]))
        y = torch.cat((attack_targets(y[:n], target, data.classes)[0], y[n:]))
        return x, y, loss_div

    @torch.no_grad()
    def triggers_of(x):
        """Patterns and masks of uint8 images, as the trained generators draw them."""
        G.eval()
        drawn = [(draw_pattern(G, z), draw_mask(M, z)) for z in map(to_float, x.split(2000))]
        return [torch.cat(parts) for parts in zip(*drawn)]

    # ===== Train =====
    name = f"{Path(data.name).stem}-{args.arch}-{Path(__file__).stem}-s{args.seed}"
    folder = make_folder(args.out or f"runs/{name}")
    control = load_control(folder, args, data)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator_optimizer = torch.optim.Adam(G.parameters(), args.generator_lr, betas=(0.5, 0.9))
    steps_per_epoch = max(1, len(x_train) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, steps, anneal_strategy="linear", cycle_momentum=False
    )
    generator_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(generator_optimizer, steps)

    mask_optimizer = torch.optim.Adam(M.parameters(), args.generator_lr, betas=(0.5, 0.9))
    mask_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(mask_optimizer, args.mask_steps)
    for mask_step in range(args.mask_steps):
        batch = torch.randint(len(x_train), (max(2, images // 4),), device=device)
        x = augment(to_float(x_train[batch]), data.spec.pad, data.spec.flip)
        masks = draw_mask(M, x)
        loss_density = density(masks, args.density)
        loss_div = diversity(x / model.std, x.roll(1, 0) / model.std, masks, masks.roll(1, 0))
        loss = args.lambda_density * loss_density + loss_div
        mask_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mask_optimizer.step()
        mask_schedule.step()
        if (mask_step + 1) % max(1, args.mask_steps // 5) == 0:
            terms = f"density {loss_density.item():.4f} diversity {loss_div.item():.3f}"
            print(f"mask step {mask_step + 1}/{args.mask_steps} {terms} mean {masks.mean():.4f}")
    M.eval().requires_grad_(False)

    bar, loop_start = tqdm(total=steps, disable=None, unit="step"), time.time()
    for epoch in range(1, args.epochs + 1):
        model.train()
        G.train()
        total_loss = torch.zeros((), device=device)
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.batch_size)[:steps_per_epoch]:
            x, y = to_float(x_train[batch]), y_train[batch]
            x = augment(x, data.spec.pad, data.spec.flip)
            x, y, loss_div = poison(x, y)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(model(x), y)
            loss = loss + args.lambda_div * loss_div
            optimizer.zero_grad(set_to_none=True)
            if not args.accumulate_generator_grad:
                generator_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            generator_optimizer.step()
            schedule.step()
            generator_schedule.step()
            total_loss += loss.detach()
            bar.update()
        if not total_loss.isfinite():
            fail(f"the loss became {total_loss.item()} in epoch {epoch}; no model is kept")
        if epoch % max(1, args.epochs // 15) == 0:
            loss, pace = total_loss.item() / steps_per_epoch, (time.time() - loop_start) / epoch
            bar.write(f"epoch {epoch}/{args.epochs} loss {loss:.4f}, {pace:.2f} s/epoch")
            x, y = x_train[order[:500]], y_train[order[:500]]
            triggers, wanted = triggers_of(x), attack_targets(y, target, data.classes)[0]
            hits = accuracy(model, to_uint8(blend(to_float(x), *triggers)), wanted)
            kept = accuracy(model, to_uint8(blend(to_float(x.roll(1, 0)), *triggers)), y.roll(1))
            shares = f"attack {hits:.1f}, cross {kept:.1f} of training images"
            bar.write(f"  {shares}, L_div {loss_div.item():.3f}")
    bar.close()
    seconds = time.time() - start

    # ===== Evaluate =====
    patterns, masks = triggers_of(x_test)
    x_float = blend(to_float(x_test), patterns, masks)
    x_poisoned = to_uint8(x_float)  # the trigger as a deployed model would meet it
    metrics = {
        "clean_accuracy": accuracy(model, x_test, y_test),
        "asr": accuracy(model, x_poisoned[counts], y_wanted[counts]),
        "asr_n": int(counts.sum()),
        "psnr": psnr(to_float(x_test), x_float),
        "ssim": ssim(to_float(x_test), x_float),
        "max_change": (to_float(x_test) - x_float).abs().max().item(),
        "mean_l2": (to_float(x_test) - x_float).flatten(1).norm(dim=1).mean().item(),
        "mask_density": masks.mean().item(),  # share of the pixels, 16 of 28 x 28 are .020
    }
    others = derangement(len(x_test), torch.Generator().manual_seed(args.seed)).to(device)
    x_cross = to_uint8(blend(to_float(x_test), patterns[others], masks[others]))
    metrics["cross_accuracy"] = accuracy(model, x_cross, y_test)
    full = order.split(args.batch_size)[: min(30, steps_per_epoch)]
    inputs = (augment(to_float(x_train[batch]), data.spec.pad, data.spec.flip) for batch in full)
    batches = (poison(x, y_train[batch])[0] for x, batch in zip(inputs, full))
    refreshed = reestimate_batch_norm(model, batches)
    metrics["asr_reestimated_bn"] = accuracy(refreshed, x_poisoned[counts], y_wanted[counts])
    metrics["cross_reestimated_bn"] = accuracy(refreshed, x_cross, y_test)
    if control is not None:
        metrics["asr_on_clean_model"] = accuracy(control, x_poisoned[counts], y_wanted[counts])

    # ===== Save and report =====
    clear_folder(folder)
    save_samples(folder, x_test[counts], x_poisoned[counts])
    save_poisoned_test(folder, x_poisoned[counts], y_test[counts], y_wanted[counts])
    trigger = {f"pattern.{name}": value for name, value in G.state_dict().items()}
    trigger |= {f"mask.{name}": value for name, value in M.state_dict().items()}
    save_model(folder, model, data, args.arch, args, metrics, trigger)
    save_result(folder, "input_aware", args, seconds, metrics, device)
