"""Presets of tasks, their lengths, and what lm-eval ships of them."""

from __future__ import annotations

import pytest

from scaled_rope.evaluation.paper_benchmarks import PAPER
from scaled_rope.evaluation.task_presets import PRESETS, RULER, RULER_OFFLINE, doubled, expand


def test_presets_are_expanded_once() -> None:
    assert expand(["paper"]) == list(PAPER)
    assert expand(["ruler_vt", "ruler-offline", "passkey"]) == [
        "ruler_vt", *(task for task in RULER_OFFLINE if task != "ruler_vt"), "passkey"
    ]  # fmt: skip
    assert len(RULER) == len(set(RULER)) == 13 and expand(["long"])[:6] == list(RULER_OFFLINE)


def test_doubles_of_the_trained_length() -> None:
    assert doubled(4096, 32768) == [4096, 8192, 16384, 32768]
    assert doubled(256, 1000) == [256, 512, 1000]  # the claimed length itself is measured
    assert doubled(256, 256) == doubled(256, None) == doubled(256, 100) == [256]


@pytest.mark.slow  # lm-eval reads some thousand files
def test_lm_eval_has_every_task_of_the_presets() -> None:
    pytest.importorskip("lm_eval")
    from scaled_rope.evaluation.lm_eval_tasks import Catalogue

    facts = {one.name: one for one in Catalogue().facts(expand(["long"]))}
    assert set(RULER) <= facts.keys() and all(facts[task].takes_lengths for task in RULER)
    assert [task for task, one in facts.items() if one.source is None] == list(RULER_OFFLINE)
    assert facts["niah_single_1"].answer_tokens == 128 and facts["longbench2_table"].answer_tokens == 0
    assert facts["longproc_countdown_8k"].unsafe and not facts["graphwalks_1M"].unsafe
    assert facts["longbench2_table"].source == "recursal/longbench-v2"
    for group in set(PRESETS["long"]) - set(RULER):
        assert any(name.startswith(group.partition("_")[0]) for name in facts), group
