"""Execute a notebook and show in the terminal what its cells print.

    python tests/execute.py NOTEBOOK.ipynb [OUTPUT.ipynb]
    python tests/execute.py --demo [NOTEBOOK.ipynb [OUTPUT.ipynb]]

Without OUTPUT.ipynb the notebook is executed in place. With --demo a small data set is drawn, no network is needed, and
a copy is executed, by default try.ipynb, with a page beside it that any browser opens. The file is saved after every
cell, so an interrupted run keeps its outputs so far; outputs of an earlier run are cleared first, so that no file mixes
two runs. With HW4_PRESET=smoke, as in the demo, one thread computes unless OMP_NUM_THREADS says otherwise: small
trainings gain little from more, and beside another busy process they lose much.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from synthetic import make_flickr8k

AGAIN = "Run the same command again to go on."


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

    stopping = None

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


def main(source, target, **variables):
    """Execute the notebook `source` into the file `target`, with more environment variables."""
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

    def stop(cell, cell_index):
        if client.stopping:  # Ctrl-C found no cell at work, or its cell went on
            sys.exit(f"The notebook stopped. {AGAIN}")

    environment = os.environ | variables
    if environment.get("HW4_PRESET") == "smoke":
        environment.setdefault("OMP_NUM_THREADS", "1")
    client = Echo(
        notebook,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # no warning that the kernel talks to this process without encryption
        resources={"metadata": {"path": str(source.resolve().parent)}},
        on_cell_start=stop,
        on_cell_executed=save,
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        if error.ename == "KeyboardInterrupt":
            sys.exit(f"The notebook stopped. {AGAIN}")
        sys.exit(f"The notebook stopped. {error.ename}: {error.evalue}")
    except DeadKernelError:
        sys.exit("The kernel died (out of memory?). Trainings are kept: run this again to go on.")
    nbformat.write(notebook, target)  # with what the kernel reported after the last cell


def demo(source, target):
    """Execute a copy with the preset `smoke` on drawn photos; leaves that, and the same as HTML, but nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        data, checkpoints = make_flickr8k(Path(folder) / "flickr8k"), Path(folder) / "checkpoints"
        main(source, target, HW4_PRESET="smoke", FLICKR8K_DIR=str(data), CHECKPOINT_DIR=str(checkpoints))
    from nbconvert import HTMLExporter  # here, since a real run does without it

    page, _ = HTMLExporter().from_notebook_node(nbformat.read(target, as_version=4))
    target.with_suffix(".html").write_text(page, encoding="utf-8")
    print(f"{target} is the executed notebook; photos and trainings are removed again")
    print(f"to read it, open {target.with_suffix('.html').resolve().as_uri()} in a browser")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character does not end the run
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path, default=Path("hw4.ipynb"))
    parser.add_argument("output", nargs="?", type=Path)
    parser.add_argument("--demo", action="store_true")
    given = parser.parse_args()
    if given.demo:
        demo(given.notebook, given.output or given.notebook.with_name("try.ipynb"))
    else:
        main(given.notebook, given.output or given.notebook)
