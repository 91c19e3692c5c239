"""Parity with published code: torchvision, PyTorch's own Transformer and Muon, open_clip, lightly and torchmetrics."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from open_clip.loss import ClipLoss
from torchmetrics.retrieval import RetrievalHitRate
from torchvision.models import VisionTransformer
from torchvision.transforms import functional as tvf

# Models. The references have no layer scale, so it is folded into the linear layer before it.


def randomize(model):
    """Random values everywhere, so that no bias, norm or scale is a harmless 0 or 1."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def reference_weights(encoder, block_prefix, last_norm, names):
    """State dict of an encoder; `names` says what the reference calls norm1, qkv, proj, norm2 and both MLP layers."""
    state = {f"{last_norm}.{key}": value for key, value in encoder.norm.named_parameters()}
    for i, block in enumerate(encoder.blocks):
        parts = (block.norm1, block.attention.qkv, block.attention.proj, block.norm2, block.mlp[0], block.mlp[2])
        scales = (None, None, block.scale1, None, None, block.scale2)
        for part, scale, name in zip(parts, scales, names, strict=True):
            weight, bias = part.weight, part.bias
            if scale is not None:
                weight, bias = scale[:, None] * weight, scale * bias
            state[f"{block_prefix}{i}.{name}weight"], state[f"{block_prefix}{i}.{name}bias"] = weight, bias
    return state


@torch.no_grad()
def test_vit_equals_torchvision(hw4, smoke):
    ours = randomize(hw4.VisionTransformer(replace(smoke, vision=hw4.Size(width=24, depth=3, num_heads=3))))
    norm = partial(nn.LayerNorm, eps=1e-5)  # PyTorch's default; torchvision would take 1e-6
    reference = VisionTransformer(32, 8, 3, num_heads=3, hidden_dim=24, mlp_dim=96, norm_layer=norm).eval()
    reference.heads = nn.Identity()
    names = ("ln_1.", "self_attention.in_proj_", "self_attention.out_proj.", "ln_2.", "mlp.0.", "mlp.3.")
    state = reference_weights(ours.encoder, "encoder.layers.encoder_layer_", "encoder.ln", names)
    state["conv_proj.weight"] = ours.patch_embedding.weight.view(24, 3, 8, 8)
    state["conv_proj.bias"] = ours.patch_embedding.bias
    positions = ours.position_embedding  # the class token has none of its own
    state["class_token"], state["encoder.pos_embedding"] = ours.class_token, F.pad(positions, (0, 0, 1, 0))
    reference.load_state_dict(state)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), reference(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_encoder_equals_pytorch_with_and_without_padding(hw4):
    ours = randomize(hw4.Encoder(hw4.Size(width=24, depth=3, num_heads=3), layer_scale=0.1))
    layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, F.gelu, batch_first=True, norm_first=True)
    reference = nn.TransformerEncoder(layer, 3, nn.LayerNorm(24), enable_nested_tensor=False).eval()
    names = ("norm1.", "self_attn.in_proj_", "self_attn.out_proj.", "norm2.", "linear1.", "linear2.")
    reference.load_state_dict(reference_weights(ours, "layers.", "norm", names))
    x, mask = torch.randn(3, 9, 24), torch.arange(9) < torch.tensor([[9], [5], [1]])
    torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=0)
    expected = reference(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask)[mask], expected[mask], atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(x, mask, num_kept=1), expected[:, :1], atol=1e-5, rtol=0)


# Losses. In blocks they are the mean of the losses of the blocks.


