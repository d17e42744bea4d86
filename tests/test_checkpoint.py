"""The checkpoint folder: what an attack writes is what a defence gets."""

import json
import pickle
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, explosive, loaded, result_of, write_npz
from PIL import Image

from common import checkpoint as ckpt
from common import saved_figure
from common.datasets import Dataset, to_float
from common.defence import report
from common.metrics import accuracy
from common.models import build_model

CPU = torch.device("cpu")
ATTACKS = ["clean", "badnets", "wanet"]


@pytest.fixture(params=ATTACKS)
def folder(request):
    """The digits checkpoint of each attack in turn."""
    return request.getfixturevalue(f"digits_{request.param}")


def test_model_file_holds_tensors_and_plain_values(folder):
    held = torch.load(folder / "model.pt", weights_only=True)  # refuses anything else
    entries = "format state_dict arch softmax dataset classes image_shape mean std arguments"
    assert set(held) == {*entries.split(), "trigger", "metrics"}
    assert (held["arch"], held["dataset"], held["classes"]) == ("mnist_cnn", "digits", 10)
    assert held["image_shape"] == [1, 28, 28] and held["mean"] == held["std"] == [0.5]
    assert held["arguments"]["seed"] == 0 and held["metrics"] == result_of(folder)["metrics"]
    tensors = {"clean": set(), "badnets": {"mask", "pattern"}, "wanet": {"grid"}}
    assert set(held["trigger"]) == tensors[result_of(folder)["script"]]


def test_folder_round_trip_gives_the_reported_figures(folder):
    metrics = result_of(folder)["metrics"]
    for path in (folder, folder / "model.pt"):
        victim = loaded(path)
        assert accuracy(victim.model, victim.data.x_test, victim.data.y_test) == pytest.approx(
            metrics["clean_accuracy"], abs=1e-9
        )
        if "asr" in metrics:
            asr = accuracy(victim.model, victim.x_poisoned, victim.y_target)
            assert asr == pytest.approx(metrics["asr"], abs=1e-4)
        else:
            assert victim.x_poisoned is victim.y_true is victim.y_target is None
    assert not any(m.training for m in victim.model.modules())
    assert not any(p.requires_grad for p in victim.model.parameters())
    assert victim.folder == folder and victim.arch == "mnist_cnn"


@pytest.mark.parametrize("name", ["badnets", "wanet"])
def test_poisoned_test_images(request, digits, name):
    folder = request.getfixturevalue(f"digits_{name}")
    with np.load(folder / "poisoned_test.npz") as archive:
        x, y_true, y_target = (archive[key] for key in ("x", "y_true", "y_target"))
    others = digits.y_test.numpy() != 0
    assert x.dtype == np.uint8 and x.shape == (others.sum(), 28, 28, 1)
    np.testing.assert_array_equal(y_true, digits.y_test.numpy()[others])
    assert (y_target == 0).all() and not (y_true == 0).any()
    trigger = ckpt.read_checkpoint(folder / "model.pt")["trigger"]
    clean = digits.x_test[torch.from_numpy(others)]
    if name == "badnets":
        expected = np.where(trigger["mask"] == 1, trigger["pattern"], clean)
    else:  # rounded, not floored
        grid = trigger["grid"].expand(len(clean), -1, -1, -1)
        warped = torch.nn.functional.grid_sample(to_float(clean), grid, align_corners=True)
        expected = np.rint(warped.numpy() * 255)
    np.testing.assert_array_equal(x.transpose(0, 3, 1, 2), expected)


def test_files_of_each_attack(folder):
    script = result_of(folder)["script"]
    expected = {"model.pt", "result.json", "stdout.txt"}
    expected |= {"poisoned_test.npz", "samples.png"} if script != "clean" else set()
    expected |= {"poisoned_train.npz"} if script == "badnets" else set()
    assert {path.name for path in folder.iterdir()} == expected


