"""The frequency attack against explicit DFT matrices and closed forms, and runs on digits."""

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, result_of, write_npz
from torch import nn

from common.checkpoint import load_model, read_checkpoint
from common.datasets import SPECS, to_float, to_uint8
from common.metrics import predict
from common.models import build_model
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
    bins, _ = fb.fourier_bases(*shape[1:])
    mask = fb.on_both_bins(torch.ones(len(chosen)).double(), bins[list(chosen)], *shape[1:])
    colours = torch.tensor(fb.PROPORTIONS[: shape[0]]).double().view(-1, 1, 1)
    return mask, value * colours * mask


# ===== Bases =====


@pytest.mark.parametrize("height, width", SIZES)
def test_bases(height, width):
    """Unit norm, at most two bins, one basis per conjugate pair, orthogonal."""
    bins, bases = fb.fourier_bases(height, width)
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
    bins, _ = fb.fourier_bases(32, 32)
    own = [pair for pair in bins.tolist() if all(2 * c % 32 == 0 for c in pair)]
    assert len(bins) == 514 and own == [[0, 0], [0, 16], [16, 0], [16, 16]]


@pytest.mark.parametrize("height, width", SIZES)
def test_map_is_closed_under_conjugation(height, width):
    bins, _ = fb.fourier_bases(height, width)
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
    mask, _ = (t.float() for t in trigger(shape, chosen))
    if mode == "replace":
        x = fb.add_trigger(x, mask, torch.zeros(shape), mode)  # a quiet bin
    additive = fb.calibrate(x, mask, mode, delta)
    change = fb.add_trigger(x, mask, additive, mode) - x
    assert change.flatten(1).norm(dim=1).mean().item() == pytest.approx(delta, rel=1e-4)
    constants = additive[:, mask == 1]
    assert (constants > 0).all() and (additive[:, mask == 0] == 0).all()
    torch.testing.assert_close(constants, constants[:, :1].expand_as(constants))
    if channels == 3:
        ratios = (constants[:, 0] / constants[0, 0]).tolist()
        assert ratios == pytest.approx([1, 0.8, 1.2])


def test_energy_is_what_zeroing_costs():
    x = grey(low=0, high=1)
    bins, _ = fb.fourier_bases(32, 32)
    energy = fb.energy_of(x, bins)
    assert energy.sum().item() == pytest.approx(x.square().sum((1, 2, 3)).mean().item())
    for basis in (0, 7, 16, 300, 513):
        mask = fb.on_both_bins(torch.ones(1), bins[[basis]], 32, 32).numpy()
        rest = inverse_dft(dft(x) * (1 - mask)).real
        assert energy[basis].item() == pytest.approx(((x.numpy() - rest) ** 2).sum() / len(x))


def test_most_sensitive():
    errors = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.7])
    energy = torch.tensor([0.0, 1.0, 1.0, 9.0, 1.0])
    assert fb.most_sensitive(errors, energy, 3, float("inf")) == [1, 3, 4]
    assert fb.most_sensitive(errors, energy, 3, 2.5) == [1, 4, 0]  # 3 is loud, 2 would be too much
    assert fb.most_sensitive(errors, energy, 5, 0.5) == [0]


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
    bins, bases = fb.fourier_bases(height, width)
    generator = torch.Generator().manual_seed(planted)
    weight = 0.05 * torch.randn(1, height, width, generator=generator) + bases[planted]
    x = grey(400, (1, height, width), 0.45, 0.55).float()
    score = (x * weight).sum((1, 2, 3))
    model = Linear(weight, score.median())
    y = (score > score.median()).long()
    norm = 0.25
    errors = fb.heat_map(model, x, y, bases, norm, batch_size=1000)
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
    _, bases = fb.fourier_bases(32, 32)
    errors = fb.heat_map(Recorder(), x, y, bases[:7], 1.0, batch_size=100)
    assert errors.tolist() == [0.5] * 7 and max(map(len, seen)) == 90
    change = torch.cat(seen).view(7, 30, 3, 32, 32) - x
    r = (change * bases[:7, None, None]).sum((3, 4))
    torch.testing.assert_close(r.abs(), torch.ones(7, 30, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(change, r[..., None, None] * bases[:7, None, None])
    assert abs(r.mean()) < 0.2 and len(r.round().view(-1, 3).unique(dim=0)) == 8
    seen.clear()
    fb.heat_map(Recorder(), x, y, bases[:2], 30.0)
    assert seen[0].min() == 0 and seen[0].max() == 1


# ===== Filters and the clean network =====


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg(channels):
    smooth = torch.linspace(0, 1, 28).expand(6, channels, 28, 28)
    x = to_uint8(smooth + 0.1 * torch.rand(6, channels, 28, 28))
    y = fb.jpeg(x, torch.tensor([10, 50, 95] * 2))
    assert y.shape == x.shape and y.dtype == torch.uint8
    error = (to_float(y) - to_float(x)).square().mean((1, 2, 3))
    assert error[0] > error[1] > error[2] > 0 and error[2] < 1e-3  # each image has its quality
    assert torch.equal(fb.jpeg(x[1:2], torch.tensor([50])), y[1:2])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 15, 18)], ids=str)
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


