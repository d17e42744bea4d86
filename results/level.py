"""Level and power of the verdict on networks that had no part in its choice (level.json).

    bash runs.sh level            # train and search them; finished runs are skipped
    python results/level.py       # draw results/level.png; results/table.py writes the table

The rules were chosen on the MNIST rows with seeds below 100; these networks have other seeds.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail, saved_figure
from common.metrics import SMALLEST_NORM, outlying, verdict

HERE = Path(__file__).resolve().parent
COLOUR = "cifar10", "gtsrb", "lecture"
ALPHA, INDEX = 0.05, 2.0
FEWEST = 5  # networks that a curve is drawn for
SCORES = {"p": lambda v: -v["p_value"], "log t": lambda v: v["t"]}  # high: suspicious
SCORES |= {"index": lambda v: v["index"], "ratio": lambda v: -v["ratio"]}
HEAD = ["data", "network", "detector", "models", "n", "p < .05", "index > 2", "inconclusive"]
HEAD += [f"AUROC {name}" for name in SCORES]
TEXT = """## Level and power of the verdict

Networks that had no part in the choice of the rules: other seeds, the digits, and on colour data
the clean networks of the tables above. The generators' rate and `--skip` were chosen on seed 100 of
the small networks on CIFAR-10, one clean and one backdoored. A cell counts networks, with the exact
95 % interval of Clopper and Pearson for their share in per cent. On clean networks the p-value
should stay at 5 %; on backdoored ones a count is of those whose target is named, below or above.
Inconclusive answers count as not flagged. "log t" is how far the most outlying norm lies from the
others on a logarithmic scale (the t of Grubbs' test), which the p-value is made of. An AUROC
compares the conclusive answers on the backdoored networks of a row with those on the clean ones.

![How often clean networks get a p-value below a level](level.png)"""


def markdown(head, rows):
    """A table of strings."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def missed_goal(m):
    """Whether the generators' pre-training missed its goal (of --pretrain-residual's default)."""
    return m.get("pretrain_residual", 0) > 0.1 * m.get("spread", 1)


def stored_verdict(m):
    """Today's verdict on the norms among a run's metrics `m`, inconclusive as in report_verdict.

    `t` is Grubbs' on the logarithms, of the norm that is furthest from the others.
    """
    norms = np.array(m["norms"], dtype=float)
    found = np.array(m.get("found", np.array(m.get("asrs", norms + 1)) >= 0.8))
    v = verdict(norms, found, INDEX, ALPHA)
    if v["conclusive"]:
        _, t, _ = outlying(np.log(np.maximum(norms[found], SMALLEST_NORM))[None], 1)
        v["t"] = abs(t[0, 0])
    if missed_goal(m) and not v["below"] + v["above"]:
        v |= {"conclusive": False, "flagged_by_index": []}
    return v


def decisions(entries):
    """{(data, network, detector, attack): [(verdict of the stored norms, target or None), ...]}."""
    groups = {}
    for entry in entries:
        metrics = entry["metrics"]
        if "norms" in metrics:
            data, arch, attack, _ = entry["victim"].rsplit("-", 3)
            answer = stored_verdict(metrics), metrics.get("target")
            groups.setdefault((data, arch, entry["script"], attack), []).append(answer)
    return groups


def population(files):
    """The entries of level.json, and the clean networks of the tables on colour data, once each:
    a search under another name (nc_float32) is of a network that counts already."""
    colour = [entry for name in COLOUR for entry in files.get(name, [])]
    clean = [entry for entry in colour if entry["victim"].rsplit("-", 2)[1] == "clean"]
    once = [e for e in clean if Path(e["folder"]).name.rsplit("-s", 1)[0] == e["script"]]
    return files.get("level", []) + once


def interval(count, n):
    """The exact binomial interval of a share, at 95 %."""
    return binomtest(count, n).proportion_ci(0.95, "exact")


def share(count, n):
    """'count (low to high %)'."""
    low, high = interval(count, n)
    return f"{count} ({100 * low:.0f} to {100 * high:.0f} %)"


def flagged(answers, rule):
    """How many networks `rule` flags ("p" or "index"); with a target, whose target it names."""
    names = [v["below"] + v["above"] if rule == "p" else v["flagged_by_index"] for v, _ in answers]
    return sum(
        bool(labels) if target is None else target in labels
        for labels, (_, target) in zip(names, answers)
    )


def auroc(score, clean, attacked):
    """Probability that a backdoored network scores above a clean one; NaN without both."""
    values = [[score(v) for v, _ in part if v["conclusive"]] for part in (clean, attacked)]
    if not all(values):
        return np.nan
    labels = np.repeat([0, 1], [len(part) for part in values])
    return float(roc_auc_score(labels, np.nan_to_num(np.concatenate(values), posinf=1e9)))


def level_held(groups):
    """A sentence: whose false alarms are more than 5 % for certain, and how many are above."""
    clean = {k: [v for v, _ in answers] for k, answers in groups.items() if k[3] == "clean"}
    alarms = {k: [v for v in found if v["below"] + v["above"]] for k, found in clean.items()}
    off = [
        f"{script} on {arch}, {data}"
        for (data, arch, script, _), found in sorted(alarms.items())
        if found and interval(len(found), len(clean[data, arch, script, "clean"])).low > ALPHA
    ]
    where = f"lies above 5 % for {'; '.join(off)}" if off else "lies above 5 % in none"
    above = sum(bool(v["above"] and not v["below"]) for found in alarms.values() for v in found)
    count = sum(map(len, alarms.values()))
    return (
        f"The interval of the clean rows {where}. Of {count} false alarms in all, {above} are of "
        "a norm above the others, which no repair follows."
    )


def section(entries):
    """The table in Markdown with its text; '' without entries."""
    groups, rows = decisions(entries), []
    for key, answers in sorted(groups.items(), key=lambda g: str(g[0])):
        *where, attack = key
        clean = groups.get((*where, "clean"), [])
        cells = [share(flagged(answers, rule), len(answers)) for rule in ("p", "index")]
        unsure = str(sum(not v["conclusive"] for v, _ in answers))
        found = [auroc(score, clean, answers) for score in SCORES.values()]
        found = ["–" if attack == "clean" or np.isnan(a) else f"{a:.3f}" for a in found]
        rows.append([*key, str(len(answers)), *cells, unsure, *found])
    return f"{TEXT}\n\n{markdown(HEAD, rows)}\n\n{level_held(groups)}" if rows else ""


def draw(path, entries):
    """The share of clean networks with a p-value below each level; a true one's is the diagonal."""
    with saved_figure(path, figsize=(5, 4)) as (_, axis):
        for (*where, attack), answers in sorted(decisions(entries).items()):
            if attack == "clean":
                p = [v["p_value"] for v, _ in answers if v["conclusive"]]
                if len(p) >= FEWEST:
                    axis.ecdf(p, label=f"{', '.join(where)} ({len(p)})")
        axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        axis.axvline(ALPHA, color="grey", linewidth=0.8, linestyle=":")
        axis.set(xlabel="level", ylabel="share of clean networks with p below it")
        axis.legend(fontsize="small")


if __name__ == "__main__":
    if not (HERE / "level.json").exists():
        fail("no results/level.json; bash runs.sh level makes it")
    files = {name: HERE / f"{name}.json" for name in ("level", *COLOUR)}
    files = {k: json.loads(path.read_text()) for k, path in files.items() if path.exists()}
    draw(HERE / "level.png", population(files))
    print(f"wrote {HERE / 'level.png'}")
