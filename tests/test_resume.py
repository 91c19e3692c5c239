"""A training that is killed, stopped, or finds its saved state damaged ends as if nothing had happened."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import killed
import pytest
import torch

KEY = "k" * 64
SEED = 0  # of the moments at which trainings are killed
STAGES = ("scratch", "simclr", "pretrained")


@pytest.fixture(scope="module")
def job(hw4, smoke, data, runtime):
    """Arguments of `killed.trainings`: 3 epochs of 4 steps of a tiny model that also draws random numbers inside."""
    corpus, train_ids, val_ids, _ = data
    short = {"epochs": 3, "batch_size": 16}
    config = replace(
        smoke,
        contrastive=replace(smoke.contrastive, **short),
        simclr=replace(smoke.simclr, **short),
        vision_depth=1,
        text_depth=1,
        num_evaluations=3,
    )
    weights = hw4.train_simclr(corpus, train_ids[:64], config, runtime)[0].state_dict()
    vision = {name: value for name, value in weights.items() if name.startswith("vision.")}
    return corpus, train_ids[:64], val_ids, config, runtime, vision


@pytest.fixture(scope="module")
def trainings(hw4, job):
    """{stage: train(checkpoint)} of the three trainings."""
    return killed.trainings(hw4, *job)


@pytest.fixture(scope="module")
def whole(hw4, trainings, tmp_path_factory):
    """The stage `scratch`, never interrupted."""
    return hw4.run_stage("scratch", KEY, trainings["scratch"], tmp_path_factory.mktemp("whole"))


@pytest.fixture
def always_due(hw4, monkeypatch):
    """Save a state after every step."""
    monkeypatch.setattr(hw4, "SAVE_INTERVAL", 0)


def assert_same(weights, history, expected):
    """Weights and history must agree bit by bit; only the times and the number of sittings may differ."""
    assert weights.keys() == expected.weights.keys()
    assert all(torch.equal(value, expected.weights[name]) for name, value in weights.items())
    assert without_times(history) == without_times(expected.history)


def without_times(history):
    return [{k: v for k, v in record.items() if k not in ("seconds", "sitting")} for record in history]


def stop_at(monkeypatch, step):
    """Press the stop button in the middle of the `step`-th step from now."""
    steps, clip = [], torch.nn.utils.clip_grad_norm_

    def pressed(*args):
        steps.append(1)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", pressed)


def stop_and_leave(hw4, monkeypatch, train, directory, step=6):
    """Run the stage `scratch` until it is stopped in its `step`-th step."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="run this again to go on"):
        stop_at(patch, step)
        hw4.run_stage("scratch", KEY, train, directory)


@pytest.fixture
def stopped(hw4, trainings, always_due, monkeypatch, tmp_path, capsys):
    """A folder with the states after 6 steps (the latest) and 5 steps (the spare) of 12."""
    stop_and_leave(hw4, monkeypatch, trainings["scratch"], tmp_path)
    capsys.readouterr()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".spare", ".unfinished"]
    return tmp_path


def latest(folder):
    return next(folder.glob("*.unfinished"))


def spare(folder):
    return next(folder.glob("*.spare"))


# Killed


