"""SentiNet against planted pixels, NumPy loops and closed forms, and runs on digits."""

import csv
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import files_below, loaded, random_images, result_of, run_here
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from torch import nn
from tqdm import tqdm

from common.datasets import load_dataset, to_float
from common.models import Classifier
from methods import gradcam, sentinet

HALF = (0.5,) * 3


class Planted(nn.Module):
    """Class 3 for certain where pixel (2, 2) is bright, else the class that pixel (7, 7) names."""

    def forward(self, x):
        logits = torch.zeros(len(x), 5)
        named = (x[:, 0, 7, 7] * 4).round().long()
        logits[torch.arange(len(x)), named] = 1.0
        logits[:, 3] += 1000 * (x[:, 0, 2, 2] > 0.9)
        return logits


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 7)).eval()


def pooled(channels=6, classes=5):
    """A convolution, ReLU, global average pooling and a linear head, for 3 x H x W images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, classes))
    return Classifier(net, HALF, HALF).eval().requires_grad_(False)


# ===== Pasting =====


@pytest.mark.parametrize("inside", [True, False])
def test_planted_pixel(inside):
    """Everybody is fooled where the mask holds the pixel, else as many as are of class 3 anyway."""
    x = torch.zeros(1, 1, 8, 8)
    x[..., 2, 2] = 1
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 2:4, 2 if inside else 3] = True
    overlays = torch.zeros(20, 1, 8, 8)
    overlays[:, 0, 7, 7] = torch.arange(20) % 5 / 4  # every fifth is a 3
    model, inert = Planted(), torch.full((1, 8, 8), 0.5)
    assert model(x).argmax(1) == 3
    found = sentinet.fooled_and_confidence(model, x, mask, torch.tensor([3]), overlays, inert)
    fooled, confidence = found[0].tolist()
    assert fooled == pytest.approx(1.0 if inside else 0.2)
    assert confidence == pytest.approx(np.e / (np.e + 4), abs=1e-5)  # the noise is not bright


def test_pasting_against_loops():
    model = linear_model()
    x, overlays, inert = (random_images(n, (3, 8, 8)).roll(n, 3) / 255 for n in (4, 6, 1))
    masks = torch.rand(4, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5
    labels = model(x).argmax(1)
    before = x.clone(), overlays.clone()
    found = sentinet.fooled_and_confidence(model, x, masks, labels, overlays, inert[0])
    for image, mask, label, (fooled, confidence) in zip(x, masks, labels, found.tolist()):
        hits, sure = [], []
        for overlay in overlays:
            m = mask.float()
            logits = model((overlay * (1 - m) + image * m)[None])[0].detach().numpy()
            hits.append(logits.argmax() == label.item())
            logits = model((overlay * (1 - m) + inert[0] * m)[None])[0].detach().numpy()
            sure.append(softmax(logits.astype(np.float64)).max())
        assert fooled == pytest.approx(np.mean(hits)) and 0 <= fooled <= 1
        assert confidence == pytest.approx(np.mean(sure), abs=1e-5)
    assert torch.equal(x, before[0]) and torch.equal(overlays, before[1])


def test_empty_and_whole_masks():
    """Nothing pasted: the overlays' own labels. All pasted: fooled by the whole image."""
    model, x = linear_model(), random_images(3, (3, 8, 8)) / 255
    overlays, inert = random_images(9, (3, 8, 8)).flip(3) / 255, torch.zeros(3, 8, 8)
    labels = model(x).argmax(1)
    whole = torch.ones(3, 8, 8, dtype=torch.bool)
    found = sentinet.fooled_and_confidence(model, x, whole, labels, overlays, inert)
    black = model(inert[None]).softmax(1).max().item()
    np.testing.assert_allclose(found.numpy(), [[1, black]] * 3, atol=1e-5)
    found = sentinet.fooled_and_confidence(model, x, ~whole, labels, overlays, inert)
    share = [(model(overlays).argmax(1) == label).float().mean() for label in labels]
    np.testing.assert_allclose(found[:, 0].numpy(), share, atol=1e-6)


# ===== Which pixels =====


