"""Learning rates, and whole runs in this process."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import finetune
from scaled_rope import patch_model
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import IGNORE
from scaled_rope.recipes.files import read_recipe
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.texts.packing import pack
from scaled_rope.training import batches, loop, model
from scaled_rope.training.batches import collate, step_batches, step_rows
from scaled_rope.training.model import set_sliding_window
from scaled_rope.training.optimizer import learning_rate
from tests.helpers.runs import LENGTH, log, same, weights
from tests.helpers.training_recipes import recipe, resolved_recipe

# ------------------------------------------------------------------------------------------------------- schedules


def test_warm_up_rises_linearly_to_the_peak_and_wastes_no_step():
    rates = [learning_rate(recipe(lr_schedule="constant"), step) for step in range(100)]
    assert rates[:20] == pytest.approx([1e-3 * (step + 1) / 20 for step in range(20)])
    assert rates[20:] == [1e-3] * 80


def test_linear_and_cosine_decay():
    linear = [learning_rate(recipe(), step) for step in range(100)]
    assert linear[20] == 1e-3 and linear[60] == pytest.approx(0.5e-3) and linear[99] == pytest.approx(1e-3 / 80)
    cosine = [learning_rate(recipe(lr_schedule="cosine"), step) for step in range(100)]
    assert cosine[60] == pytest.approx(0.55e-3) and 1e-4 < cosine[99] < 1.02e-4
    assert all(a >= b for rates in (linear, cosine) for a, b in zip(rates[20:], rates[21:], strict=False))
    assert learning_rate(recipe(warmup_steps=0), 0) == 1e-3


@pytest.mark.parametrize("floor", [None, 0.0, 0.25, 1.0])
def test_schedules_end_at_their_floor(floor):
    """Of 100 steps, 20 are warm-up; x is the part that is over of what comes after, or of the decay."""
    after = np.arange(80) / 80
    for name, fallback, left in (
        ("linear", 0.0, 1 - after),
        ("cosine", 0.1, (1 + np.cos(np.pi * after)) / 2),
        ("wsd", 0.0, np.concatenate([np.ones(50), 1 - np.arange(30) / 30])),
    ):
        more = {"lr_decay_share": 0.3} if name == "wsd" else {}
        rates = [learning_rate(recipe(lr_schedule=name, lr_floor=floor, **more), step) for step in range(100)]
        low = fallback if floor is None else floor
        assert rates[:20] == pytest.approx([1e-3 * (step + 1) / 20 for step in range(20)])
        assert rates[20:] == pytest.approx(1e-3 * (low + (1 - low) * left), rel=1e-12)


def test_wsd_falls_as_one_minus_the_root():
    decayed = recipe(lr_schedule="wsd", lr_decay="1-sqrt", lr_decay_share=0.2, lr_floor=0.1)
    rates = [learning_rate(decayed, step) for step in range(100)]
    assert rates[19:81] == [1e-3] * 62
    assert rates[80:] == pytest.approx([1e-3 * (0.1 + 0.9 * (1 - (n / 20) ** 0.5)) for n in range(20)], rel=1e-12)
    whole = recipe(lr_schedule="wsd", warmup_steps=0, lr_decay_share=1.0)
    assert learning_rate(whole, 50) == pytest.approx(5e-4)
    assert learning_rate(recipe(lr_schedule="wsd", lr_decay_share=0.001), 98) == 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_floor": 1.5}, "lr_floor = 1.5 is not allowed; a share of the peak"),
        (
            {"lr_floor": 0.1, "lr_schedule": "constant"},
            "lr_floor = 0.1 is not allowed; none with lr_schedule: constant",
        ),
        ({"lr_decay_share": 0.5}, "lr_decay_share = 0.5 is not allowed; it is for lr_schedule: wsd"),
        ({"lr_decay": "1-sqrt"}, "lr_decay = '1-sqrt' is not allowed; it is for lr_schedule: wsd"),
        ({"lr_schedule": "wsd", "lr_decay_share": 0}, "lr_decay_share = 0 is not allowed"),
        ({"lr_schedule": "wsd", "lr_decay_share": 0.9}, "lr_decay_share = 0.9 is not allowed; at most 0.8"),
        ({"lr_schedule": "wsd", "lr_decay": "cube"}, "lr_decay = 'cube' is not allowed; one of: linear, 1-sqrt"),
    ],
)
def test_schedules_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**fields)


# ------------------------------------------------------------------------------------------------------ whole runs


def test_the_log_has_the_right_rate_batch_and_tokens_at_every_step(workspace, straight):
    rows = log(straight)
    resolved = read_recipe(str(workspace / "recipe.yaml"))
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["learning_rate"] for row in rows] == [learning_rate(resolved, step) for step in range(8)]
    assert [row["tokens"] for row in rows] == [4 * LENGTH] * 8
    assert [row["tokens_seen"] for row in rows] == [4 * LENGTH * n for n in range(1, 9)]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert [float(x) for x in (workspace / "losses.csv").read_text().split(",")] == [row["loss"] for row in rows]
    assert not (straight / "checkpoints").exists() and (straight / "loss.png").stat().st_size > 1000


def test_the_first_loss_is_the_weighted_mean_over_the_global_batch(workspace, straight):
    """A slow restatement with the model's own full logits."""
    from transformers import AutoModelForCausalLM

    resolved = read_recipe(str(workspace / "recipe.yaml"))
    model = AutoModelForCausalLM.from_pretrained(resolved.model, dtype=torch.float32)
    patch_model(model, resolved.scaling)
    total = weight = 0.0
    for rows in step_batches(open_packed(resolved.dataset), resolved, 0, 0, 1):
        batch = collate(rows, LENGTH)
        logits = model(input_ids=batch["input_ids"]).logits.detach().double().log_softmax(-1)
        for b, t in np.ndindex(*batch["targets"].shape):
            if batch["targets"][b, t] != IGNORE:
                total -= float(batch["weights"][b, t] * logits[b, t, batch["targets"][b, t]])
                weight += float(batch["weights"][b, t])
    # float32 forward against float64 softmax of the same logits: relative error near 2^-24 times a few hundred terms
    assert log(straight)[0]["loss"] == pytest.approx(total / weight, rel=1e-5)


