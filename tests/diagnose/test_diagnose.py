"""Every fault that jaxbn.diagnose knows is planted and found, and where there is none it is silent."""

import dataclasses
import functools
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx, serialization

import jaxbn.linen
import jaxbn.nnx
from jaxbn import diagnose
from jaxbn._extras import need
from jaxbn._norms.drift import compare

C = 6
RNG = np.random.default_rng(0)
MEAN, VAR = RNG.normal(size=C), RNG.uniform(0.5, 2, C)


def kinds(report):
    return {f.kind for f in report.findings}


def statistics(**changes):
    """One healthy layer in Linen's variables, with some arrays changed."""
    arrays = {"mean": MEAN, "var": VAR, "scale": np.ones(C), "bias": np.zeros(C)} | changes
    params = {name: arrays[name] for name in ("scale", "bias")}
    return {"params": {"norm": params}, "batch_stats": {"norm": {"mean": arrays["mean"], "var": arrays["var"]}}}


def at(value, array, index=2):
    changed = np.array(array)
    changed[index] = value
    return changed


STORED = [
    ("not_finite", "error", {"var": at(np.nan, VAR)}, {}),
    ("not_finite", "error", {"mean": at(np.inf, MEAN)}, {}),
    ("not_finite", "error", {"scale": at(np.nan, VAR)}, {}),
    ("negative_variance", "error", {"var": at(-1.0, VAR)}, {}),
    ("untouched", "error", {"mean": np.zeros(C), "var": np.ones(C)}, {}),
    ("untouched", "note", {"mean": np.zeros(C), "var": np.ones(C)}, {"steps": 0}),
    ("initial_weight", "warning", {}, {"decay": 0.99, "steps": 100}),
    ("initial_weight", "error", {}, {"decay": 0.99, "steps": 10}),
    ("short_memory", "warning", {}, {"decay": 0.1, "steps": 1000}),
    ("dead_channels", "warning", {"var": at(0.0, VAR)}, {}),
    ("dead_channels", "error", {"var": np.zeros(C)}, {}),
    ("near_constant", "warning", {"mean": at(1e5, MEAN)}, {}),
    ("eps_dominates", "note", {"var": at(1e-7, VAR), "mean": np.zeros(C)}, {}),
    ("eps_dominates", "warning", {"var": np.full(C, 1e-7), "mean": np.zeros(C)}, {}),
    ("zero_scale", "warning", {"scale": np.zeros(C)}, {}),
    ("huge_bias", "warning", {"bias": at(99.0, VAR)}, {}),
]


@pytest.mark.parametrize(("kind", "severity", "changes", "options"), STORED)
def test_stored_fault(kind, severity, changes, options):
    report = diagnose.diagnose_statistics(statistics(**changes), **options)
    (found,) = report.findings
    assert (found.kind, found.severity, found.layer) == (kind, severity, "norm")
    assert found.evidence
    assert found.cause
    assert found.cure
    assert report.ok == (severity != "error")


def test_zero_scale_of_a_fresh_layer_is_a_note():
    report = diagnose.diagnose_statistics(statistics(scale=np.zeros(C), mean=np.zeros(C), var=np.ones(C)), steps=0)
    assert [(f.severity, f.kind) for f in report.findings] == [("note", "untouched"), ("note", "zero_scale")]


@pytest.mark.parametrize("options", [{}, {"decay": 0.9, "steps": 200}, {"cumulative": True, "steps": 1}])
def test_healthy_statistics_are_silent(options):
    assert diagnose.diagnose_statistics(statistics(), **options).findings == []


def test_names_of_torch_and_of_functions():
    flat = {"a.bn.running_mean": MEAN, "a.bn.running_var": at(-1.0, VAR), "a.bn.num_batches_tracked": np.array(7)}
    flat |= {"a.bn.weight": np.zeros(C), "a.conv.weight": np.zeros((C, C))}
    report = diagnose.diagnose_statistics(flat)
    assert kinds(report) == {"negative_variance", "zero_scale"}
    assert [(layer.path, layer.seen) for layer in report.layers] == [("a/bn", 7)]
    state = jaxbn.BatchNormState(jnp.zeros(C), jnp.ones(C), jnp.asarray(3))
    report = diagnose.diagnose_statistics({"stem": state}, steps=100, decay=0.5)
    assert [(f.kind, f.evidence) for f in report.findings] == [
        ("untouched", "mean exactly 0 and variance exactly 1 in all channels after 3 batches")
    ]


