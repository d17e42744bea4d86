"""The README's commands and runs.sh do what they say."""

import getpass
import json
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
import time
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ATTACKS, DEFENCES, FURTHER, ROOT, SHORT, files_below, run_here, write_npz
from PIL import Image

from common.datasets import SPECS
from common.models import ARCHITECTURES, build_model
from results import audit

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
    for k in range(200):
        (tmp_path / "pictures" / str(k % 10)).mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(k).integers(256, size=(8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / str(k % 10) / f"{k}.png")
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


def test_numbers_of_methods():
    """Those that the README counts are those that every shared test goes through."""
    attacks, defences = len(ATTACKS) - 1, len(DEFENCES) + len(FURTHER)  # clean.py is none
    assert re.findall(r"(\d+) (attacks|defences)", README) == [
        (str(attacks), "attacks"),
        (str(defences), "defences"),
    ]
    assert len(set(ATTACKS + DEFENCES + FURTHER)) == 1 + attacks + defences
    scripts = {path.stem for path in (ROOT / "methods").glob("*.py")}
    assert scripts == {*ATTACKS, *DEFENCES, *FURTHER}


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def tables():
    """The rows of results/README.md: {(section, table, row, network): cells}; no paper's rows."""
    found, section, title = {}, None, None
    for line in (ROOT / "results" / "README.md").read_text().splitlines():
        if line.startswith("## "):
            section, title = line[3:], None
        elif line.startswith("### "):
            title = line[4:]
        elif line.startswith("| ") and not line.startswith(("| *", "| ---")):
            row = cells(line)
            key = section, title, row[0].rstrip("†‡"), row[1]
            found.setdefault(key, []).append(row)
    return found


SUMMARY = {  # the README's row: the attack and the network, and the repair of the last column
    "none (`clean.py`)": ("clean", "mnist_cnn", None),
    "BadNets": ("badnets", "mnist_cnn", ("nc", "10 %", "Neural Cleanse")),
    "WaNet": ("wanet", "mnist_cnn", ("generator_reverse", "5 %", "generators")),
    "Input-aware": ("input_aware", "mnist_conv5", ("nc", "10 %", "Neural Cleanse")),
    "Stealthy (`mnist_cnn`)": (
        "stealthy_adversarial",
        "mnist_cnn",
        ("generator_reverse", "5 %", "generators"),
    ),
    "Frequency": ("freq_backdoor", "mnist_cnn", ("nc", "10 %", "Neural Cleanse")),
}


def test_summary_is_that_of_the_results():
    """Each cell stands in its row and column there; on clean networks p < .05 is a false alarm."""
    found, summary = tables(), README.split("## Results")[1]
    rows = [cells(line) for line in summary.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows[: len(SUMMARY)]] == list(SUMMARY)

    def figure(table, row, network, column):
        (line,) = found["MNIST", table, row, network]
        return line[column]

    for name, *figures in rows[: len(SUMMARY)]:
        attack, network, repair = SUMMARY[name]
        clean, asr = (figure("Attacks", attack, network, column) for column in (2, 3))
        counted = 2 if attack == "clean" else 3  # p < .05, or p names the target
        named = [
            figure("Detectors", f"{detector} on {attack}", network, counted)
            for detector in ("nc", "generator_reverse")
        ]
        after = "–"
        if repair is not None:
            script, share, method = repair
            after = figure("Repairs", f"{script} on {attack}, {share}", network, 4)
            after = f"{after}, {method}"
        assert figures == [clean, asr, *named, after], name
    assert len(README.splitlines()) <= 220


WORDS = "no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"


def test_figures_in_the_prose_are_those_of_the_results():
    found, text = tables(), " ".join(README.split())
    wrn = "CIFAR-10, WRN-16-1"

    def line(table, row):
        (only,) = found[wrn, table, row, "wrn16_1"]
        return only

    pattern = r"BadNets has clean ([\d.]+) and ASR ([\d.]+); "
    pattern += r"Neural Cleanse names all three and repairs them to ([\d.]+), "
    pattern += r"NAD to ([\d.]+), with `--cutout 0` to ([\d.]+), "
    pattern += r"with `--max-drop 8`, too, to ([\d.]+)\."
    (told,) = re.findall(pattern, text)
    _, _, clean, asr, *_ = line("Attacks", "badnets")
    nc = line("Repairs", "nc on badnets, 10 %")
    rows = "nad_cutout", "nad_5", "nad"
    nad = [line("Fine-tuning, NAD and MCR", f"{row} on badnets")[7] for row in rows]
    assert line("Detectors", "nc on badnets")[3] == "3 of 3"
    means = [cell.split(" ")[0] for cell in (clean, asr, nc[4], *nad)]
    assert [f"{float(value):.2f}" for value in told] == means

    pattern = r"Neural Cleanse names BadNets in all three networks and repairs them to ([\d.]+); "
    pattern += r"WaNet .one seed. has clean ([\d.]+) and ASR ([\d.]+); "
    pattern += r"Neural Cleanse names it among 43 labels and repairs it to ([\d.]+), "
    pattern += r"the generators in (\d of \d) searches and to ([\d.]+)\."
    ((patch, *told),) = re.findall(pattern, text)
    ((named,), (repair,)) = (
        found["GTSRB", table, row, "nc_gtsrb_cnn"]
        for table, row in (("Detectors", "nc on badnets"), ("Repairs", "nc on badnets, 10 %"))
    )
    assert named[3] == "3 of 3" and repair[4].split(" ")[0] == patch
    (wanet,) = found["GTSRB", "Attacks", "wanet", "nc_gtsrb_cnn"]
    cells = [wanet[2], wanet[3]]
    for row, share in (("nc on wanet", ", 10 %"), ("generator_reverse on wanet", ", 5 %")):
        (named,) = found["GTSRB", "Detectors", row, "nc_gtsrb_cnn"]
        (repair,) = found["GTSRB", "Repairs", row + share, "nc_gtsrb_cnn"]
        cells += [named[3], repair[4]]
    assert cells.pop(2) == "1 of 1"
    assert told == [re.sub(r" .*\(\d\)", "", cell) for cell in cells]

    pattern = r"the stealthy attack .one seed: ([\d.]+), ([\d.]+). evades the paper's rule, "
    pattern += "but the p-value names it, above the others"
    (told,) = re.findall(pattern, text)
    (attack,) = found["GTSRB", "Attacks", "stealthy_adversarial", "nc_gtsrb_cnn"]
    (named,) = found["GTSRB", "Detectors", "nc on stealthy_adversarial", "nc_gtsrb_cnn"]
    assert [f"{value} (1)" for value in told] == attack[2:4]
    assert named[3:5] == ["1 of 1", "0 of 1"] and float(named[9].split(" ")[0]) > 2  # its norm's

    pattern = r"The same network on CIFAR-10 .one seed. has ([\d.]+) and ([\d.]+); the generators "
    pattern += r"name it and an innocent label, and repair it to ([\d.]+)\."
    (told,) = re.findall(pattern, text)
    (wanet,), (named,), (repair,) = (
        found["CIFAR-10", table, row, "nc_gtsrb_cnn"]
        for table, row in (
            ("Attacks", "wanet"),
            ("Detectors", "generator_reverse on wanet"),
            ("Repairs", "generator_reverse on wanet, 5 %"),
        )
    )
    assert named[3] == "1 of 1" and named[5] == "0 / 1 / 0 / 0"  # case 2: the target and others
    assert [f"{float(value):.2f} (1)" for value in told] == [wanet[2], wanet[3], repair[4]]

    pattern = r"it flagged (\d+) of (\d+) new clean networks on MNIST, (\d+) of (\d+) on digits, "
    pattern += r"(\d+) of (\d+) small ones on CIFAR-10 \(the paper's rule: (\d+), (\d+), (\d+)\), "
    (told,) = re.findall(pattern + r"and named all (\d+) targets", text)
    level = {}
    for (section, _, data, network), lines in found.items():
        if section.startswith("Level") and network == "mnist_cnn":
            for _, _, detector, models, count, *flagged in lines:
                if detector == "nc":
                    counts = (int(cell.split()[0]) for cell in (count, *flagged[:2]))
                    level[data, models] = [*counts]
    sets = [level[data, "clean"] for data in ("mnist", "digits", "cifar10")]
    victims = [level[data, "badnets"] for data in ("mnist", "digits", "cifar10")]
    expected = [number for count, by_p, _ in sets for number in (by_p, count)]
    expected += [by_index for _, _, by_index in sets]
    assert [int(value) for value in told] == [*expected, sum(count for count, *_ in victims)]
    assert all(count == by_p for count, by_p, _ in victims)

    (told,) = re.findall(r"with the generators it flagged (\d+) of (\d+) there \((\d+)\)", text)
    (line,) = [
        line
        for (section, _, data, _), lines in found.items()
        for line in lines
        if section.startswith("Level")
        and line[:4] == ["cifar10", "mnist_cnn", "generator_reverse", "clean"]
    ]
    assert [*told] == [line[k].split()[0] for k in (5, 4, 6)]


def test_counts_of_public_checkpoints_are_those_of_the_results():
    """Backdoored: over half of the triggered images are obeyed. Named: the p-value's labels."""
    text, named, backdoored = " ".join(README.split()), {}, {}
    for (section, _, path, target), lines in tables().items():
        if section == "Public checkpoints" and path.startswith("`"):
            for _, _, _, asr, script, _, labels, *_ in lines:
                script = script.removesuffix("†")
                backdoored[path] = float(asr.split()[0]) > 50
                named[script, path] = target in re.findall(r"(\d+) (?:below|above)", labels)
                if not backdoored[path] and script in ("nc", "generator_reverse"):
                    assert labels == "–"
    asked = {
        script: [right for (by, path), right in named.items() if by == script and backdoored[path]]
        for script in ("nc", "generator_reverse")
    }
    over_all = {}
    for entry in json.loads((ROOT / "results" / "public.json").read_text()):
        if "norms" in entry["metrics"]:
            over_all.setdefault(entry["victim"], {})[entry["script"]] = entry["metrics"]
    answers = [audit.verdict_over_all(found)[0] for found in over_all.values()]
    pattern = r"Of (\w+) networks that others backdoored, Neural Cleanse named the target of (\w+) "
    pattern += (
        r"\(the verdict over all: (\w+)\), the generators(?:, asked about (\w+),)? of (\w+); "
    )
    (told,) = re.findall(pattern + r"p < \.05 flagged neither of (\w+) repaired", text)
    every = told[0]  # where nothing is said, they were asked about all
    expected = [sum(backdoored.values()), sum(asked["nc"]), answers.count("backdoored")]
    expected += [len(asked["generator_reverse"]), sum(asked["generator_reverse"])]
    expected += [sum(not bad for bad in backdoored.values())]
    assert [WORDS.index(word or every) for word in told] == expected
    assert len(asked["nc"]) == expected[0]


GROUPS = ["digits", "mnist", "cifar10", "gtsrb", "lecture", "level", "gpu"]
PAPERS = ["wanet", "input_aware", "stealthy", "freq", "abl", "generators"]


def runs_sh(*args, cwd=ROOT, **environment):
    command = ["bash", "runs.sh", *args]
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)


