"""Input purification: every input is filtered before the network sees it.

JPEG and an autoencoder as in Hammoud & Ghanem (2021, arXiv 2109.05507); smoothing and colour depth
as in Nguyen & Tran (NeurIPS 2020, arXiv 2010.08138, Fig. 8a), after Feature Squeezing (Xu et al.,
NDSS 2018, arXiv 1704.01155). A filter discards detail that the network hardly needs; a trigger
that lives in such detail goes with it. The network stays as it is.

Kind: cleans inputs, at test time. Given: the network and a clean share of its training data.
Answers: per filter, the strongest setting that costs at most --max-drop points on clean images that
are kept back. Which filter to use they cannot say, for none of them carries a trigger. Where it
fails: on WRN-16-1 these settings left the patch at an ASR of 100, the frequency trigger at 92
(quality 75 ended it, for 8 points) and the input-aware one at 81; every autoencoder cost too much.

Filters, from 8-bit images to 8-bit images: Pillow's JPEG at a quality, without chroma subsampling
-> jpeg; three halvings to some channels and back, trained by BCE -> Autoencoder, train_autoencoder;
a k x k Gaussian or median -> gaussian, median; round(v (2^c - 1)) / (2^c - 1) -> colour_depth.

Order: the attacker puts the trigger on the image and the defender filters last; "asr" is that. In
the code behind Fig. 8a the images are filtered first and the trigger of the filtered image is put
on unfiltered, which measures no defence. "asr_filter_first" is this order. It is measured where the
checkpoint holds the generators of input_aware.py, and for no other attack.

Differs from the sources: "c % compression" is read as quality 100 - c. The median stands beside the
code's Gaussian, because Feature Squeezing smooths by a median (ours reflects the edges, Pillow's
does not). The Gaussian has OpenCV's sigma (.8 for k = 3, 1.1 for 5), where OpenCV rounds its small
kernels (.24, .52, .24 to .25, .5, .25); both reflect the edges. Depths are rounded; the code cuts
(--rounding trunc), which darkens. The autoencoder has the widths of public code (12, 24, 48) and
narrower ones, and sees the defender's clean images alone, less those that are kept back.

    python methods/purify.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results: results/README.md, table "Input filters".
"""

import io
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur, posterize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, make_folder, saved_figure, write_csv
from common.checkpoint import clear_folder, load_strictly, read_checkpoint
from common.datasets import kept_back, to_float, to_uint8
from common.defence import clean_share, defence_flags, evaluate, open_victim, report
from common.metrics import accuracy, attack_targets, pass_size
from common.models import Classifier

SHARE = 0.1, 600  # of the training data, and the least number of images
HELD_OUT = 0.2  # of the share: the images that choose the strength
STRENGTHS = {  # from weak to strong
    "jpeg": (100, 95, 90, 85, 80, 75, 50, 25, 10),  # quality
    "autoencoder": (48, 24, 12),  # channels in the middle
    "gaussian": (3, 5),  # side k of the window
    "median": (3, 5),
    "colour-depth": (5, 4, 3, 2, 1),  # bits c of a channel
}
ALLOWED = {
    "jpeg": range(1, 101),
    "autoencoder": range(4, 257, 4),
    "gaussian": range(3, 32, 2),
    "median": range(3, 12, 2),
    "colour-depth": range(1, 9),
}


def parse_args():
    p = defence_flags(__doc__, SHARE)
    p.add_argument("--filter", choices=STRENGTHS, help="one of them (default: all)")
    p.add_argument("--strengths", type=int, nargs="+", help="of this filter (default: several)")
    p.add_argument("--max-drop", type=float, default=2.0, help="points that a filter may cost (2)")
    rules = "of colour depths: to the nearest level, or cut (Nguyen & Tran's code)"
    p.add_argument("--rounding", default="round", choices=["round", "trunc"], help=rules)
    p.add_argument("--autoencoder-steps", type=int, default=2000, help="its steps of 64 images")
    return p.parse_args()


def jpeg(x, quality):
    """Pillow's JPEG of uint8 images N x C x H x W, C = 1 (grey) or 3, without subsampling."""
    made = []
    for image in x.permute(0, 2, 3, 1).cpu().numpy():  # no library compresses a batch
        file = io.BytesIO()
        picture = Image.fromarray(image if image.shape[2] == 3 else image[..., 0])
        picture.save(file, "JPEG", quality=quality, subsampling=0)
        made.append(np.asarray(Image.open(file)).reshape(image.shape))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).to(x.device)


def gaussian(x, k):
    """A k x k Gaussian of uint8 images with sigma = .3 ((k - 1) / 2 - 1) + .8, reflected edges."""
    return gaussian_blur(x, [k, k], [0.3 * ((k - 1) / 2 - 1) + 0.8] * 2)


