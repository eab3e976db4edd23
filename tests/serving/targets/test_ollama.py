"""What Ollama makes of an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.serving.export import export
from scaled_rope.serving.gguf import read_gguf_rope, write_checkpoint
from tests.helpers.exports import command_line


def test_no_flag_reaches_it_so_the_gguf_holds_it_all(config: LlamaConfig) -> None:
    report = export("yarn:4", config, "ollama")
    assert report.status == "exact" and not report.flags and report.converts
    assert report.gguf is not None and report.gguf.divisors is None
    assert report.gguf.metadata == {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 512,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.rope.freq_base": 1e4,
        "llama.context_length": 2048,  # num_ctx is cut to it
    }
    assert report.files == {"Modelfile": "FROM ./MODEL.gguf\nPARAMETER num_ctx 2048\n"}
    assert any("gives no RoPE flag on" in note for note in report.notes)


@pytest.mark.parametrize("spec", ["yarn:4,beta_slow=4", "yarn:4,attention_factor=1.0", "ntk-mixed:4"])
def test_what_the_metadata_cannot_say_is_a_tensor(spec: str, config: LlamaConfig) -> None:
    report = export(spec, config, "ollama")
    assert report.status == "exact" and not report.converts
    assert report.gguf is not None and report.gguf.metadata["llama.rope.scaling.type"] == "none"
    assert len(report.gguf.divisors or ()) == 8


def test_llama3_is_a_tensor_that_the_converter_writes_too(config: LlamaConfig) -> None:
    report = export("llama3:4", config, "ollama")
    assert report.status == "exact" and report.converts
    assert report.gguf is not None and max(report.gguf.divisors or ()) == pytest.approx(4)


def test_an_architecture_without_the_tensor_has_metadata_alone() -> None:
    config = AutoConfig.for_model("qwen2", hidden_size=64, num_attention_heads=4, max_position_embeddings=512)
    assert export("yarn:4", config, "ollama").status == "exact"
    for spec in ("yarn:4,beta_slow=4", "llama3:4"):
        report = export(spec, config, "ollama")
        assert report.status == "refused" and "its qwen2 models read no tensor of divisors" in report.reason


def test_a_copy_and_its_modelfile_are_written(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from scaled_rope.serving.gguf import GgufRope

    source, out = tmp_path / "tiny.gguf", tmp_path / "out"
    write_checkpoint(DEFAULT_MODEL, source, GgufRope())
    arguments = [str(DEFAULT_MODEL), "--for", "ollama", "--scaling", "yarn:8", "--gguf", str(source), "--output"]
    assert command_line(*arguments, str(out))[1]() == 0
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "config.json", "tiny.gguf"]
    assert (out / "Modelfile").read_text() == "FROM ./tiny.gguf\nPARAMETER num_ctx 2048\n"
    held = read_gguf_rope(out / "tiny.gguf").metadata
    assert held["llama.rope.scaling.type"] == "yarn" and held["llama.rope.scaling.factor"] == 8.0
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 2048
