"""From files to tensors when all is well: folders, captions, pixels, equal photos, split and tokens."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from host import archive_of
from PIL import Image


@pytest.fixture
def captions(hw4, folder):
    """{photo name: five captions} of the twelve photos."""
    return dict(hw4.read_captions(folder / "captions.txt"))


def captions_in(hw4, folder, config):
    return {path.name: texts for path, texts in hw4.find_pairs(folder, config)}


def test_download_is_unpacked_once(hw4, here, host, folder, few, captions):
    host.content = archive_of(folder)
    for _ in range(2):
        hw4.fill_folder(here / "flickr8k", host.url)
        assert captions_in(hw4, here / "flickr8k", few) == captions
    assert sorted(path.name for path in (here / "flickr8k").iterdir()) == [
        "Images",
        "captions.txt",
        "flickr8k.unpacked",
    ]
    assert host.requests == 1


@pytest.mark.parametrize("name", ["flickr8k.zip", "archive.zip", "Flickr8k_Dataset.zip", "flickr8k (1).zip"])
def test_archive_of_any_name_is_unpacked_without_a_download(hw4, here, host, folder, few, captions, name):
    (here / "flickr8k").mkdir()
    (here / "flickr8k" / name).write_bytes(archive_of(folder))
    hw4.fill_folder(here / "flickr8k", host.url)
    assert captions_in(hw4, here / "flickr8k", few) == captions and host.requests == 0


def test_photos_and_captions_come_from_two_archives(hw4, here, host, folder, few, captions):
    (here / "flickr8k").mkdir()
    photos = [path.name for path in (folder / "Images").iterdir()]
    (here / "flickr8k" / "Flickr8k_Dataset.zip").write_bytes(archive_of(folder, leave_out=["captions.txt"]))
    (here / "flickr8k" / "Flickr8k_text.zip").write_bytes(archive_of(folder, leave_out=photos))
    hw4.fill_folder(here / "flickr8k", host.url)
    assert captions_in(hw4, here / "flickr8k", few) == captions and host.requests == 0


def test_interrupted_unpacking_is_done_again(hw4, here, host, folder, few, captions, monkeypatch):
    def interrupt(archive, target):
        (target / "captions.txt").write_text("image,caption\n")
        raise KeyboardInterrupt

    host.content = archive_of(folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "unpack_archive", interrupt)
        hw4.fill_folder(here / "flickr8k", host.url)
    hw4.fill_folder(here / "flickr8k", host.url)
    assert captions_in(hw4, here / "flickr8k", few) == captions and host.requests == 1


def test_unpacked_photos_are_not_downloaded(hw4, host, folder):
    hw4.fill_folder(folder, host.url)
    assert host.requests == 0


LAYOUTS = [
    ("Images", "captions.txt"),
    ("images", "captions.txt"),
    ("Images/Images", "captions.txt"),
    ("versions/1/Images", "versions/1/captions.txt"),
    ("Images", "text/captions.txt"),
    ("", "captions.txt"),
    ("Flicker8k_Dataset", "Flickr8k.token.txt"),
    ("Flickr8k_Dataset/Flicker8k_Dataset", "Flickr8k_text/Flickr8k.token.txt"),
]


@pytest.mark.parametrize(("photos", "file"), LAYOUTS)
def test_every_layout_is_read(hw4, here, folder, few, captions, photos, file):
    shutil.copytree(folder / "Images", here / "other" / photos)
    target = here / "other" / file
    target.parent.mkdir(exist_ok=True)
    if target.name == "captions.txt":
        shutil.copy(folder / "captions.txt", target)
    else:
        rows = [f"{name}#{i}\t{texts[i]}\n" for name, texts in captions.items() for i in range(5)]
        target.write_text("".join(rows))
    assert captions_in(hw4, here / "other", few) == captions


def test_a_folder_of_ones_own_is_read_and_left_as_it_is(hw4, cells, here, folder, few, monkeypatch):
    (folder / "flickr8k.zip").write_bytes(b"is left alone")
    before = sorted(here.rglob("*"))
    monkeypatch.setenv("FLICKR8K_DIR", "mine")
    (cell,) = [source for source in cells if "= load_flickr8k(" in source]
    run = vars(hw4) | {"config": few, "device": torch.device("cpu")}
    exec(cell, run)
    assert len(run["data"].captions) == 12 and sorted(here.rglob("*")) == before


@pytest.mark.parametrize("on_disk", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("in_file", [str.lower, str.upper])
def test_names_match_in_any_case(hw4, folder, few, on_disk, in_file):
    for path in list((folder / "Images").iterdir()):
        path.rename(path.with_name(on_disk(f"dog_{path.name}")))
    rows = (folder / "captions.txt").read_text().replace("\n0", "\ndog_0").splitlines()
    renamed = [in_file(name) + comma + text for name, comma, text in (row.partition(",") for row in rows[1:])]
    (folder / "captions.txt").write_text("\n".join([rows[0], *renamed]))
    pairs = hw4.find_pairs(folder, few)
    assert [path.name.lower() for path, _ in pairs] == [f"dog_{i:05d}.jpg" for i in range(12)]


CHANGES = {
    "Windows line ends": lambda text: text.replace(b"\n", b"\r\n"),
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "blank lines": lambda text: text.replace(b"\n", b"\n   \n", 3) + b"\n \n",
    "no last line end": lambda text: text.removesuffix(b"\n"),
    "no header": lambda text: text.partition(b"\n")[2],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_harmless_oddities_of_captions_change_nothing(hw4, folder, captions, change):
    path = folder / "captions.txt"
    before = path.read_bytes().replace(b"\r\n", b"\n")
    path.write_bytes(change(before))
    assert path.read_bytes() != before and hw4.read_captions(path) == captions


def test_captions_keep_commas_and_quotes(captions):
    texts = captions["00000.jpg"]
    assert len(captions) == 12 and len(texts) == 5
    assert texts[0].endswith(", seen from above .") and texts[2].startswith('The sign says "')


def test_captions_of_a_missing_photo_are_left_out(hw4, folder, few, captions):
    """As `2258277193_586949ec62.jpg.1` in the original file."""
    with open(folder / "captions.txt", "a") as file:
        file.write("00007.jpg.1,one caption\n")
    assert captions_in(hw4, folder, few) == captions


def test_data_set_holds_photos_captions_and_tokens_of_one_photo_in_one_row(hw4, folder, few, captions):
    data = hw4.load_flickr8k(folder, few, torch.device("cpu"))
    assert list(data.captions) == [captions[name] for name in sorted(captions)]
    assert torch.equal(data.images[7], hw4.load_image(folder / "Images" / "00007.jpg", 48))
    tokens, mask = hw4.encode_words(captions["00007.jpg"], data.vocabulary, few.max_tokens)
    length = tokens.shape[1]
    assert torch.equal(data.tokens[7, :, :length], tokens) and torch.equal(data.mask[7, :, :length], mask)
    assert data.mask[7].sum() == mask.sum() and data.tokens.shape == data.mask.shape


def test_of_too_many_photos_the_first_are_used(hw4, folder, few):
    data = hw4.load_flickr8k(folder, replace(few, num_images=9), torch.device("cpu"))
    whole = hw4.load_flickr8k(folder, few, torch.device("cpu"))
    assert data.captions == whole.captions[:9] and torch.equal(data.images, whole.images[:9])
    assert len(data.images) == len(data.tokens) == 9


def test_vocabulary_comes_from_training_captions(hw4, folder, few):
    data = hw4.load_flickr8k(folder, few, torch.device("cpu"))
    rows = []
    for i in range(12):
        rows += 5 * [f"{i:05d}.jpg,a {'zebra' if i in data.val_ids else 'dog'} runs\n"]
    (folder / "captions.txt").write_text("".join(rows))
    data = hw4.load_flickr8k(folder, few, torch.device("cpu"))
    word = data.vocabulary
    assert list(word) == ["<pad>", "<bos>", "<unk>", "a", "dog", "runs"]
    assert data.tokens[data.train_ids].unique(dim=1).tolist() == 6 * [[[hw4.BOS, word["a"], word["dog"], word["runs"]]]]
    assert data.tokens[data.val_ids].unique(dim=1).tolist() == 6 * [[[hw4.BOS, word["a"], hw4.UNK, word["runs"]]]]


def test_tokens_are_words_of_any_script(hw4):
    assert hw4.tokenize("A dog’s ball, isn't it? 2 DOGS!") == ["a", "dog's", "ball", "isn't", "it", "2", "dogs"]
    assert hw4.tokenize("M\u00c4DCHEN \u4e00\u53ea\u72d7 \u5728\u3002") == [
        "m\u00e4dchen",
        "\u4e00\u53ea\u72d7",
        "\u5728",
    ]
    assert hw4.tokenize(" . ?!") == []


def test_vocabulary_keeps_frequent_words_only(hw4):
    assert list(hw4.build_vocabulary(["A dog, a DOG!", "a cat"], 2)) == ["<pad>", "<bos>", "<unk>", "a", "dog"]


def test_encoding_pads_truncates_and_marks_unknown_words(hw4):
    vocabulary = hw4.build_vocabulary(["a dog runs"], min_count=1)
    a, dog, runs = (vocabulary[word] for word in ("a", "dog", "runs"))
    tokens, mask = hw4.encode_words(["a dog", "the dog runs far away", "?!"], vocabulary, 4)
    expected = [[hw4.BOS, a, dog, hw4.PAD], [hw4.BOS, hw4.UNK, dog, runs], [hw4.BOS] + 3 * [hw4.PAD]]
    assert tokens.tolist() == expected and torch.equal(mask, tokens != hw4.PAD)


NONE = torch.tensor([], dtype=torch.long)


def test_split_is_disjoint_complete_and_seeded(hw4):
    train, val = hw4.split_images(100, 20, NONE, seed=1)
    assert len(val) == 20 and sorted(train.tolist() + val.tolist()) == list(range(100))
    for ids in (train, val):  # so neighbours, such as those that share a block, are not alike by their names
        assert ids.tolist() != sorted(ids.tolist())
    assert torch.equal(val, hw4.split_images(100, 20, NONE, seed=1)[1])
    assert not torch.equal(val, hw4.split_images(100, 20, NONE, seed=2)[1])


def test_copies_are_kept_out_of_validation(hw4):
    _, drawn = hw4.split_images(100, 20, NONE, seed=1)
    train, val = hw4.split_images(100, 20, drawn[:7], seed=1)
    assert len(val) == 20 and set(drawn[7:].tolist()) < set(val.tolist())
    assert set(drawn[:7].tolist()) < set(train.tolist())
    assert sorted(train.tolist() + val.tolist()) == list(range(100))


def test_equal_photos_are_those_within_the_distance(hw4):
    """Noise of growing strength on one photo, in parts of 500 that are far apart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (600, 3, 16, 16), generator=generator, dtype=torch.uint8)
    for i, strength in {100: 0, 520: 2, 530: 7, 540: 40}.items():
        noise = torch.randint(-strength, strength + 1, (3, 16, 16), generator=generator)
        images[i] = (images[599].int() + noise).clamp(0, 255)
    pixels = images.double().flatten(1).numpy() / 255
    distances = np.sqrt(((pixels - pixels[599]) ** 2).mean(1))
    near = np.flatnonzero(distances < 0.02).tolist()
    assert near == [100, 520, 530, 599] and hw4.find_copies(images, 0.02).tolist() == near
    assert hw4.find_copies(images, 0.01).tolist() == [100, 520, 599]


