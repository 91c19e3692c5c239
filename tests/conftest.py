"""Loads the definitions of the notebook (its cells tagged `definitions`) without running the others."""

import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from host import serving
from synthetic import make_flickr8k

os.environ["MPLBACKEND"] = "Agg"  # before the notebook's definitions import Matplotlib
ROOT = Path(__file__).resolve().parent.parent
NEXT = ROOT / ".next" / "hw4.ipynb"  # a version in the making, if there is one, is tested in place of the saved one
NOTEBOOK = NEXT if NEXT.exists() else ROOT / "hw4.ipynb"


@pytest.fixture(scope="session")
def notebook():
    """The saved notebook, with its outputs."""
    return nbformat.read(ROOT / "hw4.ipynb", as_version=4)


@pytest.fixture(scope="session")
def cells():
    """Sources of all code cells of the notebook whose definitions are tested."""
    return [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="session")
def definition_cells():
    """Sources of the cells that only define."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return [cell.source for cell in cells if "definitions" in cell.metadata.get("tags", [])]


@pytest.fixture(scope="session")
def hw4(definition_cells, tmp_path_factory):
    """A module with everything that the notebook defines, on the CPU in float32 whatever the processor does best.

    `measured_dtype` is the notebook's own `choose_dtype`.
    """
    module = sys.modules["hw4"] = types.ModuleType("hw4")
    for source in definition_cells:
        exec(compile(source, "hw4.ipynb", "exec"), module.__dict__)
    module.device, module.CHECKPOINT_DIR = torch.device("cpu"), tmp_path_factory.mktemp("checkpoints")
    module.measured_dtype, module.choose_dtype = module.choose_dtype, lambda device: torch.float32
    return module


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A synthetic Flickr8k; tests must not change it."""
    return make_flickr8k(tmp_path_factory.mktemp("data") / "flickr8k")


@pytest.fixture(scope="session")
def smoke(hw4):
    """The smoke preset, cut to a few seconds."""
    config = hw4.PRESETS["smoke"]
    contrastive, simclr = replace(config.contrastive, epochs=2), replace(config.simclr, epochs=1)
    return replace(config, contrastive=contrastive, simclr=simclr, num_val=40)


@pytest.fixture(scope="session")
def captions(hw4, data_dir):
    """The captions of the synthetic data set."""
    return hw4.read_captions(data_dir / "captions.txt", data_dir / "Images")


@pytest.fixture(scope="session")
def data(hw4, data_dir, captions, smoke):
    """(corpus, train_ids, val_ids, vocabulary) of the synthetic data set."""
    images = torch.stack([hw4.load_image(data_dir / "Images" / name, 3 * smoke.image_size // 2) for name in captions])
    train_ids, val_ids = hw4.split_images(len(images), smoke.num_val)
    texts = [caption for five in captions.values() for caption in five]
    vocabulary = hw4.build_vocabulary([texts[5 * i + j] for i in train_ids.tolist() for j in range(5)])
    tokens, mask = hw4.encode_captions(texts, vocabulary, smoke.max_tokens)
    corpus = hw4.Corpus(images, tokens.view(len(images), 5, -1), mask.sum(-1).view(-1, 5), len(vocabulary))
    return corpus, train_ids, val_ids, vocabulary


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty working folder without any setting."""
    for name in ("FLICKR8K_DIR", "CHECKPOINT_DIR", "HW4_PRESET", "HW4_FRESH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def host(monkeypatch):
    """A download host on this machine."""
    monkeypatch.delenv("FLICKR8K_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as host:
        yield host
