"""Integers and booleans into the layers: the numbers of floating-point x, in the dtype that Flax's layers return."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import assert_close

import jaxbn.linen
import jaxbn.nnx

SHAPE = (4, 5, 6)
VALUES = np.random.default_rng(0).integers(0, 255, SHAPE)
MASK = jnp.asarray(np.random.default_rng(1).random(SHAPE) < 0.95)
NORMS = {
    "BatchNorm": {},
    "BatchRenorm": {"limits": (3.0, 5.0)},
    "LayerNorm": {},
    "RMSNorm": {},
    "GroupNorm": {"num_groups": 3},
    "InstanceNorm": {},
}
# Options, the dtype of x, whether the layer evaluates, if it can, and whether there is a mask.
CASES = [
    ({}, "uint8", False, False),
    ({}, "bool", True, True),
    ({"dtype": jnp.bfloat16}, "int32", False, True),
    ({"dtype": jnp.bfloat16}, "uint8", True, False),
    ({"param_dtype": jnp.float16}, "uint8", False, True),
    ({"param_dtype": jnp.float16}, "bool", False, False),
    ({"use_scale": False}, "int32", True, False),
    ({"use_scale": False, "use_bias": False}, "bool", False, True),
    ({"use_scale": False, "use_bias": False}, "int8", True, False),
]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def promotion():
    """Flax's layers promote integers."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def linen(module, name, options, x, evaluate, mask):
    """The output and the variables after it, of a layer that has trained once."""
    batch = "Batch" in name
    layer = getattr(module, name)(**options, **({"use_running_average": evaluate} if batch else {}))
    variables = layer.init(jax.random.key(0), x)
    return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])


def nnx_layer(module, name, options, x, evaluate, mask):
    layer = getattr(module, name)(SHAPE[-1], **options, rngs=nnx.Rngs(0))
    if evaluate:
        layer.eval()
    y = layer(x, mask=mask)
    return y, nnx.to_pure_dict(nnx.state(layer))


@pytest.mark.parametrize("run", [linen, nnx_layer])
@pytest.mark.parametrize("name", NORMS)
def test_integers(run, name):
    ours, flax = (jaxbn.linen, nn) if run is linen else (jaxbn.nnx, nnx)
    for options, dtype, evaluate, masked in CASES:
        if name == "RMSNorm" and "use_bias" in options:
            continue
        values = {"bool": VALUES % 2, "int8": VALUES // 2, "uint8": VALUES, "int32": VALUES * 12345}[dtype]
        x = jnp.asarray(values, dtype)
        rest = x, evaluate, MASK if masked else None
        actual = run(ours, name, options | NORMS[name], *rest)
        float_options = {"dtype": actual[0].dtype} | options | NORMS[name]
        assert_close(actual, run(ours, name, float_options, x.astype(jnp.float32), *rest[1:]), 0)
        if name != "BatchRenorm":
            expected = jax.eval_shape(lambda: run(flax, name, options | NORMS[name], *rest))  # noqa: B023
            assert actual[0].dtype == expected[0].dtype, (options, dtype)


@pytest.mark.parametrize("dtype", ["uint8", "bool"])
def test_float64_results(dtype, x64):
    x = jnp.asarray(VALUES > 99 if dtype == "bool" else VALUES, dtype)
    for layer in (jaxbn.linen.LayerNorm(param_dtype=jnp.float64), jaxbn.linen.LayerNorm(dtype=jnp.float64)):
        y, _ = layer.init_with_output(jax.random.key(0), x)
        wide = np.asarray(x, np.float64)
        expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
        assert y.dtype == np.float64
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", [jaxbn.linen, jaxbn.nnx])
def test_what_is_no_number(module):
    layer = module.LayerNorm() if module is jaxbn.linen else module.LayerNorm(2, rngs=nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(TypeError) as error:
        layer.init(jax.random.key(0), keys) if module is jaxbn.linen else layer(keys)
    assert str(error.value) == (
        "x: expected a floating-point array, got key<fry>; convert it, for example with x.astype(jnp.float32)"
    )
