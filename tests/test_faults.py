"""Every fault of settings, files and photos ends in one message that says what to do, or in the right value."""

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from host import archive_of, serving
from PIL import Image

pytestmark = pytest.mark.filterwarnings("error")
BY_HAND = r"or put Images/ and captions\.txt into flickr8k/, or set FLICKR8K_DIR"
FAILED = r"{} could not be fetched or unpacked \(.*{}.*\): delete a damaged archive, run this again, " + BY_HAND


# Settings


@pytest.mark.parametrize("part", ["contrastive", "simclr"])
@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 0},
        {"validate_every": 0},
        {"batch_size": 0},
        {"batch_size": 1},
        {"block_size": 1},
        {"batch_size": 3, "block_size": 2},
    ],
    ids=str,
)
def test_recipe_that_cannot_train_is_refused_and_shown(hw4, part, settings):
    recipe = getattr(hw4.PRESETS["cpu"], part)
    needed = (
        r"a contrast needs at least 2 photos, and blocks \(Protocol.block_sizes\) have to fill the batch, not as in"
    )
    with pytest.raises(ValueError, match=f"^epochs and validate_every must be at least 1, {needed}") as error:
        replace(recipe, **settings)
    for name, value in settings.items():
        assert re.search(rf"\b{name}={value}\b", str(error.value))


@pytest.mark.parametrize("number", [0, 6])
def test_captions_that_a_photo_does_not_have_are_refused(hw4, number):
    with pytest.raises(ValueError, match=f"captions_per_image is {number}: a photo has 1 to 5"):
        hw4.Config(captions_per_image=number)


def test_no_seed_is_refused(hw4):
    with pytest.raises(ValueError, match="^epochs, draws and seeds must be at least 1, .*num_seeds=0,"):
        hw4.Config(protocol=hw4.Protocol(num_seeds=0))


@pytest.mark.parametrize(
    ("name", "value"),
    [("control_epochs", 0), ("comparison_epochs", 0), ("block_epochs", (0, 1)), ("block_epochs", (1, 0))],
)
def test_experiments_without_epochs_are_refused(hw4, name, value):
    said = re.escape(f"{name}={value},")
    with pytest.raises(ValueError, match=f"^epochs, draws and seeds must be at least 1, .*{said}"):
        hw4.Config(protocol=hw4.Protocol(**{name: value}))


def test_blocks_of_the_experiments_must_fill_a_batch(hw4):
    batch = hw4.Config.contrastive.batch_size
    with pytest.raises(ValueError, match=f"fill the batch.*batch_size={batch}, block_size={batch - 1},"):
        hw4.Config(protocol=hw4.Protocol(block_sizes=(2, batch - 1)))


@pytest.mark.parametrize(("candidates", "smallest"), [((3, 25), 6), ((26,), 6), ((27,), 7), ((3,), 2)])
def test_caption_selection_has_enough_captions_of_other_photos(hw4, candidates, smallest):
    protocol = hw4.Protocol(candidates=candidates)
    with pytest.raises(ValueError, match=f"num_val is {smallest - 1}: .*at least {smallest} photos"):
        hw4.Config(protocol=protocol, num_val=smallest - 1)
    config = hw4.Config(protocol=protocol, num_val=smallest)
    perfect = hw4.caption_match(config.num_val).float()
    assert hw4.selection_accuracy(perfect, protocol).min() > 0.999


def test_fewest_photos_of_a_selection_can_be_trained(hw4, data, smoke, tmp_path):
    protocol = replace(smoke.protocol, candidates=(3,))
    config = replace(smoke, protocol=protocol, num_val=2, checkpoint_dir=tmp_path)
    task = hw4.ContrastiveTask(hw4.DualEncoder(len(data.vocabulary), config), data, config, config.contrastive)
    assert hw4.checkpoint_path("name", task, data.train_ids, 0).parent == tmp_path


@pytest.mark.parametrize(("num_val", "copies"), [(94, 7), (100, 0)])
def test_more_validation_photos_than_there_are_is_refused(hw4, num_val, copies):
    assert len(hw4.split_images(100, num_val - 1, torch.arange(copies))[1]) == num_val - 1
    with pytest.raises(ValueError, match=f"num_val is {num_val}: too many for 100 photos.* {copies} "):
        hw4.split_images(100, num_val, torch.arange(copies))


