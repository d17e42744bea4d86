"""Write results/README.md: the tables of every results/<name>.json, with the papers' figures.

    python results/table.py                               # rebuild the page
    python results/table.py runs/mnist-* --save mnist     # store these folders' results first

A row holds the runs of one data set, script, victim and network. All words, columns, papers'
figures and rules for marking a row as outdated stand in results/papers.toml.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import tomli

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail, written_whole
from common.metrics import case_of
from results import lecture, level, public
from results.level import markdown
from results.stored import collect, keep_pictures, pictures_at, store

HERE = Path(__file__).resolve().parent
PAPERS = tomli.loads((HERE / "papers.toml").read_text())
ROW = ["dataset", "defence", "attack", "network", "share"]  # the keys of a row in papers.toml
RULES, DASH, APART = PAPERS["outdated"], "–", ("level", "public")
OTHER = "The victim is not the network of the attack's row but another of the same recipe and seed."
FORMS = {"ssim": ".3f", "p_value": ".3f", "isolated_loss_trained": ".0e", "repair_lr": ".2g"}


def spread(values, form=".2f"):
    """'mean ± sd (n)' of the values that are not missing, 'value (1)' of one, else a dash."""
    values = pd.Series(list(values), dtype=object).astype(float).dropna()
    if values.empty:
        return DASH
    sd = f" ± {values.std():{form}}" if len(values) > 1 and np.isfinite(values).all() else ""
    return f"{values.mean():{form}}{sd} ({len(values)})".replace("inf", "∞").replace("-", "−")


def cell(runs, metric):
    """The figure of one metric over the runs of a row: a spread, 'k of n', or counts of cases."""
    found = runs.get(metric, pd.Series(dtype=object)).dropna()
    if len(found) and isinstance(found.iloc[0], (bool, np.bool_)):
        return f"{sum(found)} of {len(found)}"
    if len(found) and metric == "case":  # of Zheng et al.
        return " / ".join(str((found == case).sum()) for case in (1, 2, 3, 4))
    return spread(found, FORMS.get(metric, ".2f"))


def derived(m):
    """A run's metrics and the figures that the tables derive from them."""
    new = {"side": m.get("noise_accuracy", m.get("cross_accuracy")), "drop": None}
    new["other"] = m.get("asr_other_bins", m.get("asr_other_noise", m.get("asr_other")))
    if "norms" in m:  # today's verdict of the stored norms
        norms, target = np.array(m["norms"], dtype=float), m.get("target")
        v = level.stored_verdict(m)
        by_index, sure = v["flagged_by_index"], v["conclusive"] or None
        new |= {key: v[key] for key in ("index", "ratio", "p_value")}
        new |= {"alarm": sure and bool(by_index), "small_p": sure and v["p_value"] < 0.05}
        if sure and target is not None:
            new["case"] = case_of(by_index, target)
            new["target_found"] = target in v["below"] + v["above"]
            far = norms - np.median(norms)
            new["two_sided"] = far[target] and far[target] / np.median(np.abs(1.4826 * far))
    if "kept_back_loss" in m:  # of a curve: the inner point that the other rule would take
        lowest = 1 + int(np.argmin(m["kept_back_loss"][1:-1]))
        new["lowest_clean"] = m["curve_clean_accuracy"][lowest]
        new["lowest_asr"] = m["curve_asr"][lowest] if "curve_asr" in m else None
    if m.get("clean_accuracy_repaired") is not None:
        new["drop"] = m["clean_accuracy"] - m["clean_accuracy_repaired"]
    rates = [rate for rate in m.get("rates", []) if rate["frr"] == 1]  # nominal, in per cent
    return m | new | {k: v for rate in rates for k, v in rate.items() if k != "frr"}


def outdated(entry, rule):
    """Whether a rule of papers.toml says that today's code would not make this entry again."""
    found = (entry | entry["arguments"] | entry["metrics"]).get(rule["key"])
    when, known = rule["when"], {"missing": found is None, "given": found is not None}
    return entry["script"] == rule["script"] and known.get(str(when), found in [*np.ravel(when)])


def frame(entries):
    """One line per run and share of clean images that it used: its figures and its names."""
    victims, lines = {e["victim"]: e for e in entries if "ckpt" not in e["arguments"]}, []
    for entry in entries:
        names = dict(zip(("dataset", "network", "attack", "seed"), entry["victim"].rsplit("-", 3)))
        own, victim = "ckpt" not in entry["arguments"], victims.get(entry["victim"], entry)
        names["script"] = "attack" if own else entry["script"]
        names["defence"] = "attack" if own else Path(entry["folder"]).name.rsplit("-s", 1)[0]
        names["why"] = {rule["why"] for rule in RULES if outdated(entry, rule)}
        names["why"] |= {r["why"] for r in RULES if "victims" in r and outdated(victim, r)}
        accuracies = [m.get("clean_accuracy", 0) for m in (entry["metrics"], victim["metrics"])]
        names["why"] |= {OTHER} if abs(accuracies[0] - accuracies[1]) > 0.005 else set()
        names["early"] = "commit_is" in entry or not entry.get("commit")  # see text.head
        flags, metrics = entry["arguments"], entry["metrics"]
        shares = flags.get("repair_fraction") or [flags.get("data_fraction") or 0]
        for share in shares:
            end = "" if share == shares[-1] else f"_{share:g}"
            after = [key for key in metrics if end and ("repair" in key or "_clean_only" in key)]
            own = {key.removesuffix(end): metrics[key] for key in metrics if key.endswith(end)}
            names |= {"share": f"{100 * share:.3g} %", "last": not end}
            lines.append(derived(metrics | dict.fromkeys(after) | own) | names)
        for row in metrics.get("filters", []):
            own = {"script": "filter", "defence": f"{row['filter']} {row['strength']:g}"}
            lines.append(names | row | own | {"last": False, "share": ""})
    return pd.DataFrame(lines)


