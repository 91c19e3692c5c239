"""CUDA without a GPU: no devices are mixed, and a step neither waits nor copies between host and device."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import steps
import torch
from pretended import CUDA, PretendedGPU, device_of
from synthetic import make_flickr8k


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def half(request):
    return request.param


@pytest.fixture
def gpu(hw4, half, monkeypatch):
    monkeypatch.setattr(hw4, "choose_dtype", hw4.measured_dtype)
    with PretendedGPU(half) as gpu:
        assert hw4.choose_dtype(torch.device("cuda")) == half
        yield gpu


@pytest.fixture
def trainer(hw4, gpu):
    """A function that makes a trainer of the preset `full`, perhaps spoilt by something that each step does.

    Channels and pixels are few, since they change no count.
    """
    config = steps.with_batches_of(8, hw4.PRESETS["full"])
    sizes = {"vision": replace(config.vision, width=32), "text": replace(config.text, width=24)}
    config = replace(config, **sizes, embed_dim=16, image_size=32, projector=(32, 16))
    data = steps.random_data(hw4, config, num_images=48, num_tokens=50, device="cuda")

    def make(kind, spoil=None):
        def hook(task, arguments):
            spoil(data.images, arguments[0])

        task = steps.make_task(hw4, kind, data, config)
        if spoil:
            task.register_forward_pre_hook(hook)
        return steps.trainer(hw4, task)

    return make


def traffic_of_the_scaler(half):
    """In float16 it asks, for Muon, whether a gradient overflowed."""
    return {"to the host: _local_scalar_dense": 1} if half == torch.float16 else {}


@pytest.mark.parametrize("kind", steps.KINDS)
def test_a_step_neither_waits_nor_copies_between_host_and_device(gpu, half, trainer, kind):
    traffic, _ = gpu.cost_of_a_step(trainer(kind))
    assert traffic == traffic_of_the_scaler(half)


SPOILERS = {
    "index on the CPU": lambda images, ids: images[torch.arange(2)],
    "tensor sent": lambda images, ids: torch.ones(3).to(ids.device),
    "tensor made of a list": lambda images, ids: torch.tensor([1, 2], device=ids.device),
    "tensor copied into another": lambda images, ids: torch.empty_like(ids).copy_(torch.arange(len(ids))),
    "tensor fetched": lambda images, ids: ids.cpu(),
    "number read": lambda images, ids: ids.sum().item(),
    "condition": lambda images, ids: bool(ids[0] > 0),
    "mask as an index": lambda images, ids: ids[ids > 0],
    "list": lambda images, ids: ids.tolist(),
}


@pytest.mark.parametrize("half", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_whatever_waits_or_copies_in_a_step_is_found(gpu, trainer, spoil):
    traffic, _ = gpu.cost_of_a_step(trainer("simclr", spoil))
    assert sum(traffic.values()) == 1


@pytest.mark.parametrize("half", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, most", [("contrastive", 1450), ("simclr", 900)])
def test_a_step_launches_few_kernels(hw4, gpu, trainer, kind, most):
    _, kernels = gpu.cost_of_a_step(trainer(kind), steps.parts(hw4))
    assert sum(kernels.values()) <= most, kernels


def test_devices_do_not_mix(hw4, gpu):
    with pytest.raises(RuntimeError, match="same device"):
        hw4.nt_xent(torch.randn(2, 4).to(CUDA), torch.randn(2, 4), 0.2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what NumPy says of a tensor that is wrapped
@pytest.mark.parametrize("half", [torch.float16], ids=str)
def test_the_whole_notebook_mixes_no_devices(cells, half, here, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setenv("HW4_PRESET", "smoke")
    monkeypatch.setenv("FLICKR8K_DIR", str(make_flickr8k(here / "flickr8k", num_images=60)))
    names = {"__name__": "hw4"}
    with PretendedGPU(half):
        for cell in cells:
            exec(compile(cell, "cell", "exec"), names)
            if "PRESETS = {" in cell:
                names["PRESETS"]["smoke"] = shortest(names["PRESETS"]["smoke"], names["Size"])
    results = names["results"].values()
    assert {device_of(p) for (run, *_) in results for p in run.model.parameters()} == {CUDA}
    assert device_of(names["data"].images) == CUDA


def shortest(config, size):
    """Settings with which each training has a few steps of a tiny model."""
    config = steps.with_batches_of(8, config)
    protocol = replace(config.protocol, num_seeds=1, control_epochs=1, comparison_epochs=1)
    sizes = dict.fromkeys(("vision", "text"), size(width=16, depth=1, num_heads=2))
    sizes |= {"embed_dim": 16, "image_size": 16, "projector": (16, 8), "num_images": 60, "num_val": 20}
    return replace(config, protocol=protocol, **sizes)
