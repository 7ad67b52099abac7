"""What test.sh does with the environment that it finds, with programs that only print their names."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CHECKS = ["ruff format --check .", "ruff check .", "mypy", "python -m pytest --numprocesses auto"]
INSTALL = ["pip install --quiet --editable .[dev]", "pip list"]


@pytest.fixture
def checkout(tmp_path):
    """A checkout with an environment that somebody else made, and something in it."""
    for name in ("test.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "pip", "ruff", "mypy"):
        script = f'#!/bin/sh\n[ "$*" = --version ] && echo "Python 3.11.0" || echo "{name} $*" >> "{tmp_path}/calls"\n'
        # What test.sh shows of it.
        script += '[ "$*" = list ] && echo "jax 0.10.2"\nexit 0\n'
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    (tmp_path / ".venv" / "own").touch()
    return tmp_path


def run(checkout, *arguments, **environment):
    (checkout / "calls").write_text("")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    ended = subprocess.run(
        ["bash", checkout / "test.sh", *arguments], env=clean | environment, capture_output=True, text=True
    )
    return ended, [line.strip() for line in (checkout / "calls").read_text().splitlines()]


def test_an_environment_keeps_what_is_in_it(checkout):
    ended, calls = run(checkout)
    assert (ended.returncode, calls) == (0, INSTALL + CHECKS), ended.stderr
    assert ended.stdout == "installing jaxbn with its extra dev into .venv (Python 3.11.0)\njax 0.10.2\n"
    assert (checkout / ".venv" / "own").exists()
    assert run(checkout)[1] == CHECKS
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert run(checkout)[1] == INSTALL + CHECKS
    assert (checkout / ".venv" / "own").exists()


def test_another_interpreter_is_an_error(checkout):
    other = checkout / "python3.13"
    other.write_text('#!/bin/sh\necho "Python 3.13.1"\n')
    other.chmod(0o755)
    ended, calls = run(checkout, PYTHON=str(other))
    assert (ended.returncode, calls) == (2, [])
    assert ended.stderr == (
        "PYTHON: expected that of .venv, Python 3.11.0, got Python 3.13.1; remove .venv to make it anew\n"
    )


def test_the_quick_loop_installs_nothing(checkout):
    ended, calls = run(checkout, "--quick", "-x")
    assert (ended.returncode, calls) == (0, ["python -m pytest --numprocesses auto -m not slow -x"])
