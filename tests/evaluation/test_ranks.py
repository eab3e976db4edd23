"""Evaluations that several processes share: the same rows as of one, and errors that end all of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.passkey as passkey
import eval.passkey_hard as passkey_hard
import eval.perplexity as perplexity
import eval.prompt_loop as prompt_loop
import eval.quality as quality
from scaled_rope import cli
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import ranks as module
from scaled_rope.evaluation.perplexity_evaluator import shares
from scaled_rope.evaluation.ranks import Ranks, join, refuse_several
from scaled_rope.results import Row, read_rows
from tests.helpers.evaluation_ranks import (
    fail_on_the_second,
    full_disk_on_the_second,
    kill_the_second,
    no_pass,
    out_of_memory_on_the_second,
    run_ranks,
)
from tests.helpers.evaluators import evaluate

WORDS = "the a house river stone night light over under before after long short".split()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five documents of different lengths."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for index in range(5):
        (folder / f"{index}.txt").write_text(" ".join(rng.choice(WORDS) for _ in range(300 + 60 * index)))
    return str(folder)


def measured(rows: list[Row]) -> list[Row]:
    """Rows without what depends on the machine and the moment."""
    costs = ("provenance", "seconds", "tokens_per_second", "peak_memory")
    return [{name: value for name, value in row.items() if name not in costs} for row in rows]


def close(one: Any, other: Any) -> bool:
    """Whether two rows agree. Batches of other shapes are summed in another order: float32 noise of 1e-7 per token,
    of which a mean over tokens has less; a passkey's answer has none."""
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-6)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    return bool(one == other)


def compared(
    main: Any, script: str, folder: Path, *argv: str, more: tuple[str, ...] = ()
) -> tuple[list[Row], list[tuple[int, str]]]:
    """Run an evaluator here and on two ranks; return the rows and what the ranks said. All must agree."""
    words = ("-m", str(DEFAULT_MODEL), *argv)
    expected = evaluate(main, folder / "one.jsonl", *words)
    output = folder / "two.jsonl"
    said = run_ranks(script, *words, *more, "--device", "cpu", "--output", str(output), folder=folder)
    assert [code for code, _ in said] == [0, 0], said
    rows = read_rows(output)
    assert close(measured(rows), measured(expected))
    assert all(row["provenance"]["processes"] == 2 for row in rows if "seconds" in row)
    assert said[1][1] == "" and f"rows: {output}" in said[0][1]
    return rows, said


def test_documents_over_ranks(texts: str, tmp_path: Path) -> None:
    argv = ("-d", texts, "--lengths", "64,300", "--control", "--scaling", "yarn:2", "--scaling", "dynamic-yarn")
    losses = ("--save-nll", str(tmp_path / "nll"))
    rows, said = compared(perplexity.main, "perplexity", tmp_path, *argv, "--batch-size", "2", more=losses)
    assert len(rows) == 6 and "100 %" in said[0][1]
    # 5 documents: the pass under yarn, and its control; dynamic-yarn reads each length by itself.
    assert len(list((tmp_path / "nll").rglob("*.safetensors"))) == 5 * (1 + 1 + 2 + 1)
    again = (
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "again.jsonl"),
        "-m",
        str(DEFAULT_MODEL),
        "--batch-size",
        "2",
    )
    said = run_ranks("perplexity", *argv, *losses, *again, folder=tmp_path, prepare=no_pass)
    assert [code for code, _ in said] == [0, 0], said  # all losses were there
    assert close(measured(read_rows(tmp_path / "again.jsonl"))[0]["perplexity"], rows[0]["perplexity"])


def test_sliding_windows_and_more_ranks_than_documents(texts: str, tmp_path: Path) -> None:
    argv = ("-m", str(DEFAULT_MODEL), "-d", texts, "--samples", "2", "--lengths", "128", "--sliding-window", "64")
    expected = evaluate(perplexity.main, tmp_path / "one.jsonl", *argv)
    output = tmp_path / "three.jsonl"
    said = run_ranks("perplexity", *argv, "--device", "cpu", "--output", str(output), folder=tmp_path, ranks=3)
    assert [code for code, _ in said] == [0, 0, 0], said
    assert close(measured(read_rows(output)), measured(expected))


