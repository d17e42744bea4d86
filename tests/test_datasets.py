"""Reading, downloading and caching of datasets, and what is done to batches of them."""

import shutil
import urllib.error
import zipfile
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import files_below, write_npz
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from common import datasets, make_folder, written_whole
from common.attack import attack_flags
from common.checkpoint import read_checkpoint
from common.datasets import (
    augment,
    check_split,
    defender_split,
    load_dataset,
    read_npz,
    to_float,
    to_uint8,
)
from common.defence import defence_flags

# mean, standard deviation, default network
KINDS = {
    "digits": ((0.5,), (0.5,), "mnist_cnn"),
    "mnist": ((0.5,), (0.5,), "mnist_cnn"),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), "airbench"),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), "airbench"),
    "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "preact_resnet18"),
    "own.npz": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "preact_resnet18"),
}


@pytest.mark.parametrize(
    "name, arch, epochs, lr, pad, flip",
    [
        ("digits", "mnist_cnn", 60, 0.05, 2, False),
        ("mnist", "mnist_cnn", 15, 0.1, 2, False),
        ("mnist", "mnist_conv5", 15, 0.1, 2, False),
        ("cifar10", "airbench", 24, 0.2, 2, True),
        ("cifar10", "wrn16_1", 12, 0.1, 4, True),
        ("cifar10", "vgg16", 60, 0.1, 4, True),
        ("cifar100", "airbench", 24, 0.2, 2, True),
        ("cifar100", "wrn16_1", 12, 0.1, 4, True),
        ("cifar100", "resnet18", 60, 0.1, 4, True),
        ("gtsrb", "preact_resnet18", 30, 0.1, 4, False),  # a mirrored sign is another sign
        ("gtsrb", "nc_gtsrb_cnn", 12, 0.02, 0, False),
        ("own.npz", "resnet18", 30, 0.05, 2, False),
    ],
)
def test_recipes(tmp_path, name, arch, epochs, lr, pad, flip):
    own = write_npz(tmp_path / "own.npz", shape=(9, 9, 3))
    spec = datasets.SPECS[name] if name in datasets.SPECS else load_dataset(own, "", "cpu").spec
    assert (spec.mean, spec.std, spec.arch) == KINDS[name]
    recipe = spec.of(arch)
    assert (recipe.epochs, recipe.lr, recipe.pad, recipe.flip) == (epochs, lr, pad, flip)
    assert (recipe.mean, recipe.std) == KINDS[name][:2]
    assert {*datasets.SPECS, "own.npz"} == set(KINDS)
    assert set(datasets.RECIPES) == {"airbench", "wrn16_1", "nc_gtsrb_cnn"}


def upsampled(x, size):
    """Bilinear with pixel centres at half integers and repeated edges; N x h x w."""
    at = np.clip((np.arange(size) + 0.5) * x.shape[1] / size - 0.5, 0, x.shape[1] - 1)
    grid = np.stack(np.meshgrid(at, at, indexing="ij")).reshape(2, -1)
    low = np.minimum(np.floor(grid).astype(int), x.shape[1] - 2)
    (r, c), (u, v) = low, grid - low
    rows = (x[:, r + i, c + j] * (u if i else 1 - u) * (v if j else 1 - v)
            for i in (0, 1) for j in (0, 1))  # fmt: skip
    return sum(rows).reshape(-1, size, size)


