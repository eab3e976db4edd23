"""Do real engines compute what `scaled-rope export` says they do? Each is started, and its model certified.

    python benchmarks/engines/run.py vllm --program ENVIRONMENT/bin/vllm
    python benchmarks/engines/run.py llama.cpp --program BUILD/bin/llama-server
    python benchmarks/engines/run.py transformers --program ENVIRONMENT/bin/python
    python benchmarks/engines/run.py mlx --program ENVIRONMENT/bin/python

The scripts beside this one make these environments and call it. For every scaling that `export` has words for, the
engine is started with these words, and `scaled-rope certify` says which scaling it runs. Then come controls: the engine
is started with the words of another scaling than is claimed, and `certify` must name that one. Engines with a server
are asked over HTTP; of the others a process holds the model and gives logits. A row of each is appended to
data/engines.jsonl; those that are there are not measured again. Exit code 1 when one is not as expected. With --dtype
bfloat16 or float16, rows of vLLM also say how many tokens its key/value cache holds, and how many `plan --serve` says.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.engines.starting import ENGINES, VLLM_CACHE_GIB, Engine, Served, Start, Started
from scaled_rope.certificate.certify import certify
from scaled_rope.certificate.observed import encode_text, long_text
from scaled_rope.certificate.reference import Reference
from scaled_rope.checkpoint import DEFAULT_MODEL, load_config, load_tokenizer, open_checkpoint, weights_hash
from scaled_rope.cli import main as scaled_rope
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.patching.loading import load_model
from scaled_rope.provenance import portable_command, portable_model, provenance
from scaled_rope.results import Row, append_row, finished_keys, row_key
from scaled_rope.scaling.hf_config import head_dim_of
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.config_file import read_config_file
from scaled_rope.serving.export import export, served_length
from scaled_rope.serving.serve_plan import plan_serving

ROWS = ROOT / "data" / "engines.jsonl"
METRIC = "engine"


# What is measured -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Job:
    """One start of an engine."""

    claim: str
    """The scaling that it is said to run, as a spec."""
    served: str = ""
    """The scaling whose words it is given, in a control; empty: the claim's."""
    named: str = ""
    """In a control, what the certificate must name."""


def scalings(factor: float, head_dim: int) -> list[str]:
    """Every static method of the registry, and YaRN with each of its parameters."""
    s, half = f"{factor:g}", head_dim // 2
    short, long = ("+".join(f"{1 + rise * at / half:.6g}" for at in range(half)) for rise in (0.5, 4 * factor))
    return [
        "default",
        f"linear:{s}",
        f"ntk:{s}",
        f"abf:{s},theta=500000",
        f"ntk-by-parts:{s}",
        f"yarn:{s}",
        f"yarn:{s},attention_factor=1",
        f"yarn:{s},mscale=0.7,beta_fast=128,beta_slow=2",
        f"yarn:{s},truncate=false",
        f"yarn:{s},extrapolation_factor=0.5",
        f"yarn:{s},ramp=rotations",
        f"yarn:{s},resonance=true",
        f"llama3:{s}",
        f"longrope:{s},short_factor={short},long_factor={long}",
        f"part-ntk:{s}",
        f"ntk-mixed:{s}",
        f"proportional:{s},fraction=0.5",
        f"cope:{s}",
        f"hardclip:{s}",
        f"drope:{s}",
        f"dynamic-ntk:{s}",
    ]


def controls(factor: float, original: int) -> list[Job]:
    """Starts with other words than those of the claim, such as real mismatches come down to."""
    s = f"{factor:g}"
    return [
        Job(f"yarn:{s}", "default", "this model unscaled"),
        Job(f"yarn:{s}", f"yarn:{s},attention_factor=1", "without the attention factor"),
        Job(f"yarn:{s}", f"yarn:{s},original_max_position_embeddings={2 * original}", f"with L = {2 * original} "),
        Job(f"ntk-by-parts:{s}", f"yarn:{s}", "with YaRN's attention factor"),
        Job(f"yarn:{s},mscale=0.7,beta_fast=128,beta_slow=2", f"yarn:{s}", "with YaRN's default constants"),
    ]


def identity(job: Job, scaling: RopeScaling, about: Row, asked: Row, lengths: Sequence[int]) -> Row:
    """The subject of a row, and the fields by which it is found again.

    about: the model, its dtype and the text; asked: the engine, its version, and how it is asked.
    """
    return {
        "metric": METRIC,
        **about,
        "scaling": scaling.to_dict(),
        "label": scaling.label,
        "spec": job.claim,
        "length": max(lengths),
        "protocol": {**asked, "served": job.served or "as claimed", "lengths": list(lengths)},
    }


