"""Mode connectivity repair: the curve against closed forms and NumPy, and runs on digits."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, explosive, files_below, loaded, result_of, run_here, write_npz
from planted import CLASSES, SIDE, TARGET, Planted, images
from torch import nn
from torch.func import functional_call

from common import defence
from common.datasets import to_float
from common.metrics import accuracy
from common.models import Classifier, build_model
from methods import mcr


def network(seed, arch="mnist_cnn", shape=(1, 28, 28)):
    """A network with arbitrary weights and BatchNorm statistics, in eval mode, frozen."""
    torch.manual_seed(seed)
    model = build_model(arch, 5, shape, (0.5,) * shape[0], (0.5,) * shape[0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval().requires_grad_(False)


def noise(count=30, shape=(1, 28, 28)):
    """uint8 images of arbitrary brightness and their labels."""
    x = torch.rand(count, *shape) * torch.rand(count, 1, 1, 1)
    return (255 * x).byte(), torch.arange(count) % 5


def joined(net, ends, x, y, *, epochs=1, lr=0.1, batch_size=20, pad=0):
    """connect() between two sets of weights, from seed 5."""
    torch.manual_seed(5)
    rates = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    return mcr.connect(net, *ends, x, y, pad=pad, flip=False, **rates)


# ===== The curve =====


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.73, 1.0])
def test_bezier_against_numpy(t):
    """De Casteljau's construction: a straight line between the points of two straight lines."""
    rng = np.random.default_rng(0)
    w1, theta, w2 = ({"a": rng.normal(size=(3, 4)), "b": rng.normal(size=5)} for _ in range(3))
    sets = [{k: torch.from_numpy(v) for k, v in w.items()} for w in (w1, theta, w2)]
    for at in (t, torch.tensor(t, dtype=torch.float64)):
        phi = mcr.bezier(*sets, at)
        for key in ("a", "b"):
            left = (1 - t) * w1[key] + t * theta[key]
            right = (1 - t) * theta[key] + t * w2[key]
            np.testing.assert_allclose(phi[key], (1 - t) * left + t * right, rtol=1e-12)
            if t in (0, 1):
                assert torch.equal(phi[key], sets[2 * int(t)][key])


@pytest.mark.parametrize("arch, shape", [("mnist_cnn", (1, 28, 28)), ("wrn16_1", (3, 16, 16))])
def test_the_ends_are_the_two_networks_after_a_refresh(arch, shape):
    """t = 0 is the suspect, t = 1 the other end, bit by bit; nothing is left of old statistics."""
    (first, second), (x, _) = (network(seed, arch, shape) for seed in (0, 1)), noise(30, shape)
    before = {key: value.clone() for key, value in first.state_dict().items()}
    theta = {key: torch.randn_like(value) for key, value in mcr.weights_of(first).items()}
    ends = mcr.weights_of(first), mcr.weights_of(second)
    for t, end in ((0.0, first), (1.0, second)):
        made = mcr.point(first, mcr.bezier(ends[0], theta, ends[1], t), x)
        expected = mcr.refresh(copy.deepcopy(end), x)
        assert torch.equal(made(to_float(x)), expected(to_float(x)))
        assert not torch.allclose(made(to_float(x)), end(to_float(x)))  # the statistics are new
        assert not made.training and not any(p.requires_grad for p in made.parameters())
    assert all(torch.equal(value, before[key]) for key, value in first.state_dict().items())


# ===== BatchNorm =====


def test_weights_of_another_network_are_no_point():
    net, x = network(0), noise(30)[0]
    misnamed = {f"net.{name}": value for name, value in mcr.weights_of(net).items()}
    with pytest.raises(RuntimeError, match="Unexpected"):
        mcr.point(net, misnamed, x)


