"""Attention, Vision Transformer, text encoder, dual encoder, convolutional encoder, device and precision."""

import pytest
import torch
import torch.nn.functional as F


def test_own_attention_equals_fused_kernel_with_and_without_mask(hw4):
    torch.manual_seed(0)
    module, x = hw4.SelfAttention(24, num_heads=3), torch.randn(2, 5, 24)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    q, k, v = (part.view(2, 5, 3, 8).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=-1))
    for given, fused_mask in ((None, None), (mask, mask[:, None, None, :])):
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=fused_mask).transpose(1, 2).reshape(2, 5, 24)
        assert torch.allclose(module(x, given), module.proj(fused), atol=1e-6)
    assert not torch.allclose(module(x, mask)[1], module(x)[1], atol=1e-3)


def test_patches_are_cut_row_by_row_and_wrong_sizes_refused(hw4, vit):
    images, seen = torch.randn(2, 3, 32, 32), []
    vit.patch_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    vit(images)
    assert torch.equal(seen[0], F.unfold(images, 8, stride=8).mT)
    with pytest.raises(RuntimeError, match="divisible"):
        vit(images[..., :30])
    with pytest.raises(ValueError, match="width 130 must be a multiple of the number of heads 4"):
        hw4.SelfAttention(130, 4)


@pytest.mark.parametrize(("share", "num_kept"), [(0.25, 4), (0.75, 12), (0.01, 1)])
def test_keep_random_takes_the_same_share_of_each_group_and_no_token_twice(hw4, share, num_kept):
    torch.manual_seed(0)
    x = torch.arange(50 * 16).view(50, 16, 1).expand(-1, -1, 3)
    kept, others = hw4.keep_random(share, x, -x[..., :2])
    assert kept.shape == (50, num_kept, 3) and (kept == kept[..., :1]).all() and torch.equal(others, -kept[..., :2])
    assert (kept[..., 0] // 16 == torch.arange(50)[:, None]).all()  # of its own image
    places = [tuple(sorted(row)) for row in (kept[..., 0] % 16).tolist()]
    assert all(len(set(row)) == num_kept for row in places)
    assert len(set(places)) > 10 and set(sum(places, ())) == set(range(16))


@pytest.fixture
def vit(hw4, smoke):
    torch.manual_seed(0)
    return hw4.VisionTransformer(smoke)


def test_vit_hides_patches_only_when_asked_and_never_the_class_token(vit):
    image, seen = torch.randn(1, 3, 32, 32).expand(6, -1, -1, -1), []
    vit.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    full, _ = vit(image), vit(image, patch_keep=0.25)
    assert full.shape == (6, 64) and torch.allclose(full, full[:1].expand(6, -1), atol=1e-6)
    assert [x.shape[1] for x in seen] == [1 + 16, 1 + 4]
    whole, part = seen[0][0], seen[1]
    assert torch.allclose(part[:, 0], whole[0].expand(6, -1))
    kept = torch.cdist(part[:, 1:], whole[None, 1:]) < 1e-4  # (6, 4, 16): patches keep their own position
    assert (kept.sum(2) == 1).all() and len(kept.sum(1).unique(dim=0)) > 1


def test_every_part_of_the_vit_matters(vit):
    """Its output is the class token; without positions it knows no order."""
    images = torch.randn(2, 3, 32, 32)
    vit(images).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in vit.parameters())
    with torch.no_grad():
        assert not torch.allclose(vit(images.roll(8, 3)), vit(images), atol=1e-4)
        vit.position_embedding.zero_()
        assert torch.allclose(vit(images.roll(8, 3)), vit(images), atol=1e-5)


def test_every_patch_has_its_learned_position(vit):
    seen = []
    vit.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, 1:]))
    with torch.no_grad():
        vit.patch_embedding.weight.zero_()
        vit(torch.zeros(1, 3, 32, 32))
    positions = seen[0] - vit.patch_embedding.bias  # (16, 64)
    assert torch.allclose(positions, vit.position_embedding[0], atol=1e-6)


def test_convolutional_encoder_halves_the_sides_four_times_and_sees_all(hw4):
    encoder, images = hw4.ConvEncoder(24).eval(), torch.rand(2, 3, 32, 32, requires_grad=True)
    assert encoder(images).shape == (2, 24) and encoder.layers(images).shape == (2, 24, 2, 2)
    encoder(images, patch_keep=0.1).sum().backward()
    assert (images.grad.abs().sum(1) > 0).float().mean() > 0.95


def test_words_and_their_order_matter_but_padding_does_not(hw4, smoke):
    torch.manual_seed(0)
    text = hw4.TextTransformer(50, smoke)
    tokens = torch.tensor([[1, 7, 8, 9]])
    short, padded = text(tokens, tokens > 0), F.pad(tokens, (0, 8))
    assert short.shape == (1, 64) and torch.allclose(text(padded, padded > 0), short, atol=1e-5)
    assert not torch.allclose(text(padded, torch.ones_like(padded, dtype=torch.bool)), short, atol=1e-3)
    assert not torch.allclose(text(tokens[:, [0, 3, 2, 1]], tokens > 0), short, atol=1e-3)
    begin = F.pad(tokens[:, :1], (0, 11))  # a caption without words
    text(begin, begin > 0).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in text.parameters())


