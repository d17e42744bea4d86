"""Fine-Pruning against planted channels and explicit masks, and runs on digits."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import files_below, loaded, reread, result_of, run_here, tuned_by_hand
from torch import nn

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy
from common.models import ARCHITECTURES, Classifier, build_model
from methods import fine_pruning as fp

CPU = torch.device("cpu")
SIDES = dict.fromkeys(("densenet121", "preact_resnet18", "resnet18", "resnet34"), 16)
SIDES["wide_resnet34"] = 8  # smaller images will do for large networks
ENDS = {"densenet121": "classifier", "vgg16": "classifier", "vgg19": "classifier"}
CASES = [(arch, layer.name) for arch, layers in fp.LAYERS.items() for layer in layers]
CASES += [(arch, ENDS.get(arch, "linear")) for arch in ARCHITECTURES if arch not in fp.LAYERS]


def layer_of(model, arch, x, name):
    """fine_pruning's Layer of this name; of a network without entry in LAYERS the only one."""
    layers = fp.layers_of(model, arch, x)
    return layers[name] if arch in fp.LAYERS else next(iter(layers.values()))


def random_model(arch):
    """A network with arbitrary weights and BatchNorm statistics, and twelve images for it."""
    torch.manual_seed(0)
    side = SIDES.get(arch, 32)
    shape = (1, 28, 28) if "mnist" in arch else (3, side, side)
    model = build_model(arch, 5, shape, (0.5,) * shape[0], (0.5,) * shape[0])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    x = torch.randint(0, 256, (12, *shape)).to(torch.uint8)
    return model.eval().requires_grad_(False), x


def penultimate_by_hand(model, arch, layer, x):
    """The pruned tensor, written out from each network's forward: N x C [x H x W]."""
    net = model.net
    x = (x / 255 - model.mean) / model.std
    if arch == "mnist_cnn":
        a = net.layer4(net.layer3(F.relu(net.conv1(x))))
        return a if layer == "layer4" else F.relu(net.linear6(a.flatten(1)))
    if arch == "mnist_conv5":
        a = F.relu(net.conv5(F.max_pool2d(F.relu(net.conv1(x)), 2)))
        return a if layer == "conv5" else F.relu(net.linear6(F.max_pool2d(a, 2).flatten(1)))
    if arch == "preact_resnet18":
        return net.layer4(net.layer3(net.layer2(net.layer1(net.conv1(x)))))
    if arch in ("resnet18", "resnet34"):
        return net.layer4(net.layer3(net.layer2(net.layer1(F.relu(net.bn1(net.conv1(x)))))))
    if arch == "wide_resnet34":
        return F.relu(net.bn1(net.layer3(net.layer2(net.layer1(net.conv1(x))))))
    if arch == "wrn16_1":
        return F.relu(net.bn1(net.block3(net.block2(net.block1(net.conv1(x))))))
    if arch == "airbench":
        return net.group3(net.group2(net.group1(F.gelu(net.whiten(x)))))
    if arch == "nc_gtsrb_cnn":
        a = net.features(x)
        return a if layer == "features" else F.relu(net.linear1(a.flatten(1)))
    if arch == "densenet121":
        return F.relu(net.features(x))
    if arch in ("vgg16", "vgg19"):
        return net.features(x)
    return F.relu(net.bn2(net.conv2(net.layers(F.relu(net.bn1(net.conv1(x)))))))


def masked_forward(model, layer, mask, x):
    """Logits with the channels of the layer's output, or the last one's inputs, times a mask."""

    def masked(a):
        return a * mask.view(1, -1, *[1] * (a.dim() - 2))

    named = model.net.get_submodule(layer)
    if layer in ("linear", "classifier"):
        hook = named.register_forward_pre_hook(lambda module, inputs: masked(inputs[0]))
    else:
        hook = named.register_forward_hook(lambda module, inputs, output: masked(output))
    logits = model(x / 255)
    hook.remove()
    return logits


