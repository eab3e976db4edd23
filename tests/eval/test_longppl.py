"""eval/longppl.py: scripted models whose key tokens and LongPPL are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import eval.longppl as longppl
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation import perplexity_evaluator
from scaled_rope.results import Row, read_rows
from tests.helpers.number_texts import (
    TRAINED,
    bodies,  # noqa: F401
    checkpoint,  # noqa: F401
    forwards,  # noqa: F401
    new_model,
    other,  # noqa: F401
    same,
    save,
    texts,  # noqa: F401
)

LENGTHS = ("--lengths", "24,40")
DISTANCE = 20
"""Beyond the trained 16, so that the cut context never holds what is copied."""
LIKELY, UNLIKELY = 0.25, 3.0


def measure(output: Path, *argv: str, code: int = 0) -> list[Row]:
    assert longppl.main([*argv, "--device", "cpu", "--hide-progress", "--output", str(output)]) == code
    return read_rows(output) if output.exists() else []


def scripted(monkeypatch: pytest.MonkeyPatch, likely: dict[str, float]) -> None:
    """Script models: a token whose number is even costs little if the one `DISTANCE` before it is in sight.

    likely: the nats that it then costs, by the last part of the model's name; all others cost `UNLIKELY`.
    """

    def nll(model: Any, ids: torch.Tensor, targets: torch.Tensor, *, start: int, **more: Any) -> torch.Tensor:
        place = torch.arange(1, ids.shape[1] + 1)  # of the token that each position predicts; the BOS is at 0
        copied = (place - DISTANCE >= 1) & (targets % 2 == 0)
        return torch.where(copied, likely[Path(model.name_or_path).name], UNLIKELY)[:, start:]

    monkeypatch.setattr(perplexity_evaluator, "token_nll", nll)


def test_key_tokens_are_those_that_are_copied_from_far(
    checkpoint: str, other: str, texts: str, bodies: list[list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scripted(monkeypatch, {"random": LIKELY, "other": 1.0})
    picture = tmp_path / "gains.svg"
    rows = measure(
        tmp_path / "rows", "--evaluator", checkpoint, "-m", checkpoint, "-m", other, "-d", texts, *LENGTHS,
        "--figure", str(picture),
    )  # fmt: skip
    long = [body for body in bodies if len(body) >= 39]
    for row in rows:
        length = row["length"]
        # With the BOS at position 0, the token at position p is number p - 1 of the document.
        known = [sum(body[place - 1] % 2 == 0 for place in range(DISTANCE + 1, length)) for body in long]
        assert row["key_tokens"] == sum(known) > 0
        assert row["document_key_tokens"] == known
        assert row["tokens"] == len(long) * (length - TRAINED)
        assert row["longppl"] == pytest.approx(math.exp(LIKELY if row["model"].endswith("random") else 1.0))
        assert row["perplexity_of_others"] == pytest.approx(math.exp(UNLIKELY))
        assert row["interval"] == pytest.approx([row["longppl"]] * 2)  # every document has the same mean
        rule = {"name": "key-tokens", "window": TRAINED, "stride": TRAINED // 4, "gain": 2.0, "floor": -2.0}
        assert rule.items() <= row["protocol"].items()
        assert row["protocol"]["evaluator"] == "random, unscaled"
    assert [(Path(row["model"]).name, row["length"]) for row in rows] == [
        ("random", 24), ("random", 40), ("other", 24), ("other", 40),
    ]  # fmt: skip
    said = capsys.readouterr().out
    assert f"key tokens: {rows[1]['key_tokens']} of {rows[1]['tokens']} beyond 16 tokens" in said
    assert f"+{UNLIKELY - LIKELY:.1f} nats, document" in said
    assert "document 3" in picture.read_text()


@pytest.mark.parametrize(("flag", "value"), [("--key-gain", "2.75"), ("--key-floor", "-0.25")])
def test_a_token_at_a_bound_is_no_key_token(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, value: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The gain is 2.75 nats and the log-probability -0.25, exactly; both conditions are strict in the paper."""
    scripted(monkeypatch, {"random": LIKELY})
    argv = ("--evaluator", checkpoint, "-m", checkpoint, "-d", texts, *LENGTHS)
    rows = measure(tmp_path / "rows", *argv, flag, value)
    assert [(row["key_tokens"], row["longppl"]) for row in rows] == [(0, None)] * 2
    assert "no key tokens" in capsys.readouterr().out


def test_each_further_model_costs_one_pass_and_each_rerun_none(
    checkpoint: str, other: str, texts: str, tmp_path: Path, forwards: list[tuple[int, ...]]
) -> None:
    argv = ("--evaluator", checkpoint, "--evaluator-scaling", "yarn:4", "-d", texts, *LENGTHS, "--key-gain", "0.01")
    first = measure(tmp_path / "rows", *argv, "-m", checkpoint, "--scaling", "yarn:4")
    assert all(row["key_tokens"] > 0 for row in first)
    cost = list(forwards)
    assert [shape for shape in cost if shape[1] == 40] == [(3, 40)]  # its own losses serve both roles
    forwards.clear()
    rows = measure(tmp_path / "rows", *argv, "-m", checkpoint, "-m", other, "--scaling", "yarn:4")
    assert forwards == [(3, 40)] and same(rows[:2]) == same(first)
    forwards.clear()
    assert measure(tmp_path / "rows", *argv, "-m", other, "--scaling", "yarn:4") == rows and not forwards
    # Another choice of key tokens needs no pass either.
    changed = ("--key-gain", "0.5")
    assert len(measure(tmp_path / "rows", *argv, *changed, "-m", other, "--scaling", "yarn:4")) == 6
    assert not forwards


