"""Networks and images that this project did not make: FILE.py:NAME, folders, public files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, loaded, result_of, write_npz
from PIL import Image
from torch import nn

from common.checkpoint import read_checkpoint
from common.datasets import load_dataset
from common.models import Classifier, build_model

NETS = """
import torch
from torch import nn

class Plain(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes))

def ten():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

def soft(num_classes=10):
    return nn.Sequential(*Plain(num_classes), nn.Softmax(1))

class Several(Plain):
    def forward(self, x):
        return x, super().forward(x)

class Feature(Plain):
    def forward(self, x):
        return super().forward(x)[None]

class Raises(nn.Module):
    def __init__(self):
        raise OSError("two\\nlines")

class Chokes(Plain):
    def forward(self, x):
        raise ValueError("no")

def number():
    return 7

value = 3
open("it ran", "a").close()
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A user's FILE.py in the working directory, and a state dict that fits its networks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    state = {"1.weight": torch.randn(10, 784) / 28, "1.bias": torch.randn(10)}
    torch.save({"net": state, "acc": 0.5}, tmp_path / "suspect.pth")
    return state


@pytest.mark.parametrize("name", ["Plain", "ten", "Several", "soft"])
def test_users_network_gives_its_scores(nets, name, capsys):
    """Called with num_classes= where it takes it; several outputs; a softmax."""
    model = loaded("suspect.pth", arch=f"nets.py:{name}", dataset="digits").model
    x = torch.rand(50, 1, 28, 28)
    logits = ((x - 0.5) / 0.5).flatten(1) @ nets["1.weight"].T + nets["1.bias"]
    expected = logits.log_softmax(1) if name == "soft" else logits
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert model.softmax == (name == "soft") == ("softmax" in capsys.readouterr().out)


