"""Attention, Vision Transformer, text encoder, dual encoder, settings and precision."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F


def test_own_attention_equals_fused_kernel_and_float64_softmax(hw4):
    torch.manual_seed(0)
    module = hw4.SelfAttention(24, num_heads=3)
    x = torch.randn(2, 5, 24)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    out = module(x, mask)

    q, k, v = module.qkv(x).view(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    assert torch.allclose(hw4.attention_weights(q, k, mask) @ v, fused, atol=1e-5)

    module = module.double().requires_grad_(False)
    q, k, v = (part.clone() for part in module.qkv(x.double()).chunk(3, dim=-1))
    for head in range(3):  # each head on its own slice of channels, written out
        part = slice(8 * head, 8 * head + 8)
        scores = torch.einsum("bid,bjd->bij", q[..., part], k[..., part]) / 8**0.5
        scores[~mask[:, None].expand(-1, 5, -1)] = -torch.inf
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        v[..., part] = weights @ v[..., part].clone()
    assert torch.allclose(out.double(), module.proj(v), atol=1e-5)


def test_patch_embedding_equals_unfold_reference(hw4):
    images = torch.randn(2, 3, 24, 24)
    patches = hw4.patchify(images, 8)
    assert torch.equal(patches, F.unfold(images, 8, stride=8).transpose(1, 2))
    vit = hw4.VisionTransformer(24, 8, dim=16, depth=1, num_heads=2)
    kernel = vit.patch_embedding.weight.view(16, 3, 8, 8)
    reference = F.conv2d(images, kernel, vit.patch_embedding.bias, stride=8).flatten(2).transpose(1, 2)
    assert torch.allclose(vit.patch_embedding(patches), reference, atol=1e-5)


def test_wrong_sizes_are_refused(hw4):
    with pytest.raises(ValueError, match="does not divide into patches of 7"):
        hw4.patchify(torch.zeros(1, 3, 24, 24), 7)
    with pytest.raises(ValueError, match="image_size 60 must be a multiple of patch_size 8"):
        replace(hw4.PRESETS["cpu"], image_size=60)
    with pytest.raises(ValueError, match="captions_per_image must be 1 to 5"):
        replace(hw4.PRESETS["cpu"], captions_per_image=6)
    with pytest.raises(ValueError, match="patch_keep is 25: choose a value from 0 to 1"):
        replace(hw4.PRESETS["cpu"].contrastive, patch_keep=25)
    with pytest.raises(ValueError, match="text_width 130 must be a multiple of text_heads 4"):
        replace(hw4.PRESETS["cpu"], text_width=130)


def test_vit_drops_patches_per_image_and_only_when_asked(hw4):
    torch.manual_seed(0)
    vit = hw4.VisionTransformer(32, 8, dim=16, depth=1, num_heads=2).eval()
    image = torch.randn(1, 3, 32, 32).expand(6, -1, -1, -1)
    full = vit(image)
    assert torch.allclose(full, full[:1].expand(6, -1), atol=1e-6)
    dropped = vit(image, patch_keep=0.25)
    assert dropped.shape == full.shape
    assert len(torch.unique(dropped.detach().round(decimals=4), dim=0)) > 1
    lengths = []
    vit.encoder.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    vit(image, patch_keep=0.25)
    assert lengths == [1 + 4]


def test_every_part_of_the_vit_matters(hw4):
    torch.manual_seed(0)
    vit = hw4.VisionTransformer(16, 8, dim=16, depth=2, num_heads=2)
    vit(torch.randn(2, 3, 16, 16)).square().sum().backward()
    for name, parameter in vit.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.fixture
def text(hw4):
    torch.manual_seed(0)
    return hw4.TextTransformer(50, 12, dim=16, depth=2, num_heads=2)


def test_padding_leaves_the_text_embedding_unchanged(text):
    tokens = torch.tensor([[1, 7, 8, 9]])
    short = text(tokens, tokens > 0)
    padded = F.pad(tokens, (0, 8))
    assert torch.allclose(text(padded, padded > 0), short, atol=1e-5)
    assert not torch.allclose(text(padded, torch.ones_like(padded, dtype=torch.bool)), short, atol=1e-3)


def test_word_order_matters(text):
    ones = torch.ones(1, 4, dtype=torch.bool)
    assert not torch.allclose(text(torch.tensor([[1, 7, 8, 9]]), ones), text(torch.tensor([[1, 9, 8, 7]]), ones))


def test_shortest_caption_has_finite_output_and_gradients(text):
    tokens = torch.tensor([[1] + [0] * 11])
    out = text(tokens, tokens > 0)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in text.parameters() if p.grad is not None)


def test_dual_encoder_ends_in_unit_vectors_without_bias(hw4, smoke):
    model = hw4.build_dual_encoder(smoke, 30)
    images = model.encode_image(torch.randn(3, 3, 32, 32))
    tokens = torch.randint(1, 30, (4, 6))
    texts = model.encode_text(tokens, tokens > 0)
    assert images.shape == (3, smoke.embed_dim)
    assert texts.shape == (4, smoke.embed_dim)
    assert torch.allclose(torch.cat([images, texts]).norm(dim=1), torch.ones(7), atol=1e-5)
    assert model.image_projection.bias is None and model.text_projection.bias is None
    assert model.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        model.log_logit_scale.fill_(9)
    assert model.logit_scale.item() == pytest.approx(100)
    model.logit_scale.backward()
    assert model.log_logit_scale.grad > 0  # it can come down again


def test_no_ready_made_transformer_is_used(definition_cells):
    source = "\n".join(definition_cells)
    for name in ("nn.Transformer", "nn.MultiheadAttention", "timm", "torchvision.models", "pretrained=True"):
        assert name not in source


def test_embeddings_do_not_depend_on_length_buckets(hw4, smoke):
    model = hw4.build_dual_encoder(smoke, 30).eval()
    mask = torch.arange(10) < torch.randint(1, 11, (9, 1))
    tokens = torch.randint(1, 30, (9, 10)).masked_fill(~mask, 0)
    whole = model.encode_text(tokens, mask)
    for buckets in (1, 3, 9):
        assert torch.allclose(hw4.encode_texts(model, tokens, mask.sum(1), buckets), whole, atol=1e-5)


def test_weights_depend_on_the_seed_only(hw4, smoke):
    a, b = hw4.build_dual_encoder(smoke, 30).state_dict(), hw4.build_dual_encoder(smoke, 30).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    other = hw4.build_dual_encoder(replace(smoke, seed=1), 30).state_dict()
    assert not torch.equal(a["image_projection.weight"], other["image_projection.weight"])


@pytest.mark.parametrize(
    ("capability", "dtype", "scaler"),
    [((9, 0), torch.bfloat16, False), ((8, 0), torch.bfloat16, False), ((7, 5), torch.float16, True)],
)
def test_precision_on_cuda(hw4, capability, dtype, scaler):
    runtime = hw4.choose_runtime(torch.device("cuda"), capability=capability)
    assert (runtime.dtype, runtime.use_scaler) == (dtype, scaler)
    assert f"{capability[0]}.{capability[1]}" in runtime.reason


@pytest.mark.parametrize(("bf16", "dtype"), [(4e11, torch.bfloat16), (1e8, torch.float32)])
def test_precision_on_cpu_follows_the_timing(hw4, bf16, dtype):
    rates = {torch.float32: 1e11, torch.bfloat16: bf16}
    runtime = hw4.choose_runtime(torch.device("cpu"), rate=rates.get)
    assert runtime.dtype == dtype
    assert not runtime.use_scaler
    assert hw4.linear_rate(torch.float32) > 0


def test_flop_estimate_counts_the_linear_layers(hw4):
    config = replace(hw4.PRESETS["smoke"], captions_per_image=1, caption_weight=0.0)
    counted = 0

    def count(module, args, output):
        nonlocal counted
        counted += 2 * args[0].numel() * module.out_features

    model = hw4.build_dual_encoder(config, 30)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    model.encode_image(torch.randn(1, 3, config.image_size, config.image_size), config.contrastive.patch_keep)
    tokens = torch.ones(1, 10, dtype=torch.long)
    model.encode_text(tokens, tokens > 0)
    flops = hw4.training_flops(config, num_images=7, mean_tokens=10)["contrastive"]
    assert flops == pytest.approx(3 * 7 * config.contrastive.epochs * counted, rel=0.15)


def test_full_preset_fits_its_budget(hw4):
    flops = hw4.training_flops(hw4.PRESETS["full"], num_images=7091, mean_tokens=11.9)
    assert 2 * flops["contrastive"] + flops["simclr"] <= 43e15