def section(name, runs, papers=PAPERS, file=""):
    """A table of `runs` in Markdown with its text, notes, marks and pictures; '' without rows."""
    spec, rows, notes, marks = PAPERS["tables"][name], [], {}, {}
    columns, keys = spec["columns"], spec["columns"].values()
    strengths = spec["scripts"] == ["filter"]  # in the order of the runs
    if "needs" in spec:  # a row has one of these figures
        runs = runs[runs.reindex(columns=spec["needs"]).notna().any(axis=1)]
    if name != "Repairs" and not strengths:
        runs = runs[runs["last"]].assign(share="")
    several = runs.dataset.nunique() > 1 and name != "Tried"
    for key, group in runs[runs.script.isin(spec["scripts"])].groupby(ROW, sort=not strengths):
        paper = functools.reduce(lambda at, part: at.get(part, {}), filter(None, key), papers)
        dataset, defence, attack, network, share = key
        label = attack if defence == "attack" else f"{defence} on {attack}{share and ', '}{share}"
        label += f", {dataset}" if several else ""
        for why in set().union(*group.why):
            seeds = ", ".join(group.seed[[why in found for found in group.why]])
            marks.setdefault(why, []).append(f"{label} ({seeds})")
        note = paper.get("differs", "")
        note += f" The paper's figures: {paper['source']}." if "source" in paper else ""
        number = str(notes.setdefault(note, len(notes) + 1)) if note else DASH
        label += "†" * any(group.why) + "‡" * any(group.early)
        label += f" ({', '.join(group.seed)})" if name == "Tried" else ""
        rows.append([label, network, *(cell(group, key) for key in keys), number])
        if "source" in paper:
            rows.append(["*the paper*", DASH, *(paper.get(key, DASH) for key in keys), number])
    table = markdown(["row", "network", *columns, "note"], rows)
    notes = "\n".join(f"{number}. {note}" for note, number in notes.items())
    marks = [f"† {', '.join(labels)}: {why}" for why, labels in sorted(marks.items())]
    pictures = pictures_at(f"{file} {name}", PAPERS["pictures"])
    parts = [f"### {name}", spec["text"].strip(), table, notes, *marks, *pictures]
    return "\n\n".join(filter(None, parts)) if rows else ""


def methods(*frames):
    """Every script with its paper, lines and kind, and its main figure in each of the frames."""
    for m in PAPERS["methods"]:
        script, figure = m["script"], m["figure"]
        own = [m.get("victim", script), script if "victim" in m else "attack", m["network"]]
        rows = (runs[["attack", "defence", "network"]] == own for runs in frames)
        found = [runs[runs["last"] & row.all(axis=1)] for runs, row in zip(frames, rows)]
        lines = (HERE.parent / "methods" / f"{script}.py").read_text().count("\n")
        names = f"`methods/{script}.py`", m["paper"], str(lines), m["kind"], figure["name"]
        yield [*names, *(cell(runs, figure["metric"]) for runs in found)]


def page(files):
    """The text of results/README.md from the entries of each file, by its name."""
    frames = {name: frame(entries) for name, entries in files.items() if name not in APART}
    old = pd.concat([runs[runs["last"]].early for runs in frames.values()])
    parts = ["# Results", PAPERS["text"]["head"].format(old=sum(old), total=len(old)).strip()]
    rows = methods(frames["mnist"], frames["digits"])
    parts += ["## Methods", markdown(PAPERS["text"]["methods"], rows)]
    for name, about in PAPERS["files"].items():
        if name in frames:
            parts += [f"## {about['title']}", about["text"].strip()]
            parts += [section(t, frames[name], file=name) for t in [*PAPERS["tables"]][:-1]]
    parts.append(lecture.section(files.get("lecture", []), PAPERS["lecture"]))
    parts.append(level.section(level.population(files)))
    parts.append(public.section(files.get("public", []), PAPERS["public"]))
    parts.append(section("Tried", frames["tried"], PAPERS["tried"]))
    return "\n\n".join(filter(None, parts)) + "\n"


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folders", nargs="*", help="victim folders whose results to collect")
    p.add_argument("--save", metavar="NAME", help="results/NAME.json, where to put them")
    args = p.parse_args()
    found = list(collect(args.folders))
    if (args.folders or args.save) and not (found and args.save):
        fail(f"give --save NAME and folders with a result.json; got {args.folders}, {args.save}")
    if unnamed := [run["victim"] for run in found if run["victim"].count("-") < 3]:
        fail(f"{unnamed[0]} is in no table: a victim's folder is named data-network-attack-sSEED")
    if found:
        store(HERE / f"{args.save}.json", found)
        keep_pictures(PAPERS["pictures"])
    files = {path.stem: json.loads(path.read_text()) for path in HERE.glob("*.json")}
    with written_whole(HERE / "README.md") as temporary:
        temporary.write_text(page(files))
    print(f"wrote {HERE / 'README.md'}")
