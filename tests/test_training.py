"""Augmentation, what the losses are given, the training loop and the trainings."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_resume import Toy, fit_toy


@pytest.fixture(autouse=True)
def folder(hw4, monkeypatch, tmp_path):
    """A fresh folder, so that nothing is loaded."""
    monkeypatch.setattr(hw4, "CHECKPOINT_DIR", tmp_path)
    return tmp_path


# What a model sees


def test_augmentation_is_drawn_per_image_and_by_the_seed(hw4):
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8).expand(96, -1, -1, -1)
    recipe = hw4.Recipe(1, 1, crop_scale=0.3, color=(0.4, 0.2))
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


def test_captions_of_one_image_are_never_negatives(hw4):
    """Else equal captions would cost at least ln 2."""
    images = torch.eye(8)
    alike = images.expand(3, -1, -1)
    assert hw4.alignment_loss(images, alike, 100.0, 0.5) < 1e-4
    assert hw4.alignment_loss(images, alike, 100.0, 0.5, negatives=4) < 1e-4
    assert hw4.alignment_loss(images, alike.roll(1, 1), 100.0, 0.5) > 50  # those of another image are


def test_embed_pairs_keeps_images_and_captions_together(hw4, smoke, data, monkeypatch):
    """Captions come back in the order of the images, each one of that image's five."""
    corpus, train_ids, _, _ = data
    torch.manual_seed(0)
    ids = train_ids[torch.randperm(len(train_ids))[:16]]
    monkeypatch.setattr(hw4, "augment", lambda images, size, recipe: images.float())

    class Echo:
        logit_scale = torch.tensor(7.0)

        def encode_image(self, views, patch_keep):
            return views.flatten(1)

        def encode_text(self, tokens, mask):
            assert torch.equal(mask, tokens != hw4.PAD)
            return F.pad(tokens.float(), (0, corpus.tokens.shape[2] - tokens.shape[1]))

    embed = partial(hw4.embed_pairs, Echo(), ids, 1.0, corpus)
    images, texts, scale = embed(replace(smoke, word_dropout=0.0, captions_per_image=3))
    assert torch.equal(images, corpus.images[ids].float().flatten(1)) and scale == 7
    assert texts.shape == (3, 16, corpus.tokens.shape[2])
    for b, i in enumerate(ids):
        rows = {tuple(t.tolist()) for t in corpus.tokens[i]}
        drawn = {tuple(texts[c, b].long().tolist()) for c in range(3)}
        assert drawn <= rows and len(drawn) == 3
    dropped = embed(replace(smoke, word_dropout=1.0))[1]
    assert set(dropped.unique().tolist()) == {hw4.PAD, hw4.BOS, hw4.UNK}
    words = embed(replace(smoke, word_dropout=0.2))[1].flatten()
    assert 0.1 < (words[words >= hw4.UNK] == hw4.UNK).float().mean() < 0.3


def test_simclr_views_differ_per_image_and_per_view(hw4, smoke, data):
    corpus, train_ids, _, _ = data
    z1, z2 = hw4.embed_views(lambda views, patch_keep: views.flatten(1), train_ids[:1].expand(6), 1.0, corpus, smoke)
    assert len(z1) == len(z2) == 6 and len(torch.unique(torch.cat([z1, z2]), dim=0)) == 12


def test_loss_at_initialisation_is_near_ln_batch_and_in_float32(hw4, smoke, data):
    corpus, train_ids, _, _ = data
    model = hw4.build_dual_encoder(smoke, corpus.num_tokens)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        embeddings = hw4.embed_pairs(model, train_ids[:32], 1.0, corpus, smoke)
    assert all(e.dtype == torch.float32 for e in embeddings)
    assert hw4.contrastive_loss(*embeddings).item() == pytest.approx(math.log(32), rel=0.15)


# Schedule and optimizers


def test_schedule(hw4):
    assert hw4.warmup_cosine(0) == 0 and hw4.warmup_cosine(0.05) == pytest.approx(0.5)
    assert hw4.warmup_cosine(0.1) == pytest.approx(1) and hw4.warmup_cosine(0.55) == pytest.approx(0.5)
    assert hw4.warmup_cosine(1) == pytest.approx(0, abs=1e-9)
    assert hw4.warmup_cosine(0.25, warmup=0.5) == 0.5 and hw4.warmup_cosine(0, warmup=0) == 1


def test_every_parameter_is_in_the_right_group(hw4, smoke):
    recipe = replace(smoke.contrastive, weight_decay=0.4, learning_rate=3e-3)
    for model in (
        hw4.build_dual_encoder(smoke, 30),
        hw4.build_dual_encoder(smoke, 30, vision=hw4.ConvEncoder(smoke.vision[0])),
        hw4.SimCLR(hw4.build_vision(smoke), smoke.vision[0]),
    ):
        names = {parameter: name for name, parameter in model.named_parameters()}
        muon, adamw = hw4.make_optimizers(model, recipe)
        groups = [(muon, *muon.param_groups), *((adamw, group) for group in adamw.param_groups)]
        found = [parameter for _, group in groups for parameter in group["params"]]
        assert len(found) == len(names) and set(found) == set(names) and len(muon.param_groups[0]["params"]) >= 8
        for optimizer, group in groups:
            assert group["peak"] == (3e-3 if optimizer is muon else 1.5e-3)
            for parameter in group["params"]:
                assert group["weight_decay"] == (0.4 if parameter.ndim >= 2 else 0.0), names[parameter]
                assert (optimizer is muon) == (parameter.ndim == 2 and "blocks" in names[parameter]), names[parameter]


