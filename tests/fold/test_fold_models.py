"""Whole Linen and NNX models without their batch norms compute what they did with them."""

import functools
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import nnx_list

import jaxbn.linen
import jaxbn.nnx
from jaxbn._versions import iter_modules
from jaxbn.fold import Identity, Pairs, apply_folded, fold_linen, fold_nnx, propose_linen, propose_nnx
from jaxbn.fold._outputs import check_same_outputs

pytestmark = pytest.mark.slow

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 6, 3)), jnp.float32)
EPS32 = float(np.finfo(np.float32).eps)


def shaken(tree):
    """A tree of variables as if after training, from one of shapes: no two channels alike."""
    rng = np.random.default_rng(1)

    def shake(path, v):
        positive = any(name in jax.tree_util.keystr(path) for name in ("var", "scale"))
        values = rng.uniform(0.5, 1.5, v.shape) if positive else rng.normal(0, 0.3, v.shape)
        return jnp.asarray(values, v.dtype)

    return jax.tree_util.tree_map_with_path(shake, tree)


def assert_near(actual, expected, ulps=200, eps=EPS32):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    actual, expected = (np.asarray(v).astype(np.float64) for v in (actual, expected))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= ulps * eps, f"{error / eps:.1f} eps"


class Block(nn.Module):
    """The usual residual block; its norm is a partial of a module class, as in Flax's ImageNet example."""

    conv: Any
    norm: Any
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), 2)(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.width, (3, 3))(y))
        x = self.norm(name="norm_proj")(self.conv(self.width, (1, 1), 2, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    norm: Any = nn.BatchNorm
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = functools.partial(nn.Conv, use_bias=self.use_bias)
        norm = functools.partial(self.norm, use_running_average=not train, epsilon=1e-3)
        x = nn.relu(norm()(conv(4, (3, 3))(x)))
        for width in (6, 8):
            x = Block(conv, norm, width)(x)
        return nn.Dense(5)(x.mean((1, 2)))


PAIRS = {
    "BatchNorm_0": "Conv_0",
    **{f"Block_{i}/BatchNorm_{j}": f"Block_{i}/Conv_{j}" for i in range(2) for j in range(2)},
    **{f"Block_{i}/norm_proj": f"Block_{i}/conv_proj" for i in range(2)},
}


def init(model, x=X):
    return shaken(jax.eval_shape(model.init, jax.random.key(0), x))


def apply(model, variables, x=X):
    return jax.jit(model.apply)(variables, x)


def apply_without(model, pairs, variables, x=X):
    return jax.jit(functools.partial(apply_folded, model, pairs))(variables, x)


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


class Centred(nn.Conv):
    """Does something else with its kernel."""

    def param(self, name, *rest):
        value = super().param(name, *rest)
        return value - value.mean() if name == "kernel" else value


class Clip(nn.BatchNorm):
    """Does something else after it has normalized."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x).clip(-1, 1)


class ClipConv(nn.Conv):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x).clip(-1, 1)


class Odd(nn.Module):
    """A choice of what is next to a norm."""

    case: str

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, name="norm")
        conv = functools.partial(nn.Conv, name="conv")
        match self.case:
            case "two users":
                x = conv(4, (3, 3))(x)
                return norm()(x) + x
            case "returned too":
                x = conv(4, (3, 3))(x)
                return norm()(x), x
            case "two users of the norm":
                x = norm()(x)
                return nn.Dense(3, name="conv")(x) + x
            case "two layers":
                x = norm()(x)
                return conv(4, (1, 1))(x) + nn.Dense(4)(x)
            case "reshaped between":
                return norm()(conv(4, (3, 3))(x).reshape(4, -1, 4))
            case "relu between":
                return norm()(nn.relu(conv(4, (3, 3))(x)))
            case "before dense":
                return nn.Dense(4, name="conv", use_bias=False)(norm()(x))
            case "before valid":
                return conv(6, (3, 3), feature_group_count=3, padding="VALID")(norm()(x))
            case "before same":
                return conv(4, (3, 3))(norm()(x))
            case "masked":
                return conv(4, (1, 1), mask=jnp.ones((1, 1, 3, 4)))(norm()(x))
            case "both sides":
                x = conv(4, (1, 1), use_bias=False)(norm()(x))
                return nn.BatchNorm(use_running_average=not train)(x)
            case "shared conv":
                shared = conv(3, (3, 3))
                return norm()(shared(nn.BatchNorm(use_running_average=not train)(shared(x))))
            case "shared pair":
                shared, shared_norm = conv(3, (3, 3)), norm()
                for _ in range(2):
                    x = nn.relu(shared_norm(shared(x)))
                return x
            case "channels first":
                return norm(axis=1)(conv(6, (3, 3))(x))
            case "several domains":
                return jaxbn.linen.BatchNorm(use_running_average=True, num_domains=2, name="norm")(
                    conv(4, (3, 3))(x), domain=1
                )
            case "float32 after bfloat16":
                return norm()(conv(4, (3, 3), dtype=jnp.bfloat16)(x))
            case "bfloat16":
                return norm(dtype=jnp.bfloat16)(conv(4, (3, 3), dtype=jnp.bfloat16)(x))
            case "derived":
                return norm()(Centred(4, (3, 3), name="conv")(x))
            case "clipped":
                return Clip(use_running_average=True, name="norm")(conv(4, (3, 3))(x))
            case "clipped conv":
                return norm()(ClipConv(4, (3, 3), name="conv")(x))
            case "transposed":
                return norm()(nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True, name="conv")(x))
            case "boxed":
                init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
                return norm()(conv(4, (3, 3), kernel_init=init, use_bias=False)(x))
            case "no affine":
                return norm(use_scale=False, use_bias=False)(conv(4, (3, 3))(x))


NORM = {"norm": "conv"}


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


def test_linen_pairs_that_only_the_caller_can_know():
    model = Odd("reshaped between")
    variables = init(model)
    assert propose_linen(model, variables, X) == {}
    new, _ = fold_linen(model, variables, X, pairs=NORM)
    assert_near(apply_without(model, NORM, new), apply(model, variables))


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


def message_of(call):
    with pytest.raises(ValueError, match=": expected ") as error:
        call()
    return str(error.value)


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
    message = message_of(lambda: check_same_outputs(None, pairs, 0.1, one, lambda pairs: one - 0.08 * len(pairs)))
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


ZEROS = nnx.initializers.zeros_init()


class NNXNet(nnx.Module):
    """Convolution and norm in lists and under two names, with dropout that only evaluation leaves out."""

    def __init__(self, norm=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=ZEROS, rngs=rngs)
        self.convs = nnx_list([conv(3, 4), conv(4, 4), conv(4, 4, feature_group_count=2)])
        self.norms = nnx_list([norm(4, epsilon=1e-3, rngs=rngs) for _ in range(3)])
        self.first = self.norms[0]
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.sequential = nnx.Sequential(nnx.Linear(4, 5, kernel_init=ZEROS, rngs=rngs), norm(5, rngs=rngs))

    def __call__(self, x):
        x = nnx.relu(self.first(self.convs[0](x)))
        for conv, norm in zip(self.convs[1:], self.norms[1:], strict=True):
            x = self.dropout(x + nnx.relu(norm(conv(x))))
        return self.sequential(x.mean((1, 2)))


def shaken_nnx(model):
    nnx.update(model, shaken(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jaxbn.nnx.BatchNorm])
def test_nnx(norm):
    model = shaken_nnx(NNXNet(norm))
    before = jax.tree.map(jnp.copy, nnx.split(model, (nnx.Param, nnx.BatchStat), ...))
    pairs = propose_nnx(model, X)
    assert set(pairs.values()) == {"convs/0", "convs/1", "convs/2", "sequential/layers/0"}
    folded = fold_nnx(model, X)
    after = nnx.split(model, (nnx.Param, nnx.BatchStat), ...)
    assert before[0] == after[0]
    jax.tree.map(np.testing.assert_array_equal, before[1], after[1])
    assert isinstance(folded, NNXNet)
    assert not [m for _, m in iter_modules(folded) if isinstance(m, nnx.BatchNorm)]
    assert type(folded.first) is Identity
    assert folded.first is folded.norms[0]
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    assert folded.convs[0].use_bias
    model.eval()
    expected = nnx.jit(lambda model, x: model(x))(model, X + 1)
    assert_near(nnx.jit(lambda model, x: model(x))(folded, X + 1), expected)
    # What is saved of it is what it is made of.
    restored = nnx.merge(*nnx.split(folded))
    np.testing.assert_array_equal(restored(X), folded(X))


def test_nnx_wrong_pairs():
    model = shaken_nnx(NNXNet())
    norms = sorted(propose_nnx(model, X))
    assert norms == ["first", "norms/1", "norms/2", "sequential/layers/1"]
    message = message_of(lambda: fold_nnx(model, X, pairs={"norms/1": "convs/0"}))
    assert "\n  norms/1 into convs/0: " in message
    assert message.endswith("; it folds into convs/1")
    assert message_of(lambda: fold_nnx(model, X, pairs={"norm": "convs/1"})).startswith(
        "pairs: expected the path of a batch norm, one of ["
    )


def test_nnx_stacked_and_before():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.linear = nnx.Linear(3, 4, kernel_init=ZEROS, rngs=rngs)
            keys = jax.random.split(jax.random.key(0), 2)
            self.blocks = nnx.vmap(
                lambda key: nnx.Sequential(
                    nnx.Linear(4, 4, kernel_init=ZEROS, rngs=nnx.Rngs(key)), nnx.BatchNorm(4, rngs=nnx.Rngs(key))
                )
            )(keys)

        def __call__(self, x):
            x = self.linear(self.norm(x))
            return nnx.scan(lambda x, block: nnx.relu(block(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.blocks
            )

    model = shaken_nnx(Net())
    x = X[:, 0, 0]
    assert propose_nnx(model, x) == {"norm": "linear", "blocks/layers/1": "blocks/layers/0"}
    folded = fold_nnx(model, x)
    model.eval()
    assert_near(folded(x), model(x))
    assert folded.blocks.layers[0].bias.shape == (2, 4)


def test_nnx_jit_within_the_model():
    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 4, kernel_init=ZEROS, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        @nnx.jit
        def block(self, x):
            return self.norm(self.linear(x))

        def __call__(self, x):
            return nnx.relu(self.block(x))

    model = shaken_nnx(Net())
    model.eval()
    expected = model(X)
    # Not what the first call left in a cache.
    for _ in range(2):
        assert propose_nnx(model, X) == {"norm": "linear"}
    assert_near(fold_nnx(model, X)(X), expected)


class ClipNNX(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(x).clip(-1, 1)


class ClipLinear(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x).clip(-1, 1)


class NamedNNX(jaxbn.nnx.BatchNorm):
    """Has another constructor and Flax's call."""

    def __init__(self, rngs):
        super().__init__(3, epsilon=1e-3, rngs=rngs)


def test_nnx_classes_with_a_call_of_their_own_stay():
    rngs = nnx.Rngs(0)
    linears = [nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs), ClipLinear(3, 3, rngs=rngs)]
    norms = [NamedNNX(rngs), ClipNNX(3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)]
    layers = [layer for pair in zip(linears, norms, strict=True) for layer in pair]
    model = shaken_nnx(nnx.Sequential(*layers))
    x = X[:, 0, 0] / 100  # nothing to clip
    pairs = propose_nnx(model, x)
    assert pairs == {"layers/1": "layers/0"}
    assert pairs.unfolded == {
        "layers/3": "expected layers/3 to be called as in Flax or jaxbn, got ClipNNX.__call__",
        "layers/5": "before it: layers/4, expected layers/4 to be called as in Flax or jaxbn, got ClipLinear.__call__; "
        "after it: an output",
    }
    folded = fold_nnx(model, x)
    model.eval()
    assert_near(folded(x * 1e4), model(x * 1e4))
    assert message_of(lambda: fold_nnx(model, x, pairs={"layers/3": "layers/2"})) == (
        "pairs: expected layers/3 to be called as in Flax or jaxbn, got ClipNNX.__call__"
    )


@pytest.mark.parametrize("name", ["kernel", "bias"])
def test_nnx_variables_of_several_modules_are_left_alone(name):
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a, self.b, self.c = (nnx.Linear(3, 3, rngs=rngs) for _ in range(3))
            self.norm, self.last = nnx.BatchNorm(3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            setattr(self.b, name, getattr(self.a, name))
            self.again = self.c  # the same module: what it has is its own

        def __call__(self, x):
            return self.last(self.again(nnx.relu(self.norm(self.a(x)))))

        def features(self, x):
            return self.b(x)

    model, x = shaken_nnx(Net()), X[:, 0, 0]
    pairs = propose_nnx(model, x)
    why = "expected variables that only a has, got one that b has too"
    assert pairs == {"last": "again"}
    assert pairs.unfolded == {"norm": f"before it: a, {why}; after it: relu"}
    np.testing.assert_array_equal(fold_nnx(model, x).features(x), model.features(x))
    assert message_of(lambda: fold_nnx(model, x, pairs={"norm": "a"})) == f"pairs: {why}"


def test_nnx_norm_behind_two_layers_stays():
    class Net(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a, self.b, self.norm = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs), NamedNNX(rngs)

        def __call__(self, x):
            return self.norm(self.b(self.norm(self.a(x))))

    assert propose_nnx(Net(), X[:, 0, 0]).unfolded == {"norm": "before it: a and b; after it: an output and b"}


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


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, x, offset, train):
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        return nn.relu(norm(nn.Dense(3, name="dense")(x)) + offset)


class TwoInputsNNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(3, 3, kernel_init=ZEROS, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, offset):
        return nnx.relu(self.norm(self.dense(x)) + offset)


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


def test_nnx_call():
    x, offset, other = X[:, 0, 0], X[0, :1, 0], X[1, :1, 0]
    model = shaken_nnx(TwoInputsNNX())

    def call(model, batch):
        return model(*batch)

    assert propose_nnx(model, (x, offset), call=call) == {"norm": "dense"}
    folded = fold_nnx(model, (x, offset), call=call)
    model.eval()
    assert_near(folded(x, other), model(x, other))


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
