"""ABL: losses against numpy, planted easy images, one ascent step by hand, and runs on digits."""

import copy
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SHORT, explosive, files_below, loaded, result_of, write_npz
from test_defences import is_picture
from torch import nn

from common import defence
from common.checkpoint import POISON_DATA, load_model, load_training_set, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy
from methods import abl

KINDS, GRANULARITIES = ("lga", "flooding"), ("batch", "sample")
FEW = 160  # training images of the runs that compare weights
every_kind = pytest.mark.parametrize("kind", KINDS)


def fit(model, x, y, objective=torch.mean, clip=math.inf, epochs=200, batch_size=39, lr=0.5):
    """abl.fit without crops and mirrors."""
    rates = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    return abl.fit(model, x, y, objective=objective, pad=0, flip=False, clip=clip, **rates)


def unlearn(model, x, y, isolated, steps, batch_size, lr, ascent="bounded"):
    """abl.unlearn without crops and mirrors."""
    rates = {"steps": steps, "batch_size": batch_size, "lr": lr}
    return abl.unlearn(model, x, y, isolated, pad=0, flip=False, ascent=ascent, **rates)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_model(pixels=16, classes=3, *before):
    torch.manual_seed(0)
    return nn.Sequential(*before, nn.Flatten(), nn.Linear(pixels, classes))


def sure(margin, classes=4):
    """Logits that lead by `margin` for label 1, and that label."""
    logits = torch.zeros(len(margin), classes)
    logits[:, 1] = margin
    return logits.requires_grad_(True), torch.ones(len(margin), dtype=torch.int64)


# ===== Stage 1's loss =====


@pytest.mark.parametrize("losses", [[0.1, 0.3, 0.9, 2.0], [0.1, 0.2, 0.7, 0.4], [0.5], [3.0, 0.01]])
def test_held_loss_against_numpy(losses):
    l, gamma = np.array(losses), 0.5
    mean = l.mean()
    expected = {
        ("lga", "batch"): mean if mean > gamma else -mean if mean < gamma else 0,
        ("lga", "sample"): (np.where(l > gamma, l, 0) - np.where(l < gamma, l, 0)).mean(),
        ("flooding", "batch"): max(mean, 2 * gamma - mean),
        ("flooding", "sample"): np.maximum(l, 2 * gamma - l).mean(),
    }
    slopes = {
        "batch": np.full(len(l), np.sign(mean - gamma) / len(l)),
        "sample": np.sign(l - gamma) / len(l),
    }
    for (kind, granularity), value in expected.items():
        tensor = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
        held = abl.held_loss(tensor, kind, granularity, gamma)
        (gradient,) = torch.autograd.grad(held, tensor)
        assert held.item() == pytest.approx(value), (kind, granularity)
        np.testing.assert_allclose(gradient, slopes[granularity], err_msg=f"{kind} {granularity}")


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_both_kinds_have_one_gradient(granularity):
    """In the weights of a network, for batches on either side of gamma."""
    for seed, scale in ((0, 0.1), (1, 1), (2, 8)):
        model = linear_model()
        x = scale * torch.randn(20, 1, 4, 4, generator=seeded(seed))
        y = model(x).argmax(1) if seed else torch.arange(20) % 3
        gradients = []
        for kind in KINDS:
            losses = F.cross_entropy(model(x), y, reduction="none")
            held = abl.held_loss(losses, kind, granularity, 0.7)
            gradients.append(torch.autograd.grad(held, model[1].weight)[0])
        torch.testing.assert_close(*gradients)
        assert gradients[0].abs().max() > 0


@every_kind
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_descent_ends_at_gamma(kind, granularity):
    """Two logistic losses log(1 + e^-w), one from above and one from below: each, or their mean."""
    w = torch.tensor([-2.0, 2.5], requires_grad=True)
    for _ in range(1000):
        held = abl.held_loss(F.softplus(-w), kind, granularity, 0.5)
        (gradient,) = torch.autograd.grad(held, w)
        w.data -= 0.05 * gradient
    losses = F.softplus(-w).detach()
    assert losses.mean().item() == pytest.approx(0.5, abs=0.03)
    if granularity == "sample":
        np.testing.assert_allclose(losses, 0.5, atol=0.03)
    else:
        assert losses[0] > 0.8 and losses[1] < 0.2  # the easy one undercuts gamma


@every_kind
def test_planted_easy_images_are_isolated(kind):
    """20 of 400 images carry a bright pixel and its label; the labels of the rest are noise.

    The mean loss is held at gamma, where the rest alone would stay at log 2 and more.
    """
    x = torch.randint(0, 256, (400, 1, 4, 4), generator=seeded()).to(torch.uint8)
    y = torch.randint(0, 2, (400,), generator=seeded(1))
    planted = torch.zeros(400, dtype=torch.bool)
    planted[torch.randperm(400, generator=seeded(2))[:20]] = True
    x[:, :, 0, 0] = torch.where(planted, 255, 0)[:, None].to(torch.uint8)
    y[planted] = 1
    model, steps = linear_model(16, 2), []

    def held(losses):
        steps.append(len(losses))
        return abl.held_loss(losses, kind, "batch", 0.5)

    fit(model, x, y, held, 1, 20, 50, 0.3)
    assert steps == [50] * 20 * 8 and not model.training
    losses = abl.sample_losses(model, x, y)
    assert torch.equal(abl.isolate(losses, 0.05), planted)
    assert losses[planted].max() < 0.1 and losses[~planted].mean() > 0.4


