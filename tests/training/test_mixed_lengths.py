"""Short and long windows in one run, each with its own frequencies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import finetune
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.patch import patch_model
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.texts.packed import open_packed
from scaled_rope.training.batches import step_batches
from scaled_rope.training.mixed_lengths import cut_into_windows, is_short_step
from tests.helpers.runs import LENGTH, Ranks, command, log, same

MIXED = ("--short-share", "0.5")
L = 16  # of the workspace's model


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.3, 0.5, 0.7, 0.99])
def test_short_steps_are_spread_evenly(share: float) -> None:
    count = 0
    for step in range(300):
        count += is_short_step(share, step)
        assert abs(count - (step + 1) * share) < 1 + 1e-6
    assert count == int(round(300 * share, 9))


def test_windows_are_the_rows_in_order() -> None:
    rows = [(np.arange(n), np.arange(n) / 7) for n in (40, 33, 16, 3, 1)]
    windows = cut_into_windows(rows, 16)
    assert [len(tokens) for tokens, _ in windows] == [16, 16, 8, 16, 16, 16, 3]  # single tokens predict nothing
    assert np.array_equal(np.concatenate([t for t, _ in windows[:3]]), rows[0][0])
    assert all(np.array_equal(weights, tokens / 7) for tokens, weights in windows)


def test_steps_are_those_of_two_models(workspace: Path, tmp_path: Path) -> None:
    """Losses of a run whose rate is too small to change anything, each step against a model with its frequencies."""
    from transformers import AutoModelForCausalLM

    extra = (*MIXED, "--learning-rate", "1e-30", "--max-train-steps", "4", "--scaling", "linear:3")
    assert finetune.main(command(workspace, tmp_path / "run", extra)) == 0
    rows = log(tmp_path / "run")
    assert [row["window"] for row in rows] == [LENGTH, L, LENGTH, L]
    plain = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    scaled = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    patch_model(scaled, "linear:3")
    resolved, data = read_recipe(str(workspace / "recipe.yaml")), open_packed(workspace / "set")
    for step, row in enumerate(rows):
        total = count = 0.0
        for batch in step_batches(data, resolved, step, 0, 1):
            for tokens, weight in batch if step % 2 == 0 else cut_into_windows(batch, L):
                ids = torch.from_numpy(tokens)[None]
                with torch.no_grad():
                    logits = (plain if step % 2 else scaled)(input_ids=ids).logits
                scores = logits.double().log_softmax(-1)[0, :-1]
                each = torch.from_numpy(weight[1:]).double()
                total -= float((scores.gather(1, ids[0, 1:, None])[:, 0] * each).sum())
                count += float(each.sum())
        # float32 forward against float64 softmax of the same logits
        assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_saved_model_changes_at_l(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    assert finetune.main(command(workspace, tmp_path / "run", MIXED)) == 0
    said = capsys.readouterr().out
    assert "4 of 8 steps read windows of 16 tokens with the original frequencies; the model changes" in said
    native = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert native.config.rope_parameters["rope_type"] == "longrope"
    ours = load_model(str(tmp_path / "run" / "model"), dtype="float32")
    for length, spec in ((L, "yarn:1"), (LENGTH, "yarn:3")):
        other = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
        other.load_state_dict(native.state_dict())
        factor = native.config.rope_parameters["attention_factor"]
        patch_model(other, f"{spec},attention_factor={factor!r}")
        ids = torch.arange(length)[None] % 60
        with torch.no_grad():
            expected = other(input_ids=ids).logits
            for model in (native, ours):
                torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| short steps | 0.5 of the steps: windows of the original length, original frequencies |" in card


def test_two_ranks_and_a_stop_change_nothing(workspace: Path, tmp_path: Path) -> None:
    assert finetune.main(command(workspace, tmp_path / "one", MIXED)) == 0
    Ranks(workspace, tmp_path / "two", 2, "ddp", (*MIXED, "--stop-after", "3")).succeed()
    Ranks(workspace, tmp_path / "two", 2, "ddp", MIXED).succeed()
    one, two = same(log(tmp_path / "one")), same(log(tmp_path / "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and mine["window"] == theirs["window"]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (("--short-share", "0.1"), "of 8 steps none is short"),
        ((*MIXED, "--truncate", "16"), "rows have at most 16 tokens, not more than the original length, 16"),
        ((*MIXED, "--scaling", "rerope,window=8"), "changes attention"),
        ((*MIXED, "--scaling", "hardclip:3"), "stand still"),
    ],
)
def test_runs_that_cannot(
    workspace: Path, tmp_path: Path, extra: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=said):
        finetune.main(command(workspace, tmp_path / "run", extra))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"short_share": 1.0}, "short_share = 1.0 is not allowed"),
        ({"short_share": 0.5, "scaling": None}, "scaling = None is not allowed; one to train for"),
        ({"short_share": 0.5, "positions": "pose"}, "positions = 'pose' is not allowed; consecutive, with short_share"),
        ({"short_share": 0.5, "documents": "separate"}, "documents = 'separate' is not allowed; joined"),
    ],
)
def test_recipes_that_cannot(fields: dict[str, object], said: str) -> None:
    given = {"name": "t", "output_dir": "out", "dataset": "d", "sequence_length": 64, "global_batch_size": 4}
    with pytest.raises(ConfigError, match=said):
        Recipe(**{**given, "model": "m", "scaling": "yarn:8", **fields})  # type: ignore[arg-type]