def test_live_torch_module():
    torch = pytest.importorskip("torch")
    report = diagnose.diagnose_statistics(torch.nn.Sequential(torch.nn.BatchNorm2d(3)).state_dict())
    assert [(f.severity, f.kind, f.layer) for f in report.findings] == [("note", "untouched", "0")]


@pytest.mark.parametrize(("spread", "severity"), [(0.1, "warning"), (3.0, "error")])
def test_replicas(spread, severity):
    shifts = spread * np.array([[-1.0], [1.0]])
    tree = {"norm": {"mean": MEAN + shifts, "var": np.stack([VAR, VAR])}}
    report = diagnose.diagnose_statistics(tree, replica_axis=0)
    assert [(f.severity, f.kind) for f in report.findings] == [(severity, "replicas")]
    expected = spread / np.sqrt(VAR.min() + 1e-5)
    np.testing.assert_allclose(report.findings[0].numbers["disagreement"], expected, rtol=1e-12)
    np.testing.assert_allclose(report.layers[0].mean, MEAN)
    tree = {"norm": {"mean": np.stack([MEAN, MEAN]), "var": np.stack([VAR, VAR])}}
    assert diagnose.diagnose_statistics(tree, replica_axis=0).findings == []


def test_comparison_is_that_of_the_formulas():
    """The difference is that of a batch normalized by the one and by the other, as float64 NumPy computes it."""
    x = np.random.default_rng(1).normal(2, 3, (50, C))
    mean, var, _ = oracle.moments(x)
    drift = compare((MEAN, VAR), (mean, var), 0.1)
    apart = oracle.normalize(x, mean, var, eps=0.1) - oracle.normalize(x, MEAN, VAR, eps=0.1)
    np.testing.assert_allclose(drift.difference, np.sqrt(np.mean(apart**2, 0)), rtol=1e-12)
    np.testing.assert_allclose(drift.total, np.sqrt(np.mean(apart**2)), rtol=1e-12)

    def divergence(m, v, n, w):
        return (v / w + (m - n) ** 2 / w - 1 + np.log(w / v)) / 2

    b, r = (mean, var + 0.1), (MEAN, VAR + 0.1)
    np.testing.assert_allclose(drift.divergence, divergence(*b, *r) + divergence(*r, *b), rtol=1e-12)


class LinenNet(nn.Module):
    norm: type[nn.Module] = jaxbn.linen.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(2):
            x = nn.relu(self.norm(use_running_average=not train, momentum=0.5)(nn.Dense(C)(x)))
        return x


