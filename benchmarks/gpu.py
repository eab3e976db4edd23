"""The rotary kernel and whole models on one GPU: is it right, how fast is it, how near to what the hardware allows.

    python benchmarks/gpu.py --part rotary       # also: rotary-backward, decode, attention, prefill, train; < 9 minutes
    python benchmarks/gpu.py --part train        # again: goes on where the time was up
    python benchmarks/gpu.py --interpret                # correctness alone, on the CPU, in Triton's interpreter
    python benchmarks/gpu_report.py                     # tables and plots for docs/performance.md from the rows

Needs torch, triton and transformers; Liger and flash-attn are measured where they can be imported.

Every variant is first compared with float64 on fresh random inputs, its outputs landing in memory that was filled with
NaN; one that is wrong is not timed. Timings rotate among buffers of more than the L2 cache, in a CUDA graph where a
call is short, and are medians with quartiles. Bandwidth counts q and k, read once and written once, whatever else a
variant moves, and stands beside a device-to-device copy of as many bytes, timed in the same way in the same run.

Exit code 1 when a variant of ours is wrong, 2 without a GPU.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a GPU image need not have the package installed

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError

Row = dict[str, Any]
Pair = tuple[Any, Any]
"""Queries and keys, or their gradients."""

PARTS = ("rotary", "rotary-backward", "decode", "attention", "prefill", "train")
OUTPUT = ROOT / "benchmarks" / "results" / "gpu.jsonl"
DEVICE = "cuda"
ROTATED_BYTES = 2**28
"""Inputs to rotate among: five times the L2 cache of an H100."""
RUNS = 20, 500
"""Fewest and most timings of which the median is taken; three where a call takes seconds."""
SHORT_BYTES = 2**26
"""Calls that move less than this are timed in a CUDA graph."""
HEAD_START_CYCLES = 1_000_000
"""How long the GPU spins before a timed call, half a millisecond, so that the call is queued when its turn comes."""
THETA = 10000.0
NO_TIME = "no time left"

# bf16 rounds with a relative error of up to 2^-9, so 1.1e-3 in the mean square; variants that round cos, sin and each
# product have about twice that, three times with sums. A wrong angle makes 1e-1 and more.
TOLERANCE = 8e-3
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 rates from data sheets, by a word of the device's name."""


# -------------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    """Attention of a model: query heads, key heads, head_dim, rotated dimensions."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    documents: bool = False
    """Whether the tokens are those of uneven documents in a line."""

    def elements(self, tokens: int) -> int:
        return tokens * (self.heads + self.kv_heads) * self.head_dim


SHAPES = (
    Shape("Llama-2-7B", 32, 32, 128, 128),
    Shape("Llama-3-8B", 32, 8, 128, 128),
    Shape("SmolLM2-135M", 9, 3, 64, 64),
    Shape("Phi-2, 32 of 80", 32, 32, 80, 32),
    Shape("Llama-3-8B, packed", 32, 8, 128, 128, documents=True),
)
TOKENS = (131072, 1048576, 32768, 4096, 32, 1)
"""The most telling first, should time run out."""


@dataclass
class Inputs:
    """What a call needs. q, k: [1, H, T, D] views of token-major memory, as projections give them."""

    q: Any
    k: Any
    cos: Any
    """float32 [T, R/2] by position; `wide_cos` is [1, T, R] in the inputs' dtype, as models make it."""
    sin: Any
    wide_cos: Any
    wide_sin: Any
    phases: Any
    position_ids: Any


def document_positions(tokens: int) -> list[int]:
    """Where documents of uneven length begin in a row of `tokens`: lengths 1, 3, 9, … up to a third of the row."""
    bounds, length = [0], 1
    while bounds[-1] < tokens:
        bounds.append(min(bounds[-1] + length, tokens))
        length = length * 3 if length * 9 < tokens else 1
    return bounds


def make_inputs(shape: Shape, tokens: int, dtype: Any, device: Any) -> Inputs:
    import torch

    from scaled_rope.kernels import frequency_phases, packed_position_ids

    half = shape.rotary_dim // 2
    inv_freq = THETA ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
    ids = None
    positions = torch.arange(tokens, device=device)
    if shape.documents:
        bounds = torch.tensor(document_positions(tokens), device=device)
        ids = packed_position_ids(bounds, tokens)
        positions = ids[0]
    by_position = [torch.empty(tokens, half, dtype=torch.float32, device=device) for _ in range(2)]
    wide = [torch.empty(1, tokens, 2 * half, dtype=dtype, device=device) for _ in range(2)]
    for start in range(0, tokens, 2**16):  # float64 in pieces
        piece = slice(start, start + 2**16)
        angles = torch.arange(tokens, device=device)[piece, None] * inv_freq
        used = positions[piece, None] * inv_freq
        for table, row, function in zip(by_position, wide, (torch.cos, torch.sin), strict=True):
            table[piece] = function(angles)
            row[0, piece] = function(used).repeat(1, 2).to(dtype)
    q, k = (
        torch.randn(1, tokens, heads, shape.head_dim, dtype=dtype, device=device).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads)
    )
    return Inputs(q, k, *by_position, *wide, frequency_phases(inv_freq), ids)


# ------------------------------------------------------------------------------------------------------------ variants


