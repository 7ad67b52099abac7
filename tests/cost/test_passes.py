"""What training keeps for the way back, and how often it sums all of x."""

import math

import jax
import jax.numpy as jnp
import pytest
from costs import saved, sums
from family import NORMS, draw, every_norm, masks, params_of, statistic_size
from marks import grid

import jaxbn


@every_norm
@grid(("dtype", "masked"), [(jnp.float32, True), (jnp.bfloat16, False)], quick=lambda case: case[1])
def test_reverse_mode_keeps_x_the_parameters_and_the_statistics(norm, dtype, masked):
    x, scale, bias = draw(norm)
    mask = masks(norm)["full"][0] if masked else None
    kept = saved(lambda x, params: norm(x, params, mask), x.astype(dtype), params_of(scale, bias))
    large = [name for name, shape in kept if math.prod(shape) == x.size and name != "bool"]
    # Parameters in the sizes of all of x are as large as it is.
    assert large == ["bf16" if dtype == jnp.bfloat16 else "f32"]
    small = sum(math.prod(shape) for name, shape in kept if name != "bool") - x.size
    # Mean in two parts, reciprocal standard deviation, and under a mask the count; that times scale, unless scale is
    # for each value; and what renormalization makes of running statistics, which is as small as scale.
    factor = math.prod(n for a, n in enumerate(norm.shape) if a not in norm.reduced or a in norm.feature)
    assert small <= (4 if masked else 3) * statistic_size(norm) + min(factor, x.size // 2) + 3 * scale.size


# Of all of x, forward and backward: mean, its remainder and variance (RMS: the mean square); dscale and dbias,
# and the gradients of mean and variance wherever the same sums do not serve for both.
SUMS = {"batch": 5, "batch renorm": 5, "layer": 7, "layer, params per channel": 5, "rms": 4, "group": 5, "instance": 5}


@pytest.mark.parametrize("name", SUMS)
def test_no_sum_of_all_of_x_is_made_twice(name):
    norm = NORMS[name]
    arguments = draw(norm)

    def forward_and_backward(x, scale, bias, dy):
        y, pull = jax.vjp(lambda *a: norm(a[0], params_of(*a[1:])), x, scale, bias)
        return y, pull(dy)

    assert sums(forward_and_backward, *arguments, arguments[0]) == SUMS[name]


def test_beside_training_on_the_same_x_they_cost_nothing():
    def train(x):
        return jaxbn.batch_norm_train(x, None, None)[0]

    x = jnp.ones((8, 7, 6, 5))
    assert sums(train, x) == sums(lambda x: (train(x), jaxbn.moments(x)), x) == 3