def test_a_photo_saved_again_at_another_size_is_equal(hw4, data, smoke, tmp_path):
    photo = Image.fromarray(data.images[3].permute(1, 2, 0).numpy())
    photo.resize((90, 60)).save(tmp_path / "again.jpg", quality=60)
    again = hw4.load_image(tmp_path / "again.jpg", 48)
    images = torch.cat([data.images[:10], again[None]])
    assert hw4.find_copies(images, smoke.copy_distance).tolist() == [3, 10]


def test_plain_photos_of_one_colour_never_cross_the_split(hw4, folder, few):
    for i in range(0, 12, 2):
        Image.new("RGB", (40, 30 + i), "gray").save(folder / "Images" / f"{i:05d}.jpg", quality=70 + i)
    data = hw4.load_flickr8k(folder, few, torch.device("cpu"))
    assert sorted(data.train_ids.tolist()) == [0, 2, 4, 6, 8, 10]
    assert sorted(data.val_ids.tolist()) == [1, 3, 5, 7, 9, 11]


def test_plain_photos_of_distinct_colours_are_no_copies(hw4, smoke):
    levels = torch.arange(0, 256, 51, dtype=torch.uint8)
    colors = torch.cartesian_prod(levels, levels, levels)[:200]
    assert len(hw4.find_copies(colors[..., None, None].expand(-1, -1, 48, 48), smoke.copy_distance)) == 0


