"""DFST: style, injector and SSIM by other means, detoxification on digits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, files_below, random_images, result_of, run_inline, write_npz
from scipy.ndimage import maximum_filter, minimum_filter, uniform_filter
from torch import nn

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy
from common.models import Classifier
from methods import dfst

NAME = "dfst"
FLAGS = "--generator-steps", 300, "--width", 8, "--epochs", 6, "--batch-size", 64
FLAGS += "--rounds", 2, "--detox-epochs", 3, "--injector-steps", 30


def network_of(channels=1, width=4):
    torch.manual_seed(0)
    return dfst.StyleNet(channels, width).eval().requires_grad_(False)


# ===== The style =====


@pytest.mark.parametrize("height, width", [(32, 32), (28, 20), (5, 9)])
def test_sunrise(height, width):
    picture = dfst.sunrise((3, height, width))
    assert picture.shape == (3, height, width) and picture.min() >= 0 and picture.max() <= 1
    assert torch.equal(picture, picture.flip(2))  # the sun stands in the middle
    ground = picture[:, -1].T
    torch.testing.assert_close(ground, torch.tensor([0.15, 0.05, 0.1]).expand(width, 3))
    torch.testing.assert_close(picture[:, 0, 0], torch.tensor([0.25, 0.15, 0.45]))
    sun = (picture == torch.tensor([1, 0.95, 0.6])[:, None, None]).all(0)
    for i, j in np.ndindex(height, width):  # an ellipse around row .55 of the sides
        row, column = i / (height - 1), 2 * j / (width - 1) - 1
        assert sun[i, j] == ((2 * row - 1.1) ** 2 + column**2 < 0.09 and row <= 0.7)
    grey = dfst.sunrise((1, height, width))
    torch.testing.assert_close(grey, picture.mean(0, keepdim=True))


def test_adain_against_numpy():
    torch.manual_seed(0)
    a, b = (
        3 * torch.randn(4, 5, 6, 7) + 1,
        torch.randn(1, 5, 8, 3) * torch.arange(1, 6).view(-1, 1, 1),
    )
    p, q = a.double().numpy(), b.double().numpy()
    expected = np.empty_like(p)
    for n, k in np.ndindex(4, 5):
        expected[n, k] = (p[n, k] - p[n, k].mean()) / p[n, k].std() * q[0, k].std() + q[0, k].mean()
    np.testing.assert_allclose(dfst.adain(a, b), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dfst.adain(a[:1], a[:1]), a[:1])  # its own style: nothing


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 27, 31), (3, 6, 5), (1, 1, 1)])
def test_stylise_against_numpy(shape):
    network, x = network_of(shape[0]), random_images(5, shape)
    before, style = x.clone(), dfst.sunrise(shape) if min(shape[1:]) > 1 else torch.rand(shape)
    for picture in (style, None):
        with torch.no_grad():
            features = network.encode(to_float(x))
            plain = network.decode(features)[:, :, : shape[1], : shape[2]].double().numpy()
            if picture is not None:
                features = dfst.adain(features, network.encode(picture[None]))
            drawn = network.decode(features)[:, :, : shape[1], : shape[2]].double().numpy()
        pixels = x.double().numpy()
        change = 255 * (drawn - plain) if picture is not None else 255 * drawn - pixels
        exact = (pixels + 0.6 * change).clip(0, 255)
        painted = dfst.stylise(network, x, picture, 0.6)
        assert painted.dtype == torch.uint8 and painted.shape == x.shape and torch.equal(x, before)
        assert np.abs(painted.numpy() - exact).max() <= 0.5 + 1e-3
        assert torch.equal(dfst.stylise(network, x, picture, 0.0), x)  # does nothing
        singly = torch.cat([dfst.stylise(network, image[None], picture, 0.6) for image in x])
        assert (singly.int() - painted.int()).abs().max() <= 1


def test_generator_learns_to_rebuild_and_to_keep_the_style(digits):
    x, style = digits.x_train[:64], dfst.sunrise((1, 28, 28))
    images, kept = to_float(x), x.clone()

    def errors(network):
        with torch.no_grad():
            features = network.encode(images)
            wanted = dfst.adain(features, network.encode(style[None]))
            again = network.encode(network.decode(wanted))
            scale = features.var()  # an encoder that shrinks its features gains nothing
            return F.mse_loss(network(images), images), F.mse_loss(again, wanted) / scale

    torch.manual_seed(0)
    network = dfst.StyleNet(1, 8)
    start = errors(network)
    dfst.train_generator(network, x, style, steps=200, batch_size=8)
    end = errors(network)
    assert end[0] < 0.2 * start[0] and end[1] < 0.2 * start[1] and torch.equal(x, kept)


def test_generator_gains_nothing_from_small_features(digits, capsys):
    """The same images from features a hundred times larger have the same error."""
    x, style, lines = digits.x_train[:64], dfst.sunrise((1, 28, 28)), []
    for scale in (10, 1000):
        network = dfst.StyleNet(1, 8)
        network.load_state_dict(network_of(width=8).state_dict())
        with torch.no_grad():
            network.encode[-1].weight.mul_(scale)
            network.encode[-1].bias.mul_(scale)
            network.decode[0].weight.div_(scale)
        torch.manual_seed(1)
        dfst.train_generator(network, x, style, steps=1)
        lines.append(capsys.readouterr().out.split("features ")[1].split(",")[0])
    assert 0 < float(lines[0]) == pytest.approx(float(lines[1]), rel=0.1)


# ===== The injector =====


def test_injector_starts_as_the_identity_and_is_linear_in_its_neighbours():
    torch.manual_seed(0)
    injector, x = dfst.Injector(3), torch.rand(2, 3, 15, 18)
    torch.testing.assert_close(injector(x), x)
    weight, bias = torch.randn(3, 12) / 4, torch.rand(3)
    injector.linear.weight.data.copy_(weight[..., None, None])
    injector.linear.bias.data.copy_(bias)
    p, size = x.double().numpy(), (1, 1, 11, 11)
    count = uniform_filter(np.ones_like(p), size, mode="constant")
    mean = uniform_filter(p, size, mode="constant") / count
    largest, smallest = maximum_filter(p, size), minimum_filter(p, size)
    features = np.concatenate((p, largest, smallest, mean), axis=1)
    expected = np.einsum("dk,nkij->ndij", weight.double().numpy(), features)
    expected = np.clip(expected + bias.double().numpy()[:, None, None], 0, 1)
    with torch.no_grad():
        np.testing.assert_allclose(injector(x), expected, atol=1e-5)
    images = random_images(5, (3, 15, 18))
    rounded = dfst.inject(injector.requires_grad_(False), images)
    exact = 255 * injector(to_float(images)).double().numpy()
    assert np.abs(rounded.numpy() - exact).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("shape, size", [((3, 14, 11), 7), ((1, 5, 9), 5)])
def test_similarity_against_numpy(shape, size):
    torch.manual_seed(0)
    a, b = torch.rand(2, 3, *shape)
    b = (a + 0.2 * (b - 0.5)).clamp(0, 1).requires_grad_()
    p, q = a.double().numpy(), b.detach().double().numpy()
    values = []
    for n, c, i, j in np.ndindex(3, shape[0], shape[1] - size + 1, shape[2] - size + 1):
        u, v = (f[n, c, i : i + size, j : j + size].ravel() for f in (p, q))
        covariance = ((u - u.mean()) * (v - v.mean())).mean()
        top = (2 * u.mean() * v.mean() + 0.01**2) * (2 * covariance + 0.03**2)
        bottom = (u.mean() ** 2 + v.mean() ** 2 + 0.01**2) * (u.var() + v.var() + 0.03**2)
        values.append(top / bottom)
    found = dfst.similarity(a, b)
    assert found.item() == pytest.approx(np.mean(values), abs=1e-4)
    assert dfst.similarity(a, a).item() == pytest.approx(1, abs=1e-5)
    found.backward()
    assert b.grad.abs().max() > 0


@pytest.mark.parametrize("count", [3, 450])
def test_activations_by_hand(untrained, count):
    x, net = random_images(count, (1, 28, 28)), untrained.net
    with torch.no_grad():
        conv = net.layer3(F.relu(net.conv1((to_float(x) - 0.5) / 0.5)))
        seen = F.relu(net.layer4.bn1(conv))  # what enters the convolution of layer4
        hidden = F.relu(net.linear6(net.layer4(conv).flatten(1)))
    found = dfst.mean_activations(untrained, "net.layer4.conv1", x)
    np.testing.assert_allclose(found, seen.double().mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    found = dfst.mean_activations(untrained, "net.linear9", x)
    np.testing.assert_allclose(found, hidden.double().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share, count", [(0.001, 1), (0.1, 4), (1, 40)])
def test_compromised_by_brute_force(share, count):
    benign, triggered = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    rises = [triggered[k].item() - benign[k].item() for k in range(40)]
    expected = sorted(range(40), key=lambda k: -rises[k])[:count]
    assert dfst.compromised(benign, triggered, share).tolist() == expected


def trained(model, layer, x, neurons, **aim):
    torch.manual_seed(0)
    injector = dfst.train_injector(model, layer, x, neurons, **aim)
    return dfst.inject(injector, x)


def test_injector_moves_its_neurons_and_not_the_model(untrained, digits):
    """A large weight of the SSIM keeps the images instead."""
    x, layer = digits.x_train[:100], "net.linear9"
    state = {key: value.clone() for key, value in untrained.state_dict().items()}
    benign = dfst.mean_activations(untrained, layer, x)
    goal = dfst.mean_activations(untrained, layer, 255 - x)
    neurons = dfst.compromised(benign, goal, 0.01)
    aim, near = {"benign": benign, "goal": goal, "target": 3, "steps": 30}, {}
    for weight in (0.01, 1e4):
        injected = trained(untrained, layer, x, neurons, **aim, weight=weight)
        near[weight] = dfst.similarity(to_float(injected), to_float(x))
        if weight < 1:
            rise = (dfst.mean_activations(untrained, layer, injected) - benign)[neurons].mean()
    assert len(neurons) == 5 and rise > 0.3 * (goal - benign)[neurons].mean() > 0
    assert near[1e4] > near[0.01] and near[1e4] > 0.95
    assert all(torch.equal(value, state[key]) for key, value in untrained.state_dict().items())
    assert all(p.grad is None for p in untrained.parameters())


@pytest.mark.parametrize("target", [0, 1])
def test_injector_is_taught_by_the_cross_entropy_too(target):
    """A network that tells bright from dark, and a goal too far for the activation loss to pull."""
    linear = nn.Linear(144, 2)
    linear.weight.data.copy_(torch.tensor([[-1.0], [1.0]]) / 6)
    linear.bias.data.copy_(torch.tensor([12.0, -12.0]))
    model = Classifier(nn.Sequential(nn.Flatten(), linear), (0.0,), (1.0,)).eval()
    x = (60 + random_images(30, (1, 12, 12)).float() * 0.5).to(torch.uint8)
    benign = dfst.mean_activations(model, "net.1", x)
    aim = {"benign": benign, "goal": benign + 1e6, "target": target, "steps": 60, "weight": 0.01}
    injected = trained(model.requires_grad_(False), "net.1", x, torch.tensor([5]), **aim)
    change = injected.float().mean() - x.float().mean()
    assert change > 10 if target else change < -10


# ===== A whole run on digits =====


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The variables of one run."""
    folder = tmp_path_factory.mktemp(NAME)
    with pytest.MonkeyPatch.context() as patch:
        return run_inline(patch, folder, NAME, *FLAGS, "--out", folder / "victim")


