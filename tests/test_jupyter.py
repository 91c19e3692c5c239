"""The notebook as its reader uses it: Run All Cells in JupyterLab, and cells run again in a used kernel."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import nbformat
import pytest
from nbclient import NotebookClient
from playwright.sync_api import expect, sync_playwright
from test_notebook import CHROMIUM, STAGES, code_cells, output_text, recorded_hash

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
def fresh(notebook):
    """A copy of the notebook without outputs."""
    copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
    for cell in code_cells(copy):
        cell.outputs, cell.execution_count = [], None
    return copy


@pytest.fixture
def smoke_environment(data_dir, monkeypatch):
    """Environment variables for a short run on synthetic data."""
    monkeypatch.setenv("HW4_PRESET", "smoke")
    monkeypatch.setenv("FLICKR8K_DIR", str(data_dir))
    for name in ("CHECKPOINT_DIR", "HW4_FRESH"):
        monkeypatch.delenv(name, raising=False)


def wait_for_server(server, port, log, seconds=600):
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()}")


@pytest.fixture
def lab(fresh, smoke_environment, tmp_path, monkeypatch):
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
    try:
        wait_for_server(server, port, log)
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
        try:
            page = browser.new_page(viewport={"width": 1400, "height": 1000})
            page.set_default_timeout(2 * MINUTES)
            yield page
        finally:
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


def saved_run(page, path):
    """Save from the menu and return what then is in the file."""
    choose(page, "File", "^Save Notebook(?! As)")
    expect(page.locator(".lm-DockPanel-tabBar .jp-mod-dirty")).to_have_count(0, timeout=2 * MINUTES)
    return code_cells(nbformat.read(path, as_version=4))


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

    # JupyterLab shows errors as stderr.
    red = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts()
    assert [text for text in red if "Traceback" in text] == []
    prompts = shown.locator(".jp-InputPrompt").all_inner_texts()
    assert prompts == [f"[{i + 1}]:" for i in range(count)]
    figures = page.locator(".jp-OutputArea-output img")
    widths = figures.evaluate_all("images => images.map(image => image.complete && image.naturalWidth)")
    assert len(widths) >= 10 and all(width > 100 for width in widths)
    expect(shown.last.locator(".jp-OutputArea-output")).to_contain_text("cells SHA-256")

    cells = saved_run(page, work / "hw4.ipynb")
    assert [c.execution_count for c in cells] == list(range(1, count + 1))
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert re.findall(rf"^({'|'.join(STAGES)}): trained in", output_text(cells), re.M) == STAGES
    assert recorded_hash(cells) == hw4.source_hash([c.source for c in code_cells(fresh)])


def section(notebook, title):
    """Code cells below a heading, up to the next heading."""
    found, inside = [], False
    for cell in notebook.cells:
        if cell.cell_type == "code" and inside:
            found.append(cell)
        elif cell.cell_type == "markdown" and (titles := re.findall(r"^#{1,4} (.+)$", cell.source, re.M)):
            inside = titles[-1] == title
    assert found, title
    return found


def test_cells_can_run_again_in_any_order(fresh, smoke_environment, tmp_path):
    client = NotebookClient(fresh, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    cells = code_cells(fresh)

    def run(cells):
        """Execute `cells` in the kernel, which raises what they raise, and return what they print."""
        for cell in cells:
            client.execute_cell(cell, fresh.cells.index(cell))
        return output_text(cells)

    with client.setup_kernel():
        trained = re.findall(r"^([\w-]+): trained in", run(cells), re.M)
        assert len(trained) > len(STAGES)
        again = run(cells)
        assert list(dict.fromkeys(re.findall(r"^([\w-]+): loaded from", again, re.M))) == trained
        assert not re.search(r"^[\w-]+: trained in", again, re.M) and "starts anew" not in again

        data = section(fresh, "Load & Preprocess Data")
        run(data + data)
        assert f"{trained[0]}: loaded from" in run(section(fresh, "Training and Evaluation")[::-1])