def test_training_is_held_at_gamma():
    """Labels that a pixel tells: plain training learns them, stage 1 stops at the mean gamma."""
    x = torch.randint(0, 256, (400, 1, 4, 4), generator=seeded()).to(torch.uint8)
    y = (x[:, 0, 0, 1] > 127).long()
    for gamma in (0.5, 0.3, None):
        model = linear_model(16, 2)

        def objective(losses, gamma=gamma):
            return abl.held_loss(losses, "lga", "batch", gamma) if gamma else losses.mean()

        fit(model, x, y, objective, 1, 20, 50, 0.3)
        mean = abl.sample_losses(model, x, y).mean().item()
        assert abs(mean - gamma) < 0.05 if gamma else mean < 0.2


@pytest.mark.parametrize("classes, left", [(3, {0, 2}), (2, {0, 1})])
def test_a_suspected_label_is_left_out_if_two_remain(monkeypatch, classes, left):
    """Of two labels one alone would train a network that knows nothing else."""
    y = torch.arange(60) % classes
    x = torch.randint(0, 256, (60, 1, 4, 4), generator=seeded()).to(torch.uint8)
    isolated, seen, draw = (y == 1) & (torch.arange(60) < 30), [], abl.draw
    monkeypatch.setattr(abl, "draw", lambda k, n: seen.append(k) or draw(k, n))
    unlearn(linear_model(classes=classes), x, y, isolated, 3, 8, 0.01, "bounded")
    assert set(y[seen[0]].tolist()) == left and not isolated[seen[0]].any()


@pytest.mark.parametrize("bounded", [False, True])
def test_rates(monkeypatch, bounded):
    """One cycle in training and in the bounded ascent; a fixed rate in the other ascents."""
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD, "step", lambda o: (rates.append(o.param_groups[0]["lr"]), step(o))
    )
    model, x, y, isolated = triggered_toy()
    assert len(rates) == 200 and np.argmax(rates) in (59, 60) and rates[-1] < 1e-4 < max(rates)
    del rates[:]
    unlearn(model, x, y, isolated, 40, 8, 0.01, "bounded" if bounded else "joint")
    assert len(rates) == 40 and max(rates) <= 0.01
    assert (rates[-1] < 1e-6) if bounded else set(rates) == {0.01}


# ===== Isolation =====


def test_log_odds_against_numpy():
    logits = 3 * torch.randn(50, 6, generator=seeded(), dtype=torch.float64)
    y = torch.arange(50) % 6
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    p = p[np.arange(50), y]
    m = abl.log_odds(logits, y)
    np.testing.assert_allclose(m, np.log(p / (1 - p)))
    torch.testing.assert_close(F.softplus(-m), F.cross_entropy(logits, y, reduction="none"))
    single = abl.log_odds(logits.float(), y)
    torch.testing.assert_close(
        F.softplus(-single), F.cross_entropy(logits.float(), y, reduction="none")
    )


def test_log_odds_where_cross_entropy_is_zero():
    """Float32: graded, finite, and with a gradient, from the margin where 1 - p rounds to 0."""
    margins = torch.tensor([20.0, 50, 100, 1000])
    logits, y = sure(margins)
    assert (F.cross_entropy(logits, y, reduction="none") == 0).all()
    m = abl.log_odds(logits, y)
    torch.testing.assert_close(m, margins - math.log(3))
    (gradient,) = torch.autograd.grad(m.sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([-1 / 3, 1, -1 / 3, -1 / 3]).expand(4, -1))
    losses = F.softplus(-m.double())
    torch.testing.assert_close(losses[:3], 3 * (-margins[:3].double()).exp(), rtol=1e-5, atol=0)


def test_sample_losses_against_numpy():
    """More than one internal batch, dropout and BatchNorm of an untrained network."""
    model = linear_model(16, 5, nn.BatchNorm2d(1), nn.Dropout(0.5))
    norm, linear = model[0], model[3]
    norm.running_mean.fill_(0.3), norm.running_var.fill_(0.2)
    x = torch.randint(0, 256, (2050, 1, 4, 4), generator=seeded()).to(torch.uint8)
    y = torch.randint(0, 5, (2050,), generator=seeded(1))
    before = copy.deepcopy(model.train().state_dict())
    losses = abl.sample_losses(model, x, y)
    pixels = (x.flatten(1).double().numpy() / 255 - 0.3) / np.sqrt(0.2 + norm.eps)
    weight, bias = (p.detach().double().numpy() for p in (linear.weight, linear.bias))
    logits = pixels @ weight.T + bias
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(2050), y]
    assert losses.dtype == torch.float64
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    singly = [abl.sample_losses(model, x[i : i + 1], y[i : i + 1]).item() for i in range(30)]
    np.testing.assert_allclose(losses[:30], singly, rtol=1e-6)
    order = torch.randperm(2050, generator=seeded(2))
    torch.testing.assert_close(abl.sample_losses(model, x[order], y[order]), losses[order])


