"""The decision and its words, from results of known outcome."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from scaled_rope import RopeScaling
from scaled_rope.advice.candidates import Candidate
from scaled_rope.advice.trials import Measured
from scaled_rope.advice.verdict import Advice, Judged, as_json, choose, judge, position_rows
from scaled_rope.evaluation.controls import Control
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.tuning.curves import segment_bounds
from scaled_rope.tuning.measurement import Answer
from tests.helpers.advice import OWN, TARGET, L, windows

ENDS, SEGMENT = [64, 128, 256, 512], 16
BOUNDS = segment_bounds(TARGET, SEGMENT)
TARGETS = np.asarray([end - max(first, 1) for first, end in BOUNDS], dtype=np.float64)
EXACT = dict.fromkeys(("transformers", "vllm", "sglang", "llama.cpp"), "exact")
NONE = dict.fromkeys(EXACT, "'dual-chunk' changes attention itself; no server computes it")
TEXT = np.random.default_rng(0).normal(3, 0.3, (8, len(BOUNDS)))
NOISE = np.random.default_rng(1).normal(0, 0.002, (8, len(BOUNDS)))
NOISE -= NOISE.mean(axis=0)


def measured(spec: str, above: Any, right: dict[int, int], seconds: float = 1.0, noise: float = 0.0) -> Measured:
    """Eight windows; above: nats above the text's, a number or one per segment; right: of ten answers, by length."""
    nats = TEXT + np.asarray(above, dtype=np.float64) + noise * NOISE
    answers = {
        length: [Answer(0.9 if i < count else 0.2, i < count) for i in range(10)] for length, count in right.items()
    }
    asked = {n: [PasskeyPrompt([0], [1], i, 0.5, n, 9) for i in range(10)] for n in right}
    candidate = Candidate(spec, RopeScaling.from_spec(spec, OWN))
    return Measured(candidate, TARGETS, 4, list(nats), windows(8), answers, asked, [seconds] * 8)


def steps(within: float, *beyond: float) -> list[float]:
    """Nats by segment from those within L and of each bucket beyond."""
    counts = (4, 4, 8, 16)
    return [value for value, count in zip((within, *beyond), counts, strict=True) for _ in range(count)]


ALL = {64: 10, 128: 10, 256: 10, 512: 9}
PLAIN = measured("default", steps(0, 1, 2, 3), {64: 10, 128: 0, 256: 0, 512: 0})
CONTROL = measured("default", 0.0, {})


def judged(one: Measured, servers: dict[str, str] = EXACT) -> Judged:
    return judge(one, PLAIN, CONTROL, ENDS, SEGMENT, servers)


def advice(*some: Judged) -> Advice:
    use, equal = choose(some)
    return Advice(use, equal, some, L, TARGET, Control(L, 16), use)


def test_rows_of_position_buckets_are_what_was_measured() -> None:
    rows = position_rows(measured("yarn:8", steps(0.1, 0.2, 0.3, 0.4), {}), ENDS, SEGMENT)
    assert list(rows) == ENDS and rows[128]["bucket"] == [64, 128]
    assert rows[128]["bucket_targets"] == 8 * 64 and rows[64]["bucket_targets"] == 8 * 63
    expected = math.exp(float((TEXT[:, 4:8] + 0.2).mean()))
    assert rows[128]["perplexity_bucket"] == pytest.approx(expected)
    whole = (TEXT + steps(0.1, 0.2, 0.3, 0.4)) @ TARGETS / TARGETS.sum()
    assert rows[512]["perplexity"] == pytest.approx(math.exp(float(whole.mean())))


def test_a_candidate_that_works() -> None:
    one = judged(measured("yarn:8", steps(0.004, -0.05, -0.05, -0.05), ALL, seconds=1.5))
    assert (one.level_to, one.retrieves_to, one.works_to) == (512, 512, 512)
    assert one.right(L) == (29, 30) and one.cost == 1.5 and one.per_token == pytest.approx(1.5 / 512)
    said = advice(one)
    assert said.works
    assert said.verdict == (
        "USE: `yarn:8`: level to 512 (−4.9 % [−4.9, −4.9] against the last 64 tokens only), retrieval 29/30, "
        "0.4 % worse at short length"
    )
    assert said.serving == "served by transformers, vllm, sglang, llama.cpp"
    assert "takes 1.50 times as long as unscaled" in said.running
    assert said.tuning.startswith("needs no fine-tuning") and "train with `yarn:8`" in said.tuning
    told = as_json(one, L)
    assert told["works_to"] == 512 and told["retrieval"] == {"right": 29, "n": 30}
    assert told["found"]["512"]["interval"][0] < 0.9 < told["found"]["512"]["interval"][1]


def test_one_that_works_to_a_part() -> None:
    one = judged(measured("yarn:8", steps(0, -0.05, -0.02, 0.2), ALL))
    assert one.level_to == 256
    assert advice(one).verdict.startswith("PARTLY: nothing untrained works to 512 tokens; use `yarn:8` up to 256: ")
    assert advice(one).tuning == "beyond 256 tokens nothing untrained works: fine-tune with `yarn:8`"
    # Retrieval ends earlier than perplexity does.
    one = judged(measured("yarn:8", steps(0, -0.05, -0.05, -0.05), {64: 10, 128: 9, 256: 5, 512: 10}))
    assert (one.level_to, one.retrieves_to, one.works_to) == (512, 128, 128)