def test_result_file_has_every_printed_figure(folder):
    result = result_of(folder)
    line = (folder / "stdout.txt").read_text().splitlines()[-1]
    assert line.startswith(f"RESULT {result['script']} ")
    printed = dict(re.findall(r"(\S+)=(\S+)", line))
    assert set(printed) == set(result["metrics"]) | {"seconds", "folder"}
    for key, value in result["metrics"].items():
        assert float(printed[key]) == pytest.approx(value, rel=1e-3)
    assert float(printed["seconds"]) == pytest.approx(result["seconds"], abs=1)
    assert {"dataset", "seed", "epochs", "lr", "arch"} <= set(result["arguments"])
    assert result["versions"]["torch"] == torch.__version__
    assert re.fullmatch(r"\d+ CPUs, \d+ threads", result["device"])


def test_a_new_run_leaves_nothing_of_an_older_one(tmp_path, inline):
    written = [
        name
        for script in (ROOT / "methods").glob("*.py")
        for name in re.findall(r'folder / "([^"]+)"', script.read_text())
    ]
    assert {"heatmap.png", "curve.npz", "entropies.png"} < set(written)
    (tmp_path / "out").mkdir()
    for name in written:
        (tmp_path / "out" / name).touch()
    short = "--epochs", 1, "--train-images", 200, "--out", tmp_path / "out"
    inline("badnets", *short)
    for name in ("nc-s0/reversed.npz", "nc-s0/notes.txt", "own/norms.png", "other/norms.png"):
        path = tmp_path / "out" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for name, of in (("nc-s0", "out"), ("own", "own"), ("other", "elsewhere")):
        text = json.dumps({"arguments": {"ckpt": str(tmp_path / of)}})
        (tmp_path / "out" / name / "result.json").write_text(text)
    inline("clean", *short)
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")}
    kept = {"model.pt", "result.json", "nc-s0/notes.txt", "own/norms.png", "own/result.json"}
    kept |= {"other/norms.png", "other/result.json"}  # of other checkpoints
    assert {path.as_posix() for path in files} == kept


def test_default_folder_name(tmp_path, inline):
    data = write_npz(tmp_path / "own.npz")
    inline("clean", "--dataset", data, "--epochs", 1, "--seed", 4)
    assert (tmp_path / "runs/own-mnist_cnn-clean-s4/model.pt").exists()


# ===== Bare state dicts =====


@pytest.fixture(scope="module")
def bare():
    """An untrained mnist_cnn, and its state dict as public code would save it."""
    torch.manual_seed(0)
    model = build_model("mnist_cnn", 10, (1, 28, 28), (0.5,), (0.5,)).eval()
    return model, model.net.state_dict()


