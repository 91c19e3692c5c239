"""Finding and reading the data, split, equal photos, vocabulary, tokens and pixels, when all is well."""

import shutil
import unicodedata

import numpy as np
import pytest
import torch
from host import archive_of


def test_download_is_unpacked_once(hw4, here, host, data_dir, captions):
    host.content = archive_of(data_dir)
    photos, file = hw4.find_flickr8k(host.url)
    assert hw4.read_captions(file, photos) == captions
    assert sorted(path.name for path in (here / "flickr8k").iterdir()) == ["Images", "captions.txt"]
    assert hw4.find_flickr8k(host.url) == (photos, file) and host.requests == 1


def test_zip_put_there_by_hand_is_not_downloaded(hw4, here, host, data_dir, captions):
    (here / "flickr8k").mkdir()
    (here / "flickr8k" / "flickr8k.zip").write_bytes(archive_of(data_dir))
    photos, file = hw4.find_flickr8k(host.url)
    assert hw4.read_captions(file, photos) == captions and host.requests == 0


@pytest.mark.parametrize("photos", ["Images", "images", "Flickr8k/Images", "Flicker8k_Dataset", "x/Flicker8k_Dataset"])
@pytest.mark.parametrize("form", ["mine", "{}/mine", "'{}/mine'"])
def test_every_layout_is_read(hw4, here, host, data_dir, captions, monkeypatch, photos, form):
    """Kaggle's and the original one, an outer folder, lower case; FLICKR8K_DIR is only read, as on Kaggle."""
    shutil.copytree(data_dir / "Images", here / "mine" / photos)
    rows = [f"{name}#{i}\t{text}\n" for name, texts in captions.items() for i, text in enumerate(texts)]
    old, file = "Flicker" in photos, (here / "mine" / photos).parent
    (file / "Flickr8k.token.txt").write_text("".join(rows)) if old else shutil.copy(data_dir / "captions.txt", file)
    (here / "mine" / "flickr8k.zip").write_bytes(b"is left alone")
    before = sorted(here.rglob("*"))
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    monkeypatch.setenv("FLICKR8K_DIR", form.format(here))
    found, file = hw4.find_flickr8k(host.url)
    assert hw4.read_captions(file, found) == captions
    assert sorted(here.rglob("*")) == before and host.requests == 0
    for path in before:
        path.chmod(0o755)  # so that pytest can remove it


def test_captions_keep_commas_and_quotes(captions):
    texts = captions["00000.jpg"]
    assert len(captions) == 320 and len(texts) == 5
    assert texts[0].endswith(", seen from above .") and texts[2].startswith('The sign says "')


CHANGES = {
    "Windows line ends": lambda text: text.replace(b"\n", b"\r\n"),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "blank lines": lambda text: text.replace(b"\n", b"\n   \n", 3) + b"\n \n",
    "no last line end": lambda text: text.removesuffix(b"\n"),
    "all": lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n \r\n"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_harmless_oddities_of_captions_change_nothing(hw4, data_dir, captions, tmp_path, change):
    before, file = (data_dir / "captions.txt").read_bytes().replace(b"\r\n", b"\n"), tmp_path / "captions.txt"
    file.write_bytes(change(before))
    assert file.read_bytes() != before
    assert hw4.read_captions(file, data_dir / "Images") == captions


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A dog’s ball, isn't it? 2 DOGS!", ["a", "dog's", "ball", "isn't", "it", "2", "dogs"]),
        ("Ein M\u00e4dchen l\u00e4uft", ["ein", "m\u00e4dchen", "l\u00e4uft"]),
        ("\u4e00\u53ea\u72d7 \u5728\u8dd1\u3002", ["\u4e00\u53ea\u72d7", "\u5728\u8dd1"]),
        (" . ?!", []),
    ],
)
def test_words_of_any_script(hw4, caption, words):
    assert hw4.tokenize(caption) == words


@pytest.mark.parametrize("word", ["Ma\u0308dchen", "l\u2019e\u0301te\u0301", "cafe\u0301s"])
def test_combining_accents_stay_in_their_word(hw4, word):
    found = [unicodedata.normalize("NFC", part) for part in hw4.tokenize(f"A {word}, a")]
    assert found == ["a", unicodedata.normalize("NFC", word.lower().replace("’", "'")), "a"]


