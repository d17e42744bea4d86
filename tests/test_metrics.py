"""Every figure against numpy or scipy versions written from the formulas."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.signal import convolve2d
from torch import nn

from common import metrics

SCALE = 1.4826


class Brightness(nn.Module):
    """Predicts label 1 for images brighter than one half; refuses to work in training mode."""

    def forward(self, x):
        assert not self.training
        bright = x.mean((1, 2, 3))
        return torch.stack((0.5 - bright, bright - 0.5), dim=1)


def images_of(*levels):
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)


@pytest.mark.parametrize(
    "norms, expected",
    [
        ([1, 2, 3, 4, 10], [2 / SCALE, 1 / SCALE, 0, 0, 0]),
        # even K: the median is 11.5 and the MAD 1.5; the lower median would give 11 and 1
        ([1, 10, 11, 12, 13, 14], [10.5 / 1.5 / SCALE, 1 / SCALE, 1 / 3 / SCALE, 0, 0, 0]),
        # the two middle deviations differ as well: median 7, MAD 2.5
        ([13, 4, 6, 8, 9, 1], [0, 1.2 / SCALE, 0.4 / SCALE, 0, 0, 2.4 / SCALE]),
        ([0, 5, 5, 5, 5, 9], [np.inf, 0, 0, 0, 0, 0]),  # MAD = 0, one smaller norm
        ([5, 5, 5, 5, 9], [0, 0, 0, 0, 0]),  # MAD = 0, nothing smaller
        ([7, 7, 7, 7, 7], [0, 0, 0, 0, 0]),
    ],
)
def test_anomaly_index_by_hand(norms, expected):
    np.testing.assert_allclose(metrics.anomaly_index(norms), expected, rtol=1e-12)


def test_anomaly_index_is_affine_invariant_and_follows_the_labels():
    norms = np.random.default_rng(0).lognormal(size=43)
    index = metrics.anomaly_index(norms)
    np.testing.assert_allclose(metrics.anomaly_index(1024 * norms + 3), index, rtol=1e-9)
    order = np.random.default_rng(1).permutation(43)
    np.testing.assert_array_equal(metrics.anomaly_index(norms[order]), index[order])


@pytest.mark.parametrize("classes", [1, 2, 3, 4])
def test_too_few_labels_get_an_answer_not_an_index(classes):
    norms = np.arange(1.0, classes + 1)
    assert metrics.anomaly_index(norms) is None
    answer = metrics.verdict(norms)
    assert answer["applicable"] is False and answer["flagged"] == [] and answer["label"] == 0
    assert answer["indices"] is answer["index"] is answer["p_value"] is None


@pytest.mark.parametrize(
    "classes, over_two, median, quantile, tolerance",
    [
        (5, 0.28, 1.22, 5.77, 0.2),  # a heavy tail: the quantile is known less well
        (10, 0.33, 1.61, 3.88, 0.07),
        (43, 0.64, 2.20, 3.48, 0.04),
        (100, 0.87, 2.49, 3.52, 0.04),
    ],
)
def test_null_distribution(classes, over_two, median, quantile, tolerance):
    null = metrics.null_indices(classes)
    assert (null > 2).mean() == pytest.approx(over_two, abs=0.01)
    assert metrics.p_value(2.0, classes) == pytest.approx(over_two, abs=0.01)
    assert np.median(null) == pytest.approx(median, abs=0.02)
    assert np.quantile(null, 0.95) == pytest.approx(quantile, abs=tolerance)
    assert metrics.p_value(np.quantile(null, 0.95), classes) == pytest.approx(0.05, abs=1e-3)


def test_null_agrees_with_the_index_itself():
    rng = np.random.default_rng(7)
    largest = [metrics.anomaly_index(rng.normal(30, 5, 10)).max() for _ in range(4000)]
    for quantile in (0.25, 0.5, 0.9):
        assert (metrics.null_indices(10) < np.quantile(largest, quantile)).mean() == pytest.approx(
            quantile, abs=0.03
        )


def test_p_value_falls_from_one_and_never_reaches_zero():
    values = [metrics.p_value(index, 10) for index in (0, 0.5, 1, 2, 4, 8, 1e3, np.inf)]
    assert values[0] == 1 and all(a >= b > 0 for a, b in itertools.pairwise(values))
    assert values[-1] == 1 / 100_001


def test_verdict_of_a_planted_label():
    norms = [60, 61, 62, 20, 63, 64, 65, 66, 67, 68]
    answer = metrics.verdict(norms)
    deviation = np.abs(np.array(norms) - 63.5)  # median of the ten
    expected = (63.5 - 20) / (SCALE * np.sort(deviation)[4:6].mean())
    assert answer["applicable"] and answer["label"] == 3 and answer["flagged"] == [3]
    assert answer["index"] == pytest.approx(expected)
    assert answer["indices"][3] == answer["index"] and len(answer["indices"]) == 10
    assert answer["ratio"] == pytest.approx(20 / 63.5)
    assert answer["p_value"] == metrics.p_value(expected, 10) < 0.01


def test_verdict_flags_by_falling_index_strictly_over_the_threshold():
    norms = [9, 10, 11, 12, 5, 1, 13]  # median 10, deviations 1 0 1 2 5 9 3, MAD 2
    answer = metrics.verdict(norms, threshold=5 / 2 / SCALE - 1e-9)
    assert answer["flagged"] == [5, 4]
    index_of_4 = metrics.anomaly_index(norms)[4]
    assert metrics.verdict(norms, threshold=index_of_4)["flagged"] == [5]
    assert metrics.verdict(norms, threshold=9)["flagged"] == []


def test_verdict_never_flags_an_ineligible_label():
    norms = [60, 61, 62, 5, 63, 64, 65, 66, 30, 68]
    eligible = np.ones(10, bool)
    eligible[3] = False
    answer = metrics.verdict(norms, eligible)
    assert metrics.verdict(norms)["flagged"] == [3, 8]
    assert answer["flagged"] == [8] and answer["label"] == 8
    assert answer["index"] == pytest.approx(metrics.anomaly_index(norms)[8])
    nothing = metrics.verdict(norms, np.zeros(10, bool))
    assert nothing["flagged"] == [] and nothing["label"] is None and nothing["index"] == 0
    assert nothing["p_value"] == 1


@pytest.mark.parametrize(
    "flagged, case", [([3], 1), ([3, 5], 2), ([5, 3], 2), ([5], 3), ([5, 6], 3), ([], 4)]
)
def test_cases_of_the_generator_paper(flagged, case):
    assert metrics.case_of(flagged, 3) == case


def test_asr_excludes_the_target_class():
    y = torch.tensor([0, 1, 2, 2, 0])
    targets, counts = metrics.attack_targets(y, 2, 3)
    assert targets.tolist() == [2] * 5
    assert counts.tolist() == [True, True, False, False, True]
    targets, counts = metrics.attack_targets(y, None, 3)
    assert targets.tolist() == [1, 2, 0, 0, 1] and counts.all()  # (y + 1) mod K, all count


def test_accuracy_is_a_percentage_of_all_images_in_eval_mode():
    x, y = images_of(255, 255, 0, 0, 0), torch.tensor([1, 0, 0, 0, 1])
    assert metrics.accuracy(Brightness(), x, y) == pytest.approx(60)


@pytest.mark.parametrize("training", [True, False])
def test_predict_batches_and_restores_the_mode(training):
    model = nn.Sequential(Brightness(), nn.Dropout(0.5)).train(training)
    labels = metrics.predict(model, images_of(0, 255, 127, 128, 9), batch_size=2)
    assert labels.tolist() == [0, 1, 0, 1, 0] and labels.dtype == torch.int64
    assert all(module.training == training for module in model.modules())


def pair_of_images(shape, seed=0):
    """Two stacks in [0,1] whose second half is close and whose first half is far apart."""
    rng = np.random.default_rng(seed)
    a = rng.random((4, *shape))
    b = np.clip(
        a + rng.normal(size=a.shape) * np.array([0.3, 0.2, 0.02, 0.01])[:, None, None, None], 0, 1
    )
    return a, b


def oracle_ssim(a, b):
    """11x11 Gaussian window, sigma 1.5, valid convolution, C1 = .01^2, C2 = .03^2, range 1."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def blur(image):
        return convolve2d(image, window, mode="valid")

    values = []
    for p, q in zip(a.reshape(-1, *a.shape[2:]), b.reshape(-1, *b.shape[2:])):
        mu, nu = blur(p), blur(q)
        var_p, var_q = blur(p * p) - mu**2, blur(q * q) - nu**2
        covariance = blur(p * q) - mu * nu
        top = (2 * mu * nu + 1e-4) * (2 * covariance + 9e-4)
        values.append((top / ((mu**2 + nu**2 + 1e-4) * (var_p + var_q + 9e-4))).mean())
    return np.mean(values)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 20, 31)])
