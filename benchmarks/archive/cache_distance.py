"""How far from a full pass generation is under dynamic scaling, by what its cache holds.

    python benchmarks/archive/cache_distance.py                                  # models/tiny-llama-256, token by token
    python benchmarks/archive/cache_distance.py -m models/smollm2-135m --dtype bfloat16 --attention blockwise \\
        --until 11264 --pass-tokens 256 --leave-out "full, stepped"

A text is read as generation reads it: a prompt of L tokens (the original length), then pieces of `--pass-tokens`
through the cache, each at the scale of the length so far. At every piece the same tokens are scored by a full pass
over all of the text so far, at the same continuous scale and without a cache. Kept for each way of caching: perplexity
of the scored tokens, the mean divergence KL(full pass || cached) per token, the largest difference of logits, and the
time of the cached passes.

`before rotation` is this package's dynamic scaling, `rotated` keeps keys as they were rotated when they were new (what
transformers does), `stepped` makes the cache anew at each step, `unscaled` is the model as it is. `full, stepped` is
a full pass at the scale of `stepped`.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # eval/ is not part of the installed package

import torch
from torch import Tensor

import eval.perplexity as evaluator
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.evaluation.formatting import format_table
from scaled_rope.evaluation.jobs import ModelLoader, model_jobs
from scaled_rope.evaluation.runner import command_line
from scaled_rope.evaluation.windows import truncated
from scaled_rope.patching.patch import patch_model
from scaled_rope.patching.rotary import ScaledRotaryEmbedding
from scaled_rope.provenance import provenance
from scaled_rope.results import append_row
from scaled_rope.scaling.hf_config import head_dim_of
from scaled_rope.scaling.record import RopeScaling


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks/archive/cache_distance.py", __doc__ or "")
    add = parser.add_argument
    add("-m", "--model", default="models/tiny-llama-256", help="default: %(default)s")
    add("--scaling", default="dynamic-yarn", metavar="SPEC", help="a dynamic scaling of Llama models (%(default)s)")
    add("--step", type=float, default=2.0, metavar="S", help="dynamic_step of `stepped` (default: %(default)s)")
    add("--dataset", default="standin:books", metavar="NAME", help="texts; the first document (default: %(default)s)")
    add("--until", type=int, default=1024, metavar="N", help="tokens of the text (default: %(default)s)")
    add("--pass-tokens", type=int, default=1, metavar="N", help="tokens per pass after the prompt (default: 1)")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--attention", default="auto", help="attention implementation (default: %(default)s)")
    add("--leave-out", action="append", default=[], metavar="WAY", help="a way that is not measured; repeatable")
    add("--output", default="benchmarks/archive/cache_distance_rows.jsonl", metavar="FILE", help="default: %(default)s")
    return parser


@dataclass
class Sums:
    """Sums over scored tokens, for one way of caching."""

    nats: float = 0.0
    divergence: float = 0.0
    largest: float = 0.0
    seconds: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    """[first position, mean nats, mean divergence] of about 16 stretches of the text."""


class Reader:
    """One model that reads a text piece by piece through its cache."""

    def __init__(self, model: Any, cached: bool = True) -> None:
        self.model, self.cached, self.cache = model, cached, None

    def read(self, ids: Tensor, start: int, end: int) -> Tensor:
        """float32 logits [end - start, V] of the text ids [1, T] up to `end`, of which `start` tokens were read."""
        if not self.cached:
            output = self.model(ids[:, :end], use_cache=False, logits_to_keep=end - start)
        else:
            output = self.model(ids[:, start:end], past_key_values=self.cache, use_cache=True)
            self.cache = output.past_key_values
        logits: Tensor = output.logits[0].float()
        return logits


def readers(model: Any, scaling: RopeScaling, step: float) -> tuple[Reader, dict[str, Reader]]:
    """The reader that does full passes, and the readers that are compared with it, by name."""

    def patched(one: RopeScaling) -> Any:
        copied = copy.deepcopy(model)
        patch_model(copied, one)
        return copied

    # Steps are for dynamic forms of methods; dynamic-ntk is a method that depends on the length by itself.
    stepped = patched(RopeScaling.from_dict(scaling.to_dict() | {"dynamic_step": step})) if scaling.dynamic else None
    # Dynamic tables without the hooks that keep cached keys right, as in transformers.
    rotated = copy.deepcopy(model)
    rotated.model.rotary_emb = ScaledRotaryEmbedding(scaling, head_dim_of(model.config))
    dynamic = patched(scaling)
    found = {
        "before rotation": Reader(dynamic),
        "rotated": Reader(rotated),
        "unscaled": Reader(copy.deepcopy(model)),
    }
    if stepped is not None:
        found |= {"stepped": Reader(stepped), "full, stepped": Reader(stepped, cached=False)}
    return Reader(dynamic, cached=False), found


@torch.inference_mode()
def measure(
    full: Reader, others: dict[str, Reader], ids: Tensor, original: int, size: int, say: Callable[[str], None]
) -> dict[str, Sums]:
    """Measure the sums for each way of caching. ids: [1, T + 1], of which the last is only a target."""
    total = ids.shape[1] - 1
    sums = {"full pass": Sums()} | {name: Sums() for name in others}
    stretch = max(size, (total - original) // 16 // size * size)
    for reader in others.values():
        if reader.cached:
            reader.model(ids[:, :1], use_cache=False)
            # The prompt; only what follows it is scored.
            reader.cache = reader.model(ids[:, :original], use_cache=True, logits_to_keep=1).past_key_values
    for start in range(original, total, size):
        end = min(start + size, total)
        targets = ids[0, start + 1 : end + 1, None]
        began = time.perf_counter()
        wanted = full.read(ids, start, end)
        sums["full pass"].seconds += time.perf_counter() - began
        log_wanted = wanted.log_softmax(-1)
        found = {"full pass": wanted}
        for name, reader in others.items():
            began = time.perf_counter()
            found[name] = reader.read(ids, start, end)
            sums[name].seconds += time.perf_counter() - began
        for name, logits in found.items():
            log = logits.log_softmax(-1)
            nats = float(-log.gather(1, targets).double().sum())
            divergence = float((log_wanted.exp() * (log_wanted - log)).sum(-1).double().sum())
            one = sums[name]
            one.nats += nats
            one.divergence += divergence
            one.largest = max(one.largest, float((logits - wanted).abs().max()))
            if (start - original) % stretch == 0:
                one.curve.append([start, 0.0, 0.0, 0])
            for place, value in ((1, nats), (2, divergence), (3, end - start)):
                one.curve[-1][place] += value
        if (start - original) % stretch == 0:
            say(f"{end} of {total} tokens")
    return sums


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.pass_tokens < 1:
        raise ConfigError(f"pass-tokens {args.pass_tokens} is not allowed; at least 1")
    facts = provenance(torch.device("cpu"), None, vars(args))
    with tempfile.TemporaryDirectory() as folder:
        given = ["-m", args.model, "--scaling", args.scaling, "--dtype", args.dtype, "--attention", args.attention]
        given += ["--dataset", args.dataset, "--samples", "1", "--lengths", str(args.until + 1), "--device", "cpu"]
        parsed = evaluator.build_parser().parse_args([*given, "--output", str(Path(folder) / "rows.jsonl")])
        ours = evaluator.evaluator_of(parsed)
        (job,) = model_jobs(parsed)
        texts, data = ours.prepare(job.model)
        ids = torch.from_numpy(texts.ids(truncated(texts, args.until + 1)[0]))[None].long()
    scaling, original = job.scaling, job.scaling.original_max_position_embeddings
    if not scaling.is_length_dependent or scaling.dynamic_step is not None or original is None:
        raise ConfigError(f"scaling {args.scaling!r}: must follow the length token by token, such as dynamic-yarn")
    if args.until <= original:
        raise ConfigError(f"until {args.until}: must be more than the original length, {original}")
    plain = ModelLoader(parsed)(model_jobs(evaluator.build_parser().parse_args(
        [*given[:2], "--scaling", "default", *given[4:], "--output", "none"]))[0])  # fmt: skip
    full, others = readers(plain, scaling, args.step)
    for name in args.leave_out:
        if name not in others:
            raise unknown("way", name, others)
        del others[name]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    sums = measure(full, others, ids, original, args.pass_tokens, say)
    count = args.until - original
    table = []
    for name, one in sums.items():
        row = {
            **job.fields(),
            "metric": "cache_distance",
            "data": data,
            "protocol": {"caching": name, "step": args.step if "stepped" in name else None, "prompt": original,
                         "pass_tokens": args.pass_tokens},
            "length": args.until,
            "targets": count,
            "perplexity": math.exp(one.nats / count),
            "divergence": one.divergence / count,
            "largest_logit_difference": one.largest,
            "seconds": round(one.seconds, 3),
            "threads": torch.get_num_threads(),
            "curve": [[int(first), nats / n, divergence / n] for first, nats, divergence, n in one.curve],
            "provenance": {"command": command_line(parser, argv), **facts},
        }  # fmt: skip
        append_row(args.output, row)
        table.append([name, f"{row['perplexity']:.3f}", f"{row['divergence']:.2e}", f"{one.largest:.2g}",
                      f"{one.seconds:.1f}"])  # fmt: skip
    print(format_table(["cache", "perplexity", "KL per token", "largest", "seconds"], table))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
