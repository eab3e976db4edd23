"""Tokens per second of decoding on a CPU, by scaling and by what the cache holds.

    OMP_NUM_THREADS=1 python benchmarks/decode.py                    # 2048, 8192 and 32768 tokens in the cache
    OMP_NUM_THREADS=1 python benchmarks/decode.py --lengths 2048 --rounds 5 --output ""

The model has the shape of SmolLM2-135M (30 layers, hidden size 576, 9 heads on 3, 64 wide) and random weights in
float32; its original length is 1024, so that every length is an extension. What a cache holds doesn't change its cost,
so it is filled with random numbers. One token is decoded at each length by each variant in turn, over and over, in
another order each time, and the cache put back: the machine's moods then fall on all alike. Kept are medians of the
time of the core and of the clock, and the median of the quotients of the former within a round. The cost of making a
cache anew, which `stepped` pays once per doubling, is timed once per length up to `--rebuild-until`, and spread over
the tokens since the step before.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.runner import command_line
from scaled_rope.flags.shared import parse_lengths
from scaled_rope.patching import deferred_rotation
from scaled_rope.patching.cache_owners import contents_of
from scaled_rope.patching.patch import patch_model
from scaled_rope.provenance import provenance
from scaled_rope.results import append_row
from scaled_rope.scaling.frequencies import compute_scale
from scaled_rope.scaling.record import RopeScaling

ORIGINAL = 1024
SHAPE: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": ORIGINAL,
    "tie_word_embeddings": True,
}  # fmt: skip
BASE = "static yarn"
"""The variant that the others are compared with."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks/decode.py", __doc__ or "")
    add = parser.add_argument
    add("--lengths", default="2048,8192,32768", metavar="N,...", help="tokens in the cache (default: %(default)s)")
    add("--rounds", type=int, default=11, metavar="N", help="timings of each variant (default: %(default)s)")
    add("--layers", type=int, default=SHAPE["num_hidden_layers"], metavar="N", help="default: %(default)s")
    add("--rebuild-until", type=int, default=2048, metavar="N", help="longest cache that is made anew (%(default)s)")
    add("--note", default="", help="what else to say in the rows, such as who shared the machine")
    add("--output", default="data/benchmarks/decode_cpu.jsonl", metavar="FILE", help="'' for none (%(default)s)")
    return parser


@dataclass
class Variant:
    """A model and how its passes are run."""

    model: Any
    context: Callable[[], Any] = nullcontext
    cache: Any = None


@contextmanager
def plain_torch() -> Any:
    """Within this context, keys are rotated in memory, then the model's own attention runs."""
    few, deferred_rotation.FEW = deferred_rotation.FEW, 0
    try:
        yield
    finally:
        deferred_rotation.FEW = few


