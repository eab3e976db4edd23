"""`scaled-rope advise` on a random model: files, words, reruns, refusals."""

from __future__ import annotations

import argparse
import html
import json
import re
import shlex
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scaled_rope import RopeScaling
from scaled_rope.advice import command, probing
from scaled_rope.advice.candidates import Candidate, short_list
from scaled_rope.checkpoint import DEFAULT_MODEL, load_tokenizer
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import ModelLoader
from scaled_rope.files import folder_lock
from scaled_rope.flags.search import add_advise_arguments
from scaled_rope.recipes.files import read_recipe
from scaled_rope.report.tables import load_results
from scaled_rope.results import read_rows
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.tuning import measurement
from tests.helpers.models import Make


@pytest.fixture
def checkpoint(tiny_model: Make, tmp_path: Path) -> Path:
    """A random model of 128 positions with the embedded model's tokenizer."""
    folder = tmp_path / "tiny <b>model"
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of some 400 tokens."""
    rng = np.random.default_rng(0)
    words = ["house", "river", "evening", "letter", "walked", "spoke", "never", "again", "the", "of", "and", "a"]
    path = tmp_path_factory.mktemp("texts") / "a & b<script>.jsonl"
    lines = [" ".join(rng.choice(words, 400)) for _ in range(6)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def arguments(*argv: object) -> argparse.Namespace:
    parser = Parser("scaled-rope advise")
    add_advise_arguments(parser)
    return parser.parse_args([*map(str, argv), "--device", "cpu", "--hide-progress"])


class Ticking:
    """A clock that goes on by a fixed time whenever it is asked."""

    def __init__(self, seconds: float) -> None:
        self.now, self.step = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_the_command_end_to_end(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = [checkpoint, "--target", 256, "--dataset", texts, "--minutes", 1, "--output", out]
    for spec in ("yarn:2", "linear:2", "rerope,window=64", "dynamic-ntk"):
        flags += ["--scaling", spec]
    flags.append("--only")
    monkeypatch.setattr(measurement, "LEAST_FOUND", 0.0)  # its weights are random, so it finds nothing
    assert command.run(arguments(*flags), Ticking(0.1)) == 0
    told = capsys.readouterr()
    word = told.out.split(": ", 1)[0]
    assert word in ("USE", "PARTLY", "NONE") and "scaled-rope export" in told.out or word == "NONE"
    assert "./train.sh" in told.out

    rows = read_rows(out / "rows.jsonl")
    assert {row["metric"] for row in rows} == {"pass_seconds", "segment_nll", "answer_nll", "advice_round"}
    assert {row["protocol"]["name"] for row in rows} >= {"last-tokens", "segments", "teacher-forced", "halving"}
    assert all(row["provenance"]["command"].startswith("scaled-rope advise ") for row in rows)

    summary = json.loads((out / "advice.json").read_text())
    assert summary["verdict"] == word.lower() and summary["target"] == 256 and summary["seconds"] <= 60
    assert summary["use"] in {one["spec"] for one in summary["last_round"]}
    results = load_results([str(out / "results.jsonl")])
    assert {section.topic.metric for section in results.sections} == {"perplexity", "passkey"}
    assert {one.scaling.to_spec() for one in results.series} >= {"default:1"} or len(results.series) >= 2
    (perplexities,) = results.of("perplexity")
    assert perplexities.controls  # the dashed line of the figure

    recipe = read_recipe(str(out / "recipe.yaml"))
    assert recipe.scaling == summary["train_with"] and recipe.sequence_length == 256

    page = (out / "advice.html").read_text()
    assert "<b>model" not in page and "<script>.jsonl" not in page  # names are escaped
    assert html.escape("tiny <b>model") in page and "Content-Security-Policy" in page
    assert len(re.findall(r"<script", page)) == 1
    for sentence in summary["words"]:
        assert html.escape(sentence) in page

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ModelLoader, "__call__", refuse)
    assert command.run(arguments(*flags, "--json"), Ticking(0.1)) == 0  # a finished run reads no weights
    again = json.loads(capsys.readouterr().out)
    assert read_rows(out / "rows.jsonl") == rows
    for one in (again, summary):
        del one["provenance"], one["seconds"]
    assert again == summary


@pytest.mark.slow  # test_rounds.py does it with a scripted model
def test_the_probe_of_dpe_makes_a_candidate(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = [checkpoint, "--target", 256, "--dataset", texts, "--minutes", 0.5, "--output", out, "--json"]
    monkeypatch.setattr(measurement, "LEAST_FOUND", 0.0)  # its weights are random, so it finds nothing
    monkeypatch.setattr(command, "time_passes", lambda model, lengths: [0.005, 0.01])
    monkeypatch.setattr(probing, "SHARE", 4)  # most of this time is that of asking for the time
    assert command.run(arguments(*flags), Ticking(0.01)) == 0
    told = json.loads(capsys.readouterr().out)
    probe, left_out = told["probe"], told["left_out"]
    assert "dpe" not in left_out and probe["window"] == 16 and probe["reference"] == 4
    assert probe["prompts"] >= 2 and len(probe["groups"]) == len(probe["scores"])
    assert all(set(scores) == {"1", "2", "4", "8", "16"} for scores in probe["scores"])
    for size, scores, length in zip(probe["groups"], probe["scores"], probe["effective_lengths"], strict=True):
        assert scores[str(size)] == max(scores.values()) and length == 16 + -(-240 // size)
    spec = f"dpe,groups={'+'.join(map(str, probe['groups']))},window=16"
    assert spec in told["rounds"][0]["candidates"]
    rows = read_rows(out / "rows.jsonl")
    asked = [row for row in rows if row["metric"] == "answer_nll" and row["scaling"]["method"] == "dpe"]
    groupings = {tuple(row["scaling"]["params"]["groups"]) for row in asked}
    assert len(groupings - {tuple(probe["groups"])}) >= 4 * len(probe["groups"])
    assert any("attention_temperature=log" in one for one in told["rounds"][1]["candidates"])
    assert told["seconds"] <= 30

    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(ModelLoader, "__call__", refuse)
    assert command.run(arguments(*flags), Ticking(0.01)) == 0
    again = json.loads(capsys.readouterr().out)
    assert read_rows(out / "rows.jsonl") == rows
    for one in (again, told):
        del one["provenance"], one["seconds"]
    assert again == told


def test_a_model_that_does_not_retrieve_is_judged_by_perplexity(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [checkpoint, "--target", 256, "--dataset", texts, "--output", tmp_path / "out", "--scaling", "yarn:2"]
    assert command.run(arguments(*flags, "--only"), Ticking(0.1)) == 0
    told = capsys.readouterr()
    assert "Retrieval is left out" in told.err and "retrieval" not in told.out
    assert {row["metric"] for row in read_rows(tmp_path / "out" / "results.jsonl")} == {"perplexity"}


def test_a_length_without_room_for_facts_is_judged_by_perplexity(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [checkpoint, "--target", 64, "--original-max-position-embeddings", 32, "--dataset", texts, "--only"]
    flags += ["--minutes", 0.3, "--output", tmp_path / "out", "--scaling", "yarn:2"]
    assert command.run(arguments(*flags), Ticking(0.1)) == 0
    told = capsys.readouterr()
    said = re.search(r"Retrieval is left out: a hidden fact and its question take at least (\d+) tokens", told.err)
    assert said is not None and int(said[1]) > 32 and "and L is 32" in told.err and "retrieval" not in told.out


def test_what_is_handed_out_asks_the_same_question(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A corrected L and another field of the texts go into the commands and the recipe."""
    fields = tmp_path / "fields.jsonl"
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    fields.write_text("".join(json.dumps({"body": line, "text": "lorem"}) + "\n" for line in lines))
    flags = [checkpoint, "--target", 256, "--original-max-position-embeddings", 64, "--dataset", fields]
    flags += ["--feature", "body", "--output", tmp_path / "out", "--no-retrieval", "--only"]
    assert command.run(arguments(*flags, "--scaling", "yarn:4", "--json"), Ticking(0.1)) == 0
    told = json.loads(capsys.readouterr().out)
    exports = [one for one in told["commands"] if one.startswith("scaled-rope export")]
    assert exports and all("yarn:4,original_max_position_embeddings=64" in one for one in exports)
    assert any("passkey.py" in one and "--original-max-position-embeddings 64" in one for one in told["commands"])
    recipe = read_recipe(told["recipe"])
    assert recipe.original_max_position_embeddings == 64 and "--feature body" in recipe.prepare[-1]
    assert recipe.evaluate["scalings"] == ["default", "yarn:4,original_max_position_embeddings=64"]

    # Another question in the same folder, whose answer has no recipe, leaves none there.
    assert command.run(arguments(*flags, "--scaling", "dynamic-yarn", "--json"), Ticking(0.1)) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] is None
    assert not (tmp_path / "out" / "recipe.yaml").exists()


