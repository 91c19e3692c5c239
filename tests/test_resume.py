"""A training that is cut off goes on as if nothing had happened, and no kept training is used for another."""

import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import killed
import pytest
import torch
from execute import visible
from torch import nn

IDS = torch.arange(12)


class Toy(nn.Module):
    """A small model with parameters for both optimizers."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.head(self.blocks(x).relu())


def noisy(model, batch, patch_keep):
    return (model(torch.randn(len(batch), 4)),)


def never(*args):
    raise AssertionError("this should have been loaded")


def fit_toy(hw4, model=None, embed=noisy, loss=lambda y: (y - 3).square().mean(), ids=IDS, evaluate=None, **changes):
    """Train a model on random input, by default for 3 epochs of 3 steps; returns the history."""
    torch.manual_seed(0)
    recipe = replace(hw4.Recipe(epochs=3, batch_size=4), **changes)
    return hw4.fit("toy", model or Toy(), embed, loss, ids, recipe, [], evaluate=evaluate)


@pytest.fixture(autouse=True)
def folder(hw4, monkeypatch, tmp_path):
    """A fresh folder for trainings, which are saved after every epoch."""
    monkeypatch.setattr(hw4, "SAVE_INTERVAL", 0)
    monkeypatch.setattr(hw4, "CHECKPOINT_DIR", tmp_path / "kept")
    hw4.say_once.cache_clear()
    return tmp_path / "kept"


def kept(folder):
    (path,) = folder.glob("*.pt")
    return path


def timeless(x):
    """A saved training without its times, tensors as lists, so that two can be compared."""
    if isinstance(x, dict):
        return {key: timeless(value) for key, value in x.items() if key != "seconds"}
    if isinstance(x, (list, tuple)):
        return [timeless(value) for value in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x


def load(path):
    return timeless(torch.load(path, weights_only=True))


def stop_in_second_epoch(hw4):
    """Train a toy until the stop button is pressed after the second epoch, of which nothing is saved then."""
    calls = []

    def evaluate(model):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        fit_toy(hw4, evaluate=evaluate)


# Killed and stopped


@pytest.fixture(scope="module")
def killed_run(definition_cells, data, tmp_path_factory):
    """A folder with whole/ and killed/, trainings that lived and that were killed, and what was printed."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "hw4.py").write_text("\n\n".join(definition_cells), encoding="utf-8")
    corpus, train_ids, val_ids, _ = data
    torch.save([*corpus, train_ids[:64], val_ids], folder / "data")
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with threads should not fork
    command = [sys.executable, "-u", killed.__file__, folder]
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("name", killed.STAGES)
def test_killed_training_ends_like_one_that_lived(killed_run, name):
    folder, log = killed_run
    whole, survived = (next((folder / part).glob(f"{name}-*.pt")) for part in ("whole", "killed"))
    assert whole.name == survived.name and load(whole) == load(survived)
    assert len(load(whole)["history"]) == 3
    assert re.findall(rf"{name}: (\d) epochs loaded from {whole.name}$", log, re.M) == ["1", "1", "1", "2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stopped_training_goes_on(hw4, folder, monkeypatch, tmp_path, dtype):
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: dtype)
    stop_in_second_epoch(hw4)
    assert len(load(kept(folder))["history"]) == 1
    stopped = fit_toy(hw4, evaluate=lambda model: {})
    monkeypatch.setattr(hw4, "CHECKPOINT_DIR", tmp_path / "whole")
    assert timeless(stopped) == timeless(fit_toy(hw4, evaluate=lambda model: {}))
    assert load(kept(folder)) == load(kept(tmp_path / "whole"))
    assert bool(load(kept(folder))["scaler"]) == (dtype == torch.float16)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_a_state_moves_between_hardware_with_and_without_gradient_scaler(hw4, folder, monkeypatch, dtypes):
    """As from a GPU with bfloat16 to a T4, and back."""
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: dtypes[0])
    stop_in_second_epoch(hw4)
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: dtypes[1])
    history = fit_toy(hw4)
    assert [record["hardware"] for record in history] == [f"cpu, {dtype}" for dtype in (dtypes[0], *2 * dtypes[1:])]


def test_finished_training_is_loaded(hw4, folder, capsys):
    first, second = Toy(), Toy()
    history = fit_toy(hw4, first)
    content = kept(folder).read_bytes()
    capsys.readouterr()
    assert fit_toy(hw4, second, embed=never) == history
    assert timeless(first.state_dict()) == timeless(second.state_dict())
    assert capsys.readouterr().out.startswith(f"toy: 3 epochs loaded from {kept(folder).name}\n")
    assert kept(folder).read_bytes() == content


