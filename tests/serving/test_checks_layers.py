"""Layers that rotate, and how far they see."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from scaled_rope import RopeScaling
from scaled_rope.serving.checks_layers import (
    alibi_instead_of_rope,
    family_without_rope,
    layers_that_do_not_rotate,
    window_shorter_than_context,
)
from tests.helpers.facts import UNSCALED, YARN, found, only

SLIDING = ["sliding_attention"] * 4
MIXED = ["sliding_attention", "full_attention"] * 2


def test_a_family_without_rope() -> None:
    facts: dict[str, Any] = {"built": GPT2Config(), "model_type": "gpt2"}
    assert found(family_without_rope, **facts) == ["warning no-rope"]
    one = only(family_without_rope, **facts, text={"rope_theta": 1e4})
    two = only(family_without_rope, **facts, text={"rope_theta": 1e4, "rope_scaling": {}, "n_embd": 8})
    assert one.level == two.level == "error"
    assert "rope_theta has no effect." in one.text and "rope_scaling and rope_theta have no effect." in two.text


def test_a_family_with_rope_or_one_that_is_not_known() -> None:
    assert found(family_without_rope, built=LlamaConfig(), text={"rope_theta": 1e4}) == []
    assert found(family_without_rope, text={"rope_theta": 1e4}) == []


def windowed(scaling: RopeScaling, window: int | None, types: list[str] | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"max_position_embeddings": 32768, "sliding_window": window, "layer_types": types, **more}
    return {"scaling": scaling, "complete": sizes}


@pytest.mark.parametrize(
    ("facts", "level", "context"),
    [
        (windowed(YARN, 4096), "warning", 32768),
        (windowed(YARN, 4096, SLIDING), "warning", 32768),
        (windowed(UNSCALED, 2048), "info", 4096),
        (windowed(RopeScaling("yarn", 1.0, 4096), 2048), "info", 4096),
        (windowed(RopeScaling("default"), 4096), "info", 32768),
    ],
)
def test_a_window_shorter_than_the_context(facts: dict[str, Any], level: str, context: int) -> None:
    finding = only(window_shorter_than_context, **facts)
    assert (finding.code, finding.level) == ("sliding-window", level)
    assert f"the context is {context}:" in finding.text


@pytest.mark.parametrize(
    "facts",
    [
        windowed(YARN, 32768),
        windowed(YARN, None),
        windowed(YARN, 4096, MIXED),  # some layers see everything
        windowed(YARN, 4096, use_sliding_window=False),
        {"complete": windowed(YARN, 4096)["complete"]},
    ],
)
def test_layers_that_see_the_whole_context(facts: dict[str, Any]) -> None:
    assert found(window_shorter_than_context, **facts) == []


def test_layers_without_rope_by_design_or_dropped() -> None:
    facts: dict[str, Any] = {"scaling": YARN, "without_rope": (1, 3), "model_type": "smollm3"}
    finding = only(layers_that_do_not_rotate, **facts, complete={"num_hidden_layers": 8})
    assert (finding.code, finding.level, finding.remedy) == ("layers-without-rope", "info", "")
    assert finding.text.startswith("2 of 8 layers use no rotary embedding, by design;")
    dropped = only(layers_that_do_not_rotate, **facts, complete={"layer_types": MIXED}, dropped=(3,))
    assert dropped.text.startswith("2 of 4 layers use no rotary embedding, they were dropped;")


def test_a_scaling_of_near_layers_only_has_nothing_to_extend() -> None:
    facts: dict[str, Any] = {"without_rope": (1, 3), "model_type": "cohere2", "complete": {"sliding_window": 4096}}
    finding = only(layers_that_do_not_rotate, scaling=YARN, **facts)
    assert (finding.level, finding.remedy) == ("warning", "Leave RoPE unscaled.")
    assert "look back 4096 tokens only" in finding.text
    assert found(layers_that_do_not_rotate, scaling=UNSCALED, **facts) == ["info layers-without-rope"]


def test_a_model_whose_layers_all_rotate() -> None:
    assert found(layers_that_do_not_rotate, scaling=YARN, model_type="llama") == []
    assert found(layers_that_do_not_rotate, without_rope=(1,)) == []


def test_alibi_instead_of_rope() -> None:
    facts: dict[str, Any] = {"raw": {"alibi": True}, "model_type": "falcon"}
    assert found(alibi_instead_of_rope, scaling=UNSCALED, **facts) == ["info alibi"]
    assert found(alibi_instead_of_rope, scaling=YARN, **facts) == ["error alibi"]
    assert found(alibi_instead_of_rope, **facts) == []
    assert found(alibi_instead_of_rope, scaling=YARN, raw={"alibi": False}, model_type="falcon") == []
    assert found(alibi_instead_of_rope, scaling=YARN, raw={"alibi": True}, model_type="llama") == []
