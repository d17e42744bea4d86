"""Networks and images that this project did not make: FILE.py:NAME, folders, public files."""

import argparse
import copy
import os
import struct
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, loaded, result_of, write_npz
from PIL import Image
from torch import nn

from common.checkpoint import fingerprint, read_checkpoint, save_model
from common.datasets import load_dataset, load_pictures, to_float
from common.models import Classifier, build_model, is_map, logit_layer
from methods.blend import picture_pattern

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

class Squeezed(Plain):
    def forward(self, x):
        return super().forward(x).squeeze()

class TrainPair(Plain):
    def forward(self, x):
        scores = super().forward(x)
        return (scores, 2 * scores) if self.training else scores

class TrainDict(Plain):
    def forward(self, x):
        scores = super().forward(x)
        return {"scores": scores} if self.training else scores

class TrainRaw(Plain):
    def forward(self, x):
        scores = super().forward(x)
        return scores if self.training else scores.softmax(1)

class TrainFeature(Plain):
    def forward(self, x):
        return x.flatten(1) if self.training else super().forward(x)

class Mixed(Plain):
    def forward(self, x):
        scores = super().forward(x)
        return (scores - scores.mean(0)) / (scores - scores.mean(0)).norm(dim=0)

class Dropped(Plain):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.2)

class Inference(Plain):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)

class Keeps(Plain):
    def forward(self, x):
        self.scores = super().forward(x)
        return self.scores

def traced():
    return torch.jit.trace(ten(), torch.zeros(1, 1, 28, 28))

class Extra(Plain):
    def get_extra_state(self):
        return {"made": "here"}

    def set_extra_state(self, state):
        pass

