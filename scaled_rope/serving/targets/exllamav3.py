"""ExLlamaV3: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from scaled_rope.serving.targets.arithmetic import powers
from scaled_rope.serving.targets.common import (
    Expressed,
    Restated,
    ServedModel,
    Target,
    config_of,
    native_keys,
    rope_in_file,
    table_of,
    with_older,
)
from scaled_rope.serving.targets.servers import (
    CACHED,
    plain_frequencies,
    table_notes_for_one,
    table_with_length,
    yarn_frequencies,
)

_DEFAULT_READER = (
    *("apertus", "arcee", "cohere", "ernie4_5", "gemma2", "glm4", "llama", "mistral", "mixtral", "phi3", "qwen2"),
    *("qwen3", "qwen3_moe", "seed_oss", "smollm3"),
)
"""Families whose config class in ExLlamaV3 calls `read_rope_settings_default` on the whole config.json."""


def express(request: ServedModel) -> Iterator[Expressed]:
    """Under its own name where the program has one, then as a table of frequencies."""
    rope = native_keys(request)
    if rope is not None and rope["rope_type"] in ("default", "linear", "llama3", "yarn"):
        context = request.length
        notes: tuple[str, ...] = ()
        if rope["rope_type"] == "yarn":  # the quotient of both lengths is the factor there
            context = math.ceil(rope["factor"] * rope["original_max_position_embeddings"])
            notes = ("max_position_embeddings is the factor times L: ExLlamaV3 takes their quotient for the factor",)
        yield Expressed({}, with_older(request, config_of(request, rope, context)), notes=notes)
    if table_of(request)["attention_factor"] >= 1:
        config = config_of(request, table_with_length(request), request.length)
        yield Expressed({}, config, notes=table_notes_for_one(request))


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The keys of the printed config.json: `rope_scaling` where it is there, or else `rope_parameters`."""
    config = json.loads(json.dumps(words.config))
    yield rope_in_file(config) | {"context": config["max_position_embeddings"]}


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """ExLlamaV3 1.6.5, `exllamav3/util/rope.py` and `exllamav3/model/config.py`.

    YaRN's factor is max_position_embeddings / L, whatever `factor` says. LongRoPE takes one list when the model is
    loaded, and its attention factor from the same quotient; it reads no `attention_factor`.
    """
    rope, dim, context = words.given, request.dim, words.given["context"]
    if rope["rope_type"] == "longrope":
        original = rope["original_max_position_embeddings"]
        divisors = rope["long_factor" if context > original else "short_factor"]
        factor = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0
        own = powers(rope["rope_theta"], dim)
        return Restated([theta / divisor for theta, divisor in zip(own, divisors, strict=True)], factor)
    if rope["rope_type"] == "yarn":
        rope = rope | {"factor": context / rope["original_max_position_embeddings"]}
        return Restated(yarn_frequencies(rope, dim), rope["attention_factor"])
    return Restated(plain_frequencies(rope, dim), 1.0)


TARGET = Target(
    name="exllamav3",
    title="ExLlamaV3",
    version="1.6.5",
    express=express,
    read=read,
    restate=restate,
    known=lambda request: not request.path and request.model_type in _DEFAULT_READER,
    command="exllamav3.Config.from_directory(DIR), with these keys in DIR/config.json",
    static=CACHED.format("ExLlamaV3"),
    basis="read from the source of ExLlamaV3 1.6.5; its rotary module was run by itself on a CPU, no model",
    package="exllamav3",
    package_version="1.6.5",
)
