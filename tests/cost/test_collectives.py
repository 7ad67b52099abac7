"""What synchronisation costs: the collectives of the compiled program."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from costs import collectives
from parallel import AXIS, P, mesh

import jaxbn
from jaxbn.linen import BatchNorm

pytestmark = pytest.mark.optimized

C = 4
X = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, C)), jnp.float32)
PARAMS, STATE = jaxbn.batch_norm_init(C)


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


@pytest.mark.parametrize(("dtype", "sums", "largest"), [(jnp.float32, 2, 2 * C), (jnp.bfloat16, 1, 2 * C + 1)])
@pytest.mark.parametrize("shared", [False, True])
def test_masks_send_their_counts_along(dtype, sums, largest, shared):
    """Also a mask that is the same on all devices, though not of the same type as x."""
    mask = jnp.ones((1 if shared else 16, 5), bool)
    specs = (P(AXIS), P() if shared else P(AXIS)), (P(AXIS), P())
    function = mapped(lambda x, mask: forward(x, mask=mask, axis_name=AXIS), *specs)
    assert collectives(function, X.astype(dtype), mask) == ({"all-reduce": sums}, largest)


def test_the_count_is_typed_as_replicated_where_channels_are_sharded():
    def train(x, mask):
        return jaxbn.batch_norm_train(x, None, jaxbn.batch_norm_init(C // 2)[1], mask=mask, axis_name="a")

    per_channel = P("a", None, "b")
    function = jax.shard_map(
        train,
        mesh=mesh(8, ("a", "b"), (4, 2)),
        in_specs=(per_channel, P("a")),
        out_specs=(per_channel, jaxbn.BatchNormState(P("b"), P("b"), P())),
    )
    assert collectives(function, X, jnp.ones((16, 5), bool)) == ({"all-reduce": 2}, C)


# Of equal size, and not; each is within a host.
GROUPED = {4: [[0, 1], [2, 3]], 8: [[0, 1], [2, 3], [4, 5], [6, 7]]}
UNEQUAL = {4: [[0], [1, 2, 3]], 8: [[0], [1, 2, 3], [4, 5, 6, 7]]}


def written(groups):
    return "{" + ",".join("{" + ",".join(map(str, group)) + "}" for group in groups) + "}"


def groups_of(text):
    return set(re.findall(r"replica_groups=(\{\{.*?\}\})", text))


@pytest.mark.parametrize("number", [4, 8])
@pytest.mark.parametrize("groups", [GROUPED, UNEQUAL], ids=["equal", "unequal"])
def test_groups_send_as_much_as_all_devices_do(groups, number):
    options = {"axis_name": AXIS, "axis_index_groups": groups[number]}
    function = mapped(lambda x: forward(x, **options)[0], P(AXIS), P(AXIS), number)
    assert collectives(function, X) == ({"all-reduce": 2}, 2 * C)
    text = jax.jit(function).lower(X).compile().as_text()
    assert groups_of(text) == {written(groups[number])}
    # One within the group for x, and one over all devices for the gradients of scale and bias.
    specs = (P(AXIS), P()), (P(AXIS), (P(AXIS), P()))
    function = mapped(lambda x, params: backward(x, params, **options)[::2], *specs, number)
    assert collectives(function, X, PARAMS) == ({"all-reduce": 4}, 2 * C)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [None, GROUPED[8], UNEQUAL[8]], ids=str)
def test_pmap_sends_as_much_as_shard_map(groups):
    function = jax.pmap(functools.partial(forward, axis_name=AXIS, axis_index_groups=groups), axis_name=AXIS)
    assert collectives(function, X.reshape(8, 2, 5, C)) == ({"all-reduce": 2}, 2 * C)


@pytest.mark.parametrize("number", [4, 8])
def test_groups_of_unequal_size_exchange_in_pairs_on_tpus(number):
    """As often as the largest group is halved, and once more before and after for what is beyond a power of two."""
    norm = functools.partial(forward, axis_name=AXIS, axis_index_groups=UNEQUAL[number])
    function = jax.jit(mapped(lambda x: norm(x)[0], P(AXIS), P(AXIS), number))
    lowered = function.trace(X).lower(lowering_platforms=("tpu",)).as_text()
    sums, steps = 3, 3 if number == 4 else 4
    assert lowered.count("stablehlo.collective_permute") == sums * steps
    assert "stablehlo.all" not in lowered


@pytest.mark.slow
@pytest.mark.parametrize("number", [4, 8])
def test_virtual_batches_over_several_devices(number):
    """Two sums within each, and one over all devices for the state, for which nothing waits."""
    size = 2 * (X.shape[0] // number)
    stateless = mapped(
        lambda x: jaxbn.batch_norm_train(x, PARAMS, None, axis_name=AXIS, virtual_batch_size=size)[0],
        P(AXIS),
        P(AXIS),
        number,
    )
    assert collectives(stateless, X) == ({"all-reduce": 2}, 2 * C)
    text = jax.jit(stateless).lower(X).compile().as_text()
    assert groups_of(text) == {written(GROUPED[number])}
    function = mapped(
        functools.partial(forward, axis_name=AXIS, virtual_batch_size=size), P(AXIS), (P(AXIS), P()), number
    )
    assert collectives(function, X) == ({"all-reduce": 3}, 2 * C)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 8])
@pytest.mark.parametrize(
    ("norm", "bias", "sums", "largest"),
    [
        (jaxbn.layer_norm, True, 3, 2 * 2 * 3),
        (jaxbn.rms_norm, False, 2, 2 * 3),
        # For each example and group, however many channels it has.
        (functools.partial(jaxbn.group_norm, num_groups=2), True, 3, 2 * 2 * 2),
    ],
    ids=["layer", "rms", "group"],
)
def test_norms_of_examples_send_their_statistics(norm, bias, sums, largest, number):
    """Forward and backward, with channels, scale and bias on several devices."""
    x, params, channels = jnp.ones((2, 3, 32)), jaxbn.affine_init(32), P(None, None, AXIS)
    params = params if bias else params._replace(bias=None)

    def both(x, params):
        y, pull = jax.vjp(lambda x, params: norm(x, params, axis_name=AXIS), x, params)
        return y, pull(y)

    function = mapped(both, (channels, P(AXIS)), (channels, (channels, P(AXIS))), number)
    assert collectives(function, x, params) == ({"all-reduce": sums}, largest)


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
