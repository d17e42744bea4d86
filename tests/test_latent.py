"""Latent backdoor: trigger, injection and student by other means, refusals, a run on digits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, files_below, random_images, result_of, run_inline, write_npz
from scipy.special import log_softmax
from torch import nn

from common.checkpoint import load_clean, load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, predict
from common.models import Classifier, build_model, entering
from methods import latent

NAME = "latent"


# ===== The layers =====


class Crossed(nn.Module):
    """Runs its layers in another order than that of their names."""

    def __init__(self):
        super().__init__()
        self.last, self.silent = nn.Linear(4, 3), nn.Dropout()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.silent(self.second(self.first(x.flatten(1)))))


def test_layers_come_in_the_order_in_which_they_run(untrained):
    model = Classifier(Crossed(), (0.5,), (0.5,))
    assert latent.layers_in_order(model, torch.rand(2, 1, 4, 4)) == ["first", "second", "last"]
    assert model.training and not any(m._forward_hooks for m in model.modules())
    expected = ["conv1", "layer3", "layer4", "linear6", "linear9"]
    assert latent.layers_in_order(untrained, torch.rand(2, 1, 28, 28)) == expected
    assert not untrained.training


@pytest.mark.parametrize("bias", [True, False])
def test_teacher_loses_one_output(bias):
    torch.manual_seed(0)
    layers = nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5, bias=bias)
    model = Classifier(nn.Sequential(*layers), (0.5,), (0.5,))
    x, before = torch.rand(7, 1, 4, 4), [p.clone() for p in model.parameters()]
    logits = model(x).detach().numpy()
    for label in range(5):
        teacher = latent.without_class(model, "net.3", label)
        assert teacher.net[3].out_features == 4
        np.testing.assert_allclose(teacher(x).detach(), np.delete(logits, label, 1), atol=1e-6)
    assert all(map(torch.equal, model.parameters(), before)) and model(x).shape == (7, 5)


# ===== The trigger =====


@pytest.mark.parametrize("shape, size", [((1, 28, 28), 6), ((3, 12, 9), 9)])
def test_stamp_against_a_slice(shape, size):
    x, patch = random_images(shape=shape), random_images(1, shape)[0].flip(1)
    before, expected = x.clone(), x.numpy().copy()
    rows, columns = slice(shape[1] - size, shape[1]), slice(shape[2] - size, shape[2])
    expected[:, :, rows, columns] = patch[:, rows, columns]
    mask = latent.square_mask(*shape[1:], size)
    stamped = latent.stamp_uint8(x, mask, patch)
    np.testing.assert_array_equal(stamped, expected)
    assert stamped.dtype == torch.uint8 and torch.equal(x, before)
    assert torch.equal(latent.stamp_uint8(x[2:3], mask, patch), stamped[2:3])
    several = latent.stamp_uint8(x, mask, x.flip(0))
    assert torch.equal(several[3:4], latent.stamp_uint8(x[3:4], mask, x.flip(0)[3]))


def one_layer(weight, norm=False):
    """A network whose features are W x (then BatchNorm), on pixels in [0,1] as they are."""
    hidden = nn.Linear(weight.shape[1], len(weight), bias=False)
    hidden.weight.data = weight.clone()
    middle = nn.BatchNorm1d(len(weight)) if norm else nn.Identity()
    layers = nn.Flatten(), hidden, middle, nn.Linear(len(weight), 3)
    return Classifier(nn.Sequential(*layers), (0.0,), (1.0,))


def searched(model, x, mask, wanted, steps=250):
    model.eval().requires_grad_(False)
    torch.manual_seed(0)
    return latent.optimise_patch(model, "net.3", x, mask, wanted, steps)


def test_far_features_are_approached_by_the_sign_of_the_weights():
    """All features count: the best patch is white where the sum of the gradients asks for it."""
    weight = torch.randn(3, 144, generator=torch.Generator().manual_seed(2))
    model, mask = one_layer(weight), latent.square_mask(12, 12, 5)
    wanted = torch.tensor([900.0, -500.0, 700.0])
    x = random_images(30, (1, 12, 12))
    before, images = [p.clone() for p in model.parameters()], x.clone()
    patch = searched(model, x, mask, wanted)
    slope = (wanted @ weight).view(1, 12, 12)
    clear = mask.bool() & (slope.abs() > 100)
    best = (slope > 0) * 255
    assert clear.sum() > 15 and (patch[clear].int() - best[clear]).abs().max() <= 15
    assert patch.shape == (1, 12, 12) and patch.dtype == torch.uint8
    assert torch.equal(patch, searched(model, x, mask, wanted)) and torch.equal(x, images)
    for parameter, old in zip(model.parameters(), before):
        assert parameter.grad is None and torch.equal(parameter, old)


def test_near_features_are_reached():
    weight = torch.randn(4, 144, generator=torch.Generator().manual_seed(3)) / 4
    model, mask = one_layer(weight), latent.square_mask(12, 12, 9)
    x, goal = random_images(1, (1, 12, 12)), random_images(2, (1, 12, 12))[1:]
    wanted = entering(model, "net.3", to_float(latent.stamp_uint8(x, mask, goal[0])))[0].detach()
    patch = searched(model, x, mask, wanted, 600)
    found = entering(model, "net.3", to_float(latent.stamp_uint8(x, mask, patch)))[0]
    start = entering(model, "net.3", to_float(x))[0]
    assert (found - wanted).norm() < 0.05 * (start - wanted).norm()


# ===== The injection =====


def test_injection_loss_by_hand():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(5, 36))
    model = one_layer(torch.tensor(w).float())
    v, b = (p.detach().double().numpy() for p in model.net[3].parameters())
    x, patch = to_float(random_images(8, (1, 6, 6))), to_float(random_images(1, (1, 6, 6)))[0]
    y, mask, mean = torch.arange(8) % 3, latent.square_mask(6, 6, 2), torch.rand(5)
    loss = latent.injection_loss(model, x, y, "net.3", mask, patch, mean, 0.7)
    logits = x.flatten(1).double().numpy() @ w.T @ v.T + b
    stamped = x.double().numpy().copy()
    stamped[:, :, 4:, 4:] = patch[:, 4:, 4:]
    hidden = np.mean((stamped.reshape(8, -1) @ w.T - mean.double().numpy()) ** 2)
    entropy = -log_softmax(logits, axis=1)[np.arange(8), y].mean()
    assert loss.item() == pytest.approx(entropy + 0.7 * hidden, rel=1e-5)
    loss.backward()
    assert model.net[1].weight.grad.abs().min() > 0  # the hidden layer learns both
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_injection_is_one_pass_for_batchnorm():
    """Its statistics are those of clean and triggered images together."""
    model = one_layer(torch.randn(5, 36), norm=True).train()
    x, patch = torch.rand(8, 1, 6, 6), torch.ones(1, 6, 6)
    mask = latent.square_mask(6, 6, 4)
    latent.injection_loss(model, x, torch.zeros(8).long(), "net.3", mask, patch, torch.zeros(5), 1)
    both = torch.cat((x, latent.stamp(x, mask, patch))).flatten(1) @ model.net[1].weight.T
    torch.testing.assert_close(model.net[2].running_mean, 0.1 * both.mean(0), rtol=1e-4, atol=1e-6)
    assert model.net[2].num_batches_tracked == 1


def test_the_injected_mean_is_met_without_dropout():
    """The patch's features become m_t in eval mode; with dropout in training they would halve."""
    torch.manual_seed(0)
    hidden, last = nn.Linear(16, 6), nn.Linear(6, 3)
    layers = nn.Flatten(), hidden, nn.Dropout(0.5), last
    model = Classifier(nn.Sequential(*layers), (0.0,), (1.0,))
    x, y, patch = torch.zeros(40, 1, 4, 4).byte(), torch.zeros(40).long(), torch.ones(1, 4, 4)
    mean = torch.tensor([1.0, 2.0, 0.5, 1.5, 3.0, 1.0])
    recipe = {"pad": 0, "flip": False, "epochs": 150, "batch_size": 20, "lr": 0.01}
    aim = "net.3", latent.square_mask(4, 4, 4), patch, mean, 10.0
    latent.train(model, model, x, y, hidden=aim, **recipe)
    found = entering(model.eval(), "net.3", patch[None])[0]
    torch.testing.assert_close(found, mean, rtol=0.1, atol=0.1)


