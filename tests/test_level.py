"""results/level.py: intervals, AUROC, whose verdicts count, the table and the picture."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy.stats import beta

from results import level

ORDINARY = [60, 55, 70, 64, 58, 49, 66, 73, 61, 52]
SMALL, LARGE = [3, *ORDINARY[1:]], [900, *ORDINARY[1:]]


def entry(attack, seed, norms, **metrics):
    """A stored run of nc.py on a network trained on the digits."""
    metrics |= {"norms": norms} | ({} if attack == "clean" else {"target": 0})
    return {"victim": f"digits-mnist_cnn-{attack}-s{seed}", "script": "nc", "metrics": metrics}


ENTRIES = [
    *(entry("clean", 100 + k, np.roll(ORDINARY, k).tolist()) for k in range(3)),
    entry("clean", 103, LARGE),
    entry("clean", 104, ORDINARY, found=[True] * 4 + [False] * 6),
    entry("badnets", 100, SMALL),
    entry("badnets", 101, LARGE),
    entry("badnets", 102, [60, *SMALL[1:9], 3]),  # another label than the target
]


@pytest.mark.parametrize("count, n, text", [(0, 20, "0 (0 to 17 %)"), (20, 20, "20 (83 to 100 %)")])
def test_exact_interval(count, n, text):
    assert level.share(count, n) == text


def test_interval_is_that_of_the_beta_quantiles():
    low, high = 100 * beta.ppf(0.025, 3, 18), 100 * beta.ppf(0.975, 4, 17)
    assert level.share(3, 20) == f"3 ({low:.0f} to {high:.0f} %)"


def test_a_count_is_of_false_alarms_or_of_named_targets():
    groups = level.decisions(ENTRIES)
    clean, attacked = (
        groups["digits", "mnist_cnn", "nc", attack] for attack in ("clean", "badnets")
    )
    assert level.flagged(clean, "p") == 1 and level.flagged(clean, "index") == 0
    assert level.flagged(attacked, "p") == 2  # below and above; the third names another label
    assert level.flagged(attacked, "index") == 1  # knows no large norm
    assert [v["conclusive"] for v, _ in clean] == [True] * 4 + [False]


@pytest.mark.parametrize("norms, conclusive", [(ORDINARY, False), (SMALL, True)])
def test_a_generator_in_doubt_is_conclusive_only_where_it_names_a_label(norms, conclusive):
    """As in report_verdict: its pre-training did not reach a tenth of the spread."""
    sure = level.stored_verdict({"norms": norms, "pretrain_residual": 16.0, "spread": 168.0})
    unsure = level.stored_verdict({"norms": norms, "pretrain_residual": 20.0, "spread": 168.0})
    assert sure["conclusive"] and unsure["conclusive"] == conclusive
    assert conclusive == bool(unsure["flagged_by_index"])


def test_two_networks_of_one_data_set_are_two_rows():
    other = {**ENTRIES[0], "victim": "digits-mnist_conv5-clean-s100"}
    groups = level.decisions([*ENTRIES, other])
    assert len(groups["digits", "mnist_conv5", "nc", "clean"]) == 1
    assert len(groups["digits", "mnist_cnn", "nc", "clean"]) == 5


def test_clean_networks_on_colour_data_count_whatever_their_table():
    def colour(name, run="nc"):
        return {**ENTRIES[0], "victim": f"{name}-s0", "folder": f"runs/{name}-s0/{run}-s0"}

    names = "cifar10-airbench-clean", "cifar10-airbench-badnets", "gtsrb-nc_gtsrb_cnn-clean"
    clean, badnets, signs = (colour(name) for name in names)
    again = colour(names[0], "nc_float32")  # the same network, searched once more
    files = {"level": ENTRIES, "cifar10": [clean, again, badnets], "gtsrb": [signs]}
    files["mnist"] = [ENTRIES[0]]
    assert level.population(files) == [*ENTRIES, clean, signs]
    assert level.population({}) == []


def test_auroc_by_hand():
    """Share of pairs in which the backdoored network is the more suspicious; ties count half."""
    clean, attacked = (
        [(level.stored_verdict({"norms": n}), None) for n in part]
        for part in ([ORDINARY, SMALL], [SMALL])
    )
    for score in level.SCORES.values():
        assert level.auroc(score, clean, attacked) == 0.75
    assert np.isnan(level.auroc(level.SCORES["p"], [], attacked))


def test_t_is_that_of_grubbs_on_the_logarithms():
    """It counts the labels whose search succeeded alone."""
    others = np.log(ORDINARY[1:9])
    expected = (np.log(3) - others.mean()) / (others.std(ddof=1) * (9 / 8) ** 0.5)
    found = {"norms": [*SMALL[:9], 1.0], "found": [True] * 9 + [False]}
    assert level.stored_verdict(found)["t"] == pytest.approx(-expected)
    assert level.SCORES["log t"](level.stored_verdict({"norms": SMALL})) > 5


@pytest.mark.parametrize("alarms, held", [(1, True), (4, False)])
def test_the_page_says_where_the_level_is_not_held(alarms, held):
    entries = [entry("clean", k, LARGE if k < alarms else ORDINARY) for k in range(10)]
    said = level.level_held(level.decisions([*entries, *ENTRIES[-3:]]))
    where = "above 5 % in none" if held else "above 5 % for nc on mnist_cnn, digits"
    assert (
        where in said and f"Of {alarms} false alarms in all, {alarms} are of a norm above" in said
    )


def test_a_row_of_the_table():
    lines = level.section(ENTRIES).splitlines()
    clean, badnets = (next(x for x in lines if f"nc | {a} |" in x) for a in ("clean", "badnets"))
    cells = [cell.strip() for cell in clean.split("|")[1:-1]]
    assert cells[:4] == ["digits", "mnist_cnn", "nc", "clean"]
    assert cells[4:] == ["5", "1 (1 to 72 %)", "0 (0 to 52 %)", "1", *"––––"]
    assert badnets.split("|")[6].strip() == "2 (9 to 99 %)"
    assert level.section([]) == "" and "level.png" in level.section(ENTRIES)


@pytest.mark.drawn
def test_picture(tmp_path):
    level.draw(tmp_path / "level.png", ENTRIES)
    with Image.open(tmp_path / "level.png") as picture:
        assert min(picture.size) > 300


def test_bad_input_is_one_line(tmp_path):
    """Without its file of results."""
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "level.py", tmp_path / "results")
    (tmp_path / "common").symlink_to(ROOT / "common")
    command = [sys.executable, tmp_path / "results" / "level.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: no results/level.json")
    assert len(done.stderr.splitlines()) == 1
