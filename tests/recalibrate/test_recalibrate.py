"""Running statistics measured anew are those of the layers' inputs, by float64 NumPy."""

import concurrent.futures
import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import NamedSharding, PartitionSpec

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnose import diagnose_linen, diagnose_nnx
from jaxbn.fold import fold_linen
from jaxbn.recalibrate import recalibrate, recalibrate_linen, recalibrate_nnx

EPS = 1e-5
SIZES = (8, 4, 8, 8)
RNG = np.random.default_rng(0)
DATA = [RNG.standard_normal((n, 3)).astype(np.float32) * 2 + 1 for n in SIZES]
# Where the shapes of batches are not the matter: one compilation.
EVEN = [DATA[0], *DATA[2:]]
WEIGHTS = [RNG.standard_normal((3, 3)).astype(np.float32) for _ in range(3)]


def close(actual, expected, rtol=2e-5):
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol, atol=rtol)


def oracle(method, batches=None, correction=(0, 0)):
    """Means and variances of the inputs of two norms, in float64: x @ W0, norm, relu(.) @ W1, norm."""
    batches = [np.asarray(x, np.float64) @ WEIGHTS[0] for x in batches or DATA]
    results = []
    for weights, ddof in zip((WEIGHTS[1], None), correction, strict=True):
        x = np.concatenate(batches)
        results.append((x.mean(0), x.var(0, ddof=ddof)))
        if weights is not None:
            means = [results[0] if method == "layerwise" else (b.mean(0), b.var(0)) for b in batches]
            batches = [
                np.maximum((b - mean) / np.sqrt(var + EPS), 0) @ weights
                for b, (mean, var) in zip(batches, means, strict=True)
            ]
    return results


# --- functions


def measure_layerwise(states, x):
    x = x @ WEIGHTS[0]
    first = jaxbn.moments(x)
    x, _ = jaxbn.batch_norm_eval(x, None, states["a"])
    return {"a": first, "b": jaxbn.moments(jax.nn.relu(x) @ WEIGHTS[1])}


def measure_batchwise(states, x):
    x = x @ WEIGHTS[0]
    first = jaxbn.moments(x)
    x, _ = jaxbn.batch_norm_train(x, None, None)
    return {"a": first, "b": jaxbn.moments(jax.nn.relu(x) @ WEIGHTS[1])}


def fresh():
    return {name: jaxbn.batch_norm_init(3)[1] for name in "ab"}


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize(("method", "measure"), [("layerwise", measure_layerwise), ("batchwise", measure_batchwise)])
def test_functions(method, measure, correction):
    states = recalibrate(measure, fresh(), DATA, method=method, correction=correction)
    for state, (mean, var) in zip(states.values(), oracle(method, correction=(correction, correction)), strict=True):
        close(state.mean, mean)
        close(state.var, var)
        assert (state.mean.dtype, state.var.dtype, int(state.num_batches_tracked)) == (jnp.float32, jnp.float32, 4)


def test_the_methods_differ_behind_the_first_norm_alone():
    layerwise, batchwise = oracle("layerwise"), oracle("batchwise")
    np.testing.assert_array_equal(layerwise[0], batchwise[0])
    assert np.abs(layerwise[1][1] / batchwise[1][1] - 1).max() > 0.05


def test_layerwise_does_not_depend_on_how_data_are_cut():
    one = recalibrate(measure_layerwise, fresh(), [np.concatenate(DATA)])
    many = recalibrate(measure_layerwise, fresh(), DATA)
    jax.tree.map(lambda a, b: close(a, b) if a.ndim else None, one, many)


def test_layerwise_does_not_depend_on_the_old_statistics():
    old = jax.tree.map(lambda v: v * 0 + 100, fresh())
    new, other = recalibrate(measure_layerwise, old, DATA), recalibrate(measure_layerwise, fresh(), DATA)
    jax.tree.map(np.testing.assert_array_equal, new, other)
    nearly = new | {"a": new["a"]._replace(mean=new["a"].mean + 1e-5)}
    jax.tree.map(np.testing.assert_array_equal, new, recalibrate(measure_layerwise, nearly, DATA))


class Counted(list):
    sweeps = 0

    def __iter__(self):
        self.sweeps += 1
        return super().__iter__()


