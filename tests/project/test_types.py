"""A user's file, as mypy sees it: types of results follow from the arguments, and documented options are allowed."""

import pathlib
import re
import subprocess
import sys

import pytest

pytest.importorskip("mypy")

USER = """
from typing import assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

params, state = jaxbn.batch_norm_init(3)
x = jnp.ones((4, 3))
y, state = jaxbn.batch_norm_train(x, params, state, dtype="bfloat16", axis=(-1,))
assert_type(y, jax.Array)
assert_type(state, jaxbn.BatchNormState)
assert_type(state.mean, jax.Array)
assert_type(params.scale, jax.Array)
mean: jax.Array = state.mean
scale: jax.Array = params.scale + 1
params = jaxbn.AffineParams(params.scale * 2, params.bias)
y, state = jaxbn.batch_renorm_train(x, params, state, r_max=3.0, d_max=5.0)
y, state = jaxbn.instance_norm_train(x, params, state)
y, state = jaxbn.batch_norm_eval(x, params, state, mask=np.ones(4, bool))
state = jaxbn.sync_state(state, ("data", "model"))
y, none = jaxbn.batch_norm_train(x, params, None)
assert_type(none, None)
y, none = jaxbn.instance_norm_eval(np.ones((4, 3, 2)), None, None)
affine = jaxbn.affine_init(3)
total: jax.Array = affine.scale.sum() + affine.bias.sum()
without_bias = jaxbn.affine_init(3, bias=False)
assert_type(without_bias.scale, jax.Array)
y = jaxbn.rms_norm(x, without_bias)
pairs = [(np.ones((2, 3)), "label")]
measured = jaxbn.data_moments(pairs, select=lambda batch: batch[0], mask=lambda batch: batch[0][:, 0] > 0)
assert_type(measured, jaxbn.Moments)


def build(affine: bool, tracked: bool) -> tuple[jaxbn.AffineParams | None, jaxbn.BatchNormState | None]:
    return jaxbn.batch_norm_init(3, affine=affine, track_running_stats=tracked)


def apply(params: jaxbn.BatchNormParams | None, state: jaxbn.BatchNormState | None) -> jax.Array:
    y, state = jaxbn.batch_norm_train(x, params, state)
    return y


unlearned, tracked = jaxbn.batch_norm_init(3, affine=False, param_dtype=jnp.float64)
learned, untracked = jaxbn.batch_norm_init((3, 2), track_running_stats=False)
assert_type(tracked, jaxbn.BatchNormState)
assert_type(untracked, None)
apply(unlearned, untracked)
apply(*build(True, False))
stacked = jax.vmap(lambda _: state)(jnp.arange(2))
y, new = jaxbn.batch_norm_train(x, params, jaxbn.take_domain(state, 1))
assert_type(jaxbn.put_domain(state, 1, new), jaxbn.BatchNormState)

layer = jaxbn.linen.BatchNorm(use_running_average=False, momentum=None, axis=(1, 2), axis_name=("data", "model"))
several = ("data", "model")
norms: list[nn.Module] = [
    jaxbn.linen.BatchNorm(virtual_batch_size=32, correction=1, num_domains=2, dtype=jnp.bfloat16),
    jaxbn.linen.BatchRenorm(limits=jaxbn.batch_renorm_limits, momentum=None),
    jaxbn.linen.BatchRenorm(limits=(3.0, 5.0), axis_name="data", axis_index_groups=[[0, 1], [2, 3]]),
    jaxbn.linen.LayerNorm(reduction_axes=(-2, -1), feature_axes=-1, axis_name=several),
    jaxbn.linen.RMSNorm(axis_name=several),
    jaxbn.linen.GroupNorm(num_groups=None, group_size=4, axis_name=several),
    jaxbn.linen.InstanceNorm(axis_name=several),
]
rngs = nnx.Rngs(0)
of_nnx = jaxbn.nnx.BatchNorm(3, momentum=None, axis=(-1,), axis_name=several, correction=1, rngs=rngs)
renorm = jaxbn.nnx.BatchRenorm(3, limits=(3.0, 5.0), use_running_average=True, param_dtype=jnp.bfloat16, rngs=rngs)
assert_type(of_nnx(x), jax.Array)
assert_type(jaxbn.nnx.replace_batch_norms(renorm, momentum=0.5), jaxbn.nnx.BatchRenorm)
"""
# What mypy must refuse.
MISTAKES = """
import jax.numpy as jnp
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

params, state = jaxbn.batch_norm_init(3)
jaxbn.batch_norm_train(jnp.ones((4, 3)), state, params)
jaxbn.batch_norm_train(jnp.ones((4, 3)), params, state, epsilon=1e-3)
jaxbn.linen.BatchNorm(momentum="0.9")
jaxbn.nnx.BatchNorm(3, moment=0.9)
jaxbn.nnx.replace_batch_norms(jaxbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0)), decay=0.9)
jaxbn.data_moments([{"image": jnp.ones((2, 3))}], select=lambda batch: batch.image)
"""


@pytest.mark.slow
def test_a_users_file(tmp_path):
    files = [tmp_path / "user.py", tmp_path / "mistakes.py"]
    for file, source in zip(files, (USER, MISTAKES), strict=True):
        file.write_text(source)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2])
    assert done.stderr == ""
    lines = re.findall(r"(\w+).py:(\d+): error: .*", done.stdout)
    assert set(lines) == {("mistakes", str(line)) for line in (10, 11, 12, 13, 14, 15)}, done.stdout
