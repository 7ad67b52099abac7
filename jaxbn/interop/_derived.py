"""Weights that PyTorch stores in parts: weight norm, spectral norm, pruning."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxbn.interop._source import as_array

# Two unit vectors of which one is the other after a few steps of training; random ones are nearly orthogonal.
_ALIKE = 0.9


class Derived(NamedTuple):
    """A weight that stands for several entries of the source: their names, and its value."""

    names: tuple[str, ...]
    compute: Callable[[], NDArray[Any]]


def _weight_norm(g: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
    """g v / |v|, where the norm is over the axes that g lacks: `torch._weight_norm` with any `dim`."""
    if g.shape and not (g.ndim == v.ndim and all(n in (1, m) for n, m in zip(g.shape, v.shape, strict=True))):
        raise ValueError(f"g has shape {g.shape}, which is not that of a norm of v, {v.shape}")
    axes = tuple(i for i, n in enumerate(g.shape) if n == 1) if g.shape else None
    wide = v.astype(np.float64)
    return np.asarray(wide * (g.astype(np.float64) / np.sqrt((wide**2).sum(axes, keepdims=bool(g.shape)))))


def _spectral_norm(weight: NDArray[Any], u: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]:
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


def _pruned(weight: NDArray[Any], mask: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(weight * mask.astype(weight.dtype))


# For each way of storing a weight, how the names of its parts end, where {} stands for the parameter's name.
_WAYS: Sequence[tuple[Callable[..., NDArray[Any]], tuple[str, ...]]] = (
    (_weight_norm, ("{}_g", "{}_v")),
    (_weight_norm, ("parametrizations.{}.original0", "parametrizations.{}.original1")),
    (_spectral_norm, ("{}_orig", "{}_u", "{}_v")),
    (
        _spectral_norm,
        ("parametrizations.{}.original", "parametrizations.{}.0._u", "parametrizations.{}.0._v"),
    ),
    (_pruned, ("{}_orig", "{}_mask")),
)


def find_derived(source: Mapping[str, Any]) -> dict[str, Derived]:
    """Returns the weights that the source has in parts, by the names that the whole weights would have."""
    found = {}
    for function, ends in _WAYS:
        pattern = re.compile(r"(.*?)" + re.escape(ends[0]).replace(r"\{\}", r"([^.]+)"))
        for name in source:
            match = pattern.fullmatch(name)
            if match is None or (match[1] and not match[1].endswith(".")):
                continue
            parts = tuple(match[1] + end.format(match[2]) for end in ends)
            # A second parametrization is applied to what the first returns.
            second = f"{match[1]}parametrizations.{match[2]}.1."
            if all(part in source for part in parts) and not any(other.startswith(second) for other in source):
                compute = functools.cache(functools.partial(_compute, function, parts, source))
                found[match[1] + match[2]] = Derived(parts, compute)
    return found


def _compute(function: Callable[..., NDArray[Any]], names: tuple[str, ...], source: Mapping[str, Any]) -> NDArray[Any]:
    arrays = [as_array(source[name]) for name in names]
    try:
        # The magnitude of weight norm comes first, but both parts have the weight's dtype.
        return np.asarray(function(*arrays), arrays[0].dtype)
    except ValueError as error:
        raise ValueError(
            f"expected {', '.join(names)} to determine a weight, got parts that do not: {error}; save the checkpoint "
            "after torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or remove_spectral_norm"
        ) from None
