"""The search for YaRN's constants, on planted optima, and the command on a random model."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from scaled_rope import RopeScaling
from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.command_line import run_cli
from scaled_rope.evaluation.jobs import ModelLoader
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.results import read_rows
from scaled_rope.scaling.frequencies import rope_values
from scaled_rope.tuning import constants, measurement, search
from scaled_rope.tuning.measurement import Answers
from tests.helpers.models import Make
from tests.helpers.tuning import IDENTITY, start, sweep
from tests.tuning.test_search import arguments

HEAD_DIM = 64  # with L = 256, as in the embedded model
L = 256
Ask = Callable[[RopeScaling, PasskeyPrompt], tuple[float, bool]]


def distance(scaling: RopeScaling, best: tuple[float, float, float]) -> float:
    """How far a candidate is from planted constants, in squared octaves."""
    fast, slow, factor = constants.point_of(scaling)
    octaves = math.log2(fast / best[0]) ** 2 + math.log2(slow / best[1]) ** 2
    return octaves + (20 * (factor - best[2])) ** 2


def planted(best: tuple[float, float, float], scale: float = 0.01) -> Callable[..., npt.NDArray[Any]]:
    def score(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        text = 2 + np.sin(tokens[1:])  # differs between windows
        text[L - 1 :] += scale * distance(scaling, best)
        return np.asarray(text)

    return score


def answering(best: tuple[float, float, float], scale: float = 0.2) -> Ask:
    def ask(scaling: RopeScaling, prompt: PasskeyPrompt) -> tuple[float, bool]:
        nats = scale * distance(scaling, best) * (1 + prompt.key % 2)
        return 6 * nats, nats < 0.5

    return ask


PROMPTS = {
    length: [PasskeyPrompt([index] * (length - 6), [1] * 6, 100_000 + index, 0.5, length, 99) for index in range(8)]
    for length in (256, 2048)
}


def trials(path: Path, score: Any, ask: Ask | None, windows: int) -> constants.Trials:
    one = sweep(path, score, windows, L)
    refuse: Ask = answering((8, 1, 1))
    return constants.Trials(one, Answers(one.store, IDENTITY, ask or refuse), PROMPTS if ask else {})


def fit(path: Path, score: Any, ask: Ask | None, windows: int = 8) -> constants.Fitted:
    first = start(8, L)
    return constants.fit_constants(trials(path, score, ask, windows), first, constants.default_axes(first), HEAD_DIM)


# ---------------------------------------------------------------------------------------------------------- candidates


def test_candidates_are_computed_once_and_hold_the_paper_s_constants() -> None:
    first = start(8, L)
    axes = constants.default_axes(first)
    assert axes[2][0] == 0.9 and axes[2][-4] == round(first.static_attention_factor, 4) < axes[2][-1]
    candidates = constants.ramps(first, axes, HEAD_DIM)
    values = [tuple(rope_values(one, HEAD_DIM)[0]) for one in candidates]
    assert len(set(values)) == len(values) < len(axes[0]) * len(axes[1])
    assert candidates[0].ramp_bounds == (32, 1)
    # beta_fast 64 begins the ramp at the first pair, as 32 does here; the nearer to the paper stays.
    assert not any(one.ramp_bounds[0] == 64 for one in candidates)
    assert {one.ramp_bounds[0] for one in candidates} >= {4, 8, 16, 32}
    assert constants.make_candidate(first, 32, 1, round(first.static_attention_factor, 4)) == first


def test_neighbours_are_half_a_step_away() -> None:
    first = start(8, L)
    axes: constants.Axes = ((4, 8, 16), (0.5, 1), (1.0, 1.1, 1.2))
    found = constants.neighbours(first, axes, constants.make_candidate(first, 8, 0.5, 1.1))
    assert [constants.point_of(one) for one in found] == [
        (5.7, 0.5, 1.1),
        (11, 0.5, 1.1),
        (8, 0.71, 1.1),
        (8, 0.5, 1.05),
        (8, 0.5, 1.15),
    ]


# -------------------------------------------------------------------------------------------------- the search, planted


def test_planted_constants_are_found_and_each_is_measured_once(tmp_path: Path) -> None:
    best = (8.0, 0.5, 1.1)
    found = fit(tmp_path / "rows.jsonl", planted(best), answering(best))
    # Neighbouring values can be the same ramp, and half a step of the factor is 0.03.
    assert distance(found.scaling, best) < 0.5 and not found.paper_is_as_good
    assert found.finalists[0].scaling == start(8, L)
    rows = read_rows(tmp_path / "rows.jsonl")
    assert len({(json.dumps(row["scaling"]), row["data"]["fingerprint"]) for row in rows}) == len(rows)
    searched = {row["data"]["fingerprint"] for row in rows if row["scaling"] == found.screened[5].scaling.to_dict()}
    everything = {row["data"]["fingerprint"] for row in rows}
    assert len(searched) == 2 + 2 * 2 and len(everything) == 8 + 2 * 8  # a quarter of the windows and of the prompts
    assert len(found.best.beyond) == 6 and found.best.found()[2048][1] == 6  # judged on the others
    summary = constants.summarise_constants([found], 0, None)
    (one,) = summary["factors"]
    assert one["spec"] == found.scaling.to_spec() == one["best"]["spec"]
    assert RopeScaling.from_dict(one["scaling"]) == found.scaling == RopeScaling.from_config(one["rope_parameters"])
    assert 0 < one["paper"]["unscaled_pairs"] < one["best"]["unscaled_pairs"] < one["best"]["pairs"] == 32
    assert one["best"]["interpolated_pairs"] < one["paper"]["interpolated_pairs"]
    low, high = one["best"]["loss_above_paper"]["interval"]
    assert low <= one["best"]["loss_above_paper"]["value"] <= high < 0
    assert constants.verdict(one).startswith(f"x8: use {one['spec']}; against the paper's constants: loss beyond L −")
    ((header, lines),) = constants.constants_tables(summary)
    assert header[-2:] == ["at 256", "at 2048"] and lines[0][0] == "yarn:8"
    assert [line[0] for line in lines if line[0].endswith("*")] == [one["spec"] + "*"]
    assert constants.constants_remarks(summary) == []


def test_an_interrupted_search_continues(tmp_path: Path) -> None:
    best, calls = (8.0, 0.5, 1.1), 0
    score = planted(best)

    def dying(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 60:
            raise KeyboardInterrupt
        return score(*given)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut.jsonl", dying, None, windows=5)
    again = fit(tmp_path / "cut.jsonl", dying, None, windows=5)
    whole = fit(tmp_path / "whole.jsonl", score, None, windows=5)
    assert again.scaling == whole.scaling
    assert read_rows(tmp_path / "cut.jsonl") == read_rows(tmp_path / "whole.jsonl")


def test_the_paper_s_constants_are_kept_where_nothing_is_shown_to_be_better(tmp_path: Path) -> None:
    def noisy(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        seed = abs(hash((constants.point_of(scaling), int(tokens[0]), int(tokens[1]))))
        return np.full(len(tokens) - 1, 3 + np.random.default_rng(seed).normal(0, 0.02))

    found = fit(tmp_path / "rows.jsonl", noisy, lambda scaling, prompt: (0.6 * (1 + prompt.key % 3), True))
    assert found.paper_is_as_good and found.scaling == start(8, L)
    (one,) = constants.summarise_constants([found], 0, None)["factors"]
    assert one["spec"] == "yarn:8"
    said = constants.verdict(one)
    assert "within noise of the best" in said and said.endswith("keep yarn:8") or "nothing that was tried" in said

    best = (32.0, 1.0, start(8, L).static_attention_factor)
    found = fit(tmp_path / "best.jsonl", planted(best), answering(best))
    (one,) = constants.summarise_constants([found], 0, None)["factors"]
    assert found.best is found.paper
    assert constants.verdict(one) == "x8: nothing that was tried is better than the paper's constants; use yarn:8"


def result(spec: str, losses: list[float], probabilities: list[float]) -> constants.Result:
    answers = {512: [constants.Answer(one, one > 0.5) for one in probabilities]} if probabilities else {}
    scaling = RopeScaling.from_spec(spec, start(8, L))
    return constants.Result(scaling, np.asarray(losses), np.asarray(losses), answers)


def test_the_rule() -> None:
    """Retrieval decides who may win, and loss who does."""
    rng = np.random.default_rng(0)
    text = rng.normal(3, 0.3, 12)
    sure = list(0.9 + 0.05 * rng.random(12))
    paper = result("yarn:8", list(text), [0.4, *sure[1:]])
    forgets = result("yarn:8,beta_fast=4", list(text - 0.2), [0.1 * one for one in sure])
    near = result("yarn:8,beta_fast=8", list(text - 0.1 + rng.normal(0, 0.01, 12)), [sure[0] - 0.2, *sure[1:]])
    finds = result("yarn:8,beta_fast=16", list(text), sure)

    def outcome(*results: constants.Result) -> constants.Fitted:
        return constants.Fitted(start(8, L), ((), (), ()), HEAD_DIM, results, results)

    found = outcome(paper, forgets, near, finds)
    assert constants.retrieves(found.finalists) == [paper, near, finds]
    assert found.best is near and found.scaling == near.scaling and not found.paper_is_as_good
    # Retrieval that is shown to be worse is a reason to leave the paper's constants, even at the same loss.
    poor = result("yarn:8", list(text), [0.3 * one for one in sure])
    assert outcome(poor, finds).scaling == finds.scaling
    # Without retrieval, loss alone.
    silent = [result(one.scaling.to_spec(), list(one.beyond), []) for one in (paper, forgets, near)]
    assert outcome(*silent).best is silent[1]
    # Rounds pass on the best by either measure.
    assert constants.best_of([paper, forgets, near, finds], 2) == [forgets, finds]
    assert constants.best_of(silent, 2) == [silent[1], silent[2]]


def test_doubts_are_told(tmp_path: Path) -> None:
    best = (2.0, 0.0625, 0.9)
    found = fit(tmp_path / "rows.jsonl", planted(best), None, windows=5)
    reference = {"retrieval": 0.04, "right": 0, "prompts": 8, "used": False}
    summary = constants.summarise_constants([found], 0, reference)
    notes = constants.constants_remarks(summary)
    assert "retrieval is left out" in notes[0] and "0.04 (0 of 8 right)" in notes[0]
    assert "3 windows in the last round" in notes[1]
    assert [note.split(". ")[-1] for note in notes[2:]] == ["Widen --beta-fast", "Widen --beta-slow", "Widen --grid"]
    ((header, _),) = constants.constants_tables(summary)
    assert header[-1] == "ppl > L" and "retrieval" not in summary["factors"][0]["best"]


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def checkpoint(tiny_model: Make, tmp_path: Path) -> Path:
    """A random model of 128 positions with the embedded model's tokenizer."""
    folder = tmp_path / "model"
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Four documents of some 400 tokens."""
    rng = np.random.default_rng(0)
    words = ["house", "river", "evening", "letter", "walked", "spoke", "never", "again", "the", "of", "and", "a"]
    path = tmp_path / "texts.jsonl"
    lines = [" ".join(rng.choice(words, 400)) for _ in range(4)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


SMALL = ["--factors", "2", "--beta-fast", "4,16", "--beta-slow", "1", "--grid", "1,1.05", "--prompts", "3"]


def test_the_command_end_to_end(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--constants", "-m", checkpoint, "--dataset", texts, *SMALL, "--output", tmp_path / "out"]
    flags += ["--factors", "1.5,2"]
    assert search.run(arguments(*flags)) == 0
    told = capsys.readouterr()
    assert "windows: 4, documents: 4" in told.out and "ppl > L" in told.out and "\nx2: " in told.out
    assert "retrieval is left out: unscaled and within L the model gives" in told.err  # its weights are random
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["unscaled_within"]["used"] is False
    assert " --constants --factors 1.5,2 --grid 1,1.05 --beta-fast 4,16" in best["provenance"]["command"]
    _, one = best["factors"]
    assert RopeScaling.from_spec(one["spec"], start(2, 128)) == RopeScaling.from_dict(one["scaling"])
    assert (tmp_path / "out" / "constants-x2.png").read_bytes()[:4] == b"\x89PNG"
    rows = read_rows(tmp_path / "out" / "rows.jsonl")
    assert {row["metric"] for row in rows} == {"segment_nll", "answer_nll"}

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(measurement, "LEAST_FOUND", 0.0)
    assert search.run(arguments(*flags, "--json")) == 0  # now retrieval counts too
    printed = json.loads(capsys.readouterr().out)
    assert [list(one["paper"]["found"]) for one in printed["factors"]] == [["128", "192"], ["128", "256"]]
    assert 0 < printed["factors"][0]["paper"]["retrieval"] < 0.1
    with monkeypatch.context() as patched:
        patched.setattr(ModelLoader, "__call__", refuse)
        assert search.run(arguments(*flags, "--json")) == 0  # a finished search reads no weights
    assert {**json.loads(capsys.readouterr().out), "provenance": 0} == {**printed, "provenance": 0}


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--factors", "1"], "factors '1' is not allowed; with --constants above 1"),
        (["--factors", "1,2"], "with --constants above 1"),
        (["--prompts", "2"], "--prompts 2 is not allowed; 0, or at least 3"),
        (["--fields", "beta_fast=8"], "beta_slow are what the search sets"),
        (["--documents", "2"], "2 windows are not enough for --constants; at least 3"),
        (["--grid", "0"], "grid '0'"),
        (["--beta-slow", "x"], "beta-slow 'x'"),
        (
            ["--original-max-position-embeddings", "30"],
            "original_max_position_embeddings=30 is too short for hidden facts, which take at least ",
        ),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, texts: Path, tmp_path: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--constants", "-m", checkpoint, "--dataset", texts, *SMALL, "--output", tmp_path / "out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_cli(lambda: search.run(arguments(*usual, *flags))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and complaint in printed
    assert not (tmp_path / "out").exists()


def test_prompts_belong_to_the_search_for_constants(
    checkpoint: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(lambda: search.run(arguments("-m", checkpoint, "--dataset", texts, "--prompts", "4"))) == 2
    assert "--prompts 4 is not allowed without --constants" in capsys.readouterr().err
