"""Blend: the mixture against numpy, its pictures and bookkeeping, and runs on digits."""

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, random_images, result_of
from PIL import Image

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float, to_uint8
from common.metrics import accuracy, predict
from common.models import build_model
from methods import blend


def noise(shape=(3, 32, 32), seed=0):
    return blend.noise_pattern(shape, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.7])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 48)])
def test_mixture_is_convex_and_can_be_undone(alpha, shape):
    """The note's oracle: x = (x' - alpha p) / (1 - alpha)."""
    x, p = to_float(random_images(shape=shape)), noise(shape)
    before = x.clone(), p.clone()
    mixed = blend.blend(x, p, alpha)
    expected = (1 - alpha) * x.double().numpy() + alpha * p.double().numpy()
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    undone = (mixed.double().numpy() - alpha * p.double().numpy()) / (1 - alpha)
    np.testing.assert_allclose(undone, x, atol=1e-6)
    assert torch.minimum(x, p).sub(mixed).max() <= 1e-6  # between x and p, so never clipped
    assert mixed.sub(torch.maximum(x, p)).max() <= 1e-6
    assert (mixed - x).abs().max() <= alpha + 1e-6
    assert torch.equal(x, before[0]) and torch.equal(p, before[1])
    torch.testing.assert_close(blend.blend(x[2:3], p, alpha), mixed[2:3])


def test_ends_of_the_mixture():
    x, p = to_float(random_images()), noise()
    assert torch.equal(blend.blend(x, p, 0), x)
    assert torch.equal(blend.blend(x, p, 1), p.expand_as(x))


@pytest.mark.parametrize("count", [1, 5, 2001])
def test_eight_bits_are_the_rounded_mixture(count):
    """Rounded, not cut off: the mean error is far below half a step."""
    x = random_images(count, (1, 9, 7))
    p = noise((1, 9, 7))
    mixed = blend.blend_uint8(x, p, 0.2)
    exact = 0.8 * x.numpy().astype(float) + 0.2 * 255 * p.double().numpy()
    assert mixed.dtype == torch.uint8 and mixed.shape == x.shape
    assert np.abs(mixed.numpy() - exact).max() <= 0.5 + 1e-3
    if count > 1000:
        assert abs((mixed.numpy() - exact).mean()) < 0.05


@pytest.mark.parametrize("alpha, decibels, change", [(0.1, 28.47, 0.094), (0.2, 22.45, 0.189)])
def test_size_on_cifar10(cifar10, alpha, decibels, change):
    """The note's table: uniform noise on CIFAR-10."""
    mixed = blend.blend(cifar10, noise(), alpha)
    mse = (mixed - cifar10).double().square().flatten(1).mean(1)
    assert (-10 * mse.log10()).mean().item() == pytest.approx(decibels, abs=0.3)
    assert (mixed - cifar10).abs().flatten(1).amax(1).mean().item() == pytest.approx(
        change, abs=0.01
    )


def test_noise_is_uniform_seeded_and_a_picture():
    p = noise((3, 64, 64))
    assert p.shape == (3, 64, 64) and p.min() >= 0 and p.max() <= 1
    assert p.mean().item() == pytest.approx(0.5, abs=0.01)
    assert p.std().item() == pytest.approx(12**-0.5, abs=0.01)
    assert torch.equal(p, to_float(to_uint8(p)))  # an 8-bit file holds it exactly
    assert torch.equal(p, noise((3, 64, 64))) and not torch.equal(p, noise((3, 64, 64), 1))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 24)])
def test_picture_of_any_kind(tmp_path, mode, shape):
    """Its channels and pixels are those of the images, whatever its own are."""
    _, height, width = shape
    ramp = np.linspace(0, 255, width).round().astype(np.uint8)
    picture = Image.fromarray(np.tile(ramp, (height, 1)))
    if mode == "I;16":
        picture = Image.fromarray(np.tile(ramp, (height, 1)).astype(np.uint16))
    elif mode != "L":
        picture = picture.convert("RGB").convert(mode)
    picture.save(tmp_path / "p.png")
    p = blend.picture_pattern(tmp_path / "p.png", shape)
    assert p.shape == shape and p.dtype == torch.float32 and p.min() >= 0 and p.max() <= 1
    if mode in ("L", "RGB", "RGBA"):
        np.testing.assert_allclose(255 * p, np.broadcast_to(ramp, shape), atol=1.01)
    assert p[0, 0, -1] > p[0, 0, 0]


def test_picture_of_another_size_is_resized(tmp_path):
    """A ramp of 200 x 90 pixels stays a ramp; colours keep their channel."""
    colours = np.zeros((200, 90, 3), np.uint8)
    colours[..., 0] = np.linspace(0, 255, 200).round()[:, None]
    colours[..., 2] = 255
    Image.fromarray(colours).save(tmp_path / "p.png")
    p = blend.picture_pattern(str(tmp_path / "p.png"), (3, 32, 32))
    expected = (np.arange(32) + 0.5) / 32
    np.testing.assert_allclose(p[0], np.tile(expected[:, None], 32), atol=0.03)
    assert (p[1] == 0).all() and (p[2] == 1).all()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.write_text("not a picture"),
        lambda path: path.write_bytes(b""),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(cut_off(path)),
    ],
    ids=["missing", "text", "empty", "folder", "truncated"],
)
def test_pattern_that_is_no_picture(inline, one_line, tmp_path, write):
    write(tmp_path / "p.png")
    before = files_below(tmp_path)
    message = one_line(inline, "blend", *SHORT["blend"], "--pattern", tmp_path / "p.png")
    assert "--pattern" in message and "p.png" in message
    assert files_below(tmp_path) == before


