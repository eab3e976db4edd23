"""What other programs make of what `export` tells them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from scaled_rope import patch_model
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.export import export
from scaled_rope.serving.gguf import GgufRope, read_gguf_rope, write_checkpoint
from scaled_rope.serving.targets import hf
from scaled_rope.serving.targets.common import TOLERANCE
from scaled_rope.serving.targets.registry import TARGETS
from tests.helpers.exports import HEAD_DIM, command_line, make_config
from tests.helpers.published_configs import LLAMA3

SHORT, LONG = "+".join(["1.0"] * 8), "+".join(["1.0"] * 4 + ["2.0"] * 2 + ["6.5"] * 2)
LONGROPE = f"longrope:4,short_factor={SHORT},long_factor={LONG}"
IN_ALL_WORDS = [
    "default",
    "linear:4",
    "linear:2.5",
    "ntk:4",
    "ntk-by-parts:4",
    "yarn:4",
    "yarn:1",
    "yarn:4,attention_factor=1.0",
    "yarn:4,mscale=0.7,beta_fast=64,beta_slow=2",
    "llama3:4",
    "abf,theta=500000",
]
AS_TABLE = [
    "yarn:4,ramp=rotations",
    "yarn:4,resonance=true",
    "ntk-mixed:4",
    "part-ntk:4",
    "hardclip,clip=3",
    "drope:4",
    "proportional:2,fraction=0.5",
]
HALVES = ["yarn:4,truncate=false", "yarn:4,extrapolation_factor=0.5", "yarn:4,extrapolation_factor=0"]
"""Some programs have words for these, others need every frequency spelled out."""
SERVERS = [name for name in TARGETS if name != "transformers"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", [*IN_ALL_WORDS, *AS_TABLE, *HALVES])
def test_every_static_scaling_has_exact_words_for_every_target(spec: str, target: str, config: LlamaConfig) -> None:
    report = export(spec, config, target)
    assert report.status == "exact", report
    # Our frequencies are rounded to float32, theirs are float64, or float32 by another route in transformers.
    assert all(c.max_relative_difference < 1e-6 and abs(c.attention_difference) < 1e-9 for c in report.comparisons)


@pytest.mark.parametrize("spec", IN_ALL_WORDS)
def test_plain_scalings_need_no_table(spec: str, config: LlamaConfig) -> None:
    for target in [name for name in TARGETS if name != "ollama"]:  # which is given no flags
        report = export(spec, config, target)
        assert report.gguf is None or report.converts  # a conversion writes what it holds
        assert report.config["rope_parameters"]["rope_type"] != "longrope"


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("original", [4, 256, 4096, 2_000_000])
def test_the_ramp_is_ours_at_every_width_and_length(head_dim: int, original: int) -> None:
    # At 4 tokens and at 2 million the ramp's ends fall outside of the head and are clamped, which llama.cpp does in
    # its own way: there its words are not ours, and the tensor is taken.
    config = make_config(head_dim=head_dim, max_position_embeddings=original)
    for target in TARGETS:
        assert export("yarn:8", config, target, length=original).status == "exact"


def test_longrope_is_exact_only_where_short_prompts_get_the_short_list(config: LlamaConfig) -> None:
    assert export(LONGROPE, config, "transformers").status == "exact"
    for target in SERVERS:
        report = export(LONGROPE, config, target)
        assert report.status == "partial" and report.exit_code == 1
        assert [c.matches for c in report.comparisons] == [False, True]


def test_a_partly_rotated_head() -> None:
    scaling = RopeScaling("yarn", 4.0, 512, partial_rotary_factor=0.5)
    for target in set(TARGETS) - {"mlx"}:
        assert export(scaling, make_config(head_dim=32), target).status == "exact"
    report = export(scaling, make_config(head_dim=32), "mlx")
    assert report.status == "refused" and "its class for llama models rotates whole heads" in report.reason


def test_a_wrong_number_is_refused(
    config: LlamaConfig, monkeypatch: pytest.MonkeyPatch, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = TARGETS["vllm"]

    def off(*args: Any) -> Any:
        restated = target.restate(*args)
        inv_freq = list(restated.inv_freq)
        inv_freq[5] *= 1 + 1e-3
        return restated._replace(inv_freq=inv_freq)

    monkeypatch.setitem(TARGETS, "vllm", dataclasses.replace(target, restate=off))
    report = export("yarn:4", config, "vllm")
    assert (report.status, report.exit_code) == ("refused", 2)
    reason = "vLLM computes frequencies up to 0.1% off (dimension 5)"
    assert report.reason == f"from what can be told it, {reason}"
    assert report.comparisons[0].worst_dimension == 5
    assert report.comparisons[0].max_relative_difference == pytest.approx(1e-3, rel=1e-3)
    assert not report.config and not report.flags and reason in str(report)
    assert run_cli(command_line(folder, "--for", "vllm", "--scaling", "yarn:4")[1]) == 2
    assert reason in capsys.readouterr().err


def test_a_wrong_attention_factor_is_refused(config: LlamaConfig) -> None:
    """SGLang does not read attention_factor: a config in the words of transformers means something else there."""
    target = dataclasses.replace(TARGETS["sglang"], express=hf.express, read=lambda request, words: iter([words.given]))
    report = export("yarn:4,attention_factor=1.2", config, target)
    assert report.status == "refused" and "the attention factor 1.13863 instead of 1.2" in report.reason
    wrong = report.comparisons[0]
    assert wrong.max_relative_difference < TOLERANCE
    assert (wrong.attention_factor, wrong.ours) == (pytest.approx(1 + 0.1 * math.log(4)), 1.2)


def test_servers_are_said_to_scale_short_prompts(config: LlamaConfig) -> None:
    for target in SERVERS:
        assert any("short prompts" in note for note in export("yarn:4", config, target).notes)
        notes = export("default", config, target).notes
        assert not [note for note in notes if "short prompts" in note or "ignore rope_parameters" in note]


def test_a_class_that_was_not_read_is_unknown_and_not_exact() -> None:
    config = transformers.DeepseekV3Config()
    for target in ("vllm", "sglang"):
        report = export("yarn:4", config, target)
        assert (report.status, report.exit_code) == ("unknown", 1)
        assert any("what its code for 'deepseek_v3' passes on" in note for note in report.notes)
        assert "unknown for this class of model" in str(report).splitlines()[0]


def test_a_config_without_head_dim_gets_one() -> None:
    """transformers multiplies the null of Mixtral's head_dim with a number as soon as there is a scaling."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, vocab_size=61
    )
    report = export("yarn:4", config, "transformers")
    assert report.status == "exact" and report.config["head_dim"] == 16


