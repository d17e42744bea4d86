"""results/README.md holds what results/*.json and results/papers.toml hold, and nothing else."""

import copy
import functools
import json
import math
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from common.datasets import SPECS

sys.path.insert(0, str(ROOT / "results"))
import curves
import stored
import table

RESULTS = ROOT / "results"
PAGE = (RESULTS / "README.md").read_text()
FILES = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
STORED = {name: FILES[name] for name in FILES if name not in ("tried", *table.APART)}
NUMBER = r"−?\d+(\.\d+)?(e[−+]\d+)?"
FIGURE = rf"–|{NUMBER}( ± {NUMBER})?( \(\d+\))?|−?∞ \(\d+\)|\d+ of \d+|\d+( / \d+){{3}}"


def tables(page):
    """Every table of a Markdown page: its heading, its head and its rows, as lists of cells."""
    for block in re.findall(r"^#+ ([^\n]+)\n(.*?)(?=^#|\Z)", page, re.M | re.S):
        lines = [line[2:-2].split(" | ") for line in block[1].splitlines() if line[:2] == "| "]
        if lines:
            yield block[0], lines[0], lines[2:]


def leaves(tree, *path):
    """The rows of papers.toml below `tree`: what has a figure or a note, with its keys."""
    if "differs" in tree:
        yield path, tree
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, *path, key)


ROWS = [
    (path, leaf)
    for dataset in ("mnist", "cifar10", "cifar100", "gtsrb")
    for path, leaf in leaves(table.PAPERS[dataset], dataset)
]


def entry(victim="mnist-mnist_cnn-badnets-s0", defence=None, **metrics):
    """An entry of results/<name>.json: the attack's own, or that of a defence on it."""
    seed = int(victim.rsplit("-s", 1)[1])
    flags = {"seed": seed} | ({"ckpt": f"runs/{victim}", "rule": "p"} if defence else {})
    return {
        "folder": f"runs/{victim}" + (f"/{defence}-s{seed}" if defence else ""),
        "victim": victim,
        "script": defence or victim.rsplit("-", 2)[1],
        "arguments": flags | {"data_fraction": 0.1} if defence == "nc" else flags,
        "metrics": {"clean_accuracy": 99.0, "asr": 98.0, "ssim": 1.0} | metrics,
        "commit": "0" * 40,
    }


def rows_of(name, entries):
    """A section's rows as {(label, network): {column: cell}}, without the papers' rows."""
    found = list(tables(table.section(name, table.frame(entries))))
    return {
        (row[0], row[1]): dict(zip(head, row))
        for _, head, rows in found
        for row in rows
        if row[0] != "*the paper*"
    }


def detected(norms, victim="mnist-mnist_cnn-badnets-s0", **metrics):
    return entry(victim, "nc", norms=norms, **({"target": 0} | metrics))


@functools.cache
def listed_lines():
    """What runs.sh lists, in all."""
    lines = []
    papers = "wanet", "input_aware", "stealthy", "freq", "abl", "generators"
    for command in ("mnist", "gpu", "lecture", "cifar10", "gtsrb", *papers):
        command = ["bash", "runs.sh", command, "--list"]
        lines += subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return lines


def listed_rows():
    """The rows that runs.sh makes, as keys of papers.toml."""
    for line in listed_lines():
        script = re.match(r"python methods/(\w+)\.py ", line)
        flags = dict(re.findall(r"--([\w-]+) ([^-]\S*(?: [^-]\S*)*)", line))
        if "ckpt" in flags:
            victim = Path(flags["ckpt"]).name
            defence = Path(flags.get("out", f"{script[1]}-s0")).name.rsplit("-s", 1)[0]
            shares = {"nc": "0.1", "generator_reverse": flags.get("repair-fraction", "0.05")}
        else:
            arch = flags.get("arch", SPECS[flags["dataset"]].arch)
            victim = flags.get("out", f"{flags['dataset']}-{arch}-{script[1]}-s{flags.get('seed')}")
            defence, shares = "attack", {}
        dataset, network, attack, _ = Path(victim).name.rsplit("-", 3)
        yield dataset, defence, attack, network
        for share in shares.get(script[1], "").split():
            yield dataset, defence, attack, network, f"{100 * float(share):g} %"


