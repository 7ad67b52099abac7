"""Layouts, held to what the layers of PyTorch are defined to compute, in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import needs
from weights import assert_same_bits, draw, shapes_of, torch_conv, torch_conv_transpose

import jaxbn.linen
import jaxbn.nnx
from jaxbn.interop import (
    load_torch,
    to_torch,
)

CONVS = [
    # window, in, out, groups, stride, padding, dilation
    ((3,), 2, 4, 1, 2, 1, 1),
    ((3, 2), 3, 3, 1, 1, 0, 2),
    ((3, 3), 4, 6, 2, 2, 1, 1),
    ((3, 3), 3, 6, 3, 1, 1, 1),  # depthwise, multiplier 2
    ((2, 1, 3), 2, 4, 1, 1, 1, 1),
]


@pytest.mark.parametrize("flax", ["linen", "nnx"])
@pytest.mark.parametrize("case", CONVS, ids=str)
def test_conv(case, flax):
    window, ins, outs, groups, stride, padding, dilation = case
    x = draw(2, ins, *(6, 5, 4)[: len(window)])
    weights = {"c.weight": draw(outs, ins // groups, *window, seed=1), "c.bias": draw(outs, seed=2)}
    expected = torch_conv(*map(np.float64, (x, weights["c.weight"])), groups, stride, padding, dilation)
    expected = np.moveaxis(expected, 1, -1) + weights["c.bias"]
    options = {
        "strides": stride,
        "padding": padding,
        "kernel_dilation": dilation,
        "feature_group_count": groups,
    }
    check_layer(flax, nn.Conv(outs, window, **options), (ins, outs, window, options), nnx.Conv, x, weights, expected)


def check_layer(flax, linen_layer, nnx_arguments, nnx_layer, x, weights, expected, kinds=None):
    x = jnp.asarray(np.moveaxis(x, 1, -1))
    if flax == "linen":
        variables, _ = load_torch(weights, shapes_of(linen_layer, x), {"": "c"}, kinds=kinds)
        y, back = linen_layer.apply(variables, x), to_torch(variables, {"": "c"}, kinds=kinds)
    else:
        *arguments, options = nnx_arguments
        # NNX knows its modules, and needs no kinds.
        model = nnx.eval_shape(lambda: nnx_layer(*arguments, **options, rngs=nnx.Rngs(0)))
        layer, _ = load_torch(weights, model, {"": "c"})
        y, back = layer(x), to_torch(layer, {"": "c"})
    np.testing.assert_allclose(y, expected, atol=2e-5)
    assert_same_bits(back, {name: weights[name] for name in back})
    assert back.keys() == weights.keys()


@pytest.mark.parametrize("flax", ["linen", "nnx"])
@pytest.mark.parametrize("transpose_kernel", [True, False])
@pytest.mark.parametrize(
    "case",
    [((3,), 2, 4, 2, 1, 1, 1), ((3, 2), 3, 3, 2, 0, 0, 2), ((4, 3), 3, 3, 2, 1, 0, 1), ((2, 1, 3), 2, 4, 1, 0, 0, 1)],
    ids=str,
)
def test_conv_transpose(case, transpose_kernel, flax):
    window, ins, outs, stride, padding, output_padding, dilation = case
    x = draw(2, ins, *(4, 5, 3)[: len(window)])
    weights = {"c.weight": draw(ins, outs, *window, seed=1), "c.bias": draw(outs, seed=2)}
    expected = torch_conv_transpose(
        *map(np.float64, (x, weights["c.weight"])), stride, padding, output_padding, dilation
    )
    expected = np.moveaxis(expected, 1, -1) + weights["c.bias"]
    low = [dilation * (k - 1) - padding for k in window]
    options = {
        "strides": (stride,) * len(window),
        "padding": [(n, n + output_padding) for n in low],
        "kernel_dilation": (dilation,) * len(window),
        "transpose_kernel": transpose_kernel,
    }
    check_layer(
        flax,
        nn.ConvTranspose(outs, window, **options),
        (ins, outs, window, options),
        nnx.ConvTranspose,
        x,
        weights,
        expected,
        None if transpose_kernel else {"": "conv_transpose"},
    )


@pytest.mark.parametrize("flax", ["linen", "nnx"])
def test_dense(flax):
    x, weights = draw(2, 3), {"c.weight": draw(4, 3, seed=1), "c.bias": draw(4, seed=2)}
    expected = x @ weights["c.weight"].T + weights["c.bias"]
    check_layer(flax, nn.Dense(4), (3, 4, {}), nnx.Linear, x, weights, expected)


class Mixed(nn.Module):
    """Norms and embeddings, and a parameter of its own."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(5, 4, name="tokens")(tokens) + self.param("position", nn.initializers.zeros_init(), (1, 3, 4))
        x = jaxbn.linen.RMSNorm(name="rms")(jaxbn.linen.LayerNorm(name="ln")(x))
        return jaxbn.linen.GroupNorm(num_groups=2, name="gn")(x)


def test_norms_and_embeddings():
    weights = {"tokens.weight": draw(5, 4), "position": draw(1, 3, 4), "rms.weight": draw(4)}
    weights |= {f"{norm}.{name}": draw(4) for norm in ("ln", "gn") for name in ("weight", "bias")}
    variables, report = load_torch(weights, shapes_of(Mixed(), jnp.zeros((1, 3), int)))
    np.testing.assert_array_equal(variables["params"]["tokens"]["embedding"], weights["tokens.weight"])
    np.testing.assert_array_equal(variables["params"]["rms"]["scale"], weights["rms.weight"])
    assert report.used["position"] == "position"
    assert_same_bits(dict(sorted(to_torch(variables).items())), dict(sorted(weights.items())))


@pytest.mark.parametrize("flax", ["linen", pytest.param("nnx", marks=needs("nnx.PReLU", flax="0.12.0"))])
def test_prelu(flax):
    x, weights = draw(2, 3), {"c.weight": draw(1, seed=1)}
    expected = np.where(x > 0, x, x * weights["c.weight"])
    check_layer(flax, nn.PReLU(), ({},), lambda rngs: nnx.PReLU(), x, weights, expected)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_value_with_and_without_an_axis(shape):
    target = {"params": {"logit_scale": jnp.zeros(shape), "bn": {"scale": jnp.zeros(1)}}}
    for theirs in ((), (1,)):
        weights = {"logit_scale": np.full(theirs, 2, np.float32), "bn.weight": np.full(theirs, 3, np.float32)}
        filled, _ = load_torch(weights, target)
        assert filled["params"]["logit_scale"].shape == shape
        assert jax.tree.map(float, jax.tree.map(jnp.squeeze, filled["params"])) == {
            "logit_scale": 2,
            "bn": {"scale": 3},
        }


@pytest.mark.parametrize(("theirs", "ours"), [((1, 1), (1,)), ((1,), (1, 1)), ((1,), (2,)), ((3,), ())])
def test_other_shapes_are_not_one_value(theirs, ours):
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch({"a": draw(*theirs)}, {"params": {"a": jnp.zeros(ours)}})
    assert str(error.value) == (
        f"load_torch: 1 problem, nothing was loaded\n  a: expected 'a' with shape {ours}, got {theirs}"
    )
