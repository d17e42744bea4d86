"""Input-Aware Dynamic backdoor (Nguyen & Tran, NeurIPS 2020, arXiv 2010.08138).

Every image gets a trigger of its own. One generator draws a pattern from the image, another draws
a mask, the few pixels where the pattern replaces the image. The pattern generator and the
classifier are trained together: images with their own trigger must be labelled as the target
(attack mode), images with the trigger of another image must keep their label (cross mode). A
diversity loss rewards patterns that differ as much as their images do, so that there is no single
pattern for a defender to find.

Threat model: the attacker controls training, delivers the model and keeps both generators.
Where it fails: Neural Cleanse, which finds nothing in the paper, flags the target in 2 of our 3
MNIST models (p < .05 in 1); STRIP misses them. Without cross mode another image's trigger changes
the label of about half of the images or more (3 models).

Equations: Sec. 3.1 B(x, (m, p)) = x (1 - m) + p m -> blend; L_div, which has no number ->
diversity; attack, cross and clean mode -> poison; L_cla + lambda_div L_div -> the loop, and for the
masks lambda_div L_div (its square in the paper's code; both are 1); Fig. 3a -> Generator.

Differs from the paper: its mask is "pre-defined", ours is learnt first and then frozen, and its
"sigmoid" is a scaled tanh here; both are so in the paper's code. Differs from that code: it never
zeroes the pattern generator's gradients, we do in every step (--accumulate-generator-grad does as
the code; no stored run compares the two). A cross trigger comes from another image of the batch,
never from the image itself. The classifier's rate runs through one cycle, the generators' fall
along a cosine, in twice the clean model's epochs instead of 575; the mask is learnt in 600 steps of
a quarter batch instead of 25 epochs. Nothing is rotated. The ASR leaves out test images of the
target class. Accuracies are measured after rounding to 8 bits, PSNR and SSIM before it. 12 of 128
images attack and 12 are crossed, augmented first and triggered afterwards as in the paper's code.
The network mnist_conv5 is the paper's on MNIST. The model never sees poisoned_train.npz: there a
share --rate of the images has the finished generators' triggers, for ABL, which trains itself.

    python methods/input_aware.py --dataset mnist --arch mnist_conv5 --lr 0.05

Results beside the paper's: results/README.md, table "Attacks".
"""

import copy
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

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
from common.metrics import accuracy, attack_targets, pass_size
from common.models import Classifier

OFF = {"action": "store_const", "const": 0.0}  # a flag that sets another one to 0


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--all-to-all", action="store_true", help="target (y + 1) mod K instead of y_t")
    p.add_argument("--rate", type=float, default=0.1, help="rho_b, attack share of a batch (.1)")
    p.add_argument("--cross-rate", type=float, default=0.1, help="rho_c, cross share (paper .1)")
    p.add_argument("--no-cross", dest="cross_rate", **OFF, help="rho_c = 0 (paper's ablation)")
    p.add_argument("--lambda-div", type=float, default=1.0, help="weight of L_div (paper 1)")
    p.add_argument("--no-diversity", dest="lambda_div", **OFF, help="lambda_div = 0 (ablation)")
    p.add_argument("--density", type=float, default=0.032, help="mask values above it cost (.032)")
    p.add_argument("--lambda-density", type=float, default=100.0, help="their weight (code 100)")
    p.add_argument("--mask-steps", type=int, default=600, help="mask stage (code: 25 epochs)")
    p.add_argument("--generator-lr", type=float, default=0.01, help="first rate of Adam (code .01)")
    p.add_argument("--accumulate-generator-grad", action="store_true", help="never zero it (code)")
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


def draw_pattern(pattern_generator, x):
    """p of images x (B x C x H x W in [0,1]): B x C x H x W in (0,1)."""
    return squash(pattern_generator(x))


def draw_mask(mask_generator, x):
    """m of images x (B x C x H x W in [0,1]): B x 1 x H x W in (0,1)."""
    return sharpen(squash(mask_generator(x)))


def blend(x, pattern, mask):
    """Sec. 3.1: x (1 - m) + p m, images B x C x H x W and m B x 1 x H x W in [0,1]."""
    return x + (pattern - x) * mask


