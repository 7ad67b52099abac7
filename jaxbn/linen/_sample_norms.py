"""Layer, RMS, group and instance norm as Linen modules."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._kernel.devices import AxisName, DeviceGroups
from jaxbn._kernel.inputs import sizes
from jaxbn._layers import flax_options
from jaxbn._norms.arguments import Arguments
from jaxbn._norms.sample_norms import check_more_than_one, normalize_examples, normalize_groups
from jaxbn.linen._params import Layer, affine_params, result_dtype


class LayerNorm(nn.LayerNorm):
    """Layer normalization; drop-in for `flax.linen.LayerNorm`.

    Formula: that of `jaxbn.layer_norm` over `reduction_axes`, with scale and bias along `feature_axes`.

    Variables: params `scale`, `bias` in `param_dtype`, of the shape of x along `feature_axes`.

    All fields of `flax.linen.LayerNorm`, in its order and with its defaults and meanings, except for three:
    `use_fast_variance` and `force_float32_reductions` have no effect, since variances are computed in a way
    that is both fast and exact, in float32 at least; `axis_name` need not be bound in initialization, and
    each value has equal weight, so masks may differ between devices.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.layer_norm`.

    Source: Ba, Kiros & Hinton (2016), arXiv:1607.06450; interface: flax.linen.LayerNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import LayerNorm
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> y, variables = LayerNorm().init_with_output(jax.random.key(0), x)
      >>> y.round(3).tolist(), variables["params"]["scale"].tolist()
      ([[-1.0, 1.0], [-1.0, 1.0]], [1.0, 1.0])
    """

    axis_name: AxisName | None = None  # type: ignore[assignment]  # Flax has one name

    @nn.compact
    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        axes = flax_options.layer_norm_axes(x, self.reduction_axes, self.feature_axes)
        return normalize_examples(*_arguments(self, x, axes, mask))


class RMSNorm(nn.RMSNorm):
    """RMS normalization; drop-in for `flax.linen.RMSNorm`.

    Formula: that of `jaxbn.rms_norm` over `reduction_axes`, with scale along `feature_axes`.

    Variables: params `scale` in `param_dtype`, of the shape of x along `feature_axes`.

    All fields of `flax.linen.RMSNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.rms_norm`.

    Source: Zhang & Sennrich (2019), arXiv:1910.07467; interface: flax.linen.RMSNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import RMSNorm
      >>> y, _ = RMSNorm().init_with_output(jax.random.key(0), jnp.array([[20.0, -20.0]]))
      >>> y.round(3).tolist()
      [[1.0, -1.0]]
    """

    axis_name: AxisName | None = None  # type: ignore[assignment]  # Flax has one name

    @nn.compact
    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        axes = flax_options.layer_norm_axes(x, self.reduction_axes, self.feature_axes)
        return normalize_examples(*_arguments(self, x, axes, mask), about_zero=True)


class GroupNorm(nn.GroupNorm):
    """Group normalization; drop-in for `flax.linen.GroupNorm`.

    Formula: that of `jaxbn.group_norm`, channels last, with examples along the axes that are not
    `reduction_axes`: the first one by default.

    Variables: params `scale`, `bias` in `param_dtype`, shape [C].

    All fields of `flax.linen.GroupNorm`; see `LayerNorm`.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.group_norm`, of which one differs from Flax's layer: one value
        per group is an error, not a variance of 0.

    Source: Wu & He (2018), arXiv:1803.08494; interface: flax.linen.GroupNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import GroupNorm
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> y, _ = GroupNorm(num_groups=2).init_with_output(jax.random.key(0), x)
      >>> y.round(3).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    axis_name: AxisName | None = None  # type: ignore[assignment]  # Flax has one name

    @nn.compact
    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        if self.num_groups is not None and self.group_size is None:
            num_groups = self.num_groups
        elif self.num_groups is None and self.group_size is not None:
            if self.group_size < 1 or x.shape[-1] % self.group_size:
                raise ValueError(
                    f"group_size: expected a divisor of the {x.shape[-1]} channels of x with shape {x.shape}, "
                    f"got {self.group_size}; all groups have the same number of channels"
                )
            num_groups = x.shape[-1] // self.group_size
        else:
            raise ValueError(
                f"num_groups, group_size: expected one number and one None, got {self.num_groups} and "
                f"{self.group_size}; with group_size pass num_groups=None, which is 32 by default"
            )
        axes = flax_options.group_norm_axes(x, self.reduction_axes)
        a, devices = _arguments(self, x, axes, mask)
        return normalize_groups(a, devices, num_groups, check_values=not self.is_initializing())


class InstanceNorm(nn.InstanceNorm):
    """Instance normalization; drop-in for `flax.linen.InstanceNorm`.

    Formula: that of `jaxbn.instance_norm_train` without a state, with channels along `feature_axes` and
    examples along the first axis. For running statistics use `BatchNorm(virtual_batch_size=1)`.

    Variables: params `scale`, `bias` in `param_dtype`, of the shape of x along `feature_axes`.

    All fields of `flax.linen.InstanceNorm`; see `LayerNorm`. Devices along `axis_name` have parts of each
    example.

    Raises (when called):
      ValueError, TypeError: as `jaxbn.instance_norm_train`, of which one differs from Flax's layer: one
        value per channel of an example is an error, not a variance of 0.

    Source: Ulyanov, Vedaldi & Lempitsky (2016), arXiv:1607.08022; interface: flax.linen.InstanceNorm.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import InstanceNorm
      >>> x = jnp.array([[[1.0], [3.0]], [[10.0], [30.0]]])
      >>> y, _ = InstanceNorm().init_with_output(jax.random.key(0), x)
      >>> y[..., 0].round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """

    axis_name: AxisName | None = None  # type: ignore[assignment]  # Flax has one name

    @nn.compact
    def __call__(self, x: ArrayLike, mask: jax.Array | None = None) -> jax.Array:
        """Normalizes `x`; `mask` broadcasts to it as in NumPy, and True (or non-zero) counts."""
        x = flax_options.as_number_array(x)
        if jnp.iscomplexobj(x):
            return super().__call__(x, mask=mask)
        axes = flax_options.instance_norm_axes(x, self.feature_axes)
        a, devices = _arguments(self, x, axes, mask)
        if not self.is_initializing():
            check_more_than_one(a, devices)
        return normalize_examples(a, devices)


def _arguments(
    layer: Layer, x: jax.Array, axes: flax_options.ReducedAndFeature, mask: jax.Array | None
) -> tuple[Arguments, DeviceGroups | None]:
    params = affine_params(layer, sizes(x, axes[1]))
    only_shapes, dtype = layer.is_initializing(), result_dtype(layer, x, params)
    return flax_options.example_arguments(layer, x, params, axes, only_shapes=only_shapes, mask=mask, dtype=dtype)