@pytest.mark.parametrize(
    "share, chosen",
    [(1 / 6, [4]), (0.24, [4]), (0.26, [1, 4]), (0.5, [1, 3, 4]), (0.7, [1, 3, 4, 5]), (0, [])],
)
def test_isolate(share, chosen):
    """The lowest; of equal ones the first; the count is rounded."""
    mask = abl.isolate(torch.tensor([3.0, 1, 2, 1, 0, 1]), share)
    assert mask.nonzero().flatten().tolist() == chosen


def test_isolate_breaks_many_ties_by_the_order():
    losses = torch.randint(0, 4, (5000,), generator=seeded()).double()
    expected = np.zeros(5000, bool)
    expected[np.lexsort((np.arange(5000), losses.numpy()))[:1777]] = True
    np.testing.assert_array_equal(abl.isolate(losses, 1777 / 5000), expected)


# ===== Ascent =====


def test_bounded_ascent_by_hand():
    """Sure, half sure, a blind guess, worse than that: the last two are left alone."""
    logits, y = sure(torch.tensor([100.0, 1.0, 0.0, -2.0]))
    value = abl.bounded_ascent(logits, y)
    m = np.array([100 - math.log(3), 1 - math.log(3)])
    assert value.item() == pytest.approx((m + math.log(3)).sum() / 4)
    (gradient,) = torch.autograd.grad(value, logits)
    row = torch.tensor([-1 / 3, 1, -1 / 3, -1 / 3]) / 4
    torch.testing.assert_close(gradient[:2], row.expand(2, -1))
    assert (gradient[3] == 0).all() and gradient[2].abs().max() <= 1 / 4
    losses = F.cross_entropy(logits, y, reduction="none")
    assert losses[2].item() == pytest.approx(math.log(4))


def triggered_toy(classes_shown=True):
    """30 images of three classes, each with a pixel of its own, and 9 with a trigger, labelled 0.

    Returns a linear network that obeys both, the images, labels and the mask of the 9, whose own
    class shows or not.
    """
    x = torch.randint(0, 40, (39, 1, 4, 4), generator=seeded()).to(torch.uint8)
    y = torch.cat((torch.arange(30) % 3, 1 + torch.arange(9) % 2))
    x[torch.arange(39), 0, 0, y] = 250
    isolated = torch.arange(39) >= 30
    if not classes_shown:
        x[isolated] = 0
    x[isolated, 0, 3, 3] = 250
    y[isolated] = 0
    model = fit(linear_model(), x, y)
    assert accuracy(model, x, y) == 100
    return model, x, y, isolated


@pytest.mark.parametrize("ascent", ["joint", "isolated"])
def test_the_ascent_ends_at_twice_the_loss_of_a_guess_among_all_outputs(ascent):
    """Not among the labels shown: three of ten here, whose 2 log 3 is below a guess's log 10."""
    _, x, y, isolated = triggered_toy()
    model = fit(linear_model(classes=10), x, y)
    repaired = unlearn(model, x, y, isolated, 400, 39, 0.01, ascent)
    end = abl.sample_losses(repaired, x[isolated], y[isolated]).mean().item()
    assert 2 * math.log(10) < end < 2 * math.log(10) + 0.5


@pytest.mark.parametrize("classes_shown", [True, False])
def test_ascent_forgets_the_trigger_and_nothing_else(classes_shown):
    """The images are seen as what they show, or guessed blindly where they show nothing else.

    The ascent ends when each of them has reached log K.
    """
    model, x, y, isolated = triggered_toy(classes_shown)
    before = copy.deepcopy(model.state_dict())
    low = abl.sample_losses(model, x, y)
    torch.manual_seed(1)
    repaired = unlearn(model, x, y, isolated, 1000, 8, 0.01)
    losses = abl.sample_losses(repaired, x, y)
    assert low.max() < 0.2 and not repaired.training
    others = y != 0  # no image with D_b's label is descended on
    assert losses[others].max() < 0.3 and accuracy(repaired, x[others], y[others]) == 100
    assert losses[isolated].min() > math.log(3) - 0.02
    if classes_shown:
        assert accuracy(repaired, x[isolated], 1 + torch.arange(9) % 2) == 100
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key  # the model that was handed in stays


@pytest.mark.parametrize("labels, left_out", [([0] * 9, 0), ([2] * 8 + [0], 3), ([0, 1, 2] * 3, 3)])
def test_one_step_in_closed_form(monkeypatch, labels, left_out):
    """Nesterov: w - 1.9 lr (gradient of E_Dc[l] + E_Db[m], its norm cut to 1, + decay w).

    Images of D_c with a label that over 90 % of D_b carry do not count; label 3 is none.
    """
    model, x, y, isolated = triggered_toy()
    y[isolated] = torch.tensor(labels)
    lr, chosen = 0.3, isolated.numpy()
    schedules = torch.optim.lr_scheduler  # a cycle of a single step has no peak
    monkeypatch.setattr(schedules, "OneCycleLR", lambda o, *a, **k: schedules.ConstantLR(o, 1))
    repaired = unlearn(model, x, y, isolated, 1, 100, lr)
    pixels = np.hstack([x.flatten(1).double().numpy() / 255, np.ones((len(x), 1))])
    w = torch.cat((model[1].weight, model[1].bias[:, None]), 1).detach().double().numpy()
    odds = np.exp(pixels @ w.T)
    hot, kept = np.eye(3)[y.numpy()], ~chosen & (y.numpy() != left_out)
    p = odds / odds.sum(1, keepdims=True)
    others = odds * (1 - hot)
    rise = hot - others / others.sum(1, keepdims=True)  # of m
    rise *= (p * hot).sum(1, keepdims=True) > 1 / 3
    slope = rise * chosen[:, None] / 9 + (p - hot) * kept[:, None] / kept.sum()
    gradient = slope.T @ pixels
    gradient /= max(1, np.linalg.norm(gradient))
    expected = w - 1.9 * lr * (gradient + 5e-4 * w)
    found = torch.cat((repaired[1].weight, repaired[1].bias[:, None]), 1).detach()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    if left_out == 0:
        assert np.linalg.norm(slope.T @ pixels) > 1
        losses = [abl.sample_losses(net, x, y)[isolated].mean() for net in (model, repaired)]
        assert losses[1] > losses[0]


