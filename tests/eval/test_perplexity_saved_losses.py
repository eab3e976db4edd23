"""eval/perplexity.py with losses on disk: what they answer without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import eval.perplexity as perplexity
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import jobs, perplexity_evaluator
from scaled_rope.evaluation.windows import read_losses
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.loss import IGNORE, token_nll
from tests.helpers.number_texts import (
    bodies,  # noqa: F401
    checkpoint,  # noqa: F401
    evaluate,
    forwards,  # noqa: F401
    same,
    texts,  # noqa: F401
)


@pytest.mark.parametrize("scaling", ["yarn:4", "dynamic-yarn"])
@pytest.mark.parametrize("protocol", [["--truncate", "--windows", "2"], ["--sliding-window", "9"]])
def test_saved_losses_need_no_pass(
    checkpoint: str,
    texts: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwards: list[Any],
    scaling: str,
    protocol: list[str],
) -> None:
    argv = ("-m", checkpoint, "--scaling", scaling, "--dataset", texts, "--lengths", "20,32", *protocol)
    folder = tmp_path / "losses"
    plain = evaluate(tmp_path / "plain.jsonl", *argv)
    assert same(evaluate(tmp_path / "saving.jsonl", *argv, "--save-nll", str(folder))) == same(plain)
    forwards.clear()
    monkeypatch.setattr(jobs.ModelLoader, "__call__", None)  # the model is not even read
    for weighting in ("token", "window"):
        more = ("--weighting", weighting, "--save-nll", str(folder))
        rows = evaluate(tmp_path / f"{weighting}.jsonl", *argv, *more)
        assert not forwards and rows[0]["seconds"] == 0
        if weighting == "token":
            assert same(rows) == same(plain)


def test_saved_losses_serve_other_lengths(
    checkpoint: str, texts: str, bodies: list[list[int]], tmp_path: Path, forwards: list[Any]
) -> None:
    folder = tmp_path / "losses"
    argv = ("-m", checkpoint, "--scaling", "yarn:4", "--dataset", texts, "--samples", "2", "--save-nll", str(folder))
    evaluate(tmp_path / "first.jsonl", *argv, "--lengths", "64")
    forwards.clear()
    rows = evaluate(tmp_path / "second.jsonl", *argv, "--lengths", "10,48")
    assert not forwards
    fresh = evaluate(tmp_path / "fresh.jsonl", *argv[:-2], "--lengths", "10,48")
    for ours, others in zip(rows, fresh, strict=True):
        assert ours["perplexity"] == pytest.approx(others["perplexity"], rel=1e-6)  # float32 noise, as above
        assert ours["data"] == others["data"]
    forwards.clear()
    evaluate(tmp_path / "longer.jsonl", *argv, "--lengths", "80")  # more than there is
    assert len(forwards) == 1
    (kept,) = folder.iterdir()
    files = sorted(kept.iterdir())
    assert len(files) == 2
    model = load_model(checkpoint, scaling="yarn:4", device="cpu")
    ids = torch.tensor([[0, *body[:79]] for body in bodies[:2]])
    targets = torch.full_like(ids, IGNORE)
    targets[:, :-1] = ids[:, 1:]
    with torch.inference_mode():
        expected = {tuple(row.tolist()) for row in token_nll(model, ids, targets)[:, :-1].numpy().round(3)}
    found = set()
    for path in files:
        header, losses = read_losses(path)
        assert header["first"] == "0" and header["context"] == "all" and losses.dtype == np.float32
        found.add(tuple(losses.round(3).tolist()))
    # Rounded to 0.001 nats, so that documents can be told apart but float32 noise cannot.
    for ours, others in zip(sorted(found), sorted(expected), strict=True):
        np.testing.assert_allclose(ours, others, atol=0.0011)
    files[0].write_bytes(b"x" * 10)
    with pytest.raises(ConfigError, match="remove the file"):
        evaluate(tmp_path / "damaged.jsonl", *argv, "--lengths", "50")


def test_a_run_with_saved_losses_continues_from_them(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[Any]
) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, "--lengths", "20,32", "--batch-size", "1")
    whole = evaluate(tmp_path / "whole.jsonl", *argv)
    argv += ("--save-nll", str(tmp_path / "losses"))
    forwards.clear()
    counted = perplexity_evaluator.token_nll
    monkeypatch.setattr(
        perplexity_evaluator, "token_nll", lambda *rest, **more: 1 / 0 if len(forwards) == 3 else counted(*rest, **more)
    )
    assert run_cli(lambda: perplexity.main([*argv, "--output", str(tmp_path / "rows.jsonl")])) == 1
    monkeypatch.setattr(perplexity_evaluator, "token_nll", counted)
    forwards.clear()
    assert same(evaluate(tmp_path / "rows.jsonl", *argv)) == same(whole)
    assert len(forwards) == 1


def test_saved_losses_that_were_changed_are_refused(
    checkpoint: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "losses"
    argv = ["-m", checkpoint, "--scaling", "yarn:4", "--dataset", texts, "--lengths", "32", "--device", "cpu"]
    argv += ["--hide-progress", "--save-nll", str(folder)]
    assert run_cli(lambda: perplexity.main([*argv, "--output", str(tmp_path / "first.jsonl")])) == 0
    file = sorted(folder.rglob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # in a loss
    file.write_bytes(data)
    assert run_cli(lambda: perplexity.main([*argv, "--output", str(tmp_path / "second.jsonl")])) == 2
    assert "were changed after they were written; remove the file" in capsys.readouterr().err
    file.unlink()
    assert run_cli(lambda: perplexity.main([*argv, "--output", str(tmp_path / "second.jsonl")])) == 0


@pytest.mark.parametrize("protocol", [["--truncate", "--windows", "2", "--control"], ["--sliding-window", "9"]])
def test_losses_that_are_asked_for_are_kept_although_the_rows_are_there(
    checkpoint: str, texts: str, tmp_path: Path, forwards: list[Any], protocol: list[str]
) -> None:
    argv = ("-m", checkpoint, "--scaling", "yarn:4", "--dataset", texts, "--lengths", "20,32", *protocol)
    output, folder = tmp_path / "rows.jsonl", tmp_path / "losses"
    rows = evaluate(output, *argv)
    written = output.read_text()
    assert evaluate(output, *argv, "--save-nll", str(folder)) == rows
    files = sorted(folder.rglob("*.safetensors"))
    kept = {file: file.read_bytes() for file in files}
    assert files and output.read_text() == written  # no row twice
    files[0].unlink()
    forwards.clear()
    evaluate(output, *argv, "--save-nll", str(folder))
    again = len(forwards)
    assert {file: file.read_bytes() for file in folder.rglob("*.safetensors")}.keys() == kept.keys() and again
    evaluate(output, *argv, "--save-nll", str(folder))
    assert len(forwards) == again and output.read_text() == written
