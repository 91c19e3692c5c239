"""Every fault of settings, files and photos ends in one message that says what to do, or in the right value."""

import re
import shutil
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from host import archive_of, serving
from PIL import Image

BY_HAND = r"put Images/ and captions\.txt \(or flickr8k\.zip\) into flickr8k/, or set FLICKR8K_DIR"


def test_a_misspelt_setting_is_refused(hw4, cells, monkeypatch):
    monkeypatch.setenv("HW4_PRESET", "typo")
    (cell,) = [source for source in cells if "PRESET = read_setting(" in source]
    with pytest.raises(ValueError, match="HW4_PRESET is 'typo': set it to one of cpu, full, smoke, or leave it out"):
        exec(cell, dict(vars(hw4)))


@pytest.mark.parametrize("text", ["1", "Yes", " TRUE ", '"true"', "'True'", "no", "0", " ", ""])
def test_fresh_gives_kept_trainings_another_name(hw4, cells, here, monkeypatch, capsys, text):
    (here / "kept").mkdir()
    (here / "kept" / "a.pt").write_bytes(b"kept")
    monkeypatch.setenv("HW4_FRESH", text)
    monkeypatch.setenv("CHECKPOINT_DIR", "kept")
    (cell,) = [source for source in cells if "FRESH = read_setting(" in source]
    exec(cell, dict(vars(hw4)))
    assert [path.name for path in (here / "kept").iterdir()] == ["a.pt" if text.strip() in ("no", "0", "") else "a.old"]
    assert str(here / "kept") in capsys.readouterr().out


def test_folders_are_read_as_they_are_meant(hw4, monkeypatch, here):
    monkeypatch.setenv("HOME", str(here / "home"))
    for text, folder in {"~/hw4": "home/hw4", ' "my data/hw4" ': "my data/hw4", f"'{here}'": "."}.items():
        monkeypatch.setenv("CHECKPOINT_DIR", text)
        assert hw4.read_folder("CHECKPOINT_DIR", "kept") == here / folder


@pytest.mark.parametrize("form", ["{}", '"{}"', "{}/hw4/deep"])
@pytest.mark.parametrize("name", ["CHECKPOINT_DIR", "FLICKR8K_DIR"])
def test_a_drive_that_is_not_mounted_is_refused(hw4, monkeypatch, here, form, name):
    monkeypatch.setenv(name, form.format("drive/MyDrive"))
    drive = here / "drive" / "MyDrive"
    with pytest.raises(FileNotFoundError, match=f"{name} means {drive}.*, but no Drive is mounted.*unset {name}"):
        hw4.read_folder(name, "kept")
    drive.mkdir(parents=True)
    assert drive in (hw4.read_folder(name, "kept") / "x").parents


def assert_refused(hw4, url, reason):
    message = rf"(?s){url} to flickr8k/flickr8k\.zip: .*{reason}.*Delete flickr8k and run again, or {BY_HAND}"
    with pytest.raises(RuntimeError, match=message):
        hw4.find_flickr8k(url)


