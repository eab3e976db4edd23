"""Search one divisor per pair of dimensions for a model and a length, without training, as LongRoPE does.

    scaled-rope search MODEL --target 2048 --dataset FOLDER --output out/search

Each candidate reads the same windows of text and the same hidden facts, in one forward pass each, with the model's
frequencies exchanged in place. Its fitness is the loss beyond L, the loss of the answers, or the sum of both. The
strategies are in `scaled_rope.tuning.strategies`; whatever the strategy, the result is a `longrope` scaling.

The folder of `--output` receives trace.jsonl (what is searched, then a row per evaluation), best.json (the scaling to
use, and how it was found), divisors.png and fitness.png. A rerun reads the trace and goes on where it ends; since a
strategy follows from its seed and from the fitness of what it has tried, an interrupted search ends like one that
never stopped.

The best of many candidates is flattered by the text that chose it. So the best and the best of those that the search
began with are read on windows and prompts that chose nothing (`--held-back`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from scaled_rope.checkpoint import display_name, load_tokenizer
from scaled_rope.command_line import Parser
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader, model_jobs
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.evaluation.ranks import refuse_several
from scaled_rope.evaluation.runner import given_arguments
from scaled_rope.evaluation.statistics import paired_difference
from scaled_rope.files import folder_lock, write_atomic
from scaled_rope.flags.search import add_search_arguments, check_search_arguments, search_attention, search_prompts
from scaled_rope.progress import Progress
from scaled_rope.provenance import portable_command, provenance
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.token_documents import TokenSource
from scaled_rope.tuning.constants import factor_grid
from scaled_rope.tuning.divisor_figures import write_search_figures
from scaled_rope.tuning.divisor_trials import (
    Evaluated,
    Material,
    Measure,
    Trace,
    choose_windows,
    drive,
    measure_on,
)
from scaled_rope.tuning.divisors import Space
from scaled_rope.tuning.measurement import (
    REFERENCES,
    Answer,
    Ask,
    ScoredWindow,
    check_target,
    model_ask,
    model_score,
    read_windows,
    reference_retrieval,
)
from scaled_rope.tuning.prompts import fact_prompts, naming_original, retrieval_lengths
from scaled_rope.tuning.search import loading_arguments
from scaled_rope.tuning.strategies import Evolution, Strategy, YarnSpace, cma_es, coordinate, evolve, grid, load_cmaes

_EACH = 8
"""The most windows of one document."""
_MOST, _TOKENS = 96, 500_000
"""Windows, and tokens of them, after which no more text is read."""
_HELD_BACK = 1_000_003
"""Added to the seed of prompts that only judge."""


def _command(args: argparse.Namespace) -> str:
    """The command that repeats a run."""
    parser = Parser("scaled-rope search")
    add_search_arguments(parser)
    return portable_command(parser.repeat(args))


def _space(args: argparse.Namespace, job: ModelJob) -> Space:
    own = job.scaling
    trained = own.original_max_position_embeddings
    check_target(trained, args.target, display_name(args.model))
    base = RopeScaling.from_spec("default", own)
    space = Space(base, args.target, job.head_dim, same_within=args.within == "same")
    if args.attention_factor != "search":
        return space
    factors = factor_grid(YarnSpace(space).paper)
    return replace(space, attention=(factors[0], factors[-1]))


def _strategy(args: argparse.Namespace, space: Space, settings: Evolution, budget: int) -> Strategy:
    if args.strategy == "cma-es":
        return cma_es(space, args.seed)
    if args.strategy == "coordinate":
        return coordinate(space, args.seed)
    if args.strategy == "grid":
        return grid(space, budget, args.seed)
    starts = space.starts(args.start or ())
    if settings.population < len(starts):
        raise ConfigError(
            f"--population {settings.population} is not allowed; at least {len(starts)}, what the search begins with"
        )
    return evolve(space, starts, settings, search_attention(args.attention_factor), args.seed)


@dataclass(frozen=True)
class _Texts:
    """Material to search with, and material that judges."""

    search: Material
    judge: Material
    left: int
    """Windows that are left for the judge; without any, its facts are hidden in windows that chose."""


def _read_texts(args: argparse.Namespace, job: ModelJob, space: Space) -> _Texts:
    """Windows and prompts, none of them in the words of a test.

    Raises:
        ConfigError: too little text.
    """
    reading = argparse.Namespace(**{**vars(args), "windows": _EACH})
    hint = f"a smaller --target needs less than {args.target}"
    most = min(_MOST, max(2 * (args.windows + args.held_back), _TOKENS // args.target))
    windows = read_windows(reading, job, args.target, unused=True, hint=hint, most=most)
    if len(windows) < args.windows:
        raise ConfigError(
            f"{len(windows)} windows of {args.target} tokens are there; --windows asks for {args.windows}"
        )
    chosen = choose_windows(windows, args.windows + args.held_back, args.seed)
    tokenizer = load_tokenizer(job.model)

    def material(some: list[ScoredWindow], count: int, seed: int) -> Material:
        prompts = {}
        if search_prompts(args) and count:
            filler = [one.tokens[1:].tolist() for one in (some or windows)]
            lengths = retrieval_lengths(space.original, args.target)[1:]
            prompts = {length: fact_prompts(tokenizer, length, count, seed, filler) for length in lengths}
        return Material([] if args.fitness == "needles" else some, prompts)

    # What chooses must not depend on how much judges, so that more can be held back later.
    return _Texts(
        material(chosen[: args.windows], search_prompts(args), args.seed),
        material(chosen[args.windows :], args.held_back, args.seed + _HELD_BACK),
        len(chosen) - args.windows,
    )


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope search`, one at a time in a folder: what a row of the trace is follows from those before.

    Raises:
        ConfigError: bad input, before weights are read where that is possible; another run writes to the folder.
    """
    check_search_arguments(args)
    refuse_several("scaled-rope search")
    with folder_lock(Path(args.output)):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    if args.strategy == "cma-es":
        load_cmaes()
    flags = loading_arguments(args)
    job = model_jobs(flags)[0]
    space = _space(args, job)
    settings = Evolution(args.population, args.mutants, args.crossed, args.rounds, args.mutation_rate, args.parents)
    budget = args.evaluations or settings.evaluations
    strategy = _strategy(args, space, settings, budget)
    if job.scaling.method != "default":
        print(
            f"note: the checkpoint's own scaling, {job.scaling.label}, is replaced by each that is tried",
            file=sys.stderr,
        )
    with naming_original(space.original, "--fitness perplexity asks none"):
        references = _references(args, job, space) if search_prompts(args) else []
        texts = _read_texts(args, job, space)
    folder, load = Path(args.output), ModelLoader(flags)
    record = {"command": _command(args), **provenance(load.device, args.seed, given_arguments(args))}
    head: Row = {
        **{name: job.fields()[name] for name in ("model", "model_fingerprint", "dtype")},
        "original_max_position_embeddings": space.original,
        "target": args.target,
        "strategy": args.strategy,
        "fitness": args.fitness,
        "seed": args.seed,
    }
    question = {name: value for name, value in head.items() if name != "model"}
    question |= {"data": TokenSource(args.dataset).title, "text": texts.search.fingerprint(), "within": args.within}
    if args.strategy == "evolution":
        # All but the number of rounds, which only says when it ends.
        question |= {name: value for name, value in vars(settings).items() if name != "rounds"}
        question |= {"start": list(space.starts(args.start or ())), "attention_factor": args.attention_factor}
    if args.strategy == "grid":
        question["evaluations"] = budget  # which decides how fine the grid is
    score, ask = model_score(load, job), model_ask(load, job)
    trace = Trace(folder / "trace.jsonl", question, record)
    if trace.notes is None:
        trace.notes = _doubts(references, space, ask) if texts.search.prompts else []
    notes = list(trace.notes)
    made = _search(args, strategy, space, trace, measure_on(texts.search, space.original, score, ask), budget)
    if kept := trace.others(len(made)):  # more than are asked for now: what they found is not given up
        print(f"note: {folder} keeps {trace.kept} evaluations, {len(kept)} more than are asked for now; all count",
              file=sys.stderr)  # fmt: skip
        made = [*made, *kept]
    best = min(made, key=lambda one: (one.fitness, one.number))
    starts = [one for one in made if one.origin["kind"] == "start"]
    first = min(starts, key=lambda one: one.fitness)
    judged = None
    if texts.left < args.held_back:
        notes.append(
            f"--held-back {args.held_back}: {texts.left} windows are left to judge the best by; longer or more "
            "documents give more"
        )
    if texts.judge.passes and best is not first:
        judged = _judge(best, first, measure_on(texts.judge, space.original, score, ask))
    summary = {**head, **_summary(made, best, first, starts, texts, judged, space, job.as_saved), "notes": notes}
    write_atomic(folder / "best.json", json.dumps({**summary, "provenance": record}, indent=2) + "\n")
    write_search_figures(made, best, space, display_name(args.model), folder)
    if args.json:
        print(json.dumps({**summary, "provenance": record}, indent=2))
    else:
        print(_report(args, summary, folder))
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return 0


