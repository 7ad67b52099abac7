"""What reverse mode keeps."""

import io
import re
from contextlib import redirect_stdout

from jax.ad_checkpoint import print_saved_residuals


def saved(function, *arguments):
    """Dtype and shape of each array that reverse mode of `function` keeps."""
    text = io.StringIO()
    with redirect_stdout(text):
        print_saved_residuals(function, *arguments)
    return [
        (dtype, tuple(map(int, shape.split(","))))
        for dtype, shape in re.findall(r"^(\w+)\[([\d,]+)\]", text.getvalue(), re.M)
    ]
