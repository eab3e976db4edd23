"""eval/perplexity.py --control: models of which it is known how much the context beyond the control's window helps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import perplexity_evaluator
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.loss import token_nll
from scaled_rope.report.context_use import context_use
from scaled_rope.report.figures import perplexity_figure
from scaled_rope.report.summary import summarize
from scaled_rope.report.tables import load_results
from scaled_rope.results import Row
from tests.eval.test_perplexity import bigram
from tests.helpers.number_texts import (
    TRAINED,
    VOCABULARY,
    bodies,  # noqa: F401
    checkpoint,  # noqa: F401
    evaluate,
    forwards,  # noqa: F401
    other,  # noqa: F401
    same,
    save,
    texts,  # noqa: F401
)

LENGTHS = (16, 24, 40)
ARGV = ("--lengths", ",".join(map(str, LENGTHS)))
KNOWN, UNKNOWN = 0.5, 2.0


def split(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows of the measurement and those of its control."""
    control = [row for row in rows if row["protocol"]["name"] == "last-tokens"]
    return [row for row in rows if row not in control], control


def copies_from(monkeypatch: pytest.MonkeyPatch, distance: int) -> None:
    """Script every model: a token costs `KNOWN` nats if the one `distance` before it is in sight, else `UNKNOWN`."""

    def scripted(model: Any, ids: torch.Tensor, targets: torch.Tensor, *, start: int, **more: Any) -> torch.Tensor:
        place = torch.arange(1, ids.shape[1] + 1)  # of the token that each position predicts; the BOS is at 0
        cost = torch.where(place - distance >= 1, KNOWN, UNKNOWN)
        return cost.expand(ids.shape)[:, start:]

    monkeypatch.setattr(perplexity_evaluator, "token_nll", scripted)


