"""Flax's batch norms in an NNX model become jaxbn's, and nothing else about the model changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from versions import needs, nnx_list

import jaxbn.nnx
from jaxbn._versions import iter_modules
from jaxbn.nnx._replace import replace_batch_norms


class Net(nnx.Module):
    """Norms in every place where NNX keeps modules, one of them twice."""

    def __init__(self, norm=nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.layers = nnx_list([nnx.Linear(2, 2, rngs=rngs), norm(2, momentum=0.9, epsilon=1e-3, rngs=rngs)])
        self.plain = nnx.data((norm(2, rngs=rngs, use_scale=False), {"key": [norm(2, rngs=rngs, use_bias=False)]}))
        self.again = self.layers[1]
        self.sequential = nnx.Sequential(norm(2, rngs=rngs, use_running_average=True), nnx.relu)

    def __call__(self, x):
        x = self.again(self.layers[1](self.layers[0](x)))
        return self.sequential(self.plain[1]["key"][0](self.plain[0](x)))


def norms_of(model):
    return {path: m for path, m in iter_modules(model) if isinstance(m, nnx.BatchNorm)}


X = jnp.asarray(np.random.default_rng(0).standard_normal((16, 2)) * 3 + 1, jnp.float32)


def test_everywhere_and_only_the_class_changes():
    model, expected = Net(), Net(jaxbn.nnx.BatchNorm)
    before = norms_of(model)
    variables = {path: dict(vars(norm)) for path, norm in before.items()}
    assert replace_batch_norms(model) is model
    after = norms_of(model)
    assert len(after) == 4
    for path, norm in after.items():
        assert type(norm) is jaxbn.nnx.BatchNorm
        assert norm is before[path]
        for name, value in variables[path].items():
            assert name.startswith("_pytree") or getattr(norm, name) is value, name
    assert model.again is model.layers[1]
    # As if it had been built with jaxbn's layers, to the compiler as well.
    assert nnx.graphdef(model) == nnx.graphdef(expected)
    np.testing.assert_array_equal(model(X), expected(X))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(expected))


@pytest.mark.slow
def test_trains_like_flax_under_jit():
    ours, flax = replace_batch_norms(Net()), Net()
    for model in (ours, flax):
        nnx.jit(lambda model: model(X))(model)
        model.eval()
    np.testing.assert_allclose(ours(X), flax(X), rtol=1e-5, atol=1e-5)


def test_options_reach_all_and_those_not_named_stay():
    model = Net()
    model.layers.append(jaxbn.nnx.BatchNorm(2, correction=1, epsilon=0.5, rngs=nnx.Rngs(0)))
    model.layers.append(jaxbn.nnx.BatchRenorm(2, limits=(2.0, 1.0), rngs=nnx.Rngs(0)))
    replace_batch_norms(model, axis_name="data", virtual_batch_size=4, momentum=0.7)
    for norm in norms_of(model).values():
        assert (norm.axis_name, norm.virtual_batch_size, norm.momentum) == ("data", 4, 0.7)
    assert model.layers[1].epsilon == 1e-3
    assert (model.layers[2].epsilon, model.layers[2].correction) == (0.5, 1)
    assert type(model.layers[3]) is jaxbn.nnx.BatchRenorm
    assert model.sequential.layers[0].use_running_average is True
    assert model.layers[1].use_running_average is False


def test_cumulative_average():
    layer = replace_batch_norms(nnx.BatchNorm(2, rngs=nnx.Rngs(0)), momentum=None, correction=1)
    layer(X[:8])
    layer(X[8:])
    x = np.asarray(X, np.float64).reshape(2, 8, 2)
    np.testing.assert_allclose(layer.mean[...], x.mean((0, 1)), rtol=1e-6)
    np.testing.assert_allclose(layer.var[...], x.var(1, ddof=1).mean(0), rtol=1e-6)
    assert int(layer.num_batches_tracked[...]) == 2


def test_stacked_by_vmap():
    keys = jax.random.split(jax.random.key(0), 3)

    def make(norm):
        return nnx.vmap(lambda key: norm(2, rngs=nnx.Rngs(key)))(keys)

    x = X[:15].reshape(3, 5, 2)
    stacked = replace_batch_norms(make(nnx.BatchNorm), momentum=None)
    expected = nnx.vmap(lambda key: jaxbn.nnx.BatchNorm(2, momentum=None, rngs=nnx.Rngs(key)))(keys)
    for layer in (stacked, expected):
        nnx.vmap(lambda layer, x: layer(x))(layer, x)
    assert stacked.num_batches_tracked[...].shape == (3,)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(stacked), nnx.state(expected))


@needs("scale_metadata", flax="0.12.1")
def test_metadata_stays():
    norm = nnx.BatchNorm(
        2, scale_metadata={"out_sharding": ("model",), "eager_sharding": False, "note": 1}, rngs=nnx.Rngs(0)
    )
    scale = norm.scale
    assert replace_batch_norms(norm) is norm
    assert norm.scale is scale
    assert (norm.scale.out_sharding, norm.scale.note) == (("model",), 1)


class Own(nnx.BatchNorm):
    pass


class OwnOnOurs(jaxbn.nnx.BatchNorm):
    pass


def test_classes_derived_from_flax_are_refused_and_nothing_changes():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.BatchNorm(2, rngs=rngs), Own(2, rngs=rngs), nnx.Sequential(Own(2, rngs=rngs)))
    with pytest.raises(ValueError, match="model: ") as error:
        replace_batch_norms(model, momentum=0.5)
    assert str(error.value) == (
        "model: expected flax.nnx.BatchNorm itself, got classes derived from it: layers/1 (Own), "
        "layers/2/layers/0 (Own); derive them from jaxbn.nnx.BatchNorm instead"
    )
    assert type(model.layers[0]) is nnx.BatchNorm
    assert model.layers[0].momentum == 0.99


def test_classes_derived_from_ours_keep_their_class():
    norm = replace_batch_norms(OwnOnOurs(2, rngs=nnx.Rngs(0)), momentum=0.5)
    assert type(norm) is OwnOnOurs
    assert norm.momentum == 0.5


@pytest.mark.parametrize(
    ("make", "options", "kind", "message"),
    [
        (lambda: 3, {}, TypeError, "model: expected a flax.nnx.Module, got int; for Linen pass norm classes"),
        (
            lambda: nnx.BatchNorm(2, rngs=nnx.Rngs(0)),
            {"num_domains": 2, "decay": 0.9, "axis": 1},
            TypeError,
            "options: expected some of axis, axis_index_groups, axis_name, correction, dtype, epsilon, momentum, "
            "update_stats, use_running_average, virtual_batch_size, got decay, num_domains",
        ),
        (
            lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
            {},
            ValueError,
            "model: expected a flax.nnx.BatchNorm in it, got none in Linear",
        ),
    ],
)
def test_errors(make, options, kind, message):
    with pytest.raises(kind) as error:
        replace_batch_norms(make(), **options)
    assert str(error.value) == message
