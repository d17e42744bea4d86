"""A model whose smallest triggers are known in closed form, shared by the tests of several scripts.

Images are 1 x SIDE x SIDE. Class j owns a block of 8 + j pixels; its images hold .5 there and 0
elsewhere. Logit k is 20 times the mean of block k, so that turning an image into class k takes a
mask of half the block: |m| = (8 + k) / 2. Pixel 0 belongs to no block and is black in every image.
"""

import numpy as np
import torch
from torch import nn

CLASSES, SIDE, TARGET = 10, 16, 3
SIZES = 8 + np.arange(CLASSES)
BLOCKS = np.split(np.arange(1, 1 + SIZES.sum()), np.cumsum(SIZES)[:-1])
SMALLEST = SIZES / 2  # of a clean model
PLANTED = np.where(np.arange(CLASSES) == TARGET, 0.5, SMALLEST)  # with the linear path of pixel 0


class Planted(nn.Module):
    """`path` leads from pixel 0 to the logit of TARGET: 'linear', 'gated' or 'none' (clean)."""

    def __init__(self, path="linear"):
        super().__init__()
        self.path = path
        self.linear = nn.Linear(SIDE**2, CLASSES, bias=False)
        weight = np.zeros((CLASSES, SIDE**2))
        for label, block in enumerate(BLOCKS):
            weight[label, block] = 20 / len(block)
        weight[TARGET, 0] = 20 if path == "linear" else 0
        self.linear.weight.data = torch.from_numpy(weight).float()

    def forward(self, x):
        pixels = x.flatten(1)
        logits = self.linear(pixels)
        if self.path == "gated":  # no gradient before the pixel is half white
            gate = 20 * (pixels[:, :1] - 0.5).relu()
            logits = logits + gate * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)
        return logits


def frozen(path="linear"):
    """The model as load_victim hands it out."""
    return Planted(path).eval().requires_grad_(False)


def images(per_class=13):
    """(x float 10 * per_class x 1 x SIDE x SIDE, y), classes in turn."""
    y = np.arange(CLASSES * per_class) % CLASSES
    x = np.zeros((len(y), SIDE**2), np.float32)
    for image, label in zip(x, y):
        image[BLOCKS[label]] = 0.5
    return torch.from_numpy(x).view(-1, 1, SIDE, SIDE), torch.from_numpy(y)


def index_of(norms):
    """The anomaly index of the smallest norm, by its definition."""
    below = np.median(norms) - np.asarray(norms)
    return below.max() / (1.4826 * np.median(np.abs(below)))
