"""Neural attention distillation against closed forms and loops written out, and runs on digits."""

import copy
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import files_below, reread, result_of, run_here, write_npz
from PIL import Image
from test_any_network import NETS
from test_fine_pruning import random_model
from test_finetune import load, tuned

from common.datasets import to_float
from common.models import ARCHITECTURES, Classifier
from methods import finetune, nad

MAPS = {  # of the images of random_model: 28 x 28 for the MNIST networks, 32 x 32, 16 x 16 or 8 x 8
    "mnist_cnn": [14, 7, 4],
    "mnist_conv5": [24, 8],
    "preact_resnet18": [8, 4, 2],
    "resnet18": [8, 4, 2],
    "resnet34": [8, 4, 2],
    "wrn16_1": [32, 16, 8],
    "nc_gtsrb_cnn": [30, 13, 4],
    "airbench": [15, 7, 3],
    "wide_resnet34": [8, 4, 2],
    "densenet121": [8, 4, 2],
    "vgg16": [8, 4, 2],
    "vgg19": [8, 4, 2],
    "mobilenet_v2": [16, 8, 4],
}
BETAS = {"conv1": 0.5, "layer3": 4.0, "layer4": 16.0}


# ===== The attention =====


def test_attention_by_hand():
    """Channels [[1, 0], [0, 0]] and [[0, -1], [0, 0]]; a silent map stays silent."""
    f = torch.zeros(2, 2, 2, 2)
    f[0, 0, 0, 0], f[0, 1, 0, 1] = 1, -1
    expected = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]) / 2**0.5
    torch.testing.assert_close(nad.attention(f), expected)
    f[0, 0, 0, 0] = 3  # 9 and 1
    torch.testing.assert_close(nad.attention(f)[0], torch.tensor([9, 1, 0, 0]) / 82**0.5)


def test_attention_in_numpy():
    """Also of tiny features, where a constant added to the length would count, and of bfloat16."""
    torch.manual_seed(0)
    f = torch.randn(5, 7, 3, 4)
    a = (f.double().numpy() ** 2).sum(1).reshape(5, 12)
    a /= np.sqrt((a**2).sum(1, keepdims=True))
    for scale in (1, 1e-4, 1e4):
        np.testing.assert_allclose(nad.attention(scale * f), a, rtol=1e-5)
    half = nad.attention(f.bfloat16())
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half, a, rtol=0.05)


def test_distance():
    torch.manual_seed(0)
    f, g = torch.randn(2, 6, 4, 5, 5)
    a, b = nad.attention(f), nad.attention(g)
    assert nad.distance(f, g).item() == pytest.approx(
        np.mean([np.square(p - q).sum() for p, q in zip(a.numpy(), b.numpy())]), rel=1e-5
    )
    assert nad.distance(f, 3 * f).item() < 1e-12
    apart = torch.zeros(2, 1, 1, 2, 2)
    apart[0, ..., 0, 0] = apart[1, ..., 1, 1] = 1
    assert nad.distance(*apart).item() == pytest.approx(2)


def test_distance_does_not_depend_on_the_size_of_the_map():
    """The same pictures with four pixels for one; the code's mean would be a quarter."""
    torch.manual_seed(0)
    f, g = torch.randn(2, 6, 4, 8, 8)
    large = [F.interpolate(x, scale_factor=2) for x in (f, g)]
    assert nad.distance(*large).item() == pytest.approx(nad.distance(f, g).item(), rel=1e-5)
    means = [F.mse_loss(nad.attention(a), nad.attention(b)).item() for a, b in ((f, g), large)]
    assert means[1] == pytest.approx(means[0] / 4, rel=1e-5)


def test_betas_are_the_code_s_on_its_maps():
    """500, 1000, 1000 times the mean over 32 x 32, 16 x 16 and 8 x 8 positions."""
    for beta, code, side in zip(nad.BETAS, (500, 1000, 1000), (32, 16, 8), strict=True):
        torch.manual_seed(side)
        f, g = torch.randn(2, 6, 4, side, side)
        expected = code * F.mse_loss(nad.attention(f), nad.attention(g)).item()
        assert beta * nad.distance(f, g).item() == pytest.approx(expected, rel=1e-5)