# The loop


def test_an_epoch_visits_an_image_at_most_once_in_an_order_of_the_seed(hw4):
    def batches(seed, noise):
        seen, ids = [], 100 + torch.arange(23)

        def embed(model, batch, patch_keep):
            assert model.training
            seen.append(batch.tolist())
            return (model(torch.rand(noise, 4)),)

        recipe = hw4.Recipe(epochs=2, batch_size=5)
        evaluate = lambda model: {"training": model.eval().training}  # noqa: E731
        hw4.fit("order", Toy(), embed, torch.sum, ids, recipe, [noise], seed, evaluate)
        return seen

    seen = batches(0, 3)
    assert [len(batch) for batch in seen] == [5] * 8
    first, second = (sum(part, []) for part in (seen[:4], seen[4:]))
    assert len(set(first)) == len(set(second)) == 20 and {*first, *second} <= set(range(100, 123)) and first != second
    assert batches(0, 4) == seen and batches(1, 3) != seen


def test_schedule_and_patches_follow_the_progress(hw4, monkeypatch):
    progress, keeps, model = [], [], Toy()

    def embed(model, batch, patch_keep):
        keeps.append(patch_keep)
        return (model(torch.ones(1, 4)),)

    monkeypatch.setattr(hw4, "warmup_cosine", lambda value: progress.append(value) or 0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_toy(hw4, model, embed, epochs=5, batch_size=3, patch_keep=(0.25, 0.75))
    assert sorted(set(progress)) == pytest.approx([step / 20 for step in range(20)])
    assert keeps == [0.25] * 17 + [0.75] * 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # the factor is used


def test_bad_trainings_are_stopped_with_a_remedy_and_not_kept(hw4, folder, monkeypatch):
    with pytest.raises(ValueError, match="batch_size 13 exceeds the 12 training images: lower it"):
        fit_toy(hw4, batch_size=13)
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="toy diverged in epoch 1: lower learning_rate, then run this"):
            fit_toy(hw4, loss=lambda y, bad=bad: (y * bad).sum())
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: torch.float16)
    overflow = lambda y: (y - y.detach()).sum().sqrt()  # noqa: E731  # finite, but not its gradient: no step is taken
    with pytest.raises(FloatingPointError, match="toy diverged in epoch"):
        fit_toy(hw4, loss=overflow, ids=torch.arange(40), batch_size=1)
    assert not list(folder.iterdir())
    fit_toy(hw4)  # others train with the scaler on


# The trainings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_lowers_the_loss_in_each_precision(hw4, smoke, data, monkeypatch, dtype):
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: dtype)
    corpus, train_ids, val_ids, _ = data
    config = replace(smoke, contrastive=replace(smoke.contrastive, epochs=4), simclr=replace(smoke.simclr, epochs=3))
    run = hw4.train_contrastive("run", config, corpus, train_ids[:160], val_ids)
    losses = [record["loss"] for record in run.history]
    assert losses[0] < 1.5 * 1.3 * math.log(32) and losses[-1] < losses[0] - 0.3
    assert run.history[-1]["R@5"] > 2 * 5 / 200 and all(p.dtype == torch.float32 for p in run.model.parameters())
    assert run.images.shape == (40, 64) and run.texts.shape == (200, 64) and run.similarity.dtype == torch.float32
    assert run.scores["R@5"].mean().item() == pytest.approx(run.history[-1]["R@5"], abs=1e-6)
    history = hw4.train_simclr("simclr", config, corpus, train_ids[:160])[1]
    assert history[-1]["loss"] < history[0]["loss"] < 1.3 * math.log(63)


def test_simclr_never_sees_other_images_or_captions(hw4, smoke, data):
    corpus, train_ids, val_ids, _ = data
    spoiled = corpus.images.clone()
    spoiled[val_ids] = 0
    without = corpus._replace(tokens=None, lengths=None)
    weights = [
        hw4.train_simclr("simclr", smoke, other, train_ids)[0].state_dict()
        for other in (corpus, corpus._replace(images=spoiled), without, without._replace(images=255 - corpus.images))
    ]
    same = [all(torch.equal(weights[0][key], other[key]) for key in other) for other in weights]
    assert same == [True, True, True, False]  # it does look at the training images


def test_both_models_start_alike_but_for_the_given_vit(hw4, smoke, data, monkeypatch):
    corpus, train_ids, val_ids, _ = data
    started = []

    def fit(name, model, *args):
        started.append({key: value.clone() for key, value in model.state_dict().items()})
        return []

    monkeypatch.setattr(hw4, "fit", fit)
    torch.manual_seed(5)
    start = hw4.build_vision(smoke).state_dict()
    for i, options in enumerate(({}, {"start": start}, {"vision": hw4.ConvEncoder(smoke.vision[0])}, {"seed": 1})):
        torch.manual_seed(i)  # must not matter
        hw4.train_contrastive("run", smoke, corpus, train_ids, val_ids, **options)
    scratch, pretrained, convolutional, other = started
    assert {f"vision.{key}" for key in start} == {key for key in scratch if key.startswith("vision.")}
    for key, value in scratch.items():
        if key.startswith("vision."):
            assert torch.equal(pretrained[key], start[key.removeprefix("vision.")])
        else:
            assert torch.equal(value, pretrained[key]) and torch.equal(value, convolutional[key])
    for key in ("vision.class_token", "text.token_embedding.weight"):
        assert not torch.equal(scratch[key], other[key])
    assert not torch.equal(scratch["vision.class_token"], start["class_token"])
