"""ISSBA: the networks' shapes, hiding in NumPy, one training step by autograd, runs on digits."""

import numpy as np
import pytest
import torch
from conftest import SHORT, files_below, result_of, write_npz

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy
from methods import issba

NAME = "issba"
BITS = 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def networks(shape=(1, 28, 28), bits=BITS, halvings=2, width=4):
    torch.manual_seed(0)
    encoder = issba.Encoder(bits, shape, width, halvings)
    return encoder.eval(), issba.Decoder(bits, shape, width).eval()


def images(count, shape, seed=0):
    return torch.randint(0, 256, (count, *shape), generator=seeded(seed)).to(torch.uint8)


@pytest.mark.parametrize(
    "shape, halvings", [((1, 28, 28), 2), ((3, 32, 32), 4), ((3, 32, 36), 2), ((3, 6, 10), 1)]
)
def test_shapes(shape, halvings):
    encoder, decoder = networks(shape, halvings=halvings)
    x, s = to_float(images(3, shape)), issba.draw_secrets(3, BITS, seeded())
    with torch.no_grad():
        assert encoder(s, x).shape == x.shape and decoder(x).shape == s.shape


def test_channels_are_those_of_the_public_code():
    """32, 32, 64, 128, 256 on the way down of a 32 x 32 image; the decoder's seven convolutions.

    Their output has one pixel, 128 channels, which a layer of 512 reads.
    """
    encoder, decoder = networks((3, 32, 32), 20, 4, 32)
    down = [(layer[0].in_channels, layer[0].out_channels) for layer in encoder.down]
    assert down == [(32, 32), (32, 64), (64, 128), (128, 256)]
    assert encoder.secret.in_features == 20 and encoder.secret.out_features == 3 * 32 * 32
    assert encoder.join[0][0].in_channels == 32 + 32 + 6 and encoder.out.kernel_size == (1, 1)
    layers = [layer[0] for layer in decoder.read if isinstance(layer, torch.nn.Sequential)]
    assert [layer.out_channels for layer in layers] == [32, 32, 64, 64, 64, 128, 128]
    assert [layer.stride[0] for layer in layers] == [2, 1, 2, 1, 2, 2, 2]
    linear = [layer for layer in decoder.read if isinstance(layer, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(128, 512), (512, 20)]


def test_the_decoder_starts_without_an_alignment():
    """Its affine map is the identity, whatever the image: the bits are those of `read` alone."""
    _, decoder = networks()
    x = to_float(images(5, (1, 28, 28)))
    with torch.no_grad():
        torch.testing.assert_close(decoder(x), decoder.read(x - 0.5), rtol=1e-4, atol=1e-5)


def test_hiding_against_numpy():
    """clip(x + E) rounded, in one batch or singly, the input untouched."""
    encoder, _ = networks()
    x, s = images(7, (1, 28, 28)), issba.draw_secrets(1, BITS, seeded())[0]
    kept = x.clone()
    with torch.no_grad():
        residual = encoder(s.expand(7, -1), to_float(x)).double().numpy()
    expected = np.rint(255 * np.clip(x.numpy() / 255 + 5 * residual, 0, 1))
    encoder.out.weight.data *= 5
    encoder.out.bias.data *= 5
    hidden = issba.hide(encoder, x, s)
    assert hidden.dtype == torch.uint8 and torch.equal(x, kept)
    assert np.abs(hidden.numpy() - expected).max() <= 1
    assert (hidden.numpy() != expected).mean() < 0.01
    singly = torch.cat([issba.hide(encoder, image[None], s) for image in x])
    assert (singly.int() - hidden.int()).abs().max() <= 1
    other = issba.hide(encoder, x, 1 - s)
    assert not torch.equal(other, hidden)
    assert torch.equal(issba.hide(encoder, x, torch.stack([s] * 6 + [1 - s]))[6], other[6])


def test_residuals_of_others_and_their_cosine():
    x, order = images(4, (1, 5, 5)), torch.randperm(25, generator=seeded())
    hidden = (x.int() + torch.tensor([3, -3, 5, 300])[:, None, None, None]).clamp(0, 255)
    donor = torch.tensor([2, 0, 3, 1])
    foreign, shuffled = issba.strangers(x, hidden.to(torch.uint8), donor, order)
    expected = np.clip(x.numpy().astype(int) + (hidden.numpy() - x.numpy())[donor], 0, 255)
    np.testing.assert_array_equal(foreign, expected)
    own = (hidden.numpy() - x.numpy()).reshape(4, 25)[:, order.numpy()].reshape(4, 1, 5, 5)
    np.testing.assert_array_equal(shuffled, np.clip(x.numpy() + own, 0, 255))
    r = (hidden - x.int()).flatten(1).double().numpy()
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(r, r[donor])]
    found = issba.residual_cosine(x, hidden.to(torch.uint8), donor)
    assert found == pytest.approx(np.mean(cosines), abs=1e-5)


