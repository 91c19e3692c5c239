"""Trains in child processes that are killed on the way: killed.py FOLDER, started by test_resume.py."""

import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

STAGES = ("scratch", "simclr", "pretrained")


def train(hw4, name, corpus, train_ids, val_ids):
    """3 epochs of 4 steps of a tiny model, which draw random numbers everywhere."""
    config = hw4.PRESETS["smoke"]
    contrastive, simclr = (replace(r, epochs=3, batch_size=16) for r in (config.contrastive, config.simclr))
    config = replace(config, contrastive=contrastive, simclr=simclr, vision=(32, 1, 2), text=(32, 1, 2))
    if name == "simclr":
        return hw4.train_simclr(name, config, corpus, train_ids)
    torch.manual_seed(1)
    start = hw4.build_vision(config).state_dict() if name == "pretrained" else None
    return hw4.train_contrastive(name, config, corpus, train_ids, val_ids, start=start)


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


def sitting(hw4, folder, name, data, *death, **how):
    """Train in a child process that may die; returns its exit status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        hw4.CHECKPOINT_DIR = folder
        if death:
            arm(*death, **how)
        train(hw4, name, *data)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(folder):
    sys.path.insert(0, str(folder))
    import hw4  # the notebook's definitions

    hw4.device, hw4.SAVE_INTERVAL, hw4.choose_dtype = torch.device("cpu"), 0, lambda device: torch.float32
    images, tokens, lengths, num_tokens, *ids = torch.load(folder / "data")
    data = hw4.Corpus(images, tokens, lengths, num_tokens), *ids
    half = lambda write, path, content: write(path, content[: len(content) // 2])  # noqa: E731
    whole = lambda rename, path, target: rename(path, target)  # noqa: E731
    for name in STAGES:
        assert sitting(hw4, folder / "whole", name, data) == 0
        deaths = (
            sitting(hw4, folder / "killed", name, data, hw4, "warmup_cosine", count=14),  # a step of epoch 2
            sitting(hw4, folder / "killed", name, data, Path, "write_bytes", before=half),
            sitting(hw4, folder / "killed", name, data, Path, "replace"),
            sitting(hw4, folder / "killed", name, data, Path, "replace", before=whole),
        )
        assert deaths == 4 * (-signal.SIGKILL,)
        assert sitting(hw4, folder / "killed", name, data) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]))
