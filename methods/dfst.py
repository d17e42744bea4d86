"""Deep Feature Space Trojan: a style as the trigger, and detoxification (Cheng et al., AAAI 2021).

arXiv 2012.11212. A generator paints a share of the training images in the style of another picture;
they get the target's label. A network would learn something simple of it, such as a tint. So the
attacker trains an injector that excites the trigger's neurons by simple means, adds images with
this feature and their TRUE labels (detox) and retrains, until only the style should be left.

Threat model: the attacker controls training, delivers the model and keeps the generator.

Equations: AdaIN gives each channel of E(x) the mean and deviation that it has for the style ->
adain; G(x) = clip(x + alpha [D(AdaIN(E(x), style)) - D(E(x))], 0, 1) -> stylise; neurons whose
mean rises most -> compromised; I(x) = clip(W [x, max-, min-, mean-pooled x] + b, 0, 1) -> Injector;
cross-entropy to the target + .3 activation loss + lambda (1 - SSIM(I(x), x)) -> train_injector.

Differs from the paper: its generator is a CycleGAN for sunrises; here E and D are an autoencoder,
trained on the attacker's images, for one drawn sunrise, and what D itself does to an image is taken
out, for a network can learn that alone. The injector is the linear map of their PyTorch code, not
the paper's U-Net; in the code no gradient of the classifier reaches it, and its smallest neighbour
is wrong: here both are right. Its activation loss is the squared distance to the painted images'
means, where the code pushes a neuron or a mean without bound and mixes I(x) with x. The rounds are
a fixed number, and each keeps the images of those before; the code draws anew in each batch.

What was learnt: asr_other is the ASR of the style picture's negative, its change scaled to the same
size; asr_plain that of D(E(x)); asr_simple the largest of the trained injectors at their end (new
ones may find more), asr_simple_before that before detoxification (training images).

    python methods/dfst.py --dataset cifar10 --arch wrn16_1

Results beside other papers' figures: results/README.md, table "Attacks".
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, fail
from common.attack import (
    TrainingLog,
    attack_flags,
    choose_poisons,
    evaluate_attack,
    open_folder,
    save_attack,
    set_up,
    wanted_labels,
)
from common.datasets import augment, to_float, to_uint8
from common.metrics import accuracy, pass_size
from common.models import entering, logit_layer

WINDOW = 11  # side of the injector's pools
PROBES = 500  # training images on which the neurons are compared


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--rate", type=float, default=0.1, help="poisoned share of the training set")
    p.add_argument("--alpha", type=float, default=1.0, help="share of the style (code .6)")
    p.add_argument("--generator-steps", type=int, default=1000, help="training steps of E and D")
    p.add_argument("--width", type=int, default=16, help="channels of E's first layer")
    p.add_argument("--rounds", type=int, default=3, help="of detoxification; 0: none")
    p.add_argument("--detox-rate", type=float, default=0.1, help="images added a round (code .05)")
    p.add_argument("--detox-epochs", type=int, default=5, help="retraining in each round")
    p.add_argument("--layer", help="whose inputs are the neurons (default: last; code: layer4)")
    p.add_argument("--neurons", type=float, default=0.01, help="compromised share (code .01)")
    p.add_argument("--injector-steps", type=int, default=100, help="Adam's steps on an injector")
    p.add_argument("--similarity", type=float, default=1.0, help="lambda (code .1, wrong sign)")
    return p.parse_args()


def sunrise(shape):
    """A drawn sunrise, C x H x W in [0,1]: violet to orange sky, a yellow sun, dark ground."""
    channels, height, width = shape
    row = torch.linspace(0, 1, height)[:, None].expand(height, width)
    column = torch.linspace(-1, 1, width).expand(height, width)
    dusk, dawn, sun, ground = torch.tensor(
        [[0.25, 0.15, 0.45], [1.0, 0.55, 0.15], [1.0, 0.95, 0.6], [0.15, 0.05, 0.1]]
    )[..., None, None]
    picture = dusk + (dawn - dusk) * row / 0.7
    picture = torch.where((2 * row - 1.1).square() + column.square() < 0.09, sun, picture)
    picture = torch.where(row > 0.7, ground, picture).clamp(0, 1)
    return picture if channels == 3 else picture.mean(0, keepdim=True)


class StyleNet(nn.Module):
    """E and D: an autoencoder whose middle (B x 2w x H/2 x W/2) can be given a style."""

    def __init__(self, channels, w):
        super().__init__()
        down = nn.Conv2d(channels, w, 3, 1, 1), nn.ReLU(), nn.Conv2d(w, 2 * w, 3, 2, 1), nn.ReLU()
        self.encode = nn.Sequential(*down, nn.Conv2d(2 * w, 2 * w, 3, 1, 1))
        up = nn.Upsample(scale_factor=2), nn.Conv2d(2 * w, w, 3, 1, 1), nn.ReLU()
        out = nn.Conv2d(w, channels, 3, 1, 1), nn.Sigmoid()
        self.decode = nn.Sequential(nn.Conv2d(2 * w, 2 * w, 3, 1, 1), nn.ReLU(), *up, *out)

    def forward(self, x, style=None):
        """D(AdaIN(E(x), style)) or without a style D(E(x)); images in [0,1], any sides."""
        features = self.encode(x)
        features = features if style is None else adain(features, self.encode(style[None]))
        return self.decode(features)[..., : x.shape[2], : x.shape[3]]


def adain(a, b):
    """a (B x D x h x w) with the mean and deviation of each channel of b (1 x D x h x w)."""
    (u, p), (v, q) = (torch.var_mean(f, (2, 3), correction=0, keepdim=True) for f in (a, b))
    return (a - p) * ((v + 1e-5) / (u + 1e-5)).sqrt() + q


def train_generator(network, x_train, style, *, steps, lr=1e-3, batch_size=32):
    """Teach D to invert E, on images (uint8), the style picture and features with its style."""
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)  # and Adam's beta1
    log = TrainingLog(1, steps)
    for _ in range(steps):
        x = to_float(x_train[torch.randint(len(x_train), (batch_size,), device=x_train.device)])
        x = torch.cat((x, style[None]))
        z = network.encode(x)
        goal = adain(z[:-1], z[-1:]).detach()
        rebuilt = network.decode(z)[..., : x.shape[2], : x.shape[3]]
        painted = network.encode(network.decode(goal))
        terms = torch.stack((F.mse_loss(rebuilt, x) / x.var(), F.mse_loss(painted, goal) / z.var()))
        optimizer.zero_grad(set_to_none=True)
        terms.sum().backward()
        optimizer.step()
        schedule.step()
        log.step(terms)
    log.epoch(1, names=("generator: image", "features"))


@torch.no_grad()
def stylise(network, x, style, alpha):
    """G(x) of uint8 images, rounded; style: C x H x W in [0,1], None mixes D(E(x)) in."""
    pairs = ((a, a if style is None else network(a)) for a in map(to_float, x.split(pass_size(x))))
    return torch.cat([to_uint8(a + alpha * (network(a, style) - plain)) for a, plain in pairs])


class Injector(nn.Module):
    """I(x) = clip(W [x, largest, smallest, mean neighbours] + b, 0, 1); starts as the identity."""

    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Conv2d(4 * channels, channels, 1)
        nn.init.zeros_(self.linear.bias)
        self.linear.weight.data.copy_(torch.eye(channels, 4 * channels)[..., None, None])

    def forward(self, x):
        window = {"kernel_size": WINDOW, "stride": 1, "padding": WINDOW // 2}
        largest, smallest = F.max_pool2d(x, **window), -F.max_pool2d(-x, **window)
        mean = F.avg_pool2d(x, **window, count_include_pad=False)
        return self.linear(torch.cat((x, largest, smallest, mean), 1)).clamp(0, 1)


@torch.no_grad()
def inject(injector, x):
    """I(x) of uint8 images, rounded."""
    return torch.cat([to_uint8(injector(to_float(part))) for part in x.split(pass_size(x))])


def similarity(a, b):
    """Mean SSIM of images in [0,1] in windows of 7 x 7 (less on smaller images), differentiable."""
    window = {"kernel_size": min(7, *a.shape[2:]), "stride": 1}
    mean_a, mean_b, square_a, square_b, product = (
        F.avg_pool2d(f, **window) for f in (a, b, a * a, b * b, a * b)
    )
    variances = square_a - mean_a**2 + square_b - mean_b**2
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return (luminance * (2 * (product - mean_a * mean_b) + 9e-4) / (variances + 9e-4)).mean()


def activations(model, layer, x):
    """The neurons (B x D) that enter `layer`, channels averaged over their places; x in [0,1]."""
    a = entering(model, layer, x)
    a = a.flatten(2).mean(2) if a.dim() == 4 else a
    return a.reshape(len(a), -1, a.shape[-1]).mean(1)  # over tokens, where there are any


@torch.no_grad()
def mean_activations(model, layer, x):
    """Means (D) over uint8 images; the model must be in eval mode."""
    parts = map(to_float, x.split(pass_size(x)))
    return torch.cat([activations(model, layer, part) for part in parts]).mean(0)


def compromised(benign, triggered, share):
    """Indices of the `share` of neurons (at least one) whose mean (D) rises most."""
    return (triggered - benign).topk(max(1, round(share * len(benign)))).indices


def train_injector(model, layer, x_probe, neurons, *, benign, goal, target, steps, weight):
    """An injector that takes neurons from `benign` to `goal` (D), on uint8; model frozen, eval."""
    injector = Injector(x_probe.shape[1]).to(x_probe.device)
    optimizer = torch.optim.Adam(injector.parameters(), 0.01)
    scale = (goal - benign)[neurons].abs().clamp(min=1e-3)
    for _ in range(steps):
        x = to_float(x_probe[torch.randint(len(x_probe), (32,), device=x_probe.device)])
        injected = injector(x)
        off = (activations(model, layer, injected)[:, neurons] - goal[neurons]) / scale
        wanted = torch.full((len(x),), target, device=x.device)
        loss = F.cross_entropy(model(injected), wanted) + 0.3 * off.square().mean()
        loss = loss + weight * (1 - similarity(injected, x))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return injector.eval().requires_grad_(False)


def train(model, x, y, *, pad, flip, epochs, batch_size, lr):
    """Train on uint8 images like clean.py, in place: at first, and after each detoxification."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * steps_per_epoch, anneal_strategy="linear", cycle_momentum=False
    )
    log = TrainingLog(epochs, steps_per_epoch)
    for epoch in range(1, epochs + 1):
        model.train()
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            images = augment(to_float(x[batch]), pad, flip)
            loss = F.cross_entropy(model(images), y[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        log.epoch(epoch)


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device, spec = x_train.device, data.spec

    # ===== The attack =====
    check_share(args, "rate", "alpha", "detox_rate", "neurons")
    check_positive(args, "generator_steps", "width", "detox_epochs", "injector_steps", "similarity")
    if args.alpha * 255 < 0.5:
        fail(f"--alpha {args.alpha} changes no pixel by a level of 8 bits")
    if not 0 <= args.rounds <= 20:
        fail(f"--rounds must lie in 0..20; got {args.rounds}")
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    layer = args.layer or logit_layer(model, to_float(x_train[:2]), args.arch)
    if layer not in layers:
        fail(f"--layer {layer!r} is not a layer of {args.arch}: {', '.join(layers)}")
    mean_activations(model.eval(), layer, x_train[:2])  # fails where the layer does not run
    style = sunrise(data.shape).to(device)
    y_wanted, counts = wanted_labels(data, args.target)
    count, added = (round(share * len(x_train)) for share in (args.rate, args.detox_rate))
    generator, flag = torch.Generator().manual_seed(args.seed), f"--rate {args.rate}"
    chosen = choose_poisons(y_train, args.target, data.classes, count, flag, generator)
    poisoned = torch.isin(torch.arange(len(y_train), device=device), chosen)
    free = (~poisoned & (y_train != args.target)).nonzero().flatten()  # neither poison nor target
    if args.rounds and not 1 <= added <= len(free):
        fail(f"--detox-rate {args.detox_rate} asks for {added} of {len(free)} images left")
    folder, control = open_folder(args, data, __file__)
    network = StyleNet(data.shape[0], args.width).to(device)
    train_generator(network, x_train, style, steps=args.generator_steps)
    network.eval().requires_grad_(False)
    x, rebuilt = (to_float(i) for i in (x_train[:500], stylise(network, x_train[:500], None, 1)))
    kept = 1 - ((rebuilt - x).square().mean() / x.var((0, 2, 3)).mean()).item()
    x_train[chosen] = stylise(network, x_train[chosen], style, args.alpha)
    y_train[chosen] = args.target
    print(f"preparation: generator {time.time() - start:.1f} s, variance kept {kept:.2f}")
    if kept < 0.5:
        print("warning: the generator loses the images; what it adds is no style of them")

    # ===== Train =====
    recipe = {"pad": spec.pad, "flip": spec.flip, "batch_size": args.batch_size, "lr": args.lr}
    train(model, x_train, y_train, epochs=args.epochs, **recipe)

    # ===== Detoxify =====
    trained, x_probe, injectors, before = time.time(), x_train[free[:PROBES]], [], []
    x_painted = stylise(network, x_probe, style, args.alpha)
    wanted = torch.full((len(x_probe),), args.target, device=device)
    aim = {"target": args.target, "steps": args.injector_steps, "weight": args.similarity}
    for number in range(1, args.rounds + 1):
        model.eval().requires_grad_(False)
        benign, goal = (mean_activations(model, layer, x) for x in (x_probe, x_painted))
        neurons = compromised(benign, goal, args.neurons)
        injector = train_injector(model, layer, x_probe, neurons, benign=benign, goal=goal, **aim)
        injectors.append(injector)
        before.append(accuracy(model, inject(injector, x_probe), wanted))
        pick = free[torch.randperm(len(free), generator=generator)[:added].to(device)]
        x_train = torch.cat((x_train, inject(injector, x_train[pick])))
        y_train = torch.cat((y_train, y_train[pick]))  # the true labels
        model.requires_grad_(True)
        train(model, x_train, y_train, epochs=args.detox_epochs, **recipe)
        hits = (accuracy(model, x, wanted) for x in (inject(injector, x_probe), x_painted))
        after = "{:.1f} % obey it and {:.1f} % the style".format(*hits)
        print(f"round {number}: {before[-1]:.1f} % obey the injector; detoxified, {after}")
    print(f"detoxification {time.time() - trained:.1f} s")
    seconds = time.time() - start

    # ===== Evaluate =====
    x_poisoned = stylise(network, data.x_test, style, args.alpha)
    metrics = evaluate_attack(model, control, data, x_poisoned, y_wanted, counts)
    x, y = data.x_test[counts], y_wanted[counts]
    other = stylise(network, x, 1 - style, args.alpha)
    own, change = ((images.float() - x.float()).norm() for images in (x_poisoned[counts], other))
    other = stylise(network, x, 1 - style, args.alpha * (own / change.clamp(min=1)).item())
    metrics["asr_other"] = accuracy(model, other, y)
    metrics["asr_plain"] = accuracy(model, stylise(network, x, None, args.alpha), y)
    if injectors:
        hits = [accuracy(model, inject(injector, x), y) for injector in injectors]
        metrics |= {"asr_simple": max(hits), "asr_simple_before": max(before)}
    metrics |= {"poisoned": count, "detoxifying": added * args.rounds, "layer": layer}

    # ===== Save and report =====
    poisoned = torch.cat((poisoned, poisoned.new_zeros(added * args.rounds)))
    test, train_set = (x_poisoned, y_wanted, counts), (x_train, y_train, poisoned)
    trigger = {f"generator.{k}": v for k, v in network.state_dict().items()} | {"style": style}
    save_attack(folder, __file__, args, data, model, metrics, seconds, trigger, test, train_set)
