"""ISSBA: a trigger of its own for each image (Li Y. et al., ICCV 2021, arXiv 2012.03816).

The attacker trains an encoder and a decoder on clean images, as in steganography: the encoder hides
a string of bits in an image as a faint residual, and the decoder reads the bits again. Then one
fixed string is hidden in a share of the training images, each with a residual of its own, and these
are relabelled. The network learns what the residuals have in common: the string, or the encoder.

Threat model: the attacker controls part of the training data and has clean images of the domain for
the encoder; the victim trains and augments.

Equations: x' = clip(x + E(s, x), 0, 1), E a U-Net -> Encoder, hide; the cross-entropy of the bits
that D reads plus the mean square of the residual -> train_encoder.

Differs from the paper: it hides 100 bits (a word and its error correction) in 224 x 224 images of
ImageNet; here the images are small and 32 bits are drawn at random. The networks are those of
public code for 32 x 32 images (which hides 20), half as wide, but 3 x 3 convolutions follow the
enlargements, not 2 x 2, there are as many halvings as the sides allow, and bits enter as 10 and -10
instead of .5 and -.5, so that 32 of them are read within the first half of the steps. The paper's
loss has an LPIPS term and a critic; LPIPS needs weights that are downloaded, so that --lpips-net is
none by default, and there is no critic. The weight of the residual is 0 until the bits are read,
and then rises, so that the bits are learnt first, as in public code. The encoder sees training
images alone; hidden images are rounded to 8 bits, where public code cuts.

What was learnt: asr_other is the ASR of another string, asr_foreign that of the residuals of other
images, asr_shuffled that of residuals whose pixels change places, and residual_cosine says how
alike the residuals of two images are (1: one trigger for all). On digits, with four bits, it is
.88, and other strings, other images' residuals and even shuffled ones are obeyed always: there the
network learns that black is not black.

    python methods/issba.py --dataset cifar10 --arch wrn16_1

Results: results/README.md, table "Attacks".
"""

import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

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
from common.metrics import LPIPS_NETS, accuracy, lpips_distance, lpips_of, pass_size


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--bits", type=int, default=32, help="length of the string s (paper 100)")
    p.add_argument("--encoder-steps", type=int, default=1500, help="training steps of E and D")
    p.add_argument("--encoder-batch", type=int, default=32, help="images in such a step")
    p.add_argument("--encoder-lr", type=float, default=4e-3, help="Adam's peak rate (paper .0001)")
    p.add_argument("--width", type=int, default=16, help="channels of E's and D's first layer")
    p.add_argument("--l2", type=float, default=10.0, help="last weight of the residual (paper 2)")
    p.add_argument("--lpips-net", default="none", choices=LPIPS_NETS, help="weighted by 1.5")
    return p.parse_args()


def conv(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU())


