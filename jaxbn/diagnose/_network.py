"""Diagnoses a network: from runs on batches to a report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from jaxbn._arrays import floats, to_float64
from jaxbn._norms.batch_stream import with_progress
from jaxbn._norms.drift import Array
from jaxbn.diagnose._evidence import Batch, Norm, drift_of
from jaxbn.diagnose._layer_report import LayerReport
from jaxbn.diagnose._measure import FirstCall, MeasuredRun, Runner, Sums, of_domains, squared_distance
from jaxbn.diagnose._not_checked import NotChecked, not_checked
from jaxbn.diagnose._report import Report, ranked
from jaxbn.diagnose._rules import Finding, Thresholds, finding, judge, limits

# How many examples of the first batch are evaluated among others.
_KEPT = 4


class _Examined(NamedTuple):
    """A layer, or one of its domains: what is stored, what batches brought (None: nothing), and the numbers of both."""

    norm: Norm
    batch: Batch | None
    report: LayerReport


def examine(
    runner: Runner,
    batches: Any,
    *,
    steps: int | None,
    train_batch_size: int | None,
    thresholds: Thresholds,
    progress: bool,
) -> Report:
    """The whole diagnosis of a network; see `diagnose_linen`."""
    batches = _as_list(batches)

    def run(by_batch: bool, mode: str) -> list[MeasuredRun]:
        # The first batch takes as long as compiling does.
        bar = with_progress(batches, progress, f"compiling, running in {mode} mode")
        return [runner.measure(batch, by_batch=by_batch) for batch in bar]

    in_eval = run(False, "eval")
    first_calls = in_eval[0].first_calls
    if not first_calls:
        raise ValueError(
            "model: expected calls of BatchNorm layers (Flax's or jaxbn's, Linen or NNX), got none; see that call "
            "runs the model that was given, and not one of its own"
        )
    in_train = run(True, "train")

    examined: list[_Examined] = []
    for call in first_calls.values():
        norms = runner.norms(call.layer, steps)
        sums = [[of_domains(run.sums[call.layer.name], len(norms)) for run in runs] for runs in (in_train, in_eval)]
        for domain, norm in enumerate(norms):
            train, evaluation = ([run[domain] for run in runs] for runs in sums)
            batch = _batch(norm, train, call, train_batch_size)
            examined.append(_Examined(norm, batch, _layer_report(norm, batch, train, evaluation)))

    difference = _relative(_outputs(in_train), _outputs(in_eval))
    training = [call.layer.name for call in first_calls.values() if call.trains]
    differing = [e for e in examined if e.batch and (e.report.own or 0) > limits(e.batch, thresholds)[0]]
    depends, unknown = _depends_on_batch(runner, batches[0], in_eval[0].output, thresholds)
    findings = judge([(e.norm, e.batch) for e in examined], thresholds)
    findings += [_train_mode(name, runner) for name in training]
    findings += _parting(differing, len(examined), difference, runner, thresholds) + depends

    paths = [e.norm.path for e in examined]
    reached = {e.norm.path for e in examined if e.batch is not None}
    missing = not_checked([e.norm for e in examined], reached)
    missing += [NotChecked(("depends_on_batch",), tuple(paths), needs) for needs in unknown]
    parts_at = differing[0].norm.path if differing else None
    return Report([e.report for e in examined], ranked(findings, paths), parts_at, difference, missing)


def _as_list(batches: Any) -> list[Any]:
    """One batch is an array or dictionary; several are a list, tuple or iterator of what `call` takes."""
    if hasattr(batches, "shape") or isinstance(batches, dict):
        return [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an array, or a list of batches, got {type(batches).__name__}")
    several: list[Any] = list(batches)
    if not several:
        raise ValueError("batches: expected at least one batch, got none; an iterator may have been used up")
    return several


def _batch(norm: Norm, sums: list[Sums], call: FirstCall, train_batch_size: int | None) -> Batch | None:
    """The moments of all batches as one; None for a layer in which no value counted."""
    moments = [s.moments for s in sums]
    count: Any = sum(n for n, _, _ in moments)
    calls = sum(float(s.calls.max()) for s in sums)
    if not np.max(count) > 0:
        return None
    mean: Any = sum(n * m for n, m, _ in moments) / np.maximum(count, 1)
    var: Any = sum(n * (v + (m - mean) ** 2) for n, m, v in moments) / np.maximum(count, 1)
    values = float(np.max(count)) / calls
    # A statistic has as many examples in training as here, unless the caller or the layer says otherwise.
    examples = train_batch_size or call.examples
    if call.layer.virtual_batch_size is not None:
        examples = min(examples, call.layer.virtual_batch_size)
    return Batch(
        # A channel in which nothing counted gives no reason to doubt its running statistics.
        mean=np.where(count > 0, mean, norm.mean),
        var=np.where(count > 0, var, norm.var),
        examples=call.examples * len(sums),
        values=values * examples / call.examples,
        count=count,
        not_finite=int(sum(s.not_finite.sum() for s in sums)),
    )


def _layer_report(norm: Norm, batch: Batch | None, in_train: list[Sums], in_eval: list[Sums]) -> LayerReport:
    numbers: dict[str, Any] = {}
    if batch is not None:
        drift = drift_of(norm, batch)
        square = sum(float(s.square.sum()) for s in in_train)
        apart = sum(squared_distance(a, b) for a, b in zip(in_train, in_eval, strict=True))
        numbers = {
            "values": batch.values,
            "shift": drift.shift,
            "ratio": drift.ratio,
            "divergence": drift.divergence,
            "own": drift.total,
            "passed_on": math.sqrt(apart / square) if square > 0 else None,
        }
    return LayerReport(
        path=norm.path, mean=norm.mean, var=norm.var, seen=norm.seen, initial_weight=norm.initial_weight, **numbers
    )


def _train_mode(name: str, runner: Runner) -> Finding:
    evidence = "called with use_running_average=False where it was to evaluate"
    return finding("error", "train_mode", name, evidence, model=runner.kind)


def _parting(
    differing: list[_Examined], layers: int, difference: float | None, runner: Runner, thresholds: Thresholds
) -> list[Finding]:
    """Names the first of the layers that differ by themselves in training and in evaluation."""
    if not differing:
        return []
    norm, batch, report = differing[0]
    assert batch is not None
    assert report.own is not None
    evidence = (
        f"layers that normalize differently in training and in evaluation: {len(differing)} of {layers}; this is the "
        f"first, by {report.own:.2g} (rms); its output in the network differs by {report.passed_on or 0:.2g}, that of "
        f"the network by {difference or 0:.2g}"
    )
    severity = "error" if report.own > limits(batch, thresholds)[1] else "warning"
    numbers: dict[str, Any] = {"own": report.own, "output_difference": difference}
    return [finding(severity, "parting", norm.path, evidence, model=runner.kind, **numbers)]


def _depends_on_batch(runner: Runner, batch: Any, output: Any, t: Thresholds) -> tuple[list[Finding], list[str]]:
    """Compares outputs of the first examples with those among other examples; if it cannot, says what that needs.

    The batch keeps its size: in a program for another size, bfloat16 rounds to results that differ by 0.3% behind four
    convolutions, as on devices that round the products of float32.
    """
    number = _examples(batch, output)
    if number < 2:
        return [], ["a batch of at least 2 examples"]
    kept = min(_KEPT, number // 2)
    rows = np.where(np.arange(number) < kept, np.arange(number), 0)
    others = runner.measure(jax.tree.map(lambda v: _take(v, rows), batch), by_batch=False).output
    pairs = [(a, b) for a, b in zip(floats(output), floats(others), strict=True) if np.shape(a)[:1] == (number,)]
    if not pairs:
        return [], ["outputs that have the examples along their first axis"]
    expected, actual = ([to_float64(v)[:kept] for v in values] for values in zip(*pairs, strict=True))
    difference = _relative(expected, actual)
    if difference is None or difference <= t.composition:
        return [], []
    evidence = (
        f"outputs of the first {kept} of {number} examples differ by {difference:.2g} (relative, rms) if the others "
        "are replaced"
    )
    return [finding("error", "depends_on_batch", "", evidence, model=runner.kind, difference=difference)], []


def _take(v: Any, rows: npt.NDArray[np.intp]) -> Any:
    """The rows of an array whose first axis is that of the examples; it stays on its devices."""
    if np.shape(v)[:1] != rows.shape:
        return v
    if not isinstance(v, jax.Array):
        return v[rows]
    if jax.numpy.issubdtype(v.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_take(jax.random.key_data(v), rows), impl=jax.random.key_impl(v))
    # Taken on the host, since the types of explicit mesh axes do not say how the rows would be sharded.
    taken = np.asarray(v)[rows]
    return jax.device_put(taken, v.sharding) if v.committed else taken


def _examples(batch: Any, output: Any) -> int:
    """How many examples a batch has: the first size of a leading axis in it that an output has too.

    Failing that, the first size: what leads in a batch may be random keys.
    """
    given, returned = ([np.shape(v)[0] for v in jax.tree.leaves(tree) if np.ndim(v) > 0] for tree in (batch, output))
    shared = [size for size in given if size in returned]
    return next(iter(shared or given), 0)


def _outputs(runs: list[MeasuredRun]) -> list[Array]:
    return [to_float64(v) for run in runs for v in floats(run.output)]


def _relative(expected: list[Array], actual: list[Array]) -> float | None:
    """Root mean square difference over the root mean square; None if all that is expected is 0.

    NaN and infinity differ from everything but themselves.
    """
    square = apart = 0.0
    with np.errstate(invalid="ignore"):
        for v, w in zip(expected, actual, strict=True):
            same = (v == w) | (np.isnan(v) & np.isnan(w))
            square += float(np.sum(v**2, where=np.isfinite(v)))
            apart += float(np.sum((v - w) ** 2, where=~same))
    if square > 0:
        return math.sqrt(apart / square)
    return math.nan if math.isnan(apart) else None
