"""Neural Cleanse's two mitigations without training (Wang et al., IEEE S&P 2019): filter, prune.

The trigger that nc.py has reversed tells which neurons carry the backdoor: those that it excites
most above their clean activation. The filter stops inputs that excite the first hundredth of this
ranking; pruning silences neurons in this order until the reversed trigger no longer works.

Kind: detects inputs, and repairs models. Given: the model, a clean share of its training data, and
reversed.npz and the flagged label of nc.py's folder (--nc). Answers: a threshold, the pruned model.
Where it fails: at the last layer of BadNets WRN-16-1 (--layer fc), and where the reversed trigger
is not the attacker's: its end is not the end of the other.

Steps of the paper: ranking, activation with the reversed trigger less the clean one -> ranking;
filter, mean activation of the first 1 % of it -> profile; pruning in this order -> prune_curve,
stop_point, prune.

Differs from the paper, or chosen where it is silent: the paper's neurons are those of the second to
last layer. Here they are the inputs of the last layer at which pruning ends the reversed trigger
for two points of clean accuracy (chosen on training images of one WRN-16-1), or else of the one
that does best for --max-drop of them (5 as before, with figures of public networks in sight). A
map's activation is its mean. Pruning has no limit at 30 % of the neurons. Stamped images are
rounded to 8 bits; images of the flagged label are not stamped. Ranking and threshold see different
clean images: a fifth of the share is kept back, on which the trigger itself was searched, too. It
gives the threshold, a quantile at the rate --fpr of clean inputs that are stopped (public code:
mean plus one standard deviation), and the end of pruning: 1 % of the stamped images, or as many as
of the clean ones, still reach the label. A neuron is silenced by zeroing the weights of the one
layer that reads it. As many drawn at random are pruned for comparison ("random"). The rates of
clean inputs stopped (FPR) and of triggered ones passed (FNR) are read on test images.

    python methods/nc_mitigate.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results: results/README.md, table "Filter and pruning".
"""

import copy
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail, make_folder, saved_figure, written_whole
from common.checkpoint import clear_folder, fingerprint
from common.datasets import kept_back, read_npz, to_float, to_uint8
from common.defence import (
    KEPT_BACK,
    clean_share,
    defence_flags,
    evaluate,
    open_victim,
    report,
    save_repaired,
)
from common.metrics import accuracy, pass_size
from common.models import entering, in_float32

SHARE = 0.1, 300  # of the training data, and the least number of images: those of nc.py
TOP = 0.01  # of the neurons make the filter (paper 1 %)
GONE = 1.0  # per cent of the stamped images, or as many as of the clean ones, reach the label
CHEAP = 2.0  # points of accuracy: a layer that ends the reversed trigger for them is taken
FEWEST = 16  # neurons of a layer that is tried without being named; an image has fewer channels
DRAWN = 1000  # test images of either kind that draw the curves


def parse_args():
    p = defence_flags(__doc__, SHARE)
    p.add_argument("--nc", help="nc.py's folder (default: <checkpoint folder>/nc-s<seed>)")
    p.add_argument("--label", type=int, help="reversed label (default: the first that nc.py flags)")
    named = "that reads the neurons (default: from the last on, the first that ends the trigger)"
    p.add_argument("--layer", help=f"linear layer or convolution {named}")
    p.add_argument("--fpr", type=float, default=0.05, help="share of clean inputs that may stop")
    cost = "points of accuracy by class that pruning may cost"
    p.add_argument("--max-drop", type=float, default=5.0, help=cost)
    return p.parse_args()


