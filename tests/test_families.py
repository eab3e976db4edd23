"""Every supported family: what transformers computes is what we compute, with every kind of scaling and layer plan."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from conftest import DETECTED, FAMILIES, LAYER_TYPES, PLAIN
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from scaled_rope import METHODS, ConfigError, RopeScaling, patch_model, unpatch_model
from scaled_rope.patching.families import ADAPTERS, adapter_of, detect_adapter, head_dim_of, layers_without_rope
from scaled_rope.patching.loading import load_model
from scaled_rope.patching.patch import computes, patched_plan, patched_scaling
from scaled_rope.patching.rotary import ScaledRotaryEmbedding
from scaled_rope.scaling.hf_config import SOFTMAX_MSCALE_FAMILIES
from scaled_rope.scaling.record import LayerPlan

Make = Callable[..., PreTrainedModel]

ALL = [*FAMILIES, *DETECTED]
NESTED = ["gemma3_text", "mellum", "olmo3"]
"""Families whose RoPE parameters are nested per layer type."""
SHARED = ["gemma2", "gpt_oss", "qwen2", "qwen3"]
"""Families with layers of two types that share one pair of tables."""
TYPED = [*NESTED, *SHARED]
WITHOUT_WORDS = {
    "mixtral": ("yarn", "longrope"),  # transformers fails on its empty head_dim
    "phi3": ("linear", "yarn"),
    "phimoe": ("linear", "yarn", "longrope"),
}
"""Methods that transformers rejects or gets wrong in a family, so that there is no vanilla model to compare with."""
REFUSALS = (KeyError, ValueError, StrictDataclassError)
"""What it raises when it finds a rope_type that it does not know."""

# Logits reach 12. transformers rounds its frequencies several times in float32, ours are rounded once, so angles of up
# to 48 radians differ by some 1e-5; these weights pass that on to logits without making it more than ten times larger.
# The methods move the same logits by 1 and more.
SAME = 2e-4
CHANGED = 0.3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers logs every rope_parameters key that it has no use for."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(verbosity)


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids, use_cache=False).logits


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def own_entry(model: PreTrainedModel) -> dict[str, Any]:
    """The RoPE parameters of an unpatched model's full-attention layers."""
    rope = model.config.rope_parameters
    return dict(rope.get("full_attention", rope))


def words(model: PreTrainedModel, method: str) -> dict[str, Any]:
    """What transformers calls a method, written by hand."""
    if method == "default":
        return {}
    if method == "linear":
        return {"rope_type": "linear", "factor": 4.0}
    more = {"rope_type": method, "factor": 4.0, "original_max_position_embeddings": 32}
    if method == "yarn":
        return more
    count = width(model) // 2
    return {**more, "short_factor": [1 + 0.1 * i for i in range(count)], "long_factor": [1.5 + i for i in range(count)]}


def record(model: PreTrainedModel, method: str) -> RopeScaling:
    """The same as a record."""
    own = own_entry(model)
    keys = ("short_factor", "long_factor")
    given = {key: value for key, value in words(model, method).items() if key != "rope_type"}
    params = {key: given.pop(key) for key in keys if key in given}
    given["original_max_position_embeddings"] = 32
    partial = own.get("partial_rotary_factor", 1.0)
    return RopeScaling(method, rope_theta=own["rope_theta"], partial_rotary_factor=partial, params=params, **given)


def vanilla_settings(model: PreTrainedModel, method: str) -> dict[str, Any]:
    """Config settings of an unpatched model that is to compute like `model` patched with `method`."""
    rope, entry = model.config.rope_parameters, {**own_entry(model), **words(model, method)}
    context = 32 if method == "default" else 128
    return {
        "rope_parameters": {**rope, "full_attention": entry} if "full_attention" in rope else entry,
        "max_position_embeddings": context,
    }


def width(model: PreTrainedModel) -> int:
    """D, the number of rotated dimensions, by the buffers of transformers."""
    rotary = model.base_model.rotary_emb
    return 2 * len(next(buffer for name, buffer in rotary.named_buffers() if name.endswith("inv_freq")))


class Reference(nn.Module):
    """Tables from given frequencies in float64, in the common layout or another one."""

    def __init__(self, frequencies: list[float] | Tensor, factor: float = 1.0, layout: str = "halves") -> None:
        super().__init__()
        self.frequencies = torch.as_tensor(frequencies, dtype=torch.float64)
        self.factor, self.layout = factor, layout

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * self.frequencies
        if self.layout == "halves":
            angles = torch.cat((angles, angles), dim=-1)
        elif self.layout == "interleaved":
            angles = torch.stack((angles, angles), dim=-1).flatten(-2)
        return (angles.cos() * self.factor).to(x.dtype), (angles.sin() * self.factor).to(x.dtype)


def reference_of(scaling: RopeScaling, dim: int, layout: str = "halves") -> Reference:
    """The oracle's tables for the methods that it knows."""
    theta, s, original = scaling.rope_theta, scaling.factor, scaling.original_max_position_embeddings
    if scaling.method == "default":
        return Reference(reference.unscaled(dim, theta), layout=layout)
    if scaling.method == "linear":
        return Reference(reference.linear(dim, theta, s), layout=layout)
    assert original is not None
    if scaling.method == "longrope":  # beyond L
        factor = math.sqrt(1 + math.log(s) / math.log(original))
        plain = reference.unscaled(dim, theta)
        return Reference([w / d for w, d in zip(plain, scaling.params["long_factor"], strict=True)], factor, layout)
    assert scaling.method == "yarn"
    frequencies = reference.by_parts_dimension(dim, theta, s, original)
    return Reference(frequencies, reference.attention_factor(s), layout)


