"""Statistics per domain: each call uses and moves those of one, in the functions and in the layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

C, D = 3, 4


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(seed, 1 + seed, shape), jnp.float32)


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def stack(tree):
    return jax.tree.map(lambda v: jnp.stack([v] * D), tree)


PARAMS, STATE = jaxbn.batch_norm_init(C)
STATES = stack(STATE)
STEPS = [2, 0, 2, 3, 2]


def train(x, params, states, domain):
    y, new = jaxbn.batch_norm_train(x, params, jaxbn.take_domain(states, domain))
    return y, jaxbn.put_domain(states, domain, new)


@pytest.mark.parametrize("traced", [False, True])
def test_each_domain_has_the_statistics_that_it_would_have_alone(traced):
    step = jax.jit(train) if traced else train
    states, alone = STATES, [STATE] * D
    for seed, domain in enumerate(STEPS):
        x = draw(6, C, seed=seed)
        y, states = step(x, PARAMS, states, domain)
        expected, alone[domain] = jaxbn.batch_norm_train(x, PARAMS, alone[domain])
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6)
    assert states.num_batches_tracked.tolist() == [1, 0, 3, 1]
    for domain in range(D):
        actual = jaxbn.take_domain(states, domain)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), actual, alone[domain])
    assert_equal(jaxbn.take_domain(states, 1), STATE)


def test_one_compiled_step_serves_all_domains():
    traces = []

    @jax.jit
    def step(x, states, domain):
        traces.append(None)
        return train(x, PARAMS, states, domain)[1]

    states = STATES
    for seed, domain in enumerate(STEPS):
        states = step(draw(6, C, seed=seed), states, domain)
    assert len(traces) == 1


def test_nothing_is_the_same_for_all_domains():
    assert jaxbn.take_domain(None, 1) is None
    assert jaxbn.put_domain(None, jnp.int32(1), None) is None


def test_gradients_of_stacked_parameters_reach_one_domain():
    params = stack(jaxbn.affine_init(C))

    def loss(params, domain):
        return jnp.sum(jnp.sin(jaxbn.batch_norm_train(draw(6, C), jaxbn.take_domain(params, domain), None)[0]))

    for domain in (2, jnp.int32(2)):
        gradients = jax.grad(loss)(params, domain)
        assert gradients.scale.shape == (D, C)
        for gradient in gradients:
            assert gradient[2].all()
            assert not jnp.delete(gradient, 2, axis=0).any()


@pytest.mark.parametrize("domain", [-1, D, 2**30])
def test_a_traced_index_out_of_range_shows(domain):
    _, states = jax.jit(train)(draw(6, C), PARAMS, STATES, domain)
    assert_equal(states, STATES)
    taken = jax.jit(jaxbn.take_domain)(STATES, domain)
    assert jnp.isnan(taken.mean).all()
    assert taken.num_batches_tracked == -1
    assert jnp.isnan(jaxbn.batch_norm_eval(draw(6, C), PARAMS, taken)[0]).all()


ERRORS = {
    "out of range": (lambda: jaxbn.take_domain(STATES, D), "domain: expected a number from 0 to 3, got 4; there are 4"),
    "negative": (lambda: jaxbn.put_domain(STATES, -1, STATE), "domain: expected a number from 0 to 3, got -1; there"),
    "not an integer": (lambda: jaxbn.take_domain(STATES, 1.5), "domain: expected an integer, got float"),
    "several": (
        lambda: jaxbn.take_domain(STATES, jnp.array([0, 1])),
        "domain: expected one integer, got int32[2]; for a batch of several domains call the norm for each with a mask",
    ),
    "not stacked": (
        lambda: jaxbn.take_domain(STATE, 0),
        "stacked: expected arrays with the domains on their first axis, as many in each, got first axes of sizes "
        "[(), (3,)]; stack one state per domain: jax.tree.map(lambda *v: jnp.stack(v), *states)",
    ),
    "new": (
        lambda: jaxbn.put_domain(STATES, 0, STATES),
        "new: expected arrays like those of one domain, shape (3,), got shape (4, 3); pass what the norm returned for "
        "the domain that was taken",
    ),
    "layer without": (
        lambda: jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))(draw(6, C), domain=1),
        "domain: expected None, got 1; give the layer num_domains to have statistics for each",
    ),
    "layer of a negative number": (
        lambda: jaxbn.nnx.BatchNorm(C, num_domains=-1, rngs=nnx.Rngs(0)),
        "num_domains: expected a number of domains, at least 1, or None, got -1",
    ),
    "linen layer of no domains": (
        lambda: jaxbn.linen.BatchNorm(use_running_average=False, num_domains=0).init(jax.random.key(0), draw(6, C)),
        "num_domains: expected a number of domains, at least 1, or None, got 0",
    ),
    "call without": (
        lambda: jaxbn.linen.BatchNorm(use_running_average=False, num_domains=2).init(jax.random.key(0), draw(6, C)),
        "domain: expected which of the layer's 2 domains x is from, got None; pass domain=... to the call",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises((ValueError, TypeError)) as raised:
        call()
    assert str(raised.value).startswith(message)


class Linen:
    def __init__(self, **options):
        self.layer = jaxbn.linen.BatchNorm(**options)
        self.variables = self.layer.init(jax.random.key(0), draw(6, C), use_running_average=False, domain=0)

    def __call__(self, x, **options):
        y, updates = self.layer.apply(self.variables, x, mutable=["batch_stats"], **options)
        self.variables |= updates
        return y

    @property
    def state(self):
        return self.variables["batch_stats"]

    @property
    def params(self):
        return self.variables["params"]


class NNX:
    def __init__(self, **options):
        self.layer = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0), **options)

    def __call__(self, x, **options):
        return self.layer(x, **options)

    @property
    def state(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.BatchStat))

    @property
    def params(self):
        return nnx.to_pure_dict(nnx.state(self.layer, nnx.Param))


@pytest.mark.parametrize("api", [Linen, NNX])
@pytest.mark.parametrize("domain_affine", [False, True])
def test_layers_are_the_functions_bit_for_bit(api, domain_affine):
    random = jax.nn.initializers.normal(1.0)
    layer = api(num_domains=D, domain_affine=domain_affine, momentum=0.9, scale_init=random, bias_init=random)
    shapes = jax.tree.map(jnp.shape, layer.params)
    assert shapes == dict.fromkeys(("scale", "bias"), (D, C) if domain_affine else (C,))
    # Domains begin alike.
    params = jaxbn.BatchNormParams(**layer.params)
    if domain_affine:
        assert_equal(params, stack(jaxbn.take_domain(params, 0)))
    states = STATES
    momentum = 1 - 0.9

    def own(domain):
        return jaxbn.take_domain(params, domain) if domain_affine else params

    for seed, domain in enumerate(STEPS):
        x = draw(6, C, seed=seed)
        expected, new = jaxbn.batch_norm_train(
            x, own(domain), jaxbn.take_domain(states, domain), momentum=momentum, correction=0
        )
        states = jaxbn.put_domain(states, domain, new)
        index = jnp.int32(domain) if seed % 2 else domain
        assert_equal(layer(x, use_running_average=False, domain=index), expected)
    assert_equal(layer.state, {"mean": states.mean, "var": states.var})
    for domain in range(D):
        expected, _ = jaxbn.batch_norm_eval(x, own(domain), jaxbn.take_domain(states, domain))
        assert_equal(layer(x, use_running_average=True, domain=domain), expected)


@pytest.mark.parametrize("api", [Linen, NNX])
def test_layers_count_batches_per_domain(api):
    layer = api(num_domains=2, momentum=None)
    layer(draw(6, C), use_running_average=False, domain=1)
    assert layer.state["num_batches_tracked"].tolist() == [0, 1]
