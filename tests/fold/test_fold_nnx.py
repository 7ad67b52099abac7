"""Whole NNX models without their batch norms compute what they did with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from folding import X, assert_near, message_of, shaken
from versions import nnx_list

import jaxbn.nnx
from jaxbn._versions import iter_modules
from jaxbn.fold import Identity, fold_nnx, propose_nnx

pytestmark = pytest.mark.slow

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


class TwoInputsNNX(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(3, 3, kernel_init=ZEROS, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x, offset):
        return nnx.relu(self.norm(self.dense(x)) + offset)


def test_nnx_call():
    x, offset, other = X[:, 0, 0], X[0, :1, 0], X[1, :1, 0]
    model = shaken_nnx(TwoInputsNNX())

    def call(model, batch):
        return model(*batch)

    assert propose_nnx(model, (x, offset), call=call) == {"norm": "dense"}
    folded = fold_nnx(model, (x, offset), call=call)
    model.eval()
    assert_near(folded(x, other), model(x, other))


class Counting(nnx.Module):
    """Changes a variable of its own in each call."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 4, kernel_init=ZEROS, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += 1
        return self.norm(self.linear(x))


@pytest.mark.parametrize("ref", [False, True])
def test_nnx_neither_the_model_nor_what_is_returned_has_run(ref):
    with nnx.var_defaults(ref=ref):
        model = shaken_nnx(Counting())
    folded = fold_nnx(model, X)
    assert (float(model.calls[...]), float(folded.calls[...])) == (0, 0)
    model.eval()
    assert_near(folded(X), model(X))


def test_fixed_statistics_are_evaluation():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jaxbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    call, x = (lambda model, x: model.layers[1](model.layers[0](x), False)), jnp.ones((2, 3))
    assert propose_nnx(model, x, call=call).keys() == set()
    assert propose_nnx(jaxbn.nnx.fix_statistics(model), x, call=call) == {"layers/1": "layers/0"}
