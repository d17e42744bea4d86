"""Neural Cleanse's two mitigations without training (Wang et al., IEEE S&P 2019): filter, prune.

nc.py reverses a trigger and unlearns it. The same trigger also tells which neurons of the second to
last layer carry the backdoor: those that it excites most above their clean activation. The filter
stops inputs that excite the first hundredth of this ranking; pruning silences neurons in this order
until the reversed trigger no longer works. They stand in a script of their own because nc.py, which
must have run before, is at its limit of length.

Kind: detects inputs, and repairs models. Given: the model, a clean share of its training data, and
reversed.npz and the flagged label of nc.py's folder (--nc). Answers: a threshold for inputs, and
the pruned model. Where it fails: on BadNets WRN-16-1 (three seeds) the filter passes 58 % of the
triggered inputs, and pruning leaves an ASR of 46 for 5 points of accuracy; on digits the reversed
trigger was gone after 80 of 512 neurons, when the attacker's own worked on 10 % of the images.

Steps of the paper: ranking, activation with the reversed trigger less the clean one -> ranking;
filter, mean activation of the first 1 % of it -> profile; pruning in this order -> prune_curve,
stop_point, prune.

Differs from the paper, or chosen where it is silent: the layer is what enters the last linear layer
(1 % of WRN-16-1's 64 neurons is one). Pruning has no limit at 30 % of the neurons. Stamped images
are rounded to 8 bits; images of the flagged label are not stamped. Ranking and threshold see
different clean images: a fifth of the share is kept back, on which the trigger itself was searched,
too. It gives the threshold, a quantile at the rate of clean inputs that may be stopped (--fpr;
public code: mean plus one standard deviation), and the end of pruning: at most 1 % of the stamped
images still reach the label, or the last neuron before more than --max-drop points of clean
accuracy are lost. A neuron is silenced by zeroing the weights that read it. As many neurons drawn
at random are pruned for comparison ("random"). The false positive rate (FPR, clean inputs stopped)
and the false negative rate (FNR, triggered inputs passed) are read on test images.

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
from common.metrics import pass_size, predict
from common.models import entering, in_float32, logit_layer

SHARE = 0.1, 300  # of the training data, and the least number of images: those of nc.py
TOP = 0.01  # of the neurons make the filter (paper 1 %)
GONE = 1.0  # per cent of stamped images: the reversed trigger no longer works


def parse_args():
    p = defence_flags(__doc__, SHARE)
    p.add_argument("--nc", help="nc.py's folder (default: <checkpoint folder>/nc-s<seed>)")
    p.add_argument("--label", type=int, help="reversed label (default: the first that nc.py flags)")
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
def activations(model, layer, x):
    """What enters the linear layer named `layer` for uint8 images, N x D, in float32."""
    with in_float32(model):
        return torch.cat([entering(model, layer, to_float(part)) for part in x.split(pass_size(x))])


def ranking(clean, stamped):
    """Neurons in the order of the mean activation (N x D) that the trigger adds, most first."""
    return (stamped.mean(0) - clean.mean(0)).argsort(descending=True, stable=True)


def profile(a, order):
    """Mean activation of the first 1 % of the ranking, at least one neuron: a is N x D, returns N.

    An input is stopped where it is above the threshold.
    """
    return a[:, order[: max(1, round(TOP * len(order)))]].mean(1)


@torch.no_grad()
def prune_curve(linear, a, y, order, balanced=False):
    """Percentage of activations a (N x D) labelled y after pruning 0, 1, ..., D neurons (list).

    Pruning a neuron takes its term a_j w_j from the logits. `balanced`: the mean over labels, for a
    rare class would be lost unseen.
    """
    a, weight = a.double(), linear.weight.double()
    logits = a @ weight.T + (0 if linear.bias is None else linear.bias)
    hits = [logits.argmax(1) == y]
    for neuron in order:
        logits -= a[:, neuron, None] * weight[:, neuron]
        hits.append(logits.argmax(1) == y)
    hits = torch.stack(hits)
    groups = [hits[:, y == label] for label in y.unique()] if balanced else [hits]
    shares = [group.sum(1).double() / group.shape[1] for group in groups]
    return (100 * torch.stack(shares).mean(0)).tolist()


def stop_point(accuracies, asrs, max_drop):
    """How many neurons to prune, and whether the reversed trigger is gone by then.

    The first count that ends it, or the last one before the accuracy first falls too far.
    """
    for count, (percent, asr) in enumerate(zip(accuracies, asrs)):
        if accuracies[0] - percent > max_drop + 1e-9:
            return count - 1, False
        if asr <= GONE:
            return count, True
    return len(asrs) - 1, False


def prune(model, layer, pruned):
    """A copy of the model whose linear `layer` does not read the neurons `pruned`."""
    model = copy.deepcopy(model)
    model.get_submodule(layer).weight.data[:, pruned] = 0
    return model


def draw(path, curves, count, scores, threshold):
    """Percentages against the number of pruned neurons; the filter's scores by kind of input."""
    with saved_figure(path, 1, 2, figsize=(10, 3.2)) as (_, (left, right)):
        for name, values in curves.items():
            left.plot(range(len(values)), values, label=name)
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
    layer = logit_layer(model, to_float(data.x_train[split[:20]]), victim.arch)
    linear, weights = model.get_submodule(layer), model.named_parameters(remove_duplicate=False)
    if type(linear).forward is not torch.nn.Linear.forward:
        fail(f"{layer} is more than a linear layer: its inputs cannot be silenced by its weight")
    if sum(weight is linear.weight for _, weight in weights) != 1:
        fail(f"{layer} shares its weight, or computes it as weight_norm does: it cannot be zeroed")
    kept = kept_back(data.y_train[split], KEPT_BACK, args.seed)
    others = data.y_train[split] != label
    if not (others & kept).any() or not (others & ~kept).any():
        fail(f"the {len(split)} clean images leave none of another label to rank or to check on")
    x_kept, y_kept = data.x_train[split[kept]], data.y_train[split[kept]]
    x_stamped = stamp(x_kept[y_kept != label], mask, pattern)
    works = 100 * (predict(model, x_stamped) == label).double().mean().item()
    if works < 50:
        why = "its search failed, or it belongs to another checkpoint"
        fail(f"{source}: its trigger sends {works:.0f} % of the images to label {label}: {why}")
    folder = Path(args.out or victim.folder / f"nc_mitigate-s{args.seed}")
    if folder.resolve() == source.resolve():
        fail(f"--out {folder} is nc.py's folder, whose files would be replaced")
    make_folder(folder)

    # ===== Filter =====
    x_rank = data.x_train[split[others & ~kept]]
    clean = activations(model, layer, x_rank)
    order = ranking(clean, activations(model, layer, stamp(x_rank, mask, pattern)))
    a_kept, a_stamped = (activations(model, layer, x) for x in (x_kept, x_stamped))
    scores = profile(a_kept, order).cpu().numpy()
    threshold = float(np.quantile(scores, 1 - args.fpr, method="weibull"))
    missed = 100 * (profile(a_stamped, order) <= threshold).double().mean().item()
    lowest = max(args.fpr, 1 / (len(scores) + 1))  # fewer images know no smaller rate
    print(f"filter: FPR {lowest:.1%} above {threshold:.4g}; the reversed trigger of label")
    print(f"{label} passes with {missed:.2f} % of {len(a_stamped)} images that were kept back")

    # ===== Repair =====
    neurons = order.tolist()
    goal = torch.full((len(a_stamped),), label, device=order.device)
    accuracies = prune_curve(linear, a_kept, y_kept, neurons, balanced=True)
    asrs = prune_curve(linear, a_stamped, goal, neurons)
    count, gone = stop_point(accuracies, asrs, args.max_drop)
    print(
        f"{count} of {len(order)} neurons pruned: the reversed trigger's ASR {asrs[0]:.2f} -> "
        f"{asrs[count]:.2f} ({'gone' if gone else 'not gone'}), accuracy {accuracies[0]:.2f} -> "
        f"{accuracies[count]:.2f} on {len(x_kept)} images that were kept back"
    )
    models = {"": model}
    if count:
        drawn = torch.randperm(len(order), device=order.device)[:count]
        models["_random"] = prune(model, layer, drawn)
        models["_repaired"] = prune(model, layer, order[:count])
    else:
        print("nothing is pruned, so no model is saved")
    metrics = {"label": label, "layer": layer, "neurons": len(order)}
    metrics |= {"pruned": count, "gone": gone}
    metrics |= {"threshold": threshold, "fnr_reversed": missed, "kept_back": len(x_kept)}
    metrics |= {"asr_reversed": asrs[0], "asr_reversed_repaired": asrs[count]}
    metrics |= {
        "kept_back_accuracy": accuracies[0],
        "kept_back_accuracy_repaired": accuracies[count],
    }
    clear_folder(folder)
    save_repaired(folder, models, victim, args, metrics)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models)
    curves = {"accuracy, kept back": accuracies, "ASR, reversed trigger": asrs}
    a = activations(model, layer, data.x_test)
    curves["clean accuracy"] = prune_curve(linear, a, data.y_test, neurons)
    scores = {"clean": profile(a, order).cpu().numpy()}
    metrics["fpr"] = 100 * float((scores["clean"] > threshold).mean())
    if victim.x_poisoned is not None:
        a = activations(model, layer, victim.x_poisoned)
        curves["ASR"] = prune_curve(linear, a, victim.y_target, neurons)
        scores["triggered"] = profile(a, order).cpu().numpy()
        metrics["fnr"] = 100 * float((scores["triggered"] <= threshold).mean())
        triggered = np.arange(len(data.x_test) + len(a)) >= len(data.x_test)
        metrics["auroc"] = float(roc_auc_score(triggered, np.concatenate(list(scores.values()))))
        print("filter: FPR {fpr:.2f} %, FNR {fnr:.2f} %, AUROC {auroc:.3f}".format(**metrics))
    draw(folder / "curve.png", curves, count, scores, threshold)
    with written_whole(folder / "curve.npz") as path:
        names = {name.replace(", ", "_").replace(" ", "_"): v for name, v in curves.items()}
        np.savez_compressed(path, order=order.cpu().numpy(), **names)

    # ===== Report =====
    report(folder, "nc_mitigate", args, metrics, seconds, kinds=("random", "repaired"))