def test_psnr_and_ssim_against_numpy(shape):
    a, b = pair_of_images(shape)
    per_image = [10 * np.log10(1 / np.mean((p - q) ** 2)) for p, q in zip(a, b)]
    tensors = torch.from_numpy(a).float(), torch.from_numpy(b).float()
    assert metrics.psnr(*tensors) == pytest.approx(np.mean(per_image), abs=1e-3)
    assert metrics.ssim(*tensors) == pytest.approx(oracle_ssim(a, b), abs=2e-4)


def test_psnr_averages_images_and_caps_identical_ones():
    x = torch.rand(2, 3, 32, 32)
    assert metrics.psnr(x, x) == pytest.approx(100) and metrics.ssim(x, x) == pytest.approx(1)
    black = torch.zeros(2, 1, 28, 28)
    patched = black.clone()
    patched[0, :, 25:, 25:] = 1  # a 3x3 white patch: 28.94 - 20 log10(3) = 19.40 dB
    expected = 10 * np.log10(28 * 28 / 9)
    assert metrics.psnr(black[:1], patched[:1]) == pytest.approx(expected, abs=1e-4)
    assert metrics.psnr(black, patched) == pytest.approx((expected + 100) / 2, abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 10, 30), (3, 5, 5)])
def test_ssim_needs_a_whole_window(shape):
    assert np.isnan(metrics.ssim(torch.rand(2, *shape), torch.rand(2, *shape)))


