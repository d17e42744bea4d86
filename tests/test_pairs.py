"""Every defence takes every attack's folder: colour images of other sides, few classes."""

import numpy as np
import pytest
from conftest import ATTACKS, SHORT, files_below, result_of, whole_image_trigger, write_npz

CLASSES, SHAPE = 6, (32, 36, 3)
QUICK = {
    "nc": SHORT["nc"],
    "generator_reverse": SHORT["generator_reverse"],
    "nc_mitigate": SHORT["nc_mitigate"],  # of the folder that nc has written
    "strip": ["--overlays", 6, "--inputs", 20, "--data-fraction", 0.5],
    "fine_pruning": ["--epochs", 1, "--data-fraction", 0.5],
    "mcr": [*SHORT["mcr"], "--data-fraction", 0.5],
    "purify": ["--filter", "median", "--strengths", 3, "--data-fraction", 0.5],
    "finetune": [*SHORT["finetune"], "--data-fraction", 0.5],
    "nad": [*SHORT["nad"], "--data-fraction", 0.5],
    "gradcam": ["--inputs", 20, "--februus", "--data-fraction", 0.5],
    "sentinet": ["--overlays", 5, "--inputs", 20, "--data-fraction", 0.5],
    "abl": ["--epochs", 1, "--isolation-epochs", 1, "--unlearn-steps", 2, "--isolation", 0.1],
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_defence_takes_it(inline, one_line, unread, tmp_path, attack):
    y = np.arange(120) % CLASSES
    labels = dict.fromkeys(["y_train", "y_test"], y + (y >= 3))  # no image is labelled 3
    data = write_npz(tmp_path / "own.npz", SHAPE, CLASSES, 120, **labels)
    victim = tmp_path / "victim"
    flags = "--dataset", data, "--arch", "mnist_cnn", "--out", victim
    if attack == "freq_backdoor":
        flags += "--mode", "add"  # no basis of white noise is quiet enough to be replaced
    inline(attack, *SHORT[attack], "--train-images", 120, *flags)
    metrics = result_of(victim)["metrics"]
    attacked = (victim / "poisoned_test.npz").exists()
    assert attacked == (attack != "clean") == ("asr" in metrics)
    if attacked:
        with np.load(victim / "poisoned_test.npz") as archive:
            count = 40 if attack == "composite" else 100  # those of two classes
            assert archive["x"].shape == (count, *SHAPE) and archive["x"].dtype == np.uint8
            assert (archive["y_true"] != archive["y_target"]).all()
    for defence, quick in QUICK.items():
        flags = ["--ckpt", victim, *quick]
        if defence == "abl" and not (victim / "poisoned_train.npz").exists():
            assert "badnets" in one_line(inline, defence, *flags)
            if attack != "clean":
                continue
            flags += ["--train-set", "clean"]
        if defence == "nc_mitigate":
            flags += whole_image_trigger(victim)
        inline(defence, *flags)
        seen = result_of(victim / f"{defence}-s0")["metrics"]
        assert seen["clean_accuracy"] == pytest.approx(metrics["clean_accuracy"], abs=1e-4)
        if attacked and defence not in ("strip", "sentinet"):  # which take some of the images
            assert seen["asr"] == pytest.approx(metrics["asr"], abs=1e-4)
        assert any(name.endswith(".png") for name in files_below(victim / f"{defence}-s0"))
