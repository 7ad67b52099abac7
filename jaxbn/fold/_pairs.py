"""Which norm folds into which layer, and why the others do not."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxbn._norms.arguments import resolve_axes
from jaxbn._observe.watch import class_with_call
from jaxbn.fold._trace import INPUT, Node, Operation, Origin, Trace, TracedModule

_MOST_LINES = 10


class Pairs(dict[str, str]):
    """`{norm: layer}`: which norms are folded into which layers.

    Attributes:
      unfolded: for each other norm, by its path, the reason why it stays.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from jaxbn.fold import propose_linen
      >>> model = nn.Sequential([nn.Dense(3), nn.relu, nn.BatchNorm(use_running_average=True)])
      >>> x = jnp.ones((1, 2))
      >>> propose_linen(model, model.init(jax.random.key(0), x), x).unfolded
      {'layers_2': 'before it: relu; after it: an output'}
    """

    def __init__(self, pairs: Mapping[str, str], unfolded: Mapping[str, str]):
        super().__init__(pairs)
        self.unfolded: dict[str, str] = dict(unfolded)


def propose(trace: Trace) -> Pairs:
    """Pairs each norm with a layer if one feeds only the other, and the other has no second source, in every call."""
    found, unfolded = {}, {}
    for path, module in trace.modules.items():
        if module.is_norm:
            layer, why = _partner(trace, path)
            if layer is None:
                unfolded[path] = why
            else:
                found[path] = layer
    return Pairs(found, unfolded)


def choose(trace: Trace, pairs: Mapping[str, str] | None) -> Pairs:
    """Returns the pairs to fold: those given, or by default those proposed.

    Raises:
      ValueError: nothing is proposed, or something about the given pairs is wrong whatever the inputs are.
    """
    if pairs is None:
        chosen = propose(trace)
        if not chosen:
            lines = [f"{norm}: {why}" for norm, why in chosen.unfolded.items()]
            expected = (
                f"model: expected a batch norm that folds into a layer right beside it, got {len(lines)} that do not"
            )
            if len(lines) > _MOST_LINES:
                rest = f"and {len(lines) - _MOST_LINES} more; `unfolded` of what is proposed has them all"
                lines = [*lines[:_MOST_LINES], rest]
            raise ValueError("\n  ".join([expected, *lines]))
        return chosen
    problems = [p for norm, layer in pairs.items() for p in _pair_problems(trace, norm, layer)]
    if problems or not pairs:
        raise ValueError(f"pairs: {'; '.join(problems) or 'expected at least one {norm: layer}, got none'}")
    return Pairs(pairs, {norm: "not in pairs" for norm in trace.paths(norms=True) if norm not in pairs})


def _partner(trace: Trace, norm: str) -> tuple[str | None, str]:
    """The layer that a norm certainly folds into, or None and why there is none."""
    if problem := _norm_problem(trace.modules[norm]) or _variable_problem(trace, norm):
        return None, problem
    reasons = []
    for place, nodes in (("before", trace.sources[norm]), ("after", trace.users[norm])):
        layer = next(iter(nodes), None)
        if len(nodes) != 1 or not isinstance(layer, str) or trace.modules[layer].is_norm:
            reasons.append(f"{place} it: {_join(nodes) or 'nothing'}")
            continue
        why = _why_not(trace, norm, layer, norm_follows=place == "before")
        if not why:
            return layer, ""
        reasons.append(f"{place} it: {layer}, {why}")
    return None, "; ".join(reasons)


def _why_not(trace: Trace, norm: str, layer: str, norm_follows: bool) -> str:
    """Why a norm does not certainly fold into the only layer right before or after it; empty if it does."""
    if problems := _layer_problems(trace, norm, layer):
        return "; ".join(problems)
    module = trace.modules[layer]
    if module.cls not in trace.layers:
        return f"but {module.cls.__name__} is a derived class; name it in pairs if its kernel is used as Flax uses it"
    if problem := _variable_problem(trace, layer) or _function_problem(module.instance):
        return problem
    variables = [*trace.modules[norm].variables.values(), *module.variables.values()]
    if len({v.shape[: len(v.shape) - len(v.read.shape)] for v in variables}) > 1:
        return f"expected variables stacked like those of {norm}"
    if others := (trace.users if norm_follows else trace.sources)[layer] - {norm}:
        return f"whose {'output also goes to' if norm_follows else 'input also comes from'} {_join(others)}"
    return "which pads with zeros" if not norm_follows and sees_zeros(module.instance) else ""


def _variable_problem(trace: Trace, path: str) -> str:
    """Why a module may compute with something else than its variables, or may not be alone with them."""
    for name, (read, shape, place) in trace.modules[path].variables.items():
        if sources := (trace.reads[path, name] or {INPUT}) - {place}:
            return f"expected {path} to use its variable {name}, got a {name} from {_names(sources)}"
        if shape[len(shape) - len(read.shape) :] != read.shape:
            return f"expected a {name} {read.shape} of {path} stacked along its first axes, got shape {shape}"
        if others := trace.readers[place] - trace.holders[place]:
            return f"expected {path} alone to use its {name}, got {_names(others)} too"
    return ""


def _function_problem(module: object) -> str:
    """Why a layer may not be linear in its kernel: it was given another function than JAX's or Flax's."""
    for name in ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls", "promote_dtype"):
        function = getattr(module, name, None)
        while isinstance(function, functools.partial):
            function = function.func
        if function is not None and function.__module__.partition(".")[0] not in ("jax", "flax"):
            return f"but its {name} is not that of JAX; name it in pairs if it is linear in the kernel"
    return ""


def _names(origins: Iterable[Origin | None]) -> str:
    names = {o.name if isinstance(o, Operation) else o if isinstance(o, str) else "another variable" for o in origins}
    return " and ".join(sorted(names))


def _join(nodes: Iterable[Node]) -> str:
    return " and ".join(sorted(map(str, nodes)))


def _pair_problems(trace: Trace, norm: str, layer: str) -> list[str]:
    """Why a pair that the caller names cannot be folded, whatever the inputs are."""
    norms, layers = trace.paths(norms=True), trace.paths(norms=False)
    found = []
    if norm not in norms:
        found.append(f"expected the path of a batch norm, one of {norms}, got {norm!r}")
    elif problem := _norm_problem(trace.modules[norm]):
        found.append(problem)
    if layer not in layers:
        names = sorted({cls.__name__ for cls in trace.layers})
        found.append(f"expected the path of a layer ({', '.join(names)}), one of {layers}, got {layer!r}")
    elif norm in norms:
        found += _layer_problems(trace, norm, layer)
    return found


def _norm_problem(norm: TracedModule) -> str:
    """Why a norm cannot be folded into any layer; empty if it can."""
    if problem := _call_problem(norm):
        return problem
    if not norm.evaluates:
        return f"expected {norm.path} in evaluation, got use_running_average other than True"
    if getattr(norm.instance, "num_domains", None) is not None:
        return f"expected {norm.path} with one set of statistics, got num_domains"
    axis, ndim = norm.instance.axis, len(norm.y.shape)
    if resolve_axes(ndim, axis) != (ndim - 1,):
        return f"expected {norm.path} to have its channels on the last axis, got axis {axis}"
    return ""


def _layer_problems(trace: Trace, norm: str, layer: str) -> list[str]:
    """Why a layer cannot take up a norm."""
    problem = _call_problem(trace.modules[layer])
    found = [problem] if problem else []
    if layer in trace.shared:
        found.append(f"expected variables that only {layer} has, got one that {trace.shared[layer]} has too")
    if trace.is_before(norm, layer) and getattr(trace.modules[layer].instance, "mask", None) is not None:
        found.append(f"expected no masked layer after {norm}, got {layer} with a mask")
    return found


def _call_problem(module: TracedModule) -> str:
    """A module whose `__call__` is not Flax's or jaxbn's may compute anything."""
    definer = class_with_call(module.cls)
    if definer.__module__.partition(".")[0] in ("flax", "jaxbn"):
        return ""
    return f"expected {module.path} to be called as in Flax or jaxbn, got {definer.__name__}.__call__"


def sees_zeros(layer: Any) -> bool:
    """Whether a layer mixes its input with zeros; see `zero_padding` of `fold_batch_norm`."""
    if not hasattr(layer, "kernel_size"):
        return False
    if not hasattr(layer, "feature_group_count"):  # A transposed convolution puts zeros between its inputs.
        return True
    if any(d != 1 for d in jax.tree.leaves(layer.input_dilation)):
        return True
    if isinstance(layer.padding, str):
        return layer.padding in ("SAME", "CAUSAL") and any(k != 1 for k in jax.tree.leaves(layer.kernel_size))
    return any(p != 0 for p in jax.tree.leaves(layer.padding))
