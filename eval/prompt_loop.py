"""Talk to a model under a scaling: each line that is typed is a prompt, the answer appears as it is made.

    python eval/prompt_loop.py -m MODEL --scaling yarn:8
    python eval/prompt_loop.py -m MODEL --scaling yarn:8 --input-file book.txt      # each line is asked about the book
    echo "The sea was" | python eval/prompt_loop.py -m MODEL --temperature 0.8

Prompts don't remember one another. With `--input-file` the file comes first and the line that was typed after it; Enter
alone asks for the file as it is, which is read again every time. Ctrl-C stops an answer, Ctrl-D leaves. Decoding is
greedy unless `--temperature` or `--top-k` asks for drawing. In a pipe, prompts are the lines of standard input (with
`--input-file`, and no line, the file alone), only answers go to standard output, and notes to standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaled_rope.checkpoint import encode
from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.flags import add_model_arguments, check_model_arguments


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/prompt_loop.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("prompts and answers").add_argument
    add("--input-file", metavar="FILE", help="text in front of every prompt")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens (default %(default)s)")
    add("--temperature", type=float, metavar="T", help="draw tokens at this temperature (0: greedy)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (at temperature 1 if none is given)")
    add("--repetition-penalty", type=float, metavar="P", help="divide the logits of tokens that were there by P (> 1)")
    add("--penalty-alpha", type=float, help=argparse.SUPPRESS)
    add("--seed", type=int, default=42, help="what is drawn follows from it (default %(default)s)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before a model is read."""
    check_model_arguments(args)
    if args.penalty_alpha is not None and args.penalty_alpha != 0:
        raise ConfigError(
            f"--penalty-alpha {args.penalty_alpha:g} is not available: transformers gave up contrastive search and "
            "fetches it as code from the hub; use --repetition-penalty or --temperature"
        )
    for name, fits, allowed in (
        ("max_new_tokens", lambda n: n >= 1, "at least 1"),
        ("temperature", lambda t: t >= 0, "at least 0"),
        ("top_k", lambda k: k >= 1, "at least 1"),
        ("repetition_penalty", lambda p: p > 0, "more than 0"),
    ):
        value = getattr(args, name)
        if value is not None and not fits(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value} is not allowed; {allowed}")
    if args.input_file is not None:
        read_file(args.input_file)


def read_file(path: str) -> str:
    """The text of the input file.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--input-file {path!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--input-file {path!r} is not UTF-8 text (byte {error.start})") from error


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
import torch
from transformers import GenerationConfig, TextStreamer
from transformers.utils import logging as transformers_logging

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.decoding import end_tokens
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader, model_jobs
from scaled_rope.patching.patch import cache_obstacle


def generation_config(args: argparse.Namespace, model: Any, tokenizer: Any, cached: bool) -> GenerationConfig:
    """How answers are made: by the flags alone, whatever the checkpoint recommends, its end tokens aside."""
    end = end_tokens(model, tokenizer)
    draw = args.temperature != 0 and (args.temperature is not None or args.top_k is not None)
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=draw,
        # None would be filled in from the library's defaults, of which top_k is 50.
        temperature=args.temperature if draw and args.temperature is not None else 1.0,
        top_k=(args.top_k or 0) if draw else None,
        top_p=1.0 if draw else None,
        repetition_penalty=args.repetition_penalty or 1.0,
        use_cache=cached,
        eos_token_id=end or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end or [0])[0],
        bos_token_id=tokenizer.bos_token_id,
    )


def typed_lines() -> Iterator[str]:
    """Lines from the terminal or the pipe, until they end. Ctrl-C at an empty prompt begins a new one."""
    interactive = sys.stdin.isatty()
    if interactive:
        try:
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        except ImportError:
            pass
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input is not UTF-8 text (byte {error.start})") from error
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def prompts(input_file: str | None, lines: Iterator[str]) -> Iterator[str]:
    """Whole prompts: the file, if any, with each line behind it; without a line the file once."""
    empty = True
    for line in lines:
        empty = False
        if input_file is None:
            if line.strip():
                yield line
        elif line.strip():
            yield f"{read_file(input_file).rstrip()}\n{line}"
        else:
            yield read_file(input_file)
    if empty and input_file is not None and not sys.stdin.isatty():
        yield read_file(input_file)


def context_of(job: ModelJob) -> int | None:
    """The context in tokens that the scaling is made for; None where it grows with the text."""
    if job.scaling.is_length_dependent and job.scaling.method != "longrope":
        return None
    return job.scaling.max_position_embeddings


def answerer(args: argparse.Namespace, job: ModelJob) -> Callable[[str], None]:
    """A function that prints the model's answer to a prompt as it is made."""
    tokenizer, model = load_tokenizer(job.model), ModelLoader(args)(job)
    if obstacle := cache_obstacle(model):
        print(f"note: {job.label} changes every key as the text grows, and {obstacle}, so no cache is kept "
              "(use_cache=False); each token reads the whole text again", file=sys.stderr)  # fmt: skip
    config = generation_config(args, model, tokenizer, cached=not obstacle)
    context = context_of(job)
    torch.manual_seed(args.seed)

    def answer(prompt: str) -> None:
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = bos + encode(tokenizer, prompt)
        if not ids:
            return
        if context is not None and len(ids) >= context:
            print(f"warning: the prompt has {len(ids)} tokens, {job.label} is made for {context}", file=sys.stderr)
        elif context is not None and len(ids) + args.max_new_tokens > context:
            print(f"note: the answer may pass the end of the context, {context} tokens", file=sys.stderr)
        row = torch.tensor([ids], device=model.device)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            model.generate(row, attention_mask=torch.ones_like(row), generation_config=config, streamer=streamer)
        except KeyboardInterrupt:
            streamer.end()
            if not sys.stdin.isatty():
                raise
            print("[stopped]", file=sys.stderr)

    return answer


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    jobs = model_jobs(args)
    if len(jobs) != 1:
        raise ConfigError(f"give one model and one scaling; the flags name {len(jobs)}: {jobs[0].name}; {jobs[1].name}")
    transformers_logging.set_verbosity_error()  # its reminder that a model was trained on less is what we came for
    answer = answerer(args, jobs[0])
    if sys.stdin.isatty():
        print(f"{jobs[0].name}. Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    for prompt in prompts(args.input_file, typed_lines()):
        answer(prompt)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
