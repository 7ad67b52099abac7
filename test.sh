#!/usr/bin/env bash
# Everything that must pass before a change lands: formatting, lint, types, tests, docstring examples and README.
# Runs in .venv: makes it if there is none (PYTHON chooses the interpreter), and adds the extra dev of pyproject.toml to
# it, whoever made it; nothing in it is removed. Arguments go to pytest.
# With --quick first: the essential tests alone, in the environment as it is.
set -euo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = --quick ]; then
  shift
  exec .venv/bin/python -m pytest --numprocesses auto -m "not slow" "$@"
fi
[ -e .venv ] || "${PYTHON:-python3}" -m venv .venv
python=$(.venv/bin/python --version)
if [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" --version)" != "$python" ]; then
  echo "PYTHON: expected that of .venv, $python, got $("$PYTHON" --version); remove .venv to make it anew" >&2
  exit 2
fi
wanted=$(echo "$python"; cat pyproject.toml)
if [ "$wanted" != "$(cat .venv/installed 2>/dev/null)" ]; then
  echo "installing jaxbn with its extra dev into .venv ($python)"
  .venv/bin/pip install --quiet --editable '.[dev]'
  .venv/bin/pip list 2>/dev/null | grep --extended-regexp '^(flax|jax|jaxlib|mypy|numpy|optax|pytest|ruff) '
  echo "$wanted" > .venv/installed
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses auto "$@"
