"""Does the suite notice deliberate faults? Each is one change to one line of the library, in a copy of the checkout.

    .venv/bin/python tests/faults.py                      # all of them; about four minutes on two cores
    .venv/bin/python tests/faults.py "mask" "momentum"    # those whose name contains one of these

A fault is given to the tests that are about it: first to those of them in the quick loop, and, if these pass, to the
rest of them. Exits with 1 if a fault passes both. It is not part of the normal run.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Fault(NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; `tests` are the modules that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


FAULTS = [
    # Moments.
    Fault("sums without a pivot", "_kernel/sums", "d = x - separate_copy(pivot, 1)", "d = x", "accuracy"),
    Fault("a pivot that compilers may fuse", "_kernel/xla", "info.nmant - 1)", "info.nmant)", "accuracy moments"),
    Fault(
        "the mean loses its second number", "_kernel/sums", "jnp.where(constant, 0, lo)", "0 * lo", "accuracy moments"
    ),
    Fault("constants keep their rounding", "_kernel/sums", "<= 64 * float", "<= -64 * float", "degenerate"),
    Fault(
        "merge: sets weigh the same",
        "_kernel/moments",
        "weight = parts.count / jnp.maximum(total, 1)",
        "weight = jnp.ones_like(parts.count) / parts.count.shape[axis]",
        "moments",
    ),
    Fault("merge: no variance between sets", "_kernel/moments", "parts.var + shift * shift", "parts.var", "moments"),
    Fault(
        "mask: counts what it hides",
        "_kernel/sums",
        "entries.astype(x.dtype) * values",
        "0 * entries + x.size",
        "values",
    ),
    Fault(
        "mask: counts broadcast axes once",
        "_kernel/sums",
        "entries.astype(x.dtype) * values",
        "entries * 1.0",
        "family",
    ),
    Fault("mask: sums what it hides", "_kernel/sums", "jnp.where(mask, x, 0), reduced", "x, reduced", "values"),
    Fault("mask: NaN stays", "_kernel/moments", "jnp.where(mask | jnp.isfinite(x), x, 0)", "x", "gradients"),
    Fault(
        "statistics of float64 in float32",
        "_kernel/inputs",
        "np.float64 if dtype == np.float64 else np.float32",
        "np.float32",
        "family",
    ),
    Fault(
        "accelerators: sums about zero for float32",
        "_kernel/sums",
        "input_dtype == jnp.bfloat16",
        "input_dtype != jnp.float64",
        "platforms",
    ),
    Fault(
        "accelerators: the pivot from the first value",
        "_kernel/sums",
        "return jax.lax.slice(x, starts, stops, steps)",
        "return jax.lax.slice(x, [0] * x.ndim, [1 if a in reduced else n for a, n in enumerate(x.shape)])",
        "platforms",
    ),
    # Derivatives.
    Fault("derivative of the variance halved", "_kernel/moments", "2 * (means[0]", "1 * (means[0]", "gradients"),
    Fault(
        "derivative of the mean dropped",
        "_kernel/moments",
        "Moments(means[1], 2",
        "Moments(0 * means[1], 2",
        "gradients",
    ),
    Fault("product rule without scale", "_kernel/normalize", "separate_copy(factor, 2) * dscale", "dscale", "family"),
    Fault(
        "reverse mode keeps everything",
        "_kernel/moments",
        "save_only_these_names(MOMENTS_NAME)",
        "everything_saveable",
        "gradients",
    ),
    Fault(
        "gradients enter eval's statistics",
        "_kernel/normalize",
        "moments = jax.lax.stop_gradient(moments)",
        "",
        "gradients",
    ),
    Fault(
        "gradients enter the state", "_norms/batch_norm", "moments = jax.lax.stop_gradient(moments)", "", "gradients"
    ),
    Fault(
        "gradients enter renorm's correction", "_norms/batch_renorm", "m = jax.lax.stop_gradient(m)", "", "batch_renorm"
    ),
    # Normalizing.
    Fault("eps beside the root", "_kernel/normalize", "some / jnp.sqrt(v)", "some / (jnp.sqrt(m.var) + eps)", "values"),
    Fault("half precision throughout", "_kernel/normalize", "prepared = prepare(x, mask)", "prepared = x", "family"),
    Fault("dtype is ignored", "_kernel/inputs", "x.dtype if dtype is None else dtype", "x.dtype", "family"),
    Fault(
        "groups of neighbours mixed",
        "_kernel/moments",
        "jnp.repeat(v, channels // self.number, self.axis)",
        "jnp.tile(v, channels // self.number)",
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
        "jnp.where(has_var, count - correction, 1)",
        "jnp.where(has_var, count, 1)",
        "values",
    ),
    Fault(
        "an empty batch enters",
        "_norms/running_statistics",
        "jnp.where(number > 0, ",
        "jnp.where(number > -1, ",
        "degenerate",
    ),
    Fault(
        "an empty batch is counted",
        "_norms/running_statistics",
        "jnp.any(mean_number > 0)",
        "jnp.any(mean_number > -1)",
        "degenerate",
    ),
    Fault(
        "sync: replicas without batches weigh",
        "_norms/running_statistics",
        "((leaf.num_batches_tracked > 0) | ",
        "((leaf.num_batches_tracked > -1) | ",
        "sync",
    ),
    # Devices.
    Fault(
        "devices: no gather",
        "_kernel/moments",
        "return local if devices is None else _merge_devices(local, devices)",
        "return local",
        "sync",
    ),
    Fault(
        "devices: no sum in the derivative",
        "_kernel/moments",
        "list(devices.sum(jnp.stack(totals)))",
        "list(jnp.stack(totals))",
        "sync",
    ),
    Fault(
        "devices: a shorter group repeats itself",
        "_kernel/devices",
        "[place < len(group) for place",
        "[True for place",
        "sync",
    ),
    Fault(
        "virtual batches: filled up with zeros that count",
        "_kernel/virtual_batches",
        "mask = jnp.ones((1,) * x.ndim, bool)",
        "pass",
        "virtual_batches",
    ),
    Fault(
        "virtual batches: each group has a state",
        "_kernel/virtual_batches",
        "return VirtualBatches(None, average, average)",
        "return VirtualBatches(None, average, None)",
        "virtual_batches",
    ),
    Fault(
        "explicit axes: the state as x is sharded",
        "_norms/running_statistics",
        "total, number = shard_as(total, old), shard_as(number, old)",
        "pass",
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
        "fold: bias loses the mean", "_norms/fold_batch_norm", "(old_bias - mean) * factor", "old_bias * factor", "fold"
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
        "setdefault(origin, set()).add(reader)",
        "get(origin)",
        "fold_variables",
    ),
    Fault(
        "layers: integers in the dtype of the result",
        "_layers/flax_options",
        "inputs.statistics_dtype(jnp.dtype(dtype))",
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
        "data set: no variance between batches",
        "_norms/batch_stream",
        "shift * shift * self._count",
        "0 * self._count",
        "data_moments recalibrate",
    ),
    Fault(
        "watch: what a base class is given is not seen",
        "_observe/watch",
        "if cls in watch.within:",
        "if False:",
        "watch recalibrate",
    ),
    Fault(
        "recalibrate: moments of the last call alone",
        "recalibrate/_flax_step",
        "before.moments.merge(m)",
        "m",
        "recalibrate",
    ),
    Fault(
        "diagnose: a batch of one that fails is no gap",
        "diagnose/_network",
        'missing += [NotChecked(("depends_on_batch",)',
        'unused = [NotChecked(("depends_on_batch",)',
        "diagnose",
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
        "third = PROJECTIONS.index(role)",
        "third = 2 - PROJECTIONS.index(role)",
        "attention",
    ),
    Fault(
        "PyTorch: stacked layers in reverse",
        "interop/_finding",
        "for index in sorted(wanted)",
        "for index in sorted(wanted, reverse=True)",
        "stacked",
    ),
    Fault(
        "report: a cause for each layer",
        "diagnose/_content",
        "(f.severity, f.kind, f.cause, f.cure), []",
        "(f.severity, f.kind, f.layer, f.cure), []",
        "report",
    ),
    Fault(
        "report: names in HTML are not escaped",
        "diagnose/_html",
        "<td{kind}>{escape(value)}</td>",
        "<td{kind}>{value}</td>",
        "report",
    ),
]


def copy_checkout(folder: pathlib.Path) -> pathlib.Path:
    """The files of HEAD, in `folder`."""
    archive = folder / "head.tar"
    subprocess.run(["git", "archive", "--output", archive, "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


def run_tests(checkout: pathlib.Path, modules: str, *options: str) -> bool:
    """Whether a test fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options]
    for module in modules.split():
        # Without a path, pytest would run everything.
        (path,) = checkout.glob(f"tests/*/test_{module}.py")
        command.append(str(path))
    environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache")}
    finished = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    # 5: no test of these is in the quick loop.
    if finished.returncode not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with {finished.returncode}:\n{finished.stdout[-2000:]}{finished.stderr}")
    return finished.returncode == 1


