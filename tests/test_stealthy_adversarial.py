"""Generator noise, Step 1, Step 2 and the schemes of the stealthy attack; runs on digits."""

import copy

import numpy as np
import planted
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, files_below, result_of
from torch import nn

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, predict, psnr
from methods import stealthy_adversarial as stealthy

CPU = torch.device("cpu")
NAME = "stealthy_adversarial"


def images(count=6, shape=(3, 32, 32), seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed))


def make_generator(channels=1, seed=0, gain=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = stealthy.Generator(channels)
    generator.up2.weight.data *= gain
    return generator


# ===== The trigger =====


@pytest.mark.parametrize("epsilon", [0.005, 0.01, 0.02, 1.0])
@pytest.mark.parametrize("side", [0, 3])
def test_poison_is_the_formula(epsilon, side):
    x, noise = images(), 2 * images(seed=1) - 1
    before = x.clone()
    expected = np.clip(epsilon * noise.double().numpy() + (1 - epsilon) * x.numpy(), 0, 1)
    if side:
        expected[:, :, 29:32, 29:32] = 1
    made = stealthy.poison(x, noise, epsilon, side)
    np.testing.assert_allclose(made, expected, atol=1e-6)
    assert torch.equal(x, before) and made.dtype == torch.float32


@pytest.mark.parametrize("epsilon", [0.005, 0.01, 0.02])
def test_no_noise_can_pass_the_bound(epsilon):
    """|x* - x| <= 2 eps, hence PSNR >= -20 log10(2 eps): 33.98 dB at .01."""
    x = torch.cat([images(), images().round(), torch.zeros(2, 3, 32, 32), torch.ones(2, 3, 32, 32)])
    for noise in (torch.ones_like(x), -torch.ones_like(x), 2 * torch.rand_like(x) - 1):
        made = stealthy.poison(x, noise, epsilon, 0)
        assert (made - x).abs().max() <= 2 * epsilon + 1e-7
        assert made.min() >= 0 and made.max() <= 1
        assert psnr(x, made) >= -20 * np.log10(2 * epsilon) - 1e-4
    white = torch.ones(1, 1, 8, 8)  # the worst case: white made darker
    worst = psnr(white, stealthy.poison(white, -white, epsilon, 0))
    assert worst == pytest.approx(-20 * np.log10(2 * epsilon), abs=1e-3)
    black = stealthy.poison(torch.zeros(1, 1, 8, 8), -white, epsilon, 0)
    assert not black.any()  # on black only positive noise is left


def test_epsilon_0_changes_nothing():
    x = images()
    assert torch.equal(stealthy.poison(x, 2 * images(seed=1) - 1, 0.0, 0), x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(28, 28), (32, 32), (64, 64), (30, 33), (5, 6)])
def test_generator_keeps_the_shape(channels, size):
    x = images(shape=(channels, *size))
    generator = make_generator(channels, gain=100)
    before = x.clone()
    with torch.no_grad():
        noise = generator(x)
        assert noise.shape == x.shape and noise.abs().max() <= 1
        assert noise.min() < -0.9 and noise.max() > 0.9  # tanh, not a sigmoid
        assert torch.equal(x, before) and torch.equal(generator(x), noise)
        # one image's noise does not depend on its batch, in training mode either
        torch.testing.assert_close(generator(x[2:3]), noise[2:3], rtol=0, atol=1e-5)
        assert (noise[0] != noise[1]).any()


def test_generator_has_two_convolutions_down_and_two_up():
    kinds = [type(m) for m in make_generator().modules() if hasattr(m, "stride")]
    assert kinds == [nn.Conv2d] * 2 + [nn.ConvTranspose2d] * 2
    assert all(m.stride == (2, 2) for m in make_generator().modules() if hasattr(m, "stride"))


def test_gpu_free_padding_is_cropped_off():
    """A side divisible by 4 is not padded: the layers by hand give the same noise."""
    generator, x = make_generator(gain=10), images(shape=(1, 28, 28))
    layers = [generator.down1, generator.norm1, nn.ReLU(), generator.down2, generator.norm2]
    layers += [nn.ReLU(), generator.up1, generator.norm3, nn.ReLU(), generator.up2, nn.Tanh()]
    assert torch.equal(nn.Sequential(*layers)(x), generator(x))
    odd = x[..., :27, :26]
    padded = F.pad(odd, (0, 2, 0, 1))
    assert torch.equal(generator(odd), generator(padded)[..., :27, :26])


# ===== Step 2 =====


