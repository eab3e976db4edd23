"""For training in other programs: a callback for transformers' Trainer, and so for TRL's, that checks and measures.

    model = AutoModelForCausalLM.from_pretrained(name)
    patch_model(model, "yarn:4")
    SFTTrainer(model=model, callbacks=[ContextCallback("books/", tokenizer=name, lengths=[4096, 16384])], ...)

Knows nothing of our own training.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.errors import ConfigError, is_positive_whole, shortened
from scaled_rope.evaluation.perplexity_evaluator import score_windows
from scaled_rope.evaluation.perplexity_rows import prefix_sums, truncated_row
from scaled_rope.evaluation.statistics import SEED
from scaled_rope.evaluation.windows import (
    Losses,
    Texts,
    batches,
    select,
    tell_copies,
    truncated,
    windows_fingerprint,
)
from scaled_rope.files import write_atomic
from scaled_rope.patching.adapter_scaling import adapter_names, save_adapter_scaling, saved_adapters
from scaled_rope.patching.patch import computes, lost_part, patched_plan, patched_scaling
from scaled_rope.provenance import provenance
from scaled_rope.results import Row, append_row, rows_so_far
from scaled_rope.scaling.record import RopeScaling, RopeSettings
from scaled_rope.texts.token_documents import TokenSource

_TOKENS_PER_PASS = 2**14


class ContextCallback(TrainerCallback):  # type: ignore[misc]
    """Held-out perplexity by length, before training, during it and at its end; a row each, and a card at the end.

    Rows go to `context.jsonl` in the trainer's output folder, in the format of eval/perplexity.py, which eval/report.py
    shows; each names its step. Checkpoints of an adapter get the scaling beside it. The trainer's own log gets
    `context/LENGTH`. Of several processes all measure, which sharded weights need, and the first writes.

    Args:
        texts: held-out texts, as eval/perplexity.py takes them, or a packed set.
        lengths: context lengths in tokens.
        tokenizer: name or object; default: the trainer's.
        samples: the first so many documents that are long enough; None: all.
        every: measure every so many steps too; None: whenever the trainer evaluates.
        scaling: the scaling that the model should compute with, as text or record; None: the one in its config.

    Raises:
        ConfigError: when training begins, if the model does not compute with `scaling`, the texts cannot be used, or an
            adapter of PEFT acts outside of the model that is measured (prompt learning).
    """

    def __init__(
        self,
        texts: str,
        lengths: Iterable[int],
        tokenizer: Any = None,
        samples: int | None = None,
        every: int | None = None,
        scaling: RopeScaling | str | None = None,
    ) -> None:
        given = list(lengths) if isinstance(lengths, Iterable) and not isinstance(lengths, str) else []
        if not given or not all(map(is_positive_whole, given)) or min(given) < 2:
            raise ConfigError(f"lengths {lengths!r} are not allowed; a list of whole numbers of at least 2 tokens")
        for name, value in {"samples": samples, "every": every}.items():
            if value is not None and not is_positive_whole(value):
                raise ConfigError(f"{name} {value!r} is not allowed; a whole number of at least 1")
        _check_spec(scaling)
        self.source, self.lengths, self.samples = TokenSource(texts), sorted(set(given)), samples
        self.every, self.scaling = every, scaling
        self.rows: list[Row] = []
        """The rows that were measured in this process, and before them those of the run that it resumes."""
        self._tokenizer = tokenizer
        self._texts: Texts | None = None
        self._measured = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        _check_adapters(model)
        inner = _inner(model)
        self.scaling = check_scaling(inner, self.scaling)
        tokenizer = self._tokenizer or more.get("processing_class")
        if tokenizer is None:
            raise ConfigError("ContextCallback: the trainer has no tokenizer; give one (tokenizer=)")
        if isinstance(tokenizer, str):
            tokenizer = load_tokenizer(tokenizer)
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor of texts and images
        documents = self.source.documents(tokenizer)
        self._texts = select(documents, tokenizer.bos_token_id, self.lengths[-1], samples=self.samples)
        if state.is_world_process_zero:
            tell_copies(self.source.name, self._texts.copies)
            if state.global_step:  # resumed: what was measured from here on is measured again
                path = Path(args.output_dir) / "context.jsonl"
                kept = [row for row in rows_so_far(path) if (_step(row) or 0) < state.global_step]
                self.rows = [row for row in kept if _step(row) is not None]
                write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._measure(args, state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._measure(args, state, model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if self.every is None:
            self._measure(args, state, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero:
            return
        adapted = _unwrapped(model)
        if saved_adapters(adapted, folder):
            save_adapter_scaling(adapted, folder)
        elif adapter_names(adapted):
            print(f"note: {folder} holds no adapter, so the scaling is not written beside one", file=sys.stderr)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self._measure(args, state, model)
        if state.is_world_process_zero:
            assert isinstance(self.scaling, RopeScaling)  # since training began
            text = card(self.rows, self.scaling)
            write_atomic(Path(args.output_dir) / "context.md", text)

    def _measure(self, args: Any, state: Any, model: nn.Module) -> None:
        if self._measured == state.global_step or self._texts is None:
            return
        self._measured = state.global_step
        inner, texts = _inner(model), self._texts
        training = model.training
        model.eval()
        try:
            losses = _losses(inner, texts, self.lengths[-1])
        finally:
            model.train(training)
        assert isinstance(self.scaling, RopeScaling)  # since training began
        sums = {index: prefix_sums([one], self.lengths) for index, one in enumerate(losses)}
        record = {"command": "ContextCallback", **provenance(inner.device, SEED, {"step": state.global_step})}
        found: dict[str, float] = {}
        for start, length in zip([0, *self.lengths], self.lengths, strict=False):
            measured = truncated_row(sums, length, start, "token")
            row = {
                "model": Path(args.output_dir).name,
                "model_fingerprint": f"step {state.global_step}",
                "dtype": str(inner.dtype).removeprefix("torch."),
                "head_dim": RopeSettings(inner.config).head_dim,
                "scaling": self.scaling.to_dict(),
                "label": f"{self.scaling.label}, step {state.global_step}",
                "carried": True,
                "metric": "perplexity",
                "data": {
                    "name": self.source.title,
                    "documents": len(texts.documents),
                    "windows": len(losses),
                    "window_tokens": self.lengths[-1],
                    "fingerprint": windows_fingerprint(texts, self.lengths[-1]),
                },
                "protocol": {"name": "truncate", "bucket_start": start},
                "length": length,
                **measured,
                "provenance": record,
            }
            self.rows.append(row)
            value = measured["perplexity_bucket"]
            found[f"context/{length}"] = math.inf if value is None else value
            if state.is_world_process_zero:
                append_row(Path(args.output_dir) / "context.jsonl", row)
        state.log_history.append({**found, "step": state.global_step})


def _step(row: Row) -> int | None:
    """The step that a row was measured at; None for a row of another program."""
    word, _, number = str(row.get("model_fingerprint")).partition(" ")
    return int(number) if word == "step" else None


def _unwrapped(model: Any) -> Any:
    """The model inside wrappers of engines, with its adapters."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _inner(model: Any) -> Any:
    """The transformers model inside wrappers of adapters and of engines."""
    model = _unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_adapters(model: Any) -> None:
    """Raise an error for a model with an adapter that its base model runs without: virtual tokens, weights for each
    input, and adapters that wait for certain tokens are brought in by PEFT's own forward.

    Raises:
        ConfigError: as above.
    """
    configs: Any = getattr(_unwrapped(model), "peft_config", None) or {}
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or kind == "XLORA" or getattr(config, "alora_invocation_tokens", None) is not None:
            raise ConfigError(
                f"ContextCallback cannot measure {type(config).__name__} of PEFT, which acts outside of the model that "
                "is measured; leave the callback out, or train a LoRA adapter"
            )


