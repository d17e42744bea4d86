"""Rehearse a script on CUDA without a GPU: python tests/fake_cuda.py methods/wanet.py --epochs 1

A tensor "on cuda:0" holds a CPU tensor. Every operator is first checked by CUDA's device rules and
then computed on the CPU, so that a tensor that was left on the wrong device stops the script at
the line where a GPU would stop it. Autocast, vmap and the gradients' formulas are PyTorch's own.

The rules are PyTorch's: an operator needs a CUDA kernel (the dispatcher knows which have one), and
its tensors lie on one device. native_functions.yaml marks the operators that leave this check to
TensorIterator; the binary ones among them take a CPU tensor without dimensions. An index may stay
on the CPU. A random generator belongs to the device on which the operator draws.

Not rehearsed: cuDNN, streams, memory, rounding, fused optimisers, torch.compile, inference_mode and
create_graph. torch.save and torch.load must go through the CPU. The index and fill rules come from
PyTorch's sources; no GPU has confirmed them. Needs a CUDA build of PyTorch (Linux's from PyPI is
one) and private parts of it: 2.11 and 2.14 are tried, 2.6 lacks one. A real GPU is hidden.
"""

import os
import re
import runpy
import sys
from pathlib import Path

import torch
import torchgen
from torch.autograd.graph import get_gradient_edge
from torch.optim.optimizer import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

POSSIBLE = torch.version.cuda is not None and hasattr(torch._C, "_ensureCUDADeviceGuardSet")
NAME = "no GPU: a rehearsal"
GPUS = 2  # so that a tensor on the wrong GPU is seen too
CPU = torch.device("cpu")

YAML = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
ENTRIES = re.split(r"^- func: ", YAML.read_text(), flags=re.M)[1:]
UNCHECKED = {entry[: entry.index("(")] for entry in ENTRIES if "device_check: NoCheck" in entry}
CROSSING = {"_to_copy", "copy_", "copy", "_foreach_copy_"}  # they are there to cross devices
INDICES = "List[Optional[Tensor]]"  # the type of the argument that may stay on the CPU
SCALARS = {  # what may be a CPU tensor without dimensions, if it is not that of a binary operator
    "where.self": {"condition", "self", "other"},
    "masked_fill.Tensor": {"value"},
    "masked_fill_.Tensor": {"value"},
    "masked_fill.Scalar": set(),  # two tensors, but no binary operator
    "masked_fill_.Scalar": set(),
    "index_put": {"values"},
    "index_put_": {"values"},
    "_index_put_impl_": {"values"},
}
NO_INTEGERS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}
PRODUCTS = NO_INTEGERS | {"convolution_backward"}

generators = {}  # those of the GPU, by address: the dispatcher hands out new Python objects
operators = []  # the names of those that ran on the GPU


class CudaTensor(torch.Tensor):
    """Says that it is on a GPU; its values are those of the CPU tensor `held`."""

    @staticmethod
    def __new__(cls, held, device):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), dtype=held.dtype, device=device, **layout
        )
        self.held = held
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    def numpy(self):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def tolist(self):
        return self.detach().cpu().tolist()

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)


class Rehearsal(TorchDispatchMode):
    """Sees the operators that no CudaTensor enters: those that make one, and those on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})


class Generator(torch.Generator):
    """torch.Generator("cuda") without a GPU; it draws what a CPU generator draws."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls, device="cpu")
        if torch.device(device).type == "cuda":
            generators[self._cdata] = self
        return self

    @property
    def device(self):
        return torch.device("cuda" if self._cdata in generators else "cpu")


def execute(func, args, kwargs):
    """Check the operator by CUDA's rules, compute it on the CPU, wrap what a GPU would hold."""
    leaves = tree_leaves((args, kwargs))
    device = next((leaf.device for leaf in leaves if isinstance(leaf, CudaTensor)), CPU)
    on_gpu = device.type == "cuda"
    device = kwargs.get("device") or device
    for generator in (leaf for leaf in leaves if isinstance(leaf, torch._C.Generator)):
        if (generator._cdata in generators) != (device.type == "cuda"):
            raise RuntimeError(f"Expected a '{device.type}' device type for generator in {func}")
    if not on_gpu and device.type != "cuda":
        return func(*args, **kwargs)
    check(func, args, kwargs)
    operators.append(func.name())
    held, options = tree_map_only(CudaTensor, lambda tensor: tensor.held, (args, kwargs))
    if options.get("device"):
        options["device"] = CPU
    if func.name().removeprefix("aten::").split(".")[0] in PRODUCTS:
        result = product(func, held)
    else:
        result = func(*held, **options)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        result = tree_map_only(torch.Tensor, lambda tensor: CudaTensor(tensor, device), result)
    return return_and_correct_aliasing(func, args, kwargs, result)