def test_layers_side_by_side_share_a_sweep():
    def side_by_side(states, x):
        return [jaxbn.moments(x @ weights) for weights in WEIGHTS]

    data = Counted(EVEN)
    recalibrate(side_by_side, [jaxbn.batch_norm_init(3)[1] for _ in WEIGHTS], data)
    assert data.sweeps == 2  # the second shows that nothing changes any more
    data = Counted(EVEN)
    recalibrate(measure_layerwise, fresh(), data)
    assert data.sweeps == 2
    data = Counted(EVEN)
    recalibrate(measure_batchwise, fresh(), data, method="batchwise")
    assert data.sweeps == 1


def test_one_compilation_per_shape():
    traced = []

    def measure(states, x):
        traced.append(x.shape)
        return measure_layerwise(states, x)

    recalibrate(measure, fresh(), DATA)
    recalibrate(measure, fresh(), DATA, progress=True)
    assert sorted(traced) == [(4, 3), (8, 3)]


def test_what_has_no_value_keeps_its_statistics():
    _, state = jaxbn.batch_norm_init(3)
    mask = jnp.array([[True, True, False], [True, False, False]])
    x = jnp.array([[1.0, 5.0, 7.0], [3.0, 6.0, 8.0]])
    new = recalibrate(lambda _, x: jaxbn.moments(x, mask=mask), state, [x])
    assert new.mean.tolist() == [2, 5, 0]
    assert new.var.tolist() == [2, 1, 1]
    new = recalibrate(lambda _, x: jaxbn.moments(x, mask=mask & False), state, [x, x])
    assert int(new.num_batches_tracked) == 0


@pytest.mark.slow
def test_shard_map_with_an_axis_name():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec()
    )
    def measure(states, x):
        x = x @ WEIGHTS[0]
        first = jaxbn.moments(x, axis_name="data")
        x, _ = jaxbn.batch_norm_eval(x, None, states["a"])
        return {"a": first, "b": jaxbn.moments(jax.nn.relu(x) @ WEIGHTS[1], axis_name="data")}

    data = np.concatenate(DATA)[:16]
    sharded = jax.device_put([data[:8], data[8:]], NamedSharding(mesh, PartitionSpec("data")))
    states = recalibrate(measure, fresh(), sharded, correction=0)
    for state, (mean, var) in zip(states.values(), oracle("layerwise", [data]), strict=True):
        close(state.mean, mean)
        close(state.var, var)


def test_far_more_values_than_float32_can_count():
    def measure(state, x):
        m = jaxbn.moments(x)
        return jaxbn.Moments(m.mean, m.var, m.count * 2**24)

    x = np.array([[0.0], [2.0]], np.float32)
    state = recalibrate(measure, jaxbn.batch_norm_init(1)[1], [x] * 40 + [x + 41], method="batchwise", correction=0)
    assert state.mean.tolist() == [2.0]
    close(state.var, [1 + 41**2 * (40 / 41) / 41])


def test_as_torch_update_bn():
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 3, bias=False),
        torch.nn.BatchNorm1d(3),
        torch.nn.ReLU(),
        torch.nn.Linear(3, 3, bias=False),
        torch.nn.BatchNorm1d(3),
    )
    with torch.no_grad():
        for layer, weights in ((net[0], WEIGHTS[0]), (net[3], WEIGHTS[1])):
            layer.weight.copy_(torch.from_numpy(weights.T.copy()))
    # Of batches of one size the mean of means is the mean; PyTorch takes the mean of variances too.
    data = [torch.from_numpy(x[:4]) for x in DATA]
    torch.optim.swa_utils.update_bn(data, net)
    states = recalibrate(measure_batchwise, fresh(), data, method="batchwise")
    for state, layer in zip(states.values(), (net[1], net[4]), strict=True):
        close(state.mean, layer.running_mean.numpy())
        assert int(state.num_batches_tracked) == int(layer.num_batches_tracked) == 4
    torch.optim.swa_utils.update_bn(data[:1], net)
    states = recalibrate(measure_batchwise, fresh(), data[:1], method="batchwise")
    for state, layer in zip(states.values(), (net[1], net[4]), strict=True):
        close(state.mean, layer.running_mean.numpy())
        close(state.var, layer.running_var.numpy())


# --- Linen


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


# --- NNX


# Compiled once for the model as it is, and for each observation.
@nnx.jit
def run_compiled(norm, x):
    return norm(x)


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linears = nnx.List([nnx.Linear(3, 3, use_bias=False, rngs=rngs) for _ in range(2)])
        for layer, weights in zip(self.linears, WEIGHTS, strict=False):
            layer.kernel.set_value(jnp.asarray(weights))
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
            self.blocks = nnx.vmap(Block)(nnx.Rngs(0).split(3))

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