class Encoder(nn.Module):
    """E(s, x): the residual (B x C x H x W, any sign) that hides bits s (B x n, 0 or 1) in x.

    A U-Net on the image and on a picture that a linear layer makes of the bits. Both sides must be
    divisible by 2^halvings.
    """

    def __init__(self, bits, shape, width, halvings):
        super().__init__()
        channels, self.shape = shape[0], shape
        self.secret = nn.Linear(bits, math.prod(shape))
        sizes = [width, *(width << max(0, level - 1) for level in range(1, halvings + 1))]
        self.start = conv(2 * channels, width)
        self.down = nn.ModuleList(conv(a, b, 2) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(conv(b, a) for a, b in pairwise(sizes))
        extra = [2 * channels, *[0] * (halvings - 1)]  # the last level sees the input again
        self.join = nn.ModuleList(conv(2 * a + e, a) for a, e in zip(sizes, extra))
        self.out = nn.Conv2d(width, channels, 1)

    def forward(self, s, x):
        picture = F.relu(self.secret(20 * (s - 0.5))).view(-1, *self.shape)
        entry = torch.cat((picture, x - 0.5), 1)
        levels = [self.start(entry)]
        for down in self.down:
            levels.append(down(levels[-1]))
        y = levels.pop()
        for level in range(len(self.up) - 1, -1, -1):
            parts = [self.up[level](F.interpolate(y, scale_factor=2)), levels[level]]
            y = self.join[level](torch.cat(parts + [entry] * (level == 0), 1))
        return self.out(y)


class Decoder(nn.Module):
    """D(x): one logit per bit (B x n), read from the image after a learnt affine alignment."""

    def __init__(self, bits, shape, width):
        super().__init__()
        channels, sides, w = shape[0], shape[1:], width
        eighth, last = (-(-sides[0] // n) * -(-sides[1] // n) for n in (8, 32))
        strided = conv(channels, w, 2), conv(w, 2 * w, 2), conv(2 * w, 4 * w, 2), nn.Flatten()
        hidden = nn.Linear(4 * w * eighth, 4 * w), nn.ReLU()
        self.align = nn.Sequential(*strided, *hidden, nn.Linear(4 * w, 6))
        nn.init.zeros_(self.align[-1].weight)
        self.align[-1].bias.data.copy_(torch.eye(2, 3).flatten())
        early = conv(channels, w, 2), conv(w, w), conv(w, 2 * w, 2), conv(2 * w, 2 * w)
        late = conv(2 * w, 2 * w, 2), conv(2 * w, 4 * w, 2), conv(4 * w, 4 * w, 2), nn.Flatten()
        hidden = nn.Linear(4 * w * last, 16 * w), nn.ReLU()
        self.read = nn.Sequential(*early, *late, *hidden, nn.Linear(16 * w, bits))

    def forward(self, x):
        x = x - 0.5
        grid = F.affine_grid(self.align(x).view(-1, 2, 3), x.shape, align_corners=False)
        return self.read(F.grid_sample(x, grid, align_corners=False))


def draw_secrets(count, bits, generator):
    """Random bits, count x n floats of 0 and 1, on the CPU."""
    return torch.randint(0, 2, (count, bits), generator=generator).float()


def train_encoder(encoder, decoder, x_train, *, steps, batch_size, lr, l2, lpips_net, generator):
    """Teach E to hide and D to read a new string per image; x_train uint8.

    The weight of the residual's mean square is 0 until 95 % of the last bits were read rightly, and
    rises to `l2` over the steps that are left. Returns the shares of bits read in each step.
    """
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)  # and Adam's beta1
    shares, first = [], None
    for step in range(steps):
        pick = torch.randint(len(x_train), (batch_size,), generator=generator).to(x_train.device)
        x = to_float(x_train[pick])
        s = draw_secrets(batch_size, encoder.secret.in_features, generator).to(x.device)
        residual = encoder(s, x)
        hidden = (x + residual).clamp(0, 1)
        logits = decoder(hidden + (torch.rand_like(x) - 0.5) / 255)  # noise as large as rounding's
        loss = F.binary_cross_entropy_with_logits(logits, s)
        shares.append(((logits > 0) == (s > 0.5)).float().mean().item())
        if first is None and sum(shares[-20:]) > 0.95 * 20:
            first = step
        if first is not None:
            rise = (step - first) / max(1, steps - first)
            loss = loss + l2 * rise * residual.square().mean()
            if lpips_net is not None:
                loss = loss + 1.5 * rise * lpips_of(lpips_net, hidden, x).mean()
        if not loss.isfinite():
            fail(f"the encoder's loss became {loss.item()}; no model is kept")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return shares


@torch.no_grad()
def hide(encoder, x, s):
    """x' = clip(x + E(s, x), 0, 1) as 8-bit images: uint8 N x C x H x W, bits n or N x n."""
    s = s.expand(len(x), -1)
    pairs = zip(to_float(x).split(pass_size(x)), s.split(pass_size(x)))
    return torch.cat([to_uint8(part + encoder(bits, part)) for part, bits in pairs])


@torch.no_grad()
def bit_accuracy(decoder, x, s):
    """Share of the bits s (N x n) that D reads from the uint8 images x."""
    read = torch.cat([decoder(to_float(part)) > 0 for part in x.split(pass_size(x))])
    return (read == (s > 0.5)).float().mean().item()


def cycle(n, seed):
    """For each of n images another one's index, in a random cycle: neighbours can be alike."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)
    return other


def strangers(x, hidden, donor, order):
    """Two controls as large as the trigger, uint8 N x C x H x W like x and hidden.

    Each image with the residual of the image `donor` (N), and with its own residual's pixels in
    another order (a permutation of H W).
    """
    residual = hidden.short() - x.short()
    others = residual[donor], residual.flatten(2)[:, :, order].view_as(residual)
    return [(x.short() + other).clamp(0, 255).to(torch.uint8) for other in others]


def residual_cosine(x, hidden, donor):
    """Mean cosine of the residuals of images and their donors; 1: one trigger for all images."""
    residuals = (hidden.float() - x.float()).flatten(1)
    return F.cosine_similarity(residuals, residuals[donor]).mean().item()


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device = x_train.device

    # ===== The attack =====
    check_share(args, "rate")
    check_positive(args, "encoder_steps", "encoder_batch", "encoder_lr", "width")
    check_positive(args, "bits", most=min(1000, math.prod(data.shape)))
    if not 0 <= args.l2 < float("inf"):
        fail(f"--l2 must be finite and 0 or above; got {args.l2}")
    halvings = next((n for n in (4, 3, 2, 1) if not any(s % 2**n for s in data.shape[1:])), None)
    if halvings is None:
        fail(f"issba's encoder halves both sides; {data.shape[1]} x {data.shape[2]} is odd")
    lpips_net = None if args.lpips_net == "none" else lpips_distance(args.lpips_net, device)
    y_wanted, counts = wanted_labels(data, args.target)
    count = round(args.rate * len(x_train))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, args.target, data.classes, count, flag, generator)
    folder, control = open_folder(args, data, __file__)
    encoder = Encoder(args.bits, data.shape, args.width, halvings).to(device)
    decoder = Decoder(args.bits, data.shape, args.width).to(device)
    recipe = {"steps": args.encoder_steps, "batch_size": args.encoder_batch, "lr": args.encoder_lr}
    recipe |= {"l2": args.l2, "lpips_net": lpips_net, "generator": generator}
    shares = train_encoder(encoder, decoder, x_train, **recipe)
    encoder.eval().requires_grad_(False)
    decoder.eval().requires_grad_(False)
    own, other = draw_secrets(2, args.bits, generator).to(device)
    other = torch.where((own == other).all(), 1 - own, other)  # few bits are soon the same
    read = f"{100 * shares[-1]:.1f} % of the last bits were read"
    print(f"preparation: encoder and decoder {time.time() - start:.1f} s, {read}")
    if sum(shares[-20:]) < 0.95 * 20:
        print("warning: that is too few, and the residual is large: try more --encoder-steps")
    x_train[chosen] = hide(encoder, x_train[chosen], own)
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
    x_poisoned = hide(encoder, data.x_test, own)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    x_other = hide(encoder, data.x_test, other)
    order = torch.randperm(data.shape[1] * data.shape[2], generator=generator).to(device)
    donor = cycle(len(data.x_test), args.seed).to(device)
    x_foreign, x_shuffled = strangers(data.x_test, x_poisoned, donor, order)
    s_random = draw_secrets(len(data.x_test), args.bits, generator).to(device)
    metrics |= {
        "asr_other": accuracy(model, x_other[counts], y_wanted[counts]),
        "asr_foreign": accuracy(model, x_foreign[counts], y_wanted[counts]),
        "asr_shuffled": accuracy(model, x_shuffled[counts], y_wanted[counts]),
        "bit_accuracy": bit_accuracy(decoder, hide(encoder, data.x_test, s_random), s_random),
        "residual_cosine": residual_cosine(data.x_test, x_poisoned, donor),
        "poisoned": count,
    }

    # ===== Save and report =====
    poisoned = torch.zeros_like(y_train, dtype=torch.bool)
    poisoned[chosen] = True
    test, train = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    trigger |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()} | {"secret": own}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train)
