"""The data by which a norm layer is judged: stored arrays and moments of batches."""

from __future__ import annotations

import dataclasses

from jaxbn._statistics.drift import Array, Drift, are_initial, compare


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
        return are_initial(self.mean, self.var)

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


def drift_of(norm: Norm, batch: Batch) -> Drift:
    return compare((norm.mean, norm.var), (batch.mean, batch.var), norm.eps)
