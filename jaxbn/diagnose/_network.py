"""From runs of a network on batches to a report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxbn.diagnose._evidence import Array, Batch, Norm, compare
from jaxbn.diagnose._find import to_numpy
from jaxbn.diagnose._measure import Pass, Runner, Seen, distance, pieces
from jaxbn.diagnose._not_checked import not_checked
from jaxbn.diagnose._report import LayerReport, Report, ranked
from jaxbn.diagnose._rules import Finding, Thresholds, finding, judge, limits

# So many examples of the first batch are evaluated alone: each is a run, and one usually tells.
_SINGLES = 4


def examine(
    runner: Runner, batches: Any, *, steps: int | None, train_batch_size: int | None, thresholds: Thresholds
) -> Report:
    """The whole diagnosis of a network; see `diagnose_linen`."""
    batches = _as_list(batches)
    called = [runner.run(batch, by_batch=False) for batch in batches]
    seen = called[0].seen
    if not seen:
        raise ValueError(
            "model: expected calls of BatchNorm layers (Flax's or jaxbn's, Linen or NNX), got none; see that call "
            "runs the model that was given, and not one of its own"
        )
    trained = [runner.run(batch, by_batch=True) for batch in batches]

    all_norms: list[Norm] = []
    layers: list[LayerReport] = []
    findings: list[Finding] = []
    parting: list[tuple[str, float, float, str]] = []
    for path, options in seen.items():
        norms = runner.norms(path, options, steps)
        all_norms += norms
        slots = [[pieces(run.slots[path], len(norms)) for run in runs] for runs in (trained, called)]
        for number, norm in enumerate(norms):
            in_train, in_eval = ([slot[number] for slot in run] for run in slots)
            batch = _batch(norm, in_train, options, train_batch_size)
            findings += judge(norm, batch, thresholds)
            layer = _layer_report(norm, batch, in_train, in_eval)
            layers.append(layer)
            if batch is not None and layer.own is not None and layer.own > limits(batch, thresholds)[0]:
                severity = "error" if layer.own > limits(batch, thresholds)[1] else "warning"
                parting.append((norm.path, layer.own, layer.passed_on or 0.0, severity))
    difference = _relative(
        [to_numpy(v) for run in trained for v in _leaves(run.output)],
        [to_numpy(v) for run in called for v in _leaves(run.output)],
    )
    training = [options.layer.name for options in seen.values() if options.training]
    findings += [_train_mode(name, runner) for name in training]
    if parting:
        path_, own, passed_on, severity = parting[0]
        evidence = (
            f"the first of {len(parting)} (of {len(layers)} layers) whose own normalization in training and in "
            f"evaluation differs, by {own:.2g} (rms); its output in the network differs by {passed_on:.2g}, that of "
            f"the network by {difference or 0:.2g}"
        )
        findings.append(
            finding(severity, "parting", path_, evidence, model=runner.kind, own=own, output_difference=difference)
        )
    findings += _composition(runner, batches[0], called[0], bool(training), thresholds)
    paths = [layer.path for layer in layers]
    unknown = not_checked(all_norms, {layer.path for layer in layers if layer.own is not None})
    return Report(layers, ranked(findings, paths), parting[0][0] if parting else None, difference, unknown)


def _as_list(batches: Any) -> list[Any]:
    """One batch is an array; several are a list, tuple or iterator of what `call` takes."""
    if hasattr(batches, "shape") or isinstance(batches, dict):
        return [batches]
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches: expected an array, or a list of batches, got {type(batches).__name__}")
    several: list[Any] = list(batches)
    if not several:
        raise ValueError("batches: expected at least one batch, got none; an iterator may have been used up")
    return several


def _batch(norm: Norm, slots: list[dict[str, Array]], seen: Seen, train_batch_size: int | None) -> Batch | None:
    """The moments of all batches as one; None for a layer in which nothing counted."""
    count = sum(s["count"] for s in slots)
    calls = sum(float(s["calls"].max()) for s in slots)
    if not np.max(count) > 0:
        return None
    mean = sum(s["count"] * s["mean"] for s in slots) / np.maximum(count, 1)
    var = sum(s["count"] * (s["var"] + (s["mean"] - mean) ** 2) for s in slots) / np.maximum(count, 1)
    values = float(np.max(count)) / calls
    # What a training statistic sees is what was given here, unless the caller or the layer says otherwise.
    examples = train_batch_size or seen.examples
    if seen.virtual_batch_size is not None:
        examples = min(examples, seen.virtual_batch_size)
    return Batch(
        # A channel in which nothing counted gives no reason to doubt what is remembered of it.
        mean=np.where(count > 0, mean, norm.mean),
        var=np.where(count > 0, var, norm.var),
        examples=seen.examples * len(slots),
        values=values * examples / seen.examples,
        not_finite=int(sum(s["not_finite"].sum() for s in slots)),
    )


def _layer_report(
    norm: Norm, batch: Batch | None, in_train: list[dict[str, Array]], in_eval: list[dict[str, Array]]
) -> LayerReport:
    numbers: dict[str, Any] = {}
    if batch is not None:
        drift = compare(norm, batch)
        squares = sum(float(s["square"].sum()) for s in in_train)
        apart = sum(distance(a, b) for a, b in zip(in_train, in_eval, strict=True))
        numbers = {
            "values": batch.values,
            "shift": drift.shift,
            "ratio": drift.ratio,
            "divergence": drift.divergence,
            "own": drift.total,
            "passed_on": math.sqrt(apart / squares) if squares > 0 else None,
        }
    return LayerReport(
        path=norm.path, mean=norm.mean, var=norm.var, seen=norm.seen, initial_weight=norm.initial_weight, **numbers
    )


def _train_mode(name: str, runner: Runner) -> Finding:
    evidence = "called with use_running_average=False where it was to evaluate"
    return finding("error", "train_mode", name, evidence, model=runner.kind)


def _composition(runner: Runner, batch: Any, whole: Pass, training: bool, t: Thresholds) -> list[Finding]:
    """Compares the evaluation of a batch with that of its first examples, each alone."""
    number = _examples(batch, whole.output)
    if number < 2:
        return []
    together, alone = [], []
    for i in range(min(_SINGLES, number)):
        one = jax.tree.map(lambda v, i=i: v[i : i + 1] if np.shape(v)[:1] == (number,) else v, batch)
        try:
            output = runner.evaluate(one)
        except ValueError as error:
            # Of a network in training mode that is expected: there is no variance of one value.
            if not training:
                raise
            evidence = f"a batch of {number} can be evaluated, an example alone cannot: {error}"
            return [finding("error", "depends_on_batch", "", evidence, model=runner.kind)]
        for many, single in zip(_leaves(whole.output), _leaves(output), strict=True):
            if np.shape(many)[:1] == (number,):
                together.append(to_numpy(many)[i : i + 1])
                alone.append(to_numpy(single))
    difference = _relative(together, alone)
    if difference is None or difference <= t.composition:
        return []
    evidence = f"outputs of examples alone and in a batch of {number} differ by {difference:.2g} (relative, rms)"
    return [finding("error", "depends_on_batch", "", evidence, model=runner.kind, difference=difference)]


def _examples(batch: Any, output: Any) -> int:
    """The size of the first axis that batch and output share, or else of the batch's: it may hold random keys, too."""
    given, returned = ([np.shape(v)[0] for v in jax.tree.leaves(tree) if np.ndim(v) > 0] for tree in (batch, output))
    shared = [size for size in given if size in returned]
    return next(iter(shared or given), 0)


def _leaves(output: Any) -> list[Any]:
    return [v for v in jax.tree.leaves(output) if hasattr(v, "dtype") and jax.numpy.issubdtype(v.dtype, np.floating)]


def _relative(expected: list[Array], actual: list[Array]) -> float | None:
    """Root mean square difference over the root mean square; None if there is nothing, or nothing but 0."""
    square = sum(float(np.sum(v**2)) for v in expected)
    apart = sum(float(np.sum((v - w) ** 2)) for v, w in zip(expected, actual, strict=True))
    return math.sqrt(apart / square) if square > 0 else None
