"""Does the NNX layer take the place of Flax's, and what does it do beyond it?"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from layers import DTYPES, MASKS, OPTIONS, assert_close, batches, mask_of
from nnx_layers import make, state_of
from versions import needs

from jaxbn import BatchNormParams, BatchNormState, batch_norm_eval, batch_norm_train
from jaxbn.nnx import BatchNorm, BatchRenorm, replace_batch_norms

FLAX = functools.partial(nnx.BatchNorm, use_fast_variance=False)


def run(layer, xs, mask=None):
    """Trains on all batches but the last, evaluates on that: all outputs and states, the first one too."""
    call = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
    results = [(None, state_of(layer))]
    for x in xs[:-1]:
        results.append((call(layer, x, mask), state_of(layer)))
    layer.eval()
    return [*results, (call(layer, xs[-1], mask), state_of(layer))]


class Model(nnx.Module):
    def __init__(self, norm, seed=0):
        rngs = nnx.Rngs(seed)
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(4, rngs=rngs)
        self.dense = nnx.Linear(80, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.dense(x.reshape(x.shape[0], -1))


IMAGES = batches(shape=(6, 4, 5, 3))


# The interface.

# Everything that Flax's constructor takes besides the number of features, with another value than its default.
ARGUMENTS = {
    "use_running_average": True,
    "axis": 1,
    "momentum": 0.5,
    "epsilon": 0.1,
    "dtype": jnp.bfloat16,
    "param_dtype": jnp.bfloat16,
    "use_bias": False,
    "use_scale": False,
    "bias_init": nnx.initializers.ones,
    "scale_init": nnx.initializers.zeros,
    "axis_name": "batch",
    "axis_index_groups": ((0, 1),),
    "use_fast_variance": False,
    "promote_dtype": lambda arrays, *, dtype: arrays,
    "bias_metadata": {"note": "bias"},
    "scale_metadata": {"note": "scale"},
}
IS_NEW = needs("promote_dtype, bias_metadata and scale_metadata", flax="0.12.1")


@IS_NEW
def test_arguments_are_those_of_flax():
    def parameters(function):
        return {p.name: (p.kind, p.default) for p in inspect.signature(function).parameters.values()}

    theirs, ours, renorm = (parameters(layer.__init__) for layer in (nnx.BatchNorm, BatchNorm, BatchRenorm))
    # The initializers that are the defaults are new functions in each call of what makes them.
    for name in ("bias_init", "scale_init"):
        assert {p.pop(name)[0] for p in (theirs, ours, renorm)} == {inspect.Parameter.KEYWORD_ONLY}
    assert theirs.keys() == {"self", "num_features", "rngs", *ARGUMENTS} - {"bias_init", "scale_init"}
    added = {"correction": 0, "virtual_batch_size": None, "num_domains": None, "domain_affine": False}
    added["update_stats"] = True
    assert ours == theirs | {name: (inspect.Parameter.KEYWORD_ONLY, default) for name, default in added.items()}
    assert renorm == ours | {"limits": (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty)}
    # NNX's transformations of a layer allow no keyword-only argument, not even one that is not passed.
    by_position = inspect.Parameter.POSITIONAL_OR_KEYWORD
    call = parameters(nnx.BatchNorm.__call__) | dict.fromkeys(("mask", "domain", "update_stats"), (by_position, None))
    assert list(parameters(BatchNorm.__call__).items()) == list(call.items())


def test_signatures_are_those_of_the_constructor_and_the_call():
    class Derived(BatchNorm):
        def __init__(self, width, momentum=0.5, *, rngs):
            super().__init__(width, momentum=momentum, rngs=rngs)

    for layer in (BatchNorm, BatchRenorm, Derived):
        parameters = inspect.signature(layer.__init__).parameters
        assert inspect.signature(layer).parameters == {k: v for k, v in parameters.items() if k != "self"}
    call = inspect.signature(Derived(3, rngs=nnx.Rngs(0))).parameters
    assert list(call) == ["x", "use_running_average", "mask", "domain", "update_stats"]


@pytest.mark.parametrize(
    "name", [None, *[*ARGUMENTS][:-3], *(pytest.param(name, marks=IS_NEW) for name in [*ARGUMENTS][-3:])]
)
def test_each_argument_does_what_it_does_in_flax(name):
    def attributes(norm):
        values = vars(make(norm, **({name: ARGUMENTS[name]} if name else {})))
        metadata = {k: v.get_metadata() for k, v in values.items() if isinstance(v, nnx.Variable)}
        return metadata, {k: v for k, v in values.items() if k not in metadata and not k.startswith("_")}

    (our_variables, ours), (their_variables, theirs) = attributes(BatchNorm), attributes(nnx.BatchNorm)
    assert our_variables == their_variables
    assert ours.pop("correction") == 0
    assert [ours.pop(name) for name in ("virtual_batch_size", "num_domains", "domain_affine")] == [None, None, False]
    names = ("update_stats", "fixed_statistics", "stop_affine_gradients")
    assert [ours.pop(name) for name in names] == [True, False, False]
    assert ours == theirs


def test_layer_is_a_flax_batch_norm():
    assert isinstance(make(BatchNorm), nnx.BatchNorm)


STATS = {"mean": "BatchStat float32[3]", "var": "BatchStat float32[3]"}
SCALE, BIAS = {"scale": "Param float32[3]"}, {"bias": "Param float32[3]"}


@pytest.mark.parametrize(
    ("options", "picture"),
    [
        ({}, STATS | SCALE | BIAS),
        ({"use_bias": False}, STATS | SCALE),
        ({"use_scale": False}, STATS | BIAS),
        ({"use_scale": False, "use_bias": False}, STATS),
        ({"axis": 1}, {k: v.replace("[3]", "[5]") for k, v in (STATS | SCALE | BIAS).items()}),
        ({"param_dtype": jnp.bfloat16}, STATS | {"scale": "Param bfloat16[3]", "bias": "Param bfloat16[3]"}),
    ],
    ids=lambda v: "-".join(v),
)
def test_variables_are_those_of_flax(options, picture):
    def draw(norm):
        flat = nnx.to_flat_state(nnx.state(make(norm, **options)))
        return {"/".join(path): f"{type(v).__name__} {v.dtype}{list(v.shape)}" for path, v in flat}

    assert draw(BatchNorm) == picture
    assert draw(nnx.BatchNorm) == picture


def test_cumulative_average_adds_a_counter_to_the_variables():
    layer = make(BatchNorm, momentum=None)
    assert nnx.state(layer).keys() - nnx.state(make(BatchNorm)).keys() == {"num_batches_tracked"}
    tracked = layer.num_batches_tracked
    assert (type(tracked), tracked.dtype, tracked.shape) == (nnx.BatchStat, jnp.int32, ())


# Flax's numbers.


@pytest.mark.parametrize("options", OPTIONS, ids=lambda v: "-".join(v))
def test_numbers_are_those_of_flax(options):
    assert_close(run(make(BatchNorm, **options), batches()), run(make(FLAX, **options), batches()))


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "shape"), MASKS, ids=str)
def test_masked_numbers_are_those_of_flax(axis, shape):
    ours, theirs = (run(make(norm, axis=axis), batches(), mask_of(shape)) for norm in (BatchNorm, FLAX))
    assert_close(ours, theirs)


def to_bfloat16(arrays, *, dtype):
    return tuple(None if v is None else v.astype(jnp.bfloat16) for v in arrays)


def as_they_are(arrays, *, dtype):
    return arrays


@pytest.mark.slow
@pytest.mark.parametrize("promote_dtype", [nnx.nn.dtypes.promote_dtype, to_bfloat16, as_they_are])
@pytest.mark.parametrize("evaluate", [True, False])
def test_dtypes_are_those_of_flax(evaluate, promote_dtype):
    def dtypes(norm, x_dtype, dtype, param_dtype):
        def make_and_call(x):
            layer = norm(3, dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), promote_dtype=promote_dtype)
            return layer(x, use_running_average=evaluate), nnx.to_pure_dict(nnx.state(layer))

        result = jax.eval_shape(make_and_call, jax.ShapeDtypeStruct((6, 3), x_dtype))
        return jax.tree.map(lambda v: v.dtype, result)

    with jax.numpy_dtype_promotion("standard"):
        assert [dtypes(BatchNorm, *d) for d in DTYPES] == [dtypes(nnx.BatchNorm, *d) for d in DTYPES]


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.float32, jnp.bfloat16)],
)
def test_half_precision_is_rounded_once(x_dtype, dtype):
    # Flax casts the running statistics, and x, to `dtype`: with this variance its float16 result is 0.
    mean, var = np.float32([10.3, -3.7, 200.0]), np.float32([0.01, 1.7, 1e5])
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((64, 3)) * np.sqrt(var) + mean, x_dtype)
    layer = make(BatchNorm, dtype=dtype, use_running_average=True)
    layer.mean[...], layer.var[...] = jnp.asarray(mean), jnp.asarray(var)
    expected = oracle.normalize(x, mean, var)
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    np.testing.assert_allclose(np.float64(layer(x)), expected, rtol=half_ulp, atol=1e-6)
    trained = layer(x, use_running_average=False)
    np.testing.assert_allclose(np.float64(trained), oracle.train(x), rtol=half_ulp, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("evaluate", [False, True])
def test_gradients_of_a_model_are_those_with_flax(evaluate):
    def gradients(norm):
        model = Model(norm)
        model(IMAGES[1])
        model.set_attributes(use_running_average=evaluate)
        loss = nnx.grad(lambda model, x: jnp.sum(jnp.sin(model(x))), argnums=(0, 1))
        of_model, of_x = nnx.jit(loss)(model, IMAGES[2])
        return nnx.to_pure_dict(of_model), of_x, state_of(model)

    assert_close(gradients(BatchNorm), gradients(FLAX), ulps=8)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [(FLAX, BatchNorm), (BatchNorm, FLAX)], ids=["from Flax", "to Flax"])
def test_checkpoint_changes_layers(source, target, tmp_path):
    model = Model(source)
    model(IMAGES[0])
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Model(target, seed=1)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(model))
        checkpointer.wait_until_finished()
        other = nnx.merge(graph, checkpointer.restore(tmp_path / "state", abstract))
    model.eval()
    other.eval()
    assert type(other.norm) is (BatchNorm if target is BatchNorm else nnx.BatchNorm)
    assert_close(other(IMAGES[1]), model(IMAGES[1]))


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
    layer = make(BatchNorm, scale_init=nnx.initializers.normal(1.0), **options)
    (_, variables), *trained, evaluated = run(layer, xs, mask)

    params = BatchNormParams(variables["scale"], variables.get("bias"))
    state = BatchNormState(variables["mean"], variables["var"], jnp.int32(0))
    common = {"axis": layer.axis, "eps": layer.epsilon, "dtype": layer.dtype}
    # Flax's momentum is the weight of what was, ours that of what is new.
    momentum = None if layer.momentum is None else 1 - layer.momentum
    train = jax.jit(functools.partial(batch_norm_train, momentum=momentum, correction=layer.correction, **common))
    for x, (y, variables) in zip(xs[:-1], trained, strict=True):
        expected, state = train(x, params, state, mask=mask)
        stats = {k: v for k, v in state._asdict().items() if k != "num_batches_tracked" or momentum is None}
        assert_close(y, expected, ulps=0)
        assert_close({k: v for k, v in variables.items() if k not in ("scale", "bias")}, stats, ulps=0)
    expected, _ = jax.jit(functools.partial(batch_norm_eval, **common))(xs[-1], params, state, mask=mask)
    assert_close(evaluated[0], expected, ulps=0)


@pytest.mark.parametrize("correction", [0, 1])
def test_cumulative_average_weighs_all_batches_alike(correction):
    xs = batches()
    _, stats = run(make(BatchNorm, momentum=None, correction=correction), xs)[-1]
    mean, var = oracle.update(0, 1, xs[:-1], momentum=None, correction=correction)
    assert stats["num_batches_tracked"] == len(xs) - 1
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-6)


# The mode.


def evaluates(layer, **call):
    before = layer.mean[...]
    layer(batches()[0], **call)
    return bool(np.array_equal(layer.mean[...], before))


@pytest.mark.parametrize("norm", [BatchNorm, nnx.BatchNorm])
@pytest.mark.parametrize("constructor", [True, False, None])
@pytest.mark.parametrize("call", [True, False])
def test_mode_of_the_call_comes_first(norm, constructor, call):
    assert evaluates(make(norm, use_running_average=constructor), use_running_average=call) == call


def test_mode_changes_with_train_and_eval():
    model = nnx.Sequential(make(BatchNorm))
    assert not evaluates(model.layers[0])
    model.eval()
    assert evaluates(model.layers[0])
    model.train()
    assert not evaluates(model.layers[0])


@needs("nnx.view", flax="0.12.4")
def test_views_share_statistics():
    layer = make(BatchNorm, use_running_average=None)
    before = layer.mean[...]
    assert evaluates(nnx.view(layer, use_running_average=True))
    assert not evaluates(nnx.view(layer, use_running_average=False))
    assert not np.array_equal(layer.mean[...], before)


def test_training_on_one_value_per_channel_is_an_error():
    with pytest.raises(ValueError, match="expected more than 1 value per channel"):
        make(BatchNorm)(jnp.ones((1, 3)))


def test_other_number_of_features_is_an_error():
    with pytest.raises(ValueError, match="x: expected 3 features") as error:
        make(BatchNorm)(jnp.ones((6, 4)))
    assert str(error.value) == (
        "x: expected 3 features along axis -1, got (4,) in x with shape (6, 4); "
        "give the layer that num_features, or the axis that holds the channels"
    )


def test_mode_never_given_is_an_error():
    with pytest.raises(ValueError, match="use_running_average"):
        make(nnx.BatchNorm, use_running_average=None)(batches()[0])
    with pytest.raises(ValueError, match="use_running_average") as error:
        make(BatchNorm, use_running_average=None)(batches()[0])
    assert str(error.value) == (
        "use_running_average: expected True to evaluate or False to train, got None; "
        "pass it to the call or the constructor, or use model.train() and model.eval()"
    )


# A cumulative average that is asked for later.


def test_cumulative_average_without_a_counter_is_an_error():
    xs = batches()
    layer = make(BatchNorm)
    layer.momentum = None
    before = state_of(layer)
    call = nnx.jit(lambda layer, x: layer(x))
    for train in (layer, nnx.merge(*nnx.split(layer))):
        with pytest.raises(ValueError, match="momentum") as error:
            call(train, xs[0])
        assert str(error.value) == (
            "momentum: expected the decay of the running statistics, since this layer has no num_batches_tracked, "
            "got None; construct it with momentum=None, or set that by jaxbn.nnx.replace_batch_norms(model, "
            "momentum=None)"
        )
    assert_close(state_of(layer), before, ulps=0)
    # Evaluation needs no counter.
    layer(xs[0], use_running_average=True)


def test_cumulative_average_with_the_counter_added_later():
    xs = batches()
    layer, expected = replace_batch_norms(make(BatchNorm), momentum=None), make(BatchNorm, momentum=None)
    results = [run(norm, xs) for norm in (layer, expected)]
    assert_close(*results)


def test_cumulative_average_of_batch_renormalization_counts_what_it_has_seen():
    xs = batches()
    layer = BatchRenorm(3, momentum=0.5, limits=(1.0, 0.0), rngs=nnx.Rngs(0))
    layer(xs[0])
    mean = layer.mean[...]
    layer.momentum = None
    layer(xs[1])
    np.testing.assert_allclose(layer.mean[...], (mean + xs[1].mean((0, 1))) / 2, rtol=1e-5)