def test_master_weights_are_float32_under_bf16(workspace, tmp_path):
    """Updates of 1e-6 are far below the spacing of bfloat16 numbers near 0.1 (5e-4): in bfloat16 nothing would move."""
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path), "--max-train-steps", "3",
                 "--learning-rate", "1e-6", "--lr-schedule", "constant", "--precision", "bf16"]  # fmt: skip
    args = finetune.parse_args(arguments)
    resolved = replace(finetune.resolve(args, 1), save_dtype="float32")
    AcceleratorState._reset_state(True)  # accelerate allows one precision per process
    loop.Trainer(resolved).run()
    AcceleratorState._reset_state(True)
    before, after = load_file(workspace / "model" / "model.safetensors"), weights(tmp_path)
    moved = [(after[name] - before[name]).abs() for name in before]
    assert all(float(change.max()) < 1e-5 for change in moved)
    # every weight that had a gradient moved: Adam moves by the learning rate whatever the gradient's size
    assert sum(int((change > 1e-7).sum()) for change in moved) > 0.5 * sum(change.numel() for change in moved)


def test_heldout_perplexity_is_that_of_the_model_at_each_length(workspace, straight):
    from transformers import AutoModelForCausalLM

    rows = log(straight)
    assert [row["step"] for row in rows if "heldout" in row] == [3, 6, 8]
    model = AutoModelForCausalLM.from_pretrained(straight / "model", dtype=torch.float32)
    data = open_packed(workspace / "set")
    for length in (16, 48):
        losses: list[float] = []
        counted: list[int] = []
        for index in range(3):
            tokens, weight = data.row(index)
            ids = torch.from_numpy(tokens)[None, :length]
            scores = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
            losses += (-scores.gather(1, ids[0, 1:, None])[:, 0]).tolist()
            counted += weight[1:length].tolist()
        # float32 logits: as for the first loss; four decimals are logged
        expected = float(np.exp(np.average(losses, weights=counted)))
        assert rows[-1]["heldout"][str(length)] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_heldout_perplexity_leaves_out_padding_and_reads_documents_as_training_does(workspace, tmp_path, documents):
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(0)
    texts = [rng.integers(2, 60, size).tolist() for size in (20, 23, 31, 40)]
    with PackedWriter(tmp_path / "set", LENGTH, 64, weighted=True) as writer:
        pack(texts, writer, 0, 1, "document", "best-fit", 1, 1)
        writer.close({"bookend": "document", "bos": 0, "eos": 1})
    held = open_packed(tmp_path / "set")
    assert any((held.row(index)[1] == 0).any() for index in range(len(held)))
    resolved = replace(
        resolved_recipe(workspace), heldout=str(tmp_path / "set"), heldout_lengths=(LENGTH,), heldout_steps=2,
        dataset=str(tmp_path / "set"), heldout_rows=len(held), documents=documents, max_train_steps=2, warmup_steps=0,
        output_dir=str(tmp_path / "out"),
    )  # fmt: skip
    loop.Trainer(resolved).run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", dtype=torch.float32)
    losses = []
    for index in range(len(held)):
        tokens, weight = held.row(index)
        cuts = [*held.document_starts(index), LENGTH] if documents == "separate" else [0, LENGTH]
        for first, end in zip(cuts, cuts[1:], strict=False):
            ids = torch.from_numpy(tokens[None, first:end])
            scores = model(input_ids=ids).logits.detach().double().log_softmax(-1)[0, :-1]
            nll = -scores.gather(1, ids[0, 1:, None])[:, 0]
            losses += nll[torch.from_numpy(weight[first + 1 : end] > 0)].tolist()
    # float32 logits, and four decimals of what is logged
    assert log(tmp_path / "out")[-1]["heldout"][str(LENGTH)] == pytest.approx(float(np.exp(np.mean(losses))), rel=1e-4)


