"""Helpers and the victims that several test files share (made once per run of pytest)."""

import contextlib
import copy
import fcntl
import functools
import io
import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from argparse import Namespace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported anywhere
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

from common import datasets, defence  # noqa: E402
from common.checkpoint import fingerprint, load_model, load_victim, read_checkpoint  # noqa: E402
from common.datasets import load_dataset, to_float  # noqa: E402
from common.metrics import predict  # noqa: E402
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
    "sig",
    "issba",
    "label_consistent",
    "trojannn",
    "invisible",
    "composite",
    "poison_ink",
    "dfst",
    "feature_collision",
    "latent",
]
DETECTORS = ["nc", "generator_reverse"]  # of models: a verdict, reversed triggers
DEFENCES = [*DETECTORS, "strip", "fine_pruning", "finetune", "nad", "mcr"]  # of any checkpoint
DEFENCES += ["purify", "gradcam", "sentinet"]
FURTHER = ["abl", "nc_mitigate"]  # want something beside it: a training set, nc.py's folder
DIGITS = datasets.digits()  # a tenth of a second, in each of a thousand runs
datasets.digits = lambda: [array.copy() for array in DIGITS]
SHORT = {name: ["--epochs", 1, "--train-images", 300] for name in ATTACKS}  # a quick run
SHORT["input_aware"] += ["--mask-steps", 2]
SHORT["stealthy_adversarial"] += ["--injecting-epochs", 1, "--nc-steps", 2]
SHORT["freq_backdoor"] += ["--heat-images", 5, "--autoencoder-steps", 2]
SHORT["pruning_aware"] += ["--batch-size", 16, "--max-drop", 2]  # or no channel is left
SHORT["issba"] += ["--encoder-steps", 2, "--width", 4]
SHORT["label_consistent"] += ["--steps", 2]
SHORT["trojannn"] += ["--steps", 2, "--retrain-epochs", 1]
SHORT["invisible"] += ["--steps", 2]
SHORT["poison_ink"] += ["--encoder-steps", 1, "--width", 4, "--threshold", 5]
SHORT["dfst"] += ["--generator-steps", 2, "--width", 4, "--rounds", 1]
SHORT["dfst"] += ["--injector-steps", 2, "--detox-epochs", 1]
SHORT["feature_collision"] += ["--steps", 2, "--retrain-epochs", 1]
SHORT["latent"] += ["--steps", 2, "--inject-epochs", 1, "--student-epochs", 1]
SHORT["nc"] = ["--steps", 2, "--batches", 1]
SHORT["generator_reverse"] = ["--steps", 2, "--pretrain-steps", 2, "--repair-epochs", 1]
SHORT["generator_reverse"] += ["--width", 4, "--lpips-net", "none"]
SHORT["strip"] = ["--overlays", 10, "--inputs", 50]
SHORT["fine_pruning"] = ["--epochs", 1]
SHORT["mcr"] = ["--epochs", 1, "--points", 3]
SHORT["purify"] = ["--autoencoder-steps", 2]
SHORT["finetune"] = ["--epochs", 1, "--lrs", 1e-4, 0.01]
SHORT["nad"] = ["--epochs", 1, "--teacher-epochs", 1, "--lr", 0.001]
SHORT["gradcam"] = ["--inputs", 50, "--februus"]
SHORT["nc_mitigate"] = ["--label", 1]
SHORT["sentinet"] = ["--overlays", 5, "--fit-images", 30, "--inputs", 20]
SHORT["abl"] = ["--isolation-epochs", 1, "--epochs", 1, "--unlearn-steps", 2]


def pytest_addoption(parser, pluginmanager):
    """pyproject.toml's options, where pytest-xdist is missing or switched off (-p no:xdist)."""
    if not pluginmanager.hasplugin("xdist"):
        for option in ("--numprocesses", "--dist"):
            parser.addoption(option, help="needs pytest-xdist")
        parser.addoption("--no-loadscope-reorder", action="store_true", help="needs pytest-xdist")


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
    absent = dict.fromkeys(["out", "arch", "dataset", "mean", "std", "classes", "image_size"]) | {
        "data_dir": "data"
    }
    return load_victim(Namespace(ckpt=str(path), **(absent | flags)), torch.device("cpu"))


def reread(folder, victim, data):
    """The model that a repair saved in `folder`; its figures are those of the folder's result."""
    saved = load_model(read_checkpoint(folder / "model.pt"), folder, torch.device("cpu"))
    with np.load(victim / "poisoned_test.npz") as archive:
        x = torch.from_numpy(archive["x"]).permute(0, 3, 1, 2)
        hits = 100 * (predict(saved, x).numpy() == archive["y_target"]).mean()
    right = 100 * (predict(saved, data.x_test) == data.y_test).double().mean().item()
    metrics = result_of(folder)["metrics"]
    assert hits == pytest.approx(metrics["asr_repaired"], abs=1e-4)
    assert right == pytest.approx(metrics["clean_accuracy_repaired"], abs=1e-4)
    return saved


def tuned_by_hand(model, x, y):
    """Weights of a copy of `model` after two steps of 20 of the 40 images x (uint8).

    v = .9 v + g + .0005 w; w -= lr v; the rate falls from .05 by a cosine: all of it, then half.
    """
    torch.manual_seed(5)
    expected = copy.deepcopy(model).requires_grad_(True).train()
    weights = list(expected.parameters())
    velocity = [torch.zeros_like(w) for w in weights]
    for batch, rate in zip(torch.randperm(40).split(20), (0.05, 0.025)):
        loss = F.cross_entropy(expected(to_float(x[batch])), y[batch])
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, v, g in zip(weights, velocity, gradients):
                v.mul_(0.9).add_(g + 5e-4 * w)
                w -= rate * v
    return [w.detach() for w in weights]


