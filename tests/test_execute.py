"""The runner of the README: what it shows, keeps and survives; its demo executes the whole notebook."""

import os
import re
import signal
import subprocess
import sys

import execute
import nbformat
import pytest
from conftest import NOTEBOOK
from execute import main, settle
from nbformat.v4 import new_code_cell, new_notebook, new_output
from test_notebook import code_cells, output_text, recorded_hash


def stream(name, text):
    return new_output("stream", name=name, text=text)


def write(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def runner(*arguments, **variables):
    """The runner as a process of its own."""
    command = [sys.executable, execute.__file__, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"} | variables
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_progress_bars_vanish_and_the_rest_stays():
    cell = new_code_cell("")
    bar, wiped = "\repoch 1:   0%", "\r               \r"
    cell.outputs = [stream("stdout", bar), stream("stdout", wiped + "epoch 1  loss 2\n"), stream("stdout", bar + wiped)]
    cell.outputs += [stream("stderr", bar + wiped + "UserWarning: look\n"), stream("stderr", bar + wiped)]
    settle(cell)
    assert cell.outputs == [stream("stdout", "epoch 1  loss 2\n"), stream("stderr", "UserWarning: look\n")]


def test_failure_and_death_are_told_in_one_line_and_the_rest_is_kept(tmp_path):
    for last, message in (
        ("1 / 0", "^The notebook stopped. ZeroDivisionError: division by zero$"),
        ("import os; os._exit(1)", "^The kernel died .* run this again to go on"),
    ):
        path = write(tmp_path / "fails.ipynb", "1 + 1", last, "2")
        with pytest.raises(SystemExit, match=message):
            main(path, path)
        assert nbformat.read(path, as_version=4).cells[0].outputs[0].data["text/plain"] == "2"


def test_ctrl_c_ends_the_running_cell_and_says_so(tmp_path):
    waiting = "import time\ntry:\n    print('begun')\n    time.sleep(60)\nfinally:\n    print('put away')"
    path = write(tmp_path / "long.ipynb", "1 + 1", waiting, "3")
    process = runner(path)
    for line in process.stdout:
        if b"begun" in line:
            break
    process.send_signal(signal.SIGINT)
    output, errors = (text.decode() for text in process.communicate(timeout=50))
    assert process.returncode == 1 and "put away\n[cell 2 of 3 failed]\n" in output
    assert errors.strip().splitlines()[-1].startswith("The notebook stopped. KeyboardInterrupt")
    assert "Traceback" not in errors and "ERROR" not in errors
    assert [bool(cell.outputs) for cell in nbformat.read(path, as_version=4).cells] == [True, True, False]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(folder, output) of a demo without Unicode in the terminal, without a network, and with nothing kept before."""
    folder, temporary = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("temporary")
    before = NOTEBOOK.read_bytes()
    (folder / "hw4.ipynb").write_bytes(before)
    proxy = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    process = runner("--demo", folder / "hw4.ipynb", PYTHONIOENCODING="latin-1", TMPDIR=str(temporary), **proxy)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    assert not list(temporary.glob("tmp*")) and (folder / "hw4.ipynb").read_bytes() == before
    return folder, output.decode("latin-1")


def test_demo_shows_all_and_leaves_a_copy_only(demo):
    folder, output = demo
    assert sorted(path.name for path in folder.iterdir()) == ["hw4.ipynb", "try.ipynb"]
    assert "image ? text, R@5" in output and "→" not in output
    cells = code_cells(nbformat.read(folder / "try.ipynb", as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [o.output_type if o.output_type != "stream" else o.name for cell in cells for o in cell.outputs]
    assert "error" not in kinds and "stderr" not in kinds
    assert sum("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs) >= 12


def test_demo_learns(demo, hw4):
    cells = code_cells(nbformat.read(demo[0] / "try.ipynb", as_version=4))
    text = output_text(cells)
    assert recorded_hash(cells) == hw4.source_hash([cell.source for cell in cells])
    assert "preset smoke" in text and "loaded from" not in text
    rows = re.findall(r"^\| (?:image → text|text → image), R@5 \| (.*) \|$", text, re.M)
    assert len(rows) == 6  # opening, from scratch, comparison
    for row in rows:
        assert all(float(score) > 4 * 100 / 12 for score in re.findall(r"(?:^|\| )(\d+\.\d)", row)), row
