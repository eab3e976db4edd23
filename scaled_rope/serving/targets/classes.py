"""The arguments that each model class of an engine passes on to its rotary embedding, as read from the engine's source.

The data is written by `benchmarks/engines/classes.py`, which can be run again for another release.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scaled_rope.bundled import bundled


@functools.cache
def _engines() -> dict[str, Any]:
    return dict(json.loads(bundled("data/engine_classes.json").read_text(encoding="utf-8")))


def version(engine: str) -> str:
    """The release that was read."""
    return str(_engines()[engine]["version"])


def passes(engine: str, model_type: str) -> str:
    """The arguments that the class for a family passes on.

    "all": the dictionary of the config, untouched; "base": rope_theta alone; "whole base": that, cut to a whole number;
    "": it is not known, since the source could not be followed or the engine has no class of that name.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    said = _engines()[engine]["passes"].get(name, "")
    return "" if said.startswith("unknown") else str(said)
