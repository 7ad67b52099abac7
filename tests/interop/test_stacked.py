"""Layers that the target has stacked and PyTorch one by one, both ways."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import assert_same_bits, draw, shapes_of

import jaxbn.linen
import jaxbn.nnx
from jaxbn.interop import load_torch, to_torch

WIDTH, LAYERS = 4, 3


def entries(name, i=0):
    """The weights of one block, with a weight of each layout."""
    weights = {"att.in_proj_weight": (12, 4), "att.in_proj_bias": (12,)}
    weights |= {"att.out_proj.weight": (4, 4), "att.out_proj.bias": (4,), "fc.weight": (4, 4), "fc.bias": (4,)}
    weights |= {"conv.weight": (4, 4, 3), "conv.bias": (4,), "act.weight": (1,)}
    weights |= {f"bn.{n}": (4,) for n in ("weight", "bias", "running_mean", "running_var")}
    drawn = {f"{name}.{k}": draw(*shape, seed=7 * i + j) for j, (k, shape) in enumerate(weights.items())}
    drawn[f"{name}.bn.running_var"] **= 2
    return drawn | {f"{name}.bn.num_batches_tracked": np.array(5 + i)}


class Block(nn.Module):
    """A block with the signature that scan wants: a carry, and nothing for each step."""

    momentum: float | None = 0.9

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(2, name="att")(x, x)
        x = nn.PReLU(name="act")(nn.Dense(WIDTH, name="fc")(x))
        x = nn.Conv(WIDTH, (3,), name="conv")(x)
        return jaxbn.linen.BatchNorm(True, momentum=self.momentum, name="bn")(x), None


def scan(block, length, name):
    axes = {"params": 0, "batch_stats": 0}
    return nn.scan(block, variable_axes=axes, split_rngs={"params": True}, length=length)(name=name)


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scan(Block, LAYERS, "layers")(x, None)[0]


def one_by_one(x, weights, names):
    """The blocks, each loaded for itself."""
    for name in names:
        own = {k.removeprefix(f"{name}."): v for k, v in weights.items() if k.startswith(f"{name}.")}
        variables, _ = load_torch(own, shapes_of(Block(), x))
        x = Block().apply(variables, x)[0]
    return x


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (None, "layers.*"),
        ({"layers": "layers.*"}, "layers.*"),
        ({"layers": "h_*.block"}, "h_*.block"),
        (lambda path: f"net.{path.replace('/', '.')}", "net.layers.*"),
    ],
)
def test_scanned_layers(names, pattern):
    x = jnp.asarray(draw(2, 5, WIDTH))
    blocks = [pattern.replace("*", str(i)) for i in range(LAYERS)]
    weights = {k: v for i, name in enumerate(blocks) for k, v in entries(name, i).items()}
    weights = dict(sorted(weights.items(), reverse=True))
    variables, report = load_torch(weights, shapes_of(Scanned(), x), names)
    assert (report.left_over, report.missing) == ((), {})
    assert report.used["layers/att/query/bias"] == f"{pattern}.att.in_proj_bias"
    assert report.counters == {f"{name}.bn.num_batches_tracked": 5 + i for i, name in enumerate(blocks)}
    y = Scanned().apply(variables, x)
    np.testing.assert_allclose(y, one_by_one(x, weights, blocks), rtol=1e-5, atol=1e-5)
    back = to_torch(variables, report.used, counters=report.counters)
    assert_same_bits(dict(sorted(back.items(), reverse=True)), weights)
    if isinstance(names, dict):
        assert_same_bits(to_torch(variables, names, counters=report.counters), back)


def test_more_than_ten_layers():
    layer = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=12)(2)
    weights = {f"m.{i}.{n}": draw(*s, seed=i) for i in range(12) for n, s in (("weight", (2, 3)), ("bias", (2,)))}
    variables, _ = load_torch(weights, shapes_of(layer, jnp.zeros((12, 3))), {"": "m.*"})
    for i in range(12):
        np.testing.assert_array_equal(variables["params"]["kernel"][i], weights[f"m.{i}.weight"].T)
    back = to_torch(variables, {"": "m.*"})
    assert_same_bits({name: back[name] for name in weights}, weights)


class Pair(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return scan(Inner, 2, "blocks")(x, None)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(WIDTH, name="fc")(x), None


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        return scan(Pair, 3, "stages")(x, None)[0]


@pytest.mark.parametrize("names", [None, {"stages": "stages.*", "stages/blocks": "stages.*.blocks.*"}])
def test_scanned_twice(names):
    x = jnp.asarray(draw(2, WIDTH))
    weights, expected = {}, np.float64(x)
    for i, j in np.ndindex(3, 2):
        weight, bias = draw(4, 4, seed=i + 9 * j), draw(4, seed=i + 9 * j)
        weights |= {f"stages.{i}.blocks.{j}.fc.weight": weight, f"stages.{i}.blocks.{j}.fc.bias": bias}
        expected = expected @ weight.T + bias
    variables, report = load_torch(weights, shapes_of(Twice(), x), names)
    np.testing.assert_allclose(Twice().apply(variables, x), expected, rtol=1e-4)
    assert report.used["stages/blocks/fc/kernel"] == "stages.*.blocks.*.fc.weight"
    back = to_torch(variables, report.used)
    assert_same_bits({name: back[name] for name in weights}, weights)


class StackedNNX(nnx.Module):
    def __init__(self):
        self.layers = nnx.vmap(lambda key: NNXBlock(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), LAYERS))

    def __call__(self, x):
        return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)
        self.bn = jaxbn.nnx.BatchNorm(WIDTH, momentum=None, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.fc(x))


def test_stacked_nnx_modules():
    model, x = StackedNNX(), jnp.asarray(draw(2, WIDTH))
    whole = {k: v for i in range(LAYERS) for k, v in entries(f"layers.{i}", i).items()}
    weights = {k: v for k, v in whole.items() if ".bn." in k or ".fc.weight" in k}
    model, report = load_torch(weights, model)
    expected = np.float64(x)
    for i in range(LAYERS):
        own = {k.removeprefix(f"layers.{i}."): np.float64(v) for k, v in weights.items() if f"layers.{i}." in k}
        expected = (expected @ own["fc.weight"].T - own["bn.running_mean"]) / np.sqrt(own["bn.running_var"] + 1e-5)
        expected = expected * own["bn.weight"] + own["bn.bias"]
    np.testing.assert_allclose(model(x), expected, rtol=1e-3, atol=1e-4)
    assert report.used["layers/bn/num_batches_tracked"] == "layers.*.bn.num_batches_tracked"
    for names in (report.used, {"layers": "layers.*"}):
        back = to_torch(model, names)
        assert_same_bits({name: back[name] for name in weights}, weights)
    with pytest.raises(ValueError, match="nothing was returned") as error:
        to_torch(model)
    assert str(error.value) == (
        "to_torch: 1 problem, nothing was returned\n"
        "  layers/fc/kernel: expected a name with 1 *, in place of the numbers of the layers that are stacked along "
        "the first axes of (3, 4, 4), got 'layers.fc.weight'; pass such names, or names=report.used of load_torch"
    )


def dense(layers=LAYERS, inputs=WIDTH):
    return {"params": {"m": {"kernel": jnp.zeros((layers, inputs, WIDTH)), "bias": jnp.zeros((layers, WIDTH))}}}


def linears(pattern, numbers, inputs=WIDTH):
    named = ((pattern.replace("*", str(i)), i) for i in numbers)
    return {
        k: v for n, i in named for k, v in ((f"{n}.weight", draw(WIDTH, inputs, seed=i)), (f"{n}.bias", draw(WIDTH)))
    }


@pytest.mark.parametrize(
    ("weights", "names", "lines"),
    [
        (
            linears("m.*", (0, 1)),
            {"m": "m.*"},
            [
                "m/bias: expected 'm.*.bias' with a number from 0 for each entry along the first 1 of the axes (3, 4), "
                "got 2 such names",
                "m/kernel: expected 'm.*.weight' with a number from 0 for each entry along the first 1 of the axes "
                "(3, 4, 4), got 2 such names",
            ],
        ),
        (
            linears("m.*", range(3), inputs=5),
            None,
            ["m/kernel: expected 'm.0.weight' with shape (4, 4), got (4, 5)"],
        ),
        (
            linears("m.*", range(3)) | linears("*.m", range(3)),
            None,
            [
                "m/bias: expected one way to number its stacked layers, got '*.m.bias', 'm.*.bias'; pass one of them "
                "in names",
                "m/kernel: expected one way to number its stacked layers, got '*.m.weight', 'm.*.weight'; pass one of "
                "them in names",
            ],
        ),
    ],
)
def test_errors(weights, names, lines):
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(weights, dense(), names)
    assert [line for line in str(error.value).split("\n  ")[1:] if "expected a leaf" not in line] == lines


def test_wrong_numbers():
    weights = linears("m.*", (1, 2, 3)) | {"a.weight": draw(2)}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(weights, {"params": {**dense()["params"], "a": {"scale": jnp.zeros(2)}}})
    assert str(error.value).split("\n  ")[1:3] == [
        "m/bias: expected 'm.bias' in the source, got no such name; as a stack of layers along its first axis it needs "
        "'m.*.bias' with the numbers 0 to 2, got 1, 2, 3",
        "m/kernel: expected 'm.weight' in the source, got no such name; as a stack of layers along its first axis it "
        "needs 'm.*.weight' with the numbers 0 to 2, got 1, 2, 3",
    ]


def test_numbers_are_no_stack_where_the_axes_do_not_show_one():
    """Three linear layers are not the vector of three values that has no entry."""
    target = {"params": {"m": {"bias": jnp.zeros(3)}, "a": {"scale": jnp.zeros(2)}}}
    weights = {f"m.{i}.bias": draw(3) for i in range(3)} | {"a.weight": draw(2)}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(weights, target)
    assert str(error.value).split("\n  ")[1] == "m/bias: expected 'm.bias' in the source, got no such name"


def test_axes_that_do_not_show_whether_they_are_stacked():
    """A kernel (4, 4, 2) with a bias (4, 2) is one layer with two axes of outputs, or four layers."""
    kernel, bias = jnp.asarray(draw(4, 4, 2)), jnp.asarray(draw(4, 2))
    target = {"params": {"m": {"kernel": kernel, "bias": bias}}}
    with pytest.raises(ValueError, match="nothing was returned") as error:
        to_torch(target)
    assert str(error.value) == (
        "to_torch: 1 problem, nothing was returned\n"
        "  m/kernel: expected kinds or names to show whether (4, 4, 2) are the axes of one layer or of stacked layers, "
        "got neither; pass kinds 'to_heads' for [in, heads, head_dim], or names with * for numbers of layers"
    )
    one = to_torch(target, kinds={"m": "to_heads"})
    np.testing.assert_array_equal(one["m.weight"], kernel.reshape(4, 8).T)
    np.testing.assert_array_equal(one["m.bias"], bias.reshape(8))
    four = to_torch(target, {"m": "m.*"})
    np.testing.assert_array_equal(four["m.3.weight"], kernel[3].T)
    for weights, kinds in ((one, {"m": "to_heads"}), (one, None), (four, None)):
        filled, _ = load_torch(weights, jax.tree.map(jnp.zeros_like, target), kinds=kinds)
        jax.tree.map(np.testing.assert_array_equal, filled, target)
