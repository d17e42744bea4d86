"""The filters against SciPy, closed forms and the DCT, the autoencoder, and runs on digits."""

import csv
import io
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import files_below, loaded, random_images, result_of, run_here
from PIL import Image
from scipy import ndimage

from common.datasets import to_float, to_uint8
from common.metrics import accuracy, predict
from common.models import Classifier
from methods import input_aware as ia
from methods import purify

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 20, 23)]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def smooth(count=8, shape=(3, 32, 32), seed=0):
    """uint8 blobs, which an autoencoder can learn."""
    draw = torch.Generator().manual_seed(seed)
    small = torch.rand(count, shape[0], 4, 4, generator=draw)
    x = torch.nn.functional.interpolate(small, shape[1:], mode="bilinear")
    return to_uint8(x)


# ===== JPEG =====


def cosine_image(amplitude, u=7, v=7):
    """Grey 128 with the basis (u, v) of every 8 x 8 block; its DCT coefficient is 4 x amplitude."""
    i = np.arange(8)
    row, column = (np.cos((2 * i + 1) * k * np.pi / 16) for k in (u, v))
    block = 128 + amplitude * np.outer(row, column)
    return torch.from_numpy(np.tile(np.rint(block), (2, 2))).to(torch.uint8)[None, None]


@pytest.mark.parametrize(
    "amplitude, quality, survives",
    [(4, 95, True), (4, 90, True), (4, 80, False), (4, 50, False), (8, 75, True), (8, 50, False)],
)
def test_jpeg_drops_the_highest_frequency(amplitude, quality, survives):
    """Its step is 10, 20, 40, 50, 99 at quality 95, 90, 80, 75, 50: gone below half a step."""
    found = purify.jpeg(cosine_image(amplitude), quality).float()
    assert (found.std() > 1) == survives
    if not survives:
        assert ((found - 128).abs() <= 1).all()


@every_shape
def test_jpeg_keeps_what_it_should(shape):
    """A constant image but for 2 levels; less and less of noise; not the input itself."""
    flat = torch.full((3, *shape), 100, dtype=torch.uint8)
    for quality in (100, 50, 10):
        assert ((purify.jpeg(flat, quality).int() - 100).abs() <= 2).all()
    x = random_images(4, shape)
    before = x.clone()
    errors = [(purify.jpeg(x, q).float() - x.float()).square().mean() for q in (100, 75, 10)]
    assert errors == sorted(errors) and 0 < errors[0] < 4 and errors[2] > 100
    assert torch.equal(x, before) and purify.jpeg(x, 50).shape == x.shape
    alone = torch.cat([purify.jpeg(image[None], 50) for image in x])
    assert torch.equal(alone, purify.jpeg(x, 50))


def test_jpeg_does_not_subsample_colours():
    """Red and blue columns in turn: chroma at half the resolution would mix them."""
    x = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    x[:, 0, :, ::2] = x[:, 2, :, 1::2] = 200
    file = io.BytesIO()
    Image.fromarray(x[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
    mixed = np.abs(np.asarray(Image.open(file)).astype(int) - x[0].permute(1, 2, 0).numpy())
    kept = (purify.jpeg(x, 95).int() - x.int()).abs()
    assert kept.float().mean() < 5 and mixed.mean() > 30


# ===== Smoothing =====


@every_shape
@pytest.mark.parametrize("k", [3, 5, 9])
def test_median_is_scipys(shape, k):
    x = random_images(5, shape)
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, k, k), mode="mirror")
    np.testing.assert_array_equal(purify.median(x, k), expected)


@pytest.mark.parametrize("height, width, row, left", [
    (1, 1, 10, 0), (2, 2, 10, 0), (3, 3, 10, 5), (3, 3, 25, 8),
])  # fmt: skip
def test_median_of_a_white_patch(height, width, row, left):
    """A pixel and a 2 x 2 block vanish, 3 x 3 keeps a plus; in the corner 8 of 9 pixels stay."""
    x = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    x[..., row : row + height, row : row + width] = 255
    found = purify.median(x, 3)
    assert (found == 255).sum() == left and set(found.unique().tolist()) <= {0, 255}
    assert found[x == 0].max() == 0


@every_shape
@pytest.mark.parametrize("k, sigma", [(3, 0.8), (5, 1.1), (7, 1.4)])
def test_gaussian_against_scipy(shape, k, sigma):
    x = random_images(5, shape)
    at = np.arange(k) - k // 2
    kernel = np.exp(-(at**2) / (2 * sigma**2))
    expected = x.numpy().astype(np.float64)
    for axis in (2, 3):
        expected = ndimage.correlate1d(expected, kernel / kernel.sum(), axis, mode="mirror")
    assert np.abs(purify.gaussian(x, k).numpy() - expected).max() < 0.5 + 1e-3
    published = {3: [0.25, 0.5, 0.25], 5: [0.0625, 0.25, 0.375, 0.25, 0.0625]}
    if k in published:  # OpenCV rounds its small kernels
        np.testing.assert_allclose(kernel / kernel.sum(), published[k], atol=0.025)


