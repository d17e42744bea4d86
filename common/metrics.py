"""One definition per figure: accuracies, ASR, image similarity, anomaly index and its null."""

import functools
import math
import warnings

import numpy as np
import torch
import torch.nn.functional as F

from common import fail
from common.datasets import to_float


@torch.no_grad()
def predict(model, x, batch_size=2000):
    """Predicted labels (int64, N) of uint8 images, in eval mode; restores the mode."""
    training = model.training
    model.eval()
    logits = torch.cat([model(to_float(part)) for part in x.split(batch_size)])
    model.train(training)
    if not logits.isfinite().all():
        fail("the model's outputs are not finite: its weights are broken")
    return logits.argmax(1)


def accuracy(model, x, y):
    """Percentage of uint8 images `x` that the model labels `y`."""
    return 100 * (predict(model, x) == y).float().mean().item()


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
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return (-10 * mse.clamp(min=1e-10).log10()).mean().item()


def ssim(a, b):
    """Mean SSIM with the 11x11 Gaussian window of sigma 1.5; a, b are N x C x H x W in [0,1].

    Only pixels with a whole window count (torchmetrics pads by reflection, so the border of 5
    pixels is cut off its map): NaN where a side is below 11.
    """
    if min(a.shape[2:]) < 11:
        return math.nan
    from torchmetrics.functional.image import structural_similarity_index_measure  # 2 s

    settings = {"data_range": 1.0, "sigma": 1.5, "reduction": "none", "return_full_image": True}
    measure = functools.partial(structural_similarity_index_measure, **settings)
    maps = [measure(p, q)[1] for p, q in zip(a.split(500), b.split(500))]
    return torch.cat(maps)[..., 5:-5, 5:-5].mean().item()


def lpips_distance(net, device):
    """Return the LPIPS network of v0.1 ('alex', 'vgg' or 'squeeze'), frozen, in eval mode.

    Call it on images in [0,1] through `lpips_of`. Its backbone's ImageNet weights are downloaded
    by torchvision at the first use; where they cannot be had this fails, nothing falls back.
    """
    import lpips

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips passes torchvision's old argument names
            network = lpips.LPIPS(net=net, verbose=False)
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


@functools.cache
def null_indices(classes, draws=100_000, seed=0):
    """Sorted largest anomaly indices of `draws` clean models: K independent Gaussian norms."""
    rng = np.random.default_rng(seed)
    v = rng.standard_normal((draws, classes))
    below = np.median(v, axis=1, keepdims=True) - v
    mad = np.median(np.abs(below), axis=1)
    return np.sort(below.max(1) / (1.4826 * mad))


def p_value(index, classes):
    """Probability that a clean model of K labels shows at least this largest anomaly index."""
    null = null_indices(classes)
    exceeding = len(null) - np.searchsorted(null, index, side="left")
    return (1 + int(exceeding)) / (1 + len(null))


def verdict(norms, eligible=None, threshold=2.0):
    """Decide from one norm per label whether a model is backdoored.

    Returns a dict: `indices` per label, `index` and `label` of the smallest eligible norm, `ratio`
    of that norm to the median, `p_value` under the Gaussian null, `flagged` (labels with an index
    over the paper's `threshold`). A label outside `eligible` (its attack did not succeed) is never
    flagged. For K < 5 the indices and the p-value are None and `flagged` is empty.
    """
    norms = np.asarray(norms, dtype=np.float64)
    eligible = np.ones(len(norms), bool) if eligible is None else np.asarray(eligible, bool)
    indices = anomaly_index(norms)
    label = int(np.where(eligible, norms, math.inf).argmin()) if eligible.any() else None
    result = dict.fromkeys(("indices", "index", "ratio", "p_value"))
    result |= {"applicable": indices is not None, "label": label, "flagged": []}
    if indices is None:
        return result
    result["indices"] = [float(i) for i in indices]
    result["index"] = 0.0 if label is None else result["indices"][label]
    result["p_value"] = p_value(result["index"], len(norms))
    if label is not None and np.median(norms) > 0:
        result["ratio"] = float(norms[label] / np.median(norms))
    order = np.argsort(-indices, kind="stable")
    result["flagged"] = [int(k) for k in order if eligible[k] and indices[k] > threshold]
    return result


def case_of(flagged, target):
    """The generator paper's cases: 1 only the target, 2 target and others, 3 others, 4 none."""
    if target in flagged:
        return 1 if len(flagged) == 1 else 2
    return 3 if flagged else 4