@pytest.mark.parametrize("batch_size", [100, 12])  # 30 images: one batch, or 12 + 12 + 6
def test_refresh_takes_the_statistics_of_all_images(batch_size):
    model, (x, _) = network(0), noise()
    mcr.refresh(model, x, batch_size)
    entering = F.relu(model.net.conv1((to_float(x) - 0.5) / 0.5)).transpose(0, 1)  # C x N x H x W
    norm = model.net.layer3.bn1
    torch.testing.assert_close(norm.running_mean, entering.flatten(1).mean(1), atol=1e-6, rtol=1e-5)
    sizes = [len(part) for part in x.split(batch_size)]
    parts = [part.flatten(1).var(1) for part in entering.split(sizes, 1)]
    expected = sum(n * part for n, part in zip(sizes, parts)) / len(x)
    torch.testing.assert_close(norm.running_var, expected, atol=1e-6, rtol=1e-4)
    assert not any(module.training for module in model.modules())


def test_refresh_on_constant_images_gives_their_mean_exactly():
    model = mcr.refresh(network(0), torch.full((30, 1, 28, 28), 51, dtype=torch.uint8), 7)
    inside = F.relu(model.net.conv1((torch.full((1, 1, 28, 28), 0.2) - 0.5) / 0.5))
    expected = inside.mean((0, 2, 3))
    torch.testing.assert_close(model.net.layer3.bn1.running_mean, expected, atol=1e-6, rtol=1e-5)


def test_refresh_changes_statistics_alone():
    """Dropout stays off, so that it is not drawn anew; a network without BatchNorm stays."""
    x, _ = noise()
    for arch in ("mnist_cnn", "mnist_conv5"):
        model = network(0, arch)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        drawn = torch.get_rng_state()
        mcr.refresh(model, x)
        assert torch.equal(torch.get_rng_state(), drawn)
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]) == ("running" not in key and "num_" not in key)


def test_refresh_of_vectors_where_one_image_is_left_over():
    """BatchNorm1d has no variance of one vector; the image is left out."""
    layers = nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
    net = Classifier(nn.Sequential(*layers), (0.5,), (0.5,))
    x, _ = noise(21)
    mcr.refresh(net, x, 10)
    inside = net.net[1](((to_float(x[:20]) - 0.5) / 0.5).flatten(1))
    torch.testing.assert_close(net.net[2].running_mean, inside.mean(0), atol=1e-5, rtol=1e-4)


# ===== Training theta =====


class Small(nn.Module):
    """A multilayer perceptron with BatchNorm and without Dropout."""

    def __init__(self, seed, side=6):
        super().__init__()
        torch.manual_seed(seed)
        layers = nn.Linear(side**2, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 5)
        self.net = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, x):
        return self.net(x)


def test_gradient_is_that_of_finite_differences():
    """Of the loss at t with respect to theta, through the network, in float64."""
    model, t = Small(0).double().train(), 0.3
    x, y = torch.rand(12, 1, 6, 6).double(), torch.arange(12) % 5
    first, second = (mcr.weights_of(Small(seed).double()) for seed in (0, 1))
    theta = {key: torch.randn_like(value).requires_grad_() for key, value in first.items()}

    def loss():
        phi = mcr.bezier(first, theta, second, t)
        return F.cross_entropy(functional_call(model, phi, (x,)), y)

    of_theta = torch.autograd.grad(loss(), list(theta.values()))
    phi = {k: v.detach().requires_grad_() for k, v in mcr.bezier(first, theta, second, t).items()}
    at_point = F.cross_entropy(functional_call(model, phi, (x,)), y)
    of_phi = torch.autograd.grad(at_point, list(phi.values()))
    for key, mine, points in zip(theta, of_theta, of_phi):
        torch.testing.assert_close(mine, 2 * t * (1 - t) * points)  # the closed form
        flat, index, values = theta[key].data.view(-1), 3, []
        for step in (1e-6, -2e-6):
            flat[index] += step
            values.append(loss().item())
        flat[index] += 1e-6
        slope = (values[0] - values[1]) / 2e-6
        assert mine.flatten()[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("decay", [5e-4, 0.3])
def test_two_steps_written_out(monkeypatch, decay):
    """g = 2t(1-t) (dCE/dphi + wd phi); v = .9 v + g; theta -= rate v, all of it, then half."""
    monkeypatch.setattr(mcr, "WEIGHT_DECAY", decay)
    model, (x, y) = Small(0), noise(40, (1, 6, 6))
    drawn = iter([0.25, 0.8])
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.tensor(next(drawn)))
    ends = mcr.weights_of(model), mcr.weights_of(Small(1))
    kept = [{key: value.clone() for key, value in end.items()} for end in ends]
    found = joined(model, ends, x, y)
    theta = {key: (ends[0][key] + ends[1][key]) / 2 for key in ends[0]}
    velocity, step = {key: torch.zeros_like(value) for key, value in theta.items()}, Small(0)
    torch.manual_seed(5)
    for batch, t, rate in zip(torch.randperm(40).split(20), (0.25, 0.8), (0.1, 0.05)):
        phi = {
            k: (1 - t) ** 2 * ends[0][k] + 2 * t * (1 - t) * theta[k] + t**2 * ends[1][k]
            for k in theta
        }
        step.load_state_dict(phi, strict=False)
        step.zero_grad()
        F.cross_entropy(step(x[batch].float() / 255), y[batch]).backward()
        for key, value in step.named_parameters():
            gradient = 2 * t * (1 - t) * (value.grad + decay * phi[key])
            velocity[key] = 0.9 * velocity[key] + gradient
            theta[key] = theta[key] - rate * velocity[key]
    for key in theta:
        torch.testing.assert_close(found[key], theta[key], rtol=1e-4, atol=1e-6)
        assert all(torch.equal(end[key], old[key]) for end, old in zip(ends, kept))


