"""Find the attention factor √(1/t), and optionally the ends of YaRN's ramp, that suit a model best, without training.

    scaled-rope tune -m MODEL --dataset FOLDER --factors 2,4,8 --grid 1.0:1.5:0.05 --output out/tune

With `--constants` it is another search, that of `scaled_rope.tuning.constants`, and with `--slope METHOD` that of
`scaled_rope.tuning.slopes`. Without either:

The search of the YaRN paper's appendix A.2: the frequencies are those of NTK-by-parts for a factor s, √(1/t) takes
every value of a grid, and windows of s·L tokens (L the original context) are scored in one forward pass each. The best
value is the vertex of the parabola through the lowest grid point and its two neighbours. The line √(1/t) = a·ln s + 1
is then fitted over all factors; the paper found a = 0.1 for Llama.

What is compared is the mean negative log-likelihood (nats per token) over all windows, that is, the logarithm of their
joint perplexity. A window opens with the BOS if the tokenizer has one, and its first token is never a target. Segment k
holds the targets at positions kL to (k+1)L.

`--beta-fast` and `--beta-slow` are searched one after the other with √(1/t): first √(1/t) at the given ramp, then every
pair of ends at the best grid point, then √(1/t) again if another pair won. The full product would take a forward pass
per pair, grid point and window; the two barely interact, because the ramp says which dimensions turn slower and √(1/t)
how sharp attention is.

The folder of `--output` receives rows.jsonl (a row per window and scaling, with the nats of each segment; a rerun
measures only what is missing), best.json (the scalings to reuse) and the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from tqdm import tqdm

from scaled_rope.checkpoint import display_name, load_tokenizer
from scaled_rope.command_line import Parser
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.formatting import format_perplexity, format_table
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader, model_jobs
from scaled_rope.evaluation.ranks import refuse_several
from scaled_rope.evaluation.runner import given_arguments
from scaled_rope.files import write_atomic
from scaled_rope.flags.evaluators import add_model_arguments
from scaled_rope.flags.search import (
    LEAST_TRIALS,
    add_tune_arguments,
    check_tune_arguments,
    parse_grid,
    tune_grid,
    tune_specs,
)
from scaled_rope.provenance import portable_command, provenance
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.constants import (
    Axes,
    Trials,
    constants_remarks,
    constants_tables,
    default_axes,
    fit_constants,
    ramps,
    summarise_constants,
    verdict,
)
from scaled_rope.tuning.curves import (
    DRAWS,
    LEVEL,
    Floats,
    Minimum,
    Tuned,
    bootstrap_minima,
    fit_line,
    interpolate,
    interval,
    paper_attention_factor,
    paper_slope,
    parabola_minimum,
    resample,
    segment_bounds,
)
from scaled_rope.tuning.figures import write_constants_figures, write_tuning_figures
from scaled_rope.tuning.measurement import (
    Answers,
    RowStore,
    ScoredWindow,
    Sweep,
    model_ask,
    model_score,
    read_windows,
    reference_retrieval,
)
from scaled_rope.tuning.prompts import fact_prompts, naming_original, retrieval_lengths
from scaled_rope.tuning.slopes import measure_slopes, slopes_remarks, slopes_report, summarise_slopes


def tune_factor(
    sweep: Sweep, start: RopeScaling, grid: tuple[float, ...], ramps: Sequence[tuple[float, float]] = ()
) -> Tuned:
    """Search the best attention factor, and ramp, for one factor.

    Args:
        start: "yarn" with the factor and the ramp to begin from, without an attention factor.
        ramps: pairs of beta_fast and beta_slow to try besides its own.

    Raises:
        ConfigError: an impossible ramp, before anything is measured; losses that are not finite.
    """
    length = start.max_position_embeddings
    assert length is not None  # "yarn" needs the original length
    bounds = segment_bounds(length, sweep.segment)
    share = np.asarray([end - max(first, 1) for first, end in bounds]) / (length - 1)
    candidates = [start, *(replace(start, beta_fast=fast, beta_slow=slow) for fast, slow in ramps)]
    candidates = [c for i, c in enumerate(candidates) if c.ramp_bounds not in [d.ramp_bounds for d in candidates[:i]]]

    def curve_of(candidate: RopeScaling, values: Sequence[float]) -> Floats:
        return sweep.measure([replace(candidate, attention_factor=value) for value in values])

    means = curve_of(start, grid)
    tried: list[tuple[float, float, float]] = []
    winner = start
    if len(candidates) > 1:
        value = grid[int(np.argmin((means @ share).mean(axis=1)))]
        losses = [float((curve_of(candidate, [value])[0] @ share).mean()) for candidate in candidates]
        tried = [(*candidate.ramp_bounds, loss) for candidate, loss in zip(candidates, losses, strict=True)]
        winner = candidates[int(np.argmin(losses))]
        if winner is not start:
            means = curve_of(winner, grid)
    per_window = means @ share
    curve = per_window.mean(axis=1)
    minimum = parabola_minimum(grid, curve)
    scaling = replace(winner, attention_factor=round(minimum.x, 4))
    return Tuned(start.factor, grid, means, curve, per_window, minimum, scaling, tuple(tried))


# -------------------------------------------------------------------------------------------------------------- report


def _line(best: Mapping[float, float], minima: Mapping[float, Sequence[Minimum]], free: bool) -> Row:
    """A fitted line, with the interval of its slope over the bootstrap samples; empty when there is none."""
    fit = fit_line(best, free)
    if fit is None:
        return {}
    draws = zip(*(minima[factor] for factor in best), strict=True) if minima else []
    again = [fit_line(dict(zip(best, (m.x for m in drawn), strict=True)), free) for drawn in draws]
    slopes = [one.a for one in again if one is not None]
    spread = list(interval(slopes)) if slopes else None
    return {**asdict(fit), "factors": list(fit.factors), "interval": spread}


def summarise(tuned: Sequence[Tuned], seed: int, model: RopeScaling | None = None) -> Row:
    """The results of the search as plain data: the content of best.json except for the provenance.

    model: what the checkpoint carries, see `RopeScaling.to_spec`.
    """
    windows = tuned[0].per_window.shape[1]
    samples = resample(windows, seed) if windows > 1 else None
    minima = {one.factor: bootstrap_minima(one.grid, one.per_window, samples) for one in tuned if samples is not None}
    inside = {one.factor: one.minimum.x for one in tuned if one.minimum.edge is None}
    fit = fit_line(inside)
    factors = []
    for one in tuned:
        drawn = minima.get(one.factor)
        paper = paper_attention_factor(one.factor)
        at_paper = interpolate(one.grid, one.curve, paper)
        by_segment = rearrange(one.means, "point window segment -> segment point window")
        per_segment = [parabola_minimum(one.grid, curves.mean(axis=1)) for curves in by_segment]
        factors.append(
            {
                "factor": one.factor,
                "spec": one.scaling.to_spec(model),
                "scaling": one.scaling.to_dict(),
                "rope_parameters": one.scaling.to_config(),
                "attention_factor": one.minimum.x,
                "interval": list(interval([m.x for m in drawn])) if drawn else None,
                "edge": one.minimum.edge,
                "edge_share": sum(m.edge is not None for m in drawn) / len(drawn) if drawn else None,
                "perplexity": math.exp(one.minimum.y),
                "paper_attention_factor": paper,
                "paper_perplexity": None if at_paper is None else math.exp(at_paper),
                "curve": [[x, math.exp(y)] for x, y in zip(one.grid, one.curve, strict=True)],
                "segments": [
                    {"positions": list(bounds), "attention_factor": m.x, "edge": m.edge}
                    for bounds, m in zip(segment_bounds(*one.lengths), per_segment, strict=True)
                ],
                "ramps": [{"beta_fast": f, "beta_slow": s, "perplexity": math.exp(y)} for f, s, y in one.ramps],
            }
        )
    line = None
    if fit is not None:
        lines = {free: _line(inside, minima, free) for free in (False, True)}
        spec = None
        if fit.a >= 0 and len({one.scaling.ramp_bounds for one in tuned}) == 1:
            example = replace(tuned[0].scaling, factor=2.0, attention_factor=None, mscale=round(fit.mscale, 4))
            spec = example.to_spec(model).replace(":2", ":FACTOR", 1)
        line = {**lines[False], "paper_a": paper_slope(), "mscale": fit.mscale, "spec": spec, "free": lines[True]}
    return {"windows": windows, "level": LEVEL, "draws": DRAWS, "seed": seed, "fit": line, "factors": factors}


def remarks(summary: Row) -> list[str]:
    """Warnings that a reader of the results needs."""
    notes = []
    for one in summary["factors"]:
        if one["edge"]:
            value, way = one["attention_factor"], "below" if one["edge"] == "lower" else "above"
            notes.append(
                f"x{one['factor']:g}: the lowest point is the grid's {one['edge']} edge, {value:g}; the best value may "
                f"lie {way} it. Widen --grid. It is left out of the fit."
            )
        elif one["edge_share"] and one["edge_share"] > (1 - LEVEL) / 2:  # fewer are outside of the interval anyway
            notes.append(
                f"x{one['factor']:g}: {one['edge_share']:.0%} of the bootstrap samples have their minimum at an edge "
                "of the grid, so the interval may be too narrow"
            )
        for end in ("beta_fast", "beta_slow"):
            tried = sorted({ramp[end] for ramp in one["ramps"]})
            best = min(one["ramps"], key=lambda ramp: ramp["perplexity"])[end] if tried else None
            if len(tried) > 1 and best in (tried[0], tried[-1]):
                flag = end.replace("_", "-")
                notes.append(f"x{one['factor']:g}: {end} {best:g} is at the edge of what was tried. Widen --{flag}.")
    if summary["windows"] == 1:
        notes.append("one window: no interval can be given; see --documents and --windows")
    if summary["fit"] is None:
        notes.append("no fit: no factor above 1 has its best value inside the grid")
    elif summary["fit"]["a"] < 0:
        notes.append("a is below 0, which mscale cannot express; reuse the attention factors one by one")
    elif summary["fit"]["spec"] is None:
        notes.append("factors differ in their best ramp: the fit has no scaling of its own")
    fit = summary["fit"] or {}
    if (free := fit.get("free")) and fit["residual"] > max(0.01, 4 * free["residual"]):
        notes.append(
            f"a line through 1 misses the points by {fit['residual']:.3f}, one through {free['intercept']:.3f} by "
            f"{free['residual']:.3f}: the model wants another temperature at s = 1 too, so reuse the attention factors "
            "one by one and not mscale"
        )
    return notes


def report(summary: Row) -> str:
    """The table and the fit, for the terminal."""

    def between(low_high: Sequence[float] | None, digits: int) -> str:
        return "" if low_high is None else f"{low_high[0]:.{digits}f} to {low_high[1]:.{digits}f}"

    def perplexity(value: float | None) -> str:
        return "" if value is None else format_perplexity(value)

    header = ["factor", "√(1/t)", f"{summary['level']:.0%} interval", "paper", "ppl", "ppl (paper)", "scaling"]
    lines = [
        [
            f"{one['factor']:g}",
            f"{one['attention_factor']:.3f}" + ("*" if one["edge"] else ""),
            between(one["interval"], 3),
            f"{one['paper_attention_factor']:.3f}",
            perplexity(one["perplexity"]),
            perplexity(one["paper_perplexity"]),
            one["spec"],
        ]
        for one in summary["factors"]
    ]
    text = [format_table(header, lines)]
    for one in summary["factors"]:
        if one["ramps"]:
            rows = [[f"{r['beta_fast']:g}", f"{r['beta_slow']:g}", perplexity(r["perplexity"])] for r in one["ramps"]]
            text.append(f"\nx{one['factor']:g}, ends of the ramp at the best grid point")
            text.append(format_table(["beta_fast", "beta_slow", "ppl"], rows))
    if (fit := summary["fit"]) is not None:
        spread = f" ({summary['level']:.0%}: {between(fit['interval'], 4)})" if fit["interval"] else ""
        factors = ", ".join(f"{factor:g}" for factor in fit["factors"])
        text.append(
            f"\nfit: √(1/t) = {fit['a']:.4f}·ln s + 1{spread}, over s = {factors}; "
            + (f"residual {fit['residual']:.4f}; " if len(fit["factors"]) > 1 else "")
            + f"paper: {fit['paper_a']:g}"
        )
        if free := fit["free"]:
            spread = f" ({summary['level']:.0%}: {between(free['interval'], 4)})" if free["interval"] else ""
            text.append(
                f"with a free intercept: {free['a']:.4f}·ln s + {free['intercept']:.4f}{spread}; "
                f"residual {free['residual']:.4f}"
            )
        if fit["spec"]:
            text.append(f"at any factor: {fit['spec']}")
    return "\n".join(text)


# ------------------------------------------------------------------------------------------------------------- command


def _command(args: argparse.Namespace) -> str:
    """The command that repeats a run."""
    parser = Parser("scaled-rope tune")
    add_tune_arguments(parser)
    return portable_command(parser.repeat(args))


def loading_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The flags in the form that `model_jobs` takes: one model, under the scaling that it carries."""
    parser = Parser("tune")
    add_model_arguments(parser)
    flags = parser.parse_args([])
    flags.model = None if args.model is None else [args.model]
    for name in ("original_max_position_embeddings", "dtype", "device", "attention", "adapter"):
        setattr(flags, name, getattr(args, name))
    return flags


