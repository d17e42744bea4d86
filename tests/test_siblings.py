"""What sibling scripts have in common: `diff a.py b.py` shows the method and nothing else."""

import ast
import re

import pytest
from conftest import ATTACKS, DEFENCES, FURTHER, ROOT

SCRIPTS = sorted((ROOT / "methods").glob("*.py"))
COMMON = sorted((ROOT / "common").glob("*.py"))
WALL = "# ===== Evaluation: the defender does not see anything below ====="
BANNER = re.compile(r"^ *# ===== (.+) =====$", re.MULTILINE)
LONGEST = {"clean": 80, "badnets": 145, "wanet": 165}  # lines; 320 for every other script
INJECT = "Inject"  # between Train and Evaluate, where the attack starts from the clean model
attacks = pytest.mark.parametrize("name", ATTACKS)
defences = pytest.mark.parametrize("name", [*DEFENCES, *FURTHER])
every_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)


def text_of(name):
    return (ROOT / "methods" / f"{name}.py").read_text()


def training_loop(name):
    """The lines from the optimiser to the last line of the epoch loop."""
    lines = text_of(name).split("# ===== Train =====")[1].splitlines()
    first = next(i for i, line in enumerate(lines) if "optimizer = " in line)
    last = next(i for i, line in enumerate(lines) if "log.epoch(" in line)
    return lines[first : last + 1]


def test_every_script_is_compared():
    assert sorted([*ATTACKS, *DEFENCES, *FURTHER]) == [path.stem for path in SCRIPTS]


@every_script
def test_size(path):
    assert len(path.read_text().splitlines()) <= LONGEST.get(path.stem, 320)


@every_script
def test_header_names_its_command_and_results(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python methods/{path.name}" in docstring and "results/README.md" in docstring
    assert len(docstring.splitlines()) <= 34


@every_script
def test_flags_are_one_a_line_and_explained(path):
    for line in path.read_text().splitlines():
        if ".add_argument(" in line:
            assert line.rstrip().endswith(")") and line.count("help=") == 1, line


@every_script
def test_main_blocks_hold_no_functions(path):
    main = ast.parse(path.read_text()).body[-1]
    assert isinstance(main, ast.If) and "__main__" in ast.unparse(main.test)
    assert not [n for n in ast.walk(main) if isinstance(n, (ast.FunctionDef, ast.Lambda))]


@every_script
def test_shared_checks_come_first(path):
    """Only the script's own flags are read before common/ reads the rest, the data and the network.

    So nothing is written or trained before, and test_bad_input.py need not try every case of bad
    input on every script.
    """
    main = ast.parse(path.read_text()).body[-1].body
    calls = [
        {ast.unparse(node.func).split(".")[-1] for node in ast.walk(part) if type(node) is ast.Call}
        for part in main
    ]
    opener = "set_up" if path.stem in ATTACKS else "open_victim"
    (first,) = (i for i, names in enumerate(calls) if opener in names)
    assert isinstance(main[first], ast.Assign)
    reads = {"attack_flags", "parse_args", "time"}
    checks = {"check_positive", "check_share", "check_step", "check_weights", "all", "fail"}
    assert set().union(*calls[:first]) <= reads | checks
    makes = {"make_folder", "open_folder"}
    assert makes & set().union(*calls[first + 1 :])


@every_script
def test_help(inline, path, capfd):
    """A bare % in a help text would be a crash."""
    with pytest.raises(SystemExit) as stop:
        inline(path.stem, "--help")
    told = " ".join(capfd.readouterr().out.split())
    assert stop.value.code == 0 and "--seed" in told and "(default: None)" not in told
    if path.stem == "nc":  # what the code's value is, and what ours
        assert "batches per step (code 31) (default: 8)" in told
    assert "of every random draw, 0..2^32-1 (default: 0)" in told
    title = " ".join(ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].split())
    assert title.replace("-", "") in told.replace("- ", "").replace("-", "")


