"""The class by which lm-eval runs a model under any scaling. Importing it imports lm-eval, see `model_class`."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from scaled_rope.checkpoint import load_tokenizer, open_checkpoint
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.continuations import Continuation, context_limit, score
from scaled_rope.evaluation.lm_eval_arguments import (
    at_revision,
    check_backend,
    dtype_name,
    longest_prompt,
    one_of_two,
    placement_of,
    refuse_unknown,
    rows_per_pass,
)
from scaled_rope.evaluation.ranks import current, join
from scaled_rope.patching.device_maps import input_device
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.patch import cache_obstacle, patched_scaling
from scaled_rope.scaling.record import RopeScaling

HFLM: Any = importlib.import_module("lm_eval.models.huggingface").HFLM

_PASSED_ON = (
    "add_bos_token",
    "prefix_token_id",
    "truncation",
    "think_end_token",
    "enable_thinking",
    "chat_template_args",
)
"""Arguments that lm-eval's "hf" handles by itself, also for a loaded model."""
_HF_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(HFLM.__init__).parameters.items()}


class ScaledRopeLM(HFLM):  # type: ignore[misc]
    """A checkpoint under any scaling; lm-eval's own "hf" can only read scalings that transformers knows.

    Args:
        pretrained: directory or hub name, or a loaded model; then there are no arguments that choose what is loaded.
        scaling, layers, drop_layers, sliding_window, kernel, load_in_8bit, load_in_4bit: see `load_model`.
        attention, adapter: the same; lm-eval's words for them are attn_implementation and peft.
        tokenizer: name or object; default: the model's.
        dtype: default: as the checkpoint's config says.
        batch_size: sequences per forward pass, or "auto" for about 16k tokens' worth.
        max_length: longest prompt in tokens; default: `context_limit`.
        hide_progress: show no progress.
        more: revision, subfolder, trust_remote_code, peft, attn_implementation, add_bos_token, prefix_token_id,
            truncation, think_end_token, enable_thinking, chat_template_args, parallelize, max_memory_per_gpu,
            max_cpu_memory and offload_folder as in lm-eval's "hf".

    Raises:
        ConfigError: an argument that is not known or would have no effect; what `load_model` raises.
    """

    def __init__(
        self,
        pretrained: Any = None,
        scaling: RopeScaling | str | None = None,
        tokenizer: Any = None,
        dtype: Any = "auto",
        device: str | None = None,
        attention: str = "auto",
        adapter: str | None = None,
        layers: str | None = None,
        drop_layers: Sequence[int] | None = None,
        sliding_window: int | None = None,
        kernel: str = "auto",
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        hide_progress: bool = False,
        backend: str = "default",
        revision: str | None = "main",
        subfolder: str = "",
        trust_remote_code: bool = False,
        parallelize: bool = False,
        max_memory_per_gpu: int | str | None = None,
        max_cpu_memory: int | str | None = None,
        offload_folder: str | None = "./offload",
        peft: str | None = None,
        attn_implementation: str | None = None,
        **more: Any,
    ) -> None:
        passed_on = {name: more.pop(name) for name in _PASSED_ON if name in more}
        refuse_unknown(more, [*_OWN, *_PASSED_ON], _HF_DEFAULTS)
        check_backend(backend)
        placement = placement_of(parallelize, max_memory_per_gpu, max_cpu_memory, offload_folder)
        _join_ranks()
        self._rows = rows_per_pass(batch_size)
        longest_prompt(max_length, 2)  # refused before weights are read
        if pretrained is None:
            raise ConfigError("model argument pretrained: must name a folder or a model of the hub")
        adapter = one_of_two("adapter", adapter, "peft", peft)
        attention = one_of_two("attention", attention, "attn_implementation", attn_implementation, "auto")
        model, name = pretrained, pretrained if isinstance(pretrained, str) else None
        if name is not None:
            folder = at_revision(name, revision, subfolder)
            if adapter is not None and not Path(adapter).is_dir():
                adapter = at_revision(adapter, revision)
            checkpoint = open_checkpoint(folder, trust_remote_code)
            model = load_model(
                checkpoint,
                scaling=scaling,
                dtype=dtype_name(dtype, checkpoint.config),
                device=None if placement else _available(device),
                placement=placement,
                attn_implementation=attention,
                adapter=adapter,
                trust_remote_code=trust_remote_code,
                sliding_window=sliding_window,
                layers=layers,
                drop_layers=drop_layers,
                kernel=kernel,
                load_in_8bit=load_in_8bit,
                load_in_4bit=load_in_4bit,
            )
            tokenizer = tokenizer or folder
        elif isinstance(scaling, str):
            raise ConfigError(f"model argument scaling={scaling!r}: a loaded model has its scaling; patch it first")
        self.scaling = scaling if name is None and isinstance(scaling, RopeScaling) else _scaling_of(model)
        self._model: Any = None  # set by lm-eval
        self.truncated = 0
        """Number of requests that were cut since this was last set to 0."""
        self._hide_progress = hide_progress
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer, trust_remote_code, passed_on.get("add_bos_token"))
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=self._rows or 1,
            max_length=longest_prompt(max_length, context_limit(model.config, self.scaling)),
            **passed_on,
        )
        self._device = input_device(self._model)  # lm-eval takes the model's, which a split one has not
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

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        ranks = current()
        hide = disable_tqdm or self._hide_progress or not ranks.is_first
        generate = super().generate_until

        def answer(share: list[Any]) -> list[str]:
            return list(generate(share, disable_tqdm=hide)) if share else []

        before, found = self.truncated, ranks.spread(requests, answer)
        self.truncated = before + sum(ranks.gather(lambda: self.truncated - before))
        return found

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


_OWN = tuple(inspect.signature(ScaledRopeLM.__init__).parameters)[1:-1]
"""The arguments of our own, and those of lm-eval's that are handled here."""


def _join_ranks() -> None:
    """Meet the other processes of lm-eval's own command line, if a launcher started several.

    All of them ask everything and share the forward passes, so each has the whole result, of which lm-eval writes that
    of the first process of a machine.

    Raises:
        ConfigError: processes on several machines, or a version of lm-eval in which each would write its own result.
    """
    if current().count > 1 or (count := int(os.environ.get("WORLD_SIZE", "1"))) == 1:
        return
    evaluator = importlib.import_module("lm_eval.evaluator")
    if "LOCAL_RANK" not in inspect.getsource(evaluator.simple_evaluate):
        raise ConfigError(f"lm-eval of this version writes results {count} times with {count} processes; start one")
    if (here := int(os.environ.get("LOCAL_WORLD_SIZE", count))) != count:
        raise ConfigError(f"{count} processes, {here} of them here: lm-eval writes results on each machine; use one")
    join()


def _available(device: str | None) -> str | None:
    """The device to load on; None for a GPU that is not there, since lm-eval's command line names one by default."""
    if not str(device).startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        return None
    return device if current().count == 1 else current().device(None)


def _scaling_of(model: Any) -> RopeScaling:
    """The scaling that a loaded model computes with."""
    return patched_scaling(model) or RopeScaling.from_config(model.config)


def _without_cache(model: Any) -> SimpleNamespace:
    """Wrap a model so that it generates without a cache; lm-eval always asks for one, which some models cannot read."""

    def generate(**given: Any) -> Tensor:
        tokens: Tensor = model.generate(**{**given, "use_cache": False})
        return tokens

    return SimpleNamespace(generate=generate)
