"""Folds a batch norm in evaluation into the kernel and bias of the layer before or after it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._messages import few, in_channels
from jaxbn._norms.arguments import check_eps, check_params, cure_of_restored
from jaxbn._norms.state import AffineParams, BatchNormState


def fold_batch_norm(
    kernel: jax.Array,
    bias: jax.Array | None,
    params: AffineParams | None,
    state: BatchNormState,
    *,
    eps: float = 1e-5,
    before: bool = False,
    zero_padding: bool = True,
    transpose_kernel: bool = False,
    feature_group_count: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Returns kernel and bias of a layer that computes in evaluation what it computed together with its batch norm.

    Formula: with `factor = scale / sqrt(var + eps)` and `shift = norm_bias - mean * factor`,
    norm after the layer: `kernel * factor` per output channel, `bias * factor + shift`;
    norm before the layer: `kernel * factor` per input channel, `bias + sum(kernel * shift)` over all
    axes but the output channels. Strides and dilation make no difference, and neither do groups, padding or
    a mask of the kernel if the norm is after the layer. If it is before a layer with a mask, multiply the
    kernel by the mask first.

    Args:
      kernel: floating point, in Flax's layout: dense [in, out]; convolution [*spatial, in / groups, out];
        transposed convolution the same, or [*spatial, out, in] with `transpose_kernel`.
      bias: the layer's, shape [out], or None.
      params: the norm's, `scale` and `bias` of shape [C], either or all None; C is out, or in for a
        norm before the layer.
      state: the norm's, `mean` and `var` of shape [C].
      eps: the norm's; the layers call it `epsilon`.
      before: the norm is before the layer, and the layer is the only user of its output.
      zero_padding: whether the layer sees zeros that are not outputs of the norm; the norm then cannot be
        folded unless its shift is 0. Read only with `before` and a kernel with spatial axes. It is True for
        padding `'SAME'` (except with kernels of size 1), `'CAUSAL'` or numbers, for input dilation, and for
        transposed convolutions. Pass False for `'VALID'`, `'CIRCULAR'` and `'REFLECT'`.
      transpose_kernel: as in Flax's `ConvTranspose`.
      feature_group_count: as in Flax's `Conv`; used only with `before`.

    Returns:
      Kernel and bias in the dtypes of the arguments; if `bias` is None, the new bias has the kernel's dtype.
      They are computed in float32, or in float64 if any argument has that dtype.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: shapes disagree; the norm is before a layer that sees other zeros, and its shift is not 0
        or, under `jax.jit`, not known; or, outside of `jax.jit`, the result of a channel is not finite, because
        its statistics are not, its variance and `eps` are 0, or the kernel's dtype cannot hold it.

    Source: Jacob et al. (2018), arXiv:1712.05877, section 3.2; torch.nn.utils.fusion.fuse_conv_bn_weights.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> params, state = jaxbn.batch_norm_init(2)
      >>> state = state._replace(mean=jnp.array([1.0, 2.0]), var=jnp.array([4.0, 0.25]))
      >>> kernel, bias = jaxbn.fold_batch_norm(jnp.eye(2), None, params, state, eps=0.0)
      >>> kernel.tolist(), bias.tolist()
      ([[0.5, 0.0], [0.0, 2.0]], [-0.5, -4.0])
    """
    cure = "pass zero_padding=False if the layer sees no zeros but the norm's, or leave this norm unfolded"
    return fold_arrays(
        kernel, bias, params, state, eps, before, zero_padding, transpose_kernel, feature_group_count, cure
    )


