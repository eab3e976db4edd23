"""Prompts for fitting a scaling: facts hidden in other text, none of them in the words or numbers of a test.

eval/passkey.py asks for five digits in sentences of its own. Here the words are others, numbers have six digits, and
the seeds have a namespace of their own, so nothing is fitted to the test.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt


@dataclass(frozen=True)
class Wording:
    """The words of a prompt; `{key}` is the number."""

    opening: str
    fact: str
    question: str
    begin: str
    """How the answer begins."""


WORDINGS = (
    Wording(
        "Remember the order number in the following pages.\n",
        "\nThe order number is {key}. Please note it: {key}.\n",
        "\nWhat is the order number?",
        "The order number is",
    ),
    Wording(
        "One of these lines tells the code of the safe.\n",
        "\nThe code of the safe is {key}. The safe opens with {key}.\n",
        "\nWhat is the code of the safe?",
        "The code of the safe is",
    ),
    Wording(
        "",
        "\nTo everybody: the telephone number of Mr Harris is {key}.\n",
        "\nWhat is the telephone number of Mr Harris?",
        "The telephone number of Mr Harris is",
    ),
)
FILLER = "The tea was served at five. Nobody came to the door. A cart went down the lane. It began to rain again. "
KEYS = (100_000, 999_999)
"""Six digits."""


class TooShort(ConfigError):
    """A length has no room for a hidden fact and its question, which need at least `least` tokens."""

    def __init__(self, length: int, least: int) -> None:
        super().__init__(f"length {length} is too short for a prompt; this tokenizer needs at least {least} tokens")
        self.length, self.least = length, least


@contextmanager
def naming_original(original: int, instead: str) -> Iterator[None]:
    """Say of a length that is too short for a prompt that it follows from L, which is what a user knows.

    instead: the flag that does without prompts, and what it does.

    Raises:
        ConfigError: in place of `TooShort`.
    """
    try:
        yield
    except TooShort as error:
        raise ConfigError(
            f"original_max_position_embeddings={original} is too short for hidden facts, which take at least "
            f"{error.least} tokens with their questions; {instead}"
        ) from None


def fact_prompt(
    tokenizer: Any, length: int, depth: float, key: int, wording: Wording, filler_ids: Sequence[int]
) -> PasskeyPrompt:
    """Build a prompt of exactly `length` tokens, answer included; arguments as for `passkey_prompts.build_prompt`.

    Raises:
        TooShort: `length` leaves no room for the fixed text.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    opening = bos + encode(tokenizer, wording.opening)
    line = encode(tokenizer, wording.fact.format(key=key))
    text = f"{wording.question} {wording.begin}"
    asked, whole = encode(tokenizer, text), encode(tokenizer, f"{text} {key}")
    # A tokenizer may merge across the border, so the answer begins where the two tokenizations part.
    same = zip(asked, whole, strict=False)
    shared = next((place for place, (one, other) in enumerate(same) if one != other), len(asked))
    question, answer = whole[:shared], whole[shared:]
    room = length - len(opening) - len(line) - len(question) - len(answer)
    if room < 0:
        raise TooShort(length, length - room)
    filler = (list(filler_ids) * (room // len(filler_ids) + 1))[:room]
    before = round(room * depth)
    input_ids = opening + filler[:before] + line + filler[before:] + question
    distance = length - len(opening) - before
    return PasskeyPrompt(input_ids, answer, key, before / room if room else 0.0, length, distance)


def fact_prompts(
    tokenizer: Any, length: int, count: int, seed: int, texts: Sequence[Sequence[int]], purpose: str = "tune"
) -> list[PasskeyPrompt]:
    """Make the prompts of one length: depths spread evenly, wordings in turn, every other one in plain sentences.

    Args:
        texts: token ids of the texts that the others are hidden in.
        purpose: prompts of another purpose are others.

    Raises:
        TooShort: the length is too short for a prompt.
    """
    sentences = encode(tokenizer, FILLER)
    prompts: list[PasskeyPrompt] = []
    least = 0
    for index in range(count):
        rng = random.Random(f"{purpose}/{seed}/{length}/{index}")
        key, jitter, text = rng.randint(*KEYS), rng.random(), rng.choice(texts)
        filler = sentences if index % 2 else text
        # Steps of the golden ratio spread any part of the prompts evenly over depths.
        depth = (index * 0.618034 + jitter / max(count, 1)) % 1
        try:
            prompts.append(fact_prompt(tokenizer, length, depth, key, WORDINGS[index % len(WORDINGS)], filler))
        except TooShort as error:  # others may need more
            least = max(least, error.least)
    if least:
        raise TooShort(length, least)
    return prompts


def retrieval_lengths(original: int, longest: int) -> list[int]:
    """Lengths to ask at: the original one, its doublings, and the longest."""
    lengths = [original]
    while lengths[-1] * 2 < longest:
        lengths.append(lengths[-1] * 2)
    return sorted({*lengths, longest})
