"""The rotary kernel: torch's twin and Triton (on a GPU, or in its interpreter) against float64, and as an operator."""

from __future__ import annotations

import importlib.util
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scaled_rope import ConfigError
from scaled_rope.kernels import (
    apply_rotary,
    apply_rotary_from_frequencies,
    frequency_phases,
    kernel_backend,
    packed_position_ids,
    rotate,
)
from scaled_rope.kernels import rotary as rotary_module
from tests.helpers.cases import in_turn

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no triton"))
BACKENDS = ["torch", TRITON]
POSITIONS, FACTOR = 300, 1.3

# An output is a·cos - b·sin, with |a|, |b| <= 5 or so and a factor of 1.3: up to 10. float32: two products, a sum, and
# tables with an error of 2^-24 each, so 4 roundings of up to 10 * 2^-24 = 2.4e-6 in all. Half precision: the same
# and one rounding of the result, half a unit in the last place; the interpreter truncates to bf16, a whole unit: 2^-7
# of the power of two below, so of the value at most. fp16: 2^-11.
ABSOLUTE = 2.5e-6
RELATIVE = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11, torch.float64: 0.0}


def frequencies(half: int) -> Tensor:
    return torch.tensor([1e4 ** (-i / half) for i in range(half)], dtype=torch.float64, device=DEVICE)


def tables(half: int, positions: int = POSITIONS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions, dtype=torch.float64, device=DEVICE)[:, None] * frequencies(half)
    return (angles.cos() * FACTOR).to(dtype), (angles.sin() * FACTOR).to(dtype)


def reference(x: Tensor, positions: Tensor, half: int, interleaved: bool = False, factor: float = FACTOR) -> Tensor:
    """x [B, H, T, D] rotated at positions [B, T], one pair of dimensions at a time in float64."""
    result = x.double().clone()
    for i, frequency in enumerate(frequencies(half).tolist()):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        angle = positions.double()[:, None] * frequency
        cos, sin = factor * angle.cos(), factor * angle.sin()
        a, b = x[..., first].double(), x[..., second].double()
        result[..., first], result[..., second] = a * cos - b * sin, b * cos + a * sin
    return result