def test_proposals():
    logits = torch.tensor([[0.0, 3, 1, 2], [5, 4, 3, 2]])
    assert sentinet.proposals(logits, 2).tolist() == [[1, 3, 2], [0, 1, 2]]
    assert sentinet.proposals(logits, 9).shape == (2, 4)  # there are no more


@pytest.mark.parametrize("count", [1, 3])
def test_class_maps_of_a_pooled_network(count):
    """relu(sum_k W_ck A_k / (h w)) of each proposed class c; the first is gradcam.py's, too."""
    model, x = pooled(), random_images(5, (3, 16, 16)) / 255
    maps, labels = sentinet.class_maps(model, "1", x, count)
    a = model.net[:2]((x - 0.5) / 0.5)
    order = model(x).argsort(1, descending=True)[:, : 1 + count]
    weights = model.net[4].weight[order] / 64  # B x (1 + count) x C
    expected = torch.einsum("bkc,bchw->bkhw", weights, a).relu()
    torch.testing.assert_close(maps, expected)
    assert torch.equal(labels, order[:, 0]) and maps.shape == (5, 1 + count, 8, 8)
    a, alpha = gradcam.channel_weights(model, "1", x)
    torch.testing.assert_close(maps[:, 0], (alpha * a).sum(1).relu())


def test_layers_are_those_of_gradcam():
    assert sentinet.LAYERS == gradcam.LAYERS


def test_salient_by_hand():
    """Scaled to 1 each; the runner-up's place is left out; without a difference the map decides."""
    maps = torch.zeros(2, 3, 4, 4)
    maps[0, 0, 0, 0], maps[0, 0, 1, 1], maps[0, 1, 0, 0] = 8, 4, 0.5  # (0, 0): 1 - 1
    maps[1, 0, 2, 2], maps[1, 0, 3, 3] = 2, 1
    maps[1, 2] = 5 * maps[1, 0]
    found = sentinet.salient(maps, (4, 4), 1 / 16)
    assert found.nonzero().tolist() == [[0, 1, 1], [1, 2, 2]]
    maps[0, 1] = maps[0, 0]
    alone = sentinet.salient(maps[:, :2], (4, 4), 2 / 16)
    assert alone[0].nonzero().tolist() == [[0, 0], [1, 1]]
    assert sentinet.salient(maps, (28, 30), 0.15).flatten(1).sum(1).tolist() == [126, 126]


# ===== Boundary =====


def test_envelope_by_hand():
    """(fooled, confidence): the largest fooled share in .80 to .82, in .82 to .84 and at 1."""
    found = np.array([[0.1, 0.805], [0.3, 0.815], [0.2, 0.81], [0.05, 0.83], [0.4, 1.0]])
    np.testing.assert_array_equal(sentinet.envelope(found), found[[1, 3, 4]])


def test_fitted_curve():
    confidence = np.linspace(0.5, 0.9, 9)
    edge = np.stack((0.7 - 2 * confidence + 1.5 * confidence**2, confidence), 1)
    coefficients, low, high = curve = sentinet.fit_curve(edge)
    np.testing.assert_allclose(coefficients, [1.5, -2, 0.7], atol=1e-8)
    assert (low, high) == (0.5, 0.9)
    np.testing.assert_allclose(sentinet.edge_at(curve, confidence), edge[:, 0], atol=1e-9)
    ends = sentinet.edge_at(curve, np.array([0.0, 1.0]))  # level beyond the points
    np.testing.assert_allclose(ends, edge[[0, -1], 0], atol=1e-9)
    for some in (edge[:1], edge[:2]):
        np.testing.assert_allclose(
            sentinet.edge_at(sentinet.fit_curve(some), some[:, 1]), some[:, 0], atol=1e-9
        )


def test_distances():
    """From a level edge the difference; from a curved one the minimum that SciPy finds."""
    found = np.random.default_rng(0).random((40, 2))
    level = np.array([0.3]), 0.2, 0.8
    np.testing.assert_allclose(sentinet.signed_distance(found, level), found[:, 0] - 0.3, atol=1e-3)
    curve = np.array([-3.0, 3.5, -0.5]), 0.0, 1.0
    distances = sentinet.signed_distance(found, curve)
    for (fooled, confidence), distance in zip(found, distances):

        def gap(t, fooled=fooled, confidence=confidence):
            return np.hypot(t - confidence, np.polyval(curve[0], t) - fooled)

        parts = np.linspace(0, 1, 21)
        best = min(minimize_scalar(gap, bounds=pair, method="bounded").fun
                   for pair in pairwise(parts))  # fmt: skip
        assert abs(distance) == pytest.approx(best, abs=3e-3)
        assert (distance > 0) == (fooled > np.polyval(curve[0], confidence))


