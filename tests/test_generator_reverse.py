"""Reversed generators against stubs, models with known answers, plain autograd, and on digits."""

import copy
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, loaded, random_images, result_of, run_here, write_npz
from planted import CLASSES, SIDE, TARGET, Planted, frozen, images, index_of
from scipy.optimize import minimize
from torch import nn

from common.checkpoint import read_checkpoint
from common.datasets import to_float, to_uint8
from common.metrics import accuracy, case_of, verdict
from common.models import UNet, build_model
from methods import generator_reverse as gr

ALL = list(range(CLASSES))
WEIGHTS = [0.1, 1.0, 0.1]


class Additive(nn.Module):
    """x + c, one trainable c per pixel: the training of its copies is a convex problem."""

    def __init__(self, start=0.0):
        super().__init__()
        self.c = nn.Parameter(torch.full((1, SIDE, SIDE), start))

    def forward(self, x):
        return x + self.c


class OnlyClass(nn.Module):
    """Blackens nothing but the images whose first pixel says class `c`."""

    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x * (x[:, :1, :1, :1] != self.c)


def unet(channels=1, width=4, seed=0, skip=False):
    """With the skip, one whose last layer is random, as after some steps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UNet(channels, width, skip=skip)
        if skip:
            net.out.reset_parameters()
        return net


def train(
    model, start, data, labels=ALL, steps=10, batch_size=30, lr=1e-2, weights=WEIGHTS, lpips=None
):
    """train_generators with one l1 for all labels: (parameters, terms)."""
    settings = {"lambda1": torch.full((len(labels),), weights[0]), "lambdas": weights}
    settings |= {"lpips_net": lpips, "steps": steps, "batch_size": batch_size, "lr": lr, "seed": 0}
    return gr.train_generators(model, start, *data, labels, **settings)


def pretrained(x, goal, steps, lr=1e-2, seed=0, batch_size=30, weights=WEIGHTS, lpips=None):
    torch.manual_seed(seed)
    generator = UNet(x.shape[1], 4)
    settings = {"lambdas": weights, "lpips_net": lpips, "goal": goal, "steps": steps}
    settings |= {"batch_size": batch_size, "lr": lr, "seed": seed}
    return generator, *gr.pretrain(generator, x, **settings)


@pytest.fixture(scope="module")
def planted():
    """(planted images, their labels, a U-Net that has begun to copy them)."""
    x, y = images(6)
    return x, y, pretrained(x, 0.1, 300)[0]


def same(a, b):
    """Whether two dictionaries of tensors are bitwise equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(*modules):
    return [{k: v.clone() for k, v in module.state_dict().items()} for module in modules]


# ===== Equation 5 =====


@pytest.mark.parametrize("channels, height, width", [(1, 28, 28), (3, 16, 20)])
def test_norm_of_a_constant_shift_is_exact(channels, height, width):
    shifts = torch.tensor([0.25, -0.5, 0.0, 0.125, -1.0])
    x = torch.randint(0, 4, (600, channels, height, width)) / 4  # sums without rounding
    model = nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 5))
    parameters = {"c": shifts.view(5, 1, 1, 1).expand(5, 1, SIDE, SIDE)[..., :1, :1]}
    y = torch.arange(600) % 5
    norms, asrs = gr.evaluate_generators(model, Additive(), parameters, x, y, range(5))
    assert norms == [abs(c) * channels * height * width for c in shifts.tolist()]
    for label, c in enumerate(shifts):
        others = x[y != label] + c
        expected = (model(others).argmax(1) == label).float().mean()
        assert asrs[label] == pytest.approx(expected.item(), abs=1e-6)


def test_images_of_the_label_do_not_count():
    y = torch.arange(50) % 5
    x = torch.rand(50, 1, 4, 4)
    x[:, 0, 0, 0] = y + 1.0
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    own, next_one = (
        gr.evaluate_generators(model, OnlyClass(), {"c": codes}, x, y, range(5))[0]
        for codes in (torch.arange(1.0, 6), torch.arange(5.0).add(1).roll(-1))
    )
    assert own == [0] * 5
    for label, norm in enumerate(next_one):
        changed = x[y == (label + 1) % 5].sum()
        assert norm == pytest.approx((changed / (y != label).sum()).item(), rel=1e-5)


