"""Training in several processes, as on several hosts, checked against one process.

The example starts the processes on this machine, each with a few simulated CPU devices. They run the code
that hosts with accelerators would run: `jax.distributed`, one mesh over all devices, and arrays of which each
process holds a part. Afterwards, one device repeats each step with the whole batch.

    python examples/multihost.py --processes 2 --devices 2     # less than a minute on two cores
    python examples/multihost.py --die 5      # the last process dies; the others end, too, and do not hang
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import _command
import jax
import numpy as np
from _data import batches, load
from data_parallel import AXIS, BATCH_SIZE, P, TrainState, difference, init, shard_map_step, train_step
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

# The allowed difference after one step, relative to an array's largest value. Over 70 seeds the order of summation
# changed arrays by up to 5 eps, and the first norm's bias by up to 12: after the first step it is nothing but its
# gradient, a sum whose terms nearly cancel.
TOLERANCE = 64 * float(np.finfo(np.float32).eps)
HOST = "127.0.0.1"
# How long, in seconds, the launcher waits after the runtime's own time-out before it kills processes.
MARGIN = 5
# The exit status of the process that dies.
DIED = 3


def work(arguments: argparse.Namespace) -> None:
    """Runs one of the processes: trains with the others, and writes the results of all steps to the folder."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    # Gloo listens at the address of this machine's name, and the coordinator below only at HOST.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"{HOST}:{arguments.port}"
    jax.distributed.initialize(
        address,
        arguments.processes,
        arguments.worker,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        # By default these take up to five minutes, in which the others would wait for a process that has died.
        initialization_timeout=arguments.timeout,
        heartbeat_timeout_seconds=arguments.timeout,
        shutdown_timeout_seconds=arguments.timeout,
    )
    # Over the devices of all processes. Auto: under jit, the compiler decides how they share the work.
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    for mode in arguments.modes:
        steps = train_with_others(mode, mesh, arguments)
        np.savez(arguments.folder / f"{mode}{arguments.worker}.npz", *jax.tree.leaves(steps))
    jax.distributed.shutdown()


def train_with_others(mode: str, mesh: jax.sharding.Mesh, arguments: argparse.Namespace) -> tuple[TrainState, Any]:
    """Returns the states and the losses after each step, stacked."""
    sharded, replicated = jax.NamedSharding(mesh, P(AXIS)), jax.NamedSharding(mesh, P())
    if mode == "jit":
        # The batch is one global array, so its statistics are global without an option.
        step: Callable[..., Any] = jax.jit(train_step, out_shardings=replicated)
    else:
        step = shard_map_step(mesh, functools.partial(train_step, axis_name=AXIS), P())
    # This process's part of each batch. Here each process makes the whole batch; with real data, it loads its part.
    size = BATCH_SIZE // arguments.processes
    own = slice(arguments.worker * size, (arguments.worker + 1) * size)

    state = jax.device_put(init(arguments.seed), replicated)
    results = []
    data = batches(load(), BATCH_SIZE, arguments.seed)
    # None: no bar where the output is not a terminal. Only the first process has one.
    bar = tqdm(range(arguments.steps), desc=mode, unit="step", disable=True if arguments.worker else None)
    for number, batch in zip(bar, data, strict=False):
        if number == arguments.die and arguments.worker == arguments.processes - 1:
            os._exit(DIED)
        images, labels = (jax.make_array_from_process_local_data(sharded, v[own]) for v in batch)
        state, loss = step(state, images, labels)
        results.append(jax.device_get((state, loss)))
    stacked: tuple[TrainState, Any] = jax.tree.map(lambda *v: np.stack(v), *results)
    return stacked


