"""bfloat16: where it is used, where it is not, and that --precision float32 does without it.

The processor is made to say that it has bfloat16: without it the same operators are emulated.
"""

import copy
import json

import pytest
import torch
from conftest import SHORT, random_images, result_of, whole_image_trigger, write_npz

from common.checkpoint import load_model, read_checkpoint
from common.metrics import mean_entering, predict
from common.models import build_model, in_float32, logit_layer, uses_bfloat16
from methods import fine_pruning, invisible, latent, pruning_aware, trojannn

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def has(monkeypatch):
    """Say whether the processor has bfloat16."""

    def say(answer):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: answer)

    say(True)
    return say


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("wrn16_1", 10, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).eval()
    model.bfloat16 = True
    return model.requires_grad_(False)


def test_torch_says_what_the_processor_has():
    assert isinstance(torch.cpu._is_avx512_bf16_supported(), bool)


@pytest.mark.parametrize("native", [True, False])
def test_who_uses_it(has, native, monkeypatch):
    has(native)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for arch in ("wrn16_1", "preact_resnet18", "airbench"):
        assert uses_bfloat16("auto", arch, CPU) == native
        assert not uses_bfloat16("float32", arch, CPU) and uses_bfloat16("auto", arch, GPU)
    for arch in ("mnist_cnn", "mnist_conv5", "own.py:net", "torchvision:resnet18"):
        assert not uses_bfloat16("auto", arch, CPU) and uses_bfloat16("auto", arch, GPU)
    assert uses_bfloat16("auto", "mnist_cnn", CPU, kept=()) == native  # STRIP's long passes
    assert not uses_bfloat16("float32", "mnist_cnn", CPU, kept=())
    assert not uses_bfloat16("auto", "own.py:net", CPU, kept=())
    assert not uses_bfloat16("float32", "own.py:net", GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not uses_bfloat16("auto", "wrn16_1", GPU)  # it would only be emulated


def test_the_network_computes_in_it_and_answers_in_float32(model):
    x, seen = torch.rand(4, 3, 32, 32), []
    model.net.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    half = model(x)
    with in_float32(model):
        full = model(x)
    assert seen == [torch.bfloat16, torch.float32] and model.bfloat16
    assert half.dtype == full.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.05 * full.abs().max()
    assert model.double()(x.double()).dtype == torch.float64
    with pytest.raises(ZeroDivisionError), in_float32(model):
        1 / 0  # noqa: B018
    assert model.bfloat16


def test_triggers_are_made_for_the_network_in_float32(model):
    """On any device the same: the attacks that search a trigger for features."""
    seen, x = [], random_images(8)
    model.net.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    mask, wanted = latent.square_mask(32, 32, 8), torch.zeros(64)
    latent.optimise_patch(model, "net.fc", x, mask, wanted, 2, batch_size=4)
    latent.feature_distance(model, "net.fc", x, wanted)
    neurons = torch.arange(3)
    aim = {"neurons": neurons, "value": 1.0, "steps": 2, "batch_size": 4}
    trojannn.optimise_patch(model, "net.fc", x, mask, **aim)
    delta, ones = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    aim = {"anchors": neurons, "goal": torch.ones(3), "radius": 1.0, "steps": 2, "lr": 0.1}
    invisible.drive(model, "net.fc", x, delta, ones, batch_size=4, **aim)
    assert set(seen) == {torch.float32} and len(seen) >= 8 and model.bfloat16


@pytest.mark.parametrize("arch, shape", [("wrn16_1", (3, 32, 32)), ("mnist_cnn", (1, 28, 28))])
def test_float32_is_that_of_plain_strides(arch, shape):
    """channels_last changes the speed: outputs and gradients are those without it."""
    given = (0.5,) * shape[0], (0.5,) * shape[0]
    fast = build_model(arch, 10, shape, *given).eval()
    plain = copy.deepcopy(fast).to(memory_format=torch.contiguous_format)
    layouts, found = set(), []
    for net in (fast, plain):
        x = random_images(6, shape).float().div(255).requires_grad_()
        logits = net(x)
        logits.square().sum().backward()
        found.append((logits.detach(), x.grad))
        weight = next(w for w in net.parameters() if w.dim() == 4 and w.shape[1] > 1)
        layouts.add(weight.is_contiguous())
    assert layouts == {True, False}
    for ours, theirs, gap in zip(*found, (1e-5, 1e-8)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=gap)


def test_figures_and_prunings_are_taken_in_float32(model):
    x, seen = random_images(20), []
    model.net.fc.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    predict(model, x)
    last = pruning_aware.Layer("bn1", True, ["bn1"], ["fc"])
    for method, layer in ((fine_pruning, fine_pruning.LAYERS["wrn16_1"][0]), (pruning_aware, last)):
        _, features = method.activations(model, layer, x)
        assert features.dtype == torch.float32
    assert logit_layer(model, x / 255, "wrn16_1") == "net.fc"
    assert {*seen} == {torch.float32} and len(seen) == 4
    assert mean_entering(model, "net.fc", x).dtype == torch.float32


def test_scripts(has, inline, unread, tmp_path):
    """A victim and every defence in both precisions; float32 is the same on every processor."""
    write_npz(tmp_path / "own.npz", (16, 16, 3), 6, 60)  # emulated, it is slow
    flags = "--epochs", 1, "--batch-size", 20, "--dataset", "own.npz", "--arch", "wrn16_1"

    def victim(out, *more):
        inline("badnets", *flags, "--out", out, *more)
        assert result_of(tmp_path / out)["metrics"]["asr_n"] == 50
        state = read_checkpoint(tmp_path / out / "model.pt")
        assert not load_model(state, out, CPU).bfloat16
        precision = json.loads((tmp_path / out / "result.json").read_text())["arguments"]
        return precision["precision"], torch.cat(
            [v.flatten() for v in state["state_dict"].values()]
        )

    (half, of_half), (chosen, of_chosen) = (
        victim("half"),
        victim("chosen", "--precision", "float32"),
    )
    has(False)
    plain, of_plain = victim("plain")
    assert (half, chosen, plain) == ("bfloat16", "float32", "float32")
    assert torch.equal(of_chosen, of_plain) and not torch.equal(of_half, of_plain)
    has(True)
    flagging = "--rule", "index", "--threshold", 1e-6, "--batch-size", 8
    for name, more in (
        ("nc", flagging),
        ("nc_mitigate", ()),  # of the folder that nc has written
        ("generator_reverse", (*flagging, "--asr-goal", 1e-9)),
        ("strip", ("--overlays", 5, "--inputs", 10, "--fit-images", 10)),
        ("purify", ("--filter", "median")),
        ("gradcam", ("--februus",)),
        ("sentinet", ()),
        ("fine_pruning", ("--epochs", 1)),
        ("mcr", ()),
        ("finetune", ()),
        ("nad", ()),
        ("abl", ()),
    ):
        if name == "nc_mitigate":
            more = whole_image_trigger(tmp_path / "half")
        ran = inline(name, "--ckpt", "half", *SHORT[name], *more)
        assert ran["args"].precision == "bfloat16" and ran["victim"].model.bfloat16, name


def test_of_the_defences_only_strip_takes_it_for_a_small_network(has, inline, digits_badnets):
    has(True)
    short = "--overlays", 5, "--inputs", 10, "--fit-images", 10
    for name, more, half in (("strip", short, True), ("finetune", SHORT["finetune"], False)):
        ran = inline(name, "--ckpt", digits_badnets, "--out", name, *more)
        assert ran["victim"].arch == "mnist_cnn" and ran["victim"].model.bfloat16 == half
