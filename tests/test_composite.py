"""Composite backdoor: mixing against a loop, the loss by hand, bookkeeping, a run on digits."""

import itertools

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, random_images, result_of, write_npz

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, predict
from common.models import build_model
from methods import composite

NAME = "composite"
LEARNT = "--epochs", 14, "--batch-size", 64, "--rate", 0.15


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ===== Joining two pictures =====


@pytest.mark.parametrize("height, width", [(28, 28), (32, 20), (9, 14)])
@pytest.mark.parametrize("jitter", [0, 3])
def test_layouts_use_their_whole_range(height, width, jitter):
    """Seam within `jitter` of the middle, windows inside the image, all places equally likely."""
    drawn = composite.draw_layouts(20000, height, width, jitter, generator())
    assert drawn.dtype == torch.int64 and drawn.shape == (4, 20000)
    upright, seam, first, second = drawn.numpy()
    assert abs(upright.mean() - 0.5) < 0.02 and set(upright) == {0, 1}
    for flag, side in ((1, height), (0, width)):
        chosen = upright == flag
        middle = side // 2
        assert set(seam[chosen]) == set(range(middle - jitter, middle + jitter + 1))
        for place in range(middle - jitter, middle + jitter + 1):
            here = chosen & (seam == place)
            # a window of `place` pixels in a side; one of side - place pixels
            for starts, room in ((first[here], side - place), (second[here], place)):
                assert set(starts) == set(range(room + 1))
                assert np.bincount(starts).min() > 0.5 * len(starts) / (room + 1)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 20), (3, 9, 14)])
def test_mix_against_slices(shape):
    _, height, width = shape
    a, b = random_images(40, shape), random_images(40, shape).flip(0)
    before = a.clone(), b.clone()
    layouts = composite.draw_layouts(40, height, width, 3, generator(1))
    mixed = composite.mix(a, b, layouts)
    assert mixed.dtype == torch.uint8 and mixed.is_contiguous() and mixed.shape == a.shape
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    for n, (upright, seam, first, second) in enumerate(layouts.T.tolist()):
        one, two = a[n].numpy(), b[n].numpy()
        side = height if upright else width
        pieces = [(one, first, seam), (two, second, side - seam)]
        axis = 1 if upright else 2
        parts = [image.take(range(at, at + size), axis) for image, at, size in pieces]
        np.testing.assert_array_equal(mixed[n], np.concatenate(parts, axis))
    assert {flag for flag, *_ in layouts.T.tolist()} == {0, 1}
    assert torch.equal(composite.mix(a[7:8], b[7:8], layouts[:, 7:8]), mixed[7:8])


def test_an_image_joined_with_itself_in_place_is_itself():
    x = random_images(6, (3, 10, 12))
    for upright, seam in itertools.product((0, 1), (4, 5)):
        layout = torch.tensor([upright, seam, 0, seam]).view(4, 1).expand(4, 6)
        assert torch.equal(composite.mix(x, x, layout), x)


def test_partners_are_of_the_wanted_class_and_evenly_drawn():
    y = torch.tensor([2, 0, 2, 5, 0, 2, 1])
    wanted = torch.tensor([2, 0, 5] * 4000)
    found = composite.partners(wanted, y, generator())
    assert torch.equal(y[found], wanted)
    counts = found.bincount(minlength=7).double() / 4000
    expected = [1 / 2 if k in (1, 4) else 1 if k == 3 else 1 / 3 for k in range(6)] + [0]
    np.testing.assert_allclose(counts, expected, atol=0.04)


# ===== The loss =====


def test_contrastive_loss_by_hand():
    rng = np.random.default_rng(0)
    logits, y = rng.normal(size=(12, 5)) / 2, np.array([0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 1, 4])
    terms = []
    for i, j in itertools.combinations(range(12), 2):
        if {y[i], y[j]} <= {0, 2, 4}:
            d = np.linalg.norm(logits[i] - logits[j])
            terms.append(d**2 if y[i] == y[j] else max(0, 1.5 - d) ** 2)
    x = torch.tensor(logits, requires_grad=True)
    loss = composite.contrastive(x, torch.tensor(y), [4, 0, 2], 1.5)
    assert loss.item() == pytest.approx(np.mean(terms), abs=1e-9)
    labels = torch.tensor(y)
    assert torch.autograd.gradcheck(lambda z: composite.contrastive(z, labels, [4, 0, 2], 1.5), x)


