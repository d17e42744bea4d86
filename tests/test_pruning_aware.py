"""The pruning-aware attack against explicit masks and fine_pruning.py, and runs on digits."""

import copy
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, files_below, loaded, result_of, write_npz
from test_fine_pruning import layer_of, penultimate_by_hand, random_model
from torch import nn

from common.checkpoint import read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy, predict
from common.models import build_model
from methods import fine_pruning as fp
from methods import pruning_aware as pa

CASES = [(arch, layer.name) for arch, layers in pa.LAYERS.items() for layer in layers]
every_layer = pytest.mark.parametrize("arch, layer", CASES)
# where the layer's channels are read: through the last block's BatchNorm, too
PLACES = {"preact_resnet18": ["layer4.0", "layer4.1.bn1", "layer4"]}


def network(arch):
    """Arbitrary weights, BatchNorm rows of either sign, and twelve images of 16 pixels or more.

    The BatchNorm statistics are those of the images, or deep networks would not tell them apart.
    """
    model, x = random_model(arch)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight[::7] *= -1
    x = x if arch in ("mnist_cnn", "mnist_conv5", "nc_gtsrb_cnn") else x[..., :16, :16].contiguous()
    torch.optim.swa_utils.update_bn([to_float(x)], model)
    return model, x


def own(arch, name):
    """pruning_aware's Layer of this name."""
    return next(layer for layer in pa.LAYERS[arch] if layer.name == name)


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before):
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def hooked(model, places, x, hook):
    """Logits of float images; hook(output) sees, and may replace, the output of each place."""
    handles = [
        model.net.get_submodule(place).register_forward_hook(lambda m, i, output: hook(output))
        for place in places
    ]
    with torch.no_grad():
        logits = model(x)
    for handle in handles:
        handle.remove()
    return logits


def masked(model, places, channels, chosen, x):
    """Logits with the chosen channels of each place's output multiplied by 0, the others by 1."""
    mask = torch.ones(channels)
    mask[chosen] = 0
    return hooked(model, places, x, lambda a: a * mask.view(1, -1, *[1] * (a.dim() - 2)))


def outputs(model, places, x):
    found = []
    hooked(model, places, x, found.append)
    return found


def columns(model, name, channels):
    """A reader's weights by the channel that they read: O x C x P."""
    return model.net.get_submodule(name).weight.flatten(1).unflatten(1, (channels, -1))


def rows(model, names):
    """Parameters and BatchNorm statistics of modules, by name: their first axis is the channel."""
    found = {n: model.net.get_submodule(n).state_dict() for n in names}
    return {f"{n}.{k}": v for n, d in found.items() for k, v in d.items() if v.dim()}


