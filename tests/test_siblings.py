"""Copied blocks stay copies: `diff a.py b.py` shows the method and nothing else."""

import ast
import re
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = sorted((ROOT / "methods").glob("*.py"))
WALL = "# ===== Evaluation: the defender does not see anything below ====="
BANNER = re.compile(r"^ *# ===== .+ =====$", re.MULTILINE)
TRAIN, EVALUATE = "# ===== Train =====", "# ===== Evaluate ====="
ATTACK_BANNERS = ["The attack", "Train", "Evaluate", "Save and report"]
INJECT = "Inject"  # between Train and Evaluate, where the attack starts from the clean model
GENERAL_OF_DEFENCES = "--ckpt --arch --dataset --data-dir --mean --std --seed --device --out"


def with_line(start):
    """The scripts that have a line beginning with `start`."""
    found = [p for p in SCRIPTS if any(l.strip().startswith(start) for l in lines_of(p))]
    return [pytest.param(path, id=path.stem) for path in found]


def lines_of(path):
    return path.read_text().splitlines()


def between(path, start, end):
    text = path.read_text()
    assert text.count(start) == 1 and text.count(end) == 1
    return text.split(start)[1].split(end)[0]


def flags_of(path):
    """[(flag, source of its add_argument call)] in the order of parse_args."""
    text = path.read_text()
    found = []
    for function in ast.parse(text).body:
        if isinstance(function, ast.FunctionDef) and function.name == "parse_args":
            for statement in function.body:
                call = getattr(statement, "value", None)
                if isinstance(call, ast.Call) and call.func.attr == "add_argument":
                    found.append((call.args[0].value, ast.get_source_segment(text, statement)))
    return found


ATTACKS = with_line(TRAIN)
DEFENCES = with_line("# ===== Evaluation")
CLEAN = ROOT / "methods" / "clean.py"
TWO_NETWORKS = ["input_aware"]  # attacks that train a generator beside the classifier
FIRST_DEFENCE = Path(DEFENCES[0].values[0]) if DEFENCES else None