def test_a_student_like_its_teacher_is_not_moved():
    f = torch.randn(3, 4, 5, 5, requires_grad=True)
    loss = nad.distance(f, f.detach())
    loss.backward()
    assert loss.item() == 0 and (f.grad == 0).all()
    silent = torch.zeros(3, 4, 5, 5, requires_grad=True)
    nad.distance(silent, f.detach()).backward()
    assert silent.grad.isfinite().all()


# ===== The blocks =====


def test_every_architecture_has_blocks():
    assert set(nad.BLOCKS) == set(ARCHITECTURES) == set(MAPS)


@pytest.mark.parametrize("arch", nad.BLOCKS)
def test_maps_of_the_blocks(arch):
    model, x = random_model(arch)
    sizes = nad.map_sizes(model, x[:2] / 255)
    assert [sizes[name] for name in nad.BLOCKS[arch]] == [(side, side) for side in MAPS[arch]]
    assert not {*sizes} & {"linear", "linear6", "linear9", "fc", "classifier"}
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_of_blocks():
    """wrn16_1's, by its own forward; the logits are the model's."""
    model, x = random_model("wrn16_1")
    net, x = model.net, x / 255
    logits, seen = nad.outputs_of(model, nad.BLOCKS["wrn16_1"], x)
    torch.testing.assert_close(logits, model(x))
    a = net.conv1((x - model.mean) / model.std)
    for name in ("block1", "block2", "block3"):
        a = getattr(net, name)(a)
        torch.testing.assert_close(seen[name], a)


def test_a_relu_in_place_leaves_the_block_before_it_alone():
    conv = torch.nn.Conv2d(1, 4, 3)
    model = Classifier(torch.nn.Sequential(conv, torch.nn.ReLU(inplace=True)), [0.0], [1.0])
    x = torch.rand(2, 1, 8, 8)
    _, seen = nad.outputs_of(model, ["0"], x)
    torch.testing.assert_close(seen["0"], conv(x))
    assert seen["0"].min() < 0


# ===== Training =====


def test_cutout():
    """A square of zeros around each pixel equally often, cut by the edges, of all channels."""
    torch.manual_seed(0)
    x = torch.rand(4000, 3, 8, 6) + 0.1
    for side, first in ((3, 1), (2, 1), (1, 0)):  # rows before the centre
        cut = nad.cut_out(x, side)
        hole = (cut == 0).all(1)
        assert torch.equal(cut, x * ~hole[:, None]) and hole.any((1, 2)).all()
        expected, shares = set(), np.zeros((8, 6))
        for row, column in np.ndindex(8, 6):
            one = np.zeros((8, 6), bool)
            rows, columns = (slice(max(0, at - first), at - first + side) for at in (row, column))
            one[rows, columns] = True
            expected.add(one.tobytes())
            shares += one / 48
        assert {one.numpy().tobytes() for one in hole} == expected
        np.testing.assert_allclose(hole.float().mean(0), shares, atol=0.05)


