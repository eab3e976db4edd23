"""`scaled-rope advise MODEL --target N`: which scaling should this model use for N tokens?

    scaled-rope advise MODEL --target 32768 --dataset books/ --minutes 20

Reads the model under a short list of scalings, without training: perplexity by position beside the control (the model
as it is, reading the last tokens only), facts hidden at several lengths, and perplexity within the trained length. The
answer is printed in words; the folder of --output receives rows.jsonl (a row per pass, so that a rerun measures only
what is missing), results.jsonl (what the answer rests on, as the evaluators write it), advice.json, advice.html and
recipe.yaml. Exit codes: 0 with an answer, which may be that none works; 2 bad input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaled_rope.advice.candidates import SLOPES, Candidate, Passes, dpe_probe, short_list
from scaled_rope.advice.page import result_rows, write_page
from scaled_rope.advice.probing import MOST_PROMPTS, NAME, Probing
from scaled_rope.advice.recipe import write_recipe
from scaled_rope.advice.rounds import PROMPTS, Halving, Material, Outcome
from scaled_rope.advice.trials import Budget, Clock, Costs, TimedStore, Trials, model_control
from scaled_rope.advice.verdict import (
    AS_IT_IS,
    SERVERS,
    Advice,
    Judged,
    as_json,
    choose,
    judge,
    screened_as_json,
)
from scaled_rope.checkpoint import display_name, load_tokenizer, raw_config
from scaled_rope.command_line import Parser
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import Control
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader, model_jobs
from scaled_rope.evaluation.ranks import refuse_several
from scaled_rope.evaluation.runner import given_arguments
from scaled_rope.evaluation.time_estimate import Pace, time_passes
from scaled_rope.files import folder_lock, write_atomic
from scaled_rope.flags.evaluators import add_model_arguments
from scaled_rope.flags.search import LEAST_TRIALS, add_advise_arguments, check_advise_arguments
from scaled_rope.flags.shared import said
from scaled_rope.progress import Progress, duration
from scaled_rope.provenance import portable_command, provenance
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.config_remarks import config_remarks
from scaled_rope.serving.export import export
from scaled_rope.texts.token_documents import TokenSource
from scaled_rope.tuning.measurement import (
    REFERENCES,
    ScoredWindow,
    check_target,
    model_ask,
    model_score_under,
    read_windows,
    reference_retrieval,
)
from scaled_rope.tuning.prompts import TooShort, fact_prompts, retrieval_lengths

_TIMED = 2048
"""The longest pass, in tokens, that is timed before the budget is planned."""
_RESERVE = 0.05, 20.0
"""The share of the budget that is kept for tables and the page, and the most seconds of it."""
_MOST_WINDOWS = 96
"""As many windows as all rounds together can use."""


def _command(args: argparse.Namespace) -> str:
    """The command that repeats a run."""
    parser = Parser("scaled-rope advise")
    add_advise_arguments(parser)
    return portable_command(parser.repeat(args))


def _loading_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The flags in the form that `model_jobs` takes: one model, as it is."""
    parser = Parser("advise")
    add_model_arguments(parser)
    flags = parser.parse_args([])
    flags.model = [args.model]
    for name in ("original_max_position_embeddings", "dtype", "device", "attention", "adapter"):
        setattr(flags, name, getattr(args, name))
    return flags


def _trained(job: ModelJob) -> int | None:
    """The length in tokens to which a model works with the scaling that it carries."""
    own = job.scaling
    return own.original_max_position_embeddings if own.method == "default" else job.made_for


def _segment(original: int) -> int:
    """Tokens of a segment: a quarter of L, where that is whole."""
    return original // 4 if original % 4 == 0 and original >= 8 else original


def _fingerprint(windows: Sequence[ScoredWindow]) -> str:
    """A short hash of all windows in their order."""
    digest = hashlib.sha256()
    for window in windows:
        digest.update(window.tokens.tobytes())
    return digest.hexdigest()[:16]


