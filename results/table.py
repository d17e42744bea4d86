"""Collect result.json files and print the README's rows: ours as mean +- sd (n).

python results/table.py runs/mnist-*  --save results/mnist.json
python results/table.py --from results/mnist.json
python results/table.py --bench runs/bench
"""

import argparse
import json
import statistics
from pathlib import Path


def collect(folders):
    """The result of every victim folder and of the defences inside it, as a flat list."""
    results = []
    for folder in sorted(map(Path, folders)):
        for path in sorted([folder / "result.json", *folder.glob("*/result.json")]):
            if path.exists():
                result = json.loads(path.read_text())
                results.append({"folder": path.parent.as_posix(), "victim": folder.name, **result})
    return results


def spread(values, digits=2):
    """'mean ± sd (n)' of a list of numbers."""
    values = [float(value) for value in values]
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {sd:.{digits}f} ({len(values)})"


# (paper's figures, differs in) by dataset and row; sources: the papers named in README.md
PAPER = {
    ("mnist", "clean"): (
        "99.35 / – / –",
        "Feng et al.'s clean model; ours: WaNet's network, 15 epochs",
    ),
    ("mnist", "badnets"): (
        "98.54 / 99.90 / –",
        "Neural Cleanse's MNIST model; ours: 3 × 3 white corner patch, crops after stamping",
    ),
    ("mnist", "wanet"): (
        "99.52 / 99.86 / 98.20",
        "30 epochs (15 gave ASR 99.29), not 1,000; last epoch, not best on test; "
        "ASR without the target class, 8 bits",
    ),
    ("mnist", "nc", "clean"): ("index 1.10", "10 models and their p-values, not one mean"),
    ("mnist", "nc", "badnets"): (
        "index 3.65",
        "the authors' GTSRB sample model; ours: 5 MNIST models",
    ),
    ("mnist", "nc", "wanet"): ("0 of 10 found, index .75", "3 models"),
    ("mnist", "generator_reverse", "clean"): (
        "index 1.07",
        "10 models and their p-values; no LPIPS",
    ),
    ("mnist", "generator_reverse", "badnets"): ("–", "not in the paper"),
    ("mnist", "generator_reverse", "wanet"): (
        "9 / 1 / 0 / 0, index 5.41",
        "10 repeats on 3 victims, not 1; no LPIPS; longer pre-training",
    ),
    ("mnist", "generator_reverse", "badnets", "5 %"): ("–", "not in the paper"),
    ("mnist", "nc", "badnets", "10 %"): (
        "97.69 / .57; w/o 97.38 / 93.37",
        "rate .03 to 0 and no augmentation, chosen with the test figures of seeds 0–2 in sight; "
        "seeds 3 and 4 alone: ASR .18 and .14",
    ),
    ("mnist", "generator_reverse", "wanet", "1 %"): ("99.09 / .07; w/o 99.37 / 99.77", "no LPIPS"),
    ("mnist", "generator_reverse", "wanet", "3 %"): ("99.16 / .08; w/o 99.34 / 99.55", "no LPIPS"),
    ("mnist", "generator_reverse", "wanet", "5 %"): ("99.26 / .09; w/o 99.38 / 98.49", "no LPIPS"),
}


def runs_of(results, script, attack):
    """The metrics of a script's runs; for a defence, those on victims of `attack`."""
    return [
        {"dataset": r["victim"].split("-")[0], **r["metrics"]}
        for r in results
        if r["script"] == script and (script == attack or r["victim"].split("-")[-2] == attack)
    ]


def paper(runs, *row):
    """The paper's figures for this row, and what differs; dashes where no paper has it."""
    return PAPER.get((runs[0]["dataset"], *row), ("–", "–"))


def attack_rows(results):
    """Clean accuracy, ASR, accuracy under noise, and the trigger's ASR on a clean model."""
    keys = ("clean_accuracy", "asr", "noise_accuracy", "psnr", "asr_on_clean_model")
    for script in ("clean", "badnets", "wanet"):
        runs = runs_of(results, script, script)
        cells = [spread([m[k] for m in runs]) if all(k in m for m in runs) else "–" for k in keys]
        if runs:
            yield [script, *cells, *paper(runs, script)]


