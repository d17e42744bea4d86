"""What every attack script shares and no paper describes: flags, set-up, log, figures, saving."""

import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import check_positive, check_step, fail, make_folder, parser, seed
from common import checkpoint as ckpt
from common.datasets import load_dataset, pick_device, to_float
from common.metrics import accuracy, attack_targets, psnr, ssim
from common.models import ARCHITECTURES, PRECISION, build_model, uses_bfloat16


def attack_flags(doc, target=True):
    """The ArgumentParser of an attack with the flags that all of them have; `doc` is its header."""
    p = parser(doc)
    known = "digits, mnist, cifar10, cifar100, gtsrb, or the path of an .npz or a folder by class"
    p.add_argument("--dataset", default="digits", help=known)
    p.add_argument("--data-dir", default="data", help="where <dataset>.npz lies or is cached")
    p.add_argument("--image-size", type=int, help="side of a folder's images (default: 32)")
    p.add_argument("--arch", help="name, torchvision:NAME or FILE.py:NAME (default: the dataset's)")
    p.add_argument("--epochs", type=int, help="training epochs (default: the recipe's, or twice)")
    p.add_argument("--batch-size", type=int, default=128, help="images per step")
    p.add_argument("--lr", type=float, help="peak of the one-cycle rate (default: the recipe's)")
    p.add_argument("--seed", type=seed, default=0, help="of every random draw, 0..2^32-1")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    p.add_argument("--precision", **PRECISION)
    p.add_argument("--out", help="folder (default: runs/<dataset>-<arch>-<attack>-s<seed>)")
    p.add_argument("--train-images", type=int, help="use this many training images (default: all)")
    if target:
        p.add_argument("--target", type=int, default=0, help="target label y_t, all-to-one")
    return p