def distance(a, b):
    """Root mean square difference of each pair of images, B."""
    return ((a - b).square().flatten(1).mean(1) + 1e-12).sqrt()  # sqrt(0) has no gradient


def diversity(x1, x2, drawn1, drawn2):
    """L_div: how much more the images differ than what was drawn for them, mean of B."""
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


def poison(x, y, generators, *, attacked, crossed, target, classes):
    """A batch: first the `attacked` images, then the `crossed` ones, then clean ones; and L_div.

    x floats B x C x H x W in [0,1] in random order; the first clean images lend the cross triggers.
    """
    pattern_generator, mask_generator = generators
    n, m = attacked, attacked + crossed
    others = x.roll(-m, 0)[: max(attacked, crossed)]
    sources = torch.cat((x[:n], others))
    patterns, masks = draw_pattern(pattern_generator, sources), draw_mask(mask_generator, sources)
    pairs = x[:n], others[:n], patterns[:n], patterns[n : 2 * n]
    loss_div = diversity(*(part / pattern_generator.std for part in pairs))
    x = torch.cat((blend(x[:m], patterns[:m], masks[:m]), x[m:]))
    y = torch.cat((attack_targets(y[:n], target, classes)[0], y[n:]))
    return x, y, loss_div


@torch.no_grad()
def triggers_of(x, generators):
    """Patterns and masks of uint8 images by the generators, which are left in eval mode."""
    pattern_generator, mask_generator = (generator.eval() for generator in generators)
    parts = [to_float(part) for part in x.split(pass_size(x))]
    patterns = torch.cat([draw_pattern(pattern_generator, part) for part in parts])
    return patterns, torch.cat([draw_mask(mask_generator, part) for part in parts])


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args, epochs=2)
    device = x_train.device

    # ===== The attack =====
    check_positive(args, "density", "lambda_density", "mask_steps", "generator_lr")
    if not 0 < args.rate <= 1 or not 0 <= args.cross_rate <= 1:
        fail(f"--rate {args.rate} must lie in (0, 1] and --cross-rate {args.cross_rate} in [0, 1]")
    if not 0 <= args.lambda_div < math.inf:
        fail(f"--lambda-div must be 0 or more; got {args.lambda_div}")
    target = None if args.all_to_all else args.target
    y_wanted, counts = wanted_labels(data, target)
    images = min(args.batch_size, len(x_train))  # in a batch
    attacked, crossed = (int(r * images + 1e-9) for r in (args.rate, args.cross_rate))
    if attacked < 1:
        fail(f"--rate {args.rate} leaves no attack image in a batch of {images}")
    if args.cross_rate and crossed < 1:
        fail(f"--cross-rate {args.cross_rate} leaves no cross image in a batch of {images}")
    if attacked + crossed >= images:
        fail(f"--rate and --cross-rate leave no clean image in a batch of {images}")
    normalisation, channels = (data.spec.mean, data.spec.std), data.shape[0]
    pattern_generator = Classifier(Generator(channels, channels), *normalisation).to(device)  # G
    mask_generator = Classifier(Generator(channels, 1), *normalisation).to(device)  # M
    generators = pattern_generator, mask_generator
    for network in generators:
        network.to(memory_format=torch.channels_last)  # faster
    shares = {"attacked": attacked, "crossed": crossed, "target": target, "classes": data.classes}
    folder, control = open_folder(args, data, __file__)

    # ===== The masks =====
    mask_optimizer = torch.optim.Adam(
        mask_generator.parameters(), args.generator_lr, betas=(0.5, 0.9)
    )
    mask_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(mask_optimizer, args.mask_steps)
    for step in range(1, args.mask_steps + 1):
        batch = torch.randint(len(x_train), (max(2, images // 4),), device=device)
        x = augment(to_float(x_train[batch]), data.spec.pad, data.spec.flip)
        masks = draw_mask(mask_generator, x)
        loss_density = density(masks, args.density)
        loss_div = diversity(x / model.std, x.roll(1, 0) / model.std, masks, masks.roll(1, 0))
        loss = args.lambda_density * loss_density + args.lambda_div * loss_div
        mask_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mask_optimizer.step()
        mask_schedule.step()
        if step % max(1, args.mask_steps // 5) == 0:
            terms = f"density {loss_density.item():.4f} diversity {loss_div.item():.3f}"
            print(f"mask step {step}/{args.mask_steps} {terms} mean {masks.mean():.4f}")
    mask_generator.eval().requires_grad_(False)

    # ===== Train =====
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator_optimizer = torch.optim.Adam(
        pattern_generator.parameters(), args.generator_lr, betas=(0.5, 0.9)
    )
    steps_per_epoch = max(1, len(x_train) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, steps, anneal_strategy="linear", cycle_momentum=False
    )
    generator_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(generator_optimizer, steps)
    log = TrainingLog(args.epochs, steps_per_epoch)
    names = ("L_cla", "L_div", "attack", "cross")[: 4 if crossed else 3]
    for epoch in range(1, args.epochs + 1):
        model.train()
        pattern_generator.train()
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.batch_size)[:steps_per_epoch]:
            x, y = to_float(x_train[batch]), y_train[batch]
            x = augment(x, data.spec.pad, data.spec.flip)
            x, y, loss_div = poison(x, y, generators, **shares)
            logits = model(x)
            loss_cla = F.cross_entropy(logits, y)
            loss = loss_cla + args.lambda_div * loss_div
            optimizer.zero_grad(set_to_none=True)
            if not args.accumulate_generator_grad:
                generator_optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            generator_optimizer.step()
            schedule.step()
            generator_schedule.step()
            right = (logits.argmax(1) == y).float()  # of the batch, to watch the two modes grow
            hits, kept = right[:attacked].mean(), right[attacked:][:crossed].sum() / max(1, crossed)
            log.step(torch.stack((loss_cla, loss_div, hits, kept)))
        log.epoch(epoch, names=names)
    seconds = time.time() - start

    # ===== Evaluate =====
    patterns, masks = triggers_of(data.x_test, generators)
    x_float = blend(to_float(data.x_test), patterns, masks)
    x_poisoned = to_uint8(x_float)  # the trigger as a deployed model would meet it
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts, x_float)
    metrics["mask_density"] = masks.mean().item()  # share of the pixels, 16 of 28 x 28 are .020
    others = derangement(len(masks), torch.Generator().manual_seed(args.seed)).to(device)
    x_cross = to_uint8(blend(to_float(data.x_test), patterns[others], masks[others]))
    metrics["cross_accuracy"] = accuracy(model, x_cross, data.y_test)
    metrics["asr_other"] = accuracy(model, x_cross[counts], y_wanted[counts])
    full = order.split(args.batch_size)[: min(30, steps_per_epoch)]
    inputs = (augment(to_float(x_train[batch]), data.spec.pad, data.spec.flip) for batch in full)
    batches = (poison(x, y_train[batch], generators, **shares)[0] for x, batch in zip(inputs, full))
    # what the last weights reach with BatchNorm's statistics of 30 batches, not its moving average
    refreshed = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(batches, refreshed)
    metrics["asr_reestimated_bn"] = accuracy(refreshed, x_poisoned[counts], y_wanted[counts])
    metrics["cross_reestimated_bn"] = accuracy(refreshed, x_cross, data.y_test)

    # ===== A fixed set, for a defender who trains =====
    able = attack_targets(y_train, target, data.classes)[1].nonzero().flatten()
    order = torch.randperm(len(able), generator=torch.Generator().manual_seed(args.seed))
    chosen = able[order[: max(1, round(args.rate * len(x_train)))].to(device)]
    patterns, masks = triggers_of(x_train[chosen], generators)
    x_train[chosen] = to_uint8(blend(to_float(x_train[chosen]), patterns, masks))
    y_train[chosen] = attack_targets(y_train[chosen], target, data.classes)[0]
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True

    # ===== Save and report =====
    trigger = {f"pattern.{k}": value for k, value in pattern_generator.state_dict().items()}
    trigger |= {f"mask.{k}": value for k, value in mask_generator.state_dict().items()}
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
