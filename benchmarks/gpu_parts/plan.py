"""The two scripts for a GPU that is there for minutes: which part measures what, in the order of what it is worth.

`first` fits five minutes on one H100, `second` goes on with what did not fit. Each part has a share of the time that
is left when it begins, so what one does not use is for those after it. Rows that are there already are not measured
again, so either script can be run twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch

from benchmarks.gpu_parts import (
    attention,
    copies,
    correctness,
    decode,
    prefill,
    rotary,
    rotary_backward,
    rotary_cases,
    sweep,
    train,
)
from benchmarks.gpu_parts.timing import Clock
from scaled_rope.results import Row

Measure = Callable[[Clock], Iterator[Row]]


@dataclass(frozen=True)
class Part:
    """A part of a script: its name, its share of the time in relation to the others, and what it measures."""

    name: str
    share: float
    measure: Measure


LLAMAS = tuple(shape for shape in rotary_cases.SHAPES if shape.name in ("Llama-2-7B", "Llama-3-8B"))
FIRST_TOKENS = (131072, 1, 32, 4096)
DTYPE = torch.bfloat16
DECODED = (8192, 32768, 131072)
ATTENDED = (32768,)
LONG = (32768, 131072)
TRAINED = 32768
MODELS = ("1B", "135M")
PREFILLED = (("sdpa, flash", "triton"), ("sdpa, flash", "none"), ("sdpa, cuDNN", "triton"))


def first() -> list[Part]:
    one_shape = decode.DECODE_SHAPES[:1]
    return [
        Part("correctness", 35, lambda clock: correctness.measure(clock, correctness.DTYPES[:2])),
        Part("copies", 8, copies.measure),
        Part("rotary", 50, lambda clock: rotary.measure(clock, rotary.FORWARD, FIRST_TOKENS, LLAMAS)),
        Part("rotary-backward", 45, lambda clock: rotary_backward.measure(clock, FIRST_TOKENS, LLAMAS)),
        Part("decode", 30, lambda clock: decode.measure(clock, DTYPE, DECODED, one_shape)),
        Part("attention", 20, lambda clock: attention.measure(
            clock, ATTENDED, attention.ATTENTION_SHAPES[:1], attention_specs()[:1])),
        Part("prefill", 30, lambda clock: prefill.measure(clock, LONG, PREFILLED)),
        Part("train", 40, lambda clock: train.measure(clock, train_cases())),
        Part("sweep", 20, sweep.measure),
    ]  # fmt: skip


def second() -> list[Part]:
    """All of it. What the first script has measured is left out."""
    return [
        *first(),
        Part("correctness, all", 30, correctness.measure),
        Part("decode, all", 30, lambda clock: decode.measure(clock, DTYPE)),
        Part("train, all", 90, train.measure),
        Part("attention, all", 60, attention.measure),
        Part("prefill, all", 60, prefill.measure),
        Part("rotary, all", 60, lambda clock: chain(rotary.measure(clock), rotary_backward.measure(clock))),
    ]


def attention_specs() -> tuple[str, ...]:
    from benchmarks import attention_methods

    return attention_methods.SPECS


def train_cases() -> list[tuple[str, int, str]]:
    return [(name, TRAINED, variant) for name in MODELS for variant in ("ours", train.STOCK)]


PLANS: dict[str, Callable[[], list[Part]]] = {"first": first, "second": second}
