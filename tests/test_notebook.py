"""The notebook as a grader meets it: order, density and text, and the outputs that were saved."""

import ast
import importlib.util
import random
import re
import statistics
import subprocess
import symtable
import sys

import nbformat
import outputs
import pytest
from conftest import NEXT, NOTEBOOK, ROOT
from nbconvert import HTMLExporter, ScriptExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from outputs import code_cells, headings, markdown, output_text, sentences, tables, wrong_numbers

SECTIONS = [
    "Deep Learning: Assignment #4",
    "Global Setup",
    "Load & Preprocess Data",
    "Learning a Shared Vision–Language Representation",
    "Training and Evaluation",
    "Zero-Shot Caption Selection",
    "Improving Visual Representations with Self-Supervised Learning",
    "Experiments behind the answers",
    "Reflection",
    "Run record and credits",
]
MOST = {
    "nodes": 8758,
    "lines": 1142,
    "per line": 8.0,
    ">100": 1.0,
    "block": 15,
    "params": 6,
    "comp": 5,
}  # by density.py
MOST |= {"code cells": 70, "median": 14, "longest": 40, "words": 3000, "bytes": 3_000_000}  # lines of a cell, Markdown
SHARED = ROOT.parent / "shared"
LOCAL_PATH = r"(?<![\w.])/(?:home|root|tmp|work|content|kaggle|Users|usr)/"
final = pytest.mark.skipif(NEXT.exists(), reason="the saved notebook is the old one until .next/ takes its place")


@pytest.fixture(scope="module")
def source():
    """The notebook whose code and text are tested; `notebook` is the saved one, whose outputs are."""
    return nbformat.read(NOTEBOOK, as_version=4)


def defines(cell):
    return "definitions" in cell.metadata.get("tags", [])


def too_much(found):
    return {name: value for name, value in found.items() if value > MOST[name]}


# Length and order


@pytest.mark.skipif(not (SHARED / "tools" / "density.py").exists(), reason="the tool is not here")
def test_density():
    spec = importlib.util.spec_from_file_location("density", SHARED / "tools" / "density.py")
    density = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(density)
    measured = density.measure(density.cells(str(NOTEBOOK)))
    values = re.findall(r"([\d.]+)%? (lines|nodes|per line|>100)", measured)
    values += [(value, name) for name, value in re.findall(r"(block|params|comp) ([\d.]+)", measured)]
    assert len(values) == 7 and too_much({name: float(value) for value, name in values}) == {}


