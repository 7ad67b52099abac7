"""Which layers of a model a tool applies to."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeAlias

from jaxbn._messages import few
from jaxbn._paths import name_of, path_of

# One path or several, of layers or of modules that have them; or a class; or a function of a layer's path, a tuple,
# and the layer, as are the filters of NNX. None for all layers.
Only: TypeAlias = str | Iterable[str] | type[Any] | Callable[[tuple[Any, ...], Any], bool] | None


class Chosen:
    """Tells for each layer of a model whether `only` means it, and raises in the end if `only` means none.

    Two with equal `key` choose the same layers.
    """

    key: Hashable

    def __init__(self, only: Only):
        self._missing: set[str] = set()
        self._layers: dict[str, bool] = {}
        if only is None or isinstance(only, type) or (callable(only) and not isinstance(only, str)):
            self.key = only
            return
        paths = (only,) if isinstance(only, str) else tuple(only) if isinstance(only, Iterable) else ()
        if not paths or not all(isinstance(path, str) for path in paths):
            raise TypeError(
                "only: expected a path such as 'backbone/norm', several, a class, a function of path and layer, or "
                f"None for all layers, got {only!r}"
            )
        self.key, self._missing = paths, set(paths)

    def __call__(self, path: tuple[Any, ...], layer: object) -> bool:
        chosen = self._means(path, layer)
        self._layers[name_of(path)] = chosen
        return chosen

    def _means(self, path: tuple[Any, ...], layer: object) -> bool:
        if self.key is None:
            return True
        if isinstance(self.key, type):
            return isinstance(layer, self.key)
        if callable(self.key):
            return bool(self.key(path, layer))
        assert isinstance(self.key, tuple)
        around = {name for name in self.key if not name or f"{path_of(path)}/".startswith(f"{name.rstrip('/')}/")}
        self._missing -= around
        return bool(around)

    def check(self, model: object) -> None:
        """Raises if a path that was given is that of no layer, or if no layer was chosen."""
        if not self._layers:
            raise ValueError(f"model: expected batch norms in it, got none in {type(model).__name__}")
        if self._missing or not any(self._layers.values()):
            got = ", ".join(map(repr, sorted(self._missing))) or "a choice of none"
            raise ValueError(
                "only: expected the choice of some batch norms, by paths of these or of modules that have them, got "
                f"{got}; the batch norms of this model are {few(self._layers)}"
            )
