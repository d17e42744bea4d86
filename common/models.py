"""Classifiers for small images. Parameter names are those of the public code, so that its
checkpoints load. Normalisation is inside: every image outside a classifier lies in [0,1]."""

import contextlib
import copy
import inspect
import runpy
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import fail


class Classifier(nn.Module):
    """(x - mean) / std, then `net`. Input B x C x H x W in [0,1], output B x K logits.

    Of several outputs the one named `logits`, else the last, is taken. `softmax`: the network ends
    in one, and its logarithm stands for the logits. `bfloat16`: it computes in it, under autocast.
    """

    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.softmax, self.bfloat16 = net, False, False
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            y = self.net((x - self.mean) / self.std)
        y = getattr(y, "logits", y)
        y = y[-1] if isinstance(y, (tuple, list)) else y
        y = y.to(x.dtype) if isinstance(y, torch.Tensor) else y
        return y.clamp_min(1e-30).log() if self.softmax else y

    def __deepcopy__(self, memo):  # what the network keeps of its last pass loses its history
        kept = [v for part in self.modules() for v in vars(part).values() if torch.is_tensor(v)]
        memo |= {id(v): v.detach() for v in kept}
        twin = copy.copy(self)
        twin.__dict__ = copy.deepcopy(vars(self), memo)
        return twin


GAIN = "auto: bfloat16 on a GPU and, for our larger networks, on a CPU that has it"
PRECISION = {"default": "auto", "choices": ["auto", "float32"], "help": GAIN}  # the flag
FLOAT32 = "mnist_cnn", "mnist_conv5"  # on a CPU: quick enough in it, but for long passes


def uses_bfloat16(precision, arch, device, kept=FLOAT32):
    """Whether --precision makes a network compute in bfloat16: never if it is "float32", else on a
    GPU or a CPU that has the instructions, on the CPU for those of ours not in `kept`."""
    if precision == "float32":
        return False
    if device.type == "cuda":  # older ones only emulate it
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return arch in ARCHITECTURES and arch not in kept and torch.cpu._is_avx512_bf16_supported()


@contextlib.contextmanager
def in_float32(model):
    """Meanwhile `model` computes in float32."""
    chosen, model.bfloat16 = getattr(model, "bfloat16", False), False
    try:
        yield
    finally:
        model.bfloat16 = chosen


@torch.no_grad()
def logit_layer(model, x, arch):
    """Name of the linear layer whose outputs are the logits of x (in [0,1]); fails without one."""
    seen, training = {}, model.training  # an input by keyword is hidden: its layer has no i
    names = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [m.register_forward_hook(lambda m, i, y: seen.update((m, y) for _ in i)) for m in names]
    with in_float32(model):
        logits = model.eval()(x)
    model.train(training)
    for hook in hooks:
        hook.remove()
    seen = {m: y.to(logits.dtype) for m, y in seen.items()}
    logits = logits.log_softmax(-1).clamp(min=-60)  # a softmax inside rounds what lies below to 0
    found = [m for m, y in seen.items() if y.shape == logits.shape]
    found = [m for m in found if seen[m].log_softmax(-1).clamp(min=-60).allclose(logits)]
    if not found:
        fail(f"--arch {arch} does not end in a linear layer (called without keyword): it is needed")
    return names[found[-1]]