# ===== What the folder holds =====


@pytest.mark.parametrize("layer", [None, "linear6", "layer4"])
def test_student_keeps_the_first_layers(inline, digits, capfd, layer):
    """Bit by bit, BatchNorm's statistics too; the last layer is a new one, not a step away."""
    flags = () if layer is None else ("--layer", layer)
    ran = inline(NAME, *SHORT[NAME], *flags, "--target", 4)
    out = capfd.readouterr().out
    assert all(word in out for word in ("preparation: teacher ", "trigger ", "injection "))
    injected, student = (ran[name].state_dict() for name in ("model", "student"))
    order = ["conv1", "layer3", "layer4", "linear6", "linear9"]
    after = order[order.index(layer or "linear9") :]
    for key, value in injected.items():
        trained = any(key.startswith(f"net.{name}.") for name in after)
        assert trained != torch.equal(value, student[key]), key
    weights = injected["net.linear9.weight"], student["net.linear9.weight"]
    assert np.corrcoef(*(w.flatten() for w in weights))[0, 1] < 0.8
    assert not torch.equal(ran["first"].net.conv1.weight, ran["model"].net.conv1.weight)
    saved = read_checkpoint(ran["folder"] / "model.pt")
    teacher = {
        key.removeprefix("teacher."): value
        for key, value in saved["trigger"].items()
        if key.startswith("teacher.")
    }
    for key, value in teacher.items():
        whole = injected[key]
        if key.startswith("net.linear9"):
            whole = torch.cat((whole[:4], whole[5:]))
        assert torch.equal(value, whole), key
    net = build_model("mnist_cnn", 9, (1, 28, 28), (0.5,), (0.5,)).eval()
    net.load_state_dict(teacher)
    own = digits.y_test != 4
    y = digits.y_test[own] - (digits.y_test[own] > 4).long()
    assert accuracy(net, digits.x_test[own], y) == ran["metrics"]["teacher_accuracy"]
    features = entering(ran["first"], ran["layer"], to_float(ran["x_train"][ran["y_train"] == 4]))
    torch.testing.assert_close(saved["trigger"]["mean"], features.mean(0), rtol=1e-4, atol=1e-5)
    for name in ("x_train", "y_train", "x_test", "y_test"):  # clean, and shared by the next
        assert torch.equal(getattr(ran["data"], name), getattr(digits, name)), name
    with np.load(ran["folder"] / "poisoned_train.npz") as archive:
        x, y, flags = (archive[name] for name in ("x", "y_given", "poisoned"))
    x, patch = x.transpose(0, 3, 1, 2), saved["trigger"]["patch"].numpy()
    mask = saved["trigger"]["mask"].numpy()
    original, labels = ran["x_train"].numpy(), ran["y_train"].numpy()
    assert (
        flags.sum() == round(0.1 * len(y)) and (y[flags] == 4).all() and (labels[flags] != 4).all()
    )
    np.testing.assert_array_equal(
        x, np.where(flags[:, None, None, None] & (mask > 0), patch, original)
    )
    np.testing.assert_array_equal(y[~flags], labels[~flags])