def test_the_demo_as_the_readme_tells_it():
    """Its two commands are those of stored runs, which show what it promises with room to spare."""
    demo = re.search(r"^demo\(\) \{\n(.*?)^\}", (ROOT / "runs.sh").read_text(), re.M | re.S)[1]
    stored = json.loads((ROOT / "results" / "digits.json").read_text())
    folder, found = "runs/digits-mnist_cnn-wanet-s0", []
    for line, own in zip(
        demo.splitlines(), (folder, f"{folder}/generator_reverse-s0"), strict=True
    ):
        _, script, *flags = shlex.split(line)
        (entry,) = (e for e in stored if e["folder"] == own)
        assert entry["script"] == script
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            assert str(entry["arguments"][flag.removeprefix("--").replace("-", "_")]) == value
        found.append(entry["metrics"])
    attack, defence = found
    (shown,) = re.findall(r"RESULT wanet (.*)", README)
    for name, value in re.findall(r"(\w+)=(\S+)", shown):
        assert f"{attack[name]:.4g}" == value
    (control,) = (
        e["metrics"]
        for e in stored
        if e["folder"] == "runs/digits-mnist_cnn-clean-s0/generator_reverse-s0"
    )
    text = " ".join(README.split())
    told = re.search(r"\(p = ([\d.]+) in our run, ([\d.]+) for a clean network\)", text).groups()
    assert told == (f"{defence['p_value']:.2g}", f"{control['p_value']:.2g}")
    assert defence["p_value"] < 0.01 and defence["label"] == defence["target"]
    assert defence["asr_repaired"] < 2


