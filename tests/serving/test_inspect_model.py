"""Traps in loaded models."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from scaled_rope import patch_model
from scaled_rope.cli import main
from scaled_rope.serving import inspect_config
from scaled_rope.serving.inspect_model import check_model


def codes(model: torch.nn.Module) -> list[str]:
    return sorted(finding.code for finding in check_model(model))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
EDITED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def test_a_model_that_computes_what_its_config_says(tiny_model):
    assert codes(tiny_model()) == []
    assert codes(tiny_model(rope_parameters=dict(YARN))) == []
    assert codes(tiny_model().to(torch.float64)) == []
    patched = tiny_model()
    patch_model(patched, "yarn:4,ramp=rotations")
    assert codes(patched) == []
    assert codes(patched.to(torch.bfloat16)) == []  # patched models keep float32 frequencies


def test_an_edit_of_a_loaded_models_config_has_no_effect(tiny_model, tokens):
    model = tiny_model(rope_parameters=dict(YARN))
    before = model(tokens).logits
    model.config.rope_parameters = dict(EDITED)
    assert torch.equal(model(tokens).logits, before)  # that is the trap
    assert codes(model) == ["edited-after-load"]
    patched = tiny_model()
    patch_model(patched, "yarn:4")
    patched.config.rope_parameters = dict(EDITED)
    assert codes(patched) == ["edited-after-load"]


def test_rope_parameters_without_theta(tiny_model):
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    assert codes(model) == ["no-live-theta"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_that_lost_float32(tiny_model, dtype: torch.dtype):
    exact = tiny_model().model.rotary_emb.inv_freq
    model = tiny_model(max_position_embeddings=4096).to(dtype)
    (finding,) = check_model(model)
    assert (finding.code, finding.level) == ("frequencies-cast", "error")
    radians = float(re.search(r"up to (\S+) radians", finding.text)[1])
    expected = float((exact.to(dtype).double() - exact.double()).abs().max()) * 4096
    assert radians == pytest.approx(expected, rel=0.01)  # three digits are printed


def test_a_checkpoint_loaded_in_bfloat16_keeps_its_frequencies(tiny_model, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    assert codes(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) == []


def test_a_dynamic_module_remembers_longer_inputs(tiny_model, tokens):
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert codes(model) == []
    model(tokens)
    assert codes(model) == ["dynamic-state"]


def test_a_model_whose_code_has_other_constants(tiny_model):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model("mistral", rope_parameters=rope | {"finetuned": True})
    assert codes(model) == ["computes-otherwise"]


def test_entries_per_layer_type_where_layers_share_one_table(tiny_model):
    model = tiny_model(rope_parameters={"full_attention": dict(YARN)})
    assert codes(model) == ["computes-otherwise"]


def test_a_rotary_module_that_is_not_used():
    config = FalconConfig(
        vocab_size=61, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, alibi=True, ffn_hidden_size=48
    )
    assert codes(FalconForCausalLM(config)) == ["alibi"]


def test_weights(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_model("mistral", rope_parameters=dict(YARN) | {"finetuned": True}, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path), "--weights"]) == 1
    assert "[computes-otherwise]" in capsys.readouterr().out
    patch_model(model, "yarn:4,ramp=rotations")  # transformers cannot load this one
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--weights", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    (refused,) = [finding for finding in findings if finding["code"] == "transformers-refuses"]
    assert refused["level"] == "info" and "does not load this model (" in refused["text"]


def test_weights_that_transformers_itself_refuses(
    tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny_model().save_pretrained(tmp_path)

    def refuse(error: Exception) -> None:
        def from_pretrained(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(inspect_config.transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)

    monkeypatch.setattr(inspect_config, "load_model", lambda folder: tiny_model())
    refuse(RuntimeError("no such layer.\nand more"))
    assert main(["inspect", str(tmp_path), "--weights", "--json"]) == 1
    (refused,) = json.loads(capsys.readouterr().out)["findings"]
    assert (refused["code"], refused["level"]) == ("transformers-refuses", "error")
    assert "does not load this model (RuntimeError: no such layer); the weights were looked at as" in refused["text"]
    for error in (MemoryError(), torch.OutOfMemoryError()):
        refuse(error)
        with pytest.raises(type(error)):  # no refusal: another way to load it would need as much
            inspect_config.run(inspect_arguments(str(tmp_path)))


def inspect_arguments(folder: str) -> argparse.Namespace:
    return argparse.Namespace(
        model=folder, layer_type=None, scaling=None, length=None, weights=True, plot=None, json=True, full=False
    )
