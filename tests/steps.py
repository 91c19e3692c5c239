"""Random data of the shape of Flickr8k and single steps of both trainings, for tests and benchmarks."""

from dataclasses import replace

import torch

KINDS = ("contrastive", "simclr")


def random_data(hw4, config, num_images, num_tokens=3000, device="cpu"):
    """Photos of noise, 64 of them over and over, and captions of 6 or more words; an eighth is for validation."""
    generator = torch.Generator().manual_seed(0)
    side = 3 * config.image_size // 2
    ids = torch.arange(num_images)
    images = torch.randint(256, (64, 3, side, side), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(3, num_tokens, (num_images, 5, config.max_tokens), generator=generator)
    lengths = torch.randint(6, config.max_tokens + 1, (num_images, 5, 1), generator=generator)
    mask = torch.arange(config.max_tokens) < lengths
    tensors = [images, ids, tokens.masked_fill(~mask, hw4.PAD), mask]
    images, ids, *texts = [tensor.to(torch.device(device)) for tensor in tensors]

    num_val = num_images // 8
    vocabulary = dict.fromkeys(range(num_tokens))
    return hw4.Flickr8k([], vocabulary, images[ids % 64], *texts, ids[num_val:], ids[:num_val], "random")


def make_task(hw4, kind, data, config):
    """A training of this kind from its beginning."""
    torch.manual_seed(0)
    model = hw4.SimCLR(config) if kind == "simclr" else hw4.DualEncoder(len(data.vocabulary), config)
    task = hw4.SimCLRTask if kind == "simclr" else hw4.ContrastiveTask
    return task(model.to(data.images.device), data, config, getattr(config, kind))


def with_batches_of(size, config):
    """`config` with batches of `size` photos and one epoch."""
    changes = {kind: replace(getattr(config, kind), batch_size=size, epochs=1) for kind in KINDS}
    if hasattr(config, "protocol"):  # unlike in older builds
        changes["protocol"] = replace(config.protocol, block_sizes=(size // 2,))
    return replace(config, **changes)


def trainer(hw4, task):
    """A function that makes so many steps of `task` as the notebook does, and returns the mean loss."""
    device = task.data.images.device
    optimizers = hw4.make_optimizers(task.model, task.recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=hw4.choose_dtype(device) == torch.float16)
    ids = task.data.train_ids

    def train(num_steps):
        return hw4.train_epoch(task, ids[: num_steps * task.recipe.batch_size], 0, optimizers, scaler)

    return train


def parts(hw4):
    """(name, owner, attribute) of the parts of a step, for `PretendedGPU.cost_of_a_step`."""
    return [
        ("augmentation", hw4, "augment"),
        ("ViT", hw4.VisionTransformer, "forward"),
        ("text", hw4, "encode_captions"),
        ("loss", hw4.ContrastiveTask, "loss"),
        ("loss", hw4, "nt_xent"),
        ("backward", torch.Tensor, "backward"),
        ("Muon", hw4.Muon, "step"),
        ("AdamW", torch.optim.AdamW, "step"),
    ]
