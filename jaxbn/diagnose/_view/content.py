"""What a report says as text and as HTML: the table of layers, findings in groups, and what was not checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxbn.diagnose._results import COLUMNS, Finding, Results

# The columns that fit into 80 characters beside whole names, with batches and without.
_BRIEF = ("layer", "shift max", "own", "passed on")
_BRIEF_STORED = ("layer", "channels", "running std", "seen")
_MEANINGS = {
    "running std": "smallest and largest running standard deviation of the channels",
    "seen": "batches that the running statistics were updated with; ? if unknown",
    "values": "values that a training statistic is computed from",
    "shift max": "largest |batch mean - running mean|, in running standard deviations",
    "median": "the same, median of the channels",
    "var ratio": "batch variance / running variance, smallest and largest",
    "KL max": "largest symmetric Kullback-Leibler divergence of a channel",
    "own": "rms difference between train and eval that this layer alone makes",
    "passed on": "rms difference of its output, with what earlier layers contribute",
}
# A short report shows this many layers of a list (one more rather than "and 1 more"), and this much of their names.
_FEW = 3
_LONGEST_NAME = 60

# Pairs of a label and a sentence.
Rows = list[tuple[str, str]]


class Group(NamedTuple):
    """Findings with the same severity, kind, cause and cure, under one title."""

    severity: str
    title: str
    rows: Rows


class Content(NamedTuple):
    """What a report says: the whole if it is verbose.

    `table` has a header and a row for each layer, which ends with the severity of its worst finding; `meanings`
    explains the columns, `not_checked` names checks and what they need.
    """

    table: list[list[str]]
    meanings: Rows
    groups: list[Group]
    not_checked: Rows


def content(results: Results, *, verbose: bool) -> Content:
    layers, findings = results.layers, results.findings
    # The worst findings are the first.
    worst = {f.layer: f.severity for f in reversed(findings)}
    cells = [layer.cells() | {"finding": worst.get(layer.path, "none")} for layer in layers]
    compared = [layer for layer in layers if layer.own is not None]
    wanted = COLUMNS if verbose else _BRIEF if compared else _BRIEF_STORED
    # A column that says nothing of any layer is left out.
    said = [c for c in wanted if c == "layer" or {row[c] for row in cells} - {"", "?"}]
    columns = [*said, "finding"]
    table = [columns, *[[row[c] for c in columns] for row in cells]]
    meanings = [(c, _MEANINGS[c]) for c in columns if c in _MEANINGS] if verbose or compared else []

    alike: dict[tuple[str, str, str, str], list[Finding]] = {}
    for f in findings:
        alike.setdefault((f.severity, f.kind, f.cause, f.cure), []).append(f)
    groups = [_group(group, len(layers), verbose) for group in alike.values()]

    not_checked = []
    for n in results.not_checked:
        where = "" if len(n.layers) == len(layers) else f" in {_listed(n.layers, verbose)}"
        not_checked.append((", ".join(n.kinds) + where, f"needs {n.needs}"))
    return Content(table, meanings, groups, not_checked)


def _group(findings: list[Finding], layers: int, verbose: bool) -> Group:
    """Layers with their evidence, then cause and cure once."""
    first = findings[0]
    paths = list(dict.fromkeys([f.layer for f in findings]))
    by_evidence: dict[str, list[str]] = {}
    for f in findings:
        by_evidence.setdefault(f.evidence, []).append(f.layer)
    if not verbose and len(by_evidence) > 1 and len(paths) > _FEW + 1:
        evidence = f"for example in {shorten(first.layer, _LONGEST_NAME)}: {first.evidence}"
        rows = [("layers", _listed(paths, verbose)), ("evidence", evidence)]
    else:
        rows = []
        for evidence, where in by_evidence.items():
            if where != [""]:
                rows.append(("layer" if len(where) == 1 else "layers", _listed(where, verbose)))
            rows.append(("evidence", evidence))
    title = first.kind if len(paths) == 1 else f"{first.kind} in {len(paths)} of {layers} layers"
    return Group(first.severity, title, [*rows, ("cause", first.cause), ("cure", first.cure)])


def _listed(paths: Sequence[str], verbose: bool) -> str:
    if verbose:
        return ", ".join(paths)
    shown = paths if len(paths) <= _FEW + 1 else paths[:_FEW]
    names = ", ".join([shorten(path, _LONGEST_NAME) for path in shown])
    return names if len(shown) == len(paths) else f"{names} and {len(paths) - len(shown)} more"


def shorten(path: str, width: int) -> str:
    """Leaves parts of a path out of its middle until it fits: `layer4/.../BatchNorm_1`."""
    if len(path) <= width:
        return path
    first, *parts = path.split("/")
    for start in range(1, len(parts)):
        short = "/".join([first, "...", *parts[start:]])
        if len(short) <= width:
            return short
    head, tail = (width - 3) // 2, width - 3 - (width - 3) // 2
    return f"{path[:head]}...{path[len(path) - tail :]}"
