"""Every supported family and method: what transformers computes is what we compute."""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from scaled_rope import METHODS, RopeScaling, patch_model, unpatch_model
from scaled_rope.patching.patch import patched_plan, patched_scaling
from scaled_rope.patching.rotary import ScaledRotaryEmbedding
from scaled_rope.scaling.record import LayerPlan
from tests.helpers import reference
from tests.helpers.cases import in_turn
from tests.helpers.families import (
    ALL,
    CHANGED,
    SAME,
    TINY,
    WITHOUT_WORDS,
    Reference,
    assert_same_gradients,
    distance,
    load,
    logits,
    record,
    reference_of,
    vanilla_settings,
    width,
)
from tests.helpers.models import LAYER_TYPES, PLAIN, Make
from tests.helpers.optional import phi3_cache

# What is computed


@pytest.mark.parametrize(("family", "method"), in_turn(ALL, ["yarn", "linear", "longrope", "default"], each=2))
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
        assert distance(logits(exact, tokens), after) < SAME
        assert report.native == (family == "mixtral")  # whose config then says the head_dim that is missing


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


@pytest.mark.parametrize("family", [pytest.param(name, marks=phi3_cache if name == "phi3" else ()) for name in ALL])
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


@phi3_cache
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
    model = tiny_model("qwen3", num_hidden_layers=1, layer_types=["full_attention"])
    compiled = torch.compile(model, backend="eager")
    for spec in ({"full_attention": "yarn:4"}, "dynamic-yarn", "linear:4"):
        before = logits(compiled, tokens)
        patch_model(model, spec)
        assert distance(logits(compiled, tokens), logits(model, tokens)) < SAME
        assert distance(logits(compiled, tokens), before) > CHANGED


@pytest.mark.slow  # its compiler; what is ours is traced in the tests above
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
    "drope": ("drope:4", [0.0 for _ in PLAIN_16], 1.0),
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
