"""What a saved notebook shows, which of its numbers a text may use, and the README's results made of it.

python tests/outputs.py    writes the README's results anew from hw4.ipynb
"""

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
from execute import visible

ROOT = Path(__file__).resolve().parent.parent
# sign, mean, margin
NUMBER = re.compile(r"(?<![\w.])(?<!Recall@)([+±-]?) ?(\d+(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?(?!\w|\.\d)")
NO_RESULT = re.compile(
    r"95 % (?:confidence )?intervals?|\(\d{4}\)|et al\.,? \d{4}"
)  # of these numbers none is a result


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def markdown(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def headings(text):
    return re.findall(r"^#{1,4} (.+)$", text, re.M)


def output_text(cells):
    """All text that the given cells print or display, without what a progress bar wrote and wiped out again."""
    text = ""
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        data = output.get("data", {})
        shown = data.get("text/markdown") or data.get("text/plain", "")
        if output.output_type == "stream":
            text += output.text
        elif not any(kind.startswith("image/") for kind in data):
            text += f"\n{shown}\n"
    return "\n".join(map(visible, text.replace("\N{NBSP}", " ").split("\n")))


def plain(text):
    """A text without markup and formulas: "<font color="red">**At** $N=5$, 1,000</font>" -> "At N = 5, 1000"."""
    text = re.sub(r"</?font[^>]*>|[*`]|(?<=\d),(?=\d{3})", "", text).replace("−", "-")
    text = re.sub(r"\$N\s*=\s*(\d+)\$", r"N = \1", text)
    text = re.sub(r"\$[^$]*[A-Za-z\\][^$]*\$", " ", text)
    return re.sub(r"\s+", " ", text)


@dataclass(frozen=True)
class Table:
    """A table, or the lines that a cell prints, which are its rows then."""

    heading: str  # the one above it, up to a colon
    caption: str  # start of the sentence right above it that ends in a colon, or ""
    header: list  # of the columns; empty for printed lines
    rows: dict  # {label: cells}


def rows_of(lines):
    """{label: cells} of printed lines: the label is what stands before a colon, or else the first word."""
    rows = {}
    for line in lines:
        if label := re.search(r"^[^:]*[A-Za-z][^:]*(?=:)|[A-Za-z]\w*", line):
            rows.setdefault(label[0], []).append(line)
    return rows


def tables(notebook):
    """Every `Table` that the saved outputs hold."""
    found, heading, caption = [], "", ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = [heading, *headings(cell.source)][-1].partition(":")[0]
            end = re.search(r"(?:^|\. |\n\n)([^.]*):$", cell.source.strip())
            caption = re.split("[,:]", plain(end[1]))[0] if end else ""
            continue

        text = output_text([cell])
        for block in re.findall(r"(?:^\|.*\n)+", text + "\n", re.M):
            lines = [[part.strip() for part in line.strip("|").split("|")] for line in block.splitlines()]
            rows = {row[0]: row[1:] for row in lines[2:]}
            found.append(Table(plain(heading), caption, lines[0], rows))
        if printed := [line for line in text.splitlines() if line and not line.startswith("|")]:
            found.append(Table(plain(heading), caption, [], rows_of(printed)))
    return found


# Which numbers a text may use


def parts(label):
    """What a text has to name of a label: "ViT, SimCLR first" -> both halves; "dogs (9)" -> "dogs"."""
    label = re.sub(r" *[(\[].*?[)\]]", "", plain(label))
    return [part for part in re.split(r", | - ", label) if re.search("[A-Za-z]", part)]


def whole(phrase):
    """Regular expression that finds `phrase`, but not within longer words or numbers."""
    return rf"(?<![\w.]){re.escape(phrase)}(?!\w|\.\d)"


def names(sentence, phrases):
    """Whether a sentence holds all phrases, of which there is at least one."""
    return bool(phrases) and all(re.search(whole(phrase), sentence, re.I) for phrase in phrases)


def sentences(text):
    """The sentences of a Markdown text; a heading, a list item and a paragraph end one, too."""
    blocks = re.split(r"\n\s*\n|\n(?=- |\d+\. |#)|(?<=</font>)\n", text)
    return [part for block in blocks for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", plain(block)) if part.strip()]


def chosen_tables(sentence, shown):
    """The tables that a sentence names by their caption, or else by their heading; of these, those whose corner it
    names, if it names any."""
    chosen = [table for table in shown if table.caption and names(sentence, [table.caption])]
    chosen = chosen or [table for table in shown if table.heading and names(sentence, [table.heading])]
    return [table for table in chosen if table.header and names(sentence, parts(table.header[0]))] or chosen


def named_cells(sentence, table):
    """The cells whose row and column a sentence names; the only column of a table needs no name."""
    for label, cells in table.rows.items():
        columns = table.header[1:] or [label] * len(cells)
        for column, cell in zip(columns, cells, strict=True):
            if names(sentence, parts(label)) and (len(columns) == 1 or names(sentence, parts(column))):
                yield cell


def wrong_numbers(sentence, shown):
    """The numbers in a sentence that it does not find in the tables `shown`. The rule is:

    1. A sentence with a number names a table: by the heading above it (up to a colon: "Comparison", "Experiment 2") or
       by the caption above it, the sentence that ends in a colon (up to a comma: "On all training photos"). Where
       tables share these, naming the corner ("image → text") chooses among them.
    2. It names a row by all parts of its label ("SimCLR first − from scratch" by "SimCLR first" and "from scratch"),
       and the column ("R@5"), unless there is only one.
    3. The number stands in such a cell, digit by digit: "22.6", "+6.3" (or "6.3"), "22.6 ± 2.3". What stands behind ±
       is never quoted alone.
    Numbers within labels that are named ("N = 5"), in formulas, of years and of "95 % interval" are no results.
    """
    sentence = NO_RESULT.sub(" ", plain(sentence))
    chosen = chosen_tables(sentence, shown)
    phrases = {phrase for table in chosen for phrase in (table.heading, table.caption)}
    known = set()
    for table in chosen:
        phrases.update(part for label in (*table.header, *table.rows) for part in parts(label))
        known.update(match for cell in named_cells(sentence, table) for match in NUMBER.findall(plain(cell)))

    for phrase in sorted(phrases, key=len, reverse=True):
        sentence = re.sub(whole(phrase), " ", sentence, flags=re.I) if phrase else sentence
    allowed = {(s, mean, m) for sign, mean, margin in known for s in ("", sign) for m in ("", margin)}
    wrong = [match for match in NUMBER.findall(sentence) if match not in allowed]
    return [f"{sign}{mean} ± {margin}" if margin else f"{sign}{mean}" for sign, mean, margin in wrong]


# The README


def readme_parts(notebook):
    """{name: text} of the parts of the README between <!-- name --> and <!-- end of name -->."""
    shown = tables(notebook)
    comparison = [table for table in shown if table.heading == "Comparison" and table.header]
    to_text, _, selection = comparison
    scratch, pretrained, control = list(to_text.rows)[:3]
    text = output_text(code_cells(notebook))
    (photos,) = re.findall(r"([\d,]+) validation photos", text)
    guess = 100 * 5 / int(photos.replace(",", ""))
    preset, hardware = re.findall(r"^preset (\w+) on (.+?), torch\.", text, re.M)[-1]
    (minutes,) = re.findall(r"^finished ([\d.]+) minutes", text, re.M)

    def compare(table, column):
        first, second, third = (
            table.rows[label][table.header.index(column) - 1] for label in (scratch, pretrained, control)
        )
        return f"**{second} %** with {pretrained}; {first} % {scratch}; {control}: {third} %"

    lines = []
    for table in comparison:
        rows = [[label, *cells] for label, cells in table.rows.items()]
        lines += ["| " + " | ".join(row) + " |" for row in [table.header, ["---"] * len(table.header), *rows]] + [""]
    headline = (
        f"On {photos} validation photos, Recall@5 (image → text; guessing: {guess:.1f} %) is "
        f"{compare(to_text, 'R@5')}. "
        f"The right one of five captions (guessing: 20 %) is chosen for {compare(selection, 'N = 5')}. "
        f"Preset `{preset}` on {hardware}, {minutes} minutes in all; means over photos ± half a 95 % interval."
    )
    return {"headline": headline, "results": "\n".join(lines[:-1])}


def with_parts(readme, replacements):
    """The text of the README with its parts replaced. Raises ValueError if it has no place for one."""
    for name, text in replacements.items():
        before, start, rest = readme.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"\n<!-- end of {name} -->")
        if not (start and end):
            raise ValueError(f"README.md needs a part between <!-- {name} --> and <!-- end of {name} -->")
        readme = before + start + text + end + after
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    parts_now = readme_parts(nbformat.read(ROOT / "hw4.ipynb", as_version=4))
    path.write_text(with_parts(path.read_text(encoding="utf-8"), parts_now), encoding="utf-8")
