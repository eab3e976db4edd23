"""`scaled-rope search` on a random model: files, words, resuming, refusals."""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from scaled_rope import RopeScaling, cli, compute_rope, patch_model
from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import ModelLoader
from scaled_rope.files import folder_lock
from scaled_rope.flags.search import add_search_arguments
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.loss import IGNORE, token_nll
from scaled_rope.results import read_rows
from scaled_rope.tuning import divisor_search, divisor_trials
from tests.helpers.models import Make

L, TARGET = 128, 256


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of some 400 tokens."""
    rng = np.random.default_rng(0)
    words = ["house", "river", "evening", "letter", "walked", "spoke", "never", "again", "the", "of", "and", "a"]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [" ".join(rng.choice(words, 400)) for _ in range(6)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def checkpoint(tiny_model: Make, tmp_path: Path) -> Path:
    """A random model of 128 positions with the embedded model's tokenizer."""
    folder = tmp_path / "small"
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=L).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def arguments(*argv: object) -> argparse.Namespace:
    parser = Parser("scaled-rope search")
    add_search_arguments(parser)
    return parser.parse_args([*map(str, argv), "--device", "cpu", "--hide-progress"])


_OTHERS = {"coordinate", "grid", "cma-es"}  # strategies that have no population


def usual(checkpoint: Path, texts: Path, output: Path, *more: object) -> list[object]:
    small: list[object] = ["--windows", 2, "--held-back", 2]
    small += [] if "perplexity" in more else ["--prompts", 1]
    small += ["--population", 5, "--mutants", 2, "--crossed", 2] if not set(more) & _OTHERS else []
    return [checkpoint, "--target", TARGET, "--dataset", texts, "--output", output, *small, "--evaluations", 9, *more]


def search(*argv: object) -> int:
    return divisor_search.run(arguments(*argv))


def test_the_command_end_to_end(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = usual(checkpoint, texts, tmp_path / "out", "--start", "yarn:2,beta_fast=8")
    assert search(*flags) == 0
    told = capsys.readouterr()
    assert "small, 128 to 256 tokens: 9 candidates of 3 passes" in told.out and "yarn:2,beta_fast=8 " in told.out
    assert "does not find what it is asked for under any scaling" in told.err  # its weights are random
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    head, *rows = read_rows(tmp_path / "out" / "trace.jsonl")
    assert head["notes"] == best["notes"] and f"warning: {head['notes'][0]}\n" == told.err[told.err.index("warning") :]
    assert len(rows) == best["evaluations"] == 9 and {"commit", "command", "seed"} <= set(head["provenance"])
    assert best["best"]["fitness"] == min(row["fitness"] for row in rows)
    assert len(best["starts"]) == 4 and best["tokens_per_evaluation"] == 3 * TARGET
    scaling = RopeScaling.from_dict(best["scaling"])
    assert scaling.method == "longrope" and scaling.factor == 2 and "yarn" not in str(best["yarn"])
    own = RopeScaling("default", original_max_position_embeddings=L)
    assert RopeScaling.from_spec(best["spec"], own) == scaling == RopeScaling.from_config(best["rope_parameters"])
    for name in ("divisors", "fitness"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    if best["best_start"] != best["best"]["origin"].get("name"):
        assert "on text and prompts that chose nothing:" in told.out
        assert best["held_back"]["loss_above_start"]["interval"][0] <= best["held_back"]["loss_above_start"]["value"]

    # A finished search reads no weights but for what judges the best, and ends the same.
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ModelLoader, "__call__", refuse)
    assert search(*flags, "--held-back", 0, "--json", "--evaluations", 9) == 0
    told = capsys.readouterr()
    again = json.loads(told.out)
    assert "does not find what it is asked for under any scaling" in told.err  # whenever the result is shown
    assert {**again, "held_back": 0, "provenance": 0} == {**best, "held_back": 0, "provenance": 0}


@pytest.mark.parametrize("within", ["unscaled", "same"])
def test_what_the_words_of_yarn_are_the_same_as(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], within: str
) -> None:
    """YaRN has one table, so beside a record that leaves texts up to L alone it is the same beyond L only."""
    flags = ["--strategy", "grid", "--fitness", "perplexity", "--evaluations", 9, "--within", within]
    assert search(*usual(checkpoint, texts, tmp_path / "out", *flags)) == 0
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    own = RopeScaling("default", original_max_position_embeddings=L)
    scaling, yarn = RopeScaling.from_dict(best["scaling"]), RopeScaling.from_spec(best["yarn"], own)
    for length, equal in ((TARGET, True), (L, within == "same")):
        one, other = (compute_rope(each, 16, length)[0] for each in (scaling, yarn))
        assert torch.allclose(one, other, rtol=1e-5, atol=0) == equal
    note = "the same" if within == "same" else "the same beyond L; texts up to L are scaled too"
    assert f"\nin YaRN's words ({note}): {best['yarn']}\n" in capsys.readouterr().out
    assert best["yarn_note"] == (None if within == "same" else note)