def _starts(args: argparse.Namespace, own: RopeScaling) -> list[RopeScaling]:
    """The scaling that the search begins with, for each factor."""
    return [RopeScaling.from_spec(spec, own) for spec in tune_specs(args)]


def _ramps(args: argparse.Namespace, start: RopeScaling) -> list[tuple[float, float]]:
    """Every combination of the ramp ends that the flags name; empty if they name none."""
    fast = parse_grid(args.beta_fast, "beta-fast") if args.beta_fast else [start.ramp_bounds[0]]
    slow = parse_grid(args.beta_slow, "beta-slow") if args.beta_slow else [start.ramp_bounds[1]]
    if not args.beta_fast and not args.beta_slow:
        return []
    for f, s in (pairs := [(f, s) for f in fast for s in slow]):
        replace(start, beta_fast=f, beta_slow=s)  # raises an error for crossed ends now, before any measurement
    return pairs


@dataclass(frozen=True)
class _Opened:
    """The model of a search, its windows, and the folder for its rows."""

    job: ModelJob
    load: ModelLoader
    windows: list[ScoredWindow]
    segment: int
    folder: Path
    record: Row
    identity: Row

    def sweep(self, store: RowStore) -> Sweep:
        return Sweep(store, self.windows, self.segment, self.identity, model_score(self.load, self.job))

    def head(self) -> Row:
        """The fields of best.json about the model and the text."""
        model = {name: self.identity[name] for name in ("model", "model_fingerprint", "dtype")}
        return {**model, "data": {**self.identity["data"], "documents": len({one.document for one in self.windows})}}


