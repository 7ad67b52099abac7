"""Reads named arrays, from a mapping or a file, as NumPy arrays."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jaxbn._extras import need

_MAX_COUNT = int(np.iinfo(np.int32).max)


def read_source(source: Any) -> Mapping[str, Any]:
    """Returns the named arrays of a mapping or of a `.safetensors` file."""
    if isinstance(source, Mapping) and all(isinstance(name, str) for name in source):
        return source
    if isinstance(source, str | os.PathLike) and str(source).endswith(".safetensors"):
        return _read_safetensors(pathlib.Path(source))
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


# Older versions of safetensors.numpy have no bfloat16, and safetensors.flax has no float64 without x64.
_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def _read_safetensors(path: pathlib.Path) -> dict[str, NDArray[Any]]:
    entries = need("safetensors", "to read .safetensors files").deserialize(path.read_bytes())
    unknown = sorted({entry["dtype"] for _, entry in entries} - _SAFETENSORS.keys())
    if unknown:
        raise TypeError(f"source: expected dtypes {', '.join(_SAFETENSORS)}, got {', '.join(unknown)} in {path}")
    return {
        name: np.frombuffer(entry["data"], _SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }


def as_array(value: Any) -> NDArray[Any]:
    """Returns an array or tensor of any library as a NumPy array, with the same bits and dtype."""
    if hasattr(value, "detach"):
        try:
            return _tensor_to_array(value.detach().cpu())
        except (TypeError, RuntimeError):
            advice = "; load the checkpoint of the float model" if getattr(value, "is_quantized", False) else ""
            got = f"{value.dtype} on {value.device}{advice}"
            raise TypeError(f"expected a tensor that NumPy can hold, got {got}") from None
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"expected an array or a tensor, got {type(value).__name__}")
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(f"expected numbers, got dtype {array.dtype}")
    return array


def _tensor_to_array(tensor: Any) -> NDArray[Any]:
    if str(tensor.dtype) != "torch.bfloat16":
        return np.asarray(tensor.numpy())
    # PyTorch does not convert bfloat16 to NumPy. It is the upper half of a float32.
    bits = tensor.float().numpy().view(np.uint32) >> 16
    return np.asarray(bits.astype(np.uint16).view(ml_dtypes.bfloat16))


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