def stored_rows(entries):
    """The rows of entries as keys of papers.toml, those of the Repairs table with their share."""
    for _, run in table.frame(entries).iterrows():
        key = run.dataset, run.defence, run.attack, run.network
        yield key
        yield *key, run.share


# ===== The page =====


def test_page_is_what_the_results_give():
    assert table.page(FILES) == PAGE, "run python results/table.py"


def test_page_shows_every_file_picture_and_script():
    assert set(STORED) <= set(table.PAPERS["files"])
    assert {path.name for path in RESULTS.glob("*.png")} == set(re.findall(r"\((\S+\.png)\)", PAGE))
    scripts = {path.name for path in (ROOT / "methods").glob("*.py")}
    assert scripts == set(re.findall(r"^\| `methods/(\w+\.py)` \|", PAGE, re.M))


def test_every_figure_cell_is_a_figure():
    """In the tables of table.py; those of its neighbours have tests of their own."""
    shown, apart = 0, [getattr(table, name).TEXT for name in ("lecture", *table.APART)]
    for heading, head, rows in tables(PAGE):
        if any(text.startswith(f"## {heading}\n") for text in apart):
            continue
        words = 5 if heading == "Methods" else 2  # columns of words, then figures, then the note
        for row in rows:
            figures = row[words:] if heading == "Methods" else row[words:-1]
            assert len(row) == len(head)
            assert [cell for cell in figures if not re.fullmatch(FIGURE, cell)] == [], row
            shown += len(figures)
    assert shown > 500


@pytest.mark.parametrize("text", ["about 10", "evades", "99.4, CIFAR-10", "nan (2)", "inf (1)", ""])
def test_a_note_or_a_hole_is_no_figure(text):
    assert not re.fullmatch(FIGURE, text)


def test_every_note_is_numbered_used_and_a_sentence():
    seen = 0
    for block in re.split(r"^#+ ", PAGE, flags=re.M):
        notes = dict(re.findall(r"^(\d+)\. (.+)$", block, re.M))
        used = set(re.findall(r"^\|.* \| (\d+) \|$", block, re.M))
        assert used == set(notes) == {str(number + 1) for number in range(len(notes))}
        assert all(re.fullmatch(r"[A-Z0-9].*\.", note) for note in notes.values())
        seen += len(notes)
    assert seen > 50


def test_marks_are_explained_once_a_table():
    """Below a table stands every reason once, with the rows that it holds for."""
    seen = 0
    for block in re.split(r"^#+ ", PAGE, flags=re.M):
        marked = re.findall(r"^\| ([^|]+?)†", block, re.M)
        reasons = re.findall(r"^† (.*? \(s[\ds, ]+\)): (.*\.)$", block, re.M)
        labels = [re.sub(r" \(s[\ds, ]+\)$", "", label)
                  for rows, _ in reasons for label in re.split(r"(?<=\)), ", rows)]  # fmt: skip
        assert set(labels) == set(marked)
        assert len({why for _, why in reasons}) == len(reasons) == block.count("\n† ")
        seen += len(marked)
    assert seen > 0


def test_cells_are_means_and_deviations_of_the_stored_runs():
    """The Attacks table again, from the JSON alone and with the statistics module."""
    checked = 0
    keys = {"clean": "clean_accuracy", "ASR": "asr", "PSNR, dB": "psnr"}
    for entries in STORED.values():
        for (label, network), row in rows_of("Attacks", entries).items():
            name = f"-{network}-{label.rstrip('†‡')}-s"
            found = [e for e in entries if name in e["victim"] and "ckpt" not in e["arguments"]]
            for column, key in keys.items():
                values = [e["metrics"][key] for e in found if key in e["metrics"]]
                sd = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                text = f"{statistics.mean(values):.2f}{sd} ({len(values)})" if values else "–"
                assert row[column] == text
                checked += 1
    assert checked >= 39


# ===== Figures =====


def test_spread_is_mean_and_sample_deviation():
    assert table.spread([1, 2, 3]) == "2.00 ± 1.00 (3)"
    assert table.spread([5]) == "5.00 (1)"
    assert table.spread([-1.5, -2.5]) == "−2.00 ± 0.71 (2)"
    assert table.spread([0, 0]) == "0.00 ± 0.00 (2)"


