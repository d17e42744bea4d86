"""SentiNet (Chou, Tramèr & Pellegrino, IEEE SPW 2020, arXiv 1812.00292): cut out what decided.

Grad-CAM marks the pixels of an input that decided its label. They are pasted on clean images. The
object of an innocent image convinces few of them, and it hides something: the network becomes
unsure when noise is pasted in the same place. A trigger convinces nearly all images, and noise in
its few pixels disturbs nobody.

Kind: detects inputs, at test time. Given: the network and a clean share of its training data (the
labels show that it is read right). Answers: for an input, does it carry a trigger. Assumes one in a
small place that works on every image. Its true place is never used. Of a network that ends in a
softmax the maps are those of log p, which say little where p is 1. Where it fails: on triggers
without a place, such as WaNet's (82 % of those that WRN-16-1 obeys pass).

Steps of the paper: labels that the input might have instead -> proposals; the pixels that speak for
the label and for none of the proposals -> class_maps, salient; the share of N clean images that get
the label with these pixels pasted in, and the mean confidence with an inert pattern there ->
fooled_and_confidence; the upper edge of the clean points, a quadratic -> envelope, fit_curve; the
distance from it, positive above -> signed_distance; an input is flagged beyond a threshold.

Differs from the paper, or chosen where it is silent: selective search proposes the labels there,
the network's next likely labels (--proposals) do here. Salient are the 15 % of the pixels with the
largest Grad-CAM difference, always so many, as in public code, which, however, takes the true
trigger's place for patch attacks. The inert pattern is uniform noise. The edge goes through the
largest fooled share of each .02 of confidence and is level outside them. The threshold is the
quantile of the clean points' distances that flags --fpr of new ones. Images that fit the edge are
not pasted on. FRR (clean inputs flagged) and FAR (triggered inputs passed) are read on test images.

    python methods/sentinet.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results: results/README.md, table "SentiNet".
"""

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    check_positive,
    check_share,
    fail,
    make_folder,
    saved_figure,
    write_csv,
    written_whole,
)
from common.checkpoint import clear_folder
from common.datasets import load_pictures, to_float
from common.defence import clean_share, defence_flags, open_victim, report
from common.metrics import accuracy, pass_size, predict
from common.models import in_float32, is_map

SHARE = 0.1, 500  # of the training data, and the least number of images
FEWEST = 20  # images that a boundary can be fitted to
BIN = 0.02  # of the confidence, in which the envelope takes the largest fooled share
# the map of each architecture: 7 x 7 to 10 x 10 at 28 or 32 pixels, 6 x 6 of nc_gtsrb_cnn
LAYERS = dict.fromkeys(["mnist_cnn", "preact_resnet18", "resnet18", "resnet34"], "layer3")
LAYERS |= {"wide_resnet34": "layer3", "wrn16_1": "block3", "airbench": "group2"}
LAYERS |= {"mnist_conv5": "conv5", "nc_gtsrb_cnn": "features.13", "mobilenet_v2": "layers.12"}
LAYERS |= {"vgg16": "features.22", "vgg19": "features.25"}
LAYERS["densenet121"] = "features.denseblock3"


def parse_args():
    p = defence_flags(__doc__, SHARE)
    p.add_argument("--layer", help="module whose output is Grad-CAM's map (default: by --arch)")
    p.add_argument("--share", type=float, default=0.15, help="salient share of the pixels (.15)")
    p.add_argument("--proposals", type=int, default=2, help="other labels that the input may have")
    p.add_argument("--overlays", type=int, default=100, help="N, clean images pasted on (100)")
    p.add_argument("--fit-images", type=int, help="fit the boundary (all others, at most 400)")
    p.add_argument("--fpr", type=float, default=0.05, help="clean inputs to flag (public code .05)")
    p.add_argument("--inputs", type=int, default=500, help="most clean, triggered inputs (500)")
    p.add_argument("--batch-size", type=int, help="pasted images a pass (GPU 2000, CPU 200)")
    p.add_argument("--suspects", help="inputs to judge: an .npz with x, or a folder of pictures")
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


