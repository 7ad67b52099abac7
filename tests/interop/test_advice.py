"""What errors advise loads the right network, and what no name shows is not advised."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from weights import Small, SmallNNX, draw, shapes_of, small_linen, small_shapes, small_weights, torch_conv_transpose

from jaxbn.interop import batch_norm_from_torch, load_keras, load_torch


def message(*arguments, load=load_torch, **options):
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load(*arguments, **options)
    return str(error.value)


# Layouts


@pytest.mark.parametrize("transpose_kernel", [True, False])
@pytest.mark.parametrize("given", [None, "conv", "conv_transpose", "as_is"])
def test_advice_about_a_transposed_convolution(given, transpose_kernel):
    x, weight = draw(1, 6, 3, 3), draw(6, 4, 2, 2)
    layer = nn.ConvTranspose(4, (2, 2), padding="VALID", transpose_kernel=transpose_kernel, use_bias=False)
    images = jnp.moveaxis(jnp.asarray(x), 1, -1)
    kinds = {"": given} if given else None
    right = transpose_kernel if given in (None, "conv") else not transpose_kernel and given == "conv_transpose"
    if not right:
        text = message({"weight": weight}, shapes_of(layer, images), kinds=kinds)
        advised = re.search(r"pass kinds=(\{'': '\w+'\})", text)
        assert advised or text.endswith("; leave '' out of kinds")
        kinds = eval(advised[1]) if advised else None
    variables, _ = load_torch({"weight": weight}, shapes_of(layer, images), kinds=kinds)
    expected = np.moveaxis(torch_conv_transpose(np.float64(x), np.float64(weight)), 1, -1)
    np.testing.assert_allclose(layer.apply(variables, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("load", "module", "name", "shape", "kinds", "end"),
    [
        # A layout is named only for the number of axes that it is for.
        (load_keras, nnx.Linear(3, 5, rngs=nnx.Rngs(0)), "kernel", (5, 3), None, "got (5, 3)"),
        (load_keras, nn.Dense(6), "kernel", (2, 3), None, "got (2, 3)"),
        (load_torch, nn.Dense(5), "weight", (3, 5), None, "; pass kinds={'': 'as_is'} if its axes are in Flax's order"),
        (load_torch, nn.Dense(5), "weight", (5, 3), {"": "as_is"}, "; leave '' out of kinds"),
        (load_torch, nn.Dense(5), "weight", (5, 3), {"kernel": "as_is"}, "; leave 'kernel' out of kinds"),
        # A convolution's patches may be flattened in another order.
        (
            load_torch,
            nn.Conv(5, (2, 2)),
            "weight",
            (5, 12),
            None,
            "expected 'weight' with shape (5, 3, 2, 2), got (5, 12); for a DenseGeneral, kinds needs 'to_heads' if the "
            "kernel is [in, heads, head_dim], 'from_heads' if it is [heads, head_dim, out]",
        ),
        # The class of an NNX module shows its layout.
        (load_torch, nnx.Conv(3, 5, (2, 2), rngs=nnx.Rngs(0)), "weight", (3, 5, 2, 2), None, "got (3, 5, 2, 2)"),
        (
            load_torch,
            nnx.ConvTranspose(3, 5, (2, 2), rngs=nnx.Rngs(0)),
            "weight",
            (5, 3, 2, 2),
            None,
            "expected 'weight' with shape (3, 5, 2, 2), got (5, 3, 2, 2)",
        ),
    ],
)
def test_advice_about_layouts(load, module, name, shape, kinds, end):
    target = module if isinstance(module, nnx.Module) else shapes_of(module, jnp.zeros((1, 4, 4, 3)))
    bias = draw(module.features if isinstance(module, nn.Module) else 5)
    assert message({name: draw(*shape), "bias": bias}, target, load=load, kinds=kinds).endswith(end)


# Heads


@pytest.mark.parametrize("make", [small_linen, SmallNNX])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("names", "advice"),
    [
        (None, "pass names={'head': None} to keep the target's values"),
        ({"conv": "conv"}, "pass names={**names, 'head': None} to keep the target's values"),
        (
            {"head": "fc"},
            "pass names={**names, 'head': None} and source without the names that begin with 'fc.' to keep the "
            "target's values",
        ),
        (
            lambda path: path.replace("head", "fc"),
            "return None from names for 'head' and pass source without the names that begin with 'fc.'",
        ),
    ],
)
def test_a_head_of_another_size(make, names, advice, strict):
    name = "head" if names is None or "conv" in (names if isinstance(names, dict) else ()) else "fc"
    weights = {k.replace("head", name): v for k, v in small_weights().items()}
    weights |= {f"{name}.weight": draw(1000, 2), f"{name}.bias": draw(1000)}
    assert sorted(message(weights, make(), names, strict=strict).split("\n  ")[1:]) == [
        f"head/bias: expected '{name}.bias' with shape (3,), got (1000,)",
        f"head/kernel: expected '{name}.weight' with shape (3, 2), got (1000, 2); if the layer is trained anew, "
        f"{advice}",
    ]
    followed = (lambda path: None if path == "head" else path) if callable(names) else {**(names or {}), "head": None}
    source = {k: v for k, v in weights.items() if not k.startswith("fc.")} if "begin" in advice else weights
    _, report = load_torch(source, make(), followed, strict=strict)
    assert sorted(report.kept) == ["head/bias", "head/kernel"]
    assert sorted(report.left_over) == (sorted(f"{name}.{n}" for n in ("weight", "bias")) if name == "head" else [])


def test_other_sizes_are_no_heads():
    weights = small_weights() | {"conv.weight": draw(2, 5, 1, 1), "bn.weight": draw(3)}
    assert message(weights, small_shapes()) == (
        "load_torch: 2 problems, nothing was loaded\n"
        "  bn/scale: expected 'bn.weight' with shape (2,), got (3,)\n"
        "  conv/kernel: expected 'conv.weight' with shape (2, 4, 1, 1), got (2, 5, 1, 1)"
    )


# Checkpoints


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("wrap", "advice"),
    [
        (lambda w: {"model": w, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": draw(9)}}}}, "pass source['model']"),
        (lambda w: {"ema": {"module": w}, "steps": np.array(3)}, "pass source['ema']['module']"),
        (lambda w: {"model": w, "ema": w}, "pass source['model'] or source['ema']"),
        (
            lambda w: {"a": {f"{i}": draw(1) for i in range(20)}, "b": {"c": {"d": w}}},
            "pass source['b']['c']['d']",
        ),
        (
            lambda w: {"state": {f"module.{k}": v for k, v in w.items()}, "rng": {"torch": draw(1)}},
            "pass source['state']",
        ),
        (
            lambda w: {"net": {"conv": {"weight": w["conv.weight"]}}},
            "pass source['net'] with its names joined by '.'",
        ),
        (lambda w: {"conv": {"weight": w["conv.weight"]}}, "pass source with its names joined by '.'"),
    ],
)
def test_a_checkpoint_around_the_state_dict(wrap, advice, strict):
    assert message(wrap(small_weights()), small_shapes(), strict=strict) == (
        "load_torch: 1 problem, nothing was loaded\n"
        f"  source: expected a mapping of names to arrays, got mappings within a mapping; {advice}"
    )


def test_groups_of_keras():
    groups = {"conv": {"kernel": draw(1, 1, 4, 2)}, "head": {"kernel": draw(2, 3)}}
    assert message(groups, small_shapes(), load=load_keras).endswith(
        "source: expected a mapping of names to arrays, got mappings within a mapping; "
        "pass source with its names joined by '/'"
    )


def test_a_checkpoint_with_a_module():
    torch = pytest.importorskip("torch")
    net = torch.nn.ModuleDict({"head": torch.nn.Linear(2, 3)})
    assert message({"model": net, "epoch": 1}, small_shapes()).endswith("pass source['model'].state_dict()")


@pytest.mark.parametrize(
    ("path", "advice"),
    [
        ("a/b.pt", "torch.load('a/b.pt', map_location='cpu')"),
        ("b.pth.tar", "torch.load('b.pth.tar', map_location='cpu')"),
        ("b.npz", "dict(numpy.load('b.npz'))"),
        ("b.h5", "{w.path: w.numpy() for w in keras.saving.load_model('b.h5').weights}"),
        ("b", "model.state_dict(), torch.load(path) or dict(numpy.load(path))"),
    ],
)
def test_paths_of_other_files(path, advice):
    for load in (lambda: load_torch(path, small_shapes()), lambda: batch_norm_from_torch(path)):
        with pytest.raises(TypeError) as error:
            load()
        assert str(error.value) == (
            f"source: expected a mapping of names to arrays or the path of a .safetensors file, got {path!r}; "
            f"pass {advice}"
        )


# Names that are left over


QUANTIZED = "of a quantized layer; load the checkpoint of the float model"
AWARE = "of quantization-aware training, whose rounding the target does not do"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fc._packed_params._packed_params", QUANTIZED),
        ("fc.zero_point", QUANTIZED),
        ("fc.scale", QUANTIZED),
        ("fc_input_scale_0", QUANTIZED),
        ("fc.qweight", QUANTIZED),
        ("fc.weight_fake_quant.scale", AWARE),
        ("fc.activation_post_process.min_val", AWARE),
        ("rnn.weight_ih_l0", "of a recurrent layer, which has no counterpart of this layout"),
        ("rnn.bias_hh_l1_reverse", "of a recurrent layer, which has no counterpart of this layout"),
        ("cell.weight_hh", "of a recurrent layer, which has no counterpart of this layout"),
        ("fc.lora_A.default.weight", "of an adapter; merge it into the weights first (peft: merge_and_unload)"),
        # Names that only look like these.
        ("layer.scale", None),
        ("attn_mask", None),
        ("mask_v", None),
    ],
)
def test_what_a_name_is(name, kind):
    weights = small_weights() | {name: draw(1)}
    if kind == QUANTIZED:
        weights |= {"fc.zero_point": draw(1), "fc_input_zero_point_0": draw(1)}
    lines = message(weights, small_shapes()).split("\n  ")
    assert f"{name}: expected a leaf of the target to take it, got none{f'; it is {kind}' if kind else ''}" in lines


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor():
    torch = pytest.importorskip("torch")
    weights = small_weights()
    weights["head.weight"] = torch.quantize_per_tensor(torch.ones(3, 2), 0.1, 0, torch.qint8)
    assert message(weights, small_shapes()).endswith(
        "head/kernel: expected a tensor that NumPy can hold, got torch.qint8 on cpu; "
        "load the checkpoint of the float model"
    )


@pytest.mark.parametrize(
    ("more", "test"),
    [
        (lambda i: f"decoder.{i}.weight", "n.startswith(('decoder.',))"),
        (lambda i: f"{'ab'[i % 2]}.{i}.weight", "n.startswith(('a.', 'b.'))"),
        (lambda i: f"head.{i}.index", "n.startswith(('head.0.', 'head.1.'))"),
        (lambda i: f"bn.old{i}.mask", "n.endswith(('.mask',))"),
        (lambda i: f"bn.old{i}", None),
    ],
)
def test_many_names_are_cut_short(more, test):
    count = 300 if test != "n.startswith(('head.0.', 'head.1.'))" else 2
    names = [more(i) for i in range(count)]
    if count == 2:
        names = [f"{name}.{i}" for name in names for i in range(20)]
    weights = small_weights() | {name: draw(1) for name in names}
    lines = message(weights, small_shapes()).split("\n  ")
    cure = (
        f"{{n: v for n, v in source.items() if not {test}}} has none of them"
        if test
        else "pass strict=False to leave them"
    )
    assert lines == [
        "load_torch: 11 problems, nothing was loaded",
        *(f"{name}: expected a leaf of the target to take it, got none" for name in names[:10]),
        f"source: expected a leaf of the target for each name, got {len(names) - 10} more names without one; {cure}",
    ]
    if test:
        source = eval(cure.removesuffix(" has none of them"), {"source": weights})
        assert source.keys() == small_weights().keys()
        load_torch(source, small_shapes())


def test_many_leaves_without_an_entry_are_cut_short():
    target = {"params": {f"m{i}": {"scale": jnp.zeros(1)} for i in range(30)}}
    lines = message({"m0.weight": draw(1)}, target).split("\n  ")
    assert len(lines) == 12
    assert lines[-1] == "target: expected an entry of the source for each leaf, got 19 more without one"


# Names of modules


class Twins(nn.Module):
    """Two layers that only their names tell apart."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="b")(nn.Dense(4, name="a")(x))


