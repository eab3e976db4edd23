"""Arguments of lm-eval's model type, without lm-eval."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.lm_eval_arguments import (
    NOT_HERE,
    at_revision,
    dtype_name,
    longest_prompt,
    one_of_two,
    placement_of,
    refuse_unknown,
    rows_per_pass,
)
from scaled_rope.patching.device_maps import Placement


def test_only_defaults_of_what_has_no_effect_are_taken() -> None:
    defaults = {"logits_cache": True, "max_batch_size": 64}
    refuse_unknown({"logits_cache": True, "max_batch_size": 64, "gguf_file": None}, ["scaling"], defaults)
    for name in NOT_HERE:
        with pytest.raises(ConfigError, match=f"model argument {name}=3 has no effect under scaled-rope: "):
            refuse_unknown({name: 3}, ["scaling"], defaults)
    with pytest.raises(ConfigError, match=r"unknown model argument scales=1; did you mean 'scaling'\? known: scaling"):
        refuse_unknown({"scales": 1}, ["scaling"], defaults)


def test_two_names_for_one_thing() -> None:
    assert one_of_two("a", None, "b", None) is None
    assert one_of_two("a", "x", "b", None) == one_of_two("a", None, "b", "x") == one_of_two("a", "x", "b", "x") == "x"
    assert one_of_two("a", "auto", "b", "x", "auto") == "x"
    with pytest.raises(ConfigError, match="a='x' and b='y' mean the same"):
        one_of_two("a", "x", "b", "y")


def test_numbers() -> None:
    assert [rows_per_pass(value) for value in (None, "auto", "auto:4", 3, "7")] == [None, None, None, 3, 7]
    for value in (0, "-1", "autos", 1.5):
        with pytest.raises(ConfigError, match="batch_size="):
            rows_per_pass(value)
    assert longest_prompt(None, 9) == 9 and longest_prompt(64, 9) == 64
    for value in (0, 1, "64", True):
        with pytest.raises(ConfigError, match="max_length="):
            longest_prompt(value, 9)


def test_dtypes() -> None:
    class Config(SimpleNamespace):
        def get_text_config(self, decoder: bool | None = None) -> Any:
            return self

    assert dtype_name("auto", Config(dtype=torch.bfloat16)) == "bfloat16"
    assert dtype_name("auto", Config()) == "float32" == dtype_name(torch.float32, Config(dtype="float16"))
    assert dtype_name("float16", Config()) == "float16"


def test_parallelize(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (100 + gpu, 200))
    assert placement_of(True) is None and placement_of(False, offload_folder="./offload") is None
    assert placement_of(True, None, "5MB", "x") == Placement("auto", {0: "100", "cpu": "5MB"}, "x")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert placement_of(True) == Placement("auto", {0: "100", 1: "101"})
    assert placement_of(True, "20GiB") == Placement("auto", {0: "20GiB", 1: "20GiB"})
    with pytest.raises(ConfigError, match="max_cpu_memory='5MB': goes with parallelize=True"):
        placement_of(False, None, "5MB")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="parallelize=True: is for one process, not 2"):
        placement_of(True)


def test_revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns[0]))
        return str(tmp_path)

    (tmp_path / "part").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert at_revision("owner/name", "main") == at_revision("owner/name", None) == "owner/name" and not asked
    assert at_revision("owner/name", "v2") == str(tmp_path)
    assert at_revision("owner/name", "main", "part") == str(tmp_path / "part")
    assert asked == [("owner/name", "v2", "*.json"), ("owner/name", "main", "part/*.json")]
    assert at_revision(str(tmp_path), "main", "part") == str(tmp_path / "part")
    with pytest.raises(ConfigError, match="is a folder, which has no revisions"):
        at_revision(str(tmp_path), "v2")
    with pytest.raises(ConfigError, match="subfolder='other'"):
        at_revision(str(tmp_path), "main", "other")
    with pytest.raises(ConfigError, match="does not exist"):
        at_revision("name", "v2")
