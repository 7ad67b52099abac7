"""What synchronisation costs: the collectives of the compiled program."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parallel import AXIS, P, mesh

import jaxbn
from jaxbn.linen import BatchNorm

pytestmark = pytest.mark.optimized

C = 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, C)), jnp.float32)
PARAMS, STATE = jaxbn.batch_norm_init(C)


def collectives(function, *arguments):
    """How many of each kind the compiled program has, and the largest number of floats that one hands a device."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    found = re.findall(
        r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text
    )
    largest = 0
    for shapes, _ in found:
        numbers = [int(np.prod([int(n) for n in s.split(",") if n])) for s in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        largest = max(largest, sum(numbers))
    return dict(collections.Counter(kind for _, kind in found)), largest


def mapped(function, in_specs, out_specs, number=8):
    return jax.shard_map(function, mesh=mesh(number), in_specs=in_specs, out_specs=out_specs)


def forward(x, **options):
    return jaxbn.batch_norm_train(x, PARAMS, STATE, **options)


def backward(x, params, **options):
    """The gradient alone: what reverse mode adds to the forward pass."""
    y, pull, new = jax.vjp(lambda x, p: jaxbn.batch_norm_train(x, p, STATE, **options), x, params, has_aux=True)
    return y, new, pull(y)


@pytest.mark.parametrize("number", [2, 4, 8])
@pytest.mark.parametrize(("dtype", "forward_sums"), [(jnp.float32, 2), (jnp.bfloat16, 1)])
def test_training_sends_as_much_on_any_number_of_devices(number, dtype, forward_sums):
    """The pivot's sum, and both about it as one; backward one, which the gradients of scale and bias share."""
    x = X.astype(dtype)
    function = mapped(functools.partial(forward, axis_name=AXIS), P(AXIS), (P(AXIS), P()), number)
    assert collectives(function, x) == ({"all-reduce": forward_sums}, 2 * C)
    specs = (P(AXIS), P()), (P(AXIS), P(), (P(AXIS), P()))
    function = mapped(functools.partial(backward, axis_name=AXIS), *specs, number)
    assert collectives(function, x, PARAMS) == ({"all-reduce": forward_sums + 1}, 2 * C)


def test_a_jitted_step_on_a_sharded_batch():
    x = jax.device_put(X, jax.NamedSharding(mesh(8), P(AXIS)))
    assert collectives(forward, x) == ({"all-reduce": 2}, 2 * C)
    assert collectives(backward, x, PARAMS) == ({"all-reduce": 3}, 2 * C)


def test_evaluation_has_none():
    function = mapped(lambda x: jaxbn.batch_norm_eval(x, PARAMS, STATE)[0], P(AXIS), P(AXIS))
    assert collectives(function, X) == ({}, 0)
    x = jax.device_put(X, jax.NamedSharding(mesh(8), P(AXIS)))
    assert collectives(lambda x: jaxbn.batch_norm_eval(x, PARAMS, STATE)[0], x) == ({}, 0)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_virtual_batches_within_a_device_need_none_but_for_the_state(size):
    def stateless(x, **options):
        return jaxbn.batch_norm_train(x, PARAMS, None, virtual_batch_size=size, **options)[0]

    function = mapped(functools.partial(stateless, axis_name=AXIS), P(AXIS), P(AXIS))
    assert collectives(function, X) == ({}, 0)
    function = mapped(functools.partial(forward, axis_name=AXIS, virtual_batch_size=size), P(AXIS), (P(AXIS), P()))
    assert collectives(function, X) == ({"all-reduce": 1}, 2 * C)


@pytest.mark.parametrize("number", [4, 8])
def test_groups_send_as_much_as_all_devices_do(number):
    groups = [[k, k + 1] for k in range(0, number, 2)]
    norm = functools.partial(jaxbn.batch_norm_train, axis_name=AXIS, axis_index_groups=groups)
    function = mapped(lambda x: norm(x, PARAMS, None)[0], P(AXIS), P(AXIS), number)
    assert collectives(function, X) == ({"all-reduce": 2}, 2 * C)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 3])
def test_a_model_of_layers_has_those_of_its_layers(depth):
    class Model(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x):
            for _ in range(depth):
                x = nn.tanh(BatchNorm(use_running_average=not self.train, axis_name=AXIS)(x))
            return x

    variables = Model(True).init(jax.random.key(0), X)

    def step(x, variables):
        def loss(params):
            y, updates = Model(True).apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(y**2), updates

        return jax.grad(loss, has_aux=True)(variables["params"])

    # The first layer's input has no gradient, and its parameters' gradients are that layer's only sum.
    counts, _ = collectives(mapped(step, (P(AXIS), P()), P()), X, variables)
    assert counts == {"all-reduce": 3 * depth}
    evaluate = mapped(lambda x, v: Model(False).apply(v, x), (P(AXIS), P()), P(AXIS))
    assert collectives(evaluate, X, variables) == ({}, 0)