def test_teacher_and_student_see_the_same_squares(untrained, teacher, digits):
    seen = {"student": [], "teacher": []}
    for name, net in (("student", untrained), ("teacher", teacher)):
        net.net.register_forward_pre_hook(lambda m, i, name=name: seen[name].append(i[0].clone()))
    x, y = torch.full((60, 1, 28, 28), 255, dtype=torch.uint8), digits.y_train[:60]
    tuned(untrained, x, y, nad, teacher=teacher, betas=BETAS, pad=0, cutout=5)
    assert all(torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"]))
    black = (seen["teacher"][0] == -1).sum((1, 2, 3))  # normalised; 25 but at the edges
    assert black.max() == 25 and (black >= 9).all()


@pytest.fixture
def teacher(untrained, digits):
    """A tuned copy, which attends elsewhere."""
    x, y = digits.x_train[200:300], digits.y_train[200:300]
    return tuned(untrained, x, y, nad, epochs=4, lr=0.1)


def test_betas_of_zero_are_plain_fine_tuning(untrained, teacher, digits):
    """Bit by bit; so is the sibling's script, and a beta makes a difference."""
    x, y = digits.x_train[:90], digits.y_train[:90]
    plain = tuned(untrained, x, y, finetune).state_dict()
    without = tuned(untrained, x, y, nad).state_dict()
    zero = tuned(untrained, x, y, nad, teacher=teacher, betas=dict.fromkeys(BETAS, 0)).state_dict()
    drawn = tuned(untrained, x, y, nad, teacher=teacher, betas=BETAS).state_dict()
    for key, value in plain.items():
        assert torch.equal(value, without[key]) and torch.equal(value, zero[key]), key
    assert not torch.equal(plain["net.layer3.conv1.weight"], drawn["net.layer3.conv1.weight"])


def test_two_steps_written_out(untrained, teacher, digits):
    """CE + .5 D(conv1) + 4 D(layer3) + 16 D(layer4), teacher in eval mode, on the same images."""
    x, y = digits.x_train[:40], digits.y_train[:40]
    after = tuned(untrained, x, y, nad, teacher=teacher, betas=BETAS, epochs=1, pad=0)
    torch.manual_seed(5)
    expected = copy.deepcopy(untrained).requires_grad_(True).train()
    weights = list(expected.parameters())
    velocity = [torch.zeros_like(w) for w in weights]

    def maps(net, x):
        a = net.conv1((x - 0.5) / 0.5)
        b = net.layer3(F.relu(a))
        c = net.layer4(b)
        logits = net.linear9(net.dropout8(F.relu(net.linear6(c.flatten(1)))))
        squares = [(f**2).sum(1).flatten(1) for f in (a, b, c)]
        return logits, [s / (s**2).sum(1, keepdim=True).sqrt() for s in squares]

    for batch, rate in zip(torch.randperm(40).split(20), (0.05, 0.025)):
        images = to_float(x[batch])
        logits, mine = maps(expected.net, images)
        _, wanted = maps(teacher.net, images)
        loss = F.cross_entropy(logits, y[batch])
        for beta, a, b in zip((0.5, 4, 16), mine, wanted):
            loss = loss + beta * ((a - b) ** 2).sum() / 20
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, v, g in zip(weights, velocity, gradients):
                v.mul_(0.9).add_(g + 5e-4 * w)
                w -= rate * v
    for got, wanted in zip(after.parameters(), weights):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-3, atol=1e-5)


def test_the_student_attends_where_its_teacher_does(untrained, teacher, digits):
    """More than plain fine-tuning makes it; suspect and teacher stay, and no hook is left."""
    x, y = digits.x_train[:100], digits.y_train[:100]
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (untrained, teacher)]
    settings = {"epochs": 6, "pad": 0}
    plain = tuned(untrained, x, y, nad, **settings)
    student = tuned(untrained, x, y, nad, teacher=teacher, betas=BETAS, **settings)
    _, wanted = nad.outputs_of(teacher, BETAS, to_float(x))
    apart = {}
    for name, net in (("plain", plain), ("student", student)):
        _, seen = nad.outputs_of(net, BETAS, to_float(x))
        distances = {k: nad.distance(seen[k], wanted[k]).item() for k in BETAS}
        apart[name] = sum(beta * distances[k] for k, beta in BETAS.items())
    assert apart["student"] < 0.6 * apart["plain"], apart
    for net, state in zip((untrained, teacher), before):
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert not net.training
    assert not student.training and not any(p.requires_grad for p in student.parameters())
    for net in (untrained, teacher, student):
        assert not any(module._forward_hooks for module in net.modules())


