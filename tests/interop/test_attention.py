"""Attention, held to torch.nn.MultiheadAttention by its definition, in float64, and live where torch is installed."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import assert_same_bits, draw, shapes_of

from jaxbn.interop import load_keras, load_torch, to_torch

WIDTH, HEADS = 6, 2
ROLES = ("query", "key", "value")


def attend(q, k, v, out, bias):
    """Attention of projected q, k, v [N, T, heads * head_dim], by the definition of torch.nn.MultiheadAttention."""
    q, k, v = (x.reshape(*x.shape[:2], HEADS, -1) for x in (q, k, v))
    scores = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("nhqk,nkhd->nqhd", weights, v).reshape(*q.shape[:2], -1) @ out.T + bias


def torch_weights(widths=(WIDTH, WIDTH, WIDTH), form="in_proj", bias=True):
    """The entries of torch.nn.MultiheadAttention, or of four linear layers, after "att."."""
    parts = {role: draw(WIDTH, n, seed=i) for i, (role, n) in enumerate(zip(ROLES, widths, strict=True))}
    biases = {role: draw(WIDTH, seed=5 + i) for i, role in enumerate(ROLES)}
    out, out_bias = draw(WIDTH, WIDTH, seed=3), draw(WIDTH, seed=4)
    if form == "linear":
        weights = {f"att.{role}.weight": v for role, v in parts.items()} | {"att.out.weight": out}
        biases = {f"att.{role}.bias": v for role, v in biases.items()} | {"att.out.bias": out_bias}
        return weights | biases if bias else weights
    weights = {"att.out_proj.weight": out}
    if form == "in_proj":
        weights["att.in_proj_weight"] = np.concatenate([*parts.values()])
    else:
        weights |= {f"att.{role[0]}_proj_weight": v for role, v in parts.items()}
    biases = {"att.in_proj_bias": np.concatenate([*biases.values()]), "att.out_proj.bias": out_bias}
    return weights | biases if bias else weights


def expected_of(weights, inputs):
    """What these entries compute, in float64."""
    weights = {name.removeprefix("att."): np.float64(v) for name, v in weights.items()}
    inputs = [np.float64(x) for x in inputs]
    if "in_proj_weight" in weights:
        parts = np.split(weights["in_proj_weight"], 3)
    else:
        parts = [weights.get(f"{r}.weight", weights.get(f"{r[0]}_proj_weight")) for r in ROLES]
    zeros = np.zeros(WIDTH)
    biases = np.split(weights.get("in_proj_bias", np.concatenate([weights.get(f"{r}.bias", zeros) for r in ROLES])), 3)
    out = weights.get("out_proj.weight", weights.get("out.weight"))
    projected = [x @ w.T + b for x, w, b in zip(inputs, parts, biases, strict=True)]
    return attend(*projected, out, weights.get("out_proj.bias", weights.get("out.bias", zeros)))


class Linen(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, q, k, v):
        options = {"qkv_features": WIDTH, "out_features": WIDTH, "use_bias": self.bias}
        return nn.MultiHeadDotProductAttention(HEADS, **options, name="att")(q, k, v)


class NNX(nnx.Module):
    def __init__(self, widths, bias):
        options = {"in_features": widths[0], "in_kv_features": widths[1], "qkv_features": WIDTH, "use_bias": bias}
        self.att = nnx.MultiHeadAttention(HEADS, out_features=WIDTH, decode=False, rngs=nnx.Rngs(0), **options)

    def __call__(self, *inputs):
        return self.att(*inputs)


def load_into(flax, weights, inputs, names=None, bias=True):
    """Returns the outputs of the loaded network, and what `to_torch` makes of it."""
    if flax == "linen":
        net = Linen(bias)
        filled, report = load_torch(weights, shapes_of(net, *inputs), names)
        y = net.apply(filled, *inputs)
    else:
        widths = [x.shape[-1] for x in inputs]
        filled, report = load_torch(weights, nnx.eval_shape(lambda: NNX(widths, bias)), names)
        y = filled(*inputs)
    assert not report.left_over
    assert not report.missing
    return y, report, filled


@pytest.mark.parametrize("flax", ["linen", "nnx"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("form", "widths"),
    [("in_proj", (6, 6, 6)), ("q_proj", (6, 4, 4)), ("linear", (6, 6, 6)), ("linear", (5, 4, 4))],
)
def test_attention(flax, form, widths, bias):
    inputs = [jnp.asarray(draw(2, t, n, seed=10 + i)) for i, (t, n) in enumerate(zip((4, 3, 3), widths, strict=True))]
    weights = torch_weights(widths, form, bias)
    y, report, filled = load_into(flax, weights, inputs, bias=bias)
    np.testing.assert_allclose(y, expected_of(weights, inputs), rtol=1e-4, atol=1e-5)
    assert_same_bits(dict(sorted(to_torch(filled, report.used).items())), dict(sorted(weights.items())))
    # torch.nn.MultiheadAttention is what is written without names, unless it has no weights of these shapes.
    if form != "linear" or widths[0] != WIDTH:
        assert_same_bits(dict(sorted(to_torch(filled).items())), dict(sorted(weights.items())))


def test_projections_with_names_of_their_own():
    """A name for each projection is a linear layer for each, in both directions."""
    inputs = [jnp.asarray(draw(2, 3, WIDTH, seed=9))] * 3
    weights = torch_weights(form="linear")
    renamed = {name.replace("att.", "att.self.").replace("self.out", "output.dense"): v for name, v in weights.items()}
    mapping = {f"att/{role}": f"att.self.{role}" for role in ROLES} | {"att/out": "att.output.dense"}
    for names in (mapping, lambda path: mapping.get(path, path.replace("/", "."))):
        y, _, filled = load_into("linen", renamed, inputs, names)
        np.testing.assert_allclose(y, expected_of(weights, inputs), rtol=1e-4, atol=1e-5)
        assert_same_bits(dict(sorted(to_torch(filled, names).items())), dict(sorted(renamed.items())))


@pytest.mark.parametrize("widths", [(6, 6, 6), (6, 4, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_installed_torch(widths, bias):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        {"att": torch.nn.MultiheadAttention(WIDTH, HEADS, bias=bias, kdim=widths[1], vdim=widths[2], batch_first=True)}
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    inputs = [draw(2, t, n, seed=10 + i) for i, (t, n) in enumerate(zip((4, 3, 3), widths, strict=True))]
    expected = net["att"](*map(torch.from_numpy, inputs))[0].detach().numpy()
    y, _, filled = load_into("linen", net.state_dict(), [*map(jnp.asarray, inputs)], bias=bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    back = {name: torch.from_numpy(v) for name, v in to_torch(filled).items()}
    assert all((v == back[name]).all() for name, v in net.state_dict().items())
    net.load_state_dict(back, strict=True)


class Block(nn.Module):
    """The block of torchvision's vision transformer."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-6, name="ln_1")(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS, name="self_attention")(y, y)
        y = nn.Dense(8, name="mlp_0")(nn.LayerNorm(epsilon=1e-6, name="ln_2")(x))
        return x + nn.Dense(WIDTH, name="mlp_3")(nn.gelu(y, approximate=False))


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = Block(name=f"encoder_layer_{i}")(x)
        return nn.LayerNorm(epsilon=1e-6, name="ln")(x)


