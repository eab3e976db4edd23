"""Dynamic scaling with key/value caches of keys that are not rotated yet."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import QuantizedLayer

import scaled_rope.patching.deferred_rotation
from benchmarks.small_models import MODEL_TYPES, small_model
from scaled_rope.kernels import rotary_decode
from scaled_rope.patching.loss import token_nll
from scaled_rope.patching.patch import lost_part, patch_model, unpatch_model
from scaled_rope.patching.rebind import APPLY, callers, original, rebind
from scaled_rope.scaling.record import RopeScaling
from tests.helpers import reference
from tests.helpers.caches import ORIGINAL, SAME, distance, one_layer, refused, through_cache, whole
from tests.helpers.models import DETECTED, FAMILIES, VOCABULARY, Make
from tests.helpers.optional import fp8_caches

CHANGED = 1e-2


# ---- the definition, done literally ----


def rotated(heads: Tensor, frequencies: list[float], factor: float) -> Tensor:
    """Heads [H, T, D] at positions 0 … T-1, halves together, multiplied by the attention factor."""
    angles = torch.tensor([[t * f for f in frequencies] for t in range(heads.shape[1])], dtype=heads.dtype)
    a, b = heads.chunk(2, dim=-1)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@torch.no_grad()
def literally(model: Any, ids: Tensor, ends: list[int]) -> Tensor:
    """Dynamic-YaRN with a cache by its definition, in float64, for a tiny Llama and one text [T]: every layer keeps
    keys as they are before rotation; every pass rotates all of them, and its queries, at the scale of its length."""
    model = copy.deepcopy(model).double()
    config, base = model.config, model.model
    dim, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    kept = [(torch.empty(0), torch.empty(0)) for _ in base.layers]
    logits, start = [], 0
    for end in ends:
        scale = max(1.0, end / ORIGINAL)
        frequencies = reference.by_parts_dimension(dim, 1e4, scale, ORIGINAL)
        factor = 0.1 * math.log(scale) + 1
        hidden = base.embed_tokens(ids[start:end])
        for index, layer in enumerate(base.layers):
            normed = layer.input_layernorm(hidden)
            attention = layer.self_attn
            q, k, v = (
                projection(normed).view(end - start, -1, dim).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if start:
                k, v = (torch.cat(pair, dim=1) for pair in zip(kept[index], (k, v), strict=True))
            kept[index] = k, v
            blank = torch.zeros(q.shape[0], start, dim, dtype=q.dtype)
            turned_q = rotated(torch.cat((blank, q), dim=1), frequencies, factor)[:, start:]
            turned_k, v = (x.repeat_interleave(groups, dim=0) for x in (rotated(k, frequencies, factor), v))
            scores = turned_q @ turned_k.transpose(1, 2) / math.sqrt(dim)
            seen = torch.arange(end)[None] <= torch.arange(start, end)[:, None]
            weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
            hidden = hidden + attention.o_proj((weights @ v).transpose(0, 1).reshape(end - start, -1))
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        logits.append(model.lm_head(base.norm(hidden)))
        start = end
    return torch.cat(logits)


@pytest.mark.parametrize("ends", [[20, *range(21, 51)], [30, 41, 42, 60]], ids=["token by token", "in pieces"])
def test_a_cache_under_dynamic_yarn_follows_the_definition(tiny_model: Make, text: Tensor, ends: list[int]) -> None:
    model = tiny_model(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    patch_model(model, "dynamic-yarn")
    wanted = literally(model, text[0], ends)
    assert distance(through_cache(model, text[:1], ends)[0], wanted) < SAME
    # What it is not: keys that stay as they were rotated.
    unpatch_model(model)
    assert distance(through_cache(model, text[:1], ends)[0], wanted) > CHANGED


# ---- what else it must equal ----


@pytest.mark.parametrize("family", [name for name in FAMILIES | DETECTED if name != "falcon"])
def test_one_layer_reproduces_a_whole_pass(tiny_model: Make, text: Tensor, family: str) -> None:
    # Keys of the only layer don't depend on earlier scales, so a last pass at length T equals a pass over T tokens.
    model = one_layer(tiny_model, family)
    patch_model(model, "dynamic-yarn")
    for ends in ([20, 30, 47, 48], [48]):
        found = through_cache(model, text[:, :48], ends)
        assert distance(found[:, -1], whole(model, text[:, :48])[:, -1]) < SAME


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("deepseek_v3", {}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("mistral4", {}),
        ("minicpm3", {}),
        ("jetmoe", {}),
    ],
    ids=["deepseek_v3", "halves", "mistral4", "minicpm3", "repeated heads"],
)
def test_latent_attention_and_repeated_heads_reproduce_a_whole_pass(family: str, more: dict[str, Any]) -> None:
    if family not in MODEL_TYPES:
        pytest.skip("a release of transformers without this family")
    model = small_model(family, num_hidden_layers=1, **more)
    text = torch.randint(3, 200, (2, 150), generator=torch.Generator().manual_seed(0))
    before = whole(model, text)
    patch_model(model, "dynamic-yarn")
    wanted = whole(model, text)
    for ends in ([60, 149, 150], [60, 150]):
        assert distance(through_cache(model, text, ends)[:, -1], wanted[:, -1]) < SAME
    assert lost_part(model) == ""
    unpatch_model(model)
    assert torch.equal(whole(model, text), before)


def test_a_model_that_rotates_in_an_unknown_way_is_refused(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, "dynamic-yarn")
    module = callers(model, APPLY)[1]
    rebind(module, APPLY, original(module, APPLY))
    whole(model, text)
    refused(lambda: model(text, use_cache=True), "cache: layer 1 rotates its keys before they are cached", "use_cache")


@pytest.mark.parametrize("spec", ["dynamic-linear", "dynamic-ntk", "dynamic-ntk:2", "dynamic-llama3", "longrope"])
def test_every_scaling_that_depends_on_the_length_has_such_a_cache(tiny_model: Make, text: Tensor, spec: str) -> None:
    model = one_layer(tiny_model)
    scaling: Any = spec
    if spec == "longrope":
        params = {"short_factor": [1.0] * 8, "long_factor": [1.0 + d for d in range(8)]}
        scaling = RopeScaling("longrope", 4.0, ORIGINAL, params=params)
    patch_model(model, scaling)
    found = through_cache(model, text[:, :40], [30, 39, 40])
    assert distance(found[:, -1], whole(model, text[:, :40])[:, -1]) < SAME


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-yarn,dynamic_step=2"])
def test_up_to_the_original_length_it_is_transformers(tiny_model: Make, text: Tensor, family: str, spec: str) -> None:
    ends = [20, 21, 29, 32]
    model = tiny_model(family)
    wanted = through_cache(model, text, ends)
    patch_model(model, spec)
    assert distance(through_cache(model, text, ends), wanted) < SAME


def test_a_dynamic_scaling_that_has_not_begun_is_the_static_one(tiny_model: Make, text: Tensor) -> None:
    ends = [20, 50, 51, 64]
    static, dynamic = tiny_model(), tiny_model()
    patch_model(static, "yarn:2")
    for spec in ("dynamic-yarn:2", "dynamic-yarn:2,dynamic_step=1.5"):
        patch_model(dynamic, spec)
        assert distance(through_cache(dynamic, text, ends), through_cache(static, text, ends)) < SAME


def test_pieces_of_one_length_are_a_whole_pass(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    for spec in ("dynamic-yarn", "dynamic-yarn,dynamic_step=2"):
        patch_model(model, spec)
        with torch.no_grad():
            wanted = token_nll(model, text, text)
            assert distance(token_nll(model, text, text, prefill_chunk=17), wanted) < SAME


def test_layers_may_differ(tiny_model: Make, text: Tensor) -> None:
    layers = {"full_attention": "dynamic-yarn", "sliding_attention": None}
    for family in ("gemma3_text", "qwen3"):
        model = tiny_model(family)
        patch_model(model, layers)
        # The first layer is the only one that later ones depend on, and its scale stays: all is as in a whole pass.
        assert model.config.layer_types == ["sliding_attention", "full_attention"]
        found = through_cache(model, text[:, :48], [20, 47, 48])
        assert distance(found[:, -1], whole(model, text[:, :48])[:, -1]) < SAME
    model = tiny_model()
    patch_model(model, "dynamic-yarn", drop_layers=[0])
    found = through_cache(model, text[:, :48], [20, 47, 48])
    assert distance(found[:, -1], whole(model, text[:, :48])[:, -1]) < SAME


# ---- generate() ----


WAYS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "in pieces": {"prefill_chunk_size": 7},
    "static, in pieces": {"cache_implementation": "static", "prefill_chunk_size": 7},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def generated(model: Any, ids: Tensor, mask: Tensor | None = None, new: int = 14, **more: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **more)
    return tokens


@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-yarn,dynamic_step=1.2"])
@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_that_without_a_cache(tiny_model: Make, text: Tensor, spec: str, way: str) -> None:
    # Of one layer, where both agree for certain; 28 to 42 tokens, past the 32 of the model and several steps.
    model = one_layer(tiny_model)
    patch_model(model, spec)
    more = WAYS[way]
    rows = text[:1] if way == "prompt lookup" else text  # it takes one text
    ids, mask = rows[:, :28].clone(), torch.ones(len(rows), 28, dtype=torch.long)
    if way != "prompt lookup":
        ids[0, :9], mask[0, :9] = 0, 0  # shorter by 9 tokens, and by more than one piece
    plain = {name: value for name, value in more.items() if name == "num_beams"}
    wanted = generated(model, ids, mask, use_cache=False, **plain)
    assert torch.equal(generated(model, ids, mask, **more), wanted)
    if way != "prompt lookup":
        alone = generated(model, ids[:1, 9:], **more)
        assert torch.equal(alone, wanted[:1, 9:])


def test_a_window_is_read_from_the_part_that_the_cache_keeps(tiny_model: Make, text: Tensor) -> None:
    # One layer with a window of 12 tokens, in a cache that grows and in one of fixed size.
    model = tiny_model("gemma3_text", num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=12)
    patch_model(model, {"sliding_attention": "dynamic-yarn"})
    wanted = whole(model, text[:, :48])[:, -1]
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=60)):
        assert any(layer.is_sliding for layer in cache.layers)
        found = through_cache(model, text[:, :48], [9, 30, 31, 40, 48], cache)
        assert distance(found[:, -1], wanted) < SAME


def test_generation_from_embeddings_and_through_a_copied_prefix(tiny_model: Make, text: Tensor) -> None:
    for spec in ("dynamic-yarn", "dynamic-yarn,dynamic_step=1.1"):
        model = one_layer(tiny_model)
        patch_model(model, spec)
        wanted = generated(model, text[:, :30], use_cache=False)
        embedded = model.get_input_embeddings()(text[:, :30])
        found = model.generate(inputs_embeds=embedded, max_new_tokens=14, do_sample=False)
        assert torch.equal(found, wanted[:, 30:])
        with torch.no_grad():
            prefix = model(text[:, :20], use_cache=True).past_key_values
        for _ in range(2):
            cache = copy.deepcopy(prefix)
            assert torch.equal(generated(model, text[:, :30], past_key_values=cache), wanted)
        # A copy of the model is the same model.
        assert torch.equal(generated(copy.deepcopy(model), text[:, :30], past_key_values=prefix), wanted)


class Exact(QuantizedLayer):
    """A quantized layer that loses nothing: what is left is when it keeps which tokens in which of its two stores."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.clone()

    def _dequantize(self, quantized: Tensor) -> Tensor:
        return quantized


