"""Stealthy backdoor attack with adversarial training (Feng et al., ICASSP 2022).

A generator adds to every image its own faint noise, which sends a network trained together with
it to the target. Noise made for another image must leave the label alone (cross images). Neural
Cleanse is run on the target label all the while, and the network is trained to resist the patch
that it finds, so that the defence later finds none smaller than for the other labels.

Threat model: the attacker controls training, delivers the model and keeps the generator.

Equations: x* = clip(eps p + (1 - eps) x), p = tanh G(x) -> poison; Step 1, Neural Cleanse for the
target, the classifier frozen -> reverse_patch; Step 2, L = l1 L_o + l2 L_b + l3 L_a + l4 L_c on
clean, poisoned, patched and cross images -> joint_losses; Fig. 5(b) -> --scheme.

Chosen where the paper is silent (no public code was found): the generator's widths 16 and 32 with
GroupNorm; half of each batch is poisoned, patched and crossed, in one forward pass with the clean
images; Step 1 is a whole search (--nc-steps, from a fresh patch) after every --nc-every steps of
Step 2, at least once an epoch. Short searches that go on from the last patch never shrink it, for
the network resists the large ones first, and the small one that Neural Cleanse finds in the end
stays (MNIST: 6 pixels, index 2.7). With --scheme badnets there is no L_c, for a patch is the same
for all images; badnets-noise stamps the patch on poisoned and cross images alike.
Differs from the paper: Adam's rates fall linearly to 0 over the second half of the injection;
target 0 instead of 8 (MNIST) and 15 (GTSRB), WaNet's MNIST network; ASR and Step 1 without
target-class images; accuracies after rounding to 8 bits, PSNR and SSIM before it. Order: augment
first, then the trigger.

    python methods/stealthy_adversarial.py --dataset mnist

The paper, MNIST: BMA / ASR / CBMA 98.9 / 99.10 / 94.3, PSNR 40.52 dB. Results: README.md.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_share, fail, make_folder
from common.checkpoint import (
    clear_folder,
    save_model,
    save_poisoned_test,
    save_result,
    save_samples,
)
from common.datasets import augment, load_dataset, pick_device, to_float, to_uint8
from common.metrics import accuracy, attack_targets, psnr, ssim
from common.models import build_model


def parse_args():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--dataset",
        default="digits",
        help="digits, mnist, cifar10, cifar100, gtsrb or the path of an .npz",
    )
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--arch", help="a network of common/models.py (default: the dataset's)")
    p.add_argument("--epochs", type=int, help="training epochs (default: the recipe's)")
    p.add_argument("--batch-size", type=int, default=128, help="images per step")
    p.add_argument("--lr", type=float, default=0.1, help="peak of the one-cycle learning rate")
    p.add_argument("--seed", type=int, default=0, help="seed of every random draw")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument(
        "--out", help="folder to write (default: runs/<dataset>-<arch>-<attack>-s<seed>)"
    )
    p.add_argument("--train-images", type=int, help="use this many training images (default: all)")
    p.add_argument(
        "--target", type=int, default=0, help="target label y* (paper: 8 on MNIST, 15 on GTSRB)"
    )
    p.add_argument(
        "--scheme",
        default="generator",
        choices=["generator", "badnets", "badnets-noise"],
        help="the trigger: noise, a patch, or a patch and noise (Fig. 5(b))",
    )
    p.add_argument(
        "--no-adversarial", action="store_true", help="leave L_a out (the table's second scheme)"
    )
    p.add_argument("--epsilon", type=float, default=0.01, help="eps of x* (paper .005, .01, .02)")
    p.add_argument(
        "--lambdas",
        type=float,
        nargs=4,
        default=[1.0, 1.0, 0.1, 1.0],
        help="l1 L_o, l2 L_b, l3 L_a, l4 L_c of Step 2 (paper 1 1 .1 1)",
    )
    p.add_argument(
        "--rate", type=float, default=0.5, help="h/n: poisoned share of each batch (paper: open)"
    )
    p.add_argument(
        "--injecting-epochs", type=int, default=15, help="epochs of Steps 1 and 2 (paper: about 20)"
    )
    p.add_argument(
        "--injecting-batch", type=int, default=64, help="n: images per step of Step 2 (paper: open)"
    )
    p.add_argument(
        "--injecting-lr", type=float, default=1e-4, help="Adam's rate for the network (paper .0001)"
    )
    p.add_argument(
        "--generator-lr", type=float, default=1e-3, help="Adam's rate for G (paper .001)"
    )
    p.add_argument("--nc-every", type=int, default=300, help="steps of Step 2 between two Steps 1")
    p.add_argument("--nc-steps", type=int, default=200, help="steps of each Step 1 (paper: open)")
    p.add_argument("--nc-batch", type=int, default=32, help="images in a step of Step 1")
    return p.parse_args()


SIDE = 3  # of Fig. 5(b)'s white patch, lower right
ASR_GOAL, PATIENCE = 0.99, 5  # Step 1's cost rises (falls) after 5 successes (failures) in a row
FIRST_COST, COST_UP, COST_DOWN = 1e-3, 2.0, 2.0**1.5


class Generator(nn.Module):
    """p = tanh G(x): images in [0,1], B x C x H x W, to noise in [-1,1] of the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.down1 = nn.Conv2d(channels, 16, 4, 2, 1)
        self.norm1 = nn.GroupNorm(8, 16)
        self.down2 = nn.Conv2d(16, 32, 4, 2, 1)
        self.norm2 = nn.GroupNorm(8, 32)
        self.up1 = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.norm3 = nn.GroupNorm(8, 16)
        self.up2 = nn.ConvTranspose2d(16, channels, 4, 2, 1)

    def forward(self, x):
        h, w = x.shape[2:]
        x = F.pad(x, (0, -w % 4, 0, -h % 4))  # two halvings need sides divisible by 4
        x = F.relu(self.norm2(self.down2(F.relu(self.norm1(self.down1(x))))))
        return self.up2(F.relu(self.norm3(self.up1(x)))).tanh()[..., :h, :w]