def _mixed(windows: Sequence[ScoredWindow], seed: int) -> list[ScoredWindow]:
    """The windows in an order in which any part of them has many documents: each document's in turn."""
    by_document: dict[int, list[ScoredWindow]] = {}
    for window in windows:
        by_document.setdefault(window.document, []).append(window)
    rng, turns = random.Random(f"advise/{seed}"), list(by_document.values())
    for some in turns:
        rng.shuffle(some)
    mixed: list[ScoredWindow] = []
    while turns:
        rng.shuffle(turns)
        mixed += [some.pop() for some in turns]
        turns = [some for some in turns if some]
    return mixed


# ---------------------------------------------------------------------------------------------------------- the command


@dataclass(eq=False)
class _Shown:
    """The line of progress: how much of the time is used, and what is measured."""

    budget: Budget
    bar: Any
    opening: str
    """Said when the first round begins: before that, what is wrong is all that is said."""

    def start(self, title: str, expected: float, last: bool) -> None:
        """A part of the work begins, which is expected to go on for so many seconds; last: nothing comes after it."""
        if self.opening:
            self.bar.write(self.opening, file=sys.stderr)
            self.opening = ""
        self.bar.set_description(title, refresh=False)
        left = max(0.0, self.budget.left)
        # What is not the last is followed by others, which take what is left.
        self.bar.total = round(self.budget.elapsed + (min(left, expected) if last else left), 1)
        self.advance("")

    def advance(self, title: str) -> None:
        """A pass is done: the bar stands for time, so that what is said to be left is what the plan has left."""
        self.bar.set_postfix_str(title, refresh=False)
        self.bar.update(round(min(self.budget.elapsed, self.bar.total) - self.bar.n, 1))


def run(args: argparse.Namespace, clock: Clock = time.monotonic) -> int:
    """Carry out `scaled-rope advise`, one at a time in a folder: each decides by the rows and times that are there.

    clock: tells the time that the budget is kept by.

    Raises:
        ConfigError: bad input, before weights are read where that is possible; a budget that is too small; another run
            writes to the folder.
    """
    check_advise_arguments(args)
    refuse_several("scaled-rope advise")
    with folder_lock(Path(args.output)):
        return _run(args, clock)


