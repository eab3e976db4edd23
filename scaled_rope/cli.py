"""The console script `scaled-rope`: one subcommand per module, imported only when it is asked for and its flags are
right.

Knows nothing of the subcommands but their names.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.flags import search, serving


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand: its summary, its flags, and the module that runs it."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    check: Callable[[argparse.Namespace], None] = lambda args: None
    """Raises ConfigError for mistakes that show in the flags alone; called before the module is imported."""
    module: str = __name__
    """The module whose function `run` takes the parsed flags and returns the exit code."""
    instead: dict[str, str] = dataclasses.field(default_factory=dict)
    """Flag -> the module that runs the command where this flag is given."""

    def module_for(self, args: argparse.Namespace) -> str:
        """The module that runs the command with these flags."""
        return next((name for flag, name in self.instead.items() if getattr(args, flag) is not None), self.module)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `scaled-rope` with these arguments, by default those of the process. Return its exit code (2: bad input)."""
    return run_cli(lambda: _main(sys.argv[1:] if argv is None else list(argv)))


def _main(argv: list[str]) -> int:
    name = next((argument for argument in argv if not argument.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    parser = _parser(name)
    args = parser.parse_args(argv)
    if name is None:
        raise ConfigError(f"a command is missing: {', '.join(COMMANDS)} (see {parser.prog} --help)")
    COMMANDS[name].check(args)
    code: int = importlib.import_module(COMMANDS[name].module_for(args)).run(args)
    sys.stdout.flush()  # a reader that has gone is noticed here, where `run_cli` sees it
    return code


def _parser(name: str | None) -> argparse.ArgumentParser:
    """The parser with the flags of one subcommand."""
    from scaled_rope import __version__

    parser = Parser("scaled-rope", "Extend the context of RoPE models: look, choose, tune, serve.")
    parser.add_argument("--version", action="version", version=f"scaled-rope {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for known, command in COMMANDS.items():
        summary = command.summary
        sub = commands.add_parser(known, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if known == name:
            command.add_arguments(sub)
    return parser


# scaled-rope methods --------------------------------------------------------------------------------------------------


MODIFIERS = {
    "dynamic-METHOD": "s = max(factor, l'/L), l' the length of each row at every pass (YaRN § 3.3)",
    "resonance=true": "every wavelength rounded to a whole number of tokens (Resonance RoPE, arXiv 2403.00071)",
}
"""Modifiers that a spec may add to a method."""


def _add_methods_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("name", nargs="?", metavar="METHOD", help="all about this one (default: a list of all)")
    add("--json", action="store_true", help="print a JSON list")
    add("--figures", metavar="DIR", help="draw one SVG per method, and an overview")
    add("--head-dim", type=int, default=128, metavar="N", help="of the figures: rotated dimensions (default: 128)")
    add("--theta", type=float, default=1e4, metavar="B", help="of the figures: rope_theta (default: 10000)")
    add("--original", type=int, default=4096, metavar="L", help="of the figures: original length (default: 4096)")
    add("--factor", type=float, default=8.0, metavar="S", help="of the figures: scale (default: 8)")


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope methods`."""
    if args.figures:
        from scaled_rope.serving.scaling_plots import write_scaling_figures

        paths = write_scaling_figures(Path(args.figures), args.head_dim, args.theta, args.original, args.factor)
        print(json.dumps([str(path) for path in paths]) if args.json else "\n".join(f"wrote {path}" for path in paths))
        return 0
    rows = method_rows()
    if args.name is not None:
        known = [row["name"] for row in rows]
        if args.name not in known:
            raise unknown("method", args.name, known)
        rows = [row for row in rows if row["name"] == args.name]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print("\n".join(_list_methods(rows) if args.name is None else _describe_method(rows[0])))
    return 0


def _list_methods(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The list of all methods, line by line."""
    table = [("method", "", "what it does to the frequencies θ", "source")]
    for row in rows:
        marks = ("d" if row["dynamic"] else "-") + ("t" if row["native"] else "-")
        table.append((row["name"], marks + ("l" if row["length_dependent"] else "-"), row["summary"], row["source"]))
    widths = [max(len(cells[column]) for cells in table) for column in range(len(table[0]))]
    for cells in table:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
    yield ""
    yield "d: has a dynamic form   t: transformers has a rope_type for it   l: depends on the length by itself"
    yield "added to a method:"
    for name, text in MODIFIERS.items():
        yield f"  {name}  {text}"
    yield "all about one: scaled-rope methods METHOD; one on a model: scaled-rope inspect MODEL --scaling METHOD:FACTOR"


def _describe_method(row: dict[str, Any]) -> Iterator[str]:
    """The description of one method, line by line."""
    own = [name if value is None else f"{name}={json.dumps(value)}" for name, value in row["parameters"].items()]
    yield f"{row['name']}: {row['summary']}"
    yield ""
    yield from textwrap.indent(row["formula"], "  ").splitlines()
    yield ""
    dynamic = f"dynamic-{row['name']}" if row["dynamic"] else f"none: {row['no_dynamic']}"
    native = f'rope_type "{row["native"]}"' if row["native"] else "has no words for it; see scaled-rope export"
    taken = ", ".join([*row["fields"], *own]) or "nothing"
    lines = {"source": row["source"], "takes": taken, "dynamic form": dynamic, "transformers": native}
    lines["needs L"] = "yes, original_max_position_embeddings" if row["needs_original"] else "no"
    for name, text in lines.items():
        yield f"  {name:<12}  {text}"


def method_rows() -> list[dict[str, Any]]:
    """The properties of each method, fit for JSON; "native" is its rope_type in transformers, or None."""
    from scaled_rope.scaling.examples import example
    from scaled_rope.scaling.record import native_type
    from scaled_rope.scaling.registry import METHODS

    rows = []
    for row in METHODS.values():
        fields = dataclasses.fields(row.params_type) if row.params_type is not None else ()
        defaults = {f.name: None if f.default is dataclasses.MISSING else f.default for f in fields}
        frequency = row.kind == "frequency"
        rows.append(
            {
                "name": row.name,
                "summary": row.summary,
                "source": row.source,
                "formula": row.formula,
                "kind": row.kind,
                "fields": sorted(row.fields),
                "parameters": defaults,
                "needs_original": row.needs_original,
                "length_dependent": row.length_dependent,
                "dynamic": not row.no_dynamic,
                "no_dynamic": row.no_dynamic,
                "native": native_type(example(row.name, 128, 1e4, 4096, 8.0), 128) if frequency else None,
            }
        )
    return rows


COMMANDS = {
    "inspect": Command(
        "what a model's RoPE scaling is, dimension by dimension, and what is wrong with it",
        serving.add_inspect_arguments,
        serving.check_inspect_arguments,
        "scaled_rope.serving.inspect_config",
    ),
    "repair": Command(
        "a config.json that says what it was meant to say, where inspect finds that it does not",
        serving.add_repair_arguments,
        serving.check_repair_arguments,
        "scaled_rope.serving.repair",
    ),
    "methods": Command("list the scaling methods, or draw what each does", _add_methods_arguments),
    "export": Command(
        "words and flags that make another program run a scaling, checked against ours",
        serving.add_export_arguments,
        serving.check_export_arguments,
        "scaled_rope.serving.export",
    ),
    "certify": Command(
        "which scaling a running server computes, by its log-probabilities",
        serving.add_certify_arguments,
        serving.check_certify_arguments,
        "scaled_rope.certificate.command",
    ),
    "plan": Command(
        "memory and time of a training recipe, and the flags that make it fit; or memory of serving a model",
        serving.add_plan_arguments,
        serving.check_plan_arguments,
        "scaled_rope.training.planning",
        {"serve": "scaled_rope.serving.serve_plan"},
    ),
    "tune": Command(
        "search the attention factor and the ramp that fit a model",
        search.add_tune_arguments,
        search.check_tune_arguments,
        "scaled_rope.tuning.search",
    ),
    "search": Command(
        "search one divisor per frequency for a model and a length, as LongRoPE does",
        search.add_search_arguments,
        search.check_search_arguments,
        "scaled_rope.tuning.divisor_search",
    ),
    "advise": Command(
        "which scaling suits a model and a length, measured on the model itself",
        search.add_advise_arguments,
        search.check_advise_arguments,
        "scaled_rope.advice.command",
    ),
}
"""Subcommands by name."""

if __name__ == "__main__":
    sys.exit(main())
