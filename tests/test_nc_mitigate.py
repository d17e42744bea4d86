"""Neural Cleanse's filter and pruning: planted neurons, explicit copies, and runs on digits."""

import contextlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT, files_below, loaded, result_of, run_inline
from sklearn.metrics import roc_auc_score
from torch import nn

from common.checkpoint import fingerprint
from common.datasets import defender_split, to_float
from common.metrics import accuracy, predict
from common.models import Classifier, build_model
from methods import nc
from methods import nc_mitigate as mitigate


def random_model(arch="mnist_cnn"):
    """A network with weights as drawn and twelve images for it."""
    torch.manual_seed(0)
    shape = (1, 28, 28) if "mnist" in arch else (3, 16, 16)
    model = build_model(arch, 5, shape, (0.5,) * shape[0], (0.5,) * shape[0])
    x = torch.randint(0, 256, (12, *shape)).to(torch.uint8)
    return model.eval().requires_grad_(False), x


# ===== Functions =====


def test_stamp_is_equation_2_in_8_bits():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5, 3, 4, 6), np.uint8)
    mask, pattern = rng.random((1, 4, 6), np.float32), rng.random((3, 4, 6), np.float32)
    expected = np.round((1 - mask) * x + 255.0 * mask * pattern)
    stamped = mitigate.stamp(*map(torch.from_numpy, (x, mask, pattern)))
    assert stamped.dtype == torch.uint8
    assert np.abs(stamped.numpy() - expected).max() <= 1  # ties
    assert (stamped.numpy() == expected).mean() > 0.99


