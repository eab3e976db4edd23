"""Passkey prompts as documents of an lm-eval task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import build_prompt, draw_key

DEFAULT_LENGTHS = (4096,)


def dataset(
    max_seq_lengths: Sequence[int] = DEFAULT_LENGTHS,
    iterations: int = 20,
    seed: int = 42,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """Prompts at evenly spaced depths, for each length in tokens (answer included)."""
    name = tokenizer or pretrained
    if name is None:
        raise ConfigError("task 'passkey' builds prompts of given lengths: give pretrained= or tokenizer=")
    words = load_tokenizer(name)
    rows = []
    for length in max_seq_lengths:
        for index in range(iterations):
            key = draw_key(random.Random(f"passkey/{seed}/{length}/{index}"))
            depth = index / (iterations - 1) if iterations > 1 else 0.5
            text = _prompt(words, length, depth, key)
            rows.append({"input": text, "answer": f" {key}", "max_length": length, "depth": depth})
    return {"test": Dataset.from_list(rows)}


def _prompt(tokenizer: Any, length: int, depth: float, key: int) -> str:
    """A prompt that has `length` tokens together with its answer, or slightly fewer.

    lm-eval passes prompts as text. Where the tokenizer merges tokens of two separately tokenized pieces, more filler
    makes up for it.
    """
    text, asked = "", length
    for _ in range(8):
        ids = build_prompt(tokenizer, asked, depth, key).input_ids
        candidate = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        missing = length - len(tokenizer.encode(f"{candidate} {key}", add_special_tokens=False))
        if missing >= 0:
            text = candidate
        if missing == 0:
            break
        asked += missing if missing > 0 else -1
    return text or candidate


def score(document: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """Whether the key is the greedy continuation: as "acc" over all lengths, and by length, as in RULER's tasks."""
    right = float(results[0][1])
    return {"acc": right, str(document["max_length"]): right}