def test_missing_values_do_not_count_and_infinity_shows():
    assert table.spread([]) == table.spread([None, math.nan, "nan"]) == "–"
    assert table.spread([None, 1.0, 3.0]) == "2.00 ± 1.41 (2)"
    assert table.spread([math.inf]) == table.spread(["inf"]) == "∞ (1)"
    assert table.spread([2.0, math.inf]) == "∞ (2)" and table.spread([-math.inf]) == "−∞ (1)"


def test_an_infinite_index_and_a_ratio_of_0_are_figures():
    """Half of the norms are equal (MAD 0) and the target's is 0."""
    run = detected([0.0, 5, 5, 5, 5, 5])
    row = rows_of("Detectors", [entry(), run])["nc on badnets", "mnist_cnn"]
    assert (row["index"], row["ratio"], row["target's norm"]) == ("∞ (1)", "0.00 (1)", "−∞ (1)")
    assert (row["index > 2"], row["p < .05"], row["p"]) == ("1 of 1", "1 of 1", "0.000 (1)")
    equal = rows_of("Detectors", [detected([5.0] * 6)])
    assert equal["nc on badnets", "mnist_cnn"]["target's norm"] == "0.00 (1)"


def test_fewer_than_5_labels_are_dashes():
    run = entry(defence="nc", norms=[1, 2, 3], target=0)
    row = rows_of("Detectors", [run])["nc on badnets", "mnist_cnn"]
    assert set(list(row.values())[2:-1]) == {"–"}


@pytest.mark.parametrize(
    "searches", [{"found": [True] * 2 + [False] * 3}, {"asrs": [0.9, 0.8, 0.7, 0.7, 0.7]}]
)
def test_a_run_with_too_few_successful_searches_leaves_the_others(searches):
    runs = [detected([1.0, 5, 6, 7, 8])]
    runs += [detected([1.0, 5, 6, 7, 8], "mnist-mnist_cnn-badnets-s1", **searches)]
    assert rows_of("Detectors", runs)["nc on badnets", "mnist_cnn"]["ratio"] == "0.17 (1)"


def test_a_norm_above_the_others_shows_with_its_sign():
    """Median 5 and MAD 1: 1 is -4, 12 is +7 deviations of 1.4826 away."""
    above, below = [12.0, 4, 6, 4, 6, 5, 5], [1.0, 4, 6, 4, 6, 5, 5]
    for norms, distance in ((above, 7), (below, -4)):
        row = rows_of("Detectors", [detected(norms)])["nc on badnets", "mnist_cnn"]
        shown = row["target's norm"].removesuffix(" (1)").replace("−", "-")
        assert float(shown) == pytest.approx(distance / 1.4826, abs=0.005)


def test_cases_are_counted_in_their_order():
    """By the norms that a run stored, whatever its own verdict was."""
    found, another, none = [1.0, 5, 6, 7, 8], [6.0, 1, 5, 7, 8], [5, 5.5, 6, 7, 8]
    runs = [
        detected(norms, f"mnist-mnist_cnn-badnets-s{seed}", case=2)
        for seed, norms in enumerate((found, found, another, none))
    ]
    row = rows_of("Detectors", runs)["nc on badnets", "mnist_cnn"]
    assert row["cases 1 / 2 / 3 / 4"] == "2 / 0 / 1 / 1" and row["index > 2"] == "3 of 4"


def test_a_small_p_counts_on_either_side_and_names_a_label():
    plain = [60, 55, 70, 64, 58, 49, 66, 73, 61, 52]
    cases = [5, *plain[1:]], [900, *plain[1:]], [*plain[:9], 5], plain
    runs = [detected(norms, f"mnist-mnist_cnn-badnets-s{seed}") for seed, norms in enumerate(cases)]
    row = rows_of("Detectors", runs)["nc on badnets", "mnist_cnn"]
    assert row["p < .05"] == "3 of 4" and row["p names the target"] == "2 of 4"


def test_strip_shows_the_rates_at_one_per_cent():
    names = "far_normal", "frr_normal", "far_empirical", "frr_empirical"
    rates = [
        {"frr": share} | dict(zip(names, (10 * share, share + 0.5, 20 * share, share)))
        for share in (0.5, 1, 2)
    ]
    row = rows_of("STRIP", [entry(defence="strip", rates=rates, auroc=0.9, entropy_ratio=0)])
    assert list(row["strip on badnets", "mnist_cnn"].values())[2:-1] == [
        "10.00 (1)", "1.50 (1)", "20.00 (1)", "1.00 (1)", "0.90 (1)", "0.00 (1)"
    ]  # fmt: skip


