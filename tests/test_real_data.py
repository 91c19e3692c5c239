"""Checks on the real Flickr8k, where it is found."""

import os
from pathlib import Path

import pytest
from conftest import ROOT

CANDIDATES = [os.environ.get("FLICKR8K_DIR", ""), ROOT / "flickr8k", ROOT.parent / "shared" / "flickr8k"]
FOUND = [Path(c) for c in CANDIDATES if c and (Path(c) / "captions.txt").is_file()]
pytestmark = pytest.mark.skipif(not FOUND, reason="Flickr8k is not here")


@pytest.fixture(scope="module")
def captions(hw4):
    return hw4.read_captions(FOUND[0])


def test_counts(captions):
    assert len(captions) == 8091
    assert sum(map(len, captions.values())) == 40455


def test_commas_and_quotes_survive(captions):
    texts = [c for five in captions.values() for c in five]
    assert sum("," in c for c in texts) == 2447
    assert sum('"' in c for c in texts) == 120


def test_every_caption_has_tokens_and_words_of_one_letter_survive(hw4, captions):
    texts = [c for five in captions.values() for c in five]
    assert all(hw4.tokenize(c) for c in texts)
    assert "A" in texts
    assert hw4.tokenize("A") == ["a"]


def test_the_one_pair_of_identical_photographs_is_found(hw4, captions, tmp_path):
    names = list(captions)[3000:4000]
    images = hw4.load_images(FOUND[0], names, 48, tmp_path)
    correlation, pairs = hw4.similar_pairs(images, 2)
    assert [names[i] for i in pairs[0]] == ["2851198725_37b6027625.jpg", "3050606344_af711c726c.jpg"]
    assert correlation[0] > 0.98 > correlation[1]


def test_images_decode(hw4, captions, tmp_path):
    names = list(captions)[::1000]
    images = hw4.load_images(FOUND[0], names, 64, tmp_path)
    assert images.shape == (len(names), 3, 64, 64)
    assert images.float().std() > 20
