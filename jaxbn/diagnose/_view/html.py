"""A report as HTML, for Jupyter: one element that needs nothing from elsewhere."""

from __future__ import annotations

from html import escape

from jaxbn.diagnose._results import Results
from jaxbn.diagnose._view.content import Content, Rows, content

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


def html(results: Results) -> str:
    """Returns the summary, the findings, all figures of the layers, and what was not checked."""
    short, whole = content(results, verbose=False), content(results, verbose=True)
    text = f"<p><b>{escape(results.summary())}</b></p>"
    for group, uncut in zip(short.groups, whole.groups, strict=True):
        text += f"<p>{_badge(group.severity)} <b>{escape(group.title)}</b></p>{_facts(group.rows)}"
        if group != uncut:
            text += f"<details><summary>all layers</summary>{_facts(uncut.rows)}</details>"
    text += _layers(whole)
    if short.not_checked:
        items = "".join(f"<li>{escape(kinds)}: {escape(needs)}</li>" for kinds, needs in short.not_checked)
        text += f"<p><b>not checked</b></p><ul>{items}</ul>"
    return f'<div class="jaxbn-report"><style>{_STYLE}</style>{text}</div>'


def _facts(rows: Rows) -> str:
    cells = "".join(f"<tr><th>{escape(label)}</th><td>{escape(sentence)}</td></tr>" for label, sentence in rows)
    return f'<table class="facts">{cells}</table>'


def _layers(whole: Content) -> str:
    """The table with its last column, the worst finding, in front: the others may have to be scrolled."""
    (*columns, finding), *rows = whole.table
    explained = dict(whole.meanings)
    number = ["", *[' class="number"'] * (len(columns) - 1)]
    head = "".join(
        f'<th{kind} title="{escape(explained.get(column, ""))}">{escape(column)}</th>'
        for column, kind in zip(columns, number, strict=True)
    )
    body = ""
    for *values, severity in rows:
        cells = "".join(f"<td{kind}>{escape(value)}</td>" for value, kind in zip(values, number, strict=True))
        body += f"<tr><td>{_badge(severity)}</td>{cells}</tr>"
    return f'<div class="layers"><table><tr><th>{finding}</th>{head}</tr>{body}</table></div>'


def _badge(severity: str) -> str:
    return f'<span class="badge {severity}">{severity}</span>'
