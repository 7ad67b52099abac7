"""Does the Linen layer take the place of Flax's, and what does it do beyond it?"""

import dataclasses
import functools
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from layers import DTYPES, MASKS, OPTIONS, assert_close, batches, mask_of

from jaxbn import BatchNormParams, BatchNormState, batch_norm_eval, batch_norm_train
from jaxbn.linen import BatchNorm

KEY = jax.random.key(0)
TRAIN = {"use_running_average": False}
EVAL = {"use_running_average": True}
FLAX = functools.partial(nn.BatchNorm, use_fast_variance=False)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("use_running_average", "train"))
def apply(layer, variables, x, **options):
    """Output and updated variables."""
    y, updates = layer.apply(variables, x, mutable=["batch_stats"], **options)
    return y, variables | updates


def run(layer, xs, mask=None):
    """Initializes, trains on all batches but the last, evaluates on that: all outputs and variables."""
    results = [jax.jit(functools.partial(layer.init_with_output, **TRAIN))(KEY, xs[0], mask=mask)]
    for x in xs[:-1]:
        results.append(apply(layer, results[-1][1], x, **TRAIN, mask=mask))
    return [*results, apply(layer, results[-1][1], xs[-1], **EVAL, mask=mask)]


class Model(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        x = nn.relu(self.norm(use_running_average=not train)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


IMAGES = batches(shape=(6, 4, 5, 3))


# The interface.


def test_fields_are_those_of_flax():
    theirs = [(f.name, f.default, f.kw_only) for f in dataclasses.fields(nn.BatchNorm)]
    ours = [(f.name, f.default, f.kw_only) for f in dataclasses.fields(BatchNorm)]
    assert [f for f in ours if f in theirs] == theirs
    assert [f for f in ours if f not in theirs] == [
        ("correction", 0, True),
        ("virtual_batch_size", None, True),
        ("num_domains", None, True),
        ("domain_affine", False, True),
    ]


def test_arguments_of_the_call_are_those_of_flax():
    ours, theirs = (inspect.signature(layer.__call__).parameters.values() for layer in (BatchNorm, nn.BatchNorm))
    assert [(p.name, p.default) for p in ours] == [*((p.name, p.default) for p in theirs), ("domain", None)]


def test_layer_is_a_flax_batch_norm():
    assert isinstance(BatchNorm(), nn.BatchNorm)


PATHS = ("batch_stats/mean", "batch_stats/var", "params/bias", "params/scale")


@pytest.mark.parametrize(
    ("options", "picture"),
    [
        ({}, dict.fromkeys(PATHS, "float32[3]")),
        ({"use_bias": False}, dict.fromkeys((*PATHS[:2], "params/scale"), "float32[3]")),
        ({"use_scale": False}, dict.fromkeys((*PATHS[:2], "params/bias"), "float32[3]")),
        ({"use_scale": False, "use_bias": False}, dict.fromkeys(PATHS[:2], "float32[3]")),
        ({"axis": 1}, dict.fromkeys(PATHS, "float32[5]")),
        ({"axis": (1, -1)}, dict.fromkeys(PATHS, "float32[5, 3]")),
        (
            {"param_dtype": jnp.bfloat16},
            dict.fromkeys(PATHS[:2], "float32[3]") | dict.fromkeys(PATHS[2:], "bfloat16[3]"),
        ),
        ({"param_dtype": jnp.bfloat16, "force_float32_reductions": False}, dict.fromkeys(PATHS, "bfloat16[3]")),
    ],
    ids=lambda v: "-".join(v),
)
def test_variables_are_those_of_flax(options, picture):
    def draw(norm):
        # Of a float32 x and bfloat16 parameters Flax makes something only if JAX may promote.
        with jax.numpy_dtype_promotion("standard"):
            variables = jax.eval_shape(norm(**TRAIN, **options).init, KEY, batches()[0])
        leaves = jax.tree.leaves_with_path(variables)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): f"{v.dtype}{list(v.shape)}" for p, v in leaves}

    assert draw(BatchNorm) == picture
    assert draw(nn.BatchNorm) == picture


