"""What diagnosis must not take for a fault, and which of several findings it names first."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from diagnosis import MEAN, RNG, VAR, C, LinenNet, OnlyNorm, X, kinds, of_data, statistics
from flax import nnx
from versions import unregister_duration_listener

import jaxbn.linen
import jaxbn.nnx
from jaxbn import diagnose
from jaxbn.diagnose._find import NAMES
from jaxbn.diagnose._measure import _sum_all, _with_signs
from jaxbn.interop._formats import KERAS, TORCH
from jaxbn.recalibrate import recalibrate_linen, recalibrate_nnx

# --- precision


class Narrow(nn.Module):
    """Computes in `dtype`, with a layer in float32 between."""

    dtype: type
    uses_batch: bool = False

    @nn.compact
    def __call__(self, x):
        for dtype in (self.dtype, jnp.float32):
            x = nn.Conv(8, (3,), use_bias=False, dtype=dtype)(x)
            x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=True, momentum=0.5, dtype=dtype)(x))
        x = nn.Dense(8, dtype=self.dtype)(x)
        # A hundredth of a mean: less than what half precision changes if the batch has another size.
        return x - x.mean(0, keepdims=True) * 0.01 if self.uses_batch else x


IMAGES = np.asarray(RNG.normal(1, 2, (32, 16, 3)), np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_rounding_is_no_dependence_on_the_batch(dtype):
    """In a batch of another size, results are rounded differently; a dependence as small as that is found."""
    net = Narrow(dtype)
    variables = recalibrate_linen(net, net.init(jax.random.key(0), IMAGES), [IMAGES])
    assert diagnose.diagnose_linen(net, variables, [IMAGES]).findings == []
    report = diagnose.diagnose_linen(Narrow(dtype, uses_batch=True), variables, [IMAGES])
    assert kinds(report) == {"depends_on_batch"}
    assert report.errors[0].numbers["difference"] < 0.05


def test_what_is_nan_in_any_batch_does_not_depend_on_it():
    x = np.array(X)
    x[0, 1] = np.nan
    assert kinds(diagnose.diagnose_linen(OnlyNorm(), of_data(X), x)) == {"not_finite_input"}


class Smeared(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(use_running_average=True, name="norm")(x) + 0 * x.sum()


def test_nan_of_one_example_in_the_others_depends_on_the_batch():
    x = np.array(X)
    x[100, 1] = np.nan
    found = diagnose.diagnose_linen(Smeared(), of_data(X), x).findings
    assert [f.kind for f in found] == ["not_finite_input", "depends_on_batch"]


# --- few values


@pytest.mark.parametrize("batches", [X[:1], X[:2], [X[i : i + 1] for i in range(32)]], ids=["one", "two", "ones"])
def test_few_values_say_nothing_about_channels(batches, variables):
    """A layer after one that normalized a single value by itself is not judged either."""
    found = diagnose.diagnose_linen(LinenNet(), variables, batches).findings
    assert {f.kind for f in found} == {"few_values"}
    n = 2 if len(batches) == 2 else 1
    off = "2 values per statistic: the variance is off by 100%"
    assert {f.evidence for f in found} == {off if n == 2 else "1 value per statistic, which has no variance"}


def test_few_values_leave_the_running_variance_to_be_judged(variables):
    stats = variables["batch_stats"]["BatchNorm_1"]
    changed = {**variables["batch_stats"], "BatchNorm_1": {**stats, "var": stats["var"].at[2].set(0)}}
    found = diagnose.diagnose_linen(LinenNet(), {**variables, "batch_stats": changed}, X[:1]).findings
    assert [f.evidence for f in found if f.kind == "dead_channels"] == [
        "running variance up to 0 in 1 of 6 channels (2)"
    ]


# --- statistics that no batch entered

STATISTICS = {
    "healthy": (MEAN, VAR),
    "fresh": (np.zeros(C), np.ones(C)),
    "zeros": (np.zeros(C), np.zeros(C)),
    "dead": (MEAN, np.zeros(C)),
}


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ("zeros zeros", [("zeroed", "0"), ("zeroed", "1")]),
        # Its input may be 0.
        ("healthy zeros", [("dead_channels", "1")]),
        ("healthy dead", [("dead_channels", "1")]),
        ("dead dead", [("dead_channels", "0"), ("dead_channels", "1")]),
        ("fresh fresh", [("untouched", "0"), ("untouched", "1")]),
        ("healthy fresh", [("untouched", "1")]),
    ],
)
@pytest.mark.parametrize("names", NAMES, ids=["flax", "torch", "keras"])
def test_statistics_of_some_layers_or_all(layers, found, names):
    tree = {f"{i}": dict(zip(names, STATISTICS[name], strict=False)) for i, name in enumerate(layers.split())}
    report = diagnose.diagnose_statistics(tree)
    assert [(f.kind, f.layer) for f in report.findings] == found
    (cause,) = {f.cause for f in report.findings}
    # What one layer lacks was not lost with all statistics.
    assert ("restored" in cause) == ("zeros" in layers or layers == "healthy fresh")
    assert ("ReLU has shut off" in cause) == (found[0][0] == "dead_channels")


@pytest.mark.parametrize(
    ("x", "stats", "found"),
    [
        (X, "zeros", ["zeroed", "parting"]),
        (0 * X, "zeros", ["dead_channels"]),
        (X, "fresh", ["untouched", "parting"]),
    ],
    ids=["zeros", "zeros that fit", "fresh"],
)
def test_data_tell_what_zeros_are(x, stats, found):
    mean, var = STATISTICS[stats]
    given = jax.tree.map(jnp.float32, statistics(mean=mean, var=var))
    assert [f.kind for f in diagnose.diagnose_linen(OnlyNorm(), given, x).findings] == found


def test_a_cause_comes_before_what_it_explains(variables):
    """Mean and variance exchanged: every output is NaN, alone and in any batch."""
    exchanged = {name: {"mean": v["var"], "var": -jnp.abs(v["mean"])} for name, v in variables["batch_stats"].items()}
    found = diagnose.diagnose_linen(LinenNet(), {**variables, "batch_stats": exchanged}, X).errors
    assert [(f.kind, f.layer) for f in found] == [("negative_variance", name) for name in exchanged]


# --- names


def test_names_are_those_of_interop():
    """Packages of one floor do not import from each other, so both have a table."""
    names = [[table.names[n][0] for n in ("mean", "var", "scale")] for table in (TORCH, KERAS)]
    assert names == [list(row[:3]) for row in NAMES[1:]]
    assert NAMES[2][3] in KERAS.names["bias"]


@pytest.mark.parametrize("suffix", ["", ":0"])
def test_keras(suffix, tmp_path, capsys):
    arrays = {"gamma": np.zeros(C), "beta": MEAN, "moving_mean": MEAN, "moving_variance": -VAR}
    flat = {f"net/bn/{name}{suffix}": array for name, array in arrays.items()}
    report = diagnose.diagnose_statistics(flat)
    assert [(f.kind, f.layer) for f in report.findings] == [("negative_variance", "net/bn"), ("zero_scale", "net/bn")]
    np.savez(tmp_path / "net.npz", **flat)
    assert diagnose.main([str(tmp_path / "net.npz"), "--plain"]) == 1
    assert "negative_variance" in capsys.readouterr().out


# --- devices


@pytest.mark.slow
@pytest.mark.parametrize("key", [False, True])
def test_explicit_mesh_axes(key):
    """Recalibration and diagnosis of a batch that is sharded over them, in Linen and NNX."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    everywhere, sharded = (jax.NamedSharding(mesh, jax.P(*spec)) for spec in ((), ("data",)))
    batch = {"x": X, "keys": jax.random.split(jax.random.key(0), len(X))} if key else {"x": X}
    batch = jax.device_put(batch, sharded)

    def call(run, batch):
        return run(batch["x"])

    variables = jax.device_put(OnlyNorm().init(jax.random.key(0), X), everywhere)
    variables = recalibrate_linen(OnlyNorm(), variables, [batch], call=call)
    model = jaxbn.nnx.BatchNorm(C, momentum=0.5, use_running_average=True, rngs=nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), everywhere))
    recalibrate_nnx(model, [batch], call=call)
    reports = (
        diagnose.diagnose_linen(OnlyNorm(), variables, [batch], call=call),
        diagnose.diagnose_nnx(model, [batch], call=call),
    )
    mean = oracle.moments(X)[0]
    np.testing.assert_allclose(variables["batch_stats"]["norm"]["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(model.mean[...], mean, rtol=1e-5)
    for report in reports:
        assert report.findings == []
        assert "depends_on_batch" not in {kind for n in report.not_checked for kind in n.kinds}


# --- cost


def test_projections_estimate_squares():
    """Each value has a sign; half of the signs are positive; two projections, or two calls, have unlike signs."""
    ones = jnp.ones((16, 8, 8, 32))
    signs = np.stack([_with_signs(ones, jnp.uint32(call)) for call in (0, 1)]).reshape(16, -1)
    n = signs.shape[1]
    assert set(np.unique(signs)) == {-1, 1}
    assert np.abs(signs.mean(1)).max() < 4 / np.sqrt(n)
    products = signs @ signs.T / n
    assert np.abs(products - np.eye(16)).max() < 4 / np.sqrt(n)
    y = RNG.normal(size=ones.shape).astype(np.float32)
    sums = _sum_all(_with_signs(jnp.asarray(y), jnp.uint32(0)), (0, 1, 2))
    expected = (signs[:8].reshape(8, *y.shape) * y.astype(np.float64)).sum((1, 2, 3))
    np.testing.assert_allclose(np.stack(sums), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(np.mean(expected**2), np.sum(y.astype(np.float64) ** 2) / 32, rtol=0.3)


def count_compilations(function):
    counted = []

    def listen(name, duration, **_):
        counted.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        unregister_duration_listener(listen)
    return counted.count("/jax/core/compile/backend_compile_duration")


def call_in_evaluation(run, x):
    return run(x)


def test_progress(monkeypatch):
    shown = []

    def bar(batches, desc, **options):
        shown.append((desc, len(batches), options["disable"]))
        return batches

    monkeypatch.setattr("tqdm.tqdm", bar)
    diagnose.diagnose_linen(OnlyNorm(), of_data(X), [X[:64], X[64:]], progress=True)
    assert shown == [(f"compiling, running in {mode} mode", 2, None) for mode in ("eval", "train")]


class Unhashable:
    __hash__ = None

    def __call__(self, run, x):
        return run(x)


def test_two_programs_are_compiled_where_none_can_be_kept():
    call = Unhashable()
    batches = [X[:100], X[28:]]
    for _ in range(2):
        run = lambda: diagnose.diagnose_linen(OnlyNorm(), of_data(X), batches, call=call)  # noqa: E731
        assert count_compilations(run) == 2


@pytest.mark.parametrize("interface", ["linen", "nnx"])
def test_two_programs_are_compiled_and_kept(interface):
    """One evaluates and one normalizes by the batch; what else is computed is NumPy."""
    net, x = OnlyNorm(), X[:100]
    if interface == "linen":
        variables = of_data(X)
        other = jax.tree.map(lambda v: v + 1, variables)
        runs = [lambda v=v: diagnose.diagnose_linen(net, v, x, call=call_in_evaluation) for v in (variables, other)]
    else:
        model = jaxbn.nnx.BatchNorm(C, use_running_average=True, rngs=nnx.Rngs(0))
        other = nnx.clone(model)
        other.mean[...] = model.mean[...] + np.float32(1)
        runs = [lambda m=m: diagnose.diagnose_nnx(m, x, call=call_in_evaluation) for m in (model, other)]
    assert [count_compilations(run) for run in runs] == [2, 0]
    # What is kept are programs, and neither arrays nor which layers a batch of another shape calls.
    first, second = (run() for run in runs)
    assert first.layers[0].shift.tolist() != second.layers[0].shift.tolist()
    assert str(runs[0]()) == str(first)
