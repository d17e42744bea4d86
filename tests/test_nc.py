"""Neural Cleanse against a model with known answers, a second state machine, and on digits."""

import contextlib
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import loaded, result_of, run_inline
from matplotlib.axes import Axes
from planted import CLASSES, PLANTED, SIDE, SMALLEST, TARGET, frozen, images, index_of
from torch import nn

from common.checkpoint import read_checkpoint
from common.metrics import accuracy, verdict
from common.models import Classifier
from methods import nc

ALL = list(range(CLASSES))


class Steps:
    """In tqdm's place: counts the steps that are taken."""

    def __init__(self, steps, **settings):
        self.steps, self.taken = steps, 0

    def __iter__(self):
        for step in self.steps:
            yield step
            self.taken += 1

    def set_postfix(self, **fields):
        pass

    def close(self):
        pass


def reverse(model, labels=ALL, data=None, steps=300, batches=4, batch_size=128, lr=0.1, seed=0):
    """reverse_triggers with the notes' settings; also how many steps it took."""
    bars = []
    settings = {"steps": steps, "batches": batches, "batch_size": batch_size}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nc, "tqdm", lambda *a, **k: bars.append(Steps(*a, **k)) or bars[-1])
        found = nc.reverse_triggers(
            model, *(data or images()), labels, **settings, lr=lr, seed=seed
        )
    return *found, bars[0].taken


@pytest.fixture(scope="module")
def linear():
    """The search on the planted model, with what `advance` saw of each label."""
    seen = {}
    original = nc.advance

    def watch(search, asr, norm):
        history = seen.setdefault(id(search), [])
        history.append((search, search.cost, asr, norm))
        return original(search, asr, norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nc, "advance", watch)
        result = reverse(frozen())
    return result, list(seen.values())


# ===== The closed form =====


def check_norms(norms, expected):
    """Half a per cent of images may resist, and a mask is never quite black: +-7 %."""
    np.testing.assert_allclose(norms, expected, rtol=0.07)
    assert (np.delete(norms, TARGET) > 2).all()


def test_planted_pixel_is_found(linear):
    (masks, patterns, norms, found, steps), _ = linear
    check_norms(norms, PLANTED)
    assert all(found) and steps < 200  # of 300: every label stopped early
    mask, pattern = masks[TARGET, 0].flatten(), patterns[TARGET, 0].flatten()
    assert mask.argmax() == 0 and mask[0] > 0.45 and mask[1:].max() < 0.02 and pattern[0] > 0.95
    decision = verdict(norms, found)
    assert decision["flagged_by_index"] == [TARGET] and decision["label"] == TARGET
    assert decision["index"] == pytest.approx(index_of(PLANTED), abs=0.3)  # 2.59


@pytest.mark.parametrize("path, seed", [("gated", 0), ("none", 0), ("none", 1), ("none", 2)])
def test_gated_trigger_is_missed_and_a_clean_model_passes(path, seed):
    """Without a gradient below half white the clean solution is found: the documented failure.

    Measured on clean models of five seeds: index 1.17 to 1.19, from blocks of 8 to 17 pixels.
    """
    _, _, norms, found, _ = reverse(frozen(path), seed=seed)
    check_norms(norms, SMALLEST)
    decision = verdict(norms, found)
    assert all(found) and decision["flagged_by_index"] == []
    assert index_of(norms) == decision["index"] == pytest.approx(1.2, abs=0.1)


def test_masks_and_patterns(linear):
    (masks, patterns, norms, _, _), _ = linear
    assert masks.shape == (CLASSES, 1, SIDE, SIDE) == patterns.shape
    for tensor in (masks, patterns):
        assert tensor.dtype == torch.float32 and 0 <= tensor.min() <= tensor.max() <= 1
        assert not tensor.requires_grad
    np.testing.assert_allclose(norms, masks.numpy().sum((1, 2, 3)), rtol=1e-5)


