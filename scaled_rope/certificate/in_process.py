"""Models of this process as sources: callables, models of transformers, and vLLM's `LLM`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from scaled_rope.certificate.observed import TOP, Callables, Observed, Source
from scaled_rope.errors import ConfigError, first_line


def as_source(candidate: Any) -> Source:
    """The source that a candidate is, or can be made into.

    Raises:
        ConfigError: it can't, or gives no log-probabilities.
    """
    if hasattr(candidate, "observe"):
        source: Source = candidate
        return source
    if isinstance(candidate, nn.Module):
        return Callables(_logits_of_model(candidate), f"a {type(candidate).__name__} of this process")
    if hasattr(candidate, "generate") and hasattr(candidate, "llm_engine"):
        return VllmSource(candidate)
    if callable(candidate):
        return Callables(candidate)
    raise ConfigError(f"candidate {type(candidate).__name__!r}: must be a server, a model, or a callable")


def _logits_of_model(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)

    def logits(ids: list[int]) -> Any:
        device = next(model.parameters()).device
        try:
            with torch.inference_mode():
                return model(torch.tensor([ids], device=device), use_cache=False).logits[0]
        except (IndexError, RuntimeError) as error:  # GPT-J's table of angles ends there; most models compute theirs
            if limit is None or len(ids) <= limit:
                raise
            raise ConfigError(
                f"lengths {len(ids)} is not allowed; a {type(model).__name__} with "
                f"max_position_embeddings={limit} takes no such prompt: {first_line(error)}"
            ) from error

    return logits


def _refusals() -> tuple[type[Exception], ...]:
    """The exceptions of vLLM for a request that it does not take: before 0.32 a ValueError, then classes of its own."""
    try:
        exceptions = importlib.import_module("vllm.exceptions")
    except ImportError:
        return (ValueError,)
    return ValueError, getattr(exceptions, "VLLMClientError", ValueError)


class VllmSource:
    """A vLLM engine of this process."""

    whole = True

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.title = "vLLM in this process"
        config = getattr(llm.llm_engine, "model_config", None)
        limit = getattr(config, "max_model_len", None)
        self.max_length = limit if isinstance(limit, int) else None
        most = getattr(config, "max_logprobs", TOP)
        self._top = TOP if most < 0 else min(TOP, most)  # -1: as many as there are tokens
        if self._top == 0:
            raise ConfigError("vLLM in this process has max_logprobs=0: at least 1, and better 20, are needed")
        mode = getattr(config, "logprobs_mode", "raw_logprobs")
        if "logprobs" not in mode:
            raise ConfigError(f"vLLM in this process has logprobs_mode={mode!r}: must be 'raw_logprobs'")

    def observe(self, ids: Sequence[int], positions: Sequence[int]) -> Observed:
        sampling = importlib.import_module("vllm").SamplingParams
        options = sampling(
            temperature=0.0, max_tokens=1, logprobs=self._top, prompt_logprobs=self._top, detokenize=False
        )
        try:
            answer = self.llm.generate([{"prompt_token_ids": list(ids)}], options, use_tqdm=False)[0]
        except _refusals() as error:
            raise ConfigError(f"{self.title} refuses a prompt of {len(ids)} tokens: {first_line(error)}") from error
        read = len(answer.prompt_token_ids or ())
        if read != len(ids):
            raise ConfigError(f"{self.title} read {read} tokens where {len(ids)} were sent; it adds or drops some")
        rows = {at - 1: entry for at, entry in enumerate(answer.prompt_logprobs or ()) if at and entry}
        after = answer.outputs[0].logprobs
        if after:
            rows[len(ids) - 1] = after[0]
        kept = [at for at in positions if rows.get(at)]
        if not kept:
            raise ConfigError("vLLM returned no log-probabilities; logprobs is off in this engine")
        return Observed(
            tuple(ids),
            tuple(kept),
            tuple(np.array(list(rows[at]), dtype=np.int64) for at in kept),
            tuple(np.array([one.logprob for one in rows[at].values()], dtype=np.float64) for at in kept),
        )
