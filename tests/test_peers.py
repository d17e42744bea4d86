"""results/peers.py: the clone's own definitions run, on equal work; a wrong clone is refused."""

import pytest
import torch
from conftest import loaded

from results import peers

CPU = torch.device("cpu")
NEURAL_CLEANSE = """
import a_package_that_nobody_has
from defense.base import defense

class Normalize: pass
class Denormalize: pass

class Recorder:
    def __init__(self, options):
        assert options.init_cost == 1e-3
        self.reg_best = torch.tensor(7.0)

class RegressionModel(nn.Module):
    def __init__(self, options, mask, pattern, result):
        super().__init__()
        self.mask = nn.Parameter(torch.tensor(mask))
        self.pattern = nn.Parameter(torch.tensor(pattern))
        self.net = generate_cls_model(args.model, args.num_classes)
        self.net.load_state_dict(result["model"])

    def forward(self, x):
        return self.net((1 - self.mask) * x + self.mask * self.pattern)

def train_step(search, adam, loader, recorder, epoch, options):
    for x, y in loader:
        adam.zero_grad()
        search(x)[:, options.target_label].sum().backward()
        adam.step()
        seen.append((options.target_label, len(x)))
    return epoch == 2  # it stops early
"""
STRIP = """
import another_package_that_nobody_has

class STRIP:
    def __init__(self, args, inspected, clean, model, strip_alpha, N):
        self.model, self.count = model, N

    def check(self, x, y, pairs):
        for image, _ in pairs[:self.count]:
            seen.append(self.model(x + image).shape)
"""


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder like the clone, on small networks, and what its code was given."""
    for name, code in (("defense/nc.py", NEURAL_CLEANSE), ("detection_infer/strip.py", STRIP)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(code)
    seen, definitions = [], peers.definitions
    monkeypatch.setattr(
        peers, "definitions", lambda *args, **given: definitions(*args, **given, seen=seen)
    )
    build = peers.build_model
    monkeypatch.setattr(peers, "build_model", lambda _, *shape: build("mnist_cnn", *shape))
    return tmp_path, seen


def test_both_codes_search_over_as_many_images(clone, monkeypatch):
    folder, seen = clone
    work, search = [], peers.nc.reverse_triggers

    def watched(model, x, y, labels, **settings):
        work.extend((label, settings["batches"] * settings["batch_size"]) for label in labels)
        return search(model, x, y, labels, **settings)

    monkeypatch.setattr(peers.nc, "reverse_triggers", watched)
    (row,) = peers.neural_cleanse(folder, CPU, 1, images=64)
    assert seen == work == [(label, 64) for label in range(10)] * 2  # a warm-up and a run
    assert row[:2] == ["nc", "preact_resnet18 on CIFAR-10"] and float(row[2]) > 0


def test_both_codes_mix_as_many_images(clone, monkeypatch):
    folder, seen = clone
    monkeypatch.setattr(peers, "SUPERIMPOSED", [("mnist_cnn", "mnist", 6)])
    mixed, superimpose = [], peers.strip.superimpose

    def watched(x, overlays, *more):
        mixed.append(len(x) * len(overlays))
        return superimpose(x, overlays, *more)

    monkeypatch.setattr(peers.strip, "superimpose", watched)
    rows = list(peers.superimposed(folder, CPU, 1, overlays=10))
    assert [row[:2] for row in rows] == [["strip, 6 inputs", "mnist_cnn on mnist"]]
    assert seen == [(6, 10)] * 20 and sum(mixed) == 2 * 60


def test_both_codes_search_to_their_own_end(clone, monkeypatch, digits_badnets):
    """Theirs over 5 % of 1,437 images until it stops, ours over 10 %."""
    folder, seen = clone
    given, search = [], peers.nc.reverse_triggers

    def short(model, x, y, labels, **settings):
        given.append((len(x), len(y), labels, settings))
        return search(model, x, y, labels, **settings | {"steps": 2})

    monkeypatch.setattr(peers.nc, "reverse_triggers", short)
    (row,) = peers.whole_search(folder, loaded(digits_badnets), CPU)
    assert seen == [(0, 71)] * 3 and [part[:3] for part in given] == [(143, 143, [0])]
    defaults = run_defaults()
    assert {name: defaults[name] for name in given[0][3]} == given[0][3]
    assert row[0].startswith("nc, a whole search (norms 7.0 and ") and float(row[2]) > 0


def run_defaults():
    """What Neural Cleanse runs with where no flag is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nc.py", "--ckpt", "folder"])
        return vars(peers.nc.parse_args())


def test_rows_are_those_of_both(monkeypatch):
    """Theirs over ours, and a whole search where there is a victim for it."""
    monkeypatch.setattr(peers, "whole_search", lambda *_: [peers.line("e", "f", TAKEN)])
    monkeypatch.setattr(peers, "neural_cleanse", lambda *_: [peers.line("a", "b", TAKEN)])
    monkeypatch.setattr(peers, "superimposed", lambda *_: [peers.line("c", "d", TAKEN)])
    ends = ["1.50", "3.00 s", "2.00 s"]
    two = [["a", "b", *ends], ["c", "d", *ends]]
    assert peers.rows("clone", None, CPU, 1) == two
    assert peers.rows("clone", "victim", CPU, 1) == [*two, ["e", "f", *ends]]


TAKEN = {"theirs": 3.0, "ours": 2.0}


@pytest.mark.parametrize("code, named", [(None, "cannot be read"), ("x = 1", "Recorder")])
def test_a_folder_that_is_no_clone_is_refused(one_line, tmp_path, code, named):
    if code:
        (tmp_path / "nc.py").write_text(code)
    assert named in one_line(peers.definitions, tmp_path / "nc.py", peers.NC)