def test_one_mask_for_all_channels():
    x, y = images(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, CLASSES)).requires_grad_(False)
    masks, patterns, *_ = reverse(model, [1, 4], (x.expand(-1, 3, -1, -1), y), steps=2)
    assert masks.shape == (2, 1, SIDE, SIDE) and patterns.shape == (2, 3, SIDE, SIDE)


def test_blend_is_equation_2():
    rng = np.random.default_rng(0)
    x, mask, pattern = (
        rng.random(shape, np.float32) for shape in ((5, 3, 4, 6), (2, 1, 4, 6), (2, 3, 4, 6))
    )
    expected = [[(1 - m) * image + m * p for image in x] for m, p in zip(mask, pattern)]
    result = nc.blend(*map(torch.from_numpy, (x, mask, pattern)))
    np.testing.assert_allclose(result, expected, rtol=1e-6)


# ===== The search =====


def test_returned_trigger_reaches_the_goal(linear):
    """The last mask under a rising cost need not; the best one does, on all other images."""
    (masks, patterns, _, _, _), histories = linear
    x, y = images()
    for label in ALL:
        stamped = (1 - masks[label]) * x + masks[label] * patterns[label]
        hits = frozen()(stamped[y != label]).argmax(1) == label
        assert hits.float().mean() >= 0.97  # the step that was measured lies 1 update before
    for history, mask in zip(histories, masks):
        successes = [norm for _, _, asr, norm in history if asr >= 0.99]
        assert history[-1][0].best == min(successes)
        assert mask.sum().item() == pytest.approx(min(successes), rel=0.05)
        failures = [norm for _, _, asr, norm in history if asr < 0.99]
        assert min(failures) < min(successes)  # smaller masks were seen and not taken


def test_cost_starts_at_zero_for_every_label_and_moves(linear):
    _, histories = linear
    assert len(histories) == CLASSES
    for history in histories:
        costs = [cost for _, cost, _, _ in history]
        assert (
            costs[0] == 0
            and max(costs) >= 8e-3
            and costs.index(1e-3)
            == next(
                i for i in range(5, len(costs)) if all(h[2] >= 0.99 for h in history[i - 5 : i])
            )
        )
        search = history[-1][0]
        assert search.done and search.went_up and search.went_down
        assert history[0][3] == pytest.approx(SIDE**2 / 2, rel=0.3)  # a fresh mask, not the last


@pytest.mark.drawn
@pytest.mark.parametrize("indices", [None, [None, 0.0, 2.5, float("inf")]])
def test_figure_of_labels_without_an_index(monkeypatch, tmp_path, indices):
    """The index of a failed search is None, and there is none at all below 5 labels."""
    shown, write = [], Axes.set_xticklabels
    monkeypatch.setattr(
        Axes, "set_xticklabels", lambda axis, t, **kw: shown.extend(t) or write(axis, t, **kw)
    )
    masks, patterns = torch.rand(4, 1, 8, 8), torch.rand(4, 3, 8, 8)
    nc.draw(tmp_path / "reversed.png", masks, patterns, [1.0, 2.0, 3.0, 4.0], indices)
    ends = ["n/a", "0.00", "2.50", "inf"] if indices else ["1.0", "2.0", "3.0", "4.0"]
    assert [text.split()[-1] for text in shown] == ends
    assert (tmp_path / "reversed.png").stat().st_size > 1000


def test_labels_start_from_their_own_draw():
    starts, again = (reverse(frozen(), steps=1, batches=1, lr=1e-9)[:2] for _ in range(2))
    for start, same in zip(starts, again):
        assert torch.equal(start, same)
        assert len(start.flatten(1).unique(dim=0)) == CLASSES
        assert start.mean().item() == pytest.approx(0.5, abs=0.03)
        assert start.std().item() == pytest.approx(12**-0.5, abs=0.02)  # uniform
    assert not torch.equal(starts[0], reverse(frozen(), steps=1, lr=1e-9, seed=1)[0])


