"""The control of a perplexity, and what is said about a model from its comparison with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import Control, ControlRequest, compare, counted, uses_context
from scaled_rope.results import Row


def test_requests() -> None:
    assert ControlRequest.parse(None) is None and ControlRequest.parse("off") is None
    trained = ControlRequest.parse("trained")
    assert trained is not None and trained.of(256, "m") == Control(256, 64)
    both = ControlRequest.parse("window=100,stride=7")
    assert both is not None and both.of(256, "m") == both.of(None, "m") == Control(100, 7)
    stride = ControlRequest.parse("stride=255")
    assert stride is not None and stride.of(256, "m") == Control(256, 255)
    assert ControlRequest(window=2).of(None, "m") == Control(2, 1)
    with pytest.raises(ConfigError, match="trained length of m is unknown"):
        trained.of(None, "m")
    with pytest.raises(ConfigError, match="1 to 99"):
        ControlRequest(stride=100).of(100, "m")


@pytest.mark.parametrize(
    "text",
    ["", "on", "window", "window=", "window=1", "window=0", "window=-5", "window=1.5", "stride=0", "window=8,stride=8"]
    + ["window=8,window=9", "window=8,", "length=8"],
)
def test_other_values_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--control"):
        ControlRequest.parse(text)


def row(nats: list[list[float]], targets: int = 10) -> Row:
    """A row of one bucket: nats of each window by document, `targets` tokens a window."""
    count = targets * sum(map(len, nats))
    value = math.exp(sum(map(sum, nats)) / count)
    said: dict[str, Any] = {"model": "m", "length": 64}
    return {**said, "perplexity_bucket": value, "bucket_nats": nats, "bucket_targets": count}


def test_a_constant_gain_has_a_closed_form_and_no_spread() -> None:
    rng = np.random.default_rng(0)
    control = [[float(one)] for one in rng.uniform(20, 60, 9)]
    model = [[one[0] - 10 * 0.05] for one in control]  # 0.05 nats a token less, in texts that differ by far more
    change = compare([(row(model), row(control))])
    assert change is not None and change.interval is not None and (change.units, change.of) == (9, "documents")
    expected = math.expm1(-0.05)
    assert change.share == pytest.approx(expected) and change.interval == pytest.approx((expected, expected))
    assert uses_context(change, 256) == "uses its context: −4.9 % [−4.9, −4.9]"
    worse = compare([(row(control), row(model))])
    assert worse is not None and worse.higher and "is worse for its context" in uses_context(worse, 256)


def test_documents_are_the_units_and_windows_where_there_is_one_document() -> None:
    spread = [[1.0, 1.0], [2.0, 2.0], [6.0, 0.0]]
    nothing = [[0.0, 0.0]] * 3
    change = compare([(row(spread), row(nothing))])
    assert change is not None and (change.units, change.of) == (3, "documents")
    alone = compare([(row([[1.0, 2.0, 6.0]]), row([[0.0, 0.0, 0.0]]))])
    assert alone is not None and (alone.units, alone.of) == (3, "windows") and alone.interval is not None
    assert alone.interval[0] < alone.share < alone.interval[1]
    single = compare([(row([[1.0]]), row([[2.0]]))])
    assert single is not None and single.interval is None
    assert uses_context(single, 8).startswith("not shown to use")  # one window proves nothing


def test_buckets_are_added_up() -> None:
    low, high, zero = row([[1.0], [1.0]]), row([[5.0], [5.0]], 30), row([[0.0], [0.0]])
    change = compare([(low, zero), (high, row([[0.0], [0.0]], 30))])
    assert change is not None and change.share == pytest.approx(math.expm1(12 / 80))


def test_what_cannot_be_compared() -> None:
    one = row([[1.0], [2.0]])
    assert compare([]) is None and uses_context(None, 8) == "uses its context: not measured"
    assert compare([(one, {**one, "error": "out of memory"})]) is None
    overflow = {**one, "perplexity_bucket": None}
    assert compare([(one, overflow)]) is None
    change = compare([(overflow, one)])
    assert change is not None and change.share == math.inf and "overflows" in uses_context(change, 8)
    assert not (change.lower or change.at_or_below)
    with pytest.raises(ConfigError, match="other windows"):
        compare([(one, row([[1.0, 2.0]]))])
    older = {name: value for name, value in one.items() if name != "bucket_nats"}
    plain = compare([(older, row([[2.0], [4.0]]))])  # the two perplexities are all that is known
    assert plain is not None and plain.interval is None and plain.share == pytest.approx(math.expm1(3 / 20 - 6 / 20))


def test_float_noise_is_no_gain() -> None:
    rng = np.random.default_rng(1)
    control = [[float(one)] for one in rng.uniform(20, 60, 9)]
    noisy = [[one[0] - 1e-6] for one in control]  # all below, by less than a thousandth
    change = compare([(row(noisy), row(control))])
    assert change is not None and change.none and change.at_or_below
    assert uses_context(change, 16) == "makes no use of its context beyond 16 tokens: 0.0 % [0.0, 0.0]"


def test_buckets_up_to_the_claimed_length_decide() -> None:
    assert counted([128, 256, 512], 64, 256) == [128, 256]
    assert counted([128, 256], 64, 64) == counted([128, 256], 64, None) == [128, 256]
    assert counted([512], 64, 256) == []


@pytest.mark.parametrize("documents", [2, 3, 4, 8, 30])
def test_an_interval_holds_what_it_should(documents: int) -> None:
    # Experiments on documents whose difference is 0.02 nats per token: the interval misses it in 5 % on the whole.
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        nats = rng.normal(300, 60, size=documents)  # documents differ much more than readings of one of them
        more = nats + 100 * rng.normal(0.02, 0.05, size=documents)
        one, other = (
            {
                "perplexity_bucket": 9.0,
                "bucket_targets": 100 * documents,
                "bucket_nats": [[x] for x in some],
                "model": "m",
            }
            for some in (more, nats)
        )
        change = compare([(one, other)])
        assert change is not None and change.interval is not None
        assert change.share == pytest.approx(math.expm1(float((more - nats).sum()) / (100 * documents)))
        hits += change.interval[0] <= math.expm1(0.02) <= change.interval[1]
    # The percentile bootstrap of 30 is a little narrow (about 93.5 %); 200 draws have a standard error of 1.7 %.
    assert 0.88 <= hits / 200 <= 0.99
