"""The entries of a source by their names: whole, numbered, or weights that PyTorch stores in parts."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxbn.interop._formats import TORCH, Shape, WeightFormat
from jaxbn.interop._source import as_array

# Two unit vectors of which one is the other after a few steps of training; random ones are nearly orthogonal.
_ALIKE = 0.9


class Entries:
    """The entries of a source, and the weights that it has in parts."""

    def __init__(self, source: Mapping[str, object], weight_format: WeightFormat) -> None:
        parts = dict(_weights_in_parts(source)) if weight_format is TORCH else {}
        self.values: Mapping[str, object] = {**parts, **source}
        # For each name without one or two of its numbers, the names with * in their place.
        self.patterns: dict[str, set[str]] = defaultdict(set)
        for name in self.values:
            words = name.split(weight_format.separator)
            numbers = [i for i, word in enumerate(words) if word.isdecimal()]
            for chosen in (*itertools.combinations(numbers, 1), *itertools.combinations(numbers, 2)):
                without = weight_format.separator.join(word for i, word in enumerate(words) if i not in chosen)
                with_stars = ("*" if i in chosen else word for i, word in enumerate(words))
                self.patterns[without].add(weight_format.separator.join(with_stars))

    def array(self, name: str) -> np.ndarray:
        value = self.values[name]
        return value.array if isinstance(value, _WeightInParts) else as_array(value)

    def parts(self, name: str) -> Sequence[str]:
        """The names in the source of an entry."""
        value = self.values[name]
        return [*value.parts] if isinstance(value, _WeightInParts) else [name]

    def shape(self, name: str) -> Shape | None:
        """The shape of an entry, or None if it has none."""
        value = self.values[name]
        try:
            shaped = value.array if isinstance(value, _WeightInParts) else value
        except (TypeError, ValueError):
            return None
        return tuple(shaped.shape) if hasattr(shaped, "shape") else None

    def numbered(self, pattern: str) -> dict[Shape, str]:
        """The names that a pattern stands for, by their numbers; one without numbers for a name without *."""
        if "*" not in pattern:
            return {(): pattern} if pattern in self.values else {}
        search = re.compile(re.escape(pattern).replace(r"\*", r"(0|[1-9]\d*)"))
        matches = (search.fullmatch(name) for name in self.values)
        return dict(sorted((tuple(map(int, match.groups())), match[0]) for match in matches if match))


class _WeightInParts:
    """A weight that stands for several entries of the source: these by their names, and how to compute it."""

    def __init__(self, compute: Callable[..., np.ndarray], parts: Mapping[str, object]) -> None:
        self.compute, self.parts = compute, parts

    @functools.cached_property
    def array(self) -> np.ndarray:
        arrays = [as_array(value) for value in self.parts.values()]
        try:
            # The magnitude of weight norm comes first, but both parts have the weight's dtype.
            return np.asarray(self.compute(*arrays), arrays[0].dtype)
        except ValueError as error:
            raise ValueError(
                f"expected {', '.join(self.parts)} to determine a weight, got parts that do not: {error}; save the "
                "checkpoint after torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
                "remove_spectral_norm"
            ) from None


def _weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """g v / |v|, where the norm is over the axes that g lacks: `torch._weight_norm` with any `dim`."""
    if g.shape and not (g.ndim == v.ndim and all(n in (1, m) for n, m in zip(g.shape, v.shape, strict=True))):
        raise ValueError(f"g has shape {g.shape}, which is not that of a norm of v, {v.shape}")
    axes = tuple(i for i, n in enumerate(g.shape) if n == 1) if g.shape else None
    wide = v.astype(np.float64)
    return np.asarray(wide * (g.astype(np.float64) / np.sqrt((wide**2).sum(axes, keepdims=bool(g.shape)))))


def _spectral_norm(weight: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """weight / (u^T W v), where W has one axis of the weight as rows, and all others as columns."""
    wide = weight.astype(np.float64)
    matrices = (np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1) for axis in range(weight.ndim))
    products = [m @ v.astype(np.float64) for m in matrices if m.shape == u.shape + v.shape]
    if not products:
        raise ValueError(f"vectors have shapes {u.shape} and {v.shape}, which do not fit the weight, {weight.shape}")
    if len(products) > 1:
        # With as many inputs as outputs the shapes do not show which axis has the rows. The vectors do: u is W v,
        # except in a layer that was never trained. Of those, PyTorch's default is known for Linear alone.
        alike = [p for p in products if abs(u @ p) >= _ALIKE * np.linalg.norm(p) * np.linalg.norm(u)]
        products = products[:1] if not alike and weight.ndim == 2 else alike
    sigmas = [float(u @ p) for p in products]
    if not sigmas or not np.allclose(sigmas, sigmas[0], rtol=1e-6):
        raise ValueError("its vectors do not show along which axis of the weight its rows are")
    return np.asarray(wide / sigmas[0])


def _pruned(weight: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(weight * mask.astype(weight.dtype))


# For each way of storing a weight, how the names of its parts end, where {} stands for the parameter's name.
_WAYS: Sequence[tuple[Callable[..., np.ndarray], tuple[str, ...]]] = (
    (_weight_norm, ("{}_g", "{}_v")),
    (_weight_norm, ("parametrizations.{}.original0", "parametrizations.{}.original1")),
    (_spectral_norm, ("{}_orig", "{}_u", "{}_v")),
    (_spectral_norm, ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v")),
    (_pruned, ("{}_orig", "{}_mask")),
)


def _weights_in_parts(source: Mapping[str, object]) -> Iterator[tuple[str, _WeightInParts]]:
    """The weights that the source has in parts, after the names that the whole weights would have."""
    for compute, ends in _WAYS:
        pattern = re.compile(r"((?:.*?\.)?)" + re.escape(ends[0]).replace(r"\{\}", r"([^.]+)"))
        for match in filter(None, map(pattern.fullmatch, source)):
            module, parameter = match.groups()
            parts = [module + end.format(parameter) for end in ends]
            # A second parametrization is applied to what the first returns.
            second = f"{module}parametrizations.{parameter}.1."
            if all(part in source for part in parts) and not any(name.startswith(second) for name in source):
                yield module + parameter, _WeightInParts(compute, {part: source[part] for part in parts})
