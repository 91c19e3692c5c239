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
os.environ["OMP_NUM_THREADS"] = "1"  # for the children: two processes with all threads each slow each other down
torch.set_num_threads(1)

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
def hw4(definition_cells):
    """A module with everything that the notebook defines, in float32 whatever the processor does best.

    `measured_dtype` is the notebook's own `choose_dtype`.
    """
    module = sys.modules["hw4"] = types.ModuleType("hw4")
    for source in definition_cells:
        exec(compile(source, "<definitions>", "exec"), module.__dict__)
    module.measured_dtype, module.choose_dtype = module.choose_dtype, lambda device: torch.float32
    return module


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A synthetic Flickr8k of as many photos as the smoke preset takes; tests must not change it."""
    return make_flickr8k(tmp_path_factory.mktemp("data") / "flickr8k")


@pytest.fixture(scope="session")
def smoke(hw4, tmp_path_factory):
    """The smoke preset, cut to a few seconds."""
    config = hw4.PRESETS["smoke"]
    contrastive, simclr = replace(config.contrastive, epochs=2), replace(config.simclr, epochs=1)
    folder = tmp_path_factory.mktemp("checkpoints")
    return replace(config, contrastive=contrastive, simclr=simclr, num_val=40, checkpoint_dir=folder)


@pytest.fixture(scope="session")
def data(hw4, data_dir, smoke):
    """The synthetic data set on the CPU; tests must not change it."""
    return hw4.load_flickr8k(data_dir, smoke, torch.device("cpu"))


@pytest.fixture
def here(monkeypatch, tmp_path):
    """An empty working folder without any setting."""
    for name in ("FLICKR8K_DIR", "CHECKPOINT_DIR", "HW4_PRESET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(here):
    """A synthetic Flickr8k of twelve photos, for tests that change it; nothing else is in the working folder."""
    return make_flickr8k(here / "mine", num_images=12)


@pytest.fixture(scope="session")
def few(smoke):
    """The settings for these twelve."""
    return replace(smoke, num_images=12, num_val=6)


@pytest.fixture
def host(monkeypatch):
    """A download host on this machine."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as host:
        yield host