def load(folder: Path) -> PreTrainedModel:
    """`load_model` of a saved model."""
    loaded: PreTrainedModel = load_model(str(folder), device="cpu")
    return loaded


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    base = model.base_model
    return base.h if hasattr(base, "h") else base.layers


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    return [
        next(child for child in layer.children() if "Attention" in type(child).__name__) for layer in layers_of(model)
    ]


def attention_tables(model: PreTrainedModel, input_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The (cos, sin) that each layer's attention gets."""
    seen: list[tuple[Tensor, Tensor]] = []

    def see(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["position_embeddings"])

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in attentions(model)]
    logits(model, input_ids)
    for hook in hooks:
        hook.remove()
    return seen


def force_tables(model: PreTrainedModel, tables: list[tuple[Tensor, Tensor]]) -> None:
    """Make each layer's attention of an unpatched model compute with the given tables."""
    for module, pair in zip(attentions(model), tables, strict=True):

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any], pair: Any = pair) -> Any:
            return args, {**kwargs, "position_embeddings": pair}

        module.register_forward_pre_hook(give, with_kwargs=True)


def gradients(model: PreTrainedModel, input_ids: Tensor, checkpointing: bool) -> list[Tensor | None]:
    model.train()
    if checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of its name in later versions
            model.gradient_checkpointing_enable()
    torch.manual_seed(0)  # some families have dropout by default
    model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def assert_same_gradients(make: Callable[[], PreTrainedModel], input_ids: Tensor) -> None:
    plain, recomputed = (gradients(make(), input_ids, checkpointing) for checkpointing in (False, True))
    assert sum(one is not None and bool(one.abs().sum() > 0) for one in plain) > len(plain) / 2
    for one, other in zip(plain, recomputed, strict=True):
        # Recomputation repeats the same operations; sums over experts may come in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# What is recognised


@pytest.mark.parametrize("family", ALL)
def test_detection_agrees_with_the_row_and_with_the_module(tiny_model: Make, family: str) -> None:
    model = tiny_model(family)
    rotary = model.base_model.rotary_emb
    detected = detect_adapter(model.config, rotary)
    assert detected is not None
    assert (family in ADAPTERS) == (family in FAMILIES)
    if family in ADAPTERS:
        row = ADAPTERS[family]
        for name in ("layout", "float32_tables", "per_layer_type"):
            assert getattr(detected, name) == getattr(row, name), name
    assert adapter_of(model.config, rotary) == ADAPTERS.get(family, detected)
    assert detected.per_layer_type == (family in NESTED)
    # By the tables themselves, in half precision: same dtype, shape and numbers as the module's.
    x, positions = torch.zeros(1, 1, 1, dtype=torch.bfloat16), torch.arange(40)[None]
    more = ("full_attention",) if detected.per_layer_type else ()
    theirs = rotary(x, positions, *more)
    patch_model(model, "default")
    ours = model.base_model.rotary_emb(x, positions, *more)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == (torch.float32 if detected.float32_tables else torch.bfloat16)
        # One unit of bfloat16 below 1 where the dtype is that; an angle of 40 to some float32 units where it is not.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if detected.float32_tables else 2**-8)


def test_detection_is_not_misled_by_an_earlier_longer_pass(tiny_model: Make, tokens: Tensor) -> None:
    for method in ("longrope", "dynamic"):
        rope = {**PLAIN, **words(tiny_model("granite"), "longrope"), "rope_type": method}
        if method == "dynamic":
            rope = {**PLAIN, "rope_type": "dynamic", "factor": 2.0}
        model = tiny_model("granite", rope_parameters=rope)
        fresh = detect_adapter(model.config, model.model.rotary_emb)
        assert fresh is not None
        before = model.model.rotary_emb.inv_freq.clone()
        logits(model, tokens)
        left_behind = model.model.rotary_emb.inv_freq.clone()
        assert not torch.equal(left_behind, before)  # the module has a memory
        assert detect_adapter(model.config, model.model.rotary_emb) == fresh
        assert torch.equal(model.model.rotary_emb.inv_freq, left_behind)  # and it knows nothing of the probe


TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
FOREIGN: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 1, "n_head": 2, "hidden_size": 16, "vocab_size": 61},  # ALiBi
    "gpt2": {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 61, "n_positions": 32},  # learned positions
    "llama4_text": {**TINY, "num_local_experts": 2, "intermediate_size_mlp": 48},  # one complex table
    "gemma4_text": {**TINY, "layer_types": LAYER_TYPES, "sliding_window": 64},  # heads of two sizes
    "qwen3_5_text": {**TINY, "layer_types": ["full_attention"] * 2},  # positions along three axes
    "recurrent_gemma": {**TINY, "lru_width": 32},  # a rotary module in each layer
}


@pytest.mark.parametrize("family", FOREIGN)
def test_what_is_not_recognised_is_refused_by_name(family: str) -> None:
    model = AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[family](**copy.deepcopy(FOREIGN[family])))
    for scaling in ("yarn:4", RopeScaling("linear", 2.0)):
        with pytest.raises(ConfigError, match=f"unknown architecture '{family}'.*known: .*llama") as caught:
            patch_model(model, scaling)
        assert "\n" not in str(caught.value)
    assert not any(isinstance(module, ScaledRotaryEmbedding) for module in model.modules())


def test_multimodal_rotary_is_refused_with_and_without_its_key() -> None:
    for rope in (PLAIN, {**PLAIN, "mrope_section": [3, 3, 2]}):
        config = transformers.Qwen3VLTextConfig(**TINY, rope_parameters=dict(rope))
        model = transformers.Qwen3VLTextModel(config)
        with pytest.raises(ConfigError, match="unknown architecture 'qwen3_vl_text'"):
            patch_model(model, "yarn:4")


