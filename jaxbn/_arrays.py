"""Arrays of other libraries and of files, as NumPy arrays; the floating-point arrays of a tree."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxbn._extras import need


def to_numpy(value: Any) -> np.ndarray:
    """Returns an array, a number or a tensor of PyTorch as a NumPy array with the same bits and dtype.

    Raises:
      TypeError: `value` is a tensor that NumPy cannot hold.
    """
    if not hasattr(value, "detach"):
        return np.asarray(value)
    try:
        tensor = value.detach().cpu()
        if str(tensor.dtype) != "torch.bfloat16":
            return np.asarray(tensor.numpy())
        # PyTorch does not convert bfloat16 to NumPy. It is the upper half of a float32.
        bits = tensor.float().numpy().view(np.uint32) >> 16
        return np.asarray(bits.astype(np.uint16).view(ml_dtypes.bfloat16))
    except (TypeError, RuntimeError):
        advice = "; load the checkpoint of the float model" if getattr(value, "is_quantized", False) else ""
        got = f"{value.dtype} on {value.device}{advice}"
        raise TypeError(f"expected a tensor that NumPy can hold, got {got}") from None


def to_float64(value: Any) -> np.ndarray:
    return to_numpy(value).astype(np.float64)


def floats(tree: object) -> list[jax.Array]:
    """Returns the floating-point arrays among the leaves."""
    return [v for v in map(jnp.asarray, jax.tree.leaves(tree)) if jnp.issubdtype(v.dtype, jnp.floating)]


# Older versions of safetensors.numpy have no bfloat16, and safetensors.flax has no float64 without x64.
_SAFETENSORS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
}


def read_safetensors(path: pathlib.Path, argument: str) -> dict[str, np.ndarray]:
    """Reads a `.safetensors` file; errors begin with `argument`, by which its caller knows it."""
    entries = need("safetensors", "to read .safetensors files").deserialize(path.read_bytes())
    unknown = sorted({entry["dtype"] for _, entry in entries} - _SAFETENSORS.keys())
    if unknown:
        raise TypeError(f"{argument}: expected dtypes {', '.join(_SAFETENSORS)}, got {', '.join(unknown)} in {path}")
    return {
        name: np.frombuffer(entry["data"], _SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }
