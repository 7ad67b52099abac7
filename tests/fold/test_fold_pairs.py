"""Which norms stay and why, which pairs are refused, and what the errors say."""

import functools
import types

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folding import NORM, PAIRS, Odd, ResNet, X, init, message_of

from jaxbn.fold import Pairs, fold_linen, fold_nnx, propose_linen, propose_nnx
from jaxbn.fold._fold import fold_checked

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def variables():
    return init(ResNet())


@pytest.mark.parametrize(
    "case",
    [
        "derived",
        "returned too",
        "two users",
        "two users of the norm",
        "two layers",
        "relu between",
        "before same",
        "shared conv",
        "masked",
    ],
)
def test_linen_not_proposed(case):
    model = Odd(case)
    variables = init(model)
    assert propose_linen(model, variables, X) == {}


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (
            "derived",
            "before it: conv, but Centred is a derived class; name it in pairs if its kernel is used as Flax uses it; "
            "after it: an output",
        ),
        ("clipped", "expected norm to be called as in Flax or jaxbn, got Clip.__call__"),
        (
            "clipped conv",
            "before it: conv, expected conv to be called as in Flax or jaxbn, got ClipConv.__call__; "
            "after it: an output",
        ),
        ("two users", "before it: conv, whose output also goes to add; after it: add"),
        ("two layers", "before it: an input; after it: Dense_0 and conv"),
        ("relu between", "before it: relu; after it: an output"),
        (
            "reshaped between",
            "before it: reshape (pairs may name the layer across it if channels stay last); after it: an output",
        ),
        ("channels first", "expected norm to have its channels on the last axis, got axis 1"),
    ],
)
def test_linen_why_not(case, why):
    model = Odd(case)
    assert propose_linen(model, init(model), X).unfolded == {"norm": why}


DERIVED = "but Centred is a derived class; name it in pairs if its kernel is used as Flax uses it"


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("derived", f"before it: conv, {DERIVED}; after it: an output"),
        ("returned too", "before it: conv, whose output also goes to an output; after it: an output"),
        ("two users", "before it: conv, whose output also goes to add; after it: add"),
        ("two users of the norm", "before it: an input; after it: add and conv"),
        ("relu between", "before it: relu; after it: an output"),
        ("shared conv", "before it: conv, whose output also goes to BatchNorm_0; after it: an output"),
    ],
)
def test_linen_wrong_pairs_are_noticed(case, why):
    model = Odd(case)
    message = message_of(lambda: fold_linen(model, init(model), X, pairs=NORM))
    head, *lines = message.split("\n  ")
    expected = "pairs: expected the folded model's outputs to differ by at most 0.00035 of the largest, got "
    difference = head.removeprefix(expected).partition(";")[0]
    assert head == expected + difference + (
        "; leave out of pairs what has another user or another source than its pair, or pass a larger tolerance; "
        "these pairs differ alone too:"
    )
    assert lines == [f"norm into conv: {difference}; {why}"]


def test_linen_wrong_pair_among_right_ones_is_named(variables):
    wrong = {"BatchNorm_0": "Conv_0", "Block_0/norm_proj": "Block_0/Conv_1"}
    message = message_of(lambda: fold_linen(ResNet(), variables, X, pairs=wrong))
    assert message.startswith("pairs: expected the folded model's outputs to differ by at most 0.00035 of the largest")
    lines = message.split("\n  ")[1:]
    assert len(lines) == 1
    assert lines[0].startswith("Block_0/norm_proj into Block_0/Conv_1: ")
    assert lines[0].endswith("; it folds into Block_0/conv_proj")


def test_pairs_that_differ_only_together():
    pairs, one = Pairs({"a": "b", "c": "d"}, {}), jnp.ones(1)
    trace = types.SimpleNamespace(outputs=lambda: one)
    message = message_of(lambda: fold_checked(trace, pairs, 0.1, len, lambda count, _: one - 0.08 * count))
    assert message == (
        "pairs: expected the folded model's outputs to differ by at most 0.1 of the largest, got 0.16; leave out of "
        "pairs what has another user or another source than its pair, or pass a larger tolerance; each pair alone is "
        "within that"
    )


