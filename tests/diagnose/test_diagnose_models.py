"""Every fault that jaxbn.diagnose finds in a network is planted and found, and where there is none it is silent."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from diagnosis import C, LinenNet, NnxNet, OnlyNorm, X, at, of_data
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import diagnose


@pytest.fixture
def nnx_net():
    model = NnxNet()
    for _ in range(12):
        model(X)
    model.eval()
    return model


def with_leaf(tree, collection, layer, name, function):
    """A copy with one array changed."""
    copy = jax.tree.map(lambda v: v, tree)
    copy[collection][layer][name] = function(copy[collection][layer][name])
    return copy


@pytest.mark.slow
def test_healthy_network_is_silent(variables, nnx_net):
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(nnx_net)))
    # Flax's own layers have the same variables.
    linen = diagnose.diagnose_linen(LinenNet(nn.BatchNorm), variables, [X[:64], X[64:]], steps=12)
    reports = linen, diagnose.diagnose_nnx(nnx_net, X, steps=12)
    for report in reports:
        assert report.findings == []
        assert report.parts_at is None
        assert len(report.layers) == 2
        # Half a batch differs from the whole by chance.
        assert report.output_difference < 0.3
        assert max(layer.own for layer in report.layers) < 0.1
    after = nnx.to_pure_dict(nnx.state(nnx_net))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
def test_moments_and_differences_are_those_of_numpy(variables):
    spoiled = with_leaf(variables, "batch_stats", "BatchNorm_0", "mean", lambda v: v + 1)
    report = diagnose.diagnose_linen(LinenNet(), spoiled, [X[:64], X[64:]])
    params, stats = spoiled["params"], spoiled["batch_stats"]
    h = X.astype(np.float64) @ np.asarray(params["Dense_0"]["kernel"], np.float64) + np.asarray(
        params["Dense_0"]["bias"]
    )
    mean, var, _ = oracle.moments(h)
    running = (np.asarray(stats["BatchNorm_0"][k], np.float64) for k in ("mean", "var"))
    m, v = running
    np.testing.assert_allclose(report.layers[0].shift, np.abs(mean - m) / np.sqrt(v + 1e-5), rtol=1e-4)
    np.testing.assert_allclose(report.layers[0].ratio, (var + 1e-5) / (v + 1e-5), rtol=1e-4)
    # Estimated by projections, for each batch by itself: to 1 / sqrt(2 * 8 * 6), 10% at one sigma.
    halves = [h[:64], h[64:]]
    train = np.concatenate([oracle.train(half) for half in halves])
    expected = np.sqrt(np.mean((oracle.normalize(h, m, v) - train) ** 2) / np.mean(train**2))
    np.testing.assert_allclose(report.layers[0].passed_on, expected, rtol=0.4)


@pytest.mark.slow
def test_the_layer_where_train_and_eval_part(variables, nnx_net):
    spoiled = with_leaf(variables, "batch_stats", "BatchNorm_1", "var", lambda v: 100 * v)
    nnx_net.norms[1].var[...] *= 100
    for report in (diagnose.diagnose_linen(LinenNet(), spoiled, X), diagnose.diagnose_nnx(nnx_net, X)):
        second = report.layers[1].path
        assert report.parts_at == second
        assert [(f.kind, f.layer) for f in report.findings] == [("drift", second), ("parting", second)]


@pytest.mark.slow
def test_a_difference_passed_on_is_not_blamed_on_later_layers(variables):
    spoiled = with_leaf(variables, "batch_stats", "BatchNorm_0", "mean", lambda v: v + 30)
    report = diagnose.diagnose_linen(LinenNet(), spoiled, X)
    assert {f.layer for f in report.findings} == {"BatchNorm_0"}
    assert report.layers[1].own < 0.1 < 0.5 < report.layers[1].passed_on


@pytest.mark.slow
def test_train_mode(variables, nnx_net):
    nnx_net.train()
    linen = diagnose.diagnose_linen(LinenNet(), variables, X, call=lambda apply, x: apply(x, train=True))
    nnx_report = diagnose.diagnose_nnx(nnx_net, X)
    for report in (linen, nnx_report):
        # What explains the others comes first.
        assert [f.kind for f in report.errors] == ["train_mode", "train_mode", "depends_on_batch"]
        evidence = report.findings[-1].evidence
        assert evidence.startswith("outputs of the first 4 of 128 examples differ by ")
        assert evidence.endswith(" (relative, rms) if the others are replaced")


class Centred(nn.Module):
    """Depends on the batch though its norm does not."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True)(x) - x.mean(0, keepdims=True)