def eager(q: Any, k: Any, cos: Any, sin: Any) -> Pair:
    """As families of transformers do it, those with a partial rotary width by splitting and joining."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    width = cos.shape[-1]
    if width == q.shape[-1]:
        result: Pair = apply_rotary_pos_emb(q, k, cos, sin)
        return result
    rotated = apply_rotary_pos_emb(q[..., :width], k[..., :width], cos, sin)
    return tuple(torch.cat((a, x[..., width:]), dim=-1) for a, x in zip(rotated, (q, k), strict=True))  # type: ignore


Variant = Callable[[Any, Any, Inputs], Pair]


def variants(shape: Shape, backend: str = "triton", others: bool = True) -> dict[str, Variant]:
    """What rotates, by name; only what is installed and takes the shape."""
    import torch

    from scaled_rope.kernels import apply_rotary, apply_rotary_from_frequencies

    found: dict[str, Variant] = {
        "ours, tables": lambda q, k, x: apply_rotary(q, k, x.cos, x.sin, x.position_ids, backend=backend),
        "ours, no tables": lambda q, k, x: apply_rotary_from_frequencies(
            q, k, x.phases, x.position_ids, backend=backend
        ),
        "ours, in place": lambda q, k, x: apply_rotary(
            q, k, x.cos, x.sin, x.position_ids, inplace=True, backend=backend
        ),
    }
    if not others:
        return found
    torch.compiler.reset()  # what it made for other shapes counts towards its limit
    compiled = torch.compile(eager, dynamic=False)
    found["transformers, eager"] = lambda q, k, x: eager(q, k, x.wide_cos, x.wide_sin)
    found["transformers, compiled"] = lambda q, k, x: compiled(q, k, x.wide_cos, x.wide_sin)
    whole = shape.rotary_dim == shape.head_dim
    if importlib.util.find_spec("liger_kernel") and whole:
        from liger_kernel.transformers.rope import liger_rotary_pos_emb

        found["Liger"] = lambda q, k, x: liger_rotary_pos_emb(q, k, x.wide_cos, x.wide_sin)
    if importlib.util.find_spec("flash_attn") and not shape.documents:
        from flash_attn.layers.rotary import apply_rotary_emb

        def flash(q: Any, k: Any, x: Inputs) -> Pair:
            half = x.wide_cos.shape[-1] // 2
            cos, sin = x.wide_cos[0, :, :half], x.wide_sin[0, :, :half]
            a, b = (apply_rotary_emb(y.transpose(1, 2), cos, sin) for y in (q, k))
            return a.transpose(1, 2), b.transpose(1, 2)

        found["flash-attn"] = flash
    return found


# --------------------------------------------------------------------------------------------------------- correctness


def relative_error(out: Any, x: Any, inputs: Inputs, inverse: bool = False) -> float:
    """‖out - reference‖ / ‖reference‖ in float64, in pieces; x is what went in. NaN when anything was not written."""
    import torch

    half = inputs.cos.shape[-1]
    apart = total = 0.0
    for start in range(0, x.shape[2], 2**14):
        piece = slice(start, start + 2**14)
        rows = piece if inputs.position_ids is None else inputs.position_ids[0, piece]
        cos, sin = inputs.cos[rows].double(), inputs.sin[rows].double()
        sin = -sin if inverse else sin
        wanted = x[:, :, piece].double()
        a, b = wanted[..., :half], wanted[..., half : 2 * half]
        wanted = torch.cat((a * cos - b * sin, b * cos + a * sin, wanted[..., 2 * half :]), dim=-1)
        apart += float((out[:, :, piece].double() - wanted).square().sum())
        total += float(wanted.square().sum())
    return math.sqrt(apart / total)


def poison(*like: Any) -> None:
    """Leave memory full of NaN for the next tensors of these sizes: an element that nothing writes then shows."""
    import torch

    poisoned = [torch.full_like(x, math.nan) for x in like]
    del poisoned


def check(variant: Variant, shape: Shape, tokens: int, dtype: Any, device: Any, backward: bool) -> float:
    """The larger relative error of q and k, or of their gradients, on inputs of its own.

    What went in is drawn again and not kept: some variants overwrite it, and at a million tokens memory is short.
    """
    import torch

    seed = int(torch.randint(2**31, ()))
    torch.manual_seed(seed)
    x = make_inputs(shape, tokens, dtype, device)
    if not backward:
        poison(x.q, x.k)
        out = variant(x.q, x.k, x)
        torch.manual_seed(seed)
        x = make_inputs(shape, tokens, dtype, device)
        return max(relative_error(a, b, x) for a, b in zip(out, (x.q, x.k), strict=True))
    leaves = [x.q.requires_grad_(), x.k.requires_grad_()]
    # By 1, which is exact: in place needs something that is not a leaf.
    out = variant(leaves[0] * 1, leaves[1] * 1, x)
    torch.manual_seed(seed)
    gradients = [torch.randn(y.shape, dtype=dtype, device=device) for y in out]
    poison(*gradients)
    found = torch.autograd.grad(out, leaves, gradients)
    del leaves, out, gradients
    x.q = x.k = None
    torch.manual_seed(seed)
    given = [torch.randn(y.shape, dtype=dtype, device=device) for y in found]
    return max(relative_error(a, b, x, inverse=True) for a, b in zip(found, given, strict=True))


# -------------------------------------------------------------------------------------------------------------- timing


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(values)
    return tuple(ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))  # type: ignore[return-value]


def time_calls(calls: Sequence[Callable[[], Any]], short: bool, budget_s: float = 0.3) -> Row:
    """Seconds per call, by CUDA events, over calls that use buffers of their own.

    short: launches would be a good part of the time, so all calls are captured into one CUDA graph, whose replays are
    timed. Where that fails launches are in the time and the row says so.
    """
    import torch

    for call in calls:
        call()
    torch.cuda.synchronize()
    method, per_run = "events", 1
    runs: list[Callable[[], Any]] = list(calls)
    if short:
        try:
            graph = torch.cuda.CUDAGraph()
            # Backward passes run where their forward pass did, so that is where they are captured.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                kept = [call() for call in calls]  # outputs with memory of their own
            del kept
            runs, method, per_run = [graph.replay], "graph", len(calls)
        except Exception as error:  # whatever a library does that cannot be captured
            method = f"events, launches included ({type(error).__name__})"
            torch.cuda.synchronize()
    times: list[float] = []
    started = time.monotonic()
    while len(times) < RUNS[0] or (time.monotonic() - started < budget_s and len(times) < RUNS[1]):
        if len(times) >= 3 and time.monotonic() - started > 10 * budget_s:
            break  # calls of a second and more
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run = runs[len(times) % len(runs)]
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / per_run)
    low, median, high = quartiles(times)
    return {"seconds": median, "seconds_quartiles": [low, high], "runs": len(times), "timing": method}


def copy_time(elements: int, dtype: Any) -> Row:
    """A device-to-device copy of as many elements, timed like everything else."""
    import torch

    size = elements * dtype.itemsize
    sets = max(2, min(64, ROTATED_BYTES // size))
    source = torch.randn(sets, elements, dtype=dtype, device=DEVICE)
    target = torch.empty_like(source)
    calls = [partial(a.copy_, b) for a, b in zip(target, source, strict=True)]
    return time_calls(calls, short=2 * size < SHORT_BYTES)


def free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


class Clock:
    """Seconds that a part may take."""

    def __init__(self, limit: float) -> None:
        self.end = time.monotonic() + limit

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


# -------------------------------------------------------------------------------------------------------- rotary parts


def measure_rotary(backward: bool, clock: Clock) -> Iterator[Row]:
    """A row per shape, length and variant; beside it the copy of as many bytes."""
    import torch

    dtype, device = torch.bfloat16, torch.device(DEVICE)
    for tokens in TOKENS:
        for shape in SHAPES:
            if shape.documents and tokens < 4096:
                continue
            size = shape.elements(tokens) * dtype.itemsize
            copied = copy_time(shape.elements(tokens), dtype)
            free()
            for name, variant in variants(shape).items():
                if backward and name == "ours, in place":
                    continue  # the same as "ours, tables", a launch each for q and k
                row: Row = {
                    "metric": "rotary backward" if backward else "rotary forward",
                    "shape": shape.name,
                    "tokens": tokens,
                    "variant": name,
                    "bytes": 2 * size,
                    "copy_seconds": copied["seconds"],
                }
                if clock.left < 20:
                    yield row | {"skipped": NO_TIME}
                    continue
                try:
                    row["error"] = check(variant, shape, tokens, dtype, device, backward)
                    free()
                    if not row["error"] < TOLERANCE:
                        yield row | {"skipped": "wrong"}
                        continue
                    row |= time_rotary(variant, shape, tokens, dtype, backward)
                except torch.OutOfMemoryError:
                    yield row | {"skipped": "out of memory"}
                    continue
                finally:
                    free()
                row["bytes_per_second"] = row["bytes"] / row["seconds"]
                row["share_of_copy"] = copied["seconds"] / row["seconds"]
                yield row


def time_rotary(variant: Variant, shape: Shape, tokens: int, dtype: Any, backward: bool) -> Row:
    import torch

    size = shape.elements(tokens) * dtype.itemsize
    first = make_inputs(shape, tokens, dtype, torch.device(DEVICE))
    sets = max(1, min(64, ROTATED_BYTES // size))
    pairs = [(first.q, first.k)] + [(torch.randn_like(first.q), torch.randn_like(first.k)) for _ in range(sets - 1)]
    short = 2 * size < SHORT_BYTES
    if not backward:
        with torch.no_grad():
            return time_calls([partial(variant, q, k, first) for q, k in pairs], short)
    calls = []
    for q, k in pairs:
        out = variant(q.requires_grad_(), k.requires_grad_(), first)
        gradients = [torch.randn_like(x) for x in out]
        calls.append(partial(torch.autograd.grad, out, (q, k), gradients, retain_graph=True))
    return time_calls(calls, short)


# ------------------------------------------------------------------------------------------------------------ decoding

DECODED = (2048, 8192, 32768, 131072)
DECODE_SHAPES = ((1, 32, 8, 128), (8, 32, 8, 128), (1, 9, 3, 64))
"""Rows, query heads, key heads, head_dim."""


def decode_inputs(shape: tuple[int, int, int, int], keys: int, dtype: Any, device: Any) -> tuple[Any, ...]:
    """Unrotated query [B, H, 1, D], keys and values, and the angles of the last of `keys` tokens under YaRN x32."""
    import torch

    from scaled_rope import RopeScaling
    from scaled_rope.kernels import DecodeAngles
    from scaled_rope.scaling.frequencies import compute_rope

    batch, heads, key_heads, width = shape
    query = torch.randn(batch, heads, 1, width, dtype=dtype, device=device)
    key, value = (torch.randn(batch, key_heads, keys, width, dtype=dtype, device=device) for _ in range(2))
    inv_freq, factor = compute_rope(RopeScaling("yarn", 32.0, 4096), width, device=device)
    at, first = torch.tensor([[keys - 1]], device=device), torch.tensor([0], device=device)
    angles = DecodeAngles(inv_freq[None], at, first, factor)
    table = torch.arange(keys, device=device)[:, None] * inv_freq
    return query, key, value, angles, (table.cos() * factor)[None], (table.sin() * factor)[None]


def decode_variants(others: bool = True) -> dict[str, Callable[..., Any]]:
    """By name, functions of `decode_inputs` that give [B, 1, H, D]; those that don't rotate are the yardstick."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from scaled_rope.kernels import rotary_decode, rotate

    def ours(query: Any, key: Any, value: Any, angles: Any, *_: Any) -> Any:
        return rotary_decode(query, key, value, angles, backend="triton")

    def in_memory(query: Any, key: Any, value: Any, _: Any, cos: Any, sin: Any) -> Any:
        query = rotate(query, cos[:, -1:], sin[:, -1:])
        return sdpa(query, rotate(key, cos, sin), value, enable_gqa=True).transpose(1, 2)

    found: dict[str, Callable[..., Any]] = {"ours, rotates while it reads": ours}
    if not others:
        return found
    found["rotated in memory, then sdpa"] = in_memory
    found["sdpa, no rotation"] = lambda q, k, v, *_: sdpa(q, k, v, enable_gqa=True).transpose(1, 2)
    if importlib.util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        found["flash-attn, no rotation"] = lambda q, k, v, *_: flash_attn_with_kvcache(
            *(x.transpose(1, 2) for x in (q, k, v))
        )
    return found


