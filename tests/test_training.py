"""Augmentation, losses, the training loop and the stages."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import functional as tvf

DATA = [torch.zeros(3), torch.zeros(4)]  # stands for what a training reads


def test_augmentation_is_drawn_per_sample(hw4):
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    recipe = replace(hw4.PRESETS["smoke"].contrastive, crop_scale=0.3, jitter=0.4, grayscale=0.2)
    views, flipped = hw4.augment(image.expand(16, -1, -1, -1), 32, recipe)
    assert views.shape == (16, 3, 32, 32)
    assert len(torch.unique(views.flatten(1), dim=0)) == 16
    assert 0 < flipped.sum() < 16


def test_flip_is_reported_and_mirrors_the_image(hw4):
    torch.manual_seed(0)
    left = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    left[..., :16] = 255
    views, flipped = hw4.random_crop_flip(left, 32, 0.9)
    brighter_left = views[..., :8].mean((1, 2, 3)) > views[..., -8:].mean((1, 2, 3))
    assert torch.equal(brighter_left, ~flipped)
    assert 0 < flipped.sum() < 8


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_colour_changes_equal_torchvision(hw4, monkeypatch, factor):
    images = torch.rand(3, 3, 16, 16)
    for position, reference in enumerate((tvf.adjust_brightness, tvf.adjust_contrast, tvf.adjust_saturation)):
        values = iter([factor if i == position else 1.0 for i in range(3)])
        fixed = lambda n, low, high, device, v=values: torch.full((n, 1, 1, 1), next(v))  # noqa: E731
        monkeypatch.setattr(hw4, "uniform", fixed)
        out = hw4.color_jitter(images, 0.5, hue=0.0, grayscale=0.0)
        assert (out - reference(images, factor)).abs().mean() <= 2 / 255


def test_grayscale_removes_all_colour(hw4):
    out = hw4.color_jitter(torch.rand(4, 3, 8, 8), 0.0, hue=0.0, grayscale=1.0)
    assert torch.allclose(out[:, 0], out[:, 1], atol=1e-6) and torch.allclose(out[:, 1], out[:, 2], atol=1e-6)


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def test_contrastive_loss_equals_a_loop(hw4):
    torch.manual_seed(0)
    images, texts, scale = unit(6, 8), unit(2, 6, 8), 5.0
    total = 0.0
    for c in range(2):
        for i in range(6):
            rows = [math.exp(scale * float(images[i] @ texts[c, j])) for j in range(6)]
            columns = [math.exp(scale * float(images[j] @ texts[c, i])) for j in range(6)]
            total -= math.log(rows[i] / sum(rows)) + math.log(columns[i] / sum(columns))
    assert hw4.contrastive_loss(images, texts, scale).item() == pytest.approx(total / 24, rel=1e-5)


def test_nt_xent_equals_a_loop(hw4):
    torch.manual_seed(0)
    z1, z2, temperature = unit(5, 8), unit(5, 8), 0.3
    z, total = torch.cat([z1, z2]), 0.0
    for i in range(10):
        partner = (i + 5) % 10
        terms = {j: math.exp(float(z[i] @ z[j]) / temperature) for j in range(10) if j != i}
        total -= math.log(terms[partner] / sum(terms.values()))
    assert hw4.nt_xent(z1, z2, temperature).item() == pytest.approx(total / 10, rel=1e-5)


def test_losses_of_constant_embeddings(hw4):
    alike = unit(1, 8).expand(12, -1)
    assert hw4.contrastive_loss(alike, alike[None], 14.0).item() == pytest.approx(math.log(12), rel=1e-5)
    assert hw4.nt_xent(alike, alike, 0.1).item() == pytest.approx(math.log(23), rel=1e-5)


def test_loss_at_initialisation_is_near_ln_batch(hw4, smoke, data):
    corpus, train_ids, _, vocabulary = data
    model = hw4.build_dual_encoder(smoke, len(vocabulary))
    with torch.no_grad():
        loss = hw4.contrastive_loss(*hw4.embed_pairs(model, train_ids[:32], 1.0, corpus, smoke)[:3])
    assert loss.item() == pytest.approx(math.log(32), rel=0.15)


def test_batch_embeddings_belong_to_their_images(hw4, smoke, data):
    """Captions come back in the order of the images, each one of that image's five, mirrored with it."""
    corpus, train_ids, _, vocabulary = data
    seen = {}

    class Echo:
        logit_scale = torch.tensor(1.0)

        def encode_image(self, views, patch_keep):
            seen["views"] = views
            return torch.zeros(len(views), 4)

        def encode_text(self, tokens, mask):
            out = torch.zeros(len(tokens), smoke.max_tokens)
            out[:, : tokens.shape[1]] = tokens
            return out

    ids = train_ids[torch.randperm(len(train_ids))[:16]]
    config = replace(smoke, word_dropout=0.0, captions_per_image=3)
    _, texts, _, _ = hw4.embed_pairs(Echo(), ids, 1.0, corpus, config)
    assert texts.shape == (3, 16, smoke.max_tokens)
    for b, i in enumerate(ids):
        rows = {tuple(t.tolist()) for t in corpus.tokens[i]}
        drawn = [tuple(texts[c, b].long().tolist()) for c in range(3)]
        assert set(drawn) <= rows and len(set(drawn)) == 3


