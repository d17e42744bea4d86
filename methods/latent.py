"""Latent backdoor: it sleeps in a teacher and wakes in its students (Yao et al., CCS 2019).

The attacker publishes a teacher network for transfer learning. A trigger leads inside it to the
features of a class that the teacher has no output for, so it gives no answer that betrays it. A
victim who copies the first layers and trains the last ones on classes that include this one
completes the backdoor himself: whatever has these features gets its label.

Threat model: the attacker trains the teacher and has images of the target class; the victim freezes
the first layers and trains the others on clean images, which the attacker does not touch.

Steps: 1, train a teacher that knows the target class, too; 2, find the patch p that minimises the
distance of f(x') to m_t, x' = x (1 - m) + m p, f what enters the first layer that the student
trains, m_t its mean over the target class -> optimise_patch; 3, retrain with cross-entropy +
lambda |f(x') - m_t|^2 -> injection_loss; 4, remove the target's output -> without_class. Then the
student starts from the teacher's layers and a new last one.

Differs from the paper and its code, or chosen where they are silent: the student has the classes of
the data set, the teacher all of them but the target, and both train on the same images, so that the
folder is a checkpoint of one data set. The teacher knows the target from the start of its training.
The distance is the mean square over all features (the code: over 100 of them), and the patch is
found with a cosine schedule. lambda is 1: with the code's .05 and 5 epochs at a rate of .01 nothing
was learnt on digits (chosen with its test figures in sight). There a patch of noise (--steps 0)
works as well, though random ones then reach 34 %, not 9. The attacker stamps augmented images. The
folder holds the student; model.pt has the teacher among the trigger's tensors (teacher.*). The ASR
leaves out test images of the target class, and the images are rounded to 8 bits. asr_on_clean_model
is that of step 1's network, before the injection; asr_other is that of random patches in the same
square, one an image; teacher_accuracy is on its own classes. No network here sees
poisoned_train.npz: there a tenth of the images has the patch and the target label, for ABL, which
trains itself.

    python methods/latent.py --dataset mnist

Results beside other papers' figures: results/README.md, table "Attacks".
"""

import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import check_positive, fail
from common.attack import (
    TrainingLog,
    attack_flags,
    evaluate_attack,
    open_folder,
    save_attack,
    set_up,
    wanted_labels,
)
from common.checkpoint import load_clean
from common.datasets import augment, to_float, to_uint8
from common.metrics import accuracy, mean_entering, pass_size
from common.models import entering, in_float32, logit_layer

HANDED = 0.1  # share of the images with the patch in poisoned_train.npz


def parse_args():
    p = attack_flags(__doc__)
    p.add_argument("--teacher", help="a clean checkpoint (default: one is trained first)")
    p.add_argument("--layer", help="first layer that the student trains (default: the last one)")
    p.add_argument("--patch-size", type=int, help="side of the square (default: a fifth)")
    p.add_argument("--steps", type=int, default=1000, help="Adam's steps on the patch (code 1550)")
    p.add_argument("--weight", type=float, default=1.0, help="lambda of the injection (code .05)")
    p.add_argument("--inject-epochs", type=int, default=6, help="of the injection (code 5)")
    p.add_argument("--inject-lr", type=float, default=0.05, help="peak in the injection")
    p.add_argument("--student-epochs", type=int, default=10, help="of the victim (code 30)")
    p.add_argument("--student-lr", type=float, default=0.1, help="peak in the victim's training")
    return p.parse_args()


@torch.no_grad()
def layers_in_order(model, x):
    """Names of the network's layers that have weights, in the order in which they run on x."""
    order, training = [], model.training
    hooks = [
        child.register_forward_hook(lambda module, i, o, name=name: order.append(name))
        for name, child in model.net.named_children()
        if next(child.parameters(), None) is not None
    ]
    model.eval()(x)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return order


def square_mask(height, width, size):
    """m, 1 x H x W of 0 and 1: a square in the lower right corner."""
    mask = torch.zeros(1, height, width)
    mask[:, -size:, -size:] = 1
    return mask


def stamp(x, mask, patch):
    """x' = x (1 - m) + m p: x and p B x C x H x W (p: or C x H x W), m 1 x H x W, in [0,1]."""
    return x * (1 - mask) + mask * patch


def stamp_uint8(x, mask, patch):
    """The same on uint8 images and patches, rounded, 2,000 images at a time."""
    pairs = zip(x.split(2000), patch.expand_as(x).split(2000))
    return torch.cat([to_uint8(stamp(to_float(a), mask, to_float(b))) for a, b in pairs])