def test_falcon_with_alibi_is_refused(tiny_model: Make) -> None:
    with pytest.raises(ConfigError, match="'falcon' with alibi=true uses no rotary embedding"):
        patch_model(tiny_model("falcon", alibi=True), "yarn:4")


def test_two_models_in_one_are_refused(tiny_model: Make) -> None:
    pair = nn.ModuleList([tiny_model("llama"), tiny_model("gemma")])
    with pytest.raises(ConfigError, match=r"several models with RoPE \(llama, gemma\)"):
        patch_model(pair, "yarn:4")


# What is computed


@pytest.mark.parametrize("method", ["default", "linear", "yarn", "longrope"])
@pytest.mark.parametrize("family", ALL)
def test_equals_vanilla_transformers(tiny_model: Make, tokens: Tensor, family: str, method: str) -> None:
    model = tiny_model(family)
    before, dim = logits(model, tokens), width(model)
    report = patch_model(model, record(model, method) if method == "longrope" else f"{method}:4".replace("t:4", "t"))
    assert report.scaling == record(tiny_model(family), method) and report.model_type == family
    after = logits(model, tokens)
    assert (distance(after, before) > CHANGED) == (method != "default")
    short = tokens[:, :20]
    if method not in WITHOUT_WORDS.get(family, ()):
        vanilla = tiny_model(family, **vanilla_settings(tiny_model(family), method))
        assert not isinstance(vanilla.base_model.rotary_emb, ScaledRotaryEmbedding) and report.native
        assert distance(logits(vanilla, tokens), after) < SAME
        assert distance(logits(vanilla, short), logits(model, short)) < SAME
    else:
        exact = tiny_model(family)
        exact.base_model.rotary_emb = reference_of(report.scaling, dim)
        assert distance(logits(exact, tokens), after) < SAME and not report.native


@pytest.mark.parametrize("family", ALL)
def test_unpatching_is_bit_identical_and_other_models_are_untouched(
    tiny_model: Make, tokens: Tensor, family: str
) -> None:
    model, other = tiny_model(family), tiny_model(family, seed=1)
    before, others = logits(model, tokens), logits(other, tokens)
    config, other_config = copy.deepcopy(model.config.to_dict()), copy.deepcopy(other.config.to_dict())
    rotary, modules, config_class = model.base_model.rotary_emb, list(model.named_modules()), type(model.config)
    for spec in ("yarn:4", "dynamic-yarn", "ntk:4"):
        patch_model(model, spec, drop_layers=[1] if spec == "ntk:4" else ())
        assert distance(logits(model, tokens), before) > CHANGED
        assert torch.equal(logits(other, tokens), others)
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before)
    assert model.config.to_dict() == config and other.config.to_dict() == other_config
    assert type(model.config) is config_class
    assert model.base_model.rotary_emb is rotary and list(model.named_modules()) == modules
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert patched_scaling(model) is None and patched_plan(model) == LayerPlan()


@pytest.mark.parametrize("family", ALL)
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: Make, tokens: Tensor, family: str) -> None:
    def make() -> PreTrainedModel:
        model = tiny_model(family)
        patch_model(model, "yarn:4")
        return model

    assert_same_gradients(make, tokens)


@pytest.mark.parametrize("family", ALL)
def test_generation_with_a_cache_equals_generation_without(tiny_model: Make, tokens: Tensor, family: str) -> None:
    # From 28 to 36 tokens, past the 32 that the model is for; there Phi-3 throws its cache away once, which costs a
    # pass over everything and changes no static result.
    model = tiny_model(family)
    patch_model(model, "yarn:4")
    settings = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(tokens[:, :28], use_cache=use, **settings) for use in (True, False))
    assert cached.sequences.shape == (2, 36) and torch.equal(cached.sequences, plain.sequences)
    assert distance(torch.stack(cached.logits), torch.stack(plain.logits)) < SAME


@pytest.mark.parametrize("family", ALL)
def test_a_dynamic_pass_is_a_static_pass_at_that_length(tiny_model: Make, tokens: Tensor, family: str) -> None:
    model, static = tiny_model(family), tiny_model(family)
    before = logits(model, tokens)
    patch_model(model, "dynamic-yarn")
    patch_model(static, "yarn:1.5")  # 48 / 32
    assert distance(logits(model, tokens), logits(static, tokens)) < SAME
    assert distance(logits(model, tokens), before) > CHANGED
    unpatch_model(static)
    short = tokens[:, :20]
    assert distance(logits(model, short), logits(static, short)) < SAME


def test_longrope_in_phi3_generates_with_a_cache(tiny_model: Make, tokens: Tensor) -> None:
    # Its own generation drops the cache where longrope switches, at 32 tokens; one layer then equals a whole pass.
    model = tiny_model("phi3", num_hidden_layers=1)
    patch_model(model, record(model, "longrope"))
    settings = {"max_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(tokens[:, :28], use_cache=use, **settings) for use in (True, False))
    assert cached.shape == (2, 36) and torch.equal(cached, plain)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_oss", "olmo3"])
def test_half_precision_is_as_close_as_that_of_transformers(
    tiny_model: Make, tokens: Tensor, tmp_path: Path, family: str
) -> None:
    model = tiny_model(family)
    patch_model(model, "yarn:4")
    exact = logits(model, tokens)
    model.save_pretrained(tmp_path)
    ours = logits(model.bfloat16(), tokens).float()
    # `from_pretrained` keeps the frequencies of transformers in float32, as ours are in any case.
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval(), tokens).float()
    noise = (theirs - exact).abs().mean()
    assert 0 < noise < 1
    assert (ours - exact).abs().mean() < 1.5 * noise  # two samples of the same rounding
    assert (ours - theirs).abs().mean() < noise  # and mostly the same roundings