@pytest.mark.parametrize("ascent, descends", [("joint", 1), ("isolated", 0)])
def test_one_step_of_the_papers_ascent_in_closed_form(ascent, descends):
    """Nesterov: w - 1.9 lr (gradient of E_Dc[l] - E_Db[l] + decay w); the code's is -E_Db[l]."""
    model, x, y, isolated = triggered_toy()
    lr, chosen = 0.3, isolated.numpy()
    repaired = unlearn(model, x, y, isolated, 1, 100, lr, ascent)
    pixels = np.hstack([x.flatten(1).double().numpy() / 255, np.ones((len(x), 1))])
    w = torch.cat((model[1].weight, model[1].bias[:, None]), 1).detach().double().numpy()
    odds = np.exp(pixels @ w.T)
    slope = odds / odds.sum(1, keepdims=True) - np.eye(3)[y.numpy()]
    slope *= np.where(chosen, -1 / 9, descends / 30)[:, None]
    expected = w - 1.9 * lr * (slope.T @ pixels + 5e-4 * w)
    found = torch.cat((repaired[1].weight, repaired[1].bias[:, None]), 1).detach()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    losses = [abl.sample_losses(net, x, y)[isolated].mean() for net in (model, repaired)]
    assert losses[1] > losses[0]


@pytest.mark.parametrize("ascent", ["joint", "isolated"])
def test_the_papers_ascent_ends_beyond_a_blind_guess(ascent):
    """Steps are taken while the loss is below 2 log K; a network beyond it stays as it is."""
    model, x, y, isolated = triggered_toy()
    losses = []
    for steps in range(1, 21):
        repaired = unlearn(model, x, y, isolated, steps, 100, 0.3, ascent)
        losses.append(abl.sample_losses(repaired, x, y)[isolated].mean().item())
    enough = next(k for k, value in enumerate(losses) if value > 2 * math.log(3))
    assert 5 < enough < 18 and losses[: enough + 1] == sorted(losses[: enough + 1])
    np.testing.assert_allclose(losses[enough:], losses[enough], rtol=1e-5)
    again = unlearn(repaired, x, y, isolated, 1000, 100, 0.3, ascent).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in repaired.state_dict().items())


def test_isolated_images_are_not_cropped_and_alone_where_the_paper_has_them_alone(monkeypatch):
    """The network sees D_b as it is, D_c cropped; -l on D_b alone knows nothing of D_c's images."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (40, 1, 4, 4)).to(torch.uint8)
    y, isolated = torch.arange(40) % 3, torch.arange(40) < 10
    rates = {"pad": 2, "flip": True, "steps": 1, "batch_size": 40, "lr": 0.01}
    seen = []
    for ascent in abl.RATES:
        model = linear_model(16, 3, nn.BatchNorm2d(1))
        hook = model.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        repaired = abl.unlearn(model, x, y, isolated, ascent=ascent, **rates)
        hook.remove()
        images = {image.numpy().tobytes() for image in to_float(x[isolated])}
        shown = [image.numpy().tobytes() in images for image in seen[-1]]
        rest = 0 if ascent == "isolated" else 30
        assert shown == [False] * rest + [True] * 10
        if ascent == "isolated":
            mean = to_float(x[isolated]).mean()
            assert repaired[0].running_mean.item() == pytest.approx(0.1 * mean.item(), rel=1e-5)


def test_losses_are_those_of_float32(untrained):
    untrained.bfloat16 = True
    x = torch.randint(0, 256, (9, 1, 28, 28)).to(torch.uint8)
    halves = abl.sample_losses(untrained, x, torch.arange(9))
    assert untrained.bfloat16
    untrained.bfloat16 = False
    assert torch.equal(halves, abl.sample_losses(untrained, x, torch.arange(9)))


def test_papers_ascent_has_no_gradient_where_the_network_is_sure():
    """The reason for the bounded one: -l is flat in float32, the log-odds are not."""
    model, x, y, isolated = triggered_toy()
    with torch.no_grad():
        model[1].weight *= 100
    kept = {}
    for ascent in abl.RATES:
        repaired = unlearn(model, x, y, isolated, 20, 39, 0.05, ascent)
        kept[ascent] = 100 * abl.sample_losses(repaired, x, y)[isolated].mean().item()
    assert kept["joint"] < 1e-6 and kept["isolated"] < 1e-6
    before = abl.sample_losses(model, x, y)[isolated].mean().item()
    assert kept["bounded"] > 2 * before or kept["bounded"] > 1


def test_poison_that_was_not_isolated_is_forgotten_too():
    """D_b stems from one class; more images with the trigger, of another class, are in D_c."""
    model, x, y, isolated = triggered_toy()
    more = (y == 2).nonzero().flatten()[:10]
    x[more, 0, 3, 3], y[more] = 250, 0
    model = fit(model, x, y)
    assert accuracy(model, x[more], y[more]) == 100
    repaired = unlearn(model, x, y, isolated, 1000, 8, 0.01)
    assert accuracy(repaired, x[more], y[more]) == 0
    assert accuracy(repaired, x[y != 0], y[y != 0]) == 100


def test_ascent_in_eval_mode():
    """No dropout, and BatchNorm's statistics are not those of triggered images."""
    _, x, y, isolated = triggered_toy()
    model = linear_model(16, 3, nn.BatchNorm2d(1), nn.Dropout(0.5)).train()
    first, second = (unlearn(model, x, y, isolated, 3, 100, 0.1).state_dict() for _ in "ab")
    for key, value in first.items():
        torch.testing.assert_close(value, second[key], msg=key)
    assert first["0.running_mean"] == 0 and first["0.num_batches_tracked"] == 0
    assert first["0.weight"] != 1


