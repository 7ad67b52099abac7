"""The documentation site has every public name, its links lead somewhere, and it builds."""

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import docstrings
import formulas
import public
import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "examples" / "README.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(DOCS.glob("api/*.md")),
]


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text() for page in DOCS.glob("api/*.md"))
    assert set(public.public_names()) - set(re.findall(r"\bjaxbn\.[\w.]*\w", pages)) == set()


@pytest.mark.parametrize("module", public.MODULES)
def test_public_names_are_all_that_a_module_offers(module):
    found = {path.rpartition(".")[2] for path in public.public_names() if path.rpartition(".")[0] == module}
    namespace = vars(importlib.import_module(module))
    offered = {name for name, v in namespace.items() if getattr(v, "__module__", "").startswith("jaxbn.")}
    assert offered - {"needs_flax"} <= found <= set(namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text())
    broken = [target for target, _ in links if not (page.parent / target).exists()]
    anchored = [(page.parent / target if target else page, anchor) for target, anchor in links if anchor]
    broken += [f"{target}#{anchor}" for target, anchor in anchored if anchor not in anchors(target)]
    assert broken == []


def anchors(page):
    """As GitHub and the site make them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


MATHML = {
    "y = x / 2": "<mi>y</mi>=<mfrac><mi>x</mi><mn>2</mn></mfrac>",
    "(1 - m) * state.mean": "(<mn>1</mn>-<mi>m</mi>)*<mi>state.mean</mi>",
    "a - (b - c) + d": "<mi>a</mi>-(<mi>b</mi>-<mi>c</mi>)+<mi>d</mi>",
    "sqrt(var(x) + eps)": "<msqrt><mi>var</mi>(<mi>x</mi>)+<mi>eps</mi></msqrt>",
    "own**2 = |m_b - d_max|": "<msup><mi>own</mi><mn>2</mn></msup>="
    "|<msub><mi>m</mi><mi>b</mi></msub>-<msub><mi>d</mi><mi>max</mi></msub>|",
    "(a / b)**2": "<msup>(<mfrac><mi>a</mi><mi>b</mi></mfrac>)<mn>2</mn></msup>",
    "-a * norm_bias": "-<mi>a</mi>*<mi>norm_bias</mi>",
    # None of these is a formula.
    "module/name": None,
    "axis=1": None,
    "r_max=1, d_max=0": None,
    "batch_norm_init(3)": None,
    "max |a - b| / c": None,
    "x if a * b else y": None,
    "f(a * b, axis=1)": None,
}


@pytest.mark.parametrize("code", MATHML)
def test_formula(code):
    result = formulas.mathml(code)
    if result is not None:
        result = re.sub(r"</?(math|mrow|mo|wbr)\b[^>]*>|&#x2061;", "", result)
        result = result.replace("\N{MINUS SIGN}", "-").replace("\N{DOT OPERATOR}", "*")
    assert result == MATHML[code]


def test_lines_break_at_terms_alone():
    pieces = formulas.mathml("y = (a - b) * state.mean - (c + d) + e").split("<wbr>")
    words = [re.sub(r"<[^>]+>", "", piece) for piece in pieces]
    minus, times = formulas.OPERATORS[ast.Sub], formulas.OPERATORS[ast.Mult]
    assert words == ["y=", f"(a{minus}b){times}state.mean", f"{minus}(c+d)", "+e"]


def test_docstring():
    text = """Divides `x` by *two*, see `other` and arXiv:1502.03167.

Formula, per value: `y = x / 2`
`axis=1`,
`z = y * m`, and
`n = y / 2`.

Args:
  x, *rest: an array [*window, C].
  y: of the
    same shape.

Source: a_paper.

Example:
  >>> 1

  >>> 2"""
    expected = """Divides ``x`` by *two*, see :py:obj:`other <jaxbn.other>` and `arXiv:1502.03167 <https://arxiv.org/abs/1502.03167>`__.

.. container:: formula

   **Formula**, per value: :equation:`y = x / 2` :formula:`axis=1`, :formula:`z = y * m`, and :equation:`n = y / 2.`

:Arguments:
   ``x``, ``*rest``
      an array [\\*window, C].

   ``y``
      of the
      same shape.


.. container:: source

   **Source**: a\\_paper.

.. rubric:: Example

.. code-block:: pycon

   >>> 1

   >>> 2
"""
    assert "\n".join(docstrings.to_rst(text.split("\n"), {"other": "jaxbn.other"}.get)) == expected


def test_verdicts_are_figures_of_the_tables():
    first, _, below = (DOCS / "performance.md").read_text().partition("\nWhat jaxbn's norms cost")
    claimed = re.search(r"^\*\*Speed and memory.*", (ROOT / "README.md").read_text(), re.M)[0]
    figures = re.findall(r"\d+\.\d+", first + claimed)
    assert len(figures) > 30
    assert set(figures) - set(re.findall(r"\d+\.\d+", below)) == set()


PAGES_OF_NAMES = ("functions.html", "nnx.html")


@pytest.mark.slow
def test_build(tmp_path):
    for tool in ("furo", "myst_nb", "sphinx", "sphinx_copybutton"):
        pytest.importorskip(tool)
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", DOCS, tmp_path / "html"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    functions, nnx = (re.sub(r"\s+", " ", (tmp_path / "html" / "api" / page).read_text()) for page in PAGES_OF_NAMES)
    assert '<span class="math equation"' in functions
    # Tables of names, and signatures with the options of Flax's layer.
    assert functions.index("Divides <code") < functions.index("Raises")
    assert all(f'<span class="pre">{option}</span>' in nnx for option in ("promote_dtype", "virtual_batch_size"))
    assert '"changelog" ? score - 1000' in (tmp_path / "html" / "_static" / "language_data.js").read_text()
