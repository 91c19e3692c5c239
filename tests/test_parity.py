"""Parity with published code: torchvision, PyTorch's own Transformer, open_clip, lightly and torchmetrics."""

import math
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


# Losses, with their gradients, in float64


def assert_same_loss_and_gradients(ours, reference, inputs):
    for a, b in zip(
        (ours, *torch.autograd.grad(ours, inputs)), (reference, *torch.autograd.grad(reference, inputs)), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


@pytest.mark.parametrize("num_captions", [1, 3])
def test_contrastive_loss_equals_open_clip(hw4, num_captions):
    torch.manual_seed(0)
    images = F.normalize(torch.randn(8, 16).double(), dim=-1).requires_grad_()
    texts = F.normalize(torch.randn(num_captions, 8, 16).double(), dim=-1).requires_grad_()
    scale = torch.tensor(1 / 0.07).double().requires_grad_()
    reference = torch.stack([ClipLoss()(images, t, scale) for t in texts]).mean()
    assert_same_loss_and_gradients(hw4.contrastive_loss(images, texts, scale), reference, (images, texts, scale))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_equals_lightly(hw4, temperature):
    """lightly scales to unit length itself, so ours does before its loss."""
    torch.manual_seed(0)
    z1, z2 = (torch.randn(8, 16).double().requires_grad_() for _ in range(2))
    ours = hw4.nt_xent(F.normalize(z1, dim=-1), F.normalize(z2, dim=-1), temperature)
    assert_same_loss_and_gradients(ours, NTXentLoss(temperature)(z1, z2), (z1, z2))


# Retrieval


def hit_rate(scores, match, k):
    queries = torch.arange(len(scores))[:, None].expand(scores.shape)
    return RetrievalHitRate(top_k=k)(scores, match, queries).item()


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_equals_torchmetrics(hw4, k):
    torch.manual_seed(0)
    scores, match = torch.randn(30, 150), hw4.caption_match(30)
    ranks = hw4.retrieval_ranks(scores)
    to_text, to_image = hit_rate(scores, match, k), hit_rate(scores.T, match.T, k)
    assert hw4.recall_at_k(ranks["image → text"], k) == pytest.approx(to_text)
    assert hw4.recall_at_k(ranks["text → image"], k) == pytest.approx(to_image)
    assert 0 < to_text < 1 and 0 < to_image < 1


@pytest.fixture
def tied(hw4):
    """Scores 0 to 4, so many ties: [(scores, match)] with five and with one correct candidate a query."""
    torch.manual_seed(0)
    scores, match = torch.randint(5, (30, 150)).float(), hw4.caption_match(30)
    return [(scores, match), (scores.T, match.T)]


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_recall_on_ties_equals_torchmetrics_on_scores_that_the_lottery_unties(hw4, tied, seed, k):
    """The lowest lottery number wins a tie; below 1, it never overturns a difference of whole scores."""
    for scores, match in tied:
        lottery = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
        recall = hw4.recall_at_k(hw4.first_match_rank(scores, match, seed), k)
        assert recall == pytest.approx(hit_rate(scores - lottery, match, k))


@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_recall_on_ties_averages_to_its_expectation(hw4, tied, k):
    """Of t candidates at the best correct score, c are correct; the hit is one of these among the first places."""
    for scores, match in tied:
        expected = 0.0
        for row, correct in zip(scores, match, strict=True):
            best = row[correct].max()
            places = k - int((row > best).sum())
            t, c = int((row == best).sum()), int(((row == best) & correct).sum())
            if places > 0:
                expected += 1 - math.comb(t - c, min(places, t)) / math.comb(t, min(places, t))
        expected /= len(scores)
        mean = sum(hw4.recall_at_k(hw4.first_match_rank(scores, match, seed), k) for seed in range(400)) / 400
        deviation = (expected * (1 - expected) / (400 * len(scores))) ** 0.5  # at most, as queries differ
        assert 0 < expected < 1
        assert abs(mean - expected) < 4 * deviation


# Augmentation: every sample with parameters of its own


@pytest.fixture
def draw(hw4, monkeypatch):
    """draw(a, b, ...): the next calls of `uniform` return these lists, one value a sample, if within its bounds."""

    def fix(*values):
        left = iter(values)

        def uniform(n, low, high, device):
            drawn = torch.tensor(next(left)).view(n, 1, 1, 1)
            assert (drawn >= low - 1e-6).all() and (drawn <= high + 1e-6).all()
            return drawn

        monkeypatch.setattr(hw4, "uniform", uniform)

    return fix


def assert_close_pixels(out, references):
    for sample, reference in zip(out, references, strict=True):
        assert (sample - reference).abs().mean() <= 2 / 255


def noise(n, size):
    """Random images with a black, a white and a grey row, whose hue is undefined."""
    images = torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    images[..., :3, :] = torch.tensor([0.0, 1.0, 0.5])[:, None]
    return images


def test_crop_and_flip_equal_torchvision(hw4, draw):
    torch.manual_seed(0)
    size, S = 24, 40
    images = torch.randint(0, 256, (8, 3, S, S), dtype=torch.uint8)
    boxes = [(0, 0, 40, 40), (5, 9, 24, 24), (16, 16, 24, 24), (3, 1, 30, 36), (0, 13, 34, 27), (10, 0, 30, 39)]
    boxes += [(7, 11, 21, 22), (15, 2, 22, 20)]  # (top, left, height, width); the last two are enlarged
    top, left, height, width = torch.tensor(boxes, dtype=torch.float64).T / S
    x, y = ((2 * start + side - 1) / (1 - side).clamp(min=1e-9) for start, side in ((left, width), (top, height)))
    draw(*((v.float().tolist()) for v in (height * width, (width / height).log(), x, y)))
    out, flipped = hw4.random_crop_flip(images, size, 0.2)
    assert 0 < flipped.sum() < 8
    crops = [
        tvf.resized_crop(image / 255, *box, [size, size], antialias=False)
        for image, box in zip(images, boxes, strict=True)
    ]
    assert_close_pixels(out, [tvf.hflip(c) if f else c for c, f in zip(crops, flipped, strict=True)])


FACTORS = [0.6, 0.9, 1.0, 1.1, 1.4]
NONE = [1.0] * 5
TURNS = [-0.5, -0.3, -0.1, 0.05, 0.4]


@pytest.mark.parametrize("position", range(3))
def test_brightness_contrast_and_saturation_equal_torchvision(hw4, draw, position):
    images, adjust = noise(5, 16), (tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)[position]
    draw(*(FACTORS if i == position else NONE for i in range(3)))
    out = hw4.color_jitter(images, 0.5, hue=0.0, grayscale=0.0)
    assert_close_pixels(out, map(adjust, images, FACTORS))


def test_hue_equals_torchvision(hw4, draw):
    images = noise(5, 16)
    expected = list(map(tvf.adjust_hue, images, TURNS))
    assert_close_pixels(hw4.shift_hue(images, torch.tensor(TURNS).view(5, 1, 1, 1)), expected)
    draw(NONE, NONE, NONE, TURNS)
    assert_close_pixels(hw4.color_jitter(images, 0.0, hue=0.5, grayscale=0.0), expected)


def test_grayscale_equals_torchvision_for_the_samples_drawn(hw4):
    torch.manual_seed(0)
    images = noise(8, 16)
    out = hw4.color_jitter(images, 0.0, hue=0.0, grayscale=0.5)
    gray = (out[:, 0] - out[:, 2]).abs().amax((1, 2)) < 1e-5
    assert 0 < gray.sum() < 8
    assert_close_pixels(out, [tvf.rgb_to_grayscale(i, 3) if g else i for i, g in zip(images, gray, strict=True)])


def test_all_colour_changes_in_a_row_equal_torchvision(hw4, draw):
    images, brightness, contrast, saturation = noise(5, 16), FACTORS, FACTORS[::-1], FACTORS[2:] + FACTORS[:2]
    draw(brightness, contrast, saturation, TURNS)
    expected = images
    for adjust, values in (
        (tvf.adjust_brightness, brightness),
        (tvf.adjust_contrast, contrast),
        (tvf.adjust_hue, TURNS),
        (tvf.adjust_saturation, saturation),
    ):
        expected = list(map(adjust, expected, values))
    assert_close_pixels(hw4.color_jitter(images, 0.5, hue=0.5, grayscale=0.0), expected)


def test_blur_equals_torchvision(hw4):
    images, sigmas = noise(5, 16), [0.1, 0.5, 1.0, 1.5, 2.0]
    out = hw4.blur(images, torch.tensor(sigmas).view(5, 1, 1, 1))
    assert_close_pixels(out, [tvf.gaussian_blur(i, 7, s) for i, s in zip(images, sigmas, strict=True)])


@pytest.mark.parametrize("size", [16, 27, 40])
def test_plain_view_equals_torchvision_and_pillow(hw4, size):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    out = hw4.plain_view(images, size)
    assert_close_pixels(out, [hw4.normalize(tvf.resize(i / 255, [size, size], antialias=True)) for i in images])
    pillow = [tvf.to_tensor(tvf.resize(tvf.to_pil_image(i), [size, size])) for i in images]
    assert_close_pixels(out, map(hw4.normalize, pillow))
