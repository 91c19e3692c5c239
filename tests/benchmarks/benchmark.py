"""Measure the speed and memory of hw4.ipynb on the real Flickr8k, side by side with what one would otherwise use.

    python tests/benchmarks/benchmark.py [--preset cpu|full|smoke] [--repeats 5] [--only NAME ...]
    python tests/benchmarks/benchmark.py --profile

prints one Markdown table. The references are torchvision's per-sample transforms in a DataLoader and open_clip
(pip install open_clip_torch). The two sides of a ratio alternate within every repeat; the table has medians, with
the smallest and largest ratio in brackets. Flickr8k is looked for in FLICKR8K_DIR, flickr8k/ and ../shared/flickr8k;
decoded photos are cached where the notebook caches them (CHECKPOINT_DIR, else checkpoints/).
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = [os.environ.get("FLICKR8K_DIR", ""), ROOT / "flickr8k", ROOT.parent / "shared" / "flickr8k"]
CACHE = Path(os.environ.get("CHECKPOINT_DIR", ROOT / "checkpoints"))
NUM_WORKERS = 2  # of the reference DataLoader
PROGRESS = 0.05  # the training progress at which steps are timed; sets nothing but the learning rate


# ---- what is measured


@dataclass
class Bench:
    """The notebook's definitions and everything they need to run on the real data."""

    hw4: types.ModuleType
    config: object
    runtime: object
    folder: Path
    names: list
    images: torch.Tensor  # uint8 (n, 3, S, S) on the CPU
    corpus: object
    train_ids: torch.Tensor
    val_ids: torch.Tensor
    repeats: int

    @property
    def device(self):
        return self.runtime.device

    @property
    def on_gpu(self):
        return self.device.type == "cuda"


def load_notebook():
    """A module with everything that the definition cells of hw4.ipynb define."""
    module = types.ModuleType("hw4")
    for cell in json.loads((ROOT / "hw4.ipynb").read_text(encoding="utf-8"))["cells"]:
        if "definitions" in cell["metadata"].get("tags", []):
            exec(compile("".join(cell["source"]), "hw4.ipynb", "exec"), module.__dict__)
    return module


def find_photos():
    """The folder of Flickr8k; exits with the remedy if there is none."""
    for folder in (Path(place) for place in PHOTOS if place):
        if (folder / "Images").is_dir() and (folder / "captions.txt").is_file():
            return folder
    sys.exit("Flickr8k is not here: set FLICKR8K_DIR to the folder with Images/ and captions.txt")


def prepare(preset, repeats):
    """Load the notebook and the data as its cells do."""
    hw4, folder = load_notebook(), find_photos()
    config = hw4.PRESETS[preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runtime = hw4.choose_runtime(device)
    torch.manual_seed(config.seed)
    captions = dict(list(hw4.read_captions(folder).items())[: config.max_images])
    names = list(captions)
    train_ids, val_ids = hw4.split_images(len(names), config.num_val, config.seed)
    with contextlib.redirect_stderr(io.StringIO()):  # no progress bar
        images = hw4.load_images(folder, names, config.cache_size, CACHE)
    vocabulary = hw4.build_vocabulary([c for i in train_ids.tolist() for c in captions[names[i]]], config.min_count)
    tokens, mask = hw4.encode_captions([c for n in names for c in captions[n]], vocabulary, config.max_tokens)
    tokens, lengths = tokens.view(len(names), 5, -1), mask.sum(-1).view(len(names), 5)
    mirror = hw4.mirror_tokens(vocabulary).to(device)
    corpus = hw4.Corpus(images.to(device), tokens.to(device), lengths, mirror)
    return Bench(hw4, config, runtime, folder, names, images, corpus, train_ids, val_ids, repeats)


# ---- how it is measured


def wait_for(device):
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_a_call(function, device, least=0.6, calls=2):
    """Mean seconds of function() over at least `calls` calls and `least` seconds."""
    wait_for(device)
    count, start = 0, time.perf_counter()
    while count < calls or time.perf_counter() - start < least:
        function()
        wait_for(device)
        count += 1
    return (time.perf_counter() - start) / count


def alternate(repeats, *measures):
    """Call every measure() once a repeat, in turn; one list of `repeats` values each."""
    rounds = [[measure() for measure in measures] for _ in range(repeats)]
    return [list(values) for values in zip(*rounds, strict=True)]


def ratios(ours, reference):
    return [a / b for a, b in zip(ours, reference, strict=True)]


@dataclass
class Row:
    """One line of the table. `met` is None where the goal does not apply."""

    measurement: str
    ours: str
    reference: str = "-"
    ratios: tuple = ()
    goal: str = "-"
    met: bool | None = None

    def cells(self):
        ratio = "-"
        if self.ratios:
            low, middle, high = min(self.ratios), statistics.median(self.ratios), max(self.ratios)
            ratio = f"{middle:.3g} [{low:.3g}, {high:.3g}]"
        met = "-" if self.goal == "-" else {True: "yes", False: "**no**", None: "does not apply"}[self.met]
        return [self.measurement, self.ours, self.reference, ratio, self.goal, met]


def spread(values, digits=3):
    """Median of `values` with the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"


# ---- 1. SimCLR views


def reference_transform(size, recipe):
    """torchvision's per-sample transform with the strengths of `recipe`."""
    jitter = recipe.jitter
    blur = [v2.RandomApply([v2.GaussianBlur(7, (0.1, 2.0))], recipe.blur)] if recipe.blur else []
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(recipe.crop_scale, 1.0), ratio=(3 / 4, 4 / 3)),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(jitter, jitter, jitter, recipe.hue),
            v2.RandomGrayscale(recipe.grayscale),
            *blur,
            v2.PILToTensor(),  # leaves tensors alone
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.45] * 3, [0.27] * 3),
        ]
    )


