"""mlx-lm: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.serving.targets.arithmetic import blend, correction_range, powers, restate_llama3, yarn_attention
from scaled_rope.serving.targets.common import (
    TOLERANCE,
    Expressed,
    Restated,
    ServedModel,
    Target,
    at_path,
    config_of,
    native_keys,
    table_of,
)
from scaled_rope.serving.targets.servers import CACHED, table_notes_for_one, table_with_length

_PASSES_SCALING = (
    *("bitnet", "granite", "granitemoe", "llama", "mistral", "olmo2", "olmoe", "qwen2", "qwen3", "seed_oss"),
    "smollm3",
)
"""Families whose class in mlx-lm hands rope_scaling to `initialize_rope`; their rotary modules were run."""
_BASE_ONLY = ("cohere", "cohere2", "gemma", "gemma2", "mixtral", "phi", "qwen3_moe", "stablelm", "starcoder2")
"""Those whose class takes the base alone."""
_FOR_MLX = "these words are for mlx-lm alone; keep the original config.json for other programs"


def express(request: ServedModel) -> Iterator[Expressed]:
    """Under its own name where the program has one, then as a table of frequencies."""
    rope = native_keys(request)
    if rope is not None and rope["rope_type"] in ("default", "linear", "llama3", "yarn"):
        notes: tuple[str, ...] = ()
        if rope["rope_type"] == "yarn":
            rope, notes = _with_mscale(rope)
        yield _words(request, rope, notes)
    factor = table_of(request)["attention_factor"]
    if factor >= 1:
        yield _words(request, table_with_length(request), (*table_notes_for_one(request), _FOR_MLX))


def _with_mscale(rope: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """YaRN's keys with the attention factor in the only form that mlx-lm reads: `mscale` of 0.1·mscale·ln(s) + 1."""
    factor, wanted = rope["factor"], rope["attention_factor"]
    if factor <= 1 or abs(wanted - yarn_attention(factor)) <= TOLERANCE * wanted:
        return rope, ()
    note = "mscale carries the attention factor: mlx-lm does not read attention_factor"
    return rope | {"mscale": (wanted - 1) / (0.1 * math.log(factor))}, (note, _FOR_MLX)


def _words(request: ServedModel, rope: dict[str, Any], notes: tuple[str, ...]) -> Expressed:
    """Both dialects in one config.json, since most of its classes read the older one and a few the newer one."""
    config = config_of(request, rope, request.length) | {"rope_theta": rope["rope_theta"]}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} | {"type": rope["rope_type"]}
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return Expressed(config, config, notes=notes)


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The text part of the printed config.json."""
    yield at_path(json.loads(json.dumps(words.config)), ())


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """mlx-lm 0.32.2, `mlx_lm/models/rope_utils.py`; what a family's class passes on is from `mlx_lm/models/`.

    YaRN always rounds the ends of the ramp and knows no `attention_factor`. LongRoPE takes the long list at every
    length, and its factor from max_position_embeddings and the original length alone.
    """
    config, dim = words.given, request.dim
    base = config["rope_theta"]
    rope: Mapping[str, Any] = config.get("rope_scaling") or {"type": "default"}
    kind = rope["type"]
    if request.model_type in _BASE_ONLY and kind != "default":
        raise ConfigError(
            f"its class for {request.model_type} models reads rope_theta and no scaling: serve it with another "
            "program, or with ntk:FACTOR, which is another base"
        )
    if request.scaling.partial_rotary_factor != 1 and request.model_type in _PASSES_SCALING:
        raise ConfigError(f"its class for {request.model_type} models rotates whole heads")
    if kind == "longrope":
        return _longrope(config, rope, dim)
    if kind == "yarn":
        return _yarn(rope, base, dim)
    if kind == "llama3":
        return Restated(restate_llama3({**rope, "rope_theta": base}, dim), 1.0)
    scale = rope["factor"] if kind == "linear" else 1.0
    return Restated([theta / scale for theta in powers(base, dim)], 1.0)


def _longrope(config: Mapping[str, Any], rope: Mapping[str, Any], dim: int) -> Restated:
    original = rope["original_max_position_embeddings"]
    ratio = config["max_position_embeddings"] / original
    factor = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
    own = powers(config["rope_theta"], dim)
    return Restated([theta / divisor for theta, divisor in zip(own, rope["long_factor"], strict=True)], factor)


def _yarn(rope: Mapping[str, Any], base: float, dim: int) -> Restated:
    scale = rope["factor"]
    original = rope["original_max_position_embeddings"]
    low, high = correction_range(dim, base, original, rope.get("beta_fast", 32), rope.get("beta_slow", 1), True)
    span = 0.001 if low == high else high - low
    log = 0.1 * math.log(scale) if scale > 1 else 0.0
    factor = (1 + rope.get("mscale", 1.0) * log) / (1 + rope.get("mscale_all_dim", 0.0) * log)
    return Restated(blend(powers(base, dim), scale, low, span), factor)


TARGET = Target(
    name="mlx",
    title="mlx-lm",
    version="0.32.2",
    express=express,
    read=read,
    restate=restate,
    known=lambda request: not request.path and request.model_type in (*_PASSES_SCALING, *_BASE_ONLY),
    command="mlx_lm.server --model DIR, with these keys in DIR/config.json",
    static=CACHED.format("mlx-lm"),
    basis="read from the source of mlx-lm 0.32.2; its rotary modules were run on a CPU (mlx 0.32.4), no server",
    package="mlx-lm",
    package_version="0.32.2",
)