def test_bit_accuracy_counts_bits():
    s = torch.tensor([[1.0, 0, 0, 1], [1, 1, 0, 0]])
    read = torch.tensor([[5.0, -1, 2, 3], [-1, 1, 1, -1]])  # 3 and 2 of 4 are right
    assert issba.bit_accuracy(lambda x: read, images(2, (1, 5, 5)), s) == 5 / 8


def test_the_control_hides_another_string(inline, monkeypatch):
    """Of one bit every second pair would be the same."""
    monkeypatch.setattr(torch, "randint", lambda *a, **k: torch.ones(a[-1], dtype=torch.long))
    ran = inline("issba", *SHORT["issba"], "--bits", 1)
    assert (ran["own"].tolist(), ran["other"].tolist()) == ([1], [0])


def test_the_residual_weighs_nothing_until_the_bits_are_read(monkeypatch):
    """Then its weight rises from 0 towards l2; the losses are seen through autograd's backward."""
    encoder, _ = networks()
    losses, truth = [], {}
    draw = issba.draw_secrets

    def remembered(count, bits, generator):
        truth["s"] = draw(count, bits, generator)
        return truth["s"]

    class Reader(torch.nn.Module):
        """Reads at random for 30 steps, and everything from then on."""

        def __init__(self):
            super().__init__()
            self.scale, self.calls = torch.nn.Parameter(torch.ones(())), 0

        def forward(self, x):
            self.calls += 1
            sign = 1 if self.calls > 30 else -1
            return sign * 20 * (truth["s"] - 0.5) * self.scale

    backward = torch.Tensor.backward
    monkeypatch.setattr(issba, "draw_secrets", remembered)
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda loss: (losses.append(loss.item()), backward(loss))
    )
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: None)
    x = images(8, (1, 28, 28))
    recipe = {"steps": 100, "batch_size": 4, "lr": 1e-3, "l2": 1e6, "lpips_net": None}
    shares = issba.train_encoder(encoder, Reader(), x, generator=seeded(), **recipe)
    assert shares == [0.0] * 30 + [1.0] * 70
    assert max(losses[:50]) < 11 and losses[48] < 1e-3  # the mean of 20 steps is all right: step 49
    assert losses[49] < 1e-3 < losses[51] < losses[60] < losses[99]
    assert losses[99] / losses[74] == pytest.approx(50 / 25, rel=0.2)


