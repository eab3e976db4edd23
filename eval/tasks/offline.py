"""The documents of the offline benchmarks, for the YAML files beside this one.

Only the source of the documents is replaced: prompts, choices and scores stay lm-eval's own, task by task.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from scaled_rope.content_hash import cache_dir
from scaled_rope.texts.benchmarks import SOURCES, Document, read_split


def _splits(name: str) -> dict[str, Dataset]:
    return {split: Dataset.from_list(list(read_split(name, split))) for split in SOURCES[name].documents}


def arc_challenge(**_: Any) -> dict[str, Dataset]:
    return _splits("arc_challenge")


def arc_easy(**_: Any) -> dict[str, Dataset]:
    return _splits("arc_easy")


def truthfulqa_mc2(**_: Any) -> dict[str, Dataset]:
    return _splits("truthfulqa_mc2")


def hellaswag(**_: Any) -> dict[str, Dataset]:
    return _splits("hellaswag")


def hellaswag_documents(documents: Dataset) -> Dataset:
    """Process raw documents as lm-eval does; documents that are cleaned up already stay as they are."""
    from lm_eval.tasks.hellaswag.utils import process_docs

    return documents if "query" in documents.column_names else process_docs(documents)


@functools.cache
def _mmlu_by_subject(cache: Path) -> dict[str, dict[str, list[Document]]]:
    subjects: dict[str, dict[str, list[Document]]] = defaultdict(lambda: {"dev": [], "test": []})
    for split in SOURCES["mmlu"].documents:
        for row in read_split("mmlu", split):
            subjects[row["subject"]][split].append(row)
    return dict(subjects)


def mmlu(subject: str, **_: Any) -> dict[str, Dataset]:
    return {split: Dataset.from_list(rows) for split, rows in _mmlu_by_subject(cache_dir())[subject].items()}
