"""What to do about names and shapes that do not fit. Nothing is advised that would load another function."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence

from jaxbn._messages import few
from jaxbn._paths import join, split
from jaxbn.interop._formats import COUNTER, TORCH, Shape, WeightFormat
from jaxbn.interop._layers import Layers
from jaxbn.interop._matching import Found, Names, contains, find, make_plan
from jaxbn.interop._source import Entries

# An error lists so many names one by one.
_MOST_LINES = 10
_MOST_PREFIXES = 5

# What names of PyTorch that belong to no leaf are. The first that is found in a name says it.
_STRAY_NAMES = {
    r"(^|\.)bias_[kv]$": "an extra key or value (add_bias_kv=True), which Flax's attention does not have",
    r"fake_quant|activation_post_process|observer": "of quantization-aware training, whose rounding the target does "
    "not do",
    r"_packed_params|(^|[._])zero_point(_\d+)?$|\.(qweight|qzeros|SCB|absmax|quant_map)$": "of a quantized layer; load "
    "the checkpoint of the float model",
    r"(^|\.)parametrizations\.|(^|\.)weight\w*_(orig|mask|[guv])$": "of a weight that is computed from several "
    "entries, not all of which are known; save the checkpoint after "
    "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove",
    r"(^|\.)(weight|bias)_([ih]h|hr)(_l\d+(_reverse)?)?$": "of a recurrent layer, which has no counterpart of "
    "this layout",
    r"\.lora_[AB]\b": "of an adapter; merge it into the weights first (peft: merge_and_unload)",
}
# When a kernel has a layout that neither its axes nor its class show.
_IF = {
    "as_is": "its axes are in Flax's order",
    "conv_transpose": "the layer is a ConvTranspose with transpose_kernel=False",
    "depthwise": "the layer is a depthwise convolution",
}


def cure(names: Names | None, found: Found, shape: Shape) -> str:
    """What to do about the shape of an entry, if the layer shows what is right."""
    path, layers, leaf = found.plan.path, found.plan.layers, found.leaf_shape
    module, leaf_name = split(path)
    expected = found.expected(shape) or ()
    if layers.given_layout(path) is not None and layers.own_layout(path, found.depth).fits(shape, leaf):
        return f"; leave {path if path in layers.kinds else module!r} out of kinds"
    if leaf_name == "kernel":
        has_class = module in layers.kernels
        for name, reason in _IF.items():
            layout = layers.weight_format.layouts.get(name)
            if layout is None or (has_class and name != "as_is"):
                continue
            if layout.has_axes(len(leaf)) and layout.fits(shape, leaf):
                return f"; pass kinds={{{module!r}: {name!r}}} if {reason}"
        # Where the layout is not that of a linear layer already.
        if len(shape) == 2 < len(expected) and layers.weight_format is TORCH and not has_class:
            return (
                "; for a DenseGeneral, kinds needs 'to_heads' if the kernel is [in, heads, head_dim], "
                "'from_heads' if it is [heads, head_dim, out]"
            )
    is_head = leaf_name in ("kernel", "embedding") and module and not found.depth and not layers.role(path)
    if is_head and len(shape) == len(expected) > 1:
        outputs = 0 if layers.weight_format is TORCH or leaf_name == "embedding" else len(shape) - 1
        if all(size == expected[axis] for axis, size in enumerate(shape) if axis != outputs):
            return f"; if the layer is trained anew, {_keep(found, module, names)}"
    return ""


def _keep(found: Found, module: str, names: Names | None) -> str:
    layers, separator = found.plan.layers, found.plan.layers.weight_format.separator
    inside = found.name.rpartition(separator)[0] + separator
    without = f"source without the names that begin with {inside!r}"
    if callable(names):
        return f"return None from names for {module!r} and pass {without}"
    if not names:
        return f"pass names={{{module!r}: None}} to keep the target's values"
    kept = make_plan(layers, found.plan.path, {**names, module: None})
    rest = "" if found.name in kept.candidates else f" and {without}"
    return f"pass names={{**names, {module!r}: None}}{rest} to keep the target's values"


def left_over(names: Sequence[str], used: Collection[str], entries: Entries) -> list[str]:
    """The errors about names that belong to no leaf."""
    lines = [f"{name}: expected a leaf of the target to take it, got none{_what(name, entries)}" for name in names]
    more = len(lines) - _MOST_LINES
    if more > 0:
        rest = f"{more} more names without one{_filter(names, used, entries.weight_format.separator)}"
        lines[_MOST_LINES:] = [f"source: expected a leaf of the target for each name, got {rest}"]
    return lines


def missing(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST_LINES
    if more > 0:
        rest = f"target: expected an entry of the source for each leaf, got {more} more without one"
        return [*lines[:_MOST_LINES], rest]
    return lines


def _what(name: str, entries: Entries) -> str:
    scale = re.sub(r"scale(_\d+)?$", r"zero_point\1", name)
    name = scale if scale in entries.source else name
    return next((f"; it is {what}" for pattern, what in _STRAY_NAMES.items() if re.search(pattern, name)), "")


def _filter(names: Sequence[str], used: Collection[str], separator: str) -> str:
    """An expression that removes names from the source, and none that are used."""
    starts = {_shortest(name, used, separator) for name in names}
    ends = {separator + name.rpartition(separator)[2] for name in names}
    for test, parts in ((str.startswith, tuple(sorted(starts))), (str.endswith, tuple(sorted(ends)))):
        if len(parts) <= _MOST_PREFIXES and not any(test(name, parts) for name in used):
            return f"; {{n: v for n, v in source.items() if not n.{test.__name__}({parts})}} has none of them"
    return "; pass strict=False to leave them"


def _shortest(name: str, used: Collection[str], separator: str) -> str:
    """The shortest beginning of a name, up to a separator, that no name in use has."""
    parts = name.split(separator)
    starts = (separator.join(parts[:count]) + separator for count in range(1, len(parts)))
    return next((start for start in starts if not any(other.startswith(start) for other in used)), name)


def no_match(layers: Layers, wanted: Sequence[str], entries: Entries, names: Names | None, near: str) -> str:
    """The error if the source has none of the names looked for; `near` says what stacked layers lack."""
    source = entries.source
    if inside := nested(source, {*wanted}, layers.weight_format):
        return inside
    example = "" if names or near else _example(layers, entries)
    known = (f"; {name!r}{what.removeprefix('; it')}" for name in source if (what := _what(name, entries)))
    advice = near or (f"; pass names, such as names={example}" if example else next(known, "; pass names"))
    return (
        f"names: expected some of {len(wanted)} names ({few(wanted, 3)}), got {len(source)} others "
        f"({few(source, 3)}){advice}"
    )


def nested(source: Mapping[str, object], wanted: set[str], weight_format: WeightFormat) -> str:
    """The error if the source is a checkpoint around the names that are wanted, or around some state dict, or ""."""
    error = "source: expected a mapping of names to arrays, got mappings within a mapping; pass "
    found = list(_mappings(source, "source", ()))
    for _, keys, inner in found:
        for i in range(len(keys)):
            if any(weight_format.join(*keys[i:], name) in wanted for name in inner):
                outer = "source" + "".join(f"[{key!r}]" for key in keys[:i])
                return f"{error}{outer} with its names joined by {weight_format.separator!r}"
    scores = [len(wanted & {*inner}) for *_, inner in found]
    if not any(scores) and weight_format is TORCH:
        scores = [sum(hasattr(v, "shape") for v in inner.values()) for *_, inner in found]
    best = max(scores, default=0)
    expressions = [f[0] for f, score in zip(found, scores, strict=True) if score == best > 0]
    return f"{error}{' or '.join(expressions)}" if expressions else ""


def _mappings(
    source: Mapping[str, object], expression: str, keys: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], Mapping[str, object]]]:
    """The mappings of names to arrays within a checkpoint, each after an expression for it and its keys."""
    for key, value in source.items():
        inner = f"{expression}[{key!r}]"
        if hasattr(value, "state_dict") and hasattr(value, "named_parameters"):
            value, inner = value.state_dict(), f"{inner}.state_dict()"
        if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
            if any(hasattr(v, "shape") and hasattr(v, "dtype") for v in value.values()):
                yield inner, (*keys, key), value
            yield from _mappings(value, inner, (*keys, key))


def _example(layers: Layers, entries: Entries) -> str:
    """`names` for a module, if the source has all of its leaves under one other name and the shapes show it."""
    separator = layers.weight_format.separator
    first_leaves: dict[str, str] = {}  # by the path of the module
    for path in layers.leaves:
        *modules, leaf_name = path.split("/")
        for count in range(len(modules) + 1) if leaf_name != COUNTER else ():
            first_leaves.setdefault(join(*modules[:count]), path)
    for module in sorted(first_leaves, key=lambda module: module.count("/") + bool(module)):
        ends = [separator + name for name in make_plan(layers, first_leaves[module], {module: ""}).candidates]
        found = ((separator + name, end) for name in (*entries.names, *entries.patterns) for end in ends)
        starts = {name.removesuffix(end).removeprefix(separator) for name, end in found if name.endswith(end)}
        # One of many modules with the same names is not worth the search.
        if len(starts) <= _MOST_LINES:
            whole = [start for start in sorted(starts) if _has_all(layers, entries, module, start)]
            if len(whole) == 1:
                return f"{{{module!r}: {whole[0]!r}}}"
    return ""


def _has_all(layers: Layers, entries: Entries, module: str, name: str) -> bool:
    """Whether the leaves of a module are found, with the right shapes unless names of modules inside it agree."""
    paths = [p for p in layers.leaves if contains(module, p) and split(p)[1] != COUNTER]
    try:
        found = [find(make_plan(layers, path, {module: name}), entries) for path in paths]
    except ValueError:
        return False
    inside = any("/" in path.removeprefix(module).strip("/") for path in paths)
    return all(f is not None and (inside or f.fits()) for f in found) and any(f and f.fits() for f in found)