def test_no_network(hw4, here, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as host:
        pass  # from here on nobody answers
    assert_refused(hw4, host.url, "refused")


KINDS = {"cut": "", "cut, chunked": "", "404": "404", "503": "503", "page": "not a zip file", "Images/00200.jpg": ""}
KINDS |= {"captions.txt": "", "encrypted": "encrypted", "compression": "method is not supported"}


@pytest.mark.parametrize("kind", KINDS)
def test_bad_download_is_refused_and_can_be_repeated(hw4, here, host, data_dir, captions, kind):
    """Where `kind` names a file, a byte of it is damaged: what was unpacked before must not pass for the whole."""
    whole, host.content = archive_of(data_dir), bytearray(archive_of(data_dir))
    if "cut" in kind:
        host.sent, host.chunked = len(whole) // 2, "chunked" in kind
    elif kind.isdigit() or kind == "page":
        host.status, host.content = int(kind) if kind.isdigit() else 200, b"<html>quota exceeded</html>"
    elif "." in kind:
        host.content[whole.index(kind.encode()) + len(kind) + 200] ^= 255
    else:  # a field of both headers of every file, two bytes further in the second
        for header in re.finditer(rb"PK(\x01\x02|\x03\x04)", whole):
            place, value = (6, 1) if kind == "encrypted" else (8, 9)
            host.content[header.start() + place + 2 * (header[1] == b"\1\2")] = value
    assert_refused(hw4, host.url, KINDS[kind])
    shutil.rmtree("flickr8k")  # as the message says
    host.status, host.content, host.sent, host.chunked = 200, whole, None, False
    photos, file = hw4.find_flickr8k(host.url)
    assert hw4.read_captions(file, photos) == captions


@pytest.mark.parametrize("climb", ["../outside.txt", "Images/../../outside.txt", "{root}/outside.txt"])
def test_zip_that_climbs_out_writes_nothing_there(hw4, here, host, data_dir, captions, climb):
    (here / "work").mkdir()
    hw4.os.chdir("work")
    host.content = archive_of(data_dir, extra=[(climb.format(root=here), "gotcha")])
    photos, file = hw4.find_flickr8k(host.url)
    assert hw4.read_captions(file, photos) == captions
    assert not [path for path in here.rglob("outside.txt") if here / "work" / "flickr8k" not in path.parents]


def test_folder_without_captions(hw4, here, host, data_dir, monkeypatch):
    (here / "Images").symlink_to(data_dir / "Images")
    monkeypatch.setenv("FLICKR8K_DIR", str(here))
    with pytest.raises(FileNotFoundError, match=f"{here} has no photos or no captions: {BY_HAND}"):
        hw4.find_flickr8k(host.url)
    host.content = archive_of(data_dir, leave_out=("captions.txt",))
    monkeypatch.delenv("FLICKR8K_DIR")
    with pytest.raises(FileNotFoundError, match=f"flickr8k has no photos or no captions: {BY_HAND}"):
        hw4.find_flickr8k(host.url)


def assert_mend(hw4, data_dir, path, content, message):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"(?s){path}.*{message}.*: mend .*or {BY_HAND}"):
        hw4.read_captions(path, data_dir / "Images")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('00000.jpg,"A red circle', r"line 4 \(.*end of data"),  # a stray quote that would swallow the next rows
        ('00000.jpg,"A red" circle', r"line 4 \(.*expected after"),
        ("00000.jpg,A red\ncircle", r"line 5 \(not enough values"),
        ('00000.jpg,"A red circle,\nseen from above ."', r"line 4 \(.*end of data"),
        ("00000.jpg,A red circle, seen from above .", r"line 4 \(too many values"),
        ("00000.jpg", r"line 4 \(not enough values"),
        ("00000.jpg, ", r"00000\.jpg does not have five captions"),
        ("00001.jpg,A red circle", r"00000\.jpg does not have five captions"),
    ],
)
def test_bad_line_is_named(hw4, data_dir, tmp_path, line, message):
    lines = (data_dir / "captions.txt").read_text().splitlines()
    lines[3] = line
    assert_mend(hw4, data_dir, tmp_path / "captions.txt", "\n".join(lines).encode(), message)


@pytest.mark.parametrize(
    ("old", "new", "encoding", "message"),
    [
        ("A red", "À red", "cp1252", "codec can't decode"),
        ("", "", "utf-16", "codec can't decode"),
        ("image,caption", "image_name| comment_number| comment", "utf-8", r"line 1 \(not enough values"),  # Flickr30k
    ],
)
def test_bad_caption_file_is_named(hw4, data_dir, tmp_path, old, new, encoding, message):
    content = (data_dir / "captions.txt").read_text().replace(old, new).encode(encoding)
    assert_mend(hw4, data_dir, tmp_path / "captions.txt", content, message)


def test_captions_without_the_first_line(hw4, data_dir, captions, tmp_path):
    (tmp_path / "captions.txt").write_text((data_dir / "captions.txt").read_text().partition("\n")[2])
    assert hw4.read_captions(tmp_path / "captions.txt", data_dir / "Images") == captions


def test_rows_of_a_missing_photo_are_reported_and_skipped(hw4, data_dir, captions, tmp_path, capsys):
    """As `2258277193_586949ec62.jpg.1` in the original file."""
    text, path = (data_dir / "captions.txt").read_text(), tmp_path / "captions.txt"
    path.write_text(text + "".join(f"00007.jpg.1,caption {i}\n" for i in range(5)))
    assert hw4.read_captions(path, data_dir / "Images") == captions
    assert "1 photos named in captions.txt are missing and are skipped: 00007.jpg.1" in capsys.readouterr().out


def test_number_of_photos_is_checked(hw4, cells, data_dir, monkeypatch):
    monkeypatch.setenv("FLICKR8K_DIR", str(data_dir))
    (cell,) = [source for source in cells if "= find_flickr8k(" in source]
    with pytest.raises(ValueError, match=f"found 320 photos, expected 8,091: {BY_HAND}.*, or set num_images=None"):
        exec(cell, vars(hw4) | {"config": hw4.PRESETS["cpu"]})
    exec(cell, vars(hw4) | {"config": hw4.PRESETS["smoke"]})


