"""Classifiers for small images. Parameter names are those of the public code, so that its
checkpoints load. Normalisation is inside: every image outside a classifier lies in [0,1]."""

import torch
import torch.nn.functional as F
from torch import nn

from common import fail


class Classifier(nn.Module):
    """(x - mean) / std, then `net`. Input B x C x H x W in [0,1], output B x K logits."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


class MNISTBlock(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)

    def forward(self, x):
        return self.conv1(F.relu(self.bn1(x)))


class MNISTNet(nn.Module):
    """WaNet's MNIST network: three stride-2 convolution blocks and two linear layers."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, 2, 1)
        self.layer3 = MNISTBlock(32, 64)
        self.layer4 = MNISTBlock(64, 64)
        self.linear6 = nn.Linear(64 * -(-height // 8) * -(-width // 8), 512)
        self.dropout8 = nn.Dropout(0.3)
        self.linear9 = nn.Linear(512, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(F.relu(self.conv1(x))))  # B x 64 x H/8 x W/8
        return self.linear9(self.dropout8(F.relu(self.linear6(x.flatten(1)))))


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


class PreActResNet18(nn.Module):
    """The CIFAR form that the papers used: no BN-ReLU after the last stage."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        inputs = 64
        for stage, outputs in enumerate((64, 128, 256, 512), start=1):
            stride = 1 if stage == 1 else 2
            blocks = PreActBlock(inputs, outputs, stride), PreActBlock(outputs, outputs, 1)
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            inputs = outputs
        self.linear = nn.Linear(512, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


class VGG16(nn.Module):
    """Thirteen convolutions with BN and one linear layer; pools round up, so 28 pixels work."""

    def __init__(self, classes, channels, height, width):
        super().__init__()
        layers = []
        for stage in ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3):
            for outputs in stage:
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
        hidden = expansion * inputs
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

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
        for expansion, outputs, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for block in range(count):
                step = stride if block == 0 else 1
                blocks.append(InvertedResidual(inputs, outputs, expansion, step))
                inputs = outputs
        self.layers = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(320, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.linear(x.mean((2, 3)))


ARCHITECTURES = {
    "mnist_cnn": MNISTNet,
    "preact_resnet18": PreActResNet18,
    "vgg16": VGG16,
    "mobilenet_v2": MobileNetV2,
}


def build_model(arch, classes, shape, mean, std):
    """Return a freshly initialised Classifier for images of `shape` = (C, H, W)."""
    if arch not in ARCHITECTURES:
        fail(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if len(mean) != shape[0] or len(std) != shape[0]:
        fail(f"images have {shape[0]} channels but mean and std have {len(mean)} and {len(std)}")
    return Classifier(ARCHITECTURES[arch](classes, *shape), mean, std)
