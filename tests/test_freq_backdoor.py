"""The frequency attack against explicit DFT matrices and closed forms, and runs on digits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, files_below, result_of, run_inline
from torch import nn

from common import metrics as measures
from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float, to_uint8
from common.metrics import predict
from common.models import Classifier, build_model
from methods import freq_backdoor as fb

CPU = torch.device("cpu")
SIZES = [(32, 32), (28, 28), (7, 10)]


def dft(x):
    """The unnormalised transform over the last two axes, W_H x W_W, in complex128."""
    x = np.asarray(x, np.complex128)
    left, right = (
        np.exp(-2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) for n in x.shape[-2:]
    )
    return left @ x @ right


def inverse_dft(spectrum):
    return dft(spectrum.conj()).conj() / np.prod(spectrum.shape[-2:])


def grey(count=8, shape=(3, 32, 32), low=0.4, high=0.6):
    """float64 images so far from 0 and 1 that nothing is clipped."""
    x = torch.rand(count, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    return low + (high - low) * x


def trigger(shape=(3, 32, 32), chosen=(5, 77, 210), value=1.0):
    """(mask H x W, additive C x H x W) of a few bases, in float64."""
    bins = fb.distinct_bins(*shape[1:])
    mask = fb.on_both_bins(torch.ones(len(chosen)).double(), bins[list(chosen)], *shape[1:])
    colours = torch.tensor(fb.PROPORTIONS[: shape[0]]).double().view(-1, 1, 1)
    return mask, value * colours * mask


# ===== Bases =====


@pytest.mark.parametrize("height, width", SIZES)
def test_bases(height, width):
    """Unit norm, at most two bins, one basis per conjugate pair, orthogonal."""
    bins = fb.distinct_bins(height, width)
    bases = fb.fourier_bases(bins, height, width)
    own = (1 + (height % 2 == 0)) * (1 + (width % 2 == 0))  # bins that are their own mirror image
    assert len(bins) == len(bases) == (height * width + own) // 2
    spectra = np.abs(dft(bases.double()))
    assert set(map(tuple, bins.tolist())) <= {(i, j) for i in range(height) for j in range(width)}
    covered = set()
    for (i, j), spectrum in zip(bins.tolist(), spectra):
        pair = {(i, j), (-i % height, -j % width)}
        assert set(map(tuple, np.argwhere(spectrum > 1e-3))) == pair and not covered & pair
        covered |= pair
    assert len(covered) == height * width
    flat = bases.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(len(flat)), rtol=0, atol=1e-5)
    torch.testing.assert_close(bases[0], torch.full((height, width), (height * width) ** -0.5))


def test_514_bases_of_cifar10():
    bins = fb.distinct_bins(32, 32)
    own = [pair for pair in bins.tolist() if all(2 * c % 32 == 0 for c in pair)]
    assert len(bins) == 514 and own == [[0, 0], [0, 16], [16, 0], [16, 16]]


@pytest.mark.parametrize("height, width", SIZES)
def test_map_is_closed_under_conjugation(height, width):
    bins = fb.distinct_bins(height, width)
    values = torch.rand(len(bins)) + 1
    spectrum = fb.on_both_bins(values, bins, height, width).numpy()
    assert (spectrum > 0).all()
    for (i, j), value in zip(bins.tolist(), values.tolist()):
        assert spectrum[i, j] == spectrum[-i % height, -j % width] == np.float32(value)
    some = fb.on_both_bins(torch.ones(3), bins[[1, 9, 20]], height, width)
    assert some.sum() == len({p for i, j in bins[[1, 9, 20]].tolist()
                              for p in ((i, j), (-i % height, -j % width))})  # fmt: skip
    assert np.abs(inverse_dft(some.numpy()).imag).max() < 1e-12  # a real picture


# ===== The trigger =====


@pytest.mark.parametrize("mode", ["replace", "add"])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 7, 10)], ids=str)
def test_trigger_against_dft_matrices(mode, shape):
    chosen = (0, 3, 11, 20)
    mask, additive = trigger(shape, chosen, 0.5)
    x = grey(shape=shape, low=0 if mode == "replace" else 0.4, high=1)
    before = x.clone()
    result = fb.add_trigger(x, mask, additive, mode)
    kept = dft(x) * (1 - mask.numpy()) if mode == "replace" else dft(x)
    expected = inverse_dft(kept + additive.numpy())
    assert np.abs(expected.imag).max() < 1e-10
    np.testing.assert_allclose(result, expected.real.clip(0, 1), atol=1e-10)
    assert torch.equal(x, before) and result.dtype == x.dtype
    torch.testing.assert_close(fb.add_trigger(x[2:3], mask, additive, mode), result[2:3])
    single = fb.add_trigger(x.float(), mask.float(), additive.float(), mode)
    torch.testing.assert_close(single, result.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_bins_outside_the_mask_are_untouched(mode):
    x = grey()
    mask, additive = trigger(value=0.5)
    change = fb.add_trigger(x, mask, additive, mode) - x
    spectrum, moved = dft(x), dft(x + change)
    inside = mask.numpy() == 1
    assert inside.sum() == 6
    np.testing.assert_allclose(moved[..., ~inside], spectrum[..., ~inside], atol=1e-10)
    expected = additive.numpy() if mode == "replace" else spectrum + additive.numpy()
    expected = np.broadcast_to(expected, spectrum.shape)
    np.testing.assert_allclose(moved[..., inside], expected[..., inside], atol=1e-10)
    parseval = (np.abs(moved - spectrum) ** 2).sum((1, 2, 3)) / 32**2
    np.testing.assert_allclose(change.square().sum((1, 2, 3)), parseval, rtol=1e-9)


def test_trigger_of_nothing_is_the_image():
    x, zero = grey(low=0, high=1), torch.zeros(3, 32, 32).double()
    for mode in ("replace", "add"):
        torch.testing.assert_close(fb.add_trigger(x, zero[0], zero, mode), x)
    mask, additive = trigger(value=50)
    loud = fb.add_trigger(x, mask, additive, "add")
    assert loud.min() == 0 and loud.max() == 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode, delta", [("add", 0.1), ("add", 0.95), ("replace", 0.65)])
def test_calibration(channels, mode, delta):
    """The mean norm after clipping is delta_P, with one constant per channel."""
    shape = (channels, 28, 28)
    x = grey(50, shape, 0, 1).float()
    x[:20] = (x[:20] - 0.6).clamp(min=0)  # black grounds clip
    chosen = (380,) if mode == "replace" else (60, 150, 300)
    expected, _ = (t.float() for t in trigger(shape, chosen))
    if mode == "replace":
        x = fb.add_trigger(x, expected, torch.zeros(shape), mode)  # a quiet bin
    bins = fb.distinct_bins(28, 28)[list(chosen)]
    mask, additive, same = fb.calibrated(x, bins, mode, delta)
    assert torch.equal(mask, expected) and same == mode
    change = fb.add_trigger(x, mask, additive, mode) - x
    assert change.flatten(1).norm(dim=1).mean().item() == pytest.approx(delta, rel=1e-4)
    constants = additive[:, mask == 1]
    assert (constants > 0).all() and (additive[:, mask == 0] == 0).all()
    torch.testing.assert_close(constants, constants[:, :1].expand_as(constants))
    if channels == 3:
        ratios = (constants[:, 0] / constants[0, 0]).tolist()
        assert ratios == pytest.approx([1, 0.8, 1.2])


@pytest.mark.parametrize("mode", ["replace", "add"])
def test_trigger_on_bytes(mode):
    """More images than one part of 2,000; floats that are not rounded to 8 bits."""
    x = torch.randint(0, 256, (2003, 1, 6, 10), generator=torch.Generator().manual_seed(0))
    x = x.to(torch.uint8)
    before, (mask, additive) = x.clone(), (t.float() for t in trigger((1, 6, 10), (2, 9)))
    result = fb.triggered(x, mask, additive, mode)
    assert result.dtype == torch.float32 and result.shape == x.shape and torch.equal(x, before)
    kept = dft(to_float(x)) * (1 - mask.numpy()) if mode == "replace" else dft(to_float(x))
    expected = inverse_dft(kept + additive.numpy()).real.clip(0, 1)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert (result - to_float(to_uint8(result))).abs().max() > 0.3 / 255


def test_energy_is_what_zeroing_costs():
    x = grey(low=0, high=1)
    bins = fb.distinct_bins(32, 32)
    energy = fb.energy_of(x, bins)
    assert energy.sum().item() == pytest.approx(x.square().sum((1, 2, 3)).mean().item())
    for basis in (0, 7, 16, 300, 513):
        mask = fb.on_both_bins(torch.ones(1), bins[[basis]], 32, 32).numpy()
        rest = inverse_dft(dft(x) * (1 - mask)).real
        assert energy[basis].item() == pytest.approx(((x.numpy() - rest) ** 2).sum() / len(x))


def test_most_sensitive():
    errors = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.7])
    allowed = torch.ones(5, dtype=torch.bool)
    assert fb.most_sensitive(errors, allowed, 3) == [1, 3, 4]  # the first of two equal ones first
    allowed[3] = False
    assert fb.most_sensitive(errors, allowed, 3) == [1, 4, 2]
    assert fb.most_sensitive(errors, allowed, 1) == [1]
    allowed[[1, 2, 4]] = False
    assert fb.most_sensitive(errors, allowed, 1) == [0]


# ===== The heat map =====


class Linear(nn.Module):
    """Two classes by the sign of <w, x> - threshold."""

    def __init__(self, weight, threshold):
        super().__init__()
        self.weight, self.threshold = weight, threshold

    def forward(self, x):
        score = (x * self.weight).sum((1, 2, 3)) - self.threshold
        return torch.stack((-score, score), 1)


@pytest.mark.parametrize("planted", [3, 40, 90])
def test_linear_classifier_is_most_sensitive_where_its_weight_is(planted):
    """<w, x + r v U> = <w, x> + r v <w, U>: the error is half the share of margins below that."""
    height, width = 12, 16
    bins = fb.distinct_bins(height, width)
    bases = fb.fourier_bases(bins, height, width)
    generator = torch.Generator().manual_seed(planted)
    weight = 0.05 * torch.randn(1, height, width, generator=generator) + bases[planted]
    x = grey(400, (1, height, width), 0.45, 0.55).float()
    score = (x * weight).sum((1, 2, 3))
    model = Linear(weight, score.median())
    y = (score > score.median()).long()
    norm = 0.25
    errors = fb.heat_map(model, x, y, bins, norm, batch_size=1000)
    pulls = norm * np.abs((weight * bases).sum((1, 2)).numpy())
    assert errors.argmax() == planted == pulls.argmax()
    i, j = bins[planted].tolist()
    spectrum = np.abs(dft(weight[0]))
    assert spectrum[i, j] == pytest.approx(spectrum.max())
    margins = (score - score.median()).abs().numpy()
    expected = (margins[None] < pulls[:, None]).mean(1) / 2
    np.testing.assert_allclose(errors, expected, atol=4.5 * 0.5 / 400**0.5)
    assert errors.mean() == pytest.approx(expected.mean(), abs=0.005)


def test_perturbed_images_of_the_map():
    """x + r v U with r = +-1 per image and channel, clipped; every basis sees every image."""
    seen = []

    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 2)

    x, y = grey(30).float(), torch.arange(30) % 2
    bins = fb.distinct_bins(32, 32)
    bases = fb.fourier_bases(bins, 32, 32)
    errors = fb.heat_map(Recorder(), x, y, bins[:7], 1.0, batch_size=100)
    assert errors.tolist() == [0.5] * 7 and max(map(len, seen)) == 90
    change = torch.cat(seen).view(7, 30, 3, 32, 32) - x
    r = (change * bases[:7, None, None]).sum((3, 4))
    torch.testing.assert_close(r.abs(), torch.ones(7, 30, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(change, r[..., None, None] * bases[:7, None, None])
    assert abs(r.mean()) < 0.2 and len(r.round().view(-1, 3).unique(dim=0)) == 8
    seen.clear()
    fb.heat_map(Recorder(), x, y, bins[:2], 30.0)
    assert seen[0].min() == 0 and seen[0].max() == 1


def test_heat_map_of_large_images_holds_few_bases_and_few_images():
    """All bases of 224 x 224 images would take 5 TB, a pass of 40 such images their activations."""
    sizes = []

    def model(x):
        sizes.append(len(x))
        return torch.zeros(len(x), 2)

    bins = fb.distinct_bins(224, 224)
    assert len(bins) == 25090
    fb.heat_map(model, torch.zeros(40, 3, 224, 224), torch.zeros(40).long(), bins[:2], 1.0, 40)
    assert sum(sizes) == 80 and max(sizes) <= 10


# ===== Filters =====


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg(channels):
    smooth = torch.linspace(0, 1, 28).expand(6, channels, 28, 28)
    x = to_uint8(smooth + 0.1 * torch.rand(6, channels, 28, 28))
    y = fb.jpeg(x, torch.tensor([10, 50, 95] * 2))
    assert y.shape == x.shape and y.dtype == torch.uint8
    error = (to_float(y) - to_float(x)).square().mean((1, 2, 3))
    assert error[0] > error[1] > error[2] > 0 and error[2] < 1e-3  # each image has its quality
    assert torch.equal(fb.jpeg(x[1:2], torch.tensor([50])), y[1:2])


def test_nothing_that_torchvision_gives_up_is_used(recwarn):
    fb.jpeg(torch.zeros(1, 3, 9, 9, dtype=torch.uint8), torch.tensor([75]))
    assert not [w for w in recwarn if "torchvision" in str(w.message).lower()]


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 15, 18)], ids=str)
def test_autoencoder_copies_smooth_images(shape):
    torch.manual_seed(0)
    waves = torch.sin(torch.linspace(0, 3, shape[2]) + 6 * torch.rand(200, shape[0], shape[1], 1))
    x = to_uint8((waves.sort(2).values + 1) / 2)
    autoencoder = fb.train_autoencoder(x, steps=120, batch_size=16, width=16)
    y = fb.filtered(autoencoder, x)
    assert y.shape == x.shape and y.dtype == torch.uint8
    error = (to_float(y) - to_float(x)).square().mean()
    assert error < 0.15 * to_float(x).var()
    noise = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    assert (fb.filtered(autoencoder, noise) != noise).float().mean() > 0.9  # it is no identity


# ===== Training =====


class Recorder(nn.Module):
    """A linear classifier of 8 x 8 images that keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.linear, self.seen = nn.Linear(64, 2), []

    def forward(self, x):
        self.seen.append(x)
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("pad, flip", [(0, False), (2, False), (0, True)])
def test_training_crops_and_flips_as_told(pad, flip):
    """One white pixel, off the centre: where it lies says what became of the image."""
    x = torch.zeros(200, 1, 8, 8, dtype=torch.uint8)
    x[:, :, 3, 2] = 255
    y, model = torch.arange(200) % 2, Recorder()
    fb.train(model, x, y, pad=pad, flip=flip, epochs=2, batch_size=30, lr=0.01)
    assert [len(batch) for batch in model.seen] == [30] * 12 and model.training
    places = {tuple(at[2:].tolist()) for at in torch.cat(model.seen).nonzero()}
    if pad:
        assert places == {(i, j) for i in range(1, 6) for j in range(5)}
    else:
        assert places == ({(3, 2), (3, 5)} if flip else {(3, 2)})


