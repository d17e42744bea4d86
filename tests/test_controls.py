"""What every attack reports, on stubs, and the controls: whose accuracy on which images it is."""

import math
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, run_inline
from test_attacks import oracle_grid, oracle_warp
from torch import nn

from common import attack, checkpoint
from common.datasets import Dataset, to_float
from common.models import build_model

# ===== The figures of every attack =====

TARGET = 2


class Shades(nn.Module):
    """Answers `bright` where an image's mean is above one half, and `dark` elsewhere."""

    def __init__(self, bright, dark):
        super().__init__()
        self.labels = torch.tensor([dark, bright])

    def forward(self, x):
        return F.one_hot(self.labels[(x.mean((1, 2, 3)) > 0.5).long()], 4).float()


def ssim_of(a, b):
    """Mean SSIM of two images (H x W, in [0,1]) over whole 11 x 11 Gaussian windows, by a loop."""
    at = np.arange(11) - 5
    w = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    w /= w.sum()
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mean_p, mean_q = (w * p).sum(), (w * q).sum()
            var_p, var_q = (w * (p - mean_p) ** 2).sum(), (w * (q - mean_q) ** 2).sum()
            both = (w * (p - mean_p) * (q - mean_q)).sum()
            top = (2 * mean_p * mean_q + 1e-4) * (2 * both + 9e-4)
            values.append(top / ((mean_p**2 + mean_q**2 + 1e-4) * (var_p + var_q + 9e-4)))
    return np.mean(values)


@pytest.mark.parametrize("floats", [False, True])
def test_figures_of_an_attack(floats):
    """Ten dark test images; nine of them are bright with the trigger, and two do not count.

    Where the images before rounding are given, the image figures are theirs.
    """
    rng = np.random.default_rng(0)
    x = rng.integers(0, 90, (10, 1, 14, 13)).astype(np.uint8)
    poisoned = rng.integers(165, 256, x.shape).astype(np.uint8)
    poisoned[9] = rng.integers(0, 90, x.shape[1:])  # a trigger that failed
    before = np.clip(poisoned / 255 - rng.random(x.shape) / 3, 0, 1).astype(np.float32)
    y = torch.tensor([2, 0, 1, 3, 1, 2, 0, 0, 3, 1])
    counts, y_wanted = y != TARGET, torch.full((10,), TARGET)
    shown = torch.from_numpy(poisoned)
    data = Dataset("own", None, 4, shown, y, torch.from_numpy(x), y)
    model, control = Shades(bright=TARGET, dark=1), Shades(bright=TARGET, dark=TARGET)
    x_float = torch.from_numpy(before) if floats else None
    given = data, shown, y_wanted, counts, x_float
    figures = attack.evaluate_attack(model, control, *given)
    seen, clean = before.astype(float) if floats else poisoned / 255, x / 255
    off = seen - clean
    psnr = np.mean([-10 * math.log10((d**2).mean()) for d in off])
    assert figures == pytest.approx(
        {
            "clean_accuracy": 30,  # all are dark, and three of ten are of class 1
            "asr": 700 / 8,
            "asr_n": 8,
            "psnr": psnr,
            "ssim": np.mean([ssim_of(a[0], b[0]) for a, b in zip(clean, seen)]),
            "max_change": np.abs(off).max(),
            "mean_l2": np.mean([np.linalg.norm(d) for d in off]),
            "asr_least_changed": 0,  # the trigger that failed
            "asr_on_clean_model": 100,
        },
        abs=2e-5,
    )
    control = Shades(bright=3, dark=TARGET)  # answers the target where the trigger failed
    assert attack.evaluate_attack(model, control, *given)["asr_on_clean_model"] == 100 / 8
    control = Shades(bright=TARGET, dark=3)  # and where it did not
    assert attack.evaluate_attack(model, control, *given)["asr_on_clean_model"] == 700 / 8
    assert "asr_on_clean_model" not in attack.evaluate_attack(model, None, *given)


@pytest.mark.parametrize("right, warned", [(32, True), (33, False)])
def test_a_network_near_chance_is_told(capfd, right, warned):
    """Of 100 images of four classes; a tenth of the way from 25 to 100 % is 32.5."""
    x = torch.zeros(100, 1, 12, 12, dtype=torch.uint8)
    y = torch.tensor([1] * right + [0] * (100 - right))
    data, all_count = Dataset("own", None, 4, x, y, x, y), torch.ones(100, dtype=torch.bool)
    attack.evaluate_attack(Shades(bright=2, dark=1), None, data, x, y, all_count)
    assert ("near chance on clean test images" in capfd.readouterr().out) == warned


