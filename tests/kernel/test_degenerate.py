"""Input at the edge: the result is defined, finite where it can be, and never a silent surprise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import grid

import jaxbn

pytestmark = pytest.mark.optimized

PARAMS = jaxbn.BatchNormParams(jnp.array([2.0, 3.0]), jnp.array([0.5, -1.0]))
STATE = jaxbn.BatchNormState(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.int32(5))
X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
ARRAYS = (X, PARAMS, STATE)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@functools.partial(jax.jit, static_argnames=("momenta", "eps", "correction"))
def train_and_pull(x, mask=None, momenta=(0.1,), **options):
    """y, the new state of each momentum, and the gradients of x and of the parameters."""

    def loss(x, params):
        results = [jaxbn.batch_norm_train(x, params, STATE, mask=mask, momentum=m, **options) for m in momenta]
        y = results[0][0]
        return jnp.sum(y**2), (y, [state for _, state in results])

    gradients, (y, states) = jax.grad(loss, (0, 1), has_aux=True)(x, PARAMS)
    return y, states, gradients


def all_finite(tree):
    return all(np.isfinite(v).all() for v in jax.tree.leaves(tree))


@grid("eps", [1e-5, 0.0], quick=lambda eps: eps > 0)
@pytest.mark.parametrize(
    ("x", "mask"),
    [(X[:0], None), (X[:0], jnp.ones((0,), bool)), (X, jnp.zeros((4,), bool)), (X * jnp.nan, jnp.zeros((4, 2), bool))],
    ids=["empty batch", "empty batch, masked", "all masked", "all masked, nan"],
)
def test_no_valid_element_changes_nothing(x, mask, eps):
    y, states, gradients = train_and_pull(x, mask, momenta=(0.1, None), eps=eps)
    assert y.shape == x.shape
    assert all_finite((y, gradients))
    assert_equal(states, [STATE, STATE])


def test_an_empty_spatial_axis_is_an_empty_batch():
    y, state = jaxbn.batch_norm_train(jnp.zeros((3, 0, 2)), PARAMS, STATE)
    assert y.shape == (3, 0, 2)
    assert_equal(state, STATE)


@pytest.mark.parametrize("size", [2, 3])
def test_virtual_batches_without_a_position(size):
    y, state = jaxbn.batch_norm_train(jnp.zeros((4, 0, 2)), PARAMS, STATE, virtual_batch_size=size)
    assert y.shape == (4, 0, 2)
    assert_equal(state, STATE)
    assert jaxbn.batch_norm_train(X[:, :0], None, None, virtual_batch_size=2)[0].shape == (4, 0)


@pytest.mark.parametrize("number", [1, 2])
def test_groups_of_no_channels(number):
    norm = functools.partial(jaxbn.group_norm, params=None, num_groups=number)
    assert norm(jnp.zeros((3, 5, 0))).shape == (3, 5, 0)
    assert jax.grad(lambda x: jnp.sum(norm(x)))(jnp.zeros((3, 5, 0))).shape == (3, 5, 0)


def test_one_valid_value_moves_the_mean_but_not_the_variance():
    mask = jnp.array([[True, True], [False, True], [False, True], [False, True]])
    for correction in (0, 1):
        y, (state,), gradients = jax.device_get(train_and_pull(X, mask, correction=correction))
        assert y[0, 0] == PARAMS.bias[0]
        np.testing.assert_allclose(state.mean[0], 0.9 * 1.0 + 0.1 * X[0, 0], rtol=1e-6)
        assert state.var[0] == STATE.var[0]
        assert state.var[1] != STATE.var[1]
        assert state.num_batches_tracked == 6
        assert all_finite(gradients)


@pytest.mark.parametrize("value", [0.0, 1.1, -3e4, 1e6 + 0.3, 1e15])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
@grid("n", [2, 3, 1000], quick=lambda n: n == 2)
def test_a_constant_channel_gives_the_bias(value, eps, n):
    x = np.full((n, 2), value, np.float32)
    bias = np.broadcast_to(PARAMS.bias, x.shape)
    y, (state,), gradients = train_and_pull(x, momenta=(1.0,), eps=eps)
    assert_equal(y, bias)
    assert_equal(state.mean, x[0])
    assert_equal(state.var, np.zeros(2))
    assert all_finite(gradients)
    y, _ = jaxbn.batch_norm_eval(x, PARAMS, state, eps=eps)
    assert_equal(y, bias)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_moments_that_are_not_finite_show(bad):
    y, state = jaxbn.batch_norm_train(X.at[1, 0].set(bad), PARAMS, STATE)
    clean, clean_state = jaxbn.batch_norm_train(X, PARAMS, STATE)
    assert jnp.isnan(y[:, 0]).all()
    assert not jnp.isfinite(state.mean[0])
    assert jnp.isnan(state.var[0])
    assert_equal(y[:, 1], clean[:, 1])
    assert_equal((state.mean[1], state.var[1]), (clean_state.mean[1], clean_state.var[1]))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_the_bias_of_a_channel_that_is_not_finite_keeps_its_gradient(bad):
    dy = jnp.arange(8.0).reshape(4, 2)

    def loss(bias):
        y, _ = jaxbn.batch_norm_train(X.at[1, 0].set(bad), PARAMS._replace(bias=bias), STATE)
        return jnp.sum(dy * y)

    assert_equal(jax.grad(loss)(PARAMS.bias), dy.sum(0))


def test_eval_normalizes_a_batch_of_one_or_none():
    y, _ = jaxbn.batch_norm_eval(*ARRAYS)
    one, _ = jaxbn.batch_norm_eval(X[:1], PARAMS, STATE)
    assert_equal(one, y[:1])
    assert jaxbn.batch_norm_eval(X[:0], PARAMS, STATE)[0].shape == (0, 2)


def train(**options):
    return lambda: jaxbn.batch_norm_train(*ARRAYS, **options)


def with_arrays(x=X, params=PARAMS, state=STATE, function=jaxbn.batch_norm_train, **options):
    return lambda: function(x, params, state, **options)


ONE_VALUE = (
    "x: expected more than 1 value per channel to take batch statistics over, got shape (1, 2), 1 value for each of 2 "
    "channels, whose normalized value would always be 0; use a larger batch, or normalize by running statistics "
    "(batch_norm_eval; use_running_average=True in a layer)"
)
FEATURES = (
    "expected shape (2,), the size of x with shape (4, 2) along its feature axes (1,), got shape (3,); "
    "pass the axis that holds the channels as axis=... (params_axis=... in layer and RMS norm), or initialize with "
    "that many features"
)
MASK = (
    "mask: expected a shape that broadcasts, rank for rank, to (4,) (x without its feature axes) or to (4, 2) "
    "(all of x), got shape {}; add axes of size 1 where the mask does not vary"
)
AXIS = (
    "axis: expected feature axes in [-2, 1] for x with 2 dimensions, got {}; axis names the axis that holds the "
    "channels, such as -1 for channels last or 1 for channels first"
)
MOMENTUM = (
    "momentum: expected the weight of the new batch, between 0 and 1, got {}; "
    "0.1 is usual, and None averages over all batches"
)
ONE_NUMBER = (
    "expected one number for all channels, got shape {}; several states, each with its own, go through jax.vmap"
)
THREE = jnp.ones(3)
ERRORS = {
    "one value": (with_arrays(X[:1]), ValueError, ONE_VALUE),
    "one value, masked": (with_arrays(X[:1], mask=jnp.ones(1, bool)), ValueError, ONE_VALUE),
    "one value in stateless eval": (
        with_arrays(X[:1], state=None, function=jaxbn.batch_norm_eval),
        ValueError,
        ONE_VALUE,
    ),
    "integer x": (
        with_arrays(jnp.ones((4, 2), jnp.int32)),
        TypeError,
        "x: expected a floating-point array, got int32; convert it, for example with x.astype(jnp.float32)",
    ),
    "boolean x": (
        with_arrays(jnp.ones((4, 2), bool), function=jaxbn.batch_norm_eval),
        TypeError,
        "x: expected a floating-point array, got bool; convert it, for example with x.astype(jnp.float32)",
    ),
    "complex x": (
        with_arrays(jnp.ones((4, 2), jnp.complex64)),
        TypeError,
        "x: expected a floating-point array, got complex64; normalize x.real and x.imag, or take a layer of Flax's "
        "names from jaxbn.linen or jaxbn.nnx, which all take complex x",
    ),
    "list x": (
        with_arrays([[1.0, 2.0], [3.0, 4.0]]),
        TypeError,
        "x: expected an array, got list; convert it with jnp.asarray(x)",
    ),
    "axis too large": (train(axis=2), ValueError, AXIS.format(2)),
    "axis too small": (train(axis=(0, -3)), ValueError, AXIS.format((0, -3))),
    "axis twice": (
        train(axis=(1, -1)),
        ValueError,
        "axis: expected each axis once, got (1, -1) for x with 2 dimensions",
    ),
    "scale": (with_arrays(params=PARAMS._replace(scale=THREE)), ValueError, "params.scale: " + FEATURES),
    "bias": (with_arrays(params=PARAMS._replace(bias=THREE)), ValueError, "params.bias: " + FEATURES),
    "mean": (with_arrays(state=STATE._replace(mean=THREE)), ValueError, "state.mean: " + FEATURES),
    "var in eval": (
        with_arrays(state=STATE._replace(var=THREE), function=jaxbn.batch_norm_eval),
        ValueError,
        "state.var: " + FEATURES,
    ),
    "integer scale": (
        with_arrays(params=PARAMS._replace(scale=jnp.ones(2, jnp.int32))),
        TypeError,
        "params.scale: expected a floating-point array, got int32; use float32",
    ),
    "mask of the wrong size": (train(mask=jnp.ones(3, bool)), ValueError, MASK.format((3,))),
    "mask of the wrong rank": (train(mask=jnp.ones((4, 2, 1), bool)), ValueError, MASK.format((4, 2, 1))),
    "scalar mask": (train(mask=jnp.array(True)), ValueError, MASK.format(())),
    "float mask": (
        train(mask=jnp.ones(4)),
        TypeError,
        "mask: expected a boolean array (True counts), got float32; write mask != 0 or mask.astype(bool)",
    ),
    "momentum above 1": (train(momentum=1.5), ValueError, MOMENTUM.format(1.5)),
    "momentum below 0": (train(momentum=-0.1), ValueError, MOMENTUM.format(-0.1)),
    "momentum nan": (train(momentum=float("nan")), ValueError, MOMENTUM.format("nan")),
    "momentum that is no number": (
        train(momentum="a"),
        TypeError,
        "momentum: expected a number or None, got str; 0.1 is usual, and None averages over all batches",
    ),
    "complex momentum": (
        train(momentum=jnp.complex64(0.1)),
        TypeError,
        "momentum: expected a number or None, got ArrayImpl; 0.1 is usual, and None averages over all batches",
    ),
    "momentum per channel": (train(momentum=jnp.ones(2)), ValueError, "momentum: " + ONE_NUMBER.format((2,))),
    "momentum with axes": (train(momentum=np.ones((3, 1))), ValueError, "momentum: " + ONE_NUMBER.format((3, 1))),
    "count with axes": (
        with_arrays(state=STATE._replace(num_batches_tracked=jnp.zeros((7, 1), jnp.int32))),
        ValueError,
        "state.num_batches_tracked: " + ONE_NUMBER.format((7, 1)),
    ),
    "no count": (
        with_arrays(X[..., None, :], state=STATE._replace(num_batches_tracked=None)),
        TypeError,
        "state.num_batches_tracked: expected an integer, got None; it is 0 before any batch",
    ),
    "a state of lists": (
        with_arrays(state=STATE._replace(mean=[1.0, 2.0]), function=jaxbn.batch_norm_eval),
        TypeError,
        "state.mean: expected an array, got list; convert it with jnp.asarray",
    ),
    "params of lists": (
        with_arrays(params=PARAMS._replace(bias=[1.0, 2.0])),
        TypeError,
        "params.bias: expected an array, got list; convert it with jnp.asarray",
    ),
    "momentum without a state": (with_arrays(state=None, momentum=2), ValueError, MOMENTUM.format(2)),
    "negative eps": (
        train(eps=-1e-5),
        ValueError,
        "eps: expected a finite number of at least 0, got -1e-05; the usual value is 1e-5",
    ),
    "eps that is no number": (
        train(eps="1e-5"),
        TypeError,
        "eps: expected a number fixed when the function is traced (by functools.partial or static_argnames), got str",
    ),
    "traced eps": (
        lambda: jax.jit(lambda eps: train(eps=eps)())(1e-5),
        TypeError,
        "eps: expected a number fixed when the function is traced (by functools.partial or static_argnames), "
        "got DynamicJaxprTracer",
    ),
    "traced axis": (
        lambda: jax.jit(lambda axis: train(axis=axis)())(1),
        TypeError,
        "axis: expected an integer, or several, fixed when the function is traced (by functools.partial or "
        "static_argnames), got DynamicJaxprTracer",
    ),
    "params and state exchanged": (
        with_arrays(params=STATE, state=PARAMS),
        TypeError,
        "params: expected jaxbn.AffineParams or None, got BatchNormState; "
        "the arguments are x, params, state, as jaxbn.batch_norm_init returns them",
    ),
    "a dict as state": (
        with_arrays(state=STATE._asdict(), function=jaxbn.batch_norm_eval),
        TypeError,
        "state: expected jaxbn.BatchNormState or None, got dict; make it of the dict that a checkpoint was restored "
        "to: jaxbn.BatchNormState(**state)",
    ),
    "correction": (
        train(correction=-1),
        ValueError,
        "correction: expected a finite number of at least 0, got -1; "
        "1 stores the unbiased variance (PyTorch), 0 the biased one (Flax)",
    ),
    "output dtype": (
        train(dtype=jnp.int32),
        TypeError,
        "dtype: expected a floating-point dtype for y, got int32; leave it out for that of x",
    ),
    "no channels": (
        lambda: jaxbn.batch_norm_init(0),
        ValueError,
        "num_features: expected at least 1 channel, got 0",
    ),
    "fractional channels": (
        lambda: jaxbn.batch_norm_init(2.0),
        TypeError,
        "num_features: expected an integer or a tuple of integers, got 2.0",
    ),
    "integer params": (
        lambda: jaxbn.batch_norm_init(2, param_dtype=jnp.int32),
        TypeError,
        "param_dtype: expected a floating-point dtype, got int32; use float32",
    ),
    "update with other channels": (
        lambda: jaxbn.batch_norm_update(STATE, jaxbn.moments(jnp.ones((4, 3)))),
        ValueError,
        "moments: expected shape (2,), that of the running mean, got shape (3,); "
        "measure them along the same feature axes",
    ),
    "update of a variance for all": (
        lambda: jaxbn.batch_norm_update(STATE._replace(var=jnp.ones(1)), jaxbn.moments(X)),
        ValueError,
        "state.var: expected shape (2,), that of the running mean, got shape (1,); jaxbn.batch_norm_init returns both "
        "alike",
    ),
    "update of lists": (
        lambda: jaxbn.batch_norm_update(STATE._replace(var=[1.0, 1.0]), jaxbn.moments(X)),
        TypeError,
        "state.var: expected an array, got list; convert it with jnp.asarray",
    ),
    "update of nothing": (
        lambda: jaxbn.batch_norm_update(None, jaxbn.moments(X)),
        TypeError,
        "state: expected jaxbn.BatchNormState, got NoneType; jaxbn.batch_norm_init returns it",
    ),
    "update with a batch": (
        lambda: jaxbn.batch_norm_update(STATE, X),
        TypeError,
        "moments: expected jaxbn.Moments, got ArrayImpl; jaxbn.moments returns them",
    ),
    "update with other variances": (
        lambda: jaxbn.batch_norm_update(STATE, jaxbn.Moments(X[0], THREE, 4)),
        ValueError,
        "moments: expected var of shape (2,), that of mean, or of its leading axes, got shape (3,)",
    ),
    "correction that is no number": (
        train(correction="1"),
        ValueError,
        "correction: expected a finite number of at least 0, got 1; "
        "1 stores the unbiased variance (PyTorch), 0 the biased one (Flax)",
    ),
    "merge with other channels": (
        lambda: jaxbn.moments(X).merge(jaxbn.moments(jnp.ones((4, 3)))),
        ValueError,
        "merge: expected moments of shape (2,), got (3,); only sets with the same channels have a union",
    ),
    "merge with something else": (
        lambda: jaxbn.moments(X).merge(X),
        TypeError,
        "merge: expected jaxbn.Moments, got ArrayImpl",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("jitted", [False, True])
def test_errors_name_what_was_expected_what_came_and_the_cure(name, jitted):
    call, error, message = ERRORS[name]
    with pytest.raises(error) as caught:
        (jax.jit(call) if jitted else call)()
    assert str(caught.value) == message
