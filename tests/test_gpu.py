"""CUDA without a GPU: real CPU tensors whose storage carries a mark of the device that it would be on."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten, CPU, CUDA = torch.ops.aten, torch.device("cpu"), torch.device("cuda", 0)
READS = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2)
waits = []  # what made the host wait for the GPU


def device_of(tensor):
    return getattr(tensor.untyped_storage(), "mark", CPU)


def mark(results, device):
    for tensor in tree_leaves(results):
        if isinstance(tensor, torch.Tensor):
            tensor.untyped_storage().mark = device
    return results


class Functions(TorchFunctionMode):
    """Takes the device out of each call, since it is not here, and marks what comes back."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func == torch.Tensor.device.__get__:
            return device_of(args[0])
        if name in ("numpy", "__array__") and device_of(args[0]) == CUDA:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        waits.extend([name] * (name == "tolist" and device_of(args[0]) == CUDA))
        given = [*args[1:], *kwargs.values()]
        target = next((d for d in given if isinstance(d, torch.device)), CPU if name == "cpu" else None)
        if target is None:
            return func(*args, **kwargs)
        target = CUDA if target.type == "cuda" else CPU
        if name not in ("to", "cpu"):
            return mark(func(*args, **kwargs | {"device": CPU}), target)
        moves = device_of(args[0]) != target
        if moves and target == CPU and True not in given:  # non_blocking
            waits.append(name)
        dtype = next((d for d in given if isinstance(d, torch.dtype)), args[0].dtype)
        return mark(args[0].to(dtype, copy=moves), target)


class Operations(TorchDispatchMode):
    """Refuses operations that mix devices as CUDA does, marks their results, and notes what the host waits for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op, tensors = func.overloadpacket, [t for t in tree_leaves([args, kwargs]) if isinstance(t, torch.Tensor)]
        indices = args[1] if op in (aten.index, aten.index_put, aten.index_put_) else ()
        strict = [t for t in tensors if t.ndim and not any(t is i for i in indices)]  # may not be on the CPU
        cuda = any(device_of(t) == CUDA for t in tensors) and op != aten.copy_
        if cuda and any(device_of(t) == CPU for t in strict):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        read = op == aten.copy_ and (device_of(args[0]), device_of(args[1])) == (CPU, CUDA)
        waits.extend([str(func)] * (read or (cuda and (masked or op in READS))))
        results = func(*args, **kwargs or {})
        return mark(results, CUDA) if cuda else results


@pytest.fixture(params=[(7, 5), (9, 0)], ids=["fp16", "bf16"])
def cuda(request, data_dir, monkeypatch, tmp_path):
    """A namespace for the notebook, on a pretended card; `half` in it is the precision that it should choose."""
    autocast, scaler, stream = torch.autocast, torch.amp.GradScaler, SimpleNamespace(is_capturing=lambda: False)
    monkeypatch.setattr(torch, "autocast", lambda kind, *args, **kwargs: autocast("cpu", *args, **kwargs))
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, **kwargs: scaler("cpu", **kwargs))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no card")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    for name, value in {"HW4_PRESET": "smoke", "FLICKR8K_DIR": data_dir, "CHECKPOINT_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("HW4_FRESH", raising=False)
    with Operations(), Functions():
        yield {"__name__": "hw4", "half": torch.float16 if request.param < (8, 0) else torch.bfloat16}


def run_cells(cells, namespace):
    """Execute cells of the notebook, with trainings that are as short as can be."""
    for cell in cells:
        namespace["display"] = lambda *args, **kwargs: SimpleNamespace(update=print)
        exec(compile(cell, "cell", "exec"), namespace)
        if "PRESETS = {" in cell:
            short = dict.fromkeys(("contrastive", "simclr"), namespace["Recipe"](1, 64, patch_keep=(0.5, 1.0)))
            namespace["PRESETS"]["smoke"] = replace(namespace["PRESETS"]["smoke"], **short, num_seeds=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what NumPy says of a tensor that is wrapped
def test_the_whole_notebook_mixes_no_devices_and_its_steps_do_not_wait(cells, cuda):
    run_cells(cells, cuda)
    hw4 = SimpleNamespace(**cuda)
    run = hw4.runs[hw4.SIMCLR][0]
    assert {device_of(p) for p in [*run.model.state_dict().values(), hw4.corpus.images]} == {CUDA}
    assert run.history[-1]["hardware"] == f"no card, {hw4.half}"

    def waits_per_step(model, embed, loss):
        """What two more steps of a training add, halved: the scaler may ask, for Muon, if a gradient overflowed."""
        counts, embed = [], partial(embed, corpus=hw4.corpus, config=hw4.config)
        for ids in (hw4.train_ids[:64], hw4.train_ids[: 3 * 64]):
            waits.clear()
            hw4.fit("steps", model, embed, loss, ids, hw4.config.simclr, [loss])
            counts.append(len(waits))
        return (counts[1] - counts[0]) / 2 - (hw4.half == torch.float16)

    assert waits_per_step(hw4.model, hw4.embed_pairs, partial(hw4.alignment_loss, caption_weight=0.5)) == 0
    assert waits_per_step(hw4.simclr, hw4.embed_views, hw4.nt_xent) == 0
    assert waits_per_step(hw4.simclr, hw4.embed_views, lambda *z: hw4.nt_xent(*z) * z[0].sum().item() ** 0) == 1
    with pytest.raises(RuntimeError, match="same device"):
        hw4.nt_xent(torch.randn(2, 4).to(CUDA), torch.randn(2, 4))
