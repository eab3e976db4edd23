"""Passkey prompts of exact token length (Mohtashami & Jaggi 2023, wording of the released YaRN evaluation).

A prompt is made of pieces, each tokenized on its own so that lengths add up: opening, filler with one or more key
lines in it, question. In a chat template, the user's message ends with the question, and the model's answer begins as
the wording says. The plain prompt has one key in a cyclic stream of dull sentences, in one of several wordings; the
hard one has several keys, numbered in the order in which they stand, in whatever text it is given.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.chat_templates import ChatTurn

OPENING = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY_LINE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
ASKED = ("\nWhat is the pass key?", "The pass key is")
"""The question, and how its answer begins."""
QUESTION = " ".join(ASKED)
HARD_KEY_LINE = "\nThe {nth} pass key is {key}. Remember it. {key} is the {nth} pass key.\n"
HARD_ASKED = ("\nWhat is the {nth} pass key?", "The {nth} pass key is")
HARD_QUESTION = " ".join(HARD_ASKED)
KEY_RANGE = (10_000, 99_999)  # five digits, as the paper says; the released script drew from 1 to 50000


@dataclass(frozen=True)
class Wording:
    """The words of a plain prompt.

    Attributes:
        opening: what it begins with.
        filler: dull sentences, repeated until the prompt is long enough.
        key_line: the line to find, with `{key}` in the place of the number.
        question: what is asked in the end.
        answer: how the answer begins, up to the number.
    """

    opening: str
    filler: str
    key_line: str
    question: str
    answer: str


RELEASED = "passkey"
"""The wording of the released evaluation, which rows mean that name none."""
WORDINGS: dict[str, Wording] = {
    RELEASED: Wording(OPENING, FILLER, KEY_LINE, *ASKED),
    # Shares no sentence with the other, and says its number once: a model that was trained on one is new to this one.
    "needle": Wording(
        opening="Read the following with care. One remark in it has nothing to do with the rest, and you will be asked "
        "about it.\n",
        filler="The kettle stands on the stove. Two chairs are made of oak. A clock hangs over the door. Nobody came "
        "by today. The window was left open. ",
        key_line="\nThe combination of the safe in the library is {key}.\n",
        question="\nWhich number opens the safe?",
        answer="The combination of the safe in the library is",
    ),
}


@dataclass(frozen=True)
class PasskeyPrompt:
    """`input_ids` ends with the question; `answer_ids` are the tokens a right continuation begins with.

    `depth` is the realised share of the filler that stands before the key line, 0 (start) to 1 (end), and
    `length` = len(input_ids) + len(answer_ids). `distance` is the number of tokens from the beginning of the key line
    to the end of the answer: a model that reads the last `distance` tokens alone sees the key.
    """

    input_ids: list[int]
    answer_ids: list[int]
    key: int
    depth: float
    length: int
    distance: int


@dataclass(frozen=True)
class HardPrompt(PasskeyPrompt):
    """A prompt with several keys; `key` and `depth` are those of the one that is asked for."""

    keys: tuple[int, ...]
    depths: tuple[float, ...]
    """The depth of every key, in the order of the text."""
    asked: int
    """Which key is asked for, counted from 1."""


def draw_key(rng: random.Random) -> int:
    """A key with five digits."""
    return rng.randint(*KEY_RANGE)


def draw_keys(rng: random.Random, count: int) -> list[int]:
    """Different keys with five digits."""
    return rng.sample(range(KEY_RANGE[0], KEY_RANGE[1] + 1), count)


def ordinal(n: int) -> str:
    """The ordinal of a number: 1st, 2nd, 3rd, 4th, 11th, 12th, 13th, 21st, 111th."""
    suffix = "th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"


def _opening(tokenizer: Any, opening: str, chat: ChatTurn | None) -> list[int]:
    if chat is not None:
        return encode(tokenizer, chat.before + opening)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + encode(tokenizer, opening)


def _question_and_answer(
    tokenizer: Any, question: tuple[str, str], key: int, chat: ChatTurn | None
) -> tuple[list[int], list[int]]:
    """Split the tokens of "question, beginning of its answer, key" where the key begins.

    A tokenizer may merge across that border, so the split is at the longest prefix that both tokenizations share.
    """
    text = (" " if chat is None else chat.after).join(question)
    asked, whole = encode(tokenizer, text), encode(tokenizer, f"{text} {key}")
    shared = 0
    while shared < len(asked) and asked[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


def _room(length: int, *pieces: Sequence[int]) -> int:
    """The number of tokens left for filler.

    Raises:
        ConfigError: the pieces alone are longer than `length`.
    """
    room = length - sum(map(len, pieces))
    if room < 0:
        raise ConfigError(f"passkey length {length} is too short; this tokenizer needs at least {length - room} tokens")
    return room


def _check_depths(depths: Sequence[float]) -> None:
    for depth in depths:
        if not 0.0 <= depth <= 1.0:
            raise ConfigError(f"depth {depth!r} is not allowed; it is a share between 0 and 1")


def build_prompt(
    tokenizer: Any,
    length: int,
    depth: float,
    key: int,
    chat: ChatTurn | None = None,
    wording: Wording = WORDINGS[RELEASED],
) -> PasskeyPrompt:
    """Build a prompt of exactly `length` tokens, answer included.

    Args:
        tokenizer: a transformers tokenizer; its BOS, if it has one, opens the prompt.
        length: tokens of prompt and answer together.
        depth: share of the filler before the key line, 0 to 1.
        key: the number to retrieve.
        chat: the template that the prompt is put into; its tokens count. None: plain text.
        wording: the words around the key.

    Raises:
        ConfigError: `length` leaves no room for the fixed text, or `depth` is outside [0, 1].
    """
    _check_depths([depth])
    opening, key_line = _opening(tokenizer, wording.opening, chat), encode(tokenizer, wording.key_line.format(key=key))
    question, answer = _question_and_answer(tokenizer, (wording.question, wording.answer), key, chat)
    room = _room(length, opening, key_line, question, answer)
    sentences = encode(tokenizer, wording.filler)
    filler = (sentences * (room // len(sentences) + 1))[:room]
    before = round(room * depth)
    input_ids = opening + filler[:before] + key_line + filler[before:] + question
    distance = length - len(opening) - before
    return PasskeyPrompt(input_ids, answer, key, before / room if room else 0.0, length, distance)


def build_hard_prompt(
    tokenizer: Any,
    length: int,
    depths: Sequence[float],
    keys: Sequence[int],
    asked: int,
    text_ids: Sequence[int],
    chat: ChatTurn | None = None,
) -> HardPrompt:
    """Build a prompt with several keys, of exactly `length` tokens, answer included.

    Args:
        tokenizer: a transformers tokenizer; its BOS, if it has one, opens the prompt.
        length: tokens of prompt and answer together.
        depths: share of the text before each key line, 0 to 1, ascending.
        keys: the numbers, in the order in which they stand; the first is called 1st.
        asked: which of them is asked for, counted from 1.
        text_ids: the text to hide them in; its first tokens are used, as many as there is room for.
        chat: as for `build_prompt`.

    Raises:
        ConfigError: `length` leaves no room for the fixed text, the text is too short for it, depths outside [0, 1] or
            not ascending, or no such key.
    """
    _check_depths(depths)
    if list(depths) != sorted(depths) or len(depths) != len(keys) or not 1 <= asked <= len(keys):
        raise ConfigError(
            f"asked {asked} of {len(keys)} keys at depths {list(depths)} is not allowed; ascending depths"
        )
    key = keys[asked - 1]
    opening = _opening(tokenizer, OPENING, chat)
    lines = [encode(tokenizer, HARD_KEY_LINE.format(nth=ordinal(n), key=k)) for n, k in enumerate(keys, start=1)]
    ask, begin = (text.format(nth=ordinal(asked)) for text in HARD_ASKED)
    question, answer = _question_and_answer(tokenizer, (ask, begin), key, chat)
    room = _room(length, opening, *lines, question, answer)
    if len(text_ids) < room:
        raise ConfigError(f"the text has {len(text_ids)} tokens; a prompt of {length} tokens needs {room} of them")
    cuts = [round(room * depth) for depth in depths]
    input_ids, start = list(opening), 0
    for cut, line in zip(cuts, lines, strict=True):
        input_ids += [*text_ids[start:cut], *line]
        start = cut
    input_ids += [*text_ids[start:room], *question]
    # The key line that is asked for begins after the text before it and the lines of the earlier keys.
    distance = length - len(opening) - cuts[asked - 1] - sum(map(len, lines[: asked - 1]))
    realised = tuple(cut / room if room else 0.0 for cut in cuts)
    return HardPrompt(
        input_ids=input_ids,
        answer_ids=answer,
        key=key,
        depth=realised[asked - 1],
        length=length,
        distance=distance,
        keys=tuple(keys),
        depths=realised,
        asked=asked,
    )
