"""Poison Ink: edges against SciPy, the interference and the losses by hand, runs on digits."""

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, random_images, result_of, run_inline, write_npz
from scipy.ndimage import affine_transform, sobel

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy
from common.models import UNet
from methods import poison_ink

NAME = "poison_ink"
FLAGS = "--encoder-steps", 30, "--encoder-batch", 8, "--encoder-lr", 0.015, "--width", 4
FLAGS += "--epsilon", 16, "--rate", 0.2, "--epochs", 7, "--batch-size", 64, "--lr", 0.03


def encoder_of(channels=1, width=4):
    torch.manual_seed(0)
    return UNet(2 * channels, width, channels).eval().requires_grad_(False)


def decoder_of(channels=1, width=4):
    torch.manual_seed(1)
    return UNet(channels, width).eval().requires_grad_(False)


# ===== The trigger image =====


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 24), (3, 5, 6)])
@pytest.mark.parametrize("threshold", [0.5, 28, 50])
def test_edges_against_scipy(shape, threshold):
    x = to_float(random_images(shape=shape)) * torch.linspace(0.1, 1, 6).view(-1, 1, 1, 1)
    found = poison_ink.edges(x, threshold)
    assert found.shape == (6, 1, *shape[1:]) and found.dtype == torch.float32
    for image, edge in zip(x.double().numpy(), found[:, 0].numpy()):
        grey = image[0] if len(image) == 1 else np.tensordot([0.299, 0.587, 0.114], image, 1)
        row, column = (sobel(255 * grey, axis=axis, mode="reflect") / 4 for axis in (0, 1))
        length = np.sqrt((row**2 + column**2) / 2)
        clear = np.abs(length - threshold) > 1e-3
        np.testing.assert_array_equal(edge[clear], (length > threshold)[clear])
    assert 0 < found.mean() < 1


def test_a_step_from_black_to_white_is_255_over_the_root_of_two():
    x = torch.zeros(1, 1, 6, 6)
    x[..., 3:] = 1
    for threshold, count in ((180, 12), (181, 0)):
        assert poison_ink.edges(x, threshold).sum() == count
    assert not poison_ink.edges(torch.full((1, 3, 6, 6), 0.7), 1e-3).any()


def test_trigger_image_is_ink_on_white():
    edge = (torch.rand(4, 1, 9, 7) > 0.5).float()
    ink = torch.rand(4, 3)
    images = poison_ink.trigger_image(edge, ink).numpy()
    for image, mask, colour in zip(images, edge[:, 0].numpy(), ink.numpy()):
        expected = np.where(mask[None] == 1, colour[:, None, None], 1.0)
        np.testing.assert_allclose(image, expected, atol=1e-6)
    same = poison_ink.trigger_image(edge, ink[1])
    assert torch.equal(same[1], torch.from_numpy(images[1]))
    assert torch.equal(poison_ink.trigger_image(edge, torch.ones(3)), torch.ones(4, 3, 9, 7))


def test_inks():
    ink = poison_ink.ink_of([80, 160, 20], 3)
    assert ink.tolist() == pytest.approx([80 / 255, 160 / 255, 20 / 255])
    grey = poison_ink.ink_of([80, 160, 80], 1)
    assert grey.shape == (1,) and grey.item() * 255 == pytest.approx(126.96, abs=1e-3)
    torch.manual_seed(0)
    drawn = (255 * poison_ink.draw_inks(600, 3)).round()
    assert drawn.shape == (600, 3) and {*drawn.flatten().tolist()} == {40, 80, 120, 160, 200}
    assert len(drawn.unique(dim=0)) > 100  # channel by channel
    ink = torch.tensor([80.0, 160.0, 80.0]) / 255
    assert torch.allclose(255 * poison_ink.other_ink(ink), torch.tensor([200.0, 40.0, 200.0]))
    assert 255 * poison_ink.other_ink(torch.tensor([127 / 255])) == 40  # of a grey image


# ===== Hiding =====