def test_large_images_go_through_the_network_in_smaller_parts():
    """A fourth of the images a pass at 64 x 64, where 500 would need four times the memory."""
    seen, net = [], nn.Sequential(nn.Flatten(), nn.Linear(64 * 64, 5))
    net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    x, y = torch.rand(150, 1, 64, 64), torch.arange(150) % 5
    gr.evaluate_generators(net, Additive(), {"c": torch.zeros(1, 1, 1, 1)}, x, y, [0])
    assert seen == [50, 50, 20]


HAND = [5, 5.2, 4.8, 5.1, 4.9, 5.3, 4.7, 5, 5.2, 1]


@pytest.mark.parametrize(
    "norms, asr, target, flagged, case",
    [
        (HAND, 1, 9, [9], 1),
        ([*HAND[:8], 1.5, 1], 1, 9, [9, 8], 2),
        (HAND, 1, 4, [9], 3),
        ([*HAND[:9], 4.9], 1, 9, [], 4),
        (HAND, 0.79, 9, [], 4),  # smallest m, but its generator missed the goal of .8
        ([*HAND[:8], 1.5, 1], 0.79, 8, [8], 1),
    ],
)
def test_cases_of_hand_made_norms(norms, asr, target, flagged, case):
    asrs = np.array([1.0] * 9 + [asr])
    decision = verdict(norms, asrs >= 0.8)
    named = decision["flagged_by_index"]
    assert named == flagged and case_of(named, target) == case


# ===== Training of the generators =====


def best_shift(label, weights, path):
    """The convex optimum of l1 CE + l2 MSE over additive changes, in float64, by L-BFGS."""
    w = Planted(path).linear.weight.detach().double().numpy()
    x, y = (a.numpy() for a in images(1))
    x = x.reshape(CLASSES, -1)[y != label].astype(float)

    def loss(c):
        z = (x + c) @ w.T
        z = z - z.max(1, keepdims=True)
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        value = -weights[0] * np.log(p[:, label]).mean() + weights[1] * (c**2).mean()
        p[:, label] -= 1
        return value, weights[0] * (p @ w).mean(0) + weights[1] * 2 * c / c.size

    return minimize(loss, np.zeros(SIDE**2), jac=True, method="L-BFGS-B").x


@pytest.mark.parametrize("path, flagged", [("linear", [TARGET]), ("none", [])])
def test_additive_generators_reach_the_convex_optimum(path, flagged):
    """Full batches of equally many images per class; the target needs the least change."""
    x, y = images(1)
    model, labels = frozen(path), ALL
    weights = [0.1, 5.0, 0.0]
    expected = np.stack([best_shift(k, weights, path) for k in labels])
    parameters, _ = train(model, Additive(), (x, y), steps=1000, batch_size=10, weights=weights)
    np.testing.assert_allclose(parameters["c"].flatten(1), expected, atol=2e-3)
    norms, asrs = gr.evaluate_generators(model, Additive(), parameters, x, y, labels)
    np.testing.assert_allclose(norms, np.abs(expected).sum(1), rtol=1e-2)
    decision = verdict(norms, np.array(asrs) >= 0.8)
    assert min(asrs) == 1 and decision["flagged_by_index"] == flagged == decision["below"]
    assert decision["index"] == pytest.approx(index_of(np.abs(expected).sum(1)), rel=1e-2)
    if flagged:
        change = parameters["c"][TARGET].flatten().abs()
        assert change.argmax() == 0 and change[0] > 3 * change[1:].max()


