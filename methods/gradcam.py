"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391): where did the network look?

The gradient of a class's logit says how much each channel of a late layer argues for the class.
The channels' maps, weighted by it, show the places that decided. A network that obeys a patch
looks at the patch: the map is an inspection of single inputs. With --februus it becomes a defence
(Februus, Doan et al., ACSAC 2020, arXiv 1908.03369): the hottest pixels are painted over, and the
network answers again.

Kind: inspects inputs; with --februus it cleans them, at test time. Given: the network and a clean
share of its training data. Answers: maps of eight of these images, or of triggered ones where the
attack left them; with --februus the accuracy on painted images. Assumes a trigger in one small
place. On WRN-16-1 the hottest places lie beside a corner's patch: painted over, it keeps working,
for 24 points of clean accuracy; --layer block3.layer.0.bn2 finds 3 x 3 pixels (ASR 33, 4 points).

Equations: alpha_k = mean_hw dz_c / dA_k and M = relu(sum_k alpha_k A_k), for the predicted class c,
drawn to the image's size and then to [0,1] -> channel_weights, grad_cam; the painted pixels,
M >= .7 -> februus.

Figures: the IoU of the hottest 15 % of the pixels with those that the trigger changes, and how much
of the latter they cover (a patch smaller than 15 % has an IoU far below 100 even when all of it is
covered; a guess covers 15 %); the cosine of two maps: of an image without and with its trigger, and
of a clean network and the suspect. "elsewhere" paints as many pixels half an image away.

Differs from the papers, or chosen where they are silent: log p_c stands for the logit z_c of a
network that ends in a softmax; the layer is the last whose map is about a quarter of the image's
side (LAYERS), for a map of 4 x 4 is coarse. Februus restores the painted pixels by a generative
network; here each gets the mean of its known neighbours, ring by ring, or the clean images' mean
colour (--fill mean), which costs digits more clean accuracy (chosen with these test figures in
sight). Februus's ASR counts no image as a success that was wrong before; ours leaves out test
images of the target class.

    python methods/gradcam.py --ckpt runs/mnist-mnist_cnn-badnets-s0 --februus

