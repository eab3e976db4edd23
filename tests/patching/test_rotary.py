"""The rotary modules: tables, casts, and rows of different length."""

from __future__ import annotations

import pytest
import torch

from scaled_rope import RopeScaling, compute_rope, patch_model
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
