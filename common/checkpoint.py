"""The checkpoint folder that every attack writes and every defence reads.

model.pt            tensors and plain values only: loads with weights_only=True
poisoned_test.npz   x (uint8 N x H x W x C), y_true, y_target; no image of the target class
poisoned_train.npz  x, y_given, poisoned (of the attacks POISON_DATA)
samples.png         clean, poisoned, residual
result.json         every figure printed, arguments, seconds, device, versions
"""

import contextlib
import copy
import functools
import json
import math
import os
import pickle
import platform
import subprocess
import textwrap
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common import fail, saved_figure, written_whole
from common.datasets import Dataset, check_size, check_split, load_dataset, read_npz, to_float
from common.models import Classifier, build_model

FORMAT = 1
ENTRIES = {"arch": str, "classes": int, "image_shape": list, "mean": list, "std": list}
ENTRIES |= {"state_dict": dict, "dataset": str}
WRAPPERS = "model", "state_dict", "model_state_dict", "netC", "net"  # where a state dict may lie
# the attacks that write poisoned_train.npz
POISON_DATA = ("badnets", "blend", "freq_backdoor", "sig", "issba", "label_consistent")
POISON_DATA += ("trojannn", "invisible", "composite", "poison_ink", "dfst", "feature_collision")
POISON_DATA += ("input_aware", "latent")  # the same trigger in a fixed set
PARTS = ("result.json", "samples.png", "poisoned_train.npz", "poisoned_test.npz", "model.pt")
PARTS += ("heatmap.png", "reversed.png", "reversed.npz", "norms.png", "generated.png")
PARTS += ("triggers.png", "entropies.png", "entropies.npz", "curve.png", "curve.npz", "losses.png")
PARTS += ("suspects.csv", "isolated.csv", "filters.csv", "maps.png", "points.png", "points.npz")
PARTS += ("sweep.png", "attention.png")


@dataclass
class Victim:
    """A loaded model and what came with it; the poisoned_* are None where the file is absent."""

    model: Classifier
    data: Dataset
    arch: str
    folder: Path
    x_poisoned: torch.Tensor | None = None
    y_true: torch.Tensor | None = None
    y_target: torch.Tensor | None = None


def plain(value):
    """A JSON-ready copy: tensors, arrays, paths and non-finite floats become plain values."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def code_commit():
    """The git commit of this code, '+' where tracked files differ from it; None without git."""
    call = ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(call, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


COMMIT = code_commit()  # of the code that was read, whatever is committed while it runs


def save_result(folder, script, args, seconds, metrics, device):
    """Write result.json and print the RESULT line."""
    name = f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    result = {
        "script": script,
        "arguments": vars(args),
        "metrics": metrics,
        "seconds": round(seconds, 1),
        "device": name,
        "commit": COMMIT,
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, np)},
    }
    with written_whole(Path(folder) / "result.json") as path:
        path.write_text(json.dumps(plain(result), indent=1) + "\n")
    shown = {k: v for k, v in metrics.items() if isinstance(v, (int, float, str))}
    figures = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in shown.items()]
    print("RESULT", script, *figures, f"seconds={seconds:.0f}", f"folder={folder}")


def save_model(folder, model, data, arch, args, metrics, trigger=None):
    """Write model.pt; `trigger` holds the attack's or the reversed trigger's tensors."""
    checkpoint = {
        "format": FORMAT,
        "state_dict": {k: v.cpu() for k, v in model.state_dict().items()},
        "arch": arch,
        "softmax": model.softmax,
        "dataset": data.name,
        "classes": data.classes,
        "image_shape": list(data.shape),
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "arguments": plain(vars(args)),
        "trigger": {k: v.cpu() for k, v in (trigger or {}).items()},
        "metrics": plain(metrics),
    }
    with written_whole(Path(folder) / "model.pt") as path:
        try:
            torch.save(checkpoint, path)
        except RuntimeError as error:  # torch's word for a full disk or a vanished folder
            fail(f"cannot write {path}: {str(error).splitlines()[0]}")


def fingerprint(model):
    """A checksum of a network's tensors, which tells it from others."""
    parts = (t.cpu().contiguous().flatten().view(torch.uint8) for t in model.state_dict().values())
    return functools.reduce(lambda crc, part: zlib.crc32(part.numpy(), crc), parts, 0)