@pytest.fixture(scope="module")
def killed_run(definition_cells, hw4, job, tmp_path_factory):
    """A folder with whole/ and killed/, the kept stages of trainings that lived and that were killed."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "hw4.py").write_text("\n\n".join(definition_cells), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "hw4", hw4)  # where pickle looks for the classes
        (folder / "job").write_bytes(pickle.dumps(job))
    command = [sys.executable, "-u", killed.__file__, folder / "job", folder, str(SEED)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with threads should not fork
    done = subprocess.run(command, env=one_thread, capture_output=True, text=True, timeout=300)
    print(done.stdout, done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_killed_training_ends_like_one_that_lived(hw4, killed_run, name):
    folder, log = killed_run
    kept = [torch.load(next((folder / part).glob(f"{name}-*.pt")), weights_only=True) for part in ("whole", "killed")]
    expected, survived = [hw4.Stage(**content) for content in kept]
    assert_same(survived.weights, survived.history, expected)
    lines = [line for line in log.splitlines() if f"{name}: killed at" in line]
    assert len(lines) == killed.KILLS and any("'writing'" in line for line in lines)
    assert 1 < survived.history[-1]["sitting"] <= 1 + killed.KILLS
    assert not list((folder / "killed").glob(f"{name}-*.unfinished*"))


# Stopped by hand


@pytest.mark.parametrize("dtype, use_scaler", [(torch.float32, False), (torch.float16, True)])
def test_stopped_training_goes_on(hw4, job, monkeypatch, tmp_path, capsys, dtype, use_scaler):
    """With nothing due by the clock: it is the stop that writes the state."""
    corpus, train_ids, val_ids, config, _, _ = job
    runtime = hw4.Runtime(torch.device("cpu"), dtype, use_scaler)
    train = lambda checkpoint: hw4.train_contrastive(corpus, train_ids, val_ids, config, runtime, checkpoint)  # noqa: E731
    expected = hw4.run_stage("scratch", KEY, train, tmp_path / "whole")
    stop_and_leave(hw4, monkeypatch, train, tmp_path / "stopped")
    assert "resumed" not in capsys.readouterr().out
    stage = hw4.run_stage("scratch", KEY, train, tmp_path / "stopped")
    assert "resumed after step 2 of epoch 2" in capsys.readouterr().out
    assert_same(stage.weights, stage.history, expected)
    assert [record["sitting"] for record in stage.history] == [1, 2, 2]
    assert "in 2 sittings" in stage.hardware
    assert [path.suffix for path in (tmp_path / "stopped").iterdir()] == [".pt"]


def test_the_scale_of_half_precision_is_part_of_the_state(hw4, smoke):
    runtime = hw4.Runtime(torch.device("cpu"), torch.float16, True)
    before, after = (hw4.TrainingRun(torch.nn.Linear(2, 2), smoke.contrastive, runtime) for _ in range(2))
    for run in (before, after):
        run.scaler.scale(torch.ones(1))
    before.scaler.update(new_scale=8.0)
    after.load_state_dict(before.state_dict())
    assert after.scaler.get_scale() == 8.0


@pytest.mark.parametrize("before, after", [(False, True), (True, False)])
def test_a_state_moves_between_hardware_with_and_without_gradient_scaler(hw4, smoke, before, after):
    """As from a GPU with bfloat16 to a T4, and back."""
    saved, resumed = (
        hw4.TrainingRun(torch.nn.Linear(2, 2), smoke.contrastive, hw4.Runtime(torch.device("cpu"), use_scaler=scaled))
        for scaled in (before, after)
    )
    resumed.load_state_dict(saved.state_dict())
    assert torch.equal(resumed.model.weight, saved.model.weight)
    assert resumed.scaler.is_enabled() == after and resumed.sitting == 2


def test_stop_during_the_last_evaluation_is_obeyed(hw4, trainings, whole, monkeypatch, tmp_path):
    """Whoever presses stop does not want the next cells to run."""
    monitor, calls = hw4.monitor, []

    def pressed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return monitor(*args, **kwargs)

    monkeypatch.setattr(hw4, "monitor", pressed)
    with pytest.raises(KeyboardInterrupt):
        hw4.run_stage("scratch", KEY, trainings["scratch"], tmp_path)
    monkeypatch.undo()
    stage = hw4.run_stage("scratch", KEY, trainings["scratch"], tmp_path)
    assert_same(stage.weights, stage.history, whole)


def test_stop_button_works_again_after_training(hw4, trainings, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    hw4.run_stage("scratch", KEY, trainings["scratch"], tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


# Damaged


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_state_is_set_aside_for_the_spare(hw4, stopped, trainings, whole, capsys, damage):
    path = latest(stopped)
    damage(path)
    stage = hw4.run_stage("scratch", KEY, trainings["scratch"], stopped)
    out = capsys.readouterr().out
    assert f"{path.name} is damaged" in out and "resumed after step 1 of epoch 2" in out
    assert_same(stage.weights, stage.history, whole)
    assert [p.name for p in stopped.glob("*.damaged")] == [path.name + ".damaged"]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit])
def test_damaged_result_is_trained_again(hw4, always_due, trainings, whole, tmp_path, capsys, damage):
    hw4.run_stage("scratch", KEY, trainings["scratch"], tmp_path)
    path = next(tmp_path.glob("*.pt"))
    damage(path)
    stage = hw4.run_stage("scratch", KEY, trainings["scratch"], tmp_path)
    assert f"{path.name} is damaged" in capsys.readouterr().out
    assert_same(stage.weights, stage.history, whole)


def test_without_a_whole_state_training_starts_from_the_beginning(hw4, stopped, trainings, whole, capsys):
    truncate(latest(stopped))
    truncate(spare(stopped))
    stage = hw4.run_stage("scratch", KEY, trainings["scratch"], stopped)
    assert "resumed" not in capsys.readouterr().out
    assert_same(stage.weights, stage.history, whole)
    assert len(list(stopped.glob("*.damaged"))) == 2


def test_files_are_data_and_never_run(hw4, trainings, whole, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    for suffix in ("pt", "unfinished", "unfinished.spare"):
        torch.save(Bomb(), tmp_path / f"scratch-{KEY[:16]}.{suffix}")
    stage = hw4.run_stage("scratch", KEY, trainings["scratch"], tmp_path)
    assert not (tmp_path / "exploded").exists()
    assert capsys.readouterr().out.count("is damaged") == 3
    assert_same(stage.weights, stage.history, whole)


# Started anew, and said so only then


def test_changed_settings_start_anew_and_keep_the_old_state(hw4, stopped, trainings, whole, capsys):
    before = latest(stopped).read_bytes()
    stage = hw4.run_stage("scratch", "n" * 64, trainings["scratch"], stopped)
    out = capsys.readouterr().out
    assert f"starts anew, since settings, data or code have changed since scratch-{KEY[:16]}" in out
    assert "resumed" not in out
    assert_same(stage.weights, stage.history, whole)
    assert latest(stopped).read_bytes() == before


def choose(notebook, hw4, directory, monkeypatch, fresh):
    """Run the cell that reads the environment variables."""
    monkeypatch.setenv("CHECKPOINT_DIR", str(directory))
    monkeypatch.setenv("HW4_FRESH", fresh)
    cell = next(c.source for c in notebook.cells if "FRESH_RUN =" in c.source)
    exec(cell, dict(hw4.__dict__))


def test_fresh_run_starts_anew_whatever_is_kept(notebook, hw4, stopped, trainings, whole, monkeypatch, capsys):
    aside = latest(stopped)
    choose(notebook, hw4, stopped, monkeypatch, "0")
    assert aside.exists()
    choose(notebook, hw4, stopped, monkeypatch, "1")
    assert not aside.exists() and len(list(stopped.glob("*.old"))) == 2  # nothing is lost
    for _ in range(2):
        for path in stopped.glob("*.pt"):  # as two sessions leave it that finish the same training
            shutil.copy(path, f"{path}.spare")
        stage = hw4.run_stage("scratch", KEY, trainings["scratch"], stopped)
        out = capsys.readouterr().out
        assert "resumed" not in out and "have changed" not in out
        assert_same(stage.weights, stage.history, whole)
        assert stage.history[-1]["sitting"] == 1 and "trained in" in out and "loaded" not in out
        choose(notebook, hw4, stopped, monkeypatch, "1")  # sets the finished training aside, too
        capsys.readouterr()


def test_interrupted_fresh_run_goes_on_without_the_variable(notebook, hw4, stopped, trainings, monkeypatch, capsys):
    earlier = hw4.Stage("scratch", KEY, {}, [])
    hw4.save_checkpoint(vars(earlier), stopped / f"scratch-{KEY[:16]}.pt")
    states = {path: path.read_bytes() for path in stopped.glob("*.unfinished*")}
    choose(notebook, hw4, stopped, monkeypatch, "1")
    for path, state in states.items():  # the fresh run came this far
        path.write_bytes(state)
    choose(notebook, hw4, stopped, monkeypatch, "0")
    capsys.readouterr()
    hw4.run_stage("scratch", KEY, trainings["scratch"], stopped)
    assert "resumed after step 2 of epoch 2" in capsys.readouterr().out


def test_going_on_from_the_spare_is_not_called_a_new_start(hw4, stopped, trainings, whole, capsys):
    """As after a kill, or a full disk, while the latest state was being written."""
    latest(stopped).unlink()
    stage = hw4.run_stage("scratch", KEY, trainings["scratch"], stopped)
    out = capsys.readouterr().out
    assert "resumed after step 1 of epoch 2" in out
    assert "starts anew" not in out
    assert_same(stage.weights, stage.history, whole)


def test_kill_between_keeping_the_result_and_tidying_up(hw4, stopped, trainings, tmp_path_factory):
    """The states of the unfinished training must not stay for ever beside the result."""
    aside = shutil.copytree(stopped, tmp_path_factory.mktemp("aside"), dirs_exist_ok=True)
    hw4.run_stage("scratch", KEY, trainings["scratch"], stopped)
    shutil.copytree(aside, stopped, dirs_exist_ok=True)
    hw4.run_stage("scratch", KEY, trainings["scratch"], stopped)
    assert [path.suffix for path in stopped.iterdir()] == [".pt"]
