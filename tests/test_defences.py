"""What every detector does with any checkpoint, through its command line in short runs."""

import shutil
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEFENCES, DETECTORS, FURTHER, SHORT, files_below, loaded, result_of, write_npz
from PIL import Image
from torch import nn

from common import checkpoint, defence, metrics
from common.datasets import to_float
from common.defence import careful_repair, check_reading, halving, in_parts, report_verdict
from common.metrics import accuracy, predict, verdict
from common.models import build_model

PICTURES = {"nc": ["reversed.png"], "generator_reverse": ["generated.png", "norms.png"]}
every_detector = pytest.mark.parametrize("name", DETECTORS)


def is_picture(path):
    with Image.open(path) as picture:
        picture.load()
        return picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 10


@pytest.fixture
def all_found(monkeypatch):
    """Short searches count as successful: a verdict on a few steps."""
    monkeypatch.setattr(
        metrics, "verdict", lambda norms, found, threshold: verdict(norms, None, threshold)
    )


@pytest.mark.drawn
@every_detector
def test_checkpoint_folder(inline, all_found, tmp_path, name, digits_badnets, capfd):
    """The verdict, its figures and files; what an earlier run left there is gone."""
    shutil.copy(digits_badnets / "model.pt", tmp_path)
    (tmp_path / "triggers.png").write_text("stale")
    before = {path.name: path.read_bytes() for path in digits_badnets.glob("*.*")}
    flags = "--ckpt", digits_badnets, "--out", tmp_path, "--rule", "index", "--threshold", 100
    inline(name, *flags, *SHORT[name])
    printed, figures = capfd.readouterr().out, result_of(tmp_path)["metrics"]
    written = {*PICTURES[name], "result.json"}
    written |= {"reversed.npz"} if name == "nc" else {"triggers.png"}
    assert set(files_below(tmp_path)) == written  # nothing flagged: no model
    assert all(is_picture(path) for path in tmp_path.glob("*.png"))
    last = printed.splitlines()[-1]
    assert last.startswith(f"RESULT {name} ") and f"verdict={figures['verdict']}" in last
    assert "nothing is flagged, so nothing is repaired" in printed
    assert all(f"label {k}: " in printed for k in range(10)) and len(figures["norms"]) == 10
    assert figures["asr_n"] == 324 and figures["flagged"] == []
    assert figures["case"] == 4 and figures["target"] == 0
    assert {path.name: path.read_bytes() for path in digits_badnets.glob("*.*")} == before


@every_detector
def test_same_seed_same_figures_however_many_labels_at_once(inline, unread, tmp_path, name):
    data = write_npz(tmp_path / "own.npz", (16, 16), 5, 60)
    torch.manual_seed(0)
    model = build_model("mnist_cnn", 5, (1, 16, 16), (0.5,), (0.5,))
    torch.save(model.net.state_dict(), tmp_path / "suspect.pt")

    def run(seed, *flags):
        out = tmp_path / f"{seed}{len(list(tmp_path.iterdir()))}"
        common = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", data, "--out", out
        inline(name, *common, "--seed", seed, "--data-fraction", 0.5, *SHORT[name], *flags)
        metrics = result_of(out)["metrics"]
        del metrics["search_seconds"]
        return metrics

    first = run(0)
    assert run(0) == first and run(1)["norms"] != first["norms"]
    for count in (1, 4):
        metrics = run(0, "--labels-at-once", count)
        np.testing.assert_allclose(metrics["norms"], first["norms"], rtol=1e-3)
        assert metrics["flagged"] == first["flagged"]


@every_detector
@pytest.mark.parametrize("wrapped", [False, True])
def test_bare_state_dict_gets_a_verdict_without_evaluation(
    inline, unread, tmp_path, name, untrained, wrapped, capfd
):
    state = untrained.net.state_dict()
    torch.save({"netC": state, "epoch": 3} if wrapped else state, tmp_path / "suspect.pt")
    own = "--mean", 0.4, "--std", 0.6
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    ran = inline(name, *flags, *(own if wrapped else ()), *SHORT[name])
    assert ran["model"].mean.item() == pytest.approx(0.4 if wrapped else 0.5)
    printed, metrics = capfd.readouterr().out, result_of(tmp_path / "suspect" / f"{name}-s0")
    assert "verdict: " in printed and "cannot be measured" in printed
    assert not {"asr", "case", "target"} & metrics["metrics"].keys()
    assert metrics["metrics"]["clean_accuracy"] < 40


