"""A training that is cut off goes on as if nothing had happened, and no kept training is used for another."""

import re
import resource
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import killed
import pytest
import torch


@pytest.fixture
def kept(tmp_path):
    """The folder for trainings."""
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept"


@pytest.fixture
def config(hw4, smoke, kept):
    return killed.shrink(smoke, hw4, kept)


@pytest.fixture
def few(data):
    """16 photos to train on and 8 to validate."""
    return replace(data, train_ids=data.train_ids[:16], val_ids=data.val_ids[:8])


@pytest.fixture
def train(hw4, few, config):
    """A function that trains SimCLR for 3 epochs of 2 steps, keeps every epoch, and returns the history."""

    def train(**changes):
        recipe = replace(config.simclr, **changes)
        return hw4.pretrain_simclr("toy", few, replace(config, simclr=recipe))[1]

    return train


@pytest.fixture
def task(hw4, few, config):
    """A contrastive training, not yet begun."""
    torch.manual_seed(0)
    return hw4.ContrastiveTask(hw4.DualEncoder(len(few.vocabulary), config), few, config, config.contrastive)


def only_file(folder):
    (path,) = folder.iterdir()
    assert path.suffix == ".pt"
    return path


def timeless(x):
    """A saved training without its times, tensors as lists, so that two can be compared."""
    if isinstance(x, dict):
        return {key: timeless(value) for key, value in x.items() if key not in ("seconds", "time")}
    if isinstance(x, (list, tuple)):
        return [timeless(value) for value in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x


def load(path):
    return timeless(torch.load(path, weights_only=True))


def stop_in_second_epoch(hw4, train):
    """Train until the stop button is pressed in the second epoch."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        original = hw4.train_epoch

        def stopped(task, ids, epoch, *others):
            if epoch == 1:
                raise KeyboardInterrupt
            return original(task, ids, epoch, *others)

        patch.setattr(hw4, "train_epoch", stopped)
        train()


@pytest.fixture
def forbid_training(hw4, monkeypatch):
    def never(*args):
        raise AssertionError("this should have been loaded")

    monkeypatch.setattr(hw4, "train_epoch", never)


# Killed and stopped


@pytest.fixture(scope="module")
def killed_run(definition_cells, data, smoke, tmp_path_factory):
    """A folder with whole/ and killed/, trainings that lived and that were killed, and what was printed."""
    folder = tmp_path_factory.mktemp("killed")
    for part in ("whole", "killed"):
        (folder / part).mkdir()
    (folder / "hw4.py").write_text("\n\n".join(definition_cells), encoding="utf-8")
    few = replace(data, train_ids=data.train_ids[:16], val_ids=data.val_ids[:8])
    torch.save((few, smoke), folder / "data")
    command = [sys.executable, "-u", killed.__file__, folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("name", killed.STAGES)
def test_killed_training_ends_like_one_that_lived(killed_run, name):
    folder, log = killed_run
    whole, survived = (next((folder / part).glob(f"{name}-*.pt")) for part in ("whole", "killed"))
    assert whole.name == survived.name and load(whole) == load(survived)
    assert len(load(whole)["history"]) == 3
    assert re.findall(rf"{whole.name}: (\d) epochs of .* loaded", log) == ["1", "1", "1", "2"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stopped_training_goes_on(hw4, kept, train, monkeypatch, dtype):
    monkeypatch.setattr(hw4, "choose_dtype", lambda device: dtype)
    stop_in_second_epoch(hw4, train)
    assert len(load(only_file(kept))["history"]) == 1
    assert bool(load(only_file(kept))["scaler"]) == (dtype == torch.float16)
    history, ended = train(), load(only_file(kept))
    only_file(kept).unlink()
    assert timeless(train()) == timeless(history)
    assert load(only_file(kept)) == ended


def test_the_stop_button_says_what_is_kept_and_how_to_go_on(hw4, train, capsys):
    stop_in_second_epoch(hw4, train)
    assert "toy: 1 of 3 epochs are kept; run this cell again to go on" in capsys.readouterr().out


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)], ids=str)
def test_a_training_moves_between_hardware_with_and_without_gradient_scaler(hw4, kept, train, monkeypatch, dtypes):
    """As from a GPU with bfloat16 to a T4, and back."""
    for dtype, how in zip(dtypes, (lambda: stop_in_second_epoch(hw4, train), train), strict=True):
        monkeypatch.setattr(hw4, "choose_dtype", lambda device, dtype=dtype: dtype)
        how()
    assert len(load(only_file(kept))["history"]) == 3


def test_epochs_are_kept_when_they_are_measured_and_at_the_end(hw4, train, monkeypatch):
    saved = []
    monkeypatch.setattr(hw4, "save_checkpoint", lambda path, history, *parts: saved.append(len(history)))
    train(epochs=8, validate_every=3)
    assert saved == [3, 6, 8]


# Finished


def test_a_finished_training_is_loaded(hw4, few, config, request):
    vision, history = hw4.pretrain_simclr("toy", few, config)
    request.getfixturevalue("forbid_training")
    loaded, its_history = hw4.pretrain_simclr("toy", few, config)
    assert its_history == history and timeless(loaded.state_dict()) == timeless(vision.state_dict())


def test_one_line_says_what_is_loaded_of_when_and_how_to_train_again(train, kept, capsys):
    train()
    capsys.readouterr()
    train()
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d"
    said = [line for line in re.split(r"[\r\n]", capsys.readouterr().out) if "loaded" in line]
    assert len(said) == 1
    assert re.fullmatch(rf"{only_file(kept).name}: 3 epochs of {when} loaded; delete .* to train again", said[0])


def test_a_finished_training_keeps_no_optimizer_state(hw4, train, kept):
    stop_in_second_epoch(hw4, train)
    unfinished = only_file(kept).stat().st_size
    assert len(load(only_file(kept))["optimizers"]) == 2
    train()
    assert load(only_file(kept))["optimizers"] == []
    assert only_file(kept).stat().st_size < 0.6 * unfinished


# Whose training it is


def one_changed(tensor):
    changed = tensor.clone()
    changed.view(-1)[0] += 1
    return changed


def changed_fields(settings, changes):
    """`settings` with one field changed at a time; numbers without an entry in `changes` get 3/4 of their value."""
    for field in fields(settings):
        value = changes[field.name] if field.name in changes else 0.75 * getattr(settings, field.name)
        yield replace(settings, **{field.name: value})


def test_whatever_changes_a_training_gives_another_file(hw4, task):
    ids, config, recipe = task.data.train_ids, task.config, task.recipe

    def name(ids=ids, seed=0, **parts):
        parts = {"model": task.model, "data": task.data, "config": config, "recipe": recipe} | parts
        return hw4.checkpoint_path("run", hw4.ContrastiveTask(**parts), ids, seed).name

    moved = hw4.DualEncoder(len(task.data.vocabulary), config)
    moved.load_state_dict(task.model.state_dict() | {"log_logit_scale": torch.tensor(1.0)})
    names = {
        name(),
        name(ids=ids[1:]),
        name(seed=1),
        name(model=moved),
        name(data=replace(task.data, fingerprint="of other data")),
    }
    options = {"epochs": 4, "batch_size": 4, "block_size": 4, "muon": False, "validate_every": 2, "gray": 0.1}
    options |= {"adamw_betas": (0.9, 0.9)}
    recipes = list(changed_fields(recipe, options))
    names.update(name(recipe=changed) for changed in recipes)

    size = hw4.Size(32, 1, 2)
    options = {"num_images": 5, "num_val": 30, "image_size": 8, "max_tokens": 9, "min_word_count": 2, "patch_size": 4}
    options |= {"vision": size, "text": size, "embed_dim": 8, "projector": (8, 8), "captions_per_image": 2}
    elsewhere = ("contrastive", "simclr", "protocol", "checkpoint_dir")
    options |= {field: getattr(config, field) for field in elsewhere}
    configs = [changed for changed in changed_fields(config, options) if changed != config]
    names.update(name(config=changed) for changed in configs)
    assert len(names) == 5 + len(recipes) + len(configs)
    assert len(configs) == len(fields(config)) - len(elsewhere)


def test_what_changes_no_training_gives_the_same_file(hw4, task, tmp_path):
    ids, config = task.data.train_ids, task.config
    name = hw4.checkpoint_path("run", task, ids, 0).name
    for change in (
        {"protocol": replace(config.protocol, num_seeds=9, control_epochs=1, recall_at=(1, 5))},
        {"checkpoint_dir": tmp_path / "another"},
        {"simclr": replace(config.simclr, epochs=99)},
    ):
        other = hw4.ContrastiveTask(task.model, task.data, replace(config, **change), task.recipe)
        assert hw4.checkpoint_path("run", other, ids, 0).name == name


@pytest.mark.parametrize("which", ["images", "tokens", "mask", "train_ids", "val_ids"])
def test_other_data_have_another_fingerprint(hw4, data, data_dir, smoke, which):
    names = ("images", "tokens", "mask", "train_ids", "val_ids")
    tensors = {name: getattr(data, name) for name in names}
    assert hw4.hash_tensors(tensors.values()) == data.fingerprint
    changed = tensors | {which: one_changed(tensors[which].to(torch.uint8) if which == "mask" else tensors[which])}
    assert hw4.hash_tensors(changed.values()) != data.fingerprint


# Files that cannot be read or written


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
def test_what_is_no_checkpoint_is_named_and_set_aside_and_training_starts_again(train, kept, tmp_path, capsys, damage):
    history, path = train(), only_file(kept)
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
    assert timeless(train()) == timeless(history)
    out = capsys.readouterr().out
    assert f"{path} is damaged" in out and path.with_suffix(".damaged").name in out and "epochs of" not in out
    assert path.with_suffix(".damaged").read_bytes() == content and len(path.read_bytes()) == len(whole)
    assert not (tmp_path / "exploded").exists()


def test_a_drive_that_fails_leaves_a_good_file_alone(train, kept, monkeypatch):
    train()
    content = only_file(kept).read_bytes()

    def fail(*args, **kwargs):
        raise OSError(107, "Transport endpoint is not connected")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="not connected"):
        patch.setattr(torch, "load", fail)
        train()
    assert only_file(kept).read_bytes() == content


def test_two_kernels_that_save_the_same_training_keep_a_whole_file(hw4, task, kept, monkeypatch):
    """The other one saves while this one has written half of its file."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    write, path = torch.save, kept / "run.pt"

    def slowly(state, part):
        write(state, part)
        content = part.read_bytes()
        with open(part, "wb") as file:
            file.write(content[:1000])
            file.flush()
            monkeypatch.setattr(torch, "save", write)
            hw4.save_checkpoint(path, ["theirs"], task.model, [], scaler)
            assert load(path)["history"] == ["theirs"]
            file.write(content[1000:])

    monkeypatch.setattr(torch, "save", slowly)
    hw4.save_checkpoint(path, ["mine"], task.model, [], scaler)
    assert load(only_file(kept))["history"] == ["mine"]


@contextmanager
def full_disk():
    """Files cannot grow beyond 2,000 bytes, so that PyTorch fails as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_is_told_and_training_goes_on(train, kept, capsys):
    with full_disk():
        history = train()
    out = capsys.readouterr().out
    assert len(history) == 3 and "could not be written" in out and "free space, or set CHECKPOINT_DIR" in out
    assert not list(kept.iterdir())
    assert timeless(train()) == timeless(history)


def test_a_folder_that_became_a_file_is_told_and_training_goes_on(hw4, train, kept, capsys):
    kept.rmdir()
    kept.write_text("a file")
    assert len(train()) == 3 and "could not be written" in capsys.readouterr().out


def test_a_folder_that_vanished_is_made_again_and_told(hw4, train, kept, capsys):
    kept.rmdir()
    train()
    assert only_file(kept).name.startswith("toy-")
    assert capsys.readouterr().out.count(f"{kept} has vanished and is made again") == 1


def test_a_drive_that_crashed_is_told_and_training_goes_on(train, kept, capsys, monkeypatch):
    """Nothing works in the folder any more, not even the removal of the part that was written."""

    def fail(*args, **kwargs):
        raise OSError(107, "Transport endpoint is not connected")

    with monkeypatch.context() as patch:
        for name in ("unlink", "replace"):
            patch.setattr(Path, name, fail)
        assert len(train()) == 3
    assert "could not be written ([Errno 107] Transport" in capsys.readouterr().out


def test_only_what_was_saved_is_said_to_be_kept(hw4, train, kept, capsys, monkeypatch):
    epochs = []

    def interrupted(*args):
        epochs.append(args)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(hw4, "train_epoch", interrupted)
    with full_disk(), pytest.raises(KeyboardInterrupt):
        train()
    assert "toy: 0 of 3 epochs are kept" in capsys.readouterr().out and not list(kept.iterdir())
