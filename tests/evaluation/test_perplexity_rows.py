"""Rows of perplexity from sums, against what follows by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import perplexity_rows
from scaled_rope.evaluation.controls import compare
from scaled_rope.evaluation.perplexity_rows import (
    PassResult,
    cost_fields,
    prefix_sums,
    sliding_row,
    truncated_row,
    whole_sums,
)
from scaled_rope.evaluation.windows import Window

LOSSES = [np.array([1, 2, 3, 4], np.float32), np.array([2, 2, 2, np.inf], np.float32)]


def test_sums() -> None:
    assert prefix_sums(LOSSES, [3, 5]) == {"3": [3.0, 4.0], "5": [10.0, None]}
    assert whole_sums(LOSSES, 5) == {"5": [10.0, None]}


def test_truncated_rows() -> None:
    # Two documents of two windows and of one.
    sums = {0: {"3": [2.0, 4.0], "5": [6.0, 8.0]}, 4: {"3": [3.0], "5": [4.0]}}
    row = truncated_row(sums, 5, 3, "token")
    assert row["perplexity"] == pytest.approx(math.exp(18 / 12)) and row["targets"] == 12
    assert row["perplexity_bucket"] == pytest.approx(math.exp((4 + 4 + 1) / 6)) and row["bucket_targets"] == 6
    assert row["bucket"] == [3, 5]
    assert row["document_nats"] == [14.0, 4.0] and row["document_targets"] == [8, 4]
    assert len(row["interval"]) == len(row["interval_bucket"]) == 2
    # The shortest length is its own bucket, of which the first token is no target.
    first = truncated_row(sums, 3, 0, "token")
    assert first["perplexity"] == first["perplexity_bucket"] == pytest.approx(math.exp(9 / 6))
    assert first["bucket"] == [0, 3] and first["bucket_targets"] == first["targets"] == 6
    by_window = truncated_row(sums, 5, 3, "window")
    assert by_window["perplexity"] == pytest.approx(math.exp((6 / 4 + 8 / 4 + 4 / 4) / 3))


def test_sliding_rows() -> None:
    windows = {0: [Window(0, 0, 4, 4), Window(0, 2, 6, 2)], 1: [Window(1, 0, 3, 3)]}
    sums = {0: {"5": [4.0, 6.0]}, 1: {"5": [1.0]}}
    row = sliding_row(sums, windows, 5, "token")
    assert row["perplexity"] == pytest.approx(math.exp(11 / 9)) and row["targets"] == 9 and row["windows"] == 3
    assert row["document_nats"] == [10.0, 1.0] and row["document_targets"] == [6, 3]
    assert "bucket" not in row
    by_window = sliding_row(sums, windows, 5, "window")
    assert by_window["perplexity"] == pytest.approx(math.exp((4 / 4 + 6 / 2 + 1 / 3) / 3))


def test_what_is_not_finite_is_no_number() -> None:
    row = truncated_row({0: {"5": [None]}, 1: {"5": [4.0]}}, 5, 0, "token")
    assert row["perplexity"] is None and row["document_nats"] == [None, 4.0]


def test_many_documents_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity_rows, "DOCUMENTS_IN_ROW", 1)
    assert "document_nats" not in truncated_row({0: {"5": [1.0]}, 1: {"5": [4.0]}}, 5, 0, "token")


@pytest.mark.parametrize("documents", [[3], [1, 1, 1], [2, 1]])
@pytest.mark.parametrize("sliding", [False, True])
def test_what_is_too_much_to_be_listed_has_an_interval_by_runs(
    documents: list[int], sliding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three windows, of which two runs are listed: neighbouring documents, or windows of the only one."""
    monkeypatch.setattr(perplexity_rows, "DOCUMENTS_IN_ROW", 2)
    monkeypatch.setattr(perplexity_rows, "BLOCKS_IN_ROW", 2)
    each = iter([4.0, 5.0, 6.0])
    nats = [[next(each) for _ in range(count)] for count in documents]

    def made(gain: float) -> dict[str, Any]:
        of = {place: {"5": [one - gain for one in some]} for place, some in enumerate(nats)}
        if sliding:
            windows = {place: [Window(place, 0, 5, 4)] * len(some) for place, some in enumerate(nats)}
            found = sliding_row(of, windows, 5, "token")
        else:
            found = truncated_row(of, 5, 0, "token")
        return found | {"model": "m", "length": 5, "data": {"documents": len(documents)}}

    change = compare([(made(0.2), made(0.0))])
    assert change is not None and change.interval is not None
    assert (change.units, change.of) == (2, "documents" if len(documents) > 1 else "windows")
    assert change.share == pytest.approx(math.expm1(-0.2 / 4)) and change.interval[1] == pytest.approx(change.share)
    other = made(0.0) | {name: [5, 7] for name in made(0.0) if name.endswith(("block_targets", "document_targets"))}
    if "bucket_nats" not in other:
        with pytest.raises(ConfigError, match="other windows"):
            compare([(made(0.2), other)])


def test_costs_add_up() -> None:
    result = PassResult({0: {"5": [1.0]}}, 1.0, 10, 7)
    result.add(PassResult({1: {"5": [2.0]}}, 0.5, 20, 5))
    assert set(result.sums) == {0, 1} and result.cost() == {"seconds": 1.5, "tokens": 30, "peak_memory": 7}
    assert cost_fields(result, 5) == {"pass_length": 5, "seconds": 1.5, "tokens_per_second": 20.0, "peak_memory": 7}
    nothing = cost_fields(PassResult(), 5)
    assert (nothing["seconds"], nothing["tokens_per_second"], nothing["peak_memory"]) == (0.0, None, None)
