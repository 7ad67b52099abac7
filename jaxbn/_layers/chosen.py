"""Which layers of a model a tool applies to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

from jaxbn._messages import few
from jaxbn._paths import name_of, path_of

# One path or several, of layers or of modules that have them; or a class; or a function of a layer's path, a tuple,
# and the layer, as are the filters of NNX. None for all layers.
Only: TypeAlias = str | Iterable[str] | type[Any] | Callable[[tuple[Any, ...], Any], bool] | None


class Chosen:
    """Tells for each layer of a model whether `only` means it, and raises in the end if `only` means none."""

    def __init__(self, only: Only):
        self._paths: tuple[str, ...] = ()
        if only is None:
            self._means: Callable[[tuple[Any, ...], Any], bool] = lambda path, layer: True
        elif isinstance(only, type):
            self._means = lambda path, layer: isinstance(layer, only)
        elif callable(only):
            self._means = only
        else:
            self._means = self._is_within
            self._paths = (only,) if isinstance(only, str) else tuple(only) if isinstance(only, Iterable) else ()
            if not self._paths or not all(isinstance(path, str) for path in self._paths):
                raise TypeError(
                    "only: expected a path such as 'backbone/norm', several, a class, a function of path and layer, or "
                    f"None for all layers, got {only!r}"
                )
        self._missing = set(self._paths)
        self._layers: dict[str, bool] = {}

    def __call__(self, path: tuple[Any, ...], layer: object) -> bool:
        chosen = bool(self._means(path, layer))
        self._layers[name_of(path)] = chosen
        return chosen

    def _is_within(self, path: tuple[Any, ...], layer: object) -> bool:
        around = {p for p in self._paths if not p or f"{path_of(path)}/".startswith(f"{p.rstrip('/')}/")}
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