def test_every_share_of_a_repair_has_a_row_and_other_tables_count_the_run_once():
    metrics = {f"clean_accuracy_repaired{end}": value for end, value in
               (("_0.01", 97.0), ("_0.03", 98.0), ("", 98.5))}  # fmt: skip
    run = detected([1.0, 5, 6, 7, 8], **metrics, asr_repaired_=1.0, **{"asr_repaired_0.01": 7.0})
    run |= {
        "script": "generator_reverse",
        "folder": run["folder"].replace("nc", "generator_reverse"),
    }
    run["arguments"] |= {"data_fraction": 0.01, "repair_fraction": [0.01, 0.03, 0.05]}
    rows = rows_of("Repairs", [run])
    name = "generator_reverse on badnets"
    shown = [rows[f"{name}, {share} %", "mnist_cnn"]["clean"] for share in (1, 3, 5)]
    assert shown == ["97.00 (1)", "98.00 (1)", "98.50 (1)"]
    assert rows[f"{name}, 1 %", "mnist_cnn"]["drop"] == "2.00 (1)"
    assert rows[f"{name}, 1 %", "mnist_cnn"]["ASR"] == "7.00 (1)"
    assert rows_of("Detectors", [run])[name, "mnist_cnn"]["index"] == "3.37 (1)"
    del run["metrics"]["clean_accuracy_repaired_0.01"]  # refused: the row is not that of 5 %
    assert [row for row, _ in rows_of("Repairs", [run])] == [f"{name}, {k} %" for k in (3, 5)]


def test_every_strength_of_a_filter_has_a_row():
    """In the run's order; the runs of two seeds are pooled; the run itself is counted once."""
    filters = [
        {"filter": "jpeg", "strength": 100, "clean_accuracy": 90.0, "asr": 80.0},
        {"filter": "jpeg", "strength": 5, "clean_accuracy": 70.0, "asr": 10.0},
    ]
    entries = [
        entry(f"mnist-mnist_cnn-badnets-s{seed}", "purify", filters=filters) for seed in (0, 1)
    ]
    rows = rows_of("Filters by strength", entries)
    assert [name for name, _ in rows] == ["jpeg 100 on badnets", "jpeg 5 on badnets"]
    last = rows["jpeg 5 on badnets", "mnist_cnn"]
    assert last["clean"] == "70.00 ± 0.00 (2)" and last["filter first: ASR"] == "–"
    assert table.frame(entries)["last"].sum() == 2


def test_only_models_that_were_repaired_are_in_the_repairs():
    runs = [detected([1.0, 5, 6, 7, 8], clean_accuracy_repaired=98.0)]
    runs += [detected([4.0, 5, 6, 7, 8], "mnist-mnist_cnn-wanet-s0")]
    assert [label for label, _ in rows_of("Repairs", runs)] == ["nc on badnets, 10 %"]


# ===== Rows =====


def test_two_networks_and_two_variants_are_rows_of_their_own():
    name = "stealthy_adversarial"
    victims = [f"mnist-mnist_cnn-{name}-s0", f"mnist-mnist_conv5-{name}-s0"]
    victims += ["mnist-mnist_cnn-stealthy_no_adversarial-s0"]
    runs = [entry(victim, asr=90.0 + i) for i, victim in enumerate(victims)]
    runs += [detected([1.0, 5, 6, 7, 8], victim) for victim in victims]
    attacks, audits = rows_of("Attacks", runs), rows_of("Detectors", runs)
    assert attacks[name, "mnist_cnn"]["ASR"] == "90.00 (1)"
    assert attacks[name, "mnist_conv5"]["ASR"] == "91.00 (1)"
    assert attacks["stealthy_no_adversarial", "mnist_cnn"]["ASR"] == "92.00 (1)"
    assert len(attacks) == len(audits) == 3


def test_two_variants_of_a_defence_are_rows_of_their_own():
    runs = [entry(defence="abl", isolated_label_share=1.0, clean_accuracy_repaired=90.0)]
    runs.append(
        copy.deepcopy(runs[0]) | {"folder": "runs/mnist-mnist_cnn-badnets-s0/abl_bounded-s0"}
    )
    labels = [label for label, _ in rows_of("ABL", runs)]
    assert labels == ["abl on badnets", "abl_bounded on badnets"]


