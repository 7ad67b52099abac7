"""The picture of the norms in docs/ colours what it should, as the library computes it."""

import importlib.util
import pathlib

import numpy as np
import pytest

spec = importlib.util.spec_from_file_location(
    "draw_norms", pathlib.Path(__file__).parents[2] / "docs" / "draw_norms.py"
)
draw_norms = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw_norms)

n, c, h, w = draw_norms.MARKED
EXPECTED = {
    "Batch norm": np.s_[:, c],
    "Batch norm in evaluation": np.s_[n, c, h, w],
    "Virtual batches (ghost batch norm)": np.s_[:2, c],
    "Instance norm": np.s_[n, c],
    "Group norm": np.s_[n, 2:4],
    "Layer norm of whole examples": np.s_[n],
    "Layer norm over channels": np.s_[n, :, h, w],
    "RMS norm over channels": np.s_[n, :, h, w],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", draw_norms.CALLS)
def test_cells(name):
    expected = np.zeros(draw_norms.SHAPE, bool)
    expected[EXPECTED[name]] = True
    np.testing.assert_array_equal(draw_norms.cells(draw_norms.CALLS[name]), expected)
