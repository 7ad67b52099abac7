"""Judges one norm layer by its running statistics, its parameters and the moments of batches.

All of it is float64 NumPy on the host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxbn._messages import in_channels
from jaxbn._statistics.drift import FEW_VALUES, NOISE, few_values, sampling_noise
from jaxbn.diagnose._cures import advice, enough_batches
from jaxbn.diagnose._evidence import Batch, Norm, drift_of

SEVERITIES = ("error", "warning", "note")
# What the other kinds of findings may explain.
DIFFERENCES = ("depends_on_batch", "drift", "parting")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thresholds:
    """The limits beyond which something is a finding; for the argument `thresholds` of `jaxbn.diagnose`'s functions.

    Attributes:
      initial_weight: a larger weight of the initial mean 0 and variance 1 in the running statistics is a
        warning. A hundredth of a variance of 1 is negligible where variances are around 1.
      initial_weight_error: the same for an error: less than half of the statistics comes from data.
      short_memory: a smaller decay is a warning. 0.5 averages over three batches, which is rarely intended.
        0.1 in a layer that takes the decay is usually PyTorch's 0.1, which means a decay of 0.9.
      difference: a larger root mean square difference between the layer's outputs for the same input in
        training and in evaluation, in units of its normalized output, is a warning. A quarter of a standard
        deviation is more than the sampling noise of 24 independent examples; see `noise`.
      difference_error: the same for an error: as large as the output itself.
      noise: a difference is a finding only if it exceeds the one expected from sampling alone so many times.
        The mean of n values is off by `1 / sqrt(n)` standard deviations, and the standard deviation by
        `1 / sqrt(2 n)` of itself; together `sqrt(1.5 / n)`. n counts examples and not their positions,
        which are correlated.
      few_values: fewer values per statistic are a warning: with 16 the variance is off by a third
        (`sqrt(2 / n)`). Channels of which all batches together have fewer are judged by their running variance.
      dead: a channel with a variance below this fraction of eps is constant.
      constant: a standard deviation below this fraction of the mean is a warning: half precision, with 11
        bits, cannot tell such values apart.
      eps_share: variances below eps are a note, or a warning if this share of the channels has them.
      replicas: replicas that differ by more standard deviations are a warning. Rounding explains 1e-6.
      replicas_error: the same for an error.
      huge_bias: a larger |bias|, in units of the median |scale| (1 if that is less), is a warning. Normalized
        values beyond 50 standard deviations do not occur, so what follows sees a constant.
      composition: a larger difference between the outputs of the same examples beside others and beside copies of the
        first, in batches of the same size, relative to the root mean square output, is an error. There is none if the
        examples do not depend on each other, in whatever precision the network computes.

    Example:
      >>> from jaxbn.diagnose import Thresholds
      >>> Thresholds(difference=0.5).few_values
      16
    """

    initial_weight: float = 0.01
    initial_weight_error: float = 0.5
    short_memory: float = 0.5
    difference: float = 0.25
    difference_error: float = 1.0
    noise: float = NOISE
    few_values: int = FEW_VALUES
    dead: float = 1e-6
    constant: float = 5e-4
    eps_share: float = 0.5
    replicas: float = 1e-3
    replicas_error: float = 0.5
    huge_bias: float = 50.0
    composition: float = 1e-3


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


def finding(
    severity: str,
    kind: str,
    layer: str,
    evidence: str,
    *,
    model: str | None,
    enough: str = "",
    advice_for: str = "",
    **numbers: Any,
) -> Finding:
    return Finding(severity, kind, layer, evidence, *advice(advice_for or kind, model, enough), numbers)


def judge(examined: Sequence[tuple[Norm, Batch | None]], t: Thresholds) -> list[Finding]:
    """All findings about the layers of a network."""
    norms = [norm for norm, _ in examined]
    all_untouched, all_zeroed = all(n.untouched for n in norms), all(n.zeroed for n in norms)
    found = []
    for norm, batch in examined:
        broken = _broken(norm, batch)
        fits = batch is not None and not broken and drift_of(norm, batch).total <= limits(batch, t)[0]
        # Zeros among other layers, or on data that they fit, are those of a layer whose input is constant.
        zeroed = norm.zeroed and (all_zeroed if batch is None else not fits)
        if zeroed:
            evidence = f"mean and variance exactly 0 in all channels{_after(norm)}"
            found.append(finding("error", "zeroed", norm.path, evidence, model=norm.model))
        found += broken + _remembered(norm, fits or zeroed, all_untouched, t) + _learned(norm, t)
        found += _channels(norm, batch, zeroed, t)
        if batch is not None:
            if batch.values < t.few_values:
                evidence = few_values(batch.values)
                found.append(
                    finding("warning", "few_values", norm.path, evidence, model=norm.model, values=batch.values)
                )
            # NaN, infinity and statistics that were never updated differ for a reason that is a finding already.
            if not (broken or norm.untouched or zeroed):
                found += _drifted(norm, batch, t)
    return found


def limits(batch: Batch, t: Thresholds) -> tuple[float, float]:
    """The differences beyond which there is a warning and an error; more for few examples, which differ by chance."""
    noise = t.noise * sampling_noise(batch.examples)
    return max(t.difference, noise), max(t.difference_error, 2 * noise)


def _drifted(norm: Norm, batch: Batch, t: Thresholds) -> list[Finding]:
    drift = drift_of(norm, batch)
    warning, error = limits(batch, t)
    if drift.total <= warning:
        return []
    worst = np.argsort(-drift.difference, kind="stable")[:3].tolist()
    return [
        finding(
            "error" if drift.total > error else "warning",
            "drift",
            norm.path,
            f"one input normalized in training and in evaluation differs by {drift.total:.2g} (rms); mean shifted by "
            f"{drift.shift.max():.2g} running std at most, {np.median(drift.shift):.2g} in the median; variance ratio "
            f"{drift.ratio.min():.2g} to {drift.ratio.max():.2g}; worst channels {worst}",
            model=norm.model,
            difference=drift.total,
            threshold=warning,
            worst_channels=worst,
        )
    ]


def _broken(norm: Norm, batch: Batch | None) -> list[Finding]:
    found = []
    for name in ("mean", "var", "scale", "bias"):
        value = getattr(norm, name)
        if value is not None and (bad := np.flatnonzero(~np.isfinite(value))).size:
            found.append(_of_channels("error", "not_finite", norm, bad, f"{name} is NaN or infinite", array=name))
    if batch is not None and batch.not_finite:
        evidence = f"{batch.not_finite} values of its input are NaN or infinite"
        found.append(
            finding("error", "not_finite_input", norm.path, evidence, model=norm.model, values=batch.not_finite)
        )
    if (bad := np.flatnonzero(norm.var < 0)).size:
        evidence = f"running variance down to {norm.var[bad].min():.2g}"
        found.append(_of_channels("error", "negative_variance", norm, bad, evidence))
    return found


def _after(norm: Norm) -> str:
    return "" if norm.seen is None else f" after {norm.seen} batches"


def _remembered(norm: Norm, no_average: bool, all_untouched: bool, t: Thresholds) -> list[Finding]:
    """What the statistics are made of; `no_average`: of no average with a decay, as after recalibration."""
    found = []
    left = norm.initial_weight
    if norm.untouched:
        fresh = norm.seen == 0
        evidence = f"mean exactly 0 and variance exactly 1 in all channels{_after(norm)}"
        advice_for = "untouched" if fresh or all_untouched else "untouched_alone"
        severity = "note" if fresh else "error"
        found.append(finding(severity, "untouched", norm.path, evidence, model=norm.model, advice_for=advice_for))
    elif not no_average and norm.decay is not None and norm.seen and left is not None and left > t.initial_weight:
        found.append(
            finding(
                "error" if left > t.initial_weight_error else "warning",
                "initial_weight",
                norm.path,
                f"{norm.seen} batches with decay {norm.decay:g} leave {left:.2g} of the initial mean 0 and variance 1",
                model=norm.model,
                enough=enough_batches(norm.model, norm.decay, norm.seen, t.initial_weight, t.short_memory),
                seen=norm.seen,
                initial_weight=left,
            )
        )
    if norm.decay is not None and not norm.cumulative and norm.decay < t.short_memory:
        batches = (1 + norm.decay) / (1 - norm.decay)
        evidence = f"decay {norm.decay:g}: the statistics are an average over about {batches:.2g} batches"
        found.append(finding("warning", "short_memory", norm.path, evidence, model=norm.model, decay=norm.decay))
    if norm.disagreement is not None and not norm.disagreement <= t.replicas:
        severity = "error" if norm.disagreement > t.replicas_error else "warning"
        evidence = f"replicas differ by up to {norm.disagreement:.2g} standard deviations"
        found.append(
            finding(severity, "replicas", norm.path, evidence, model=norm.model, disagreement=norm.disagreement)
        )
    return found


def _learned(norm: Norm, t: Thresholds) -> list[Finding]:
    found = []
    if norm.scale is not None and norm.scale.size and not norm.scale.any():
        # The last scale of a residual branch is often initialized to 0, and should not stay 0.
        trained = not norm.untouched
        found.append(
            finding(
                "warning" if trained else "note",
                "zero_scale",
                norm.path,
                "scale is 0 in all channels",
                model=norm.model,
            )
        )
    if norm.bias is not None:
        unit = 1.0 if norm.scale is None else max(float(np.median(np.abs(norm.scale))), 1.0)
        if (bad := np.flatnonzero(np.abs(norm.bias) > t.huge_bias * unit)).size:
            evidence = f"|bias| up to {np.abs(norm.bias).max():.3g}, with scales around {unit:.2g}"
            found.append(_of_channels("warning", "huge_bias", norm, bad, evidence))
    return found


def _channels(norm: Norm, batch: Batch | None, zeroed: bool, t: Thresholds) -> list[Finding]:
    """Judges the variances: those of the batch, or the running ones if too few values are known for that."""
    whose, mean, var = "running", norm.mean, norm.var
    if batch is not None and (enough := batch.count >= t.few_values).any():
        whose, mean, var = "batch", np.where(enough, batch.mean, mean), np.where(enough, batch.var, var)
    elif zeroed:
        return []
    found = []
    is_dead = (var >= 0) & (var <= t.dead * norm.eps)
    if (bad := np.flatnonzero(is_dead)).size:
        severity = "error" if bad.size == var.size else "warning"
        evidence = f"{whose} variance up to {var[bad].max():.2g}"
        advice_for = "dead_or_zeroed" if norm.zeroed and whose == "running" else "dead_channels"
        found.append(_of_channels(severity, "dead_channels", norm, bad, evidence, advice_for=advice_for))
    is_constant = ~is_dead & (var >= 0) & np.isfinite(mean) & (var < (t.constant * mean) ** 2)
    if (bad := np.flatnonzero(is_constant)).size:
        ratio = np.sqrt(var[bad]) / np.abs(mean[bad])
        evidence = f"{whose} standard deviation down to {ratio.min():.2g} of the mean"
        found.append(_of_channels("warning", "near_constant", norm, bad, evidence))
    if (bad := np.flatnonzero(~is_dead & ~is_constant & (var >= 0) & (var < norm.eps))).size:
        severity = "warning" if bad.size >= t.eps_share * var.size else "note"
        evidence = f"{whose} variance down to {var[bad].min():.2g}, below eps = {norm.eps:g}"
        found.append(_of_channels(severity, "eps_dominates", norm, bad, evidence))
    return found


def _of_channels(severity: str, kind: str, norm: Norm, bad: npt.NDArray[np.intp], what: str, **numbers: Any) -> Finding:
    evidence = f"{what} {in_channels(bad, norm.mean.size)}"
    return finding(severity, kind, norm.path, evidence, model=norm.model, channels=bad.tolist(), **numbers)