@pytest.mark.parametrize("path", ["linear", "none"])
def test_unet_finds_the_planted_pixel(planted, path):
    """Measured over four seeds: pixel 0 rises by .32 to .50, on a clean model by at most .07."""
    x, y, start = planted
    model = frozen(path)
    parameters, _ = train(model, start, (x, y), [TARGET], steps=60)
    _, asrs = gr.evaluate_generators(model, start, parameters, x, y, [TARGET])
    own, others = {k: v[0] for k, v in parameters.items()}, x[y != TARGET]
    with torch.no_grad():
        change = torch.func.functional_call(start, own, (others,)) - others
    change = change.mean(0).flatten()
    assert asrs == [1]
    assert (change[0] > 0.25 and change.argmax() == 0) == (path == "linear")
    assert change[0] < 0.12 or path == "linear"


@pytest.mark.parametrize("path", ["linear", "none"])
def test_generator_with_the_skip_finds_the_planted_pixel_on_grey(path):
    """Measured over two seeds: pixel 0 rises by .57 and .73, on a clean model by at most 0."""
    (x, y), planted = images(6), frozen(path)
    torch.manual_seed(0)
    start = UNet(1, 4, skip=True)
    parameters, _ = train(lambda z: planted(z - 0.25), start, (x + 0.25, y), [TARGET], steps=60)
    own, others = {k: v[0] for k, v in parameters.items()}, x[y != TARGET] + 0.25
    with torch.no_grad():
        change = torch.func.functional_call(start, own, (others,)) - others
        assert (planted(others + change - 0.25).argmax(1) == TARGET).all()
    change = change.mean(0).flatten()
    assert (change[0] > 0.4 and change.argmax() == 0) == (path == "linear")
    assert change[0] < 0.1 or path == "linear"


class Square(nn.Module):
    """Stands in for LPIPS: 7 times the mean square of the red channel's difference at 64 px."""

    def forward(self, a, b, normalize):
        return 7 * (a - b)[:, 0].square().mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize("lpips", [None, Square()])
@pytest.mark.parametrize("weights", [[0.3, 2.0, 0.5], [0.0, 1.0, 0.0], [1.0, 0.0, 4.0]])
def test_one_step_follows_the_plain_gradient(monkeypatch, untrained, lpips, weights):
    """Eq. (2)-(4) without stacking, by autograd per label; SGD shows the gradient's size."""
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr: torch.optim.SGD(p, lr))
    torch.manual_seed(0)
    x, y = torch.rand(12, 1, 28, 28), torch.arange(12) % CLASSES
    start, labels = unet(), [1, 4]
    parameters, terms = train(
        untrained, start, (x, y), labels, 1, 12, lr=1, weights=weights, lpips=lpips
    )
    for i, label in enumerate(labels):
        g, others = copy.deepcopy(start), x[y != label]
        made = g(others)
        parts = [F.cross_entropy(untrained(made), torch.full((len(others),), label))]
        parts.append(((made - others) ** 2).mean())
        large = [F.interpolate(a, size=64, mode="bilinear") for a in (made, others)]
        parts.append(7 * F.mse_loss(*large) if lpips else torch.zeros(()))
        torch.testing.assert_close(terms[i], torch.stack(parts).detach(), rtol=1e-4, atol=1e-6)
        sum(w * part for w, part in zip(weights, parts)).backward()
        for name, p in g.named_parameters():
            torch.testing.assert_close(
                start.get_parameter(name) - parameters[name][i], p.grad, rtol=1e-3, atol=1e-5
            )