def read_reversed(folder, label, data, model):
    """nc.py's mask 1 x H x W, pattern C x H x W and label: `label`, or the first one it flagged."""
    path, (_, height, width) = folder / "reversed.npz", data.shape
    if not path.is_file():
        fail(f"no such file: {path}, which `python methods/nc.py --ckpt ...` writes")
    masks, patterns, network = read_npz(path, ["masks", "patterns", "network"])
    wanted = (data.classes, 1, height, width), (data.classes, *data.shape)
    if (masks.shape, patterns.shape) != wanted:
        fail(f"{path} does not fit {data.name}: masks {masks.shape}, patterns {patterns.shape}")
    if not all(a.dtype == np.float32 and 0 <= a.min() <= a.max() <= 1 for a in (masks, patterns)):
        fail(f"{path} must hold float32 masks and patterns in [0,1]")
    if network.tolist() != fingerprint(model):
        fail(f"{path} was reversed from another network: run nc.py on this one")
    if label is None:
        try:
            flagged = [*json.loads((folder / "result.json").read_text())["metrics"]["flagged"]]
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"{folder / 'result.json'} does not say what nc.py flagged: pass --label")
        if not flagged:
            fail(f"nc.py flagged no label in {folder}: pass --label to take one all the same")
        label = flagged[0]
    if not isinstance(label, int) or not 0 <= label < data.classes:
        fail(f"--label {label} is not a label: {data.name} has {data.classes} classes")
    device = data.x_train.device
    return *(torch.from_numpy(array[label]).to(device) for array in (masks, patterns)), label


def stamp(x, mask, pattern):
    """(1 - m) x + m D for uint8 images N x C x H x W; returns uint8."""
    return to_uint8((1 - mask) * to_float(x) + mask * pattern)


@torch.no_grad()
def readers(model, x):
    """{name: number of inputs} of the layers whose inputs can be silenced by weights, last first.

    They are linear layers and convolutions which run on x (B x C x H x W in [0,1]), do nothing
    else, have no groups and share no weight. Names are those of model.net's modules.
    """
    found, kinds = {}, (torch.nn.Linear.forward, torch.nn.Conv2d.forward)
    weights = [id(weight) for _, weight in model.named_parameters(remove_duplicate=False)]

    def note(module, inputs, name):
        if inputs and len(inputs[0]) == len(x):  # Swin's windows are more than the images
            found.pop(name, None)
            found[name] = module.weight.shape[1]

    hooks = []
    for name, module in model.net.named_modules():
        plain = type(module).forward in kinds and getattr(module, "groups", 1) == 1
        if plain and weights.count(id(module.weight)) == 1:
            hooks.append(module.register_forward_hook(lambda m, i, y, n=name: note(m, i, n)))
    model(x)
    for hook in hooks:
        hook.remove()
    return dict(reversed(found.items()))


@torch.no_grad()
def activations(model, layer, x):
    """What enters model.net's `layer` for uint8 images, N x D, in float32: the mean of a map."""
    parts = []
    for part in x.split(pass_size(x)):
        with in_float32(model):
            a = entering(model, f"net.{layer}", to_float(part))
        if isinstance(model.net.get_submodule(layer), torch.nn.Conv2d):
            a = a.movedim(1, -1)
        parts.append(a.flatten(1, -2).mean(1) if a.dim() > 2 else a)
    return torch.cat(parts)


def ranking(clean, stamped):
    """Neurons in the order of the mean activation (N x D) that the trigger adds, most first."""
    return (stamped.mean(0) - clean.mean(0)).argsort(descending=True, stable=True)


def profile(a, order):
    """Mean activation of the first 1 % of the ranking, at least one neuron: a is N x D, returns N.

    An input is stopped where it is above the threshold.
    """
    return a[:, order[: max(1, round(TOP * len(order)))]].mean(1)


def prune(model, layer, pruned):
    """A copy of the model whose `layer` does not read its inputs `pruned`."""
    model = copy.deepcopy(model)
    model.net.get_submodule(layer).weight.data[:, pruned] = 0
    return model


