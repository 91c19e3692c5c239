"""Every fault ends in a message that says what to do, and costs nothing that was already there."""

import math
import os
import resource
import signal
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from host import archive_of
from PIL import Image

# Download


@pytest.mark.parametrize("chunked", [False, True])
def test_cut_download_can_be_repeated(hw4, host, data_dir, tmp_path, chunked):
    folder = tmp_path / "flickr8k"
    host.content, host.chunked = archive_of(data_dir), chunked
    host.sent = len(host.content) // 2
    with pytest.raises(ConnectionError, match="run this again, or put Images/"):
        hw4.find_flickr8k(host.url, folder)
    assert not hw4.has_flickr8k(folder) and not (folder / "flickr8k.zip").exists()
    host.sent, host.chunked = None, False
    assert len(hw4.read_captions(hw4.find_flickr8k(host.url, folder))) == 320
    assert sorted(p.name for p in folder.iterdir()) == ["Images", "captions.txt"]
    assert host.requests == 2


@pytest.mark.parametrize("status", [404, 503])
def test_error_status(hw4, host, tmp_path, status):
    host.status, host.content = status, b"no"
    with pytest.raises(ConnectionError, match=f"flickr8k.zip .*{status}.*run this again, or put Images/"):
        hw4.find_flickr8k(host.url, tmp_path / "flickr8k")
    assert not list((tmp_path / "flickr8k").iterdir())


def test_error_page_in_place_of_the_zip(hw4, host, data_dir, tmp_path):
    folder = tmp_path / "flickr8k"
    host.content = b"<html>quota exceeded</html>"
    with pytest.raises(ConnectionError, match=r"sent 27 bytes that are no whole zip file.*: run this again, or put"):
        hw4.find_flickr8k(host.url, folder)
    assert not (folder / "flickr8k.zip").exists()
    host.content = archive_of(data_dir)
    assert len(hw4.read_captions(hw4.find_flickr8k(host.url, folder))) == 320


@pytest.mark.parametrize("climb", ["../outside.txt", "Images/../../outside.txt", "{root}/outside.txt"])
def test_zip_that_climbs_out_writes_nothing(hw4, data_dir, tmp_path, climb):
    folder, archive = tmp_path / "flickr8k", tmp_path / "flickr8k.zip"
    folder.mkdir()
    archive.write_bytes(archive_of(data_dir, extra=[(climb.format(root=tmp_path), "gotcha")]))
    with pytest.raises(ValueError, match=r"flickr8k\.zip would write outside its folder .*delete it, and put"):
        hw4.extract_flickr8k(archive, folder)
    assert not list(tmp_path.rglob("outside.txt"))
    assert not hw4.has_flickr8k(folder)


def test_zip_with_a_damaged_byte(hw4, data_dir, tmp_path):
    """Wherever in the compressed captions the byte is, and whatever the unpacker then says."""
    folder, archive = tmp_path / "flickr8k", tmp_path / "flickr8k.zip"
    folder.mkdir()
    whole = archive_of(data_dir, leave_out={path.name for path in (data_dir / "Images").iterdir()})
    start = 30 + len("captions.txt")  # of the compressed bytes
    for position in range(start, start + 300, 15):
        damaged = bytearray(whole)
        damaged[position] ^= 255
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"flickr8k\.zip is no whole zip file.*delete it and run again"):
            hw4.extract_flickr8k(archive, folder)
        assert not hw4.has_flickr8k(folder)


# Photos


@pytest.mark.parametrize("size", [0, 300])
def test_photo_that_ends_too_early_is_named(hw4, data_dir, tmp_path, size):
    path = tmp_path / "cut.jpg"
    path.write_bytes((data_dir / "Images" / "00000.jpg").read_bytes()[:size])
    with pytest.raises(OSError, match=r"cut\.jpg cannot be decoded .*: delete it and unpack Flickr8k again"):
        hw4.load_image(path, 16)