def test_ssim_averages_over_more_images_than_one_part():
    a, b = (torch.rand(501, 1, 12, 12) for _ in range(2))
    mean = np.mean([metrics.ssim(a[i : i + 1], b[i : i + 1]) for i in (0, 500)])
    picked = torch.tensor([0, 500])
    assert metrics.ssim(a[picked], b[picked]) == pytest.approx(mean, abs=1e-5)
    expected = (500 * metrics.ssim(a[:500], b[:500]) + metrics.ssim(a[500:], b[500:])) / 501
    assert metrics.ssim(a, b) == pytest.approx(expected, abs=1e-5)


def test_reference_figures_of_the_patch_on_cifar10(cifar10):
    x, patched = cifar10, cifar10.clone()
    patched[:, :, 29:, 29:] = 1
    assert metrics.psnr(x, patched) == pytest.approx(27.87, abs=0.3)  # other images than the note's
    assert metrics.ssim(x, patched) == pytest.approx(0.9997, abs=1e-4)


OFFLINE = """
import sys, urllib.error, urllib.request
def refuse(*args, **kwargs):
    raise urllib.error.URLError("no route to host")
urllib.request.urlopen = refuse
import torch
torch.hub.urlopen = refuse
from common.metrics import lpips_distance
lpips_distance("alex", torch.device("cpu"))
"""


def test_lpips_without_its_weights_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 2
    assert "LPIPS" in run.stderr and "--lpips-net none" in run.stderr
    assert str(tmp_path) in run.stderr  # where to put the weights by hand
    assert len(run.stderr.splitlines()) == 1, run.stderr


def test_lpips_with_damaged_weights_is_one_clear_line(monkeypatch, one_line):
    def damaged(**kwargs):
        raise RuntimeError('invalid hash value (expected "7be5be79", got "00000000")')

    monkeypatch.setattr("lpips.LPIPS", damaged)
    assert "LPIPS" in one_line(metrics.lpips_distance, "alex", torch.device("cpu"))


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_resizes_to_64_and_three_channels(channels):
    seen = []

    def network(a, b, normalize):
        seen.append((a, b, normalize))
        return (a - b).abs().mean((1, 2, 3), keepdim=True)  # N x 1 x 1 x 1, as LPIPS returns

    a, b = torch.rand(2, 5, channels, 28, 28)
    distance = metrics.lpips_of(network, a, b)
    (large, _, normalize), *rest = seen
    assert not rest and normalize is True
    assert large.shape == (5, 3, 64, 64) and distance.shape == (5,)
    np.testing.assert_allclose(large.numpy(), oracle_resize(a.numpy(), 64), atol=1e-5)


def oracle_resize(x, size):
    """Bilinear, pixel centres at half integers, edges repeated; one channel becomes three."""
    at = np.clip((np.arange(size) + 0.5) * x.shape[-1] / size - 0.5, 0, x.shape[-1] - 1)
    low = np.floor(at).astype(int)
    high, part = np.minimum(low + 1, x.shape[-1] - 1), at - low
    x = x[:, :, low] * (1 - part)[:, None] + x[:, :, high] * part[:, None]
    x = x[..., low] * (1 - part) + x[..., high] * part
    return np.broadcast_to(x, (len(x), 3, size, size))