def test_cumulative_average_adds_a_counter_to_the_variables():
    stats = BatchNorm(**TRAIN, momentum=None).init(KEY, batches()[0])["batch_stats"]
    assert jax.tree.map(lambda v: (v.shape, v.dtype), stats) == {
        "mean": ((3,), jnp.float32),
        "var": ((3,), jnp.float32),
        "num_batches_tracked": ((), jnp.int32),
    }


# Flax's numbers.


@pytest.mark.parametrize("options", [*OPTIONS, {"axis": (1, -1)}], ids=lambda v: "-".join(v))
def test_numbers_are_those_of_flax(options):
    assert_close(run(BatchNorm(**options), batches()), run(FLAX(**options), batches()))


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "shape", "dtype"), [*((*m, bool) for m in MASKS), (*MASKS[1], jnp.float32)], ids=str)
def test_masked_numbers_are_those_of_flax(axis, shape, dtype):
    ours, theirs = (run(norm(axis=axis), batches(), mask_of(shape, dtype)) for norm in (BatchNorm, FLAX))
    assert_close(ours, theirs)


@pytest.mark.parametrize("options", [TRAIN, EVAL], ids=["train", "eval"])
def test_dtypes_are_those_of_flax(options):
    def dtypes(norm, x_dtype, dtype, param_dtype):
        layer = norm(**options, dtype=dtype, param_dtype=param_dtype)

        def init_and_apply(x):
            variables = layer.init(KEY, x)
            return variables, layer.apply(variables, x, mutable=["batch_stats"])

        result = jax.eval_shape(init_and_apply, jax.ShapeDtypeStruct((6, 3), x_dtype))
        return jax.tree.map(lambda v: v.dtype, result)

    with jax.numpy_dtype_promotion("standard"):
        assert [dtypes(BatchNorm, *d) for d in DTYPES] == [dtypes(nn.BatchNorm, *d) for d in DTYPES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype"),
    [
        (jnp.bfloat16, None, jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float16, jnp.float32),
    ],
)
def test_half_precision_numbers_are_those_of_flax(x_dtype, dtype, param_dtype):
    xs = batches().astype(x_dtype)
    # Strict promotion, which this test file runs under, is no obstacle to our layer.
    ours = run(BatchNorm(dtype=dtype, param_dtype=param_dtype), xs)
    with jax.numpy_dtype_promotion("standard"):
        theirs = run(FLAX(dtype=dtype, param_dtype=param_dtype), xs)
    assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_gradients_of_a_model_are_those_with_flax(train):
    def gradients(norm):
        model = Model(norm)
        _, variables = apply(model, model.init(KEY, IMAGES[0], train=True), IMAGES[1], train=True)

        def loss(params, x):
            y, _ = model.apply({**variables, "params": params}, x, train=train, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y))

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], IMAGES[2])

    assert_close(gradients(BatchNorm), gradients(FLAX), ulps=8)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [(FLAX, BatchNorm), (BatchNorm, FLAX)], ids=["from Flax", "to Flax"])
def test_checkpoint_changes_layers(source, target, tmp_path):
    model = Model(source)
    _, variables = apply(model, model.init(KEY, IMAGES[0], train=True), IMAGES[1], train=True)
    other = Model(target)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", variables)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(functools.partial(other.init, train=True), jax.random.key(1), IMAGES[0])
        restored = checkpointer.restore(tmp_path / "variables", abstract)
    expected, _ = apply(model, variables, IMAGES[2], train=False)
    assert_close(apply(other, restored, IMAGES[2], train=False)[0], expected)


# The functions' numbers.