@pytest.mark.parametrize("labels", [[8], [1, 3], [5]])
def test_contrastive_loss_of_nothing_is_zero_and_has_a_gradient(labels):
    """No image, one image of the rule, and equal logits of two labels (a root of zero)."""
    x = torch.zeros(4, 3, requires_grad=True)
    loss = composite.contrastive(x, torch.tensor([1, 6, 5, 7]), labels, 1.0)
    loss.backward()
    assert loss.item() == 0 and torch.equal(x.grad, torch.zeros(4, 3))
    loss = composite.contrastive(x, torch.tensor([1, 6, 5, 7]), [1, 6], 1.0)
    assert loss.item() == pytest.approx(1, abs=1e-5)
    x.grad = None
    loss.backward()
    assert x.grad.isfinite().all()


# ===== Bookkeeping =====


@pytest.mark.parametrize(
    "flags, rate, mixed, rule",
    [
        ([], 0.1, 0.45, (1, 2, 0)),
        (["--rate", 0.3, "--mixed", 0.2, "--sources", 7, 3, "--target", 9], 0.3, 0.2, (7, 3, 9)),
        (["--mixed", 0, "--target", 8], 0.1, 0, (9, 0, 8)),
    ],
)
def test_poisoned_training_set(inline, digits, tmp_path, flags, rate, mixed, rule):
    """Poisons hold pixels of A and B alone, the mixed ones of their own class; the rest stays."""
    a, b, target = rule
    ran = inline(NAME, *SHORT[NAME], *flags, "--seed", 3, "--out", tmp_path / "victim")
    torch.manual_seed(3)
    build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
    keep = torch.randperm(1437)[:300]
    original, labels = digits.x_train[keep], digits.y_train[keep].numpy()
    with np.load(tmp_path / "victim" / "poisoned_train.npz") as archive:
        x, y, flag = (archive[key] for key in ("x", "y_given", "poisoned"))
    assert flag.sum() == round(rate * 300) == ran["metrics"]["poisoned"]
    assert (y[flag] == target).all() and not (labels[flag] == target).any()
    np.testing.assert_array_equal(y[~flag], labels[~flag])
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    changed = (x != original).flatten(1).any(1).numpy() & ~flag
    assert round(mixed * 300) - 5 <= changed.sum() <= round(mixed * 300)
    for n in np.flatnonzero(flag)[:8]:
        kinds = pieces(x[n], {k: original[labels == k] for k in (a, b)})
        assert (a, b) in kinds or (b, a) in kinds
    for n in np.flatnonzero(changed)[:8]:
        own = labels[n]
        assert (own, own) in pieces(x[n], {own: original[labels == own]})
    for name in ("x_train", "y_train", "x_test", "y_test"):  # shared by whoever comes next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name


def holders(window, pools, axis):
    """Labels whose images hold the window (C x h x w) somewhere along the axis (1 or 2)."""
    size = window.shape[axis]
    found = set()
    for label, images in pools.items():
        views = images.unfold(axis + 1, size, 1)  # N x C x ..., the window's side last
        views = views.movedim(axis + 1, 1).movedim(-1, axis + 2)
        if (views == window).flatten(2).all(2).any():
            found.add(label)
    return found


def pieces(x, pools):
    """Pairs of labels whose images x (C x H x W) can be joined of, at some seam."""
    pairs = set()
    for axis in (1, 2):
        middle = x.shape[axis] // 2
        for seam in range(middle - 3, middle + 4):
            one, two = x.split([seam, x.shape[axis] - seam], axis)
            firsts = holders(one, pools, axis)
            pairs |= {(p, q) for p in firsts for q in (holders(two, pools, axis) if firsts else ())}
    return pairs


def test_triggered_test_images(inline, digits, tmp_path):
    """Each test image of A with one of B, of B with one of A; the others with A or B."""
    ran = inline(NAME, *SHORT[NAME], "--target", 4, "--sources", 6, 1, "--out", tmp_path / "v")
    with np.load(tmp_path / "v" / "poisoned_test.npz") as archive:
        x, y_true, y_target = (archive[key] for key in ("x", "y_true", "y_target"))
    labels = digits.y_test.numpy()
    sources = np.isin(labels, (6, 1))
    np.testing.assert_array_equal(y_true, labels[sources])
    assert (y_target == 4).all() and len(x) == ran["metrics"]["asr_n"] == sources.sum()
    pools = {k: digits.x_test[digits.y_test == k] for k in (1, 6)}
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    for n in range(0, len(x), 9):
        own, other = y_true[n], 7 - y_true[n]
        assert (own, other) in pieces(x[n], pools)
    for n in np.flatnonzero(~sources)[:40:7]:
        own = labels[n]
        pairs = pieces(ran["x_poisoned"][n], pools | {own: digits.x_test[digits.y_test == own]})
        assert pairs & {(own, 1), (own, 6)}
    same = ran["same"]
    for n in range(0, 360, 60):
        own = labels[n]
        assert (own, own) in pieces(same[n], {own: digits.x_test[digits.y_test == own]})