def decode_error(
    run: Callable[..., Any], shape: tuple[int, int, int, int], keys: int, dtype: Any, device: Any
) -> float:
    """Mean square error, relative, to attention in float64 over keys that were rotated in float64."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from scaled_rope.kernels import rotate

    query, key, value, angles, cos, sin = decode_inputs(shape, keys, dtype, device)
    out = run(query, key, value, angles, cos, sin).double()
    q = rotate(query.double(), cos[:, -1:].double(), sin[:, -1:].double(), backend="torch")
    k = rotate(key.double(), cos.double(), sin.double(), backend="torch")
    wanted = sdpa(q, k, value.double(), enable_gqa=True).transpose(1, 2)
    return float((out - wanted).norm() / wanted.norm())


def measure_decode(clock: Clock, dtype: Any = None) -> Iterator[Row]:
    """A row per shape, number of keys and variant, by default in bf16; bytes are keys and values, read once."""
    import torch

    dtype, device = dtype or torch.bfloat16, torch.device(DEVICE)
    for keys in DECODED:
        for shape in DECODE_SHAPES:
            batch, _, key_heads, width = shape
            size = 2 * batch * key_heads * keys * width * dtype.itemsize
            copied = copy_time(size // dtype.itemsize // 2, dtype)  # reads and writes as many bytes in all
            for name, run in decode_variants().items():
                row: Row = {
                    "metric": "decode",
                    "shape": "B{} H{}/{} D{}".format(*shape),
                    "tokens": keys,
                    "variant": name,
                    "bytes": size,
                    "copy_seconds": copied["seconds"],
                }
                if clock.left < 20:
                    yield row | {"skipped": NO_TIME}
                    continue
                try:
                    if "no rotation" not in name:
                        row["error"] = decode_error(run, shape, min(keys, 4096), dtype, device)
                        if not row["error"] < TOLERANCE:
                            yield row | {"skipped": "wrong"}
                            continue
                    sets = [
                        decode_inputs(shape, keys, dtype, device) for _ in range(max(1, min(16, ROTATED_BYTES // size)))
                    ]
                    with torch.no_grad():
                        row |= time_calls([partial(run, *given) for given in sets], size < SHORT_BYTES)
                except torch.OutOfMemoryError:
                    yield row | {"skipped": "out of memory"}
                    continue
                finally:
                    free()
                row["bytes_per_second"] = size / row["seconds"]
                row["share_of_copy"] = copied["seconds"] / row["seconds"]
                yield row


# --------------------------------------------------------------------------------------- methods that change attention

ATTENDED = (8192, 32768, 131072)
ATTENTION_SHAPES = ((32, 8, 128), (9, 3, 64))
"""Query heads, key heads, head_dim, of one row of tokens."""
COMPARED = 12288
"""The most tokens of the comparison with float64: with windows of 4096 and chunks of 6144, every region of a method."""


def attention_inputs(shape: tuple[int, int, int], tokens: int, dtype: Any, device: Any) -> tuple[Any, Any, Any]:
    """q [1, H, T, D], k and v [1, K, T, D], not rotated."""
    import torch

    heads, key_heads, width = shape
    q = torch.randn(1, heads, tokens, width, dtype=dtype, device=device)
    k, v = (torch.randn(1, key_heads, tokens, width, dtype=dtype, device=device) for _ in range(2))
    return q, k, v


def attention_variants(width: int, device: Any) -> dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]]:
    """By name, functions of `attention_inputs` that attend causally, each with one that is right in float64.

    "composed" is what models on a GPU take in inference, "by blocks" what they take elsewhere and in training. The
    yardstick doesn't rotate, and is compared with nothing.
    """
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from benchmarks.attention_methods import ORIGINAL, SPECS
    from scaled_rope import RopeScaling
    from scaled_rope.attention.composed import composed_attention, flash
    from scaled_rope.attention.methods import attention_regions
    from scaled_rope.attention.regions import region_attention
    from scaled_rope.scaling.frequencies import compute_rope

    base = RopeScaling("default", original_max_position_embeddings=ORIGINAL, rope_theta=1e5)
    inv_freq = compute_rope(base, width, device=device)[0]
    found: dict[str, Any] = {"sdpa, no rotation": (partial(sdpa, is_causal=True, enable_gqa=True), None)}
    for spec in SPECS:
        regions = attention_regions(RopeScaling.from_spec(spec, base))
        given = {"inv_freq": inv_freq, "regions": regions, "scale": width**-0.5}
        blocks = partial(region_attention, **given)
        found[f"ours, {spec}, composed"] = (partial(composed_attention, attend=flash, **given), blocks)
        found[f"ours, {spec}, by blocks"] = (blocks, blocks)
    return found


def attention_error(
    run: Callable[..., Any], exact: Callable[..., Any], shape: tuple[int, int, int], tokens: int, dtype: Any
) -> float:
    """Mean square error, relative, to `exact` in float64."""
    import torch

    q, k, v = attention_inputs(shape, tokens, dtype, torch.device(DEVICE))
    wanted = exact(q.double(), k.double(), v.double())
    return float((run(q, k, v).double() - wanted).norm() / wanted.norm())


def measure_attention(clock: Clock, dtype: Any = None) -> Iterator[Row]:
    """A row per shape, length and variant, by default in bf16."""
    import torch

    dtype, device = dtype or torch.bfloat16, torch.device(DEVICE)
    for tokens in ATTENDED:
        for shape in ATTENTION_SHAPES:
            heads, key_heads, width = shape
            for name, (run, exact) in attention_variants(width, device).items():
                row: Row = {
                    "metric": "attention",
                    "shape": f"H{heads}/{key_heads} D{width}",
                    "tokens": tokens,
                    "variant": name,
                }
                if clock.left < 30:
                    yield row | {"skipped": NO_TIME}
                    continue
                try:
                    with torch.inference_mode():
                        if exact is not None:
                            row["error"] = attention_error(run, exact, shape, min(tokens, COMPARED), dtype)
                            if not row["error"] < TOLERANCE:
                                yield row | {"skipped": "wrong"}
                                continue
                        row |= time_model(partial(run, *attention_inputs(shape, tokens, dtype, device)))
                except torch.OutOfMemoryError:
                    yield row | {"skipped": "out of memory"}
                    continue
                finally:
                    free()
                row["flops"] = 2.0 * heads * width * tokens**2  # two products over half of all pairs
                row["tokens_per_second"] = tokens / row["seconds"]
                row["mfu"] = row["flops"] / row["seconds"] / peak if (peak := peak_flops()) else None
                yield row


# ------------------------------------------------------------------------------------------------------- whole models

MODELS: dict[str, dict[str, int]] = {
    "135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152,
    },
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
LENGTHS = (4096, 32768, 131072)
EAGER_LIMIT = 8192
CHECKED = 512
"""Tokens of the comparison with float64."""
KERNELS = ("none", "triton")
NOISE = 3.0
"""Allowed error in units of that of plain bf16, eager: another implementation rounds elsewhere, and may be unlucky."""


def build(name: str, device: Any, dtype: Any, seed: int = 0, **change: int) -> Any:
    """A Llama with random weights, rope_theta and original length as Llama 2 has them, scaled by YaRN to 128k."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(**(MODELS[name] | change), max_position_embeddings=4096, tie_word_embeddings=True)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def flops(config: Any, tokens: int) -> float:
    """Floating-point operations of one causal forward pass: two per weight and token, and attention's products."""
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    head_dim = config.hidden_size // heads
    kv = config.num_key_value_heads
    weights = config.hidden_size * head_dim * (2 * heads + 2 * kv) + 3 * config.hidden_size * config.intermediate_size
    return 2.0 * depth * weights * tokens + 2.0 * depth * heads * head_dim * tokens**2


