"""Which norm follows which layer in a model, and whether a folded model is still the same: for Linen and NNX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from jaxbn._kernel.inputs import resolve_axes
from jaxbn._norms.fold_batch_norm import fold_arrays
from jaxbn._norms.state import BatchNormParams, BatchNormState

_TAG = "jaxbn.fold"
# What moves values and leaves them as they are: channels may still be where they were, which only the caller knows.
_MOVES = frozenset({"reshape", "squeeze", "transpose", "convert_element_type", "slice", "copy"})


class Pairs(dict[str, str]):
    """`{norm: layer}`: which norms are folded into which layers.

    Attributes:
      unfolded: why each other norm stays, by its path.

    Example:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> from jaxbn.fold import propose_linen
      >>> model = nn.Sequential([nn.Dense(3), nn.relu, nn.BatchNorm(use_running_average=True)])
      >>> x = jnp.ones((1, 2))
      >>> propose_linen(model, model.init(jax.random.key(0), x), x).unfolded
      {'layers_2': 'before it: relu; behind it: an output'}
    """

    def __init__(self, pairs: Mapping[str, str], unfolded: Mapping[str, str]):
        super().__init__(pairs)
        self.unfolded = dict(unfolded)


class Op(NamedTuple):
    """What gives or takes a value in the traced program and is neither layer nor norm."""

    name: str

    def __str__(self) -> str:
        cure = " (pairs may name the layer across it if channels stay last)"
        return self.name + cure * (self.name in _MOVES)


_INPUT, _OUTPUT = Op("an input"), Op("an output")
_MOST_LINES = 10


@dataclasses.dataclass(frozen=True)
class Call:
    """What is remembered of a module's first call."""

    module: Any
    kind: type
    order: int
    ndim: int
    evaluates: bool
    dtype: Any