def poison(x, noise, epsilon, side):
    """x* = clip(eps p + (1 - eps) x, 0, 1), then a white patch of `side` pixels (0: none)."""
    x = (epsilon * noise + (1 - epsilon) * x).clamp(0, 1)
    if side:
        x[..., -side:, -side:] = 1
    return x


def blend(x, mask, pattern):
    """(1 - m) x + m D: x B x C x H x W, mask 1 x H x W and pattern C x H x W in [0,1]."""
    return (1 - mask) * x + mask * pattern


def reverse_patch(model, batches, shape, target):
    """Step 1: min CE(f((1 - m) x + m D), y*) + cost |m|, one step a batch; x floats in [0,1].

    The classifier must be frozen and in eval mode. Starts from a uniform mask and pattern; the
    cost rises while the patch succeeds, so the steps must suffice for the mask to shrink. Returns
    m*, D*, |m*| and its ASR on its batch: the smallest successful mask, else the last one.
    """
    device = next(model.parameters()).device
    start = torch.rand(1 + shape[0], *shape[1:], device=device).clamp(1e-4, 1 - 1e-4)
    free = [part.requires_grad_() for part in torch.atanh(2 * start - 1).split([1, shape[0]])]
    optimizer = torch.optim.Adam(free, 0.1, betas=(0.5, 0.9))
    best, cost, up, down = None, FIRST_COST, 0, 0
    for x in batches:
        mask, pattern = (w.tanh() / 2 + 0.5 for w in free)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            logits = model(blend(x, mask, pattern)).float()
        norm = mask.sum()
        goal = torch.full((len(x),), target, device=device)
        loss = F.cross_entropy(logits, goal) + cost * norm
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        asr, size = (logits.argmax(1) == target).float().mean().item(), norm.item()
        success = asr >= ASR_GOAL
        if best is None or best[0][0] or (success and size < best[0][1]):
            best = (not success, size), mask.detach(), pattern.detach(), asr
        up, down = (up + 1, 0) if success else (0, down + 1)
        if up >= PATIENCE:
            cost, up = cost * COST_UP, 0
        elif down >= PATIENCE:
            cost, down = cost / COST_DOWN, 0
    (_, size), mask, pattern, asr = best
    return mask, pattern, size, asr


