"""Part `sweep`: perplexity at many lengths from one forward pass, against a forward pass for each length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_parts import models, timing
from benchmarks.gpu_parts.prefill import build
from benchmarks.gpu_parts.rows import add_rate, complete
from scaled_rope import patch_model, unpatch_model
from scaled_rope.patching.loss import token_nll
from scaled_rope.results import Row

MODEL, LONGEST, LENGTHS, SPEC = "135M", 32768, 64, "yarn:32"
TOLERANCE = 2e-3
"""Largest relative difference of mean losses between the two ways: passes of other lengths are cut into other blocks,
and bf16 rounds each hidden state to 2^-9."""


@torch.inference_mode()
def one_pass(model: Any, tokens: Any, lengths: list[int]) -> Any:
    """Mean losses at all lengths, from the losses of the longest: a text's beginning does not know how it goes on."""
    nll = token_nll(model, tokens[:, :-1], tokens[:, 1:])[0].double().cumsum(0)
    ends = torch.tensor(lengths, device=nll.device) - 1
    return nll[ends - 1] / ends


@torch.inference_mode()
def pass_for_each(model: Any, tokens: Any, lengths: list[int]) -> Any:
    return torch.stack([
        token_nll(model, tokens[:, : length - 1], tokens[:, 1:length]).double().mean() for length in lengths
    ])  # fmt: skip


def measure(clock: timing.Clock) -> Iterator[Row]:
    """A row for each way. Weights are random, so that losses are near the logarithm of the vocabulary's size."""
    step = LONGEST // LENGTHS
    lengths = [step * (index + 1) for index in range(LENGTHS)]
    model: list[Any] = []
    ways: dict[str, Callable[..., Any]] = {"ours, one pass": one_pass, "a pass for each length": pass_for_each}
    for name, way in ways.items():
        row: Row = {"metric": "sweep", "model": MODEL, "tokens": LONGEST, "variant": name, "lengths": LENGTHS}

        def ready() -> Any:
            if not model:
                model.append(build(MODEL, torch.bfloat16))
                unpatch_model(model[0])
                patch_model(model[0], SPEC)
            torch.manual_seed(0)
            vocabulary = models.MODELS[MODEL]["vocab_size"]
            return model[0], torch.randint(0, vocabulary, (1, LONGEST), device=timing.DEVICE)

        def error() -> float:
            found = one_pass(*ready(), lengths)
            some = lengths[:: max(1, LENGTHS // 4)]
            wanted = pass_for_each(*ready(), some)
            return float((found[:: max(1, LENGTHS // 4)] / wanted - 1).abs().max())

        def time_it(way: Callable[..., Any] = way) -> Row:
            return timing.time_model(partial(way, *ready(), lengths))

        check = error if way is one_pass else None
        row = complete(row, clock, 8, time_it, check, limit=TOLERANCE, refusals=(Exception,))
        if "skipped" not in row:
            total = sum(lengths) if way is pass_for_each else LONGEST
            row["forwarded_tokens"] = total
        yield add_rate(row, models.flops(build_config(), LONGEST))


def build_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**models.MODELS[MODEL])