def test_digits_are_scikit_learns_images_split_once(digits):
    assert digits.x_train.shape == (1437, 1, 28, 28) and digits.x_test.shape == (360, 1, 28, 28)
    assert digits.x_train.dtype == digits.x_test.dtype == torch.uint8
    assert digits.y_train.dtype == digits.y_test.dtype == torch.int64
    assert digits.classes == 10 and digits.shape == (1, 28, 28)
    x, y = load_digits(return_X_y=True)
    large = 255 * upsampled(x.reshape(-1, 8, 8) / 16, 28)
    train, test = train_test_split(np.arange(1797), test_size=360, stratify=y, random_state=0)
    for images, labels, index in (
        (digits.x_train, digits.y_train, train),
        (digits.x_test, digits.y_test, test),
    ):
        np.testing.assert_array_equal(labels, y[index])
        assert np.abs(images[:, 0].numpy() - large[index]).max() <= 0.5 + 1e-3  # rounded once
    assert set(np.bincount(digits.y_test)) <= {35, 36, 37}


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (20, 24, 3)])
def test_npz_forms(tmp_path, shape):
    path = write_npz(tmp_path / "own.npz", shape, y_test=np.zeros(30, np.uint8))
    data = load_dataset(str(path), "data", "cpu")
    with np.load(path) as archive:
        x = archive["x_train"].reshape(30, *shape[:2], -1)
    np.testing.assert_array_equal(data.x_train.permute(0, 2, 3, 1).numpy(), x)
    assert data.shape == (x.shape[3], *shape[:2]) and data.classes == 3
    assert data.x_train.is_contiguous() and data.y_test.dtype == torch.int64
    assert len(data.spec.mean) == len(data.spec.std) == data.shape[0]


IMAGES = np.zeros((4, 28, 28), np.uint8)


@pytest.mark.parametrize(
    "replaced",
    [
        {"x_train": IMAGES.astype(np.float32), "y_train": np.arange(4) % 2},
        {"x_train": IMAGES, "y_train": np.arange(3) % 2},
        {"x_train": IMAGES, "y_train": np.array([0, 1, 0, -1])},
        {"x_train": IMAGES, "y_train": np.array([0.0, 1.0, 0.0, 1.0])},
        {"x_train": IMAGES, "y_train": np.eye(4, dtype=np.int64)},  # one-hot
        {"x_train": IMAGES, "y_train": np.array(1)},
        {"x_train": IMAGES, "y_train": np.ones(4, np.int64)},  # one class
        {"x_train": IMAGES, "y_train": np.array([0, 1, 0, 10**11])},
        {"x_train": IMAGES, "y_train": np.array([0, 1, 0, 2**63], np.uint64)},
        {"x_train": IMAGES[:0], "y_train": np.zeros(0, np.int64)},
        {"x_train": IMAGES[:, :0], "x_test": IMAGES[:, :0], "y_test": np.arange(4) % 2},
        {"x_test": IMAGES[:0], "y_test": np.zeros(0, np.int64)},
        {"x_train": IMAGES[0], "y_train": np.arange(28) % 2},
        {
            "x_train": np.zeros((4, 3, 28, 28), np.uint8),
            "y_train": np.arange(4) % 2,
        },  # channels first
        {"x_test": np.zeros((4, 28, 30), np.uint8), "y_test": np.arange(4) % 2},
        {"x_test": IMAGES, "y_test": np.arange(4)},  # label 3 does not occur in training
    ],
    ids=lambda replaced: "-".join(f"{k}{v.shape}{v.dtype}" for k, v in replaced.items()),
)
def test_npz_contents_that_are_refused(tmp_path, replaced, one_line):
    path = write_npz(tmp_path / "bad.npz", **replaced)
    one_line(load_dataset, str(path), "data", "cpu")


def flipped(contents, start=3000, stop=3100):
    """The same bytes with the bits of some inverted."""
    return contents[:start] + bytes(b ^ 255 for b in contents[start:stop]) + contents[stop:]


def damaged_files(folder):
    """Paths of files that are no plain .npz, each spoilt in its own way."""
    good = write_npz(folder / "good.npz").read_bytes()
    yield "empty", b""
    yield "text", b"not an archive\n" * 50
    yield "truncated", good[: len(good) // 2]
    yield "flipped", flipped(good)
    np.save(folder / "one.npy", IMAGES)
    yield "npy", (folder / "one.npy").read_bytes()
    with np.load(folder / "good.npz") as archive:
        np.savez_compressed(folder / "packed.npz", **archive)
    packed = (folder / "packed.npz").read_bytes()
    yield (
        "packed-flipped",
        packed[:3000] + bytes(b ^ 255 for b in packed[3000:3100]) + packed[3100:],
    )
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(key, "text, not an array")
    yield "other-zip", (folder / "other.zip").read_bytes()


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "flipped", "npy", "packed-flipped", "other-zip"]
)
def test_damaged_npz(tmp_path, kind, one_line):
    path = tmp_path / "damaged.npz"
    path.write_bytes(dict(damaged_files(tmp_path))[kind])
    assert str(path) in one_line(load_dataset, str(path), "data", "cpu")


