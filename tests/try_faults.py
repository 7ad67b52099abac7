"""Does the suite notice deliberate faults? Each is one change to one line of the library, in a copy of the checkout.

    .venv/bin/python tests/try_faults.py                      # all of them; about four minutes on two cores
    .venv/bin/python tests/try_faults.py "mask" "momentum"    # those whose name contains one of these

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

from faults import FAULTS, Fault

ROOT = pathlib.Path(__file__).parent.parent


def copy_checkout(folder: pathlib.Path) -> pathlib.Path:
    """The files of HEAD, in `folder`."""
    archive = folder / "head.tar"
    subprocess.run(["git", "archive", "--output", archive, "HEAD"], cwd=ROOT, check=True)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder


def paths(checkout: pathlib.Path, tests: str) -> list[str]:
    """Of the modules and folders that `tests` names; a module test_NAME.py before a folder NAME."""
    found = []
    for name in tests.split():
        # Without a path, pytest would run everything.
        (path,) = [*checkout.glob(f"tests/*/test_{name}.py")] or checkout.glob(f"tests/{name}")
        found.append(str(path))
    return found


def run_tests(checkout: pathlib.Path, tests: str, *options: str) -> bool:
    """Whether a test fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *paths(checkout, tests)]
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
        path.write_text(fault.plant(path.read_text()))
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
