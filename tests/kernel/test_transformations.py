"""jit, vmap, scan, checkpoint, eval_shape, export: the functions are ordinary JAX functions."""

import functools

import chex
import jax
import jax.numpy as jnp
import near
import numpy as np
import pytest

import jaxbn

assert_near = functools.partial(near.assert_near, units=16)

C = 3
PARAMS, STATE = jaxbn.batch_norm_init(C)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.5, 2, shape), jnp.float32)


def loss(x, params, state):
    y, new = jaxbn.batch_norm_train(x, params, state)
    return jnp.sum(jnp.sin(y)), new


@pytest.mark.parametrize("function", [jaxbn.batch_norm_train, jaxbn.batch_norm_eval, jaxbn.moments])
def test_jit_as_it_stands(function):
    arguments = (draw(8, C),) if function is jaxbn.moments else (draw(8, C), PARAMS, STATE)
    assert_near(jax.jit(function)(*arguments), function(*arguments))


def test_jit_compiles_once_for_all_momenta_and_states():
    traces = []

    @jax.jit
    def step(x, params, state, momentum):
        traces.append(None)
        return jaxbn.batch_norm_train(x, params, state, momentum=momentum)

    state = STATE
    for k in range(3):
        _, state = step(draw(8, C, seed=k), PARAMS, state, 0.1 * k)
    assert len(traces) == 1
    assert state.num_batches_tracked == 3


@pytest.mark.slow
def test_vmap_over_a_batch_of_models():
    x = draw(4, 8, C)
    params = jaxbn.BatchNormParams(draw(4, C, seed=1), draw(4, C, seed=2))
    state = jax.tree.map(lambda v: jnp.broadcast_to(v, (4, *v.shape)), STATE)
    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    together = jax.vmap(step)(x, params, state)
    each = [step(*jax.tree.map(lambda v, k=k: v[k], (x, params, state))) for k in range(4)]
    assert_near(together, jax.tree.map(lambda *v: jnp.stack(v), *each))


def test_vmap_over_the_data_of_one_model():
    x = draw(4, 8, C)
    y, state = jax.vmap(jaxbn.batch_norm_train, in_axes=(0, None, None))(x, PARAMS, STATE)
    assert_near(y[2], jaxbn.batch_norm_train(x[2], PARAMS, STATE)[0])
    assert state.mean.shape == (4, C)


@pytest.mark.slow
def test_scan_over_layers():
    depth = 3
    # Near 1 and 0: saturated layers would magnify rounding.
    params = jaxbn.BatchNormParams(1 + 0.1 * draw(depth, C, seed=1), 0.1 * draw(depth, C, seed=2))
    state = jax.tree.map(lambda v: jnp.broadcast_to(v, (depth, *v.shape)), STATE)

    def layer(x, params_and_state):
        y, new = jaxbn.batch_norm_train(x, *params_and_state)
        return jnp.tanh(y), new

    def scanned(x, params):
        y, new = jax.lax.scan(layer, x, (params, state))
        return jnp.sum(y**2), new

    def unrolled(x, params):
        new = []
        for k in range(depth):
            x, s = layer(x, jax.tree.map(lambda v, k=k: v[k], (params, state)))
            new.append(s)
        return jnp.sum(x**2), jax.tree.map(lambda *v: jnp.stack(v), *new)

    x = draw(8, C)
    assert_near(
        jax.value_and_grad(scanned, (0, 1), has_aux=True)(x, params),
        jax.value_and_grad(unrolled, (0, 1), has_aux=True)(x, params),
        units=80,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.everything_saveable]
)
def test_checkpoint_updates_the_state_once(policy):
    def step(rematerialized):
        return jax.value_and_grad(rematerialized, (0, 1), has_aux=True)(draw(8, C), PARAMS, STATE)

    remat = step(jax.checkpoint(loss, policy=policy))
    assert_near(remat, step(loss))
    assert remat[0][1].num_batches_tracked == 1


def test_eval_shape_and_abstract_arguments():
    x = jax.ShapeDtypeStruct((8, C), jnp.bfloat16)
    params, state = jax.eval_shape(functools.partial(jaxbn.batch_norm_init, C))
    y, new = jax.eval_shape(jaxbn.batch_norm_train, x, params, state)
    assert (y.shape, y.dtype) == ((8, C), jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize("masked", [False, True])
def test_export(platform, masked):
    def step(x, params, state):
        mask = jnp.abs(x) < 4 if masked else None
        return jax.grad(lambda p: jnp.sum(jaxbn.batch_norm_train(x, p, state, mask=mask)[0] ** 3))(params), (
            jaxbn.batch_norm_eval(x, params, state)[0]
        )

    arguments = (draw(8, C), PARAMS, STATE)
    exported = jax.export.export(jax.jit(step), platforms=[platform])(*(jax.tree.map(jnp.asarray, arguments)))
    assert exported.platforms == (platform,)
    if platform == "cpu":
        assert_near(exported.call(*arguments), step(*arguments), units=160)


def test_export_with_a_symbolic_batch_size():
    n = jax.export.symbolic_shape("n")[0]
    shape = jax.ShapeDtypeStruct((n, C), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: jaxbn.batch_norm_eval(x, PARAMS, STATE)[0]))(shape)
    for size in (1, 5):
        x = draw(size, C)
        assert_near(exported.call(x), jaxbn.batch_norm_eval(x, PARAMS, STATE)[0])


def test_donated_state_and_while_loop():
    @functools.partial(jax.jit, donate_argnums=0)
    def many(state, x):
        return jax.lax.fori_loop(0, 5, lambda _, s: jaxbn.batch_norm_train(x, None, s, momentum=None)[1], state)

    x = draw(8, C)
    state = many(jax.tree.map(jnp.copy, STATE), x)
    assert state.num_batches_tracked == 5
    np.testing.assert_allclose(state.mean, np.asarray(x).mean(0), rtol=1e-5)


def test_a_batch_sharded_over_devices_is_one_batch():
    mesh = jax.sharding.Mesh(jax.devices(), ("batch",))
    x = draw(16, 4, C)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("batch")))
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    assert_near(jax.device_get(step(sharded, PARAMS, STATE)), jax.device_get(step(x, PARAMS, STATE)), units=80)


def test_numpy_arguments():
    x = np.asarray(draw(8, C))
    params, state = jax.tree.map(np.asarray, (PARAMS, STATE))
    assert_near(jaxbn.batch_norm_train(x, params, state), jaxbn.batch_norm_train(jnp.asarray(x), PARAMS, STATE))
    assert_near(jaxbn.batch_norm_eval(x, params, state), jaxbn.batch_norm_eval(jnp.asarray(x), PARAMS, STATE))