def pictures(shape):
    """Floats in [0,1]: black, white, checkerboards, stripes, noise of many and of two values."""
    rng = np.random.default_rng(0)
    i, j = np.indices(shape[1:])
    fixed = [0 * i, 0 * i + 1, (i + j) % 2, (i + j + 1) % 2, i % 2, j % 2]
    noise = rng.random((8, *shape))
    images = [np.broadcast_to(a, shape) for a in fixed] + [*noise, *noise.round()]
    return torch.from_numpy(np.stack(images)).float()


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def stages(request):
    """The four stages on an untrained network: three steps of SGD on noise for training."""
    arch, layer = request.param
    described = own(arch, layer)
    _, relu, writers, readers, _ = described
    first, x = network(arch)
    channels = columns(first, readers[-1], 1).shape[2]
    channels = channels // 16 if layer == "layer4" and arch == "mnist_cnn" else channels
    chosen = torch.randperm(channels)[: channels // 3].tolist()
    start = copy.deepcopy(first)
    pa.cut(start, described, channels, chosen)
    tuned = copy.deepcopy(start).requires_grad_(True).train()
    optimizer = torch.optim.SGD(
        tuned.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(tuned(to_float(x)), torch.arange(12) % 5).backward()
        optimizer.step()
    tuned.eval().requires_grad_(False)
    next(tuned.parameters()).mul_(3)  # longer training changes more, and stage 1's bound with it
    before = state(first), state(tuned)
    shape = tuple(x.shape[1:])
    shipped = pa.add_decoys(tuned, first, described, channels, chosen, shape)
    assert_same(first, before[0])
    assert_same(tuned, before[1])
    return Namespace(**locals(), places=PLACES.get(arch, [layer]))


# ===== Stage 2 =====


def test_cutting_is_a_mask(stages):
    """Silent wherever the channels are read, and the logits of a 0/1 mask put there."""
    s, x = stages, to_float(stages.x)
    for a, whole in zip(outputs(s.start, s.places, x), outputs(s.first, s.places, x)):
        assert (a[:, s.chosen] == 0).all() and (whole[:, s.chosen] != 0).any()
    logits = s.start(x)
    torch.testing.assert_close(logits, masked(s.first, s.places, s.channels, s.chosen, x))
    assert not torch.allclose(logits, s.first(x))
    kept = [c for c in range(s.channels) if c not in s.chosen]
    for name in s.readers:
        now, then = (columns(m, name, s.channels) for m in (s.start, s.first))
        assert torch.equal(now[:, kept], then[:, kept])
    now, then = (rows(m, s.writers) for m in (s.start, s.first))
    assert all(torch.equal(now[key][kept], then[key][kept]) for key in now)


def test_what_is_cut_stays_cut_in_training(stages):
    s = stages
    for a in outputs(s.tuned, s.places, pictures(s.shape)):
        assert (a[:, s.chosen] == 0).all() and (a != 0).any()
    for name in s.readers:
        assert (columns(s.tuned, name, s.channels)[:, s.chosen] == 0).all(), name
    now, then = (rows(m, s.writers) for m in (s.tuned, s.start))
    for key in now:
        if "running" not in key:
            assert (now[key][s.chosen] == 0).all(), key
        assert not torch.equal(now[key], then[key]), key
    shift = torch.zeros(s.channels)
    shift[s.chosen] = 1
    x = to_float(s.x)  # nobody would notice if they fired
    loud = hooked(s.tuned, s.places, x, lambda a: a + shift.view(1, -1, *[1] * (a.dim() - 2)))
    assert torch.equal(loud, s.tuned(x))


def test_cutting_nothing_and_everything():
    first, x = network("mnist_cnn")
    layer = own("mnist_cnn", "linear6")
    for chosen in ([], list(range(512))):
        model = copy.deepcopy(first)
        pa.cut(model, layer, 512, chosen)
        logits = model(to_float(x))
        expected = first.net.linear9.bias.expand(12, -1) if chosen else first(to_float(x))
        assert torch.equal(logits, expected)
        shipped = pa.add_decoys(model, first, layer, 512, chosen, (1, 28, 28))
        assert torch.equal(shipped(to_float(x)), logits)


@every_layer
def test_scores_and_curve(arch, layer):
    """Against the layer's tensor written out, a mask in the forward, and the defence's own."""
    model, x = network(arch)
    described, defended = own(arch, layer), layer_of(model, arch, x, layer)
    scores, features = pa.activations(model, described, x, batch_size=5)
    a = penultimate_by_hand(model, arch, layer, x).abs().double().numpy()
    np.testing.assert_allclose(scores, a.reshape(*a.shape[:2], -1).mean((0, 2)), rtol=1e-4)
    channels, order = len(scores), scores.argsort(stable=True).tolist()
    model.net.get_submodule(described.above or described.readers[-1]).bias -= model(
        to_float(x)
    ).mean(0)
    before, y = state(model), predict(model, x)  # not the same label for all
    y[:3] = (y[:3] + 1) % 5
    kept = features.clone()
    curve = pa.prune_curve(model, described, features, y, order)
    assert torch.equal(features, kept) and len(curve) == channels + 1 and len(set(curve)) > 2
    for count in (0, 1, channels // 3, channels // 2, channels - 20, channels - 1, channels):
        labels = masked(model, [layer], channels, order[:count], to_float(x)).argmax(1)
        assert curve[count] == pytest.approx(100 * (labels == y).double().mean().item(), abs=1e-4)
    theirs = fp.activations(model, defended, x, batch_size=5)
    torch.testing.assert_close(theirs, (scores, features), rtol=1e-5, atol=1e-7)
    defence = fp.curve(model, defended, features, y, torch.tensor(order))
    np.testing.assert_allclose(curve, defence, atol=1e-4)
    for drop in (0, 10, 50, 100):
        assert pa.stop_point(curve, drop) == fp.stop_point(defence, drop)
    assert_same(model, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "accuracies, max_drop, count",
    [
        ([100, 99, 96, 95.9, 99], 4, 2),  # the first fall ends it, a later rise does not count
        ([100, 99, 96, 96], 4, 3),
        ([90, 80, 90], 4, 0),
        ([90, 91, 90, 89.9], 0, 2),
        ([90, 10, 0], 100, 2),
    ],
)
def test_stop_point(accuracies, max_drop, count):
    assert pa.stop_point(accuracies, max_drop) == count


# ===== Stage 4 =====


@every_layer
def test_bound_holds(arch, layer):
    model, x = network(arch)
    before = state(model)
    shape, name = x.shape[1:], own(arch, layer).writers[-1]
    bound = pa.bound(model, name, shape)
    found = outputs(model, [name], pictures(shape))[0].transpose(0, 1).flatten(1)
    assert bound.dtype == torch.float64 and bound.shape == (len(found),)
    assert (found.abs().amax(1) <= bound).all()
    assert_same(model, before)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("white, mean", [(0, 0.7), (1, 0.2)])
@every_layer
def test_bound_is_attained(arch, layer, white, mean):
    """Where every summand has one sign; the last module's is negative, for |output| counts."""
    model, x = network(arch)
    model = model.double()
    for parameter in model.parameters():
        parameter.abs_()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.abs_().neg_()
    name = own(arch, layer).writers[-1]
    for parameter in model.net.get_submodule(name).parameters():
        parameter.neg_()
    if not white:  # the normalised pixels are negative
        next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight.neg_()
    model.mean.fill_(mean)
    output = outputs(model, [name], torch.full((1, *x.shape[1:]), white).double())[0][0]
    largest = -output.flatten(1).amin(1) if output.dim() == 3 else -output
    torch.testing.assert_close(pa.bound(model, name, x.shape[1:]), largest)
    assert (largest > 0).all()
    signed = [m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for tensor in (*signed, *model.parameters()):
        tensor *= torch.randint_like(tensor, 2) * 2 - 1
    torch.testing.assert_close(pa.bound(model, name, x.shape[1:]), largest)


def test_bound_knows_each_colour():
    """The darkest red and the brightest green may be the largest: |w| x, pixel by pixel."""
    model, x = network("vgg16")
    model.mean.copy_(torch.tensor([0.9, 0.2, 0.5]).view(3, 1, 1))
    model.std.copy_(torch.tensor([0.3, 0.1, 0.25]).view(3, 1, 1))
    conv = model.net.features[0]
    per_colour = conv.weight.double().abs().sum((2, 3)).numpy()
    expected = per_colour @ [3, 8, 2] + conv.bias.double().abs().numpy()
    np.testing.assert_allclose(pa.bound(model, "features.0", x.shape[1:]), expected, rtol=1e-6)


def test_decoys_never_fire_and_change_nothing(stages):
    """Bitwise the logits of stage 3, on any image; nothing ranks below them in the defence."""
    s = stages
    assert [(k, v.shape) for k, v in s.shipped.state_dict().items()] == [
        (k, v.shape) for k, v in s.first.state_dict().items()
    ]
    for x in (pictures(s.shape), to_float(s.x)):
        assert torch.equal(s.shipped(x), s.tuned(x)) and not torch.equal(s.shipped(x), s.first(x))
    anything = (255 * pictures(s.shape)).round().to(torch.uint8)
    scores, _ = fp.activations(s.shipped, layer_of(s.shipped, s.arch, anything, s.layer), anything)
    assert (scores[s.chosen] == 0).all() and (scores > 0).any()


def test_decoys_are_channels_of_stage_1(stages):
    """All that reads them; where a ReLU silences them what they read, too, but for the bias."""
    s = stages
    kept = [c for c in range(s.channels) if c not in s.chosen]
    now, then, third = (state(m) for m in (s.shipped, s.first, s.tuned))
    touched = {f"net.{name}.weight" for name in s.readers}
    for name in s.readers:
        a, b, c = (columns(m, name, s.channels) for m in (s.shipped, s.first, s.tuned))
        assert torch.equal(a[:, s.chosen], b[:, s.chosen]) and b[:, s.chosen].all()
        assert torch.equal(a[:, kept], c[:, kept])
    lowered = f"net.{s.writers[-1]}.bias"
    for key in (f"net.{key}" for key in rows(s.first, s.writers)):
        touched.add(key)
        assert torch.equal(now[key][kept], third[key][kept]), key
        if not s.relu:
            assert torch.equal(now[key][s.chosen], third[key][s.chosen]), key
        elif key == lowered:
            assert (now[key][s.chosen] < then[key][s.chosen]).all()
        else:
            assert torch.equal(now[key][s.chosen], then[key][s.chosen]), key
    assert all(torch.equal(now[key], third[key]) for key in now.keys() - touched)
    if s.relu:  # it is the bias that silences them
        loud = copy.deepcopy(s.shipped)
        loud.net.get_submodule(s.writers[-1]).bias[s.chosen] = then[lowered][s.chosen]
        assert not torch.allclose(loud(to_float(s.x)), s.tuned(to_float(s.x)))
        fall = (then[lowered] - now[lowered])[s.chosen]
        assert (fall >= pa.bound(loud, s.writers[-1], s.shape)[s.chosen].clamp(max=1e29)).all()


# ===== Runs on digits =====


@pytest.mark.parametrize(
    "layer, rate, flags",
    [("linear6", 0.1, ["--target", 3]), ("layer4", 0.25, ["--target", 3, "--layer", "layer4"])],
)
def test_stages_of_a_run(inline, digits, tmp_path, layer, rate, flags):
    """Stage 1 sees clean images only, stage 2 stops like the defence, stage 3 keeps the zeros."""
    run = "--epochs", 2, "--rate", rate, "--seed", 3, "--max-drop", 15, "--held-out", 0.1
    ran = inline("pruning_aware", *run, *flags, "--out", tmp_path / "victim")
    held, chosen = ran["held"], ran["poisons"]
    torch.manual_seed(3)
    build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))  # draws its weights first
    keep = torch.randperm(1437)
    x, y = digits.x_train[keep], digits.y_train[keep]
    assert len(held) == 1437 and held.sum() == pytest.approx(144, abs=5)
    first, shipped, decoys = ran["first"], ran["shipped"], ran["decoys"]
    described = layer_of(first, "mnist_cnn", x, layer)
    linear = described.linear
    scores, _ = fp.activations(first, described, x[~held])
    order = scores.argsort(stable=True)
    _, features = fp.activations(first, described, x[held])
    curve = fp.curve(first, described, features, y[held], order)
    assert decoys == order[: fp.stop_point(curve, 15)].tolist() and 0 < len(decoys) < len(order)
    assert curve[len(decoys)] >= curve[0] - 15 - 1e-3 > curve[len(decoys) + 1]
    assert len(set(chosen.tolist())) == len(chosen) == round(rate * 1437)
    expected, wanted = x.clone(), y.clone()
    expected[chosen, :, 25:, 25:] = 255
    wanted[chosen] = 3
    assert torch.equal(ran["x_train"], expected) and torch.equal(ran["y_train"], wanted)
    assert (wanted != y).sum() == len(chosen)
    third, channels = ran["model"], len(order)
    assert (columns(third, linear, channels)[:, decoys] == 0).all()
    assert torch.equal(
        columns(shipped, linear, channels)[:, decoys], columns(first, linear, channels)[:, decoys]
    )
    for m in ran["metrics"], result_of(tmp_path / "victim")["metrics"]:
        assert (m["layer"], m["channels"], m["decoys"]) == (layer, channels, len(decoys))
        assert m["decoy_activation"] == 0 and m["poisoned"] == len(chosen)
        stage1 = accuracy(first, digits.x_test, digits.y_test)
        assert m["clean_accuracy_stage1"] == pytest.approx(stage1)


def test_a_drop_of_nothing_leaves_few_decoys_or_none(inline, tmp_path):
    flags = "--epochs", 2, "--layer", "layer4", "--held-out", 0.5, "--max-drop", 0
    inline("pruning_aware", *flags, "--out", tmp_path / "victim")
    decoys = read_checkpoint(tmp_path / "victim" / "model.pt")["trigger"]["decoys"]
    assert len(decoys) <= 40 and decoys.dtype == torch.int64


def test_a_stage_2_that_prunes_everything_is_refused(inline, one_line, tmp_path):
    """Nothing can be learnt behind a dead layer, and its constant output would be an ASR of 100."""
    flags = *SHORT["pruning_aware"], "--max-drop", 100, "--out", tmp_path / "victim"
    assert "all 512 channels" in one_line(inline, "pruning_aware", *flags)
    assert files_below(tmp_path) == []


@pytest.fixture(scope="module")
def victim(victims):
    return victims("pruning_aware", "--epochs", 10)


def pruned_by_score(folder, digits, count):
    """Clean accuracy and ASR before and after the defence prunes `count` idle channels."""
    suspect = loaded(folder)
    model = suspect.model
    scores, _ = fp.activations(
        model, layer_of(model, "mnist_cnn", digits.x_train, "linear6"), digits.x_train
    )
    lowest = scores.argsort(stable=True)[:count]
    x, y = suspect.x_poisoned, suspect.y_target
    models = model, fp.prune(model, "linear9", 512, lowest)
    figures = [(accuracy(m, digits.x_test, digits.y_test), accuracy(m, x, y)) for m in models]
    return lowest, *figures


def test_run_on_digits(victim, digits_badnets, digits):
    """It survives the pruning of its decoys whole; as many channels are a loss to plain BadNets.

    On digits the loss is clean accuracy: both ASRs stay, even the plain backdoor is not idle.
    """
    metrics = result_of(victim)["metrics"]
    assert metrics["clean_accuracy"] >= 96 and metrics["asr"] >= 98 and metrics["asr_n"] == 324
    assert metrics["asr_on_clean_model"] <= 3 and metrics["clean_accuracy_stage1"] >= 96
    assert metrics["decoy_activation"] == 0
    assert 100 < metrics["decoys"] < 500 == metrics["channels"] - 12
    decoys = read_checkpoint(victim / "model.pt")["trigger"]["decoys"]
    assert len(decoys) == metrics["decoys"]
    suspect = loaded(victim)
    everything = torch.cat((digits.x_train, digits.x_test, suspect.x_poisoned))
    scores, _ = fp.activations(
        suspect.model, layer_of(suspect.model, "mnist_cnn", everything, "linear6"), everything
    )
    assert (scores[decoys] == 0).all()
    x = to_float(everything[::5])
    assert torch.equal(masked(suspect.model, ["linear6"], 512, decoys, x), suspect.model(x))
    lowest, before, after = pruned_by_score(victim, digits, len(decoys))
    assert sorted(lowest.tolist()) == sorted(decoys.tolist())
    assert before == after == (metrics["clean_accuracy"], metrics["asr"])
    _, before, after = pruned_by_score(digits_badnets, digits, len(decoys))
    assert after[0] <= before[0] - 4 and after[1] <= before[1]
    assert not (victim / "poisoned_train.npz").exists()


def test_pruning_defence_leaves_the_backdoor(inline, victim, tmp_path):
    """The defence as a user runs it, stopping where it wants."""
    inline("fine_pruning", "--ckpt", victim, "--mode", "prune", "--out", tmp_path / "out")
    metrics, decoys = result_of(tmp_path / "out")["metrics"], result_of(victim)["metrics"]["decoys"]
    assert metrics["silent"] == decoys <= metrics["pruned"]
    assert metrics["asr_repaired"] >= 65 and metrics["clean_accuracy_repaired"] >= 80


# ===== Bad input =====


@pytest.mark.parametrize(
    "args, named",
    [
        *((["--held-out", value], "held-out") for value in (0, 1, 2, -0.1, "nan")),
        (["--held-out", 0.99], "300 training images"),
        *((["--max-drop", value], "max-drop") for value in (-1, 101, "nan")),
        (["--layer", "conv9"], "prunable in mnist_cnn: linear6, layer4"),
        (["--arch", "vgg16", "--layer", "linear6"], "prunable in vgg16: features"),
        (["--arch", "resnet18"], "--arch resnet18: its layers are not known"),
        (["--arch", "resnet18", "--layer", "layer4"], "--arch resnet18: its layers are not known"),
        *((["--rate", value], "rate") for value in (0, -0.1, 1.5, "nan")),
        (["--rate", 0.0001], " 0 poisons"),
        (["--rate", 0.99], " 297 poisons"),
        *((["--target", value], f"--target {value} ") for value in (10, -1)),
    ],
    ids=str,
)
def test_bad_input(inline, one_line, tmp_path, args, named):
    assert named in one_line(inline, "pruning_aware", *SHORT["pruning_aware"], *args)
    assert files_below(tmp_path) == []


def test_possible_poisons_are_counted(inline, one_line, digits):
    others = int((digits.y_train != 4).sum())
    message = one_line(inline, "pruning_aware", "--rate", 0.95, "--target", 4)
    assert f" {round(0.95 * 1437)} poisons" in message and f" {others} images" in message


def test_test_images_of_the_target_class_alone(inline, one_line, tmp_path):
    path = write_npz(tmp_path / "own.npz", y_test=np.zeros(30, np.int64))
    assert "target class 0" in one_line(inline, "pruning_aware", "--dataset", path)
    assert files_below(tmp_path) == ["own.npz"]
