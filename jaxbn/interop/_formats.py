"""How PyTorch and Keras name weights and order their axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

# The leaf that counts batches has the same name in PyTorch, Flax and jaxbn.
COUNTER = "num_batches_tracked"

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """An order of axes in another library."""

    # From an array that fits to one whose values are in Flax's order, if not its axes: it is reshaped afterwards.
    load: Callable[[np.ndarray], np.ndarray]
    # From an array of Flax. For a layout that is only loaded, it shows how many axes the array has.
    save: Callable[[np.ndarray], np.ndarray]
    least_axes: int = 0  # of the leaf
    most_axes: float = math.inf

    def has_axes(self, count: int) -> bool:
        return self.least_axes <= count <= self.most_axes

    def shape(self, leaf: Shape) -> Shape:
        """The shape that the other library's array has for a leaf of this shape."""
        return self.save(np.broadcast_to(np.empty(()), leaf)).shape

    def fits(self, shape: Shape, leaf: Shape) -> bool:
        if self is DEPTHWISE:
            return len(shape) == len(leaf) and (*shape[:-2], 1, math.prod(shape[-2:])) == leaf
        return shape == self.shape(leaf)


def linear(inputs: int) -> Layout:
    """[out, in] and [*in, *out] with so many axes `in`; with -1, so many that one axis is left for `out`."""

    def save(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(math.prod(kernel.shape[:inputs]), math.prod(kernel.shape[inputs:])).T

    return Layout(np.transpose, save, 2)


def _flip(kernel: np.ndarray) -> np.ndarray:
    """Reverses the spatial axes of a kernel, which are all but the last two."""
    return np.flip(kernel, tuple(range(kernel.ndim - 2)))


AS_IS = Layout(np.asarray, np.asarray)
# The bias of a linear layer with several axes of outputs; a value that Flax stores without axes and PyTorch with one.
FLAT = Layout(np.asarray, lambda v: v.reshape(-1))
# [*window, in, multiplier] and [*window, 1, in * multiplier]. Back is not possible: only the product is known.
DEPTHWISE = Layout(np.asarray, np.asarray, 3)


class WeightFormat(NamedTuple):
    """How one library names its weights and in which layouts it stores them."""

    separator: str  # between the parts of a name
    names: Mapping[str, tuple[str, ...]]  # from Flax's name of a leaf to the library's names for it
    layouts: Mapping[str, Layout]  # by the name that `kinds` has for them

    def join(self, *parts: str) -> str:
        return self.separator.join(filter(None, parts))


TORCH = WeightFormat(
    ".",
    {
        **dict.fromkeys(("kernel", "scale", "embedding", "negative_slope"), ("weight",)),
        "mean": ("running_mean",),
        "var": ("running_var",),
    },
    {
        "as_is": AS_IS,
        "dense": linear(1)._replace(most_axes=2),
        # Rows [heads, head_dim]
        "to_heads": linear(1)._replace(least_axes=3),
        "from_heads": linear(-1)._replace(least_axes=3),
        # [out, in / groups, *window] and [*window, in / groups, out]
        "conv": Layout(lambda v: np.moveaxis(v, (0, 1), (-1, -2)), lambda v: np.moveaxis(v, (-1, -2), (0, 1)), 3),
        # [in, out, *window] and [*window, in, out], with the window reversed. With transpose_kernel=True Flax has
        # [*window, out, in] and reverses the window itself: "conv".
        "conv_transpose": Layout(
            lambda v: _flip(np.moveaxis(v, (0, 1), (-2, -1))),
            lambda v: np.moveaxis(_flip(v), (-2, -1), (0, 1)),
            3,
        ),
    },
)
KERAS = WeightFormat(
    "/",
    {
        "kernel": ("kernel", "depthwise_kernel", "pointwise_kernel"),
        "scale": ("gamma", "scale"),
        "bias": ("bias", "beta"),
        "embedding": ("embeddings",),
        "negative_slope": ("alpha",),
        "mean": ("moving_mean",),
        "var": ("moving_variance",),
    },
    {
        "as_is": AS_IS,
        # [*window, out, in] and [*window, in, out], with the window reversed
        "conv_transpose": Layout(lambda v: _flip(np.swapaxes(v, -1, -2)), lambda v: np.swapaxes(_flip(v), -1, -2), 3),
        "depthwise": DEPTHWISE,
    },
)
