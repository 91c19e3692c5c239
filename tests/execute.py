"""Execute a notebook and show in the terminal what its cells print.

    python tests/execute.py hw4.ipynb [OUTPUT.ipynb]

Without OUTPUT.ipynb the notebook is executed in place. The file is saved after every cell, so an interrupted run
keeps its outputs so far; outputs of an earlier run are cleared first, so that no file mixes two runs.
"""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError


def merged(outputs):
    """Join neighbouring pieces of the same stream."""
    kept = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def visible(line):
    """What a terminal shows of `line`: text after a carriage return overwrites what was there."""
    shown = ""
    for part in line.split("\r"):
        shown = part + shown[len(part) :]
    return shown.rstrip()


def settle(cell):
    """Drop from the streams of a cell what progress bars wrote and wiped out again."""
    outputs = merged(cell.get("outputs", []))
    for output in outputs:
        if output.output_type == "stream":
            output.text = "\n".join(visible(line) for line in output.text.split("\n"))
    if outputs:
        cell.outputs = merged(o for o in outputs if o.output_type != "stream" or o.text.strip())


class Echo(NotebookClient):
    """A client that repeats the text output of the kernel on this terminal; Ctrl-C stops the running cell."""

    @contextlib.asynccontextmanager
    async def async_setup_kernel(self, **kwargs):
        async with super().async_setup_kernel(**kwargs):
            with contextlib.suppress(NotImplementedError):  # Windows
                asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt)
            yield

    def interrupt(self):
        """Let the kernel end its cell with KeyboardInterrupt, as Jupyter's stop button does."""
        self.stopping = asyncio.ensure_future(self.km.interrupt_kernel())

    def process_message(self, msg, cell, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        elif msg["msg_type"] in ("display_data", "execute_result"):
            data = msg["content"]["data"]
            print(data.get("text/markdown", data.get("text/plain", "")), flush=True)
        return super().process_message(msg, cell, cell_index)


def main(source, target):
    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("execution", None)

    def save(cell, cell_index, execute_reply):
        settle(cell)
        part = target.with_suffix(".part")
        nbformat.write(notebook, part)
        os.replace(part, target)
        failed = " failed" if execute_reply["content"]["status"] == "error" else ""
        print(f"[cell {cell_index + 1} of {len(notebook.cells)}{failed}]", flush=True)

    resources = {"metadata": {"path": str(source.resolve().parent)}}
    client = Echo(notebook, timeout=None, kernel_name="python3", resources=resources, on_cell_executed=save)
    try:
        client.execute()
    except CellExecutionError as error:
        sys.exit(f"The notebook stopped. {error.ename}: {error.evalue}")
    except DeadKernelError:
        sys.exit("The kernel died (out of memory?). Trainings are kept: run this again to go on, without HW4_FRESH.")
    nbformat.write(notebook, target)  # with what the kernel reported after the last cell


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]] or [Path("hw4.ipynb")]
    main(paths[0], paths[-1])