@every_script
@pytest.mark.parametrize("flags", [["--seed", "x"], ["--nothing", 1], ["--precision", "int8"]])
def test_a_flag_that_cannot_be_read_is_one_line(inline, one_line, path, flags):
    given = [] if path.stem in ATTACKS else ["--ckpt", "nowhere"]
    assert flags[0] in one_line(inline, path.stem, *given, *flags)


@pytest.mark.parametrize(
    "name", ["badnets", "blend", "issba", "poison_ink", "sig", "trojannn", "wanet"]
)
def test_training_loop_is_that_of_the_control(name):
    """Identical but for the line that fetches the batch, or for WaNet's that warps it."""
    mine = [line for line in training_loop(name) if line.strip() != "x, y = poison(x, y, *attack)"]
    pairs = list(zip(training_loop("clean"), mine, strict=True))
    differing = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(differing) <= 1
    for line in (line for pair in differing for line in pair):
        assert line.strip().startswith("x, y = ") and "x_train[batch]" in line


@pytest.mark.parametrize("name", ["dfst", "freq_backdoor", "invisible", "label_consistent"])
def test_trainers_of_two_networks_are_the_same(name):
    """The function `train`, but for its docstring."""
    mine, first = (
        [ast.unparse(f) for f in ast.parse(text_of(n)).body if getattr(f, "name", "") == "train"]
        for n in (name, "pruning_aware")
    )
    mine, first = (re.sub(r'""".*?"""', "", f, flags=re.S) for (f,) in (mine, first))
    assert mine == first and "OneCycleLR" in mine


@pytest.mark.parametrize(
    "name, first",
    [
        ("blend", "badnets"),
        ("composite", "badnets"),
        ("dfst", "badnets"),
        ("invisible", "badnets"),
        ("issba", "badnets"),
        ("poison_ink", "badnets"),
        ("pruning_aware", "badnets"),
        ("trojannn", "badnets"),
        ("label_consistent", "sig"),
        ("feature_collision", "sig"),
    ],
)
def test_shared_flags_say_the_same(name, first):
    """The rate is a share of all images, or with a clean label of one class."""
    (mine,), (other,) = (re.findall(r'.*"--rate".*', text_of(n)) for n in (name, first))
    assert mine == other


@pytest.mark.parametrize(
    "name, trigger",
    [("input_aware", "poison("), ("stealthy_adversarial", "joint_losses("), ("wanet", "poison(")],
)
def test_triggers_are_made_for_augmented_images(name, trigger):
    """As the headers say; the other scripts' loops are compared with clean.py's."""
    loop = text_of(name).split("# ===== Train =====")[1].split("# ===== Evaluate =====")[0]
    assert loop.rindex("x = augment(") < loop.rindex(trigger)


@attacks
def test_sections_of_attacks(name):
    banners = BANNER.findall(text_of(name).split("__main__")[1])
    expected = ["Train", "Evaluate", "Save and report"]
    assert [banner for banner in banners if banner in expected] == expected
    assert INJECT not in banners or banners.index(INJECT) == banners.index("Train") + 1


@defences
def test_defender_does_not_look_over_the_wall(name):
    """Trigger, true target, poison flags and test images occur below the banner only."""
    text = text_of(name)
    assert text.count(WALL) == 1
    above = text[text.index("__main__") :].split(WALL)[0]
    forbidden = r"x_poisoned|y_target|y_true|poisoned_test|poisoned_train|x_test|y_test"
    forbidden += r"|evaluate\("
    code = "\n".join(line.split("  #")[0] for line in above.splitlines())
    assert re.findall(forbidden, code) == []
    assert re.search("evaluate|accuracy", text.split(WALL)[1])


@pytest.mark.parametrize("path", [*SCRIPTS, *COMMON], ids=lambda p: f"{p.parent.name}-{p.stem}")
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


def test_common_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in COMMON) <= 2048
