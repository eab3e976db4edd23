"""Which tokens are scored in which window, and their statistics."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.windows import (
    Document,
    Texts,
    cumulate,
    interval_of,
    select,
    sliding,
    tell_copies,
    terms,
    truncated,
    windows_fingerprint,
)
from tests.helpers.number_texts import (
    SIZES,
    bodies,  # noqa: F401
)


def test_windows_are_chosen_by_rule() -> None:
    documents = [np.arange(100, 100 + size) for size in (30, 9, 10, 50)]

    def cut(**settings: Any) -> tuple[list[list[int]], int]:
        texts = select(iter(documents), **{"bos": 0, "length": 10, **settings})
        return [texts.ids(window).tolist() for window in truncated(texts, 10)], len(texts.documents)

    starts = [0, *range(100, 109)]
    assert cut() == ([starts] * 4, 4)  # a document of 9 tokens fills a window of 10 with its BOS
    assert cut(bos=None) == ([list(range(100, 110))] * 3, 3)
    assert cut(samples=2) == ([starts] * 2, 2)
    assert cut(min_tokens=30) == ([starts] * 2, 2)
    windows, _ = cut(windows=3, samples=1)
    assert [window[1] for window in windows] == [100, 110, 121]  # 30 tokens, 3 x 9: from start to end, no overlap
    assert windows[-1][-1] == 129
    assert len(cut(windows=3)[0]) == 3 + 1 + 1 + 3  # as many as fit
    brought = select(iter([np.arange(20)]), 0, 10)
    assert [brought.ids(window).tolist() for window in truncated(brought, 10)] == [list(range(10))]
    with pytest.raises(ConfigError, match="only 2 of 4 documents have 30 tokens; --samples asks for 3"):
        cut(min_tokens=30, samples=3)
    with pytest.raises(ConfigError, match="only 0 of 4"):
        cut(length=1000)


def test_a_copy_of_a_document_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    one, two, short = np.arange(1, 31), np.arange(2, 40), np.arange(3)
    source = [one, short, short, np.concatenate([[0], one]), two, one, one[:-1]]  # the fourth has a BOS in front
    found = select(iter(source), 0, 10)
    assert [len(document.tokens) for document in found.documents] == [9, 9, 9] and found.copies == ((4, 1), (6, 1))
    plain = select(iter([one, two, one[:-1]]), 0, 10)
    assert windows_fingerprint(found, 10) == windows_fingerprint(plain, 10) and plain.copies == ()
    assert len(select(iter(source), 0, None).documents) == 4  # one of the short ones
    assert [len(document.tokens) for document in select(iter(source), 0, None, samples=3).documents] == [30, 2, 38]
    said = "only 3 of 7 documents have 10 tokens and are no copies of others (2 are); --samples asks for 4"
    with pytest.raises(ConfigError, match=re.escape(said)):
        select(iter(source), 0, 10, samples=4)
    for copies in (found.copies, found.copies, ((2, 1),), ()):
        tell_copies("folder", copies)
    assert capsys.readouterr().err.splitlines() == [
        "note: dataset folder: 2 copies of other documents (the first: document 4 has the tokens of document 1) are"
        " left out",
        "note: dataset folder: document 2 has the tokens of document 1 and is left out",
    ]


def test_sliding_scores_every_token_once() -> None:
    for size in (1, 2, 9, 10, 11, 40):
        for length in (2, 3, 10, 64):
            for stride in (1, 3, 9, 100):
                for bos in (0, None):
                    if size + (bos == 0) < 2:
                        continue
                    texts = Texts([Document("", np.arange(100, 100 + size))], bos)
                    windows = sliding(texts, length, stride)
                    scored = [token for one in windows for token in texts.ids(one)[-one.scored :].tolist()]
                    assert scored == list(range(100 + (bos is None), 100 + size))
                    assert all(0 < one.scored < texts.positions(one) <= length for one in windows)


def test_bootstrap_is_that_of_resampled_documents() -> None:
    rng = np.random.default_rng(3)
    nats, targets = rng.normal(300, 20, 12), rng.integers(90, 110, 12).astype(float)
    interval = interval_of(nats, targets)
    picks = np.random.default_rng(9).integers(0, 12, (20000, 12))
    expected = np.exp(np.percentile(nats[picks].sum(1) / targets[picks].sum(1), [2.5, 97.5]))
    # Two independent sets of thousands of resamples: their percentiles differ by some 2 % of the width.
    np.testing.assert_allclose(interval, expected, atol=0.08 * (expected[1] - expected[0]))
    assert interval_of(nats, targets) == interval
    assert interval_of(nats[:1], targets[:1]) is None
    equal = interval_of(np.full(5, 20.0), np.full(5, 10.0))
    assert equal == pytest.approx([math.e**2] * 2)  # documents that do not differ leave no doubt
    assert interval_of(np.array([np.nan, 1.0]), np.ones(2)) == [None, None]


def test_terms_and_sums() -> None:
    nats = [np.array([6.0, 1.0]), np.array([4.0])]
    targets = [np.array([3.0, 1.0]), np.array([2.0])]
    assert [one.tolist() for one in terms(nats, targets, "token")] == [[7.0, 4.0], [4.0, 2.0]]
    assert [one.tolist() for one in terms(nats, targets, "window")] == [[3.0, 2.0], [2.0, 1.0]]
    assert cumulate(np.array([1, 2, 4], np.float32), [0, 1, 3]) == [0.0, 1.0, 7.0]


def test_first_documents_that_are_long_enough(bodies: list[list[int]]) -> None:
    found = select((np.array(body) for body in bodies[::-1]), 0, 32, samples=2, min_tokens=35)
    assert [document.tokens.tolist() for document in found.documents] == [body[:31] for body in bodies[2:0:-1]]
    whole = select((np.array(body) for body in bodies), 0, None)
    assert [len(document.tokens) for document in whole.documents] == list(SIZES)
    assert [one.scored for one in truncated(found, 20)] == [19, 19]
