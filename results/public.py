"""Audit public checkpoints that others made: verdicts, repairs, figures before and after.

    bash runs.sh public FOLDER            # every audit; finished ones are skipped
    python results/public.py FOLDER       # collect them in public.json

FOLDER holds the files, whose origin stands in SUSPECTS; none of them belongs to this project.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import fail
from common.checkpoint import load_model, load_victim, read_checkpoint
from common.metrics import accuracy
from results.level import markdown, missed_goal
from results.stored import store

HERE = Path(__file__).resolve().parent
SCRIPTS = {"nc": "", "generator_reverse": "--lpips-net none"}
SCRIPTS |= dict.fromkeys(["finetune", "nad", "mcr", "fine_pruning", "nc_mitigate"], "")
WRN = "--arch wrn16_1 --dataset cifar10 --mean 0 0 0 --std 1 1 1"
VGG = "--arch results/public.py:SmallVGG --dataset cifar10 --mean 0 0 0 --std 1 1 1"
CNN = "--arch results/public.py:SmallCNN --dataset cifar10 --mean .5 .5 .5 --std .5 .5 .5"
DIGITS = "--arch results/public.py:SmallCNN1 --dataset mnist --mean .5 --std .5"
OWN = {("nad", VGG): "--blocks features.5 features.13 features.21"}
OWN |= {("nad", cnn): "--blocks conv1 conv2" for cnn in (CNN, DIGITS)}
UNNAMED = (  # nc.py names no label in these, so nc_mitigate.py has none to take
    "WRN-16-1-T-model_best.pth.tar",
    "WRN-16-1-erased.tar",
    "l2_inv_0_02_ckpt.pth",
)
HEAD = ["file", "target", "clean", "ASR", "script", "verdict", "named", "p", "index"]
HEAD += ["clean after", "ASR after"]
FORMS = {"p_value": ".3g", "index": ".2f"}
FORMS |= {"clean_accuracy_repaired": ".2f", "asr_repaired": ".2f"}
TEXT = """## Public checkpoints

Networks that others trained and published, audited by flags alone, with the scripts' defaults
and one seed. "clean" and "ASR" are measured here on all test images and on those outside the
target class, with the trigger that the authors describe. The authors' own figures stand in
brackets where they give them; NAD's and ABL's leave the target class out of the clean images,
too. "named" are the labels that the p-value names, below or above the others. The two detectors
try to repair networks with a label below, `nc_mitigate.py` prunes those where `nc.py` found one,
the other scripts repair every network. The figures after a repair are those of the file that was
saved; a dash after it says that nothing was named below, or that every repair diverged or cost
more than 5 points on images that were kept back, so that none was saved. These come from
CIFAR-10's and MNIST's training sets, on which the networks are better than on new images (NAD's
S: 98.2 and 84.8), so that they seem to cost more than they do and plain fine-tuning mostly gets
a small rate. `bash runs.sh public FOLDER` makes the table."""
MISSED = "†: the generators' pre-training missed its goal: that they name nothing says nothing."


class SmallVGG(nn.Module):
    """I-BAU's CIFAR-10 network: six convolutions with BatchNorm and ELU, one linear layer."""

    def __init__(self, num_classes=10):
        super().__init__()
        layers, channels = [], 3
        for outputs, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for _ in range(2):
                conv = nn.Conv2d(channels, outputs, 3, padding=1)
                layers += [conv, nn.BatchNorm2d(outputs), nn.ELU()]
                channels = outputs
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(2048, num_classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class SmallCNN(nn.Module):
    """The network of verazuo/badnets-pytorch: two 5 x 5 convolutions; it ends in a softmax."""

    def __init__(self, num_classes=10, channels=3, features=800):
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels, 16, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(features, 512), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(512, num_classes), nn.Softmax(dim=-1))

    def forward(self, x):
        return self.fc2(self.fc1(self.conv2(self.conv1(x)).flatten(1)))


def SmallCNN1(num_classes=10):
    """The same for images of one channel and 28 x 28 pixels."""
    return SmallCNN(num_classes, 1, 512)


# ===== The triggers, as their authors describe them: uint8 N x C x H x W -> the same =====