def _references(args: argparse.Namespace, job: ModelJob, space: Space) -> list[PasskeyPrompt]:
    """Prompts within L, in plain sentences.

    Raises:
        TooShort: L has no room for them.
    """
    filler = [list(range(3, 3 + min(space.original, 200)))]
    return fact_prompts(load_tokenizer(job.model), space.original, 2 * REFERENCES, args.seed, filler)[1::2]


def _doubts(references: Sequence[PasskeyPrompt], space: Space, ask: Ask) -> list[str]:
    """A warning where the model, unscaled and within L, does not find what it is asked for."""
    asked = []
    for one in references:
        nats, right = ask(space.base, one)
        asked.append(Answer(math.exp(-nats / len(one.answer_ids)), right))
    probability, _, used = reference_retrieval(asked)
    if used:
        return []
    return [
        f"unscaled and within L the model gives answers a probability of {probability:.2f}, so it does not find what "
        "it is asked for under any scaling; --fitness perplexity leaves that out"
    ]


def _search(
    args: argparse.Namespace, strategy: Strategy, space: Space, trace: Trace, measure: Measure, budget: int
) -> list[Evaluated]:
    lowest = math.inf
    with Progress(total=budget, unit="candidate", disable=args.hide_progress, initial=min(trace.kept, budget)) as bar:

        def advance(one: Evaluated) -> None:
            nonlocal lowest
            lowest = min(lowest, one.fitness)
            if one.number >= trace.kept:
                bar.set_description(f"round {one.generation}", refresh=False)
                bar.set_postfix_str(f"best {lowest:.4f}", refresh=False)
                bar.update(1)

        return drive(strategy, lambda proposal: space.record(proposal.genome), trace, measure, budget, advance)


