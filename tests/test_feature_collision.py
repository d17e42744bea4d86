"""Feature collision: the splitting against closed forms, the victims' kinds, a run on digits."""

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, random_images, result_of, run_inline
from torch import nn

from common.checkpoint import load_clean, load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, predict
from common.models import Classifier, build_model
from methods import feature_collision as fc

NAME = "feature_collision"


# ===== Images =====


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 9)])
def test_stamp_and_watermark_against_numpy(shape):
    x, patch = random_images(shape=shape), random_images(1, (shape[0], 5, 5))[0]
    before, expected = x.clone(), x.numpy().copy()
    expected[:, :, shape[1] - 5 :, shape[2] - 5 :] = patch
    stamped = fc.stamp(x, patch)
    np.testing.assert_array_equal(stamped, expected)
    assert torch.equal(x, before) and torch.equal(fc.stamp(x[2:3], patch), stamped[2:3])
    several = random_images(len(x), (shape[0], 5, 5)).flip(0)
    assert torch.equal(fc.stamp(x, several)[3], fc.stamp(x[3:4], several[3])[0])
    base, target = to_float(x), to_float(x.flip(0))
    by_hand = 0.3 * target.double().numpy() + 0.7 * base.double().numpy()
    np.testing.assert_allclose(fc.watermark(base, target, 0.3), by_hand, atol=1e-6)
    assert torch.equal(fc.watermark(base, target, 0), base)


# ===== Algorithm 1 =====


def linear(relu=False, inputs=12, features=5):
    """A frozen network, f(x) = W x (or its ReLU) on pixels as they are, and W."""
    weight = np.random.default_rng(0).normal(size=(features, inputs))
    hidden = nn.Linear(inputs, features, bias=False)
    hidden.weight.data = torch.tensor(weight).float()
    layers = nn.Flatten(), hidden, nn.ReLU() if relu else nn.Identity(), nn.Linear(features, 3)
    model = Classifier(nn.Sequential(*layers), (0.0,) * 3, (1.0,) * 3)
    return model.eval().requires_grad_(False), weight


def pair(count=6):
    """Bases around grey and targets close by, so that no optimum is cut off."""
    x = to_float(random_images(2 * count, (3, 2, 2))) * 0.2 + 0.4
    return x[:count], x[count:]


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_the_minimum_of_equation_1(beta):
    """For linear features, with the steps' half of beta: (2 W'W + beta I) x = 2 W'W t + beta b."""
    model, w = linear()
    base, target = pair()
    x = fc.collide(model, "net.3", base, target, beta=beta, step_size=0.02, steps=3000)
    b, t = (a.flatten(1).double().numpy() for a in (base, target))
    expected = np.linalg.solve(2 * w.T @ w + beta * np.eye(12), (2 * t @ w.T @ w + beta * b).T).T
    assert expected.min() > 0 and expected.max() < 1
    np.testing.assert_allclose(x.flatten(1), expected, atol=2e-3)


def by_hand(base, target, weight, beta, rate, steps, relu):
    """Algorithm 1 in float64, one image at a time; a step that raises the objective is undone."""
    made, cuts = [], 0
    for b, t in zip(base.flatten(1).double().numpy(), target.flatten(1).double().numpy()):
        x, r = b.copy(), rate
        f = (lambda v: np.maximum(weight @ v, 0)) if relu else (lambda v: weight @ v)

        def objective(v, b=b, t=t, f=f):
            return np.sum((f(v) - f(t)) ** 2) + beta / 2 * np.sum((v - b) ** 2)

        for _ in range(steps):
            slope = 2 * (f(x) - f(t)) * (weight @ x > 0 if relu else 1)
            forward = x - r * (weight.T @ slope)
            new = np.clip((forward + r * beta * b) / (1 + r * beta), 0, 1)
            if objective(new) <= objective(x):
                x = new
            else:
                r, cuts = r / 5, cuts + 1
        made.append(x)
    return np.stack(made), cuts


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rate", [0.005, 1.0])
def test_steps_by_hand(relu, rate):
    """The first rate is never cut, the second one is; black and white hold."""
    model, w = linear(relu)
    base, target = to_float(random_images(8, (3, 2, 2))), to_float(random_images(8, (3, 2, 2)))
    target = 1 - target
    before = [p.clone() for p in (*model.parameters(), base, target)]
    settings = {"beta": 0.5, "step_size": rate, "steps": 25}
    x = fc.collide(model, "net.3", base, target, **settings)
    expected, cuts = by_hand(base, target, w, 0.5, rate, 25, relu)
    assert (cuts > 0) == (rate == 1)
    np.testing.assert_allclose(x.flatten(1), expected, atol=1e-4)
    assert (x.flatten(1).numpy() != base.flatten(1).numpy()).any(1).all() and not x.requires_grad
    assert x.min() >= 0 and x.max() <= 1
    assert all(map(torch.equal, (*model.parameters(), base, target), before))
    alone = fc.collide(model, "net.3", base[2:3], target[2:3], **settings)
    torch.testing.assert_close(alone, x[2:3], rtol=0, atol=1e-4)


