"""Training that normalizes by the batch and leaves the running statistics as they are."""

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.nnx import BatchNorm, BatchRenorm, replace_batch_norms

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)) * 2 + 1, jnp.float32)
LAYERS = {
    "BatchNorm": (BatchNorm, {"momentum": 0.5}, {}),
    "average": (BatchNorm, {"momentum": None}, {}),
    "virtual": (BatchNorm, {"virtual_batch_size": 4}, {}),
    "domains": (BatchNorm, {"num_domains": 2}, {"domain": 1}),
    "BatchRenorm": (BatchRenorm, {"limits": (1.5, 0.5), "momentum": 0.5}, {}),
}


def make(name, **options):
    cls, others, _ = LAYERS[name]
    layer = cls(3, rngs=nnx.Rngs(0), **others, **options)
    layer(X + 1, **LAYERS[name][2])
    return layer


def bits(layer):
    return jax.tree.map(lambda v: np.asarray(v).tobytes(), nnx.to_pure_dict(nnx.state(layer)))


def by_call(layer):
    return {"update_stats": False}


def by_attribute(layer):
    layer.set_attributes(update_stats=False)
    return {}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("switch_off", [by_call, by_attribute])
def test_output_of_training_and_old_statistics(name, switch_off):
    layer, trained = make(name), make(name)
    before = bits(layer)
    y = layer(X, **LAYERS[name][2], **switch_off(layer))
    np.testing.assert_array_equal(y, trained(X, **LAYERS[name][2]))
    assert bits(layer) == before
    assert bits(trained) != before


def test_call_takes_precedence():
    layer = BatchNorm(3, momentum=0.0, update_stats=False, rngs=nnx.Rngs(0))
    layer(X)
    assert not layer.mean[...].any()
    layer(X, update_stats=True)
    np.testing.assert_allclose(layer.mean[...], np.mean(np.asarray(X, np.float64), 0), rtol=1e-6)


def test_modes_keep_it_and_evaluation_is_evaluation():
    layer = make("BatchNorm")
    evaluated = layer(X, use_running_average=True)
    layer.update_stats = False
    layer.eval()
    np.testing.assert_array_equal(layer(X), evaluated)
    layer.train()
    assert layer.update_stats is False


def test_replaced_layers():
    model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert replace_batch_norms(model).layers[0].update_stats is True
    assert replace_batch_norms(model, update_stats=False).layers[0].update_stats is False


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="Flax 0.11 has no views")
def test_view():
    model = nnx.Sequential(BatchNorm(3, momentum=0.0, rngs=nnx.Rngs(0)))
    nnx.view(model, update_stats=False)(X)
    assert not model.layers[0].mean[...].any()
    assert model.layers[0].update_stats is True
    view = nnx.view(model, use_running_average=True)
    assert (view.layers[0].use_running_average, view.layers[0].update_stats) == (True, True)


def test_two_passes_of_sam_count_once():
    def step(model, x, **second):
        loss, grads = nnx.value_and_grad(lambda m: jnp.sum(jnp.sin(m(x))))(model)
        params = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda p, g: p + 0.1 * g, params, grads))
        nnx.grad(lambda m: jnp.sum(jnp.sin(m(x, **second))))(model)
        nnx.update(model, params)
        return loss

    model, once = make("BatchNorm"), make("BatchNorm")
    nnx.jit(step, static_argnames="update_stats")(model, X, update_stats=False)
    once(X)
    np.testing.assert_allclose(model.mean[...], once.mean[...], rtol=1e-6)
    np.testing.assert_allclose(model.var[...], once.var[...], rtol=1e-6)


def test_layer_that_is_not_an_argument():
    # NNX forbids the update there.
    layer = make("BatchNorm")
    y = jax.vmap(lambda x: layer(x, update_stats=False))(X[None])
    np.testing.assert_allclose(y[0], layer(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [2, "no", jnp.array([True])])
def test_wrong_kinds(value):
    with pytest.raises(TypeError) as error:
        make("BatchNorm")(X, update_stats=value)
    assert str(error.value) == (
        "update_stats: expected True or False, fixed when the function is traced (by functools.partial or "
        f"static_argnames), got {type(value).__name__}"
    )


def test_traced():
    with pytest.raises(TypeError) as error:
        nnx.jit(lambda layer, x, update: layer(x, update_stats=update))(make("BatchNorm"), X, True)
    assert str(error.value).splitlines()[0] == (
        "update_stats: expected True or False, fixed when the function is traced (by functools.partial or "
        "static_argnames), got DynamicJaxprTracer"
    )


def test_complex():
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError) as error:
        layer(X.astype(jnp.complex64), update_stats=False)
    assert str(error.value) == (
        "x: expected an array of real numbers with update_stats=False, got complex64; complex x is normalized by "
        "Flax's layer, which has no such option: leave it out, or normalize x.real and x.imag"
    )
    with jax.numpy_dtype_promotion("standard"):
        assert layer(X.astype(jnp.complex64), True, update_stats=False).dtype == jnp.complex64


@pytest.mark.parametrize("library", [nn, jaxbn.linen])
def test_linen_that_may_not_update_raises(library):
    """As Flax's layer does: whoever forgets `mutable` would evaluate with the initial statistics."""
    model = library.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), X)
    with pytest.raises(flax.errors.ModifyScopeVariableError):
        model.apply(variables, X)
