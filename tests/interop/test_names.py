"""Which name each leaf gets, and what is reported."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import SmallNNX, assert_same_bits, draw, leaves, small_linen, small_shapes, small_weights

from jaxbn.interop import (
    load_torch,
    to_torch,
)


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
        "  head/bias: expected an array, since it stays as it is, got only shape and dtype; "
        "pass a target with values"
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