class ViewPairs(Dataset):
    """Two views each of `photos`: uint8 tensors (3, S, S), or paths of JPEG files that are decoded on every access."""

    def __init__(self, photos, transform):
        self.photos, self.transform = photos, transform

    def __len__(self):
        return len(self.photos)

    def __getitem__(self, index):
        photo = self.photos[index]
        if isinstance(photo, Path):
            with Image.open(photo) as file:
                photo = file.convert("RGB")
        return self.transform(photo), self.transform(photo)


def loader_rate(loader, device):
    """Views/s of a DataLoader whose epoch has two batches a worker: the first ones fill the pipeline, untimed."""
    count = 0
    for index, views in enumerate(loader):
        for view in views:
            view.to(device)
        wait_for(device)
        if index == NUM_WORKERS - 1:
            start = time.perf_counter()
        elif index >= NUM_WORKERS:
            count += sum(map(len, views))
    return count / (time.perf_counter() - start)


def as_published(paths, folder):
    """Write the photos at `paths` into `folder` as JPEGs of 500 x 375 pixels, the usual size of the original files."""
    enlarged = [folder / path.name for path in paths]
    for source, target in zip(paths, enlarged, strict=True):
        with Image.open(source) as photo:
            photo.convert("RGB").resize((500, 375), Image.Resampling.BICUBIC).save(target, quality=90)
    return enlarged


def measure_views(bench):
    with tempfile.TemporaryDirectory() as folder:
        return views_rows(bench, Path(folder))