def test_clean_network_is_trained_and_frozen(digits):
    torch.manual_seed(0)
    clean = build_model("mnist_cnn", 10, digits.shape, (0.5,), (0.5,))
    fb.train_clean(clean, digits.x_train, digits.y_train, SPECS["digits"], 4, 64, 0.1)
    assert not clean.training and not any(p.requires_grad for p in clean.parameters())
    assert (predict(clean, digits.x_test) == digits.y_test).float().mean() > 0.8


def test_clean_network_and_victim_start_from_other_weights(inline):
    ran = inline("freq_backdoor", *SHORT["freq_backdoor"], "--lr", 1e-30)
    pairs = zip(ran["clean"].parameters(), ran["model"].parameters())
    assert any(not torch.allclose(a, b) for a, b in pairs)


# ===== Whole runs on digits =====


@pytest.mark.parametrize("mode, augment", [("add", "none"), ("replace", "both"), ("add", "jpeg")])
def test_poisoned_training_set(inline, digits, digits_clean, tmp_path, mode, augment):
    flags = *SHORT["freq_backdoor"], "--clean-ckpt", digits_clean, "--mode", mode
    flags += "--autoencoder-steps", 50
    out = tmp_path / "victim"
    ran = inline("freq_backdoor", *flags, "--augment", augment, "--poisons", 41,
                 "--target", 3, "--out", out)  # fmt: skip
    original, labels = digits.x_train[ran["keep"]], digits.y_train[ran["keep"]]
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
    for kind in range(kinds):  # half of the poisons and as many clean images, filtered
        part = slice(300 + 42 * kind, 300 + 42 * (kind + 1))
        assert flag[part].tolist() == [True] * 21 + [False] * 21
        source = ran["source"]
        np.testing.assert_array_equal(y[part][21:], labels[source[21:]])
        change = (to_float(x[part]) - to_float(x[source])).square().mean((1, 2, 3))
        assert (change > 0).all() and change.mean() < to_float(x[:300]).var()
    assert mask.sum() in (19, 20) and torch.equal(mask, mask.flip(0, 1).roll((1, 1), (0, 1)))
    heat = held["heat_map"]
    assert torch.equal(heat, heat.flip(0, 1).roll((1, 1), (0, 1)))
    if mode == "add":  # the top ten of the map, and no other
        assert heat[mask == 1].min() >= heat[mask == 0].max()
    assert ran["metrics"]["mean_l2"] == pytest.approx(ran["args"].delta_p, rel=0.05)
    assert "heatmap.png" in files_below(out)


def test_same_seed_same_run(inline, digits_clean, tmp_path):
    def run(seed, folder):
        flags = *SHORT["freq_backdoor"], "--clean-ckpt", digits_clean, "--augment", "jpeg"
        inline("freq_backdoor", *flags, "--seed", seed, "--out", tmp_path / folder)
        metrics = result_of(tmp_path / folder)["metrics"]
        timeless = {k: v for k, v in metrics.items() if "second" not in k}
        return timeless, read_checkpoint(tmp_path / folder / "model.pt"), [
            path.read_bytes() for path in sorted((tmp_path / folder).glob("*.npz"))
        ]  # fmt: skip

    (metrics, model, files), (again, same, copies), (_, other, _) = (
        run(0, "a"), run(0, "b"), run(1, "c")
    )  # fmt: skip
    assert metrics == again and files == copies
    for part in ("state_dict", "trigger"):
        assert all(torch.equal(value, same[part][key]) for key, value in model[part].items())
    assert not torch.equal(model["trigger"]["heat_map"], other["trigger"]["heat_map"])