def test_phi3_takes_only_longrope() -> None:
    settings = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 61}
    config = AutoConfig.for_model("phi3", **settings, num_hidden_layers=1, pad_token_id=0, max_position_embeddings=512)
    report = export("yarn:4", config, "transformers")
    assert report.status == "exact" and report.config["rope_parameters"]["rope_type"] == "longrope"


def test_a_sliding_window_is_pointed_out() -> None:
    config = AutoConfig.for_model("mistral", sliding_window=256, head_dim=16, max_position_embeddings=512)
    report = export("yarn:4,beta_fast=64", config, "vllm")
    assert any("sliding_window=256" in note for note in report.notes)


def test_a_length_beyond_what_the_scaling_is_for_is_pointed_out(config: LlamaConfig) -> None:
    assert "a factor of 8 reaches it" in "".join(export("yarn:4", config, "vllm", length=4096).notes)
    assert not any("reaches it" in note for note in export("yarn:4", config, "vllm", length=2048).notes)


@pytest.mark.parametrize("target", ["transformers", "vllm", "llama.cpp"])
def test_layers_with_other_rotations_are_refused(target: str, config: LlamaConfig) -> None:
    """What `patch_model` saves of them is in a record that no server reads."""
    yarn = RopeScaling("yarn", 4.0, 512)
    config.rope_parameters = yarn.to_config(head_dim=HEAD_DIM, rope_types=())
    config.scaled_rope = {"drop_layers": [1, 3], "layers": {}}
    report = export("checkpoint", config, target)
    assert report.status == "refused" and report.reason.startswith("layers 1, 3 of this checkpoint have no rotary")
    assert export("yarn:2", config, target).status == "refused"  # a scaling brings no rotation back
    plain = RopeScaling("default", 1.0, 512)
    config.scaled_rope = {"layers": {"full_attention": yarn.to_dict(), "sliding_attention": plain.to_dict()}}
    report = export("checkpoint", config, target)
    assert report.status == "refused" and "full_attention, sliding_attention" in report.reason


REFUSED = [
    ("dynamic-yarn", "vllm"),
    ("dynamic-yarn", "transformers"),
    ("dynamic-ntk:2", "sglang"),
    ("dynamic-linear", "llama.cpp"),
    ("yarn:4,ramp=rotations", "llama.cpp"),
    (LONGROPE, "llama.cpp"),
]