# --- errors

STATE = jaxbn.batch_norm_init(3)[1]


def once(items):
    yield from items


class Exhausted:
    def __init__(self):
        self.items = iter(DATA)

    def __iter__(self):
        return self.items


@pytest.mark.parametrize(
    ("measure", "states", "batches", "options", "error", "message"),
    [
        (
            None,
            STATE,
            [],
            {},
            ValueError,
            "batches: expected at least 1 batch, got none; an iterator can be iterated only once",
        ),
        (
            None,
            STATE,
            once(DATA),
            {},
            TypeError,
            "batches: expected an iterable that can be iterated several times, got generator, an iterator; pass a list "
            "or a data loader, or method='batchwise', which takes one pass",
        ),
        (
            measure_layerwise,
            fresh(),
            Exhausted(),
            {},
            ValueError,
            "batches: expected 4 batches in each sweep, got 0 in sweep 2; pass an iterable that gives all of them each "
            "time, or method='batchwise', which takes one pass",
        ),
        (
            None,
            STATE,
            DATA[0],
            {},
            TypeError,
            "batches: expected an iterable of batches, got one array of shape (8, 3); if it is one batch put it into "
            "a list: [x]",
        ),
        (
            None,
            STATE,
            [{"x": DATA[0], "name": "a"}],
            {},
            TypeError,
            "batches: expected arrays in each batch, got str; leave out of the batches what the model does not take",
        ),
        (
            None,
            STATE,
            DATA,
            {"method": "both"},
            ValueError,
            "method: expected 'layerwise' or 'batchwise', got 'both'",
        ),
        (
            None,
            STATE,
            DATA,
            {"correction": -1},
            ValueError,
            "correction: expected a finite number of at least 0, got -1; 1 stores the unbiased variance (PyTorch), 0 "
            "the biased one (Flax)",
        ),
        (
            None,
            {"a": STATE, "b": jnp.ones(3)},
            DATA,
            {},
            TypeError,
            "states: expected a jaxbn.BatchNormState or a tree of them, got ArrayImpl; see batch_norm_init",
        ),
        (
            None,
            {},
            DATA,
            {},
            TypeError,
            "states: expected a jaxbn.BatchNormState or a tree of them, got an empty tree; see batch_norm_init",
        ),
        (
            lambda states, x: [jaxbn.moments(x)],
            {"a": STATE},
            DATA,
            {},
            TypeError,
            "measure: expected a tree like states with jaxbn.Moments in place of each, PyTreeDef({'a': *}), got "
            "PyTreeDef([*])",
        ),
        (
            lambda states, x: [jaxbn.moments(x[:, :2]), jaxbn.moments(x), jaxbn.moments(x[:, :1])],
            [STATE] * 3,
            DATA,
            {},
            ValueError,
            "measure: expected moments of the shapes of the states, got states[0] (2,) for (3,), states[2] (1,) for "
            "(3,); measure along the norm's feature axes",
        ),
        (
            None,
            {"a": STATE},
            [DATA[0] * np.nan],
            {},
            ValueError,
            "states['a']: expected finite statistics, got NaN or infinity; the batches or the weights have such "
            "values, or values so large that they overflow: mask or correct them. Nothing was changed",
        ),
    ],
)
def test_errors(measure, states, batches, options, error, message):
    def everywhere(states, x):
        return jax.tree.map(lambda _: jaxbn.moments(x), states, is_leaf=lambda v: isinstance(v, jaxbn.BatchNormState))

    with pytest.raises(error) as raised:
        recalibrate(measure or everywhere, states, batches, **options)
    assert str(raised.value) == message


class Own(nn.BatchNorm):
    @nn.compact
    def __call__(self, x):
        self.variable("batch_stats", "mean", jnp.zeros, 3)
        self.variable("batch_stats", "var", jnp.ones, 3)
        return x