@pytest.mark.parametrize("step", [purify.gaussian, purify.median])
@pytest.mark.parametrize("value", [0, 77, 255])
def test_smoothing_leaves_a_constant_image(step, value):
    x = torch.full((2, 3, 20, 23), value, dtype=torch.uint8)
    for k in (3, 5, 7):
        assert torch.equal(step(x, k), x)


# ===== Colour depth =====


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("rule", ["round", "trunc"])
def test_colour_depth(bits, rule):
    """2^c levels, the same a second time; the nearest level, or the multiple below."""
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = purify.colour_depth(x, bits, rule)
    assert found.dtype == torch.uint8 and len(found.unique()) == 2**bits
    assert torch.equal(purify.colour_depth(found, bits, rule), found)
    v = np.arange(256)
    if rule == "trunc":
        expected = v - v % 2 ** (8 - bits)
    else:
        levels = np.arange(2**bits) * 255 / (2**bits - 1)
        expected = np.rint(levels[np.abs(v[:, None] - levels).argmin(1)])
        assert {0, 255} <= set(found.unique().tolist())
    np.testing.assert_array_equal(found.flatten(), expected)
    if bits == 8:
        assert torch.equal(found, x)


@pytest.mark.parametrize("bits, shift", [(3, -15.5), (1, -63.5)])
def test_cutting_darkens(bits, shift):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    change = purify.colour_depth(x, bits, "trunc").float() - x
    assert change.mean() == shift
    assert (purify.colour_depth(x, bits, "round").float() - x).mean().abs() < 1e-5


# ===== Autoencoder =====


def test_autoencoder_learns_a_few_images():
    torch.manual_seed(0)
    x = smooth(shape=(3, 16, 16))
    network = purify.train_autoencoder(x, 48, 300, batch_size=8, lr=3e-3)
    error = (purify.autoencode(x, network).float() - x.float()).div(255).square().mean()
    assert error < 0.05 * to_float(x).var() and not network.training
    untrained = purify.Autoencoder(3, 48)
    before = (purify.autoencode(x, untrained).float() - x.float()).div(255).square().mean()
    assert before > 4 * error


@every_shape
@pytest.mark.parametrize("width", [48, 12, 4])
def test_autoencoder_narrows(shape, width):
    """Three halvings, with the sides rounded up; any side comes back."""
    network, seen = purify.Autoencoder(shape[0], width), []
    network.layers[5].register_forward_hook(lambda m, i, out: seen.append(out.shape))
    y = network(torch.rand(2, *shape))
    assert y.shape == (2, *shape) and y.min() >= 0 and y.max() <= 1
    assert seen == [(2, width, -(-shape[1] // 8), -(-shape[2] // 8))]


# ===== Choice, parts, the other order =====


@pytest.mark.parametrize("accuracies, best", [
    ([99, 98, 97, 20], 85), ([99, 98, 96.9, 20], 90), ([90, 80, 70, 20], None),
    ([99, 98, 96, 97], 80), ([97, 97, 97, 97], 80),
])  # fmt: skip
def test_strongest(accuracies, best):
    assert purify.strongest([100, 90, 85, 80], accuracies, 97) == best


def test_parts_change_nothing(monkeypatch):
    x, sizes = random_images(450, (1, 8, 8)), []

    def step(part):
        sizes.append(len(part))
        return purify.median(part, 3)

    assert torch.equal(purify.purify(x, step), purify.median(x, 3)) and sizes == [200, 200, 50]


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 36)])
def test_the_trigger_of_input_aware_is_its_own(shape):
    """Random generators, their BatchNorms too: the trigger of the attack's own functions."""
    torch.manual_seed(0)
    spec = (0.4,) * shape[0], (0.3,) * shape[0]
    networks = [Classifier(ia.Generator(shape[0], n), *spec) for n in (shape[0], 1)]
    for network in networks:
        for _ in range(3):
            network.train()(torch.rand(8, *shape))
        network.eval()
    trigger = {f"{kind}.{k}": v for kind, network in zip(("pattern", "mask"), networks)
               for k, v in network.state_dict().items()}  # fmt: skip
    victim = Classifier(torch.nn.Identity(), (0.1,) * shape[0], (0.9,) * shape[0])
    x = random_images(20, shape)
    patterns, masks = ia.triggers_of(x, networks)
    expected = to_uint8(ia.blend(to_float(x), patterns, masks))
    generators = purify.load_generators(trigger, victim, "model.pt")
    assert torch.equal(purify.input_aware(x, generators), expected)
    assert not torch.equal(expected, x)
    assert purify.load_generators({"mask": x, "pattern": x}, victim, "model.pt") is None