def test_the_spec_says_a_corrected_length(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    more = ["--original-max-position-embeddings", 64, "--fitness", "perplexity", "--hide-progress"]
    assert search(*usual(checkpoint, texts, tmp_path / "out", *more)) == 0
    found = json.loads((tmp_path / "out" / "best.json").read_text())
    base = RopeScaling("default", original_max_position_embeddings=L)
    scaling = RopeScaling.from_spec(found["spec"], base)
    assert scaling.original_max_position_embeddings == 64 and scaling.to_dict() == found["scaling"]


def test_the_console_script_searches_by_perplexity_alone(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """It checks the flags and so does the command: what they leave out stays left out."""
    argv = usual(checkpoint, texts, tmp_path / "out", "--fitness", "perplexity", "--evaluations", 1)
    assert cli.main(["search", *map(str, argv), "--device", "cpu", "--hide-progress"]) == 0
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    assert best["passes_per_evaluation"] == 2 and best["best"]["needles"] is None  # windows and no prompts


def test_too_little_text_to_judge_by_is_said(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = usual(checkpoint, texts, tmp_path / "out", "--held-back", 50, "--fitness", "perplexity")
    assert search(*flags) == 0
    assert re.search(r"warning: --held-back 50: \d+ windows are left to judge the best by", capsys.readouterr().err)


def test_the_saved_record_gives_the_fitness_that_the_trace_says(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    """A model loaded afresh, patched with the record of best.json, and scored without the search's own code."""
    more = ["--fitness", "perplexity", "--windows", 2, "--held-back", 0, "--evaluations", 7, "--seed", 3]
    assert search(*usual(checkpoint, texts, tmp_path / "out", *more)) == 0
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    args = arguments(*usual(checkpoint, texts, tmp_path / "out", *more))
    job = divisor_search.model_jobs(divisor_search.loading_arguments(args))[0]
    windows = divisor_search._read_texts(args, job, divisor_search._space(args, job)).search.windows
    model = load_model(str(checkpoint), dtype="float32", device=torch.device("cpu"))
    patch_model(model, RopeScaling.from_dict(best["scaling"]))
    losses = []
    for window in windows:
        ids = torch.from_numpy(window.tokens)[None]
        targets = torch.full_like(ids, IGNORE)
        targets[:, :-1] = ids[:, 1:]
        with torch.no_grad():
            logits = model(ids).logits[0, L - 1 : -1].double()
        losses.append(float(torch.nn.functional.cross_entropy(logits, ids[0, L:])))
        with torch.inference_mode():
            assert token_nll(model, ids, targets)[0, L - 1 : -1].mean() == pytest.approx(losses[-1], rel=1e-5)
    # float32 losses of a few nats, summed in another order
    assert np.mean(losses) == pytest.approx(best["best"]["fitness"], rel=1e-5)
    rows = read_rows(tmp_path / "out" / "trace.jsonl")[1:]
    assert best["best"]["fitness"] == min(row["fitness"] for row in rows)
    assert len({row["fitness"] for row in rows}) > 3  # the scalings do make a difference


@pytest.mark.parametrize("strategy", ["evolution", "coordinate", "grid", "cma-es"])
def test_an_interrupted_command_continues(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    if strategy == "cma-es":
        pytest.importorskip("cmaes")
    more = ["--strategy", strategy, "--prompts", 0, "--fitness", "perplexity", "--evaluations", 12]
    assert search(*usual(checkpoint, texts, tmp_path / "whole", *more)) == 0
    real, calls = divisor_trials.append_row, 0

    def dying(*given: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(divisor_trials, "append_row", dying)
    with pytest.raises(KeyboardInterrupt):
        search(*usual(checkpoint, texts, tmp_path / "cut", *more))
    assert len(read_rows(tmp_path / "cut" / "trace.jsonl")) == 6
    assert search(*usual(checkpoint, texts, tmp_path / "cut", *more)) == 0
    whole, cut = (json.loads((tmp_path / name / "best.json").read_text()) for name in ("whole", "cut"))
    assert {**whole, "provenance": 0} == {**cut, "provenance": 0}
    rows = [read_rows(tmp_path / name / "trace.jsonl")[1:] for name in ("whole", "cut")]
    for one, other in zip(*rows, strict=True):
        assert [one[name] for name in ("scaling", "fitness", "origin")] == [
            other[name] for name in ("scaling", "fitness", "origin")
        ]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--target", 128], "--target 128 is not allowed; small reads 128 tokens as it is, so more than 128"),
        (["--target", 4096], "only 0 of 6 documents have 4096 tokens"),
        (["--evaluations", 0], "--evaluations 0 is not allowed; at least 1"),
        (["--windows", 0], "--windows 0 is not allowed with --fitness both"),
        (["--prompts", 0], "--prompts 0 is not allowed with --fitness both"),
        (["--windows", 99], "--windows asks for 99"),
        (["--population", 2], "--population 2 is not allowed; at least 3, what the search begins with"),
        (["--mutation-rate", 0], "--mutation-rate 0 is not allowed"),
        (["--strategy", "grid", "--evaluations", 5], "--evaluations 5 is not allowed with --strategy grid; at least 9"),
        (["--strategy", "annealing"], "unknown strategy 'annealing'"),
        (["--fitness", "loss"], "unknown fitness 'loss'"),
        (["--within", "L"], "unknown within 'L'"),
        (["--attention-factor", "yarn"], "--attention-factor yarn is not allowed; longrope, search or a number"),
        (["--start", "dynamic-yarn"], "--start dynamic-yarn is not allowed; a static scaling of frequencies"),
        (["--start", "yan:2"], "unknown method 'yan'"),
        (
            ["--strategy", "grid", "--start", "yarn:2"],
            "--start is not allowed with --strategy grid: it is for evolution",
        ),
        (["--strategy", "cma-es", "--mutation-rate", 0.5], "--mutation-rate is not allowed with --strategy cma-es"),
        (["--strategy", "grid", "--population", 9], "--population is not allowed with --strategy grid"),
        (["--fitness", "perplexity", "--prompts", 9], "--prompts 9 is not allowed with --fitness perplexity"),
        (["--original-max-position-embeddings", 300], "so more than 300"),
        (
            ["--original-max-position-embeddings", 32],
            "original_max_position_embeddings=32 is too short for hidden facts, which take at least ",
        ),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    flags: list[object],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_cli(lambda: search(*usual(checkpoint, texts, tmp_path / "out", *flags))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and complaint in printed
    assert not (tmp_path / "out").exists()


def test_a_second_run_on_the_folder_is_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with folder_lock(out):
        assert run_cli(lambda: search(*usual(checkpoint, texts, out, "--fitness", "perplexity"))) == 2
        said = f"error: --output {out} is being written by another run, process {os.getpid()} on "
        printed = capsys.readouterr().err
        assert printed.startswith(said) and printed.endswith("; choose another --output\n")
        assert [path.name for path in out.iterdir()] == [".lock"]


def test_fewer_evaluations_keep_the_best_of_all_that_are_there(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--fitness", "perplexity", "--held-back", 0]
    flags = usual(checkpoint, texts, tmp_path / "out", *quick)
    assert search(*flags, "--evaluations", 1) == 0  # the first is PI
    assert "\nnothing but divisors of linear:2 was tried; more --evaluations try others\n" in capsys.readouterr().out
    assert search(*flags) == 0
    best = json.loads((tmp_path / "out" / "best.json").read_text())
    for fewer in (["--evaluations", 1], ["--evaluations", 9, "--rounds", 0]):
        capsys.readouterr()
        assert search(*flags, *fewer) == 0
        told = capsys.readouterr()
        assert f"note: {tmp_path / 'out'} keeps 9 evaluations, " in told.err and "9 candidates of 2 passes" in told.out
        again = json.loads((tmp_path / "out" / "best.json").read_text())
        assert {**again, "provenance": 0} == {**best, "provenance": 0}


def test_another_search_in_the_folder_is_refused(checkpoint: Path, texts: Path, tmp_path: Path) -> None:
    quick = ["--fitness", "perplexity", "--evaluations", 3, "--held-back", 0]
    assert search(*usual(checkpoint, texts, tmp_path / "out", *quick)) == 0
    for flags, complaint in (
        (["--seed", 1], "holds another search, with seed 0 and not 1"),
        (["--strategy", "coordinate"], 'with strategy "evolution" and not "coordinate"'),
        (["--target", 200], "with target 256 and not 200"),
        (["--windows", 1], "with text "),
        (["--attention-factor", "1.1"], 'with attention_factor "longrope" and not "1.1"'),
        (["--mutants", 3], "with mutants 2 and not 3"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            search(*usual(checkpoint, texts, tmp_path / "out", *quick, *flags))


def test_a_model_without_rope_is_refused(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=TARGET, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = usual(tmp_path / "model", texts, tmp_path / "out", "--original-max-position-embeddings", L)
    capsys.readouterr()
    assert run_cli(lambda: search(*flags)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "rotary" in printed
    assert not (tmp_path / "out").exists()


def test_a_model_s_own_scaling_is_replaced(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {**config["rope_parameters"], "rope_type": "linear", "factor": 2.0}
    config["max_position_embeddings"] = L
    path.write_text(json.dumps(config))
    quick = ["--fitness", "perplexity", "--evaluations", 3, "--original-max-position-embeddings", L]
    assert search(*usual(checkpoint, texts, tmp_path / "out", *quick)) == 0
    assert "the checkpoint's own scaling, linear x2, is replaced by each that is tried" in capsys.readouterr().err
    rows = read_rows(tmp_path / "out" / "trace.jsonl")[1:]
    assert rows[0]["scaling"]["params"]["long_factor"] == [2.0] * len(rows[0]["scaling"]["params"]["long_factor"])