def test_a_model_that_carries_a_scaling_is_tried_under_its_own(
    tiny_model: Make, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128, rope_parameters=rope)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    capsys.readouterr()  # saving a model imports programs that print
    flags = [tmp_path / "model", "--target", 256, "--dataset", texts, "--output", tmp_path / "out", "--no-retrieval"]
    assert command.run(arguments(*flags, "--json"), Ticking(0.5)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["original_max_position_embeddings"] == 128  # what it was extended to
    assert {one["spec"] for one in told["last_round"]} == {"checkpoint:4", "dynamic-yarn:2", "checkpoint"}
    assert told["train_with"] == "checkpoint:4"
    recipe = read_recipe(told["recipe"])
    assert recipe.scaling.startswith("yarn:4") and recipe.evaluate["scalings"][0] == "checkpoint"

    assert command.run(arguments(*flags, "--original-max-position-embeddings", 32, "--json"), Ticking(0.5)) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["original_max_position_embeddings"] == 64
    assert read_recipe(told["recipe"]).evaluate["scalings"][0] == "yarn:2,original_max_position_embeddings=32"
    exports = [shlex.split(one)[6] for one in told["commands"] if one.startswith("scaled-rope export")]
    assert exports and all(one.endswith("original_max_position_embeddings=32") for one in exports)


def test_a_model_of_llama_3_1_works_to_what_its_config_claims(
    tiny_model: Make, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(str(DEFAULT_MODEL))
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=128, rope_parameters=rope)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = [tmp_path / "model", "--dataset", texts, "--output", tmp_path / "out", "--no-retrieval", "--json"]
    assert run_cli(lambda: command.run(arguments(*flags, "--target", 128), Ticking(0.5))) == 2
    assert " reads 128 tokens as it is, so more than 128" in capsys.readouterr().err
    assert command.run(arguments(*flags, "--target", 256), Ticking(0.5)) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["spec"] for one in told["last_round"]} == {"checkpoint:4", "checkpoint"}
    assert told["original_max_position_embeddings"] == 128
    assert read_recipe(told["recipe"]).max_position_embeddings == 256


