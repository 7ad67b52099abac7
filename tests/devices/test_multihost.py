"""Several processes train as one does, and none waits for one that has died."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
import unoptimized
from versions import needs

pytestmark = [pytest.mark.slow, needs("time-outs in jax.distributed.initialize", jax="0.9.2")]

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "multihost.py"
TIMEOUT, MARGIN = 10, 5


def run(*options):
    """The example's exit code and output; whatever of it still runs after five minutes is killed."""
    # Without the eight devices of the other tests: the example has its own number.
    environment = os.environ | unoptimized.ENVIRONMENT | {"COLUMNS": "80"}
    process = subprocess.Popen(
        [sys.executable, EXAMPLE, *options],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A group of its own, so that its processes can be killed with it.
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"still running after five minutes:\n{process.communicate()[0]}") from None
    return process.returncode, output


def test_processes_agree_with_one():
    # As a user runs it: another number of steps may hide what these show.
    code, output = run()
    assert code == 0, output
    assert "All processes agree with one to 7.6e-06" in output
    for mode in ("jit", "shard_map"):
        for process in (0, 1):
            assert re.search(rf"{mode} +│ {process} ", output), output


def test_a_process_that_dies_ends_the_others():
    code, output = run("--steps", "4", "--mode", "jit", "--die", "2", "--timeout", str(TIMEOUT))
    assert code == 1, output
    # Last, after all that the runtime has to say.
    ended = re.search(r"process 1 died with exit code 3; the other processes ended within (\d+) s\s*$", output)
    assert ended, output
    assert int(ended[1]) <= TIMEOUT + MARGIN