def test_activations_by_hand():
    model, x = random_model()
    net = model.net
    a = net.layer4(net.layer3(F.relu(net.conv1((to_float(x) - 0.5) / 0.5))))
    expected = F.relu(net.linear6(a.flatten(1)))
    found = mitigate.activations(model, "linear9", x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_activations_of_a_map_are_its_mean():
    model, x = random_model("wrn16_1")
    net = model.net
    block = net.block3.layer[1]
    before = net.block3.layer[0](net.block2(net.block1(net.conv1((to_float(x) - 0.5) / 0.5))))
    expected = F.relu(block.bn2(block.conv1(F.relu(block.bn1(before))))).mean((2, 3))
    found = mitigate.activations(model, "block3.layer.1.conv2", x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_activations_of_tokens_are_their_mean():
    """A linear layer may read B x T x D or B x H x W x D: the neurons are the last axis."""
    for shape in ((-1, 8, 6), (-1, 2, 4, 6)):
        net = nn.Sequential(nn.Flatten(), nn.Unflatten(1, shape[1:]), nn.Linear(6, 3))
        model = Classifier(net, (0.0,), (1.0,)).eval()
        x = torch.randint(0, 256, (5, 1, 6, 8)).to(torch.uint8)
        expected = to_float(x).view(5, 8, 6).mean(1)
        torch.testing.assert_close(mitigate.activations(model, "2", x), expected)


@pytest.mark.parametrize("neurons, top", [(300, 3), (60, 1), (512, 5)])
def test_ranking_and_profile_against_numpy(neurons, top):
    rng = np.random.default_rng(0)
    clean, stamped = rng.normal(size=(2, 40, neurons))
    order = mitigate.ranking(*map(torch.from_numpy, (clean, stamped)))
    added = (stamped - clean).mean(0)
    np.testing.assert_array_equal(order, np.argsort(-added))
    scores = mitigate.profile(torch.from_numpy(stamped), order)
    np.testing.assert_allclose(scores, stamped[:, np.argsort(-added)[:top]].mean(1))


def test_equal_neurons_are_ranked_by_their_number():
    zero = torch.zeros(4, 9)
    assert mitigate.ranking(zero, zero).tolist() == list(range(9))


class Mixed(nn.Module):
    """One layer of each kind: c, b and a can be silenced, and run in the order a, b, c."""

    def __init__(self):
        super().__init__()
        self.c, self.b, self.a = nn.Linear(16, 3), nn.Linear(16, 16), nn.Conv2d(1, 16, 3)
        self.grouped, self.unused = nn.Conv2d(16, 16, 1, groups=2), nn.Linear(16, 16)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.more = Doubled(16, 16)

    def forward(self, x):
        x = self.grouped(self.a(x)).mean((2, 3))
        x = self.more(self.second(self.first(self.weighted(x))))
        x = self.b(x.repeat(2, 1))[: len(x)] + self.b(x)  # the last use counts
        return self.c(x)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_readers_are_the_layers_that_can_be_silenced_from_the_last():
    model = Classifier(Mixed(), (0.0,), (1.0,)).eval()
    found = mitigate.readers(model, torch.rand(4, 1, 9, 9))
    assert list(found.items()) == [("c", 16), ("b", 16), ("a", 1)]
    assert not any(module._forward_hooks for module in model.modules())


def test_readers_of_a_residual_network():
    model, x = random_model("wrn16_1")
    names = list(mitigate.readers(model, to_float(x)))
    last = ["fc", "block3.layer.1.conv2", "block3.layer.1.conv1", "block3.layer.0.conv2"]
    assert names[:4] == last and names[-1] == "conv1"


@pytest.mark.parametrize(
    "arch, layer",
    [
        ("mnist_cnn", "linear9"),
        ("wrn16_1", "fc"),
        ("wrn16_1", "block3.layer.1.conv1"),
        ("airbench", "linear"),  # it has no bias
        ("airbench", "group3.0"),
    ],
)
def test_pruning_is_reading_zeros(arch, layer):
    model, x = random_model(arch)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reader = model.net.get_submodule(layer)
    pruned = torch.randperm(reader.weight.shape[1])[:5]
    found = mitigate.prune(model, layer, pruned)(to_float(x))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key

    def silenced(module, inputs):
        a = inputs[0].clone()
        a[:, pruned] = 0
        return (a,)

    reader.register_forward_pre_hook(silenced)
    torch.testing.assert_close(found, model(to_float(x)), rtol=1e-4, atol=1e-5)


def test_curve_measures_pruned_copies():
    model, x = random_model()
    order, y = torch.randperm(512), predict(model, x)
    kept, stamped = (x, y), (x[:7], y[:7])
    curve = mitigate.prune_curve(model, "linear9", order, kept, stamped, max_drop=100, gone=-1)
    counts = [count for count, _, _ in curve]
    steps = np.diff(counts)
    assert counts[:11] == list(range(11)) and 440 < counts[-1] <= 512
    assert (steps == np.maximum(1, np.array(counts[:-1]) // 8)).all()
    for count, percent, asr in (curve[0], curve[5], curve[-1]):
        copy = mitigate.prune(model, "linear9", order[:count])
        assert percent == pytest.approx(accuracy(copy, x, y, balanced=True))
        assert asr == pytest.approx(accuracy(copy, *stamped))
    assert curve[0][1:] == (100, 100)
    low = min(percent for _, percent, _ in curve)
    limits = {"max_drop": 100 - low - 1e-3, "gone": -1}
    cut = mitigate.prune_curve(model, "linear9", order, kept, stamped, **limits)
    assert cut == curve[: len(cut)] and cut[-1][1] == low
    assert all(percent > low for _, percent, _ in cut[:-1])


@pytest.mark.parametrize(
    "accuracies, asrs, count, gone",
    [
        ([99, 98, 97], [100, 50, 1], 2, True),
        ([99, 98, 93.9], [100, 50, 0], 1, False),  # the fall counts first
        ([99, 94, 94, 94], [100, 50, 20, 10], 3, False),
        ([99, 90], [100, 0], 0, False),
    ],
)
def test_stop_point(accuracies, asrs, count, gone):
    curve = list(zip(range(9), accuracies, asrs))
    assert mitigate.stop_point(curve, 5, 1) == (curve[count], gone)


@pytest.mark.parametrize("count, drawn", [(900, 900), (1000, 1000), (1001, 501), (9990, 999)])
def test_the_drawn_images_are_of_all_labels(count, drawn):
    y = torch.arange(count) * 10 // count  # CIFAR-10's test set is sorted, too
    x, labels = mitigate.spread(torch.arange(count), y)
    assert len(x) == len(labels) == drawn and torch.equal(labels, y[x])
    assert labels.bincount().max() - labels.bincount().min() <= 1


class Neurons(nn.Module):
    """Neuron j is pixel j; three classes, and neuron 4 leads to class 0."""

    def __init__(self, neurons=200):
        super().__init__()
        self.linear = nn.Linear(neurons, 3, bias=False)
        weight = torch.zeros(3, neurons)
        weight[[0, 1, 2], [0, 1, 2]] = 1
        weight[0, 4] = 9
        self.linear.weight.data = weight

    def forward(self, x):
        return self.linear(x.flatten(1))


def test_planted_neuron_is_found_filtered_and_pruned():
    """The trigger sets pixel 4 and, faintly, pixel 7; clean images leave both nearly black."""
    model = Classifier(Neurons(), (0.0,), (1.0,)).eval().requires_grad_(False)
    y = torch.arange(60) % 3
    x = torch.randint(0, 9, (60, 1, 1, 200), generator=torch.Generator().manual_seed(0)).byte()
    x[torch.arange(60), 0, 0, y] = 150
    mask, pattern = torch.zeros(1, 1, 200), torch.ones(1, 1, 200)
    mask[..., 4], mask[..., 7] = 1, 0.1
    others = y != 0
    clean = mitigate.activations(model, "linear", x)
    stamped = mitigate.stamp(x[others], mask, pattern)
    excited = mitigate.activations(model, "linear", stamped)
    order = mitigate.ranking(clean[others], excited)
    assert order[:2].tolist() == [4, 7]
    scores = [mitigate.profile(a, order).numpy() for a in (clean, excited)]
    assert scores[0].max() < scores[1].min()  # a filter without mistakes
    sets, limits = ((x, y), (stamped, torch.zeros(40).long())), {"max_drop": 5, "gone": 1}
    curve = mitigate.prune_curve(model, "linear", order, *sets, **limits)
    assert curve == [(0, 100, 100), (1, 100, 0)]
    assert mitigate.stop_point(curve, **limits) == ((1, 100, 0), True)


# ===== Whole runs on digits =====


@pytest.fixture(scope="module")
def reversed_trigger(tmp_path_factory, digits_badnets):
    """What nc.py writes, but only label 0 is searched: its folder."""
    folder, victim = tmp_path_factory.mktemp("nc"), loaded(digits_badnets)
    data = victim.data
    split = defender_split(data.y_train, 0.2, 0)
    given = victim.model, to_float(data.x_train[split]), data.y_train[split], [0]
    settings = {"steps": 60, "batches": 2, "batch_size": 32, "lr": 0.1, "seed": 0}
    found = nc.reverse_triggers(*given, **settings)
    masks, patterns = np.zeros((10, 1, 28, 28), np.float32), np.zeros((10, 1, 28, 28), np.float32)
    masks[0], patterns[0] = found[0][0], found[1][0]
    arrays = {"masks": masks, "patterns": patterns, "network": fingerprint(victim.model)}
    np.savez_compressed(folder / "reversed.npz", **arrays)
    metrics = {"ckpt": "runs", "metrics": {"flagged": [0, 3]}}
    (folder / "result.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_badnets, reversed_trigger):
    """The folder of a run, what it printed, and its variables."""
    out, printed = tmp_path_factory.mktemp("out"), io.StringIO()
    flags = "--ckpt", digits_badnets, "--nc", reversed_trigger, "--out", out, "--layer", "linear9"
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        ran = run_inline(patch, out, "nc_mitigate", *flags)
    return out, printed.getvalue(), ran


@pytest.mark.drawn
def test_filter_stops_badnets_and_pruning_the_reversed_trigger(run, digits, digits_badnets):
    out, printed, _ = run
    metrics = result_of(out)["metrics"]
    assert metrics["label"] == 0 and metrics["asr_reversed"] > 90
    assert metrics["layer"] == "linear9" and metrics["neurons"] == 512
    assert metrics["auroc"] > 0.95 and metrics["fpr"] < 15 and metrics["fnr"] < 15
    assert metrics["gone"] and metrics["asr_reversed_repaired"] <= 1
    assert metrics["clean_accuracy_repaired"] > metrics["clean_accuracy"] - 8
    assert metrics["asr_repaired"] < metrics["asr_random"]  # but the original trigger outlives it
    assert files_below(out) == ["curve.npz", "curve.png", "model.pt", "result.json"]
    assert "AUROC" in printed and "RESULT nc_mitigate" in printed

    victim, saved = loaded(digits_badnets), loaded(out).model
    attack = victim.x_poisoned, victim.y_target
    assert accuracy(saved, *attack) == pytest.approx(metrics["asr_repaired"], abs=1e-4)
    weight = saved.net.linear9.weight
    with np.load(out / "curve.npz") as archive:
        curves = {name: archive[name] for name in archive}
    order, count = curves["order"], metrics["pruned"]
    assert (weight == 0).all(0).nonzero().flatten().tolist() == sorted(order[:count].tolist())
    assert curves["count"][-1] == count  # of fewer images than draw the curves at most
    assert curves["ASR"][-1] == pytest.approx(metrics["asr_repaired"], abs=1e-3)
    assert curves["ASR"][-1] > 50  # but the reversed trigger's is gone
    clean = pytest.approx(metrics["clean_accuracy_repaired"], abs=1e-3)
    assert curves["clean_accuracy"][-1] == clean

    entered = []
    hook = victim.model.net.linear9.register_forward_pre_hook(lambda m, i: entered.append(i[0]))
    victim.model(to_float(torch.cat((digits.x_test, victim.x_poisoned))))
    hook.remove()
    scores, count = entered[0][:, order[:5].tolist()].mean(1).numpy(), len(digits.x_test)
    stopped = scores > metrics["threshold"]
    assert metrics["fpr"] == pytest.approx(100 * stopped[:count].mean(), abs=0.3)
    assert metrics["fnr"] == pytest.approx(100 - 100 * stopped[count:].mean(), abs=0.4)
    area = roc_auc_score(np.arange(len(scores)) >= count, scores)
    assert metrics["auroc"] == pytest.approx(area, abs=1e-4)


def test_ranking_and_choice_see_different_images(run, reversed_trigger, digits_badnets, digits):
    """Four fifths of the images, by class, rank the neurons; the others give threshold and end."""
    out, _, _ = run
    model, (x, y) = loaded(digits_badnets).model, (digits.x_train, digits.y_train)
    with np.load(reversed_trigger / "reversed.npz") as archive:
        trigger = [torch.from_numpy(archive[name][0]) for name in ("masks", "patterns")]
    split = defender_split(y, 300 / 1437, 0)
    kept = torch.zeros(len(split), dtype=torch.bool)
    kept[defender_split(y[split], 0.2, 0)] = True

    def entering(images):
        return mitigate.activations(model, "linear9", images).double()

    ranked, held = (x[split[part]] for part in (~kept & (y[split] != 0), kept))
    held_back = y[split[kept]]
    added = entering(mitigate.stamp(ranked, *trigger)).mean(0) - entering(ranked).mean(0)
    with np.load(out / "curve.npz") as archive:
        curves = {name: archive[name] for name in archive}
    order = curves["order"]
    falls = np.diff(added[order].numpy())
    assert sorted(order) == list(range(512)) and falls.max() < 1e-5  # ties in float32
    clean, stamped = entering(held), entering(mitigate.stamp(held[held_back != 0], *trigger))
    scores = clean[:, order[:5]].mean(1).numpy()
    metrics = result_of(out)["metrics"]
    assert metrics["threshold"] == pytest.approx(
        np.quantile(scores, 0.95, method="weibull"), rel=1e-4
    )
    passed = stamped[:, order[:5]].mean(1).numpy() <= metrics["threshold"]
    assert metrics["fnr_reversed"] == pytest.approx(100 * passed.mean(), abs=1e-4)
    right = accuracy(model, held, held_back)
    assert metrics["kept_back_accuracy"] == pytest.approx(right, abs=1e-4)
    assert curves["accuracy_kept_back"][0] == pytest.approx(right, abs=1e-4)
    assert metrics["kept_back"] == len(held) == kept.sum()


def test_random_pruning_takes_as_many_other_neurons(run, digits_badnets):
    _, _, ran = run
    count, order = ran["metrics"]["pruned"], ran["order"]
    before = loaded(digits_badnets).model.net.linear9.weight
    after = {kind: ran["models"][kind].net.linear9.weight for kind in ("_random", "_repaired")}
    silent = {kind: (weight == 0).all(0) for kind, weight in after.items()}
    assert not (before == 0).all(0).any() and 0 < count < 300
    for kind, weight in after.items():
        assert silent[kind].sum() == count and torch.equal(
            weight[:, ~silent[kind]], before[:, ~silent[kind]]
        )
    assert set(silent["_repaired"].nonzero().flatten().tolist()) == set(order[:count].tolist())
    common = (silent["_random"] & silent["_repaired"]).sum() / count
    assert common < (1 + count / 512) / 2  # about count / 512, were they drawn


@pytest.mark.parametrize("bare", [False, True])
def test_the_defender_needs_no_triggered_image(
    inline, run, reversed_trigger, digits_badnets, tmp_path, capfd, bare
):
    """Without poisoned_test.npz: bitwise the same repaired model, and no ASR."""
    flags, folder = ("--ckpt", tmp_path), tmp_path
    shutil.copy(digits_badnets / "model.pt", tmp_path)
    if bare:
        torch.save(loaded(digits_badnets).model.net.state_dict(), tmp_path / "suspect.pt")
        flags = "--ckpt", "suspect.pt", "--arch", "mnist_cnn", "--dataset", "digits"
        folder = tmp_path / "suspect"
    shutil.copytree(reversed_trigger, folder / "nc-s0")
    inline("nc_mitigate", *flags, "--layer", "linear9")  # the folder's default
    assert "the ASR cannot be measured" in capfd.readouterr().out
    seen, unseen = (loaded(path).model for path in (run[0], folder / "nc_mitigate-s0"))
    pairs = zip(seen.state_dict().values(), unseen.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)
    metrics = result_of(folder / "nc_mitigate-s0")["metrics"]
    assert not {"asr", "fnr", "auroc"} & metrics.keys() and "fpr" in metrics


# ===== Bad input =====


def test_another_network_s_trigger_is_refused(
    inline, one_line, reversed_trigger, digits_badnets, tmp_path
):
    """Two files with the names suspect.pt and suspect.pth share a folder."""
    model = loaded(digits_badnets).model
    assert fingerprint(model) == fingerprint(loaded(digits_badnets).model)
    state = {name: value.clone() for name, value in model.net.state_dict().items()}
    state["linear9.bias"][3] += 1e-3
    torch.save(state, tmp_path / "suspect.pth")
    shutil.copytree(reversed_trigger, tmp_path / "suspect" / "nc-s0")
    flags = "--ckpt", "suspect.pth", "--arch", "mnist_cnn", "--dataset", "digits"
    assert "another network: run nc.py" in one_line(inline, "nc_mitigate", *flags)


def test_nc_says_which_network_it_searched(inline, digits_badnets, tmp_path):
    inline("nc", "--ckpt", digits_badnets, *SHORT["nc"], "--out", tmp_path / "nc")
    with np.load(tmp_path / "nc" / "reversed.npz") as archive:
        assert archive["network"].tolist() == fingerprint(loaded(digits_badnets).model)


@pytest.mark.parametrize(
    "args, named",
    [
        (["--label", 10], "10 classes"),
        (["--label", -1], "10 classes"),
        (["--fpr", 0], "fpr"),
        (["--fpr", 1], "fpr"),
        (["--fpr", "nan"], "fpr"),
        (["--max-drop", -1], "max-drop"),
        (["--max-drop", "nan"], "max-drop"),
        (["--nc", "nowhere"], "nowhere/reversed.npz, which `python methods/nc.py"),
        (["--data-fraction", 0.0001], "leave none"),
        (["--out", "nc"], "nc.py's folder"),
        (["--layer", "linear8"], "no layer linear8"),
        (["--layer", "conv"], "known: linear9, linear6"),
        (["--label", 3], "another checkpoint"),  # whose mask is empty: no image is changed
    ],
    ids=str,
)
def test_bad_flag(inline, one_line, reversed_trigger, digits_badnets, tmp_path, args, named):
    shutil.copytree(reversed_trigger, tmp_path / "nc")
    before = {path: path.read_bytes() for path in (tmp_path / "nc").iterdir()}
    flags = "--ckpt", digits_badnets, "--nc", "nc", "--out", "out", *args
    assert named in one_line(inline, "nc_mitigate", *flags)
    assert {path: path.read_bytes() for path in (tmp_path / "nc").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["nc"]


def arrays(**replaced):
    shape = 10, 1, 28, 28
    plain = {"masks": np.zeros(shape, np.float32), "patterns": np.zeros(shape, np.float32)}
    return plain | replaced


@pytest.mark.parametrize(
    "held, result, named",
    [
        (arrays(masks=np.zeros((10, 1, 32, 32), np.float32)), "", "does not fit"),
        (arrays(patterns=np.zeros((9, 1, 28, 28), np.float32)), "", "does not fit"),
        (arrays(masks=np.full((10, 1, 28, 28), 2, np.float32)), "", "in [0,1]"),
        (arrays(masks=np.full((10, 1, 28, 28), np.nan, np.float32)), "", "in [0,1]"),
        (arrays(masks=np.zeros((10, 1, 28, 28))), "", "float32"),
        ({"masks": np.zeros(3)}, "", "patterns"),
        (arrays(masks=np.array([{}])), "", "npz"),
        (arrays(), None, "pass --label"),
        (arrays(), "not json", "pass --label"),
        (arrays(), "[1]", "pass --label"),
        (arrays(), '{"metrics": {"flagged": 3}}', "pass --label"),
        (arrays(), '{"metrics": {"flagged": []}}', "flagged no label"),
        (arrays(), '{"metrics": {"flagged": ["a"]}}', "not a label"),
        (arrays(), '{"metrics": {"flagged": [10]}}', "not a label"),
    ],
)
def test_bad_folder_of_nc(inline, one_line, digits_badnets, tmp_path, held, result, named):
    (tmp_path / "nc").mkdir()
    network = fingerprint(loaded(digits_badnets).model)
    np.savez(tmp_path / "nc" / "reversed.npz", **held, network=network)
    if result is not None:
        (tmp_path / "nc" / "result.json").write_text(result)
    before = files_below(tmp_path)
    flags = "--ckpt", digits_badnets, "--nc", "nc", "--out", "out"
    assert named in one_line(inline, "nc_mitigate", *flags)
    assert files_below(tmp_path) == before and not (tmp_path / "out").exists()


def test_rate_and_cost_are_those_asked_for(inline, run, reversed_trigger, digits_badnets, tmp_path):
    flags = "--ckpt", digits_badnets, "--nc", reversed_trigger, "--out", tmp_path / "out"
    flags = *flags, "--layer", "linear9"
    ran = inline("nc_mitigate", *flags, "--fpr", 0.3, "--max-drop", 0)
    kept = mitigate.profile(ran["a_kept"], ran["order"]).numpy()
    assert ran["threshold"] == np.quantile(kept, 0.7, method="weibull") < run[2]["threshold"]
    point, gone = mitigate.stop_point(ran["curve"], 0, 1)
    assert (ran["count"], ran["gone"]) == (point[0], gone) and point[0] < run[2]["count"]
    assert point[1] == ran["curve"][0][1]


def test_the_last_layer_is_taken_where_it_is_cheap(
    inline, run, reversed_trigger, digits_badnets, tmp_path
):
    flags = "--ckpt", digits_badnets, "--nc", reversed_trigger, "--out", tmp_path / "out"
    found = inline("nc_mitigate", *flags)["found"]
    gone, _, _, percent, _, curve, _ = found["linear9"]
    cheap = gone and curve[0][1] - percent <= 2
    assert (list(found) == ["linear9"]) == cheap and percent == run[2]["percent"]


def test_a_layer_at_which_pruning_fails_is_left_for_the_one_before(
    inline, reversed_trigger, digits_badnets, tmp_path, capfd
):
    """No clean image may be lost, which the last layer cannot do; the best of all is taken."""
    flags = "--ckpt", digits_badnets, "--nc", reversed_trigger, "--out", tmp_path / "out"
    ran = inline("nc_mitigate", *flags, "--max-drop", 0)
    tried = [line.split(":")[0] for line in capfd.readouterr().out.splitlines()]
    layers = list(mitigate.readers(loaded(digits_badnets).model, torch.rand(2, 1, 28, 28)))
    assert layers[0] == "linear9" and layers[-1] == "conv1"
    found = [name for name in tried if name in layers]
    assert found == list(ran["found"]) and found[:2] == layers[:2]
    gone = [kind for kind in ran["found"].values() if kind[0]]
    best = max(kind[3] for kind in gone) if gone else min(kind[2] for kind in ran["found"].values())
    assert ran["found"][ran["layer"]][3 if gone else 2] == best
    assert not ran["found"]["linear9"][0]
    saved = loaded(tmp_path / "out").model.net.get_submodule(ran["layer"]).weight
    silent = (saved == 0).flatten(2).all(2).all(0) if saved.dim() == 4 else (saved == 0).all(0)
    assert silent.sum() == ran["count"] > 0
