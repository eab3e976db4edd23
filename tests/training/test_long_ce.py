"""LongCE: weights of the loss by what far context adds, and training with them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import finetune
from scaled_rope.errors import ConfigError
from scaled_rope.patching.patch import patch_model
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.texts.packed import open_packed
from scaled_rope.training.batches import step_batches
from scaled_rope.training.long_ce import gain_weights, near_losses, near_windows
from tests.helpers.runs import LENGTH, Ranks, command, log, same

CONTEXT, STEP, CAP = 20, 7, 1.5
FLAGS = (
    "--loss-weights", "long_ce", "--long-ce-context", str(CONTEXT), "--long-ce-step", str(STEP),
    "--long-ce-cap", str(CAP),
)  # fmt: skip


@pytest.mark.parametrize(
    ("length", "context", "step"), [(48, 20, 7), (48, 20, 28), (41, 40, 1), (21, 20, 3), (9, 9, 2)]
)
def test_windows_score_each_later_position_once_from_enough_before_it(length: int, context: int, step: int) -> None:
    scored = []
    for first, begin, end in near_windows(length, context, step):
        assert 0 < first <= begin < end <= length
        for position in range(begin, end):
            assert context <= position - first + 1 <= context + step - 1
            scored.append(position)
    assert scored == list(range(context + step - 1, length))


def test_weights() -> None:
    whole = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0.5]])
    near = torch.tensor([[3.0, 4.0 + math.log(1.2), 500.0]])
    found = gain_weights(whole, near, 2.0)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0, 1.0, 1.2, 2.0]]))
    assert gain_weights(whole, near - 1.0, 2.0)[0, 2] == pytest.approx(math.exp(-1))  # worse with all of it: below 1
    assert torch.equal(gain_weights(whole, near[:, :0], 2.0), torch.ones(1, 5))


def test_nearby_losses_are_those_of_the_windows() -> None:
    """A stand-in for a model whose loss of a target tells how many tokens it saw."""

    def losses(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        return 100.0 * targets + torch.arange(1, ids.shape[1] + 1)

    ids = torch.arange(2 * 13).view(2, 13)
    found = near_losses(losses, ids, ids, context=4, step=3)
    seen = [4, 5, 6, 4, 5, 6, 4]  # the last window ends with the text and scores one
    assert torch.equal(found, 100.0 * ids[:, 6:] + torch.tensor(seen))
    assert near_losses(losses, ids, ids, context=11, step=3).shape == (2, 0)


def test_the_first_step_is_the_definition(workspace: Path, tmp_path: Path) -> None:
    """The first loss of a run against ratios of probabilities, from the model's own logits and one target at a time."""
    from transformers import AutoModelForCausalLM

    assert finetune.main(command(workspace, tmp_path / "run", (*FLAGS, "--max-train-steps", "2"))) == 0
    first = log(tmp_path / "run")[0]
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    patch_model(model, "yarn:3")
    resolved = read_recipe(str(workspace / "recipe.yaml"))

    def probabilities(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scores = model(input_ids=ids[None]).logits[0].double().softmax(-1)
        return scores[:-1].gather(1, ids[1:, None])[:, 0]

    total = plain = count = 0.0
    capped = raised = 0
    for batch in step_batches(open_packed(workspace / "set"), resolved, 0, 0, 1):
        for tokens, weight in batch:
            ids = torch.from_numpy(tokens)
            whole = probabilities(ids)
            for target in range(1, LENGTH):
                loss = -math.log(whole[target - 1]) * float(weight[target])
                place, gain = target - 1, 1.0  # the position that predicts it
                if target >= CONTEXT + STEP:  # the window of STEP targets that it is in, and CONTEXT tokens before them
                    begin = (target - CONTEXT) // STEP * STEP
                    gain = min(float(whole[place] / probabilities(ids[begin : target + 1])[-1]), CAP)
                    capped, raised = capped + (gain == CAP), raised + (1 < gain < CAP)
                total, plain, count = total + gain * loss, plain + loss, count + float(weight[target])
    assert capped > 5 and raised > 5
    # float32 forward passes against float64 softmax of the same logits; ratios of two of them
    assert first["loss"] == pytest.approx(total / count, rel=3e-5)
    assert first["unweighted_loss"] == pytest.approx(plain / count, rel=1e-5)
    assert abs(first["loss"] - first["unweighted_loss"]) > 1e-3


@pytest.mark.parametrize(
    "engine", ["ddp", pytest.param("zero3", marks=pytest.mark.slow), pytest.param("fsdp2", marks=pytest.mark.slow)]
)
def test_two_ranks_weigh_like_one(workspace: Path, tmp_path: Path, engine: str) -> None:
    assert finetune.main(command(workspace, tmp_path / "one", FLAGS)) == 0
    Ranks(workspace, tmp_path / "two", 2, engine, FLAGS).succeed()
    one, two = same(log(tmp_path / "one")), same(log(tmp_path / "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["unweighted_loss"] == pytest.approx(theirs["unweighted_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"loss_weights": "long"}, "loss_weights = 'long' is not allowed; one of: data, long_ce"),
        ({"loss_weights": "data", "long_ce_cap": 3.0}, "long_ce_cap = 3.0 is not allowed; it is for loss_weights"),
        ({"long_ce_cap": 0.5}, "long_ce_cap = 0.5 is not allowed; at least 1"),
        ({"long_ce_context": 8192}, "long_ce_context = 8192 is not allowed; 2 to 8190"),
        ({"long_ce_step": 4096}, "long_ce_step = 4096 is not allowed; 1 to 4095, or no window"),
        ({"documents": "separate"}, "documents = 'separate' is not allowed; joined"),
        ({"positions": "pose"}, "positions = 'pose' is not allowed; consecutive"),
        ({"sequence_parallel": 2}, "sequence_parallel = 2 is not allowed; 1 with"),
        ({"truncate": 2048}, "long_ce_context = 4096 is not allowed; 2 to 2046"),
    ],
)
def test_recipes_that_cannot(fields: dict[str, object], said: str) -> None:
    given = {"name": "t", "output_dir": "out", "dataset": "d", "sequence_length": 8192, "global_batch_size": 4}
    with pytest.raises(ConfigError, match=said):
        Recipe(**{**given, "model": "m", "loss_weights": "long_ce", **fields})  # type: ignore[arg-type]


def test_rows_that_are_too_short_are_refused(workspace: Path, tmp_path: Path) -> None:
    """`sequence_length` is only the longest row that is accepted: the rows themselves may leave nothing to weigh."""
    extra = ("--sequence-length", "96", "--loss-weights", "long_ce", "--long-ce-context", str(LENGTH - 1))
    said = f"loss_weights long_ce is not possible: rows have at most {LENGTH} tokens, fewer than the {LENGTH + 1} that "
    with pytest.raises(ConfigError, match=f"{said}long_ce_context {LENGTH - 1} and long_ce_step 1 need"):
        finetune.main(command(workspace, tmp_path / "run", (*extra, "--long-ce-step", "1")))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_card_says_so(workspace: Path, tmp_path: Path) -> None:
    assert (
        finetune.main(command(workspace, tmp_path / "run", (*FLAGS, "--max-train-steps", "1", "--warmup-steps", "1")))
        == 0
    )
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "| loss weights | LongCE: gain of all tokens over the last 20, at most 1.5 |" in card
