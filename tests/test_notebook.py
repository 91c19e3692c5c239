"""The notebook as a grader meets it: order, length and text, and the outputs that were saved."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize

import nbformat
import pytest
from conftest import NEXT, NOTEBOOK, ROOT
from execute import visible
from nbconvert import HTMLExporter

BUDGET = {  # code lines by section, in order
    "Deep Learning: Assignment #4": 10,
    "Global Setup": 75,
    "Load & Preprocess Data": 110,
    "Learning a Shared Vision–Language Representation": 130,
    "Training and Evaluation": 230,
    "Zero-Shot Caption Selection": 55,
    "Improving Visual Representations with Self-Supervised Learning": 90,
    "Experiments behind the answers": 110,
    "Reflection": 15,  # with the run record
}
MOST = {"lines": 820, "cells": 64, "median": 12, "longest": 40, "words": 3000, "bytes": 6_000_000}
ASSIGNMENT = ROOT.parent / "shared" / "assignment.txt"
final = pytest.mark.skipif(NEXT.exists(), reason="the saved notebook is the old one until .next/ takes its place")


@pytest.fixture(scope="module")
def source():
    """The notebook whose code and text are tested; `notebook` is the saved one, whose outputs are."""
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


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


def headings(text):
    return re.findall(r"^#{1,4} (.+)$", text, re.M)


def numbers(text):
    """The numbers in a text, without sign: "from 13.0 to 1,000" -> {"13.0", "1000"}."""
    return {n.replace(",", "") for n in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)}


# Length and order


def code_lines(source):
    """Number of physical lines that hold code, without docstrings, comments and blank lines."""
    lines, skipped = set(), {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_the_counter_counts_lines_of_code():
    text = '"Module."\n\n# comment\ndef f(a,\n      b):\n    "Doc."\n    return """x\n\ny"""  # three\n'
    assert code_lines(text) == 5


def test_budgets(source):
    section, lines, sizes = None, dict.fromkeys(BUDGET, 0), []
    for cell in source.cells:
        if cell.cell_type == "markdown":
            section = next((title for title in reversed(headings(cell.source)) if title in BUDGET), section)
        else:
            sizes.append(code_lines(cell.source))
            lines[section] += sizes[-1]
    words = sum(len(text.split()) for text in markdown(source))
    found = {"lines": sum(sizes), "cells": len(sizes), "median": statistics.median(sizes), "longest": max(sizes)}
    found |= {"words": words}
    assert {k: v for k, v in lines.items() if v > BUDGET[k]} == {}
    assert {k: v for k, v in found.items() if v > MOST[k]} == {}


def test_sections_in_order_and_linked_from_the_contents(source):
    titles = headings("\n".join(markdown(source)))
    assert [title for title in titles if title in BUDGET] == list(BUDGET)
    links = re.findall(r"^- \[(.+)\]\(#([^)]+)\)", source.cells[0].source, re.M)
    assert [title for title, _ in links] == [t for t in titles if t in dict(links)] and len(links) >= len(BUDGET) - 1
    assert all(link == title.replace(" ", "-") for title, link in links)


@pytest.mark.skipif(not ASSIGNMENT.exists(), reason="the assignment is not here")
def test_headings_and_questions_are_those_of_the_assignment(source):
    text = ASSIGNMENT.read_text(encoding="utf-8")
    wanted = [title for title in headings(text) if not re.match("TODO|Topics|Submission date", title)]
    wanted = [title.removesuffix(" (60 Points)") for title in wanted]
    titles = headings("\n".join(markdown(source)))
    assert [title for title in titles if title in wanted] == wanted
    questions = re.findall(r"^\d\. (.+?)\s*$", text.split("### Reflection")[1], re.M)
    reflection = next(part for part in markdown(source) if "### Reflection" in part)
    assert len(questions) == 4
    assert re.findall(r"^\d\. \*(.+)\*$", reflection, re.M) == questions


def test_cells_define_or_run_and_nothing_points_to_one_machine(source):
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    for cell in code_cells(source):
        body = ast.parse(cell.source).body
        if "definitions" in cell.metadata.get("tags", []):
            assert all(isinstance(node, (*kinds, ast.Assign)) for node in body), cell.source
        else:
            assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source))), cell.source
    text = "\n".join(cell.source for cell in source.cells)
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|work|content|Users|usr)/", text)
    assert all(f"**Student {i} — Name, ID**" in source.cells[0].source for i in (1, 2))


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff(command):
    command = [sys.executable, "-m", "ruff", *command, NOTEBOOK, "tests"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# Answers


def red(text):
    """The contents of each <font color="red">, the only thing that <font> may be used for."""
    found = re.findall(r'<font color="red">(.*?)</font>', text, re.S)
    assert text.count("<font") == text.count("</font>") == len(found) and not any("<font" in part for part in found)
    return found


def answers(notebook):
    """{"Answer 1": its paragraphs, ..., "Discussion": ...}, each paragraph as it stands in the source."""
    found = {}
    for text in markdown(notebook):
        current = None
        for block in re.split(r"\n\s*\n", text):
            if title := re.match(r"\*\*(Answer \d|Discussion)\.?\*\*$", block.strip()):
                found[current := title[1]] = []
            elif re.match(r"#|\*\*|\d\. \*", block):
                current = None
            elif current:
                found[current] += block.split("\n- ")
    return found


def test_answers_are_red_paragraph_by_paragraph(source):
    found = answers(source)
    assert list(found) == ["Discussion", "Answer 1", "Answer 2", "Answer 3", "Answer 4"] and all(found.values())
    blocks = [block.strip().removeprefix("- ") for blocks in found.values() for block in blocks]
    for block in blocks:
        (text,) = red(block)
        assert block.startswith('<font color="red">') and block.endswith("</font>") and text.strip(), block
        assert not re.search(r"`|^\|", text, re.M), block
    assert "".join(markdown(source)).count("<font") == len(blocks)


@final
def test_answers_have_a_readable_length_and_few_numbers(notebook):
    for name, blocks in answers(notebook).items():
        text = " ".join(red("\n".join(blocks)))
        words, most = len(text.split()), 6 if name == "Discussion" else 5
        assert 80 <= words <= (120 if name == "Discussion" else 160), f"{name}: {words} words"
        assert 1 <= len(numbers(text)) <= most, f"{name}: {numbers(text)}"


def test_every_number_in_red_stands_in_the_saved_outputs_or_is_a_setting(notebook):
    cells = code_cells(notebook)
    settings = " ".join(cell.source for cell in cells if "class Config" in cell.source or "PRESETS = {" in cell.source)
    known = numbers(output_text(cells)) | numbers(settings)
    assert "13.37" not in known  # this check can fail
    for text in red("\n".join(markdown(notebook))):
        assert numbers(text) <= known, f"{numbers(text) - known}: {text}"


# The saved run


def test_the_saved_notebook_is_one_clean_run(notebook):
    nbformat.validate(notebook)
    raw = (ROOT / "hw4.ipynb").read_text(encoding="utf-8")
    assert len(raw.encode()) < MOST["bytes"]
    assert "widget-view+json" not in raw and "widgets" not in notebook.metadata
    assert not re.search(r"\bTODO\b|\bFIXME\b|@@", raw)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {o.output_type if o.output_type != "stream" else o.name for cell in cells for o in cell.outputs}
    assert not kinds & {"error", "stderr"}


def test_answers_stay_red_when_rendered(notebook):
    rendered, _ = HTMLExporter(exclude_input=True, exclude_output=True).from_notebook_node(notebook)
    shown = red(re.sub(r"<(script|style).*?</\1>", "", rendered, flags=re.S))
    written = red("\n".join(markdown(notebook)))
    assert [len(text.split()) for text in shown] == [len(text.split()) for text in written] and len(written) >= 5


@final
def test_the_saved_run_is_of_this_code_on_all_photos(notebook, hw4):
    cells = code_cells(notebook)
    text = output_text(cells)
    assert recorded_hash(cells) == hw4.source_hash([cell.source for cell in cells])
    assert "made by other code" not in text and "unknown" not in text
    assert re.search(r"^preset (cpu|full)\b", text, re.M)
    assert "7,091 training and 1,000 validation photos" in text
    header = rf"^\| %.*{hw4.SCRATCH}.*{hw4.SIMCLR}.*{hw4.CONTROL}"
    assert len(re.findall(header, text, re.M)) >= 2  # of the opening and of the comparison
    sections, current = {}, ""
    for cell in notebook.cells:
        current = ([t for t in headings(cell.source) if t in BUDGET] or [current])[-1] if cell.source else current
        sections[current] = sections.get(current, 0) + len(cell.get("outputs", []))
    assert all(sections[title] for title in BUDGET)


# Beside the notebook


@final
def test_readme_is_short_and_has_the_notebooks_table(notebook):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"<!-- results -->\n(.*?)\n<!-- end of results -->", readme, re.S)[1]
    assert block.count("\n") >= 10 and block.strip() in output_text(code_cells(notebook))
    assert len(readme.splitlines()) <= 90


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_data_or_weights_are_tracked():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {f for f in files if f.startswith("flickr8k/")} == {"flickr8k/README.md"}
    assert not [f for f in files if f.endswith((".jpg", ".png", ".pt", ".npy", ".zip", "captions.txt"))]
    top = {f.split("/")[0] for f in files if not f.startswith(".")}
    assert top == {"hw4.ipynb", "flickr8k", "requirements.txt", "README.md", "tests"}
