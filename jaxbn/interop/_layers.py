"""The layout of each leaf: what `kinds`, the module's class and the module's other leaves show of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxbn.interop._formats import FLAT, TORCH, Layout, WeightFormat, linear
from jaxbn.interop._targets import Target

PROJECTIONS = ("query", "key", "value")


class Layers(NamedTuple):
    """The leaves of a target with all that is known of their layouts.

    Attributes:
      attention: for each module of attention, the end of the name under which torch.nn.MultiheadAttention has
        the query's weight, or "" if it has no weights of these shapes.
    """

    target: Target
    kinds: Mapping[str, str]
    weight_format: WeightFormat
    attention: Mapping[str, str]

    def kind(self, path: str) -> str | None:
        """What `kinds` has for a leaf, if it can be right."""
        module, _, leaf_name = path.rpartition("/")
        kind = self.kinds.get(path, self.kinds.get(module) if leaf_name == "kernel" else None)
        return kind if kind is not None and self.can_be(kind, self.target.leaves[path].ndim) else None

    def can_be(self, kind: str, axes: int) -> bool:
        """Whether there is such a layout of a leaf with so many axes, some of which may be stacked layers."""
        layout = self.weight_format.layouts.get(kind)
        return layout is not None and layout.least_axes <= axes

    def layout(self, path: str, depth: int) -> Layout:
        """The layout of a leaf whose first `depth` axes are stacked layers.

        Raises:
          ValueError: `kinds` has a layout for another number of axes.
        """
        kind, axes = self.kind(path), self.target.leaves[path].ndim - depth
        if kind is None:
            return self.own_layout(path, depth)
        layout = self.weight_format.layouts[kind]
        if not layout.has_axes(axes):
            raise ValueError(f"expected kinds to have {self.fitting(axes)} for {axes} axes, got {kind!r}")
        return layout

    def own_layout(self, path: str, depth: int) -> Layout:
        """The layout of a leaf without `kinds`."""
        module, slash, leaf_name = path.rpartition("/")
        axes = self.target.leaves[path].ndim - depth
        layouts = self.weight_format.layouts
        default = layouts[self.weight_format.default_kind(leaf_name, axes)]
        known = self.target.kernels.get(module)
        if leaf_name == "kernel" and known is not None and known.kind == "conv_transpose":
            return layouts["conv_transpose"]
        if self.weight_format is not TORCH:
            return default
        if leaf_name == "negative_slope" and axes == 0:
            return FLAT
        outputs = self._outputs(module, depth)
        if leaf_name == "bias" and outputs > 1 and self.kind(f"{module}{slash}kernel") != "as_is":
            return FLAT
        if leaf_name != "kernel":
            return default
        if known is not None:
            return linear(known.inputs) if known.kind == "linear" else layouts[known.kind]
        if axes == _ATTENTION_AXES and (role := self.role(path)):
            return layouts["to_heads" if role in PROJECTIONS else "from_heads"]
        return linear(axes - outputs) if outputs > 1 else default

    def role(self, path: str) -> str:
        """Which projection of attention a leaf belongs to, or ""."""
        attention, role, _ = _parents(path)
        return role if attention in self.attention and role in (*PROJECTIONS, "out") else ""

    def depths(self, path: str) -> list[int]:
        """How many of the first axes of a kernel can be stacked layers; empty if nothing shows it."""
        module, slash, _ = path.rpartition("/")
        kernel, bias = self.target.leaves[path], self.target.leaves.get(f"{module}{slash}bias")
        if module in self.target.kernels:
            return [kernel.ndim - self.target.kernels[module].axes]
        if self.role(path):
            return [kernel.ndim - _ATTENTION_AXES]
        return [] if bias is None else [d for d in range(bias.ndim) if _is_linear(kernel.shape, bias.shape, d)]

    def _outputs(self, module: str, depth: int) -> int:
        """How many axes of outputs the bias of a module shows."""
        kernel, bias = (self.target.leaves.get(f"{module}/{name}".lstrip("/")) for name in ("kernel", "bias"))
        if kernel is None or bias is None or not _is_linear(kernel.shape, bias.shape, depth):
            return 1
        return int(bias.ndim) - depth

    def fitting(self, axes: int) -> str:
        return " or ".join(kind for kind, layout in self.weight_format.layouts.items() if layout.has_axes(axes))


_ATTENTION_AXES = 3


def make_layers(target: Target, kinds: Mapping[str, str] | None, weight_format: WeightFormat) -> Layers:
    return Layers(target, kinds or {}, weight_format, _find_attention(target.leaves))


def kind_errors(layers: Layers) -> list[str]:
    errors = []
    leaves = layers.target.leaves
    for key, kind in layers.kinds.items():
        leaf = leaves.get(key, leaves.get(f"{key}/kernel" if key else "kernel"))
        if leaf is None:
            errors.append(f"kinds: expected the path of a leaf or of a module that has a kernel, got {key!r}")
        elif not layers.can_be(kind, leaf.ndim):
            errors.append(
                f"kinds: expected {layers.fitting(leaf.ndim)} for {key!r} with {leaf.ndim} axes, got {kind!r}"
            )
    return errors


def _is_linear(kernel: tuple[int, ...], bias: tuple[int, ...], depth: int) -> bool:
    """Whether a kernel ends with the axes of its bias, behind `depth` axes that both begin with."""
    outputs = bias[depth:]
    return bool(outputs) and kernel[:depth] == bias[:depth] and kernel[depth + 1 :][-len(outputs) :] == outputs


def _parents(path: str) -> tuple[str, str, str]:
    """The paths of the module around a leaf's module, and the names of the leaf's module and of the leaf."""
    module, _, leaf_name = path.rpartition("/")
    outer, _, role = module.rpartition("/")
    return outer, role, leaf_name


def _find_attention(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The modules with the kernels [in, heads, head_dim] and [heads, head_dim, out] of Flax's attention."""
    found = {}
    for path in leaves:
        outer, role, leaf_name = _parents(path)
        if (role, leaf_name) != ("query", "kernel"):
            continue
        kernels = [leaves.get(f"{outer}/{name}/kernel".lstrip("/")) for name in (*PROJECTIONS, "out")]
        if any(kernel is None or kernel.ndim != leaves[path].ndim for kernel in kernels) or leaves[path].ndim < 3:
            continue
        query, key, value, out = (kernel.shape for kernel in kernels if kernel is not None)
        if out[-3:-1] != query[-2:] or key[-2:] != value[-2:] or key[-1] != query[-1]:
            continue
        width = query[-1] * query[-2]
        if not query[-3] == width == out[-1] or key[-2] != query[-2]:
            found[outer] = ""
        else:
            found[outer] = "in_proj_weight" if key[-3] == value[-3] == width else "q_proj_weight"
    return found