def proposals(logits, count):
    """The predicted label and the `count` next likely ones: B x K logits to B x (1 + count)."""
    return logits.topk(min(1 + count, logits.shape[1])).indices


def class_maps(model, layer, x, count):
    """Grad-CAM of the predicted label and of the proposals, B x (1 + count) x h x w, 0 or above.

    x floats B x C x H x W in [0,1]; the model is in eval mode, so that the images do not mix.
    """
    seen, maps = [], []

    def keep(module, inputs, output):
        seen.append(output.detach().requires_grad_())  # what lies before it needs no gradient
        return seen[-1].clone()  # what follows may change it in place

    hook = model.net.get_submodule(layer).register_forward_hook(keep)
    with torch.enable_grad(), in_float32(model):
        logits = model(x)
    hook.remove()
    labels = proposals(logits, count)
    for label in labels.T:
        score, gradients = logits.gather(1, label[:, None]).sum(), None
        if score.requires_grad:
            grads = torch.autograd.grad(score, seen[-1], retain_graph=True, allow_unused=True)
            (gradients,) = grads
        if gradients is None:
            fail(f"--layer {layer}: the network's scores do not depend on it, or hide how")
        alpha = gradients.mean((2, 3), keepdim=True)  # alpha_k = mean_hw dz_c / dA_k
        maps.append(F.relu((alpha * seen[-1].detach()).sum(1)))  # relu(sum_k alpha_k A_k)
    return torch.stack(maps, 1), labels[:, 0]


def salient(maps, size, share):
    """The `share` of the pixels where the label's map exceeds the proposals' most: bool, B x H x W.

    maps B x (1 + count) x h x w, each scaled to a maximum of 1 first. Where it nowhere exceeds
    them, the label's map alone decides; ties fill up the share.
    """
    maps = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-20)
    difference = (maps[:, 0] - maps[:, 1:].amax(1)).flatten(1)
    some = (difference > 0).any(1, keepdim=True)
    difference = torch.where(some, difference, maps[:, 0].flatten(1))
    top = difference.topk(max(1, round(share * difference.shape[1]))).indices
    chosen = torch.zeros_like(difference, dtype=torch.bool).scatter_(1, top, True)
    return chosen.view(len(maps), *size)


@torch.no_grad()
def fooled_and_confidence(model, x, masks, labels, overlays, inert):
    """Two shares per input (B x 2 in [0,1]): clean images that get its label with x M pasted in,
    and their mean confidence with the inert pattern in M.

    Floats in [0,1]: x B x C x H x W, overlays N x C x H x W, inert C x H x W; masks bool B x H x W.
    """
    masks, shape = masks[:, None, None], (len(x), len(overlays))
    pasted = torch.where(masks, x[:, None], overlays)  # B x N x C x H x W
    fooled = model(pasted.flatten(0, 1)).argmax(1).view(shape) == labels[:, None]
    pasted = torch.where(masks, inert, overlays)
    confidence = model(pasted.flatten(0, 1)).float().softmax(1).amax(1).view(shape)
    return torch.stack((fooled.float().mean(1), confidence.mean(1)), 1)