def test_losses_are_those_of_the_perplexity_script(checkpoint: str, texts: str, tmp_path: Path) -> None:
    """With every token a key token beyond the cut context, LongPPL and perplexity agree on the bucket there."""
    import eval.perplexity as perplexity

    kept = ("--save-nll", str(tmp_path / "losses"))
    argv = ("-d", texts, "--device", "cpu", "--hide-progress")
    perplexity.main(["-m", checkpoint, *argv, "--lengths", "16,40", "--output", str(tmp_path / "ppl"), *kept])
    bucket = read_rows(tmp_path / "ppl")[1]
    rows = measure(
        tmp_path / "rows", "--evaluator", checkpoint, "-m", checkpoint, "-d", texts, "--lengths", "40", *kept
    )
    key, others = rows[0]["document_nats"], rows[0]["perplexity_of_others"]
    tokens = rows[0]["tokens"] - rows[0]["key_tokens"]
    total = sum(key) + math.log(others) * tokens
    assert total / rows[0]["tokens"] == pytest.approx(math.log(bucket["perplexity_bucket"]), rel=1e-6)


def test_a_length_dependent_scaling(checkpoint: str, texts: str, tmp_path: Path) -> None:
    argv = ("--evaluator", checkpoint, "-m", checkpoint, "-d", texts, "--key-gain", "0.01")
    both = measure(tmp_path / "both", *argv, *LENGTHS, "--scaling", "dynamic-yarn")
    alone = measure(tmp_path / "alone", *argv, "--lengths", "24", "--scaling", "dynamic-yarn")
    assert both[0]["longppl"] == pytest.approx(alone[0]["longppl"], rel=1e-6)


def test_windows_of_the_tested_models_are_not_those_of_the_evaluator(checkpoint: str, texts: str) -> None:
    flags = ["--evaluator", checkpoint, "-m", checkpoint, "-d", texts, *LENGTHS]
    parse = longppl.build_parser().parse_args
    cut = parse([*flags, "--sliding-window-attention", "8"])
    (plain,) = longppl.model_jobs(parse(flags))
    (tested,) = longppl.model_jobs(cut)
    own = longppl.evaluator_arguments(cut)
    (judge,) = longppl.model_jobs(own)
    assert judge.fingerprint == plain.fingerprint != tested.fingerprint and own.sliding_window_attention is None


def test_another_tokenizer_is_refused(
    checkpoint: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = save(new_model(), tmp_path / "bare", bos=False)
    argv = ("--evaluator", checkpoint, "-d", texts, *LENGTHS)
    rows = measure(tmp_path / "rows", *argv, "-m", bare, "-m", checkpoint, code=1)
    assert {Path(row["model"]).name for row in rows} == {"random"}
    assert "bare reads other tokens than the evaluator random: another tokenizer or BOS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--lengths", "16,24"), "--lengths 16 is not allowed; above 16 tokens, the cut context (--key-window)"),
        (("--min-tokens", "8", "--max-tokens", "16"), "--max-tokens 16 is not allowed; above 16 tokens"),
        ((*LENGTHS, "--key-window", "24"), "--lengths 24 is not allowed; above 24"),
        ((*LENGTHS, "--key-window", "1"), "--key-window 1 is not allowed; at least 2"),
        ((*LENGTHS, "--key-stride", "16"), "--control stride=16 is not allowed"),
        ((*LENGTHS, "--key-gain", "0"), "--key-gain 0.0 is not allowed; above 0 nats"),
        ((*LENGTHS, "--key-gain", "nan"), "--key-gain nan is not allowed"),
        ((*LENGTHS, "--key-gain", "inf"), "--key-gain inf is not allowed; above 0 nats, at most 1e+06"),
        ((*LENGTHS, "--key-gain", "1e300"), "--key-gain 1e+300 is not allowed"),
        ((*LENGTHS, "--key-floor=-inf"), "--key-floor -inf is not allowed; below 0"),
        ((*LENGTHS, "--key-floor=-1e300"), "--key-floor -1e+300 is not allowed"),
        ((*LENGTHS, "--key-floor", "nan"), "--key-floor nan is not allowed"),
        ((*LENGTHS, "--key-floor", "1"), "--key-floor 1.0 is not allowed; below 0"),
        ((*LENGTHS, "--evaluator-scaling", "yam:2"), "yam"),
        ((*LENGTHS, "--figure", "gains.gif"), ".svg or .png"),
    ],
)
def test_refusals(checkpoint: str, texts: str, tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        measure(tmp_path / "rows", "--evaluator", checkpoint, "-m", checkpoint, "-d", texts, *argv)
    assert message in str(error.value)


def test_default_lengths_begin_beyond_the_cut_context(
    checkpoint: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {"random": LIKELY})
    argv = ("--evaluator", checkpoint, "-m", checkpoint, "-d", texts, "--min-tokens", "8", "--max-tokens", "32")
    assert [row["length"] for row in measure(tmp_path / "rows", *argv)] == [32]


def test_the_report_shows_them(
    checkpoint: str, other: str, texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import eval.report as report

    scripted(monkeypatch, {"random": LIKELY, "other": 1.0})
    argv = ("--evaluator", checkpoint, "-m", checkpoint, "-m", other, "-d", texts, *LENGTHS)
    rows = measure(tmp_path / "rows", *argv)
    assert report.main([str(tmp_path / "rows"), "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert "LongPPL, texts" in page and "key tokens chosen by random, unscaled" in page
    assert f"{math.exp(LIKELY):.2f}" in page and f"{math.e:.2f}" in page and str(rows[1]["key_tokens"]) in page
    damaged = {**rows[0], "longppl": "1.0"}
    (tmp_path / "damaged").write_text(json.dumps(damaged) + "\n" + json.dumps(rows[1]) + "\n")
    assert report.main([str(tmp_path / "damaged")]) == 0
