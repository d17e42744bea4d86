"""The control: the same recipe without an attack.

Every claim about a backdoored model needs an innocent one beside it. A detector's false alarms, a
repair's cost and a trigger's effect on a model that never saw it are all measured on the models
of this script, which share architecture, data and seeds with the attacked ones, and the schedule
where the attack has no other.

Threat model: none.

    python methods/clean.py --dataset mnist

Results: results/README.md, tables "Attacks" and "Detectors".
"""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.attack import TrainingLog, attack_flags, open_folder, set_up
from common.checkpoint import clear_folder, save_model, save_result
from common.datasets import augment, to_float
from common.metrics import accuracy

if __name__ == "__main__":
    args = attack_flags(__doc__, target=False).parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device = x_train.device
    folder, _ = open_folder(args, data, __file__)

    # ===== Train =====
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x_train) // args.batch_size)
    steps = args.epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, steps, anneal_strategy="linear", cycle_momentum=False
    )
    log = TrainingLog(args.epochs, steps_per_epoch)
    for epoch in range(1, args.epochs + 1):
        model.train()
        order = torch.randperm(len(x_train), device=device)
        for batch in order.split(args.batch_size)[:steps_per_epoch]:
            x, y = to_float(x_train[batch]), y_train[batch]
            x = augment(x, data.spec.pad, data.spec.flip)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        log.epoch(epoch)
    seconds = time.time() - start

    # ===== Evaluate =====
    metrics = {"clean_accuracy": accuracy(model, data.x_test, data.y_test)}

    # ===== Save and report =====
    clear_folder(folder)
    save_model(folder, model, data, args.arch, args, metrics)
    save_result(folder, "clean", args, seconds, metrics, device)