def code_lines(cell):
    """The lines that are neither blank nor comment nor docstring."""
    skipped = set()
    for node in ast.walk(ast.parse(cell)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            skipped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(cell.splitlines(), 1)
    return [line for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in skipped]


def test_cells_are_short_and_few(source):
    sizes = [len(code_lines(cell.source)) for cell in code_cells(source)]
    text = re.sub("<[^>]*>", "", "\n".join(markdown(source)))
    words = sum(bool(re.search(r"\w", word)) for word in text.split())
    found = {"code cells": len(sizes), "median": statistics.median(sizes), "longest": max(sizes), "words": words}
    assert too_much(found) == {}


def test_sections_in_order_and_linked_from_the_contents(source):
    titles = headings("\n".join(markdown(source)))
    assert [title for title in titles if title in SECTIONS] == SECTIONS
    links = re.findall(r"\[\w[^]]*\]\(#([^)]+)\)", source.cells[0].source)
    assert links == [title.replace(" ", "-") for title in SECTIONS[1:]]


@pytest.fixture(scope="module")
def assignment():
    path = SHARED / "assignment.txt"
    return path.read_text(encoding="utf-8") if path.exists() else pytest.skip("the assignment is not here")


def test_headings_are_those_of_the_assignment(source, assignment):
    wanted = [title for title in headings(assignment) if not re.match("TODO|Topics|Submission date", title)]
    wanted = [title.removesuffix(" (60 Points)") for title in wanted]
    titles = headings("\n".join(markdown(source)))
    assert [title for title in titles if title in wanted] == wanted


@final
def test_questions_are_those_of_the_assignment(source, assignment):
    questions = re.findall(r"^\d\. (.+?)\s*$", assignment.split("### Reflection")[1], re.M)
    reflection = next(part for part in markdown(source) if part.startswith("### Reflection"))
    assert len(questions) == 4
    assert re.findall(r"^\d\. \*(.+)\*$", reflection, re.M) == questions


def test_two_students_are_named_at_the_top(source):
    assert re.findall(r"^- \*\*Student (\d) — .+\*\*$", source.cells[0].source, re.M) == ["1", "2"]


def test_nothing_points_to_one_machine(source):
    text = "\n".join(cell.source for cell in source.cells)
    assert not re.search(LOCAL_PATH, text)


# Definitions and runs


def test_a_cell_defines_or_runs_and_the_first_imports_everything(source):
    imports = (ast.Import, ast.ImportFrom)
    allowed = (ast.FunctionDef, ast.ClassDef, ast.Assign)
    for number, cell in enumerate(code_cells(source)):
        tree = ast.parse(cell.source)
        assert number == 0 or not any(isinstance(node, imports) for node in ast.walk(tree)), cell.source
        if number and defines(cell):
            assert all(isinstance(node, allowed) for node in tree.body), cell.source
        elif number:
            assert not any(isinstance(node, allowed[:2]) for node in ast.walk(tree)), cell.source


def assigned(code):
    """The names that code binds outside functions."""
    table = symtable.symtable(code, "cell", "exec")
    return {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}


def read_within(code):
    """The global names that functions and classes in code read, at any depth."""
    names, tables = set(), list(symtable.symtable(code, "cell", "exec").get_children())
    for table in tables:
        tables += table.get_children()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names


def test_no_definition_reads_what_a_run_cell_assigns(source):
    assert read_within("class A:\n def f(self, x):\n  y = z\n  return lambda: x + y + w") == {"z", "w"}
    cells = code_cells(source)
    defined = set().union(*(assigned(cell.source) for cell in cells if defines(cell)))
    run = set().union(*(assigned(cell.source) for cell in cells if not defines(cell)))
    assert {"config", "data", "device"} <= run and not run & defined
    for cell in filter(defines, cells):
        assert not read_within(cell.source) & run, cell.source


@pytest.mark.parametrize("command", ["check", "format --check"])
@pytest.mark.parametrize("path, width", [(NOTEBOOK, 100), ("tests", 120)])
def test_ruff(command, path, width):
    options = ["--line-length", str(width)] if "format" in command else []
    command = [sys.executable, "-m", "ruff", *command.split(), *options, path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_as_a_script_it_is_plain_python(source):
    script, resources = ScriptExporter().from_notebook_node(source)
    assert resources["output_extension"] == ".py" and "get_ipython" not in script
    compile(script, "hw4.py", "exec")


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


@final
def test_answers_are_red_paragraph_by_paragraph_and_of_readable_length(notebook):
    found = answers(notebook)
    assert list(found) == ["Discussion", "Answer 1", "Answer 2", "Answer 3", "Answer 4"] and all(found.values())
    words = {name: len("\n".join(blocks).split()) for name, blocks in found.items()}
    assert {name: number for name, number in words.items() if not 60 <= number <= 170} == {}  # with their tags
    blocks = [block.strip().removeprefix("- ") for blocks in found.values() for block in blocks]
    for block in blocks:
        (text,) = red(block)
        assert block.startswith('<font color="red">') and block.endswith("</font>") and text.strip(), block
        assert not re.search(r"`|^\|", text, re.M), block
    for block in re.split(r"\n\s*\n", "\n\n".join(markdown(notebook))):  # also beside the answers
        assert "<font" not in block or re.fullmatch(r"(- )?<font.*</font>(\n- <font.*</font>)*", block.strip()), block


def test_answers_stay_red_when_rendered(notebook):
    rendered, _ = HTMLExporter(exclude_input=True, exclude_output=True).from_notebook_node(notebook)
    shown = red(re.sub(r"<(script|style).*?</\1>", "", rendered, flags=re.S))
    written = red("\n".join(markdown(notebook)))
    assert [len(text.split()) for text in shown] == [len(text.split()) for text in written] and len(written) >= 5


# Numbers in texts: `wrong_numbers` tells the rule


def table(*lines):
    return new_code_cell(outputs=[new_output("display_data", {"text/markdown": "\n".join(lines)})])


@pytest.fixture(scope="module")
def example():
    """The tables of a small notebook with random scores."""
    rng = random.Random(0)

    def scores(count):
        return " | ".join(f"{rng.uniform(0, 60):.1f} ± {rng.uniform(0.5, 3):.1f}" for _ in range(count))

    models, encoders = ["a", "b", "a − b"], ["convolutional", "ViT", "ViT, SimCLR first"]
    cells = [new_markdown_cell("#### Comparison\n\nPaired.")]
    for way in ("image → text", "text → image"):
        header = f"| {way} [%] | R@1 | R@3 | R@5 | R@10 |"
        cells += [table(header, "| --- |", *(f"| {label} | {scores(4)} |" for label in models))]
    header = "| selection accuracy [%] | N = 3 | N = 5 |"
    paired = "| a − b | **+4.6 ± 0.8** | **+6.6 ± 0.9** |"
    cells += [table(header, "| --- |", "| a | 84.0 ± 1.1 | 74.1 ± 1.5 |", "| b | 80.4 ± 1.2 | 67.4 ± 1.6 |", paired)]
    cells += [new_markdown_cell("#### Experiment 2: what?\n\nEnough. On all photos, with both:")]
    cells += [table("| R@5 [%] | a |", "| --- |", *(f"| {label} | {scores(1)} |" for label in encoders))]
    cells += [new_markdown_cell("On few photos:")]
    cells += [table("| R@5 [%] | a |", "| --- |", "| ViT | 12.3 ± 1.0 |", "| convolutional | 9.0 ± 1.0 |")]
    cells += [new_code_cell(outputs=[new_output("stream", text="ViT, seed 0: 1,234 words\n")])]
    cells += [new_markdown_cell("#### Additions")]
    cells += [table("| R@5, paired | difference [%] |", "| --- |", "| with Muon − plain | **+4.2 ± 0.8** |")]
    return tables(new_notebook(cells=cells))


@pytest.mark.parametrize(
    "sentence, wrong",
    [
        ("In the comparison at $N=5$, a has **74.1**, b 67.4, a paired difference of 6.6 ± 0.9.", []),
        ("On few photos the ViT (12.3 ± 1.0) is ahead of the convolutional network with 9.0.", []),
        ("Experiment 2: seed 0 of the ViT saw 1,234 words; its 95 % interval says $2B-1$ (Li et al., 2023).", []),
        ("Additions: with Muon it is ahead of the plain model by 4.2 ± 0.8.", []),
        ("At N = 5, a has 74.1.", ["5", "74.1"]),  # no table is named
        ("Comparison: at N = 5 it rises to 74.1.", ["74.1"]),  # no row
        ("Comparison: a rises to 74.1.", ["74.1"]),  # no column
        ("Comparison: at N = 3, a has 74.1.", ["74.1"]),
        ("Comparison: at N = 5, a has 74.", ["74"]),  # other rounding
        ("Comparison: at N = 5, a leads in R@8, in Recall@5 as well.", ["8"]),  # no such column
        ("Comparison: at N = 5, a − b is -6.6.", ["-6.6"]),
        ("Comparison: at N = 5, a has 74.1 ± 1.6.", ["74.1 ± 1.6"]),
        ("Comparison: at N = 5, a is off by ± 1.5.", ["±1.5"]),
        ("On all photos the ViT reaches 12.3.", ["12.3"]),  # of the other table
    ],
)
def test_a_number_stands_in_the_row_and_table_that_its_sentence_names(example, sentence, wrong):
    assert wrong_numbers(sentence, example) == wrong


def changed(sentence):
    """Copies of a sentence, each with another last digit of one of its numbers."""
    sentence = outputs.NO_RESULT.sub(" ", sentence)
    for match in re.finditer(r"(?<![\w.])\d+(?:\.\d+)?(?!\w|\.\d)", sentence):
        for digit in set("0123456789") - {match[0][-1]}:
            yield sentence[: match.end() - 1] + digit + sentence[match.end() :]


def share_rejected(texts, shown):
    copies = [copy for text in texts for sentence in sentences(text) for copy in changed(sentence)]
    return sum(bool(wrong_numbers(copy, shown)) for copy in copies) / len(copies)


def test_wrong_numbers_are_rejected(example):
    texts = []
    for shown in example[:-1]:
        corner = outputs.parts(shown.header[0]) if len(shown.header) > 2 else []
        place = ", ".join([shown.caption or shown.heading, *corner])
        for label, cells in shown.rows.items():
            for column, cell in zip(shown.header[1:] or [label], cells, strict=True):
                texts.append(f"{place}: {label} has {cell.partition(' ')[0].strip('*')} ({column}).")
    assert len(texts) == 36 and not any(wrong_numbers(text, example) for text in texts)
    assert share_rejected(texts, example) >= 0.95


@final
def test_every_number_in_red_stands_in_the_table_that_its_sentence_names(notebook):
    texts, shown = red("\n".join(markdown(notebook))), tables(notebook)
    wrong = {sentence: wrong_numbers(sentence, shown) for text in texts for sentence in sentences(text)}
    assert {sentence: found for sentence, found in wrong.items() if found} == {}
    assert share_rejected(texts, shown) >= 0.95  # if not, quote with the half width: 12.3 ± 1.4


@final
def test_so_does_every_number_with_decimals_in_black(notebook):
    shown = tables(notebook)
    for text in markdown(notebook):
        for sentence in sentences(re.sub(r"<font.*?</font>", "", text, flags=re.S)):
            assert not re.search(r"\d\.\d|±\s*\d", sentence) or not wrong_numbers(sentence, shown), sentence


# The saved run


@final
def test_the_saved_notebook_is_one_clean_run_and_small(notebook):
    nbformat.validate(notebook)
    raw = (ROOT / "hw4.ipynb").read_text(encoding="utf-8")
    assert too_much({"bytes": len(raw.encode())}) == {}
    assert "widget-view+json" not in raw and "widgets" not in notebook.metadata
    assert not re.search(r"\bTODO\b|\bFIXME\b|@@", raw)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {o.output_type if o.output_type != "stream" else o.name for cell in cells for o in cell.outputs}
    assert kinds <= {"stdout", "display_data"}
    assert not re.search(rf"{LOCAL_PATH}|Warning\b|damaged|could not", output_text(cells))


@final
def test_the_saved_run_has_the_settings_of_this_code_and_all_photos(notebook, hw4):
    text = output_text(code_cells(notebook))
    (preset,) = set(re.findall(r"^preset (\w+)", text, re.M))
    assert preset in ("cpu", "full") and "7,091 training and 1,000 validation photos" in text
    config = hw4.PRESETS[preset]
    trained = next(shown for shown in tables(notebook) if hw4.SCRATCH in shown.rows and "epochs" in shown.header)
    column = trained.header.index("epochs") - 1
    epochs = [*[config.contrastive.epochs] * 2, config.protocol.control_epochs, config.simclr.epochs]
    assert [int(row[column]) for row in trained.rows.values()] == epochs


@final
def test_every_section_shows_something_and_every_figure_has_words(notebook):
    shown, section = set(), None
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        section = [section, *(title for title in headings(cell.source) if title in SECTIONS)][-1]
        if cell.cell_type == "code" and cell.outputs:
            shown.add(section)
            image = any(kind.startswith("image/") for output in cell.outputs for kind in output.get("data", {}))
            words = following and following.cell_type == "markdown" and not following.source.startswith("#")
            assert not image or words or output_text([cell]).strip(), cell.source
    assert shown >= set(SECTIONS) - {SECTIONS[0], "Reflection"}


# Beside the notebook


@final
def test_readme_is_short_and_tells_the_results_of_the_saved_run(notebook):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 95
    generated = outputs.readme_parts(notebook)
    assert readme == outputs.with_parts(readme, generated), "python tests/outputs.py"
    for text in generated.values():
        readme = readme.replace(text, "")
    assert not re.search(r"\d ?%|± ?\d|R(?:ecall)?@\d", readme), "results stand in the generated parts only"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_data_or_weights_are_tracked():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {f for f in files if f.startswith("flickr8k/")} == {"flickr8k/README.md"}
    assert not [f for f in files if f.endswith((".jpg", ".png", ".pt", ".npy", ".zip", "captions.txt"))]
    top = {f.split("/")[0] for f in files if not f.startswith(".")}
    assert top - {"findings", "LICENSE"} == {"hw4.ipynb", "flickr8k", "requirements.txt", "README.md", "tests"}
