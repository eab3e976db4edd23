"""vLLM: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from scaled_rope.serving.targets.arithmetic import yarn_attention
from scaled_rope.serving.targets.common import (
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

    def words(rope: dict[str, Any], context: int, notes: tuple[str, ...] = ()) -> Expressed:
        config = config_of(request, rope, context)
        flags = ("--hf-overrides", json.dumps(config), "--max-model-len", str(request.length))
        return Expressed(rope | {"context": context}, config, flags, notes)

    rope = native_keys(request)
    if rope is not None and rope["rope_type"] in ("default", "llama3", "yarn"):
        yield words(rope, request.length)
    elif rope is not None and rope["rope_type"] == "linear":
        # Here alone the program multiplies the config's maximum by the factor, for its limit and for its table.
        note = "max_position_embeddings is the length before scaling: vLLM multiplies it by a linear factor"
        yield words(rope, math.ceil(request.length / rope["factor"]), (note,))
    yield words(table_with_mscales(request), request.length, table_notes(request))


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """vLLM 0.33.0, `vllm/model_executor/layers/rotary_embedding/`: one file per rope_type, chosen in `__init__.py`; the
    limit on lengths is from `vllm/config/model.py`.

    Tables are made once, with a fixed number of rows. LongRoPE takes the long list whenever the server's limit
    (`--max-model-len`, here N) is above L, whatever the length of a prompt. `extrapolation_factor` is not read.
    """
    rope, context, dim = words.given, words.given["context"], request.dim
    kind = rope["rope_type"]
    if kind == "longrope":
        long = request.length > rope["original_max_position_embeddings"]
        inv_freq, factor = longrope_numbers(rope, dim, long, context)
        return Restated(inv_freq, factor, context if long else rope["original_max_position_embeddings"])
    if kind == "yarn":
        inv_freq = yarn_frequencies({**rope, "extrapolation_factor": 1.0}, dim)
        told = rope.get("attention_factor")
        factor = told if told is not None else mscale_pair(rope) or yarn_attention(rope["factor"])
        return Restated(inv_freq, factor, math.ceil(rope["original_max_position_embeddings"] * rope["factor"]))
    rows = int(context * rope["factor"]) if kind == "linear" else context
    return Restated(plain_frequencies(rope, dim), 1.0, rows)


TARGET = Target(
    name="vllm",
    title="vLLM",
    version="0.33.0",
    express=express,
    restate=restate,
    command="vllm serve MODEL {flags}",
    static=CACHED.format("vLLM"),
    config_place=CONFIG_PLACE,
)
