"""The rotary modules: tables, casts, and rows of different length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.small_models import MODEL_TYPES, small_model
from scaled_rope import ConfigError, RopeScaling, compute_rope, patch_model, unpatch_model
from scaled_rope.patching.base_model import base_model, rotary_places
from scaled_rope.patching.rotary import ScaledRotaryEmbedding

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.bfloat16),
    "buffers": lambda m: [b.__setattr__("data", b.data.bfloat16()) for b in m.buffers()],  # as FSDP does
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("spec", ["yarn:4", "dynamic-yarn"])
def test_casts_leave_frequencies_and_tables_in_float32(tiny_model, cast, spec):
    model = tiny_model()
    scaling = patch_model(model, spec).scaling
    rotary = model.model.rotary_emb
    positions = torch.tensor([[0, 1, 4097, 65001, 131071]])
    before = rotary(torch.zeros(1), positions)
    CASTS[cast](model)
    inv_freq, _ = compute_rope(scaling, 16)
    assert rotary.inv_freq.dtype == torch.float32 and torch.equal(rotary.inv_freq, inv_freq)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            after = rotary(torch.zeros(1, dtype=dtype), positions)
        for table, wanted in zip(after, before, strict=True):
            assert table.dtype == dtype and torch.equal(table, wanted.to(dtype))  # rounded at the end only


def test_tables_are_cos_and_sin_of_position_times_frequency():
    scaling = RopeScaling("yarn", 4.0, 32)
    inv_freq, factor = compute_rope(scaling, 16)
    positions = torch.tensor([[0, 5, 31], [7, 8, 9]])
    cos, sin = ScaledRotaryEmbedding(scaling, 16)(torch.zeros(1), positions)
    angles = positions[..., None].double() * inv_freq.double()
    wanted = torch.cat((angles, angles), dim=-1)
    # An angle of up to 31 is rounded to float32 once (half a unit of 16: 1e-6), cos and sin a little more.
    torch.testing.assert_close(cos.double(), wanted.cos() * factor, rtol=0, atol=2e-6)
    torch.testing.assert_close(sin.double(), wanted.sin() * factor, rtol=0, atol=2e-6)


def test_rotary_module_comes_out_of_meta():
    scaling = RopeScaling("yarn", 4.0, 32)
    positions = torch.arange(40)[None]
    wanted = ScaledRotaryEmbedding(scaling, 16)(torch.zeros(1), positions)
    with torch.device("meta"):
        built = ScaledRotaryEmbedding(scaling, 16)
    for module in (built, ScaledRotaryEmbedding(scaling, 16, device="meta").to_empty(device="cpu")):
        assert torch.equal(module(torch.zeros(1), positions)[0], wanted[0])
    moved = ScaledRotaryEmbedding(scaling, 16).to("meta")
    assert moved.inv_freq.is_meta
    moved = moved.to_empty(device="cpu")
    assert torch.equal(moved.inv_freq, compute_rope(scaling, 16)[0])


def test_rows_of_the_dynamic_tables_are_independent():
    rotary = ScaledRotaryEmbedding(RopeScaling("yarn", 1.0, 32, dynamic=True), 16)
    rows = torch.stack([torch.arange(100), torch.arange(100).clamp(max=39), torch.arange(100).clamp(max=9)])
    together = rotary(torch.zeros(1), rows)
    for index in range(len(rows)):
        for table, wanted in zip(rotary(torch.zeros(1), rows[index : index + 1]), together, strict=True):
            torch.testing.assert_close(table[0], wanted[index], rtol=0, atol=1e-5)  # last bits of angles up to 100
    assert not torch.allclose(together[0][0, 5], together[0][1, 5], atol=1e-3)


def _positions_of_an_image() -> Tensor:
    """[axes, B, T]: text, then an image of 3 x 4 patches at one time, then text again."""
    text = torch.arange(5)
    height, width = torch.arange(3).repeat_interleave(4) + 5, torch.arange(4).repeat(3) + 5
    rest = torch.arange(9, 14)
    axes = [torch.cat((text, middle, rest)) for middle in (torch.full((12,), 5), height, width)]
    return torch.stack(axes)[:, None]


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen2_vl", "glm4v", "ernie4_5_vl_moe", "qwen3_5"])
def test_images_keep_their_axes(model_type: str) -> None:
    """The tables of other positions than a text's are those of transformers' own module under the same scaling."""
    model = small_model(model_type)
    base = base_model(model)
    place = rotary_places(base)[0]
    positions, x = _positions_of_an_image(), torch.zeros(1, 17, 1)
    own = place.module(x, positions)
    text = place.module(x, torch.arange(17)[None].expand(3, 1, -1))
    assert not torch.equal(own[0], text[0])  # the axes matter
    patch_model(model, "default")
    for one, other in zip(place.current(base)(x, positions), own, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    report = patch_model(model, "linear:4")
    if model_type != "ernie4_5_vl_moe":  # of which transformers takes no scaling at all
        vanilla = type(place.module)(config=base.config)
        for one, other in zip(place.current(base)(x, positions), vanilla(x, positions), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    assert report.native == (model_type != "ernie4_5_vl_moe")


@pytest.mark.parametrize("spec", ["dynamic-yarn", "rerope,window=8"])
def test_axes_that_differ_have_no_length_for_a_dynamic_scaling(spec: str) -> None:
    model = small_model("qwen3_vl")
    patch_model(model, spec)
    base, positions = base_model(model), _positions_of_an_image()
    ids = torch.randint(3, 200, (1, 17))
    with pytest.raises(ConfigError, match="position_ids: their axes differ"):
        base(input_ids=ids, position_ids=positions)
    if "dynamic" not in spec:
        return
    same = torch.arange(17)[None].expand(3, 1, -1)
    with torch.no_grad():
        assert torch.equal(
            base(input_ids=ids, position_ids=same).last_hidden_state, base(input_ids=ids).last_hidden_state
        )


@pytest.mark.parametrize("model_type", ["llama", "llama4_text", "gemma3_text", "qwen3_vl"])
@pytest.mark.parametrize("scaling", ["yarn:4", "dynamic-yarn"])
def test_a_model_on_meta_computes_with_weights_that_are_handed_to_it(model_type: str, scaling: str) -> None:
    """By `functional_call`, and by `load_state_dict(assign=True)`; both move no plain attributes."""
    model = small_model(model_type)
    ids = torch.randint(3, 60, (1, 48), generator=torch.Generator().manual_seed(0))
    plain = model(input_ids=ids, use_cache=False).logits.detach()
    patch_model(model, scaling, kernel="none")
    wanted = model(input_ids=ids, use_cache=False).logits.detach()
    empty = copy.deepcopy(model).to("meta")
    if model_type == "llama":  # others do not come through it without a patch either
        given = dict(model.named_parameters()), dict(model.named_buffers())
        call: Any = torch.func.functional_call
        assert torch.equal(call(empty, given, (ids,), {"use_cache": False}).logits, wanted)
    empty.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        owner, _, leaf = name.rpartition(".")
        empty.get_submodule(owner)._buffers[leaf] = buffer
    assert torch.equal(empty(input_ids=ids, use_cache=False).logits, wanted)
    unpatch_model(empty)
    assert torch.equal(empty(input_ids=ids, use_cache=False).logits, plain)


def test_rows_of_own_tables_have_their_own_scale() -> None:
    """Complex tables under a dynamic scaling: a row's depend on its own length only."""
    model = small_model("llama4_text")
    patch_model(model, "dynamic-yarn")
    rotary: Any = rotary_places(base_model(model))[0].module
    long, short = torch.arange(100)[None], torch.arange(100)[None].clamp(max=70)
    x = torch.zeros(2, 100, 1)
    both = rotary(x, torch.cat((long, short)))
    assert both.is_complex() and not torch.equal(both[0], both[1])
    assert torch.equal(both[:1], rotary(x, long)) and torch.equal(both[1:], rotary(x, short))


