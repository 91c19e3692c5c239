"""A GPU without a GPU: real CPU tensors whose storage carries a mark of the device that it would be on."""

import types
from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, CPU, CUDA = torch.ops.aten, torch.device("cpu"), torch.device("cuda", 0)
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2)
WITHOUT_KERNEL = (aten._local_scalar_dense, aten._unsafe_view, aten.detach, aten.lift_fresh, aten._reshape_alias)


def device_of(tensor):
    return getattr(tensor.untyped_storage(), "mark", CPU)


def mark(results, device):
    for tensor in tree_leaves(results):
        if isinstance(tensor, torch.Tensor):
            tensor.untyped_storage().mark = device
    return results


def launches(func, args):
    """How many kernels an operation launches at least: none if it is a view or an allocation without a fill."""
    op = func.overloadpacket
    views = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
    if func.namespace != "aten" or views or op in WITHOUT_KERNEL or "empty" in op.__name__:
        return 0
    if not op.__name__.startswith("_foreach"):
        return 1
    columns = list(zip(*[arg for arg in args if isinstance(arg, (list, tuple))], strict=True))
    together = all(len({(t.dtype, t.stride()) for t in column}) == 1 for column in columns)
    return 1 if together else len(columns)  # one by one where types or strides differ


class Functions(TorchFunctionMode):
    """Takes the device out of each call, since it is not here, and marks what comes back."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        source = device_of(args[0]) if args and isinstance(args[0], torch.Tensor) else CPU
        if func == torch.Tensor.device.__get__:
            return source
        if name in ("numpy", "__array__") and source == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and source == CUDA:
            self.gpu.traffic["to the host: tolist"] += 1
        if name == "softmax" and source == CUDA and torch.is_autocast_enabled("cpu"):
            args = args[0].float(), *args[1:]  # what autocast does on CUDA, but not on a CPU

        given = [*args[1:], *kwargs.values()]
        targets = [d for d in given if isinstance(d, torch.device) or d == "cuda"] if name != "__eq__" else []
        if name in ("cpu", "cuda"):
            targets = [name]
        if not targets:
            return func(*args, **kwargs)
        target = CUDA if torch.device(targets[0]).type == "cuda" else CPU
        if name in ("to", "cpu", "cuda"):
            return self.move(args[0], target, given)
        if name in ("tensor", "as_tensor") and target == CUDA:
            self.gpu.traffic[f"to the device: {name}"] += 1
        self.gpu.making = target == CUDA
        try:
            return mark(func(*args, **kwargs | {"device": CPU}), target)
        finally:
            self.gpu.making = False

    def move(self, tensor, target, given):
        moves = device_of(tensor) != target
        if moves:
            self.gpu.traffic[f"to the {'device' if target == CUDA else 'host'}: to"] += 1
        dtype = next((d for d in given if isinstance(d, torch.dtype)), tensor.dtype)
        return mark(tensor.to(dtype, copy=moves), target)


class Operations(TorchDispatchMode):
    """Refuses operations that mix devices as CUDA does, marks their results, and counts."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, tensors = func.overloadpacket, [t for t in tree_leaves([args, kwargs]) if isinstance(t, torch.Tensor)]
        indices = args[1] if op in (aten.index, aten.index_put, aten.index_put_) else ()
        indices = [index for index in indices if index is not None]
        cuda = any(device_of(t) == CUDA for t in tensors)
        if cuda and op == aten.copy_:
            target, source = map(device_of, args[:2])
            if target != source:
                self.gpu.traffic[f"to the {'device' if target == CUDA else 'host'}: copy_"] += 1
        elif cuda:
            here = [t for t in tensors if device_of(t) == CPU and t.ndim]
            if any(not any(t is index for index in indices) for t in here):
                raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
            self.gpu.traffic["to the device: index"] += len(here)
            if op in READS or any(index.dtype == torch.bool for index in indices):
                self.gpu.traffic[f"to the host: {op.__name__}"] += 1
        if cuda or self.gpu.making or op == aten.scalar_tensor:
            self.gpu.kernels[self.gpu.parts[-1]] += launches(func, args)
        results = func(*args, **kwargs or {})
        return mark(results, CUDA) if cuda else results


class PretendedGPU:
    """A context in which PyTorch has one GPU whose `choose_dtype` is `half`; it counts what that GPU would do.

    `traffic` counts what passes between host and device, for which the host waits (so do reads and data-dependent
    shapes); `kernels` counts, for each part of a step, operations that launch kernels (some launch several).
    """

    def __init__(self, half=torch.bfloat16):
        self.capability = (9, 0) if half == torch.bfloat16 else (7, 5)
        self.traffic, self.kernels, self.parts, self.making = Counter(), Counter(), ["rest"], False

    def __enter__(self):
        autocast, scaler, optimizer = torch.autocast, torch.amp.GradScaler, torch.optim.Optimizer
        by_device = optimizer._group_tensors_by_device_and_dtype  # in C++, which sees where tensors really are

        def group(tensors, with_indices=False):
            return {(CUDA, dtype): found for (_, dtype), found in by_device(tensors, with_indices).items()}

        stream = types.SimpleNamespace(is_capturing=lambda: False)
        with ExitStack() as stack:
            for owner, name, value in (
                (torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs)),
                (torch.amp, "GradScaler", lambda kind="cuda", **kwargs: scaler("cpu", **kwargs)),
                (torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda")),
                (torch.accelerator, "current_stream", lambda: stream),
                (optimizer, "_group_tensors_by_device_and_dtype", staticmethod(group)),
                (torch.cuda, "is_available", lambda: True),
                (torch.cuda, "is_current_stream_capturing", lambda: False),
                (torch.cuda, "get_device_capability", lambda device=None: self.capability),
                (torch.cuda, "get_device_name", lambda device=None: "no card"),
            ):
                stack.enter_context(patch.object(owner, name, value))
            stack.enter_context(Operations(self))
            stack.enter_context(Functions(self))
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        self.stack.close()

    @contextmanager
    def counting(self, part, owner, name):
        """Let kernels of calls of `owner.name` count for `part`."""
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            self.parts.append(part)
            try:
                return original(*args, **kwargs)
            finally:
                self.parts.pop()

        with patch.object(owner, name, counted):
            yield

    def cost_of_a_step(self, train, parts=()):
        """(traffic, kernels) that one more step of `train(number of steps)` adds; parts: (part, owner, name)."""
        counts = []
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(self.counting(*part))
            for steps in (1, 1, 3):  # the first makes the states of the optimizers
                self.traffic.clear()
                self.kernels.clear()
                train(steps)
                counts.append((self.traffic.copy(), self.kernels.copy()))
        _, one, three = counts
        return [{key: (b[key] - a[key]) / 2 for key in b if b[key] != a[key]} for a, b in zip(one, three, strict=True)]
