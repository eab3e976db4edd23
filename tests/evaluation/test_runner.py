"""Evaluators that are interrupted, run out of memory, or fail, by way of eval/perplexity.py."""

from __future__ import annotations

import csv
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.perplexity as perplexity
from scaled_rope.command_line import run_cli
from scaled_rope.evaluation import perplexity_evaluator, runner
from scaled_rope.provenance import portable_model
from tests.helpers import ROOT
from tests.helpers.number_texts import (
    bodies,  # noqa: F401
    checkpoint,  # noqa: F401
    evaluate,
    forwards,  # noqa: F401
    new_model,
    other,  # noqa: F401
    same,
    save,
    texts,  # noqa: F401
)

SHARED = ("--scaling", "default", "--dynamic-yarn", "--lengths", "20,32", "--batch-size", "1")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("protocol", [["--truncate"], ["--sliding-window", "9"]])
@pytest.mark.parametrize("after", [1, 3, 9])
def test_half_a_document_set_is_continued(
    checkpoint: str,
    texts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwards: list[Any],
    protocol: list[str],
    after: int,
) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, *SHARED, *protocol)
    whole = evaluate(tmp_path / "whole.jsonl", *argv)
    needed = len(forwards)
    counted = perplexity_evaluator.token_nll

    def killer(*rest: Any, **more: Any) -> torch.Tensor:
        if len(forwards) == needed + after:
            raise Killed
        return counted(*rest, **more)

    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(perplexity_evaluator, "token_nll", killer)
    with pytest.raises(Killed):
        evaluate(output, *argv)
    monkeypatch.setattr(perplexity_evaluator, "token_nll", counted)
    forwards.clear()
    assert same(evaluate(output, *argv)) == same(whole)  # to the last bit
    # Documents have up to 14 windows when they slide; those of an unfinished one are passed through again.
    assert needed - after <= len(forwards) < needed - after + (1 if "--truncate" in protocol else 15)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.jsonl", "rows.jsonl"}
    forwards.clear()
    assert same(evaluate(output, *argv)) == same(whole) and not forwards


def test_other_runs_partial_results_stay(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[Any]
) -> None:
    output, counted = tmp_path / "rows.jsonl", perplexity_evaluator.token_nll

    def killer(*rest: Any, **more: Any) -> torch.Tensor:
        if len(forwards) == 2:
            raise Killed
        return counted(*rest, **more)

    argv = ("-m", checkpoint, "--dataset", texts, "--batch-size", "1", "--lengths", "20,32")
    monkeypatch.setattr(perplexity_evaluator, "token_nll", killer)
    with pytest.raises(Killed):
        evaluate(output, *argv, "--scaling", "default")
    monkeypatch.setattr(perplexity_evaluator, "token_nll", counted)
    forwards.clear()
    evaluate(output, *argv, "--scaling", "yarn:4")
    assert len(forwards) == 4
    evaluate(output, *argv, "--scaling", "default", "--lengths", "26,32")  # needs sums at 26, which are not there
    assert len(forwards) == 8
    assert not Path(f"{output}.partial.jsonl").exists()


KILL = """
import os, signal, sys
import eval.perplexity as perplexity
from scaled_rope.evaluation import perplexity_evaluator
inner, calls = perplexity_evaluator.token_nll, []
def killer(*rest, **more):
    calls.append(0)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*rest, **more)
perplexity_evaluator.token_nll = killer
perplexity.main(sys.argv[1:])
"""


def test_sigkill(checkpoint: str, texts: str, tmp_path: Path, forwards: list[Any]) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, *SHARED)
    whole = evaluate(tmp_path / "whole.jsonl", *argv)
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, "-c", KILL, *argv, "--device", "cpu", "--hide-progress", "--output", str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists() and Path(f"{output}.partial.jsonl").exists()
    with open(f"{output}.partial.jsonl", "ab") as file:
        file.write(b'{"key": "torn')  # as a kill in the middle of a write leaves it
    needed = len(forwards)
    forwards.clear()
    resumed = evaluate(output, *argv)
    assert len(forwards) == needed - 3
    # Other processes sum with the same code; the bits may still differ by the number of threads.
    for ours, others in zip(same(resumed), same(whole), strict=True):
        assert ours["perplexity"] == pytest.approx(others["perplexity"], rel=1e-6)
        assert {k: v for k, v in ours.items() if isinstance(v, (int, str, dict))} == {
            k: v for k, v in others.items() if isinstance(v, (int, str, dict))
        }


