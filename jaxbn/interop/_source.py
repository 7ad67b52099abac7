"""Reads named arrays, from a mapping or a file, as NumPy arrays."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxbn._arrays import read_safetensors, to_numpy

_MAX_COUNT = int(np.iinfo(np.int32).max)

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
    """Returns a number of batches.

    Raises:
      ValueError, TypeError: the value is not an integer from 0 to the largest int32.
    """
    array = as_array(value)
    if array.shape != () or not jnp.issubdtype(array.dtype, np.integer) or not 0 <= int(array) <= _MAX_COUNT:
        raise ValueError(f"expected an integer from 0 to {_MAX_COUNT}, got {array.dtype} {array}")
    return int(array)


def fits_jax(dtype: np.dtype) -> bool:
    """Whether JAX has this dtype: float64 and int64 need x64."""
    return bool(jnp.asarray(np.zeros((), dtype)).dtype == dtype)


def is_floating(dtype: np.dtype) -> bool:
    return bool(jnp.issubdtype(dtype, np.floating))
