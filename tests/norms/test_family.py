"""What every norm owes: values, both kinds of derivative, masks, dtypes, exactness, transformations, little memory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from family import (
    FIRSTS,
    LAST,
    NORMS,
    check_derivatives,
    check_empty_batch,
    check_masks,
    check_values,
    draw,
    every_norm,
    float64,
    norms_that,
    one_of_each,
    params_of,
)
from marks import grid
from near import assert_near

import jaxbn
from jaxbn import BatchNormParams


@grid("name", NORMS, quick=lambda name: name in FIRSTS)
def test_values(name):
    check_values(name)


KINDS = ("full", "without features", "broadcast")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, KINDS[k % 3]) for k, name in enumerate(NORMS)])
def test_masks(name, kind):
    check_masks(name, kind)


# Without a mask those of batch norm are tested in test_gradients, and of all kinds by their layers.
DERIVATIVES = [(name, name in FIRSTS) for name in NORMS]


@grid(
    ("name", "masked"),
    DERIVATIVES,
    quick=lambda case: case[0] in ("batch renorm", "layer", "group"),
)
def test_derivatives(name, masked, x64):
    check_derivatives(name, masked)


@pytest.mark.slow
@one_of_each
def test_float64_is_computed_in_float64(norm, x64):
    x, scale, bias = draw(norm, dtype=np.float64, mean=1e3)
    y = norm(x, params_of(scale, bias))
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, norm.formula(*float64(x, scale, bias)), rtol=0, atol=1e-12)


@pytest.mark.slow
@one_of_each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(norm, dtype):
    x, scale, bias = draw(norm)
    x = x.astype(dtype)
    rounded_and_exact = jax.jit(lambda x, params: (norm(x, params), norm(x, params, dtype=jnp.float32)))
    y, exact = rounded_and_exact(x, params_of(scale, bias))
    assert (y.dtype, exact.dtype) == (dtype, jnp.float32)
    expected = norm.formula(*float64(x, scale, bias))
    unit = float(jnp.finfo(dtype).eps) / 2
    assert (np.abs(float64(y)[0] - expected) <= unit * np.abs(expected) + 1e-5).all()
    assert_near(exact, expected, 8)


@pytest.mark.slow
@one_of_each
def test_vmap_is_each_by_itself(norm):
    drawn = [draw(norm, seed=seed) for seed in range(3)]
    xs, scales, biases = (jnp.stack(v) for v in zip(*drawn, strict=True))

    def gradients(x, scale, bias):
        return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(norm(a[0], params_of(*a[1:])))), (0, 1, 2))(x, scale, bias)

    together = jax.jit(jax.vmap(gradients))(xs, scales, biases)
    alone = jax.jit(gradients)
    each = [alone(*arguments) for arguments in drawn]
    assert_near(together, jax.tree.map(lambda *v: jnp.stack(v), *each), 32)


# The others do not take the mean away, or put some back.
@pytest.mark.slow
@norms_that(lambda name, norm: name in FIRSTS and not (norm.about_zero or norm.renorm))
def test_the_same_values_everywhere_give_the_bias(norm):
    _, scale, bias = draw(norm)
    total = jax.jit(jax.value_and_grad(lambda x: jnp.sum(norm(x, params_of(scale, bias), eps=0.0))))
    for value in (0.0, 1.1, -3e4):
        y, gradients = total(jnp.full(norm.shape, value))
        np.testing.assert_allclose(y, jnp.sum(bias) * math.prod(norm.shape) / bias.size, rtol=1e-5)
        assert jnp.isfinite(gradients).all()


@one_of_each
@grid("eps", [1e-5, 0.0], quick=lambda eps: eps > 0)
def test_where_nothing_counts_y_is_the_bias(norm, eps):
    x, scale, bias = draw(norm)
    mask = np.zeros(norm.shape, bool)

    def loss(x):
        y = norm(x, params_of(scale, bias), mask, eps=eps)
        return jnp.sum(y), y

    value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for hidden in (x, jnp.full_like(x, jnp.nan)):
        (_, y), gradient = value_and_grad(hidden)
        np.testing.assert_array_equal(y, jnp.broadcast_to(jnp.expand_dims(bias, norm.others), x.shape))
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_a_sample_in_which_nothing_counts_harms_no_other(name):
    norm = NORMS[name]
    x, scale, bias = draw(norm)
    mask = np.ones(LAST, bool)
    mask[1] = False
    expected = norm(x, params_of(scale, bias))

    def loss(x):
        y = norm(x, params_of(scale, bias), mask)
        return jnp.sum(jnp.where(mask, jnp.sin(y), 0)), y

    (_, y), gradient = jax.value_and_grad(loss, has_aux=True)(x.at[1].set(jnp.nan))
    assert_near(y[mask.all((1, 2, 3))], expected[mask.all((1, 2, 3))])
    np.testing.assert_array_equal(y[1], jnp.broadcast_to(bias, y[1].shape))
    assert jnp.isfinite(gradient).all()


@every_norm
def test_an_empty_batch(norm):
    check_empty_batch(norm)


MASK = (
    "mask: expected a shape that broadcasts, rank for rank, to {others} (x without its feature axes) or to {shape} "
    "(all of x), got shape {got}; add axes of size 1 where the mask does not vary"
)
ERRORS = {
    "not an array": (lambda n: n([1.0], None), TypeError, "x: expected an array, got list; convert it with"),
    "integers": (lambda n: n(jnp.ones(n.shape, int), None), TypeError, "x: expected a floating-point array, got int32"),
    "no params": (lambda n: n(jnp.ones(n.shape), (1, 2)), TypeError, "params: expected jaxbn.AffineParams or None"),
    "features": (
        lambda n: n(jnp.ones(n.shape), BatchNormParams(jnp.ones(7))),
        ValueError,
        "params.scale: expected shape {feature_shape}, the size of x with shape {shape} along its feature axes "
        "{feature}, got shape (7,); pass the axis that holds the channels as axis=... (params_axis=... in layer "
        "and RMS norm), or initialize with that many",
    ),
    "eps": (
        lambda n: n(jnp.ones(n.shape), None, eps=-1.0),
        ValueError,
        "eps: expected a finite number of at least 0, got -1.0; the usual value is 1e-5",
    ),
    "dtype": (
        lambda n: n(jnp.ones(n.shape), None, dtype=int),
        TypeError,
        "dtype: expected a floating-point dtype for y, got int64; leave it out for that of x",
    ),
    "mask dtype": (
        lambda n: n(jnp.ones(n.shape), None, jnp.ones(n.shape)),
        TypeError,
        "mask: expected a boolean array (True counts), got float32; write mask != 0 or mask.astype(bool)",
    ),
    "mask shape": (lambda n: n(jnp.ones(n.shape), None, jnp.ones((2,) * 9, bool)), ValueError, MASK),
}


@one_of_each
@pytest.mark.parametrize("name", ERRORS)
def test_errors(norm, name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind) as raised:
        call(norm)
    expected = message.format(
        shape=norm.shape,
        others=tuple(norm.shape[a] for a in norm.others),
        feature=norm.feature,
        feature_shape=norm.feature_shape,
        got=(2,) * 9,
    )
    assert expected in str(raised.value)


X = jnp.ones((4, 5, 6))
OWN_ERRORS = {
    "axis": (
        lambda: jaxbn.rms_norm(X, None, axis=(1, 3)),
        "axis: expected feature axes in [-3, 2] for x with 3 dimensions, got (1, 3); axis names the axis that holds "
        "the channels, such as -1 for channels last or 1 for channels first",
    ),
    "params_axis": (
        lambda: jaxbn.layer_norm(X, None, params_axis=3),
        "params_axis: expected feature axes in [-3, 2] for x with 3 dimensions, got 3; params_axis names the axes "
        "along which scale and bias vary, -1 for channels last",
    ),
    "batch_axis": (
        lambda: jaxbn.group_norm(X, None, 2, batch_axis=3),
        "batch_axis: expected axes in [-3, 2] for x with 3 dimensions, got 3; batch_axis names the axes along which "
        "examples lie; () says that x is one example",
    ),
    "batch_axis is axis": (
        lambda: jaxbn.instance_norm_train(X, None, None, axis=0),
        "batch_axis: expected axes other than the feature axes (0,), got 0 for x with shape (4, 5, 6); pass the "
        "channels as axis=..., and batch_axis=() if x is one example",
    ),
    "groups": (
        lambda: jaxbn.group_norm(X, None, 4),
        "num_groups: expected a divisor of the 6 channels of x with shape (4, 5, 6), got 4; all groups have the same "
        "number of channels",
    ),
    "no groups": (
        lambda: jaxbn.group_norm(X, None, 0),
        "num_groups: expected a divisor of the 6 channels of x with shape (4, 5, 6), got 0; all groups have the same "
        "number of channels",
    ),
    "several axes": (
        lambda: jaxbn.group_norm(X, None, 2, axis=(1, 2)),
        "axis: expected the one axis that holds the channels, got (1, 2); reshape them into one",
    ),
    "one value": (
        lambda: jaxbn.group_norm(jnp.ones((4, 6)), None, 6),
        "x: expected more than 1 value to take each statistic over, got shape (4, 6) with 1 value per statistic, whose "
        "normalized value would always be 0; use larger groups or more positions",
    ),
    "one value per instance": (
        lambda: jaxbn.instance_norm_train(jnp.ones((4, 1, 1, 6)), None, None),
        "x: expected more than 1 value to take each statistic over, got shape (4, 1, 1, 6) with 1 value per statistic, "
        "whose normalized value would always be 0; use larger groups or more positions",
    ),
    "r_max": (
        lambda: jaxbn.batch_renorm_train(X, None, jaxbn.batch_norm_init(6)[1], r_max=0.5, d_max=1.0),
        "r_max: expected a limit of at least 1, got 0.5; that is batch norm's",
    ),
    "r_max of numpy": (
        lambda: jaxbn.batch_renorm_train(X, None, jaxbn.batch_norm_init(6)[1], r_max=np.float32(0.5), d_max=1.0),
        "r_max: expected a limit of at least 1, got 0.5; that is batch norm's",
    ),
    "order of limits": (
        lambda: jaxbn.batch_renorm_limits(1, start=5, r_end=4),
        "start, r_end, d_end: expected start before both ends, got 5, 4, 25000; "
        "shorten all of them for shorter training",
    ),
    "groups that are no number": (
        lambda: jaxbn.group_norm(X, None, 2.0),
        "num_groups: expected an integer, got float",
    ),
    "d_max": (
        lambda: jaxbn.batch_renorm_train(X, None, jaxbn.batch_norm_init(6)[1], r_max=1, d_max=-0.5),
        "d_max: expected a limit of at least 0, got -0.5; that is batch norm's",
    ),
    "no state": (
        lambda: jaxbn.batch_renorm_train(X, None, None, r_max=1, d_max=0),
        "state: expected jaxbn.BatchNormState, got None; renormalization is towards the running statistics, which "
        "jaxbn.batch_norm_init returns",
    ),
}


@pytest.mark.parametrize("name", OWN_ERRORS)
def test_errors_of_one_norm(name):
    call, message = OWN_ERRORS[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert str(raised.value) == message


def test_one_value_is_no_error_where_pytorch_makes_none():
    x = jnp.array([[3.0], [4.0]])
    np.testing.assert_array_equal(jaxbn.layer_norm(x, None), 0)
    assert_near(jaxbn.rms_norm(x, None), jnp.ones_like(x), 64)
