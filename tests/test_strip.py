"""STRIP against toy models with known entropies, its boundaries, and runs on digits."""

import csv
import io
import math

import numpy as np
import pytest
import torch
from conftest import files_below, loaded, result_of, run_here
from PIL import Image
from scipy.stats import entropy, norm
from torch import nn
from tqdm import tqdm

from common.datasets import load_dataset
from common.models import build_model
from methods import strip

CLASSES = 7


class Planted(nn.Module):
    """Class 3 for certain where pixel (0, 0) reaches tau, every class alike elsewhere."""

    def __init__(self, tau):
        super().__init__()
        self.tau = tau

    def forward(self, x):
        logits = torch.zeros(len(x), CLASSES)
        logits[:, 3] = 1000.0 * (x[:, 0, 0, 0] >= self.tau)
        return logits


def images(count, seed, shape=(3, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, *shape), generator=generator).to(torch.uint8)
    x[:, :, 0, 0] = 0
    return x


def linear_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES)).eval()


def scores(model, x, overlays, blend="add", batch_size=2000):
    return strip.entropies(model, x, overlays, blend=blend, batch_size=batch_size)


@pytest.mark.parametrize("blend", ["add", "average"])
def test_superimposing_against_numpy(blend):
    x, overlays = images(3, 0) / 255, images(4, 1) / 255
    before = x.clone(), overlays.clone()
    mixed = strip.superimpose(x, overlays, blend)
    assert mixed.shape == (3, 4, 3, 8, 8)
    for m in range(3):
        for n in range(4):
            total = x[m].numpy().astype(np.float64) + overlays[n].numpy()
            expected = np.minimum(total, 1) if blend == "add" else total / 2
            np.testing.assert_allclose(mixed[m, n], expected, atol=1e-6)
    assert mixed.max() <= 1 and torch.equal(x, before[0]) and torch.equal(overlays, before[1])


def test_bits():
    assert strip.bits(torch.tensor([[1000.0, 0, 0, 0]])).item() == 0  # 0 log 0 is no NaN
    assert strip.bits(torch.zeros(1, 43)).item() == pytest.approx(math.log2(43), abs=1e-5)
    logits = torch.randn(5, 3, 10, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1).numpy()
    np.testing.assert_allclose(strip.bits(logits), entropy(p, axis=-1, base=2), atol=1e-5)


def test_planted_pixel():
    """A trigger survives addition; averaging halves it, below what the model asks for."""
    clean, overlays = images(5, 0), images(9, 1)
    triggered = clean.clone()
    triggered[:, :, 0, 0] = 255
    model = Planted(0.9)
    assert (scores(model, triggered, overlays) == 0).all()
    np.testing.assert_allclose(scores(model, clean, overlays), math.log2(CLASSES), atol=1e-5)
    halved = scores(model, triggered, overlays, "average")
    np.testing.assert_allclose(halved, math.log2(CLASSES), atol=1e-5)
    assert (scores(Planted(0.45), triggered, overlays, "average") == 0).all()


def test_black_overlay_is_the_plain_entropy():
    model, x = linear_model(), images(20, 0)
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    with torch.no_grad():
        p = model(x / 255).double().softmax(1).numpy()
    np.testing.assert_allclose(scores(model, x, black), entropy(p, axis=1, base=2), atol=1e-5)
    with torch.no_grad():
        p = model(x / 510).double().softmax(1).numpy()
    halved = scores(model, x, black, "average")
    np.testing.assert_allclose(halved, entropy(p, axis=1, base=2), atol=1e-5)


def test_a_pass_has_room_in_every_layer():
    """The widest outputs of mnist_cnn are 32 x 14 x 14 numbers, of 4 bytes or 2."""
    model = build_model("mnist_cnn", 10, (1, 28, 28), (0.1,), (0.3,)).eval()
    x = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    assert strip.pass_size(model, x) == 10 * 2**20 // (4 * 32 * 14 * 14)
    model.bfloat16 = True
    assert strip.pass_size(model, x) == 10 * 2**20 // (2 * 32 * 14 * 14)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_pass_of_a_network_whose_layers_are_smaller_than_its_images():
    assert strip.pass_size(Planted(0.5), images(2, 0)) == 10 * 2**20 // (4 * 3 * 8 * 8)
    assert strip.pass_size(Planted(0.5), torch.zeros(1, 3, 2000, 2000, dtype=torch.uint8)) == 1


