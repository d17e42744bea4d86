"""STRIP (Gao et al., ACSAC 2019, arXiv 1902.06531): an input whose label nothing can disturb.

Other clean images are laid over an input. An innocent input loses its label, and the predictions
over many overlays differ; a trigger survives the overlays and its label stays. The mean entropy of
the predictions is therefore low for triggered inputs.

Kind: detects inputs, at test time. Given: the model's outputs and a clean share of its training
data, whose labels only spread the draw over the classes and show whether the network is read right.
Answers: for an input, does it carry a trigger. Assumes a trigger that works on every image and
survives the overlay. Where it fails: in our tables nearly all WaNet, input-aware, stealthy,
composite, DFST and SIG triggers pass, four fifths of latent ones, half of BadNets' squares on GTSRB
and of l2 triggers, and a third of Poison Ink.

Equations: x_n = x + o_n, clipped to [0,1] -> superimpose; H_n = -sum_i y_i log2 y_i and
H = (1/N) sum_n H_n -> entropies (bits, from 0 to log2 K); boundary = mu + sigma Phi^-1(FRR) ->
normal_boundary; an input is flagged when H <= boundary.

Differs from the authors' code: the sum is clipped to [0,1], as an image would be (theirs reaches
2). All inputs get the same overlays (theirs draws new ones for each). Overlays and the images that
fit the boundary are disjoint parts of the training data. The false rejection rate (FRR, clean
inputs flagged) and the false acceptance rate (FAR, triggered inputs passed) are read on test
images, and the triggered ones are never of the target class. The empirical quantile stands beside
the normal fit, because entropies are skewed; where the normal fit is negative (ours on GTSRB, the
paper's on saturating MNIST digits) the empirical quantile takes its place. --suspects adds a
p-value per input, its rank among the clean images, which needs no normal fit.

    python methods/strip.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results beside the paper's: results/README.md, table "STRIP".
"""

import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, make_folder, saved_figure, write_csv, written_whole
from common.checkpoint import clear_folder
from common.datasets import load_pictures, to_float
from common.defence import clean_share, defence_flags, open_victim, report
from common.metrics import accuracy, predict

SHARE = 0.1, 600  # of the training data, and the least number of images


def parse_args():
    p = defence_flags(__doc__, SHARE)
    rule = "x + o, clipped (paper: not clipped), or (x + o) / 2, which halves the trigger"
    p.add_argument("--blend", default="add", choices=["add", "average"], help=rule)
    p.add_argument("--overlays", type=int, default=100, help="N, overlays per input (paper 100)")
    p.add_argument("--fit-images", type=int, help="fit the boundary (all others, at most 2000)")
    p.add_argument("--frr", type=float, default=0.01, help="of the verdict (paper .01)")
    p.add_argument("--inputs", type=int, default=2000, help="most clean, triggered ones (2000)")
    p.add_argument("--batch-size", type=int, help="mixed images a pass (what the cache holds)")
    suspects = "inputs to judge: an .npz with x, or a folder of pictures"
    p.add_argument("--suspects", help=suspects)
    return p.parse_args()


FRRS = (0.005, 0.01, 0.02, 0.05)  # the rates of the paper's Table 3, and 5 %
ROOM = 10 * 2**20, 2**30  # bytes of one layer's outputs in a pass: a CPU's cache, a GPU's memory


def superimpose(x, overlays, blend, out=None):
    """Every overlay on every input: x M x C x H x W, overlays N x C x H x W, floats in [0,1].

    Returns M x N x C x H x W in [0,1], in `out` where it is given.
    """
    total = torch.add(x[:, None], overlays[None], out=out)
    return total.clamp_(max=1) if blend == "add" else total.div_(2)