def test_linen_errors(variables):
    fold = functools.partial(fold_linen, ResNet(), variables, X)
    norms, layers = list(PAIRS), [*PAIRS.values(), "Dense_0"]
    message = message_of(lambda: fold(pairs={"BatchNorm_7": "Conv_0", "BatchNorm_0": "conv"}))
    assert message.startswith("pairs: expected the path of a batch norm, one of ['BatchNorm_0', ")
    assert ", got 'BatchNorm_7'; expected the path of a layer (Conv, ConvTranspose, Dense), one of ['Conv_0'" in message
    assert message.endswith("got 'conv'")
    assert all(path in message for path in norms + layers)
    assert message_of(lambda: fold(pairs={})) == "pairs: expected at least one {norm: layer}, got none"


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        (
            "two users",
            {"call": lambda apply, x: apply(x, train=True)},
            "expected norm in evaluation, got use_running_average other than True",
        ),
        ("several domains", {}, "expected norm with one set of statistics, got num_domains"),
        ("channels first", {}, "expected norm to have its channels on the last axis, got axis 1"),
        ("masked", {}, "expected no masked layer after norm, got conv with a mask"),
        ("clipped", {}, "expected norm to be called as in Flax or jaxbn, got Clip.__call__"),
        ("clipped conv", {}, "expected conv to be called as in Flax or jaxbn, got ClipConv.__call__"),
    ],
)
def test_linen_what_cannot_be_folded(case, options, message):
    model = Odd(case)
    variables = init(model)
    assert message_of(lambda: fold_linen(model, variables, X, pairs=NORM, **options)) == f"pairs: {message}"


def test_linen_nothing_to_fold():
    model = Odd("before same")
    variables = init(model)
    assert message_of(lambda: fold_linen(model, variables, X)) == (
        "model: expected a batch norm that folds into a layer right beside it, got 1 that do not\n"
        "  norm: before it: an input; after it: conv, which pads with zeros"
    )
    assert message_of(lambda: fold_linen(model, variables, X, pairs=NORM)) == (
        "norm into conv: before: expected a shift (bias - mean * factor) of 0 in every channel of a norm before a "
        "layer that pads with zeros, got a shift in 3 of 3 channels (0, 1, 2): the padding would have to be shifted "
        "too; leave this norm out of pairs"
    )


def test_linen_many_norms_that_stay():
    model = nn.Sequential([layer for _ in range(12) for layer in (nn.relu, nn.BatchNorm(use_running_average=True))])
    message = message_of(lambda: fold_linen(model, init(model), X))
    lines = message.split("\n  ")
    assert lines[0] == "model: expected a batch norm that folds into a layer right beside it, got 12 that do not"
    assert lines[1] == "layers_1: before it: relu; after it: relu"
    assert lines[11:] == ["and 2 more; `unfolded` of what is proposed has them all"]


def test_inputs_that_tell_nothing(variables):
    # Not finite outputs cannot be compared.
    message = message_of(lambda: fold_linen(ResNet(), variables, X * jnp.nan, pairs={"BatchNorm_0": "Conv_0"}))
    assert "of the largest, got nan" in message
    # It is a right pair, so there is no reason to give.
    assert message.endswith("\n  BatchNorm_0 into Conv_0: nan")


def test_outputs_that_cannot_be_compared(variables):
    model = ResNet()

    def labels(apply, x):
        return apply(x, method=lambda model, x: model(x).argmax(-1).astype(jnp.int32))

    message = message_of(lambda: fold_linen(model, variables, X, call=labels))
    assert message == "model: expected floating-point outputs to compare before and after folding, got none"


@pytest.mark.parametrize("tool", [propose_linen, fold_linen, propose_nnx, fold_nnx])
def test_a_batch_that_the_model_does_not_take(tool):
    if tool in (propose_linen, fold_linen):
        net = nn.Sequential([nn.Conv(3, (1,)), nn.BatchNorm(use_running_average=True)])
        arguments, name = (net, init(net)), "apply"
    else:
        net = nnx.Sequential(nnx.Conv(3, 3, (1,), rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        arguments, name = (net,), "model"
    with pytest.raises(TypeError) as error:
        tool(*arguments, (X, np.arange(4)))
    assert str(error.value) == (
        "batch: expected what the model takes, got a tuple of 2, for which it raised AttributeError: 'tuple' object "
        f"has no attribute 'ndim'; say what to give it: call=lambda {name}, batch: {name}(batch[0])"
    )
