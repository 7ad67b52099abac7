"""Do the layers besides batch norm take the place of Flax's, in Linen and in NNX, and are they the functions?"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import DTYPES, assert_close, batches, mask_of
from marks import grid
from parallel import AXIS, P, mesh
from versions import is_older

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams

SHAPE = (4, 3, 5, 6)
X = batches(1, SHAPE)[0]
NORMAL = jax.nn.initializers.normal(1.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its options, and the function that it is."""

    layer: str
    function: Callable
    features: tuple[int, ...] = (-1,)
    options: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        return "-".join([self.layer, *(f"{k}={v}" for k, v in self.options.items())])


def layer(**options):
    return functools.partial(jaxbn.layer_norm, **options)


def rms(**options):
    return functools.partial(jaxbn.rms_norm, **options)


def group(groups, **options):
    return lambda x, params, **more: jaxbn.group_norm(x, params, groups, **options, **more)


def instance(x, params, **options):
    return jaxbn.instance_norm_train(x, params, None, **options)[0]


CASES = [
    Case("LayerNorm", layer()),
    Case("LayerNorm", layer(), options={"use_bias": False}),
    Case("LayerNorm", layer(), options={"use_scale": False, "epsilon": 0.1}),
    Case("LayerNorm", layer(), options={"use_scale": False, "use_bias": False}),
    Case("LayerNorm", layer(axis=(1, 2, 3), params_axis=-1), options={"reduction_axes": (1, 2, 3)}),
    Case("LayerNorm", layer(axis=(1, 2), params_axis=3), options={"reduction_axes": (1, 2), "feature_axes": 3}),
    Case("LayerNorm", layer(axis=(2, 3)), (2, 3), {"reduction_axes": (2, 3), "feature_axes": (2, 3)}),
    Case("RMSNorm", rms()),
    Case("RMSNorm", rms(), options={"use_scale": False, "epsilon": 0.1}),
    Case("RMSNorm", rms(axis=(1, 3)), (1, 3), {"reduction_axes": (1, 3), "feature_axes": (1, 3)}),
    Case("GroupNorm", group(3), options={"num_groups": 3}),
    Case("GroupNorm", group(3), options={"num_groups": None, "group_size": 2, "use_bias": False}),
    Case("GroupNorm", group(1), options={"num_groups": 1, "epsilon": 0.1}),
    Case("InstanceNorm", instance),
    Case("InstanceNorm", instance, options={"use_scale": False, "epsilon": 0.1}),
    Case("InstanceNorm", functools.partial(instance, axis=(1, 3)), (1, 3), {"feature_axes": (1, 3)}),
]
# Flax's NNX layer gets this one wrong: it repeats the groups along axis 1 whatever the axes.
FRAMES = Case("GroupNorm", group(3, batch_axis=(0, 1)), options={"num_groups": 3, "reduction_axes": (2, 3)})
OURS = {"linen": jaxbn.linen, "nnx": jaxbn.nnx}
FLAX = {"linen": nn, "nnx": nnx}


def layer_of(library, api, name):
    if library is FLAX and (api, name) == ("nnx", "InstanceNorm") and is_older("flax", "0.12.0"):
        pytest.skip("needs flax 0.12.0: nnx.InstanceNorm")
    return getattr(library[api], name)


every_api = pytest.mark.parametrize("api", OURS)
FIRSTS = [CASES[0], CASES[7], CASES[10], CASES[13]]
every_case = grid("case", CASES, quick=lambda case: case in FIRSTS, ids=str)
every_layer = pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
one_of_each = pytest.mark.parametrize("case", FIRSTS, ids=str)


def make(library, api, case, *, x=X, **options):
    """Variables of the layer, by name, and the layer as a function of them, x and options of the call."""
    random = {"scale_init": NORMAL, "bias_init": NORMAL} if case.layer != "RMSNorm" else {"scale_init": NORMAL}
    if library is FLAX:
        options["use_fast_variance"] = False
    options = random | case.options | options
    layer = layer_of(library, api, case.layer)
    if api == "linen":
        module = layer(**options)
        variables = module.init(jax.random.key(0), x).get("params", {})
        return variables, lambda v, x, **more: module.apply({"params": v}, x, **more)
    module = layer(math.prod(x.shape[a] for a in case.features), rngs=nnx.Rngs(0), **options)

    def call(variables, x, **more):
        own = nnx.clone(module)
        nnx.update(own, variables)
        return own(x, **more)

    return nnx.to_pure_dict(nnx.state(module)), call


# The interface.


@every_layer
def test_linen_has_flax_fields(name):
    ours, theirs = (dataclasses.fields(getattr(library["linen"], name)) for library in (OURS, FLAX))
    assert [(f.name, f.default, f.kw_only) for f in ours] == [(f.name, f.default, f.kw_only) for f in theirs]


