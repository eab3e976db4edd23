"""Part `train`: steps of the optimizer, by this package and by the Trainer of transformers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_parts import models, timing
from benchmarks.gpu_parts.models import THETA
from benchmarks.gpu_parts.rows import WRONG, add_rate, complete, relative_difference
from scaled_rope import patch_model, unpatch_model
from scaled_rope.attention.backends import resolve_attention
from scaled_rope.patching.loss import resolve_loss
from scaled_rope.recipes.recipe import Recipe, make_recipe
from scaled_rope.results import Row
from scaled_rope.training.model import SummedLoss, build_model, enable_checkpointing
from scaled_rope.training.optimizer import make_optimizer

METRIC = "training step"
TRAINED = (8192, 16384, 32768, 65536, 131072)
STOCK = "transformers Trainer"
OURS: dict[str, Row] = {
    "ours": {},
    "ours, attention kept": {"keep_attention": True},
    "ours, no gradient checkpointing": {"gradient_checkpointing": False},
    "ours, whole logits": {"loss": "whole"},
    "ours, chunked logits": {"loss": "chunked"},
    "ours, activations offloaded": {"offload_activations": True},
    "ours, lora": {"lora": True},
    "ours, no rotary kernel": {},
}
"""Name of a variant -> recipe fields that differ from their defaults."""
FIRST = ("ours", STOCK)
"""Variants that are measured at all lengths of all models before any others."""
STEPS = 4
"""Steps of a measurement, the first of which is not counted."""


def training_recipe(name: str, length: int, **fields: Any) -> Recipe:
    """A recipe for a model of `MODELS` from random weights, with float32 weights and bf16 products."""
    init = models.MODELS[name] | {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": True}
    common = {"name": name, "init": init, "tokenizer": "none", "dataset": "none", "output_dir": "none", "seed": 0}
    common |= {"scaling": "yarn:32", "sequence_length": length, "global_batch_size": 1, "max_train_steps": 1000}
    return make_recipe(common | fields, name)


def training_module(recipe: Recipe, kernel: str | None = None) -> tuple[Any, str, str]:
    """The recipe's model with its loss, on the device as in finetune.py, and the attention and the loss in use."""
    device = torch.device(timing.DEVICE)
    attention = resolve_attention(recipe.attention, device, recipe.compute_dtype)
    with device:
        model, _ = build_model(recipe, attention)
    if kernel is not None:
        unpatch_model(model)
        patch_model(model, recipe.scaling, kernel=kernel)
    loss = resolve_loss(recipe.loss, device, model)
    enable_checkpointing(model, recipe)
    model.config.use_cache = False
    return SummedLoss(model, recipe.offload_activations, loss), str(model.config._attn_implementation), loss


def autocast() -> Any:
    """bf16 products as accelerate has them."""
    return torch.autocast(torch.device(timing.DEVICE).type, torch.bfloat16)


def summed_loss(module: Any, tokens: Any) -> Any:
    """The mean over targets of a row of tokens [1, T], under autocast."""
    weights = torch.ones_like(tokens[:, 1:], dtype=torch.float32)
    with autocast():
        return module(tokens[:, :-1], tokens[:, 1:], weights) / weights.numel()


