"""Small random models of every type that transformers can build, for `coverage.py` and the tests.

A type's default config gives the structure: which parts it has, the pattern of its layers, its RoPE keys. Sizes are
replaced by small ones, by the names of fields. What a type needs beyond that stands in `SETTINGS`.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto import modeling_auto

from scaled_rope.scaling.hf_config import text_config

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
    "codebook_dim": 64,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 16,
}
"""Field -> its small value. Only fields that a default config has, with a whole number in them, are replaced."""
_PER_LAYER = {
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 48,
}
"""Small values of fields that differ between layers."""
_INDICES = ("deepstack_visual_indexes", "fullatt_block_indexes", "global_attn_indexes", "full_attn_idxs", "moe_layers",
            "cross_attention_layers", "rope_scaling_layers", "mlp_only_layers", "hybrid_layer_ids", "kv_source_layers",
            "intermediate_layers_indices", "spatial_target_layers")  # fmt: skip
_MLA = {"num_key_value_heads": 4}  # attention expands the latent vector to all heads
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}  # together twice the width
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite",
         "glm_moe_dsa", "kimi_k25", "longcat_flash", "minicpm3", "mistral_large4_text", "sarvam_mla",
         "youtu", "hy_v4", "hy_v4_vl_text"),
        _MLA,
    ),
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA, "position_embedding_type": "rope",
                         "layer_types": ["linear_attention", "full_attention"] * 2},
    "bailing_hybrid": {**_MLA, "num_expert_group": 2, "num_experts_per_token": 2, "layer_group_size": 2,
                       "layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 16,
                       "linear_num_heads": 4},
    "chameleon": {"vocabulary_map": {"<image>": 9}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [3, 3, 2]}},
    "hunyuan_vl_text": {"rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [2, 2, 2, 2]}},
    **dict.fromkeys(("granite_docling_text", "granite_docling"), {"attention_multiplier": 0.25}),
    # Its default rope_type makes tables for the whole head, which do not fit: only scaled ones work.
    "mistral4": {
        **_MLA,
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": TRAINED,
            "partial_rotary_factor": 0.5, "llama_4_scaling_beta": 0.1,
        },
    },
    "mimo_v2_flash": {"head_dim": 48},  # a third of it turns
    "nemotron": {"num_key_value_heads": 2},
    **dict.fromkeys(
        ("glm4v_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text",
         "qwen3_vl_text", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "cosmos3_edge_text"),
        _SECTIONS,
    ),
    "glm4v_moe_text": {
        "rope_parameters": {**_SECTIONS["rope_parameters"], "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta}
            for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4))
        },
    },
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 4, "n_output_layers": 2, "num_hidden_layers": 8,
             "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4096,
                       "indexer_compress_ratio": 4, "hc_lowrank": 16, "ple_embed_dim": 16},
    "step3p5": {"sliding_window": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
               "use_mem_rope": True,
               "attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16, "n_mamba_heads": 8,
               "kv_channels": 16, "num_query_groups": 4, "num_key_value_heads": 4},
    "zaya": {"sliding_window": 16, "num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"] * 2,
             "router_hidden_size": 16},
    "granite4_vision": {"deepstack_layer_map": [[-1, 1]], "use_spatial_sampling": False, "downsample_rate": "1/2"},
    "dots3_note_text": {**_MLA, "head_dim": 64},
    "molmo2_adapter": {"vision_feature_layer": [3, 2], "text_hidden_size": 64},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "attention"], "attention_window_size": 16},
    **dict.fromkeys(("phi3", "phi4_multimodal"), {"original_max_position_embeddings": TRAINED}),
}  # fmt: skip
"""Model type -> more settings, over those that follow from the names of fields."""


def small_config(model_type: str, **settings: Any) -> Any:
    """The config of a small model of a type; settings: more fields, for the part that computes text."""
    default = CONFIG_MAPPING[model_type]()
    values = _shrunk(default.to_dict(), model_type)
    text = text_config(default)
    name = next((name for name in values if name.endswith("_config") and vars(default).get(name) is text), None)
    (values if name is None else values[name]).update(settings)
    return type(default).from_dict(values)


def _shrunk(values: dict[str, Any], model_type: str) -> dict[str, Any]:
    depth = next((values[name] for name in _DEPTHS if isinstance(values.get(name), int)), None)
    small = {}
    for name, value in values.items():
        if name == "per_layer_config" and isinstance(value, dict):
            small[name] = _shrunk_layers(values, depth)
        elif isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            small[name] = _shrunk(value, str(value.get("model_type")))
        elif name in ("rope_parameters", "rope_scaling"):
            small[name] = _unscaled(value)
        elif name == "head_dim" and value is None:
            small[name] = _SIZES[name]
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


def _shrunk_layers(values: dict[str, Any], depth: int | None) -> dict[str, Any]:
    """The settings of single layers of a small model: each gets those of a layer of its type."""
    types: list[str] = values.get("layer_types") or []
    if not types:
        return {}
    kinds = list(dict.fromkeys(types))
    special = {types[int(index)]: entry for index, entry in values["per_layer_config"].items()}
    chosen = [kinds[index % len(kinds)] for index in range(LAYERS)]
    return {
        str(index): {name: _PER_LAYER.get(name, _small_number(name, value)) for name, value in special[kind].items()}
        for index, kind in enumerate(chosen)
        if kind in special
    }


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
    names = ["rope_theta", "partial_rotary_factor", "mrope_interleaved"]
    kept = {name: rope[name] for name in names if name in rope}
    if "llama_4_scaling_beta" in rope:  # attention reads both
        kept |= {"llama_4_scaling_beta": rope["llama_4_scaling_beta"], "original_max_position_embeddings": TRAINED}
    kind = "proportional" if rope.get("rope_type") == "proportional" else "default"
    sections = {"mrope_section": [4, 2, 2]} if "mrope_section" in rope else {}
    return {"rope_type": kind, **kept, **sections}


def small_model(model_type: str, **settings: Any) -> PreTrainedModel:
    """A small random model of a type, in float32, in evaluation mode; settings: as for `small_config`."""
    config = small_config(model_type, **settings)
    auto = AutoModelForCausalLM if model_type in CAUSAL_TYPES else AutoModelForImageTextToText
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights that keep sizes as they are: with those of a fresh model, attention hardly sees any position.
            if parameter.dim() >= 2 and parameter.std() < 0.1:
                parameter.normal_(0, max(parameter.shape[-2:]) ** -0.5)
        for name, parameter in model.named_parameters():
            if name.endswith(".temp"):  # Zaya's keys are multiplied by it, and it begins at 0
                parameter.fill_(1.0)
    return model
