"""Architectures: sizes, public parameter names, and forward passes written out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.models import ARCHITECTURES, build_model

RGB = (3, 32, 32)


def build(arch, classes=10, shape=RGB):
    return build_model(arch, classes, shape, (0.5,) * shape[0], (0.5,) * shape[0])


# mnist_cnn by hand: conv1 320, layer3 64 + 18,432, layer4 128 + 36,864, linear6 524,800,
# linear9 5,130. The others are the sizes of the public CIFAR models.
@pytest.mark.parametrize(
    "arch, shape, classes, count",
    [
        ("mnist_cnn", (1, 28, 28), 10, 585_738),
        ("preact_resnet18", RGB, 10, 11_171_146),
        ("preact_resnet18", RGB, 43, 11_171_146 + 33 * 513),
        ("vgg16", RGB, 10, 14_728_266),
        ("mobilenet_v2", RGB, 10, 2_296_922),
    ],
)
def test_parameter_counts(arch, shape, classes, count):
    assert sum(p.numel() for p in build(arch, classes, shape).parameters()) == count


@pytest.mark.parametrize(
    "arch, names",
    [
        ("mnist_cnn", "conv1.weight conv1.bias layer3.bn1.running_var layer4.conv1.weight "
         "linear6.weight linear9.bias"),
        ("preact_resnet18", "conv1.weight layer1.0.bn1.weight layer1.1.conv1.weight "
         "layer2.0.shortcut.0.weight layer4.1.bn2.running_mean layer4.1.conv2.weight "
         "linear.weight linear.bias"),
        ("vgg16", "features.0.weight features.0.bias features.1.running_mean "
         "features.40.weight features.41.bias classifier.weight classifier.bias"),
        ("mobilenet_v2", "conv1.weight bn1.bias layers.0.shortcut.0.weight "
         "layers.0.shortcut.1.running_var layers.16.conv3.weight conv2.weight bn2.weight "
         "linear.weight"),
    ],
)  # fmt: skip
def test_public_parameter_names(arch, names):
    state = build(arch).net.state_dict()
    assert not set(names.split()) - set(state)


def test_public_preact_resnet_has_no_other_entries():
    names = {"conv1.weight", "linear.weight", "linear.bias"}
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            names |= {f"{at}.conv{i}.weight" for i in (1, 2)}
            kinds = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
            names |= {f"{at}.bn{i}.{kind}" for i in (1, 2) for kind in kinds}
        if stage > 1:
            names.add(f"layer{stage}.0.shortcut.0.weight")
    assert set(build("preact_resnet18").net.state_dict()) == names


def batch_norm(x, state, name):
    entries = (state[f"{name}.{e}"] for e in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *entries)


def shaken(model):
    """Eval mode with BatchNorm statistics and weights that a test can tell apart."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                noise = torch.rand(tensor.shape, generator=generator) / 2
                tensor.data.add_(noise)
    return model.eval().requires_grad_(False)


def test_preact_resnet18_forward():
    """BN-ReLU-conv order, shortcut on the activated input, nothing between layer4 and the mean."""
    model = shaken(build("preact_resnet18"))
    state = model.net.state_dict()
    image = torch.rand(2, *RGB)
    x = F.conv2d((image - 0.5) / 0.5, state["conv1.weight"], padding=1)
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(batch_norm(x, state, f"{at}.bn1"))
            if stride == 2:
                x = F.conv2d(y, state[f"{at}.shortcut.0.weight"], stride=2)
            y = F.conv2d(y, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.relu(batch_norm(y, state, f"{at}.bn2"))
            x = x + F.conv2d(y, state[f"{at}.conv2.weight"], padding=1)
    assert x.shape[1:] == (512, 4, 4) and x.min() < 0  # no ReLU after the last stage
    logits = F.avg_pool2d(x, 4).flatten(1) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-4, atol=1e-4)


def test_mnist_cnn_forward():
    model = shaken(build("mnist_cnn", shape=(1, 28, 28)))
    state = model.net.state_dict()
    image = torch.rand(2, 1, 28, 28)
    x = F.conv2d(2 * image - 1, state["conv1.weight"], state["conv1.bias"], stride=2, padding=1)
    x = F.relu(x)
    for at in ("layer3", "layer4"):
        x = F.relu(batch_norm(x, state, f"{at}.bn1"))
        x = F.conv2d(x, state[f"{at}.conv1.weight"], stride=2, padding=1)
    assert x.shape[1:] == (64, 4, 4)
    x = F.relu(x.flatten(1) @ state["linear6.weight"].T + state["linear6.bias"])
    logits = x @ state["linear9.weight"].T + state["linear9.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "arch, norms, strides",
    [("mnist_cnn", 2, 3), ("preact_resnet18", 16, 3), ("vgg16", 13, 0), ("mobilenet_v2", 57, 3)],
)
def test_number_of_norms_and_of_stride_two_stages(arch, norms, strides):
    modules = list(build(arch).net.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in modules) == norms
    wide = [m for m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert sum(m.stride == (2, 2) for m in wide) == strides


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("shape", [(1, 28, 28), RGB, (3, 64, 64), (3, 28, 40)], ids=str)
def test_forward_at_other_sizes(arch, shape):
    model = build(arch, 7, shape).eval()
    with torch.no_grad():
        x = torch.rand(2, *shape)
        logits = model(x)
        assert logits.shape == (2, 7) and logits.isfinite().all()
        torch.testing.assert_close(model(x[:1]), logits[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_normalisation_is_inside(arch):
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    model = build_model(arch, 4, RGB, mean, std).eval()
    image = np.random.default_rng(0).random((2, *RGB)).astype(np.float32)
    plain = (image - np.array(mean).reshape(3, 1, 1)) / np.array(std).reshape(3, 1, 1)
    with torch.no_grad():
        inside = model(torch.from_numpy(image))
        outside = model.net(torch.from_numpy(plain.astype(np.float32)))
    torch.testing.assert_close(inside, outside, rtol=1e-4, atol=1e-5)
    assert not {"mean", "std"} & {name for name, _ in model.named_parameters()}  # not trained
    assert {"mean", "std"} <= set(model.state_dict())  # but saved and moved with the model


@pytest.mark.parametrize(
    "arch, mean", [("resnet9000", (0.5,) * 3), ("vgg16", (0.5,)), ("vgg16", (0.5,) * 4)]
)
def test_build_model_refuses(arch, mean, one_line):
    one_line(build_model, arch, 10, RGB, mean, (0.5,) * 3)
