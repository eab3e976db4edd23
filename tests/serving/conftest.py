"""A config to be exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from tests.helpers.exports import make_config


@pytest.fixture
def config() -> LlamaConfig:
    return make_config()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    path = tmp_path / "model"
    make_config().save_pretrained(path)
    return str(path)
