"""Models of this process as sources: callables, models of transformers, and vLLM's `LLM`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from scaled_rope.certificate.observed import TOP, Callables, Observed, Source
from scaled_rope.errors import ConfigError


def as_source(candidate: Any) -> Source:
    """The source that a candidate is, or can be made into.

    Raises:
        ConfigError: none.
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
    def logits(ids: list[int]) -> Any:
        with torch.inference_mode():
            device = next(model.parameters()).device
            return model(torch.tensor([ids], device=device), use_cache=False).logits[0]

    return logits


class VllmSource:
    """A vLLM engine of this process."""

    whole = True

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.title = "vLLM in this process"
        config = getattr(getattr(llm, "llm_engine", None), "model_config", None)
        limit = getattr(config, "max_model_len", None)
        self.max_length = limit if isinstance(limit, int) else None

    def observe(self, ids: Sequence[int], positions: Sequence[int]) -> Observed:
        sampling = importlib.import_module("vllm").SamplingParams
        options = sampling(temperature=0.0, max_tokens=1, logprobs=TOP, prompt_logprobs=TOP, detokenize=False)
        answer = self.llm.generate([{"prompt_token_ids": list(ids)}], options, use_tqdm=False)[0]
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