def views_rows(bench, folder):
    hw4, config, recipe = bench.hw4, bench.config, bench.config.simclr
    batch = min(recipe.batch_size, len(bench.train_ids) // (2 * NUM_WORKERS))
    ids = bench.train_ids[torch.randperm(len(bench.train_ids))][: 2 * NUM_WORKERS * batch]
    transform = reference_transform(config.image_size, recipe)
    paths = [bench.folder / "Images" / bench.names[i] for i in ids.tolist()]
    sources = {"the cached photos": bench.images[ids], "the JPEG files": paths}
    goals = [20, 100] if bench.on_gpu else [5, 10]
    with Image.open(paths[0]) as photo:
        if max(photo.size) < 400:  # a reduced copy of the data: its files are quicker to decode than a student's
            sources["JPEG files enlarged to the published size (500 x 375)"] = as_published(paths, folder)
            goals.append(goals[-1])
    loaders = [
        DataLoader(ViewPairs(photos, transform), batch, num_workers=NUM_WORKERS, persistent_workers=True)
        for photos in sources.values()
    ]

    def two_views():
        photos = bench.corpus.photos(ids[:batch])
        for _ in range(2):
            hw4.augment(photos, config.image_size, recipe)

    measures = [lambda: 2 * batch / seconds_a_call(two_views, bench.device)]
    measures += [lambda loader=loader: loader_rate(loader, bench.device) for loader in loaders]
    for warm_up in measures:
        warm_up()
    ours, *references = alternate(bench.repeats, *measures)
    rows = []
    for source, reference, goal in zip(sources, references, goals, strict=True):
        gain = ratios(ours, reference)
        rows.append(
            Row(
                f"SimCLR views/s, batch {batch}; reference: torchvision v2 in a DataLoader with {NUM_WORKERS} "
                f"workers, from {source}",
                f"{statistics.median(ours):,.0f}",
                f"{statistics.median(reference):,.0f}",
                gain,
                f"≥ {goal}",
                statistics.median(gain) >= goal,
            )
        )
    return rows


# ---- 2. contrastive training step


def draw_batches(bench, count=4):
    """Batches for both sides: augmented images (B, 3, H, W), tokens (B, C, L) and their lengths (B, C)."""
    hw4, config, corpus, batches = bench.hw4, bench.config, bench.corpus, []
    B, C = config.contrastive.batch_size, config.captions_per_image
    for ids in bench.train_ids[torch.randperm(len(bench.train_ids))].split(B)[:count]:
        if len(ids) == B:
            images, _ = hw4.augment(corpus.photos(ids), config.image_size, config.contrastive)
            drawn = torch.rand(B, 5).argsort(1)[:, :C]
            tokens = corpus.tokens[ids[:, None].to(bench.device), drawn.to(bench.device)]
            batches.append((images, tokens, corpus.lengths[ids[:, None], drawn]))
    return itertools.cycle(batches)


def stepper(bench, model, embed, loss, recipe, batches):
    """A function that makes one optimizer step of the notebook's training with the next of `batches`."""
    run = bench.hw4.TrainingRun(model.to(bench.device).train(), recipe, bench.runtime)

    def step():
        run.losses.clear()
        bench.hw4.optimize(run, embed, loss, next(batches), PROGRESS, recipe, bench.runtime)

    return step


def our_step(bench, batches):
    """The notebook's contrastive step on batches that are already augmented."""
    hw4, config = bench.hw4, bench.config

    def embed(model, batch, keep):
        images, tokens, lengths = batch
        image_embeddings = model.encode_image(images, config.contrastive.patch_keep)
        text = hw4.encode_texts(model, tokens.flatten(0, 1), lengths.flatten(), config.length_buckets)
        return image_embeddings, text.view(*lengths.shape, -1).transpose(0, 1), model.logit_scale

    model = hw4.build_dual_encoder(config, len(bench.corpus.mirror))
    return stepper(bench, model, embed, hw4.contrastive_loss, config.contrastive, batches)


def open_clip_model(config, vocabulary_size):
    """An open_clip model with the tower shapes of `config`."""
    import open_clip

    vision = {
        "layers": config.vision_depth,
        "width": config.vision_width,
        "head_width": config.vision_width // config.vision_heads,
        "patch_size": config.patch_size,
        "image_size": config.image_size,
        "patch_dropout": 1 - config.contrastive.patch_keep,
    }
    text = {
        "context_length": config.max_tokens,
        "vocab_size": vocabulary_size,
        "width": config.text_width,
        "heads": config.text_heads,
        "layers": config.text_depth,
    }
    return open_clip.CLIP(config.embed_dim, vision, text)


def open_clip_optimizer(model, recipe):
    """AdamW with the parameter groups and settings of open_clip's training script for ViTs."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        groups[exempt].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": 0.0},
            {"params": groups[False], "weight_decay": recipe.weight_decay},
        ],
        lr=recipe.learning_rate * 0.5,
        betas=(0.9, 0.98),
        eps=1e-6,
    )


def open_clip_step(bench, runtime, batches):
    """A function that makes one step of open_clip's training, with its loss averaged over the sets of captions."""
    import open_clip

    model = open_clip_model(bench.config, len(bench.corpus.mirror)).to(runtime.device).train()
    loss, optimizer = open_clip.ClipLoss(), open_clip_optimizer(model, bench.config.contrastive)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.use_scaler)

    def step():
        images, tokens, _ = next(batches)
        B, C, _ = tokens.shape
        optimizer.zero_grad()
        with runtime.autocast():
            image_features = model.encode_image(images, normalize=True)
            text_features = model.encode_text(tokens.flatten(0, 1), normalize=True).view(B, C, -1)
            scale = model.logit_scale.exp()
            value = sum(loss(image_features, text_features[:, c], scale) for c in range(C)) / C
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def compare_steps(bench, reference_runtime):
    """Milliseconds of a step, ours and open_clip's in `reference_runtime`."""
    steps = our_step(bench, draw_batches(bench)), open_clip_step(bench, reference_runtime, draw_batches(bench))
    for step in steps:
        step()
        step()
    return alternate(
        bench.repeats, *(lambda step=step: 1e3 * seconds_a_call(step, bench.device, least=1, calls=3) for step in steps)
    )