@pytest.mark.parametrize("mode, suffix", [("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("1", "png")])
def test_every_kind_of_photo_becomes_rgb(hw4, tmp_path, mode, suffix):
    """The left half is red and the right half white; kinds without colour keep the brightness."""
    photo = Image.new("RGB", (48, 48), "white")
    photo.paste("red", (0, 0, 24, 48))
    photo.convert(mode, dither=Image.Dither.NONE).save(tmp_path / f"photo.{suffix}")
    pixels = hw4.load_image(tmp_path / f"photo.{suffix}", 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == np.uint8
    left = {"L": (76, 76, 76), "1": (0, 0, 0)}.get(mode, (255, 0, 0))
    assert np.abs(pixels[:, 8, 2].astype(int) - left).max() < 12
    assert pixels[:, 8, 13].min() > 243


@pytest.mark.parametrize("kept", [0, 20, 1000])
def test_damaged_cache_is_rebuilt(hw4, data_dir, tmp_path, capsys, kept):
    names = ["00000.jpg", "00001.jpg"]
    whole = hw4.load_images(data_dir, names, 16, tmp_path).clone()
    (cache,) = tmp_path.iterdir()
    content = cache.read_bytes()
    cache.write_bytes(content[:kept])
    assert torch.equal(hw4.load_images(data_dir, names, 16, tmp_path), whole)
    assert f"{cache.name} is damaged" in capsys.readouterr().out
    assert cache.read_bytes() == content


# Captions


@pytest.fixture
def captions_file(data_dir, tmp_path):
    """A private captions.txt beside the photos of the synthetic data set."""
    (tmp_path / "Images").symlink_to(data_dir / "Images")
    path = tmp_path / "captions.txt"
    path.write_bytes((data_dir / "captions.txt").read_bytes().replace(b"\r\n", b"\n"))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text.replace(b"\n", b"\n\n", 3),
        lambda text: text.replace(b"\n", b"\n   \n", 3),
        lambda text: text + b"\n \n",
        lambda text: text.removesuffix(b"\n"),
        lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n \r\n"),
    ],
    ids=["Windows line ends", "byte order mark", "blank lines", "spaces", "blank end", "no last line end", "all"],
)
def test_harmless_oddities_of_captions_change_nothing(hw4, captions_file, data_dir, change):
    before = captions_file.read_bytes()
    captions_file.write_bytes(change(before))
    assert captions_file.read_bytes() != before
    assert hw4.read_captions(captions_file.parent) == hw4.read_captions(data_dir)


@pytest.mark.parametrize("row", ["00000.jpg,", "00000.jpg", "00000.jpg,  "])
def test_row_without_caption_is_named(hw4, captions_file, row):
    lines = captions_file.read_text().splitlines()
    lines[3] = row
    captions_file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"captions\.txt, line 4: 00000\.jpg has no caption: mend the line"):
        hw4.read_captions(captions_file.parent)


def test_unquoted_comma_is_named(hw4, captions_file):
    lines = captions_file.read_text().splitlines()
    lines[3] = "00000.jpg,A red circle, seen from above ."
    captions_file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"captions\.txt, line 4: 00000\.jpg has an unquoted comma: mend the line"):
        hw4.read_captions(captions_file.parent)


def test_repeated_row_is_named(hw4, captions_file):
    lines = captions_file.read_text().splitlines()
    captions_file.write_text("\n".join([*lines, lines[7]]))
    with pytest.raises(ValueError, match=r"00001\.jpg has 6 captions, some of them repeated, not 5: mend"):
        hw4.read_captions(captions_file.parent)


# Full disk