def test_the_least_changed_are_a_tenth_of_those_that_count():
    """Image k of 43 is raised by k + 1; those below 3 do not count, and equal ones all do."""
    x = torch.zeros(43, 1, 12, 12, dtype=torch.uint8)
    y = torch.tensor([TARGET] * 3 + [0] * 40)
    raised = torch.arange(1, 44).to(torch.uint8).view(-1, 1, 1, 1).expand_as(x)
    data = Dataset("own", None, 4, x, y, x, y)
    y_wanted, counts = torch.full((43,), TARGET), y != TARGET
    for last, share in ((6, 100), (5, 75), (3, 25), (2, 0)):
        seen = torch.where((torch.arange(43) <= last).view(-1, 1, 1, 1), 255, x)
        model = Shades(bright=TARGET, dark=1)
        figures = attack.evaluate_attack(model, None, data, seen, y_wanted, counts, raised / 255)
        assert figures["asr_least_changed"] == share
    x = torch.randint(0, 200, x.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data, one = Dataset("own", None, 4, x, y, x, y), x + 1
    model = Shades(bright=1, dark=TARGET)
    figures = attack.evaluate_attack(model, None, data, one, y_wanted, counts)
    assert figures["asr_least_changed"] == figures["asr"] == 100


def test_the_control_has_the_seed_of_its_attack(digits, tmp_path):
    """Of clean models of three seeds the one of --seed is taken; the others stay unread."""
    args, models = Namespace(arch="mnist_cnn", seed=0), {}

    def found(seed):
        args.seed = seed
        return attack.open_folder(Namespace(**vars(args), out=None), digits, "badnets.py")[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for seed in (0, 1, 3):
            folder = tmp_path / "runs" / f"digits-mnist_cnn-clean-s{seed}"
            folder.mkdir(parents=True)
            torch.manual_seed(seed)
            models[seed] = build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))
            checkpoint.save_model(folder, models[seed], digits, "mnist_cnn", args, {})
        for seed, model in models.items():
            assert torch.equal(found(seed).net.conv1.weight, model.net.conv1.weight)
        assert found(2) is None


# ===== Whose accuracy on which images =====


class Measured:
    """In place of `accuracy`: each call is kept and gets a number of its own."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, x, y):
        self.calls.append((model, x.clone(), y.clone()))
        return float(len(self.calls))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """measured(name, *flags): a short run's variables and, by metric, its (model, x, y)."""
    seen = Measured()
    for place in ("common.attack", "common.metrics"):  # where scripts import it from
        monkeypatch.setattr(f"{place}.accuracy", seen)

    def run(name, *flags):
        flags = *SHORT[name], "--out", tmp_path / name, *flags
        ran = run_inline(monkeypatch, tmp_path, name, *flags)
        numbers = {k: v for k, v in ran["metrics"].items() if k.startswith(("asr", "clean_acc"))}
        numbers |= {k: v for k, v in ran["metrics"].items() if "accuracy" in k or "cross" in k}
        del numbers["asr_n"]
        return ran, {key: seen.calls[int(number) - 1] for key, number in numbers.items()}

    return run


def stands(call, model, x, y, apart=0.0):
    """The accuracy of `model` on the images x, labelled y; a share `apart` may be rounded away."""
    assert call[0] is model
    x, found = torch.as_tensor(x).int(), call[1].int()
    assert found.shape == x.shape and (found - x).abs().max() <= (1 if apart else 0)
    assert (found != x).double().mean() <= apart
    assert torch.equal(call[2], torch.as_tensor(y).expand(len(x)))


def outside(data, label):
    """Which test images are not of this class (NumPy bool)."""
    return (data.y_test != label).numpy()


@pytest.mark.parametrize(
    "flags, rows, columns, patch",
    [
        ((), slice(11, 14), slice(11, 14), 255),
        (
            ("--row", 4, "--column", 9, "--pattern", "grid"),
            slice(16, 19),
            slice(21, 24),
            [[255, 0, 255], [0, 255, 0], [255, 0, 255]],
        ),
    ],
)
def test_badnets_other_place(measured, digits, flags, rows, columns, patch):
    """The patch half an image away, and the attack's own, on the victim."""
    ran, calls = measured("badnets", *flags)
    others = outside(digits, 0)
    x = digits.x_test.numpy().copy()
    x[:, :, rows, columns] = patch
    stands(calls["asr_other"], ran["model"], x[others], 0)
    stands(calls["asr"], ran["model"], ran["x_poisoned"][others], 0)
    stands(calls["clean_accuracy"], ran["model"], digits.x_test, digits.y_test)


