"""The worked examples of CONTRIBUTING.md, taken from the page and followed."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import finetune
from scaled_rope import RopeScaling, cli, compute_rope, patch_model
from scaled_rope.checkpoint import DEFAULT_MODEL, load_config
from scaled_rope.evaluation.jobs import model_jobs
from scaled_rope.evaluation.runner import run
from scaled_rope.flags.evaluators import add_evaluation_arguments, add_model_arguments
from scaled_rope.patching.families import ADAPTERS, Adapter
from scaled_rope.recipes.files import read_recipe
from scaled_rope.results import read_rows
from scaled_rope.scaling import frequencies, hf_config, registry
from scaled_rope.serving.export import export
from scaled_rope.serving.targets import registry as servers
from tests.helpers import ROOT, reference
from tests.helpers.models import FAMILIES, TWO_TYPES, Make

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

#: what the examples make, and so is not there yet
MADE = ("copying", "newserver", "llama-2-7b-32k", "NAME")


def blocks(heading: str, language: str = "python") -> list[str]:
    """The code blocks of a section, without their indentation."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [textwrap.dedent(found) for found in re.findall(rf"^ *```{language}\n(.*?)^ *```$", section, re.M | re.S)]


def test_every_file_and_folder_that_the_page_names_is_there() -> None:
    tree = PAGE.split("```")[1]
    named = {word for line in tree.splitlines() for word in re.split(r"  +", line)[0].split()}
    prose = PAGE.replace(tree, "")
    named |= {
        word for word in re.findall(r"`([\w./-]+)`", prose) if "/" in word or word.endswith((".py", ".yaml", ".sh"))
    }
    named |= set(re.findall(r"\]\(([\w./-]+)\)", prose))
    known = [path for folder in ("scaled_rope", "tests", "eval") for path in (ROOT / folder).rglob("*.py")]
    missing = [
        name
        for name in sorted(named)
        if not any(word in name for word in MADE)
        and not (ROOT / name).exists()
        and not any(path.name == name for path in known)
    ]
    assert len(named) > 40 and missing == []


def test_every_table_that_the_page_names_is_where_it_says() -> None:
    """ "`VARIANTS` … in `tests/helpers/method_variants.py`" and the like."""
    named = re.findall(r"`(_?[A-Z][A-Z_]+)`(?: \(or `([A-Z_]+)`\))?[^`.]{0,40}? (?:in|of|to)\s+`([\w./]+\.py)`", PAGE)
    assert len(named) >= 8
    for first, second, path in named:
        text = (ROOT / path if (ROOT / path).exists() else ROOT / "scaled_rope/scaling" / path).read_text()
        for name in filter(None, (first, second)):
            assert re.search(rf"^{name}\b.*=", text, re.M), f"{path} has no {name}"


def test_the_method(monkeypatch: pytest.MonkeyPatch, tiny_model: Make, tokens: Tensor, tmp_path: Path) -> None:
    function, row, slowly = blocks("Add a method")
    for module, text in ((frequencies, function), (reference, slowly)):
        own = dict(vars(module))
        exec(text, own)
        monkeypatch.setattr(module, "sqrt_linear", own["sqrt_linear"], raising=False)
    added = eval(row, dict(vars(registry)))
    monkeypatch.setitem(registry.METHODS, added.name, added)
    scaling = RopeScaling(added.name, 8.0, 4096)
    inv_freq, attention_factor = compute_rope(scaling, 128)
    wanted = torch.tensor(reference.sqrt_linear(128, scaling.rope_theta, 8.0), dtype=torch.float64)  # type: ignore[attr-defined]
    torch.testing.assert_close(inv_freq.double(), wanted, rtol=4 * 2**-24, atol=0)  # a root, a power, a quotient
    assert attention_factor == 1.0 and scaling.label == "sqrt-linear x8"
    model = tiny_model()
    report = patch_model(model, "sqrt-linear:4")
    model.save_pretrained(tmp_path)
    assert not report.native and RopeScaling.from_config(model.config) == report.scaling
    assert RopeScaling.from_spec("dynamic-sqrt-linear", scaling).dynamic


