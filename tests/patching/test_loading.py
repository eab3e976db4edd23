"""Loading checkpoints, reading scalings off the command line, and refusing what cannot be loaded."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from scaled_rope import RopeScaling, patch_model
from scaled_rope.checkpoint import load_config, load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.patching.adapter_scaling import save_adapter_scaling
from scaled_rope.patching.loading import apply_scaling, load_model
from scaled_rope.patching.patch import patched_plan, patched_scaling
from scaled_rope.scaling.frequencies import at_length
from tests.helpers import ROOT
from tests.helpers.checkpoints import (
    _truncate,
    adapter,  # noqa: F401
    checkpoint,  # noqa: F401
    logits,
    sliding,  # noqa: F401
)
from tests.helpers.models import Make

# ---------------------------------------------------------------------------------------------------------- loading


def test_loaded_model_is_the_saved_one(checkpoint: Path, tiny_model: Make, tokens: torch.Tensor) -> None:
    model = load_model(str(checkpoint), device="cpu", attn_implementation="eager")
    reference = tiny_model(attn_implementation="eager")
    assert not model.training
    assert torch.equal(logits(model, tokens), logits(reference, tokens))


@pytest.mark.parametrize("spec", ["yarn:4", "ntk:4", "dynamic-yarn"])
def test_scaling_argument_is_patch_model(checkpoint: Path, tiny_model: Make, tokens: torch.Tensor, spec: str) -> None:
    reference = tiny_model()
    patch_model(reference, spec)
    expected = logits(reference, tokens)
    assert torch.equal(logits(load_model(str(checkpoint), scaling=spec, device="cpu"), tokens), expected)
    assert not torch.allclose(expected, logits(tiny_model(), tokens), atol=1e-3)  # or the test could not fail


@pytest.mark.parametrize("spec", ["yarn:4", "linear:2", "dynamic-yarn:2", "yarn:4,ramp=rotations"])
def test_checkpoint_brings_its_own_scaling(tiny_model: Make, tmp_path: Path, tokens: torch.Tensor, spec: str) -> None:
    model = tiny_model()
    report = patch_model(model, spec)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu")
    # transformers rounds its frequencies in float32 and ours are rounded once from float64: about 1e-7 radians per
    # position, 48 positions, logits of order 1.
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=1e-4)
    if not report.scaling.is_native(report.head_dim):
        with pytest.raises(KeyError):
            AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "spec", ["yarn:4,mscale=0.7", "ntk:4", "ntk-by-parts:4", "abf:4,theta=5e4", "llama3:4", "cope"]
)
def test_the_record_comes_back_as_it_was(tiny_model: Make, tmp_path: Path, spec: str) -> None:
    model = tiny_model()
    scaling = patch_model(model, spec).scaling
    model.save_pretrained(tmp_path)
    assert RopeScaling.from_config(load_config(str(tmp_path))) == scaling
    again = load_model(str(tmp_path), device="cpu")
    assert RopeScaling.from_config(again.config) == scaling
    # A record that no longer fits what the rest of the config says does not count.
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    if "scaled_rope" in config:
        with pytest.warns(UserWarning, match="was changed since then"):
            assert RopeScaling.from_config(config).label == "linear x2"


def _edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_published_yarn_mistral_checkpoint_gets_its_own_constants(
    tiny_model: Make, tmp_path: Path, tokens: torch.Tensor
) -> None:
    tiny_model("mistral").save_pretrained(tmp_path)
    published = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "finetuned": True}
    code = {"AutoConfig": "configuration_mistral.MistralConfig", "AutoModelForCausalLM": "gone.MistralForCausalLM"}
    _edit_config(tmp_path, rope_parameters=None, rope_scaling=published, rope_theta=1e4, auto_map=code)
    with pytest.warns(UserWarning, match="beta_fast=128"):
        model = load_model(str(tmp_path), device="cpu")
    wanted = tiny_model("mistral")
    patch_model(wanted, "yarn:4,beta_fast=128,beta_slow=2,mscale=0.7")
    assert torch.equal(logits(model, tokens), logits(wanted, tokens))
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert (logits(vanilla, tokens) - logits(wanted, tokens)).abs().max() > 0.1  # Llama's constants


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_length_dependent_checkpoints_have_no_memory(
    tiny_model: Make, tmp_path: Path, tokens: torch.Tensor, rope_type: str
) -> None:
    extra = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 0.5 * i for i in range(8)]} if rope_type[0] == "l" else {}
    rope = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32, **extra}
    tiny_model(rope_parameters=rope, max_position_embeddings=32).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), device="cpu")
    short, long = tokens[:1, :20], tokens[:1]
    first = logits(model, short)
    grown = logits(model, long)
    assert torch.equal(logits(model, short), first)
    # A row's neighbours have no say either, in contrast to the module of transformers.
    with torch.inference_mode():
        mask = torch.ones(2, 48, dtype=torch.long)
        mask[0, 20:] = 0
        both = model(torch.cat((tokens[:1], tokens[:1])), attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(both[:1, :20], first, rtol=0, atol=1e-4)
    torch.testing.assert_close(both[1:], grown, rtol=0, atol=1e-4)
    for length in (20, 48):
        static = tiny_model()
        apply_scaling(static, at_length(RopeScaling.from_config(model.config), length))
        torch.testing.assert_close(
            logits(static, tokens[:1, :length]), first if length == 20 else grown, rtol=0, atol=1e-4
        )


def test_scaling_some_layers_only(sliding: Path, tmp_path: Path, tokens: torch.Tensor) -> None:
    name = str(sliding)
    results = [
        logits(load_model(name, device="cpu", **options), tokens)
        for options in (
            {},
            {"scaling": "yarn:4"},
            {"scaling": "yarn:4", "layers": "full_attention"},
            {"scaling": "yarn:4", "drop_layers": [1]},
            {"scaling": "yarn:4", "layers": "full_attention", "drop_layers": [1]},
        )
    ]
    for index, one in enumerate(results):
        for other in results[:index]:
            assert (one - other).abs().max() > 0.01
    model = load_model(name, device="cpu", scaling="yarn:4", layers="full_attention", drop_layers=[0])
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(KeyError, match="scaled-rope"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert patched_plan(again) == patched_plan(model) and patched_plan(again).drop_layers == (0,)
    # Another factor for the carried plan changes the full-attention layers only, and keeps what was dropped.
    apply_scaling(again, RopeScaling("yarn", 2.0, 32))
    assert patched_plan(again).layers["sliding_attention"].method == "default"
    assert patched_plan(again).layers["full_attention"].factor == 2 and patched_plan(again).drop_layers == (0,)


def test_half_precision_keeps_frequencies(checkpoint: Path) -> None:
    model = load_model(str(checkpoint), scaling="yarn:4", dtype="bf16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_arguments_of_other_types_are_refused(checkpoint: Path) -> None:  # noqa: F811
    assert load_model(checkpoint, device="cpu").config.model_type == "llama"  # a path is fine
    for name in (None, 3, b"x"):
        with pytest.raises(ConfigError, match="is not allowed; a folder or a hub name"):
            load_model(name)  # type: ignore[arg-type]
    for scaling in (3, {}, {"full_attention": "yarn:4"}):
        with pytest.raises(ConfigError, match="must be a RopeScaling or a text such as 'yarn:8'"):
            load_model(checkpoint, scaling=scaling)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="load_in_8bit with load_in_4bit is not allowed"):
        load_model(checkpoint, load_in_8bit=True, load_in_4bit=True)


def test_sliding_window_is_replaced(tiny_model: Make, tmp_path: Path, tokens: torch.Tensor) -> None:
    tiny_model("mistral", sliding_window=4).save_pretrained(tmp_path)
    wide = load_model(str(tmp_path), device="cpu", sliding_window=1000)
    whole = tiny_model("mistral")
    torch.testing.assert_close(logits(wide, tokens), logits(whole, tokens), rtol=0, atol=1e-5)
    narrow = load_model(str(tmp_path), device="cpu")
    assert not torch.allclose(logits(narrow, tokens), logits(whole, tokens), atol=1e-2)


def test_a_sliding_window_that_no_layer_has_is_refused(tiny_model: Make, tmp_path: Path, tokens: torch.Tensor) -> None:
    full = ["full_attention", "full_attention"]
    for name, settings in {"off": {"use_sliding_window": False}, "full": {"layer_types": full}}.items():
        tiny_model("qwen2", **{"layer_types": full, **settings}).save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match="sliding_window=8: no layer of this 'qwen2' model has a sliding window"):
            load_model(str(tmp_path / name), sliding_window=8)
    tiny_model("qwen2").save_pretrained(tmp_path / "some")
    plain, narrow = load_model(str(tmp_path / "some")), load_model(str(tmp_path / "some"), sliding_window=8)
    assert not torch.allclose(logits(narrow, tokens), logits(plain, tokens), atol=1e-2)


def test_apply_scaling_goes_anywhere_and_back(tiny_model: Make, tokens: torch.Tensor) -> None:
    model = tiny_model()
    own = RopeScaling.from_config(model.config)
    before = logits(model, tokens)
    for spec in ("yarn:4", "dynamic-linear", "yarn:4"):
        apply_scaling(model, RopeScaling.from_spec(spec, own))
        assert patched_scaling(model) == RopeScaling.from_spec(spec, own)
    apply_scaling(model, own)
    assert patched_scaling(model) is None
    assert torch.equal(logits(model, tokens), before)


def test_an_adapter_is_merged(checkpoint: Path, adapter: Path, tokens: torch.Tensor) -> None:  # noqa: F811
    plain, adapted = load_model(str(checkpoint)), load_model(str(checkpoint), adapter=str(adapter))
    assert not torch.allclose(logits(adapted, tokens), logits(plain, tokens), atol=1e-2)


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (
            lambda key: key.replace("model.layers", "model.blocks"),
            "does not fit this LlamaForCausalLM: it holds no .*layers.0.*; no module takes its .*blocks",
        ),
        (
            lambda key: key if "layers.1." not in key else None,
            "does not fit this LlamaForCausalLM: it holds no .*layers.1.*lora_A",
        ),
        (lambda key: key if "lm_head" not in key else None, "cannot be read: .*lm_head"),
        (
            lambda key: key.replace("q_proj", "o_proj") if "layers.1." in key else key,
            "does not fit this LlamaForCausalLM: it holds no .*layers.1.*; no module takes its .*o_proj",
        ),
    ],
    ids=["renamed", "one layer", "module that is saved whole", "another target"],
)
def test_an_adapter_that_does_not_fit_is_refused(checkpoint: Path, adapter: Path, rename: Any, says: str) -> None:  # noqa: F811
    file = adapter / "adapter_model.safetensors"
    kept = {new: value for key, value in load_file(file).items() if (new := rename(key)) is not None}
    save_file(kept, file)
    with pytest.raises(ConfigError, match=says) as error:
        load_model(str(checkpoint), adapter=str(adapter))
    assert "\n" not in str(error.value)


def test_an_adapter_brings_its_scaling(
    checkpoint: Path,  # noqa: F811
    adapter: Path,  # noqa: F811
    tiny_model: Make,
) -> None:
    model = tiny_model()
    patch_model(model, "yarn:4", drop_layers=[1])
    save_adapter_scaling(model, adapter)
    base = str(checkpoint)
    loaded = load_model(base, adapter=str(adapter))
    assert patched_scaling(loaded) == patched_scaling(model) and patched_plan(loaded) == patched_plan(model)
    other = load_model(base, adapter=str(adapter), scaling="yarn:2")
    assert patched_scaling(other).label == "yarn x2" and patched_plan(other) == patched_plan(model)
    (adapter / "scaled_rope.json").write_text('{"scaling": {"method": "yarm"}}')
    with pytest.raises(ConfigError, match="yarm"):
        load_model(base, adapter=str(adapter))
    (adapter / "scaled_rope.json").write_text("[]")
    with pytest.raises(ConfigError, match="its scaled_rope.json cannot be read"):
        load_model(base, adapter=str(adapter))
    with pytest.raises(ConfigError, match="holds no adapter_config.json"):
        save_adapter_scaling(model, checkpoint)


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaModel"])
def test_models_that_generate_no_text_are_named_and_read_as_the_page_says(kind: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(**sizes, vocab_size=61, max_position_embeddings=32, pad_token_id=0)
    model = getattr(transformers, kind)(config).eval()
    patch_model(model, "dynamic-yarn", drop_layers=[1])
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"is a {kind}, and load_model reads models for text generation; use {kind}"):
        load_model(str(tmp_path))
    page = (ROOT / "docs" / "models.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "build_unscaled" in block)
    names: dict[str, Any] = {"FOLDER": str(tmp_path), "LlamaForSequenceClassification": getattr(transformers, kind)}
    exec(textwrap.dedent(code), names)
    ids = torch.randint(1, 61, (1, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(ids)[0], model(ids)[0])
    assert patched_scaling(names["model"]) == patched_scaling(model)
    assert patched_plan(names["model"]) == patched_plan(model)


def test_unknown_architecture_can_be_read_but_not_scaled(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert load_model(str(tmp_path), device="cpu").config.model_type == "gpt2"
    with pytest.raises(ConfigError, match="'gpt2': has no rotary module, so there is nothing to scale"):
        load_model(str(tmp_path), scaling="yarn:4", device="cpu")
    # Nor is it believed to have what its config says.
    _edit_config(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32})
    with pytest.raises(ConfigError, match="'gpt2': has no rotary module, so there is nothing to scale"):
        load_model(str(tmp_path), device="cpu")


@pytest.mark.parametrize(("factor", "length"), [(1.0, 20), (1.0, 48), (2.0, 48), (2.0, 100)])
def test_at_length_is_what_dynamic_does(tiny_model: Make, factor: float, length: int) -> None:
    ids = torch.randint(1, 61, (1, length), generator=torch.Generator().manual_seed(0))
    scaling = RopeScaling("yarn", factor=factor, original_max_position_embeddings=32, dynamic=True)
    model = tiny_model()
    apply_scaling(model, scaling)
    dynamic = logits(model, ids)
    fixed = at_length(scaling, length)
    assert not fixed.dynamic and fixed.factor == max(factor, length / 32)
    apply_scaling(model, fixed)
    # The same frequencies to the last bit; only the order of a broadcast multiplication could differ.
    torch.testing.assert_close(logits(model, ids), dynamic, rtol=0, atol=1e-6)
    assert at_length(fixed, 1000) is fixed


# --------------------------------------------------------------------------------------------------------- bad input


def _break_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 4)


def _drop_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _add_bias(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _list_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')


def _set(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **fields}))

    return change


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read"),
        (_list_no_weights, "cannot be read: weight_map of model.safetensors.index.json is empty"),
        (_truncate, "cannot be read"),
        (_break_header, "cannot be read"),
        (_drop_weight, "missing keys"),
        (_add_bias, "unexpected keys"),
        (_set(model_type="no-such-family"), "cannot be read"),
        (_set(intermediate_size=64), "tiny"),
        (_set(model_type="gpt2", architectures=["GPT2LMHeadModel"]), "tiny"),
        (_set(rope_parameters={"rope_type": "no-such-type", "rope_theta": 1e4}), "rope_type"),
    ],
)
def test_damaged_checkpoint_is_one_line(checkpoint: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(checkpoint)
    with pytest.raises(ConfigError, match=says) as caught:
        load_model(str(checkpoint), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dtype": "float8"}, "bfloat16"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"attn_implementation": "flash"}, "known: auto, blockwise, eager, flash_attention_2"),
        ({"attn_implementation": "flash_attention_2", "device": "cpu"}, "flash_attention_2"),
        ({"scaling": "yam:4"}, "unknown method 'yam'"),
        ({"scaling": "yarn:0.5"}, "factor=0.5"),
        ({"scaling": "checkpoint:4"}, "carries no scaling"),
        ({"sliding_window": 8}, "sliding window"),
    ],
)
def test_bad_option_is_one_line(checkpoint: Path, options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_model(str(checkpoint), **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)


def test_missing_tokenizer_and_file_for_a_folder(checkpoint: Path) -> None:
    for attempt in (
        lambda: load_tokenizer(str(checkpoint)),
        lambda: load_model(str(checkpoint / "model.safetensors")),
        lambda: load_model(str(checkpoint / "no" / "such" / "place")),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(checkpoint: Path, tmp_path: Path, value: float) -> None:
    model = load_model(str(checkpoint))
    model.model.layers[1].mlp.down_proj.weight.data[2, 3] = value
    model.save_pretrained(tmp_path)
    said = "NaN or infinite: model.layers.1.mlp.down_proj.weight \\(1 of "
    with pytest.raises(ConfigError, match=said):
        load_model(str(tmp_path))
