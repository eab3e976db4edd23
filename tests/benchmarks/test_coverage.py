"""Every layout that transformers has is scaled with effect; the committed rows hold what the page says of all types."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import coverage
from benchmarks.coverage_trial import judge, try_type
from benchmarks.small_models import MODEL_TYPES
from scaled_rope.checkpoint import quiet_transformers
from scaled_rope.errors import ConfigError
from scaled_rope.results import read_rows

SAMPLE = [
    pytest.param("cohere_compass", marks=pytest.mark.slow),  # tables by layer type, inside a model for images and text
    "deepseek_v2",  # complex tables, latent attention
    pytest.param("deepseek_v3", marks=pytest.mark.slow),  # latent attention, neighbours rotated together
    "deepseek_v4",  # two tables by use, rotary modules inside layers
    pytest.param("ernie4_5_vl_moe", marks=pytest.mark.slow),  # axes, frequencies in an order of their own
    "gemma4_text",  # heads of two sizes, pairs that never turn
    pytest.param("granite_swa", marks=pytest.mark.slow),  # a rotary module for each base, and an idle one
    "hunyuan_vl",  # four axes, normalisation after rotation
    pytest.param("lfm2_moe", marks=pytest.mark.slow),  # recurrent layers between, another name
    "llama4",  # complex tables, layers without RoPE, a causal model inside another
    pytest.param("llava", marks=pytest.mark.slow),  # a plain decoder inside
    "mistral4",  # a scaling of its own, a share of the head
    pytest.param("mistral_large4", marks=pytest.mark.slow),  # learned factors of frequencies
    "molmo2",  # a second module that is never scaled
    "moshi",  # a rotary module in each layer
    "qwen3_5",  # interleaved axes, hybrid
    pytest.param("qwen3_vl", marks=pytest.mark.slow),  # axes
]


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_type_of_each_layout_is_scaled_with_effect(model_type: str) -> None:
    with quiet_transformers(hide_bars=True):
        trial = try_type(model_type)
    assert trial["built"] and judge(trial) == []
    assert "refused" not in trial["scalings"]["yarn:4"] and "refused" not in trial["scalings"]["dynamic-yarn"]


def test_faults_are_seen() -> None:
    good: dict[str, Any] = {"native": True, "own": "unscaled", "within": 0.0, "beyond": 1.0, "cached": 1e-6}
    good |= {"loaded": 0.0, "vanilla": 0.0, "unpatched": True}
    trial = {"inspect": "same", "built": True, "loss": 0.0, "cache_noise": 1e-6, "roundtrip": 0.0}
    assert judge({**trial, "scalings": {"yarn:4": good}}) == []
    faults: list[tuple[dict[str, Any], str]] = [
        ({"beyond": 0.0}, "without effect"),
        ({"unpatched": False}, "unpatching leaves"),
        ({"vanilla": 0.5}, "vanilla, 0.5"),
        ({"loaded": "refused: no"}, "loaded, refused"),
        ({"cached": 0.5}, "cached, 0.5"),
        ({"cached": "error: KeyError"}, "cached, error"),
        ({"error": "KeyError in forward"}, "KeyError"),
    ]
    for changed, wanted in faults:
        assert wanted in judge({**trial, "scalings": {"yarn:4": good | changed}})[0]
    assert "changes a text of L" in judge({**trial, "scalings": {"dynamic-yarn": good | {"within": 0.5}}})[0]
    assert "one layer behind a cache, 0.5" in judge({**trial, "scalings": {}, "follows": 0.5})[0]
    assert judge({**trial, "scalings": {}, "follows": "refused: no"}) == []
    for result in (0.5, "error: KeyError in forward"):
        assert "within its window" in judge({**trial, "scalings": {}, "regions": result})[0]
    for result in (1e-6, "refused: a window"):
        assert judge({**trial, "scalings": {}, "regions": result}) == []
    assert "loss" in judge({**trial, "loss": 0.5, "scalings": {}})[0]
    assert "inspect" in judge({"inspect": "differs: all layers"})[0]
    refused = {"refused": "no rotary module"}
    assert judge({**trial, "scalings": {"yarn:4": refused}}) == []


def test_the_committed_rows_hold_the_bar() -> None:
    rows = coverage.latest(read_rows(coverage.ROWS))
    assert {row["model_type"] for row in rows} >= set(MODEL_TYPES) - _newer_than(rows)
    built = [row for row in rows if row["rope"] and row.get("built")]
    scaled = [row for row in built if "refused" not in row["scalings"]["yarn:4"]]
    assert len(built) >= 161 and len(scaled) >= 0.98 * len(built)
    assert [row["model_type"] for row in rows if row["wrong"]] == []
    assert all(row.get("built") or row["error"] for row in rows if row["rope"])


def _newer_than(rows: list[dict[str, Any]]) -> set[str]:
    """Types that the release of transformers had not, with which the rows were made; empty where it is installed."""
    import transformers

    measured = rows[0]["provenance"]["versions"]["transformers"]
    return set() if measured == transformers.__version__ else set(MODEL_TYPES)


def test_the_page_has_the_table_of_the_rows() -> None:
    assert coverage.main(["--check"]) == 0


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown model type 'lama'; did you mean 'llama'"):
        coverage.main(["lama"])