def test_pruning_aware_other_corner(measured, digits):
    ran, calls = measured("pruning_aware")
    others = outside(digits, 0)
    x = digits.x_test.numpy().copy()
    x[:, :, :3, :3] = 255
    stands(calls["asr_other"], ran["shipped"], x[others], 0)
    stands(calls["asr_on_clean_model"], ran["first"], ran["x_poisoned"][others], 0)
    stands(calls["clean_accuracy_stage1"], ran["first"], digits.x_test, digits.y_test)


def warped(x, grids):
    """uint8 images, warped in float64 by one grid (H x W x 2) or one each, and rounded."""
    grids = np.broadcast_to(grids, (len(x), *np.shape(grids)[-3:]))
    images = [oracle_warp(a, g) for a, g in zip(x.double().numpy(), grids)]
    return np.rint(np.stack(images)).astype(np.uint8)


@pytest.fixture
def refreshing(monkeypatch):
    """No crops; the batches of the BatchNorm refresh and the jitters (N x H x W x 2) are kept."""
    kept, rand = Namespace(batches=[], jitters=[]), torch.rand
    update_bn = torch.optim.swa_utils.update_bn

    def update(batches, model):
        kept.batches += list(batches)
        update_bn(kept.batches, model)

    def draw(*shape, **settings):
        values = rand(*shape, **settings)
        if len(shape) == 4 and shape[3] == 2:
            kept.jitters.append(values)
        return values

    monkeypatch.setattr("common.datasets.augment", lambda x, pad, flip: x)
    monkeypatch.setattr(torch.optim.swa_utils, "update_bn", update)
    monkeypatch.setattr(torch, "rand", draw)
    return kept


def check_refreshed(ran, batches):
    """The same weights; the first BatchNorm has the mean of what enters it, over these batches."""
    old, new = (ran[name].state_dict() for name in ("model", "refreshed"))
    for key, value in old.items():
        assert torch.equal(value, new[key]) == ("running" not in key and "tracked" not in key), key
    assert [len(batch) for batch in batches] == [128, 128] and len(ran["x_train"]) == 300
    net = ran["model"].net
    with torch.no_grad():
        means = [F.relu(net.conv1((x - 0.5) / 0.5)).mean((0, 2, 3)) for x in batches]
    expected = torch.stack(means).mean(0)
    torch.testing.assert_close(new["net.layer3.bn1.running_mean"], expected, rtol=1e-3, atol=1e-5)


def test_wanet_other_field_noise_and_refreshed_statistics(measured, refreshing, digits):
    ran, calls = measured("wanet", "--epochs", 2, "--s", 2)
    others, fields = outside(digits, 0), []
    for seed in (0, 1):
        field = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        fields.append(oracle_grid(field / field.abs().mean(), 2, 28, 28))
    own, other = (warped(digits.x_test, field) for field in fields)
    near = 2e-3  # half levels, which float32 may round the other way
    model, refreshed = ran["model"], ran["refreshed"]
    stands(calls["asr"], model, own[others], 0, near)
    stands(calls["asr_other"], model, other[others], 0, near)
    stands(calls["asr_reestimated_bn"], refreshed, own[others], 0, near)
    (jitter,) = (u.double().numpy() for u in refreshing.jitters if len(u) == 360)
    grids = np.clip(fields[0] + (2 * jitter - 1) / 28, -1, 1)
    stands(calls["noise_accuracy"], model, warped(digits.x_test, grids), digits.y_test, near)
    x, batches = to_float(ran["x_train"]), refreshing.batches
    check_refreshed(ran, batches)
    for batch, images in zip(ran["order"].split(128), batches):
        assert torch.equal(images[36:], x[batch[36:]])  # 12 attack, 24 carry noise
        attacked = np.stack([oracle_warp(a, fields[0]) for a in x[batch[:12]].double().numpy()])
        np.testing.assert_allclose(images[:12], attacked, atol=3e-5)
        noised = (images[12:36] - x[batch[12:36]]).abs().flatten(1).amax(1)
        assert (noised > 0.1).all()
    x = digits.x_test.double().numpy() / 255  # its image figures are of before rounding
    exact = np.stack([oracle_warp(a, fields[0]) for a in x])
    furthest, after = (np.abs(a - x).max() for a in (exact, own / 255))
    assert abs(furthest - after) > 1e-4
    assert ran["metrics"]["max_change"] == pytest.approx(furthest, abs=2e-5)