@pytest.fixture(scope="module")
def few_steps():
    """All labels at once, after 40 steps."""
    return reverse(frozen(), steps=40)


@pytest.mark.parametrize("split", [[ALL[::-1]], [[0], [3], [7]], [[9, 3, 1], [8, 4]]])
def test_neither_order_nor_folding_matters(linear, few_steps, split):
    """Another order to the end, when the labels stop one by one; parts of them for 40 steps."""
    whole = len(split) == 1
    masks, _, norms, found, _ = linear[0] if whole else few_steps
    for labels in split:
        own_masks, _, own_norms, own_found, _ = reverse(
            frozen(), labels, steps=300 if whole else 40
        )
        np.testing.assert_allclose(own_norms, [norms[k] for k in labels], rtol=1e-3)
        torch.testing.assert_close(own_masks, masks[labels], rtol=0, atol=1e-3)
        assert own_found == [found[k] for k in labels]


def test_label_that_cannot_be_reached_is_not_found():
    model = frozen()
    model.linear.weight[7] = -1
    *_, found, steps = reverse(model, [3, 7], steps=150)
    assert found == [True, False] and steps == 150


class Brightness(nn.Module):
    """Says TARGET for bright images (sign +1) or for dark ones (-1), else class 0."""

    def __init__(self, sign):
        super().__init__()
        self.sign = sign

    def forward(self, x):
        score = 100 * self.sign * (x.mean((1, 2, 3)) - 0.5)
        return F.one_hot(torch.tensor(TARGET), CLASSES) * score[:, None]


@pytest.mark.parametrize("steps, sure", [(6, False), (300, True)])
def test_a_search_that_was_cut_short_is_not_found(steps, sure):
    """Half an image at random may reach the goal at once: its norm says nothing yet."""
    *_, norms, found, _ = reverse(frozen(), steps=steps)
    assert found[TARGET] is sure and min(norms) > 0


@pytest.mark.parametrize("sign, asr", [(1, 0), (-1, 1)])
def test_images_of_the_label_neither_succeed_nor_fail(monkeypatch, sign, asr):
    """38 of 40 images are of class TARGET and bright: only the two others count."""
    seen = []
    monkeypatch.setattr(nc, "advance", lambda search, *figures: seen.append(figures[0]))
    y = torch.full((40,), TARGET)
    y[:2] = 5
    x = (y == TARGET).float().view(-1, 1, 1, 1).expand(-1, 1, SIDE, SIDE)
    reverse(Brightness(sign), [TARGET], (x, y), steps=1, lr=1e-9)
    assert seen == [asr]


@pytest.mark.parametrize("cost", [0.0, 0.01, 1.0])
def test_one_update_follows_the_plain_gradient(monkeypatch, untrained, cost):
    """Eq. (3) of one label at a time, by autograd: mean CE over other images + lambda |m|_1."""
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, betas: torch.optim.SGD(p, lr))
    monkeypatch.setattr(nc, "Search", lambda search=nc.Search: search(cost=cost))
    data, labels = (torch.rand(12, 1, 28, 28), torch.arange(12) % 5), [1, 4]
    before, after = (
        reverse(untrained, labels, data, 1, batches, batch_size=12, lr=0.5)[:2]
        for batches in (1, 2)  # the second batch sees the first one's update
    )
    for i, label in enumerate(labels):
        start = [torch.special.logit(tensor[i]) / 2 for tensor in before]
        free = [w.requires_grad_() for w in start]
        mask, pattern = (torch.sigmoid(2 * w) for w in free)  # = tanh(w) / 2 + .5
        x = data[0][data[1] != label]
        stamped = (1 - mask) * x + mask * pattern
        loss = F.cross_entropy(untrained(stamped), torch.full((len(x),), label))
        (loss + cost * mask.sum()).backward()
        for w, tensor in zip(free, after):
            expected = torch.sigmoid(2 * (w - 0.5 * w.grad)).detach()
            torch.testing.assert_close(tensor[i], expected, rtol=0, atol=1e-5)


