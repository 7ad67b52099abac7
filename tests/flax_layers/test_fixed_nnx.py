"""Running statistics that `fix_statistics` fixes: the bits of evaluation in any mode, until they are released."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import assert_close

import jaxbn
from jaxbn._versions import iter_modules
from jaxbn.nnx import BatchNorm, BatchRenorm, fix_statistics, release_statistics, replace_batch_norms

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((8, 3)) * 2 + 1, jnp.float32)
NORMAL = {"scale_init": nnx.initializers.normal(1.0), "bias_init": nnx.initializers.normal(1.0)}
LAYERS = {
    "BatchNorm": (BatchNorm, {"momentum": 0.5}, {}),
    "average": (BatchNorm, {"momentum": None}, {}),
    "domains": (BatchNorm, {"num_domains": 2, "domain_affine": True}, {"domain": 1}),
    "BatchRenorm": (BatchRenorm, {"limits": (1.5, 0.5), "momentum": 0.5}, {}),
    "bfloat16": (BatchNorm, {"dtype": jnp.bfloat16}, {}),
}


def make(name):
    """A layer that has seen another batch."""
    cls, options, call = LAYERS[name]
    layer = cls(3, rngs=nnx.Rngs(0), **NORMAL, **options)
    layer(X * 2 + 1, **call)
    return layer


def bits(model):
    return jax.tree.map(lambda v: np.asarray(v).tobytes(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.backbone = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), BatchNorm(3, momentum=0.5, **NORMAL, rngs=rngs))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.backbone2 = nnx.Sequential(BatchRenorm(3, limits=(3.0, 5.0), rngs=rngs))
        self.norm = BatchNorm(3, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.backbone2(self.drop(self.backbone(x))))


NORMS = {"backbone/layers/1", "backbone2/layers/0", "norm"}


def fixed(model):
    return {
        "/".join(map(str, path))
        for path, module in iter_modules(model)
        if isinstance(module, BatchNorm) and module.fixed_statistics
    }


@pytest.mark.parametrize("name", LAYERS)
def test_evaluation_bit_for_bit(name):
    call = LAYERS[name][2]
    layer = make(name)
    before, expected = bits(layer), layer(X, use_running_average=True, **call)
    assert fix_statistics(layer) is layer
    layer.train()
    for mode in (None, False, True):
        np.testing.assert_array_equal(layer(X, use_running_average=mode, **call), expected)
    assert bits(layer) == before


def test_formula():
    layer = fix_statistics(make("BatchNorm"))
    mean, var, scale, bias = (
        np.asarray(getattr(layer, name)[...], np.float64) for name in ("mean", "var", "scale", "bias")
    )
    expected = (np.asarray(X, np.float64) - mean) / np.sqrt(var + layer.epsilon) * scale + bias
    np.testing.assert_allclose(layer(X), expected, rtol=1e-5, atol=1e-6)


def test_batch_of_one():
    assert fix_statistics(make("BatchNorm"))(X[:1]).shape == (1, 3)


def test_without_a_mode():
    layer = fix_statistics(BatchNorm(3, use_running_average=None, epsilon=0.0, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(layer(X), X)


CHANGES = {
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "set_attributes": lambda layer: layer.set_attributes(use_running_average=False, update_stats=True),
    "clone": nnx.clone,
    "split": lambda layer: nnx.merge(*nnx.split(layer)),
    "copy": copy.deepcopy,
    "replace": lambda layer: replace_batch_norms(layer, momentum=0.5),
}
if hasattr(nnx, "view"):
    CHANGES["view"] = lambda layer: nnx.view(layer, use_running_average=False)


@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_undo_it(change):
    layer = fix_statistics(make("BatchNorm"))
    before, expected = bits(layer), layer(X)
    layer = CHANGES[change](layer) or layer
    np.testing.assert_array_equal(layer(X), expected)
    assert bits(layer) == before


def test_jit_compiles_again():
    step = nnx.jit(lambda layer, x: layer(x))
    layer = make("BatchNorm")
    trained = step(layer, X)
    before = bits(layer)
    y = step(fix_statistics(layer), X)
    np.testing.assert_allclose(y, layer(X), rtol=1e-5, atol=1e-6)
    assert (bits(layer), bool(jnp.all(y == trained))) == (before, False)
    step(release_statistics(layer), X)
    assert bits(layer) != before


def test_released_layer_is_as_before():
    layer, other = make("BatchNorm"), make("BatchNorm")
    release_statistics(fix_statistics(layer, stop_affine_gradients=True))
    assert nnx.graphdef(layer) == nnx.graphdef(other)
    np.testing.assert_array_equal(layer(X), other(X))
    assert bits(layer) == bits(other)


def test_dropout_and_other_layers_train():
    model = fix_statistics(Model(nnx.Rngs(0)), only="backbone")
    model.train()
    before = bits(model)
    assert (model.drop(jnp.ones(100)) == 0).any()
    model(X)
    after = bits(model)
    assert after["backbone"] == before["backbone"]
    assert all(after[name] != before[name] for name in ("backbone2", "norm"))


@pytest.mark.parametrize("stop", [False, True])
def test_gradients(stop):
    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    layer, evaluated = fix_statistics(make("BatchNorm"), stop_affine_gradients=stop), make("BatchNorm")
    evaluated.eval()
    (grads, dx), (expected, expected_dx) = (nnx.grad(loss, argnums=(0, 1))(m, X) for m in (layer, evaluated))
    np.testing.assert_array_equal(dx, expected_dx)
    for name in ("scale", "bias"):
        expected_grad = np.asarray(expected[name][...])
        assert expected_grad.all()
        np.testing.assert_array_equal(grads[name][...], np.zeros(3) if stop else expected_grad)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (None, NORMS),
        ("", NORMS),
        ("norm", {"norm"}),
        ("backbone", {"backbone/layers/1"}),
        ("backbone/layers/1", {"backbone/layers/1"}),
        (["backbone/", "norm"], {"backbone/layers/1", "norm"}),
        (BatchRenorm, {"backbone2/layers/0"}),
        (lambda path, layer: path[0] == "backbone" and layer.momentum == 0.5, {"backbone/layers/1"}),
        (nnx.PathContains("layers"), {"backbone/layers/1", "backbone2/layers/0"}),
    ],
)
def test_only(only, expected):
    model = fix_statistics(Model(nnx.Rngs(0)), only=only)
    assert fixed(model) == expected
    assert fixed(fix_statistics(model, only="norm")) == expected | {"norm"}
    assert fixed(release_statistics(model, only=only)) == {"norm"} - expected


def test_stacked():
    keys = jax.random.split(jax.random.key(0), 2)
    layers = nnx.vmap(lambda key: BatchNorm(3, **NORMAL, rngs=nnx.Rngs(key)))(keys)
    graphdef, state = nnx.split(layers)
    expected = X
    for k in range(2):
        layer = nnx.merge(graphdef, jax.tree.map(lambda v, k=k: v[k], state))
        expected = layer(expected, use_running_average=True)
    before = bits(fix_statistics(layers))
    y = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(X, layers)
    assert_close(y, expected)
    assert bits(layers) == before


NAMES = "the batch norms of this model are backbone/layers/1, backbone2/layers/0, norm"
CHOICE = "only: expected the choice of some batch norms, by paths of these or of modules that have them, got "
KINDS = (
    "only: expected a path such as 'backbone/norm', several, a class, a function of path and layer, or None for all "
    "layers, got "
)


@pytest.mark.parametrize(
    ("make", "only", "kind", "message"),
    [
        (
            dict,
            None,
            TypeError,
            "model: expected a flax.nnx.Module, got dict; for Linen use jaxbn.linen.apply_fixed",
        ),
        (
            lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            None,
            ValueError,
            "model: expected batch norms in it, got none in Linear",
        ),
        (lambda: Model(nnx.Rngs(0)), "backbon", ValueError, f"{CHOICE}'backbon'; {NAMES}"),
        (lambda: Model(nnx.Rngs(0)), ["norm", "head", "drop"], ValueError, f"{CHOICE}'drop', 'head'; {NAMES}"),
        (lambda: Model(nnx.Rngs(0)), lambda path, layer: False, ValueError, f"{CHOICE}a choice of none; {NAMES}"),
        (lambda: Model(nnx.Rngs(0)), 3, TypeError, f"{KINDS}3"),
        (lambda: Model(nnx.Rngs(0)), [], TypeError, f"{KINDS}[]"),
        (lambda: Model(nnx.Rngs(0)), [("norm",)], TypeError, f"{KINDS}[('norm',)]"),
    ],
)
def test_errors(make, only, kind, message):
    for tool in (fix_statistics, release_statistics):
        model = make()
        with pytest.raises(kind) as error:
            tool(model, only=only)
        assert str(error.value) == message
        assert not isinstance(model, nnx.Module) or not fixed(model)


def test_layers_of_flax():
    model = nnx.Sequential(BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="replace_batch_norms") as error:
        fix_statistics(model)
    assert str(error.value) == (
        "model: expected jaxbn.nnx.BatchNorm, got flax.nnx.BatchNorm at layers/1, whose statistics model.train() would "
        "release; turn these layers into jaxbn's first: jaxbn.nnx.replace_batch_norms(model)"
    )
    assert fixed(model) == set()
    assert fixed(fix_statistics(model, only="layers/0")) == {"layers/0"}
    assert fixed(release_statistics(model)) == set()
    assert fixed(fix_statistics(replace_batch_norms(model))) == {"layers/0", "layers/1"}


def test_complex():
    layer = fix_statistics(make("BatchNorm"), stop_affine_gradients=True)
    with pytest.raises(TypeError) as error:
        layer(X.astype(jnp.complex64))
    assert str(error.value) == (
        "x: expected an array of real numbers with stop_affine_gradients, got complex64; complex x is normalized by "
        "Flax's layer, which has no such option: leave it out, or normalize x.real and x.imag"
    )
    fix_statistics(layer)
    before = bits(layer)
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(layer(X.astype(jnp.complex64)).real, layer(X), rtol=1e-5, atol=1e-6)
    assert bits(layer) == before


def test_tools():
    """Recalibration measures fixed statistics too; the diagnosis does not report training mode."""
    model, other = (nnx.Sequential(BatchNorm(3, rngs=nnx.Rngs(0))) for _ in range(2))
    call = {"call": lambda model, x: (model.train(), model(x))[1]}
    jaxbn.recalibrate.recalibrate_nnx(fix_statistics(model), [X], **call)
    jaxbn.recalibrate.recalibrate_nnx(other, [X])
    assert bits(model) == bits(other)
    trains = [
        any(finding.kind == "train_mode" for finding in jaxbn.diagnose.diagnose_nnx(m, X, **call).findings)
        for m in (model, other)
    ]
    assert trains == [False, True]
    assert fixed(model) == {"layers/0"}
