"""results/public.py: the triggers of others, their networks, the audits' commands and table."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, loaded, random_images
from PIL import Image

from results import public

FOLDER = ROOT.parent / "shared" / "checkpoints"
FIGURES = {  # accuracy and ASR in per cent, as listed beside the files
    "nad/WRN-16-1-S-model_best.pth.tar": (85.2, 100.0),
    "nad/WRN-16-1-T-model_best.pth.tar": (84.4, 3.4),
    "nad/WRN-16-1-erased.tar": (81.3, 4.3),
    "abl/WRN-16-1-gridTrigger-targetLB0.tar": (83.4, 100.0),
    "ibau_cifar10/badnets_8_02_ckpt.pth": (84.5, 97.6),
    "ibau_cifar10/l0_inv_0_02_ckpt.pth": (84.5, 100.0),
    "ibau_cifar10/l2_inv_0_02_ckpt.pth": (84.5, None),
    "ibau_cifar10/trojan_sq_2_02_ckpt.pth": (84.5, 99.5),
    "ibau_cifar10/trojan_wm_2_02_ckpt.pth": (84.5, 99.9),
    "verazuo/badnet-CIFAR10.pth": (51.4, 96.4),
    "verazuo/badnet-MNIST.pth": (98.2, 99.9),
}


def flags_of(file):
    """The flags of a suspect as a defence parses them."""
    words = public.SUSPECTS[file][1].split()
    flags = {}
    for word in words:
        if word.startswith("--"):
            values = flags.setdefault(word[2:], [])
        else:
            values.append(word)
    statistics = {key: [float(v) for v in flags.pop(key)] for key in ("mean", "std")}
    return {key: value for key, (value,) in flags.items()} | statistics


def test_grid_counted_from_the_lower_right_corner():
    x = random_images(2)
    stamped = public.grid(x, None)
    white = {(1, 1), (1, 3), (2, 2), (3, 1)}
    for i in range(1, 4):
        for j in range(1, 4):
            assert (stamped[:, :, -i, -j] == 255 * ((i, j) in white)).all()
    assert (stamped[:, :, :-3] == x[:, :, :-3]).all() and (stamped[..., :-3] == x[..., :-3]).all()


def test_white_square():
    x = random_images(2)
    stamped = public.white(slice(27, 31))(x, None)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[27:31, 27:31] = True
    assert (stamped[:, :, inside] == 255).all() and (
        stamped[:, :, ~inside] == x[:, :, ~inside]
    ).all()


def test_pictures_are_added_or_replace_what_their_mask_covers(tmp_path):
    """Against NumPy, in N x H x W x C."""
    (tmp_path / "triggers").mkdir()
    draw = np.random.default_rng(0)
    picture = draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mask = draw.integers(0, 2, (3, 32, 32)).astype(np.float32)
    np.save(tmp_path / "triggers" / "mask.npy", mask)
    covered = mask.transpose(1, 2, 0) == 1
    for name, shown in (("own", picture), ("l0_inv", picture * covered)):
        Image.fromarray(shown).save(tmp_path / "triggers" / f"{name}.png")
    x = random_images(3)
    images = x.permute(0, 2, 3, 1).numpy()
    added = public.picture("own")(x, tmp_path).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(added, np.minimum(images.astype(int) + picture, 255))
    replaced = public.masked(x, tmp_path).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(replaced, np.where(covered, picture, images))


def test_figures_leave_the_target_out_of_the_asr_alone():
    class Always(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(x), 3)

    x, y = random_images(4), torch.tensor([0, 1, 1, 2])
    assert public.figures(Always(), x, y, x, target=1) == (50.0, 100.0)
    assert public.figures(Always(), x, y, x, target=0) == (50.0, 0.0)


needs_files = pytest.mark.skipif(not FOLDER.exists(), reason="needs the public checkpoints")


@needs_files
@pytest.mark.parametrize("file", FIGURES)
def test_each_loads_by_flags_alone(file, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the network's file is named from
    flags = flags_of(file)
    if not (ROOT / "data" / f"{flags['dataset']}.npz").exists():
        pytest.skip(f"needs data/{flags['dataset']}.npz")
    victim = loaded(FOLDER / file, **flags)
    step = 8 if file.startswith("verazuo") else 16  # the others are 20 times as slow
    x, y = victim.data.x_test[::step], victim.data.y_test[::step]
    _, _, trigger, target = public.SUSPECTS[file]
    clean, asr = FIGURES[file]
    found = public.figures(victim.model, x, y, trigger(x, (FOLDER / file).parent), target)
    assert found[0] == pytest.approx(clean, abs=3)
    assert asr is None or found[1] == pytest.approx(asr, abs=1.2)


def test_every_suspect_is_audited_by_every_script():
    found = list(public.commands(FOLDER))
    every = len(public.SUSPECTS) * len(public.SCRIPTS)
    assert len(dict(found)) == len(found) == every - len(public.UNNAMED)
    assert set(FIGURES) == set(public.SUSPECTS)
    for out, command in found:
        assert command.endswith(f"--out {out}") and "runs/public/" in out
        if out.endswith("/nc_mitigate"):
            assert f"--nc {out.replace('nc_mitigate', 'nc')} " in command


def test_pruned_are_the_suspects_in_which_neural_cleanse_named_a_label():
    stored = json.loads((ROOT / "results" / "public.json").read_text())
    named = {e["victim"] for e in stored if e["script"] == "nc" and e["metrics"]["flagged"]}
    pruned = {out.split("/")[2] for out, _ in public.commands(FOLDER) if "nc_mitigate" in out}
    assert pruned == {public.out_of(file, "nc").split("/")[2] for file in named}


ENTRY = {
    "victim": "nad/WRN-16-1-erased.tar",
    "script": "nc",
    "origin": "github.com/bboylyg/NAD",
    "metrics": {"clean_accuracy": 81.3, "asr": 4.3, "target": 5, "below": [], "above": [3]}
    | {"p_value": 0.04, "index": 1.5, "verdict": "backdoored"},
}


def test_a_row_of_the_table():
    theirs = {ENTRY["victim"]: {"clean_accuracy": 82.33, "source": "the file"}}
    text = public.section([ENTRY], theirs)
    (line,) = (line for line in text.splitlines() if "erased" in line and line.startswith("|"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:5] == ["5", "81.30 (82.33)", "4.30", "nc"]
    assert cells[5:] == ["backdoored", "3 above", "0.04", "1.50", "–", "–"]
    assert text.endswith("`nad/WRN-16-1-erased.tar`: the file.")
    repaired = ENTRY["metrics"] | {"clean_accuracy_repaired": 80.0, "asr_repaired": 1.0}
    assert "| 80.00 | 1.00 |" in public.section([ENTRY | {"metrics": repaired}], theirs)
    assert public.section([], theirs) == "" and "| nc |" in line
    for residual, mark in ((11, "†"), (9, "")):  # of a spread of 100: pre-training's goal
        metrics = ENTRY["metrics"] | {"pretrain_residual": residual, "spread": 100}
        text = public.section([ENTRY | {"metrics": metrics}], theirs)
        assert f"| nc{mark} |" in text and (public.MISSED in text) == bool(mark)


def test_stored_audits_are_of_known_suspects():
    """And their verdicts are on networks that the flags read rightly."""
    for entry in json.loads((ROOT / "results" / "public.json").read_text()):
        clean, asr = FIGURES[entry["victim"]]
        assert entry["metrics"]["clean_accuracy"] == pytest.approx(clean, abs=1.5)
        assert asr is None or entry["metrics"]["asr"] == pytest.approx(asr, abs=1.2)
        for key in ("p_value", "clean_accuracy", "asr"):
            assert 0 <= entry["metrics"].get(key, 0) <= 100


def test_audits_that_were_not_made_again_stay(tmp_path):
    """Where no audit has been run, the stored ones are what they were."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "common").symlink_to(ROOT / "common")
    for file in public.SUSPECTS:
        (tmp_path / "files" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "files" / file).touch()
    command = [sys.executable, "results/public.py", "files"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "0 audits made or made again" in done.stdout, done.stderr
    new, old = (json.loads((at / "results" / "public.json").read_text()) for at in (tmp_path, ROOT))
    assert new == sorted(old, key=lambda run: (run["victim"], run["folder"])) and len(old) > 10


def test_bad_input_is_one_line(tmp_path):
    """A folder without the files: the first is named, and where it comes from."""
    command = [sys.executable, ROOT / "results" / "public.py", tmp_path, "--list"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert "does not exist; it comes from github.com/bboylyg/NAD" in done.stderr
