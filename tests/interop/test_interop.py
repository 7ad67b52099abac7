"""Weights from PyTorch and Keras: the same bits, the same numbers, and nothing half-loaded."""

import functools
import json
import struct
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from golden.make_torch_resnet import CLASSES, NETWORKS, PATH, build, make_input, randomize, read, record

import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, BatchNormState, batch_norm_init
from jaxbn.interop import (
    LoadReport,
    batch_norm_from_torch,
    batch_norm_to_torch,
    load_keras,
    load_torch,
    to_torch,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from _resnet import LinenResNet, NNXResNet, torch_name

# Both sides round to float32 in their own order, through up to twenty layers.
LOGITS_TOLERANCE = 1e-4


def draw(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype), name
        assert actual[name].tobytes() == value.tobytes(), name


def shapes_of(module, *inputs):
    return jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *inputs)


# One batch norm


def norm_entries(prefix="", dtype=np.float32):
    names = ("weight", "bias", "running_mean", "running_var")
    entries = {prefix + name: draw(3, dtype=dtype, seed=i) for i, name in enumerate(names)}
    return {**entries, f"{prefix}num_batches_tracked": np.array(2**31 - 1, np.int64)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("prefix", ["", "layer1.0.bn1."])
@pytest.mark.parametrize("without", [(), ("weight", "bias"), ("bias",), ("running", "num")])
def test_norm_comes_back_bit_for_bit(dtype, prefix, without):
    entries = norm_entries(prefix, dtype)
    entries = {k: v for k, v in entries.items() if not k.removeprefix(prefix).startswith(without or ("-",))}
    params, state = batch_norm_from_torch(entries, prefix.removesuffix("."))
    assert (params is None) == ("weight" in without)
    assert (state is None) == ("running" in without)
    assert_same_bits(batch_norm_to_torch(params, state, prefix), entries)


@pytest.mark.usefixtures("x64")
def test_norm_in_double_precision():
    entries = norm_entries(dtype=np.float64)
    assert_same_bits(batch_norm_to_torch(*batch_norm_from_torch(entries)), entries)


def test_a_norm_without_anything():
    assert batch_norm_from_torch({}) == (None, None)
    assert batch_norm_to_torch(None, None, "bn") == {}


def test_where_the_values_go():
    entries = norm_entries()
    params, state = batch_norm_from_torch(entries)
    expected = BatchNormParams(entries["weight"], entries["bias"]), BatchNormState(*list(entries.values())[2:])
    jax.tree.map(np.testing.assert_array_equal, (params, state), expected)
    assert state.num_batches_tracked.dtype == jnp.int32


def aligned(array):
    """A copy at an address that JAX would take over as it is."""
    room = np.empty(array.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def test_what_is_loaded_is_a_copy():
    weights = {name: aligned(v) for name, v in small_weights().items()}
    filled, report = load_torch(weights, small_shapes())
    norm = batch_norm_from_torch({k: v for k, v in weights.items() if k.startswith("bn")}, "bn")
    for v in weights.values():
        v[...] = 7  # as an optimizer would
    back = to_torch(filled, counters=report.counters)
    assert_same_bits(dict(sorted(back.items())), dict(sorted(small_weights().items())))
    for name, value in batch_norm_to_torch(*norm, "bn").items():
        np.testing.assert_array_equal(value, small_weights()[name])


def test_checkpoint_without_a_counter():
    entries = norm_entries()
    del entries["num_batches_tracked"]
    _, state = batch_norm_from_torch(entries)
    assert int(state.num_batches_tracked) == 0


def test_all_that_is_wrong_with_a_norm_in_one_error():
    entries = {
        "bn.weight": draw(3),
        "bn.bias": draw(4),
        "bn.running_mean": draw(3, dtype=np.float64),
        "bn.num_batches_tracked": np.array(2**31),
        "bn.0.weight": draw(3),
        "other": draw(3),
    }
    with pytest.raises(ValueError, match="nothing was returned") as error:
        batch_norm_from_torch(entries, "bn")
    assert str(error.value) == (
        "batch_norm_from_torch: 5 problems, nothing was returned\n"
        "  bn.num_batches_tracked: expected an integer from 0 to 2147483647, got int64 2147483648\n"
        "  bn.0.weight: expected one of weight, bias, running_mean, running_var, num_batches_tracked, "
        "got another name\n"
        "  bn.bias: expected shape (3,), got (4,)\n"
        "  bn.running_mean: expected a floating-point dtype that JAX holds, got float64; enable x64 for float64\n"
        "  bn.running_mean, bn.running_var: expected both or none, got running_mean, num_batches_tracked"
    )


def test_wrong_prefix():
    with pytest.raises(ValueError, match="prefix") as error:
        batch_norm_from_torch(norm_entries("bn."), "norm")
    assert str(error.value) == (
        "prefix: expected that of a batch norm with entries, got 'norm.', with which none of the 5 names begins; "
        "a batch norm without parameters and statistics has no entries to load"
    )


# Layouts, held to what the layers of PyTorch and Keras are defined to compute, in float64.


def windows(x, offset, sizes, stride, dilation):
    """The values of x [N, C, ...] that one place of the window meets."""
    steps = (
        slice(o * dilation, o * dilation + (n - 1) * stride + 1, stride) for o, n in zip(offset, sizes, strict=True)
    )
    return x[(slice(None), slice(None), *steps)]


def torch_conv(x, weight, groups=1, stride=1, padding=0, dilation=1):
    """torch.nn.functional.conv*d: weight [out, in / groups, *window]."""
    window = weight.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), *((padding, padding) for _ in window)))
    sizes = [(n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], window, strict=True)]
    outs, ins = len(weight) // groups, weight.shape[1]
    y = np.zeros((len(x), len(weight), *sizes))
    for offset in np.ndindex(window):
        part = windows(x, offset, sizes, stride, dilation)
        for g in range(groups):
            own = slice(g * outs, (g + 1) * outs)
            y[:, own] += np.einsum(
                "ni...,oi->no...", part[:, g * ins : (g + 1) * ins], weight[(own, slice(None), *offset)]
            )
    return y


