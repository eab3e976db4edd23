"""Passkey prompts of exact token length (Mohtashami & Jaggi 2023, wording of the released YaRN evaluation).

A prompt is five pieces, each tokenized on its own so that lengths add up: opening, filler, the line with the key,
filler, question. The filler is a cyclic stream cut to the number of tokens that is missing, split at `depth`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaled_rope.errors import ConfigError

OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY_LINE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
KEY_RANGE = (10_000, 99_999)  # five digits, as the paper says; the released script drew from 1 to 50000


@dataclass(frozen=True)
class PasskeyPrompt:
    """`input_ids` ends with the question; `answer_ids` are the tokens a right continuation begins with.

    `depth` is the realised share of the filler that stands before the key line, 0 (start) to 1 (end), and
    `length` = len(input_ids) + len(answer_ids).
    """

    input_ids: list[int]
    answer_ids: list[int]
    key: int
    depth: float
    length: int


def draw_key(rng: random.Random) -> int:
    """A key with five digits."""
    return rng.randint(*KEY_RANGE)


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def _question_and_answer(tokenizer: Any, key: int) -> tuple[list[int], list[int]]:
    """Split the tokens of "question + key" where the key begins.

    A tokenizer may merge across that border, so the split is at the longest prefix that both tokenizations share.
    """
    question, whole = _encode(tokenizer, QUESTION), _encode(tokenizer, f"{QUESTION} {key}")
    shared = 0
    while shared < len(question) and question[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def _pieces(tokenizer: Any, key: int) -> tuple[list[int], list[int], list[int], list[int]]:
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    question, answer = _question_and_answer(tokenizer, key)
    return bos + _encode(tokenizer, OPENING), _encode(tokenizer, KEY_LINE.format(key=key)), question, answer


def minimum_length(tokenizer: Any) -> int:
    """The shortest `length` that `build_prompt` accepts for every key: a prompt without filler."""
    return max(sum(map(len, _pieces(tokenizer, key))) for key in KEY_RANGE)


def build_prompt(
    tokenizer: Any, length: int, depth: float, key: int, filler_ids: Sequence[int] | None = None
) -> PasskeyPrompt:
    """A prompt whose tokens, answer included, number exactly `length`.

    Args:
        tokenizer: a transformers tokenizer; its BOS, if it has one, opens the prompt.
        length: tokens of prompt and answer together.
        depth: share of the filler before the key line, 0 to 1.
        key: the number to retrieve.
        filler_ids: tokens to fill with, repeated as needed; default: the released grass-and-sky sentences.

    Raises:
        ConfigError: `length` leaves no room for the fixed text, or `depth` is outside [0, 1].
    """
    if not 0.0 <= depth <= 1.0:
        raise ConfigError(f"depth {depth!r} is not allowed; it is a share between 0 and 1")
    opening, key_line, question, answer = _pieces(tokenizer, key)
    room = length - len(opening) - len(key_line) - len(question) - len(answer)
    if room < 0:
        raise ConfigError(f"passkey length {length} is too short; this tokenizer needs at least {length - room} tokens")
    source = list(filler_ids) if filler_ids is not None else _encode(tokenizer, FILLER)
    filler = (source * (room // len(source) + 1))[:room]
    before = round(room * depth)
    input_ids = opening + filler[:before] + key_line + filler[before:] + question
    return PasskeyPrompt(input_ids, answer, key, before / room if room else 0.0, length)