@pytest.mark.parametrize(
    ("options", "masked"),
    [
        ({}, False),
        ({"axis": 1, "epsilon": 0.1}, True),
        ({"use_bias": False, "dtype": jnp.bfloat16}, False),
        ({"momentum": None}, False),
        ({"momentum": 0.9, "correction": 1}, True),
    ],
    ids=str,
)
def test_layer_is_the_function_bit_for_bit(options, masked):
    xs = batches()
    mask = mask_of(xs.shape[1:]) if masked else None
    layer = BatchNorm(scale_init=nn.initializers.normal(1.0), **options)
    (_, variables), *trained, evaluated = run(layer, xs, mask)

    params = BatchNormParams(variables["params"]["scale"], variables["params"].get("bias"))
    stats = variables["batch_stats"]
    state = BatchNormState(stats["mean"], stats["var"], jnp.int32(0))
    common = {"axis": layer.axis, "eps": layer.epsilon, "dtype": layer.dtype}
    # Flax's momentum is the weight of what was, ours that of what is new.
    momentum = None if layer.momentum is None else 1 - layer.momentum
    train = jax.jit(functools.partial(batch_norm_train, momentum=momentum, correction=layer.correction, **common))
    for x, (y, variables) in zip(xs[:-1], trained, strict=True):
        expected, state = train(x, params, state, mask=mask)
        assert_close(y, expected, ulps=0)
        assert_close(variables["batch_stats"], {k: v for k, v in state._asdict().items() if k in stats}, ulps=0)
    expected, _ = jax.jit(functools.partial(batch_norm_eval, **common))(xs[-1], params, state, mask=mask)
    assert_close(evaluated[0], expected, ulps=0)


@pytest.mark.parametrize("correction", [0, 1])
def test_cumulative_average_weighs_all_batches_alike(correction):
    xs = batches()
    (_, variables) = run(BatchNorm(momentum=None, correction=correction), xs)[-1]
    stats = variables["batch_stats"]
    mean, var = oracle.update(0, 1, xs[:-1], momentum=None, correction=correction)
    assert stats["num_batches_tracked"] == 3
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)


# use_running_average, initialization.


@pytest.mark.parametrize("value", [True, False])
def test_mode_may_be_given_to_the_constructor_or_the_call(value):
    x = batches()[0]
    variables = BatchNorm().init(KEY, x, **TRAIN)
    by_constructor = apply(BatchNorm(use_running_average=value), variables, x)
    by_call = apply(BatchNorm(), variables, x, use_running_average=value)
    assert_close(by_constructor, by_call, ulps=0)
    updated = not np.array_equal(by_call[1]["batch_stats"]["mean"], variables["batch_stats"]["mean"])
    assert updated != value


@pytest.mark.parametrize(("constructor", "call"), [(None, None), (True, True), (True, False), (False, True)])
def test_mode_given_twice_or_never_is_the_error_of_flax(constructor, call):
    def message(norm):
        with pytest.raises(ValueError, match="use_running_average") as error:
            norm(use_running_average=constructor).init(KEY, batches()[0], use_running_average=call)
        return str(error.value)

    assert message(BatchNorm) == message(nn.BatchNorm)


@pytest.mark.parametrize("batch_size", [1, 6])
@pytest.mark.parametrize("options", [TRAIN, EVAL], ids=["train", "eval"])
def test_init_leaves_statistics_alone(batch_size, options):
    variables = BatchNorm(**options).init(KEY, batches()[0, :batch_size, 0])
    expected = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    assert_close(variables["batch_stats"], expected, ulps=0)


def test_training_on_one_value_per_channel_is_an_error():
    layer, x = BatchNorm(**TRAIN), jnp.ones((1, 3))
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        layer.apply(layer.init(KEY, x), x, mutable=["batch_stats"])


@pytest.mark.parametrize("momentum", [0.99, None])
def test_eval_shape_of_init_is_init(momentum):
    layer = BatchNorm(**TRAIN, momentum=momentum)

    def picture(variables):
        return jax.tree.map(lambda v: (v.shape, v.dtype), variables)

    assert picture(jax.eval_shape(layer.init, KEY, batches()[0])) == picture(layer.init(KEY, batches()[0]))