def fold_arrays(
    kernel: jax.Array,
    bias: jax.Array | None,
    params: AffineParams | None,
    state: BatchNormState,
    eps: float,
    before: bool,
    zero_padding: bool,
    transpose_kernel: bool,
    feature_group_count: int,
    padding_cure: str,
) -> tuple[jax.Array, jax.Array]:
    """Implements `fold_batch_norm`; the error about a shift before zero padding ends in `padding_cure`."""
    if not isinstance(state, BatchNormState):
        cure = "a norm without running statistics depends on the batch, and cannot be folded"
        cure = cure_of_restored("state", state, BatchNormState) or cure
        raise TypeError(f"state: expected jaxbn.BatchNormState, got {type(state).__name__}; {cure}")
    check_params(
        params, "the arguments are kernel, bias, params, state, the last two as jaxbn.batch_norm_init returns them"
    )
    eps = check_eps(eps)
    kernel, bias, params, state = jax.tree.map(jnp.asarray, (kernel, bias, params, state))
    _check_shapes(kernel, bias, params, state, before, transpose_kernel, feature_group_count)
    out_axis, in_axis = (-2, -1) if transpose_kernel else (-1, -2)
    new_kernel, new_bias, (factor, shift), (overflow_kernel, overflow_bias) = _folded(
        kernel, bias, params or AffineParams(), state.mean, state.var, eps, out_axis, feature_group_count, before
    )
    _check_statistics(factor, shift, state, eps)
    if before and zero_padding and kernel.ndim > 2:
        _check_no_shift(shift, padding_cure)
    _check_cast("kernel", new_kernel.dtype, overflow_kernel, in_axis if before else out_axis)
    _check_cast("bias", new_bias.dtype, overflow_bias, -1)
    return new_kernel, new_bias


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8), inline=True)
def _folded(
    kernel: jax.Array,
    bias: jax.Array | None,
    params: AffineParams,
    mean: jax.Array,
    var: jax.Array,
    eps: float,
    out_axis: int,
    groups: int,
    before: bool,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns new kernel and bias; factor and shift; the channels in which the dtypes of kernel and bias overflow."""
    given = (kernel, bias, *params, mean, var)
    wide = jnp.float64 if any(v is not None and v.dtype == jnp.float64 for v in given) else jnp.float32
    wide_kernel, mean, var = (v.astype(wide) for v in (kernel, mean, var))
    scale, offset = (None if v is None else v.astype(wide) for v in params)
    scale = jnp.ones_like(mean) if scale is None else scale
    offset = jnp.zeros_like(mean) if offset is None else offset
    factor = scale / jnp.sqrt(var + eps)
    shift = offset - mean * factor
    outputs = kernel.shape[out_axis]
    old_bias = jnp.zeros(outputs, wide) if bias is None else bias.astype(wide)

    def per_weight(v: jax.Array) -> jax.Array:
        """Gives [C] the rank of the kernel, to broadcast along its other axes."""
        # After a norm, each output channel of the layer sees the input channels of its group: [out, in / groups].
        v = jnp.repeat(v.reshape(groups, -1), outputs // groups, 0) if before else v[:, None]
        return jnp.expand_dims(v if out_axis == -2 else v.T, tuple(range(kernel.ndim - 2)))

    new_kernel = wide_kernel * per_weight(factor)
    if before:
        new_bias = old_bias + _sum_except(wide_kernel * per_weight(shift), out_axis)
        kept_axis = -3 - out_axis
    else:
        # `bias * factor + shift` loses digits if bias and mean are large and close to each other.
        new_bias = (old_bias - mean) * factor + offset
        kept_axis = out_axis
    cast_kernel, cast_bias = new_kernel.astype(kernel.dtype), new_bias.astype((kernel if bias is None else bias).dtype)
    overflow_kernel, overflow_bias = (
        jnp.isfinite(value) & ~jnp.isfinite(cast) for value, cast in ((new_kernel, cast_kernel), (new_bias, cast_bias))
    )
    return cast_kernel, cast_bias, (factor, shift), (_sum_except(overflow_kernel, kept_axis), overflow_bias)


def _sum_except(v: jax.Array, axis: int) -> jax.Array:
    """Returns the sum over all axes except one."""
    return jnp.sum(v, tuple(a for a in range(-v.ndim, 0) if a != axis))


def _check_shapes(
    kernel: jax.Array,
    bias: jax.Array | None,
    params: AffineParams | None,
    state: BatchNormState,
    before: bool,
    transpose_kernel: bool,
    groups: int,
) -> None:
    """Raises one error that lists all wrong dtypes, or all wrong shapes."""
    if kernel.ndim < 2:
        raise ValueError(f"kernel: expected [in, out] or [*spatial, in / groups, out], got shape {kernel.shape}")
    in_size, outputs = kernel.shape[-2:] if not transpose_kernel else kernel.shape[:-3:-1]
    if groups < 1 or outputs % groups:
        raise ValueError(f"feature_group_count: expected a divisor of the {outputs} output channels, got {groups}")
    channels = in_size * groups if before else outputs
    arrays = {"kernel": kernel, "bias": bias, "params.scale": params and params.scale}
    arrays |= {"params.bias": params and params.bias, "state.mean": state.mean, "state.var": state.var}
    present = {name: v for name, v in arrays.items() if v is not None}
    wrong = [f"{name}: {v.dtype}" for name, v in present.items() if not jnp.issubdtype(v.dtype, jnp.floating)]
    if wrong:
        raise TypeError(f"expected floating-point arrays, got {', '.join(wrong)}; fold before quantization")
    del present["kernel"]
    wanted = {name: (outputs if name == "bias" else channels,) for name in present}
    wrong = [
        f"{name}: expected shape {wanted[name]}, got {v.shape}"
        for name, v in present.items()
        if v.shape != wanted[name]
    ]
    if wrong:
        raise ValueError(
            f"{'; '.join(wrong)}; a kernel of shape {kernel.shape} "
            f"has {channels} {'input' if before else 'output'} channels beside the norm"
        )


def _check_statistics(factor: jax.Array, shift: jax.Array, state: BatchNormState, eps: float) -> None:
    if isinstance(shift, jax.core.Tracer):
        return
    bad = np.flatnonzero(~(np.isfinite(factor) & np.isfinite(shift)))
    if bad.size:
        mean, var = (few(np.asarray(v).astype(np.float64)[bad]) for v in state[:2])
        raise ValueError(
            f"state, params: expected finite values and var + eps above 0 in every channel, got mean {mean} and var "
            f"{var} with eps {eps} {in_channels(bad, shift.size)}; what evaluation computes there is not finite either"
        )


def _check_no_shift(shift: jax.Array, cure: str) -> None:
    known = not isinstance(shift, jax.core.Tracer)
    if known and not np.any(shift):
        return
    got = f"a shift {in_channels(np.flatnonzero(shift), shift.size)}" if known else "a shift that is traced"
    raise ValueError(
        f"before: expected a shift (bias - mean * factor) of 0 in every channel of a norm before a layer that pads "
        f"with zeros, got {got}: the padding would have to be shifted too; {cure}"
    )


def _check_cast(name: str, dtype: np.dtype, overflow: jax.Array, axis: int) -> None:
    if not isinstance(overflow, jax.core.Tracer) and np.any(overflow):
        where = in_channels(np.flatnonzero(overflow), overflow.size)
        raise ValueError(
            f"{name}: expected values that {dtype} can hold, got larger ones {where} along axis {axis}; "
            f"fold before converting to {dtype}"
        )