@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-yarn,dynamic_step=1.2", "rerope,window=10"])
def test_quantized_caches(tiny_model: Make, text: Tensor, spec: str) -> None:
    model = one_layer(tiny_model)
    patch_model(model, spec)
    wanted = whole(model, text[:, :48])[:, -1]
    cache = Cache(layers=[Exact(residual_length=12)])
    ends = [20, *range(21, 49)]  # all three: into the store, into the rest, from the rest into the store
    assert distance(through_cache(model, text[:, :48], ends, cache)[:, -1], wanted) < SAME


@fp8_caches
@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-yarn,dynamic_step=1.2", "rerope,window=10"])
def test_caches_of_8_bits(tiny_model: Make, text: Tensor, spec: str) -> None:
    model = one_layer(tiny_model)
    ends = [20, *range(21, 49)]
    rotated = through_cache(model, text[:, :48], [20, 30, 47, 48])[:, -1]
    patch_model(model, spec)
    wanted = whole(model, text[:, :48])[:, -1]
    again = QuantizedCache("fp8", model.config)
    found = through_cache(model, text[:, :48], ends, again)[:, -1]
    # 8-bit floats with 3 bits of mantissa are off by up to 1/16, with random signs: less than a wrong scale is.
    assert SAME < distance(found, wanted) < distance(rotated, wanted) / 4


