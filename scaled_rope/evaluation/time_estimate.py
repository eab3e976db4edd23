"""How long benchmarks will take: from a few timed passes of the model, before anything is measured.

The time of a pass over n tokens is taken as a·n + b·n² (layers and attention), that of decoding one token after n
others as c + d·n, each through two measured points. Prompts are counted one by one, without batching, and answers at
their longest, so that a machine with a GPU will usually be faster.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.lm_eval_tasks import TaskFacts
from scaled_rope.evaluation.task_presets import RULER, SAMPLES
from scaled_rope.patching.device_maps import computing_devices, input_device
from scaled_rope.patching.loss import hidden_states, project
from scaled_rope.patching.patch import cache_obstacle
from scaled_rope.scaling.hf_config import text_config

_DECODED = 8  # tokens that are timed
_LONGEST = 8192  # of the timed passes, in tokens: a longer one would take as long as what is to be measured
_CHOICES = 4  # assumed passes for a question with choices


@dataclass(frozen=True)
class Pace:
    """Two lengths in tokens, and the seconds of a pass and of decoding one more token at each."""

    lengths: tuple[int, int]
    passes: tuple[float, float]
    steps: tuple[float, float]

    def of_pass(self, length: int) -> float:
        """Seconds of a pass over so many tokens."""
        (first, second), (early, late) = self.lengths, self.passes
        square = (late / second - early / first) / (second - first)
        linear = early / first - square * first
        if square < 0:  # noise, or a machine that a short text does not fill
            square, linear = 0.0, late / second
        elif linear < 0:
            square, linear = late / second**2, 0.0
        return linear * length + square * length**2

    def of_answer(self, length: int, tokens: int) -> float:
        """Seconds of decoding so many tokens after `length` others."""
        (first, second), (early, late) = self.lengths, self.steps
        slope = max(0.0, (late - early) / (second - first))
        return tokens * max(min(self.steps), early + slope * (length + tokens / 2 - first))


def timed_lengths(lengths: Sequence[int]) -> tuple[int, int]:
    """A short and a middle length in tokens of those that are to be measured, for `measure_pace`."""
    ordered = sorted(lengths)
    middle = max(2, min(_LONGEST, ordered[len(ordered) // 2]))
    short = min(ordered[0], middle)
    return (max(1, middle // 4), middle) if short >= middle else (short, middle)


@torch.inference_mode()
def time_passes(model: Any, lengths: Sequence[int]) -> list[float]:
    """Seconds of a pass of a loaded model over each of these lengths in tokens."""

    def one_pass(ids: torch.Tensor) -> None:
        project(model, hidden_states(model, ids)[:, -1:])

    generator = torch.Generator().manual_seed(0)
    return [_seconds(functools.partial(one_pass, _drawn(model, n, generator)), model) for n in lengths]


def _drawn(model: Any, length: int, generator: torch.Generator) -> torch.Tensor:
    """A text of random tokens."""
    vocabulary = text_config(model.config).vocab_size
    return torch.randint(vocabulary, (1, length), generator=generator, device="cpu").to(input_device(model))


@torch.inference_mode()
def measure_pace(model: Any, lengths: tuple[int, int]) -> Pace:
    """Time passes and decoding of a loaded model, at two different lengths in tokens."""
    passes, steps = time_passes(model, lengths), []
    cached = not cache_obstacle(model)
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = _drawn(model, length, generator)

        def decode(count: int, ids: torch.Tensor = ids) -> None:
            mask = torch.ones_like(ids)
            more = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            model.generate(ids, attention_mask=mask, use_cache=cached, **more)

        alone = _seconds(functools.partial(decode, 1), model)
        several = _seconds(functools.partial(decode, 1 + _DECODED), model)
        steps.append(max(0.0, several - alone) / _DECODED)
    return Pace(lengths, (passes[0], passes[1]), (steps[0], steps[1]))


def _seconds(run: Callable[[], object], model: Any) -> float:
    """The shorter of two runs of a model, in seconds."""
    found = []
    for _ in range(2):
        _finish(model)
        begin = time.perf_counter()
        run()
        _finish(model)
        found.append(time.perf_counter() - begin)
    return min(found)


def _finish(model: Any) -> None:
    """Wait for all GPUs on which a model computes."""
    for device in computing_devices(model):
        if device.type == "cuda":
            torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Part:
    """The cost of measuring one task.

    Attributes:
        prompts: number of prompts, of all lengths; None: as many as its data set has, which is not read yet.
        seconds: of all prompts; of one, where their number is not known; None where nothing can be said.
    """

    facts: TaskFacts
    prompts: int | None
    seconds: float | None
    obstacle: str = ""
    """Why it cannot be measured on this model."""


def estimate(
    facts: Sequence[TaskFacts], pace: Pace, lengths: Sequence[int], limit: int | None, context: int | None
) -> list[Part]:
    """The time for each task.

    Args:
        lengths: in tokens, for tasks that are made for them.
        limit: prompts of each task and length; None: all.
        context: the longest prompt in tokens, which those of other tasks are taken to have; None: there is none.
    """
    parts = []
    for task in facts:
        if task.takes_lengths:
            count = limit if limit is not None else SAMPLES if task.name in RULER else None
            each = [_prompt_seconds(task, pace, length) for length in lengths]
            prompts = None if count is None else count * len(lengths)
            parts.append(Part(task, prompts, sum(each) * (1 if count is None else count)))
        elif context is not None and task.answer_tokens >= context:
            why = f"its answers of {task.answer_tokens} tokens don't fit the model's {context}"
            parts.append(Part(task, limit, None, why))
        else:
            each_one = None if context is None else _prompt_seconds(task, pace, context)
            seconds = None if each_one is None else each_one * (1 if limit is None else limit)
            parts.append(Part(task, limit, seconds))
    return parts


def _prompt_seconds(task: TaskFacts, pace: Pace, length: int) -> float:
    """For a prompt and its answer, which have `length` tokens together."""
    if task.answer_tokens == 0:
        return _CHOICES * pace.of_pass(length)
    prompt = max(1, length - task.answer_tokens)
    return pace.of_pass(prompt) + pace.of_answer(prompt, task.answer_tokens)


def plan_table(parts: Sequence[Part]) -> str:
    """The plan for the terminal: tasks that run offline first, then those that need a text, and the sum."""
    lines = []
    for part in sorted(parts, key=lambda part: part.facts.source is not None):
        needs = "runs offline" if part.facts.source is None else f"needs {part.facts.source}"
        if part.facts.unsafe:
            needs += ", --confirm-run-unsafe-code"
        count = "all" if part.prompts is None else str(part.prompts)
        if part.seconds is None:
            took = part.obstacle or "unknown"
        else:
            took = duration(part.seconds) + (" for each prompt" if part.prompts is None else "")
        lines.append([part.facts.name, needs, count, took])
    known = sum(part.seconds or 0.0 for part in parts if part.prompts is not None)
    local = [part for part in parts if part.facts.source is None]
    if 0 < len(local) < len(parts):
        alone = sum(part.seconds or 0.0 for part in local if part.prompts is not None)
        return f"{_sum_text(parts, known, lines)}; those that run offline about {duration(alone)}"
    return _sum_text(parts, known, lines)


def _sum_text(parts: Sequence[Part], known: float, lines: Sequence[Sequence[str]]) -> str:
    open_ones = sum(part.prompts is None and not part.obstacle for part in parts)
    more = f", and {open_ones} tasks whose number of prompts is known once their data is read" if open_ones else ""
    return f"{format_table(['task', '', 'prompts', 'about'], lines)}\nin all: about {duration(known)}{more}"


def duration(seconds: float) -> str:
    """A time for people: "40 s", "12 min", "3.5 h", "6 days"."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= (2 if unit == "days" else 1.5) * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
