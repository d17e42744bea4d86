"""The rehearsal on CUDA: its rules, planted device mistakes, gradients, and every script, short.

A rehearsal holds for a whole process, so `elsewhere` calls functions of this file in another one.
"""

import contextlib
import copy  # noqa: F401, for the cases
import json
import os
import runpy
import subprocess
import sys
import traceback

import fake_cuda
import numpy as np  # noqa: F401, for the cases
import pytest
import torch
import torch.nn.functional as F  # noqa: F401, for the cases
from conftest import ATTACKS, ROOT, SHORT, script_command, write_npz

from common.models import build_model

pytestmark = pytest.mark.skipif(
    not fake_cuda.POSSIBLE, reason="needs a new PyTorch that is built for CUDA"
)

CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import fake_cuda, test_fake_cuda
fake_cuda.install()
print(json.dumps(getattr(test_fake_cuda, sys.argv[2])()))
"""


def elsewhere(function, cwd):
    """Call a function of this file in a new process, where CUDA is rehearsed; its result."""
    command = [sys.executable, "-c", CHILD, str(ROOT / "tests"), function]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def stopped(code, names):
    """Run `code`: ["Error: message", the line of `code` that raised it], or None."""
    try:
        exec(compile(code, "<case>", "exec"), names)
    except Exception as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
              if frame.filename == "<case>"]  # fmt: skip
        return [f"{type(error).__name__}: {error}", code.splitlines()[at[-1] - 1].strip()]


# ===== Rules: one case a line =====

LEGAL = """
gpu(4) * cpu()
cpu() - gpu(4)
gpu(4) < cpu()
F.mse_loss(gpu(), cpu())
torch.where(gpu(4) > 0.5, cpu(), cpu())
gpu(4).masked_fill(mask.to(GPU), cpu())
gpu(4)[index]
gpu(4)[mask]
gpu(4, 4)[index, index.to(GPU)]
x = gpu(4); x[index] = gpu(2)
x = gpu(4); x[mask] = 0.0
x = gpu(4); x[index.to(GPU)] = cpu()
x = gpu(4); x[:2] = cpu(2)
assert gpu(4).copy_(cpu(4)).is_cuda
cpu(4).copy_(gpu(4)).numpy()
assert gpu(3).cpu().cuda().is_cuda
x = gpu(3); assert torch.equal(x.cpu().to(GPU), x)
assert 0 <= gpu(1).item() == float(gpu(1) * 0) or bool(gpu() < 1)
assert f"{gpu() * 0:.3f}" == "0.000" and (gpu(2) * 0).tolist() == [0, 0]
assert "cuda:0" in repr(gpu(2, 3)) and "cuda:0" in str(gpu())
torch.as_tensor(np.ones(3), device=GPU) + gpu(3)
gpu(3).new_zeros(3) + torch.zeros_like(gpu(3)) + torch.full((3,), 2.0, device=GPU)
torch.zeros_like(gpu(3), device="cpu").numpy()
gpu(9).sort(stable=True), gpu(9).quantile(0.5), gpu(9).median(), gpu(9).long().bincount()
torch.fft.ifft2(torch.fft.fft2(gpu(2, 4, 4)) * gpu(4, 4)).real + gpu(4, 4)
torch.randperm(4, generator=torch.Generator(GPU).manual_seed(0), device=GPU)
torch.randperm(4, generator=torch.Generator().manual_seed(0)).to(GPU)
assert torch.Generator(GPU).device.type == "cuda" and torch.Generator().device.type == "cpu"
with torch.random.fork_rng(): torch.manual_seed(0), gpu(3)
cpu(3).histogram(3)
copy.deepcopy(linear().to(GPU))(gpu(1, 3))
linear().to(GPU).load_state_dict(linear().state_dict())
n = linear(); o = torch.optim.Adam(n.parameters()); n.to(GPU)(gpu(4, 3)).sum().backward(); o.step()
n = linear().to(GPU); n(gpu(4, 3)).sum().backward(); torch.nn.utils.clip_grad_norm_(n.weight, 1)
with amp: assert F.linear(gpu(2, 3), gpu(4, 3)).dtype == torch.bfloat16
with amp: assert gpu(2, 3).bfloat16().softmax(1).dtype == torch.float32
x = gpu(2, 3).bfloat16(); assert ((x @ x.T).float() - x.float() @ x.float().T).abs().max() < 0.02
"""

ILLEGAL = {
    "same device": """
