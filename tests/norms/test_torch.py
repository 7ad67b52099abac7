"""Do the functions give PyTorch's numbers? Those on record, and those of the torch that is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_torch import CASES, KINDS, PATH, TRAINING_STEPS, Case, make_inputs, read, record
from marks import grid
from near import assert_near

from jaxbn import BatchNormParams, batch_norm_eval, batch_norm_init, batch_norm_train

# Both sides round to float32 in their own order.
UNITS = 8


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        return dict(file)


@functools.partial(jax.jit, static_argnames=("training", "momentum"))
def step(x, dy, params, state, *, training, momentum):
    function = functools.partial(batch_norm_train, momentum=momentum) if training else batch_norm_eval
    y, pull, state = jax.vjp(lambda x, params: function(x, params, state, axis=1), x, params, has_aux=True)
    return y, *pull(dy), state


def record_jaxbn(case, inputs):
    """The same as `record`, from the functions."""
    params, state = batch_norm_init(
        inputs.weight.size, affine=case.affine, track_running_stats=case.track_running_stats
    )
    if case.affine:
        params = BatchNormParams(jnp.asarray(inputs.weight), jnp.asarray(inputs.bias))
    rows = []
    for k, (x, dy) in enumerate(zip(inputs.x, inputs.dy, strict=True)):
        y, dx, dparams, state = step(x, dy, params, state, training=k < TRAINING_STEPS, momentum=case.momentum)
        row = {"y": y, "dx": dx}
        if case.affine:
            row |= {"dweight": dparams.scale, "dbias": dparams.bias}
        if case.track_running_stats:
            row |= dict(zip(("running_mean", "running_var", "num_batches_tracked"), state, strict=True))
        rows.append(row)
    return jax.tree.map(lambda *values: np.stack(values), *rows)


@grid("case", CASES, quick=lambda case: case.kind == "2d", ids=str)
def test_numbers_on_record(golden, case):
    inputs, expected = read(golden, case)
    assert_near(record_jaxbn(case, inputs), expected, UNITS, least=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_of_installed_torch(case):
    pytest.importorskip("torch")
    inputs = make_inputs(case.kind)
    assert_near(record_jaxbn(case, inputs), record(case, inputs), UNITS, least=0)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_non_finite_channel_spreads_as_in_installed_torch(kind, momentum, value):
    pytest.importorskip("torch")
    case, inputs = Case(kind, True, True, momentum), make_inputs(kind)
    inputs.x[1, 0, 1] = value
    expected, actual = (
        {name: np.where(np.isfinite(v), v, np.nan) for name, v in recorder(case, inputs).items()}
        for recorder in (record, record_jaxbn)
    )
    assert np.isnan(expected["running_var"][1:, 1]).all()
    assert_near(actual, expected, UNITS, least=0)
