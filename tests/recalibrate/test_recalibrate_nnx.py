"""Running statistics of NNX models measured anew are those of the layers' inputs, by float64 NumPy."""

import concurrent.futures
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recalibration import DATA, EPS, EVEN, WEIGHTS, close, oracle
from versions import nnx_list

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.recalibrate import recalibrate_nnx


# Compiled once for the model as it is, and for each observation.
@nnx.jit
def run_compiled(norm, x):
    return norm(x)


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linears = nnx_list([nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2)])
        for layer, weights in zip(self.linears, WEIGHTS, strict=False):
            layer.kernel[...] = jnp.asarray(weights)
        self.a = nnx.BatchNorm(3, rngs=rngs)
        self.b = jaxbn.nnx.BatchNorm(3, momentum=None, correction=1, rngs=rngs)
        self.alias = self.b
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(run_compiled(self.a, self.linears[0](x)))
        return self.alias(self.linears[1](x))


@pytest.mark.parametrize("method", ["layerwise", "batchwise"])
def test_nnx(method):
    model = NNXNet()
    model(DATA[0])
    before = nnx.to_flat_state(nnx.state(model))
    values = {path: np.array(v[...]) for path, v in before if "rngs" not in path}
    assert recalibrate_nnx(model, DATA, method=method) is model
    for name, (mean, var) in zip("ab", oracle(method, correction=(0, 1)), strict=True):
        close(getattr(model, name).mean[...], mean)
        close(getattr(model, name).var[...], var)
    assert int(model.b.num_batches_tracked[...]) == 4
    after = nnx.to_flat_state(nnx.state(model))
    assert [path for path, _ in after] == [path for path, _ in before]
    changed = {path for path, v in after if "rngs" not in path and not np.array_equal(values[path], v[...])}
    assert {path[-1] for path in changed} == {"mean", "var", "num_batches_tracked"}
    assert not model.a.use_running_average


class Doubled(nnx.BatchNorm):
    def __call__(self, x):
        return super().__call__(2 * x)


class ByName(nnx.BatchNorm):
    def __init_subclass__(cls):
        raise AssertionError("no class is derived from the user's")

    def __call__(self, x):
        return nnx.BatchNorm.__call__(self, 2 * x)


class OwnNorm(nnx.BatchNorm):
    def __call__(self, x):
        return x - x.mean(0, keepdims=True)


def test_nnx_subclasses():
    mean = np.concatenate(EVEN).mean(0, np.float64)
    close(recalibrate_nnx(Doubled(3, rngs=nnx.Rngs(0)), EVEN).mean[...], 2 * mean)
    close(recalibrate_nnx(jaxbn.nnx.BatchRenorm(3, limits=(1.0, 0.0), rngs=nnx.Rngs(0)), EVEN).mean[...], mean)
    close(recalibrate_nnx(ByName(3, rngs=nnx.Rngs(0)), EVEN).mean[...], 2 * mean)
    with pytest.raises(TypeError) as raised:
        recalibrate_nnx(nnx.Sequential(OwnNorm(3, rngs=nnx.Rngs(0))), EVEN)
    assert str(raised.value) == (
        "layers/0: expected OwnNorm.__call__ to call that of its base class, it does not; what a batch norm of its own "
        "normalizes cannot be seen: measure it yourself (jaxbn.moments)"
    )


class Caller(nnx.Module):
    """Calls its norm in a way that depends on what class the norm is of, and how its call is written."""

    def __init__(self, how):
        self.norm, self.how = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), how

    def __call__(self, x):
        return self.how(self.norm, x)


HALF = jnp.arange(len(EVEN[0]))[:, None] < len(EVEN[0]) // 2


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        (lambda norm, x: type(norm).__call__(norm, x), slice(None)),
        (lambda norm, x: {jaxbn.nnx.BatchNorm: norm}[type(norm)](x), slice(None)),
        (
            lambda norm, x: norm(
                x, **({"mask": HALF} if "mask" in inspect.signature(norm.__call__).parameters else {})
            ),
            slice(len(EVEN[0]) // 2),
        ),
    ],
    ids=["by class", "by type", "by signature"],
)
def test_nnx_calls_that_look_at_the_norm(how, rows):
    model = recalibrate_nnx(Caller(how), EVEN[:1])
    close(model.norm.mean[...], np.asarray(EVEN[0])[rows].mean(0, np.float64))


def test_nnx_compiles_once_per_shape_and_call():
    traced = []

    def call(model, batch):
        traced.append(batch.shape)
        return model(batch)

    model = NNXNet()
    for _ in range(2):
        recalibrate_nnx(model, DATA, call=call)
    assert sorted(traced) == [(4, 3), (8, 3)]


def test_nnx_other_models_and_threads_see_nothing():
    model, other, seen = NNXNet(), NNXNet(), []
    other.eval()
    x = jnp.asarray(DATA[0])
    expected = other.a(x)

    def call(model, batch):
        with concurrent.futures.ThreadPoolExecutor() as pool:
            seen.append(pool.submit(lambda: np.array(other.a(x))).result())
        other.a(x)
        return model(batch)

    recalibrate_nnx(model, EVEN, call=call)
    for y in seen:
        np.testing.assert_array_equal(y, expected)
    assert len(seen) == 1


@pytest.mark.slow
def test_nnx_scan():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm = jaxbn.nnx.BatchNorm(3, rngs=rngs)
            self.linear = nnx.Linear(3, 3, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.linear(nnx.relu(nnx.remat(lambda norm, x: norm(x))(self.norm, x)))

    class Net(nnx.Module):
        def __init__(self):
            self.blocks = nnx.vmap(lambda key: Block(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 3))

        def __call__(self, x):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)

    model = Net()
    recalibrate_nnx(model, EVEN)
    x = np.concatenate(EVEN).astype(np.float64)
    for layer in range(3):
        close(model.blocks.norm.mean[...][layer], x.mean(0))
        close(model.blocks.norm.var[...][layer], x.var(0))
        kernel = np.asarray(model.blocks.linear.kernel[...][layer], np.float64)
        x = np.maximum((x - x.mean(0)) / np.sqrt(x.var(0) + EPS), 0) @ kernel


def test_nnx_exception_midway_leaves_the_model():
    model = NNXNet()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    class Broken:
        def __iter__(self):
            yield DATA[0]
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        recalibrate_nnx(model, Broken())
    with pytest.raises(TypeError, match="dot_general"):
        recalibrate_nnx(model, [DATA[0], DATA[0][:, :2]])
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
