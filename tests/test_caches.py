"""Dynamic scaling with key/value caches: keys cached before rotation, and caches made anew by steps."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, QuantizedLayer

from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import token_nll
from scaled_rope.patching.patch import patch_model, unpatch_model
from scaled_rope.scaling.frequencies import compute_scale
from scaled_rope.scaling.record import RopeScaling
from tests import reference
from tests.conftest import DETECTED, FAMILIES, VOCABULARY

Make = Callable[..., PreTrainedModel]

# Logits are about 1 and made of float32 sums over some hundred terms, which differ by a few units of 1.2e-7 when they
# are added in another order; large weights make that some 5e-6.
SAME = 5e-5
CHANGED = 1e-2
ORIGINAL = 32


@pytest.fixture
def text() -> Tensor:
    """Token ids [2, 80], 2.5 times the tiny models' 32 positions."""
    return torch.randint(1, VOCABULARY, (2, 80), generator=torch.Generator().manual_seed(5))


def one_layer(make: Make, family: str = "llama", **more: Any) -> PreTrainedModel:
    settings: dict[str, Any] = {"num_hidden_layers": 1}
    if "layer_types" in (FAMILIES | DETECTED)[family]:
        settings["layer_types"] = ["sliding_attention" if family in ("afmoe", "cohere2") else "full_attention"]
    settings |= {"smollm3": {"no_rope_layers": [1]}, "afmoe": {"num_dense_layers": 0}}.get(family, {})
    return make(family, **settings, **more)


