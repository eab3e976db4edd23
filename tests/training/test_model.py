"""The model that is trained: built, wrapped, and saved."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import finetune
from scaled_rope import RopeScaling, patch_model
from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.command_line import run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.texts.packed import PackedWriter, open_packed
from scaled_rope.training import loop
from scaled_rope.training.batches import collate
from scaled_rope.training.mlp_tiles import tile_mlps
from scaled_rope.training.model import SummedLoss, build_model, enable_checkpointing
from scaled_rope.training.saving import check_save_dtype, save_model
from tests.helpers.models import Make
from tests.helpers.runs import ENVIRONMENT, LENGTH, weights
from tests.helpers.training_recipes import recipe, resolved_recipe


def test_the_checkpoint_loads_without_this_package_and_gives_the_same_logits(straight):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    program = (
        "import sys, torch, transformers\n"
        "sys.modules['scaled_rope'] = None\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "ids = torch.arange(2, 42)[None]\n"
        "torch.save(model(input_ids=ids).logits, sys.argv[2])\n"
    )
    saved = straight / "logits.pt"
    subprocess.run([sys.executable, "-c", program, str(straight / "model"), str(saved)], check=True, timeout=120,
                   capture_output=True, env=ENVIRONMENT)  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(straight / "model", dtype=torch.float32)
    assert model.config.rope_parameters["rope_type"] == "yarn" and model.config.rope_parameters["factor"] == 3.0
    assert model.config.max_position_embeddings == 48
    scaling = RopeScaling(method="yarn", factor=3.0, original_max_position_embeddings=16)
    patch_model(model, scaling)
    ours = model(input_ids=torch.arange(2, 42)[None]).logits
    # inv_freq may differ in the last bit (float64 rounded once against float32 arithmetic): 1e-7 rad over 40 positions
    torch.testing.assert_close(torch.load(saved), ours, rtol=1e-4, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    assert len(tokenizer) == 64
    assert tokenizer.model_max_length == 48, "where programs cut texts"


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


def test_buffers_are_not_rounded_when_a_model_is_saved(workspace, tmp_path):
    """DeepSeek's experts are chosen by scores plus a float32 buffer, whose steps are finer than bfloat16."""
    latent = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "q_lora_rank": None, "kv_lora_rank": 8}
    routed = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1}
    init = {"model_type": "deepseek_v3", **EXPERTS, **latent, **routed, "first_k_dense_replace": 0}
    init["num_key_value_heads"] = 2
    recipe = replace(
        resolved_recipe(workspace), model=None, init=init, tokenizer=str(workspace / "model"), scaling=None,
        precision="bf16", save_dtype=None,
    )  # fmt: skip
    model, _ = build_model(recipe)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    model.get_buffer(name).copy_(5 + torch.arange(4) * 0.01)
    save_model(model, model.state_dict(), recipe, tmp_path / "model", lambda folder: None, "a {{ template }}")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved[name].dtype == torch.float32 and torch.equal(saved[name], model.get_buffer(name))
    assert saved["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    assert AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.bfloat16  # what it is loaded in by default
    assert load_tokenizer(str(tmp_path / "model")).chat_template == "a {{ template }}"


def test_a_weight_that_the_saved_dtype_cannot_hold_is_named(workspace, tmp_path, capsys):
    recipe = replace(resolved_recipe(workspace), scaling=None, save_dtype="float16")
    model, _ = build_model(recipe)
    name = "model.layers.1.mlp.up_proj.weight"
    model.get_parameter(name).data[3, 2] = -7e4
    said = f"weight {name} has 70000, and the largest number of float16 is 65504"
    with pytest.raises(ConfigError, match=f"save_dtype = 'float16' is not allowed: {said}; save_dtype: float32"):
        check_save_dtype(model, recipe)
    check_save_dtype(model, replace(recipe, save_dtype="bfloat16"))
    # One that has grown in training is not worth losing the training for.
    save_model(model, model.state_dict(), recipe, tmp_path / "model", lambda folder: None)
    assert f"warning: save_dtype 'float16' was not used: {said}; saved in float32" in capsys.readouterr().err
    assert torch.equal(load_file(tmp_path / "model" / "model.safetensors")[name], model.get_parameter(name))
    assert AutoConfig.from_pretrained(tmp_path / "model").dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_lora_with_embeddings_and_norms_saves_them_in_model_and_adapter(workspace, tmp_path, tied):
    pytest.importorskip("peft")
    from scaled_rope.patching.loading import load_model

    base = workspace / ("tied" if tied else "model")
    arguments = [str(workspace / "recipe.yaml"), "--output-dir", str(tmp_path / "out"), "--model", str(base), "--lora",
                 "--lora-embeddings-and-norms", "--max-train-steps", "2"]  # fmt: skip
    assert finetune.main(arguments) == 0
    before, after = load_file(base / "model.safetensors"), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    # What the evaluators make of base and adapter is the merged model; merging rounds once, in float32.
    merged = load_model(str(tmp_path / "out" / "model"))
    adapted = load_model(str(base), scaling="yarn:3", adapter=str(tmp_path / "out" / "model" / "adapter"))
    ids = torch.arange(2, 42)[None]
    torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


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


def _gradients(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tiles", [2, 3, 7, 100])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiled_mlps_compute_the_same(tiny_model: Make, tokens: torch.Tensor, tiles: int, checkpointing: bool) -> None:
    model = tiny_model().train()
    loss, gradients = _gradients(model, tokens)
    sizes: list[int] = []
    for layer in model.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1]))
    if checkpointing:
        enable_checkpointing(model, recipe(gradient_checkpointing=True))
    with torch.device("meta"):  # the trial is made where the model is, whatever the default device is
        tile_mlps(model, tiles)
    sizes.clear()  # a trial of a few tokens
    tiled_loss, tiled = _gradients(model, tokens)
    assert max(sizes) == -(-tokens.shape[1] // tiles)  # which is what saves the memory
    assert tiled_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():  # float32 sums over tokens in another order
        torch.testing.assert_close(tiled[name], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        model.eval()
        assert torch.isfinite(model(tokens).logits).all()


def test_one_tile_changes_nothing(tiny_model: Make) -> None:
    model = tiny_model()
    tile_mlps(model, 1)
    assert all("forward" not in vars(layer.mlp) for layer in model.model.layers)


def test_experts_are_not_tiled() -> None:
    """A router that sees a stretch may send tokens elsewhere; where it returns its scores, that is no MLP at all."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        vocab_size=61, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"],
        pad_token_id=None,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="mlp_tiles 4 is not possible: GptOssMLP does not treat each token by itself"):
        tile_mlps(AutoModelForCausalLM.from_config(config), 4)


def test_layers_without_an_mlp_of_a_known_name(tiny_model: Make) -> None:
    model = tiny_model()
    for layer in model.model.layers:
        layer.other = layer.mlp
        del layer.mlp
    with pytest.raises(ConfigError, match="layers of llama have no MLP of a known name"):
        tile_mlps(model, 2)


def test_an_mlp_that_mixes_tokens_is_noticed(tiny_model: Make) -> None:
    class Mixing(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden.cumsum(dim=1))

    model = tiny_model()
    for layer in model.model.layers:
        layer.mlp = Mixing(layer.mlp)
    with pytest.raises(ConfigError, match="Mixing does not treat each token by itself"):
        tile_mlps(model, 2)