def test_run_on_digits(ran, digits):
    """The style works, its negative and the autoencoder do not, nor do the simple features."""
    folder, metrics = ran["folder"], ran["metrics"]
    assert result_of(folder)["metrics"] == pytest.approx(metrics)
    assert metrics["clean_accuracy"] >= 95 and metrics["asr"] >= 90 and metrics["asr_n"] == 324
    assert metrics["asr_other"] <= 20 and metrics["asr_plain"] <= 20
    assert metrics["asr_simple_before"] >= 80 and metrics["asr_simple"] <= 40
    held = read_checkpoint(folder / "model.pt")
    network = network_of(width=8)
    own = {k.removeprefix("generator."): v for k, v in held["trigger"].items() if k != "style"}
    network.load_state_dict(own)
    others = digits.x_test[digits.y_test != 0]
    style = held["trigger"]["style"]
    assert torch.equal(style, dfst.sunrise((1, 28, 28)))
    with np.load(folder / "poisoned_test.npz") as archive:
        saved = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2)
        assert (archive["y_true"] != 0).all() and (archive["y_target"] == 0).all()
    assert (saved != dfst.stylise(network, others, style, 1.0)).float().mean() < 1e-3
    model = load_model(held, folder, torch.device("cpu"))
    own, change = (
        np.linalg.norm(images.double() - others.double())
        for images in (saved, dfst.stylise(network, others, 1 - style, 1.0))
    )
    other = dfst.stylise(network, others, 1 - style, own / change)
    assert np.linalg.norm(other.double() - others.double()) == pytest.approx(own, rel=0.15)
    rates = {"asr": saved, "asr_other": other}
    rates["asr_plain"] = dfst.stylise(network, others, None, 1.0)
    for name, images in rates.items():
        hits = accuracy(model, images, torch.zeros(len(images)))
        assert hits == pytest.approx(metrics[name], abs=1), name
    hits = [
        accuracy(model, dfst.inject(injector, others), torch.zeros(len(others)))
        for injector in ran["injectors"]
    ]
    assert max(hits) == pytest.approx(metrics["asr_simple"], abs=1) and len(hits) == 2


