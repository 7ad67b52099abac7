"""The numbers of one norm layer in a report."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxbn._statistics.drift import Array


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


def layer_dict(layer: LayerReport, channels: bool) -> dict[str, Any]:
    """The layer's part of `Report.to_dict`."""
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