def assert_same_loss_and_gradients(ours, reference, inputs):
    torch.testing.assert_close(ours, reference, atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(ours, inputs), torch.autograd.grad(reference, inputs)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


def mean_over_blocks(loss, x, y, block_size):
    pairs = zip(x.split(block_size or len(x)), y.split(block_size or len(y)), strict=True)
    return torch.stack([loss(*pair) for pair in pairs]).mean()


@pytest.fixture
def unit_vectors():
    torch.manual_seed(0)
    return F.normalize(torch.randn(4, 8, 16).double(), dim=-1).requires_grad_()


@pytest.mark.parametrize("block_size", [0, 2, 4])
def test_contrastive_loss_equals_open_clip(hw4, unit_vectors, block_size):
    u, v, *_ = unit_vectors
    scale = torch.tensor(1 / 0.07).double().requires_grad_()
    expected = mean_over_blocks(partial(ClipLoss(), logit_scale=scale), u, v, block_size)
    assert_same_loss_and_gradients(hw4.contrastive_loss(u, v, scale, block_size), expected, (unit_vectors, scale))


@pytest.mark.parametrize("block_size", [0, 4])
@pytest.mark.parametrize("caption_weight", [0.0, 0.3])
def test_loss_of_several_captions_equals_open_clip(hw4, smoke, unit_vectors, caption_weight, block_size):
    """Images against each of their captions; `caption_weight` counts the first caption against the others."""
    config = replace(smoke, caption_weight=caption_weight)
    model = hw4.DualEncoder(30, config).double()
    task = hw4.ContrastiveTask(model, None, config, config.contrastive)
    images, *texts = unit_vectors

    def mean(x, others):
        clip = partial(ClipLoss(), logit_scale=model.log_logit_scale.exp())
        return torch.stack([mean_over_blocks(clip, x, y, block_size) for y in others]).mean()

    expected = mean(images, texts) + caption_weight * mean(texts[0], texts[1:])
    ours = task.loss(images, torch.stack(texts), block_size)
    assert_same_loss_and_gradients(ours, expected, (unit_vectors, model.log_logit_scale))


@pytest.mark.parametrize("block_size", [0, 2, 4])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_lightly(hw4, temperature, block_size):
    """lightly scales to unit length itself, so ours does before its loss."""
    torch.manual_seed(0)
    z1, z2 = (torch.randn(8, 16).double().requires_grad_() for _ in range(2))
    ours = hw4.nt_xent(F.normalize(z1, dim=-1), F.normalize(z2, dim=-1), temperature, block_size)
    assert_same_loss_and_gradients(ours, mean_over_blocks(NTXentLoss(temperature), z1, z2, block_size), (z1, z2))


@pytest.mark.parametrize("block_size", [0, 4])
def test_loss_of_simclr_equals_lightly_at_the_temperature_of_the_settings(hw4, smoke, data, block_size):
    config, outputs = replace(smoke, temperature=0.3), []
    task = hw4.SimCLRTask(hw4.SimCLR(config), data, config, replace(config.simclr, block_size=block_size))
    task.model.register_forward_hook(lambda module, args, out: outputs.append(out))
    loss = task(data.train_ids[:8], 0.5)
    expected = mean_over_blocks(NTXentLoss(0.3), *outputs[0].chunk(2), block_size)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


# Muon


def svd_map(matrices):
    """Five Newton–Schulz steps on the singular values alone."""
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s[:, None] @ vh


@pytest.mark.parametrize("shape", [(3, 24, 8), (3, 8, 24), (3, 12, 12)])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.1)])
def test_orthogonalize_moves_the_singular_values_only(hw4, shape, dtype, error):
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.tensor([1e-4, 1, 1e4]).view(3, 1, 1)
    out, expected = hw4.orthogonalize(matrices, getattr(torch, dtype)), svd_map(matrices)
    assert out.dtype == getattr(torch, dtype) and out.shape == shape
    assert ((out - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).max() < error
    assert (torch.linalg.svdvals(out.double()) - 1).abs().max() < 0.4
    assert (hw4.orthogonalize(0 * matrices, torch.float32) == 0).all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has no Muon")
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_muon_equals_pytorch(hw4, monkeypatch, weight_decay):
    """Both multiply in bfloat16. Kernels of convolutions count as matrices of one row an output channel."""
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: torch.bfloat16)
    torch.manual_seed(0)
    shapes = [(24, 8), (8, 24), (12, 12), (24, 8), (6, 4, 3, 3)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(parameter.detach().flatten(1).clone()) for parameter in ours]
    starts = [parameter.detach().clone() for parameter in theirs]
    muon = hw4.Muon([{"params": ours, "weight_decay": weight_decay}], momentum=0.9)
    options = {"momentum": 0.9, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, weight_decay=weight_decay, **options)

    for step in range(6):
        muon.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.05 * (1 + step)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.flatten(1)
        muon.step()
        reference.step()

    for a, b, start in zip(ours, theirs, starts, strict=True):
        assert (a.flatten(1) - b).norm() < 0.05 * (b - start).norm()
    assert all(state["momentum"].dtype == torch.float32 for state in muon.state.values())


# Recall


def hit_rate(scores, match, k):
    queries = torch.arange(len(scores))[:, None].expand(scores.shape)
    return RetrievalHitRate(top_k=k)(scores, match, queries).item()


