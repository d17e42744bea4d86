"""Whatever is wrong with the input: one line on stderr, exit code 2, nothing written."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (
    ATTACKS,
    DEFENCES,
    DETECTORS,
    FURTHER,
    SHORT,
    explosive,
    files_below,
    run_script,
    script_command,
    write_npz,
)

from common import checkpoint
from common.datasets import load_dataset

TRAIN_SET = {"abl": ("--train-set", "clean")}  # a suspect has no poisoned one beside it


@pytest.fixture
def refused(inline, one_line, unread, tmp_path):
    """Run a script inline with bad arguments; checks the refusal, returns its line."""

    def run(name, *args):
        before = files_below(tmp_path)
        message = one_line(inline, name, *SHORT[name], *TRAIN_SET.get(name, ()), *args)
        assert files_below(tmp_path) == before
        return message

    return run


def shared(first, names, cases, ids):
    """Cases that common/ refuses: all of them for the script `first`, one in turn for the others.

    Every script calls that code before anything else: test_siblings.py.
    """
    others = [name for name in names if name != first]
    turns = [(first, k) for k in range(len(cases))]
    turns += [(name, k % len(cases)) for k, name in enumerate(others)]
    return [pytest.param(name, *cases[k], id=f"{name}-{ids[k]}") for name, k in turns]


GENERAL = [
    (["--dataset", "imagenet"], "imagenet"),
    (["--arch", "resnet9000"], "resnet9000"),
    (["--device", "abacus"], "abacus"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--device", "meta"], "meta"),
    (["--dataset", "nowhere/none.npz"], "none.npz"),
    (["--batch-size", 0], "batch"),
    (["--batch-size", 1], "BatchNorm needs two"),
    (["--batch-size", 10**20], "batch"),
    (["--epochs", -1], "epochs"),
    (["--train-images", 0], "train-images"),
    (["--train-images", 1438], "digits has 1437"),
]


@pytest.mark.parametrize(
    "name, args, named",
    shared("badnets", ATTACKS, GENERAL, ["_".join(map(str, args)) for args, _ in GENERAL]),
)
def test_bad_general_flag(refused, name, args, named):
    assert named in refused(name, *args)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    "rate, named",
    [
        ("1e30", "loss"),
        ("nan", "--lr must"),
    ],
    ids=str,
)
def test_bad_learning_rate(refused, name, rate, named):
    assert named in refused(name, "--lr", rate)


def each(names, *args):
    return [(name, args) for name in names.split()]


POISONING = "badnets wanet blend sig issba label_consistent trojannn invisible composite"
POISONING += " poison_ink dfst feature_collision"


@pytest.mark.parametrize(
    "name, args",
    [
        *each(f"{POISONING} latent", "--target", 10),
        *each(f"{POISONING} latent", "--target", -1),
        *(case for rate in (0, -0.1, 1.5, "nan") for case in each(POISONING, "--rate", rate)),
        *each(POISONING, "--rate", 0.0001),  # not one image: an attack that does nothing
        *each("badnets blend", "--rate", 1),  # more than the images outside the target class
        *each("badnets", "--patch-size", 0),
        *each("badnets", "--patch-size", 29),
        *each("badnets", "--row", 1),  # a 3x3 patch ends at row 2 or later
        *each("badnets", "--column", 28),
        *each("wanet", "--rate", 0.5),  # with cross-ratio 2 more than the batch
        *each("wanet", "--cross-ratio", -1),
        *each("wanet", "--cross-ratio", "nan"),
        *each("wanet", "--k", 0),
        *each("wanet", "--k", 29),  # finer than the pixels
        *each("wanet", "--s", "nan"),
        *each("blend", "--alpha", 0.001),  # rounding removes it
        *each("pruning_aware", "--arch", "airbench"),
    ],
    ids=str,
)
def test_bad_flag_of_an_attack(refused, name, args):
    refused(name, *args)


def bomb(path):
    """An .npz whose labels are pickled objects."""
    write_npz(path, y_train=np.array([explosive(path.parent)] * 30, dtype=object))


def truncated(path):
    path.write_bytes(write_npz(path).read_bytes()[:4000])


def no_images(path):
    empty = np.zeros((0, 28, 28), np.uint8), np.zeros(0, np.int64)
    write_npz(path, x_train=empty[0], y_train=empty[1], x_test=empty[0], y_test=empty[1])


BAD_NPZ = {
    "one-class": (lambda path: write_npz(path, classes=1), "class"),
    "no-images": (no_images, "image"),
    "truncated": (truncated, "npz"),
    "text": (lambda path: path.write_text("not an archive"), "npz"),
    "bomb": (bomb, "npz"),
    "negative-label": (lambda path: write_npz(path, y_train=np.arange(30) % 3 - 1), "label"),
    "two-channels": (lambda path: write_npz(path, shape=(28, 28, 2)), "channels"),
}


@pytest.mark.parametrize(
    "name, write, named", shared("badnets", ATTACKS, [*BAD_NPZ.values()], [*BAD_NPZ])
)
def test_bad_npz(refused, tmp_path, name, write, named):
    write(tmp_path / "own.npz")
    assert named in refused(name, "--dataset", "own.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", [*POISONING.split(), "latent"])
def test_test_images_of_the_target_class_alone(refused, tmp_path, name):
    """No image counts for the ASR."""
    write_npz(tmp_path / "own.npz", y_test=np.zeros(30, np.int64))
    assert "target class" in refused(name, "--dataset", "own.npz", "--train-images", 30)


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below"])
def test_output_path_that_cannot_be_written(refused, tmp_path, name, out):
    (tmp_path / "file").write_text("in the way")
    assert "file" in refused(name, "--out", out)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("name", ATTACKS)
def test_nan_keeps_no_model_even_in_the_last_step(refused, name):
    """With a single step the loss is still finite when the weights overflow."""
    refused(name, "--train-images", 128, "--lr", "1e38")


def test_nan_loss_leaves_an_earlier_run_alone(inline, one_line, tmp_path):
    flags = *SHORT["clean"], "--out", "kept"
    inline("clean", *flags)
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    assert "try a smaller --lr" in one_line(inline, "clean", *flags, "--lr", "1e30")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


@pytest.mark.parametrize("name", ["badnets", "blend", "wanet", "input_aware"])
@pytest.mark.parametrize("shape, classes", [((28, 28), 3), ((28, 28), 4), ((32, 32), 3)], ids=str)
def test_control_of_other_data(refused, inline, tmp_path, name, shape, classes):
    """Another own.npz beside it: its model's figures would be wrong, or a crash after training."""
    flags = "--epochs", 1, "--train-images", 30, "--batch-size", 10
    write_npz(tmp_path / "own.npz")
    inline("clean", *flags, "--dataset", "own.npz")
    (tmp_path / "other").mkdir()
    write_npz(tmp_path / "other" / "own.npz", shape, classes)
    assert "was trained on" in refused(name, *flags, "--dataset", "other/own.npz")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["own-mnist_cnn-clean-s0"]