def test_images_of_the_label_do_not_train_its_trigger():
    x, y = images()
    noise = torch.where((y == TARGET).view(-1, 1, 1, 1), torch.rand(x.shape), x)
    runs = [reverse(frozen(), [TARGET, 5], (data, y), steps=10) for data in (x, noise)]
    for a, b in zip(runs[0][:2], runs[1][:2]):
        assert torch.equal(a[0], b[0]) and not torch.equal(a[1], b[1])


def test_search_leaves_model_and_images_alone(untrained):
    before = {k: v.clone() for k, v in untrained.state_dict().items()}
    x, y = torch.rand(20, 1, 28, 28), torch.arange(20) % CLASSES
    kept = x.clone()
    reverse(untrained, [0, 1], (x, y), steps=3)
    assert torch.equal(x, kept)
    assert all(torch.equal(v, before[k]) for k, v in untrained.state_dict().items())


def test_diverging_search_is_refused(one_line):
    class Broken(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :CLASSES] * math.nan

    one_line(reverse, Broken(), steps=2)


# ===== The state machine =====


class Reference:
    """The notes' account of the authors' code, rule by rule."""

    def __init__(self):
        self.lam, self.r_best, self.es_best = 0.0, np.inf, np.inf
        self.counts = dict.fromkeys(["zero", "es", "up", "down"], 0)
        self.flags, self.stopped = set(), False

    def step(self, a, r):
        success, counts, took = a >= 0.99, self.counts, False
        if success and r < self.r_best:  # 1
            self.r_best, took = r, True
        if self.r_best < np.inf:  # 2
            counts["es"] = counts["es"] + 1 if self.r_best >= 1.0 * self.es_best else 0
            self.es_best = min(self.es_best, self.r_best)
            if self.flags == {"up", "down"} and counts["es"] >= 25:
                self.stopped = True
                return took
        if self.lam == 0 and success:  # 3
            counts["zero"] += 1
            if counts["zero"] >= 5:
                self.lam = 1e-3
                counts["up"] = counts["down"] = 0
                self.flags = set()
        else:
            counts["zero"] = 0
        moved, other = ("up", "down") if success else ("down", "up")  # 4
        counts[moved], counts[other] = counts[moved] + 1, 0
        if counts[moved] >= 5:
            self.lam = self.lam * 2 if success else self.lam / 2**1.5
            counts[moved] = 0
            self.flags.add(moved)
        return took


def script(rng):
    """(asr, norm) pairs: sticky successes, norms that fall, tie and rise again."""
    stay, success, norm = rng.choice([0.5, 0.8, 0.95, 0.99]), rng.random() < 0.5, 100.0
    for _ in range(400):
        success = success if rng.random() < stay else not success
        norm *= rng.choice([0.9, 1, 1, 1.05])
        asr = rng.choice([0.99, 0.995, 1.0] if success else [0.0, 0.7, 0.98999])
        yield float(asr), float(norm)


@pytest.mark.parametrize("seed", range(60))
def test_state_machine_against_a_second_one(seed):
    search, reference = nc.Search(), Reference()
    for asr, norm in script(np.random.default_rng(seed)):
        assert nc.advance(search, asr, norm) == reference.step(asr, norm)
        assert search.cost == pytest.approx(reference.lam, rel=1e-12)
        counts = {"es": search.stop_count, "up": search.up, "down": search.down}
        if search.cost == 0:  # counted only then
            counts["zero"] = search.zero_count
        assert counts.items() <= reference.counts.items()
        assert (search.best, search.stop_best) == (reference.r_best, reference.es_best)
        flags = {"up": search.went_up, "down": search.went_down}
        assert {name for name, on in flags.items() if on} == reference.flags
        assert search.done == reference.stopped
        if search.done:
            break