def half(left, right, size=(48, 48)):
    """A photo whose left half has another colour than its right one."""
    photo = Image.new("RGBA", size, right)
    photo.paste(left, (0, 0, size[0] // 2, size[1]))
    return photo


@pytest.mark.parametrize("mode, suffix", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png")])
def test_every_kind_of_photo_becomes_rgb(hw4, tmp_path, mode, suffix):
    """Kinds without colour keep the brightness."""
    photo = half("red", "white").convert("RGB").convert(mode, dither=Image.Dither.NONE)
    photo.save(tmp_path / f"photo.{suffix}")
    pixels = hw4.load_image(tmp_path / f"photo.{suffix}", 16).int()
    left = torch.tensor({"L": [76] * 3, "1": [0] * 3}.get(mode, [255, 0, 0]))
    assert (pixels[:, 8, 2] - left).abs().max() < 12 and pixels[:, 8, 13].min() > 243


def test_turned_photo_is_set_upright(hw4, tmp_path):
    """Orientation 6 means: turn by 90 degrees clockwise, which takes the left half to the top."""
    exif = Image.Exif()
    exif[0x0112] = 6
    half("red", "white", (400, 200)).convert("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = hw4.load_image(tmp_path / "turned.jpg", 16).int()
    assert (pixels[1:, :7] < 12).all() and (pixels[1:, 9:] > 243).all()


def test_sixteen_bits_of_grey_are_scaled(hw4, tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / "grey.png")
    pixels = hw4.load_image(tmp_path / "grey.png", 64).int()
    assert (pixels - torch.from_numpy(ramp // 256).int()).abs().max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(hw4, tmp_path, mode):
    half((0, 0, 0, 255), (0, 0, 0, 0)).convert(mode).save(tmp_path / "logo.png")
    pixels = hw4.load_image(tmp_path / "logo.png", 16)
    assert pixels[:, 8, 2].max() < 12 and pixels[:, 8, 13].min() > 243


@pytest.mark.parametrize("kept", [None, 0, 300, 10**6])
def test_photo_that_cannot_be_decoded_is_named(hw4, data_dir, tmp_path, monkeypatch, kept):
    """It is missing, empty, cut short, or whole but larger than the decoder dares."""
    path = tmp_path / "bad.jpg"
    if kept is not None:
        path.write_bytes((data_dir / "Images" / "00000.jpg").read_bytes()[:kept])
    reason = {None: "FileNotFound", 0: "UnidentifiedImage", 300: "Truncated", 10**6: "DecompressionBomb"}[kept]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000 if kept == 10**6 else None)
    with pytest.raises(OSError, match=rf"{path} cannot be decoded \(.*{reason}.*\): delete it and unpack Flickr8k ag"):
        hw4.load_image(path, 16)


# Captions are text, not markup

CASH = ["Ca$$h for $5 and $6_a^", r"\frac{$ \alpha$", "$x$", "100 % of #tags & <b>"]


@pytest.fixture
def drawn(hw4, captions, data, data_dir, monkeypatch):
    """drawn(): what stands in the figure just shown. The drawing functions find captions with markup."""
    texts = [f"{CASH[i % 4]} {i}" for i in range(200)]
    places = {"photo_dir": data_dir / "Images", "names": list(captions), "val_texts": texts}
    for name, value in (places | {"val_ids": data[2], "images": data[0].images}).items():
        monkeypatch.setattr(hw4, name, value, raising=False)
    monkeypatch.setattr(plt, "show", lambda: None)

    def read():
        plt.gcf().canvas.draw()
        return [text.get_text() for text in plt.gcf().findobj(plt.Text)]

    yield read
    plt.close("all")


def test_show_photos_draws_captions_as_they_stand(hw4, drawn):
    photos = [torch.rand(4, 3, 8, 8), torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)]
    hw4.show_photos(photos, [CASH, ["", "two\nlines", "", ""]], [CASH[0][:20], ""], "heading")
    assert {*CASH, CASH[0][:20], "two\nlines", "heading"} <= set(drawn())


def test_show_selections_draws_captions_and_choices(hw4, drawn):
    candidates, similarity = hw4.draw_candidates(40, 0)[:, :5], torch.zeros(40, 200)
    similarity[3, candidates[3, 0]], similarity[9, candidates[9, 2]] = 0.5, 0.25
    hw4.show_selections({"scratch": [SimpleNamespace(similarity=similarity)]}, [3, 9], candidates)
    found = drawn()
    assert {hw4.val_texts[i] for i in candidates[[3, 9]].flatten().tolist()} <= set(found)
    assert [found.count(text) for text in ("+0.50 ✓", "+0.25 ✗", "+0.00 ", "scratch")] == [1, 1, 8, 2]


def test_show_rankings_draws_the_sentence_the_best_five_and_the_true_one(hw4, drawn):
    hw4.show_rankings(torch.linspace(1, 0, 40)[:, None].roll(7, 0), CASH[:1], "heading", [12])
    assert {*CASH[:1], "heading", "1.00", "0.97", "0.95", "0.92", "0.90", "true: 0.87, rank 6"} <= set(drawn())
