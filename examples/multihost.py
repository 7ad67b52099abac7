"""Training over several processes, as over several hosts, checked against one process.

The processes are started here, on this machine, with a few simulated CPU devices each. What they run
is what hosts with accelerators would run: `jax.distributed`, one mesh over all devices, and arrays of
which each process holds a part. Afterwards one device repeats each of their steps, with the whole batch.

    python examples/multihost.py --processes 2 --devices 2
    python examples/multihost.py --die 5        # the last process dies, and the others must not hang
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import numpy as np
from _data import batches, load
from data_parallel import AXIS, BATCH_SIZE, TOLERANCE, P, TrainState, difference, init, shard_map_step, train_step
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

HOST = "127.0.0.1"
# What the launcher waits beyond the runtime's own time-out before it kills.
MARGIN = 5
DIED = 3


def work(arguments: argparse.Namespace) -> None:
    """One of the processes: trains with the others, and writes what came of each step to the folder."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    # It listens at the address that this machine's name stands for; the coordinator below at HOST alone.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"{HOST}:{arguments.port}"
    jax.distributed.initialize(
        address,
        arguments.processes,
        arguments.worker,
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        # By default up to five minutes: for them the others would wait for one that has died.
        initialization_timeout=arguments.timeout,
        heartbeat_timeout_seconds=arguments.timeout,
        shutdown_timeout_seconds=arguments.timeout,
    )
    # Over the devices of all processes. Auto: under jit the compiler decides how they share the work.
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    for mode in arguments.modes:
        steps = train_with_others(mode, mesh, arguments)
        np.savez(arguments.folder / f"{mode}{arguments.worker}.npz", *jax.tree.leaves(steps))
    jax.distributed.shutdown()


def train_with_others(mode: str, mesh: jax.sharding.Mesh, arguments: argparse.Namespace) -> tuple[TrainState, Any]:
    """Returns the new states and the losses of all steps, stacked."""
    sharded, replicated = jax.NamedSharding(mesh, P(AXIS)), jax.NamedSharding(mesh, P())
    if mode == "jit":
        # The batch is one array, if cut over the processes: its statistics are global by themselves.
        step = jax.jit(train_step, out_shardings=replicated)
    else:
        step = shard_map_step(mesh, functools.partial(train_step, axis_name=AXIS), P())
    # This process's part of each global batch. Here all draw the whole; with real data each loads its own.
    size = BATCH_SIZE // arguments.processes
    own = slice(arguments.worker * size, (arguments.worker + 1) * size)

    state = jax.device_put(init(arguments.seed), replicated)
    results = []
    data = batches(load(), BATCH_SIZE, arguments.seed)
    # None: no bar where there is no terminal. One process is enough to show it.
    bar = tqdm(range(arguments.steps), desc=mode, unit="step", disable=True if arguments.worker else None)
    for number, batch in zip(bar, data, strict=False):
        if number == arguments.die and arguments.worker == arguments.processes - 1:
            os._exit(DIED)
        images, labels = (jax.make_array_from_process_local_data(sharded, v[own]) for v in batch)
        state, loss = step(state, images, labels)
        results.append(jax.device_get((state, loss)))
    return jax.tree.map(lambda *v: np.stack(v), *results)


def launch(arguments: argparse.Namespace, folder: pathlib.Path) -> str | None:
    """Starts the processes and waits for them; returns what went wrong, if anything. None is left behind."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    # The devices are counted by --devices, and a proxy has no business between processes of one machine.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS" and not k.lower().endswith("_proxy")}
    ended: queue.Queue[tuple[int, int]] = queue.Queue()

    def watch(number: int, worker: subprocess.Popen) -> None:
        for line in worker.stdout or ():
            print(f"[process {number}] {line}", end="", flush=True)
        ended.put((number, worker.wait()))

    workers = []
    try:
        for number in range(arguments.processes):
            command = [sys.executable, __file__, *sys.argv[1:]]
            command += ["--worker", str(number), "--port", str(port), "--folder", str(folder)]
            # Process 0 keeps the terminal, for its progress bar.
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if number else {}
            workers.append(subprocess.Popen(command, env=environment, text=True, **pipes))
            threading.Thread(target=watch, args=(number, workers[-1]), daemon=True).start()

        # They end together, unless one died; then the runtime ends the others within its time-out.
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
        for worker in workers:
            worker.kill()
            worker.wait()


def check(arguments: argparse.Namespace, folder: pathlib.Path, console: Console) -> str | None:
    """Repeats each step on one device and prints how far each process is from that; returns what differs, if anything.

    The device starts each step from the process's own state: over many steps training magnifies any rounding.
    """
    jax.config.update("jax_platforms", "cpu")
    alone = jax.jit(train_step)
    digits = load()
    title = f"{arguments.processes} processes of {arguments.devices} devices, {arguments.steps} steps, against one"
    parts = ("loss", "parameters", "running statistics")
    table = Table("mode", "process", *parts, title=title, caption="largest relative difference after a step")
    wrong = []
    for mode in arguments.modes:
        for number in range(arguments.processes):
            state, differences = init(arguments.seed), []
            with np.load(folder / f"{mode}{number}.npz") as file:
                states, losses = jax.tree.unflatten(jax.tree.structure((state, 0)), file.values())
            for k, batch in zip(range(arguments.steps), batches(digits, BATCH_SIZE, arguments.seed), strict=False):
                expected, loss = alone(state, *batch)
                state = jax.tree.map(lambda v, k=k: v[k], states)
                pairs = ((losses[k], loss), (state.params, expected.params), (state.norm, expected.norm))
                differences.append([difference(*pair) for pair in pairs])
            largest = np.max(differences, axis=0)
            table.add_row(mode, str(number), *(f"{d:.1e}" for d in largest))
            # Not `d > TOLERANCE`, which NaN is not.
            wrong += [
                f"{name} of {mode}, process {number}"
                for name, d in zip(parts, largest, strict=True)
                if not d <= TOLERANCE
            ]
    console.print(table)
    if wrong:
        return f"expected what one process gets, to {TOLERANCE:.1e}; these differ: {'; '.join(wrong)}"
    console.print(f"All processes agree with one to {TOLERANCE:.1e}; loss {losses[0]:.4f} to {losses[-1]:.4f}.")
    return None


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--devices", type=int, default=2, help="of each process (default: 2)")
    parser.add_argument("--mode", choices=["jit", "shard_map"], help="default: one after the other")
    parser.add_argument("--steps", type=int, default=30, help="default: 30")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the batches (default: 0)")
    parser.add_argument("--timeout", type=int, default=30, help="seconds after which a silent process is dead")
    parser.add_argument("--die", type=int, metavar="STEP", help="the last process exits at this step, without a word")
    for name, kind in (("--worker", int), ("--port", int), ("--folder", pathlib.Path)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("processes", "devices", "steps", "timeout"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(arguments, name)}")
    if BATCH_SIZE % (arguments.processes * arguments.devices):
        parser.error(f"--processes, --devices: expected a product that divides the batch of {BATCH_SIZE}")
    if arguments.die is not None and not 0 <= arguments.die < arguments.steps:
        parser.error(f"--die: expected one of the {arguments.steps} steps, counted from 0, got {arguments.die}")
    arguments.modes = [arguments.mode] if arguments.mode else ["jit", "shard_map"]

    if arguments.worker is not None:
        work(arguments)
        return None
    with tempfile.TemporaryDirectory() as folder:
        return launch(arguments, pathlib.Path(folder)) or check(arguments, pathlib.Path(folder), Console())


if __name__ == "__main__":
    sys.exit(main())