def test_map_is_the_clean_network_s(inline, digits_clean, tmp_path):
    flags = *SHORT["freq_backdoor"], "--clean-ckpt", digits_clean, "--heat-images", 100
    ran = inline("freq_backdoor", *flags)
    clean = load_model(read_checkpoint(digits_clean / "model.pt"), digits_clean, CPU)
    x, y = to_float(ran["x_test"][ran["picked"]]), ran["y_test"][ran["picked"]]
    again = fb.heat_map(clean, x, y, ran["bases"], ran["args"].heat_norm)
    assert np.corrcoef(again, ran["errors"])[0, 1] > 0.9  # the signs r are drawn afresh


def test_lpips_is_reported(inline, digits_clean, monkeypatch):
    def largest(a, b, normalize):
        return (a - b).abs().amax((1, 2, 3), keepdim=True)

    monkeypatch.setattr("common.metrics.lpips_distance", lambda net, device: largest)
    flags = *SHORT["freq_backdoor"], "--clean-ckpt", digits_clean, "--lpips-net", "alex"
    assert 0 < inline("freq_backdoor", *flags)["metrics"]["lpips"] < 1


def test_no_crops(inline, digits_clean):
    flags = *SHORT["freq_backdoor"], "--clean-ckpt", digits_clean, "--no-crops"
    ran = inline("freq_backdoor", *flags)
    assert torch.equal(ran["x"], to_float(ran["x_train"][ran["batch"]]))  # the last step's images


def test_run(digits_freq_backdoor, digits):
    metrics = result_of(digits_freq_backdoor)["metrics"]
    assert metrics["clean_accuracy"] >= 95 and metrics["asr"] >= 85
    assert metrics["asr_on_clean_model"] <= 3 and metrics["asr_n"] == (digits.y_test != 0).sum()
    assert metrics["psnr"] >= 32 and metrics["poisoned"] == 143
    assert metrics["heat_map_images_per_second"] > 0
    held = read_checkpoint(digits_freq_backdoor / "model.pt")
    model = load_model(held, digits_freq_backdoor, CPU)
    mask, additive = held["trigger"]["mask"], held["trigger"]["additive"]
    x = to_float(digits.x_test[digits.y_test != 0])
    rates = []
    turned = mask.T, additive.transpose(1, 2)  # the wrong trigger: rows and columns exchanged
    for m, a in ((mask, additive), turned):
        images = to_uint8(fb.add_trigger(x, m, a, "add"))
        rates.append(100 * (predict(model, images) == 0).float().mean().item())
    assert rates[0] == pytest.approx(metrics["asr"], abs=1e-4) and rates[1] < 20
    exact = 255 * fb.add_trigger(x, mask, additive, "add")
    compressed = fb.jpeg(to_uint8(exact / 255), torch.full((len(x),), 75))
    for name, images in (("asr_float", exact), ("asr_jpeg75", compressed)):
        hits = 100 * (predict(model, images) == 0).float().mean().item()
        assert hits == pytest.approx(metrics[name], abs=1e-4), name
    with np.load(digits_freq_backdoor / "poisoned_test.npz") as archive:
        images = to_uint8(fb.add_trigger(x, mask, additive, "add"))
        np.testing.assert_array_equal(archive["x"], images.permute(0, 2, 3, 1))


OWN = "--dataset", "own.npz", "--train-images", 30


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--delta-p", value], "delta-p") for value in (0, -0.5, 1, "nan")),
        (["--k", 0], "394"),
        (["--k", 395], "1..394"),
        (["--poisons", 0], "poisons"),
        (["--poisons", -5], "poisons"),
        (["--poisons", 300], "training images can be poisoned"),
        (["--heat-norm", 0], "heat-norm"),
        (["--heat-images", 0], "heat-images"),
        (["--target", 10], "10 classes"),
        (["--target", -1], "10 classes"),
        (["--clean-ckpt", "nowhere"], "no such checkpoint"),
        (["--clean-ckpt", "digits", *OWN], "trained on 10 classes"),
        (["--clean-ckpt", "digits", "--mode", "replace", "--delta-p", 1e-6], "quiet enough"),
    ],
    ids=str,
)
def test_refuses(inline, one_line, tmp_path, digits_clean, args, named):
    write_npz(tmp_path / "own.npz")
    before = files_below(tmp_path)
    args = [digits_clean if value == "digits" else value for value in args]
    assert named in one_line(inline, "freq_backdoor", *SHORT["freq_backdoor"], *args)
    assert files_below(tmp_path) == before


def test_names_how_many_images_can_be_poisoned(inline, one_line, digits):
    possible = int((digits.y_train != 0).sum())
    message = one_line(inline, "freq_backdoor", "--poisons", possible + 1)
    assert str(possible) in message and str(possible + 1) in message
