"""Every defence takes every kind of folder: colour images of other sides, few classes.

Defences see no more of an attack than what it leaves: nothing (clean), a training set (badnets),
none (wanet), generators in the checkpoint (input_aware), triggered images of two classes alone
(composite). Every other attack's folder goes to ABL and, in turn, to one of the repairs.
"""

import numpy as np
import pytest
from conftest import (
    ATTACKS,
    DEFENCES,
    DETECTORS,
    SHORT,
    files_below,
    result_of,
    whole_image_trigger,
    write_npz,
)

CLASSES, SHAPE = 6, (32, 36, 3)
QUICK = {
    "nc": SHORT["nc"],
    "generator_reverse": [*SHORT["generator_reverse"], "--data-fraction", 0.2],
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
KINDS = ["clean", "badnets", "wanet", "input_aware", "composite"]
APART = ["strip", "sentinet"]  # take some of the test images, so that the ASR is not the attack's
REST = [attack for attack in ATTACKS if attack not in KINDS]


def defences_of(attack):
    """Names of the defences that get the attack's folder."""
    if attack in KINDS:
        return list(QUICK)
    measuring = [name for name in DEFENCES if name not in (*DETECTORS, *APART)]
    return [measuring[REST.index(attack) % len(measuring)], "abl"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_defences_take_it(inline, one_line, unread, tmp_path, attack):
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
    for defence in defences_of(attack):
        flags = ["--ckpt", victim, *QUICK[defence]]
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
        if attacked and defence not in APART:
            assert seen["asr"] == pytest.approx(metrics["asr"], abs=1e-4)
        assert any(name.endswith(".png") for name in files_below(victim / f"{defence}-s0"))