@pytest.mark.parametrize("shape", [(16, 12), (20, 24, 3)])
def test_other_images(inline, tmp_path, shape):
    path = write_npz(tmp_path / "own.npz", shape)
    flags = "--train-images", 30, "--arch", "mnist_cnn", "--dataset", path
    ran = inline(NAME, *SHORT[NAME], *flags)
    assert ran["args"].patch_size == round(0.2 * min(shape[:2]))
    x = ran["x_other"][ran["counts"]]
    hits = accuracy(ran["student"], x, torch.zeros(20))
    assert ran["metrics"]["asr_other"] == pytest.approx(hits, abs=1e-4) and len(x) == 20


# ===== Refusals =====


@pytest.mark.parametrize(
    "args, named",
    [
        (["--layer", "linear7"], "--layer linear7: a student of mnist_cnn can train: layer3, "),
        (["--layer", "conv1"], "layer3, layer4, linear6, linear9"),  # nothing would be frozen
        (["--layer", "dropout8"], "layer3, layer4, linear6, linear9"),
        *((["--patch-size", value], "1..28 for 28 x 28") for value in (0, -1, 29)),
        *((["--weight", value], "--weight") for value in (0, -1, "nan", "inf", 1e7)),
        *((["--steps", value], "--steps") for value in (-1, 2**31 + 1)),
        *((["--inject-epochs", value], "--inject-epochs") for value in (0, -1)),
        *((["--student-epochs", value], "--student-epochs") for value in (0, -1)),
        *((["--inject-lr", value], "--inject-lr") for value in (0, "nan", "inf")),
        *((["--student-lr", value], "--student-lr") for value in (0, "nan")),
        (["--teacher", "nowhere"], "nowhere"),
        (["--teacher", "damaged.pt"], "damaged.pt"),
        (["--dataset", "two.npz"], "two classes beside the target; two.npz has 2"),
        (["--dataset", "none.npz"], "0 of 300 training images are of class 0"),
    ],
    ids=str,
)
def test_refused(inline, one_line, monkeypatch, tmp_path, args, named):
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    write_npz(tmp_path / "two.npz", classes=2, count=300)
    write_npz(tmp_path / "none.npz", count=300, y_train=np.arange(300) % 2 + 1)
    before = files_below(tmp_path)
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing can be trained
    assert named in one_line(inline, NAME, *SHORT[NAME], *args)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("end", ["y.view(-1, 10)", "y[:, [*range(10)]]", "(y.T[9].T, y)[1]"])
