"""Log-likelihoods of continuations, from which benchmarks are scored. Knows nothing of lm-eval."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.ranks import current
from scaled_rope.evaluation.shared_beginnings import Input, can_share, chains_of, is_worth
from scaled_rope.patching.device_maps import input_device
from scaled_rope.patching.loss import hidden_states, positions_per_chunk, project, shared_hidden_states
from scaled_rope.progress import Progress
from scaled_rope.scaling.frequencies import at_length
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import RopeScaling

NO_LIMIT = 2**31 - 1
"""A context in tokens that no prompt reaches."""

_TOKENS_PER_PASS = 2**14

Found = list[tuple[int, float, bool]]
"""Index of a request, its log-likelihood, and whether it is what greedy decoding would give."""


@dataclass(frozen=True)
class Continuation:
    """A context, and the tokens after it whose probability is wanted; at least one token each."""

    context: Sequence[int]
    continuation: Sequence[int]


def _batches(
    inputs: Iterable[tuple[int, ...]], scaling: RopeScaling, rows: int | None
) -> Iterator[list[tuple[int, ...]]]:
    """Yield batches of inputs by descending length; only inputs that have the same scaling share a batch.

    Padding to the longest input of a batch then changes no scale.
    """

    @functools.cache
    def meaning(length: int) -> str:
        return repr(at_length(scaling, length))

    ordered = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
    for _, group in itertools.groupby(ordered, key=lambda tokens: meaning(len(tokens))):
        left = list(group)
        while left:
            size = rows or max(1, _TOKENS_PER_PASS // len(left[0]))
            yield left[:size]
            left = left[size:]


@torch.inference_mode()
def score(
    model: Any,
    scaling: RopeScaling,
    requests: Sequence[Continuation],
    max_length: int = NO_LIMIT,
    rows: int | None = None,
    hide_progress: bool = True,
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation in nats, and whether it is what greedy decoding would give.

    Distinct inputs go through the model once, without a cache, padded on the right; logits are computed for
    continuations only, in float32. The results equal those of one request at a time: under a length-dependent scaling a
    row has the scale of its own length. What several inputs begin with, such as the question before its choices or the
    examples before the questions, is read once and kept in a cache where that saves time and the model's own numbers
    are the same with it, see `shared_beginnings`.

    Args:
        model: a causal language model that computes with `scaling`.
        requests: in any order.
        max_length: inputs are cut to their last `max_length` tokens.
        rows: inputs per pass; default: about 16k tokens' worth.

    Raises:
        ConfigError: a continuation that is empty or does not fit into `max_length`.
    """
    by_input: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        if not 1 <= len(request.continuation) <= max_length:
            given = len(request.continuation)
            raise ConfigError(
                f"max_length={max_length}: a continuation has {given} tokens; it must have 1 to that many"
            )
        whole = (*request.context, *request.continuation)
        # The last token is only predicted, never an input; so max_length + 1 tokens fit.
        by_input.setdefault(whole[-(max_length + 1) :][:-1], []).append(index)
    answers: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)

    def scored_from(ids: Input) -> int:
        """The first position of an input whose prediction is wanted."""
        return len(ids) - max(len(requests[index].continuation) for index in by_input[ids])

    def settle(some: Sequence[Input], hidden: Tensor, first: int = 0) -> Found:
        """Score the continuations of inputs from their hidden states [B, T, H], which begin at position `first`."""
        wanted = []  # (row, position, target) of every token to score
        spans = []
        for row, ids in enumerate(some):
            for index in by_input[ids]:
                targets = requests[index].continuation
                positions = range(len(ids) - len(targets) - first, len(ids) - first)
                wanted += [(row, position, target) for position, target in zip(positions, targets, strict=True)]
                spans.append((index, len(targets)))
        at, position, target = torch.tensor(wanted, device=hidden.device).unbind(dim=1)
        logs, greedy = _score_positions(model, hidden[at, position], target)
        found: Found = []
        start = 0
        for index, length in spans:
            part = slice(start, start + length)
            found.append((index, float(logs[part].double().sum()), bool(greedy[part].all())))
            start += length
        bar.update(len(spans))
        return found

    def read_chain(chain: Sequence[Input]) -> Found:
        starts = [scored_from(ids) for ids in chain]
        sequences = [torch.tensor(ids, device=input_device(model)) for ids in chain]
        states = shared_hidden_states(model, sequences, starts)
        return [
            one
            for ids, first, hidden in zip(chain, starts, states, strict=True)
            for one in settle([ids], hidden, first)
        ]

    def read_batch(batch: Sequence[Input]) -> Found:
        tokens = torch.zeros((len(batch), len(batch[0])), dtype=torch.long)
        for row, ids in enumerate(batch):
            tokens[row, : len(ids)] = torch.tensor(ids)
        return settle(batch, hidden_states(model, tokens.to(input_device(model))))

    ranks = current()
    chains = [chain for chain in chains_of(by_input) if is_worth(chain, model)]
    if chains and not ranks.first(lambda: can_share(model, scaling, chains[0])):
        chains = []
    shared = {ids for chain in chains for ids in chain}
    parts: list[tuple[Callable[[Sequence[Input]], Found], Sequence[Input]]]
    parts = [(read_chain, chain) for chain in chains]
    parts += [(read_batch, batch) for batch in _batches((ids for ids in by_input if ids not in shared), scaling, rows)]
    quiet = hide_progress or not ranks.is_first
    with Progress(total=len(requests), disable=quiet) as bar:
        for found in ranks.spread(parts, lambda share: [read(inputs) for read, inputs in share]):
            for index, value, is_greedy in found:
                answers[index] = value, is_greedy
        bar.update(len(requests) - bar.n)  # those of other processes
    return answers


def _score_positions(model: Any, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target [N] at hidden states [N, H], and whether it is the likeliest token."""
    chunk = positions_per_chunk(model)
    logs, greedy = [], []
    for states, wanted in zip(torch.split(hidden, chunk), torch.split(target, chunk), strict=True):
        logits = project(model, states)
        wanted = wanted.to(logits.device)
        logs.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].cpu())
        greedy.append((logits.argmax(dim=-1) == wanted).cpu())
    return torch.cat(logs), torch.cat(greedy)


def context_limit(config: Any, scaling: RopeScaling) -> int:
    """The longest prompt for a model, in tokens: its context, or `NO_LIMIT` where its scale follows the length."""
    if scaling.is_length_dependent:
        return NO_LIMIT
    lengths = (getattr(text_config(config), "max_position_embeddings", None), scaling.max_position_embeddings)
    return max((int(length) for length in lengths if length), default=NO_LIMIT)
