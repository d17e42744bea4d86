"""bash runs.sh audit: Holm's rule, the verdict over all, exit codes, the table and the picture."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT, run_here
from PIL import Image

from results import audit

NORMS = [60, 55, 70, 64, 58, 49, 66, 73, 61, 52]


def test_holm_by_hand():
    """Times 3, 2 and 1 in rising order, never falling, at most 1; two tests: twice the smaller."""
    found = audit.holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert found == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert audit.holm({"a": 0.02, "b": 0.9}) == pytest.approx({"a": 0.04, "b": 0.9})
    assert audit.holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and audit.holm({}) == {}


@pytest.mark.parametrize(
    "p_values, answer",
    [
        ((0.02, 0.9), "backdoored"),
        ((0.03, 0.9), "no evidence"),  # .06 by Holm's rule
        ((0.03, None), "backdoored"),
        ((0.3, None), "inconclusive"),
        ((None, None), "inconclusive"),
    ],
)
def test_verdict_over_all(p_values, answer):
    found = {}
    for name, p in zip("ab", p_values):
        alone = "inconclusive" if p is None else "backdoored" if p < 0.05 else "no evidence"
        found[name] = {"p_value": p, "verdict": alone}
    assert audit.verdict_over_all(found)[0] == answer


@pytest.mark.parametrize("other, answer", [(0.3, "inconclusive"), (0.01, "backdoored")])
def test_a_detector_in_doubt_has_a_p_value_but_acquits_nobody(other, answer):
    """Its p counts as one of two tests."""
    found = {"nc": {"p_value": other, "verdict": "-"}}
    found["generator_reverse"] = {"p_value": 0.6, "verdict": "inconclusive"}
    assert audit.verdict_over_all(found) == (
        answer,
        audit.holm({"nc": other, "generator_reverse": 0.6}),
    )


def run_audit(patch, cwd, *args):
    """results/audit.py in this process; its exit code."""
    patch.chdir(cwd)
    patch.setattr(sys, "argv", ["audit.py", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / "results" / "audit.py"), run_name="__main__")
    return stop.value.code


def stand_in(patch, p_values):
    """The detectors write results with these p-values, without a search; their calls."""
    calls = []

    def run(command, **settings):
        command = [str(part) for part in command]
        calls.append(command)
        p, folder = p_values[len(calls) - 1], command[command.index("--out") + 1]
        metrics = {"norms": NORMS, "p_value": p, "ratio": 0.2, "label": 3, "above": []}
        metrics |= {"found": [True] * 9 + [False], "clean_accuracy": 97.5}
        metrics |= {"below": [3] if p and p < 0.05 else []}
        metrics["verdict"] = "inconclusive" if p is None else "no evidence"
        metrics["verdict"] = "backdoored" if metrics["below"] else metrics["verdict"]
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "result.json").write_text(json.dumps({"metrics": metrics}))
        masks, patterns = np.zeros((10, 1, 6, 6)), np.ones((10, 3, 6, 6))
        masks[3, :, 4:, 4:] = 1
        image = np.full((3, 6, 6), 51, np.uint8)
        np.savez(Path(folder) / "reversed.npz", masks=masks, patterns=patterns, image=image)
        Image.new("RGB", (20, 20)).save(Path(folder) / "generated.png")
        settings["stdout"].write("accuracy on 9 given images: 30.00\nwarning: this is poor\n")
        return subprocess.CompletedProcess(command, 0, stderr=b"")

    patch.setattr(subprocess, "run", run)
    return calls


@pytest.mark.drawn
@pytest.mark.parametrize(
    "p_values, code, verdict",
    [
        ((0.001, 0.3), 10, "backdoored"),
        ((0.4, 0.3), 0, "no evidence"),
        ((0.03, 0.3), 0, "no evidence"),
        ((0.4, None), 11, "inconclusive"),
    ],
)
def test_exit_code_table_and_picture(monkeypatch, tmp_path, capfd, p_values, code, verdict):
    calls = stand_in(monkeypatch, p_values)
    assert run_audit(monkeypatch, tmp_path, "suspect.pt", "--arch", "vgg16", "--seed", 3) == code
    assert all(call[-4:] == ["--arch", "vgg16", "--seed", "3"] for call in calls)
    assert [call[call.index("--ckpt") + 1] for call in calls] == ["suspect.pt"] * 2
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("nc ... ") and lines[3].startswith("generator_reverse ... ")
    assert lines[1:3] == ["  accuracy on 9 given images: 30.00", "  warning: this is poor"]
    table = [line.split() for line in lines[7:10]]
    assert table[0][:3] == ["detector", "label", "ratio"]
    assert table[1][0] == "nc" and f"{p_values[0]:g}" in table[1]
    ends = [line for line in lines if line.startswith("verdict over all")]
    assert len(ends) == 1 and ends[0].startswith(f"verdict over all: {verdict}")
    assert ("no proof of innocence" in lines[-1]) == (verdict == "no evidence")
    assert ("A detector alone says backdoored" in lines[-2]) == (p_values[0] == 0.03)
    with Image.open(tmp_path / "runs" / "audit-suspect" / "audit.png") as picture:
        assert picture.size[0] > 500
    saved = json.loads((tmp_path / "runs" / "audit-suspect" / "audit.json").read_text())
    assert saved["verdict"] == verdict and saved["clean_accuracy"] == 97.5


def test_stamped_image_and_shown_labels(monkeypatch, tmp_path):
    """The named label's patch is white on the grey image; then the smallest norms."""
    stand_in(monkeypatch, (0.001, 0.3))
    assert run_audit(monkeypatch, tmp_path, "suspect.pt", "--arch", "vgg16") == 10
    made = audit.stamped(tmp_path / "runs" / "audit-suspect" / "nc", [3, 5])
    assert made.shape == (6, 22, 3) and np.allclose(made[:, :6], 0.2)
    assert (made[:, 6:8] == 1).all() and np.allclose(made[:4, 8:14], 0.2)
    assert (made[4:, 12:14] == 1).all() and np.allclose(made[:, 16:], 0.2)
    shown = audit.shown_labels({"norms": NORMS, "below": [3], "above": [7]})
    assert shown == [3, 7, 5, 9]