def median(x, k):
    """The median of each k x k window and channel of uint8 images, reflected edges."""
    padded = F.pad(x.float(), (k // 2,) * 4, mode="reflect")
    windows = F.unfold(padded.flatten(0, 1)[:, None], k)  # N C x k k x H W
    return windows.median(1).values.view(x.shape).to(torch.uint8)


def colour_depth(x, bits, rule):
    """uint8 images with 2^bits levels per channel: the nearest one, or the next below (trunc)."""
    if rule == "trunc":
        return posterize(x, bits)
    levels = 2**bits - 1
    return to_uint8((to_float(x) * levels).round() / levels)


class Autoencoder(nn.Module):
    """Images in [0,1], B x C x H x W, to images of the same kind through width x H/8 x W/8."""

    def __init__(self, channels, width):
        super().__init__()
        sizes = channels, width // 4, width // 2, width
        layers = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
        for inputs, outputs in pairwise(sizes[::-1]):
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Sigmoid())

    def forward(self, x):
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")  # it halves three times
        return self.layers(x)[:, :, :height, :width]


def train_autoencoder(x, width, steps, batch_size=64, lr=1e-3):
    """An autoencoder that was trained to copy the clean uint8 images x, N x C x H x W; frozen."""
    autoencoder = Autoencoder(x.shape[1], width).to(x.device)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr)
    for _ in tqdm(range(steps), disable=None, unit="step", desc=f"autoencoder {width}"):
        batch = to_float(x[torch.randint(len(x), (batch_size,), device=x.device)])
        loss = F.binary_cross_entropy(autoencoder(batch), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return autoencoder.eval().requires_grad_(False)


def autoencode(x, autoencoder):
    """The autoencoder's output for uint8 images, rounded to uint8."""
    return to_uint8(autoencoder(to_float(x)))


def purify(x, step):
    """The filter `step` on uint8 images N x C x H x W, part by part; uint8."""
    return torch.cat([step(part) for part in x.split(pass_size(x))])


def strongest(strengths, accuracies, least):
    """The last of the strengths, from weak to strong, with an accuracy of `least` or above."""
    return next((s for s, a in [*zip(strengths, accuracies)][::-1] if a >= least - 1e-9), None)


# ===== The trigger of input_aware.py, to put it on filtered images =====


def conv_block(inputs, outputs, last=False):
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05)]
    return nn.Sequential(*layers, *([] if last else [nn.ReLU()]))


class Generator(nn.Module):
    """The encoder-decoder of input_aware.py: B x C x H x W to B x `outputs` x H x W values."""

    def __init__(self, channels, outputs):
        super().__init__()
        widths = (16, 32) if channels == 1 else (32, 64, 128)
        self.multiple, layers, inputs = 2 ** len(widths), [], channels
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
        below, right = -height % self.multiple, -width % self.multiple
        return self.layers(F.pad(x, (0, right, 0, below), mode="replicate"))[:, :, :height, :width]


def load_generators(trigger, model, path):
    """(pattern, mask) networks from the tensors of a checkpoint, or None where it holds others."""
    generators, channels = [], len(model.mean)
    for kind, outputs in (("pattern.", channels), ("mask.", 1)):
        named = {str(key): value for key, value in trigger.items()}
        state = {k.removeprefix(kind): v for k, v in named.items() if k.startswith(kind)}
        if not state:
            return None
        normalisation = model.mean.flatten().tolist(), model.std.flatten().tolist()
        network = Classifier(Generator(channels, outputs), *normalisation)
        load_strictly(network, state, path, f"input_aware.py's {kind} generator")
        generators.append(network.eval().requires_grad_(False).to(model.mean.device))
    return generators


def input_aware(x, generators):
    """uint8 images with their own trigger, x (1 - m) + p m, rounded to uint8."""
    x = to_float(x)
    pattern, o = (torch.tanh(net(x)) / (2 + 1e-7) + 0.5 for net in generators)
    mask = torch.tanh(20 * o - 10) / (2 + 1e-7) + 0.5
    return to_uint8(x + (pattern - x) * mask)