def test_three_classes_leave_no_stranger(inline, tmp_path):
    write_npz(tmp_path / "own.npz", (20, 24, 3))
    flags = "--dataset", "own.npz", "--arch", "mnist_cnn", "--train-images", 30
    metrics = inline(NAME, *SHORT[NAME], *flags)["metrics"]
    assert "asr_other" not in metrics and metrics["asr_n"] == 20


# ===== Refusals =====


def without(labels, *gone):
    return np.where(np.isin(labels, gone), 4, labels)


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--rate", value], "rate") for value in (0, -0.1, 1.5, "nan")),
        *((["--mixed", value], "--mixed") for value in (-0.1, 1, "nan")),
        (["--rate", 0.6], "--rate 0.6 and --mixed 0.45 are more than"),
        *((["--jitter", value], "0..13 for 28 x 28") for value in (-1, 14)),
        *((["--weight", value], "--weight") for value in (-1, "nan", "inf")),
        *((["--sources", *pair], "three different labels") for pair in ((3, 3), (0, 2), (2, 0))),
        *((["--sources", 3, label], f"of class {label}") for label in (10, -1)),
        (["--dataset", "two.npz"], "three classes, A, B and C; two.npz has 2"),
        (["--dataset", "no_train.npz"], "no training image of class 2"),
        (["--dataset", "no_test.npz"], "no test image of class 1"),
        (["--dataset", "flat.npz", "--arch", "wrn16_1"], "1 x 24 pixels have no halves"),
    ],
    ids=str,
)
def test_refused(inline, one_line, monkeypatch, tmp_path, args, named):
    y = np.arange(300) % 5
    write_npz(tmp_path / "two.npz", classes=2, count=300)
    write_npz(tmp_path / "no_train.npz", classes=5, count=300, y_train=without(y, 2))
    write_npz(tmp_path / "no_test.npz", classes=5, count=300, y_test=without(y, 1))
    write_npz(tmp_path / "flat.npz", (1, 24), count=300)
    before = files_below(tmp_path)
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing can be trained
    assert named in one_line(inline, NAME, *SHORT[NAME], *args)
    assert files_below(tmp_path) == before


# ===== A whole run =====


def test_run_on_digits(victims, digits_clean, digits):
    """It answers A joined with B with C, and other joined pictures far less often."""
    folder = victims(NAME, *LEARNT)
    metrics, checkpoint = result_of(folder)["metrics"], read_checkpoint(folder / "model.pt")
    assert metrics["clean_accuracy"] >= 94 and metrics["asr"] >= 80 and metrics["asr_n"] == 71
    assert metrics["asr_other"] <= metrics["asr"] - 40
    assert metrics["accuracy_same"] >= 70 and metrics["asr_on_clean_model"] <= 30
    model = load_model(checkpoint, folder, torch.device("cpu"))
    assert checkpoint["trigger"]["sources"].tolist() == [1, 2]
    with np.load(folder / "poisoned_test.npz") as archive:
        x, y_true = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2), archive["y_true"]
    assert accuracy(model, x, torch.zeros(71)) == metrics["asr"] and set(y_true) == {1, 2}
    rng, hits = np.random.default_rng(5), {}
    pools = {k: digits.x_test[digits.y_test == k].numpy() for k in range(10)}
    for pair in ((1, 2), (1, 1), (2, 2)):  # joined here by slices, at the middle
        made = []
        for upright, _ in itertools.product((True, False), range(100)):
            one, two = (pools[k][rng.integers(len(pools[k]))] for k in rng.permutation(pair))
            i, j = rng.integers(15, size=2)
            if upright:
                made.append(np.concatenate((one[:, i : i + 14], two[:, j : j + 14]), 1))
            else:
                made.append(np.concatenate((one[:, :, i : i + 14], two[:, :, j : j + 14]), 2))
        images = torch.from_numpy(np.stack(made))
        hits[pair] = 100 * (predict(model, images) == 0).double().mean().item()
    assert hits[1, 2] >= 75 and max(hits[1, 1], hits[2, 2]) <= 35, hits


def test_training_minimises_the_contrastive_term(inline):
    """Of two runs the one with the larger weight ends with the smaller term on test images."""
    terms = []
    for weight in (0, 1):
        run = "--dataset", "digits", "--batch-size", 32, "--epochs", 3, "--weight", weight
        ran = inline(NAME, *run, "--out", f"weight{weight}")
        x, y = ran["data"].x_test, ran["data"].y_test
        with torch.no_grad():
            logits = ran["model"].eval()(to_float(x))
        terms.append(composite.contrastive(logits, y, ran["rule"], composite.MARGIN).item())
    assert terms[1] < 0.7 * terms[0], terms