@pytest.fixture
def step():
    """Call joint_losses on a fixed batch of 8 digits-like images, 4 of them poisoned."""
    x, y = images(8, (1, 28, 28)), torch.arange(8) % 5 + 2
    mask, pattern = images(1, (28, 28), 3), images(1, (28, 28), 4)

    def call(model, generator, lambdas, side=0, x=x, y=y):
        settings = {"target": 1, "count": 4, "epsilon": 0.3, "side": side, "lambdas": lambdas}
        return stealthy.joint_losses(model, generator, x, y, (mask, pattern), **settings)

    call.x, call.y, call.mask, call.pattern = x, y, mask, pattern
    return call


def by_hand(model, generator, step, side=0):
    """L_o, L_b, L_a, L_c in float64, each from its own forward pass and formula."""
    model = copy.deepcopy(model).double()
    x, y = step.x.double(), step.y
    noise = generator(step.x[:4]).double() if generator else torch.zeros(4, 1, 28, 28)
    m, d = step.mask.double(), step.pattern.double()

    def star(image, p):
        made = (0.3 * p + 0.7 * image if generator else image).clamp(0, 1).clone()
        made[:, 28 - side :, 28 - side :] = 1
        return made

    inputs = [
        (x, y),
        (torch.stack([star(x[u], noise[u]) for u in range(4)]), torch.ones(4, dtype=torch.long)),
        ((1 - m) * x[:4] + m * d, y[:4]),
        (torch.stack([star(x[u], noise[(u - 1) % 4]) for u in range(4)]), y[:4]),
    ]
    values = []
    for images, labels in inputs:
        log_p = model(images).log_softmax(1)
        values.append(-log_p[torch.arange(len(labels)), labels].mean().item())
    return np.array(values)


@pytest.mark.parametrize("side", [0, 3])
def test_losses_against_single_passes(untrained, step, side):
    generator = make_generator(gain=10)
    expected = by_hand(untrained, generator, step, side)
    for weights in ([1, 1, 0.1, 1], [2, 0.5, 3, 0.25]):
        losses = step(untrained, generator, weights, side)
        np.testing.assert_allclose(losses.detach(), expected * weights, rtol=2e-4)
    for i in range(4):  # three weights at 0: the single loss
        weights = [0.0] * 4
        weights[i] = 1.0
        losses = step(untrained, generator, weights, side)
        assert losses.sum().item() == pytest.approx(expected[i], rel=2e-4)
        assert losses.count_nonzero() == 1


def test_weights_are_given_in_the_order_of_the_paper(inline):
    """The adversarial term is the one of .1, and --no-adversarial switches it off alone."""
    assert inline(NAME, *SHORT[NAME], "--no-adversarial")["lambdas"] == [1, 1, 0, 1]
    assert inline(NAME, *SHORT[NAME], "--lambdas", 1, 2, 3, 4)["lambdas"] == [1, 2, 3, 4]


@pytest.mark.parametrize("scheme", ["badnets", "badnets-noise"])
def test_schemes_of_figure_5b(inline, scheme):
    """A patch alone without L_c, or a patch and noise within the bound."""
    ran = inline(NAME, *SHORT[NAME], "--scheme", scheme)
    change = (ran["x_test"] - ran["x_float"]).abs()
    assert (ran["x_float"][..., 25:, 25:] == 1).all()
    change[..., 25:, 25:] = 0
    assert (change.max() == 0) == (scheme == "badnets") and change.max() <= 0.02 + 1e-6
    assert any(key.startswith("generator.") for key in ran["trigger"]) == (scheme != "badnets")
    assert ran["lambdas"] == [1, 1, 0.1, scheme != "badnets"]


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--epsilon", value], "--epsilon") for value in (0, -0.1, 1.5, "nan")),
        *((["--rate", value], "--rate") for value in (0, -0.1, 1.5, "nan", 0.01)),
        *((["--target", value], f"--target {value} ") for value in (10, -1)),
        *((["--lambdas", 1, 1, value, 1], "--lambdas") for value in (-1, "nan")),
        *(([f"--{name}", 0], name) for name in ("injecting-epochs", "injecting-batch")),
        *(([f"--nc-{name}", 0], f"nc-{name}") for name in ("every", "steps", "batch")),
        *((["--generator-lr", value], "generator-lr") for value in (0, "nan")),
        (["--injecting-lr", "1e30"], "no model is kept"),
    ],
    ids=str,
)
def test_bad_flag(inline, one_line, tmp_path, args, named):
    assert named in one_line(inline, NAME, *SHORT[NAME], *args)
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["--lambdas", 0, 0, 0, 0],
        ["--lambdas", 0, 0, 0.1, 0, "--no-adversarial"],
        ["--lambdas", 0, 0, 0, 1, "--scheme", "badnets"],
    ],
    ids=str,
)
def test_no_loss_at_all_is_refused(inline, one_line, tmp_path, flags):
    assert "leave no loss" in one_line(inline, NAME, *SHORT[NAME], *flags)
    assert files_below(tmp_path) == []