def test_states_are_saved_once_in_a_while(hw4, monkeypatch):
    monkeypatch.setattr(hw4, "SAVE_INTERVAL", 60)
    clock, saved = iter(range(0, 1000, 25)), []
    monkeypatch.setattr(hw4.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(hw4, "save_checkpoint", lambda path, parts, history: saved.append(len(history)))
    fit_toy(hw4, epochs=8)
    assert saved[0] > 1 and saved[-1] == 8 and 2 <= len(saved) <= 4


# Whose training it is


@pytest.fixture
def file_of(hw4, smoke, data, monkeypatch):
    """Name of the file that a training with these settings would use."""
    corpus, train_ids, val_ids, _ = data
    defaults = {"config": smoke, "corpus": corpus, "train_ids": train_ids, "val_ids": val_ids}

    class Found(Exception):
        pass

    def resume(name, path, parts):
        raise Found(path.name)

    monkeypatch.setattr(hw4, "resume", resume)

    def find(kind="contrastive", **changes):
        arguments = defaults | changes
        if kind == "simclr":
            del arguments["val_ids"]
        with pytest.raises(Found) as found:
            getattr(hw4, f"train_{kind}")("run", **arguments)
        return str(found.value)

    return find


def one_changed(tensor):
    changed = tensor.clone()
    changed.view(-1)[0] += 1
    return changed


def test_whatever_changes_a_contrastive_training_gives_another_file(hw4, smoke, data, file_of):
    corpus, train_ids, val_ids, _ = data
    start = hw4.build_vision(smoke).state_dict()
    others = [
        file_of(corpus=corpus._replace(images=one_changed(corpus.images))),
        file_of(corpus=corpus._replace(tokens=one_changed(corpus.tokens))),
        *(file_of(**change) for change in ({"train_ids": train_ids[1:]}, {"val_ids": val_ids[1:]})),
        *(file_of(**change) for change in ({"seed": 1}, {"negatives": 8}, {"start": start})),
        file_of(start=start | {"class_token": one_changed(start["class_token"])}),
    ]
    recipe = smoke.contrastive
    for name in (field.name for field in fields(recipe)):
        change = {name: (0.1, 0.2) if isinstance(getattr(recipe, name), tuple) else 0.75 * getattr(recipe, name)}
        if name in ("epochs", "batch_size"):
            change[name] = 3
        others.append(file_of(config=replace(smoke, contrastive=replace(recipe, **change))))
    sizes = {"image_size": 64, "patch_size": 4, "vision": (32, 1, 2), "text": (32, 1, 2), "embed_dim": 32}
    sizes |= {"max_tokens": 25, "captions_per_image": 2, "caption_weight": 0.1, "word_dropout": 0.2}
    sizes |= {"num_images": 5, "num_val": 5}
    assert {field.name for field in fields(smoke)} == {*sizes, "contrastive", "simclr", "num_seeds"}
    others += [file_of(config=replace(smoke, **{name: value})) for name, value in sizes.items()]
    assert len({file_of(), *others}) == 1 + len(others)
    same = replace(smoke, simclr=recipe, num_seeds=9)
    assert file_of(config=same) == file_of()


def test_a_simclr_training_belongs_to_photos_and_its_own_settings_only(smoke, data, file_of):
    corpus, train_ids, _, _ = data
    others = [
        file_of("simclr", corpus=corpus._replace(images=one_changed(corpus.images))),
        file_of("simclr", train_ids=train_ids[1:]),
        file_of("simclr", config=replace(smoke, simclr=replace(smoke.simclr, crop_scale=0.3))),
        *(file_of("simclr", config=replace(smoke, **c)) for c in ({"image_size": 64}, {"vision": (32, 1, 2)})),
    ]
    assert len({file_of("simclr"), *others}) == 1 + len(others)
    changed = replace(smoke, text=(32, 1, 2), contrastive=smoke.simclr, word_dropout=0.5)
    corpus = corpus._replace(tokens=one_changed(corpus.tokens))
    assert file_of("simclr", config=changed, corpus=corpus) == file_of("simclr")


# By which code


def kernel(*cells):
    """Stands for a kernel that has run these cells."""
    return lambda: SimpleNamespace(history_manager=SimpleNamespace(input_hist_raw=["", *cells]))


LOSS = "def loss(x):\n    # of x\n    return x\n"


@pytest.mark.parametrize(
    "before, after, same",
    [
        ([LOSS], [LOSS], True),
        ([LOSS], ["a = 1", LOSS, "plot(a)", "def figure(): pass"], True),  # code that it did not have changes nothing
        ([LOSS], ["# new\n\n" + LOSS.replace("# of x", "# of y")], True),
        ([LOSS], [LOSS.replace("return x", "return 2 * x")], False),
        ([LOSS], [LOSS, LOSS.replace("return x", "return 2 * x")], False),  # the cell that ran last counts
        (["%%time\n" + LOSS], ["%%time\n" + LOSS.replace("return x", "return 2 * x")], False),
        (["!ls\n%load_ext x\n" + LOSS], ["!ls\n%load_ext x\n" + LOSS.replace("return x", "return 2 * x")], False),
        (["!ls\n" + LOSS], ["!ls\n" + LOSS], True),
        (["class A:\n    b = 1"], ["class A:\n    b = 2"], False),
        ([], [LOSS], False),  # unknown code is never taken for the same
        ([LOSS], [], False),
        ([], [], False),
    ],
)
def test_other_code_is_told_in_one_line(hw4, monkeypatch, capsys, before, after, same):
    monkeypatch.setattr(hw4, "get_ipython", kernel(*before))
    fit_toy(hw4)
    capsys.readouterr()
    monkeypatch.setattr(hw4, "get_ipython", kernel(*after))
    fit_toy(hw4, embed=never)
    loaded, *more = filter(None, map(visible, capsys.readouterr().out.split("\n")))
    assert "3 epochs loaded" in loaded
    assert len(more) == (not same) and all("made by other code" in line and "HW4_FRESH=1" in line for line in more)


def test_outside_jupyter_the_code_is_unknown(hw4, monkeypatch):
    monkeypatch.setattr(hw4, "get_ipython", lambda: None)
    assert hw4.code_digests() == {} and hw4.source_hash([]) == "unknown"


# Files that cannot be read or written


FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: ...")


@pytest.mark.parametrize("error", [OSError(107, "gone"), MemoryError(), FULL], ids=["drive", "memory", "torch"])
@pytest.mark.parametrize("owner, name", [(Path, "read_bytes"), (torch, "load")])
def test_a_file_that_cannot_be_read_now_is_left_alone(hw4, folder, monkeypatch, owner, name, error):
    fit_toy(hw4)
    content = kept(folder).read_bytes()

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cannot be read now .*run again"):
        patch.setattr(owner, name, fail)
        fit_toy(hw4, embed=never)
    assert [path.suffix for path in folder.iterdir()] == [".pt"] and kept(folder).read_bytes() == content


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


def saved(thing, tmp_path):
    torch.save(thing, tmp_path / "thing")
    return (tmp_path / "thing").read_bytes()


@pytest.mark.parametrize("damage", ["half", "a byte short", "empty", "text", "bomb", "another file of PyTorch"])
def test_what_is_no_checkpoint_is_set_aside(hw4, folder, tmp_path, capsys, damage):
    history, path = fit_toy(hw4), kept(folder)
    whole = path.read_bytes()
    content = {
        "half": whole[: len(whole) // 2],
        "a byte short": whole[:-1],
        "empty": b"",
        "text": b"no checkpoint",
        "bomb": saved(Bomb(tmp_path / "exploded"), tmp_path),
        "another file of PyTorch": saved({"weights": torch.zeros(3)}, tmp_path),
    }[damage]
    path.write_bytes(content)
    capsys.readouterr()
    assert timeless(fit_toy(hw4)) == timeless(history)
    out = capsys.readouterr().out
    assert f"{path.name} is damaged" in out and "epochs loaded" not in out
    assert path.with_suffix(".damaged").read_bytes() == content and len(path.read_bytes()) == len(whole)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["mkdir", "write_bytes", "replace"])
def test_training_goes_on_where_nothing_can_be_saved(hw4, folder, monkeypatch, capsys, name):
    history = fit_toy(hw4)
    kept(folder).unlink()
    capsys.readouterr()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, name, fail)
        assert timeless(fit_toy(hw4)) == timeless(history)
    out = capsys.readouterr().out
    assert out.count("No space left on device") == 1 and "free space or set CHECKPOINT_DIR" in out
    assert not list(folder.glob("*.pt"))
    fit_toy(hw4)  # the remains of the failed attempt do not disturb
    assert [path.suffix for path in folder.iterdir()] == [".pt"]


def test_fresh_trains_again_and_keeps_the_old(hw4, cells, folder, monkeypatch, capsys):
    fit_toy(hw4)
    content = kept(folder).read_bytes()
    monkeypatch.setenv("CHECKPOINT_DIR", str(folder))
    monkeypatch.setenv("HW4_FRESH", "1")
    (cell,) = (cell for cell in cells if "HW4_FRESH" in cell and "def " not in cell)
    exec(cell, dict(hw4.__dict__))
    capsys.readouterr()
    fit_toy(hw4)
    assert "epochs loaded" not in capsys.readouterr().out
    assert kept(folder).with_suffix(".old").read_bytes() == content
