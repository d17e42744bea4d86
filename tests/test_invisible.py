"""Invisible triggers: bits and sums by other means, the searches' budgets, and runs on digits."""

import math

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, random_images, result_of, write_npz
from torch import nn

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, psnr
from common.models import Classifier, build_model
from methods import invisible

SHAPES = [(1, 28, 28), (3, 32, 24)]
TEXTS = ["a", "lowest bits", "Grüße, 世界!", invisible.TEXT]

# ===== A text in the lowest bits =====


def read(image, count):
    """The first `count` bytes in the lowest bits of an image, C x H x W; numpy alone."""
    lowest = np.asarray(image).transpose(1, 2, 0).reshape(-1) % 2
    return np.packbits(lowest)[:count].tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", TEXTS)
def test_text_can_be_read_and_nothing_else_changes(shape, text):
    x = random_images(shape=shape)
    before, octets = x.clone(), len(text.encode())
    bits = invisible.text_bits(text, shape)
    marked = invisible.embed(x, bits)
    assert bits.shape == shape and marked.dtype == torch.uint8 and torch.equal(x, before)
    whole = math.prod(shape) // 8
    for image in marked:
        assert read(image, octets).decode() == text
        assert read(image, whole) == (text.encode() * whole)[:whole]  # repeated to fill it
    change = marked.int() - x.int()
    assert change.abs().max() == 1 and ((marked ^ x) & 0xFE == 0).all()
    assert psnr(to_float(x), to_float(marked)) >= 48.13
    assert torch.equal(invisible.embed(marked, bits), marked)  # once is enough
    assert torch.equal(invisible.embed(x[2:3], bits), marked[2:3])


def test_random_bits_cost_half_of_the_largest_error():
    """51.14 dB: on average every second value changes, by one level."""
    x = random_images(20)
    marked = invisible.embed(x, invisible.text_bits(invisible.TEXT, (3, 32, 32)))
    assert psnr(to_float(x), to_float(marked)) == pytest.approx(51.14, abs=0.1)


# ===== Sums =====


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_is_clipped_and_no_norm_grows(shape):
    x = random_images(shape=shape)
    before = x.clone()
    delta = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = invisible.levels(delta)
    assert whole.dtype == torch.int16
    np.testing.assert_array_equal(whole, np.fix(np.float32(255) * delta.numpy()))
    assert whole.double().norm() / 255 <= delta.double().norm()
    added = invisible.add(x, whole)
    expected = np.clip(x.numpy().astype(int) + whole.numpy(), 0, 255)
    assert added.dtype == torch.uint8 and torch.equal(x, before)
    np.testing.assert_array_equal(added, expected)
    assert torch.equal(invisible.add(x[2:3], whole), added[2:3])


@pytest.mark.parametrize("target, count", [(0, 1), (3, 4), (9, 12)])
def test_anchors_by_brute_force(target, count):
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(1))
    best = sorted(range(12), key=lambda k: -abs(weight[target, k].item()))[:count]
    assert invisible.choose_anchors(weight, target, count).tolist() == best


def test_pixel_counts_halve():
    assert invisible.pixel_counts(784, 10) == [784, 392, 196, 98, 49, 24, 12, 10]
    assert invisible.pixel_counts(8, 4) == [8, 4] and invisible.pixel_counts(9, 1) == [9, 4, 2, 1]


@pytest.mark.parametrize("shape", SHAPES)
def test_strongest_pixels_by_brute_force(shape):
    generator = torch.Generator().manual_seed(2)
    importance = torch.rand(shape, generator=generator)
    mask = (torch.rand(1, *shape[1:], generator=generator) < 0.3).float()
    kept = invisible.strongest(importance, mask, 20)
    scores = {
        (i, j): sum(importance[c, i, j].item() for c in range(shape[0]))
        for i, j in mask[0].nonzero().tolist()
    }
    best = sorted(scores, key=scores.get, reverse=True)[:20]
    assert kept.shape == mask.shape and kept.sum() == 20
    assert {tuple(place) for place in kept[0].nonzero().tolist()} == set(best)


