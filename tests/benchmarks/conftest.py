"""A folder in which the SmolLM2 runs are prepared."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import smollm2_32k_prepare
from benchmarks.smollm2_32k_prepare import Text
from scaled_rope.checkpoint import DEFAULT_MODEL
from tests.helpers.offline_benchmarks import archives  # noqa: F401
from tests.helpers.smollm2 import pack_training_set


def prose(seed: int, words: int) -> str:
    rng = np.random.default_rng(seed)
    vocabulary = "the a cat king house sees walks over under green old and then rain of to night morning".split()
    return " ".join(rng.choice(vocabulary, words).tolist()) + f". The {seed}th end.\n"


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archives: list[str]) -> Path:
    """A folder with the recipe and what the preparation made for it: texts of 600 words, windows of 256 tokens."""
    for name, seeds in (("train", (1, 2, 3)), ("heldout", (4, 5)), ("addresses", (6, 7, 8))):
        (tmp_path / name).mkdir()
        for seed in seeds:
            (tmp_path / name / f"{seed}.txt").write_text(prose(seed, 600))
    model, bundle = tmp_path / "base", tmp_path / "bundle"
    shutil.copytree(DEFAULT_MODEL, model)
    fields: dict[str, Any] = {
        "model": str(model), "scaling": "yarn:4", "sequence_length": 192, "global_batch_size": 2, "max_train_steps": 3,
        "warmup_steps": 1, "learning_rate": 1e-4, "checkpointing_steps": 1, "gradient_checkpointing": False,
        "prepare": [f"echo done >> {tmp_path}/commands"],
        "dataset": str(bundle / "train"), "output_dir": str(tmp_path / "trained"),
        "evaluate": {
            "scalings": ["default", "yarn:4"],
            "perplexity": f"--dataset {bundle}/books --dataset {bundle}/addresses --lengths 64,256",
            "passkey": "--lengths 128,256 --iterations 2",
        },
    }  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(fields))
    pack_training_set(tmp_path)
    texts = {
        "books": Text((f"{tmp_path}/heldout/*.txt",), windows=2),
        "addresses": Text((str(tmp_path / "addresses"),), windows=3, joined=True),
    }
    monkeypatch.setattr(smollm2_32k_prepare, "TEXTS", texts)
    monkeypatch.setattr(smollm2_32k_prepare, "QUESTIONS", {"truthfulqa_mc2": None})
    return tmp_path