@every_layer
@every_api
def test_constructor_call_and_class_are_those_of_flax(api, name):
    ours, theirs = (layer_of(library, api, name) for library in (OURS, FLAX))
    assert issubclass(ours, theirs)

    def kinds(function):
        # The initializers that are NNX's defaults are new functions in each call of what makes them.
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, "initializer" if p.name.endswith("_init") else p.default) for p in parameters]

    # In NNX, the signature of Flax's class is that of its metaclass.
    assert kinds(ours) == kinds(theirs.__init__)[1:]
    # A mask may be given by position too.
    assert [(name, default) for name, _, default in kinds(ours.__call__)] == [
        (name, default) for name, _, default in kinds(theirs.__call__)
    ]


@every_api
@every_case
def test_variables_are_those_of_flax(api, case):
    for param_dtype in (jnp.float32, jnp.bfloat16) if case in FIRSTS else (jnp.float32,):
        with jax.numpy_dtype_promotion("standard"):
            ours, theirs = (make(library, api, case, param_dtype=param_dtype)[0] for library in (OURS, FLAX))
        assert_close(ours, theirs, ulps=0)


# Flax's numbers.


# The first of each kind in both, the others in turn, which share everything below.
NUMBERS = [(api, case) for k, case in enumerate(CASES) for a, api in enumerate(OURS) if case in FIRSTS or (k + a) % 2]


@grid(("api", "case"), NUMBERS, quick=lambda case: case[1] in FIRSTS, ids=str)
def test_numbers_and_gradients_are_those_of_flax_with_its_variables(api, case):
    masked = (CASES.index(case) // 2 + (api == "nnx")) % 2 > 0
    # Of one value, or of two, the derivative would be nothing but rounding: here three count at least.
    mask = np.indices(SHAPE).sum(0) % 3 > 0 if masked else None
    weight = jnp.where(mask, X[::-1], 0) if masked else X[::-1]

    def results(library):
        _, call = make(library, api, case)
        variables, _ = make(FLAX, api, case)

        def loss(variables, x):
            y = call(variables, x, mask=mask)
            return jnp.sum(weight * jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables, X)

    ((_, y), gradients), ((_, expected), expected_gradients) = results(OURS), results(FLAX)
    assert_close(y, expected, ulps=8)
    assert_close(gradients, expected_gradients, ulps=32)


def test_frames_are_those_of_linen():
    variables, flax = make(FLAX, "linen", FRAMES)
    for api in OURS:
        _, ours = make(OURS, api, FRAMES)
        assert_close(ours(variables, X), flax(variables, X), ulps=8)


@pytest.mark.slow
@pytest.mark.parametrize(("api", "shape"), [("linen", (5, 6)), ("linen", (6,)), ("nnx", (5, 6)), ("nnx", (3, 1, 1))])
@pytest.mark.parametrize("case", [CASES[0], CASES[7], CASES[13]], ids=str)
def test_masks_broadcast_as_in_flax(api, case, shape):
    mask = mask_of(shape)
    (variables, flax), (_, ours) = (make(library, api, case) for library in (FLAX, OURS))
    expected = flax(variables, X, mask=mask)
    # Where nothing counts, Flax has NaN.
    counts = jnp.isfinite(expected)
    actual = ours(variables, X, mask=mask)
    assert jnp.isfinite(actual).all()
    assert_close(jnp.where(counts, actual, 0), jnp.where(counts, expected, 0), ulps=8)


@pytest.mark.slow
@every_api
@one_of_each
def test_dtypes_are_those_of_flax(api, case):
    def dtypes(library, x_dtype, dtype, param_dtype):
        def init_and_call(x):
            variables, call = make(library, api, case, x=x, dtype=dtype, param_dtype=param_dtype)
            return variables, call(variables, x)

        result = jax.eval_shape(init_and_call, jax.ShapeDtypeStruct(SHAPE, x_dtype))
        return jax.tree.map(lambda v: v.dtype, result)

    with jax.numpy_dtype_promotion("standard"):
        assert [dtypes(OURS, *d) for d in DTYPES] == [dtypes(FLAX, *d) for d in DTYPES]


# The functions' numbers.


@every_api
@grid(
    ("case", "more"),
    [*((case, {}) for case in [*CASES, FRAMES]), *((case, {"dtype": jnp.bfloat16}) for case in FIRSTS)],
    quick=lambda case: case[0] in FIRSTS,
    ids=str,
)
def test_layer_is_the_function_bit_for_bit(api, case, more):
    variables, call = make(OURS, api, case, **more)
    # NNX keeps several feature axes as one.
    shape = tuple(SHAPE[a] for a in case.features)
    params = BatchNormParams(*(v.reshape(shape) if v is not None else v for v in map(variables.get, ("scale", "bias"))))
    eps = case.options.get("epsilon", 1e-6)
    for mask in (None, mask_of(SHAPE)):
        actual = call(variables, X, mask=mask)
        np.testing.assert_array_equal(actual, case.function(X, params, eps=eps, mask=mask, **more))


# Beyond Flax.


@every_api
@pytest.mark.parametrize(
    ("case", "shape"),
    [(Case("GroupNorm", None, options={"num_groups": 6}), (4, 6)), (CASES[13], (4, 1, 1, 6))],
    ids=str,
)
def test_one_value_is_an_error_but_not_in_initialization(api, case, shape):
    variables, call = make(OURS, api, case, x=jnp.ones(shape))
    with pytest.raises(ValueError, match="more than 1 value") as raised:
        call(variables, jnp.ones(shape))
    assert str(raised.value).startswith(f"x: expected more than 1 value to take each statistic over, got shape {shape}")


ERRORS = [
    (CASES[0], {"reduction_axes": 4}, X, "reduction_axes: expected axes in [-4, 3] for x with 4 dimensions, got 4"),
    (CASES[0], {"feature_axes": (1, 1)}, X, "feature_axes: expected each axis once, got (1, 1)"),
    (CASES[0], {"epsilon": -1.0}, X, "epsilon: expected a finite number of at least 0, got -1.0"),
    (CASES[10], {"reduction_axes": (1, 2)}, X, "reduction_axes: expected the last axis among them, which holds the"),
    (CASES[13], {"feature_axes": (0, 3)}, X, "feature_axes: expected axes other than the first, along which examples"),
    (CASES[0], {}, np.ones(SHAPE).tolist(), "x: expected an array, got list"),
]


@every_api
@pytest.mark.parametrize(("case", "options", "x", "message"), ERRORS, ids=range(len(ERRORS)))
def test_errors_name_what_flax_names(api, case, options, x, message):
    layer = functools.partial(getattr(OURS[api], case.layer), **case.options | options)
    call = layer(6, rngs=nnx.Rngs(0)) if api == "nnx" else functools.partial(layer().init, jax.random.key(0))
    with pytest.raises((ValueError, TypeError)) as raised:
        call(x)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": None}, "num_groups, group_size: expected one number and one None, got None and None; with"),
        ({"group_size": 2}, "num_groups, group_size: expected one number and one None, got 32 and 2; with"),
        ({"num_groups": None, "group_size": 4}, "group_size: expected a divisor of the 6 channels of x with shape"),
        ({"num_groups": None, "group_size": 0}, "group_size: expected a divisor of the 6 channels of x with shape"),
        ({}, "num_groups: expected a divisor of the 6 channels of x with shape (4, 3, 5, 6), got 32; all groups"),
    ],
)
def test_errors_of_linen_groups(options, message):
    with pytest.raises(ValueError, match="expected") as raised:
        jaxbn.linen.GroupNorm(**options).init(jax.random.key(0), X)
    assert str(raised.value).startswith(message)