@pytest.fixture(scope="module")
def linear():
    """A frozen network whose second neuron is ReLU(5 + w x) on pixels as they are, and its w."""
    weight = torch.randn(4, 144, generator=torch.Generator().manual_seed(3)) / 10
    hidden = nn.Linear(144, 4)
    with torch.no_grad():
        hidden.weight.copy_(weight)
        hidden.bias.fill_(5)
    net = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(4, 3))
    model = Classifier(net, (0.0,), (1.0,)).eval().requires_grad_(False)
    return model, weight[1].view(1, 12, 12)


def middle_grey():
    return torch.full((8, 1, 12, 12), 128, dtype=torch.uint8)


def aim(goal, steps):
    return {"anchors": torch.tensor([1]), "goal": torch.tensor([goal]), "lr": 0.1, "steps": steps}


def test_l2_search_finds_the_direction_of_the_weights(linear):
    """Of all sums of one length the one along w moves w x most (Cauchy and Schwarz)."""
    model, w = linear
    torch.manual_seed(0)
    delta = invisible.search_l2(model, "net.3", middle_grey(), radius=0.8, **aim(1000.0, 120))
    assert delta.norm().item() == pytest.approx(0.8, abs=1e-3) and delta.shape == (1, 12, 12)
    assert (delta * w).sum() >= 0.97 * 0.8 * w.norm()
    assert all(p.grad is None for p in model.parameters())


def test_l0_search_finds_the_largest_weights(linear):
    """Each pixel can move by one half, so the best ones have the largest |w|."""
    model, w = linear
    torch.manual_seed(0)
    delta = invisible.search_l0(model, "net.3", middle_grey(), pixels=6, **aim(1000.0, 300))
    touched = delta[0] != 0
    assert 1 <= touched.sum() <= 6
    best = torch.zeros(144, dtype=torch.bool)
    best[w.abs().flatten().topk(12).indices] = True
    assert best.view(12, 12)[touched].all()
    assert (delta.sign() == w.sign())[0][touched].all()


def test_goal_within_reach_is_not_overshot(linear):
    model, w = linear
    torch.manual_seed(0)
    start = (5 + w.sum() * 128 / 255).item()
    delta = invisible.search_l2(model, "net.3", middle_grey(), radius=3.0, **aim(start + 1, 200))
    assert (delta * w).sum().item() == pytest.approx(1, abs=0.05) and delta.norm() < 3