def test_bad_input_is_one_line_and_code_2(monkeypatch, tmp_path, capfd):
    assert run_audit(monkeypatch, tmp_path, "nowhere.pt", "--arch", "vgg16") == 2
    error = capfd.readouterr().err
    assert error.startswith("error: no such checkpoint: nowhere.pt ") and error.count("\n") == 1
    for given in (
        ("nowhere.pt", "--ckpt", "x"),
        ("--arch", "vgg16", "nowhere.pt"),
        ("nowhere.pt", "--batches", 1),  # of nc.py alone
        ("nowhere.pt", "--seed", "x"),
        (),
    ):
        assert run_audit(monkeypatch, tmp_path, *given) == 2
        assert capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "runs" / "audit-nowhere").exists()


def test_a_refusal_of_the_second_detector_leaves_the_first_one_s_work(monkeypatch, tmp_path):
    """Bad input is met by the first; what stops the second, such as memory, took hours to reach."""
    calls = stand_in(monkeypatch, (0.4, 0.3))
    first = subprocess.run

    def run(command, **settings):
        if calls:
            return subprocess.CompletedProcess(command, 2, stderr=b"error: no memory\n")
        return first(command, **settings)

    monkeypatch.setattr(subprocess, "run", run)
    assert run_audit(monkeypatch, tmp_path, "suspect.pt", "--arch", "vgg16") == 2
    folder = tmp_path / "runs" / "audit-suspect"
    assert (folder / "nc" / "result.json").exists() and (folder / "nc.log").exists()
    assert "no memory" in (folder / "generator_reverse.log").read_text()


def test_bad_input_and_an_interrupt_leave_an_earlier_audit(monkeypatch, tmp_path, capfd):
    """The verdict and the results took hours; a typing error, such as of --arch, costs none."""
    stand_in(monkeypatch, (0.001, 0.3))
    given = tmp_path, "suspect.pt", "--arch"
    assert run_audit(monkeypatch, *given, "vgg16") == 10
    folder = tmp_path / "runs" / "audit-suspect"
    held = {
        path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".json", ".png")
    }
    assert len(held) == 6

    def refuse(command, **settings):
        return subprocess.CompletedProcess(command, 2, stderr=b"error: unknown network\n")

    def interrupt(command, **settings):
        raise KeyboardInterrupt

    for run, code in ((refuse, 2), (interrupt, 130)):
        monkeypatch.setattr(subprocess, "run", run)
        assert run_audit(monkeypatch, *given, "vgg61") == code
        assert {path: path.read_bytes() for path in held} == held


def test_a_folder_in_the_place_of_the_verdict(monkeypatch, tmp_path, capfd):
    calls = stand_in(monkeypatch, (0.4, 0.3))
    (tmp_path / "o" / "audit.json").mkdir(parents=True)
    assert run_audit(monkeypatch, tmp_path, "suspect.pt", "--arch", "vgg16", "--out", "o") == 2
    assert "is no audit's" in capfd.readouterr().err and not calls


def test_help_tells_the_flags_and_the_exit_codes(monkeypatch, tmp_path, capfd):
    assert run_audit(monkeypatch, tmp_path, "-h") == 0
    told = capfd.readouterr().out
    assert "11:\ninconclusive" in told and "--data-fraction" in told and "SUSPECT" in told