# -------------------------------------------------------------------------------------------------------------- results


def _judge(best: Evaluated, first: Evaluated, measure: Measure) -> Row:
    """The best and the best start on windows and prompts that chose nothing, and how far apart they are."""
    mine, others = measure(best.scaling), measure(first.scaling)
    said: Row = {"best": mine.fields(), "start": others.fields(), "start_name": first.origin["name"]}
    pairs = {
        "loss": ({"": list(mine.beyond)}, {"": list(others.beyond)}),
        "needles": tuple({str(length): list(some) for length, some in one.answers.items()} for one in (mine, others)),
    }
    for name, (one, other) in pairs.items():
        if any(one.values()):
            gain = paired_difference(one, other, shares=False)
            said[f"{name}_above_start"] = {"value": gain.value, "interval": gain.interval and list(gain.interval)}
    return said


def _described(one: Evaluated) -> Row:
    row = {name: value for name, value in one.measured.fields().items() if name not in ("beyond", "answers")}
    factor = one.scaling.static_attention_factor
    return {"evaluation": one.number, "origin": one.origin, "attention_factor": factor, **row}


def _summary(
    made: Sequence[Evaluated],
    best: Evaluated,
    first: Evaluated,
    starts: Sequence[Evaluated],
    texts: _Texts,
    judged: Row | None,
    space: Space,
    model: RopeScaling | None,
) -> Row:
    course, lowest, yarn = [], math.inf, _as_yarn(best, space, model)
    for one in made:
        if one.fitness < lowest:
            lowest = one.fitness
            course.append([one.number + 1, lowest])
    return {
        "evaluations": len(made),
        "passes_per_evaluation": texts.search.passes,
        "tokens_per_evaluation": texts.search.tokens,
        "spec": best.scaling.to_spec(model),
        "scaling": best.scaling.to_dict(),
        "rope_parameters": best.scaling.to_config(),
        "yarn": yarn,
        "yarn_note": None if yarn is None or space.same_within else _SCALED_WITHIN,
        "best": _described(best),
        "starts": [_described(one) for one in starts],
        "best_start": first.origin["name"],
        "course": course,
        "held_back": judged,
    }


