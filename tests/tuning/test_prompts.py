"""Prompts for fitting: exact lengths, findable answers, nothing of a test in them."""

from __future__ import annotations

import pytest

from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import passkey_prompts
from scaled_rope.tuning.prompts import FILLER, WORDINGS, TooShort, fact_prompts, naming_original, retrieval_lengths

TEXTS = [list(range(300, 330)), list(range(400, 430))]


def test_prompts_have_their_length_and_say_the_answer_before_it_is_asked() -> None:
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    prompts = fact_prompts(tokenizer, 200, 12, 0, TEXTS)
    assert prompts == fact_prompts(tokenizer, 200, 12, 0, TEXTS) != fact_prompts(tokenizer, 200, 12, 1, TEXTS)
    assert len({one.key for one in prompts}) == 12
    for index, one in enumerate(prompts):
        assert len(one.input_ids) + len(one.answer_ids) == one.length == 200
        text = tokenizer.decode(one.input_ids)
        assert str(one.key) in text and tokenizer.decode(one.answer_ids).strip() == str(one.key)
        assert text.endswith(WORDINGS[index % 3].begin)
        assert str(one.key) in tokenizer.decode([*one.input_ids, *one.answer_ids][-one.distance :][:60])
        assert ("Nobody came to the door" in text) == bool(index % 2)
    # The part that is searched on and the part that is judged on both see all depths.
    for part in (prompts[::4], [one for index, one in enumerate(prompts) if index % 4]):
        depths = sorted(one.depth for one in part)
        assert depths[0] < 0.4 and depths[-1] > 0.6


def test_nothing_of_a_test_is_asked() -> None:
    test = " ".join([passkey_prompts.OPENING, passkey_prompts.FILLER, passkey_prompts.KEY_LINE, *passkey_prompts.ASKED])
    said = " ".join([FILLER, *(" ".join([one.opening, one.fact, one.question, one.begin]) for one in WORDINGS)])
    assert "pass key" in test and "pass key" not in said
    sentences = {sentence.strip() for sentence in test.split(".")} - {""}
    assert not any(sentence in said for sentence in sentences)
    keys = [one.key for one in fact_prompts(load_tokenizer(str(DEFAULT_MODEL)), 200, 50, 0, TEXTS)]
    assert min(keys) > passkey_prompts.KEY_RANGE[1]


def test_lengths() -> None:
    assert retrieval_lengths(256, 2048) == [256, 512, 1024, 2048]
    assert retrieval_lengths(256, 1500) == [256, 512, 1024, 1500]
    assert retrieval_lengths(256, 320) == [256, 320]


def test_a_length_that_is_too_short_is_told_with_what_all_prompts_need() -> None:
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    with pytest.raises(TooShort, match="length 10 is too short for a prompt; this tokenizer needs at least") as caught:
        fact_prompts(tokenizer, 10, 12, 0, TEXTS)
    assert len(fact_prompts(tokenizer, caught.value.least + 3, 12, 0, TEXTS)) == 12  # whose numbers are others
    said = "original_max_position_embeddings=10 is too short for hidden facts, which take at least"
    with pytest.raises(ConfigError, match=f"^{said} {caught.value.least} tokens with their questions; --prompts 0$"):
        with naming_original(10, "--prompts 0"):
            fact_prompts(tokenizer, 10, 12, 0, TEXTS)