@pytest.mark.parametrize("family", ["cohere", "gemma3_text"])
def test_traced_models_compute_the_same(tiny_model: Make, tokens: Tensor, family: str) -> None:
    # "aot_eager" makes the whole graph and leaves out the slow part, the code for it.
    torch._dynamo.reset()
    model = tiny_model(family)
    patch_model(model, "yarn:4")
    assert distance(logits(torch.compile(model, backend="aot_eager"), tokens), logits(model, tokens)) < SAME


def test_a_traced_model_follows_a_new_patch(tiny_model: Make, tokens: Tensor) -> None:
    # By the hooks of layers, by that of dynamic passes, and by neither.
    torch._dynamo.reset()
    model = tiny_model("qwen3")
    compiled = torch.compile(model, backend="eager")
    for spec in ({"full_attention": "yarn:4"}, "dynamic-yarn", "linear:4"):
        before = logits(compiled, tokens)
        patch_model(model, spec)
        assert distance(logits(compiled, tokens), logits(model, tokens)) < SAME
        assert distance(logits(compiled, tokens), before) > CHANGED


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_model_computes_the_same(tiny_model: Make, tokens: Tensor) -> None:
    # One layer, because compiling takes many seconds.
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1)
    patch_model(model, "yarn:4")
    wanted = logits(model, tokens)
    assert distance(logits(torch.compile(model), tokens), wanted) < SAME


# Every method


def _ramp(low: float, high: float, count: int) -> list[float]:
    return [min(max((d - low) / (high - low), 0.0), 1.0) for d in range(count)]


