"""NAD: neural attention distillation (Li et al., ICLR 2021, arXiv 2101.05930).

A copy of the suspect is fine-tuned on a few clean images and becomes the teacher. The suspect
itself is the student: it is fine-tuned on the same images, and its attention, which says where in
the image a block of layers is active, is drawn to the teacher's. The teacher has forgotten some of
the backdoor, and the student, which starts from the suspect, is to forget more of it.

Kind: repairs models, without asking whether they are backdoored; what it costs an innocent model
is part of the answer. Given: the model and a clean share of its training data. Answers: the
repaired model; beside it the teacher, and plain fine-tuning with the student's updates and Cutout.

Steps of the paper: attention map of a block, the sum of F_c^2 over the channels c (p = 2) divided
by its length -> attention; L_NAD, the distance of two maps, squared as in the code -> distance;
teacher, and student with CE + sum_l beta_l L_NAD -> finetune. Of the code: Cutout -> cut_out.

The scale of beta: the authors' code has beta 500, 1000, 1000 on the mean of the H x W squared
differences of maps whose *sum* of squares is 1, so that the same beta weighs four times as much
where the map's sides are half as long. Here L_NAD is the sum over the positions, at most 2 whatever
the size of the map; beta .49, 3.9, 15.6 is what the code's values are on its maps of 32 x 32,
16 x 16 and 8 x 8 positions (500 / 1024, 1000 / 256, 1000 / 64).

Differs from the paper's code: teacher and student train as in `finetune.py` (cosine from .1, or the
data's recipe where it is less, momentum .9 without Nesterov's step, weight decay .0005; the code:
.1 for 2 epochs, then .01, Nesterov, and .0001). Cutout's square is 9 pixels wide on images of 32,
the code's 2. Teacher and student are checked on 20 % of the clean share, and start again at half
the rate where they cost over 5 points (--max-drop). A 1 x 1 map is refused.

Where it fails: at small rates, as fine-tuning does: on digits BadNets outlived 40 epochs at .01; on
WRN-16-1 the rates that 5 points allowed left an ASR of 12 over three seeds, 64 without Cutout,
whose black squares are like this patch. Feature collision outlived .05 without it.

    python methods/nad.py --ckpt runs/mnist-mnist_cnn-badnets-s0

Results: results/README.md, tables "Fine-tuning, NAD and MCR", "Ten attacks and four repairs".
"""

import copy
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, check_step, check_weights, fail, make_folder
from common.attack import TrainingLog
from common.checkpoint import clear_folder, draw_rows
from common.datasets import augment, kept_back, to_float
from common.defence import (
    KEPT_BACK,
    clean_share,
    defence_flags,
    evaluate,
    frozen,
    halving,
    open_victim,
    report,
    save_repaired,
)
from common.models import is_map

SHARE = 0.05, 300  # of the training data, and the least number of images
BETAS = [500 / 1024, 1000 / 256, 1000 / 64]  # the last belongs to the last block
CUTOUT = 9 / 32  # the square's side as a share of the image's shorter side


def parse_args():
    p = defence_flags(__doc__, SHARE)
    names = "modules whose outputs' attention is drawn (default: see BLOCKS; paper: every group)"
    p.add_argument("--blocks", nargs="+", help=names)
    weights = "beta of each block (default: the last of .49 3.9 15.6, the code's 500 1000 1000)"
    p.add_argument("--betas", type=float, nargs="+", help=weights)
    p.add_argument("--teacher-epochs", type=int, default=10, help="the teacher's (paper 5 to 10)")
    p.add_argument("--epochs", type=int, default=20, help="the student's (paper 10; code 20)")
    p.add_argument("--batch-size", type=int, default=64, help="images per step (paper 64)")
    p.add_argument("--lr", type=float, help="first rate (paper .1; default: that or less)")
    square = "side of the black square on each training image (default: 9 of 32 pixels; 0: none)"
    p.add_argument("--cutout", type=int, help=square)
    p.add_argument("--max-drop", type=float, help="points that a repair may cost (default: 5)")
    return p.parse_args()