@pytest.mark.parametrize(("spec", "target"), REFUSED)
def test_refusals_are_one_line_and_exit_code_2(
    spec: str, target: str, folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [folder, "--for", target, "--scaling", spec]
    assert run_cli(command_line(*arguments)[1]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert run_cli(command_line(*arguments, "--json")[1]) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["status"] == "refused" and report["reason"] in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "vlm"], "did you mean 'vllm'"),
        (["--for", "vllm", "--scaling", "yarn"], "factor is missing"),
        (["--for", "vllm", "--length", "0"], "--length 0 is not allowed"),
        (["--for", "vllm", "--gguf", "a.gguf"], "--for llama.cpp or ollama, and --output"),
        (["--for", "vllm", "--force"], "--force goes with --output"),
        (["--for", "vllm", "--scaling", "yarn:4", "--output", __file__], "--output .*test_export.py is a file"),
        (
            ["--for", "llama.cpp", "--scaling", "yarn:4", "--gguf", "a.gguf", "--output", "out"],
            "'a.gguf' does not exist",
        ),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, folder: str) -> None:
    _, run = command_line(folder, *arguments)
    with pytest.raises(ConfigError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", TARGETS)
def test_a_config_that_says_no_length(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "recurrent_gemma", "num_hidden_layers": 3}')
    arguments = [str(tmp_path), "--for", target, "--scaling"]
    ended = run_cli(command_line(*arguments, "yarn:4,original_max_position_embeddings=2048")[1])
    said = capsys.readouterr()
    assert said.err.startswith("error: ") if ended == 2 else "yarn x4 for" in said.out
    assert run_cli(command_line(*arguments, "default")[1]) == 2
    assert "--length is needed: the config of this 'recurrent_gemma' model says no length" in capsys.readouterr().err


def test_scalings_per_layer_type_and_unknown_architectures_are_refused(config: LlamaConfig) -> None:
    nested = make_config()
    nested.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    report = export(RopeScaling("yarn", 4.0, 512), nested, "vllm", length=2048)
    assert report.status == "refused" and "layer type" in report.reason
    config.model_type = "bloom"
    assert "unknown model_type 'bloom'" in export("yarn:4", config, "llama.cpp").reason
    # Architectures that read no tensor of divisors have flags only.
    config.model_type = "qwen2"
    assert export("yarn:4", config, "llama.cpp").status == "exact"
    for spec in ("yarn:4,truncate=false", "ntk-mixed:4"):
        report = export(spec, config, "llama.cpp")
        assert report.status == "refused" and "tensor of divisors" in report.reason


def gemma3(**settings: Any) -> Any:
    sizes = {"num_hidden_layers": 6, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 64}
    theta = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "max_position_embeddings": 4096}
    return build("gemma3_text", **{**TEXT, **sizes, **theta, **settings})


def test_a_scaling_per_layer_type_is_compared_in_transformers() -> None:
    report = export("yarn:4", gemma3(), "transformers")
    assert report.status == "exact" and {one.layer_type for one in report.comparisons} == {
        "full_attention",
        "sliding_attention",
    }
    rope = report.config["rope_parameters"]
    assert rope["full_attention"]["factor"] == 4.0 and rope["sliding_attention"]["rope_type"] == "default"
    assert report.config["max_position_embeddings"] == 16384
    for target in ("vllm", "llama.cpp"):  # nobody told them yet
        other = export("yarn:4", gemma3(), target)
        assert other.status == "refused" and "export --for transformers" in other.reason
    for spec in ("yarn:4,ramp=rotations", "yarn:4,truncate=false"):
        assert export(spec, gemma3(), "transformers").status == "refused"


def test_a_patched_model_with_a_scaling_per_layer_type_is_served_as_it_is(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(gemma3())
    patch_model(model, "yarn:4")
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    report = export("checkpoint", config, "transformers")
    assert report.status == "exact" and "serve this folder as it is" in report.notes[0]
    report = export("checkpoint", config, "vllm")
    assert report.status == "unknown" and report.comparisons == () and "not compared with ours" in str(report)
    assert report.notes[0].startswith("serve this folder as it is")
    assert report.notes[1].startswith("numbers not compared for vLLM") and "full_attention" in report.notes[1]
    report = export("checkpoint", config, "ollama")
    assert report.status == "refused" and "converter" in report.reason
    _, run = command_line(str(tmp_path), "--for", "transformers", "--output", str(tmp_path / "out"))
    assert run() == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_parameters"] == json.loads((tmp_path / "config.json").read_text())["rope_parameters"]


def test_a_scaling_per_layer_type_that_transformers_computes_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    untruncated = compute_rope(RopeScaling("yarn", 8.0, 4096, rope_theta=1e6), 16)
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "yarn", lambda *args, **kwargs: untruncated)
    report = export("yarn:4", gemma3(), "transformers")
    assert report.status == "refused" and report.reason.startswith("in full_attention layers, from what can be told")