def test_none_of_these_works() -> None:
    one = judged(measured("linear:8", steps(0.5, 0.3, 0.3, 0.3), {64: 2, 128: 0, 256: 0, 512: 0}))
    said = advice(one)
    assert not said.works and not said.partly and one.works_to == L
    assert said.verdict.startswith(
        "NONE: none of these works beyond 64 tokens untrained. The best is `linear:8`: worse"
    )
    assert "retrieval 0/30" in said.verdict and "64.9 % worse at short length" in said.verdict
    assert said.tuning == "beyond 64 tokens nothing untrained works: fine-tune with `linear:8`"


def test_the_bucket_that_fails_is_named() -> None:
    """One that is no worse over all, but not level either: the first bucket is above the control's."""
    one = judged(measured("yarn:8", steps(0, 0.05, -0.1, -0.1), ALL))
    assert one.works_to == L and one.total.lower
    assert (
        "worse than the last 64 tokens only up to 128 (+5.1 % [+5.1, +5.1]; −7.6 % [−7.6, −7.6] over all)"
        in advice(one).verdict
    )


def test_perplexity_that_overflows_is_no_level() -> None:
    one = judged(measured("linear:8", steps(0, 800, 800, 800), {}))
    assert one.level_to == L and one.total.share == math.inf
    assert "overflow" in advice(one).verdict
    told = as_json(one, L)
    assert told["against_control"]["share"] is None and told["perplexity_beyond"] is None


def test_the_choice() -> None:
    yarn = judged(measured("yarn:8", steps(0, -0.05, -0.05, -0.05), ALL, noise=1))
    lower = judged(measured("ntk:8", steps(0, -0.07, -0.07, -0.07), {64: 10, 128: 2, 256: 1, 512: 0}))
    chunks = judged(measured("dual-chunk,chunk=48", steps(0, -0.05, -0.05, -0.05), ALL, seconds=2), NONE)
    # A lower loss does not make up for retrieval that is lost.
    assert choose([yarn, lower])[0] is yarn
    # Of two that are as good, the one that can be served.
    use, equal = choose([chunks, yarn])
    assert use is yarn and [one.spec for one in equal] == [chunks.spec, yarn.spec]
    better = judged(measured("dual-chunk,chunk=48", steps(0, -0.08, -0.08, -0.08), ALL, seconds=2), NONE)
    assert choose([better, yarn])[0] is better
    said = advice(chunks, yarn)
    (other,) = said.others()
    assert other.startswith(
        "`dual-chunk,chunk=48`: retrieves as well (29/30), its perplexity beyond 64 tokens is the same"
    )
    assert other.endswith("; not served by transformers, vllm, sglang, llama.cpp")
    assert advice(better, yarn).serving.startswith("served by none of transformers, vllm, sglang, llama.cpp: 'dual-")
    assert advice(better, yarn).served is yarn and advice(chunks, yarn).served is None
    assert (
        ". To be served by transformers, vllm, sglang, llama.cpp: `yarn:8`: level to 512"
        in advice(better, yarn).serving
    )
    alone = advice(better, judged(PLAIN))
    assert alone.served is None and alone.serving.endswith("no server computes it")
    (other,) = advice(better, yarn).others()
    assert "its perplexity beyond 64 tokens is 3.0 % above" in other
    (other,) = advice(yarn, lower).others()
    assert "retrieves worse (3/30)" in other and "2.0 % below" in other


def test_what_works_furthest_comes_before_the_lowest_loss() -> None:
    """Whatever is shown of the losses: else the answer would be that nothing works, beside one that does."""
    lower = judged(measured("yarn:8", steps(0, -0.08, -0.08, -0.08), {64: 10, 128: 9, 256: 9, 512: 7}))
    further = judged(measured("ntk:8", steps(0, -0.07, -0.07, -0.07), ALL))
    assert (lower.works_to, further.works_to) == (256, TARGET)
    use, equal = choose([lower, further])
    assert use is further and equal == [further]
    said = advice(lower, further)
    assert said.works and said.verdict.startswith("USE: `ntk:8`: ")
    (other,) = said.others()
    assert other.startswith("`yarn:8`: works to 256 tokens only, retrieves")
    none = judged(measured("linear:8", steps(0, 0.1, 0.1, 0.1), ALL))
    assert advice(none, further).others()[0].startswith("`linear:8`: does not work beyond 64 tokens, ")


def test_without_retrieval_and_without_times() -> None:
    one = judged(measured("yarn:8", steps(0, -0.05, -0.05, -0.05), {}, seconds=0))
    assert one.retrieves_to is None and one.works_to == 512 and one.cost is None
    assert "retrieval" not in advice(one).verdict and advice(one).running == "time at run time not measured"
    said = Advice(one, [one], [one], L, TARGET, Control(L, 16), None)
    assert "none to train with" in said.tuning


def test_small_differences_are_within_noise() -> None:
    one = judged(measured("yarn:8", steps(0, -0.05, -0.05, -0.05) + np.random.default_rng(2).normal(0, 0.01, 32), ALL))
    assert "short length" in advice(one).verdict
    same = judged(measured("yarn:8", steps(0, -0.05, -0.05, -0.05), ALL))
    assert advice(same).verdict.endswith("the same at short length")