def test_damaged_control_does_not_cost_the_trained_model(inline, tmp_path, capfd):
    """The clean model beside the folder is only a comparison: refuse early or go without."""
    control = tmp_path / "runs" / "digits-mnist_cnn-clean-s0"
    control.mkdir(parents=True)
    (control / "model.pt").write_bytes(b"damaged")
    with contextlib.suppress(SystemExit):
        inline("badnets", *SHORT["badnets"])
    trained = "epoch 1/1" in capfd.readouterr().out
    victim = tmp_path / "runs" / "digits-mnist_cnn-badnets-s0"
    assert (victim / "model.pt").exists() or not trained


CLEAN = [
    ("label_consistent", "--surrogate"),
    ("feature_collision", "--surrogate"),
    ("latent", "--teacher"),
]


@pytest.mark.parametrize("name, flag", CLEAN)
@pytest.mark.parametrize("shape, classes", [((28, 28), 3), ((28, 28), 4), ((32, 32), 3)], ids=str)
def test_clean_network_of_other_data(
    inline, one_line, monkeypatch, tmp_path, name, flag, shape, classes
):
    write_npz(tmp_path / "own.npz")
    inline("clean", "--epochs", 1, "--dataset", "own.npz", "--out", "control")
    write_npz(tmp_path / "other.npz", shape, classes)
    before = files_below(tmp_path)
    monkeypatch.setattr(torch.optim, "SGD", None)
    message = one_line(inline, name, "--dataset", "other.npz", "--epochs", 1, flag, "control")
    assert "control/model.pt was trained on " in message and files_below(tmp_path) == before