@pytest.mark.parametrize("batch_size", [1, 7, 12, 100, 10**6])
def test_chunks_change_nothing(monkeypatch, batch_size):
    """Also against one image and one overlay at a time; the bar counts every mixed image."""
    bars, shown = [], {"disable": False, "file": io.StringIO()}
    monkeypatch.setattr(strip, "tqdm", lambda **k: bars.append(tqdm(**(k | shown))) or bars[-1])
    model, x, overlays = linear_model(), images(11, 0), images(6, 1)
    h = scores(model, x, overlays, batch_size=batch_size)
    assert h.shape == (11,) and bars[0].n == bars[0].total == 66
    with torch.no_grad():
        expected = [
            np.mean(
                [
                    entropy(model(((a + o) / 255).clamp(max=1)[None]).softmax(1)[0].numpy(), base=2)
                    for o in overlays.float()
                ]
            )
            for a in x.float()
        ]
    np.testing.assert_allclose(h, expected, atol=1e-5)
    np.testing.assert_allclose(scores(model, x, overlays.flip(0)), h, atol=1e-6)


def test_mean_of_entropies_is_not_the_entropy_of_the_mean():
    """A model that is certain of each overlay's own label has H = 0, however the labels vary."""
    overlays = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    for i in range(4):
        overlays[i, :, 7, i] = 255

    def model(x):
        return 1000 * x[:, 0, 7, :]

    x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    assert (scores(model, x, overlays) == 0).all()


def test_outputs_that_are_not_finite(one_line):
    message = one_line(
        scores, lambda x: torch.full((len(x), 2), math.nan), images(2, 0), images(2, 1)
    )
    assert "finite" in message


@pytest.mark.parametrize("frr", strip.FRRS)
def test_boundaries(frr):
    h = np.random.default_rng(0).normal(1.1, 0.2, 2000)
    normal, empirical, failed = strip.boundaries(h, frr)
    assert not failed
    assert normal == pytest.approx(h.mean() + h.std(ddof=0) * norm.ppf(frr), abs=1e-9)
    assert strip.normal_boundary(h, 0.01) == pytest.approx(h.mean() - 2.3263 * h.std(), abs=1e-4)
    assert strip.flagged_share(h, empirical) == pytest.approx(100 * frr, abs=0.051)
    skewed = np.random.default_rng(0).exponential(0.2, 2000)
    first, second, failed = strip.boundaries(skewed, frr)
    assert strip.normal_boundary(skewed, frr) < 0  # mean = sd: at .05 still .2 (1 - 1.64)
    assert failed and first == second == np.quantile(skewed, frr, method="weibull") > 0


@pytest.mark.parametrize("count", [39, 100])
def test_empirical_boundary_stops_its_share_of_new_images(count):
    """5 % on average, whatever the distribution; NumPy's default stops over 7 % with 39 images."""
    h = np.random.default_rng(0).random((20_000, count))  # the share below a boundary is itself
    stopped = np.mean([strip.boundaries(row, 0.05)[1] for row in h])
    assert stopped == pytest.approx(0.05, abs=0.001)


def test_flagged_share_counts_ties_as_flagged():
    h = [0.1, 0.2, 0.2, 0.3]
    assert [strip.flagged_share(h, b) for b in (0.05, 0.1, 0.2, 0.29, 0.3)] == [0, 25, 75, 75, 100]


SHORT = "--overlays", 6, "--inputs", 40, "--data-fraction", 0.05