class Own(nn.Module):
    """Someone's network: two linear layers over six pixels; `kind` says what is odd."""

    def __init__(self, kind):
        super().__init__()
        self.below, self.last = nn.Linear(6, 6), {"cosine": Cosine}.get(kind, nn.Linear)(6, 6)
        self.kind = kind
        if kind == "tied":
            self.last.weight = self.below.weight

    def forward(self, x):
        h = self.below(x.flatten(1)).relu()
        return (self.last(2 * h), self.last(h)) if self.kind == "twice" else self.last(h)


class Cosine(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


def owned(kind):
    """A user's network that reads 1 x 2 x 3 pixels, and 9 images."""
    torch.manual_seed(0)
    model = Classifier(Own(kind), (0.0,), (1.0,)).eval().requires_grad_(False)
    return model, torch.randint(0, 256, (9, 1, 2, 3)).to(torch.uint8)


@pytest.mark.parametrize("kind", ["plain", "twice"])
def test_inputs_of_the_last_linear_layer_of_any_network(kind):
    """Of several outputs, and so of several runs of the layer, the last one counts."""
    model, x = owned(kind)
    layer = fp.layers_of(model, "own.py:Own", x)["last"]
    scores, features = fp.activations(model, layer, x, batch_size=4)
    hidden = F.relu(model.net.below((x / 255).flatten(1)))
    torch.testing.assert_close(features, hidden)
    torch.testing.assert_close(scores, hidden.mean(0))
    order, y = torch.arange(6), model(x / 255).argmax(1)
    assert fp.curve(model, layer, features, y, order)[0] == 100
    pruned = fp.prune(model, "last", 6, order[:2])
    mask = torch.tensor([0, 0, 1, 1, 1, 1])
    torch.testing.assert_close(pruned(x / 255), model.net.last(hidden * mask))


@pytest.mark.parametrize("kind, named", [("cosine", "more than a linear"), ("tied", "shares its")])
def test_a_last_layer_that_cannot_be_pruned_by_its_weight(one_line, kind, named):
    model, x = owned(kind)
    assert named in one_line(fp.layers_of, model, "own.py:Own", x)


@pytest.mark.parametrize("arch, layer", CASES)
def test_scores_and_features(arch, layer):
    """Mean |a| over images and positions: a mean over the pooled values would cancel signs."""
    model, x = random_model(arch)
    described = fp.layers_of(model, arch, x)[layer]
    scores, features = fp.activations(model, described, x, batch_size=5)
    a = penultimate_by_hand(model, arch, layer, x)
    axes = (0, 2, 3) if a.dim() == 4 else (0,)
    torch.testing.assert_close(scores, a.abs().mean(axes), rtol=1e-4, atol=1e-6)
    if layer == "conv5":
        expected = F.max_pool2d(a, 2).flatten(1)
    elif arch in ("mnist_cnn", "nc_gtsrb_cnn") or a.dim() == 2:
        expected = a.flatten(1)
    elif arch == "airbench":
        expected = a.amax((2, 3)) / 9
    else:
        expected = a.mean((2, 3))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    signed = (layer == "layer4" and arch in ("mnist_cnn", "preact_resnet18")) or arch == "airbench"
    assert (a < 0).any().item() == signed


@pytest.mark.parametrize("arch, layer", CASES)
def test_curve_equals_pruned_copies_equals_masks(arch, layer):
    """Three ways to the same logits: cached features, zeroed weights, a mask in the forward."""
    model, x = random_model(arch)
    x = x[:6]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _, _, linear, above = described = fp.layers_of(model, arch, x)[layer]
    scores, features = fp.activations(model, described, x)
    order, channels = scores.argsort(stable=True), len(scores)
    entered = getattr(model.net, linear)
    rows = fp.curve_logits(features, entered.weight, entered.bias, order)
    assert rows.shape == (6, channels + 1, entered.out_features)
    whole = model(x / 255)
    y = whole.argmax(1).roll(1)
    curve = fp.curve(model, described, features, y, order)
    for count in (0, 1, channels // 3, channels - 1, channels):
        pruned = fp.prune(model, linear, channels, order[:count])
        mask = torch.ones(channels)
        mask[order[:count]] = 0
        logits = pruned(x / 255)
        torch.testing.assert_close(logits, masked_forward(model, layer, mask, x))
        row = rows[:, count]
        if above:
            row = getattr(model.net, above)(F.relu(row))
        torch.testing.assert_close(row, logits, rtol=1e-4, atol=1e-4)
        hits = 100 * (logits.argmax(1) == y).double().mean().item()
        assert curve[count] == pytest.approx(hits, abs=1e-4)
        assert count or torch.equal(logits, whole)
    assert (logits == logits[0]).all()  # nothing is left of the image
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_pruning_is_removing_the_channel():
    """mnist_cnn's last convolution without its pruned filters, rebuilt with 64 - 20 of them."""
    model, x = random_model("mnist_cnn")
    pruned = torch.randperm(64)[:20]
    kept = torch.tensor([c for c in range(64) if c not in pruned.tolist()])
    logits = fp.prune(model, "linear6", 64, pruned)(x / 255)
    net = model.net
    conv, weight = net.layer4.conv1.weight[kept], net.linear6.weight.view(512, 64, 16)[:, kept]
    a = net.layer3(F.relu(net.conv1((x / 255 - 0.5) / 0.5)))
    a = F.conv2d(F.relu(net.layer4.bn1(a)), conv, stride=2, padding=1)
    a = F.relu(F.linear(a.flatten(1), weight.flatten(1), net.linear6.bias))
    torch.testing.assert_close(logits, net.linear9(a), rtol=1e-4, atol=1e-4)


class Planted(nn.Module):
    """Channel j is pixel j; the linear layer is given."""

    def __init__(self, weight):
        super().__init__()
        self.net = nn.Module()
        self.net.pick = nn.Flatten()
        self.net.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.net.linear.weight.data, self.net.linear.bias.data = weight, torch.zeros(len(weight))

    def forward(self, x):
        return self.net.linear(self.net.pick(x))


def test_planted_channels():
    """Channel 4 is the trigger, silent on clean data; 3 is idle; 0, 1, 2 tell the classes."""
    weight = torch.zeros(3, 6)
    weight[0, 0] = weight[1, 1] = weight[2, 2] = 1
    weight[0, 4] = 9
    model = Planted(weight)
    y = torch.arange(30) % 3
    x = torch.zeros(30, 1, 1, 6, dtype=torch.uint8)
    x[:, 0, 0, 3] = 5
    x[:, 0, 0, 5] = 2
    for label, brightness in enumerate((100, 150, 200)):
        x[y == label, 0, 0, label] = brightness
    triggered = x[y != 0].clone()
    triggered[..., 4] = 255
    layer = fp.Layer("pick", False, "linear")
    scores, features = fp.activations(model, layer, x, batch_size=7)
    means = x.view(30, 6).double().mean(0).numpy() / 255
    np.testing.assert_allclose(scores, means, rtol=1e-5)
    order = scores.argsort(stable=True)
    assert order.tolist() == np.argsort(means).tolist() == [4, 5, 3, 0, 1, 2]
    _, attacked = fp.activations(model, layer, triggered)
    target = torch.zeros(20, dtype=torch.int64)
    asr = fp.curve(model, layer, attacked, target, order)
    assert asr[:4].tolist() == [100, 0, 0, 0]  # it goes exactly with its channel
    clean = fp.curve(model, layer, features, y, order)
    # class 0 is the first of equal logits, so it outlives its own channel
    np.testing.assert_allclose(clean, [100, 100, 100, 100, 100, 200 / 3, 100 / 3])
    assert fp.stop_point(clean, 4) == 4 and fp.stop_point(clean, 40) == 5
    repaired = fp.prune(model, "linear", 6, order[:4])
    assert accuracy(repaired, triggered, target) == 0 and accuracy(repaired, x, y) == 100


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
    assert fp.stop_point(np.array(accuracies, dtype=float), max_drop) == count


def tuned(
    model, linear, channels, pruned, x, y, epochs=3, lr=0.05, batch_size=40, pad=2, flip=False
):
    torch.manual_seed(5)
    layer = {"linear": linear, "channels": channels, "pruned": pruned}
    rates = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    return fp.finetune(model, x, y, **layer, pad=pad, flip=flip, **rates)


@pytest.mark.parametrize("layer", fp.LAYERS["mnist_cnn"], ids=lambda layer: layer.name)
def test_fine_tuning_keeps_the_mask(digits, layer):
    """The same weights as fine-tuning with the mask in every forward pass."""
    model, _ = random_model("mnist_cnn")
    x, y = digits.x_train[:200], digits.y_train[:200] % 5
    linear = layer.linear
    scores, _ = fp.activations(model, layer, x)
    channels, pruned = len(scores), scores.argsort()[: len(scores) // 2]
    start = fp.prune(model, linear, channels, pruned)
    before = {k: v.clone() for k, v in start.state_dict().items()}
    after = tuned(start, linear, channels, pruned, x, y)
    weights = getattr(after.net, linear).weight.unflatten(1, (channels, -1))
    assert (weights[:, pruned] == 0).all() and (weights != 0).any()
    assert not after.training and not any(p.requires_grad for p in after.parameters())
    for key, value in start.state_dict().items():
        assert torch.equal(value, before[key]), key  # the model that was handed in stays
    mask = torch.ones(channels)
    mask[pruned] = 0
    per_value = mask.repeat_interleave(weights.shape[2])
    handle = getattr(model.net, linear).register_forward_pre_hook(
        lambda module, inputs: inputs[0] * per_value
    )
    reference = tuned(model, linear, channels, pruned[:0], x, y).state_dict()
    handle.remove()
    for key, value in after.state_dict().items():
        if key == f"net.{linear}.weight":
            value, reference[key] = (v * per_value for v in (value, reference[key]))
        torch.testing.assert_close(value, reference[key], rtol=1e-3, atol=1e-5, msg=key)
    assert not torch.equal(after.net.conv1.weight, start.net.conv1.weight)


def test_two_steps_of_fine_tuning_written_out(digits):
    """v = .9 v + g + .0005 w; w -= lr v; the rate falls by a cosine: all of it, then half."""
    model, _ = random_model("mnist_cnn")
    x, y = digits.x_train[:40], digits.y_train[:40] % 5
    none = torch.zeros(0, dtype=torch.int64)
    after = tuned(model, "linear9", 512, none, x, y, epochs=1, batch_size=20, pad=0)
    for got, wanted in zip(after.parameters(), tuned_by_hand(model, x, y)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_fine_tuning_that_diverges_gives_no_model(digits):
    model, _ = random_model("mnist_cnn")
    x, y = digits.x_train[:100], digits.y_train[:100] % 5
    none = torch.zeros(0, dtype=torch.int64)
    assert tuned(model, "linear9", 512, none, x, y, lr=1e30) is None


# ===== Whole runs on digits =====


def load(folder):
    return load_model(read_checkpoint(folder / "model.pt"), folder, CPU)


@pytest.mark.parametrize("layer, channels, least", [("linear6", 512, 100), ("layer4", 64, 16)])
def test_pruning_run(inline, digits, digits_badnets, tmp_path, layer, channels, least):
    """The saved file is the masked model, and its figures are the ones reported."""
    before = files_below(digits_badnets)
    flags = "--mode", "prune", "--layer", layer, "--out", tmp_path / "out"
    ran = inline("fine_pruning", "--ckpt", digits_badnets, *flags)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert (metrics["channels"], metrics["layer"], metrics["mode"]) == (channels, layer, "prune")
    assert result_of(tmp_path / "out")["arguments"]["epochs"] == 100 == ran["recipe"]["epochs"]
    count = metrics["pruned"]
    assert least <= count < channels
    assert metrics["held_out_accuracy_pruned"] >= metrics["held_out_accuracy"] - 4
    saved, original = load(tmp_path / "out"), load(digits_badnets)
    with np.load(tmp_path / "out" / "curve.npz") as archive:
        curves = {key: archive[key] for key in archive}
    order = torch.from_numpy(curves["order"])
    assert sorted(order.tolist()) == list(range(channels))
    assert (np.diff(curves["scores"][order]) >= 0).all()
    mask = torch.ones(channels)
    mask[order[:count]] = 0
    x = digits.x_test[:50]
    torch.testing.assert_close(saved(to_float(x)), masked_forward(original, layer, mask, x))
    assert not torch.allclose(saved(to_float(x)), original(to_float(x)))
    assert metrics["clean_accuracy_repaired"] == pytest.approx(
        accuracy(saved, digits.x_test, digits.y_test)
    )
    victim = loaded(digits_badnets)
    for name, x, y in (
        ("clean_accuracy", digits.x_test, digits.y_test),
        ("ASR", victim.x_poisoned, victim.y_target),
    ):
        assert len(curves[name]) == channels + 1
        assert curves[name][count] == pytest.approx(metrics[f"{name.lower()}_repaired"], abs=1e-3)
        assert curves[name][0] == pytest.approx(metrics[name.lower()], abs=1e-3)
        for k in (7, channels // 2, channels - 2):
            pruned = fp.prune(original, ran["layer"].linear, channels, order[:k])
            assert curves[name][k] == pytest.approx(accuracy(pruned, x, y), abs=1e-3)
    assert files_below(tmp_path / "out") == ["curve.npz", "curve.png", "model.pt", "result.json"]
    assert files_below(digits_badnets) == before
    held = {i for i in range(len(ran["split"])) if ran["held"][i]}
    assert len(held) == 60 == metrics["held_out"] and len(ran["x_clean"]) == len(ran["held"])
    assert len(ran["y_held"].unique()) == 10
    ranked = fp.activations(original, ran["layer"], ran["x_clean"][~ran["held"]])
    torch.testing.assert_close(torch.from_numpy(curves["scores"]), ranked[0])


def test_silent_channels_go_first_in_the_order_of_their_number(inline, digits_badnets, tmp_path):
    checkpoint = read_checkpoint(digits_badnets / "model.pt")
    checkpoint["state_dict"]["net.linear6.bias"][[400, 7, 100]] = -1000
    torch.save(checkpoint, tmp_path / "model.pt")
    ran = inline("fine_pruning", "--ckpt", tmp_path, "--mode", "prune")
    assert ran["order"][:3].tolist() == [7, 100, 400] and ran["metrics"]["silent"] == 3
    assert ran["accuracies"][3] == ran["accuracies"][0]


@pytest.mark.drawn
def test_fine_pruning_removes_badnets_at_a_high_rate(digits, digits_badnets, tmp_path):
    """Through the command line; a rate of .01 leaves this backdoor alone."""
    out = tmp_path / "out"
    flags = "--lr", 0.05, "--epochs", 40, "--batch-size", 32, "--out", out
    printed = run_here("fine_pruning", "--ckpt", digits_badnets, *flags, cwd=tmp_path)
    metrics = result_of(out)["metrics"]
    assert metrics["asr"] >= 98 and metrics["asr_repaired"] <= 15
    assert metrics["clean_accuracy_repaired"] >= 94 and metrics["robust_accuracy_repaired"] >= 75
    assert metrics["clean_accuracy_pruned"] < metrics["clean_accuracy_repaired"]
    assert metrics["pruned"] > 100 and metrics["asr_pruned"] > 90  # pruning alone does not do it
    reread(out, digits_badnets, digits)
    weight = read_checkpoint(out / "model.pt")["state_dict"]["net.linear9.weight"]
    assert (weight == 0).all(0).sum() == metrics["pruned"]  # the mask outlives fine-tuning
    assert "RESULT fine_pruning " in printed and " pruned, " in printed


def test_modes_are_the_parts_of_the_whole(inline, digits_badnets, tmp_path):
    """Each mode's repaired model is the column of the same name in a run that does both."""
    found = {}
    for mode in ("fine-prune", "prune", "finetune"):
        flags = "--mode", mode, "--epochs", 2, "--out", tmp_path / mode
        inline("fine_pruning", "--ckpt", digits_badnets, *flags)
        found[mode] = result_of(tmp_path / mode)["metrics"]
    for figure in ("clean_accuracy", "asr", "robust_accuracy"):
        both = found["fine-prune"]
        assert both[f"{figure}_pruned"] == found["prune"][f"{figure}_repaired"]
        assert both[f"{figure}_clean_only"] == found["finetune"][f"{figure}_repaired"]
        assert both[figure] == found["finetune"][figure]
    assert found["finetune"]["pruned"] == 0 and found["prune"]["pruned"] == both["pruned"]


def test_the_defender_needs_no_triggered_image(inline, digits_badnets, tmp_path, capfd):
    """Without poisoned_test.npz: bitwise the same repaired model, and no ASR."""
    blind = tmp_path / "blind"
    blind.mkdir()
    shutil.copy(digits_badnets / "model.pt", blind)
    flags = "--epochs", 2, "--out"
    inline("fine_pruning", "--ckpt", digits_badnets, *flags, tmp_path / "seen")
    inline("fine_pruning", "--ckpt", blind, *flags, tmp_path / "unseen")
    assert "the ASR cannot be measured" in capfd.readouterr().out
    seen, unseen = (load(tmp_path / name).state_dict() for name in ("seen", "unseen"))
    assert all(torch.equal(value, unseen[key]) for key, value in seen.items())
    metrics = result_of(tmp_path / "unseen")["metrics"]
    assert not any("asr" in key for key in metrics) and "clean_accuracy_repaired" in metrics


def test_cost_to_a_clean_model(inline, digits_clean, tmp_path):
    inline("fine_pruning", "--ckpt", digits_clean, "--epochs", 10, "--out", tmp_path / "out")
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["clean_accuracy"] >= 96
    assert metrics["clean_accuracy_repaired"] >= metrics["clean_accuracy"] - 4
    assert metrics["pruned"] > 0 and "asr" not in metrics


@pytest.mark.parametrize(
    "args, named",
    [
        (["--layer", "conv9"], "linear6, layer4"),
        (["--max-drop", -1], "max-drop"),
        (["--max-drop", 101], "max-drop"),
        (["--max-drop", "nan"], "max-drop"),
        (["--held-out", 0], "held-out"),
        (["--held-out", 1], "held-out"),
        (["--epochs", 0], "epochs"),
        (["--batch-size", -1], "batch-size"),
        (["--lr", 0], "lr"),
        (["--data-fraction", 0], "share"),
        (["--data-fraction", 0.0001], "held out"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input(inline, one_line, digits_badnets, tmp_path, args, named):
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", *args
    assert named in one_line(inline, "fine_pruning", *flags)
    assert files_below(tmp_path) == []


def test_a_rate_that_always_diverges_saves_no_model(inline, digits_badnets, tmp_path, capfd):
    """Not even its control; the run ends with what it knows."""
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", "--lr", "1e30", "--epochs", 1
    metrics = inline("fine_pruning", *flags)["metrics"]
    assert "every repair diverged or cost over 5 points" in capfd.readouterr().out
    assert not {"clean_accuracy_repaired", "clean_accuracy_clean_only"} & metrics.keys()
    assert not (tmp_path / "out" / "model.pt").exists()


def test_what_is_held_out_and_what_pruning_may_cost(inline, digits_badnets, tmp_path):
    flags = "--held-out", 0.5, "--mode", "prune", "--max-drop", 50, "--out", tmp_path / "out"
    ran = inline("fine_pruning", "--ckpt", digits_badnets, *flags)
    assert abs(int(ran["held"].sum()) - len(ran["split"]) / 2) <= 10  # by class
    fall, count = ran["accuracies"][0] - ran["accuracies"], ran["count"]
    assert 4 < fall[: count + 1].max() <= 50 < fall[count + 1]