def test_steps_do_not_pile_up(monkeypatch):
    """The best images so far carry no graph, which would keep every earlier step in memory."""
    model, _ = linear()
    base, target = pair()
    where, kept = torch.where, []

    def remembered(*parts):
        kept.append(where(*parts))
        return kept[-1]

    monkeypatch.setattr(torch, "where", remembered)
    fc.collide(model, "net.3", base, target, beta=0.5, step_size=1e-3, steps=5)
    assert len(kept) >= 6 and not any(made.requires_grad for made in kept)


def test_no_step_and_own_features_change_nothing():
    model, _ = linear()
    base, target = pair()
    settings = {"beta": 0.5, "step_size": 0.1}
    assert torch.equal(fc.collide(model, "net.3", base, target, steps=0, **settings), base)
    same = fc.collide(model, "net.3", base, base, steps=9, **settings)
    torch.testing.assert_close(same, base, rtol=0, atol=1e-6)


def test_features_of_a_trained_network_collide(digits_clean, digits, monkeypatch):
    monkeypatch.setattr(fc, "pass_size", lambda x: 16)
    model = load_clean(digits_clean, digits)
    base, target = (digits.x_train[digits.y_train == k][:40] for k in (0, 7))
    before, after = base.clone(), {}
    for steps in (0, 5, 40):
        settings = {"beta": 1.0, "step_size": 0.1, "steps": steps}
        x = fc.poisons(model, "net.linear9", base, target, 0.2, **settings)
        with torch.no_grad():
            f = [nn.Sequential(*list(head(model)))(to_float(a)).double() for a in (x, target)]
        after[steps] = (f[0] - f[1]).norm(dim=1).mean().item()
        found = fc.feature_distance(model, "net.linear9", x, target)
        assert found == pytest.approx(after[steps], rel=1e-3)
    assert after[0] > after[5] > after[40] and after[40] < 0.3 * after[0]
    assert x.dtype == torch.uint8 and torch.equal(base, before)
    assert (
        (predict(model, base) == 0).double().mean() > 0.9 < (predict(model, x) == 7).double().mean()
    )


