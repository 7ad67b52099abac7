"""What text and HTML forms of a report have in common: the table, groups of findings, and what was not checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxbn.diagnose._rules import Finding

if TYPE_CHECKING:
    from jaxbn.diagnose._report import Report

# The columns that fit into 80 characters beside whole names, with batches and without.
_BRIEF = {"shift max", "own", "passed on"}
_BRIEF_STORED = {"channels", "running std", "seen"}
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

Rows = list[tuple[str, str]]


def table(report: Report, *, verbose: bool) -> list[list[str]]:
    """Header and rows, without columns in which nothing is known."""
    cells = [layer.cells() | {"finding": report.severity_of(layer.path) or "none"} for layer in report.layers]
    wanted = _BRIEF if any(layer.own is not None for layer in report.layers) else _BRIEF_STORED
    names = [
        name
        for name in (cells[0] if cells else ("layer", "finding"))
        if name in ("layer", "finding")
        or ((verbose or name in wanted) and any(c[name] not in ("", "?") for c in cells))
    ]
    return [names, *([c[name] for name in names] for c in cells)]


def meanings(report: Report, *, verbose: bool) -> Rows:
    """What the columns of the table mean, if there are differences between train and eval among them."""
    names, *_ = table(report, verbose=verbose)
    return [(name, _MEANINGS[name]) for name in names if name in _MEANINGS] if "own" in names or verbose else []


@dataclasses.dataclass(frozen=True)
class Group:
    """Findings with the same severity, kind, cause and cure, in the order of the report."""

    findings: list[Finding]
    title: str

    @property
    def severity(self) -> str:
        return self.findings[0].severity

    @property
    def is_cut(self) -> bool:
        """Whether the short rows leave something out."""
        return self.rows(verbose=False) != self.rows(verbose=True)

    def rows(self, *, verbose: bool) -> Rows:
        """Layers with their evidence, then cause and cure once."""
        first = self.findings[0]
        places: dict[str, list[str]] = {}
        for f in self.findings:
            places.setdefault(f.evidence, []).append(f.layer)
        rows = []
        layers = list(dict.fromkeys(f.layer for f in self.findings))
        if not verbose and len(places) > 1 and len(layers) > _FEW + 1:
            rows.append(("layers", _listed(layers, verbose)))
            rows.append(("evidence", f"for example in {shorten(first.layer, _LONGEST_NAME)}: {first.evidence}"))
        else:
            for evidence, where in places.items():
                if where != [""]:
                    rows.append(("layer" if len(where) == 1 else "layers", _listed(where, verbose)))
                rows.append(("evidence", evidence))
        return [*rows, ("cause", first.cause), ("cure", first.cure)]


def groups(report: Report) -> list[Group]:
    """The findings, those that differ in layer and evidence alone together; the worst first."""
    same: dict[tuple[str, ...], list[Finding]] = {}
    for f in report.findings:
        same.setdefault((f.severity, f.kind, f.cause, f.cure), []).append(f)
    number = {key: len({f.layer for f in findings}) for key, findings in same.items()}
    where = {key: f" in {n} of {len(report.layers)} layers" if n > 1 else "" for key, n in number.items()}
    return [Group(findings, key[1] + where[key]) for key, findings in same.items()]


def is_cut(report: Report) -> bool:
    """Whether a short report leaves out layers, or parts of their names, beside the table."""
    checks = unknown(report, verbose=False) != unknown(report, verbose=True)
    return checks or any(group.is_cut for group in groups(report))


def unknown(report: Report, *, verbose: bool) -> Rows:
    """The checks that were not made, and what each needs; for which layers, if not for all."""
    rows = []
    for n in report.not_checked:
        where = "" if len(n.layers) == len(report.layers) else f" in {_listed(n.layers, verbose)}"
        rows.append((", ".join(n.kinds) + where, f"needs {n.needs}"))
    return rows


def _listed(layers: Sequence[str], verbose: bool) -> str:
    if verbose:
        return ", ".join(layers)
    shown = layers if len(layers) <= _FEW + 1 else layers[:_FEW]
    names = ", ".join(shorten(layer, _LONGEST_NAME) for layer in shown)
    return names if len(shown) == len(layers) else f"{names} and {len(layers) - len(shown)} more"


def shorten(name: str, width: int) -> str:
    """Leaves parts of a path out of its middle until it fits: `layer4/.../BatchNorm_1`."""
    if len(name) <= width:
        return name
    first, *parts = name.split("/")
    for number in range(1, len(parts)):
        short = "/".join([first, "...", *parts[number:]])
        if len(short) <= width:
            return short
    head, tail = (width - 3) // 2, width - 3 - (width - 3) // 2
    return f"{name[:head]}...{name[len(name) - tail :]}"
