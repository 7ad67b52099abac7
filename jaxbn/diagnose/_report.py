"""The report of a diagnosis: printed, as JSON, and drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import textwrap
from typing import Any

import numpy as np

from jaxbn._extras import need
from jaxbn.diagnose._evidence import Array
from jaxbn.diagnose._not_checked import NotChecked
from jaxbn.diagnose._rules import SEVERITIES, Finding

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan", "": "green"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """The numbers of one norm layer. What was not measured is None.

    Attributes:
      path: of the layer.
      mean, var: the running statistics; float64 [C].
      seen: how many batches have entered them; a count of 0 is believed only of initial statistics.
      initial_weight: the weight of the initial mean 0 and variance 1 in them.
      values: how many values a training statistic has.
      shift: |mean of the batch - running mean| in running standard deviations; float64 [C].
      ratio: variance of the batch over the running one; float64 [C].
      divergence: symmetric Kullback-Leibler divergence of the two Gaussians; float64 [C].
      own: root mean square difference, over all channels, of *one* input normalized by the batch and by
        the running statistics, in units of the normalized output: this layer's own part.
      passed_on: root mean square difference of the layer's output in the network in train and in eval
        mode, relative to that in train mode: with what earlier layers contributed.

    Formulas, with eps added to all variances: `shift = |m_b - m_r| / sqrt(v_r)`, `ratio = v_b / v_r`,
    `divergence = (v_b / v_r + v_r / v_b - 2 + (m_b - m_r)**2 * (1 / v_b + 1 / v_r)) / 2`.

    Source: Kullback & Leibler (1951), On information and sufficiency (the divergence).

    Example:
      >>> import numpy as np
      >>> from jaxbn.diagnose import diagnose_statistics
      >>> tree = {"norm": {"mean": np.array([0.5]), "var": np.array([2.0])}}
      >>> layer = diagnose_statistics(tree, decay=0.5, steps=3).layers[0]
      >>> layer.path, layer.seen, layer.initial_weight, layer.shift
      ('norm', 3, 0.125, None)
    """

    path: str
    mean: Array
    var: Array
    seen: int | None = None
    initial_weight: float | None = None
    values: float | None = None
    shift: Array | None = None
    ratio: Array | None = None
    divergence: Array | None = None
    own: float | None = None
    passed_on: float | None = None

    def cells(self) -> dict[str, str]:
        """Returns what the table shows of it, by column; "" where nothing was measured."""

        def show(value: float | None) -> str:
            return "" if value is None else f"{value:.3g}"

        def extremes(values: Array | None) -> str:
            return "" if values is None else f"{values.min():.2g}..{values.max():.2g}"

        with np.errstate(invalid="ignore"):
            std = np.sqrt(self.var)
        return {
            "layer": self.path,
            "channels": str(self.mean.size),
            "running std": extremes(std),
            "seen": "?" if self.seen is None else str(self.seen),
            "values": show(self.values),
            "shift max": show(None if self.shift is None else float(self.shift.max())),
            "median": show(None if self.shift is None else float(np.median(self.shift))),
            "var ratio": extremes(self.ratio),
            "KL max": show(None if self.divergence is None else float(self.divergence.max())),
            "own": show(self.own),
            "passed on": show(self.passed_on),
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """What a diagnosis found. `str(report)` is plain text, `report.print()` a table in colour.

    Attributes:
      layers: the numbers of each norm layer, in the order in which the network calls them.
      findings: what is wrong, the worst first.
      parts_at: path of the first layer whose own train and eval output differ by more than a
        threshold, or None.
      output_difference: root mean square difference of the network's outputs in train and in eval
        mode, relative to that in train mode; None without batches.
      not_checked: the kinds of findings that were not looked for, for want of what they need.

    Example:
      >>> import numpy as np
      >>> from jaxbn.diagnose import diagnose_statistics
      >>> tree = {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}
      >>> report = diagnose_statistics(tree)
      >>> report.ok, [f.kind for f in report.errors]
      (False, ['untouched'])
    """

    layers: list[LayerReport]
    findings: list[Finding]
    parts_at: str | None = None
    output_difference: float | None = None
    not_checked: list[NotChecked] = dataclasses.field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings of severity "error"."""
        return [f for f in self.findings if f.severity == "error"]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not self.errors

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        # First the name, last the verdict; numbers between them.
        ends = (0, len(widths) - 1)
        lines = []
        for row in rows:
            cells = (c.ljust(w) if i in ends else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            lines.append("  ".join(cells).rstrip())
        lines += ["", self.summary()]
        for same in self._grouped():
            lines += ["", f"{same[0].severity}: {same[0].kind}"]
            for name, value in _rows(same):
                first = f"  {name}: "
                wrapped = textwrap.wrap(value, 110, initial_indent=first, subsequent_indent=" " * 6)
                lines += wrapped
        if self.not_checked:
            lines += ["", "not checked"]
            for name, value in self._unknown():
                lines += textwrap.wrap(f"{name}: {value}", 112, initial_indent="  ", subsequent_indent=" " * 6)
        return "\n".join(lines)

    def summary(self) -> str:
        """Returns one line: how many findings, and where train and eval part."""
        counts = [(sum(f.severity == s for f in self.findings), s) for s in SEVERITIES]
        parts = [f"{n} {s}{'' if n == 1 else 's'}" for n, s in counts if n]
        text = f"{len(self.layers)} norm layer{'s' * (len(self.layers) != 1)}: " + (", ".join(parts) or "no findings")
        if self.output_difference is not None:
            text += f"; outputs in train and eval mode differ by {self.output_difference:.2g}"
        return text if self.parts_at is None else f"{text}; they part at {self.parts_at}"

    def print(self) -> None:
        """Prints the report as tables in colour; needs rich."""
        rich_table, rich_console = (need(f"rich.{name}", "by Report.print") for name in ("table", "console"))
        text = need("rich.text", "by Report.print").Text
        console = rich_console.Console()
        header, *rows = self._table()
        table = rich_table.Table(title="Batch norm layers")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i in (0, len(header) - 1) else "right", overflow="fold")
        for row in rows:
            # As Text, so that brackets in a path are no markup.
            table.add_row(*map(text, row[:-1]), text(row[-1] or "ok", style=_COLOURS[row[-1]]))
        console.print(table)
        for same in self._grouped():
            severity = same[0].severity
            console.print(text(f"{severity}: {same[0].kind}", style=_COLOURS[severity]))
            console.print(_box(_rows(same), rich_table, text))
        if self.not_checked:
            console.print(text("not checked", style="dim"))
            console.print(_box(self._unknown(), rich_table, text))
        console.print(text(self.summary(), style="bold"))

    def to_dict(self, *, channels: bool = False) -> dict[str, Any]:
        """Returns the report as dictionaries, lists, strings and numbers.

        Args:
          channels: whether to include the arrays of each layer, rather than their extremes alone.

        Returns:
          `ok`, `parts_at`, `output_difference`, `findings`, `not_checked` and `layers`. Arrays are lists.

        Example:
          >>> import numpy as np
          >>> from jaxbn.diagnose import diagnose_statistics
          >>> tree = {"norm": {"mean": np.zeros(3), "var": np.ones(3)}}
          >>> diagnose_statistics(tree).to_dict()["findings"][0]["severity"]
          'error'
        """
        return {
            "ok": self.ok,
            "parts_at": self.parts_at,
            "output_difference": self.output_difference,
            "findings": [dataclasses.asdict(f) for f in self.findings],
            "not_checked": [dataclasses.asdict(n) for n in self.not_checked],
            "layers": [_layer_dict(layer, channels) for layer in self.layers],
        }

    def to_json(self, *, channels: bool = False) -> str:
        """Returns `to_dict` as JSON; numbers that JSON does not have are the strings "nan", "inf" and "-inf".

        Example:
          >>> import json, numpy as np
          >>> from jaxbn.diagnose import diagnose_statistics
          >>> tree = {"norm": {"mean": np.array([np.nan]), "var": np.ones(1)}}
          >>> json.loads(diagnose_statistics(tree).to_json(channels=True))["layers"][0]["mean"]
          ['nan']
        """
        return json.dumps(_finite(self.to_dict(channels=channels)), indent=2, allow_nan=False)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Saves a picture: each layer's difference between train and eval, and histograms of its channels.

        Without batches the histograms are those of the running statistics.

        Args:
          path: of the file; its ending says which format.

        Raises:
          ImportError: matplotlib is not installed.

        Example:
          >>> import numpy as np, pathlib, tempfile
          >>> from jaxbn.diagnose import diagnose_statistics
          >>> report = diagnose_statistics({"norm": {"mean": np.zeros(3), "var": np.ones(3)}})
          >>> file = pathlib.Path(tempfile.mkdtemp()) / "report.png"
          >>> report.draw(file)
          >>> file.exists()
          True
        """
        from jaxbn.diagnose._draw import draw

        draw(self, path)

    def _table(self) -> list[list[str]]:
        """Header and rows, without columns in which nothing is."""
        cells = [layer.cells() | {"": self.severity_of(layer.path)} for layer in self.layers]
        names = [name for name in (cells[0] if cells else ()) if name == "" or any(c[name] for c in cells)]
        return [names, *([c[name] for name in names] for c in cells)]

    def _grouped(self) -> list[list[Finding]]:
        """Findings that differ in layer and evidence alone, together."""
        groups: dict[tuple[str, ...], list[Finding]] = {}
        for f in self.findings:
            groups.setdefault((f.severity, f.kind, f.cause, f.cure), []).append(f)
        return list(groups.values())

    def _unknown(self) -> list[tuple[str, str]]:
        """What was not checked, what it needs, and where, if not everywhere."""
        rows = []
        for n in self.not_checked:
            few = ", ".join(n.layers[:5]) + (", ..." if len(n.layers) > 5 else "")
            where = "" if len(n.layers) == len(self.layers) else f", for {few}"
            rows.append((", ".join(n.kinds), f"needs {n.needs}{where}"))
        return rows

    def severity_of(self, path: str) -> str:
        """Returns the severity of the worst finding about a layer, or "" if there is none."""
        return next((f.severity for f in self.findings if f.layer == path), "")


def ranked(findings: list[Finding], paths: list[str]) -> list[Finding]:
    """The worst first, then those of the network, then in its order; of one layer, in the order they were found."""
    order = {path: number for number, path in enumerate(["", *paths])}
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), order.get(f.layer, len(order))))


def _rows(same: list[Finding]) -> list[tuple[str, str]]:
    """Where, each with its evidence; then what is the same for all of them."""
    return [(f.layer or "network", f.evidence) for f in same] + [("cause", same[0].cause), ("cure", same[0].cure)]


def _box(rows: list[tuple[str, str]], rich_table: Any, text: Any) -> Any:
    box = rich_table.Table(show_header=False, box=None)
    box.add_column(style="dim")
    box.add_column(overflow="fold")
    for name, value in rows:
        box.add_row(text(name), text(value))
    return box


def _layer_dict(layer: LayerReport, channels: bool) -> dict[str, Any]:
    named = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    result = {k: v for k, v in named.items() if not isinstance(v, np.ndarray)} | {"channels": layer.mean.size}
    if layer.shift is not None and layer.ratio is not None and layer.divergence is not None:
        result |= {
            "shift_max": float(layer.shift.max()),
            "shift_median": float(np.median(layer.shift)),
            "ratio_min": float(layer.ratio.min()),
            "ratio_max": float(layer.ratio.max()),
            "divergence_max": float(layer.divergence.max()),
            "divergence_median": float(np.median(layer.divergence)),
            "worst_channels": np.argsort(-layer.divergence, kind="stable")[:3].tolist(),
        }
    if channels:
        result |= {k: v.tolist() for k, v in named.items() if isinstance(v, np.ndarray)}
    return result


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