@pytest.mark.parametrize("key", [None, "model", "state_dict", "netC", "net"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_bare_state_dict(tmp_path, bare, digits, key, prefix):
    model, state = bare
    state = {prefix + name: value for name, value in state.items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "public.pth")
    victim = loaded(tmp_path / "public.pth", arch="mnist_cnn", dataset="digits")
    x = to_float(digits.x_test[:9])
    torch.testing.assert_close(victim.model(x), model(x))
    assert victim.x_poisoned is None and not victim.model.training


@pytest.mark.parametrize("name", ["public.pth", "public"])
def test_bare_state_dict_has_a_folder_of_its_own(tmp_path, bare, name):
    """Named after the file, and never the file itself."""
    torch.save(bare[1], tmp_path / name)
    folder = loaded(tmp_path / name, arch="mnist_cnn", dataset="digits").folder
    assert folder.parent == tmp_path and folder.name.startswith("public") and not folder.exists()


def test_bare_state_dict_with_its_own_normalisation(tmp_path, bare, digits):
    model, state = bare
    torch.save(state, tmp_path / "public.pth")
    own = {"mean": [0.1307], "std": [0.3081]}
    victim = loaded(tmp_path / "public.pth", arch="mnist_cnn", dataset="digits", **own)
    x = to_float(digits.x_test[:9])
    torch.testing.assert_close(victim.model(x), model.net((x - 0.1307) / 0.3081))


def renamed(state):
    return {name.replace("conv1", "first"): value for name, value in state.items()}


def incomplete(state):
    return {name: value for name, value in state.items() if "running_var" not in name}


def extended(state):
    return state | {"extra.weight": torch.zeros(1)}


def prefixed_twice(state):
    return {"module.net." + name: value for name, value in state.items()}


@pytest.mark.parametrize("change", [renamed, incomplete, extended, prefixed_twice])
def test_bare_state_dict_must_fit_exactly(tmp_path, bare, change, one_line):
    torch.save(change(bare[1]), tmp_path / "public.pth")
    message = one_line(loaded, tmp_path / "public.pth", arch="mnist_cnn", dataset="digits")
    assert "mnist_cnn" in message


@pytest.mark.parametrize("missing", ["arch", "dataset"])
def test_bare_state_dict_needs_arch_and_dataset(tmp_path, bare, missing, one_line):
    torch.save(bare[1], tmp_path / "public.pth")
    given = {"arch": "mnist_cnn", "dataset": "digits"} | {missing: None}
    assert f"--{missing}" in one_line(loaded, tmp_path / "public.pth", **given)


# ===== Checkpoints that must be refused =====


def test_output_into_an_attack_s_folder(tmp_path, bare, folder, one_line):
    torch.save(bare[1], tmp_path / "public.pth")
    given = {"arch": "mnist_cnn", "dataset": "digits", "out": str(folder)}
    assert "is an attack's folder" in one_line(loaded, tmp_path / "public.pth", **given)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_pickle_bomb_in_a_checkpoint_does_not_run(tmp_path, wrapped, zipped, one_line):
    bomb = explosive(tmp_path)
    content = {"format": 1, "arguments": {"x": bomb}} if wrapped else bomb
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    one_line(loaded, tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_other_kinds_of_files_are_refused_in_one_line(tmp_path, one_line, recwarn):
    """Without torch's own warnings, of which one advises to run the file."""
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(explosive(tmp_path)))
    assert "not executed" in one_line(loaded, tmp_path / "plain.pt")
    assert not (tmp_path / "exploded").exists()
    torch.jit.save(torch.jit.trace(torch.nn.Flatten(), torch.zeros(1, 4)), tmp_path / "script.pt")
    recwarn.clear()  # torch.jit's, when it writes
    message = one_line(loaded, tmp_path / "script.pt")
    assert "TorchScript" in message and "weights_only" not in message
    torch.save({"1.weight": torch.eye(3).to_sparse_csr()}, tmp_path / "sparse.pt")
    recwarn.clear()
    one_line(loaded, tmp_path / "sparse.pt", arch="mnist_cnn", dataset="digits")
    assert not recwarn.list


def test_pickle_bomb_beside_a_checkpoint_does_not_run(tmp_path, digits_badnets, one_line):
    shutil.copytree(digits_badnets, tmp_path / "copy")
    x = np.array([explosive(tmp_path)], dtype=object)
    np.savez(tmp_path / "copy" / "poisoned_test.npz", x=x, y_true=x, y_target=x)
    one_line(loaded, tmp_path / "copy")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: b"",
        lambda good: b"<!DOCTYPE html>\n<html>sign in to download</html>",
        lambda good: b"PK\x03\x04" + bytes(500),
        *(lambda good, part=part: good[: int(part * len(good))] for part in (0.01, 0.5, 0.99)),
        *(lambda good, seed=seed: np.random.default_rng(seed).bytes(600) for seed in range(20)),
    ],
)
def test_damaged_model_file(tmp_path, digits_clean, spoil, one_line):
    path = tmp_path / "model.pt"
    path.write_bytes(spoil((digits_clean / "model.pt").read_bytes()))
    assert str(path) in one_line(loaded, tmp_path)


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], "text", 7])
def test_not_a_checkpoint(tmp_path, content, one_line):
    torch.save(content, tmp_path / "model.pt")
    one_line(loaded, tmp_path)


@pytest.mark.parametrize("where", ["nowhere", "nowhere.pt", ""])
def test_missing_checkpoint(tmp_path, where, one_line):
    assert "no such checkpoint" in one_line(loaded, tmp_path / where)


