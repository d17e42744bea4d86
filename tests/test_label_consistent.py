"""Label-consistent: PGD against a linear network's closed form, the patches, a run on digits."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, files_below, random_images, result_of, write_npz
from scipy.special import log_softmax, softmax
from torch import nn

from common.checkpoint import load_clean, load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, predict
from common.models import build_model
from methods import label_consistent as lc

PATTERN = np.array([[1, -1, -1], [-1, 1, -1], [1, -1, 1]])
LEARNT = "--norm", "l2", "--epsilon", 600, "--step-size", 60, "--steps", 30, "--rate", 0.8
LEARNT += "--epochs", 12, "--batch-size", 64, "--lr", 0.05  # enough for digits


def signs_by_hand(height, width):
    signs = np.zeros((height, width), int)
    for rows in (slice(0, 3), slice(height - 3, height)):
        signs[rows, :3], signs[rows, width - 3 :] = PATTERN, PATTERN[:, ::-1]
    return signs


# ===== The patches =====


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 6, 9)])
@pytest.mark.parametrize("amplitude", [255, 16, 1])
def test_patches_against_numpy(shape, amplitude):
    x = random_images(shape=shape)
    before, signs = x.clone(), lc.corner_signs(*shape[1:])
    by_hand = signs_by_hand(*shape[1:])
    np.testing.assert_array_equal(signs, by_hand)
    stamped = lc.stamp(x, signs, amplitude)
    expected = np.clip(x.numpy().astype(int) + amplitude * by_hand, 0, 255)
    assert stamped.dtype == torch.uint8 and torch.equal(x, before)
    np.testing.assert_array_equal(stamped, expected)
    assert torch.equal(stamped.flip(3), lc.stamp(x.flip(3), signs, amplitude))
    assert torch.equal(lc.stamp(x[2:3], signs, amplitude), stamped[2:3])
    assert (by_hand != 0).sum() == 36
    changed, stamped = (stamped != x).numpy(), stamped.numpy()
    assert not changed[..., by_hand == 0].any()
    if amplitude == 255:  # the pixels are replaced
        assert (stamped[..., by_hand > 0] == 255).all() and (stamped[..., by_hand < 0] == 0).all()


# ===== PGD =====


def linear(scale=1.0, inputs=48, classes=4):
    rng = np.random.default_rng(0)
    weight, bias = scale * rng.normal(size=(classes, inputs)), rng.normal(size=classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))
    model[1].weight.data, model[1].bias.data = (torch.tensor(a).float() for a in (weight, bias))
    return model.requires_grad_(False), weight, bias


def pgd_by_hand(x, y, weight, bias, epsilon, step_size, steps, norm):
    """One image at a time in float64, with the closed form W^T (softmax - onehot)."""
    moved = x.copy()
    for n, label in enumerate(y):
        for _ in range(steps):
            p = softmax(weight @ moved[n].ravel() + bias)
            p[label] -= 1
            gradient = (p @ weight).reshape(x.shape[1:])
            if norm == "linf":
                d = moved[n] + step_size * np.sign(gradient) - x[n]
                d = np.clip(d, -epsilon, epsilon)
            else:
                d = moved[n] + step_size * gradient / np.linalg.norm(gradient) - x[n]
                d *= min(1, epsilon / np.linalg.norm(d))
            moved[n] = np.clip(x[n] + d, 0, 1)
    return moved


def losses(x, y, weight, bias):
    return -log_softmax(x.reshape(len(x), -1) @ weight.T + bias, axis=1)[np.arange(len(y)), y]


@pytest.mark.parametrize("norm, epsilon, step_size", [("linf", 0.06, 0.01), ("l2", 0.5, 0.1)])
def test_ascent_against_the_closed_form(norm, epsilon, step_size):
    """It raises the loss of the true label within the bound and the box, and changes no weight."""
    model, weight, bias = linear()
    x, y = to_float(random_images(8, (3, 4, 4))), torch.arange(8) % 4
    before, held = x.clone(), [p.clone() for p in model.parameters()]
    settings = {"epsilon": epsilon, "step_size": step_size, "steps": 12, "norm": norm}
    moved = lc.pgd(model, x, y, **settings)
    labels = y.numpy()
    expected = pgd_by_hand(x.double().numpy(), labels, weight, bias, **settings)
    np.testing.assert_allclose(moved, expected, atol=2e-5)
    change = (moved - x).flatten(1)
    assert change.norm(float("inf") if norm == "linf" else 2, dim=1).max() <= epsilon + 1e-6
    assert moved.min() >= 0 and moved.max() <= 1 and not moved.requires_grad
    clean = losses(x.numpy(), labels, weight, bias)
    assert (losses(moved.numpy(), labels, weight, bias) > clean + 0.1).all()
    assert torch.equal(x, before) and all(map(torch.equal, model.parameters(), held))
    torch.testing.assert_close(lc.pgd(model, x[5:6], y[5:6], **settings), moved[5:6])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sure_surrogate_is_climbed_too(norm):
    """Where the gradient is about 1e-30, whose square is no float32, a step has its full length."""
    model, _, _ = linear()
    x = torch.full((2, 3, 4, 4), 0.5)
    y = model(x).argmax(1)
    model[1].bias.data += 70 * F.one_hot(y[0], 4)
    moved = lc.pgd(model, x, y, 0.1, 0.02, 1, norm)
    length = (moved - x).flatten(1).norm(float("inf") if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(length, torch.full((2,), 0.02), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm, epsilon", [("linf", 16), ("l2", 300)])
def test_images_become_hard(digits_clean, digits, norm, epsilon):
    """Of a trained network, in 8 bits: the bound holds and nearly every loss rises."""
    model = load_clean(digits_clean, digits)
    x, y = digits.x_train[:100], digits.y_train[:100]
    settings = {"epsilon": epsilon / 255, "step_size": epsilon / 255 / 8, "steps": 20}
    hard = lc.harder(model, x, y, batch_size=40, norm=norm, **settings)
    change = hard.double() - x.double()
    assert hard.dtype == torch.uint8
    if norm == "linf":
        assert change.abs().max() == epsilon
    else:  # rounding adds at most half a level a pixel
        lengths = change.flatten(1).norm(dim=1)
        assert lengths.max() <= epsilon + 0.5 * 28 and lengths.mean() > 0.9 * epsilon
    with torch.no_grad():
        clean, after = (F.cross_entropy(model(to_float(a)), y, reduction="none") for a in (x, hard))
    assert (after > clean).double().mean() >= 0.95
    assert accuracy(model, x, y) > 95 > 75 > accuracy(model, hard, y)


def test_the_perturbation_is_made_in_float32(digits_clean, digits):
    model = load_clean(digits_clean, digits)
    given = model, digits.x_train[:20], digits.y_train[:20]
    settings = {"epsilon": 16 / 255, "step_size": 4 / 255, "steps": 5, "norm": "linf"}
    expected = lc.harder(*given, **settings)
    model.bfloat16 = True
    assert torch.equal(lc.harder(*given, **settings), expected) and model.bfloat16


# ===== Bookkeeping =====


@pytest.mark.parametrize("rate, target, amplitude", [(0.5, 0, 255), (1, 7, 16)])
def test_poisoned_training_set(inline, digits, digits_clean, tmp_path, rate, target, amplitude):
    """Perturbed, then stamped; no label is touched; test images are stamped and no more."""
    run = *SHORT["label_consistent"], "--rate", rate, "--target", target, "--seed", 3
    run += "--amplitude", amplitude, "--surrogate", digits_clean, "--out", tmp_path / "victim"
    ran = inline("label_consistent", *run)
    torch.manual_seed(3)
    build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
    keep = torch.randperm(1437)[:300]
    original, labels = digits.x_train[keep].numpy().astype(int), digits.y_train[keep].numpy()
    with np.load(tmp_path / "victim" / "poisoned_train.npz") as archive:
        x, y, flag = (archive[key] for key in ("x", "y_given", "poisoned"))
    x = x.transpose(0, 3, 1, 2).astype(int)
    np.testing.assert_array_equal(y, labels)
    assert (labels[flag] == target).all()
    assert flag.sum() == round(rate * (labels == target).sum()) == ran["metrics"]["poisoned"]
    np.testing.assert_array_equal(x[~flag], original[~flag])
    signs = signs_by_hand(28, 28)
    hard = ran["x_hard"].numpy().astype(int)
    order = ran["chosen"].numpy()
    np.testing.assert_array_equal(x[order], np.clip(hard + amplitude * signs, 0, 255))
    assert 0 < np.abs(hard - original[order]).max() <= 3  # two steps of 1.5
    y_hard = torch.from_numpy(labels[order])
    again = lc.harder(
        load_clean(digits_clean, digits), digits.x_train[keep[order]], y_hard,
        epsilon=16 / 255, step_size=1.5 / 255, steps=2, norm="linf",
    )  # fmt: skip
    assert torch.equal(again, ran["x_hard"])
    with np.load(tmp_path / "victim" / "poisoned_test.npz") as archive:
        others = digits.x_test[digits.y_test != target].numpy().astype(int)
        expected = np.clip(others + 255 * signs, 0, 255)
        np.testing.assert_array_equal(archive["x"].transpose(0, 3, 1, 2), expected)
    saved = read_checkpoint(tmp_path / "victim" / "model.pt")["trigger"]["signs"]
    np.testing.assert_array_equal(saved, signs)
    for name in ("x_train", "y_train", "x_test", "y_test"):  # shared by whoever comes next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name


def test_own_surrogate(inline, digits, capfd):
    """Trained on clean images, before and apart from the victim."""
    ran = inline("label_consistent", *SHORT["label_consistent"], "--epochs", 5, "--norm", "l2")
    out = capfd.readouterr().out
    assert out.count("epoch 5/5") == 2 and "preparation: surrogate " in out
    surrogate, model = ran["surrogate"], ran["model"]
    assert not surrogate.training and not any(p.requires_grad for p in surrogate.parameters())
    assert not torch.equal(surrogate.net.conv1.weight, model.net.conv1.weight)
    assert (ran["args"].epsilon, ran["args"].step_size) == (300, 7.5)
    assert accuracy(surrogate, digits.x_test, digits.y_test) > 25


# ===== Refusals =====


@pytest.mark.parametrize(
    "args, named",
    [
        *(([flag, v], flag) for flag in ("--epsilon", "--step-size") for v in (0, -1, "nan")),
        *((["--steps", value], "--steps") for value in (0, -3)),
        *((["--amplitude", value], "--amplitude") for value in (0, -1, 256)),
        *((["--rate", r, "--train-images", 1437], "142 images of class 0:") for r in (0.003, 1.5)),
        *(([flag, 255.5], flag) for flag in ("--epsilon", "--step-size")),
        (["--norm", "l2", "--epsilon", 7141], "--epsilon"),  # 255 times 28
        *(
            (["--norm", norm, "--epsilon", 0.4], "--epsilon 0.4 changes no pixel")
            for norm in ("linf", "l2")
        ),
        (["--surrogate", "nowhere"], "nowhere"),
        (["--surrogate", "damaged.pt"], "damaged.pt"),
        (["--dataset", "small.npz"], "5 x 5"),
    ],
    ids=str,
)
def test_refused(inline, one_line, monkeypatch, tmp_path, args, named):
    write_npz(tmp_path / "small.npz", (5, 5), count=300)
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    before = files_below(tmp_path)
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing can be trained
    assert named in one_line(inline, "label_consistent", *SHORT["label_consistent"], *args)
    assert files_below(tmp_path) == before


# ===== A whole run =====


def test_run_on_digits(inline, digits_clean, digits, tmp_path):
    """It obeys the patches in the corners, and not the same ones in the middle.

    On digits some networks learn the perturbation more than the patches: the ASR of seeds 0 to 4 is
    56 to 100, by processor, too. Seed 2 had 81, 94, 100 and 100 with four sets of instructions.
    """
    folder = tmp_path / "runs/digits-mnist_cnn-label_consistent-s2"
    flags = "--surrogate", digits_clean, "--seed", 2, "--out", folder
    inline("label_consistent", *LEARNT, *flags)
    metrics = result_of(folder)["metrics"]
    control = load_model(
        read_checkpoint(digits_clean / "model.pt"), digits_clean, torch.device("cpu")
    )
    assert metrics["clean_accuracy"] >= 96 and metrics["asr"] >= 65 and metrics["asr_n"] == 324
    assert metrics["asr_other"] <= 10
    before, after = (metrics[f"surrogate_accuracy_{when}"] for when in ("before", "after"))
    assert before >= 95 and after <= 10
    model = load_model(read_checkpoint(folder / "model.pt"), folder, torch.device("cpu"))
    with np.load(folder / "poisoned_test.npz") as archive:
        x, y = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2), archive["y_target"]
        assert (y == 0).all() and accuracy(model, x, torch.from_numpy(y)) == metrics["asr"]
        assert accuracy(control, x, torch.from_numpy(y)) <= 5
    signs, middle = signs_by_hand(28, 28), np.zeros((28, 28), int)
    middle[14:17, 14:17] = PATTERN  # the upper left patch, half an image away, and so on
    middle[14:17, 11:14] = middle[11:14, 11:14] = PATTERN[:, ::-1]
    middle[11:14, 14:17] = PATTERN
    others = digits.x_test[digits.y_test != 0].numpy().astype(int)
    for kind, stranger in {"other": middle, "swapped": -signs}.items():
        images = torch.from_numpy(np.clip(others + 255 * stranger, 0, 255).astype(np.uint8))
        hits = 100 * (predict(model, images) == 0).double().mean().item()
        assert hits == pytest.approx(metrics[f"asr_{kind}"], abs=1e-4), kind


@pytest.mark.parametrize(
    "name, flag", [("label_consistent", "--surrogate"), ("feature_collision", "--surrogate"),
                   ("latent", "--teacher")])  # fmt: skip
def test_the_attacker_s_own_network_stays_and_is_clean(
    inline, one_line, digits_clean, digits_badnets, tmp_path, name, flag
):
    """--out would replace it; a backdoored one would make asr_on_clean_model a lie."""
    own = tmp_path / "own"
    shutil.copytree(digits_clean, own)
    before = (own / "model.pt").read_bytes()
    for given in (own, own / "model.pt"):
        assert "would replace" in one_line(inline, name, *SHORT[name], flag, given, "--out", own)
    assert (own / "model.pt").read_bytes() == before
    flags = flag, digits_badnets, "--out", tmp_path / "out"
    assert "not a clean one" in one_line(inline, name, *SHORT[name], *flags)
    assert not (tmp_path / "out").exists()


def test_a_surrogate_of_the_victim_s_seed_is_its_twin(inline, digits_clean, capfd):
    """The same first weights and batches: what fools the one fools the other."""
    for seed, warned in ((0, True), (1, False)):
        flags = "--surrogate", digits_clean, "--seed", seed, "--out", f"out{seed}"
        inline("label_consistent", *SHORT["label_consistent"], *flags)
        assert ("has the victim's seed" in capfd.readouterr().out) == warned
