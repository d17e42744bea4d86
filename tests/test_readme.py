"""The README's commands and runs.sh do what they say."""

import os
import re
import shlex
import subprocess

import pytest
import torch
from conftest import ROOT, SHORT, run_here, write_npz

from common.models import build_model

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [shlex.split(line, comments=True) for line in LINES if line.strip()]
SCRIPTS = [command for command in COMMANDS if command[0] == "python"]


def test_every_command_runs_in_its_short_form(unread, tmp_path):
    (tmp_path / "data").mkdir()
    write_npz(tmp_path / "data" / "cifar10.npz", shape=(32, 32, 3), classes=10, count=20)
    write_npz(tmp_path / "data" / "mnist.npz", classes=10, count=300)
    model = build_model("wrn16_1", 10, (3, 32, 32), (0.0,) * 3, (1.0,) * 3)
    torch.save({"netC": model.net.state_dict()}, tmp_path / "suspect.pt")
    assert len(SCRIPTS) >= 4
    for command in SCRIPTS:
        name = command[1].removeprefix("methods/").removesuffix(".py")
        assert f"RESULT {name} " in run_here(name, *command[2:], *SHORT[name], cwd=tmp_path)


def test_every_script_is_in_the_table_of_methods():
    """With its length and a command that names it."""
    for path in (ROOT / "methods").glob("*.py"):
        (row,) = (line for line in README.splitlines() if f"| [`methods/{path.name}`]" in line)
        lines = len(path.read_text().splitlines())
        assert f" | {lines} | `python methods/{path.name} -" in row


def test_figures_are_those_of_the_results():
    """Every mean with its spread stands in the generated tables, too."""
    tables = (ROOT / "results" / "README.md").read_text()
    figures = re.findall(r"\d[\d.]* ± [\d.]+ \(\d+\)", README)
    assert len(figures) > 10 and all(figure in tables for figure in figures)
    assert len(README.splitlines()) <= 220


def runs_sh(*args, cwd=ROOT, **environment):
    command = ["bash", "runs.sh", *args]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def test_runs_sh_alone_lists_its_commands():
    done = runs_sh()
    text = (ROOT / "runs.sh").read_text()
    listed = set(re.findall(r"^  (\w+) ", done.stdout, re.M))
    assert done.returncode == 0
    assert listed == {"demo", "audit", "test", "mnist", "level", "gpu", "bench", "setup"}
    assert all(f"{name}()" in text or f"{name})" in text for name in listed)
    assert {command[2] for command in COMMANDS if command[0] == "bash"} <= listed
    assert runs_sh("nonsense").returncode == 2


def test_a_failing_venv_stops_the_set_up(tmp_path):
    """Not the demo in the system's python, nor a half-made .venv that blocks the next try."""
    (tmp_path / "bin").mkdir()
    for name, line in {"python3": "mkdir -p .venv/bin; exit 1", "python": "touch called"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "runs.sh").write_text((ROOT / "runs.sh").read_text())
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    nowhere = {"VIRTUAL_ENV": "", "CONDA_PREFIX": ""}
    done = runs_sh("demo", cwd=tmp_path, PATH=path, **nowhere)
    assert done.returncode != 0 and not (tmp_path / "called").exists()


@pytest.mark.parametrize("failing", ["wanet", "generator_reverse"])
def test_runs_sh_stops_at_the_first_failing_run(tmp_path, failing):
    """A stand-in for python fails at one script: its log is named and nothing runs after it."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(f'#!/bin/sh\necho "$@" >> calls\ncase "$1" in *{failing}.py) exit 2;; esac\n')
    stub.chmod(0o755)
    (tmp_path / "runs.sh").write_text((ROOT / "runs.sh").read_text())
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    done = runs_sh("demo", cwd=tmp_path, PATH=path, VIRTUAL_ENV="here")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert done.returncode == 1
    assert f"methods/{failing}.py" in calls[-1]
    log = done.stderr.strip().rsplit("its log: ", 1)[1]
    assert failing in log and (tmp_path / log).exists()