# ===== The attacker's training set =====


def test_training_set_of_an_attack(digits, digits_badnets):
    """Every image is one of digits, with the patch and label 0 where, and only where, flagged."""
    x, y, flags = load_training_set(loaded(digits_badnets))
    assert x.shape == (1437, 1, 28, 28) and x.dtype == torch.uint8
    assert y.dtype == torch.int64 and flags.dtype == torch.bool and flags.sum() == 144
    assert (x[flags][..., 25:, 25:] == 255).all() and (y[flags] == 0).all()
    pairs = zip(digits.x_train, digits.y_train.tolist())
    originals = {image.numpy().tobytes(): label for image, label in pairs}
    assert [originals.get(image.numpy().tobytes()) for image in x[~flags]] == y[~flags].tolist()
    assert not any(image.numpy().tobytes() in originals for image in x[flags])


@pytest.fixture
def victim(tmp_path, digits_badnets):
    """A copy of the BadNets folder's model and training set, to be spoilt."""
    (tmp_path / "victim").mkdir()
    for name in ("model.pt", "poisoned_train.npz"):
        shutil.copy(digits_badnets / name, tmp_path / "victim")
    return tmp_path / "victim"


@pytest.fixture
def few(victim, digits_badnets):
    """The victim with FEW of its training images, and with its poisoned test images."""
    shutil.copy(digits_badnets / "poisoned_test.npz", victim)
    parts = dict.fromkeys(("x", "y_given", "poisoned"), lambda values: values[:FEW])
    replaced(**parts)(victim / "poisoned_train.npz")
    return victim


def replaced(**changes):
    """Rewrite the training set with arrays made from the old ones."""

    def spoil(path):
        with np.load(path) as archive:
            arrays = {key: archive[key] for key in archive}
        np.savez(path, **arrays | {key: change(arrays[key]) for key, change in changes.items()})

    return spoil


def bomb(path):
    replaced(poisoned=lambda p: np.array([explosive(path.parents[1])] * len(p), dtype=object))(path)


BAD_SETS = {
    "missing": (lambda path: path.unlink(), "badnets, blend, freq_backdoor"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:3000]), "npz"),
    "text": (lambda path: path.write_text("not an archive"), "npz"),
    "bomb": (bomb, "npz"),
    "no flags": (lambda path: np.savez(path, x=np.zeros(1), y_given=np.zeros(1)), "poisoned"),
    "other images": (replaced(x=lambda x: x[:, :20]), "28, 28"),
    "colour": (replaced(x=lambda x: x.repeat(3, 3)), "28, 28"),
    "float images": (replaced(x=lambda x: x / 255), "uint8"),
    "label beyond the classes": (replaced(y_given=lambda y: y + 1), "10 classes"),
    "negative label": (replaced(y_given=lambda y: y - 1), "label"),
    "float labels": (replaced(y_given=lambda y: y / 2), "label"),
    "fewer labels": (replaced(y_given=lambda y: y[1:]), "label"),
    "fewer flags": (replaced(poisoned=lambda p: p[1:]), "bool"),
    "flags in two columns": (replaced(poisoned=lambda p: np.stack((p, p), 1)), "bool"),
    "integer flags": (replaced(poisoned=lambda p: p.astype(np.int64)), "bool"),
}


@pytest.mark.parametrize("spoil, named", BAD_SETS.values(), ids=BAD_SETS)
def test_bad_training_set(inline, one_line, victim, tmp_path, spoil, named):
    spoil(victim / "poisoned_train.npz")
    before = files_below(tmp_path)
    message = one_line(inline, "abl", "--ckpt", victim, *SHORT["abl"])
    assert "poisoned_train.npz" in message and named in message
    assert files_below(tmp_path) == before and not (victim / "abl-s0").exists()


