"""Augmentation, the two trainings' losses, optimizers, the loop, and where the trainings start."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F


@pytest.fixture
def config(smoke, tmp_path):
    """The smoke preset with a fresh folder, so that nothing is loaded."""
    return replace(smoke, checkpoint_dir=tmp_path)


@pytest.fixture
def make_task(hw4, data, config):
    """make_task(name): the task of that training with a fresh model."""

    def make(name):
        torch.manual_seed(0)
        if name == "simclr":
            return hw4.SimCLRTask(hw4.SimCLR(config), data, config, config.simclr)
        return hw4.ContrastiveTask(hw4.DualEncoder(len(data.vocabulary), config), data, config, config.contrastive)

    return make


# What a model sees


def test_augmentation_is_drawn_per_image_and_by_the_seed(hw4):
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8).expand(96, -1, -1, -1)
    recipe = hw4.Recipe(epochs=1, batch_size=2, smallest_crop=0.3, color_change=0.4, gray=0.2)
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(hw4.augment(images, 32, recipe))
    views = drawn[0]
    pixels = views * 0.27 + 0.45
    assert views.shape == (96, 3, 32, 32)
    assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6 and pixels.std() > 0.05
    assert len(torch.unique(views.flatten(1), dim=0)) == 96
    gray = (pixels.amax(1) - pixels.amin(1)).flatten(1).amax(1) < 1e-5
    assert 5 < gray.sum() < 40  # a fifth
    assert torch.equal(views, drawn[1]) and not torch.equal(views, drawn[2])


@pytest.mark.parametrize("name", ["contrastive", "simclr"])
def test_views_of_a_step_in_bfloat16_are_those_of_a_step_in_float32(hw4, make_task, monkeypatch, name):
    """In bfloat16 the coordinates would move a crop."""
    views = []
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr(hw4, "choose_dtype", lambda device, dtype=dtype: dtype)
        task = make_task(name)
        task.model.vision.register_forward_pre_hook(lambda module, args: views.append(args[0]))
        optimizers = hw4.make_optimizers(task.model, task.recipe)
        torch.manual_seed(1)
        hw4.train_epoch(task, task.data.train_ids[:32], 0, optimizers, torch.amp.GradScaler(enabled=False))
    assert len(views) == 2 and views[1].dtype == torch.float32 and torch.equal(*views)


@pytest.mark.parametrize("captions_per_image", [1, 3, 5])
def test_drawn_captions_are_different_ones_of_each_image(make_task, captions_per_image):
    task = make_task("contrastive")
    task.config = replace(task.config, captions_per_image=captions_per_image, word_dropout=0.0)
    ids = task.data.train_ids[torch.randint(250, (100,))]
    tokens, mask = task.draw_captions(ids)
    assert tokens.shape == mask.shape == (captions_per_image, 100, task.data.tokens.shape[2])
    places = (tokens[:, :, None] == task.data.tokens[ids]).all(3)  # (C, B, 5): which of the five
    assert (places.sum(2) == 1).all() and (places.sum(0) <= 1).all() and places[0].any(0).all()
    assert torch.equal(mask, task.data.mask[ids].expand(len(tokens), -1, -1, -1)[places].view(mask.shape))


def test_dropped_words_become_unknown_and_the_rest_stays(hw4, make_task):
    task = make_task("contrastive")
    ids = task.data.train_ids[:100]
    for share, low, high in ((0.0, 0, 0), (0.2, 0.15, 0.25), (1.0, 1, 1)):
        task.config = replace(task.config, word_dropout=share, captions_per_image=5)
        tokens, mask = task.draw_captions(ids)
        assert (tokens[..., 0] == hw4.BOS).all() and torch.equal(tokens != hw4.PAD, mask)
        assert low <= (tokens[tokens >= hw4.UNK] == hw4.UNK).float().mean() <= high


def test_a_step_keeps_images_and_their_captions_together(hw4, data, make_task, monkeypatch):
    """Every image is filled with its number, and its captions consist of that number."""
    task, given = make_task("contrastive"), []
    numbers = torch.arange(200)
    images = numbers.to(torch.uint8).view(200, 1, 1, 1).expand(-1, 3, 48, 48)
    tokens = 3 + numbers.view(200, 1, 1) * torch.ones(5, 12, dtype=torch.int64)
    mask = torch.arange(12) < torch.randint(1, 13, (200, 5, 1))
    task.data = replace(data, images=images, tokens=tokens, mask=mask)
    task.config = replace(task.config, word_dropout=0.0, captions_per_image=3)
    monkeypatch.setattr(hw4, "augment", lambda images, size, recipe: images.float())
    monkeypatch.setattr(task.model, "encode_image", lambda views, patch_keep: views[:, 0, :1, 0])
    monkeypatch.setattr(task.model, "encode_text", lambda tokens, mask: tokens[:, :1].float() - 3)
    monkeypatch.setattr(task, "loss", lambda *embeddings: given.extend(embeddings))
    ids = torch.randperm(200)[:16]
    task(ids, 1.0)
    assert torch.equal(given[0][:, 0].long(), ids)
    assert torch.equal(given[1][..., 0].long(), ids.expand(3, -1))


# Losses


def test_with_one_caption_there_is_no_contrast_between_captions(hw4, config, make_task):
    task = make_task("contrastive")
    u, v = F.normalize(torch.randn(2, 8, config.embed_dim), dim=-1)
    task.config = replace(config, captions_per_image=1, caption_weight=9.0)
    assert task.loss(u, v[None], 0).item() == pytest.approx(hw4.contrastive_loss(u, v, 1 / 0.07).item(), rel=1e-4)
    task(task.data.train_ids[:8], 1.0).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in task.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_at_initialisation_is_near_guessing_and_in_float32(hw4, config, make_task, monkeypatch, dtype):
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: dtype)
    task = make_task("contrastive")
    task.config = replace(config, captions_per_image=1)
    contrastive = task(task.data.train_ids[:32], 1.0)
    simclr = make_task("simclr")(task.data.train_ids[:32], 1.0)
    assert contrastive.dtype == simclr.dtype == torch.float32
    assert contrastive.item() == pytest.approx(math.log(32), rel=0.15)
    assert 0.5 * math.log(63) < simclr.item() < math.log(63)  # two views of a photo are alike before any training


def test_simclr_views_differ_per_image_and_per_view(make_task, monkeypatch):
    task, seen = make_task("simclr"), []
    task.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    task(task.data.train_ids[:1].expand(6), 1.0)
    assert len(torch.unique(seen[0].flatten(1), dim=0)) == len(seen[0]) == 12


def test_head_of_simclr_is_batch_normalised(make_task):
    task, hidden = make_task("simclr"), []
    (relu,) = (module for module in task.model.projector if isinstance(module, nn.ReLU))
    relu.register_forward_pre_hook(lambda module, args: hidden.append(args[0].detach().clone()))
    task(task.data.train_ids[:32], 1.0)
    assert hidden[0].mean(0).abs().max() < 1e-4 and (hidden[0].std(0) - 1).abs().max() < 0.1


def test_validation_measures_every_image_with_its_own_captions(hw4, data, make_task, monkeypatch):
    task, n, size = make_task("contrastive"), len(data.val_ids), 32
    torch.manual_seed(0)
    images = F.normalize(torch.randn(n, 16), dim=-1)
    texts = F.normalize(images.repeat_interleave(5, 0) + 0.5 * torch.randn(5 * n, 16), dim=-1)
    gallery = {1: (images, texts)}  # of one view
    monkeypatch.setattr(hw4, "embed_gallery", lambda model, data, config, num_views: gallery[num_views])
    losses = []
    for ids in torch.arange(n).split(size):
        captions = torch.stack([torch.stack([texts[5 * i + c] for i in ids]) for c in range(5)])
        losses += len(ids) * [task.loss(images[ids], captions, 0).item()]
    recall = hw4.recall_at_5(images @ texts.T).mean().item()
    assert task.validate() == pytest.approx({"val_loss": sum(losses) / len(losses), "R@5": 100 * recall}, rel=1e-4)
    assert 0.1 < recall < 0.99 and losses[0] < 1.5 * math.log(size)
    assert make_task("simclr").validate() == {}

    task.recipe = replace(task.recipe, batch_size=2 * n)  # fewer photos than a batch
    whole = task.loss(images, texts.view(n, 5, -1).transpose(0, 1), 0).item()
    assert task.validate()["val_loss"] == pytest.approx(whole, rel=1e-4)


# Schedule and optimizers


def test_learning_rate_rises_linearly_and_falls_as_a_cosine(hw4):
    values = [hw4.learning_rate_factor(progress, 0.1) for progress in (0, 0.05, 0.1, 0.325, 0.55, 1)]
    assert values == pytest.approx([0, 0.5, 1, 0.5 + 0.5**1.5, 0.5, 0], abs=1e-9)
    assert hw4.learning_rate_factor(0.25, 0.5) == 0.5 and hw4.learning_rate_factor(0, 0) == 1


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("kind", ["ViT", "convolutional", "simclr"])
def test_every_parameter_is_in_one_group_with_its_peak_and_decay(hw4, config, kind, muon):
    """Matrices in blocks and convolutions go to Muon unless it is off; what else has two axes decays as they do."""
    vision = hw4.ConvEncoder(config.vision.width) if kind == "convolutional" else None
    model = hw4.SimCLR(config) if kind == "simclr" else hw4.DualEncoder(30, config, vision)
    options = {"adamw_share": 0.5, "adamw_betas": (0.8, 0.9), "muon": muon, "muon_momentum": 0.7}
    recipe = replace(config.contrastive, weight_decay=0.4, learning_rate=3e-3, **options)
    optimizers = hw4.make_optimizers(model, recipe)
    found = [(o, group, p) for o in optimizers for group in o.param_groups for p in group["params"]]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(names[p] for _, _, p in found) == sorted(names.values())
    assert [type(o) for o in optimizers] == [torch.optim.AdamW, hw4.Muon][: 1 + muon]
    for optimizer, group, parameter in found:
        hidden = muon and parameter.ndim > 1 and ("blocks" in names[parameter] or "layers" in names[parameter])
        assert isinstance(optimizer, hw4.Muon) == hidden, names[parameter]
        assert group["peak"] == (3e-3 if hidden else 1.5e-3), names[parameter]
        assert group["weight_decay"] == (0.4 if parameter.ndim > 1 else 0.0), names[parameter]
        assert group["momentum"] == 0.7 if hidden else group["betas"] == (0.8, 0.9)


def test_matrices_of_any_axes_and_place_are_trained(hw4, config):
    model = nn.Sequential(hw4.Block(4, 1, 0.1), nn.Sequential(nn.Conv2d(1, 2, 3), nn.Embedding(3, 2)))
    model.extra = nn.Parameter(torch.zeros(2, 2, 2))

    def parts(model):
        optimizers = hw4.make_optimizers(model, config.contrastive)
        return [group["params"] for optimizer in optimizers for group in optimizer.param_groups]

    assert [len(part) for part in parts(model)] == [2, 11, 5]  # matrices, vectors, hidden
    assert {id(p) for part in parts(model) for p in part} == {id(p) for p in model.parameters()}
    tied = nn.ModuleList([model, model[0].mlp[0]])  # listed twice, trained once
    assert sum(map(len, parts(tied))) == 18


# The loop


@pytest.fixture
def make_toy(hw4, config):
    """make_toy(loss, **changes): a training of one block; its loss is loss(outputs (B, 4), ids, patch_keep)."""

    class Toy(hw4.Task):
        def forward(self, ids, patch_keep):
            assert self.training and self.model.training
            return self.compute(self.model(torch.randn(1, len(ids), 4))[0], ids, patch_keep)

        def validate(self):
            self.eval()
            return {"val_loss": 0.5}

    def make(loss=lambda y, ids, keep: (y - 3).square().mean(), **changes):
        torch.manual_seed(0)
        recipe = replace(hw4.Recipe(epochs=3, batch_size=4), **changes)
        task = Toy(hw4.Block(4, 1, 0.1), SimpleNamespace(fingerprint="toy"), config, recipe)
        task.compute = loss
        return task

    return make


def test_batches_depend_on_the_seed_and_the_epoch_but_not_on_what_the_model_draws(hw4, make_toy):
    def batches(seed, noise):
        seen = []

        def loss(y, ids, keep):
            torch.rand(noise)
            seen.append(ids.tolist())
            return y.sum()

        hw4.fit(f"order-{noise}", make_toy(loss, epochs=2, batch_size=5), 100 + torch.arange(23), seed)
        return seen

    seen = batches(0, 0)
    assert [len(batch) for batch in seen] == [5] * 8  # an incomplete one is left out
    first, second = sum(seen[:4], []), sum(seen[4:], [])
    assert len(set(first)) == len(set(second)) == 20 and {*first, *second} <= set(range(100, 123))
    assert first != second and batches(0, 3) == seen and batches(1, 0) != seen


def test_rates_and_patches_follow_the_progress(hw4, make_toy, monkeypatch):
    asked, keeps = [], []
    task = make_toy(lambda y, ids, keep: keeps.append(keep) or y.sum(), epochs=5, batch_size=3, warmup=0.3)
    task.recipe = replace(task.recipe, patch_keep=0.25, late_patch_keep=0.75, late_share=0.15)
    monkeypatch.setattr(hw4, "learning_rate_factor", lambda *args: asked.append(args) or 0.0)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    hw4.fit("toy", task, torch.arange(12))
    assert [progress for progress, _ in asked] == pytest.approx([step / 20 for step in range(20)])
    assert {warmup for _, warmup in asked} == {0.3} and keeps == [0.25] * 17 + [0.75] * 3
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


def test_each_group_gets_its_share_of_the_rate(hw4, make_toy, monkeypatch):
    task = make_toy()
    optimizers = hw4.make_optimizers(task.model, task.recipe)
    monkeypatch.setattr(hw4, "learning_rate_factor", lambda progress, warmup: 0.25)
    hw4.train_epoch(task, torch.arange(12), 0, optimizers, torch.amp.GradScaler(enabled=False))
    adamw, muon = optimizers
    peak, share = task.recipe.learning_rate, task.recipe.adamw_share
    assert [group["lr"] for group in adamw.param_groups] == [pytest.approx(0.25 * share * peak)] * 2
    assert [group["lr"] for group in muon.param_groups] == [pytest.approx(0.25 * peak)]


def test_history_has_every_epoch_and_validations_spread_over_them(hw4, make_toy):
    history = hw4.fit("toy", make_toy(lambda y, ids, keep: 0 * y.sum() + len(ids), epochs=7, validate_every=3), IDS)
    assert [record["epoch"] for record in history] == list(range(1, 8))
    assert all(record["loss"] == 4 and record["seconds"] > 0 for record in history)
    assert [record["epoch"] for record in history if "val_loss" in record] == [3, 6, 7]


IDS = torch.arange(12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_training_that_diverges_is_stopped_with_a_remedy_and_not_kept(hw4, make_toy, tmp_path, bad):
    with pytest.raises(FloatingPointError, match="diverged: lower learning_rate"):
        hw4.fit("toy", make_toy(lambda y, ids, keep: (y * bad).sum()), IDS)
    assert not list(tmp_path.iterdir())


def overflow(y, when):
    """A finite loss, whose gradient is infinite if `when`."""
    return (y - y.detach()).sum().sqrt() if when else y.square().mean()


def test_steps_that_overflow_in_float16_are_left_out_unless_all_do(hw4, make_toy, monkeypatch):
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: torch.float16)
    steps = []
    task = make_toy(lambda y, ids, keep: steps.append(ids) or overflow(y, len(steps) == 2))
    assert len(hw4.fit("once", task, IDS)) == 3 and all(p.isfinite().all() for p in task.model.parameters())
    with pytest.raises(FloatingPointError, match="diverged"):
        hw4.fit("always", make_toy(lambda y, ids, keep: overflow(y, True), batch_size=2), torch.arange(80))


# The trainings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_lowers_the_loss_in_each_precision(hw4, data, config, monkeypatch, dtype):
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: dtype)
    few, small = replace(data, train_ids=data.train_ids[:160]), hw4.Size(width=32, depth=2, num_heads=2)
    config = replace(config, vision=small, text=small, captions_per_image=2, word_dropout=0.0)
    config = replace(config, contrastive=replace(config.contrastive, epochs=4), simclr=replace(config.simclr, epochs=3))
    run = hw4.train_contrastive("run", few, config)
    losses = [record["loss"] for record in run.history]
    assert losses[0] < 1.5 * 1.2 * math.log(32) and losses[-1] < losses[0] - 0.5
    assert run.history[-1]["R@5"] > 100 * 2 * 5 / 200 and all(p.dtype == torch.float32 for p in run.model.parameters())
    images, captions = hw4.embed_gallery(run.model, few, config, num_views=1)
    recall = 100 * hw4.recall_at_5(images @ captions.T).mean().item()
    assert recall == pytest.approx(run.history[-1]["R@5"], abs=1e-4)
    _, history = hw4.pretrain_simclr("simclr", few, config)
    assert history[-1]["loss"] < history[0]["loss"] - 0.1 and history[0]["loss"] < math.log(63)


def test_simclr_never_sees_validation_images_or_captions(hw4, data, config):
    spoiled = data.images.clone()
    spoiled[data.val_ids] = 0
    without = replace(data, tokens=None, mask=None, images=spoiled)
    others = [data, without, replace(data, images=255 - data.images)]
    weights = [hw4.pretrain_simclr(f"simclr-{i}", o, config)[0].state_dict() for i, o in enumerate(others)]
    same = [all(torch.equal(weights[0][key], other[key]) for key in other) for other in weights]
    assert same == [True, True, False]  # it does look at the training images


def test_both_models_start_alike_but_for_the_given_encoder(hw4, data, config, monkeypatch):
    started, vision = [], hw4.VisionTransformer(config)

    def fit(name, task, ids, seed):
        assert torch.equal(ids, data.train_ids) and task.model.vision is not vision  # a copy is trained
        started.append({key: value.clone() for key, value in task.model.state_dict().items()})
        return []

    monkeypatch.setattr(hw4, "fit", fit)
    options = {}, {"vision": vision}, {"vision": hw4.ConvEncoder(64)}, {"seed": 1}
    for i, option in enumerate(options):
        torch.manual_seed(i)  # must not matter
        hw4.train_contrastive("run", data, config, **option)
    scratch, pretrained, convolutional, other = started
    given = {f"vision.{key}": value for key, value in vision.state_dict().items()}
    assert given.keys() == {key for key in scratch if key.startswith("vision.")}
    assert all(torch.equal(pretrained[key], value) for key, value in given.items())
    for key in scratch.keys() - given.keys():
        assert torch.equal(scratch[key], pretrained[key]) and torch.equal(scratch[key], convolutional[key])
    for key in ("vision.class_token", "text.token_embedding.weight"):
        assert not torch.equal(scratch[key], other[key])
    assert not torch.equal(scratch["vision.class_token"], given["vision.class_token"])
