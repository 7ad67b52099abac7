"""Every norm of the library as one function of x, params and a mask, the formula that it stands for, and checks."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from near import assert_near

import jaxbn
from jaxbn import BatchNormParams, BatchNormState

EPS = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """A norm of x with `shape`: statistics over `reduced`, scale and bias along `feature`."""

    call: Callable[..., Any]
    shape: tuple[int, ...]
    reduced: tuple[int, ...]
    feature: tuple[int, ...]
    num_groups: int | None = None
    about_zero: bool = False
    # Running mean and variance, r_max and d_max of batch renormalization.
    renorm: tuple[np.ndarray, np.ndarray, float, float] | None = None

    def __call__(self, x, params, mask=None, **options):
        """y."""
        result = self.call(x, params, mask=mask, **options)
        return result[0] if isinstance(result, tuple) else result

    @property
    def feature_shape(self):
        return tuple(self.shape[a] for a in self.feature)

    @property
    def others(self):
        return tuple(a for a in range(len(self.shape)) if a not in self.feature)

    def formula(self, x, scale=None, bias=None, mask=None, eps=EPS, xp=np):
        """The same from the definition, for NumPy or JAX arrays of any shape; scale and bias as in params."""
        reduced, shape = self.reduced, x.shape
        mask = xp.ones(shape, bool) if mask is None else xp.broadcast_to(mask, shape)
        if self.num_groups:
            (channels,) = self.feature
            cut = (*shape[:channels], self.num_groups, -1, *shape[channels + 1 :])
            x, mask = x.reshape(cut), mask.reshape(cut)
            reduced = tuple(a + (a >= channels) for a in reduced)
        sum_over = functools.partial(xp.sum, axis=reduced, keepdims=True)
        count = xp.maximum(sum_over(mask), 1).astype(x.dtype)
        mean = 0 if self.about_zero else sum_over(xp.where(mask, x, 0)) / count
        std = xp.sqrt(sum_over(xp.where(mask, x - mean, 0) ** 2) / count + eps)
        y = (x - mean) / std
        expand = functools.partial(xp.expand_dims, axis=self.others)
        if self.renorm:
            (running_mean, running_var), (r_max, d_max) = map(expand, self.renorm[:2]), self.renorm[2:]
            fixed = jax.lax.stop_gradient if xp is jnp else (lambda v: v)
            running_std = xp.sqrt(running_var + eps)
            r = xp.clip(fixed(std) / running_std, 1 / r_max, r_max)
            y = y * r + xp.clip(fixed(mean - running_mean) / running_std, -d_max, d_max)
        y = y.reshape(shape)
        y = y if scale is None else y * expand(scale)
        return y if bias is None else y + expand(bias)


def batch(function, **options):
    return lambda x, params, **more: function(x, params, None, **options, **more)


# Numbers that float32 has.
RUNNING = np.arange(-2, 4) / 2, np.arange(1, 7) / 4


def renorm(x, params, **options):
    state = BatchNormState(*(jnp.asarray(v, jnp.float32) for v in RUNNING), jnp.int32(9))
    return jaxbn.batch_renorm_train(x, params, state, r_max=1.5, d_max=0.7, **options)


def layer(**options):
    return functools.partial(jaxbn.layer_norm, **options)


def rms(**options):
    return functools.partial(jaxbn.rms_norm, **options)


def group(num_groups, **options):
    return lambda x, params, **more: jaxbn.group_norm(x, params, num_groups, **options, **more)


LAST, FIRST = (4, 5, 3, 6), (4, 6, 5, 3)
NORMS = {
    "batch": Norm(batch(jaxbn.batch_norm_train), LAST, (0, 1, 2), (3,)),
    "batch renorm": Norm(renorm, LAST, (0, 1, 2), (3,), renorm=(*RUNNING, 1.5, 0.7)),
    "layer": Norm(layer(), LAST, (3,), (3,)),
    "layer of several axes": Norm(layer(axis=(-3, -2, -1)), LAST, (1, 2, 3), (1, 2, 3)),
    "layer, first axis": Norm(layer(axis=0), LAST, (0,), (0,)),
    "layer, params per channel": Norm(layer(axis=(1, 2, 3), params_axis=-1), LAST, (1, 2, 3), (3,)),
    "rms": Norm(rms(), LAST, (3,), (3,), about_zero=True),
    "rms of several axes": Norm(rms(axis=(1, 3)), LAST, (1, 3), (1, 3), about_zero=True),
    "group": Norm(group(3), LAST, (1, 2, 3), (3,), num_groups=3),
    "group, one": Norm(group(1), LAST, (1, 2, 3), (3,), num_groups=1),
    "group, each channel": Norm(group(6), LAST, (1, 2, 3), (3,), num_groups=6),
    "group, channels first": Norm(group(2, axis=1), FIRST, (1, 2, 3), (1,), num_groups=2),
    "group, frames": Norm(group(3, batch_axis=(0, 1)), LAST, (2, 3), (3,), num_groups=3),
    "group, one example": Norm(group(2, axis=0, batch_axis=()), (6, 4, 5), (0, 1, 2), (0,), num_groups=2),
    "instance": Norm(batch(jaxbn.instance_norm_train), LAST, (1, 2), (3,)),
    "instance, channels first": Norm(batch(jaxbn.instance_norm_train, axis=1), FIRST, (2, 3), (1,)),
    "instance, examples last": Norm(batch(jaxbn.instance_norm_eval, axis=1, batch_axis=-1), FIRST, (0, 2), (1,)),
}


def draw(norm, *, mean=0.5, seed=0, shape=None, dtype=np.float32):
    """x, with an offset and a spread of its own for each statistic, and scale and bias."""
    rng = np.random.default_rng(seed)
    shape = shape or norm.shape
    sizes = [1 if a in norm.reduced and a not in norm.feature else n for a, n in enumerate(shape)]
    x = mean + rng.normal(0, 1, sizes) + rng.uniform(0.5, 2, sizes) * rng.standard_normal(shape)
    feature_shape = tuple(shape[a] for a in norm.feature)
    return jnp.asarray(x, dtype), *(jnp.asarray(v, dtype) for v in rng.normal(1, 0.5, (2, *feature_shape)))


def masks(norm, seed=0):
    """Masks of the rank of x, and of x without its features, with what they are at full rank."""
    rng = np.random.default_rng(seed)
    full = rng.random(norm.shape) < 0.6
    without = rng.random([norm.shape[a] for a in norm.others]) < 0.6
    shared = rng.random([1, *norm.shape[1:]]) < 0.7
    return {
        "full": (full, full),
        "without features": (without, np.expand_dims(without, norm.feature)),
        "broadcast": (shared, shared),
    }


def params_of(scale=None, bias=None):
    return BatchNormParams(scale, bias)


def statistic_size(norm):
    """How many statistics there are; those of groups are kept for each of their channels."""
    kept = math.prod(n for a, n in enumerate(norm.shape) if a not in norm.reduced)
    return kept * (norm.shape[norm.feature[0]] if norm.num_groups else 1)


# The first of each kind; the others differ in their axes alone.
FIRSTS = ("batch", "batch renorm", "layer", "layer, params per channel", "rms", "group", "instance")


def norms_that(property_of):
    chosen = {name: norm for name, norm in NORMS.items() if property_of(name, norm)}
    return pytest.mark.parametrize("norm", chosen.values(), ids=chosen)


every_norm = norms_that(lambda name, norm: True)
one_of_each = norms_that(lambda name, norm: name in FIRSTS)


def float64(*arrays):
    return [None if v is None else np.asarray(v).astype(np.float64) for v in arrays]


def check_values(name):
    norm = NORMS[name]
    x, scale, bias = draw(norm)
    given = [(scale, bias), (scale, None), (None, bias), (None, None)]

    @jax.jit
    def all_values(x, given):
        values = [norm(x, params_of(*arrays)) for arrays in given]
        return values, norm(x, None), [norm(x, params_of(*given[0]), eps=eps) for eps in (0.0, 0.1)]

    values, without, of_eps = all_values(x, given)
    for y, arrays in zip([*values, without], [*given, (None, None)], strict=True):
        assert (y.shape, y.dtype) == (x.shape, x.dtype)
        assert_near(y, norm.formula(*float64(x, *arrays)))
    for y, eps in zip(of_eps, (0.0, 0.1), strict=True):
        assert_near(y, norm.formula(*float64(x, scale, bias), eps=eps), 8)


def check_masks(name, kind):
    norm = NORMS[name]
    x, scale, bias = draw(norm)
    mask, full = masks(norm)[kind]
    valid = np.broadcast_to(full, x.shape)
    expected = norm.formula(*float64(x, scale, bias), full)
    weight = np.where(valid, np.random.default_rng(3).standard_normal(x.shape), 0).astype(np.float32)

    def loss(x, params):
        y = norm(x, params, mask)
        return jnp.sum(jnp.where(valid, weight * y, 0)), y

    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    _, clean = value_and_grad(jnp.where(valid, x, 0), params_of(scale, bias))
    for hidden in (np.nan, np.inf, 1e18):
        (_, y), gradients = value_and_grad(jnp.where(valid, x, hidden), params_of(scale, bias))
        assert_near(np.where(valid, y, 0), np.where(valid, expected, 0), 8)
        assert_near(gradients, clean)


def check_derivatives(name, masked):
    """Of both kinds, beside those of the formula in float64, which must be enabled."""
    norm = NORMS[name]
    arguments = draw(norm)
    tangents = draw(norm, seed=1)
    mask = masks(norm)["full"][0] if masked else np.ones(norm.shape, bool)
    weight = np.where(mask, np.random.default_rng(2).standard_normal(norm.shape), 0)

    def derivatives(function, arguments, tangents):
        def loss(*a):
            return jnp.sum(weight.astype(a[0].dtype) * jnp.sin(function(*a)))

        gradients = jax.grad(loss, (0, 1, 2))
        _, forward = jax.jvp(function, arguments, tangents)
        if name not in FIRSTS:
            return jnp.where(mask, forward, 0), gradients(*arguments)
        reverse, forward_over_reverse = jax.jvp(gradients, arguments, tangents)
        return jnp.where(mask, forward, 0), reverse, forward_over_reverse

    given = mask if masked else None
    ours = jax.jit(functools.partial(derivatives, lambda x, *a: norm(x, params_of(*a), given)))(arguments, tangents)
    formula = functools.partial(derivatives, lambda *a: norm.formula(*a, mask, xp=jnp))
    # In float64 the quickest way to compile is exact enough.
    expected = jax.jit(formula, compiler_options={"xla_backend_optimization_level": 0})(
        *([jnp.asarray(v) for v in float64(*values)] for values in (arguments, tangents)),
    )
    assert jax.tree.leaves(ours)[0].dtype == jnp.float32
    assert_near(ours, expected, 256)


def check_empty_batch(norm):
    shape = tuple(n if a in norm.feature or a == 1 else 0 for a, n in enumerate(norm.shape))
    _, scale, bias = draw(norm)
    assert norm(jnp.zeros(shape), params_of(scale, bias)).shape == shape