# the blocks of each architecture, in the order of its forward pass
BLOCKS = {
    "mnist_cnn": ["conv1", "layer3", "layer4"],
    "mnist_conv5": ["conv1", "conv5"],
    "preact_resnet18": ["layer2", "layer3", "layer4"],
    "resnet18": ["layer2", "layer3", "layer4"],
    "resnet34": ["layer2", "layer3", "layer4"],
    "wrn16_1": ["block1", "block2", "block3"],
    "nc_gtsrb_cnn": ["features.3", "features.9", "features.15"],  # before the pools
    "airbench": ["group1", "group2", "group3"],
    "wide_resnet34": ["layer1", "layer2", "layer3"],
    "densenet121": ["features.denseblock2", "features.denseblock3", "features.denseblock4"],
    "vgg16": ["features.22", "features.32", "features.42"],  # before the pools
    "vgg19": ["features.25", "features.38", "features.51"],
    "mobilenet_v2": ["layers.5", "layers.12", "layers.16"],
}


def keep(seen, name, module, inputs, output):
    """A forward hook: put a module's output into `seen`, as it is before a ReLU in place."""
    seen[name] = output.clone() if isinstance(output, torch.Tensor) else output


def outputs_of(net, names, x):
    """Logits of x (B x C x H x W in [0,1]) and a dict of the outputs of the modules `names`."""
    seen = {}
    hooks = [
        net.net.get_submodule(name).register_forward_hook(partial(keep, seen, name))
        for name in names
    ]
    logits = net(x)
    for hook in hooks:
        hook.remove()
    return logits, seen


@torch.no_grad()
def map_sizes(net, x):
    """H x W of every module's output that is B x C x H x W with more than one position, by name."""
    names = [name for name, _ in net.net.named_modules() if name]
    _, seen = outputs_of(net, names, x)
    outputs = {name: seen[name] for name in names if name in seen}
    return {k: tuple(v.shape[2:]) for k, v in outputs.items() if is_map(v, x)}


def attention(f):
    """A / |A| with A = sum_c F_c^2: B x H W of unit length, of a block's outputs B x C x H x W."""
    return F.normalize(f.float().square().sum(1).flatten(1), dim=1)


def distance(student, teacher):
    """L_NAD: squared distance (0 to 2) of the attention of two outputs, mean over the images."""
    return (attention(student) - attention(teacher)).square().sum(1).mean()


def cut_out(x, side):
    """B x C x H x W floats, each with a black square around a random pixel; edges may cut it.

    Cutout of one square of `side` pixels (DeVries & Taylor 2017, arXiv 1708.04552).
    """
    inside = []
    for n in x.shape[2:]:
        centre = torch.randint(n, (len(x), 1), device=x.device)
        away = torch.arange(n, device=x.device) - centre + side // 2
        inside.append((away >= 0) & (away < side))  # B x n
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None])[:, None], 0)


def finetune(net, x, y, *, teacher=None, betas=None, cutout=0, pad, flip, epochs, lr, batch_size):
    """SGD on clean uint8 images x N x C x H x W with labels y; returns a tuned, frozen copy.

    With a `teacher` the loss is CE + sum_l beta_l L_NAD of the blocks l in `betas` (name -> beta);
    teacher and student see the same crops, with `cutout` black pixels square. BatchNorm is in
    training mode, the teacher's is not.
    None where the loss diverges.
    """
    net = copy.deepcopy(net).requires_grad_(True).train()
    betas = {} if teacher is None else betas
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    log = TrainingLog(epochs, steps_per_epoch)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            images = augment(to_float(x[batch]), pad, flip)
            images = cut_out(images, cutout) if cutout else images
            logits, student = outputs_of(net, betas, images)
            terms = [F.cross_entropy(logits, y[batch])]
            if teacher is not None:
                with torch.no_grad():
                    _, wanted = outputs_of(teacher, betas, images)
                terms += [beta * distance(student[l], wanted[l]) for l, beta in betas.items()]
            loss = sum(terms)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(torch.stack(terms))
        if not log.total.isfinite().all():
            log.bar.close()
            return None
        log.epoch(epoch, ("cross-entropy", *betas), lines=2)
    return frozen(net, to_float(x[:500]))