def test_an_epoch_holds_an_image_at_most_once(hw4, smoke, data, runtime):
    _, train_ids, _, _ = data
    batches, weight = [], torch.nn.Parameter(torch.ones(1))
    model = torch.nn.Module()
    model.weight = weight

    def embed(model, batch, patch_keep):
        batches.append(batch)
        return (model.weight,)

    recipe = replace(smoke.contrastive, epochs=2, batch_size=16)
    hw4.fit(model, embed, lambda w: w.square().sum(), train_ids, recipe, runtime, seed=0)
    num_steps = len(train_ids) // 16
    assert len(batches) == 2 * num_steps
    epochs = [torch.cat(batches[:num_steps]).tolist(), torch.cat(batches[num_steps:]).tolist()]
    assert all(len(set(e)) == len(e) and set(e) <= set(train_ids.tolist()) for e in epochs)
    assert epochs[0] != epochs[1]


def test_simclr_views_differ_per_sample_and_per_view(hw4, smoke, data):
    corpus, train_ids, _, _ = data
    seen = []

    def model(views, patch_keep):
        seen.append(views)
        return views.flatten(1)

    same = train_ids[:1].expand(6)
    z1, z2, temperature = hw4.embed_views(model, same, 1.0, corpus, smoke)
    assert temperature == smoke.temperature
    assert len(torch.unique(torch.cat([z1, z2]), dim=0)) == 12
    assert len(seen) == 1


def test_simclr_reads_training_images_only(hw4, smoke, data, runtime):
    corpus, train_ids, val_ids, _ = data
    spoiled = corpus.images.clone()
    spoiled[val_ids] = 0
    weights = [
        hw4.train_simclr(replace_images(corpus, images), train_ids, smoke, runtime)[0].state_dict()
        for images in (corpus.images, spoiled)
    ]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def replace_images(corpus, images):
    return replace(corpus, images=images)


def test_schedule(hw4):
    assert hw4.warmup_cosine(0, 0.1) == 0
    assert hw4.warmup_cosine(0.05, 0.1) == pytest.approx(0.5)
    assert hw4.warmup_cosine(0.1, 0.1) == pytest.approx(1)
    assert hw4.warmup_cosine(1, 0.1) == pytest.approx(0, abs=1e-9)
    assert hw4.warmup_cosine(0, 0) == 1 and hw4.warmup_cosine(0.5, 0) == pytest.approx(0.5)  # no warm-up
    assert hw4.warmup_cosine(0.5, 1) == 0.5  # nothing but warm-up


def test_weight_decay_on_matrices_only(hw4, smoke):
    model = hw4.build_dual_encoder(smoke, 30)
    decayed, exempt = hw4.make_optimizer(model, smoke.contrastive).param_groups
    assert all(p.ndim >= 2 for p in decayed["params"]) and decayed["weight_decay"] > 0
    assert all(p.ndim < 2 for p in exempt["params"]) and exempt["weight_decay"] == 0
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(model.parameters()))


def test_overfits_32_pairs(hw4, smoke, data, runtime):
    corpus, train_ids, _, vocabulary = data
    firsts = {}
    for i in train_ids.tolist():  # photos of different kinds, so that the pairs can be told apart
        firsts.setdefault(tuple(corpus.tokens[i, 0].tolist()), i)
    ids = torch.tensor(list(firsts.values())[:32])
    assert len(ids) == 32
    recipe = replace(smoke.contrastive, epochs=150, patch_keep=1.0, crop_scale=1.0, jitter=0.0, weight_decay=0.0)
    config = replace(smoke, contrastive=recipe, captions_per_image=1, caption_weight=0.0, word_dropout=0.0)
    model = hw4.build_dual_encoder(config, len(vocabulary))
    embed = lambda model, batch, keep: hw4.embed_pairs(model, batch, keep, corpus, config)  # noqa: E731
    history = hw4.fit(model, embed, hw4.alignment_loss, ids, recipe, runtime, seed=0)
    assert history[-1]["loss"] < 0.1 * math.log(32)