@pytest.mark.parametrize("part", ["contrastive", "simclr"])
def test_a_batch_larger_than_a_quarter_of_the_photos_is_told_by_the_plan(hw4, data, smoke, part):
    few = replace(data, train_ids=data.train_ids[:35])
    recipes = {name: replace(getattr(smoke, name), batch_size=4) for name in ("contrastive", "simclr")}
    hw4.show_plan(few, replace(smoke, **recipes | {part: replace(recipes[part], batch_size=8)}))
    with pytest.raises(ValueError, match="batch_size must be at most 8, a quarter of num_images - num_val"):
        hw4.show_plan(few, replace(smoke, **recipes | {part: replace(recipes[part], batch_size=12)}))


# Folders


def test_folders_are_read_as_they_are_meant(hw4, monkeypatch, here):
    monkeypatch.setenv("HOME", str(here / "home"))
    for text, folder in {"~/hw4": here / "home" / "hw4", "": Path("kept"), "my data": Path("my data")}.items():
        monkeypatch.setenv("CHECKPOINT_DIR", text)
        assert hw4.read_folder("CHECKPOINT_DIR", "kept") == folder


@pytest.mark.parametrize("folder", ["taken", "taken/deeper", "/proc/hw4"])
def test_the_cell_that_names_the_folder_for_trainings_tries_it(hw4, cells, here, monkeypatch, capsys, folder):
    (here / "taken").write_text("a file")
    monkeypatch.setenv("CHECKPOINT_DIR", folder)
    (cell,) = [source for source in cells if "\nshow_plan(data, config)" in source]
    with pytest.raises(OSError, match=f"{folder} cannot be written: set CHECKPOINT_DIR"):
        exec(cell, vars(hw4) | {"config": SimpleNamespace(checkpoint_dir=hw4.read_folder("CHECKPOINT_DIR", ""))})
    assert capsys.readouterr().out == ""


# Downloads and archives


