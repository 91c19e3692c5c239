"""Speed and memory of the notebook's definitions on this machine, against torchvision's transforms and open_clip.

FLICKR8K_DIR=… python tests/benchmarks/benchmark.py

Prints a Markdown table of medians of five repeats, both sides of a ratio in turn. Run it on an idle machine.
"""

import resource
import statistics
import sys
import time
import types
from pathlib import Path

import nbformat
import open_clip
import torch
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]


def load():
    """The definitions of the notebook as a module."""
    path = next(p for p in (ROOT / ".next/hw4.ipynb", ROOT / "hw4.ipynb") if p.exists())
    module = types.ModuleType("hw4")
    for cell in nbformat.read(path, as_version=4).cells:
        if "definitions" in cell.metadata.get("tags", []):
            exec(compile(cell.source, path.name, "exec"), module.__dict__)
    module.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return module


def seconds(*actions, repeats=5):
    """Median seconds of each action; they take turns, after one run each that does not count."""
    taken = [[] for _ in actions]
    for _ in range(repeats + 1):
        for times, action in zip(taken, actions, strict=True):
            start = time.perf_counter()
            action()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in taken]


def corpus_of(hw4, config):
    """The real data set as a `Corpus`, and the seconds that decoding took."""
    photo_dir, caption_file = hw4.find_flickr8k()
    captions = hw4.read_captions(caption_file, photo_dir)
    start = time.perf_counter()
    images = torch.stack([hw4.load_image(photo_dir / name, 3 * config.image_size // 2) for name in captions])
    decoding = time.perf_counter() - start
    texts = [text for five in captions.values() for text in five]
    vocabulary = hw4.build_vocabulary(texts)
    tokens, mask = hw4.encode_captions(texts, vocabulary, config.max_tokens)
    tokens = tokens.view(len(images), 5, -1).to(hw4.device)
    return hw4.Corpus(images.to(hw4.device), tokens, mask.sum(-1).view(-1, 5), len(vocabulary)), decoding


def train_step(hw4, model, embed, loss, recipe):
    """An action: one optimizer step on random photos."""
    optimizers = hw4.make_optimizers(model, recipe)

    def step():
        with hw4.autocast(hw4.device):
            embeddings = embed(model, torch.randperm(7000)[: recipe.batch_size], recipe.patch_keep[0])
        loss(*embeddings).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def open_clip_step(hw4, config, corpus):
    """An action: a training step of open_clip at the same sizes, patches, captions and batch, on the same views."""
    width, depth, _ = config.vision
    vision = {"image_size": config.image_size, "patch_size": config.patch_size, "width": width, "layers": depth,
              "head_width": 64, "patch_dropout": 1 - config.contrastive.patch_keep[0]}  # fmt: skip
    text = {"context_length": config.max_tokens, "vocab_size": corpus.num_tokens, "width": config.text[0],
            "heads": config.text[2], "layers": config.text[1]}  # fmt: skip
    model = open_clip.model.CLIP(config.embed_dim, vision, text).to(hw4.device)
    optimizer, loss = torch.optim.AdamW(model.parameters()), open_clip.ClipLoss()
    batch = config.contrastive.batch_size

    def step():
        ids = torch.randperm(7000)[:batch]
        views = hw4.augment(corpus.images[ids], config.image_size, config.contrastive)
        images = model.encode_image(views, normalize=True)
        for caption in range(config.captions_per_image):
            texts = model.encode_text(corpus.tokens[ids, caption], normalize=True)
            loss(images, texts, model.logit_scale.exp()).backward(retain_graph=True)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    hw4 = load()
    config = hw4.PRESETS["cpu" if hw4.device.type == "cpu" else "full"]
    corpus, decoding = corpus_of(hw4, config)
    rows = [("seconds to decode all photos, one thread", f"{decoding:.1f}", "-", "-")]

    photos, recipe = corpus.images[:256], config.simclr
    reference = v2.Compose([
        v2.RandomResizedCrop(config.image_size, (recipe.crop_scale, 1), antialias=True), v2.RandomHorizontalFlip(),
        v2.ColorJitter(*3 * [recipe.color[0]]), v2.RandomGrayscale(recipe.color[1]),
        v2.ToDtype(torch.float32, scale=True),
    ])  # fmt: skip
    ours, theirs = seconds(
        lambda: hw4.augment(photos, config.image_size, recipe), lambda: [reference(photo) for photo in photos]
    )
    rows.append(
        ("SimCLR views/s; torchvision v2, photo by photo", f"{256 / ours:,.0f}", f"{256 / theirs:,.0f}", theirs / ours)
    )

    partial = hw4.functools.partial
    model = hw4.build_dual_encoder(config, corpus.num_tokens).to(hw4.device)
    embed = partial(hw4.embed_pairs, corpus=corpus, config=config)
    loss = partial(hw4.alignment_loss, caption_weight=config.caption_weight)
    contrastive = train_step(hw4, model, embed, loss, config.contrastive)
    network = hw4.SimCLR(hw4.build_vision(config), config.vision[0]).to(hw4.device)
    simclr = train_step(
        hw4, network, partial(hw4.embed_views, corpus=corpus, config=config), hw4.nt_xent, config.simclr
    )
    ours, theirs = seconds(contrastive, open_clip_step(hw4, config, corpus))
    rows.append(
        ("ms a contrastive step; open_clip, float32", f"{1000 * ours:.0f}", f"{1000 * theirs:.0f}", theirs / ours)
    )
    chosen, dtypes = hw4.choose_dtype, (torch.float32, torch.bfloat16)
    for name, step in (("contrastive", contrastive), ("SimCLR", simclr)):
        times = []
        for dtype in dtypes:
            hw4.choose_dtype = lambda device, dtype=dtype: dtype
            times += seconds(step)
        rows.append(
            (
                f"ms a {name} step in bfloat16; in float32",
                *(f"{1000 * t:.0f}" for t in times[::-1]),
                times[0] / times[1],
            )
        )
    hw4.choose_dtype = chosen

    ids = torch.arange(1000)
    (taken,) = seconds(lambda: hw4.monitor(model, ids, corpus, config))
    rows.append(("seconds to embed 1,000 photos and 5,000 captions and rank both ways", f"{taken:.2f}", "-", "-"))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
    peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rows.append(("peak memory [GiB]", f"{peak:.1f}", "-", "-"))

    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {hw4.device}, {hw4.choose_dtype(hw4.device)}\n"
    )
    print("| measurement; reference | ours | reference | times faster |\n| --- | --- | --- | --- |")
    for *cells, ratio in rows:
        print("| " + " | ".join(cells) + f" | {ratio if ratio == '-' else f'{ratio:.2f}'} |")


if __name__ == "__main__":
    sys.exit(main())
