"""eval/perplexity.py over many lengths: one pass for all, or one per dynamic scale."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import eval.perplexity as perplexity
from scaled_rope.evaluation import perplexity_evaluator
from scaled_rope.evaluation.windows import truncated
from scaled_rope.patching.loading import load_model
from scaled_rope.texts.packed import PackedWriter
from tests.helpers.evaluators import evaluate
from tests.helpers.small_models import (
    TRAINED,
    VOCABULARY,
    checkpoint,  # noqa: F401
    full_nll,
    measured,
    new_model,
    texts,  # noqa: F401
    tokenizer,  # noqa: F401
)


def test_uniform_model_has_its_vocabulary_as_perplexity(
    tokenizer: PreTrainedTokenizerFast, texts: str, tmp_path: Path
) -> None:
    model = new_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "uniform")
    tokenizer.save_pretrained(tmp_path / "uniform")
    name = str(tmp_path / "uniform")
    argv = (
        "-m",
        name,
        "--scaling",
        "default",
        "--dynamic-yarn",
        "--dataset",
        texts,
        "--lengths",
        "32,128",
        "--samples",
        "2",
    )
    rows = evaluate(perplexity.main, tmp_path / "rows.jsonl", *argv)
    assert len(rows) == 4
    for row in rows:
        # ln 400 is rounded once to float32 (relative 6e-8), then summed in float64.
        assert row["perplexity"] == pytest.approx(VOCABULARY, rel=1e-6)
        assert row["perplexity_bucket"] == pytest.approx(VOCABULARY, rel=1e-6)
        assert row["targets"] == 2 * (row["length"] - 1)
    assert [row["bucket_targets"] for row in rows[:2]] == [2 * 31, 2 * 96]


def test_perplexity_is_that_of_whole_logits(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, "--lengths", "16,48", "--samples", "2", "--windows", "3")
    rows = evaluate(perplexity.main, tmp_path / "rows.jsonl", *argv)
    args = perplexity.build_parser().parse_args(list(argv))
    texts_of, _ = perplexity.evaluator_of(args).prepare(checkpoint)
    windows = torch.from_numpy(np.stack([texts_of.ids(window) for window in truncated(texts_of, 48)]))
    assert windows.shape == (6, 48) and torch.all(windows[:, 0] == 0)  # BOS once, in front
    model = load_model(checkpoint, device="cpu")
    with torch.inference_mode():
        nll = full_nll(model, windows[:, :-1], windows[:, 1:]).double()
    for row, (low, high) in zip(rows, ((0, 16), (16, 48)), strict=True):
        assert row["bucket"] == [low, high]
        # Targets are tokens 1 … L-1; the nll of token i stands in column i-1. Float32 noise of the mean: below 1e-6.
        assert row["perplexity"] == pytest.approx(float(nll[:, : high - 1].mean().exp()), rel=1e-5)
        assert row["perplexity_bucket"] == pytest.approx(
            float(nll[:, max(low - 1, 0) : high - 1].mean().exp()), rel=1e-5
        )


@pytest.mark.parametrize("spec", ["default", "yarn:4"])
def test_one_pass_is_many(checkpoint: str, texts: str, tmp_path: Path, spec: str) -> None:
    argv = ("-m", checkpoint, "--scaling", spec, "--dataset", texts, "--samples", "2", "--device", "cpu")
    args = perplexity.build_parser().parse_args([*argv, "--lengths", "32,64,200"])
    evaluator, (job,) = perplexity.evaluator_of(args), perplexity.model_jobs(args)
    model = load_model(checkpoint, scaling=spec, device="cpu")
    assert evaluator.passes(job, [32, 64, 200]) == {200: [32, 64, 200]}
    together = dict(evaluator.measure(model, job, 200, [32, 64, 200], lambda tokens: None))
    for length in (32, 64, 200):
        ((_, alone),) = evaluator.measure(model, job, length, [length], lambda tokens: None)
        for field in ("perplexity", "perplexity_bucket"):
            # Longer passes multiply matrices in other blocks: float32 noise of 1e-6 per token, less in the mean.
            assert math.log(together[length][field]) == pytest.approx(math.log(alone[field]), rel=1e-6)


def test_dynamic_scaling_is_evaluated_at_each_length(checkpoint: str, texts: str, tmp_path: Path) -> None:
    shared = ("-m", checkpoint, "--dataset", texts, "--samples", "2", "--lengths", "32,64,128,200")
    rows = evaluate(perplexity.main, tmp_path / "dynamic.jsonl", *shared, "--scaling", "dynamic-yarn")
    assert [row["length"] for row in rows] == [32, 64, 128, 200]
    for row in rows:
        factor = max(1.0, row["length"] / TRAINED)
        path = tmp_path / f"static-{row['length']}.jsonl"
        static = evaluate(perplexity.main, path, *shared, "--scaling", f"yarn:{factor!r}")
        (same,) = [one for one in static if one["length"] == row["length"]]
        assert same["data"] == row["data"]
        for field in ("perplexity", "perplexity_bucket"):
            assert row[field] == pytest.approx(same[field], rel=1e-5)  # as above; perplexity = exp(about 6 nats)
    assert rows[2]["perplexity"] != pytest.approx(
        evaluate(perplexity.main, tmp_path / "static-200.jsonl", *shared, "--scaling", "yarn:3.125")[2]["perplexity"],
        rel=1e-4,
    )


def test_lengths_with_the_same_dynamic_scale_share_a_pass(checkpoint: str, texts: str, tmp_path: Path) -> None:
    shared = ("-m", checkpoint, "--scaling", "dynamic-yarn", "--dataset", texts, "--samples", "2")
    lengths = [TRAINED // 4, TRAINED // 2, TRAINED, 2 * TRAINED, 3 * TRAINED]
    args = perplexity.build_parser().parse_args([*shared, "--lengths", ",".join(map(str, lengths))])
    evaluator, (job,) = perplexity.evaluator_of(args), perplexity.model_jobs(args)
    assert evaluator.passes(job, lengths) == {n: [n] for n in lengths[3:]} | {TRAINED: lengths[:3]}
    rows = evaluate(perplexity.main, tmp_path / "together.jsonl", *shared, "--lengths", args.lengths)
    for row in rows:
        # Alone, without shorter lengths that could share its pass. The windows are those of the longest length.
        known = evaluator.measure(load_model(checkpoint, scaling=job.scaling, device="cpu"), job, row["length"],
                                  [row["length"]], lambda tokens: None)  # fmt: skip
        ((_, alone),) = known
        for field in ("perplexity", "perplexity_bucket"):
            # Longer passes multiply matrices in other blocks: float32 noise of 1e-6 per token, less in the mean.
            assert math.log(row[field]) == pytest.approx(math.log(alone[field]), rel=1e-6)


def test_batch_size_changes_nothing(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--scaling", "dynamic-yarn", "--dataset", texts, "--windows", "2", "--lengths", "32,100")
    one = evaluate(perplexity.main, tmp_path / "one.jsonl", *argv, "--batch-size", "1")
    three = evaluate(perplexity.main, tmp_path / "three.jsonl", *argv, "--batch-size", "3")
    for ours, others in zip(one, three, strict=True):
        # Other batch shapes, other order of summation: float32 noise, see above.
        assert math.log(ours["perplexity"]) == pytest.approx(math.log(others["perplexity"]), rel=1e-6)


def test_interrupted_run_continues(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    argv = ("-m", checkpoint, "--scaling", "default", "--scaling", "yarn:4", "--dynamic-yarn", "--dataset", texts)
    argv += ("--samples", "2", "--lengths", "32,64,128", "--output-file", str(table))
    whole = evaluate(perplexity.main, tmp_path / "whole.jsonl", *argv)
    expected_table = table.read_text()
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    resumed = evaluate(perplexity.main, cut, *argv)
    assert measured(resumed) == measured(whole)
    assert table.read_text() == expected_table
    assert [row["provenance"] for row in resumed[:4]] == [row["provenance"] for row in whole[:4]]
    monkeypatch.setattr(perplexity_evaluator, "token_nll", None)  # nothing is left to compute
    assert measured(evaluate(perplexity.main, cut, *argv)) == measured(whole)


def test_table_has_the_released_layout(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, "--min-tokens", "32", "--max-tokens", "96", "--tokens-step", "32")
    released = ("--truncate", "--sliding-window", "256", "--aggressive-memory", "--split", "test", "--samples", "2")
    table = tmp_path / "table.csv"
    rows = evaluate(perplexity.main, tmp_path / "rows.jsonl", *argv, *released, "--output-file", str(table))
    with open(table, newline="") as file:
        head, line = csv.reader(file)
    assert head == ["", "32", "64", "96"]
    assert line == [checkpoint, *(str(row["perplexity"]) for row in rows)]


def test_default_lengths_double(checkpoint: str) -> None:
    def lengths(*argv: str) -> list[int]:
        return perplexity.context_lengths(perplexity.build_parser().parse_args(list(argv)))

    assert lengths() == [256, 512, 1024, 2048, 4096, 8192]
    assert lengths("--max-tokens", "1000") == [256, 512, 1000]
    assert lengths("--max-tokens", "256") == [256]
    assert lengths("--tokens-step", "3000") == [256, 3256, 6256]
    assert lengths("--lengths", "64,32,64") == [32, 64]


def test_packed_sets_are_documents(checkpoint: str, tmp_path: Path) -> None:
    with PackedWriter(tmp_path / "packed", 40, VOCABULARY) as writer:
        for seed in range(3):
            writer.append([0, *np.random.default_rng(seed).integers(2, VOCABULARY, 39)])
        writer.close({})
    for flag in ("--dataset", "--tokenized"):
        rows = evaluate(
            perplexity.main,
            tmp_path / f"{flag}.jsonl",
            "-m",
            checkpoint,
            flag,
            str(tmp_path / "packed"),
            "--lengths",
            "8,40",
        )
        assert rows[1]["targets"] == 3 * 39
        assert rows[1]["data"]["windows"] == 3


@pytest.mark.parametrize("protocol", ["--truncate", "--sliding-window=32"])
def test_copies_of_a_text_are_one_document(
    protocol: str, checkpoint: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, copied = tmp_path / "once", tmp_path / "copied"
    for folder in (once, copied):
        folder.mkdir()
        shutil.copy(Path(texts) / "a.txt", folder / "a.txt")
    argv = ("-m", checkpoint, "--lengths", "64", protocol)
    (row,) = evaluate(perplexity.main, tmp_path / "once.jsonl", *argv, "--dataset", str(once))
    assert "left out" not in capsys.readouterr().err
    shutil.copy(Path(texts) / "a.txt", copied / "b.txt")
    (again,) = evaluate(perplexity.main, tmp_path / "copied.jsonl", *argv, "--dataset", str(copied))
    assert again["data"] == {**row["data"], "name": "copied"} and again["data"]["documents"] == 1
    assert again["interval"] == row["interval"] and again["perplexity"] == row["perplexity"]
    assert f"note: dataset {copied}: document 2 has the tokens of document 1 and is left out" in capsys.readouterr().err
    # The limit counts distinct documents.
    shutil.copy(Path(texts) / "b.txt", copied / "c.txt")
    argv = (*argv, "--dataset", str(copied), "--samples", "2")
    (both,) = evaluate(perplexity.main, tmp_path / "both.jsonl", *argv)
    assert both["data"]["documents"] == 2 and both["interval"][0] < both["interval"][1]