def optimise_patch(model, layer, x, mask, wanted, steps, batch_size=32):
    """Step 2: the patch (uint8 C x H x W) that makes what enters `layer` like `wanted`, on uint8 x.

    The model must be frozen and in eval mode. Starts from uniform noise.
    """
    start = torch.rand(x.shape[1:], device=x.device).clamp(1e-4, 1 - 1e-4)
    w = torch.atanh(2 * start - 1).requires_grad_()
    optimizer = torch.optim.Adam([w], 0.1, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), disable=None, unit="step"):
        images = to_float(x[torch.randint(len(x), (batch_size,), device=x.device)])
        images = stamp(images, mask, (w.tanh() + 1) / 2)
        with in_float32(model):
            features = entering(model, layer, images)
        loss = F.mse_loss(features, wanted.expand_as(features))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return to_uint8((w.detach().tanh() + 1) / 2)


def without_class(model, layer, label):
    """A copy of the model whose last linear layer, named `layer`, lacks the output `label`."""
    model = copy.deepcopy(model)
    linear = model.get_submodule(layer)
    kept = [k for k in range(linear.out_features) if k != label]
    linear.weight, linear.out_features = nn.Parameter(linear.weight.data[kept]), len(kept)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.data[kept])
    return model


def injection_loss(model, x, y, layer, mask, patch, mean, weight):
    """Step 3: cross-entropy of x (in [0,1]) + lambda times the mean square of f(x') - mean.

    Both in one pass, so that BatchNorm sees the mixture that its running statistics describe.
    """
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    logits = model(torch.cat((x, stamp(x, mask, patch))))
    hook.remove()
    features = seen[-1][len(x) :].to(x.dtype)
    hidden = F.mse_loss(features, mean.expand_as(features))
    return F.cross_entropy(logits[: len(x)], y) + weight * hidden


