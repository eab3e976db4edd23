"""The command line of recipes, for people and for shell scripts.

python -m scaled_rope.recipes --list
python -m scaled_rope.recipes demo              # the resolved recipe
python -m scaled_rope.recipes demo --pending    # what is still to train for it, in order; nothing when it is finished
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.recipes.files import available, read_recipe
from scaled_rope.recipes.runs import is_finished, pending
from scaled_rope.recipes.steps import shell_assignments


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("python -m scaled_rope.recipes", __doc__)
    parser.add_argument("name", nargs="?")
    parser.add_argument("--list", action="store_true", help="names and descriptions")
    parser.add_argument("--pending", action="store_true", help="names of the recipes still to train for it, in order")
    parser.add_argument("--finished", action="store_true", help="exit with 0 when it is finished, else with 1")
    parser.add_argument("--shell", action="store_true", help="assignments for a shell script to eval")
    parser.add_argument("--also", nargs="*", default=[], metavar="NAME", help="no recipes, but known to who asks")
    args = parser.parse_args(argv)
    if args.shell and args.list:
        raise ConfigError("--list is not allowed with --shell, whose output a script runs")
    if args.list:
        for name in available():
            print(f"{name:<24} {read_recipe(name).description}")
    elif args.name is None:
        raise ConfigError("name of a recipe is missing; --list shows them")
    elif args.pending:
        recipe = read_recipe(args.name)
        # The recipe itself under the name that was given: one from a file cannot be found by its own name.
        print("".join(f"{args.name if one == recipe else one.name}\n" for one in pending(recipe)), end="")
    elif args.finished:
        return 0 if is_finished(read_recipe(args.name)) else 1
    elif args.shell:
        print(shell_assignments(read_recipe(args.name, also=args.also)))
    else:
        print(yaml.safe_dump(read_recipe(args.name).to_dict(), sort_keys=False, allow_unicode=True), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