def test_pretraining_follows_both_reconstruction_terms(monkeypatch):
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr: torch.optim.SGD(p, lr))
    x, seed = torch.rand(10, 1, 28, 28), 3
    torch.manual_seed(seed)
    start = UNet(1, 4)
    settings = {"lr": 1.0, "batch_size": 10, "weights": [9.0, 2.0, 0.5], "lpips": Square()}
    after, *_ = pretrained(x, 0, 1, seed=seed, **settings)
    made = start(x)
    large = [F.interpolate(a, size=64, mode="bilinear") for a in (made, x)]
    (2 * F.mse_loss(made, x) + 0.5 * 7 * F.mse_loss(*large)).backward()
    for name, p in start.named_parameters():
        step = p - after.get_parameter(name)
        torch.testing.assert_close(step, p.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("split", [[ALL[::-1]], [[0], [3], [9]], [[8, 3, 5], [1, 2]]])
def test_neither_order_nor_stacking_matters(untrained, split):
    data = torch.rand(40, 1, 28, 28), torch.arange(40) % CLASSES
    start = unet()

    def run(labels):
        parameters, _ = train(untrained, start, data, labels, steps=8, batch_size=16, lr=1e-3)
        return gr.evaluate_generators(untrained, start, parameters, *data, labels)

    norms, asrs = run(ALL)
    assert len({round(norm, 3) for norm in norms}) == CLASSES
    for labels in split:
        own_norms, own_asrs = run(labels)
        np.testing.assert_allclose(own_norms, [norms[k] for k in labels], rtol=1e-3)
        np.testing.assert_allclose(own_asrs, [asrs[k] for k in labels], atol=0.03)


def test_start_and_classifier_stay_as_they_are(untrained):
    """Their BatchNorm statistics too."""
    data, start = (torch.rand(20, 1, 28, 28), torch.arange(20) % CLASSES), unet()
    before, kept = snapshot(untrained, start), data[0].clone()
    parameters, _ = train(untrained, start, data, steps=3, batch_size=8)
    gr.evaluate_generators(untrained, start, parameters, *data, ALL)
    gr.finetune(
        untrained, random_images(20, (1, 28, 28)), data[1], generator=start, epochs=1, lr=0.01
    )
    for module, state in zip((untrained, start), before):
        assert same(module.state_dict(), state)
    assert torch.equal(data[0], kept) and not untrained.training
    assert not any(p.requires_grad for p in untrained.parameters())
    assert not torch.equal(parameters["out.weight"][0], start.out.weight)


def test_images_of_the_label_do_not_train_its_generator(untrained):
    x, y = torch.rand(40, 1, 28, 28), torch.arange(40) % CLASSES
    noise = torch.where((y == TARGET).view(-1, 1, 1, 1), torch.rand(x.shape), x)
    a, b = (train(untrained, unet(), (data, y), [TARGET, 5])[0] for data in (x, noise))
    for name in a:
        torch.testing.assert_close(a[name][0], b[name][0], rtol=0, atol=1e-6)
    assert not torch.allclose(a["out.weight"][1], b["out.weight"][1], rtol=0, atol=1e-5)


def test_batches_of_the_label_alone_leave_its_generator(untrained):
    data, start = (torch.rand(8, 1, 28, 28), torch.full((8,), TARGET)), unet()
    parameters, _ = train(untrained, start, data, [TARGET])
    assert same({k: v[0] for k, v in parameters.items()}, dict(start.named_parameters()))


@pytest.mark.parametrize("lr", [1e-2, 0])
def test_without_the_attack_term_nothing_is_flagged(planted, lr):
    """l1 = 0: all generators stay near the autoencoder; with lr = 0 all norms tie and MAD is 0."""
    x, y, start = planted
    model = frozen()
    parameters, _ = train(model, start, (x, y), weights=[0.0, 1.0, 0.0], lr=lr)
    norms, asrs = gr.evaluate_generators(model, start, parameters, x, y, ALL)
    assert max(asrs) < 0.1  # the autoencoder attacks nothing
    decision = verdict(norms, np.array(asrs) >= 0.8)
    assert decision["conclusive"] is False and decision["flagged_by_index"] == []
    if lr == 0:
        assert verdict([norms[0]] * CLASSES)["index"] == 0
        np.testing.assert_allclose(norms, norms[0], rtol=0.2)  # as other images stay away


# ===== Search of lambda 1 =====


@pytest.mark.parametrize("thresholds", [[0.002, 0.1, 3.7, 9.5], [0.5], [1e-5, 100, 0.03]])
def test_search_finds_the_smallest_sufficient_lambda1(thresholds):
    """Six halvings of [.001, 10] in log space leave a factor of 10^(4/64)."""
    calls = []

    def step(lambda1):
        calls.append(lambda1)
        return lambda1, None

    def evaluate(lambda1):
        wanted = torch.tensor(thresholds)
        return None, torch.where(lambda1 >= wanted, 0.9, 0.89).tolist()

    found = gr.search_lambda1(
        step, evaluate, count=len(thresholds), goal=0.9, device=torch.device("cpu")
    )
    assert len(calls) == 6
    for lambda1, threshold in zip(found.tolist(), thresholds):
        within = min(max(threshold, 1e-3), 10)
        assert within * 0.9999 <= lambda1 <= within * 10 ** (4 / 64) * 1.0001


# ===== The generator and its pre-training =====


class SaysGPU(torch.Tensor):
    """Takes the path of a GPU, with the operators of the CPU."""

    is_cuda = True


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", [(28, 28), (30, 30), (32, 32), (30, 33)])
def test_generator_keeps_shape_and_range(channels, height, width):
    generators = [unet(channels), unet(channels, seed=1)]
    x = torch.rand(2, channels, height, width)
    both, _ = torch.func.stack_module_state(generators)
    for view in (x, x.as_subclass(SaysGPU)):
        stacked = gr.generate(copy.deepcopy(generators[0]).to("meta"), both, view)
        expected = torch.stack([generator(x) for generator in generators])
        torch.testing.assert_close(stacked.as_subclass(torch.Tensor), expected)
    generator = generators[0]
    for scale in (1, 1e4):  # a sigmoid, whatever its input
        generator.out.weight.data *= scale
        made = generator(x)
        assert made.shape == x.shape and 0 <= made.min() <= made.max() <= 1


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 30, 33)])
def test_with_the_skip_a_fresh_generator_copies_to_a_level(shape):
    """And needs no pre-training; then U adds to the logit of the image."""
    x, net = to_float(random_images(9, shape)), unet(shape[0], skip=True)
    x[:2], x[2:4] = 0, 1
    fresh = UNet(shape[0], 4, skip=True)
    assert (fresh(x) - x).abs().max() < 1.001 / 255
    settings = {"lambdas": WEIGHTS, "lpips_net": None, "batch_size": 3, "lr": 0.1, "seed": 0}
    residual, spread, taken = gr.pretrain(fresh, x, goal=0.1, steps=50, **settings)
    assert taken == 0 and 0 < residual < 0.01 * spread
    inside = x.double().clamp(1 / 255, 254 / 255).numpy()
    both = net(x).detach().double().numpy()
    net.skip = False
    change = net(x).detach().double().numpy()
    odds = inside / (1 - inside) * change / (1 - change)
    np.testing.assert_allclose(both, odds / (1 + odds), rtol=1e-4, atol=1e-6)
    assert np.abs(both - inside).max() > 0.05