def changed_entries():
    """(what is wrong, change to the entries of a good checkpoint)."""
    for entry in ("arch", "image_shape", "state_dict", "mean", "std", "classes", "dataset"):
        yield f"no {entry}", lambda held, entry=entry: held.pop(entry)
    yield "unknown format", lambda held: held.update(format=99)
    yield "unknown arch", lambda held: held.update(arch="resnet9000")
    yield "other arch", lambda held: held.update(arch="vgg16")
    yield "wrong class count", lambda held: held.update(classes=7)
    yield "wrong channels", lambda held: held.update(image_shape=[3, 28, 28])
    yield "wrong size", lambda held: held.update(image_shape=[1, 64, 64])
    yield "unknown dataset", lambda held: held.update(dataset="imagenet")
    for name in (5, ["digits"], "", "x" * 5000):
        yield f"dataset {name!s:.9}", lambda held, name=name: held.update(dataset=name)
    yield "shape is a number", lambda held: held.update(image_shape=28)
    yield "classes are text", lambda held: held.update(classes="10")
    yield "state is no dict", lambda held: held.update(state_dict=3)
    yield "weight is no tensor", lambda held: held["state_dict"].update({"net.conv1.bias": "x"})


@pytest.mark.parametrize("change", [pytest.param(c, id=name) for name, c in changed_entries()])
def test_checkpoint_with_a_wrong_entry(tmp_path, digits_clean, change, one_line):
    held = torch.load(digits_clean / "model.pt", weights_only=True)
    change(held)
    torch.save(held, tmp_path / "model.pt")
    one_line(loaded, tmp_path)


def test_no_network_is_built_that_the_images_do_not_fit(
    tmp_path, digits_clean, digits, monkeypatch, one_line
):
    """Twenty million classes would take 40 GB before the misfit shows."""
    monkeypatch.setattr(ckpt, "build_model", None)
    held = torch.load(digits_clean / "model.pt", weights_only=True)
    for change in ({"classes": 2 * 10**7}, {"image_shape": [1, 20000, 20000]}, {"format": 2}):
        torch.save(held | change, tmp_path / "model.pt")
        one_line(loaded, tmp_path, dataset="digits")
        one_line(ckpt.load_clean, tmp_path, digits)


@pytest.mark.parametrize(
    "shape, classes", [((28, 28), 7), ((32, 32), 10), ((28, 28, 3), 10)], ids=str
)
def test_dataset_that_the_checkpoint_was_not_trained_on(
    tmp_path, digits_clean, shape, classes, one_line
):
    other = write_npz(tmp_path / "other.npz", shape, classes)
    one_line(loaded, digits_clean, dataset=str(other))


@pytest.mark.parametrize(
    "shape, classes", [((28, 28), 7), ((64, 64), 10), ((28, 28, 3), 10)], ids=str
)
def test_dataset_that_a_bare_state_dict_does_not_fit(tmp_path, bare, shape, classes, one_line):
    torch.save(bare[1], tmp_path / "public.pth")
    other = write_npz(tmp_path / "other.npz", shape, classes)
    one_line(loaded, tmp_path / "public.pth", arch="mnist_cnn", dataset=str(other))


@pytest.mark.parametrize(
    "arrays",
    [
        {"x": np.zeros((2, 32, 32, 1), np.uint8)},
        {"x": np.zeros((2, 28, 28, 1), np.float32)},
        {"x": np.zeros((0, 28, 28, 1), np.uint8)},
        {"y_true": np.zeros(3, np.int64)},
        {"y_target": np.array([0.0, 1.0])},
        {"y_target": np.array([0, 10])},
    ],
    ids=str,
)
def test_poisoned_test_images_that_do_not_fit(tmp_path, digits_clean, arrays, one_line):
    good = {"x": np.zeros((2, 28, 28, 1), np.uint8)}
    good |= {"y_true": np.ones(2, np.int64), "y_target": np.zeros(2, np.int64)}
    shutil.copy(digits_clean / "model.pt", tmp_path)
    np.savez(tmp_path / "poisoned_test.npz", **good)
    assert loaded(tmp_path).x_poisoned.shape == (2, 1, 28, 28)
    np.savez(tmp_path / "poisoned_test.npz", **(good | arrays))
    one_line(loaded, tmp_path)