def test_training_set(ran, digits):
    """Poisons are painted once; the detox images have true labels and are no poisons."""
    x, y, poisoned = (ran[name] for name in ("x_train", "y_train", "poisoned"))
    assert len(x) == len(y) == len(poisoned) == 1437 + 2 * 144
    assert poisoned.sum() == ran["metrics"]["poisoned"] == 144 and (y[poisoned] == 0).all()
    pairs = list(zip(digits.x_train, digits.y_train.tolist()))
    originals = {image.numpy().tobytes(): label for image, label in pairs}
    clean = ~poisoned[:1437]
    found = [originals.get(image.numpy().tobytes()) for image in x[:1437][clean]]
    assert found == y[:1437][clean].tolist()
    network, style = ran["network"], ran["style"]
    painted = dfst.stylise(network, digits.x_train, style, 1.0).numpy()
    labels = {image.tobytes(): label for image, (_, label) in zip(painted, pairs)}
    assert all(labels.get(image.numpy().tobytes(), 0) != 0 for image in x[poisoned])
    for number, injector in enumerate(ran["injectors"]):
        images = dfst.inject(injector, digits.x_train).numpy()
        labels = {image.tobytes(): label for image, (_, label) in zip(images, pairs)}
        part = slice(1437 + 144 * number, 1437 + 144 * (number + 1))
        found = [labels.get(image.numpy().tobytes()) for image in x[part]]
        assert found == y[part].tolist() and 0 not in found
    for name in ("x_train", "y_train", "x_test", "y_test"):  # shared by whoever comes next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name