@pytest.mark.slow
def test_output_that_depends_on_the_batch():
    mean, var, _ = oracle.moments(X)
    tree = {"BatchNorm_0": {"mean": jnp.asarray(mean, jnp.float32), "var": jnp.asarray(var, jnp.float32)}}
    variables = {**Centred().init(jax.random.key(0), X), "batch_stats": tree}
    (found,) = diagnose.diagnose_linen(Centred(), variables, X).findings
    assert (found.severity, found.kind, found.layer) == ("error", "depends_on_batch", "")
    assert found.numbers["difference"] > 0.1


class FourOrMore(nn.Module):
    """Raises for other batches."""

    @nn.compact
    def __call__(self, x):
        if len(x) % 4:
            raise ValueError(f"x: expected a multiple of 4 examples, got {len(x)}; {'and so on, ' * 20}")
        return nn.BatchNorm(use_running_average=True, name="norm")(x)


def test_a_model_that_takes_batches_of_some_sizes():
    report = diagnose.diagnose_linen(FourOrMore(), of_data(X), X)
    assert report.ok
    assert "depends_on_batch" not in {kind for n in report.not_checked for kind in n.kinds}
    with pytest.raises(ValueError, match="got 3; and so on"):
        diagnose.diagnose_linen(FourOrMore(), of_data(X), X[:3])


@pytest.mark.parametrize(
    ("x", "call", "needs"),
    [
        (X[:1], None, "a batch of at least 2 examples"),
        (X, lambda apply, x: apply(x).mean(), "outputs that have the examples along their first axis"),
    ],
)
def test_single_examples_that_say_nothing(x, call, needs):
    report = diagnose.diagnose_linen(OnlyNorm(), of_data(X), x, call=call)
    assert report.not_checked[-1] == diagnose.NotChecked(("depends_on_batch",), ("norm",), needs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "x", "options"),
    [
        ("few_values", X[:8], {}),
        ("few_values", X, {"train_batch_size": 4}),
        ("dead_channels", at(3.0, X, np.s_[:, 1]), {}),
        ("near_constant", at(1000 + X[:, 1] * 1e-2, X, np.s_[:, 1]), {}),
        ("eps_dominates", at(X[:, 1] * 1e-4, X, np.s_[:, 1]), {}),
        ("not_finite_input", at(np.nan, X, np.s_[5, 1]), {}),
    ],
)
def test_faults_of_the_batch(kind, x, options):
    found = diagnose.diagnose_linen(OnlyNorm(), of_data(x), np.asarray(x, np.float32), **options).findings
    assert [f.kind for f in found] == [kind]


def test_thresholds_can_be_given():
    x = X[:8]
    thresholds = diagnose.Thresholds(few_values=8)
    assert diagnose.diagnose_linen(OnlyNorm(), of_data(x), x, thresholds=thresholds).findings == []


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jaxbn.linen.BatchNorm(use_running_average=True)(nn.Dense(C)(x)), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)()(x, None)[0]