def test_dual_encoder_ends_in_unit_vectors_without_bias(hw4, smoke):
    model = hw4.DualEncoder(30, smoke)
    images, tokens = model.encode_image(torch.randn(3, 3, 32, 32)), torch.randint(1, 30, (4, 6))
    texts = model.encode_text(tokens, tokens > 0)
    assert images.shape == (3, smoke.embed_dim) and texts.shape == (4, smoke.embed_dim)
    assert torch.allclose(torch.cat([images, texts]).norm(dim=1), torch.ones(7), atol=1e-5)
    assert model.image_projection.bias is None and model.text_projection.bias is None


def test_logit_scale_starts_as_in_clip_and_comes_down_again_from_its_limit(hw4, smoke):
    model = hw4.DualEncoder(30, smoke)
    assert model.logit_scale().item() == pytest.approx(1 / 0.07, rel=1e-4)
    with torch.no_grad():
        model.log_logit_scale.fill_(9)
    assert model.logit_scale().item() == pytest.approx(100)
    model.logit_scale().backward()
    assert model.log_logit_scale.grad > 0


def test_embeddings_do_not_depend_on_length_groups(hw4, smoke):
    torch.manual_seed(0)
    model, lengths = hw4.DualEncoder(30, smoke), torch.randint(1, 11, (9,))
    mask, widths = torch.arange(12) < lengths[:, None], []
    tokens = torch.randint(1, 30, (9, 12)).masked_fill(~mask, 0)
    whole = model.encode_text(tokens, mask)
    model.text.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    for groups in (1, 3, 9):
        assert torch.allclose(hw4.encode_captions(model, tokens, mask, groups), whole, atol=1e-5)
    assert widths == [max(lengths), *lengths.sort().values[2::3], *lengths.sort().values]


def test_no_ready_made_transformer_is_used(definition_cells):
    made = "nn.Transformer", "nn.MultiheadAttention", "timm", "torchvision.models", "pretrained=True"
    assert definition_cells and not any(name in source for name in made for source in definition_cells)


# Device and precision


@pytest.mark.parametrize("name", ["image", "text", "simclr"])
def test_encoders_multiply_in_the_chosen_precision_and_return_float32(hw4, smoke, monkeypatch, name):
    model = hw4.SimCLR(smoke) if name == "simclr" else hw4.DualEncoder(30, smoke)
    images, tokens = torch.randn(4, 3, 32, 32), torch.ones(4, 6, dtype=torch.int64)
    calls = {
        "image": lambda: model.encode_image(images),
        "text": lambda: model.encode_text(tokens, tokens > 0),
        "simclr": lambda: model(images, 0.25),
    }
    found = set()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, args, out: found.add(out.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        found.clear()
        monkeypatch.setattr(hw4, "choose_dtype", lambda device, dtype=dtype: dtype)
        assert calls[name]().dtype == torch.float32 and found == {dtype}


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bfloat16"), ((8, 0), "bfloat16"), ((7, 5), "float16")])
def test_precision_on_cuda(hw4, monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert hw4.measured_dtype(torch.device("cuda")) == getattr(torch, dtype)


AVX512, INTEL, AMD = {"avx512_bf16": True}, {"cpu_name": "Intel(R) Xeon(R)"}, {"cpu_name": "AMD EPYC"}


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [(INTEL | AVX512 | {"amx_bf16": True}, "bfloat16"), (AMD | AVX512, "bfloat16"), (INTEL | AVX512, "float32")]
    + [(AMD | {"avx512_bf16": False, "amx_bf16": False}, "float32"), ({"architecture": "aarch64"}, "float32")],
)
def test_precision_on_the_cpu_is_half_only_where_that_is_fast(hw4, monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert hw4.measured_dtype(torch.device("cpu")) == getattr(torch, dtype)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in PyTorch before 2.14
    assert hw4.measured_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("available", "chosen"), [(True, ("cuda", "full")), (False, ("cpu", "cpu"))])
def test_a_gpu_is_taken_and_without_one_that_is_said(hw4, cells, here, monkeypatch, capsys, available, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "T4")
    (cell,) = [source for source in cells if "\ndevice = " in source]
    run = dict(vars(hw4))
    exec(cell, run)
    assert (run["device"].type, run["preset"]) == chosen
    assert ("no GPU: this takes two hours or more; in Colab choose" in capsys.readouterr().out) != available


def test_preset_follows_the_device_unless_one_is_named(hw4, here, monkeypatch):
    assert [hw4.choose_preset(torch.device(name)) for name in ("cuda", "cpu")] == ["full", "cpu"]
    monkeypatch.setenv("HW4_PRESET", "smoke")
    assert hw4.choose_preset(torch.device("cuda")) == "smoke"
    monkeypatch.setenv("HW4_PRESET", "tiny")
    with pytest.raises(ValueError, match="HW4_PRESET is 'tiny': set it to one of cpu, full, smoke, or unset it"):
        hw4.choose_preset(torch.device("cpu"))


def test_settings_taken_from_papers_are_theirs(hw4):
    """CLIP, Muon, and SimCLR, which tries temperatures from 0.05 to 1 and finds 0.1 best."""
    config = hw4.Config()
    for recipe in (config.contrastive, config.simclr):
        assert recipe.adamw_betas == (0.9, 0.98) and recipe.muon_momentum == 0.95
    assert config.max_logit_scale == 100
    assert config.first_logit_scale == pytest.approx(1 / 0.07) and 0.05 <= config.temperature <= 0.5
