"""A model and texts of the numbers 2 to 23, a token each, and the perplexity script on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import eval.perplexity as perplexity
from scaled_rope.evaluation import perplexity_evaluator
from scaled_rope.patching.loss import token_nll
from scaled_rope.results import Row, read_rows

VOCABULARY = 24
TRAINED = 16
SIZES = (150, 90, 40, 33, 7)
"""Tokens of the documents."""


def save(model: PreTrainedModel, folder: Path, bos: bool = True) -> str:
    """A checkpoint whose tokens are the words "2" … "23"."""
    words = {"<s>": 0, "<unk>": 1, **{str(word): word for word in range(2, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", **({"bos_token": "<s>"} if bos else {})
    ).save_pretrained(folder)
    return str(folder)


def new_model(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        **{**sizes, **settings},
        vocab_size=VOCABULARY,
        max_position_embeddings=TRAINED,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(new_model(), tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(new_model(seed=1), tmp_path_factory.mktemp("models") / "other")


@pytest.fixture(scope="module")
def bodies() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCABULARY, size).tolist() for size in SIZES]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, bodies: list[list[int]]) -> str:
    folder = tmp_path_factory.mktemp("data") / "texts"
    folder.mkdir()
    for number, body in enumerate(bodies):
        (folder / f"{number}.txt").write_text(" ".join(map(str, body)))
    return str(folder)


def evaluate(output: Path, *argv: str, code: int = 0) -> list[Row]:
    """Run the evaluator in this process and read back its rows."""
    assert perplexity.main([*argv, "--device", "cpu", "--hide-progress", "--output", str(output)]) == code
    return read_rows(output)


def same(rows: list[Row]) -> list[Row]:
    """Rows without what differs between two runs of the same thing."""
    differ = ("provenance", "seconds", "tokens_per_second", "peak_memory")
    return [{key: value for key, value in row.items() if key not in differ} for row in rows]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the forward passes."""
    shapes: list[tuple[int, ...]] = []

    def counting(model: Any, ids: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return token_nll(model, ids, *rest, **more)

    monkeypatch.setattr(perplexity_evaluator, "token_nll", counting)
    return shapes