def files_below(folder):
    """Names of all files, hidden and temporary ones too, anywhere below `folder`."""
    return sorted(path.name for path in Path(folder).rglob("*") if not path.is_dir())


def whole_image_trigger(victim):
    """In nc.py's folder: every input becomes one image, whose label is then reached; nc_mitigate's
    flag. Networks that were hardly trained have no trigger that works."""
    found = loaded(victim)
    image, (_, height, width) = found.data.x_test[:1], found.data.shape
    patterns = np.repeat(image.numpy() / np.float32(255), found.data.classes, 0)
    masks = np.ones((found.data.classes, 1, height, width), np.float32)
    arrays = {"masks": masks, "patterns": patterns, "network": fingerprint(found.model)}
    np.savez(victim / "nc-s0" / "reversed.npz", **arrays)
    return ["--label", predict(found.model, image).item()]


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


def run_inline(patch, cwd, name, *args):
    """Run methods/<name>.py inside this process, in `cwd`; returns its global variables.

    Skips the seconds that a fresh interpreter needs to import torch, torchmetrics and the like.
    """
    command = script_command(name, *args)[1:]
    patch.chdir(cwd)
    patch.setattr(sys, "argv", command)
    patch.setattr(sys, "path", list(sys.path))
    return runpy.run_path(command[0], run_name="__main__")


def run_here(name, *args, cwd):
    """run_script, but inside this process: what it prints, for a run that must succeed."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        run_inline(patch, cwd, name, *args)
    return output.getvalue()


def blank(figure, path, **settings):
    """What a figure leaves where nobody looks at it: a fifth of a second less, a thousand times."""
    Image.new("L", (9, 9)).save(path, "PNG")


@pytest.fixture(autouse=True)
def figures(request, monkeypatch):
    """Tests draw their figures only where they are marked `drawn`; so do fixtures of a session."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr(Figure, "savefig", blank)
        monkeypatch.setattr(Figure, "tight_layout", lambda *args, **settings: None)


@pytest.fixture
def unread(monkeypatch):
    """Defences take networks near chance, too: what follows is tested without training one."""
    monkeypatch.setattr(defence, "check_reading", lambda *args: None)


@pytest.fixture
def inline(tmp_path, monkeypatch):
    """run_inline in tmp_path."""
    return functools.partial(run_inline, monkeypatch, tmp_path)


@pytest.fixture
def one_line(capfd):
    """Call something that must refuse its input: exit code 2, one line on stderr, no traceback.

    A line of torch's own that announces a download does not count.
    """

    def check(call, *args, **kwargs):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*args, **kwargs)
        message = re.sub("^Downloading: .*\n", "", capfd.readouterr().err)
        assert stop.value.code == 2
        assert len(message.splitlines()) == 1 and message.startswith("error: "), message
        return message

    return check


def made_once(path, make):
    """Call make() in the first process that asks for `path`; the others wait for it.

    A failure is raised in all of them. The lock of a process that dies goes to the next one.
    """
    failure = path.with_suffix(".failure")
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not failure.exists():
            try:
                make()
                failure.write_text("")
            except (Exception, SystemExit):
                failure.write_text(traceback.format_exc())
    if failure.read_text():
        raise RuntimeError(f"{path.name} was not made: {failure.read_text()}")


@pytest.fixture(scope="session")
def victims(tmp_path_factory, request):
    """Train one script on digits; all in one directory, so that attacks find their control.

    The workers of pytest-xdist share the directory.
    """
    base = tmp_path_factory.getbasetemp()
    cwd = (base.parent if hasattr(request.config, "workerinput") else base) / "victims"
    cwd.mkdir(exist_ok=True)

    def train(name, *args):
        folder = cwd / "runs" / f"digits-mnist_cnn-{name}-s0"

        def run():
            output = run_here(name, *args, cwd=cwd)
            (folder / "stdout.txt").write_text(output)

        made_once(cwd / name, run)
        return folder

    return train


@pytest.fixture(scope="session")
def digits_clean(victims):
    """Checkpoint folder of a clean model."""
    return victims("clean", "--epochs", 15)


@pytest.fixture(scope="session")
def digits_badnets(victims, digits_clean):
    """Checkpoint folder of a BadNets model with target 0; its control lies beside it."""
    return victims("badnets", "--epochs", 15)


@pytest.fixture(scope="session")
def digits_wanet(victims, digits_clean):
    """Checkpoint folder of a WaNet model with target 0, s = 2; its control lies beside it.

    A wide warp of many images is learnt in a third of the epochs.
    """
    return victims("wanet", "--s", 2.0, "--rate", 0.2, "--epochs", 40)


@pytest.fixture(scope="session")
def digits_blend(victims, digits_clean):
    """Checkpoint folder of a Blend model with target 0, a noise picture; its control beside it."""
    return victims("blend", "--epochs", 15)


@pytest.fixture(scope="session")
def digits_input_aware(victims, digits_clean):
    """Checkpoint folder of an input-aware model with target 0; its control lies beside it."""
    return victims("input_aware", "--epochs", 14, "--mask-steps", 60, "--lr", 0.07)


@pytest.fixture(scope="session")
def digits_freq_backdoor(victims):
    """Checkpoint folder of a frequency-domain model with target 0 that adds to its bins."""
    flags = "--mode", "add", "--no-crops", "--epochs", 6, "--batch-size", 64, "--lr", 0.05
    return victims("freq_backdoor", *flags, "--heat-images", 30, "--autoencoder-steps", 10)


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
