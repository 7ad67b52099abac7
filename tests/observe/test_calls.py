"""What an observer reads in the call of a layer, what it writes, and what it gets back: in Linen and in NNX alike."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

import jaxbn.linen
import jaxbn.nnx
from jaxbn._observe.calls import Observation, Observer
from jaxbn._observe.run import evaluate, evaluate_linen, run_linen, run_nnx
from jaxbn._versions import get_value, set_value

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((6, 3)) * 2 + 1).astype(np.float32)
MEAN, VAR = np.array([1.0, -1.0, 0.5], np.float32), np.array([2.0, 0.5, 1.0], np.float32)


def linen(handler, call=None, **options):
    """Runs a Linen layer with the statistics `MEAN` and `VAR`; returns its output and what its slot holds."""
    model = jaxbn.linen.BatchNorm(**options)
    stats = {"mean": MEAN, "var": VAR}
    if domains := options.get("num_domains"):
        stats = jax.tree.map(lambda v: np.stack([v] * domains), stats)
    variables = {"params": {"scale": np.ones(3, np.float32), "bias": np.zeros(3, np.float32)}, "batch_stats": stats}
    observer = Observer(lambda mean: jnp.zeros_like(mean), handler)
    y, slots = run_linen(model, variables, X, call, observer)
    return y, slots["(the model itself)"]


def nnx_(handler, call=None, **options):
    model = jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0), **options)
    for name, value in (("mean", MEAN), ("var", VAR)):
        variable = getattr(model, name)
        set_value(variable, jnp.broadcast_to(value, get_value(variable).shape))
    y, slots = run_nnx(model, X, call, Observer(lambda mean: jnp.zeros_like(mean), handler))
    return y, slots["(the model itself)"]


interfaces = pytest.mark.parametrize("run", [linen, nnx_], ids=["linen", "nnx"])


def counting(call):
    call.write_slot(call.read_slot() + 1)
    return call()


@interfaces
def test_the_layer_runs_as_its_caller_says(run):
    y, slot = run(counting, use_running_average=False)
    np.testing.assert_allclose(y, oracle.train(X), rtol=0, atol=2e-6)
    assert slot.tolist() == [1, 1, 1]


@interfaces
def test_a_slot_adds_up_over_calls(run):
    def call(model, x):
        for _ in range(2):
            x = model(x, use_running_average=True)
        return x

    y, slot = run(counting, call)
    once = oracle.normalize(X, MEAN, VAR)
    np.testing.assert_allclose(y, oracle.normalize(once, MEAN, VAR), rtol=1e-5, atol=1e-5)
    assert slot.tolist() == [2, 2, 2]


@interfaces
def test_options_and_arguments(run):
    seen = []

    def handler(call):
        seen.append(call)
        return call()

    mask = np.arange(6)[:, None] < 4

    def call(model, x):
        return model(x, False, mask=mask) + model(x=x, use_running_average=True)

    run(handler, call, epsilon=1e-3, momentum=0.9, correction=1, virtual_batch_size=3)
    layer = seen[0].layer
    assert (layer.name, layer.axis, layer.eps, layer.decay) == ("(the model itself)", -1, 1e-3, 0.9)
    assert (layer.correction, layer.axis_name, layer.num_domains, layer.virtual_batch_size) == (1, None, None, 3)
    assert [c.trains for c in seen] == [True, False]
    for c in seen:
        np.testing.assert_array_equal(c.x, X)
    mean, var, count = oracle.moments(X, mask)
    measured = seen[0].moments()
    np.testing.assert_allclose(measured.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(measured.var, var, rtol=1e-6)
    np.testing.assert_array_equal(measured.count, count)


@interfaces
@pytest.mark.parametrize(("own", "given", "trains"), [(False, None, True), (True, None, False), (None, False, True)])
def test_trains(run, own, given, trains):
    seen = []

    def handler(call):
        seen.append(call.trains)
        return call.evaluate()

    options = {} if own is None else {"use_running_average": own}
    y, _ = run(handler, lambda model, x: model(x, use_running_average=given), **options)
    assert seen == [trains]
    # Whatever the mode is.
    np.testing.assert_allclose(y, oracle.normalize(X, MEAN, VAR), rtol=1e-5, atol=1e-6)


@interfaces
def test_mask_by_position(run):
    seen = []

    def handler(call):
        seen.append(call.moments())
        return call()

    mask = np.arange(6)[:, None] < 4
    y, _ = run(handler, lambda model, x: model(x, False, mask))
    np.testing.assert_allclose(y, oracle.train(X, mask=mask), rtol=0, atol=2e-6)
    np.testing.assert_allclose(seen[0].mean, oracle.moments(X, mask)[0], rtol=1e-6)


def test_fixed_statistics_do_not_train():
    model, seen = jaxbn.nnx.fix_statistics(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))), []
    handler = lambda call: (seen.append(call.trains), call())[1]  # noqa: E731
    run_nnx(model, X, lambda model, x: model(x, False), Observer(lambda mean: jnp.zeros_like(mean), handler))
    assert seen == [False]


@interfaces
def test_evaluating_by_moments_changes_nothing_of_the_layer(run):
    seen = {}

    def handler(call):
        m = call.moments()
        y = call.evaluate_by(dataclasses.replace(m, count=m.count.at[0].set(1)))
        seen.update({name: np.asarray(call.read(name)) for name in ("mean", "var")}, trains=call.trains)
        return y

    y, _ = run(handler, use_running_average=False)
    # The channel of a single value has no variance of its own.
    expected = np.concatenate([oracle.normalize(X, MEAN, VAR)[:, :1], oracle.train(X)[:, 1:]], axis=1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(seen["mean"], MEAN)
    np.testing.assert_array_equal(seen["var"], VAR)
    assert seen["trains"]


@interfaces
def test_what_is_measured_has_a_place_among_the_domains(run):
    seen = []

    def handler(call):
        seen.append((call.moments(), call.place(jnp.arange(3.0), jnp.float32)))
        return call()

    run(handler, lambda model, x: model(x, use_running_average=True, domain=1), num_domains=2)
    (measured, placed) = seen[0]
    mean, _, count = oracle.moments(X)
    np.testing.assert_allclose(measured.mean, [0 * mean, mean], rtol=1e-6)
    np.testing.assert_array_equal(measured.count, [0 * count, count])
    np.testing.assert_array_equal(placed, [[0, 0, 0], [0, 1, 2]])


def test_evaluating_is_running_without_an_observer():
    model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), X)
    y, slots = run_linen(model, variables, X, None, Observer(jnp.zeros_like, lambda call: call()))
    np.testing.assert_array_equal(evaluate_linen(model, variables, X, None), y)
    assert list(slots) == ["layers_1"]
    # The user need not ask for what training changes, and gets it when asked.
    train = lambda apply, x: apply(x, mutable="batch_stats")  # noqa: E731
    y, updates = evaluate_linen(model, variables, X, train)
    assert jax.tree.map(jnp.shape, updates) == {"batch_stats": {"layers_1": {"mean": (3,), "var": (3,)}}}

    layer = nnx.BatchNorm(3, use_running_average=True, rngs=nnx.Rngs(0))
    before = set(vars(layer))
    np.testing.assert_array_equal(evaluate(layer, X, None), layer(X))
    assert set(vars(layer)) == before


def test_no_two_observations_have_slots_of_one_name():
    observer = Observer(jnp.zeros_like, lambda call: call())
    assert Observation(observer).slot != Observation(observer).slot
