"""Greedy decoding of a number, only as far as needed to know whether it is the right one.

Under a scaling that does not depend on the length no keys are cached. A pass runs over the prompt, the tokens decoded
so far and a draft of those that should follow. As long as the draft agrees with the model, the pass gives the model's
tokens for all these steps at once; where they differ, it gives the model's own token. So the tokens are exactly those
of greedy decoding, a right answer takes one pass, and a wrong one nearly always too.

Where the scaling depends on the length, every step has a scale of its own (section 3.3 of the paper), so there are no
drafts. Either the model's cache is used, as in `generate`: all keys are rotated at the scale of each step, but they
come from hidden states that were computed at the scale at which their token was read. Or every token takes a pass over
the whole text, which has one scale throughout and needs no memory for keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scaled_rope.errors import ConfigError
from scaled_rope.patching.cache_argument import cache_name, returned_cache
from scaled_rope.patching.device_maps import input_device
from scaled_rope.patching.loss import hidden_states, project

_NUMBER = re.compile(r"[0-9]+")
_NUMERIC = frozenset("0123456789 \t\n\r")


@dataclass
class Answer:
    """An answer as decoded so far, up to the token that decides whether it is right."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    right: bool | None = None
    """Whether the first number of the whole answer is the wanted one; None: not known yet."""


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens left out."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def number_tokens(tokenizer: Any, vocabulary: int, end: Sequence[int]) -> Tensor:
    """Mask of the tokens that may be decoded when only a number is wanted: digits, blanks, the end; bool [vocabulary].

    Raises:
        ConfigError: the tokenizer has no token for a digit.
    """
    count = min(vocabulary, len(tokenizer))
    # Each token twice: decoders drop the blank in front of a text, and with it what a token like "▁" stands for.
    texts = tokenizer.batch_decode([[i, i] for i in range(count)], clean_up_tokenization_spaces=False)
    allowed = torch.zeros(vocabulary, dtype=torch.bool)
    allowed[[i for i, text in enumerate(texts) if text and _NUMERIC.issuperset(text)]] = True
    if not any(text.strip() for text, one in zip(texts, allowed.tolist(), strict=False) if one):
        raise ConfigError("restrict-tokens: this tokenizer has no tokens of digits; use --restrict-tokens false")
    allowed[[token for token in end if token < vocabulary]] = True
    return allowed


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer, by tokenizer and generation config."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])}
    return sorted(token for token in found if token is not None)


def judge(text: str, ended: bool, wanted: int) -> bool | None:
    """Whether the first number of an answer is `wanted`: None while the text so far leaves it open.

    A number is over when something else follows it or the answer ends, so 123456 is not 12345.
    """
    match = _NUMBER.search(text)
    if match is None:
        return False if ended else None
    if ended or match.end() < len(text):
        return int(match[0]) == wanted
    return None if str(wanted).startswith(match[0].lstrip("0")) else False  # leading zeros do not change a number


@dataclass
class _Task:
    prompt: list[int]
    key_ids: list[int]
    wanted: int
    answer: Answer


def _draft(tokenizer: Any, task: _Task) -> list[int]:
    """Guess the tokens with which a right answer would continue; empty without a guess. A wrong guess costs nothing."""
    if not task.answer.ids:
        return task.key_ids
    match = _NUMBER.search(task.answer.text)
    rest = str(task.wanted)[len(match[0]) :] if match else str(task.wanted)
    tails = (task.key_ids[i:] for i in reversed(range(len(task.key_ids))))
    return next((tail for tail in tails if text_of(tokenizer, tail).strip() == rest), [])