def test_runs_sh_alone_lists_its_commands():
    done = runs_sh()
    text = (ROOT / "runs.sh").read_text()
    listed = set(re.findall(r"^  (\w+) ", done.stdout, re.M))
    assert done.returncode == 0
    assert listed == {"demo", "audit", "test", "bench", "setup", "public", *GROUPS, *PAPERS}
    assert all(f"{name}()" in text or f"{name})" in text for name in listed)
    assert {command[2] for command in COMMANDS if command[0] == "bash"} <= listed
    assert runs_sh("nonsense").returncode == 2


def made_by(command):
    """The folder into which a line of --list writes."""
    flags = dict(pairwise(command))
    if "--out" in flags:
        return flags["--out"]
    name = Path(command[1]).stem
    if "--ckpt" in flags:
        return f"{flags['--ckpt']}/{name}-s{flags['--seed']}"
    arch = flags.get("--arch", SPECS[flags["--dataset"]].arch)
    return f"runs/{flags['--dataset']}-{arch}-{name}-s{flags['--seed']}"


@pytest.mark.parametrize("group", [*GROUPS, *PAPERS])
def test_groups_list_victims_before_their_defences(group, tmp_path):
    """Whole commands of scripts that exist, each into a folder of its own; nothing is run."""
    (tmp_path / "runs.sh").write_text((ROOT / "runs.sh").read_text())
    done = runs_sh(group, "--list", cwd=tmp_path)
    commands = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(commands) > (30 if group in GROUPS else 6)
    assert files_below(tmp_path) == ["runs.sh"]
    made = []
    for command in commands:
        assert command[0] == "python" and (ROOT / command[1]).exists()
        victim = dict(pairwise(command)).get("--ckpt")
        assert victim is None or victim in made
        made.append(made_by(command))
        if victim is None:  # the tables take its name apart
            dataset, network, _, _ = Path(made[-1]).name.rsplit("-", 3)
            assert dataset in SPECS and network in ARCHITECTURES
    assert len(set(made)) == len(made)
    for script in {command[1] for command in commands}:
        check_flags(script, [command[2:] for command in commands if command[1] == script])


