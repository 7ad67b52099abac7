"""`apply_fixed`: the bits of evaluation in batch norms, whatever the model says, and training in all other layers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import assert_close

import jaxbn.linen
from jaxbn.linen import apply_fixed

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((8, 3)) * 2 + 1, jnp.float32)
DROPOUT = {"rngs": {"dropout": jax.random.key(1)}}
NORMAL = {"scale_init": nn.initializers.normal(1.0), "bias_init": nn.initializers.normal(1.0), "momentum": 0.5}
NORMS = {
    "flax": functools.partial(nn.BatchNorm, **NORMAL),
    "BatchNorm": functools.partial(jaxbn.linen.BatchNorm, **NORMAL),
    "BatchRenorm": functools.partial(jaxbn.linen.BatchRenorm, limits=(1.5, 0.5), **NORMAL),
}


class Model(nn.Module):
    """`evaluate` is the oracle: it evaluates these norms alone."""

    norm: type = NORMS["BatchNorm"]
    evaluate: tuple = ()

    @nn.compact
    def __call__(self, x, train):
        x = self.norm(use_running_average="first" in self.evaluate or not train, name="first")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x))
        return self.norm(name="second")(x, use_running_average="second" in self.evaluate or not train)


BOTH = ("first", "second")


def variables_of(model):
    variables = model.init(jax.random.key(0), X, train=False)
    _, updates = model.apply(variables, X * 2 + 1, train=True, mutable=["batch_stats"], **DROPOUT)
    return variables | updates


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("norm", NORMS)
def test_evaluation_bit_for_bit_and_dropout(norm):
    model = Model(NORMS[norm])
    variables = variables_of(model)
    y = apply_fixed(model, variables, X, train=True, **DROPOUT)
    assert_equal(y, Model(NORMS[norm], BOTH).apply(variables, X, train=True, **DROPOUT))
    assert (y != model.apply(variables, X, train=False)).any()
    assert_equal(apply_fixed(model, variables, X, train=False), model.apply(variables, X, train=False))


def test_formula_and_every_way_to_say_the_mode():
    for norm in (nn.BatchNorm(use_running_average=False), jaxbn.linen.BatchNorm(use_running_average=False)):
        variables = {
            "params": {"scale": jnp.arange(1.0, 4), "bias": jnp.ones(3)},
            "batch_stats": {"mean": jnp.arange(3.0), "var": jnp.arange(2.0, 5)},
        }
        expected = (np.asarray(X, np.float64) - [0, 1, 2]) / np.sqrt(np.array([2, 3, 4]) + 1e-5) * [1, 2, 3] + 1
        for mode in ((), (False,), (None,), (True,)):
            layer = norm.clone(use_running_average=False if mode == () else None)
            np.testing.assert_allclose(apply_fixed(layer, variables, X, *mode), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("only", "evaluated"),
    [
        (None, BOTH),
        ("first", ("first",)),
        (["second", "first"], BOTH),
        (lambda path, layer: path == ("second",) and layer.momentum == 0.5, ("second",)),
        (jaxbn.linen.BatchNorm, BOTH),
    ],
)
def test_only(only, evaluated):
    model = Model()
    variables = variables_of(model)
    options = {"train": True, "mutable": ["batch_stats"], **DROPOUT}
    y, updates = apply_fixed(model, variables, X, only=only, **options)
    assert_equal((y, updates), Model(evaluate=evaluated).apply(variables, X, **options))
    changed = {
        name for name in BOTH if (updates["batch_stats"][name]["mean"] != variables["batch_stats"][name]["mean"]).any()
    }
    assert changed == set(BOTH) - set(evaluated)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stop", [False, True])
def test_gradients(norm, stop):
    def grads(apply, model):
        def loss(params, x):
            return jnp.sum(jnp.sin(apply(model, {**variables, "params": params}, x)))

        return jax.grad(loss, argnums=(0, 1))(variables["params"], X)

    make = NORMS[norm]
    variables = variables_of(Model(make))
    variables = {collection: tree["first"] for collection, tree in variables.items()}
    actual, dx = grads(functools.partial(apply_fixed, stop_affine_gradients=stop), make(use_running_average=False))
    expected, expected_dx = grads(lambda model, *inputs: model.apply(*inputs), make(use_running_average=True))
    assert_equal(dx, expected_dx)
    assert all(v.all() for v in jax.tree.leaves(expected))
    assert_equal(actual, jax.tree.map(jnp.zeros_like, expected) if stop else expected)


@pytest.mark.parametrize("mutable", [False, [], "batch_stats", ["batch_stats"], True, nn.DenyList("params")])
def test_mutable(mutable):
    model = Model()
    variables = variables_of(model)
    expected = Model(evaluate=BOTH).apply(variables, X, train=True, mutable=mutable, **DROPOUT)
    assert_equal(apply_fixed(model, variables, X, train=True, mutable=mutable, **DROPOUT), expected)


def test_captured_intermediates():
    model = Model()
    variables = variables_of(model)
    y, state = apply_fixed(model, variables, X, train=True, capture_intermediates=True, **DROPOUT)
    assert state.keys() == {"intermediates"}
    assert_equal(state["intermediates"]["second"]["__call__"][0], y)


class Block(nn.Module):
    evaluate: bool = False

    @nn.compact
    def __call__(self, x, _):
        return jaxbn.linen.BatchNorm(use_running_average=self.evaluate, name="norm", **NORMAL)(x), None


# Made once, since `nn.jit` keeps for each class what it has traced.
JitBlock = nn.jit(Block)


class Jitted(nn.Module):
    evaluate: bool = False

    @nn.compact
    def __call__(self, x, _):
        return JitBlock(self.evaluate, name="block")(x, None)


SCANNED = nn.scan(Block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2)


@pytest.mark.parametrize("make", [Jitted, SCANNED, nn.remat(Block)], ids=["jit", "scan", "remat"])
def test_lifted_transformations(make):
    """`nn.jit` in particular: what it has traced in training is not what is wanted then, and the other way round."""
    model = make()
    variables = model.init(jax.random.key(0), X, None)

    def train():
        return model.apply(variables, X, None, mutable=["batch_stats"])

    trained = train()
    variables |= trained[1]
    actual = apply_fixed(model, variables, X, None, mutable=["batch_stats"])
    assert_equal(apply_fixed(model, variables, X, None), actual[0])
    assert_close(actual, make(evaluate=True).apply(variables, X, None, mutable=["batch_stats"]))
    assert_close(train()[0], trained[0])
    assert (train()[0][0] != actual[0][0]).any()


def test_under_jit():
    model = Model()
    variables = variables_of(model)
    step = jax.jit(functools.partial(apply_fixed, model, only="first"), static_argnames=("train", "mutable"))
    y, _ = step(variables, X, train=True, mutable=("batch_stats",), **DROPOUT)
    expected, _ = Model(evaluate=("first",)).apply(variables, X, train=True, mutable=["batch_stats"], **DROPOUT)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


class Own(nn.BatchNorm):
    """Calls that of its base class with a mode of its own."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x, use_running_average=False)


