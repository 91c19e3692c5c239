"""The notebook as its reader runs it: whole, as a script, in JupyterLab; cells stopped, changed and run again."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import nbformat
import pytest
from conftest import NOTEBOOK
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import ScriptExporter
from outputs import code_cells, output_text, readme_parts, tables
from playwright.sync_api import expect, sync_playwright
from test_execute import run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MINUTES = 60_000  # in milliseconds, as Playwright counts
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # all cells stay in the page, visible or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no question at the start
}
# Some cell has its number, and none waits any more; an error takes the waiting marks off the remaining cells.
FINISHED = """() => {
  const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(p => p.textContent);
  return prompts.some(p => /\\d/.test(p)) && !prompts.some(p => p.includes("*"));
}"""


@pytest.fixture(scope="module")
def executed(data_dir, tmp_path_factory):
    """The notebook executed by the runner on drawn photos, without a network and without Unicode in the terminal.

    Its trainings are kept, so that other tests need not wait for them: `variables` leads there.
    """
    folder = tmp_path_factory.mktemp("executed")
    kept = folder / "kept"
    variables = {"HW4_PRESET": "smoke", "FLICKR8K_DIR": str(data_dir), "CHECKPOINT_DIR": str(kept)}
    variables |= {"OMP_NUM_THREADS": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    shutil.copy(NOTEBOOK, folder / "hw4.ipynb")
    start = time.monotonic()
    output = run(folder / "hw4.ipynb", timeout=600, PYTHONIOENCODING="latin-1", **variables)
    seconds = time.monotonic() - start
    notebook = nbformat.read(folder / "hw4.ipynb", as_version=4)
    return SimpleNamespace(notebook=notebook, output=output, seconds=seconds, kept=kept, variables=variables)


@pytest.fixture
def settings(executed, monkeypatch):
    """An environment for processes that find the trainings of `executed`."""
    monkeypatch.delenv("MPLBACKEND", raising=False)
    for name, value in executed.variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def fresh():
    """The notebook without outputs."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    return notebook


def loaded(text):
    """Names of the trainings that were loaded, not done."""
    return set(re.findall(r"^(.+)-[0-9a-f]{12}\.pt: \d+ epochs of .* loaded", text, re.M))


def trained(text):
    return set(re.findall(r"^(.+): \d+ epochs, loss", text, re.M))


# Whole


