"""Hard passkeys: prompts follow from the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import hard_passkey_evaluator
from tests.helpers.retrieval import (
    STORY,
    tokenizer,  # noqa: F401
    tokenizers,  # noqa: F401
)


def test_hard_prompts_follow_from_the_seed_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    text = torch.tensor(encode(tokenizer, STORY * 300)).numpy()

    def make(length: int = 300, n: int = 6, keys: int = 3, seed: int = 1) -> list[Any]:
        return hard_passkey_evaluator.make_prompts(tokenizer, text, length, n, keys, seed)

    assert make() == make() and make(n=3) == make(n=6)[:3]
    assert [p.keys for p in make(seed=2)] != [p.keys for p in make()]
    assert {p.asked for p in make(n=40)} == {1, 2, 3}
    drawn = [depth for p in make(n=60) for depth in p.depths]
    # 180 uniform depths: the share below 1/2 has a standard deviation of 0.037.
    assert sum(depth < 0.5 for depth in drawn) / len(drawn) == pytest.approx(0.5, abs=0.15)
    for prompt in make(n=60):
        assert len(set(prompt.keys)) == 3 and list(prompt.depths) == sorted(prompt.depths)
        assert all(10_000 <= key <= 99_999 for key in prompt.keys)
    assert len({tuple(p.input_ids[100:140]) for p in make()}) == 6  # each from a stretch of its own
    short = hard_passkey_evaluator.make_prompts(tokenizer, text[:650], 300, 6, 1, 1)  # text for two
    assert [len(p.input_ids) + len(p.answer_ids) for p in short] == [300] * 6
    with pytest.raises(ConfigError, match="the text has 50 tokens; a prompt of 300"):
        hard_passkey_evaluator.make_prompts(tokenizer, text[:50], 300, 1, 1, 1)
    with pytest.raises(ConfigError, match="too short"):
        make(keys=40)
