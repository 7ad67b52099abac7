"""Sphinx hooks: docstrings to pages, links to the repository, and a check that every public name is documented."""

import collections
import html
import importlib
import inspect
import operator
import pathlib
import re
import tomllib

import docstrings
import formulas
import public
from docutils import nodes
from sphinx import addnodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import inspect as sphinx_inspect
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = pathlib.Path(__file__).parents[2]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
NAMES = public.public_names()
# An object with two paths, such as `fold_batch_norm`, is documented under the first.
DOCUMENTED = {path: next(p for p in NAMES if NAMES[p] == NAMES[path]) for path in NAMES}


def _unmistakable():
    """Names that have one path: not `BatchNorm`, which has two, and not `moments`, which is an argument elsewhere."""
    paths = collections.defaultdict(set)
    for path in DOCUMENTED.values():
        paths[path.rpartition(".")[2]].add(path)
    return {name: next(iter(found)) for name, found in paths.items() if len(found) == 1 and re.search("[A-Z_]", name)}


UNMISTAKABLE = _unmistakable()

logger = logging.getLogger(__name__)


class OneSignature(ModuleAnalyzer):
    """Overloads are for type checkers; readers get the signature of the function itself."""

    def analyze(self):
        super().analyze()
        self.overloads.clear()


def setup(app):
    ModuleAnalyzer.for_module = OneSignature.for_module
    app.add_role("formula", _formula)
    app.add_role("equation", _formula)
    app.add_directive("names", Names)
    app.connect("source-read", _link_to_repository)
    app.connect("autodoc-process-docstring", _process_docstring)
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-skip-member", _skip_member)
    app.connect("doctree-read", _link_names)
    app.connect("env-check-consistency", _check_public_names)


def find_source(domain, info):
    """Where an object is in the repository; Sphinx's `linkcode_resolve`."""
    found = operator.attrgetter(info["fullname"])(importlib.import_module(info["module"]))
    found = inspect.unwrap(getattr(found, "fget", found))
    if not callable(found):
        return None
    lines, first = inspect.getsourcelines(found)
    path = pathlib.Path(inspect.getsourcefile(found)).relative_to(ROOT)
    return f"{REPOSITORY}/blob/main/{path}#L{first}-L{first + len(lines) - 1}"


def _formula(name, rawtext, text, lineno, inliner, options=None, content=None):
    """A formula in a line, or as the role `equation` on a line of its own, with the punctuation behind it."""
    code = text.rstrip(".,;:")
    math = formulas.mathml(code)
    if math is None:
        return [nodes.literal(rawtext, code), nodes.Text(text[len(code) :])], []
    shown = f'<span class="math {name}" title="{html.escape(code)}">{math}{text[len(code) :]}</span>'
    return [nodes.raw(rawtext, shown, format="html")], []


class Names(SphinxDirective):
    """A table of all names that the page documents, each with the first line of its docstring."""

    def run(self):
        source = pathlib.Path(self.env.doc2path(self.env.docname)).read_text()
        rows = ["| | |", "|---|---|"]
        for kind, path, text in re.findall(r"^\.\. auto(function|class|data):: (\S+)((?:\n   .*|\n)*)", source, re.M):
            module, _, name = path.rpartition(".")
            found = getattr(importlib.import_module(module), name)
            # A constant has no docstring; its text is on the page.
            lines = re.findall(r"^   ([^:\s].*)$", text, re.M) if kind == "data" else inspect.getdoc(found).split("\n")
            rows.append(f"| {{py:obj}}`{name} <{path}>` | " + lines[0].replace("|", "\\|") + " |")
        return self.parse_text_to_nodes("\n".join(rows))


def _link_to_repository(app, page, source):
    """Makes links to files outside docs/, such as `../examples/digits.py`, links to the repository."""
    folder = pathlib.Path(app.env.doc2path(page)).parent

    def absolute(match):
        target = (folder / match["path"]).resolve()
        if target.is_relative_to(app.srcdir):
            return match[0]
        if not target.exists():
            logger.warning("link to a file that does not exist: %s", match["path"], location=page)
        kind = "tree" if target.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{target.relative_to(ROOT)}{match['anchor']})"

    source[0] = re.sub(r"\]\((?P<path>\.\./[^)#]+)(?P<anchor>[^)]*)\)", absolute, source[0])


def _process_docstring(app, what, name, obj, options, lines):
    if not any(lines):
        logger.warning("no docstring: %s", name)
    module = name if what == "module" else re.match(r"jaxbn(\.[a-z]+(?=\.))?", name)[0]

    def resolve(text):
        if not re.search(r"[A-Z_.]", text):
            return None
        found = DOCUMENTED.get(text) or DOCUMENTED.get(f"{module}.{text}") or UNMISTAKABLE.get(text)
        return None if found == name else found

    lines[:] = docstrings.to_rst(list(lines), resolve)


def _process_signature(app, what, name, obj, options, signature, returns):
    """Removes the fields that Flax adds to Linen modules, and writes defaults as the source does."""
    if what == "class" and hasattr(obj, "__signature__"):
        # Sphinx does not resolve the names of types in it.
        arguments = sphinx_inspect.signature(obj.__init__, True, app.config.autodoc_type_aliases)
        signature = sphinx_inspect.stringify_signature(arguments, show_return_annotation=False)
    if signature:
        signature = re.sub(r", parent: .*?, name: str \| None = None", "", signature)
        signature = re.sub(r"<(?:class '|function )([\w.]+)[^>]*>", r"\1", signature)
        signature = re.sub(r"= (\w+)\([^()]*\)", r"= \1()", signature)
        signature = re.sub(r"TypeAliasForwardRef\('([^']+)'\)", r"\1", signature)
        signature = signature.replace("collections.abc.", "").replace("jax.jaxlib._jax.", "")
    return signature, returns


def _skip_member(app, what, name, obj, skip, options):
    """Documents methods and properties; fields are in their class's docstring."""
    return skip or not (isinstance(obj, property | classmethod) or inspect.isfunction(obj))


def _link_names(app, doctree):
    """Public names in code become links."""
    for literal in list(doctree.findall(nodes.literal)):
        text = literal.astext()
        target = text if text in public.MODULES[1:] else DOCUMENTED.get(text) or UNMISTAKABLE.get(text)
        if target and not isinstance(literal.parent, nodes.reference | addnodes.pending_xref | nodes.title):
            reference = addnodes.pending_xref(
                "", refdomain="py", reftype="obj", reftarget=target, refexplicit=True, refwarn=True
            )
            literal.replace_self(reference)
            reference += literal


def _check_public_names(app, env):
    for path in DOCUMENTED.values():
        if path not in env.domains.python_domain.objects:
            logger.warning("public, and not in docs/api/: %s", path)