def test_what_an_npz_needs_is_told(tmp_path, one_line):
    np.savez(tmp_path / "own.npz", images=IMAGES)
    message = one_line(load_dataset, str(tmp_path / "own.npz"), "data", "cpu")
    assert message.endswith("it needs x_train, y_train, x_test, y_test or x, y\n")
    (tmp_path / "own.npz").write_text("a picture, say")
    message = one_line(load_dataset, str(tmp_path / "own.npz"), "data", "cpu")
    assert "no zip archive" in message and "pickle" not in message


def test_labels_that_an_int64_does_not_hold(one_line):
    labels = np.array([0, 1, 0, 2**64 - 1], np.uint64)
    assert "from 0 up" in one_line(check_split, IMAGES, labels, "own.npz")


def bomb(path, member):
    """A small archive that unpacks to 200 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, bytes(2 * 10**8))
    assert path.stat().st_size < 10**6


def test_a_small_file_that_unpacks_to_very_much_is_not_read(tmp_path, monkeypatch, one_line):
    bomb(tmp_path / "own.npz", "x.npy")
    bomb(tmp_path / "model.pt", "archive/data/0")
    monkeypatch.setattr(np, "load", None)
    monkeypatch.setattr(torch, "load", None)
    for read, name in ((partial(read_npz, keys=["x"]), "own.npz"), (read_checkpoint, "model.pt")):
        assert "would unpack to 0.2 GB" in one_line(read, tmp_path / name)


@pytest.mark.parametrize("value", ["-1", str(2**32), "1.5", "one"])
@pytest.mark.parametrize("parser", [attack_flags, defence_flags])
def test_seeds_that_are_refused(parser, value, one_line):
    given = ["--ckpt", "x"] if parser is defence_flags else []
    assert "--seed" in one_line(parser("A script.").parse_args, [*given, "--seed", value])
    assert parser("A script.").parse_args([*given, "--seed", str(2**32 - 1)]).seed == 2**32 - 1


def test_missing_array_and_missing_file(tmp_path, one_line):
    np.savez(tmp_path / "half.npz", x_train=IMAGES, y_train=np.arange(4))
    message = one_line(load_dataset, str(tmp_path / "half.npz"), "data", "cpu")
    assert "x_test" in message and "y_test" in message
    assert "none.npz" in one_line(load_dataset, str(tmp_path / "none.npz"), "data", "cpu")
    for name in ("imagenet", "", "x" * 5000):
        assert "cifar10" in one_line(load_dataset, name, "data", "cpu")  # lists what it knows


class FakeTorchvision:
    """Stands in for torchvision's MNIST, CIFAR10 and CIFAR100: leaves raw files, counts calls."""

    calls, error = [], None

    def __init__(self, root, train=True, download=False):
        type(self).calls.append((root, train, download))
        with open(f"{root}/raw-{train}.tar.gz", "wb") as file:
            file.write(b"raw")
        if self.error and not train:
            raise self.error
        rng = np.random.default_rng(train)
        shape = (24 if train else 12, 28, 28) if self.grey else (24 if train else 12, 32, 32, 3)
        self.data = rng.integers(0, 256, shape, np.uint8)
        self.targets = list(np.arange(len(self.data)) % 10)
        if self.grey:  # torchvision's MNIST holds tensors, its CIFAR arrays and lists
            self.data, self.targets = torch.from_numpy(self.data), torch.tensor(self.targets)