def test_an_export_replaces_another_only_when_told_to(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [folder, "--for", "transformers", "--output", str(out), "--scaling"]
    command_line(*arguments, "yarn:4")[1]()
    first = (out / "config.json").read_text()
    with pytest.raises(ConfigError, match="--output .*out has a config.json; replace it with --force"):
        command_line(*arguments, "yarn:8")[1]()
    assert (out / "config.json").read_text() == first
    (out / "model.safetensors").touch()  # what was copied there stays
    command_line(*arguments, "yarn:8", "--force")[1]()
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["factor"] == 8
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_modelfile_is_not_replaced_either(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "Modelfile").write_text("FROM mine")
    arguments = [folder, "--for", "ollama", "--scaling", "yarn:4", "--output", str(out)]
    with pytest.raises(ConfigError, match="--output .*out has a Modelfile; replace it with --force"):
        command_line(*arguments)[1]()
    assert (out / "Modelfile").read_text() == "FROM mine"
    assert command_line(*arguments, "--force")[1]() == 0
    assert (out / "Modelfile").read_text().startswith("FROM ./MODEL.gguf")


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "text.gguf").write_text("no GGUF")
    arguments = [str(DEFAULT_MODEL), "--for", "llama.cpp", "--scaling", "yarn:8,ramp=rotations", "--output"]
    for out in (tmp_path / "out", tmp_path):
        gguf = str(tmp_path / "text.gguf")
        message = "cannot be read" if out != tmp_path else "which it would overwrite"
        with pytest.raises(ConfigError, match=message):
            command_line(*arguments, str(out), "--gguf", gguf, "--force")[1]()
        assert [path.name for path in tmp_path.iterdir()] == ["text.gguf"]