def test_all_cells_run_in_order_without_a_warning(executed):
    cells = code_cells(executed.notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [o.output_type if o.output_type != "stream" else o.name for cell in cells for o in cell.outputs]
    assert set(kinds) <= {"stdout", "display_data"}
    assert sum(any(k.startswith("image/") for k in o.get("data", {})) for cell in cells for o in cell.outputs) >= 8
    text = output_text(cells)
    assert "preset smoke" in text and not loaded(text) and "could not" not in text
    assert "image ? text [%] | R@1" in executed.output


def test_it_takes_two_and_a_half_minutes_at_most(executed):
    assert executed.seconds < 150


def test_it_learns(executed, hw4):
    recalls = [shown for shown in tables(executed.notebook) if shown.header[1:2] == ["R@1"]]
    assert len(recalls) == 4  # both ways, from scratch and in the comparison
    guess = 100 * 5 / hw4.PRESETS["smoke"].num_val
    for shown in recalls:
        means = [cells[shown.header.index("R@5") - 1] for label, cells in shown.rows.items() if "−" not in label]
        assert means and all(float(mean.split()[0]) > 2.5 * guess for mean in means), shown.rows


def test_the_readme_tells_its_results(executed):
    parts = readme_parts(executed.notebook)
    assert re.search(r"Recall@5 .* is \*\*[\d.]+ ± [\d.]+ %\*\* with SimCLR first; ", parts["headline"])
    widths = {line.count("|") for line in parts["results"].splitlines()}
    assert widths == {0, 1 + 5, 1 + 6} and "| N = 5 |" in parts["results"]


def test_it_tells_its_length_first_and_its_end_last(executed):
    text = output_text(code_cells(executed.notebook))
    assert text.index("estimated minutes") < min(text.index(" epochs, loss "), text.index("finished"))
    assert re.search(
        r"^finished \d+\.\d minutes after the start\nthe scores are in .*results\.json$", text.strip(), re.M
    )
    results = json.loads((executed.kept / "results.json").read_text(encoding="utf-8"))
    assert len(results) == 3 and all(
        0 <= score <= 1 for run in sum(results.values(), []) for scores in run.values() for score in scores
    )


def test_it_runs_as_a_script_and_prints_its_tables(executed, settings, tmp_path):
    script, _ = ScriptExporter().from_filename(NOTEBOOK)
    (tmp_path / "hw4.py").write_text(script, encoding="utf-8")
    result = subprocess.run([sys.executable, "hw4.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert "\n| image → text [%] | R@1 |" in result.stdout and "\nfinished " in result.stdout
    assert loaded(result.stdout) == trained(output_text(code_cells(executed.notebook))) and not trained(result.stdout)


# In JupyterLab


@pytest.fixture
def lab(fresh, settings, tmp_path, monkeypatch):
    """Address of a JupyterLab and the folder it shows, which holds the notebook without outputs."""
    work, config, log = tmp_path / "work", tmp_path / "config", tmp_path / "lab.log"
    work.mkdir()
    nbformat.write(fresh, work / "hw4.ipynb")
    for name, values in SETTINGS.items():
        path = config / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(values))
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(config))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "share"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={work}"]
    command += ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with open(log, "w") as output:
        server = subprocess.Popen(command, cwd=work, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", work
    finally:
        server.terminate()  # the server takes its kernels with it
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()  # a kernel whose server has gone ends by itself
            server.wait()


@pytest.fixture
def page():
    """An empty page of a headless Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(2 * MINUTES)
        yield page
        browser.close()


def choose(page, menu, item):
    """Click a menu of the menu bar, then the item that matches the regular expression `item`."""
    page.get_by_role("menuitem", name=menu, exact=True).click()
    page.get_by_role("menuitem", name=re.compile(item)).and_(page.locator(".lm-Menu-item")).first.click()


def wait_until_idle(page):
    """Wait until the kernel has started, or has done all it was asked to do.

    The status bar tells it. The notebook's own indicator is idle before there is a kernel, too, and there Run All
    Cells may do nothing.
    """
    expect(page.locator("#jp-main-statusbar")).to_contain_text("| Idle", timeout=2 * MINUTES)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_run_all_cells_in_jupyterlab(lab, page, fresh):
    address, work = lab
    page.goto(f"{address}/lab/tree/hw4.ipynb")
    count = len(code_cells(fresh))
    shown = page.locator(".jp-Notebook .jp-CodeCell")
    expect(shown).to_have_count(count, timeout=2 * MINUTES)
    wait_until_idle(page)
    choose(page, "Run", "^Run All Cells")
    expect(shown.first.locator(".jp-InputPrompt")).not_to_have_text("[ ]:", timeout=MINUTES)  # it has an effect
    page.wait_for_function(FINISHED, timeout=5 * MINUTES)
    wait_until_idle(page)

    assert shown.locator(".jp-InputPrompt").all_inner_texts() == [f"[{i + 1}]:" for i in range(count)]
    assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    widths = page.locator(".jp-OutputArea-output img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(widths) >= 8 and all(width > 100 for width in widths)
    assert page.locator(".jp-OutputArea-output table th", has_text="selection accuracy [%]").count() == 2
    colors = page.locator("font").evaluate_all("fonts => fonts.map(f => getComputedStyle(f).color)")
    assert colors and set(colors) == {"rgb(255, 0, 0)"}

    choose(page, "File", "^Save Notebook(?! As)")
    expect(page.locator(".lm-DockPanel-tabBar .jp-mod-dirty")).to_have_count(0, timeout=2 * MINUTES)
    cells = code_cells(nbformat.read(work / "hw4.ipynb", as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, count + 1))


# Cell by cell


class Session(NotebookClient):
    """A kernel that executes chosen cells; as soon as it prints `signal`, once, its stop button is pressed."""

    signal = None

    def process_message(self, msg, cell, cell_index):
        if self.signal and self.signal in msg["content"].get("text", ""):
            self.signal, self.stopping = None, asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(msg, cell, cell_index)

    def run(self, cells):
        """Execute `cells`, which raises what they raise, and return what they print."""
        for cell in cells:
            self.execute_cell(cell, self.nb.cells.index(cell))
        return output_text(cells)


def section(notebook, title):
    """Code cells below a heading, up to the next one of the same or a higher level."""
    found, level = [], None
    for cell in notebook.cells:
        for marks, heading in re.findall(r"^(#+) (.+)$", cell.source if cell.cell_type == "markdown" else "", re.M):
            if heading == title:
                level = len(marks)
            elif level and len(marks) <= level:
                return found
        if level and cell.cell_type == "code":
            found.append(cell)
    return found


def test_cells_can_be_stopped_changed_and_run_again_in_any_order(executed, settings, fresh, tmp_path, monkeypatch):
    shutil.copytree(executed.kept, tmp_path / "kept")
    monkeypatch.setenv("CHECKPOINT_DIR", str(tmp_path / "kept"))
    (stopped,) = (tmp_path / "kept").glob("scratch-1-*.pt")
    stopped.unlink()
    session = Session(fresh, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    cells = code_cells(fresh)
    choice = next(cell for cell in cells if "PRESETS[preset]" in cell.source)
    training = next(cell for cell in cells if "scratch = [" in cell.source)
    zero_shot = section(fresh, "Zero-Shot Caption Selection")

    with session.setup_kernel():
        session.signal = "scratch-1:  25%"
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            session.run(cells)
        assert re.search(r"scratch-1: [01] of \d+ epochs are kept; run this cell again to go on", output_text(cells))
        text = session.run(cells)
        assert trained(text) == {"scratch-1"} and stopped.exists()

        session.run(2 * section(fresh, "Load & Preprocess Data"))
        text = session.run(section(fresh, "Training and Evaluation")[::-1])
        assert loaded(text) == {"scratch-0", "scratch-1"} and not trained(text)

        choice.source += "\nconfig = replace(config, protocol=replace(config.protocol, candidates=(3, 5)))"
        assert "| N = 10 |" in session.run([choice, *zero_shot])  # still labelled as it was evaluated
        text = session.run([training, *zero_shot])
        assert "| N = 5 |" in text and "| N = 10 |" not in text
        assert loaded(session.run([training])) == {"scratch-0", "scratch-1"}
