"""What tests of `jaxbn.fold` have in common: networks, and how they are compared without their norms."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn.linen
from jaxbn.fold import apply_folded

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 6, 3)), jnp.float32)
EPS32 = float(np.finfo(np.float32).eps)


def shaken(tree):
    """A tree of variables as if after training, from one of shapes: no two channels alike."""
    rng = np.random.default_rng(1)

    def shake(path, v):
        positive = any(name in jax.tree_util.keystr(path) for name in ("var", "scale"))
        values = rng.uniform(0.5, 1.5, v.shape) if positive else rng.normal(0, 0.3, v.shape)
        return jnp.asarray(values, v.dtype)

    return jax.tree_util.tree_map_with_path(shake, tree)


def assert_near(actual, expected, ulps=200, eps=EPS32):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    actual, expected = (np.asarray(v).astype(np.float64) for v in (actual, expected))
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= ulps * eps, f"{error / eps:.1f} eps"


def message_of(call):
    with pytest.raises(ValueError, match=": expected ") as error:
        call()
    return str(error.value)


def init(model, x=X):
    return shaken(jax.eval_shape(model.init, jax.random.key(0), x))


def apply(model, variables, x=X):
    return jax.jit(model.apply)(variables, x)


def apply_without(model, pairs, variables, x=X):
    return jax.jit(functools.partial(apply_folded, model, pairs))(variables, x)


class Block(nn.Module):
    """The usual residual block; its norm is a partial of a module class, as in Flax's ImageNet example."""

    conv: Any
    norm: Any
    width: int

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (3, 3), 2)(x)))
        y = self.norm(scale_init=nn.initializers.zeros_init())(self.conv(self.width, (3, 3))(y))
        x = self.norm(name="norm_proj")(self.conv(self.width, (1, 1), 2, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    norm: Any = nn.BatchNorm
    use_bias: bool = False

    @nn.compact
    def __call__(self, x, train: bool = False):
        conv = functools.partial(nn.Conv, use_bias=self.use_bias)
        norm = functools.partial(self.norm, use_running_average=not train, epsilon=1e-3)
        x = nn.relu(norm()(conv(4, (3, 3))(x)))
        for width in (6, 8):
            x = Block(conv, norm, width)(x)
        return nn.Dense(5)(x.mean((1, 2)))


PAIRS = {
    "BatchNorm_0": "Conv_0",
    **{f"Block_{i}/BatchNorm_{j}": f"Block_{i}/Conv_{j}" for i in range(2) for j in range(2)},
    **{f"Block_{i}/norm_proj": f"Block_{i}/conv_proj" for i in range(2)},
}


class Centred(nn.Conv):
    """Does something else with its kernel."""

    def param(self, name, *rest):
        value = super().param(name, *rest)
        return value - value.mean() if name == "kernel" else value


class Clip(nn.BatchNorm):
    """Does something else after it has normalized."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x).clip(-1, 1)


class ClipConv(nn.Conv):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x).clip(-1, 1)


class Odd(nn.Module):
    """A choice of what is next to a norm."""

    case: str

    @nn.compact
    def __call__(self, x, train: bool = False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, name="norm")
        conv = functools.partial(nn.Conv, name="conv")
        match self.case:
            case "two users":
                x = conv(4, (3, 3))(x)
                return norm()(x) + x
            case "returned too":
                x = conv(4, (3, 3))(x)
                return norm()(x), x
            case "two users of the norm":
                x = norm()(x)
                return nn.Dense(3, name="conv")(x) + x
            case "two layers":
                x = norm()(x)
                return conv(4, (1, 1))(x) + nn.Dense(4)(x)
            case "reshaped between":
                return norm()(conv(4, (3, 3))(x).reshape(4, -1, 4))
            case "relu between":
                return norm()(nn.relu(conv(4, (3, 3))(x)))
            case "before dense":
                return nn.Dense(4, name="conv", use_bias=False)(norm()(x))
            case "before valid":
                return conv(6, (3, 3), feature_group_count=3, padding="VALID")(norm()(x))
            case "before same":
                return conv(4, (3, 3))(norm()(x))
            case "masked":
                return conv(4, (1, 1), mask=jnp.ones((1, 1, 3, 4)))(norm()(x))
            case "both sides":
                x = conv(4, (1, 1), use_bias=False)(norm()(x))
                return nn.BatchNorm(use_running_average=not train)(x)
            case "shared conv":
                shared = conv(3, (3, 3))
                return norm()(shared(nn.BatchNorm(use_running_average=not train)(shared(x))))
            case "shared pair":
                shared, shared_norm = conv(3, (3, 3)), norm()
                for _ in range(2):
                    x = nn.relu(shared_norm(shared(x)))
                return x
            case "channels first":
                return norm(axis=1)(conv(6, (3, 3))(x))
            case "several domains":
                return jaxbn.linen.BatchNorm(use_running_average=True, num_domains=2, name="norm")(
                    conv(4, (3, 3))(x), domain=1
                )
            case "float32 after bfloat16":
                return norm()(conv(4, (3, 3), dtype=jnp.bfloat16)(x))
            case "bfloat16":
                return norm(dtype=jnp.bfloat16)(conv(4, (3, 3), dtype=jnp.bfloat16)(x))
            case "derived":
                return norm()(Centred(4, (3, 3), name="conv")(x))
            case "clipped":
                return Clip(use_running_average=True, name="norm")(conv(4, (3, 3))(x))
            case "clipped conv":
                return norm()(ClipConv(4, (3, 3), name="conv")(x))
            case "transposed":
                return norm()(nn.ConvTranspose(4, (3, 3), (2, 2), transpose_kernel=True, name="conv")(x))
            case "boxed":
                init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None, None, "model"))
                return norm()(conv(4, (3, 3), kernel_init=init, use_bias=False)(x))
            case "no affine":
                return norm(use_scale=False, use_bias=False)(conv(4, (3, 3))(x))


NORM = {"norm": "conv"}
