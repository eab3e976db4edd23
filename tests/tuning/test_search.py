"""The search for √(1/t) on planted optima, and the command on a random model."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from scaled_rope import RopeScaling, patch_model
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import ModelLoader
from scaled_rope.flags.search import add_tune_arguments, parse_grid
from scaled_rope.provenance import portable
from scaled_rope.results import Row, read_rows
from scaled_rope.tuning import search
from scaled_rope.tuning.measurement import Score
from tests.helpers.models import Make
from tests.helpers.tuning import GRID, LENGTH, start, sweep

# ------------------------------------------------------------------------------------------------- the search, planted


def planted(scaling: RopeScaling, tokens: npt.NDArray[Any], a: float = 0.08) -> npt.NDArray[Any]:
    """Losses of tokens 1 … n-1 that are least at √(1/t) = a·ln s + 1, beta_fast 16 and beta_slow 2."""
    assert scaling.attention_factor is not None
    fast, slow = scaling.ramp_bounds
    text = 2 + np.sin(tokens[1:])  # differs between windows and positions
    miss = (scaling.attention_factor - a * math.log(scaling.factor) - 1) ** 2
    ramp = 0.01 * (math.log2(fast / 16) ** 2 + (slow - 2) ** 2)
    return np.asarray(text + 5 * miss + ramp)


def test_a_planted_optimum_is_recovered(tmp_path: Path) -> None:
    one = sweep(tmp_path / "rows.jsonl", planted)
    tuned = [search.tune_factor(one, start(factor), GRID) for factor in (2, 4, 8)]
    for found in tuned:
        # Segment sums are rounded to 1e-4 nats, 3e-6 a token, against a curvature of 5.
        assert found.minimum.x == pytest.approx(0.08 * math.log(found.factor) + 1, abs=1e-3)
        assert found.minimum.edge is None and found.scaling.attention_factor == round(found.minimum.x, 4)
        assert found.means.shape == (11, 6, found.factor) and found.ramps == ()
    summary = search.summarise(tuned, seed=0)
    fit = summary["fit"]
    assert fit["a"] == pytest.approx(0.08, abs=1e-3) and fit["residual"] < 1e-3
    low, high = fit["interval"]
    assert low <= fit["a"] <= high < low + 1e-3
    assert fit["spec"] == f"yarn:FACTOR,mscale={round(fit['mscale'], 4)}"
    # The suggested spec does give the fitted line.
    own = RopeScaling("default", original_max_position_embeddings=LENGTH)
    carried_over = RopeScaling.from_spec(fit["spec"].replace("FACTOR", "16"), own)
    assert carried_over.mscale == pytest.approx(0.8, abs=0.01)
    assert search.remarks(summary) == []
    # Perplexity over all targets, of which the first segment has one less.
    text = np.mean([(2 + np.sin(window.tokens[1 : 4 * LENGTH])).mean() for window in one.windows])
    assert math.log(summary["factors"][1]["perplexity"]) == pytest.approx(text + 0.01 * (1 + 1), abs=1e-5)


def test_windows_that_disagree_give_an_interval(tmp_path: Path) -> None:
    """Windows whose optima are spread by ±0.05 around 1.2: the interval is that of their mean."""
    rng = np.random.default_rng(1)
    optima = {seed: 1.2 + shift for seed, shift in enumerate(rng.normal(0, 0.05, 40))}
    one = sweep(tmp_path / "rows.jsonl", planted, windows=40)
    numbers = {window.tokens[:10].tobytes(): index for index, window in enumerate(one.windows)}

    def score(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        assert scaling.attention_factor is not None
        miss = scaling.attention_factor - optima[numbers[tokens[:10].tobytes()]]
        return np.full(len(tokens) - 1, 2 + miss**2)

    one.score = score
    (found,) = search.summarise([search.tune_factor(one, start(2), GRID)], seed=0)["factors"]
    mean, error = np.mean(list(optima.values())), np.std(list(optima.values())) / math.sqrt(40)
    assert found["attention_factor"] == pytest.approx(mean, abs=1e-3)
    low, high = found["interval"]
    # 90 % of a normal distribution; 1000 draws know a quantile to about a tenth of a standard error.
    assert (mean - low) / error == pytest.approx(1.64, abs=0.3) and (high - mean) / error == pytest.approx(
        1.64, abs=0.3
    )
    assert search.summarise([search.tune_factor(one, start(2), GRID)], seed=0)["factors"] == [found]


def test_the_ramp_is_searched_and_the_attention_factor_again(tmp_path: Path) -> None:
    scored: list[RopeScaling] = []

    def score(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        scored.append(scaling)
        # The better ramp has its optimum elsewhere, which only a second look at √(1/t) can find.
        return planted(scaling, tokens, a=0.08 if scaling.ramp_bounds == (32, 1) else 0.1)

    one = sweep(tmp_path / "rows.jsonl", score, windows=2)
    pairs = [(fast, slow) for fast in (16.0, 32.0, 64.0) for slow in (1.0, 2.0)]
    found = search.tune_factor(one, start(8), GRID, pairs)
    assert found.scaling.ramp_bounds == (16, 2)
    assert found.minimum.x == pytest.approx(0.1 * math.log(8) + 1, abs=1e-3)
    assert len(found.ramps) == 6 and min(found.ramps, key=lambda ramp: ramp[2])[:2] == (16, 2)
    # The grid twice, each other pair once, none of it repeated.
    assert len(scored) == 2 * (11 + 5 + 10)
    notes = search.remarks(search.summarise([found], seed=0))
    assert [note.split(" is ")[0] for note in notes] == ["x8: beta_fast 16", "x8: beta_slow 2"]  # edges of their grids
    assert found.scaling == RopeScaling.from_spec(found.scaling.to_spec(), start(1))


def test_edges_and_other_doubts_are_told(tmp_path: Path) -> None:
    one = sweep(tmp_path / "rows.jsonl", planted, windows=1)
    grid = parse_grid("1.1:1.5:0.1")
    summary = search.summarise([search.tune_factor(one, start(factor), grid) for factor in (2, 8)], seed=0)
    low, inside = summary["factors"]
    assert (low["edge"], low["attention_factor"]) == ("lower", 1.1) and inside["edge"] is None
    assert summary["fit"]["factors"] == [8]  # a bound is no data point
    assert low["interval"] is None and summary["fit"]["interval"] is None
    notes = " ".join(search.remarks(summary))
    assert "x2: the lowest point is the grid's lower edge, 1.1" in notes and "one window" in notes and "x8" not in notes
    assert "1.100*" in search.report(summary)

    def falling(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return planted(scaling, tokens, a=-0.05)

    one = sweep(tmp_path / "falling.jsonl", falling)
    summary = search.summarise([search.tune_factor(one, start(4), parse_grid("0.7:1.2:0.1"))], seed=0)
    assert summary["fit"]["a"] == pytest.approx(-0.05, abs=1e-3) and summary["fit"]["spec"] is None
    assert any("mscale cannot express" in note for note in search.remarks(summary))


def test_an_interval_that_reaches_the_edge_is_told_and_a_stray_sample_is_not() -> None:
    # A 90 % interval leaves out 5 % on either side.
    for share, told in ((0.0, False), (0.04, False), (0.06, True)):
        one = {"factor": 2.0, "edge": None, "edge_share": share, "ramps": []}
        notes = search.remarks({"factors": [one], "windows": 4, "fit": None})
        assert any("minimum at an edge" in note for note in notes) == told


def test_a_model_with_another_temperature_at_s_1_is_told(tmp_path: Path) -> None:
    def score(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        assert scaling.attention_factor is not None
        miss = scaling.attention_factor - (0.1 * math.log(scaling.factor) + 0.88)
        return np.full(len(tokens) - 1, 2 + miss**2)

    one, grid = sweep(tmp_path / "rows.jsonl", score, windows=2), parse_grid("0.8:1.2:0.05")
    summary = search.summarise([search.tune_factor(one, start(factor), grid) for factor in (1, 2, 4, 8)], seed=0)
    free = summary["fit"]["free"]
    assert (free["a"], free["intercept"]) == (pytest.approx(0.1, abs=1e-3), pytest.approx(0.88, abs=1e-3))
    (note,) = search.remarks(summary)
    assert "one through 0.880" in note and "not mscale" in note
    assert "with a free intercept: 0.1000·ln s + 0.8800" in search.report(summary)


def test_losses_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    one = sweep(tmp_path / "rows.jsonl", lambda scaling, tokens: np.full(len(tokens) - 1, np.inf))
    with pytest.raises(ConfigError, match=r"dtype 'float32': yarn x2 \(attention_factor=1\).*not finite"):
        search.tune_factor(one, start(2), GRID)
    assert not (tmp_path / "rows.jsonl").exists()


def test_an_interrupted_search_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    calls = 0

    def dying(scaling: RopeScaling, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        nonlocal calls
        calls += 1
        if calls == 17:
            raise KeyboardInterrupt
        return planted(scaling, tokens)

    def summary(path: Path, score: Score) -> Row:
        one = sweep(path, score, windows=3)
        return search.summarise([search.tune_factor(one, start(factor), GRID) for factor in (2, 4)], seed=0)

    whole = summary(tmp_path / "whole.jsonl", planted)
    with pytest.raises(KeyboardInterrupt):
        summary(tmp_path / "cut.jsonl", dying)
    assert len(read_rows(tmp_path / "cut.jsonl")) == 16
    with open(tmp_path / "cut.jsonl", "a") as file:
        file.write('{"metric": "segm')  # a row that the end of the process tore
    assert summary(tmp_path / "cut.jsonl", dying) == whole
    assert read_rows(tmp_path / "cut.jsonl") == read_rows(tmp_path / "whole.jsonl")
    assert calls == 17 + (2 * 3 * 11 - 16)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def checkpoint(tiny_model: Make, tmp_path: Path) -> Path:
    """A random model of 32 positions on disk, with a tokenizer that knows the words w1 … w59; BOS is 0."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, 60)}, "?": 60}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Two documents of 150 tokens and one that is too short."""
    rng = np.random.default_rng(0)
    path = tmp_path / "texts.jsonl"
    lines = [" ".join(f"w{i}" for i in rng.integers(1, 60, count)) for count in (150, 20, 150)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def arguments(*argv: object) -> argparse.Namespace:
    parser = Parser("scaled-rope tune")
    add_tune_arguments(parser)
    return parser.parse_args([*map(str, argv), "--device", "cpu", "--hide-progress"])


def test_the_command_end_to_end(
    tiny_model: Make, checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["-m", checkpoint, "--dataset", texts, "--factors", "1,2,4", "--grid", "0.8,1,1.25,1.5", "--output", out]
    assert search.run(arguments(*flags)) == 0
    printed = capsys.readouterr().out
    assert "windows: 2, documents: 2" in printed and "yarn:4,attention_factor=" in printed

    rows = read_rows(out / "rows.jsonl")
    assert len(rows) == 3 * 4 * 2 and {row["document"] for row in rows} == {0, 2}
    documents = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    for row in rows:  # every row is what the textbook says
        scaling = RopeScaling.from_dict(row["scaling"])
        model = tiny_model()
        patch_model(model, scaling)
        words = [0, *(int(word[1:]) for word in documents[row["document"]].split())][: row["length"]]
        ids = torch.tensor([words])
        nll = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        expected = [float(nll[max(i - 1, 0) : i + LENGTH - 1].detach().sum()) for i in range(0, len(words), LENGTH)]
        assert row["targets"] == [31, 32, 32, 32][: len(expected)]
        assert row["nll"] == pytest.approx(expected, abs=2e-3)  # float32 sums of 32 losses, another order of operations
        assert row["provenance"]["command"].startswith(f"scaled-rope tune --model {portable(checkpoint)}")

    best = json.loads((out / "best.json").read_text())
    own = RopeScaling.from_config(tiny_model().config)
    assert [one["factor"] for one in best["factors"]] == [1, 2, 4]
    for one in best["factors"]:
        scaling = RopeScaling.from_dict(one["scaling"])
        assert scaling == RopeScaling.from_spec(one["spec"], own)
        assert scaling == RopeScaling.from_config(one["rope_parameters"])
        assert scaling.attention_factor == pytest.approx(one["attention_factor"], abs=1e-4)
        for kind in ("perplexity", "segments", "histogram"):
            assert (out / f"{kind}-x{one['factor']:g}.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "fit.png").exists() == (best["fit"] is not None)


def test_the_slope_of_a_temperature(
    tiny_model: Make, checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["-m", checkpoint, "--dataset", texts, "--slope", "drope", "--factors", "2,4", "--grid", "0,0.2,0.4"]
    assert search.run(arguments(*flags, "--output", out)) == 0
    assert "slope of attention_temperature=constant for all factors" in capsys.readouterr().out
    rows, best = read_rows(out / "rows.jsonl"), json.loads((out / "best.json").read_text())
    assert len(rows) == 2 * 3 * 2 and len(best["factors"]) == 2
    losses = {(row["scaling"]["factor"], row["scaling"]["temperature_slope"], row["document"]): row for row in rows}
    row = losses[4.0, 0.4, 0]
    model, multiplied = tiny_model(), tiny_model()
    patch_model(model, "drope:4,attention_temperature=constant,temperature_slope=0.4")
    patch_model(multiplied, "drope:4")
    for layer in multiplied.model.layers:  # type: ignore[union-attr]
        layer.self_attn.q_proj.weight.data *= 1 + 0.4 * math.log(4)
    words = [0, *(int(word[1:]) for word in json.loads(texts.read_text().splitlines()[0])["text"].split())][:128]
    ids = torch.tensor([words])
    nll = [
        F.cross_entropy(each(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item() for each in (model, multiplied)
    ]
    assert nll[0] == pytest.approx(nll[1], abs=2e-3) and sum(row["nll"]) == pytest.approx(nll[1], abs=8e-3)


def test_factor_one_with_attention_factor_one_is_the_model_itself(
    tiny_model: Make, checkpoint: Path, texts: Path, tmp_path: Path
) -> None:
    flags = ["-m", checkpoint, "--dataset", texts, "--documents", 1, "--factors", 1, "--grid", "1,1.5,2"]
    assert search.run(arguments(*flags, "--output", tmp_path / "out")) == 0
    words = [0, *(int(word[1:]) for word in json.loads(texts.read_text().splitlines()[0])["text"].split())][:LENGTH]
    ids = torch.tensor([words])
    untouched = float(tiny_model()(ids, labels=ids).loss.detach()) * 31
    found = {row["scaling"]["attention_factor"]: row["nll"] for row in read_rows(tmp_path / "out" / "rows.jsonl")}
    assert found[1.0] == pytest.approx([untouched], abs=2e-3)
    assert abs(found[2.0][0] - untouched) > 0.1  # the comparison would notice


def test_a_finished_search_reads_no_weights(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["-m", checkpoint, "--dataset", texts, "--factors", "2", "--grid", "0.9,1.1,1.3"]
    flags += ["--beta-fast", "16,32", "--output", tmp_path / "out", "--json"]
    assert search.run(arguments(*flags)) == 0
    first, rows = json.loads(capsys.readouterr().out), read_rows(tmp_path / "out" / "rows.jsonl")

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    with monkeypatch.context() as patched:
        patched.setattr(ModelLoader, "__call__", refuse)
        assert search.run(arguments(*flags)) == 0
        assert read_rows(tmp_path / "out" / "rows.jsonl") == rows
        again = json.loads(capsys.readouterr().out)
        assert {**again, "provenance": None} == {**first, "provenance": None}
        with pytest.raises(AssertionError, match="weights were read"):  # but another grid point is measured
            search.run(arguments(*flags, "--grid", "0.9,1.1,1.3,1.5"))
    assert {row["scaling"].get("beta_fast") for row in rows} >= {None, 16.0}
    assert len(first["factors"][0]["ramps"]) == 2


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--grid", "1:2"], "START:END:STEP"),
        (["--temperature", "log"], "not allowed without --slope"),
        (["--slope", "drope", "--constants"], "--constants is not allowed with --slope"),
        (["--slope", "drop"], "unknown method 'drop'"),
        (["--slope", "default"], "factor=2.0: not for method 'default'"),
        (["--slope", "drope", "--temperature", "logs"], "unknown attention_temperature 'logs'"),
        (["--slope", "drope", "--factors", "1"], "above 1, where a temperature acts"),
        (["--slope", "dynamic-ntk", "--temperature", "log"], "no window would be longer than the original length, 32"),
        (["--slope", "drope", "--factors", "1.001"], "--slope drope is not allowed with factor 1.001; no window would"),
        (["--slope", "drope", "--fields", "temperature_slope=2"], "are what the search sets"),
        (["--grid", "1,1.1"], "at least 3"),
        (["--factors", "0.5"], "factor=0.5"),
        (["--factors", "two"], "factors 'two'"),
        (["--factors", "64"], "only 0 of 3 documents have 2048 tokens"),
        (["--documents", "3"], "--documents asks for 3"),
        (["--documents", "0"], "documents 0"),
        (["--windows", "0"], "windows 0"),
        (["--seed", "-1"], "seed -1"),
        (["--fields", "attention_factor=1"], "the search sets"),
        (["--fields", "no_such=1"], "no_such"),
        (["--beta-fast", "1", "--beta-slow", "2"], "beta_fast=1"),
        (["--beta-fast", "x"], "beta-fast 'x'"),
        (["--dtype", "float17"], "float17"),
        (["--model", "/no/such/model"], "does not exist"),
        (["--dataset", "/no/such.txt"], "does not exist"),
        (["--feature", "body"], "body"),
        (["--original-max-position-embeddings", "1"], "at least 2"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, texts: Path, tmp_path: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["-m", checkpoint, "--dataset", texts, "--factors", "2", "--output", tmp_path / "out"]
    assert run_cli(lambda: search.run(arguments(*usual, *flags))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and complaint in printed
    assert not (tmp_path / "out").exists()


def test_a_dataset_is_needed(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="--dataset"):
        search.run(arguments("-m", checkpoint))
