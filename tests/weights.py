"""What the tests of `interop` share: a small network with its weights, and convolutions by their definition."""

import functools
import json
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn.linen
import jaxbn.nnx


def draw(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype), name
        assert actual[name].tobytes() == value.tobytes(), name


def write_safetensors(path, entries):
    """Entries are (dtype, shape, bytes), by name. Eight bytes for the length of the header, the header, the arrays."""
    header, data = {}, b""
    for name, (dtype, shape, array) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(array)]}
        data += array
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def shapes_of(module, *inputs):
    return jax.eval_shape(functools.partial(module.init, jax.random.key(0)), *inputs)


class Small(nn.Module):
    momentum: float | None = 0.9

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(2, (1, 1), name="conv")(x)
        x = jaxbn.linen.BatchNorm(False, momentum=self.momentum, name="bn")(x)
        return nn.Dense(3, name="head")(x)


class SmallNNX(nnx.Module):
    def __init__(self, momentum=0.9):
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(4, 2, (1, 1), rngs=rngs)
        self.bn = jaxbn.nnx.BatchNorm(2, momentum=momentum, rngs=rngs)
        self.head = nnx.Linear(2, 3, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@functools.cache
def small_shapes(momentum=0.9):
    return shapes_of(Small(momentum), jnp.zeros((2, 3, 3, 4)))


def small_weights():
    weights = {
        "conv.weight": draw(2, 4, 1, 1),
        "conv.bias": draw(2),
        "head.weight": draw(3, 2),
        "head.bias": draw(3),
    }
    weights |= {f"bn.{name}": draw(2) for name in ("weight", "bias", "running_mean", "running_var")}
    return {**weights, "bn.num_batches_tracked": np.array(17)}


def small_linen(momentum=0.9):
    return jax.tree.map(lambda v: jnp.ones(v.shape, v.dtype), small_shapes(momentum))


def leaves(target):
    """Copies of all arrays."""
    tree = (
        nnx.to_pure_dict(nnx.state(target, nnx.Any(nnx.Param, nnx.BatchStat)))
        if isinstance(target, nnx.Module)
        else target
    )
    return {jax.tree_util.keystr(path): np.array(v) for path, v in jax.tree.leaves_with_path(tree)}


def windows(x, offset, sizes, stride, dilation):
    """The values of x [N, C, ...] that one place of the window meets."""
    steps = (
        slice(o * dilation, o * dilation + (n - 1) * stride + 1, stride) for o, n in zip(offset, sizes, strict=True)
    )
    return x[(slice(None), slice(None), *steps)]


def torch_conv(x, weight, groups=1, stride=1, padding=0, dilation=1):
    """torch.nn.functional.conv*d: weight [out, in / groups, *window]."""
    window = weight.shape[2:]
    x = np.pad(x, ((0, 0), (0, 0), *((padding, padding) for _ in window)))
    sizes = [(n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(x.shape[2:], window, strict=True)]
    outs, ins = len(weight) // groups, weight.shape[1]
    y = np.zeros((len(x), len(weight), *sizes))
    for offset in np.ndindex(window):
        part = windows(x, offset, sizes, stride, dilation)
        for g in range(groups):
            own = slice(g * outs, (g + 1) * outs)
            y[:, own] += np.einsum(
                "ni...,oi->no...", part[:, g * ins : (g + 1) * ins], weight[(own, slice(None), *offset)]
            )
    return y


def torch_conv_transpose(x, weight, stride=1, padding=0, output_padding=0, dilation=1):
    """torch.nn.functional.conv_transpose*d: weight [in, out, *window]."""
    window = weight.shape[2:]
    sizes = [
        (n - 1) * stride + dilation * (k - 1) + 1 + output_padding for n, k in zip(x.shape[2:], window, strict=True)
    ]
    y = np.zeros((len(x), weight.shape[1], *sizes))
    for offset in np.ndindex(window):
        part = windows(y, offset, x.shape[2:], stride, dilation)
        part += np.einsum("ni...,io->no...", x, weight[(slice(None), slice(None), *offset)])
    return y[(slice(None), slice(None), *(slice(padding, n - padding) for n in sizes))]
