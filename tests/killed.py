"""Trains in child processes that are killed on the way: killed.py FOLDER, started by test_resume.py."""

import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

STAGES = ("scratch", "simclr", "pretrained")


def shrink(config, hw4, folder):
    """The settings of a tiny training of 3 epochs that keeps itself in `folder` after each."""
    short = {"epochs": 3, "batch_size": 8, "validate_every": 1}
    recipes = {name: replace(getattr(config, name), **short) for name in ("contrastive", "simclr")}
    size = hw4.Size(width=48, depth=1, num_heads=2)
    sizes = {"image_size": 16, "vision": size, "text": size, "embed_dim": 16, "projector": (16, 8)}
    return replace(config, **recipes, **sizes, checkpoint_dir=Path(folder))


def train(hw4, name, data, config):
    """One training of 3 epochs of 2 steps, which draws random numbers everywhere."""
    if name == "simclr":
        return hw4.pretrain_simclr(name, data, config)
    torch.manual_seed(1)
    vision = hw4.VisionTransformer(config) if name == "pretrained" else None
    return hw4.train_contrastive(name, data, config, vision=vision)


def arm(owner, name, count=1, before=None):
    """Let this process die in the `count`-th call of `name`, after `before` was called with its arguments."""
    original, calls = getattr(owner, name), []

    def deadly(*args):
        calls.append(args)
        if len(calls) == count:
            if before:
                before(original, *args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    setattr(owner, name, deadly)


def sitting(hw4, name, data, config, *death, **how):
    """Train in a child process that may die; returns its exit status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if death:
            arm(*death, **how)
        train(hw4, name, data, config)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def half(write, state, path):
    write(state, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def whole(rename, path, target):
    rename(path, target)


def main(folder):
    sys.path.insert(0, str(folder))
    import hw4  # the notebook's definitions

    hw4.choose_dtype = lambda device: torch.float32
    data, config = torch.load(folder / "data", weights_only=False)
    for name in STAGES:
        assert sitting(hw4, name, data, shrink(config, hw4, folder / "whole")) == 0
        killed = hw4, name, data, shrink(config, hw4, folder / "killed")
        deaths = (
            sitting(*killed, hw4, "learning_rate_factor", count=4),  # the last step of epoch 2
            sitting(*killed, torch, "save", before=half),
            sitting(*killed, Path, "replace"),
            sitting(*killed, Path, "replace", before=whole),
        )
        assert deaths == 4 * (-signal.SIGKILL,)
        assert sitting(*killed) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