def _run(args: argparse.Namespace, clock: Clock) -> int:
    budget = Budget(60 * args.minutes, clock)
    share, most = _RESERVE
    budget.reserve = min(share * budget.seconds, most)
    flags = _loading_arguments(args)
    decided = bool(args.scaling) or args.original_max_position_embeddings is not None
    remarks = config_remarks(raw_config(args.model), args.model, decided=decided)
    job = model_jobs(flags)[0]
    own = job.scaling
    original = check_target(_trained(job), args.target, display_name(args.model))
    baseline = Candidate("default" if own.method == "default" else "checkpoint", own)
    listed = short_list(own, original, args.target, job.head_dim, args.scaling or (), only=args.only)
    if not listed:
        raise ConfigError(
            f"there is nothing to try on {display_name(args.model)} ({own.label}) beside itself; name scalings with "
            "--scaling"
        )
    varied = not args.only and own.method == "default"  # a checkpoint's own scaling is not tempered on top
    probe = None if args.only else dpe_probe(own, original, args.target, job.head_dim)
    hint = f"a smaller --target needs less than {args.target}"
    found = read_windows(args, job, args.target, unused=True, hint=hint, most=4 * _MOST_WINDOWS)
    windows = _mixed(found, args.seed)[:_MOST_WINDOWS]
    if len(windows) < LEAST_TRIALS + 1:
        raise ConfigError(
            f"{len(windows)} windows of {args.target} tokens are not enough; at least {LEAST_TRIALS + 1}, one to "
            "search and three to judge: give more or longer documents, more --windows or a smaller --target"
        )
    ends = retrieval_lengths(original, args.target)
    tokenizer, texts = load_tokenizer(job.model), [one.tokens[1:].tolist() for one in windows]
    asked = [] if args.no_retrieval else ends
    notes = list(remarks)
    try:
        prompts = {length: fact_prompts(tokenizer, length, PROMPTS, args.seed, texts) for length in asked}
    except TooShort as error:
        prompts = {}
        notes.append(
            f"Retrieval is left out: a hidden fact and its question take at least {error.least} tokens, and L is "
            f"{original}. Perplexity alone has chosen."
        )

    folder, load = Path(args.output), ModelLoader(flags)
    record = {"command": _command(args), **provenance(load.device, args.seed, given_arguments(args))}
    data = {"name": TokenSource(args.dataset).title}
    identity = {**job.fields(), "scaling": own.to_dict(), "carried": False, "data": data}
    opening = (
        f"{display_name(args.model)}: {original} to {args.target} tokens, {len(listed)} candidates, {len(windows)} "
        f"windows of {data['name']}, {duration(budget.seconds)}"
    )
    store = TimedStore(folder / "rows.jsonl", record, tqdm(disable=True), budget=budget)
    timed = _timed(store, identity, load, job, original)
    (short, long), (first, second) = timed["lengths"], timed["passes"]
    costs = Costs(Pace((short, long), (first, second), (0.0, 0.0)).of_pass)
    control = Control(original, max(1, original // 4))
    passes = Passes([own, *(one.scaling for one in listed)], ends, job.head_dim)
    with Progress(
        total=round(budget.left, 1), unit="s", disable=args.hide_progress, bar_format=_BAR, smoothing=0
    ) as bar:
        shown = _Shown(budget, bar, "" if args.hide_progress else opening)
        trials = Trials(
            store,
            identity,
            own,
            passes,
            ends,
            _segment(original),
            control,
            model_score_under(load, job),
            model_ask(load, job),
            model_control(load, job, control, tokenizer.bos_token_id),
            costs,
            shown.advance,
        )
        used, reference = _retrieves(trials, baseline, prompts, original)
        if not used:
            prompts = {}
            if reference is not None:
                notes.append(reference)
        question = {"minutes": args.minutes, "seed": args.seed, "candidates": [one.spec for one in listed]}
        question |= {"text": _fingerprint(windows), "retrieval": bool(prompts)}
        question |= {"probe": None if probe is None else asdict(probe), "slopes": list(SLOPES) if varied else []}
        probing, left_out = None, dict[str, str]()
        if probe is not None and prompts:
            facts = fact_prompts(tokenizer, args.target, MOST_PROMPTS, args.seed, texts, "dpe")
            probing = Probing(probe, own, facts)
        elif probe is not None:
            left_out[NAME] = "its probe asks for hidden facts, and retrieval is left out"
        material = Material.of(windows, prompts)
        halving = Halving(trials, baseline, listed, material, question, shown.start, probing, varied, left_out)
        outcome = halving.run()
        bar.total = bar.n
    return _answer(args, job, trials, outcome, notes, data, record, timed["parameters"])


_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} spent, {remaining} left {postfix}"


def _timed(store: TimedStore, identity: Row, load: ModelLoader, job: ModelJob, original: int) -> Row:
    """The row of what the plan begins with: seconds of two short plain passes, and the number of parameters."""
    longest = min(original, _TIMED)
    lengths = [max(1, longest // 4), max(2, longest)]

    def measure() -> Row:
        model = load(job)
        size = sum(one.numel() for one in model.parameters())
        return {"lengths": lengths, "passes": time_passes(model, lengths), "parameters": size}

    cell = {"metric": "pass_seconds", **identity, "protocol": {"name": "timed"}, "length": lengths[1]}
    return store.get(cell, "timing", measure)


def _retrieves(
    trials: Trials, baseline: Candidate, prompts: Mapping[int, Sequence[Any]], original: int
) -> tuple[bool, str | None]:
    """Whether the model finds facts within L, as it is; and the remark that it does not."""
    if not prompts:
        return False, None
    scaling = trials.passes.at(baseline.scaling, original)
    answers = trials.answers.measure(scaling, prompts[original][-REFERENCES:])
    probability, right, used = reference_retrieval(answers)
    if used:
        return True, None
    return False, (
        f"Retrieval is left out: as it is and within {original} tokens the model gives right answers a probability of "
        f"{probability:.2f} ({right} of {len(answers)} right), so no scaling can show it. Perplexity alone has chosen."
    )


# ----------------------------------------------------------------------------------------------------------- the answer


def _answer(
    args: argparse.Namespace,
    job: ModelJob,
    trials: Trials,
    outcome: Outcome,
    notes: list[str],
    data: Row,
    record: Row,
    parameters: int,
) -> int:
    """Decide, and write and print everything."""
    assert job.checkpoint is not None  # model_jobs has read it
    config = job.checkpoint.config
    ends, segment, folder = trials.ends, trials.segment, Path(args.output)
    reports = {}
    judged = []
    for one in [*outcome.finalists, outcome.baseline]:
        made = {name: export(one.candidate.scaling, config, name, trials.target) for name in SERVERS}
        reports[one.candidate.spec] = made
        servers = {name: report.status if report.exit_code != 2 else report.reason for name, report in made.items()}
        judged.append(judge(one, outcome.baseline, outcome.control, ends, segment, servers))
    use, equal = choose(judged)
    training = _training(use, judged)
    notes += _remarks(outcome)
    judged.sort(key=lambda one: (one is not use, one.measured.loss))
    advice = Advice(use, equal, judged, ends[0], trials.target, trials.control, training, notes)
    recipe = _recipe(args, job, outcome, training, parameters, ends, notes)
    commands = _commands(args, advice, recipe, job.as_saved)
    rows = result_rows(
        job,
        [(one.measured, one.measured is outcome.baseline) for one in judged],
        outcome.control,
        trials.control,
        ends,
        segment,
        data,
        record,
    )
    write_atomic(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    screened = [screened_as_json(one) for one in outcome.screened]
    spent = trials.store.budget.spent
    lead = (
        f"{display_name(args.model)} was trained to {ends[0]} tokens; {trials.target} were asked for. Untrained, in "
        f"{duration(spent)} of {duration(60 * args.minutes)}; {len(outcome.control.windows)} windows and "
        f"{sum(len(some) for some in use.measured.answers.values())} prompts in the last round."
    )
    page = write_page(folder, folder / "results.jsonl", args.model, advice, screened, outcome.left_out, commands, lead)
    summary: Row = {
        "model": job.fields()["model"],
        "model_fingerprint": job.fingerprint,
        "dtype": job.dtype,
        "original_max_position_embeddings": ends[0],
        "target": trials.target,
        "verdict": advice.verdict.partition(": ")[0].lower(),
        "use": use.spec,
        "works_to": use.works_to,
        "to_be_served": None if advice.served is None else advice.served.spec,
        "equal": [one.spec for one in equal],
        "words": advice.sentences(),
        "notes": notes,
        "train_with": None if training is None else training.spec,
        "commands": commands,
        "recipe": None if recipe is None else str(recipe),
        "last_round": [as_json(one, ends[0]) for one in judged],
        "screened": screened,
        "left_out": outcome.left_out,
        "rounds": outcome.rounds,
        "probe": outcome.probe,
        "seconds": round(spent, 1),
        "provenance": record,
    }
    write_atomic(folder / "advice.json", json.dumps(summary, indent=2) + "\n")
    if args.json:
        print(json.dumps(summary, indent=2))
        return 0
    print(advice.verdict)
    for sentence in advice.sentences()[1:]:
        print(f"- {sentence}")
    print("\n" + "\n".join(commands))
    print(f"\npage: {page}\n{len(outcome.control.windows)} windows in the last round, {duration(spent)} in all")
    for note in [*notes, *(f"{spec} left out: {why}" for spec, why in outcome.left_out.items())]:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _recipe(
    args: argparse.Namespace,
    job: ModelJob,
    outcome: Outcome,
    training: Judged | None,
    parameters: int,
    ends: Sequence[int],
    notes: list[str],
) -> Path | None:
    """Write the recipe that trains with the advised scaling. Where there can be none, a note says why.

    One of an earlier run, which is not advised any more, is removed.
    """
    path = Path(args.output) / "recipe.yaml"
    path.unlink(missing_ok=True)
    if training is None:
        return None
    if args.adapter is not None:
        notes.append(
            "No recipe: it would train the model without the adapter. Merge the adapter into the weights first"
        )
        return None
    assert job.checkpoint is not None  # model_jobs has read it
    scaling, target, before = training.measured.candidate.scaling, ends[-1], outcome.baseline.candidate
    claimed = max(scaling.max_position_embeddings or 0, job.checkpoint.settings.max_position_embeddings or 0)
    corrected = before.scaling.method != "default" and before.scaling != job.as_saved
    try:
        write_recipe(
            path,
            args.model,
            parameters,
            scaling.to_spec(job.as_saved),
            target,
            args.dataset,
            list(ends),
            before.scaling.to_spec(job.as_saved) if corrected else before.spec,
            feature=args.feature,
            split=said(args.split) or "train",
            original=args.original_max_position_embeddings,
            context=target if claimed < target else None,
        )
    except ConfigError as error:  # what was measured is not lost for it
        notes.append(f"No recipe: {error}")
        return None
    return path


def _training(use: Judged, judged: Sequence[Judged]) -> Judged | None:
    """The scaling to train with: the one to use, or the best that is static and of tables alone, as servers know."""
    able = []
    for one in judged:
        if one.measured.candidate.of_tables and one.spec not in AS_IT_IS:
            able.append(one)
    if use in able:
        return use
    return choose(able)[0] if able else None


def _remarks(outcome: Outcome) -> list[str]:
    notes = []
    count = len(outcome.control.windows)
    if count < 5:
        notes.append(
            f"{count} windows in the last round: intervals are rough; more --minutes or longer texts give more"
        )
    if len({window.document for window in outcome.control.windows}) == 1 and count > 1:
        notes.append("All windows of the last round are from one document: other texts may differ")
    return notes


def _commands(args: argparse.Namespace, advice: Advice, recipe: Path | None, model: RopeScaling | None) -> list[str]:
    """The commands that carry the advice out: exports for the length to which what they export works.

    model: what the config of the checkpoint says.
    """
    spec, lengths = advice.use.spec, ",".join(map(str, sorted(advice.use.buckets)))
    served = advice.served or advice.use
    length, programs = str(served.works_to), served.served_by if served.works_to > advice.original else []
    corrected, told, adapted = args.original_max_position_embeddings, served.spec, list[str]()
    if corrected is not None or args.adapter is not None:  # an export counts from what the config says
        told = served.measured.candidate.scaling.to_spec(model)
    if corrected is not None:
        adapted += ["--original-max-position-embeddings", str(corrected)]
    if args.adapter is not None:
        adapted += ["--adapter", args.adapter]
    commands = [
        shlex.join(["scaled-rope", "export", args.model, "--for", name, "--scaling", told, "--length", length])
        for name in programs
    ]
    check = ["python", "eval/passkey.py", "-m", args.model, *adapted, "--scaling", spec, "--lengths", lengths]
    commands.append(shlex.join([*check, "--output", f"{args.output}/check.jsonl"]))
    if recipe is not None:
        commands.append(shlex.join(["./train.sh", str(recipe)]))
    return commands
