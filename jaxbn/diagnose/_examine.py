"""Diagnoses a network: from runs on batches to a report."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
import numpy.typing as npt

from jaxbn._arrays import floats, to_float64
from jaxbn._statistics.batch_stream import taken_apart, with_progress
from jaxbn._statistics.drift import Array, compare
from jaxbn.diagnose._evidence import Batch, Norm, Place, make_norms
from jaxbn.diagnose._measure import PROJECTIONS, FirstCall, Network, Sums
from jaxbn.diagnose._report import Report
from jaxbn.diagnose._results import Finding, NotChecked
from jaxbn.diagnose._rules import finding, judge, not_checked, parting, ranked
from jaxbn.diagnose._thresholds import Thresholds

# How many examples of the first batch are evaluated among others.
_KEPT = 4


def examine(
    network: Network,
    batches: object,
    *,
    steps: int | None,
    train_batch_size: int | None,
    thresholds: Thresholds,
    progress: bool,
) -> Report:
    """The whole diagnosis of a network; see `diagnose_linen`."""
    several = _as_list(batches)
    # The first batch takes as long as compiling does.
    bar = with_progress(several, progress, "compiling, running in eval mode")
    with taken_apart(batches):
        in_eval = [network.evaluate(batch) for batch in bar]
    first_calls = in_eval[0].first_calls
    if not first_calls:
        raise ValueError(
            "model: expected calls of BatchNorm layers (Flax's or jaxbn's, Linen or NNX), got none; see that call "
            "runs the model that was given, and not one of its own"
        )
    bar = with_progress(several, progress, "compiling, running in train mode")
    in_train = [network.normalize_by_batch(batch) for batch in bar]

    norms: list[Norm] = []
    training: list[Place] = []
    for first in first_calls:
        layer = first.layer
        stored = make_norms(
            layer.name,
            network.stored[layer.name],
            interface=network.interface,
            eps=layer.eps,
            decay=layer.decay,
            cumulative=layer.decay is None,
            # They count the batches of all domains together, which says nothing about one.
            steps=steps if layer.num_domains is None else None,
            features=first.features,
        )
        train = [run.sums[layer.name] for run in in_train]
        evaluation = [run.sums[layer.name] for run in in_eval]
        norms += _with_batches(stored, first, train, evaluation, train_batch_size)
        if first.trains:
            training += [norm.place for norm in stored]

    difference = _relative([run.output for run in in_train], [run.output for run in in_eval])
    first_mismatch = parting(norms, difference, thresholds)
    depends = _depends_on_batch(network, several[0], in_eval[0].output, thresholds)

    unknown = not_checked(norms, alone=False)
    if isinstance(depends, str):
        unknown.append(NotChecked(("depends_on_batch",), tuple([norm.path for norm in norms]), depends))
    findings = judge(norms, thresholds)
    evidence = "called with use_running_average=False where it was to evaluate"
    findings += [finding(place, "error", "train_mode", evidence) for place in training]
    findings += [found for found in (first_mismatch, depends) if isinstance(found, Finding)]
    parts_at = None if first_mismatch is None else first_mismatch.layer
    return Report([norm.report() for norm in norms], ranked(findings, norms), parts_at, difference, unknown)


def _as_list(batches: object) -> list[object]:
    """One batch is an array or dictionary; several are a list, tuple or iterator of what `call` takes."""
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        return [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an array, or a list of batches, got {type(batches).__name__}")
    several = list(batches)
    if not several:
        raise ValueError("batches: expected at least one batch, got none; an iterator may have been used up")
    return several


def _with_batches(
    norms: list[Norm], first: FirstCall, in_train: Sequence[Sums], in_eval: Sequence[Sums], train_batch_size: int | None
) -> list[Norm]:
    """The layers that `first` stands for, with what all batches together brought to each."""
    # Of batches, projections, layers, channels; all but the projections have 1 for them.
    shape = len(in_train), -1, len(norms), norms[0].mean.size
    fields = [np.array(values, np.float64).reshape(shape) for values in zip(*in_train, strict=True)]
    calls, projections, square, not_finite, counts, means, variances = fields
    count = counts.sum((0, 1))
    at_least_1 = np.maximum(count, 1)
    mean = (counts * means).sum((0, 1)) / at_least_1
    var = (counts * (variances + (means - mean) ** 2)).sum((0, 1)) / at_least_1
    calls = calls.max(-1).sum((0, 1))
    not_finite, square = not_finite.sum((0, 1, 3)), square.sum((0, 1, 3))
    # The projections estimate the sum of squares of the difference of two outputs.
    others = np.array([sums.projections for sums in in_eval], np.float64).reshape(shape)
    apart = ((projections - others) ** 2).sum((0, 1, 3)) / PROJECTIONS
    # A statistic has as many examples in training as here, unless the caller or the layer says otherwise.
    examples = train_batch_size or first.examples
    if first.layer.virtual_batch_size is not None:
        examples = min(examples, first.layer.virtual_batch_size)

    found = []
    for d, norm in enumerate(norms):
        batch = None
        if count[d].max() > 0:
            # A channel in which nothing counted gives no reason to doubt its running statistics.
            m, v = np.where(count[d] > 0, mean[d], norm.mean), np.where(count[d] > 0, var[d], norm.var)
            batch = Batch(
                mean=m,
                var=v,
                count=count[d],
                examples=first.examples * len(in_train),
                values=float(count[d].max() / calls[d]) * examples / first.examples,
                not_finite=int(not_finite[d]),
                drift=compare((norm.mean, norm.var), (m, v), norm.eps),
                passed_on=math.sqrt(apart[d] / square[d]) if square[d] > 0 else None,
            )
        found.append(dataclasses.replace(norm, batch=batch))
    return found


def _depends_on_batch(network: Network, batch: object, output: object, t: Thresholds) -> Finding | str | None:
    """Compares outputs of the first examples with those among other examples; if it cannot, says what that needs.

    The batch keeps its size: in a program for another size, bfloat16 rounds to results that differ by 0.3% behind four
    convolutions, as on devices that round the products of float32.
    """
    # The first size of a leading axis in the batch that an output has too; or else the first size at all, since what
    # leads in a batch may be random keys.
    given = [np.shape(v)[0] for v in jax.tree.leaves(batch) if np.ndim(v)]
    returned = [np.shape(v)[0] for v in jax.tree.leaves(output) if np.ndim(v)]
    total = next(iter([size for size in given if size in returned] or given), 0)
    if total < 2:
        return "a batch of at least 2 examples"
    kept = min(_KEPT, total // 2)
    rows = np.where(np.arange(total) < kept, np.arange(total), 0)
    among_others = network.evaluate(jax.tree.map(functools.partial(_take, rows), batch)).output
    expected = [v[:kept] for v in _floats(output) if v.shape[:1] == rows.shape]
    actual = [v[:kept] for v in _floats(among_others) if v.shape[:1] == rows.shape]
    if not expected:
        return "outputs that have the examples along their first axis"
    difference = _relative(expected, actual)
    if difference is None or difference <= t.composition:
        return None
    evidence = (
        f"outputs of the first {kept} of {total} examples differ by {difference:.2g} (relative, rms) if the others "
        "are replaced"
    )
    return finding(("", network.interface), "error", "depends_on_batch", evidence, difference=difference)


def _take(rows: npt.NDArray[np.intp], v: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    """The rows of an array whose first axis is that of the examples; it stays on its devices."""
    if np.shape(v)[:1] != rows.shape:
        return v
    if not isinstance(v, jax.Array):
        return np.asarray(v)[rows]
    if jax.numpy.issubdtype(v.dtype, jax.dtypes.prng_key):
        data = jax.numpy.asarray(_take(rows, jax.random.key_data(v)))
        keys: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(v))
        return keys
    # Taken on the host, since the types of explicit mesh axes do not say how the rows would be sharded.
    taken = np.asarray(v)[rows]
    return jax.device_put(taken, v.sharding) if v.committed else taken


def _floats(outputs: object) -> list[Array]:
    """The floating-point arrays of a tree."""
    return [to_float64(v) for v in floats(outputs)]


def _relative(expected: object, actual: object) -> float | None:
    """Root mean square difference of trees over the root mean square; None if all that is expected is 0.

    NaN and infinity differ from everything but themselves.
    """
    square = apart = 0.0
    with np.errstate(invalid="ignore"):
        for v, w in zip(_floats(expected), _floats(actual), strict=True):
            same = (v == w) | (np.isnan(v) & np.isnan(w))
            square += float(np.sum(v**2, where=np.isfinite(v)))
            apart += float(np.sum((v - w) ** 2, where=~same))
    if square > 0:
        return math.sqrt(apart / square)
    return math.nan if math.isnan(apart) else None
