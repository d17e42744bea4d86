"""Plain fine-tuning against closed forms and the sibling's loop, and sweeps on digits."""

import shutil

import numpy as np
import pytest
import torch
from conftest import files_below, reread, result_of, run_here, tuned_by_hand
from PIL import Image
from torch import nn

from common.checkpoint import load_model, read_checkpoint
from common.datasets import to_float
from common.metrics import accuracy
from common.models import Classifier
from methods import fine_pruning
from methods import finetune as ft

CPU = torch.device("cpu")


def tuned(model, x, y, script=ft, epochs=2, lr=0.05, batch_size=20, pad=2, flip=False, **more):
    torch.manual_seed(5)
    rates = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
    return script.finetune(model, x, y, pad=pad, flip=flip, **rates, **more)


def load(folder):
    return load_model(read_checkpoint(folder / "model.pt"), folder, CPU)


def test_two_steps_written_out(untrained, digits):
    """v = .9 v + g + .0005 w; w -= lr v; the rate falls by a cosine: all of it, then half."""
    x, y = digits.x_train[:40], digits.y_train[:40]
    after = tuned(untrained, x, y, epochs=1, pad=0)
    for got, wanted in zip(after.parameters(), tuned_by_hand(untrained, x, y)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_it_is_fine_pruning_that_prunes_nothing(untrained, digits):
    """Bit by bit, BatchNorm's statistics too."""
    x, y = digits.x_train[:90], digits.y_train[:90]
    none = {"linear": "linear9", "channels": 512, "pruned": torch.zeros(0, dtype=torch.int64)}
    mine = tuned(untrained, x, y, flip=True).state_dict()
    other = tuned(untrained, x, y, fine_pruning, flip=True, **none).state_dict()
    assert all(torch.equal(value, other[key]) for key, value in mine.items())
    assert not torch.equal(mine["net.conv1.weight"], untrained.net.conv1.weight)


def test_the_suspect_stays_and_the_copy_is_frozen(untrained, digits):
    before = {k: v.clone() for k, v in untrained.state_dict().items()}
    after = tuned(untrained, digits.x_train[:60], digits.y_train[:60])
    assert not after.training and not any(p.requires_grad for p in after.parameters())
    assert all(torch.equal(value, before[key]) for key, value in untrained.state_dict().items())


def linear(pixels=4, classes=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    return Classifier(net, (0.0,), (1.0,)).eval().requires_grad_(False)


def test_what_clean_images_never_use_only_decays():
    """The weights of a pixel that is black in every image: v = .9 v + .0005 w, w -= rate v."""
    model = linear()
    x = torch.randint(0, 256, (60, 1, 2, 2)).to(torch.uint8)
    x[:, 0, 1, 1] = 0
    y = torch.arange(60) % 3
    after = tuned(model, x, y, epochs=7, lr=0.9, pad=0)
    w = model.net[1].weight[:, 3].double().numpy()
    start, v, steps = w, 0, 7 * 3
    for step in range(steps):
        v = 0.9 * v + 5e-4 * w
        w = w - 0.9 * (1 + np.cos(np.pi * step / steps)) / 2 * v
    np.testing.assert_allclose(after.net[1].weight[:, 3], w, rtol=1e-5)
    assert (np.abs(w) > 0.9 * np.abs(start)).all()  # the path of a trigger there survives
    assert (after.net[1].weight[:, :3] - model.net[1].weight[:, :3]).abs().min() > 0.02


def test_rate_zero_moves_the_statistics_of_batch_norm_alone(untrained, digits):
    x, y = digits.x_train[:60], digits.y_train[:60]
    after = tuned(untrained, x, y, lr=0.0)
    changed = {
        k for k, v in after.state_dict().items() if not torch.equal(v, untrained.state_dict()[k])
    }
    assert changed and all("running" in key or "tracked" in key for key in changed)
    model, noise = linear(784, 10), to_float(x)
    assert torch.equal(tuned(model, x, y, lr=0.0)(noise), model(noise))


@pytest.mark.parametrize("count, batch_size, steps", [(50, 20, 2), (15, 20, 1), (40, 20, 2)])
def test_a_last_batch_that_is_not_full_is_left_out(count, batch_size, steps):
    model, seen = linear(), []
    model.net.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    x = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    torch.manual_seed(0)
    rates = {"epochs": 3, "lr": 0.1, "batch_size": batch_size}
    ft.finetune(model, x, torch.arange(count) % 3, pad=0, flip=False, **rates)
    assert seen == [min(count, batch_size)] * 3 * steps + [count]  # the last: is it finite?


def test_fine_tuning_that_diverges_gives_no_model(untrained, digits):
    assert tuned(untrained, digits.x_train[:90], digits.y_train[:90], lr=1e30) is None


def test_a_rate_that_diverges_is_left_out_of_the_sweep(inline, digits_badnets, tmp_path, capfd):
    flags = "--ckpt", digits_badnets, "--lrs", 0.01, "1e30", "--epochs", 1
    inline("finetune", *flags, "--out", tmp_path / "out")
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["lrs"] == [0.01] and metrics["repair_lr"] == 0.01
    assert "rate 1e+30: the loss diverged" in capfd.readouterr().out


@pytest.mark.parametrize(
    "kept, max_drop, chosen",
    [
        ({0.1: 80, 0.01: 95, 0.001: 100}, 5, 0.01),  # at most 5 points
        ({0.001: 100, 0.01: 94.9, 0.1: 96}, 5, 0.1),  # the largest, though a smaller one costs more
        ({0.1: 94.9, 0.01: 94}, 5, None),
        ({0.1: 99.9, 0.01: 100, 0.001: 101}, 0, 0.01),
        ({0.1: 0}, 100, 0.1),
    ],
)
def test_choice(kept, max_drop, chosen):
    assert ft.choose(kept, 100, max_drop) == chosen


# ===== Whole runs on digits =====


@pytest.mark.drawn
def test_the_rate_decides(digits, digits_badnets, tmp_path):
    """Zheng et al., Fig. 5, through the command line: a small rate leaves the backdoor alone."""
    out, before = tmp_path / "out", files_below(digits_badnets)
    flags = "--lrs", 0.05, 0.001, "--epochs", 40, "--batch-size", 32, "--out", out
    printed = run_here("finetune", "--ckpt", digits_badnets, *flags, cwd=tmp_path)
    metrics = result_of(out)["metrics"]
    assert metrics["asr"] >= 98 and metrics["asr_0.001"] >= 95
    assert metrics["asr_0.05"] == metrics["asr_repaired"] <= 15
    assert metrics["clean_accuracy_repaired"] >= 93 and metrics["robust_accuracy_repaired"] >= 75
    assert metrics["clean_accuracy_0.001"] >= 96
    assert metrics["lrs"] == [0.001, 0.05] and metrics["repair_lr"] == 0.05
    assert metrics["held_out"] == 60 and len(metrics["held_out_accuracies"]) == 2
    reread(out, digits_badnets, digits)
    assert files_below(out) == ["model.pt", "result.json", "sweep.png"]
    with Image.open(out / "sweep.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    assert files_below(digits_badnets) == before
    for lr in ("0.001", "0.05"):
        line = f"ASR {metrics[f'asr_{lr}']:.2f}"
        assert any(p.startswith(f"rate {lr}: ") and line in p for p in printed.splitlines())


def test_the_images_that_choose_are_not_trained_on(inline, digits_badnets):
    """And each rate is what it is alone, whatever ran before."""
    flags = "--ckpt", digits_badnets, "--epochs", 1, "--lrs"
    ran = inline("finetune", *flags, 0.03, 0.01, "--out", "both")
    held, x, split = ran["held"], ran["x_clean"], ran["split"]
    assert len(split) == len(split.unique()) == len(x) == 299 and int(held.sum()) == 60
    assert len(ran["y_held"].unique()) == 10
    torch.manual_seed(0)
    recipe = {"pad": 2, "flip": False, "epochs": 1, "batch_size": 64}
    y = ran["y_clean"]
    by_hand = ft.finetune(ran["model"], x[~held], y[~held], lr=0.01, **recipe).state_dict()
    alone = inline("finetune", *flags, 0.01, "--out", "alone")["tuned"][0.01].state_dict()
    for key, value in ran["tuned"][0.01].state_dict().items():
        assert torch.equal(value, by_hand[key]) and torch.equal(value, alone[key]), key
    expected = accuracy(ran["tuned"][0.03], x[held], y[held])
    assert ran["metrics"]["held_out_accuracies"][1] == expected == ran["kept"][0.03]


@pytest.mark.parametrize("found, chosen", [([90, 95, 100], 0.01), ([90, 94.9, 94], None)])
def test_accuracy_that_was_kept_back_decides(
    inline, digits_badnets, tmp_path, monkeypatch, capfd, found, chosen
):
    """The largest rate costs too much; where all do, nothing is saved, but the figures are."""
    kept = iter([100, *found])  # the suspect's, then from the largest rate to the smallest
    monkeypatch.setattr("common.metrics.accuracy", lambda *args, **flags: next(kept))
    flags = "--lrs", 0.001, 0.01, 0.03, "--epochs", 1, "--out", tmp_path / "out"
    ran = inline("finetune", "--ckpt", digits_badnets, *flags)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["repair_lr"] == chosen and metrics["held_out_accuracies"] == found[::-1]
    assert "asr_0.01" in metrics and "asr_0.03" in metrics
    saved = ["model.pt"] if chosen else []
    assert files_below(tmp_path / "out") == [*saved, "result.json", "sweep.png"]
    printed = capfd.readouterr().out
    assert ("no model is saved" in printed) == (chosen is None)
    assert (str(tmp_path / "out" / "model.pt") in printed) == (chosen is not None)
    assert ("asr_repaired" in metrics) == (chosen is not None)
    if chosen:
        wanted = ran["tuned"][chosen].state_dict()
        assert all(
            torch.equal(v, wanted[k]) for k, v in load(tmp_path / "out").state_dict().items()
        )


def test_the_defender_needs_no_triggered_image(inline, digits_badnets, tmp_path, capfd):
    """Without poisoned_test.npz: bitwise the same repaired model, and no ASR."""
    blind = tmp_path / "blind"
    blind.mkdir()
    shutil.copy(digits_badnets / "model.pt", blind)
    flags = "--epochs", 1, "--lrs", 0.01, 0.03, "--out"
    inline("finetune", "--ckpt", digits_badnets, *flags, tmp_path / "seen")
    inline("finetune", "--ckpt", blind, *flags, tmp_path / "unseen")
    assert "the ASR cannot be measured" in capfd.readouterr().out
    seen, unseen = (load(tmp_path / name).state_dict() for name in ("seen", "unseen"))
    assert all(torch.equal(value, unseen[key]) for key, value in seen.items())
    metrics = result_of(tmp_path / "unseen")["metrics"]
    assert not any("asr" in key for key in metrics) and "clean_accuracy_0.03" in metrics


def test_cost_to_a_clean_model(inline, digits_clean, tmp_path):
    flags = "--epochs", 10, "--lrs", 0.03, "--out", tmp_path / "out"
    inline("finetune", "--ckpt", digits_clean, *flags)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["clean_accuracy"] >= 96 and "asr" not in metrics
    assert metrics["clean_accuracy_repaired"] >= metrics["clean_accuracy"] - 4


@pytest.mark.parametrize(
    "args, named",
    [
        (["--lrs", 0], "lrs"),
        (["--lrs", 0.1, -1], "lrs"),
        (["--lrs", "nan"], "lrs"),
        (["--lrs", "inf", 0.1], "lrs"),
        (["--lrs", 0.1, 0.1000001], "six digits"),
        (["--lrs", "1e29", "1e30", "--epochs", 1], "loss"),  # all diverge
        (["--max-drop", -1], "max-drop"),
        (["--max-drop", 101], "max-drop"),
        (["--max-drop", "nan"], "max-drop"),
        (["--held-out", 0], "held-out"),
        (["--held-out", 1], "held-out"),
        (["--held-out", "nan"], "held-out"),
        (["--epochs", 0], "epochs"),
        (["--batch-size", -1], "batch-size"),
        (["--data-fraction", 0], "share"),
        (["--data-fraction", 0.0001], "held out"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input(inline, one_line, digits_badnets, tmp_path, args, named):
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", *args
    assert named in one_line(inline, "finetune", *flags)
    assert files_below(tmp_path) == []


def test_what_is_held_out_and_what_a_rate_may_cost(inline, digits_badnets, tmp_path):
    flags = "--held-out", 0.5, "--epochs", 1, "--lrs", 0.001, 1.0, "--out", tmp_path / "out"
    ran = inline("finetune", "--ckpt", digits_badnets, *flags, "--max-drop", 100)
    assert abs(int(ran["held"].sum()) - len(ran["split"]) / 2) <= 10  # by class
    assert ran["before"] - ran["kept"][1.0] > 5 and ran["chosen"] == 1.0