def test_the_network_in_a_name_is_the_one_that_was_trained():
    for run in [run for entries in FILES.values() for run in entries]:
        if "ckpt" not in run["arguments"]:
            dataset, network, _, seed = run["victim"].rsplit("-", 3)
            flags = run["arguments"]
            assert (dataset, network) == (flags["dataset"], flags["arch"])
            assert seed == f"s{flags['seed']}"


def test_outdated_runs_are_marked_by_what_their_entry_holds():
    fresh = entry("mnist-mnist_cnn-stealthy_adversarial-s0")
    fresh["arguments"] |= {"nc_steps": 200}
    old = entry("mnist-mnist_cnn-stealthy_adversarial-s1")
    old["arguments"] |= {"nc_steps": 10}
    label = "stealthy_adversarial"
    assert (label, "mnist_cnn") in rows_of("Attacks", [fresh])
    page = table.section("Attacks", table.frame([fresh, old]))
    assert f"| {label}† | mnist_cnn |" in page and f"† {label} (s1): Step 1 was" in page
    audit = detected([1.0, 5, 6, 7, 8], old["victim"])
    assert (f"nc on {label}†", "mnist_cnn") in rows_of("Detectors", [fresh, old, audit])


def test_a_defence_of_another_network_than_the_stored_victim_is_marked():
    victim = entry("mnist-mnist_cnn-badnets-s0")
    same, other = (detected([1.0, 5, 6, 7, 8], victim["victim"]) for _ in range(2))
    same["metrics"]["clean_accuracy"] = victim["metrics"]["clean_accuracy"]
    other["metrics"]["clean_accuracy"] = victim["metrics"]["clean_accuracy"] - 0.02
    assert not table.frame([victim, same]).why.iloc[1]
    assert table.frame([victim, other]).why.tolist() == [set(), {table.OTHER}]
    assert not table.frame([other]).why.iloc[0]  # no victim is stored


def test_rows_of_two_data_sets_in_a_file_name_theirs():
    runs = [entry("cifar10-airbench-wanet-s0"), entry("cifar100-airbench-wanet-s0")]
    assert {label for label, _ in rows_of("Attacks", runs)} == {"wanet, cifar10", "wanet, cifar100"}
    assert {label for label, _ in rows_of("Attacks", runs[:1])} == {"wanet"}


@pytest.mark.parametrize(
    ("script", "key", "part", "value"),
    [
        ("badnets", "ssim", "metrics", None),
        ("wanet", "ssim", "metrics", None),
        ("freq_backdoor", "clean_ckpt", "arguments", "runs/mnist-mnist_cnn-clean-s0"),
        ("freq_backdoor", "asr_grey", "metrics", None),
        ("pruning_aware", "pattern", "arguments", "white"),
        ("stealthy_adversarial", "nc_steps", "arguments", 10),
        ("abl", "isolated_label_share", "metrics", None),
        ("nc", "rule", "arguments", None),
        ("generator_reverse", "rule", "arguments", None),
    ],
)
def test_each_rule_marks_its_runs_and_no_others(script, key, part, value):
    run = entry() | {"script": script}
    run["metrics"] |= {"isolated_label_share": 1.0, "asr_grey": 0.0}
    run["arguments"] |= {"rule": "p"}
    assert not any(table.outdated(run, rule) for rule in table.RULES)
    run[part] |= {key: value}
    hit = [rule for rule in table.RULES if table.outdated(run, rule)]
    assert [(rule["script"], rule["key"]) for rule in hit] == [(script, key)]
    assert not any(table.outdated(run | {"script": "strip"}, rule) for rule in table.RULES)


def test_rows_that_pool_runs_of_different_settings_are_marked():
    """Flags other than seeds and places differ within a row only where the mark says so.

    A flag that is not given is as one that was not there yet, and so is --precision float32, which
    had no flag before; STRIP's batch is a matter of speed.
    """
    places = "seed", "ckpt", "out", "device", "data_dir", "clean_ckpt", "surrogate", "teacher"
    groups = {}
    for run in [run for entries in FILES.values() for run in entries]:
        name = Path(run["folder"]).name
        variant = "attack" if name == run["victim"] else name.rsplit("-s", 1)[0]
        groups.setdefault((run["victim"].rsplit("-s", 1)[0], variant), []).append(run)
    for key, runs in groups.items():
        own = (*places, "batch_size") if key[1] == "strip" else places
        kept = [
            {
                k: v
                for k, v in run["arguments"].items()
                if k not in own and v not in (None, "float32")
            }
            for run in runs
        ]
        marked = any(table.outdated(run, rule) for run in runs for rule in table.RULES)
        assert marked or all(flags == kept[0] for flags in kept), key