def test_flagged_share():
    assert [sentinet.flagged_share([-0.1, 0, 0.2, 0.3], t) for t in (-1, 0, 0.25)] == [100, 50, 25]


@pytest.mark.parametrize("batch_size", [1, 13, 10**6])
def test_chunks_change_nothing(monkeypatch, batch_size):
    bars, shown = [], {"disable": False, "file": io.StringIO()}
    monkeypatch.setattr(sentinet, "tqdm", lambda **k: bars.append(tqdm(**(k | shown))) or bars[-1])
    model, x, overlays = pooled(), random_images(11, (3, 16, 16)), random_images(5, (3, 16, 16))
    settings = {"layer": "1", "count": 2, "share": 0.15, "inert": torch.rand(3, 16, 16)}
    found = sentinet.points(model, x, overlays=overlays, batch_size=batch_size, **settings)
    maps, labels = sentinet.class_maps(model, "1", to_float(x), 2)
    masks = sentinet.salient(maps, (16, 16), 0.15)
    expected = sentinet.fooled_and_confidence(
        model, to_float(x), masks, labels, to_float(overlays), settings["inert"]
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.shape == (11, 2) and bars[0].n == bars[0].total == 110
    assert not any(m._forward_hooks for m in model.modules())


def test_outputs_that_are_not_finite(one_line):
    model = pooled()
    model.net[4].bias.data[:] = float("nan")
    settings = {"layer": "1", "count": 1, "share": 0.1, "inert": torch.rand(3, 16, 16)}
    x = random_images(3, (3, 16, 16))
    assert "finite" in one_line(sentinet.points, model, x, overlays=x, batch_size=9, **settings)


# ===== Runs =====

SHORT = "--overlays", 6, "--inputs", 30, "--fit-images", 40


def test_parts_of_the_share_are_disjoint(inline, digits, digits_badnets, tmp_path):
    flags = "--out", tmp_path / "out", "--data-fraction", 0.05, "--overlays", 6, "--inputs", 10
    ran = inline("sentinet", "--ckpt", digits_badnets, *flags)
    assert (len(ran["overlays"]), len(ran["x_fit"])) == (6, len(ran["split"]) - 6)
    held = {image.numpy().tobytes() for image in digits.x_train[ran["split"]]}
    parts = [{i.numpy().tobytes() for i in ran[name]} for name in ("overlays", "x_fit")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == held
    distances = sentinet.signed_distance(ran["found_fit"], ran["curve"])
    assert sentinet.flagged_share(distances, ran["threshold"]) == pytest.approx(5, abs=1.6)


def test_same_seed_same_figures(inline, digits_badnets, tmp_path):
    figures = []
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        flags = "--seed", seed, "--out", tmp_path / out, *SHORT
        inline("sentinet", "--ckpt", digits_badnets, *flags)
        figures.append(result_of(tmp_path / out)["metrics"])
    assert figures[0] == figures[1] != figures[2]


@pytest.mark.drawn
def test_run_on_badnets(digits_badnets, tmp_path):
    """Triggered inputs are told from clean ones; every figure again from the raw points.

    How well they are told depends on the network, and so on the processor: AUROC .71 to .98.
    """
    before = files_below(digits_badnets)
    out, flags = tmp_path / "out", ("--overlays", 30, "--inputs", 200)
    printed = run_here("sentinet", "--ckpt", digits_badnets, "--out", out, *flags, cwd=tmp_path)
    metrics = result_of(out)["metrics"]
    with np.load(out / "points.npz") as archive:
        fit, clean, triggered = (archive[k] for k in ("fit", "clean", "triggered"))
    assert (len(fit), len(clean), len(triggered)) == (400, 200, 200)
    curve = sentinet.fit_curve(sentinet.envelope(fit))
    of_clean, of_triggered = (sentinet.signed_distance(p, curve) for p in (clean, triggered))
    threshold = np.quantile(sentinet.signed_distance(fit, curve), 0.95, method="weibull")
    greater = (of_triggered[:, None] > of_clean).mean()
    greater += 0.5 * (of_triggered[:, None] == of_clean).mean()
    assert metrics["threshold"] == pytest.approx(threshold, abs=1e-9)
    assert metrics["auroc"] == pytest.approx(greater, abs=1e-9) and greater > 0.65
    assert metrics["frr"] == pytest.approx(100 * (of_clean > threshold).mean()) and (
        metrics["frr"] < 15
    )
    assert metrics["far"] == pytest.approx(100 * (of_triggered <= threshold).mean())
    assert metrics["far"] < 75 and metrics["asr"] > 95
    assert metrics["triggered_fooled"] > 0.3 > metrics["clean_fooled"]
    assert "RESULT sentinet " in printed
    assert files_below(out) == ["points.npz", "points.png", "result.json"]
    assert files_below(digits_badnets) == before


def test_clean_model_has_a_false_rejection_rate_only(inline, digits_clean, tmp_path, capfd):
    inline("sentinet", "--ckpt", digits_clean, "--out", tmp_path / "out", *SHORT)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["frr"] < 30 and not {"far", "auroc", "asr"} & set(metrics)
    assert "no poisoned test images" in capfd.readouterr().out


def test_suspects_are_judged_one_by_one(inline, tmp_path, digits_badnets, capfd):
    """A bare checkpoint will do."""
    torch.save(loaded(digits_badnets).model.net.state_dict(), tmp_path / "suspect.pt")
    with np.load(digits_badnets / "poisoned_test.npz") as archive:
        clean = load_dataset("digits", "data", "cpu").x_test[:8].permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path / "x.npz", x=np.concatenate((archive["x"][:8], clean)))
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    inline("sentinet", *flags, "--suspects", "x.npz", "--overlays", 30, "--inputs", 20)
    rows = list(csv.reader((tmp_path / "suspect" / "sentinet-s0" / "suspects.csv").open()))
    assert rows[0] == ["input", "distance", "stopped"]
    assert [row[0] for row in rows[1:]] == [str(k) for k in range(16)]
    stopped = [row[2] == "True" for row in rows[1:]]
    assert sum(stopped[:8]) >= 2 + sum(stopped[8:])
    assert "0: distance" in capfd.readouterr().out
    metrics = result_of(tmp_path / "suspect" / "sentinet-s0")["metrics"]
    assert metrics["suspects"] == 16 and metrics["stopped"] == sum(stopped)


@pytest.mark.parametrize(
    "args, named",
    [
        (["--layer", "linear6"], "layer3 (7 x 7)"),
        (["--overlays", 0], "overlays"),
        (["--inputs", -1], "inputs"),
        (["--proposals", 0], "proposals"),
        (["--batch-size", 0], "batch-size"),
        (["--share", 0], "share"),
        (["--fpr", 0], "fpr"),
        (["--fpr", "nan"], "fpr"),
        (["--fit-images", 19], "fit-images"),
        (["--overlays", 600], "620 clean images"),
        (["--fit-images", 502], "602 clean images"),
        (["--data-fraction", 0], "share"),
        (["--suspects", "nowhere.npz"], "nowhere.npz"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input(inline, one_line, digits_badnets, tmp_path, args, named):
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", *args
    assert named in one_line(inline, "sentinet", *flags)
    assert list(tmp_path.iterdir()) == []


def test_share_and_proposals_are_those_asked_for(inline, digits_badnets, tmp_path):
    flags = "--share", 0.3, "--proposals", 1, "--out", tmp_path / "out", *SHORT
    ran = inline("sentinet", "--ckpt", digits_badnets, *flags)
    settings = ran["settings"] | {"share": 0.3, "count": 1}
    found = sentinet.points(ran["model"], ran["x_fit"], **settings)
    np.testing.assert_array_equal(ran["found_fit"], found)
    for other in ({"share": 0.15}, {"count": 2}):
        again = sentinet.points(ran["model"], ran["x_fit"], **settings | other)
        assert not np.array_equal(found, again), other