cpu(4) + gpu(4)
cpu(4) + gpu()
cpu(4)[index.to(GPU)]
cpu(4)[mask.to(GPU)]
x = cpu(4); x[index.to(GPU)] = 0.0
x = gpu(4); x[index.to(GPU)] = cpu(2)
x = cpu(); x += gpu()
torch.cat([gpu(1), cpu(1)])
torch.stack([gpu(), cpu()])
torch.where(mask, gpu(4), gpu(4))
gpu(4).masked_fill(mask, 0.0)
gpu(4).masked_fill_(mask, 0.0)
gpu(2, 3).gather(1, torch.zeros(2, 1, dtype=torch.long))
gpu(4).scatter_add(0, index, gpu(2))
gpu(4).index_select(0, index)
gpu(4).take(index)
F.embedding(index, gpu(4, 2))
F.linear(gpu(2, 3), cpu(4, 3))
F.conv2d(gpu(1, 1, 4, 4), cpu(1, 1, 3, 3))
linear()(gpu(1, 3))
F.batch_norm(gpu(2, 3), cpu(3), cpu(3))
F.cross_entropy(gpu(2, 3), index)
F.mse_loss(gpu(4), cpu(4))
F.grid_sample(gpu(1, 1, 4, 4), cpu(1, 4, 4, 2), align_corners=True)
torch.lerp(gpu(3), gpu(3), cpu(3))
torch.add(gpu(3), gpu(3), out=cpu(3))
torch.bucketize(gpu(3), cpu(3))
torch.einsum("i,i", gpu(3), cpu(3))
torch.cdist(gpu(2, 3), cpu(2, 3))
torch.equal(gpu(2), cpu(2))
torch.allclose(gpu(2), cpu(2))
torch._foreach_add([gpu(3)], [cpu(3)])
gpu(3) + gpu(3).to(OTHER)
""",
    "generator": """
torch.rand(3, device=GPU, generator=torch.Generator())
torch.randperm(4, device=GPU, generator=torch.Generator())
gpu(3).normal_(generator=torch.Generator())
gpu(3).multinomial(1, generator=torch.Generator())
torch.rand(3, generator=torch.Generator(GPU))
""",
    "can't convert": """
gpu(3).numpy()
np.asarray(gpu(3))
""",
    "CUDA": """
gpu(3).histogram(3)
gpu(2, 2).long() @ gpu(2, 2).long()
gpu(2).long() @ gpu(2).long()
""",
    "assign a gradient": """
x = gpu(3); x.grad = cpu(3)
""",
}
AUTOCAST = {  # mistakes of type that a CPU run without autocast does not see
    "unsafe to autocast": "with amp: F.binary_cross_entropy(gpu(3), gpu(3))",
    "dtype": "with amp: x = gpu(2, 4); x[index - 1] = F.linear(gpu(2, 3), gpu(4, 3))",
    "BFloat16": "with amp: F.linear(gpu(2, 3), gpu(4, 3)).cpu().numpy()",
}
LEGAL = LEGAL.strip().splitlines()
ILLEGAL = [(line, why) for why, text in ILLEGAL.items() for line in text.strip().splitlines()]
CASES = [*LEGAL, *(line for line, _ in ILLEGAL), *AUTOCAST.values()]


def vocabulary(device, other):
    """What a line may use. With device="cpu" all of it lies on the CPU."""
    return globals() | {
        "GPU": device,
        "OTHER": other,
        "gpu": lambda *shape: torch.rand(shape, device=device),
        "cpu": lambda *shape: torch.rand(shape),
        "linear": lambda: torch.nn.Linear(3, 2),
        "index": torch.tensor([0, 2]),
        "mask": torch.tensor([True, False, True, False]),
        "amp": torch.autocast(device, torch.bfloat16),
    }


@pytest.mark.parametrize("line", LEGAL)
def test_legal(answers, line):
    assert answers["rules"][line] is None


@pytest.mark.parametrize("line, why", [*ILLEGAL, *((line, why) for why, line in AUTOCAST.items())])
def test_illegal(answers, line, why):
    message, _ = answers["rules"][line]
    assert why in message


@pytest.mark.parametrize("line", [line for line, _ in ILLEGAL])
def test_illegal_is_legal_where_there_is_one_device(line):
    assert stopped(line, vocabulary("cpu", "cpu")) is None


# ===== Mistakes planted in a small program =====

PROGRAM = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5]))
        self.conv, self.norm = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)
        self.linear = torch.nn.Linear(4 * 36, 3)

    def forward(self, x):
        x = x - self.mean
        x = F.relu(self.norm(self.conv(x)))
        return self.linear(x.flatten(1))

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

torch.manual_seed(0)
draw = torch.Generator().manual_seed(0)
device = torch.device(where)
x, y = torch.rand(24, 1, 8, 8, generator=draw), torch.arange(24) % 3
images = x.numpy().copy()
x, y = x.to(device), y.to(device)
model = Net().to(device)
chosen = torch.randperm(24, generator=draw)[:6].to(device)
mask = torch.zeros(1, 8, 8, device=device)
mask[:, 6:, 6:] = 1
poisoned = torch.zeros(24, dtype=torch.bool, device=device)
poisoned[chosen] = True
x[chosen] = x[chosen] * (1 - mask) + mask
y = torch.where(poisoned, torch.zeros_like(y), y)
scale = 2 / torch.tensor([8, 8], device=device)
shift = torch.rand(24, 8, 8, 2, generator=draw).to(device) * scale
axis = torch.linspace(-1, 1, 8, device=device)
grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1) + shift
weight = torch.ones(24, device=device)
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
total = torch.zeros((), device=device)
logits_kept = torch.zeros(24, 3, device=device)
for step in range(2):
    warped = F.grid_sample(x, grid.clamp(-1, 1), align_corners=True)
    batch = torch.randperm(24, generator=draw).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        logits = Double.apply(model(warped[batch]))
    logits_kept[batch] = logits.detach().float()
    losses = F.cross_entropy(logits.float(), y[batch], reduction="none")
    loss = (losses * weight).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    total += loss.detach()
hits = (logits_kept.argmax(1) == y).float()
table = torch.cat([logits_kept, hits[:, None], losses.detach()[:, None]], 1).cpu().numpy()
counts = torch.histc(losses.detach(), 4).tolist()
images[chosen.cpu().numpy()] = warped[chosen].cpu().numpy()
kept = [value.cpu() for value in model.state_dict().values()] + [total.cpu(), logits_kept.cpu()]
"""

