"""Every Python snippet of the README and of docs/ runs as it is printed."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
SNIPPETS = [
    pytest.param(code, id=f"{page.name}-{number}", marks=() if page.name == "README.md" else pytest.mark.slow)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippet(code):
    with jax.numpy_rank_promotion("allow"):
        exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def test_the_first_two_shell_blocks_are_the_example_and_the_tests():
    blocks = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    assert "examples/digits.py" in blocks[0]
    assert blocks[1].strip() in (ROOT / ".ci" / "run").read_text()
