"""Recall, caption selection, intervals."""

import math
from itertools import combinations

import pytest
import torch

N = 40


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(N, 5 * N)


def oracle(hw4):
    return hw4.caption_match(N).float()


def test_recall_by_hand(hw4):
    """Two images, five captions each; the best own caption of image 0 ranks 3rd, of image 1 1st."""
    similarity = torch.tensor(
        [
            [0.1, 0.5, 0.2, 0.0, 0.3, 0.9, 0.8, 0.1, 0.05, 0.01],
            [0.6, 0.1, 0.4, 0.3, 0.7, 0.91, 0.1, 0.2, 0.3, 0.1],
        ]
    )
    ranks = hw4.retrieval_ranks(similarity)
    assert ranks["image → text"].tolist() == [3, 1]
    assert ranks["text → image"].tolist() == [2, 1, 2, 2, 2, 1, 2, 1, 1, 1]
    assert [hw4.recall_at_k(ranks["image → text"], k) for k in (1, 2, 3)] == [0.5, 0.5, 1.0]


def test_ranks_equal_sorting_when_nothing_ties(hw4, scores):
    match = hw4.caption_match(N)
    ranks = hw4.first_match_rank(scores, match)
    for query in range(N):
        order = scores[query].argsort(descending=True)
        assert ranks[query] == 1 + match[query][order].int().argmax()


def test_recall_grows_with_k_and_oracle_is_perfect(hw4, scores):
    for ranks in hw4.retrieval_ranks(scores).values():
        recalls = [hw4.recall_at_k(ranks, k) for k in range(1, 5 * N + 1)]
        assert recalls == sorted(recalls) and recalls[-1] == 1
    for ranks in hw4.retrieval_ranks(oracle(hw4)).values():
        assert hw4.recall_at_k(ranks, 1) == 1


def test_ties_score_chance(hw4):
    """Constant embeddings must get what guessing gets, not 100 % and not 0 %."""
    match = hw4.caption_match(N)
    for query_match, correct in ((match, 5), (match.T, 1)):
        flat = torch.zeros(query_match.shape)
        for k in (1, 5, 10):
            hits = [hw4.recall_at_k(hw4.first_match_rank(flat, query_match, seed), k) for seed in range(60)]
            chance = hw4.chance_recall(query_match.shape[1], correct, k)
            spread = math.sqrt(chance * (1 - chance) / (60 * len(query_match)))
            assert sum(hits) / 60 == pytest.approx(chance, abs=4 * spread)


def test_bad_similarities_are_refused(hw4, scores):
    match = hw4.caption_match(N)
    with pytest.raises(ValueError, match="must be finite"):
        hw4.first_match_rank(scores * torch.nan, match)
    with pytest.raises(ValueError, match="at least one correct candidate"):
        hw4.first_match_rank(scores, torch.zeros_like(match))


@pytest.mark.parametrize("num_candidates", [3, 5, 10, 20, 25])
def test_candidate_sets(hw4, num_candidates):
    candidates, position = hw4.draw_candidates(N, num_candidates, seed=3)
    assert candidates.shape == (N, num_candidates)
    own = candidates // 5 == torch.arange(N)[:, None]
    assert (own.sum(1) == 1).all()  # exactly one true caption, distractors from other images
    assert torch.equal(own.int().argmax(1), position)
    assert all(len(set(row)) == num_candidates for row in candidates.tolist())
    assert len(set(position.tolist())) > 1
    assert not torch.equal(candidates, hw4.draw_candidates(N, num_candidates, seed=4)[0])


def test_selection_of_oracle_random_and_constant_scores(hw4):
    assert hw4.selection_hits(oracle(hw4), 25).mean() == 1
    torch.manual_seed(0)
    big = 300
    for scores in (torch.randn(big, 5 * big), torch.zeros(big, 5 * big)):
        for num_candidates in (3, 10):
            accuracy = hw4.selection_hits(scores, num_candidates, draws=20).mean()
            assert accuracy == pytest.approx(1 / num_candidates, abs=0.025)


def test_impossible_candidate_sets_are_refused(hw4):
    with pytest.raises(ValueError, match="25 candidates cannot be drawn from the captions of 5 images"):
        hw4.draw_candidates(5, 25, seed=0)


@pytest.mark.parametrize("decimals", [5, 0])  # with 0 many scores tie
def test_exact_selection_equals_enumeration(hw4, decimals):
    torch.manual_seed(0)
    n, num_candidates = 3, 4
    similarity = torch.randn(n, 5 * n).round(decimals=decimals)
    exact = hw4.exact_selection(similarity, (num_candidates,))[num_candidates]
    for image in range(n):
        others = [j for j in range(5 * n) if j // 5 != image]
        wins = [
            all(similarity[image, own] > similarity[image, j] for j in drawn)
            for own in range(5 * image, 5 * image + 5)
            for drawn in combinations(others, num_candidates - 1)
        ]
        assert exact[image] == pytest.approx(sum(wins) / len(wins), abs=1e-5)


def test_exact_selection_agrees_with_sampling(hw4):
    torch.manual_seed(0)
    big = 200
    similarity = torch.randn(big, 5 * big) + 1.5 * hw4.caption_match(big)
    for num_candidates in (3, 25):
        sampled = hw4.selection_hits(similarity, num_candidates, draws=50).mean().item()
        exact = hw4.exact_selection(similarity, (num_candidates,))[num_candidates].mean().item()
        assert exact == pytest.approx(sampled, abs=0.03)


def test_hits_keep_the_captions_of_an_image_together(hw4):
    """Captions 0, 2 and 4 of the first image find it; all others find the image after their own."""
    similarity = torch.zeros(12, 60)
    for caption in range(60):
        similarity[(caption // 5 + (caption not in (0, 2, 4))) % 12, caption] = 1
    chance, hits = hw4.recall_measures(similarity)["text → image, R@1"]
    assert chance == pytest.approx(1 / 12)
    assert hits.tolist() == pytest.approx([0.6] + [0.0] * 11)


def test_bootstrap_interval_has_the_right_width(hw4):
    values = (torch.arange(1000) < 100).float()
    mean, low, high = hw4.bootstrap(values)
    assert (mean, low, high) == hw4.bootstrap(values)  # seeded
    error = 1.96 * math.sqrt(0.1 * 0.9 / 1000)
    assert mean == pytest.approx(0.1)
    assert (low, high) == (pytest.approx(0.1 - error, abs=0.003), pytest.approx(0.1 + error, abs=0.003))


def test_chance_recall(hw4):
    assert hw4.chance_recall(1000, 1, 5) == pytest.approx(0.005)
    assert hw4.chance_recall(5000, 5, 1) == pytest.approx(0.001)


def test_gallery_embeddings_match_their_captions(hw4, smoke, data, runtime):
    corpus, _, val_ids, vocabulary = data
    model = hw4.build_dual_encoder(smoke, len(vocabulary))
    images, texts = hw4.embed_gallery(model, val_ids, corpus, smoke, runtime, chunk=7)
    assert images.shape == (len(val_ids), smoke.embed_dim)
    assert texts.shape == (5 * len(val_ids), smoke.embed_dim)
    i = 11
    tokens = corpus.tokens[val_ids[i]]
    assert torch.allclose(texts[5 * i : 5 * i + 5], model.encode_text(tokens, tokens != hw4.PAD), atol=1e-5)
    view = hw4.plain_view(corpus.images[val_ids[i : i + 1]], smoke.image_size)
    assert torch.allclose(images[i], model.encode_image(view)[0], atol=1e-5)