@pytest.mark.parametrize(("scaling", "packed"), [("dynamic-yarn", True), ("dynamic-ntk:4", False), ("yarn:3", False)])
def test_rows_of_different_length_have_their_own_scale(workspace, tmp_path, scaling, packed):
    """A scaling that follows the length would take padding for tokens."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(0)
    rows = [rng.integers(2, 60, size).tolist() for size in (20, LENGTH, 30, 17)]
    if packed:
        with PackedWriter(tmp_path / "data", LENGTH, 64, weighted=True) as writer:
            for row in rows:
                pad = [1] * (LENGTH - len(row))
                writer.append(np.array(row + pad), np.array([1] * len(row) + [0] * len(pad)))
            writer.close({})
    else:
        Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "data")
    held = {"heldout": str(tmp_path / "data"), "heldout_lengths": (LENGTH,), "heldout_rows": 4, "heldout_steps": 1}
    resolved = replace(
        resolved_recipe(workspace), dataset=str(tmp_path / "data"), scaling=scaling, max_train_steps=1,
        warmup_steps=0, global_batch_size=4, batch_size=2, learning_rate=1e-12, output_dir=str(tmp_path / "out"),
        **(held if packed else {"heldout": None, "heldout_lengths": ()}),
    )  # fmt: skip
    (loss,) = loop.Trainer(resolved).run()
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    patch_model(model, scaling)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row])
        scores = model(input_ids=ids).logits.detach().double().log_softmax(-1)[0, :-1]
        total -= float(scores.gather(1, ids[0, 1:, None]).sum())
    mean = total / sum(len(row) - 1 for row in rows)
    assert loss == pytest.approx(mean, rel=1e-5)  # float32 forward, as above
    if packed:  # the step changed nothing
        assert log(tmp_path / "out")[0]["heldout"][str(LENGTH)] == pytest.approx(float(np.exp(mean)), rel=1e-4)


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (0, 0), (0, None), (None, 1), (None, None)])
def test_separate_documents_train_as_if_each_were_alone(workspace, tmp_path, bos, eos):
    """The first loss of a run on packed documents, against the documents one by one. Some have BOS and EOS inside."""
    from transformers import AutoModelForCausalLM

    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 60, size).tolist() for size in (5, 17, 1, 30, 9, 44, 21, 13, 40, 8)]
    documents[3][4:7] = [1, 0, 1]
    with PackedWriter(tmp_path / "set", LENGTH, 64) as writer:
        pack(documents, writer, bos, eos)
        writer.close({"bookend": "document", "bos": bos, "eos": eos})
    arguments = [str(workspace / "recipe.yaml"), "--dataset", str(tmp_path / "set"), "--max-train-steps", "2"]
    losses = {}
    for name in ("joined", "separate"):
        assert finetune.main([*arguments, "--documents", name, "--output-dir", str(tmp_path / name)]) == 0
        losses[name] = log(tmp_path / name)[0]["loss"]
    model = AutoModelForCausalLM.from_pretrained(workspace / "model", dtype=torch.float32)
    patch_model(model, "yarn:3")
    rows: list[list[list[int]]] = [[]]  # the documents of each row
    for document in documents:
        rest = [token for token in (bos, *document, eos) if token is not None]
        while rest:
            room = LENGTH - sum(map(len, rows[-1]))
            rows[-1].append(rest[:room])
            rest = rest[room:]
            if sum(map(len, rows[-1])) == LENGTH:
                rows.append([])
    resolved = resolved_recipe(workspace)
    total = count = 0.0
    for index in step_rows(len(rows) - 1, resolved.global_batch_size, 0, resolved.seed):
        for document in rows[index]:
            ids = torch.tensor([document])
            scores = model(input_ids=ids).logits.detach().double().log_softmax(-1)[0, :-1]
            total -= float(scores.gather(1, ids[0, 1:, None]).sum())
            count += len(document) - 1
    # float32 forward against float64 softmax of the same logits, as for the first loss above
    assert losses["separate"] == pytest.approx(total / count, rel=1e-5)
    assert abs(losses["joined"] - losses["separate"]) > 1e-3


def test_window_schedule_of_a_run_changes_step_by_step(workspace, tmp_path, monkeypatch):
    seen, original = [], set_sliding_window

    def note(model, window):
        original(model, window)
        seen.append(model.config.sliding_window)

    monkeypatch.setattr(loop, "set_sliding_window", note)
    init = {
        "model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "max_position_embeddings": 16,
        "sliding_window": 8,
    }  # fmt: skip
    resolved = replace(
        resolved_recipe(workspace), model=None, init=init, tokenizer=str(workspace / "model"), max_train_steps=3,
        warmup_steps=0, sliding_window_attention_schedule=(16, 64), output_dir=str(tmp_path),
    )  # fmt: skip
    loop.Trainer(resolved).run()
    assert seen == [16, 64, 16]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["sliding_window"] == 16


@pytest.fixture
def broken_off(workspace, tmp_path, monkeypatch, capsys):
    """A run that was stopped by a signal in the middle of step 4, between two of its four passes."""
    output, passes = tmp_path / "out", []
    original = batches.collate

    def collate(*arguments):
        passes.append(None)
        if len(passes) == 4 * 3 + 2:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "collate", collate)
        arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(output), "--model", str(workspace / "dropout")]
        arguments += ["--heldout-steps", "8"]  # its passes are not to be counted
        assert finetune.main(arguments) == 143
    assert "SIGTERM after step 3: saved" in capsys.readouterr().out
    assert len(passes) == 14, "the step's other passes were not to be made"
    return output, arguments


def test_a_step_that_was_broken_off_is_done_again_as_if_it_had_not_begun(workspace, broken_off, tmp_path):
    output, arguments = broken_off
    assert [row["step"] for row in log(output)] == [1, 2, 3]
    assert finetune.main(arguments) == 0
    whole = [*arguments[:2], str(tmp_path / "whole"), *arguments[3:]]
    assert finetune.main(whole) == 0
    assert same(log(output)) == same(log(tmp_path / "whole"))
    reference, other = weights(tmp_path / "whole"), weights(output)
    assert all(torch.equal(reference[name], other[name]) for name in reference)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_and_leaves_the_last_state_intact(
    workspace, tmp_path, monkeypatch, capsys, what
):
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--checkpointing-steps", "1"]
    arguments += ["--max-train-steps", "4"]
    original, passes = model.SummedLoss.forward, []

    def forward(self, **tensors):
        loss = original(self, **tensors)
        passes.append(None)
        if len(passes) <= 4 * 2:
            return loss
        if what == "loss":
            return loss + torch.inf
        weight = next(self.parameters())
        return loss + ((weight - weight.detach()).sum() ** 2).sqrt()  # 0, with the gradient 0 x infinity

    with monkeypatch.context() as patch:
        patch.setattr(model.SummedLoss, "forward", forward)
        assert run_cli(lambda: finetune.main(arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"error: {what} of step 3 is ") and "step-000002, is intact" in error
    assert not (tmp_path / "out" / "model").exists()
    assert finetune.main(arguments) == 0
    assert [row["step"] for row in log(tmp_path / "out")] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------- tables of users


def save_table(folder, **columns) -> list[str]:
    """Save a table; returns the arguments of a run on it, of two steps and four rows each."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "table")
    return ["--dataset", str(folder / "table"), "--output-dir", str(folder / "out"), "--max-train-steps", "2"]


