"""Tokenizers that write numbers differently, a random model, and a story."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from scaled_rope.evaluation.choice_prompts import AFTER_STORY, BEFORE_STORY, OMITTED
from scaled_rope.evaluation.passkey_prompts import FILLER, HARD_KEY_LINE, HARD_QUESTION, OPENING

TRAINED = 64
STORY = "A grey cat sat by the sea, and the sea sang to it of ships. Then the rain came. "


def wrap(inner: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def train(inner: Tokenizer, texts: list[str], size: int, alphabet: list[str]) -> PreTrainedTokenizerFast:
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    return wrap(inner)


WORDS = [OPENING, FILLER, HARD_KEY_LINE, HARD_QUESTION, STORY, BEFORE_STORY, AFTER_STORY, OMITTED]


def single_digits() -> PreTrainedTokenizerFast:
    """Byte-level, a token per digit."""
    inner = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    inner.decoder = decoders.ByteLevel()
    return train(inner, WORDS * 10, 512, pre_tokenizers.ByteLevel.alphabet())


def merged_digits() -> PreTrainedTokenizerFast:
    """Byte-level, several digits in a token, a blank in front of them included."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    rng = random.Random(0)
    numbers = [f"is {rng.randrange(10**5)}. {rng.randrange(10**5)} is" for _ in range(400)]
    return train(inner, WORDS * 10 + numbers, 640, pre_tokenizers.ByteLevel.alphabet())


def blank_marks() -> PreTrainedTokenizerFast:
    """As in Llama 2: blanks are a mark at the beginning of words, and decoding drops the first."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    letters = sorted(set("".join(WORDS)) | set("0123456789\n▁"))
    return train(inner, [*WORDS, "is 1 is 12 is 3 is 45"] * 10, 400, letters)


TOKENIZERS = {"single": single_digits, "merged": merged_digits, "marks": blank_marks}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: make() for name, make in TOKENIZERS.items()}


@pytest.fixture(scope="module")
def tokenizer(tokenizers: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return tokenizers["single"]


def new_model(vocabulary: int, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """Random, with weights so large that what comes next depends sharply on positions."""
    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": TRAINED,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**defaults, **settings})).eval()


@pytest.fixture(scope="module")
def checkpoint(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "random"
    new_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with two texts."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text(STORY * 20)
    (folder / "b.txt").write_text(STORY.upper() * 20)
    return str(folder)


class Only(LogitsProcessor):
    """Forbid tokens, the textbook way."""

    def __init__(self, allowed: torch.Tensor) -> None:
        self.forbidden = ~allowed

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self.forbidden, -torch.inf)


def generated(
    model: LlamaForCausalLM, ids: list[int], allowed: torch.Tensor | None, steps: int, cached: bool
) -> list[int]:
    row = torch.tensor([ids])
    made = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=steps,
        do_sample=False,
        use_cache=cached,
        logits_processor=[] if allowed is None else [Only(allowed)],
    )
    return made[0, len(ids) :].tolist()


def merges_bracket_and_a() -> PreTrainedTokenizerFast:
    """A token per byte, except that "(A" is one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet, "(A"])}
    inner = Tokenizer(models.BPE(vocabulary, [("(", "A")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return wrap(inner)


def bigram_model(tokenizer: PreTrainedTokenizerFast, after: dict[str, dict[str, float]]) -> LlamaForCausalLM:
    """After the token `first`, the token `second` has the logit after[first][second]; all else has 0.

    Attention and MLP add nothing, so the final state is the normalised embedding: a multiple of one unit vector for
    each `first` and of another for all other tokens.
    """
    size = 16
    model = new_model(len(tokenizer), hidden_size=size, intermediate_size=4, num_attention_heads=2, head_dim=8)
    kinds = {tokenizer.convert_tokens_to_ids(first): kind for kind, first in enumerate(after, 1)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        for token in range(len(tokenizer)):
            model.model.embed_tokens.weight[token, kinds.get(token, 0)] = 1.0
        for kind, logits in enumerate(after.values(), 1):
            for second, logit in logits.items():
                # RMSNorm makes the unit vector sqrt(size) long.
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(second), kind] = logit / math.sqrt(size)
    return model


def write_questions(path: Path, answers: str) -> str:
    lines = [
        {"article": STORY * (3 + 5 * (i % 2)), "question": f"Question {i}?", "options": ["a", "b", "c", "d"]}
        for i in range(len(answers))
    ]
    for line, answer in zip(lines, answers, strict=True):
        line["answer"] = int(answer) if answer.isdigit() else answer  # type: ignore[assignment]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)
