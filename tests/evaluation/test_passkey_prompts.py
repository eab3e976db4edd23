"""Passkey prompts, plain and hard: exact lengths, keys, and seeds."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import (
    KEY_LINE,
    OPENING,
    QUESTION,
    RELEASED,
    WORDINGS,
    build_hard_prompt,
    build_prompt,
    draw_keys,
    ordinal,
)
from tests.helpers.packing import BOS
from tests.helpers.retrieval import (
    STORY,
    TOKENIZERS,
    tokenizers,  # noqa: F401
)


@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_passkey_prompts_have_exact_length_and_contain_the_key(tokenizer_dir, depth):
    from scaled_rope.checkpoint import encode, load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    fixed = (OPENING, KEY_LINE.format(key=54321), f"{QUESTION} 54321")
    shortest = 1 + sum(len(encode(tokenizer, piece)) for piece in fixed)
    for length in (shortest, shortest + 1, 1000):
        prompt = build_prompt(tokenizer, length, depth, 54321)
        assert len(prompt.input_ids) + len(prompt.answer_ids) == prompt.length == length
        assert prompt.input_ids[0] == BOS and prompt.input_ids.count(BOS) == 1
        text = tokenizer.decode(prompt.input_ids)
        assert text.count("54321") == 2
        ids = prompt.input_ids + prompt.answer_ids
        assert ids[-prompt.distance :][: len(encode(tokenizer, fixed[1]))] == encode(tokenizer, fixed[1])
        assert text.endswith("The pass key is") and tokenizer.decode(prompt.answer_ids).strip() == "54321"
    assert prompt.depth == pytest.approx(depth, abs=1 / (1000 - shortest))
    with pytest.raises(ConfigError, match=f"at least {shortest}"):
        build_prompt(tokenizer, shortest - 1, depth, 54321)


def test_the_released_prompt_word_for_word(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["single"]
    sentences = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
    filler = encode(tokenizer, sentences)
    opening = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there.\n"
    )
    line = "\nThe pass key is 32454. Remember it. 32454 is the pass key.\n"
    before, key_line = encode(tokenizer, opening), encode(tokenizer, line)
    asked = encode(tokenizer, "\nWhat is the pass key? The pass key is 32454")
    for times in (0, 2):
        length = 1 + len(before) + 2 * times * len(filler) + len(key_line) + len(asked)
        prompt = build_prompt(tokenizer, length, 0.5, 32454)
        expected = [tokenizer.bos_token_id, *before, *filler * times, *key_line, *filler * times, *asked]
        assert prompt.input_ids + prompt.answer_ids == expected


@pytest.mark.parametrize("name", WORDINGS)
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_every_wording_has_exact_length_and_its_key(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, depth: float
) -> None:
    wording = WORDINGS[name]
    for tokenizer in tokenizers.values():
        prompt = build_prompt(tokenizer, 600, depth, 54321, wording=wording)
        assert len(prompt.input_ids) + len(prompt.answer_ids) == prompt.length == 600
        text = tokenizer.decode(prompt.input_ids)
        assert text.count("54321") == wording.key_line.count("{key}")
        assert text.endswith(wording.answer) and tokenizer.decode(prompt.answer_ids).strip() == "54321"
        line = encode(tokenizer, wording.key_line.format(key=54321))
        assert (prompt.input_ids + prompt.answer_ids)[-prompt.distance :][: len(line)] == line


def test_the_needle_shares_no_sentence_with_the_released_wording() -> None:
    needle, released = WORDINGS["needle"], WORDINGS[RELEASED]
    assert needle.key_line == "\nThe combination of the safe in the library is {key}.\n"
    assert needle.question == "\nWhich number opens the safe?"
    own, theirs = (set(one.filler.strip().split(". ")) for one in (needle, released))
    assert len(own) == 5 and not own & theirs
    words = {"pass", "passkey", "grass", "sky", "sun"}
    assert not words & set(" ".join((needle.opening, needle.filler, needle.key_line, needle.question)).lower().split())


@pytest.mark.parametrize(
    ("n", "word"),
    [
        *((1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (10, "10th"), (11, "11th"), (12, "12th"), (13, "13th")),
        *((20, "20th"), (21, "21st"), (22, "22nd"), (23, "23rd"), (100, "100th"), (101, "101st"), (111, "111th")),
        *((112, "112th"), (113, "113th"), (121, "121st"), (1011, "1011th")),
    ],
)
def test_ordinals(n: int, word: str) -> None:
    assert ordinal(n) == word


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("keys", [1, 3, 12])
def test_hard_prompt_hides_its_keys_in_the_text(
    tokenizers: dict[str, PreTrainedTokenizerFast], name: str, keys: int
) -> None:
    tokenizer = tokenizers[name]
    rng = random.Random(keys)
    numbers, depths = draw_keys(rng, keys), sorted(rng.random() for _ in range(keys))
    text = encode(tokenizer, STORY * 200)
    prompt = build_hard_prompt(tokenizer, 1200, depths, numbers, keys, text)
    assert len(prompt.input_ids) + len(prompt.answer_ids) == prompt.length == 1200
    assert prompt.input_ids[0] == tokenizer.bos_token_id and prompt.input_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.key == numbers[-1] and prompt.depth == prompt.depths[-1]
    # Taking the key lines out leaves the text as it was, with each line where its depth says.
    opening = len(encode(tokenizer, OPENING)) + 1
    rest, places = prompt.input_ids[opening:], []
    for nth, key in enumerate(numbers, 1):
        line = encode(tokenizer, f"\nThe {ordinal(nth)} pass key is {key}. Remember it. {key} is the {ordinal(nth)} "
                                 f"pass key.\n")  # fmt: skip
        (place,) = [i for i in range(len(rest)) if rest[i : i + len(line)] == line]
        places.append(place)
        if nth == keys:  # the one that is asked for
            assert (prompt.input_ids + prompt.answer_ids)[-prompt.distance :][: len(line)] == line
        rest = rest[:place] + rest[place + len(line) :]
    question = tokenizer.decode(rest[places[-1] :] + prompt.answer_ids)
    assert f"What is the {ordinal(keys)} pass key? The {ordinal(keys)} pass key is {prompt.key}" in question
    room = next(n for n in range(len(rest), 0, -1) if rest[:n] == text[:n])
    assert room >= max(places) and len(rest) - room <= 40  # what is left is the question
    for place, depth, realised in zip(places, depths, prompt.depths, strict=True):
        # Depths are realised in whole tokens of `room`, which the first tokens of the question may seem to lengthen.
        assert place / room == pytest.approx(realised, abs=3 / room) and realised == pytest.approx(depth, abs=1 / room)


def test_many_keys_are_distinct() -> None:
    assert len(set(draw_keys(random.Random(0), 90_000))) == 90_000  # all there are