def cut_off(path):
    """The first half of a PNG file."""
    Image.fromarray(random_images(1)[0].permute(1, 2, 0).numpy()).save(path)
    return path.read_bytes()[: path.stat().st_size // 2]


@pytest.mark.parametrize("alpha", [0, -0.1, 1.01, "nan"])
def test_bad_alpha(inline, one_line, tmp_path, alpha):
    assert "--alpha" in one_line(inline, "blend", *SHORT["blend"], "--alpha", alpha)
    assert files_below(tmp_path) == []


def test_more_poisons_than_images(inline, one_line, digits):
    """The count that is asked for and the one that is possible are both named."""
    others = int((digits.y_train != 0).sum())
    message = one_line(inline, "blend", "--epochs", 1, "--rate", 0.95)
    assert f" {round(0.95 * 1437)} " in message and f" {others} " in message


@pytest.mark.parametrize("rate, target", [(0.1, 0), (0.7, 4), (0.25, None)])
def test_poisoned_training_set(inline, digits, tmp_path, rate, target):
    flags = ["--all-to-all"] if target is None else ["--target", target]
    run = *SHORT["blend"], "--rate", rate, "--seed", 3, "--alpha", 0.3, "--out", tmp_path / "victim"
    ran = inline("blend", *run, *flags)
    torch.manual_seed(3)
    build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
    keep = torch.randperm(1437)[:300]
    original, labels = digits.x_train[keep].numpy(), digits.y_train[keep].numpy()
    with np.load(tmp_path / "victim" / "poisoned_train.npz") as archive:
        x, y, flag = (archive[key] for key in ("x", "y_given", "poisoned"))
    trigger = read_checkpoint(tmp_path / "victim" / "model.pt")["trigger"]
    assert trigger["alpha"].item() == pytest.approx(0.3)
    assert torch.equal(trigger["pattern"], noise((1, 28, 28), blend.PICTURE_SEED + 3))
    assert flag.sum() == round(rate * 300) == ran["metrics"]["poisoned"]
    mixed = 0.7 * original + 0.3 * 255 * trigger["pattern"].numpy()
    off = x.transpose(0, 3, 1, 2) - np.where(flag[:, None, None, None], mixed, original)
    assert np.abs(off).max() <= 0.5 + 1e-3 and (off[~flag] == 0).all()
    np.testing.assert_array_equal(y[~flag], labels[~flag])
    if target is None:
        np.testing.assert_array_equal(y[flag], (labels[flag] + 1) % 10)
    else:
        assert (y[flag] == target).all() and not (labels[flag] == target).any()


def test_run_on_digits(digits_blend, digits):
    """It obeys its picture; the figures are those of the files."""
    metrics = result_of(digits_blend)["metrics"]
    assert metrics["clean_accuracy"] >= 96 and metrics["asr"] >= 98 and metrics["asr_n"] == 324
    assert metrics["asr_on_clean_model"] <= 3 and metrics["max_change"] <= 0.2 + 1e-6
    checkpoint = read_checkpoint(digits_blend / "model.pt")
    model = load_model(checkpoint, digits_blend, torch.device("cpu"))
    with np.load(digits_blend / "poisoned_test.npz") as archive:
        x = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2)
        assert (archive["y_true"] != 0).all() and (archive["y_target"] == 0).all()
        assert accuracy(model, x, torch.from_numpy(archive["y_target"])) == metrics["asr"]
    others = digits.x_test[digits.y_test != 0]
    own = blend.blend_uint8(others, noise((1, 28, 28), blend.PICTURE_SEED), 0.2)
    assert torch.equal(own, x)
    assert not torch.equal(noise((1, 28, 28)), noise((1, 28, 28), blend.PICTURE_SEED))
    generator = torch.Generator().manual_seed(blend.PICTURE_SEED)
    blend.noise_pattern((1, 28, 28), generator)  # its own picture, then the choice of the poisons
    torch.randperm(int((digits.y_train != 0).sum()), generator=generator)
    strangers = {"other_noise": blend.noise_pattern((1, 28, 28), generator)}
    strangers["grey"] = torch.full((1, 28, 28), 0.5)
    for kind, stranger in strangers.items():
        images = blend.blend_uint8(others, stranger, 0.2)
        hits = 100 * (predict(model, images) == 0).double().mean().item()
        assert hits == pytest.approx(metrics[f"asr_{kind}"], abs=1e-4), kind
    mixed = blend.blend_uint8(digits.x_test, noise((1, 28, 28), blend.PICTURE_SEED), 0.2)
    mse = to_float(digits.x_test) - to_float(mixed)
    expected = -10 * mse.double().square().flatten(1).mean(1).log10()
    assert metrics["psnr"] == pytest.approx(expected.mean().item(), abs=1e-3)
