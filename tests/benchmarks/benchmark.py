"""Steps of the notebook on this machine, beside those of an older build.

    python tests/benchmarks/benchmark.py [--old COMMIT] [--repeats 7] [--only counts|times]

Prints Markdown tables. Times are medians of repeats in which all sides take turns; they want an idle machine. Counts
(kernels, copies, memory of photos) are taken on a pretended GPU and do not. No data set is needed: photos and captions
are random, of Flickr8k's sizes. With ONEDNN_MAX_CPU_ISA=AVX512_CORE a processor that has native bfloat16 computes as
one without it.
"""

import argparse
import contextlib
import functools
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
import unittest.mock
from dataclasses import replace
from pathlib import Path

import nbformat
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from pretended import PretendedGPU  # noqa: E402
from steps import KINDS, make_task, random_data, trainer, with_batches_of  # noqa: E402
from synthetic import make_flickr8k  # noqa: E402

NUM_TOKENS = 3000


def read_build(commit=None):
    """The notebook of a commit; without one, that of the working tree."""
    if commit:
        command = ["git", "show", f"{commit}:hw4.ipynb"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    else:
        path = next(p for p in (ROOT / ".next/hw4.ipynb", ROOT / "hw4.ipynb") if p.exists())
        text = path.read_text(encoding="utf-8")
    return nbformat.reads(text, as_version=4)


def definitions(notebook):
    """The definitions of a notebook as a module."""
    module = types.ModuleType("hw4")
    for cell in notebook.cells:
        if "definitions" in cell.metadata.get("tags", []):
            exec(compile(cell.source, "<definitions>", "exec"), module.__dict__)
    return module


def old_trainer(old, kind, data, config):
    """A function that makes so many steps as the loop of the older build does."""
    device = data.images.device
    corpus = old.Corpus(data.images, data.tokens, data.mask.sum(-1).cpu(), NUM_TOKENS)
    recipe = getattr(config, kind)
    if kind == "simclr":
        model = old.SimCLR(old.build_vision(config), config.vision[0])
        embed, loss = old.embed_views, old.nt_xent
    else:
        model = old.build_dual_encoder(config, NUM_TOKENS)
        embed, loss = old.embed_pairs, functools.partial(old.alignment_loss, caption_weight=config.caption_weight)
    optimizers = old.make_optimizers(model.to(device), recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=old.choose_dtype(device) == torch.float16)
    ids = data.train_ids.cpu()

    def train(num_steps):
        losses = []
        for batch in ids[torch.randperm(len(ids))].split(recipe.batch_size)[:num_steps]:
            with old.autocast(device):
                embeddings = embed(model, batch, recipe.patch_keep[0], corpus, config)
            value = loss(*embeddings)
            scaler.scale(value).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            losses.append(value.detach())
        return torch.stack(losses).mean().item()

    return train


# Counts


def count_steps(old, new):
    """Rows of kernels and copies that a step of the preset `full` costs, both builds."""
    full = new.PRESETS["full"]
    config = with_batches_of(16, replace(full, protocol=replace(full.protocol, block_sizes=())))
    old_config = with_batches_of(16, old.PRESETS["full"])
    rows = []
    for kind in KINDS:
        with PretendedGPU() as gpu:
            data = random_data(new, config, 128, NUM_TOKENS, "cuda")
            sides = old_trainer(old, kind, data, old_config), trainer(new, make_task(new, kind, data, config))
            costs = [gpu.cost_of_a_step(train) for train in sides]
        for name, counts in (("kernels", [c[1] for c in costs]), ("copies, host and device", [c[0] for c in costs])):
            rows.append((f"{name} of a {kind} step, `full`", *(sum(count.values()) for count in counts)))
    return rows


def photo_tensors(notebook):
    """How many times the photos are held, on the host or on a pretended GPU, after the cells that load them."""
    space = {"__name__": "hw4", "display": lambda *_, **__: None}
    end = next(i for i, cell in enumerate(notebook.cells) if "### Learning a Shared" in cell.source)
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        data = make_flickr8k(Path(folder) / "flickr8k")
        settings = {"HW4_PRESET": "smoke", "FLICKR8K_DIR": str(data), "CHECKPOINT_DIR": folder, "MPLBACKEND": "Agg"}
        with PretendedGPU(), contextlib.redirect_stdout(nowhere), unittest.mock.patch.dict(os.environ, settings):
            for cell in notebook.cells[:end]:
                if cell.cell_type == "code":
                    exec(compile(cell.source, "<cell>", "exec"), space)
            gc.collect()
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
            photos = [x for x in tensors if x.dtype == torch.uint8 and x.ndim == 4 and len(x) == 320]
            return len({x.untyped_storage().data_ptr() for x in photos})


# Times


class Stopwatch:
    """Seconds that all optimizers have spent in `step`; on a GPU, those of the host."""

    def __init__(self):
        self.spent = 0.0
        register_optimizer_step_pre_hook(self.begin)
        register_optimizer_step_post_hook(self.end)

    def begin(self, *_):
        self.begun = time.perf_counter()

    def end(self, *_):
        self.spent += time.perf_counter() - self.begun


def take_turns(actions, repeats, stopwatch):
    """Medians of (seconds, seconds in optimizers) of each action, after one run each that does not count."""
    taken = [[] for _ in actions]
    for _ in range(repeats + 1):
        for times, action in zip(taken, actions, strict=True):
            before, start = stopwatch.spent, time.perf_counter()
            action()  # it ends by reading the loss, so a GPU has finished
            times.append((time.perf_counter() - start, stopwatch.spent - before))
    return [[statistics.median(column) for column in zip(*times[1:], strict=True)] for times in taken]


def time_steps(old, new, preset, device, repeats, num_steps=2):
    """Rows of the milliseconds of a step and of its optimizers, both builds and precisions."""
    config, old_config, stopwatch = new.PRESETS[preset], old.PRESETS[preset], Stopwatch()
    measured = {}
    for kind in KINDS:
        batch = getattr(config, kind).batch_size
        data = random_data(new, config, 2 * num_steps * batch, NUM_TOKENS, device)
        for dtype in (torch.float32, torch.bfloat16):
            old.choose_dtype = new.choose_dtype = lambda device, dtype=dtype: dtype
            sides = old_trainer(old, kind, data, old_config), trainer(new, make_task(new, kind, data, config))
            actions = [functools.partial(train, num_steps) for train in sides]
            measured[kind, dtype] = take_turns(actions, repeats, stopwatch)

    rows = []
    for (kind, dtype), sides in measured.items():
        for part, title in enumerate((f"ms a {kind} step", "… its optimizers")):
            rows.append((f"{title}, {str(dtype)[6:]}", *(1000 * side[part] / num_steps for side in sides)))
    return rows


def show(title, rows):
    print(f"\n| {title} | before | now | now / before |\n| --- | --- | --- | --- |")
    for name, before, now in rows:
        ratio = f"{now / before:.2f}" if before else "-"
        print(f"| {name} | {before:,.{0 if before > 99 else 1}f} | {now:,.{0 if now > 99 else 1}f} | {ratio} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="db01766", help="commit of the older build")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=("counts", "times"))
    given = parser.parse_args()
    builds = read_build(given.old), read_build()
    old, new = map(definitions, builds)

    threads = torch.get_num_threads()
    if given.only != "times":
        torch.set_num_threads(1)  # the machine need not be idle
        photos = [("photos in memory (times)", *map(photo_tensors, builds))]
        show("on a pretended GPU", count_steps(old, new) + photos)
    if given.only != "counts":
        torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        preset = "full" if device.type == "cuda" else "cpu"
        name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
        title = f"preset `{preset}` on {name}, torch {torch.__version__}"
        show(title, time_steps(old, new, preset, device, given.repeats))


if __name__ == "__main__":
    main()