def drive(*runs):
    """(asr, norm, times) each: the search after them."""
    search = nc.Search()
    for asr, norm, times in runs:
        for _ in range(times):
            nc.advance(search, asr, norm)
    return search


def test_state_machine_by_hand():
    assert drive((1, 9, 4)).cost == 0 and drive((1, 9, 5)).cost == 1e-3
    assert drive((1, 9, 4), (0.98, 9, 1), (1, 9, 4)).cost == 0  # in a row
    assert drive((1, 9, 9)).cost == 2e-3 and drive((1, 9, 14)).cost == 4e-3
    assert drive((1, 9, 5), (0, 9, 5)).cost == pytest.approx(1e-3 / 2**1.5)
    assert drive((0, 1, 50)).best == math.inf and drive((0.5, 1, 9), (1, 4, 1)).best == 4
    assert not drive((1, 9, 500)).done  # lambda never went down
    assert not drive((0, 9, 500)).done  # no success yet
    stuck = (1, 9, 10), (0, 9, 5)
    assert not drive(*stuck, (1, 9, 10)).done and drive(*stuck, (1, 9, 11)).done  # 26 at one norm


# ===== Unlearning =====


class Recorder(nn.Module):
    """A linear classifier that keeps what it is trained on; its copies share the list."""

    def __init__(self, classes, seen):
        super().__init__()
        self.linear, self.norm = nn.Linear(64, classes), nn.BatchNorm1d(64)
        self.see = seen.append

    def forward(self, x):
        if self.training:
            self.see(x.detach().clone())
        return self.linear(self.norm(x.flatten(1)))


@pytest.mark.parametrize("stamped", [0.2, 1.0, None])
def test_unlearn_stamps_other_classes_and_keeps_labels(monkeypatch, stamped):
    """Pixels 0 to 2 hold each image's number and label, so that order does not matter."""
    count, label, seen, labels = 3000, 2, [], []
    number, y = torch.arange(count), torch.arange(count) % 5
    x = torch.randint(0, 256, (count, 1, 8, 8)).byte()
    x[:, 0, 0, :3] = torch.stack((number // 256, number % 256, y), 1).byte()
    mask, pattern = torch.zeros(1, 8, 8), torch.rand(1, 8, 8)
    mask[:, 5:] = torch.rand(3, 8)
    entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda z, y: (labels.append(y), entropy(z, y))[1])
    model = Recorder(5, seen).eval().requires_grad_(False)
    before, kept = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    patch = (None, None) if stamped is None else (mask, pattern)
    repaired = nc.unlearn(model, x, y, label, *patch, stamped=stamped, lr=0.01)

    assert torch.equal(x, kept) and not model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not repaired.training and not any(p.requires_grad for p in repaired.parameters())
    assert not torch.equal(repaired.linear.weight, before["linear.weight"])
    seen, labels = torch.cat(seen), torch.cat(labels)
    code = (255 * seen[:, 0, 0, :3]).round().long()
    number = 256 * code[:, 0] + code[:, 1]
    assert sorted(number.tolist()) == list(range(count))  # one epoch
    assert torch.equal(labels, code[:, 2]) and torch.equal(labels, y[number])
    plain = x[number].float() / 255
    changed = (seen != plain).flatten(1).any(1)
    expected = plain * (1 - mask) + mask * pattern
    torch.testing.assert_close(seen[changed], expected[changed])
    assert not changed[labels == label].any()
    share = changed[labels != label].float().mean().item()
    assert share == pytest.approx(stamped or 0, abs=0.03 * (stamped != 1))


def test_unlearning_lowers_the_planted_weight_alone():
    """The clean-only baseline cannot touch it: pixel 0 is black in all its images."""
    x, y = images(40)
    mask = torch.zeros(1, SIDE, SIDE)
    mask[0, 0, 0] = 1
    model, x = frozen(), (255 * x).round().byte()
    patches = (mask, torch.ones(1, SIDE, SIDE)), (None, None)
    torch.manual_seed(0)
    after, baseline = (
        nc.unlearn(model, x, y, TARGET, *patch, stamped=0.2, lr=5).linear.weight
        for patch in patches
    )
    assert after[TARGET, 0] < 15 and baseline[TARGET, 0] == 20
    assert not torch.equal(baseline, model.linear.weight)


@pytest.mark.parametrize("stamped", [0.2, 1.0])
def test_original_trigger_comes_with_the_true_labels(stamped):
    """Pixels 0 and 1 hold whether an image is triggered and its true label."""
    count, label, seen = 3000, 2, []
    y, y_true = torch.arange(count) % 5, torch.arange(700) % 4
    x, x_triggered = torch.zeros(2, count, 1, 8, 8, dtype=torch.uint8)
    x_triggered = x_triggered[:700].clone()
    x_triggered[:, 0, 0, 0], x_triggered[:, 0, 0, 1] = 1, y_true.byte()
    x[:, 0, 0, 1] = y.byte()
    kept, entropy, labels = x.clone(), F.cross_entropy, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "cross_entropy", lambda z, y: (labels.append(y), entropy(z, y))[1])
        model = Recorder(5, seen).eval().requires_grad_(False)
        rates = {"stamped": stamped, "lr": 0.01}
        repaired = nc.unlearn_original(model, x, y, label, x_triggered, y_true, **rates)
    assert not torch.equal(repaired.linear.weight, model.linear.weight) and torch.equal(x, kept)
    code, labels = (255 * torch.cat(seen)[:, 0, 0, :2]).round().long(), torch.cat(labels)
    assert len(labels) == count and torch.equal(code[:, 1], labels)
    clean = labels[code[:, 0] == 0]
    assert (clean == label).sum() == count / 5  # images of the label stay as they are
    others = 1 - (len(clean) - count / 5) / (count * 4 / 5)
    assert others == pytest.approx(stamped, abs=0.03 * (stamped != 1))


