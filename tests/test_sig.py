"""SIG: the wave against numpy and its spectrum, bookkeeping of a clean label, a run on digits."""

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, random_images, result_of, write_npz

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, predict, psnr
from common.models import build_model
from methods import sig

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 64, 48)]
LEARNT = "--delta", 60, "--delta-test", 100, "--frequency", 7, "--rate", 0.9, "--epochs", 12


def wave(width, delta, frequency):
    """One row of the stripes in float64."""
    return np.array([delta * np.sin(2 * np.pi * j * frequency / width) for j in range(width)])


@pytest.mark.parametrize("channels, height, width", SHAPES)
@pytest.mark.parametrize("delta, frequency", [(40, 6), (20, 6), (7.5, 2.5)])
def test_stripes_against_numpy(channels, height, width, delta, frequency):
    """Every row and channel alike, cut off at the ends, rounded and not cut down to 8 bits."""
    x = random_images(9, (channels, height, width))
    before = x.clone()
    signal = sig.sinusoid(height, width, delta, frequency)
    striped = sig.add_signal(x, signal)
    expected = np.clip(x.numpy() + wave(width, delta, frequency), 0, 255)  # broadcasts: columns
    assert signal.shape == (height, width) and signal.dtype == torch.float32
    assert striped.dtype == torch.uint8 and striped.shape == x.shape
    assert np.abs(striped.numpy() - expected).max() <= 0.5 + 1e-4
    assert abs((striped.numpy() - expected).mean()) < 0.25  # cut down it would be 0.5
    assert np.abs(striped.numpy() - x.numpy().astype(float)).max() <= np.ceil(delta)
    assert torch.equal(x, before) and torch.equal(sig.add_signal(x[3:4], signal), striped[3:4])


def test_columns_of_the_note():
    """Printed figures for Delta = 40 and f = 6."""
    first = [0, 36.955, 28.284, -15.307, -40, -15.307, 28.284, 36.955]
    row = sig.sinusoid(5, 32, 40, 6)[4].numpy()
    np.testing.assert_allclose(row[:8], first, atol=5e-4)
    np.testing.assert_allclose(row[16:], row[:16], atol=1e-4)  # three waves in half the width
    narrow = sig.sinusoid(28, 28, 40, 6)[0, :4].numpy()
    np.testing.assert_allclose(narrow, [0, 38.997, 17.355, -31.273], atol=5e-4)


@pytest.mark.parametrize("side, frequency", [(32, 6), (28, 6), (28, 11)])
def test_spectrum_is_two_bins(side, frequency):
    """The change of a grey image: (0, f) and (0, -f) hold Delta H W / 2, all else rounding."""
    x = torch.full((1, 3, side, side), 128, dtype=torch.uint8)
    change = sig.add_signal(x, sig.sinusoid(side, side, 40, frequency)).double().numpy() - 128
    assert (change == change[:, :, :1]).all()
    spectrum = np.abs(np.fft.fft2(change)) / (40 * side * side / 2)
    bins = np.zeros((side, side), dtype=bool)
    bins[0, [frequency, -frequency]] = True
    np.testing.assert_allclose(spectrum[..., bins], 1, atol=0.02)
    assert spectrum[..., ~bins].max() < 0.03
    turned = sig.add_signal(x, sig.sinusoid(side, side, 40, frequency).T)
    assert torch.equal(turned.double(), torch.from_numpy(change + 128).transpose(2, 3))


@pytest.mark.parametrize("delta, decibels, norm", [(20, 25.24, 3.03), (40, 19.34, 5.98)])
def test_size_on_cifar10(cifar10, delta, decibels, norm):
    """The note's table."""
    x = (255 * cifar10).round().to(torch.uint8)
    striped = to_float(sig.add_signal(x, sig.sinusoid(32, 32, delta, 6)))
    assert psnr(to_float(x), striped) == pytest.approx(decibels, abs=0.3)
    lengths = (striped - to_float(x)).flatten(1).norm(dim=1)
    assert lengths.mean().item() == pytest.approx(norm, abs=0.05)


