"""Plans against arithmetic."""

from __future__ import annotations

import itertools
import json
import warnings
from dataclasses import replace

import pytest
import torch
import yaml

import finetune
from scaled_rope import cli, patch_model
from scaled_rope.errors import ConfigError
from scaled_rope.patching import loss
from scaled_rope.recipes.files import available, read_recipe
from scaled_rope.training import planning
from scaled_rope.training.model import build_model
from scaled_rope.training.planning import Options, Planner
from tests.helpers import ROOT
from tests.helpers.planning import small

LLAMA_7B = 6738415616


def test_static_memory_of_llama_2_7b_by_engine():
    planner = Planner(read_recipe("llama-2-7b-64k"))
    plain = planner.memory(Options(8, "plain"))
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * LLAMA_7B, 4 * LLAMA_7B, 8 * LLAMA_7B)
    zero2, zero3 = (planner.memory(Options(8, engine)) for engine in ("zero2", "zero3"))
    # bfloat16 weights, float32 gradients, and float32 weights with two moments
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (2 * LLAMA_7B, LLAMA_7B / 2, 12 * LLAMA_7B / 8)
    assert zero3.weights == LLAMA_7B / 4 and zero3.total < zero2.total < plain.total
    offloaded = planner.memory(Options(8, "zero3_offload"))
    assert offloaded.weights == offloaded.optimizer == 0
    assert offloaded.host == zero3.weights + zero3.gradients + zero3.optimizer
    shared = planner.memory(Options(8, "zero3", sequence_parallel=8))
    # the inputs of 32 checkpointed layers, bfloat16, are the least that a pass keeps
    assert zero3.activations > 32 * 65536 * 4096 * 2
    # a pass is linear in the length, but for pieces of constant size
    assert shared.activations == pytest.approx(zero3.activations / 8, rel=0.02)
    assert zero3.logits == 3 * 4 * 2**25 < zero3.activations
    hosted = planner.memory(Options(8, "zero3", offload_activations=True))
    assert hosted.host == 32 * 65536 * 4096 * 2 and zero3.activations - hosted.activations == hosted.host
    assert plain.cache == 0.0
    tiled = Planner(replace(planner.recipe, mlp_tiles=16)).memory(Options(8, "zero3"))
    # Of what a layer holds while it is computed again, most is inside the MLP: gate, up and their product in bfloat16.
    assert zero3.activations - tiled.activations > 2 * 65536 * 11008 * 2
    # torch takes a power of two for each tensor that a GPU copies from.
    planner.recipe = replace(planner.recipe, sequence_length=48 * 1024)
    assert planner.memory(Options(8, "zero3", offload_activations=True)).host == hosted.host


def test_memory_of_ranks_that_share_sequences_by_ring_attention():
    planner = Planner(replace(small(), precision="bf16"))
    zero3, ring = planner.memory(Options(4, "zero3")), planner.memory(Options(4, "fsdp2", context_parallel=4))
    # float32 weights, gradients and two moments, over all ranks
    assert (ring.weights, ring.gradients, ring.optimizer) == tuple(n * zero3.gradients for n in (1, 1, 2))
    # a pass over a quarter of the sequence, but for pieces of logits and of weights of constant size
    assert ring.activations < 0.5 * zero3.activations and ring.logits == zero3.logits / 4
    layer, rest = 64 * (64 + 2 * 32 + 64 + 3 * 160 + 2), 2 * 512 * 64 + 64
    whole = 2 * (2 * rest + 3 * layer) + 4 * rest  # bfloat16 weights and gradients, float32 gradients to be summed
    # Of 2 sequences of 64 tokens, heads of 16: bfloat16 keys and values of 2 heads twice, and in float32 three times
    # beside two gradients of queries of 4 heads.
    buffers = 2 * 64 * 16 * (2 * 2 * 4 + 4 * (3 * 4 + 2 * 4))
    assert ring.gathered == pytest.approx(whole + buffers, rel=0.01)


