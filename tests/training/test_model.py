"""The model that is trained: built and wrapped."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import finetune
from scaled_rope import RopeScaling
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.training import loop
from scaled_rope.training.batches import collate
from scaled_rope.training.model import SummedLoss, build_model
from tests.helpers.runs import LENGTH, weights
from tests.helpers.training_recipes import recipe, resolved_recipe


def test_a_tokenizer_with_more_ids_than_embeddings_is_noted_and_one_that_is_none_refused(workspace, tmp_path, capsys):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workspace / "model")
    tokenizer.add_tokens(["t64", "t65"])
    tokenizer.save_pretrained(tmp_path / "more")
    arguments = [str(workspace / "recipe.yaml"), "--max-train-steps", "2", "--output-dir", str(tmp_path / "out")]
    assert finetune.main([*arguments, "--tokenizer", str(tmp_path / "more")]) == 0
    assert f"note: tokenizer {tmp_path / 'more'} has ids up to 65, the model's vocabulary ends at 63;" in (
        capsys.readouterr().out
    )
    (tmp_path / "none").mkdir()
    arguments[-1] = str(tmp_path / "other")
    assert run_cli(lambda: finetune.main([*arguments, "--tokenizer", str(tmp_path / "none")])) == 2
    assert "holds no config.json" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize("flag", ["--dataset", "--heldout"])
def test_a_set_of_another_tokenizer_is_refused(workspace, tmp_path, capsys, flag):
    """Its ids fit the model, so nothing else would tell."""
    with PackedWriter(tmp_path / "set", LENGTH, 64) as writer:
        for _ in range(4):
            writer.append([3] * LENGTH)
        writer.close({"tokenizer": "other", "tokenizer_hash": "1", "base_vocabulary_hash": "2"})
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), flag, str(tmp_path / "set")]
    assert run_cli(lambda: finetune.main(arguments)) == 2
    said = f"error: dataset {tmp_path / 'set'} was made with tokenizer other, whose ids stand for other tokens than"
    assert said in capsys.readouterr().err and not (tmp_path / "out" / "model").exists()


def test_recipes_choose_layers():
    init = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 61, "max_position_embeddings": 32,
        "use_sliding_window": True, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    fields = {"model": None, "init": init, "tokenizer": "none", "scaling": "yarn:4"}
    _, report = build_model(recipe(**fields, layers="full_attention", drop_layers=(0,)))
    assert report is not None and not report.native and report.plan.drop_layers == (0,)
    assert {name: one.label for name, one in report.plan.layers.items()} == {
        "sliding_attention": "unscaled",
        "full_attention": "yarn x4",
    }
    model, report = build_model(recipe(**fields))
    assert report is not None and report.native and not report.plan.layers
    assert model.config.max_position_embeddings == 128
    with pytest.raises(ConfigError, match="drop_layers=2: must be a layer's index, 0 to 1"):
        build_model(recipe(**fields, drop_layers=(2,)))


def test_lora_trains_adapters_and_saves_merged_weights(workspace, tmp_path):
    pytest.importorskip("peft")
    from scaled_rope.patching.loading import load_model

    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path), "--lora", "--max-train-steps", "2"]
    assert finetune.main(arguments) == 0
    before, after = load_file(workspace / "model" / "model.safetensors"), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("proj" in name for name in changed)
    adapter = tmp_path / "model" / "adapter"
    assert (adapter / "adapter_model.safetensors").exists()
    # It says the scaling that it was trained under.
    merged, base = load_model(str(tmp_path / "model")), str(workspace / "model")
    adapted = load_model(base, adapter=str(adapter))
    assert (
        patched_scaling(adapted) == RopeScaling.from_config(merged.config)
        and patched_scaling(adapted).label == "yarn x3"
    )
    ids = torch.arange(2, 42)[None]
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert patched_scaling(load_model(base, adapter=str(adapter), scaling="checkpoint")) == patched_scaling(adapted)
    assert patched_scaling(load_model(base, adapter=str(adapter), scaling="default")) is None


EXPERTS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 16,
}  # fmt: skip


def test_weights_without_an_adapter_are_named(workspace):
    pytest.importorskip("peft")
    from scaled_rope.training.model import adapted_share_note, add_lora

    dense, _ = build_model(replace(resolved_recipe(workspace), lora=True))
    assert adapted_share_note(dense) == ""
    fields = {"model": None, "init": {"model_type": "gpt_oss", "head_dim": 16, **EXPERTS}, "scaling": None}
    mixture, _ = build_model(replace(resolved_recipe(workspace), tokenizer=str(workspace / "model"), **fields))
    note = adapted_share_note(add_lora(mixture))
    assert re.match(r"note: 8\d% of the layers' weights have no adapter and are not trained: mlp.experts.gate_up", note)


def test_experts_that_adapters_cannot_take_are_one_line(workspace):
    pytest.importorskip("peft")
    init = {"model_type": "mixtral", **EXPERTS}
    recipe = replace(resolved_recipe(workspace), model=None, init=init, tokenizer=str(workspace / "model"), lora=True)
    with pytest.raises(ConfigError, match="lora is not possible for mixtral models; PEFT says: lora.ParamWrapper"):
        build_model(replace(recipe, scaling=None))


def test_checkpointing_and_offloading_change_nothing(workspace, monkeypatch):
    """The offloading path is taken on the CPU too here, where its copies go from memory to memory."""
    monkeypatch.setattr("scaled_rope.training.offload._is_on_accelerator", lambda tensor: True)
    batch = collate([open_packed(workspace / "set").row(0)], LENGTH)
    copies, original = [], torch.empty

    def counted(*arguments, **options):
        if options.get("pin_memory") is not None:
            copies.append(arguments)
        return original(*arguments, **options)

    gradients, kept = {}, {}
    for checkpointing, offload in ((False, False), (True, False), (True, True)):
        model, _ = build_model(replace(resolved_recipe(workspace), gradient_checkpointing=checkpointing))
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        module = SummedLoss(model, offload)
        monkeypatch.setattr(loop.torch, "empty", counted)
        module(**batch).backward()
        monkeypatch.undo()
        monkeypatch.setattr("scaled_rope.training.offload._is_on_accelerator", lambda tensor: True)
        gradients[checkpointing, offload] = [parameter.grad for parameter in model.parameters()]
        kept[checkpointing, offload] = len(copies)
    assert kept[False, False] == kept[True, False] == 0
    # the inputs of both layers, at least
    hidden = [shape for (shape, *_) in copies if tuple(shape) == (1, LENGTH, 32)]
    assert len(hidden) >= 2
    for other in ((True, False), (True, True)):
        for one, two in zip(gradients[False, False], gradients[other], strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_mistral_window_schedule_sets_the_window_of_each_step(tiny_model):
    from scaled_rope.training.model import set_sliding_window

    model = tiny_model("mistral", sliding_window=8)
    tokens = torch.arange(1, 41)[None]
    narrow = model(input_ids=tokens).logits
    set_sliding_window(model, 64)
    wide = model(input_ids=tokens).logits
    reference = tiny_model("mistral", sliding_window=None)(input_ids=tokens).logits
    assert not torch.allclose(narrow, wide)
    torch.testing.assert_close(wide, reference)


def test_a_window_schedule_is_for_the_layers_that_slide(tiny_model):
    from scaled_rope.training.model import set_sliding_window

    types = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    tokens = torch.arange(1, 41)[None]
    for attention in ("sdpa", "sdpa_blocked"):  # of masks, and of what layers say
        model = tiny_model("qwen2", sliding_window=64, attn_implementation=attention, **types)
        set_sliding_window(model, 8)
        other = tiny_model("qwen2", sliding_window=8, attn_implementation=attention, **types)
        torch.testing.assert_close(model(input_ids=tokens).logits, other(input_ids=tokens).logits)
        assert model.model.layers[1].self_attn.sliding_window is None
    for family in ("qwen2", "qwen3", "llama"):
        model = tiny_model(family, **({} if family == "llama" else {"layer_types": ["full_attention"] * 2}))
        with pytest.raises(
            ConfigError, match=f"schedule is not allowed: .* no layer of this '{family}' model has a slid"
        ):
            set_sliding_window(model, 4)
        assert getattr(model.config, "sliding_window", None) != 4


# ------------------------------------------------------------------------------------------------------- tiled MLPs
