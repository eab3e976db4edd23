"""The evaluator of QuALITY: questions about stories, answered by the likeliest letter."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.chat_templates import chat_template_hash, chat_turn
from scaled_rope.evaluation.choice_prompts import (
    LETTERS,
    ChoicePrompt,
    build_choice_prompt,
    read_questions,
    score_letters,
)
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.ranks import current
from scaled_rope.evaluation.statistics import tally
from scaled_rope.files import write_atomic
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.results import Row
from scaled_rope.scaling.frequencies import at_length


@dataclass(eq=False, kw_only=True)
class Quality:
    """The evaluator of QuALITY.

    Attributes:
        dataset, split: the questions, as for `read_questions`.
        limit: the first so many questions; None: all.
        max_tokens: longest prompt, letter included; None: no limit.
        too_long: treatment of longer prompts: "cut", their story loses its end, or "drop".
        chat_template: whether prompts are put into the chat template of the model's tokenizer.
    """

    dataset: str
    split: str = "validation"
    limit: int | None = None
    max_tokens: int | None = None
    too_long: str = "cut"
    chat_template: bool = False
    _made: dict[str, list[ChoicePrompt]] = field(default_factory=dict, init=False, repr=False)

    value = "accuracy"

    def prompts(self, model: str) -> list[ChoicePrompt]:
        """The questions as prompts for the tokenizer of a model.

        Raises:
            ConfigError: they cannot be read, or none is left.
        """
        if model not in self._made:
            self._made[model] = self._make(load_tokenizer(model))
        return self._made[model]

    def _make(self, tokenizer: Any) -> list[ChoicePrompt]:
        prompts: list[ChoicePrompt] = []
        chat = chat_turn(tokenizer) if self.chat_template else None
        limit = self.max_tokens if self.too_long == "cut" else None
        read = 0
        for question in read_questions(self.dataset, self.split):
            prompt = build_choice_prompt(tokenizer, question, limit, chat)
            read += 1
            if self.max_tokens is None or prompt.length <= self.max_tokens:
                prompts.append(prompt)
            if len(prompts) == self.limit:
                break
        if not prompts:
            why = f"all {read} questions are longer than {self.max_tokens} tokens" if read else "it holds no questions"
            raise ConfigError(f"dataset {self.dataset!r} cannot be used: {why}")
        return prompts

    def cells(self, job: ModelJob) -> dict[int, Row]:
        prompts = self.prompts(job.model)
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(json.dumps([prompt.context, prompt.letters, prompt.answer]).encode())
        name = self.dataset if not Path(self.dataset).is_file() else Path(self.dataset).name
        template = {"chat_template": chat_template_hash(job.model)} if self.chat_template else {}
        protocol = {"name": "letter-likelihood", "max_tokens": self.max_tokens, "too_long": self.too_long, **template}
        cell = {
            "metric": "quality",
            "data": {"name": name, "fingerprint": digest.hexdigest()[:16], "questions": len(prompts)},
            "protocol": protocol,
        }
        return {self.max_tokens or max(prompt.length for prompt in prompts): cell}

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        return {length: [length] for length in lengths}

    def tokens(self, job: ModelJob, length: int) -> int:
        return sum(prompt.length for prompt in self.prompts(job.model))

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        prompts, ranks = self.prompts(job.model), current()
        questions = ranks.spread(
            prompts, lambda share: list(self._ask(model, job, share, lambda tokens: advance(tokens * ranks.count)))
        )
        cut = sum(prompt.cut for prompt in prompts)
        yield length, {**tally([one["right"] for one in questions]), "cut": cut, "questions": questions}

    def _ask(
        self, model: Any, job: ModelJob, prompts: Sequence[ChoicePrompt], advance: Callable[[int], object]
    ) -> Iterator[Row]:
        """Ask questions; yield the row fields of each, and call `advance(tokens)`."""
        for prompt in prompts:
            apply_scaling(model, at_length(job.scaling, len(prompt.context)))
            scores = score_letters(model, prompt)
            choice = scores.index(max(scores))
            advance(prompt.length)
            yield {
                "choice": LETTERS[choice],
                "answer": LETTERS[prompt.answer],
                "right": choice == prompt.answer,
                "scores": [round(score, 4) for score in scores],
                "tokens": prompt.length,
                "cut": prompt.cut,
            }


def describe_choices(rows: Mapping[ModelJob, Mapping[int, Row]]) -> Iterator[str]:
    """Yield lines with choice, right answer and scores of every question, under the name of each model."""
    for job, cells in rows.items():
        for row in cells.values():
            yield f"\n{job.name}"
            for number, one in enumerate(row.get("questions", ()), 1):
                scores = " ".join(f"{letter} {s:.2f}" for letter, s in zip(LETTERS, one["scores"], strict=True))
                yield f"{number}: choice {one['choice']}, answer {one['answer']} ({scores})"


def write_accuracies(path: str, jobs: Sequence[ModelJob], rows: Mapping[ModelJob, Mapping[int, Row]]) -> None:
    """Write accuracies in the layout of the released files: a line of names, a line of values, empty if missing."""
    cells: list[Row] = [next(iter(rows.get(job, {}).values()), {}) for job in jobs]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([job.model if job.carried else f"{job.model} {job.label}" for job in jobs])
    writer.writerow([row.get("accuracy", "") for row in cells])
    write_atomic(path, text.getvalue())
