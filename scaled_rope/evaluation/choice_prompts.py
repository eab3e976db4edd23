"""Multiple choice over long stories (QuALITY) by the likelihood of the answer's letter.

Wording and cutting are those of ZeroSCROLLS. The prompt ends in "Answer: (", and a letter after it is scored as the
tokenizer really writes it: the prompt is tokenized with each letter appended, the tokens that all four share are the
context, and the rest is each letter's continuation. So if a tokenizer merges "(A" into one token, that token is scored
and not a lone "A" that never follows "(". In a chat template, the user's message ends with the choices, and the answer
begins with "Answer: (".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.chat_templates import ChatTurn
from scaled_rope.patching.device_maps import input_device
from scaled_rope.patching.loss import hidden_states, project
from scaled_rope.texts.documents import check_there, has_half_a_pair, read_json
from scaled_rope.texts.hub import hub_records

LETTERS = "ABCD"
BEFORE_STORY = (
    "You are provided a story and a multiple-choice question with 4 possible answers (marked by A, B, C, D). "
    "Choose the best answer by writing its corresponding letter (either A, B, C, or D).\n\nStory:\n"
)
CHOICES = (
    "\n\nQuestion and Possible Answers:\n{question}\n (A) {options[0]}\n (B) {options[1]}\n (C) {options[2]}\n"
    " (D) {options[3]}"
)
ANSWER = "Answer: ("
AFTER_STORY = f"{CHOICES}\n\n{ANSWER}"
OMITTED = "... [The rest of the story is omitted]"
"""The note that takes the place of the part of a story that was cut off."""


@dataclass(frozen=True)
class Question:
    """A story and a question about it."""

    article: str
    question: str
    options: tuple[str, ...]
    answer: int
    """Index of the right option, from 0."""


@dataclass(frozen=True)
class ChoicePrompt:
    """A question as tokens. The model reads `context`; `letters` are the continuations to choose from."""

    context: list[int]
    letters: tuple[tuple[int, ...], ...]
    answer: int
    cut: bool
    """Whether the end of the story was cut off."""

    @property
    def length(self) -> int:
        """The number of tokens of the prompt and the longest letter."""
        return len(self.context) + max(map(len, self.letters))


def _question(record: Any, where: str) -> Question:
    """Check a record with the fields article, question, options (four texts) and answer (0 to 3, or a letter)."""
    if not isinstance(record, dict):
        raise ConfigError(f"{where} is not an object with fields")
    for name in ("article", "question"):
        if not isinstance(record.get(name), str):
            raise ConfigError(f"{where}: {name} must be a text; fields: {', '.join(sorted(map(str, record)))}")
    options, answer = record.get("options"), record.get("answer")
    if not isinstance(options, list) or len(options) != len(LETTERS) or not all(isinstance(o, str) for o in options):
        raise ConfigError(f"{where}: options must be {len(LETTERS)} texts")
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS:
        answer = LETTERS.index(answer)
    if type(answer) is not int or not 0 <= answer < len(LETTERS):
        raise ConfigError(f"{where}: answer={answer!r} must be 0 to {len(LETTERS) - 1} or a letter A to {LETTERS[-1]}")
    for text in (record["article"], record["question"], *options):
        if has_half_a_pair(text):
            raise ConfigError(f"{where}: {text[:20]!r}... holds half of a surrogate pair, which no tokenizer reads")
    return Question(record["article"], record["question"], tuple(options), answer)


def read_questions(source: str, split: str) -> Iterator[Question]:
    """Yield the questions of a local file of JSON or of a hub dataset.

    Raises:
        ConfigError: no such file or dataset, or a record without the fields of `_question`.
    """
    path = Path(source)
    if path.is_dir():
        raise ConfigError(f"dataset {source} is a folder; give a file of JSON lines")
    if path.is_file():
        for record, place in read_json(source):
            yield _question(record, f"dataset {place}")
    else:
        check_there(source)
        for number, record in enumerate(hub_records(source, split), 1):
            yield _question(record, f"dataset {source!r} record {number}")


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without special tokens; no warning about texts longer than the model's trained context."""
    return list(
        tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    )


def _split(tokenizer: Any, text: str) -> tuple[list[int], tuple[tuple[int, ...], ...]]:
    """Split the tokens of `text` and a letter: those that are the same for all letters, and each letter's rest."""
    whole = _tokenize(tokenizer, [text + letter for letter in LETTERS])
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*whole, strict=False)))
    return whole[0][:shared], tuple(tuple(ids[shared:]) for ids in whole)


def build_choice_prompt(
    tokenizer: Any, question: Question, max_tokens: int | None = None, chat: ChatTurn | None = None
) -> ChoicePrompt:
    """Build the prompt of a question; if it exceeds `max_tokens`, a note replaces the end of the story.

    Args:
        tokenizer: a transformers tokenizer; its BOS, if it has one, opens the prompt.
        max_tokens: the most tokens of prompt and letter together; None: no limit.
        chat: the chat template that the prompt is put into; its tokens count. None: plain text.

    Raises:
        ConfigError: the question alone needs more than `max_tokens`.
    """
    bos = [] if tokenizer.bos_token_id is None or chat is not None else [tokenizer.bos_token_id]
    start = BEFORE_STORY if chat is None else chat.before + BEFORE_STORY
    before = start + question.article
    after = AFTER_STORY.format(question=question.question, options=question.options)
    if chat is not None:  # templates may cut blanks off the end of a message
        asked = CHOICES.format(question=question.question, options=question.options)
        after = asked.rstrip() + chat.after + ANSWER
    context, letters = _split(tokenizer, before + after)
    whole = ChoicePrompt(bos + context, letters, question.answer, cut=False)
    if max_tokens is None or whole.length <= max_tokens:
        return whole
    context, letters = _split(tokenizer, OMITTED + after)
    (opening, story) = _tokenize(tokenizer, [start, before])
    fixed = len(bos) + len(context) + max(map(len, letters))
    if max_tokens < fixed + len(opening):
        raise ConfigError(
            f"max-tokens {max_tokens} is too short for a question; this one needs {fixed + len(opening)} and its story"
        )
    return ChoicePrompt(bos + story[: max_tokens - fixed] + context, letters, question.answer, cut=True)


@torch.inference_mode()
def score_letters(model: Any, prompt: ChoicePrompt) -> list[float]:
    """Log-likelihood in nats of each letter's continuation after the context.

    If continuations are single tokens, one pass serves all letters; otherwise there is a pass for each beginning.
    """
    scores: dict[tuple[int, ...], torch.Tensor] = {}
    starts = {letter[:-1] for letter in prompt.letters}
    # A pass over a longer beginning holds the shorter ones: a causal model's prediction doesn't see what follows.
    for start in sorted(starts, key=len, reverse=True):
        if start in scores:
            continue
        row = torch.tensor([[*prompt.context, *start]], device=input_device(model))
        hidden = hidden_states(model, row)[0, len(prompt.context) - 1 :]
        for n, log_probabilities in enumerate(project(model, hidden).log_softmax(dim=-1)):
            scores.setdefault(start[:n], log_probabilities)
    return [
        float(sum(scores[letter[:n]][token].double() for n, token in enumerate(letter))) for letter in prompt.letters
    ]