@pytest.mark.parametrize("channels", [1, 3])
def test_hiding_against_numpy(channels):
    """clip(x + eps (2 U - 1)), rounded, no change above eps, in one batch or singly."""
    encoder, x = encoder_of(channels), random_images(5, (channels, 26, 30))
    before, edge = x.clone(), poison_ink.edges(to_float(x), 90)
    ink, epsilon = poison_ink.ink_of([80, 160, 80], channels), 20 / 255
    hidden = poison_ink.hide_uint8(encoder, x, edge, ink, epsilon)
    trigger = poison_ink.trigger_image(edge, ink)
    drawn = encoder(torch.cat((to_float(x), trigger), 1)).double().numpy()
    exact = np.clip(x.numpy() + 20 * (2 * drawn - 1), 0, 255)
    assert hidden.dtype == torch.uint8 and torch.equal(x, before)
    assert np.abs(hidden.numpy() - exact).max() <= 0.5 + 1e-3
    assert (hidden.int() - x.int()).abs().max() <= 20 and not torch.equal(hidden, x)
    singly = [
        poison_ink.hide_uint8(encoder, x[i : i + 1], edge[i : i + 1], ink, epsilon)
        for i in range(5)
    ]
    assert (torch.cat(singly).int() - hidden.int()).abs().max() <= 1
    assert torch.equal(poison_ink.hide_uint8(encoder, x, edge, ink, 0.0), x)  # does nothing


def test_ink_error_counts_edges_alone():
    decoder, x = decoder_of(3), random_images(4, (3, 12, 12))
    edge, ink = (torch.rand(4, 1, 12, 12) > 0.6).float(), torch.tensor([0.1, 0.5, 0.9])
    read = decoder(to_float(x)).double().numpy()
    off = np.abs(read - ink.numpy()[:, None, None]).mean(1)[edge[:, 0].numpy() == 1]
    found = poison_ink.ink_error(decoder, x, edge, ink)
    assert found == pytest.approx(255 * off.mean(), rel=1e-4)


# ===== The interference layer =====


def maps(stage, count=600, height=24, width=36):
    torch.manual_seed(0)
    return poison_ink.interference(count, stage, height, width).double().numpy()


def decomposed(theta, height=24, width=36):
    """Angle, zoom, mirror and shift of the maps, in pixels rather than in half sides."""
    sides = np.array([width, height]) / 2
    linear = theta[:, :, :2] * sides[:, None] / sides
    determinant = np.linalg.det(linear)
    zoom, mirror = np.sqrt(np.abs(determinant)), np.sign(determinant)
    angle = np.degrees(np.arctan2(-linear[:, 0, 1], linear[:, 1, 1]))
    return angle, zoom, mirror, theta[:, :, 2], linear


@pytest.mark.parametrize("stage", range(4))
def test_each_stage_adds_a_distortion_for_half_of_the_images(stage):
    angle, zoom, mirror, shift, linear = decomposed(maps(stage))
    turned, cropped, flipped = np.abs(angle) > 1e-4, zoom < 0.99, mirror < 0
    for k, happened in enumerate((turned, cropped, flipped), start=1):
        share = happened.mean()
        assert 0.42 < share < 0.58 if stage >= k else share == 0
    assert np.abs(angle).max() <= 15 + 1e-3 and (stage < 1 or np.abs(angle).max() > 13)
    np.testing.assert_allclose(zoom[cropped], 28 / 32, atol=1e-5)
    assert (shift[~cropped] == 0).all() and np.abs(shift).max() <= 1 / 8 + 1e-6
    # a rotation, a mirror and a zoom: L L^T = zoom^2, also where the sides differ
    square = linear @ linear.transpose(0, 2, 1) / zoom[:, None, None] ** 2
    np.testing.assert_allclose(square, np.broadcast_to(np.eye(2), square.shape), atol=1e-5)
    if stage == 0:
        np.testing.assert_array_equal(maps(0), np.broadcast_to(np.eye(2, 3), (600, 2, 3)))
    if stage == 3:  # independent coins
        assert 0.18 < (turned & cropped).mean() < 0.32 and 0.18 < (cropped & flipped).mean() < 0.32


@pytest.mark.parametrize("stage", [0, 3])
def test_warp_against_scipy(stage):
    torch.manual_seed(0)
    x, theta = torch.rand(8, 2, 15, 20), poison_ink.interference(8, stage, 15, 20)
    warped = poison_ink.warp(x, theta)
    if stage == 0:
        torch.testing.assert_close(warped, x, rtol=0, atol=1e-5)
    half, centre = np.array([15, 20]) / 2, np.array([7.0, 9.5])
    for image, moved, m in zip(x.numpy(), warped.numpy(), theta.double().numpy()):
        linear = m[::-1, 1::-1] * half[:, None] / half  # (row, column) in pixels
        offset = centre + m[::-1, 2] * half - linear @ centre
        for a, b in zip(image, moved):
            expected = affine_transform(
                a.astype(float), linear, offset, order=1, mode="grid-constant"
            )
            np.testing.assert_allclose(b, expected, atol=1e-4)


