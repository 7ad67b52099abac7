"""What reverse mode keeps; how often a compiled program sums all of x, and what devices send in it."""

import io
import math
import re
from contextlib import redirect_stdout

import jax
from jax.ad_checkpoint import print_saved_residuals

from benchmarks.chips import hlo


def saved(function, *arguments):
    """Dtype and shape of each array that reverse mode of `function` keeps."""
    text = io.StringIO()
    with redirect_stdout(text):
        print_saved_residuals(function, *arguments)
    return [
        (dtype, tuple(map(int, shape.split(","))))
        for dtype, shape in re.findall(r"^(\w+)\[([\d,]+)\]", text.getvalue(), re.M)
    ]


def sums(function, x, *arguments):
    """How many sums over float32 arrays as large as `x` are in the compiled function."""
    text = jax.jit(function).lower(x, *arguments).compile().as_text()
    shapes = dict(re.findall(r"(%\S+) = f32\[([\d,]+)\]", text))
    summed = [shapes.get(operand, "0") for operand in re.findall(r" reduce\((%\S+),", text)]
    return sum(math.prod(map(int, shape.split(","))) == x.size for shape in summed)


def collectives(function, *arguments):
    """How many of each kind the compiled program has, and the largest number of values that one hands a device."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    largest = 0
    for result, _ in re.findall(hlo.COLLECTIVES, text):
        shapes = re.findall(r"\w+\[([\d,]*)\]", result)
        largest = max(largest, sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes))
    return hlo.collectives(text), largest