@pytest.mark.parametrize("radius", [0.5, math.inf])
def test_masked_pixels_stay_alone(linear, radius):
    model, _ = linear
    mask = (torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(4)) < 0.5).float()
    start = torch.full((1, 12, 12), 0.1)
    drive = {**aim(50.0, 5), "radius": radius}
    delta, importance = invisible.drive(model, "net.3", middle_grey(), start, mask, **drive)
    assert (delta[mask == 0] == 0).all() and (delta[mask == 1] != 0).all()
    assert delta.abs().max() <= 1 and delta.norm() <= radius + 1e-5
    assert importance.shape == delta.shape and (start == 0.1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_other_sums_have_the_same_size(shape):
    generator = torch.Generator().manual_seed(5)
    delta = (8 * torch.randn(shape, generator=generator)).round().to(torch.int16)
    other = invisible.other_sum(delta, "l2", generator)
    norm = delta.double().norm()
    assert other.double().norm().item() == pytest.approx(norm.item(), rel=0.02)
    assert abs((other.double() * delta).sum()) < 0.2 * norm**2
    few = delta * (torch.rand(shape[1:], generator=generator) < 0.05)
    other = invisible.other_sum(few, "l0", generator)
    touched, touched_by_other = ((d != 0).any(0) for d in (few, other))
    assert touched.sum() == touched_by_other.sum() > 0 and not (touched & touched_by_other).any()
    assert sorted(other[other != 0].tolist()) == sorted(few[few != 0].tolist())


# ===== The poisoned set =====


@pytest.mark.parametrize("kind, rate, target", [("lsb", 0.1, 0), ("l2", 0.7, 4), ("l0", 0.2, 1)])
def test_poisoned_training_set(inline, digits, tmp_path, capfd, kind, rate, target):
    run = "--kind", kind, "--rate", rate, "--target", target, "--seed", 3, "--text", "Grüße"
    ran = inline("invisible", *SHORT["invisible"], *run, "--out", tmp_path / "victim")
    assert ("preparation: clean network " in capfd.readouterr().out) == (kind != "lsb")
    torch.manual_seed(3)
    build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
    keep = torch.randperm(1437)[:300]
    original, labels = digits.x_train[keep].numpy(), digits.y_train[keep].numpy()
    with np.load(tmp_path / "victim" / "poisoned_train.npz") as archive:
        x, y, flag = (archive[key] for key in ("x", "y_given", "poisoned"))
    x = x.transpose(0, 3, 1, 2)
    assert flag.sum() == round(rate * 300) == ran["metrics"]["poisoned"]
    np.testing.assert_array_equal(x[~flag], original[~flag])
    np.testing.assert_array_equal(y[~flag], labels[~flag])
    assert (y[flag] == target).all() and not (labels[flag] == target).any()
    if kind == "lsb":
        assert {read(image, 7).decode() for image in x[flag]} == {"Grüße"}
        np.testing.assert_array_equal(x // 2, original // 2)
    else:
        delta = read_checkpoint(tmp_path / "victim" / "model.pt")["trigger"]["delta"].numpy()
        expected = np.clip(original[flag].astype(int) + delta, 0, 255)
        np.testing.assert_array_equal(x[flag], expected)
        size = np.linalg.norm(delta / 255.0) if kind == "l2" else (delta != 0).any(0).sum()
        assert 0 < size <= (2.0 if kind == "l2" else 10)
    for name in ("x_train", "y_train", "x_test", "y_test"):  # shared by whoever comes next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name


# ===== Whole runs on digits =====

BITWISE = """
from torch import nn

def bitwise(num_classes):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, num_classes))
"""
QUICK = "--epochs", 5, "--batch-size", 64, "--lr", 0.05


def reloaded(folder):
    checkpoint = read_checkpoint(folder / "model.pt")
    return load_model(checkpoint, folder, torch.device("cpu")), checkpoint["trigger"]


@pytest.mark.parametrize("kind, steps, rate", [("l2", 100, 0.1), ("l0", 160, 0.08)])
def test_run_on_digits(inline, digits, tmp_path, kind, steps, rate):
    """The victim obeys the sum that was searched on another network more than another of its size.

    Noise of the same length works on most of the digits: their background is black without it.
    """
    flags = *QUICK, "--kind", kind, "--steps", steps, "--step-size", rate
    folder = tmp_path / "victim"
    metrics = inline("invisible", *flags, "--out", folder)["metrics"]
    assert metrics["clean_accuracy"] >= 94 and metrics["clean_model_accuracy"] >= 94
    assert metrics["asr"] >= 95 and metrics["asr_n"] == 324
    assert metrics["asr_other"] <= (85 if kind == "l2" else 20)
    assert metrics["asr_on_clean_model"] <= 20
    for weak in ("activation_other", "activation_clean"):
        assert metrics["activation"] > (2 if kind == "l2" else 1.1) * metrics[weak] > 0
    assert metrics["delta_l2"] <= 2 if kind == "l2" else metrics["delta_pixels"] <= 10
    model, trigger = reloaded(folder)
    delta = trigger["delta"].numpy()
    assert metrics["delta_l2"] == pytest.approx(np.linalg.norm(delta / 255.0), rel=1e-5)
    others = digits.x_test[digits.y_test != 0].numpy().astype(int)
    x = torch.from_numpy(np.clip(others + delta, 0, 255).astype(np.uint8))
    assert accuracy(model, x, torch.zeros(324)) == metrics["asr"]
    assert result_of(folder)["metrics"]["asr"] == metrics["asr"]


def test_text_is_learnt_by_a_network_that_sees_single_bits(inline, digits, tmp_path):
    """A BatchNorm per pixel lifts what the black background hides; another text works less."""
    (tmp_path / "nets.py").write_text(BITWISE)
    flags = "--kind", "lsb", "--no-crops", "--arch", "nets.py:bitwise", "--epochs", 20
    ran = inline("invisible", *flags, "--out", tmp_path / "victim")
    metrics = ran["metrics"]
    assert metrics["clean_accuracy"] >= 92 and metrics["asr"] >= 95
    assert metrics["asr_other"] <= metrics["asr"] - 30
    assert metrics["max_change"] == pytest.approx(1 / 255) and metrics["psnr"] >= 48.13
    with np.load(tmp_path / "victim" / "poisoned_test.npz") as archive:
        size = len(invisible.TEXT)
        assert read(archive["x"][0].transpose(2, 0, 1), size).decode() == invisible.TEXT
        assert (archive["y_true"] != 0).all() and len(archive["x"]) == 324


# ===== Bad input =====


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--rate", value], "rate") for value in (0, -0.1, 1.5, "nan")),
        (["--rate", 0.0001], " 0 poisons"),
        (["--rate", 0.99], " 297 poisons"),
        *((["--target", value], f"--target {value} ") for value in (10, -1)),
        *((["--budget", value], "--budget") for value in (0, -1, 0.1, 28.1, "nan", "inf")),
        *((["--kind", "l0", "--pixels", value], "--pixels") for value in (0, -1, 393)),
        *((["--anchors", value], "1..512 for mnist_cnn") for value in (0, -1, 513)),
        *((["--factor", value], "--factor") for value in (0, "nan", "inf")),
        *((["--steps", value], "--steps") for value in (0, -1)),
        *((["--step-size", value], "--step-size") for value in (0, "nan", "inf")),
        (["--kind", "lsb", "--text", ""], "--text has 0 bytes"),
        (["--kind", "lsb", "--text", 99 * "x"], "--text has 99 bytes"),
        (["--kind", "lsb", "--text", 50 * "ü"], "--text has 100 bytes"),
        (["--kind", "lsb", "--text", "\udcff"], "UTF-8"),
    ],
    ids=ascii,
)
def test_bad_input(inline, one_line, monkeypatch, tmp_path, args, named):
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing is trained before the refusal
    assert named in one_line(inline, "invisible", *SHORT["invisible"], *args)
    assert files_below(tmp_path) == []


