"""SmolLM2-135M from 8k to 32k positions by PI, NTK-aware scaling and YaRN under one budget, on one GPU.

    python benchmarks/smollm2_32k_prepare.py              # anywhere, first: model, data, texts, questions
    python benchmarks/smollm2_32k.py --list               # the parts, and how far each has come
    python benchmarks/smollm2_32k.py --part train-yarn    # one part, or several; all of them by default

Parts are training a recipe and measuring perplexity, passkeys and benchmarks of the untrained model under its scalings
(base) and of each trained one. They are the project's own scripts, called with the recipes' flags; more flags may
follow after -- and go to every part that is named. Needs torch, transformers and accelerate, and what the preparation
wrote.

When --minutes are over, what runs is stopped: a training saves its state after the pass at work, an evaluation keeps
the rows it has. The same command continues, and exits with 0 either way; --list says what is left. Rows go to one file,
models to the recipes' output folders. On a machine that keeps nothing, rows and train_log.jsonl are what to carry away,
and a model is measured where it was trained. Where the source is no git repository, SCALED_ROPE_COMMIT says for the
rows which commit it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import check_names
from benchmarks.parts import Part, run_all, show
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.recipes import Recipe, is_finished, read_recipe
from scaled_rope.results import portable_model, rows_so_far

RECIPES = ("smollm2-135m-pi-32k", "smollm2-135m-ntk-32k", "smollm2-135m-yarn-32k")
METRICS = {"perplexity": "perplexity", "passkey": "passkey", "benchmarks": "benchmark"}
"""Kind of measurement -> the metric of its rows."""
MAX_LENGTH = "8192"  # where prompts would be cut, for all models alike; none is as long


# --------------------------------------------------------------------------------------------------------------- parts


def parts(recipes: dict[str, tuple[str, Recipe]], rows: str) -> dict[str, Part]:
    """All parts by name, in the order in which they run.

    recipes: by method, the name or file that it was read from, and the recipe.
    """
    found: list[Part] = []
    first = next(iter(recipes.values()))[1]
    base = [flag for spec in first.evaluate["scalings"] for flag in ("--scaling", spec)]
    found += _measurements("base", str(first.model), base, first, rows)
    for method, (source, recipe) in recipes.items():
        found.append(Part(f"train-{method}", ("finetune.py", source), partial(_steps, recipe)))
        found += _measurements(method, f"{recipe.output_dir}/model", [], recipe, rows)
    return {part.name: part for part in found}


def _measurements(of: str, model: str, under: Sequence[str], recipe: Recipe, rows: str) -> list[Part]:
    requests = str(Path(recipe.dataset).parent / "requests")
    tasks = ",".join(sorted(path.stem for path in Path(requests).glob("*.jsonl"))) or "paper"
    commands = {
        "perplexity": ["eval/perplexity.py", *shlex.split(recipe.evaluate["perplexity"])],
        "passkey": ["eval/passkey.py", *shlex.split(recipe.evaluate["passkey"])],
        "benchmarks": ["eval/harness.py", "--requests", requests, "--tasks", tasks, "--max-length", MAX_LENGTH],
    }
    return [
        Part(
            f"{what}-{of}",
            (*command, "-m", model, *under, "--output", rows),
            partial(_count, rows, model, METRICS[what]),
        )
        for what, command in commands.items()
    ]


def _steps(recipe: Recipe) -> str:
    done = rows_so_far(Path(recipe.output_dir) / "train_log.jsonl")[-1:]
    steps = done[0]["step"] if done else 0
    return f"{steps} of {recipe.max_train_steps} steps{', finished' if is_finished(recipe) else ''}"


def _count(path: str, model: str, metric: str) -> str:
    rows = rows_so_far(path)
    return f"{sum(row['model'] == portable_model(model) and row['metric'] == metric for row in rows)} rows"


# ------------------------------------------------------------------------------------------------------------- running


def assemble(bundle: Path, model: Path) -> None:
    """Put the model together from its pieces if it is missing.

    Raises:
        ConfigError: no pieces, a missing piece, or a file that differs from the manifest.
    """
    if model.exists():
        return
    manifest_path = bundle / "manifest.json"
    if not manifest_path.is_file():
        raise ConfigError(f"neither {model} nor {manifest_path} is there; make them with smollm2_32k_prepare.py")
    manifest = json.loads(manifest_path.read_text())
    for name, digest in manifest["files"].items():
        path = bundle / name
        if not path.is_file():
            raise ConfigError(f"{path} is missing; bring it from where smollm2_32k_prepare.py ran")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ConfigError(f"{path} is truncated or altered; bring it anew")
    staged = model.with_name(f".{model.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(bundle / "model", staged)
    digest = hashlib.sha256()
    with (staged / "model.safetensors").open("wb") as whole:
        for name in manifest["weights"]["pieces"]:
            piece = (bundle / name).read_bytes()
            digest.update(piece)
            whole.write(piece)
    if digest.hexdigest() != manifest["weights"]["sha256"]:
        raise ConfigError(f"the pieces in {bundle} do not make up the weights; bring them anew")
    os.rename(staged, model)


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    own, more = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = Parser("benchmarks/smollm2_32k.py", __doc__)
    parser.add_argument("--part", action="append", metavar="NAME", help="see --list; repeatable (default: all)")
    parser.add_argument("--list", action="store_true", help="the parts, and how far each has come")
    parser.add_argument("--minutes", type=float, default=8.5, metavar="N", help="stop after N (default %(default)s)")
    parser.add_argument("--recipe", action="append", metavar="NAME", help=f"repeatable (default: {', '.join(RECIPES)})")
    parser.add_argument("--rows", default="out/smollm2-32k/rows.jsonl", metavar="FILE", help="default %(default)s")
    args = parser.parse_args(own)
    if not args.minutes > 0:
        raise ConfigError(f"minutes {args.minutes} is not allowed; above 0")
    recipes: dict[str, tuple[str, Recipe]] = {}
    for source in args.recipe or RECIPES:
        recipe = read_recipe(source)
        method = str(recipe.scaling).partition(":")[0]
        if method in recipes or recipe.model is None or {"scalings", "perplexity", "passkey"} - set(recipe.evaluate):
            raise ConfigError(f"recipe {source!r} is not allowed; a model under one method each, with `evaluate`")
        recipes[method] = (source, recipe)
    known = parts(recipes, args.rows)
    check_names("part", args.part, known)
    wanted = [known[name] for name in args.part or known]
    if args.list:
        show(wanted)
        return 0
    first = next(iter(recipes.values()))[1]
    assemble(Path(first.dataset).parent, Path(str(first.model)))
    run_all(wanted, args.minutes, more)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