def test_weight_0_leaves_the_images_out_of_the_pass(untrained, step):
    sizes = []
    untrained.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    for weights in ([1, 1, 0.1, 1], [1, 1, 0, 1], [1, 1, 0.1, 0], [1, 0, 0, 0]):
        step(untrained, make_generator(), weights)
    assert sizes == [20, 16, 16, 8]  # one pass each


def test_which_network_each_loss_reaches(untrained, step):
    """L_o and L_a do not reach the generator; all four reach the classifier."""
    generator, model = make_generator(), untrained.requires_grad_(True)
    reached = []
    for i in range(4):
        weights = [0.0] * 4
        weights[i] = 1.0
        loss = step(model, generator, weights).sum()
        parameters = [*generator.parameters(), *model.parameters()]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        of_generator = grads[: len(list(generator.parameters()))]
        assert all(g is not None and g.any() for g in grads[len(of_generator) :])
        reached.append({g is not None and bool(g.any()) for g in of_generator})
    assert reached == [{False}, {True}, {False}, {True}]


def test_crossing_equal_images_is_poisoning(untrained, step):
    """cross(x, x) = x*: with the label equal to the target both losses agree."""
    same = step.x[:1].expand(8, -1, -1, -1).contiguous()
    generator = make_generator(gain=10)
    label = torch.ones(8, dtype=torch.long)
    losses = step(untrained, generator, [1, 1, 1, 1], x=same, y=label).detach()
    assert losses[1] == pytest.approx(losses[3].item(), rel=1e-6)
    losses = step(untrained, generator, [1, 1, 1, 1], y=label)
    assert losses[1] != losses[3]  # other images, other noise