def torchvision_name(path):
    inside = path.replace("/", ".").replace("mlp_", "mlp.")
    return f"encoder.{'' if path == 'ln' else 'layers.'}{inside}"


def test_blocks_of_a_vision_transformer():
    x = draw(2, 3, WIDTH)
    weights = {"encoder.ln.weight": draw(WIDTH), "encoder.ln.bias": draw(WIDTH, seed=1)}
    for i in range(2):
        block = f"encoder.layers.encoder_layer_{i}."
        attention = {
            name.replace("att.", f"{block}self_attention."): v * (1 + i) for name, v in torch_weights().items()
        }
        weights |= attention
        weights |= {f"{block}ln_{n}.{name}": draw(WIDTH, seed=n + i) for n in (1, 2) for name in ("weight", "bias")}
        weights |= {f"{block}mlp.0.weight": draw(8, WIDTH, seed=i), f"{block}mlp.0.bias": draw(8, seed=i)}
        weights |= {f"{block}mlp.3.weight": draw(WIDTH, 8, seed=i), f"{block}mlp.3.bias": draw(WIDTH, seed=i)}
    variables, report = load_torch(weights, shapes_of(Encoder(), jnp.asarray(x)), torchvision_name)
    np.testing.assert_allclose(Encoder().apply(variables, x), encode(weights, np.float64(x)), rtol=1e-4, atol=1e-4)
    assert report.used["encoder_layer_1/self_attention/key/bias"].endswith(
        "encoder_layer_1.self_attention.in_proj_bias"
    )
    assert_same_bits(dict(sorted(to_torch(variables, torchvision_name).items())), dict(sorted(weights.items())))