def test_no_network(hw4, here, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as host:
        pass  # from here on nobody answers
    with pytest.raises(RuntimeError, match=FAILED.format(host.url, "refused")):
        hw4.fill_folder(here / "flickr8k", host.url)


def test_a_file_in_place_of_the_folder(hw4, here, host):
    (here / "flickr8k").write_text("a file")
    with pytest.raises(RuntimeError, match=FAILED.format(host.url, "exists")):
        hw4.fill_folder(here / "flickr8k", host.url)


def damage(content, kind):
    """Archive `content` with a fault of this kind: where that names a file, with a byte of it changed."""
    content = bytearray(content)
    if kind == "page":
        return b"<html>quota exceeded</html>"
    if kind == "cut":
        return content[: len(content) // 2]
    if "." in kind:
        content[content.index(kind.encode()) + len(kind) + 200] ^= 255
        return content

    # a field of both headers of every file, two bytes further in the second
    place, value = {"encrypted": (6, 1), "deflate64": (8, 9), "zstd": (8, 93)}[kind]
    for header in re.finditer(rb"PK(\x01\x02|\x03\x04)", bytes(content)):
        content[header.start() + place + 2 * (header[1] == b"\1\2")] = value
    return content


KINDS = {
    "page": "not a zip file",
    "cut": "not a zip file",
    "Images/00007.jpg": "",
    "captions.txt": "",
    "encrypted": "encrypted",
    "deflate64": "not supported",
    "zstd": "not supported",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["flickr8k.zip", "my photos.zip"])
def test_archive_that_cannot_be_unpacked_is_named_and_kept(hw4, here, host, folder, kind, name):
    archive = here / "flickr8k" / name
    archive.parent.mkdir()
    archive.write_bytes(damage(archive_of(folder), kind))
    before = archive.read_bytes()
    with pytest.raises(RuntimeError, match=FAILED.format(archive, KINDS[kind])) as error:
        hw4.fill_folder(here / "flickr8k", host.url)
    assert host.url not in str(error.value) and archive.read_bytes() == before and host.requests == 0


@pytest.mark.parametrize("kind", ["404", "503", "page", "broken off", "broken off, chunked", "Images/00007.jpg"])
def test_bad_download_does_not_pass_for_the_whole_and_can_be_repeated(hw4, here, host, folder, few, kind):
    target, whole, reason = here / "flickr8k", archive_of(folder), kind if kind.isdigit() else ""
    host.content, host.chunked = whole, "chunked" in kind
    if kind.isdigit():
        host.status = int(kind)
    elif "broken" in kind:
        host.sent = len(whole) // 2
    else:
        host.content = damage(whole, kind)
    with pytest.raises(RuntimeError, match=FAILED.format(f"({host.url}|{target}/flickr8k.zip)", reason)):
        hw4.fill_folder(target, host.url)
    with pytest.raises(FileNotFoundError):
        hw4.find_pairs(target, few)

    (target / "flickr8k.zip").unlink(missing_ok=True)
    host.status, host.content, host.sent, host.chunked = 200, whole, None, False
    hw4.fill_folder(target, host.url)
    for path, _ in hw4.find_pairs(target, few):
        assert path.read_bytes() == (folder / "Images" / path.name).read_bytes()


@pytest.mark.parametrize("climb", ["../outside.txt", "Images/../../outside.txt", "{root}/outside.txt"])
def test_archive_that_climbs_out_writes_nothing_there(hw4, here, host, folder, few, climb):
    target = here / "work" / "flickr8k"
    target.parent.mkdir()
    host.content = archive_of(folder, extra=[(climb.format(root=here), "gotcha")])
    hw4.fill_folder(target, host.url)
    assert len(hw4.find_pairs(target, few)) == 12
    assert not [path for path in here.rglob("outside.txt") if target not in path.parents]


# Photos and captions that do not meet


def rename_photos(folder):
    for path in list((folder / "Images").iterdir()):
        path.rename(path.with_name(f"photo{path.name}"))


MISSES = {
    "no folder": (shutil.rmtree, (0, 0, 0)),
    "no photos": (lambda folder: shutil.rmtree(folder / "Images"), (0, 12, 0)),
    "no captions": (lambda folder: (folder / "captions.txt").unlink(), (12, 0, 0)),
    "empty captions": (lambda folder: (folder / "captions.txt").write_text(""), (12, 0, 0)),
    "only a header": (lambda folder: (folder / "captions.txt").write_text("image,caption\n"), (12, 0, 0)),
    "other names": (rename_photos, (12, 12, 0)),
    "one photo too few": (lambda folder: (folder / "Images" / "00007.jpg").unlink(), (11, 12, 11)),
    "seven folders down": (
        lambda folder: shutil.move(folder / "Images", folder / "a" / "b" / "c" / "d" / "e" / "f" / "Images"),
        (0, 12, 0),
    ),
}


@pytest.mark.parametrize("miss", MISSES)
def test_too_few_usable_photos_end_in_one_message_with_all_counts(hw4, here, folder, few, monkeypatch, miss):
    """It says which folder was looked in, however that was typed."""
    spoil, counts = MISSES[miss]
    spoil(folder)
    monkeypatch.setenv("FLICKR8K_DIR", "mine")
    found = r"{} photos\D+{}\D+{}\D+12 are needed \(captions: .*\)".format(*counts)
    with pytest.raises(
        FileNotFoundError, match=rf"^{here / 'mine'} \(exists: {miss != 'no folder'}\) has {found}: {BY_HAND[3:]}"
    ):
        hw4.load_flickr8k(hw4.read_folder("FLICKR8K_DIR", "flickr8k"), few, torch.device("cpu"))


def assert_mend(hw4, folder, few, content, message):
    path = folder / "captions.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){path}.*{message}.*: mend .*{BY_HAND}"):
        hw4.find_pairs(folder, few)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('00000.jpg,"A red circle', r"line 4 \(.*end of data"),  # a stray quote that would swallow the next rows
        ('00000.jpg,"A red" circle', r"line 4 \(.*expected after"),
        ("00000.jpg,A red\ncircle", r"line 5 \(not enough values"),
        ('00000.jpg,"A red circle,\nseen from above ."', r"line 4 \(.*end of data"),
        ("00000.jpg,A red circle, seen from above .", r"line 4 \(too many values"),
        ("00000.jpg", r"line 4 \(not enough values"),
        ("00000.jpg, ", r"00000\.jpg .*five captions"),
        ("00001.jpg,A red circle", r"00000\.jpg .*five captions"),
    ],
)
def test_bad_line_is_named(hw4, folder, few, line, message):
    lines = (folder / "captions.txt").read_text().splitlines()
    lines[3] = line
    assert_mend(hw4, folder, few, "\n".join(lines).encode(), message)