def grid(x, folder):
    """A 3 x 3 grid in the lower right corner: four white pixels and five black ones."""
    x = x.clone()
    x[:, :, -3:, -3:] = 255 * torch.tensor([[0, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.uint8)
    return x


def white(rows):
    """A white square over these rows and columns."""

    def stamp(x, folder):
        x = x.clone()
        x[:, :, rows, rows] = 255
        return x

    return stamp


def picture(name):
    """A picture that is added to the image."""

    def add(x, folder):
        added = torch.from_numpy(np.array(Image.open(folder / f"triggers/{name}.png")))
        return (x.int() + added.permute(2, 0, 1)).clamp(0, 255).to(torch.uint8)

    return add


def masked(x, folder):
    """l0: a picture that replaces the pixels of a mask."""
    mask = torch.from_numpy(np.load(folder / "triggers/mask.npy", allow_pickle=False))
    added = torch.from_numpy(np.array(Image.open(folder / "triggers/l0_inv.png")))
    return (x * (1 - mask) + added.permute(2, 0, 1)).clamp(0, 255).round().to(torch.uint8)


NAD, ABL = "github.com/bboylyg/NAD", "github.com/bboylyg/ABL"
IBAU, BADNETS = "github.com/YiZeng623/I-BAU", "github.com/verazuo/badnets-pytorch"
SUSPECTS = {  # file: where it comes from, flags, trigger, target label
    "nad/WRN-16-1-S-model_best.pth.tar": (NAD, WRN, grid, 5),
    "nad/WRN-16-1-T-model_best.pth.tar": (NAD, WRN, grid, 5),
    "nad/WRN-16-1-erased.tar": (NAD, WRN, grid, 5),
    "abl/WRN-16-1-gridTrigger-targetLB0.tar": (ABL, WRN, grid, 0),
    "ibau_cifar10/badnets_8_02_ckpt.pth": (IBAU, VGG, white(slice(27, 31)), 8),
    "ibau_cifar10/l0_inv_0_02_ckpt.pth": (IBAU, VGG, masked, 0),
    "ibau_cifar10/l2_inv_0_02_ckpt.pth": (IBAU, VGG, picture("l2_inv"), 0),
    "ibau_cifar10/trojan_sq_2_02_ckpt.pth": (IBAU, VGG, picture("trojan_sq"), 2),
    "ibau_cifar10/trojan_wm_2_02_ckpt.pth": (IBAU, VGG, picture("trojan_wm"), 2),
    "verazuo/badnet-CIFAR10.pth": (BADNETS, CNN, white(slice(-5, None)), 1),
    "verazuo/badnet-MNIST.pth": (BADNETS, DIGITS, white(slice(-5, None)), 1),
}


def out_of(file, script):
    """The folder of one audit."""
    return f"runs/public/{Path(file).parent.name}-{Path(file).name.split('.')[0]}/{script}"


def commands(folder):
    """Every audit as (folder it writes, command)."""
    for file, (_, flags, _, _) in SUSPECTS.items():
        for script, own in SCRIPTS.items():
            own = OWN.get((script, flags), own)
            if script == "nc_mitigate":
                if file.endswith(UNNAMED):
                    continue
                own = f"--nc {out_of(file, 'nc')}"
            out, ckpt = out_of(file, script), shlex.quote(str(folder / file))
            words = f"python methods/{script}.py --ckpt {ckpt} {flags} {own} --out {out}"
            yield out, " ".join(words.split())


def figures(model, x, y, x_poisoned, target):
    """Accuracy on x and ASR on x_poisoned, in per cent; images of the target do not count."""
    wanted = torch.full_like(y, target)
    others = y != target
    return accuracy(model, x, y), accuracy(model, x_poisoned[others], wanted[others])


def collect(folder, data_dir):
    """The stored audits of SUSPECTS, with the figures of each suspect before and after."""
    for file, (origin, flags, trigger, target) in SUSPECTS.items():
        before = None
        for script in SCRIPTS:
            out = Path(out_of(file, script))
            if not (out / "result.json").exists():
                continue
            result = json.loads((out / "result.json").read_text())
            args = SimpleNamespace(**{**result["arguments"], "data_dir": data_dir})
            args.ckpt, args.out = str(folder / file), None
            if before is None:
                victim = load_victim(args, torch.device("cpu"))
                x, y = victim.data.x_test, victim.data.y_test
                x_poisoned = trigger(x, (folder / file).parent)
                before = figures(victim.model, x, y, x_poisoned, target)
            found = {"": before}
            if (out / "model.pt").exists():
                saved = read_checkpoint(out / "model.pt")
                model = load_model(saved, out / "model.pt", x.device, args.arch)
                found["_repaired"] = figures(model, x, y, x_poisoned, target)
            metrics = result["metrics"] | {"target": target}
            for suffix, (clean, asr) in found.items():
                metrics |= {f"clean_accuracy{suffix}": clean, f"asr{suffix}": asr}
            names = {"folder": out.as_posix(), "victim": file, "origin": origin, "flags": flags}
            arguments = result["arguments"] | {"ckpt": file}  # wherever the folder lies
            yield names | result | {"arguments": arguments, "metrics": metrics}


def section(entries, authors):
    """The table in Markdown with its text, beside {file: figures of its authors}; '' if empty."""
    rows, sources = [], {}
    for entry in entries:
        m, theirs = entry["metrics"], authors.get(entry["victim"], {})
        cells = [f"`{entry['victim']}`", str(m["target"])]
        for key in ("clean_accuracy", "asr"):
            cells.append(f"{m[key]:.2f}" + (f" ({theirs[key]:.2f})" if key in theirs else ""))
        named = [f"{label} {side}" for side in ("below", "above") for label in m.get(side, [])]
        cells += [entry["script"] + "†" * missed_goal(m), m.get("verdict", "–")]
        cells += [", ".join(named) or "–"]
        for key, form in FORMS.items():
            cells.append("–" if m.get(key) is None else f"{m[key]:{form}}")
        rows.append(cells)
        sources |= {entry["victim"]: theirs["source"]} if theirs else {}
    origins = ", ".join(sorted({entry["origin"] for entry in entries}))
    where = "; ".join(f"`{file}`: {source}" for file, source in sources.items())
    mark = f"\n\n{MISSED}" * any(missed_goal(entry["metrics"]) for entry in entries)
    last = f"The files come from {origins}. The authors' figures: {where}."
    return f"{TEXT}\n\n{markdown(HEAD, rows)}{mark}\n\n{last}" if rows else ""


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, help="where the files of SUSPECTS lie")
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--list", action="store_true", help="print every audit's folder and command")
    args = p.parse_args()
    missing = [file for file in SUSPECTS if not (args.folder / file).exists()]
    if missing:
        fail(f"{args.folder / missing[0]} does not exist; it comes from {SUSPECTS[missing[0]][0]}")
    if args.list:
        for out, command in commands(args.folder):
            print(out, command)
        sys.exit()
    found = list(collect(args.folder, args.data_dir))
    store(HERE / "public.json", found)
    print(f"wrote {HERE / 'public.json'}: {len(found)} audits made or made again")
