"""Patching models: what changes, what does not, and that it can be undone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from scaled_rope import ConfigError, RopeScaling, compute_rope, patch_model, unpatch_model
from scaled_rope.patching.patch import patched_scaling
from scaled_rope.patching.rotary import ScaledRotaryEmbedding

FAMILIES = ["llama", "mistral"]
NATIVE = [
    "linear:4",
    "ntk:4",
    "ntk-by-parts:4",
    "yarn:4",
    "yarn:4,beta_fast=8,beta_slow=2,truncate=false",
    "llama3:4",
    "abf:4,theta=50000",
]
CUSTOM = [
    "yarn:4,ramp=rotations",
    "ntk:4,resonance=true",
    "cope",
    "dynamic-linear",
    "ntk:2,dynamic=true",
    "dynamic-ntk-by-parts",
    "dynamic-yarn:2",
]
# Logits reach 6. Two ways to compute the same float32 pass, or frequencies that differ in their last bits,
# move them by up to 1e-5 here; a scaling of 4 moves them by 5 and more.
SAME = 1e-4
CHANGED = 0.1


def logits(model, input_ids, **kwargs):
    with torch.no_grad():
        return model(input_ids, **kwargs).logits


def distance(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["default", *NATIVE, *CUSTOM])
def test_unpatched_is_bit_identical(tiny_model, tokens, family, spec):
    model = tiny_model(family)
    before, config = logits(model, tokens), copy.deepcopy(model.config.to_dict())
    rotary, names = model.model.rotary_emb, [name for name, _ in model.named_modules()]
    report = patch_model(model, spec)
    assert report.modules == ("model.rotary_emb",) and report.model_type == family and report.head_dim == 16
    assert patched_scaling(model) == report.scaling
    assert report.before == RopeScaling("default", original_max_position_embeddings=32)
    if spec == "default":
        assert distance(logits(model, tokens), before) < SAME
    else:
        assert distance(logits(model, tokens), before) > CHANGED
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before)
    assert model.config.to_dict() == config
    assert model.model.rotary_emb is rotary and [name for name, _ in model.named_modules()] == names
    assert not model.model._forward_pre_hooks and patched_scaling(model) is None
    with pytest.raises(ConfigError, match="not patched"):
        unpatch_model(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", ["default", *NATIVE])
def test_equals_a_vanilla_model_with_the_same_rope_parameters(tiny_model, tokens, family, spec):
    model = tiny_model(family)
    scaling = patch_model(model, spec).scaling
    settings = {"max_position_embeddings": 128, "rope_parameters": scaling.to_config(head_dim=16)}
    vanilla = tiny_model(family, **settings)
    assert type(vanilla.model.rotary_emb) is not ScaledRotaryEmbedding
    assert distance(logits(model, tokens), logits(vanilla, tokens)) < SAME
    assert model.config.rope_parameters == settings["rope_parameters"]
    assert model.config.max_position_embeddings == (32 if spec == "default" else 128)


def test_a_scaling_of_factor_one_changes_nothing(tiny_model, tokens):
    model = tiny_model()
    before = logits(model, tokens)
    for method in ("linear", "ntk", "ntk-by-parts", "yarn"):
        patch_model(model, f"{method}:1")
        assert distance(logits(model, tokens), before) < SAME


def test_patching_again_replaces_and_unpatch_restores_the_first_state(tiny_model, tokens):
    model = tiny_model()
    before, config = logits(model, tokens), copy.deepcopy(model.config.to_dict())
    first = patch_model(model, "yarn:8")
    second = patch_model(model, "dynamic-linear")
    assert second.before == first.scaling
    assert second.scaling.original_max_position_embeddings == 32  # relative to the model, not to the first patch
    assert model.config.max_position_embeddings == 32
    third = patch_model(model, "yarn:4")
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1  # no more than one patch needs
    fresh = tiny_model()
    patch_model(fresh, "yarn:4")
    assert torch.equal(logits(model, tokens), logits(fresh, tokens)) and third.attention_factor > 1
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before) and model.config.to_dict() == config


@pytest.mark.parametrize("spec", ["yarn:4", "dynamic-yarn"])
def test_a_second_model_is_untouched_even_with_the_same_config_object(tokens, tiny_model, spec):
    config = tiny_model().config
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    before, saved = logits(second, tokens), copy.deepcopy(config.to_dict())
    patch_model(first, spec)
    assert torch.equal(logits(second, tokens), before)
    assert second.config.to_dict() == saved and patched_scaling(second) is None
    for part in (first, first.model, first.model.layers[0].self_attn):
        assert part.config is first.config  # one config within the model, as before


def test_a_bare_base_model_keeps_its_config_in_step_with_an_enclosing_model(tiny_model, tokens):
    model, other = tiny_model(), tiny_model()
    assert patch_model(model.model, "yarn:4").modules == ("rotary_emb",)
    assert model.config is model.model.config and model.config.rope_parameters["rope_type"] == "yarn"
    patch_model(other, "yarn:4")
    assert torch.equal(logits(model, tokens), logits(other, tokens))
    unpatch_model(model)
    assert model.config.rope_parameters["rope_type"] == "default"


def test_a_wrapped_model(tiny_model, tokens):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = logits(model, tokens)
    report = patch_model(model, "yarn:4")
    assert report.modules == ("base_model.model.model.rotary_emb",)
    plain = tiny_model()
    patch_model(plain, "yarn:4")
    # A fresh LoRA adds zero.
    assert distance(logits(model, tokens), logits(plain, tokens)) < SAME
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.get_base_model().config is model.config
    assert "config" not in vars(model)  # the wrapper still looks it up rather than holding one of its own
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before)


def test_a_deep_copy_stays_patched_and_lives_by_itself(tiny_model, tokens):
    for spec in ("yarn:4", "dynamic-yarn"):
        model = tiny_model()
        before = logits(model, tokens)
        patch_model(model, spec)
        patched = logits(model, tokens)
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin, tokens), patched)
        unpatch_model(twin)
        assert torch.equal(logits(twin, tokens), before) and not twin.model._forward_pre_hooks
        assert torch.equal(logits(model, tokens), patched)
        assert model.config.rope_parameters != twin.config.rope_parameters
        unpatch_model(model)
        assert torch.equal(logits(model, tokens), before)


def test_the_state_dict_is_the_unpatched_one(tiny_model):
    model = tiny_model()
    keys = list(model.state_dict())
    patch_model(model, "dynamic-yarn")
    assert list(model.state_dict()) == keys and sum(1 for _ in model.model.rotary_emb.buffers()) == 0


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model, tokens):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        patch_model(model, "yarn:4")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain.abs().sum() > 0
        # Recomputation repeats the same operations.
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", NATIVE + ["yarn:4,ramp=rotations"])
def test_generation_with_a_cache_equals_generation_without(tiny_model, tokens, spec):
    model = tiny_model()
    patch_model(model, spec)
    runs = [
        model.generate(
            tokens[:, :30],
            max_new_tokens=12,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert distance(torch.stack(runs[0].logits), torch.stack(runs[1].logits)) < SAME


# ---- dynamic scaling ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["linear", "ntk", "ntk-by-parts", "yarn"])
def test_a_dynamic_pass_is_a_static_pass_at_that_length(tiny_model, tokens, family, method):
    model, static = tiny_model(family), tiny_model(family)
    patch_model(model, f"dynamic-{method}")
    short, long = tokens[:, :20], tokens
    first = logits(model, short)
    patch_model(static, "default")
    assert distance(first, logits(static, short)) < SAME  # within 32 positions nothing is scaled
    patch_model(static, f"{method}:1.5")
    assert distance(logits(model, long), logits(static, long)) < SAME  # 48 / 32
    assert torch.equal(logits(model, short), first)  # no memory of the longer pass


def test_neighbours_and_padding_do_not_change_a_row(tiny_model, tokens):
    model = tiny_model()
    patch_model(model, "dynamic-yarn")
    row, long = tokens[:1, :36], tokens[1:]  # 36 and 48 tokens: each has its own scale
    alone = logits(model, row)
    filler = torch.full((1, 12), 3)
    marks, blank = torch.ones_like(row), torch.zeros_like(filler)
    right = logits(
        model,
        torch.cat((torch.cat((row, filler), 1), long)),
        attention_mask=torch.cat((torch.cat((marks, blank), 1), torch.ones_like(long))),
    )
    assert distance(right[:1, :36], alone) < SAME
    assert distance(right[1:], logits(model, long)) < SAME
    left = logits(
        model,
        torch.cat((torch.cat((filler, row), 1), long)),
        attention_mask=torch.cat((torch.cat((blank, marks), 1), torch.ones_like(long))),
    )
    assert distance(left[:1, 12:], alone) < SAME
    assert distance(left[1:], logits(model, long)) < SAME
    # The scale follows the row's own positions, so the same tokens among longer ones must differ from this.
    assert distance(logits(model, torch.cat((row, filler), 1))[:, :36], alone) > CHANGED


def test_dynamic_generation_without_a_cache(tiny_model, tokens):
    model = tiny_model()
    patch_model(model, "dynamic-yarn")
    row = tokens[:1, :30]
    padded = torch.cat((torch.zeros(1, 6, dtype=torch.long), row), dim=1)
    mask = torch.cat((torch.zeros(1, 6, dtype=torch.long), torch.ones_like(row)), dim=1)
    wanted = row
    for _ in range(5):
        wanted = torch.cat((wanted, logits(model, wanted)[:, -1:].argmax(-1)), dim=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "use_cache": False}
    assert torch.equal(model.generate(row, **settings), wanted)
    assert torch.equal(model.generate(padded, attention_mask=mask, **settings)[:, 6:], wanted)


# ---- saving ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spec", NATIVE)
def test_a_saved_model_loads_in_vanilla_transformers(tiny_model, tokens, tmp_path, family, spec):
    model = tiny_model(family)
    scaling = patch_model(model, spec).scaling
    model.save_pretrained(tmp_path)
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(vanilla.model.rotary_emb) is not ScaledRotaryEmbedding
    assert distance(logits(vanilla.eval(), tokens), logits(model, tokens)) < SAME
    assert vanilla.config.max_position_embeddings == 128
    read = RopeScaling.from_config(vanilla.config)
    torch.testing.assert_close(compute_rope(read, 16)[0], compute_rope(scaling, 16)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", CUSTOM)
def test_vanilla_transformers_refuses_what_it_cannot_express(tiny_model, tmp_path, spec):
    model = tiny_model()
    scaling = patch_model(model, spec).scaling
    model.save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_type"] == "scaled-rope"
    if spec == "dynamic-linear":
        assert config.max_position_embeddings == 32
    assert RopeScaling.from_config(config) == scaling
    with pytest.raises(KeyError, match="scaled-rope"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ---- what is refused or remarked on ----


def test_a_model_without_a_rotary_module_is_refused_by_name():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=8, n_positions=8))
    for call in (
        lambda: patch_model(model, "yarn:4"),
        lambda: patch_model(model, RopeScaling("linear", 2.0)),
    ):
        with pytest.raises(
            ConfigError, match="architecture 'gpt2': has no rotary module, so there is nothing to scale"
        ):
            call()
    with pytest.raises(ConfigError, match="no model of transformers"):
        patch_model(torch.nn.Linear(2, 2), "yarn:4")


def test_a_refused_patch_changes_nothing(tiny_model, tokens):
    model = tiny_model()
    patch_model(model, "yarn:4")
    before, config = logits(model, tokens), copy.deepcopy(model.config.to_dict())
    for bad in ("yarm:4", "yarn:0.5", RopeScaling("linear", 2.0, partial_rotary_factor=0.5)):
        with pytest.raises(ConfigError):
            patch_model(model, bad)
    assert torch.equal(logits(model, tokens), before) and model.config.to_dict() == config


def test_what_is_no_scaling_and_what_is_no_model(tiny_model):
    for wrong in (8, 8.0, ["yarn:8"], {"full_attention": 8}):
        with pytest.raises(ConfigError, match="scaling=|layer types"):
            patch_model(tiny_model(), wrong)
    with pytest.raises(ConfigError, match="model of type str: must be a model of transformers"):
        patch_model("hello", "yarn:8")


@pytest.mark.parametrize("spec", ["yarn:4,attention_temperature=log", "dynamic-yarn:2", "rerope,window=8", "yarn:4"])
def test_a_pickle_keeps_the_patch_or_is_refused(spec, tiny_model, tokens):
    model = tiny_model()
    patch_model(model, spec, drop_layers=[0] if spec == "yarn:4" else [])
    wanted = logits(model, tokens)
    if spec == "yarn:4":
        assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tokens), wanted)
        return
    for save in (pickle.dumps, lambda whole: torch.save(whole, io.BytesIO())):
        with pytest.raises(ConfigError, match="cannot be pickled, it would lose that; use save_pretrained"):
            save(model)
    assert torch.equal(logits(copy.deepcopy(model), tokens), wanted)
    unpatch_model(model)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model)), tokens), logits(model, tokens))


def test_hooks_on_the_rotary_module_act_before_during_and_after(tiny_model, tokens):
    model = tiny_model()
    seen = []
    early = model.model.rotary_emb.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    model.model.rotary_emb.register_forward_pre_hook(lambda *_, **__: seen.append("pre"), with_kwargs=True)
    assert not [note for note in patch_model(model, "yarn:4").notes if "rotary_emb" in note]
    logits(model, tokens)
    assert seen == ["pre", "ScaledRotaryEmbedding"]
    patch_model(copy.deepcopy(model), "yarn:2")
    late = model.model.rotary_emb.register_forward_hook(lambda *_: seen.append("late"))
    patch_model(model, "dynamic-yarn")
    logits(model, tokens)
    assert seen[2:] == ["pre", "ScaledRotaryEmbedding", "late"]
    early.remove()
    unpatch_model(model)
    logits(model, tokens)
    assert seen[5:] == ["pre", "late"]
    late.remove()
    logits(model, tokens)
    assert seen[7:] == ["pre"]


def test_what_others_put_on_the_rotary_module_and_cannot_act_is_said(tiny_model):
    model = tiny_model()
    rotary = model.model.rotary_emb
    rotary.register_forward_hook(lambda *_: None)
    notes = patch_model(model, "yarn:4", kernel="torch").notes
    assert "hooks on rotary_emb see tables of another form while the model is patched" in notes
    unpatch_model(model)
    rotary.forward = rotary.forward
    notes = patch_model(model, "yarn:4").notes
    assert "rotary_emb has a forward of its own, which does not act while the model is patched" in notes
