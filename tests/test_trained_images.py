"""Which images each training sees, cropped and mirrored by the recipe; which ones choose."""

import copy
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, run_here, run_inline

from common import datasets
from common.datasets import defender_split, to_float
from common.models import Classifier
from methods import mcr

RECIPE = 1, True  # pixels of the crop, mirrors: neither is a default of digits
MARK = 0.123  # no 8-bit image has it


@pytest.fixture(scope="module")
def victim(tmp_path_factory):
    """A hardly trained BadNets folder."""
    folder = tmp_path_factory.mktemp("victim")
    run_here("badnets", *SHORT["badnets"], "--out", folder, cwd=folder)
    return folder


@pytest.fixture
def training(tmp_path, monkeypatch, unread):
    """training(name, *flags): its variables and what was trained on.

    crops: pad and flip of each call of `augment`; images: what it was given; marked: by step of
    SGD, of which images of the batch it was (`augment` marks the first pixel).
    """
    seen, step = Namespace(crops=[], images=[], marked=[], batch=None), torch.optim.SGD.step
    forward = Classifier.forward

    def mark(x, pad, flip):
        seen.crops.append((pad, flip))
        seen.images.append(x.clone())
        x = x.clone()
        x[:, :, 0, 0] = MARK if pad else 0
        return x

    def see(model, x):
        seen.batch = (x[:, 0, 0, 0] == torch.tensor(MARK)).tolist()
        return forward(model, x)

    def count(optimizer, *args):
        seen.marked.append(seen.batch)
        return step(optimizer, *args)

    pad, flip = RECIPE
    spec = replace(datasets.SPECS["digits"], pad=pad, flip=flip)
    monkeypatch.setitem(datasets.SPECS, "digits", spec)
    monkeypatch.setattr(datasets, "augment", mark)
    monkeypatch.setattr(Classifier, "forward", see)
    monkeypatch.setattr(torch.optim.SGD, "step", count)

    def run(name, *flags):
        flags = *SHORT[name], "--out", tmp_path / name, *flags
        return run_inline(monkeypatch, tmp_path, name, *flags), seen

    return run


@pytest.mark.parametrize("name, steps", [("composite", 2), ("trojannn", 4), ("latent", 6)])
def test_every_training_of_an_attack_is_cropped_and_mirrored(training, name, steps):
    """TrojanNN's retraining too; the teacher, the injection and the student of the latent one."""
    _, seen = training(name)
    assert seen.crops == [RECIPE] * steps and len(seen.marked) == steps
    assert all(map(all, seen.marked))


def test_only_abls_stage_1_and_its_isolated_images_are_as_they_are(training, victim):
    ran, seen = training("abl", "--ckpt", victim)
    assert seen.crops == [(0, False)] * 2 + [RECIPE] * 4  # 2 steps each, and 2 of the ascent
    assert seen.marked[:2] == [[False] * 128] * 2 and seen.marked[2:4] == [[True] * 128] * 2
    assert seen.marked[4:] == [[True] * 128 + [False] * 3] * 2 and ran["masks"][""].sum() == 3


def tokens(x):
    """A set of images in [0,1] as bytes."""
    return {image.contiguous().numpy().tobytes() for image in x}


@pytest.mark.parametrize("name", ["mcr", "fine_pruning", "finetune", "nad"])
def test_repairs_train_on_what_is_not_kept_back(training, victim, digits, capfd, name):
    """Four fifths of the given images, by class, all of them; the others decide."""
    whole = ["--cutout", 0] if name == "nad" else []  # a square would hide the mark
    ran, seen = training(name, "--ckpt", victim, "--batch-size", 16, *whole)
    split = defender_split(digits.y_train, 300 / 1437, 0)
    kept = torch.zeros(len(split), dtype=torch.bool)
    kept[defender_split(digits.y_train[split], 0.2, 0)] = True
    used = tokens(torch.cat(seen.images))
    own, others = (tokens(to_float(digits.x_train[split[part]])) for part in (~kept, kept))
    assert used <= own and not used & others and len(used) > 0.9 * len(own)
    assert set(seen.crops) == {RECIPE} and all(map(all, seen.marked))
    count, printed = int(kept.sum()), capfd.readouterr().out
    if name == "mcr":
        check_points(ran, digits, split[kept])
    else:
        assert f" on {count} clean images that were kept back" in printed
        assert f" on {len(split)} clean" not in printed


def check_points(ran, digits, kept):
    """Loss and accuracy of the curve's points on the kept images; BatchNorm is of the crops."""
    x, y, first = to_float(digits.x_train[kept]), digits.y_train[kept], ran["model"]
    logits = [net(x) for net in ran["nets"]]
    losses = [F.cross_entropy(z, y).item() for z in logits]
    assert ran["metrics"]["kept_back_loss"] == pytest.approx(losses, rel=1e-4)
    right = [100 * (z.argmax(1) == y).double().mean().item() for z in logits]
    assert ran["metrics"]["kept_back_accuracy"] == pytest.approx(right, abs=1e-4)
    suspect = mcr.refresh(copy.deepcopy(first), ran["x_seen"])
    expected = suspect.state_dict()
    for key, value in ran["nets"][0].state_dict().items():
        torch.testing.assert_close(value, expected[key], msg=key)
