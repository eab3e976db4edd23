"""Passkey retrieval from natural text: several numbered keys, one of which is asked for.

    python eval/passkey_hard.py -m MODEL --scaling yarn:8 --dataset books/ --fixed-length 8192 --num-keys 5

The keys of a prompt differ from one another. They stand at depths that are drawn uniformly, are numbered in the order
of the text, and one of them, drawn too, is asked for: one question per prompt, so that the prompts are independent
trials and the interval of the accuracy means what it says. Prompt and answer together have exactly the given number of
tokens. The text is the documents one after the other; each prompt takes the next stretch of it, and when all was used
they begin again at the start. Keys, depths and questions follow from the seed.

An answer is right when the first integer that greedy decoding gives within 10 tokens is the key. With
`--restrict-tokens true` only digits, blanks and the end may be decoded, so that a model can't begin with other words.
Decoding ends as soon as the answer can't change any more between right and wrong; it needs no cache, see
scaled_rope/generation.py. Scalings that depend on the length are given a scale of their own at each step, and are
decoded through the model's cache, as generation is; with `--uncached` each of their tokens is that of a full pass
over the text, which takes no memory for keys and about as many passes as the answer has tokens.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.checkpoint import encode
from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.passkey_prompts import HardPrompt, build_hard_prompt, draw_keys
from scaled_rope.flags import (
    add_evaluation_arguments,
    add_model_arguments,
    batch_size,
    check_model_arguments,
    context_lengths,
)
from scaled_rope.results import Row, provenance, write_atomic
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.packed import IntArray

FIXED_LENGTH = 8192
MAX_NEW_TOKENS = 10
RED_PAJAMA = "togethercomputer/RedPajama-Data-1T-Sample"


class _Default(int):
    """A default that can be told from the same number given by hand."""


def true_or_false(text: str) -> bool:
    """A yes or no from the command line."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ConfigError(f"{text!r} is not allowed; true or false")
    return words[text.lower()]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/passkey_hard.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("text").add_argument
    source = "a .txt, .jsonl or .parquet file, a folder of these, a hub name or standin:NAME"
    add("-d", "--dataset", default=RED_PAJAMA, metavar="NAME", help=f"{source} (default %(default)s)")
    add("-f", "--feature", default="text", help="field that holds the text (default %(default)s)")
    add("--split", default="train", help="split of a hub dataset (default %(default)s)")
    add = parser.add_argument_group("prompts").add_argument
    add("--num-keys", type=int, default=1, metavar="N", help="keys per prompt (default %(default)s)")
    add("--iterations", type=int, default=20, metavar="N", help="prompts per length (default %(default)s)")
    add("--seed", type=int, default=42, help="keys, depths and questions follow from it (default %(default)s)")
    choice: dict[str, Any] = {"type": true_or_false, "nargs": "?", "metavar": "true|false"}
    words = "decode digits, blanks and the end only (default true)"
    add("--restrict-tokens", **choice, default=True, const=True, help=words)
    add("--uncached", action="store_true", help="no cache under scalings that depend on the length, see above")
    add("--fixed-length", type=int, metavar="N", help=f"= --lengths N (default {FIXED_LENGTH}, if none of the next)")
    add("--heatmap", metavar="FILE", help="also draw what was found by length and depth (.svg or .png)")
    add_evaluation_arguments(parser)
    for name in ("min_tokens", "max_tokens"):
        parser.set_defaults(**{name: _Default(parser.get_default(name))})
    parser.conflict_handler = "resolve"
    add = parser.add_argument_group("more output").add_argument
    add("--output-file", metavar="JSON", help="also write the keys, depths and answers of every prompt")
    return parser