@pytest.mark.parametrize("goal, steps, taken", [(10, 350, 100), (0, 130, 130), (0, 3, 3)])
def test_pretraining_stops_at_its_goal_and_reports(goal, steps, taken):
    x, _ = images(4)
    generator, residual, spread, reported = pretrained(x, goal, steps)
    with torch.no_grad():
        expected = np.abs((generator(x) - x).numpy()).sum((1, 2, 3)).mean()
    assert reported == taken and residual == pytest.approx(expected, rel=1e-4)
    assert spread == pytest.approx((x - x.mean()).abs().sum((1, 2, 3)).mean().item())


# ===== Mitigation =====


class Spot(nn.Module):
    """The trigger of the planted model: pixel 0 white."""

    def forward(self, x):
        x = x.clone()
        x[:, :, 0, 0] = 1
        return x


def test_finetuning_lowers_the_planted_weight_alone():
    x, y = images(40)
    model = frozen()
    torch.manual_seed(0)
    after, baseline = (
        gr.finetune(model, to_uint8(x), y, generator=generator, epochs=10, lr=0.05).linear.weight
        for generator in (Spot(), None)
    )
    assert after[TARGET, 0] < 13 and baseline[TARGET, 0] == 20
    assert not torch.equal(baseline, model.linear.weight)


