"""Answers of a model to prompts, printed as they are made."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer

from scaled_rope.checkpoint import encode
from scaled_rope.evaluation.chat_templates import chat_text
from scaled_rope.evaluation.decoding import end_tokens
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.patching.device_maps import input_device
from scaled_rope.patching.patch import cache_obstacle


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    Attributes:
        max_new_tokens: longest answer.
        temperature: tokens are drawn at this temperature; 0, or None without `top_k`: the likeliest is taken.
        top_k: tokens are drawn from so many likeliest ones; None: from all.
        repetition_penalty: logits of tokens that already occurred are divided by it; None: no penalty.
        seed: determines what is drawn.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 42


def generation_config(decoding: Decoding, model: Any, tokenizer: Any, cached: bool) -> GenerationConfig:
    """The settings as transformers takes them; of the checkpoint's own recommendations, only end tokens are kept."""
    end = end_tokens(model, tokenizer)
    draw = decoding.temperature != 0 and (decoding.temperature is not None or decoding.top_k is not None)
    return GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=draw,
        # None would be filled in from the library's defaults, of which top_k is 50.
        temperature=decoding.temperature if draw and decoding.temperature is not None else 1.0,
        top_k=(decoding.top_k or 0) if draw else None,
        top_p=1.0 if draw else None,
        repetition_penalty=decoding.repetition_penalty or 1.0,
        use_cache=cached,
        eos_token_id=end or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or [0])[0],
        bos_token_id=tokenizer.bos_token_id,
    )


def context_of(job: ModelJob) -> int | None:
    """The context in tokens that the scaling is made for; None where it grows with the text."""
    if job.scaling.is_length_dependent and job.scaling.method != "longrope":
        return None
    return job.made_for


def prompt_tokens(tokenizer: Any, prompt: str, chat_template: bool = False) -> list[int]:
    """The tokens of a prompt: plain text after the token of the beginning, or a message in a chat template."""
    if chat_template:
        return encode(tokenizer, chat_text(tokenizer, prompt))
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return bos + encode(tokenizer, prompt)


def answerer(
    model: Any, tokenizer: Any, job: ModelJob, decoding: Decoding, chat_template: bool = False
) -> Callable[[str], None]:
    """Return a function that prints the answer of a job's model to a prompt, token by token. Seeds torch.

    chat_template: whether prompts are put into the tokenizer's chat template, each as a conversation of its own.
    """
    if obstacle := cache_obstacle(model):
        print(f"note: {job.label} changes every key as the text grows, and {obstacle}, so no cache is kept "
              "(use_cache=False); each token reads the whole text again", file=sys.stderr)  # fmt: skip
    config = generation_config(decoding, model, tokenizer, cached=not obstacle)
    context = context_of(job)
    torch.manual_seed(decoding.seed)

    def answer(prompt: str) -> None:
        ids = prompt_tokens(tokenizer, prompt, chat_template)
        if not ids:
            return
        if context is not None and len(ids) >= context:
            print(f"warning: the prompt has {len(ids)} tokens, {job.label} is made for {context}", file=sys.stderr)
        elif context is not None and len(ids) + decoding.max_new_tokens > context:
            print(f"note: the answer may pass the end of the context, {context} tokens", file=sys.stderr)
        row = torch.tensor([ids], device=input_device(model))
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            model.generate(row, attention_mask=torch.ones_like(row), generation_config=config, streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()
            if not sys.stdin.isatty():
                raise
            print("[stopped]", file=sys.stderr)

    return answer
