"""Passkey retrieval: can the model repeat a number that was hidden in a long, dull text?

    python eval/passkey.py -m MODEL --scaling yarn:8 --lengths 256,1024,4096 --iterations 10

A prompt and its answer together have exactly the given number of tokens. Depths lie on a uniform grid from the start
to the end of the filler (or are drawn uniformly as in the released script, `--depths random`), keys and depths follow
from the seed. An answer is right when the model's most likely token is the key's at every answer position. One pass
over prompt and answer decides that: up to the first mistake its context is exactly what greedy decoding would have
built, and after it the answer is wrong either way. Under dynamic scaling that pass uses the scale at the prompt's end,
the one of the first decoding step.

As in table 5 of the paper, the *passkey context* is the largest length with at least 80 % of the keys found, and the
accuracy beside it the mean over the lengths up to it.

Prompts of one length begin alike, up to the shallower key. `--shared-prefill` reads the common part once and keeps its
keys and values: a third of the tokens less with keys on a grid. It is a choice and not the default, because it changes
the order of summation (float32 states differ by 3e-6, bfloat16 ones by 0.02), so near ties fall differently, prompts
are not batched any more, and a pass holds a cache that it does without otherwise: 69 GB for Llama 2 7B at 128k.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt, build_prompt, draw_key
from scaled_rope.flags import (
    add_evaluation_arguments,
    add_model_arguments,
    batch_size,
    check_model_arguments,
    context_lengths,
)
from scaled_rope.results import Row, provenance
from scaled_rope.scaling.record import RopeScaling

DEPTHS = ("grid", "random")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/passkey.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("prompts").add_argument
    add("--iterations", type=int, default=20, metavar="N", help="prompts per length (default %(default)s)")
    add("--depths", choices=DEPTHS, default="grid", help="where the key stands (default %(default)s)")
    add("--shared-prefill", action="store_true", help="read what prompts have in common once, see above")
    add("--seed", type=int, default=42, help="keys and random depths follow from it (default %(default)s)")
    add("--fixed-length", type=int, metavar="N", help="= --lengths N")
    add("--length-step", type=int, help=argparse.SUPPRESS)  # searched for the length in characters; ours is exact
    add("--heatmap", metavar="FILE", help="also draw what was found by length and depth (.svg or .png)")
    add_evaluation_arguments(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> list[int]:
    """The context lengths that the flags ask for; refuses what cannot be done."""
    check_model_arguments(args)
    if args.iterations < 1:
        raise ConfigError(f"--iterations {args.iterations} is not allowed; at least 1")
    if args.fixed_length is not None:
        if args.lengths is not None:
            raise ConfigError("give either --fixed-length or --lengths")
        args.lengths = str(args.fixed_length)
    return context_lengths(args)


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
import torch

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.jobs import ModelJob, model_jobs
from scaled_rope.evaluation.passkey_context import context_rows, context_table, record_contexts
from scaled_rope.evaluation.runner import Failure, command_line, given_arguments, print_summary, report_failures, run
from scaled_rope.evaluation.statistics import tally
from scaled_rope.patching.loading import apply_scaling, resolve_device
from scaled_rope.patching.loss import hidden_states, project, shared_hidden_states
from scaled_rope.report.drawing import check_format
from scaled_rope.report.heatmap import Panel, save_heatmap
from scaled_rope.scaling.frequencies import at_length


def make_prompts(tokenizer: Any, length: int, iterations: int, depths: str, seed: int) -> list[PasskeyPrompt]:
    """The prompts of one length. They depend on these arguments only, not on other lengths.

    Raises:
        ConfigError: the length is too short for a prompt.
    """
    prompts = []
    for index in range(iterations):
        rng = random.Random(f"passkey/{seed}/{length}/{index}")
        key, drawn = draw_key(rng), rng.random()
        grid = index / (iterations - 1) if iterations > 1 else 0.5
        prompts.append(build_prompt(tokenizer, length, grid if depths == "grid" else drawn, key))
    return prompts


@torch.inference_mode()
def score(
    model: Any, prompts: Sequence[PasskeyPrompt], scaling: RopeScaling, rows_per_pass: int
) -> Iterator[list[bool]]:
    """Whether each prompt's key would be the greedy continuation; a list per pass, in order of `prompts`.

    Args:
        model: left with a static scaling if `scaling` is dynamic.
        prompts: all of the same `length`.
        scaling: what the model computes with.
        rows_per_pass: prompts per forward pass.
    """
    # Prompts of one length end at different places if keys differ in tokens; each place has its own dynamic scale.
    for ends_at, group in itertools.groupby(prompts, key=lambda prompt: len(prompt.input_ids)):
        apply_scaling(model, at_length(scaling, ends_at))
        sequences = torch.tensor([[*prompt.input_ids, *prompt.answer_ids] for prompt in group])
        for batch in torch.split(sequences, rows_per_pass):
            batch = batch.to(model.device)
            # Position t predicts token t+1, so the last token is never an input.
            hidden = hidden_states(model, batch[:, :-1])[:, ends_at - 1 :]
            yield _answered(model, hidden, batch[:, ends_at:])


def score_shared(model: Any, prompts: Sequence[PasskeyPrompt], scaling: RopeScaling) -> Iterator[tuple[int, bool]]:
    """The same as (index of a prompt, outcome), the deeper keys last, with one prefill of what prompts share.

    Under dynamic scaling, of those that end at the same place: they have one scale, at which the shared part is read.
    """
    places: dict[int, list[int]] = {}
    for index in sorted(range(len(prompts)), key=lambda index: prompts[index].depth):
        places.setdefault(len(prompts[index].input_ids) if scaling.is_length_dependent else 0, []).append(index)
    for ends_at, order in places.items():
        apply_scaling(model, at_length(scaling, ends_at))
        sequences = [torch.tensor([*prompts[i].input_ids, *prompts[i].answer_ids], device=model.device) for i in order]
        starts = [len(prompts[index].input_ids) - 1 for index in order]
        states = shared_hidden_states(model, [ids[:-1] for ids in sequences], starts)
        for index, ids, start, hidden in zip(order, sequences, starts, states, strict=True):
            yield index, _answered(model, hidden, ids[None, start + 1 :])[0]


def _answered(model: Any, hidden: torch.Tensor, answers: torch.Tensor) -> list[bool]:
    """Whether hidden states [B, t, H] give each row of answers [B, t] greedily."""
    with torch.inference_mode():
        return list((project(model, hidden).argmax(dim=-1) == answers).all(dim=-1).tolist())


class Passkey:
    """The evaluator; see the module's docstring for what it measures."""

    value = "accuracy"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.lengths = args, check_arguments(args)
        if args.heatmap is not None:
            check_format(Path(args.heatmap))
        self._prompts = functools.cache(self._prompts_of)

    def _prompts_of(self, model: str) -> dict[int, list[PasskeyPrompt]]:
        args, tokenizer = self.args, load_tokenizer(model)
        return {
            length: make_prompts(tokenizer, length, args.iterations, args.depths, args.seed) for length in self.lengths
        }

    def cells(self, job: ModelJob) -> dict[int, Row]:
        cells = {}
        for length, prompts in self._prompts(job.model).items():
            ids = json.dumps([prompt.input_ids + prompt.answer_ids for prompt in prompts])
            cells[length] = {
                "metric": "passkey",
                "data": {"name": "passkey", "fingerprint": hashlib.sha256(ids.encode()).hexdigest()[:16]},
                "protocol": {
                    "name": "teacher-forced",
                    "iterations": self.args.iterations,
                    "depths": self.args.depths,
                    "seed": self.args.seed,
                    **({"shared_prefill": True} if self.args.shared_prefill else {}),
                },
            }
        return cells

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        return {length: [length] for length in lengths}

    def tokens(self, job: ModelJob, length: int) -> int:
        return int(self.args.iterations) * length

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        prompts = self._prompts(job.model)[length]
        outcomes: list[bool] = []
        if self.args.shared_prefill:
            found = {}
            for index, outcome in score_shared(model, prompts, job.scaling):
                found[index] = outcome
                advance(length)
            outcomes = [found[index] for index in range(len(prompts))]
        else:
            for batch in score(model, prompts, job.scaling, batch_size(self.args, length)):
                outcomes += batch
                advance(len(batch) * length)
        yield (
            length,
            {
                **tally(outcomes),
                "prompts": [
                    {"depth": round(prompt.depth, 4), "key": prompt.key, "right": outcome}
                    for prompt, outcome in zip(prompts, outcomes, strict=True)
                ],
            },
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    evaluator = Passkey(args)
    jobs = model_jobs(args)
    failures: list[Failure] = []
    command = command_line(parser, argv)
    rows = run(evaluator, jobs, args, command, args.seed, failures)
    code = report_failures(failures, jobs)
    contexts = context_rows(rows)
    device = resolve_device(args.device)
    record_contexts(args.output, contexts, {"command": command, **provenance(device, args.seed, given_arguments(args))})
    print_summary("passkeys found, by context length (tokens)", rows, lambda row: f"{row['right']}/{row['n']}")
    print(f"\n{context_table(contexts)}")
    if args.heatmap is not None:
        save_heatmap(args.heatmap, [Panel.of_rows(job.name, cells) for job, cells in rows.items()])
        print(f"\nheat map: {args.heatmap}")
    print(f"\nrows: {args.output}")
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
