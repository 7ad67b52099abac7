"""Runs the notebook tour.ipynb and stores in it what its cells print; needs no Jupyter.

Run it after a change of the notebook, or of what the library prints. A test runs it with `--check`.

    python examples/run_tour.py             # less than half a minute on two cores
    python examples/run_tour.py --check     # compares with what is stored, and changes nothing
"""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import re
import sys

import _command

NOTEBOOK = pathlib.Path(__file__).with_name("tour.ipynb")
# Numbers such as 5e-07. Most are rounding errors, which depend on the machine.
SCIENTIFIC = re.compile(r"\d(?:\.\d+)?e[+-]\d+")
FACTOR = 4


def agree(printed: str, stored: str) -> bool:
    """Whether two texts are equal, except that numbers such as 5e-07 may differ by up to `FACTOR`."""
    if SCIENTIFIC.sub("#", printed) != SCIENTIFIC.sub("#", stored):
        return False
    pairs = zip(SCIENTIFIC.findall(printed), SCIENTIFIC.findall(stored), strict=True)
    return all(float(a) <= FACTOR * float(b) and float(b) <= FACTOR * float(a) for a, b in pairs)


def main() -> str | None:
    """Runs the notebook; returns which cell prints something else than is stored, with `--check`, or None."""
    parser = _command.Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is stored, and change nothing")
    arguments = parser.parse_args()
    notebook = json.loads(NOTEBOOK.read_text())
    names = {"__name__": "__main__"}
    for number, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile("".join(cell["source"]), f"tour.ipynb, {cell['id']}", "exec"), names)
        printed, stored = output.getvalue(), "".join(line for o in cell["outputs"] for line in o.get("text", ()))
        if not arguments.check:
            lines = printed.splitlines(keepends=True)
            cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
            # Jupyter writes times there.
            cell["metadata"], cell["execution_count"] = {}, number
        elif not agree(printed, stored):
            return (
                f"tour.ipynb, cell {cell['id']}: expected the stored output\n{stored}\ngot\n{printed}\n"
                "python examples/run_tour.py stores it"
            )
    if not arguments.check:
        with _command.uninterrupted():
            NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    return None


if __name__ == "__main__":
    sys.exit(main())
