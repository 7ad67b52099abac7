"""Every Python snippet of the README and of docs/ runs as it is printed, and prints what is printed below it."""

import contextlib
import io
import pathlib
import re

import jax
import pytest
from flax import nnx
from versions import is_older

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Code, and the block of text that follows it directly, if there is one.
SNIPPET = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n(.*?)^```$)?", re.M | re.S)


def run(code, printed, names):
    out = io.StringIO()
    # JAX's defaults, as users have them.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), contextlib.redirect_stdout(out):
        exec(compile(code, "snippet", "exec"), names)
    if printed:
        assert out.getvalue().rstrip() == printed.rstrip()


def test_readme():
    """In one session, since later snippets use the models of earlier ones."""
    names = {"__name__": "snippet"}
    for code, printed in SNIPPET.findall(README):
        # How wrong Flax's layer is far from zero depends on the order of sums.
        run(code, "" if is_older("jax", "0.10.2") else printed, names)


PAGES = [
    pytest.param(code, printed, id=f"{page.name}-{number}")
    for folder in ("docs", "docs/api")
    for page in sorted((ROOT / folder).glob("*.md"))
    for number, (code, printed) in enumerate(SNIPPET.findall(page.read_text()))
]


# What a snippet that contains these words needs beside what the tests install.
OPTIONAL = {
    "import equinox": "equinox",
    "jax2onnx": "jax2onnx",
    "qwix": "qwix",
    ".serialize(": "flatbuffers",
}


@pytest.mark.slow
# qwix uses what Flax has renamed.
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
@pytest.mark.parametrize(("code", "printed"), PAGES)
def test_page(code, printed, tmp_path, monkeypatch):
    for words, package in OPTIONAL.items():
        if words in code:
            pytest.importorskip(package)
    skip_what_needs_newer_versions(code)
    monkeypatch.chdir(tmp_path)
    run(code, printed, {"__name__": "snippet"})


def skip_what_needs_newer_versions(code):
    if is_older("flax", "0.12.7"):
        for name in re.findall(r"(?<!jaxbn\.)\bnnx\.(\w+)", code):
            if not hasattr(nnx, name):
                pytest.skip(f"needs a newer flax: nnx.{name}")
    if is_older("jax", "0.10.2") and "AxisType.Explicit" in code and "virtual_batch_size" in code:
        pytest.skip("needs jax 0.10.2: results on fewer devices than x, outside of jax.jit")


@pytest.mark.slow
def test_checkpoints_may_share_a_folder_and_be_saved_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for code, printed in 2 * SNIPPET.findall((ROOT / "docs" / "checkpoints.md").read_text()):
        skip_what_needs_newer_versions(code)
        run(code, printed, {"__name__": "snippet"})


def test_the_first_two_shell_blocks_are_the_example_and_the_tests():
    blocks = re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)
    assert "examples/digits.py" in blocks[0]
    assert blocks[1].strip() in (ROOT / ".ci" / "run").read_text()
