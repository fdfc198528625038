"""Named models: rows of data, a table for each few families. `contextlab list models` shows them."""

from __future__ import annotations

from collections.abc import Callable

from contextlab import registry
from contextlab.models.presets.hybrid import HYBRID
from contextlab.models.presets.linear import LINEAR
from contextlab.models.presets.recurrent import RECURRENT
from contextlab.models.presets.row import Option, Preset, register_presets
from contextlab.models.presets.softmax import SOFTMAX
from contextlab.models.spec import ModelSpec

__all__ = ["PRESETS", "Option", "Preset", "register_presets"]

PRESETS = (*SOFTMAX, *LINEAR, *RECURRENT, *HYBRID)
register_presets(PRESETS)


def __getattr__(name: str) -> Callable[..., ModelSpec]:
    """`presets.mamba(width=32)`: each preset is a function of its options that returns a ModelSpec."""
    if name.startswith("_") or name not in registry.names("model"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return registry.lookup("model", name).factory
