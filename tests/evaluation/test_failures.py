"""Models that fail leave the others their results, whatever is wrong with them, in every evaluator."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import jobs
from scaled_rope.evaluation.failures import Failure, failing_alone, failures_file, keep_failures, report_failures
from scaled_rope.provenance import portable_model
from scaled_rope.results import read_rows, rows_so_far
from tests.helpers.retrieval import write_questions

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 40

#: evaluator -> flags of its shortest evaluation, given a folder with texts
EVALUATORS: dict[str, Callable[[Path], list[str]]] = {
    "perplexity": lambda folder: ["--dataset", str(folder / "text.txt"), "--lengths", "32"],
    "passkey": lambda _: ["--lengths", "128", "--iterations", "1"],
    "passkey_hard": lambda folder: [
        "--dataset", str(folder / "text.txt"), "--feature", "text", "--lengths", "128", "--iterations", "1"
    ],
    "quality": lambda folder: ["--dataset", write_questions(folder / "questions.jsonl", "0")],
    "harness": lambda _: ["--tasks", "passkey", "--lengths", "300", "--limit", "1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Copies of the embedded model with one thing wrong each, and one with nothing wrong."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("config", "keys", "tokenizer", "weights", "good"):
        (folder / name).mkdir()
        for file in Path(DEFAULT_MODEL).iterdir():
            os.link(file, folder / name / file.name) if name == "good" else shutil.copy(file, folder / name)
    (folder / "config" / "config.json").write_text('{"model_type": "llama",')
    (folder / "keys" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    (folder / "weights" / "model.safetensors").write_bytes(b"not weights")
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.mark.parametrize("name", EVALUATORS)
def test_whatever_is_wrong_with_a_model_the_others_are_measured(
    models: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    if name == "harness":
        pytest.importorskip("lm_eval")
    (tmp_path / "text.txt").write_text(TEXT)
    evaluator = importlib.import_module(f"eval.{name}")
    inner = jobs.load_model

    def exhausted(checkpoint: object, **options: object) -> object:
        if Path(getattr(checkpoint, "name", str(checkpoint))).name == "large":
            raise torch.OutOfMemoryError("17 GiB more")
        return inner(checkpoint, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "load_model", exhausted)
    large = shutil.copytree(models["good"], tmp_path / "large")
    (large / "config.json").write_text((large / "config.json").read_text() + "\n")
    wrong = [models["config"], models["keys"], models["tokenizer"], models["weights"], str(large)]
    flags = [word for model in (*wrong, models["good"]) for word in ("-m", model)] + EVALUATORS[name](tmp_path)
    output = tmp_path / "rows.jsonl"
    code = run_cli(lambda: evaluator.main([*flags, "--device", "cpu", "--hide-progress", "--output", str(output)]))
    said = capsys.readouterr()
    failed = [line for line in said.err.splitlines() if line.startswith("failed: ")]
    assert code == 1, said.err
    for model in ("config", "keys", "tokenizer", "weights", "large"):
        assert sum(line.startswith(f"failed: {model}") for line in failed) == 1, failed
    assert len(failed) == 5
    rows = read_rows(output)
    assert rows and {row["model"] for row in rows} == {portable_model(models["good"])}
    kept = read_rows(failures_file(output))
    assert [f"{row['job']}{row['task'] and ' on '}{row['task']}: {row['failed']}" for row in kept] == [
        line.removeprefix("failed: ") for line in failed
    ]
    assert len({row["metric"] for row in kept} | {row["metric"].removesuffix("_context") for row in rows}) == 1


@dataclass
class Job:
    name: str


def failed_jobs(output: Path) -> list[tuple[str, str, str]]:
    return [(row["metric"], row["job"], row["task"]) for row in rows_so_far(failures_file(output))]


def test_failures_are_kept_until_the_same_is_measured(tmp_path: Path) -> None:
    output, error = tmp_path / "new" / "rows.jsonl", RuntimeError("broken")
    jobs = [Job("a, unscaled"), Job("b, yarn x4")]
    assert report_failures([], jobs, output=output, metric="quality") == 0 and not output.parent.exists()
    failures = [Failure("b, yarn x4", error), Failure("c", error)]  # of which not even the config could be read
    assert report_failures(failures, jobs, output=output, metric="quality") == 1
    first = [("quality", "b, yarn x4", ""), ("quality", "c", "")]
    assert failed_jobs(output) == first and not output.exists()
    report_failures(failures, jobs, output=output, metric="quality")  # once each
    keep_failures(output, "passkey", [Failure("a, unscaled", error, "x")], jobs[:1])
    assert failed_jobs(output) == [*first, ("passkey", "a, unscaled", "x")]
    report_failures([], [Job("c, unscaled"), *jobs[1:]], output=output, metric="quality")
    assert failed_jobs(output) == [("passkey", "a, unscaled", "x")]
    keep_failures(output, "passkey", [], jobs, ("y",))  # another task
    assert failed_jobs(output) == [("passkey", "a, unscaled", "x")]
    keep_failures(output, "passkey", [], jobs, ("x",))
    assert not failures_file(output).exists()


def test_models_that_all_fail_alike_are_bad_input(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eval import passkey

    table = tmp_path / "table.csv"
    flags = [
        "--lengths",
        "128",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "rows.jsonl"),
        "--output-file",
        str(table),
    ]
    alone = ["-m", models["config"], *flags]
    assert run_cli(lambda: passkey.main(alone)) == 2
    assert capsys.readouterr().err.startswith("error: ") and not table.exists()
    assert run_cli(lambda: passkey.main([*alone, "-m", models["keys"]])) == 1  # each for a reason of its own
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["failed", "failed"]


def test_a_model_fails_when_it_does_on_all_data_sets(capsys: pytest.CaptureFixture[str]) -> None:
    class Job:
        name = "some model"

    short = ConfigError("only 0 of 1 documents have 32 tokens")
    assert report_failures([], [Job()]) == 0
    assert report_failures([Failure("some model", short, "books")], [Job()], ["books", "sotu"]) == 1
    assert capsys.readouterr().err == "failed: some model on books: only 0 of 1 documents have 32 tokens\n"
    with pytest.raises(ConfigError, match="only 0 of 1"):
        report_failures([Failure("some model", short, "books")], [Job()], ["books"])
    with pytest.raises(ZeroDivisionError), failing_alone(None, "some model"):
        _ = 1 / 0
    failures: list[Failure] = []
    with pytest.raises(OSError, match="no room"), failing_alone(failures, "some model"):
        raise OSError(errno.ENOSPC, "no room")
    with pytest.raises(ConfigError, match="cannot be used"), failing_alone(failures, "some model"):
        raise ConfigError("file 'x' cannot be used") from OSError(errno.EROFS, "Read-only file system")
    assert failures == []
