"""A report as text: plain, or coloured by rich."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from jaxbn._extras import need
from jaxbn.diagnose._content import Rows, groups, is_cut, meanings, shorten, table, unknown

if TYPE_CHECKING:
    from jaxbn.diagnose._report import Report

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "none": "green"}
# In a terminal too narrow for the table, names keep so many characters.
_NARROWEST = 12
# Some consoles say that they are 0 wide.
_NARROWEST_PAGE = 40

# A line is made of pieces: text and its style in rich.
Line = list[tuple[str, str]]


def plain(report: Report, *, verbose: bool, width: int) -> str:
    """Returns the report as text without colours."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in _lines(report, verbose, width))


def print_rich(report: Report, *, verbose: bool) -> None:
    """Prints the report in colour, as wide as the console is."""
    console = need("rich.console", "by Report.print").Console()
    # Text, so that brackets in a path are no markup.
    text = need("rich.text", "by Report.print").Text
    console.width = max(console.width, _NARROWEST_PAGE)
    for line in _lines(report, verbose, console.width):
        console.print(text.assemble(*line), soft_wrap=True)


def _lines(report: Report, verbose: bool, width: int) -> list[Line]:
    """The layers, what their columns mean, the findings, what was not checked, and last the summary."""
    blocks = [_table(table(report, verbose=verbose), None if verbose else width)]
    blocks.append(_rows(meanings(report, verbose=verbose), width))
    for group in groups(report):
        title: Line = [(f"{group.severity}: ", _COLOURS[group.severity]), (group.title, "bold")]
        blocks.append([title, *_rows(group.rows(verbose=verbose), width)])
    if report.not_checked:
        # The names are too long for a column of their own.
        sentences = [f"{kinds}: {needs}" for kinds, needs in unknown(report, verbose=verbose)]
        blocks.append([[("not checked", "bold")]])
        blocks[-1] += [[(line, "")] for sentence in sentences for line in _wrap(sentence, width, "  ", " " * 6)]
    blocks.append([[(line, "bold")] for line in _wrap(report.summary(), width, "", "")])
    if not verbose and is_cut(report):
        blocks[-1].append([("verbose=True, or --wide, shows all layers and figures", "dim")])
    return [line for block in blocks if block for line in ([("", "")], *block)][1:]


def _table(rows: list[list[str]], width: int | None) -> list[Line]:
    """First the name of the layer, last its worst finding; numbers between them. None: as wide as it has to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if width is not None:
        widths[0] = min(widths[0], max(width - sum(2 + w for w in widths[1:]), _NARROWEST))
    lines = []
    for name, *numbers, finding in rows:
        cells = [shorten(name, widths[0]).ljust(widths[0])]
        cells += [number.rjust(w) for number, w in zip(numbers, widths[1:-1], strict=True)]
        style = _COLOURS.get(finding, "bold")
        lines.append([("  ".join(cells), "" if finding in _COLOURS else style), (f"  {finding}", style)])
    return lines


def _rows(rows: Rows, width: int) -> list[Line]:
    label = max((len(name) for name, _ in rows), default=0)
    lines: list[Line] = []
    for name, value in rows:
        first, *rest = _wrap(value, width, " " * (label + 4), " " * (label + 4))
        lines += [[(f"  {name:{label}}  ", "dim"), (first.lstrip(), "")], *([(line, "")] for line in rest)]
    return lines


def _wrap(value: str, width: int, first: str, rest: str) -> list[str]:
    # Without a line for an empty value, its label would be lost.
    return textwrap.wrap(value, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False) or [first]