def stock_model(name: str) -> Any:
    """The same Llama made by transformers alone, including YaRN."""
    scaling = {"rope_type": "yarn", "factor": 32.0, "rope_theta": THETA, "original_max_position_embeddings": 4096}
    config = LlamaConfig(
        **models.MODELS[name], max_position_embeddings=32 * 4096, rope_parameters=scaling, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    with torch.device(timing.DEVICE):
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()


def first_gradient(loss: Any, model: Any) -> Any:
    """The gradient of the first layer's query projection, to which all layers and the loss contribute."""
    weight = model.model.layers[0].self_attn.q_proj.weight
    return torch.autograd.grad(loss, weight)[0].double()


def reference_gradient(name: str, tokens: Any) -> tuple[Any, float]:
    """transformers' gradient in float32, and its relative change through bf16 products."""
    model = stock_model(name)
    wanted = first_gradient(model(tokens, labels=tokens).loss, model)
    with autocast():
        rounded = first_gradient(model(tokens, labels=tokens).loss, model)
    return wanted, relative_difference(rounded, wanted)


def time_ours(name: str, variant: str, tokens: Any, wanted: Any, noise: float) -> Row:
    """A row's measurements. First its gradient is compared with the float32 one, on the first `CHECKED` tokens."""
    recipe = training_recipe(name, tokens.shape[1], **OURS[variant])
    module, attention, loss = training_module(recipe, "none" if variant.endswith("no rotary kernel") else None)
    row: Row = {"attention": attention, "loss": loss}
    if not recipe.lora:  # whose projections have other names and weights that are not trained
        found = first_gradient(summed_loss(module, tokens[:, : models.CHECKED]), module.model)
        row["error"] = relative_difference(found, wanted)
        if not row["error"] < models.NOISE * noise:
            return row | {"skipped": WRONG}
        del found
    optimizer = make_optimizer(recipe, module)

    def step() -> None:
        summed_loss(module, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return row | timing.time_model(step)


def time_stock(name: str, tokens: Any) -> Row:
    """Time steps of transformers' own Trainer with bf16 and gradient checkpointing, and its defaults otherwise."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            if not ends:
                torch.cuda.reset_peak_memory_stats()
            ends.append(time.perf_counter())

    row = tokens[0].cpu()
    rows = [{"input_ids": row, "labels": row}] * STEPS
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=1, bf16=True, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=timing.DEVICE == "cpu", save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        try:
            Trainer(stock_model(name), settings, train_dataset=rows, callbacks=[Timer()]).train()
        finally:  # or accelerate would keep this precision for everything else in this process
            AcceleratorState._reset_state(reset_partial_state=True)
    low, median, high = timing.quartiles([after - before for before, after in zip(ends, ends[1:], strict=False)])
    timed = {"seconds": median, "seconds_quartiles": [low, high], "runs": len(ends) - 1, "timing": "steps, host clock"}
    return timed | {"peak_bytes": torch.cuda.max_memory_allocated(), "attention": "sdpa", "loss": "whole"}


def training_flops(name: str, tokens: int, lora: bool = False) -> float:
    """FLOPs of one step: forward, and as many for the gradients of inputs and for those of trained weights."""
    model = models.MODELS[name]
    forward = models.flops(LlamaConfig(**model), tokens)
    forward += 2.0 * tokens * model["hidden_size"] * model["vocab_size"]
    return forward * (2 if lora else 3)


def training_cases() -> list[tuple[str, int, str]]:
    """(model, length, variant) in the order in which they are measured."""
    others = [variant for variant in OURS if variant not in FIRST]
    return [(name, length, variant) for variants in (FIRST, others)
            for name in models.MODELS for length in TRAINED for variant in variants]  # fmt: skip


class References:
    """Reference gradients by model, each computed once."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[Any, float]] = {}

    def time_case(self, name: str, variant: str, tokens: Any) -> Row:
        """The fields that one case adds to its row: its times, or that its gradient is wrong."""
        if variant == STOCK:
            return time_stock(name, tokens)
        if name not in self.found:
            self.found[name] = reference_gradient(name, tokens[:, : models.CHECKED])
        return {"noise": self.found[name][1]} | time_ours(name, variant, tokens, *self.found[name])


def measure(clock: timing.Clock, cases: Sequence[tuple[str, int, str]] | None = None) -> Iterator[Row]:
    """A row per model, length and variant: optimizer steps over one sequence, float32 weights, bf16 products.

    cases: model, length and variant; default all.
    """
    # Seconds per operation at the last length, from which the time of the next one is expected.
    rates: dict[tuple[str, str], float] = {}
    references = References()
    measured_rate = timing.matmul_rate() if clock.left > 0 else 0.0
    for name, length, variant in cases or training_cases():
        row: Row = {
            "metric": METRIC, "model": name, "tokens": length, "variant": variant,
            "matmul_flops_per_second": measured_rate,
        }  # fmt: skip
        operations = training_flops(name, length, lora=variant == "ours, lora")
        # A third of the peak rate where nothing is known yet.
        guess = 3 / measured_rate if measured_rate else 0.0
        expected = 8 + (STEPS + 1) * operations * rates.get((name, variant), rates.get((name, "ours"), guess))
        torch.manual_seed(0)
        tokens = torch.randint(0, models.MODELS[name]["vocab_size"], (1, length), device=timing.DEVICE)
        time_it = partial(references.time_case, name, variant, tokens)
        clock.forget()  # the lengths differ, and so does the time
        # Exception: what is not installed, or anything else.
        row = add_rate(complete(row, clock, expected, time_it, refusals=(Exception,)), operations)
        if "skipped" not in row:
            rates[name, variant] = row["seconds"] / operations
        yield row
