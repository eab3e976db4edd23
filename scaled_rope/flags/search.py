"""Flags of `scaled-rope` tune, search and advise, which try scalings."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from scaled_rope.checkpoint import check_local
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.files import check_writable
from scaled_rope.flags.shared import (
    Unsaid,
    add_loading_arguments,
    check_folder,
    check_least,
    check_loading,
    check_positive,
    said,
)
from scaled_rope.scaling.resolve import check_spec
from scaled_rope.scaling.spec import Spec
from scaled_rope.texts.corpora import CORPORA, STANDIN
from scaled_rope.texts.documents import (
    check_feature,
    check_split,
    check_there,
    expanded,
)

_LARGEST_GRID = 200


def parse_grid(text: str, name: str = "grid", least: int = 1, zero: bool = False) -> tuple[float, ...]:
    """Read "1.0:1.5:0.05" (start, end, step; the end included) or "1,1.1,1.25": positive numbers, ascending.

    Args:
        name: the name of the grid in error messages.
        least: the least number of different values.
        zero: whether 0 is allowed, as a value and not as a step.

    Raises:
        ConfigError: not numbers, not positive, an empty or endless range, too few values.
    """
    form = "START:END:STEP or numbers separated by commas"
    try:
        numbers = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        raise ConfigError(f"{name} {text!r} is not allowed; {form}") from None
    if not all(math.isfinite(number) and (number > 0 or (zero and number == 0)) for number in numbers):
        raise ConfigError(f"{name} {text!r} is not allowed; finite numbers {'at least' if zero else 'above'} 0")
    if ":" in text:
        if len(numbers) != 3 or numbers[1] < numbers[0] or numbers[2] == 0:
            raise ConfigError(f"{name} {text!r} is not allowed; {form}, START at most END")
        start, end, step = numbers
        count = math.floor((end - start) / step + 1e-9) + 1  # 1e-9: 0.5 / 0.05 is 9.999…
        if count > _LARGEST_GRID:
            raise ConfigError(f"{name} {text!r} is not allowed; {count} values, at most {_LARGEST_GRID}")
        numbers = [round(start + index * step, 10) for index in range(count)]
    values = tuple(sorted(set(numbers)))
    if len(values) < least:
        raise ConfigError(f"{name} {text!r} is not allowed; at least {least} different values")
    return values


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope tune`."""
    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="NAME", help="directory or hub name (default: embedded)")
    add_loading_arguments(add)
    add = parser.add_argument_group("text").add_argument
    add("-d", "--dataset", type=expanded, metavar="PATH",
        help="file of text, JSON or Parquet, folder, hub name, packed set or corpus")  # fmt: skip
    _add_text_fields(add)
    add("--windows", type=int, default=1, metavar="N", help="windows per document, evenly spaced (default: its start)")
    add = parser.add_argument_group("search").add_argument
    add("--constants", action="store_true",
        help="search beta_fast, beta_slow and √(1/t) together, by loss and retrieval: try this first")  # fmt: skip
    add("--slope", metavar="METHOD",
        help="search the slope of this method's attention temperature in place of √(1/t)")  # fmt: skip
    add("--temperature", metavar="KIND", help="the temperature whose slope --slope searches (default constant)")
    add("--factors", metavar="S1,S2,...", help="factors s (default 2,4,8; with --constants 8)")
    add("--grid", metavar="GRID",
        help="√(1/t): START:END:STEP or a list (default 1.0:1.5:0.05; with --constants from s; "
        "with --slope slopes, 0:0.5:0.05)")  # fmt: skip
    add("--beta-fast", metavar="GRID", help="also search beta_fast, for example 16,32,64 (with --constants from L)")
    add("--beta-slow", metavar="GRID", help="also search beta_slow, for example 1,2 (with --constants from L)")
    add("--prompts", type=int, metavar="N",
        help="with --constants: prompts to ask at each length, 0 to go by loss alone (default 8)")  # fmt: skip
    add("--fields", metavar="F=V,...", help="what else to set in every scaling, for example ramp=rotations")
    add("--seed", type=int, default=0, help="of the bootstrap and of prompts (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="out/tune", metavar="DIR", help="rows, figures and best.json (default %(default)s)")
    add("--json", action="store_true", help="print best.json in place of the tables")
    add("--hide-progress", action="store_true")


def _add_text_fields(add: Callable[..., object]) -> None:
    """The flags of these commands that say which part of a data set is read."""
    add("-f", "--feature", default="text", help="field that holds the text (default %(default)s)")
    add("--split", default=Unsaid("test"), help="split of a hub dataset, or a saved one (default %(default)s)")
    add("--documents", type=int, metavar="N", help="the first N documents that are long enough (default: all)")


ADVICE_TEXT = "books"
"""The corpus that `scaled-rope advise` reads where no text is named."""


def _add_model_and_text(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """The model, the length and the text of a command that tries scalings without training; returns what adds to the
    group of the text."""
    add = parser.add_argument_group("model").add_argument
    add("model", metavar="MODEL", help="folder or hub name of a model with its weights")
    add("--target", type=int, required=True, metavar="N", help="the length to reach, in tokens")
    add_loading_arguments(add)
    add = parser.add_argument_group("text").add_argument
    add("-d", "--dataset", default=ADVICE_TEXT, type=expanded, metavar="PATH",
        help="file of text, JSON or Parquet, folder, hub name, packed set or corpus (default %(default)s)")  # fmt: skip
    _add_text_fields(add)
    return add


def _check_text(args: argparse.Namespace) -> None:
    """Refuse a text that is not there, a split beside files of others, and a field of a text that has none."""
    check_there(args.dataset)
    is_corpus = args.dataset in CORPORA and not Path(args.dataset).exists()
    name = STANDIN + args.dataset if is_corpus else args.dataset
    check_split(name, said(args.split))
    check_feature([name], args.feature)


def _check_output_text_and_model(args: argparse.Namespace, file: str) -> None:
    """Refuse a folder in which `file` cannot be written, a text or a model that is not there."""
    check_folder(args.output)
    check_writable(Path(args.output) / file)
    _check_text(args)
    if args.model is not None:
        check_local(args.model)


def add_advise_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope advise`."""
    add = _add_model_and_text(parser)
    add("--windows", type=int, default=8, metavar="N",
        help="the most windows per document (default %(default)s)")  # fmt: skip
    add = parser.add_argument_group("search").add_argument
    add("--minutes", type=float, default=20.0, metavar="M", help="time to keep to (default %(default)g)")
    add("--scaling", action="append", metavar="SPEC", help="try this one as well, before the others; repeatable")
    add("--only", action="store_true", help="try those of --scaling and no others")
    add("--no-retrieval", action="store_true", help="go by perplexity alone")
    add("--seed", type=int, default=0, help="of windows and prompts (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="out/advice", metavar="DIR",
        help="rows, advice.json, advice.html and recipe.yaml (default %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print advice.json in place of the words")
    add("--hide-progress", action="store_true")


def check_advise_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope advise` cannot do, as far as numbers, names and paths show it."""
    check_least(args, target=2, documents=1, windows=1, seed=0)
    check_positive(args, "minutes", 1e6, "minutes")
    check_loading(args)
    for spec in args.scaling or ():
        check_spec(spec)
    if args.only and not args.scaling:
        raise ConfigError("--only is not allowed without --scaling, which names what to try")
    _check_output_text_and_model(args, "rows.jsonl")


SEARCH_STRATEGIES = ("evolution", "cma-es", "coordinate", "grid")
"""Ways in which `scaled-rope search` searches; the first is LongRoPE's."""
FITNESSES = ("both", "perplexity", "needles")
WITHIN = ("unscaled", "same")
EVOLUTION: dict[str, float] = {
    "population": 64, "rounds": 40, "mutants": 16, "crossed": 16, "parents": 32, "mutation_rate": 0.3,
}  # fmt: skip
"""Numbers of evolution, the first strategy of `scaled-rope search`, by default."""
SEARCH_PROMPTS = 3
"""Prompts per length of `scaled-rope search`, by default."""


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope search`."""
    add = _add_model_and_text(parser)
    add("--windows", type=int, default=5, metavar="N", help="windows that a candidate reads (default %(default)s)")
    add("--prompts", type=int, metavar="N",
        help=f"hidden facts that it is asked for at each length beyond L (default {SEARCH_PROMPTS})")  # fmt: skip
    add("--held-back", type=int, default=4, metavar="N",
        help="windows, and prompts per length, that only judge the best (default %(default)s)")  # fmt: skip
    add = parser.add_argument_group("search").add_argument
    add("--strategy", default=SEARCH_STRATEGIES[0], metavar="NAME",
        help="evolution (LongRoPE's, of divisors), or of YaRN's few numbers cma-es, coordinate or grid")  # fmt: skip
    add("--fitness", default=FITNESSES[0], metavar="NAME",
        help="perplexity (loss beyond L), needles (loss of answers) or both, their sum (default)")  # fmt: skip
    add("--evaluations", type=int, metavar="N", help="the most candidates (default: as many as evolution has, 1344)")
    add("--start", action="append", metavar="SPEC",
        help="evolution begins with its divisors too, besides PI, NTK and YaRN; repeatable")  # fmt: skip
    add("--attention-factor", default="longrope", metavar="F",
        help="of evolution's candidates: longrope (√(1 + ln s / ln L)), a number, or search")  # fmt: skip
    add("--within", default=WITHIN[0], metavar="NAME",
        help="texts of up to L tokens are read unscaled (default), or with the same divisors")  # fmt: skip
    for name, text in (
        ("population", "candidates of the first round"),
        ("rounds", "rounds after the first"),
        ("mutants", "mutants per round"),
        ("crossed", "crossed candidates per round"),
        ("parents", "the best so far, from which these are made"),
    ):
        add(f"--{name}", type=int, default=EVOLUTION[name], metavar="N",
            help=f"evolution: {text} (default %(default)s)")  # fmt: skip
    add("--mutation-rate", type=float, default=EVOLUTION["mutation_rate"], metavar="P",
        help="evolution: probability that a mutant's divisor is drawn anew (default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the search, its windows and prompts (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="out/search", metavar="DIR",
        help="trace.jsonl, best.json and pictures (default %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print best.json in place of the tables")
    add("--hide-progress", action="store_true")


def search_attention(text: str) -> float | None:
    """The attention factor that `--attention-factor` gives by number; None for a name.

    Raises:
        ConfigError: neither a number above 0 nor a name.
    """
    if text in ("longrope", "search"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--attention-factor {text} is not allowed; longrope, search or a number above 0")
    return value


def search_prompts(args: argparse.Namespace) -> int:
    """The prompts of each length that a candidate of `scaled-rope search` is asked: 0 where it goes by loss alone."""
    if args.fitness == "perplexity":
        return 0
    return SEARCH_PROMPTS if args.prompts is None else int(args.prompts)


def check_search_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope search` cannot do, as far as numbers, names and paths show it."""
    check_least(args, target=2, documents=1, windows=0, prompts=0, held_back=0, evaluations=1, seed=0)
    check_least(args, population=2, rounds=0, mutants=0, crossed=0, parents=1)
    if args.strategy not in SEARCH_STRATEGIES:
        raise unknown("strategy", args.strategy, SEARCH_STRATEGIES)
    if args.fitness not in FITNESSES:
        raise unknown("fitness", args.fitness, FITNESSES)
    if args.within not in WITHIN:
        raise unknown("within", args.within, WITHIN)
    if args.windows == 0 and args.fitness != "needles":
        raise ConfigError(f"--windows 0 is not allowed with --fitness {args.fitness}; at least 1")
    if args.fitness == "perplexity" and args.prompts not in (None, 0):
        raise ConfigError(f"--prompts {args.prompts} is not allowed with --fitness perplexity, which asks none")
    if args.prompts == 0 and args.fitness != "perplexity":
        raise ConfigError(f"--prompts 0 is not allowed with --fitness {args.fitness}; at least 1")
    if not 0 < args.mutation_rate <= 1:
        raise ConfigError(f"--mutation-rate {args.mutation_rate:g} is not allowed; above 0, at most 1")
    search_attention(args.attention_factor)
    if args.strategy != SEARCH_STRATEGIES[0]:
        for name, usual in (("start", None), ("attention_factor", "longrope"), *EVOLUTION.items()):
            if getattr(args, name) != usual:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is not allowed with --strategy {args.strategy}: it is for evolution"
                )
    for spec in args.start or ():
        check_spec(spec)
    check_loading(args)
    _check_output_text_and_model(args, "trace.jsonl")


TUNED = ("attention_factor", "mscale", "factor", "dynamic")
"""Fields of a scaling that `scaled-rope tune` sets itself."""
LEAST_TRIALS = 3
"""The least windows, and prompts per length, of a search for constants: one to search, two to judge."""


def tune_specs(args: argparse.Namespace) -> list[str]:
    """The scaling that the search begins with, for each factor.

    Raises:
        ConfigError: factors that are no positive numbers, or fields that the search sets itself.
    """
    fields = f",{args.fields}" if args.fields else ""
    if args.slope is not None:
        return _slope_specs(args, fields)
    tuned = (*TUNED, "beta_fast", "beta_slow") if args.constants else TUNED
    for name, _ in Spec.parse(f"yarn{fields}").fields:
        if name in tuned:
            raise ConfigError(f"fields {args.fields!r} is not allowed; {', '.join(tuned)} are what the search sets")
    factors = parse_grid(args.factors or ("8" if args.constants else "2,4,8"), "factors")
    if args.constants and factors[0] <= 1:
        raise ConfigError(
            f"factors {args.factors!r} is not allowed; with --constants above 1, where there is a loss beyond L"
        )
    return [f"yarn:{factor!r}{fields}" for factor in factors]


def _slope_specs(args: argparse.Namespace, fields: str) -> list[str]:
    """`tune_specs` of a search for a slope."""
    tuned = ("factor", "attention_temperature", "temperature_slope", "dynamic")
    for name, _ in Spec.parse(f"yarn{fields}").fields:
        if name in tuned:
            raise ConfigError(f"fields {args.fields!r} is not allowed; {', '.join(tuned)} are what the search sets")
    kind = args.temperature or "constant"
    factors = parse_grid(args.factors or "2,4,8", "factors")
    if factors[0] <= 1:
        raise ConfigError(f"factors {args.factors!r} is not allowed; with --slope above 1, where a temperature acts")
    more = f",attention_temperature={kind},temperature_slope=0{fields}"
    return [f"{args.slope}:{factor!r}{more}" for factor in factors]


def tune_grid(args: argparse.Namespace) -> tuple[float, ...] | None:
    """The attention factors, or slopes, to try; None for those that `--constants` chooses.

    Raises:
        ConfigError: no positive numbers, or too few.
    """
    if args.constants:
        return parse_grid(args.grid) if args.grid else None
    if args.slope is not None:
        return parse_grid(args.grid or "0:0.5:0.05", least=3, zero=True)
    return parse_grid(args.grid or "1.0:1.5:0.05", least=3)


def check_tune_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope tune` cannot do, as far as numbers, names and paths show it."""
    if args.dataset is None:
        raise ConfigError(f"give --dataset: a path, a hub name or a corpus ({', '.join(CORPORA)})")
    check_least(args, documents=1, windows=1, seed=0)
    check_loading(args)
    if args.prompts is not None and not args.constants:
        raise ConfigError(f"--prompts {args.prompts} is not allowed without --constants, which asks them")
    if args.prompts is not None and args.prompts != 0 and args.prompts < LEAST_TRIALS:
        raise ConfigError(
            f"--prompts {args.prompts} is not allowed; 0, or at least {LEAST_TRIALS}: one to search and two to judge"
        )
    if args.temperature is not None and args.slope is None:
        raise ConfigError(f"--temperature {args.temperature} is not allowed without --slope, which searches its slope")
    if args.slope is not None:
        for name in ("constants", "beta_fast", "beta_slow"):
            if getattr(args, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is not allowed with --slope, which searches a slope alone"
                )
    for spec in tune_specs(args):
        check_spec(spec)
    tune_grid(args)
    for name in ("beta_fast", "beta_slow"):
        if getattr(args, name):
            parse_grid(getattr(args, name), name.replace("_", "-"))
    _check_output_text_and_model(args, "rows.jsonl")
