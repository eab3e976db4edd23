"""Tiny models of every family: what their configs need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

VOCABULARY = 61
LAYER_TYPES = ["sliding_attention", "full_attention"]
# A window longer than any text of the tests, for families that cannot do without one.
WINDOW = {"sliding_window": 64}
TWO_TYPES: dict[str, Any] = {"layer_types": LAYER_TYPES, **WINDOW}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"head_dim": 16, "num_experts": 4, "num_dense_layers": 1, **TWO_TYPES, **EXPERTS},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0, **TWO_TYPES},
    "exaone4": TWO_TYPES,
    "exaone_moe": {"num_experts": 4, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, **TWO_TYPES, **EXPERTS},
    "falcon": {},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **TWO_TYPES},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, **TWO_TYPES},
    # 32 dimensions, of which 8 are rotated.
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 64},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "rope_parameters": PLAIN, **TWO_TYPES, **EXPERTS},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 2},
    "olmo": {},
    "olmo2": {},
    "olmo3": TWO_TYPES,
    "phi": {},
    # A share of the head as Phi-4-mini has it, and the top-level length that only this family has.
    "phi3": {"original_max_position_embeddings": 32, "partial_rotary_factor": 0.5},
    "qwen2": {"use_sliding_window": True, **TWO_TYPES},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS},
    "qwen3": {"head_dim": 16, "use_sliding_window": True, **TWO_TYPES},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, **EXPERTS},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"hidden_size": 64, "intermediate_size": 64},
}
"""Settings that tiny models need beside `tiny_model`'s settings, by model type."""

DETECTED: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": PLAIN},
    "ernie4_5": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "granite": {"attention_multiplier": 0.25},
    "ministral3": {
        "head_dim": 16,
        "rope_parameters": {**PLAIN, "original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.1},
    },
    "mellum": {"head_dim": 16, "num_experts": 4, **TWO_TYPES, **EXPERTS},
    "persimmon": {},
    "phimoe": {"num_local_experts": 4},
    "seed_oss": {"head_dim": 16},
    "starcoder2": {"sliding_window": None},
}
"""Families that the package does not know by name."""

Make = Callable[..., PreTrainedModel]