def test_padding_on_either_side_trains_like_none(workspace, tmp_path):
    rng = np.random.default_rng(1)
    rows = [rng.integers(2, 60, length).tolist() for length in (40, 9, 17, 3)]
    padding = [[0] * (LENGTH - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    tables = {
        "plain": {"input_ids": rows},
        "left": {"input_ids": [p + row for p, row in zip(padding, rows, strict=True)],
                 "attention_mask": [p + one for p, one in zip(padding, ones, strict=True)]},
        "right": {"input_ids": [row + p for p, row in zip(padding, rows, strict=True)],
                  "attention_mask": [one + p for p, one in zip(padding, ones, strict=True)]},
    }  # fmt: skip
    for name, columns in tables.items():
        (tmp_path / name).mkdir()
        assert finetune.main([str(workspace / "recipe.yaml"), *save_table(tmp_path / name, **columns)]) == 0
    plain = same(log(tmp_path / "plain" / "out"))
    assert plain[0]["tokens"] == 69
    assert same(log(tmp_path / "left" / "out")) == same(log(tmp_path / "right" / "out")) == plain


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[5, 6, 7]] * 30 + [[5, 64]]},
         "row 30 of .* has token id 64, the model's vocabulary ends at 63; tokenize with the model's own tokenizer"),
        ({"input_ids": [[5, 6, 7]] * 4, "labels": [[-100] * 3] * 4},
         r"step 1 has nothing to learn: labels are -100 or loss masks 0 throughout rows [0-3](, [0-3]){3} of .*table"),
        ({"input_ids": [[5]] * 4}, "step 1 has nothing to learn"),
        ({"input_ids": [[5, 6], []]}, "1 of 2 rows hold no tokens, the first is row 1; remove them"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_trained_on_are_one_line(workspace, tmp_path, capsys, columns, message):
    arguments = [str(workspace / "recipe.yaml"), *save_table(tmp_path, **columns)]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out" / "train_log.jsonl").exists() or not log(tmp_path / "out")
