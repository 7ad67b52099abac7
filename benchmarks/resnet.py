"""ResNets in Flax Linen, channels last, which take their norm as an argument: `resnet18` and `resnet50`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Norm = Callable[..., nn.Module]


class BasicBlock(nn.Module):
    filters: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Norm
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(x)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(self.filters, (3, 3))(y))
        return nn.relu(_shortcut(self, x, y) + y)


class Bottleneck(nn.Module):
    filters: int
    strides: int
    conv: Callable[..., nn.Module]
    norm: Norm
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm()(self.conv(self.filters, (1, 1))(x)))
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), self.strides)(y)))
        y = self.norm(scale_init=nn.initializers.zeros)(self.conv(self.filters * self.expansion, (1, 1))(y))
        return nn.relu(_shortcut(self, x, y) + y)


def _shortcut(block: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    if x.shape == y.shape:
        return x
    return block.norm()(block.conv(y.shape[-1], (1, 1), block.strides)(x))


class ResNet(nn.Module):
    """Calls `norm(use_running_average=..., dtype=...)` for each norm, with `scale_init` for the last of each block."""

    stage_sizes: tuple[int, ...]
    block: type[nn.Module]
    norm: Norm
    num_filters: int = 64
    num_classes: int = 1000
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal())
        norm = functools.partial(self.norm, use_running_average=not train, dtype=self.dtype)
        x = nn.relu(norm()(conv(self.num_filters, (7, 7), 2)(x.astype(self.dtype))))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, size in enumerate(self.stage_sizes):
            for index in range(size):
                strides = 2 if stage > 0 and index == 0 else 1
                x = self.block(self.num_filters * 2**stage, strides, conv, norm)(x)
        return nn.Dense(self.num_classes, dtype=self.dtype)(x.mean((1, 2))).astype(jnp.float32)


def resnet18(norm: Norm, num_classes: int = 1000, dtype: Any = jnp.float32) -> ResNet:
    return ResNet((2, 2, 2, 2), BasicBlock, norm, num_classes=num_classes, dtype=dtype)


def resnet50(norm: Norm, num_classes: int = 1000, dtype: Any = jnp.float32) -> ResNet:
    return ResNet((3, 4, 6, 3), Bottleneck, norm, num_classes=num_classes, dtype=dtype)