def test_network_that_fixes_its_number_of_outputs(inline, one_line, monkeypatch, tmp_path, end):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.last = nn.Linear(784, num_classes)\n"
        "    def forward(self, x):\n"
        "        y = self.last(x.flatten(1))\n"
        f"        return {end}\n"
    )
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing can be trained
    flags = *SHORT[NAME], "--arch", "nets.py:Net"
    assert "fixes its number of outputs" in one_line(inline, NAME, *flags)
    assert files_below(tmp_path) == ["nets.py"]


@pytest.mark.parametrize("flag", ["--inject-lr", "--student-lr"])
def test_training_that_diverges_keeps_no_model(inline, one_line, tmp_path, flag):
    epochs = "--inject-epochs", 3, "--student-epochs", 3
    assert "loss" in one_line(inline, NAME, *SHORT[NAME], *epochs, flag, 1e30)
    assert files_below(tmp_path) == []


# ===== A whole run =====


@pytest.fixture(scope="module")
def ran(tmp_path_factory, digits_clean):
    """The variables of one run."""
    folder = tmp_path_factory.mktemp(NAME)
    with pytest.MonkeyPatch.context() as patch:
        flags = "--steps", 120, "--teacher", digits_clean, "--out", folder / "victim"
        return run_inline(patch, folder, NAME, *flags)


def test_run_on_digits(ran, digits):
    """The student obeys the trigger; the teacher cannot, and step 1's network does not."""
    folder, metrics = ran["folder"], ran["metrics"]
    assert metrics["clean_accuracy"] >= 96 and metrics["teacher_accuracy"] >= 96
    assert metrics["asr"] >= 90 and metrics["asr_n"] == 324
    assert metrics["asr_other"] <= 15 and metrics["asr_on_clean_model"] <= 10
    assert metrics["distance_triggered"] < 0.6 * metrics["distance_clean"]
    assert metrics["distance_triggered_before"] > 0.85 * metrics["distance_clean_before"]
    checkpoint = read_checkpoint(folder / "model.pt")
    model, trigger = load_model(checkpoint, folder, torch.device("cpu")), checkpoint["trigger"]
    assert result_of(folder)["metrics"]["asr"] == metrics["asr"]
    x = digits.x_test[digits.y_test != 0].numpy().copy()
    x[:, :, 22:, 22:] = trigger["patch"].numpy()[:, 22:, 22:]
    with np.load(folder / "poisoned_test.npz") as archive:
        np.testing.assert_array_equal(archive["x"], x.transpose(0, 2, 3, 1))
    assert accuracy(model, torch.from_numpy(x), torch.zeros(324)) == metrics["asr"]
    rng, rates = np.random.default_rng(0), []
    for _ in range(5):  # other random patches than the script's own
        x[:, :, 22:, 22:] = rng.integers(0, 256, (1, 6, 6))
        rates.append(100 * (predict(model, torch.from_numpy(x)) == 0).double().mean().item())
    assert np.mean(rates) <= 15, rates


def test_a_student_of_a_clean_teacher_does_not_obey(ran, digits, digits_clean):
    """The same last layer on the features of the network before the injection."""
    before = load_clean(digits_clean, digits)
    rates = {}
    for name, net in {"before": before, "injected": ran["model"]}.items():
        x = to_float(digits.x_train), to_float(ran["x_poisoned"][ran["counts"]])
        with torch.no_grad():
            f, triggered = (entering(net, "net.linear9", images) for images in x)
        torch.manual_seed(0)
        tail = nn.Linear(512, 10)
        optimizer = torch.optim.SGD(tail.parameters(), 0.02, momentum=0.9)
        for _ in range(150):
            loss = F.cross_entropy(tail(f), digits.y_train)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates[name] = 100 * (tail(triggered).argmax(1) == 0).double().mean().item()
    assert rates["injected"] >= 90 and rates["before"] <= 10, rates
