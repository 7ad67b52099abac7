"""Calls of a layer of which only the shapes are used."""

from __future__ import annotations

from flax import nnx

from jaxbn._versions import current_linen_module


def only_shapes(layer: nnx.Module) -> bool:
    """Whether a call shows a network's shapes (`nnx.tabulate`) or initializes it (a Linen network, `lazy_init`)."""
    # Flax has no public sign of either. It marks the copy of the model that it tabulates, never the user's model.
    if hasattr(layer, "_nnx_tabulate_id") or layer._pytree__state.initializing:
        return True
    linen = current_linen_module()
    return linen is not None and linen.is_initializing()