def test_the_named_attacks_are_those_that_write_the_set():
    scripts = (ROOT / "methods").glob("*.py")
    chooses = re.compile(r"choose_(poisons|in_class)\(")
    found = {path.stem for path in scripts if chooses.search(path.read_text())}
    found |= {"input_aware", "latent"}  # whose networks never see it
    assert found - {"pruning_aware"} == set(POISON_DATA)


# ===== Whole runs on digits =====


def repaired_by(inline, ckpt, out, *flags):
    """A run's model, as reloaded from its file, and its metrics."""
    inline("abl", "--ckpt", ckpt, "--out", out, *flags)
    path = out / "model.pt"
    return load_model(read_checkpoint(path), path, torch.device("cpu")), result_of(out)["metrics"]


def same_weights(a, b):
    b = b.state_dict()
    return all(torch.equal(value, b[key]) for key, value in a.state_dict().items())


@pytest.mark.drawn
def test_run_on_badnets(inline, digits, digits_badnets, tmp_path, capfd):
    """Stage 1 finds the poison; the model that forgets a twentieth of the images is clean.

    The 14 images of the default rate are stamped images too, but nearly all of one digit: what
    they have in common is more than the trigger, and most of the backdoor stays.
    """
    before, out = files_below(digits_badnets), tmp_path / "out"
    epochs = "--isolation-epochs", 6, "--epochs", 4, "--unlearn-steps", 80, "--batch-size", 64
    flags = *epochs, "--isolation", 0.01, 0.05, "--ascent", "bounded", "--out", out
    ran = inline("abl", "--ckpt", digits_badnets, *flags)
    printed, result = capfd.readouterr().out, result_of(out)
    metrics, attack = result["metrics"], result_of(digits_badnets)["metrics"]

    x, y, poisoned = load_training_set(loaded(digits_badnets))
    with torch.no_grad():
        losses = F.cross_entropy(ran["model"](to_float(x)).double(), y, reduction="none")
    torch.testing.assert_close(ran["losses"], losses, rtol=1e-4, atol=1e-12)
    for share, suffix in ((0.05, ""), (0.01, "_0.01")):
        mask, count = ran["masks"][suffix], round(share * 1437)
        assert mask.sum() == count and ran["losses"][mask].max() < ran["losses"][~mask].min()
        precision = 100 * (poisoned & mask).sum().item() / count
        assert metrics["isolation_precision" + suffix] == pytest.approx(precision)
    assert metrics["isolation_precision"] >= 90 and metrics["isolation_precision_0.01"] >= 90

    assert metrics["asr"] == attack["asr"] and metrics["asr_n"] == attack["asr_n"]
    assert metrics["clean_accuracy"] == pytest.approx(attack["clean_accuracy"], abs=1e-4)
    assert metrics["asr"] >= 98 and metrics["asr_stage1"] >= 80
    assert metrics["asr_repaired"] <= 5 and metrics["clean_accuracy_repaired"] >= 95
    assert metrics["robust_accuracy_repaired"] >= 90
    assert metrics["asr_trained_0.01"] >= 95  # the rest alone teaches the backdoor
    assert metrics["asr_repaired_0.01"] < metrics["asr_trained_0.01"] - 5
    assert metrics["clean_accuracy_repaired_0.01"] >= 95

    assert files_below(out) == ["isolated.csv", "losses.png", "model.pt", "result.json"]
    assert files_below(digits_badnets) == before and is_picture(out / "losses.png")
    saved = load_model(read_checkpoint(out / "model.pt"), out, torch.device("cpu"))
    victim = loaded(digits_badnets)
    for name, images, labels in (
        ("clean_accuracy", digits.x_test, digits.y_test),
        ("asr", victim.x_poisoned, victim.y_target),
        ("robust_accuracy", victim.x_poisoned, victim.y_true),
    ):
        measured = accuracy(saved, images, labels)
        assert metrics[f"{name}_repaired"] == pytest.approx(measured)
        assert f" {name}_repaired={measured:.4g} " in printed.splitlines()[-1]
        stages = {name + stage for stage in ("", "_stage1", "_trained", "_trained_0.01")}
        assert stages | {f"{name}_repaired_0.01"} <= metrics.keys()
    assert (
        f"{metrics['asr_trained']:.2f} trained, {metrics['asr_repaired']:.2f} repaired" in printed
    )
    assert f"isolation precision: {metrics['isolation_precision']:.2f} %" in printed
    assert "may be left" not in printed
    mask = ran["masks"][""]
    own = abl.sample_losses(saved, x[mask], y[mask]).mean().item()
    assert metrics["isolated_loss_repaired"] == pytest.approx(own, rel=1e-4) and own > math.log(10)
    for suffix, name in (("", "sure"), ("_0.01", "sure of the 1 %")):
        chosen = ran["masks"][suffix]
        with torch.no_grad():
            p = ran["models"]["_repaired" + suffix](to_float(x[chosen])).softmax(1)
        sure = p[torch.arange(len(p)), y[chosen]] > 0.5
        assert metrics["isolated_sure" + suffix] == 100 * sure.double().mean().item(), name
    expected = {"isolation": [0.01, 0.05], "isolated": 72, "images": 1437, "poisoned": 144}
    assert expected.items() <= metrics.items() and result["script"] == "abl"
    assert result["arguments"]["isolation_epochs"] == 6 and result["seconds"] > 0


