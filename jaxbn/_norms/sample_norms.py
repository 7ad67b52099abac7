"""Norms whose statistics are within an example: layer, RMS and group norm, and what instance norm shares with them."""

from __future__ import annotations

import math
import operator

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel.devices import AxisName, DeviceGroups, Groups, resolve_devices
from jaxbn._kernel.explicit_mesh import with_auto_axes
from jaxbn._kernel.inputs import other_axes, sizes
from jaxbn._kernel.normalize import normalize_only
from jaxbn._kernel.reduction import ChannelGroups, Reduction
from jaxbn._norms.arguments import WITHOUT_STATE, Arguments, Axis, as_float_array, check_arguments, resolve_axes
from jaxbn._norms.state import AffineParams


def layer_norm(
    x: ArrayLike,
    params: AffineParams | None,
    *,
    axis: Axis = -1,
    params_axis: Axis | None = None,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes `x` by mean and variance over `axis`, separately at each position along the other axes.

    Formula: `y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias` with mean and biased variance over
    `axis`.

    Args:
      x: floating-point array of any rank.
      params: scale and bias, whose shape is that of `x` along `params_axis`; or None for neither.
      axis: the axis, or axes, to take statistics over. PyTorch's `normalized_shape` of k numbers is
        the last k axes: `(-k, ..., -1)`.
      params_axis: the axes along which scale and bias vary; by default those of `axis`. With
        channels last, `axis=(1, 2, 3), params_axis=-1` normalizes each image as a whole, with
        parameters per channel.
      eps: added to the variance.
      mask: boolean, True counts; broadcastable, rank for rank, to all of `x` or to `x` without
        `params_axis`. Masked values enter no statistic, and NaN among them no gradient; their own
        output is normalized like the rest. Where no value counts, y is the bias.
      axis_name, axis_index_groups: the mapped axis along which each device has a part of `axis`, if there
        is one: statistics are then those of the whole. As in `batch_norm_train`.
      dtype: of y; that of `x` by default. Statistics are float32 at least (float64 for float64).

    Returns:
      y, of the shape of `x`.

    Raises:
      ValueError: `axis` or `params_axis` out of range; `params` or `mask` do not fit `x`; `eps`
        negative; `axis_name` not bound.
      TypeError: `x` is not floating point, `mask` not boolean, or `params` of another type.

    Source: Ba, Kiros & Hinton (2016), Layer Normalization, arXiv:1607.06450;
    torch.nn.functional.layer_norm.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0, 3.0], [10.0, 30.0]])
      >>> jaxbn.layer_norm(x, jaxbn.affine_init(2)).round(3).tolist()
      [[-1.0, 1.0], [-1.0, 1.0]]
    """
    x = as_float_array(x)
    reduced = resolve_axes(x.ndim, axis)
    feature = reduced if params_axis is None else resolve_axes(x.ndim, params_axis, "params_axis")
    a = check_arguments(
        x, params, feature=feature, reduced=reduced, eps=eps, mask=mask, dtype=dtype, cure=WITHOUT_STATE
    )
    return normalize_examples(a, resolve_devices(axis_name, axis_index_groups))


def rms_norm(
    x: ArrayLike,
    params: AffineParams | None,
    *,
    axis: Axis = -1,
    params_axis: Axis | None = None,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Divides `x` by its root mean square over `axis`, separately at each position along the other axes.

    Formula: `y = x / sqrt(mean(x**2) + eps) * scale + bias`, the mean over `axis`; the usual
    parameters have no bias: `affine_init(C, bias=False)`.

    Args:
      x: floating-point array of any rank.
      params: scale and bias, whose shape is that of `x` along `params_axis`; or None for neither.
      eps: added to the mean square. Models differ in it: PyTorch's None is `jnp.finfo(jnp.float32).eps` for
        float32 (and, in version 2.13 on CPU, for half precision too), LLaMA has 1e-5 or 1e-6.
      axis, params_axis, mask, axis_name, axis_index_groups, dtype: as in `layer_norm`.

    Returns:
      y, of the shape of `x`.

    Raises:
      ValueError, TypeError: as `layer_norm`.

    Source: Zhang & Sennrich (2019), Root Mean Square Layer Normalization, arXiv:1910.07467;
    torch.nn.functional.rms_norm.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[0.1, -0.1], [20.0, 20.0]])
      >>> jaxbn.rms_norm(x, jaxbn.affine_init(2, bias=False)).round(2).tolist()
      [[1.0, -1.0], [1.0, 1.0]]
    """
    x = as_float_array(x)
    reduced = resolve_axes(x.ndim, axis)
    feature = reduced if params_axis is None else resolve_axes(x.ndim, params_axis, "params_axis")
    a = check_arguments(
        x, params, feature=feature, reduced=reduced, eps=eps, mask=mask, dtype=dtype, cure=WITHOUT_STATE
    )
    return normalize_examples(a, resolve_devices(axis_name, axis_index_groups), about_zero=True)