def check_flags(script, calls):
    """The script's own parser takes each list of arguments, without abbreviated flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", lambda parser: parser)  # it comes back itself
        patch.setattr(sys, "path", list(sys.path))
        made = runpy.run_path(str(ROOT / script), run_name="parser of")
        if "parse_args" in made:
            parser = made["parse_args"]()
        else:  # clean.py has the shared flags alone
            parser = made["attack_flags"](made["__doc__"], target=False)
    parser.allow_abbrev = False
    for call in calls:
        try:
            parser.parse_args(call)
        except SystemExit:
            pytest.fail(f"{script} does not take {' '.join(call)}")


def test_the_table_of_methods_has_flags_that_exist():
    commands = [shlex.split(line) for line in re.findall(r"`(python methods/[^`]*)`", README)]
    assert len({command[1] for command in commands}) == len([*(ROOT / "methods").glob("*.py")])
    for command in commands:
        if len(command) > 2:
            check_flags(command[1], [command[2:]])


STAND_IN = """#!/bin/sh
echo "$@" >> calls
case "$*" in
  *badnets.py*"--seed 100") exit 2 ;;
  *methods*--ckpt*) echo "threads $OMP_NUM_THREADS" ;;
  *methods/clean.py*|*methods/badnets.py*)
    script=${1#methods/} folder=runs/$3-mnist_cnn-${script%.py}-s$7
    mkdir -p "$folder" && echo "{}" > "$folder/result.json" ;;
esac
"""


def test_a_group_goes_on_after_a_failure_and_makes_up_for_it(tmp_path):
    """Finished runs are skipped; a failed one is named at the end, and no table is written."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(STAND_IN)
    stub.chmod(0o755)
    (tmp_path / "runs.sh").write_text((ROOT / "runs.sh").read_text())
    (tmp_path / "runs" / "digits-mnist_cnn-clean-s107").mkdir(parents=True)
    (tmp_path / "runs" / "digits-mnist_cnn-clean-s107" / "result.json").write_text("{}")
    (tmp_path / "runs" / "logs").mkdir()
    (tmp_path / "runs" / "logs" / "failed-mnist").write_text("another group's\n")
    settings = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": "here"}
    done = runs_sh("level", "--jobs", "3", cwd=tmp_path, **settings)
    calls = (tmp_path / "calls").read_text().splitlines()
    ran = [call for call in calls if call.startswith("methods/")]
    assert done.returncode == 1 and len(ran) == 19 + 10 + 2 * 29 == len(set(ran))
    assert "done: runs/digits-mnist_cnn-clean-s107" in done.stdout
    assert "== made: " not in done.stdout.splitlines()  # stage 4 is empty
    assert not any("clean.py" in call and call.endswith("107") for call in ran)
    assert done.stdout.count("left out without its victim") == 2
    (line,) = (line for line in done.stderr.splitlines() if "its log: " in line)
    assert line.startswith("python methods/badnets.py --dataset digits --arch mnist_cnn --seed 100")
    assert (tmp_path / line.split("its log: ")[1]).exists()
    assert not any("table.py" in call for call in calls)
    log = tmp_path / "runs" / "logs" / "digits-mnist_cnn-clean-s100-nc-s100.log"
    assert log.read_text() == "threads 1\n"

    stub.write_text(STAND_IN.replace("exit 2", "exit 0"))
    (tmp_path / "calls").unlink()
    assert runs_sh("level", cwd=tmp_path, **settings).returncode == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call for call in calls if "--ckpt" not in call and "methods" in call] == [
        "methods/badnets.py --dataset digits --arch mnist_cnn --seed 100"
    ]
    assert calls[-1] == "results/level.py"


