"""Are the formulas those of ONNX? Each operator in float64 NumPy, as specified; channels are on axis 1."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

pytestmark = pytest.mark.slow

TOLERANCE = 8 * float(np.finfo(np.float32).eps)

SHAPES = [(6, 4), (3, 4, 5), (2, 6, 3, 4), (2, 4, 3, 2, 3)]


def batch_normalization(x, scale, b, input_mean, input_var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    """BatchNormalization-15: Y, and in training running_mean and running_var."""
    current_mean, current_var = input_mean, input_var
    if training_mode:
        all_except_channels = (0, *range(2, x.ndim))
        current_mean, current_var = x.mean(all_except_channels), x.var(all_except_channels)
    mean, var, scale, b = (per_channel(v, x.ndim) for v in (current_mean, current_var, scale, b))
    y = (x - mean) / np.sqrt(var + epsilon) * scale + b
    if not training_mode:
        return y
    running_mean = input_mean * momentum + current_mean * (1 - momentum)
    running_var = input_var * momentum + current_var * (1 - momentum)
    return y, running_mean, running_var


def instance_normalization(x, scale, b, *, epsilon=1e-5):
    """InstanceNormalization-22."""
    positions = tuple(range(2, x.ndim))
    mean, variance = x.mean(positions, keepdims=True), x.var(positions, keepdims=True)
    return per_channel(scale, x.ndim) * (x - mean) / np.sqrt(variance + epsilon) + per_channel(b, x.ndim)


def group_normalization(x, scale, bias, *, num_groups, epsilon=1e-5):
    """GroupNormalization-21, the first with scale and bias per channel; before they were per group."""
    groups = x.reshape(x.shape[0], num_groups, -1)
    mean, variance = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
    normalized = ((groups - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    return per_channel(scale, x.ndim) * normalized + per_channel(bias, x.ndim)


def layer_normalization(x, scale, b, *, axis=-1, epsilon=1e-5):
    """LayerNormalization-17: Y, Mean and InvStdDev."""
    normalized_axes = last_axes(x.ndim, axis)
    mean = x.mean(normalized_axes, keepdims=True)
    d = x - mean
    var = (d * d).mean(normalized_axes, keepdims=True)
    inv_std_dev = 1 / np.sqrt(var + epsilon)
    return d * inv_std_dev * scale + b, mean, inv_std_dev


def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5):
    """RMSNormalization-23."""
    normalized_axes = last_axes(x.ndim, axis)
    return x / np.sqrt((x * x).mean(normalized_axes, keepdims=True) + epsilon) * scale


def last_axes(ndim, axis):
    """Returns [axis, ..., rank - 1], counted from the right if `axis` is."""
    return tuple(range(axis, 0 if axis < 0 else ndim))


def per_channel(v, ndim):
    return v.reshape(-1, *(1,) * (ndim - 2))


def draw(shape, params_shape):
    """Returns x, channels with offsets and spreads of their own, and a scale and a bias."""
    rng = np.random.default_rng(len(shape))
    x = rng.standard_normal(shape) * per_channel(rng.uniform(0.1, 2, shape[1]), len(shape))
    x = x + per_channel(rng.uniform(-3, 3, shape[1]), len(shape))
    return tuple(v.astype(np.float32) for v in (x, rng.uniform(0.5, 2, params_shape), rng.normal(0, 1, params_shape)))


def draw_state(channels):
    mean, var = np.random.default_rng(channels).uniform(0.5, 2, (2, channels)).astype(np.float32)
    return jaxbn.BatchNormState(mean, var, jnp.int32(7))


def double(*arrays):
    return [v.astype(np.float64) for v in arrays]


def assert_near(actual, expected):
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def axes_of_channels(shapes):
    return [(shape, axis) for shape in shapes for axis in (1, 1 - len(shape))]


def axes_to_normalize_from(shapes):
    return [(shape, axis) for shape in shapes for axis in range(-len(shape), len(shape))]


@pytest.mark.parametrize(("shape", "axis"), axes_of_channels(SHAPES), ids=str)
def test_batch_normalization_in_inference(shape, axis):
    x, *params = draw(shape, shape[1])
    state = draw_state(shape[1])
    y, _ = jaxbn.batch_norm_eval(x, jaxbn.BatchNormParams(*params), state, axis=axis)
    assert_near(y, batch_normalization(*double(x, *params, *state[:2])))


@pytest.mark.parametrize("momentum", [0.9, 0.25])
@pytest.mark.parametrize(("shape", "axis"), axes_of_channels(SHAPES), ids=str)
def test_batch_normalization_in_training(shape, axis, momentum):
    x, *params = draw(shape, shape[1])
    state = draw_state(shape[1])
    y, new = jaxbn.batch_norm_train(
        x, jaxbn.BatchNormParams(*params), state, axis=axis, momentum=1 - momentum, correction=0
    )
    expected = batch_normalization(*double(x, *params, *state[:2]), momentum=momentum, training_mode=1)
    for actual, value in zip((y, new.mean, new.var), expected, strict=True):
        assert_near(actual, value)


@pytest.mark.parametrize(("shape", "axis"), axes_of_channels(SHAPES[1:]), ids=str)
def test_instance_normalization(shape, axis):
    x, *params = draw(shape, shape[1])
    y, _ = jaxbn.instance_norm_train(x, jaxbn.BatchNormParams(*params), None, axis=axis)
    assert_near(y, instance_normalization(*double(x, *params)))


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize(("shape", "axis"), axes_of_channels(SHAPES), ids=str)
def test_group_normalization(shape, axis, num_groups):
    x, *params = draw(shape, shape[1])
    y = jaxbn.group_norm(x, jaxbn.BatchNormParams(*params), num_groups, axis=axis)
    assert_near(y, group_normalization(*double(x, *params), num_groups=num_groups))


@pytest.mark.parametrize(("shape", "axis"), axes_to_normalize_from(SHAPES), ids=str)
def test_layer_normalization(shape, axis):
    x, *params = draw(shape, shape[axis:])
    y = jaxbn.layer_norm(x, jaxbn.BatchNormParams(*params), axis=last_axes(len(shape), axis))
    expected, mean, inv_std_dev = layer_normalization(*double(x, *params), axis=axis)
    assert_near(y, expected)
    # To moments the axes that are left are the feature axes.
    moments = jaxbn.moments(x, axis=tuple(range(len(shape)))[:axis])
    assert_near(moments.mean, mean.reshape(shape[:axis]))
    assert_near(1 / jnp.sqrt(moments.var + 1e-5), inv_std_dev.reshape(shape[:axis]))


@pytest.mark.parametrize(("shape", "axis"), axes_to_normalize_from(SHAPES), ids=str)
def test_rms_normalization(shape, axis):
    x, scale, _ = draw(shape, shape[axis:])
    y = jaxbn.rms_norm(x, jaxbn.BatchNormParams(scale), axis=last_axes(len(shape), axis))
    assert_near(y, rms_normalization(*double(x, scale), axis=axis))


@pytest.mark.parametrize(("shape", "axis"), axes_of_channels(SHAPES[1:]), ids=str)
def test_scale_per_channel_broadcasts(shape, axis):
    """Scale and B of the last two operators need not vary along all of the normalized axes."""
    x, *params = draw(shape, shape[1])
    params64 = [per_channel(v, len(shape)) for v in double(*params)]
    over = tuple(range(1, len(shape)))
    y = jaxbn.layer_norm(x, jaxbn.BatchNormParams(*params), axis=over, params_axis=axis)
    assert_near(y, layer_normalization(*double(x), *params64, axis=1)[0])
    y = jaxbn.rms_norm(x, jaxbn.BatchNormParams(params[0]), axis=over, params_axis=axis)
    assert_near(y, rms_normalization(*double(x), params64[0], axis=1))