@pytest.fixture
def torchvision(monkeypatch):
    """Replace torchvision's class for a dataset by a fresh stand-in, which is returned."""

    def replace(name, error=None):
        fields = {"calls": [], "error": error, "grey": name == "mnist"}
        stand_in = type("StandIn", (FakeTorchvision,), fields)
        monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", stand_in)
        return stand_in

    return replace


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_download_is_cached_once_and_whole(tmp_path, torchvision, name):
    stand_in = torchvision(name)
    folder = tmp_path / "new" / "data"
    first = load_dataset(name, folder, "cpu")
    assert files_below(tmp_path) == [f"{name}.npz"]  # neither raw files nor temporary ones
    assert [p.name for p in folder.iterdir()] == [f"{name}.npz"]
    again = load_dataset(name, folder, "cpu")
    assert [call[1:] for call in stand_in.calls] == [(True, True), (False, True)]
    original = stand_in(str(tmp_path), train=True)
    images = np.asarray(original.data).reshape(24, *first.shape[1:], -1)
    for data in (first, again):
        np.testing.assert_array_equal(data.x_train.permute(0, 2, 3, 1), images)
        np.testing.assert_array_equal(data.y_train, np.arange(24) % 10)
        assert data.spec == datasets.SPECS[name] and len(data.x_test) == 12


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), RuntimeError("File not found or corrupted")],
    ids=lambda error: type(error).__name__,
)
def test_failed_download_leaves_nothing(tmp_path, torchvision, error, one_line):
    torchvision("cifar10", error)
    message = one_line(load_dataset, "cifar10", tmp_path, "cpu")
    assert "cifar10.npz" in message and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted_caching_leaves_nothing(tmp_path, torchvision, monkeypatch, error):
    def half(path, **arrays):
        path.write_bytes(b"half")
        raise error

    torchvision("mnist")
    monkeypatch.setattr(np, "savez", half)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        load_dataset("mnist", tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == []


RED, GREEN = (200, 10, 30), (5, 160, 90)


@pytest.fixture
def gtsrb(monkeypatch):
    """Stand-ins for the GTSRB archive (a tiny one of the same layout) and the test split."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)

    def extract(url, root, *args, **kwargs):
        assert "GTSRB_Final_Training_Images" in url
        top = datasets.Path(root) / "GTSRB" / "Final_Training" / "Images"
        for label, images in ((0, [noise]), (1, [RED, GREEN])):
            folder = top / f"{label:05d}"
            folder.mkdir(parents=True)
            (folder / f"GT-{label:05d}.csv").write_text("Filename;Width;Height\n")
            for i, image in enumerate(images):
                picture = (
                    Image.new("RGB", (40, 27), image)
                    if isinstance(image, tuple)
                    else Image.fromarray(image)
                )
                picture.save(folder / f"00000_{i:05d}.ppm")

    def test_split(root, split, download):
        assert split == "test" and download
        return [(Image.new("RGB", (50, 60), GREEN), 1)]

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", extract)
    monkeypatch.setattr("torchvision.datasets.GTSRB", test_split)
    return SimpleNamespace(noise=noise, extract=extract)


def test_gtsrb_is_the_final_training_set_at_32_pixels(tmp_path, gtsrb):
    data = load_dataset("gtsrb", tmp_path, "cpu")
    assert data.x_train.shape == (3, 3, 32, 32) and data.y_train.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(data.x_train[0].permute(1, 2, 0), gtsrb.noise)
    assert data.x_train[1].flatten(1).unique(dim=1).flatten().tolist() == list(RED)
    assert data.x_test[0].flatten(1).unique(dim=1).flatten().tolist() == list(GREEN)
    assert files_below(tmp_path) == ["gtsrb.npz"]


@pytest.mark.parametrize(
    "error",
    [None, urllib.error.URLError("gone"), zipfile.BadZipFile("File is not a zip file")],
    ids=["empty archive", "unreachable", "not a zip"],
)
def test_failed_gtsrb_leaves_nothing(tmp_path, gtsrb, monkeypatch, error, one_line):
    def extract(url, root):
        gtsrb.extract(url, root)
        shutil.rmtree(root + "/GTSRB/Final_Training")
        if error:
            raise error

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", extract)
    one_line(load_dataset, "gtsrb", tmp_path, "cpu")
    assert list(tmp_path.iterdir()) == []


def test_rounding_to_8_bits_never_floors():
    levels = torch.arange(256)
    for shift, expected in ((0, 0), (0.4, 0), (-0.4, 0), (0.6, 1), (-0.6, -1)):
        values = to_uint8((levels + shift) / 255)
        assert values.dtype == torch.uint8
        np.testing.assert_array_equal(values, np.clip(levels.numpy() + expected, 0, 255))
    assert to_uint8(torch.tensor([-1.0, 1.7])).tolist() == [0, 255]
    everything = levels.to(torch.uint8)
    assert to_float(everything).dtype == torch.float32
    np.testing.assert_allclose(to_float(everything), np.arange(256) / 255, rtol=1e-6)
    assert torch.equal(to_uint8(to_float(everything)), everything)


def views(image, pad):
    """All crops of the zero-padded image: {(row, column, mirrored): array}."""
    c, h, w = image.shape
    large = np.zeros((c, h + 2 * pad, w + 2 * pad), np.float32)
    large[:, pad : pad + h, pad : pad + w] = image
    crops = {}
    for i in range(2 * pad + 1):
        for j in range(2 * pad + 1):
            crop = large[:, i : i + h, j : j + w]
            crops |= {(i, j, False): crop, (i, j, True): crop[:, :, ::-1]}
    return crops


@pytest.mark.parametrize(
    "pad, flip, shape", [(2, True, (3, 6, 9)), (1, False, (1, 8, 5)), (0, True, (1, 4, 4))]
)
def test_augment_draws_a_crop_and_a_mirror_per_image(pad, flip, shape):
    image = np.random.default_rng(0).random(shape).astype(np.float32) + 0.1
    batch = torch.from_numpy(image).expand(1500, *shape).clone()
    torch.manual_seed(0)
    out = augment(batch, pad, flip)
    assert out.shape == batch.shape and out.dtype == torch.float32
    assert torch.equal(batch, torch.from_numpy(image).expand_as(batch))  # the input is left alone
    counts = {
        key: int((out == torch.from_numpy(view.copy())).flatten(1).all(1).sum())
        for key, view in views(image, pad).items()
    }
    assert sum(counts.values()) == 1500  # every image is exactly one of the slices
    expected = 1500 / ((2 * pad + 1) ** 2 * (1 + flip))
    for (_, _, mirrored), count in counts.items():
        allowed = 0 if mirrored and not flip else expected
        assert abs(count - allowed) <= 6 * np.sqrt(allowed)


def test_augment_gives_each_image_its_own_pixels():
    batch = torch.arange(1, 65).view(64, 1, 1, 1) * torch.ones(1, 2, 5, 5)
    out = augment(batch, 2, True)
    assert all(set(out[i].unique().tolist()) <= {0, i + 1} for i in range(64))
    assert torch.equal(augment(batch, 0, False), batch)


@pytest.mark.parametrize(
    "fraction, counts", [(0.01, (1, 1, 10)), (0.1, (1, 10, 100)), (1, (3, 100, 1000))]
)
def test_defender_split_is_stratified(fraction, counts):
    y = torch.tensor([0] * 3 + [2] * 100 + [5] * 1000)[torch.randperm(1103)]
    index = defender_split(y, fraction, seed=4)
    assert index.dtype == torch.int64 and len(index.unique()) == len(index)
    assert torch.equal(index, index.sort().values)
    assert np.bincount(y[index], minlength=6)[[0, 2, 5]].tolist() == list(counts)


def test_defender_split_is_the_same_for_every_defence():
    y = torch.arange(500) % 10
    torch.manual_seed(1)
    first = defender_split(y, 0.1, seed=0)
    state = torch.random.get_rng_state()
    assert torch.equal(defender_split(y, 0.1, seed=0), first)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is not touched
    assert not torch.equal(defender_split(y, 0.1, seed=1), first)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_defender_split_refuses(fraction, one_line):
    one_line(defender_split, torch.arange(10), fraction, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, None])
def test_written_whole_keeps_the_old_file_until_the_new_one_is_complete(tmp_path, error):
    path = tmp_path / "result.json"
    path.write_text("old")

    def write():
        with written_whole(path) as temporary:
            assert temporary.parent == tmp_path and temporary.suffix == ".json"
            temporary.write_text("new")
            if error:
                raise error

    if error:
        with pytest.raises(error):
            write()
    else:
        write()
    assert path.read_text() == ("old" if error else "new")
    assert files_below(tmp_path) == ["result.json"]


def test_make_folder_leaves_what_is_there(tmp_path):
    for name in ("probe", "model.pt"):
        (tmp_path / name).write_text("mine")
    make_folder(tmp_path)
    assert files_below(tmp_path) == ["model.pt", "probe"]


@pytest.mark.parametrize("name", ["abacus", "cuda:99", "cpu:x"])
def test_unknown_device(name, one_line):
    assert name in one_line(datasets.pick_device, name)


@pytest.mark.parametrize("kind", [torch.float32, torch.int64, torch.int16])
def test_only_uint8_becomes_floats(kind):
    """Floats in [0,1] over 255 would be black images, and every figure on them wrong."""
    with pytest.raises(TypeError, match="uint8"):
        to_float(torch.ones(2, 1, 4, 4, dtype=kind))
    assert to_float(torch.full((1,), 255, dtype=torch.uint8)) == 1


def test_a_picture_is_no_archive_and_no_advice_to_unpickle_it(one_line, tmp_path):
    """NumPy's own words name allow_pickle and pickle.load."""
    (tmp_path / "a.npz").write_bytes(b"\x89PNG\r\n" + bytes(100))
    message = one_line(read_npz, tmp_path / "a.npz", ["x"])
    assert message.endswith("is not a plain .npz file: it is no zip archive of arrays\n")


def test_classes_that_few_images_do_not_show(tmp_path):
    """--classes speaks for labels that training or test images lack, to audit with a few images."""
    y = np.arange(30) % 10 * 20 + 19  # up to 199
    few = write_npz(tmp_path / "few.npz", y_train=y, y_test=y)
    assert load_dataset(str(few), "data", "cpu", classes=200).classes == 200
    y = np.arange(30) % 9
    unequal = write_npz(tmp_path / "unequal.npz", y_train=y, y_test=np.arange(30) % 10)
    assert load_dataset(str(unequal), "data", "cpu", classes=10).classes == 10


@pytest.mark.parametrize("classes", [None, 199])
def test_labels_beyond_the_classes(tmp_path, one_line, classes):
    y = np.arange(30) % 10 * 20 + 19
    few = write_npz(tmp_path / "few.npz", y_train=y, y_test=y)
    assert "199" in one_line(load_dataset, str(few), "data", "cpu", classes=classes)
    low = write_npz(tmp_path / "low.npz", y_train=y % 9, y_test=y)
    assert "199" in one_line(load_dataset, str(low), "data", "cpu", classes=classes)


def test_a_slash_at_the_end_of_a_folder_changes_nothing(tmp_path, monkeypatch):
    """A shell's completion writes it. A folder that is called like a data set keeps it."""
    monkeypatch.chdir(tmp_path)
    for name in ("own", "digits"):
        for label in ("a", "b"):
            (tmp_path / name / label).mkdir(parents=True)
            for k in range(5):
                Image.new("L", (8, 8), 30 * k).save(tmp_path / name / label / f"{k}.png")
    assert {load_dataset(f"own{end}", "data", "cpu").name for end in ("", "/", "//")} == {"own"}
    assert load_dataset("digits/", "data", "cpu").name == "digits/"
    assert load_dataset("digits", "data", "cpu").classes == 10


def test_no_class_loses_its_only_image_to_the_check():
    """A repair that never saw a class would forget it, and its check would hardly notice."""
    y = torch.tensor([0] * 10 + [1] + [2] * 2)
    for seed in range(5):
        kept = datasets.kept_back(y, 0.2, seed)
        assert [int(kept[y == k].sum()) for k in range(3)] == [2, 0, 1]
    assert datasets.kept_back(torch.arange(6), 0.2, 0).all()  # then there is nothing to train on
