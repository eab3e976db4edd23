"""How answers are decoded, and the context that a scaling is made for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from scaled_rope import RopeScaling
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.streamed_answers import Decoding, context_of, generation_config

TOKENIZER = SimpleNamespace(eos_token_id=2, bos_token_id=1, pad_token_id=None)
MODEL = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[5, 2], top_k=7, repetition_penalty=3.0))


@pytest.mark.parametrize(
    ("temperature", "top_k", "drawn"),
    [
        (None, None, None),
        (0.0, None, None),
        (0.0, 5, None),
        (0.8, None, (0.8, 0)),
        (0.8, 5, (0.8, 5)),
        (None, 5, (1.0, 5)),
    ],
)
def test_tokens_are_drawn_when_asked_for(
    temperature: float | None, top_k: int | None, drawn: tuple[float, int] | None
) -> None:
    config = generation_config(Decoding(9, temperature, top_k), MODEL, TOKENIZER, cached=True)
    assert config.do_sample is (drawn is not None) and config.max_new_tokens == 9 and config.use_cache is True
    if drawn is not None:
        assert (config.temperature, config.top_k) == drawn
    # Of the checkpoint's own settings only its end tokens count.
    assert config.eos_token_id == [2, 5] and config.pad_token_id == 2 and config.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (RopeScaling("default", 1.0, 64), 64),
        (RopeScaling("yarn", 4.0, 64), 256),
        (RopeScaling("yarn", 1.0, 64, dynamic=True), None),
    ],
)
def test_context(scaling: RopeScaling, context: int | None) -> None:
    assert context_of(ModelJob("m", "spec", scaling, False, 16, "float32", "f")) == context
