"""A random model of 64 positions with a tokenizer that knows the passkey prompt, and texts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from scaled_rope.evaluation.passkey_prompts import FILLER, KEY_LINE, OPENING, QUESTION
from scaled_rope.patching.loss import IGNORE
from scaled_rope.results import Row

TRAINED = 64
VOCABULARY = 400


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the passkey prompt's words, so that prompts are short; digits are single."""
    inner = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([OPENING, FILLER, KEY_LINE, QUESTION] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def new_model(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        **sizes,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=TRAINED,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=None,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model and its tokenizer on disk."""
    folder = tmp_path_factory.mktemp("models") / "random"
    new_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three documents of about 1000, 600 and 100 tokens."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = [word for line in (OPENING, FILLER, QUESTION) for word in line.split()]
    for name, count in (("a", 700), ("b", 420), ("c", 60)):
        (folder / f"{name}.txt").write_text(" ".join(rng.choice(words, count)))
    return str(folder)


def measured(rows: list[Row]) -> list[Row]:
    """Rows without what differs between two runs of the same thing."""
    differ = ("provenance", "seconds", "tokens_per_second", "peak_memory")
    return [{key: value for key, value in row.items() if key not in differ} for row in rows]


def full_nll(model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The textbook way: all logits at once."""
    return F.cross_entropy(model(ids).logits.float().transpose(1, 2), targets, ignore_index=IGNORE, reduction="none")