class Other(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return x - x.mean()


def test_derived_classes():
    model = nn.Sequential([Own()])
    variables = model.init(jax.random.key(0), X)
    np.testing.assert_allclose(apply_fixed(model, variables, X), 2 * X / np.sqrt(1 + 1e-5), rtol=1e-5)


NAMES = "the batch norms of this model are first, second"
CHOICE = "only: expected the choice of some batch norms, by paths of these or of modules that have them, got "


@pytest.mark.parametrize(
    ("model", "options", "kind", "message"),
    [
        (nn.Dense(3), {}, ValueError, "model: expected batch norms in it, got none in Dense"),
        (Model(), {"only": "third"}, ValueError, f"{CHOICE}'third'; {NAMES}"),
        (Model(), {"only": lambda path, layer: False}, ValueError, f"{CHOICE}a choice of none; {NAMES}"),
        (
            Model(),
            {"only": 3},
            TypeError,
            "only: expected a path such as 'backbone/norm', several, a class, a function of path and layer, or None "
            "for all layers, got 3",
        ),
        (
            nn.Sequential([Other()]),
            {},
            ValueError,
            "only: expected batch norms whose __call__ is that of their base class, or calls it, got layers_0 with a "
            "__call__ of its own; what it normalizes by cannot be fixed here: give it an option for that",
        ),
    ],
)
def test_errors(model, options, kind, message):
    train = {"train": False} if isinstance(model, Model) else {}
    variables = model.init(jax.random.key(0), X, **train)
    with pytest.raises(kind) as error:
        apply_fixed(model, variables, X, **train, **options)
    assert str(error.value) == message


def test_without_statistics():
    """Linen would make some, of mean 0 and variance 1."""
    variables = {"params": variables_of(Model())["params"]}
    with pytest.raises(ValueError, match="expected statistics") as error:
        apply_fixed(Model(), variables, X, train=True, mutable=["batch_stats"], **DROPOUT)
    assert str(error.value) == "variables: expected statistics of first in batch_stats, got none; restore them first"