def test_the_family() -> None:
    (text,) = blocks("Add a model family")
    adapter, theta, model = [line for line in text.splitlines() if not line.startswith("#")]
    assert ADAPTERS["cohere2"] == eval(f"{{{adapter}}}", {"Adapter": Adapter})["cohere2"]
    name, _, table = theta.partition(" = ")
    assert getattr(hf_config, name)["cohere2"] == ast.literal_eval(table.replace(", ...", ""))["cohere2"]
    assert FAMILIES["cohere2"] == eval(f"{{{model}}}", {"TWO_TYPES": TWO_TYPES})["cohere2"]
    prose = PAGE.split("\n## Add a model family\n")[1].split("\n## ")[0]
    for table in re.findall(r"`(_?[A-Z]+_[A-Z_]+)`", prose.split("Other tables in")[1]):
        assert hasattr(hf_config, table), table


def test_the_evaluator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks("Add an evaluator")
    made = module(monkeypatch, "copying_evaluator", text)
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_evaluation_arguments(parser)
    output = tmp_path / "rows.jsonl"
    flags = [
        "--scaling",
        "default",
        "--scaling",
        "yarn:2",
        "--device",
        "cpu",
        "--hide-progress",
        "--output",
        str(output),
    ]
    args = parser.parse_args(flags)
    evaluator, jobs = made.Copying(lengths=[32, 128], seed=0), model_jobs(args)
    found = run(evaluator, jobs, args, "a command", 0)
    rows = read_rows(output)
    assert [(row["metric"], row["length"]) for row in rows] == [("copying", 32), ("copying", 128)] * 2
    for row in rows:
        half = row["length"] // 2
        assert row["n"] == half - 1 and 0 <= row["accuracy"] <= 1
    assert [row[32]["model"] for row in found.values()] == ["models/tiny-llama-256"] * 2
    run(evaluator, jobs, args, "a command", 0)
    assert len(read_rows(output)) == 4  # resumed: nothing is measured twice


@pytest.fixture
def own_recipe(tmp_path: Path) -> Path:
    (text,) = blocks("Add a recipe", "yaml")
    first, _, rest = text.partition("\n")
    path = tmp_path / Path(first.removeprefix("# ")).name
    path.write_text(rest)
    shutil.copy(ROOT / "configs" / "llama-2-7b-64k.yaml", tmp_path)
    return path


def test_the_recipe(own_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_recipe
    recipe, base = read_recipe(str(path)), read_recipe("llama-2-7b-64k")
    assert (recipe.scaling, recipe.truncate, recipe.learning_rate) == ("yarn:8", 32768, base.learning_rate)
    assert recipe.model == base.model and recipe.dataset == base.dataset
    assert finetune.main([str(path), "--print"]) in (None, 0) and "truncate: 32768" in capsys.readouterr().out


@pytest.mark.slow
def test_the_recipe_can_be_planned(own_recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(own_recipe)]) == 0 and "llama-2-7b-32k" in capsys.readouterr().out


def test_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    (text,) = blocks("Add a server")
    target = module(monkeypatch, "newserver", text).TARGET
    monkeypatch.setitem(servers.TARGETS, target.name, target)
    config = load_config(str(DEFAULT_MODEL))
    done = export("linear:4", config, "newserver")
    assert done.status == "exact" and done.flags[0] == "--config" and done.flags[2:] == ("--max-len", "1024")
    assert json.loads(done.flags[1])["rope_parameters"]["factor"] == 4.0
    assert export("yarn:4", config, "newserver").status == "refused"


def module(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> ModuleType:
    """A module with this source, known to Python until the test ends."""
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(compile(f"from __future__ import annotations\n{text}", name, "exec"), vars(made))
    return made
