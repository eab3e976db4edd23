"""A scripted model for the tests of the advice: its losses, answers and times are known, and its clock is made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from scaled_rope.advice.candidates import Candidate, Passes, dpe_probe, short_list
from scaled_rope.advice.probing import MOST_PROMPTS, Probing
from scaled_rope.advice.rounds import PROMPTS, Halving, Material
from scaled_rope.advice.trials import Budget, Costs, TimedStore, Trials
from scaled_rope.evaluation.controls import Control
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.measurement import ScoredWindow
from scaled_rope.tuning.prompts import retrieval_lengths

L, TARGET, HEAD_DIM = 64, 512, 16
OWN = RopeScaling("default", original_max_position_embeddings=L)
IDENTITY: Row = {"model_fingerprint": "m", "dtype": "float32", "scaling": OWN.to_dict(), "data": {"name": "random"}}
GROUPS = (1, 2, 4, 8, 16, 32, 64, 16)
"""The groups of DPE that the scripted model reads best, a penalty of `GROUP_STEP` for each factor of 2 besides."""
GROUP_STEP = 0.01
QUALITY: dict[str, float] = {
    "yarn": 0.0, "ntk-by-parts": 0.1, "llama3": 0.3, "ntk": 0.2, "dual-chunk": 0.05, "dpe": 0.0,
}  # fmt: skip
"""Nats per token beyond L above the best, by method; of all others 1."""


class Clock:
    """Seconds that pass only when the model is read."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Scripted:
    """A model of known losses. A pass takes a second per 512 tokens; twice that where attention is changed."""

    def __init__(self, quality: Mapping[str, float] = QUALITY, known: float = 0.02) -> None:
        """quality: see `QUALITY`; known: nats by which text before the last L tokens helps."""
        self.clock, self.quality, self.known = Clock(), quality, known
        self.read: list[tuple[str, int]] = []
        self.slow = 1.0
        self.tempered = 0.02
        """Nats per token that an attention temperature costs."""
        self.refuses: Callable[[RopeScaling], None] = lambda scaling: None
        self.patching = 0.0
        """Seconds that it takes to bring a scaling into the model before a window is read."""

    def penalty(self, scaling: RopeScaling) -> float:
        """Nats per token beyond L above the best."""
        nats = self.quality.get(scaling.method, 1.0) + (0.0 if scaling.attention_factor is None else 0.03)
        if scaling.method == "dpe":
            steps = [abs(math.log2(size / best)) for size, best in zip(scaling.params["groups"], GROUPS, strict=True)]
            nats += GROUP_STEP * sum(steps)
        if scaling.attention_temperature is not None:
            nats += self.tempered
        return nats

    def _pass(self, scaling: RopeScaling, length: int) -> None:
        self.refuses(scaling)
        self.read.append((scaling.label, length))
        self.clock.now += self.slow * length / 512 * (2 if scaling.changes_attention else 1)

    def score(self, scaling: RopeScaling, tokens: Any) -> Any:
        self._pass(scaling, len(tokens))
        text = 2 + 0.3 * np.sin(np.cumsum(tokens)[1:]) + (0.01 if scaling.method != "default" else 0.0)
        text[L - 1 :] += self.penalty(scaling) - self.known
        return text

    def under(self, scaling: RopeScaling) -> Callable[[Any], Any]:
        if scaling.method != "default":
            self.clock.now += self.patching
        return lambda tokens: self.score(scaling, tokens)

    def control(self, tokens: Any) -> Any:
        self.clock.now += self.slow * 4 * len(tokens) / 512
        return 2 + 0.3 * np.sin(np.cumsum(tokens)[1:])

    def ask(self, scaling: RopeScaling, prompt: PasskeyPrompt) -> tuple[float, bool]:
        self._pass(scaling, prompt.length)
        nats = 0.1 if prompt.length <= L else self.penalty(scaling) * (2 + prompt.key % 2)
        return 6 * nats, nats < 0.5


def windows(count: int, length: int = TARGET) -> list[ScoredWindow]:
    """Random windows, each of its own document."""
    rng = np.random.default_rng(0)
    return [ScoredWindow(i, 0, rng.integers(0, 500, length)) for i in range(count)]


def prompts(lengths: Sequence[int]) -> dict[int, list[PasskeyPrompt]]:
    """Prompts of each length."""
    return {
        length: [PasskeyPrompt([i] * (length - 6), [1] * 6, 100_000 + i, 0.5, length, 9) for i in range(PROMPTS)]
        for length in lengths
    }


def halving(
    folder: Path,
    model: Scripted,
    minutes: float,
    count: int = 16,
    retrieval: bool = True,
    candidates: Sequence[Candidate] | None = None,
    probing: Probing | None = None,
    temperatures: bool = False,
) -> Halving:
    """The rounds over a scripted model, from the rows that `folder` holds."""
    listed = short_list(OWN, L, TARGET, HEAD_DIM) if candidates is None else list(candidates)
    budget = Budget(60 * minutes, model.clock)
    store = TimedStore(folder / "rows.jsonl", {"seed": 0}, tqdm(disable=True), budget=budget)
    ends = retrieval_lengths(L, TARGET)
    trials = Trials(
        store,
        IDENTITY,
        OWN,
        Passes([OWN, *(one.scaling for one in listed)], ends, HEAD_DIM),
        ends,
        L // 4,
        Control(L, L // 4),
        model.under,
        model.ask,
        model.control,
        Costs(lambda length: length / 512),
    )
    material = Material.of(windows(count), prompts(ends) if retrieval else {})
    question = {"minutes": minutes, "candidates": [one.spec for one in listed]}
    question |= {"probe": probing is not None, "temperatures": temperatures}
    return Halving(
        trials, Candidate("default", OWN), listed, material, question, probing=probing, temperatures=temperatures
    )


def dpe_probing() -> Probing:
    """DPE's probe of the scripted model."""
    probe = dpe_probe(OWN, L, TARGET, HEAD_DIM)
    assert probe is not None
    facts = [PasskeyPrompt([i] * (TARGET - 6), [2] * 6, 100_000 + i, 0.5, TARGET, 9) for i in range(MOST_PROMPTS)]
    return Probing(probe, OWN, facts)


def perplexity_ratio(one: float, other: float) -> float:
    """How much a perplexity is above another, given their nats."""
    return math.expm1(one - other)