def test_runs_from_before_the_schedule_are_marked_and_counted():
    old = entry("mnist-mnist_cnn-blend-s0") | {"commit_is": "first stored in"}
    none = entry("mnist-mnist_cnn-wanet-s0") | {"commit": None}
    assert [label for label, _ in rows_of("Attacks", [entry(), old, none])] == [
        "badnets", "blend‡", "wanet‡"
    ]  # fmt: skip
    page = table.page({"mnist": [entry(), old], "digits": [entry()], "tried": [none]})
    assert "2 of the 4 runs in the tables below" in page


def test_no_stored_run_names_a_place_outside_the_project():
    for run in [run for entries in FILES.values() for run in entries]:
        assert not [v for v in run["arguments"].values() if str(v).startswith(("/", "~"))], run


def test_every_run_names_a_commit_and_how_it_is_known():
    for run in [run for entries in FILES.values() for run in entries]:
        assert re.fullmatch(r"[0-9a-f]{40}\+?", run["commit"])
        assert run.get("commit_is", "first stored in") == "first stored in"


# ===== papers.toml =====


def test_every_paper_row_is_a_row_of_ours_or_of_runs_sh():
    rows = set(listed_rows())
    assert ("mnist", "nc", "badnets", "mnist_cnn", "10 %") in rows
    assert ("gtsrb", "attack", "freq_backdoor_500", "resnet18") in rows
    for entries in STORED.values():
        rows |= set(stored_rows(entries))
    assert len(ROWS) > 60
    assert [path for path, _ in ROWS if path not in rows] == []


def test_pictures_of_runs_are_copied_and_shown_where_they_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "HERE", tmp_path)
    run = tmp_path / "runs" / "curve.png"
    known = {"at": "mnist ABL", "alt": "a", "text": "Losses."}
    kept = known | {"file": "kept.png", "run": str(run)}
    drawn = known | {"file": "drawn.png"}
    stored.keep_pictures([kept, drawn])
    assert stored.pictures_at("mnist ABL", [kept, drawn]) == []
    run.parent.mkdir()
    run.write_bytes(b"a curve")
    stored.keep_pictures([kept, drawn])
    assert (tmp_path / "kept.png").read_bytes() == b"a curve"
    assert stored.pictures_at("mnist ABL", [kept, drawn]) == ["![a](kept.png)\n\nLosses."]
    assert stored.pictures_at("gtsrb ABL", [kept]) == []


def test_every_picture_stands_below_a_table_of_a_file_and_is_drawn_by_a_listed_run():
    folders = {row[:4] for row in listed_rows()}
    for picture in table.PAPERS["pictures"]:
        file, name = picture["at"].split(" ", 1)
        assert file in table.PAPERS["files"] and name in table.PAPERS["tables"]
        if "run" in picture:
            path = Path(picture["run"]).parent
            parts = [part.rsplit("-s", 1)[0] for part in path.parts[1:]]
            dataset, network, attack = parts[0].split("-", 2)
            defence = parts[1] if len(parts) > 1 else "attack"
            assert (dataset, defence, attack, network) in folders


@pytest.mark.drawn
def test_curves_by_epoch(tmp_path):
    run = {"asrs": [3.0, 80.0], "clean_accuracies": [97.0, 96.0], "mask_norms": [26.0, 150.0]}
    curves.draw(tmp_path / "epochs.png", {"adversarial": run, "epsilon_0.02": run})
    with Image.open(tmp_path / "epochs.png") as picture:
        assert picture.width > picture.height > 200


@pytest.mark.drawn
def test_curves_of_mode_connectivity(tmp_path):
    run = {"points": [0, 0.5, 1], "curve_clean_accuracy": [90.0, 80, 85], "curve_asr": [99.0, 5, 9]}
    runs = {"badnets": run | {"t": 0.5}, "wanet": run | {"t": None}}
    curves.draw_connectivity(tmp_path / "curves.png", runs)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > picture.height > 200
    found = curves.stored("lecture", curves.CURVE, curves.ATTACKS, "curve_asr")
    assert list(found) == list(curves.ATTACKS) and len(found["badnets"]["points"]) == 11