def bits(logits):
    """Shannon entropy over the classes, ... x K logits -> ... bits between 0 and log2 K."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1) / math.log(2)


@torch.no_grad()
def pass_size(model, x):
    """Images of x's size (uint8, N x C x H x W) in a pass: as many as have ROOM in every layer."""
    sizes = [4 * x[0].numel()]

    def note(module, inputs, output):
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    model(to_float(x[:1]))
    for hook in hooks:
        hook.remove()
    return max(1, ROOM[x.is_cuda] // max(sizes))


@torch.no_grad()
def entropies(model, x, overlays, *, blend, batch_size):
    """H of each uint8 input x (M x C x H x W): the mean of H_n over N uint8 overlays. Returns M.

    `model` is in eval mode. The entropy is taken per overlay and then averaged; the entropy of the
    mean prediction would be high for an input with a steady but different label per overlay.
    """
    overlays, parts = to_float(overlays), []
    bar = tqdm(total=len(x) * len(overlays), disable=None, unit="image")
    size = max(1, batch_size // len(overlays))
    room = overlays.new_empty(min(size, len(x)), *overlays.shape)  # once, for every part
    for part in x.split(size):
        mixed = superimpose(to_float(part), overlays, blend, room[: len(part)])
        h = bits(model(mixed.flatten(0, 1))).view(mixed.shape[:2])
        parts.append(h.mean(1))
        bar.update(len(part) * len(overlays))
    bar.close()
    h = torch.cat(parts)
    if not h.isfinite().all():
        fail("the model's outputs are not finite: its weights are broken")
    return h.cpu().double().numpy()


def normal_boundary(h, frr):
    """mu + sigma Phi^-1(FRR) of a normal distribution fitted to clean entropies h."""
    return float(np.mean(h) + np.std(h) * statistics.NormalDist().inv_cdf(frr))


def boundaries(h, frr):
    """The normal and the empirical boundary; a negative normal one becomes the empirical one.

    No entropy is negative, so a negative boundary would accept every input. Returns (normal,
    empirical, whether the normal fit failed).
    """
    normal, empirical = normal_boundary(h, frr), float(np.quantile(h, frr, method="weibull"))
    return (empirical, empirical, True) if normal < 0 else (normal, empirical, False)


def flagged_share(h, boundary):
    """Percentage of inputs with H <= boundary: on clean inputs the FRR, on triggered 100 - FAR."""
    return 100 * float(np.mean(np.asarray(h) <= boundary))


def draw_histogram(path, named, boundary):
    """Entropies of each kind of input as the share per bin, with the boundary."""
    with saved_figure(path, figsize=(5, 3.2)) as (_, axis):
        bins = np.linspace(0, max(1e-3, *(h.max() for h in named.values())), 50)
        for name, h in named.items():
            axis.hist(h, bins, weights=np.full(len(h), 100 / len(h)), alpha=0.6, label=name)
        axis.axvline(boundary, color="grey", linewidth=0.8, label=f"boundary {boundary:.3g}")
        axis.set(xlabel="mean entropy H in bits", ylabel="% of inputs")
        axis.legend()


def rates(table, clean, triggered=None):
    """FRR and FAR in per cent at each nominal rate's two boundaries, from entropies."""
    rows = []
    for frr, (normal, empirical, _) in table.items():
        row = {"frr": 100 * frr}
        for rule, boundary in (("normal", normal), ("empirical", empirical)):
            row[f"boundary_{rule}"] = boundary
            row[f"frr_{rule}"] = flagged_share(clean, boundary)
            if triggered is not None:
                row[f"far_{rule}"] = 100 - flagged_share(triggered, boundary)
        rows.append(row)
    return rows


def judge(names, h, h_fit, boundary):
    """Print a line for each input; [(name, entropy, p, stopped), ...].

    p = (1 + clean images with H as low) / (1 + clean images): where the images behind h_fit are
    like a clean input (but the network was trained on them), its p is at most a with probability a
    at most, whatever the distribution of H (split conformal, Vovk et al. 2005).
    """
    ranks = np.searchsorted(np.sort(h_fit), h, side="right")
    p = (1 + ranks) / (1 + len(h_fit))
    judged = [
        (name, *map(float, pair), bool(pair[0] <= boundary)) for name, *pair in zip(names, h, p)
    ]
    for name, value, level, stop in judged:
        print(f"{name}: entropy {value:.4f}, p {level:.4f}, {'STOPPED' if stop else 'passed'}")
    return judged


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "overlays", "fit_images", "inputs", "batch_size")
    if not 0 < args.frr < 0.5:
        fail(f"--frr {args.frr} must lie in (0, .5)")
    if args.fit_images == 1:
        fail("--fit-images 1: a boundary needs at least 2 images")
    start = time.time()
    victim = open_victim(args, forward=True)
    model, data, device = victim.model, victim.data, victim.data.x_train.device
    split = clean_share(args, victim, SHARE)
    asked = args.overlays + (args.fit_images or 2)
    if len(split) < asked:
        fail(
            f"{args.overlays} overlays and {args.fit_images or 'at least 2'} images for the "
            f"boundary need {asked} clean images; the defender's share holds {len(split)}"
        )
    suspects = load_pictures(args.suspects, data.shape) if args.suspects else None
    folder = make_folder(args.out or victim.folder / f"strip-s{args.seed}")
    generator = torch.Generator().manual_seed(args.seed)
    x_clean = data.x_train[split[torch.randperm(len(split), generator=generator).to(device)]]
    overlays = x_clean[: args.overlays]
    x_fit = x_clean[args.overlays :][: args.fit_images or 2000]

    # ===== Boundary =====
    args.batch_size = args.batch_size or pass_size(model, x_clean)
    settings = {"overlays": overlays, "blend": args.blend, "batch_size": args.batch_size}
    score = partial(entropies, model, **settings)
    search_start = time.time()
    h_fit = score(x_fit)
    search_seconds = time.time() - search_start
    print(
        f"{len(x_fit)} clean images under {len(overlays)} overlays: entropy {h_fit.mean():.3f} ± "
        f"{h_fit.std():.3f} bits of at most {math.log2(data.classes):.3f}"
    )
    table = {frr: boundaries(h_fit, frr) for frr in sorted({*FRRS, args.frr})}
    for frr, (normal, empirical, failed) in table.items():
        if failed:
            print(
                f"FRR {frr:.1%}: the normal fit's boundary {normal_boundary(h_fit, frr):.3f} is "
                f"negative; the empirical quantile {empirical:.4f} takes its place"
            )
        else:
            print(f"FRR {frr:.1%}: boundary {normal:.4f} normal, {empirical:.4f} empirical")
    boundary = table[args.frr][0]
    if (len(x_fit) + 1) * args.frr < 1:
        print(
            f"warning: {len(x_fit)} clean images are too few for an empirical FRR of {args.frr:.1%}"
        )
    share = flagged_share(h_fit, boundary)
    if share > 100 * args.frr + 20:  # more than any normal fit: many are equal
        fail(f"the outputs are saturated: the boundary stops {share:.1f} % of the clean images")
    stops = f"which stops {share:.1f} % of these clean images"
    print(f"an input is flagged when H <= {boundary:.4f} (FRR {args.frr:.1%}), {stops}")
    metrics = {
        "boundary": boundary,
        "normal_fit_negative": [frr for frr, (_, _, failed) in table.items() if failed],
        "fit_mean": float(h_fit.mean()),
        "fit_sd": float(h_fit.std()),
        "fit_images": len(x_fit),
        "images_per_second": len(x_fit) * len(overlays) / search_seconds,
    }
    if suspects:
        names, x = suspects
        judged = judge(names, score(x.to(device)), h_fit, boundary)
        metrics |= {"suspects": len(names), "stopped": sum(stop for *_, stop in judged)}
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    chosen = torch.randperm(len(data.x_test), generator=generator)[: args.inputs].to(device)
    named = {"clean": score(data.x_test[chosen])}
    metrics["clean_accuracy"] = accuracy(model, data.x_test, data.y_test)
    metrics |= {"clean_inputs": len(named["clean"]), "clean_mean": float(named["clean"].mean())}
    if victim.x_poisoned is None:
        print("no poisoned test images beside the checkpoint: only the FRR can be evaluated")
    else:
        order = torch.randperm(len(victim.x_poisoned), generator=generator)
        chosen = order[: args.inputs].to(device)
        x_poisoned, y_target = victim.x_poisoned[chosen], victim.y_target[chosen]
        named["triggered"] = score(x_poisoned)
        obeyed = (predict(model, x_poisoned) == y_target).cpu().numpy()
        h = np.concatenate(list(named.values()))
        triggered = np.arange(len(h)) >= len(named["clean"])
        metrics |= {
            "asr": 100 * float(obeyed.mean()),
            "asr_n": len(x_poisoned),
            "triggered_mean": float(named["triggered"].mean()),
            "auroc": float(roc_auc_score(triggered, -h)),
        }
        if metrics["clean_mean"] > 0:
            metrics["entropy_ratio"] = metrics["triggered_mean"] / metrics["clean_mean"]
    rows = rates(table, named["clean"], named.get("triggered"))
    metrics["rates"] = rows
    metrics["frr"] = flagged_share(named["clean"], boundary)
    if "triggered" in named:
        metrics["far"] = 100 - flagged_share(named["triggered"], boundary)
        if obeyed.any():  # a triggered input that the model does not obey is no attack
            metrics["far_obeyed"] = 100 - flagged_share(named["triggered"][obeyed], boundary)
    clear_folder(folder)
    if suspects:
        write_csv(folder / "suspects.csv", ("input", "entropy", "p", "stopped"), judged)
    draw_histogram(folder / "entropies.png", named, boundary)
    with written_whole(folder / "entropies.npz") as path:
        np.savez_compressed(path, fit=h_fit, **named)

    # ===== Report =====
    for row in rows:
        parts = [f"nominal FRR {row['frr']:.1f} %"]
        for rule in ("normal", "empirical"):
            far = f", FAR {row[f'far_{rule}']:.2f} %" if f"far_{rule}" in row else ""
            parts.append(
                f"{rule} {row[f'boundary_{rule}']:.4f}: FRR {row[f'frr_{rule}']:.2f} %{far}"
            )
        print("; ".join(parts))
    for name in ("auroc", "entropy_ratio"):
        if name in metrics:
            print(f"{name.replace('_', ' ')}: {metrics[name]:.3f}")
    report(folder, "strip", args, metrics, seconds, kinds=())
