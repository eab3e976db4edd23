"""Plain passkeys: one key in dull sentences, found if greedy decoding would repeat it. One forward pass tells."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.chat_templates import ChatTurn, chat_turn
from scaled_rope.evaluation.decoding import judge
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.passkey_prompts import RELEASED, WORDINGS, PasskeyPrompt, build_prompt, draw_key
from scaled_rope.evaluation.passkey_trials import PasskeyTrials
from scaled_rope.evaluation.served_model import ServedModel
from scaled_rope.patching.device_maps import input_device
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.patching.loss import hidden_states, project, shared_hidden_states
from scaled_rope.results import Row
from scaled_rope.scaling.frequencies import at_length
from scaled_rope.scaling.record import RopeScaling


def make_prompts(
    tokenizer: Any,
    length: int,
    iterations: int,
    depths: str,
    seed: int,
    chat: ChatTurn | None = None,
    wording: str = RELEASED,
) -> list[PasskeyPrompt]:
    """Make the prompts of one length. They depend on these arguments only, not on other lengths.

    depths: places of the keys: "grid", evenly from the start of the filler to its end, or "random".
    chat: the chat template that they are put into; None: plain text.
    wording: a name in `WORDINGS`; keys and depths are the same in all of them.

    Raises:
        ConfigError: the length is too short for a prompt.
    """
    prompts = []
    for index in range(iterations):
        rng = random.Random(f"passkey/{seed}/{length}/{index}")
        key, drawn = draw_key(rng), rng.random()
        grid = index / (iterations - 1) if iterations > 1 else 0.5
        depth = grid if depths == "grid" else drawn
        prompts.append(build_prompt(tokenizer, length, depth, key, chat=chat, wording=WORDINGS[wording]))
    return prompts


@torch.inference_mode()
def score(
    model: Any, prompts: Sequence[PasskeyPrompt], scaling: RopeScaling, rows_per_pass: int
) -> Iterator[list[bool]]:
    """Yield whether each prompt's key would be the greedy continuation; a list per pass, in order of `prompts`.

    Args:
        model: left with a static scaling if `scaling` is dynamic.
        prompts: all of the same `length`.
        scaling: the scaling under test.
        rows_per_pass: prompts per forward pass.
    """
    # Prompts of one length end at different places if keys differ in tokens; each place has its own dynamic scale.
    for ends_at, group in itertools.groupby(prompts, key=lambda prompt: len(prompt.input_ids)):
        apply_scaling(model, at_length(scaling, ends_at))
        sequences = torch.tensor([[*prompt.input_ids, *prompt.answer_ids] for prompt in group])
        for batch in torch.split(sequences, rows_per_pass):
            batch = batch.to(input_device(model))
            # Position t predicts token t+1, so the last token is never an input.
            hidden = hidden_states(model, batch[:, :-1])[:, ends_at - 1 :]
            yield _answered(model, hidden, batch[:, ends_at:])


def score_shared(model: Any, prompts: Sequence[PasskeyPrompt], scaling: RopeScaling) -> Iterator[tuple[int, bool]]:
    """Like `score`, with one prefill of what prompts share; yields (index of a prompt, outcome), deeper keys last.

    Under dynamic scaling only prompts that end at the same place share: they have one scale for the shared part.
    """
    places: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: prompts[index].depth):
        places.setdefault(len(prompts[index].input_ids) if scaling.is_length_dependent else 0, []).append(index)
    for ends_at, order in places.items():
        apply_scaling(model, at_length(scaling, ends_at))
        device = input_device(model)
        sequences = [torch.tensor([*prompts[i].input_ids, *prompts[i].answer_ids], device=device) for i in order]
        starts = [len(prompts[index].input_ids) - 1 for index in order]
        states = shared_hidden_states(model, [ids[:-1] for ids in sequences], starts)
        for index, ids, start, hidden in zip(order, sequences, starts, states, strict=True):
            yield index, _answered(model, hidden, ids[None, start + 1 :])[0]


def score_served(model: ServedModel, prompts: Sequence[PasskeyPrompt], at_once: int) -> Iterator[list[bool]]:
    """Like `score`, by greedy answers of a server with as many tokens as the key has; `at_once` prompts at a time."""
    for first in range(0, len(prompts), at_once):
        part = prompts[first : first + at_once]
        texts = model.complete([prompt.input_ids for prompt in part], [len(prompt.answer_ids) for prompt in part])
        yield [judge(text, True, prompt.key) is True for text, prompt in zip(texts, part, strict=True)]


def _answered(model: Any, hidden: torch.Tensor, answers: torch.Tensor) -> list[bool]:
    """Whether greedy decoding from hidden states [B, t, H] gives each row of answers [B, t]."""
    with torch.inference_mode():
        found = project(model, hidden).argmax(dim=-1)
        return list((found == answers.to(found.device)).all(dim=-1).tolist())


@dataclass(eq=False, kw_only=True)
class Passkey(PasskeyTrials[PasskeyPrompt]):
    """The evaluator of plain passkeys.

    Attributes:
        depths: as for `make_prompts`.
        shared_prefill: whether the beginning that prompts of one length share is read only once.
        wording: as for `make_prompts`.
    """

    wording: str = RELEASED
    depths: str = "grid"
    shared_prefill: bool = False

    metric = text = "passkey"

    def make(self, model: str) -> dict[int, list[PasskeyPrompt]]:
        tokenizer = load_tokenizer(model)
        chat = chat_turn(tokenizer) if self.chat_template else None
        return {
            length: make_prompts(tokenizer, length, self.iterations, self.depths, self.seed, chat, self.wording)
            for length in self.lengths
        }

    def protocol(self, job: ModelJob) -> Row:
        return {
            "name": "teacher-forced" if job.server is None else "greedy",
            "iterations": self.iterations,
            "depths": self.depths,
            "seed": self.seed,
            **({"shared_prefill": True} if self.shared_prefill else {}),
            # Absent for the released one, so that rows of runs before there were others stay what they are.
            **({"wording": self.wording} if self.wording != RELEASED else {}),
        }

    def ask(
        self, model: Any, job: ModelJob, prompts: Sequence[PasskeyPrompt], advance: Callable[[int], object]
    ) -> list[Row]:
        length = prompts[0].length
        outcomes: list[bool] = []
        if isinstance(model, ServedModel):
            for batch in score_served(model, prompts, self.rows_per_pass(length)):
                outcomes += batch
                advance(len(batch) * length)
        elif self.shared_prefill:
            found = {}
            for index, outcome in score_shared(model, prompts, job.scaling):
                found[index] = outcome
                advance(length)
            outcomes = [found[index] for index in range(len(prompts))]
        else:
            for batch in score(model, prompts, job.scaling, self.rows_per_pass(length)):
                outcomes += batch
                advance(len(batch) * length)
        return [
            {"depth": round(prompt.depth, 4), "distance": prompt.distance, "key": prompt.key, "right": outcome}
            for prompt, outcome in zip(prompts, outcomes, strict=True)
        ]