@pytest.mark.parametrize(
    ("make", "call", "error", "message"),
    [
        (
            lambda: nn.Dense(3),
            None,
            ValueError,
            "variables: expected a collection batch_stats with mean and var of a BatchNorm, got none; pass all "
            "of the network, statistics included",
        ),
        (
            lambda: nn.Sequential([nn.BatchNorm(use_running_average=True)]),
            lambda apply, x: x,
            ValueError,
            "call: expected a call of one of the layers layers_0, got none; run the model on the batch",
        ),
        (
            lambda: nn.Sequential([Own()]),
            None,
            TypeError,
            "layers_0: expected Own.__call__ to call that of its base class, it does not; what a batch norm of its own "
            "normalizes cannot be seen: measure it yourself (jaxbn.moments)",
        ),
    ],
)
def test_linen_errors(make, call, error, message):
    model = make()
    variables = model.init(jax.random.key(0), DATA[0])
    with pytest.raises(error) as raised:
        recalibrate_linen(model, variables, DATA, call=call)
    assert str(raised.value) == message


def test_nnx_without_a_norm():
    with pytest.raises(
        ValueError, match=r"^model: expected an NNX module with a BatchNorm of Flax or jaxbn, got none; "
    ):
        recalibrate_nnx(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), DATA)


# --- batches and models of other kinds


def test_random_keys_in_a_batch():
    """They are no numbers, and go to the model as they are."""
    batches = [{"key": jax.random.key(i), "x": x} for i, x in enumerate(EVEN)]

    def noisy(run, batch):
        return run(batch["x"] + jax.random.normal(batch["key"], batch["x"].shape))

    mean = np.concatenate(
        [x + np.asarray(jax.random.normal(b["key"], x.shape)) for b, x in zip(batches, EVEN, strict=True)]
    )
    mean = mean.astype(np.float64).mean(0)
    close(recalibrate(lambda _, batch: noisy(jaxbn.moments, batch), STATE, batches).mean, mean)
    net = nn.BatchNorm(use_running_average=True)
    variables = recalibrate_linen(net, net.init(jax.random.key(0), EVEN[0]), batches, call=noisy)
    close(variables["batch_stats"]["mean"], mean)
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    recalibrate_nnx(model, batches, call=noisy)
    close(model.mean[...], mean)


def test_diagnosis_finds_nothing_after_recalibration():
    """Though a few batches would not be enough for statistics that are averaged with this decay."""
    net = nn.Sequential(
        [nn.Dense(3), jaxbn.linen.BatchRenorm(limits=(1.0, 0.0), momentum=0.9, use_running_average=True)]
    )
    variables = recalibrate_linen(net, net.init(jax.random.key(0), EVEN[0]), EVEN)
    report = diagnose_linen(net, variables, EVEN, steps=len(EVEN))
    assert not {"initial_weight", "drift"} & {finding.kind for finding in report.findings}


class TakesTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        return nn.BatchNorm(use_running_average=not train, name="norm")(x)


def test_one_call_serves_both_tools():
    net, call = TakesTrain(), lambda apply, x: apply(x, train=False)
    variables = recalibrate_linen(net, net.init(jax.random.key(0), EVEN[0], train=False), EVEN, call=call)
    report = diagnose_linen(net, variables, EVEN, call=call)
    assert report.ok
    np.testing.assert_allclose(report.layers[0].shift, 0, atol=1e-6)


LABELLED = (DATA[0], np.arange(len(DATA[0])))


