"""The evidence by which a norm layer is judged: what is stored of it, and what batches brought to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from jaxbn._arrays import to_float64
from jaxbn._paths import numbered
from jaxbn._statistics.drift import Array, Drift, are_initial
from jaxbn.diagnose._results import LayerReport

Interface = Literal["functions", "linen", "nnx"]
# The path of a layer, or "" for the network, and the interface that advice is to speak of.
Place = tuple[str, Interface | None]
COUNT = "num_batches_tracked"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """What a layer was given in all batches: moments, float64 [C], and the number of examples.

    `values` is the number of values per statistic in training; `not_finite` counts NaN and infinite values; `drift`
    compares the moments with the running statistics. `passed_on` is that of `LayerReport`.
    """

    mean: Array
    var: Array
    count: Array
    examples: int
    values: float
    not_finite: int
    drift: Drift
    passed_on: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Norm:
    """A norm layer, or one of its domains; arrays float64 [C]. What is not known is None.

    `decay` is the weight of the old statistics; `cumulative` statistics are an average over all batches instead
    (momentum None). `seen` is the number of batches that entered the statistics. `disagreement` is how far replicas
    differ, in standard deviations. `batch` is None if no value of a batch reached the layer.
    """

    path: str
    interface: Interface | None
    mean: Array
    var: Array
    scale: Array | None = None
    bias: Array | None = None
    eps: float
    decay: float | None
    cumulative: bool
    seen: int | None
    disagreement: float | None
    batch: Batch | None = None

    @property
    def place(self) -> Place:
        return self.path, self.interface

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

    def report(self) -> LayerReport:
        stored = LayerReport(
            path=self.path, mean=self.mean, var=self.var, seen=self.seen, initial_weight=self.initial_weight
        )
        if self.batch is None:
            return stored
        drift = self.batch.drift
        return dataclasses.replace(
            stored,
            values=self.batch.values,
            shift=drift.shift,
            ratio=drift.ratio,
            divergence=drift.divergence,
            own=drift.total,
            passed_on=self.batch.passed_on,
        )


def make_norms(
    path: str,
    arrays: Mapping[str, npt.ArrayLike],
    *,
    interface: Interface | None,
    eps: float,
    decay: float | None,
    cumulative: bool,
    steps: int | None,
    features: tuple[int, ...] | None = None,
    replica_axis: int | None = None,
) -> list[Norm]:
    """One layer from its arrays, or one for each along the leading axes on which several are stacked.

    Args:
      arrays: those named mean, var, scale, bias and num_batches_tracked, as far as the layer has them; others have no
        meaning.
      steps: the batches that each of the layers has seen, where no count says it.
      features: the shape of the statistics in one call of the layer, if a model tells it; the axes before these are of
        domains, loops and mapped models. Otherwise the axes of the count are the leading ones.
    """
    names = [name for name in ("mean", "var", "scale", "bias", COUNT) if arrays.get(name) is not None]
    values = {name: to_float64(arrays[name]) for name in names}
    count = values.pop(COUNT, None)
    if values["mean"].shape != values["var"].shape:
        raise ValueError(
            f"{path}: expected mean and var of the same shape, got {values['mean'].shape} and {values['var'].shape}; "
            "the file is damaged, or these are not running statistics"
        )
    apart: list[Array] = []
    if replica_axis is not None:
        axis = replica_axis % max(values["mean"].ndim, 1)
        values, apart = _merge_replicas(path, values, replica_axis, eps)
        # Counts have the same leading axes; the largest one is taken, as in sync_state.
        count = count if count is None or count.ndim <= axis else count.max(axis)

    shape = values["mean"].shape
    stack = _stack(path, shape, count, features)
    if count is not None:
        count = np.broadcast_to(count if count.shape == stack else count.max(), stack)
    if stack and features is None:
        # A tree does not say whether these are domains: `steps` counts the batches of all of them together.
        steps = None

    def at(index: tuple[int, ...], value: Array) -> Array:
        """What one layer has of an array, which need not have all the leading axes: parameters have none of domains."""
        own = value.ndim - len(shape) + len(stack)
        is_stacked = own >= 0 and value.shape == stack[:own] + shape[len(stack) :]
        return np.reshape(value[index[:own]] if is_stacked else value, -1)

    norms = []
    for index in np.ndindex(stack):
        flat = {key: at(index, value) for key, value in values.items()}
        # Converters write 0 for an unknown count: it is believed only beside the initial statistics.
        untouched = are_initial(flat["mean"], flat["var"])
        given = (None if count is None else count[index], steps)
        known = [int(n) for n in given if n or (n == 0 and untouched)]
        norms.append(
            Norm(
                path=numbered(path, index),
                interface=interface,
                eps=eps,
                decay=decay,
                cumulative=cumulative,
                seen=known[0] if known else None,
                disagreement=max((float(at(index, v).max(initial=0)) for v in apart), default=None),
                mean=flat["mean"],
                var=flat["var"],
                scale=flat.get("scale"),
                bias=flat.get("bias"),
            )
        )
    return norms


def _stack(path: str, shape: tuple[int, ...], count: Array | None, features: tuple[int, ...] | None) -> tuple[int, ...]:
    """The leading axes of running statistics along which several layers lie."""
    if features is not None:
        # A transformation may stack along another axis than the first; nothing tells these apart, so that is one layer.
        before = len(shape) - len(features)
        return shape[:before] if shape[before:] == features else ()
    if count is None:
        return ()
    if count.ndim < len(shape) and count.shape == shape[: count.ndim]:
        return count.shape
    if count.size > 1 and count.shape != shape:
        raise ValueError(
            f"{path}: expected {COUNT} to be one number, or one for each of several layers along the first axes of "
            f"mean, shape {shape}, got shape {count.shape}; move the axes of layers to the front, or give one number"
        )
    return ()


def _merge_replicas(path: str, values: dict[str, Array], axis: int, eps: float) -> tuple[dict[str, Array], list[Array]]:
    """The mean of each array over replicas, and how far replicas are at most from each, in standard deviations."""
    for name, value in values.items():
        if not -value.ndim <= axis < value.ndim or value.ndim < 2:
            raise ValueError(
                f"replica_axis: expected {path}/{name} with an axis {axis} of replicas before its channels, "
                f"got shape {value.shape}; leave replica_axis out if it was saved from one device"
            )
    merged = {name: value.mean(axis, keepdims=True) for name, value in values.items()}
    with np.errstate(invalid="ignore"):
        var = merged["var"] + eps
        apart = [
            np.abs(values["mean"] - merged["mean"]) / np.sqrt(var),
            np.abs(np.sqrt((values["var"] + eps) / var) - 1),
        ]
    apart += [np.abs(values[name] - merged[name]) for name in ("scale", "bias") if name in values]
    return {name: value.squeeze(axis) for name, value in merged.items()}, [v.max(axis) for v in apart]