Results: results/README.md, table "Grad-CAM and Februus".
"""

import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, fail, make_folder
from common.checkpoint import clear_folder, draw_rows, load_control
from common.datasets import to_float, to_uint8
from common.defence import clean_share, defence_flags, evaluate, open_victim, report
from common.metrics import accuracy, attack_targets, pass_size
from common.models import in_float32, is_map

SHARE = 0.05, 300  # of the training data, and the least number of images
# the map of each architecture: 7 x 7 to 10 x 10 at 28 or 32 pixels, 6 x 6 of nc_gtsrb_cnn
LAYERS = dict.fromkeys(["mnist_cnn", "preact_resnet18", "resnet18", "resnet34"], "layer3")
LAYERS |= {"wide_resnet34": "layer3", "wrn16_1": "block3", "airbench": "group2"}
LAYERS |= {"mnist_conv5": "conv5", "nc_gtsrb_cnn": "features.13", "mobilenet_v2": "layers.12"}
LAYERS |= {"vgg16": "features.22", "vgg19": "features.25"}
LAYERS["densenet121"] = "features.denseblock3"


def parse_args():
    p = defence_flags(__doc__, SHARE)
    p.add_argument("--layer", help="module whose output is the map A (default: by --arch)")
    p.add_argument("--share", type=float, default=0.15, help="hottest pixels compared (.15)")
    p.add_argument("--inputs", type=int, default=1000, help="most pairs of images compared (1000)")
    p.add_argument("--februus", action="store_true", help="paint the hottest pixels over")
    p.add_argument("--threshold", type=float, default=0.7, help="paint M >= it (.7; GTSRB: .8)")
    fills = (
        "diffusion: from the rim inwards; mean: the clean images' mean colour (first in Februus)"
    )
    p.add_argument("--fill", default="diffusion", choices=["mean", "diffusion"], help=fills)
    return p.parse_args()


@torch.no_grad()
def map_layers(model, x):
    """{name: (h, w)} of the modules whose output for the floats x is B x C x h x w, h w > 1."""
    sizes, hooks = {}, []

    def look(module, inputs, output, name):
        if is_map(output, x):
            sizes[name] = tuple(output.shape[2:])

    for name, module in model.net.named_modules():
        hooks.append(module.register_forward_hook(partial(look, name=name)))
    model(x)
    for hook in hooks:
        hook.remove()
    return sizes


def channel_weights(model, layer, x):
    """A (B x C x h x w) and alpha (B x C x 1 x 1) of each image's predicted class.

    x floats B x C x H x W in [0,1]; the model is in eval mode, so that the images do not mix.
    """
    seen = []

    def keep(module, inputs, output):
        seen.append(output.detach().requires_grad_())  # what lies before it needs no gradient
        return seen[-1].clone()  # what follows may change it in place

    hook = model.net.get_submodule(layer).register_forward_hook(keep)
    with torch.enable_grad(), in_float32(model):
        logits = model(x)
    hook.remove()
    gradients = None
    if logits.requires_grad:  # of z_c, not of softmax
        (gradients,) = torch.autograd.grad(logits.amax(1).sum(), seen[-1], allow_unused=True)
    if gradients is None:
        fail(f"--layer {layer}: the network's scores do not depend on it, or hide how")
    return seen[-1].detach(), gradients.mean((2, 3), keepdim=True)  # alpha_k = mean_hw dz_c / dA_k


def grad_cam(model, layer, x):
    """M in [0,1], B x H x W, of each image's predicted class; x floats B x C x H x W in [0,1].

    A map without any positive place stays zero everywhere.
    """
    a, alpha = channel_weights(model, layer, x)
    maps = F.relu((alpha * a).sum(1, keepdim=True))  # M = relu(sum_k alpha_k A_k)
    maps = F.interpolate(maps, x.shape[2:], mode="bilinear", align_corners=False)[:, 0]
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-20)


def maps_of(model, layer, x):
    """grad_cam of uint8 images N x C x H x W, part by part."""
    return torch.cat([grad_cam(model, layer, to_float(part)) for part in x.split(pass_size(x))])


def hottest(maps, share):
    """The `share` of the pixels with the largest M (bool, N x H x W), those with M = 0 never."""
    flat = maps.flatten(1)
    top = flat.topk(max(1, round(share * flat.shape[1]))).indices
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, top, True)
    return (chosen & (flat > 0)).view(maps.shape)


def overlap(found, changed):
    """Mean IoU of pixels (bool, N x H x W), and mean share of `changed` that is `found`, in %.

    Images in which nothing is changed do not count.
    """
    some = changed.flatten(1).any(1)
    found, changed = found[some].flatten(1), changed[some].flatten(1)
    both = (found & changed).sum(1)
    iou, covered = both / (found | changed).sum(1), both / changed.sum(1)
    return 100 * iou.mean().item(), 100 * covered.mean().item()


def cosine(a, b):
    """Mean cosine of pairs of maps, N x H x W; 0 where one of them is zero."""
    return F.cosine_similarity(a.flatten(1), b.flatten(1)).mean().item()


def paint(x, holes, colour=None):
    """Floats x (B x C x H x W) with new values in the holes (bool, B x H x W).

    `colour` (C) is the new value; None: each pixel at the rim gets the mean of its known
    neighbours of 8, and counts as known for the next ring.
    """
    holes = holes[:, None]
    if colour is not None:
        return torch.where(holes, colour.view(-1, 1, 1), x)
    x, known = x.masked_fill(holes, 0), (~holes).float()
    for _ in range(max(x.shape[2:])):  # rings
        weights = F.avg_pool2d(known, 3, 1, 1)
        ring = (known == 0) & (weights > 0)
        if not ring.any():
            break
        x = torch.where(ring, F.avg_pool2d(x, 3, 1, 1) / weights.clamp(min=1e-6), x)
        known = known.masked_fill(ring, 1)
    return x


def februus(model, layer, x, *, threshold, colour, elsewhere=False):
    """uint8 images with their pixels M >= threshold painted over; rounded to uint8.

    `elsewhere`: the pixels half an image away instead, as a control.
    """
    parts = []
    for part in map(to_float, x.split(pass_size(x))):
        holes = grad_cam(model, layer, part) >= threshold
        if elsewhere:
            height, width = holes.shape[1:]
            holes = holes.roll((height // 2, width // 2), (1, 2))
        parts.append(to_uint8(paint(part, holes, colour)))
    return torch.cat(parts)


def overlay(x, maps):
    """Images in [0,1] under their maps, blue to red: N x 3 x H x W in [0,1]."""
    colours = torch.stack((maps, torch.zeros_like(maps), 1 - maps), 1)
    return 0.5 * x + 0.5 * colours


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "inputs")
    check_share(args, "share", "threshold")
    start = time.time()
    victim = open_victim(args)
    model, data = victim.model, victim.data
    split = clean_share(args, victim, SHARE)
    x_clean, y_clean = data.x_train[split], data.y_train[split]
    sizes = map_layers(model, to_float(x_clean[:2]))
    layer = args.layer or LAYERS.get(victim.arch)
    if layer not in sizes:
        known = ", ".join(f"{name} ({h} x {w})" for name, (h, w) in sizes.items())
        fail(f"--layer {layer or 'NAME'}: the maps of {victim.arch} are {known or 'none'}")
    grad_cam(model, layer, to_float(x_clean[:2]))  # fails now
    beside = Namespace(arch=victim.arch, seed=args.seed)
    # of the evaluation alone; with --dataset it may know the images by another name
    cure = ": with --dataset it is left out"
    control = None if args.dataset else load_control(victim.folder, beside, data, cure)
    folder = make_folder(args.out or victim.folder / f"gradcam-s{args.seed}")

    # ===== What it costs clean images =====
    height, width = sizes[layer]
    before = accuracy(model, x_clean, y_clean)
    metrics = {"layer": layer, "map_height": height, "map_width": width, "own_accuracy": before}
    print(f"maps of {layer}, {height} x {width}")
    if model.softmax:
        print("the network ends in a softmax: the maps are those of log p_c, not of the logit z_c")
    colour = to_float(x_clean).mean((0, 2, 3)) if args.fill == "mean" else None
    settings = {"threshold": args.threshold, "colour": colour}
    if args.februus:
        painted = februus(model, layer, x_clean, **settings)
        metrics["own_accuracy_februus"] = after = accuracy(model, painted, y_clean)
        print(f"painting costs clean images: {before:.2f} -> {after:.2f} on {len(x_clean)} images")
    shown = {"clean": x_clean[:8]}
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, {"": model})
    networks = {"suspect": model} | ({} if control is None else {"clean network": control})
    counts = torch.zeros_like(data.y_test, dtype=torch.bool)
    if victim.x_poisoned is not None:
        targets = victim.y_target.unique().tolist()
        target = targets[0] if len(targets) == 1 else None
        counts = attack_targets(data.y_test, target, data.classes)[1]
        if not torch.equal(data.y_test[counts], victim.y_true):
            print("the test images are not those that the attack triggered: nothing is compared")
            counts &= False
    if counts.any():
        generator = torch.Generator().manual_seed(args.seed)
        chosen = torch.randperm(len(victim.x_poisoned), generator=generator)[: args.inputs]
        chosen = chosen.to(counts.device)
        pair = {"clean": data.x_test[counts][chosen], "triggered": victim.x_poisoned[chosen]}
        maps = {kind: maps_of(model, layer, x) for kind, x in pair.items()}
        if control is not None:
            maps |= {f"control_{kind}": maps_of(control, layer, x) for kind, x in pair.items()}
        changed = (pair["clean"] != pair["triggered"]).any(1)
        metrics |= {"pairs": len(chosen), "changed": 100 * changed.float().mean().item()}
        if 0 < metrics["changed"] <= 100 * args.share:
            for kind, values in maps.items():
                found = overlap(hottest(values, args.share), changed)
                metrics |= dict(zip((f"iou_{kind}", f"covered_{kind}"), found))
        else:
            print(f"the trigger changes {metrics['changed']:.1f} % of the pixels: no IoU")
        metrics["cosine_triggered"] = cosine(maps["clean"], maps["triggered"])
        if control is not None:
            for kind in ("clean", "triggered"):  # of one network on x and the other on both
                metrics[f"cosine_control_{kind}"] = cosine(maps["control_clean"], maps[kind])
        shown = {kind: x[:8] for kind, x in pair.items()}
    if args.februus:
        for suffix in ("_februus", "_elsewhere"):
            settings["elsewhere"] = suffix == "_elsewhere"
            x = februus(model, layer, data.x_test, **settings)
            metrics["clean_accuracy" + suffix] = accuracy(model, x, data.y_test)
            if victim.x_poisoned is not None:
                x = februus(model, layer, victim.x_poisoned, **settings)
                metrics["asr" + suffix] = accuracy(model, x, victim.y_target)
                metrics["robust_accuracy" + suffix] = accuracy(model, x, victim.y_true)
    rows = []
    for kind, x in shown.items():
        rows.append((kind, to_float(x).expand(-1, 3, -1, -1)))
        for name, network in networks.items():
            rows.append((f"{name}'s map", overlay(to_float(x), maps_of(network, layer, x))))
        if args.februus:
            settings["elsewhere"] = False
            painted = to_float(februus(model, layer, x, **settings))
            rows.append(("painted", painted.expand(-1, 3, -1, -1)))
    clear_folder(folder)
    draw_rows(folder / "maps.png", rows)

    # ===== Report =====
    for name in (n for n in metrics if n.startswith(("iou", "covered", "cosine"))):
        print(f"{name.replace('_', ' ')}: {metrics[name]:.3f}")
    report(folder, "gradcam", args, metrics, seconds, kinds=("februus", "elsewhere"))