class Wrapped(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.module = Plain(num_classes)

    def forward(self, x):
        return self.module(x)

class Double(Plain):
    def forward(self, x):
        return super().forward(x.double())

def double(num_classes=10):
    return Double(num_classes).double()

class Views(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Linear(4 * 784, num_classes)

    def forward(self, x):
        return self.last(self.conv(x).view(x.size(0), -1))

class Lazy(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(num_classes))

class Key(nn.Module):
    def __init__(self):
        raise KeyError("HOME_OF_DATA")

class Quits(Plain):
    def forward(self, x):
        raise SystemExit(0)

class Pair(Plain):
    def forward(self, x):
        return {"scores": super().forward(x)}

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
    (tmp_path / "code.txt").write_text(NETS)
    (tmp_path / "quits.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "folder.py" / "__main__.py").write_text(NETS)
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
        ("nets.py:Key", "HOME_OF_DATA"),
        ("nets.py:Quits", "does not take"),
        ("nets.py:Pair", "gives dict"),
        ("quits.py:Net", "SystemExit"),
        ("code.txt:ten", "no such file of Python code"),
        ("folder.py:ten", "no such file of Python code"),
        ("nets.py:number", "int"),
        ("nets.py:value", "value"),
        ("nets.py:Chokes", "does not take"),
        ("nets.py:Feature", "--classes"),
        ("nets.py:Squeezed", "single image"),
        ("nets.py:TrainPair", "training mode"),
        ("nets.py:TrainDict", "training mode"),
        ("nets.py:TrainRaw", "training mode"),
        ("nets.py:TrainFeature", "training mode"),
        ("nets.py:Mixed", "by the batch or by chance"),
        ("nets.py:Dropped", "by the batch or by chance"),
        ("nets.py:traced", "plain torch.nn.Module"),
        ("torchvision:nothing", "nothing"),
        ("torchvision:resnet18", "does not fit"),
        (":", "--arch"),
    ],
)
def test_networks_that_are_none(nets, one_line, arch, named):
    assert named in one_line(loaded, "suspect.pth", arch=arch, dataset="digits")


def test_a_network_without_gradients(nets, inline, unread, one_line, tmp_path):
    """As one whose forward is under no_grad: it can be filtered and superimposed, not searched."""
    flags = "--ckpt", "suspect.pth", "--arch", "nets.py:Inference", "--dataset", "digits"
    for name in ("strip", "purify"):
        inline(name, *flags, *SHORT[name], "--out", name)
        assert (tmp_path / name / "result.json").exists()
    for name in ("nc", "finetune", "gradcam"):
        assert "no gradient" in one_line(inline, name, *flags, "--out", name)
        assert not (tmp_path / name).exists()
    keeps = "--ckpt", "suspect.pth", "--arch", "nets.py:Keeps", "--dataset", "digits"
    inline("finetune", *keeps, *SHORT["finetune"], "--out", "tuned")  # of a copy, without a graph
    own = "--dataset", "digits", "--arch", "nets.py:Inference", "--out", "badnets"
    assert "no gradient" in one_line(inline, "badnets", *own)


@pytest.mark.parametrize("name", ["Extra", "Wrapped", "double", "Keeps"])
def test_unusual_networks_that_are_read(nets, name):
    """State that is no tensor, an attribute called module, 64 bits, an activation that is kept."""
    prefix, extra = {"Wrapped": ("module.", {}), "Extra": ("", {"_extra_state": {"a": 1}})}.get(
        name, ("", {})
    )
    torch.save({prefix + key: value for key, value in nets.items()} | extra, "own.pth")
    model = loaded("own.pth", arch=f"nets.py:{name}", dataset="digits").model
    model, x = copy.deepcopy(model), torch.rand(5, 1, 28, 28)
    expected = F.linear((x.flatten(1) - 0.5) / 0.5, nets["1.weight"], nets["1.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert logit_layer(model, x, name) == f"net.{prefix}1"


def test_a_network_of_torchvision(tmp_path):
    made = build_model("torchvision:resnet18", 7, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).net
    torch.save(made.state_dict(), tmp_path / "suspect.pth")
    write_npz(tmp_path / "own.npz", (32, 32, 3), 7)
    flags = {"arch": "torchvision:resnet18", "dataset": str(tmp_path / "own.npz")}
    model = loaded(tmp_path / "suspect.pth", **flags).model
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(model(x), made.eval()((x - 0.5) / 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "fcn_resnet50", "r3d_18"])
def test_a_checkpoint_alone_downloads_nothing(tmp_path, monkeypatch, one_line, name):
    """torchvision's detection and segmentation networks load a backbone unless told otherwise."""
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *given: pytest.fail("download"))
    held = {"format": 1, "arch": f"torchvision:{name}", "classes": 10, "image_shape": [1, 28, 28]}
    held |= {"mean": [0.5], "std": [0.5], "state_dict": {}, "dataset": "digits"}
    torch.save(held, tmp_path / "hostile.pt")
    assert "no classifier of torchvision" in one_line(loaded, tmp_path / "hostile.pt")


def test_a_checkpoint_alone_runs_no_code(nets, inline, unread, one_line, tmp_path):
    """A repaired model names FILE.py, but only --arch on the command line runs it."""
    own = "--arch", "nets.py:soft"
    flags = "--ckpt", "suspect.pth", *own, "--dataset", "digits", "--rule", "index"
    ran = inline(
        "nc", *flags, "--threshold", 1e-6, "--steps", 200, "--batches", 1, "--out", "audit"
    )
    assert ran["metrics"]["flagged"] and (tmp_path / "audit" / "model.pt").exists()
    (tmp_path / "it ran").unlink()
    assert "--arch nets.py:soft" in one_line(loaded, "audit")
    assert not (tmp_path / "it ran").exists()
    model = loaded("audit", arch="nets.py:soft").model
    assert model.softmax and (tmp_path / "it ran").exists()
    assert read_checkpoint(tmp_path / "audit" / "model.pt")["arch"] == "nets.py:soft"


@pytest.mark.parametrize(
    "arch", ["code.txt:ten", "folder.py:ten", "torchvision:code.txt:ten", "nets.PY:ten", "x:y:z"]
)
def test_no_name_in_a_checkpoint_runs_code(nets, one_line, tmp_path, arch):
    """Only the names of common/models.py and torchvision:NAME are made without --arch."""
    (tmp_path / "nets.PY").write_text(NETS)
    model = build_model("nets.py:ten", 10, (1, 28, 28), (0.5,), (0.5,))
    held = {"format": 1, "arch": arch, "classes": 10, "image_shape": [1, 28, 28], "mean": [0.5]}
    held |= {"std": [0.5], "state_dict": model.state_dict(), "dataset": "digits"}
    torch.save(held, tmp_path / "hostile.pt")
    (tmp_path / "it ran").unlink()
    assert "needs code of yours" in one_line(loaded, "hostile.pt")
    assert not (tmp_path / "it ran").exists()


def test_a_network_that_views_its_activations(nets, inline, tmp_path):
    """view() needs the plain strides, which neither channels_last nor a crop has."""
    write_npz(tmp_path / "own.npz", count=60)
    flags = "--arch", "nets.py:Views", "--dataset", "own.npz", "--batch-size", 10
    inline("clean", *flags, "--epochs", 1, "--out", "clean")
    flags = "--ckpt", "clean", "--arch", "nets.py:Views", "--data-fraction", 0.5
    inline("finetune", *flags, *SHORT["finetune"], "--out", "tuned")
    assert loaded("tuned", arch="nets.py:Views").model.net.last.weight.shape == (3, 3136)


@pytest.mark.parametrize(
    "name, named",
    [("Several", ""), ("Pair", "gives dict"), ("Quits", "take"), ("TrainPair", "training mode")],
)
def test_an_attack_on_a_network_without_scores(nets, inline, one_line, tmp_path, name, named):
    """It is refused before the training."""
    flags = "--arch", f"nets.py:{name}", *SHORT["badnets"], "--out", "victim"
    if named:
        assert named in one_line(inline, "badnets", *flags)
        assert not (tmp_path / "victim").exists()
    else:
        ran = inline("badnets", *flags)  # of several outputs the last one counts
        model, x = ran["model"].eval(), to_float(ran["data"].x_test)
        weight, bias = model.net[1].parameters()
        with torch.no_grad():
            torch.testing.assert_close(model(x), F.linear(2 * x.flatten(1) - 1, weight, bias))
            right = (model(x).argmax(1) == ran["data"].y_test).double().mean().item()
        assert ran["metrics"]["clean_accuracy"] == pytest.approx(100 * right, abs=1e-4)


@pytest.mark.parametrize("name", ["trojannn", "stealthy_adversarial"])
def test_an_attack_copies_a_network_that_keeps_its_activations(nets, inline, name):
    """After a training step what it keeps has a history, which deepcopy refuses."""
    ran = inline(name, "--arch", "nets.py:Keeps", *SHORT[name], "--out", "victim")
    assert ran["model"].net.scores.shape[1] == 10


def test_an_attack_and_abl_know_of_a_softmax(nets, inline, tmp_path):
    """Trained on cross-entropy of probabilities, such a network would hardly learn."""
    flags = "--arch", "nets.py:soft", "--epochs", 8, "--lr", 0.1, "--out", "victim"
    ran = inline("badnets", *flags, "--rate", 0.2)
    assert ran["model"].softmax and ran["metrics"]["clean_accuracy"] > 80
    flags = "--ckpt", "victim", "--arch", "nets.py:soft", "--epochs", 2, "--isolation-epochs", 1
    ran = inline("abl", *flags, "--out", "abl")
    assert ran["model"].softmax


@pytest.fixture
def soft_victim(nets, inline):
    """A BadNets victim of one linear layer and a softmax; the flags of a defence."""
    flags = "--arch", "nets.py:soft"
    inline("badnets", *flags, "--epochs", 8, "--lr", 0.1, "--rate", 0.2, "--out", "victim")
    return "--ckpt", "victim", *flags, "--out", "out"


def test_fine_pruning_prunes_what_enters_the_last_layer_of_any_network(soft_victim, inline):
    """Here these are the pixels, normalised; the idle ones are grey on average."""
    ran = inline("fine_pruning", *soft_victim, "--mode", "prune", "--max-drop", 1)
    metrics, weight = ran["metrics"], ran["pruned"].net[1].weight
    assert metrics["layer"] == "1" and metrics["channels"] == 784 and metrics["pruned"] > 50
    pixels = ran["x_clean"][~ran["held"]].double().flatten(1) / 255
    order = (2 * pixels - 1).abs().mean(0).argsort(stable=True)[: metrics["pruned"]]
    assert (weight == 0).all(0).nonzero()[:, 0].tolist() == sorted(order.tolist())
    assert metrics["clean_accuracy_repaired"] > metrics["clean_accuracy"] - 5


@pytest.mark.parametrize("script, epochs", [("fine_pruning", 1), ("mcr", 2)])
def test_a_large_share_gets_fewer_epochs(soft_victim, inline, script, epochs):
    """1,150 images in batches of 2 are 575 steps an epoch, of 640 or 1,250 at most."""
    flags = "--data-fraction", 1, "--batch-size", 2, "--lr", 0.001
    ran = inline(script, *soft_victim, *flags)
    assert ran["recipe"]["epochs"] == epochs == result_of("out")["arguments"]["epochs"]


def test_the_last_linear_layer_before_a_softmax(nets):
    model = loaded("suspect.pth", arch="nets.py:soft", dataset="digits").model
    assert logit_layer(model, torch.rand(5, 1, 28, 28), "soft") == "net.1"


@pytest.mark.parametrize("softmax", [True, False])
def test_the_last_linear_layer_of_a_network_that_is_sure_or_ends_in_a_log_softmax(softmax):
    """Probabilities below 1e-30 count as that; a log-softmax shifts the logits."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    net.append(nn.Softmax(1) if softmax else nn.LogSoftmax(1))
    net[3].weight.data *= 3000
    model, x = Classifier(net, (0.5,), (0.5,)), torch.rand(5, 1, 4, 4)
    model.softmax = softmax
    assert model(x).min() < -69
    assert logit_layer(model, x, "own") == "net.3"


def test_a_file_may_import_its_neighbours(nets, tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "cleandoor_blocks.py").write_text("from torch import nn\nlast = nn.Linear")
    text = "from cleandoor_blocks import last\nfrom torch import nn\n"
    text += "def net(): return nn.Sequential(nn.Flatten(), last(784, 10))"
    (tmp_path / "pack" / "net.py").write_text(text)
    model = loaded("suspect.pth", arch="pack/net.py:net", dataset="digits").model
    assert torch.equal(model.net[1].weight, nets["1.weight"])


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


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: (state, 7),
        lambda state: [3, state],
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model": {"lr": 1}, "state_dict": state},
        lambda state: {"model_state_dict": state, "optimizer": {"state": state}},
        lambda state: ({"net": {"model": state}},),
    ],
)
def test_nested_ways_to_save_a_state_dict(nets, tmp_path, wrap):
    torch.save(wrap(nets), tmp_path / "x.pt")
    model = loaded("x.pt", arch="nets.py:ten", dataset="digits").model
    assert torch.equal(model.net[1].weight, nets["1.weight"])


def test_a_file_that_holds_itself(nets, one_line, tmp_path):
    held = {}
    held["model"] = held
    torch.save(held, tmp_path / "x.pt")
    assert "does not fit" in one_line(loaded, "x.pt", arch="nets.py:ten", dataset="digits")


def test_a_misfit_is_short_and_says_what_to_try(one_line, tmp_path):
    torch.save(
        build_model("resnet18", 10, (1, 28, 28), (0.5,), (0.5,)).state_dict(), tmp_path / "x.pt"
    )
    message = one_line(loaded, tmp_path / "x.pt", arch="torchvision:resnet18", dataset="digits")
    assert len(message) < 340 + len(str(tmp_path)) and "[...]" in message
    assert "torchvision:NAME" in message and "--classes" in message


# ===== Classes that the images do not show =====


def test_more_classes_than_the_images_show(tmp_path, one_line):
    write_npz(tmp_path / "own.npz", classes=6)
    flags = {"arch": "mnist_cnn", "dataset": str(tmp_path / "own.npz")}
    model = build_model("mnist_cnn", 9, (1, 28, 28), (0.5,), (0.5,))
    torch.save(model.net.state_dict(), tmp_path / "x.pt")
    assert "does not fit" in one_line(loaded, tmp_path / "x.pt", **flags)
    victim = loaded(tmp_path / "x.pt", **flags, classes=9)
    assert victim.data.classes == 9 and victim.model(torch.rand(2, 1, 28, 28)).shape == (2, 9)
    save_model(tmp_path, victim.model, victim.data, "mnist_cnn", argparse.Namespace(), {})
    again = loaded(tmp_path / "model.pt")  # the file keeps the number
    assert again.data.classes == 9
    for few in (5, 0, -1):
        assert f"{few} classes" in one_line(loaded, tmp_path / "x.pt", **flags, classes=few)


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


def test_labels_follow_the_names_as_text_and_are_told(tmp_path, capfd):
    pictures(tmp_path / "own")
    for new, old in zip(("10", "3", "9"), sorted((tmp_path / "own").iterdir())):
        old.rename(tmp_path / "own" / new)
    load_dataset(str(tmp_path / "own"), "data", "cpu", 16)
    assert "classes: 0 10, 1 3, 2 9\n" in capfd.readouterr().out


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


def damaged_ppm(root):
    (root / "dog" / "3.ppm").write_bytes(b"P6 8 x8 255 ")


def huge(root):
    """A picture of 400 million pixels, as its head says."""
    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"0" * 99)))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    (root / "dog" / "3.png").write_bytes(data)


def postscript(root):
    """Pillow gives it to Ghostscript, whatever its name ends in."""
    body = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (root / "dog" / "3.png").write_text(body)


def test_a_picture_runs_no_program(tmp_path, monkeypatch, one_line):
    pictures(tmp_path / "own")
    postscript(tmp_path / "own")
    stub = tmp_path / "gs"
    stub.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)  # where it was sought
    path = tmp_path / "own" / "dog" / "3.png"
    assert "3.png" in one_line(load_dataset, str(tmp_path / "own"), "data", "cpu")
    assert "3.png" in one_line(load_pictures, path.parent, (3, 8, 8))
    assert "3.png" in one_line(picture_pattern, path, (3, 8, 8))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "spoil, named",
    [
        (spoil_picture, "3.png"),
        (damaged_ppm, "3.ppm"),
        (huge, "3.png"),
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


def test_a_network_of_colours_sees_grey_pictures(tmp_path, one_line):
    """Three values of --mean say that it takes RGB."""
    pictures(tmp_path / "own", mode="L")
    model = build_model("mnist_cnn", 3, (3, 16, 16), (0.5,) * 3, (0.5,) * 3)
    torch.save(model.net.state_dict(), tmp_path / "x.pt")
    flags = {"arch": "mnist_cnn", "dataset": str(tmp_path / "own"), "image_size": 16}
    assert "does not fit" in one_line(loaded, tmp_path / "x.pt", **flags, mean=[0.5], std=[0.5])
    victim = loaded(tmp_path / "x.pt", **flags, mean=[0.5] * 3, std=[0.5] * 3)
    assert victim.data.shape == (3, 16, 16) and victim.data.x_test.shape[1] == 3
    assert torch.equal(victim.data.x_train[:, 0], victim.data.x_train[:, 2])
    args = argparse.Namespace(dataset=flags["dataset"], image_size=16)
    save_model(tmp_path, victim.model, victim.data, "mnist_cnn", args, {})
    again = loaded(tmp_path / "model.pt")  # as a repair is saved
    assert again.data.shape == (3, 16, 16)


def test_abl_takes_the_normalisation_of_the_network(tmp_path, inline, unread):
    """Grey images and an own set of such, for a network of colours."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (60, 16, 16), dtype=np.uint8), np.arange(60) % 3
    x[:] = (x // 8) + (80 * y[:, None, None])  # bright as its label
    np.savez(tmp_path / "own.npz", x=x, y=y)
    model = build_model("mnist_cnn", 3, (3, 16, 16), (0.2, 0.4, 0.6), (0.5,) * 3)
    torch.save(model.net.state_dict(), tmp_path / "x.pt")
    flags = "--ckpt", "x.pt", "--arch", "mnist_cnn", "--dataset", "own.npz", "--out", "abl"
    numbers = "--mean", 0.2, 0.4, 0.6, "--std", 0.5, 0.5, 0.5
    monkeyed = "--train-set", "own.npz", "--epochs", 1, "--isolation-epochs", 1
    ran = inline("abl", *flags, *numbers, *monkeyed, "--isolation", 0.1)
    assert ran["x_train"].shape == (60, 3, 16, 16)
    assert torch.allclose(ran["repaired"].mean.flatten(), torch.tensor((0.2, 0.4, 0.6)))


@pytest.mark.parametrize("side", [0, -5, 1025, 10**6])
@pytest.mark.parametrize("script", ["badnets", "nc"])
def test_sides_out_of_range(inline, one_line, nets, tmp_path, script, side):
    pictures(tmp_path / "own")
    suspect = "--ckpt", "suspect.pth", "--arch", "mnist_cnn"
    flags = suspect if script == "nc" else SHORT["badnets"]
    flags = *flags, "--image-size", side, "--dataset"
    assert "--image-size" in one_line(inline, script, *flags, "own")


def test_a_side_without_a_folder(inline, one_line, nets):
    flags = *SHORT["badnets"], "--image-size", 28
    assert "--image-size" in one_line(inline, "badnets", *flags, "--dataset", "digits")


def test_images_of_0_and_1_are_refused(one_line, tmp_path):
    x, y = np.arange(40 * 64).reshape(40, 8, 8) % 2, np.arange(40) % 4
    path = str(tmp_path / "own.npz")
    np.savez(path, x=x.astype(np.uint8), y=y)
    assert "must hold 0..255" in one_line(load_dataset, path, "data", "cpu")
    assert "must hold 0..255" in one_line(load_pictures, path, (1, 8, 8))


def test_maps_have_the_shape_of_the_images():
    """Swin's outputs, B x h x w x c, are none."""
    square, wide = torch.zeros(2, 3, 28, 28), torch.zeros(2, 3, 20, 32)
    maps = (2, 48, 7, 7), (2, 5, 1, 1), (2, 7, 7, 48), (2, 56, 56, 96), (2, 49, 8)
    assert [is_map(torch.zeros(shape), square) for shape in maps] == [True] + 4 * [False]
    assert is_map(torch.zeros(2, 64, 2, 5), wide) and not is_map(torch.zeros(2, 5, 8, 40), wide)
    assert not is_map((torch.zeros(maps[0]), None), square)


def test_suspects_that_are_no_images(nets, inline, one_line, tmp_path, capfd):
    np.savez(tmp_path / "scalar.npz", x=np.uint8(3))
    assert "uint8" in one_line(load_pictures, "scalar.npz", (1, 28, 28))
    pictures(tmp_path / "some", classes=["a"], count=2)
    (tmp_path / "some" / "a" / "7.gif").write_bytes(b"GIF")
    names, x = load_pictures("some", (3, 8, 8))
    assert names == ["a/0.png", "a/1.png"] and len(x) == 2
    assert "that do not end like a picture: 1" in capfd.readouterr().out


WEIGHTED = """
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

def Weighted(num_classes=10):
    last = weight_norm(nn.Linear(16, num_classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), last)

class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)

def More(num_classes=10):
    return nn.Sequential(nn.Flatten(), Doubled(784, num_classes))

def Tied(num_classes=10):
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Linear(10, 10), nn.Linear(10, 10))
    net[3].weight = net[2].weight
    return net
"""


@pytest.mark.parametrize(
    "script, net, named",
    [
        ("nc_mitigate", "Weighted", "no layer 3 whose inputs its own weight can silence; known: 1"),
        ("nc_mitigate", "More", "known: none"),
        ("nc_mitigate", "Tied", "known: 1"),
        ("fine_pruning", "Weighted", "weight_norm"),
        ("latent", "Weighted", "weight_norm"),
        ("trojannn", "Weighted", "weight_norm"),
    ],
)
def test_a_last_layer_that_is_more_than_its_weight(
    tmp_path, inline, one_line, unread, script, net, named
):
    """Its weight cannot be zeroed or copied; what was pruned would come back in the saved file."""
    (tmp_path / "nets.py").write_text(WEIGHTED)
    arch = "--arch", f"nets.py:{net}"
    if script in ("nc_mitigate", "fine_pruning"):
        inline("clean", *SHORT["clean"], *arch, "--out", "victim")
        flags = "--ckpt", "victim", *arch
    if script == "nc_mitigate":
        (tmp_path / "victim" / "nc-s0").mkdir()
        arrays = {
            "masks": np.ones((10, 1, 28, 28), "f4"),
            "patterns": np.zeros((10, 1, 28, 28), "f4"),
            "network": fingerprint(loaded("victim", arch=arch[1]).model),
        }
        np.savez(tmp_path / "victim" / "nc-s0" / "reversed.npz", **arrays)
        flags = *flags, "--label", 0, "--layer", 3
    elif script != "fine_pruning":
        flags = *arch, *SHORT[script]
    assert named in one_line(inline, script, *flags)


MAPS = """
import torch
from torch import nn

class Aside(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body, self.aside = nn.Conv2d(1, 4, 5, 4), nn.Conv2d(4, 2, 1)
        self.last = nn.Linear(144, num_classes)

    def forward(self, x):
        with torch.no_grad():
            a = self.body(x)
        return self.aside(a), self.last(a.flatten(1).clone())

class Twice(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.body, self.last = nn.Conv2d(1, 4, 5, 4), nn.Linear(144, num_classes)

    def forward(self, x):
        first, second = self.body(x), self.body(x.flip(3))
        return second.mean((1, 2, 3)), self.last(first.flatten(1))
"""


@pytest.mark.parametrize("script", ["gradcam", "sentinet"])
def test_a_map_on_which_the_scores_do_not_depend(tmp_path, inline, one_line, unread, script):
    """An output beside the scores, and a layer whose gradient the network itself forbids."""
    (tmp_path / "nets.py").write_text(MAPS)
    arch = "--arch", "nets.py:Aside"
    inline("clean", *SHORT["clean"], *arch, "--epochs", 3, "--out", "victim")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for layer in ("aside", "body"):
        flags = "--ckpt", "victim", *arch, "--layer", layer
        assert f"--layer {layer}" in one_line(inline, script, *flags)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("script", ["gradcam", "sentinet"])
def test_a_layer_whose_last_run_is_not_used(tmp_path, inline, one_line, unread, script):
    (tmp_path / "nets.py").write_text(MAPS)
    arch = "--arch", "nets.py:Twice"
    inline("clean", *SHORT["clean"], *arch, "--epochs", 3, "--out", "victim")
    flags = "--ckpt", "victim", *arch, "--layer", "body", "--out", "out"
    assert "--layer body" in one_line(inline, script, *flags)
    assert not (tmp_path / "out").exists()
