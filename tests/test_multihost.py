"""Several processes train as one does, and none waits for one that has died."""

import os
import pathlib
import re
import signal
import subprocess
import sys

EXAMPLE = pathlib.Path(__file__).parent.parent / "examples" / "multihost.py"
TIMEOUT, MARGIN = 10, 5


def run(*options):
    """The example's exit code and output; whatever of it still runs after a minute is killed."""
    # Without the eight devices of the other tests: the example has its own number.
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, EXAMPLE, "--processes", "2", "--devices", "2", "--timeout", str(TIMEOUT), *options]
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A group of its own, so that its processes can be killed with it.
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after a minute:\n{process.communicate()[0]}") from None
    return process.returncode, output


def test_processes_agree_with_one():
    code, output = run("--steps", "4")
    assert code == 0, output
    assert "All processes agree with one to 0.0001" in output
    for mode in ("jit", "shard_map"):
        for process in (0, 1):
            assert re.search(rf"{mode} +│ {process} ", output), output


def test_a_process_that_dies_ends_the_others():
    code, output = run("--steps", "4", "--mode", "jit", "--die", "2")
    assert code == 1, output
    # Last, after all that the runtime has to say.
    ended = re.search(r"process 1 died with exit code 3; the other processes ended within (\d+) s\s*$", output)
    assert ended, output
    assert int(ended[1]) <= TIMEOUT + MARGIN
