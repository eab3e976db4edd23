"""The search for the slope of an attention temperature, on planted optima. The command is in `test_search`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scaled_rope import RopeScaling
from scaled_rope.flags.search import parse_grid
from scaled_rope.tuning.slopes import measure_slopes, slopes_remarks, slopes_report, summarise_slopes
from tests.helpers.tuning import LENGTH, sweep

GRID = parse_grid("0:0.5:0.05", zero=True)


def start(factor: float) -> RopeScaling:
    return RopeScaling("drope", factor, LENGTH, attention_temperature="constant", temperature_slope=0.0)


def planted(scaling: RopeScaling, tokens: npt.NDArray[Any], slope: float = 0.23) -> npt.NDArray[Any]:
    """Losses of tokens 1 … n-1 that are least at a slope."""
    assert scaling.attention_temperature == "constant" and scaling.temperature_slope is not None
    return np.asarray(2 + np.sin(tokens[1:]) + 5 * (scaling.temperature_slope - slope) ** 2)


def test_a_planted_slope_is_recovered(tmp_path: Path) -> None:
    one = sweep(tmp_path / "rows.jsonl", planted)
    summary = summarise_slopes([measure_slopes(one, start(s), GRID) for s in (2, 4, 8)], seed=0)
    # Segment sums are rounded to 1e-4 nats, 3e-6 a token, against a curvature of 5.
    assert summary["slope"] == pytest.approx(0.23, abs=1e-3) and summary["edge"] is None
    low, high = summary["interval"]
    assert low <= summary["slope"] <= high < low + 1e-3
    for found, factor in zip(summary["factors"], (2, 4, 8), strict=True):
        assert found["slope"] == pytest.approx(0.23, abs=1e-3)
        assert math.log(found["perplexity_without"] / found["perplexity"]) == pytest.approx(5 * 0.23**2, abs=1e-4)
        own = RopeScaling("default", original_max_position_embeddings=LENGTH)
        wanted = replace(start(factor), temperature_slope=round(summary["slope"], 4))
        assert RopeScaling.from_spec(found["spec"], own) == wanted == RopeScaling.from_dict(found["scaling"])
    assert slopes_remarks(summary) == [] and "slope of attention_temperature=constant" in slopes_report(summary)


def test_factors_that_disagree_and_edges_are_told(tmp_path: Path) -> None:
    def score(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return planted(scaling, tokens, slope=0.1 if scaling.factor == 2 else 0.3)

    one = sweep(tmp_path / "rows.jsonl", score)
    summary = summarise_slopes([measure_slopes(one, start(s), GRID) for s in (2, 8)], seed=0)
    assert summary["slope"] == pytest.approx(0.2, abs=1e-3)  # of two parabolas of one curvature
    assert slopes_remarks(summary) == ["factors want slopes of their own, 0.100 to 0.300: a single one is a compromise"]
    for slope, said in ((-1.0, "no temperature is best"), (3.0, "upper edge, 0.5: widen --grid")):
        one = sweep(tmp_path / f"{slope}.jsonl", lambda scaling, tokens, at=slope: planted(scaling, tokens, at), 1)
        notes = slopes_remarks(summarise_slopes([measure_slopes(one, start(4), GRID)], seed=0))
        assert said in notes[0] and "one window" in notes[1]