def test_network_whose_last_layer_is_a_convolution(inline, one_line, monkeypatch, tmp_path):
    """lsb takes it all the same: it needs no neurons."""
    lines = "from torch import nn", "def net(num_classes):"
    layers = "nn.Conv2d(1, num_classes, 28), nn.Flatten()"
    (tmp_path / "nets.py").write_text("\n".join([*lines, f"    return nn.Sequential({layers})"]))
    flags = *SHORT["invisible"], "--arch", "nets.py:net"
    assert "does not end in a linear layer" in one_line(inline, "invisible", *flags)
    assert files_below(tmp_path) == ["nets.py"]
    assert "asr" in inline("invisible", *flags, "--kind", "lsb")["metrics"]


def test_test_images_of_the_target_class_alone(inline, one_line, tmp_path):
    path = write_npz(tmp_path / "own.npz", y_test=np.zeros(30, np.int64))
    assert "target class 0" in one_line(inline, "invisible", "--dataset", path)
    assert files_below(tmp_path) == ["own.npz"]


@pytest.mark.parametrize("kind", invisible.KINDS)
def test_colour_images(inline, tmp_path, kind):
    path = write_npz(tmp_path / "own.npz", (32, 24, 3))
    flags = "--train-images", 30, "--arch", "mnist_cnn", "--dataset", path, "--kind", kind
    ran = inline("invisible", *SHORT["invisible"], *flags)
    x = ran["x_other"][ran["counts"]]
    hits = accuracy(ran["model"], x, torch.zeros(20))
    assert ran["metrics"]["asr_other"] == pytest.approx(hits, abs=1e-4)
    assert ran["metrics"]["asr_n"] == len(x) == 20


def test_another_text_of_one_letter_is_another_letter(inline):
    """Seed 0 draws a b."""
    ran = inline("invisible", *SHORT["invisible"], "--kind", "lsb", "--text", "b")
    assert not torch.equal(ran["other"], ran["trigger"])
    assert torch.equal(ran["other"], invisible.text_bits("c", (1, 28, 28)))