# ===== The losses =====


def test_losses_by_hand():
    """Undistorted: cover, 13 times the edges' squares and the others', 10 times those of clean."""
    torch.manual_seed(0)
    x, hidden, trigger = torch.rand(3, 6, 3, 8, 8)
    edge = (torch.rand(6, 1, 8, 8) > 0.5).float()
    theta = torch.eye(2, 3).expand(6, 2, 3)

    def decoder(images):
        return 0.8 * images + 0.1

    cover, extraction, clean = poison_ink.losses(decoder, hidden, x, trigger, edge, theta).tolist()
    h, c, t, e = (a.double().numpy() for a in (hidden, x, trigger, edge))
    assert cover == pytest.approx(((h - c) ** 2).mean(), rel=1e-4)
    assert clean == pytest.approx(10 * ((0.8 * c + 0.1 - 1) ** 2).mean(), rel=5e-3)
    weight = np.where(e == 1, 13, 1)
    assert extraction == pytest.approx((weight * (0.8 * h + 0.1 - t) ** 2).mean(), rel=5e-3)


def test_hidden_and_trigger_image_are_distorted_alike():
    """A decoder that shows what it gets has nothing to lose when hidden = trigger image, inside."""
    torch.manual_seed(0)
    edge = torch.zeros(40, 1, 16, 16)
    edge[:, :, 5:11, 5:11] = 1
    trigger = poison_ink.trigger_image(edge, poison_ink.draw_inks(40, 3))
    theta, seen = poison_ink.interference(40, 3, 16, 16), []

    def decoder(images):
        seen.append(images)
        return images

    poison_ink.losses(decoder, trigger, trigger, trigger, edge, theta)
    torch.testing.assert_close(seen[0][40:], seen[0][:40])  # clean images are distorted alike
    inside = poison_ink.warp(torch.ones(40, 3, 16, 16), theta) > 0.999  # black comes in
    shown, expected = seen[0][:40], 1 - poison_ink.warp(1 - trigger, theta)
    assert (shown - expected)[inside].abs().max() < 0.51 / 255 and inside.float().mean() > 0.8
    moved = (expected - trigger).abs().flatten(1).amax(1) > 0.1
    assert 0.5 < moved.float().mean() < 1


def test_bound_falls_and_only_the_two_networks_learn(monkeypatch):
    bounds, x = [], random_images(9, (1, 12, 12))
    hide = poison_ink.hide
    monkeypatch.setattr(
        poison_ink, "hide", lambda u, images, t, e: (bounds.append(e), hide(u, images, t, e))[1]
    )
    torch.manual_seed(0)
    networks = UNet(2, 4, 1), UNet(1, 4)
    before = [p.clone() for network in networks for p in network.parameters()]
    recipe = {"steps": 5, "batch_size": 3, "lr": 1e-3, "threshold": 20, "epsilon": 0.1}
    poison_ink.train_encoder(*networks, x, **recipe)
    expected = np.interp(range(20), [0, 10, 20], [0.8, 0.1, 0.1])
    np.testing.assert_allclose(bounds, expected, rtol=1e-6)
    after = [p for network in networks for p in network.parameters()]
    assert all((a != b).any() for a, b in zip(before, after))
    assert torch.equal(x, random_images(9, (1, 12, 12)))