def test_finetuning_with_identity_is_finetuning_without_a_generator(untrained):
    """Both see each image twice per epoch, in batches of 64, 64 and 12."""
    x, y = random_images(70, (1, 28, 28)), torch.arange(70) % CLASSES
    results, batches = [], []
    untrained.register_forward_pre_hook(lambda net, given: batches.append((net.training, given[0])))
    for generator in (nn.Identity(), None):
        batches.clear()
        torch.manual_seed(5)
        results.append(gr.finetune(untrained, x, y, generator=generator, epochs=2, lr=0.01))
        trained = [batch for training, batch in batches if training]
        assert [len(batch) for batch in trained] == [64, 64, 12] * 2
        for epoch in (trained[:3], trained[3:]):
            seen = (torch.cat(epoch)[:, None] == to_float(x)).flatten(2).all(2)  # 140 x 70
            assert (seen.sum(0) == 2).all()
    assert same(results[0].state_dict(), results[1].state_dict())
    assert not same(results[0].state_dict(), untrained.state_dict())
    assert not results[0].training and not any(p.requires_grad for p in results[0].parameters())


@pytest.mark.parametrize("generator", [None, Spot()])
def test_no_epoch_no_change(untrained, generator):
    x, y = random_images(20, (1, 28, 28)), torch.arange(20) % CLASSES
    after = gr.finetune(untrained, x, y, generator=generator, epochs=0, lr=0.01)
    assert after is not untrained and same(after.state_dict(), untrained.state_dict())


@pytest.mark.parametrize("count, lr", [(200, 1e30), (20, 1e38)])
def test_diverging_finetuning_gives_no_model(untrained, count, lr):
    """With 20 images there is a single step, after which no loss is computed."""
    x, y = random_images(count, (1, 28, 28)), torch.arange(count) % CLASSES
    assert gr.finetune(untrained, x, y, generator=None, epochs=1, lr=lr) is None


# ===== A whole run on digits, through the command line =====


def test_lpips_without_its_weights_stops_before_the_work(
    inline, one_line, unread, tmp_path, monkeypatch, untrained
):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    torch.save(untrained.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--arch", "mnist_cnn", "--dataset", "digits", "--lpips-net", "alex"
    message = one_line(inline, "generator_reverse", "--ckpt", "suspect.pt", *flags)
    assert "--lpips-net none" in message
    assert {path.name for path in tmp_path.iterdir()} <= {"suspect.pt", "hub"}


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_wanet):
    """Default settings but for half the width, smaller batches and fewer, larger steps."""
    out = tmp_path_factory.mktemp("generators")
    flags = "--width", 4, "--pretrain-steps", 300, "--steps", 80, "--lr", 4e-3, "--batch-size", 24
    common = "--ckpt", digits_wanet, "--out", out, "--lpips-net", "none"
    common += "--repair-fraction", 0.1, 0.21
    return out, run_here("generator_reverse", *common, *flags, cwd=out)


def test_run_finds_the_target_and_removes_the_backdoor(run):
    out, printed = run
    metrics = result_of(out)["metrics"]
    assert metrics["flagged"][0] == 0 and metrics["case"] in (1, 2)
    assert "labels [0] below the others" in printed and "LPIPS term: none" in printed
    assert metrics["asr"] > 85 and metrics["asr_repaired"] <= 10
    assert metrics["asr_repaired_0.1"] < metrics["asr_clean_only_0.1"] - 20
    assert metrics["clean_accuracy_repaired"] >= metrics["clean_accuracy"] - 3
    assert metrics["robust_accuracy_repaired"] > 80 and min(metrics["asrs"]) >= 0.8
    assert metrics["index"] == pytest.approx(index_of(metrics["norms"]))
    assert metrics["pretrain_residual"] < 0.3 * metrics["spread"]


