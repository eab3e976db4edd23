"""Log-probabilities that a model gave after prompts, and the prompts that are sent."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scaled_rope.checkpoint import encode
from scaled_rope.errors import ConfigError

POSITIONS = 64
"""The most positions of one prompt that are compared."""
TOP = 20
"""Tokens per position that are asked for; vLLM gives no more unless it is told to."""
SINGLE = 8
"""Prompts of a single token."""
_TEXTS = 3
"""Prompts per length from a server that gives the log-probabilities of the next token alone."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Observed:
    """The answer of a model after one prompt.

    Attributes:
        ids: the token ids of the prompt.
        positions: of the tokens after which something is known, from 0, ascending.
        tokens: for each of these positions the ids [k] of the tokens that are known as its successors.
        logs: their log-probabilities [k] in nats.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    tokens: tuple[NDArray[np.int64], ...]
    logs: tuple[Numbers, ...]


class Source(Protocol):
    """A model that can be asked for log-probabilities."""

    title: str
    max_length: int | None
    """The most tokens of prompt and answer together; None: not known."""
    whole: bool
    """Whether one request gives the log-probabilities at all positions of a prompt."""

    def observe(self, ids: Sequence[int], positions: Sequence[int]) -> Observed:
        """Ask for the successors of a prompt's tokens at these positions; the last position alone unless `whole`.

        Raises:
            ConfigError: no answer, or one without log-probabilities.
        """
        ...


def check_limit(source: Source, longest: int, field: str = "lengths") -> None:
    """Raise a ConfigError where prompts and an answer of one token are longer than a source takes."""
    if source.max_length is not None and longest >= source.max_length:
        raise ConfigError(
            f"{field} {longest} is not allowed; {source.title} takes {source.max_length} tokens, answer included"
        )


class Callables:
    """A Python callable as a source: token ids -> logits [T, V], or [V] of the next token alone."""

    max_length: int | None = None

    def __init__(self, logits: Callable[[list[int]], Any], title: str = "the callable") -> None:
        self.logits, self.title = logits, title
        self.whole = True

    def observe(self, ids: Sequence[int], positions: Sequence[int]) -> Observed:
        rows = logits_of(self.logits, ids)
        if rows.shape[0] == 1 and len(ids) > 1:
            positions = [len(ids) - 1]
            kept = rows
        else:
            kept = rows[list(positions)]
        logs = kept.double().log_softmax(-1)
        values, tokens = logs.topk(min(TOP, logs.shape[-1]))
        return Observed(
            tuple(ids),
            tuple(positions),
            tuple(row.numpy().astype(np.int64) for row in tokens),
            tuple(row.numpy() for row in values),
        )


def logits_of(model: Callable[[list[int]], Any], ids: Sequence[int]) -> Tensor:
    """The logits [T, V], or [1, V] of the next token alone, that a callable returns for token ids.

    Raises:
        ConfigError: it returns something else.
    """
    answer = model(list(ids))
    rows = torch.as_tensor(getattr(answer, "logits", answer)).detach().cpu()
    if rows.dim() == 3 and rows.shape[0] == 1:
        rows = rows[0]
    if rows.dim() == 1:
        rows = rows[None]
    if rows.dim() != 2 or rows.shape[0] not in (1, len(ids)):
        raise ConfigError(
            f"a callable returned {list(rows.shape)} for {len(ids)} tokens: must be logits [T, V], or [V] of the next"
        )
    return rows


# -------------------------------------------------------------------------------------------------------- the prompts


def long_text() -> str:
    """English prose that every Python carries, about 460,000 characters: the language reference behind `help()`.

    Raises:
        ConfigError: this Python came without it.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ConfigError("this Python lacks pydoc_data; name a text with --text FILE") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class Prompt:
    """One prompt, and the positions at which its successors are compared."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]


def make_prompts(ids: Sequence[int], lengths: Iterable[int], whole: bool, first: int | None = None) -> list[Prompt]:
    """Prompts of a single token, and then one or several of each length.

    Args:
        ids: the token ids of a text.
        whole: whether a request gives all positions; then there is one prompt per length.
        first: the token that prompts begin with.

    Raises:
        ConfigError: the text is too short.
    """
    lengths = sorted(set(lengths))
    if lengths and len(ids) < lengths[-1]:
        raise ConfigError(f"--lengths {lengths[-1]} is beyond the text, which has {len(ids)} tokens; name a --text")
    singles = list(dict.fromkeys(ids))[: 40 * SINGLE : 40] or list(ids[:1])
    prompts = [Prompt((one,), (0,)) for one in singles]
    for length in lengths:
        for index in range(1 if whole else _TEXTS):
            start = (index * (len(ids) - length)) // _TEXTS
            tokens = list(ids[start : start + length])
            if first is not None:
                tokens = [first, *tokens[:-1]]
            prompts.append(Prompt(tuple(tokens), tuple(_positions(length)) if whole else (length - 1,)))
    return prompts


def _positions(length: int) -> list[int]:
    """Up to `POSITIONS` positions, evenly over the prompt and its last one always."""
    steps = np.linspace(1, length - 1, min(POSITIONS, length - 1))
    return sorted({round(float(step)) for step in steps})


def encode_text(tokenizer: Any, text: str, tokens: int) -> list[int]:
    """The ids of the beginning of a text, at least `tokens` of them where it is long enough, and some to spare."""
    return encode(tokenizer, text[: 12 * tokens + 20000])
