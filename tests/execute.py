"""Execute a notebook in place and show in the terminal what its cells print.

    python tests/execute.py [hw4.ipynb]

The file is saved after every cell, so an interrupted run keeps its outputs so far.
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


class Echo(NotebookClient):
    """A client that repeats the text output of the kernel on this terminal."""

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        elif msg["msg_type"] in ("display_data", "execute_result"):
            data = msg["content"]["data"]
            print(data.get("text/markdown", data.get("text/plain", "")), flush=True)
        return super().process_message(msg, cell, cell_index)


def main(path):
    notebook = nbformat.read(path, as_version=4)
    total = len(notebook.cells)

    def save(cell, cell_index, **_):
        part = path.with_suffix(".part")
        nbformat.write(notebook, part)
        os.replace(part, path)
        print(f"[cell {cell_index + 1} of {total}]", flush=True)

    resources = {"metadata": {"path": str(path.resolve().parent)}}
    Echo(notebook, timeout=None, kernel_name="python3", resources=resources, on_cell_executed=save).execute()
    save(None, total - 1)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "hw4.ipynb"))