def _bar(args: argparse.Namespace) -> Any:
    return tqdm(unit="tok", unit_scale=True, disable=args.hide_progress, mininterval=0.5 if sys.stderr.isatty() else 10)


def _finish(args: argparse.Namespace, opened: _Opened, summary: Row, text: str, notes: Sequence[str]) -> int:
    """Write best.json, print, and warn."""
    write_atomic(opened.folder / "best.json", json.dumps({**summary, "provenance": opened.record}, indent=2) + "\n")
    if args.json:
        print(json.dumps({**summary, "provenance": opened.record}, indent=2))
    else:
        print(
            f"\n{display_name(opened.job.model)}, windows: {len(opened.windows)}, "
            f"documents: {summary['data']['documents']}"
        )
        print(f"{text}\n\nthe scalings to reuse: {opened.folder / 'best.json'}")
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    return 0


def run(args: argparse.Namespace) -> int:
    """Search, print, and write the folder of `--output`.

    Raises:
        ConfigError: anything that cannot be used, before weights are read where that is possible.
    """
    check_tune_arguments(args)
    refuse_several("scaled-rope tune")
    flags = loading_arguments(args)
    job = model_jobs(flags)[0]
    own = job.scaling
    starts = _starts(args, own)
    if args.slope is not None:
        search = _prepare_slopes(args, starts)
    else:
        search = _prepare_constants(args, job, starts) if args.constants else _prepare_factors(args, starts)
    if own.method != "default":
        print(f"note: the checkpoint's own scaling, {own.label}, is replaced by each that is tried", file=sys.stderr)
    longest, segment = starts[-1].max_position_embeddings, starts[-1].original_max_position_embeddings
    if longest is None or segment is None:
        raise ConfigError(
            "original_max_position_embeddings is missing: the checkpoint doesn't say for how many tokens it was trained"
        )
    if segment < 2:
        raise ConfigError(
            f"original_max_position_embeddings={segment}: must be at least 2, a segment's length in tokens"
        )
    if args.slope is not None:
        _check_beyond_original(starts)
    windows = read_windows(args, job, longest, unused=args.constants)  # what is fitted flatters a test on its text
    load = ModelLoader(flags)
    record = {"command": _command(args), **provenance(load.device, args.seed, given_arguments(args))}
    identity = {**job.fields(), "carried": False, "data": {"name": Path(args.dataset).name}}
    return search(_Opened(job, load, windows, segment, Path(args.output), record, identity))