def test_no_label_where_no_search_succeeded():
    m = {"label": None, "ratio": None, "p_value": None, "verdict": "inconclusive"}
    assert audit.suspects(m | {"below": [], "above": []}) == "n/a"


def test_an_interrupt_leaves_nothing_of_a_first_audit(monkeypatch, tmp_path):
    def run(command, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", run)
    assert run_audit(monkeypatch, tmp_path, "suspect.pt", "--arch", "vgg16") == 130
    assert not (tmp_path / "runs" / "audit-suspect").exists()


def test_paths_are_the_caller_s(tmp_path):
    """From another folder: the file there is read, not one of this name beside runs.sh."""
    (tmp_path / "suspect.pt").write_text("no checkpoint")
    call = ["bash", ROOT / "runs.sh", "audit", "suspect.pt"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "suspect.pt holds more than tensors" in done.stderr


def test_another_suspect_of_the_same_name_is_refused(monkeypatch, tmp_path, capfd):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "suspect.pt").touch()
    calls = stand_in(monkeypatch, (0.4, 0.3))
    for _ in range(2):
        calls.clear()
        assert run_audit(monkeypatch, tmp_path, "a/suspect.pt", "--arch", "vgg16") == 0
    capfd.readouterr()
    assert run_audit(monkeypatch, tmp_path, "b/suspect.pt", "--arch", "vgg16") == 2
    assert "holds the audit of a/suspect.pt" in capfd.readouterr().err
    for damaged in ("", "[]", "{}", "null"):
        (tmp_path / "runs" / "audit-suspect" / "audit.json").write_text(damaged)
        assert run_audit(monkeypatch, tmp_path, "a/suspect.pt", "--arch", "vgg16") == 2
        assert "is no audit's" in capfd.readouterr().err
    for name in ("x-0.01-s0", "x-0.05-s0"):  # folders with a point in their names
        (tmp_path / name).mkdir()
        calls.clear()
        assert run_audit(monkeypatch, tmp_path, name, "--arch", "vgg16") == 0
        assert (tmp_path / "runs" / f"audit-{name}" / "audit.json").exists()


def test_a_detector_that_crashes_is_no_refusal_and_no_verdict(monkeypatch, tmp_path, capfd):
    """Another exit code than bad input, the traceback in the log, no old verdict left."""
    stand_in(monkeypatch, (0.4, 0.3))
    given = tmp_path, "x/model.pt", "--arch", "vgg16"
    assert run_audit(monkeypatch, *given) == 0
    folder = tmp_path / "runs" / "audit-x"
    assert (folder / "audit.json").exists()
    for code, errors in ((1, b"Traceback\nKeyError\n"), (0, b""), (-9, b"")):
        done = subprocess.CompletedProcess([], code, stderr=errors)
        monkeypatch.setattr(subprocess, "run", lambda *args, done=done, **settings: done)
        answer = run_audit(monkeypatch, *given)
        assert "nc crashed" in answer and not (folder / "audit.json").exists()
        assert (folder / "nc.log").read_text() == errors.decode()


def test_searches_that_fail_are_inconclusive(monkeypatch, tmp_path, digits_clean):
    """The real detectors, two steps each, in this process."""
    run = subprocess.run

    def quick(command, **settings):
        if command[0] != sys.executable:
            return run(command, **settings)
        name = Path(command[1]).stem
        settings["stdout"].write(run_here(name, *command[2:], *SHORT[name], cwd=tmp_path))
        return subprocess.CompletedProcess(command, 0, stderr=b"")

    monkeypatch.setattr(subprocess, "run", quick)
    assert run_audit(monkeypatch, tmp_path, digits_clean, "--out", "audit") == 11
    written = {path.name for path in (tmp_path / "audit").iterdir()}
    detectors = {"nc", "nc.log", "generator_reverse", "generator_reverse.log"}
    assert written == detectors | {"audit.png", "audit.json"}
    assert torch.load(digits_clean / "model.pt", weights_only=True)["format"] == 1


@pytest.mark.parametrize("flag", ["--ckpt", "--ckp", "--ck", "--ck=other.pt"])
def test_no_flag_names_another_suspect(monkeypatch, tmp_path, capfd, flag):
    """argparse also takes the beginning of a flag."""
    calls = stand_in(monkeypatch, (0.4, 0.4))
    other = [] if "=" in flag else ["other.pt"]
    assert run_audit(monkeypatch, tmp_path, "suspect.pt", "--arch", "vgg16", flag, *other) == 2
    assert "stands without --ckpt" in capfd.readouterr().err and not calls
