"""The runner of the README: what it keeps of a cell's output."""

import nbformat
import pytest
from execute import main, settle
from nbformat.v4 import new_code_cell, new_notebook, new_output


def stream(name, text):
    return new_output("stream", name=name, text=text)


def test_progress_bars_vanish_and_the_rest_stays():
    cell = new_code_cell("")
    cell.outputs = [
        stream("stderr", "\repoch 1:   0%"),
        stream("stderr", "\repoch 1: 100%"),
        stream("stderr", "\r               \r"),
        stream("stdout", "epoch 1  loss 2\n"),
        stream("stderr", "\repoch 2:   0%"),
        stream("stderr", "\r               \r"),
        stream("stdout", "epoch 2  loss 1\n"),
    ]
    settle(cell)
    assert cell.outputs == [stream("stdout", "epoch 1  loss 2\nepoch 2  loss 1\n")]


def test_warnings_stay():
    cell = new_code_cell("")
    cell.outputs = [stream("stderr", "\rbar 0%\r      \rUserWarning: look\n")]
    settle(cell)
    assert cell.outputs == [stream("stderr", "UserWarning: look\n")]


def test_kernel_that_dies_is_told_in_one_line(tmp_path):
    path = tmp_path / "dies.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("import os; os._exit(1)")]), path)
    with pytest.raises(SystemExit, match="the kernel died .* run this again to go on"):
        main(path, path)
    assert nbformat.read(path, as_version=4).cells[0].outputs  # what was done is kept
