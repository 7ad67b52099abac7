"""A report as HTML, for Jupyter: one element that needs nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from jaxbn.diagnose._content import Group, Rows, groups, meanings, table, unknown

if TYPE_CHECKING:
    from jaxbn.diagnose._report import Report

# Text has the colour of the page, light or dark; badges have a background of their own.
_STYLE = """
.jaxbn-report table { border-collapse: collapse; color: inherit; margin: 0.3em 0; }
.jaxbn-report th, .jaxbn-report td { color: inherit; padding: 0.15em 0.6em; text-align: left; vertical-align: top; }
.jaxbn-report .layers { max-height: 32em; overflow: auto; }
.jaxbn-report .layers table { font-size: 0.9em; }
.jaxbn-report .layers th, .jaxbn-report .layers td { border-bottom: 1px solid #8886; white-space: nowrap; }
.jaxbn-report .layers .number { text-align: right; font-variant-numeric: tabular-nums; }
.jaxbn-report .facts td { overflow-wrap: anywhere; }
.jaxbn-report .badge { border-radius: 0.3em; padding: 0 0.4em; }
.jaxbn-report .error { background: #c62828; color: #fff; }
.jaxbn-report .warning { background: #ffb300; color: #000; }
.jaxbn-report .note { background: #00796b; color: #fff; }
.jaxbn-report .none { background: #2e7d32; color: #fff; }
"""


def html(report: Report) -> str:
    """Returns the summary, the findings, all figures of the layers, and what was not checked."""
    parts = [f"<p><b>{escape(report.summary())}</b></p>", *map(_finding, groups(report)), _layers(report)]
    if report.not_checked:
        items = "".join(f"<li>{escape(kinds)}: {escape(needs)}</li>" for kinds, needs in unknown(report, verbose=False))
        parts.append(f"<p><b>not checked</b></p><ul>{items}</ul>")
    return f'<div class="jaxbn-report"><style>{_STYLE}</style>{"".join(parts)}</div>'


def _finding(group: Group) -> str:
    text = f"<p>{_badge(group.severity)} <b>{escape(group.title)}</b></p>{_facts(group.rows(verbose=False))}"
    if not group.is_cut:
        return text
    return f"{text}<details><summary>all layers</summary>{_facts(group.rows(verbose=True))}</details>"


def _facts(rows: Rows) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{cells}</table>'


def _layers(report: Report) -> str:
    """The table with its last column, the worst finding, in front: the others may have to be scrolled."""
    header, *rows = table(report, verbose=True)
    explained = dict(meanings(report, verbose=True))
    number = [""] + [' class="number"'] * (len(header) - 2)
    head = "".join(
        f'<th{kind} title="{escape(explained.get(name, ""))}">{escape(name)}</th>'
        for name, kind in zip(header[:-1], number, strict=True)
    )
    body = ""
    for *values, finding in rows:
        cells = "".join(f"<td{kind}>{escape(value)}</td>" for value, kind in zip(values, number, strict=True))
        body += f"<tr><td>{_badge(finding)}</td>{cells}</tr>"
    return f'<div class="layers"><table><tr><th>{header[-1]}</th>{head}</tr>{body}</table></div>'


def _badge(severity: str) -> str:
    return f'<span class="badge {severity}">{severity}</span>'
