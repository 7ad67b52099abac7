"""Only layers and norms that compute with their own variables, and alone do so, are folded; all others stay."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import needs

import jaxbn.linen
import jaxbn.nnx
from jaxbn._versions import iter_modules
from jaxbn.fold import apply_folded, fold_linen, fold_nnx, propose_linen, propose_nnx

X = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)), jnp.float32)


def shaken(tree):
    """A tree of variables as if after training, from one of shapes: no two channels alike, variances positive."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda v: jnp.asarray(rng.uniform(0.5, 1.5, v.shape), v.dtype), tree)


def assert_same(actual, expected):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def dense(**options):
    return nn.Dense(3, name="dense", **options)


def norm(name="norm"):
    return jaxbn.linen.BatchNorm(use_running_average=True, name=name)


def mapped(change, module, x):
    """What a wrapper of the user's does, which calls a module with other parameters than those it has."""
    lifted = nn.map_variables(
        lambda module, x: module(x),
        "params",
        trans_in_fn=lambda tree: jax.tree_util.tree_map_with_path(change, tree),
        init=module.is_initializing(),
        mutable=True,
    )
    return lifted(module, x)


def change_only(name, change):
    return lambda path, v: change(v) if path[-1].key == name else v


def tied(model, x):
    layer = dense()
    return norm()(layer(x)) @ layer.variables["params"]["kernel"].T


def penalized(model, x):
    layer = dense()
    return norm()(layer(x)) + jnp.sum(layer.variables["params"]["bias"] ** 2)


def heads(model, x):
    """Several layers, stacked, in front of one norm."""
    lifted = nn.vmap(
        lambda layer, x: layer(x),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=2,
    )
    return norm()(lifted(dense(), x)).sum(0)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return norm()(dense()(x)), None


def scanned(axis):
    options = {"variable_axes": {"params": axis, "batch_stats": axis}, "split_rngs": {"params": True}}
    return lambda model, x: nn.scan(Block, length=2, **options)(name="block")(x, None)[0]


def vmapped(axis):
    options = {"variable_axes": {"params": axis, "batch_stats": axis}, "split_rngs": {"params": True}}
    return lambda model, x: nn.vmap(Block, axis_size=2, in_axes=None, **options)(name="block")(x)[0].sum(0)


def sign_dot(x, kernel, *arguments, **options):
    return jax.lax.dot_general(x, jnp.sign(kernel), *arguments, **options)


KERNEL, BIAS = (functools.partial(change_only, name) for name in ("kernel", "bias"))
# For each way of calling a layer and a norm, why the norm stays.
LINEN_STAY = {
    "weight norm": (
        lambda _, x: norm()(nn.WeightNorm(dense())(x)),
        "before it: dense, expected dense to use its variable kernel, got a kernel from mul; after it: relu",
    ),
    "spectral norm": (
        lambda _, x: norm()(nn.SpectralNorm(dense())(x, update_stats=False)),
        "before it: dense, expected dense to use its variable kernel, got a kernel from div; after it: relu",
    ),
    "weight norm after it": (
        lambda _, x: nn.WeightNorm(dense())(norm()(x)),
        "before it: an input; after it: dense, expected dense to use its variable kernel, got a kernel from mul",
    ),
    "weight norm of the norm": (
        lambda _, x: nn.WeightNorm(norm(), variable_filter={"scale"})(dense()(x)),
        "expected norm to use its variable scale, got a scale from mul",
    ),
    "equalized learning rate": (
        lambda _, x: norm()(mapped(KERNEL(lambda v: v * 0.5), dense(), x)),
        "before it: dense, expected dense to use its variable kernel, got a kernel from mul; after it: relu",
    ),
    "transformed in jit": (
        lambda _, x: norm()(mapped(KERNEL(jax.jit(jnp.tanh)), dense(), x)),
        "before it: dense, expected dense to use its variable kernel, got a kernel from tanh; after it: relu",
    ),
    "transformed bias": (
        lambda _, x: norm()(mapped(BIAS(jnp.tanh), dense(), x)),
        "before it: dense, expected dense to use its variable bias, got a bias from tanh; after it: relu",
    ),
    "tied": (
        tied,
        "before it: dense, expected dense alone to use its kernel, got transpose too; after it: dot_general",
    ),
    "penalized": (
        penalized,
        "before it: dense, expected dense alone to use its bias, got integer_pow too; after it: add",
    ),
    "binary": (
        lambda _, x: norm()(dense(dot_general=sign_dot)(x)),
        "before it: dense, but its dot_general is not that of JAX; name it in pairs if it is linear in the kernel; "
        "after it: relu",
    ),
    "stacked by scan along the last axis": (
        scanned(-1),
        "expected block/norm to use its variable bias, got a bias from transpose",
    ),
    "stacked by vmap along the last axis": (
        vmapped(-1),
        "expected a bias (3,) of block/norm stacked along its first axes, got shape (3, 2)",
    ),
    "heads": (heads, "before it: dense, expected variables stacked like those of norm; after it: reduce_sum"),
}
LINEN_FOLD = {
    "cast": lambda _, x: norm()(mapped(lambda _, v: v.astype(jnp.bfloat16), dense(dtype=jnp.float32), x)),
    "frozen": lambda _, x: norm()(mapped(lambda _, v: jax.lax.stop_gradient(v), dense(), x)),
    "partial of JAX's": lambda _, x: norm()(
        dense(dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32))(x)
    ),
    "scanned": scanned(0),
    "vmapped": vmapped(0),
}


