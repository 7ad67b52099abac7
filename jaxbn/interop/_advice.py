"""What to do about names and shapes that do not fit. Nothing is advised that would load another function."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxbn._messages import few
from jaxbn.interop._finding import Entries, Found, find
from jaxbn.interop._formats import COUNTER, TORCH, Shape, WeightFormat
from jaxbn.interop._layers import Layers
from jaxbn.interop._matching import Names, contains, make_plan

# An error lists so many names one by one.
_MOST_LINES = 10
_MOST_PREFIXES = 5

# What names of PyTorch that belong to no leaf are. The first that is found in a name says it.
_KINDS = (
    (r"(^|\.)bias_[kv]$", "an extra key or value (add_bias_kv=True), which Flax's attention does not have"),
    (
        r"fake_quant|activation_post_process|observer",
        "of quantization-aware training, whose rounding the target does not do",
    ),
    (
        r"_packed_params|(^|[._])zero_point(_\d+)?$|\.(qweight|qzeros|SCB|absmax|quant_map)$",
        "of a quantized layer; load the checkpoint of the float model",
    ),
    (
        r"(^|\.)parametrizations\.|(^|\.)weight\w*_(orig|mask|[guv])$",
        "of a weight that is computed from several entries, not all of which are known; save the checkpoint after "
        "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm or prune.remove",
    ),
    (
        r"(^|\.)(weight|bias)_([ih]h|hr)(_l\d+(_reverse)?)?$",
        "of a recurrent layer, which has no counterpart of this layout",
    ),
    (r"\.lora_[AB]\b", "of an adapter; merge it into the weights first (peft: merge_and_unload)"),
)


def cure(names: Names | None, found: Found, name: str, shape: Shape) -> str:
    """What to do about the shape of an entry, if the layer shows what is right."""
    path, layers = found.plan.path, found.layers
    module, _, leaf_name = path.rpartition("/")
    if layers.kind(path) is not None and layers.own_layout(path, found.depth).fits(shape, found.leaf):
        return f"; leave {path if path in layers.kinds else module!r} out of kinds"
    if leaf_name == "kernel":
        for kind, layout in layers.weight_format.layouts.items():
            own_class = kind != "as_is" and module in layers.target.kernels
            if kind in _IF and not own_class and layout.has_axes(len(found.leaf)) and layout.fits(shape, found.leaf):
                return f"; pass kinds={{{module!r}: {kind!r}}} if {_IF[kind]}"
        # Where the layout is not that of a linear layer already.
        axes = len(found.expected(name, shape) or ())
        if len(shape) == 2 < axes and layers.weight_format is TORCH and module not in layers.target.kernels:
            return (
                "; for a DenseGeneral, kinds needs 'to_heads' if the kernel is [in, heads, head_dim], "
                "'from_heads' if it is [heads, head_dim, out]"
            )
    is_head = leaf_name in ("kernel", "embedding") and module and not found.depth and not layers.role(path)
    if is_head and _differs_in_outputs(found, name, shape):
        return f"; if the layer is trained anew, {_keep(found, module, names)}"
    return ""


_IF = {
    "as_is": "its axes are in Flax's order",
    "conv_transpose": "the layer is a ConvTranspose with transpose_kernel=False",
    "depthwise": "the layer is a depthwise convolution",
}


def _differs_in_outputs(found: Found, name: str, shape: Shape) -> bool:
    expected = found.expected(name, shape) or ()
    outputs = 0 if found.layers.weight_format is TORCH or found.plan.path.endswith("embedding") else -1
    same = [i for i in range(len(expected)) if i != outputs % len(expected)]
    return len(shape) == len(expected) > 1 and all(shape[i] == expected[i] for i in same)


def _keep(found: Found, module: str, names: Names | None) -> str:
    name = found.candidate.name
    inside = name.rpartition(found.layers.weight_format.separator)[0] + found.layers.weight_format.separator
    without = f"source without the names that begin with {inside!r}"
    if callable(names):
        return f"return None from names for {module!r} and pass {without}"
    if not names:
        return f"pass names={{{module!r}: None}} to keep the target's values"
    kept = make_plan(found.layers, found.plan.path, {**names, module: None})
    rest = "" if found.candidate in kept.candidates else f" and {without}"
    return f"pass names={{**names, {module!r}: None}}{rest} to keep the target's values"


def left_over(
    names: Sequence[str], used: Iterable[str], source: Mapping[str, Any], weight_format: WeightFormat
) -> list[str]:
    """The errors about names that belong to no leaf."""
    lines = [f"{name}: expected a leaf of the target to take it, got none{_kind_of(name, source)}" for name in names]
    if len(lines) <= _MOST_LINES:
        return lines
    return [
        *lines[:_MOST_LINES],
        f"source: expected a leaf of the target for each name, got {len(lines) - _MOST_LINES} more names without one"
        f"{_filter(names, [*used], weight_format.separator)}",
    ]


def missing(lines: Sequence[str]) -> list[str]:
    if len(lines) <= _MOST_LINES:
        return [*lines]
    more = len(lines) - _MOST_LINES
    return [*lines[:_MOST_LINES], f"target: expected an entry of the source for each leaf, got {more} more without one"]


def _kind_of(name: str, source: Mapping[str, Any]) -> str:
    scale = re.sub(r"scale(_\d+)?$", r"zero_point\1", name)
    if scale != name and scale in source:
        name = scale
    kind = next((kind for pattern, kind in _KINDS if re.search(pattern, name)), "")
    return f"; it is {kind}" if kind else ""


def _filter(names: Sequence[str], used: Sequence[str], separator: str) -> str:
    """An expression that removes names from the source, and none that are used."""
    starts = {_shortest(name, used, separator) for name in names}
    apart = not any(name.startswith(tuple(starts)) for name in used)
    ends = {separator + name.rpartition(separator)[2] for name in names}
    if len(starts) <= _MOST_PREFIXES and apart:
        test = f"n.startswith({tuple(sorted(starts))})"
    elif len(ends) <= _MOST_PREFIXES and not any(name.endswith(tuple(ends)) for name in used):
        test = f"n.endswith({tuple(sorted(ends))})"
    else:
        return "; pass strict=False to leave them"
    return f"; {{n: v for n, v in source.items() if not {test}}} has none of them"


def _shortest(name: str, used: Sequence[str], separator: str) -> str:
    """The shortest beginning of a name, up to a separator, that no name in use has."""
    parts = name.split(separator)
    starts = (separator.join(parts[:count]) + separator for count in range(1, len(parts)))
    return next((start for start in starts if not any(other.startswith(start) for other in used)), name)


def no_match(
    layers: Layers, wanted: Sequence[str], source: Mapping[str, Any], entries: Entries, names: Names | None, near: str
) -> str:
    """The error if the source has none of the names looked for; `near` says what stacked layers lack."""
    inside = nested(source, {*wanted}, layers.weight_format)
    if inside:
        return inside
    example = "" if names or near else _example(layers, entries)
    kinds = (f"; {name!r}{kind.removeprefix('; it')}" for name in source if (kind := _kind_of(name, source)))
    advice = near or (f"; pass names, such as names={example}" if example else next(kinds, "; pass names"))
    return (
        f"names: expected some of {len(wanted)} names ({few(wanted, 3)}), got {len(source)} others "
        f"({few(source, 3)}){advice}"
    )


def nested(source: Mapping[str, Any], wanted: set[str], weight_format: WeightFormat) -> str:
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
    source: Mapping[str, Any], expression: str, keys: tuple[str, ...]
) -> Iterator[tuple[str, tuple[str, ...], Mapping[str, Any]]]:
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
    starts: dict[str, set[str]] = defaultdict(set)  # by the rest of the name
    for name in (*entries.values, *entries.patterns):
        parts = name.split(separator)
        for count in range(len(parts)):
            starts[separator.join(parts[count:])].add(separator.join(parts[:count]))
    common: dict[str, set[str]] = {}
    for path in layers.target.leaves:
        *modules, leaf_name = path.split("/")
        names = [candidate.name.split(separator) for candidate in make_plan(layers, path, {}).candidates]
        for count in range(len(modules) + 1) if leaf_name != COUNTER else ():
            found = {start for parts in names for start in starts.get(separator.join(parts[count:]), ())}
            module = "/".join(modules[:count])
            common[module] = common[module] & found if module in common else found
    for module in sorted(common, key=lambda module: module.count("/") + bool(module)):
        # One of many modules with the same names is not worth the search.
        if len(common[module]) <= _MOST_LINES:
            whole = [start for start in sorted(common[module]) if _has_all(layers, entries, module, start)]
            if len(whole) == 1:
                return f"{{{module!r}: {whole[0]!r}}}"
    return ""


def _has_all(layers: Layers, entries: Entries, module: str, name: str) -> bool:
    """Whether the leaves of a module are found, with the right shapes unless names of modules inside it agree."""
    paths = [p for p in layers.target.leaves if contains(module, p) and p.rpartition("/")[2] != COUNTER]
    try:
        found = [find(make_plan(layers, path, {module: name}), layers, entries) for path in paths]
    except ValueError:
        return False
    inside = any("/" in path.removeprefix(module).strip("/") for path in paths)
    return all(f is not None and (inside or f.fits()) for f in found) and any(f and f.fits() for f in found)
