"""What classes of engines pass on: the data that was read from their sources, and the script that reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.engines import classes as script
from scaled_rope.errors import ConfigError
from scaled_rope.serving.targets import sglang, vllm
from scaled_rope.serving.targets.classes import passes, version
from scaled_rope.serving.targets.registry import TARGETS


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_data_is_of_the_release_that_is_restated(engine: str) -> None:
    assert version(engine) == TARGETS[engine].version


@pytest.mark.parametrize(("engine", "families"), [("vllm", vllm._OWN_CLASSES), ("sglang", sglang._PASSES_SCALING)])
def test_families_that_are_called_known_pass_everything_on(engine: str, families: tuple[str, ...]) -> None:
    followed = {family: passes(engine, family) for family in families}
    assert set(followed.values()) <= {"all", ""}
    assert sum(said == "all" for said in followed.values()) >= len(families) - 8  # the others were read by hand


@pytest.mark.parametrize(
    ("family", "said"),
    [("gemma", "base"), ("gemma2", "base"), ("phi", "base"), ("stablelm", "base"), ("mixtral", "whole base"),
     ("llama", "all"), ("qwen3", "all"), ("no_such_family", "")],
)  # fmt: skip
def test_families_of_sglang(family: str, said: str) -> None:
    assert passes("sglang", family) == said


MODELS = {
    "plain": """
class Attention:
    def __init__(self, config):
        self.rotary_emb = get_rope(64, rope_parameters=config.rope_parameters)
class PlainForCausalLM:
    def __init__(self, config):
        self.layers = [Attention(config)]
EntryClass = PlainForCausalLM
""",
    "handed": """
from engine.models.plain import Attention
class HandedForCausalLM:
    layer = Attention
class OwnAttention:
    def __init__(self, config):
        rope_parameters = getattr(config, "rope_parameters", None)
        rope_parameters["factor"] = 1.0
        self.rotary_emb = get_rope(64, rope_parameters=rope_parameters)
class EditedForCausalLM:
    layer = OwnAttention
EntryClass = [HandedForCausalLM, EditedForCausalLM]
""",
    "base": """
class Attention:
    def __init__(self, config):
        self.rope_theta = config.rope_parameters["rope_theta"]
        self.rotary_emb = get_rope(64, rotary_dim=64, max_position=4096, base=self.rope_theta)
class BaseForCausalLM:
    layer = Attention
class Cut:
    def __init__(self, config):
        self.rotary_emb = get_rope(64, 64, 4096, int(config.rope_theta))
class CutForCausalLM:
    layer = Cut
class BothForCausalLM:
    layers = (Attention, Cut)
EntryClass = [BaseForCausalLM, CutForCausalLM, BothForCausalLM]
""",
}


def test_the_script_follows_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / script.PLACES["sglang"]
    folder.mkdir(parents=True)
    for name, text in MODELS.items():
        (folder / f"{name}.py").write_text(text)
    found = script.read_engine("sglang", tmp_path)
    assert found == {
        "PlainForCausalLM": "all",
        "HandedForCausalLM": "all",
        "EditedForCausalLM": "unknown: rope_parameters",
        "BaseForCausalLM": "base",
        "CutForCausalLM": "whole base",
        "BothForCausalLM": "unknown: base | whole base",
    }
    output = tmp_path / "data.json"
    line = ["classes.py", "sglang", "1.0", str(tmp_path), "--output", str(output)]
    monkeypatch.setattr("sys.argv", line)
    assert script.main() == 0
    assert json.loads(output.read_text())["sglang"] == {"version": "1.0", "passes": found}
    with pytest.raises(ConfigError, match="holds no"):
        script.read_engine("vllm", tmp_path)