@every_detector
def test_failed_label_is_never_flagged(inline, unread, tmp_path, name, untrained, capfd):
    torch.save(untrained.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    goal = ["--asr-goal", 1, "--repair-epochs", 1] if name == "generator_reverse" else []
    ran = inline(name, *flags, "--rule", "index", "--threshold", 1e-6, *SHORT[name], *goal)
    failed = {label for label, found in enumerate(ran["found"]) if not found}
    assert failed and not failed & set(ran["decision"]["flagged_by_index"])
    assert capfd.readouterr().out.count("no say") == len(failed)


@pytest.mark.drawn
@every_detector
@pytest.mark.parametrize("classes", [2, 4])
def test_fewer_than_five_labels_are_an_answer(inline, unread, tmp_path, name, classes, capfd):
    """Images of 20 x 24 pixels and three channels, too."""
    write_npz(tmp_path / "own.npz", (20, 24, 3), classes)
    model = build_model("mnist_cnn", classes, (3, 20, 24), (0.5,) * 3, (0.5,) * 3)
    torch.save(model.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "own.npz", "--out", "new"
    inline(name, *flags, *SHORT[name])
    metrics = result_of(tmp_path / "new")["metrics"]
    assert "verdict: inconclusive" in capfd.readouterr().out
    assert metrics["verdict"] == "inconclusive" and metrics["flagged"] == []
    assert metrics["index"] is metrics["p_value"] is None and len(metrics["norms"]) == classes
    assert all(is_picture(tmp_path / "new" / picture) for picture in PICTURES[name])


@every_detector
def test_several_targets_have_no_case(inline, tmp_path, name, digits_badnets):
    """All-to-all attacks lie outside the single-target assumption."""
    shutil.copy(digits_badnets / "model.pt", tmp_path)
    y = np.arange(20) % 10
    x = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1)).astype(np.uint8)
    np.savez(tmp_path / "poisoned_test.npz", x=x, y_true=y, y_target=(y + 1) % 10)
    inline(name, "--ckpt", tmp_path, "--threshold", 100, *SHORT[name])
    metrics = result_of(tmp_path / f"{name}-s0")["metrics"]
    assert metrics["asr_n"] == 20 and not {"case", "target"} & metrics.keys()


RATES = {"nc": "--unlearn-lr", "generator_reverse": "--repair-lr"}


@every_detector
def test_a_repair_that_diverges_keeps_the_verdict_and_no_model(
    inline, all_found, tmp_path, name, digits_badnets, capfd
):
    flags = "--ckpt", digits_badnets, "--out", tmp_path, "--rule", "index", "--threshold", 1e-6
    metrics = inline(name, *flags, *SHORT[name], RATES[name], "1e30")["metrics"]
    assert "every repair diverged or cost over 5 points" in capfd.readouterr().out
    assert metrics["flagged"] and "clean_accuracy_repaired" not in metrics
    assert result_of(tmp_path)["metrics"]["norms"] == metrics["norms"]
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    "norms, shown, verdict_is",
    [
        (
            [0, 5, 5, 5, 5, 5],
            ["label 0: index inf zero", "p = 5e-05, labels [0] below the others", "median 0.00"],
            "backdoored",
        ),
        ([5, 5, 5, 50, 5, 5], ["p = 5e-05, labels [3] above the others"], "backdoored"),
        (
            [5.0] * 6,
            ["no evidence, p = 1; by the paper", "index > 2): clean", "index 0.00"],
            "no evidence",
        ),
        ([0.0] * 6, ["p = 1; ", "ratio to the median undefined"], "no evidence"),
        ([0, 5, 5, 5], ["label 0: index n/a", "needs 5 successful searches"], "inconclusive"),
    ],
)
@pytest.mark.parametrize("rule", ["p", "index"])
def test_norms_are_printed(capfd, rule, norms, shown, verdict_is):
    """MAD = 0, above, all alike, all zero, too few labels: no crash, no made-up figure."""
    args, notes = Namespace(rule=rule, threshold=2.0), ["zero" if n == 0 else "n" for n in norms]
    metrics = report_verdict(verdict(norms), args, notes)
    printed = capfd.readouterr().out
    assert all(part in printed for part in shown), printed
    assert metrics["verdict"] == verdict_is
    if len(norms) > 4 and norms[1]:
        assert metrics["ratio"] == min(norms) / 5
    assert metrics["flagged"] == ([0] if norms == [0, 5, 5, 5, 5, 5] else [])