@pytest.mark.parametrize("count, lr", [(200, 1e30), (20, 1e38)])
def test_diverging_unlearning_gives_no_model(untrained, count, lr):
    """With 20 images there is a single step, after which no loss is computed."""
    x, y = torch.randint(0, 256, (count, 1, 28, 28)).byte(), torch.arange(count) % CLASSES
    assert nc.unlearn(untrained, x, y, 0, None, None, stamped=0.2, lr=lr) is None


# ===== A whole run on digits, through the command line =====


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_badnets):
    """A short search: its folder, what it printed, its variables.

    Threshold 1.5: the clean digits' norms are too widely spread for 2.
    """
    out, printed = tmp_path_factory.mktemp("nc"), io.StringIO()
    flags = "--steps", 180, "--batches", 1, "--batch-size", 16, "--data-fraction", 0.3
    flags += "--rule", "index", "--threshold", 1.5
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        ran = run_inline(patch, out, "nc", "--ckpt", digits_badnets, "--out", out, *flags)
    return out, printed.getvalue(), ran


def test_run_finds_the_target_and_removes_the_backdoor(run):
    out, printed, _ = run
    metrics = result_of(out)["metrics"]
    assert metrics["label"] == 0 == metrics["flagged"][0] and metrics["case"] == 1
    assert metrics["ratio"] < 0.5 and "backdoored, labels [0" in printed
    assert metrics["asr"] > 95 and metrics["asr_repaired"] < 5 < 90 < metrics["asr_clean_only"]
    assert metrics["clean_accuracy_repaired"] > metrics["clean_accuracy"] - 10
    assert metrics["robust_accuracy_repaired"] > 80
    finished = [norm for norm, found in zip(metrics["norms"], metrics["found"]) if found]
    assert metrics["index"] == pytest.approx(index_of(finished)) and len(finished) >= 5


