"""One definition per figure: accuracies, ASR, image similarity, anomaly index and its null."""

import functools
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from common import fail
from common.datasets import to_float
from common.models import entering, in_float32

LPIPS_NETS = "alex", "vgg", "squeeze", "random", "none"  # random: alex, none: no LPIPS
SMALLEST_NORM = 1e-6  # smaller ones count as this, for 0 has no logarithm


def pass_size(x):
    """Images of x's size in a forward pass: more would leave a GPU's memory, a CPU's cache."""
    return max(1, (2000 if x.is_cuda else 200) * 1024 // max(1024, x.shape[-2] * x.shape[-1]))


@torch.no_grad()
def predict(model, x):
    """Predicted labels (int64, N) of uint8 images, in eval mode and float32; restores both."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    with in_float32(model):
        logits = torch.cat([model(to_float(part)) for part in x.split(pass_size(x))])
    for module, mode in training.items():
        module.training = mode
    if not logits.isfinite().all():
        fail("the model's outputs are not finite: its weights are broken")
    return logits.argmax(1)


def accuracy(model, x, y, balanced=False):
    """Percentage of uint8 images x that the model labels y; `balanced`: the mean over labels."""
    hits = (predict(model, x) == y).double()
    if balanced:
        hits = torch.stack([hits[y == k].mean() for k in y.unique()])
    return 100 * hits.mean().item()


@torch.no_grad()
def mean_entering(model, layer, x):
    """Mean over uint8 images `x` of what enters the linear layer named `layer` (D)."""
    with in_float32(model):
        parts = [entering(model, layer, to_float(part)).sum(0) for part in x.split(pass_size(x))]
    return torch.stack(parts).sum(0) / len(x)


def attack_targets(y, target, classes):
    """Target labels and the mask of images that count for the ASR.

    All-to-one (`target` a label): images of the target class do not count, for they would be
    successes without any backdoor. All-to-all (`target` None): (y + 1) mod K, all images count.
    """
    if target is None:
        return (y + 1) % classes, torch.ones_like(y, dtype=torch.bool)
    return torch.full_like(y, target), y != target


def psnr(a, b):
    """Mean of 10 log10(1 / MSE) per image in dB (100 at most); a, b are N x C x H x W in [0,1]."""
    pairs = zip(a.split(500), b.split(500))
    mse = torch.cat([(p.double() - q.double()).square().flatten(1).mean(1) for p, q in pairs])
    return (-10 * mse.clamp(min=1e-10).log10()).mean().item()


def ssim(a, b):
    """Mean SSIM with the 11x11 Gaussian window of sigma 1.5; a, b are N x C x H x W in [0,1].

    Only pixels with a whole window count (torchmetrics pads by reflection, so the border of 5
    pixels is cut off its map): NaN where a side is below 11.
    """
    if min(a.shape[2:]) < 11:
        return math.nan
    from torchmetrics.functional.image import structural_similarity_index_measure as measure  # 2 s

    settings = {"data_range": 1.0, "sigma": 1.5, "reduction": "none", "return_full_image": True}
    maps = [measure(p, q, **settings)[1] for p, q in zip(a.split(500), b.split(500))]
    return torch.cat(maps)[..., 5:-5, 5:-5].mean().item()


def lpips_distance(net, device):
    """The LPIPS network of v0.1 ('alex', 'vgg' or 'squeeze'), frozen, in eval mode; see `lpips_of`.

    torchvision downloads its backbone's ImageNet weights at the first use, or this fails. 'random'
    is AlexNet with weights from seed 0 under LPIPS's own linear layers: no perceptual distance, but
    a term of the same form that needs no download.
    """
    import lpips

    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")  # lpips passes torchvision's old argument names
            torch.manual_seed(0)
            backbone = {"net": "alex", "pnet_rand": True} if net == "random" else {"net": net}
            network = lpips.LPIPS(verbose=False, **backbone)
    except (OSError, RuntimeError) as error:
        cure = f"copy them into {torch.hub.get_dir()}/checkpoints or pass --lpips-net none"
        fail(f"the ImageNet weights behind LPIPS ({net}) cannot be downloaded ({error}); {cure}")
    return network.eval().requires_grad_(False).to(device)


def lpips_of(network, a, b):
    """LPIPS per image (N): both N x C x H x W in [0,1] go to 64x64 bilinearly, 1 to 3 channels."""
    large = {"size": 64, "mode": "bilinear", "align_corners": False}
    pair = [F.interpolate(x.expand(-1, 3, -1, -1), **large) for x in (a, b)]
    return network(*pair, normalize=True).flatten()


def anomaly_index(norms):
    """MAD anomaly index of each label (Wang et al. 2019): |v - med| / (1.4826 MAD).

    The median of an even number of values is the mean of the middle two (NumPy's). Labels above
    the median get 0, for only small norms are suspicious. MAD = 0 with a smaller norm gives inf.
    Returns a float array of K, or None for K < 5, where the index says nothing.
    """
    v = np.asarray(norms, dtype=np.float64)
    if len(v) < 5:
        return None
    below = np.median(v) - v
    mad = np.median(np.abs(below))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, below / (1.4826 * mad), 0.0)


def outlying(v, most):
    """Generalised ESD (Rosner 1983): take out, `most` times, the value furthest from the others.

    v is D x K. Returns positions, t and p, each D x most. t compares a value with the mean and the
    standard deviation of the values that are left (Grubbs' test), with n - 2 degrees of freedom
    of n values; p counts both sides and n candidates.
    """
    from scipy import stats  # 1 s

    v, rows, found = np.array(v, dtype=np.float64), np.arange(len(v)), []
    for n in range(v.shape[1], v.shape[1] - most, -1):
        k = np.nanargmax(np.abs(v - np.nanmean(v, axis=1, keepdims=True)), axis=1)
        value, v[rows, k] = v[rows, k], np.nan
        gap, sd = value - np.nanmean(v, axis=1), np.nanstd(v, axis=1, ddof=1)
        t = np.divide(gap, sd * (n / (n - 1)) ** 0.5, out=np.copysign(math.inf, gap), where=sd > 0)
        t[gap == 0] = 0  # equal values stand out from nothing
        found.append((k, t, np.minimum(1, 2 * n * stats.t.sf(np.abs(t), n - 2))))
    return (np.stack(parts, axis=1) for parts in zip(*found))


@functools.cache
def null_p(count, most, draws=20_000, seed=0):
    """Sorted smallest p of `draws` clean models: `count` independent Gaussian log norms each."""
    generator, parts = np.random.default_rng(seed), []
    for _ in range(10):  # all at once would need GB for a thousand labels
        _, _, p = outlying(generator.standard_normal((draws // 10, count)), most)
        parts.append(p.min(axis=1))
    return np.sort(np.concatenate(parts))


def extreme_labels(norms):
    """Labels whose norm stands out on the logarithmic scale, below or above the others.

    norms are K >= 5. Up to 3 labels (2 of 5 or 6) are taken out, the most extreme first, so that
    two targets do not hide each other. Returns (label, side, p) each, side "below" or "above": p
    is how often some label of a clean model stands out as much, were its log norms Gaussian
    (simulated, for one p of several steps is too small too often).
    """
    most = min(3, (len(norms) - 1) // 2)
    position, t, p = outlying(np.log(np.maximum(norms, SMALLEST_NORM))[None], most)
    null = null_p(len(norms), most)
    level = (1 + np.searchsorted(null, p[0], side="right")) / (1 + len(null))
    sides = ["above" if value > 0 else "below" for value in t[0]]
    return list(zip(position[0].tolist(), sides, np.minimum(1, level).tolist()))


def with_a_say(norms, found, y):
    """Which labels count in `verdict`: their search succeeded (`found`), and where no image of the
    defender's labels `y` shows a label, its norm is not above all of the others': a network that
    never learnt a label needs much to answer with it."""
    shown = [norm for k, norm in enumerate(norms) if found[k] and (y == k).any()]
    return [f and norm <= max(shown, default=math.inf) for f, norm in zip(found, norms)]


def verdict(norms, found=None, threshold=2.0, alpha=0.05):
    """Decide from one norm per label whether a model is backdoored.

    Only labels whose search succeeded (`found`) count. Where they are fewer than 5 or than half of
    the labels, `conclusive` is False, and index, ratio and p-value are None. Returns a dict:
    `indices` per label (None: its search failed), `label`, `index` and `ratio` (to the median) of
    the smallest norm; `flagged_by_index`, labels over the paper's `threshold`; `p_value` and `side`
    of the most outlying step of `extreme_labels`; `below` and `above`, the labels on each side up
    to the last step with p < `alpha`. Labels come with the most extreme first.
    """
    norms = np.asarray(norms, dtype=np.float64)
    if not np.isfinite(norms).all():
        fail(f"the search diverged: norms {norms.tolist()}")
    labels = np.arange(len(norms)) if found is None else np.flatnonzero(found)
    label = int(labels[norms[labels].argmin()]) if len(labels) else None
    result = dict.fromkeys(("indices", "index", "ratio", "p_value", "side"))
    result |= {"conclusive": len(labels) >= max(5, len(norms) / 2), "label": label}
    result |= {"flagged_by_index": [], "below": [], "above": []}
    if not result["conclusive"]:
        return result
    indices = dict(zip(labels.tolist(), anomaly_index(norms[labels]).tolist()))
    result |= {"index": indices[label], "indices": [indices.get(k) for k in range(len(norms))]}
    if np.median(norms[labels]) > 0:
        result["ratio"] = float(norms[label] / np.median(norms[labels]))
    order = sorted(indices, key=indices.get, reverse=True)
    result["flagged_by_index"] = [k for k in order if indices[k] > threshold]
    steps = [(int(labels[k]), side, p) for k, side, p in extreme_labels(norms[labels])]
    _, result["side"], result["p_value"] = min(steps, key=lambda step: step[2])
    last = max((i for i, (_, _, p) in enumerate(steps) if p < alpha), default=-1)
    for k, side, _ in steps[: last + 1]:
        result[side].append(k)
    return result


def case_of(flagged, target):
    """The generator paper's cases: 1 only the target, 2 target and others, 3 others, 4 none."""
    if target in flagged:
        return 1 if len(flagged) == 1 else 2
    return 3 if flagged else 4