def _check_beyond_original(starts: Sequence[RopeScaling]) -> None:
    """Raise a ConfigError if windows of a search for a slope would end at the original length, where none acts."""
    for start in starts:
        longest, original = start.max_position_embeddings, start.original_max_position_embeddings
        if longest is not None and original is not None and longest <= original:
            raise ConfigError(
                f"--slope {start.method} is not allowed with factor {start.factor:g}; no window would be longer than "
                f"the original length, {original} tokens, beyond which a temperature is to help"
            )


Search = Callable[[_Opened], int]


def _prepare_factors(args: argparse.Namespace, starts: Sequence[RopeScaling]) -> Search:
    """The search for the attention factor, its grids checked."""
    grid, ends = tune_grid(args), _ramps(args, starts[0])
    assert grid is not None  # has a default

    def search(opened: _Opened) -> int:
        with _bar(args) as bar:
            store = RowStore(opened.folder / "rows.jsonl", opened.record, bar)
            sweep = opened.sweep(store)
            bar.total = sum(store.missing(sweep.cells([replace(s, attention_factor=x) for x in grid])) for s in starts)
            tuned = [tune_factor(sweep, start, grid, ends) for start in starts]
        summary = {**opened.head(), **summarise(tuned, args.seed, opened.job.as_saved)}
        write_tuning_figures(tuned, summary, display_name(opened.job.model), opened.folder)
        return _finish(args, opened, summary, report(summary), remarks(summary))

    return search