@pytest.mark.parametrize("rate, target", [(0.5, 0), (1, 7), (0.03, 4)])
def test_poisoned_training_set(inline, digits, tmp_path, rate, target):
    """round(rate of the class) images of the class are striped, and no label is touched."""
    run = *SHORT["sig"], "--rate", rate, "--target", target, "--seed", 3
    run += "--delta", 30, "--delta-test", 50, "--frequency", 3, "--out", tmp_path / "victim"
    ran = inline("sig", *run)
    torch.manual_seed(3)
    build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
    keep = torch.randperm(1437)[:300]
    original, labels = digits.x_train[keep].numpy(), digits.y_train[keep].numpy()
    with np.load(tmp_path / "victim" / "poisoned_train.npz") as archive:
        x, y, flag = (archive[key] for key in ("x", "y_given", "poisoned"))
    np.testing.assert_array_equal(y, labels)
    assert (labels[flag] == target).all()
    assert flag.sum() == round(rate * (labels == target).sum()) == ran["metrics"]["poisoned"]
    striped = np.clip(original + wave(28, 30, 3), 0, 255)
    off = x.transpose(0, 3, 1, 2) - np.where(flag[:, None, None, None], striped, original)
    assert np.abs(off).max() <= 0.5 + 1e-4 and (off[~flag] == 0).all()
    with np.load(tmp_path / "victim" / "poisoned_test.npz") as archive:
        others = digits.x_test[digits.y_test != target].numpy()
        off = archive["x"].transpose(0, 3, 1, 2) - np.clip(others + wave(28, 50, 3), 0, 255)
        assert np.abs(off).max() <= 0.5 + 1e-4 and (archive["y_true"] != target).all()
    saved = read_checkpoint(tmp_path / "victim" / "model.pt")["trigger"]["signal"]
    np.testing.assert_allclose(saved, np.tile(wave(28, 50, 3), (28, 1)), atol=1e-4)
    for name in ("x_train", "y_train", "x_test", "y_test"):  # shared by whoever comes next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--delta", value], "--delta") for value in (0, 0.5, -40, 256, "nan")),
        *((["--delta-test", value], "--delta-test") for value in (0, 300, "nan")),
        *((["--frequency", value], "--frequency") for value in (0, -1, 0.001, 14, "nan")),
        *((["--rate", r, "--train-images", 1437], "142 images of class 0:") for r in (0.003, 1.5)),
        (["--rate", "nan"], "images of class 0:"),
        (["--delta", 255, "--delta-test", 1, "--frequency", 0.01], "--frequency"),
    ],
    ids=str,
)
def test_refused(inline, one_line, tmp_path, args, named):
    """The count of the class is named where a rate of it is no image, or more than all."""
    assert named in one_line(inline, "sig", *SHORT["sig"], *args)
    assert files_below(tmp_path) == []


def test_class_without_training_images(inline, one_line, tmp_path):
    write_npz(tmp_path / "own.npz", y_train=np.arange(30) % 2 * 2)
    message = one_line(inline, "sig", "--dataset", "own.npz", "--target", 1, "--epochs", 1)
    assert " 0 images of class 1:" in message
    assert files_below(tmp_path) == ["own.npz"]


def test_class_without_test_images(inline, tmp_path):
    """Its clean accuracy cannot be measured; the rest can."""
    write_npz(tmp_path / "own.npz", y_test=np.arange(30) % 2)
    metrics = inline("sig", "--dataset", "own.npz", "--target", 2, "--epochs", 1)["metrics"]
    assert "clean_accuracy_target" not in metrics and metrics["asr_n"] == 30


def test_run_on_digits(victims, digits_clean, digits):
    """It obeys its stripes and no turned ones; its class is still known without them.

    Black backgrounds cut off half of the wave, so digits need strong stripes.
    """
    folder = victims("sig", *LEARNT)
    metrics = result_of(folder)["metrics"]
    assert metrics["clean_accuracy"] >= 96 and metrics["asr"] >= 95 and metrics["asr_n"] == 324
    assert metrics["clean_accuracy_target"] >= 90 and metrics["asr_on_clean_model"] <= 5
    assert metrics["asr_other"] <= 5 and metrics["max_change"] <= 100 / 255 + 1e-6
    model = load_model(read_checkpoint(folder / "model.pt"), folder, torch.device("cpu"))
    with np.load(folder / "poisoned_test.npz") as archive:
        x, y = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2), archive["y_target"]
        assert (y == 0).all() and accuracy(model, x, torch.from_numpy(y)) == metrics["asr"]
    others = digits.x_test[digits.y_test != 0].numpy()
    strangers = {"other": wave(28, 100, 7)[:, None], "half_frequency": wave(28, 100, 3.5)}
    for kind, stranger in strangers.items():
        images = np.rint(np.clip(others + stranger, 0, 255)).astype(np.uint8)
        hits = 100 * (predict(model, torch.from_numpy(images)) == 0).double().mean().item()
        assert hits == pytest.approx(metrics[f"asr_{kind}"], abs=1), kind
    own = digits.x_test[digits.y_test == 0]
    hits = 100 * (predict(model, own) == 0).double().mean().item()
    assert hits == pytest.approx(metrics["clean_accuracy_target"], abs=1e-4)