def as_expected(job: Job, row: Row) -> bool:
    """Whether a row says what it should: right where `export` says exact, and in a control the other scaling's name."""
    status = row["export"]["status"]
    if status == "refused":
        return True
    if row["export"].get("older_keys") is False:  # then a reader of those alone runs the model unscaled
        return row["verdict"] == "other" and any("unscaled" in name for name in row["named"])
    if job.named:
        return row["verdict"] == "other" and any(job.named in name for name in row["named"])
    if status == "partial":  # LongRoPE where the program has the long list alone
        return row["verdict"] == "other" and any("long list" in name for name in row["named"])
    return row["verdict"] == "right"


def found_in(certificate: Row) -> Row:
    """The fields of a row that come from a certificate, as `certify --json` prints it."""
    named = set(certificate["names"]) if certificate["verdict"] != "right" else set()
    return {
        "verdict": certificate["verdict"],
        "exit_code": certificate["exit_code"],
        "sentence": certificate["sentence"],
        "named": [name for one in certificate["candidates"] if one["name"] in named
                  for name in (one["name"], *one["also"])],
        "candidates": len(certificate["candidates"]),
        "difference": max(row["claimed"] for row in certificate["lengths"]),
        "worst": max(row["claimed_worst"] for row in certificate["lengths"]),
        "noise": max(row["noise"] for row in certificate["lengths"]),
        "single": certificate["single"],
        "computes_in": certificate["dtype"],
        "by_length": certificate["lengths"],
        "notes": list(certificate["notes"]),
    }  # fmt: skip


# The measurement ------------------------------------------------------------------------------------------------------
def certify_started(started: Started, model: str, claim: str, lengths: Sequence[int], html: str | None = None) -> Row:
    """The certificate of an engine that runs, as `certify --json` prints it.

    Raises:
        ConfigError: `certify` refuses.
    """
    if started.url is None:
        return _certify_candidate(started, model, claim, lengths)
    words = ["certify", model, "--server", started.url, "--scaling", claim, "--json"]
    words += ["--lengths", ",".join(map(str, lengths)), *(["--html", html] if html else [])]
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        code = scaled_rope(words)
    if code not in (0, 1, 3):
        raise ConfigError(f"certify: {complaint.getvalue().strip()}")
    certificate: Row = json.loads(printed.getvalue())
    assert certificate["exit_code"] == code
    return certificate


def _certify_candidate(started: Started, model: str, claim: str, lengths: Sequence[int]) -> Row:
    """The same for an engine that is no server."""
    checkpoint, tokenizer = open_checkpoint(model), load_tokenizer(model)
    scaling = resolve_scaling(claim, checkpoint.settings.scaling)
    certificate = certify(
        Reference(load_model(checkpoint, device="cpu")),
        started.candidate,
        encode_text(tokenizer, long_text(), max(lengths)),
        lengths,
        scaling,
        read_config_file(model),
        first=tokenizer.bos_token_id,
        length=served_length(scaling, checkpoint.config),
    )
    return certificate.to_dict()


def measure(
    start: Start,
    target: str,
    job: Job,
    model: str,
    lengths: Sequence[int],
    dtype: str,
    html: str | None = None,
    older_alone: bool = False,
) -> Row:
    """The row of a job: the words of `export`, and those of the certificate about the engine.

    older_alone: whether the engine reads `rope_scaling` and `rope_theta` and no `rope_parameters`; then the row says
    whether `export` writes those as well.
    """
    config = load_config(model)
    length = served_length(resolve_scaling(job.claim, RopeScaling.from_config(config)), config)
    length = max(length, max(lengths) + 1)  # an unscaled model's own is too short for the prompts
    report = export(job.served or job.claim, config, target, length)
    about: Row = {"export": {"for": report.target, "status": report.status, "reason": report.reason}}
    if report.status == "refused":
        return about
    if older_alone:
        about["export"]["older_keys"] = "rope_theta" in report.config
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        served = Served(model, job.served or job.claim, target, length, dtype, report)
        with start(served, Path(scratch)) as started:
            at_work = time.monotonic()
            certificate = certify_started(started, model, job.claim, lengths, html)
        if started.cache_tokens is not None and dtype != "float32":  # which the plan has no caches of
            about["cache"] = cache_beside_plan(started.cache_tokens, config, job.claim, length, dtype)
        seconds = {"start_seconds": round(at_work - began, 1), "seconds": round(time.monotonic() - at_work, 1)}
        command = shown(started.command, model, scratch)
    return about | {"command": command, **found_in(certificate), **seconds}


