"""Recall, caption selection, intervals, tables, probes, and the patches that are shuffled."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

N = 40


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(N, 5 * N)


def test_recall_by_hand(hw4):
    """Two images, five captions each; the best own caption of image 0 ranks 3rd, of image 1 2nd, for a tie."""
    similarity = torch.tensor([[1, 5, 2, 0, 3, 9, 8, 1, 0, 0], [6, 1, 4, 3, 7, 7, 1, 2, 3, 1]]) / 10
    ranks = hw4.retrieval_ranks(similarity)
    assert ranks["image → text"].tolist() == [3, 2]
    assert ranks["text → image"].tolist() == [2, 1, 2, 2, 2, 2, 2, 1, 1, 1]
    recall = {measure: values.tolist() for measure, values in hw4.recall_at_k(similarity).items()}
    assert recall["image → text, R@1"] == [0, 0] and recall["image → text, R@3"] == [1, 1]
    assert recall["text → image, R@1"] == pytest.approx([0.2, 0.6])  # the shares of an image's own captions
    assert recall["R@5"] == [1, 1] and len(recall) == 9


@pytest.mark.parametrize("decimals", [5, 0])  # with 0 many scores tie
def test_ranks_equal_brute_force_and_ties_count_against(hw4, scores, decimals):
    scores, match = scores.round(decimals=decimals), hw4.caption_match(N)
    assert match.sum(1).tolist() == [5] * N and match[3].nonzero().flatten().tolist() == list(range(15, 20))
    for s, m in ((scores, match), (scores.T, match.T)):
        expected = []
        for row, correct in zip(s.tolist(), m.tolist(), strict=True):
            order = sorted(zip(row, correct, strict=True), key=lambda pair: (-pair[0], pair[1]))
            expected.append(1 + [hit for _, hit in order].index(True))
        assert hw4.first_match_rank(s, m).tolist() == expected


def test_perfect_and_constant_similarities(hw4):
    perfect, constant = hw4.caption_match(N).float(), torch.full((N, 5 * N), 0.5)
    assert all((values == 1).all() for values in hw4.recall_at_k(perfect).values())
    assert all((values == 0).all() for values in hw4.recall_at_k(constant).values())
    assert all(values.min() > 0.9999 for values in hw4.selection_scores(perfect).values())
    assert all((values == 0).all() for values in hw4.selection_scores(constant).values())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_similarities_that_are_not_finite_are_refused(hw4, scores, value):
    scores[3, 4] = value
    with pytest.raises(ValueError, match="similarities must be finite: the model has diverged"):
        hw4.first_match_rank(scores, hw4.caption_match(N))


def test_gallery_embeddings_match_their_captions(hw4, smoke, data):
    corpus, _, val_ids, _ = data
    model = hw4.build_dual_encoder(smoke, corpus.num_tokens)
    images, texts = hw4.embed_gallery(model, val_ids, corpus, smoke)
    assert images.shape == (N, smoke.embed_dim) and texts.shape == (5 * N, smoke.embed_dim)
    assert not images.requires_grad and not model.training
    tokens, i = corpus.tokens[val_ids[11]], 11
    assert torch.allclose(texts[5 * i : 5 * i + 5], model.encode_text(tokens, tokens != hw4.PAD), atol=1e-5)
    view = hw4.plain_view(corpus.images[val_ids[i : i + 1]], smoke.image_size)
    assert torch.allclose(images[i], model.encode_image(view)[0], atol=1e-5)


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", text)]


def test_percent_equals_a_bootstrap_image_by_image(hw4):
    torch.manual_seed(0)
    values, generator, means = torch.rand(30) ** 3, torch.Generator().manual_seed(1), []
    for _ in range(4000):
        drawn = torch.randint(30, (30,), generator=generator).tolist()
        means.append(100 * sum(values[i].item() for i in drawn) / 30)
    means.sort()
    expected, found = [100 * values.mean().item(), means[100], means[3899]], hw4.percent(values)
    assert numbers(found) == pytest.approx(expected, abs=0.8) and expected[2] - expected[1] > 8
    assert re.fullmatch(r"\d\d\.\d \[\d\d\.\d, \d\d\.\d\]", found) and hw4.percent(values) == found
    assert hw4.percent(values, "+") == re.sub(r"(\d\d\.)", r"+\1", found)
    assert numbers(hw4.percent(-values, "+")) == pytest.approx([-expected[0], -expected[2], -expected[1]], abs=0.8)


def test_results_table_has_means_seeds_and_paired_differences(hw4):
    """SimCLR first is better by the same on every image: the paired interval has no width, those of the means have."""
    torch.manual_seed(0)
    base = torch.rand(50) / 2
    models = {hw4.SCRATCH: (base, base + 0.1), hw4.SIMCLR: (base + 0.2, base + 0.3), hw4.CONTROL: (base,)}
    runs = {label: [SimpleNamespace(scores={"m": v, "o": v}) for v in values] for label, values in models.items()}
    table = hw4.results_table(runs, ["m", "o"], against=(hw4.SCRATCH, hw4.CONTROL)).data.splitlines()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    differences = [f"{hw4.SIMCLR} − {label}" for label in (hw4.SCRATCH, hw4.CONTROL)]
    assert rows[:2] == [["%", *models, *differences], ["---"] * 6] and [row[0] for row in rows[2:]] == ["m", "o"]
    for cell, values in zip(rows[2][1:4], models.values(), strict=True):
        mean, low, high, *each = numbers(cell)
        seeds = [100 * value.mean().item() for value in values]
        assert mean == pytest.approx(sum(seeds) / len(seeds), abs=0.06) and each == pytest.approx(seeds, abs=0.06)
        assert low + 2 < mean < high - 2
    assert rows[2][4:] == ["+20.0 [+20.0, +20.0]", "+25.0 [+25.0, +25.0]"]


def test_candidates_are_one_own_caption_and_distinct_others(hw4):
    drawn = hw4.draw_candidates(N, seed=3)
    assert drawn.shape == (N, 25)
    own = drawn // 5 == torch.arange(N)[:, None]
    assert own[:, 0].all() and not own[:, 1:].any() and len(set((drawn[:, 0] % 5).tolist())) == 5
    assert all(len(set(row)) == 25 for row in drawn.tolist())
    assert torch.equal(drawn, hw4.draw_candidates(N, seed=3))
    assert not torch.equal(drawn, hw4.draw_candidates(N, seed=4))


def test_selection_equals_a_count_over_prefixes_of_the_draws(hw4, scores):
    scores = (scores + 1.5 * hw4.caption_match(N)).round(decimals=1)  # some ties, which count against
    found, draws = hw4.selection_scores(scores, draws=3), [hw4.draw_candidates(N, seed).tolist() for seed in range(3)]
    assert list(found) == ["N = 3", "N = 5", "N = 10", "N = 20", "N = 25"]
    for size in (3, 5, 10, 20, 25):
        for i, row in enumerate(scores.tolist()):
            wins = [all(row[draw[i][0]] > row[other] for other in draw[i][1:size]) for draw in draws]
            assert found[f"N = {size}"][i] == pytest.approx(sum(wins) / 3)


def test_selection_from_random_scores_is_guessing(hw4):
    torch.manual_seed(0)
    found = hw4.selection_scores(torch.randn(300, 1500))
    for size in hw4.CANDIDATES:
        assert found[f"N = {size}"].mean() == pytest.approx(1 / size, abs=0.025)


def test_auc_equals_a_count_of_pairs(hw4):
    torch.manual_seed(0)
    scores, labels = torch.randn(50, 4), (torch.rand(50, 4) < 0.3).float()
    scores[:, 1] += 2 * labels[:, 1]
    scores[:, 2] = labels[:, 2] * 5 + torch.rand(50)
    scores[:, 3], labels[:, 3] = -scores[:, 2], labels[:, 2]
    found = hw4.auc(scores, labels).tolist()
    for word in range(4):
        true, false = scores[labels[:, word] == 1, word], scores[labels[:, word] == 0, word]
        assert found[word] == pytest.approx((true[:, None] > false).float().mean().item(), abs=1e-5)
    assert found[2:] == [1, 0] and 0.3 < found[0] < 0.7 < found[1] < 1


def test_probe_finds_what_is_there_and_only_that(hw4, smoke, monkeypatch):
    """The first label is whether the photo is reddish, the second is drawn and can only be learnt by heart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 120, (600, 3, 48, 48), generator=generator).to(torch.uint8)
    labels = (torch.rand(600, 2, generator=generator) < 0.4).float()
    images[:, 0] += (20 * labels[:, :1, None]).to(torch.uint8)
    for name, value in {"config": smoke, "corpus": SimpleNamespace(images=images)}.items():
        monkeypatch.setattr(hw4, name, value, raising=False)
    shuffled = torch.randperm(600, generator=generator)
    found = hw4.probe(nn.AdaptiveAvgPool2d(16), labels, shuffled[:300], shuffled[300:])
    assert found[0] > 0.99 and found[1] == pytest.approx(0.5, abs=0.12)


def test_shuffled_photos_have_the_same_patches_elsewhere(hw4):
    images = torch.rand(3, 3, 32, 32)
    images[1] = images[0]
    mixed = hw4.shuffle_patches(images, 8)
    before, after = hw4.patchify(images, 8), hw4.patchify(mixed, 8)
    order = torch.cdist(after, before).argmin(2)  # (3, 16): where each patch was
    assert order.sort(1).values.tolist() == [list(range(16))] * 3
    assert torch.equal(after, torch.stack([patches[row] for patches, row in zip(before, order, strict=True)]))
    assert order[0].tolist() != list(range(16)) and not torch.equal(order[0], order[1])
    assert torch.equal(mixed, hw4.shuffle_patches(images, 8))