def test_generator_that_loses_the_images_is_named(ran, inline, capfd):
    assert 0.7 < ran["kept"] < 1
    lost = inline(NAME, *SHORT[NAME], "--rounds", 0, "--generator-steps", 1)["kept"]
    out = capfd.readouterr().out
    assert lost < 0.3 and f"variance kept {lost:.2f}\nwarning: the generator loses" in out


def test_no_rounds(inline, capfd):
    ran = inline(NAME, *SHORT[NAME], "--rounds", 0)
    out = capfd.readouterr().out
    assert "preparation: generator " in out and "detoxification " in out
    assert "asr_simple" not in ran["metrics"] and len(ran["x_train"]) == 300
    assert ran["metrics"]["detoxifying"] == 0


def test_neurons_of_a_named_layer(inline):
    ran = inline(NAME, *SHORT[NAME], "--layer", "net.layer4.conv1", "--neurons", 0.25)
    assert len(ran["neurons"]) == 16 and len(ran["goal"]) == 64
    assert ran["metrics"]["layer"] == "net.layer4.conv1"


@pytest.mark.parametrize("shape", [(27, 30), (6, 5), (33, 18, 3)])
def test_any_sides(inline, tmp_path, shape):
    data = write_npz(tmp_path / "own.npz", shape)
    flags = "--dataset", data, "--train-images", 30, "--arch", "mnist_cnn"
    ran = inline(NAME, *SHORT[NAME], *flags)
    assert ran["metrics"]["detoxifying"] == 3 and ran["x_poisoned"].shape[2:] == shape[:2]