def test_each_repair_fraction_has_its_figures(run):
    """The last one's are the repair's; fewer images repair otherwise."""
    metrics = result_of(run[0])["metrics"]
    for kind in ("repaired", "clean_only"):
        few, more = (
            [metrics[f"{name}_{kind}{suffix}"] for name in ("clean_accuracy", "robust_accuracy")]
            for suffix in ("_0.1", "")
        )
        assert few != more, kind
    assert metrics["asr_repaired_0.1"] < metrics["asr"] - 20


def test_saved_model_is_the_repaired_one(run, digits_wanet):
    out, _ = run
    victim, repaired = loaded(digits_wanet), loaded(out)
    metrics, attack = result_of(out)["metrics"], (victim.x_poisoned, victim.y_target)
    assert not same(victim.model.state_dict(), repaired.model.state_dict())
    assert accuracy(repaired.model, *attack) == pytest.approx(metrics["asr_repaired"], abs=1e-4)
    assert accuracy(victim.model, *attack) == pytest.approx(metrics["asr"], abs=1e-4)


def test_saved_generator_is_the_reversed_trigger(run, digits_wanet, digits):
    """It loads, attacks the victim as reported, and no longer the repaired model."""
    out, _ = run
    generator = UNet(1, 4)
    held = read_checkpoint(out / "model.pt")["trigger"]
    generator.load_state_dict({k.removeprefix("generator."): v for k, v in held.items()})
    x = digits.x_test[digits.y_test != 0] / 255
    with torch.no_grad():
        made = generator(x)
        before, after = (
            (loaded(folder).model(made).argmax(1) == 0).float().mean()
            for folder in (digits_wanet, out)
        )
    change = (made - x).abs().sum((1, 2, 3)).mean().item()
    assert before > 0.95 and after < 0.1
    assert change == pytest.approx(result_of(out)["metrics"]["norms"][0], rel=0.1)


def test_search_of_lambda1_through_the_command_line(inline, unread, tmp_path):
    """The untrained model always says one label: that one needs no attack, the others any."""
    torch.manual_seed(0)
    untrained = build_model("mnist_cnn", 5, (1, 16, 16), (0.5,), (0.5,))
    torch.save(untrained.net.state_dict(), tmp_path / "suspect.pt")
    data = write_npz(tmp_path / "own.npz", (16, 16), 5, 60)
    flags = ["--arch", "mnist_cnn", "--dataset", data, "--search-lambda1", "--asr-goal", 1]
    flags += ["--threshold", 100, "--data-fraction", 0.5, "--mean", 0.5, "--std", 0.5]
    ran = inline("generator_reverse", "--ckpt", "suspect.pt", *flags, *SHORT["generator_reverse"])
    always = np.array(ran["metrics"]["asrs"]) == 1
    assert always.sum() == 1
    np.testing.assert_allclose(ran["lambda1"], np.where(always, 1e-3 * 10 ** (4 / 64), 10), 1e-5)


@pytest.mark.parametrize(
    "channels, flags, skip",
    [(1, [], False), (3, [], True), (1, ["--skip"], True), (3, ["--no-skip"], False)],
)
def test_skip_is_the_default_of_colour_images(inline, unread, tmp_path, channels, flags, skip):
    """And without pre-training nothing is in doubt."""
    half = [0.5] * channels
    suspect = build_model("mnist_cnn", 5, (channels, 16, 16), half, half)
    torch.save(suspect.net.state_dict(), tmp_path / "suspect.pt")
    data = write_npz(tmp_path / "own.npz", (16, 16, 3) if channels == 3 else (16, 16), 5, 60)
    flags += ["--arch", "mnist_cnn", "--dataset", data, "--data-fraction", 0.5]
    flags += ["--mean", *half, "--std", *half]
    ran = inline("generator_reverse", "--ckpt", "suspect.pt", *flags, *SHORT["generator_reverse"])
    assert ran["origin"].skip == skip != ran["doubt"]
    assert ran["metrics"]["pretrain_steps"] == (0 if skip else 2)
    assert ran["x_clean"].is_contiguous(memory_format=torch.channels_last)  # a CPU's fast path