def savers(folder, model, data):
    args, metrics = Namespace(seed=0), {"clean_accuracy": 1.0}
    x, y = data.x_test, data.y_test
    yield lambda: ckpt.save_result(folder, "clean", args, 1.0, metrics, CPU)
    yield lambda: ckpt.save_model(folder, model, data, "mnist_cnn", args, metrics)
    yield lambda: ckpt.save_images(folder / "poisoned_train.npz", x, y_given=y, poisoned=y == 0)
    yield lambda: ckpt.save_samples(folder, x, x)


@pytest.mark.parametrize("which", range(4))
def test_folder_that_vanished_during_training(tmp_path, bare, digits, which, one_line):
    small = Dataset("digits", digits.spec, 10, *(t[:9] for t in (
        digits.x_train, digits.y_train, digits.x_test, digits.y_test)))  # fmt: skip
    message = one_line(list(savers(tmp_path / "gone", bare[0], small))[which])
    assert str(tmp_path / "gone") in message and list(tmp_path.iterdir()) == []


def test_not_a_number_is_kept_in_valid_json(tmp_path):
    metrics = {"asr": float("nan"), "index": float("inf"), "norms": np.array([1.0, np.inf])}
    ckpt.save_result(tmp_path, "nc", Namespace(path=tmp_path), 1.0, metrics, CPU)
    assert "NaN" not in (tmp_path / "result.json").read_text()
    assert result_of(tmp_path)["metrics"] == {"asr": "nan", "index": "inf", "norms": [1.0, "inf"]}


@pytest.mark.parametrize("count, shown", [(3, [0, 1, 2]), (8, range(8)), (50, range(0, 48, 6))])
def test_samples_come_from_the_whole_set(monkeypatch, tmp_path, count, shown):
    """A set that is sorted by class shows more than its first class."""
    rows = {}
    monkeypatch.setattr(ckpt, "draw_rows", lambda path, drawn: rows.update(drawn))
    x = torch.arange(count).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6)
    ckpt.save_samples(tmp_path, x, x + 100)
    assert (255 * rows["clean"][:, 0, 0, 0]).round().tolist() == list(shown)
    assert (255 * rows["poisoned"][:, 0, 0, 0]).round().tolist() == [100 + k for k in shown]


def test_commit_is_that_of_the_code_that_was_read(tmp_path, monkeypatch):
    """A run of hours names the commit of its start, whatever is committed meanwhile."""
    at_start = ckpt.code_commit()
    monkeypatch.setattr(ckpt, "code_commit", lambda: "another")
    monkeypatch.setattr(ckpt.subprocess, "run", lambda *a, **k: Namespace(stdout="another"))
    ckpt.save_result(tmp_path, "nc", Namespace(), 1.0, {}, CPU)
    told = result_of(tmp_path)["commit"]
    assert told != "another" and (told is None) == (at_start is None)


def test_report_names_every_file_that_was_written(tmp_path, capfd):
    names = ["a.npz", "b.csv", "model.pt", "n.png"]
    for name in names:
        (tmp_path / name).touch()
    report(tmp_path, "nc", Namespace(device="cpu"), {}, 1.0)
    (line,) = re.findall("^written: (.*)$", capfd.readouterr().out, re.M)
    assert line == ", ".join(str(tmp_path / name) for name in names)


@pytest.mark.parametrize("script", ["badnets", "strip"])
def test_the_network_of_somebody_else_is_not_replaced(
    inline, one_line, digits_badnets, tmp_path, script
):
    (tmp_path / "mine").mkdir()
    torch.save({"weight": torch.ones(3)}, tmp_path / "mine" / "model.pt")
    flags = ["--ckpt", digits_badnets] if script == "strip" else SHORT[script]
    assert "name another --out" in one_line(inline, script, *flags, "--out", "mine")
    assert torch.load(tmp_path / "mine" / "model.pt")["weight"].tolist() == [1, 1, 1]


@pytest.mark.drawn
def test_a_figure_leaves_the_caller_s_backend(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its import would fail
    with saved_figure(tmp_path / "a.png", figsize=(2, 1)) as (_, axis):
        axis.plot([1, 2])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > picture.size[1]
