"""Fixtures: tiny random models, made in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

VOCABULARY = 61
FAMILIES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """make(family="llama", seed=0, **config): a random model with 2 layers, head_dim 16 and 32 positions.

    Equal seeds give equal weights. The weights are large, so that attention depends sharply on positions.
    """

    def make(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
        config_class, model_class = FAMILIES[family]
        settings: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        if family == "mistral":
            settings["sliding_window"] = None
        torch.manual_seed(seed)
        return model_class(config_class(**(settings | overrides))).eval()

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """Random token ids [2, 48], longer than the tiny models' 32 positions."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (2, 48), generator=generator)
