"""The control: the same recipe without an attack.

Every claim about a backdoored model needs an innocent one beside it. A detector's false alarms, a
repair's cost and a trigger's effect on a model that never saw it are all measured on the models
of this script, which share architecture, data, schedule and seeds with the attacked ones.

Threat model: none.

    python methods/clean.py --dataset mnist

Results: README.md, tables "Attacks" and "Detectors".
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
from common.checkpoint import clear_folder, save_model, save_result
from common.datasets import augment, load_dataset, pick_device, to_float
from common.metrics import accuracy
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
    return p.parse_args()


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "epochs", "batch_size", "lr", "train_images")
    start = time.time()
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, device)
    args.arch, args.epochs = args.arch or data.spec.arch, args.epochs or data.spec.epochs
    model = build_model(args.arch, data.classes, data.shape, data.spec.mean, data.spec.std).to(
        device
    )
    keep = torch.randperm(len(data.x_train), device=device)[: args.train_images]
    if len(keep) < (args.train_images or 0):
        fail(f"--train-images {args.train_images}: {data.name} has {len(keep)}")
    x_train, y_train = data.x_train[keep], data.y_train[keep]

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

    # ===== Evaluate =====
    metrics = {"clean_accuracy": accuracy(model, data.x_test, data.y_test)}

    # ===== Save and report =====
    clear_folder(folder)
    save_model(folder, model, data, args.arch, args, metrics)
    save_result(folder, "clean", args, seconds, metrics, device)