def test_the_point_of_the_lowest_loss_is_an_inner_one():
    curve = {"kept_back_loss": [0.1, 0.4, 0.3, 0.2], "curve_clean_accuracy": [90, 80, 70, 60]}
    found = table.derived(curve | {"curve_asr": [99, 5, 7, 9]})
    assert (found["lowest_clean"], found["lowest_asr"]) == (70, 7)
    assert table.derived(curve)["lowest_asr"] is None  # nothing triggered to measure


def test_what_was_tried_is_explained_and_shown():
    told = dict(leaves(table.PAPERS["tried"]))
    rows = {row for row in stored_rows(FILES["tried"]) if len(row) == 4}
    assert set(told) == rows
    shown = {run["folder"] for run in FILES["tried"]}
    assert len(shown) == len(FILES["tried"]) == 50


@pytest.mark.parametrize("path, leaf", ROWS, ids=[" ".join(path) for path, _ in ROWS])
def test_a_paper_row_has_a_sentence_and_a_source_for_its_figures(path, leaf):
    figures = {k: v for k, v in leaf.items() if k not in ("source", "differs")}
    figures = {k: v for k, v in figures.items() if not isinstance(v, dict)}
    assert re.fullmatch(r"[A-Z0-9].+\.", leaf["differs"])
    assert bool(figures) == ("source" in leaf)
    script = path[1] if path[1] == "attack" else re.sub("_bounded$", "", path[1])
    names = ["Repairs"] if len(path) == 5 else [
        name for name, spec in table.PAPERS["tables"].items()
        if script in spec["scripts"] and name not in ("Repairs", "Tried")
    ]  # fmt: skip
    shown = {
        metric for name in names for metric in table.PAPERS["tables"][name]["columns"].values()
    }
    assert set(figures) <= shown
    assert all(isinstance(v, str) and re.fullmatch(FIGURE, v) for v in figures.values())


def test_the_papers_figures_stand_in_their_columns():
    rows = [(head, row) for heading, head, rows in tables(PAGE) for row in rows]
    spot = [dict(zip(*pair)) for pair in rows if pair[1][0] == "*the paper*"]
    wanet = {"clean": "99.52", "ASR": "99.86", "noise / cross": "98.20", "SSIM": "–"}
    assert any(wanet.items() <= row.items() for row in spot)


# ===== The command =====


