"""One trial of the search for settings: a training judged on photos that are held out of the training part.

    FLICKR8K_DIR=… python tests/benchmarks/search.py NAME [--config JSON] [--simclr JSON] [--contrastive JSON]

The JSON objects change fields of the preset `cpu` and of its two recipes; `--simclr '{"epochs": 0}'` leaves SimCLR out.
The validation photos of the notebook are never used; the vocabulary is that of the whole training part. Trainings are
kept in checkpoints/search/ and gone on with.
"""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from benchmark import definitions, read_build

HELD_OUT, SPLIT_SEED = 1000, 7


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    for part in ("config", "simclr", "contrastive"):
        parser.add_argument(f"--{part}", type=json.loads, default={})
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()

    hw4 = definitions(read_build())
    preset, without_simclr = hw4.PRESETS["cpu"], given.simclr.get("epochs") == 0
    config = replace(
        preset,
        checkpoint_dir=Path("checkpoints/search"),
        simclr=preset.simclr if without_simclr else replace(preset.simclr, **given.simclr),
        contrastive=replace(preset.contrastive, **given.contrastive),
        **given.config,
    )
    config.checkpoint_dir.mkdir(parents=True, exist_ok=True)

    data = hw4.load_flickr8k(Path(os.environ["FLICKR8K_DIR"]), config, torch.device("cpu"))
    train_ids = data.train_ids.sort().values  # so the split is that of the trials before
    order = torch.randperm(len(train_ids), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held_out, rest = train_ids[order[:HELD_OUT]].sort().values, train_ids[order[HELD_OUT:]].sort().values
    data = replace(data, train_ids=rest, val_ids=held_out, fingerprint=f"{data.fingerprint}, held out")

    vision = None
    if not without_simclr:
        vision, history = hw4.pretrain_simclr("simclr", data, config)
        print(f"SimCLR: loss {history[-1]['loss']:.3f}, {sum(record['seconds'] for record in history):.0f} s")
    for seed in range(given.seeds):
        start = time.perf_counter()
        run = hw4.train_contrastive(given.name, data, config, seed, vision)
        percent = {}
        for measure, values in run.scores.items():
            means = (100 * values.mean(0)).tolist()
            numbers = run.numbers[measure]
            percent |= {(measure, number): mean for number, mean in zip(numbers, means, strict=True)}
        total = sum(percent[way, K] for way in (hw4.TO_TEXT, hw4.TO_IMAGE) for K in (1, 5, 10))
        columns = [total, percent[hw4.TO_TEXT, 5], percent[hw4.TO_IMAGE, 5]]
        columns += [percent[hw4.SELECTION, N] for N in (5, 25)]
        print(
            f"{given.name}, seed {seed}: sum of recalls {columns[0]:.1f}, R@5 {columns[1]:.1f} and {columns[2]:.1f}, "
            f"selection {columns[3]:.1f} and {columns[4]:.1f}, {time.perf_counter() - start:.0f} s"
        )


if __name__ == "__main__":
    main()
