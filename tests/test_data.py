"""Captions, split, vocabulary, tokens, images, and what happens when the data is bad."""

import shutil

import numpy as np
import pytest
import torch
from host import archive_of, serving


def write_captions(folder, text):
    (folder / "captions.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def copy(data_dir, tmp_path):
    """A private copy of the synthetic data set, to be damaged."""
    return shutil.copytree(data_dir, tmp_path / "copy")


def test_csv_keeps_commas_and_quotes(hw4, data_dir):
    texts = hw4.read_captions(data_dir)["00000.jpg"]
    assert len(texts) == 5
    assert texts[0].endswith(", seen from above .")
    assert texts[2].startswith('The sign says "')


def test_split_is_disjoint_complete_and_seeded(hw4):
    train, val = hw4.split_images(100, 20, seed=1)
    assert len(val) == 20
    assert sorted(train.tolist() + val.tolist()) == list(range(100))
    assert torch.equal(val, hw4.split_images(100, 20, seed=1)[1])
    assert not torch.equal(val, hw4.split_images(100, 20, seed=2)[1])
    with pytest.raises(ValueError, match="num_val"):
        hw4.split_images(10, 10, seed=0)


def test_copies_are_kept_out_of_validation(hw4):
    _, drawn = hw4.split_images(100, 20, seed=1)
    train, val = hw4.split_images(100, 20, seed=1, only_train=drawn[:7])
    assert len(val) == 20 and set(drawn[7:].tolist()) < set(val.tolist())
    assert set(drawn[:7].tolist()) < set(train.tolist())
    assert sorted(train.tolist() + val.tolist()) == list(range(100))
    with pytest.raises(ValueError, match="num_val"):
        hw4.split_images(10, 5, seed=0, only_train=range(6))


def test_similar_pairs_finds_a_copy_that_is_brighter_and_softer(hw4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(50, 200, (30, 3, 32, 32), generator=generator).float()
    images[21] = torch.nn.functional.avg_pool2d(images[4], 3, 1, 1, count_include_pad=False) * 1.1 + 20
    correlation, pairs = hw4.similar_pairs(images.to(torch.uint8), 5)
    assert pairs[0].tolist() == [4, 21] and correlation[0] > 0.8 > 0.5 > correlation[1]
    assert correlation.tolist() == sorted(correlation.tolist(), reverse=True)
    expected = np.corrcoef(
        *(images[i].to(torch.uint8).float().view(3, 16, 2, 16, 2).mean((2, 4)).flatten() for i in (4, 21))
    )
    assert correlation[0].item() == pytest.approx(expected[0, 1], abs=1e-5)


def test_vocabulary_keeps_frequent_training_words_only(hw4):
    vocabulary = hw4.build_vocabulary(["A dog, a DOG!", "a cat"], min_count=2)
    assert list(vocabulary) == ["<pad>", "<bos>", "<unk>", "a", "dog"]


def test_notebook_builds_the_vocabulary_from_training_captions(notebook):
    calls = [c.source for c in notebook.cells if "= build_vocabulary(" in c.source]
    assert len(calls) == 1
    assert "build_vocabulary(train_captions" in calls[0]
    assert "train_captions = [c for i in train_ids.tolist()" in calls[0]


@pytest.mark.parametrize("caption", ["A", "a", "", " . ", "?!", "broken image"])
def test_no_caption_becomes_empty(hw4, caption):
    tokens, mask = hw4.encode_captions([caption], {"<pad>": 0, "<bos>": 1, "<unk>": 2}, 8)
    assert tokens[0, 0] == hw4.BOS
    assert mask[0, 0]
    assert mask.sum() == 1 + len(hw4.tokenize(caption))


def test_encoding_pads_truncates_and_marks_unknown_words(hw4):
    vocabulary = hw4.build_vocabulary(["a dog runs"], min_count=1)
    tokens, mask = hw4.encode_captions(["a dog", "the dog runs far away"], vocabulary, 4)
    assert tokens.tolist() == [
        [hw4.BOS, vocabulary["a"], vocabulary["dog"], hw4.PAD],
        [hw4.BOS, hw4.UNK, vocabulary["dog"], vocabulary["runs"]],
    ]
    assert mask.tolist() == [[True, True, True, False], [True] * 4]


def test_mirror_swaps_left_and_right_only(hw4):
    vocabulary = hw4.build_vocabulary(["left dog right"], min_count=1)
    mirror = hw4.mirror_tokens(vocabulary)
    assert mirror[vocabulary["left"]] == vocabulary["right"]
    assert mirror[vocabulary["right"]] == vocabulary["left"]
    others = [i for token, i in vocabulary.items() if token not in ("left", "right")]
    assert mirror[others].tolist() == others


def test_images_are_cached(hw4, data_dir, tmp_path, monkeypatch):
    names = ["00000.jpg", "00001.jpg"]
    first = hw4.load_images(data_dir, names, 16, tmp_path)
    assert first.shape == (2, 3, 16, 16)
    assert first.dtype == torch.uint8 and first.is_contiguous()  # so that its content can be hashed
    monkeypatch.setattr(hw4, "load_image", None)  # decoding again would fail
    assert torch.equal(first, hw4.load_images(data_dir, names, 16, tmp_path))


def test_truncated_jpeg_is_named(hw4, copy, tmp_path):
    path = copy / "Images" / "00003.jpg"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(OSError, match=r"00003\.jpg cannot be decoded.*unpack Flickr8k again"):
        hw4.load_images(copy, ["00003.jpg"], 16, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_missing_image_is_named(hw4, copy):
    (copy / "Images" / "00007.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 00007\.jpg, which is not in Images/: put"):
        hw4.read_captions(copy)


def test_wrong_header_and_wrong_number_of_captions(hw4, copy):
    write_captions(copy, "picture,text\n00000.jpg,a dog\n")
    with pytest.raises(ValueError, match="should start with the line 'image,caption'"):
        hw4.read_captions(copy)
    write_captions(copy, "image,caption\n00000.jpg,a dog\n")
    with pytest.raises(ValueError, match=r"00000\.jpg has 1 captions, not 5"):
        hw4.read_captions(copy)


def test_missing_captions_file_in_named_folder(hw4, copy, monkeypatch):
    (copy / "captions.txt").unlink()
    monkeypatch.setenv("FLICKR8K_DIR", str(copy))
    with pytest.raises(FileNotFoundError, match="FLICKR8K_DIR=.*captions.txt: set it to the folder .* or unset it"):
        hw4.find_flickr8k()


def test_no_data_and_no_network(hw4, monkeypatch, tmp_path):
    monkeypatch.delenv("FLICKR8K_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as host:
        pass  # from here on nobody answers
    with pytest.raises(ConnectionError, match="refused.*run this again, or put Images/"):
        hw4.find_flickr8k(host.url, tmp_path / "flickr8k")


def test_download_is_unpacked_once(hw4, host, data_dir, tmp_path):
    folder, host.content = tmp_path / "flickr8k", archive_of(data_dir)
    assert hw4.find_flickr8k(host.url, folder) == folder
    assert hw4.read_captions(folder) == hw4.read_captions(data_dir)
    assert sorted(p.name for p in folder.iterdir()) == ["Images", "captions.txt"]
    assert hw4.find_flickr8k(host.url, folder) == folder
    assert host.requests == 1


def test_zip_put_there_by_hand_is_not_downloaded(hw4, host, data_dir, tmp_path):
    folder = tmp_path / "flickr8k"
    folder.mkdir()
    (folder / "flickr8k.zip").write_bytes(archive_of(data_dir))
    assert len(hw4.read_captions(hw4.find_flickr8k(host.url, folder))) == 320
    assert host.requests == 0


def test_half_a_zip_and_a_zip_without_captions(hw4, data_dir, tmp_path):
    archive, folder = tmp_path / "flickr8k.zip", tmp_path / "flickr8k"
    folder.mkdir()
    content = archive_of(data_dir)
    archive.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"flickr8k\.zip is no whole zip file.*delete it and run again"):
        hw4.extract_flickr8k(archive, folder)
    archive.write_bytes(archive_of(data_dir, leave_out=("captions.txt",)))
    with pytest.raises(ValueError, match=r"flickr8k\.zip lacks Images/ or captions\.txt"):
        hw4.extract_flickr8k(archive, folder)
    archive.write_bytes(content)  # the staging folder of the failed attempt must not get in the way
    hw4.extract_flickr8k(archive, folder)
    assert len(hw4.read_captions(folder)) == 320
