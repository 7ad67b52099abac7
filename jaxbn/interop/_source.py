"""Reads the entries of a source, a mapping or a file, as NumPy arrays."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from jaxbn._arrays import read_safetensors, to_numpy
from jaxbn.interop._formats import TORCH, Shape, WeightFormat

_MAX_COUNT = int(np.iinfo(np.int32).max)
# Two unit vectors of which one is the other after a few steps of training; random ones are nearly orthogonal.
_ALIKE = 0.9

# A mapping of names to arrays or tensors, or the path of a file.
Source = Mapping[str, object] | str | os.PathLike[str]


def read_source(source: Source) -> Mapping[str, object]:
    """Returns the named arrays of a mapping or of a `.safetensors` file."""
    if isinstance(source, Mapping) and all(isinstance(name, str) for name in source):
        return source
    got, cure = type(source).__name__, "model.state_dict(), torch.load(path) or dict(numpy.load(path))"
    if isinstance(source, str | os.PathLike):
        path, got = pathlib.Path(source), repr(str(source))
        if path.suffix == ".safetensors":
            return read_safetensors(path, "source")
        for suffixes, reader in _READERS.items():
            if path.suffix in suffixes:
                cure = reader.format(got)
    raise TypeError(
        f"source: expected a mapping of names to arrays or the path of a .safetensors file, got {got}; pass {cure}"
    )


_READERS = {
    (".h5", ".hdf5", ".keras"): "{{w.path: w.numpy() for w in keras.saving.load_model({}).weights}}",
    (".npz",): "dict(numpy.load({}))",
    (".pt", ".pth", ".bin", ".ckpt", ".tar"): "torch.load({}, map_location='cpu')",
}


def as_array(value: object) -> np.ndarray:
    """Returns an array or tensor of numbers as a NumPy array, with the same bits and dtype."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"expected an array or a tensor, got {type(value).__name__}")
    array = to_numpy(value)
    if not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(f"expected numbers, got dtype {array.dtype}")
    return array


def read_counter(value: object) -> int:
    """Returns a number of batches; raises ValueError or TypeError if it is none that int32 holds."""
    array = as_array(value)
    if array.shape != () or not jnp.issubdtype(array.dtype, np.integer) or not 0 <= int(array) <= _MAX_COUNT:
        raise ValueError(f"expected an integer from 0 to {_MAX_COUNT}, got {array.dtype} {array}")
    return int(array)


def fits_jax(dtype: np.dtype) -> bool:
    """Whether JAX has this dtype: float64 and int64 need x64."""
    return bool(jnp.asarray(np.zeros((), dtype)).dtype == dtype)


class Entries:
    """The entries of a source by their names: whole, numbered, or weights that PyTorch stores in parts."""

    def __init__(self, source: Mapping[str, object], weight_format: WeightFormat) -> None:
        self.source, self.weight_format = source, weight_format
        found = _find_weights_in_parts(source) if weight_format is TORCH else {}
        self._in_parts = {name: parts for name, parts in found.items() if name not in source}
        self._computed: dict[str, np.ndarray] = {}
        self.names = [*self._in_parts, *source]
        # For each name without one or two of its numbers, the names with * in their place.
        self.patterns: dict[str, set[str]] = defaultdict(set)
        for name in self.names:
            words = name.split(weight_format.separator)
            numbers = [i for i, word in enumerate(words) if word.isdecimal()]
            for chosen in (*itertools.combinations(numbers, 1), *itertools.combinations(numbers, 2)):
                without = weight_format.separator.join(word for i, word in enumerate(words) if i not in chosen)
                with_stars = ("*" if i in chosen else word for i, word in enumerate(words))
                self.patterns[without].add(weight_format.separator.join(with_stars))

    def array(self, name: str) -> np.ndarray:
        if name in self.source:
            return as_array(self.source[name])
        if name not in self._computed:
            self._computed[name] = self._compute(*self._in_parts[name])
        return self._computed[name]

    def _compute(self, compute: Callable[..., np.ndarray], parts: Sequence[str]) -> np.ndarray:
        arrays = [self.array(part) for part in parts]
        try:
            # The magnitude of weight norm comes first, but both parts have the weight's dtype.
            return np.asarray(compute(*arrays), arrays[0].dtype)
        except ValueError as error:
            raise ValueError(
                f"expected {', '.join(parts)} to determine a weight, got parts that do not: {error}; save the "
                "checkpoint after torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm or "
                "remove_spectral_norm"
            ) from None

    def parts(self, name: str) -> Sequence[str]:
        """The names in the source of an entry."""
        return [name] if name in self.source else self._in_parts[name][1]

    def shape(self, name: str) -> Shape | None:
        """The shape of an entry, or None if it has none."""
        try:
            value = self.source[name] if name in self.source else self.array(name)
        except (TypeError, ValueError):
            return None
        return tuple(value.shape) if hasattr(value, "shape") else None

    def numbered(self, pattern: str) -> dict[Shape, str]:
        """The names that a pattern stands for, by their numbers; one without numbers for a name without *."""
        if "*" not in pattern:
            return {(): pattern} if pattern in self.source or pattern in self._in_parts else {}
        search = re.compile(re.escape(pattern).replace(r"\*", r"(0|[1-9]\d*)"))
        matches = filter(None, map(search.fullmatch, self.names))
        return dict(sorted((tuple(map(int, match.groups())), match[0]) for match in matches))


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


def _find_weights_in_parts(source: Mapping[str, object]) -> dict[str, tuple[Callable[..., np.ndarray], list[str]]]:
    """How to compute each weight that the source has in parts, and these, by the name that the whole would have."""
    found = {}
    for compute, ends in _WAYS:
        pattern = re.compile(r"((?:.*?\.)?)" + re.escape(ends[0]).replace(r"\{\}", r"([^.]+)"))
        for match in filter(None, map(pattern.fullmatch, source)):
            module, parameter = match.groups()
            parts = [module + end.format(parameter) for end in ends]
            # A second parametrization is applied to what the first returns.
            second = f"{module}parametrizations.{parameter}.1."
            if all(part in source for part in parts) and not any(name.startswith(second) for name in source):
                found[module + parameter] = (compute, parts)
    return found
