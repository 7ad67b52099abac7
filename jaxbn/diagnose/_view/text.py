"""A report as text: plain, or coloured by rich."""

from __future__ import annotations

import textwrap

from jaxbn._extras import need
from jaxbn.diagnose._results import Results
from jaxbn.diagnose._view.content import Rows, content, shorten

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "none": "green"}
# In a terminal too narrow for the table, names keep so many characters.
_NARROWEST = 12
# Some consoles say that they are 0 wide.
_NARROWEST_PAGE = 40

# Text in pieces, each with its style in rich.
Pieces = list[tuple[str, str]]


def plain(results: Results, *, verbose: bool, width: int) -> str:
    """Returns the report as text without colours."""
    return "".join([text for text, _ in _pieces(results, verbose, width)])


def print_rich(results: Results, *, verbose: bool) -> None:
    """Prints the report in colour, as wide as the console is."""
    console = need("rich.console", "by Report.print").Console()
    console.width = max(console.width, _NARROWEST_PAGE)
    # As Text, in which brackets of a path are no markup.
    text = need("rich.text", "by Report.print").Text.assemble(*_pieces(results, verbose, console.width))
    console.print(text, soft_wrap=True)


def _pieces(results: Results, verbose: bool, width: int) -> Pieces:
    """The layers, what their columns mean, the findings, what was not checked, and last the summary."""
    said = content(results, verbose=verbose)
    pieces = _table(said.table, None if verbose else width)
    if said.meanings:
        pieces += [("\n", ""), *_rows(said.meanings, width)]
    for group in said.groups:
        title = (f"\n{group.severity}: ", _COLOURS[group.severity]), (f"{group.title}\n", "bold")
        pieces += [*title, *_rows(group.rows, width)]
    if said.not_checked:
        pieces.append(("\nnot checked\n", "bold"))
        # The names are too long for a column of their own.
        pieces += [(f"{_wrap(f'{kinds}: {needs}', width, 2, 6)}\n", "") for kinds, needs in said.not_checked]
    pieces.append((f"\n{_wrap(results.summary(), width, 0, 0)}", "bold"))
    if not verbose:
        whole = content(results, verbose=True)
        if (said.groups, said.not_checked) != (whole.groups, whole.not_checked):
            pieces.append(("\nverbose=True, or --wide, shows all layers and figures", "dim"))
    return pieces


def _table(rows: list[list[str]], width: int | None) -> Pieces:
    """First the name of the layer, last the worst severity, numbers between them. None: as wide as it has to be."""
    widths = [len(max(column, key=len)) for column in zip(*rows, strict=True)]
    if width is not None:
        widths[0] = min(widths[0], max(width - sum(widths[1:]) - 2 * len(widths[1:]), _NARROWEST))
    pieces = []
    for name, *numbers, severity in rows:
        cells = [shorten(name, widths[0]).ljust(widths[0])]
        cells += [number.rjust(w) for number, w in zip(numbers, widths[1:-1], strict=True)]
        is_header = severity not in _COLOURS
        pieces.append(("  ".join(cells), "bold" if is_header else ""))
        pieces.append((f"  {severity}\n", "bold" if is_header else _COLOURS[severity]))
    return pieces


def _rows(rows: Rows, width: int) -> Pieces:
    longest = max([len(label) for label, _ in rows])
    pieces = []
    for label, sentence in rows:
        pieces.append((f"  {label:{longest}}  " if sentence else f"  {label}", "dim"))
        pieces.append((f"{_wrap(sentence, width, longest + 4, longest + 4).lstrip()}\n", ""))
    return pieces


def _wrap(text: str, width: int, first: int, rest: int) -> str:
    """Breaks lines between words; the first line and the rest are indented by so many spaces."""
    return textwrap.fill(text, width, initial_indent=" " * first, subsequent_indent=" " * rest, break_on_hyphens=False)