@pytest.mark.parametrize("name, flag", CLEAN[1:])
def test_clean_network_of_another_architecture(inline, one_line, tmp_path, name, flag):
    """The victim starts from it, so that --arch must name it; with --arch it is taken."""
    inline("clean", "--epochs", 1, "--train-images", 300, "--arch", "mnist_conv5", "--out", "own")
    before = files_below(tmp_path)
    message = one_line(inline, name, *SHORT[name], flag, "own")
    assert "pass --arch mnist_conv5" in message and files_below(tmp_path) == before
    inline(name, *SHORT[name], flag, "own", "--arch", "mnist_conv5", "--out", "out")
    saved = checkpoint.read_checkpoint(tmp_path / "out" / "model.pt")
    checkpoint.load_model(saved, "out", torch.device("cpu"))


@pytest.mark.parametrize(
    "name", ["freq_backdoor", "pruning_aware", "label_consistent", "feature_collision", "latent"]
)
def test_output_path_is_tried_before_any_training(refused, monkeypatch, tmp_path, name):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(torch.optim, "SGD", None)  # nothing can be trained
    refused(name, "--out", "file")


@pytest.mark.parametrize("name", ["clean", "freq_backdoor"])  # the fewest and the most imports
def test_refusal_in_a_fresh_process(name, tmp_path):
    """The exit code and the single line as a shell sees them, warnings included."""
    run = run_script(name, "--dataset", "imagenet", cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and run.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def interrupt(folder, ready, name, *args):
    """Start a script in `folder` and send what Ctrl-C sends once ready(process) is true."""
    process = subprocess.Popen(
        script_command(name, *args),
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a background shell may have switched the interrupt off for its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not ready(process):
            assert process.poll() is None
        for _ in range(20):  # again where a library's bare `except:` swallowed it while importing
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=3)
                break
    finally:
        process.kill()
    assert process.returncode != 0


def test_interrupt_leaves_no_file(tmp_path):
    """One attack stands for all: they write whole files, test_siblings.py."""

    def trains(process):
        return "epoch" in process.stdout.readline()

    interrupt(tmp_path, trains, "badnets", "--epochs", 29)  # below 30 every epoch is printed
    assert files_below(tmp_path) == []


# ===== Defences =====


@pytest.fixture
def suspect(tmp_path, untrained):
    """A checkpoint of digits as an attack would write it, in `victim`; returns model.pt.

    The network says 1 of every image, so that for nc_mitigate.py any trigger of label 1 works.
    """
    untrained.net.linear9.bias[1] += 100
    data = load_dataset("digits", "data", "cpu")
    (tmp_path / "victim").mkdir()
    checkpoint.save_model(tmp_path / "victim", untrained, data, "mnist_cnn", Namespace(), {})
    (tmp_path / "victim" / "nc-s0").mkdir()  # for nc_mitigate
    reversed_triggers = dict.fromkeys(("masks", "patterns"), np.zeros((10, 1, 28, 28), np.float32))
    reversed_triggers["network"] = checkpoint.fingerprint(untrained)
    np.savez(tmp_path / "victim" / "nc-s0" / "reversed.npz", **reversed_triggers)
    return tmp_path / "victim" / "model.pt"


@pytest.mark.parametrize("name", ["strip", "nc_mitigate"])
def test_a_suspect_is_refused_for_nothing_but_its_faults(inline, unread, suspect, name):
    inline(name, "--ckpt", suspect.parent, *SHORT[name])
    assert (suspect.parent / f"{name}-s0" / "result.json").exists()


EVERY = [*DEFENCES, *FURTHER]
every_defence = pytest.mark.parametrize("name", EVERY)
RESIDUAL = "--pretrain-residual"
REST = " ".join(name for name in DEFENCES if name not in DETECTORS)
OTHER_WORDS = {"--repair-fraction": "share", "1e30": "diverged", 0.0001: "kept back"}


@pytest.mark.parametrize(
    "name, args",
    [
        *(
            case
            for flags, values in {
                "--steps --batch-size --lr --labels-at-once --threshold": (0, -1),
                "--lr --threshold": ("nan", "inf", "1e38"),
                "--data-fraction": (0, 2, -0.1, "nan"),
            }.items()
            for flag in flags.split()
            for value in values
            for case in each("nc generator_reverse", flag, value)
        ),
        *each("nc generator_reverse", "--device", "abacus"),
        *each("nc generator_reverse", "--rule", "x"),
        *each("nc generator_reverse", "--out", "victim"),  # its files would be replaced
        *each("nc generator_reverse", "--out", "victim/model.pt"),
        *each("nc generator_reverse", "--out", "victim/model.pt/below"),
        *each("nc generator_reverse", "--dataset", "nowhere.npz"),
        *each("nc generator_reverse", "--dataset", "imagenet"),
        *each("nc", "--batches", 0),
        *each("nc", "--unlearn-lr", 0),
        *(case for share in (0, 1.5, "nan") for case in each("nc", "--stamped", share)),
        *each("generator_reverse", "--width", 0),
        *each("generator_reverse", "--width", 6),  # four groups in GroupNorm
        *each(f"{REST} abl nc_mitigate", "--out", "victim/model.pt/below"),
        *each("generator_reverse", "--pretrain-steps", 0),
        *each("generator_reverse", "--asr-goal", 0),
        *each("generator_reverse", "--asr-goal", 80),
        *each("generator_reverse", "--lambdas", -1, 1, 1),
        *each("generator_reverse", "--lambdas", 0.1, "nan", 1),
        *each("generator_reverse", "--repair-epochs", 0),
        *each("generator_reverse", "--repair-lr", 0),
        *each("generator_reverse", "--repair-fraction", 0.5, 0),
        *each("generator_reverse", "--repair-fraction", 2),
        *each("generator_reverse", "--lr", "1e30"),
        *(case for goal in (0, -1, "nan") for case in each("generator_reverse", RESIDUAL, goal)),
        *(case for flag in ("--epochs", "--batch-size", "--lr") for case in each("mcr", flag, 0)),
        *each("abl fine_pruning finetune mcr nad", "--batch-size", 1),
        *(case for points in (2, 1002, 10**12) for case in each("mcr", "--points", points)),
        *(case for drop in (0, "nan") for case in each("mcr nad", "--max-drop", drop)),
        *(case for drop in (0, "nan") for case in each("fine_pruning", "--repair-drop", drop)),
        *each("mcr", "--second", "nowhere"),
        *each("mcr", "--data-fraction", 0.0001),  # every image is kept back
        *each("mcr", "--lr", "1e30"),
        *each("strip nc_mitigate", "--arch", "mnist_conv5"),
        *each("strip nc_mitigate", "--std", 0.3),
        *each("finetune", "--lrs", "1e14", "1e15"),
    ],
    ids=str,
)
def test_bad_flag_of_a_defence(refused, suspect, name, args):
    before = suspect.read_bytes()
    message = refused(name, "--ckpt", suspect.parent, *args)
    words = [arg for arg in args[:2] if isinstance(arg, str)]  # the flag or what it names
    words += [word for key, word in OTHER_WORDS.items() if key in args]
    assert any(word in message for word in words)
    assert suspect.read_bytes() == before


def changed(**entries):
    """Rewrite a checkpoint with other entries."""

    def change(path):
        torch.save(torch.load(path, weights_only=True) | entries, path)

    return change


def poisoned_weight(value):
    def change(path):
        held = torch.load(path, weights_only=True)
        held["state_dict"]["net.conv1.weight"][0, 0, 1, 1] = value
        torch.save(held, path)

    return change


BAD_CHECKPOINTS = {
    "missing": (lambda path: path.unlink(), "no such checkpoint"),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:9999]), "readable"),
    "empty": (lambda path: path.write_bytes(b""), "readable"),
    "bomb": (
        lambda path: torch.save({"format": 1, "x": explosive(path.parents[1])}, path),
        "it was not executed",
    ),
    "other architecture": (changed(arch="vgg16"), "does not fit vgg16"),
    "wrong class count": (changed(classes=7), "7 classes"),
    "other images": (changed(image_shape=[1, 32, 32]), "was trained on 10 classes of (1, 32, 32)"),
    "colour images": (changed(image_shape=[3, 28, 28]), "image_shape [3, 28, 28]"),
    "architecture is a list": (changed(arch=["mnist_cnn"]), "entry 'arch'"),
    "no number of classes": (changed(classes="ten"), "entry 'classes'"),
    "negative class count": (changed(classes=-1), "-1 classes"),
    "class count without end": (changed(classes=10**12), f"{10**12} classes"),
    "no mean": (changed(mean=None), "entry 'mean'"),
    "mean in words": (changed(mean="half"), "entry 'mean'"),
    "shape is a number": (changed(image_shape=28), "entry 'image_shape'"),
    "shape without channels": (changed(image_shape=[28, 28]), "image_shape [28, 28]"),
    "no shape": (changed(image_shape=[]), "image_shape []"),
    "sides in words": (changed(image_shape=[1, "28", "28"]), "image_shape [1, '28', '28']"),
    "format is a tensor": (changed(format=torch.zeros(9)), "another checkpoint format"),
    "NaN": (poisoned_weight(float("nan")), "not finite"),
    "infinity": (poisoned_weight(float("inf")), "not finite"),
    "bomb beside it": (
        lambda path: np.savez(
            path.with_name("poisoned_test.npz"), x=np.array([explosive(path.parents[1])] * 2)
        ),
        "poisoned_test.npz",
    ),
}


