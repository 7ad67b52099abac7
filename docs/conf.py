"""Configuration of the documentation site, which .ci/docs builds."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "extension")]

import sphinx_jaxbn

import jaxbn

project = "jaxbn"
author = "The jaxbn authors"
copyright = author  # noqa: A001  # Sphinx's name for it.
version = release = jaxbn.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.linkcode", "myst_nb", "sphinx_copybutton", "sphinx_jaxbn"]
linkcode_resolve = sphinx_jaxbn.find_source
exclude_patterns = ["extension", "*.py", "_build"]
nitpicky = True
# Types in signatures are links where they are documented here.
nitpick_ignore_regex = [("py:class", ".*")]

highlight_language = "none"
smartquotes = False
myst_heading_anchors = 3
nb_execution_mode = "off"
autodoc_member_order = "bysource"
autodoc_type_aliases = {name: name for name in ("ArrayLike", "DTypeLike", "Initializer", "PromoteDtypeFn")}
autodoc_type_aliases |= {"_Scale": "Array | None", "_Bias": "Array | None"}
autodoc_default_options = {"members": True, "special-members": "__call__"}
maximum_signature_line_length = 80
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "jaxbn"
html_static_path = ["_static"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_search_scorer = str(ROOT / "docs" / "extension" / "scorer.js")
html_show_copyright = False
html_copy_source = False
html_theme_options = {
    "source_repository": sphinx_jaxbn.REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
