"""Recall, caption selection, intervals, tables and figures, and the experiments' measures."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from IPython.core.interactiveshell import InteractiveShell

N = 40


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.randn(N, 5 * N)


def spaced(text):
    """`text` with ordinary spaces in place of those at which a line does not break."""
    return text.replace("\N{NBSP}", " ")


# Recall and selection


def test_recall_by_hand(hw4):
    """Two images, five captions each; the best own caption of image 0 ranks 3rd, of image 1 2nd, for a tie."""
    similarity = torch.tensor([[1, 5, 2, 0, 3, 9, 8, 1, 0, 0], [6, 1, 4, 3, 7, 7, 1, 2, 3, 1]]) / 10
    recall = {way: values.tolist() for way, values in hw4.recall_at_k(similarity, (1, 2, 3)).items()}
    assert recall["image → text"] == [[0, 0, 1], [0, 1, 1]] and len(recall) == 2
    shares = [[0.2, 1, 1], [0.6, 1, 1]]  # of an image's own captions
    assert recall["text → image"] == [pytest.approx(row) for row in shares]


def test_recall_at_5_is_the_mean_of_both_ways(hw4, scores):
    found = hw4.recall_at_k(scores, (1, 5))
    expected = (found["image → text"][:, 1] + found["text → image"][:, 1]) / 2
    assert torch.allclose(hw4.recall_at_5(scores), expected) and expected.std() > 0


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


def test_candidates_are_one_own_caption_and_distinct_others(hw4):
    drawn = hw4.draw_candidates(N, 25, seed=3)
    assert drawn.shape == (N, 25)
    own = drawn // 5 == torch.arange(N)[:, None]
    assert own[:, 0].all() and not own[:, 1:].any() and len(set((drawn[:, 0] % 5).tolist())) == 5
    assert all(len(set(row)) == 25 for row in drawn.tolist())
    assert torch.equal(drawn, hw4.draw_candidates(N, 25, seed=3))
    assert not torch.equal(drawn, hw4.draw_candidates(N, 25, seed=4))


def test_selection_equals_a_count_over_prefixes_of_the_draws(hw4, scores):
    scores = (scores + 1.5 * hw4.caption_match(N)).round(decimals=1)  # some ties, which count against
    found = hw4.selection_accuracy(scores, hw4.Protocol(draws=3))
    draws = [hw4.draw_candidates(N, 25, seed).tolist() for seed in range(3)]
    assert found.shape == (N, 5)
    for size, shares in zip((3, 5, 10, 20, 25), found.T, strict=True):
        for i, row in enumerate(scores.tolist()):
            wins = [all(row[draw[i][0]] > row[other] for other in draw[i][1:size]) for draw in draws]
            assert shares[i] == pytest.approx(sum(wins) / 3)


def all_scores(hw4, similarity):
    found = hw4.recall_at_k(similarity, (1, 10)).values()
    return torch.cat([*found, hw4.selection_accuracy(similarity, hw4.Protocol())], dim=1)


def test_perfect_similarities_score_1_and_constant_ones_0(hw4):
    assert (all_scores(hw4, hw4.caption_match(N).float()) - 1).abs().max() < 1e-4
    assert (all_scores(hw4, torch.full((N, 5 * N), 0.5)) == 0).all()


def test_similarities_that_are_not_numbers_score_0(hw4):
    assert (all_scores(hw4, torch.full((N, 5 * N), torch.nan)) == 0).all()


def test_gallery_embeddings_match_their_captions(hw4, smoke, data):
    model, i, j = hw4.DualEncoder(len(data.vocabulary), smoke), 11, data.val_ids[11]
    result = hw4.evaluate(model, ["history"], data, smoke)
    assert result.model is model and not model.training and result.history == ["history"]
    assert result.similarity.shape == (N, 5 * N) and not result.similarity.requires_grad
    views = hw4.plain_views(data.images[j : j + 1], smoke.image_size)[0]  # (6, 3, 32, 32)
    photo = F.normalize(sum(model.encode_image(view[None])[0] for view in views), dim=0)
    captions = model.encode_text(data.tokens[j], data.mask[j])
    assert torch.allclose(result.similarity[i, 5 * i : 5 * i + 5], captions @ photo, atol=1e-5)
    whole, _ = hw4.embed_gallery(model, data, smoke, num_views=1)
    assert torch.allclose(whole[i], model.encode_image(views[:1])[0], atol=1e-5)
    expected = hw4.recall_at_k(result.similarity, (1, 3, 5, 10))
    expected[hw4.SELECTION] = hw4.selection_accuracy(result.similarity, smoke.protocol)
    assert result.scores.keys() == expected.keys() and len(expected) == 3
    assert all(torch.equal(result.scores[key], expected[key]) for key in expected)
    assert torch.equal(result.recall, hw4.recall_at_5(result.similarity))


# Intervals, tables and figures


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+\.?\d*", text)]


def test_margin_equals_a_bootstrap_image_by_image(hw4):
    torch.manual_seed(0)
    values, means = torch.rand(60, 2) ** 3, []
    for _ in range(4000):
        means.append(values[torch.randint(60, (60,))].mean(0))
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975]), dim=0)
    assert torch.allclose(hw4.margin(values), (high - low) / 2, rtol=0.06)


@pytest.mark.parametrize(("count", "quantile"), [(8, 2.365), (9, 2.306), (12, 2.201), (41, 2.021), (1000, 1.962)])
def test_margin_is_that_of_students_t(hw4, count, quantile):
    values = torch.linspace(0, 1, count)[:, None]
    error = values.std() / count**0.5
    assert hw4.margin(values).item() == pytest.approx(quantile * error.item(), rel=0.006)


def test_differences_are_paired_and_bold_where_their_interval_excludes_zero(hw4):
    torch.manual_seed(0)
    assert hw4.percent(torch.tensor([0.0, 1.0] * 50)) == "50.0\N{NBSP}±\N{NBSP}10.0"  # on one line
    base, noise = torch.rand(50), torch.randn(50)
    noise = (noise - noise.mean()) / noise.std()
    assert spaced(hw4.difference(base + 0.25, base)) == "**+25.0 ± 0.0**"
    for shift, expected in ((0.29, "**+29.0 ± 28.4**"), (-0.29, "**−29.0 ± 28.4**"), (0.27, "+27.0 ± 28.4")):
        assert spaced(hw4.difference(base + shift + noise, base)) == expected
    assert spaced(hw4.difference(base, base)) == "+0.0 ± 0.0"


def test_a_table_is_text_in_plain_python_and_markdown_in_a_notebook(hw4, capsys):
    text = "| % | a |\n| --- | --- |\n| R@1 | **+1.0** |"
    hw4.show_table(["%", "a"], [["R@1", "**+1.0**"]])
    assert capsys.readouterr().out == text + "\n"
    shown, _ = InteractiveShell().display_formatter.format(hw4.Table(text))
    assert shown["text/plain"] == shown["text/markdown"] == text


@pytest.fixture
def tables(hw4, monkeypatch):
    """The tables displayed since: lists of rows, the header first, without the line below it."""
    shown = []

    def display(table):
        lines = spaced(table.data).splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert rows.pop(1) == ["---"] * len(rows[0])
        shown.append(rows)

    monkeypatch.setattr(hw4, "display", display)
    return shown


def test_scores_are_means_over_seeds_with_paired_differences(hw4, tables):
    torch.manual_seed(0)
    base = torch.rand(50, 2) / 2
    seeds = {hw4.SCRATCH: (base, base + 0.1), hw4.PRETRAINED: (base + 0.2, base + 0.3), "control": (base,)}
    numbers, results = {hw4.TO_TEXT: (1, 5), hw4.SELECTION: (3, 25)}, {}
    for label, group in seeds.items():
        results[label] = [SimpleNamespace(scores=dict.fromkeys(numbers, part), numbers=numbers) for part in group]
    hw4.show_results(results, [hw4.TO_TEXT], [(hw4.PRETRAINED, hw4.SCRATCH), (hw4.PRETRAINED, "control")])
    hw4.show_results(results, numbers)
    rows = []
    for label, shift in zip(seeds, (0.05, 0.25, 0), strict=True):
        rows.append([label, *(spaced(hw4.percent(column)) for column in (base + shift).T)])
    changes = [
        ["SimCLR first − from scratch", *["**+20.0 ± 0.0**"] * 2],
        ["SimCLR first − control", *["**+25.0 ± 0.0**"] * 2],
    ]
    recall, selection = [f"{hw4.TO_TEXT} [%]", "R@1", "R@5"], [f"{hw4.SELECTION} [%]", "N = 3", "N = 25"]
    assert tables == [[recall, *rows, *changes], [recall, *rows], [selection, *rows]]


@pytest.mark.parametrize("panel", range(3))
def test_figures_show_means_with_margins_each_seed_and_guessing_of_selections(hw4, monkeypatch, panel):
    monkeypatch.setattr(hw4.plt, "show", lambda: None)
    torch.manual_seed(0)
    numbers = {hw4.TO_TEXT: (1, 5), hw4.TO_IMAGE: (1, 5), hw4.SELECTION: (3, 10)}
    a, b = (
        SimpleNamespace(scores={measure: torch.rand(30, 2) for measure in numbers}, numbers=numbers) for _ in range(2)
    )
    hw4.plot_results({hw4.SCRATCH: [a, b]}, list(numbers))
    axis, measure = hw4.plt.gcf().axes[panel], list(numbers)[panel]
    assert axis.get_title() == measure and list(axis.get_xticks()) == list(numbers[measure])
    lines = [torch.tensor(list(map(float, line.get_ydata()))) for line in axis.lines]
    (mean, *seeds), rest = lines[:3], lines[3:]
    low, high = torch.tensor([bar.tolist() for bar in axis.collections[0].get_segments()])[:, :, 1].T
    values = [100 * run.scores[measure] for run in (a, b)]  # (30, 2) each
    values = torch.stack([(values[0] + values[1]) / 2, *values])
    assert torch.allclose(torch.stack([mean, *seeds]), values.mean(1), atol=1e-3)
    assert torch.allclose((high - low) / 2, hw4.margin(values[0]), atol=1e-3)
    guess = [100 / 3, 10.0] if measure == hw4.SELECTION else [100 / 30, 100 * 5 / 30]
    assert [line.tolist() for line in rest] == [pytest.approx(guess)]
    hw4.plt.close()


def test_drawing_of_the_model_tells_its_sizes(hw4, smoke, monkeypatch):
    monkeypatch.setattr(hw4.plt, "show", lambda: None)
    sizes = {"vision": hw4.Size(width=48, depth=3, num_heads=2), "text": hw4.Size(width=32, depth=5, num_heads=2)}
    hw4.draw_model(replace(smoke, **sizes))
    drawn = "\n".join(text.get_text().replace("\n", " ") for text in hw4.plt.gcf().axes[0].texts)
    hw4.plt.close()
    for size in (f"projection to {smoke.embed_dim}", "3 blocks of width 48", "5 blocks of width 32"):
        assert size in drawn


def test_difference_figure_shows_every_score_paired_over_photos(hw4, monkeypatch):
    monkeypatch.setattr(hw4.plt, "show", lambda: None)
    torch.manual_seed(0)
    numbers = {hw4.TO_TEXT: (1, 5), hw4.SELECTION: (3,)}
    runs = []
    for _ in range(3):
        scores = {measure: torch.rand(30, len(values)) for measure, values in numbers.items()}
        runs.append(SimpleNamespace(scores=scores, numbers=numbers))
    results = {"a": runs[:2], "b": runs[2:], "c": runs[:1]}
    hw4.plot_differences(results, [("c", "a"), ("a", "b")])
    other_axis, axis = hw4.plt.gcf().axes
    assert [axis.get_title() for axis in (other_axis, axis)] == ["c − a [points]", "a − b [points]"]
    assert other_axis.get_xlim() == axis.get_xlim() and other_axis.yaxis_inverted() and axis.yaxis_inverted()

    point, zero = axis.lines
    (bars,) = axis.containers[0].lines[2]
    first, second, other = (torch.cat(list(run.scores.values()), 1) for run in runs)
    change = 100 * ((first + second) / 2 - other)  # (30, 3)
    assert torch.allclose(torch.tensor([float(x) for x in point.get_xdata()]), change.mean(0), atol=1e-3)
    lows, highs = torch.tensor([[float(x) for x, _ in segment] for segment in bars.get_segments()]).T
    assert torch.allclose((highs - lows) / 2, hw4.margin(change), atol=1e-3)
    names = [f"{hw4.TO_TEXT}, R@1", f"{hw4.TO_TEXT}, R@5", f"{hw4.SELECTION}, N = 3"]
    assert list(point.get_ydata()) == names and set(zero.get_xdata()) == {0}
    hw4.plt.close()


def test_trainings_are_shown_with_their_losses_and_compared_in_pairs(hw4, tables):
    torch.manual_seed(0)
    base, trainings = torch.rand(50) / 2, {}
    for i, label in enumerate("abc"):
        history = [{"loss": 9.0}, {"loss": 2 + i, "val_loss": 3}]
        trainings[label] = SimpleNamespace(recall=base + 0.1 * i, history=history)
    hw4.show_losses(trainings)
    hw4.show_recalls(trainings, [("c", "a"), ("b", "c")])
    losses, recalls = tables
    assert losses == [["loss, seed 0", "training", "validation"]] + [
        ["abc"[i], f"{2 + i:.2f}", "3.00"] for i in range(3)
    ]
    assert recalls[0] == ["model (seed 0)", "R@5, both ways [%]"]
    assert recalls[1:4] == [["abc"[i], spaced(hw4.percent(base + 0.1 * i))] for i in range(3)]
    assert recalls[4:] == [["c − a", "**+20.0 ± 0.0**"], ["b − c", "**−10.0 ± 0.0**"]]


def test_curves_show_the_epochs_that_were_measured(hw4, monkeypatch):
    monkeypatch.setattr(hw4.plt, "show", lambda: None)
    history = [{"epoch": 1, "loss": 3.0}, {"epoch": 2, "loss": 2.0, "R@5": 25.0}]
    hw4.plot_histories({"a": history, "b": history[:1]}, {"loss": "training loss", "R@5": "R@5 [%]"})
    left, right = hw4.plt.gcf().axes
    assert [axis.get_title() for axis in (left, right)] == ["training loss", "R@5 [%]"]
    assert [list(line.get_ydata()) for line in left.lines] == [[3, 2], [3]]
    assert [list(line.get_xdata()) for line in right.lines] == [[2], []]
    hw4.plt.close()


def test_selections_show_every_candidate_and_mark_the_choice_of_each_model(hw4, data, scores, monkeypatch):
    rows = [4, 9, 17, 30]
    monkeypatch.setattr(hw4.plt, "show", lambda: None)
    results = {"a": [SimpleNamespace(similarity=scores)], "b": [SimpleNamespace(similarity=-scores)]}
    candidates = hw4.draw_candidates(N, 5, seed=0)
    hw4.show_selections(results, data, rows, candidates)
    axes = hw4.plt.gcf().axes
    hw4.plt.close()
    for i, axis in zip(rows, axes, strict=True):
        assert (axis.images[0].get_array() == data.images[data.val_ids[i]].permute(1, 2, 0).numpy()).all()
        (text,) = (text.get_text() for text in axis.texts)
        lines = re.sub(r"\n(?![●○])", " ", text).splitlines()  # without the breaks of long captions
        for candidate, line in zip(candidates[i].tolist(), lines, strict=True):
            assert line.endswith(data.captions[data.val_ids[candidate // 5]][candidate % 5].rstrip(" ."))
            value = scores[i, candidate].item()
            assert numbers(line)[:2] == pytest.approx([value, -value], abs=0.006)
        choices = [[line.split()[2 * model] for line in lines].index("●") for model in (0, 1)]
        drawn = scores[i, candidates[i]]
        assert choices == [drawn.argmax(), drawn.argmin()] and text.count("●") == 2


# Measures of the experiments


def test_description_of_the_space_equals_a_count(hw4, scores):
    scores = scores.round(decimals=1)  # some ties, which count against
    true, others, below = hw4.describe_space(scores)
    assert true.shape == below.shape == (N, 5) and others.shape == (N, 5 * N - 5)
    for i in range(N):
        wrong = [value for j, value in enumerate(scores[i].tolist()) if j // 5 != i]
        assert others[i].tolist() == wrong and torch.equal(true[i], scores[i, 5 * i : 5 * i + 5])
        for c in range(5):
            count = sum(value < scores[i, 5 * i + c].item() for value in wrong)
            assert below[i, c].item() == pytest.approx(count / len(wrong))


def test_without_layout_positions_of_patches_are_shuffled_in_a_copy(hw4, smoke, data, monkeypatch):
    torch.manual_seed(0)
    run = hw4.evaluate(hw4.DualEncoder(len(data.vocabulary), smoke), [], data, smoke)
    embed_gallery, used = hw4.embed_gallery, []

    def spy(model, data, config):
        used.append(model.vision.position_embedding.detach()[0].tolist())
        return embed_gallery(model, data, config)

    monkeypatch.setattr(hw4, "embed_gallery", spy)
    hw4.without_layout(run, data, smoke)
    hw4.without_layout(run, data, smoke)
    trained = run.model.vision.position_embedding.detach()[0].tolist()  # 32 px in patches of 8
    assert len(trained) == 16 and sorted(used[0]) == sorted(trained) and used[0] != trained
    assert used[1] == used[0]
    with torch.no_grad():
        run.model.vision.position_embedding[:] = 0.5  # no layout to lose
    same = hw4.evaluate(run.model, [], data, smoke)
    assert torch.equal(hw4.without_layout(same, data, smoke).recall, same.recall)


def test_words_are_found_in_any_caption_and_left_out_where_validation_cannot_judge(hw4, data):
    tokens = torch.zeros(6, 5, 4, dtype=torch.int64)
    tokens[0, 4, 3] = tokens[3, 0, 1] = tokens[5, 2, 2] = 3
    tokens[3:, 1, 1] = 4  # in all validation photos
    tokens[:3, 0, 0] = 5  # in none
    tokens[1, 0, 0] = tokens[4, 3, 3] = 6
    vocabulary = {"red": 3, "dog": 4, "cat": 5, "pink": 6}
    few = replace(data, tokens=tokens, vocabulary=vocabulary, val_ids=torch.tensor([3, 4, 5]))
    found = hw4.find_words({"colours": "blue red pink", "animals": "dog cat", "alone": "red"}, few)
    assert list(found) == ["colours"]
    assert found["colours"].tolist() == [[i in (0, 3, 5), i in (1, 4)] for i in range(6)]


def test_auc_equals_a_count_of_pairs(hw4):
    torch.manual_seed(0)
    present = torch.rand(50) < 0.3
    for scores, low, high in ((torch.randn(50) + 2 * present, 0.7, 0.99), (5.0 * present + torch.rand(50), 1, 1)):
        wins = [float(a > b) for a in scores[present] for b in scores[~present]]
        assert hw4.auc(scores, present).item() == pytest.approx(sum(wins) / len(wins), abs=1e-6)
        assert low <= hw4.auc(scores, present) <= high


def test_probe_finds_what_is_there_and_only_that(hw4, smoke, data):
    """The first label is whether the photo is reddish, the second is drawn and can only be learnt by heart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 120, (600, 3, 48, 48), generator=generator).to(torch.uint8)
    labels = torch.rand(600, 2, generator=generator) < 0.4
    images[:, 0] += 20 * labels[:, :1, None].to(torch.uint8)
    shuffled = torch.randperm(600, generator=generator)
    photos = replace(data, images=images, train_ids=shuffled[:300], val_ids=shuffled[300:])
    found = hw4.probe(nn.AdaptiveAvgPool2d(16), {"red": labels[:, :1], "drawn": labels}, photos, smoke)
    assert found["red"] > 0.99 and found["drawn"][0] > 0.99
    assert found["drawn"][1] == pytest.approx(0.5, abs=0.12)


def test_probes_are_shown_by_kind_and_compared_over_all_words(hw4, tables):
    values = {"colours": torch.tensor([0.5, 0.7]), "scenes": torch.tensor([0.8, 0.8])}
    better = {kind: aucs + 0.1 for kind, aucs in values.items()}
    hw4.show_probes({"random": values, "SimCLR": better}, [("SimCLR", "random")])
    ((header, *rows),) = tables
    assert header == ["AUC [%]", "colours (2 words)", "scenes (2 words)", "all words"]
    assert [[cell.split()[0] for cell in row] for row in rows[:2]] == [
        ["random", "60.0", "80.0", "70.0"],
        ["SimCLR", "70.0", "90.0", "80.0"],
    ]
    assert rows[2:] == [["SimCLR − random", *["**+10.0 ± 0.0**"] * 3]]