def test_logarithm_of_a_softmax_has_the_gradient_of_the_logits(nets):
    """Cross-entropy of probabilities would hardly have any."""
    x = torch.rand(20, 1, 28, 28)
    grads = []
    for name in ("ten", "soft"):
        model = loaded("suspect.pth", arch=f"nets.py:{name}", dataset="digits").model
        image = x.clone().requires_grad_()
        F.cross_entropy(model(image), torch.arange(20) % 10).backward()
        grads.append(image.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(
    "arch, named",
    [
        ("nowhere.py:Net", "nowhere.py"),
        ("nets.py:Absent", "Absent"),
        ("nets.py:Raises", "two lines"),
        ("nets.py:number", "int"),
        ("nets.py:value", "value"),
        ("nets.py:Chokes", "does not take"),
        ("nets.py:Feature", "--classes"),
        ("torchvision:nothing", "nothing"),
        ("torchvision:resnet18", "does not fit"),
        (":", "--arch"),
    ],
)
def test_networks_that_are_none(nets, one_line, arch, named):
    assert named in one_line(loaded, "suspect.pth", arch=arch, dataset="digits")


def test_a_network_of_torchvision(tmp_path):
    made = build_model("torchvision:resnet18", 7, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).net
    torch.save(made.state_dict(), tmp_path / "suspect.pth")
    write_npz(tmp_path / "own.npz", (32, 32, 3), 7)
    flags = {"arch": "torchvision:resnet18", "dataset": str(tmp_path / "own.npz")}
    model = loaded(tmp_path / "suspect.pth", **flags).model
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model(x), made.eval()((x - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


def test_a_checkpoint_alone_runs_no_code(nets, inline, unread, one_line, tmp_path):
    """A repaired model names FILE.py, but only --arch on the command line runs it."""
    own = "--arch", "nets.py:soft"
    flags = "--ckpt", "suspect.pth", *own, "--dataset", "digits", "--rule", "index"
    ran = inline("nc", *flags, "--threshold", 1e-6, "--steps", 30, "--batches", 1, "--out", "audit")
    assert ran["metrics"]["flagged"] and (tmp_path / "audit" / "model.pt").exists()
    (tmp_path / "it ran").unlink()
    assert "--arch nets.py:soft" in one_line(loaded, "audit")
    assert not (tmp_path / "it ran").exists()
    model = loaded("audit", arch="nets.py:soft").model
    assert model.softmax and (tmp_path / "it ran").exists()
    assert read_checkpoint(tmp_path / "audit" / "model.pt")["arch"] == "nets.py:soft"


def test_an_attack_beside_the_clean_network_of_ones_own(nets, inline, tmp_path):
    """The control is found and loaded, for --arch names its code."""
    flags = "--arch", "nets.py:ten", "--epochs", 1, "--train-images", 300
    inline("clean", *flags)
    ran = inline("badnets", *flags, "--rate", 0.2)
    assert "asr_on_clean_model" in ran["metrics"]


@pytest.mark.parametrize("key", ["net", "netC", "state_dict", "model", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_ways_to_save_a_state_dict(nets, tmp_path, key, zipped):
    """The format of torch before 1.6 too."""
    saved = {f"module.{k}": v for k, v in nets.items()}
    saved = {key: saved, "epoch": 3, "optimizer": {"lr": 0.1}} if key else saved
    torch.save(saved, tmp_path / "x.tar", _use_new_zipfile_serialization=zipped)
    model = loaded("x.tar", arch="nets.py:ten", dataset="digits").model
    assert torch.equal(model.net[1].weight, nets["1.weight"])


# ===== Classes that the images do not show =====


def test_more_classes_than_the_images_show(tmp_path, one_line):
    write_npz(tmp_path / "own.npz", classes=6)
    flags = {"arch": "mnist_cnn", "dataset": str(tmp_path / "own.npz")}
    model = build_model("mnist_cnn", 9, (1, 28, 28), (0.5,), (0.5,))
    torch.save(model.net.state_dict(), tmp_path / "x.pt")
    assert "does not fit" in one_line(loaded, tmp_path / "x.pt", **flags)
    victim = loaded(tmp_path / "x.pt", **flags, classes=9)
    assert victim.data.classes == 9 and victim.model(torch.rand(2, 1, 28, 28)).shape == (2, 9)
    for few in (5, 0, -1):
        assert "--classes" in one_line(loaded, tmp_path / "x.pt", **flags, classes=few)


# ===== Networks of the papers =====


def test_networks_of_the_papers():
    """Parameters as counted in the papers' code; the names of ABL's and NAD's."""
    made = {
        name: build_model(name, classes, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).net
        for name, classes in (("wrn16_1", 10), ("nc_gtsrb_cnn", 43))
    }
    count = {name: sum(p.numel() for p in net.parameters()) for name, net in made.items()}
    assert count == {"wrn16_1": 175_066, "nc_gtsrb_cnn": 571_723}
    names = set(made["wrn16_1"].state_dict())
    assert {"block1.layer.0.bn1.weight", "block2.layer.0.convShortcut.weight", "fc.bias"} <= names


# ===== Images =====


def pictures(root, classes=("cat", "dog", "emu"), count=5, mode="RGB", size=(40, 30)):
    """A folder by class; the brightness tells the class."""
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            value = 40 * k + i
            Image.new(mode, size, value if mode == "L" else (value, 255 - value, 7)).save(
                root / name / f"{i}.png"
            )


def test_a_folder_by_class(tmp_path):
    pictures(tmp_path / "own")
    data = load_dataset(str(tmp_path / "own"), "data", "cpu", 16)
    assert data.shape == (3, 16, 16) and data.classes == 3
    assert data.y_train.bincount().tolist() == [4, 4, 4] and data.y_test.tolist().count(1) == 1
    x, y = torch.cat((data.x_train, data.x_test)), torch.cat((data.y_train, data.y_test))
    assert (x[:, 0, 0, 0] // 40 == y).all() and (x[:, 2] == 7).all()
    assert len(x[:, 0, 0, 0].unique()) == 15  # no picture on both sides
    again = load_dataset(str(tmp_path / "own"), "data", "cpu", 16)
    assert torch.equal(again.x_test, data.x_test)


def test_a_folder_with_its_own_split_and_grey_pictures(tmp_path):
    pictures(tmp_path / "own" / "train", mode="L")
    pictures(tmp_path / "own" / "test", mode="L", count=2)
    data = load_dataset(str(tmp_path / "own"), "data", "cpu")
    assert data.shape == (1, 32, 32) and len(data.x_train) == 15 and len(data.x_test) == 6
    assert data.x_test[:, 0, 5, 5].tolist() == [0, 1, 40, 41, 80, 81]


def test_resizing_is_bilinear(tmp_path):
    pictures(tmp_path / "own", count=2)
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[:, None, None], (1, 64, 3))
    Image.fromarray(ramp).save(tmp_path / "own" / "cat" / "0.png")
    data = load_dataset(str(tmp_path / "own"), "data", "cpu", 32)
    x = torch.cat((data.x_train, data.x_test))
    (found,) = [image for image in x if image[0].float().std() > 20]
    middle = found[0, 4:-4, 16].diff().float()
    assert (middle == 8).all()


def spoil_picture(root):
    (root / "dog" / "3.png").write_bytes((root / "dog" / "3.png").read_bytes()[:60])


def four_channels(root):
    Image.new("RGBA", (8, 8)).save(root / "dog" / "3.png")


def empty_class(root):
    (root / "fox").mkdir()


def single(root):
    (root / "fox").mkdir()
    Image.new("RGB", (8, 8)).save(root / "fox" / "0.png")


def no_test(root):
    (root / "train").mkdir()
    for name in ("cat", "dog", "emu"):
        (root / name).rename(root / "train" / name)


def other_test(root):
    no_test(root)
    pictures(root / "test", classes=("cat", "dog", "owl"))


@pytest.mark.parametrize(
    "spoil, named",
    [
        (spoil_picture, "3.png"),
        (four_channels, "RGBA"),
        (empty_class, "fox"),
        (single, "split off"),
        (no_test, "test"),
        (other_test, "owl"),
    ],
)
@pytest.mark.parametrize("script", ["badnets", "nc"])
def test_bad_folders(inline, one_line, tmp_path, nets, script, spoil, named):
    pictures(tmp_path / "own")
    spoil(tmp_path / "own")
    suspect = "--ckpt", "suspect.pth", "--arch", "mnist_cnn"
    flags = suspect if script == "nc" else SHORT["badnets"]
    assert named in one_line(inline, script, *flags, "--dataset", "own")
    assert not (tmp_path / "runs").exists() and not (tmp_path / "suspect").exists()


def test_an_npz_of_x_and_y_alone(tmp_path, one_line):
    x = np.arange(40, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(40) % 4)
    data = load_dataset(str(tmp_path / "own.npz"), "data", "cpu")
    assert len(data.x_train) == 32 and data.y_test.bincount().tolist() == [2] * 4
    both = torch.cat((data.x_train, data.x_test))[:, 0, 0, 0]
    assert both.sort().values.tolist() == list(range(40))
    assert (both % 4 == torch.cat((data.y_train, data.y_test))).all()
    np.savez(tmp_path / "own.npz", x=x.astype(float), y=np.arange(40) % 4)
    assert "uint8" in one_line(load_dataset, str(tmp_path / "own.npz"), "data", "cpu")
    np.savez(tmp_path / "own.npz", x=x, y=np.arange(40))
    assert "split off" in one_line(load_dataset, str(tmp_path / "own.npz"), "data", "cpu")


def test_an_attack_and_a_defence_on_a_folder(inline, unread, tmp_path):
    """The defence finds the side of the images in the checkpoint."""
    pictures(tmp_path / "own", classes=[f"class {k}" for k in range(6)], count=10)
    flags = "--dataset", "own", "--image-size", 24, "--arch", "mnist_cnn", "--out", "victim"
    inline("badnets", "--epochs", 1, "--batch-size", 8, "--rate", 0.2, *flags)
    inline("nc", "--ckpt", "victim", *SHORT["nc"])
    assert len(result_of(tmp_path / "victim" / "nc-s0")["metrics"]["norms"]) == 6


def test_a_classifier_takes_the_last_of_several_outputs():
    class Several(nn.Module):
        def forward(self, x):
            return [x.flatten(1), x.flatten(1).sum(1, keepdim=True)]

    x = torch.rand(3, 1, 4, 4)
    assert Classifier(Several(), (0.0,), (1.0,))(x).shape == (3, 1)