class Net(nn.Module):
    """Calls a layer and a norm in some way, and then others that fold."""

    body: object

    @nn.compact
    def __call__(self, x):
        x = self.body(self, x)
        return norm("last_norm")(nn.Dense(2, name="last")(nn.relu(x)))


def init(body):
    model = Net(body)
    return model, shaken(jax.eval_shape(model.init, jax.random.key(0), X))


@pytest.mark.parametrize("case", LINEN_STAY)
def test_linen_stays_and_the_rest_folds(case):
    body, why = LINEN_STAY[case]
    pairs = propose_linen(*init(body), X)
    assert pairs == {"last_norm": "last"}
    assert list(pairs.unfolded.values()) == [why]


@pytest.mark.slow
def test_linen_outputs_with_a_norm_that_stays():
    model, variables = init(LINEN_STAY["weight norm"][0])
    folded, pairs = fold_linen(model, variables, X)
    assert pairs == {"last_norm": "last"}
    assert_same(apply_folded(model, pairs, folded, X), model.apply(variables, X))


@pytest.mark.slow
@pytest.mark.parametrize("case", LINEN_FOLD)
def test_linen_folds(case):
    model, variables = init(LINEN_FOLD[case])
    folded, pairs = fold_linen(model, variables, X)
    assert len(pairs) == 2
    assert pairs.unfolded == {}
    tolerance = 2**-6 if case == "cast" else 2e-5
    actual, expected = apply_folded(model, pairs, folded, X), model.apply(variables, X)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * jnp.abs(expected).max())