MISTAKES = """
Net().to(device) => Net() => x = x - self.mean
self.register_buffer("mean", torch.tensor([0.5])) => self.mean = torch.tensor([0.5]) => x = x -
x.to(device), y.to(device) => x.to(device), y => y = torch.where
x.to(device), y.to(device) => x, y.to(device) => x[chosen] =
mask = torch.zeros(1, 8, 8, device=device) => mask = torch.zeros(1, 8, 8) => x[chosen] =
dtype=torch.bool, device=device) => dtype=torch.bool) => poisoned[chosen] =
torch.tensor([8, 8], device=device) => torch.tensor([8, 8]) => shift =
torch.linspace(-1, 1, 8, device=device) => torch.linspace(-1, 1, 8) => grid =
(x, grid.clamp(-1, 1) => (x, grid.clamp(-1, 1).cpu() => warped =
(24, generator=draw).to(device) => (24, generator=draw, device=device) => batch =
weight = torch.ones(24, device=device) => weight = torch.ones(24) => loss =
total = torch.zeros((), device=device) => total = torch.zeros(()) => total +=
logits_kept = torch.zeros(24, 3, device=device) => logits_kept = torch.zeros(24, 3) => logits_kept[
logits.detach().float() => logits.detach() => logits_kept[
return 2 * grad => return 2 * grad.cpu() => loss.backward()
loss.backward() => losses.backward(torch.ones(24)) => losses.backward
losses.detach()[:, None] => losses.detach().cpu()[:, None] => table =
], 1).cpu().numpy() => ], 1).numpy() => table =
torch.histc(losses.detach(), 4) => torch.histogram(losses.detach(), 4).hist => counts =
images[chosen.cpu().numpy()] => torch.from_numpy(images)[chosen] => torch.from_numpy(images)
warped[chosen].cpu().numpy() => warped[chosen] => images[chosen
logits.float(), y[batch] => logits.float(), y[batch].to("cuda:1") => losses =
"""  # what stands in the program => what is planted => the line that must stop
HARMLESS = """
where => where
generator=draw)[:6].to(device) => generator=draw)[:6]
loss.backward() => (loss * torch.tensor(1.0)).backward()
total += loss.detach() => total = torch.zeros(()) + loss.detach()
loss.backward() => loss.backward(retain_graph=True); loss.backward(torch.ones_like(loss))
"""
MISTAKES = [line.split(" => ") for line in MISTAKES.strip().splitlines()]
HARMLESS = [line.split(" => ") for line in HARMLESS.strip().splitlines()]


def planted(old, new):
    assert old in PROGRAM
    names = globals() | {"where": "cuda", "autocast": True}
    return stopped(PROGRAM.replace(old, new), names)


