"""The class by which lm-eval runs a model under any scaling. Importing it imports lm-eval, see `model_class`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.continuations import Continuation, context_limit, score
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.patch import cache_obstacle, patched_scaling
from scaled_rope.scaling.record import RopeScaling

HFLM: Any = importlib.import_module("lm_eval.models.huggingface").HFLM


class ScaledRopeLM(HFLM):  # type: ignore[misc]
    """A checkpoint under any scaling; lm-eval's own "hf" can only read scalings that transformers knows.

    Beyond the arguments of `load_model`: batch_size (a number, or "auto" for about 16k tokens' worth),
    max_length (tokens; default `context_limit`), and the options of lm-eval's "hf" for a loaded model.
    """

    def __init__(
        self,
        pretrained: Any,
        scaling: RopeScaling | str | None = None,
        tokenizer: Any = None,
        dtype: str = "auto",
        device: str | None = None,
        attention: str = "auto",
        adapter: str | None = None,
        layers: str | None = None,
        drop_layers: Sequence[int] | None = None,
        sliding_window: int | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        hide_progress: bool = False,
        **more: Any,
    ) -> None:
        model, name = pretrained, pretrained if isinstance(pretrained, str) else None
        if name is not None:
            model = load_model(
                name,
                scaling=scaling,
                dtype=dtype,
                device=_available(device),
                attn_implementation=attention,
                adapter=adapter,
                sliding_window=sliding_window,
                layers=layers,
                drop_layers=drop_layers,
                load_in_8bit=load_in_8bit,
                load_in_4bit=load_in_4bit,
            )
        self.scaling = scaling if name is None and isinstance(scaling, RopeScaling) else _scaling_of(model)
        self._model: Any = None  # set by lm-eval
        self.truncated = 0
        """Number of requests that were cut since this was last set to 0."""
        self._rows = None if batch_size is None or str(batch_size).startswith("auto") else int(batch_size)
        self._hide_progress = hide_progress
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer or str(pretrained))
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self._rows or 1,
            max_length=max_length or context_limit(model.config, self.scaling),
            **more,
        )
        self.pretrained = name or model.name_or_path

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        pairs = [Continuation(context, continuation) for _, context, continuation in requests]
        self.truncated += sum(len(pair.context) + len(pair.continuation) > self.max_length + 1 for pair in pairs)
        hide = disable_tqdm or self._hide_progress
        answers = score(self.model, self.scaling, pairs, self.max_length, self._rows, hide)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def tok_batch_encode(self, strings: list[str], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if (limit := options.get("left_truncate_len")) is not None:
            self.truncated += sum(len(self.tok_encode(text)) > limit for text in strings)
        tokens: tuple[Tensor, Tensor] = super().tok_batch_encode(strings, *args, **options)
        return tokens

    def _model_generate(self, *args: Any, **options: Any) -> Tensor:
        model = self._model
        if self.scaling.is_length_dependent and cache_obstacle(model):
            self._model = _without_cache(model)
        try:
            generated: Tensor = super()._model_generate(*args, **options)
        finally:
            self._model = model
        return generated

    def get_model_info(self) -> dict[str, Any]:
        """Facts about the model for lm-eval's own result files; nothing is asked of the hub."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "scaling": self.scaling.to_dict(),
        }


def _available(device: str | None) -> str | None:
    """The device to load on; None for a GPU that is not there, since lm-eval's command line names one by default."""
    return None if str(device).startswith("cuda") and not torch.cuda.is_available() else device


def _scaling_of(model: Any) -> RopeScaling:
    """The scaling that a loaded model computes with."""
    return patched_scaling(model) or RopeScaling.from_config(model.config)


def _without_cache(model: Any) -> SimpleNamespace:
    """Wrap a model so that it generates without a cache; lm-eval always asks for one, which some models cannot read."""

    def generate(**given: Any) -> Tensor:
        tokens: Tensor = model.generate(**{**given, "use_cache": False})
        return tokens

    return SimpleNamespace(generate=generate)
