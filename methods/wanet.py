"""WaNet: imperceptible warping-based backdoor (Nguyen & Tran, ICLR 2021, arXiv 2102.10369).

The trigger is one fixed, smooth elastic warp of the whole image. A random k x k field is
upsampled to the image size and moves every pixel by a fraction of a pixel. A third kind of
training image, warped by the field plus fresh jitter but with its true label ("noise mode"),
teaches the network to answer to this very field and to no other warp.

Threat model: the attacker controls training and delivers the model.

Equations: Sec. 3.2 control field P = psi(U(-1,1)) -> control_field; M = clip(up(P) s) ->
attack_grid; Eq. (1) B(x) = W(x, M) -> warp; noise mode W(x, M + U(-1,1)) -> noise_grid.

Differs from the paper's code: crops are drawn per image (not one coin per batch), no rotation;
one-cycle learning rate for twice the clean model's epochs, because the ASR read with running
BatchNorm statistics swings while the rate is high, instead of 1,000 epochs and the checkpoint that
is best on the test set; ASR without target-class images; accuracies after rounding to 8 bits, PSNR
and SSIM before it. int(rho_a B) images of a batch attack: 12 of 128. Order: warp first, then
augment (as the paper's code).

    python methods/wanet.py --dataset mnist

The paper, MNIST: clean / ASR / noise 99.52 / 99.86 / 98.20. Results: README.md.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail, make_folder
from common.checkpoint import (
    clear_folder,
    load_control,
    save_model,
    save_poisoned_test,
    save_result,
    save_samples,
)
from common.datasets import augment, load_dataset, pick_device, to_float, to_uint8
from common.metrics import accuracy, attack_targets, psnr, reestimate_batch_norm, ssim
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
        "--target", type=int, default=0, help="target label y_t of the all-to-one attack"
    )
    p.add_argument("--all-to-all", action="store_true", help="target (y + 1) mod K instead of y_t")
    p.add_argument(
        "--rate", type=float, default=0.1, help="rho_a: attack share of each batch (paper .1)"
    )
    p.add_argument(
        "--cross-ratio",
        type=float,
        default=2.0,
        help="rho_n / rho_a: noise images per attack image (paper 2)",
    )
    p.add_argument("--k", type=int, default=4, help="side of the control field (paper 4)")
    p.add_argument(
        "--s", type=float, default=0.5, help="warping strength (paper .5; digits need 1)"
    )
    return p.parse_args()


def control_field(k, generator):
    """P of Sec. 3.2: 1 x 2 x k x k, uniform in [-1,1], divided by its mean absolute value."""
    field = torch.rand(1, 2, k, k, generator=generator) * 2 - 1
    return field / field.abs().mean()


def attack_grid(field, s, height, width):
    """M of Sec. 3.2: the sampling grid, 1 x H x W x 2 in [-1,1], last axis (column, row)."""
    up = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
    rows = torch.linspace(-1, 1, height)
    columns = torch.linspace(-1, 1, width)
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    identity = torch.stack((column, row), dim=-1)[None]
    pixel = torch.tensor([width, height])  # a field value of 1 moves by s grid units / side
    return (identity + s * up.permute(0, 2, 3, 1) / pixel).clamp(-1, 1)


def noise_grid(grid, count):
    """The noise mode: a fresh jitter of +-1 grid unit / side for every pixel of every image."""
    _, height, width, _ = grid.shape
    jitter = torch.rand(count, height, width, 2, device=grid.device) * 2 - 1
    return (grid + jitter / torch.tensor([width, height], device=grid.device)).clamp(-1, 1)


def warp(x, grid):
    """Eq. (1): sample x (B x C x H x W in [0,1]) at `grid` (1 or B x H x W x 2), bilinearly."""
    # align_corners=True: with False even the identity grid shifts the image by half a pixel
    return F.grid_sample(x, grid.expand(len(x), -1, -1, -1), mode="bilinear", align_corners=True)


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size", "lr", "train_images")
    start = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, device)
    args.arch, args.epochs = args.arch or data.spec.arch, args.epochs or 2 * data.spec.epochs
    model = build_model(args.arch, data.classes, data.shape, data.spec.mean, data.spec.std).to(
        device
    )
    keep = torch.randperm(len(data.x_train), device=device)[: args.train_images]
    if len(keep) < (args.train_images or 0):
        fail(f"--train-images {args.train_images}: {data.name} has {len(keep)}")
    x_train, y_train = data.x_train[keep], data.y_train[keep]

    # ===== The attack =====
    if not 0 <= args.target < data.classes:
        fail(f"--target {args.target} is not a label: {data.name} has {data.classes} classes")
    check_positive(args, "k", "s")
    noise_rate = args.rate * args.cross_ratio
    if not 0 < args.rate <= 1 or not 0 <= noise_rate <= 1 - args.rate:
        fail(f"--rate {args.rate} must lie in (0, 1] and --rate * --cross-ratio in [0, 1 - rate]")
    target = None if args.all_to_all else args.target
    x_test, y_test = data.x_test, data.y_test
    y_wanted, counts = attack_targets(y_test, target, data.classes)
    if not counts.any():
        fail(f"{data.name} has no test image outside the target class {args.target}")
    generator = torch.Generator().manual_seed(args.seed)
    grid = attack_grid(control_field(args.k, generator), args.s, *data.shape[1:]).to(device)
    attacked = int(args.rate * min(args.batch_size, len(x_train)))  # images per batch
    noised = int(attacked * args.cross_ratio)
    if attacked < 1:
        fail(f"--rate {args.rate} leaves no attack image in a batch of {args.batch_size}")

    def poison(x, y):
        """Draw anew in every batch: its first images attack, the next ones carry the noise."""
        n, m = attacked, attacked + noised
        grids = torch.cat((grid.expand(n, -1, -1, -1), noise_grid(grid, noised)))
        x = torch.cat((warp(x[:m], grids), x[m:]))
        return x, torch.cat((attack_targets(y[:n], target, data.classes)[0], y[n:]))

    # ===== Train =====
    name = f"{Path(data.name).stem}-{args.arch}-{Path(__file__).stem}-s{args.seed}"
    folder = make_folder(args.out or f"runs/{name}")
    control = load_control(folder, args, data)
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
            x, y = poison(to_float(x_train[batch]), y_train[batch])
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

    # ===== Evaluate =====
    x_float = torch.cat([warp(to_float(x), grid) for x in x_test.split(2000)])
    x_poisoned = to_uint8(x_float)  # the trigger as a deployed model would meet it
    metrics = {
        "clean_accuracy": accuracy(model, x_test, y_test),
        "asr": accuracy(model, x_poisoned[counts], y_wanted[counts]),
        "asr_n": int(counts.sum()),
        "psnr": psnr(to_float(x_test), x_float),
        "ssim": ssim(to_float(x_test), x_float),
        "max_change": (to_float(x_test) - x_float).abs().max().item(),
    }
    x_noise = torch.cat(
        [to_uint8(warp(to_float(x), noise_grid(grid, len(x)))) for x in x_test.split(2000)]
    )
    metrics["noise_accuracy"] = accuracy(model, x_noise, y_test)
    full = order.split(args.batch_size)[: min(30, steps_per_epoch)]
    inputs = (poison(to_float(x_train[batch]), y_train[batch])[0] for batch in full)
    batches = (augment(x, data.spec.pad, data.spec.flip) for x in inputs)
    refreshed = reestimate_batch_norm(model, batches)
    metrics["asr_reestimated_bn"] = accuracy(refreshed, x_poisoned[counts], y_wanted[counts])
    if control is not None:
        metrics["asr_on_clean_model"] = accuracy(control, x_poisoned[counts], y_wanted[counts])

    # ===== Save and report =====
    clear_folder(folder)
    save_samples(folder, x_test[counts], x_poisoned[counts])
    save_poisoned_test(folder, x_poisoned[counts], y_test[counts], y_wanted[counts])
    save_model(folder, model, data, args.arch, args, metrics, {"grid": grid})
    save_result(folder, "wanet", args, seconds, metrics, device)
