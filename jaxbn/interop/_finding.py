"""Finds the entries of a source that a leaf is made of, and makes the leaf of them."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxbn.interop._derived import Derived, find_derived
from jaxbn.interop._formats import COUNTER, KERAS, Layout, Shape, WeightFormat
from jaxbn.interop._layers import Layers
from jaxbn.interop._matching import Candidate, Plan
from jaxbn.interop._source import as_array, fits_jax, is_floating, read_counter


class Entries:
    """The entries of a source, and the weights that it has in parts."""

    def __init__(self, source: Mapping[str, Any], weight_format: WeightFormat) -> None:
        derived = {} if weight_format is KERAS else find_derived(source)
        self.values: Mapping[str, Any] = {**derived, **source}
        # For each name without one or two of its numbers, the names with * in their place.
        self.patterns: dict[str, set[str]] = defaultdict(set)
        for name in self.values:
            parts = name.split(weight_format.separator)
            numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
            for chosen in (*itertools.combinations(numbers, 1), *itertools.combinations(numbers, 2)):
                without = weight_format.separator.join(part for i, part in enumerate(parts) if i not in chosen)
                with_stars = ("*" if i in chosen else part for i, part in enumerate(parts))
                self.patterns[without].add(weight_format.separator.join(with_stars))

    def __contains__(self, name: str) -> bool:
        return bool(self.numbered(name)) if "*" in name else name in self.values

    def array(self, name: str) -> NDArray[Any]:
        value = self.values[name]
        return value.compute() if isinstance(value, Derived) else as_array(value)

    def parts(self, name: str) -> tuple[str, ...]:
        """The names in the source of an entry."""
        value = self.values[name]
        return value.names if isinstance(value, Derived) else (name,)

    def shape(self, name: str) -> Shape | None:
        """The shape of an entry, or None if it has none."""
        value = self.values[name]
        if not isinstance(value, Derived):
            return tuple(value.shape) if hasattr(value, "shape") else None
        try:
            return self.array(name).shape
        except (TypeError, ValueError):
            return None

    def numbered(self, pattern: str) -> dict[tuple[int, ...], str]:
        """The names that a pattern stands for, by their numbers."""
        search = re.compile(re.escape(pattern).replace(r"\*", r"(0|[1-9]\d*)"))
        matches = (search.fullmatch(name) for name in self.values)
        return {tuple(map(int, match.groups())): match[0] for match in matches if match}


class Found(NamedTuple):
    """The entries of a leaf: one, or one for each of its stacked layers.

    Attributes:
      plan: of the leaf.
      candidate: the name, with * for the numbers of stacked layers.
      names: those of the entries, in the order of the layers.
      layers, entries: of the target and of the source.
    """

    plan: Plan
    candidate: Candidate
    names: tuple[str, ...]
    layers: Layers
    entries: Entries

    @property
    def depth(self) -> int:
        """How many axes the stacked layers have."""
        return self.candidate.name.count("*")

    @property
    def leaf(self) -> Shape:
        """The shape that each entry fills."""
        shape: Shape = self.plan.leaf.shape[self.depth :]
        return shape

    def layout(self, name: str) -> Layout:
        by_name = self.layers.weight_format is KERAS and name.endswith("depthwise_kernel")
        layouts = self.layers.weight_format.layouts
        return layouts["depthwise"] if by_name else self.layers.layout(self.plan.path, self.depth)

    def fits(self) -> bool:
        try:
            return all(self.expected(name, self.entries.shape(name)) is None for name in self.names)
        except ValueError:
            return False

    def expected(self, name: str, shape: Shape | None) -> Shape | None:
        """The shape that an entry should have; None if it has it."""
        layout, leaf_name = self.layout(name), self.plan.path.rpartition("/")[2]
        expected = layout.shape(self.leaf)
        if self.candidate.third is not None:
            expected = (3 * expected[0], *expected[1:])
        elif shape is not None and layout.fits(shape, self.leaf):
            return None
        # One value has no axis in one library and one in the other; Keras' slopes have one for each axis of x.
        one = shape in ((), (1,)) or (leaf_name == "negative_slope" and set(shape or ()) == {1})
        return None if shape == expected or (one and self.leaf in ((), (1,)) and leaf_name != COUNTER) else expected

    def convert(self, cast: bool, cure: Callable[[Found, str, Shape], str]) -> jax.Array:
        """Returns the entries in the layout, shape and dtype of their leaf.

        Raises:
          ValueError, TypeError: they do not fit; `cure` says what to do about a shape.
        """
        arrays = [self._convert(name, self.entries.array(name), cast, cure) for name in self.names]
        return jnp.asarray(np.stack(arrays).reshape(self.plan.leaf.shape) if self.depth else arrays[0])

    def _convert(
        self, name: str, array: NDArray[Any], cast: bool, cure: Callable[[Found, str, Shape], str]
    ) -> NDArray[Any]:
        dtype = self.plan.leaf.dtype
        expected = self.expected(name, array.shape)
        if expected is not None:
            advice = cure(self, name, array.shape)
            raise ValueError(f"expected {name!r} with shape {expected}, got {array.shape}{advice}")
        if self.plan.path.rpartition("/")[2] == COUNTER:
            return np.asarray(read_counter(array), dtype)
        if array.dtype != dtype:
            floating = is_floating(array.dtype) and is_floating(dtype)
            if not floating or not cast:
                advice = "; pass cast=True to convert" if floating else ""
                raise ValueError(f"expected {name!r} of dtype {dtype}, got {array.dtype}{advice}")
        if not fits_jax(dtype):
            raise ValueError(f"expected a leaf of a dtype that JAX has, got {dtype}; enable x64")
        if self.candidate.third is not None:
            array = np.split(array, 3)[self.candidate.third]
        one = self.leaf in ((), (1,))
        loaded = array.reshape(self.leaf) if one else self.layout(name).load(array, self.leaf)
        # astype copies, so that changes of the source do not reach the leaf.
        return loaded.astype(dtype)


def find(plan: Plan, layers: Layers, entries: Entries) -> Found | None:
    """Returns the entries of a leaf, or None.

    Raises:
      ValueError: the stacked layers are not numbered as the leaf's axes are, or in more than one way.
    """
    found = [_found(plan, c, layers, entries) for c in plan.candidates if c.name in entries]
    if found:
        return next((f for f in found if f.fits()), found[0])
    numbered = []
    for candidate in _patterns(plan, entries):
        if set(entries.numbered(candidate.name)) == _numbers(plan, candidate):
            stacked = _found(plan, candidate, layers, entries)
            if _has_axes(stacked, stacked.names[0]) or stacked.fits():
                numbered.append(stacked)
    if len(numbered) > 1:
        names = ", ".join(repr(f.candidate.name) for f in numbered)
        raise ValueError(f"expected one way to number its stacked layers, got {names}; pass one of them in names")
    return numbered[0] if numbered else None


def _patterns(plan: Plan, entries: Entries) -> list[Candidate]:
    """The names that a leaf has if its layers are stacked."""
    with_stars = [(c, name) for c in plan.candidates for name in sorted(entries.patterns.get(c.name, ()))]
    return [c._replace(name=name) for c, name in with_stars if name.count("*") <= plan.leaf.ndim]


def _numbers(plan: Plan, candidate: Candidate) -> set[tuple[int, ...]]:
    return set(np.ndindex(*plan.leaf.shape[: candidate.name.count("*")]))


def _found(plan: Plan, candidate: Candidate, layers: Layers, entries: Entries) -> Found:
    if "*" not in candidate.name:
        return Found(plan, candidate, (candidate.name,), layers, entries)
    names, wanted = entries.numbered(candidate.name), _numbers(plan, candidate)
    depth = candidate.name.count("*")
    if depth > plan.leaf.ndim or set(names) != wanted:
        raise ValueError(
            f"expected {candidate.name!r} with a number from 0 for each entry along the first {depth} of the axes "
            f"{plan.leaf.shape}, got {len(names)} such names"
        )
    return Found(plan, candidate, tuple(names[index] for index in sorted(wanted)), layers, entries)


def _has_axes(found: Found, name: str) -> bool:
    """Whether an entry has as many axes as expected."""
    try:
        shape = found.entries.shape(name)
        return shape is not None and len(shape) == len(found.layout(name).shape(found.leaf))
    except ValueError:
        return False


def nearly(plan: Plan, layers: Layers, entries: Entries) -> str:
    """What a leaf without entries has instead: numbered names, but not one for each entry of its first axis."""
    for candidate in _patterns(plan, entries):
        names = entries.numbered(candidate.name)
        if candidate.name.count("*") == 1 and _has_axes(
            Found(plan, candidate, (), layers, entries), next(iter(names.values()))
        ):
            return (
                f"; as a stack of layers along its first axis it needs {candidate.name!r} with the numbers 0 to "
                f"{plan.leaf.shape[0] - 1}, got {', '.join(str(n) for (n,) in sorted(names))}"
            )
    return ""
