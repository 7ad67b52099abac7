"""Outside of jit nothing compiles again: a second call with other numbers of the same kind runs what the first made."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import unregister_duration_listener

import jaxbn
import jaxbn.linen
import jaxbn.nnx

C, GROUPS = 4, 2
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, C)), jnp.float32)
PARAMS, STATE = jaxbn.batch_norm_init(C)
STATES = jax.tree.map(lambda v: jnp.stack([v, v]), STATE)
LIMITS = {"r_max": 2.0, "d_max": 1.0}


@pytest.fixture(autouse=True, scope="module")
def compiled_fast():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@contextlib.contextmanager
def compilations():
    """The durations of all compilations within, in a list that grows."""
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        unregister_duration_listener(listen)


def synced(x):
    return jax.vmap(lambda mean: jaxbn.sync_state(STATE._replace(mean=mean), "devices"), axis_name="devices")(x[:, 0])


FUNCTIONS = {
    "batch_norm_train": lambda x: jaxbn.batch_norm_train(x, PARAMS, STATE),
    "batch_norm_train, virtual batches": lambda x: jaxbn.batch_norm_train(x, PARAMS, STATE, virtual_batch_size=1),
    "batch_norm_eval": lambda x: jaxbn.batch_norm_eval(x, PARAMS, STATE),
    "batch_norm_update": lambda x: jaxbn.batch_norm_update(STATE, jaxbn.moments(x), momentum=None),
    "batch_renorm_train": lambda x: jaxbn.batch_renorm_train(x, PARAMS, STATE, **LIMITS),
    "batch_renorm_limits": lambda x: jaxbn.batch_renorm_limits(7),
    "layer_norm": lambda x: jaxbn.layer_norm(x, PARAMS),
    "rms_norm": lambda x: jaxbn.rms_norm(x, PARAMS),
    "group_norm": lambda x: jaxbn.group_norm(x, PARAMS, GROUPS),
    "instance_norm_train": lambda x: jaxbn.instance_norm_train(x, PARAMS, STATE),
    "instance_norm_eval": lambda x: jaxbn.instance_norm_eval(x, PARAMS, STATE),
    "moments": lambda x: jaxbn.moments(x),
    "data_moments": lambda x: jaxbn.data_moments([x, x]),
    "merge": lambda x: jaxbn.moments(x).merge(jaxbn.moments(x)),
    "sync_state": synced,
    "fold_batch_norm": lambda x: jaxbn.fold_batch_norm(x[0], None, PARAMS, STATE),
    "take_domain": lambda x: jaxbn.take_domain(STATES, 1),
    "put_domain": lambda x: jaxbn.put_domain(STATES, 1, STATE),
}


def linen(name, options):
    layer = getattr(jaxbn.linen, name)(**options)
    variables = layer.init(jax.random.key(0), X)
    return lambda x: layer.apply(variables, x, mutable=["batch_stats"])


def of_nnx(name, options):
    return getattr(jaxbn.nnx, name)(C, **options, rngs=nnx.Rngs(0))


# Those of the functions above, so that the layers run what is compiled already.
EPS = {"epsilon": 1e-5}
TRAINED = EPS | {"use_running_average": False, "correction": 1}
LAYERS = {
    "BatchNorm": TRAINED,
    "BatchRenorm": TRAINED | {"limits": jaxbn.batch_renorm_limits},
    "LayerNorm": EPS,
    "RMSNorm": EPS,
    "GroupNorm": EPS | {"num_groups": GROUPS},
    "InstanceNorm": EPS,
}


def assert_compiles_no_more(call):
    # The second call may still see what the first made, such as a state that is an output by now.
    call(X), call(X + 1)
    with compilations() as durations:
        call(X + 2)
    assert not durations


def test_compilations_are_seen():
    with compilations() as durations:
        jax.jit(lambda x: x + 1)(X)
    assert len(durations) == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    assert_compiles_no_more(FUNCTIONS[name])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("make", [linen, of_nnx])
def test_layers(make, name):
    assert_compiles_no_more(make(name, LAYERS[name]))
