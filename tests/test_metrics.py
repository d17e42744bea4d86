"""Every figure against numpy or scipy versions written from the formulas."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, random_images
from scipy.signal import convolve2d
from torch import nn

from common import metrics
from common.models import build_model

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


ROSNER = """-.25 .68 .94 1.15 1.20 1.26 1.26 1.34 1.38 1.43 1.49 1.49 1.55 1.56 1.58 1.65 1.69 1.70
1.76 1.77 1.81 1.91 1.94 1.96 1.99 2.06 2.09 2.10 2.14 2.15 2.23 2.24 2.26 2.35 2.37 2.40 2.47 2.54
2.62 2.64 2.90 2.92 2.92 2.93 3.21 3.26 3.30 3.59 3.68 4.30 4.64 5.34 5.42 6.01"""


def test_generalised_esd_gives_the_published_example():
    """Rosner 1983, Technometrics 25: the statistics R of his 54 values, three of them outliers."""
    position, t, p = metrics.outlying([[float(value) for value in ROSNER.split()]], 5)
    n = 54 - np.arange(5)
    r = (n - 1) * np.abs(t[0]) / np.sqrt(n * (n - 2 + t[0] ** 2))
    np.testing.assert_allclose(r, [3.119, 2.943, 3.179, 2.810, 2.816], atol=5e-4)
    assert position[0].tolist() == [53, 52, 51, 50, 0] and (t[0] > 0).tolist() == [True] * 4 + [
        False
    ]
    assert (p[0] < 0.05).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("count", [5, 10, 43])
def test_p_of_a_clean_model_is_uniform(count):
    """Whatever the scale and the mean of its log norms; some label is never over 5 %."""
    rng = np.random.default_rng(count)
    draws = np.exp(3 + 0.4 * rng.standard_normal((1000, count)))
    p = np.array([metrics.verdict(norms)["p_value"] for norms in draws])
    for level in (0.05, 0.2, 0.5):
        assert (p < level).mean() == pytest.approx(
            level, abs=4 * (level * (1 - level) / 1000) ** 0.5
        )


@pytest.mark.parametrize("norm", [0.0, 5.0])
def test_equal_norms_are_no_evidence_and_no_warning(norm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = metrics.verdict([norm] * 10)
    assert found["p_value"] == 1 and not found["below"] and not found["above"]


def test_verdict_does_not_depend_on_the_unit_and_follows_the_labels():
    norms = np.random.default_rng(0).lognormal(size=10)
    norms[[2, 7]] = 1e-3, 1e3
    first, order = metrics.verdict(norms), np.random.default_rng(1).permutation(10)
    moved, other = metrics.verdict(norms[order]), metrics.verdict(7 * norms)
    assert first["below"] == other["below"] == [2] and first["above"] == other["above"] == [7]
    assert [order[k] for k in moved["below"]] == [2] and [order[k] for k in moved["above"]] == [7]
    assert first["p_value"] == other["p_value"] == moved["p_value"] < 0.01


SPREAD = [60, 55, 70, 64, 58, 49, 66, 73, 61, 52]


@pytest.mark.parametrize(
    "changed, below, above",
    [
        ({}, [], []),
        ({3: 12}, [3], []),
        ({3: 300}, [], [3]),  # what training against Neural Cleanse does to its target
        ({3: 12, 8: 13}, [3, 8], []),  # one hides the other from a test of a single label
        ({3: 12, 8: 12, 5: 12}, [3, 8, 5], []),
        ({3: 0}, [3], []),  # 0 has no logarithm
        ({3: 12, 8: 300}, [3], [8]),
    ],
    ids=str,
)
def test_planted_labels(changed, below, above):
    norms = np.array(SPREAD, float)
    norms[list(changed)] = list(changed.values())
    answer = metrics.verdict(norms)
    assert sorted(answer["below"]) == sorted(below) and answer["above"] == above
    assert (answer["p_value"] < 0.05) == bool(changed)
    if changed:
        assert answer["side"] == ("below" if below else "above")


def test_a_failed_search_has_no_say():
    """Six failed norms near 390 would set the median and make the four others look small."""
    norms, found = [391, 58, 390, 61, 389, 388, 64, 392, 70, 390], [False] * 10
    for label in (1, 3, 6, 8):
        found[label] = True
    answer = metrics.verdict(norms, found)
    assert answer["conclusive"] is False and answer["label"] == 1
    assert answer["p_value"] is answer["index"] is answer["ratio"] is answer["indices"] is None
    assert answer["below"] == answer["above"] == answer["flagged_by_index"] == []
    norms, found = [*SPREAD, 390, 12], [True] * 10 + [False] * 2
    answer, alone = metrics.verdict(norms, found), metrics.verdict(SPREAD)
    assert answer == alone | {"indices": [*alone["indices"], None, None]}


@pytest.mark.parametrize("count, conclusive", [(5, True), (9, False), (10, True)])
def test_half_of_the_labels_and_five_must_succeed(count, conclusive):
    labels = 5 if count == 5 else 20
    found = np.arange(labels) < count
    assert metrics.verdict(np.arange(1.0, labels + 1), found)["conclusive"] == conclusive


@pytest.mark.parametrize("classes", [1, 2, 3, 4])
def test_too_few_labels_get_an_answer_not_an_index(classes):
    norms = np.arange(1.0, classes + 1)
    assert metrics.anomaly_index(norms) is None
    answer = metrics.verdict(norms)
    assert answer["conclusive"] is False and answer["flagged_by_index"] == []
    assert answer["label"] == 0
    assert answer["indices"] is answer["index"] is answer["p_value"] is None


def test_the_paper_s_rule_on_a_planted_label():
    norms = [60, 61, 62, 20, 63, 64, 65, 66, 67, 68]
    answer = metrics.verdict(norms)
    deviation = np.abs(np.array(norms) - 63.5)  # median of the ten
    expected = (63.5 - 20) / (SCALE * np.sort(deviation)[4:6].mean())
    assert answer["conclusive"] and answer["label"] == 3 and answer["flagged_by_index"] == [3]
    assert answer["index"] == pytest.approx(expected)
    assert answer["indices"][3] == answer["index"] and len(answer["indices"]) == 10
    assert answer["ratio"] == pytest.approx(20 / 63.5)


def test_the_paper_s_rule_flags_by_falling_index_strictly_over_the_threshold():
    norms = [9, 10, 11, 12, 5, 1, 13]  # median 10, deviations 1 0 1 2 5 9 3, MAD 2
    answer = metrics.verdict(norms, threshold=5 / 2 / SCALE - 1e-9)
    assert answer["flagged_by_index"] == [5, 4]
    index_of_4 = metrics.anomaly_index(norms)[4]
    assert metrics.verdict(norms, threshold=index_of_4)["flagged_by_index"] == [5]
    assert metrics.verdict(norms, threshold=9)["flagged_by_index"] == []


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
    labels = metrics.predict(model, images_of(0, 255, 127, 128, 9).repeat(100, 1, 1, 1))
    assert labels.tolist() == [0, 1, 0, 1, 0] * 100 and labels.dtype == torch.int64
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
    announced = run.stderr.startswith("Downloading: ")  # by some versions of torch
    assert len(run.stderr.splitlines()) == 1 + announced, run.stderr


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


def test_lpips_with_random_weights(monkeypatch):
    """Always the same network, without a download; it leaves the caller's random state alone."""
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", None)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", None)
    state = torch.get_rng_state()
    networks = [metrics.lpips_distance("random", torch.device("cpu")) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)
    a, b = random_images(2, (1, 28, 28)).float()[:, None] / 255
    first, again = (metrics.lpips_of(network, a, b) for network in networks)
    assert torch.equal(first, again) and first > 0.01 and metrics.lpips_of(networks[0], a, a) == 0
    a.requires_grad_()
    metrics.lpips_of(networks[0], a, b).sum().backward()
    assert a.grad.abs().max() > 0
    assert not any(p.requires_grad for p in networks[0].parameters())