def check(result: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype == dtype
    assert bool(((result.double() - wanted).abs() <= ABSOLUTE + RELATIVE[dtype] * wanted.abs()).all())


def make(shape: tuple[int, ...], order: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random [B, H, T, D] (D last in memory unless `order` says so), of the given order of axes in memory."""
    sizes = dict(zip("bhtd", shape, strict=True))
    x = torch.randn([sizes[axis] for axis in order.strip("+")], device=DEVICE).to(dtype)
    if order.endswith("+"):  # a part of a larger tensor, as a fused projection gives
        x = torch.cat((x, x), dim=-1)[..., : x.shape[-1]]
    return x.permute(*(order.index(axis) for axis in "bhtd"))


# B, query heads, key heads, T, head_dim, rotated; few and many, powers of two and not, whole and part
SHAPES = [(2, 4, 2, 5, 16, 16), (1, 9, 3, 7, 24, 24), (3, 2, 2, 3, 20, 6), (1, 8, 8, 1, 8, 8), (2, 1, 1, 33, 4, 2)]


ORDERS = ["bhtd", "bthd", "tbhd", "bthd+", "dbth"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "order"), in_turn(SHAPES, ORDERS, each=3))
def test_equals_float64_in_every_layout(backend: str, shape: tuple[int, ...], order: str) -> None:
    b, heads, kv_heads, t, d, rotated = shape
    torch.manual_seed(0)
    for dtype, interleaved, position in ((torch.float32, False, "ids"), (torch.bfloat16, True, "offset")):
        q, k = make((b, heads, t, d), order, dtype), make((b, kv_heads, t, d), order, dtype)
        cos, sin = tables(rotated // 2)
        offset = 17 if position == "offset" else 0
        ids = torch.randint(POSITIONS, (b, t), device=DEVICE) if position == "ids" else None
        at = torch.arange(t, device=DEVICE).expand(b, t) + offset if ids is None else ids
        options: dict[str, Any] = {"offset": offset, "interleaved": interleaved, "backend": backend}
        wanted = reference(q, at, rotated // 2, interleaved), reference(k, at, rotated // 2, interleaved)
        given = q.clone(), k.clone()
        out = apply_rotary(q, k, cos, sin, ids, **options)
        assert torch.equal(q, given[0]) and torch.equal(k, given[1])
        for result, right in zip(out, wanted, strict=True):
            check(result, right, dtype)
        free = apply_rotary_from_frequencies(
            q, k, frequency_phases(frequencies(rotated // 2)), ids, attention_factor=FACTOR, **options
        )
        for result, right in zip(free, wanted, strict=True):
            check(result, right, dtype)
        # Token by token, heads behind tokens, in place: the same numbers.
        gathered = cos[at], sin[at]
        transposed = apply_rotary(
            q.transpose(1, 2), k.transpose(1, 2), *gathered, interleaved=interleaved, heads_first=False, backend=backend
        )
        apply_rotary(q, k, cos, sin, ids, inplace=True, **options)
        for result, same, changed in zip(out, transposed, (q, k), strict=True):
            assert torch.equal(result, same.transpose(1, 2)) and torch.equal(result, changed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_keeps_the_order_in_memory(backend: str) -> None:
    q, k = make((2, 4, 5, 8), "bthd"), make((2, 2, 5, 8), "bhtd")
    out = apply_rotary(q, k, *tables(4), backend=backend)
    assert [x.stride() for x in out] == [q.stride(), k.stride()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_documents(backend: str) -> None:
    """The tokens of uneven documents in a line equal each document alone."""
    lengths = [5, 1, 9, 2]
    cu_seqlens = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32, device=DEVICE)
    torch.manual_seed(0)
    q, k, (cos, sin) = torch.randn(17, 4, 8, device=DEVICE), torch.randn(17, 2, 8, device=DEVICE), tables(4)
    ids = packed_position_ids(cu_seqlens, 17)
    assert ids.tolist() == [[position for length in lengths for position in range(length)]]
    packed = apply_rotary(q, k, cos, sin, ids.int(), backend=backend)
    assert packed[0].shape == q.shape
    for start, length in zip(cu_seqlens.tolist(), lengths, strict=False):
        alone = apply_rotary(q[start : start + length], k[start : start + length], cos, sin, backend=backend)
        for whole, part in zip(packed, alone, strict=True):
            assert torch.equal(whole[start : start + length], part)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_beyond_a_million(backend: str) -> None:
    """Without tables angles are exact wherever they are; a float32 product of position and frequency is not."""
    half = 8
    positions = torch.tensor([[0, 1, 2**17, 10**6 + 1, 2**24 + 3, 2**31 + 7, -5]], device=DEVICE)
    x = torch.randn(1, 2, positions.shape[1], 2 * half, device=DEVICE)
    phases = frequency_phases(frequencies(half))
    out, _ = apply_rotary_from_frequencies(x, x[:, :0], phases, positions, backend=backend)
    # In float64 an angle of 2^31 is known to 5e-7.
    assert (out.double() - reference(x, positions, half, factor=1.0)).abs().max() < 4e-6
    apart = torch.stack((phases, phases), dim=1)[:, 0]  # every second number in memory
    assert torch.equal(apply_rotary_from_frequencies(x, x[:, :0], apart, positions, backend=backend)[0], out)
    naive = positions[..., None].float() * frequencies(half).float()
    exact = positions[..., None].double() * frequencies(half)
    assert (naive.cos() - exact.cos())[:, 3:-1].abs().max() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_position_outside_the_table_is_not_a_number(backend: str) -> None:
    x = torch.ones(1, 1, 4, 8, device=DEVICE)
    ids = torch.tensor([[0, POSITIONS, POSITIONS - 1, -1]], device=DEVICE)
    out = rotate(x, *tables(4), ids, backend=backend)
    assert out.isnan().all(dim=-1).tolist() == [[[False, True, False, True]]]
    assert out.isnan().any(dim=-1).tolist() == [[[False, True, False, True]]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_that_need_64_bits(backend: str) -> None:
    """3 * 2^30 elements lie between the first token and the last; only the pages of four tokens are touched."""
    x = torch.empty(3 * 2**30 + 8, dtype=torch.float16, device=DEVICE).as_strided((1, 1, 4, 8), (8, 8, 2**30, 1))
    x.copy_(torch.randn(1, 1, 4, 8))
    check(rotate(x, *tables(4), backend=backend), reference(x, torch.arange(4, device=DEVICE)[None], 4), torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_equal_those_of_float64(backend: str, inplace: bool) -> None:
    """The factor is in the gradient once: d(out)/d(in) is factor · rotation."""
    torch.manual_seed(0)
    ids = torch.randint(POSITIONS, (2, 5), device=DEVICE)
    q, k = make((2, 4, 5, 12), "bthd").requires_grad_(), make((2, 2, 5, 12), "bthd").requires_grad_()
    weights = torch.randn(2, 4, 5, 12, device=DEVICE), torch.randn(2, 2, 5, 12, device=DEVICE)
    # times 1: in-place rotation needs something that is not a leaf
    out = apply_rotary(q * 1, k * 1, *tables(4), ids, inplace=inplace, backend=backend)
    found = torch.autograd.grad((out[0] * weights[0]).sum() + (out[1] * weights[1]).sum(), (q, k))
    right = torch.autograd.grad(
        sum((reference(x, ids, 4) * w.double()).sum() for x, w in zip((q, k), weights, strict=True)), (q, k)
    )
    for gradient, wanted in zip(found, right, strict=True):
        check(gradient, wanted.double(), torch.float32)
    # one of the two alone
    (alone,) = torch.autograd.grad(apply_rotary(q.detach() * 1, k * 1, *tables(4), ids, backend=backend)[1].sum(), k)
    (wanted,) = torch.autograd.grad(reference(k, ids, 4).sum(), k)
    check(alone, wanted.double(), torch.float32)


@pytest.mark.parametrize("options", [{}, {"inplace": True}, {"interleaved": True, "heads_first": False}])
def test_gradcheck(options: dict[str, Any]) -> None:
    ids = torch.randint(POSITIONS, (2, 3), device=DEVICE)
    shape = (2, 3, 2, 10) if options.get("heads_first") is False else (2, 2, 3, 10)
    q, k = (torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for _ in range(2))

    def run(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary(q * 1, k * 1, *tables(4, dtype=torch.float64), ids, backend="torch", **options)

    assert torch.autograd.gradcheck(run, (q, k))
    if not options.get("inplace"):
        assert torch.autograd.gradgradcheck(run, (q, k))


@pytest.mark.parametrize("backend", BACKENDS)
def test_laws(backend: str) -> None:
    torch.manual_seed(0)
    q, k, (cos, sin) = make((1, 2, 6, 8), "bhtd"), make((1, 2, 6, 8), "bhtd"), tables(4)
    there = apply_rotary(q, k, cos, sin, backend=backend)
    back = apply_rotary(*there, cos, sin, inverse=True, backend=backend)
    for x, again in zip((q, k), back, strict=True):
        assert (again - FACTOR**2 * x).abs().max() < 1e-5  # two rotations of at most 10 at 2.4e-6 each, and a factor
    # Scores depend on distances alone.
    moved = apply_rotary(q, k, cos, sin, offset=40, backend=backend)
    scores = [a @ b.transpose(-1, -2) for a, b in (there, moved)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4  # sums of 8 products of up to 50 at 2^-24 each, and of 2.4e-6


def _arguments(backend: str) -> tuple[Any, ...]:
    torch.manual_seed(0)
    ids = torch.randint(POSITIONS, (2, 3), device=DEVICE)
    q, k = make((2, 4, 3, 12), "bthd"), make((2, 2, 3, 12), "bhtd")
    return q, k, *tables(4), None, ids, 0, 1.0, True, False, False, backend


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator(backend: str) -> None:
    q, k, *more = _arguments(backend)
    torch.library.opcheck(torch.ops.scaled_rope.rotary_.default, (q, k, *more))
    for x in (q, k):
        x.requires_grad_()
    torch.library.opcheck(torch.ops.scaled_rope.rotary.default, (q, k, *more))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_without_a_break(inplace: bool) -> None:
    """Forward and backward in one graph, under activation checkpointing as well."""
    q, k, cos, sin, _, ids, *_ = _arguments("torch")

    def rotated(q: Tensor, k: Tensor) -> Tensor:
        a, b = apply_rotary(q * 2, k * 2, cos, sin, ids, inplace=inplace)
        return a.pow(2).sum() + b.pow(3).sum()

    def checkpointed(q: Tensor, k: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(rotated, q, k, use_reentrant=False)

    results = []
    torch.compiler.reset()  # models of other tests count towards the limit of recompilations
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    for run in (rotated, compiled):
        inputs = q.clone().requires_grad_(), k.clone().requires_grad_()
        value = run(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs)))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(eager, graph)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (2, 2, 4, 12)}, "k of shape"),
        ({"k_dtype": torch.float16}, "k: torch.float16"),
        ({"q": (3, 12)}, "q, k: must have 3 or 4"),
        ({"width": 7}, "rotate 14 dimensions"),
        ({"table_dtype": torch.bfloat16}, "cos, sin: must be torch.float32"),
        ({"grad": True}, "must not require a gradient"),
        ({"offset": POSITIONS}, "offset=300"),
        ({"ids": (2, 4)}, "position_ids: must be integers"),
        ({"by_token": True, "offset": 1}, "offset: have no meaning"),
        ({"backend": "tritn"}, "unknown kernel backend 'tritn'; did you mean 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    q = torch.zeros(change.get("q", (2, 4, 3, 12)), device=DEVICE)
    k = torch.zeros(change.get("k", (2, 2, 3, 12)), device=DEVICE, dtype=change.get("k_dtype"))
    cos, sin = tables(change.get("width", 4), dtype=change.get("table_dtype", torch.float32))
    if change.get("grad"):
        cos = cos.requires_grad_()
    if change.get("by_token"):
        cos, sin = cos[None, :3], sin[None, :3]
    ids = torch.zeros(change["ids"], dtype=torch.long, device=DEVICE) if "ids" in change else None
    with pytest.raises(ConfigError, match=message):
        apply_rotary(q, k, cos, sin, ids, offset=change.get("offset", 0), backend=change.get("backend", "auto"))


def test_backend_is_chosen_and_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("SCALED_ROPE_KERNEL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rotary_module._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="scaled_rope"):
        assert kernel_backend("cpu") == kernel_backend("cpu") == "torch"
    assert [record.getMessage() for record in caplog.records] == ["rotary kernel on cpu: torch"]
    monkeypatch.setenv("SCALED_ROPE_KERNEL", "triton")
    for backend in ("auto", "triton"):
        with pytest.raises(ConfigError, match="triton.* needs"):
            kernel_backend("cpu", backend)
    assert kernel_backend("cpu", "torch") == "torch"  # what is asked for by name goes before the environment
    monkeypatch.setenv("SCALED_ROPE_KERNEL", "cuda")
    said = "SCALED_ROPE_KERNEL=cuda: unknown kernel backend 'cuda'; known: auto, none, torch, triton"
    with pytest.raises(ConfigError, match=f"^{said}$"):
        kernel_backend("cpu")
    with pytest.raises(ConfigError, match="^unknown kernel backend 'cuda'; known: auto, torch, triton$"):
        kernel_backend("cpu", "cuda")


def test_phases_are_fractions_of_a_turn() -> None:
    phases = frequency_phases(torch.tensor([2 * math.pi / 4, 2 * math.pi * 0.75, 0.0], dtype=torch.float64))
    assert phases.tolist() == [2**62, -(2**62), 0]
