"""Part `prefill`: a whole model's pass over a prompt, by attention implementation and rotary kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu_parts import models, timing
from benchmarks.gpu_parts.rows import NO_TIME, add_rate, complete, relative_difference
from scaled_rope import patch_model, unpatch_model
from scaled_rope.attention.backends import ATTENTIONS, resolve_attention
from scaled_rope.errors import ConfigError
from scaled_rope.results import Row

LENGTHS = (4096, 32768, 131072)
EAGER_LIMIT = 8192
"""The longest length for attention that keeps all scores in memory."""
KERNELS = ("none", "triton")
SPEC = "yarn:32"
BUILD_S = 3.0
"""Seconds that a model, its float64 twin and their first pass take, about."""


def build(name: str, dtype: torch.dtype) -> Any:
    """A Llama with random weights, rope_theta and original length as Llama 2 has them, scaled by YaRN to 128k."""
    torch.manual_seed(0)
    config = LlamaConfig(**models.MODELS[name], max_position_embeddings=4096, tie_word_embeddings=True)
    with torch.device(timing.DEVICE):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).eval()
    patch_model(model, SPEC, kernel="none", attn="eager")
    return model


def attentions() -> dict[str, tuple[str, list[Any]]]:
    """Implementations that can run, by name: what transformers calls them, and torch's own backends to allow."""
    found: dict[str, tuple[str, list[Any]]] = {
        "sdpa, flash": ("sdpa", [SDPBackend.FLASH_ATTENTION]),
        "sdpa, cuDNN": ("sdpa", [SDPBackend.CUDNN_ATTENTION]),
        "sdpa, efficient": ("sdpa", [SDPBackend.EFFICIENT_ATTENTION]),
    }
    for name in ATTENTIONS[1:]:
        try:
            resolve_attention(name, torch.device(timing.DEVICE), "bfloat16")
        except ConfigError:
            continue
        found[name] = (name, [])
    return found


def with_attention(model: Any, attention: str, allowed: list[Any], run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` under an attention implementation, with torch's backends restricted where they are named."""
    model.set_attn_implementation(attention)

    def restricted() -> Any:
        with sdpa_kernel(allowed):
            return run()

    return restricted if allowed else run


def last_logits(model: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return model(tokens, use_cache=False, logits_to_keep=1).logits


def logits_error(model: Any, tokens: Any, wanted: Any) -> float:
    """Relative error of the last logits against float64 ones."""
    return relative_difference(last_logits(model, tokens), wanted)


Under = Callable[[Callable[[], Any]], Callable[[], Any]]
"""`with_attention` of a model and an implementation."""


def error_under(model: Any, kernel: str, under: Under, error: Callable[[], float]) -> float:
    """The error of a model that is patched anew, with this rotary kernel."""
    unpatch_model(model)
    patch_model(model, SPEC, kernel=kernel)
    return float(under(error)())


def time_under(under: Under, run: Callable[[], Any]) -> Row:
    return timing.time_model(under(run))


def cells(
    length: int, fastest: list[tuple[str, str]], only: Sequence[tuple[str, str]] | None = None
) -> Iterator[tuple[str, str, list[Any], str]]:
    """The cases to measure at a length: attention, its implementation, torch's backends, and the rotary kernel."""
    for attention, (implementation, allowed) in attentions().items():
        for kernel in KERNELS:
            if only is not None:
                if (attention, kernel) in only:
                    yield attention, implementation, allowed, kernel
                continue
            if implementation == "eager" and length > EAGER_LIMIT:
                continue
            if length == max(LENGTHS) and (attention, kernel) not in fastest:
                continue
            yield attention, implementation, allowed, kernel


def measure_model(
    name: str,
    measured_rate: float,
    clock: timing.Clock,
    lengths: Sequence[int] | None = None,
    only: Sequence[tuple[str, str]] | None = None,
) -> Iterator[Row]:
    """A row per length, attention and kernel of one model.

    lengths: default `LENGTHS`; only: the pairs of attention and kernel to measure, default all that are worth it.
    """
    lengths = lengths or LENGTHS
    if clock.left < BUILD_S:
        for length in lengths:
            for attention, kernel in only or ():
                yield {
                    "metric": "prefill", "model": name, "tokens": length, "attention": attention, "kernel": kernel,
                    "skipped": NO_TIME,
                }  # fmt: skip
        if only:
            return
    tokens = torch.randint(0, models.MODELS[name]["vocab_size"], (1, max(lengths)), device=timing.DEVICE)
    checked = tokens[:, : models.CHECKED]
    wanted = last_logits(build(name, torch.float64), checked)
    timing.free()
    model = build(name, torch.bfloat16)
    error = partial(logits_error, model, checked, wanted)
    noise = error()
    speeds: dict[tuple[str, str], float] = {}
    for length in lengths:
        fastest, speeds = sorted(speeds, key=speeds.__getitem__)[:2], {}
        for attention, implementation, allowed, kernel in cells(length, fastest, only):
            row: Row = {
                "metric": "prefill",
                "model": name,
                "tokens": length,
                "attention": attention,
                "kernel": kernel,
                "matmul_flops_per_second": measured_rate,
                "noise": noise,
            }
            under = partial(with_attention, model, implementation, allowed)
            check = partial(error_under, model, kernel, under, error)
            time_it = partial(time_under, under, partial(last_logits, model, tokens[:, :length]))
            # Exception: a backend of torch that does not take the shape.
            clock.forget()
            expected = BUILD_S + 8 * models.flops(model.config, length) / (0.3 * measured_rate)
            row = complete(row, clock, expected, time_it, check, limit=models.NOISE * noise, refusals=(Exception,))
            if "skipped" not in row:
                speeds[attention, kernel] = row["seconds"]
            yield add_rate(row, models.flops(model.config, length))


def measure(
    clock: timing.Clock, lengths: Sequence[int] | None = None, only: Sequence[tuple[str, str]] | None = None
) -> Iterator[Row]:
    """A row per model, length, attention and kernel. The longest length is for the two fastest at the one before."""
    measured_rate = timing.matmul_rate()
    for name in models.MODELS:
        yield from measure_model(name, measured_rate, clock, lengths, only)
        timing.free()