def test_nnx_knows_its_number_of_features():
    for layer in (jaxbn.nnx.LayerNorm, jaxbn.nnx.RMSNorm, jaxbn.nnx.InstanceNorm):
        with pytest.raises(ValueError, match="expected 5 features") as raised:
            layer(5, rngs=nnx.Rngs(0))(X)
        assert str(raised.value) == (
            "x: expected 5 features along axes (3,), got (6,) in x with shape (4, 3, 5, 6); give the layer that "
            "num_features, or the axes along which scale and bias vary"
        )


# Which axis of x the devices divide, such that statistics are of all of it.
DIVIDED = [(CASES[0], 3), (CASES[4], 1), (CASES[7], 3), (CASES[10], 1), (CASES[13], 2)]


@pytest.mark.slow
@every_api
@pytest.mark.parametrize(("case", "axis"), DIVIDED, ids=str)
def test_devices_that_have_parts_of_each_example(api, case, axis):
    masked = (CASES.index(case) + (api == "nnx")) % 2 > 0
    shape = tuple(4 if a == axis else n for a, n in enumerate(SHAPE))
    x, mask, weight = batches(1, shape)[0], mask_of(shape) if masked else None, batches(2, shape)[1]
    if masked:
        weight = jnp.where(mask, weight, 0)
    # Linen initializes outside of any mapped function.
    variables, whole = make(OURS, api, case, x=x)
    part = x[:, :, :, :2] if axis == 3 else x
    _, divided = make(OURS, api, case, x=part, axis_name=AXIS)

    def gradients(call):
        def loss(variables, x, mask, weight):
            y = call(variables, x, mask=mask)
            return jnp.sum(weight * jnp.sin(y)), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)

    (_, y), (dvariables, dx) = jax.jit(gradients(whole))(variables, x, mask, weight)

    def on_each(variables, x, mask, weight):
        (_, y), (dvariables, dx) = gradients(divided)(variables, x, mask, weight)
        return y, dvariables, dx

    spec = P(*(AXIS if a == axis else None for a in range(4)))
    params_spec = P(AXIS) if axis - 4 in case.features else P()
    mapped = jax.shard_map(
        on_each, mesh=mesh(2), in_specs=(params_spec, spec, spec, spec), out_specs=(spec, params_spec, spec)
    )
    result = jax.jit(mapped)(variables, x, mask, weight)
    assert_close(result, (y, dvariables, dx), ulps=32)