@pytest.mark.parametrize(
    "name, spoil, named", shared("strip", EVERY, [*BAD_CHECKPOINTS.values()], [*BAD_CHECKPOINTS])
)
def test_bad_checkpoint(refused, suspect, tmp_path, name, spoil, named):
    spoil(suspect)
    assert named in refused(name, "--ckpt", suspect.parent)
    assert not (tmp_path / "exploded").exists()


BARE = [
    ([], "pass --arch and --dataset"),
    (["--arch", "mnist_cnn"], "pass --arch and --dataset"),
    (["--arch", "vgg16", "--dataset", "digits"], "does not fit vgg16"),
    (["--arch", "resnet9000", "--dataset", "digits"], "resnet9000"),
    (["--arch", "mnist_cnn", "--dataset", "own.npz"], "does not fit mnist_cnn"),
    (["--arch", "mnist_cnn", "--dataset", "digits", "--std", 0], "--std above 0"),
    (["--arch", "mnist_cnn", "--dataset", "digits", "--mean", "nan"], "--mean must be finite"),
    (["--arch", "mnist_cnn", "--dataset", "digits", "--mean", 0.1, 0.2, 0.3], "channels"),
]


@pytest.mark.parametrize(
    "name, flags, named",
    shared("strip", EVERY, BARE, [" ".join(map(str, flags)) for flags, _ in BARE]),
)
def test_bare_state_dict_of_another_kind(refused, tmp_path, untrained, name, flags, named):
    write_npz(tmp_path / "own.npz", (64, 64), 10)
    torch.save(untrained.net.state_dict(), tmp_path / "suspect.pt")
    assert named in refused(name, "--ckpt", "suspect.pt", *flags)