def _prepare_slopes(args: argparse.Namespace, starts: Sequence[RopeScaling]) -> Search:
    """The search for the slope of an attention temperature, its grid checked."""
    grid = tune_grid(args)
    assert grid is not None  # has a default

    def search(opened: _Opened) -> int:
        with _bar(args) as bar:
            store = RowStore(opened.folder / "rows.jsonl", opened.record, bar)
            sweep = opened.sweep(store)
            every = [sweep.cells([replace(start, temperature_slope=x) for x in grid]) for start in starts]
            bar.total = sum(map(store.missing, every))
            curves = [measure_slopes(sweep, start, grid) for start in starts]
        summary = {**opened.head(), **summarise_slopes(curves, args.seed, opened.job.as_saved)}
        return _finish(args, opened, summary, slopes_report(summary), slopes_remarks(summary))

    return search


def _axes(args: argparse.Namespace, start: RopeScaling) -> Axes:
    """The grids of the search for constants: those of the flags, else those that follow from the model and s."""
    fast, slow, factors = default_axes(start)
    return (
        parse_grid(args.beta_fast, "beta-fast") if args.beta_fast else fast,
        parse_grid(args.beta_slow, "beta-slow") if args.beta_slow else slow,
        tune_grid(args) or factors,
    )


def _retrieval_lengths(start: RopeScaling) -> list[int]:
    original, longest = start.original_max_position_embeddings, start.max_position_embeddings
    assert original is not None and longest is not None  # "yarn" needs the original length
    return retrieval_lengths(original, longest)


def _prepare_constants(args: argparse.Namespace, job: ModelJob, starts: Sequence[RopeScaling]) -> Search:
    """The search for constants, its grids checked."""
    all_axes = [_axes(args, start) for start in starts]
    for start, axes in zip(starts, all_axes, strict=True):
        ramps(start, axes, job.head_dim)  # raises an error for values that cannot be used

    def search(opened: _Opened) -> int:
        if len(opened.windows) < LEAST_TRIALS:
            raise ConfigError(
                f"{len(opened.windows)} windows are not enough for --constants; at least {LEAST_TRIALS}, one to search "
                "and two to judge: give more documents, or --windows"
            )
        tokenizer, texts = load_tokenizer(job.model), [one.tokens[1:].tolist() for one in opened.windows]
        count = 8 if args.prompts is None else args.prompts
        lengths = [_retrieval_lengths(start) if count else [] for start in starts]
        with naming_original(opened.segment, "--prompts 0 goes by loss alone"):
            prompts = {
                length: fact_prompts(tokenizer, length, count, args.seed, texts)
                for length in sorted({*chain(*lengths)})
            }
        with _bar(args) as bar:
            store = RowStore(opened.folder / "rows.jsonl", opened.record, bar)
            answers = Answers(store, opened.identity, model_ask(opened.load, job))
            reference = None
            if count:
                unscaled = RopeScaling.from_spec("default", starts[0])
                asked = answers.measure(unscaled, prompts[opened.segment])
                probability, right, used = reference_retrieval(asked)
                reference = {"retrieval": probability, "right": right, "prompts": count, "used": used}
                prompts = prompts if used else {}
            sweep = opened.sweep(store)
            fitted = []
            for start, axes, own in zip(starts, all_axes, lengths, strict=True):
                trials = Trials(sweep, answers, {length: prompts[length] for length in own if prompts})
                fitted.append(fit_constants(trials, start, axes, job.head_dim))
        summary = {**opened.head(), **summarise_constants(fitted, args.seed, reference, job.as_saved)}
        write_constants_figures(summary, display_name(job.model), opened.folder)
        tables = [format_table(*table) for table in constants_tables(summary)]
        text = "\n\n".join([*tables, "\n".join(map(verdict, summary["factors"]))])
        return _finish(args, opened, summary, text, constants_remarks(summary))

    return search