@torch.inference_mode()
def decode_numbers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[tuple[list[int], list[int], int]],
    *,
    length_dependent: bool,
    rows_per_pass: int,
    max_new_tokens: int,
    allowed: Tensor | None = None,
    cached: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """Decode an answer to each prompt until it is known whether its first number is the wanted one.

    Args:
        model: a causal language model that computes with the scaling under test.
        prompts: for each, its tokens, the tokens of the wanted number as they would follow them, and that number.
        length_dependent: whether the model's scale depends on the length.
        rows_per_pass: prompts per forward pass.
        max_new_tokens: longest answer.
        allowed: bool [vocabulary], the tokens that may be decoded; default: all.
        cached: use the model's cache where the scale depends on the length; elsewhere it makes no difference.

    Yields:
        Index of a prompt and its answer, as they become known.
    """
    end = set(end_tokens(model, tokenizer))
    forbidden = None if allowed is None else ~allowed
    open_tasks = {index: _Task(ids, key_ids, key, Answer()) for index, (ids, key_ids, key) in enumerate(prompts)}
    if length_dependent and cached:
        by_length: dict[int, list[tuple[int, _Task]]] = {}
        for index, task in open_tasks.items():
            by_length.setdefault(len(task.prompt), []).append((index, task))
        for same in by_length.values():
            for start in range(0, len(same), rows_per_pass):
                some = same[start : start + rows_per_pass]
                yield from _decode_cached(model, tokenizer, some, end, max_new_tokens, forbidden)
        return
    while open_tasks:
        groups: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
        for index, task in open_tasks.items():
            draft = [] if length_dependent else _draft(tokenizer, task)
            groups.setdefault((len(task.prompt) + len(task.answer.ids), len(draft)), []).append((index, draft))
        for (known, _), members in groups.items():
            for start in range(0, len(members), rows_per_pass):
                part = members[start : start + rows_per_pass]
                tasks = [open_tasks[index] for index, _ in part]
                rows = [[*t.prompt, *t.answer.ids, *d] for t, (_, d) in zip(tasks, part, strict=True)]
                hidden = hidden_states(model, torch.tensor(rows, device=input_device(model)))[:, known - 1 :]
                logits = project(model, hidden)
                if forbidden is not None:
                    logits = logits.masked_fill(forbidden.to(logits.device), -torch.inf)
                for (index, draft), said in zip(part, logits.argmax(dim=-1).tolist(), strict=True):
                    answer = open_tasks[index].answer
                    _take(answer, tokenizer, draft, said, open_tasks[index].wanted, end, max_new_tokens)
                    if answer.right is not None:
                        del open_tasks[index]
                        yield index, answer


def _decode_cached(
    model: Any,
    tokenizer: Any,
    part: Sequence[tuple[int, _Task]],
    end: set[int],
    max_new_tokens: int,
    forbidden: Tensor | None,
) -> Iterator[tuple[int, Answer]]:
    """Yield the answers to prompts of one length, which share a cache. Decided rows run on until all are decided."""
    waiting, cache = dict(enumerate(part)), None
    ids = torch.tensor([task.prompt for _, task in part], device=input_device(model))
    while waiting:
        output = model(ids, use_cache=True, logits_to_keep=1, **{cache_name(model): cache})
        cache = returned_cache(output)
        logits = output.logits[:, -1].float()
        if forbidden is not None:
            logits = logits.masked_fill(forbidden.to(logits.device), -torch.inf)
        ids = logits.argmax(dim=-1, keepdim=True).to(ids.device)
        said = ids[:, 0].tolist()
        for row, (index, task) in list(waiting.items()):
            _take(task.answer, tokenizer, [], said[row : row + 1], task.wanted, end, max_new_tokens)
            if task.answer.right is not None:
                del waiting[row]
                yield index, task.answer


def _take(
    answer: Answer, tokenizer: Any, draft: list[int], said: list[int], wanted: int, end: set[int], limit: int
) -> None:
    """Append the tokens of greedy decoding, until one differs from the draft or decides whether the answer is right."""
    for token, expected in zip(said, [*draft, None], strict=True):
        answer.ids.append(token)
        answer.text = text_of(tokenizer, answer.ids)
        answer.right = judge(answer.text, token in end or len(answer.ids) >= limit, wanted)
        if answer.right is not None or token != expected:
            return
