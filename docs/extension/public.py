"""The public names: what the public modules import under its own name (`from ... import name as name`)."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
MODULES = ("jaxbn", *(f"jaxbn.{name}" for name in ("linen", "nnx", "interop", "recalibrate", "diagnose", "fold")))


def public_names() -> dict[str, str]:
    """Returns the paths by which users import them, `jaxbn.linen.BatchNorm`, and where each is defined."""
    names = {}
    for module in MODULES:
        tree = ast.parse((ROOT / module.replace(".", "/") / "__init__.py").read_text())
        for node in ast.walk(tree):
            # `from jaxbn import linen as linen` is for type checkers alone.
            if isinstance(node, ast.ImportFrom) and node.module != "jaxbn":
                own = [alias.name for alias in node.names if alias.name == alias.asname]
                names |= {f"{module}.{name}": f"{node.module}.{name}" for name in own}
    return names