def variants(layers: int, longest: int) -> dict[str, Variant]:
    """All variants by name, over the same weights."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": layers}
    weights: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval()

    def model(rope: dict[str, Any] | None = None, scaling: str | None = None) -> Any:
        more = {} if rope is None else {"rope_parameters": {"rope_theta": 10000.0, **rope}}
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **more)).eval()
        made.model.rotary_emb = type(made.model.rotary_emb)(config=made.config)
        made.load_state_dict(weights.state_dict(), assign=True)
        made.tie_weights()
        if scaling is not None:
            patch_model(made, scaling, kernel="none")
        return made

    # "factor" is what transformers' formula takes; at 1 it is the dynamic form of ntk.
    yarn = {"rope_type": "yarn", "factor": longest / ORIGINAL, "original_max_position_embeddings": ORIGINAL}
    return {
        BASE: Variant(model(yarn)),
        "no scaling": Variant(model()),
        "rotated keys, dynamic": Variant(model({"rope_type": "dynamic", "factor": 1.0})),
        "before rotation, plain torch": Variant(model(scaling="dynamic-yarn"), plain_torch),
        "before rotation, fused": Variant(model(scaling="dynamic-yarn")),
        "stepped": Variant(model(scaling="dynamic-yarn,dynamic_step=2")),
    }


def fill(variant: Variant, length: int, keys: list[tuple[torch.Tensor, torch.Tensor]], ids: torch.Tensor) -> None:
    """Give a variant a cache of `length` tokens that looks as if its model had filled it."""
    cache = variant.model(ids[:, :1], use_cache=True).past_key_values
    if (known := contents_of(cache)) is not None:
        known.length = length
        known.inputs = [("input_ids", ids[:, :length])] if known.inputs else []
        if known.scale is not None:
            scaling = RopeScaling("yarn", 1.0, ORIGINAL, dynamic=True, dynamic_step=2.0)
            # As if this token's step had been made already.
            known.scale = compute_scale(scaling, torch.tensor([length + 1]))
    variant.cache = cache
    put_back(variant, keys)


def put_back(variant: Variant, keys: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for layer, (key, value) in zip(variant.cache.layers, keys, strict=True):
        layer.keys, layer.values = key, value


def decode_once(
    variant: Variant, length: int, keys: list[tuple[torch.Tensor, torch.Tensor]], ids: Any
) -> tuple[float, float]:
    """Seconds of the core and of the clock for one token after `length` others; the cache is as before afterwards."""
    known = copy.copy(contents_of(variant.cache))
    inputs = None if known is None else list(known.inputs)
    places = torch.tensor([[length]])
    began, spent = time.perf_counter(), time.process_time()
    with variant.context():
        variant.model(ids[:, length : length + 1], past_key_values=variant.cache, position_ids=places, use_cache=True)
    seconds = time.process_time() - spent, time.perf_counter() - began
    put_back(variant, keys)
    if (kept := contents_of(variant.cache)) is not None and known is not None and inputs is not None:
        kept.length, kept.offset, kept.scale, kept.inputs = known.length, known.offset, known.scale, inputs
    return seconds


def rebuild(variant: Variant, length: int, ids: torch.Tensor) -> float:
    """Seconds of the core for one token at which a cache of `length` tokens is computed anew."""
    known = contents_of(variant.cache)
    assert known is not None and known.scale is not None
    known.scale = known.scale / 2
    spent = time.process_time()
    variant.model(ids[:, length : length + 1], past_key_values=variant.cache, use_cache=True)
    return time.process_time() - spent


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    lengths = parse_lengths(args.lengths)
    if min(lengths) <= ORIGINAL or args.rounds < 1:
        raise ConfigError(f"lengths {args.lengths}, rounds {args.rounds}: must be above {ORIGINAL}, and at least 1")
    facts = provenance(torch.device("cpu"), 0, vars(args))
    every = variants(args.layers, max(lengths))
    table = []
    for length in lengths:
        torch.manual_seed(length)
        ids = torch.randint(0, SHAPE["vocab_size"], (1, length + 1))
        shape = (1, SHAPE["num_key_value_heads"], length, 64)
        keys = [(torch.randn(shape), torch.randn(shape)) for _ in range(args.layers)]
        for variant in every.values():
            fill(variant, length, keys, ids)
        times: dict[str, list[float]] = {name: [] for name in every}
        clock: dict[str, list[float]] = {name: [] for name in every}
        names = list(every)
        for turn in range(args.rounds + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                core, wall = decode_once(every[name], length, keys, ids)
                if turn:  # the first turn is a warm-up, in which memory is touched
                    times[name].append(core)
                    clock[name].append(wall)
            print(f"{length} tokens, round {turn} of {args.rounds}", file=sys.stderr, flush=True)
        for name, seconds in times.items():
            ratios = [one / base for one, base in zip(seconds, times[BASE], strict=True)]
            quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
            row = {
                "metric": "decode", "variant": name, "length": length, "layers": args.layers, "dtype": "float32",
                "threads": torch.get_num_threads(), "rounds": args.rounds,
                "seconds": statistics.median(seconds), "seconds_quartiles": [quartiles[0], quartiles[2]],
                "tokens_per_second": 1 / statistics.median(seconds),
                "clock_seconds": statistics.median(clock[name]), "ratio": statistics.median(ratios),
            }  # fmt: skip
            if name == "stepped" and length <= args.rebuild_until:
                row["rebuild_seconds"] = rebuild(every[name], length, ids)
                # A step at this length comes after length/2 tokens at the scale before.
                row["amortised_seconds"] = row["seconds"] + row["rebuild_seconds"] / (length / 2)
            if args.output:
                append_row(
                    args.output,
                    row | {"note": args.note, "provenance": {"command": command_line(parser, argv), **facts}},
                )
            more = f"{row['rebuild_seconds']:.1f} s" if "rebuild_seconds" in row else ""
            table.append([str(length), name, f"{row['tokens_per_second']:.2f}", f"{row['ratio']:.2f}", more])
    print(format_table(["tokens", "variant", "tokens/s of a core", f"time / {BASE}", "made anew"], table))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