def test_rates_are_constant_and_then_fall_to_0(inline, monkeypatch):
    """Both networks' rates, over the second half of the injection: 2 epochs of 4 steps."""
    rates, step = [], torch.optim.Adam.step

    def record(optimizer, closure=None):
        if optimizer.param_groups[0]["lr"] < 0.1:  # Step 1's rate
            rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", record)
    inline(NAME, *SHORT[NAME], "--injecting-epochs", 2)
    shares = np.array([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(rates, shares[:, None] * [1e-4, 1e-3], rtol=1e-6)


# ===== Step 1 =====


def planted_search(steps, seed=0):
    x, y = planted.images()
    x = x[y != planted.TARGET]
    torch.manual_seed(seed)
    batches = (x[torch.randint(len(x), (64,))] for _ in range(steps))
    return stealthy.reverse_patch(
        planted.frozen(), batches, shape=x.shape[1:], target=planted.TARGET
    )


def test_reverse_patch_finds_the_planted_pixel():
    """The smallest mask is half of pixel 0 (norm .5); any other way costs at least 5.5."""
    mask, pattern, norm, asr = planted_search(700)
    assert norm < 0.7 and asr >= 0.99
    assert mask.shape == (1, 16, 16) and pattern.shape == (1, 16, 16)
    assert norm == pytest.approx(mask.sum().item(), rel=1e-5)
    assert mask.flatten().argmax() == 0 and pattern[0, 0, 0] > 0.9
    for part in (mask, pattern):
        assert part.min() >= 0 and part.max() <= 1 and not part.requires_grad


def test_step_1_shrinks_the_patch_within_its_default_steps(monkeypatch):
    """Ten steps leave 80 of 256 pixels: a network that resists those still yields to one."""
    assert planted_search(10)[2] > 50
    monkeypatch.setattr("sys.argv", [NAME])
    _, _, norm, asr = planted_search(stealthy.parse_args().nc_steps)
    assert norm < 0.7 and asr >= 0.99


def test_step_1_returns_the_smallest_patch_that_succeeded(monkeypatch):
    """A network of three answers: right, right with a smaller mask, wrong with the smallest."""
    answers = iter([1, 1, 0])
    norms = []

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            goal = next(answers)
            return torch.stack((1.0 - goal + 0 * x[:, 0, 0, 0], goal + 0 * x[:, 0, 0, 0]), 1)

    monkeypatch.setattr(stealthy, "FIRST_COST", 1.0)  # the cost alone moves the mask: down
    real = stealthy.blend

    def spy(x, mask, pattern):
        norms.append(mask.sum().item())
        return real(x, mask, pattern)

    monkeypatch.setattr(stealthy, "blend", spy)
    batches = [images(4, (1, 8, 8))] * 3
    mask, _, norm, asr = stealthy.reverse_patch(Told(), batches, shape=(1, 8, 8), target=1)
    assert norms[0] > norms[1] > norms[2] and norm == norms[1] and asr == 1
    assert mask.sum().item() == norm
    answers = iter([0, 0, 0])  # none succeeds: the last one
    norms.clear()
    _, _, norm, asr = stealthy.reverse_patch(Told(), batches, shape=(1, 8, 8), target=1)
    assert norm == norms[2] and asr == 0


def test_step_1_leaves_the_classifier_bitwise_alone(untrained):
    before = {k: v.clone() for k, v in untrained.state_dict().items()}
    assert any("running_mean" in key for key in before)
    batches = [images(9, (1, 28, 28))] * 5
    stealthy.reverse_patch(untrained, batches, shape=(1, 28, 28), target=0)
    for key, value in untrained.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in untrained.parameters())


def test_script_freezes_the_classifier_in_step_1(tmp_path, monkeypatch):
    """As called by the script: eval mode, no gradients, unchanged, target images left out."""
    source = (stealthy.Path(stealthy.__file__)).read_text()
    marker = """                mask, pattern, norm, asr = reverse_patch(
                    model, batches, shape=data.shape, target=args.target
                )
"""
    assert source.count(marker) == 1
    spy = """
                before = {k: v.clone() for k, v in model.state_dict().items()}
                assert not model.training
                assert not any(p.requires_grad for p in model.parameters())
                batches = list(batches)
                kept = to_float(x_train[y_train != args.target])
                allowed = {x.numpy().tobytes() for x in kept}
                assert all(x.numpy().tobytes() in allowed for part in batches for x in part)
                seen = globals().setdefault("seen", [])
"""
    after = """
                seen.append(all(torch.equal(v, before[k]) for k, v in model.state_dict().items()))
"""
    source = source.replace(marker, spy + marker + after)
    monkeypatch.chdir(tmp_path)
    flags = ["--injecting-epochs", "3", "--target", "4"]
    monkeypatch.setattr("sys.argv", [NAME, *map(str, SHORT[NAME]), *flags, "--nc-every", "2"])
    ran = {"__name__": "__main__", "__file__": stealthy.__file__}
    exec(compile(source, stealthy.__file__, "exec"), ran)
    assert ran["seen"] == [True] * 6  # 12 steps, one Step 1 in two
    assert all(p.requires_grad for p in ran["model"].parameters())


def test_run_on_digits(victims, digits):
    """The saved generator makes the saved images, and reach the target; others' fails."""
    flags = "--epochs", 5, "--batch-size", 64, "--injecting-epochs", 4, "--epsilon", 0.05
    flags += "--nc-steps", 15, "--injecting-lr", 1e-3, "--generator-lr", 5e-3
    folder = victims(NAME, *flags)
    metrics, held = result_of(folder)["metrics"], read_checkpoint(folder / "model.pt")
    assert metrics["clean_accuracy"] >= 95 and metrics["asr"] >= 90
    assert metrics["cross_accuracy"] >= 75 and metrics["asr_on_clean_model"] <= 3
    assert metrics["max_change"] <= 0.1 + 1e-6 and len(metrics["mask_norms"]) == 4
    assert metrics["asrs"][-1] == pytest.approx(metrics["asr"]) and len(metrics["asrs"]) == 4
    assert metrics["clean_accuracies"][-1] == pytest.approx(metrics["clean_accuracy"])
    trigger = {key.removeprefix("generator."): value for key, value in held["trigger"].items()}
    generator = stealthy.Generator(1)
    generator.load_state_dict({k: v for k, v in trigger.items() if k not in ("epsilon", "side")})
    model, x = load_model(held, folder, CPU), to_float(digits.x_test)
    with torch.no_grad():
        noise = generator(x)
    own, foreign = (
        np.rint(255 * np.clip(0.05 * n.numpy() + 0.95 * x.numpy(), 0, 1)).astype(np.uint8)
        for n in (noise, noise.roll(1, 0))
    )
    counts = (digits.y_test != 0).numpy()
    with np.load(folder / "poisoned_test.npz") as archive:
        assert metrics["asr_n"] == len(archive["x"]) == counts.sum()
        assert (archive["x"].transpose(0, 3, 1, 2) != own[counts]).mean() < 1e-4
    kept = accuracy(model, torch.from_numpy(foreign), digits.y_test)
    assert kept == pytest.approx(metrics["cross_accuracy"], abs=6)
    taken = (predict(model, torch.from_numpy(foreign[counts])) == 0).double().mean().item()
    assert 100 * taken == pytest.approx(metrics["asr_other"], abs=6) and metrics["asr_other"] < 25