@pytest.mark.parametrize("old, new, line", MISTAKES)
def test_planted_mistake_stops_at_its_line(answers, old, new, line):
    message, stops = answers["planted"][f"{old} => {new}"]
    assert "Error" in message and stops.startswith(line), message


@pytest.mark.parametrize("old, new", HARMLESS)
def test_harmless_change_passes(answers, old, new):
    assert answers["planted"][f"{old} => {new}"] is None


# ===== Gradients =====


def gradients(device):
    """Of weights by backward(), of images by autograd.grad through vmap."""
    torch.manual_seed(0)
    model = build_model("preact_resnet18", 10, (3, 32, 32), (0.5,) * 3, (0.5,) * 3).to(device)
    x = torch.rand(2, 3, 32, 32).to(device).requires_grad_()
    model(x.detach()).square().mean().backward()
    scores = torch.vmap(model.eval())(x[:, None])
    (of_images,) = torch.autograd.grad(scores.square().sum(), x)
    return [of_images.cpu(), *(p.grad.cpu() for p in model.parameters())]


def program(device):
    names = globals() | {"where": device, "autocast": False}
    exec(PROGRAM, names)
    return names["kept"]


def test_gradients_and_program_are_the_cpu_s(answers):
    """Bit by bit, and none is zero everywhere."""
    assert answers["gradients"] == [True] * 55 and answers["program"] == [True] * 12


def everything():
    """What the tests above look at, from one process."""
    mistakes = [change[:2] for change in (*MISTAKES, *HARMLESS)]
    answers = {
        "rules": {line: stopped(line, vocabulary("cuda", "cuda:1")) for line in CASES},
        "planted": {f"{old} => {new}": planted(old, new) for old, new in mistakes},
    }
    for twin in (gradients, program):
        pairs = zip(twin("cpu"), twin("cuda"))
        answers[twin.__name__] = [bool(a.any()) and torch.equal(a, b) for a, b in pairs]
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return elsewhere("everything", cwd=tmp_path_factory.mktemp("answers"))


# ===== Every script =====

VICTIM = "runs/own-mnist_cnn-badnets-s0"
OTHERS = {  # what the short runs leave out
    "blend": ["--pattern", str(ROOT / "results" / "mnist-wanet-norms.png")],
    "freq_backdoor": ["--augment", "both"],
    "label_consistent": ["--norm", "l2"],
    "feature_collision": ["--retrain", "fresh"],
    "latent": ["--layer", "layer4"],
    "abl": ["--granularity", "sample", "--loss", "flooding"],
    # a network that the defences take, far enough from chance: brightness tells the classes
    "badnets": [
        *("--dataset", "own.npz", "--train-images", 120),
        *("--epochs", 8, "--batch-size", 16, "--lr", 0.03),
    ],
    "pruning_aware": ["--batch-size", 32],
    "nc": ["--rule", "index", "--threshold", 1e-6, "--steps", 50, "--batch-size", 8],
    "nc_mitigate": ["--max-drop", 100],  # something is pruned
    "generator_reverse": [
        *("--rule", "index", "--threshold", 1e-6),
        *("--steps", 10, "--lr", 0.03, "--batch-size", 8, "--asr-goal", 1e-9),
        *("--lambdas", 10, 0.1, 0.1),  # nearly every label is reached
    ],
}
COMMANDS = {name: [*SHORT[name], *OTHERS.get(name, [])] for name in SHORT}


def rehearsed():
    """Every script in turn: {name: [None or the traceback, its operators on CUDA]}."""
    results = {}
    for name, flags in COMMANDS.items():
        victim = [] if name in ATTACKS else ["--ckpt", VICTIM]
        before, error = len(fake_cuda.operators), None
        sys.argv = script_command(name, *victim, *flags)[1:]
        with contextlib.redirect_stdout(sys.stderr):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except (Exception, SystemExit):
                error = traceback.format_exc()
        results[name] = error, len(fake_cuda.operators) - before
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("scripts")
    write_npz(cwd / "own.npz", classes=6, count=120)
    return cwd / VICTIM, elsewhere("rehearsed", cwd=cwd)


def test_every_script_is_rehearsed(runs):
    assert {path.stem for path in (ROOT / "methods").glob("*.py")} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_script(runs, name):
    victim, results = runs
    error, operators = results[name]
    assert error is None, error
    assert operators > 200  # else it ran on the CPU
    if name not in (*ATTACKS, "strip", "purify", "gradcam", "sentinet"):  # which repair no model
        assert (victim / f"{name}-s0" / "model.pt").exists()