@torch.no_grad()
def through_cache(model: PreTrainedModel, ids: Tensor, ends: list[int], cache: Any = None, **more: Any) -> Tensor:
    """Logits [B, ends[-1], V] of a text that is read in pieces which end there."""
    logits, start = [], 0
    for end in ends:
        output: Any = model(ids[:, start:end], past_key_values=cache, use_cache=True, **more)
        cache, start = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def whole(model: PreTrainedModel, ids: Tensor, **more: Any) -> Tensor:
    output: Any = model(ids, use_cache=False, **more)
    logits: Tensor = output.logits
    return logits


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


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
    rotated = through_cache(model, text[:, :48], [20, 30, 47, 48])[:, -1]
    patch_model(model, spec)
    wanted = whole(model, text[:, :48])[:, -1]
    cache = Cache(layers=[Exact(residual_length=12)])
    ends = [20, *range(21, 49)]  # all three: into the store, into the rest, from the rest into the store
    assert distance(through_cache(model, text[:, :48], ends, cache)[:, -1], wanted) < SAME
    again = QuantizedCache("fp8", model.config)
    found = through_cache(model, text[:, :48], ends, again)[:, -1]
    # 8-bit floats with 3 bits of mantissa are off by up to 1/16, with random signs: less than a wrong scale is.
    assert SAME < distance(found, wanted) < distance(rotated, wanted) / 4


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that offload, without a GPU: a layer that is offloaded has no numbers until it is fetched."""

    class Stream(contextlib.nullcontext[None]):
        def wait_stream(self, other: Any) -> None:
            pass

    def offload(layer: Any) -> None:
        layer.away = layer.keys, layer.values
        layer.keys, layer.values = (torch.full_like(x, math.nan) for x in layer.away)

    def prefetch(layer: Any) -> None:
        if layer.is_initialized and layer.keys.isnan().any():
            layer.keys, layer.values = layer.away

    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(CacheLayerMixin, "prefetch", prefetch)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("spec", ["dynamic-yarn", "dynamic-yarn,dynamic_step=1.2"])
def test_offloaded_caches(
    tiny_model: Make, text: Tensor, family: str, spec: str, offloading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family)
    patch_model(model, spec)
    ends = [20, 40, 41, 57, 58]
    wanted = through_cache(model, text, ends)
    for make in (
        lambda: DynamicCache(config=model.config, offloading=True),
        lambda: StaticCache(config=model.config, max_cache_len=60, offloading=True),
    ):
        refused(lambda: model(text, past_key_values=make()), "Cache offloads", "computes on cpu")  # noqa: B023
        with monkeypatch.context() as patched:
            patched.setattr("scaled_rope.patching.pass_hooks.check_device", lambda cache, device: None)
            cache = make()
            assert distance(through_cache(model, text, ends, cache), wanted) < SAME
            assert any(layer.keys.isnan().any() for layer in cache.layers)


def test_two_models_take_turns(tiny_model: Make, text: Tensor) -> None:
    first, second = one_layer(tiny_model), one_layer(tiny_model, seed=1)
    for model in (first, second):
        patch_model(model, "dynamic-yarn")
    with torch.no_grad():
        caches = [model(text[:, :39], use_cache=True).past_key_values for model in (first, second)]
        for model, cache in zip((first, second), caches, strict=True):
            found: Any = model(text[:, 39:40], past_key_values=cache)
            assert distance(found.logits[:, -1], whole(model, text[:, :40])[:, -1]) < SAME


def test_a_pass_that_fails_leaves_nothing_behind(tiny_model: Make, text: Tensor) -> None:
    model = one_layer(tiny_model)
    patch_model(model, "dynamic-yarn")
    wanted = whole(model, text)
    with pytest.raises(IndexError):
        model(torch.full_like(text, VOCABULARY), use_cache=True)
    assert torch.equal(whole(model, text), wanted)
    model.train()
    model.gradient_checkpointing_enable()
    model(text, labels=text).loss.backward()  # with a cache, says the config; checkpointing makes none


# ---- steps ----


@pytest.mark.parametrize(("factor", "step"), [(1.0, 2.0), (1.5, 1.2), (4.0, 3.0), (1.0, 1.1)])
def test_a_step_is_the_first_that_covers_the_length(factor: float, step: float) -> None:
    scaling = RopeScaling("yarn", factor, 4096, dynamic=True, dynamic_step=step)
    lengths = [1, 4095, 4096, 4097, 8192, 8193, 40000, 2**20, *(math.floor(4096 * factor * step**k) for k in range(9))]
    found = compute_scale(scaling, torch.tensor(lengths)).tolist()
    for length, scale in zip(lengths, found, strict=True):
        k = 0
        while factor * step**k < length / 4096:
            k += 1
        assert scale == factor * step**k


@torch.no_grad()
def counted(model: Any, ids: Tensor, ends: list[int], **more: Any) -> tuple[Tensor, int]:
    """Logits through a cache, and how many tokens the layers were given in all."""
    tokens = 0

    def count(module: Any, args: Any, kwargs: Any) -> None:
        nonlocal tokens
        tokens += (args[0] if args else kwargs["hidden_states"]).shape[1]

    base = model.base_model
    hook = (base.h if hasattr(base, "h") else base.layers)[0].register_forward_pre_hook(count, with_kwargs=True)
    logits = through_cache(model, ids, ends, **more)
    hook.remove()
    return logits, tokens


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "falcon", "gpt_oss"])
def test_steps_equal_whole_passes_at_their_scale(tiny_model: Make, text: Tensor, family: str) -> None:
    # Deep models too: the cache is made anew, so nothing of another scale is left in it.
    model, static = tiny_model(family), tiny_model(family)
    patch_model(model, "dynamic-yarn,dynamic_step=1.5")
    ends = [20, *range(21, 81)]
    found, tokens = counted(model, text, ends)
    for length in (20, 32, 33, 48, 49, 72, 73, 80):
        scale = 1.0
        while scale * ORIGINAL < length:
            scale *= 1.5
        patch_model(static, f"yarn:{scale}")
        assert distance(found[:, length - 1], whole(static, text[:, :length])[:, -1]) < SAME
    # Steps begin at 33, 49 and 73 tokens: 80 read once, and what was there each time read again.
    assert tokens == 80 + 32 + 48 + 72
    # With steps by a factor of r no more than T/(1 - 1/r) tokens are read again in T.
    assert tokens - 80 < 80 / (1 - 1 / 1.5)


def test_rows_step_by_their_own_length(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    patch_model(model, "dynamic-yarn,dynamic_step=1.5")
    padded = text.clone()
    padded[0, :10] = 0
    mask = (torch.arange(60)[None] >= torch.tensor([[10], [0]])).long()
    with torch.no_grad():
        cache, rows = None, []
        for start, end in ((0, 20), *((t, t + 1) for t in range(20, 60))):
            output: Any = model(padded[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            cache = output.past_key_values
            rows.append(output.logits)
    found = torch.cat(rows, dim=1)
    for row, first in ((0, 10), (1, 0)):
        for end in (32, 40, 43, 49, 59, 60):
            alone = whole(model, text[row : row + 1, first:end])
            assert distance(found[row, end - 1], alone[0, -1]) < SAME


def test_a_cache_is_made_anew_in_pieces_with_progress(
    tiny_model: Make, text: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("scaled_rope.patching.pass_hooks.PIECE", 7)
    monkeypatch.setattr("scaled_rope.patching.pass_hooks._PATIENCE", 0)
    model = tiny_model()
    patch_model(model, "dynamic-yarn,dynamic_step=2")
    found = through_cache(model, text, [30, 33, 40])
    assert distance(found[:, 30:], whole(model, text[:, :40])[:, 30:]) < SAME
    err = capsys.readouterr().err
    assert "keys again, scale 2" in err and "/30 [" in err


# ---- what is refused ----


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ConfigError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@torch.no_grad()
def test_a_cache_that_the_model_did_not_fill_is_refused(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    foreign: Any = model(text[:, :30], use_cache=True).past_key_values
    patch_model(model, "dynamic-yarn")
    refused(lambda: model(text[:, 30:31], past_key_values=foreign), "past_key_values", "DynamicCache", "not filled by")
    by_position: Any = model.model
    refused(lambda: by_position(text[:, 30:31], None, None, foreign), "not filled by")
    own: Any = model(text[:, :30], use_cache=True).past_key_values
    for spec in ("dynamic-linear", "dynamic-yarn,dynamic_step=2", "yarn:4"):
        patch_model(model, spec)
        refused(lambda: model(text[:, 30:31], past_key_values=own), "past_key_values", "another patch", "dynamic-yarn")
    # A cache that is emptied is as good as new.
    own.reset()
    assert distance(through_cache(model, text, [20, 40], own), through_cache(model, text, [20, 40])) < SAME


@torch.no_grad()
def test_steps_read_any_cache_until_the_scale_changes(tiny_model: Make, text: Tensor) -> None:
    model = tiny_model()
    foreign: Any = model(text[:, :30], use_cache=True).past_key_values
    wanted = whole(model, text[:, :32])
    patch_model(model, "dynamic-yarn,dynamic_step=2")
    for t in (30, 31):
        found: Any = model(text[:, t : t + 1], past_key_values=foreign)
        assert distance(found.logits[:, 0], wanted[:, t]) < SAME
    refused(lambda: model(text[:, 32:33], past_key_values=foreign), "from scale 1 to 2", "DynamicCache")


@torch.no_grad()
def test_other_caches_that_cannot_be_read_are_refused(tiny_model: Make, text: Tensor) -> None:
    falcon = tiny_model("falcon")
    patch_model(falcon, "dynamic-yarn")
    cache: Any = falcon(text[:, :30], use_cache=True).past_key_values
    refused(lambda: falcon(text[:, 30:31], past_key_values=cache), "falcon", "attention interface", "use_cache=False")

    model = tiny_model()
    patch_model(model, "dynamic-yarn")
    # Padding on the right, so that the next token does not go on where the row ended.
    mask = torch.ones(2, 31, dtype=torch.long)
    mask[0, 25:30] = 0
    cache = model(text[:, :30], attention_mask=mask[:, :30], use_cache=True).past_key_values
    refused(lambda: model(text[:, 30:31], attention_mask=mask, past_key_values=cache), "position_ids", "consecutive")
    cache = model(text[:, :30], use_cache=True).past_key_values
    places = torch.tensor([[35]])
    refused(lambda: model(text[:, 30:31], position_ids=places, past_key_values=cache), "position_ids", "without a gap")
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :20], layer.values[:, :, :20]
    refused(lambda: model(text[:, 30:31], past_key_values=cache), "holds 20 tokens, 30 when")

    class Half(DynamicCache):
        def update(self, key: Tensor, value: Tensor, layer: int, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(key, value, layer)
            return keys[:, :, ::2], values[:, :, ::2]

    refused(lambda: model(text[:, :30], past_key_values=Half()), "type Half", "hands out 15 keys", "StaticCache")


def test_layers_share_their_steps(tiny_model: Make) -> None:
    model = tiny_model("qwen3")
    layers = {"full_attention": "dynamic-yarn,dynamic_step=2", "sliding_attention": "dynamic-yarn"}
    refused(lambda: patch_model(model, layers), "dynamic_step", "share")