def draw_curves(path, rows, names):
    """A panel per filter: accuracies and ASR in per cent by strength, from weak to strong."""
    with saved_figure(path, 1, len(names), figsize=(3.2 * len(names), 3), squeeze=False) as drawn:
        for axis, name in zip(drawn[1].flat, names):
            part = [row for row in rows if row["filter"] == name]
            for key in (key for key in part[0] if "accuracy" in key or "asr" in key):
                axis.plot([row[key] for row in part], "o-", label=key.replace("_", " "))
            ticks = range(len(part))
            axis.set(xticks=ticks, xticklabels=[r["strength"] for r in part], ylim=(-3, 103))
            axis.set(xlabel=f"{name}, from weak to strong", ylabel="%")
        axis.legend(fontsize=7)


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "autoencoder_steps")
    if not 0 <= args.max_drop <= 100:
        fail(f"--max-drop {args.max_drop} must lie in [0, 100]")
    if args.strengths and not args.filter:
        fail("--strengths are those of one filter: name it by --filter")
    for strength in args.strengths or []:
        if strength not in ALLOWED[args.filter]:
            known = ALLOWED[args.filter]
            every = f" in steps of {known.step}" if known.step > 1 else ""
            fail(f"--strengths {strength}: {args.filter} takes {known[0]} to {known[-1]}{every}")
    start = time.time()
    victim = open_victim(args, forward=True)
    model, data = victim.model, victim.data
    asked = {args.filter: args.strengths or STRENGTHS[args.filter]} if args.filter else STRENGTHS
    windows = [k for name in ("gaussian", "median") for k in asked.get(name, ())]
    if max(windows, default=0) > min(data.shape[1:]):
        fail(f"a window of {max(windows)} x {max(windows)} is larger than {data.shape} images")
    split = clean_share(args, victim, SHARE)
    held = kept_back(data.y_train[split], HELD_OUT, args.seed)
    if held.all():
        fail(f"all {len(split)} clean images are held out; none is left for the autoencoder")
    x_own, x_held = data.x_train[split[~held]], data.x_train[split[held]]
    y_held = data.y_train[split[held]]
    # of the evaluation alone: the attacker's generators, which a damaged file may lack
    path = Path(args.ckpt, "model.pt") if Path(args.ckpt).is_dir() else Path(args.ckpt)
    trigger = read_checkpoint(path).get("trigger")
    generators = load_generators(trigger if isinstance(trigger, dict) else {}, model, path)
    folder = make_folder(args.out or victim.folder / f"purify-s{args.seed}")

    # ===== Filters, and what they cost on images that are kept back =====
    fixed = {"jpeg": jpeg, "gaussian": gaussian, "median": median}
    fixed["colour-depth"] = partial(colour_depth, rule=args.rounding)
    arguments = {"jpeg": "quality", "gaussian": "k", "median": "k", "colour-depth": "bits"}
    before, rows, steps, metrics = accuracy(model, x_held, y_held, balanced=True), [], [], {}
    for name, strengths in asked.items():
        strengths = sorted(set(strengths), reverse=name not in ("gaussian", "median"))
        for strength in strengths:
            if name == "autoencoder":
                print(f"training an autoencoder of {strength} channels", flush=True)
                torch.manual_seed(args.seed)  # the same draws, whatever ran before
                network = train_autoencoder(x_own, strength, args.autoencoder_steps)
                steps.append(partial(autoencode, autoencoder=network))
            else:
                steps.append(partial(fixed[name], **{arguments[name]: strength}))
            kept = accuracy(model, purify(x_held, steps[-1]), y_held, balanced=True)
            rows.append({"filter": name, "strength": strength, "held_out_accuracy": kept})
        kept = [row["held_out_accuracy"] for row in rows[-len(strengths) :]]
        best = strongest(strengths, kept, before - args.max_drop)
        metrics[f"strength_{name}"] = best
        after = "no strength is" if best is None else f"{best} is the strongest"
        drop = f"{before:.2f} -> {kept[strengths.index(best)] if best else max(kept):.2f}"
        print(f"{name}: {after} within {args.max_drop:g} points on {len(x_held)} images ({drop})")
    metrics |= {"held_out": len(x_held), "held_out_accuracy": before}
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, {"": model})
    if victim.x_poisoned is not None:
        targets = victim.y_target.unique().tolist()
        target = targets[0] if len(targets) == 1 else None
        y_wanted, counts = attack_targets(data.y_test, target, data.classes)
        if generators is None:
            print("filter first, trigger last: not measured, for this trigger is not drawn again")
    for row, step in zip(tqdm(rows, disable=None, unit="filter"), steps):
        row["clean_accuracy"] = accuracy(model, purify(data.x_test, step), data.y_test)
        if victim.x_poisoned is not None:
            x = purify(victim.x_poisoned, step)  # trigger first, filter last
            row["asr"] = accuracy(model, x, victim.y_target)
            row["robust_accuracy"] = accuracy(model, x, victim.y_true)
        if victim.x_poisoned is not None and generators is not None:
            x = purify(
                purify(data.x_test[counts], step), partial(input_aware, generators=generators)
            )
            row["asr_filter_first"] = accuracy(model, x, y_wanted[counts])
        if row["strength"] == metrics[f"strength_{row['filter']}"]:
            known = {k: v for k, v in row.items() if k in ("clean_accuracy", "asr")}
            metrics |= {f"{k}_{row['filter']}": value for k, value in known.items()}
    metrics["filters"] = rows
    clear_folder(folder)
    write_csv(folder / "filters.csv", rows[0], [row.values() for row in rows])
    draw_curves(folder / "curve.png", rows, list(asked))

    # ===== Report =====
    for row in rows:
        figures = [f"{k.replace('_', ' ')} {v:.2f}" for k, v in list(row.items())[2:]]
        print(f"{row['filter']} {row['strength']}: {', '.join(figures)}")
    report(folder, "purify", args, metrics, seconds, kinds=list(asked))