def check_own(folder):
    """Fail where `folder`, an --out, holds a model.pt that none of these scripts wrote."""
    path = Path(folder, "model.pt")
    alone = path.is_file() and not path.with_name("result.json").is_file()
    if alone and "format" not in read_checkpoint(path):
        fail(f"{path} would be replaced, and none of these scripts wrote it: name another --out")


def clear_folder(folder):
    """Remove what an earlier run left in `folder`, and the results of defences of its model.pt."""
    folder = Path(folder)
    for part in PARTS:
        (folder / part).unlink(missing_ok=True)
    for path in folder.glob("*/result.json"):
        with contextlib.suppress(OSError, ValueError, TypeError, LookupError):
            given = Path(json.loads(path.read_text())["arguments"]["ckpt"])
            if (folder / "model.pt").resolve() in (given.resolve(), (given / "model.pt").resolve()):
                clear_folder(path.parent)


def save_images(path, x, **labels):
    """Write uint8 images N x C x H x W and tensors of one entry per image as an .npz."""
    arrays = {name: values.cpu().numpy() for name, values in labels.items()}
    with written_whole(path) as temporary:
        np.savez_compressed(temporary, x=x.cpu().permute(0, 2, 3, 1).numpy(), **arrays)


def draw_rows(path, rows):
    """Draw a list of rows (name, images N x C x H x W in [0,1]), one image a column."""
    from torchvision.utils import make_grid  # 2 s

    names, images = zip(*rows)
    count, height, width = len(images[0]), images[0].shape[2], images[0].shape[3]
    gap = max(1, width // 16)
    picture = make_grid(torch.cat([x.cpu() for x in images]), count, gap, pad_value=1)
    with saved_figure(path, figsize=(1.1 * count + 1.2, 1.15 * len(rows))) as (_, axis):
        axis.imshow(picture.permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
        middles = [gap + height / 2 + (height + gap) * i for i in range(len(rows))]
        axis.set(xticks=[], yticks=middles, yticklabels=names, frame_on=False)
        axis.tick_params(length=0)


def save_samples(folder, x, x_poisoned, count=8):
    """Draw some clean images, poisoned ones (uint8) and |residual| scaled to its maximum."""
    x, x_poisoned = (a[:: max(1, len(a) // count)][:count].float() / 255 for a in (x, x_poisoned))
    residual = (x_poisoned - x).abs()
    scale = residual.max().clamp(min=1 / 255).item()
    last = f"residual\n(max {scale:.2f})", residual / scale
    draw_rows(Path(folder) / "samples.png", [("clean", x), ("poisoned", x_poisoned), last])


def read_checkpoint(path):
    """torch.load with weights_only=True on the CPU; a damaged or hostile file fails in one line."""
    try:
        check_size(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice on pickles, several lines
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"no such checkpoint: {path} (an attack writes it, such as methods/badnets.py)")
    except pickle.UnpicklingError:
        fail(f"{path} holds more than tensors and plain values, or is damaged; it was not executed")
    except Exception as error:  # a damaged file can raise nearly anything
        if "TorchScript" in str(error):  # torch's message recommends to run it
            fail(f"{path} is a TorchScript program, not a state dict; it was not executed")
        fail(f"{path} is not a readable checkpoint: {(str(error).splitlines() or ['empty'])[0]}")
    if isinstance(checkpoint, (list, tuple)):
        checkpoint = next((part for part in checkpoint if isinstance(part, dict)), checkpoint)
    if not isinstance(checkpoint, dict):
        fail(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint or a state dict")
    return checkpoint


def check_entries(checkpoint, path):
    """Fail unless it is one of our checkpoints, with all that load_model needs."""
    if not isinstance(checkpoint.get("format"), int) or checkpoint["format"] != FORMAT:
        fail(f"{path} has another checkpoint format; this code reads {FORMAT}")
    for key, kind in ENTRIES.items():
        if not isinstance(checkpoint.get(key), kind):
            fail(f"{path} lacks the entry {key!r}, a {kind.__name__}")
    shape, mean, std = (checkpoint[key] for key in ("image_shape", "mean", "std"))
    sides = len(shape) == 3 and all(isinstance(n, int) for n in shape)
    if not (sides and len(mean) == len(std) == shape[0]):
        fail(f"{path}: its image_shape {shape} does not go with mean {mean} and std {std}")


def load_model(checkpoint, path, device, arch=None):
    """The model of one of our checkpoints; a user's FILE.py runs only where `arch` names it."""
    source = str(checkpoint["arch"]).rpartition(":")[0]
    if source not in ("", "torchvision") and checkpoint["arch"] != arch:
        fail(f"{path} needs code of yours: pass --arch {checkpoint['arch']} to run it")
    try:
        with torch.random.fork_rng(devices=[]):  # its initial weights must not use up the seed
            model = build_model(*(checkpoint[key] for key in list(ENTRIES)[:5]))
    except (TypeError, ValueError, IndexError, RuntimeError, MemoryError) as error:
        fail(f"{path} describes no model: {(str(error).splitlines() or ['out of memory'])[0]}")
    load_strictly(model, checkpoint["state_dict"], path, checkpoint["arch"])
    model.softmax = checkpoint.get("softmax") is True
    return model.eval().requires_grad_(False).to(device)


def check_fit(checkpoint, path, data):
    """Fail unless one of our checkpoints was trained on as many classes of such images."""
    classes, shape = checkpoint["classes"], tuple(checkpoint["image_shape"])
    if (classes, shape) != (data.classes, data.shape):
        ours = f"{data.name} has {data.classes} of {data.shape}"
        fail(f"{path} was trained on {classes} classes of {shape} images; {ours}")


def load_clean(path, data, arch=None, cure="", same=False, seed=None):
    """A model of clean.py's kind, of `data`, `same`: an `arch`; warns if it has the `seed`."""
    path = Path(path, "model.pt") if os.path.isdir(path) else Path(path)
    checkpoint = read_checkpoint(path)
    check_entries(checkpoint, path)
    check_fit(checkpoint, path, data)
    if checkpoint["dataset"] != data.name:
        fail(f"{path} was trained on {checkpoint['dataset']}, not on {data.name}{cure}")
    if checkpoint.get("trigger"):
        fail(f"{path} is an attack's network, not a clean one{cure}")
    given = checkpoint.get("arguments")
    if seed is not None and isinstance(given, dict) and given.get("seed") == seed:
        print(f"warning: {path} has the victim's seed: they start alike and see the same batches")
    if same and checkpoint["arch"] != arch:
        fail(f"{path} is a {checkpoint['arch']}, not a {arch}: pass --arch {checkpoint['arch']}")
    return load_model(checkpoint, path, data.x_train.device, arch)


def load_control(folder, args, data, cure=": use another --out"):
    """The clean model of the same data, architecture and seed beside `folder`, or None."""
    name = f"{Path(data.name).stem}-{Path(args.arch).name}-clean-s{args.seed}/model.pt"
    path = Path(folder).parent / name
    return load_clean(path, data, args.arch, cure) if path.exists() else None


def load_victim(args, device):
    """Load `--ckpt` (a folder, its model.pt, or a bare state dict) and its dataset.

    A bare state dict may lie under the names WRAPPERS, in a list or tuple, needs `--arch` and
    `--dataset` (and `--mean --std` if they differ from the dataset's own, and `--classes` where the
    images do not show all), loses a 'module.' prefix by name and must fit exactly. The model comes
    back in eval mode and frozen.
    """
    path = Path(args.ckpt)
    path = path / "model.pt" if path.is_dir() else path
    if args.out and Path(args.out).resolve() == path.parent.resolve():
        fail(f"--out {args.out} is the checkpoint's own folder, whose files would be replaced")
    result = Path(args.out or path) / "result.json"
    if result.is_file() and '"ckpt"' not in result.read_text(errors="replace"):
        fail(f"--out {args.out} is an attack's folder, whose files would be replaced")
    check_own(args.out or path)
    checkpoint = read_checkpoint(path)
    if "format" not in checkpoint:
        return load_foreign(checkpoint, path, args, device)
    check_entries(checkpoint, path)
    if args.arch not in (None, checkpoint["arch"]) or args.mean or args.std:
        fail(f"--arch, --mean and --std are for bare state dicts; {path} has its own")
    name, size, classes = args.dataset or checkpoint["dataset"], args.image_size, args.classes
    if os.path.isdir(name):
        size = size or checkpoint["image_shape"][1]
    if name.rstrip("/") == checkpoint["dataset"].rstrip("/"):
        classes = classes or checkpoint["classes"]
    data = load_dataset(name, args.data_dir, device, size, classes)
    in_colours(data, checkpoint["image_shape"][0])
    check_fit(checkpoint, path, data)
    model = load_model(checkpoint, path, device, args.arch)
    victim = Victim(model, data, checkpoint["arch"], path.parent)
    test = path.parent / "poisoned_test.npz"
    if test.exists():
        x, y_true, y_target = read_npz(test, ["x", "y_true", "y_target"])
        x, y_true = check_split(x, y_true, test)
        _, y_target = check_split(x.transpose(0, 2, 3, 1), y_target, test)
        fits(data, x, max(y_true.max(), y_target.max()), test)
        victim.x_poisoned, victim.y_true, victim.y_target = (
            torch.from_numpy(array).to(device) for array in (x, y_true, y_target)
        )
    return victim


def in_colours(data, channels):
    """Repeat grey images for a network of RGB images."""
    if (data.shape[0], channels) == (1, 3):
        data.x_train, data.x_test = (x.repeat(1, 3, 1, 1) for x in (data.x_train, data.x_test))


def fits(data, x, label, path):
    """Fail unless images N x C x H x W and their largest label are of the dataset's kind."""
    if x.shape[1:] != data.shape or label >= data.classes:
        fail(f"{path} does not fit: the model has {data.classes} classes of {data.shape}")


def load_training_set(victim, path=None):
    """The set that the attacker handed out: poisoned_train.npz beside the checkpoint, or `path`.

    Returns images (uint8 N x C x H x W), given labels (int64 N) and poison flags (bool N, or None
    where the file holds x and y alone), on the device of the data. The flags are for the evaluation
    alone.
    """
    if path is None:
        path = victim.folder / "poisoned_train.npz"
        if not path.exists():
            fail(f"{path} does not exist; the attacks that write it: {', '.join(POISON_DATA)}")
    arrays = read_npz(path, ["x", "y_given", "poisoned"], ["x", "y"])
    x, y_given = check_split(*arrays[:2], path)
    x = np.repeat(x, 3, 1) if (x.shape[1], victim.data.shape[0]) == (1, 3) else x
    fits(victim.data, x, y_given.max(), path)
    device = victim.data.x_train.device
    if len(arrays) == 2:
        own = {image.tobytes() for image in x}
        if known := sum(image.tobytes() in own for image in victim.data.x_test.cpu().numpy()):
            told = f"{known} of {len(victim.data.x_test)} test images are in {path}"
            print(f"warning: {told}, labels and all: the accuracy on them says nothing new")
        return *(torch.from_numpy(array).to(device) for array in (x, y_given)), None
    poisoned = arrays[2]
    if poisoned.dtype != bool or poisoned.shape != y_given.shape:
        fail(f"{path}: poisoned must hold one bool per image; got {poisoned.dtype}")
    return tuple(torch.from_numpy(array).to(device) for array in (x, y_given, poisoned))


def load_foreign(checkpoint, path, args, device):
    """The Victim of a bare state dict from elsewhere; see load_victim."""
    if not (args.arch and args.dataset):
        fail(f"{path} is a bare state dict: pass --arch and --dataset (and --mean --std if needed)")
    for _ in range(3):  # not for ever: a hostile file can hold itself
        inner = [v for key in WRAPPERS if isinstance(v := checkpoint.get(key), dict)]
        kept = [v for v in inner if any(isinstance(t, (torch.Tensor, dict)) for t in v.values())]
        checkpoint = kept[0] if kept else checkpoint
    data = load_dataset(args.dataset, args.data_dir, device, args.image_size, args.classes)
    mean, std = args.mean or data.spec.mean, args.std or data.spec.std
    in_colours(data, len(mean))
    if not all(map(math.isfinite, mean)) or not all(0 < s < math.inf for s in std):
        fail(f"--mean must be finite and --std above 0; got {mean} and {std}")
    model = build_model(args.arch, data.classes, data.shape, mean, std)
    prefix = "" if any(key.startswith("module.") for key in model.net.state_dict()) else "module."
    state = {str(key).removeprefix(prefix): value for key, value in checkpoint.items()}
    cure = "; is it another --arch (torchvision's are torchvision:NAME), or are --classes missing?"
    load_strictly(model.net, state, path, args.arch, cure)
    model.eval().requires_grad_(False).to(device)
    check_outputs(model, data, args.arch)
    folder = path.with_suffix("") if path.suffix else path.with_name(f"{path.name}-audit")
    return Victim(model, data, args.arch, folder)


def form(y):
    """How many outputs a network gives, and the last one's shape and whether it is a softmax."""
    parts = y if isinstance(y := getattr(y, "logits", y), (tuple, list)) else [y]
    if not isinstance(last := parts[-1], torch.Tensor) or last.dim() != 2:
        return type(last).__name__
    return len(parts), last.shape, bool(last.min() >= 0 and (last.sum(1) - 1).abs().max() < 1e-3)


@torch.no_grad()
def check_outputs(model, data, arch):
    """Fail unless the network gives a score per image and class; see whether it ends in softmax."""
    x = to_float(data.x_train[:100])
    try:
        one, y, again, normal = model(x[:1]), model(x), model(x), (x[:8] - model.mean) / model.std
        with torch.random.fork_rng(devices=[]):  # dropout must not use up the seed
            held, trained = form(model.net(normal)), form(copy.deepcopy(model.net).train()(normal))
    except (Exception, SystemExit) as error:  # the user's own code can raise anything
        fail(f"{arch} does not take {data.shape} images: {(str(error).splitlines() or [''])[0]}")
    found = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
    if found != (len(x), data.classes):
        fail(f"{arch} gives {found} for {len(x)} images of {data.classes} classes (see --classes)")
    if one.shape != y[:1].shape:  # as after .squeeze(); the last part of a pass may be one image
        fail(f"{arch} gives {tuple(one.shape)} for a single image, not 1 x {data.classes}")
    one, again, same = (torch.nan_to_num(z) for z in (one, again, y))
    if max((one - same[:1]).abs().max(), (again - same).abs().max()) > 0.02 * same.abs().max():
        why = "dropout that no eval() stops, or a norm by the statistics of the batch"
        fail(f"{arch} answers the same image in another way by the batch or by chance: {why}")
    if held != trained:
        fail(f"{arch} gives outputs of another form in training mode: how many, or a softmax")
    model.softmax = held[-1]
    if model.softmax:
        print(f"{arch} ends in a softmax: its logarithm is taken for the logits")


def check_gradient(model, data, arch):
    """Fail where the network's scores have no gradient, which every search and training needs."""
    if not model(to_float(data.x_train[:1]).requires_grad_()).requires_grad:
        fail(f"{arch} gives no gradient: does its forward run under no_grad?")


def load_strictly(module, state, path, arch, cure=""):
    """load_state_dict(strict=True); a misfit fails and names the first differing entry."""
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        first = textwrap.shorten(lines[1] if len(lines) > 1 else lines[0], 160)
        fail(f"{path} does not fit {arch}: {first}{cure}")
    if not all(t.isfinite().all() for t in module.state_dict().values() if torch.is_tensor(t)):
        fail(f"{path} holds weights that are not finite")
