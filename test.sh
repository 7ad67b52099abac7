#!/usr/bin/env bash
# Everything that must pass before a change lands: formatting, lint, types, tests, docstring examples and README.
# Makes its own virtual environment, once; PYTHON chooses the interpreter. Arguments go to pytest.
# With --quick first: the essential tests alone, in the environment as it is.
set -euo pipefail
cd "$(dirname "$0")"
if [ "${1:-}" = --quick ]; then
  shift
  exec .venv/bin/python -m pytest --numprocesses auto -m "not slow" "$@"
fi
wanted=$("${PYTHON:-python3}" --version; cat pyproject.toml)
if [ "$wanted" != "$(cat .venv/installed 2>/dev/null)" ]; then
  "${PYTHON:-python3}" -m venv --clear .venv
  .venv/bin/pip install --quiet --editable '.[dev]'
  echo "$wanted" > .venv/installed
fi
.venv/bin/ruff format --check .
.venv/bin/ruff check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses auto "$@"
