"""What can be read from a compiled program: memory traffic, kernels, collectives, and on TPUs the expected cycles."""

from __future__ import annotations

import collections
import functools
import math
import re
from typing import NamedTuple

BYTES = {"f64": 8, "s64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}
NO_TRAFFIC = {"parameter", "tuple", "get-tuple-element", "bitcast", "conditional", "constant", "after-all"}
KERNELS = {"fusion", "custom-call", "convolution", "copy"}
SLICES = {"slice", "dynamic-slice"}
COLLECTIVES = r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


class Instruction(NamedTuple):
    name: str
    size: int  # Bytes of the result.
    operation: str
    operands: list[str]
    calls: str | None


def collectives(text: str) -> dict[str, int]:
    return dict(collections.Counter(re.findall(COLLECTIVES, text)))


def cycles(text: str) -> int:
    """What TPU's compiler expects all operations to take, one after the other."""
    return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text)))


def kernels(text: str) -> int:
    return sum(i.operation in KERNELS for i in computations(text)["ENTRY"])


def traffic(text: str) -> int:
    """Bytes that the operations of the program's top level read and write.

    An operand that a fusion only slices counts as the slices. What a fused loop reads twice counts once:
    that is the cache's business.
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
    """The instructions of each computation by its name; the program's top level is "ENTRY"."""
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
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
    return sum(BYTES.get(dtype, 4) * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in shapes)


def _sliced_parameters(instructions: list[Instruction]) -> dict[int, int]:
    """Bytes of the slices of those parameters of a fusion of which nothing but slices is used."""
    sizes = {}
    for parameter in instructions:
        if parameter.operation == "parameter":
            users = [i for i in instructions if parameter.name in i.operands]
            if users and all(i.operation in SLICES for i in users):
                sizes[int(parameter.operands[0])] = sum(i.size for i in users)
    return sizes
