"""eval/harness.py: rows, resuming, and bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import eval.harness as command
from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.continuations import Continuation
from scaled_rope.evaluation.lm_eval_tasks import model_class
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.results import IDENTITY, read_rows
from tests.helpers.lm_eval_runs import (
    TRAINED,
    checkpoint,  # noqa: F401
    one_by_one,
    scaling_of,
    words,
)
from tests.helpers.models import Make


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with one multiple-choice task over local JSON lines, prompts of 8 to 78 words."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": words(8 + 10 * index, index), "choices": [words(2, 50 + index), words(3, 90 + index)], "gold": 1}
        for index in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "num_fewshot": 0,
        "metadata": {"version": 2.0},
    }
    (folder / "tiny_choice.yaml").write_text(json.dumps(settings))
    return folder


def run(checkpoint: str, own_tasks: Path, *more: str) -> list[dict[str, Any]]:
    rows = own_tasks / "out.jsonl"
    flags = ["-m", checkpoint, "--tasks", "tiny_choice", "--include-path", str(own_tasks), "--output", str(rows)]
    assert command.main([*flags, "--hide-progress", *more]) == 0
    return read_rows(rows)


def test_rows_and_resuming(checkpoint: str, own_tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    more = ["--scaling", "default", "--scaling", "cope,clip=2", "--scaling", "dynamic-yarn", "--limit", "7"]
    rows = run(checkpoint, own_tasks, *more)
    assert [row["label"].split()[0] for row in rows] == ["unscaled", "cope", "dynamic-yarn"]
    for row in rows:
        assert row.keys() >= {
            *IDENTITY,
            "model",
            "value",
            "standard_error",
            "interval",
            "n",
            "seconds",
            "peak_memory",
            "provenance",
        }
        assert row["metric"] == "benchmark" and row["n"] == 7 and row["unit"] == "%" and row["length"] is None
        assert row["data"]["documents"] == 7 and len(row["data"]["fingerprint"]) == 16
        assert row["provenance"]["versions"]["lm-eval"]
        assert len(row["outcomes"]["tiny_choice"]) == 7
        assert 100 * sum(row["outcomes"]["tiny_choice"]) / 7 == pytest.approx(row["value"], abs=1e-3)
    expected = {"name": "lm-eval", "task": "tiny_choice", "version": 2.0, "num_fewshot": 0, "limit": 7, "metric": "acc"}
    assert [row["protocol"] for row in rows] == [
        {**expected, "max_length": TRAINED},
        {**expected, "max_length": TRAINED},
        {**expected, "max_length": None},
    ]
    # 8 to 68 words and 1 or 2 of the answer: those from 38 on are cut, twice each, unless the scale follows the length.
    assert [row["truncated"] for row in rows] == [8, 8, 0]
    assert [row["requests"] for row in rows] == [14, 14, 14]
    assert "8 cut" in capsys.readouterr().out
    assert run(checkpoint, own_tasks, *more) == rows  # nothing is measured again
    assert len(run(checkpoint, own_tasks, "--limit", "3")) == 4  # other documents, another row


def test_values_follow_from_scores(checkpoint: str, own_tasks: Path, tiny_model: Make) -> None:
    """The row's accuracy, from the definition: the likelier choice."""
    pytest.importorskip("lm_eval")
    (row,) = run(checkpoint, own_tasks, "--scaling", "dynamic-yarn")
    model, tokenizer = tiny_model(), load_tokenizer(checkpoint)
    apply_scaling(model, scaling_of("dynamic-yarn"))
    right = 0
    for line in (own_tasks / "rows.jsonl").read_text().splitlines():
        document = json.loads(line)
        context = tokenizer.encode(document["question"])
        likelihoods = [
            one_by_one(model, Continuation(context, tokenizer.encode(choice)))[0] for choice in document["choices"]
        ]
        right += likelihoods[1] > likelihoods[0]
    assert 0 < right < 8
    assert row["value"] == 100 * right / 8