def test_passkeys_over_ranks(tmp_path: Path) -> None:
    argv = ("--scaling", "dynamic-yarn", "--lengths", "200,300", "--iterations", "5")
    drawn = ("--heatmap", str(tmp_path / "found.svg"), "--output-file", str(tmp_path / "table.csv"))
    rows, _ = compared(passkey.main, "passkey", tmp_path, *argv, more=drawn)
    assert [row["metric"] for row in rows] == ["passkey", "passkey", "passkey_context"]
    assert (tmp_path / "found.svg").exists() and (tmp_path / "table.csv").read_text().startswith(",200,300\n")


def test_numbered_keys_over_ranks(texts: str, tmp_path: Path) -> None:
    argv = ("--scaling", "dynamic-yarn", "--lengths", "200", "--iterations", "3", "--num-keys", "2", "-d", texts)
    rows, _ = compared(passkey_hard.main, "passkey_hard", tmp_path, *argv)
    assert len(rows[0]["prompts"]) == 3


def test_questions_over_ranks(tmp_path: Path) -> None:
    options = ["by a river", "by a stone", "over", "under"]
    asked = [
        {"article": "a house by a river " * (4 + index), "question": f"where is {index}?", "options": options}
        for index in range(5)
    ]
    path = tmp_path / "quality.jsonl"
    path.write_text("".join(json.dumps({**one, "answer": index % 4}) + "\n" for index, one in enumerate(asked)))
    rows, _ = compared(quality.main, "quality", tmp_path, "-d", str(path))
    assert len(rows[0]["questions"]) == 5