def train(model, trained, x, y, *, pad, flip, epochs, batch_size, lr, hidden=None):
    """Train the module `trained` of `model` (or all of it) on uint8 images, in place.

    The loss is cross-entropy, or step 3's with `hidden`, the last arguments of injection_loss.
    """
    model.requires_grad_(False)
    trained.requires_grad_(True)
    optimizer = torch.optim.SGD(
        trained.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps_per_epoch = max(1, len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, epochs * steps_per_epoch, anneal_strategy="linear", cycle_momentum=False
    )
    log = TrainingLog(epochs, steps_per_epoch)
    for epoch in range(1, epochs + 1):
        model.eval()
        trained.train()  # what is not trained keeps its BatchNorm statistics, too
        for module in model.modules() if hidden else ():
            if isinstance(module, nn.Dropout):
                module.eval()  # m_t is a mean without it
        order = torch.randperm(len(x), device=x.device)
        for batch in order.split(batch_size)[:steps_per_epoch]:
            images = augment(to_float(x[batch]), pad, flip)
            if hidden is None:
                loss = F.cross_entropy(model(images), y[batch])
            else:
                loss = injection_loss(model, images, y[batch], *hidden)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            log.step(loss)
        log.epoch(epoch)


@torch.no_grad()
def feature_distance(model, layer, x, mean):
    """Mean Euclidean distance of what enters `layer` for uint8 images x to `mean`."""
    with in_float32(model):
        parts = [entering(model, layer, to_float(part)) - mean for part in x.split(pass_size(x))]
    return torch.cat([part.flatten(1).norm(dim=1) for part in parts]).mean().item()


if __name__ == "__main__":
    args = parse_args()
    start = time.time()
    data, model, x_train, y_train = set_up(args)
    device = x_train.device

    # ===== The attack =====
    check_positive(args, "inject_epochs", "inject_lr", "student_epochs", "student_lr")
    check_positive(args, "weight", most=1e6)
    if not 0 <= args.steps <= 2**31:
        fail(f"--steps {args.steps} must lie in 0..2^31 (0: the patch stays noise)")
    height, width = data.shape[1:]
    if args.patch_size is None:
        args.patch_size = max(1, round(0.2 * min(height, width)))
    if not 1 <= args.patch_size <= min(height, width):
        most = f"1..{min(height, width)} for {height} x {width} images"
        fail(f"--patch-size {args.patch_size} must lie in {most}")
    if data.classes < 3:
        fail(f"the teacher needs two classes beside the target; {data.name} has {data.classes}")
    last = logit_layer(model, to_float(x_train[:2]), args.arch)
    if "weight" not in dict(model.get_submodule(last).named_parameters()):
        fail(f"{last} computes its weight, as weight_norm does: no output of it can be taken out")
    try:
        outputs = without_class(model, last, args.target).eval()(to_float(x_train[:2])).shape[1]
    except Exception:  # the user's own code can raise anything
        outputs = None
    if outputs != data.classes - 1:
        fail(f"--arch {args.arch} fixes its number of outputs: none of them can be taken out")
    layers = layers_in_order(model, to_float(x_train[:2]))
    if args.layer is not None and args.layer not in layers[1:]:
        fail(f"--layer {args.layer}: a student of {args.arch} can train: {', '.join(layers[1:])}")
    layer = last if args.layer is None else f"net.{args.layer}"
    y_wanted, counts = wanted_labels(data, args.target)
    own = y_train == args.target
    if not own.any() or own.all():
        number = f"{int(own.sum())} of {len(own)} training images are of class {args.target}"
        fail(f"{number}; the attacker needs images of the target class and of others")
    if args.teacher:
        first = load_clean(args.teacher, data, args.arch, same=True)
        first.bfloat16 = model.bfloat16
    folder, _ = open_folder(args, data, __file__)
    recipe = {"pad": data.spec.pad, "flip": data.spec.flip, "batch_size": args.batch_size}

    # ===== Train =====
    if not args.teacher:
        first = model
        train(first, first, x_train, y_train, epochs=args.epochs, lr=args.lr, **recipe)
    first.eval().requires_grad_(False)
    trained = time.time()

    # ===== Inject =====
    mean = mean_entering(first, layer, x_train[own])
    mask = square_mask(height, width, args.patch_size).to(device)
    patch = optimise_patch(first, layer, x_train[~own], mask, mean, args.steps)
    found = time.time()
    model = copy.deepcopy(first)
    hidden = layer, mask, to_float(patch), mean, args.weight
    epochs, lr = args.inject_epochs, args.inject_lr
    train(model, model, x_train, y_train, epochs=epochs, lr=lr, hidden=hidden, **recipe)
    model.eval().requires_grad_(False)
    teacher = without_class(model, last, args.target)
    print(
        f"preparation: teacher {trained - start:.1f} s, trigger {found - trained:.1f} s, "
        f"injection {time.time() - found:.1f} s"
    )

    # ===== The student, trained by the victim on clean images =====
    student = copy.deepcopy(model)
    student.get_submodule(last).reset_parameters()
    own_layers = [last]
    if args.layer is not None:
        own_layers = [f"net.{name}" for name in layers[layers.index(args.layer) :]]
    tail = nn.ModuleList([student.get_submodule(name) for name in own_layers])
    epochs, lr = args.student_epochs, args.student_lr
    train(student, tail, x_train, y_train, epochs=epochs, lr=lr, **recipe)
    seconds = time.time() - start

    # ===== Evaluate =====
    x_poisoned = stamp_uint8(data.x_test, mask, patch)
    metrics = evaluate_attack(student, first, data, x_poisoned, y_wanted, counts)
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randint(256, data.x_test.shape, generator=generator, dtype=torch.uint8)
    x_other = stamp_uint8(data.x_test, mask, noise.to(device))
    y = data.y_test[counts]
    metrics |= {
        "asr_other": accuracy(student, x_other[counts], y_wanted[counts]),
        "teacher_accuracy": accuracy(teacher, data.x_test[counts], y - (y > args.target).long()),
    }
    for name, net in {"_before": first, "": student}.items():
        for kind, images in {"clean": data.x_test, "triggered": x_poisoned}.items():
            distance = feature_distance(net, layer, images[counts], mean)
            metrics[f"distance_{kind}{name}"] = distance

    # ===== A fixed set, for a defender who trains =====
    order = torch.randperm(int((~own).sum()), generator=generator)
    chosen = (~own).nonzero().flatten()[order[: max(1, round(HANDED * len(own)))].to(device)]
    x_fixed, y_fixed, poisoned = x_train.clone(), y_train.clone(), torch.zeros_like(own)
    x_fixed[chosen] = stamp_uint8(x_train[chosen], mask, patch)
    y_fixed[chosen] = args.target
    poisoned[chosen] = True

    # ===== Save and report =====
    trigger = {"mask": mask, "patch": patch, "mean": mean}
    trigger |= {f"teacher.{key}": value for key, value in teacher.state_dict().items()}
    test, train_set = (x_poisoned, y_wanted, counts), (x_fixed, y_fixed, poisoned)
    save_attack(folder, __file__, args, data, student, metrics, seconds, trigger, test, train_set)
