"""Judges norm layers by their running statistics, their parameters and the moments of batches.

All of it is float64 NumPy on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from jaxbn._messages import in_channels
from jaxbn._statistics.drift import Array, few_values, sampling_noise
from jaxbn.diagnose._cures import CURES, WORDS, enough_batches
from jaxbn.diagnose._evidence import Batch, Norm, Place
from jaxbn.diagnose._results import SEVERITIES, Finding, NotChecked
from jaxbn.diagnose._thresholds import Thresholds

# What the other kinds of findings may explain.
_DIFFERENCES = ("depends_on_batch", "drift", "parting")
_OF_BATCHES = ("drift", "parting", "few_values", "not_finite_input")
_OF_MODELS = ("train_mode", "depends_on_batch")


def finding(
    place: Place,
    severity: str,
    kind: str,
    evidence: str,
    *,
    channels: npt.NDArray[np.bool_] | None = None,
    advice_for: str = "",
    enough: str = "",
    **numbers: object,
) -> Finding:
    """Adds the channels to the evidence, and cause and cure in the words of the interface.

    The advice is that for `kind`, or else `advice_for`; `enough` is the result of `enough_batches`.
    """
    layer, interface = place
    if channels is not None:
        indices = np.flatnonzero(channels)
        evidence = f"{evidence} {in_channels(indices, channels.size)}"
        numbers = {"channels": indices.tolist()} | numbers
    cause, cure = CURES[advice_for or kind]
    words = WORDS[interface] | {"enough": enough}
    return Finding(severity, kind, layer, evidence, cause.format(**words), cure.format(**words), numbers)


def limits(batch: Batch, t: Thresholds) -> tuple[float, float]:
    """The differences beyond which there is a warning and an error; more for few examples, which differ by chance."""
    noise = t.noise * sampling_noise(batch.examples)
    return max(t.difference, noise), max(t.difference_error, 2 * noise)


def judge(norms: Sequence[Norm], t: Thresholds) -> list[Finding]:
    """The findings about each layer by itself."""
    all_untouched, all_zeroed = all(n.untouched for n in norms), all(n.zeroed for n in norms)
    found: list[Finding] = []
    for norm in norms:
        batch, broken = norm.batch, list(_broken(norm))
        fits = batch is not None and not broken and batch.drift.total <= limits(batch, t)[0]
        # Zeros among other layers, or on data that they fit, are those of a layer whose input is constant.
        zeroed = norm.zeroed and (all_zeroed if batch is None else not fits)
        if zeroed:
            found.append(finding(norm.place, "error", "zeroed", f"mean and variance exactly 0 {_since(norm)}"))
        found += [*broken, *_history(norm, all_untouched, not (fits or zeroed), t), *_learned(norm, t)]
        if batch is not None and (enough := batch.count >= t.few_values).any():
            mean, var = np.where(enough, batch.mean, norm.mean), np.where(enough, batch.var, norm.var)
            found += _channels(norm, "batch", mean, var, t)
        elif not zeroed:
            found += _channels(norm, "running", norm.mean, norm.var, t)
        if batch is not None and batch.values < t.few_values:
            evidence = few_values(batch.values)
            found.append(finding(norm.place, "warning", "few_values", evidence, values=batch.values))
        # NaN, infinity and statistics that were never updated differ for a reason that is a finding already.
        if batch is not None and not (broken or norm.untouched or zeroed):
            found += _drift(norm, batch, t)
    return found


def _broken(norm: Norm) -> Iterator[Finding]:
    for name, value in (("mean", norm.mean), ("var", norm.var), ("scale", norm.scale), ("bias", norm.bias)):
        if value is not None and not np.isfinite(value).all():
            bad = ~np.isfinite(value)
            yield finding(norm.place, "error", "not_finite", f"{name} is NaN or infinite", channels=bad, array=name)
    if norm.batch is not None and norm.batch.not_finite:
        evidence = f"{norm.batch.not_finite} values of its input are NaN or infinite"
        yield finding(norm.place, "error", "not_finite_input", evidence, values=norm.batch.not_finite)
    if (bad := norm.var < 0).any():
        evidence = f"running variance down to {norm.var[bad].min():.2g}"
        yield finding(norm.place, "error", "negative_variance", evidence, channels=bad)


def _history(norm: Norm, all_untouched: bool, averaged: bool, t: Thresholds) -> Iterator[Finding]:
    """Judges what entered the statistics; after recalibration they are not `averaged` with a decay."""
    weight, decay, seen = norm.initial_weight, norm.decay, norm.seen
    if norm.untouched:
        advice_for = "untouched" if seen == 0 or all_untouched else "untouched_alone"
        evidence = f"mean exactly 0 and variance exactly 1 {_since(norm)}"
        yield finding(norm.place, "note" if seen == 0 else "error", "untouched", evidence, advice_for=advice_for)
    elif averaged and decay is not None and seen and weight is not None and weight > t.initial_weight:
        yield finding(
            norm.place,
            "error" if weight > t.initial_weight_error else "warning",
            "initial_weight",
            f"{seen} batches with decay {decay:g} leave {weight:.2g} of the initial mean 0 and variance 1",
            enough=enough_batches(norm.interface, decay, seen, t.initial_weight, t.short_memory),
            seen=seen,
            initial_weight=weight,
        )
    if decay is not None and not norm.cumulative and decay < t.short_memory:
        batches = (1 + decay) / (1 - decay)
        evidence = f"decay {decay:g}: the statistics are an average over about {batches:.2g} batches"
        yield finding(norm.place, "warning", "short_memory", evidence, decay=decay)
    apart = norm.disagreement
    if apart is not None and not apart <= t.replicas:
        severity = "error" if apart > t.replicas_error else "warning"
        evidence = f"replicas differ by up to {apart:.2g} standard deviations"
        yield finding(norm.place, severity, "replicas", evidence, disagreement=apart)


def _since(norm: Norm) -> str:
    return "in all channels" if norm.seen is None else f"in all channels after {norm.seen} batches"


def _learned(norm: Norm, t: Thresholds) -> Iterator[Finding]:
    if norm.scale is not None and norm.scale.size and not norm.scale.any():
        # The last scale of a residual branch is often initialized to 0, and should not stay 0.
        severity = "note" if norm.untouched else "warning"
        yield finding(norm.place, severity, "zero_scale", "scale is 0 in all channels")
    if norm.bias is not None:
        unit = 1.0 if norm.scale is None else max(float(np.median(np.abs(norm.scale))), 1.0)
        size = np.abs(norm.bias)
        if (bad := size > t.huge_bias * unit).any():
            evidence = f"|bias| up to {size.max():.3g}, with scales around {unit:.2g}"
            yield finding(norm.place, "warning", "huge_bias", evidence, channels=bad)


def _channels(norm: Norm, whose: str, mean: Array, var: Array, t: Thresholds) -> Iterator[Finding]:
    """Judges variances: a channel is dead, nearly constant, small, or sound. `whose`: "batch" or "running"."""
    dead = (var >= 0) & (var <= t.dead * norm.eps)
    constant = ~dead & (var >= 0) & np.isfinite(mean) & (var < (t.constant * mean) ** 2)
    small = ~dead & ~constant & (var >= 0) & (var < norm.eps)
    if dead.any():
        severity = "error" if dead.all() else "warning"
        advice_for = "dead_or_zeroed" if norm.zeroed and whose == "running" else "dead_channels"
        evidence = f"{whose} variance up to {var[dead].max():.2g}"
        yield finding(norm.place, severity, "dead_channels", evidence, channels=dead, advice_for=advice_for)
    if constant.any():
        ratio = np.sqrt(var[constant]) / np.abs(mean[constant])
        evidence = f"{whose} standard deviation down to {ratio.min():.2g} of the mean"
        yield finding(norm.place, "warning", "near_constant", evidence, channels=constant)
    if small.any():
        severity = "warning" if small.sum() >= t.eps_share * var.size else "note"
        evidence = f"{whose} variance down to {var[small].min():.2g}, below eps = {norm.eps:g}"
        yield finding(norm.place, severity, "eps_dominates", evidence, channels=small)


def _drift(norm: Norm, batch: Batch, t: Thresholds) -> Iterator[Finding]:
    drift, (warning, error) = batch.drift, limits(batch, t)
    if drift.total > warning:
        worst = np.argsort(-drift.difference, kind="stable")[:3].tolist()
        yield finding(
            norm.place,
            "error" if drift.total > error else "warning",
            "drift",
            f"one input normalized in training and in evaluation differs by {drift.total:.2g} (rms); mean shifted by "
            f"{drift.shift.max():.2g} running std at most, {np.median(drift.shift):.2g} in the median; variance ratio "
            f"{drift.ratio.min():.2g} to {drift.ratio.max():.2g}; worst channels {worst}",
            difference=drift.total,
            threshold=warning,
            worst_channels=worst,
        )


def parting(norms: Sequence[Norm], output_difference: float | None, t: Thresholds) -> Finding | None:
    """Names the first of the layers that differ by themselves in training and in evaluation."""
    batches = [(norm, norm.batch) for norm in norms if norm.batch is not None]
    differing = [(norm, batch) for norm, batch in batches if batch.drift.total > limits(batch, t)[0]]
    if not differing:
        return None
    norm, batch = differing[0]
    own = batch.drift.total
    evidence = (
        f"layers that normalize differently in training and in evaluation: {len(differing)} of {len(norms)}; this is "
        f"the first, by {own:.2g} (rms); its output in the network differs by {batch.passed_on or 0:.2g}, that of the "
        f"network by {output_difference or 0:.2g}"
    )
    severity = "error" if own > limits(batch, t)[1] else "warning"
    return finding(norm.place, severity, "parting", evidence, own=own, output_difference=output_difference)


def ranked(findings: Sequence[Finding], norms: Sequence[Norm]) -> list[Finding]:
    """Sorts by severity, then causes before differences, which follow from them, then in the order of layers."""
    paths = ["", *[norm.path for norm in norms]]
    order = dict(zip(paths, range(len(paths)), strict=True))
    return sorted(
        findings, key=lambda f: (SEVERITIES.index(f.severity), f.kind in _DIFFERENCES, order.get(f.layer, len(order)))
    )


def not_checked(norms: Sequence[Norm], *, alone: bool) -> list[NotChecked]:
    """The checks that were not made; `alone`: statistics without a model. No findings does not mean no faults."""
    found: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for norm in norms:
        no_decay = norm.decay is None and not norm.cumulative
        # Statistics that were never updated are a finding already; an average over all batches has no initial weight.
        no_weight = norm.initial_weight is None and not norm.untouched and not norm.cumulative
        options = ("decay" if no_decay else "", "steps" if norm.seen is None else "")
        for missing, kinds, needs in (
            (no_weight, ("initial_weight",), " and ".join(filter(None, options))),
            (no_decay, ("short_memory",), "decay"),
            (alone and norm.scale is None, ("zero_scale",), "the scale of the layer in the same tree, if it has one"),
            (alone and norm.bias is None, ("huge_bias",), "the bias of the layer in the same tree, if it has one"),
            (alone and norm.disagreement is None, ("replicas",), "the statistics of all devices, and replica_axis"),
            (alone, _OF_BATCHES + _OF_MODELS, "the model and batches, in diagnose_linen or diagnose_nnx"),
            (
                not alone and norm.batch is None,
                _OF_BATCHES,
                "batches with values that reach the layer and are not masked",
            ),
        ):
            if missing:
                found.setdefault((kinds, needs), []).append(norm.path)
    return [NotChecked(kinds, tuple(paths), needs) for (kinds, needs), paths in found.items()]
