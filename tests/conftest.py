"""Helpers and the victims that several test files share (made once per test session)."""

import json
import os
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from common.checkpoint import load_victim  # noqa: E402
from common.datasets import load_dataset  # noqa: E402
from common.models import build_model  # noqa: E402

ATTACKS = [
    "clean",
    "badnets",
    "wanet",
    "blend",
    "input_aware",
    "stealthy_adversarial",
    "freq_backdoor",
    "pruning_aware",
]
DETECTORS = ["nc", "generator_reverse"]  # of models: a verdict, reversed triggers
DEFENCES = [*DETECTORS, "strip", "fine_pruning"]  # of any checkpoint; abl wants a training set
SHORT = {name: ["--epochs", 1, "--train-images", 300] for name in ATTACKS}  # a quick run
SHORT["input_aware"] += ["--mask-steps", 2]
SHORT["stealthy_adversarial"] += ["--injecting-epochs", 1, "--nc-steps", 2]
SHORT["freq_backdoor"] += ["--heat-images", 20]
SHORT["pruning_aware"] += ["--batch-size", 16, "--max-drop", 2]  # or no channel is left
SHORT["nc"] = ["--steps", 2, "--batches", 1]
SHORT["generator_reverse"] = ["--steps", 2, "--pretrain-steps", 2, "--lpips-net", "none"]
SHORT["strip"] = SHORT["fine_pruning"] = []
SHORT["abl"] = ["--isolation-epochs", 1, "--epochs", 1, "--unlearn-steps", 2]


def script_command(name, *args):
    return [sys.executable, str(ROOT / "methods" / f"{name}.py"), *map(str, args)]


def run_script(name, *args, cwd):
    """Run methods/<name>.py in `cwd` as a user would; CompletedProcess with text output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        script_command(name, *args), cwd=cwd, env=environment, capture_output=True, text=True
    )


def result_of(folder):
    """The contents of a checkpoint folder's result.json."""
    return json.loads((Path(folder) / "result.json").read_text())


def loaded(path, **flags):
    """The Victim that a defence gets from `--ckpt path` and its other flags."""
    absent = dict.fromkeys(["out", "arch", "dataset", "mean", "std"]) | {"data_dir": "data"}
    return load_victim(Namespace(ckpt=str(path), **(absent | flags)), torch.device("cpu"))


def files_below(folder):
    """Names of all files, hidden and temporary ones too, anywhere below `folder`."""
    return sorted(path.name for path in Path(folder).rglob("*") if not path.is_dir())


def random_images(count=6, shape=(3, 32, 32)):
    """uint8 noise, count x C x H x W."""
    x = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(0))
    return x.to(torch.uint8)


def explosive(folder):
    """An object that leaves a file in `folder` when it is unpickled."""
    exploded = folder / "exploded"
    return type("Bomb", (), {"__reduce__": lambda self: (open, (str(exploded), "w"))})()


def write_npz(path, shape=(28, 28), classes=3, count=30, **replaced):
    """A small learnable data set: noise whose brightness tells the class. Returns the path."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        y = np.arange(count) % classes
        noise = rng.integers(0, 60, (count, *shape))
        x = noise + (180 * y // max(1, classes - 1)).reshape(-1, *[1] * len(shape))
        arrays |= {f"x_{split}": x.astype(np.uint8), f"y_{split}": y}
    np.savez(path, **(arrays | replaced))
    return path


@pytest.fixture
def inline(tmp_path, monkeypatch):
    """Run a script inside this process, in tmp_path; returns its global variables.

    Skips the seconds that a fresh interpreter needs to import torch.
    """

    def run(name, *args):
        command = script_command(name, *args)[1:]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys, "path", list(sys.path))
        return runpy.run_path(command[0], run_name="__main__")

    return run


@pytest.fixture
def one_line(capfd):
    """Call something that must refuse its input: exit code 2, one line on stderr, no traceback."""

    def check(call, *args, **kwargs):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*args, **kwargs)
        message = capfd.readouterr().err
        assert stop.value.code == 2
        assert len(message.splitlines()) == 1 and "Traceback" not in message, message
        return message

    return check


@pytest.fixture(scope="session")
def victims(tmp_path_factory):
    """Train one script on digits; all in one directory, so that attacks find their control."""
    cwd = tmp_path_factory.mktemp("victims")

    def train(name, *args):
        run = run_script(name, *args, cwd=cwd)
        assert run.returncode == 0, run.stderr
        folder = cwd / "runs" / f"digits-mnist_cnn-{name}-s0"
        (folder / "stdout.txt").write_text(run.stdout)
        return folder

    return train


@pytest.fixture(scope="session")
def digits_clean(victims):
    """Checkpoint folder of a clean model."""
    return victims("clean", "--epochs", 25)


@pytest.fixture(scope="session")
def digits_badnets(victims, digits_clean):
    """Checkpoint folder of a BadNets model with target 0; its control lies beside it."""
    return victims("badnets", "--epochs", 25)


@pytest.fixture(scope="session")
def digits_wanet(victims, digits_clean):
    """Checkpoint folder of a WaNet model with target 0, s = 1; its control lies beside it."""
    return victims("wanet", "--s", 1.0)


@pytest.fixture(scope="session")
def digits_blend(victims, digits_clean):
    """Checkpoint folder of a Blend model with target 0, a noise picture; its control beside it."""
    return victims("blend", "--epochs", 25)


@pytest.fixture(scope="session")
def digits_input_aware(victims, digits_clean):
    """Checkpoint folder of an input-aware model with target 0; its control lies beside it."""
    return victims("input_aware", "--epochs", 30, "--mask-steps", 200)


@pytest.fixture(scope="session")
def digits_freq_backdoor(victims, digits_clean):
    """Checkpoint folder of a frequency-domain model with target 0; the map of `digits_clean`."""
    flags = "--epochs", 25, "--clean-ckpt", digits_clean, "--heat-images", 100
    return victims("freq_backdoor", *flags)


@pytest.fixture
def untrained():
    """A frozen mnist_cnn for digits, its weights as drawn."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def digits():
    return load_dataset("digits", "data", "cpu")


@pytest.fixture(scope="session")
def cifar10():
    """Every fifth CIFAR-10 test image, N x C x H x W floats, where data/cifar10.npz is at hand."""
    path = ROOT / "data" / "cifar10.npz"
    if not path.exists():
        pytest.skip("needs data/cifar10.npz")
    with np.load(path) as archive:
        return torch.from_numpy(archive["x_test"][::5]).permute(0, 3, 1, 2) / 255
