"""Checks on the real Flickr8k, where it is found."""

import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT

CANDIDATES = [os.environ.get("FLICKR8K_DIR", ""), ROOT / "flickr8k", ROOT.parent / "shared" / "flickr8k"]
FOUND = [Path(c) for c in CANDIDATES if c and (Path(c) / "captions.txt").is_file()]
pytestmark = pytest.mark.skipif(not FOUND, reason="Flickr8k is not here")


@pytest.fixture(scope="module")
def pairs(hw4):
    return hw4.find_pairs(FOUND[0], hw4.PRESETS["cpu"])


@pytest.fixture(scope="module")
def texts(pairs):
    return [caption for _, five in pairs for caption in five]


def test_counts_commas_and_quotes(hw4, pairs, texts):
    assert len(pairs) == hw4.Config.num_images and len(texts) == 40455
    assert sum("," in text for text in texts) == 2447 and sum('"' in text for text in texts) == 120


def test_every_caption_has_words(hw4, texts):
    assert all(hw4.tokenize(text) for text in texts)
    assert "A" in texts and hw4.tokenize("A") == ["a"]
    short = sum(len(hw4.tokenize(text)) < hw4.Config.max_tokens for text in texts)  # one place is for <bos>
    assert 0.99 < short / len(texts) < 1


def test_the_one_pair_of_identical_photographs_is_found(hw4, pairs):
    copies = ["2851198725_37b6027625.jpg", "3050606344_af711c726c.jpg"]
    paths = {path.name: path for path, _ in pairs}
    names = sorted({*list(paths)[3000:4000:5], *copies})
    images = torch.stack([hw4.load_image(paths[name], 96) for name in names])
    assert images.shape == (len(names), 3, 96, 96) and images.float().std() > 20
    assert [names[i] for i in hw4.find_copies(images, hw4.Config.copy_distance).tolist()] == copies