def shown(command: Sequence[str], model: str, scratch: str) -> str:
    """A command as rows record it: no paths of this machine, no port, no list of frequencies."""
    words = [Path(command[0]).name, *command[1:]]
    words = ["PORT" if before == "--port" else word for before, word in zip(["", *words], words, strict=False)]
    words = [word.replace(f"{scratch}/", "").replace(model, portable_model(model)) for word in words]
    return portable_command(re.sub(r"\[[^][]{80,}\]", "[...]", word) for word in words)


def cache_beside_plan(tokens: int, config: Any, spec: str, length: int, dtype: str) -> Row:
    """Tokens that vLLM's cache holds, beside what `plan --serve` says."""
    plan, space = plan_serving(config, spec, length, kv_dtype=dtype), VLLM_CACHE_GIB * 2**30
    return {
        "bytes": space,
        "tokens": tokens,
        "plan_tokens": int(space // plan.per_token),
        "plan_bytes_per_token": plan.per_token,
        "sequences": tokens / length,
        "plan_sequences": space / plan.per_sequence,
    }


def main() -> int:
    parser = Parser("benchmarks/engines/run.py", __doc__)
    add = parser.add_argument
    add("engine", help=", ".join(ENGINES))
    add("--program", required=True, metavar="PATH", help="vllm, llama-server, or the interpreter that has the engine")
    add("--model", default=str(DEFAULT_MODEL), metavar="DIR", help="default: the embedded model")
    add("--factor", type=float, default=8.0, metavar="S", help="of the scalings (default 8)")
    add("--lengths", default="64,640", metavar="N,N", help="of the prompts (default 64,640)")
    add("--scaling", action="append", metavar="SPEC", help="only these; may be repeated")
    add("--controls", type=int, metavar="N", help="only the first N controls (default: all, none with --scaling)")
    add("--only-controls", action="store_true", help="no scalings")
    add("--dtype", default="float32", help="in which the engine computes (default float32)")
    add("--html", metavar="FILE", help="write the certificate's page; the last one stays")
    add("--output", default=str(ROWS), metavar="FILE", help="rows (default data/engines.jsonl)")
    args = parser.parse_args()
    if args.engine not in ENGINES:
        raise unknown("engine", args.engine, ENGINES)
    engine, model = ENGINES[args.engine], args.model
    program = shutil.which(args.program) or args.program
    asked = {"engine": args.engine.removesuffix("-llm"), "version": engine.version(program), "asked": engine.asked}
    config = load_config(model)
    own = RopeScaling.from_config(config)
    lengths = sorted(int(one) for one in args.lengths.split(","))
    about: Row = {"model": portable_model(model), "model_fingerprint": weights_hash(model), "dtype": args.dtype}
    told = {name: value for name, value in vars(args).items() if name not in ("program", "output", "html")}
    plan: list[Job] = []
    if not args.only_controls:
        plan += [Job(spec) for spec in args.scaling or scalings(args.factor, head_dim_of(config))]
    if args.controls is not None or not args.scaling:
        original = int(own.original_max_position_embeddings or config.max_position_embeddings)
        plan += controls(args.factor, original)[: args.controls]
    about["data"] = {"text": "Python's documentation", "sha256": hashlib.sha256(long_text().encode()).hexdigest()[:16]}
    rows = {job: identity(job, resolve_scaling(job.claim, own), about, asked, lengths) for job in plan}
    done = finished_keys(args.output)
    return run(engine, program, {job: row for job, row in rows.items() if row_key(row) not in done}, args, told)


def run(engine: Engine, program: str, rows: Mapping[Job, Row], args: argparse.Namespace, told: Row) -> int:
    """Measure and append the rows that are left; 1 where one is not as expected."""
    bad = 0
    if not rows:
        return 0
    with engine.held(program) as start:
        for job, row in rows.items():
            lengths = row["protocol"]["lengths"]
            older_alone = engine.older_alone(row["protocol"]["version"])
            row = row | measure(start, engine.target, job, args.model, lengths, args.dtype, args.html, older_alone)
            row["expected"] = as_expected(job, row)
            append_row(args.output, row | {"provenance": provenance("cpu", None, told)})
            bad += not row["expected"]
            mark = "" if row["expected"] else "NOT AS EXPECTED: "
            words = row.get("sentence") or row["export"]["reason"]
            print(f"{mark}{job.claim[:50]}: {row['export']['status']}; {words}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    # An engine has a session of its own, which no signal to ours reaches: it is ended on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(run_cli(main))
