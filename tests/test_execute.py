"""The runner of the README: what it keeps of a cell's output."""

import signal
import subprocess
import sys

import execute
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
    with pytest.raises(SystemExit, match="The kernel died .* run this again to go on"):
        main(path, path)
    assert nbformat.read(path, as_version=4).cells[0].outputs  # what was done is kept


def test_ctrl_c_ends_the_running_cell_and_says_so(tmp_path):
    path = tmp_path / "long.ipynb"
    waiting = "import time\ntry:\n    print('begun')\n    time.sleep(60)\nfinally:\n    print('put away')"
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell(waiting), new_code_cell("3")]), path)
    runner = subprocess.Popen(
        [sys.executable, execute.__file__, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in runner.stdout:
        if "begun" in line:
            break
    runner.send_signal(signal.SIGINT)
    output, errors = runner.communicate(timeout=50)
    assert runner.returncode == 1 and "put away\n[cell 2 of 3 failed]\n" in output
    assert errors.strip().splitlines()[-1].startswith("The notebook stopped. KeyboardInterrupt")
    assert "Traceback" not in errors and "ERROR" not in errors
    cells = nbformat.read(path, as_version=4).cells
    assert [bool(cell.outputs) for cell in cells] == [True, True, False]