@pytest.mark.parametrize("corrected", [None, 64])
@pytest.mark.parametrize("adapter", [None, "an/adapter"])
@pytest.mark.parametrize("carried", [None, RopeScaling("yarn", 2.0, 32, beta_fast=8.0)])
def test_the_commands_have_scalings_that_parse(
    corrected: int | None, adapter: str | None, carried: RopeScaling | None
) -> None:
    """Those of every candidate mean what was measured, on the model as its config describes it."""
    saved = RopeScaling("default", original_max_position_embeddings=32) if carried is None or adapter else carried
    own = saved if carried is None else carried
    if corrected is not None:
        own = replace(own, original_max_position_embeddings=corrected)
    length = own.max_position_embeddings or 0
    listed = short_list(own, length, 4 * length, 64)
    args = argparse.Namespace(
        model="m", target=4 * length, original_max_position_embeddings=corrected, adapter=adapter, output="out"
    )
    for one in [*listed, Candidate("default" if own.method == "default" else "checkpoint", own)]:
        judged: Any = SimpleNamespace(
            spec=one.spec,
            measured=SimpleNamespace(candidate=one),
            served_by=["vllm", "llama.cpp"],
            buckets={1: 0},
            works_to=4 * length,
        )
        advice: Any = SimpleNamespace(use=judged, served=None, original=length)
        *exports, check = (line.split(" --scaling ")[1] for line in command._commands(args, advice, None, saved))
        assert len(exports) == 2
        for export in exports:
            assert resolve_scaling(shlex.split(export)[0], saved) == one.scaling, export
        assert resolve_scaling(shlex.split(check)[0], own) == one.scaling  # which is told L and the adapter by flags


