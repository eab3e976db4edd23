"""transformers: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from scaled_rope.errors import ConfigError
from scaled_rope.serving.inspect_report import quiet, refusal_of
from scaled_rope.serving.rotary_module import RotaryNumbers, build_rotary_module, rotary_numbers
from scaled_rope.serving.targets.common import (
    Expressed,
    Restated,
    ServedModel,
    Target,
    build_patched,
    config_of,
    native_keys,
    table_notes,
    table_of,
    with_older,
)


def express(request: ServedModel) -> Iterator[Expressed]:
    """Under its own name where the program has one, then as a table of frequencies."""
    rope = native_keys(request)
    if rope is not None:
        # In "dynamic" the model's maximum is L.
        original = request.scaling.original_max_position_embeddings
        context = int(original or request.length) if rope["rope_type"] == "dynamic" else request.length
        yield Expressed(rope, with_older(request, config_of(request, rope, context)))
    if not request.scaling.is_length_dependent:
        rope = table_of(request)
        config = with_older(request, config_of(request, rope, request.length))
        yield Expressed(rope, config, notes=table_notes(request))


def read(request: ServedModel, words: Expressed) -> Iterator[dict[str, Any]]:
    """The whole config.json with the printed keys in it."""
    keys = json.loads(json.dumps(words.config))
    yield build_patched(request.raw or request.config.to_dict(), keys, request.written_path if request.raw else ())


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """No restatement: the installed transformers builds the model's own rotary module, which is asked."""
    return Restated(*numbers_in_transformers(request, words.given, length))


def numbers_in_transformers(
    request: ServedModel, raw: dict[str, Any], length: int, layer_type: str | None = None
) -> tuple[list[float], float]:
    """Frequencies and attention factor that the installed transformers computes from a whole config.json.

    layer_type: of these layers, where the rotary module has a table per layer type.

    Raises:
        ConfigError: it cannot build a config or a rotary module from it.
    """
    try:
        with quiet():
            known = raw.get("model_type") in transformers.CONFIG_MAPPING
            kind = transformers.CONFIG_MAPPING[raw["model_type"]] if known else type(request.config)
            config: Any = kind.from_dict(copy.deepcopy(raw))
            for name in request.path:
                config = getattr(config, name)
            rotary = build_rotary_module(config)
            numbers = None if rotary is None else rotary_numbers(rotary, layer_type, length)
            if numbers is None:  # a family whose modules are called otherwise
                rotary = _rotary_of_a_model(config)
                rotary(torch.zeros(1), torch.tensor([[length - 1]]))
                numbers = RotaryNumbers(rotary.inv_freq, float(rotary.attention_scaling))
    except Exception as error:  # whatever the model's code raises for words that it does not take
        raise ConfigError(f"transformers cannot build the model with it: {refusal_of(error)}") from error
    return numbers.inv_freq.tolist(), numbers.attention_factor


def _rotary_of_a_model(config: Any) -> Any:
    """The first rotary module of the model that a config is of, built without memory."""
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    kinds = [type(module) for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    return kinds[0](config=copy.deepcopy(config))


TARGET = Target(
    name="transformers",
    title="transformers",
    version=transformers.__version__,
    express=express,
    read=read,
    restate=restate,
    older="transformers 4",
    command="AutoModelForCausalLM.from_pretrained(DIR), with these keys in DIR/config.json",
    basis="run: the installed release itself built the rotary module",
)