def exhaust(monkeypatch: pytest.MonkeyPatch, is_too_much: Callable[[torch.Tensor], bool]) -> None:
    inner = perplexity_evaluator.token_nll

    def hungry(model: Any, ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        if is_too_much(ids):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return inner(model, ids, *rest, **more)

    monkeypatch.setattr(perplexity_evaluator, "token_nll", hungry)


@pytest.mark.parametrize("spec", ["yarn:4", "dynamic-yarn"])
def test_a_length_that_does_not_fit_is_a_row(
    checkpoint: str,
    texts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forwards: list[Any],
    spec: str,
) -> None:
    table = tmp_path / "table.csv"
    argv = ("-m", checkpoint, "--scaling", spec, "--dataset", texts, "--samples", "2", "--lengths", "20,40,60,80")
    argv += ("--output-file", str(table))
    whole = evaluate(tmp_path / "whole.jsonl", *argv)
    with monkeypatch.context() as patch:
        exhaust(patch, lambda ids: ids.shape[1] > 40)
        rows = evaluate(tmp_path / "rows.jsonl", *argv)
        by_length = {row["length"]: row for row in rows}
        for length in (60, 80):
            assert by_length[length]["perplexity"] is None and by_length[length]["error"] == "out of memory"
        for row in whole[:2]:
            assert by_length[row["length"]]["perplexity"] == pytest.approx(row["perplexity"], rel=1e-6)
        assert capsys.readouterr().out.count("oom") == 4  # two tables
        assert next(csv.reader(table.read_text().splitlines()[1:]))[-2:] == ["", ""]
        forwards.clear()
        assert evaluate(tmp_path / "rows.jsonl", *argv) == rows and not forwards
    again = evaluate(tmp_path / "rows.jsonl", *argv, "--retry-oom")
    assert [row["length"] for row in again[4:]] == [60, 80]
    assert [row["perplexity"] for row in again[4:]] == [row["perplexity"] for row in whole[2:]]
    assert "oom" not in capsys.readouterr().out.splitlines()[-9:]


def test_batches_shrink_until_they_fit(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[Any]
) -> None:
    argv = ("-m", checkpoint, "--scaling", "yarn:4", "--dataset", texts, "--lengths", "32")
    (whole,) = evaluate(tmp_path / "whole.jsonl", *argv)
    exhaust(monkeypatch, lambda ids: ids.shape[0] > 1)
    forwards.clear()
    (row,) = evaluate(tmp_path / "rows.jsonl", *argv)
    assert forwards == [(1, 32)] * 4
    assert row["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-6)  # float32 noise of other batches


def test_a_failing_model_leaves_the_others_their_results(
    checkpoint: str,
    other: str,
    texts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = save(new_model(seed=2), tmp_path / "broken")
    weights = Path(broken) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    odd = save(new_model(seed=3), tmp_path / "odd")
    inner = perplexity_evaluator.token_nll

    def moody(model: Any, *rest: Any, **more: Any) -> torch.Tensor:
        if model.config._name_or_path == odd:
            raise RuntimeError("mood\nand more")
        return inner(model, *rest, **more)

    monkeypatch.setattr(perplexity_evaluator, "token_nll", moody)
    models = ("-m", broken, "-m", checkpoint, "-m", odd, "-m", other)
    argv = ("--scaling", "yarn:4", "--dataset", texts, "--lengths", "20,32")
    table = tmp_path / "table.csv"
    capsys.readouterr()
    rows = evaluate(tmp_path / "rows.jsonl", *models, *argv, "--output-file", str(table), code=1)
    assert [row["model"] for row in rows] == [portable_model(checkpoint)] * 2 + [portable_model(other)] * 2
    captured = capsys.readouterr()
    said = captured.err.splitlines()
    assert [line.partition(",")[0] for line in said] == ["failed: broken", "failed: odd"]
    assert "RuntimeError: mood" in said[1]
    assert len(table.read_text().splitlines()) == 5 and "random, yarn x4" in captured.out
    # Alone, a model that cannot be read is bad input.
    alone = ["-m", broken, "-d", texts, "--lengths", "20", "--hide-progress", "--output", str(tmp_path / "x")]
    assert run_cli(lambda: perplexity.main(alone)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    # Nothing is lost: with the model mended, the same command measures what is missing.
    monkeypatch.setattr(perplexity_evaluator, "token_nll", inner)
    save(new_model(seed=2), Path(broken))
    assert len(evaluate(tmp_path / "rows.jsonl", *models, *argv)) == 8


def test_bad_files_are_one_line(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def says(*argv: str) -> str:
        shared = ["-m", checkpoint, "--lengths", "32", "--device", "cpu", "--hide-progress"]
        assert run_cli(lambda: perplexity.main([*shared, *argv])) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
        return line

    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    assert "line 2" in says("-d", texts, "--output", str(tmp_path / "rows.jsonl"))
    assert "cannot be used" in says("-d", texts, "--output", str(tmp_path / "rows.jsonl" / "x"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("2 3")
    monkeypatch.chdir(tmp_path)
    # A note says that an empty text is left out.
    assert "only 0 of 0 documents" in says("-d", "empty.txt", "--sliding-window", "8")
    assert "only 0 of 1 documents have 32 tokens" in says("-d", "short.txt")
    assert "--stride says 3" in says("-d", texts, "--sliding-window", "8", "--stride", "3")
    monkeypatch.setattr(runner, "_LOCK_SECONDS", 0.0)
    with open("locked.jsonl", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "locked by another process" in says("-d", texts, "--output", "locked.jsonl")
    assert Path("rows.jsonl").read_text() == '{"a": 1}\nnonsense\n{"b": 2}\n'


def test_rows_that_are_gone_before_the_end_are_noticed(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is removed after the first row; the next appends to a new one."""
    output, original, count = tmp_path / "rows.jsonl", runner.append_row, []

    def append(path: Path, row: dict[str, Any], once: bool = False) -> bool:
        if len(count) == 1:
            os.unlink(path)
        count.append(row)
        return original(path, row, once)

    argv = ["-m", checkpoint, "--dataset", texts, "--scaling", "default", "--lengths", "20,32", "--device", "cpu"]
    argv += ["--hide-progress", "--output", str(output)]
    with monkeypatch.context() as patch:
        patch.setattr(runner, "append_row", append)
        assert run_cli(lambda: perplexity.main(argv)) == 2
    assert f"error: 1 of {len(count)} rows that were written to {str(output)!r} are gone" in capsys.readouterr().err
    assert run_cli(lambda: perplexity.main(argv)) == 0


def test_partial_results_that_were_changed_count_as_not_there(tmp_path: Path) -> None:
    parts = runner.Parts(tmp_path / "rows.jsonl")
    parts.add("a", {0: {"32": [1.5]}}, tokens=3)
    parts.add("a", {1: {"32": [2.5]}}, tokens=3)
    lines = parts.path.read_text().splitlines()
    old = '{"key": "a", "parts": {"2": {"32": [3.5]}}}'  # of an earlier version
    parts.path.write_text("\n".join([lines[0], lines[1].replace("2.5", "2.6"), old]) + "\n")
    assert [list(row["parts"]) for row in parts.read("a")] == [["0"], ["2"]]


def test_a_text_that_may_not_be_read_is_refused_before_any_model_is_loaded(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_path = Path.open

    def refusing(path: Path, *rest: Any, **more: Any) -> Any:
        if path.is_relative_to(texts):
            raise PermissionError(13, "Permission denied", str(path))
        return open_path(path, *rest, **more)

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr(runner.ModelLoader, "__call__", None)
    output = tmp_path / "rows.jsonl"
    argv = ["-m", checkpoint, "--dataset", texts, "--lengths", "20", "--device", "cpu", "--output", str(output)]
    assert run_cli(lambda: perplexity.main(argv)) == 2
    assert f"dataset {texts}/0.txt cannot be read: Permission denied" in capsys.readouterr().err
    runner.print_output(output)
    runner.print_summary("perplexity", {}, str)
    assert capsys.readouterr().out == ""
    output.touch()
    runner.print_output(output)
    assert capsys.readouterr().out == f"\nrows: {output}\n"