def test_vocabulary_keeps_frequent_words_only(hw4):
    assert list(hw4.build_vocabulary(["A dog, a DOG!", "a cat"], 2)) == ["<pad>", "<bos>", "<unk>", "a", "dog"]
    with pytest.raises(ValueError, match="no word occurs 3 times in the training captions: is captions.txt"):
        hw4.build_vocabulary(["?", "!", "a dog"])


def test_the_vocabulary_comes_from_training_captions(hw4, cells, data, smoke):
    """The notebook's own cell, with a word that only validation captions have, and often."""
    (cell,) = [source for source in cells if "= build_vocabulary(" in source]
    (corpus, train_ids, val_ids, _), names = data, [f"{i}.jpg" for i in range(320)]
    captions = {name: ["a dog runs to the left"] * 5 for name in names}
    captions |= {names[i]: ["a zebra runs"] * 5 for i in val_ids.tolist()}
    run = dict(vars(hw4), names=names, captions=captions, train_ids=train_ids, config=smoke, images=corpus.images)
    exec(cell, run)
    found, word, i, j = run["corpus"], run["vocabulary"], val_ids[0].item(), train_ids[0].item()
    assert "dog" in word and "zebra" not in word and found.num_tokens == len(word)
    assert found.tokens[i, 3, :5].tolist() == [hw4.BOS, word["a"], hw4.UNK, word["runs"], hw4.PAD]
    assert found.tokens[j, 0, 6] == word["left"]
    assert found.lengths[[i, j]].tolist() == [[4] * 5, [7] * 5]


def test_encoding_pads_truncates_and_marks_unknown_words(hw4):
    vocabulary = hw4.build_vocabulary(["a dog runs"], min_count=1)
    a, dog, runs = (vocabulary[word] for word in ("a", "dog", "runs"))
    tokens, mask = hw4.encode_captions(["a dog", "the dog runs far away", "?!"], vocabulary, 4)
    expected = [[hw4.BOS, a, dog, hw4.PAD], [hw4.BOS, hw4.UNK, dog, runs], [hw4.BOS] + 3 * [hw4.PAD]]
    assert tokens.tolist() == expected and torch.equal(mask, tokens != hw4.PAD)


def test_split_is_disjoint_complete_and_seeded(hw4):
    train, val = hw4.split_images(100, 20, seed=1)
    assert len(val) == 20 and sorted(train.tolist() + val.tolist()) == list(range(100))
    assert train.tolist() == sorted(train.tolist()) and val.tolist() != list(range(20))
    assert torch.equal(val, hw4.split_images(100, 20, seed=1)[1])
    assert not torch.equal(val, hw4.split_images(100, 20, seed=2)[1])
    for num_val in (0, 100):
        with pytest.raises(ValueError, match=f"num_val is {num_val}: too many or too few for 100 images"):
            hw4.split_images(100, num_val)


def test_copies_are_kept_out_of_validation(hw4):
    _, drawn = hw4.split_images(100, 20, seed=1)
    train, val = hw4.split_images(100, 20, drawn[:7], seed=1)
    assert len(val) == 20 and set(drawn[7:].tolist()) < set(val.tolist())
    assert set(drawn[:7].tolist()) < set(train.tolist())
    assert sorted(train.tolist() + val.tolist()) == list(range(100))
    with pytest.raises(ValueError, match="num_val is 5: .* with 6 copies"):
        hw4.split_images(10, 5, range(6))


def test_find_copies_equals_corrcoef(hw4):
    """A brighter and softer copy is found across the parts of 500; a negative is not."""
    images = torch.randint(50, 200, (510, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    images[505] = torch.nn.functional.avg_pool2d(images[4], 3, 1, 1, count_include_pad=False) * 1.1 + 20
    images[7] = 250 - images[4]
    images = images.to(torch.uint8)
    assert hw4.find_copies(images, 0.8).tolist() == [[4, 505]]
    small = images.float().view(510, 3, 16, 2, 16, 2).mean((3, 5)).flatten(1).numpy()
    expected = np.argwhere(np.triu(np.corrcoef(small), 1) > 0.1).tolist()
    assert hw4.find_copies(images, 0.1).tolist() == expected and len(expected) > 1
