"""Parity with published code: torchvision, PyTorch's own Transformer, open_clip, lightly and torchmetrics."""

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
def test_vit_equals_torchvision(hw4):
    ours = randomize(hw4.VisionTransformer(32, 8, dim=24, depth=3, num_heads=3))
    norm = partial(nn.LayerNorm, eps=1e-5)  # PyTorch's default; torchvision would take 1e-6
    reference = VisionTransformer(32, 8, 3, num_heads=3, hidden_dim=24, mlp_dim=96, norm_layer=norm).eval()
    reference.heads = nn.Identity()
    names = ("ln_1.", "self_attention.in_proj_", "self_attention.out_proj.", "ln_2.", "mlp.0.", "mlp.3.")
    state = reference_weights(ours.encoder, "encoder.layers.encoder_layer_", "encoder.ln", names)
    state["conv_proj.weight"] = ours.patch_embedding.weight.view(24, 3, 8, 8)
    state["conv_proj.bias"] = ours.patch_embedding.bias
    state["class_token"], state["encoder.pos_embedding"] = ours.class_token, ours.position_embedding
    reference.load_state_dict(state)
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ours(images), reference(images), atol=1e-5, rtol=0)


@torch.no_grad()
def test_encoder_equals_pytorch_with_and_without_padding(hw4):
    ours = randomize(hw4.Encoder(24, depth=3, num_heads=3))
    layer = nn.TransformerEncoderLayer(24, 3, 96, 0.0, F.gelu, batch_first=True, norm_first=True)
    reference = nn.TransformerEncoder(layer, 3, nn.LayerNorm(24), enable_nested_tensor=False).eval()
    names = ("norm1.", "self_attn.in_proj_", "self_attn.out_proj.", "norm2.", "linear1.", "linear2.")
    reference.load_state_dict(reference_weights(ours, "layers.", "norm", names))
    x, mask = torch.randn(3, 9, 24), torch.arange(9) < torch.tensor([[9], [5], [1]])
    torch.testing.assert_close(ours(x), reference(x), atol=1e-5, rtol=0)
    expected = reference(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(ours(x, mask)[mask], expected[mask], atol=1e-5, rtol=0)


def assert_same_loss_and_gradients(ours, reference, inputs):
    torch.testing.assert_close(ours, reference, atol=1e-10, rtol=0)
    gradients = torch.autograd.grad(ours, inputs), torch.autograd.grad(reference, inputs)
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.parametrize("caption_weight", [0.0, 0.3])
def test_contrastive_and_alignment_loss_equal_open_clip(hw4, size, caption_weight):
    """In blocks they are the mean over the blocks; `caption_weight` counts the first caption against the others."""
    torch.manual_seed(0)
    images, *texts = F.normalize(torch.randn(4, 8, 16).double(), dim=-1).requires_grad_()
    scale, B = torch.tensor(1 / 0.07).double().requires_grad_(), size or 8

    def reference(x, others):
        parts = [pair for y in others for pair in zip(x.split(B), y.split(B), strict=True)]
        return torch.stack([ClipLoss()(*pair, scale) for pair in parts]).mean()

    expected = reference(images, texts) + caption_weight * reference(texts[0], texts[1:])
    ours = hw4.alignment_loss(images, torch.stack(texts), scale, caption_weight, negatives=size)
    assert_same_loss_and_gradients(ours, expected, (images, *texts, scale))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_lightly(hw4, temperature):
    """lightly scales to unit length itself, so ours does before its loss."""
    torch.manual_seed(0)
    z1, z2 = (torch.randn(8, 16).double().requires_grad_() for _ in range(2))
    ours = hw4.nt_xent(F.normalize(z1, dim=-1), F.normalize(z2, dim=-1), temperature)
    assert_same_loss_and_gradients(ours, NTXentLoss(temperature)(z1, z2), (z1, z2))


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
    recall = {name: values.mean().item() for name, values in hw4.recall_at_k(scores).items()}
    to_text, to_image = hit_rate(lowered, match, k), hit_rate(lowered.T, match.T, k)
    assert recall[f"image → text, R@{k}"] == pytest.approx(to_text)
    assert recall[f"text → image, R@{k}"] == pytest.approx(to_image)
    assert 0 < to_text < 1 and 0 < to_image < 1
    assert k != 5 or recall["R@5"] == pytest.approx((to_text + to_image) / 2)


@pytest.fixture
def draw(hw4, monkeypatch):
    """draw(a, b, ...): the next calls of `uniform` return these, one value a sample, if within its bounds."""

    def uniform(n, low, high, device):
        drawn = left.pop(0).float().view(n, 1, 1, 1)
        assert (drawn >= low - 1e-6).all() and (drawn <= high + 1e-6).all()
        return drawn

    left = []
    monkeypatch.setattr(hw4, "uniform", uniform)
    return lambda *values: left.extend(values)


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
    draw(height * width, (width / height).log(), x, y)
    out = hw4.random_crop_flip(images, size, 0.2)
    crop = partial(tvf.resized_crop, size=[size, size], antialias=False)
    crops = [crop(image / 255, *box) for image, box in zip(images, boxes, strict=True)]
    flipped = [(o - c).abs().mean() > (o - tvf.hflip(c)).abs().mean() for o, c in zip(out, crops, strict=True)]
    assert 0 < sum(flipped) < 8
    assert_close_pixels(out, [tvf.hflip(c) if f else c for c, f in zip(crops, flipped, strict=True)])


def test_colour_changes_equal_torchvision(hw4, draw):
    """The images have a black, a white and a grey row; the last two are drawn to lose all colour."""
    expected, factors = torch.rand(6, 3, 16, 16), torch.tensor([0.6, 0.9, 1.0, 1.1, 1.2, 1.4])
    expected[..., :3, :] = torch.tensor([0.0, 1.0, 0.5])[:, None]
    values = [factors, factors.flip(0), factors.roll(2)]
    draw(*values, torch.tensor([1, 0.9, 0.8, 0.7, 0.2, 0.1]))
    out = hw4.color_jitter(expected, 0.5, 0.3)
    for adjust, row in zip((tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation), values, strict=True):
        expected = list(map(adjust, expected, row.tolist()))
    assert_close_pixels(out, [*expected[:4], *(tvf.rgb_to_grayscale(image, 3) for image in expected[4:])])


@pytest.mark.parametrize("size", [16, 27])
def test_plain_view_equals_torchvision_and_pillow(hw4, size):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    out = hw4.plain_view(images, size)
    assert_close_pixels(out, [hw4.normalize(tvf.resize(i / 255, [size, size], antialias=True)) for i in images])
    pillow = [tvf.to_tensor(tvf.resize(tvf.to_pil_image(i), [size, size])) for i in images]
    assert_close_pixels(out, map(hw4.normalize, pillow))
