"""What every detector does with any checkpoint, through its command line in short runs."""

import shutil

import numpy as np
import pytest
import torch
from conftest import DETECTORS, SHORT, files_below, result_of, write_npz
from PIL import Image

from common.defence import report_verdict
from common.metrics import verdict
from common.models import build_model

PICTURES = {"nc": ["reversed.png"], "generator_reverse": ["generated.png", "norms.png"]}
every_detector = pytest.mark.parametrize("name", DETECTORS)


def is_picture(path):
    with Image.open(path) as picture:
        picture.load()
        return picture.format == "PNG" and len(np.unique(np.asarray(picture))) > 10


@every_detector
def test_checkpoint_folder(inline, tmp_path, name, digits_badnets, capfd):
    """The verdict, its figures and files; what an earlier run left there is gone."""
    for stale in ("model.pt", "triggers.png"):
        (tmp_path / stale).write_text("stale")
    before = {path.name: path.read_bytes() for path in digits_badnets.glob("*.*")}
    flags = "--ckpt", digits_badnets, "--out", tmp_path, "--threshold", 100
    inline(name, *flags, *SHORT[name])
    printed, metrics = capfd.readouterr().out, result_of(tmp_path)["metrics"]
    written = {*PICTURES[name], "result.json"}
    written |= {"reversed.npz"} if name == "nc" else {"triggers.png"}
    assert set(files_below(tmp_path)) == written  # nothing flagged: no model
    assert all(is_picture(path) for path in tmp_path.glob("*.png"))
    last = printed.splitlines()[-1]
    assert last.startswith(f"RESULT {name} ") and "verdict=clean" in last
    assert "nothing is flagged, so nothing is repaired" in printed
    assert all(f"label {k}: " in printed for k in range(10)) and len(metrics["norms"]) == 10
    assert metrics["case"] == 4 and metrics["target"] == 0 and metrics["asr_n"] == 324
    assert {path.name: path.read_bytes() for path in digits_badnets.glob("*.*")} == before


@every_detector
def test_same_seed_same_figures_however_many_labels_at_once(inline, tmp_path, name, digits_badnets):
    def run(seed, *flags):
        out = tmp_path / f"{seed}{len(list(tmp_path.iterdir()))}"
        common = "--ckpt", digits_badnets, "--out", out, "--seed", seed, "--data-fraction", 0.05
        inline(name, *common, *SHORT[name], *flags)
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
    inline, tmp_path, name, untrained, wrapped, capfd
):
    state = untrained.net.state_dict()
    torch.save({"netC": state, "epoch": 3} if wrapped else state, tmp_path / "suspect.pt")
    own = "--mean", 0.4, "--std", 0.6
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    ran = inline(name, *flags, *(own if wrapped else ()), *SHORT[name])
    assert ran["model"].mean.item() == pytest.approx(0.4 if wrapped else 0.5)
    printed, metrics = capfd.readouterr().out, result_of(tmp_path / "suspect" / f"{name}-s0")
    assert "verdict by the paper's rule" in printed and "cannot be measured" in printed
    assert not {"asr", "case", "target"} & metrics["metrics"].keys()
    assert metrics["metrics"]["clean_accuracy"] < 40


@every_detector
def test_failed_label_is_never_flagged(inline, tmp_path, name, untrained, capfd):
    torch.save(untrained.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
    goal = ["--asr-goal", 1, "--repair-epochs", 1] if name == "generator_reverse" else []
    ran = inline(name, *flags, "--threshold", 1e-6, *SHORT[name], *goal)
    failed = {label for label, found in enumerate(ran["found"]) if not found}
    assert failed and not failed & set(ran["decision"]["flagged"])
    assert capfd.readouterr().out.count("never flagged") == len(failed)


@every_detector
@pytest.mark.parametrize("classes", [2, 4])
def test_fewer_than_five_labels_are_an_answer(inline, tmp_path, name, classes, capfd):
    """Images of 20 x 24 pixels and three channels, too."""
    write_npz(tmp_path / "own.npz", (20, 24, 3), classes)
    model = build_model("mnist_cnn", classes, (3, 20, 24), (0.5,) * 3, (0.5,) * 3)
    torch.save(model.net.state_dict(), tmp_path / "suspect.pt")
    flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "own.npz", "--out", "new"
    inline(name, *flags, *SHORT[name])
    metrics = result_of(tmp_path / "new")["metrics"]
    assert "verdict: not applicable" in capfd.readouterr().out
    assert metrics["verdict"] == "not-applicable" and metrics["flagged"] == []
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


REPAIRS = {
    "nc": ["--steps", 60, "--batches", 2, "--unlearn-lr", "1e30"],
    "generator_reverse": ["--steps", 40, "--pretrain-steps", 100, "--width", 4, "--lr", 3e-3]
    + ["--lpips-net", "none", "--repair-lr", "1e30"],
}


@every_detector
def test_diverging_repair_leaves_an_earlier_run_alone(
    inline, one_line, tmp_path, name, digits_badnets
):
    (tmp_path / "result.json").write_text('{"ckpt": "earlier"}')
    flags = "--ckpt", digits_badnets, "--out", tmp_path, "--threshold", 1e-6
    assert "no model is kept" in one_line(inline, name, *flags, *REPAIRS[name])
    assert files_below(tmp_path) == ["result.json"]
    assert (tmp_path / "result.json").read_text() == '{"ckpt": "earlier"}'


@pytest.mark.parametrize(
    "norms, shown",
    [
        ([0, 5, 5, 5, 5, 5], ["label 0: index inf zero", "index inf, p = 0.0000", "median 0.00"]),
        ([5.0] * 6, ["verdict by the paper's rule (index > 2): clean", "index 0.00, p = 1.0000"]),
        ([0.0] * 6, ["index 0.00, p = 1.0000", "ratio to the median undefined"]),
        ([0, 5, 5, 5], ["label 0: index n/a", "4 labels are fewer than the index's 5"]),
    ],
)
def test_extreme_norms_are_printed(capfd, norms, shown):
    """MAD = 0, all alike, all zero, too few labels: a line each, no crash, no made-up figure."""
    metrics = report_verdict(verdict(norms), 2.0, ["zero" if n == 0 else "n" for n in norms])
    printed = capfd.readouterr().out
    assert all(part in printed for part in shown), printed
    if len(norms) > 4 and norms[1]:
        assert metrics["ratio"] == norms[0] / 5
    expected = "not-applicable" if len(norms) < 5 else "clean"
    assert metrics["verdict"] == ("backdoored" if norms == [0, 5, 5, 5, 5, 5] else expected)