def test_weights_that_clean_images_do_not_touch_follow_the_regulariser(monkeypatch):
    """Its mean over t, .5 E|phi(t)|^2, is smallest at theta = -.75 (w1 + w2)."""
    monkeypatch.setattr(mcr, "WEIGHT_DECAY", 1.0)
    model = Planted()
    ends = [{"linear.weight": torch.full((CLASSES, SIDE**2), value)} for value in (2.0, 6.0)]
    x = torch.zeros(8, 1, SIDE, SIDE, dtype=torch.uint8)  # black: no gradient from the images
    y = torch.arange(8)
    theta = joined(model, ends, x, y, epochs=1500, lr=0.1, batch_size=8)["linear.weight"]
    assert theta.unique().numel() == 1 and theta.max().item() == pytest.approx(-6, abs=0.3)


def test_planted_triggers_fade_along_the_curve():
    """A logistic toy: pixel 0 is the trigger of one end, the last pixel that of the other.

    Both are black in clean images, whose gradient leaves them alone: their logits are 20 (1 - t)
    and 20 t, while a class's own block gives 10. Each backdoor ends where its logit falls below.
    """
    model, other = Planted().eval(), Planted().eval()
    other.linear.weight.data[TARGET, [0, -1]] = torch.tensor([0.0, 20.0])
    x, y = images(4)
    ends, x = (mcr.weights_of(model), mcr.weights_of(other)), (255 * x).round().byte()
    theta = joined(model, ends, x, y, epochs=3, lr=0.05)
    triggered = [x[y != TARGET].clone() for _ in range(2)]
    triggered[0][..., 0, 0] = triggered[1][..., -1, -1] = 255
    target = torch.full((len(triggered[0]),), TARGET)
    for t in (0, 0.2, 0.4, 0.6, 0.8, 1):
        net = mcr.point(model, mcr.bezier(*ends[:1], theta, ends[1], t), x)
        weight = net.linear.weight[TARGET]
        assert weight[0].item() == pytest.approx(20 * (1 - t), abs=0.05)
        assert weight[-1].item() == pytest.approx(20 * t, abs=0.05)
        assert accuracy(net, x, y) == 100
        assert accuracy(net, triggered[0], target) == (100 if t < 0.5 else 0)
        assert accuracy(net, triggered[1], target) == (100 if t > 0.5 else 0)