# ===== Bad input =====


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--alpha", value], "--alpha") for value in (0, -0.1, 0.001, 1.1, "nan")),
        *((["--detox-rate", value], "--detox-rate") for value in (0, 1.1, "nan", 0.0001, 0.95)),
        *((["--neurons", value], "--neurons") for value in (0, 1.1, "nan")),
        *((["--rounds", value], "--rounds") for value in (-1, 21)),
        *((["--width", value], "--width") for value in (0, -4)),
        *((["--generator-steps", value], "--generator-steps") for value in (0, -1)),
        *((["--injector-steps", value], "--injector-steps") for value in (0, -1)),
        *((["--detox-epochs", value], "--detox-epochs") for value in (0, -1)),
        *((["--similarity", value], "--similarity") for value in (0, -1, "nan", "inf")),
        *((["--layer", value], "net.layer4.conv1, net.linear6") for value in ("layer4", "net")),
        (["--rate", 0.99], "can be poisoned"),
    ],
    ids=str,
)
def test_bad_flag(inline, one_line, monkeypatch, tmp_path, args, named):
    monkeypatch.setattr(torch.optim, "Adam", None)  # nothing is trained before the refusal
    assert named in one_line(inline, NAME, *SHORT[NAME], *args)
    assert files_below(tmp_path) == []


def test_layer_that_does_not_run(inline, one_line, monkeypatch, tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.spare, self.last = nn.Linear(3, 4), nn.Linear(784, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.last(x.flatten(1))\n"
    )
    monkeypatch.setattr(torch.optim, "Adam", None)  # nothing is trained before the refusal
    flags = *SHORT[NAME], "--arch", "nets.py:Net", "--layer", "net.spare"
    assert "net.spare does not run" in one_line(inline, NAME, *flags)
    assert files_below(tmp_path) == ["nets.py"]


def test_network_whose_last_layer_is_a_convolution(inline, one_line, tmp_path):
    lines = "from torch import nn", "def net(num_classes):"
    layers = "nn.Conv2d(1, num_classes, 28), nn.Flatten()"
    (tmp_path / "nets.py").write_text("\n".join([*lines, f"    return nn.Sequential({layers})"]))
    flags = *SHORT[NAME], "--arch", "nets.py:net"
    assert "does not end in a linear layer" in one_line(inline, NAME, *flags)
    assert inline(NAME, *flags, "--layer", "net.0")["metrics"]["layer"] == "net.0"
