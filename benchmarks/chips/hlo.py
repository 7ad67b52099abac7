"""Figures of a compiled program, read from its text: memory traffic, kernels, collectives, and a TPU's cycles."""

from __future__ import annotations

import collections
import functools
import math
import re
from typing import NamedTuple

# Operations that move no data themselves. What the branches of a conditional read and write is not counted.
NO_TRAFFIC = {"parameter", "tuple", "get-tuple-element", "bitcast", "conditional", "constant", "after-all"}
KERNELS = {"fusion", "custom-call", "convolution", "copy"}
SLICES = {"slice", "dynamic-slice"}
# An asynchronous collective is two operations, of which only the second has its result alone.
COLLECTIVES = r" = (\(.*?\)|\S+) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-done)?\("


class Instruction(NamedTuple):
    name: str
    size: int  # Bytes of the result.
    operation: str
    operands: list[str]  # Names; of a parameter its number.
    calls: str | None  # The computation that a fusion runs.


def collectives(text: str) -> dict[str, int]:
    """How many collectives of each kind the whole program has."""
    return dict(collections.Counter(kind for _, kind in re.findall(COLLECTIVES, text)))


def received(text: str) -> int:
    """Bytes of the results of all collectives, which is what each device gets of the others."""
    return sum(_size(result) for result, _ in re.findall(COLLECTIVES, text))


def cycles(text: str) -> int:
    """The sum of the cycles that the TPU's compiler estimates for each operation."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def kernels(text: str) -> int:
    return sum(i.operation in KERNELS for i in computations(text)["ENTRY"])


def traffic(text: str) -> int:
    """Bytes of the operands and results of the top-level operations.

    An operand counts once however often the operation reads it, and an operand that a fusion only slices counts
    as the slices.
    """
    found = computations(text)
    total, sizes = 0, {}
    for i in found["ENTRY"]:
        sizes[i.name] = i.size
        if i.operation not in NO_TRAFFIC:
            sliced = _sliced_parameters(found.get(i.calls or "", []))
            read = {name: sliced.get(k, sizes.get(name, 0)) for k, name in enumerate(i.operands)}
            total += i.size + sum(read.values())
    return total


@functools.lru_cache(maxsize=1)
def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation by its name; the top level is "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    for line in text.splitlines():
        if header := re.match(r"(ENTRY|%\S+) .*\{$", line):
            found[header[1]] = current = []
        elif match := re.match(r"\s+(?:ROOT )?(%\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)", line):
            name, result, operation, operands, rest = match.groups()
            calls = re.search(r"calls=(%[\w.-]+)", rest)
            names = [operands] if operation == "parameter" else re.findall(r"%[\w.-]+", operands)
            current.append(Instruction(name, _size(result), operation, names, calls and calls[1]))
    return found


def _size(result: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(math.prod(map(int, filter(None, shape.split(",")))) * _bits(dtype) // 8 for dtype, shape in arrays)


def _bits(dtype: str) -> int:
    """The first number in names such as f32, bf16 and f8e4m3fn; booleans take a byte, and tokens nothing."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else {"pred": 8, "token": 0}[dtype]


def _sliced_parameters(instructions: list[Instruction]) -> dict[int, int]:
    """For each parameter of a fusion that is used by slices alone, the bytes of these slices."""
    sizes = {}
    for parameter in instructions:
        if parameter.operation == "parameter":
            users = [i for i in instructions if parameter.name in i.operands]
            if users and all(i.operation in SLICES for i in users):
                sizes[int(parameter.operands[0])] = sum(i.size for i in users)
    return sizes
