"""The committed notebook as a grader meets it, and the whole of it executed on synthetic data."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from html.parser import HTMLParser

import nbformat
import pytest
from conftest import ROOT
from execute import visible
from nbclient import NotebookClient
from nbconvert import HTMLExporter

SECTIONS = [
    "Global Setup",
    "Question 1: Learning Vision–Language Representations with Transformers",
    "Load & Preprocess Data",
    "Learning a Shared Vision–Language Representation",
    "Training and Evaluation",
    "Zero-Shot Caption Selection",
    "Improving Visual Representations with Self-Supervised Learning",
    "Reflection",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


STAGES = ["scratch", "simclr", "pretrained", "longer"]


def code_cells(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def output_text(cells):
    """All text that the given cells print or display, without what a progress bar wrote and wiped out again."""
    text = ""
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        shown = "\n".join(["", data.get("text/markdown", ""), data.get("text/plain", ""), ""])
        text += output.text if output.output_type == "stream" else shown
    return "\n".join(map(visible, text.split("\n")))


def recorded_hash(cells):
    return re.search(r"cells SHA-256\s+([0-9a-f]{64})", output_text(cells)).group(1)


def test_valid_and_clean(notebook):
    nbformat.validate(notebook)
    raw = (ROOT / "hw4.ipynb").read_text(encoding="utf-8")
    assert len(raw.encode()) < 3_000_000
    assert "widget-view+json" not in raw and "widgets" not in notebook.metadata
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|content|Users|usr)/", raw)
    assert not re.search(r"\bTODO\b|\bFIXME\b|@@", raw)


def test_one_clean_run_all(notebook):
    cells = code_cells(notebook)
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", cell.source


def test_run_record_belongs_to_this_code(notebook, hw4):
    cells = code_cells(notebook)
    assert recorded_hash(cells) == hw4.source_hash([c.source for c in cells])


def test_saved_run_used_the_whole_data_set(notebook):
    text = output_text(code_cells(notebook))
    assert re.search(r"^preset\s+(cpu|full)$", text, re.M)
    assert "8,091 images with 40,455 captions" in text
    assert "7,091 training and 1,000 validation images" in text


def test_sections_in_the_assignments_order_with_outputs(notebook):
    titles, outputs, current = [], {}, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for title in re.findall(r"^#{1,4} (.+)$", cell.source, re.M):
                titles.append(title)
                current = title
        else:
            outputs[current] = outputs.get(current, 0) + len(cell.outputs)
    assert [t for t in titles if t in SECTIONS] == SECTIONS
    for section in SECTIONS:
        if section not in ("Reflection", "Question 1: Learning Vision–Language Representations with Transformers"):
            assert outputs[section] > 0, section


def test_cells_are_short_and_define_or_run(notebook):
    lengths = [len(c.source.splitlines()) for c in code_cells(notebook)]
    assert max(lengths) <= 45
    assert statistics.median(lengths) <= 15
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    for cell in code_cells(notebook):
        body = ast.parse(cell.source).body
        if "definitions" in cell.metadata.get("tags", []):
            for node in body:
                assert isinstance(node, (*kinds, ast.Assign)), cell.source
                if isinstance(node, ast.Assign):
                    names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                    assert all(name.isupper() for name in names)
        else:
            assert not any(isinstance(node, kinds) for node in body), cell.source


class FontTexts(HTMLParser):
    """Collects the text inside <font color="red">."""

    def __init__(self, html):
        super().__init__()
        self.depth, self.texts = 0, []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "font":
            assert dict(attrs) == {"color": "red"}
            self.depth += 1
            self.texts.append("")

    def handle_endtag(self, tag):
        if tag == "font":
            self.depth -= 1

    def handle_data(self, data):
        if self.depth:
            self.texts[-1] += data


def test_answers_are_red_paragraph_by_paragraph(notebook):
    answers = [c.source for c in notebook.cells if c.cell_type == "markdown" and '<font color="red">' in c.source]
    reflection = next(a for a in answers if "### Reflection" in a)
    assert len(re.findall(r"^\*\*Answer \d\.\*\*", reflection, re.M)) == 4
    assert any("Discussion" in a for a in answers)
    for answer in answers:
        for text in FontTexts(answer).texts:
            assert text.strip() and "\n\n" not in text and "`" not in text
        blocks = re.split(r"\n\s*\n", answer)
        answering = False
        for block in blocks:
            if re.match(r"\*\*(Answer \d|Discussion)\.?\*\*", block):
                answering = True
            elif re.match(r"\*\*Question|#", block):
                answering = False
            elif answering:
                for line in [block] if not block.startswith("- ") else block.split("\n- "):
                    assert line.removeprefix("- ").startswith('<font color="red">') and line.endswith("</font>"), line


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_answers_show_red_in_a_browser(notebook, tmp_path):
    html, _ = HTMLExporter().from_notebook_node(notebook)
    probe = """<script>window.addEventListener("load", () => {
      const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), seen = [];
      while (walk.nextNode()) {
        const node = walk.currentNode;
        if (node.parentElement.closest("font") && node.textContent.trim() && !node.parentElement.closest("script"))
          seen.push(getComputedStyle(node.parentElement).color);
      }
      document.body.innerHTML = "<pre id=colors>" + JSON.stringify(seen) + "</pre>";
    });</script>"""
    page = tmp_path / "hw4.html"
    page.write_text(re.sub(r'<script[^>]*src="https?://[^>]*></script>', "", html) + probe, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'user'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180).stdout
    colors = json.loads(re.search(r'<pre id="colors">(.*?)</pre>', dom, re.S).group(1))
    assert len(colors) >= 8
    assert set(colors) == {"rgb(255, 0, 0)"}


def numbers(text):
    """The numbers in a text, without sign: "from 13.0 to 1,000" -> {"13.0", "1000"}."""
    return {n.replace(",", "") for n in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)}


def test_every_number_in_red_stands_in_the_saved_outputs(notebook):
    measured = numbers(output_text(code_cells(notebook)))
    assert "13.37" not in measured  # this check can fail
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for text in FontTexts(cell.source).texts:
                assert numbers(text) <= measured, f"{numbers(text) - measured}: {text}"


def test_every_answer_quotes_two_results_and_has_a_readable_length(notebook):
    reflection = next(c.source for c in notebook.cells if "### Reflection" in c.source)
    answers = re.split(r"^\*\*Answer \d\.\*\*", reflection, flags=re.M)[1:]
    assert len(answers) == 4
    for answer in answers:
        text = " ".join(FontTexts(answer.split("**Question")[0]).texts)
        assert 120 <= len(text.split()) <= 220, len(text.split())
        assert len({n for n in numbers(text) if "." in n}) >= 2


def test_contents_links_lead_to_headings(notebook):
    text = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    headings = {title.replace(" ", "-") for title in re.findall(r"^#{1,4} (.+)$", text, re.M)}
    links = re.findall(r"^ *- \[.+\]\(#(.+)\)$", notebook.cells[0].source, re.M)
    assert len(links) >= 8 and set(links) <= headings


def test_readme_table_equals_the_notebooks(notebook):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- results -->\n(.*?)\n<!-- end of results -->", readme, re.S).group(1)
    assert block.count("\n") >= 10
    assert block.strip() in output_text(code_cells(notebook))


def test_no_data_or_weights_are_tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {f for f in files if f.startswith("flickr8k/")} == {"flickr8k/README.md"}
    assert not [f for f in files if f.endswith((".jpg", ".png", ".pt", ".npy", ".zip", "captions.txt"))]
    top = {f.split("/")[0] for f in files}
    assert {t for t in top if not t.startswith(".")} == {
        "hw4.ipynb", "flickr8k", "requirements.txt", "README.md", "tests",
    }  # fmt: skip


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "hw4.ipynb", "tests"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


# The whole notebook on synthetic data


@pytest.fixture(scope="module")
def smoke_run(notebook, data_dir, tmp_path_factory):
    """A folder and a function that executes a copy of the notebook there with the smoke preset."""
    folder = tmp_path_factory.mktemp("run")

    def execute(cells=None, **variables):
        copy = nbformat.from_dict(json.loads(json.dumps(notebook)))
        for cell in code_cells(copy):
            cell.outputs, cell.execution_count = [], None
        if cells:
            cells(copy)
        environment = dict(os.environ)
        os.environ.update(FLICKR8K_DIR=str(data_dir), HW4_PRESET="smoke", **variables)
        os.environ.pop("CHECKPOINT_DIR", None)
        try:
            NotebookClient(copy, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
        finally:
            os.environ.clear()
            os.environ.update(environment)
        return copy

    return execute


@pytest.fixture(scope="module")
def first_run(smoke_run):
    return smoke_run()


def test_smoke_run_learns(first_run, hw4):
    text = output_text(code_cells(first_run))
    assert re.findall(r"^(scratch|simclr|pretrained|longer): trained in", text, re.M) == STAGES
    assert len(re.findall(r"^(?:short|views)[\w-]+: trained in", text, re.M)) == 17
    rows = re.findall(r"^\| (?:image → text|text → image), R@5 \| ([\d.]+ \| .*) \|$", text, re.M)
    assert len(rows) == 8  # first screen, from scratch, both, equal compute
    for row in rows:  # chance, models, difference
        chance, *models = (float(cell.split()[0]) for cell in row.split(" | ") if not cell.startswith(("+", "-")))
        assert chance < 10
        assert all(recall > 4 * chance for recall in models)
    cells = code_cells(first_run)
    assert recorded_hash(cells) == hw4.source_hash([c.source for c in cells])
    figures = sum(any(kind.startswith("image/") for kind in o.get("data", {})) for c in cells for o in c.outputs)
    assert figures >= 20


def test_second_run_after_a_change_of_a_figure_loads_all_stages(first_run, smoke_run):
    def recolour(copy):
        cell = next(c for c in copy.cells if "COLORS = " in c.source)
        cell.source = cell.source.replace("tab:blue", "tab:cyan")
        assert "tab:cyan" in cell.source

    text = output_text(code_cells(smoke_run(recolour)))
    assert len(re.findall(r"loaded from .*, trained in .* min on", text)) == len(STAGES) + 18  # one is loaded twice
    assert not re.search(r"^[\w-]+: trained in", text, re.M)


def test_experiments_that_train_can_be_skipped(first_run, smoke_run):
    text = output_text(code_cells(smoke_run(HW4_EXPERIMENTS="0")))
    assert re.findall(r"^(\w+): loaded", text, re.M) == STAGES
    assert "short-" not in text and "batch size |" not in text


def test_changed_definition_trains_again(first_run, smoke_run):
    def sharpen(copy):
        cell = next(c for c in copy.cells if "def nt_xent" in c.source)
        cell.source = cell.source.replace("z @ z.T / temperature", "z @ z.T / temperature * 1.1")
        assert "* 1.1" in cell.source

    text = output_text(code_cells(smoke_run(sharpen, HW4_EXPERIMENTS="0")))
    assert re.search(r"scratch: loaded", text)
    assert re.search(r"simclr: trained", text)
    assert re.search(r"pretrained: trained", text)