@pytest.mark.slow
def test_layers_inside_transformations():
    """Three layers of one name, that a scan runs, are told one by one."""
    variables = Scanned().init(jax.random.key(0), X)
    (block,) = variables["params"]
    dense = variables["params"][block]["Dense_0"]
    report = diagnose.diagnose_linen(Scanned(), variables, X)
    x, shifts = X.astype(np.float64), []
    for kernel, bias in zip(*(np.asarray(dense[name], np.float64) for name in ("kernel", "bias")), strict=True):
        h = x @ kernel + bias
        x = oracle.train(h)
        shifts.append(np.abs(oracle.moments(h)[0]) / np.sqrt(1 + 1e-5))
    assert [layer.path for layer in report.layers] == [f"{block}/BatchNorm_0[{i}]" for i in range(3)]
    np.testing.assert_allclose([layer.shift for layer in report.layers], shifts, rtol=1e-4, atol=1e-5)


class DomainBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return jaxbn.linen.BatchNorm(use_running_average=True, num_domains=2)(x, domain=1), None


class ScannedDomains(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0}
        return nn.scan(DomainBlock, variable_axes=axes, split_rngs={"params": True}, length=2)()(x, None)[0]


@pytest.mark.slow
def test_domains_inside_a_scan():
    """The first domain got nothing."""
    report = diagnose.diagnose_linen(ScannedDomains(), ScannedDomains().init(jax.random.key(0), X), X)
    assert [layer.path.rpartition("[")[2] for layer in report.layers] == ["0, 0]", "0, 1]", "1, 0]", "1, 1]"]
    assert [layer.shift is None for layer in report.layers] == [True, False, True, False]
    expected = np.abs(oracle.moments(X.astype(np.float64))[0]) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(report.layers[1].shift, expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [None, 0.5])
def test_domains_are_layers_of_their_own(momentum):
    model = jaxbn.nnx.BatchNorm(C, num_domains=2, momentum=momentum, rngs=nnx.Rngs(0))
    for _ in range(12):
        model(X, domain=1)
    model.eval()
    report = diagnose.diagnose_nnx(model, X, call=lambda model, x: model(x, domain=1))
    assert [layer.own is None for layer in report.layers] == [True, False]
    assert [layer.seen for layer in report.layers] == ([0, 12] if momentum is None else [None, None])
    # The domain that had no data.
    assert [(f.kind, f.layer) for f in report.findings] == [("untouched", report.layers[0].path)]
    assert report.layers[1].own < 1e-2


def test_a_count_of_zero_in_a_model(variables):
    """It is unknown how many batches entered; a domain that no batch comes to is named among what was not checked."""
    cumulative = functools.partial(jaxbn.linen.BatchNorm, momentum=None)
    stats = {name: v | {"num_batches_tracked": jnp.asarray(0)} for name, v in variables["batch_stats"].items()}
    report = diagnose.diagnose_linen(LinenNet(cumulative), {**variables, "batch_stats": stats}, X, steps=12)
    assert report.findings == report.not_checked == []
    assert [layer.seen for layer in report.layers] == [12, 12]

    model = jaxbn.nnx.BatchNorm(C, num_domains=2, momentum=None, use_running_average=True, rngs=nnx.Rngs(0))
    for name, value in zip(("mean", "var"), oracle.moments(X), strict=False):
        getattr(model, name)[...] = jnp.asarray([value, value], jnp.float32)
    report = diagnose.diagnose_nnx(model, X, call=lambda model, x: model(x, domain=1))
    assert report.findings == []
    assert [layer.seen for layer in report.layers] == [None, None]
    kinds = ("drift", "parting", "few_values", "not_finite_input")
    needs = "batches with values that reach the layer and are not masked"
    assert report.not_checked == [diagnose.NotChecked(kinds, (report.layers[0].path,), needs)]


def test_random_keys_in_a_batch():
    """Keys are neither numbers nor examples, whatever their leading axis."""
    batch = {"keys": jax.random.split(jax.random.key(0), 3), "x": X}
    model = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    found = diagnose.diagnose_nnx(
        model, batch, call=lambda model, b: model(b["x"] + jax.random.normal(b["keys"][2], (C,))[None])
    ).errors
    assert [f.kind for f in found] == ["untouched", "train_mode", "depends_on_batch", "parting"]
