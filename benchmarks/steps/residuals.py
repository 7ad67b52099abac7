"""Bytes that reverse mode of one norm keeps, over the bytes of x."""

from __future__ import annotations

from benchmarks.comparison import FUNCTIONS, Comparison, kept_bytes
from benchmarks.implementations import NORMS, PROGRAMS, Case, arrays

SHAPE = (8, 28, 28, 128)


def measure() -> list[Comparison]:
    rows = []
    for norm in NORMS:
        for dtype in ("float32", "bfloat16"):
            case = Case(norm, SHAPE, dtype)
            x, _ = arrays(case)
            values = {}
            for name, program in FUNCTIONS.items():
                train, _, params = PROGRAMS[program](case)
                values[name] = kept_bytes(train, x, params, has_aux=True) / x.nbytes
            rows.append(Comparison("residuals", norm, dtype, "x", values))
    return rows
