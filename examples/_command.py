"""The command line of the examples: options are checked before work starts, and Ctrl-C ends with one line.

Imported before JAX, so that Ctrl-C is answered in the same way while JAX is still being imported, and so that one line
says which package is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Describes an example by the first line of its docstring; says in one line what is wrong with an option."""

    def __init__(self, docstring: str):
        super().__init__(description=docstring.splitlines()[0])

    def add_seed(self) -> None:
        # JAX takes the lower 32 bits of a seed.
        self.add_argument(
            "--seed", type=whole_number(0, 2**32 - 1), default=0, help="of the random numbers (default: 0)"
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see --help\n")


def whole_number(least: int, most: float = float("inf")) -> Callable[[str], int]:
    """Returns what reads an option's value, for argparse."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        bounds = f"at least {least}" if most == float("inf") else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"expected a whole number, {bounds}, got {text}")

    return read


def parse_arguments(docstring: str, *, epochs: int | None = None, out: bool = False) -> argparse.Namespace:
    """Reads `--seed` and `--fast`, `--epochs` if `epochs` is given as its default, and `--out` if `out` is True.

    The folder `--out` is made if it does not exist, and is checked to be writable.
    """
    parser = Parser(docstring)
    parser.add_seed()
    parser.add_argument("--fast", action="store_true", help="a short run that only shows that it works")
    if epochs is not None:
        parser.add_argument(
            "--epochs", type=whole_number(1), default=epochs, help=f"how long to train (default: {epochs})"
        )
    if out:
        parser.add_argument("--out", type=pathlib.Path, default="out", help="folder to write to (default: out)")
    arguments = parser.parse_args()
    if out:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=arguments.out).close()
        except OSError as error:
            parser.error(f"argument --out: expected a folder to write to, got {arguments.out} ({error.strerror})")
    return arguments


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C to the end of the block, so that what the block writes is complete."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        signal.raise_signal(signal.SIGINT)


def interrupted(*_: Any) -> NoReturn:
    """Ends the process, with one line instead of a traceback.

    KeyboardInterrupt would not do: an exception raised in one of JAX's callbacks is lost, and the example goes on.
    """
    # It fails if the signal came while something was being written, or if nobody reads the output any more.
    with contextlib.suppress(RuntimeError, OSError):
        sys.stdout.flush()
    # A terminal shows ^C, and perhaps a progress bar, in the current line.
    start = "\n" if os.isatty(2) else ""
    os.write(2, f"{start}{pathlib.Path(sys.argv[0]).name}: interrupted\n".encode())
    # 128 + SIGINT, as in shells.
    os._exit(130)


# Where the signal is ignored, as in the processes of multihost.py, it stays so.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)


def report(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Says in one line which package is missing; any other error has a traceback."""
    name = (isinstance(error, ModuleNotFoundError) and error.name) or ""
    if not name or name.startswith("jaxbn.") or name in sys.stdlib_module_names:
        sys.__excepthook__(kind, error, traceback)
    else:
        package, program = name.partition(".")[0], pathlib.Path(sys.argv[0]).name
        sys.stderr.write(f"{program}: {package}: needed for this example; pip install 'jaxbn[examples]'\n")


sys.excepthook = report