def test_generators_that_do_not_fit(one_line):
    victim = Classifier(torch.nn.Identity(), (0.1,), (0.9,))
    bad = {"pattern.x": torch.zeros(1), "mask.x": torch.zeros(1)}
    assert "generator" in one_line(purify.load_generators, bad, victim, "model.pt")


# ===== Runs =====


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A BadNets model of digits whose trigger is one white pixel off the edge."""
    cwd = tmp_path_factory.mktemp("pixel")
    flags = "--patch-size", 1, "--row", 2, "--column", 2, "--lr", 0.05, "--batch-size", 64
    flags += "--epochs", 8
    run_here("badnets", *flags, "--out", "victim", cwd=cwd)
    return cwd / "victim"


def test_filter_first_on_an_input_aware_victim(inline, unread, tmp_path):
    """With 8 bits the filter does nothing, and both orders are the attack itself."""
    flags = "--epochs", 1, "--train-images", 300, "--mask-steps", 2, "--out", "victim"
    inline("input_aware", *flags)
    flags = "--filter", "colour-depth", "--strengths", 8, 1
    ran = inline("purify", "--ckpt", "victim/model.pt", *flags)
    metrics = result_of(tmp_path / "victim" / "purify-s0")["metrics"]
    same, coarse = metrics["filters"]
    assert [same["strength"], coarse["strength"]] == [8, 1]
    assert same["asr_filter_first"] == same["asr"] == metrics["asr"]
    x = purify.colour_depth(ran["data"].x_test[ran["counts"]], 1, "round")
    x = purify.input_aware(x, ran["generators"])
    hits = (predict(ran["model"], x) == 0).float().mean()
    assert coarse["asr_filter_first"] == pytest.approx(100 * hits.item(), abs=1e-4)
    assert len(x.unique()) > 2  # the trigger is not filtered


def test_images_are_the_defenders(inline, digits, victim, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy",
                        lambda made, x: seen.append(x) or (made - x).square().mean())  # fmt: skip
    flags = "--filter", "autoencoder", "--strengths", 4, 8, "--autoencoder-steps", 3
    ran = inline("purify", "--ckpt", victim, "--out", tmp_path / "out", *flags)
    own, held = ({i.numpy().tobytes() for i in ran[name]} for name in ("x_own", "x_held"))
    share = {i.numpy().tobytes() for i in digits.x_train[ran["split"]]}
    assert own | held == share and len(ran["x_own"]) == 481 and len(ran["x_held"]) == 120
    trained = {i.numpy().tobytes() for x in seen for i in to_uint8(x)}
    assert len(seen) == 6 and trained <= own and not trained & (held - own)
    strengths = [row["strength"] for row in ran["rows"]]
    assert strengths == [8, 4]  # from weak to strong, however they were given


@pytest.mark.drawn
def test_run(victim, tmp_path):
    """The median removes the pixel, fine JPEG does not; the table is that of result.json."""
    out, before = tmp_path / "out", files_below(victim)
    flags = "--ckpt", victim, "--out", out, "--autoencoder-steps", 25
    printed = run_here("purify", *flags, cwd=tmp_path)
    metrics = result_of(out)["metrics"]
    assert metrics["asr"] > 95 and metrics["filters"][0]["asr"] > 95  # JPEG at quality 100
    assert metrics["asr_median"] < 2 and metrics["clean_accuracy_median"] > 95
    median = next(row for row in metrics["filters"] if row["filter"] == "median")
    assert median["robust_accuracy"] > 95
    with (out / "filters.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["filter", "strength", "held_out_accuracy", "clean_accuracy"]
    named = {name: [int(r["strength"]) for r in rows if r["filter"] == name]
             for name in purify.STRENGTHS}  # fmt: skip
    assert named == {name: list(strengths) for name, strengths in purify.STRENGTHS.items()}
    for row, kept in zip(rows, metrics["filters"]):
        for key in ("held_out_accuracy", "clean_accuracy", "asr", "robust_accuracy"):
            assert float(row[key]) == kept[key]
        assert "asr_filter_first" not in kept
    suspect = loaded(victim)
    sets = {"clean_accuracy": (suspect.data.x_test, suspect.data.y_test)}
    sets |= {"asr": (suspect.x_poisoned, suspect.y_target)}
    sets |= {"robust_accuracy": (suspect.x_poisoned, suspect.y_true)}
    for key, (x, y) in sets.items():  # the median of 3 x 3, by SciPy, as the model reads it
        x = torch.from_numpy(ndimage.median_filter(x.numpy(), (1, 1, 3, 3), mode="mirror"))
        assert median[key] == pytest.approx(accuracy(suspect.model, x, y), abs=1e-4)
    for name in purify.STRENGTHS:
        part = [row for row in metrics["filters"] if row["filter"] == name]
        good = [r for r in part if r["held_out_accuracy"] >= metrics["held_out_accuracy"] - 2]
        assert metrics[f"strength_{name}"] == (good[-1]["strength"] if good else None)
        if good:
            assert metrics[f"asr_{name}"] == good[-1]["asr"]
            assert metrics[f"clean_accuracy_{name}"] == good[-1]["clean_accuracy"]
    assert "not measured" in printed and "RESULT purify " in printed
    assert files_below(out) == ["curve.png", "filters.csv", "result.json"]
    assert files_below(victim) == before


@pytest.mark.parametrize("bare", [False, True])
def test_without_triggered_images(inline, victim, tmp_path, capfd, bare):
    shutil.copy(victim / "model.pt", tmp_path)
    own = "--arch", "mnist_cnn", "--dataset", "digits"
    if bare:
        torch.save(loaded(victim).model.net.state_dict(), tmp_path / "model.pt")
    flags = "--ckpt", "model.pt", *(own if bare else ())
    inline("purify", *flags, "--out", "out", "--filter", "median")
    metrics = result_of(tmp_path / "out")["metrics"]
    assert set(metrics["filters"][0]) == {
        "filter", "strength", "held_out_accuracy", "clean_accuracy",
    }  # fmt: skip
    assert "asr" not in metrics and "cannot be measured" in capfd.readouterr().out
    rows = {row["strength"]: row for row in metrics["filters"]}
    chosen = rows[metrics["strength_median"]]
    assert math.isclose(metrics["clean_accuracy_median"], chosen["clean_accuracy"])


@pytest.mark.parametrize(
    "args, named",
    [
        (["--filter", "jpeg", "--strengths", 0], "1 to 100"),
        (["--filter", "jpeg", "--strengths", 50, 101], "1 to 100"),
        (["--filter", "median", "--strengths", 4], "3 to 11 in steps of 2"),
        (["--filter", "gaussian", "--strengths", -3], "3 to 31"),
        (["--filter", "gaussian", "--strengths", 29], "larger than"),
        (["--filter", "colour-depth", "--strengths", 9], "1 to 8"),
        (["--filter", "autoencoder", "--strengths", 6], "steps of 4"),
        (["--strengths", 3], "--filter"),
        (["--max-drop", -1], "max-drop"),
        (["--max-drop", "nan"], "max-drop"),
        (["--autoencoder-steps", 0], "autoencoder-steps"),
        (["--data-fraction", 0], "share"),
        (["--data-fraction", 0.001], "held out"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input(inline, one_line, victim, tmp_path, args, named):
    flags = "--ckpt", victim, "--out", tmp_path / "out", *args
    assert named in one_line(inline, "purify", *flags)
    assert list(tmp_path.iterdir()) == []


def test_rounding_and_what_a_filter_may_cost(inline, digits_badnets, tmp_path):
    """One bit cut off leaves the levels 0 and 128; a wide window is taken where it may cost all."""
    own = "--ckpt", digits_badnets, "--out", tmp_path / "out", "--filter"
    ran = inline("purify", *own, "colour-depth", "--strengths", 1, "--rounding", "trunc")
    assert ran["steps"][0](ran["x_held"]).unique().tolist() == [0, 128]
    ran = inline("purify", *own, "gaussian", "--strengths", 3, 27, "--max-drop", 100)
    assert ran["before"] - ran["rows"][-1]["held_out_accuracy"] > 2
    assert ran["metrics"]["strength_gaussian"] == 27


@pytest.mark.parametrize("trigger", [{1: torch.ones(1)}, {"pattern.0": torch.ones(1)}])
def test_a_trigger_that_is_none(inline, one_line, digits_badnets, tmp_path, trigger):
    """A name that is no text draws no trigger; generators that do not fit are refused."""
    victim, out = tmp_path / "victim", tmp_path / "out"
    shutil.copytree(digits_badnets, victim, ignore=shutil.ignore_patterns("*-s0"))
    held = torch.load(victim / "model.pt", weights_only=True)
    torch.save(held | {"trigger": trigger}, victim / "model.pt")
    flags = "--ckpt", victim, "--out", out, "--filter", "colour-depth", "--strengths", 8
    if 1 in trigger:
        assert inline("purify", *flags)["generators"] is None
    else:
        assert "pattern. generator" in one_line(inline, "purify", *flags)
        assert not out.exists()  # before a filter is tried