def detector_rows(results):
    """Alarms by the paper's rule and by the p-value, the cases, index and ratio."""
    for script in ("nc", "generator_reverse"):
        for attack in ("clean", "badnets", "wanet"):
            runs = runs_of(results, script, attack)
            if not runs:
                continue
            flagged = sum(bool(m["flagged"]) for m in runs)
            small = sum(m["p_value"] < 0.05 for m in runs)
            cases = " / ".join(str(sum(m.get("case") == c for m in runs)) for c in (1, 2, 3, 4))
            index = spread([float(m["index"]) for m in runs])
            ratio = spread([m["ratio"] for m in runs])
            yield [
                f"{script} on {attack}",
                f"{flagged} of {len(runs)}",
                f"{small} of {len(runs)}",
                "–" if attack == "clean" else cases,
                index,
                ratio,
                *paper(runs, script, attack),
            ]


def repair_rows(results):
    """Clean accuracy and ASR after the repair, and after the same fine-tuning without triggers."""
    for script, attack, shares in (
        ("nc", "badnets", (0.1,)),
        ("generator_reverse", "wanet", (0.01, 0.03, 0.05)),
        ("generator_reverse", "badnets", (0.05,)),
    ):
        runs = runs_of(results, script, attack)
        for share in shares:
            suffix = "" if share == shares[-1] else f"_{share:g}"
            repaired = [m for m in runs if f"clean_accuracy_repaired{suffix}" in m]
            if not repaired:
                continue
            after = [m[f"clean_accuracy_repaired{suffix}"] for m in repaired]
            drop = spread([m["clean_accuracy"] - value for m, value in zip(repaired, after)])
            asr = spread([m[f"asr_repaired{suffix}"] for m in repaired])
            plain = " / ".join(
                spread([m[f"{kind}_clean_only{suffix}"] for m in repaired])
                for kind in ("clean_accuracy", "asr")
            )
            name = f"{100 * share:g} %"
            row = [f"{script} on {attack}", name, spread(after), drop, asr, plain]
            yield [*row, *paper(runs, script, attack, name)]


END = ["paper", "differs in"]
TABLES = {
    "Attacks": (
        ["attack", "clean", "ASR", "noise", "PSNR, dB", "ASR on a clean model", *END],
        attack_rows,
    ),
    "Detectors": (
        ["detector", "index > 2", "p < .05", "cases 1 / 2 / 3 / 4", "index", "ratio", *END],
        detector_rows,
    ),
    "Repairs": (
        ["repair", "data", "clean", "clean drop", "ASR", "w/o reversed: clean / ASR", *END],
        repair_rows,
    ),
}


def tables(results):
    """The Markdown tables of a list of results, by name."""
    rendered = {}
    for name, (head, rows) in TABLES.items():
        lines = [head, ["---"] * len(head), *rows(results)]
        rendered[name] = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return rendered


def write_readme(path, results):
    """Put the tables between the README's `<!-- NAME -->` and `<!-- end -->` marks."""
    text = Path(path).read_text()
    for name, table in tables(results).items():
        head, rest = text.split(f"<!-- {name} -->")
        text = f"{head}<!-- {name} -->\n{table}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    Path(path).write_text(text)


def bench(folder):
    """Print seconds, ratio and agreement of the folded and the label-by-label runs."""
    for method in ("nc", "generator_reverse"):
        alone, folded = (
            json.loads((Path(folder) / f"{method}-{kind}" / "result.json").read_text())
            for kind in ("1", "default")
        )
        a, b = alone["metrics"], folded["metrics"]
        gap = max(abs(p - q) / max(abs(p), 1e-9) for p, q in zip(a["norms"], b["norms"]))
        same = "same" if (a["verdict"], a["flagged"]) == (b["verdict"], b["flagged"]) else "OTHER"
        print(
            f"{method}, K = {len(a['norms'])}, {folded['device']}: one label at a time "
            f"{a['search_seconds']:.1f} s, folded {b['search_seconds']:.1f} s, ratio "
            f"{a['search_seconds'] / b['search_seconds']:.2f}; {same} verdict, largest relative "
            f"difference of a norm {gap:.1e}"
        )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folders", nargs="*", help="victim folders")
    p.add_argument("--save", help="write the collected results to this .json")
    p.add_argument("--from", dest="source", help="read collected results instead of folders")
    p.add_argument("--readme", help="put the tables into this README")
    p.add_argument("--bench", help="compare the runs of `runs.sh bench` in this folder")
    args = p.parse_args()
    if args.bench:
        bench(args.bench)
    else:
        found = json.loads(Path(args.source).read_text()) if args.source else collect(args.folders)
        if args.save:
            Path(args.save).write_text(json.dumps(found, indent=0) + "\n")
        if args.readme:
            write_readme(args.readme, found)
        for name, table in tables(found).items():
            print(f"\n{name}\n\n{table}")