def torch_conv_transpose(x, weight, stride=1, padding=0, output_padding=0, dilation=1):
    """torch.nn.functional.conv_transpose*d: weight [in, out, *window]."""
    window = weight.shape[2:]
    sizes = [
        (n - 1) * stride + dilation * (k - 1) + 1 + output_padding for n, k in zip(x.shape[2:], window, strict=True)
    ]
    y = np.zeros((len(x), weight.shape[1], *sizes))
    for offset in np.ndindex(window):
        part = windows(y, offset, x.shape[2:], stride, dilation)
        part += np.einsum("ni...,io->no...", x, weight[(slice(None), slice(None), *offset)])
    return y[(slice(None), slice(None), *(slice(padding, n - padding) for n in sizes))]


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


# Whole models


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        arrays = dict(file)
    return {name: read(arrays, name) for name in NETWORKS}


@functools.cache
def linen_forward(name):
    model = LinenResNet(*NETWORKS[name], CLASSES)

    @jax.jit
    def forward(variables, x):
        logits = model.apply(variables, x, train=False)
        train_logits, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return logits, train_logits, {**variables, **updates}

    return model, forward


def nnx_shapes(name):
    return nnx.eval_shape(lambda: NNXResNet(*NETWORKS[name], CLASSES, nnx.Rngs(0)))


@functools.cache
def nnx_forward(name):
    @jax.jit
    def forward(graph, state, x):
        model = nnx.merge(graph, state)
        model.eval()
        logits = model(x)
        model.train()
        return logits, model(x), nnx.state(model)

    return forward


def images(x):
    return jnp.asarray(np.moveaxis(x, 1, -1), jnp.float32) / 255