def copied(folder):
    """A copy of results/ and of what it needs, in a folder of its own."""
    (folder / "results").mkdir()
    code = [RESULTS / f"{name}.py" for name in ("table", "stored", "lecture", *table.APART)]
    held = [*RESULTS.glob("*.json"), *RESULTS.glob("*.png")]
    for path in [*code, RESULTS / "papers.toml", *held]:
        shutil.copy(path, folder / "results")
    shutil.copytree(
        ROOT / "methods", folder / "methods", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(
        ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(RESULTS / "README.md", folder / "results")
    return folder / "results"


def run_table(folder, *args):
    command = [sys.executable, "results/table.py", *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_command_alone_rebuilds_the_page(tmp_path, monkeypatch):
    results = copied(tmp_path)
    (results / "README.md").write_text("an older page")
    monkeypatch.setattr("sys.argv", ["table.py"])
    runpy.run_path(str(results / "table.py"), run_name="__main__")
    assert (results / "README.md").read_text() == PAGE


def test_runs_are_collected_with_their_defences(tmp_path):
    results, runs = copied(tmp_path), tmp_path / "runs"
    (results / "cifar10.json").unlink()
    made = [detected([1.0, 5, 6, 7, 8]), entry(), entry("mnist-mnist_conv5-clean-s3")]
    for run in made:
        folder = tmp_path / run["folder"]
        folder.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in run.items() if k not in ("folder", "victim")}
        (folder / "result.json").write_text(json.dumps(kept))
    (runs / "mnist-mnist_cnn-unfinished-s0").mkdir()
    (runs / "mnist-mnist_cnn-badnets-s0" / "unfinished-s0").mkdir()
    folders = sorted(path.relative_to(tmp_path) for path in runs.iterdir())
    done = run_table(tmp_path, *folders, "--save", "cifar10")
    assert done.returncode == 0, done.stderr
    assert json.loads((results / "cifar10.json").read_text()) == made
    page = (results / "README.md").read_text()
    assert "## CIFAR-10\n" in page and "| clean | mnist_conv5 | 99.00 (1) |" in page


def test_runs_are_added_to_those_that_are_stored(tmp_path):
    """A group that made a part of a file's rows replaces these and keeps the others."""
    path = tmp_path / "mnist.json"
    old, new, other = entry(asr=1.0), entry(asr=2.0), detected([1.0, 5, 6, 7, 8])
    stored.store(path, [old, other])
    stored.store(path, [new])
    assert json.loads(path.read_text()) == [other, new]
    stored.store(path, [old | {"folder": f"/elsewhere/{old['folder']}"}])  # another spelling
    assert sorted(run["metrics"].get("asr") for run in json.loads(path.read_text())) == [1.0, 98.0]


def test_a_defence_alone_belongs_to_the_victim_whose_folder_it_lies_in(tmp_path):
    """Else strip-s0 of one victim would replace that of another, and stand in no table."""
    made = detected([1.0, 5, 6, 7, 8])
    folder = tmp_path / made["folder"]
    folder.mkdir(parents=True)
    (folder.parent / "result.json").write_text("{}")
    kept = {k: v for k, v in made.items() if k not in ("folder", "victim")}
    (folder / "result.json").write_text(json.dumps(kept))
    (run,) = stored.collect([folder])
    assert run["victim"] == made["victim"] == folder.parent.name


def test_audits_are_no_rows(tmp_path):
    for name in ("audit-digits-mnist_cnn-badnets-s100", "digits-mnist_cnn-badnets-s100"):
        (tmp_path / name / "nc").mkdir(parents=True)
        (tmp_path / name / "nc" / "result.json").write_text("{}")
    (tmp_path / "audit-digits-mnist_cnn-badnets-s100" / "audit.json").write_text("{}")
    (run,) = stored.collect(tmp_path.iterdir())
    assert run["victim"] == "digits-mnist_cnn-badnets-s100"


@pytest.mark.parametrize(
    "args", [["runs/mnits-*", "--save", "mnist"], ["--save", "mnist"], ["runs/mnist-*"]]
)
def test_a_mistyped_folder_does_not_empty_the_tables(tmp_path, monkeypatch, one_line, args):
    results = copied(tmp_path)
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    monkeypatch.setattr("sys.argv", ["table.py", *args])
    monkeypatch.chdir(tmp_path)
    script = (results / "table.py").read_text()
    one_line(exec, compile(script, str(results / "table.py"), "exec"), {
        "__name__": "__main__", "__file__": str(results / "table.py")
    })  # fmt: skip
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_a_folder_that_no_table_would_show_is_refused(tmp_path, monkeypatch, one_line):
    results = copied(tmp_path)
    before = {path.name: path.read_bytes() for path in results.iterdir()}
    (tmp_path / "runs" / "my-model").mkdir(parents=True)
    result = {key: value for key, value in entry().items() if key not in ("victim", "folder")}
    (tmp_path / "runs" / "my-model" / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr("sys.argv", ["table.py", "runs/my-model", "--save", "mnist"])
    monkeypatch.chdir(tmp_path)
    script = compile((results / "table.py").read_text(), str(results / "table.py"), "exec")
    settings = {"__name__": "__main__", "__file__": str(results / "table.py")}
    assert "data-network-attack-sSEED" in one_line(exec, script, settings)
    assert {path.name: path.read_bytes() for path in results.iterdir()} == before


def test_a_method_s_figure_stands_beside_the_data_that_it_comes_from():
    """A script without a run on MNIST still has the one on the bundled digits."""
    lines = PAGE.split("## Methods")[1].split("##")[0].splitlines()
    heads, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    found = {row[0].split("/")[-1][:-4]: dict(zip(heads, row)) for row in rows[1:]}
    stored = [e for e in FILES["digits"] if e["victim"] == "digits-mnist_cnn-sig-s0"]
    (own,) = (e["metrics"]["asr"] for e in stored if e["script"] == "sig")
    assert (found["sig"]["on MNIST"], found["sig"]["on digits"]) == ("–", f"{own:.2f} (1)")
    assert not [name for name, row in found.items() if row["on MNIST"] == row["on digits"] == "–"]
