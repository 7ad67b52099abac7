"""Each library's norms, as a call for each mode (`MODES`) with its arguments already bound."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

MODES = FORWARD, BOTH, EVAL = ("forward", "forward+backward", "eval")
# The fewest reads and writes of an array of the size of x with which a program can do it.
PASSES = {FORWARD: 3, BOTH: 8, EVAL: 2}
NORMS = ("batch", "layer", "rms", "group", "instance")
GROUPS = 32
EPS = 1e-5

Calls = dict[str, Callable[[], Any]]
# `train(x, variables) -> y, updates`, `evaluate(x, variables) -> y`, and the variables.
Programs = tuple[Callable, Callable, Any]


class Case(NamedTuple):
    """A norm, the shape of x with channels last, and its dtype."""

    norm: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def megabytes(self) -> float:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize / 1e6

    @property
    def groups(self) -> int:
        return math.gcd(GROUPS, self.shape[-1])

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """x and dy, float32."""
        rng = np.random.default_rng(0)
        offset, spread = rng.normal(0, 0.5, self.shape[-1]), rng.uniform(0.5, 2, self.shape[-1])
        x, dy = (rng.standard_normal(self.shape, dtype=np.float32) for _ in range(2))
        return (x * spread + offset).astype(np.float32), dy


@functools.lru_cache(maxsize=1)
def arrays(case: Case) -> tuple[jax.Array, jax.Array]:
    """x and dy as JAX arrays. All implementations share them, so that none has its own in a CPU cache."""
    x, dy = case.draw()
    return jnp.asarray(x, case.dtype), jnp.asarray(dy, case.dtype)


def forward_and_backward(train: Callable) -> Callable:
    def both(x, dy, variables):
        y, pull, new = jax.vjp(train, x, variables, has_aux=True)
        return y, new, pull(dy)

    return both


def jax_calls(case: Case, make: Callable[[Case], Programs]) -> Calls:
    """The calls of programs made by `make`, compiled."""
    train, evaluate, variables = make(case)
    x, dy = arrays(case)
    programs = ((train, (x, variables)), (forward_and_backward(train), (x, dy, variables)), (evaluate, (x, variables)))
    return {
        mode: functools.partial(_run, jax.jit(function).lower(*arguments).compile(), arguments)
        for mode, (function, arguments) in zip(MODES, programs, strict=True)
    }


def _run(function, arguments):
    jax.block_until_ready(function(*arguments))


def jaxbn_functions(case: Case) -> Programs:
    params, state = jaxbn.batch_norm_init(case.shape[-1])
    if case.norm == "batch":
        return (
            lambda x, params: jaxbn.batch_norm_train(x, params, state),
            lambda x, params: jaxbn.batch_norm_eval(x, params, state)[0],
            params,
        )
    functions = {
        "layer": jaxbn.layer_norm,
        "rms": jaxbn.rms_norm,
        "group": functools.partial(jaxbn.group_norm, num_groups=case.groups),
        "instance": lambda x, params: jaxbn.instance_norm_train(x, params, None)[0],
    }
    function = functions[case.norm]
    if case.norm == "rms":
        params = params._replace(bias=None)
    return lambda x, params: (function(x, params), None), function, params


LAYERS = {
    "batch": ("BatchNorm", {}),
    "layer": ("LayerNorm", {"epsilon": EPS}),
    "rms": ("RMSNorm", {"epsilon": EPS}),
    "group": ("GroupNorm", {"epsilon": EPS}),
    "instance": ("InstanceNorm", {"epsilon": EPS}),
}


def linen_layer(module: Any, case: Case, **options: Any) -> nn.Module:
    name, more = LAYERS[case.norm]
    groups = {"num_groups": case.groups} if case.norm == "group" else {}
    return getattr(module, name)(**more, **groups, **options, dtype=case.dtype)


def linen(module: Any, case: Case, **options: Any) -> Programs:
    layer = linen_layer(module, case, **options)
    mode = {"use_running_average": False} if case.norm == "batch" else {}
    variables = layer.init(jax.random.key(0), jnp.ones((2, *case.shape[1:]), case.dtype), **mode)
    stats = variables.get("batch_stats", {})

    def train(x, params):
        return layer.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"], **mode)

    def evaluate(x, params):
        mode = {"use_running_average": True} if case.norm == "batch" else {}
        return layer.apply({"params": params, "batch_stats": stats}, x, **mode)

    return train, evaluate, variables["params"]


def nnx_layers(module: Any, case: Case) -> Programs:
    name, more = LAYERS[case.norm]
    more = more | {"dtype": jnp.dtype(case.dtype), "rngs": nnx.Rngs(0)}
    if case.norm == "group":
        more["num_groups"] = case.groups
    graph, params, stats = nnx.split(getattr(module, name)(case.shape[-1], **more), nnx.Param, ...)

    def apply(x, params, evaluate):
        layer = nnx.merge(graph, params, stats)
        layer.eval() if evaluate else layer.train()
        y = layer(x)
        return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))

    return lambda x, params: apply(x, params, False), lambda x, params: apply(x, params, True)[0], params


def pytorch(case: Case, *, channels_last: bool, compiled: bool = False) -> Calls:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, case.dtype)
    rank, channels = len(case.shape), case.shape[-1]

    def tensor(v):
        v = torch.tensor(v, device=device, dtype=dtype)
        if case.norm in ("layer", "rms"):
            return v
        v = v.movedim(-1, 1)
        return v if channels_last else v.contiguous()

    x, dy = map(tensor, case.draw())
    x.requires_grad_(True)
    spatial = f"{max(rank - 2, 1)}d"
    layer = {
        "batch": lambda: getattr(torch.nn, f"BatchNorm{spatial}")(channels),
        "layer": lambda: torch.nn.LayerNorm(channels, eps=EPS),
        "rms": lambda: torch.nn.RMSNorm(channels, eps=EPS),
        "group": lambda: torch.nn.GroupNorm(case.groups, channels, eps=EPS),
        "instance": lambda: getattr(torch.nn, f"InstanceNorm{spatial}")(channels, affine=True, eps=EPS),
    }[case.norm]().to(device)
    function = torch.compile(layer) if compiled else layer

    def synchronized(call):
        def run():
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    def forward():
        layer.train()
        function(x)

    def both():
        layer.train()
        x.grad = None
        layer.zero_grad()
        function(x).backward(dy)

    def evaluate():
        layer.eval()
        with torch.no_grad():
            function(x)

    return {mode: synchronized(call) for mode, call in zip(MODES, (forward, both, evaluate), strict=True)}


def limit(case: Case) -> Calls:
    """A copy and a sum of an array like x; the faster one gives the bandwidth."""
    x, _ = arrays(case)
    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype)).lower(x).compile()
    total = jax.jit(lambda x: jnp.sum(x.astype(jnp.float32), tuple(range(x.ndim - 1)))).lower(x).compile()
    return {"copy": functools.partial(_run, copy, (x,)), "sum": functools.partial(_run, total, (x,))}


PROGRAMS: dict[str, Callable[[Case], Programs]] = {
    "jaxbn": jaxbn_functions,
    "jaxbn.linen": functools.partial(linen, jaxbn.linen),
    "jaxbn.nnx": functools.partial(nnx_layers, jaxbn.nnx),
    "flax.linen": functools.partial(linen, nn),
    "flax.linen-two-pass": functools.partial(linen, nn, use_fast_variance=False),
    "flax.nnx": functools.partial(nnx_layers, nnx),
}
IMPLEMENTATIONS: dict[str, Callable[[Case], Calls]] = {
    name: functools.partial(jax_calls, make=make) for name, make in PROGRAMS.items()
}
if importlib.util.find_spec("torch"):
    IMPLEMENTATIONS |= {
        "torch-channels-last": functools.partial(pytorch, channels_last=True),
        "torch-contiguous": functools.partial(pytorch, channels_last=False),
        "torch.compile": functools.partial(pytorch, channels_last=True, compiled=True),
    }
