"""Trains in child processes that are killed on the way: killed.py JOB DIRECTORY SEED, started by test_resume.py."""

import os
import pickle
import random
import signal
import sys
import traceback
from pathlib import Path

import torch

MOMENTS = ("gradients", "step done", "writing", "written")
KILLS = 4


def trainings(hw4, corpus, train_ids, val_ids, config, runtime, vision):
    """{stage: train(checkpoint)} of the three trainings; `vision` holds the SimCLR weights of the third."""
    contrastive = (corpus, train_ids, val_ids, config, runtime)
    return {
        "scratch": lambda checkpoint: hw4.train_contrastive(*contrastive, checkpoint),
        "simclr": lambda checkpoint: hw4.train_simclr(corpus, train_ids, config, runtime, checkpoint),
        "pretrained": lambda checkpoint: hw4.train_contrastive(*contrastive, checkpoint, vision),
    }


class HalfWritten:
    """A file that takes half of what is written, puts that on disk, and then calls `die`."""

    def __init__(self, file, die):
        self.file, self.die = file, die

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        self.die()


def arm(hw4, moment, count):
    """Let this process die when it reaches `moment` for the `count`-th time."""
    left = {moment: count}

    def before(owner, name, moment):
        call = getattr(owner, name)

        def reached(*args, **kwargs):
            if arrived(moment):
                die()
            return call(*args, **kwargs)

        setattr(owner, name, reached)

    def arrived(moment):
        left[moment] = left.get(moment, 0) - 1
        return left[moment] == 0

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def write_file(path, write, whole=hw4.write_file):
        return whole(path, (lambda file: write(HalfWritten(file, die))) if arrived("writing") else write)

    before(torch.nn.utils, "clip_grad_norm_", "gradients")
    before(hw4.TrainingRun, "mean_loss", "step done")
    before(os, "fsync", "written")
    hw4.write_file = write_file


def attempt(hw4, name, train, directory, *death):
    """Run a stage in a child process that may die at `death` = (moment, count); returns its exit status."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        if death:
            arm(hw4, *death)
        hw4.run_stage(name, "k" * 64, train, directory)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(job, directory, seed):
    sys.path.insert(0, str(Path(job).parent))  # hw4.py, the notebook's definitions
    import hw4

    hw4.SAVE_INTERVAL = 0
    with open(job, "rb") as file:
        stages = trainings(hw4, *pickle.load(file))
    for name, train in stages.items():
        rng = random.Random(f"{seed} {name}")
        moments = ["writing", *rng.choices(MOMENTS, k=KILLS - 1)]
        rng.shuffle(moments)
        assert attempt(hw4, name, train, Path(directory) / "whole") == 0
        for moment in moments:
            count = rng.randint(1, 3)
            status = attempt(hw4, name, train, Path(directory) / "killed", moment, count)
            print(f"seed {seed}, {name}: killed at {moment!r} number {count}, status {status}")
            assert status == -signal.SIGKILL
        assert attempt(hw4, name, train, Path(directory) / "killed") == 0


if __name__ == "__main__":
    main(*sys.argv[1:])
