"""Whole Linen models without their batch norms compute what they did with them."""

import functools

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folding import NORM, PAIRS, Odd, ResNet, X, apply, apply_without, assert_near, init, message_of, shaken

import jaxbn.linen
from jaxbn.fold import apply_folded, fold_linen, propose_linen

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables():
    return init(ResNet())


@pytest.fixture(scope="module")
def folded(variables):
    return fold_linen(ResNet(), variables, X)


def test_linen_resnet(variables, folded):
    before = jax.tree.map(np.array, variables)
    new, pairs = folded
    assert pairs == PAIRS
    assert_near(apply_without(ResNet(), pairs, new), apply(ResNet(), variables))
    # Other inputs than those that it was checked with.
    assert_near(apply_without(ResNet(), pairs, new, X * 3 + 1), apply(ResNet(), variables, X * 3 + 1))
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_linen_variables_are_those_of_the_model_written_without_norms(variables, folded):
    without = ResNet(norm=lambda **options: lambda x: x, use_bias=True)
    assert jax.tree.map(jnp.shape, folded[0]) == jax.tree.map(
        jnp.shape, jax.eval_shape(without.init, jax.random.key(0), X)
    )
    assert_near(apply(without, folded[0]), apply(ResNet(), variables))


def test_linen_with_our_norm_frozen_dict_and_some_pairs_only(variables):
    pairs = {"Block_0/BatchNorm_1": "Block_0/Conv_1"}
    model = ResNet(norm=jaxbn.linen.BatchNorm)
    assert propose_linen(model, variables, X) == PAIRS
    new, _ = fold_linen(model, flax.core.freeze(variables), X, pairs=pairs)
    assert "BatchNorm_1" not in new["batch_stats"]["Block_0"]
    assert "BatchNorm_1" not in new["params"]["Block_0"]
    assert "BatchNorm_0" in new["batch_stats"]["Block_0"]
    assert_near(apply_without(model, pairs, new), apply(ResNet(), variables))


@pytest.mark.parametrize(
    ("case", "pairs"),
    [
        ("before dense", NORM),
        ("before valid", NORM),
        ("both sides", {"norm": "conv", "BatchNorm_0": "conv"}),
        ("shared pair", NORM),
        ("transposed", NORM),
        ("boxed", NORM),
        ("no affine", NORM),
    ],
)
def test_linen_found_and_folded(case, pairs):
    model = Odd(case)
    variables = init(model)
    new, found = fold_linen(model, variables, X)
    assert found == pairs
    assert_near(apply_without(model, found, new), apply(model, variables))
    if case == "boxed":
        assert new["params"]["conv"]["kernel"].names == (None, None, None, "model")


@pytest.mark.parametrize(("case", "dtype"), [("float32 after bfloat16", jnp.float32), ("bfloat16", jnp.bfloat16)])
def test_linen_half_precision(case, dtype):
    model = Odd(case)
    # Flax's own layers promote.
    with jax.numpy_dtype_promotion("standard"):
        variables = init(model)
        new, pairs = fold_linen(model, variables, X)
        y = apply_without(model, pairs, new)
        assert y.dtype == dtype
        assert {v.dtype for v in jax.tree.leaves(new)} == {np.dtype(np.float32)}
        assert_near(y, apply(model, variables), 4, 2**-7)


def test_linen_pairs_that_only_the_caller_can_know():
    model = Odd("reshaped between")
    variables = init(model)
    assert propose_linen(model, variables, X) == {}
    new, _ = fold_linen(model, variables, X, pairs=NORM)
    assert_near(apply_without(model, NORM, new), apply(model, variables))


def test_variables_that_are_not_folded_are_refused(variables, folded):
    pairs = {"BatchNorm_0": "Conv_0"}
    assert message_of(lambda: apply_without(ResNet(), pairs, variables)) == (
        "variables: expected those that fold_linen returns, got statistics of BatchNorm_0, no bias of Conv_0"
    )


class Scanned(nn.Module):
    """Three blocks that are one, by nn.scan and nn.remat."""

    @nn.compact
    def __call__(self, x):
        class Body(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                y = nn.BatchNorm(use_running_average=True)(nn.Conv(3, (3, 3), use_bias=False)(x))
                return nn.relu(y), None

        body = nn.scan(
            nn.remat(Body), variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3
        )
        return body(name="body")(x, None)[0]


def test_linen_scanned():
    variables = init(Scanned())
    new, pairs = fold_linen(Scanned(), variables, X)
    assert pairs == {"body/BatchNorm_0": "body/Conv_0"}
    assert new["params"]["body"]["Conv_0"]["bias"].shape == (3, 3)
    assert_near(apply_without(Scanned(), pairs, new), apply(Scanned(), variables))


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, offset, train):
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        return nn.relu(norm(nn.Dense(3, name="dense")(x)) + offset)


def test_linen_call():
    x, offset, other = X[:, 0, 0], X[0, :1, 0], X[1, :1, 0]
    model = TwoInputs()
    variables = shaken(jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x, offset))

    def call(apply, batch):
        return apply(batch["x"], batch["offset"], train=False)

    batch = {"x": x, "offset": offset}
    assert propose_linen(model, variables, batch, call=call) == {"norm": "dense"}
    new, pairs = fold_linen(model, variables, batch, call=call)
    assert pairs == {"norm": "dense"}
    assert "batch_stats" not in new
    assert_near(apply_folded(model, pairs, new, x, other, train=False), model.apply(variables, x, other, train=False))