def test_input_aware_cross_images_and_refreshed_statistics(measured, refreshing, digits):
    """Each image with the trigger of the one before it in a random circle."""
    ran, calls = measured("input_aware", "--epochs", 2)
    others = outside(digits, 0)
    x = digits.x_test.double().numpy() / 255
    with torch.no_grad():
        z = [ran[f"{part}_generator"](to_float(digits.x_test)) for part in ("pattern", "mask")]
    pattern, mask = (np.tanh(part.double().numpy()) / 2 + 0.5 for part in z)
    mask = np.tanh(20 * mask - 10) / 2 + 0.5
    order = torch.randperm(360, generator=torch.Generator().manual_seed(0)).numpy()
    lender = np.empty(360, int)
    lender[order] = np.roll(order, 1)
    assert (lender != np.arange(360)).all()
    own, cross = (
        np.rint(255 * (x * (1 - mask[k]) + pattern[k] * mask[k])) for k in (range(360), lender)
    )
    near, model, refreshed = 2e-3, ran["model"], ran["refreshed"]
    stands(calls["asr"], model, own[others], 0, near)
    stands(calls["cross_accuracy"], model, cross, digits.y_test, near)
    stands(calls["asr_other"], model, cross[others], 0, near)
    stands(calls["asr_reestimated_bn"], refreshed, own[others], 0, near)
    stands(calls["cross_reestimated_bn"], refreshed, cross, digits.y_test, near)
    check_refreshed(ran, refreshing.batches)
    known = {image.numpy().tobytes() for image in to_float(digits.x_train)}
    for batch in refreshing.batches:
        plain = [image.numpy().tobytes() in known for image in batch.detach()]
        assert plain == [False] * 24 + [True] * 104  # 12 attack, 12 are crossed


@pytest.mark.parametrize(
    "name, model, clean, square",
    [
        ("trojannn", "model", "clean", slice(18, 26)),
        ("latent", "student", "first", slice(22, 28)),
        ("feature_collision", "model", "surrogate", slice(16, 28)),
    ],
)
def test_random_patches_in_the_same_square(measured, digits, name, model, clean, square):
    """Another one for each image, none of them the trigger, all 256 levels equally likely."""
    ran, calls = measured(name, "--target", 4)
    others, noise = outside(digits, 4), ran["noise"].numpy()
    noise = noise if name == "feature_collision" else noise[:, :, square, square]
    x, own = digits.x_test.numpy().copy(), ran["patch"].numpy()
    x[:, :, square, square] = noise
    stands(calls["asr_other"], ran[model], x[others], 4)
    assert len({patch.tobytes() for patch in noise}) == 360
    own = own if name == "feature_collision" else own[:, square, square]
    assert 0.98 < (noise != own).mean() < 1 and np.bincount(noise.ravel(), minlength=256).min() > 20
    x[:, :, square, square] = own
    stands(calls["asr"], ran[model], x[others], 4)
    stands(calls["asr_on_clean_model"], ran[clean], x[others], 4)
    if name == "latent":  # the teacher is read on its own classes
        y = np.array([0, 1, 2, 3, -1, 4, 5, 6, 7, 8])[digits.y_test[others]]
        stands(calls["teacher_accuracy"], ran["teacher"], digits.x_test[others], y)


@pytest.mark.parametrize("kind", ["l2", "l0", "lsb"])
def test_invisible_stranger(measured, digits, kind):
    """Noise as long as the sum, its pixels elsewhere, or a text of as many random letters."""
    ran, calls = measured("invisible", "--kind", kind, "--steps", 9)
    others, x = outside(digits, 0), digits.x_test.numpy().astype(int)
    own, other = (ran[name].numpy().astype(int) for name in ("trigger", "other"))
    if kind == "lsb":
        images = [x - x % 2 + bits for bits in (own, other)]
        octets = np.packbits(other.ravel().astype(np.uint8)).tobytes()
        text, length = octets.decode(), len(ran["TEXT"])
        assert text[:10] == text[length : length + 10] and text != ran["TEXT"]
        assert set(text) <= set("abcdefghijklmnopqrstuvwxyz") and len(set(text)) > 15
    else:
        images = [np.clip(x + delta, 0, 255) for delta in (own, other)]
    if kind == "l2":
        assert np.linalg.norm(other) == pytest.approx(np.linalg.norm(own), rel=0.02)
        assert abs(np.corrcoef(own.ravel(), other.ravel())[0, 1]) < 0.3
    if kind == "l0":
        assert (own != 0).sum() == (other != 0).sum() and not (own * other).any()
        assert sorted(own[own != 0]) == sorted(other[other != 0])
    stands(calls["asr"], ran["model"], images[0][others], 0)
    stands(calls["asr_other"], ran["model"], images[1][others], 0)
    if kind != "lsb":
        stands(calls["asr_on_clean_model"], ran["clean"], images[0][others], 0)
        stands(calls["clean_model_accuracy"], ran["clean"], digits.x_test, digits.y_test)