@pytest.mark.parametrize(
    ("distance", "stride"),
    [(20, 4), (20, 1), (11, 4), (5, 4), (14, 4)],  # beyond the window of 16, just within, well within, and partly
)
def test_a_model_that_copies_from_a_stated_distance(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distance: int, stride: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    copies_from(monkeypatch, distance)
    rows = evaluate(tmp_path / "rows", "-m", checkpoint, "-d", texts, *ARGV, "--control", f"stride={stride}")
    whole, control = split(rows)
    assert [row["length"] for row in whole] == list(LENGTHS)
    assert [row["length"] for row in control] == [24, 40]  # up to the trained 16 the two are one
    said = {"name": "last-tokens", "window": TRAINED, "stride": stride}
    assert [row["protocol"] for row in control] == [{**said, "bucket_start": 16}, {**said, "bucket_start": 24}]
    # Scored tokens of a full window are its last `stride`: they stand at 16 - stride to 15.
    sees = sum(place - distance >= 1 for place in range(TRAINED - stride, TRAINED)) / stride
    expected = sees * KNOWN + (1 - sees) * UNKNOWN
    for row in control:
        assert math.log(row["perplexity_bucket"]) == pytest.approx(expected)
        assert row["bucket_targets"] == (row["length"] - row["bucket"][0]) * row["data"]["documents"]
    gain = math.log(whole[-1]["perplexity_bucket"]) - math.log(control[-1]["perplexity_bucket"])
    assert gain == pytest.approx(KNOWN - expected)  # from 24 on, all that is to be copied stands in the whole text
    printed = capsys.readouterr().out.splitlines()[-3]
    if distance == 5:
        assert printed.endswith("makes no use of its context beyond 16 tokens: 0.0 % [0.0, 0.0]")
    elif distance == 14:
        assert "uses its context: −" in printed
    if distance == 20:  # three of the eight tokens from 16 to 23 can be copied, and all later ones
        share = 100 * math.expm1(19 / 24 * (KNOWN - UNKNOWN))
        assert printed.endswith(f"uses its context: −{-share:.1f} % [−{-share:.1f}, −{-share:.1f}]")


def test_nothing_beyond_the_last_token_helps_in_a_markov_text(
    tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0))
    name = save(bigram(table), tmp_path / "bigram")
    whole, control = split(evaluate(tmp_path / "rows", "-m", name, "-d", texts, *ARGV, "--control"))
    for one, cut in zip(whole[1:], control, strict=True):
        # Float32 noise of other matrix shapes, averaged over the targets.
        assert one["perplexity_bucket"] == pytest.approx(cut["perplexity_bucket"], rel=1e-5)
    assert "makes no use of its context beyond 16 tokens: 0.0 % [0.0, 0.0]" in capsys.readouterr().out


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("control", [Ellipsis, (12, 5)])
def test_windows_one_by_one(
    tmp_path: Path, texts: str, bodies: list[list[int]], checkpoint: str, bos: bool, control: Any
) -> None:
    """Every token by itself, in the window that scores it."""
    window, stride = (16, 4) if control is Ellipsis else control
    model = load_model(checkpoint, scaling="yarn:4", device="cpu")
    name = save(model, tmp_path / "model", bos)
    flag = ["--control"] if control is Ellipsis else ["--control", f"window={window},stride={stride}"]
    rows = evaluate(tmp_path / "rows", "-m", name, "-d", texts, *ARGV, *flag, "--windows", "2")
    _, found = split(rows)
    sums = {length: 0.0 for length in (*LENGTHS, 0)}
    size = 40 - bos
    chosen = [body for body in bodies if len(body) >= size]
    documents = 0
    for body in chosen:
        count = min(2, len(body) // size)
        begins = np.linspace(0, len(body) - size, count).round().astype(int) if count > 1 else [0]
        for begin in begins:
            documents += 1
            part = body[begin : begin + size]
            for place in range(1 - bos, size):  # of the token within the part
                position = place + bos
                # The first window scores positions up to window - 1; each later one `stride` more.
                late = max(0, -(-(position - window + 1) // stride))
                ids = [0] * bos + part[late * stride : place + 1]
                inputs = torch.tensor([ids])
                targets = torch.tensor([[*ids[1:], -100]])
                loss = float(token_nll(model, inputs, targets).detach()[0, -2])
                end = next(length for length in LENGTHS if position < length)
                sums[end] += loss
    starts = dict(zip(LENGTHS, (0, *LENGTHS), strict=False))
    assert found and [row["length"] for row in found] == [n for n in LENGTHS if n > window]
    for row in found:
        length = row["length"]
        targets_of = (length - max(starts[length], 1)) * documents
        assert row["bucket_targets"] == targets_of
        assert math.log(row["perplexity_bucket"]) == pytest.approx(sums[length] / targets_of, rel=1e-6)


def test_windows_go_through_the_model_in_batches(
    checkpoint: str, texts: str, tmp_path: Path, forwards: list[Any]
) -> None:
    argv = ("-m", checkpoint, "-d", texts, "--lengths", "24,40", "--control", "--samples", "2")
    evaluate(tmp_path / "rows", *argv)
    assert forwards == [(2, 40), (1, 16), (6, 16), (1, 16), (6, 16)]
    forwards.clear()
    dynamic = evaluate(tmp_path / "dynamic", *argv, "--scaling", "dynamic-yarn")
    assert (6, 16) in forwards and len(split(dynamic)[1]) == 2  # one pass for all lengths, as its windows have one


def test_rows_resume_and_are_apart_from_each_other(
    checkpoint: str, texts: str, tmp_path: Path, forwards: list[Any]
) -> None:
    argv = ("-m", checkpoint, "-d", texts, *ARGV)
    plain = evaluate(tmp_path / "rows", *argv)
    both = evaluate(tmp_path / "rows", *argv, "--control")
    assert both[:3] == plain and len(both) == 5
    forwards.clear()
    assert evaluate(tmp_path / "rows", *argv, "--control") == both and not forwards
    more = evaluate(tmp_path / "rows", *argv, "--control", "window=12")
    assert more[:5] == both and {row["protocol"]["window"] for row in more[5:]} == {12} and len(more) == 8


def test_a_control_that_was_interrupted_goes_on(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forwards: list[Any]
) -> None:
    argv = ("-m", checkpoint, "-d", texts, *ARGV, "--control", "--batch-size", "1")
    expected = evaluate(tmp_path / "whole", *argv)
    counting, calls = perplexity_evaluator.token_nll, len(forwards)
    forwards.clear()

    def dying(*given: Any, **more: Any) -> torch.Tensor:
        if len(forwards) == calls // 2 + 2:
            raise KeyboardInterrupt
        return counting(*given, **more)

    monkeypatch.setattr(perplexity_evaluator, "token_nll", dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "rows", *argv)
    monkeypatch.setattr(perplexity_evaluator, "token_nll", counting)
    done = len(forwards)
    assert same(evaluate(tmp_path / "rows", *argv)) == same(expected)
    assert len(forwards) - done < calls - 4  # some documents of the control were known


def test_saved_losses_serve_the_control(checkpoint: str, texts: str, tmp_path: Path, forwards: list[Any]) -> None:
    argv = ("-m", checkpoint, "-d", texts, "--control", "--save-nll", str(tmp_path / "nll"), "--windows", "2")
    rows = evaluate(tmp_path / "rows", *argv, *ARGV)
    forwards.clear()
    assert same(evaluate(tmp_path / "again", *argv, *ARGV)) == same(rows) and not forwards


def test_sliding_windows_of_a_model_that_copies_from_a_stated_distance(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copies_from(monkeypatch, 20)
    argv = ("-m", checkpoint, "-d", texts, "--lengths", "16,24,40", "--sliding-window", "8", "--control")
    whole, control = split(evaluate(tmp_path / "rows", *argv))
    assert [row["length"] for row in whole] == [16, 24, 40] and [row["length"] for row in control] == [24, 40]
    for row in control:
        assert row["protocol"] == {"name": "last-tokens", "window": TRAINED, "stride": 4, "sliding": 8}
        assert math.log(row["perplexity"]) == pytest.approx(UNKNOWN)  # 20 tokens back is never in sight
    of = {row["length"]: row for row in whole}
    for row in control:
        same_windows = ("targets", "windows", "document_targets", "data")
        assert [row[name] for name in same_windows] == [of[row["length"]][name] for name in same_windows]
    # In windows of 40 all but the first 20 tokens of a document can be copied.
    counts = np.array(of[40]["document_targets"])
    copied = np.maximum(counts - 20, 0)
    assert of[40]["document_nats"] == pytest.approx(list((counts - copied) * UNKNOWN + copied * KNOWN))
    share = math.expm1(copied.sum() / counts.sum() * (KNOWN - UNKNOWN))
    printed = capsys.readouterr().out
    assert f"uses its context: −{-100 * share:.1f} % [" in printed
    assert "perplexity in windows of, after the last tokens only" in printed
    (section,) = load_results([str(tmp_path / "rows")]).of("perplexity")  # one table: each beside its control
    use = context_use(section, next(iter(section.rows)))
    assert use is not None and use.total is not None and use.total.share == pytest.approx(share)
    summary = summarize(load_results([str(tmp_path / "rows")]))
    assert summary is not None  # in which they stand for texts that were cut, where there are none
    assert summary.lines["uses what stands further back"][0].text == "yes"
    assert summary.lines["works to, by perplexity"][0].text == "40 tokens"
    assert perplexity_figure(section, "figure", {one: str(index) for index, one in enumerate(section.rows)}) is not None


def test_sliding_windows_of_one_document_have_an_interval_over_runs_of_them(
    checkpoint: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("-m", checkpoint, "-d", texts, "--samples", "1", "--lengths", "24", "--sliding-window", "8", "--control")
    whole, control = split(evaluate(tmp_path / "rows", *argv, "--save-nll", str(tmp_path / "nll")))
    for row in (*whole, *control):
        assert sum(row["block_nats"]) == pytest.approx(row["document_nats"][0])
        assert sum(row["block_targets"]) == row["document_targets"][0] and len(row["block_nats"]) == row["windows"]
    assert (
        whole[0]["block_targets"] == control[0]["block_targets"] and whole[0]["block_nats"] != control[0]["block_nats"]
    )
    assert " % [" in capsys.readouterr().out.splitlines()[-3]
    # The control of truncated windows reads the same windows, as long as they last.
    _, cut = split(evaluate(tmp_path / "cut", *argv[:6], "--lengths", "24", "--control"))
    assert cut[0]["bucket_nats"][0][0] == pytest.approx(control[0]["block_nats"][0], rel=1e-5)


def test_a_sliding_control_is_not_measured_again_and_its_losses_serve(
    checkpoint: str, texts: str, tmp_path: Path, forwards: list[Any]
) -> None:
    argv = ("-m", checkpoint, "-d", texts, "--lengths", "24,40", "--sliding-window", "8", "--control")
    more = ("--save-nll", str(tmp_path / "nll"))
    rows = evaluate(tmp_path / "rows", *argv, *more)
    forwards.clear()
    assert evaluate(tmp_path / "rows", *argv) == rows and not forwards
    assert same(evaluate(tmp_path / "again", *argv, *more)) == same(rows) and not forwards


def test_lengths_within_the_window_have_no_control(
    checkpoint: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = evaluate(tmp_path / "rows", "-m", checkpoint, "-d", texts, "--lengths", "8,16", "--control")
    assert split(rows)[1] == [] and "no length is beyond its 16 tokens" in capsys.readouterr().out


def test_refusals(checkpoint: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("-m", checkpoint, "-d", texts, *ARGV)
    with pytest.raises(ConfigError, match="--control window=x is not allowed"):
        evaluate(tmp_path / "rows", *argv, "--control", "window=x")
    rows = evaluate(tmp_path / "rows", *argv, "--control", "stride=20", code=1)  # the model decides what is too long
    assert len(rows) == 3 and "stride=20 is not allowed; 1 to 15, below the window" in capsys.readouterr().err