def measure_step(bench):
    try:
        import open_clip
    except ImportError:
        sys.exit("the reference of this measurement is missing: pip install open_clip_torch")
    recipe, name = bench.config.contrastive, str(bench.runtime.dtype).removeprefix("torch.")
    what = f"ms a contrastive step, batch {recipe.batch_size}; reference: open_clip {open_clip.__version__}"
    same = compare_steps(bench, bench.runtime)
    native = not bench.on_gpu and bench.runtime.dtype == torch.bfloat16
    plain = bench.hw4.Runtime(bench.device)
    boxed = same if bench.runtime.dtype == torch.float32 else compare_steps(bench, plain)
    note = "" if native else ", for CPUs with native bfloat16 only"
    rows = []
    for label, (ours, reference), goal, applies in (
        (f"both in {name}", same, 0.9, True),
        (f"out of the box: ours in {name}, open_clip in float32", boxed, 0.4, native),
    ):
        cost = ratios(ours, reference)
        met = statistics.median(cost) <= goal if applies else None
        medians = [f"{statistics.median(values):.1f}" for values in (ours, reference)]
        rows.append(Row(f"{what}, {label}", *medians, cost, f"≤ {goal}{'' if applies else note}", met))
    return rows


# ---- 3. data size and memory


def epoch_seconds(bench, num_images):
    """Seconds of one epoch of the contrastive training on `num_images` images, and how many of them it visited."""
    hw4, config = bench.hw4, bench.config
    recipe = replace(config.contrastive, epochs=1)
    model = hw4.build_dual_encoder(config, len(bench.corpus.mirror)).to(bench.device)
    embed = lambda model, batch, keep: hw4.embed_pairs(model, batch, keep, bench.corpus, config)  # noqa: E731
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        history = hw4.fit(model, embed, hw4.alignment_loss, bench.train_ids[:num_images], recipe, bench.runtime, 0)
    return history[0]["seconds"], num_images // recipe.batch_size * recipe.batch_size


