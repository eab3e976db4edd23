"""Configs that do not say what they mean, mended."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from scaled_rope import ConfigError, cli
from scaled_rope.scaling.record import RopeScaling, RopeSettings
from scaled_rope.serving.inspect_config import inspect
from scaled_rope.serving.repair import repair
from tests.helpers.published_configs import (
    DEEPSEEK,
    LLAMA,
    LLAMA3,
    OLMO3,
    PUBLISHED,
    PYTHIA,
    QWEN,
    QWEN25_VL,
    R1_QWEN3,
    written,
    yarn,
)

LONG = LLAMA | {"max_position_embeddings": 32768}
YARN_8 = yarn(8.0, 4096)
NO_THETA = {key: value for key, value in LONG.items() if key != "rope_theta"}
VISION = {"vision_config": {"model_type": "clip_vision_model"}}
TWO = {"rope_scaling": YARN_8, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
FLAT_OLMO3 = {key: value for key, value in OLMO3.items() if key != "rope_scaling"} | {
    "rope_parameters": OLMO3["rope_scaling"]
}
LONE = DEEPSEEK | {"rope_scaling": {k: v for k, v in DEEPSEEK["rope_scaling"].items() if k != "mscale"}}
NESTED = {
    "full_attention": YARN_8 | {"rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LISTS = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
MSCALES = LONG | {"rope_scaling": {"type": "longrope", "factor": 8.0, **LISTS, "short_mscale": 1.5, "long_mscale": 1.5}}
MSCALES["rope_scaling"]["original_max_position_embeddings"] = 4096

# Name -> (config, choices, the label that it has then, the keys that are changed).
MENDED: dict[str, tuple[dict[str, Any], dict[str, str], str, list[str]]] = {
    "keys beside the text part": (
        {"model_type": "llava", "text_config": LONG, **VISION, "rope_scaling": YARN_8},
        {},
        "yarn x8",
        ["rope_scaling", "text_config.rope_scaling"],
    ),
    "keys beside a text part that transformers 5 wrote": (
        {
            "model_type": "llava",
            "text_config": NO_THETA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            **VISION,
            "rope_scaling": YARN_8,
        },
        {},
        "yarn x8",
        ["rope_scaling", "text_config.rope_parameters"],
    ),
    "a base beside the text part": (
        {"model_type": "foo_vl", "text_config": NO_THETA, "rope_theta": 5e5},
        {},
        "unscaled",
        ["rope_theta", "text_config.rope_theta"],
    ),
    "another scaling inside of the text part": (
        {"model_type": "foo_vl", "text_config": LONG | {"rope_scaling": YARN_8}, "rope_scaling": yarn(4.0, 8192)},
        {"rope_scaling": "inner"},
        "yarn x8",
        ["rope_scaling"],
    ),
    "dialects that disagree": (
        LONG | TWO,
        {"dialect": "rope_scaling"},
        "yarn x8",
        ["rope_scaling", "rope_parameters"],
    ),
    "dialects that disagree, the other way": (
        LONG | TWO | {"max_position_embeddings": 8192},
        {"dialect": "rope_parameters"},
        "linear x4",
        ["rope_scaling"],
    ),
    "position interpolation whose maximum looks extended": (
        LONG | {"rope_scaling": {"type": "linear", "factor": 8.0}},
        {"original_max_position_embeddings": "4096"},
        "linear x8",
        ["rope_scaling.original_max_position_embeddings"],
    ),
    "a scaling beside what transformers 5 wrote": (
        NO_THETA | {"rope_scaling": YARN_8, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {},
        "yarn x8",
        ["rope_scaling", "rope_parameters"],
    ),
    "two bases": (
        LONG | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": "500000"},
        "unscaled",
        ["rope_theta"],
    ),
    "a misspelt top-level key": (
        LONG | {"rope_scalling": YARN_8},
        {},
        "yarn x8",
        ["rope_scalling", "rope_scaling"],
    ),
    "a misspelt key": (
        LONG | {"rope_scaling": YARN_8 | {"beta_fats": 64}},
        {},
        "yarn x8 (beta_fast=64)",
        ["rope_scaling.beta_fats", "rope_scaling.beta_fast"],
    ),
    "a misspelt type": (
        LONG | {"rope_scaling": YARN_8 | {"type": "yarm"}},
        {},
        "yarn x8",
        ["rope_scaling.rope_type", "rope_scaling.type"],
    ),
    "a key of another type": (
        LONG | {"rope_scaling": YARN_8 | {"type": "linear", "beta_fast": 64}},
        {"rope_type": "yarn"},
        "yarn x8 (beta_fast=64)",
        ["rope_scaling.rope_type", "rope_scaling.type"],
    ),
    "a key of another type, which goes": (
        LONG | {"rope_scaling": YARN_8 | {"type": "linear", "beta_fast": 64}},
        {"rope_type": "linear"},
        "linear x8",
        ["rope_scaling.beta_fast"],
    ),
    "two types": (
        LONG | {"rope_scaling": YARN_8 | {"type": "linear", "rope_type": "yarn"}},
        {"rope_type": "yarn"},
        "yarn x8",
        ["rope_scaling.type"],
    ),
    "a key of another program that says nothing": (
        LONG | {"rope_scaling": YARN_8 | {"attn_factor": 1.0, "extrapolation_factor": 1.0}},
        {},
        "yarn x8",
        ["rope_scaling.attn_factor", "rope_scaling.extrapolation_factor"],
    ),
    "an older name of the type": (
        QWEN25_VL | {"model_type": "qwen3_vl_text", "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
        {},
        "unscaled",
        ["rope_scaling.type"],
    ),
    "flat parameters of a family that nests them": (FLAT_OLMO3, {}, "yarn x8 (beta_fast=32", ["rope_parameters"]),
    "an entry per layer type where layers share one table": (
        NO_THETA | {"rope_parameters": {"full_attention": YARN_8 | {"rope_theta": 5e5}}},
        {},
        "yarn x8",
        ["rope_parameters"],
    ),
    "an entry for layers that the model has not": (
        QWEN
        | {"rope_scaling": {"full_attention": yarn(4.0, 32768), "sliding_attention": {"rope_type": "default"}}}
        | {"max_position_embeddings": 131072},
        {},
        "yarn x4",
        ["rope_scaling"],
    ),
    "two entries where layers share one table": (
        NO_THETA | {"rope_parameters": NESTED},
        {"rope_parameters": "full_attention"},
        "yarn x8",
        ["rope_parameters"],
    ),
    "attn_factor as SGLang reads it": (
        R1_QWEN3,
        {"attention_factor": "1"},
        "yarn x4 (attention_factor=1)",
        ["rope_scaling.attention_factor"],
    ),
    "attn_factor as transformers reads it": (
        R1_QWEN3,
        {"attention_factor": "1.13863"},
        "yarn x4",
        ["rope_scaling.attention_factor", "rope_scaling.attn_factor"],
    ),
    "attn_factor and another number": (
        R1_QWEN3,
        {"attention_factor": "1.25"},
        "yarn x4 (attention_factor=1.25)",
        ["rope_scaling.attention_factor", "rope_scaling.attn_factor"],
    ),
    "mscales of LongRoPE as vLLM reads them": (
        MSCALES,
        {"attention_factor": "1.5"},
        "longrope x8 (attention_factor=1.5",
        ["rope_scaling.attention_factor"],
    ),
    "mscale alone, as programs read it": (
        LONG | {"rope_scaling": YARN_8 | {"mscale": 0.7}},
        {"attention_factor": "1.20794"},
        "yarn x8",
        ["rope_scaling.attention_factor", "rope_scaling.mscale"],
    ),
    "mscale alone, as it may have been meant": (
        LONG | {"rope_scaling": YARN_8 | {"mscale": 0.7}},
        {"attention_factor": "1.14556"},
        f"yarn x8 (attention_factor={0.07 * math.log(8) + 1!r})",
        ["rope_scaling.attention_factor", "rope_scaling.mscale"],
    ),
    "mscale_all_dim alone": (LONE, {"mscale": "1.0"}, "yarn x40 (attention_factor=1,", ["rope_scaling.mscale"]),
    "mscale_all_dim alone, and cos and sin as well": (
        LONE,
        {"mscale": "0"},
        "yarn x40 (beta_fast=32",
        ["rope_scaling.attention_factor"],
    ),
    "constants of a released Yarn-Mistral": (
        PUBLISHED["Yarn-Mistral-7b-64k"][0],
        {},
        "yarn x8 (attention_factor=1.145",
        [
            "rope_scaling.beta_fast",
            "rope_scaling.beta_slow",
            "rope_scaling.attention_factor",
            "max_position_embeddings",
        ],
    ),
    "no original length": (
        LLAMA | {"rope_scaling": yarn(4.0, None)},
        {},
        "yarn x4",
        ["rope_scaling.original_max_position_embeddings", "max_position_embeddings"],
    ),
    "no original length, and a long maximum": (
        LLAMA | {"max_position_embeddings": 65536, "rope_scaling": yarn(16.0, None)},
        {"original_max_position_embeddings": "4096"},
        "yarn x16",
        ["rope_scaling.original_max_position_embeddings"],
    ),
    "a maximum that hides the scaling": (QWEN, {}, "yarn x4", ["max_position_embeddings"]),
    "a maximum beyond the scaling": (
        LONG | {"max_position_embeddings": 65536, "rope_scaling": YARN_8},
        {"factor": "16"},
        "yarn x16",
        ["rope_scaling.factor"],
    ),
    "a maximum beyond the scaling, the other way": (
        LONG | {"max_position_embeddings": 65536, "rope_scaling": YARN_8},
        {"factor": "8"},
        "yarn x8",
        ["max_position_embeddings"],
    ),
}


@pytest.mark.parametrize("name", MENDED)
def test_what_is_mended_says_what_it_means(name: str) -> None:
    config, assume, label, keys = MENDED[name]
    before = copy.deepcopy(config)
    result = repair(config, assume)
    assert config == before
    assert [change.key for change in result.changes] == keys
    assert all(change.reason and "\n" not in str(change) and "object" not in str(change) for change in result.changes)
    report = inspect(result.config)
    assert report.exit_code == 0 and report.scaling is not None and report.scaling.label.startswith(label)
    assert RopeSettings(result.config).scaling == report.scaling  # what is loaded is what is reported
    # It is whole then: nothing is left to mend, and what had to be chosen is not asked for again.
    assert repair(result.config).changes == ()


@pytest.mark.parametrize("name", [name for name, (_, assume, *_) in MENDED.items() if assume])
def test_two_readings_are_asked_about_in_one_line(name: str) -> None:
    config, assume, *_ = MENDED[name]
    with pytest.raises(ConfigError, match="two readings: choose --assume ") as caught:
        repair(config)
    assert "\n" not in str(caught.value)
    assert all(f"--assume {choice}=" in str(caught.value) for choice in assume)
    with pytest.raises(ConfigError, match=f"unknown value of --assume {next(iter(assume))}: 'none of these'"):
        repair(config, {next(iter(assume)): "none of these"})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_whole_or_become_so(name: str) -> None:
    config, label, _ = PUBLISHED[name]
    result = repair(config)
    assert inspect(result.config).exit_code == 0
    mended = {"Qwen2.5 with the YaRN of its card", "Yarn-Mistral-7b-64k", "Yarn-Mistral-7b-128k"}
    assert bool(result.changes) == (name in mended)
    if name not in mended:
        assert result.config == config and result.report.scaling is not None
        assert result.report.scaling.label.startswith(label)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2", "rope_scaling": YARN_8}, r"\[no-rope\] transformers takes no RoPE parameters"),
        (LONG | {"rope_scaling": YARN_8 | {"extrapolation_factor": 0.5}}, r"\[foreign-key\] extrapolation_factor=0.5"),
        (LONG | {"rope_scaling": {"type": "yarn"}}, r"\[no-factor\] factor is missing"),
        (LONG | {"rope_scaling": YARN_8 | {"factor": -1}}, r"\[bad-value\] factor=-1"),
        (PYTHIA | {"rope_scaling": "yarn"}, r"\[bad-value\] rope_scaling='yarn'"),
        ({"hidden_size": 3}, "says nothing about a model"),
    ],
)
def test_what_cannot_be_mended_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        repair(config)
    assert "\n" not in str(caught.value)


def test_a_choice_that_nobody_asks_for_is_refused() -> None:
    with pytest.raises(ConfigError, match="--assume factor=2: nothing in this config leaves factor open"):
        repair(LLAMA3, {"factor": "2"})
    with pytest.raises(ConfigError, match="must be a whole number of tokens"):
        repair(LLAMA | {"rope_scaling": yarn(16.0, None)}, {"original_max_position_embeddings": "4096.5"})


def run(*arguments: str) -> int:
    return cli.main(["repair", *arguments])


def test_the_command_writes_a_config_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, {"model_type": "llava", "text_config": LONG, **VISION, "rope_scaling": YARN_8})
    (tmp_path / "model.safetensors").touch()
    before, out = source.read_text(), tmp_path / "out"
    assert run(str(tmp_path)) == 0 and not out.exists()
    assert "nothing was written: --output DIR writes DIR/config.json" in capsys.readouterr().out
    assert run(str(source), "--output", str(out)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{source}: 2 changes, it says yarn x8 now" and lines[-1] == f"wrote {out}/config.json"
    assert lines[1].startswith("  rope_scaling: {type") and "nobody reads it outside of text_config" in lines[1]
    assert [path.name for path in out.iterdir()] == ["config.json"] and source.read_text() == before
    text = AutoConfig.from_pretrained(out).text_config
    assert RopeScaling.from_config(text) == RopeScaling("yarn", 8.0, 4096)
    assert run(str(source), "--output", str(out)) == 2
    assert f"--output {out} has a config.json; choose another folder" in capsys.readouterr().err


def test_a_whole_config_is_not_written_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = written(tmp_path, LLAMA3), tmp_path / "out"
    assert run(str(source), "--output", str(out)) == 0
    assert capsys.readouterr().out == f"{source}: nothing to mend, it says llama3 x8; nothing was written\n"
    assert not out.exists()


def test_the_command_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path, R1_QWEN3)
    arguments = [str(source), "--assume", "attention_factor=1", "--output", str(tmp_path / "out"), "--json"]
    assert run(*arguments) == 0
    result = json.loads(capsys.readouterr().out)
    (change,) = result["changes"]
    assert (change["key"], change["after"]) == ("rope_scaling.attention_factor", 1.0) and "before" not in change
    assert result["config"] == json.loads((tmp_path / "out" / "config.json").read_text())
    assert result["written"] == str(tmp_path / "out" / "config.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--assume", "factor"], "--assume 'factor' is not allowed; write FIELD=VALUE"),
        (["--assume", "factor=2", "--assume", "factor=3"], "--assume factor is given twice: 2 and 3"),
        (["--output", __file__], "is a file; name a folder"),
    ],
)
def test_bad_flags_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(written(tmp_path, LLAMA3)), *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_warnings_that_are_left_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rope = {"type": "dynamic", "factor": 2.0}
    assert run(str(written(tmp_path, LLAMA | {"rope_scaling": rope}))) == 0
    assert "left as they are, see inspect:\n  [dynamic-cache] " in capsys.readouterr().out


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        *((name, "yarn") for name in ("YARN", "YaRN", "Yarn", " yarn", "yarnn")),
        ("Linear", "linear"), ("NTK-by-parts", "ntk-by-parts"), ("ntk_by_parts", "ntk-by-parts"), ("SU", "longrope"),
        ("su", "longrope"), ("LongRope", "longrope"), ("LLAMA3", "llama3"),
    ],
)  # fmt: skip
def test_a_type_in_other_case_or_by_an_older_name_is_written_right(key: str, written: str, meant: str) -> None:
    lists = {name: [value] * 64 for name, value in (("short_factor", 1.0), ("long_factor", 4.0))}
    more = {"longrope": lists, "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}.get(meant, {})
    factor = 8.0 if meant == "llama3" else YARN_8["factor"]
    rope = {"factor": factor, "original_max_position_embeddings": 4096, key: written} | more
    heads = {"hidden_size": 512, "num_attention_heads": 4}
    result = repair(LONG | heads | {"rope_scaling": rope})
    mended = result.config["rope_scaling"]
    assert mended.get("rope_type", mended.get("type")) == meant
    assert all(name in ("rope_scaling.rope_type", "rope_scaling.type") for name in (one.key for one in result.changes))


def test_several_names_that_are_near_are_asked_about() -> None:
    with pytest.raises(ConfigError, match="two readings: choose --assume rope_type=.* or --assume rope_type="):
        repair(LONG | {"rope_scaling": YARN_8 | {"type": "linrope"}})


def test_numbers_that_are_written_as_text_become_numbers() -> None:
    rope = YARN_8 | {"factor": "8.0", "original_max_position_embeddings": "4096", "truncate": "False"}
    result = repair(LONG | {"rope_theta": "1e4", "max_position_embeddings": "32768", "rope_scaling": rope})
    assert result.report.scaling == RopeScaling("yarn", 8.0, 4096, truncate=False)
    assert {one.key: one.after for one in result.changes} == {
        **{"rope_theta": 10000.0, "max_position_embeddings": 32768, "rope_scaling.factor": 8.0},
        **{"rope_scaling.original_max_position_embeddings": 4096, "rope_scaling.truncate": False},
    }
    assert all(one.reason == "it was written as text" for one in result.changes)
    with pytest.raises(ConfigError, match=r"\[bad-value\] factor='eight'"):
        repair(LONG | {"rope_scaling": YARN_8 | {"factor": "eight"}})
