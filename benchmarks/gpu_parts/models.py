"""The models that the parts `prefill` and `train` measure."""

from __future__ import annotations

from typing import Any

MODELS: dict[str, dict[str, int]] = {
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
THETA = 10000.0
CHECKED = 512
"""Number of tokens in the comparison with a reference."""
NOISE = 3.0
"""Allowed error in units of that of plain bf16, eager: another implementation rounds elsewhere, and may be unlucky."""


def flops(config: Any, tokens: int) -> float:
    """Floating-point operations of one causal forward pass: two per weight and token, and attention's products."""
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    head_dim = config.hidden_size // heads
    kv = config.num_key_value_heads
    weights = config.hidden_size * head_dim * (2 * heads + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    return 2.0 * depth * weights * tokens + 2.0 * depth * heads * head_dim * tokens**2
