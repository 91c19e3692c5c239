"""On a real GPU: steps equal those of the CPU, nothing in them waits, and milliseconds are printed."""

import time

import pytest
import steps
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRECISIONS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of one number


@pytest.fixture(params=PRECISIONS, ids=str)
def half(hw4, request, monkeypatch):
    """The precision on the GPU; the CPU keeps float32."""
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: request.param if device.type == "cuda" else torch.float32)
    return request.param


@pytest.fixture
def full(hw4):
    return hw4.PRESETS["full"]


@pytest.fixture
def drawn_on_the_cpu(monkeypatch):
    """Random numbers come from the CPU's generator, so that they are equal on both devices."""
    rand, uniform = torch.rand, torch.Tensor.uniform_

    def fill(x, *ends, **others):
        return x.copy_(uniform(torch.empty(x.shape), *ends, **others))

    monkeypatch.setattr(torch, "rand", lambda *size, device=CPU: rand(*size).to(device))
    monkeypatch.setattr(torch.Tensor, "uniform_", fill)


def relative_error(values, expected):
    """Of two lists of tensors, all together."""
    values, expected = (torch.cat([x.detach().flatten().cpu().double() for x in xs]) for xs in (values, expected))
    return ((values - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", steps.KINDS)
def test_loss_and_gradients_equal_those_of_the_cpu(hw4, half, full, drawn_on_the_cpu, kind):
    config = steps.with_batches_of(16, full)
    losses, gradients = [], []

    for device in (CUDA, CPU):
        data = steps.random_data(hw4, config, num_images=32, device=device)
        task = steps.make_task(hw4, kind, data, config)
        loss = 1000 * task(data.train_ids[:16], 0.5)  # as the gradient scaler does, or float16 is too coarse near zero
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in task.model.parameters()])

    assert relative_error(*[[loss] for loss in losses]) < 4 * PRECISIONS[half]
    assert relative_error(*gradients) < 64 * PRECISIONS[half]


def test_optimizers_move_weights_as_on_the_cpu(hw4, half, full):
    moves = []

    for device in (CUDA, CPU):
        torch.manual_seed(0)
        model = hw4.DualEncoder(3000, full)
        gradients = [torch.randn_like(parameter) for parameter in model.parameters()]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        model.to(device)
        optimizers = hw4.make_optimizers(model, full.contrastive)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient.to(device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"]
            optimizer.step()
        moves.append([now.detach().cpu() - then for now, then in zip(model.parameters(), before, strict=True)])

    assert relative_error(*moves) < 16 * PRECISIONS[half]


@pytest.mark.parametrize("kind", steps.KINDS)
def test_nothing_in_a_step_waits_for_the_gpu(hw4, half, full, monkeypatch, kind):
    """Only the mean loss of the epoch is read, and in float16 once a step, for Muon, whether a gradient overflowed."""
    config, reads, item = steps.with_batches_of(16, full), [], torch.Tensor.item
    data = steps.random_data(hw4, config, num_images=128, device=CUDA)
    train = steps.trainer(hw4, steps.make_task(hw4, kind, data, config))
    train(2)  # the first steps may wait, for libraries to be loaded

    def read(tensor):
        reads.append(1)
        torch.cuda.set_sync_debug_mode("default")
        value = item(tensor)
        torch.cuda.set_sync_debug_mode("error")
        return value

    monkeypatch.setattr(torch.Tensor, "item", read)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(4)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(reads) == 1 + 4 * (half == torch.float16)


@pytest.mark.parametrize("kind", steps.KINDS)
def test_milliseconds_of_a_step_in_preset_full(hw4, full, capsys, monkeypatch, kind):
    monkeypatch.setattr(hw4, "choose_dtype", hw4.measured_dtype)
    recipe = getattr(full, kind)
    data = steps.random_data(hw4, full, num_images=8091, device=CUDA)
    train = steps.trainer(hw4, steps.make_task(hw4, kind, data, full))
    train(3)
    start = time.perf_counter()
    train(10)
    milliseconds = 1000 * (time.perf_counter() - start) / 10
    with capsys.disabled():
        card = f"{torch.cuda.get_device_name()}, {hw4.choose_dtype(CUDA)}"
        print(f"\n{kind}: {milliseconds:.1f} ms a step of {recipe.batch_size} photos on {card}")
    assert milliseconds < 1000