def lengths_of(args: argparse.Namespace) -> list[int]:
    """The context lengths that the flags ask for: one, unless they say more."""
    unsaid = isinstance(args.min_tokens, _Default) and isinstance(args.max_tokens, _Default)
    if args.fixed_length is not None and args.lengths is not None:
        raise ConfigError("give either --fixed-length or --lengths")
    if args.fixed_length is not None or (args.lengths is None and args.tokens_step is None and unsaid):
        args.lengths = str(FIXED_LENGTH if args.fixed_length is None else args.fixed_length)
    return context_lengths(args)


def check_arguments(args: argparse.Namespace) -> list[int]:
    """The context lengths that the flags ask for; refuses what cannot be done."""
    check_model_arguments(args)
    for name in ("iterations", "num_keys"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is not allowed; at least 1")
    return lengths_of(args)


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from scaled_rope.checkpoint import load_config, load_tokenizer
from scaled_rope.evaluation.decoding import Answer, decode_numbers, end_tokens, number_tokens
from scaled_rope.evaluation.jobs import ModelJob, model_jobs
from scaled_rope.evaluation.passkey_context import context_rows, context_table, record_contexts
from scaled_rope.evaluation.runner import Failure, command_line, given_arguments, print_summary, report_failures, run
from scaled_rope.evaluation.statistics import format_share, tally
from scaled_rope.patching.loading import resolve_device
from scaled_rope.patching.patch import cache_obstacle
from scaled_rope.report.drawing import check_format
from scaled_rope.report.heatmap import Panel, save_heatmap


def read_tokens(args: argparse.Namespace, tokenizer: Any, wanted: int) -> IntArray:
    """The first `wanted` tokens of the documents, a blank line between two; fewer where there are no more."""
    name = args.dataset
    between = encode(tokenizer, "\n\n")
    pieces: list[IntArray] = []
    count = 0
    for text in read_documents(name, args.feature, args.split):
        pieces.append(np.asarray((between if pieces else []) + encode(tokenizer, text), dtype=np.int64))
        count += len(pieces[-1])
        if count >= wanted:
            break
    if not count:
        raise ConfigError(f"dataset {name!r} holds no text")
    return np.concatenate(pieces)[:wanted]


def make_prompts(
    tokenizer: Any, tokens: IntArray, length: int, iterations: int, num_keys: int, seed: int
) -> list[HardPrompt]:
    """The prompts of one length. They depend on these arguments only, and the first ones not on how many there are.

    tokens: the text, of which each prompt takes a stretch of `length`. When all whole stretches were used, the first
        one follows again.

    Raises:
        ConfigError: the length is too short for so many keys, or the text for a prompt.
    """
    prompts = []
    for index in range(iterations):
        rng = random.Random(f"passkey_hard/{seed}/{length}/{num_keys}/{index}")
        keys, depths = draw_keys(rng, num_keys), sorted(rng.random() for _ in range(num_keys))
        asked = rng.randint(1, num_keys)
        start = index % max(1, len(tokens) // length) * length
        text = tokens[start : start + length].tolist()
        prompts.append(build_hard_prompt(tokenizer, length, depths, keys, asked, text))
    return prompts


class HardPasskey:
    """The evaluator; see the module's docstring for what it measures."""

    value = "accuracy"

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.lengths = args, check_arguments(args)
        if args.heatmap is not None:
            check_format(Path(args.heatmap))
        self._tokenizer = functools.cache(load_tokenizer)
        self._prompts = functools.cache(self._prompts_of)

    def _prompts_of(self, model: str) -> dict[int, list[HardPrompt]]:
        args, tokenizer = self.args, self._tokenizer(model)
        tokens = read_tokens(args, tokenizer, args.iterations * max(self.lengths))
        vocabulary = load_config(model).get_text_config().vocab_size
        if tokens.max() >= vocabulary:
            raise ConfigError(f"token id {tokens.max()} does not fit model {model!r} with a vocabulary of {vocabulary}")
        return {
            length: make_prompts(tokenizer, tokens, length, args.iterations, args.num_keys, args.seed)
            for length in self.lengths
        }

    def cells(self, job: ModelJob) -> dict[int, Row]:
        cells = {}
        for length, prompts in self._prompts(job.model).items():
            ids = json.dumps([prompt.input_ids + prompt.answer_ids for prompt in prompts])
            name = self.args.dataset.rstrip("/").rpartition("/")[2]
            cells[length] = {
                "metric": "passkey_hard",
                "data": {"name": name, "fingerprint": hashlib.sha256(ids.encode()).hexdigest()[:16]},
                "protocol": {
                    "name": "first-integer",
                    "iterations": self.args.iterations,
                    "num_keys": self.args.num_keys,
                    "restrict_tokens": self.args.restrict_tokens,
                    "max_new_tokens": MAX_NEW_TOKENS,
                    "seed": self.args.seed,
                    **({"cached": True} if self._cached(job) else {}),
                },
            }
        return cells

    def _cached(self, job: ModelJob) -> bool:
        return job.scaling.is_length_dependent and not self.args.uncached

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        return {length: [length] for length in lengths}

    def tokens(self, job: ModelJob, length: int) -> int:
        return int(self.args.iterations) * length

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        prompts, tokenizer = self._prompts(job.model)[length], self._tokenizer(job.model)
        if self._cached(job) and (obstacle := cache_obstacle(model)):
            raise ConfigError(f"{job.label} can read no cache in this model, {obstacle}; use --uncached")
        vocabulary = model.get_output_embeddings().weight.shape[0]
        end = end_tokens(model, tokenizer)
        answers: dict[int, Answer] = {}
        for index, answer in decode_numbers(
            model,
            tokenizer,
            [(prompt.input_ids, prompt.answer_ids, prompt.key) for prompt in prompts],
            length_dependent=job.scaling.is_length_dependent,
            rows_per_pass=batch_size(self.args, length),
            max_new_tokens=MAX_NEW_TOKENS,
            allowed=number_tokens(tokenizer, vocabulary, end) if self.args.restrict_tokens else None,
            cached=self._cached(job),
        ):
            answers[index] = answer
            advance(length)
        outcomes = [bool(answers[index].right) for index in range(len(prompts))]
        yield (
            length,
            {
                **tally(outcomes),
                "prompts": [
                    {
                        "asked": prompt.asked,
                        "depth": round(prompt.depth, 4),
                        "key": prompt.key,
                        "answer": answers[index].text,
                        "right": outcomes[index],
                        "keys": list(prompt.keys),
                        "depths": [round(depth, 4) for depth in prompt.depths],
                    }
                    for index, prompt in enumerate(prompts)
                ],
            },
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    evaluator = HardPasskey(args)
    jobs = model_jobs(args)
    command, record_of = command_line(parser, argv), given_arguments(args)
    answers_file, args.output_file = args.output_file, None  # `run` would write a CSV file
    failures: list[Failure] = []
    rows = run(evaluator, jobs, args, command, args.seed, failures)
    code = report_failures(failures, jobs)
    contexts = context_rows(rows)
    device = resolve_device(args.device)
    record_contexts(args.output, contexts, {"command": command, **provenance(device, args.seed, record_of)})
    keys = f"{args.num_keys} key{'s' if args.num_keys > 1 else ''} in {args.dataset}"
    print_summary(f"passkeys found, {keys}, with 95 % intervals, by context length (tokens)", rows, format_share)
    print(f"\n{context_table(contexts)}")
    if args.heatmap is not None:
        save_heatmap(args.heatmap, [Panel.of_rows(job.name, cells) for job, cells in rows.items()])
        print(f"\nheat map: {args.heatmap}")
    if answers_file is not None:
        found = [{**row, "name": job.name} for job, cells in rows.items() for row in cells.values()]
        write_atomic(answers_file, json.dumps(found, indent=1) + "\n")
        print(f"\nanswers: {answers_file}")
    print(f"\nrows: {args.output}")
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
