"""Running statistics of Linen models measured anew are those of the layers' inputs, by float64 NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec
from recalibration import DATA, EPS, EVEN, WEIGHTS, close, oracle

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.recalibrate import recalibrate_linen


class Subclass(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x, use_running_average=False)


class Net(nn.Module):
    """The oracle's network, always in training mode; `first` and `second` make its norms."""

    first: type[nn.Module] = nn.BatchNorm
    second: type[nn.Module] = jaxbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Dense(3, use_bias=False, name="in")(x)
        x = nn.relu(self.first(use_running_average=False, name="a")(x) if train else x)
        x = nn.Dense(3, use_bias=False, name="out")(x)
        return self.second(name="b", **({"use_running_average": False} if self.second is not Subclass else {}))(x)


def linen_variables(net):
    variables = net.init(jax.random.key(0), DATA[0])
    params = {**variables["params"], "in": {"kernel": WEIGHTS[0]}, "out": {"kernel": WEIGHTS[1]}}
    return {**variables, "params": params, "other": {"kept": np.arange(3)}}


RENORM = functools.partial(jaxbn.linen.BatchRenorm, limits=(1.0, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["layerwise", "batchwise"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(nn.BatchNorm, Subclass), (RENORM, functools.partial(jaxbn.linen.BatchNorm, momentum=None, correction=1))],
)
def test_linen(first, second, method):
    net = Net(first, second)
    variables = linen_variables(net)
    old = jax.tree.map(np.array, variables)
    new = recalibrate_linen(net, variables, DATA, method=method)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    correction = 0 if second is Subclass else 1
    for name, (mean, var) in zip("ab", oracle(method, correction=(0, correction)), strict=True):
        close(new["batch_stats"][name]["mean"], mean)
        close(new["batch_stats"][name]["var"], var)
        if "num_batches_tracked" in old["batch_stats"][name]:
            assert int(new["batch_stats"][name]["num_batches_tracked"]) == 4
    assert (("num_batches_tracked" in new["batch_stats"]["b"]), correction) in ((True, 1), (False, 0))
    # The arguments are as they were, and what is no statistic is handed through.
    jax.tree.map(np.testing.assert_array_equal, variables, old)
    for collection in ("params", "other"):
        for a, b in zip(jax.tree.leaves(new[collection]), jax.tree.leaves(variables[collection]), strict=True):
            assert a is b


def test_linen_layer_that_is_not_called_keeps_its_statistics():
    net = Net()
    variables = linen_variables(net)
    new = recalibrate_linen(net, freeze(variables), EVEN, call=lambda apply, x: apply(x, train=False))
    assert type(new) is type(freeze({}))
    assert new["batch_stats"]["a"]["mean"] is variables["batch_stats"]["a"]["mean"]
    x = np.maximum(np.concatenate(EVEN) @ WEIGHTS[0], 0) @ WEIGHTS[1]
    close(new["batch_stats"]["b"]["mean"], x.mean(0, np.float64))


@pytest.mark.slow
def test_linen_sharded_batches():
    net, mesh = Net(), jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data = np.concatenate(DATA)[:16]
    sharded = [jax.device_put(data[i : i + 8], NamedSharding(mesh, PartitionSpec("data"))) for i in (0, 8)]
    everywhere = NamedSharding(mesh, PartitionSpec())
    variables = jax.device_put(linen_variables(net), everywhere)
    for method in ("layerwise", "batchwise"):
        new = recalibrate_linen(net, variables, sharded, method=method)["batch_stats"]
        assert {v.sharding for v in jax.tree.leaves(new)} == {everywhere}
        for name, (mean, var) in zip("ab", oracle(method, [data[:8], data[8:]]), strict=True):
            close(new[name]["mean"], mean)
            close(new[name]["var"], var)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.relu(nn.remat(jaxbn.linen.BatchNorm)(use_running_average=False, name="norm")(x))
        return nn.Dense(3)(x), None


class Lifted(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        x, _ = nn.scan(Block, length=3, **axes)(name="blocks")(x, None)
        x = nn.jit(nn.BatchNorm)(use_running_average=False, name="jitted")(x)
        return nn.vmap(nn.BatchNorm, **axes)(use_running_average=False, name="mapped")(jnp.stack([x, x**3]))


@pytest.mark.slow
def test_linen_lifted_transformations():
    net = Lifted()
    variables = net.init(jax.random.key(0), DATA[0])
    net.apply(variables, DATA[0], mutable="batch_stats")  # what nn.jit compiled then has no slots
    # And what it compiled for one method is not taken for the other.
    recalibrate_linen(net, variables, EVEN, method="batchwise")
    stats = recalibrate_linen(net, variables, EVEN)["batch_stats"]

    def normalize(x, mean, var):
        return (x - mean) / np.sqrt(var + EPS)

    x = np.concatenate(EVEN).astype(np.float64)
    norm, dense = stats["blocks"]["norm"], variables["params"]["blocks"]["Dense_0"]
    for layer in range(3):
        close(norm["mean"][layer], x.mean(0))
        close(norm["var"][layer], x.var(0))
        x = np.maximum(normalize(x, x.mean(0), x.var(0)), 0) @ np.asarray(dense["kernel"][layer], np.float64)
    close(stats["jitted"]["mean"], x.mean(0))
    close(stats["jitted"]["var"], x.var(0))
    x = normalize(x, x.mean(0), x.var(0))
    close(stats["mapped"]["mean"], [x.mean(0), (x**3).mean(0)], 1e-4)
    close(stats["mapped"]["var"], [x.var(0), (x**3).var(0)], 1e-4)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask, domain):
        return jaxbn.linen.BatchNorm(use_running_average=False, num_domains=3, momentum=None)(
            x, mask=mask, domain=domain
        )


def test_linen_masks_and_domains():
    batches = [
        {"x": x, "keep": np.arange(len(x)) % 3 > 0, "domain": np.int32(i % 2)} for i, x in enumerate(EVEN + EVEN[:1])
    ]

    def call(apply, batch):
        return apply(batch["x"], batch["keep"][:, None], batch["domain"])

    variables = Masked().init(jax.random.key(0), DATA[0], None, 0)
    for method in ("layerwise", "batchwise"):
        (stats,) = recalibrate_linen(Masked(), variables, batches, method=method, call=call)["batch_stats"].values()
        for domain in (0, 1):
            x = np.concatenate([b["x"][b["keep"]] for b in batches if b["domain"] == domain]).astype(np.float64)
            close(stats["mean"][domain], x.mean(0))
            close(stats["var"][domain], x.var(0))
        assert stats["mean"][2].tolist() == [0, 0, 0]
        assert stats["num_batches_tracked"].tolist() == [2, 2, 0]


class Shared(nn.Module):
    factor: float

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=False, name="norm")
        return norm(self.factor * norm(x) + x)