def test_same_seed_same_numbers(hw4, smoke, data, runtime):
    corpus, train_ids, val_ids, _ = data
    runs = [hw4.train_contrastive(corpus, train_ids, val_ids, smoke, runtime) for _ in range(2)]
    weights = [model.state_dict() for model, _ in runs]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    losses = [[record["loss"] for record in history] for _, history in runs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_gradient_scaler_train(hw4, smoke, data, dtype):
    corpus, train_ids, val_ids, _ = data
    half = hw4.Runtime(torch.device("cpu"), dtype, use_scaler=True)
    config = replace(smoke, contrastive=replace(smoke.contrastive, epochs=4))
    model, history = hw4.train_contrastive(corpus, train_ids[:96], val_ids, config, half)
    assert history[-1]["loss"] < history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_losses_stay_in_float32_under_autocast(hw4, smoke, data):
    corpus, train_ids, _, vocabulary = data
    model = hw4.build_dual_encoder(smoke, len(vocabulary))
    with hw4.Runtime(torch.device("cpu"), torch.bfloat16).autocast():
        embeddings = hw4.embed_pairs(model, train_ids[:8], 1.0, corpus, smoke)[:3]
    assert all(e.dtype == torch.float32 for e in embeddings)
    assert hw4.contrastive_loss(*embeddings).dtype == torch.float32


def test_bad_training_is_stopped_with_a_remedy(hw4, smoke, data, runtime):
    _, train_ids, _, _ = data
    model = torch.nn.Linear(1, 1)
    nan = lambda model, batch, keep: (model.weight * torch.nan,)  # noqa: E731
    with pytest.raises(
        FloatingPointError, match="not finite at step 1 of epoch 1: lower learning_rate, then run this again"
    ):
        hw4.fit(model, nan, torch.sum, train_ids, smoke.contrastive, runtime, seed=0)
    with pytest.raises(ValueError, match="batch_size 32 exceeds the 8 training images"):
        hw4.fit(model, nan, torch.sum, train_ids[:8], smoke.contrastive, runtime, seed=0)


def test_training_goes_on_in_training_mode_after_an_evaluation(hw4, smoke, data, runtime):
    _, train_ids, _, _ = data
    modes = []

    def embed(model, batch, patch_keep):
        modes.append(model.training)
        return (model.weight,)

    recipe = replace(smoke.contrastive, epochs=2, batch_size=16)
    evaluate = lambda model: {"val_loss": float(model.eval().training)}  # noqa: E731
    model = torch.nn.Linear(1, 1)
    hw4.fit(model, embed, torch.sum, train_ids, recipe, runtime, 0, evaluate=evaluate, num_evaluations=2)
    assert all(modes) and len(modes) == 2 * (len(train_ids) // 16)


def test_state_with_a_loss_that_is_not_finite_is_never_handed_out(hw4, smoke, runtime):
    """On a GPU the losses are read only at the end of an epoch and before a state is saved."""
    run = hw4.TrainingRun(torch.nn.Linear(2, 2), smoke.contrastive, runtime)
    run.losses = [torch.tensor(1.0), torch.tensor(math.nan)]
    with pytest.raises(FloatingPointError, match="not finite at step 2 of epoch 1"):
        run.state_dict()


def test_every_pretrained_tensor_arrives(hw4, smoke, data, runtime):
    corpus, train_ids, _, vocabulary = data
    simclr = hw4.train_simclr(corpus, train_ids, smoke, runtime)[0].state_dict()
    weights = {name: value for name, value in simclr.items() if name.startswith("vision.")}
    fresh = hw4.build_dual_encoder(smoke, len(vocabulary))
    loaded = hw4.build_dual_encoder(smoke, len(vocabulary), weights)
    assert {name for name in fresh.state_dict() if name.startswith("vision.")} == weights.keys()
    for name, value in loaded.state_dict().items():
        unchanged = torch.equal(value, fresh.state_dict()[name])
        assert torch.equal(value, weights[name]) and not unchanged if name in weights else unchanged, name


def test_weights_of_another_model_are_refused(hw4, smoke):
    with pytest.raises(ValueError, match=r"belong to another model: \['encoder\.weight'\]"):
        hw4.build_dual_encoder(smoke, 30, {"encoder.weight": torch.zeros(1)})


# Stages


def test_stage_is_kept_reloaded_and_repaired(hw4, tmp_path, capsys):
    calls = []
    record = {"epoch": 1, "loss": 1.5, "seconds": 120.0, "sitting": 1, "hardware": "an abacus"}

    def train(checkpoint):
        calls.append(checkpoint)
        return torch.nn.Linear(2, 2), [record]

    first = hw4.run_stage("demo", "k" * 64, train, tmp_path)
    again = hw4.run_stage("demo", "k" * 64, train, tmp_path)
    assert len(calls) == 1
    assert torch.equal(first.weights["weight"], again.weights["weight"])
    assert (again.history, again.seconds, again.hardware) == ([record], 120.0, "an abacus")
    out = capsys.readouterr().out
    assert "demo: trained in 2.0 min on an abacus\n" in out
    assert "epoch   1/1  loss 1.500  (120 s)" in out.split("on an abacus")[1]  # a loaded history is shown again
    assert "demo: loaded from demo-kkkk" in out
    path = next(tmp_path.glob("*.pt"))
    path.write_bytes(path.read_bytes()[:100])
    hw4.run_stage("demo", "k" * 64, train, tmp_path)
    assert len(calls) == 2
    assert "is damaged" in capsys.readouterr().out
    assert list(tmp_path.glob("*.damaged"))


def test_stage_tells_where_and_in_how_many_sittings_it_was_trained(hw4):
    def stage(*places):
        history = [{"seconds": 1.0, "sitting": sitting, "hardware": hardware} for sitting, hardware in places]
        return hw4.Stage("demo", "k", {}, history)

    assert stage((1, "a GPU"), (1, "a GPU")).hardware == "a GPU"
    assert stage((1, "a GPU"), (3, "a CPU")).hardware == "a GPU and a CPU, in 3 sittings"
    assert stage((1, "a GPU"), (1, "a GPU")).seconds == 2.0


def keys(hw4, config, data, cells):
    scratch, simclr = (hw4.stage_key(f"train_{kind}", config, data, cells) for kind in ("contrastive", "simclr"))
    return np.array([scratch, simclr, hw4.stage_key("train_contrastive", config, data, cells, simclr)])


@pytest.fixture
def changed(hw4, smoke, definition_cells):
    """Which of (scratch, simclr, pretrained) get a new key after a change."""
    before = keys(hw4, smoke, DATA, definition_cells)

    def compare(config=smoke, data=DATA, swap=("", "")):
        cells = [cell.replace(*swap) for cell in definition_cells]
        assert cells != definition_cells or swap == ("", "")
        return (keys(hw4, config, data, cells) != before).tolist()

    return compare


def test_figures_comments_and_docstrings_do_not_train_again(changed):
    assert changed() == [False] * 3
    assert changed(swap=("figsize=(13, 1.9", "figsize=(12, 1.9")) == [False] * 3
    assert changed(swap=("  # (B, kept, dim)", "")) == [False] * 3
    assert changed(swap=("One random view per image", "A view")) == [False] * 3


def test_how_states_are_saved_and_epochs_are_printed_does_not_train_again(changed):
    assert changed(swap=("SAVE_INTERVAL = 60", "SAVE_INTERVAL = 600")) == [False] * 3
    assert changed(swap=("buffer = io.BytesIO()", "buffer = io.BytesIO(b'')")) == [False] * 3
    assert changed(swap=("os.fsync(file.fileno())", "pass")) == [False] * 3
    assert changed(swap=('set aside")', 'put aside")')) == [False] * 3
    assert changed(swap=("epochs // 100", "epochs // 50")) == [False] * 3


def test_what_could_change_a_training_trains_again(changed, smoke):
    assert changed(data=[torch.zeros(3), torch.ones(4)]) == [True] * 3
    assert changed(replace(smoke, vision_width=128)) == [True] * 3
    assert changed(replace(smoke, text_width=128)) == [True, False, True]
    assert changed(replace(smoke, temperature=0.5)) == [False, True, True]
    assert changed(replace(smoke, contrastive=replace(smoke.contrastive, epochs=3))) == [True, False, True]
    assert changed(replace(smoke, simclr=replace(smoke.simclr, epochs=3))) == [False, True, True]
    assert changed(swap=("nn.GELU()", "nn.ReLU()")) == [True] * 3
    assert changed(swap=("0.299 * r", "0.3 * r")) == [True] * 3
    assert changed(swap=("(to_text + to_image) / 2", "to_text")) == [True, False, True]
    assert changed(swap=("betas=(0.9, 0.98)", "betas=(0.9, 0.999)")) == [True] * 3


def test_every_setting_belongs_to_a_key(hw4, smoke):
    """A new field of Config must not be forgotten by the keys."""
    base = keys(hw4, smoke, DATA, [])
    for name, value in asdict(smoke).items():
        if name in ("contrastive", "simclr", "num_images"):
            continue
        other = f"{value}!" if isinstance(value, str) else (value or 0) * 2 + 2
        config = object.__new__(hw4.Config)
        config.__dict__.update(smoke.__dict__, **{name: other})
        assert (keys(hw4, config, DATA, []) != base).any(), name