def launch(arguments: argparse.Namespace, folder: pathlib.Path) -> str | None:
    """Starts the processes and waits until all have ended; returns what went wrong, or None."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    # --devices says how many devices there are, and the processes of one machine must not talk through a proxy.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.lower().endswith("_proxy")}
    ended: queue.Queue[tuple[int, int]] = queue.Queue()

    def watch(number: int, worker: subprocess.Popen[str]) -> None:
        assert worker.stdout is not None
        for line in worker.stdout:
            # Gloo prints a line for each connection.
            if not line.startswith("[Gloo] Rank"):
                print(f"[process {number}] {line}", end="", flush=True)
        ended.put((number, worker.wait()))

    workers = []
    # The processes inherit that they ignore Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for number in range(arguments.processes):
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += ["--worker", str(number), "--port", str(port), "--folder", str(folder)]
            # The standard error of process 0 is that of the launcher, for the progress bar.
            stderr = subprocess.STDOUT if number else None
            worker = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=stderr)
            workers.append(worker)
            threading.Thread(target=watch, args=(number, worker), daemon=True).start()

        signal.signal(signal.SIGINT, handler)

        # They end together. If one dies, the runtime ends the others within its time-out.
        number, code = ended.get()
        start = time.monotonic()
        codes = {number: code}
        while len(codes) < len(workers):
            try:
                left = start + arguments.timeout + MARGIN - time.monotonic()
                number, code = ended.get(timeout=max(left, 0))
            except queue.Empty:
                break
            codes[number] = code
        failed = next((number for number, code in codes.items() if code), None)
        stuck = [number for number in range(arguments.processes) if number not in codes]
        if failed is None and not stuck:
            return None
        seconds = time.monotonic() - start
        problem = f"process {failed} died with exit code {codes[failed]}" if failed is not None else "not all ended"
        if stuck:
            return f"{problem}; processes still running {seconds:.0f} s later, and killed: {stuck}"
        return f"{problem}; the other processes ended within {seconds:.0f} s"
    finally:
        # All before any is waited for: a process that outlives another one reports that as an error.
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.wait()


def check(arguments: argparse.Namespace, results: dict[tuple[str, int], Any], console: Console) -> str | None:
    """Repeats each step on one device, and prints how much each process differs; returns what is wrong, or None.

    The device starts each step from the process's state, because training over many steps magnifies rounding errors.
    """
    jax.config.update("jax_platforms", "cpu")
    alone = jax.jit(train_step)
    digits = load()
    title = (
        f"{arguments.processes} processes of {arguments.devices} devices against one device, {arguments.steps} steps"
    )
    parts = ("loss", "parameters", "running statistics")
    table = Table("mode", "process", *parts, title=title, caption="largest relative difference after a step")
    wrong = []
    for mode in arguments.modes:
        for number in range(arguments.processes):
            state, differences = init(arguments.seed), []
            states, losses = jax.tree.unflatten(jax.tree.structure((state, 0)), results[mode, number])
            for k, batch in zip(range(arguments.steps), batches(digits, BATCH_SIZE, arguments.seed), strict=False):
                expected, loss = alone(state, *batch)
                state = jax.tree.map(lambda v, k=k: v[k], states)
                pairs = ((losses[k], loss), (state.params, expected.params), (state.norm, expected.norm))
                differences.append([difference(*pair) for pair in pairs])
            largest = np.max(differences, axis=0)
            table.add_row(mode, str(number), *(f"{d:.1e}" for d in largest))
            # `d > TOLERANCE` would be False for NaN.
            wrong += [
                f"{name} of {mode}, process {number}"
                for name, d in zip(parts, largest, strict=True)
                if not d <= TOLERANCE
            ]
    console.print(table)
    if wrong:
        return f"expected the results of one device, to {TOLERANCE:.1e}; these differ: {'; '.join(wrong)}"
    console.print(f"All processes agree with one to {TOLERANCE:.1e}; loss {losses[0]:.4f} to {losses[-1]:.4f}.")
    return None


def main() -> str | None:
    parser = _command.Parser(__doc__)
    parser.add_seed()
    at_least_1 = _command.whole_number(1)
    parser.add_argument("--processes", type=at_least_1, default=2, help="how many (default: 2)")
    parser.add_argument("--devices", type=at_least_1, default=2, help="of each process (default: 2)")
    parser.add_argument("--mode", choices=["jit", "shard_map"], help="default: both, one after the other")
    parser.add_argument("--steps", type=at_least_1, default=10, help="of training (default: 10)")
    parser.add_argument(
        "--timeout",
        type=at_least_1,
        default=30,
        help="seconds after which a silent process counts as dead (default: 30)",
    )
    parser.add_argument(
        "--die", type=_command.whole_number(0), metavar="STEP", help="the last process exits before this step"
    )
    for name, kind in (("--worker", int), ("--port", int), ("--folder", pathlib.Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if BATCH_SIZE % (arguments.processes * arguments.devices):
        parser.error(f"--processes, --devices: expected a product that divides the batch size of {BATCH_SIZE}")
    if arguments.die is not None and arguments.die >= arguments.steps:
        parser.error(f"argument --die: expected one of the steps 0 to {arguments.steps - 1}, got {arguments.die}")
    arguments.modes = [arguments.mode] if arguments.mode else ["jit", "shard_map"]

    if arguments.worker is not None:
        work(arguments)
        return None
    # The processes run until they are ended, and the folder exists until it is removed, so Ctrl-C is an exception here.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    results = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            if problem := launch(arguments, pathlib.Path(folder)):
                return problem
            for mode in arguments.modes:
                for number in range(arguments.processes):
                    with np.load(pathlib.Path(folder) / f"{mode}{number}.npz") as file:
                        results[mode, number] = list(file.values())
    except KeyboardInterrupt:
        _command.interrupted()
    signal.signal(signal.SIGINT, handler)
    return check(arguments, results, Console())


if __name__ == "__main__":
    sys.exit(main())
