"""LongPPL (arXiv 2410.23771): perplexity over the tokens that only far context predicts, the key tokens.

Most tokens of a text follow from the few before them, so that a model's perplexity hardly says whether it uses a long
context. One model, the evaluator, is asked which tokens do need it: each token is predicted with the whole context and
with the last K tokens only, and those that gain much and become likely are the key tokens. LongPPL of a tested model is
exp of its mean loss over them. One evaluator chooses for all compared models; its losses and theirs are kept, so that
each further model costs one pass over the texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from scaled_rope.checkpoint import display_name
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import Control
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader
from scaled_rope.evaluation.perplexity_evaluator import Perplexity
from scaled_rope.evaluation.ranks import current
from scaled_rope.evaluation.windows import Losses, Nats, interval_of, perplexity
from scaled_rope.results import Row, row_key

METRIC = "longppl"
GAIN = 2.0
"""α: a key token's log-probability rises by more than this with the whole context, in nats."""
FLOOR = -2.0
"""β: and is above this with the whole context."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class KeyRule:
    """When a token counts as a key token. The paper's values are the defaults.

    Attributes:
        gain: α, in nats.
        floor: β, in nats.
    """

    gain: float = GAIN
    floor: float = FLOOR

    def chosen(self, whole: Losses, cut: Losses) -> Mask:
        """Which tokens are key tokens, given the evaluator's losses with the whole and with the cut context."""
        mask: Mask = (cut - whole > self.gain) & (-whole > self.floor)
        return mask


@dataclass(eq=False)
class KeyTokens:
    """The key tokens of some texts, as one evaluator chooses them.

    Attributes:
        job: the evaluator.
        whole: its losses with the whole context.
        cut: its losses after the last tokens only.
        rule: when a token counts.
    """

    job: ModelJob
    whole: Perplexity
    cut: Perplexity
    rule: KeyRule

    @property
    def control(self) -> Control:
        control = self.cut.control_of(self.job)
        assert control is not None  # `cut` measures a control
        return control

    def positions(self) -> int:
        """Tokens that go through the evaluator for losses that are not there yet."""
        return sum(one.tokens(self.job, length) for one, length, _ in self._left())

    def _left(self) -> list[tuple[Perplexity, int, list[int]]]:
        return [
            (one, length, yields)
            for one in (self.whole, self.cut)
            for length, yields in one.passes(self.job, list(one.lengths)).items()
            if one.needs_model(self.job, length, yields)
        ]

    def measure(self, load: ModelLoader, advance: Callable[[int], object]) -> None:
        """Score the evaluator's passes whose losses are not there yet."""
        for one, length, yields in self._left():
            model = current().together(lambda: load(self.job))
            for _ in one.measure(model, self.job, length, yields, advance):
                pass

    def losses(self, length: int) -> tuple[list[Losses], list[Losses]]:
        """The evaluator's losses of each window of `length` positions, whole and cut, [length - 1] each."""
        return self.whole.losses(self.job, length), self.cut.losses(self.job, length)

    def masks(self, length: int) -> list[Mask]:
        """The key tokens of each window of `length` positions, [length - 1]."""
        return [self.rule.chosen(whole, cut) for whole, cut in zip(*self.losses(length), strict=True)]

    def protocol(self) -> Row:
        """The fields that identify the choice in rows."""
        return {
            "name": "key-tokens",
            **self.control.fields(),
            "gain": self.rule.gain,
            "floor": self.rule.floor,
            "evaluator": self.job.name,
            "evaluator_fingerprint": row_key(self.job.fields())[:16],
        }


def key_row(losses: Sequence[Losses], masks: Sequence[Mask], documents: Sequence[int], judged: int) -> Row:
    """The fields of a row.

    Args:
        losses: the tested model's, for each window [tokens].
        masks: the key tokens of each window.
        documents: the document of each window.
        judged: tokens at the end of each window that were judged at all: those beyond the cut context.
    """
    nats = np.array([one[mask].sum(dtype=np.float64) for one, mask in zip(losses, masks, strict=True)])
    counts = np.array([mask.sum() for mask in masks], dtype=np.float64)
    ends = [(one[-judged:], mask[-judged:]) for one, mask in zip(losses, masks, strict=True)]
    rest = sum(one[~mask].sum(dtype=np.float64) for one, mask in ends)
    others = sum(int((~mask).sum()) for _, mask in ends)
    by_document = _by(documents, nats), _by(documents, counts)
    above, below = by_document if len(by_document[0]) > 1 else (nats, counts)
    seen = below > 0  # a text without key tokens says nothing about them
    return {
        METRIC: perplexity(float(nats.sum()), float(counts.sum())),
        "interval": interval_of(above[seen], below[seen]),
        "key_tokens": int(counts.sum()),
        "tokens": judged * len(losses),
        "perplexity_of_others": perplexity(rest, others),
        "document_nats": [float(one) if np.isfinite(one) else None for one in by_document[0]],
        "document_key_tokens": [int(one) for one in by_document[1]],
    }


def _by(documents: Sequence[int], values: Nats) -> Nats:
    """Sums by document, in order."""
    return np.array([values[np.array(documents) == one].sum() for one in dict.fromkeys(documents)])


@dataclass(eq=False, kw_only=True)
class LongPerplexity:
    """The evaluator of LongPPL, for tested models.

    Attributes:
        inner: gives the models' losses; it keeps them in a folder.
        keys: the key tokens, whose losses have been measured.
    """

    inner: Perplexity
    keys: KeyTokens

    value = METRIC

    def cells(self, job: ModelJob) -> dict[int, Row]:
        data = self.inner.prepare(job.model)[1]
        if data["fingerprint"] != self.keys.whole.prepare(self.keys.job.model)[1]["fingerprint"]:
            raise ConfigError(
                f"{display_name(job.model)} reads other tokens than the evaluator {display_name(self.keys.job.model)}: "
                "another tokenizer or BOS; key tokens are those of one tokenizer"
            )
        row = {"metric": METRIC, "data": data, "protocol": self.keys.protocol()}
        return {length: dict(row) for length in self.inner.lengths}

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        return self.inner.passes(job, lengths)

    def tokens(self, job: ModelJob, length: int) -> int:
        return self.inner.tokens(job, length)

    def needs_model(self, job: ModelJob, length: int, yields: Sequence[int]) -> bool:
        return self.inner.needs_model(job, length, yields)

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        costs = {wanted: row for wanted, row in self.inner.measure(model, job, length, yields, advance)}
        window = self.keys.control.window
        for wanted in yields:
            masks = self.keys.masks(wanted)
            losses = self.inner.losses(job, wanted, length)
            row = key_row(losses, masks, self.inner.documents_of(job.model), wanted - window)
            cost = {
                name: costs[wanted][name] for name in ("pass_length", "seconds", "tokens_per_second", "peak_memory")
            }
            yield wanted, {**row, **cost}