def test_benchmarks_over_ranks(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    argv = ("-m", str(DEFAULT_MODEL), "--tasks", "passkey", "--lengths", "200", "--limit", "3", "--device", "cpu")
    more = ("--scaling", "dynamic-yarn", "--hide-progress")
    import eval.harness as harness

    assert harness.main([*argv, *more, "--output", str(tmp_path / "one.jsonl")]) == 0
    output = tmp_path / "two.jsonl"
    said = run_ranks("harness", *argv, *more, "--output", str(output), folder=tmp_path)
    assert [code for code, _ in said] == [0, 0], said
    assert close(measured(read_rows(output)), measured(read_rows(tmp_path / "one.jsonl")))
    assert said[1][1] == "" and "passkey at 200" in said[0][1]


# ---------------------------------------------------------------------------------------------------------- failures


def test_bad_flags_are_told_once(texts: str, tmp_path: Path) -> None:
    argv = ("-m", str(DEFAULT_MODEL), "-d", texts, "--lengths", "1", "--output", str(tmp_path / "rows"))
    said = run_ranks("perplexity", *argv, folder=tmp_path)
    assert [code for code, _ in said] == [2, 2]
    assert [text.count("--lengths 1 is not allowed") for _, text in said] == [1, 0]


def test_an_error_of_all_ranks_is_told_once(texts: str, tmp_path: Path) -> None:
    argv = ("-m", str(DEFAULT_MODEL), "-d", texts, "--lengths", "64,99999", "--output", str(tmp_path / "rows"))
    said = run_ranks("perplexity", *argv, folder=tmp_path)
    assert [code for code, _ in said] == [2, 2]
    assert "".join(text for _, text in said).count("documents have 99999 tokens") == 1


def run_failing(prepare: Any, texts: str, folder: Path, *more: str) -> tuple[list[tuple[int, str]], list[Row]]:
    output = folder / "rows.jsonl"
    argv = ("-m", str(DEFAULT_MODEL), "-d", texts, "--lengths", "64,300", "--scaling", "dynamic-yarn")
    more = (*more, "--hide-progress", "--device", "cpu", "--output", str(output))
    said = run_ranks("perplexity", *argv, *more, folder=folder, prepare=prepare, seconds=60)
    return said, read_rows(output) if output.exists() else []


def test_a_fault_of_one_rank_is_a_failure_of_the_model(texts: str, tmp_path: Path) -> None:
    said, rows = run_failing(fail_on_the_second, texts, tmp_path)
    assert [code for code, _ in said] == [1, 1]
    (line,) = [line for _, text in said for line in text.splitlines() if "a fault of" in line]
    assert line == "failed: tiny-llama-256, dynamic-yarn: ValueError: a fault of one rank (process 1)"
    assert [row["length"] for row in rows] == [64]


def test_memory_of_one_rank(texts: str, tmp_path: Path) -> None:
    said, rows = run_failing(out_of_memory_on_the_second, texts, tmp_path)
    assert [code for code, _ in said] == [0, 0]
    assert [(row["length"], row.get("error")) for row in rows] == [(64, None), (300, "out of memory")]


def test_a_full_disk_ends_all(texts: str, tmp_path: Path) -> None:
    said, rows = run_failing(full_disk_on_the_second, texts, tmp_path)
    assert [code for code, _ in said] == [2, 2] and rows == []
    assert "".join(text for _, text in said).count("error: no space left to write some file") == 1


def test_a_rank_that_is_killed_ends_the_others_and_its_work_is_kept(texts: str, tmp_path: Path) -> None:
    said, rows = run_failing(kill_the_second, texts, tmp_path, "--batch-size", "1")
    assert [code for code, _ in said] == [1, 9] and rows == []
    assert "error: process 0 lost another one" in said[0][1] and "Traceback" not in said[0][1]
    partial = read_rows(tmp_path / "rows.jsonl.partial.jsonl")
    done = {index for line in partial for index in line["parts"]}
    assert len(done) == 4  # three of the first rank, one of the second
    said, rows = run_failing(None, texts, tmp_path, "--batch-size", "1")
    assert [code for code, _ in said] == [0, 0], said
    argv = ("-m", str(DEFAULT_MODEL), "-d", texts, "--lengths", "64,300", "--scaling", "dynamic-yarn")
    assert close(measured(rows), measured(evaluate(perplexity.main, tmp_path / "one", *argv, "--batch-size", "1")))
    assert not (tmp_path / "rows.jsonl.partial.jsonl").exists()


# ------------------------------------------------------------------------------------------------------------- parts


def test_a_process_alone_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = join()
    assert alone == Ranks() and alone.mine([1, 2, 3]) == [1, 2, 3] and alone.gather(lambda: 7) == [7]
    assert (
        alone.spread([1, 2], lambda share: [2 * one for one in share]) == [2, 4] and alone.device("cuda:3") == "cuda:3"
    )
    alone.agree({"a": 1}, "anything")


def test_an_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="'RANK' is missing; use torchrun or accelerate launch"):
        join()
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="first"):
        join()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Ranks(1, 4, 1)
    assert second.device(None) is None and second.device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert second.device(None) == second.device("cuda") == "cuda:1" and second.device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="--device cuda:0 is not allowed with 4 processes"):
        second.device("cuda:0")
    with pytest.raises(ConfigError, match="process 2 has no GPU of its own, this machine has 2"):
        Ranks(2, 4, 2).device(None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="process 1 has no GPU of its own, this machine has 1"):
        second.device(None)
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert second.device(None) == second.device("cuda") == "cuda:0"


def test_ranks_that_found_other_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ranks, "_exchange", lambda self, value: [value, ("something else", None)])
    with pytest.raises(ConfigError, match="models and texts: processes 0 and 1 differ"):
        Ranks(0, 2).agree([1], "models and texts")


def test_errors_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ConfigError("bad"), OSError(28, "full", "file"), ZeroDivisionError("x"), torch.OutOfMemoryError("y")):
        said = module._described(error)
        rebuilt = module._rebuilt(json.loads(json.dumps(said)), 3)
        if isinstance(error, torch.OutOfMemoryError):
            assert isinstance(rebuilt, MemoryError)
        elif isinstance(error, OSError):
            assert isinstance(rebuilt, OSError) and (rebuilt.errno, rebuilt.filename) == (28, "file")
        else:
            assert type(rebuilt).__name__ == type(error).__name__ and str(rebuilt) == f"{error} (process 3)"


def test_programs_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="prompt_loop.py is for one process, not 2"):
        prompt_loop.main(["-m", str(DEFAULT_MODEL)])
    assert cli.main(["tune", "--dataset", __file__]) == 2
    assert "scaled-rope tune is for one process, not 2" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several("anything")


def test_shares_are_even() -> None:
    assert shares([0, 1, 2, 3], [5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert shares([4, 7, 9], [1, 10, 9], 2) == [[7], [9, 4]]
    assert shares([3], [8], 3) == [[3], [], []]