def encode(weights, x):
    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    for i in range(2):
        block = f"encoder.layers.encoder_layer_{i}"
        own = {k.removeprefix(f"{block}.self_attention."): v for k, v in weights.items() if f"{block}.self_att" in k}
        x = x + expected_of(own, [norm(x, f"{block}.ln_1")] * 3)
        y = gelu(norm(x, f"{block}.ln_2") @ weights[f"{block}.mlp.0.weight"].T + weights[f"{block}.mlp.0.bias"])
        x = x + y @ weights[f"{block}.mlp.3.weight"].T + weights[f"{block}.mlp.3.bias"]
    return norm(x, "encoder.ln")


def test_blocks_of_installed_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)

    class TorchBlock(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = (torch.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
            self.self_attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
            layers = torch.nn.Linear(WIDTH, 8), torch.nn.GELU(), torch.nn.Dropout(0.0), torch.nn.Linear(8, WIDTH)
            self.mlp = torch.nn.Sequential(*layers)

        def forward(self, x):
            y = self.ln_1(x)
            x = x + self.self_attention(y, y, y, need_weights=False)[0]
            return x + self.mlp(self.ln_2(x))

    blocks = torch.nn.Sequential()
    for i in range(2):
        blocks.add_module(f"encoder_layer_{i}", TorchBlock())
    encoder = torch.nn.ModuleDict({"layers": blocks, "ln": torch.nn.LayerNorm(WIDTH, eps=1e-6)})
    net = torch.nn.ModuleDict({"encoder": encoder})
    x = torch.randn(2, 3, WIDTH)
    expected = encoder["ln"](blocks(x)).detach().numpy()
    variables, _ = load_torch(net.state_dict(), shapes_of(Encoder(), jnp.zeros(x.shape)), torchvision_name)
    np.testing.assert_allclose(Encoder().apply(variables, x.numpy()), expected, rtol=1e-4, atol=1e-5)
    back = {name: torch.from_numpy(v) for name, v in to_torch(variables, torchvision_name).items()}
    assert all((v == back[name]).all() for name, v in net.state_dict().items())


# Linear layers with several axes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "features", "inputs", "kind"),
    [
        ((5,), (2, 3), 1, "to_heads"),
        ((2, 3), (5,), 2, "from_heads"),
        ((2, 3), (4, 2), 2, None),
        ((2,), (2, 2), 1, "to_heads"),
    ],
)
def test_general_linear_layers(shape, features, inputs, kind, bias):
    x = draw(4, *shape)
    weights = {"l.weight": draw(int(np.prod(features)), int(np.prod(shape)), seed=1)}
    weights |= {"l.bias": draw(int(np.prod(features)), seed=2)} if bias else {}
    expected = (x.reshape(4, -1) @ weights["l.weight"].T + weights.get("l.bias", 0)).reshape(4, *features)
    options = {"axis": tuple(range(-inputs, 0)), "use_bias": bias}
    model = nnx.eval_shape(lambda: nnx.LinearGeneral(shape, features, **options, rngs=nnx.Rngs(0)))
    model, _ = load_torch(weights, model, {"": "l"})
    np.testing.assert_allclose(model(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(dict(sorted(to_torch(model, {"": "l"}).items())), dict(sorted(weights.items())))
    layer = nn.DenseGeneral(features, **options)
    # Only a bias shows the axes of outputs; one axis is also that of a convolution.
    shown = bias and len(features) > 1
    if kind is None and not shown:
        return
    kinds = None if shown and shape != (2,) else {"": kind}
    variables, _ = load_torch(weights, shapes_of(layer, jnp.asarray(x)), {"": "l"}, kinds=kinds)
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5, atol=1e-5)
    back = to_torch(variables, {"": "l"}, kinds=kinds)
    assert_same_bits(dict(sorted(back.items())), dict(sorted(weights.items())))


def test_keras_attention():
    net, x = Linen(), jnp.asarray(draw(2, 3, WIDTH))
    weights = {f"att/{role}/kernel": draw(WIDTH, HEADS, 3, seed=i) for i, role in enumerate(ROLES)}
    weights |= {f"att/{role}/bias": draw(HEADS, 3, seed=i) for i, role in enumerate(ROLES)}
    weights |= {"att/attention_output/kernel": draw(HEADS, 3, WIDTH), "att/attention_output/bias": draw(WIDTH)}
    variables, report = load_keras(weights, shapes_of(net, x, x, x))
    assert report.used["att/out/kernel"] == "att/attention_output/kernel"
    for role in ROLES:
        np.testing.assert_array_equal(variables["params"]["att"][role]["kernel"], weights[f"att/{role}/kernel"])


def test_what_flax_does_not_have():
    x = jnp.zeros((1, 2, WIDTH))
    weights = torch_weights() | {"att.bias_k": draw(1, 1, WIDTH), "att.bias_v": draw(1, 1, WIDTH)}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(weights, shapes_of(Linen(), x, x, x))
    assert str(error.value) == (
        "load_torch: 2 problems, nothing was loaded\n"
        "  att.bias_k: expected a leaf of the target to take it, got none; it is an extra key or value "
        "(add_bias_kv=True), which Flax's attention does not have\n"
        "  att.bias_v: expected a leaf of the target to take it, got none; it is an extra key or value "
        "(add_bias_kv=True), which Flax's attention does not have"
    )


def test_errors_of_attention():
    x = jnp.zeros((1, 2, WIDTH))
    weights = torch_weights()
    weights["att.in_proj_weight"] = weights["att.in_proj_weight"][:12]
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(weights, shapes_of(Linen(), x, x, x))
    assert str(error.value) == "load_torch: 3 problems, nothing was loaded\n" + "\n".join(
        f"  att/{role}/kernel: expected 'att.in_proj_weight' with shape (18, 6), got (12, 6)"
        for role in ("key", "query", "value")
    )
    weights = torch_weights(form="linear")
    del weights["att.query.bias"]
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(weights, shapes_of(Linen(), x, x, x))
    assert str(error.value) == (
        "load_torch: 1 problem, nothing was loaded\n"
        "  att/query/bias: expected 'att.in_proj_bias' or 'att.query.bias' in the source, got no such name"
    )
    variables, _ = load_torch(torch_weights(), shapes_of(Linen(), x, x, x))
    with pytest.raises(ValueError, match="nothing was returned") as error:
        to_torch(variables, {"att/value": None})
    assert str(error.value) == (
        "to_torch: 2 problems, nothing was returned\n"
        "  att.in_proj_bias: expected query, key and value with as many inputs, to be one array, got query, key\n"
        "  att.in_proj_weight: expected query, key and value with as many inputs, to be one array, got query, key"
    )