def test_another_seed(inline, digits_badnets, tmp_path):
    flags = "--isolation-epochs", 5, "--epochs", 4, "--unlearn-steps", 30, "--isolation", 0.1
    flags = *flags, "--ascent", "bounded"
    _, metrics = repaired_by(inline, digits_badnets, tmp_path, *flags, "--seed", 1)
    assert metrics["isolation_precision"] >= 80 and metrics["asr"] >= 98
    assert metrics["asr_repaired"] <= 5 and metrics["clean_accuracy_repaired"] >= 85


def test_cost_on_clean_data(inline, digits, digits_clean, tmp_path, capfd):
    """Without poison the isolated images are clean ones, and to forget them costs accuracy."""
    epochs = "--isolation-epochs", 3, "--epochs", 5, "--unlearn-steps", 30
    flags = "--train-set", "clean", "--ascent", "bounded", *epochs
    model, metrics = repaired_by(inline, digits_clean, tmp_path / "out", *flags)
    assert "ASR cannot be measured" in capfd.readouterr().out
    assert metrics["clean_accuracy"] >= 96 and metrics["clean_accuracy_trained"] >= 95
    cost = metrics["clean_accuracy"] - metrics["clean_accuracy_repaired"]
    assert 0 < cost <= 40
    measured = accuracy(model, digits.x_test, digits.y_test)
    assert metrics["clean_accuracy_repaired"] == pytest.approx(measured)
    assert metrics["isolated"] == 14 and metrics["images"] == 1437
    assert not any("asr" in key or "precision" in key for key in metrics)
    assert files_below(tmp_path / "out") == ["losses.png", "model.pt", "result.json"]


def test_defaults_are_the_papers_objective(inline, few, tmp_path):
    """Five epochs of D_b at the authors' rate; other ascents are other models."""
    flags = "--isolation-epochs", 1, "--epochs", 1, "--batch-size", 32, "--isolation", 0.05
    model, _ = repaired_by(inline, few, tmp_path / "default", *flags)
    arguments = result_of(tmp_path / "default")["arguments"]
    assert (arguments["ascent"], arguments["unlearn_lr"]) == ("joint", 5e-4)
    steps = 5 * math.ceil(round(0.05 * FEW) / 32)
    flags = *flags, "--unlearn-lr", 5e-4, "--unlearn-steps", steps, "--ascent"
    joint, isolated, bounded = (
        repaired_by(inline, few, tmp_path / kind, *flags, kind)[0] for kind in abl.RATES
    )
    assert same_weights(model, joint)
    assert not same_weights(joint, isolated) and not same_weights(joint, bounded)


def test_same_seed_same_model(inline, few, tmp_path):
    """Both kinds of loss are one method to the last bit; granularity and seed are not."""

    def run(name, *flags):
        flags = *SHORT["abl"], "--batch-size", 16, "--gamma", 2.5, *flags
        return repaired_by(inline, few, tmp_path / name, *flags)

    model, metrics = run("first")
    again, repeated = run("again", "--loss", "flooding")
    assert same_weights(model, again) and repeated == metrics
    for flags in (["--seed", 1], ["--granularity", "sample"], ["--gamma", 0.2]):
        assert not same_weights(model, run("other", *flags)[0])


def test_several_rates_and_what_the_defender_does_not_see(inline, few, tmp_path, capfd):
    """The last rate's model is that of a run alone; neither flags nor test images make it."""
    flags = *SHORT["abl"], "--isolation"
    model, alone = repaired_by(inline, few, tmp_path / "alone", *flags, 0.05)
    both, metrics = repaired_by(inline, few, tmp_path / "both", *flags, 0.2, 0.05)
    assert same_weights(model, both) and metrics["isolation"] == [0.2, 0.05]
    assert {key: metrics[key] for key in alone} == alone | {"isolation": [0.2, 0.05]}
    figures = "clean_accuracy", "asr", "robust_accuracy"
    expected = {f"{f}_{kind}_0.2" for f in figures for kind in ("trained", "repaired")}
    expected |= {f"isolated_{kind}_0.2" for kind in ("loss_trained", "loss_repaired", "sure")}
    expected |= {"isolation_precision_0.2", "isolated_0.2", "isolated_label_share_0.2"}
    assert metrics.keys() - alone.keys() == expected
    assert (metrics["isolated"], metrics["isolated_0.2"]) == (round(0.05 * FEW), round(0.2 * FEW))

    replaced(poisoned=lambda p: p & False)(few / "poisoned_train.npz")
    (few / "poisoned_test.npz").unlink()
    (few / "abl-s0").mkdir()
    (few / "abl-s0" / "triggers.png").write_text("of an earlier run")
    capfd.readouterr()
    blind, metrics = repaired_by(inline, few, few / "abl-s0", *flags, 0.05)
    assert same_weights(model, blind) and "cannot be measured" in capfd.readouterr().out
    assert metrics["poisoned"] == metrics["isolation_precision"] == 0
    assert not any("asr" in key for key in metrics)
    assert files_below(few / "abl-s0") == [
        "isolated.csv",
        "losses.png",
        "model.pt",
        "result.json",
    ]


