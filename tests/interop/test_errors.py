"""One error says all that is wrong, and nothing is loaded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import Small, SmallNNX, draw, shapes_of, small_linen, small_shapes, small_weights

from jaxbn._versions import get_value, set_value
from jaxbn.interop import (
    load_keras,
    load_torch,
    to_torch,
)


@pytest.mark.parametrize("load", [load_torch, load_keras])
def test_random_streams_of_a_model_without_values(load):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(2, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            keys = jax.random.split(rngs.default(), 2)
            self.rows = nnx.vmap(lambda key: nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=key)))(keys)
            self.calls = nnx.Intermediate(jnp.zeros(()))

        def __call__(self, x):
            return self.dropout(self.head(x))

    rngs = nnx.Rngs(0)
    weight, bias = draw(3, 2), draw(3)
    weights = {"head.weight": weight, "head.bias": bias}
    if load is load_keras:
        weights = {"head/kernel": weight.T, "head/bias": bias}
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load(weights, abstract)
    assert str(error.value) == (
        f"{load.__name__}: 2 problems, nothing was loaded\n"
        "  calls: expected a value, since nothing is loaded into it, got only shape and dtype; give it one before, or "
        "load into a model that was built without nnx.eval_shape\n"
        "  rngs: expected nnx.Rngs to fill dropout/rngs, rows/rngs, which have only shape and dtype, got None; "
        "pass rngs=nnx.Rngs(0)"
    )
    set_value(abstract.calls, jnp.zeros(()))
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load(weights, abstract, rngs=nnx.Rngs(dropout=0))
    assert str(error.value) == (
        f"{load.__name__}: 1 problem, nothing was loaded\n"
        "  rngs: expected default, dropout, got dropout; nnx.Rngs(0) has a default for all"
    )
    assert isinstance(get_value(abstract.head.kernel), jax.ShapeDtypeStruct)

    model, _ = load(weights, abstract, rngs=rngs)
    assert get_value(model.dropout.rngs.key) == nnx.Rngs(0)["dropout"]()
    assert model.rows.rngs.key.shape == model.rows.rngs.count.shape == (2,)
    x = draw(4, 2)
    y = nnx.jit(lambda model, x: model(x))(model, x)
    assert 0 < int((y == 0).sum()) < y.size
    model.eval()
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(model, x), x @ weight.T + bias, rtol=1e-5, atol=1e-6)
    # What has values keeps them.
    load(weights, model, rngs=nnx.Rngs(7))
    assert get_value(model.dropout.rngs.key) == nnx.Rngs(0)["dropout"]()


def test_other_collections_without_values():
    cache = {"cache": {"index": jax.ShapeDtypeStruct((), np.int32)}}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(small_weights(), small_shapes() | cache)
    assert str(error.value) == (
        "load_torch: 1 problem, nothing was loaded\n"
        "  cache/index: expected an array, since nothing is loaded into it, got only shape and dtype; leave its "
        "collection out of target"
    )


def test_wrong_arguments():
    target, weights = small_linen(), small_weights()
    cases = [
        (
            lambda: load_torch("weights.pt", target),
            "source: expected a mapping of names to arrays or the path of a .safetensors file, got 'weights.pt'; "
            "pass torch.load('weights.pt', map_location='cpu')",
        ),
        (
            lambda: load_torch([], target),
            "source: expected a mapping of names to arrays or the path of a .safetensors file, got list; "
            "pass model.state_dict(), torch.load(path) or dict(numpy.load(path))",
        ),
        (
            lambda: load_torch(weights, target, rngs=nnx.Rngs(0)),
            "rngs: expected None with Linen variables, which have no random streams, got Rngs",
        ),
        (
            lambda: load_torch(weights, SmallNNX(), rngs=0),
            "rngs: expected flax.nnx.Rngs or None, got int; pass nnx.Rngs(0)",
        ),
        (
            lambda: load_torch(weights, target["params"]),
            "target: expected Linen variables with 'params', 'batch_stats' or both, or an nnx.Module, got a mapping "
            "with 'bn', 'conv', 'head'; pass all of what model.init returns, or the model",
        ),
        (
            lambda: to_torch(Small()),
            "target: expected Linen variables with 'params', 'batch_stats' or both, or an nnx.Module, got Small; "
            "pass all of what model.init returns, or the model",
        ),
        (
            lambda: load_torch(weights, target, kinds={"conv": "transposed", "": "conv", "bn/scale": "conv"}),
            "load_torch: 3 problems, nothing was loaded\n"
            "  kinds: expected as_is or to_heads or from_heads or conv or conv_transpose for 'conv' with 4 axes, "
            "got 'transposed'\n"
            "  kinds: expected the path of a leaf or of a module that has a kernel, got ''\n"
            "  kinds: expected as_is for 'bn/scale' with 1 axes, got 'conv'",
        ),
        (
            lambda: to_torch({name: {"bn": {"mean": jnp.ones(2)}} for name in ("params", "batch_stats")}),
            "target: expected paths that differ without their collection, got 'bn/mean' in both 'params' and "
            "'batch_stats'; load the collections one by one",
        ),
        (
            lambda: load_keras({"bn/gamma": draw(2), "bn/gamma:0": draw(2)}, target),
            "source: expected names that differ without ':0', got some that do not; rename one of each",
        ),
        (
            lambda: load_torch(weights, target, lambda path: 3 if path == "head" else path),
            "load_torch: 3 problems, nothing was loaded\n"
            "  names: expected a name or None for 'head', got 3\n"
            "  head.weight: expected a leaf of the target to take it, got none\n"
            "  head.bias: expected a leaf of the target to take it, got none",
        ),
        (
            lambda: to_torch(small_shapes(), {"bn": None, "head": "conv"}, counters={"bn.num_batches_tracked": 3}),
            "to_torch: 7 problems, nothing was returned\n"
            "  conv/bias: expected an array, got only shape and dtype\n"
            "  conv/kernel: expected an array, got only shape and dtype\n"
            "  head/bias: expected an array, got only shape and dtype\n"
            "  head/kernel: expected an array, got only shape and dtype\n"
            "  conv/bias, head/bias: expected a name for each, got 'conv.bias' for all\n"
            "  conv/kernel, head/kernel: expected a name for each, got 'conv.weight' for all\n"
            "  counters: expected num_batches_tracked of a norm that has no place for it, got 'bn.num_batches_tracked'",
        ),
    ]
    for call, message in cases:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert str(error.value) == message


class Bodied(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Small(name="body")(x)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("model", "rename", "wanted", "came", "example"),
    [
        (
            Small(),
            lambda name: f"module.{name}",
            "bn.running_mean, bn.running_var, bn.bias, ...",
            "module.conv.weight, module.conv.bias, module.head.weight, ...",
            "{'': 'module'}",
        ),
        (
            Bodied(),
            lambda name: name,
            "body.bn.running_mean, body.bn.running_var, body.bn.bias, ...",
            "conv.weight, conv.bias, head.weight, ...",
            "{'body': ''}",
        ),
        (
            Small(),
            lambda name: f"net.{name.replace('bn', 'norm').replace('conv', 'c.0').replace('head', 'fc')}",
            "bn.running_mean, bn.running_var, bn.bias, ...",
            "net.c.0.weight, net.c.0.bias, net.fc.weight, ...",
            "{'bn': 'net.norm'}",
        ),
    ],
)
def test_no_name_fits(model, rename, wanted, came, example, strict):
    weights = {rename(name): v for name, v in small_weights().items()}
    shapes = shapes_of(model, jnp.zeros((2, 3, 3, 4)))
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(weights, shapes, strict=strict)
    assert str(error.value) == (
        "load_torch: 1 problem, nothing was loaded\n"
        f"  names: expected some of 8 names ({wanted}), got 9 others ({came}); pass names, such as names={example}"
    )
    if "norm" not in example:
        load_torch(weights, shapes, eval(example))


def test_no_name_is_alike():
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_keras({"a": draw(2)}, small_linen(), {"head": None})
    assert str(error.value) == (
        "load_keras: 1 problem, nothing was loaded\n  names: expected some of 6 names (bn/moving_mean, "
        "bn/moving_variance, bn/bias, ...), got 1 others (a); pass names"
    )
