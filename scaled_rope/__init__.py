"""Longer context for models with rotary position embeddings: YaRN and its relatives.

from scaled_rope import RopeScaling, patch_model, unpatch_model

scaling = RopeScaling("yarn", factor=16.0, original_max_position_embeddings=4096)
report = patch_model(model, scaling)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scaled_rope.errors import ConfigError
    from scaled_rope.patching.loading import load_model
    from scaled_rope.patching.patch import PatchReport, patch_model, unpatch_model
    from scaled_rope.scaling.frequencies import compute_rope
    from scaled_rope.scaling.record import LayerPlan, RopeScaling
    from scaled_rope.scaling.registry import METHODS

# Looked up on first use, because torch and transformers take seconds to import and not every command needs them.
_HOMES = {
    "METHODS": "scaling.registry",
    "ConfigError": "errors",
    "LayerPlan": "scaling.record",
    "PatchReport": "patching.patch",
    "RopeScaling": "scaling.record",
    "compute_rope": "scaling.frequencies",
    "load_model": "patching.loading",
    "patch_model": "patching.patch",
    "unpatch_model": "patching.patch",
}

__all__ = [
    "METHODS",
    "ConfigError",
    "LayerPlan",
    "PatchReport",
    "RopeScaling",
    "compute_rope",
    "load_model",
    "patch_model",
    "unpatch_model",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"scaled_rope.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
