"""A recipe small enough to be planned and run."""

from __future__ import annotations

from dataclasses import replace

from scaled_rope.recipes.files import read_recipe


def small(**fields):
    init = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }  # fmt: skip
    tiny = read_recipe("tiny-base")
    return replace(tiny, init=init, scaling="yarn:4", sequence_length=256, batch_size=2, precision="fp32", **fields)
