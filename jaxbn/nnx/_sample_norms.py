"""Layer, RMS, group and instance norm as NNX modules."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxbn._kernel.devices import DeviceGroups
from jaxbn._kernel.inputs import sizes
from jaxbn._layers import flax_options
from jaxbn._norms.arguments import Arguments
from jaxbn._norms.sample_norms import check_more_than_one, normalize_examples, normalize_groups
from jaxbn._norms.state import AffineParams
from jaxbn._versions import instance_norm_class
from jaxbn.nnx._result_dtype import Layer, result_dtype
from jaxbn.nnx._shapes import only_shapes
from jaxbn.nnx._signature import InitSignature

if TYPE_CHECKING:
    from flax.nnx import InstanceNorm as _FlaxInstanceNorm
else:
    _FlaxInstanceNorm = instance_norm_class()


class LayerNorm(nnx.LayerNorm):
    """Layer normalization; drop-in for `flax.nnx.LayerNorm`.

    Formula: that of `jaxbn.layer_norm` over `reduction_axes`, with scale and bias along `feature_axes`.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.LayerNorm`, with its defaults and meanings, except for three:
    `use_fast_variance` has no effect, since variances are computed in a way that is both fast and exact;
    `promote_dtype` only decides the dtype of the result, since statistics are always float32 at least;
    with `axis_name` each value has equal weight, so masks may differ between devices.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.layer_norm`.

    Source: Ba, Kiros & Hinton (2016), arXiv:1607.06450; interface: flax.nnx.LayerNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import LayerNorm
      >>> LayerNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0], [10.0, 30.0]])).round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    __signature__: InitSignature = InitSignature()

    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        axes = flax_options.layer_norm_axes(x, self.reduction_axes, self.feature_axes)
        return normalize_examples(*_arguments(self, x, axes, mask, self.num_features))


class RMSNorm(nnx.RMSNorm):
    """RMS normalization; drop-in for `flax.nnx.RMSNorm`.

    Formula: that of `jaxbn.rms_norm` over `reduction_axes`, with scale along `feature_axes`.

    Variables: `scale` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.RMSNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.rms_norm`.

    Source: Zhang & Sennrich (2019), arXiv:1910.07467; interface: flax.nnx.RMSNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import RMSNorm
      >>> RMSNorm(2, rngs=nnx.Rngs(0))(jnp.array([[20.0, -20.0]])).round(3).tolist()
      [[1.0, -1.0]]
    """

    __signature__: InitSignature = InitSignature()

    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        axes = flax_options.layer_norm_axes(x, self.reduction_axes, self.feature_axes)
        return normalize_examples(*_arguments(self, x, axes, mask, self.num_features), about_zero=True)


class GroupNorm(nnx.GroupNorm):
    """Group normalization; drop-in for `flax.nnx.GroupNorm`.

    Formula: that of `jaxbn.group_norm`, channels last, with examples along the axes that are not
    `reduction_axes`: the first one by default.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.GroupNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.group_norm`, of which one differs from Flax's layer: one value
        per group is an error, not a variance of 0.

    Source: Wu & He (2018), arXiv:1803.08494; interface: flax.nnx.GroupNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import GroupNorm
      >>> GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    __signature__: InitSignature = InitSignature()

    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        axes = flax_options.group_norm_axes(x, self.reduction_axes)
        a, devices = _arguments(self, x, axes, mask, self.num_groups * self.group_size)
        return normalize_groups(a, devices, self.num_groups, check_values=not only_shapes(self))


class InstanceNorm(_FlaxInstanceNorm):
    """Instance normalization; drop-in for `flax.nnx.InstanceNorm`.

    Formula: that of `jaxbn.instance_norm_train` without a state, with channels along `feature_axes` and
    examples along the first axis. For running statistics use `BatchNorm(virtual_batch_size=1)`.

    Variables: `scale`, `bias` (`nnx.Param`, in `param_dtype`), shape [num_features].

    All arguments of `flax.nnx.InstanceNorm`; see `LayerNorm`. Devices along `axis_name` have parts of
    each example.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.instance_norm_train`, of which one differs from Flax's layer: one
        value per channel of an example is an error, not a variance of 0.

    Source: Ulyanov, Vedaldi & Lempitsky (2016), arXiv:1607.08022; interface: flax.nnx.InstanceNorm.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxbn.nnx import InstanceNorm
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
      >>> InstanceNorm(1, rngs=nnx.Rngs(0))(x)[..., 0].round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    __signature__: InitSignature = InitSignature()

    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        axes = flax_options.instance_norm_axes(x, self.feature_axes)
        a, devices = _arguments(self, x, axes, mask, self.num_features)
        if not only_shapes(self):
            check_more_than_one(a, devices)
        return normalize_examples(a, devices)


def _arguments(
    layer: Layer, x: jax.Array, axes: flax_options.ReducedAndFeature, mask: jax.Array | None, num_features: int
) -> tuple[Arguments, DeviceGroups | None]:
    feature = axes[1]
    shape = sizes(x, feature)
    if math.prod(shape) != num_features:
        raise ValueError(
            f"x: expected {num_features} features along axes {feature}, got {shape} in x with shape {x.shape}; "
            "give the layer that num_features, or the axes along which scale and bias vary"
        )
    variables = {"scale": layer.scale, "bias": getattr(layer, "bias", None)}  # RMSNorm has no bias.
    arrays = {name: v[...] for name, v in variables.items() if v is not None}
    wrong = [f"{name} has shape {v.shape}" for name, v in arrays.items() if v.shape != (num_features,)]
    if wrong:
        raise ValueError(
            f"layer: expected scale and bias of shape ({num_features},), got a layer whose {' and '.join(wrong)}; "
            "layers that are stacked go through nnx.vmap or nnx.scan"
        )
    params = AffineParams(**{name: v.reshape(shape) for name, v in arrays.items()})
    shapes, dtype = only_shapes(layer), result_dtype(layer, x, (), params)
    return flax_options.example_arguments(layer, x, params, axes, only_shapes=shapes, mask=mask, dtype=dtype)