def test_ways_to_share_sequences_by_ring_attention_are_listed_or_refused_with_the_reason(capsys):
    recipe = small()
    rings = [options for options in Planner(recipe).alternatives(4) if options.context_parallel > 1]
    assert [(options.engine, options.context_parallel) for options in rings] == [("fsdp2", 2), ("fsdp2", 4)]
    command = rings[0].command("demo", recipe)
    assert "configs/accelerate/fsdp2.yaml" in command and command.endswith("--context-parallel 2")
    assert "--sequence-parallel 1" in rings[0].command("x", replace(recipe, sequence_parallel=4))
    for fields, message in (({"scaling": "dynamic-yarn:4"}, "no rank sees"), ({"documents": "separate"}, "no masks")):
        planner = Planner(replace(recipe, **fields))
        (refused,) = [options for options in planner.alternatives(4) if options.context_parallel > 1]
        with pytest.raises(ConfigError, match=message):
            planner.memory(refused)


def test_adapters_need_room_for_adapters():
    planner = Planner(small(lora=True), on_gpu=False)
    adapted = planner.memory(Options(lora=True))
    whole = planner.memory(Options())
    assert adapted.weights > whole.weights, "the adapters themselves"
    assert adapted.optimizer == 2 * adapted.gradients == 2 * (adapted.weights - whole.weights)
    # the largest matrix of an adapter: 16 x 160
    assert adapted.step_workspace == 8 * 16 * 160 and whole.step_workspace == 8 * 512 * 64