def test_teacher_and_student_see_the_same_crops(untrained, teacher, digits):
    """The copy that becomes the student takes the suspect's hook along."""
    seen = {"student": [], "teacher": []}
    for name, net in (("student", untrained), ("teacher", teacher)):
        net.net.register_forward_pre_hook(lambda m, i, name=name: seen[name].append(i[0].clone()))
    x, y = digits.x_train[:60], digits.y_train[:60]
    tuned(untrained, x, y, nad, teacher=teacher, betas=BETAS, flip=True)
    assert len(seen["teacher"]) == 6 and len(seen["student"]) == 7  # the last: is it finite?
    assert all(torch.equal(a, b) for a, b in zip(seen["student"], seen["teacher"]))
    assert not torch.equal(seen["student"][0].sum(0), seen["student"][3].sum(0))


def test_distillation_that_diverges_gives_no_model(untrained, teacher, digits):
    huge = dict.fromkeys(BETAS, 1e30)
    x, y = digits.x_train[:90], digits.y_train[:90]
    assert tuned(untrained, x, y, nad, teacher=teacher, betas=huge, epochs=3) is None


# ===== Whole runs on digits =====


@pytest.mark.drawn
def test_nad_removes_badnets(digits, digits_badnets, tmp_path):
    """Through the command line, with the teacher and plain fine-tuning beside it."""
    out, before = tmp_path / "out", files_below(digits_badnets)
    flags = "--epochs", 24, "--teacher-epochs", 12, "--batch-size", 32, "--out", out
    printed = run_here("nad", "--ckpt", digits_badnets, *flags, cwd=tmp_path)
    metrics = result_of(out)["metrics"]
    assert result_of(out)["arguments"]["cutout"] == 8  # of 28 pixels; 9 of 32
    assert metrics["asr"] >= 98 and metrics["asr_repaired"] <= 10
    assert metrics["clean_accuracy_repaired"] >= 93 and metrics["robust_accuracy_repaired"] >= 80
    assert {"asr_teacher", "asr_clean_only", "clean_accuracy_clean_only"} <= set(metrics)
    assert metrics["betas"] == dict(zip(nad.BLOCKS["mnist_cnn"], nad.BETAS))
    assert metrics["maps"] == {"conv1": [14, 14], "layer3": [7, 7], "layer4": [4, 4]}
    reread(out, digits_badnets, digits)
    assert files_below(out) == ["attention.png", "model.pt", "result.json"]
    with Image.open(out / "attention.png") as picture:
        assert len(np.unique(np.asarray(picture))) > 10
    assert files_below(digits_badnets) == before
    assert "layer4: attention of 4 x 4 positions, beta 15.625" in printed
    assert "cross-entropy" in printed and " layer3 " in printed


def test_teacher_and_student_of_a_run(inline, digits_badnets, tmp_path, capfd):
    """Each with its own epochs, both with Cutout; the student is drawn to the teacher."""
    own = "--epochs", 2, "--teacher-epochs", 1, "--lr", 0.02, "--cutout", 5, "--max-drop", 90
    ran = inline("nad", "--ckpt", digits_badnets, *own, "--out", tmp_path / "out")
    recipe = {"pad": 2, "flip": False, "batch_size": 64, "lr": 0.02, "cutout": 5}
    torch.manual_seed(0)
    teacher = nad.finetune(ran["model"], *ran["clean"], epochs=1, **recipe)
    torch.manual_seed(0)
    drawn = {"teacher": teacher, "betas": dict(zip(nad.BLOCKS["mnist_cnn"], nad.BETAS))}
    student = nad.finetune(ran["model"], *ran["clean"], epochs=2, **drawn, **recipe)
    for made, again in ((ran["teacher"], teacher), (ran["repaired"], student)):
        for key, value in made.state_dict().items():
            assert torch.equal(value, again.state_dict()[key]), key
    printed = capfd.readouterr().out
    assert "\nteacher at rate 0.02: " in printed and "\nstudent at rate 0.02: " in printed


