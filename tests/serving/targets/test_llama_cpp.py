"""What llama.cpp makes of an export."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from benchmarks import gguf_parity
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.export import export
from scaled_rope.serving.targets import common, llama_cpp
from scaled_rope.serving.targets.common import Expressed
from scaled_rope.serving.targets.registry import TARGETS
from tests.helpers.exports import HEAD_DIM, flags_of, make_config


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1 / (1 + 0.1 * math.log(4))), (1.4, None)])
def test_llama_cpp_gets_the_attention_factor_relative_to_its_own(
    factor: float, expected: float | None, config: LlamaConfig
) -> None:
    report = export(f"yarn:4,attention_factor={factor}", config, "llama.cpp")
    key, _, value = flags_of(report)["--override-kv"].partition("=float:")
    assert key == "llama.rope.scaling.attn_factor"
    assert float(value) == pytest.approx(expected or 1.4 / (1 + 0.1 * math.log(4)))
    assert "--yarn-attn-factor" not in report.flags
    assert "--override-kv" not in export("yarn:4", config, "llama.cpp").flags


@pytest.mark.parametrize("spec", ["yarn:4", "linear:4", "ntk:4", "yarn:4,beta_fast=64,extrapolation_factor=0.5"])
def test_llama_cpp_flags_read_back_as_what_was_compared(spec: str, config: LlamaConfig) -> None:
    report = export(spec, config, "llama.cpp")
    given, override = gguf_parity.read_flags(report.flags)
    if "llama.rope.scaling.attn_factor" in override:
        given["attn_factor"] = override["llama.rope.scaling.attn_factor"]
    request = common.ServedModel(resolve_scaling(spec, RopeScaling.from_config(config)), config, HEAD_DIM, 2048)
    restated = TARGETS["llama.cpp"].restate(request, Expressed(given, {}), 2048)
    ours, factor = compute_rope(request.scaling, HEAD_DIM)
    np.testing.assert_allclose(restated.inv_freq, ours, rtol=1e-6)
    assert restated.attention_factor == pytest.approx(factor, rel=1e-6)


def test_the_servers_context_is_not_cut_to_that_of_the_gguf(config: LlamaConfig) -> None:
    """It takes min(-c, context_length of the GGUF), and with YaRN's flags min(-c, scale · L)."""
    for spec in ("linear:4", "ntk:4", "llama3:4", "yarn:4,truncate=false"):
        assert "llama.context_length=int:2048" in export(spec, config, "llama.cpp").flags, spec
    for spec in ("default", "yarn:4"):
        assert "--override-kv" not in export(spec, config, "llama.cpp").flags, spec
    longer = export("yarn:4", config, "llama.cpp", 4096)
    assert longer.status == "exact" and longer.gguf is not None  # spelled out: by its flags it ends at 2048
    assert "llama.context_length=int:4096" in longer.flags


def test_llama3_needs_a_conversion_or_a_copy(config: LlamaConfig, tmp_path: Path) -> None:
    report = export("llama3:4", config, "llama.cpp")
    assert report.status == "exact" and report.converts and report.gguf is not None
    assert len(report.gguf.divisors or ()) == HEAD_DIM // 2 and max(report.gguf.divisors or ()) == pytest.approx(4)
    assert any(note.startswith("flags alone leave a GGUF unscaled") for note in report.notes)
    # The flags by themselves are those of an unscaled model.
    request = common.ServedModel(report.scaling, config, HEAD_DIM, 2048)
    bare = llama_cpp.restate(request, Expressed(llama_cpp.read_flags(report.flags), {}), 2048)
    np.testing.assert_allclose(bare.inv_freq, compute_rope(RopeScaling("default"), HEAD_DIM)[0], rtol=1e-6)


def test_divisors_that_a_gguf_holds_must_go() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 512}
    config = make_config(rope_parameters=rope | {"low_freq_factor": 1.0, "high_freq_factor": 4.0})
    for spec in ("yarn:4", "default"):
        report = export(spec, config, "llama.cpp")
        assert report.gguf is not None and set(report.gguf.divisors or ()) == {1.0} and report.converts
        assert any("holds the divisors of the scaling that the checkpoint carries" in note for note in report.notes)
    own = export("checkpoint", config, "llama.cpp")
    assert own.gguf is not None and len(set(own.gguf.divisors or ())) > 1