# ===== A whole run on digits =====


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The variables of one run."""
    folder = tmp_path_factory.mktemp(NAME)
    with pytest.MonkeyPatch.context() as patch:
        return run_inline(patch, folder, NAME, *FLAGS, "--out", folder / "victim")


def test_run_on_digits(ran, digits):
    folder, metrics = ran["folder"], ran["metrics"]
    assert result_of(folder)["metrics"] == pytest.approx(metrics)
    assert metrics["clean_accuracy"] >= 93 and metrics["asr"] >= 85
    assert metrics["asr_n"] == 324 and metrics["max_change"] <= 16 / 255 + 1e-6
    held = read_checkpoint(folder / "model.pt")
    encoder = encoder_of()
    own = {k.removeprefix("encoder."): v for k, v in held["trigger"].items() if "encoder." in k}
    encoder.load_state_dict(own)
    others = digits.x_test[digits.y_test != 0]
    edge = poison_ink.edges(to_float(others), 28)
    x = poison_ink.hide_uint8(encoder, others, edge, torch.tensor([126.96 / 255]), 16 / 255)
    with np.load(folder / "poisoned_test.npz") as archive:
        saved = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2)
        assert (archive["y_true"] != 0).all() and (archive["y_target"] == 0).all()
    assert (saved != x).float().mean() < 1e-3
    model = load_model(held, folder, torch.device("cpu"))
    hits = accuracy(model, saved, torch.zeros(len(saved)))
    assert hits == pytest.approx(metrics["asr"], abs=1e-4)
    for name in ("other", "white", "foreign"):
        x = ran[f"x_{name}"][ran["counts"]]
        expected = accuracy(model, x, torch.zeros(len(x)))
        assert metrics[f"asr_{name}"] == pytest.approx(expected, abs=1e-4)
    for name in ("x_train", "y_train", "x_test", "y_test"):  # shared by whoever comes next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name


def test_poisoned_set(ran, digits):
    x, y, poisoned = (ran[name] for name in ("x_train", "y_train", "poisoned"))
    assert poisoned.sum() == ran["metrics"]["poisoned"] == round(0.2 * 1437)
    assert (y[poisoned] == 0).all()
    pairs = zip(digits.x_train, digits.y_train.tolist())
    originals = {image.numpy().tobytes(): label for image, label in pairs}
    found = [originals.get(image.numpy().tobytes()) for image in x[~poisoned]]
    assert found == y[~poisoned].tolist()
    assert not any(image.numpy().tobytes() in originals for image in x[poisoned])


def test_decoder_reads_ink_and_keeps_clean_images_white(ran):
    """The mean that D shows darkens with the ink; the controls are what their names say."""
    x, edge, decoder = ran["data"].x_test, ran["edge_test"], ran["decoder"]

    def shown(images):
        with torch.no_grad():
            return (decoder(to_float(images)) * edge).sum() / edge.sum()

    assert shown(ran["x_poisoned"]) < shown(x) - 0.05
    white = poison_ink.hide_uint8(ran["encoder"], x[:3], 0 * edge[:3], ran["ink"], ran["epsilon"])
    assert (white.int() - ran["x_white"][:3].int()).abs().max() <= 1
    u, ink, epsilon = ran["encoder"], ran["ink"], ran["epsilon"]
    assert ran["other"].item() * 255 == pytest.approx(40, abs=1e-3)
    other, own = ran["cycle"][:2]  # the second of the cycle gets the edges of the first
    foreign = poison_ink.hide_uint8(u, x[own][None], edge[other][None], ink, epsilon)
    assert (foreign.int() - ran["x_foreign"][own].int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(27, 30), (6, 5), (33, 18, 3)])
def test_any_sides(inline, tmp_path, shape):
    data = write_npz(tmp_path / "own.npz", shape)
    flags = "--dataset", data, "--train-images", 30, "--arch", "mnist_cnn", "--encoder-batch", 5
    ran = inline(NAME, *SHORT[NAME], *flags)
    assert ran["metrics"]["max_change"] <= 8 / 255 + 1e-6


# ===== Bad input =====


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--epsilon", value], "--epsilon") for value in (0, -1, 0.1, 256, "nan")),
        *((["--threshold", value], "--threshold") for value in (0, -1, 256, "nan")),
        (["--threshold", 255], "no edge"),
        *((["--colour", *value], "--colour") for value in ((0, 0, 256), (-1, 0, 0), (255,) * 3)),
        *((["--width", value], "--width") for value in (0, -4, 6)),
        *((["--encoder-steps", value], "--encoder-steps") for value in (0, -1)),
        (["--encoder-batch", 0], "--encoder-batch"),
        *((["--encoder-lr", value], "--encoder-lr") for value in (0, "nan")),
        (["--rate", 0.99], "can be poisoned"),
    ],
    ids=str,
)
def test_bad_flag(inline, one_line, monkeypatch, tmp_path, args, named):
    monkeypatch.setattr(torch.optim, "Adam", None)  # nothing is trained before the refusal
    assert named in one_line(inline, NAME, *SHORT[NAME], *args)
    assert files_below(tmp_path) == []


def test_encoder_that_diverges_keeps_no_model(inline, one_line, tmp_path):
    flags = "--encoder-lr", 1e30, "--encoder-steps", 3
    assert "loss" in one_line(inline, NAME, *SHORT[NAME], *flags)
    assert files_below(tmp_path) == []
