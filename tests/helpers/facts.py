"""Small facts for checks to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from scaled_rope import RopeScaling
from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import Finding

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
YARN = RopeScaling("yarn", 8.0, 4096)
UNSCALED = RopeScaling("default", original_max_position_embeddings=4096)


def found(check: Callable[[ConfigFacts], Iterable[Finding]], **facts: Any) -> list[str]:
    """The findings of a check, as "level code"."""
    return [f"{finding.level} {finding.code}" for finding in check(ConfigFacts(**facts))]


def only(check: Callable[[ConfigFacts], Iterable[Finding]], **facts: Any) -> Finding:
    """The one finding of a check."""
    (finding,) = check(ConfigFacts(**facts))
    return finding