def test_overlays_and_fit_are_disjoint_and_from_the_share(inline, digits, digits_badnets, tmp_path):
    ran = inline("strip", "--ckpt", digits_badnets, "--out", tmp_path / "out", *SHORT)
    assert (len(ran["overlays"]), len(ran["x_fit"])) == (6, len(ran["split"]) - 6)
    held = {image.numpy().tobytes() for image in digits.x_train[ran["split"]]}
    parts = [{i.numpy().tobytes() for i in ran[name]} for name in ("overlays", "x_fit")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == held
    assert not ran["model"].training


@pytest.mark.parametrize("fit, few", [(98, True), (99, False)])
def test_warns_where_no_boundary_has_the_rate(inline, digits_badnets, tmp_path, capfd, fit, few):
    """The least of 99 entropies is below 1 % of new ones, on average."""
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", "--overlays", 2, "--inputs", 2
    inline("strip", *flags, "--fit-images", fit)
    assert (
        f"{fit} clean images are too few for an empirical FRR of 1.0%" in capfd.readouterr().out
    ) == few


def test_same_seed_same_figures(inline, digits_badnets, tmp_path):
    figures = []
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        flags = "--seed", seed, "--out", tmp_path / out, *SHORT
        inline("strip", "--ckpt", digits_badnets, *flags)
        metrics = result_of(tmp_path / out)["metrics"]
        metrics.pop("images_per_second")
        figures.append(metrics)
    assert figures[0] == figures[1] != figures[2]


def test_negative_normal_boundary_is_said(inline, digits_badnets, tmp_path, monkeypatch, capfd):
    """Entropies that spread far: the quantile takes over, in one printed line per rate."""
    monkeypatch.setattr("statistics.NormalDist.inv_cdf", lambda self, p: -50.0)
    inline("strip", "--ckpt", digits_badnets, "--out", tmp_path / "out", *SHORT)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["normal_fit_negative"] == list(strip.FRRS)
    assert capfd.readouterr().out.count("takes its place") == 4
    assert all(row["boundary_normal"] == row["boundary_empirical"] >= 0 for row in metrics["rates"])


@pytest.mark.drawn
def test_run_on_badnets(digits_badnets, tmp_path):
    """Triggered inputs are told from clean ones; every figure again from the raw entropies."""
    before = files_below(digits_badnets)
    out = tmp_path / "out"
    flags = "--ckpt", digits_badnets, "--overlays", 50, "--out", out
    printed = run_here("strip", *flags, cwd=tmp_path)
    metrics = result_of(out)["metrics"]
    with np.load(out / "entropies.npz") as archive:
        fit, clean, triggered = (archive[k] for k in ("fit", "clean", "triggered"))
    assert (len(fit), len(clean), len(triggered)) == (551, 360, 324)
    assert all(h.min() >= 0 and h.max() <= math.log2(10) for h in (fit, clean, triggered))
    greater = (clean[:, None] > triggered).mean() + 0.5 * (clean[:, None] == triggered).mean()
    assert metrics["auroc"] == pytest.approx(greater, abs=1e-9) and greater >= 0.97
    assert metrics["entropy_ratio"] == pytest.approx(triggered.mean() / clean.mean())
    assert metrics["entropy_ratio"] < 0.2 and metrics["far"] <= 15 and metrics["asr"] >= 98
    assert [row["frr"] for row in metrics["rates"]] == [0.5, 1, 2, 5]
    for row in metrics["rates"]:
        boundary = fit.mean() + norm.ppf(row["frr"] / 100) * fit.std()
        quantile = np.quantile(fit, row["frr"] / 100, method="weibull")
        expected = {"normal": boundary if boundary >= 0 else quantile, "empirical": quantile}
        for rule, value in expected.items():
            assert row[f"boundary_{rule}"] == pytest.approx(value, abs=1e-7)
            assert row[f"frr_{rule}"] == pytest.approx(100 * (clean <= value).mean(), abs=0.3)
            assert row[f"far_{rule}"] == pytest.approx(100 * (triggered > value).mean(), abs=0.4)
    assert metrics["frr"] == metrics["rates"][1]["frr_normal"] < 10
    assert "RESULT strip " in printed and "FAR" in printed
    assert files_below(out) == ["entropies.npz", "entropies.png", "result.json"]
    assert files_below(digits_badnets) == before


def test_clean_model_has_a_false_rejection_rate_only(inline, digits_clean, tmp_path, capfd):
    flags = "--out", tmp_path / "out", "--overlays", 20, "--inputs", 100
    inline("strip", "--ckpt", digits_clean, *flags)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["frr"] < 10 and metrics["clean_inputs"] == 100
    assert not {"far", "auroc", "asr", "entropy_ratio"} & set(metrics)
    assert "no poisoned test images" in capfd.readouterr().out


@pytest.mark.parametrize(
    "args, named",
    [
        (["--overlays", 0], "overlays"),
        (["--inputs", -1], "inputs"),
        (["--batch-size", 0], "batch-size"),
        (["--frr", 0], "frr"),
        (["--frr", 0.5], "frr"),
        (["--frr", "nan"], "frr"),
        (["--fit-images", 1], "fit-images"),
        (["--data-fraction", 0], "share"),
        (["--data-fraction", 1.1], "share"),
        (["--overlays", 700], "702 clean images"),
        (["--fit-images", 502], "602 clean images"),
        (["--data-fraction", 0.01], "102 clean images"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input(inline, one_line, digits_badnets, tmp_path, args, named):
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", *args
    assert named in one_line(inline, "strip", *flags)
    assert list(tmp_path.iterdir()) == []


def test_no_input_is_judged_by_a_network_whose_outputs_are_saturated(
    inline, one_line, digits_badnets, tmp_path
):
    """Nearly every entropy is 0, and so is the boundary: it would stop clean inputs, too."""
    state = loaded(digits_badnets).model.net.state_dict()
    state = {k: v * 1e6 if k.startswith("linear") else v for k, v in state.items()}
    torch.save(state, tmp_path / "sure.pt")
    flags = "--ckpt", tmp_path / "sure.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    flags += "--suspects", digits_badnets / "poisoned_test.npz", "--out", tmp_path / "out", *SHORT
    assert "outputs are saturated" in one_line(inline, "strip", *flags)
    assert not list((tmp_path / "out").glob("*"))


# ===== Inputs of the user =====


def triggered_and_clean(folder):
    """The first four triggered test images of a victim and four clean ones."""
    with np.load(folder / "poisoned_test.npz") as archive:
        return np.concatenate((archive["x"][:4], load_dataset("digits", "data", "cpu").x_test[:4]
                               .permute(0, 2, 3, 1).numpy()))  # fmt: skip


def test_p_of_a_clean_input_keeps_its_level_where_the_normal_fit_does_not():
    """Skewed entropies: the boundary for 1 % stops another share, p <= .01 stops 1 %."""
    rng = np.random.default_rng(0)
    fit, clean = rng.beta(8, 1, 999), rng.beta(8, 1, 100_000)
    judged = strip.judge(range(len(clean)), clean, fit, strip.normal_boundary(fit, 0.01))
    share = np.mean([p <= 0.01 for _, _, p, _ in judged])
    assert share == pytest.approx(0.01, abs=0.009)  # three standard errors of a fit of 999
    assert np.mean([stop for *_, stop in judged]) > 2 * share
    assert strip.judge("ab", [0, 1], np.array([0.5]), 0)[0][1:] == (0, 0.5, True)


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_suspects_are_judged_one_by_one(inline, tmp_path, digits_badnets, capfd, form):
    """A bare checkpoint will do: the triggered inputs are stopped and the clean ones pass."""
    model = loaded(digits_badnets).model
    torch.save(model.net.state_dict(), tmp_path / "suspect.pt")
    x = triggered_and_clean(digits_badnets)
    if form == "npz":
        np.savez(tmp_path / "x.npz", x=x)
        names = [str(k) for k in range(8)]
    else:
        names = [f"{'ab'[k // 4]}/{k}.png" for k in range(8)]
        for name, image in zip(names, x):
            (tmp_path / "inputs" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(tmp_path / "inputs" / name)
    source = "x.npz" if form == "npz" else "inputs"
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    ran = inline("strip", *flags, "--suspects", source, "--inputs", 50, "--overlays", 30)
    rows = list(csv.reader((tmp_path / "suspect" / "strip-s0" / "suspects.csv").open()))
    assert rows[0] == ["input", "entropy", "p", "stopped"]
    assert [row[0] for row in rows[1:]] == names
    assert [row[3] for row in rows[1:5]] == ["True"] * 4 and "False" in [row[3] for row in rows[5:]]
    fit = ran["h_fit"]
    levels = [(1 + sum(fit <= float(row[1]))) / (1 + len(fit)) for row in rows[1:]]
    np.testing.assert_allclose([float(row[2]) for row in rows[1:]], levels)
    assert max(levels[:4]) < 0.05 < max(levels[4:])
    model.bfloat16 = ran["args"].precision == "bfloat16"
    h = strip.entropies(model, torch.from_numpy(x).permute(0, 3, 1, 2), ran["overlays"],
                        blend="add", batch_size=200)  # fmt: skip
    np.testing.assert_allclose([float(row[1]) for row in rows[1:]], h, atol=1e-5)
    printed, stopped = capfd.readouterr().out, 100 * (fit <= ran["boundary"]).mean()
    assert f"{names[0]}: entropy" in printed and f"stops {stopped:.1f} % of these" in printed
    assert result_of(tmp_path / "suspect" / "strip-s0")["metrics"]["suspects"] == 8


@pytest.mark.parametrize("source", ["nowhere.npz", "empty", "wide.npz", "text.npz"])
def test_bad_suspects(inline, one_line, unread, tmp_path, untrained, source):
    torch.save(untrained.net.state_dict(), tmp_path / "suspect.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("not an archive")
    np.savez(tmp_path / "wide.npz", x=np.zeros((3, 28, 30), np.uint8))
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    assert source in one_line(inline, "strip", *flags, "--suspects", source)
    assert not (tmp_path / "suspect").exists()