def test_lpips_takes_the_weights_from_their_file(monkeypatch, tmp_path):
    """The real path: torchvision finds a file in its cache, here one of other weights."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = squeezenet1_1()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    name = SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(backbone.state_dict(), tmp_path / "hub" / "checkpoints" / name)
    network = metrics.lpips_distance("squeeze", torch.device("cpu"))
    held, own = (dict(part.named_parameters()) for part in (network.net, backbone.features))
    assert len(held) == len(own) > 20
    assert all(torch.equal(p, q) for p, q in zip(held.values(), own.values()))
    a, b = random_images(2, (3, 32, 32)).float()[:, None] / 255
    assert metrics.lpips_of(network, a, b) > 0


@pytest.mark.parametrize(
    "norms, absent, below, above",
    [  # Neural Cleanse's on digits: a clean network, and one with a patch for label 0
        ([30.1, 28.4, 33.0, 303.89, 24.2, 44.0, 26.3, 31.7, 38.9, 29.5], [3], [], []),
        ([1.28, 210.67, 12.4, 25.0, 247.42, 18.8, 21.3, 294.52, 16.1, 23.7], [1, 4, 7], [0], []),
    ],
)
def test_a_large_norm_of_a_label_without_images_has_no_say(norms, absent, below, above):
    """A network that never learnt a label needs much to answer with it, backdoor or not."""
    y = torch.tensor([k for k in range(10) if k not in absent])
    named = metrics.verdict(norms)
    assert named["above"] == absent or named["below"] != below  # what such labels did
    found = metrics.with_a_say(norms, [True] * 10, y)
    assert [k for k in range(10) if not found[k]] == absent
    named = metrics.verdict(norms, found)
    assert (named["below"], named["above"]) == (below, above)


def test_what_else_has_a_say():
    norms = [5.0, 9.0, 7.0, 6.0, 40.0]
    y = torch.tensor([0, 1, 3, 3])
    assert metrics.with_a_say(norms, [True] * 5, y) == [True] * 4 + [False]
    # a small norm counts without images, a large one with them; a failed search never does
    assert metrics.with_a_say(norms, [True] * 5, torch.tensor([0, 4])) == [True] * 5
    found = [True, False, True, True, True]
    assert metrics.with_a_say(norms, found, y) == [True, False, False, True, False]
    nothing_to_compare = torch.tensor([9])
    assert metrics.with_a_say(norms, [True] * 5, nothing_to_compare) == [True] * 5


def test_a_pass_holds_fewer_images_where_they_are_large():
    sizes = {28: 200, 32: 200, 64: 50, 224: 4, 1024: 1}
    assert {n: metrics.pass_size(torch.empty(0, 3, n, n)) for n in sizes} == sizes
    on_gpu = SimpleNamespace(is_cuda=True, shape=(9, 3, 224, 224))
    assert metrics.pass_size(on_gpu) == 40
    assert metrics.pass_size(torch.empty(0, 1, 8, 128)) == 200


def test_psnr_in_parts():
    a, b = (random_images(1100, (1, 4, 4)).flip(k) / 255 for k in ((), (0,)))
    mse = (a.double() - b.double()).square().flatten(1).mean(1).clamp(min=1e-10)
    assert metrics.psnr(a, b) == pytest.approx((-10 * mse.log10()).mean().item(), rel=1e-12)


def test_the_simulated_null_does_not_depend_on_its_parts():
    v = np.random.default_rng(3).standard_normal((500, 12))
    _, _, p = metrics.outlying(v, 3)
    assert np.array_equal(metrics.null_p(12, 3, draws=500, seed=3), np.sort(p.min(axis=1)))


def test_predict_leaves_a_norm_that_was_frozen_so():
    model = build_model("wrn16_1", 10, (3, 16, 16), [0.5] * 3, [0.5] * 3).train()
    model.net.bn1.eval()
    metrics.predict(model, torch.zeros(3, 3, 16, 16, dtype=torch.uint8))
    assert model.training and model.net.fc.training and not model.net.bn1.training
