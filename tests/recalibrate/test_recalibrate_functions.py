"""Running statistics measured anew are those of the layers' inputs, by float64 NumPy: functions."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from recalibration import DATA, EVEN, WEIGHTS, close, fresh, measure_batchwise, measure_layerwise, oracle

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.recalibrate import recalibrate


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


@pytest.mark.parametrize(
    ("n", "mean", "var", "warns"),
    [
        (
            8,
            0,
            1.5,
            "states['a']: 8 values per statistic: the variance is off by 50%; the statistics that they replace fit "
            "these values, and may be better: pass more data",
        ),
        (16, 0, 1.5, None),
        # What is replaced is wrong, or nothing.
        (8, 100, 1.5, None),
        (8, 0, 1, None),
    ],
)
def test_few_values_in_place_of_good_statistics(n, mean, var, warns):
    x = np.random.default_rng(1).standard_normal((n, 3)).astype(np.float32)
    state = jaxbn.BatchNormState(jnp.full(3, float(mean)), jnp.full(3, float(var)), jnp.asarray(9))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recalibrate(lambda _, x: {"a": jaxbn.moments(x)}, {"a": state}, [x])
    assert [(str(w.message), w.filename) for w in caught] == ([] if warns is None else [(warns, __file__)])


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


def test_the_error_names_the_layer_of_a_stack_that_is_not_finite():
    states = jaxbn.BatchNormState(jnp.zeros((2, 3, 1)), jnp.ones((2, 3, 1)), jnp.zeros((2, 3), int))
    x = np.zeros((2, 3, 4, 1))
    x[1, 2, 0] = np.inf
    with pytest.raises(ValueError, match="finite") as raised:
        recalibrate(lambda states, x: jax.vmap(jax.vmap(jaxbn.moments))(x), states, [x])
    assert str(raised.value) == (
        "states[1, 2]: expected finite statistics, got NaN or infinity; the batches or the weights have such values, "
        "or values so large that they overflow: mask or correct them. Nothing was changed"
    )


def test_the_warning_names_the_layer_of_a_stack_whose_statistics_fit():
    x = np.random.default_rng(0).normal(size=(3, 4, 2))
    mean = x.mean(1)
    mean[1:] += 100
    states = jaxbn.BatchNormState(jnp.asarray(mean), jnp.asarray(x.var(1)), jnp.zeros(3, int))
    with pytest.warns(UserWarning, match="values") as caught:
        recalibrate(lambda states, x: jax.vmap(jaxbn.moments)(x), states, [x])
    assert [str(w.message).partition(": ")[0] for w in caught] == ["states[0]"]