def test_an_answer_outlives_a_recipe_that_cannot_be_made(
    checkpoint: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **more: object) -> None:
        assert more["split"] == "train"  # not what the evaluators read
        raise ConfigError("unknown split 'train'")

    monkeypatch.setattr(command, "write_recipe", fail)
    flags = [checkpoint, "--target", 256, "--dataset", texts, "--output", tmp_path / "out"]
    flags += ["--no-retrieval", "--only", "--scaling", "yarn:2", "--minutes", 0.3]
    assert command.run(arguments(*flags), Ticking(0.1)) == 0
    told = capsys.readouterr()
    assert "note: No recipe: unknown split 'train'\n" in told.err and "train.sh" not in told.out
    assert json.loads((tmp_path / "out" / "advice.json").read_text())["recipe"] is None


def test_a_second_run_on_the_folder_is_refused(
    checkpoint: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [checkpoint, "--target", 256, "--dataset", texts, "--output", tmp_path / "out"]
    with folder_lock(tmp_path / "out"):
        assert run_cli(lambda: command.run(arguments(*flags), Ticking(0.1))) == 2
    assert f"--output {tmp_path / 'out'} is being written by another run, process " in capsys.readouterr().err


@pytest.mark.parametrize(("works_to", "told"), [(512, "512"), (256, "256"), (64, None)])
def test_exports_are_for_the_length_to_which_it_works(works_to: int, told: str | None) -> None:
    """None of what does not work beyond L; the check asks at all lengths in any case."""
    own = RopeScaling("default", original_max_position_embeddings=64)
    judged: Any = SimpleNamespace(
        spec="yarn:8",
        measured=SimpleNamespace(candidate=Candidate("yarn:8", RopeScaling.from_spec("yarn:8", own))),
        served_by=["vllm", "llama.cpp"],
        buckets={128: 0, 256: 0, 512: 0},
        works_to=works_to,
    )
    args = argparse.Namespace(model="m", target=512, original_max_position_embeddings=None, adapter=None, output="out")
    advice: Any = SimpleNamespace(use=judged, served=None, original=64)
    *exports, check = command._commands(args, advice, None, own)
    assert [one.split(" --length ")[1] for one in exports] == ([] if told is None else [told, told])
    assert "--lengths 128,256,512 " in check


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--target", "128"], "--target 128 is not allowed; tiny <b>model reads 128 tokens as it is, so more than 128"),
        (["--target", "1"], "--target 1 is not allowed; at least 2"),
        (["--target", "4096"], "documents have 4096 tokens; at least 1 is needed: a smaller --target needs less"),
        (["--documents", "2", "--windows", "1"], "2 windows of 256 tokens are not enough; at least 4"),
        (["--documents", "60"], "--documents asks for 60"),
        (["--minutes", "0"], "--minutes 0 is not allowed; above 0, at most 1e+06 minutes"),
        (["--minutes", "0.001"], "--minutes 0.001 is not enough for one candidate: 3 windows of 256 tokens"),
        (["--scaling", "yan:2"], "unknown method 'yan'"),
        (["--only"], "--only is not allowed without --scaling"),
        (["--scaling", "default", "--only"], "there is nothing to try on tiny <b>model (unscaled)"),
        (["--dtype", "float17"], "float17"),
        (["--dataset", "/no/such.txt"], "does not exist"),
        (["--feature", "body"], "body"),
        (["--adapter", "/no/adapter"], "holds no adapter_config.json"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, texts: Path, tmp_path: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = [checkpoint, "--target", 256, "--dataset", texts, "--output", tmp_path / "out"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_cli(lambda: command.run(arguments(*usual, *flags), Ticking(0.02))) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and complaint in printed
    assert not (tmp_path / "out" / "advice.json").exists()
