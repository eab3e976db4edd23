"""SGLang: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from scaled_rope.serving.targets.arithmetic import yarn_attention
from scaled_rope.serving.targets.common import (
    TOLERANCE,
    Expressed,
    Restated,
    ServedModel,
    Target,
    config_of,
    native_keys,
    table_notes,
)
from scaled_rope.serving.targets.servers import (
    CACHED,
    CONFIG_PLACE,
    longrope_numbers,
    mscale_pair,
    plain_frequencies,
    table_with_mscales,
    yarn_frequencies,
)


def express(request: ServedModel) -> Iterator[Expressed]:
    """Under its own name where the program has one, then as a table of frequencies."""

    def words(rope: dict[str, Any], notes: tuple[str, ...] = ()) -> Expressed:
        config = config_of(request, rope, request.length)
        if "partial_rotary_factor" in rope:  # read from the top level there
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        # Flags are merged into the checkpoint's own dictionary: its other keys must be made harmless.
        neutral = {"factor": 1.0, "extrapolation_factor": 1.0, "attn_factor": 1.0, "type": rope["rope_type"]}
        rest = {key: neutral.get(key) for key in request.carried if key not in rope}
        override = config | {"rope_parameters": rope | rest}
        flags = ("--json-model-override-args", json.dumps(override), "--context-length", str(request.length))
        return Expressed(request.carried | rope | rest, config, flags, notes)

    rope = native_keys(request)
    if rope is not None and rope["rope_type"] in ("default", "linear", "llama3", "yarn"):
        notes: tuple[str, ...] = ()
        if rope["rope_type"] == "yarn":
            ratio = rope["attention_factor"] / yarn_attention(rope["factor"])
            rope = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True} | rope | {"attn_factor": ratio}
            if abs(ratio - 1) > TOLERANCE:
                notes = ("attn_factor carries the attention factor: SGLang does not read attention_factor",)
        yield words(rope, notes)
    yield words(table_with_mscales(request), table_notes(request))


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """SGLang 0.5.23, `sglang/srt/layers/rotary_embedding/`: `factory.py`, `base.py`, `yarn.py`, `rope_variant.py`; how
    flags are merged into a config is from `sglang/srt/utils/hf_transformers/config.py`.

    YaRN knows `attn_factor`, a multiplier of its own factor, and not `attention_factor`. LongRoPE takes the long list
    for a batch that holds a position above L; a batch that ends at position L exactly reads row 0 of the long table.
    """
    rope, dim = words.given, request.dim
    kind = rope["rope_type"]
    if kind == "longrope":
        long = length - 1 > rope["original_max_position_embeddings"]
        return Restated(*longrope_numbers(rope, dim, long, request.length))
    if kind == "yarn":
        pair = mscale_pair(rope)
        factor = (yarn_attention(rope["factor"]) if pair is None else pair) * rope.get("attn_factor", 1.0)
        return Restated(yarn_frequencies(rope, dim), factor)
    return Restated(plain_frequencies(rope, dim), 1.0)


TARGET = Target(
    name="sglang",
    title="SGLang",
    version="0.5.23",
    express=express,
    restate=restate,
    command="python -m sglang.launch_server --model-path MODEL {flags}",
    static=CACHED.format("SGLang"),
    config_place=CONFIG_PLACE,
)
