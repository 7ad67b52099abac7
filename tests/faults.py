"""Deliberate faults that the tests must notice: `tests/try_faults.py` plants each in a copy of the checkout."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; `tests` are the modules or folders that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str

    def plant(self, source: str) -> str:
        """The source with the fault."""
        if source.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected {self.old!r} once in {self.file}.py, got {source.count(self.old)}; change "
                "tests/faults.py with the library"
            )
        return source.replace(self.old, self.new)


FAULTS = [
    # Moments.
    Fault(
        "sums without a pivot",
        "_kernel/measure",
        "d, again = values - pivot, values - separate_copy(pivot)",
        "d, again = values - pivot, values",
        "accuracy",
    ),
    Fault("a pivot that compilers may fuse", "_kernel/xla", "info.nmant - 1)", "info.nmant)", "accuracy moments"),
    Fault(
        "the mean loses its second number",
        "_kernel/moments",
        "jax.lax.select(constant, zero, lo)",
        "zero",
        "accuracy moments",
    ),
    Fault(
        "constants keep their rounding",
        "_kernel/moments",
        "is_rounding_error(var, first, 64)",
        "is_rounding_error(var, first, -64)",
        "degenerate",
    ),
    Fault(
        "merge: sets weigh the same",
        "_kernel/moments",
        "weight = parts.count / jnp.where(total > 0, total, 1)",
        "weight = jnp.ones_like(parts.count) / parts.count.shape[axis]",
        "moments",
    ),
    Fault("merge: no variance between sets", "_kernel/moments", "parts.var + shift * shift", "parts.var", "moments"),
    Fault(
        "mask: counts what it hides",
        "_kernel/reduction",
        "entries, values = count_by_rows(x, mask, axes)",
        "entries, values = count_by_rows(x, jnp.ones_like(mask), axes)",
        "values",
    ),
    Fault(
        "mask: counts broadcast axes once",
        "_kernel/reduction",
        "keepdims=True) * as_float(values, dtype)",
        "keepdims=True)",
        "family",
    ),
    Fault(
        "mask: sums what it hides",
        "_kernel/measure",
        "v if mask is None else jnp.where(mask, v, 0), axes",
        "v, axes",
        "values",
    ),
    Fault(
        "mask: NaN stays",
        "_kernel/linear",
        "return x if mask is None else jnp.where(mask | jnp.isfinite(x), x, 0)",
        "return x",
        "gradients",
    ),
    Fault(
        "statistics of float64 in float32",
        "_kernel/inputs",
        "np.float64 if dtype == np.float64 else np.float32",
        "np.float32",
        "family",
    ),
    Fault(
        "accelerators: sums about zero for float32",
        "_kernel/measure",
        "zero_pivot = x.dtype == jnp.bfloat16",
        "zero_pivot = x.dtype != jnp.float64",
        "platforms",
    ),
    Fault(
        "accelerators: the pivot from the first value",
        "_kernel/measure",
        "return jax.lax.slice(x, starts, stops, steps)",
        "return jax.lax.slice(x, [0] * x.ndim, [1 if a in reduced else n for a, n in enumerate(x.shape)])",
        "platforms",
    ),
    # Derivatives.
    Fault(
        "derivative of the variance halved",
        "_kernel/measure",
        "2 * (product - m.mean_lo",
        "1 * (product - m.mean_lo",
        "gradients",
    ),
    Fault(
        "derivative of the mean dropped",
        "_kernel/measure",
        "Moments(plain[0], 2",
        "Moments(0 * plain[0], 2",
        "gradients",
    ),
    Fault(
        "product rule without scale",
        "_kernel/normalize",
        "_sum(_product(dfactor, scale), _product(factor, dscale))",
        "_product(dfactor, scale)",
        "family",
    ),
    Fault(
        "reverse mode keeps everything",
        "_kernel/normalize",
        "combine((x, mask, mean, mean_lo, None, factor), b=dscale)",
        "(prepare(x, mask) - m.mean) * factor * dscale",
        "family",
    ),
    Fault(
        "gradients enter eval's statistics",
        "_kernel/normalize",
        "statistics = jax.lax.stop_gradient((mean, var))",
        "statistics = (mean, var)",
        "gradients",
    ),
    Fault(
        "gradients enter the state",
        "_norms/running_statistics",
        "*jax.lax.stop_gradient((state, new)),",
        "state, new,",
        "gradients",
    ),
    Fault(
        "gradients enter renorm's correction", "_norms/batch_renorm", "m = jax.lax.stop_gradient(m)", "", "batch_renorm"
    ),
    # Normalizing.
    Fault(
        "eps beside the root",
        "_kernel/normalize",
        "root = reciprocal_root(var + eps, eps)",
        "root = 1 / (jnp.sqrt(var) + eps)",
        "values",
    ),
    Fault(
        "half precision throughout",
        "_kernel/linear",
        "x = x.astype(inputs.statistics_dtype(x.dtype))",
        "pass",
        "family",
    ),
    Fault("dtype is ignored", "_norms/arguments", "x.dtype if dtype is None else dtype", "x.dtype", "family"),
    Fault(
        "groups of neighbours mixed",
        "_kernel/reduction",
        "jnp.broadcast_to(total, cut.shape).reshape",
        "jnp.swapaxes(jnp.broadcast_to(total, cut.shape), self.axis + 1, self.axis + 2).reshape",
        "family",
    ),
    # The state.
    Fault(
        "momentum weighs the old",
        "_norms/running_statistics",
        "jnp.asarray(momentum, dtype)",
        "1 - jnp.asarray(momentum, dtype)",
        "values",
    ),
    Fault(
        "cumulative average one batch late",
        "_norms/running_statistics",
        "1 / jnp.maximum(seen, 1)",
        "1 / (seen + 1)",
        "values",
    ),
    Fault(
        "biased variance stored",
        "_norms/running_statistics",
        "known / (known - correction) if known > max(correction, 1) else 1.0",
        "1.0",
        "values",
    ),
    Fault(
        "an empty batch enters",
        "_norms/running_statistics",
        "has_mean, has_var = (n > 0 for n in numbers)",
        "has_mean, has_var = (n > -1 for n in numbers)",
        "degenerate",
    ),
    Fault(
        "an empty batch is counted",
        "_norms/running_statistics",
        "elif known == 0 or 0 in",
        "elif known == -1 or 0 in",
        "degenerate",
    ),
    Fault(
        "sync: replicas without batches weigh",
        "_norms/sync_state",
        "counts = (tracked > 0) | (",
        "counts = (tracked > -1) | (",
        "sync states",
    ),
    # Devices.
    Fault(
        "devices: no sum",
        "_kernel/devices",
        "lambda v: _psum(v, self.names)",
        "lambda v: v",
        "sync accuracy_devices",
    ),
    Fault(
        "devices: no sum within groups in the derivative",
        "_kernel/group_sums",
        "lambda cts, _, **options: _SUM.bind(*cts, **options)",
        "lambda cts, _, **options: cts",
        "sync accuracy_devices",
    ),
    Fault(
        "devices: what is beyond a power of two has no sum",
        "_kernel/group_sums",
        "return [jnp.where(is_beyond[jax.lax.axis_index(names)], total, v)]",
        "return [v]",
        "accuracy_devices",
    ),
    Fault(
        "devices: squares overflow by their number",
        "_kernel/reduction",
        "return 0.5 ** ",
        "return 1.0 ** ",
        "accuracy_devices",
    ),
    Fault(
        "devices: squares underflow by the number of devices",
        "_kernel/reduction",
        "(min(number, self.devices.largest)",
        "(self.devices.largest",
        "accuracy_devices",
    ),
    Fault(
        "virtual batches: filled up with zeros that count",
        "_norms/virtual_batches",
        "mask = jnp.ones((1,) * x.ndim, bool)",
        "pass",
        "virtual_batches",
    ),
    Fault(
        "virtual batches: each group has a state",
        "_norms/virtual_batches",
        "return VirtualBatches(None, average, average)",
        "return VirtualBatches(None, average, None)",
        "virtual_batches",
    ),
    Fault(
        "explicit axes: the state as x is sharded",
        "_norms/running_statistics",
        "value, kept = shard_as(value, old), old.astype(dtype)",
        "kept = old.astype(dtype)",
        "explicit",
    ),
    # The other norms.
    Fault(
        "renorm: r without its lower limit",
        "_norms/batch_renorm",
        "running, 1 / r_max, r_max)",
        "running, 0, r_max)",
        "batch_renorm family",
    ),
    Fault(
        "instance norm: one example enters",
        "_norms/instance_norm",
        "range(len(examples)))",
        "range(len(examples)))[:1]",
        "instance_norm",
    ),
    # Layers.
    Fault(
        "layers: momentum is the function's",
        "_layers/flax_options",
        "else 1 - layer.momentum",
        "else layer.momentum",
        "linen nnx",
    ),
    Fault(
        "layers: correction as in PyTorch",
        "_layers/flax_options",
        "correction=layer.correction",
        "correction=1",
        "linen nnx",
    ),
    Fault(
        "layers: masks as in the functions",
        "_layers/flax_options",
        "aligned = (1,) * (x.ndim - mask.ndim) + mask.shape",
        "aligned = mask.shape + (1,) * (x.ndim - mask.ndim)",
        "linen nnx",
    ),
    Fault(
        "layers: domains share the first's state",
        "_layers/flax_options",
        "take_domain(state, domain)",
        "take_domain(state, 0)",
        "domains",
    ),
    # Around a trained network.
    Fault(
        "fold: bias loses the mean",
        "_statistics/fold_batch_norm",
        "(old_bias - mean) * factor",
        "old_bias * factor",
        "fold",
    ),
    Fault(
        "fold: kernels that wrappers compute",
        "fold/_pairs",
        "_variable_problem(trace, layer) or ",
        "",
        "fold_variables",
    ),
    Fault(
        "fold: variables with other users",
        "fold/_trace",
        "self.readers[origin].add(reader)",
        "pass",
        "fold_variables",
    ),
    Fault(
        "layers: integers in the dtype of the result",
        "_layers/flax_options",
        "statistics_dtype(jnp.dtype(dtype))",
        "dtype",
        "integers",
    ),
    Fault(
        "layers: strict where only shapes are used",
        "nnx/_shapes",
        'hasattr(layer, "_nnx_tabulate_id") or ',
        "",
        "only_shapes",
    ),
    Fault(
        "layers: a mode releases fixed statistics",
        "nnx/_batch_norm",
        "flax_options.check_mode(mode) or self.fixed_statistics",
        "flax_options.check_mode(mode)",
        "fixed_nnx",
    ),
    Fault(
        "layers: an update that was not wanted",
        "nnx/_batch_norm",
        "update = update and not evaluate",
        "update = not evaluate",
        "update_stats",
    ),
    Fault(
        "layers: statistics fixed in a program that was traced before",
        "linen/_fixed",
        "mutable=add(mutable, marker)",
        "mutable=mutable or []",
        "fixed_linen",
    ),
    Fault(
        "layers: gradients of scale and bias that were to stop",
        "linen/_fixed",
        "jax.lax.stop_gradient(param(*args, **kwargs))",
        "param(*args, **kwargs)",
        "fixed_linen",
    ),
    Fault(
        "layers: a path that is part of a name",
        "_layers/chosen",
        """startswith(f"{p.rstrip('/')}/")""",
        """startswith(p.rstrip("/"))""",
        "fixed_nnx",
    ),
    Fault(
        "data set: no variance between batches",
        "_statistics/batch_stream",
        "shift * shift * self._count",
        "0 * self._count",
        "data_moments recalibrate_functions",
    ),
    Fault(
        "watch: what a base class is given is not seen",
        "_observe/watch",
        "if cls in watch.within:",
        "if False:",
        "watch recalibrate_nnx",
    ),
    Fault(
        "observe: statistics of the batch stay in the layer",
        "_observe/calls",
        "self.write(name, old)",
        "pass",
        "calls",
    ),
    Fault("fold: outputs are not compared", "fold/_fold", "if difference <= limit:", "if True:", "fold_pairs"),
    Fault(
        "recalibrate: moments of the last call alone",
        "recalibrate/_flax_step",
        "before.moments.merge(m)",
        "m",
        "recalibrate_linen recalibrate_nnx",
    ),
    Fault(
        "diagnose: what could not be compared is no gap",
        "diagnose/_examine",
        'unknown.append(NotChecked(("depends_on_batch",)',
        '[].append(NotChecked(("depends_on_batch",)',
        "diagnose",
    ),
    Fault(
        "diagnose: the batch is judged by itself",
        "diagnose/_examine",
        "np.arange(total) < kept",
        "np.arange(total) < total",
        "diagnose",
    ),
    Fault(
        "diagnose: two projections have the same signs",
        "diagnose/_measure",
        "(bits >> np.uint32(k))",
        "(bits >> np.uint32(k // 2))",
        "diagnose",
    ),
    Fault(
        "recalibrate: no warning about few values",
        "recalibrate/_sweeps",
        "count < FEW_VALUES",
        "count < 0",
        "recalibrate_functions",
    ),
    Fault(
        "PyTorch: mean and variance exchanged",
        "interop/_torch_batch_norm",
        "bias, mean, var = (",
        "bias, var, mean = (",
        "one_norm layouts",
    ),
    Fault(
        "PyTorch: query and value exchanged",
        "interop/_matching",
        "return PROJECTIONS.index(role)",
        "return 2 - PROJECTIONS.index(role)",
        "attention",
    ),
    Fault(
        "PyTorch: stacked layers in reverse",
        "interop/_source",
        "for match in matches))",
        "for match in matches)[::-1])",
        "stacked",
    ),
    Fault(
        "report: a cause for each layer",
        "diagnose/_view/content",
        "(f.severity, f.kind, f.cause, f.cure), []",
        "(f.severity, f.kind, f.layer, f.cure), []",
        "report",
    ),
    Fault(
        "report: names in HTML are not escaped",
        "diagnose/_view/html",
        "<td{kind}>{escape(value)}</td>",
        "<td{kind}>{value}</td>",
        "report",
    ),
]