def test_matrices_in_four_bits_are_planned_as_they_are_built(workspace):
    pytest.importorskip("bitsandbytes")
    recipe = replace(read_recipe(str(workspace / "recipe.yaml")), lora=True, quantization="nf4", precision="bf16")
    model, _ = build_model(recipe, "sdpa", torch.device("cpu"))
    built = 0
    for parameter in model.parameters():
        built += parameter.numel() * parameter.element_size()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            # Tables of 16 and 256 numbers and the mean of the scales are for each matrix, and too small to be planned.
            built += state.absmax.numel() + -(-state.absmax.numel() // 256) * 4
    planned = Planner(recipe, on_gpu=False).memory(Options(lora=True, quantization="nf4"))
    assert planned.weights == pytest.approx(built, rel=0.01)
    assert planned.weights < 0.6 * Planner(recipe, on_gpu=False).memory(Options(lora=True)).weights


def test_a_plan_says_what_fits_and_how_long_it_takes(capsys, tmp_path, monkeypatch):
    fields = small().to_dict() | {
        "global_batch_size": 2,
        "batch_size": 1,
        "model": None,
        "evaluate": {},
        "heldout": None,
    }
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(fields | {"heldout_lengths": []}))
    arguments = ["plan", str(recipe), "--gpus", "2", "--gpu-memory", "1", "--json"]
    planner = Planner(read_recipe(str(recipe)))  # one for both forms of the output: it keeps the passes that it traced
    monkeypatch.setattr(planning, "Planner", lambda recipe: planner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert cli.main([*arguments, "--peak-tflops", "100", "--utilisation", "0.5"]) == 0
    plan = json.loads(capsys.readouterr().out)
    flops = sum(plan["flops_per_step"].values())
    first = plan["alternatives"][0]
    assert first["step_seconds"] == pytest.approx(flops / (2 * 100e12 * 0.5), abs=0.01)
    assert all(row["fits"] == (row["memory_gb"]["total"] <= 0.92) for row in plan["alternatives"])
    commands = [row["command"] for row in plan["alternatives"]]
    assert any(
        "configs/accelerate/zero3.yaml" in command and "--sequence-parallel 2" in command for command in commands
    )
    assert all(
        (ROOT / word).exists() for command in commands for word in command.split() if word.startswith("configs/")
    )
    assert cli.main(arguments[:-1]) == 0
    text = capsys.readouterr().out
    assert "first that fits: torchrun --nproc_per_node 2 finetune.py" in text and "GPU-hours" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["demo", "--gpus", "0"], "--gpus 0"),
        (["demo", "--gpus", "3"], "cannot run on 3 ranks: global_batch_size 1"),
        (["demo", "--gpu-memory", "0"], "--gpu-memory 0 is not allowed; above 0, at most 1e+06 GB"),
        (["demo", "--utilisation", "1.5"], "--utilisation 1.5"),
        (["dmo"], "did you mean 'demo'"),
    ],
)
def test_plans_that_make_no_sense_are_one_line(capsys, flags, message):
    assert cli.main(["plan", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]


@pytest.mark.parametrize("scaling", ["linear:4", "yarn:4", "default", "dynamic-ntk:2"])
def test_every_scaling_can_be_planned(scaling):
    """Models are planned on tensors without values, which remarks on the scaling must not ask for."""
    planner = Planner(replace(small(), scaling=scaling), on_gpu=False)
    assert planner.memory(Options()).total > 0


@pytest.mark.parametrize("scaling", [None, "yarn:8"])
def test_a_checkpoint_in_our_own_words_can_be_planned(scaling, tiny_model, tmp_path):
    """transformers cannot build its rope_type; the plan is that of the same model in transformers' words."""
    memory = []
    for name, changes in (("plain", {}), ("ours", {"drop_layers": [1]})):
        model = tiny_model()
        patch_model(model, "yarn:4", **changes)
        model.save_pretrained(tmp_path / name)
        recipe = replace(small(), init=None, model=str(tmp_path / name), scaling=scaling)
        memory.append(Planner(recipe, on_gpu=False).memory(Options()))
    assert '"scaled-rope"' in (tmp_path / "ours" / "config.json").read_text()
    plain, ours = memory
    assert (ours.weights, ours.optimizer) == (plain.weights, plain.optimizer)
    assert ours.activations == pytest.approx(plain.activations, rel=0.2)


def test_layers_with_windows_can_be_planned():
    """Their attention tells packed texts apart by position ids, which have no values here."""
    init = {
        "model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "sliding_window": 32,
        "max_position_embeddings": 64, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }  # fmt: skip
    planner = Planner(replace(small(), init=init, layers="full_attention"), on_gpu=False)
    assert planner.memory(Options()).activations > 0


def test_a_large_vocabulary_takes_no_longer(monkeypatch):
    """Of the pieces that the loss of a long sequence is computed in, only those at its ends are traced."""
    inner, pieces = loss.project, []
    monkeypatch.setattr(loss, "_LOGITS_PER_CHUNK", 8 * 512)
    monkeypatch.setattr(loss, "project", lambda *given: (pieces.append(1), inner(*given))[1])
    Planner(small(), on_gpu=False).memory(Options())
    assert len(pieces) == 2 * 8 - 1  # of 64 pieces


def test_windows_of_long_ce_are_counted():
    plain = Planner(small(), on_gpu=False).flops()
    weighed = Planner(small(loss_weights="long_ce", long_ce_context=64, long_ce_step=96), on_gpu=False).flops()
    # Windows of 64 + 96 - 1 positions from 96, and of what is left, 64, from 192; a forward pass is a third.
    assert weighed.linear / plain.linear == pytest.approx(1 + (159 + 64) / 256 / 3)
    assert weighed.attention > plain.attention


@pytest.mark.parametrize("name", sorted(available()))
def test_the_command_of_a_plan_runs_what_was_planned(name):
    """For every recipe, whatever it sets itself."""
    recipe = read_recipe(name)
    memory = ((False, False, False), (True, False, False), (True, True, False), (True, False, True))
    ways = itertools.product(memory, ((1, False, None), (2, False, None), (1, True, None), (1, True, "nf4")))
    resolved = 0
    for (checkpointing, keep, offload), (ranks, lora, quantization) in ways:
        options = Options(2, "plain", checkpointing, keep, offload, ranks, 1, lora, quantization)
        try:
            wanted = options.applied_to(recipe)
        except ConfigError:
            continue
        _, _, words = options.command(name, recipe).partition("finetune.py ")
        found = finetune.resolve(finetune.parse_args(words.split()), 2)
        assert replace(found, name=wanted.name) == wanted, words
        resolved += 1
    assert resolved >= 8
