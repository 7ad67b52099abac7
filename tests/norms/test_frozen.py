"""Does fine-tuning as docs/fine_tuning.md has it keep fixed what it says, bit for bit, and train the rest?"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn._versions import iter_modules

STEPS = 100
KEYS = jax.random.split(jax.random.key(0), 6)
X = jax.random.normal(KEYS[0], (16, 4)) * 2 + 1
TARGET = jax.random.normal(KEYS[1], (16, 1))
NORMAL = jax.nn.initializers.normal(1.0)

# Both move what has no gradient: decay by itself, momentum for as long as it lasts.
OPTIMIZERS = {
    "sgd": optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.01, momentum=0.9)),
    "adamw": optax.adamw(0.01, weight_decay=0.01),
}

# What is fixed in each way, by the names in Parts.
FIXED = {"nothing": (), "statistics": ("statistics",), "norm": ("statistics", "affine")}


class Parts(NamedTuple):
    """Running statistics, with the number of batches; scale and bias; and the parameters of other layers."""

    statistics: object
    affine: object
    rest: object


@pytest.fixture(autouse=True)
def standard_dtype_promotion():
    # Adam in optax multiplies a Python float's array by an integer one.
    with jax.numpy_dtype_promotion("standard"):
        yield


def partition(tx, labels):
    return optax.partition({"trained": tx, "fixed": optax.set_to_zero()}, labels)


def mean_square(y):
    return jnp.mean((y - TARGET) ** 2)


def functions(fixed, tx, stop=False):
    """With `stop`, only the gradients of the norm are stopped: the way that the page warns of."""
    params = {
        "hidden": NORMAL(KEYS[2], (4, 8)),
        "norm": jaxbn.BatchNormParams(NORMAL(KEYS[3], (8,)), NORMAL(KEYS[4], (8,))),
        "head": NORMAL(KEYS[5], (8, 1)),
    }
    _, state = jaxbn.batch_norm_train(X @ params["hidden"], None, jaxbn.batch_norm_init(8)[1], momentum=None)
    if fixed == "norm":
        tx = partition(tx, {"hidden": "trained", "norm": "fixed", "head": "trained"})

    @jax.jit
    def step(params, state, opt_state):
        def loss_of(params):
            x = X @ params["hidden"]
            norm = jax.lax.stop_gradient(params["norm"]) if stop else params["norm"]
            if fixed == "nothing":
                x, new = jaxbn.batch_norm_train(x, norm, state, momentum=None)
            else:
                x, new = jaxbn.batch_norm_eval(x, norm, state)
            return mean_square(nn.relu(x) @ params["head"]), new

        grads, state_ = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state_, opt_state

    opt_state = tx.init(params)
    while True:
        yield Parts(state, params["norm"], (params["hidden"], params["head"]))
        for _ in range(STEPS):
            params, state, opt_state = step(params, state, opt_state)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, use_bias=False)(x)
        norm = jaxbn.linen.BatchNorm(momentum=None, scale_init=NORMAL, bias_init=NORMAL)
        x = norm(x, use_running_average=not train)
        return nn.Dense(1)(nn.relu(x))


def linen(fixed, tx):
    model = Linen()
    variables = model.init(KEYS[2], X, train=True)
    _, updates = model.apply(variables, X, train=True, mutable=["batch_stats"])
    params, stats = variables["params"], updates["batch_stats"]
    if fixed == "norm":
        norms = {path[:-1] for path, _ in jax.tree.leaves_with_path(stats)}
        labels = jax.tree.map_with_path(lambda path, _: "fixed" if path[:-1] in norms else "trained", params)
        tx = partition(tx, labels)

    @jax.jit
    def step(params, stats, opt_state):
        def loss_of(params):
            variables = {"params": params, "batch_stats": stats}
            if fixed == "nothing":
                y, new = model.apply(variables, X, train=True, mutable=["batch_stats"])
                return mean_square(y), new["batch_stats"]
            return mean_square(jaxbn.linen.apply_fixed(model, variables, X, train=True)), stats

        grads, stats_ = jax.grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats_, opt_state

    opt_state = tx.init(params)
    while True:
        yield Parts(stats, params["BatchNorm_0"], (params["Dense_0"], params["Dense_1"]))
        for _ in range(STEPS):
            params, stats, opt_state = step(params, stats, opt_state)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
        self.norm = jaxbn.nnx.BatchNorm(8, momentum=None, scale_init=NORMAL, bias_init=NORMAL, rngs=rngs)
        self.head = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))))


@nnx.jit
def nnx_step(model, optimizer):
    def loss_of(model):
        return mean_square(model(X))

    optimizer.update(model, nnx.grad(loss_of, argnums=nnx.DiffState(0, optimizer.wrt))(model))


def nnx_parts(model):
    def copied(filter_, *modules):
        return [jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(module, filter_))) for module in modules]

    norm = model.norm
    return Parts(copied(nnx.BatchStat, norm), copied(nnx.Param, norm), copied(nnx.Param, model.hidden, model.head))


def nnx_layers(fixed, tx):
    """Evaluates between the rounds, as a program would."""
    model = NNX(nnx.Rngs(0))
    model.train()
    model(X)
    trained = nnx.Param
    if fixed == "norm":
        norms = [path for path, module in iter_modules(model) if isinstance(module, jaxbn.nnx.BatchNorm)]
        trained = nnx.All(nnx.Param, lambda path, _: path[:-1] not in norms)
    optimizer = nnx.Optimizer(model, tx, wrt=trained)
    if fixed != "nothing":
        jaxbn.nnx.fix_statistics(model)
    while True:
        yield nnx_parts(model)
        model.train()
        for _ in range(STEPS):
            nnx_step(model, optimizer)
        model.eval()


def moved(before, after):
    """For each leaf, by name, whether any of its bits changed."""
    leaves = zip(jax.tree.leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {jax.tree_util.keystr(path): np.asarray(a).tobytes() != np.asarray(b).tobytes() for (path, a), b in leaves}


def assert_moved(before, after, fixed):
    for part, old, new in zip(Parts._fields, before, after, strict=True):
        for name, is_moved in moved(old, new).items():
            assert is_moved == (part not in fixed), (part, name)


WAYS = [functions, linen, nnx_layers]
# Every pair of a way, what is fixed, and an optimizer.
PAIRS = [(way, fixed, ("sgd", "adamw")[(w + f) % 2]) for w, way in enumerate(WAYS) for f, fixed in enumerate(FIXED)]


@pytest.mark.slow
@pytest.mark.parametrize(("train", "fixed", "optimizer"), PAIRS)
def test_what_is_fixed_stays_and_the_rest_moves(train, fixed, optimizer):
    rounds = train(fixed, OPTIMIZERS[optimizer])
    before, middle, after = (next(rounds) for _ in range(3))
    assert_moved(before, middle, FIXED[fixed])
    assert_moved(middle, after, FIXED[fixed])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_gradients_do_not_keep_the_optimizer_away(optimizer):
    rounds = functions("statistics", OPTIMIZERS[optimizer], stop=True)
    assert_moved(next(rounds), next(rounds), FIXED["statistics"])