def check_linen(name, weights, expected):
    model, forward = linen_forward(name)
    x = images(expected["x"])
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))
    variables, report = load_torch(weights, shapes, torch_name)
    logits, train_logits, trained = forward(variables, x)
    check_results(expected, report, logits, train_logits, to_torch(trained, torch_name))
    return to_torch(variables, torch_name, counters=report.counters)


def check_nnx(name, weights, expected):
    model, report = load_torch(weights, nnx_shapes(name))
    logits, train_logits, trained = nnx_forward(name)(*nnx.split(model), images(expected["x"]))
    back = to_torch(model, counters=report.counters)
    nnx.update(model, trained)
    check_results(expected, report, logits, train_logits, to_torch(model))
    return back


CHECKS = {"linen": check_linen, "nnx": check_nnx}


def check_results(expected, report, logits, train_logits, trained):
    counters = {name for name in expected["state_dict"] if name.endswith("tracked")}
    assert set(report.counters) == counters
    assert not report.missing
    assert not report.left_over
    assert not report.kept
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=LOGITS_TOLERANCE)
    np.testing.assert_allclose(train_logits, expected["train_logits"], rtol=0, atol=LOGITS_TOLERANCE)
    for name, value in expected["trained"].items():
        if name not in counters:
            np.testing.assert_allclose(trained[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flax"), [("basic", "linen"), ("bottleneck", "nnx")])
def test_resnet_on_record(golden, name, flax):
    back = CHECKS[flax](name, golden[name]["state_dict"], golden[name])
    assert_same_bits(dict(sorted(back.items())), dict(sorted(golden[name]["state_dict"].items())))


@pytest.mark.parametrize("flax", CHECKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_resnet_of_installed_torch(name, flax):
    torch = pytest.importorskip("torch")
    model = randomize(build(NETWORKS[name]), seed=7)
    weights = {key: v.clone() for key, v in model.state_dict().items()}
    expected = record(model, make_input())
    back = CHECKS[flax](name, weights, read({f"{name}/{k}": v for k, v in expected.items()}, name))
    model.load_state_dict({key: torch.from_numpy(v) for key, v in back.items()}, strict=True)
    assert all((v == weights[key]).all() for key, v in model.state_dict().items())


# Names, reports and errors


class Small(nn.Module):
    momentum: float | None = 0.9

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (1, 1), name="conv")(x)
        x = jaxbn.linen.BatchNorm(False, momentum=self.momentum, name="bn")(x)
        return nn.Dense(3, name="head")(x)


class SmallNNX(nnx.Module):
    def __init__(self, momentum=0.9):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(4, 2, (1, 1), rngs=rngs)
        self.bn = jaxbn.nnx.BatchNorm(2, momentum=momentum, rngs=rngs)
        self.head = nnx.Linear(2, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@functools.cache
def small_shapes(momentum=0.9):
    return shapes_of(Small(momentum), jnp.zeros((2, 3, 3, 4)))


def small_weights():
    weights = {
        "conv.weight": draw(2, 4, 1, 1),
        "conv.bias": draw(2),
        "head.weight": draw(3, 2),
        "head.bias": draw(3),
    }
    weights |= {f"bn.{name}": draw(2) for name in ("weight", "bias", "running_mean", "running_var")}
    return {**weights, "bn.num_batches_tracked": np.array(17)}


def small_linen(momentum=0.9):
    return jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), small_shapes(momentum))


def leaves(target):
    """Copies of all arrays."""
    tree = (
        nnx.to_pure_dict(nnx.state(target, nnx.Any(nnx.Param, nnx.BatchStat)))
        if isinstance(target, nnx.Module)
        else target
    )
    return {jax.tree_util.keystr(path): np.array(v) for path, v in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("make", [small_linen, SmallNNX])
def test_counter(make, momentum):
    filled, report = load_torch(small_weights(), make(momentum))
    if momentum is None:
        assert report.used["bn/num_batches_tracked"] == "bn.num_batches_tracked"
        assert report.counters == {}
    else:
        assert report.counters == {"bn.num_batches_tracked": 17}
    assert int(to_torch(filled)["bn.num_batches_tracked"]) == (17 if momentum is None else 0)
    back = to_torch(filled, counters=report.counters)
    assert_same_bits(dict(sorted(back.items())), dict(sorted(small_weights().items())))


@pytest.mark.parametrize("make", [small_linen, SmallNNX])
def test_checkpoint_without_counters(make):
    weights = small_weights()
    del weights["bn.num_batches_tracked"]
    filled, report = load_torch(weights, make(None))
    assert int(to_torch(filled)["bn.num_batches_tracked"]) == 0
    assert report.missing == {"bn/num_batches_tracked": "bn.num_batches_tracked"}
    _, report = load_torch(weights, make(0.9))
    assert (report.missing, report.counters) == ({}, {})


def test_names_of_all_kinds():
    renamed = {f"module.body.{name.replace('bn', 'norm')}": v for name, v in small_weights().items()}
    mapping = {
        "": "module.body",
        "bn": "module.body.norm",
        "bn/scale": "module.body.norm.weight",
        "head": "module.body.head",
    }
    for names in (mapping, lambda path: "module.body." + path.replace("bn", "norm")):
        filled, report = load_torch(renamed, small_shapes(), names)
        assert report.used["bn/var"] == "module.body.norm.running_var"
        back = to_torch(filled, names, counters=report.counters)
        assert_same_bits(dict(sorted(back.items())), dict(sorted(renamed.items())))


@pytest.mark.parametrize("make", [small_linen, SmallNNX])
def test_a_part_that_is_kept(make):
    weights = {k: v for k, v in small_weights().items() if not k.startswith("head")}
    target = make()
    before = leaves(target)
    filled, report = load_torch(weights, target, {"head": None})
    assert sorted(report.kept) == ["head/bias", "head/kernel"]
    after = leaves(filled)
    assert [name for name in before if (before[name] == after[name]).all()] == [k for k in before if "head" in k]
    assert not any(name.startswith("head") for name in to_torch(filled, {"head": None}))


def test_linen_variables_are_not_changed_and_an_nnx_model_is():
    variables, model = small_linen(), SmallNNX()
    before = leaves(variables)
    filled, _ = load_torch(small_weights(), variables)
    assert_same_bits(leaves(variables), before)
    np.testing.assert_array_equal(filled["batch_stats"]["bn"]["mean"], small_weights()["bn.running_mean"])
    filled, _ = load_torch(small_weights(), model)
    assert filled is model
    np.testing.assert_array_equal(model.bn.mean[...], small_weights()["bn.running_mean"])


def wrong_weights():
    weights = small_weights()
    weights["conv.weight"] = draw(2, 4, 3, 3)
    weights["conv.bias"] = weights["conv.bias"].astype(np.float64)
    weights["bn.weight"] = {"a": 1}
    weights["bn.num_batches_tracked"] = np.array(-1)
    weights["old.bias"] = weights.pop("head.bias")
    weights["head.weight"] = np.array([[True, False]] * 3)
    return weights


@pytest.mark.parametrize("make", [small_linen, SmallNNX])
def test_all_that_is_wrong_in_one_error_and_nothing_loaded(make):
    target = make()
    before = leaves(target)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(wrong_weights(), target, {"heat": "head", "bn/var": "bn.running_mean"})
    lines = str(error.value).split("\n  ")
    assert lines[0] == "load_torch: 10 problems, nothing was loaded"
    assert sorted(lines[1:]) == [
        "bn.num_batches_tracked: expected an integer from 0 to 2147483647, got int64 -1",
        "bn.running_var: expected a leaf of the target to take it, got none",
        "bn/mean, bn/var: expected a name for each, got 'bn.running_mean' for all",
        "bn/scale: expected an array or a tensor, got dict",
        "conv/bias: expected 'conv.bias' of dtype float32, got float64; pass cast=True to convert",
        "conv/kernel: expected 'conv.weight' with shape (2, 4, 1, 1), got (2, 4, 3, 3)",
        "head/bias: expected 'head.bias' in the source, got no such name",
        "head/kernel: expected numbers, got dtype bool",
        "names: expected the path of a module or leaf of the target, got 'heat'",
        "old.bias: expected a leaf of the target to take it, got none",
    ]
    assert_same_bits(leaves(target), before)


def test_not_strict():
    weights = small_weights()
    weights["old.bias"] = weights.pop("head.bias")
    target = small_linen()
    filled, report = load_torch(weights, target, strict=False)
    assert str(report) == (
        "7 used, 1 missing, 0 kept, 1 left over, 1 counters without a place\n"
        "missing: head.bias for head/bias\nleft over: old.bias"
    )
    assert filled["params"]["head"]["bias"] is target["params"]["head"]["bias"]
    with pytest.raises(ValueError, match="names") as error:
        load_torch(weights, target, lambda path: None, strict=False)
    assert str(error.value) == (
        "load_torch: 1 problem, nothing was loaded\n"
        "  names: expected some leaf of the target to be found in the source, got none"
    )
    with pytest.raises(ValueError, match="head/bias") as error:
        load_torch(weights, small_shapes(), strict=False)
    assert str(error.value) == (
        "load_torch: 1 problem, nothing was loaded\n"
        "  head/bias: expected an array, since it stays as it is, got only shape and dtype"
    )


@pytest.mark.parametrize("load", [load_torch, load_keras])
def test_random_streams_of_a_model_without_values(load):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(2, 3, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.rows = nnx.vmap(lambda key: nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=key)))(rngs.default.split(2))
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
    abstract.calls.set_value(jnp.zeros(()))
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load(weights, abstract, rngs=nnx.Rngs(dropout=0))
    assert str(error.value) == (
        f"{load.__name__}: 1 problem, nothing was loaded\n"
        "  rngs: expected default, dropout, got dropout; nnx.Rngs(0) has a default for all"
    )
    assert isinstance(abstract.head.kernel.get_value(), jax.ShapeDtypeStruct)

    model, _ = load(weights, abstract, rngs=rngs)
    assert model.dropout.rngs.key.get_value() == nnx.Rngs(0)["dropout"]()
    assert model.rows.rngs.key.shape == model.rows.rngs.count.shape == (2,)
    x = draw(4, 2)
    y = nnx.jit(lambda model, x: model(x))(model, x)
    assert 0 < int((y == 0).sum()) < y.size
    model.eval()
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(model, x), x @ weight.T + bias, rtol=1e-5, atol=1e-6)
    # What has values keeps them.
    load(weights, model, rngs=nnx.Rngs(7))
    assert model.dropout.rngs.key.get_value() == nnx.Rngs(0)["dropout"]()


