"""torchvision's ResNets in Linen and in NNX, with jaxbn's BatchNorm and PyTorch's options; channels last.

These options are given, because Flax's defaults differ or could be mistaken: padding is a number (with
strides, "SAME" pads differently from PyTorch), epsilon is 1e-5, momentum is 0.9 (0.1 in PyTorch), and
correction is 1 (PyTorch's running variance is unbiased).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import FrozenDict

import jaxbn.linen
import jaxbn.nnx

NORM: FrozenDict[str, Any] = FrozenDict({"momentum": 0.9, "epsilon": 1e-5, "correction": 1})


def torch_name(path: str) -> str:
    """Returns PyTorch's name of a module of `LinenResNet`: "layer1_0/downsample_1" is layer1.0.downsample.1."""
    return re.sub(r"_(\d+)", r".\1", path).replace("/", ".")


def shapes(bottleneck: bool, width: int, stride: int) -> list[tuple[int, int, int]]:
    """Returns features, window and stride of each convolution of a block."""
    if bottleneck:
        return [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
    return [(width, 3, stride), (width, 3, 1)]


def stages(blocks: tuple[int, ...], widths: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Returns for each block its stage, its index within the stage, its width and its stride."""
    return [
        (stage, i, width, 2 if stage > 1 and i == 0 else 1)
        for stage, (number, width) in enumerate(zip(blocks, widths, strict=True), 1)
        for i in range(number)
    ]


class LinenBlock(nn.Module):
    bottleneck: bool
    width: int
    stride: int
    norm: Mapping[str, Any]
    same_padding: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(jaxbn.linen.BatchNorm, use_running_average=not train, **self.norm)
        convs = shapes(self.bottleneck, self.width, self.stride)
        y = x
        for i, (features, window, stride) in enumerate(convs, 1):
            padding = "SAME" if self.same_padding else window // 2
            conv = nn.Conv(features, (window, window), stride, padding=padding, use_bias=False, name=f"conv{i}")
            y = norm(name=f"bn{i}")(conv(y))
            if i < len(convs):
                y = nn.relu(y)
        if x.shape != y.shape:
            x = nn.Conv(y.shape[-1], (1, 1), self.stride, padding=0, use_bias=False, name="downsample_0")(x)
            x = norm(name="downsample_1")(x)
        return nn.relu(x + y)


class LinenResNet(nn.Module):
    bottleneck: bool
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    # Fields only so that port_from_torch.py can show the effect of wrong values.
    norm: Mapping[str, Any] = NORM
    same_padding: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        padding = "SAME" if self.same_padding else 3
        x = nn.Conv(self.widths[0], (7, 7), 2, padding=padding, use_bias=False, name="conv1")(x)
        x = nn.relu(jaxbn.linen.BatchNorm(use_running_average=not train, name="bn1", **self.norm)(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, i, width, stride in stages(self.blocks, self.widths):
            block = LinenBlock(self.bottleneck, width, stride, self.norm, self.same_padding, name=f"layer{stage}_{i}")
            x = block(x, train=train)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


class NNXBlock(nnx.Module):
    def __init__(self, bottleneck: bool, features: int, width: int, stride: int, rngs: nnx.Rngs):
        start, convs = features, shapes(bottleneck, width, stride)
        for i, (out, window, strides) in enumerate(convs, 1):
            conv = nnx.Conv(features, out, (window, window), strides, padding=window // 2, use_bias=False, rngs=rngs)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", jaxbn.nnx.BatchNorm(out, rngs=rngs, **NORM))
            features = out
        self.number = len(convs)
        downsample = []
        if start != features or stride != 1:
            conv = nnx.Conv(start, features, (1, 1), stride, padding=0, use_bias=False, rngs=rngs)
            downsample = [conv, jaxbn.nnx.BatchNorm(features, rngs=rngs, **NORM)]
        self.downsample = nnx.List(downsample)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for i in range(1, self.number + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.number:
                y = nnx.relu(y)
        for layer in self.downsample:
            x = layer(x)
        return nnx.relu(x + y)


class NNXResNet(nnx.Module):
    """The attributes have torchvision's names, so that paths are PyTorch's names."""

    def __init__(
        self, bottleneck: bool, blocks: tuple[int, ...], widths: tuple[int, ...], classes: int, rngs: nnx.Rngs
    ):
        features = widths[0]
        self.conv1 = nnx.Conv(3, features, (7, 7), 2, padding=3, use_bias=False, rngs=rngs)
        self.bn1 = jaxbn.nnx.BatchNorm(features, rngs=rngs, **NORM)
        self.number = len(blocks)
        layers: dict[int, Any] = {stage: [] for stage in range(1, self.number + 1)}
        for stage, _, width, stride in stages(blocks, widths):
            layers[stage].append(NNXBlock(bottleneck, features, width, stride, rngs))
            features = 4 * width if bottleneck else width
        for stage, modules in layers.items():
            setattr(self, f"layer{stage}", nnx.List(modules))
        self.fc = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x)))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage in range(1, self.number + 1):
            for block in getattr(self, f"layer{stage}"):
                x = block(x)
        return self.fc(x.mean((1, 2)))