def test_its_baseline_is_the_sibling_s_run(inline, digits_badnets, tmp_path):
    """Betas of 0, no Cutout: student, baseline and finetune.py at the same rate are one model."""
    flags = "--ckpt", digits_badnets, "--epochs", 2
    without = "--lr", 0.01, "--betas", 0, 0, 0, "--cutout", 0, "--teacher-epochs", 1, "--out", "nad"
    baseline = inline("nad", *flags, *without)["models"]["_clean_only"].state_dict()
    inline("finetune", *flags, "--lrs", 0.01, "--out", "plain")
    found, plain = (result_of(tmp_path / name)["metrics"] for name in ("nad", "plain"))
    for figure in ("clean_accuracy", "asr", "robust_accuracy"):
        assert found[f"{figure}_repaired"] == found[f"{figure}_clean_only"]
        assert found[f"{figure}_repaired"] == plain[f"{figure}_repaired"]
    mine, other = (load(tmp_path / name).state_dict() for name in ("nad", "plain"))
    for key, value in mine.items():
        assert torch.equal(value, other[key]) and torch.equal(value, baseline[key]), key


def test_the_defender_needs_no_triggered_image(inline, digits_badnets, tmp_path, capfd):
    """Without poisoned_test.npz: bitwise the same repaired model, and no ASR."""
    blind = tmp_path / "blind"
    blind.mkdir()
    shutil.copy(digits_badnets / "model.pt", blind)
    flags = "--epochs", 1, "--teacher-epochs", 1, "--lr", 0.01, "--out"
    inline("nad", "--ckpt", digits_badnets, *flags, tmp_path / "seen")
    inline("nad", "--ckpt", blind, *flags, tmp_path / "unseen")
    assert "the ASR cannot be measured" in capfd.readouterr().out
    seen, unseen = (load(tmp_path / name).state_dict() for name in ("seen", "unseen"))
    assert all(torch.equal(value, unseen[key]) for key, value in seen.items())
    metrics = result_of(tmp_path / "unseen")["metrics"]
    assert not any("asr" in key for key in metrics) and "clean_accuracy_teacher" in metrics


def test_a_teacher_that_costs_too_much_teaches_nothing(
    inline, digits_badnets, tmp_path, monkeypatch, capfd
):
    """Nothing is saved; the baseline's figures are."""
    monkeypatch.setattr("common.defence.MOST_DROP", -101.0)
    flags = "--epochs", 1, "--teacher-epochs", 1, "--out", tmp_path / "out"
    inline("nad", "--ckpt", digits_badnets, *flags)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert "asr_clean_only" in metrics and not {"asr_teacher", "asr_repaired"} & set(metrics)
    assert files_below(tmp_path / "out") == ["attention.png", "result.json"]
    assert "none is saved" in capfd.readouterr().out


def test_cost_to_a_clean_model(inline, digits_clean, tmp_path):
    flags = "--epochs", 10, "--teacher-epochs", 5, "--lr", 0.03, "--out", tmp_path / "out"
    inline("nad", "--ckpt", digits_clean, *flags)
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["clean_accuracy"] >= 96 and "asr" not in metrics
    assert metrics["clean_accuracy_repaired"] >= metrics["clean_accuracy"] - 4


USERS = (
    NETS
    + """
class Blocks(nn.Sequential):
    def __init__(self, num_classes):
        body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True)), nn.Conv2d(4, 8, 3, 2)
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes)
        super().__init__(*body, *head)
"""
)


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A user's FILE.py in the working directory and a state dict; returns the flags for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(USERS)
    names = {}
    exec(USERS, names)
    torch.manual_seed(0)
    torch.save(names["Blocks"](10).state_dict(), tmp_path / "suspect.pt")
    return "--ckpt", "suspect.pt", "--arch", "nets.py:Blocks", "--dataset", "digits"


def test_blocks_of_a_users_network(inline, users, unread, tmp_path):
    short = "--epochs", 1, "--teacher-epochs", 1, "--lr", 1e-4
    inline("nad", *users, *short, "--blocks", "0.1", "1", "--out", "out")
    metrics = result_of(tmp_path / "out")["metrics"]
    assert metrics["maps"] == {"0.1": [26, 26], "1": [12, 12]}
    assert metrics["betas"] == {"0.1": nad.BETAS[1], "1": nad.BETAS[2]}