class Scaled(nnx.Module):
    """Sets another kernel for the time of a call."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        kernel = self.layer.kernel[...]
        self.layer.kernel[...] = kernel * 0.5
        y = self.layer(x)
        self.layer.kernel[...] = kernel
        return y


class Functional(Scaled):
    """Calls a copy of a layer that has other variables."""

    def __call__(self, x):
        graphdef, state = nnx.split(self.layer)
        return nnx.merge(graphdef, jax.tree.map(jnp.tanh, state))(x)


class NNXNet(nnx.Module):
    def __init__(self, wrap, **options):
        rngs = nnx.Rngs(0)
        self.layer = wrap(nnx.Linear(3, 3, rngs=rngs, **options))
        self.norm, self.last_norm = (jaxbn.nnx.BatchNorm(n, rngs=rngs) for n in (3, 2))
        self.last = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x, **options):
        return self.last_norm(self.last(nnx.relu(self.norm(self.layer(x, **options)))))


def nnx_net(wrap=lambda layer: layer, **options):
    model = NNXNet(wrap, **options)
    nnx.update(model, shaken(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


def lora(layer):
    return nnx.LoRA(3, 1, 3, base_module=layer, rngs=nnx.Rngs(0))


INNER = "layer/layer_instance"
NNX_STAY = {
    "weight norm": (
        lambda: nnx_net(lambda layer: nnx.WeightNorm(layer, rngs=nnx.Rngs(0))),
        f"before it: {INNER}, expected {INNER} to use its variable kernel, got a kernel from mul; after it: relu",
    ),
    "lora": (lambda: nnx_net(lora), "before it: add; after it: relu"),
    "derived lora": (
        lambda: nnx_net(lambda _: nnx.LoRALinear(3, 3, lora_rank=1, rngs=nnx.Rngs(0))),
        "before it: layer, but LoRALinear is a derived class; name it in pairs if its kernel is used as Flax uses it; "
        "after it: relu",
    ),
    "scaled": (
        lambda: nnx_net(Scaled),
        "before it: layer/layer, expected layer/layer to use its variable kernel, got a kernel from mul; "
        "after it: relu",
    ),
    "functional": (
        lambda: nnx_net(Functional),
        "before it: layer/layer, expected layer/layer to use its variable bias, got a bias from tanh; after it: relu",
    ),
    "binary": (
        lambda: nnx_net(dot_general=sign_dot),
        "before it: layer, but its dot_general is not that of JAX; name it in pairs if it is linear in the kernel; "
        "after it: relu",
    ),
}


WEIGHT_NORM = needs("nnx.WeightNorm and nnx.SpectralNorm that use a layer", flax="0.12.1")


@pytest.mark.parametrize("case", [pytest.param("weight norm", marks=WEIGHT_NORM), *list(NNX_STAY)[1:]])
def test_nnx_stays_and_the_rest_folds(case):
    make, why = NNX_STAY[case]
    pairs = propose_nnx(make(), X)
    assert pairs == {"last_norm": "last"}
    assert pairs.unfolded == {"norm": why}


@WEIGHT_NORM
def test_nnx_spectral_norm_stays():
    model = nnx_net(lambda layer: nnx.SpectralNorm(layer, rngs=nnx.Rngs(0)))
    pairs = propose_nnx(model, X, call=lambda model, x: model(x, update_stats=False))
    assert pairs.unfolded == {
        "norm": f"before it: {INNER}, expected {INNER} to use its variable kernel, got a kernel from div; "
        "after it: relu"
    }


@needs("nnx.var_defaults", flax="0.12.3")
def test_nnx_references_stay():
    with nnx.var_defaults(ref=True):
        model = nnx_net(Scaled)
    assert propose_nnx(model, X).unfolded == {
        "norm": "before it: layer/layer, expected layer/layer alone to use its kernel, got mul and swap too; "
        "after it: relu"
    }


@needs("nnx.var_defaults", flax="0.12.3")
def test_nnx_variables_of_which_a_program_has_no_arrays_stay():
    with nnx.var_defaults(hijax=True):
        model = nnx_net()
    why = propose_nnx(model, X).unfolded["norm"]
    # The operation's name differs between versions.
    assert why.startswith("expected norm to use its variable bias, got a bias from ")


def test_nnx_kernel_that_is_returned_stays():
    pairs = propose_nnx(nnx_net(), X, call=lambda model, x: (model(x), model.layer.kernel[...]))
    assert pairs.unfolded == {
        "norm": "before it: layer, expected layer alone to use its kernel, got an output too; after it: relu"
    }


@pytest.mark.slow
def test_nnx_outputs_with_a_norm_that_stays():
    model = NNX_STAY["scaled"][0]()
    folded = fold_nnx(model, X)
    assert isinstance(folded.norm, jaxbn.nnx.BatchNorm)
    expected = nnx.clone(model)
    expected.eval()
    assert_same(folded(X), expected(X))


@pytest.mark.slow
def test_nnx_norms_may_share_parameters():
    model = nnx_net()
    model.last, model.last_norm = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model.last_norm.scale = model.norm.scale
    folded = fold_nnx(model, X)
    assert not [m for _, m in iter_modules(folded) if isinstance(m, nnx.BatchNorm)]
    model.eval()
    assert_same(folded(X), model(X))


def sequential(key):
    rngs = nnx.Rngs(key)
    return nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), jaxbn.nnx.BatchNorm(3, rngs=rngs))


def one_by_one(model, x):
    """Blocks that are stacked, called one after the other by their places."""
    graphdef, state = nnx.split(model)
    for i in range(2):
        x = nnx.relu(nnx.merge(graphdef, jax.tree.map(lambda v, i=i: v[i], state))(x))
    return x


def at_once(model, x):
    return nnx.vmap(lambda model, x: model(x), in_axes=(0, None))(model, x).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("call", [one_by_one, at_once])
def test_nnx_stacked(call):
    model = nnx.vmap(sequential)(jax.random.split(jax.random.key(0), 2))
    nnx.update(model, shaken(nnx.state(model)))
    folded = fold_nnx(model, X, call=call)
    assert folded.layers[0].bias.shape == (2, 3)
    model.eval()
    assert_same(call(folded, X), call(model, X))


@pytest.mark.parametrize("changes", [False, True])
def test_nnx_loop(changes):
    """A loop carries the model, whose kernel it changes or does not."""

    def step(_, carry):
        model, x = carry
        y = model(x)
        if changes:
            model.layers[0].kernel[...] *= 0.5
        return model, y

    def call(model, x):
        return nnx.fori_loop(0, 2, step, (model, x))[1]

    pairs = propose_nnx(sequential(jax.random.key(0)), X, call=call)
    assert pairs == ({} if changes else {"layers/1": "layers/0"})