def test_the_level_takes_the_network_of_each_data_set():
    """Colour data on the networks of their papers, ten clean ones; patches that they can carry."""
    lines = runs_sh("level", "cifar10", "gtsrb", "--list").stdout.splitlines()
    assert sum("clean.py --dataset cifar10 --arch wrn16_1" in line for line in lines) == 10
    assert sum("clean.py --dataset gtsrb --arch nc_gtsrb_cnn" in line for line in lines) == 10
    badnets = [line for line in lines if "badnets.py" in line]
    assert {line.split("--seed ")[1].split(" ", 1)[1] for line in badnets} == {
        "--pattern grid",
        "--patch-size 4 --target 33",
    }
    lines = runs_sh("level", "cifar10:mnist_cnn", "--list").stdout.splitlines()
    victims = [line for line in lines if "--ckpt" not in line]
    assert len(victims) == 20
    assert all("--dataset cifar10 --arch mnist_cnn" in line for line in victims)
    assert all("--epochs 10" in line for line in victims)


SLURM = """ClusterName=one
SlurmctldHost={host}(127.0.0.1)
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=all Nodes=ALL Default=YES
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=defer,batch_sched_delay=0,sched_interval=1
MpiDefault=none
SwitchType=switch/none
"""


@pytest.fixture
def slurm(tmp_path_factory):
    """Slurm's controller and one node, this machine; the environment of its commands."""
    if not all(map(shutil.which, ("sbatch", "slurmctld", "slurmd"))):
        pytest.skip("needs Slurm (Debian: slurm-wlm)")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    with socket.socket() as a, socket.socket() as b:
        for free in (a, b):
            free.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    names = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser()}
    settings = SLURM.format(folder=folder, ports=ports, cores=os.cpu_count(), **names)
    (folder / "slurm.conf").write_text(settings)
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    daemons = [
        subprocess.Popen([name, "-D"], env=os.environ | environment, stderr=subprocess.DEVNULL)
        for name in ("slurmctld", "slurmd")
    ]
    yield environment
    for daemon in daemons:
        daemon.terminate()
        daemon.wait(30)