def try_fault(fault: Fault) -> str:
    """Which tests notice."""
    with tempfile.TemporaryDirectory() as folder:
        checkout = copy_checkout(pathlib.Path(folder))
        path = checkout / "jaxbn" / f"{fault.file}.py"
        source = path.read_text()
        if source.count(fault.old) != 1:
            raise ValueError(f"{fault.name}: expected {fault.old!r} once in {path.name}, got {source.count(fault.old)}")
        path.write_text(source.replace(fault.old, fault.new))
        if run_tests(checkout, fault.tests, "-m", "not slow"):
            return "quick"
        return "whole" if run_tests(checkout, fault.tests) else "NOBODY"


def main(wanted: list[str]) -> int:
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, check=True, capture_output=True, text=True)
    if changed.stdout:
        print(f"expected a clean checkout, got changes; commit or stash them:\n{changed.stdout}", file=sys.stderr)
        return 2
    faults = [fault for fault in FAULTS if not wanted or any(part in fault.name for part in wanted)]
    noticed = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for fault, tests in zip(faults, pool.map(try_fault, faults), strict=True):
            noticed.append(tests)
            print(f"{tests:7} {fault.name}", flush=True)
    quick, nobody = noticed.count("quick"), noticed.count("NOBODY")
    print(f"{len(faults)} faults: the whole suite notices {len(faults) - nobody}, the quick loop {quick}")
    return int("NOBODY" in noticed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