def test_run_on_digits(inline, tmp_path, digits):
    """Bits are read after rounding, and the string works on every image.

    The controls are reported, not bounded: on black, other strings work, too, and often residuals
    whose pixels change places.
    """
    flags = "--bits", BITS, "--width", 8, "--encoder-steps", 250, "--encoder-batch", 16
    flags = *flags, "--encoder-lr", 2e-3, "--rate", 0.2, "--epochs", 12
    flags = *flags, "--batch-size", 64, "--lr", 0.05, "--out", tmp_path / "victim"
    ran = inline(NAME, *flags)
    metrics = result_of(tmp_path / "victim")["metrics"]
    assert metrics["clean_accuracy"] >= 95 and metrics["asr"] >= 95
    assert metrics["bit_accuracy"] >= 0.95 and {"asr_shuffled", "asr_foreign"} <= set(metrics)
    assert metrics["psnr"] >= 23 and 0.3 < metrics["residual_cosine"] < 0.98

    held = read_checkpoint(tmp_path / "victim" / "model.pt")
    encoder, decoder = networks(width=8)
    for name, network in (("encoder.", encoder), ("decoder.", decoder)):
        tensors = {
            k.removeprefix(name): v for k, v in held["trigger"].items() if k.startswith(name)
        }
        network.load_state_dict(tensors)
    counts = digits.y_test != 0
    hidden = issba.hide(encoder, digits.x_test, held["trigger"]["secret"])
    with np.load(tmp_path / "victim" / "poisoned_test.npz") as archive:
        saved = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2)
    assert (saved != hidden[counts]).float().mean() < 1e-3
    model = load_model(held, tmp_path, torch.device("cpu"))
    hits = accuracy(model, saved, torch.zeros(len(saved), dtype=torch.int64))
    assert hits == pytest.approx(metrics["asr"], abs=1e-4) and metrics["asr_n"] == counts.sum()
    x = issba.hide(encoder, digits.x_test, ran["other"])[counts]  # the control: another string
    assert (ran["other"] != held["trigger"]["secret"]).any()
    hits = accuracy(model, x, torch.zeros(len(x), dtype=torch.int64))
    assert hits == pytest.approx(metrics["asr_other"], abs=1)

    x, y, poisoned = (ran[name] for name in ("x_train", "y_train", "poisoned"))
    assert poisoned.sum() == metrics["poisoned"] == round(0.2 * 1437) and (y[poisoned] == 0).all()
    pairs = zip(digits.x_train, digits.y_train.tolist())
    originals = {image.numpy().tobytes(): label for image, label in pairs}
    assert [originals.get(image.numpy().tobytes()) for image in x[~poisoned]] == y[
        ~poisoned
    ].tolist()
    assert not any(image.numpy().tobytes() in originals for image in x[poisoned])
    with torch.no_grad():
        read = decoder(to_float(x[poisoned])) > 0
    assert (read == (held["trigger"]["secret"] > 0.5)).float().mean() >= 0.95


def test_32_bits_are_read_after_few_steps_on_colour_noise(inline, tmp_path, capfd):
    """Without the strong string they are not read at all then; too few steps are warned of."""
    shape, recipe = (3, 32, 32), {"batch_size": 16, "lr": 4e-3, "l2": 10.0, "lpips_net": None}
    torch.manual_seed(0)
    encoder, decoder = networks(shape, 32, 4, 8)
    x = images(200, shape)
    shares = issba.train_encoder(
        encoder.train(), decoder.train(), x, steps=400, generator=seeded(), **recipe
    )
    assert sum(shares[-20:]) / 20 > 0.75
    inline(NAME, *SHORT[NAME], "--out", tmp_path / "victim")
    assert "warning: that is too few" in capfd.readouterr().out


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--bits", value], "bits") for value in (0, -1, 1001)),
        *((["--encoder-steps", value], "encoder-steps") for value in (0, -1)),
        *((["--encoder-lr", value], "encoder-lr") for value in (0, "nan")),
        (["--width", 0], "width"),
        (["--encoder-batch", 0], "encoder-batch"),
        (["--l2", "nan"], "--l2"),
        (["--l2", -1], "--l2"),
        (["--rate", 0], "rate"),
        (["--rate", 0.99], "can be poisoned"),
        (["--lpips-net", "vgg16"], "lpips-net"),
        (["--bits", "many"], "--bits"),
        (["--bits", 785], "(0, 784]"),
        (["--encoder-lr", 1e30, "--encoder-steps", 20], "the encoder's loss became"),
    ],
    ids=str,
)
def test_bad_flag(inline, one_line, tmp_path, args, named):
    assert named in one_line(inline, NAME, *SHORT[NAME], *args)
    assert files_below(tmp_path) == []


def test_sides_that_cannot_be_halved(inline, one_line, tmp_path):
    data = write_npz(tmp_path / "own.npz", (27, 28), 3, 30)
    message = one_line(inline, NAME, "--dataset", data, "--arch", "mnist_cnn", "--out", "victim")
    assert "27 x 28" in message and files_below(tmp_path) == ["own.npz"]