@pytest.mark.parametrize("spec", ["ntk:4", "abf:4,theta=500000", "yarn:4"])
@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang", "mlx"])
def test_what_is_written_reads_back_as_the_scaling(spec: str, target: str, folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _, run = command_line(folder, "--for", target, "--scaling", spec, "--output", str(out))
    assert run() == 0
    written = json.loads((out / "config.json").read_text())
    own = RopeScaling("default", original_max_position_embeddings=512)
    read, wanted = RopeScaling.read_config(written)[0], resolve_scaling(spec, own)
    assert read == wanted or (target == "sglang" and read.method == "yarn")  # which is told the defaults as well
    assert ("scaled_rope" in written) == (spec != "yarn:4")
    # A scaling on top begins at the model without one.
    again = export("yarn:2", AutoConfig.from_pretrained(out), "transformers", raw=written)
    assert again.scaling == resolve_scaling("yarn:2", own)


def test_a_table_is_written_without_a_record_that_would_be_out_of_date(config: LlamaConfig) -> None:
    assert "scaled_rope" not in export("yarn:4,resonance=true", config, "transformers").config


@pytest.mark.parametrize("target", TARGETS)
def test_the_printed_config_can_be_copied(target: str, config: LlamaConfig) -> None:
    for spec in ("yarn:4", "ntk-mixed:4"):
        report = export(spec, config, target)
        text = str(report)
        block = text[text.index("config.json") :]
        found, _ = json.JSONDecoder().raw_decode(block[block.index("{") :])
        assert found == report.config
        assert report.command in text and max(map(len, block.splitlines())) < 400
        assert re.search(r"^  up to \d+ tokens: same$", text, re.MULTILINE)


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
@pytest.mark.parametrize("spec", ["linear:4", "ntk:4", "yarn:4,beta_fast=64,mscale=0.7", *AS_TABLE, "llama3:4"])
def test_a_written_config_has_the_same_frequencies_in_transformers(
    spec: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The older dialect in the source: rope_scaling would win over rope_parameters if it stayed.
    source, out = tmp_path / "source", tmp_path / "out"
    make_config().save_pretrained(source)
    raw = json.loads((source / "config.json").read_text())
    del raw["rope_parameters"]
    old = {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (source / "config.json").write_text(json.dumps(raw | old))
    _, run = command_line(f"{source}/config.json", "--for", target, "--scaling", spec, "--output", str(out))
    assert run() == 0
    assert f"wrote {out}/config.json" in capsys.readouterr().out
    written = json.loads((out / "config.json").read_text())
    assert set(raw) - {"rope_parameters"} <= set(written)
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(out))
    base = RopeScaling("default", rope_theta=20000.0, original_max_position_embeddings=512)
    ours, factor = compute_rope(resolve_scaling(spec, base), HEAD_DIM, 2048)
    torch.testing.assert_close(rotary.inv_freq, ours, rtol=1e-6, atol=1e-12)
    assert rotary.attention_scaling == pytest.approx(factor)


def test_a_checkpoint_that_carries_its_scaling_needs_no_spec(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 512}
    make_config(rope_parameters=rope, max_position_embeddings=4096).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for target in TARGETS:
        report = export("checkpoint", config, target)
        assert (report.status, report.scaling.factor) == ("exact", 8.0)
        assert report.config["max_position_embeddings"] == 4096


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_a_checkpoint_in_our_own_words_becomes_servable(target: str, tmp_path: Path) -> None:
    """What transformers refuses to build, because it has no name for it, can be spelled out."""
    scaling = RopeScaling("ntk-mixed", 4.0, 512, params={"exponent": 0.5})
    config = make_config(rope_parameters=scaling.to_config(head_dim=HEAD_DIM), max_position_embeddings=2048)
    config.save_pretrained(tmp_path / "custom")
    _, run = command_line(str(tmp_path / "custom"), "--for", target, "--output", str(tmp_path / "out"))
    assert run() == 0
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(rotary.inv_freq, compute_rope(scaling, HEAD_DIM)[0], rtol=1e-6, atol=0)


MINISTRAL = {"head_dim": 16, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
def test_what_attention_reads_from_the_rope_parameters_is_kept(target: str) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}
    rope["original_max_position_embeddings"] = 256
    config = transformers.Ministral3Config(**MINISTRAL, max_position_embeddings=256, rope_parameters=dict(rope))
    for spec in ("default", "linear:4", "yarn:4"):
        report = export(spec, config, target)
        words = report.config["rope_parameters"]
        assert report.status == "exact"
        assert (words["llama_4_scaling_beta"], words["original_max_position_embeddings"]) == (0.1, 256)
        assert 'llama_4_scaling_beta": null' not in " ".join(report.flags)
    # Frequencies are spelled out with another L, which attention would take for its own.
    refused = export("ntk-mixed:4", config, target)
    assert refused.status == "refused" and "the attention of this model reads 256 there" in refused.reason


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", ["yarn:4,attention_temperature=log", "rerope,window=64,logn=true"])
def test_what_tables_cannot_express_is_refused(spec: str, target: str, config: LlamaConfig) -> None:
    report = export(spec, config, target)
    why = "changes attention itself" if "rerope" in spec else "with attention_temperature=log multiplies queries"
    assert report.status == "refused" and f"{why}; no server computes it" in report.reason


def test_a_softmax_scale_that_words_would_drop_is_refused() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
    for scale, status in ((1.0, "refused"), (None, "unknown")):
        rope = yarn | ({"mscale": scale, "mscale_all_dim": scale} if scale else {})
        report = export("checkpoint", transformers.DeepseekV3Config(rope_parameters=rope), "vllm")
        assert report.status == status
        assert ("takes a softmax scale from mscale_all_dim=1.0" in report.reason) == (status == "refused")


def test_a_model_without_rope_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes no RoPE parameters for model_type 'gpt2'"):
        export("default", transformers.GPT2Config(), "vllm")


TEXT: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 1, "vocab_size": 61, "max_position_embeddings": 512},
}


def build(model_type: str, **settings: Any) -> Any:
    return transformers.CONFIG_MAPPING[model_type](**settings)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("spec", ["yarn:4", "linear:4", "ntk:4", "llama3:4", "ntk-mixed:4"])
def test_the_text_part_of_a_composite_model_is_scaled(spec: str, target: str) -> None:
    config = build("llava", text_config={"model_type": "llama", **TEXT})
    report = export(spec, config, target)
    assert report.status == ("unknown" if target in ("mlx", "exllamav3") else "exact")
    assert set(report.config) == {"text_config"}
    if target in ("vllm", "sglang"):
        override = json.loads(next(flag for flag in report.flags if flag.startswith("{")))
        assert set(override) == {"text_config"} and "rope_parameters" in override["text_config"]


@pytest.mark.parametrize(
    ("model_type", "part", "path"),
    [
        ("qwen2_5_omni_thinker", "qwen2_5_omni_text", ["text_config"]),
        ("colqwen2", "qwen2_vl_text", ["vlm_config", "text_config"]),
    ],
)
def test_keys_are_nested_as_deep_as_the_text_part_is(model_type: str, part: str, path: list[str]) -> None:
    report = export("yarn:4", build(model_type), "transformers")
    found = report.config
    for name in path:
        assert list(found) == [name]
        found = found[name]
    assert report.status == "exact" and found["rope_parameters"]["rope_type"] == "yarn"