def _losses(model: Any, texts: Texts, length: int) -> list[Losses]:
    """The losses of each window of `length` positions."""
    found: list[Losses] = []
    rows = max(1, _TOKENS_PER_PASS // length)
    for batch in batches(truncated(texts, length), lambda window: rows):
        found += score_windows(model, texts, batch, rows)[1]
    return found


def _check_spec(scaling: Any) -> None:
    if not isinstance(scaling, RopeScaling | str | None):
        raise ConfigError(
            f"scaling {shortened(repr(scaling), 80)} is not allowed; a RopeScaling or a text such as 'yarn:8'"
        )


def check_scaling(model: Any, wanted: RopeScaling | str | None = None) -> RopeScaling:
    """Return the scaling that a loaded model computes with, as its rotary modules show.

    Args:
        model: a model of transformers, patched or not.
        wanted: the scaling that it should compute with, as record or text, where layer types differ that of the
            full-attention layers, and in all layers that have RoPE; None: the one in its config.

    Raises:
        ConfigError: `wanted` is no scaling; the model computes with another one, or its rotary modules cannot tell. A
            `rope_scaling` that a trainer's YAML sets but the family does not read is found here.
    """
    _check_spec(wanted)
    patched = patched_scaling(model)
    settings = RopeSettings(model.config)
    if isinstance(wanted, str):
        wanted = RopeScaling.from_spec(wanted, settings.scaling)
    expected = settings.scaling if wanted is None else wanted
    if patched is not None:
        if patched != expected and wanted is not None:
            raise ConfigError(f"the model computes with {patched.label}, not with {expected.label}; patch it with that")
        if lost := lost_part(model):
            raise ConfigError(f"the model was patched with {patched.label} and lost it: {lost}; patch it again")
        dropped = patched_plan(model).drop_layers
        if dropped and wanted is not None:
            layers = ", ".join(map(str, dropped))
            raise ConfigError(
                f"the model computes with {patched.label}, but layers {layers} have no rotary embedding (drop_layers)"
            )
        return patched
    try:
        confirmed = computes(model, expected, settings, by_length=True)
    except ConfigError as error:
        raise ConfigError(f"whether the model computes with {expected.label} cannot be told: {error}") from error
    if not confirmed:
        raise ConfigError(
            f"the model does not compute with {expected.label}: its rotary tables are others. Patch it before training:"
            f" scaled_rope.patch_model(model, ...)"
        )
    return expected


def card(rows: Sequence[Row], scaling: RopeScaling) -> str:
    """A table of held-out perplexities by step and length, in Markdown."""
    lengths = sorted({row["length"] for row in rows})
    by_step: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_step.setdefault(row["model_fingerprint"].removeprefix("step "), {})[row["length"]] = row
    lines = [
        f"Held-out perplexity under {scaling.label}, of the tokens between two lengths:",
        "",
        f"| step | {' | '.join(map(str, lengths))} |",
        f"|---|{'---|' * len(lengths)}",
    ]
    for step, cells in by_step.items():
        values = [cells[length]["perplexity_bucket"] for length in lengths]
        lines.append(f"| {step} | {' | '.join('overflow' if v is None else f'{v:.4g}' for v in values)} |")
    first = rows[0]["data"]
    lines += ["", f"Texts: {first['name']}, {first['documents']} documents, {lengths[-1]} tokens of each."]
    return "\n".join(lines) + "\n"
