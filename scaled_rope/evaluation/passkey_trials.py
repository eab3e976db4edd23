"""The common part of plain and hard passkeys: their prompts are trials, each of which finds its key or not."""

from __future__ import annotations

import argparse
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from scaled_rope.evaluation.chat_templates import chat_template_hash
from scaled_rope.evaluation.failures import Failure, report_failures
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.passkey_context import context_rows, context_table, record_contexts
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.evaluation.pooled_seeds import pooled
from scaled_rope.evaluation.ranks import current
from scaled_rope.evaluation.runner import place_of, print_summary, run_all
from scaled_rope.evaluation.statistics import tally
from scaled_rope.patching.loading import resolve_device
from scaled_rope.provenance import provenance
from scaled_rope.results import Row

Prompt = TypeVar("Prompt", bound=PasskeyPrompt)


@dataclass(eq=False, kw_only=True)
class PasskeyTrials(ABC, Generic[Prompt]):
    """Base class of the evaluators of passkeys; a subclass says how prompts are made and asked.

    Attributes:
        lengths: lengths of prompts with their answers, in tokens.
        iterations: prompts per length.
        seed: determines everything that is drawn.
        rows_per_pass: prompts per forward pass, given their length.
        chat_template: whether prompts are put into the chat template of the model's tokenizer.
    """

    lengths: Sequence[int]
    iterations: int
    seed: int
    rows_per_pass: Callable[[int], int]
    chat_template: bool = False
    _made: dict[str, dict[int, list[Prompt]]] = field(default_factory=dict, init=False, repr=False)

    value = "accuracy"

    @property
    @abstractmethod
    def metric(self) -> str:
        """The metric of the rows."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The name in rows of the text that the keys are hidden in."""

    @abstractmethod
    def make(self, model: str) -> dict[int, list[Prompt]]:
        """Make the prompts of each length for the tokenizer of a model."""

    @abstractmethod
    def protocol(self, job: ModelJob) -> Row:
        """A row's description of how the prompts are made and asked."""

    @abstractmethod
    def ask(self, model: Any, job: ModelJob, prompts: Sequence[Prompt], advance: Callable[[int], object]) -> list[Row]:
        """Ask prompts of one length; return the row fields of each, with `"right"`, and call `advance(tokens)`."""

    def prompts(self, model: str) -> dict[int, list[Prompt]]:
        """The prompts of `make` for a model, made once."""
        if model not in self._made:
            self._made[model] = self.make(model)
        return self._made[model]

    def cells(self, job: ModelJob) -> dict[int, Row]:
        cells = {}
        template = {"chat_template": chat_template_hash(job.model)} if self.chat_template else {}
        for length, prompts in self.prompts(job.model).items():
            ids = json.dumps([prompt.input_ids + prompt.answer_ids for prompt in prompts])
            cells[length] = {
                "metric": self.metric,
                "data": {"name": self.text, "fingerprint": hashlib.sha256(ids.encode()).hexdigest()[:16]},
                "protocol": {**self.protocol(job), **template},
            }
        return cells

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        return {length: [length] for length in lengths}

    def tokens(self, job: ModelJob, length: int) -> int:
        return self.iterations * length

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        prompts, ranks = self.prompts(job.model)[length], current()
        mine = len(ranks.mine(prompts))

        def ask(share: list[Prompt]) -> list[Row]:
            # The bar of the first process stands for all.
            return self.ask(model, job, share, lambda tokens: advance(tokens * len(prompts) // mine)) if share else []

        asked = ranks.spread(prompts, ask)
        yield length, {**tally([one["right"] for one in asked]), "prompts": asked}


def run_trials(
    groups: Mapping[str, Sequence[PasskeyTrials[Any]]],
    jobs: Sequence[ModelJob],
    args: argparse.Namespace,
    command: str,
    given: Mapping[str, Any],
    title: str,
    show: Callable[[Row], str],
    failures: list[Failure],
) -> tuple[dict[str, dict[ModelJob, dict[int, Row]]], int]:
    """Measure, record the passkey contexts of table 5 beside the rows, and print the tables of both.

    Args:
        groups: evaluators that differ in their seed alone, whose trials count together, by the name of the group; ""
            for the only one.
        args: as for `run`.
        command: the command that repeats the run.
        given: the arguments, as the rows of passkey contexts record them.
        title: title of the table of rows.
        show: formats a row for that table.
        failures: models that could not be read; those that cannot be measured are added.

    Returns:
        The rows by group, job and length, those of several seeds pooled; and the exit code.
    """
    named = {
        " ".join(filter(None, [group, f"seed {one.seed}" if len(evaluators) > 1 else ""])): (group, one)
        for group, evaluators in groups.items()
        for one in evaluators
    }
    seeds = {name: one.seed for name, (_, one) in named.items()}
    measured = run_all({name: one for name, (_, one) in named.items()}, jobs, args, command, seeds, failures)
    metric = next(iter(groups.values()))[0].metric
    code = report_failures(failures, jobs, output=args.output, metric=metric)
    ranks = current()
    found: dict[str, dict[ModelJob, dict[int, Row]]] = {}
    for group, evaluators in groups.items():
        mine = [cells for name, cells in measured.items() if named[name][0] == group]
        rows = found[group] = {job: _together([cells.get(job, {}) for cells in mine]) for job in mine[0]}
        contexts = context_rows(rows)
        if ranks.is_first:
            device = resolve_device(ranks.device(args.device))
            seed = evaluators[0].seed if len(evaluators) == 1 else None
            record = {"command": command, **provenance(place_of(args, device), seed, given)}
            record_contexts(args.output, contexts, record)
        print_summary(f"{title}, {group}" if group else title, rows, show)
        print(f"\n{context_table(contexts)}")
    return found, code


def _together(each: Sequence[Mapping[int, Row]]) -> dict[int, Row]:
    """The rows of several seeds by length, pooled."""
    lengths = dict.fromkeys(length for cells in each for length in cells)
    return {length: pooled([cells[length] for cells in each if length in cells]) for length in lengths}