def two_layers(units):
    """The planted model behind hidden units in this order: every order is the same function."""
    hidden, last = nn.Linear(SIDE**2, CLASSES), nn.Linear(CLASSES, CLASSES)
    hidden.weight.data = Planted("none").linear.weight.data[units]
    last.weight.data = torch.eye(CLASSES)[:, units]
    hidden.bias.data, last.bias.data = torch.zeros(2, CLASSES)
    return nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), last).eval()


def test_the_curve_goes_around_a_barrier():
    """Ends that differ by the order of their hidden units: the straight line is worse."""
    (x, y), order = images(8), torch.arange(CLASSES)
    x, nets = (255 * x).round().byte(), [two_layers(order), two_layers(order.roll(1))]
    ends = [mcr.weights_of(net) for net in nets]
    straight = {key: (ends[0][key] + ends[1][key]) / 2 for key in ends[0]}
    trained = joined(nets[0], ends, x, y, epochs=60, lr=0.1, batch_size=40)
    losses = []
    for theta in (straight, trained):
        middle = mcr.point(nets[0], mcr.bezier(ends[0], theta, ends[1], 0.5), x)
        losses.append(mcr.mean_loss(middle, x, y))
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("call", ["finetune", "connect"])
def test_diverging_training_gives_no_model(call):
    model, (x, y) = network(0), noise(60)
    ends = mcr.weights_of(model), mcr.weights_of(network(1))
    parts = (model,) if call == "finetune" else (model, *ends)
    rates = {"epochs": 2, "lr": 1e30, "batch_size": 20}
    assert getattr(mcr, call)(*parts, x, y, pad=2, flip=False, **rates) is None


def test_no_decay_moves_the_whitening(monkeypatch):
    """Cross-entropy has no gradient for these filters, and the regulariser leaves them alone."""
    monkeypatch.setattr(mcr, "WEIGHT_DECAY", 1.0)
    shape, mean = (3, 12, 12), (0.5,) * 3
    nets = [build_model("airbench", 3, shape, mean, mean).eval() for _ in range(2)]
    ends = [mcr.weights_of(net) for net in nets]
    x, y = torch.randint(0, 256, (8, *shape)).to(torch.uint8), torch.arange(8) % 3
    rates = {"epochs": 2, "lr": 0.01, "batch_size": 4, "pad": 0, "flip": False}
    theta, name = mcr.connect(nets[0], *ends, x, y, **rates), "net.whiten.weight"
    assert torch.equal(theta[name], (ends[0][name] + ends[1][name]) / 2)
    other = "net.linear.weight"
    assert not torch.allclose(theta[other], (ends[0][other] + ends[1][other]) / 2)


def test_mean_loss():
    model, (x, y) = network(0), noise(401)  # three passes
    expected = F.cross_entropy(model(to_float(x)), y).item()
    assert mcr.mean_loss(model, x, y) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "losses, accuracies, rule, chosen",
    [
        ([0, 4, 3, 2, 0], [99] * 5, "middle", 2),
        ([0, 4, 3, 2, 0], [99] * 5, "loss", 3),  # the ends are no repairs
        ([0, 4, 3, 2, 0], [99, 99, 89, 99, 99], "middle", 3),  # of two the lower loss
        ([0, 1, 3, 2, 0], [99, 99, 89, 99, 99], "middle", 1),
        ([0, 4, 3, 2, 0], [99, 99, 90, 89, 99], "loss", 2),
        ([0, 4, 3, 2, 0], [99, 89, 89, 89, 99], "middle", None),
        ([0, 4, 3, 2, 0], [99, 89, 89, 89, 99], "loss", None),
        ([0, 1, 0], [99, 90, 99], "middle", 1),
    ],
)
def test_choice_of_the_point(losses, accuracies, rule, chosen):
    t = np.linspace(0, 1, len(losses)).tolist()
    assert mcr.choose(t, losses, accuracies, 90, rule) == chosen


# ===== Whole runs on digits =====


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_badnets, digits_blend):
    """The curve from a BadNets model to a Blend model, both of target 0."""
    out = tmp_path_factory.mktemp("mcr")
    flags = "--second", digits_blend, "--batch-size", 32, "--epochs", 40, "--points", 5
    flags = *flags, "--out", out
    return out, run_here("mcr", "--ckpt", digits_badnets, *flags, cwd=out)


