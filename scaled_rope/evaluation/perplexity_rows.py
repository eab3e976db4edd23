"""Rows of perplexity from sums of nats per document and window. Nothing here knows of models or files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scaled_rope.evaluation.windows import Losses, Nats, Window, cumulate, interval_of, perplexity, terms
from scaled_rope.results import Row

DOCUMENTS_IN_ROW = 200
"""The most documents for which a row lists the sum of each, and the most windows whose nats in the bucket it lists. Of
more it lists the sums over so many runs of neighbours."""

BLOCKS_IN_ROW = 50
"""The most runs of neighbouring sliding windows whose sums a row of a single document lists."""

Sums = dict[str, list[float | None]]
"""For each context length, as text, the nats of each window of a document; None where they are not finite."""


@dataclass
class PassResult:
    """The results of a pass by document, as far as known, and their cost."""

    sums: dict[int, Sums] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    peak_memory: int = 0

    def add(self, other: PassResult) -> None:
        self.sums |= other.sums
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.peak_memory = max(self.peak_memory, other.peak_memory)

    def cost(self) -> Row:
        """The cost, as `Parts` keeps it."""
        return {"seconds": self.seconds, "tokens": self.tokens, "peak_memory": self.peak_memory}


def prefix_sums(losses: Sequence[Losses], lengths: Sequence[int]) -> Sums:
    """The sums of a document's windows, cut to each of `lengths` positions, given the losses of each whole window."""
    columns = [cumulate(one, [length - 1 for length in lengths]) for one in losses]
    return {str(length): [_finite(column[index]) for column in columns] for index, length in enumerate(lengths)}


def whole_sums(losses: Sequence[Losses], length: int) -> Sums:
    """The sums of a document's sliding windows of `length` positions, given the losses that each scores."""
    return {str(length): [_finite(cumulate(one, [len(one)])[0]) for one in losses]}


def truncated_row(sums: Mapping[int, Sums], length: int, start: int, weighting: str) -> Row:
    """The fields of a row of the truncate protocol.

    Args:
        sums: of each document in order, by `prefix_sums`, at `length` and at `start`.
        length: context length in tokens.
        start: the next shorter context length, where the bucket begins; 0 where there is none.
        weighting: as for `terms`.
    """
    nats = [_numbers(of[str(length)]) for of in sums.values()]
    targets = [np.full(len(one), length - 1.0) for one in nats]
    bucket = [one - _numbers(of[str(start)]) for one, of in zip(nats, sums.values(), strict=True)] if start else nats
    # Nothing predicts position 0, so a bucket that begins there has one target less than positions.
    bucket_targets = [np.full(len(one), float(length - max(start, 1))) for one in nats]
    value, interval = _estimate(nats, targets, weighting)
    bucket_value, bucket_interval = _estimate(bucket, bucket_targets, weighting)
    if sum(len(one) for one in nats) <= DOCUMENTS_IN_ROW:
        parts: Row = {"bucket_nats": [[_finite(float(one)) for one in document] for document in bucket]}
    else:
        parts = {f"bucket_{name}": sums for name, sums in _runs(bucket, bucket_targets).items()}
    return {
        "perplexity": value,
        "interval": interval,
        "targets": _total(targets),
        "bucket": [start, length],
        "perplexity_bucket": bucket_value,
        "interval_bucket": bucket_interval,
        "bucket_targets": _total(bucket_targets),
        **parts,
        **_documents(nats, targets),
    }


def sliding_row(sums: Mapping[int, Sums], windows: Mapping[int, Sequence[Window]], length: int, weighting: str) -> Row:
    """The fields of a row of the sliding protocol.

    Args:
        sums: of each document in order, by `whole_sums`.
        windows: the windows of each document, likewise.
        length: positions of a window.
        weighting: as for `terms`.
    """
    nats = [_numbers(of[str(length)]) for of in sums.values()]
    targets = [np.array([window.scored for window in of], dtype=float) for of in windows.values()]
    value, interval = _estimate(nats, targets, weighting)
    return {
        "perplexity": value,
        "interval": interval,
        "targets": _total(targets),
        "windows": sum(len(one) for one in targets),
        **_documents(nats, targets),
        **(_blocks(nats[0], targets[0], BLOCKS_IN_ROW) if len(nats) == 1 else {}),
        **(_runs(nats, targets) if len(nats) > DOCUMENTS_IN_ROW else {}),
    }


def _runs(nats: Sequence[Nats], targets: Sequence[Nats]) -> Row:
    """Sums over runs of neighbouring documents, or of the windows of the only one."""
    if len(nats) == 1:
        return _blocks(nats[0], targets[0], DOCUMENTS_IN_ROW)
    return _blocks(np.array([one.sum() for one in nats]), np.array([one.sum() for one in targets]), DOCUMENTS_IN_ROW)


def _blocks(nats: Nats, targets: Nats, most: int) -> Row:
    """Sums over at most `most` runs of neighbours: the units of an interval where those themselves are too many."""
    runs = np.array_split(np.arange(len(nats)), min(len(nats), most))
    return {
        "block_nats": [_finite(float(nats[run].sum())) for run in runs],
        "block_targets": [int(targets[run].sum()) for run in runs],
    }


def cost_fields(result: PassResult, length: int) -> Row:
    """The cost of a row's whole pass, which may yield several rows; 0 or None if all losses were known already."""
    return {
        "pass_length": length,
        "seconds": round(result.seconds, 3),
        "tokens_per_second": round(result.tokens / result.seconds, 1) if result.seconds else None,
        "peak_memory": result.peak_memory or None,
    }


def _estimate(
    nats: Sequence[Nats], targets: Sequence[Nats], weighting: str
) -> tuple[float | None, list[float | None] | None]:
    """Perplexity and its 95 % interval."""
    above, below = terms(nats, targets, weighting)
    return perplexity(above.sum(), below.sum()), interval_of(above, below)


def _total(targets: Sequence[Nats]) -> int:
    return int(sum(one.sum() for one in targets))


def _documents(nats: Sequence[Nats], targets: Sequence[Nats]) -> Row:
    if len(nats) > DOCUMENTS_IN_ROW:
        return {}
    return {
        "document_nats": [_finite(float(one.sum())) for one in nats],
        "document_targets": [int(one.sum()) for one in targets],
    }


def _finite(nats: float) -> float | None:
    return nats if np.isfinite(nats) else None


def _numbers(sums: Sequence[float | None]) -> Nats:
    return np.array([np.nan if one is None else one for one in sums], dtype=np.float64)