def test_examples_are_asked_for_in_vain(checkpoint: str, own_tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    flags = ["--num-fewshot", "3", "--limit", "1"]
    (row,) = run(checkpoint, own_tasks, *flags)
    assert row["protocol"]["num_fewshot"] == 0
    assert "note: --num-fewshot 3 has no effect on tiny_choice: prompts of a task with" in capsys.readouterr().err
    settings = json.loads((own_tasks / "tiny_choice.yaml").read_text()) | {"task": "tiny_shots", "num_fewshot": None}
    settings |= {"fewshot_split": "test"}
    (own_tasks / "tiny_shots.yaml").write_text(json.dumps(settings))
    rows = run(checkpoint, own_tasks, *flags, "--tasks", "tiny_choice,tiny_shots")
    assert [row["protocol"]["num_fewshot"] for row in rows] == [0, 3]
    said = capsys.readouterr().err
    assert said.startswith("note: --num-fewshot 3 has no effect on tiny_choice: prompts") and "tiny_shots" not in said
    run(checkpoint, own_tasks, "--num-fewshot", "0", "--limit", "1")
    assert "no effect" not in capsys.readouterr().err


def test_bad_input_is_one_line(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-m", checkpoint]
    for more, message in (
        (["--include-path", "/nowhere"], "include_path='/nowhere': must be a folder with task files"),
        (["--include-path", checkpoint], "must be a folder with task files"),
        (["--prompt-seconds", "inf"], r"prompt_seconds=inf: must be a positive number of seconds, at most 1e\+07"),
        (["--prompt-seconds", "nan"], "prompt_seconds=nan"),
        (["--prompt-seconds", "1e300"], r"prompt_seconds=1e\+300"),
        (["--tasks", ","], "tasks=','"),
        (["--lengths", "8,x"], "lengths='8,x'"),
        (["--limit", "0"], "limit=0"),
        (["--num-fewshot", "-1"], "num_fewshot=-1"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.main([*flags, *more])
    # The cached function would hide that the package is gone.
    monkeypatch.setattr(command, "model_class", model_class.__wrapped__)
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run_cli(lambda: command.main(flags)) == 2
    assert capsys.readouterr().err.startswith("error: benchmarks need lm-eval: pip install 'scaled-rope[eval]'")


def test_unknown_tasks_are_answered_with_near_ones(checkpoint: str) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ConfigError, match="unknown task 'helaswag'; did you mean 'hellaswag'") as error:
        command.main(["-m", checkpoint, "--tasks", "helaswag"])
    assert len(str(error.value)) < 400


def test_a_task_without_prompts_is_a_row_with_its_reason(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval")
    output = tmp_path / "rows.jsonl"
    flags = ["-m", checkpoint, "--tasks", "ruler_cwe,ruler_fwe", "--lengths", "100,256", "--limit", "1"]
    for _ in range(2):  # measured, and not measured again
        assert command.main([*flags, "--output", str(output), "--hide-progress"]) == 1
        rows = {(row["data"]["name"], row["length"]): row for row in read_rows(output)}
        assert len(rows) == len(read_rows(output)) == 4
        said = capsys.readouterr()
        assert "on ruler_cwe at 100: 100 tokens are too short" in said.err
        assert "not measured" in said.out
    row = rows["ruler_cwe", 100]
    assert row["value"] is None and row["error"].startswith("100 tokens are too short") and row["n"] == 0
    assert row["data"]["documents"] == 0 and row["data"]["fingerprint"] is None
    measured = rows["ruler_fwe", 256]
    assert measured["value"] is not None and measured["n"] == 1 and len(measured["data"]["fingerprint"]) == 16
    assert row["protocol"]["seed"] == measured["protocol"]["seed"] == 42
    # One length alone has the prompts that it had among others.
    flags[flags.index("100,256")] = "256"
    command.main([*flags, "--output", str(output), "--hide-progress"])
    assert len(read_rows(output)) == 4
    with pytest.raises(ConfigError, match="prompt_seconds=0"):
        command.main([*flags, "--prompt-seconds", "0"])


def test_prompts_in_a_chat_template(
    checkpoint: str, own_tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    flags = ["-m", checkpoint, "--tasks", "tiny_choice", "--include-path", str(own_tasks), "--chat-template"]
    assert run_cli(lambda: command.main([*flags, "--output", str(own_tasks / "none.jsonl")])) == 2
    assert "has no chat template" in capsys.readouterr().err
    (plain,) = run(checkpoint, own_tasks, "--limit", "2")
    assert "chat_template" not in plain["protocol"] and "has a chat template" not in capsys.readouterr().err
    tokenizer = load_tokenizer(checkpoint)
    turns = "{% for turn in messages %}w7 {{ turn.content }} {% endfor %}"
    tokenizer.chat_template = turns + "{% if add_generation_prompt %}w9{% endif %}"
    tokenizer.save_pretrained(checkpoint)
    run(checkpoint, own_tasks, "--limit", "2", "--dtype", "float32")
    assert f"note: {checkpoint} has a chat template and is asked without it" in capsys.readouterr().err
    asked: list[str] = []
    scored = model_class()._loglikelihood_tokens

    def note(lm: Any, requests: Any, **options: Any) -> Any:
        asked.extend(lm.tokenizer.decode(context) for _, context, _ in requests)
        return scored(lm, requests, **options)

    monkeypatch.setattr(model_class(), "_loglikelihood_tokens", note)
    row = run(checkpoint, own_tasks, "--limit", "2", "--chat-template")[-1]
    assert len(row["protocol"]["chat_template"]) == 16
    assert len(asked) == 4 and all(text.startswith("w7 w") and text.endswith(" w9") for text in asked)
    assert "has a chat template" not in capsys.readouterr().err
    with pytest.raises(ConfigError, match="chat_template: is not for --requests"):
        command.main([*flags, "--save-requests", str(own_tasks)])
