"""Attention, Vision Transformer, text encoder, dual encoder, convolutional encoder and precision."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F


def test_own_attention_equals_fused_kernel_with_and_without_mask(hw4):
    torch.manual_seed(0)
    module, x, mask = (
        hw4.SelfAttention(24, num_heads=3),
        torch.randn(2, 5, 24),
        torch.arange(5) < torch.tensor([[5], [3]]),
    )
    q, k, v = (part.view(2, 5, 3, 8).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=-1))
    for given, fused_mask in ((None, None), (mask, mask[:, None, None, :])):
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=fused_mask).transpose(1, 2).reshape(2, 5, 24)
        assert torch.allclose(module(x, given), module.proj(fused), atol=1e-6)
    assert not torch.allclose(module(x, mask)[1], module(x)[1], atol=1e-3)


def test_patches_are_cut_row_by_row_and_wrong_sizes_refused(hw4):
    images = torch.randn(2, 3, 16, 24)
    assert torch.equal(hw4.patchify(images, 8), F.unfold(images, 8, stride=8).transpose(1, 2))
    with pytest.raises(ValueError, match="image of 16 x 24 pixels does not divide into patches of 7"):
        hw4.patchify(images, 7)
    with pytest.raises(ValueError, match="width 130 must be a multiple of the number of heads 4"):
        hw4.SelfAttention(130, 4)


@pytest.fixture
def vit(hw4):
    torch.manual_seed(0)
    return hw4.VisionTransformer(32, 8, dim=16, depth=2, num_heads=2)


def test_vit_drops_patches_per_image_and_only_when_asked(vit):
    image, seen = torch.randn(1, 3, 32, 32).expand(6, -1, -1, -1), []
    vit.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    full, _, _ = vit(image), vit(image, patch_keep=0.25), vit(image, patch_keep=0.01)
    assert full.shape == (6, 16) and torch.allclose(full, full[:1].expand(6, -1), atol=1e-6)
    assert [x.shape[1] for x in seen] == [1 + 16, 1 + 4, 1 + 1]
    whole, part = seen[0][0], seen[1]
    assert torch.allclose(part[:, 0], whole[0].expand(6, -1))  # the class token is never dropped
    kept = (torch.cdist(part[:, 1:], whole[None, 1:]) < 1e-5).int()  # (6, 4, 16): patches keep their own position
    assert (kept.sum(2) == 1).all() and (kept.sum(1) <= 1).all() and len(kept.sum(1).unique(dim=0)) > 1


def test_every_part_of_the_vit_matters(vit):
    """Its output is the class token; without positions it knows no order."""
    images = torch.randn(2, 3, 32, 32)
    vit(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vit.parameters())
    with torch.no_grad():
        assert not torch.allclose(vit(images.roll(8, 3)), vit(images), atol=1e-4)
        vit.position_embedding.zero_()
        assert torch.allclose(vit(images.roll(8, 3)), vit(images), atol=1e-5)


def test_words_and_their_order_matter_but_padding_does_not(hw4):
    torch.manual_seed(0)
    text = hw4.TextTransformer(50, 12, dim=16, depth=2, num_heads=2)
    tokens = torch.tensor([[1, 7, 8, 9]])
    short, padded = text(tokens, tokens > 0), F.pad(tokens, (0, 8))
    assert short.shape == (1, 16) and torch.allclose(text(padded, padded > 0), short, atol=1e-5)
    assert not torch.allclose(text(padded, torch.ones_like(padded, dtype=torch.bool)), short, atol=1e-3)
    assert not torch.allclose(text(tokens[:, [0, 3, 2, 1]], tokens > 0), short, atol=1e-3)
    begin = F.pad(tokens[:, :1], (0, 11))  # a caption without words
    text(begin, begin > 0).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in text.parameters())


def test_dual_encoder_ends_in_unit_vectors_without_bias(hw4, smoke):
    model = hw4.build_dual_encoder(smoke, 30)
    images, tokens = model.encode_image(torch.randn(3, 3, 32, 32)), torch.randint(1, 30, (4, 6))
    texts = model.encode_text(tokens, tokens > 0)
    assert images.shape == (3, smoke.embed_dim) and texts.shape == (4, smoke.embed_dim)
    assert torch.allclose(torch.cat([images, texts]).norm(dim=1), torch.ones(7), atol=1e-5)
    assert model.image_projection.bias is None and model.text_projection.bias is None
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        model.log_logit_scale.fill_(9)
    assert model.logit_scale.item() == pytest.approx(100)
    model.logit_scale.backward()
    assert model.log_logit_scale.grad > 0  # it can come down again


def test_embeddings_do_not_depend_on_length_groups(hw4, smoke):
    model, lengths = hw4.build_dual_encoder(smoke, 30).eval(), torch.randint(1, 11, (9,))
    mask, widths = torch.arange(12) < lengths[:, None], []
    tokens = torch.randint(1, 30, (9, 12)).masked_fill(~mask, 0)
    whole = model.encode_text(tokens, mask)
    model.text.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for groups in (1, 3, 9):
        assert torch.allclose(hw4.encode_texts(model, tokens, lengths, groups), whole, atol=1e-5)
    assert widths == [max(lengths), *lengths.sort().values[2::3], *lengths.sort().values]


def test_initial_weights_depend_on_the_seed_only(hw4, smoke):
    a, b, c = (hw4.build_dual_encoder(smoke, 30, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not any(torch.equal(a[key], c[key]) for key in a if "projection" in key or "embedding.weight" in key)
    model = hw4.build_dual_encoder(smoke, 30, 0, vision := hw4.ConvEncoder(smoke.vision[0]))
    rest = {key: value for key, value in model.state_dict().items() if not key.startswith("vision.")}
    assert model.vision is vision and model.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, smoke.embed_dim)
    assert len(rest) > 20 and all(torch.equal(a[key], value) for key, value in rest.items())


def test_no_ready_made_transformer_is_used(definition_cells):
    made = "nn.Transformer", "nn.MultiheadAttention", "timm", "torchvision.models", "pretrained=True"
    assert definition_cells and not any(name in source for name in made for source in definition_cells)


@pytest.mark.parametrize(("capability", "precision"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")])
def test_precision_on_cuda(hw4, monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hw4.measured_dtype.__wrapped__(torch.device("cuda")) == getattr(torch, precision)


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16])
def test_precision_on_the_cpu_follows_the_timing(hw4, monkeypatch, faster):
    timing = SimpleNamespace(repeat=lambda call, number, repeat: [9.0, 1.0 if call().dtype == faster else 2.0])
    monkeypatch.setattr(hw4, "timeit", timing)
    assert hw4.measured_dtype.__wrapped__(torch.device("mps")) == torch.float32
    monkeypatch.setattr(hw4, "choose_dtype", hw4.measured_dtype.__wrapped__)
    with hw4.autocast(torch.device("cpu")):
        assert (torch.randn(2, 2) @ torch.randn(2, 2)).dtype == faster


def test_a_device_that_does_not_work_is_not_chosen(hw4, monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert hw4.choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch, "randn", lambda *size, **options: torch.linalg.cholesky(-torch.eye(2)))  # RuntimeError
    assert hw4.choose_device() == torch.device("cpu")
    assert "cuda cannot be used with this PyTorch" in capsys.readouterr().out


def test_flops_equal_those_of_the_linear_layers(hw4, smoke, data, monkeypatch):
    """Three times the forward pass, plus attention, which at this size is little; patch_keep counts by its share."""
    for name, value in {"corpus": data[0], "config": smoke, "train_ids": torch.arange(100)}.items():
        monkeypatch.setattr(hw4, name, value, raising=False)
    model, counted = hw4.SimCLR(hw4.build_vision(smoke), smoke.vision[0]), []
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, args, out: counted.append(2 * args[0].numel() * m.out_features))
    recipe = replace(smoke.simclr, epochs=7, patch_keep=(0.25, 1.0))
    flops = hw4.count_flops(model, hw4.embed_views, hw4.nt_xent, recipe)
    quarter, whole = sum(counted[: len(counted) // 2]), sum(counted[len(counted) // 2 :])
    assert whole > 2 * quarter
    assert flops == pytest.approx(3 * 7 * 3 * (0.85 * quarter + 0.15 * whole), rel=0.1)