@pytest.mark.parametrize("tool", [recalibrate_linen, diagnose_linen, recalibrate_nnx, diagnose_nnx])
@pytest.mark.parametrize(
    ("batch", "got", "part"),
    [
        (LABELLED, "a tuple of 2", "0"),
        (list(LABELLED), "a list of 2", "0"),
        (dict(zip(("x", "label"), LABELLED, strict=True)), "a dict of 2", "'x'"),
    ],
)
def test_batches_that_the_model_does_not_take(tool, batch, got, part):
    if tool in (recalibrate_linen, diagnose_linen):
        net = nn.Sequential([nn.Conv(3, (1,)), nn.BatchNorm(use_running_average=True)])
        arguments, name = (net, net.init(jax.random.key(0), DATA[0])), "apply"
    else:
        net = nnx.Sequential(nnx.Conv(3, 3, (1,), rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        arguments, name = (net,), "model"
    with pytest.raises(TypeError) as raised:
        tool(*arguments, [batch])
    assert str(raised.value) == (
        f"batches: expected what the model takes, got {got}, for which it raised AttributeError: "
        f"'{type(batch).__name__}' object has no attribute 'ndim'; say what to give it: "
        f"call=lambda {name}, batch: {name}(batch[{part}])"
    )


@pytest.mark.parametrize(
    ("tool", "argument"), [(recalibrate_linen, "batches"), (diagnose_linen, "batches"), (fold_linen, "batch")]
)
@pytest.mark.parametrize(
    ("batch", "got", "given"),
    [(DATA[0], "one batch alone", "batch"), ((DATA[0], np.arange(4)), "a tuple of 2", "batch[0]")],
    ids=["array", "tuple"],
)
def test_a_model_that_takes_train(tool, argument, batch, got, given):
    variables = TakesTrain().init(jax.random.key(0), DATA[0], train=False)
    with pytest.raises(TypeError) as raised:
        tool(TakesTrain(), variables, batch if argument == "batch" else [batch])
    assert str(raised.value) == (
        f"{argument}: expected what the model takes, got {got}, for which it raised TypeError: TakesTrain.__call__() "
        "missing 1 required positional argument: 'train'; say what to give it: "
        f"call=lambda apply, batch: apply({given}, train=False)"
    )


class TwoInputs(nn.Module):
    @nn.compact
    def __call__(self, pair):
        return nn.BatchNorm(use_running_average=True, name="norm")(pair[0] + pair[1])


def test_a_model_may_take_tuples():
    batches = [(x, x) for x in EVEN]
    variables = TwoInputs().init(jax.random.key(0), batches[0])
    new = recalibrate_linen(TwoInputs(), variables, batches)
    close(new["batch_stats"]["norm"]["mean"], 2 * np.concatenate(EVEN).astype(np.float64).mean(0))


class Repeated(nn.Module):
    """One layer, run again and again."""

    carried: bool

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.BatchNorm(use_running_average=True, name="norm")(x), None

        axes = {"variable_carry": "batch_stats"} if self.carried else {"variable_broadcast": ["params", "batch_stats"]}
        axes = {"variable_broadcast": "params"} | axes
        return nn.scan(Block, length=3, split_rngs={"params": False}, **axes)(name="blocks")(x, None)[0]


def test_linen_scan_that_broadcasts_statistics():
    net, x = Repeated(carried=False), DATA[0]
    variables = net.init(jax.random.key(0), x)
    net.apply(variables, x)
    for tool in (recalibrate_linen, diagnose_linen):
        with pytest.raises(ValueError, match=r"^model: ") as raised:
            tool(net, variables, [x])
        assert str(raised.value) == (
            "model: expected batch_stats that can change in nn.scan, got a variable_broadcast with 'batch_stats' in "
            "it; pass this function the same network with variable_carry='batch_stats' in its place, which takes the "
            "same variables"
        )
    # The cure is one.
    new = recalibrate_linen(Repeated(carried=True), variables, [x], method="batchwise")
    inputs = [x.astype(np.float64)]
    for _ in range(2):
        inputs.append(inputs[-1] + (inputs[-1] - inputs[-1].mean(0)) / np.sqrt(inputs[-1].var(0) + EPS))
    close(new["batch_stats"]["blocks"]["norm"]["var"], np.concatenate(inputs).var(0))


class ByReference(nnx.Module):
    def __init__(self):
        self.first = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.second = jaxbn.nnx.BatchNorm(3, momentum=None, rngs=nnx.Rngs(0))

    def __call__(self, x):
        # What only references allow: JAX's own transformations.
        x = jax.checkpoint(self.first)(x) @ WEIGHTS[0]
        return jax.lax.scan(lambda carry, part: (carry, self.second(part)), None, x[None])[1][0]


def test_nnx_variables_that_are_references():
    with nnx.var_defaults(ref=True):
        model = ByReference()
        recalibrate_nnx(model, EVEN)
    x = np.concatenate(EVEN).astype(np.float64)
    for norm in (model.first, model.second):
        close(norm.mean[...], x.mean(0))
        close(norm.var[...], x.var(0))
        x = (x - x.mean(0)) / np.sqrt(x.var(0) + EPS) @ WEIGHTS[0]
    assert int(model.second.num_batches_tracked[...]) == 3
    # Outside of the context the model is what it was, and nothing but copies of it is run.
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    findings = diagnose_nnx(model, np.concatenate(EVEN)).findings
    assert {f.kind for f in findings} == {"train_mode", "depends_on_batch"}
    with pytest.raises(ValueError, match="expected finite statistics"):
        recalibrate_nnx(model, [EVEN[0] * np.nan])
    after = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