@pytest.mark.parametrize("norms, sure", [([50, 55, 60, 52, 58, 5], "backdoored"), ([5] * 6, None)])
def test_in_doubt_only_a_named_label_is_a_verdict(capfd, norms, sure):
    """A search that could not see much: "nothing found" says nothing, but its figures stay."""
    args = Namespace(rule="p", threshold=2.0)
    metrics = report_verdict(verdict(norms), args, [""] * 6, doubt=True)
    assert metrics["verdict"] == (sure or "inconclusive") and metrics["p_value"] is not None
    assert f"verdict: {metrics['verdict']}, p = " in capfd.readouterr().out
    assert metrics["flagged"] == ([5] if sure else [])


def test_generators_that_cannot_copy_images_are_in_doubt(
    inline, all_found, tmp_path, digits_badnets, capfd
):
    """After two steps of pre-training the residual hides everything."""
    flags = "--ckpt", digits_badnets, *SHORT["generator_reverse"], "--out"
    for goal, verdicts in ((0.1, {"inconclusive"}), (1e9, {"no evidence"})):
        out = tmp_path / f"{goal}"
        ran = inline("generator_reverse", *flags, out, "--pretrain-residual", goal)
        assert ran["doubt"] == (goal == 0.1)
        named = ran["metrics"]["below"] + ran["metrics"]["above"]
        assert ran["metrics"]["verdict"] in ({"backdoored"} if named else verdicts)
        assert ("missed its goal" in capfd.readouterr().out) == (goal == 0.1)


def test_rules_differ_in_what_they_repair():
    """The second smallest norm has an index over 2, but does not stand out."""
    decision = verdict([60, 55, 70, 64, 58, 49, 66, 73, 61, 40])
    assert decision["flagged_by_index"] == [9] and decision["below"] == []
    for rule, flagged in (("index", [9]), ("p", [])):
        args = Namespace(rule=rule, threshold=2.0)
        assert report_verdict(decision, args, [""] * 10)["flagged"] == flagged


# ===== Is the network read rightly? =====


class Says(nn.Module):
    """Right on a share of every class: an image's pixels are its label and its rank (of 100)."""

    def __init__(self, share, classes=10):
        super().__init__()
        self.share, self.classes = share, classes

    def forward(self, x):
        label, rank = (255 * x).round().long().flatten(1).T
        wrong = (rank >= round(100 * self.share)).long()
        return F.one_hot((label + wrong) % self.classes, self.classes).float()


