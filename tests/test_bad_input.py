"""Whatever is wrong with the input: one line on stderr, exit code 2, nothing written."""

import contextlib
import os
import signal
import subprocess

import numpy as np
import pytest
from conftest import files_below, run_script, script_command, write_npz

ATTACKS = ["clean", "badnets", "wanet"]
SHORT = "--epochs", 1, "--train-images", 300


@pytest.fixture
def refused(inline, one_line, tmp_path):
    """Run a script inline with bad arguments; checks the refusal, returns its line."""

    def run(name, *args):
        before = files_below(tmp_path)
        message = one_line(inline, name, *SHORT, *args)
        assert files_below(tmp_path) == before
        return message

    return run


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    "args, named",
    [
        (["--dataset", "imagenet"], "imagenet"),
        (["--arch", "resnet9000"], "resnet9000"),
        (["--device", "abacus"], "abacus"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--dataset", "nowhere/none.npz"], "none.npz"),
        (["--batch-size", 0], "batch"),
        (["--epochs", -1], "epochs"),
        (["--train-images", 0], "train-images"),
        (["--lr", "1e30"], "loss"),
        (["--lr", "nan"], "nan"),
    ],
    ids=str,
)
def test_bad_general_flag(refused, name, args, named):
    assert named in refused(name, *args)


def each(names, *args):
    return [(name, args) for name in names.split()]


POISONING = "badnets wanet"


@pytest.mark.parametrize(
    "name, args",
    [
        *each(POISONING, "--target", 10),
        *each(POISONING, "--target", -1),
        *(case for rate in (0, -0.1, 1.5, "nan") for case in each(POISONING, "--rate", rate)),
        *each(POISONING, "--rate", 0.0001),  # not one image: an attack that does nothing
        *each("badnets", "--rate", 1),  # more than the images outside the target class
        *each("badnets", "--patch-size", 0),
        *each("badnets", "--patch-size", 29),
        *each("badnets", "--row", 1),  # a 3x3 patch ends at row 2 or later
        *each("badnets", "--column", 28),
        *each("wanet", "--rate", 0.5),  # with cross-ratio 2 more than the batch
        *each("wanet", "--cross-ratio", -1),
        *each("wanet", "--cross-ratio", "nan"),
        *each("wanet", "--k", 0),
        *each("wanet", "--s", "nan"),
    ],
    ids=str,
)
def test_bad_flag_of_an_attack(refused, name, args):
    refused(name, *args)


def bomb(path):
    """An .npz whose labels are pickled objects that would leave a file behind."""
    exploded = path.with_name("exploded")
    call = type("Bomb", (), {"__reduce__": lambda self: (open, (str(exploded), "w"))})
    write_npz(path, y_train=np.array([call()] * 30, dtype=object))


def truncated(path):
    path.write_bytes(write_npz(path).read_bytes()[:4000])


def no_images(path):
    empty = np.zeros((0, 28, 28), np.uint8), np.zeros(0, np.int64)
    write_npz(path, x_train=empty[0], y_train=empty[1], x_test=empty[0], y_test=empty[1])


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(
    "write, named",
    [
        (lambda path: write_npz(path, classes=1), "class"),
        (no_images, "image"),
        (truncated, "npz"),
        (lambda path: path.write_text("not an archive"), "npz"),
        (bomb, "npz"),
        (lambda path: write_npz(path, y_train=np.arange(30) % 3 - 1), "label"),
        (lambda path: write_npz(path, shape=(28, 28, 2)), "channels"),
    ],
    ids=["one-class", "no-images", "truncated", "text", "bomb", "negative-label", "two-channels"],
)
def test_bad_npz(refused, tmp_path, name, write, named):
    write(tmp_path / "own.npz")
    assert named in refused(name, "--dataset", "own.npz")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", POISONING.split())
def test_test_images_of_the_target_class_alone(refused, tmp_path, name):
    """No image counts for the ASR."""
    write_npz(tmp_path / "own.npz", y_test=np.zeros(30, np.int64))
    refused(name, "--dataset", "own.npz")


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
    inline("clean", *SHORT, "--out", "kept")
    before = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    one_line(inline, "clean", *SHORT, "--out", "kept", "--lr", "1e30")
    assert {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()} == before


def test_damaged_control_does_not_cost_the_trained_model(inline, tmp_path, capfd):
    """The clean model beside the folder is only a comparison: refuse early or go without."""
    control = tmp_path / "runs" / "digits-mnist_cnn-clean-s0"
    control.mkdir(parents=True)
    (control / "model.pt").write_bytes(b"damaged")
    with contextlib.suppress(SystemExit):
        inline("badnets", *SHORT)
    trained = "epoch 1/1" in capfd.readouterr().out
    victim = tmp_path / "runs" / "digits-mnist_cnn-badnets-s0"
    assert (victim / "model.pt").exists() or not trained


@pytest.mark.parametrize("name", ATTACKS)
def test_refusal_in_a_fresh_process(name, tmp_path):
    """The exit code and the single line as a shell sees them, warnings included."""
    run = run_script(name, "--dataset", "imagenet", cwd=tmp_path)
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.splitlines()) == 1 and run.stderr.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ATTACKS)
def test_interrupt_leaves_no_file(name, tmp_path):
    process = subprocess.Popen(
        script_command(name, "--epochs", 29),  # below 30 every epoch is printed
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a background shell may have switched the interrupt off for its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while "epoch" not in process.stdout.readline():  # it trains
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode != 0
    assert files_below(tmp_path) == []