def measure_scaling(bench):
    n, sizes = len(bench.train_ids), (1000, 2000, 4000, 7000)
    if n < sizes[-1]:
        sizes = [n * size // sizes[-1] for size in sizes]
    epoch_seconds(bench, bench.config.contrastive.batch_size)  # warm-up
    seconds, visited = zip(*(epoch_seconds(bench, size) for size in sizes), strict=True)
    fit = np.corrcoef(visited, seconds)[0, 1] ** 2
    slope = 1e3 * np.polyfit(visited, seconds, 1)[0]
    return [
        Row(
            f"seconds a contrastive epoch on {', '.join(f'{size:,}' for size in sizes)} images (one epoch each)",
            ", ".join(f"{value:.2f}" for value in seconds),
            f"straight line, {slope:.2f} s per 1,000 images: R² = {fit:.4f}",
            goal="linear: R² ≥ 0.99",
            met=bool(fit >= 0.99),
        )
    ]


def run_for_memory(preset):
    """Load the data, run a few steps of both trainings and an evaluation, and print the peak memory in bytes."""
    bench = prepare(preset, 1)
    hw4, config, results = bench.hw4, bench.config, io.StringIO()
    bench.images.max()  # reads every photo, as an epoch does
    steps = 3
    with contextlib.redirect_stdout(results), contextlib.redirect_stderr(results):
        short = replace(
            config,
            contrastive=replace(config.contrastive, epochs=1),
            simclr=replace(config.simclr, epochs=1),
            num_evaluations=1,
        )
        ids = bench.train_ids[: steps * short.contrastive.batch_size]
        hw4.train_contrastive(bench.corpus, ids, bench.val_ids, short, bench.runtime)
        hw4.train_simclr(bench.corpus, bench.train_ids[: steps * short.simclr.batch_size], short, bench.runtime)
    if bench.on_gpu:
        print(torch.cuda.max_memory_allocated())
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def measure_memory(bench):
    command = [sys.executable, __file__, "--preset", bench.config.preset, "--memory"]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak = int(output.split()[-1])
    if bench.on_gpu:
        what, value, goal, met = "max_memory_allocated", f"{peak / 1e9:.2f} GB", "≤ 12 GB", peak <= 12e9
    else:
        what, value, goal, met = "resident set", f"{peak / 2**30:.2f} GiB", "≤ 4 GiB", peak <= 4 * 2**30
    return [Row(f"peak memory ({what}) of data, both trainings and an evaluation", value, goal=goal, met=met)]


# ---- 4. FLOP/s


def matmul_rate(bench, recipe, views):
    """A function that returns the FLOP/s of torch.mm at the shape of the ViT's first MLP layer."""
    config = bench.config
    kept = round(recipe.patch_keep * (config.image_size // config.patch_size) ** 2)
    shape = (views * recipe.batch_size * (1 + kept), config.vision_width, 4 * config.vision_width)
    x = torch.randn(shape[0], shape[1], device=bench.device, dtype=bench.runtime.dtype)
    weight = torch.randn(shape[1], shape[2], device=bench.device, dtype=bench.runtime.dtype)
    return lambda: 2 * math.prod(shape) / seconds_a_call(lambda: torch.mm(x, weight), bench.device, calls=5)


def training_steps(bench):
    """Functions that make one whole step of the two trainings, augmentation included: {name: function}."""
    hw4, config, corpus = bench.hw4, bench.config, bench.corpus
    shuffled = bench.train_ids[torch.randperm(len(bench.train_ids))]

    def batches(recipe):
        return itertools.cycle([ids for ids in shuffled.split(recipe.batch_size) if len(ids) == recipe.batch_size])

    dual = hw4.build_dual_encoder(config, len(corpus.mirror))
    simclr = hw4.SimCLR(hw4.build_vision(config), config.vision_width, config.projector_width)
    return {
        "contrastive": stepper(
            bench,
            dual,
            lambda model, ids, keep: hw4.embed_pairs(model, ids, keep, corpus, config),
            hw4.alignment_loss,
            config.contrastive,
            batches(config.contrastive),
        ),
        "simclr": stepper(
            bench,
            simclr,
            lambda model, ids, keep: hw4.embed_views(model, ids, keep, corpus, config),
            hw4.nt_xent,
            config.simclr,
            batches(config.simclr),
        ),
    }


def measure_flops(bench):
    config, rows = bench.config, []
    flops = bench.hw4.training_flops(config, 1, bench.corpus.lengths[bench.train_ids].double().mean().item())
    goal = 0.35 if bench.on_gpu else 0.5
    for name, step in training_steps(bench).items():
        recipe = getattr(config, name)
        flops_a_step = flops[name] / recipe.epochs * recipe.batch_size
        rate = matmul_rate(bench, recipe, 2 if name == "simclr" else 1)

        def achieved(step=step, flops_a_step=flops_a_step):
            return flops_a_step / seconds_a_call(step, bench.device, least=1, calls=3)

        achieved(), rate()  # warm-up
        ours, peak = alternate(bench.repeats, achieved, rate)
        share = ratios(ours, peak)
        medians = [f"{statistics.median(values) / 1e9:,.1f}" for values in (ours, peak)]
        label = {"contrastive": "contrastive", "simclr": "SimCLR"}[name]
        what = f"GFLOP/s of a {label} step with augmentation; reference: torch.mm at the shape of the ViT's MLP"
        rows.append(Row(what, *medians, share, f"≥ {goal}", statistics.median(share) >= goal))
    return rows


# ---- 5. evaluation


def measure_evaluation(bench, num_images=1000):
    hw4, generator = bench.hw4, torch.Generator().manual_seed(0)
    similarity = 2 * torch.rand(num_images, 5 * num_images, generator=generator) - 1
    parts = {
        "ranks": lambda: hw4.retrieval_ranks(similarity),
        "sampled selection": lambda: [hw4.selection_hits(similarity, n) for n in hw4.CANDIDATES],
        "exact selection": lambda: hw4.exact_selection(similarity),
    }

    def timed(part):
        hw4.draw_candidates.cache_clear()
        start = time.perf_counter()
        part()
        return time.perf_counter() - start

    seconds = dict(zip(parts, alternate(bench.repeats, *(lambda p=p: timed(p) for p in parts.values())), strict=True))
    total = [sum(values) for values in zip(*seconds.values(), strict=True)]
    what = f"seconds of Recall@K both ways and caption selection (N = {', '.join(map(str, hw4.CANDIDATES))})"
    what += f" for {num_images:,} x {5 * num_images:,} on the CPU, nothing cached"
    rows = [Row(what, spread(total), goal="< 1 s", met=statistics.median(total) < 1)]
    if not rows[0].met:
        rows += [Row(f"of which {name}", spread(values)) for name, values in seconds.items()]
    return rows


# ---- 6. image cache


def measure_cache(bench):
    with tempfile.TemporaryDirectory() as cache:

        def load():
            start = time.perf_counter()
            with contextlib.redirect_stderr(io.StringIO()):
                bench.hw4.load_images(bench.folder, bench.names, bench.config.cache_size, Path(cache)).max()
            return time.perf_counter() - start

        first, again = load(), [load() for _ in range(bench.repeats)]
    count = f"{len(bench.names):,} photos"
    return [
        Row(f"seconds to decode {count} the first time ({os.cpu_count()} threads)", f"{first:.1f}"),
        Row(
            f"seconds to load and read {count} the next time",
            spread(again),
            goal="< 2 s",
            met=statistics.median(again) < 2,
        ),
    ]


MEASUREMENTS = {
    "views": measure_views,
    "step": measure_step,
    "scaling": measure_scaling,
    "memory": measure_memory,
    "flops": measure_flops,
    "evaluation": measure_evaluation,
    "cache": measure_cache,
}


# ---- output


def hardware(bench):
    """One line that names what the numbers depend on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    processor = f"{name}, {torch.get_num_threads()} threads"
    if bench.on_gpu:
        processor = f"{torch.cuda.get_device_name()} (CPU: {processor})"
    precision = str(bench.runtime.dtype).removeprefix("torch.")
    return (
        f"{processor}; torch {torch.__version__}; precision {precision} ({bench.runtime.reason}); "
        f"preset {bench.config.preset}; {bench.repeats} repeats"
    )


def profiled_calls(bench):
    """What --profile looks into: {name: function}."""
    config = bench.config
    photos = bench.corpus.photos(bench.train_ids[:256])
    steps = {f"one {name} step": step for name, step in training_steps(bench).items()}
    return steps | {
        f"a SimCLR view of {len(photos)} photos": lambda: bench.hw4.augment(photos, config.image_size, config.simclr)
    }


def profile_table(bench, name, call, top=15):
    """Markdown table of the `top` operators of one call by their own time."""
    from torch.profiler import ProfilerActivity, profile

    call()
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.on_gpu
    with profile(activities=activities) as profiler:
        call()
        wait_for(bench.device)
    own = lambda event: event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total  # noqa: E731
    events = sorted(profiler.key_averages(), key=own, reverse=True)
    total = sum(map(own, events))
    rows = [
        [e.key.replace("|", "\\|"), str(e.count), f"{own(e) / 1e3:.2f}", f"{own(e) / total:.1%}"] for e in events[:top]
    ]
    header = [f"operator of {name} ({total / 1e3:.0f} ms)", "calls", "own time [ms]", "share"]
    return bench.hw4.markdown_table(header, rows).data


def main():
    parser = argparse.ArgumentParser(description="Benchmarks of hw4.ipynb on the real Flickr8k.")
    parser.add_argument("--preset", choices=("cpu", "full", "smoke"), help="default: full on a GPU, else cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS), metavar="NAME",
                        help="some of: " + ", ".join(MEASUREMENTS))  # fmt: skip
    parser.add_argument(
        "--profile", action="store_true", help="print the costliest operators of a step and a view instead"
    )
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    preset = arguments.preset or ("full" if torch.cuda.is_available() else "cpu")
    if arguments.memory:
        return run_for_memory(preset)
    bench = prepare(preset, arguments.repeats)
    print(hardware(bench), "\n", sep="", flush=True)
    if arguments.profile:
        for name, call in profiled_calls(bench).items():
            print(profile_table(bench, name, call), "\n", sep="")
        return
    print(bench.hw4.markdown_table(["measurement", "ours", "reference", "ratio [min, max]", "goal", "met?"], []).data)
    for name in arguments.only:
        start = time.perf_counter()
        for row in MEASUREMENTS[name](bench):
            print("| " + " | ".join(row.cells()) + " |", flush=True)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
