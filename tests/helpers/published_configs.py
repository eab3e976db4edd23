"""Configs of published models, with the scaling they hold and what inspection says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
REMOTE = {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"}
LIST = [1.0 + d / 8 for d in range(48)]


def yarn(factor: float, original: int | None, **more: Any) -> dict[str, Any]:
    length = {} if original is None else {"original_max_position_embeddings": original}
    return {"type": "yarn", "factor": factor, **length, **more}


def released(factor: float, base: dict[str, Any], original: int, **more: Any) -> dict[str, Any]:
    """After the configs that the YaRN authors published."""
    return base | {"auto_map": REMOTE, "rope_scaling": yarn(factor, original, finetuned=True)} | more


PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "rope_scaling": {"type": "longrope", "short_factor": LIST, "long_factor": [2 * x for x in LIST]},
}
PHI35_MOE = {
    "model_type": "phimoe",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0 + d / 8 for d in range(64)],
        "long_factor": [2.0 + d / 4 for d in range(64)],
        "short_mscale": 1.243163121016122,
        "long_mscale": 1.243163121016122,
        "original_max_position_embeddings": 4096,
    },
}
HUNYUAN = {
    "model_type": "hunyuan_v1_dense",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 32,
    "max_position_embeddings": 32768,
    "rope_theta": 10000.0,
    "rope_scaling": {
        **{"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "beta_slow": 1},
        **{"mscale": 1.0, "mscale_all_dim": 0.0},
    },
}
QWEN25_VL = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000.0,
    "vision_config": {},
    "rope_scaling": {
        **{"type": "yarn", "factor": 4, "original_max_position_embeddings": 32768},
        "mrope_section": [16, 24, 24],
    },
}
KIMI_K2 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 64,
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {
        **{"type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        **{"beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}
R1_QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "attn_factor": 0.8782488562869419,
    },
}
"""DeepSeek-R1-0528-Qwen3-8B, which is trained with an attention factor of 1 by its own key."""
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "rope_scaling": yarn(4.0, 32768),
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1),
}
OLMO3 = {
    "model_type": "olmo3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "max_position_embeddings": 65536,
    "rope_theta": 500000,
    "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "head_dim": 64,
    "num_hidden_layers": 24,
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "sliding_window": 128,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
LLAMA3 = LLAMA | {
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 12,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    },
}
COHERE2 = {
    "model_type": "cohere2",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "max_position_embeddings": 132096,
    "rope_theta": 50000,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
SMOLLM3 = {
    "model_type": "smollm3",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "max_position_embeddings": 65536,
    "rope_theta": 5000000.0,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
}
MINISTRAL3 = {
    "model_type": "ministral3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 8,
    "max_position_embeddings": 262144,
    "rope_parameters": yarn(16.0, 16384, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0)
    | {"rope_type": "yarn", "rope_theta": 1000000.0, "llama_4_scaling_beta": 0.1},
}
LLAMA4 = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "head_dim": 128,
    "num_hidden_layers": 8,
    "max_position_embeddings": 10485760,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
EXAONE4 = {
    "model_type": "exaone4",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "head_dim": 128,
    "num_hidden_layers": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
    "rope_scaling": LLAMA3["rope_scaling"] | {"factor": 16.0},
}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "alibi": False,
    "max_position_embeddings": 2048,
}

# What a published model's config must and must not set off: name -> (config, spec of the scaling, codes).
PUBLISHED: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "Llama-2": (LLAMA, "unscaled", set()),
    "Vicuna-7b-v1.5-16k": (
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}},
        "linear x4",
        {"unknown-original", "static-scaling"},
    ),
    "CodeLlama": (LLAMA | {"max_position_embeddings": 16384, "rope_theta": 1e6}, "unscaled", set()),
    "Llama-3.1": (LLAMA3, "llama3 x8", set()),
    "Yarn-Llama-2-7b-64k": (
        released(16.0, LLAMA, 4096, max_position_embeddings=65536),
        "yarn x16",
        {"finetuned", "remote-code"},
    ),
    "Yarn-Llama-2-7b-128k": (
        released(32.0, LLAMA, 4096, max_position_embeddings=131072),
        "yarn x32",
        {"finetuned", "remote-code"},
    ),
    "Yarn-Mistral-7b-64k": (
        released(8.0, MISTRAL, 8192, sliding_window=65536),
        "yarn x8 (beta_fast=128, beta_slow=2, mscale=0.7)",
        {"finetuned", "remote-code", "mistral-constants", "length-mismatch"},
    ),
    "Yarn-Mistral-7b-128k": (
        released(16.0, MISTRAL, 8192, sliding_window=131072),
        "yarn x16 (beta_fast=128, beta_slow=2, mscale=0.7)",
        {"finetuned", "remote-code", "mistral-constants", "length-mismatch"},
    ),
    "Phi-3-mini-128k": (PHI3, "longrope x32", {"longrope-switch"}),
    "Qwen2.5 with the YaRN of its card": (QWEN, "yarn x4", {"undeclared-length", "static-scaling"}),
    "DeepSeek-V3": (DEEPSEEK, "yarn x40 (attention_factor=1, beta_fast=32, beta_slow=1)", {"mscale-softmax"}),
    "Kimi K2": (KIMI_K2, "yarn x32 (attention_factor=1, beta_fast=1, beta_slow=1)", {"mscale-softmax"}),
    "Phi-3.5-MoE": (PHI35_MOE, "longrope x32 (attention_factor=1.24316", {"longrope-switch", "long-list-unused"}),
    "HunYuan": (HUNYUAN, "abf (theta=11158839.9", {"alpha", "two-values"}),
    "Qwen2.5-VL with the YaRN of its card": (QWEN25_VL, "yarn x4", {"attention-key", "static-scaling", "vllm-axes"}),
    "Gemma 3": (GEMMA3, "linear x8", {"family-theta", "known-original"}),
    "OLMo 3": (OLMO3, "yarn x8", set()),
    "GPT-OSS": (GPT_OSS, "yarn x32", set()),
    "SmolLM3": (SMOLLM3, "unscaled", {"layers-without-rope"}),
    "Cohere2": (COHERE2, "unscaled", {"layers-without-rope"}),
    "Pythia": (PYTHIA, "unscaled", set()),
    "Ministral-3": (MINISTRAL3, "yarn x16 (attention_factor=1, beta_fast=32, beta_slow=1)", {"attention-key"}),
    "Llama-4-Scout": (LLAMA4, "llama3 x16 (high_freq_factor=1)", {"layers-without-rope"}),
    "EXAONE-4.0-32B": (EXAONE4, "llama3 x16", {"layers-without-rope"}),
    "Falcon": (FALCON, "unscaled", {"family-theta"}),
}


def written(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path
