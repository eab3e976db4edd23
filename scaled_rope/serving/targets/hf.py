"""transformers: its words for a scaling, and its arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import transformers
from transformers.utils import logging as transformers_logging

from scaled_rope.errors import ConfigError
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
)


def express(request: ServedModel) -> Iterator[Expressed]:
    """Under its own name where the program has one, then as a table of frequencies."""
    rope = native_keys(request)
    if rope is not None:
        # In "dynamic" the model's maximum is L.
        original = request.scaling.original_max_position_embeddings
        context = int(original or request.length) if rope["rope_type"] == "dynamic" else request.length
        yield Expressed(rope, config_of(request, rope, context))
    if not request.scaling.is_length_dependent:
        rope = table_of(request)
        yield Expressed(rope, config_of(request, rope, request.length), notes=table_notes(request))


def restate(request: ServedModel, words: Expressed, length: int) -> Restated:
    """No restatement: the installed transformers builds the model's own rotary module, which is asked."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        config = type(request.config).from_dict(build_patched(request.config.to_dict(), words.config))
        with torch.device("meta"):
            model = transformers.AutoModel.from_config(config)
        kinds = [type(module) for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]
        rotary = kinds[0](config=copy.deepcopy(config))
        rotary(torch.zeros(1), torch.tensor([[length - 1]]))  # the forward pass is where it follows the length
    except ConfigError:
        raise
    except Exception as error:  # whatever the model's code raises for words that it does not take
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"transformers cannot build the model with it: {text}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    return Restated(rotary.inv_freq.tolist(), float(rotary.attention_scaling))


TARGET = Target(
    name="transformers",
    title="transformers",
    version=transformers.__version__,
    express=express,
    restate=restate,
    command="AutoModelForCausalLM.from_pretrained(DIR), with these keys in DIR/config.json",
)
