"""What is no `AffineParams` or `BatchNormState`: the error of every function says how to make one."""

import functools

import flax.serialization
import jax.numpy as jnp
import pytest

import jaxbn
from jaxbn.fold import fold_batch_norm

X = jnp.arange(24.0).reshape(3, 2, 4)
PARAMS, STATE = jaxbn.batch_norm_init(4)
# As a checkpoint is restored without a target.
RESTORED = flax.serialization.msgpack_restore(flax.serialization.to_bytes((PARAMS, STATE)))


def batch_norm_update(x, params, state):
    return jaxbn.batch_norm_update(state, jaxbn.moments(x))


def fold(x, params, state):
    return fold_batch_norm(jnp.ones((2, 4)), None, params, state)


WITH_STATE = {
    "batch_norm_train": jaxbn.batch_norm_train,
    "batch_norm_eval": jaxbn.batch_norm_eval,
    "batch_renorm_train": functools.partial(jaxbn.batch_renorm_train, r_max=1.0, d_max=0.0),
    "instance_norm_train": jaxbn.instance_norm_train,
    "instance_norm_eval": jaxbn.instance_norm_eval,
    "fold_batch_norm": fold,
    "batch_norm_update": batch_norm_update,
}
WITHOUT_STATE = {
    "layer_norm": jaxbn.layer_norm,
    "rms_norm": jaxbn.rms_norm,
    "group_norm": functools.partial(jaxbn.group_norm, num_groups=2),
}
ARGUMENTS = "the arguments are x, params, state, as jaxbn.batch_norm_init returns them"
NO_STATE = "the arguments are x and params, which jaxbn.affine_init returns"


def message_of(call, *arguments):
    with pytest.raises(TypeError) as error:
        call(X, *arguments)
    return str(error.value)


@pytest.mark.parametrize("name", WITH_STATE)
@pytest.mark.parametrize(
    ("state", "kind", "cure"),
    [
        (RESTORED["1"], "dict", "make it of the dict that a checkpoint was restored to: jaxbn.BatchNormState(**state)"),
        (
            {name: RESTORED["1"][name] for name in ("mean", "var")},
            "dict",
            "make it of the dict that a checkpoint was restored to: jaxbn.BatchNormState(**state, "
            "num_batches_tracked=jnp.zeros((), jnp.int32))",
        ),
        (tuple(STATE), "tuple", "make it of these arrays: jaxbn.BatchNormState(*state)"),
        (list(STATE), "list", "make it of these arrays: jaxbn.BatchNormState(*state)"),
    ],
)
def test_state(name, state, kind, cure):
    or_none = "" if name in ("fold_batch_norm", "batch_norm_update") else " or None"
    expected = f"state: expected jaxbn.BatchNormState{or_none}, got {kind}; {cure}"
    assert message_of(WITH_STATE[name], PARAMS, state) == expected
    # The cure is one.
    made = eval(cure.partition("jaxbn.")[2].join(["jaxbn.", ""]), {"jaxbn": jaxbn, "jnp": jnp, "state": state})
    WITH_STATE[name](X, PARAMS, made)


@pytest.mark.parametrize("name", [*WITH_STATE, *WITHOUT_STATE])
def test_params(name):
    if name == "batch_norm_update":
        return
    call, more = (WITH_STATE[name], (STATE,)) if name in WITH_STATE else (WITHOUT_STATE[name], ())
    start = "params: expected jaxbn.AffineParams or None, got "
    assert message_of(call, RESTORED["0"], *more) == (
        f"{start}dict; make it of the dict that a checkpoint was restored to: jaxbn.AffineParams(**params)"
    )
    assert message_of(call, tuple(PARAMS), *more) == (
        f"{start}tuple; make it of these arrays: jaxbn.AffineParams(*params)"
    )
    cure = "params, state = jaxbn.interop.batch_norm_from_torch(state_dict) makes both of PyTorch's"
    if name in WITHOUT_STATE:
        cure = "make it of PyTorch's arrays: jaxbn.AffineParams(jnp.asarray(weight), jnp.asarray(bias))"
    assert message_of(call, {"weight": X[0, 0], "bias": X[0, 0]}, *more) == f"{start}dict; {cure}"
    cure = NO_STATE if name in WITHOUT_STATE else ARGUMENTS
    if name == "fold_batch_norm":
        cure = "the arguments are kernel, bias, params, state, the last two as jaxbn.batch_norm_init returns them"
    for wrong in ((PARAMS, STATE), STATE, {"kernel": X}, jnp.ones(4)):
        assert message_of(call, wrong, *more) == f"{start}{type(wrong).__name__}; {cure}"


@pytest.mark.parametrize("name", [name for name in WITH_STATE if name not in ("fold_batch_norm", "batch_norm_update")])
def test_what_is_like_no_state(name):
    for wrong in (PARAMS, RESTORED, {"mean": STATE.mean}, jnp.ones(4)):
        assert message_of(WITH_STATE[name], PARAMS, wrong) == (
            f"state: expected jaxbn.BatchNormState or None, got {type(wrong).__name__}; {ARGUMENTS}"
        )


def test_state_of_pytorch():
    entries = {"running_mean": STATE.mean, "running_var": STATE.var, "num_batches_tracked": 0}
    assert message_of(jaxbn.batch_norm_eval, PARAMS, entries) == (
        "state: expected jaxbn.BatchNormState or None, got dict; params, state = "
        "jaxbn.interop.batch_norm_from_torch(state_dict) makes both of PyTorch's"
    )


def test_x_for_the_number_of_features():
    with pytest.raises(TypeError) as error:
        jaxbn.batch_norm_init(X)
    assert str(error.value) == "num_features: expected an integer or a tuple of integers, got ArrayImpl"


@pytest.mark.parametrize("name", [*WITHOUT_STATE, "batch_norm_train"])
def test_axis_name_that_is_an_axis(name):
    call = WITHOUT_STATE.get(name, jaxbn.batch_norm_train)
    with pytest.raises(TypeError) as error:
        call(X, *(PARAMS, STATE)[: 1 if name in WITHOUT_STATE else 2], axis_name=1)
    assert str(error.value) == (
        "axis_name: expected the name of a mapped axis, or several, got int; axes of x, which have numbers, are named "
        "by axis=..."
    )
