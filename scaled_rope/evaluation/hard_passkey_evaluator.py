"""Hard passkeys: several numbered keys in natural text, one of which is asked for, answered by greedy decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scaled_rope.checkpoint import load_config, load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.chat_templates import ChatTurn, chat_turn
from scaled_rope.evaluation.decoding import Answer, decode_numbers, end_tokens, judge, number_tokens
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.passkey_prompts import HardPrompt, build_hard_prompt, draw_keys
from scaled_rope.evaluation.passkey_trials import PasskeyTrials
from scaled_rope.evaluation.served_model import ServedModel
from scaled_rope.patching.patch import cache_obstacle
from scaled_rope.results import Row
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.texts.packed import IntArray
from scaled_rope.texts.token_documents import first_tokens

MAX_NEW_TOKENS = 10
"""Longest answer, in tokens."""


def make_prompts(
    tokenizer: Any,
    tokens: IntArray,
    length: int,
    iterations: int,
    num_keys: int,
    seed: int,
    chat: ChatTurn | None = None,
) -> list[HardPrompt]:
    """Make the prompts of one length. They depend on these arguments only, and the first ones not on `iterations`.

    tokens: the text, of which each prompt takes a stretch of `length`. After the last whole stretch comes the first
        again.
    chat: the chat template that they are put into; None: plain text.

    Raises:
        ConfigError: the length is too short for so many keys, or the text for a prompt.
    """
    prompts = []
    for index in range(iterations):
        rng = random.Random(f"passkey_hard/{seed}/{length}/{num_keys}/{index}")
        keys, depths = draw_keys(rng, num_keys), sorted(rng.random() for _ in range(num_keys))
        asked = rng.randint(1, num_keys)
        start = index % max(1, len(tokens) // length) * length
        text = tokens[start : start + length].tolist()
        prompts.append(build_hard_prompt(tokenizer, length, depths, keys, asked, text, chat))
    return prompts


@dataclass(eq=False, kw_only=True)
class HardPasskey(PasskeyTrials[HardPrompt]):
    """The evaluator of hard passkeys.

    Attributes:
        num_keys: keys per prompt.
        dataset, feature, split: the text, as for `first_tokens`.
        restrict_tokens: whether only digits, blanks and the end may be decoded.
        uncached: whether scalings that depend on the length are decoded without a cache.
    """

    num_keys: int
    dataset: str
    feature: str = "text"
    split: str = "train"
    restrict_tokens: bool = True
    uncached: bool = False
    _tokenizers: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    metric = "passkey_hard"

    @property
    def text(self) -> str:
        return self.dataset.rstrip("/").rpartition("/")[2]

    def make(self, model: str) -> dict[int, list[HardPrompt]]:
        tokenizer = self._tokenizer(model)
        chat = chat_turn(tokenizer) if self.chat_template else None
        tokens = first_tokens(self.dataset, tokenizer, self.iterations * max(self.lengths), self.feature, self.split)
        vocabulary = text_config(load_config(model)).vocab_size
        if tokens.max() >= vocabulary:
            raise ConfigError(f"token id {tokens.max()} does not fit model {model!r} with a vocabulary of {vocabulary}")
        return {
            length: make_prompts(tokenizer, tokens, length, self.iterations, self.num_keys, self.seed, chat)
            for length in self.lengths
        }

    def _tokenizer(self, model: str) -> Any:
        if model not in self._tokenizers:
            self._tokenizers[model] = load_tokenizer(model)
        return self._tokenizers[model]

    def protocol(self, job: ModelJob) -> Row:
        return {
            "name": "first-integer",
            "iterations": self.iterations,
            "num_keys": self.num_keys,
            "restrict_tokens": self.restrict_tokens,
            "max_new_tokens": MAX_NEW_TOKENS,
            "seed": self.seed,
            **({"cached": True} if self._is_cached(job) else {}),
        }

    def _is_cached(self, job: ModelJob) -> bool:
        return job.scaling.is_length_dependent and not self.uncached and job.server is None

    def ask(
        self, model: Any, job: ModelJob, prompts: Sequence[HardPrompt], advance: Callable[[int], object]
    ) -> list[Row]:
        length, tokenizer = prompts[0].length, self._tokenizer(job.model)
        if isinstance(model, ServedModel):
            return self._ask_server(model, prompts, advance)
        if self._is_cached(job) and (obstacle := cache_obstacle(model)):
            raise ConfigError(f"{job.label} can read no cache in this model, {obstacle}; use --uncached")
        vocabulary = model.get_output_embeddings().weight.shape[0]
        end = end_tokens(model, tokenizer)
        answers: dict[int, Answer] = {}
        for index, answer in decode_numbers(
            model,
            tokenizer,
            [(prompt.input_ids, prompt.answer_ids, prompt.key) for prompt in prompts],
            length_dependent=job.scaling.is_length_dependent,
            rows_per_pass=self.rows_per_pass(length),
            max_new_tokens=MAX_NEW_TOKENS,
            allowed=number_tokens(tokenizer, vocabulary, end) if self.restrict_tokens else None,
            cached=self._is_cached(job),
        ):
            answers[index] = answer
            advance(length)
        return [_described(prompt, answers[index]) for index, prompt in enumerate(prompts)]

    def _ask_server(
        self, model: ServedModel, prompts: Sequence[HardPrompt], advance: Callable[[int], object]
    ) -> list[Row]:
        """Ask a server, which answers each prompt to its end."""
        found, at_once = [], self.rows_per_pass(prompts[0].length)
        for first in range(0, len(prompts), at_once):
            part = prompts[first : first + at_once]
            for prompt, text in zip(
                part, model.complete([one.input_ids for one in part], [MAX_NEW_TOKENS] * len(part)), strict=True
            ):
                found.append(_described(prompt, Answer(text=text, right=judge(text, True, prompt.key))))
                advance(prompt.length)
        return found


def _described(prompt: HardPrompt, answer: Answer) -> Row:
    """The fields of a row about one prompt and its answer."""
    return {
        "asked": prompt.asked,
        "depth": round(prompt.depth, 4),
        "distance": prompt.distance,
        "key": prompt.key,
        "answer": answer.text,
        "right": bool(answer.right),
        "keys": list(prompt.keys),
        "depths": [round(depth, 4) for depth in prompt.depths],
    }
