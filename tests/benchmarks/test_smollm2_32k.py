"""SmolLM2 from 8k to 32k on the embedded model, at lengths of a few hundred tokens."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import finetune
from benchmarks import parts as parts_of_work
from benchmarks import smollm2_32k
from benchmarks.smollm2_32k_prepare import TEXTS
from eval import harness, passkey, perplexity
from scaled_rope.checkpoint import weights_hash
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.recipes import read_recipe
from scaled_rope.results import read_rows
from scaled_rope.texts.corpora import CORPORA
from tests.helpers import ROOT
from tests.helpers.runs import ENVIRONMENT
from tests.helpers.smollm2 import prepare

ABSENT = ("deepspeed", "datasets", "lm_eval", "liger_kernel", "wandb")
"""What the GPU machine does not have."""

_BLOCKER = f"""
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {ABSENT} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def on_gpu_machine(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the GPU's script where what that machine lacks cannot be imported."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(_BLOCKER)
    paths = os.pathsep.join(filter(None, [str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "benchmarks/smollm2_32k.py", "--recipe", str(folder / "tiny.yaml")]
    return subprocess.run(
        [*command, "--rows", str(folder / "rows.jsonl"), *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONPATH": paths, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_from_texts_to_rows(prepared: Path) -> None:
    assert prepare(prepared) == 0
    bundle, base = prepared / "bundle", prepared / "base"
    before, digest = (bundle / "manifest.json").read_text(), weights_hash(base)
    pieces = sorted((bundle / "pieces").iterdir())
    assert len(pieces) == 3 and all(piece.stat().st_size <= 2**22 for piece in pieces)
    assert prepare(prepared) == 0 and (bundle / "manifest.json").read_text() == before  # nothing is made anew
    assert (prepared / "commands").read_text() == "done\n" * 2

    # The other machine has what was prepared, and neither model nor texts.
    for name in ("base", "train", "heldout", "addresses", "cache"):
        shutil.rmtree(prepared / name)
    broken = pieces[1].read_bytes()
    pieces[1].write_bytes(broken[:-1])
    done = on_gpu_machine(prepared)
    assert done.returncode == 2 and "truncated or altered" in done.stderr and not base.exists()
    pieces[1].write_bytes(broken)

    # Time that is over at once: the model is put together, and training stops before it began or with a state.
    done = on_gpu_machine(prepared, "--part", "train-yarn", "--minutes", "0.0001")
    assert done.returncode == 0, done.stderr
    assert "minutes are over in train-yarn" in done.stdout and weights_hash(base) == digest
    names = ("train-yarn", "perplexity-yarn", "benchmarks-yarn")
    done = on_gpu_machine(prepared, *(flag for name in names for flag in ("--part", name)))
    assert done.returncode == 0, done.stderr

    rows = read_rows(prepared / "rows.jsonl")
    found = {(row["metric"], row["label"], row["data"]["name"], row["length"]) for row in rows}
    own = "yarn x4 (checkpoint)"
    expected = {("perplexity", own, text, n) for text in ("books", "addresses") for n in (64, 256)}
    assert found == expected | {("benchmark", own, "truthfulqa_mc2", None)}
    documents = {row["data"]["name"]: row["data"]["documents"] for row in rows if row["metric"] == "perplexity"}
    assert documents == {"books": 4, "addresses": 3}
    log = read_rows(prepared / "trained" / "train_log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3]
    done = on_gpu_machine(prepared, "--list")
    assert re.search(r"train-yarn +3 of 3 steps, finished", done.stdout)
    assert re.search(r"perplexity-yarn +4 rows", done.stdout)


def test_the_blocker_blocks(tmp_path: Path) -> None:
    """What the test above relies on."""
    (tmp_path / "sitecustomize.py").write_text(_BLOCKER)
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n) is not None])"
    names = [*ABSENT, "torch", "transformers"]
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code, *names], env=ENVIRONMENT | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "['torch', 'transformers']", done.stderr


def test_the_recipes_differ_in_method_alone_and_hold_their_texts_out() -> None:
    recipes = [read_recipe(name) for name in smollm2_32k.RECIPES]
    assert [recipe.scaling for recipe in recipes] == ["linear:4", "ntk:4", "yarn:4"]
    free = {"name", "description", "scaling", "output_dir"}
    (budget,) = {json.dumps({k: v for k, v in one.to_dict().items() if k not in free}) for one in recipes}
    assert budget and len({recipe.output_dir for recipe in recipes}) == 3
    trained = [command for command in recipes[0].prepare if command.endswith(f"--output {recipes[0].dataset}")]
    words = shlex.split(trained[0])
    sources = [words[place + 1] for place, word in enumerate(words) if word == "--dataset"]
    # Of the folder of books the training part, and of the stand-in one file: no evaluation text is among them.
    assert sources == ["data/cache/books/train", "data/cache/prose/King James Bible.txt"] and len(trained) == 1
    folders = CORPORA["books"].folders
    assert not set(folders["train"]) & set(folders["heldout"])
    for text in TEXTS.values():
        assert not {source for source in text.sources if source.startswith(("data/cache/books/train", *sources))}


def test_parts_are_commands_that_the_scripts_take() -> None:
    """Every evaluation of every model has the same flags but for the model and, untrained, the scalings."""
    found = [(name, read_recipe(name)) for name in smollm2_32k.RECIPES]
    recipes = {str(recipe.scaling).partition(":")[0]: (name, recipe) for name, recipe in found}
    parts = smollm2_32k.parts(recipes, "rows.jsonl")
    builders = {"perplexity": perplexity, "passkey": passkey, "benchmarks": harness}
    assert len(parts) == 3 * 4 + 3
    for what, evaluator in builders.items():
        seen = []
        for of in ("base", *recipes):
            script, *flags = parts[f"{what}-{of}"].command
            assert (ROOT / script).samefile(str(evaluator.__file__))
            given = vars(evaluator.build_parser().parse_args(flags))
            models, scalings = given.pop("model"), given.pop("scaling")
            assert scalings == (["default", "linear:4", "ntk:4", "yarn:4"] if of == "base" else None)
            assert models == ["models/smollm2-135m" if of == "base" else f"{recipes[of][1].output_dir}/model"]
            seen.append(given)
        assert all(one == seen[0] for one in seen)
    for method, (name, _) in recipes.items():
        script, *flags = parts[f"train-{method}"].command
        assert script == "finetune.py" and finetune.parse_args(flags).recipe == name


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--part", "train-yern"], "did you mean 'train-yarn'"),
        (["--minutes", "0"], "minutes 0.0 is not allowed"),
        (["--recipe", "smollm2-135m-yarn-32k", "--recipe", "smollm2-135m-16k"], "one method each"),
    ):
        assert run_cli(lambda arguments=arguments: smollm2_32k.main(arguments)) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="make them with smollm2_32k_prepare.py"):
        smollm2_32k.assemble(tmp_path, tmp_path / "model")


def test_a_script_that_fails_is_not_taken_for_done(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ended with exit code 2"):
        parts_of_work.run(["finetune.py", "no-such-recipe"], time.monotonic() + 100)