@torch.no_grad()
def draw_attention(path, models, block, x):
    """Draw uint8 images and under them the attention of each of `models` (suffix -> network)."""
    images, names = to_float(x), {"": "suspect", "_clean_only": "tuned", "_repaired": "student"}
    rows = [("images", images)]
    for suffix, net in models.items():
        _, seen = outputs_of(net, [block], images)
        maps = attention(seen[block]).view(len(x), 1, *seen[block].shape[2:])
        maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)
        maps = F.interpolate(maps, x.shape[2:]).expand_as(images)
        rows.append((names.get(suffix, suffix[1:]), maps))
    draw_rows(path, rows)


if __name__ == "__main__":
    args = parse_args()
    check_positive(args, "teacher_epochs", "epochs", "batch_size", "lr", "max_drop")
    check_step(args)
    if args.betas:
        check_weights(args, "betas")
    start = time.time()
    victim = open_victim(args)
    model, data = victim.model, victim.data
    args.lr = args.lr or min(0.1, data.spec.lr)
    shorter = min(data.shape[1:])
    args.cutout = round(CUTOUT * shorter) if args.cutout is None else args.cutout
    if not 0 <= args.cutout < shorter:
        fail(f"--cutout {args.cutout} must lie in 0..{shorter - 1}: images are {data.shape}")
    sizes = map_sizes(model, to_float(data.x_train[:2]))
    blocks = args.blocks or BLOCKS.get(victim.arch)
    if not blocks or not {*blocks} <= {*sizes}:
        known = ", ".join(sizes) or "none"
        fail(f"--blocks {blocks}: blocks of {victim.arch} with a map of positions: {known}")
    betas = dict(zip(blocks, args.betas or BETAS[-len(blocks) :]))
    if not len(betas) == len(blocks) == len(args.betas or betas):
        fail(f"--betas: one for each of {len(blocks)} different blocks; got {args.betas}")
    split = clean_share(args, victim, SHARE)
    held = kept_back(data.y_train[split], KEPT_BACK, args.seed)
    if held.all():
        fail(f"all {len(split)} clean images are kept back; none is left to train on")
    x_clean, y_clean = data.x_train[split], data.y_train[split]
    clean, kept = (x_clean[~held], y_clean[~held]), (x_clean[held], y_clean[held])
    folder = make_folder(args.out or victim.folder / f"nad-s{args.seed}")
    for name, beta in betas.items():
        print(f"{name}: attention of {' x '.join(map(str, sizes[name]))} positions, beta {beta:g}")

    # ===== Teacher =====
    recipe = {"pad": data.spec.pad, "flip": data.spec.flip, "batch_size": args.batch_size}
    recipe["cutout"] = args.cutout
    teach = partial(finetune, model, *clean, epochs=args.teacher_epochs, **recipe)
    teacher, lr = halving(teach, args.lr, model, *kept, args.seed, args.max_drop, "teacher")
    models = {"": model}

    # ===== Repair =====
    recipe |= {"epochs": args.epochs}
    if teacher is not None:
        models["_teacher"] = teacher
        repair = partial(finetune, model, *clean, teacher=teacher, betas=betas, **recipe)
        repaired, lr = halving(repair, lr, model, *kept, args.seed, args.max_drop, "student")
        if repaired is not None:
            models["_repaired"] = repaired
    torch.manual_seed(args.seed)  # the draws of the repair
    tuned = finetune(model, *clean, lr=lr, **recipe)
    models |= {} if tuned is None else {"_clean_only": tuned}
    metrics = {"betas": betas, "maps": {name: sizes[name] for name in blocks}, "repair_lr": lr}
    metrics["kept_back"] = len(kept[0])
    clear_folder(folder)
    draw_attention(folder / "attention.png", models, blocks[-1], kept[0][:8])
    save_repaired(folder, models, victim, args, metrics)
    seconds = time.time() - start

    # ===== Evaluation: the defender does not see anything below =====
    metrics |= evaluate(victim, models)
    if victim.x_poisoned is not None:
        draw_attention(folder / "attention.png", models, blocks[-1], victim.x_poisoned[:8])

    # ===== Report =====
    kinds = ("teacher", "clean_only", "repaired")
    report(folder, "nad", args, metrics, seconds, kinds)