def test_a_written_composite_config_scales_the_text_part(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build("llava", text_config={"model_type": "llama", **TEXT}).save_pretrained(source)
    assert command_line(str(source), "--for", "transformers", "--scaling", "yarn:4", "--output", str(out))[1]() == 0
    text = AutoConfig.from_pretrained(out).text_config
    assert (text.rope_parameters["factor"], text.max_position_embeddings) == (4.0, 2048)
    raw = json.loads((out / "config.json").read_text())
    assert "rope_parameters" not in raw and raw["vision_config"]


def test_an_older_file_with_the_text_part_on_its_top_level_is_written_as_it_is(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    flat = {**TEXT, "model_type": "qwen2_5_vl", "vision_config": {}, "rope_theta": 1e6, "rope_scaling": rope}
    (source / "config.json").write_text(json.dumps(flat))
    assert command_line(str(source), "--for", "transformers", "--scaling", "yarn:4", "--output", str(out))[1]() == 0
    raw = json.loads((out / "config.json").read_text())
    assert raw["rope_parameters"]["rope_type"] == "yarn" and not {"rope_scaling", "text_config"} & set(raw)
    assert raw["rope_parameters"]["mrope_section"] == [2, 3, 3]
    assert AutoConfig.from_pretrained(out).text_config.rope_parameters["factor"] == 4.0


def test_what_is_printed_is_what_is_compared(config: LlamaConfig) -> None:
    """Words that the target does not find where it looks are no words."""
    real = TARGETS["vllm"]

    def misplaced(request: Any) -> Any:
        for words in real.express(request):
            flags = tuple(flag.replace("rope_parameters", "rope_parameter") for flag in words.flags)
            yield dataclasses.replace(words, flags=flags)

    target = dataclasses.replace(real, express=misplaced)
    for model in (config, build("llava", text_config={"model_type": "llama", **TEXT})):
        report = export("yarn:4", model, target)
        assert report.status == "refused" and "hold no rope_parameters where it reads them" in report.reason


def test_dictionaries_in_a_part_are_merged_by_vllm() -> None:
    carried = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}
    text = TEXT | {"model_type": "llama", "rope_parameters": carried | {"beta_fast": 64.0, "mscale": 0.7}}
    report = export("yarn:4", build("llava", text_config=text), "vllm")
    override = json.loads(next(flag for flag in report.flags if flag.startswith("{")))
    rope = override["text_config"]["rope_parameters"]
    assert report.status == "exact" and (rope["beta_fast"], rope["mscale"]) == (32.0, None)


@pytest.mark.parametrize(
    ("model_type", "target", "spec", "reason"),
    [
        *(
            (name, "sglang", "yarn:4", f"its class for {name} models passes no scaling to the rotary embedding")
            for name in ("phi", "stablelm", "gemma", "gemma2", "mixtral", "olmo")
        ),
        ("gpt_oss", "vllm", "yarn:4,attention_factor=1.0", "attention factor 1.13863 instead of 1; in other words"),
        ("gpt_oss", "vllm", "linear:4", "its gpt_oss class reads beta_fast and takes nothing but YaRN"),
        ("cohere", "vllm", "ntk-mixed:4", r"refuses the rotation of cohere models \(only neox_style\)"),
        ("cohere", "sglang", "ntk-mixed:4", r"refuses the rotation of cohere models \(only neox_style\)"),
        ("cohere2", "vllm", "yarn:4,resonance=true", r"refuses the rotation of cohere2 models \(only neox_style\)"),
        ("cohere2", "sglang", "yarn:4,resonance=true", r"refuses the rotation of cohere2 models \(only neox_style\)"),
        ("qwen2_5_vl", "vllm", "linear:4", "rope_type 'linear' has no form there with mrope_section"),
        ("qwen2_5_vl", "sglang", "llama3:4", "rope_type 'llama3' has no form there with mrope_section"),
    ],
)
def test_what_a_class_does_not_do_is_refused_by_name(model_type: str, target: str, spec: str, reason: str) -> None:
    settings = TEXT | ({"layer_types": ["full_attention"]} if model_type == "gpt_oss" else {})
    if model_type == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        settings = {"text_config": TEXT | {"rope_parameters": rope}}
    report = export(spec, build(model_type, **settings), target)
    assert report.status == "refused" and re.search(reason, report.reason), report.reason


def test_the_gpt_oss_class_of_vllm_gets_every_key_that_it_reads() -> None:
    """It stops with a KeyError where one is missing."""
    report = export("yarn:4", build("gpt_oss", **TEXT, layer_types=["full_attention"]), "vllm")
    override = json.loads(next(flag for flag in report.flags if flag.startswith("{")))
    for rope in (override["rope_parameters"], report.config["rope_parameters"]):
        assert {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow"} <= set(rope)
    assert report.status == "exact"


def test_llama3_for_an_existing_gguf_is_a_copy_with_the_tensor(tmp_path: Path) -> None:
    """Flags alone would leave it unscaled."""
    pytest.importorskip("gguf")
    source, out = tmp_path / "tiny.gguf", tmp_path / "out"
    write_checkpoint(DEFAULT_MODEL, source, GgufRope())
    arguments = [str(DEFAULT_MODEL), "--for", "llama.cpp", "--scaling", "llama3:8", "--gguf", str(source), "--output"]
    assert command_line(*arguments, str(out))[1]() == 0
    divisors = read_gguf_rope(out / "tiny.gguf").divisors
    assert divisors is not None and divisors[0] == 1 and divisors[-1] == pytest.approx(8)


def test_an_earlier_copy_is_cleaned_for_a_scaling_that_flags_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The divisors and the attention factor in it would be multiplied with those of the flags."""
    pytest.importorskip("gguf")
    plain, first, second = tmp_path / "tiny.gguf", tmp_path / "first", tmp_path / "second"
    write_checkpoint(DEFAULT_MODEL, plain, GgufRope())
    with pytest.raises(ConfigError, match=r"--gguf is not needed: .* 'yarn x8', and .*tiny.gguf holds no scaling"):
        copy_of("yarn:8", plain, first)
    copy_of("yarn:8,ramp=rotations", plain, first)
    held = read_gguf_rope(first / "tiny.gguf")
    assert held.divisors is not None and "llama.rope.scaling.attn_factor" in held.metadata
    capsys.readouterr()
    copy_of("yarn:8", first / "tiny.gguf", second)
    told = capsys.readouterr().out
    assert "holds a scaling (llama.rope.scaling.type, llama.rope.scaling.attn_factor, tensor rope_freqs.weight)" in told
    assert "no rope.scaling keys and no divisors" in told and "--rope-scaling yarn" in told
    copied = read_gguf_rope(second / "tiny.gguf")
    assert copied.divisors is None and not any("scaling" in key for key in copied.metadata)


def copy_of(spec: str, gguf: Path, out: Path) -> None:
    arguments = [str(DEFAULT_MODEL), "--for", "llama.cpp", "--scaling", spec, "--gguf", str(gguf)]
    assert command_line(*arguments, "--output", str(out))[1]() == 0


@pytest.mark.parametrize("target", TARGETS)
def test_no_composite_config_is_told_on_its_top_level(target: str) -> None:
    """Nobody reads it there. SGLang's classes for three families do, and are told in both places."""
    report = export("yarn:4", build("llava", text_config={"model_type": "llama", **TEXT}), target)
    assert not {"rope_parameters", "rope_scaling", "rope_theta"} & set(report.config)
    for flag in report.flags:
        assert not flag.startswith("{") or set(json.loads(flag)) == {"text_config"}


def test_a_base_that_is_cut_to_a_whole_number_is_another_base() -> None:
    config = build("mixtral", **TEXT)
    assert export("default", config, "sglang").status == "exact"
    assert export("abf,theta=50000", config, "sglang").status == "exact"
    report = export("abf,theta=20.5", config, "sglang")
    assert report.status == "refused" and "SGLang computes frequencies up to " in report.reason


@pytest.mark.parametrize("spec", ["yarn:4", "ntk-mixed:4", "linear:4"])
def test_families_that_vllm_runs_with_the_models_of_transformers(spec: str) -> None:
    for model_type in ("gpt_neox", "olmo2", "hunyuan_v1_dense"):
        assert export(spec, build(model_type, **TEXT), "vllm").status == "exact"


def test_who_ignores_rope_parameters_is_said(config: LlamaConfig) -> None:
    older = {"transformers": "transformers 4", "vllm": "vLLM 0.11", "sglang": "SGLang 0.5.3"}
    for target, name in older.items():
        text = f"{name} and older read rope_scaling and rope_theta instead, and ignore rope_parameters"
        flags = "" if target == "transformers" else ", the flags do not"
        assert f"{text}; config.json has them as well{flags}" in export("yarn:4", config, target).notes
        notes = export("yarn:4,truncate=false", config, target).notes
        assert any(note.startswith(f"{text}; they are not written as well: vLLM 0.11") for note in notes)
        assert not any(text in note for note in export("default", config, target).notes)


@pytest.mark.parametrize(("target", "package"), [("vllm", "vllm"), ("sglang", "sglang"), ("mlx", "mlx-lm")])
def test_the_release_is_said_and_another_that_is_installed_is_pointed_out(
    target: str, package: str, config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TARGETS[target]
    assert real.package_version == real.version and real.version in real.basis

    def installed(name: str, version: str) -> list[str]:
        monkeypatch.setattr("importlib.metadata.version", lambda asked: {name: version}[asked])
        return [note for note in export("yarn:4", config, target).notes if "is installed here" in note]

    (note,) = installed(package, "9.8.7")
    assert note.startswith(f"{package} 9.8.7 is installed here, and this is about {real.version}: ")
    assert not installed(package, real.version)
    text = str(export("yarn:4", config, target))
    assert f"basis: {real.basis}" in text


def test_a_program_that_is_not_installed_is_no_reason_to_warn(
    config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", missing)
    assert not any("is installed here" in note for note in export("yarn:4", config, "vllm").notes)


@pytest.mark.parametrize("target", ["transformers", "vllm", "sglang"])
@pytest.mark.parametrize(
    ("spec", "older"),
    [("default", {}), ("ntk:4", {}), ("linear:4", {"type": "linear", "factor": 4.0}), ("yarn:4", {"type": "yarn"}),
     ("llama3:4", {"type": "llama3"}), ("ntk-mixed:4", None), ("yarn:4,attention_factor=1.0", None)],
)  # fmt: skip
def test_a_written_config_says_it_in_both_dialects(
    spec: str, older: dict[str, Any] | None, target: str, tmp_path: Path
) -> None:
    make_config().save_pretrained(tmp_path / "source")
    arguments = [str(tmp_path / "source"), "--for", target, "--scaling", spec, "--output", str(tmp_path / "out")]
    assert command_line(*arguments)[1]() == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("rope_theta" in written) == (older is not None)
    assert ("rope_scaling" in written) == bool(older)
    if older is not None:
        assert written["rope_theta"] == written["rope_parameters"]["rope_theta"]
    if older:
        assert written["rope_scaling"].items() >= older.items()
    base = RopeScaling("default", original_max_position_embeddings=512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RopeScaling.from_config(written).label
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path / "out"))
    ours, factor = compute_rope(resolve_scaling(spec, base), HEAD_DIM, 2048)
    torch.testing.assert_close(rotary.inv_freq, ours, rtol=1e-6, atol=1e-12)
    assert rotary.attention_scaling == pytest.approx(factor)


@pytest.mark.parametrize("target", ["trl", "verl"])
def test_the_composite_config_is_nested_for_trainers_too(target: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    build("llava", text_config={"model_type": "llama", **TEXT}).save_pretrained(source)
    assert command_line(str(source), "--for", target, "--scaling", "yarn:4", "--output", str(out))[1]() == 0
    raw = json.loads((out / "config.json").read_text())
    assert raw["text_config"]["rope_scaling"]["factor"] == 4.0 and not {"rope_parameters", "rope_scaling"} & set(raw)
    assert "512" not in (out / f"{target}.yaml").read_text() and "2048" in (out / f"{target}.yaml").read_text()


def test_phi_3_5_moe_gets_the_factor_that_its_tables_are_multiplied_by() -> None:
    report = export("yarn:4", build("phimoe", **TEXT), "transformers")
    rope = report.config["rope_parameters"]
    assert report.status == "exact" and rope["short_mscale"] == rope["long_mscale"] == rope["attention_factor"]
    assert RopeScaling.from_config({"model_type": "phimoe", **report.config}).label == "yarn x4"


@pytest.mark.parametrize("length", [None, 131072, 200000])
def test_a_factor_that_does_not_say_the_length_is_not_advised_on(length: int | None) -> None:
    """Llama 3.1 is for 131072 tokens, and its factor of 8 is right for them: 16 would break it."""
    config = LlamaConfig(**{name: value for name, value in LLAMA3.items() if name != "model_type"})
    notes = [note for note in export("checkpoint", config, "vllm", length).notes if "is beyond" in note]
    expected = "length=200000 is beyond the 131072 tokens that 'llama3 x8' is for"
    assert notes == ([expected] if length == 200000 else [])
    (note,) = (note for note in export("yarn:4", config, "vllm", 65536).notes if "is beyond" in note)
    assert note == "length=65536 is beyond the 32768 tokens that 'yarn x4' is for; a factor of 8 reaches it"