OTHER_IMAGES = [((32, 32), 10), ((28, 28), 7)]


@pytest.mark.parametrize(
    "name, shape, classes", shared("strip", EVERY, OTHER_IMAGES, ["larger", "fewer classes"])
)
def test_images_that_the_model_was_not_trained_on(refused, suspect, tmp_path, name, shape, classes):
    write_npz(tmp_path / "own.npz", shape, classes)
    assert "was trained on 10 classes of (1, 28, 28)" in refused(
        name, "--ckpt", suspect, "--dataset", "own.npz"
    )


@every_defence
def test_out_is_another_victim(refused, suspect, tmp_path, name):
    """Its result.json names no --ckpt; what attacks really write: test_checkpoint.py."""
    (tmp_path / "other").mkdir()
    shutil.copy(suspect, tmp_path / "other")
    (tmp_path / "other" / "result.json").write_text('{"script": "clean", "arguments": {}}')
    before = {path: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert "an attack's folder" in refused(name, "--ckpt", suspect, "--out", tmp_path / "other")
    assert {path: path.read_bytes() for path in (tmp_path / "other").iterdir()} == before


@pytest.mark.parametrize("name", ["nc", "abl"])
def test_interrupted_defence_leaves_no_file(name, digits_clean, tmp_path):
    (tmp_path / "victim").mkdir()
    shutil.copy(digits_clean / "model.pt", tmp_path / "victim")

    def searches(process):
        time.sleep(0.05)
        return (tmp_path / "audit").exists()

    before = files_below(tmp_path)
    flags = "--ckpt", "victim", "--out", "audit", *TRAIN_SET.get(name, ())
    interrupt(tmp_path, searches, name, *flags)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", ["strip", "generator_reverse"])
def test_defence_refuses_in_a_fresh_process(name, tmp_path):
    run = run_script(name, "--ckpt", "nowhere", cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and "no such checkpoint" in run.stderr
    assert list(tmp_path.iterdir()) == []