def test_a_group_as_job_arrays_of_slurm(tmp_path, slurm):
    """On a real Slurm: victims come first, a failed run is named, the same command makes it."""
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(STAND_IN)
    stub.chmod(0o755)
    (tmp_path / "runs.sh").write_text((ROOT / "runs.sh").read_text())
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    settings = slurm | {"PATH": path, "VIRTUAL_ENV": "here"}

    def submitted():
        done = runs_sh("level", "--slurm", "--jobs", "9", cwd=tmp_path, **settings)
        assert done.returncode == 0, done.stderr
        arrays = re.findall(r"array \d+, the (\d+) runs", done.stdout)
        queue = "squeue", "--noheader", "--states=all", "--format=%T"
        for _ in range(600):
            states = subprocess.check_output(queue, env=os.environ | settings, text=True).split()
            if {*states} <= {"COMPLETED", "FAILED"}:
                break
            time.sleep(0.1)
        log = (tmp_path / "runs" / "logs" / "slurm-level-tables.log").read_text()
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return arrays, states, log, calls

    arrays, states, log, calls = submitted()
    assert arrays == ["20", "10", "60"] and states.count("FAILED") == 1  # that job alone
    ran = [call for call in calls if call.startswith("methods/")]
    assert len(ran) == 20 + 10 + 2 * 29 == len(set(ran))
    assert ["--ckpt" in call for call in ran] == [False] * 30 + [True] * 58
    assert log.startswith(
        "failed:\npython methods/badnets.py --dataset digits --arch mnist_cnn --seed 100; its log"
    )
    assert not any("table.py" in call for call in calls)

    stub.write_text(STAND_IN.replace("exit 2", "exit 0"))
    _, states, log, calls = submitted()
    made = [call for call in calls if "--ckpt" not in call and "methods" in call]
    assert made == ["methods/badnets.py --dataset digits --arch mnist_cnn --seed 100"]
    assert log == "" and calls[-1] == "results/level.py" and states.count("FAILED") == 1


def test_slurm_where_there_is_none(tmp_path):
    (tmp_path / "runs.sh").write_text((ROOT / "runs.sh").read_text())
    for tool in ("bash", "dirname", "awk", "sort", "seq"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = runs_sh("level", "--slurm", cwd=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr == "error: --slurm needs Slurm's sbatch\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("count", ["0", "two", "", "-1"])
def test_jobs_that_are_no_number(count):
    done = runs_sh("level", "--jobs", count)
    assert done.returncode == 2 and done.stderr.startswith("error: --jobs ")


@pytest.mark.parametrize(
    "given", ["mnist --lsit", "mnist --jobs=4", "lecture s0", "level --seeds", "public --jsob 2"]
)
def test_arguments_that_a_group_does_not_take(given):
    done = runs_sh(*given.split(), "--list")
    named = given.split(maxsplit=1)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {named[0]} does not take {named[1]}\n"


def test_a_suspect_below_runs_is_no_victim_that_is_missing(tmp_path):
    """Its file is enough; a folder of that name needs a result."""
    (tmp_path / "runs" / "public").mkdir(parents=True)
    (tmp_path / "runs" / "public" / "x.pt").touch()
    job = (ROOT / "runs.sh").read_text().split("\njob() {")[1].split("\n}\n")[0]
    for name, answer in (("x.pt", "made: out"), ("y.pt", "left out without its victim: out")):
        script = f"mkdir -p runs/logs; job() {{{job}\n}}; job 3 out true --ckpt runs/public/{name}"
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == f"== {answer}\n"


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
