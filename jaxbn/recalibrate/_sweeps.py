"""Running statistics from data: passes over the batches, one or as many as it takes until nothing changes."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._arrays import to_float64
from jaxbn._kernel.moments import Moments
from jaxbn._messages import few
from jaxbn._norms.state import BatchNormState
from jaxbn._paths import numbered
from jaxbn._statistics.batch_stream import MomentsAccumulator, as_arrays, check_batches, taken_apart, with_progress
from jaxbn._statistics.drift import FEW_VALUES, NOISE, Array, are_initial, compare, few_values, sampling_noise

# The statistics of a layer that normalizes its own output only converge; this is the largest change that is accepted.
_CONVERGED = 1e-4


class Measured(NamedTuple):
    """What one batch brings for one layer. `calls` and `correction` have the shape of the moments, or are scalars."""

    moments: Moments
    calls: ArrayLike
    correction: ArrayLike


States = dict[str, BatchNormState]
Step = Callable[[States, object], dict[str, Measured]]


class _Layer:
    """What one sweep brings for one layer with the statistics `old`."""

    def __init__(self, old: BatchNormState) -> None:
        self.old = old
        self.pool = MomentsAccumulator()
        self.calls = 0
        self._seen = np.zeros((), np.int64)
        self._correction = np.zeros(())

    def add(self, measured: Measured) -> None:
        some, tracked = np.asarray(measured.moments.count) > 0, jnp.shape(self.old.num_batches_tracked)
        # A layer with a counter for each domain, or one stacked by a scan, counts for each.
        leading = some.shape[: len(tracked)] == tracked
        self._seen = self._seen + np.any(some, tuple(range(len(tracked), some.ndim)) if leading else None)
        self.calls = max(self.calls, int(np.max(measured.calls)))
        self._correction = np.maximum(self._correction, np.asarray(measured.correction, np.float64))
        self.pool.add(measured.moments)

    def state(self) -> BatchNormState:
        """The moments as running statistics; those for which there are too few values stay what they were."""
        m, old = self.pool.moments, self.old
        count = np.asarray(m.count)
        enough = count > np.maximum(self._correction, 1)
        with np.errstate(all="ignore"):
            unbiased = m.var * (count / np.where(enough, count - self._correction, 1))
        return BatchNormState(
            _like(old.mean, np.where(count > 0, m.mean, np.asarray(old.mean))),
            _like(old.var, np.where(enough, unbiased, np.asarray(old.var))),
            _like(old.num_batches_tracked, np.broadcast_to(self._seen, np.shape(old.num_batches_tracked))),
        )


def sweep_until_done(step: Step, states: States, batches: Iterable[object], *, method: str, progress: bool) -> States:
    """Returns new states of the layers that were called.

    In layerwise mode every sweep measures all layers under the statistics of the sweep before. The first sweep is right
    for the layers that depend on no other, the second for those that depend on these alone, and so on, whatever the
    order of the calls. So there are at most as many sweeps as layers, and fewer if nothing changes before.
    """
    if method not in ("layerwise", "batchwise"):
        raise ValueError(f"method: expected 'layerwise' or 'batchwise', got {method!r}")
    check_batches(batches)
    once = method == "batchwise"
    if not once and isinstance(batches, Iterator):
        raise TypeError(
            f"batches: expected an iterable that can be iterated several times, got {type(batches).__name__}, an "
            "iterator; pass a list or a data loader, or method='batchwise', which takes one pass"
        )
    enough = sum(max(math.prod(jnp.shape(s.mean)[:-1]), 1) for s in states.values())
    first, old = 0, states
    for sweep in itertools.count(1):
        layers = {name: _Layer(state) for name, state in old.items()}
        description = "measuring" if once else f"sweep {sweep} of at most {enough}"
        with taken_apart(batches):
            count = _measure_all(step, layers, with_progress(batches, progress, description))
        first = first or count
        if count == 0 or count != first:
            raise ValueError(
                "batches: expected at least 1 batch, got none; an iterator can be iterated only once"
                if first == 0
                else f"batches: expected {first} batches in each sweep, got {count} in sweep {sweep}; pass an "
                "iterable that gives all of them each time, or method='batchwise', which takes one pass"
            )
        new = {name: layer.state() for name, layer in layers.items()}
        change = max(map(_change, old.values(), new.values()), default=0.0)
        repeated = [name for name, layer in layers.items() if layer.calls > 1]
        if once or change == 0 or (sweep >= enough and (not repeated or change <= _CONVERGED)):
            break
        if sweep >= 2 * enough + 10:
            raise ValueError(
                f"{', '.join(repeated)}: expected statistics that converge, got a change by {change:.1e} in sweep "
                f"{sweep}; a layer that is called more than once depends on its own statistics: use method='batchwise'"
            )
        old = new
    finite = {name: np.isfinite(to_float64(s.mean)) & np.isfinite(to_float64(s.var)) for name, s in new.items()}
    broken = [layer for name, s in new.items() for layer, index in _stacked(name, s) if not finite[name][index].all()]
    if broken:
        raise ValueError(
            f"{few(broken)}: expected finite statistics, got NaN or infinity; the batches or the weights have "
            "such values, or values so large that they overflow: mask or correct them. Nothing was changed"
        )
    _warn_of_few_values(states, {name: layer.pool.moments for name, layer in layers.items()})
    called = {name: new[name] for name, layer in layers.items() if layer.calls}
    if not called:
        raise ValueError(
            f"call: expected a call of one of the layers {', '.join(layers)}, got none; run the model on the batch"
        )
    return called


def _measure_all(step: Step, layers: dict[str, _Layer], batches: Iterable[object]) -> int:
    """Adds what all batches bring to the layers, and returns the number of batches."""
    states = {name: layer.old for name, layer in layers.items()}
    cure = "leave out of the batches what the model does not take"
    results = (step(states, as_arrays(batch, cure)) for batch in batches)
    count, measured = 0, next(results, None)
    while measured is not None:
        # The device works on the next batch while the host adds what this one brought.
        following = next(results, None)
        for name, layer in layers.items():
            layer.add(measured[name])
        count, measured = count + 1, following
    return count


def _warn_of_few_values(old: States, measured: dict[str, Moments]) -> None:
    """Warns of statistics that differ from the old ones by no more than chance explains, as `jaxbn.diagnose` judges."""
    least: dict[str, float] = {}
    for name, m in measured.items():
        for layer, index in _stacked(name, old[name]):
            mean, var, new_mean, new_var, count = (
                to_float64(v)[index] for v in (old[name].mean, old[name].var, m.mean, m.var, m.count)
            )
            is_few = (count > 0) & (count < FEW_VALUES)
            if is_few.any() and not are_initial(mean, var):
                n = float(count[is_few].min())
                drift = compare((mean[is_few], var[is_few]), (new_mean[is_few], new_var[is_few]), eps=1e-5)
                if drift.total <= NOISE * sampling_noise(n):
                    least[layer] = n
    if least:
        warnings.warn(
            f"{few(least)}: {few_values(min(least.values()))}; the statistics that they replace fit these values, and "
            "may be better: pass more data",
            stacklevel=4,
        )


def _stacked(name: str, state: BatchNormState) -> list[tuple[str, tuple[int, ...]]]:
    """The layers that a state holds, each with its place along the axes of the counter."""
    stack = jnp.shape(state.num_batches_tracked)
    leading = jnp.shape(state.mean)[: len(stack)] == stack
    return [(numbered(name, index), index) for index in np.ndindex(stack if leading else ())]


def _like(old: ArrayLike, value: Array) -> jax.Array:
    new = jnp.asarray(value.astype(jnp.asarray(old).dtype))
    # An array that was committed to devices stays on them.
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) and old.committed else new


def _change(old: BatchNormState, new: BatchNormState) -> float:
    """The largest change: of means in standard deviations, of variances relative to the new ones; 0 if none."""
    mean, var, new_mean, new_var = map(to_float64, (old.mean, old.var, new.mean, new.var))
    if np.array_equal(mean, new_mean, equal_nan=True) and np.array_equal(var, new_var, equal_nan=True):
        return 0.0
    with np.errstate(all="ignore"):
        scale = new_var + 1e-12 * new_mean**2 + np.finfo(np.float64).tiny
        changes = np.maximum(np.abs(new_mean - mean) / np.sqrt(scale), np.abs(new_var - var) / scale)
    return float(np.max(np.where(np.isnan(changes), np.inf, changes), initial=0))