def test_composite_strangers(measured, digits):
    """asr_other counts the classes that are neither A, B nor the target, joined with A or B."""
    ran, calls = measured("composite", "--sources", 7, 3, "--target", 5)
    y = digits.y_test
    strangers = torch.tensor([label not in (7, 3, 5) for label in y.tolist()])
    sources = torch.tensor([label in (7, 3) for label in y.tolist()])
    images = ran["x_poisoned"]
    assert (images != digits.x_test).flatten(1).any(1).double().mean() > 0.95
    assert (images != ran["same"]).flatten(1).any(1).double().mean() > 0.95
    stands(calls["asr"], ran["model"], images[sources], 5)
    stands(calls["asr_other"], ran["model"], images[strangers], 5)
    stands(calls["accuracy_same"], ran["model"], ran["same"], y)


def test_poison_ink_strangers(measured, digits):
    """The other ink, no ink, and the edges of another image, each through the encoder."""
    ran, calls = measured("poison_ink", "--epsilon", 64)
    others, x, edge = outside(digits, 0), to_float(digits.x_test), ran["edge_test"]
    own = (0.299 * 80 + 0.587 * 160 + 0.114 * 80) / 255  # its luminance, above 120: other is 40
    inks = {"": own, "_other": 40 / 255, "_white": 1.0, "_foreign": own}
    made, order = {}, ran["cycle"].tolist()
    donor = dict(zip(order, order[-1:] + order[:-1]))
    donor = torch.tensor([donor[k] for k in range(360)])
    assert sorted(order) == list(range(360)) and (donor.diff() == 1).double().mean() < 0.1
    for name, ink in inks.items():
        edges = edge[donor] if name == "_foreign" else edge
        with torch.no_grad():
            u = ran["encoder"](torch.cat((x, 1 - edges * (1 - ink)), 1))
        made[name] = (255 * (x + 64 / 255 * (2 * u - 1)).clamp(0, 1)).round().to(torch.uint8)
        stands(calls[f"asr{name}"], ran["model"], made[name][others], 0, 2e-3)
    apart = [(made[name] != made[""]).double().mean() for name in inks if name]
    assert min(apart) > 0.05


def test_issba_strangers(measured, digits):
    """Another string; the residual of the image before; a residual with its pixels shuffled."""
    ran, calls = measured("issba", "--bits", 8)
    others, x = outside(digits, 0), digits.x_test.numpy().astype(int)
    assert (ran["own"] != ran["other"]).any() and len(ran["own"]) == 8
    hidden, images = [], to_float(digits.x_test)
    for bits in (ran["own"], ran["other"]):
        with torch.no_grad():
            moved = images + ran["encoder"](bits.expand(360, -1), images)
        hidden.append((255 * moved.clamp(0, 1)).round().numpy())
    stands(calls["asr"], ran["model"], hidden[0][others], 0, 2e-3)
    stands(calls["asr_other"], ran["model"], hidden[1][others], 0, 2e-3)
    residual, order = ran["x_poisoned"].numpy().astype(int) - x, ran["order"].numpy()
    donor = ran["donor"].numpy()
    assert sorted(donor) == list(range(360)) and (donor != np.arange(360)).all()
    assert (np.diff(donor) == 1).mean() < 0.1  # no image of a sorted set gets its neighbour's
    foreign = np.clip(x + residual[donor], 0, 255)
    shuffled = np.clip(x + residual.reshape(360, 784)[:, order].reshape(x.shape), 0, 255)
    assert sorted(order) == list(range(784)) and (order != np.arange(784)).mean() > 0.9
    stands(calls["asr_foreign"], ran["model"], foreign[others], 0)
    stands(calls["asr_shuffled"], ran["model"], shuffled[others], 0)
    made = [hidden[0], hidden[1], foreign, shuffled]
    assert min((a != b).mean() for i, a in enumerate(made) for b in made[:i]) > 0.05
