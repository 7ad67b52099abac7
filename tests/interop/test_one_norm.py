"""One batch norm of PyTorch, from tensors and files: the same bits."""

import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from weights import assert_same_bits, draw, small_shapes, small_weights, write_safetensors

import jaxbn.linen
import jaxbn.nnx
from jaxbn import BatchNormParams, BatchNormState, batch_norm_init
from jaxbn.interop import (
    batch_norm_from_torch,
    batch_norm_to_torch,
    load_torch,
    to_torch,
)


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


@pytest.mark.parametrize("prefix", ["", "bn"])
def test_norm_in_a_checkpoint(prefix):
    entries = norm_entries("bn.")
    source = {"model": entries if prefix else {k.removeprefix("bn."): v for k, v in entries.items()}, "epoch": 3}
    with pytest.raises(ValueError, match="source") as error:
        batch_norm_from_torch(source, prefix)
    assert str(error.value) == (
        "source: expected a mapping of names to arrays, got mappings within a mapping; pass source['model']"
    )


def test_wrong_prefix():
    with pytest.raises(ValueError, match="prefix") as error:
        batch_norm_from_torch(norm_entries("bn."), "norm")
    assert str(error.value) == (
        "prefix: expected that of a batch norm with entries, got 'norm.', with which none of the 5 names begins; "
        "a batch norm without parameters and statistics has no entries to load"
    )


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
    entries = norm_entries(dtype=ml_dtypes.bfloat16)
    dtypes = {name: "I64" if v.dtype == np.int64 else "BF16" for name, v in entries.items()}
    stored = {name: (dtypes[name], v.shape, v.tobytes()) for name, v in entries.items()}
    write_safetensors(tmp_path / "norm.safetensors", stored)
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
