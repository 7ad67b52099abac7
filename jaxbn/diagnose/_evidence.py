"""The data by which a norm layer is judged: stored arrays, moments of batches, and how far the two differ."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

# In jaxbn.diagnose all arrays on the host have float64.
Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """What is stored of a norm layer; arrays float64 [C]. What is not known is None.

    `model` is "functions", "linen" or "nnx". `decay` is the weight of the old statistics; `cumulative` statistics are
    an average over all batches instead (momentum None). `seen` is the number of batches that entered the statistics.
    `disagreement` is how far replicas differ, in standard deviations.
    """

    path: str
    model: str | None = None
    mean: Array
    var: Array
    scale: Array | None = None
    bias: Array | None = None
    eps: float = 1e-5
    decay: float | None = None
    cumulative: bool = False
    seen: int | None = None
    disagreement: float | None = None

    @property
    def initial_weight(self) -> float | None:
        """The weight of the initial mean 0 and variance 1 in the running statistics."""
        if self.seen is None:
            return None
        if self.cumulative or self.seen == 0:
            return 1.0 if self.seen == 0 else 0.0
        return None if self.decay is None else self.decay**self.seen

    @property
    def untouched(self) -> bool:
        """Whether the running statistics are the initial ones."""
        return bool((self.mean == 0).all() and (self.var == 1).all())

    @property
    def zeroed(self) -> bool:
        """Whether the running statistics are 0, as arrays are that were made to be filled."""
        return not (self.mean.any() or self.var.any())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a layer was given in all batches: moments, float64 [C], and the number of examples.

    `values` is the number of values per statistic in training; `not_finite` counts NaN and infinite values.
    """

    mean: Array
    var: Array
    count: Array
    examples: int
    values: float
    not_finite: int = 0


@dataclasses.dataclass(frozen=True)
class Drift:
    """How the moments of a batch differ from the running statistics, per channel; float64 [C].

    Formula, with m, v the mean and variance of the batch (b) and of the running statistics (r), and eps
    added to both variances, as the layer does:
    `shift = |m_b - m_r| / sqrt(v_r)`; `ratio = v_b / v_r`;
    `divergence = (v_b / v_r + v_r / v_b - 2 + (m_b - m_r)**2 * (1 / v_b + 1 / v_r)) / 2`, the symmetric
    Kullback-Leibler divergence of two Gaussians;
    `difference = sqrt((sqrt(ratio) - 1)**2 + shift**2)`, the root mean square difference between the same input
    normalized by the batch and by the running statistics, if eps is small beside v_b.

    Source: Kullback & Leibler (1951), On information and sufficiency, equation 2.6.
    """

    shift: Array
    ratio: Array
    divergence: Array
    difference: Array

    @property
    def total(self) -> float:
        """The root mean square difference over all channels."""
        return math.sqrt(float(np.mean(self.difference**2)))


def compare(norm: Norm, batch: Batch) -> Drift:
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        v_b, v_r = batch.var + norm.eps, norm.var + norm.eps
        d = batch.mean - norm.mean
        shift, ratio = np.abs(d) / np.sqrt(v_r), v_b / v_r
        divergence = (ratio + 1 / ratio - 2 + d * d * (1 / v_b + 1 / v_r)) / 2
        # The output normalized by the batch has the variance batch.var / v_b, a little less than 1.
        difference = np.sqrt((np.sqrt(ratio) - 1) ** 2 * batch.var / v_b + shift**2)
    return Drift(shift, ratio, divergence, difference)