@dataclasses.dataclass
class Trace:
    """What happens to layers and norms while a model is traced: their calls, and who feeds whom."""

    layers: tuple[type, ...]
    norms: tuple[type, ...]
    # Who else has a variable of a layer.
    shared: Mapping[str, str] = dataclasses.field(default_factory=dict)
    calls: dict[str, Call] = dataclasses.field(default_factory=dict)
    edges: set[tuple[str | Op, str | Op]] = dataclasses.field(default_factory=set)

    def call(
        self, path: str, module: Any, kind: type, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Calls a layer's or a norm's function, with what goes in and what comes out named in the program."""
        if args:
            args = (checkpoint_name(args[0], f"{_TAG} in {path}"), *args[1:])
        y = function(*args, **kwargs)
        given = kwargs.get("use_running_average", args[1] if len(args) > 1 and self.is_norm(module) else None)
        evaluates = given if given is not None else getattr(module, "use_running_average", None)
        self.calls.setdefault(path, Call(module, kind, len(self.calls), y.ndim, bool(evaluates), y.dtype))
        return checkpoint_name(y, f"{_TAG} out {path}")

    def run(self, function: Callable[[Any], Any], variables: Any) -> None:
        """Traces the model, in whose calls `call` is called."""
        for jaxpr in _all_jaxprs(jax.make_jaxpr(function)(variables).jaxpr):
            makers: dict[Any, str | Op] = {}
            for equation in jaxpr.eqns:
                name = _name_of(equation)
                _, way, path = name.split(" ", 2) if name.startswith(f"{_TAG} ") else ("", "", "")
                for v in equation.invars:
                    if not isinstance(v, Literal):
                        self.edges.add((makers.get(v, _INPUT), path if way == "in" else Op(name)))
                makers.update((v, path if way == "out" else Op(name)) for v in equation.outvars)
            self.edges.update((makers.get(v, _INPUT), _OUTPUT) for v in jaxpr.outvars if not isinstance(v, Literal))

    def is_norm(self, module: Any) -> bool:
        return isinstance(module, self.norms)

    def paths(self, norms: bool) -> list[str]:
        return [path for path, call in self.calls.items() if self.is_norm(call.module) == norms]

    def is_before(self, norm: str, layer: str) -> bool:
        return self.calls[norm].order < self.calls[layer].order

    def propose(self) -> Pairs:
        """Norms whose input is a layer's output, or the reverse, and no one else's, in every call."""
        partners = {norm: self._partner(norm) for norm in self.paths(norms=True)}
        found = {norm: layer for norm, (layer, _) in partners.items() if layer is not None}
        return Pairs(found, {norm: why for norm, (layer, why) in partners.items() if layer is None})

    def _partner(self, norm: str) -> tuple[str | None, str]:
        """The layer that a norm certainly folds into, or why there is none."""
        reasons = self._norm_problems(norm)
        if not reasons:
            for where, end in (("before", 1), ("behind", 0)):
                beside = {edge[1 - end] for edge in self.edges if edge[end] == norm}
                layer = next(iter(beside), None)
                if len(beside) != 1 or not isinstance(layer, str) or self.is_norm(self.calls[layer].module):
                    reasons.append(f"{where} it: {_join(beside) or 'nothing'}")
                    continue
                why = self._doubt(norm, layer, end)
                if not why:
                    return layer, ""
                reasons.append(f"{where} it: {layer}, {why}")
        return None, "; ".join(reasons)

    def _doubt(self, norm: str, layer: str, end: int) -> str:
        """Why a norm does not certainly fold into the only layer at an end of it: 1, its input; 0, its output."""
        kind = self.calls[layer].kind
        others = {edge[end] for edge in self.edges if edge[1 - end] == layer} - {norm}
        if problems := self._layer_problems(norm, layer):
            return "; ".join(problems)
        if kind not in self.layers:
            return f"but {kind.__name__} is a derived class; name it in pairs if its kernel is used as Flax uses it"
        if others:
            return f"whose {'output also goes to' if end else 'input also comes from'} {_join(others)}"
        return "" if end or not _sees_zeros(self.calls[layer].module) else "which pads with zeros"

    def checked(self, pairs: Mapping[str, str] | None) -> Pairs:
        """Returns the given pairs, or those proposed, unless something about them is wrong."""
        norms = self.paths(norms=True)
        if pairs is None:
            chosen = self.propose()
            if not chosen:
                lines = [f"{norm}: {why}" for norm, why in chosen.unfolded.items()]
                if len(lines) > _MOST_LINES:
                    rest = f"and {len(lines) - _MOST_LINES} more; `unfolded` of what is proposed has them all"
                    lines = [*lines[:_MOST_LINES], rest]
                expected = "model: expected a batch norm that folds into a layer right beside it"
                raise ValueError("\n  ".join([f"{expected}, got {len(norms)} that do not", *lines]))
            return chosen
        problems = [p for norm, layer in pairs.items() for p in self.problems(norm, layer)]
        if problems or not pairs:
            raise ValueError(f"pairs: {'; '.join(problems) or 'expected at least one {norm: layer}, got none'}")
        return Pairs(pairs, {norm: "not in pairs" for norm in norms if norm not in pairs})

    def problems(self, norm: str, layer: str) -> list[str]:
        """Why a pair that the caller names cannot be folded, whatever the inputs."""
        norms, layers = self.paths(norms=True), self.paths(norms=False)
        known = norm in norms
        found = [] if known else [f"expected the path of a batch norm, one of {norms}, got {norm!r}"]
        found += self._norm_problems(norm) if known else []
        if layer not in layers:
            names = sorted({kind.__name__ for kind in self.layers})
            found.append(f"expected the path of a layer ({', '.join(names)}), one of {layers}, got {layer!r}")
        elif known:
            found += self._layer_problems(norm, layer)
        return found

    def _norm_problems(self, norm: str) -> list[str]:
        call = self.calls[norm]
        if own := self._own_call(norm):
            return own
        if not call.evaluates:
            return [f"expected {norm} in evaluation, got use_running_average other than True"]
        if getattr(call.module, "num_domains", None) is not None:
            return [f"expected {norm} with one set of statistics, got num_domains"]
        if resolve_axes(call.ndim, call.module.axis) != (call.ndim - 1,):
            return [f"expected {norm} to have its channels on the last axis, got axis {call.module.axis}"]
        return []

    def _layer_problems(self, norm: str, layer: str) -> list[str]:
        found = self._own_call(layer)
        if layer in self.shared:
            found.append(f"expected variables that only {layer} has, got one that {self.shared[layer]} has too")
        if self.is_before(norm, layer) and getattr(self.calls[layer].module, "mask", None) is not None:
            found.append(f"expected no masked layer after {norm}, got {layer} with a mask")
        return found

    def _own_call(self, path: str) -> list[str]:
        """What a `__call__` that is not Flax's or jaxbn's does, nobody knows."""
        kind = self.calls[path].kind
        definer = next(c for c in kind.__mro__ if "__call__" in vars(c))
        if definer.__module__.partition(".")[0] in ("flax", "jaxbn"):
            return []
        return [f"expected {path} to be called as in Flax or jaxbn, got {definer.__name__}.__call__"]

    def fold(
        self, pair: tuple[str, str], kernel: Any, bias: Any, params: BatchNormParams, state: BatchNormState
    ) -> tuple[jax.Array, jax.Array]:
        """`fold_arrays` with the options of both modules, over leading axes if they have any."""
        norm, layer = (self.calls[path].module for path in pair)

        def fold(kernel: Any, bias: Any, params: BatchNormParams, state: BatchNormState) -> tuple[jax.Array, jax.Array]:
            return fold_arrays(
                kernel,
                bias,
                params,
                state,
                eps=norm.epsilon,
                before=self.is_before(*pair),
                zero_padding=_sees_zeros(layer),
                transpose_kernel=getattr(layer, "transpose_kernel", False),
                feature_group_count=getattr(layer, "feature_group_count", 1),
                padding_cure="leave this norm out of pairs",
            )

        lead = state.mean.shape[:-1]
        if not lead:
            try:
                return fold(kernel, bias, params, state)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{pair[0]} into {pair[1]}: {error}") from None
        arrays: list[Any] = [kernel, bias, *params, *state[:2]]
        wrong = [v.shape for v in arrays if v is not None and v.shape[: len(lead)] != lead]
        if wrong:
            raise ValueError(
                f"{pair[0]} into {pair[1]}: expected the leading axes {lead} of the stacked statistics in all arrays, "
                f"got shapes {wrong}"
            )

        def row(i: int) -> tuple[jax.Array, jax.Array]:
            k, b, *affine = (None if v is None else v.reshape(-1, *v.shape[len(lead) :])[i] for v in arrays[:4])
            mean, var = (v.reshape(-1, v.shape[-1])[i] for v in state[:2])
            return self.fold(pair, k, b, BatchNormParams(*affine), state._replace(mean=mean, var=var))

        rows = [row(i) for i in range(math.prod(lead))]
        kernels, biases = (jnp.stack(v) for v in zip(*rows, strict=True))
        return kernels.reshape(kernel.shape), biases.reshape(*lead, -1)

    def tolerance(self, pairs: Pairs, outputs: Any) -> float:
        """The square root of the coarsest precision among the outputs and the folded modules."""
        dtypes = [v.dtype for v in _floats(outputs)] + [self.calls[p].dtype for pair in pairs.items() for p in pair]
        finfo: Any = jnp.finfo
        return math.sqrt(max(float(finfo(dtype).eps) for dtype in dtypes))


def check_same(
    trace: Trace, pairs: Pairs, tolerance: float | None, expected: Any, run_folded: Callable[[dict[str, str]], Any]
) -> None:
    """Raises if the model's outputs differ from those with all `pairs` folded, and names the pairs that do it alone."""
    if not _floats(expected):
        raise ValueError("model: expected floating-point outputs to compare before and after folding, got none")
    limit = trace.tolerance(pairs, expected) if tolerance is None else tolerance
    difference = _difference(expected, run_folded(pairs))
    if difference <= limit:
        return
    alone = {pair: _difference(expected, run_folded(dict([pair]))) for pair in pairs.items()}
    wrong = [f"{norm} into {layer} ({d:.2g})" for (norm, layer), d in alone.items() if not d <= limit]
    raise ValueError(
        f"pairs: expected the folded model's outputs to differ by at most {limit:.2g} of the largest, got "
        f"{difference:.2g}; {'alone too: ' + ', '.join(wrong) if wrong else 'each pair alone is within that'}; "
        "leave out of pairs what has another user or another source than its pair, or pass a larger tolerance"
    )


def _difference(expected: Any, actual: Any) -> float:
    """The largest difference over the largest value, of the worst array; NaN if there is one."""
    ratios = [0.0]
    for a, b in zip(_floats(expected), _floats(actual), strict=True):
        before, after = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        ratios.append(np.abs(before - after).max(initial=0) / (np.abs(before).max(initial=0) or 1))
    return float(np.max(ratios))


def _join(ends: Iterable[str | Op]) -> str:
    return " and ".join(sorted(map(str, ends)))


def _floats(tree: Any) -> list[jax.Array]:
    return [v for v in map(jnp.asarray, jax.tree.leaves(tree)) if jnp.issubdtype(v.dtype, jnp.floating)]


def _sees_zeros(layer: Any) -> bool:
    """Whether a layer's inputs are mixed with zeros; see `fold_batch_norm`."""
    if not hasattr(layer, "kernel_size"):
        return False
    if not hasattr(layer, "feature_group_count"):  # A transposed convolution puts zeros between its inputs.
        return True
    if any(d != 1 for d in jax.tree.leaves(layer.input_dilation)):
        return True
    if isinstance(layer.padding, str):
        return layer.padding in ("SAME", "CAUSAL") and any(k != 1 for k in jax.tree.leaves(layer.kernel_size))
    return any(p != 0 for p in jax.tree.leaves(layer.padding))


def _name_of(equation: Any) -> str:
    """The function that is called, as far as the program knows it, or the operation."""
    inner = equation.params.get("call_jaxpr")  # of one with a derivative of its own, such as relu
    if inner is not None and inner.eqns:
        return _name_of(inner.eqns[-1])
    return str(equation.params.get("name") or equation.primitive.name)


def _all_jaxprs(jaxpr: Jaxpr) -> Iterator[Jaxpr]:
    """A program and those within it, as of loops and branches."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if isinstance(inner, ClosedJaxpr | Jaxpr):
                    yield from _all_jaxprs(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