def test_names_are_advised_only_if_one_module_fits():
    shapes = shapes_of(Twins(), jnp.zeros((1, 4)))
    twins = {f"{m}.{n}": draw(*s) for m in ("c", "d") for n, s in (("weight", (4, 4)), ("bias", (4,)))}
    assert message(twins, shapes).endswith("; pass names")
    one = {k: v for k, v in twins.items() if k.startswith("c.")}
    assert (
        message(one, {"params": {"a": shapes["params"]["a"]}}).endswith("; pass names, such as names={'': 'c'}")
        is False
    )
    inside = {f"net.{k.replace('c.', 'a.').replace('d.', 'b.')}": v for k, v in twins.items()}
    assert message(inside, shapes).endswith("; pass names, such as names={'': 'net'}")
    # A linear layer is no norm, though both have a weight and a bias.
    norm = {"params": {"ln": {"scale": jnp.zeros(4), "bias": jnp.zeros(4)}}}
    assert message({"fc.weight": draw(4, 4), "fc.bias": draw(4)}, norm).endswith("; pass names")


def test_names_are_advised_around_stacked_layers():
    scanned = nn.vmap(Small, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, axis_size=2)
    shapes = jax.eval_shape(scanned(name=None).init, jax.random.key(0), jnp.zeros((2, 2, 3, 3, 4)))
    shapes = {collection: {"layers": tree} for collection, tree in shapes.items()}
    weights = {f"module.layers.{i}.{k}": v for i in range(2) for k, v in small_weights().items()}
    assert message(weights, shapes).endswith("; pass names, such as names={'': 'module'}")
    load_torch(weights, shapes, {"": "module"})


@pytest.mark.parametrize(
    ("weights", "advice"),
    [
        (
            {f"a.{i}.weight": draw(4, 4) for i in range(2)},
            "; as a stack of layers along its first axis it needs 'a.*.weight' with the numbers 0 to 3, got 0, 1",
        ),
        ({"a.zero_point": draw(1), "a.scale": draw(1)}, f"; 'a.zero_point' is {QUANTIZED}"),
    ],
)
def test_no_name_fits_though_the_names_are_right(weights, advice):
    text = message(weights, {"params": {"a": {"kernel": jnp.zeros((4, 4, 4))}}})
    assert text.endswith(f"expected some of 1 names (a.weight), got 2 others ({', '.join(weights)}){advice}")