def _part_ntk(dim: int, theta: float, s: float, original: int) -> list[float]:
    """The released code's first by-parts class: linear to NTK over 0.75 to 1.25 rotations, then kept over 2 to 16."""

    def index(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    plain, slow, middle = reference.unscaled(dim, theta), reference.linear(dim, theta, s), reference.ntk(dim, theta, s)
    result = list(slow)
    for upper, fast, few in ((middle, 1.25, 0.75), (plain, 16, 2)):
        low, high = max(math.floor(index(fast)), 0), min(math.ceil(index(few)), dim - 1)
        kept = [1 - share for share in _ramp(low, high, dim // 2)]
        result = [a * (1 - share) + b * share for a, b, share in zip(result, upper, kept, strict=True)]
    return result


PLAIN_16 = reference.unscaled(16, 1e4)
SHORT, LONG = [1 + 0.1 * i for i in range(8)], [2.0 + i for i in range(8)]
_YARN = reference.by_parts_dimension(16, 1e4, 4, 32)
BY_METHOD: dict[str, tuple[str, list[float], float]] = {
    # method: (spec, frequencies for 48 tokens of a model with L = 32 and D = 16, attention factor)
    "default": ("default", PLAIN_16, 1.0),
    "linear": ("linear:4", reference.linear(16, 1e4, 4), 1.0),
    "ntk": ("ntk:4", reference.ntk(16, 1e4, 4), 1.0),
    "ntk-by-parts": ("ntk-by-parts:4", _YARN, 1.0),
    "yarn": ("yarn:4", _YARN, reference.attention_factor(4)),
    "part-ntk": ("part-ntk:4", _part_ntk(16, 1e4, 4, 32), 1.0),
    "abf": ("abf:4,theta=500000", reference.unscaled(16, 5e5), 1.0),
    "ntk-mixed": ("ntk-mixed:4", [w * 4 ** -(((m + 1) / 8) ** 0.625) for m, w in enumerate(PLAIN_16)], 1.0),
    "proportional": ("proportional:2,fraction=0.5", [w / 2 if d < 4 else 0.0 for d, w in enumerate(PLAIN_16)], 1.0),
    "cope": (
        "cope,clip=3",
        [w * (1.0, 0.5, 0.0)[d - 5] if d >= 5 else w for d, w in enumerate(PLAIN_16)],
        1.0,
    ),
    "hardclip": ("hardclip:4,clip=6", [w if d < 2 else 0.0 for d, w in enumerate(PLAIN_16)], 1.0),
    # 2·48/32 - 1 = 2 for s.
    "dynamic-ntk": ("dynamic-ntk:2", reference.ntk(16, 1e4, 2), 1.0),
    "longrope": (
        f"longrope:4,short_factor={'+'.join(map(str, SHORT))},long_factor={'+'.join(map(str, LONG))}",
        [w / divisor for w, divisor in zip(PLAIN_16, LONG, strict=True)],
        math.sqrt(1 + math.log(4) / math.log(32)),
    ),
}
"""Methods whose formula the oracle has, or that is plain enough to be said in a line."""
BY_TRANSFORMERS = {"llama3": ("llama3:4", {"low_freq_factor": 1.0, "high_freq_factor": 4.0})}


def test_every_method_has_a_reference() -> None:
    assert {n for n, row in METHODS.items() if row.kind == "frequency"} == set(BY_METHOD) | set(BY_TRANSFORMERS)


@pytest.mark.parametrize("method", BY_METHOD)
def test_every_method_reaches_attention(tiny_model: Make, tokens: Tensor, method: str) -> None:
    spec, frequencies, factor = BY_METHOD[method]
    model, exact = tiny_model(), tiny_model()
    before = logits(model, tokens)
    patch_model(model, spec)
    exact.model.rotary_emb = Reference(frequencies, factor)
    assert distance(logits(model, tokens), logits(exact, tokens)) < SAME
    assert (distance(logits(model, tokens), before) > CHANGED) == (method != "default")


@pytest.mark.parametrize("method", BY_TRANSFORMERS)
def test_methods_of_transformers(tiny_model: Make, tokens: Tensor, method: str) -> None:
    spec, options = BY_TRANSFORMERS[method]
    model = tiny_model()
    before = logits(model, tokens)
    patch_model(model, spec)
    rope = {**PLAIN, "rope_type": method, "factor": 4.0, "original_max_position_embeddings": 32, **options}
    assert distance(logits(model, tokens), logits(tiny_model(rope_parameters=rope), tokens)) < SAME
    assert distance(logits(model, tokens), before) > CHANGED


@pytest.mark.parametrize("method", sorted(name for name, row in METHODS.items() if not row.no_dynamic))
def test_dynamic_forms_are_the_static_form_at_that_length(tiny_model: Make, tokens: Tensor, method: str) -> None:
    model, static = tiny_model(), tiny_model()
    plain = logits(model, tokens)
    own = RopeScaling.from_config(model.config)
    fields = {"original_max_position_embeddings": 32, "rope_theta": own.rope_theta}
    patch_model(model, RopeScaling(method, dynamic=True, **fields))
    patch_model(static, RopeScaling(method, 1.5, **fields))
    assert distance(logits(model, tokens), logits(static, tokens)) < SAME
    assert distance(logits(model, tokens), plain) > CHANGED


# Saving and loading


@pytest.mark.parametrize("spec", ["yarn:4", "ntk:4", "yarn:4,ramp=rotations", "dynamic-yarn:2"])
@pytest.mark.parametrize("family", ALL)
def test_a_saved_model_carries_its_scaling(
    tiny_model: Make, tokens: Tensor, tmp_path: Path, family: str, spec: str
) -> None:
    model = tiny_model(family)
    report = patch_model(model, spec)
    wanted = logits(model, tokens)
    model.save_pretrained(tmp_path)
    assert report.native == (spec in ("yarn:4", "ntk:4") and not (family in WITHOUT_WORDS and spec == "yarn:4"))
    raw = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    for config in (raw, model.config):
        assert RopeScaling.from_config(config) == report.scaling
        assert LayerPlan.from_config(config) == report.plan
    loaded = load(tmp_path)
    assert distance(logits(loaded, tokens), wanted) < SAME
    assert RopeScaling.from_config(loaded.config) == report.scaling
    if report.native:
        vanilla = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert distance(logits(vanilla, tokens), wanted) < SAME
    else:
        with pytest.raises(REFUSALS, match="rope"):
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


def assert_vanilla_is_right_or_refuses(model: PreTrainedModel, native: bool, tokens: Tensor, folder: Path) -> None:
    wanted = logits(model, tokens)
    model.save_pretrained(folder)
    assert distance(logits(load(folder), tokens), wanted) < SAME
    if native:
        vanilla = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert distance(logits(vanilla, tokens), wanted) < SAME
    else:
        with pytest.raises(REFUSALS, match="rope"):
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_whole_head_stays_whole_in_families_that_rotate_a_part(
    tiny_model: Make, tokens: Tensor, tmp_path: Path
) -> None:
    # A config that leaves the share out would mean a quarter.
    for spec, native in (("yarn:4", True), ("yarn:4,ramp=rotations", False)):
        model = tiny_model("gpt_neox", rope_parameters={**PLAIN, "partial_rotary_factor": 1.0})
        assert width(model) == 32
        assert patch_model(model, spec).native == native
        assert_vanilla_is_right_or_refuses(model, native, tokens, tmp_path / str(native))


def test_lengths_that_transformers_would_replace_are_not_left_to_it(
    tiny_model: Make, tokens: Tensor, tmp_path: Path
) -> None:
    # Phi-3 takes L from the config's top level, rope_type "dynamic" from max_position_embeddings.
    phi = tiny_model("phi3")
    scaling = RopeScaling.from_dict({**record(phi, "longrope").to_dict(), "original_max_position_embeddings": 40})
    ntk = RopeScaling("dynamic-ntk", 2.0, 24)
    for name, model, given in (("phi3", phi, scaling), ("llama", tiny_model(), ntk)):
        report = patch_model(model, given)
        assert not report.native
        assert_vanilla_is_right_or_refuses(model, report.native, tokens, tmp_path / name)
        assert RopeScaling.from_config(model.config) == given
    model = tiny_model()
    assert patch_model(model, "dynamic-ntk:2").native
    assert_vanilla_is_right_or_refuses(model, True, tokens, tmp_path / "native")


# Layers


def tables_of(scaling: RopeScaling, model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What `ScaledRotaryEmbedding` gives for a text, in the layout of an unpatched model's family."""
    adapter = adapter_of(model.config, model.base_model.rotary_emb)
    rotary = ScaledRotaryEmbedding(scaling, head_dim_of(model.config), layout=adapter.layout)
    return rotary(torch.zeros(1), torch.arange(tokens.shape[1])[None])


def assert_tables(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        # The same operations; at most the order of a broadcast multiplication could differ.
        torch.testing.assert_close(one, other.expand_as(one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TYPED)
def test_layer_types_are_scaled_apart(tiny_model: Make, tokens: Tensor, family: str) -> None:
    model, untouched = tiny_model(family), tiny_model(family)
    before, first = logits(model, tokens), attention_tables(model, tokens)
    own = {name: RopeScaling.from_config(model.config, name if family in NESTED else None) for name in set(LAYER_TYPES)}
    plans: list[dict[str, str | None]] = [
        {"full_attention": "yarn:4", "sliding_attention": None},
        {"full_attention": "yarn:4", "sliding_attention": "linear:2"},
        {"sliding_attention": "linear:2"},
    ]
    for plan in plans:
        report = patch_model(model, plan)
        scalings = {
            name: RopeScaling.from_spec(plan.get(name) or "default", own[name]) for name in ("full_attention", *plan)
        }
        assert report.plan.layers == {name: scalings.get(name, own[name]) for name in LAYER_TYPES}
        assert report.scaling == scalings["full_attention"]
        assert report.native == (family in NESTED)
        tables = attention_tables(model, tokens)
        exact = tiny_model(family)
        layout = adapter_of(exact.config, exact.base_model.rotary_emb).layout
        forced = []
        for index, kind in enumerate(LAYER_TYPES):
            wanted = report.plan.layers[kind]
            assert_tables(tables[index], tables_of(wanted, untouched, tokens))
            unchanged = distance(tables[index][0], first[index][0]) < 1e-4  # angles to some float32 units
            assert unchanged == (plan.get(kind) is None)
            rotary = reference_of(wanted, width(untouched), layout)
            forced.append(rotary(torch.zeros(1), torch.arange(48).expand(2, -1)))
        force_tables(exact, forced)
        assert distance(logits(exact, tokens), logits(model, tokens)) < SAME
        patch_model(model, "default") if family in SHARED else patch_model(model, {})
        assert distance(logits(model, tokens), before) < SAME
    patch_model(model, plans[0])
    twin = copy.deepcopy(model)
    patched = logits(model, tokens)
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before) and not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(twin, tokens), patched)
    unpatch_model(twin)
    assert torch.equal(logits(twin, tokens), before) and not any(m._forward_pre_hooks for m in twin.modules())


@pytest.mark.parametrize("family", NESTED)
def test_one_scaling_leaves_sliding_layers_alone_where_types_are_told_apart(
    tiny_model: Make, tokens: Tensor, family: str
) -> None:
    model, explicit = tiny_model(family), tiny_model(family)
    first = attention_tables(model, tokens)
    report = patch_model(model, "yarn:4")
    patch_model(explicit, {"full_attention": "yarn:4", "sliding_attention": None})
    assert torch.equal(logits(model, tokens), logits(explicit, tokens)) and model.config == explicit.config
    sliding, full = attention_tables(model, tokens)
    assert distance(sliding[0], first[0][0]) < 1e-4 and distance(full[0], first[1][0]) > 0.1
    assert report.plan.layers["sliding_attention"].method == "default" and report.scaling.method == "yarn"


@pytest.mark.parametrize("family", ALL)
def test_dropped_layers_rotate_nothing(tiny_model: Make, tokens: Tensor, family: str) -> None:
    model, exact = tiny_model(family), tiny_model(family)
    before, first = logits(model, tokens), attention_tables(model, tokens)
    report = patch_model(model, "yarn:4", drop_layers=[0])
    assert report.plan.drop_layers == (0,) and not report.native
    (cos, sin), second = attention_tables(model, tokens)
    assert bool((cos == 1).all()) and bool((sin == 0).all())
    assert cos.shape == first[0][0].shape and cos.dtype == first[0][0].dtype
    assert_tables(second, tables_of(report.scaling, exact, tokens))
    adapter = adapter_of(exact.config, exact.base_model.rotary_emb)
    table = reference_of(report.scaling, width(exact), adapter.layout)(torch.zeros(1), torch.arange(48).expand(2, -1))
    force_tables(exact, [(torch.ones_like(table[0]), torch.zeros_like(table[1])), table])
    assert distance(logits(exact, tokens), logits(model, tokens)) < SAME
    assert distance(logits(model, tokens), before) > CHANGED


def test_layers_that_do_not_exist_are_refused(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    before = logits(model, tokens)
    for wrong in ([2], [-1], [0, 9]):
        with pytest.raises(ConfigError, match="drop_layers=.*0 to 1"):
            patch_model(model, "yarn:4", drop_layers=wrong)
    with pytest.raises(ConfigError, match="no layer types"):
        patch_model(model, {"full_attention": "yarn:4"})
    with pytest.raises(ConfigError, match="unknown layer type 'global'"):
        patch_model(tiny_model("gemma3_text"), {"global": "yarn:4"})
    assert torch.equal(logits(model, tokens), before)


def test_layer_types_without_rotary_embedding_cannot_be_scaled(tiny_model: Make, tokens: Tensor) -> None:
    model, whole = tiny_model("cohere2"), tiny_model("cohere2")
    with pytest.raises(ConfigError, match="layer type 'full_attention': .*no rotary embedding"):
        patch_model(model, {"full_attention": "yarn:4"})
    report = patch_model(model, {"sliding_attention": "yarn:4", "full_attention": None})
    patch_model(whole, "yarn:4")
    assert torch.equal(logits(model, tokens), logits(whole, tokens))
    assert report.scaling.method == "yarn" and report.native and report.plan == LayerPlan()


PLANS: list[tuple[str, Any, list[int]]] = [
    *((family, {"full_attention": "yarn:4", "sliding_attention": None}, []) for family in TYPED),
    ("gemma3_text", {"full_attention": "yarn:4,ramp=rotations", "sliding_attention": "linear:2"}, []),
    ("gemma3_text", {"full_attention": "yarn:4,truncate=false"}, []),
    ("gemma3_text", {"full_attention": "yarn:4"}, [0]),
    ("olmo3", {"full_attention": "dynamic-yarn"}, []),
    ("qwen3", {"full_attention": "dynamic-yarn", "sliding_attention": "linear:2"}, [1]),
    ("gpt_oss", {"full_attention": "yarn:4"}, [0]),
    ("llama", "yarn:4", [1]),
    ("falcon", "yarn:4", [0]),
    ("gpt_neox", "yarn:4,ramp=rotations", [0]),
    ("phi3", "yarn:4", [0]),
]


@pytest.mark.filterwarnings("error::UserWarning")  # nothing that we wrote ourselves is remarked on
@pytest.mark.parametrize(("family", "scaling", "dropped"), PLANS)
def test_a_saved_plan_is_loaded(
    tiny_model: Make, tokens: Tensor, tmp_path: Path, family: str, scaling: Any, dropped: list[int]
) -> None:
    model = tiny_model(family)
    report = patch_model(model, scaling, drop_layers=dropped)
    wanted = logits(model, tokens)
    unscaled = logits(tiny_model(family), tokens)
    assert distance(wanted, unscaled) > CHANGED
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert distance(logits(loaded, tokens), wanted) < SAME
    raw = transformers.PreTrainedConfig.get_config_dict(tmp_path)[0]
    for config in (raw, loaded.config):
        assert LayerPlan.from_config(config) == report.plan
        assert RopeScaling.from_config(config) == report.scaling
    if patched_scaling(loaded) is not None:
        assert patched_plan(loaded) == report.plan
        unpatch_model(loaded)
    if report.native:
        vanilla = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert distance(logits(vanilla, tokens), wanted) < SAME
    else:
        with pytest.raises(REFUSALS, match="rope"):
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize(("family", "scaling", "dropped"), PLANS)
def test_plans_under_gradient_checkpointing(
    tiny_model: Make, tokens: Tensor, family: str, scaling: Any, dropped: list[int]
) -> None:
    def make() -> PreTrainedModel:
        model = tiny_model(family)
        patch_model(model, scaling, drop_layers=dropped)
        return model

    assert_same_gradients(make, tokens)


# A text model inside a multimodal one


@pytest.fixture
def multimodal() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {**TINY, "query_pre_attn_scalar": 16, "layer_types": LAYER_TYPES, "sliding_window": 64}
    config = transformers.Gemma3Config(
        text_config={**text, "initializer_range": 0.3},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("spec", ["yarn:4", "yarn:4,ramp=rotations"])
def test_a_multimodal_model_is_patched_in_its_text_part(
    multimodal: PreTrainedModel, tokens: Tensor, tmp_path: Path, spec: str
) -> None:
    ids = tokens.clamp(max=57)
    model, other = multimodal, copy.deepcopy(multimodal)
    before, config = logits(model, ids), copy.deepcopy(model.config.to_dict())
    report = patch_model(model, spec)
    assert report.modules == ("model.language_model.rotary_emb",) and report.model_type == "gemma3_text"
    wanted = logits(model, ids)
    assert distance(wanted, before) > CHANGED and torch.equal(logits(other, ids), before)
    assert model.config.text_config is model.model.language_model.config
    unpatch_model(model)
    assert torch.equal(logits(model, ids), before) and model.config.to_dict() == config
    patch_model(model, spec)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert distance(logits(loaded, ids), wanted) < SAME
    assert RopeScaling.from_config(loaded.config) == report.scaling
    if report.native:
        vanilla = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert distance(logits(vanilla, ids), wanted) < SAME
    else:
        with pytest.raises(KeyError, match="scaled-rope"):
            type(model).from_pretrained(tmp_path, dtype=torch.float32)


# Whether an unpatched model computes what its config says


@pytest.mark.parametrize("family", ALL)
def test_computes_goes_by_what_is_computed(tiny_model: Make, tokens: Tensor, family: str) -> None:
    plain = tiny_model(family)
    own = record(plain, "default")
    for method in ("default", "linear", "yarn"):
        if method in WITHOUT_WORDS.get(family, ()):
            continue
        scaling = record(plain, method)
        vanilla = tiny_model(family, **vanilla_settings(plain, method))
        assert computes(vanilla, scaling)
        assert computes(vanilla, own) == (method == "default")
        assert not computes(vanilla, record(plain, "longrope"))  # of the text at hand it knows nothing
    # The trap: a config that is changed after loading changes nothing.
    if family == "phimoe":
        return  # its rotary module reads its config in every pass
    before = logits(plain, tokens)
    for name, value in vanilla_settings(plain, "yarn").items():
        setattr(plain.config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Mistral's constants
        assert RopeScaling.from_config(plain.config) == record(plain, "yarn")
    assert torch.equal(logits(plain, tokens), before)
    assert computes(plain, own) and not computes(plain, record(plain, "yarn"))


def test_gpt_oss_computes_the_yarn_of_its_family(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model("gpt_oss", rope_parameters=None, max_position_embeddings=4096)
    own = RopeScaling.from_config(model.config)
    assert (own.method, own.factor, own.truncate, own.rope_theta) == ("yarn", 32.0, False, 1.5e5)
    before = logits(model, tokens)
    assert computes(model, own)
    report = patch_model(model, own)
    assert report.native and distance(logits(model, tokens), before) < SAME
    patch_model(model, "default")
    assert distance(logits(model, tokens), before) > CHANGED


@pytest.mark.parametrize("family", ["afmoe", "cohere2", "exaone4", "exaone_moe", "smollm3"])
def test_layers_without_rope_stay_so_and_are_told(tiny_model: Make, tokens: Tensor, family: str) -> None:
    # Their attention ignores its tables, so other tables in the second layer change nothing.
    model, exact = tiny_model(family), tiny_model(family)
    assert "1 of 2 layers have no rotary embedding (1)" in patch_model(model, "yarn:4").notes
    first, _ = attention_tables(model, tokens)
    force_tables(exact, [first, (torch.full_like(first[0], 0.5), first[1])])
    assert distance(logits(exact, tokens), logits(model, tokens)) < SAME


def test_exaone_without_a_window_rotates_all_layers(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model("exaone4", sliding_window=None, layer_types=["full_attention"] * 2)
    first, second = attention_tables(model, tokens)
    before = logits(model, tokens)
    force_tables(model, [first, (torch.full_like(second[0], 0.5), second[1])])
    assert distance(logits(model, tokens), before) > CHANGED
    assert layers_without_rope(model.config) == []
    report = patch_model(tiny_model("exaone4", sliding_window=None, layer_types=["full_attention"] * 2), "yarn:4")
    assert not any("no rotary embedding" in note for note in report.notes)


# What attention itself reads from the RoPE parameters


def test_what_attention_reads_at_every_pass_is_kept(tiny_model: Make, tokens: Tensor) -> None:
    # Ministral 3 multiplies queries by 1 + β·ln(1 + ⌊position / L⌋), which acts on positions from 32 here.
    model = tiny_model("ministral3")
    for spec in ("default", "linear:4", "yarn:4,ramp=rotations", "dynamic-yarn"):
        patch_model(model, spec)
        rope = model.config.rope_parameters
        assert (rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]) == (0.1, 32)
        assert RopeScaling.from_config(model.config) == patched_scaling(model)
        twin = copy.deepcopy(model)
        twin.config.rope_parameters["llama_4_scaling_beta"] = 0.0
        off = (logits(twin, tokens) - logits(model, tokens)).abs().amax(dim=(0, 2))
        assert off[:32].max() == 0 and off[32:].max() > 1e-3  # β matters to what it should and not to the rest


def deepseek(**rope: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    heads = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": None, "kv_lora_rank": 16}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 16}
    settings = {**{k: v for k, v in TINY.items() if k != "head_dim"}, **heads, **experts, "initializer_range": 0.3}
    config = transformers.DeepseekV3Config(**settings, rope_parameters={**PLAIN, **rope})
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_softmax_scale_that_a_patch_cannot_follow_is_refused(tokens: Tensor, tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0}
    model = deepseek(**yarn, mscale_all_dim=1.0)
    before, config = logits(model, tokens), copy.deepcopy(model.config.to_dict())
    # Why: attention has kept the scale of a factor of 4, which no other RoPE parameters would give.
    assert model.model.layers[0].self_attn.scaling == pytest.approx(32**-0.5 * (0.1 * math.log(4) + 1) ** 2)
    for scaling in ("yarn:8", "default", RopeScaling.from_config(model.config)):
        with pytest.raises(ConfigError, match="'deepseek_v3' with mscale_all_dim=1.0: its attention took"):
            patch_model(model, scaling)
    assert torch.equal(logits(model, tokens), before) and model.config.to_dict() == config
    # As it is it can be read, and without that scale it can be patched, saved and loaded.
    model.save_pretrained(tmp_path / "own")
    assert distance(logits(load(tmp_path / "own"), tokens), before) < SAME
    model = deepseek()
    assert patch_model(model, "yarn:4").native
    assert_vanilla_is_right_or_refuses(model, True, tokens, tmp_path / "patched")


def test_the_list_of_families_with_a_softmax_scale_is_that_of_transformers() -> None:
    # By the source of the models, because most of them cannot be built small.
    models = Path(transformers.__file__).parent / "models"
    reading = {path.parent.name for path in models.glob("*/modeling_*.py") if "mscale_all_dim" in path.read_text()}
    assert reading == {name.removesuffix("_text") for name in SOFTMAX_MSCALE_FAMILIES}


def test_computes_is_not_sure_of_a_module_that_switches(tiny_model: Make) -> None:
    # Up to L this one has the frequencies and the factor of an unscaled model.
    longrope = {"factor": 4.0, "attention_factor": 1.0, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    rope = {**PLAIN, "rope_type": "longrope", "original_max_position_embeddings": 32, **longrope}
    assert not computes(tiny_model(rope_parameters=rope), RopeScaling("default", original_max_position_embeddings=32))
    rope = {**PLAIN, "rope_type": "dynamic", "factor": 2.0}
    assert not computes(tiny_model(rope_parameters=rope), RopeScaling("default", original_max_position_embeddings=32))


def test_a_flat_scaling_on_olmo_3_is_dropped_and_we_say_so(tiny_model: Make, tokens: Tensor) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 32}
    plain = tiny_model("olmo3")
    own = record(plain, "default")
    model = tiny_model("olmo3", rope_parameters=dict(yarn))
    assert distance(logits(model, tokens), logits(plain, tokens)) == 0
    assert computes(model, own) and not computes(model, record(plain, "yarn"))
    raw = {**plain.config.to_dict(), "rope_parameters": yarn}
    with pytest.warns(UserWarning, match="not nested per layer type: transformers drops it"):
        assert RopeScaling.from_config(raw) == own


def test_truncate_counts_outside_the_layer_types_only(tiny_model: Make, tokens: Tensor) -> None:
    # With these bounds the ramp's ends are not whole; with the default ones truncation would change little.
    options = {"beta_fast": 2.0, "beta_slow": 0.1}
    plain = tiny_model("gemma3_text", rope_parameters={name: dict(PLAIN) for name in LAYER_TYPES})
    yarn = {**PLAIN, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, **options}
    rounded, unrounded = (RopeScaling("yarn", 4.0, 32, **options, **more) for more in ({}, {"truncate": False}))
    inside = {"sliding_attention": PLAIN, "full_attention": {**yarn, "truncate": False}}
    outside = {"sliding_attention": PLAIN, "full_attention": yarn, "truncate": False}
    for rope, computed in ((inside, rounded), (outside, unrounded)):
        model = tiny_model("gemma3_text", rope_parameters=rope, max_position_embeddings=128)
        assert computes(model, computed)
        assert computes(model, rounded) != computes(model, unrounded)
        patched = copy.deepcopy(plain)
        # Unrounded ends cannot be said in a layer type, so that is left to our own words.
        assert patch_model(patched, computed).native == (computed is rounded)
        assert distance(logits(patched, tokens), logits(model, tokens)) < SAME
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            read = RopeScaling.from_config({**model.config.to_dict(), "rope_parameters": rope})
        assert (read.truncate is False) == (computed is unrounded)
        assert any("has no effect" in str(one.message) for one in caught) == (computed is rounded)