def entering(model, layer, x):
    """What enters the linear layer named `layer` (B x D) for x, B x C x H x W in [0,1]."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    model(x)
    hook.remove()
    if not seen:
        fail(f"the layer {layer} does not run in this network")
    return seen[-1].to(x.dtype)


def is_map(output, x):
    """Whether an output for images x (B x C x H x W) is B x c x h x w, h w > 1, of their shape."""
    if not isinstance(output, torch.Tensor) or output.dim() != 4 or output[0, 0].numel() < 2:
        return False  # a longer one than the images has its channels last, as Swin's
    return 0.6 < output.shape[2] * x.shape[3] / (output.shape[3] * x.shape[2]) < 1.67


def mnist_block(inputs, outputs):
    conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
    return nn.Sequential(OrderedDict(bn1=nn.BatchNorm2d(inputs), relu1=nn.ReLU(), conv1=conv1))


class MNISTNet(nn.Module):
    """WaNet's MNIST network: three stride-2 convolution blocks and two linear layers."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, 2, 1)
        self.layer3 = mnist_block(32, 64)
        self.layer4 = mnist_block(64, 64)
        self.linear6 = nn.Linear(64 * -(-height // 8) * -(-width // 8), 512)
        self.dropout8 = nn.Dropout(0.3)
        self.linear9 = nn.Linear(512, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(F.relu(self.conv1(x))))  # B x 64 x H/8 x W/8
        return self.linear9(self.dropout8(F.relu(self.linear6(x.flatten(1)))))


class MNISTConv5(nn.Module):
    """The MNIST network of Nguyen & Tran (2020) and Feng et al. (2022): two 5 x 5 convolutions."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        if min(height, width) < 16:
            fail(f"mnist_conv5 needs images of 16 x 16 or more; these are {height} x {width}")
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        self.conv1 = nn.Conv2d(channels, 32, 5)
        self.conv5 = nn.Conv2d(32, 64, 5)
        self.dropout = nn.Dropout(0.1)
        self.linear6 = nn.Linear(64 * rows * columns, 512)
        self.linear9 = nn.Linear(512, classes)

    def forward(self, x):
        x = F.max_pool2d(self.dropout(F.relu(self.conv1(x))), 2)
        x = F.max_pool2d(self.dropout(F.relu(self.conv5(x))), 2)  # B x 64 x H/4 - 3 x W/4 - 3
        return self.linear9(self.dropout(F.relu(self.linear6(x.flatten(1)))))


class PreActBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x):
        y = F.relu(self.bn1(x))
        skip = self.shortcut(y) if hasattr(self, "shortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + skip


class BasicBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR forms of residual networks: a 3 x 3 stem without pooling.

    `norm`: where a BatchNorm and a ReLU stand outside the blocks, "first" (after the stem), "last"
    (after the last stage) or None (the PreActResNet-18 of the papers' code).
    """

    def __init__(self, classes, channels, height, width, block, stem, widths, depths, norm):
        super().__init__()
        self.norm, self.depth = norm, len(depths)
        self.conv1 = nn.Conv2d(channels, stem, 3, 1, 1, bias=False)
        if norm is not None:
            self.bn1 = nn.BatchNorm2d(stem if norm == "first" else widths[-1])
        inputs = stem
        for stage, (outputs, depth) in enumerate(zip(widths, depths), start=1):
            blocks = [block(inputs, outputs, 1 if stage == 1 else 2)]  # halves the sides
            blocks += [block(outputs, outputs, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = outputs
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = self.conv1(x)
        x = F.relu(self.bn1(x)) if self.norm == "first" else x
        for stage in range(1, self.depth + 1):
            x = getattr(self, f"layer{stage}")(x)
        x = F.relu(self.bn1(x)) if self.norm == "last" else x
        return self.linear(x.mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if inputs != outputs:
            self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = F.relu(self.bn1(x))
        skip = self.convShortcut(y) if hasattr(self, "convShortcut") else x
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + skip


class WRN16(nn.Module):
    """WRN-16-1 (Zagoruyko & Komodakis 2016) with the parameter names of ABL's and NAD's code."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        for stage, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
            first = WideBlock(inputs, outputs, 1 if stage == 1 else 2)
            layer = nn.Sequential(first, WideBlock(outputs, outputs, 1))
            self.add_module(f"block{stage}", nn.Sequential(OrderedDict(layer=layer)))
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))  # B x 64 x H/4 x W/4
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class Whitening(nn.Conv2d):
    """A convolution whose weights no optimiser moves; its bias is trained."""

    def forward(self, x):
        return F.conv2d(x, self.weight.detach(), self.bias)


class Airbench(nn.Module):
    """The CIFAR network of cifar10-airbench (Jordan 2024, airbench94): fast to train on any device.

    Its first layer whitens the 2 x 2 patches: eigenvectors of their covariance over the root of
    the eigenvalues, and their negatives. The first training batch sets these weights for good.
    """

    def __init__(self, classes, channels, height, width):
        super().__init__()
        if min(height, width) < 9:
            fail(f"airbench needs images of 9 x 9 or more; these are {height} x {width}")
        self.whiten = Whitening(channels, 8 * channels, 2)
        self.whiten.weight.requires_grad_(False)
        self.register_buffer("whitened", torch.tensor(False))
        sizes = (8 * channels, 64), (64, 256), (256, 256)
        for number, (inputs, outputs) in enumerate(sizes, start=1):
            conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
            conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            for conv in (conv1, conv2):  # the first filters pass their input on
                nn.init.dirac_(conv.weight.data[: conv.in_channels])
            first = conv1, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.GELU()
            group = nn.Sequential(*first, conv2, nn.BatchNorm2d(outputs), nn.GELU())
            self.add_module(f"group{number}", group)
        self.linear = nn.Linear(256, classes, bias=False)

    @torch.no_grad()
    def fit_whitening(self, x):
        """Set the first layer's weights from images, B x C x H x W."""
        with torch.autocast(x.device.type, enabled=False):
            patches = F.unfold(x.float(), 2).transpose(1, 2).flatten(0, 1)  # B (H-1) (W-1) x 4 C
            values, vectors = torch.linalg.eigh(patches.T.cov())
            filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(-1, x.shape[1], 2, 2)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))
        self.whitened.fill_(True)

    def forward(self, x):
        if self.training and not self.whitened:
            self.fit_whitening(x)
        x = self.group3(self.group2(self.group1(F.gelu(self.whiten(x)))))  # B x 256 x H/8 x W/8
        return self.linear(x.amax((2, 3)) / 9)


class GTSRBNet(nn.Module):
    """Neural Cleanse's GTSRB network: six convolutions, the second of each pair without padding."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        layers = []
        for outputs in (32, 64, 128):
            layers += [nn.Conv2d(channels, outputs, 3, 1, 1), nn.ReLU()]
            layers += [nn.Conv2d(outputs, outputs, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2)]
            channels, height, width = outputs, (height - 2) // 2, (width - 2) // 2
        if min(height, width) < 1:
            fail("nc_gtsrb_cnn needs images of 22 x 22 or more")
        self.features = nn.Sequential(*layers)
        self.linear1 = nn.Linear(128 * height * width, 512)
        self.dropout = nn.Dropout(0.5)
        self.linear2 = nn.Linear(512, classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):  # PyTorch's own are too small without
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")  # a BatchNorm
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.linear2(self.dropout(F.relu(self.linear1(self.features(x).flatten(1)))))


def densenet121(classes, channels, height, width):
    """torchvision's network in the CIFAR form: a 3 x 3 stem without normalisation and pooling."""
    from torchvision.models import densenet121

    net = densenet121(num_classes=classes)
    net.features.conv0 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
    net.features.norm0 = net.features.relu0 = net.features.pool0 = nn.Identity()
    return net


class VGG(nn.Module):
    """Convolutions with BN and one linear layer; pools round up, so 28 pixels work."""

    def __init__(self, classes, channels, height, width, depths):
        super().__init__()
        layers = []
        for outputs, depth in zip((64, 128, 256, 512, 512), depths):
            for _ in range(depth):
                conv = nn.Conv2d(channels, outputs, 3, 1, 1)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
                channels = outputs
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, expansion, stride):
        super().__init__()
        hidden, self.stride = expansion * inputs, stride
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return y + self.shortcut(x) if self.stride == 1 else y


class MobileNetV2(nn.Module):
    """The CIFAR form: stride 1 in the stem and the second stage."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, inputs = [], 32
        stages = (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1)
        for expansion, outputs, count, stride in (*stages, (6, 160, 3, 2), (6, 320, 1, 1)):
            for block in range(count):
                blocks.append(InvertedResidual(inputs, outputs, expansion, 1 if block else stride))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.linear(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def unet_block(inputs, outputs):
    """Two 3 x 3 convolutions, each with GroupNorm and ReLU."""
    first, second = (nn.Conv2d(n, outputs, 3, 1, 1) for n in (inputs, outputs))
    norms = nn.GroupNorm(4, outputs), nn.GroupNorm(4, outputs)
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU())


class UNet(nn.Module):
    """Two poolings: images in [0,1], B x C x H x W, to such images of `outputs` channels (C).

    With `skip` the image joins the output, sigmoid(U(x) + logit x): fresh, it copies to a level.
    """

    def __init__(self, channels, width, outputs=None, skip=False):
        super().__init__()
        self.down1 = unet_block(channels, width)
        self.down2 = unet_block(width, 2 * width)
        self.bottom = unet_block(2 * width, 4 * width)
        self.up2 = unet_block(6 * width, 2 * width)
        self.up1 = unet_block(3 * width, width)
        self.out, self.skip = nn.Conv2d(width, outputs or channels, 1), skip
        if skip:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, x):
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -width % 4, 0, -height % 4))  # two poolings need sides divisible by 4
        a = self.down1(x)  # B x w x H x W
        b = self.down2(F.max_pool2d(a, 2))  # B x 2w x H/2 x W/2
        c = self.bottom(F.max_pool2d(b, 2))  # B x 4w x H/4 x W/4
        b = self.up2(torch.cat((F.interpolate(c, scale_factor=2), b), 1))
        a = self.up1(torch.cat((F.interpolate(b, scale_factor=2), a), 1))
        image = torch.logit(x, 1 / 255) if self.skip else 0
        return torch.sigmoid(self.out(a) + image)[..., :height, :width]


def residual(block, stem, widths, depths, norm):
    return partial(ResNet, block=block, stem=stem, widths=widths, depths=depths, norm=norm)


FOUR = (64, 128, 256, 512)
ARCHITECTURES = {
    "mnist_cnn": MNISTNet,
    "mnist_conv5": MNISTConv5,
    "preact_resnet18": residual(PreActBlock, 64, FOUR, (2, 2, 2, 2), None),
    "resnet18": residual(BasicBlock, 64, FOUR, (2, 2, 2, 2), "first"),
    "resnet34": residual(BasicBlock, 64, FOUR, (3, 4, 6, 3), "first"),
    "wrn16_1": WRN16,
    "nc_gtsrb_cnn": GTSRBNet,
    "airbench": Airbench,
    "wide_resnet34": residual(PreActBlock, 16, (160, 320, 640), (5, 5, 5), "last"),  # WRN-34-10
    "densenet121": densenet121,
    "vgg16": partial(VGG, depths=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, depths=(2, 2, 4, 4, 4)),
    "mobilenet_v2": MobileNetV2,
}


def users_network(arch, classes):
    """The network of `FILE.py:NAME`, the user's own code, which is run, or `torchvision:NAME`."""
    source, name = arch.rsplit(":", 1)
    try:
        if source == "torchvision":
            import torchvision  # 1 s

            if name.lower() not in torchvision.models.list_models(module=torchvision.models):
                raise NameError(f"no classifier of torchvision: {name}")  # others load a backbone
            make = partial(torchvision.models.get_model, name, weights=None)
        else:
            if not (source.endswith(".py") and Path(source).is_file()):
                raise OSError(f"no such file of Python code: {source}")
            sys.path.append(str(Path(source).resolve().parent))
            made = runpy.run_path(source)
            if name not in made:
                raise NameError(f"{source} defines no {name}")
            make = made[name]
        takes = inspect.signature(make).parameters
        named = "num_classes" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
        network = make(num_classes=classes) if named else make()
    except (Exception, SystemExit) as error:  # the user's own code can raise anything
        fail(f"--arch {arch}: {type(error).__name__}: {error}")
    if not isinstance(network, nn.Module) or isinstance(network, torch.jit.ScriptModule):
        fail(f"--arch {arch} makes a {type(network).__name__}, not a plain torch.nn.Module")
    return network


def contiguous(module, inputs):
    """A user's network may call view(), which needs the plain strides."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)


def build_model(arch, classes, shape, mean, std):
    """Return a freshly initialised Classifier for images of `shape` = (C, H, W)."""
    if arch not in ARCHITECTURES and ":" not in arch:
        known = f"{', '.join(ARCHITECTURES)}, torchvision:NAME, FILE.py:NAME"
        fail(f"unknown architecture {arch!r}; known: {known}")
    if len(mean) != shape[0] or len(std) != shape[0]:
        fail(f"images have {shape[0]} channels but mean and std have {len(mean)} and {len(std)}")
    if arch in ARCHITECTURES:
        net = ARCHITECTURES[arch](classes, *shape)
        return Classifier(net, mean, std).to(memory_format=torch.channels_last)  # faster
    net = users_network(arch, classes)
    net.register_forward_pre_hook(contiguous)
    return Classifier(net, mean, std)
