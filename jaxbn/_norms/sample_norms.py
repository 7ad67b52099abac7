"""Norms whose statistics are within an example: layer, RMS and group norm, and what instance norm shares with them."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable

import jax
from jax.typing import ArrayLike, DTypeLike

from jaxbn._kernel import inputs
from jaxbn._kernel.devices import AxisName, DeviceGroups, Groups, resolve_devices
from jaxbn._kernel.explicit_mesh import with_auto_axes
from jaxbn._kernel.measure import ChannelGroups, Reduction
from jaxbn._kernel.moments import Moments
from jaxbn._kernel.normalize import Adjust, normalize
from jaxbn._norms.state import WITHOUT_STATE, AffineParams, scale_and_bias


def layer_norm(
    x: ArrayLike,
    params: AffineParams | None,
    *,
    axis: inputs.Axis = -1,
    params_axis: inputs.Axis | None = None,
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
    x = inputs.as_float_array(x)
    reduced = inputs.resolve_axes(x.ndim, axis)
    feature = reduced if params_axis is None else inputs.resolve_axes(x.ndim, params_axis, "params_axis")
    devices = resolve_devices(axis_name, axis_index_groups)
    return normalize_samples(x, params, SampleNorm(reduced, feature), devices, eps=eps, mask=mask, dtype=dtype)[0]


def rms_norm(
    x: ArrayLike,
    params: AffineParams | None,
    *,
    axis: inputs.Axis = -1,
    params_axis: inputs.Axis | None = None,
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
    x = inputs.as_float_array(x)
    reduced = inputs.resolve_axes(x.ndim, axis)
    feature = reduced if params_axis is None else inputs.resolve_axes(x.ndim, params_axis, "params_axis")
    devices = resolve_devices(axis_name, axis_index_groups)
    norm = SampleNorm(reduced, feature, about_zero=True)
    return normalize_samples(x, params, norm, devices, eps=eps, mask=mask, dtype=dtype)[0]


def group_norm(
    x: ArrayLike,
    params: AffineParams | None,
    num_groups: int,
    *,
    axis: int = -1,
    batch_axis: inputs.Axis = 0,
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
    x = inputs.as_float_array(x)
    feature, reduced = within_examples(x, axis, batch_axis)
    if len(feature) != 1:
        raise ValueError(f"axis: expected the one axis that holds the channels, got {axis}; reshape them into one")
    try:
        num_groups = operator.index(num_groups)
    except TypeError:
        raise TypeError(f"num_groups: expected an integer, got {type(num_groups).__name__}") from None
    devices = resolve_devices(axis_name, axis_index_groups)
    norm = SampleNorm(reduced, feature, num_groups, more_than_one=True)
    return normalize_samples(x, params, norm, devices, eps=eps, mask=mask, dtype=dtype)[0]


@dataclasses.dataclass(frozen=True)
class SampleNorm:
    """How norms within an example differ.

    Attributes:
      reduced: the axes that a statistic is taken over.
      feature: the axes along which scale and bias vary.
      num_groups: the number of groups of channels that share statistics, along the one feature axis; or None.
      more_than_one: whether one value per statistic is an error.
      about_zero: whether the mean is defined as zero.
    """

    reduced: tuple[int, ...]
    feature: tuple[int, ...]
    num_groups: int | None = None
    more_than_one: bool = False
    about_zero: bool = False


def normalize_samples(
    x: jax.Array,
    params: AffineParams | None,
    norm: SampleNorm,
    devices: DeviceGroups | None,
    *,
    eps: float,
    mask: ArrayLike | None,
    dtype: DTypeLike | None,
    adjust: Adjust | None = None,
    only_y: bool = True,
) -> tuple[jax.Array, Moments | None]:
    """Returns y, and the moments, or None with groups of channels.

    With `only_y` the caller does not use the moments.
    """
    others = inputs.other_axes(x.ndim, norm.feature)
    scale, bias = scale_and_bias(params, x, others, WITHOUT_STATE)
    groups = _channel_groups(x, norm)
    if norm.more_than_one:
        _check_values(x, norm.reduced, groups, devices)
    kernel: Callable[..., tuple[jax.Array, Moments | None]] = functools.partial(
        normalize,
        adjust=adjust,
        eps=inputs.check_eps(eps),
        dtype=inputs.check_output_dtype(dtype, x),
        only_y=only_y,
    )
    reduction = Reduction(norm.reduced, devices, groups, norm.about_zero)
    arrays = x, scale, bias, None if mask is None else inputs.expand_mask(mask, x, others)
    if groups is None:
        return kernel(*arrays, reduction=reduction, feature=norm.feature)

    def grouped(*arrays: jax.Array | None) -> tuple[jax.Array]:
        if reduction.axes:
            return (kernel(*arrays, reduction=reduction, feature=norm.feature)[0],)
        # The moments of each channel would be of one value. Cut into groups, the channels are rows.
        axis = groups.axis
        places = (axis, 0, 0, axis)
        cut = (None if v is None else groups.cut(v, place) for v, place in zip(arrays, places, strict=True))
        rows = dataclasses.replace(reduction, axes=(axis + 1,), channel_groups=None)
        return (kernel(*cut, reduction=rows, feature=(axis, axis + 1))[0].reshape(x.shape),)

    (y,) = with_auto_axes(grouped, x, groups.axis, (x.shape, tuple(range(x.ndim))))(*arrays)
    return y, None


def _channel_groups(x: jax.Array, norm: SampleNorm) -> ChannelGroups | None:
    if norm.num_groups is None:
        return None
    (axis,) = norm.feature
    channels = x.shape[axis]
    if norm.num_groups < 1 or channels % norm.num_groups:
        raise ValueError(
            f"num_groups: expected a divisor of the {channels} channels of x with shape {x.shape}, got "
            f"{norm.num_groups}; all groups have the same number of channels"
        )
    return ChannelGroups(axis, norm.num_groups)


def _check_values(
    x: jax.Array, reduced: tuple[int, ...], groups: ChannelGroups | None, devices: DeviceGroups | None
) -> None:
    values = math.prod(inputs.sizes(x, reduced))
    if groups is not None:
        values *= x.shape[groups.axis] // groups.number
    if devices is not None:
        values *= devices.size
    if values == 1:
        raise ValueError(
            f"x: expected more than 1 value to take each statistic over, got shape {x.shape} with 1 value "
            "per statistic, whose normalized value would always be 0; use larger groups or more positions"
        )


def within_examples(
    x: jax.Array, axis: inputs.Axis, batch_axis: inputs.Axis
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the feature axes, and the axes that are neither feature axes nor those of examples."""
    feature = inputs.resolve_axes(x.ndim, axis)
    batch = inputs.resolve_axes(x.ndim, batch_axis, "batch_axis")
    if set(feature) & set(batch):
        raise ValueError(
            f"batch_axis: expected axes other than the feature axes {feature}, got {batch_axis} for x with shape "
            f"{x.shape}; pass the channels as axis=..., and batch_axis=() if x is one example"
        )
    return feature, inputs.other_axes(x.ndim, feature + batch)
