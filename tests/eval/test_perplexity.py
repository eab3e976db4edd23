"""eval/perplexity.py: both protocols against a slow restatement, and its sources of text."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import eval.perplexity as perplexity
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import jobs
from scaled_rope.patching import loss
from scaled_rope.patching.loading import load_model
from tests.helpers.number_texts import (
    SIZES,
    VOCABULARY,
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


def bigram(table: torch.Tensor) -> LlamaForCausalLM:
    """A Llama that gives token j after token i the logit table[i, j], whatever came before."""
    model = new_model(hidden_size=VOCABULARY, num_hidden_layers=1, rms_norm_eps=0.0, tie_word_embeddings=False)
    with torch.no_grad():
        # Both branches of the layer add nothing, and the norm of a unit vector multiplies it by √width.
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY))
        model.lm_head.weight.copy_(table.T / math.sqrt(VOCABULARY))
    return model


# ---------------------------------------------------------------------------------------------------- what is computed


def restated(
    nll: Callable[[list[int]], np.ndarray], bodies: list[list[int]], length: int, stride: int | None, bos: bool
) -> tuple[float, float]:
    """The released procedure, window by window, as nats per token under both weightings.

    nll: a window's token ids -> nats of all of them but the first.
    """
    sums, counts = [], []
    for body in bodies:
        size = length - bos
        body = body[:size] if stride is None else body
        end_before = 0
        for begin in range(0, len(body), stride or len(body)):
            end = min(begin + size, len(body))
            window = [0] * bos + body[begin:end]
            losses = nll(window)[-(end - end_before) :]
            sums.append(losses.sum())
            counts.append(len(losses))
            end_before = end
            if end == len(body):
                break
    return sum(sums) / sum(counts), float(np.mean(np.divide(sums, counts)))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [None, 5, 16])
def test_closed_form_of_a_bigram(tmp_path: Path, texts: str, bodies: list[list[int]], stride: int, bos: bool) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).double()
    name = save(bigram(table.float()), tmp_path / "bigram", bos)
    logs = table.log_softmax(dim=1).numpy()
    protocol = [] if stride is None else ["--protocol", "sliding", "--stride", str(stride)]
    used = [body for body in bodies if stride is not None or len(body) >= 32 - bos]

    def nll(window: list[int]) -> np.ndarray:
        return -logs[window[:-1], window[1:]]

    for weighting, expected in zip(("token", "window"), restated(nll, used, 32, stride, bos), strict=True):
        argv = ("-m", name, "--scaling", "yarn:4", "--dataset", texts, "--lengths", "32", "--weighting", weighting)
        (row,) = evaluate(tmp_path / f"{weighting}.jsonl", *argv, *protocol)
        # Float32 losses of about 3 nats: relative noise of 1e-7 each, less in the mean.
        assert row["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
        assert row["data"]["documents"] == len(used) == len(row["document_nats"])
        if stride is not None:
            assert row["targets"] == sum(SIZES) - (0 if bos else len(SIZES))  # every token once
        assert sum(row["document_targets"]) == row["targets"]


@pytest.mark.parametrize("stride", [None, 1, 7, 31])
def test_whole_logits_window_by_window(
    checkpoint: str, texts: str, bodies: list[list[int]], tmp_path: Path, stride: int | None
) -> None:
    model = load_model(checkpoint, scaling="yarn:4", device="cpu")
    used = [body for body in bodies if stride is not None or len(body) >= 39]

    def nll(window: list[int]) -> np.ndarray:
        ids = torch.tensor([window])
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[:, :-1].double()
            return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")[0].numpy()

    protocol = ["--truncate"] if stride is None else ["--sliding-window", str(stride)]
    argv = ("-m", checkpoint, "--yarn", "4", "--dataset", texts, "--lengths", "32,40", *protocol)
    for weighting, index in (("token", 0), ("window", 1)):
        rows = evaluate(tmp_path / f"{weighting}.jsonl", *argv, "--weighting", weighting)
        for row in rows:
            expected = restated(nll, used, row["length"], stride, True)[index]
            assert row["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
            below, above = row["interval"]
            assert below < row["perplexity"] < above


def test_weightings_differ_where_windows_do(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--dataset", texts, "--lengths", "32", "--sliding-window", "3")
    (token,), (window,) = (
        evaluate(tmp_path / f"{name}.jsonl", *argv, "--weighting", name) for name in ("token", "window")
    )
    assert abs(token["perplexity"] / window["perplexity"] - 1) > 1e-3


def test_released_flags(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("-m", checkpoint, "--lengths", "32", "-d", texts, "-f", "text", "--split", "test", "--samples", "4")
    (slid,) = evaluate(tmp_path / "a", *argv, "--sliding-window", "8", "--aggressive-memory")
    assert slid["protocol"] == {"name": "sliding", "stride": 8}
    assert slid == {**evaluate(tmp_path / "b", *argv, "--protocol", "sliding", "--stride", "8")[0], **slid}
    (cut,) = evaluate(tmp_path / "c", *argv, "--sliding-window", "8", "--truncate")  # --truncate overrides
    assert cut["protocol"] == {"name": "truncate", "bucket_start": 0}
    (default,) = evaluate(tmp_path / "d", *argv)
    assert same([default]) == same([cut])


def test_default_stride_is_the_papers(checkpoint: str, texts: str) -> None:
    args = perplexity.build_parser().parse_args(["-m", checkpoint, "-d", texts, "--protocol", "sliding"])
    assert perplexity.check_arguments(args)[1] == 256


def test_many_lengths_in_one_pass(checkpoint: str, texts: str, tmp_path: Path, forwards: list[Any]) -> None:
    argv = ("-m", checkpoint, "--scaling", "yarn:8", "--dataset", texts, "--samples", "2", "--batch-size", "1")
    together = evaluate(tmp_path / "together.jsonl", *argv, "--lengths", "80,17,48,33,64")  # in any order
    assert forwards == [(1, 80)] * 2 and [row["length"] for row in together] == [17, 33, 48, 64, 80]
    for row in together:
        (alone,) = evaluate(tmp_path / f"{row['length']}.jsonl", *argv, "--lengths", str(row["length"]))
        # Float32 noise of other matrix shapes, averaged over the targets.
        assert row["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-6)
    assert forwards[2:] == [(1, length) for length in (17, 33, 48, 64, 80) for _ in range(2)]
    forwards.clear()
    dynamic = ("-m", checkpoint, "--dynamic-yarn", "--dataset", texts, "--samples", "2", "--lengths", "17,48")
    evaluate(tmp_path / "dynamic.jsonl", *dynamic)
    assert forwards == [(2, 17), (2, 48)]


@pytest.mark.parametrize("protocol", [["--truncate"], ["--sliding-window", "6"]])
def test_batches_and_chunks_change_nothing(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: list[str]
) -> None:
    argv = ("-m", checkpoint, "--scaling", "yarn:4", "--dataset", texts, "--lengths", "24,32", *protocol)
    whole = evaluate(tmp_path / "whole.jsonl", *argv)
    for number, more in enumerate((["--batch-size", "1"], ["--batch-size", "3"], ["--prefill-chunk", "5"], [])):
        if not more:
            monkeypatch.setattr(loss, "_LOGITS_PER_CHUNK", 4 * VOCABULARY)
        for ours, others in zip(whole, evaluate(tmp_path / f"{number}.jsonl", *argv, *more), strict=True):
            # Float32 noise of other matrix shapes, averaged over the targets.
            assert ours["perplexity"] == pytest.approx(others["perplexity"], rel=1e-6)


# -------------------------------------------------------------------------------------------------------- statistics


def test_no_interval_from_one_document(checkpoint: str, texts: str, tmp_path: Path) -> None:
    (row,) = evaluate(tmp_path / "rows.jsonl", "-m", checkpoint, "-d", texts, "--lengths", "32", "--samples", "1")
    assert row["interval"] is None and len(row["document_nats"]) == 1
    assert row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["peak_memory"] > 2**20


def test_overflow_is_no_number(tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = new_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)  # finite, and no logit is
    name = save(model, tmp_path / "nan")
    argv = ("-m", name, "-d", texts, "--lengths", "32", "--batch-size", "1")
    (row,) = evaluate(tmp_path / "rows.jsonl", *argv)
    assert row["perplexity"] is None and "error" not in row and row["document_nats"] == [None] * 4
    assert "overflow" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- text


def test_several_models_and_data_sets(
    checkpoint: str, other: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second.txt"
    second.write_text(" ".join(str(2 + n * n % 21) for n in range(60)))
    loads: list[str] = []
    load = jobs.ModelLoader.__call__

    def counting(self: Any, job: Any) -> Any:
        if self._name != job.model:
            loads.append(job.model)
        return load(self, job)

    monkeypatch.setattr(jobs.ModelLoader, "__call__", counting)
    table = tmp_path / "table.csv"
    argv = ("-m", checkpoint, "-m", other, "--lengths", "20,32", "--scaling", "yarn:4")
    together = evaluate(tmp_path / "rows.jsonl", *argv, "-d", texts, "-d", str(second), "--output-file", str(table))
    assert loads == [checkpoint, other]
    assert [row["data"]["name"] for row in together] == ["texts"] * 2 + ["second.txt"] * 2 + ["texts"] * 2 + [
        "second.txt"
    ] * 2
    alone = evaluate(tmp_path / "alone.jsonl", *argv, "-d", str(second))
    assert same(alone) == same([row for row in together if row["data"]["name"] == "second.txt"])
    lines = list(csv.reader(table.read_text().splitlines()))
    assert (
        lines[0] == ["", "20", "32"] and [line[0].endswith("on second.txt") for line in lines[1:]] == [False, True] * 2
    )
    assert lines[2][1:] == [str(row["perplexity"]) for row in alone[:2]]


def test_tokenized_sets_come_back(
    checkpoint: str, texts: str, bodies: list[list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    folder = str(tmp_path / "set")
    assert perplexity.main(["-m", checkpoint, "-d", texts, "--save-tokenized", folder]) == 0
    table = datasets.load_from_disk(folder)
    assert table.column_names == ["input_ids", "attention_mask", "tokenized_len"]
    assert [list(row) for row in table["input_ids"]] == bodies
    assert table["tokenized_len"] == list(SIZES) and all(map(all, table["attention_mask"]))
    argv = ("-m", checkpoint, "--lengths", "32", "--samples", "2", "--dataset-min-tokens", "90")
    (ours,) = evaluate(tmp_path / "tokenized.jsonl", *argv, "--tokenized", folder)
    (plain,) = evaluate(tmp_path / "plain.jsonl", *argv, "--dataset", texts)
    assert ours["perplexity"] == plain["perplexity"] and ours["targets"] == 62
    assert ours["data"]["fingerprint"] == plain["data"]["fingerprint"]
    assert {path.name for path in tmp_path.iterdir()} == {"set", "tokenized.jsonl", "plain.jsonl"}


def test_subsets_of_the_hub(
    checkpoint: str, bodies: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name: str, subset: str, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        asked.append((name, subset, split, streaming))
        return iter([{"input": " ".join(map(str, body))} for body in bodies])

    monkeypatch.setattr(datasets, "load_dataset", load)
    argv = ("-m", checkpoint, "--lengths", "32", "-d", "some/scrolls", "-s", "gov_report", "--samples", "2")
    (row,) = evaluate(tmp_path / "rows.jsonl", *argv, "-f", "input")
    assert asked == [("some/scrolls", "gov_report", "test", True)]
    assert row["data"]["name"] == "scrolls" and row["data"]["subset"] == "gov_report"
    with pytest.raises(ConfigError, match="it has: input"):
        evaluate(tmp_path / "other.jsonl", *argv)
