"""Attention in regions out of plain attention calls, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scaled_rope.attention.composed import Attend, composed_attention, flash, is_composable, pieces
from scaled_rope.attention.regions import Regions, dual_chunk, region_attention, rerope, self_extend
from tests.helpers.region_definitions import INV_FREQ, METHODS, NOISE, Distance, heads, oracle


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Writes down the calls of a kernel."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * q @ k.mT
    if causal:
        assert q.shape[2] == k.shape[2]
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("attend", [plain, flash])
@pytest.mark.parametrize(("regions", "distance", "log_length"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_pieces_of_plain_attention_make_up_the_definition(
    regions: Regions, distance: Distance, log_length: int | None, attend: Attend
) -> None:
    for length in (1, 3, 17, 24, 61, 75):
        q, k, v = heads(length, length)
        wanted = oracle(q, k, v, distance, 0.4, log_length)
        found = composed_attention(q, k, v, torch.tensor(INV_FREQ), regions, 0.4, attend)
        assert (found - wanted).abs().max() < NOISE, length


@pytest.mark.parametrize(("regions", "distance", "log_length"), [m[1:] for m in METHODS], ids=[m[0] for m in METHODS])
def test_every_pair_is_in_one_piece(regions: Regions, distance: Distance, log_length: int | None) -> None:
    for length in (1, 2, 24, 61):
        count = torch.zeros(length, length, dtype=torch.long)
        for piece in pieces(regions, length):
            block = torch.ones(len(piece.queries), len(piece.keys), dtype=torch.long)
            asking, seen = (span.of(torch.arange(length)[None, None])[0, 0] for span in (piece.queries, piece.keys))
            count[asking[:, None], seen] += block.tril() if piece.causal else block
        assert torch.equal(count, torch.ones_like(count).tril())


def test_merging_in_bfloat16_loses_what_bfloat16_does() -> None:
    # Heads wide enough for a GPU's kernel; outputs of some 1 are rounded by up to 2^-9 each of three times.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 300, 64, generator=generator).bfloat16() for h in (4, 2, 2))
    for regions in (rerope(64), self_extend(4, 48), dual_chunk(96, 128)):
        wanted = region_attention(q.double(), k.double(), v.double(), torch.tensor(INV_FREQ), regions, 0.125)
        for attend in (plain, flash):
            found = composed_attention(q, k, v, torch.tensor(INV_FREQ), regions, 0.125, attend)
            assert found.dtype == torch.bfloat16 and (found.double() - wanted).abs().max() < 0.03
    assert not is_composable(q, k, v)  # on a CPU, regions are computed at once
