"""How PyTorch and Keras name weights and order their axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# The leaf that counts batches has the same name in PyTorch, Flax and jaxbn.
COUNTER = "num_batches_tracked"


class Layout(NamedTuple):
    """An order of axes in another library, as two functions: to Flax's order and back."""

    load: Callable[[NDArray[Any]], NDArray[Any]]
    save: Callable[[NDArray[Any]], NDArray[Any]]


def _flip(kernel: NDArray[Any]) -> NDArray[Any]:
    """Reverses the spatial axes of a kernel, which are all but the last two."""
    return np.flip(kernel, tuple(range(kernel.ndim - 2)))


_AS_IS = Layout(lambda v: v, lambda v: v)
_TORCH_LAYOUTS = {
    "as_is": _AS_IS,
    # [out, in] and [in, out]
    "dense": Layout(np.transpose, np.transpose),
    # [out, in / groups, *window] and [*window, in / groups, out]
    "conv": Layout(lambda v: np.moveaxis(v, (0, 1), (-1, -2)), lambda v: np.moveaxis(v, (-1, -2), (0, 1))),
    # [in, out, *window] and [*window, in, out], with the window reversed. With transpose_kernel=True Flax has
    # [*window, out, in] and reverses the window itself: "conv".
    "conv_transpose": Layout(
        lambda v: _flip(np.moveaxis(v, (0, 1), (-2, -1))), lambda v: np.moveaxis(_flip(v), (-2, -1), (0, 1))
    ),
}
_KERAS_LAYOUTS = {
    "as_is": _AS_IS,
    # [*window, out, in] and [*window, in, out], with the window reversed
    "conv_transpose": Layout(lambda v: _flip(np.swapaxes(v, -1, -2)), lambda v: np.swapaxes(_flip(v), -1, -2)),
    # [*window, in, multiplier] and [*window, 1, in * multiplier]. Back is not possible: only the product is known.
    "depthwise": Layout(lambda v: v.reshape(*v.shape[:-2], 1, -1), lambda v: v),
}


class WeightFormat(NamedTuple):
    """How one library names its weights and in which layouts it stores them.

    Attributes:
      separator: between the parts of a name.
      names: from Flax's name of a leaf to the library's names for it; the first that the source has is used.
      layouts: by the name that `kinds` has for them.
    """

    separator: str
    names: Mapping[str, tuple[str, ...]]
    layouts: Mapping[str, Layout]

    def join(self, module: str, name: str) -> str:
        return f"{module}{self.separator}{name}" if module else name

    def default_kind(self, leaf_name: str, ndim: int) -> str:
        """The layout of a leaf of the target, unless `kinds` or its module say otherwise."""
        if leaf_name != "kernel" or ndim < 2 or self is KERAS:
            return "as_is"
        return "dense" if ndim == 2 else "conv"


TORCH = WeightFormat(
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
KERAS = WeightFormat(
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