def test_every_script_is_compared():
    assert {"clean", "badnets", "wanet"} <= {p.id for p in ATTACKS}
    assert {p.id for p in ATTACKS + DEFENCES} == {p.stem for p in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_header_names_its_command_and_threat_model(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python methods/{path.name}" in docstring and "README.md" in docstring
    assert len(docstring.splitlines()) <= 32
    assert all(len(call.split("help=")) == 2 for _, call in flags_of(path))


@pytest.mark.parametrize("path", ATTACKS)
def test_general_flags_of_attacks(path):
    """The control has the general flags alone; the others begin with the same ones."""
    general = flags_of(CLEAN)
    assert flags_of(path)[: len(general)] == general


@pytest.mark.parametrize("path", ATTACKS)
def test_set_up_of_attacks(path):
    """From parse_args to the first banner, apart from how many epochs are the default."""
    blocks = []
    for script in (CLEAN, path):
        block = BANNER.split(script.read_text().split("args = parse_args()")[1])[0]
        blocks.append(re.sub(r"\d \* data.spec.epochs", "data.spec.epochs", block))
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("path", ATTACKS)
def test_training_loop_of_attacks(path):
    """Identical but for the lines that load the control and fetch the batch."""
    trained = (BANNER.split(between(p, TRAIN, EVALUATE))[0].rstrip() for p in (CLEAN, path))
    original, copy = (
        [line for line in block.splitlines() if "load_control" not in line] for block in trained
    )
    if path.stem in TWO_NETWORKS:  # they add lines, and leave none out
        rest = iter(copy)
        assert all(line in rest for line in original)
        return
    assert len(original) == len(copy)
    differing = [pair for pair in zip(original, copy) if pair[0] != pair[1]]
    assert len(differing) <= 1
    for line in (line for pair in differing for line in pair):
        assert line.strip().startswith("x, y = ") and "x_train[batch]" in line


@pytest.mark.parametrize(
    "flag, names",
    [
        ("--rate", "badnets blend pruning_aware"),
        ("--target", "badnets blend wanet input_aware freq_backdoor pruning_aware"),
    ],
)
def test_shared_flags_say_the_same(flag, names):
    calls = {dict(flags_of(ROOT / "methods" / f"{name}.py"))[flag] for name in names.split()}
    assert len(calls) == 1


@pytest.mark.parametrize(
    "name, trigger", [("input_aware", "poison(x, y)"), ("stealthy_adversarial", "joint_losses(")]
)
def test_triggers_are_made_for_augmented_images(name, trigger):
    """As the headers say; the other scripts' loops are compared with clean.py's."""
    loop = between(ROOT / "methods" / f"{name}.py", TRAIN, EVALUATE)
    assert loop.rindex("x = augment(") < loop.rindex(trigger)


@pytest.mark.parametrize("path", ATTACKS)
def test_section_order_of_attacks(path):
    banners = [banner.strip(" #=") for banner in BANNER.findall(path.read_text())]
    expected = ATTACK_BANNERS[1:] if path == CLEAN else ATTACK_BANNERS
    assert [banner for banner in banners if banner != INJECT] == expected
    assert INJECT not in banners or banners.index(INJECT) == banners.index("Train") + 1


@pytest.mark.parametrize("path", DEFENCES)
def test_general_flags_of_defences(path):
    general = GENERAL_OF_DEFENCES.split()
    count = max(i for i, (flag, _) in enumerate(flags_of(path)) if flag in general) + 1
    assert {"--ckpt", "--arch", "--dataset", "--mean", "--std", "--seed"} <= {
        flag for flag, _ in flags_of(path)
    }
    assert flags_of(path)[:count] == flags_of(FIRST_DEFENCE)[:count]


@pytest.mark.parametrize("path", DEFENCES)
def test_defender_does_not_look_over_the_wall(path):
    """Trigger, true target, poison flags and test images occur below the banner only."""
    text = path.read_text()
    assert text.count(WALL) == 1
    above = text.split(WALL)[0].replace(ast.get_docstring(ast.parse(text), clean=False), "")
    forbidden = r"x_poisoned|y_target|y_true|poisoned_test|poisoned_train|x_test|y_test"
    forbidden += r"|[\"']trigger[\"']"
    code = "\n".join(line.split("  #")[0] for line in above.splitlines())
    assert re.findall(forbidden, code) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
def test_help(inline, path, capfd):
    """A bare % in a help text would be a crash."""
    with pytest.raises(SystemExit) as stop:
        inline(path.stem, "--help")
    assert stop.value.code == 0 and "--seed" in capfd.readouterr().out


SHARED = [*SCRIPTS, *sorted((ROOT / "common").glob("*.py"))]


@pytest.mark.parametrize("path", SHARED, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_file_is_written_whole(path):
    """Whatever writes a file does so inside `with written_whole(...)`."""
    tree = ast.parse(path.read_text())
    writers = {"savefig", "savez", "savez_compressed", "write_text", "write_bytes", "torch.save"}

    def calls(node):
        called = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
        names = [(n.lineno, ast.unparse(n.func)) for n in called]
        return {at for at, name in names if {name, name.split(".")[-1]} & writers}

    guarded = [w for w in ast.walk(tree) if isinstance(w, ast.With)]
    guarded = [w for w in guarded if any("written_whole" in ast.unparse(i) for i in w.items)]
    assert calls(tree) == set().union(*map(calls, guarded))


@pytest.mark.parametrize("path", with_line("for suffix, net in models.items():"))
def test_repairs_are_evaluated_alike(path):
    loop = "    for suffix, net in models.items():\n"
    blocks = [p.read_text().split(loop)[1].splitlines()[:4] for p in (FIRST_DEFENCE, path)]
    assert blocks[0] == blocks[1] and "robust_accuracy" in blocks[0][3]


@pytest.mark.parametrize("path", DEFENCES)
def test_sections_of_defences_come_in_the_same_order(path):
    first, own = (BANNER.findall(p.read_text()) for p in (FIRST_DEFENCE, path))
    common = [banner for banner in first if banner in own]
    assert [banner for banner in own if banner in common] == common
    assert any(WALL in banner for banner in common)
