"""results/bench.py: it runs to its end; the verdicts of labels alone and of folded ones agree."""

import os
import re
import runpy

import pytest
import torch
from conftest import ROOT, loaded, result_of

from results import bench


def test_medians_take_the_calls_in_turn(monkeypatch):
    clock = iter([0, 0, 0, 1, 0, 2, 0, 3, 0, 6])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert bench.medians(calls, torch.device("cpu"), 2) == {"a": 2, "b": 4}  # without the warm-up
    assert order == list("ababab")


def test_folding_and_throughputs(digits_badnets):
    victim, cpu = loaded(digits_badnets), torch.device("cpu")
    rows = list(bench.folding(victim, cpu, 1, images=40, steps=1))
    assert [row[0] for row in rows] == ["nc", "generator_reverse"]
    for _, what, ratio, slow, fast, verdict, gap in rows:
        assert what == "mnist_cnn on digits" and verdict == "same"  # inconclusive: one step
        assert float(gap) < 1e-2  # of the norms: the same searches in other batches
        assert float(ratio) > 0 and float(slow.split()[0]) > 0 and fast.endswith("s (2)")
    passes = list(bench.throughputs(victim, cpu, 1, images=120))
    assert [row[0].split(" ")[0] for row in passes] == ["STRIP,", "prune", "heat"]
    assert re.fullmatch(r"STRIP, (417|835) superimposed images a pass", passes[0][0])
    assert int(re.search(r"best batch \((\d+)\)$", passes[0][1])[1]) in bench.BATCHES


@pytest.mark.parametrize("native", [True, False])
def test_fast_path(monkeypatch, native):
    """The plain path and the default one are really run; the ratio is theirs."""
    seen, layouts, drawn = [], [], bench.UNet.forward
    forward = bench.build_model("wrn16_1", 10, (3, 32, 32), (0,) * 3, (1,) * 3).__class__.forward

    def watched(model, x):
        weight = next(w for w in model.parameters() if w.dim() == 4 and w.shape[1] > 1)
        seen.append((model.bfloat16, weight.is_contiguous(memory_format=torch.channels_last)))
        return forward(model, x)

    def drawing(unet, x):
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return drawn(unet, x)

    monkeypatch.setattr("common.models.Classifier.forward", watched)
    monkeypatch.setattr("common.models.UNet.forward", drawing)
    monkeypatch.setattr(bench, "SETS", {"GTSRB": (4, 80, (3, 32, 32))})
    monkeypatch.setattr(
        bench, "medians", lambda calls, *_: {k: 2 - k + 0 * bool(c()) for k, c in calls.items()}
    )
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    rows = list(bench.fast_path("wrn16_1", "GTSRB", torch.device("cpu"), 1, images=8))
    assert [row[0].split(",")[0] for row in rows] == ["training", "nc", "generator_reverse"]
    kind = "bfloat16" if native else "float32"
    assert rows[0][1:] == ["wrn16_1 on GTSRB", "2.00", "20.00 s", f"10.00 s ({kind})"]
    assert [row[2:] for row in rows[1:]] == [["2.00", "2.00 s", f"1.00 s ({kind})"]] * 2
    assert {*seen} == {(False, False), (native, True)}
    assert layouts == [False] * 4 + [True] * 4  # two steps of two labels, plain and by default


def test_whole_runs(inline, tmp_path, digits_badnets):
    few = "--inputs", 10, "--fit-images", 10
    inline("strip", "--ckpt", digits_badnets, *few, "--out", "s")
    (row,) = bench.whole_runs([tmp_path / "s"])
    threads = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    minutes = f"{result_of(tmp_path / 's')['seconds'] / 60:.1f} min"
    assert row == ["strip.py", "mnist_cnn on digits, 10 labels", minutes, threads]


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--whole", "nowhere"], "no result.json of a defence"),
        (["--whole", "VICTIM"], "no result.json of a defence"),
        (["--search", "VICTIM"], "CIFAR-10"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, one_line, digits_badnets, flags, named):
    """Before anything is timed: the first thing that is starts a script."""
    flags = [str(digits_badnets) if flag == "VICTIM" else flag for flag in flags]
    monkeypatch.setattr("sys.argv", ["bench.py", str(digits_badnets), *flags])
    monkeypatch.setattr("subprocess.Popen", None)
    path = ROOT / "results" / "bench.py"
    assert named in one_line(runpy.run_path, str(path), run_name="__main__")


def test_repairs(monkeypatch, capfd):
    """Every training is really run; a second an epoch of 8 images makes 250 seconds of 2,000."""
    monkeypatch.setattr(
        bench, "medians", lambda calls, *_: {k: 1 + 0 * bool(c()) for k, c in calls.items()}
    )
    rows = list(bench.repairs(torch.device("cpu"), 1, images=8))
    assert [row[0].split(".py")[0] for row in rows] == [
        *("finetune", "nad", "mcr", "fine_pruning", "abl")
    ]
    minutes = [250 * epochs / 60 for epochs in (50, 50, 40, 40, 25 * 12)]
    assert [row[2] for row in rows] == [f"{m:.1f} min" for m in minutes]
    assert capfd.readouterr().out == ""


def test_start_up_and_machine(tmp_path, monkeypatch):
    assert 0 < bench.start_up(1) < 120
    assert re.fullmatch(r"\d+ CPUs with [\w, ]+", bench.machine(torch.device("cpu")))