def product(func, args):
    """A product of bfloat16 tensors, computed in float32: few CPUs have one, and it is slow."""
    halves = {leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)}
    if halves != {torch.bfloat16}:
        return func(*args)
    result = func(*tree_map_only(torch.Tensor, torch.Tensor.float, args))
    return tree_map_only(torch.Tensor, torch.Tensor.bfloat16, result)


def check(func, args, kwargs):
    """Raise what CUDA would raise."""
    name, arguments = func.name().removeprefix("aten::"), func._schema.arguments
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CUDA"):
        raise NotImplementedError(f"Could not run '{func.name()}' with the 'CUDA' backend")
    given = dict(zip((argument.name for argument in arguments), args)) | kwargs
    inputs = {a.name for a in arguments if "Tensor" in str(a.type) and not a.is_out}
    binary = name in UNCHECKED and len(inputs) == 2
    scalars = SCALARS.get(name, inputs if binary else set())
    devices = set()
    for argument in arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        for value in tree_leaves(given.get(argument.name)):
            if not isinstance(value, torch.Tensor):
                continue
            if name in NO_INTEGERS and not (value.is_floating_point() or value.is_complex()):
                raise NotImplementedError(f"{func} is not implemented for {value.dtype} on CUDA")
            scalar = argument.name in scalars and value.dim() == 0 and not written
            if value.device != CPU or not (scalar or str(argument.type) == INDICES):
                devices.add(str(value.device))
    if len(devices) > 1 and name not in CROSSING:
        found = " and ".join(sorted(devices))
        raise RuntimeError(f"Expected all tensors to be on the same device: {found} in {func}")


ENGINE = torch.autograd.graph._engine_run_backward


def run_backward(outputs, gradients, keep_graph, create_graph, inputs, *rest, **flags):
    """The backward pass, node by node: autograd's own loop over its nodes needs a CUDA driver.

    Stands for torch.autograd's _engine_run_backward, which backward() and autograd.grad() call.
    """
    if not any(isinstance(output, CudaTensor) for output in outputs):
        return ENGINE(outputs, gradients, keep_graph, create_graph, inputs, *rest, **flags)
    assert not create_graph, "the rehearsal has no second derivatives"
    wanted = [get_gradient_edge(tensor)[:2] for tensor in inputs]
    found, waiting = {}, {}  # (node, slot) -> gradient; node -> {slot: gradient}
    for output, gradient in zip(outputs, gradients):
        node, slot = get_gradient_edge(output)[:2]
        waiting.setdefault(node, {})[slot] = gradient
    with torch.no_grad():
        while waiting:  # the node that was made last has all its gradients
            node = max(waiting, key=lambda node: node._sequence_nr())
            grads = waiting.pop(node)
            for slot, grad in grads.items():
                found[node, slot] = found[node, slot] + grad if (node, slot) in found else grad
            is_leaf = hasattr(node, "variable")  # its gradients may come one after another
            if is_leaf and not (flags["accumulate_grad"] and (not wanted or (node, 0) in wanted)):
                continue
            step = getattr(node, "apply", node)  # `apply`: a torch.autograd.Function's own backward
            below = step(*(grads.get(slot) for slot in range(len(node._input_metadata))))
            below = below if isinstance(below, (tuple, list)) else [below]
            for grad, (child, slot) in zip(below, node.next_functions):
                if grad is not None and child is not None:
                    meta, known = child._input_metadata[slot], waiting.setdefault(child, {})
                    if grad.device != meta.device:
                        where = f"expected device {meta.device} but got {grad.device}"
                        raise RuntimeError(f"{node.name()} returned an invalid gradient: {where}")
                    grad = grad.sum_to_size(meta.shape).to(meta.dtype)
                    known[slot] = known[slot] + grad if slot in known else grad
    return tuple(found.get(edge) for edge in wanted)


def install():
    """Let torch.cuda look like two GPUs, for the rest of this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch._C._ensureCUDADeviceGuardSet()  # autograd's nodes ask for one; FakeTensorMode uses it
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) goes through _to_copy
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps the Parameters
    _foreach_supported_types.append(CudaTensor)  # the optimisers' default on CUDA
    torch.backends.cudnn.enabled = False
    torch.autograd._engine_run_backward = run_backward
    torch.Generator = Generator
    answers = {"is_available": True, "is_initialized": True, "is_bf16_supported": True}
    answers |= {"get_device_capability": (9, 0)}
    answers |= {"device_count": GPUS, "current_device": 0, "get_device_name": NAME}
    answers |= {"get_rng_state": torch.zeros(16), "is_current_stream_capturing": False}
    silent = "_lazy_init synchronize empty_cache set_device set_rng_state manual_seed"
    answers |= dict.fromkeys([*silent.split(), "manual_seed_all"])
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    Rehearsal().__enter__()


if __name__ == "__main__":
    install()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    print(f"rehearsed: {len(operators)} operators on CUDA", file=sys.stderr)
