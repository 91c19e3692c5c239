"""The runner of the README: what it keeps of a cell's output."""

from execute import settle
from nbformat.v4 import new_code_cell, new_output


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
