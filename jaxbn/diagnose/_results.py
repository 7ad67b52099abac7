"""What a diagnosis found, as data: layers, findings, and the checks that were not made."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from jaxbn._statistics.drift import Array

# From the worst.
SEVERITIES = ("error", "warning", "note")
# The columns of the table in which a report shows its layers.
COLUMNS = (
    *("layer", "channels", "running std", "seen", "values"),
    *("shift max", "median", "var ratio", "KL max", "own", "passed on"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerReport:
    """The numbers of one norm layer. What was not measured is None.

    Attributes:
      path: of the layer.
      mean, var: the running statistics; float64 [C].
      seen: how many batches the running statistics were updated with; None if unknown. A stored count of 0
        is believed only if the statistics are the initial ones.
      initial_weight: the weight of the initial mean 0 and variance 1 in the running statistics.
      values: how many values a training statistic is computed from.
      shift: |batch mean - running mean| in running standard deviations; float64 [C].
      ratio: batch variance / running variance; float64 [C].
      divergence: symmetric Kullback-Leibler divergence of the two Gaussians; float64 [C].
      own: the difference that this layer alone makes: root mean square difference, over all channels, of the
        *same* input normalized by the batch's and by the running statistics, in units of the normalized output.
      passed_on: root mean square difference of the layer's output in the network between train and eval
        mode, relative to that in train mode. It includes what earlier layers contribute.

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
        """Returns the layer's row in the table of the report, by column; "" where nothing was measured."""
        with np.errstate(invalid="ignore"):
            std = np.sqrt(self.var)
        row = dict.fromkeys(COLUMNS, "")
        row |= {"layer": self.path, "channels": str(self.mean.size), "running std": f"{std.min():.2g}..{std.max():.2g}"}
        row["seen"] = "?" if self.seen is None else str(self.seen)
        numbers = {"values": self.values, "own": self.own, "passed on": self.passed_on}
        if self.shift is not None:
            numbers |= {"shift max": float(self.shift.max()), "median": float(np.median(self.shift))}
        if self.divergence is not None:
            numbers["KL max"] = float(self.divergence.max())
        if self.ratio is not None:
            row["var ratio"] = f"{self.ratio.min():.2g}..{self.ratio.max():.2g}"
        return row | {name: f"{number:.3g}" for name, number in numbers.items() if number is not None}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
      severity: "error" (evaluation is wrong), "warning" (it probably is) or "note" (this may be intended).
      kind: a word for it; `docs/troubleshooting.md` has a section for each.
      layer: path of the layer, or "" for the network.
      evidence: the numbers, in a sentence.
      cause: the most likely cause.
      cure: what to do.
      numbers: the numbers by name, for programs.

    Example:
      >>> import numpy as np
      >>> from jaxbn.diagnose import diagnose_statistics
      >>> stats = {"mean": np.array([0.5]), "var": np.array([-1.0])}
      >>> finding = diagnose_statistics({"norm": stats}).findings[0]
      >>> finding.severity, finding.kind, finding.layer
      ('error', 'negative_variance', 'norm')
    """

    severity: str
    kind: str
    layer: str
    evidence: str
    cause: str
    cure: str
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class NotChecked:
    """Checks that were not made, because something that they need was not given.

    Attributes:
      kinds: the kinds of findings that were not looked for.
      layers: paths of the layers in which they were not looked for.
      needs: what to give: an argument of the function or option of the command, or data for another function.

    Example:
      >>> import numpy as np
      >>> from jaxbn.diagnose import diagnose_statistics
      >>> report = diagnose_statistics({"norm": {"mean": np.ones(2), "var": np.ones(2)}}, decay=0.9)
      >>> [(n.kinds, n.needs) for n in report.not_checked][0]
      (('initial_weight',), 'steps')
    """

    kinds: tuple[str, ...]
    layers: tuple[str, ...]
    needs: str


@dataclasses.dataclass(frozen=True)
class Results:
    """A report without the methods that show it; see `Report` for the attributes."""

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

    def severity_of(self, path: str) -> str:
        """Returns the severity of the worst finding about a layer, or "" if there is none."""
        return next((f.severity for f in self.findings if f.layer == path), "")

    def summary(self) -> str:
        """Returns one line: the number of findings, the difference between train and eval, and where it begins."""
        severities = [f.severity for f in self.findings]
        counts = [(severities.count(severity), severity) for severity in SEVERITIES]
        found = ", ".join([f"{n} {severity}{'s' * (n != 1)}" for n, severity in counts if n])
        text = f"{len(self.layers)} norm layer{'s' * (len(self.layers) != 1)}: {found or 'no findings'}"
        if self.output_difference is not None:
            text += f"; outputs in train and eval mode differ by {self.output_difference:.2g}"
        if self.parts_at is not None:
            text += f"; the first layer whose statistics do not fit is {self.parts_at}"
        return text

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


def _layer_dict(layer: LayerReport, channels: bool) -> dict[str, object]:
    named = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    arrays = {name: value.tolist() for name, value in named.items() if isinstance(value, np.ndarray)}
    result = {name: value for name, value in named.items() if name not in arrays} | {"channels": layer.mean.size}
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
    return result | arrays if channels else result


def _finite(value: object) -> object:
    """Replaces NaN and infinity, which JSON does not have, by strings."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