def group_norm(
    x: ArrayLike,
    params: AffineParams | None,
    num_groups: int,
    *,
    axis: int = -1,
    batch_axis: Axis = 0,
    eps: float = 1e-5,
    mask: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """Normalizes each example of `x` by the moments of groups of neighbouring channels.

    Formula: `y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias` with mean and biased variance over
    the `C / num_groups` channels of a group and all axes but `batch_axis`; scale and bias per channel.

    Args:
      x: floating-point array of any rank, in which each group has at least two values.
      params: scale and bias, shape [C]; or None for neither.
      num_groups: how many groups the channels are cut into, in order; a divisor of C. 1 normalizes
        each example as a whole, C is `instance_norm_train` without a state.
      axis: the axis of the channels; 1 for PyTorch's [N, C, ...].
      batch_axis: the axis, or axes, along which examples lie: `(0, 1)` if each frame of a video is an
        example, `()` for one example.
      eps: added to the variance.
      mask: boolean, True counts; broadcastable, rank for rank, to `x` without its channels or to all
        of `x`; as in `layer_norm`.
      axis_name, axis_index_groups: the mapped axis along which each device has a part of each example
        (rows of images, for example), if there is one: statistics are then those of the whole.
      dtype: of y; that of `x` by default. Statistics are float32 at least (float64 for float64).

    Returns:
      y, of the shape of `x`.

    Raises:
      ValueError: the channels do not divide into `num_groups`; a group has one value only; `axis` or
        `batch_axis` out of range or the same; `params` or `mask` do not fit `x`; `eps` negative;
        `axis_name` not bound.
      TypeError: `x` is not floating point, `mask` not boolean, `params` of another type, or `num_groups` not
        an integer.

    Source: Wu & He (2018), Group Normalization, arXiv:1803.08494; torch.nn.functional.group_norm.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0, 3.0, 10.0, 30.0]])
      >>> jaxbn.group_norm(x, jaxbn.affine_init(4), 2).round(3).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """
    x = as_float_array(x)
    feature, reduced = within_examples(x, axis, batch_axis)
    if len(feature) != 1:
        raise ValueError(f"axis: expected the one axis that holds the channels, got {axis}; reshape them into one")
    try:
        num_groups = operator.index(num_groups)
    except TypeError:
        raise TypeError(f"num_groups: expected an integer, got {type(num_groups).__name__}") from None
    a = check_arguments(
        x, params, feature=feature, reduced=reduced, eps=eps, mask=mask, dtype=dtype, cure=WITHOUT_STATE
    )
    return normalize_groups(a, resolve_devices(axis_name, axis_index_groups), num_groups)


def normalize_examples(a: Arguments, devices: DeviceGroups | None, *, about_zero: bool = False) -> jax.Array:
    """Returns y of a norm within an example, whose mean is defined as zero with `about_zero`."""
    reduction = Reduction(a.reduced, devices, about_zero=about_zero)
    return normalize_only(
        a.x, a.scale, a.bias, a.mask, reduction=reduction, feature=a.feature, eps=a.eps, dtype=a.dtype
    )


def normalize_groups(
    a: Arguments, devices: DeviceGroups | None, num_groups: int, *, check_values: bool = True
) -> jax.Array:
    """Returns y of a norm within an example, in which groups of channels, along the one feature axis, share statistics.

    With `check_values` one value per statistic is an error.
    """
    (axis,) = a.feature
    channels = a.x.shape[axis]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {channels} channels of x with shape {a.x.shape}, got "
            f"{num_groups}; all groups have the same number of channels"
        )
    if check_values:
        check_more_than_one(a, devices, channels // num_groups)
    groups = ChannelGroups(axis, num_groups)

    def grouped(
        x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array]:
        reduction, feature = Reduction(a.reduced, devices, groups), a.feature
        if not a.reduced:
            # The moments of each channel would be of one value. Cut into groups, the channels are rows.
            reduction, feature = Reduction((axis + 1,), devices), (axis, axis + 1)
            x, scale, bias = groups.cut(x, axis), _cut(groups, scale, 0), _cut(groups, bias, 0)
            mask = _cut(groups, mask, axis)
        y = normalize_only(x, scale, bias, mask, reduction=reduction, feature=feature, eps=a.eps, dtype=a.dtype)
        return (y.reshape(a.x.shape),)

    sharded = with_auto_axes(grouped, a.x, axis, (a.x.shape, tuple(range(a.x.ndim))))
    return sharded(a.x, a.scale, a.bias, a.mask)[0]


def _cut(groups: ChannelGroups, v: jax.Array | None, axis: int) -> jax.Array | None:
    return None if v is None else groups.cut(v, axis)


def check_more_than_one(a: Arguments, devices: DeviceGroups | None, channels: int = 1) -> None:
    """Raises if a statistic is over one value; `channels` share it."""
    values = math.prod(sizes(a.x, a.reduced)) * channels * (1 if devices is None else devices.smallest)
    if values == 1:
        raise ValueError(
            f"x: expected more than 1 value to take each statistic over, got shape {a.x.shape} with 1 value "
            "per statistic, whose normalized value would always be 0; use larger groups or more positions"
        )


def within_examples(x: jax.Array, axis: Axis, batch_axis: Axis) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the feature axes, and the axes that are neither feature axes nor those of examples."""
    feature = resolve_axes(x.ndim, axis)
    batch = resolve_axes(x.ndim, batch_axis, "batch_axis")
    if set(feature) & set(batch):
        raise ValueError(
            f"batch_axis: expected axes other than the feature axes {feature}, got {batch_axis} for x with shape "
            f"{x.shape}; pass the channels as axis=..., and batch_axis=() if x is one example"
        )
    return feature, other_axes(x.ndim, feature + batch)
