"""Passes over documents of which earlier runs have left a part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scaled_rope.evaluation.runner import Parts
from scaled_rope.evaluation.scored_passes import ScoredPass, windows_of
from scaled_rope.evaluation.windows import Losses, LossFolder, Texts, select

BOS = 0


@pytest.fixture
def texts() -> Texts:
    return select((np.arange(1, size) for size in (12, 9)), BOS, None)


def make(texts: Texts, folder: Path, stride: int | None, kept: bool) -> ScoredPass:
    texts = texts if stride is not None else select((one.tokens for one in texts.documents), BOS, 6)
    losses = LossFolder(folder / "losses", "model") if kept else None
    context = "all" if stride is None else f"sliding 6 {stride}"
    return ScoredPass(texts, 6, [4, 6], stride, context, "key", Parts(folder / "rows"), losses)


def losses_of(one: ScoredPass, index: int) -> list[Losses]:
    rng = np.random.default_rng(index)
    return [rng.random(window.scored).astype(np.float32) for window in one.by_document[index]]


@pytest.mark.parametrize("stride", [None, 3])
def test_a_finished_document_is_known_from_its_losses(texts: Texts, tmp_path: Path, stride: int | None) -> None:
    one = make(texts, tmp_path, stride, kept=True)
    assert one.known({6}).sums == {}
    sums = one.finish(1, losses_of(one, 1))
    assert set(sums) == ({"4", "6"} if stride is None else {"6"})
    found = make(texts, tmp_path, stride, kept=True).known({6})
    assert found.sums == {1: sums} and found.seconds == 0
    assert not (tmp_path / "rows.partial.jsonl").exists()


def test_sums_beside_the_rows_count_when_they_are_enough(texts: Texts, tmp_path: Path) -> None:
    one = make(texts, tmp_path, None, kept=False)
    sums = one.finish(0, losses_of(one, 0))
    assert list(tmp_path.iterdir()) == []  # without a folder nothing is kept by `finish`
    one.parts.add("key", {0: sums}, seconds=1.5, tokens=6, peak_memory=3)
    one.parts.add("other", {1: sums}, seconds=9.0, tokens=6, peak_memory=9)
    found = one.known({4, 6})
    assert found.sums == {0: sums} and (found.seconds, found.tokens, found.peak_memory) == (1.5, 6, 3)
    assert one.known({5, 6}).sums == {}


def test_windows_by_document(texts: Texts, tmp_path: Path) -> None:
    one = make(texts, tmp_path, 3, kept=False)
    assert one.windows == windows_of(texts, 6, 3)
    assert [len(of) for of in one.by_document.values()] == [3, 2]
    assert [window for of in one.by_document.values() for window in of] == one.windows