@pytest.mark.drawn
def test_both_backdoors_are_gone_in_the_middle(run, digits_badnets, digits_blend, digits):
    out, printed = run
    metrics = result_of(out)["metrics"]
    assert metrics["t"] == 0.5 and metrics["points"] == [0, 0.25, 0.5, 0.75, 1]
    assert metrics["asr"] > 95 and metrics["asr_repaired"] < 20
    assert "asr_clean_only" in metrics  # 20 to 90, by processor
    assert metrics["clean_accuracy_repaired"] > 93
    assert metrics["curve_asr"][0] > 90  # the suspect, its BatchNorm refreshed
    assert metrics["curve_asr"][2] == pytest.approx(metrics["asr_repaired"], abs=1e-4)
    gaps = np.subtract(metrics["curve_clean_accuracy"], metrics["curve_asr"])
    assert metrics["largest_gap"] == pytest.approx(gaps.max())
    assert files_below(out) == ["curve.png", "model.pt", "result.json"]
    assert "the repaired model is the point t = 0.5" in printed and "RESULT mcr" in printed
    saved, other = loaded(out).model, loaded(digits_blend)
    victim = loaded(digits_badnets)
    attack = victim.x_poisoned, victim.y_target
    assert accuracy(saved, *attack) == pytest.approx(metrics["asr_repaired"], abs=1e-4)
    clean = accuracy(saved, digits.x_test, digits.y_test)
    assert clean == pytest.approx(metrics["clean_accuracy_repaired"], abs=1e-4)
    assert accuracy(saved, other.x_poisoned, other.y_target) < 50  # the other end's backdoor


def test_the_defender_needs_no_triggered_image(inline, digits_badnets, tmp_path, capfd):
    """Without poisoned_test.npz: bitwise the same repaired model, and no ASR; a tuned end."""
    blind = tmp_path / "blind"
    blind.mkdir()
    shutil.copy(digits_badnets / "model.pt", blind)
    for folder, out in ((digits_badnets, "seen"), (blind, "unseen")):
        inline("mcr", "--ckpt", folder, *SHORT["mcr"], "--out", tmp_path / out)
    assert "the ASR cannot be measured" in capfd.readouterr().out
    seen, unseen = (loaded(tmp_path / name).model.state_dict() for name in ("seen", "unseen"))
    assert all(torch.equal(value, unseen[key]) for key, value in seen.items())
    metrics = result_of(tmp_path / "unseen")["metrics"]
    assert not any("asr" in key for key in metrics) and "clean_accuracy_repaired" in metrics
    assert "clean_accuracy_second" not in metrics and len(metrics["curve_clean_accuracy"]) == 3


def test_a_point_that_costs_too_much_is_not_saved(inline, digits_badnets, tmp_path, monkeypatch):
    """All is made again at half the rate, then given up; the curve's figures are kept."""
    monkeypatch.setattr(defence, "MOST_DROP", -101.0)  # nothing is good enough
    ran = inline("mcr", "--ckpt", digits_badnets, *SHORT["mcr"], "--out", tmp_path / "out")
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["t"] is None and metrics["repair_lr"] == ran["args"].lr / 8
    assert "asr_clean_only" in metrics and "asr_repaired" not in metrics
    assert files_below(tmp_path) == ["curve.png", "result.json"]


def test_batchnorm_is_refreshed_on_crops_like_those_of_the_training(inline, digits_badnets):
    """Whole images have other statistics, and so have batches of one class."""
    ran = inline("mcr", "--ckpt", digits_badnets, *SHORT["mcr"], "--out", "out")
    x, seen = ran["x_clean"], ran["x_seen"]
    shifts = [F.pad(x, (2,) * 4)[:, :, i : i + 28, j : j + 28] for i in range(5) for j in range(5)]
    shifts = torch.stack(shifts).flatten(2)  # 25 x N x 784
    same = torch.stack([(shifts == image.flatten()).all(2).any(0) for image in seen])
    assert same.any(1).all() and same.any(0).all()  # a crop of each image
    assert not torch.equal(x, seen)
    labels = ran["y_clean"][same.byte().argmax(1)]
    assert len(labels[:32].unique()) > 5 and labels.bincount().min() > 15
    expected = mcr.refresh(copy.deepcopy(ran["model"]), seen).state_dict()
    made = ran["nets"][0].state_dict()
    for key, value in expected.items():
        assert torch.equal(value, made[key]), key


