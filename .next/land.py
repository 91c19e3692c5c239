"""Puts a run of .next/hw4.ipynb into place: its outputs under the texts, whose numbers become those of the run.

    python .next/land.py EXECUTED TARGET    says which numbers it replaced and which it could not

The texts quote the run before. A number is looked up in the tables of that run (of the last commit of hw4.ipynb, with
its labels as they are called now), and the same cell of the new run takes its place. Every sentence that changed has to
be read: signs, "undecided" and comparisons do not follow by themselves. Goes away with .next/.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from outputs import (  # noqa: E402
    NUMBER,
    named_cells,
    names,
    plain,
    readme_parts,
    sentences,
    tables,
    with_parts,
    wrong_numbers,
)

RENAMED = {
    "from scratch, 5× as long": "longer training (5×)",
    "with five captions": "with several captions",
    "ViT, SimCLR first": "pretrained ViT",
    "cosine, true captions": "cosine × 100, true captions",
    "cosine, wrong captions": "cosine × 100, wrong captions",
    "| p |": "| p [%] |",
}


README = {  # what its hand-written parts say
    "ViT 192 × 6, text 128 × 3": "ViT 192 × 6, text 192 × 2",
    "ViT 256 × 8, text 192 × 4": "ViT 256 × 8, text 256 × 2",
    "(*5× as long* has one)": "(*longer training* has one)",
}


def statements(source):
    """The syntax of a cell without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def renamed(notebook):
    """The notebook with the labels of its outputs as they are called now."""
    text = nbformat.writes(notebook)
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return nbformat.reads(text, as_version=4)


def key(label):
    """A label without brackets."""
    return re.sub(r" *[(\[].*?[)\]]", "", plain(label))


def corner(table):
    """The corner of a table if it tells tables under one heading apart."""
    name = key(table.header[0]) if table.header else ""
    return name if "→" in name or "accuracy" in name else ""


def same_cell(sentence, number, before, after):
    """What stands in the new tables where `number` stood in the old ones, of cells that the sentence names."""
    found = []
    for table in before:
        if not any(phrase and names(sentence, [phrase]) for phrase in (table.caption, table.heading)):
            continue
        for label, cells in table.rows.items():
            for column, cell in zip(table.header[1:], cells, strict=False):
                if number not in plain(cell) or cell not in list(named_cells(sentence, table)):
                    continue
                for new in after:
                    if (new.heading, new.caption, corner(new)) != (table.heading, table.caption, corner(table)):
                        continue
                    rows = {key(name): values for name, values in new.rows.items()}
                    columns = [key(name) for name in new.header[1:]]
                    if key(label) in rows and (key(column) in columns or columns == ["R@5, both ways"]):
                        place = columns.index(key(column)) if key(column) in columns else 0
                        found.append(rows[key(label)][place])
    return list(dict.fromkeys(found))


def main():
    executed = nbformat.read(sys.argv[1], as_version=4)
    notebook = nbformat.read(ROOT / ".next" / "hw4.ipynb", as_version=4)
    command = ["git", "show", "HEAD:hw4.ipynb"]
    saved = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    before, after = tables(renamed(nbformat.reads(saved, as_version=4))), tables(executed)

    for cell, ran in zip(notebook.cells, executed.cells, strict=True):
        if cell.cell_type == "code":
            assert statements(cell.source) == statements(ran.source), cell.source
            cell.outputs, cell.execution_count = ran.outputs, ran.execution_count
    after = tables(notebook)

    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for sentence in sentences(cell.source):
            changes = []
            for number in filter(re.compile(r"\d\.\d").search, wrong_numbers(sentence, after)):
                new = same_cell(sentence, number.lstrip("+-"), before, after)
                if len(new) != 1:
                    print(f"?? {number} {new}: {sentence}\n")
                    continue
                ((sign, mean, margin),) = NUMBER.findall(plain(new[0]))
                changes.append((number.lstrip("+-"), mean + (f" ± {margin}" if "±" in number else ""), new[0]))
            for place, (old, _, _) in enumerate(changes):
                pattern = r"\s+".join(map(re.escape, old.split()))
                cell.source = re.sub(rf"(?<![\w.]){pattern}(?![\w.]*\d)", f"@{place}@", cell.source, count=1)
            for place, (_, value, _) in enumerate(changes):
                cell.source = cell.source.replace(f"@{place}@", value)
            if changes:
                print("; ".join(f"{old} → {whole}" for old, _, whole in changes), f"\n   {sentence}\n")

    nbformat.write(notebook, sys.argv[2])
    if Path(sys.argv[2]).resolve() == ROOT / "hw4.ipynb":
        update_readme(notebook)


def update_readme(notebook):
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for old, new in README.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(with_parts(text, readme_parts(notebook)), encoding="utf-8")


if __name__ == "__main__":
    main()