@contextmanager
def full_disk(room):
    """No file may grow beyond `room` bytes: writing more fails as on a full disk, in the system call itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


REMEDY = "free some space or set CHECKPOINT_DIR; the run goes on without it"


@pytest.mark.parametrize("room", [0, 10_000])
def test_full_disk_costs_only_the_cache_of_photos(hw4, data_dir, tmp_path, capsys, room):
    names = [f"{i:05d}.jpg" for i in range(32)]
    hw4.load_images(data_dir, names, 16, tmp_path)
    (older,) = tmp_path.iterdir()
    expected, content = hw4.load_images(data_dir, names, 40, tmp_path / "roomy"), older.read_bytes()
    with full_disk(room):
        assert torch.equal(hw4.load_images(data_dir, names, 40, tmp_path), expected)
    out = capsys.readouterr().out
    assert "images-" in out and REMEDY in out
    assert [p for p in tmp_path.iterdir() if p.is_file()] == [older] and older.read_bytes() == content


@pytest.fixture
def linear(hw4, runtime):
    """train(checkpoint) of a linear model for 2 epochs of 4 steps; before_step(n) is called before the n-th."""

    def make(before_step=lambda n: None, spoil=lambda n: 1.0, epochs=2):
        def train(checkpoint):
            torch.manual_seed(0)
            model, steps = torch.nn.Linear(64, 64), []

            def embed(model, batch, patch_keep):
                steps.append(1)
                before_step(len(steps))
                return (model(torch.randn(len(batch), 64)) * spoil(len(steps)),)

            recipe = replace(hw4.PRESETS["smoke"].contrastive, epochs=epochs, batch_size=4)
            loss = lambda x: x.square().mean()  # noqa: E731
            return model, hw4.fit(model, embed, loss, torch.arange(16), recipe, runtime, 0, checkpoint=checkpoint)

        return train

    return make


@pytest.fixture
def always_due(hw4, monkeypatch):
    """Save a state after every step."""
    monkeypatch.setattr(hw4, "SAVE_INTERVAL", 0)


def test_full_disk_does_not_stop_a_training(hw4, linear, always_due, tmp_path, capsys):
    """The disk fills up after 3 of 8 steps; what was saved by then stays, and is gone on from later."""

    def stop(n):
        if n == 3:
            os.kill(os.getpid(), signal.SIGINT)

    expected = hw4.run_stage("demo", "k" * 64, linear(), tmp_path / "roomy")
    folder = tmp_path / "full"
    with pytest.raises(KeyboardInterrupt):
        hw4.run_stage("demo", "k" * 64, linear(stop), folder)
    capsys.readouterr()
    with full_disk(10_000):
        stage = hw4.run_stage("demo", "k" * 64, linear(), folder)
    out = capsys.readouterr().out
    assert out.count(REMEDY) == 6  # five states and the result
    assert "demo: trained in" in out and not list(folder.glob("*.pt"))
    assert torch.equal(stage.weights["weight"], expected.weights["weight"])
    (older,) = folder.iterdir()  # no partial file either
    assert len(torch.load(older, weights_only=True)["losses"]) == 3
    again = hw4.run_stage("demo", "k" * 64, linear(), folder)
    assert "resumed after step 3 of epoch 1" in capsys.readouterr().out
    assert torch.equal(again.weights["weight"], expected.weights["weight"])
    assert [p.suffix for p in folder.iterdir()] == [".pt"]


# Training that goes wrong


def test_full_gpu_names_the_batch_size_and_keeps_the_state(hw4, linear, always_due, tmp_path):
    def full(n):
        if n == 6:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match=r"lower batch_size \(now 4\)"):
        hw4.run_stage("demo", "k" * 64, linear(full), tmp_path)
    state = hw4.load_checkpoint(tmp_path / f"demo-{'k' * 16}.unfinished")
    assert (len(state["history"]), len(state["losses"])) == (1, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad_step, where", [(1, "step 1 of epoch 1"), (7, "step 3 of epoch 2")])
def test_loss_that_is_not_finite_is_located(hw4, linear, always_due, tmp_path, value, bad_step, where):
    train = linear(spoil=lambda n: value if n == bad_step else 1.0)
    with pytest.raises(FloatingPointError, match=f"^the loss is not finite at {where}: lower learning_rate, then run"):
        hw4.run_stage("demo", "k" * 64, train, tmp_path)
    state = hw4.load_checkpoint(tmp_path / f"demo-{'k' * 16}.unfinished")
    if bad_step == 1:
        assert state is None
    else:
        assert (len(state["history"]), len(state["losses"])) == (1, 2)
        assert all(value.isfinite().all() for value in state["model"].values())


def test_gradient_that_is_not_finite_is_not_saved(hw4, linear, always_due, tmp_path):
    """The loss of step 3 is finite, but the weights that come out of the step are not."""

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.nan

    class Factor:
        def __init__(self, bad):
            self.bad = bad

        def __rmul__(self, x):
            return Spoil.apply(x) if self.bad else x

    with pytest.raises(FloatingPointError, match="epoch 1: lower learning_rate"):
        hw4.run_stage("demo", "k" * 64, linear(spoil=lambda n: Factor(n == 3)), tmp_path)
    state = hw4.load_checkpoint(tmp_path / f"demo-{'k' * 16}.unfinished")
    assert all(value.isfinite().all() for value in state["model"].values())
