"""Every example runs; what it finds out is its own to say, in a full run."""

import os
import pathlib
import subprocess
import sys

import pytest
import unoptimized

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
NAMES = [
    *("digits", "linen_resnet", "nnx_resnet", "data_parallel", "gradient_accumulation"),
    *("port_from_torch", "recalibrate", "diagnose"),
]


@pytest.mark.parametrize("name", NAMES)
def test_fast_run(name, tmp_path):
    # Without the eight devices of the other tests. Most of a fast run is compiling; that need not be done well.
    environment = os.environ | unoptimized.ENVIRONMENT
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", "--fast", "--out", tmp_path]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "fast run of" in finished.stdout.lower()