def ranked(classes=10):
    i = torch.arange(100 * classes)
    return torch.stack((i % classes, i // classes), 1).to(torch.uint8).view(
        -1, 1, 1, 2
    ), i % classes


@pytest.mark.parametrize("share, classes, answer", [
    (1.0, 10, ""), (0.56, 10, ""), (0.54, 10, "poor"), (0.2, 10, "poor"), (0.18, 10, "refused"),
    (0.76, 2, ""), (0.74, 2, "poor"), (0.54, 2, "refused"), (0.0, 2, "refused"),
    (0.08, 100, "refused"), (0.2, 100, "poor"),
])  # fmt: skip
def test_a_network_near_chance_gets_no_verdict(share, classes, answer, one_line, capfd):
    case = Says(share, classes), *ranked(classes)
    if answer == "refused":
        assert "--mean" in one_line(check_reading, *case)
        return
    check_reading(*case)
    printed = capfd.readouterr().out
    assert f"{100 * share:.2f}" in printed and ("poor" in printed) == (answer == "poor")


def test_a_constant_answer_is_chance_even_on_unequal_classes(one_line):
    x, y = ranked()
    x[..., 0], x[..., 1] = 3, 0  # all are taken for a 3
    one_line(check_reading, Says(1.0), x, torch.where(torch.arange(1000) < 900, 3, y))


@pytest.mark.parametrize("name", [*DEFENCES, *FURTHER])
def test_wrong_normalisation_is_refused(inline, one_line, tmp_path, name, digits_badnets):
    """Before any search; it used to be "backdoored, index 28.6" for a clean model.

    A std this large leaves the images without contrast, so that any network answers by chance.
    """
    model = loaded(digits_badnets).model
    torch.save(model.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    wrong = "--mean", 0.5, "--std", 1000
    if name == "abl":
        (tmp_path / "suspect").mkdir()
        shutil.copy(digits_badnets / "poisoned_train.npz", tmp_path / "suspect")
    assert "near chance" in one_line(inline, name, *flags, *wrong, *SHORT[name])
    assert not (tmp_path / "suspect" / f"{name}-s0").exists()


# ===== Detectors of inputs =====


@pytest.mark.parametrize("name, rate", [("strip", "--frr"), ("sentinet", "--fpr")])
def test_far_of_the_inputs_that_are_obeyed(inline, digits_badnets, digits, tmp_path, name, rate):
    """A trigger that is not obeyed is no attack: here every second image has none at all."""
    shutil.copy(digits_badnets / "model.pt", tmp_path)
    victim = loaded(digits_badnets)
    x = torch.stack((victim.x_poisoned[:45], digits.x_test[digits.y_test != 0][:45]), 1)
    x, y = x.flatten(0, 1), torch.zeros(90, dtype=torch.int64)
    checkpoint.save_images(tmp_path / "poisoned_test.npz", x, y_true=y + 1, y_target=y)
    flags = *SHORT[name], "--inputs", 90, "--fit-images", 60, rate, 0.33  # a third is stopped
    ran = inline(name, "--ckpt", tmp_path, *flags)
    metrics, order = ran["metrics"], ran["chosen"]
    assert sorted(order.tolist()) == list(range(90))
    if name == "strip":
        passed = ran["named"]["triggered"] > metrics["boundary"]  # low entropies are stopped
    else:
        passed = ran["triggered"] <= metrics["threshold"]  # long distances are
    obeyed = (victim.model(to_float(x)).argmax(1) == 0)[order].numpy()
    assert 45 <= obeyed.sum() < 60 and metrics["asr"] == pytest.approx(100 * obeyed.mean())
    assert metrics["far"] == pytest.approx(100 * passed.mean())
    assert metrics["far_obeyed"] == pytest.approx(100 * passed[obeyed].mean())
    assert passed[obeyed].mean() < passed.mean() - 0.1


# ===== A repair checks itself =====


def test_a_repair_that_costs_accuracy_starts_again_at_half_the_rate(capfd):
    x, y = ranked()
    shares = {0.5: 0.94, 0.25: 0.96, 0.125: 1.0}  # 5 points are allowed
    draws = []

    def repair(lr):
        draws.append(torch.rand(()).item())
        return Says(shares[lr]) if lr < 1 else None  # it diverged

    model, rate = halving(repair, 1.0, Says(1.0), x, y, 7)
    assert len(set(draws)) == 1 and len(draws) == 3  # the same in every try
    assert rate == 0.25 and model.share == 0.96
    printed = capfd.readouterr().out
    assert "repair at rate 0.5: 100.00 -> 94.00 on 1000 clean images" in printed
    assert "repair at rate 1: 100.00 -> nan" in printed
    assert halving(lambda lr: Says(0.5), 1.0, Says(1.0), x, y, 0) == (None, 0.125)


class Wrong(nn.Module):
    """Wrong on the first `count` images of `ranked`."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, x):
        label, rank = (255 * x).round().long().flatten(1).T
        wrong = (10 * rank + label < self.count).long()
        return F.one_hot((label + wrong) % 10, 10).float()


@pytest.mark.parametrize("count", [60, 140, 300, 1000])
def test_exactly_five_points_are_not_too_many(count):
    """3 of 60 images: a float32 mean would be a hair below 95 %."""
    x, y = (part[:count] for part in ranked())
    exact = Says(1.0)
    assert halving(lambda lr: Wrong(count // 20), 1.0, exact, x, y, 0)[1] == 1.0
    assert halving(lambda lr: Wrong(count // 20 + 1), 1.0, exact, x, y, 0)[0] is None


@pytest.mark.parametrize("drop, rate", [(None, 0.25), (8, 0.5), (20, 1.0), (1, None)])
def test_what_a_repair_may_cost_is_asked_for(drop, rate):
    x, y = ranked()
    costs = {1.0: 20, 0.5: 8, 0.25: 5, 0.125: 2}
    repaired, lr = halving(lambda lr: Says(1 - costs[lr] / 100), 1.0, Says(1.0), x, y, 0, drop)
    assert (lr if repaired else None) == rate


@pytest.mark.parametrize(
    "name, flag", [("nad", "--max-drop"), ("mcr", "--max-drop"), ("fine_pruning", "--repair-drop")]
)
def test_what_a_repair_may_cost_is_a_flag(inline, digits_badnets, monkeypatch, name, flag):
    """By default nothing is good enough here; the flag alone lets a repair pass."""
    monkeypatch.setattr(defence, "MOST_DROP", -101.0)
    inline(name, "--ckpt", digits_badnets, *SHORT[name], flag, 100, "--out", "out")
    assert "asr_repaired" in result_of("out")["metrics"]


@pytest.mark.parametrize("name", ["finetune", "mcr", "purify", "fine_pruning"])
def test_images_kept_back_are_judged_by_class(inline, digits, digits_badnets, tmp_path, name):
    """Class 9 is rare here, and half of it are threes: plain accuracy is a higher figure."""
    x, y = digits.x_train, digits.y_train.clone()
    nines, threes = ((y == label).nonzero().flatten() for label in (9, 3))
    y[threes[:20]] = 9
    keep = torch.ones_like(y, dtype=torch.bool)
    keep[nines[20:]] = False
    images = x[keep].permute(0, 2, 3, 1).numpy()
    write_npz(tmp_path / "own.npz", x_train=images, y_train=y[keep].numpy(), x_test=images,
              y_test=y[keep].numpy())  # fmt: skip
    flags = "--ckpt", digits_badnets, "--dataset", "own.npz", "--data-fraction", 1, *SHORT[name]
    ran = inline(name, *flags, "--out", "out")
    kept = "kept" if name == "mcr" else "held"
    x, y, model = ran[f"x_{kept}"], ran[f"y_{kept}"], ran["model"]
    judged = [(ran["accuracies"][0] if name == "fine_pruning" else ran["before"], model, x)]
    if name == "fine_pruning":
        judged.append((ran["accuracies"][ran["count"]], ran["pruned"], x))
    elif name == "mcr":
        judged += [(found, net, x) for found, net in zip(ran["accuracies"], ran["nets"])]
    elif name == "finetune":
        judged += [(ran["kept"][lr], net, x) for lr, net in ran["tuned"].items()]
    else:
        filtered = ran["purify"](x, ran["steps"][-1])
        judged.append((ran["rows"][-1]["held_out_accuracy"], model, filtered))
    for found, net, x in judged:
        right = (predict(net, x) == y).double()
        by_class = [right[y == label].mean().item() for label in range(10)]
        assert found == pytest.approx(100 * sum(by_class) / 10)
        assert abs(found - 100 * right.mean().item()) > 0.5


def test_a_repair_that_loses_a_rare_class_is_refused():
    """3 of 100 images are of class 1; a constant answer costs 3 points of plain accuracy."""
    x = torch.zeros(100, 1, 4, 4, dtype=torch.uint8)
    x[97:] = 255
    y = (torch.arange(100) >= 97).long()

    class Bright(nn.Module):
        def __init__(self, least):
            super().__init__()
            self.least = least

        def forward(self, x):
            return F.one_hot((x.mean((1, 2, 3)) > self.least).long(), 2).float()

    assert accuracy(Bright(2), x, y) == pytest.approx(97)
    assert accuracy(Bright(2), x, y, balanced=True) == pytest.approx(50)
    assert halving(lambda lr: Bright(2), 1.0, Bright(0.5), x, y, 0)[0] is None
    assert halving(lambda lr: Bright(0.4), 1.0, Bright(0.5), x, y, 0)[1] == 1.0


def test_a_repair_sees_four_fifths_and_is_checked_on_the_rest():
    """By class; the control has the same images and the rate of the repair."""
    x, y = ranked()
    seen = []

    def repair(model, x, y, lr, kind):
        seen.append((kind, lr, x, y))
        return Says(0.3 if kind == "repair" and lr == 0.1 else 1.0)

    kinds = [partial(repair, kind=kind) for kind in ("repair", "control")]
    models, lr = careful_repair(*kinds, Says(1.0), x, y, lr=0.1, seed=0, suffix="_0.1")
    assert lr == 0.05 and set(models) == {"_repaired_0.1", "_clean_only_0.1"}
    assert [part[:2] for part in seen] == [("repair", 0.1), ("repair", 0.05), ("control", 0.05)]
    for _, _, images, labels in seen:
        assert labels.bincount().tolist() == [80] * 10
        assert torch.equal(images, seen[0][2]) and len(images.unique(dim=0)) == 800


def test_one_image_a_class_leaves_none_for_a_repair(capfd):
    x, y = ranked()
    made = careful_repair(None, None, Says(1.0), x[:10], y[:10], lr=0.1, seed=0)
    assert made == ({}, 0.1) and "no repair" in capfd.readouterr().out


@every_detector
def test_a_wrecked_model_is_not_saved(
    inline, all_found, tmp_path, name, digits_badnets, monkeypatch, capfd
):
    """Its verdict and the control's figures are."""
    monkeypatch.setattr(defence, "MOST_DROP", -101.0)  # nothing is good enough
    flags = "--ckpt", digits_badnets, "--out", tmp_path, "--rule", "index", "--threshold", 1e-6
    inline(name, *flags, *SHORT[name])
    metrics = result_of(tmp_path)["metrics"]
    assert "asr_clean_only" in metrics and "asr_repaired" not in metrics
    assert not (tmp_path / "model.pt").exists() and "none is saved" in capfd.readouterr().out


# ===== Memory =====


@pytest.mark.parametrize("most, sizes", [(10, [7]), (3, [3, 3, 1]), (2, [1] * 7)])
def test_labels_are_halved_until_they_fit(capfd, most, sizes):
    """7, 3, 1 at once; it is said once."""
    tried = []

    def search(labels):
        tried.append(len(labels))
        if len(labels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return labels

    parts = in_parts(search, list(range(7)), 7)
    assert [len(part) for part in parts] == sizes
    assert [label for part in parts for label in part] == list(range(7))
    assert tried == [n for n in (7, 3) if n > most] + sizes
    assert capfd.readouterr().out.count("halving") == (most < 7)


def test_one_label_that_does_not_fit_is_refused(one_line):
    def search(labels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert "--batch-size" in one_line(in_parts, search, [0, 1, 2], 3)


@pytest.mark.parametrize("count, warned", [(4, True), (5, False)])
def test_too_few_labels_are_told_before_the_search(capfd, count, warned):
    told = []
    parts = in_parts(lambda part: told.append(capfd.readouterr().out) or part, [*range(count)], 9)
    assert parts == [[*range(count)]]
    assert (f"{count} labels are too few for a verdict" in told[0]) == warned


@every_detector
def test_only_labels_with_images_have_a_say_above(
    inline, unread, tmp_path, monkeypatch, name, untrained
):
    """Every detector asks common.metrics.with_a_say, with the labels of its own clean images."""
    asked = []
    monkeypatch.setattr(metrics, "with_a_say", lambda *given: asked.append(given) or [False] * 10)
    torch.save(untrained.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    ran = inline(name, *flags, *SHORT[name])
    ((norms, found, y),) = asked
    assert norms == ran["norms"] and len(found) == 10 and torch.equal(y, ran["y_clean"])
    assert ran["metrics"]["verdict"] == "inconclusive" and ran["metrics"]["found"] == [False] * 10


def test_a_repaired_model_is_looked_at_in_small_passes():
    """Outputs that are not finite anywhere among the images refuse it."""

    class Net(nn.Module):
        def forward(self, x):
            assert len(x) <= 200
            return 1 / x.flatten(1)

    images = torch.ones(450, 1, 2, 2)
    assert isinstance(defence.frozen(Net(), images), Net)
    images[449] = 0
    assert defence.frozen(Net(), images) is None