@pytest.mark.parametrize(
    "args, named",
    [
        ([], "0, 0.0, 0.1, 1"),  # FILE.py has no default
        (["--blocks", "layer9"], "0, 0.0, 0.1, 1"),
        (["--blocks", "1", "2"], "0, 0.0, 0.1, 1"),  # pooled to 1 x 1: its map is always 1
        (["--blocks", "4"], "0, 0.0, 0.1, 1"),  # a linear layer
        (["--blocks", ""], "0, 0.0, 0.1, 1"),
        (["--blocks", "0", "0.0", "0.1", "1"], "--betas"),
    ],
    ids=str,
)
def test_blocks_that_a_users_network_lacks(inline, one_line, users, unread, tmp_path, args, named):
    before = files_below(tmp_path)
    assert named in one_line(inline, "nad", *users, *args)
    assert files_below(tmp_path) == before


def test_a_network_without_maps(inline, one_line, users, unread, tmp_path):
    torch.save({"1.weight": torch.zeros(10, 784), "1.bias": torch.zeros(10)}, "plain.pt")
    flags = "--ckpt", "plain.pt", "--arch", "nets.py:Plain", "--dataset", "digits"
    assert "none" in one_line(inline, "nad", *flags, "--blocks", "1")


def test_images_too_small_for_the_default(inline, one_line, unread, tmp_path):
    """mnist_cnn's last map of 8 x 8 images is 1 x 1; with other blocks it is repaired."""
    write_npz(tmp_path / "own.npz", (8, 8), 6, 120)
    flags = "--dataset", "own.npz", "--epochs", 1, "--batch-size", 20, "--out", "victim"
    inline("badnets", "--rate", 0.2, *flags)
    short = "--ckpt", "victim", "--epochs", 1, "--teacher-epochs", 1, "--lr", 1e-4
    assert "conv1" in one_line(inline, "nad", *short)
    inline("nad", *short, "--blocks", "conv1", "layer3")
    assert result_of(tmp_path / "victim" / "nad-s0")["metrics"]["maps"]["layer3"] == [2, 2]


@pytest.mark.parametrize(
    "args, named",
    [
        (["--blocks", "layer9"], "conv1, layer3"),
        (["--blocks", "linear6"], "conv1, layer3"),
        (["--blocks", "layer3", "layer3"], "different blocks"),
        (["--betas", 1], "--betas"),
        (["--betas", 1, 1, 1, 1], "--betas"),
        (["--betas", 1, 1, -1], "--betas"),
        (["--betas", 1, 1, "nan"], "--betas"),
        (["--betas", 1, 1, "inf"], "--betas"),
        (["--epochs", 0], "epochs"),
        (["--teacher-epochs", 0], "teacher-epochs"),
        (["--batch-size", -1], "batch-size"),
        (["--cutout", -1], "0..27"),
        (["--cutout", 28], "0..27"),
        (["--lr", 0], "lr"),
        (["--data-fraction", 0], "share"),
        (["--data-fraction", 0.0001], "kept back"),
        (["--ckpt", "nowhere"], "nowhere"),
    ],
    ids=str,
)
def test_bad_input(inline, one_line, digits_badnets, tmp_path, args, named):
    flags = "--ckpt", digits_badnets, "--out", tmp_path / "out", *args
    assert named in one_line(inline, "nad", *flags)
    assert files_below(tmp_path) == []


def test_a_rate_that_always_diverges_saves_no_model(inline, digits_badnets, tmp_path, capfd):
    """Not even its control; the run ends with what it knows."""
    flags = (
        "--ckpt",
        digits_badnets,
        "--out",
        tmp_path / "out",
        "--lr",
        "1e30",
        "--teacher-epochs",
        1,
        "--epochs",
        1,
    )
    metrics = inline("nad", *flags)["metrics"]
    assert "every teacher diverged or cost over 5 points" in capfd.readouterr().out
    assert not {"clean_accuracy_repaired", "clean_accuracy_clean_only"} & metrics.keys()
    assert not (tmp_path / "out" / "model.pt").exists()
