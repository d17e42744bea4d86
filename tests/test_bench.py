"""results/bench.py: it runs to its end; the verdicts of labels alone and of folded ones agree."""

import re

import torch
from conftest import loaded

from results import bench


def test_medians_take_the_calls_in_turn(monkeypatch):
    clock = iter([0, 0, 0, 1, 0, 2, 0, 3, 0, 6])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    assert bench.medians(calls, torch.device("cpu"), 2) == {"a": 2, "b": 4}  # without the warm-up
    assert order == list("ababab")


def test_every_line_is_printed(digits_badnets, capsys):
    victim, cpu = loaded(digits_badnets), torch.device("cpu")
    bench.folding(victim, cpu, 1, images=40, steps=1)
    bench.throughputs(victim, cpu, 1, images=120)
    lines = capsys.readouterr().out.splitlines()
    heads = ["nc", "generator_reverse", "STRIP", "prune curve", "heat map"]
    assert [line.startswith(head) for line, head in zip(lines, heads)] == [True] * 5
    assert all("; same verdict" in line for line in lines[:2])
    assert all(float(re.search(r"ratio ([\d.]+)", line)[1]) > 0 for line in lines[:2])
    batch, best = re.search(r"(\d+) a pass: .* best batch, (\d+)$", lines[2]).groups()
    assert batch == "200" and int(best) in bench.BATCHES


def test_precisions(monkeypatch, capsys):
    """Both precisions are really run, where the processor has bfloat16."""
    seen = set()
    forward = bench.build_model("wrn16_1", 10, (3, 32, 32), (0,) * 3, (1,) * 3).__class__.forward

    def watched(model, x):
        seen.add(model.bfloat16)
        return forward(model, x)

    monkeypatch.setattr("common.models.Classifier.forward", watched)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    bench.precisions("wrn16_1", torch.device("cpu"), 1, images=8)
    assert "computes in float32 here" in capsys.readouterr().out and not seen
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    bench.precisions("wrn16_1", torch.device("cpu"), 1, images=8)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["training", "nc", "generators"]
    for line in lines:
        slow, fast, ratio = (float(v) for v in re.findall(r"([\d.]+)(?: s|$)", line))
        assert slow > 0 and fast > 0 and ratio > 0
    assert seen == {True, False}
