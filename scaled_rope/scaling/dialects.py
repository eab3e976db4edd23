"""The older words for a scaling, `rope_scaling` and `rope_theta`, beside `rope_parameters` in one config.json.

transformers 5 reads `rope_parameters`. Older programs read the other two and pass over `rope_parameters` without a
word, so that a model runs unscaled there and with a base of 10000. Both can stand in one file where every reader gets
the same numbers from it. Tables of both were compared with ours in transformers 5.24 and 4.57 and in mlx-lm 0.32; the
readers of vLLM 0.11 and 0.33, SGLang 0.5.3 and 0.5.23 and llama.cpp's converter were read in their sources.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaled_rope.files import write_atomic
from scaled_rope.scaling.hf_config import CUSTOM_ROPE_TYPE, nested_types, read_by_attention, text_path

OLDER_KEYS = ("rope_scaling", "rope_theta", "partial_rotary_factor")
"""The keys of the older dialect, on the top level of a text part."""
FAMILIES = (
    *("arcee", "bitnet", "cohere", "cohere2", "gemma", "gemma2", "glm4", "granite", "granitemoe", "llama", "mistral"),
    *("olmoe", "persimmon", "phi", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm"),
    *("starcoder2",),
)
"""Families whose tables were right in transformers 5.24 and 4.57 with both dialects in the file."""
_TYPES = ("default", "linear", "llama3", "yarn")
_SAME_IN_ALL = 1e-6
"""Largest relative difference of attention factors that are the same number."""


def older_keys(text: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The older dialect of what `rope_parameters` of a text part says, or the reason why it cannot stand beside them.

    Returns:
        Keys for the same level and "", or no keys and a reason; both are empty where there is nothing to say.
    """
    rope = text.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return {}, ""
    if nested_types(rope):
        return {}, "it has no form per layer type"
    if text.get("model_type") not in FAMILIES:
        return {}, f"programs that read it were not tried with {text.get('model_type')} models"
    if reason := _misread(rope):
        return {}, reason
    keys: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope["rope_type"] != "default":
        rest = {name: value for name, value in rope.items() if name != "rope_theta"}
        keys["rope_scaling"] = rest | {"type": rope["rope_type"]}
    return keys, ""


def _misread(rope: Mapping[str, Any]) -> str:
    """Who would compute something else from it, or nothing."""
    kind = rope.get("rope_type")
    if kind == CUSTOM_ROPE_TYPE:
        return "no program but this package knows the type"
    if kind == "longrope":
        return "mlx-lm takes the long list at every length, and transformers 4.57 the original length from elsewhere"
    if kind not in _TYPES or "rope_theta" not in rope:
        return f"older programs have no such rope_type {kind!r}, or another one"
    if read_by_attention(rope):
        return "attention reads keys of it"
    if kind != "yarn":
        return ""
    if not rope.get("truncate", True):
        return "vLLM 0.11, SGLang 0.5.3 and mlx-lm round the ends of the ramp in spite of truncate=false"
    default = 1 + 0.1 * math.log(max(rope["factor"], 1.0))
    if "attention_factor" not in rope or abs(rope["attention_factor"] - default) > _SAME_IN_ALL * default:
        return "vLLM 0.11, SGLang 0.5.3 and mlx-lm read no attention_factor and take 0.1·ln(s) + 1"
    return ""


def in_both_dialects(config: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """A config.json with the older dialect beside the newer one in its text part, and why not where that is not so.

    One that has a `rope_scaling` already is left as it is.
    """
    path = text_path(config)
    part: Any = config
    for name in path:
        part = part[name]
    if part.get("rope_scaling"):
        return dict(config), ""
    keys, reason = older_keys(part)
    return _with_keys(config, path, keys), reason


def _with_keys(config: Mapping[str, Any], path: tuple[str, ...], keys: Mapping[str, Any]) -> dict[str, Any]:
    if not path:
        return dict(config) | dict(keys)
    return dict(config) | {path[0]: _with_keys(config[path[0]], path[1:], keys)}


def write_both_dialects(folder: Path) -> str:
    """Add the older dialect to the config.json of a saved model; returns why not, or nothing."""
    file = folder / "config.json"
    config, reason = in_both_dialects(json.loads(file.read_text(encoding="utf-8")))
    write_atomic(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return reason