def prune_curve(model, layer, order, kept, stamped, *, max_drop, gone):
    """Prune 0, 1, ..., 8, 9, 10, ... neurons, each step an eighth at most, until it is enough.

    `kept` and `stamped` are (uint8 images, labels). Returns a list of (count, accuracy by class on
    `kept`, ASR of `stamped`, both in per cent). Its last point is the first whose ASR is `gone` or
    less, or whose accuracy has fallen by more than `max_drop` points.
    """
    curve, count = [], 0
    while count <= len(order):
        pruned = prune(model, layer, order[:count])
        curve.append((count, accuracy(pruned, *kept, balanced=True), accuracy(pruned, *stamped)))
        if curve[-1][2] <= gone or curve[0][1] - curve[-1][1] > max_drop + 1e-9:
            break
        count += max(1, count // 8)
    return curve


def stop_point(curve, max_drop, gone):
    """The curve's end, or the point before where that costs too much; is the trigger gone there?"""
    if curve[0][1] - curve[-1][1] > max_drop + 1e-9:
        return curve[-2], False
    return curve[-1], curve[-1][2] <= gone


def spread(x, y):
    """Every n-th image and label, at most DRAWN: a test set may be in the order of its labels."""
    return x[:: -(-len(x) // DRAWN)], y[:: -(-len(x) // DRAWN)]


def draw(path, counts, curves, count, scores, threshold):
    """Percentages against the number of pruned neurons; the filter's scores by kind of input."""
    with saved_figure(path, 1, 2, figsize=(10, 3.2)) as (_, (left, right)):
        for name, values in curves.items():
            left.plot(counts, values, ".-", label=name)
        left.axvline(count, color="grey", linewidth=0.8, label=f"stop at {count}")
        left.set(xlabel="pruned neurons", ylabel="%", ylim=(-3, 103))
        bins = np.histogram_bin_edges(np.concatenate(list(scores.values())), 50)
        for name, values in scores.items():
            weights = np.full(len(values), 100 / len(values))
            right.hist(values, bins, weights=weights, alpha=0.6, label=name)
        right.axvline(threshold, color="grey", linewidth=0.8, label=f"threshold {threshold:.3g}")
        right.set(xlabel="mean activation of the filter's neurons", ylabel="% of inputs")
        for axis in (left, right):
            axis.legend()


if __name__ == "__main__":
    args = parse_args()
    if not 0 < args.fpr < 1:
        fail(f"--fpr {args.fpr} must lie in (0, 1)")
    if not 0 <= args.max_drop <= 100:
        fail(f"--max-drop {args.max_drop} must lie in [0, 100]")
    start = time.time()
    victim = open_victim(args)
    model, data = victim.model, victim.data
    split = clean_share(args, victim, SHARE)
    source = Path(args.nc or victim.folder / f"nc-s{args.seed}")
    mask, pattern, label = read_reversed(source, args.label, data, model)
    layers = readers(model, to_float(data.x_train[split[:20]]))
    tried = [name for name, neurons in layers.items() if neurons >= FEWEST]
    if args.layer is not None:
        tried = [name for name in layers if name == args.layer]
    if not tried:
        known = f"whose inputs its own weight can silence; known: {', '.join(layers) or 'none'}"
        fail(f"no layer {args.layer or f'of {FEWEST} inputs or more'} {known}")
    kept = kept_back(data.y_train[split], KEPT_BACK, args.seed)
    others = data.y_train[split] != label
    if not (others & kept).any() or not (others & ~kept).any():
        fail(f"the {len(split)} clean images leave none of another label to rank or to check on")
    x_kept, y_kept = data.x_train[split[kept]], data.y_train[split[kept]]
    x_stamped = stamp(x_kept[y_kept != label], mask, pattern)
    goal = torch.full((len(x_stamped),), label, device=x_stamped.device)
    works = accuracy(model, x_stamped, goal)
    if works < 50:
        why = "its search failed, or it belongs to another checkpoint"
        fail(f"{source}: its trigger sends {works:.0f} % of the images to label {label}: {why}")
    folder = Path(args.out or victim.folder / f"nc_mitigate-s{args.seed}")
    if folder.resolve() == source.resolve():
        fail(f"--out {folder} is nc.py's folder, whose files would be replaced")
    make_folder(folder)

    # ===== Pruning: from the last layer to the first, until one ends the reversed trigger =====
    x_rank, found = data.x_train[split[others & ~kept]], {}
    anyway = accuracy(model, x_kept[y_kept != label], goal)
    limits = {"max_drop": args.max_drop, "gone": max(GONE, anyway)}
    for layer in tried:
        clean = activations(model, layer, x_rank)
        order = ranking(clean, activations(model, layer, stamp(x_rank, mask, pattern)))
        curve = prune_curve(model, layer, order, (x_kept, y_kept), (x_stamped, goal), **limits)
        (count, percent, asr), gone = stop_point(curve, **limits)
        print(
            f"{layer}: {count} of {len(order)} neurons pruned, the reversed trigger's ASR "
            f"{works:.2f} -> {asr:.2f} ({'gone' if gone else 'not gone'}), accuracy "
            f"{curve[0][1]:.2f} -> {percent:.2f} on {len(x_kept)} images that were kept back"
        )
        found[layer] = gone, percent if gone else -asr, asr, percent, count, curve, order
        if gone and curve[0][1] - percent <= CHEAP + 1e-9:
            break
    layer = max((kind[:2], name) for name, kind in found.items())[1]
    gone, _, asr, percent, count, curve, order = found[layer]

    # ===== Filter =====
    a_kept, a_stamped = (activations(model, layer, x) for x in (x_kept, x_stamped))
    scores = profile(a_kept, order).cpu().numpy()
    threshold = float(np.quantile(scores, 1 - args.fpr, method="weibull"))
    missed = 100 * (profile(a_stamped, order) <= threshold).double().mean().item()
    lowest = max(args.fpr, 1 / (len(scores) + 1))  # fewer images know no smaller rate
    print(f"filter by {layer}: FPR {lowest:.1%} above {threshold:.4g}; the reversed trigger of")
    print(f"label {label} passes with {missed:.2f} % of {len(a_stamped)} images kept back")

    # ===== Repair =====
    models = {"": model}
    if count:
        drawn = torch.randperm(len(order), device=order.device)[:count]
        models["_random"] = prune(model, layer, drawn)
        models["_repaired"] = prune(model, layer, order[:count])
    else:
        print("nothing is pruned, so no model is saved: try a larger --max-drop")
    metrics = {"label": label, "layer": layer, "neurons": len(order), "pruned": count, "gone": gone}
    metrics |= {"asr_reversed": works, "asr_reversed_repaired": asr, "kept_back": len(x_kept)}
    metrics |= {"kept_back_accuracy": curve[0][1], "kept_back_accuracy_repaired": percent}
    metrics |= {"threshold": threshold, "fnr_reversed": missed}
    clear_folder(folder)
    save_repaired(folder, models, victim, args, metrics)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models)
    counts, kept_accuracies, asrs = zip(*curve)
    curves = {"accuracy, kept back": kept_accuracies, "ASR, reversed trigger": asrs}
    sets = {"clean accuracy": spread(data.x_test, data.y_test)}
    scores = {"clean": profile(activations(model, layer, data.x_test), order).cpu().numpy()}
    metrics["fpr"] = 100 * float((scores["clean"] > threshold).mean())
    if victim.x_poisoned is not None:
        sets["ASR"] = spread(victim.x_poisoned, victim.y_target)
        a = activations(model, layer, victim.x_poisoned)
        scores["triggered"] = profile(a, order).cpu().numpy()
        metrics["fnr"] = 100 * float((scores["triggered"] <= threshold).mean())
        triggered = np.arange(len(data.x_test) + len(a)) >= len(data.x_test)
        metrics["auroc"] = float(roc_auc_score(triggered, np.concatenate(list(scores.values()))))
        print("filter: FPR {fpr:.2f} %, FNR {fnr:.2f} %, AUROC {auroc:.3f}".format(**metrics))
    for name, part in sets.items():
        curves[name] = [accuracy(prune(model, layer, order[:n]), *part) for n in counts]
    draw(folder / "curve.png", counts, curves, count, scores, threshold)
    with written_whole(folder / "curve.npz") as path:
        names = {name.replace(", ", "_").replace(" ", "_"): v for name, v in curves.items()}
        np.savez_compressed(path, order=order.cpu().numpy(), count=counts, **names)

    # ===== Report =====
    report(folder, "nc_mitigate", args, metrics, seconds, kinds=("random", "repaired"))
