"""Loads the definitions of hw4.ipynb (its cells tagged `definitions`) without running the others."""

import types
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from host import serving
from synthetic import make_flickr8k

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def notebook():
    """The committed notebook."""
    return nbformat.read(ROOT / "hw4.ipynb", as_version=4)


@pytest.fixture(scope="session")
def definition_cells(notebook):
    """Sources of the cells that only define."""
    return [c.source for c in notebook.cells if "definitions" in c.metadata.get("tags", [])]


@pytest.fixture(scope="session")
def hw4(definition_cells):
    """A module with everything that the notebook defines."""
    module = types.ModuleType("hw4")
    for source in definition_cells:
        exec(compile(source, "hw4.ipynb", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A synthetic Flickr8k; tests must not change it."""
    return make_flickr8k(tmp_path_factory.mktemp("data") / "flickr8k")


@pytest.fixture(scope="session")
def smoke(hw4):
    """The smoke preset, cut to a few seconds."""
    config = hw4.PRESETS["smoke"]
    return replace(
        config,
        contrastive=replace(config.contrastive, epochs=2),
        simclr=replace(config.simclr, epochs=1),
        num_val=40,
        num_evaluations=1,
    )


@pytest.fixture(scope="session")
def runtime(hw4):
    return hw4.Runtime(torch.device("cpu"))


@pytest.fixture(scope="session")
def data(hw4, data_dir, smoke, tmp_path_factory):
    """(corpus, train_ids, val_ids, vocabulary) of the synthetic data set."""
    captions = hw4.read_captions(data_dir)
    names = list(captions)
    train_ids, val_ids = hw4.split_images(len(names), smoke.num_val, smoke.seed)
    vocabulary = hw4.build_vocabulary([c for i in train_ids.tolist() for c in captions[names[i]]], smoke.min_count)
    tokens, mask = hw4.encode_captions([c for n in names for c in captions[n]], vocabulary, smoke.max_tokens)
    images = hw4.load_images(data_dir, names, smoke.cache_size, tmp_path_factory.mktemp("cache"))
    shape = (len(names), 5, smoke.max_tokens)
    corpus = hw4.Corpus(images, tokens.view(shape), mask.view(shape).sum(-1), hw4.mirror_tokens(vocabulary))
    return corpus, train_ids, val_ids, vocabulary


@pytest.fixture
def host(monkeypatch):
    """A download host on this machine."""
    monkeypatch.delenv("FLICKR8K_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as host:
        yield host