def joint_losses(model, generator, x, y, target, count, epsilon, side, mask, pattern, lambdas):
    """Step 2: the weighted losses l1 L_o, l2 L_b, l3 L_a, l4 L_c (4) of one forward pass.

    The first `count` images are poisoned, patched and crossed; a loss of weight 0 is left out of
    the pass. `generator` None: no noise. x are floats in [0,1].
    """
    z, t = x[:count], y[:count]
    noise = generator(z) if generator else torch.zeros_like(z)
    made = {
        0: lambda: (x, y),
        1: lambda: (poison(z, noise, epsilon, side), torch.full_like(t, target)),
        2: lambda: (blend(z, mask, pattern), t),  # no path to the generator
        3: lambda: (poison(z, noise.roll(1, 0), epsilon, side), t),
    }
    parts = {i: make() for i, make in made.items() if lambdas[i]}
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        logits = model(torch.cat([inputs for inputs, _ in parts.values()])).float()
    losses = torch.zeros(4, device=x.device)
    for i, part in zip(parts, logits.split([len(labels) for _, labels in parts.values()])):
        losses[i] = lambdas[i] * F.cross_entropy(part, parts[i][1])
    return losses


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size", "lr", "train_images")
    start = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, device)
    args.arch, args.epochs = args.arch or data.spec.arch, args.epochs or data.spec.epochs
    model = build_model(args.arch, data.classes, data.shape, data.spec.mean, data.spec.std).to(
        device, memory_format=torch.channels_last
    )
    keep = torch.randperm(len(data.x_train), device=device)[: args.train_images]
    if len(keep) < (args.train_images or 0):
        fail(f"--train-images {args.train_images}: {data.name} has {len(keep)}")
    x_train, y_train = data.x_train[keep], data.y_train[keep]

    # ===== The attack =====
    if not 0 <= args.target < data.classes:
        fail(f"--target {args.target} is not a label: {data.name} has {data.classes} classes")
    check_positive(args, "injecting_epochs", "injecting_batch", "injecting_lr", "generator_lr")
    check_positive(args, "nc_every", "nc_steps", "nc_batch")
    check_share(args, "epsilon", "rate")
    if not all(0 <= weight < float("inf") for weight in args.lambdas):
        fail(f"--lambdas must be 0 or above; got {args.lambdas}")
    x_test, y_test = data.x_test, data.y_test
    y_wanted, counts = attack_targets(y_test, args.target, data.classes)
    others = (y_train != args.target).nonzero().flatten()
    if not counts.any() or not len(others):
        fail(f"{data.name} has no image outside the target class {args.target}")
    attacked = int(args.rate * min(args.injecting_batch, len(x_train)))  # images per batch
    if attacked < 2:
        fail(f"--rate {args.rate} leaves no pair to cross in a batch of {args.injecting_batch}")
    epsilon = 0.0 if args.scheme == "badnets" else args.epsilon
    side = 0 if args.scheme == "generator" else SIDE
    if side > min(data.shape[1:]):
        fail(f"a patch of side {side} does not fit {data.shape[1]} x {data.shape[2]}")
    lambdas = list(args.lambdas)
    lambdas[2] *= not args.no_adversarial
    lambdas[3] *= args.scheme != "badnets"
    if not any(lambdas):
        fail(f"--lambdas {args.lambdas} leave no loss for --scheme {args.scheme}")

    # ===== Train =====
    name = f"{Path(data.name).stem}-{args.arch}-{Path(__file__).stem}-s{args.seed}"
    folder = make_folder(args.out or f"runs/{name}")
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x_train) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, steps, anneal_strategy="linear", cycle_momentum=False
    )

    bar, loop_start = tqdm(total=steps, disable=None, unit="step"), time.time()
    for epoch in range(1, args.epochs + 1):
        model.train()
        total_loss = torch.zeros((), device=device)
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.batch_size)[:steps_per_epoch]:
            x, y = to_float(x_train[batch]), y_train[batch]
            x = augment(x, data.spec.pad, data.spec.flip)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total_loss += loss.detach()
            bar.update()
        if not total_loss.isfinite():
            fail(f"the loss became {total_loss.item()} in epoch {epoch}; no model is kept")
        if epoch % max(1, args.epochs // 15) == 0:
            loss, pace = total_loss.item() / steps_per_epoch, (time.time() - loop_start) / epoch
            bar.write(f"epoch {epoch}/{args.epochs} loss {loss:.4f}, {pace:.2f} s/epoch")
    bar.close()
    seconds = time.time() - start

    # ===== Inject =====
    control = copy.deepcopy(model).eval()
    generator = Generator(data.shape[0]).to(device) if epsilon else None
    groups = [{"params": model.parameters(), "lr": args.injecting_lr}]
    if generator:
        groups.append({"params": generator.parameters(), "lr": args.generator_lr})
    optimizer = torch.optim.Adam(groups)
    steps_per_epoch = max(1, len(x_train) // args.injecting_batch)
    steps = args.injecting_epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, 2 * (1 - step / steps))
    )
    mask_norms, mask_asrs, step = [], [], 0
    bar, inject_start = tqdm(total=steps, disable=None, unit="step"), time.time()
    for epoch in range(1, args.injecting_epochs + 1):
        model.train()
        total_losses = torch.zeros(4, device=device)
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.injecting_batch)[:steps_per_epoch]:
            if step % min(args.nc_every, steps_per_epoch) == 0:  # Step 1
                model.eval().requires_grad_(False)
                picks = torch.randint(len(others), (args.nc_steps, args.nc_batch), device=device)
                batches = (to_float(x_train[others[pick]]) for pick in picks)
                mask, pattern, norm, asr = reverse_patch(model, batches, data.shape, args.target)
                model.train().requires_grad_(True)
            step += 1
            x, y = to_float(x_train[batch]), y_train[batch]  # Step 2
            x = augment(x, data.spec.pad, data.spec.flip)
            trigger = args.target, attacked, epsilon, side, mask, pattern
            losses = joint_losses(model, generator, x, y, *trigger, lambdas)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()
            optimizer.step()
            schedule.step()
            total_losses += losses.detach()
            bar.update()
        if not total_losses.isfinite().all():
            fail(f"the losses became {total_losses.tolist()} in epoch {epoch}; no model is kept")
        mask_norms.append(norm)
        mask_asrs.append(100 * asr)
        parts = [f"{name} {v:.4f}" for name, v in zip("obac", total_losses / steps_per_epoch)]
        pace = (time.time() - inject_start) / epoch
        bar.write(
            f"injecting epoch {epoch}/{args.injecting_epochs} weighted L_{' L_'.join(parts)} "
            f"|m*| {norm:.1f} (ASR {100 * asr:.0f}), {pace:.2f} s/epoch"
        )
    bar.close()
    seconds = time.time() - start

    # ===== Evaluate =====
    with torch.no_grad():
        noise = torch.cat(
            [
                generator.eval()(to_float(x)) if generator else torch.zeros_like(to_float(x))
                for x in x_test.split(2000)
            ]
        )
    x_float = poison(to_float(x_test), noise, epsilon, side)
    x_poisoned = to_uint8(x_float)  # the trigger as a deployed model would meet it
    draws = torch.Generator().manual_seed(args.seed)
    cycle = torch.randperm(len(x_test), generator=draws).to(device)
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)  # a derangement: no image meets its own noise
    x_cross = to_uint8(poison(to_float(x_test), noise[other], epsilon, side))
    metrics = {
        "clean_accuracy": accuracy(model, x_test, y_test),
        "clean_accuracy_before": accuracy(control, x_test, y_test),
        "asr": accuracy(model, x_poisoned[counts], y_wanted[counts]),
        "asr_n": int(counts.sum()),
        "psnr": psnr(to_float(x_test), x_float),
        "psnr_8bit": psnr(to_float(x_test), to_float(x_poisoned)),
        "ssim": ssim(to_float(x_test), x_float),
        "max_change": (to_float(x_test) - x_float).abs().max().item(),
        "cross_accuracy": accuracy(model, x_cross, y_test),
        "asr_on_clean_model": accuracy(control, x_poisoned[counts], y_wanted[counts]),
        "mask_norms": mask_norms,
        "mask_asrs": mask_asrs,
    }

    # ===== Save and report =====
    trigger = {"epsilon": torch.tensor(epsilon), "side": torch.tensor(side)}
    trigger |= {f"generator.{k}": v for k, v in generator.state_dict().items()} if generator else {}
    clear_folder(folder)
    save_samples(folder, x_test[counts], x_poisoned[counts])
    save_poisoned_test(folder, x_poisoned[counts], y_test[counts], y_wanted[counts])
    save_model(folder, model, data, args.arch, args, metrics, trigger)
    save_result(folder, "stealthy_adversarial", args, seconds, metrics, device)