class NnxNet(nnx.Module):
    def __init__(self, norm=jaxbn.nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(C, C, rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([norm(C, momentum=0.5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nnx.relu(norm(layer(x)))
        return x


X = np.asarray(RNG.normal(1, 2, (128, C)), np.float32)


@pytest.fixture(scope="module")
def variables():
    variables = LinenNet().init(jax.random.key(0), X)
    step = jax.jit(lambda v: LinenNet().apply(v, X, train=True, mutable=["batch_stats"])[1])
    for _ in range(12):
        variables = {**variables, **step(variables)}
    return variables


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
        assert [f.kind for f in report.errors] == ["depends_on_batch", "train_mode", "train_mode"]
        # There is no variance of one value, and the layer says so.
        assert "a batch of 128 can be evaluated, an example alone cannot" in report.findings[0].evidence


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


def test_a_model_that_takes_no_single_examples():
    """That its outputs depend on the batch is not found then, and not excluded."""
    needs = (
        "a model that takes a batch of one; this one raised ValueError: x: expected a multiple of 4 examples, got 1; "
        "and so on, and so on, and so on, and so on, and so on, and so on, and ..."
    )
    report = diagnose.diagnose_linen(FourOrMore(), of_data(X), X)
    assert report.ok
    assert report.not_checked[-1] == diagnose.NotChecked(("depends_on_batch",), ("norm",), needs)
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


class OnlyNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jaxbn.linen.BatchNorm(use_running_average=True, momentum=0.5, name="norm")(x)


def of_data(x):
    """Variables that are right for `x`, of which only what is planted is wrong."""
    mean, var, _ = oracle.moments(np.where(np.isfinite(x), x, 0))
    return jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), statistics(mean=mean, var=var))


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
    """Three layers of one name, that a scan runs: their channels are told one after the other."""
    variables = Scanned().init(jax.random.key(0), X)
    (block,) = variables["params"]
    dense = variables["params"][block]["Dense_0"]
    report = diagnose.diagnose_linen(Scanned(), variables, X)
    x, shifts = X.astype(np.float64), []
    for kernel, bias in zip(*(np.asarray(dense[name], np.float64) for name in ("kernel", "bias")), strict=True):
        h = x @ kernel + bias
        x = oracle.train(h)
        shifts.append(np.abs(oracle.moments(h)[0]) / np.sqrt(1 + 1e-5))
    np.testing.assert_allclose(report.layers[0].shift, np.concatenate(shifts), rtol=1e-4, atol=1e-5)


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


def spoiled_report():
    """All three severities, and numbers that JSON does not have."""
    changes = {"var": at(-1.0, at(1e-7, at(np.nan, VAR), 0), 1), "mean": at(0.0, MEAN, 0), "bias": at(99.0, VAR)}
    return diagnose.diagnose_statistics(statistics(**changes), decay=0.99, steps=100)


def test_ranking_text_and_json():
    report = spoiled_report()
    ranks = [("error", "warning", "note").index(f.severity) for f in report.findings]
    assert ranks == sorted(ranks)
    assert set(ranks) == {0, 1, 2}
    text = str(report)
    for f in report.findings:
        assert f.kind in text
        assert f.evidence[:40] in text
    loaded = json.loads(report.to_json(channels=True))
    assert loaded["layers"][0]["var"][2] == "nan"
    assert [f["kind"] for f in loaded["findings"]] == [f.kind for f in report.findings]
    assert json.loads(report.to_json())["layers"][0]["channels"] == C


def test_table_in_colour(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report = spoiled_report()
    report = dataclasses.replace(report, layers=[dataclasses.replace(report.layers[0], path="a[0]")])
    report.print()
    printed = capsys.readouterr().out
    assert "a[0]" in printed
    assert "negative_variance" in printed


@pytest.mark.slow
def test_picture(tmp_path, variables):
    for number, report in enumerate((spoiled_report(), diagnose.diagnose_linen(LinenNet(), variables, X))):
        report.draw(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")


def save(kind, tree, folder):
    path = folder / f"net{kind}"
    flat = {"norm.mean": tree["batch_stats"]["norm"]["mean"], "norm.var": tree["batch_stats"]["norm"]["var"]}
    if kind == ".npz":
        np.savez(path, **flat)
    elif kind == ".safetensors":
        pytest.importorskip("safetensors.numpy").save_file(flat, path)
    elif kind == ".msgpack":
        path.write_bytes(serialization.to_bytes(tree))
    else:
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, tree)
    return path


@pytest.mark.parametrize("kind", [".npz", ".safetensors", ".msgpack", ""])
def test_command(kind, tmp_path, capsys):
    healthy = save(kind, statistics(), tmp_path)
    assert diagnose.main([str(healthy), "--plain"]) == 0
    assert "1 norm layer: no findings" in capsys.readouterr().out
    (tmp_path / "bad").mkdir()
    bad = save(kind, statistics(mean=np.zeros(C), var=np.ones(C)), tmp_path / "bad")
    assert diagnose.main([str(bad), "--json", "--draw", str(tmp_path / "a.png")]) == 1
    assert json.loads(capsys.readouterr().out)["findings"][0]["kind"] == "untouched"
    assert (tmp_path / "a.png").exists()


def test_command_from_the_shell(tmp_path):
    path = save(".npz", statistics(var=-VAR), tmp_path)
    command = [sys.executable, "-W", "error", "-m", "jaxbn.diagnose", path]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (finished.returncode, finished.stderr) == (1, "")
    assert "negative_variance" in finished.stdout


def test_command_says_what_it_cannot_read(tmp_path, capsys):
    (tmp_path / "net.pt").write_bytes(b"")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")
    (tmp_path / "steps" / "3").mkdir(parents=True)
    for path, message in (
        (tmp_path / "none.npz", f"path: expected a checkpoint, got {tmp_path}/none.npz, which does not exist"),
        (
            tmp_path / "bad.npz",
            f"path: expected a file that numpy.savez wrote, got {tmp_path}/bad.npz; it is damaged, or something else",
        ),
        (
            tmp_path / "net.pt",
            "path: expected .npz, .safetensors, .msgpack or a folder of Orbax, got net.pt; for other files load the "
            "tree yourself and call jaxbn.diagnose.diagnose_statistics",
        ),
        (
            tmp_path / "steps",
            f"path: expected the folder of one step, got {tmp_path}/steps, which has the steps 3; "
            f"give {tmp_path}/steps/3",
        ),
    ):
        assert diagnose.main([str(path)]) == 2
        assert capsys.readouterr().err == message + "\n"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: diagnose.diagnose_statistics({"dense": {"kernel": MEAN}}),
            ValueError,
            "tree: expected running statistics, arrays named mean and var (Flax, jaxbn) or running_mean and "
            "running_var (PyTorch), got dense/kernel; give the tree that has batch_stats",
        ),
        (
            lambda: diagnose.diagnose_statistics({"norm": {"mean": MEAN, "var": VAR[:2]}}),
            ValueError,
            "norm: expected mean and var of the same shape, got (6,) and (2,); the file is damaged, "
            "or these are not running statistics",
        ),
        (
            lambda: diagnose.diagnose_statistics(statistics(), replica_axis=0),
            ValueError,
            "replica_axis: expected norm/mean with an axis 0 of replicas before its channels, got shape (6,); "
            "leave replica_axis out if it was saved from one device",
        ),
        (
            lambda: diagnose.diagnose_statistics(statistics(), decay=1.5),
            ValueError,
            "decay: expected the weight of the old statistics, between 0 and 1, got 1.5; "
            "it is Flax's momentum, and 0.9 where PyTorch's is 0.1",
        ),
        (
            lambda: diagnose.diagnose_statistics(statistics(), steps=-1),
            ValueError,
            "steps: expected how many batches were seen, a whole number or None, got -1",
        ),
        (
            lambda: diagnose.diagnose_linen(OnlyNorm(), {"params": {}}, X),
            ValueError,
            "variables: expected a collection 'batch_stats', got 'params'; pass all that model.init returned, "
            "with what apply(..., mutable=['batch_stats']) put in its place",
        ),
        (
            lambda: diagnose.diagnose_linen(OnlyNorm(), statistics(), []),
            ValueError,
            "batches: expected at least one batch, got none; an iterator may have been used up",
        ),
        (
            lambda: diagnose.diagnose_linen(OnlyNorm(), statistics(), 3),
            TypeError,
            "batches: expected an array, or a list of batches, got int",
        ),
        (
            lambda: diagnose.diagnose_nnx(nnx.Linear(C, C, rngs=nnx.Rngs(0)), X),
            ValueError,
            "model: expected calls of BatchNorm layers (Flax's or jaxbn's, Linen or NNX), got none; see that call "
            "runs the model that was given, and not one of its own",
        ),
        (
            lambda: need("no_such_package", "here"),
            ImportError,
            "no_such_package: needed here; pip install 'jaxbn[tools]'",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def test_a_count_of_zero_beside_trained_statistics_is_unknown(tmp_path, capsys):
    """Converters write it: of running statistics that something has entered it cannot be true."""
    flat = {"bn.running_mean": MEAN, "bn.running_var": 1000 * VAR, "bn.num_batches_tracked": np.array(0)}
    state = jaxbn.BatchNormState(jnp.asarray(MEAN, jnp.float32), jnp.asarray(VAR, jnp.float32), jnp.asarray(0))
    two = jax.tree.map(lambda v: jnp.stack([v, v]), state)
    for tree in (flat, {"stem": state}, {"stem": two}):
        report = diagnose.diagnose_statistics(tree, decay=0.9)
        assert report.findings == []
        assert {layer.seen for layer in report.layers} == {None}
    report = diagnose.diagnose_statistics(flat, decay=0.9, steps=10)
    assert [(f.kind, f.numbers["seen"]) for f in report.findings] == [("initial_weight", 10)]
    fresh = {"bn.running_mean": np.zeros(C), "bn.running_var": np.ones(C), "bn.num_batches_tracked": np.array(0)}
    assert [layer.seen for layer in diagnose.diagnose_statistics(fresh, steps=1000).layers] == [0]

    np.savez(tmp_path / "net.npz", **flat)
    assert diagnose.main([str(tmp_path / "net.npz"), "--json", "--decay", "0.9", "--steps", "1000"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["seen"] == 1000


def test_a_count_of_zero_in_a_model(variables):
    """And a domain that no batch comes to is named among what was not checked."""
    cumulative = functools.partial(jaxbn.linen.BatchNorm, momentum=None)
    stats = {name: v | {"num_batches_tracked": jnp.asarray(0)} for name, v in variables["batch_stats"].items()}
    report = diagnose.diagnose_linen(LinenNet(cumulative), {**variables, "batch_stats": stats}, X, steps=12)
    assert report.findings == report.not_checked == []
    assert [layer.seen for layer in report.layers] == [12, 12]

    model = jaxbn.nnx.BatchNorm(C, num_domains=2, momentum=None, use_running_average=True, rngs=nnx.Rngs(0))
    for name, value in zip(("mean", "var"), oracle.moments(X), strict=False):
        getattr(model, name).set_value(jnp.asarray([value, value], jnp.float32))
    report = diagnose.diagnose_nnx(model, X, call=lambda model, x: model(x, domain=1))
    assert report.findings == []
    assert [layer.seen for layer in report.layers] == [None, None]
    kinds = ("drift", "parting", "few_values", "not_finite_input")
    needs = "batches with values that reach the layer and are not masked"
    assert report.not_checked == [diagnose.NotChecked(kinds, (report.layers[0].path,), needs)]


def test_random_keys_in_a_batch():
    """Which are neither numbers nor examples, whatever their leading axis."""
    batch = {"keys": jax.random.split(jax.random.key(0), 3), "x": X}
    model = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    found = diagnose.diagnose_nnx(
        model, batch, call=lambda model, b: model(b["x"] + jax.random.normal(b["keys"][2], (C,))[None])
    ).errors
    assert [f.kind for f in found] == ["depends_on_batch", "untouched", "train_mode", "parting"]


def test_cures_are_those_of_the_model():
    """Nobody is told about another interface than his own."""
    fresh = jaxbn.batch_norm_init(C)[1]
    model = jaxbn.nnx.BatchNorm(C, rngs=nnx.Rngs(0))
    variables = of_data(X) | {"batch_stats": {"norm": {"mean": fresh.mean, "var": fresh.var}}}
    reports = (
        diagnose.diagnose_linen(OnlyNorm(), variables, X),
        diagnose.diagnose_nnx(model, X),
        diagnose.diagnose_statistics(variables),
        diagnose.diagnose_statistics(nnx.state(model)),
        diagnose.diagnose_statistics({"stem": fresh}),
        diagnose.diagnose_statistics({"bn.running_mean": fresh.mean, "bn.running_var": fresh.var}),
    )
    save = "; save the statistics with the parameters"
    linen = "pass the batch_stats that apply(..., mutable=['batch_stats']) returns to the next step" + save
    in_nnx = "compile the training step by nnx.jit, or return nnx.state(model) from jax.jit and call nnx.update" + save
    functions = "pass the state that batch_norm_train returns to the next step" + save
    unknown = (
        "pass what training returns to the next step (functions: state; Linen: batch_stats; NNX: use nnx.jit)" + save
    )
    cures = [{f.kind: f.cure for f in report.findings} for report in reports]
    assert [c["untouched"] for c in cures] == [linen, in_nnx, linen, in_nnx, functions, unknown]
    assert cures[1]["train_mode"] == "call model.eval() before evaluation"


@pytest.mark.parametrize(
    ("tree", "options", "cure"),
    [
        (
            statistics(),
            {"decay": 0.9, "steps": 10},
            "measure the statistics again: jaxbn.recalibrate.recalibrate_linen; in training use 44 batches or more, "
            "or momentum=0.6, or momentum=None in jaxbn's layer",
        ),
        (
            {"stem": jaxbn.BatchNormState(jnp.asarray(MEAN), jnp.asarray(VAR), jnp.asarray(100))},
            {"decay": 0.99},
            "measure the statistics again: jaxbn.recalibrate.recalibrate; in training use 459 batches or more, or "
            "momentum=0.05, or momentum=None",
        ),
        (
            {"bn.running_mean": MEAN, "bn.running_var": VAR},
            {"decay": 0.99, "steps": 100},
            "measure the statistics again: jaxbn.recalibrate; in training use 459 batches or more, or a decay of 0.95 "
            "(momentum=0.05 in the functions and in PyTorch), or momentum=None",
        ),
        # No decay that averages over some batches is short enough, and none is too short to be told.
        (
            statistics(),
            {"decay": 1, "steps": 2},
            "measure the statistics again: jaxbn.recalibrate.recalibrate_linen; in training use momentum=None in "
            "jaxbn's layer",
        ),
    ],
)
def test_cure_of_the_initial_weight_follows_from_the_decay(tree, options, cure):
    (found,) = diagnose.diagnose_statistics(tree, **options).findings
    assert (found.kind, found.cure) == ("initial_weight", cure)


def test_findings_with_other_cures_are_told_apart():
    changes = {"a": {"mean": MEAN, "var": VAR, "num_batches_tracked": 10}}
    changes["b"] = changes["a"] | {"num_batches_tracked": 20}
    text = str(diagnose.diagnose_statistics(changes, decay=0.9))
    assert text.count("warning: initial_weight\n") == 2


def test_what_was_not_checked(tmp_path, capsys, monkeypatch):
    flat = {"a.running_mean": MEAN, "a.running_var": VAR, "a.weight": VAR, "a.bias": MEAN}
    flat |= {"b.running_mean": MEAN, "b.running_var": VAR, "b.num_batches_tracked": np.array(100)}
    np.savez(tmp_path / "net.npz", **flat)
    assert diagnose.main([str(tmp_path / "net.npz"), "--plain"]) == 0
    assert "".join(capsys.readouterr().out.partition("not checked")[1:]) == (
        """not checked
  initial_weight in a: needs decay and steps
  short_memory: needs decay
  replicas: needs the statistics of all devices, and replica_axis
  drift, parting, few_values, not_finite_input, train_mode, depends_on_batch:
      needs the model and batches, in diagnose_linen or diagnose_nnx
  initial_weight in b: needs decay
  zero_scale in b: needs the scale of the layer in the same tree, if it has one
  huge_bias in b: needs the bias of the layer in the same tree, if it has one

2 norm layers: no findings
"""
    )
    report = diagnose.diagnose_statistics(flat, decay=0.9)
    assert json.loads(report.to_json())["not_checked"][0] == {
        "kinds": ["initial_weight"],
        "layers": ["a"],
        "needs": "steps",
    }
    monkeypatch.setenv("COLUMNS", "200")
    report.print()
    assert "initial_weight in a: needs steps" in capsys.readouterr().out
    assert [n.kinds for n in diagnose.diagnose_statistics(flat, decay=0.9, steps=100).not_checked][:1] == [
        ("replicas",)
    ]