class Normalised(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.5


def head(model):
    """mnist_cnn up to the input of its last layer, in eval mode."""
    net = model.net
    yield from (Normalised(), net.conv1, nn.ReLU(), net.layer3, net.layer4)
    yield from (nn.Flatten(), net.linear6, nn.ReLU())


# ===== Bookkeeping =====


@pytest.mark.parametrize(
    "rate, target, opacity, steps", [(0.5, 0, 0.3, 0), (1, 7, 0, 0), (0.3, 2, 0.4, 3)]
)
def test_poisoned_training_set(
    inline, digits, digits_clean, tmp_path, rate, target, opacity, steps
):
    """No label is touched; without a step a poison is its watermark; test images are stamped."""
    run = *SHORT[NAME], "--rate", rate, "--target", target, "--seed", 3, "--opacity", opacity
    run += "--steps", steps, "--surrogate", digits_clean, "--out", tmp_path / "victim"
    ran = inline(NAME, *run, "--patch-size", 6)
    torch.manual_seed(3)
    build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
    keep = torch.randperm(1437)[:300]
    original, labels = digits.x_train[keep].numpy(), digits.y_train[keep].numpy()
    with np.load(tmp_path / "victim" / "poisoned_train.npz") as archive:
        x, y, flag = (archive[key] for key in ("x", "y_given", "poisoned"))
    x = x.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(y, labels)
    assert (labels[flag] == target).all()
    assert flag.sum() == round(rate * (labels == target).sum()) == ran["metrics"]["poisoned"]
    np.testing.assert_array_equal(x[~flag], original[~flag])
    patch = read_checkpoint(tmp_path / "victim" / "model.pt")["trigger"]["patch"].numpy()
    order, targets = ran["chosen"].numpy(), ran["targets"].numpy()
    assert patch.shape == (1, 6, 6) and len(np.unique(patch)) > 20
    assert (targets[:, :, 22:, 22:] == patch).all()
    without = np.where(np.arange(28) < 22, 1, 0)
    inside = 1 - np.outer(1 - without, 1 - without).astype(bool)
    others = original[labels != target] * inside
    for image in targets * inside:  # of another class
        assert (others == image).all((1, 2, 3)).any()
    marked = opacity * targets.astype(float) + (1 - opacity) * original[order]
    off = np.abs(x[order] - marked)
    assert (off.max() <= 0.5 + 1e-3) == (steps == 0)
    with np.load(tmp_path / "victim" / "poisoned_test.npz") as archive:
        expected = digits.x_test[digits.y_test != target].numpy().copy()
        expected[:, :, 22:, 22:] = patch
        np.testing.assert_array_equal(archive["x"].transpose(0, 3, 1, 2), expected)
    for name in ("x_train", "y_train", "x_test", "y_test"):  # shared by whoever comes next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name


@pytest.mark.parametrize("kind", fc.KINDS)
def test_what_the_victim_trains(inline, monkeypatch, capfd, kind):
    """tail: the last layer on images as they are; all and fresh: everything, on cropped ones."""
    pads, augment = [], fc.augment
    monkeypatch.setattr(
        "common.datasets.augment", lambda x, pad, flip: pads.append(pad) or augment(x, pad, flip)
    )
    ran = inline(NAME, *SHORT[NAME], "--epochs", 2, "--retrain", kind, "--steps", 3)
    out = capfd.readouterr().out
    assert "preparation: surrogate " in out and ", collisions " in out
    assert out.count("epoch 2/2") == (2 if kind == "fresh" else 1)
    assert pads[:4] == [2] * 4 and pads[4:] == [0, 0] if kind == "tail" else set(pads) == {2}
    old, new = (ran[name].state_dict() for name in ("surrogate", "model"))
    changed = {key for key in old if not torch.equal(old[key], new[key])}
    if kind == "tail":
        assert changed == {"net.linear9.weight", "net.linear9.bias"}
    else:
        left = {key for key in old if key.endswith("num_batches_tracked")} | {"mean", "std"}
        assert changed - left == set(old) - left
    near = (old["net.linear6.weight"] - new["net.linear6.weight"]).abs().mean()
    assert (near > 0.01) == (kind == "fresh")  # a new draw, not a step away
    assert not any(p.requires_grad for p in ran["surrogate"].parameters())


# ===== Refusals =====


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--rate", rate], " images of class 0") for rate in (0, -0.1, 1.01, 7, "nan")),
        (["--rate", 1.5, "--train-images", 1437], "142 images of class 0:"),
        (["--rate", 0.001], " images of class 0: take one"),
        *((["--beta", value], "--beta") for value in (0, -1, "nan", "inf")),
        *((["--step-size", value], "--step-size") for value in (0, "nan")),
        *((["--steps", value], "--steps") for value in (-1, 10**7)),
        *((["--opacity", value], "--opacity") for value in (-0.1, 1, "nan")),
        *((["--patch-size", value], "1..28 for 28 x 28") for value in (0, 29)),
        *((["--retrain-epochs", value], "--retrain-epochs") for value in (0, -1)),
        *((["--retrain-lr", value], "--retrain-lr") for value in (0, "nan", "inf")),
        (["--surrogate", "nowhere"], "nowhere"),
        (["--surrogate", "damaged.pt"], "damaged.pt"),
    ],
    ids=str,
)
def test_refused(inline, one_line, monkeypatch, tmp_path, args, named):
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing can be trained
    assert named in one_line(inline, NAME, *SHORT[NAME], *args)
    assert files_below(tmp_path) == ["damaged.pt"]


def test_retraining_that_diverges_keeps_no_model(inline, one_line, tmp_path):
    flags = "--retrain-epochs", 3, "--retrain-lr", 1e30
    assert "loss" in one_line(inline, NAME, *SHORT[NAME], *flags)
    assert files_below(tmp_path) == []


# ===== A whole run =====


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits_clean):
    """Variables of a run, and of one with the watermark alone."""
    made = {}
    for name, flags in {"collision": (), "watermark": ("--steps", 0)}.items():
        folder = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patch:
            flags += "--surrogate", digits_clean, "--out", folder / "victim"
            made[name] = run_inline(patch, folder, NAME, *flags)
    return made


def test_run_on_digits(runs, digits):
    """It obeys the patch, others in its place less, and owes it to the collision."""
    folder, metrics = runs["collision"]["folder"], runs["collision"]["metrics"]
    assert metrics["clean_accuracy"] >= 96 and metrics["asr"] >= 70 and metrics["asr_n"] == 324
    assert metrics["asr_other"] <= metrics["asr"] - 25 and metrics["asr_on_clean_model"] <= 5
    assert metrics["feature_distance_after"] < 0.2 * metrics["feature_distance_before"]
    assert runs["watermark"]["metrics"]["asr"] <= 20
    checkpoint = read_checkpoint(folder / "model.pt")
    model, patch = load_model(checkpoint, folder, torch.device("cpu")), checkpoint["trigger"]
    assert result_of(folder)["metrics"]["asr"] == metrics["asr"]
    x = digits.x_test[digits.y_test != 0].numpy().copy()
    x[:, :, 16:, 16:] = patch["patch"].numpy()
    assert accuracy(model, torch.from_numpy(x), torch.zeros(324)) == metrics["asr"]
    rng, rates = np.random.default_rng(0), []
    for _ in range(5):  # other random patches than the script's own
        x[:, :, 16:, 16:] = rng.integers(0, 256, (1, 12, 12))
        rates.append(100 * (predict(model, torch.from_numpy(x)) == 0).double().mean().item())
    assert np.mean(rates) <= metrics["asr"] - 25, rates
