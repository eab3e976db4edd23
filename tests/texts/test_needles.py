"""Documents that train retrieval: exact lengths, weights on what can be known, nothing that a test asks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import passkey_prompts
from scaled_rope.texts import needles


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEFAULT_MODEL)


@pytest.mark.parametrize(("length", "count", "questions"), [(90, 1, 1), (254, 3, 3), (254, 2, 1)])
def test_exact_length_and_weights(tokenizer: Any, length: int, count: int, questions: int) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        filler = None if seed % 2 else (lambda rng, size: [7] * size)
        tokens, weights = needles.needle_document(
            tokenizer, length, rng, filler, needles=count, questions=questions, weight=8
        )
        assert len(tokens) == len(weights) == length
        assert set(weights) == {1, 8}
        ends = [place for place in range(1, length) if weights[place - 1] == 8 and weights[place] == 1]
        for end in ends:  # what weighs more stood there before
            start = end - next(back for back in range(1, end + 1) if weights[end - back - 1] == 1)
            assert tokenizer.decode(tokens[start:end]).strip() in tokenizer.decode(tokens[:start])
        # The last answer is weighted up to the full stop that ends the document.
        assert weights[-2:] == [8, 1]


def test_a_fixed_seed_gives_the_same_document(tokenizer: Any) -> None:
    one, two, other = (needles.needle_document(tokenizer, 120, random.Random(seed)) for seed in (3, 3, 4))
    assert one == two != other


def test_facts_do_not_contradict_each_other_and_answers_stand_in_their_statements() -> None:
    rng = random.Random(0)
    for _ in range(300):
        facts = needles.draw_needles(rng, 3)
        assert len({fact.question for fact in facts}) == 3
        assert all(fact.value in fact.statement for fact in facts)


def test_no_number_has_the_five_digits_of_a_test() -> None:
    low, high = passkey_prompts.KEY_RANGE
    assert len(str(low)) == len(str(high)) == 5
    rng = random.Random(0)
    values = [needles.draw_value(rng) for _ in range(20_000)]
    lengths = {len(value) for value in values if value.isdigit()}
    assert lengths == {2, 3, 4, 6, 7, 8}
    assert not any(len(part) == 5 for value in values for part in value.split("-") if part.isdigit())


def test_no_wording_of_a_test() -> None:
    """Neither statement nor question nor filler of an evaluation can come about."""
    parts = [*needles.OPENINGS, *(text for form in needles.FORMS for text in form), *needles.NOUNS, *needles.LINES]
    parts += [*needles._SUBJECTS, *needles._PREDICATES, *needles.WORDS]
    everything = " ".join(parts).lower()
    for word in ("pass key", "passkey", "grass", "sky", "sun ", "yellow", "combination", "safe", "library", "magic"):
        assert word not in everything, word


def test_lists_come_again_and_only_what_came_before_weighs_more(tokenizer: Any) -> None:
    for seed in range(20):
        tokens, weights = needles.list_document(tokenizer, 255, random.Random(seed))
        assert len(tokens) == len(weights) == 255 and set(weights) == {1, 8}
        first = weights.index(8)
        answers = [token for token, weight in zip(tokens, weights, strict=True) if weight == 8]
        assert set(answers) <= set(tokens[:first])
        assert sum(weight == 8 for weight in weights) > 20


def test_too_little_room_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="length 12 is too short for 2 needles; it takes"):
        needles.needle_document(tokenizer, 12, random.Random(0), needles=2)
    with pytest.raises(ConfigError, match="questions = 3 is not allowed"):
        needles.needle_document(tokenizer, 100, random.Random(0), needles=2, questions=3)
