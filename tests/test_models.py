"""Architectures: sizes, public parameter names, and forward passes written out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.models import ARCHITECTURES, build_model, entering

RGB = (3, 32, 32)


def build(arch, classes=10, shape=RGB):
    return build_model(arch, classes, shape, (0.5,) * shape[0], (0.5,) * shape[0])


# mnist_cnn by hand: conv1 320, layer3 64 + 18,432, layer4 128 + 36,864, linear6 524,800,
# linear9 5,130; mnist_conv5: conv1 832, conv5 51,264, and the same linear layers. The others are
# the sizes of the public CIFAR models.
@pytest.mark.parametrize(
    "arch, shape, classes, count",
    [
        ("mnist_cnn", (1, 28, 28), 10, 585_738),
        ("mnist_conv5", (1, 28, 28), 10, 582_026),
        ("preact_resnet18", RGB, 10, 11_171_146),
        ("preact_resnet18", RGB, 43, 11_171_146 + 33 * 513),
        ("resnet18", RGB, 10, 11_173_962),
        ("resnet34", RGB, 10, 21_282_122),
        ("wide_resnet34", RGB, 10, 46_160_474),
        ("densenet121", RGB, 10, 6_956_298),
        ("vgg16", RGB, 10, 14_728_266),
        ("vgg19", RGB, 10, 20_040_522),
        ("mobilenet_v2", RGB, 10, 2_296_922),
        # whitening 312; convolutions 50,688 + 737,280 + 1,179,648; BatchNorm 2,304; linear 2,560
        ("airbench", RGB, 10, 1_972_792),
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
        ("resnet18", "conv1.weight bn1.bias layer1.0.bn1.weight layer2.0.shortcut.0.weight "
         "layer2.0.shortcut.1.running_var layer4.1.bn2.running_mean linear.weight linear.bias"),
        ("resnet34", "layer1.2.conv2.weight layer2.3.bn1.weight layer3.5.conv2.weight "
         "layer4.2.bn2.bias"),
        ("wide_resnet34", "conv1.weight layer1.0.shortcut.0.weight layer3.4.conv2.weight "
         "bn1.running_var linear.bias"),
        ("densenet121", "features.conv0.weight features.denseblock1.denselayer6.norm1.weight "
         "features.transition3.conv.weight features.norm5.weight classifier.bias"),
        ("vgg16", "features.0.weight features.0.bias features.1.running_mean "
         "features.40.weight features.41.bias classifier.weight classifier.bias"),
        ("vgg19", "features.0.bias features.49.weight features.50.running_var classifier.bias"),
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


def pre_activation(x, state, stages, blocks, projects):
    """Blocks of BN-ReLU-conv twice; projects(stage, block): a shortcut on the activated input."""
    for stage in range(1, stages + 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(batch_norm(x, state, f"{at}.bn1"))
            if projects(stage, block):
                x = F.conv2d(y, state[f"{at}.shortcut.0.weight"], stride=stride)
            y = F.conv2d(y, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.relu(batch_norm(y, state, f"{at}.bn2"))
            x = x + F.conv2d(y, state[f"{at}.conv2.weight"], padding=1)
    return x


def test_preact_resnet18_forward():
    """BN-ReLU-conv order, shortcut on the activated input, nothing between layer4 and the mean."""
    model = shaken(build("preact_resnet18"))
    state = model.net.state_dict()
    image = torch.rand(2, *RGB)
    x = F.conv2d((image - 0.5) / 0.5, state["conv1.weight"], padding=1)
    x = pre_activation(x, state, 4, 2, lambda stage, block: stage > 1 and block == 0)
    assert x.shape[1:] == (512, 4, 4) and x.min() < 0  # no ReLU after the last stage
    logits = F.avg_pool2d(x, 4).flatten(1) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-4, atol=1e-4)


def test_resnet18_forward():
    """Conv-BN-ReLU order, a normalised shortcut, the last ReLU after the sum."""
    model = shaken(build("resnet18"))
    state = model.net.state_dict()
    image = torch.rand(2, *RGB)
    x = F.conv2d((image - 0.5) / 0.5, state["conv1.weight"], padding=1)
    x = F.relu(batch_norm(x, state, "bn1"))
    for stage in range(1, 5):
        for block in range(2):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            y = F.relu(batch_norm(y, state, f"{at}.bn1"))
            y = F.conv2d(y, state[f"{at}.conv2.weight"], padding=1)
            y = batch_norm(y, state, f"{at}.bn2")
            if stride == 2:
                x = F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=2)
                x = batch_norm(x, state, f"{at}.shortcut.1")
            x = F.relu(x + y)
    logits = F.avg_pool2d(x, 4).flatten(1) @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-4, atol=1e-4)


def test_wide_resnet34_forward():
    """Stages of five pre-activation blocks, 160, 320 and 640 wide, and a last BN-ReLU."""
    model = shaken(build("wide_resnet34"))
    state = model.net.state_dict()
    image = torch.rand(1, *RGB)
    x = F.conv2d((image - 0.5) / 0.5, state["conv1.weight"], padding=1)
    x = pre_activation(x, state, 3, 5, lambda stage, block: block == 0)
    assert x.shape[1:] == (640, 8, 8)
    x = F.relu(batch_norm(x, state, "bn1")).mean((2, 3))
    logits = x @ state["linear.weight"].T + state["linear.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-3, atol=1e-3)


def test_densenet121_forward():
    """1 x 1 to 128 then 3 x 3 to 32 new channels, halving between the blocks, no early pooling."""
    model = shaken(build("densenet121"))
    state = {k.removeprefix("features."): v for k, v in model.net.state_dict().items()}
    image = torch.rand(2, *RGB)
    x = F.conv2d((image - 0.5) / 0.5, state["conv0.weight"], padding=1)
    for stage, depth in enumerate((6, 12, 24, 16), start=1):
        for block in range(1, depth + 1):
            at = f"denseblock{stage}.denselayer{block}"
            y = F.conv2d(F.relu(batch_norm(x, state, f"{at}.norm1")), state[f"{at}.conv1.weight"])
            assert y.shape[1] == 128
            y = F.relu(batch_norm(y, state, f"{at}.norm2"))
            x = torch.cat((x, F.conv2d(y, state[f"{at}.conv2.weight"], padding=1)), 1)
        if stage < 4:
            y = F.relu(batch_norm(x, state, f"transition{stage}.norm"))
            x = F.avg_pool2d(F.conv2d(y, state[f"transition{stage}.conv.weight"]), 2)
    assert x.shape[1:] == (1024, 4, 4)
    x = F.relu(batch_norm(x, state, "norm5")).mean((2, 3))
    logits = x @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-3, atol=1e-3)


def test_airbench_forward():
    """The convolution before the pooling, GELU (not its tanh form), one maximum, a ninth."""
    model = shaken(build("airbench"))
    state = model.net.state_dict()
    image = torch.rand(2, *RGB)
    y = F.conv2d((image - 0.5) / 0.5, state["whiten.weight"], state["whiten.bias"])
    x = 0.5 * y * (1 + torch.erf(y / 2**0.5))
    for side, at in ((15, "group1"), (7, "group2"), (3, "group3")):
        x = F.max_pool2d(F.conv2d(x, state[f"{at}.0.weight"], padding=1), 2)
        x = F.gelu(batch_norm(x, state, f"{at}.2"))
        x = F.gelu(batch_norm(F.conv2d(x, state[f"{at}.4.weight"], padding=1), state, f"{at}.5"))
        assert x.shape[2:] == (side, side)
    expected = F.max_pool2d(x, 3).flatten(1) @ state["linear.weight"].T / 9
    torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [RGB, (1, 28, 28)], ids=str)
def test_airbench_whitens_its_first_training_batch(shape):
    """Outputs of unit variance without correlations, and their negatives; set once."""
    model = build("airbench", shape=shape)
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(0, 0.1, (40, *shape)), 3)  # neighbours correlate
    x = torch.from_numpy(x).float()
    before = model.net.whiten.weight.clone()
    model.eval()(x)
    assert torch.equal(model.net.whiten.weight, before) and not model.net.whitened
    model.train()(x)
    weight = model.net.whiten.weight.clone()
    half = 4 * shape[0]
    assert torch.equal(weight[:half], -weight[half:]) and not model.net.whiten.weight.requires_grad
    z = F.conv2d((x - 0.5) / 0.5, weight[:half]).transpose(0, 1).flatten(1).double().numpy()
    covariance = np.cov(z)
    patches = np.lib.stride_tricks.sliding_window_view((x.numpy() - 0.5) / 0.5, (2, 2), (2, 3))
    patches = patches.transpose(0, 2, 3, 1, 4, 5).reshape(-1, half)
    values = np.sort(np.linalg.eigvalsh(np.cov(patches.T)))[::-1]
    np.testing.assert_allclose(covariance, np.diag(values / (values + 5e-4)), atol=2e-3)
    model(x + rng.random())
    assert torch.equal(model.net.whiten.weight, weight) and model.net.whitened


def test_airbench_starts_with_filters_that_pass_their_input_on():
    model = build("airbench")
    x = torch.rand(2, 24, 8, 8)
    torch.testing.assert_close(model.net.group1[0](x)[:, :24], x)
    assert (model.net.group1[0](x)[:, 24:] != 0).all()


def test_mnist_conv5_forward():
    model = shaken(build("mnist_conv5", shape=(1, 28, 28)))
    state = model.net.state_dict()
    image = torch.rand(2, 1, 28, 28)
    x = 2 * image - 1
    for at in ("conv1", "conv5"):
        x = F.max_pool2d(F.relu(F.conv2d(x, state[f"{at}.weight"], state[f"{at}.bias"])), 2)
    assert x.shape[1:] == (64, 4, 4)
    x = F.relu(x.flatten(1) @ state["linear6.weight"].T + state["linear6.bias"])
    logits = x @ state["linear9.weight"].T + state["linear9.bias"]
    torch.testing.assert_close(model(image), logits, rtol=1e-4, atol=1e-4)
    assert (model.train()(image) != logits).any()  # dropout


def test_mnist_conv5_refuses_small_images(one_line):
    assert "16 x 16" in one_line(build, "mnist_conv5", shape=(1, 15, 16))
    assert build("mnist_conv5", shape=(1, 16, 16))(torch.rand(1, 1, 16, 16)).shape == (1, 10)


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
    [
        ("mnist_cnn", 2, 3),
        ("preact_resnet18", 16, 3),
        ("resnet18", 17 + 3, 3),
        ("resnet34", 33 + 3, 3),
        ("wide_resnet34", 31, 2),
        ("densenet121", 2 * 58 + 3 + 1, 0),
        ("vgg16", 13, 0),
        ("vgg19", 16, 0),
        ("mobilenet_v2", 57, 3),
    ],
)
def test_number_of_norms_and_of_stride_two_stages(arch, norms, strides):
    modules = list(build(arch).net.modules())
    assert sum(isinstance(m, nn.BatchNorm2d) for m in modules) == norms
    wide = [m for m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert sum(m.stride == (2, 2) for m in wide) == strides


SHAPES = [(1, 28, 28), RGB, (3, 64, 64), (3, 28, 40)]
SLOW = ["wide_resnet34", "densenet121"]  # written out at 32 x 32 above; other sides are enough


@pytest.mark.parametrize(
    "arch, shape",
    [
        *((arch, shape) for arch in ARCHITECTURES for shape in SHAPES if arch not in SLOW),
        *((arch, shape) for arch in SLOW for shape in [(1, 16, 20), (3, 20, 28)]),
    ],
    ids=str,
)
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


def test_no_optimiser_moves_the_whitening():
    """Though a repair or a second training makes every parameter trainable again."""
    torch.manual_seed(0)
    model = build_model("airbench", 10, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).train()
    x = torch.rand(8, 3, 32, 32)
    model(x)
    fitted = model.net.whiten.weight.clone()
    optimizer = torch.optim.SGD(model.requires_grad_(True).parameters(), 0.1, weight_decay=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.net.whiten.weight, fitted)
    assert model.net.whiten.bias.grad.abs().sum() > 0


def test_a_layer_that_does_not_run_is_refused(one_line):
    model = build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))
    model.net.idle = nn.Linear(3, 3)
    assert "net.idle" in one_line(entering, model, "net.idle", torch.rand(2, 1, 28, 28))


@pytest.mark.parametrize("seed", range(5))
def test_the_first_answers_of_the_network_without_batchnorm_depend_on_the_image(seed):
    """With PyTorch's own initial weights they vary by 2e-4, and training stands for epochs."""
    torch.manual_seed(seed)
    model = build_model("nc_gtsrb_cnn", 43, (3, 32, 32), (0.0,) * 3, (1.0,) * 3).eval()
    shades = torch.rand(50, 3, 1, 1).expand(50, 3, 32, 32) * torch.rand(50, 1, 32, 32)
    assert model(shades).std(0).mean() > 0.05
