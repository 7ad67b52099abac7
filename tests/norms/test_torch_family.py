"""Do the other norms give the numbers of PyTorch's layers? Those on record, and those of the installed torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.make_torch import TRAINING_STEPS, read
from golden.make_torch_family import CASES, KINDS, PATH, make_inputs, record
from near import assert_near

import jaxbn

pytestmark = pytest.mark.slow

# As in test_torch.py.
UNITS = 8


@pytest.fixture(scope="module")
def golden():
    with np.load(PATH) as file:
        return dict(file)


def initial(case, inputs):
    """Returns params and state of the layer."""
    layer, options = KINDS[case.kind].layer, case.options
    params = state = None
    if options.get("affine", options.get("elementwise_affine")):
        bias = options.get("bias", layer != "RMSNorm")
        params = jaxbn.BatchNormParams(jnp.asarray(inputs.weight), jnp.asarray(inputs.bias) if bias else None)
    if options.get("track_running_stats"):
        _, state = jaxbn.batch_norm_init(inputs.weight.size)
    return params, state


def call(case, training, x, params, state):
    """Returns y and the new state of the layer."""
    layer, _, arguments, params_shape = KINDS[case.kind]
    last = tuple(range(-len(params_shape), 0))
    if layer == "GroupNorm":
        return jaxbn.group_norm(x, params, arguments[0], axis=1), None
    if layer == "LayerNorm":
        return jaxbn.layer_norm(x, params, axis=last), None
    if layer == "RMSNorm":
        eps = case.options["eps"]
        return jaxbn.rms_norm(x, params, axis=last, eps=float(jnp.finfo(x.dtype).eps) if eps is None else eps), None
    if training:
        return jaxbn.instance_norm_train(x, params, state, axis=1, momentum=case.options["momentum"])
    return jaxbn.instance_norm_eval(x, params, state, axis=1)


STEPS = {}


def step_of(case):
    """The compiled step of a case, which both tests call."""

    @functools.partial(jax.jit, static_argnames="training")
    def step(x, dy, params, state, *, training):
        y, pull, state = jax.vjp(lambda x, params: call(case, training, x, params, state), x, params, has_aux=True)
        return y, *pull(dy), state

    return STEPS.setdefault(str(case), step)


def record_jaxbn(case, inputs):
    """The same as `record`, from the functions."""
    step = step_of(case)
    params, state = initial(case, inputs)
    rows = []
    for k, (x, dy) in enumerate(zip(inputs.x, inputs.dy, strict=True)):
        y, dx, dparams, state = step(x, dy, params, state, training=k < TRAINING_STEPS)
        row = {"y": y, "dx": dx}
        if dparams:
            row["dweight"] = dparams.scale
            if dparams.bias is not None:
                row["dbias"] = dparams.bias
        if state:
            row |= {"running_mean": state.mean, "running_var": state.var}
        rows.append(row)
    return jax.tree.map(lambda *values: np.stack(values), *rows)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_on_record(golden, case):
    inputs, expected = read(golden, case)
    assert_near(record_jaxbn(case, inputs), expected, UNITS, least=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_of_installed_torch(case):
    pytest.importorskip("torch")
    inputs = make_inputs(case.kind)
    assert_near(record_jaxbn(case, inputs), record(case, inputs), UNITS, least=0)
