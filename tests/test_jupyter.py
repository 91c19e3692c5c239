"""The notebook as its reader uses it: Run All Cells in JupyterLab; cells stopped, changed and run again."""

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time

import nbformat
import pytest
from conftest import NOTEBOOK
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from playwright.sync_api import expect, sync_playwright
from test_notebook import BUDGET, code_cells, headings, output_text, recorded_hash

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


@pytest.fixture
def fresh(data_dir, monkeypatch):
    """The notebook without outputs, and an environment in which it trains shortly on synthetic data."""
    for name in ("CHECKPOINT_DIR", "HW4_FRESH", "MPLBACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HW4_PRESET", "smoke")
    monkeypatch.setenv("FLICKR8K_DIR", str(data_dir))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
        cell.source = cell.source.replace("contrastive=Recipe(8, 32,", "contrastive=Recipe(4, 32,")
    assert "Recipe(4, 32," in "".join(cell.source for cell in notebook.cells)
    return notebook


@pytest.fixture
def lab(fresh, tmp_path, monkeypatch):
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
def test_run_all_cells_in_jupyterlab(lab, page, fresh, hw4):
    address, work = lab
    page.goto(f"{address}/lab/tree/hw4.ipynb")
    count = len(code_cells(fresh))
    shown = page.locator(".jp-Notebook .jp-CodeCell")
    expect(shown).to_have_count(count, timeout=2 * MINUTES)
    wait_until_idle(page)
    choose(page, "Run", "^Run All Cells")
    expect(shown.first.locator(".jp-InputPrompt")).not_to_have_text("[ ]:", timeout=MINUTES)  # it has an effect
    page.wait_for_function(FINISHED, timeout=10 * MINUTES)
    wait_until_idle(page)

    assert shown.locator(".jp-InputPrompt").all_inner_texts() == [f"[{i + 1}]:" for i in range(count)]
    assert page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').count() == 0
    widths = page.locator(".jp-OutputArea-output img").evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(widths) >= 12 and all(width > 100 for width in widths)
    expect(shown.first.locator(".jp-OutputArea-output")).to_contain_text("R@5")  # the opening table is filled in
    colors = page.locator("font").evaluate_all("fonts => fonts.map(f => getComputedStyle(f).color)")
    assert len(colors) >= 5 and set(colors) == {"rgb(255, 0, 0)"}

    choose(page, "File", "^Save Notebook(?! As)")
    expect(page.locator(".lm-DockPanel-tabBar .jp-mod-dirty")).to_have_count(0, timeout=2 * MINUTES)
    cells = code_cells(nbformat.read(work / "hw4.ipynb", as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, count + 1))
    assert recorded_hash(cells) == hw4.source_hash([cell.source for cell in code_cells(fresh)])


class Impatient(NotebookClient):
    """Presses the stop button, once, as soon as the kernel prints `signal`."""

    signal = "scratch-1, epoch 1,"

    def process_message(self, msg, cell, cell_index):
        if self.signal and self.signal in msg["content"].get("text", ""):
            self.signal, self.stopping = None, asyncio.ensure_future(self.km.interrupt_kernel())
        return super().process_message(msg, cell, cell_index)


def section(notebook, title):
    """Code cells below a heading of `BUDGET`, up to the next of them."""
    found, inside = [], False
    for cell in notebook.cells:
        if cell.cell_type == "code" and inside:
            found.append(cell)
        elif cell.cell_type == "markdown" and (titles := [t for t in headings(cell.source) if t in BUDGET]):
            inside = titles[-1] == title
    return found


def test_cells_can_be_stopped_changed_and_run_again_in_any_order(fresh, tmp_path):
    client = Impatient(fresh, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    cells = code_cells(fresh)

    def run(cells):
        """Execute `cells` in the kernel, which raises what they raise, and return what they print."""
        for cell in cells:
            client.execute_cell(cell, fresh.cells.index(cell))
        return output_text(cells)

    def loaded(text):
        return set(re.findall(r"^([^:\n]+): \d+ epochs loaded from", text, re.M))

    with client.setup_kernel():
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"):
            run(cells)
        assert loaded(run(cells)) == {"scratch-0"}  # it goes on
        kept = {path.name.rpartition("-")[0] for path in (tmp_path / "checkpoints").glob("*.pt")}
        again = run(cells)
        assert len(kept) > 10 and loaded(again) == kept and "made by other code" not in again and ", epoch" not in again

        data = section(fresh, "Load & Preprocess Data")
        run(data + data)
        text = run(section(fresh, "Training and Evaluation")[::-1])
        assert loaded(text) == {"scratch-0", "scratch-1"} and "made by other code" not in text

        loss = next(cell for cell in cells if "def nt_xent" in cell.source)
        loss.source = loss.source.replace("z @ z.T / temperature", "z @ z.T / temperature * 1.1")
        text = run([loss, next(cell for cell in cells if "= train_simclr(" in cell.source)])
        assert "simclr: it was made by other code" in text and "* 1.1" in loss.source
