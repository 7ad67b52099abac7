"""The layout of each leaf: what `kinds`, the module's class and the module's other leaves show of it."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbn._paths import join, split
from jaxbn.interop._formats import AS_IS, FLAT, TORCH, Layout, Shape, WeightFormat, linear
from jaxbn.interop._targets import Target

PROJECTIONS = ("query", "key", "value")
_ATTENTION_AXES = 3


class Layers:
    """The leaves of a target with all that is known of their layouts in another library."""

    def __init__(self, target: Target, kinds: Mapping[str, str] | None, weight_format: WeightFormat) -> None:
        self.leaves, self.kernels = target.leaves, target.kernels
        self.kinds, self.weight_format = kinds or {}, weight_format

    def layout(self, path: str, depth: int) -> Layout:
        """The layout of a leaf behind `depth` axes of stacked layers; ValueError if `kinds` has one for other axes."""
        name, axes = self.given_layout(path), self.leaves[path].ndim - depth
        if name is None:
            return self.own_layout(path, depth)
        layout = self.weight_format.layouts[name]
        if not layout.has_axes(axes):
            raise ValueError(f"expected kinds to have {self._fitting(axes)} for {axes} axes, got {name!r}")
        return layout

    def given_layout(self, path: str) -> str | None:
        """The layout that `kinds` has for a leaf, if it can be right."""
        module, leaf_name = split(path)
        name = self.kinds.get(path, self.kinds.get(module) if leaf_name == "kernel" else None)
        return name if name is not None and self._can_be(name, self.leaves[path].ndim) else None

    def own_layout(self, path: str, depth: int) -> Layout:
        """The layout of a leaf without `kinds`."""
        module, leaf_name = split(path)
        axes, layouts = self.leaves[path].ndim - depth, self.weight_format.layouts
        known = self.kernels.get(module) if leaf_name == "kernel" else None
        if known is not None and known.layout == "conv_transpose":
            return layouts["conv_transpose"]
        if self.weight_format is not TORCH:
            return AS_IS
        outputs = self._outputs(module, depth)
        if leaf_name == "bias" and outputs > 1 and self.given_layout(join(module, "kernel")) != "as_is":
            return FLAT
        if leaf_name != "kernel":
            return FLAT if leaf_name == "negative_slope" and axes == 0 else AS_IS
        if known is not None:
            return linear(known.inputs) if known.layout == "linear" else layouts[known.layout]
        if axes == _ATTENTION_AXES and (role := self.role(path)):
            return layouts["to_heads" if role in PROJECTIONS else "from_heads"]
        if outputs > 1:
            return linear(axes - outputs)
        return AS_IS if axes < 2 else layouts["dense" if axes == 2 else "conv"]

    def role(self, path: str) -> str:
        """Which projection of attention a leaf belongs to, or ""."""
        attention, role = split(split(path)[0])
        return role if role in (*PROJECTIONS, "out") and self.attention(attention) is not None else ""

    def attention(self, module: str) -> str | None:
        """The name of the query's weight in torch.nn.MultiheadAttention, or "" if it has no weights of these shapes.

        None if the module has not the kernels of attention, [in, heads, head_dim] and [heads, head_dim, out].
        """
        kernels = (self.leaves.get(join(module, name, "kernel")) for name in (*PROJECTIONS, "out"))
        shapes = [kernel.shape for kernel in kernels if kernel is not None]
        if len(shapes) < 4 or len({len(shape) for shape in shapes}) > 1 or len(shapes[0]) < _ATTENTION_AXES:
            return None
        query, key, value, out = shapes
        if out[-3:-1] != query[-2:] or key[-2:] != value[-2:] or key[-1] != query[-1]:
            return None
        width = query[-1] * query[-2]
        if not query[-3] == width == out[-1] or key[-2] != query[-2]:
            return ""
        return "in_proj_weight" if key[-3] == value[-3] == width else "q_proj_weight"

    def depths(self, path: str) -> list[int]:
        """How many of the first axes of a kernel can be stacked layers; empty if nothing shows it."""
        module, _ = split(path)
        kernel, bias = self.leaves[path], self.leaves.get(join(module, "bias"))
        if module in self.kernels:
            return [kernel.ndim - self.kernels[module].axes]
        if self.role(path):
            return [kernel.ndim - _ATTENTION_AXES]
        return [] if bias is None else [d for d in range(bias.ndim) if _is_linear(kernel.shape, bias.shape, d)]

    def errors(self) -> list[str]:
        """What is wrong with `kinds`."""
        errors = []
        for key, name in self.kinds.items():
            leaf = self.leaves.get(key, self.leaves.get(join(key, "kernel")))
            if leaf is None:
                errors.append(f"kinds: expected the path of a leaf or of a module that has a kernel, got {key!r}")
            elif not self._can_be(name, leaf.ndim):
                fitting = self._fitting(leaf.ndim)
                errors.append(f"kinds: expected {fitting} for {key!r} with {leaf.ndim} axes, got {name!r}")
        return errors

    def _can_be(self, name: str, axes: int) -> bool:
        """Whether there is such a layout of a leaf with so many axes, some of which may be stacked layers."""
        layout = self.weight_format.layouts.get(name)
        return layout is not None and layout.least_axes <= axes

    def _fitting(self, axes: int) -> str:
        return " or ".join(name for name, layout in self.weight_format.layouts.items() if layout.has_axes(axes))

    def _outputs(self, module: str, depth: int) -> int:
        """How many axes of outputs the bias of a module shows."""
        kernel, bias = (self.leaves.get(join(module, name)) for name in ("kernel", "bias"))
        if kernel is None or bias is None or not _is_linear(kernel.shape, bias.shape, depth):
            return 1
        return bias.ndim - depth


def _is_linear(kernel: Shape, bias: Shape, depth: int) -> bool:
    """Whether a kernel ends with the axes of its bias, behind `depth` axes that both begin with."""
    outputs = bias[depth:]
    return bool(outputs) and kernel[:depth] == bias[:depth] and kernel[depth + 1 :][-len(outputs) :] == outputs
