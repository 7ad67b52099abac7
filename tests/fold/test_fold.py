"""Folded layers and models compute what they did in evaluation, and say so where they could not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import near
import numpy as np
import pytest
from versions import enable_x64

import jaxbn
from jaxbn.fold import fold_batch_norm

RNG = np.random.default_rng(0)
# Relative to what is expected, however small it is.
assert_near = functools.partial(near.assert_near, least=0)


def norm_of(channels, seed=0, dtype=np.float32):
    """Parameters and statistics that show whatever is left out, or mixed up."""
    rng = np.random.default_rng(seed)
    params = jaxbn.BatchNormParams(rng.normal(1, 0.5, channels).astype(dtype), rng.normal(0, 1, channels).astype(dtype))
    mean, var = rng.normal(0, 2, channels).astype(dtype), rng.uniform(0.1, 4, channels).astype(dtype)
    return params, jaxbn.BatchNormState(mean, var, np.int32(9))


def normalized(x, params, state, eps):
    """Evaluation, in float64 NumPy."""
    scale, bias, mean, var = (np.asarray(v, np.float64) for v in (*params, *state[:2]))
    return (np.asarray(x, np.float64) - mean) / np.sqrt(var + eps) * scale + bias


AFTER = {
    "dense": (nn.Dense(6), (5, 4)),
    "dense of a sequence": (nn.Dense(6), (2, 5, 4)),
    "1d, same": (nn.Conv(6, 3), (2, 9, 4)),
    "1d, causal": (nn.Conv(6, 3, padding="CAUSAL"), (2, 9, 4)),
    "2d, strided": (nn.Conv(6, (3, 3), 2), (2, 6, 6, 4)),
    "2d, dilated": (nn.Conv(6, (3, 3), kernel_dilation=2), (2, 6, 6, 4)),
    "2d, grouped": (nn.Conv(6, (3, 3), feature_group_count=2), (2, 6, 6, 4)),
    "2d, depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), (2, 6, 6, 4)),
    "2d, circular": (nn.Conv(6, (3, 3), padding="CIRCULAR"), (2, 6, 6, 4)),
    "2d, dilated input": (nn.Conv(6, (3, 3), input_dilation=2, padding=1), (2, 6, 6, 4)),
    "3d": (nn.Conv(6, (2, 3, 2)), (1, 4, 4, 4, 4)),
    "transposed": (nn.ConvTranspose(6, (3, 3), (2, 2)), (2, 4, 4, 4)),
    "transposed kernel": (nn.ConvTranspose(6, (3, 3), (2, 2), transpose_kernel=True), (2, 4, 4, 4)),
    "transposed kernel, square": (nn.ConvTranspose(4, (3, 3), transpose_kernel=True), (2, 4, 4, 4)),
}
BEFORE = {
    "dense": (nn.Dense(6), (5, 4), True),
    "1d": (nn.Conv(6, 3, padding="VALID"), (2, 9, 4), False),
    "2d, strided and dilated": (nn.Conv(6, (3, 2), 2, kernel_dilation=2, padding="VALID"), (2, 9, 9, 4), False),
    "2d, grouped": (nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID"), (2, 6, 6, 4), False),
    "2d, depthwise": (nn.Conv(8, (3, 3), feature_group_count=4, padding="VALID"), (2, 6, 6, 4), False),
    "2d, circular": (nn.Conv(6, (3, 3), padding="CIRCULAR"), (2, 6, 6, 4), False),
    "2d, reflected": (nn.Conv(6, (3, 3), padding="REFLECT"), (2, 6, 6, 4), False),
    "2d, same, of size 1": (nn.Conv(6, (1, 1), 2), (2, 6, 6, 4), False),
    "3d": (nn.Conv(6, (2, 3, 2), padding="VALID"), (1, 4, 4, 4, 4), False),
    "transposed kernel of size 1": (nn.ConvTranspose(6, (1, 1), transpose_kernel=True), (2, 4, 4, 4), False),
}
FEW = ["dense", "2d, grouped"]


def layer_and_x(layer, shape, use_bias):
    layer = layer.clone(use_bias=use_bias)
    x = RNG.standard_normal(shape)
    variables = jax.eval_shape(layer.init, jax.random.key(1), jnp.asarray(x, jnp.float32))["params"]
    arrays = [RNG.standard_normal(variables[name].shape).astype(np.float32) for name in sorted(variables, reverse=True)]
    return x, *arrays, *[None] * (not use_bias)


def run(layer, x, kernel, bias):
    params = {"kernel": kernel} if bias is None else {"kernel": kernel, "bias": bias}
    dtype = jnp.float64 if np.asarray(kernel).dtype == np.float64 else jnp.float32
    return jax.jit(layer.clone(use_bias=bias is not None, dtype=dtype).apply)({"params": params}, np.asarray(x, dtype))


def wide(*arrays):
    return (None if v is None else np.asarray(v, np.float64) for v in arrays)


@pytest.mark.parametrize(("name", "use_bias"), [*((name, True) for name in AFTER), *((name, False) for name in FEW)])
def test_after_the_layer(name, use_bias, x64):
    layer, shape = AFTER[name]
    x, kernel, bias = layer_and_x(layer, shape, use_bias)
    params, state = norm_of(layer.features)
    with enable_x64(True):
        expected = normalized(run(layer, x, *wide(kernel, bias)), params, state, 1e-3)
    options = {"transpose_kernel": getattr(layer, "transpose_kernel", False)}
    new_kernel, new_bias = fold_batch_norm(kernel, bias, params, state, eps=1e-3, **options)
    assert (new_kernel.dtype, new_bias.dtype) == (jnp.float32, jnp.float32)
    assert_near(run(layer, x, new_kernel, new_bias), expected, 16)
    # In float64 nothing is left but float64's rounding.
    exact = fold_batch_norm(*wide(kernel, bias), params, state, eps=1e-3, **options)
    assert_near(run(layer, x, *exact), expected, 16, eps=2.0**-52)


@pytest.mark.parametrize(("name", "use_bias"), [*((name, True) for name in BEFORE), *((name, False) for name in FEW)])
def test_before_the_layer(name, use_bias, x64):
    layer, shape, zero_padding = BEFORE[name]
    x, kernel, bias = layer_and_x(layer, shape, use_bias)
    params, state = norm_of(shape[-1])
    expected = run(layer, normalized(x, params, state, 1e-3), *wide(kernel, bias))
    options = {"transpose_kernel": getattr(layer, "transpose_kernel", False)}
    options |= {"feature_group_count": getattr(layer, "feature_group_count", 1), "zero_padding": zero_padding}
    fold = functools.partial(fold_batch_norm, params=params, state=state, eps=1e-3, before=True, **options)
    new_kernel, new_bias = fold(kernel, bias)
    assert (new_kernel.dtype, new_bias.dtype) == (jnp.float32, jnp.float32)
    assert_near(run(layer, x, new_kernel, new_bias), expected, 16)
    assert_near(run(layer, x, *fold(*wide(kernel, bias))), expected, 16, eps=2.0**-52)


@pytest.mark.parametrize("layer", [nn.Conv(6, (3, 3)), nn.ConvTranspose(6, (3, 3), (2, 2))])
def test_before_padding_with_zeros_only_without_a_shift(layer):
    x, kernel, bias = layer_and_x(layer, (2, 6, 6, 4), True)
    params, state = norm_of(4)
    params = params._replace(bias=np.array([0, 1, 0, 1], np.float32))
    state = state._replace(mean=np.zeros(4, np.float32))
    message = (
        "before: expected a shift (bias - mean * factor) of 0 in every channel of a norm before a layer that pads with "
        "zeros, got {}: the padding would have to be shifted too; pass zero_padding=False if the layer sees no "
        "zeros but the norm's, or leave this norm unfolded"
    )
    with pytest.raises(ValueError, match="before: ") as error:
        fold_batch_norm(kernel, bias, params, state, before=True)
    assert str(error.value) == message.format("a shift in 2 of 4 channels (1, 3)")
    with pytest.raises(ValueError, match="before: ") as error:
        jax.jit(functools.partial(fold_batch_norm, before=True))(kernel, bias, None, state)
    assert str(error.value) == message.format("a shift that is traced")

    params = params._replace(bias=None)
    folded = fold_batch_norm(kernel, bias, params, state, before=True)
    y, _ = jaxbn.batch_norm_eval(jnp.asarray(x, jnp.float32), params, state)
    assert_near(run(layer, x, *folded), run(layer, y, kernel, bias), 8)


@pytest.mark.parametrize(("scale", "shift"), [(True, False), (False, True), (False, False), (None, None)])
def test_norms_without_scale_or_bias(scale, shift):
    kernel, bias = RNG.standard_normal((4, 6)).astype(np.float32), RNG.standard_normal(6).astype(np.float32)
    full, state = norm_of(6)
    params = (
        None
        if scale is None
        else jaxbn.BatchNormParams(*(v if u else None for u, v in zip((scale, shift), full, strict=True)))
    )
    used = jaxbn.BatchNormParams(full.scale if scale else np.ones(6), full.bias if shift else np.zeros(6))
    new_kernel, new_bias = fold_batch_norm(kernel, bias, params, state)
    x = RNG.standard_normal((5, 4))
    assert_near(x @ np.asarray(new_kernel) + np.asarray(new_bias), normalized(x @ kernel + bias, used, state, 1e-5), 4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype):
    kernel = jnp.asarray(RNG.standard_normal((4, 6)), dtype)
    bias = jnp.asarray(RNG.standard_normal(6), jnp.float32)
    params, state = norm_of(6)
    # Statistics far from zero would lose all digits in half precision.
    state = state._replace(mean=state.mean + 1000)
    new_kernel, new_bias = fold_batch_norm(
        kernel, bias + 1000, jax.tree.map(lambda v: jnp.asarray(v, dtype), params), state
    )
    assert (new_kernel.dtype, new_bias.dtype) == (dtype, jnp.float32)
    scale, shift = (np.asarray(jnp.asarray(v, dtype)).astype(np.float64) for v in params)
    factor = scale / np.sqrt(np.asarray(state.var, np.float64) + 1e-5)
    half = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(
        np.asarray(new_kernel).astype(np.float64), np.asarray(kernel).astype(np.float64) * factor, rtol=1.01 * half
    )
    expected = (np.asarray(bias + 1000, np.float64) - np.asarray(state.mean, np.float64)) * factor + shift
    np.testing.assert_allclose(new_bias, expected, rtol=1e-5, atol=1e-5)


def test_traces_and_differentiates():
    kernel, bias = jnp.ones((4, 6)), jnp.ones(6)
    params, state = jax.tree.map(jnp.asarray, norm_of(6))
    eager, jitted = fold_batch_norm(kernel, bias, params, state), jax.jit(fold_batch_norm)(kernel, bias, params, state)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), eager, jitted)
    # What depends on values is no error there.
    broken = jax.jit(functools.partial(fold_batch_norm, eps=0.0))(
        kernel, bias, params, state._replace(var=jnp.zeros(6))
    )
    assert not np.isfinite(broken[0]).any()
    gradient = jax.grad(lambda scale: fold_batch_norm(kernel, bias, params._replace(scale=scale), state)[0].sum())
    np.testing.assert_allclose(gradient(params.scale), 4 / np.sqrt(state.var + 1e-5), rtol=1e-6)


KERNEL = np.ones((3, 3, 2, 4), np.float32)
PARAMS, STATE = norm_of(4)
ERRORS = {
    "kernel of integers": (
        lambda: fold_batch_norm(KERNEL.astype(np.int8), np.ones(4, np.int32), PARAMS, STATE),
        TypeError,
        "expected floating-point arrays, got kernel: int8, bias: int32; fold before quantization",
    ),
    "no state": (
        lambda: fold_batch_norm(KERNEL, None, PARAMS, None),
        TypeError,
        "state: expected jaxbn.BatchNormState, got NoneType; a norm without running statistics depends on the "
        "batch, and cannot be folded",
    ),
    "swapped": (
        lambda: fold_batch_norm(KERNEL, None, STATE, STATE),
        TypeError,
        "params: expected jaxbn.AffineParams or None, got BatchNormState; the arguments are kernel, bias, params, "
        "state, the last two as jaxbn.batch_norm_init returns them",
    ),
    "shapes": (
        lambda: fold_batch_norm(KERNEL, np.ones(2, np.float32), *norm_of(2)),
        ValueError,
        "bias: expected shape (4,), got (2,); params.scale: expected shape (4,), got (2,); params.bias: expected shape "
        "(4,), got (2,); state.mean: expected shape (4,), got (2,); state.var: expected shape (4,), got (2,); a kernel "
        "of shape (3, 3, 2, 4) has 4 output channels beside the norm",
    ),
    "shapes before": (
        lambda: fold_batch_norm(KERNEL, None, None, STATE._replace(mean=STATE.mean[:2]), before=True),
        ValueError,
        "state.var: expected shape (2,), got (4,); a kernel of shape (3, 3, 2, 4) has 2 input channels beside the norm",
    ),
    "rank": (
        lambda: fold_batch_norm(KERNEL[0, 0, 0], None, PARAMS, STATE),
        ValueError,
        "kernel: expected [in, out] or [*spatial, in / groups, out], got shape (4,)",
    ),
    "groups": (
        lambda: fold_batch_norm(KERNEL, None, PARAMS, STATE, before=True, feature_group_count=3),
        ValueError,
        "feature_group_count: expected a divisor of the 4 output channels, got 3",
    ),
    "no variance": (
        lambda: fold_batch_norm(
            KERNEL,
            None,
            None,
            STATE._replace(mean=np.array([0, 1, np.nan, 3], np.float32), var=np.array([1, 0, 1, 1.0])),
            eps=0.0,
        ),
        ValueError,
        "state, params: expected finite values and var + eps above 0 in every channel, got mean 1.0, nan and var "
        "0.0, 1.0 with eps 0.0 in 2 of 4 channels (1, 2); what evaluation computes there is not finite either",
    ),
    "half precision": (
        lambda: fold_batch_norm(
            KERNEL.astype(np.float16), None, None, STATE._replace(var=np.array([1, 1e-12, 1, 1], np.float32)), eps=0.0
        ),
        ValueError,
        "kernel: expected values that float16 can hold, got larger ones in 1 of 4 channels (1) along axis -1; "
        "fold before converting to float16",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == message


def test_as_torch():
    torch = pytest.importorskip("torch")
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    kernel, bias = RNG.standard_normal((3, 3, 2, 4)).astype(np.float32), RNG.standard_normal(4).astype(np.float32)
    t = functools.partial(torch.tensor)
    expected = fuse_conv_bn_weights(
        t(kernel.transpose(3, 2, 0, 1)), t(bias), t(STATE.mean), t(STATE.var), 1e-5, t(PARAMS.scale), t(PARAMS.bias)
    )
    new_kernel, new_bias = fold_batch_norm(kernel, bias, PARAMS, STATE)
    np.testing.assert_allclose(new_kernel, expected[0].detach().numpy().transpose(2, 3, 1, 0), rtol=1e-6)
    np.testing.assert_allclose(new_bias, expected[1].detach().numpy(), rtol=1e-5, atol=1e-6)