def test_linen_shared_layer_settles():
    net = Shared(0.1)
    variables = net.init(jax.random.key(0), DATA[0])
    stats = recalibrate_linen(net, variables, EVEN)["batch_stats"]["norm"]
    mean, var = (np.asarray(v, np.float64) for v in (stats["mean"], stats["var"]))
    x = np.concatenate(EVEN).astype(np.float64)
    inputs = np.concatenate([x, 0.1 * (x - mean) / np.sqrt(var + EPS) + x])
    close(mean, inputs.mean(0), 1e-3)
    close(var, inputs.var(0), 1e-3)


def test_linen_shared_layer_that_does_not_settle():
    class Wild(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=False, name="norm")
            return norm(jnp.sign(norm(x)) * 100 * jnp.sin(37 * norm.get_variable("batch_stats", "mean")[None]))

    variables = Wild().init(jax.random.key(0), DATA[0])
    with pytest.raises(ValueError, match=r"^norm: expected statistics that converge, got a change by .* in sweep 12; "):
        recalibrate_linen(Wild(), variables, EVEN)


def test_linen_compiles_once_per_shape_and_call():
    traced = []

    def call(apply, batch):
        traced.append(batch.shape)
        return apply(batch)

    net = Net()
    variables = linen_variables(net)
    for _ in range(2):
        recalibrate_linen(net, variables, DATA, call=call)
    assert sorted(traced) == [(4, 3), (8, 3)]


@pytest.mark.slow
def test_linen_statistics_in_half_precision():
    half = functools.partial(
        jaxbn.linen.BatchNorm, dtype=jnp.float32, param_dtype=jnp.bfloat16, force_float32_reductions=False
    )
    net = Net(half, half)
    for method in ("layerwise", "batchwise"):
        new = recalibrate_linen(net, linen_variables(net), EVEN, method=method)["batch_stats"]
        for name, (mean, _) in zip("ab", oracle(method, EVEN), strict=True):
            assert new[name]["mean"].dtype == jnp.bfloat16
            close(new[name]["mean"].astype(jnp.float32), mean, 0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_linen_in_64_bit_mode():
    net = Net(jaxbn.linen.BatchNorm)
    for method in ("layerwise", "batchwise"):
        new = recalibrate_linen(net, linen_variables(net), EVEN, method=method)["batch_stats"]
        for name, (mean, _) in zip("ab", oracle(method, EVEN), strict=True):
            assert new[name]["mean"].dtype == jnp.float32
            close(new[name]["mean"], mean)


def test_linen_layer_without_variables():
    net = Net()
    variables = linen_variables(net)
    variables["batch_stats"] = {"a": variables["batch_stats"]["a"]}
    with pytest.raises(ValueError, match=r"^variables: ") as error:
        recalibrate_linen(net, variables, EVEN)
    assert str(error.value) == (
        "variables: expected statistics of the layer b in batch_stats, got none; pass all that model.init returned"
    )