def test_original_trigger_is_the_bound(run, digits_badnets):
    """Unlearnt on half of the triggered images, read on the other half."""
    out, printed, ran = run
    metrics = result_of(out)["metrics"]
    assert metrics["asr_original_trigger"] < 5
    hits = metrics["asr_original_trigger"] / 100 * (metrics["asr_n"] / 2)
    assert hits == pytest.approx(round(hits), abs=1e-3)
    assert metrics["clean_accuracy_original_trigger"] > metrics["clean_accuracy"] - 10
    assert f"{metrics['asr_original_trigger']:.2f} original trigger" in printed
    victim, data = loaded(digits_badnets), ran["data"]
    half = int(metrics["asr_n"] / 2)
    carriers = (data.y_test != 0).nonzero().flatten()  # of the triggered images, in their order
    taught = ran["given"][3]
    triggered = [image.numpy().tobytes() for image in victim.x_poisoned]
    numbers = [triggered.index(image.numpy().tobytes()) for image in taught]
    assert len(set(triggered)) == 2 * half and len(set(numbers)) == half == len(numbers)
    left = [k for k in range(2 * half) if k not in set(numbers)]
    hits = accuracy(ran["bound"], victim.x_poisoned[left], torch.zeros(half))
    unseen = torch.ones(len(data.y_test), dtype=torch.bool)
    unseen[carriers[numbers]] = False  # the clean images behind those that taught
    right = accuracy(ran["bound"], data.x_test[unseen], data.y_test[unseen])
    assert metrics["asr_original_trigger"] == pytest.approx(hits, abs=1e-4)
    assert metrics["clean_accuracy_original_trigger"] == pytest.approx(right, abs=1e-4)
    tokens = {image.numpy().tobytes() for image in ran["images"]["asr"][0]}
    assert tokens == {triggered[k] for k in left}


def test_saved_model_is_the_repaired_one(run, digits_badnets):
    out, _, _ = run
    victim, repaired = loaded(digits_badnets), loaded(out)
    metrics, attack = result_of(out)["metrics"], (victim.x_poisoned, victim.y_target)
    for key, tensor in victim.model.state_dict().items():
        if "weight" in key:
            assert not torch.equal(tensor, repaired.model.state_dict()[key]), key
    assert accuracy(repaired.model, *attack) == pytest.approx(metrics["asr_repaired"], abs=1e-4)
    assert accuracy(victim.model, *attack) == pytest.approx(metrics["asr"], abs=1e-4)
    assert accuracy(repaired.model, *attack) < accuracy(victim.model, *attack) - 80


def test_saved_trigger_is_the_reversed_one(run):
    """As tensors; a stretched picture would differ."""
    out, _, _ = run
    trigger = read_checkpoint(out / "model.pt")["trigger"]
    with np.load(out / "reversed.npz") as archive:
        masks, patterns = archive["masks"], archive["patterns"]
    assert masks.dtype == patterns.dtype == np.float32
    assert masks.shape == patterns.shape == (10, 1, 28, 28)
    np.testing.assert_array_equal(trigger["mask"], masks[0])
    np.testing.assert_array_equal(trigger["pattern"], patterns[0])
    norms = result_of(out)["metrics"]["norms"]
    np.testing.assert_allclose(masks.sum((1, 2, 3)), norms, rtol=1e-5)
    assert (
        masks[0, 0, 20:, 20:].sum() > 0.3 * masks[0].sum()
    )  # the corner of the patch, a twelfth of the image


def test_unlearning_vectors_where_one_image_is_left_over():
    """BatchNorm1d takes no batch of one: the image is left out, not the repair."""
    layers = nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
    net = Classifier(nn.Sequential(*layers), (0.5,), (0.5,))
    x, y = torch.randint(256, (33, 1, 28, 28)).byte(), torch.arange(33) % 3
    model = nc.unlearn(net, x, y, 0, None, None, stamped=0, lr=0.01, batch_size=32)
    assert not torch.equal(model.net[1].weight, net.net[1].weight)
