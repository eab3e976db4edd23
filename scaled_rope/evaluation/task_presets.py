"""Sets of tasks by name, for `eval/harness.py --tasks`. Needs neither torch nor lm-eval."""

from __future__ import annotations

from collections.abc import Sequence

from scaled_rope.evaluation.paper_benchmarks import PAPER

RULER_OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
"""RULER's tasks whose prompts are made of words and numbers alone."""
_ESSAYS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multiquery", "niah_multivalue")
RULER = (*RULER_OFFLINE, *_ESSAYS, "ruler_qa_squad", "ruler_qa_hotpot")
"""All 13 tasks of RULER."""

PRESETS: dict[str, tuple[str, ...]] = {
    "paper": tuple(PAPER),
    "ruler": RULER,
    "ruler-offline": RULER_OFFLINE,
    "long": (*RULER, "longbench2", "infinitebench", "babilong_longctx", "graphwalks", "longproc"),
    "long-offline": RULER_OFFLINE,
}
"""Preset -> tasks and groups of lm-eval, those that run offline first."""
WITH_LENGTHS = ("ruler", "ruler-offline", "long", "long-offline")
"""Presets that are measured at the trained length and its doubles, unless other lengths are given."""

SOURCES = {
    **dict.fromkeys(_ESSAYS, "baber/paul_graham_essays"),
    "ruler_qa_squad": "SQuAD 2.0 (rajpurkar.github.io)",
    "ruler_qa_hotpot": "HotpotQA (huggingface.co)",
    "graphwalks_128k": "openai/graphwalks",
    "graphwalks_1M": "openai/graphwalks",
}
"""Task -> the text that it is made of, where its definition in lm-eval does not name a data set."""
SAMPLES = 500
"""Prompts that lm-eval makes for a task of RULER at each length."""


def expand(names: Sequence[str]) -> list[str]:
    """Replace presets by their tasks, each once."""
    return list(dict.fromkeys(task for name in names for task in PRESETS.get(name, (name,))))


def doubled(trained: int, claimed: int | None) -> list[int]:
    """The trained length in tokens, its doubles below the claimed one, and that."""
    lengths = [trained]
    while claimed is not None and lengths[-1] * 2 <= claimed:
        lengths.append(lengths[-1] * 2)
    return lengths if claimed is None or claimed <= lengths[-1] else [*lengths, claimed]