@pytest.mark.skipif("mistral_large4" not in MODEL_TYPES, reason="a release of transformers without this family")
def test_learned_factors_stay_weights_of_the_module() -> None:
    model = small_model("mistral_large4")
    keys = list(model.state_dict())
    weight = rotary_places(base_model(model))[0].module.get_parameter("alpha")
    patch_model(model, "yarn:4")
    rotary: Any = rotary_places(base_model(model))[0].module
    assert list(model.state_dict()) == keys and rotary.alpha is weight
    x, positions = torch.zeros(1, 4, 1), torch.arange(4)[None]
    before, _ = rotary(x, positions)
    with torch.no_grad():
        weight.fill_(0.5)
    after, _ = rotary(x, positions)
    assert not torch.equal(before, after)
    after.sum().backward()
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "ernie4_5_vl_moe", "llama4_text"])
def test_the_kernel_is_not_put_where_the_family_makes_whole_tables(model_type: str) -> None:
    model = small_model(model_type)
    with pytest.raises(ConfigError, match="kernel='torch': not for this .* its rotary tables have a form of their own"):
        patch_model(model, "yarn:4", kernel="torch")


def test_a_compiled_model_with_own_tables_computes_the_same() -> None:
    model = small_model("llama4_text", num_hidden_layers=1, layer_types=["chunked_attention"], no_rope_layers=[1])
    ids = torch.randint(3, 200, (1, 100), generator=torch.Generator().manual_seed(0))
    patch_model(model, "yarn:4")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for spec in ("yarn:4", "linear:2"):
            patch_model(model, spec)
            wanted = model(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, wanted, rtol=0, atol=1e-4)
