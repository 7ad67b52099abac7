"""Reads named arrays, from a mapping or a file, as NumPy arrays."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._arrays import read_safetensors, to_numpy

_MAX_COUNT = int(np.iinfo(np.int32).max)


def read_source(source: Any) -> Mapping[str, Any]:
    """Returns the named arrays of a mapping or of a `.safetensors` file."""
    if isinstance(source, Mapping) and all(isinstance(name, str) for name in source):
        return source
    if isinstance(source, str | os.PathLike) and str(source).endswith(".safetensors"):
        return read_safetensors(pathlib.Path(source), "source")
    is_path = isinstance(source, str | os.PathLike)
    got = repr(str(source)) if is_path else type(source).__name__
    raise TypeError(
        f"source: expected a mapping of names to arrays or the path of a .safetensors file, got {got}; "
        f"pass {_ways_to_read(source) if is_path else 'model.state_dict(), torch.load(path) or dict(numpy.load(path))'}"
    )


def _ways_to_read(path: Any) -> str:
    """What reads a file of another kind, by the end of its name."""
    suffix, shown = pathlib.Path(path).suffix, repr(str(path))
    if suffix in (".h5", ".hdf5", ".keras"):
        return f"{{w.path: w.numpy() for w in keras.saving.load_model({shown}).weights}}"
    if suffix == ".npz":
        return f"dict(numpy.load({shown}))"
    if suffix in (".pt", ".pth", ".bin", ".ckpt", ".tar"):
        return f"torch.load({shown}, map_location='cpu')"
    return "model.state_dict(), torch.load(path) or dict(numpy.load(path))"


def as_array(value: object) -> np.ndarray:
    """Returns an array or tensor of numbers as a NumPy array, with the same bits and dtype."""
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"expected an array or a tensor, got {type(value).__name__}")
    array = to_numpy(value)
    if not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(f"expected numbers, got dtype {array.dtype}")
    return array


def read_counter(value: Any) -> int:
    """Returns a number of batches.

    Raises:
      ValueError, TypeError: the value is not an integer from 0 to the largest int32.
    """
    array = as_array(value)
    if array.shape != () or not jnp.issubdtype(array.dtype, np.integer) or not 0 <= int(array) <= _MAX_COUNT:
        raise ValueError(f"expected an integer from 0 to {_MAX_COUNT}, got {array.dtype} {array}")
    return int(array)


def fits_jax(dtype: Any) -> bool:
    """Whether JAX has this dtype: float64 and int64 need x64."""
    return bool(jnp.asarray(np.zeros((), dtype)).dtype == dtype)


def is_floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, np.floating))