def set_up(args, epochs=1):
    """Dataset, new network, training images (uint8 N x C x H x W) and labels (int64 N), shuffled.

    Seeds every random draw, fills in --arch, --epochs and --lr; `epochs` multiplies the recipe's.
    """
    check_positive(args, "epochs", "batch_size", "lr", "train_images", "image_size")
    check_step(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    data = load_dataset(args.dataset, args.data_dir, device, args.image_size)
    args.arch = args.arch or data.spec.arch
    data.spec = data.spec.of(args.arch)
    args.epochs, args.lr = args.epochs or epochs * data.spec.epochs, args.lr or data.spec.lr
    if not 0 <= getattr(args, "target", 0) < data.classes:
        fail(f"--target {args.target} is not a label: {data.name} has {data.classes} classes")
    model = new_model(args, data)
    keep = torch.randperm(len(data.x_train), device=data.x_train.device)[: args.train_images]
    if len(keep) < (args.train_images or 0):
        fail(f"--train-images {args.train_images}: {data.name} has {len(keep)}")
    return data, model, data.x_train[keep], data.y_train[keep]


def new_model(args, data):
    """A new network of --arch for the images of `data`, on their device, in --precision."""
    device = data.x_train.device
    model = build_model(args.arch, data.classes, data.shape, data.spec.mean, data.spec.std)
    if args.arch not in ARCHITECTURES:
        ckpt.check_outputs(model.to(device).eval(), data, args.arch)
        ckpt.check_gradient(model, data, args.arch)
    model.bfloat16 = uses_bfloat16(args.precision, args.arch, device)
    args.precision = "bfloat16" if model.bfloat16 else "float32"
    return model.to(device).train()


def wanted_labels(data, target):
    """Wanted labels of the test images and the mask of those that count; see attack_targets."""
    y_wanted, counts = attack_targets(data.y_test, target, data.classes)
    if not counts.any():
        fail(f"{data.name} has no test image outside the target class {target}")
    return y_wanted, counts


def choose_poisons(y, target, classes, count, flag, generator):
    """Indices (on y's device) of `count` images to poison, none of them of the target class.

    They are drawn by `generator`; `flag` is named where `count` is out of range.
    """
    candidates = attack_targets(y, target, classes)[1].cpu().nonzero().flatten()
    if not 1 <= count <= len(candidates):
        fail(f"{flag} asks for {count} poisons; {len(candidates)} images can be poisoned")
    order = torch.randperm(len(candidates), generator=generator)
    print(f"poisoned {count} of {len(y)} training images ({100 * count / len(y):.2f} %)")
    return candidates[order[:count]].to(y.device)


def choose_in_class(y, target, rate, generator):
    """Clean label: indices (on y's device) of the share `rate` of the images of class `target`."""
    members = (y == target).cpu().nonzero().flatten()
    if not (0 < rate <= 1 and round(rate * len(members))):
        fail(f"--rate {rate} of the {len(members)} images of class {target}: take one, up to all")
    count = round(rate * len(members))
    order = torch.randperm(len(members), generator=generator)
    share = f"{100 * count / len(y):.2f} % of {len(y)} training images"
    print(f"poisoned {count} of {len(members)} images of class {target} ({share})")
    return members[order[:count]].to(y.device)


def open_folder(args, data, script):
    """Make the output folder; returns it and the clean control model beside it, or None."""
    name = f"{Path(data.name).stem}-{Path(args.arch).name}-{Path(script).stem}-s{args.seed}"
    folder = Path(args.out or f"runs/{name}")
    for given in (getattr(args, "surrogate", None), getattr(args, "teacher", None)):
        if given and folder.resolve() in (Path(given).resolve(), Path(given).resolve().parent):
            fail(f"--out {folder} would replace the network {given}")
    ckpt.check_own(folder)
    control = ckpt.load_control(folder, args, data)
    return make_folder(folder), control


class TrainingLog:
    """Progress bar, mean loss and pace of a training loop; a loss that is not finite ends it."""

    def __init__(self, epochs, steps_per_epoch):
        self.epochs, self.steps_per_epoch, self.total = epochs, steps_per_epoch, 0.0
        self.bar = tqdm(total=epochs * steps_per_epoch, disable=None, unit="step")
        self.start = time.time()

    def step(self, loss):
        """Add a step's loss, a tensor (a scalar, or one entry per term); stays on its device."""
        self.total = self.total + loss.detach()
        self.bar.update()

    def epoch(self, epoch, names=("loss",), note="", lines=15):
        """End epoch number `epoch`, from 1: check the sum, print about `lines` lines in all."""
        if not self.total.isfinite().all():
            loss = f"the loss became {self.total.tolist()} in epoch {epoch}"
            fail(f"{loss}; no model is kept: try a smaller --lr")
        if epoch % max(1, self.epochs // lines) == 0:
            means = (self.total / self.steps_per_epoch).reshape(-1).tolist()
            terms = " ".join(f"{name} {value:.4f}" for name, value in zip(names, means))
            pace = (time.time() - self.start) / epoch
            self.bar.write(f"epoch {epoch}/{self.epochs} {terms}{note}, {pace:.2f} s/epoch")
        self.total = 0.0
        if epoch == self.epochs:
            self.bar.close()


def evaluate_attack(model, control, data, x_poisoned, y_wanted, counts, x_float=None):
    """The figures that every attack reports, as a dict; `control` is a clean model or None.

    x_poisoned are the triggered test images (uint8), `counts` marks those that count for the ASR.
    The image figures are those of `x_float` (before rounding) where it is given. asr_least_changed
    is the ASR of the tenth of the images that the trigger changes least (l2), and of their equals.
    """
    x = to_float(data.x_test)
    x_seen = to_float(x_poisoned) if x_float is None else x_float
    change = (x - x_seen).flatten(1).norm(dim=1)
    least = counts & (change <= change[counts].quantile(0.1) * (1 + 1e-5))  # they are rounded
    metrics = {
        "clean_accuracy": accuracy(model, data.x_test, data.y_test),
        "asr": accuracy(model, x_poisoned[counts], y_wanted[counts]),
        "asr_n": int(counts.sum()),
        "psnr": psnr(x, x_seen),
        "ssim": ssim(x, x_seen),
        "max_change": (x - x_seen).abs().max().item(),
        "mean_l2": change.mean().item(),
        "asr_least_changed": accuracy(model, x_poisoned[least], y_wanted[least]),
    }
    if metrics["clean_accuracy"] < 10 + 90 / data.classes:  # a tenth of the way from chance to 100
        cure = "its training failed, and its ASR means nothing: try a smaller --lr"
        print(f"warning: the network is near chance on clean test images; {cure}")
    if control is not None:
        metrics["asr_on_clean_model"] = accuracy(control, x_poisoned[counts], y_wanted[counts])
    return metrics


def save_attack(folder, script, args, data, model, metrics, seconds, trigger, test, train=None):
    """Write the checkpoint folder and print the RESULT line.

    `trigger` holds the attack's own tensors; `test` is (x_poisoned, y_wanted, counts) over the
    whole test set; `train` (x, y, poisoned) the set that a data-poisoning attacker hands out.
    """
    x_poisoned, y_wanted, counts = test
    x, labels = x_poisoned[counts], {"y_true": data.y_test[counts], "y_target": y_wanted[counts]}
    ckpt.clear_folder(folder)
    ckpt.save_samples(folder, data.x_test[counts], x)
    ckpt.save_images(folder / "poisoned_test.npz", x, **labels)
    if train is not None:
        x, y, poisoned = train
        ckpt.save_images(folder / "poisoned_train.npz", x, y_given=y, poisoned=poisoned)
    ckpt.save_model(folder, model, data, args.arch, args, metrics, trigger)
    ckpt.save_result(folder, Path(script).stem, args, seconds, metrics, data.x_train.device)
