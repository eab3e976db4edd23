"""Small random models of every type that transformers can build, for `coverage.py` and the tests.

A type's default config gives the structure: which parts it has, the pattern of its layers, its RoPE keys. Sizes are
replaced by small ones, by the names of fields. What a type needs beyond that stands in `SETTINGS`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto

TRAINED = 64
"""L of all small models, in tokens."""
VOCABULARY = 256
CAUSAL_TYPES = frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE_TEXT_TYPES = frozenset(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
MODEL_TYPES = sorted(CAUSAL_TYPES | IMAGE_TEXT_TYPES)

LAYERS = 4
_WIDTHS = ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "out_hidden_size", "output_dim", "projection_dim")
_INNER = ("ffn_dim", "d_ff", "ffn_hidden_size", "mlp_dim", "projector_hidden_size", "expert_ffn_hidden_size")
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "encoder_layers", "decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads", "encoder_attention_heads")
_ALL_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_USED_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "topk_group", "n_group")
_SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(_WIDTHS, 64),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_DEPTHS, LAYERS),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_ALL_EXPERTS, 4),
    **dict.fromkeys(_USED_EXPERTS, 2),
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "kv_channels": 16,
    "head_dim": 16,
    "global_head_dim": 32,
    "max_position_embeddings": TRAINED,
    "max_seq_len": TRAINED,
    "model_max_length": TRAINED,
    "sliding_window": 16,
    # Multi-head latent attention, and its sparse form.
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 4096,
    # Recurrent layers.
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_d_state": 16,
    # Images and sounds.
    "image_size": 64,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
}
"""Field -> its small value. Only fields that a default config has, with a whole number in them, are replaced."""
_INDICES = ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes", "full_attn_idxs", "moe_layers",
            "cross_attention_layers", "rope_scaling_layers", "mlp_only_layers", "hybrid_layer_ids", "kv_source_layers",
            "intermediate_layers_indices", "spatial_target_layers")  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {}
"""Model type -> more settings, over those that follow from the names of fields."""


def small_config(model_type: str, **settings: Any) -> Any:
    """The config of a small model of a type; settings: more fields, for the part that computes text."""
    default = CONFIG_MAPPING[model_type]()
    values = _shrunk(default.to_dict(), model_type)
    text = default.get_text_config(decoder=True)
    name = next((name for name in values if getattr(default, name, None) is text), None)
    (values if name is None else values[name]).update(settings)
    return type(default).from_dict(values)


def _shrunk(values: dict[str, Any], model_type: str) -> dict[str, Any]:
    depth = next((values[name] for name in _DEPTHS if isinstance(values.get(name), int)), None)
    small = {}
    for name, value in values.items():
        if isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            small[name] = _shrunk(value, str(value.get("model_type")))
        elif name in ("rope_parameters", "rope_scaling"):
            small[name] = _unscaled(value)
        elif isinstance(value, bool):
            small[name] = value
        elif isinstance(value, int):
            small[name] = _small_number(name, value)
        elif name in _INDICES and isinstance(value, list):
            small[name] = [index for index in value if index < LAYERS] or [LAYERS - 1]
        elif isinstance(value, list) and depth is not None and len(value) == depth and name != "block_types":
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[index % len(kinds)] for index in range(LAYERS)]
        else:
            small[name] = value
    return {**small, **SETTINGS.get(model_type, {})}


def _small_number(name: str, value: int) -> int:
    if name in _SIZES:
        return _SIZES[name]
    if name.endswith("intermediate_size") or name.endswith("expert_dim"):
        return 48
    if ("token_id" in name or "token_index" in name) and value >= VOCABULARY:
        return VOCABULARY - 2 - sum(map(ord, name)) % 100  # below the vocabulary, and seldom the same for two fields
    return value


def _unscaled(rope: Any) -> Any:
    """RoPE parameters without a scaling, and with sections of axes that fit the small head."""
    if not isinstance(rope, dict):
        return rope
    if any(isinstance(value, dict) for value in rope.values()):
        return {name: _unscaled(value) for name, value in rope.items()}
    kept = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor", "mrope_interleaved") if name in rope}
    kind = "proportional" if rope.get("rope_type") == "proportional" else "default"
    sections = {"mrope_section": [4, 2, 2]} if "mrope_section" in rope else {}
    return {"rope_type": kind, **kept, **sections}


def small_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A small random model of a type, in float32, in evaluation mode; settings: as for `small_config`."""
    config = small_config(model_type, **settings)
    auto = AutoModelForCausalLM if model_type in CAUSAL_TYPES else AutoModelForImageTextToText
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    return model