_SCALED_WITHIN = "the same beyond L; texts up to L are scaled too"
"""The remark on a record that leaves texts of up to L tokens unscaled, said as YaRN: YaRN has one table."""


def _as_yarn(best: Evaluated, space: Space, model: RopeScaling | None) -> str | None:
    """The spec of YaRN that computes the same beyond L, if there is one: more programs know it."""
    numbers = best.origin.get("numbers")
    if numbers is None or numbers["rope_theta"] != space.base.rope_theta:
        return None
    words = ",".join(f"{name}={numbers[name]:.10g}" for name in ("beta_fast", "beta_slow", "attention_factor"))
    ends = "" if best.origin["kind"] == "start" else ",truncate=false"
    if model is not None and model.original_max_position_embeddings != space.original:
        ends += f",original_max_position_embeddings={space.original}"
    return f"yarn:{space.factor:.17g},{words}{ends}"


def _numbers(said: Row) -> list[str]:
    """Perplexity beyond L, probability of an answer's tokens, and fitness; empty where one was not measured."""
    loss, needles = said["loss"], said["needles"]
    return [
        "" if loss is None else f"{math.exp(loss):.2f}",
        "" if needles is None else f"{math.exp(-needles):.3f}",
        f"{said['fitness']:.4f}",
    ]


def _report(args: argparse.Namespace, summary: Row, folder: Path) -> str:
    best = summary["best"]

    def named(start: str) -> str:
        # Evolution's candidates share an attention factor, which is not the method's.
        return f"divisors of {start}" if args.strategy == "evolution" else start

    header = ["candidate", "√(1/t)", "ppl > L", "answers", "fitness"]
    lines = [
        [named(one["origin"]["name"]), f"{one['attention_factor']:.4f}", *_numbers(one)] for one in summary["starts"]
    ]
    lines.append([f"best, evaluation {best['evaluation']}", f"{best['attention_factor']:.4f}", *_numbers(best)])
    text = [
        f"{display_name(args.model)}, {summary['original_max_position_embeddings']} to {args.target} tokens: "
        f"{summary['evaluations']} candidates of {summary['passes_per_evaluation']} passes",
        format_table(header, lines),
    ]
    if (judged := summary["held_back"]) is not None:
        text.append("\non text and prompts that chose nothing:")
        rows = [[named(judged["start_name"]), *_numbers(judged["start"])], ["best", *_numbers(judged["best"])]]
        text.append(format_table(["candidate", *header[2:]], rows))
        for name, said in (("loss", "loss beyond L"), ("needles", "loss of answers")):
            if gain := judged.get(f"{name}_above_start"):
                ends = "" if gain["interval"] is None else " [{:+.3f}, {:+.3f}]".format(*gain["interval"])
                text.append(
                    f"{said} of the best against {named(judged['start_name'])}: {gain['value']:+.3f}{ends} nats"
                )
    elif summary["evaluations"] == 1:
        text.append(f"\nnothing but {named(summary['best_start'])} was tried; more --evaluations try others")
    elif summary["best_start"] == best["origin"].get("name"):
        text.append(f"\nnothing that was tried is better than {named(summary['best_start'])}")
    if summary["yarn"] is not None:
        text.append(f"in YaRN's words ({summary['yarn_note'] or 'the same'}): {summary['yarn']}")
    text.append(f"\nthe scaling to use: {folder / 'best.json'}")
    return "\n".join(text)