@pytest.mark.parametrize(
    ("old", "new", "encoding", "message"),
    [
        ("A ", "À ", "cp1252", "line 2 .*codec can't decode"),
        ("", "", "utf-16", "line 1 .*codec can't decode"),
        ("image,caption", "image_name| comment_number| comment", "utf-8", r"line 1 \(not enough values"),  # Flickr30k
    ],
)
def test_bad_caption_file_is_named(hw4, folder, few, old, new, encoding, message):
    content = (folder / "captions.txt").read_text().replace(old, new).encode(encoding)
    assert_mend(hw4, folder, few, content, message)


def test_captions_without_any_frequent_word_are_refused(hw4):
    with pytest.raises(ValueError, match="no word occurs 3 times.* captions"):
        hw4.build_vocabulary(["?", "!", "a dog"], 3)


@pytest.mark.parametrize("kind", ["missing", "empty", "cut", "too large"])
def test_photo_that_cannot_be_decoded_is_named(hw4, folder, monkeypatch, kind):
    path = folder / "Images" / "00007.jpg"
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:300]}.get(kind, content))
    if kind == "missing":
        path.unlink()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if kind == "too large" else None)
    reasons = {"missing": "NotFound", "empty": "Unidentified", "cut": "Truncated", "too large": "DecompressionBomb"}
    with pytest.raises(OSError, match=rf"{path} cannot be decoded \(.*{reasons[kind]}.*\): replace it by a whole copy"):
        hw4.load_image(path, 16)


# Captions are text, not markup


def test_captions_are_drawn_as_they_stand(hw4, monkeypatch, capsys):
    captions = ["Ca$$h for $5 and $6_a^", r"\frac{$ \alpha$", "$x$", "100 % of #tags & <b>", "two\nlines"]
    photos = [torch.rand(5, 3, 8, 8), torch.randint(256, (5, 3, 8, 8), dtype=torch.uint8)]
    monkeypatch.setattr(plt, "show", lambda: None)
    texts = [[caption, "another"] for caption in captions]
    hw4.show_photos([*photos[0], *photos[1]], texts + [[""]] * 5, "heading")
    plt.gcf().canvas.draw()
    drawn = {text.get_text() for text in plt.gcf().findobj(plt.Text)}
    plt.close("all")
    assert {f"{caption}\nanother".replace("two\nlines", "two lines") for caption in captions} <= drawn
    assert capsys.readouterr().out == "heading\n"


def test_the_last_cell_ends_well_where_the_results_cannot_be_written(cells, smoke, tmp_path, capsys):
    (last,) = (cell for cell in cells if "results.json" in cell)
    scores = {"image → text": torch.tensor([[0.0, 1.0], [1.0, 1.0]])}
    folder = tmp_path / "checkpoints"
    variables = {"results": {"a": [SimpleNamespace(scores=scores)]}, "started": time.perf_counter(), "time": time}
    variables |= {"json": json, "config": SimpleNamespace(checkpoint_dir=folder)}
    exec(last, variables)
    assert json.loads((folder / "results.json").read_text()) == {"a": [{"image → text": [0.5, 1.0]}]}
    assert f"the scores are in {folder / 'results.json'}" in capsys.readouterr().out
    (folder / "results.json").unlink()
    folder.rmdir()
    folder.touch()  # a file took the place of the folder
    exec(last, variables)
    assert f"the scores could not be written to {folder / 'results.json'} (" in capsys.readouterr().out
