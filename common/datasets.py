"""Datasets as uint8 tensors on the device: N x C x H x W images, int64 labels, no DataLoader."""

import os
import shutil
import tempfile
import warnings
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import fail, make_folder, written_whole

GTSRB_TRAIN_URL = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
GTSRB_TRAIN_URL += "GTSRB_Final_Training_Images.zip"
PICTURES = "PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP"  # formats whose reader runs no program


@dataclass(frozen=True)
class Spec:
    """What a script needs to know before training: normalisation, network, recipe.

    `mean` and `std` are per channel, for images in [0,1]; `pad` is the random crop's padding in
    pixels, `flip` whether a mirrored image keeps its label, `lr` the peak of the learning rate.
    """

    mean: tuple
    std: tuple
    arch: str
    epochs: int
    pad: int
    flip: bool
    lr: float = 0.1

    def of(self, arch):
        """The recipe for the network `arch`, which may have one of its own."""
        return replace(self, **RECIPES.get(arch, {}))


SPECS = {
    "digits": Spec((0.5,), (0.5,), "mnist_cnn", 60, 2, False, 0.05),
    "mnist": Spec((0.5,), (0.5,), "mnist_cnn", 15, 2, False),
    "cifar10": Spec((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), "airbench", 60, 4, True),
    "cifar100": Spec((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "airbench", 60, 4, True),
    "gtsrb": Spec((0.0,) * 3, (1.0,) * 3, "preact_resnet18", 30, 4, False),
}
RECIPES = {"airbench": {"epochs": 24, "pad": 2, "lr": 0.2}, "wrn16_1": {"epochs": 12}}  # their own
RECIPES["nc_gtsrb_cnn"] = {"epochs": 12, "pad": 0, "lr": 0.02}


@dataclass
class Dataset:
    """Images are uint8 N x C x H x W, labels int64 N, all on one device."""

    name: str
    spec: Spec
    classes: int
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor

    @property
    def shape(self):
        """Image shape (C, H, W)."""
        return tuple(self.x_train.shape[1:])


def pick_device(name):
    """The torch device for `--device`, a CPU or a GPU; 'auto' is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        fail(f"device {name!r} is not available here")
    if device.type not in ("cpu", "cuda"):
        fail(f"device {name!r} is neither a CPU nor a GPU that these scripts know")
    return device


def check_size(path):
    """Fail where a zip file, an .npz or a model.pt, is small but unpacks to very much."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > 10**8 + 100 * os.path.getsize(path):
            fail(f"{path} would unpack to {size / 1e9:.1f} GB: more than such images or weights do")


def read_npz(path, keys, otherwise=()):
    """The arrays `keys` of an .npz, or, without one of them, `otherwise`; nothing is unpickled."""
    try:
        check_size(path)
        with np.load(path, allow_pickle=False) as archive:
            if otherwise and not {*archive} >= {*keys} and {*archive} >= {*otherwise}:
                keys = otherwise
            missing = [key for key in keys if key not in archive]
            if missing:
                needs = " or ".join(", ".join(names) for names in (keys, otherwise) if names)
                fail(f"{path} has no array {', '.join(missing)}; it needs {needs}")
            arrays = [archive[key] for key in keys]
    except FileNotFoundError:
        fail(f"no such file: {path}")
    except Exception as error:  # a damaged archive can raise nearly anything
        why = "pickled objects are never read" if "pickle" in str(error) else error
        why = why if zipfile.is_zipfile(path) else "it is no zip archive of arrays"
        fail(f"{path} is not a plain .npz file: {why}")
    if not all(isinstance(array, np.ndarray) for array in arrays):
        fail(f"{path} is not a plain .npz file: its members are not arrays")
    return arrays


def load_dataset(name, data_dir, device, image_size=None, classes=None):
    """Load a named dataset, an .npz, or a folder of pictures by class.

    Named datasets are read from `<data_dir>/<name>.npz`; 'digits' comes with scikit-learn; the
    others are downloaded once through torchvision and cached in that form. An .npz holds uint8
    x_train, y_train, x_test, y_test, or x and y alone, of which a fifth become the test images. A
    folder follows torchvision's ImageFolder, see `folder`. `classes`: more than the labels show.
    """
    splits, bare = ["x_train", "y_train", "x_test", "y_test"], str(name).rstrip("/")
    name = name if bare in SPECS else bare  # a folder's path
    if image_size is not None and not (1 <= image_size <= 1024 and os.path.isdir(name)):
        fail(f"--image-size {image_size}: it is the side, 1..1024, of a folder's pictures")
    if name == "digits":
        arrays = digits()
    elif name in SPECS:
        path = Path(data_dir) / f"{name}.npz"
        if not path.exists():
            download(name, path)
        arrays = read_npz(path, splits)
    elif str(name).endswith(".npz"):
        arrays = read_npz(name, splits, ["x", "y"])
    elif os.path.isdir(name):
        arrays = folder(Path(name), image_size or 32)
    else:
        known = f"{', '.join(SPECS)}, or the path of an .npz file or of a folder by class"
        fail(f"unknown dataset {name!r}; known: {known}")
    if len(arrays) == 2:
        arrays = split_off(*arrays, name)
    x_train, y_train, x_test, y_test = arrays
    tensors, shapes = [], set()
    for x, y, split in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        x, y = check_split(x, y, f"{name} ({split})")
        shapes.add(x.shape[1:])
        # one channel leaves the strides ambiguous; vmap refuses channels-last ones
        x = torch.from_numpy(x).clone(memory_format=torch.contiguous_format)
        tensors += [x.to(device), torch.from_numpy(y).to(device)]
    if len(shapes) != 1:
        fail(f"{name}: train and test images differ in shape: {sorted(shapes)}")
    shown = int(y_train.max()) + 1
    if shown > max(len(y_train), classes or 0):
        fail(f"{name}: label {shown - 1} among {len(y_train)} training images")
    if len(np.unique(y_train)) < 2:
        fail(f"{name}: the training labels hold one class; at least two are needed")
    if int(y_test.max()) >= max(shown, classes or 0):
        fail(f"{name}: test label {int(y_test.max())} does not occur in training")
    if classes is not None and not shown <= classes <= 10**6:
        fail(f"{name} has labels up to {shown - 1}, which does not go with {classes} classes")
    half = (0.5,) * tensors[0].shape[1]
    arch = "mnist_cnn" if len(half) == 1 else "preact_resnet18"
    generic = Spec(half, half, arch, 30, 2, False, 0.05)
    return Dataset(str(name), SPECS.get(name, generic), classes or shown, *tensors)


def check_split(x, y, what):
    """Return (N x C x H x W uint8, N int64) from N x H x W[ x C] arrays, or fail."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        fail(f"{what}: images must be uint8, N x H x W or N x H x W x C; got {x.dtype} {x.shape}")
    if y.ndim != 1 or x.size == 0 or len(x) != len(y):
        fail(f"{what}: needs one label per image and at least one image; got {x.shape}, {y.shape}")
    if x.max() == 1:
        fail(f"{what}: the largest value is 1; images must hold 0..255, not 0..1")
    if not np.issubdtype(y.dtype, np.integer) or y.astype(np.int64).min() < 0:
        fail(f"{what}: labels must be integers from 0 up; got {y.dtype}")
    if x.ndim == 3:
        x = x[..., None]
    if x.shape[3] not in (1, 3):
        fail(f"{what}: images must have 1 or 3 channels; got {x.shape[3]}")
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y.astype(np.int64)


def split_off(x, y, name):
    """x_train, y_train, x_test, y_test: a fifth of each class become the test images."""
    _, labels = check_split(x, y, name)
    test = np.zeros(len(y), dtype=bool)
    test[defender_split(torch.from_numpy(labels), 0.2, seed=0)] = True
    if len(np.unique(y[~test])) < len(np.unique(y)):
        fail(f"{name}: test images cannot be split off a class of one image")
    return x[~test], y[~test], x[test], y[test]


def folder(root, side):
    """Arrays of pictures by class, bilinear to `side` x `side`, as torchvision's ImageFolder.

    root/train/<class>/* and root/test/<class>/*, or root/<class>/* alone (x, y). Labels follow the
    names' order as text (10 before 2). Grey pictures make one channel where all are grey; pictures
    with transparency are refused.
    """
    from torchvision.datasets import ImageFolder

    parts = [root / "train", root / "test"] if (root / "train").is_dir() else [root]
    try:
        splits = [ImageFolder(str(part)) for part in parts]
    except OSError as error:
        fail(f"{root}: {error}")
    if splits[0].classes != splits[-1].classes:
        fail(f"{root}: other classes in test than in train: {splits[-1].classes}")
    print("classes:", ", ".join(f"{k} {name}" for k, name in enumerate(splits[0].classes)))
    x = read_pictures([path for split in splits for path, _ in split.samples], (side, side))
    arrays, first = [], len(splits[0])
    for split, part in zip(splits, (x[:first], x[first:])):
        arrays += [part, np.array(split.targets)]
    return arrays


def read_pictures(paths, size):
    """uint8 N x H x W[ x 3] of picture files, bilinear to `size` (H, W); a bad one fails."""
    from PIL import Image

    made, modes = [], set()
    for path in paths:
        try:
            with warnings.catch_warnings(), Image.open(path, formats=PICTURES) as picture:
                warnings.simplefilter("ignore")
                modes.add(picture.mode)
                made.append(picture.convert("RGB").resize(size[::-1], 2))
        except Exception as error:  # a damaged picture can raise nearly anything
            fail(f"{path} is damaged: {error}")
        if picture.mode not in ("1", "L", "RGB"):
            fail(f"{path} has the mode {picture.mode}; pictures must be grey or RGB")
    x = np.stack([np.asarray(picture) for picture in made])
    return x if "RGB" in modes else x[..., 0]


def load_pictures(path, shape):
    """Names and uint8 images N x C x H x W, for a network of `shape` (C, H, W).

    From an .npz with x (N x H x W[ x C], numbered from 0) or all pictures below a folder, which
    are resized and, for a network of one channel, turned grey.
    """
    path = Path(path)
    if path.is_dir():
        from torchvision.datasets.folder import IMG_EXTENSIONS

        held = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in held if file.suffix.lower() in IMG_EXTENSIONS]
        if not files:
            fail(f"no picture lies below {path}")
        if len(files) < len(held):
            print(f"files below {path} that do not end like a picture: {len(held) - len(files)}")
        x, names = read_pictures(files, shape[1:]), [str(file.relative_to(path)) for file in files]
    else:
        (x,) = read_npz(path, ["x"])
        names = [str(k) for k in range(len(x) if x.ndim else 0)]
    x, _ = check_split(x, np.zeros(len(names), np.int64), path)
    if shape[0] == 1 and x.shape[1] == 3:
        x = x.mean(1, keepdims=True).round().astype(np.uint8)
    x = np.repeat(x, 3, 1) if shape[0] > x.shape[1] else x
    if x.shape[1:] != shape:
        fail(f"{path} has {x.shape[1:]} images; the network takes {shape}")
    return names, torch.from_numpy(x)


def digits():
    """scikit-learn's 1,797 scanned 8x8 digits, bilinear to 28x28: 1,437 train and 360 test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 16
    x = F.interpolate(x, size=28, mode="bilinear", align_corners=False)
    x = to_uint8(x).permute(0, 2, 3, 1).numpy()
    parts = train_test_split(x, y, test_size=360, stratify=y, random_state=0)
    return [parts[i] for i in (0, 2, 1, 3)]  # x_train, y_train, x_test, y_test


def download(name, path):
    """Download `name` through torchvision (progress on stderr) and write `path` whole."""
    from torchvision import datasets

    make_folder(path.parent)
    raw = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{name}-"))
    try:
        if name == "gtsrb":
            test = datasets.GTSRB(str(raw), split="test", download=True)
            arrays = [*gtsrb_train(raw), *small(test)]
        else:
            kind = getattr(datasets, name.upper())
            arrays = []
            for train in (True, False):
                split = kind(str(raw), train=train, download=True)
                arrays += [np.asarray(split.data), np.asarray(split.targets)]
    except Exception as error:  # network, disk, a damaged archive
        fail(f"could not download {name}: {error}; put {path.name} into {path.parent} by hand")
    finally:
        shutil.rmtree(raw, ignore_errors=True)
    with written_whole(path) as temporary:
        np.savez(temporary, **dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays)))


def gtsrb_train(raw):
    """The papers' 39,209 training images at 32x32 (torchvision's own split has 26,640)."""
    from PIL import Image
    from torchvision.datasets.utils import download_and_extract_archive

    download_and_extract_archive(GTSRB_TRAIN_URL, str(raw))
    files = sorted((raw / "GTSRB" / "Final_Training" / "Images").glob("*/*.ppm"))
    if not files:
        fail("the GTSRB archive holds no Final_Training images")
    return small((Image.open(file), int(file.parent.name)) for file in files)


def small(pairs):
    """Arrays N x 32 x 32 x 3 and N of pairs (picture, label); bilinear."""
    made = [(np.asarray(p.convert("RGB").resize((32, 32), 2)), label) for p, label in pairs]
    return np.stack([image for image, _ in made]), np.array([label for _, label in made])


def to_float(x):
    """uint8 [0,255] to float32 [0,1]."""
    if x.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, 0..255; got {x.dtype}")
    return x.float() / 255


def to_uint8(x):
    """float [0,1] to uint8 by rounding, as an image file would store it."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def augment(x, pad, flip):
    """Random crop after zero padding and random mirror, drawn per image; B x C x H x W floats."""
    b, _, h, w = x.shape
    if pad:
        row, column = (torch.randint(0, 2 * pad + 1, (b, 1, 1), device=x.device) for _ in range(2))
        row = row + torch.arange(h, device=x.device).view(1, h, 1)
        column = column + torch.arange(w, device=x.device).view(1, 1, w)
        image = torch.arange(b, device=x.device).view(b, 1, 1)
        x = F.pad(x, (pad,) * 4)[image, :, row, column].permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(b, 1, 1, 1, device=x.device) < 0.5
        x = torch.where(mirrored, x.flip(3), x)
    return x


def defender_split(y, fraction, seed):
    """Indices of the defender's clean images: a stratified `fraction` of the labels `y`.

    At least one image of each class that occurs. Its own generator, so that every defence with
    the same seed holds the same images. Returns a sorted int64 tensor on y's device.
    """
    if not 0 < fraction <= 1:
        fail(f"the defender's share of the training data must lie in (0, 1]; got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    labels, chosen = y.cpu(), []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values.to(y.device)


def kept_back(y, fraction, seed):
    """Which of the images with the labels y defender_split keeps back (bool N): no class's last."""
    kept = torch.zeros(len(y), dtype=torch.bool, device=y.device)
    kept[defender_split(y, fraction, seed)] = True
    return kept if kept.all() else kept & (y.bincount()[y] > 1)
