"""Weights as PyTorch and Keras write them: what the arrays are called, how they lie, and what holds them."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxbn._extras import need

Array = np.ndarray[Any, Any]


class Layout(NamedTuple):
    """How the axes of an array go from theirs to Flax's, and back."""

    load: Callable[[Array], Array]
    save: Callable[[Array], Array]


def _flip(kernel: Array) -> Array:
    """Turns the window of a kernel round, its axes being all but the last two."""
    return np.flip(kernel, tuple(range(kernel.ndim - 2)))


_AS_IS = Layout(lambda v: v, lambda v: v)
_TORCH_LAYOUTS = {
    "as_is": _AS_IS,
    # [out, in] and [in, out]
    "dense": Layout(np.transpose, np.transpose),
    # [out, in / groups, *window] and [*window, in / groups, out]
    "conv": Layout(lambda v: np.moveaxis(v, (0, 1), (-1, -2)), lambda v: np.moveaxis(v, (-1, -2), (0, 1))),
    # [in, out, *window] and [*window, in, out], window turned round. With transpose_kernel=True Flax has
    # [*window, out, in] and turns it itself: "conv".
    "conv_transpose": Layout(
        lambda v: _flip(np.moveaxis(v, (0, 1), (-2, -1))), lambda v: np.moveaxis(_flip(v), (-2, -1), (0, 1))
    ),
}
_KERAS_LAYOUTS = {
    "as_is": _AS_IS,
    # [*window, out, in] and [*window, in, out], window turned round
    "conv_transpose": Layout(lambda v: _flip(np.swapaxes(v, -1, -2)), lambda v: np.swapaxes(_flip(v), -1, -2)),
    # [*window, in, multiplier] and [*window, 1, in * multiplier]; of the two numbers only the product is known.
    "depthwise": Layout(lambda v: v.reshape(*v.shape[:-2], 1, -1), lambda v: v),
}


class Convention(NamedTuple):
    """The names and layouts of one library."""

    separator: str
    names: Mapping[str, tuple[str, ...]]  # Flax's to theirs, of which the first that is there counts
    layouts: Mapping[str, Layout]

    def join(self, module: str, name: str) -> str:
        return f"{module}{self.separator}{name}" if module else name

    def layout(self, leaf: str, ndim: int) -> str:
        """The layout of the target's leaf, where nothing else is said."""
        if leaf != "kernel" or ndim < 2 or self is KERAS:
            return "as_is"
        return "dense" if ndim == 2 else "conv"


TORCH = Convention(
    ".",
    {
        "kernel": ("weight",),
        "scale": ("weight",),
        "embedding": ("weight",),
        "mean": ("running_mean",),
        "var": ("running_var",),
    },
    _TORCH_LAYOUTS,
)
KERAS = Convention(
    "/",
    {
        "kernel": ("kernel", "depthwise_kernel"),
        "scale": ("gamma", "scale"),
        "bias": ("bias", "beta"),
        "embedding": ("embeddings",),
        "mean": ("moving_mean",),
        "var": ("moving_variance",),
    },
    _KERAS_LAYOUTS,
)


def read_source(source: Any) -> Mapping[str, Any]:
    """Returns the named arrays of a mapping, or of a file."""
    if isinstance(source, Mapping) and all(isinstance(name, str) for name in source):
        return source
    if isinstance(source, str | os.PathLike) and str(source).endswith(".safetensors"):
        return _read_safetensors(pathlib.Path(source))
    got = repr(str(source)) if isinstance(source, str | os.PathLike) else type(source).__name__
    raise TypeError(
        f"source: expected a mapping of names to arrays or the path of a .safetensors file, got {got}; "
        "pass model.state_dict(), torch.load(path) or dict(numpy.load(path))"
    )


# safetensors.numpy has no bfloat16 in its older versions, and safetensors.flax no float64 without x64.
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


def _read_safetensors(path: pathlib.Path) -> dict[str, Array]:
    entries = need("safetensors", "to read .safetensors files").deserialize(path.read_bytes())
    unknown = sorted({entry["dtype"] for _, entry in entries} - _SAFETENSORS.keys())
    if unknown:
        raise TypeError(f"source: expected dtypes {', '.join(_SAFETENSORS)}, got {', '.join(unknown)} in {path}")
    return {
        name: np.frombuffer(entry["data"], _SAFETENSORS[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in entries
    }


def as_array(value: Any) -> Array:
    """Returns an array or a tensor, whoever made it, as NumPy's; the same bits in the same dtype."""
    if hasattr(value, "detach"):
        try:
            return _tensor_to_array(value.detach().cpu())
        except (TypeError, RuntimeError):
            raise TypeError(f"expected a tensor that NumPy can hold, got {value.dtype} on {value.device}") from None
    if not hasattr(value, "dtype") or not hasattr(value, "shape"):
        raise TypeError(f"expected an array or a tensor, got {type(value).__name__}")
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, np.number):
        raise TypeError(f"expected numbers, got dtype {array.dtype}")
    return array


def _tensor_to_array(tensor: Any) -> Array:
    if str(tensor.dtype) != "torch.bfloat16":
        return np.asarray(tensor.numpy())
    # NumPy gets no bfloat16 from PyTorch. It is the upper half of a float32.
    bits = tensor.float().numpy().view(np.uint32) >> 16
    return np.asarray(bits.astype(np.uint16).view(ml_dtypes.bfloat16))


def fits_jax(dtype: Any) -> bool:
    """Whether JAX holds the dtype as it is: float64 and int64 only with x64."""
    return bool(jnp.asarray(np.zeros((), dtype)).dtype == dtype)


def is_floating(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, np.floating))