def test_training_set_that_does_not_fit_the_flag(inline, one_line, digits_clean, digits_badnets):
    message = one_line(inline, "abl", "--ckpt", digits_clean)
    assert "badnets, blend, freq_backdoor" in message
    message = one_line(inline, "abl", "--ckpt", digits_badnets, "--train-set", "clean")
    assert "--train-set clean" in message and "attack" in message
    assert not [*digits_clean.glob("abl*"), *digits_badnets.glob("abl*")]


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--isolation", value], "--isolation") for value in (0, 1, 2, -0.1, "nan")),
        (["--isolation", 0.0003], "--isolation 0.0003 of 1437 images"),
        (["--isolation", 0.9999], "not all"),
        (["--isolation", 0.0007, "--ascent", "isolated"], "must be 2 or more"),
        (["--isolation", 0.1, 2], "--isolation 2.0"),
        *(([f"--{name}", 0], name) for name in ("gamma", "epochs", "isolation-epochs", "lr")),
        *(([f"--{name}", -1], name) for name in ("batch-size", "unlearn-steps", "unlearn-lr")),
        *(([f"--{name}", "nan"], name) for name in ("gamma", "lr", "unlearn-lr")),
        (["--lr", "1e30"], "no model is kept"),
        (["--unlearn-lr", "1e30"], "no model is kept"),
        (["--unlearn-lr", "1e15"], "no model is kept"),  # finite weights, outputs that are not
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_flag(inline, one_line, digits_badnets, tmp_path, args, named):
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", *SHORT["abl"], *args
    assert named in one_line(inline, "abl", *flags)
    assert files_below(tmp_path) == []


def test_a_rate_given_twice_and_the_list_of_the_last(inline, few, tmp_path):
    """isolated.csv is the last rate's, whatever ran before; a clean set has no list."""
    flags = *SHORT["abl"], "--isolation", 0.05, 0.2, 0.05
    _, metrics = repaired_by(inline, few, tmp_path / "twice", *flags)
    rows = (tmp_path / "twice" / "isolated.csv").read_text().splitlines()
    assert len(rows) == 1 + metrics["isolated"] == 1 + round(0.05 * FEW)
    assert metrics["isolated_0.2"] == round(0.2 * FEW)


def test_a_training_set_of_the_user_s_own(inline, digits_badnets, tmp_path, capfd):
    """x and y alone, a bare checkpoint: the suspicious images by number, and a new model."""
    x, y, poisoned = load_training_set(loaded(digits_badnets))
    np.savez(tmp_path / "own.npz", x=x.permute(0, 2, 3, 1).numpy(), y=y.numpy())
    torch.save(loaded(digits_badnets).model.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    epochs = "--isolation-epochs", 8, "--epochs", 1, "--unlearn-steps", 5
    inline("abl", *flags, "--train-set", "own.npz", *epochs, "--isolation", 0.05)
    out = tmp_path / "suspect" / "abl-s0"
    rows = (out / "isolated.csv").read_text().splitlines()
    assert rows[0] == "image,label,loss" and len(rows) == 1 + 72 and (out / "model.pt").exists()
    images = [int(row.split(",")[0]) for row in rows[1:]]
    assert poisoned[images].float().mean() >= 0.8 and len(set(images)) == 72
    assert [int(row.split(",")[1]) for row in rows[1:]] == y[images].tolist()
    losses = [float(row.split(",")[2]) for row in rows[1:]]
    assert losses == sorted(losses)
    metrics = result_of(out)["metrics"]
    assert metrics["isolated"] == 72 and not any("precision" in key for key in metrics)
    assert metrics["isolated_sure"] > 10
    told = capfd.readouterr().out
    assert "a trigger that these share may be left, too: try --ascent" in told
    assert "test images are in" not in told


def test_test_images_that_lie_in_the_training_set_are_told(inline, untrained, tmp_path, capfd):
    """A network of clean.py on own.npz splits its test images off; ABL then trains on all."""
    write_npz(tmp_path / "own.npz", count=60)
    with np.load(tmp_path / "own.npz") as archive:
        np.savez(tmp_path / "set.npz", x=archive["x_train"], y=archive["y_train"])
    inline("clean", "--dataset", "set.npz", "--arch", "mnist_cnn", "--epochs", 8, "--out", "net")
    flags = *SHORT["abl"], "--batch-size", 10, "--isolation", 0.2
    inline("abl", "--ckpt", "net", "--train-set", "set.npz", *flags)
    assert "12 of 12 test images are in set.npz" in capfd.readouterr().out


def test_the_images_of_the_check_are_not_the_attack_s_poisons(inline, tmp_path, monkeypatch):
    """Drawn alike, with one seed, they would all be poisons of an all-to-all attack; then a network
    that resisted it looks misread."""
    inline("badnets", *SHORT["badnets"], "--train-images", 1437, "--all-to-all", "--out", "victim")
    seen = []
    monkeypatch.setattr(defence, "check_reading", lambda model, x, y: seen.append(x))
    ran = inline("abl", "--ckpt", "victim", *SHORT["abl"])
    poisoned = ran["flags"].nonzero().flatten()
    first = ran["order"][: len(poisoned)]
    assert len(poisoned) == 144 and torch.isin(first, poisoned).float().mean() <= 0.3
    assert torch.equal(seen[0][:144], ran["x_train"][first])