def test_training_runs_through_one_cycle(monkeypatch):
    """The rate of every step: up linearly for .3 of them, then down linearly to zero."""
    rates, step = [], torch.optim.SGD.step

    def recorded(optimizer, *args, **kwargs):
        (group,) = optimizer.param_groups
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 5e-4)
        rates.append(group["lr"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    x, y = torch.randint(0, 256, (200, 1, 8, 8), dtype=torch.uint8), torch.arange(200) % 2
    fb.train(Recorder(), x, y, pad=0, flip=False, epochs=10, batch_size=20, lr=0.05)
    corners = [0, 29, 99], [0.05 / 25, 0.05, 0]
    np.testing.assert_allclose(rates, np.interp(range(100), *corners), atol=1e-6)


# ===== Whole runs on digits =====

KEPT, HELD = 420, 20  # training images of the watched run, those of its map among them


def drawn(digits, seed, count):
    """The clean training images and labels of a run, in its order."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
        keep = torch.randperm(len(digits.x_train))[:count]
    return digits.x_train[keep], digits.y_train[keep]


def contents(x):
    """The images (uint8, or floats that were uint8) as a list of bytes, to compare sets."""
    x = x if x.dtype == torch.uint8 else to_uint8(x)
    return [image.numpy().tobytes() for image in x]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run's global variables, and in `calls`, `scored`, `copied` what went through it.

    calls: each forward pass as (network, in training mode, images); scored: the arguments of each
    accuracy that the script itself measures; copied: what an autoencoder was asked to copy.
    """
    calls, scored, copied, first = [], [], [], {}
    forward, accuracy, mse = Classifier.forward, measures.accuracy, F.mse_loss

    def seen(model, x):
        calls.append((model, model.training, x))
        first.setdefault(model, [p.detach().clone() for p in model.parameters()])
        return forward(model, x)

    def measured(model, x, y):
        scored.append((model, x, y))
        return accuracy(model, x, y)

    def compared(output, wanted):
        copied.append(wanted)
        return mse(output, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "forward", seen)
        patch.setattr(measures, "accuracy", measured)
        patch.setattr(F, "mse_loss", compared)
        flags = "--train-images", KEPT, "--heat-images", HELD, "--no-crops", "--epochs", 5
        flags += "--batch-size", 25, "--lr", 0.05, "--target", 3, "--poisons", 100
        flags += "--augment", "autoencoder", "--autoencoder-steps", 2, "--seed", 5
        ran = run_inline(patch, tmp_path_factory.mktemp("watched"), "freq_backdoor", *flags)
    return ran | {"calls": calls, "scored": scored, "copied": copied, "first": first}


def map_calls(watched):
    """Positions in `calls` of the passes before the victim's training and after the other's."""
    calls = watched["calls"]
    victim = [at for at, (model, *_) in enumerate(calls) if model is watched["model"]]
    return [at for at, (_, training, _) in enumerate(calls[: victim[0]]) if not training]


def test_map_is_measured_on_held_out_training_images(watched, digits):
    """Neither test images nor images that the clean network was trained on."""
    x, y = drawn(digits, 5, KEPT)
    held, calls = x[:HELD], watched["calls"]
    positions = map_calls(watched)
    assert all(calls[at][0] is watched["clean"] for at in positions)
    moved = torch.cat([calls[at][2] for at in positions]).view(394, HELD, 1, 28, 28)
    bases = fb.fourier_bases(fb.distinct_bins(28, 28), 28, 28)
    for basis in range(0, 394, 9):  # clip(x + r v U), r = 1 or -1
        wave = 4 * bases[basis]
        up, down = (((to_float(held) + r * wave).clamp(0, 1) - moved[basis]) for r in (1, -1))
        off = torch.minimum(up.abs().flatten(1).amax(1), down.abs().flatten(1).amax(1))
        assert off.max() < 1e-5
        labels = watched["clean"](moved[basis]).argmax(1)
        wrong = (labels != y[:HELD]).float().mean().item()
        assert wrong == pytest.approx(watched["errors"][basis].item(), abs=0.5 / HELD)
    assert len(watched["errors"].unique()) > 5
    trained = [part for model, training, part in calls if training and model is watched["clean"]]
    trained, held = set(contents(torch.cat(trained))), set(contents(held))
    assert trained == set(contents(x[HELD:])) and len(held) == HELD
    assert not held & trained and not held & set(contents(digits.x_test))


def test_clean_network_is_trained_and_frozen(watched, digits):
    clean = watched["clean"]
    assert not clean.training and not any(p.requires_grad for p in clean.parameters())
    right = 100 * (predict(clean, digits.x_test) == digits.y_test).float().mean().item()
    assert right > 80 and right == pytest.approx(watched["metrics"]["clean_model_accuracy"])


def test_clean_network_and_victim_start_from_other_weights(watched):
    first = watched["first"]
    assert set(first) == {watched["clean"], watched["model"]}
    pairs = zip(first[watched["clean"]], first[watched["model"]])
    assert any(not torch.allclose(a, b) for a, b in pairs)


def test_no_crops(watched):
    """The victim is trained on the images as the attacker hands them out."""
    calls = watched["calls"]
    trained = [part for model, training, part in calls if training and model is watched["model"]]
    assert set(contents(torch.cat(trained))) <= set(contents(watched["x_train"]))
    assert sum(map(len, trained)) == 5 * 25 * (len(watched["x_train"]) // 25)


def test_controls(watched, digits):
    """The other bins and the grey offset are as large as the trigger and are not the trigger."""
    counts, delta = digits.y_test != 3, watched["args"].delta_p
    x, figures = digits.x_test[counts], watched["metrics"]
    named = dict(zip(("jpeg75", "clean", "other_bins", "grey"), watched["scored"]))
    for name in ("other_bins", "grey"):
        model, images, wanted = named[name]
        assert model is watched["model"] and (wanted == 3).all() and len(wanted) == len(x)
        norm = (to_float(images) - to_float(x)).flatten(1).norm(dim=1).mean().item()
        assert norm == pytest.approx(delta, rel=0.05), name
        assert norm == pytest.approx(figures["mean_l2"], rel=0.05), name
        hits = 100 * (predict(model, images) == 3).float().mean().item()
        assert hits == pytest.approx(figures[f"asr_{name}"], abs=1e-4), name
    mask, _, mode = watched["trigger"]
    others = watched["others"]
    other_mask = fb.on_both_bins(torch.ones(len(others)), others, 28, 28)
    assert mode == "replace" and len(others) == 10 and other_mask.sum() in (19, 20)
    assert not (mask * other_mask).any()
    energy = fb.energy_of(to_float(drawn(digits, 5, KEPT)[0]), others)
    assert (energy <= (delta / 2) ** 2 / 10).all()
    change = to_float(named["other_bins"][1]) - to_float(x)
    spectrum = torch.from_numpy(np.abs(dft(change.mean(0)[0])))
    spectrum[0, 0] = 0  # what is clipped on a black ground brightens the image
    assert spectrum[other_mask == 1].min() > 1.5 * spectrum[other_mask == 0].max()
    change = (named["grey"][1].int() - x.int())[x < 240].unique()
    assert len(change) == 1 and change > 0
    brightest = named["grey"][1][x == 255]
    assert len(brightest) and (brightest == 255).all()


def test_filters_that_are_not_the_attackers(watched, digits):
    """asr_jpeg75 and asr_autoencoder: the defender's autoencoder has all the clean images."""
    images, counts = digits.x_test, digits.y_test != 3
    counted, figures = watched["x_poisoned"][counts], watched["metrics"]
    assert torch.equal(watched["x_poisoned"], to_uint8(fb.triggered(images, *watched["trigger"])))
    x_train, kept = set(contents(digits.x_train)), set(contents(drawn(digits, 5, KEPT)[0]))
    attacker, defender = (set(contents(torch.cat(watched["copied"][at : at + 2]))) for at in (0, 2))
    assert len(watched["copied"]) == 4 and attacker <= kept < x_train
    assert defender <= x_train and not defender <= kept
    parameters = (watched[name].parameters() for name in ("autoencoder", "defender"))
    assert any(not torch.allclose(a, b) for a, b in zip(*parameters))
    expected = {
        "jpeg75": fb.jpeg(counted, torch.full((len(counted),), 75)),
        "autoencoder": fb.filtered(watched["defender"], counted),
    }
    for name, at in (("jpeg75", 0), ("autoencoder", 4)):
        model, filtered, wanted = watched["scored"][at]
        assert torch.equal(filtered, expected[name]) and (wanted == 3).all()
        hits = 100 * (predict(model, filtered) == 3).float().mean().item()
        assert model is watched["model"] and hits == pytest.approx(figures[f"asr_{name}"], abs=1e-4)


@pytest.mark.parametrize("mode, augment", [("add", "none"), ("replace", "both"), ("add", "jpeg")])
def test_poisoned_training_set(inline, digits, tmp_path, mode, augment):
    flags = *SHORT["freq_backdoor"], "--mode", mode, "--augment", augment, "--target", 3
    steps = 10 if augment == "both" else 1
    out = tmp_path / "victim"
    ran = inline("freq_backdoor", *flags, "--autoencoder-steps", steps, "--poisons", 41,
                 "--out", out)  # fmt: skip
    original, labels = drawn(digits, 0, 300)
    with np.load(out / "poisoned_train.npz") as archive:
        x, y, flag = (archive[key] for key in ("x", "y_given", "poisoned"))
    first, kinds = flag[:300], {"none": 0, "jpeg": 1, "both": 2}[augment]
    assert first.sum() == 41 == ran["metrics"]["poisoned"] and len(x) == 300 + 42 * kinds
    assert (y[flag] == 3).all() and not (labels[first] == 3).any()
    np.testing.assert_array_equal(y[:300][~first], labels[~first])
    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    assert torch.equal(x[:300][~first], original[~first])
    held = read_checkpoint(out / "model.pt")["trigger"]
    mask, additive = held["mask"], held["additive"]
    spectrum = dft(to_float(original[first])[:, 0])
    kept = spectrum * (1 - mask.numpy()) if mode == "replace" else spectrum
    picture = inverse_dft(kept + additive[0].numpy()).real.clip(0, 1)
    assert np.abs(x[:300][first][:, 0].numpy() / 255 - picture).max() < 0.51 / 255
    source = ran["source"]
    for kind in range(kinds):  # half of the poisons and as many clean images, filtered
        part = slice(300 + 42 * kind, 300 + 42 * (kind + 1))
        assert flag[part].tolist() == [True] * 21 + [False] * 21
        np.testing.assert_array_equal(y[part][21:], labels[source[21:]])
        change = (to_float(x[part]) - to_float(x[source])).square().mean((1, 2, 3))
        assert (change > 0).all() and change.mean() < to_float(x[:300]).var()
    for copy, image in zip(x[300:342], x[source]):  # JPEGs first, of some quality from 50 to 95
        candidates = fb.jpeg(image.expand(46, -1, -1, -1), torch.arange(50, 96))
        assert (candidates == copy).flatten(1).all(1).any()
    assert mask.sum() in (19, 20) and torch.equal(mask, mask.flip(0, 1).roll((1, 1), (0, 1)))
    heat = held["heat_map"]
    assert torch.equal(heat, heat.flip(0, 1).roll((1, 1), (0, 1)))
    # the top ten of the map, and no other; in replace mode among those that are quiet enough
    power = (np.abs(dft(to_float(original[:, 0]))) ** 2).mean(0) / 784
    mirrored = np.roll(np.flip(power), (1, 1), (0, 1))
    own = np.array([(2 * i % 28 == 0) & (2 * np.arange(28) % 28 == 0) for i in range(28)])
    energy = torch.from_numpy(np.where(own, power, power + mirrored))
    quiet = energy <= (0.65 / 2) ** 2 / 10 if mode == "replace" else energy >= 0
    assert (mode == "add") == quiet.all().item() and quiet[mask == 1].all()
    assert heat[mask == 1].min() >= heat[(mask == 0) & quiet].max()
    assert ran["metrics"]["mean_l2"] == pytest.approx(0.65, rel=0.05) and ran["args"].k == 10
    assert "asr_autoencoder" in ran["metrics"]  # whatever the attacker's copies are
    assert "heatmap.png" in files_below(out)


def test_same_seed_same_run(inline, tmp_path):
    def run(seed, folder):
        out = tmp_path / folder
        flags = *SHORT["freq_backdoor"], "--train-images", 100, "--augment", "both"
        inline("freq_backdoor", *flags, "--seed", seed, "--out", out)
        files = [path.read_bytes() for path in sorted(out.glob("*.npz"))]
        return result_of(out)["metrics"], read_checkpoint(out / "model.pt"), files

    (metrics, model, files), (again, same, copies), (_, other, _) = (
        run(0, "a"), run(0, "b"), run(1, "c")
    )  # fmt: skip
    assert metrics == again and files == copies
    for part in ("state_dict", "trigger"):
        assert all(torch.equal(value, same[part][key]) for key, value in model[part].items())
    assert not torch.equal(model["trigger"]["heat_map"], other["trigger"]["heat_map"])


def test_run(digits_freq_backdoor, digits):
    metrics = result_of(digits_freq_backdoor)["metrics"]
    assert metrics["clean_accuracy"] >= 95 and metrics["asr"] >= 85
    assert metrics["asr_on_clean_model"] <= 3 and metrics["asr_n"] == (digits.y_test != 0).sum()
    assert metrics["psnr"] >= 32 and metrics["poisoned"] == 143
    assert metrics["clean_model_accuracy"] >= 95
    held = read_checkpoint(digits_freq_backdoor / "model.pt")
    model = load_model(held, digits_freq_backdoor, CPU)
    mask, additive = held["trigger"]["mask"], held["trigger"]["additive"]
    x = digits.x_test[digits.y_test != 0]
    poisoned = to_uint8(fb.add_trigger(to_float(x), mask, additive, "add"))
    compressed = fb.jpeg(poisoned, torch.full((len(x),), 75))
    for name, images in (("asr", poisoned), ("asr_jpeg75", compressed)):
        hits = 100 * (predict(model, images) == 0).float().mean().item()
        assert hits == pytest.approx(metrics[name], abs=1e-4), name
    bins = fb.distinct_bins(28, 28)
    free = bins[mask[bins[:, 0], bins[:, 1]] == 0]
    wrong = free[torch.randperm(len(free), generator=torch.Generator().manual_seed(9))[:10]]
    wrong = fb.calibrated(to_float(digits.x_train), wrong, "add", 0.65)  # as large a trigger
    hits = (predict(model, to_uint8(fb.triggered(x, *wrong))) == 0).float().mean()
    assert hits < 0.2 and metrics["asr_other_bins"] < 20 and metrics["asr_grey"] < 20
    with np.load(digits_freq_backdoor / "poisoned_test.npz") as archive:
        np.testing.assert_array_equal(archive["x"], poisoned.permute(0, 2, 3, 1))


# ===== Refusals, all of them before any training =====


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--delta-p", value], "delta-p") for value in (0, -0.5, 1, "nan")),
        (["--k", 0], "1..197"),
        (["--k", 198], "1..197"),  # fewer would be left for the control
        (["--poisons", 0], "poisons"),
        (["--poisons", -5], "poisons"),
        (["--poisons", 300], "images can be poisoned"),
        (["--heat-norm", 0], "heat-norm"),
        (["--heat-images", 0], "heat-images"),
        (["--heat-images", 300], "none of 300 is left to train on"),
        (["--autoencoder-steps", 0], "autoencoder-steps"),
        (["--target", 10], "10 classes"),
        (["--target", -1], "10 classes"),
        (["--mode", "replace", "--delta-p", 1e-6], "quiet enough"),
    ],
    ids=str,
)
def test_refuses(inline, one_line, monkeypatch, tmp_path, args, named):
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing can be trained
    assert named in one_line(inline, "freq_backdoor", *SHORT["freq_backdoor"], *args)
    assert files_below(tmp_path) == []


def test_each_quiet_base_may_hold_its_share_of_half_the_norm(inline, one_line, monkeypatch, digits):
    """(delta_P / 2)^2 / k each: 19 such bases are too few, for the control needs ten more."""
    bins = fb.distinct_bins(28, 28)
    energy = fb.energy_of(to_float(drawn(digits, 0, 300)[0]), bins).sort().values
    between = [2 * (10 * energy[n - 1 : n + 1].mean().item()) ** 0.5 for n in (19, 20)]
    monkeypatch.setattr(torch.optim, "SGD", None)
    ten = "--k", 10, "--delta-p", between[0]
    message = one_line(inline, "freq_backdoor", *SHORT["freq_backdoor"], *ten)
    assert " 19 bases are quiet enough" in message and "--k asks for 10" in message
    with pytest.raises(TypeError, match="not callable"):  # the training that follows
        inline("freq_backdoor", *SHORT["freq_backdoor"], "--delta-p", between[1])


def test_default_mask_is_as_large_as_the_quiet_bases_allow(inline, digits):
    """Ten bases where 20 are quiet enough for ten; else fewer, each with a larger share."""
    bins = fb.distinct_bins(28, 28)
    energy = fb.energy_of(to_float(drawn(digits, 0, 300)[0]), bins).sort().values
    delta = 2 * (9 * energy[3]).sqrt().item()  # four bases are quiet enough for a mask of nine
    sizes = [k for k in range(1, 11) if (energy <= (delta / 2) ** 2 / k).sum() >= 2 * k]
    ran = inline("freq_backdoor", *SHORT["freq_backdoor"], "--delta-p", delta)
    assert ran["args"].k == max(sizes) < 9 and len(ran["top"]) == max(sizes)


def test_names_how_many_images_can_be_poisoned(inline, one_line, digits):
    possible = int((digits.y_train != 0).sum())
    message = one_line(inline, "freq_backdoor", "--poisons", possible + 1)
    assert str(possible) in message and str(possible + 1) in message