def test_two_models_take_turns(tiny_model: Make, text: Tensor) -> None:
    first, second = one_layer(tiny_model), one_layer(tiny_model, seed=1)
    for model in (first, second):
        patch_model(model, "dynamic-yarn")
    with torch.no_grad():
        caches = [model(text[:, :39], use_cache=True).past_key_values for model in (first, second)]
        for model, cache in zip((first, second), caches, strict=True):
            found: Any = model(text[:, 39:40], past_key_values=cache)
            assert distance(found.logits[:, -1], whole(model, text[:, :40])[:, -1]) < SAME


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_is_the_same_with_it(
    tiny_model: Callable[..., PreTrainedModel], monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    model: Any = tiny_model()
    patch_model(model, "dynamic-yarn")
    ids = torch.randint(1, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[0, :9], mask[0, :9] = 0, 0
    calls = 0

    def counting(*args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return rotary_decode(*args, **options)

    monkeypatch.setattr(scaled_rope.patching.deferred_rotation, "rotary_decode", counting)
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True,
                "output_logits": True, "cache_implementation": cache}  # fmt: skip
    fused = model.generate(ids, **settings)
    assert calls == 7 * 2  # every pass but the first, two layers
    monkeypatch.setattr(scaled_rope.patching.deferred_rotation, "FEW", 0)
    plain = model.generate(ids, **settings)
    assert calls == 7 * 2 and torch.equal(fused.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(fused.logits), torch.stack(plain.logits), rtol=0, atol=5e-5)