def attentions() -> dict[str, tuple[str, list[Any]]]:
    """Implementations that can run, by name: what transformers calls them, and torch's own backends to allow."""
    import torch
    from torch.nn.attention import SDPBackend

    from scaled_rope.attention.backends import ATTENTIONS, resolve_attention

    found: dict[str, tuple[str, list[Any]]] = {
        "sdpa, flash": ("sdpa", [SDPBackend.FLASH_ATTENTION]),
        "sdpa, cuDNN": ("sdpa", [SDPBackend.CUDNN_ATTENTION]),
        "sdpa, efficient": ("sdpa", [SDPBackend.EFFICIENT_ATTENTION]),
    }
    for name in ATTENTIONS[1:]:
        try:
            resolve_attention(name, torch.device(DEVICE), "bfloat16")
        except ConfigError:
            continue
        found[name] = (name, [])
    return found


def with_attention(model: Any, attention: str, allowed: list[Any], run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` under an attention implementation, with torch's backends restricted where they are named."""
    from torch.nn.attention import sdpa_kernel

    model.set_attn_implementation(attention)

    def restricted() -> Any:
        with sdpa_kernel(allowed):
            return run()

    return restricted if allowed else run


def last_logits(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(tokens, use_cache=False, logits_to_keep=1).logits


def measure_prefill(clock: Clock) -> Iterator[Row]:
    """A row per model, length, attention and kernel. The longest length is for the two fastest at the one before."""
    import torch

    from scaled_rope import patch_model, unpatch_model

    device, dtype = torch.device(DEVICE), torch.bfloat16
    measured_rate = matmul_rate()
    for name in MODELS:
        tokens = torch.randint(0, MODELS[name]["vocab_size"], (1, max(LENGTHS)), device=device)
        checked = tokens[:, :CHECKED]
        exact = build(name, device, torch.float64)
        patch_model(exact, "yarn:32", kernel="none", attn="eager")
        wanted = last_logits(exact, checked)
        del exact
        free()
        model = build(name, device, dtype)
        patch_model(model, "yarn:32", kernel="none", attn="eager")

        error = partial(logits_error, model, checked, wanted)
        noise = error()
        speeds: dict[tuple[str, str], float] = {}
        for length in LENGTHS:
            fastest, speeds = sorted(speeds, key=speeds.__getitem__)[:2], {}
            for attention, (implementation, allowed) in attentions().items():
                for kernel in KERNELS:
                    if implementation == "eager" and length > EAGER_LIMIT:
                        continue
                    if length == max(LENGTHS) and (attention, kernel) not in fastest:
                        continue
                    row: Row = {
                        "metric": "prefill",
                        "model": name,
                        "tokens": length,
                        "attention": attention,
                        "kernel": kernel,
                        "matmul_flops_per_second": measured_rate,
                        "noise": noise,
                    }
                    if clock.left < 30:
                        yield row | {"skipped": NO_TIME}
                        continue
                    unpatch_model(model)
                    patch_model(model, "yarn:32", kernel=kernel)
                    try:
                        row["error"] = with_attention(model, implementation, allowed, error)()
                        if not row["error"] < NOISE * noise:
                            yield row | {"skipped": "wrong"}
                            continue
                        run = partial(last_logits, model, tokens[:, :length])
                        row |= time_model(with_attention(model, implementation, allowed, run))
                    except torch.OutOfMemoryError:
                        yield row | {"skipped": "out of memory"}
                        continue
                    except RuntimeError as problem:  # a backend of torch that does not take the shape
                        yield row | {"skipped": str(problem).splitlines()[0][:120]}
                        continue
                    finally:
                        free()
                    operations = flops(model.config, length)
                    row["tokens_per_second"] = length / row["seconds"]
                    row["flops"] = operations
                    row["mfu"] = operations / row["seconds"] / peak if (peak := peak_flops()) else None
                    speeds[attention, kernel] = row["seconds"]
                    yield row
        del model, error
        free()


def logits_error(model: Any, tokens: Any, wanted: Any) -> float:
    """Relative error of the last logits against float64 ones."""
    return float((last_logits(model, tokens).double() - wanted).norm() / wanted.norm())


def time_model(run: Callable[[], Any]) -> Row:
    import torch

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    timed = time_calls([run], short=False, budget_s=1.0)
    return timed | {"peak_bytes": torch.cuda.max_memory_allocated()}


# ------------------------------------------------------------------------------------------------------------ training

TRAINED = (8192, 16384, 32768, 65536, 131072)
STOCK = "transformers Trainer"
OURS: dict[str, Row] = {
    "ours": {},
    "ours, no gradient checkpointing": {"gradient_checkpointing": False},
    "ours, whole logits": {"loss": "whole"},
    "ours, chunked logits": {"loss": "chunked"},
    "ours, activations offloaded": {"offload_activations": True},
    "ours, lora": {"lora": True},
    "ours, no rotary kernel": {},
}
"""By name, how the recipe differs from its defaults."""
FIRST = ("ours", STOCK)
"""What is measured at all lengths of all models before anything else."""
_STEPS = 4
"""Steps of a measurement, the first of which is not counted."""


def training_recipe(name: str, length: int, **fields: Any) -> Any:
    """A recipe for a model of `MODELS` from random weights, with float32 weights and bf16 products."""
    from scaled_rope.recipes import make_recipe

    init = MODELS[name] | {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": True}
    common = {"name": name, "init": init, "tokenizer": "none", "dataset": "none", "output_dir": "none", "seed": 0}
    common |= {"scaling": "yarn:32", "sequence_length": length, "global_batch_size": 1, "max_train_steps": 1000}
    return make_recipe(common | fields, name)


def training_module(recipe: Any, kernel: str | None = None) -> tuple[Any, str, str]:
    """The recipe's model and loss on the device as finetune.py has them, and what "auto" made of attention and loss."""
    import torch

    from scaled_rope import patch_model, unpatch_model
    from scaled_rope.attention.backends import resolve_attention
    from scaled_rope.patching.loss import resolve_loss
    from scaled_rope.training.model import SummedLoss, build_model, enable_checkpointing

    device = torch.device(DEVICE)
    attention = resolve_attention(recipe.attention, device, recipe.compute_dtype)
    with device:
        model, _ = build_model(recipe, attention)
    if kernel is not None:
        unpatch_model(model)
        patch_model(model, recipe.scaling, kernel=kernel)
    loss = resolve_loss(recipe.loss, device, model)
    enable_checkpointing(model, recipe)
    model.config.use_cache = False
    return SummedLoss(model, recipe.offload_activations, loss), str(model.config._attn_implementation), loss


def summed_loss(module: Any, tokens: Any) -> Any:
    """The mean over targets of a row of tokens [1, T], under autocast as accelerate has it."""
    import torch

    weights = torch.ones_like(tokens[:, 1:], dtype=torch.float32)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        return module(tokens[:, :-1], tokens[:, 1:], weights) / weights.numel()


def stock_model(name: str) -> Any:
    """The same Llama as anyone would make it, YaRN by transformers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    scaling = {"rope_type": "yarn", "factor": 32.0, "rope_theta": THETA, "original_max_position_embeddings": 4096}
    config = LlamaConfig(
        **MODELS[name], max_position_embeddings=32 * 4096, rope_parameters=scaling, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()


def first_gradient(loss: Any, model: Any) -> Any:
    """Of the first layer's query projection, which all layers and the loss have gone into."""
    import torch

    weight = model.model.layers[0].self_attn.q_proj.weight
    return torch.autograd.grad(loss, weight)[0].double()


def time_ours(name: str, variant: str, tokens: Any, wanted: Any, noise: float) -> Row:
    """A row's measurements; first of all its gradient is compared with float32's, on the first `CHECKED` tokens."""
    from scaled_rope.training.loop import make_optimizer

    recipe = training_recipe(name, tokens.shape[1], **OURS[variant])
    module, attention, loss = training_module(recipe, "none" if variant.endswith("no rotary kernel") else None)
    row: Row = {"attention": attention, "loss": loss}
    if not recipe.lora:  # whose projections have other names and weights that are not trained
        found = first_gradient(summed_loss(module, tokens[:, :CHECKED]), module.model)
        row["error"] = float((found - wanted).norm() / wanted.norm())
        if not row["error"] < NOISE * noise:
            return row | {"skipped": "wrong"}
        del found
    optimizer = make_optimizer(recipe, module)

    def step() -> None:
        summed_loss(module, tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return row | time_model(step)


def time_stock(name: str, tokens: Any) -> Row:
    """Steps of transformers' own Trainer with bf16 and gradient checkpointing on, everything else as it comes."""
    import tempfile

    import torch
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    ends: list[float] = []

    class Timer(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            if not ends:
                torch.cuda.reset_peak_memory_stats()
            ends.append(time.perf_counter())

    class Rows(torch.utils.data.Dataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return _STEPS

        def __getitem__(self, index: int) -> Row:
            return {"input_ids": row, "labels": row}

    row = tokens[0].cpu()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder, max_steps=_STEPS, per_device_train_batch_size=1, bf16=True, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=DEVICE == "cpu", save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        try:
            Trainer(stock_model(name), settings, train_dataset=Rows(), callbacks=[Timer()]).train()
        finally:  # its precision would be that of everything that accelerate does in this process from now on
            AcceleratorState._reset_state(reset_partial_state=True)
    low, median, high = quartiles([after - before for before, after in zip(ends, ends[1:], strict=False)])
    timed = {"seconds": median, "seconds_quartiles": [low, high], "runs": len(ends) - 1, "timing": "steps, host clock"}
    return timed | {"peak_bytes": torch.cuda.max_memory_allocated(), "attention": "sdpa", "loss": "whole"}


def training_cases() -> list[tuple[str, int, str]]:
    """(model, length, variant) in the order in which they are measured."""
    others = [variant for variant in OURS if variant not in FIRST]
    return [(name, length, variant) for variants in (FIRST, others)
            for name in MODELS for length in TRAINED for variant in variants]  # fmt: skip


def reference_gradient(name: str, tokens: Any) -> tuple[Any, float]:
    """transformers' gradient in float32, and by how much bf16 products change it."""
    import torch

    model = stock_model(name)
    wanted = first_gradient(model(tokens, labels=tokens).loss, model)
    with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
        rounded = first_gradient(model(tokens, labels=tokens).loss, model)
    return wanted, float((rounded - wanted).norm() / wanted.norm())


def measure_training(clock: Clock, done: Sequence[Row] = ()) -> Iterator[Row]:
    """A row per model, length and variant: optimizer steps over one sequence, float32 weights, bf16 products.

    What `done` has a measurement of, or has found not to fit, is left out; so a part that ran out of time goes on
    where it was.
    """
    import torch

    device = torch.device(DEVICE)
    finished = {(row["model"], row["tokens"], row["variant"]) for row in done if row.get("skipped") != NO_TIME}
    cases = [case for case in training_cases() if case not in finished]
    rates: dict[tuple[str, str], float] = {}  # seconds per operation at the last length
    for row in done:
        if "seconds" in row:
            rates[row["model"], row["variant"]] = row["seconds"] / row["flops"]
    references: dict[str, tuple[Any, float]] = {}
    measured_rate = matmul_rate() if cases else 0.0
    for name, length, variant in cases:
        row = {
            "metric": "training step", "model": name, "tokens": length, "variant": variant,
            "matmul_flops_per_second": measured_rate,
        }  # fmt: skip
        operations = training_flops(name, length, lora=variant == "ours, lora")
        expected = 20 + (_STEPS + 1) * operations * rates.get((name, variant), rates.get((name, "ours"), 0.0))
        if clock.left < expected:
            yield row | {"skipped": NO_TIME}
            continue
        torch.manual_seed(0)
        tokens = torch.randint(0, MODELS[name]["vocab_size"], (1, length), device=device)
        try:
            if variant == STOCK:
                row |= time_stock(name, tokens)
            else:
                if name not in references:
                    references[name] = reference_gradient(name, tokens[:, :CHECKED])
                row |= {"noise": references[name][1]} | time_ours(name, variant, tokens, *references[name])
        except torch.OutOfMemoryError:
            row["skipped"] = "out of memory"
        except ConfigError as error:  # what is not installed
            row["skipped"] = str(error)
        except RuntimeError as problem:
            row["skipped"] = str(problem).splitlines()[0][:120]
        finally:
            free()
        if "skipped" not in row:
            row |= {"tokens_per_second": length / row["seconds"], "flops": operations}
            row["mfu"] = operations / row["seconds"] / peak if (peak := peak_flops()) else None
            rates[name, variant] = row["seconds"] / operations
        yield row


def training_flops(name: str, tokens: int, lora: bool = False) -> float:
    """Of one step: forward, and as much again for each of the gradients of inputs and of weights that are trained."""
    from transformers import LlamaConfig

    forward = flops(LlamaConfig(**MODELS[name]), tokens)
    forward += 2.0 * tokens * MODELS[name]["hidden_size"] * MODELS[name]["vocab_size"]
    return forward * (2 if lora else 3)


def matmul_rate(size: int = 8192) -> float:
    """Floating-point operations per second of a large bf16 matrix product of random numbers."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return 2 * size**3 / float(time_calls([partial(torch.matmul, a, b)], short=False)["seconds"])


def peak_flops() -> float | None:
    import torch

    name = torch.cuda.get_device_name()
    return next((rate for word, rate in PEAK_FLOPS.items() if word in name), None)


# ------------------------------------------------------------------------------------------------------------- running


def machine() -> Row:
    """What a row says about the GPU beside `results.provenance`."""
    import torch

    from scaled_rope.results import package_version

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.split("\n")[0].strip() or None
    except OSError:
        driver = None
    properties = torch.cuda.get_device_properties(0)
    packages = ("triton", "liger-kernel", "flash-attn", "flash-attn-4")
    return {
        "driver": driver,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "gpu_versions": {name: package_version(name) for name in packages},
    }


def interpret() -> int:
    """Every shape, a few tokens, forward and backward, on the CPU. Returns 1 when one is wrong."""
    import torch

    wrong = 0
    for dtype in (torch.float32, torch.bfloat16):
        # float32: products and sums of roundings of 6e-8. bf16: the interpreter truncates, which doubles the error.
        tolerance = 5e-7 if dtype == torch.float32 else TOLERANCE
        for shape in SHAPES:
            for name, variant in variants(shape, "triton", others=False).items():
                for backward in (False, True):
                    tokens = 41 if shape.documents else 5
                    error = check(variant, shape, tokens, dtype, torch.device("cpu"), backward)
                    good = error < tolerance
                    wrong += not good
                    what = f"{str(dtype).removeprefix('torch.')}, {shape.name}, {name}"
                    print(f"{'ok   ' if good else 'WRONG'} {error:.1e} {what}, {'backward' if backward else 'forward'}")
    for rows, heads, key_heads, width in DECODE_SHAPES:
        # In float32 alone: the interpreter cannot multiply matrices in bf16.
        for name, run in decode_variants(others=False).items():
            small = (min(rows, 2), heads // key_heads, 1, width)
            error = decode_error(run, small, 70, torch.float32, torch.device("cpu"))
            # Sums of 70 weighted values, whose angles, up to 70, are rounded to 2^-24 of themselves in the reference.
            good = error < 2e-6
            wrong += not good
            print(
                f"{'ok   ' if good else 'WRONG'} {error:.1e} float32, decode B{small[0]} H{heads}/{key_heads}, {name}"
            )
    return int(wrong > 0)


def show(row: Row) -> str:
    words = [row["metric"], row.get("shape") or row["model"], f"T={row['tokens']}"]
    words += [row["variant"]] if "variant" in row else [row["attention"], f"kernel {row['kernel']}"]
    if "skipped" in row:
        return f"{', '.join(words)}: {row['skipped']}"
    if "bytes_per_second" in row:
        speed = f"{row['bytes_per_second'] / 1e9:.0f} GB/s, {100 * row['share_of_copy']:.0f} % of a copy"
    else:
        used = "" if row["mfu"] is None else f", {100 * row['mfu']:.0f} % of the peak rate"
        speed = f"{row['tokens_per_second']:.0f} tokens/s{used}, peak {row['peak_bytes'] / 2**30:.1f} GiB"
    error = f", error {row['error']:.1e}" if "error" in row else ""
    return f"{', '.join(words)}: {row['seconds'] * 1e6:.1f} us, {speed}{error}"


def training_rows(path: Path, about: Row) -> list[Row]:
    """The training rows of a file that this code has measured on this GPU."""
    from scaled_rope.results import rows_so_far

    same = ("commit", "device", "driver")
    return [
        row for row in rows_so_far(path)
        if row["metric"] == "training step" and all(row.get(name) == about[name] for name in same)
    ]  # fmt: skip


def build_parser() -> Parser:
    parser = Parser("benchmarks/gpu.py", __doc__)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="what to measure (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit of each part (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="rows are appended here (default: %(default)s)")
    parser.add_argument("--commit", help="what to note as the commit where the source is no repository")
    parser.add_argument("--interpret", action="store_true", help="correctness alone, on the CPU, in the interpreter")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.interpret:
        if importlib.util.find_spec("triton") is None:
            raise ConfigError("--interpret needs triton: pip install 'scaled-rope[kernels]'")
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is first imported
        return interpret()
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("no GPU here, nothing was measured; --interpret checks the kernels on the CPU")
    from scaled_rope.results import append_row, provenance

    # Compiled backward passes that give their buffers away can run once only.
    torch._functorch.config.donated_buffer = False
    torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
    torch.manual_seed(0)
    source = provenance(DEVICE, 0, vars(args))
    source["commit"] = source["commit"] or args.commit
    about = source | machine()
    wrong = 0
    for part in PARTS if args.part == "all" else (args.part,):
        clock = Clock(60 * args.minutes)
        if part == "decode":
            rows = measure_decode(clock)
        elif part.startswith("rotary"):
            rows = measure_rotary(part == "rotary-backward", clock)
        elif part == "attention":
            rows = measure_attention(clock)
        elif part == "prefill":
            rows = measure_prefill(clock)
        else:
            rows = measure_training(clock, training_rows(args.output, about))
        for row in rows:
            wrong += row.get("skipped") == "wrong" and str(row.get("variant", "ours")).startswith("ours")
            print(show(row), flush=True)
            append_row(args.output, row | about)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(run_cli(main))
