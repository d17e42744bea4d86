"""results/lecture.py: whose figures stand in a cell, and the paper's beside them."""

from results import lecture, table


def entry(attack, script, seed=0, name=None, **metrics):
    flags = {} if script == attack else {"ckpt": "x"}
    victim = f"cifar10-wrn16_1-{attack}-s{seed}"
    folder = f"runs/{victim}" + (f"/{name or script}-s0" if flags else "")
    own = {"folder": folder, "script": script, "arguments": flags, "metrics": metrics}
    return {"victim": victim, **own}


ENTRIES = [
    entry("badnets", "badnets", asr=100.0, clean_accuracy=86.0),
    entry("badnets", "badnets", seed=1, asr=98.0, clean_accuracy=85.0),
    entry("badnets", "nad", asr=100.0, asr_repaired=4.0, clean_accuracy_repaired=83.0),
    entry("badnets", "mcr", asr=100.0, clean_accuracy=86.0),  # its repair was not saved
    entry("badnets", "nad", seed=1, asr=100.0, clean_accuracy=86.0),
    entry("badnets", "nad", name="nad_slow", asr_repaired=9.0, clean_accuracy_repaired=9.0),
    entry("clean", "clean", clean_accuracy=88.0),
    entry("blend", "nad", asr_repaired=50.0, clean_accuracy_repaired=80.0),
]


def test_cells():
    assert lecture.figures(ENTRIES, "badnets", "none") == "99.00 / 85.50 (2)"
    assert lecture.figures(ENTRIES, "badnets", "nad") == "4.00 / 83.00 (1), 1 refused"
    assert lecture.figures(ENTRIES, "badnets", "mcr") == "1 refused"
    assert lecture.figures(ENTRIES, "badnets", "abl") == "–"
    assert lecture.figures(ENTRIES, "clean", "none") == "– / 88.00 (1)"
    assert lecture.figures(ENTRIES, "sig", "none") == "–"


def test_every_row_has_the_papers_figures_below_it():
    papers = table.PAPERS["lecture"]
    assert len(papers) == 11 and all(len(row["cells"]) == 5 for row in papers.values())
    text = lecture.section(ENTRIES, papers)
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert [line.split(" | ")[0] for line in lines] == [
        *("| `clean`", "| *No attack, the paper*"),
        *("| `badnets`", "| *BadNets, the paper*"),
        *("| `blend`", "| *Blend, the paper*"),
    ]
    assert (
        lines[2]
        == "| `badnets` | 99.00 / 85.50 (2) | – | 1 refused | 4.00 / 83.00 (1), 1 refused | – |"
    )
    assert "3.32 / 78.49 | 3.56 / 82.18 | 3.04 / 86.11" in lines[3]
    assert lecture.section([], papers) == ""


def test_the_papers_averages():
    """The rows give the averages that the paper prints: a slip of the pen would change them."""
    rows = [row["cells"] for name, row in table.PAPERS["lecture"].items() if name != "clean"]
    cells = [[[float(v) for v in cell.split(" / ")] for cell in row] for row in rows]
    asr = [sum(row[k][0] for row in cells) / 10 for k in range(5)]
    clean = [sum(row[k][1] for row in cells) / 10 for k in range(5)]
    for ours, theirs in zip(asr, (97.73, 75.07, 24.38, 20.40, 7.69)):
        assert abs(ours - theirs) < 0.2
    for ours, theirs in zip(clean, (83.55, 80.62, 76.56, 80.37, 84.76)):
        assert abs(ours - theirs) < 0.2
