"""Functions of the library's classes are serialized by `jax.export` under names that stay."""

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn

pytest.importorskip("flatbuffers")

AFFINE = jaxbn.BatchNormParams(jnp.array([1.0, 2.0]), None)
STATE = jaxbn.BatchNormState(jnp.array([0.0, 1.0]), jnp.array([1.0, 4.0]), jnp.int32(3))
X = jnp.array([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])


def step(x, params, state):
    y, state = jaxbn.batch_norm_train(x, params, state)
    return y, params, state, jaxbn.moments(x)


def test_round_trip():
    """With the derivative; the classes are those of the caller."""
    exported = jax.export.export(jax.jit(step))(X, AFFINE, STATE)
    back = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert back.in_tree == exported.in_tree
    assert back.out_tree == exported.out_tree
    expected = jax.jit(step)(X, AFFINE, STATE)
    jax.tree.map(np.testing.assert_array_equal, back.call(X, AFFINE, STATE), expected)

    def loss(function):
        return lambda params: jnp.sum(function(X, params, STATE)[0] ** 3)

    actual, wanted = jax.grad(loss(back.call))(AFFINE), jax.grad(loss(step))(AFFINE)
    np.testing.assert_allclose(actual.scale, wanted.scale, rtol=1e-5)


def test_moments_as_an_argument():
    exported = jax.export.export(jax.jit(lambda a, b: a.merge(b)))(jaxbn.moments(X), jaxbn.moments(X))
    merged = jax.export.deserialize(exported.serialize()).call(jaxbn.moments(X[:1]), jaxbn.moments(X[1:]))
    np.testing.assert_allclose(merged.mean, X.mean(0), rtol=1e-6)
    np.testing.assert_allclose(merged.var, X.var(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "name"), [(AFFINE, "BatchNormParams"), (STATE, "BatchNormState"), (jaxbn.moments(X), "Moments")]
)
def test_names(value, name):
    """Files that were written once are read by these names."""
    serialized = jax.export.export(jax.jit(lambda v: v))(value).serialize()
    assert f"jaxbn.{name}".encode() in serialized
    assert type(value) is getattr(jaxbn, name)


def test_pickles_with_the_first_name_of_the_parameters():
    assert pickle.loads(b"cjaxbn._norms.state\nBatchNormParams\n(NNtR.") == jaxbn.AffineParams()


@pytest.mark.slow
def test_import_anew():
    """As notebooks do that reload a library: the names lead to the classes of the newest."""
    program = """
import sys
import jax, jax.export, jaxbn
old = jaxbn.BatchNormParams
for name in [name for name in sys.modules if name.partition(".")[0] == "jaxbn"]:
    del sys.modules[name]
import jaxbn
params, state = jaxbn.batch_norm_init(2)
assert type(params) is jaxbn.BatchNormParams is not old
serialized = jax.export.export(jax.jit(lambda *v: v))(params, state).serialize()
results = jax.export.deserialize(serialized).call(params, state)
assert [type(v) for v in results] == [jaxbn.BatchNormParams, jaxbn.BatchNormState]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=120)