# Lifted transformations.


class Block(nn.Module):
    norm: Any

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(self.norm(use_running_average=False)(nn.Dense(3)(x))), None


@pytest.mark.slow
def test_scan_over_layers_keeps_statistics_of_each():
    def run_scan(norm):
        axes = {"params": 0, "batch_stats": 0}
        layers = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=4)(norm)
        x = batches()[0]
        return jax.jit(functools.partial(layers.apply, mutable=["batch_stats"]))(layers.init(KEY, x, None), x, None)

    ours = run_scan(BatchNorm)
    assert ours[1]["batch_stats"]["BatchNorm_0"]["mean"].shape == (4, 3)
    assert_close(ours, run_scan(FLAX))


@pytest.mark.slow
def test_vmap_keeps_statistics_of_each_model():
    xs = batches()
    models = nn.vmap(BatchNorm, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})(**TRAIN)
    y, variables = apply(models, models.init(KEY, xs), xs)
    one = BatchNorm(**TRAIN)
    alone = [apply(one, one.init(KEY, x), x) for x in xs]
    assert_close((y, variables), jax.tree.map(lambda *v: jnp.stack(v), *alone))


@pytest.mark.slow
def test_remat_updates_statistics_once():
    x = batches()[0]

    def value_and_grad(norm):
        layer = norm(**TRAIN, momentum=None)
        variables = layer.init(KEY, x)

        def loss(params):
            y, updates = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y)), updates

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])

    (loss, updates), gradients = value_and_grad(nn.remat(BatchNorm))
    assert updates["batch_stats"]["num_batches_tracked"] == 1
    assert_close(((loss, updates), gradients), value_and_grad(BatchNorm))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"momentum": 1.5},
            "momentum: expected the decay of the running statistics, between 0 and 1, got 1.5; "
            "0.9 is PyTorch's 0.1, and None averages over all batches",
        ),
        (
            {"momentum": "a"},
            "momentum: expected a number or None, got str; 0.9 is PyTorch's 0.1, and None averages over all batches",
        ),
        ({"epsilon": -1.0}, "epsilon: expected a finite number of at least 0, got -1.0; the usual value is 1e-5"),
        (
            {"mask": jnp.ones((6, 5), bool)},
            "mask: expected a shape that broadcasts, from the right as in NumPy, to x with shape (6, 5, 3), "
            "got shape (6, 5); write mask[..., None] for one that has no feature axis",
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_errors_speak_of_the_layers_own_options(options, message):
    options = dict(options)
    mask = options.pop("mask", None)
    kind = TypeError if options.get("momentum") == "a" else ValueError
    with pytest.raises(kind, match=message.split(":")[0]) as error:
        BatchNorm(**TRAIN, **options).init(KEY, batches()[0], mask=mask)
    assert str(error.value) == message


def test_cumulative_average_evaluates_a_checkpoint_of_flax():
    variables = nn.BatchNorm().init(KEY, batches()[0], **TRAIN)
    y = BatchNorm(momentum=None).apply(variables, batches()[1], **EVAL)
    assert_close(y, nn.BatchNorm().apply(variables, batches()[1], **EVAL))


def test_cumulative_average_of_a_checkpoint_without_counter_begins_anew():
    # As in PyTorch: what has not been counted is no batch.
    xs = batches()
    variables = nn.BatchNorm().init(KEY, xs[0], **TRAIN)
    for x in xs[:-1]:
        _, updates = BatchNorm(momentum=None).apply(variables, x, mutable=["batch_stats"], **TRAIN)
        variables |= updates
    mean, var = oracle.update(7, 8, xs[:-1], momentum=None, correction=0)
    stats = variables["batch_stats"]
    assert stats["num_batches_tracked"] == len(xs) - 1
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)