@pytest.mark.parametrize("k", [1, 3, 5, 10])
@pytest.mark.parametrize("tied", [False, True])
def test_recall_equals_torchmetrics(hw4, tied, k):
    """Where scores tie, the correct ones are lowered for torchmetrics: ties count against the model."""
    torch.manual_seed(0)
    match = hw4.caption_match(30)
    scores = torch.randint(40, (30, 150)).float() if tied else torch.randn(30, 150)
    lowered = scores - 0.5 * match if tied else scores
    recall = {way: values.mean().item() for way, values in hw4.recall_at_k(scores, [k]).items()}
    to_text, to_image = hit_rate(lowered, match, k), hit_rate(lowered.T, match.T, k)
    assert recall["image → text"] == pytest.approx(to_text) and 0 < to_text < 1
    assert recall["text → image"] == pytest.approx(to_image) and 0 < to_image < 1


# Views


@pytest.fixture
def draw(hw4, monkeypatch):
    """draw(((low, high), values), ...): what the next calls of `uniform` must ask for, and what they return."""

    def uniform(shape, low, high, device):
        bounds, values = left.pop(0)
        assert (low, high) == pytest.approx(bounds) and values.shape == torch.empty(shape).shape
        assert (values >= low - 1e-6).all() and (values <= high + 1e-6).all()
        return values.float()

    left = []
    monkeypatch.setattr(hw4, "uniform", uniform)
    yield lambda *calls: left.extend(calls)
    assert not left


def assert_close_pixels(out, references):
    for sample, reference in zip(out, references, strict=True):
        assert (sample - reference).abs().mean() <= 2 / 255


def test_crop_and_flip_equal_torchvision(hw4, draw):
    torch.manual_seed(0)
    size, S = 24, 40
    images = torch.randint(0, 256, (8, 3, S, S), dtype=torch.uint8)
    boxes = [(0, 0, 40, 40), (5, 9, 24, 24), (16, 16, 24, 24), (3, 1, 30, 36), (0, 13, 34, 27), (10, 0, 30, 39)]
    boxes += [(7, 11, 21, 22), (15, 2, 22, 20)]  # (top, left, height, width); the last two are enlarged
    top, left, height, width = torch.tensor(boxes, dtype=torch.float64).T / S
    x, y = ((2 * start + side - 1) / (1 - side).clamp(min=1e-9) for start, side in ((left, width), (top, height)))
    draw(((0.2, 1), height * width), ((math.log(3 / 4), math.log(4 / 3)), (width / height).log()))
    draw(((-1, 1), torch.stack([x, y], dim=1)))
    out = hw4.random_crop_flip(images, size, 0.2)
    crop = partial(tvf.resized_crop, size=[size, size], antialias=False)
    crops = [crop(image / 255, *box) for image, box in zip(images, boxes, strict=True)]
    flipped = [(o - c).abs().mean() > (o - tvf.hflip(c)).abs().mean() for o, c in zip(out, crops, strict=True)]
    assert 0 < sum(flipped) < 8
    assert_close_pixels(out, [tvf.hflip(c) if f else c for c, f in zip(crops, flipped, strict=True)])


@pytest.mark.parametrize("gray", [0.0, 1.0])
def test_colour_changes_equal_torchvision(hw4, draw, gray):
    """The images have a black, a white and a grey row."""
    torch.manual_seed(0)
    images, factors = torch.rand(6, 3, 16, 16), torch.tensor([0.6, 0.9, 1.0, 1.1, 1.2, 1.4])
    images[..., :3, :] = torch.tensor([0.0, 1.0, 0.5])[:, None]
    brightness, contrast, saturation = factors, factors.flip(0), factors.roll(2)
    draw(((0.5, 1.5), torch.stack([brightness, contrast, saturation])[..., None, None, None]))
    out, expected = hw4.color_jitter(images, 0.5, gray), []
    for image, b, c, s in zip(images, brightness.tolist(), contrast.tolist(), saturation.tolist(), strict=True):
        image = tvf.adjust_contrast(tvf.adjust_brightness(image, b), c)
        expected.append(tvf.rgb_to_grayscale(image, 3) if gray else tvf.adjust_saturation(image, s))
    assert_close_pixels(out, expected)


def test_plain_views_are_the_whole_photo_its_corners_and_its_centre(hw4):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    pixels = tvf.convert_image_dtype(images, torch.float32)
    pixels = tvf.normalize(pixels, [hw4.MEAN] * 3, [hw4.STD] * 3)
    views = hw4.plain_views(images, 32)
    assert views.shape == (3, 6, 3, 32, 32)
    whole = F.interpolate(pixels, 32, mode="bilinear", antialias=True)
    assert torch.allclose(views[:, 0], whole, atol=1e-5)
    for place, (top, left) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16), (8, 8)], start=1):
        crop = pixels[:, :, top : top + 32, left : left + 32]
        assert torch.allclose(views[:, place], crop, atol=1e-5)
