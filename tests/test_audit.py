"""bash runs.sh audit: Holm's rule, the verdict over all, exit codes, the table and the picture."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

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
    found = {name: {"p_value": p} for name, p in zip("ab", p_values)}
    assert audit.verdict_over_all(found)[0] == answer


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
        metrics |= {"below": [3] if p and p < 0.05 else []}
        metrics["verdict"] = {True: "backdoored"}.get(bool(metrics["below"]), "no evidence")
        Path(folder).mkdir(parents=True)
        (Path(folder) / "result.json").write_text(json.dumps({"metrics": metrics}))
        for name in ("reversed.png", "generated.png"):
            Image.new("RGB", (20, 20)).save(Path(folder) / name)
        return subprocess.CompletedProcess(command, 0, stderr=b"")

    patch.setattr(subprocess, "run", run)
    return calls


@pytest.mark.drawn
@pytest.mark.parametrize(
    "p_values, code, verdict",
    [
        ((0.001, 0.3), 10, "backdoored"),
        ((0.4, 0.3), 0, "no evidence"),
        ((0.4, None), 11, "inconclusive"),
    ],
)
def test_exit_code_table_and_picture(monkeypatch, tmp_path, capfd, p_values, code, verdict):
    calls = stand_in(monkeypatch, p_values)
    assert run_audit(monkeypatch, tmp_path, "suspect.pt", "--arch", "vgg16", "--seed", 3) == code
    assert all(call[-4:] == ["--arch", "vgg16", "--seed", "3"] for call in calls)
    assert [call[call.index("--ckpt") + 1] for call in calls] == ["suspect.pt"] * 2
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("nc ... ") and lines[1].startswith("generator_reverse ... ")
    table = [line.split() for line in lines[3:6]]
    assert table[0][:3] == ["detector", "label", "ratio"]
    assert table[1][0] == "nc" and f"{p_values[0]:.4f}" in table[1]
    assert lines[-1].startswith(f"verdict over all: {verdict}")
    with Image.open(tmp_path / "runs" / "audit-suspect" / "audit.png") as picture:
        assert picture.size[0] > 500
    saved = json.loads((tmp_path / "runs" / "audit-suspect" / "audit.json").read_text())
    assert saved["verdict"] == verdict


def test_bad_input_is_one_line_and_code_2(monkeypatch, tmp_path, capfd):
    assert run_audit(monkeypatch, tmp_path, "nowhere.pt", "--arch", "vgg16") == 2
    error = capfd.readouterr().err
    assert error == "error: no such checkpoint: nowhere.pt\n"
    assert run_audit(monkeypatch, tmp_path, "nowhere.pt", "--ckpt", "x") == 2


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