def points(model, x, *, layer, count, share, overlays, inert, batch_size):
    """(fooled, confidence) of uint8 inputs, N x 2; `batch_size` pasted images a pass."""
    overlays, parts = to_float(overlays), []
    bar = tqdm(total=2 * len(x) * len(overlays), disable=None, unit="image")
    for images in map(to_float, x.split(pass_size(x))):
        maps, labels = class_maps(model, layer, images, count)
        whole = images, salient(maps, images.shape[2:], share), labels
        for part in zip(*(t.split(max(1, batch_size // len(overlays))) for t in whole)):
            parts.append(fooled_and_confidence(model, *part, overlays, inert))
            bar.update(2 * len(part[0]) * len(overlays))
    bar.close()
    found = torch.cat(parts)
    if not found.isfinite().all():
        fail("the model's outputs are not finite: its weights are broken")
    return found.cpu().double().numpy()


def envelope(found):
    """The upper edge of points N x 2: the largest fooled share in each bin of the confidence."""
    bins = np.floor(found[:, 1] / BIN)
    tops = [np.flatnonzero(bins == b) for b in np.unique(bins)]
    return found[[members[found[members, 0].argmax()] for members in tops]]


def fit_curve(edge):
    """The quadratic through points N x 2 (of lower degree for one or two), and its range."""
    fooled, confidence = edge.T
    degree = min(2, len(edge) - 1)
    return np.polyfit(confidence, fooled, degree), confidence.min(), confidence.max()


def edge_at(curve, confidence):
    """The fitted edge at these confidences; beyond the fitted range it is level."""
    coefficients, low, high = curve
    return np.polyval(coefficients, np.clip(confidence, low, high))


def signed_distance(found, curve):
    """Distance of points (N x 2) from the edge over [0,1], positive above it."""
    grid = np.linspace(0, 1, 1001)
    gaps = found[:, 1, None] - grid, found[:, 0, None] - edge_at(curve, grid)
    return np.sign(found[:, 0] - edge_at(curve, found[:, 1])) * np.hypot(*gaps).min(1)


def flagged_share(distances, threshold):
    """Percentage of inputs further above the curve: on clean inputs the FRR, else 100 - FAR."""
    return 100 * float(np.mean(np.asarray(distances) > threshold))


def draw_points(path, named, curve):
    """Fooled share against confidence for each kind of input, and the fitted curve."""
    with saved_figure(path, figsize=(5, 3.6)) as (_, axis):
        for name, found in named.items():
            axis.plot(found[:, 1], found[:, 0], ".", alpha=0.5, label=name)
        grid = np.linspace(0, 1, 101)
        axis.plot(grid, edge_at(curve, grid), color="grey", label="fitted edge")
        axis.set(xlabel="mean confidence with noise", ylabel="fooled share", ylim=(-0.05, 1.05))
        axis.legend()


def judge(names, distances, threshold):
    """Print a line for each input; [(name, distance, stopped), ...]."""
    judged = [(name, float(d), bool(d > threshold)) for name, d in zip(names, distances)]
    for name, value, stop in judged:
        print(f"{name}: distance {value:.4f}, {'STOPPED' if stop else 'passed'}")
    return judged


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "overlays", "fit_images", "inputs", "batch_size", "proposals")
    check_share(args, "share")
    if not 0 < args.fpr < 0.5 or (args.fit_images or FEWEST) < FEWEST:
        fail(f"--fpr {args.fpr} must lie in (0, .5) and --fit-images be {FEWEST} or more")
    start = time.time()
    victim = open_victim(args)
    model, data, device = victim.model, victim.data, victim.data.x_train.device
    split = clean_share(args, victim, SHARE)
    asked = args.overlays + (args.fit_images or FEWEST)
    if len(split) < asked:
        parts = f"--overlays {args.overlays} and {args.fit_images or FEWEST} to fit the boundary"
        fail(f"{parts} need {asked} clean images; the defender's share holds {len(split)}")
    sizes = map_layers(model, to_float(data.x_train[split[:2]]))
    layer = args.layer or LAYERS.get(victim.arch)
    if layer not in sizes:
        known = ", ".join(f"{name} ({h} x {w})" for name, (h, w) in sizes.items())
        fail(f"--layer {layer or 'NAME'}: the maps of {victim.arch} are {known or 'none'}")
    class_maps(model, layer, to_float(data.x_train[split[:2]]), args.proposals)  # fails now
    suspects = load_pictures(args.suspects, data.shape) if args.suspects else None
    folder = make_folder(args.out or victim.folder / f"sentinet-s{args.seed}")
    generator = torch.Generator().manual_seed(args.seed)
    x_clean = data.x_train[split[torch.randperm(len(split), generator=generator).to(device)]]
    overlays = x_clean[: args.overlays]
    x_fit = x_clean[args.overlays :][: args.fit_images or 400]
    inert = torch.rand(data.shape, generator=generator).to(device)

    # ===== Boundary =====
    args.batch_size = args.batch_size or pass_size(x_clean)
    settings = {"layer": layer, "count": args.proposals, "share": args.share, "inert": inert}
    settings |= {"overlays": overlays, "batch_size": args.batch_size}
    measure = partial(points, model, **settings)
    found_fit = measure(x_fit)
    distance = signed_distance(found_fit, curve := fit_curve(envelope(found_fit)))
    threshold = float(np.quantile(distance, 1 - args.fpr, method="weibull"))
    fooled, confidence = found_fit.mean(0)
    means = f"fooled share {fooled:.3f}, confidence with noise {confidence:.3f}"
    print(f"{len(x_fit)} clean images pasted on {len(overlays)} by {layer}'s maps: {means}")
    lowest = max(args.fpr, 1 / (len(x_fit) + 1))  # fewer images know no smaller rate
    print(f"an input is flagged where its distance exceeds {threshold:.4f} (FPR {lowest:.1%})")
    metrics = {"threshold": threshold, "curve": curve[0], "layer": layer}
    metrics |= {"fit_fooled": fooled, "fit_confidence": confidence, "fit_images": len(x_fit)}
    if suspects:
        names, x = suspects
        judged = judge(names, signed_distance(measure(x.to(device)), curve), threshold)
        metrics |= {"suspects": len(names), "stopped": sum(stop for *_, stop in judged)}
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    chosen = torch.randperm(len(data.x_test), generator=generator)[: args.inputs].to(device)
    named = {"clean": measure(data.x_test[chosen])}
    metrics["clean_accuracy"] = accuracy(model, data.x_test, data.y_test)
    metrics |= {"clean_inputs": len(chosen), "clean_fooled": named["clean"][:, 0].mean()}
    clean = signed_distance(named["clean"], curve)
    metrics["frr"] = flagged_share(clean, threshold)
    if victim.x_poisoned is None:
        print("no poisoned test images beside the checkpoint: only the FRR can be evaluated")
    else:
        order = torch.randperm(len(victim.x_poisoned), generator=generator)
        chosen = order[: args.inputs].to(device)
        x_poisoned, y_target = victim.x_poisoned[chosen], victim.y_target[chosen]
        named["triggered"] = measure(x_poisoned)
        triggered = signed_distance(named["triggered"], curve)
        obeyed = (predict(model, x_poisoned) == y_target).cpu().numpy()
        truth = np.arange(len(clean) + len(triggered)) >= len(clean)
        metrics |= {
            "asr": 100 * float(obeyed.mean()),
            "asr_n": len(x_poisoned),
            "triggered_fooled": named["triggered"][:, 0].mean(),
            "auroc": float(roc_auc_score(truth, np.concatenate((clean, triggered)))),
            "far": 100 - flagged_share(triggered, threshold),
        }
        if obeyed.any():  # a triggered input that the model does not obey is no attack
            metrics["far_obeyed"] = 100 - flagged_share(triggered[obeyed], threshold)
    clear_folder(folder)
    if suspects:
        write_csv(folder / "suspects.csv", ("input", "distance", "stopped"), judged)
    draw_points(folder / "points.png", named, curve)
    with written_whole(folder / "points.npz") as path:
        np.savez_compressed(path, fit=found_fit, **named)

    # ===== Report =====
    for name in ("frr", "far", "auroc", "clean_fooled", "triggered_fooled"):
        if name in metrics:
            print(f"{name.replace('_', ' ')}: {metrics[name]:.3f}")
    report(folder, "sentinet", args, metrics, seconds, kinds=())
