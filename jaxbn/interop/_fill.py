"""Fills a target from a source: either all leaves get their arrays, or nothing is loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn.interop import _advice
from jaxbn.interop._finding import Entries, find, nearly
from jaxbn.interop._formats import COUNTER, WeightFormat
from jaxbn.interop._layers import make_layers
from jaxbn.interop._matching import Names, counter_of, duplicates, make_plans, raise_all
from jaxbn.interop._source import read_counter
from jaxbn.interop._targets import open_target


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to each leaf of the target and each name of the source. `print` shows it.

    Attributes:
      used: for each leaf that was filled, its name in the source, with * for the numbers of stacked layers and
        without the endings of a weight in parts. As `names` of `to_torch` it gives the names that were loaded.
      missing: for each leaf that the source does not have, the name that was looked for. The leaf keeps its
        value, except that `num_batches_tracked` becomes 0; see `batch_norm_from_torch`.
      kept: leaves that keep their value because `names` gives None for them.
      left_over: names of the source that belong to no leaf, or to one in `kept`.
      counters: `num_batches_tracked`, by its name in the source, of norms that have no place for it: all of
        Flax's, and jaxbn's unless `momentum=None`. Pass it to `to_torch` to write them back.

    Example:
      >>> from jaxbn.interop import LoadReport
      >>> print(LoadReport({"fc/kernel": "fc.weight"}, {}, (), ("old.bias",), {}))
      1 used, 0 missing, 0 kept, 1 left over, 0 counters without a place
      left over: old.bias
    """

    used: Mapping[str, str]
    missing: Mapping[str, str]
    kept: tuple[str, ...]
    left_over: tuple[str, ...]
    counters: Mapping[str, int]

    def __str__(self) -> str:
        lines = [
            f"{len(self.used)} used, {len(self.missing)} missing, {len(self.kept)} kept, "
            f"{len(self.left_over)} left over, {len(self.counters)} counters without a place"
        ]
        lines += [f"missing: {name} for {path}" for path, name in self.missing.items()]
        lines += [f"kept: {path}" for path in self.kept]
        return "\n".join(lines + [f"left over: {name}" for name in self.left_over])


def fill(
    function: str,
    weight_format: WeightFormat,
    source: Mapping[str, Any],
    target: Any,
    names: Names | None,
    kinds: Mapping[str, str] | None,
    strict: bool,
    cast: bool,
    rngs: Any,
) -> tuple[Any, LoadReport]:
    """Implements `load_torch` and `load_keras`."""
    opened = open_target(target, rngs)
    layers, entries = make_layers(opened, kinds, weight_format), Entries(source, weight_format)
    plans, plan_errors = make_plans(layers, names)
    errors = [*opened.errors, *plan_errors]
    values = dict(opened.leaves)
    used: dict[str, str] = {}
    missing: dict[str, str] = {}
    not_found, kept, near = [], [], ""
    leaves = defaultdict(list)
    passed_over: set[str] = set()
    for plan in plans:
        try:
            found = find(plan, layers, entries)
            if plan.keep:
                kept.append(plan.path)
                passed_over.update(part for name in (found.names if found else ()) for part in entries.parts(name))
            elif found is not None:
                used[plan.path] = found.candidate.name
                for name in found.names:
                    leaves[found.candidate._replace(name=name)].append(plan.path)
                values[plan.path] = found.convert(cast, functools.partial(_advice.cure, names))
            else:
                missing[plan.path] = plan.candidates[0].name
                if plan.path.rpartition("/")[2] == COUNTER:
                    values[plan.path] = jnp.zeros(plan.leaf.shape, plan.leaf.dtype)
                else:
                    wanted = " or ".join(repr(candidate.name) for candidate in plan.candidates)
                    advice = nearly(plan, layers, entries)
                    near = near or advice
                    not_found.append(f"{plan.path}: expected {wanted} in the source, got no such name{advice}")
        except (TypeError, ValueError) as error:
            errors.append(f"{plan.path}: {error}")
    errors += duplicates(leaves)
    taken = {part for candidate in leaves for part in entries.parts(candidate.name)}
    counters, left_over, counter_errors = _unused(source, taken)
    errors += counter_errors
    if missing and not leaves:
        errors.append(_advice.no_match(layers, [*missing.values()], source, entries, names, near))
    elif strict:
        expected = {*passed_over, *map(counter_of, passed_over)}
        not_expected = [name for name in left_over if name not in expected]
        errors += _advice.missing(not_found)
        in_use = {*taken, *counters, *passed_over}
        errors += _advice.left_over(not_expected, in_use, source, weight_format)
    elif not leaves:
        errors.append("names: expected some leaf of the target to be found in the source, got none")
    for path in (*kept, *(() if strict or not leaves else missing)):
        if isinstance(values[path], jax.ShapeDtypeStruct):
            errors.append(
                f"{path}: expected an array, since it stays as it is, got only shape and dtype; "
                "pass a target with values"
            )
    raise_all(function, "loaded", errors)
    return opened.fill(list(values.values())), LoadReport(used, missing, tuple(kept), tuple(left_over), counters)


def _unused(source: Mapping[str, Any], taken: set[str]) -> tuple[dict[str, int], list[str], list[str]]:
    """Of the names that no leaf has: the counters of norms whose mean is loaded, all others, and the errors."""
    counters, left_over, errors = {}, [], []
    expected = {counter_of(name) for name in taken}
    for name in source:
        if name in taken:
            continue
        if name not in expected:
            left_over.append(name)
            continue
        try:
            counters[name] = read_counter(source[name])
        except (TypeError, ValueError) as error:
            errors.append(f"{name}: {error}")
    return counters, left_over, errors
