"""Every fault that jaxbn.diagnose finds in a checkpoint is planted and found, and where there is none it is silent."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from diagnosis import MEAN, VAR, C, OnlyNorm, X, at, kinds, of_data, statistics
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn import diagnose
from jaxbn._statistics.drift import compare

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
