"""The runner of the README, on small notebooks: what it shows, keeps and survives."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import execute
import nbformat
import pytest
from execute import main, settle
from nbformat.v4 import new_code_cell, new_notebook, new_output
from outputs import output_text


def stream(name, text):
    return new_output("stream", name=name, text=text)


def write(path, *sources):
    nbformat.write(new_notebook(cells=[new_code_cell(source) for source in sources]), path)
    return path


def runner(*arguments, **variables):
    """The runner as a process of its own."""
    command = [sys.executable, execute.__file__, *map(str, arguments)]
    left_out = ("MPLBACKEND", "OMP_NUM_THREADS", "HW4_PRESET", "FLICKR8K_DIR", "CHECKPOINT_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | variables
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def run(*arguments, timeout=60, **variables):
    """What the runner prints; it must not fail or print errors."""
    process = runner(*arguments, **variables)
    output, errors = process.communicate(timeout=timeout)
    assert process.returncode == 0 and not errors, errors.decode()
    return output.decode(variables.get("PYTHONIOENCODING", "utf-8"))


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


def interrupted(path):
    """(output, errors) of a run that gets Ctrl-C when a cell has printed "begun"."""
    process = runner(path)
    for line in process.stdout:
        if b"begun" in line:
            break
    process.send_signal(signal.SIGINT)
    output, errors = (text.decode() for text in process.communicate(timeout=50))
    assert process.returncode == 1
    return output, errors


def test_ctrl_c_ends_the_running_cell_and_says_so(tmp_path):
    waiting = "import time\ntry:\n    print('begun')\n    time.sleep(60)\nfinally:\n    print('put away')"
    path = write(tmp_path / "long.ipynb", "1 + 1", waiting, "3")
    output, errors = interrupted(path)
    assert "put away\n[cell 2 of 3 failed]\n" in output
    assert errors == "The notebook stopped. Run the same command again to go on.\n"
    assert [bool(cell.outputs) for cell in nbformat.read(path, as_version=4).cells] == [True, True, False]


def test_ctrl_c_stops_before_the_next_cell_where_no_cell_was_ended(tmp_path):
    deaf = "import time\ntry:\n    print('begun')\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('went on')"
    path = write(tmp_path / "deaf.ipynb", deaf, "print('not reached')")
    output, errors = interrupted(path)
    assert "went on\n[cell 1 of 2]\n" in output and "not reached" not in output
    assert errors == "The notebook stopped. Run the same command again to go on.\n"


SETTINGS = "import os\nfor name in ('HW4_PRESET', 'OMP_NUM_THREADS'): print(name, os.environ.get(name))"


def test_smoke_computes_on_one_thread_unless_more_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("HW4_PRESET", raising=False)
    path = write(tmp_path / "settings.ipynb", SETTINGS)
    for variables, threads in (({}, None), ({"HW4_PRESET": "smoke"}, 1)):
        main(path, path, **variables)
        assert f"OMP_NUM_THREADS {threads}\n" in capsys.readouterr().out
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    main(path, path, HW4_PRESET="smoke")
    assert "OMP_NUM_THREADS 2\n" in capsys.readouterr().out


def test_demo_draws_photos_and_leaves_a_copy_and_a_page_only(tmp_path):
    drawn = "from pathlib import Path\ndata = Path(os.environ['FLICKR8K_DIR'])\nprint(len(list(data.rglob('*.jpg'))))"
    kept = "kept = Path(os.environ['CHECKPOINT_DIR'])\nkept.mkdir()\n(kept / 'scratch.pt').touch()\nprint(data, kept)"
    path = write(tmp_path / "hw4.ipynb", SETTINGS, drawn, kept)
    (tmp_path / "temporary").mkdir()
    before = path.read_bytes()
    output = run("--demo", path, TMPDIR=str(tmp_path / "temporary"))

    assert sorted(p.name for p in tmp_path.iterdir()) == ["hw4.ipynb", "temporary", "try.html", "try.ipynb"]
    assert path.read_bytes() == before and not list((tmp_path / "temporary").glob("tmp*"))
    text = output_text(nbformat.read(tmp_path / "try.ipynb", as_version=4).cells)
    assert text.startswith("HW4_PRESET smoke\nOMP_NUM_THREADS 1\n320\n")
    assert not any(Path(folder).exists() for folder in text.split()[-2:])
    page = re.search(r"open file://(\S+) in a browser\n$", output)[1]
    assert Path(page) == tmp_path / "try.html" and "HW4_PRESET smoke" in Path(page).read_text(encoding="utf-8")