def test_other_collections_without_values():
    cache = {"cache": {"index": jax.ShapeDtypeStruct((), np.int32)}}
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_torch(small_weights(), small_shapes() | cache)
    assert str(error.value) == (
        "load_torch: 1 problem, nothing was loaded\n"
        "  cache/index: expected an array, since nothing is loaded into it, got only shape and dtype; leave its "
        "collection out of target"
    )


def test_cast():
    weights = {k: v.astype(np.float16) if v.ndim else v for k, v in small_weights().items()}
    filled, _ = load_torch(weights, small_shapes(), cast=True)
    assert {v.dtype for v in jax.tree.leaves(filled)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(filled["params"]["conv"]["bias"], weights["conv.bias"])
    weights["conv.bias"] = np.array([1, 2])
    with pytest.raises(ValueError, match=r"expected 'conv\.bias' of dtype float32, got int64"):
        load_torch(weights, small_shapes(), cast=True)


def test_tree_is_as_before():
    boxed = {"params": {"kernel": nn.Partitioned(jnp.ones((2, 3)), (None, "model"))}, "cache": {"index": jnp.ones(())}}
    filled, report = load_torch({"fc.weight": draw(3, 2)}, boxed, {"": "fc"})
    assert jax.tree.structure(filled) == jax.tree.structure(boxed)
    assert report.used == {"kernel": "fc.weight"}
    np.testing.assert_array_equal(filled["params"]["kernel"].value, draw(3, 2).T)


def test_wrong_arguments():
    target, weights = small_linen(), small_weights()
    cases = [
        (
            lambda: load_torch("weights.pt", target),
            "source: expected a mapping of names to arrays or the path of a .safetensors file, got 'weights.pt'; "
            "pass model.state_dict(), torch.load(path) or dict(numpy.load(path))",
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
            "  kinds: expected as_is or dense or conv or conv_transpose for 'conv' with 4 axes, got 'transposed'\n"
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


# Keras


def test_keras_names():
    weights = {
        "conv/kernel:0": draw(1, 1, 4, 2),
        "conv/bias:0": draw(2),
        "bn/gamma:0": draw(2, seed=1),
        "bn/beta:0": draw(2, seed=2),
        "bn/moving_mean:0": draw(2, seed=3),
        "bn/moving_variance:0": draw(2, seed=4),
        "head/kernel:0": draw(2, 3),
        "head/bias:0": draw(3),
    }
    for target in (small_shapes(), SmallNNX()):
        filled, report = load_keras(weights, target)
        assert report == LoadReport(report.used, {}, (), (), {})
        found = leaves(filled)
        for path, name in report.used.items():
            key = next(key for key in found if key.endswith("".join(f"['{part}']" for part in path.split("/"))))
            np.testing.assert_array_equal(found[key], weights[f"{name}:0"])
    with pytest.raises(ValueError, match="bn/bias: expected 'bn/bias' or 'bn/beta' in the source, got no such name"):
        load_keras({k: v for k, v in weights.items() if "beta" not in k}, small_shapes())


@pytest.mark.parametrize("name", ["depthwise_kernel", "kernel"])
def test_keras_depthwise(name):
    x, kernel = draw(2, 5, 5, 3), draw(3, 3, 3, 2, seed=1)
    # Output channel k * multiplier + m is the m-th filter of input channel k.
    weight = np.moveaxis(kernel, (2, 3), (0, 1)).reshape(6, 1, 3, 3)
    expected = torch_conv(*map(np.float64, (np.moveaxis(x, -1, 1), weight)), groups=3)
    layer = nn.Conv(6, (3, 3), padding="VALID", feature_group_count=3, use_bias=False)
    variables, _ = load_keras(
        {f"dw/{name}": kernel},
        shapes_of(layer, jnp.asarray(x)),
        {"": "dw"},
        kinds={"": "depthwise"} if name == "kernel" else None,
    )
    np.testing.assert_allclose(layer.apply(variables, x), np.moveaxis(expected, 1, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("load", "layer", "weights", "message"),
    [
        (
            load_keras,
            nn.Conv(6, (3, 3), feature_group_count=3, use_bias=False),
            {"c/kernel": draw(3, 3, 3, 2)},
            "expected 'c/kernel' with shape (3, 3, 1, 6), got (3, 3, 3, 2); "
            "pass kinds={'': 'depthwise'} if that is its layout",
        ),
        (
            load_torch,
            nn.Dense(5, use_bias=False),
            {"c.weight": draw(3, 5)},
            "expected 'c.weight' with shape (5, 3), got (3, 5); pass kinds={'': 'as_is'} if that is its layout",
        ),
    ],
)
def test_kernels_that_lie_otherwise(load, layer, weights, message):
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load(weights, shapes_of(layer, jnp.zeros((1, 4, 4, 3))), {"": "c"})
    assert str(error.value) == f"{load.__name__}: 1 problem, nothing was loaded\n  kernel: {message}"
    kind = message.split("'")[-2]
    load(weights, shapes_of(layer, jnp.zeros((1, 4, 4, 3))), {"": "c"}, kinds={"": kind})


@pytest.mark.parametrize("transpose_kernel", [True, False])
def test_keras_conv_transpose(transpose_kernel):
    x, kernel = draw(2, 4, 4, 3), draw(3, 2, 3, 3, seed=1)  # [*window, out, in]
    expected = torch_conv_transpose(*map(np.float64, (np.moveaxis(x, -1, 1), np.moveaxis(kernel, (3, 2), (0, 1)))), 2)
    layer = nn.ConvTranspose(3, (3, 2), (2, 2), padding="VALID", use_bias=False, transpose_kernel=transpose_kernel)
    variables, _ = load_keras(
        {"up/kernel": kernel},
        shapes_of(layer, jnp.asarray(x)),
        {"": "up"},
        kinds=None if transpose_kernel else {"": "conv_transpose"},
    )
    np.testing.assert_allclose(layer.apply(variables, x), np.moveaxis(expected, 1, -1), atol=1e-5)


# Tensors and files


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors(dtype):
    torch = pytest.importorskip("torch")
    weights = {
        name: torch.nn.Parameter(torch.tensor(v).to(getattr(torch, dtype)))
        for name, v in norm_entries().items()
        if v.ndim
    }
    with torch.no_grad():
        weights["running_var"][:] = torch.tensor([torch.nan, torch.inf, 1e-7])
    entries = batch_norm_to_torch(*batch_norm_from_torch(weights))
    for name, tensor in weights.items():
        bits = tensor.detach().view(torch.int32 if dtype == "float32" else torch.int16).numpy()
        np.testing.assert_array_equal(entries[name].view(bits.dtype), bits)


def test_tensors_that_numpy_does_not_hold():
    torch = pytest.importorskip("torch")
    entries = {"weight": torch.empty(3, device="meta"), "bias": torch.zeros(3).to(torch.float8_e5m2)}
    with pytest.raises(ValueError, match="nothing was returned") as error:
        batch_norm_from_torch(entries)
    assert str(error.value) == (
        "batch_norm_from_torch: 2 problems, nothing was returned\n"
        "  weight: expected a tensor that NumPy can hold, got torch.float32 on meta\n"
        "  bias: expected a tensor that NumPy can hold, got torch.float8_e5m2 on cpu"
    )


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
def test_norm_of_installed_torch(options):
    torch = pytest.importorskip("torch")
    layer = torch.nn.BatchNorm2d(3, **options)
    entries = batch_norm_to_torch(*batch_norm_from_torch(layer.state_dict()))
    layer.load_state_dict({name: torch.from_numpy(v) for name, v in entries.items()}, strict=True)
    assert_same_bits(entries, {name: v.numpy() for name, v in layer.state_dict().items()})


def test_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    # Eight bytes for the length of the header, the header, the arrays.
    entries, header, data = norm_entries(dtype=ml_dtypes.bfloat16), {}, b""
    for name, v in entries.items():
        ends = [len(data), len(data) + v.nbytes]
        header[name] = {"dtype": "I64" if v.dtype == np.int64 else "BF16", "shape": v.shape, "data_offsets": ends}
        data += v.tobytes()
    encoded = json.dumps(header).encode()
    (tmp_path / "norm.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    assert_same_bits(batch_norm_to_torch(*batch_norm_from_torch(tmp_path / "norm.safetensors")), entries)


def test_safetensors_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "norm.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError) as error:
        batch_norm_from_torch(str(tmp_path / "norm.safetensors"))
    assert str(error.value) == "safetensors: needed to read .safetensors files; pip install 'jaxbn[tools]'"


def test_state_that_trained_on_goes_back():
    """What the functions return fits as well as what they were given."""
    params, state = batch_norm_init(2)
    _, state = jaxbn.batch_norm_train(jnp.ones((4, 2)), params, state)
    entries = batch_norm_to_torch(params, state, "bn")
    assert int(entries["bn.num_batches_tracked"]) == 1
    jax.tree.map(np.testing.assert_array_equal, batch_norm_from_torch(entries, "bn"), (params, state))