def half(left, right, size):
    """A photo whose left half has another colour than its right one."""
    photo = Image.new("RGB", size, right)
    photo.paste(left, (0, 0, size[0] // 2, size[1]))
    return photo


@pytest.mark.parametrize("size", [(16, 16), (50, 40), (600, 900)])
def test_whole_photo_is_squeezed_into_the_square(hw4, tmp_path, size):
    half("red", "white", size).save(tmp_path / "photo.jpg", quality=95)
    pixels = hw4.load_image(tmp_path / "photo.jpg", 16).int()
    assert pixels.shape == (3, 16, 16) and hw4.load_image(tmp_path / "photo.jpg", 16).dtype == torch.uint8
    assert (pixels[:, :, :6] - torch.tensor([254, 0, 0])[:, None, None]).abs().max() < 12 and pixels[
        :, :, 10:
    ].min() > 243


@pytest.mark.parametrize(("mode", "color"), [("L", [76] * 3), ("CMYK", [255, 0, 0])])
def test_every_kind_of_photo_becomes_rgb(hw4, tmp_path, mode, color):
    half("red", "white", (48, 48)).convert(mode).save(tmp_path / "photo.jpg")
    pixels = hw4.load_image(tmp_path / "photo.jpg", 16).int()
    assert (pixels[:, 8, 2] - torch.tensor(color)).abs().max() < 12 and pixels[:, 8, 13].min() > 243
