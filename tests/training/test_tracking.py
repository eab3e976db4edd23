"""The log of a run: its losses, rates and notes."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import yaml

import finetune
from scaled_rope.recipes.recipe import Recipe
from tests.helpers.runs import log
from tests.helpers.training_recipes import resolved_recipe


def test_a_saved_model_says_how_it_was_made(workspace, straight):
    folder = straight / "model"
    saved = Recipe(**{key: tuple(value) if isinstance(value, list) else value
                      for key, value in yaml.safe_load((folder / "recipe.yaml").read_text()).items()})  # fmt: skip
    assert saved == replace(resolved_recipe(workspace), output_dir=str(straight))
    facts = yaml.safe_load((folder / "provenance.yaml").read_text())
    assert facts["environment"]["torch"] == facts["versions"]["torch"] == torch.__version__ and "commit" in facts
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header)["base_model"] == str(workspace / "model")
    last = log(straight)[-1]
    assert f"{last['loss']:.4f} nats per token" in body and "yarn x3" in body and str(facts["commit"]) in body
    assert f"{last['tokens_seen']} tokens in all" in body


def test_rows_go_to_every_tracker_that_is_asked_for(workspace, tmp_path, monkeypatch):
    import types

    sent = {"wandb": [], "tensorboard": []}
    run = SimpleNamespace(log=lambda row, step: sent["wandb"].append((step, row)), finish=lambda: None)
    asked = {}
    fake = SimpleNamespace(init=lambda **options: asked.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)

    class SummaryWriter:
        def __init__(self, folder):
            sent["folder"] = folder

        def add_scalar(self, name, value, step):
            sent["tensorboard"].append((step, name, value))

        def close(self):
            sent["closed"] = True

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path), "--max-train-steps", "2",
                 "--wandb", "project", "--tensorboard", str(tmp_path / "board")]  # fmt: skip
    assert finetune.main(arguments) == 0
    rows = log(tmp_path)
    assert asked["project"] == "project" and asked["config"]["learning_rate"] == 5e-3
    assert [row for _, row in sent["wandb"]] == rows and [step for step, _ in sent["wandb"]] == [1, 2]
    assert (2, "heldout/48", rows[1]["heldout"]["48"]) in sent["tensorboard"] and sent["closed"]
    assert {(step, value) for step, name, value in sent["tensorboard"] if name == "loss"} == {
        (row["step"], row["loss"]) for row in rows
    }
