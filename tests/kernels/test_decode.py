"""Attention over keys that are rotated while they are read: both backends against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaled_rope.errors import ConfigError
from scaled_rope.kernels import DecodeAngles, rotary_decode
from scaled_rope.kernels.decode import BLOCK

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return str(request.param)


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, inv_freq: Tensor, at: Tensor, first: Tensor, seen: Tensor,
    factor: Tensor, interleaved: bool,
) -> Tensor:  # fmt: skip
    """softmax(q·k/√D)v in float64, everything rotated beforehand; seen [B or 1, 1, Q, K]."""
    query, key, value = query.double(), key.double(), value.double()
    half = inv_freq.shape[-1]

    def rotated(x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.double()[:, None, :, None] * inv_freq.double()[:, None, None, :]
        cos, sin = (table * factor.double()[:, None, None, None] for table in (angles.cos(), angles.sin()))
        out = x.clone()
        for d in range(half):
            one, other = (2 * d, 2 * d + 1) if interleaved else (d, d + half)
            out[..., one] = x[..., one] * cos[..., d] - x[..., other] * sin[..., d]
            out[..., other] = x[..., other] * cos[..., d] + x[..., one] * sin[..., d]
        return out

    query, key = rotated(query, at), rotated(key, first[:, None] + torch.arange(key.shape[2]))
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value).transpose(1, 2)


SHAPES = {
    "one query, grouped heads, blocks and a rest": (2, 6, 2, 1, BLOCK + 188, 16, 8, False),
    "some queries, interleaved, a part of the head": (1, 4, 4, 3, 130, 32, 8, True),
    "rows of their own, odd width": (2, 4, 1, 2, 65, 24, 12, False),
    "one row, in stretches that are merged": (1, 2, 1, 1, 150, 16, 8, False),
    "one key": (1, 2, 1, 1, 1, 16, 8, False),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_over_rotated_keys(backend: str, shape: str) -> None:
    batch, heads, key_heads, count, keys, width, half, interleaved = SHAPES[shape]
    interpreted = backend == "triton" and DEVICE.type == "cpu"
    keys = min(keys, 150) if interpreted else keys  # it is slow
    torch.manual_seed(0)
    query = torch.randn(batch, heads, count, width)
    key, value = torch.randn(batch, key_heads, keys, width), torch.randn(batch, key_heads, keys, width)
    # At positions around 100,000, where a product in float32 would be off by 0.006 radians.
    first = torch.tensor([100_000, -7][:batch])
    inv_freq, factor = torch.rand(batch, half), torch.tensor([1.2, 0.9][:batch])
    at = first[:, None] + torch.arange(keys - count, keys)
    seen = (torch.arange(keys)[None] <= torch.arange(keys - count, keys)[:, None])[None, None]
    mask = None
    if batch == 2:
        mask = seen = seen & (first[:, None] + torch.arange(keys) >= 0)[:, None, None]
    wanted = by_definition(query, key, value, inv_freq, at, first, seen, factor, interleaved)
    given = [None if x is None else x.to(DEVICE) for x in (query, key, value, inv_freq, at, first, mask)]
    angles = DecodeAngles(*given[3:6], factor.to(DEVICE))
    for first_mask in [given[6]] if mask is None else [given[6], torch.where(given[6], 0.0, -torch.inf)]:
        found = rotary_decode(*given[:3], angles, first_mask, interleaved=interleaved, backend=backend)
        # Weighted means of values near 1, with scores near 5 that are off by a few 1e-7.
        assert found.shape == wanted.shape and float((found.cpu().double() - wanted).abs().max()) < 3e-6
    # The interpreter cannot multiply matrices in bfloat16.
    dtype = torch.float16 if interpreted else torch.bfloat16
    half_precision = [x.to(DEVICE, dtype) for x in (query, key, value)]
    found = rotary_decode(*half_precision, angles, given[6], interleaved=interleaved, backend=backend)
    wanted = by_definition(*(x.cpu() for x in half_precision), inv_freq, at, first, seen, factor, interleaved)
    # bfloat16 rounds to 2^-9: rotated keys, weights and the result, each once.
    assert found.dtype == dtype and float((found.cpu().double() - wanted).abs().max()) < 0.03


def test_a_query_that_sees_no_key_disturbs_nothing(backend: str) -> None:
    torch.manual_seed(2)
    query, key = torch.randn(1, 2, 2, 16, device=DEVICE), torch.randn(1, 1, 8, 16, device=DEVICE)
    at, first = torch.tensor([[6, 7]], device=DEVICE), torch.tensor([0], device=DEVICE)
    angles = DecodeAngles(torch.rand(1, 8, device=DEVICE), at, first)
    mask = torch.ones(1, 1, 2, 8, dtype=torch.bool, device=DEVICE)
    mask[:, :, 0] = False
    found = rotary_decode(query, key, key, angles, mask, backend=backend)
    alone = rotary_decode(query, key, key, angles, mask | True, backend=backend)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 1], alone[:, 1], rtol=0, atol=1e-6)


def test_heads_that_fit_no_block_run_in_torch(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("triton")
    x, positions = torch.randn(1, 1, 1, 320, device=DEVICE), torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    angles = DecodeAngles(torch.rand(1, 160, device=DEVICE), positions, positions[0])
    with caplog.at_level("WARNING"):
        for _ in range(2):
            torch.testing.assert_close(rotary_decode(x, x, x, angles, backend="triton")[0], x[0])
    assert [record.message.split(":")[0] for record in caplog.records] == ["decoding"]
    assert "heads of 320 in torch.float32" in caplog.text


def test_strides_and_float64(backend: str) -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, 40, heads, 16).transpose(1, 2).to(DEVICE) for heads in (4, 2, 2))
    query = query[:, :, :2]
    inv_freq, at, first = torch.rand(1, 8, device=DEVICE), torch.tensor([[38, 39]]), torch.tensor([0])
    angles = DecodeAngles(inv_freq, at.to(DEVICE), first.to(DEVICE))
    found = rotary_decode(query, key, value, angles, backend=backend)
    copied = rotary_decode(*(x.contiguous() for x in (query, key, value)), angles, backend=backend)
    torch.testing.assert_close(found, copied, rtol=0, atol=1e-6)
    transposed = DecodeAngles(inv_freq.expand(2, -1).t().contiguous().t(), at.to(DEVICE), first.to(DEVICE))
    pair = [torch.cat((x, x)) for x in (query, key, value)]
    torch.testing.assert_close(rotary_decode(*pair, transposed, backend=backend)[:1], found, rtol=0, atol=1e-6)
    if backend == "torch":
        seen = (torch.arange(40)[None] <= at[0][:, None])[None, None]
        wanted = by_definition(query, key, value, inv_freq, at, first, seen, torch.ones(1), False)
        found = rotary_decode(query.double(), key.double(), value.double(), angles, backend=backend)
        assert float((found - wanted).abs().max()) < 3e-6  # its angles are those of float32


def test_what_does_not_fit_is_refused() -> None:
    x, inv_freq = torch.zeros(1, 4, 2, 16), torch.zeros(1, 8)
    places = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    for query, key, frequencies, mask, word in (
        (x, x[:, :3], inv_freq, None, "multiple"),
        (x, x[..., :8], inv_freq, None, "Hkv"),
        (x, x.double(), inv_freq, None, "dtypes"),
        (x, x, torch.zeros(1, 9), None, "inv_freq"),
        (x, x, inv_freq, torch.zeros(1, 1, 2, 3), "mask"),
    ):
        with pytest.raises(ConfigError, match=word):
            rotary_decode(query, key, key, DecodeAngles(frequencies, *places), mask)