def test_the_middle_learns_at_four_times_the_rate(inline, digits_badnets):
    ran = inline("mcr", "--ckpt", digits_badnets, *SHORT["mcr"], "--out", "out")
    model, x, y = ran["model"], ran["x_clean"], ran["y_clean"]
    torch.manual_seed(0)
    mcr.finetune(model, x, y, lr=ran["lr"], **ran["recipe"])
    theta = mcr.connect(model, ran["first"], ran["last"], x, y, lr=4 * ran["lr"], **ran["recipe"])
    assert all(torch.equal(value, ran["theta"][key]) for key, value in theta.items())


# ===== Bad input =====


def other_end(folder, suspect, **entries):
    """The suspect's folder with other entries in its checkpoint."""
    folder.mkdir()
    held = torch.load(suspect / "model.pt", weights_only=True)
    torch.save(held | entries, folder / "model.pt")


def test_ends_that_differ_are_refused(inline, one_line, unread, digits_badnets, tmp_path):
    """The line says in what; nothing is written."""
    other = build_model("mnist_conv5", 10, (1, 28, 28), (0.5,), (0.5,)).state_dict()
    other_end(tmp_path / "arch", digits_badnets, arch="mnist_conv5", state_dict=other)
    write_npz(tmp_path / "own.npz", classes=10)
    other_end(tmp_path / "data", digits_badnets, dataset=str(tmp_path / "own.npz"))
    state = torch.load(digits_badnets / "model.pt", weights_only=True)["state_dict"]
    other_end(
        tmp_path / "std",
        digits_badnets,
        std=[0.3],
        state_dict=state | {"std": torch.full((1, 1, 1), 0.3)},
    )
    other_end(tmp_path / "bomb", digits_badnets, metrics=explosive(tmp_path))
    before = files_below(tmp_path)
    for name, named in {
        "arch": "architecture: mnist_cnn (--ckpt), mnist_conv5 (--second)",
        "data": "data set: digits (--ckpt)",
        "std": "std: [0.5",
        "bomb": "not executed",
        "nowhere": "nowhere",
    }.items():
        flags = "--second", tmp_path / name, "--out", tmp_path / "out"
        assert named in one_line(inline, "mcr", "--ckpt", digits_badnets, *flags), name
    assert files_below(tmp_path) == before


def test_an_end_near_chance_is_refused(inline, one_line, digits_badnets, untrained, tmp_path):
    other_end(tmp_path / "end", digits_badnets, state_dict=untrained.state_dict())
    flags = "--second", tmp_path / "end", "--out", tmp_path / "out"
    assert "near chance" in one_line(inline, "mcr", "--ckpt", digits_badnets, *flags)
    assert files_below(tmp_path) == ["model.pt"]


def test_out_is_the_other_end(inline, one_line, digits_badnets, tmp_path):
    other_end(tmp_path / "end", digits_badnets)
    flags = "--second", tmp_path / "end", "--out", tmp_path / "end"
    assert "own folder" in one_line(inline, "mcr", "--ckpt", digits_badnets, *flags)
    assert files_below(tmp_path) == ["model.pt"]


def test_the_point_with_the_lowest_loss(inline, digits_badnets, tmp_path):
    flags = "--rule", "loss", "--epochs", 1, "--points", 6, "--max-drop", 100
    ran = inline("mcr", "--ckpt", digits_badnets, *flags, "--out", tmp_path / "out")
    assert ran["metrics"]["t"] == ran["t"][1 + int(np.argmin(ran["losses"][1:-1]))]
    assert ran["chosen"] != mcr.choose(ran["t"], ran["losses"], ran["accuracies"], 0, "middle")
