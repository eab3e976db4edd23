"""`scaled-rope certify MODEL --server URL`: is this server running the scaling that it should?

Exit codes: 0 as claimed, 1 another scaling, 2 bad input or a server that does not answer, 3 unclear.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from scaled_rope.certificate.certify import Certificate, certify
from scaled_rope.certificate.observed import check_limit, encode_text, long_text
from scaled_rope.certificate.page import write_page
from scaled_rope.certificate.reference import Reference, available_memory
from scaled_rope.certificate.servers import connect
from scaled_rope.checkpoint import load_tokenizer, open_checkpoint
from scaled_rope.errors import ConfigError
from scaled_rope.flags.serving import check_certify_arguments
from scaled_rope.flags.shared import parse_lengths
from scaled_rope.patching.loading import load_model, resolve_device, stored_tensors
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.config_file import read_config_file
from scaled_rope.serving.config_remarks import config_remarks
from scaled_rope.serving.export import served_length

_CPU_LIMIT, _GPU_LIMIT = 4096, 32768
"""Tokens of the longest prompt, where --lengths does not say it: a dozen passes are to take a minute or so."""
_PROBE = 6
_BYTES_PER_HIDDEN = 160
"""Memory of a pass per token and hidden dimension: about forty float32 numbers live at a time."""


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope certify`: 0 as claimed, 1 another scaling, 3 unclear.

    Raises:
        ConfigError: bad input, or a server that does not answer as it should.
    """
    check_certify_arguments(args)
    raw = read_config_file(args.model)
    remarks = config_remarks(raw, args.model, args.scaling)
    checkpoint = open_checkpoint(args.model)
    own = checkpoint.settings.scaling
    claim = resolve_scaling(args.scaling, own)
    if claim.beyond_tables:
        raise ConfigError(f"scaling {claim.label!r} {claim.beyond_tables}, which no server computes")
    device = resolve_device(args.device)
    tokenizer = load_tokenizer(args.model)
    text = long_text() if args.text is None else Path(args.text).read_text(encoding="utf-8", errors="replace")
    asked = sorted(set(parse_lengths(args.lengths))) if args.lengths else []
    config = text_config(checkpoint.config)
    without_length = getattr(config, "max_position_embeddings", None) is None and claim.max_position_embeddings is None
    target = asked[-1] if asked and without_length else served_length(claim, config, "--lengths")
    limit = _GPU_LIMIT if device.type == "cuda" else _CPU_LIMIT
    ids = encode_text(tokenizer, text, max(asked[-1] if asked else 0, min(target, limit)))
    if len(ids) < _PROBE:
        raise ConfigError(f"--text {args.text} has {len(ids)} tokens; at least {_PROBE}")
    source = connect(args.server, args.served_name, args.server_timeout, args.protocol, tokenizer, ids[:_PROBE])
    lengths = asked
    notes: list[str] = []
    if not asked:
        lengths, notes = _default_lengths(claim, target, min(limit, len(ids)), source.max_length, checkpoint.config)
    else:
        check_limit(source, lengths[-1], "--lengths")
    _check_memory(args.model, checkpoint.config, device)
    model = load_model(checkpoint, device=device)
    certificate = certify(
        Reference(model),
        source,
        ids,
        lengths,
        claim,
        raw,
        dtype=args.dtype,
        first=tokenizer.bos_token_id,
        length=target,
        advance=_Progress(),
    )
    certificate = certificate.with_notes([*remarks, *notes])
    if args.html is not None:
        write_page(Path(args.html), certificate, args.model)
    if args.json:
        print(json.dumps(certificate.to_dict(), indent=1, ensure_ascii=False))
    else:
        print("\n".join(lay_out(certificate)))
    return certificate.exit_code


class _Progress:
    """Says on a terminal's error stream what comes next."""

    def __call__(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text} …", end="", file=sys.stderr, flush=True)

    def __del__(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _default_lengths(
    claim: RopeScaling, target: int, limit: int, served: int | None, config: Any
) -> tuple[list[int], list[str]]:
    """Below L, at L, and up to the target, as far as server, memory and time allow; and what to say about that."""
    text = text_config(config)
    # Where the config says no length, the scaling does, or `served_length` would have refused.
    original = int(claim.original_max_position_embeddings or getattr(text, "max_position_embeddings", None) or target)
    notes = []
    if served is not None and served - 1 < min(limit, target):
        notes.append(f"prompts end at {served - 1} tokens: the server takes {served}, and the scaling is for {target}")
        limit = served - 1
    while limit > 64 and (memory := available_memory()) is not None and _pass_bytes(text, limit) > 0.6 * memory:
        limit //= 2
        if not any("memory" in note for note in notes):
            notes.append("prompts are shorter than the target, for want of memory")
    if limit < target and not notes:
        notes.append(f"prompts end at {limit} tokens of {target}, to save time; --lengths asks for longer ones")
    # A server that was started for the target takes a token less, its answer.
    wanted = {max(2, original // 2), original, (original + target) // 2, min(limit, target)}
    lengths = {length for length in wanted if length <= limit}
    if len(lengths) < 3:
        lengths |= {max(2, min(limit, target) // 4), max(2, min(limit, target) // 2), min(limit, target)}
    if max(lengths) <= original and target > original:
        notes.append(f"no prompt is longer than L, {original} tokens: what happens beyond it was not looked at")
    return sorted(lengths), notes


def _pass_bytes(config: Any, tokens: int) -> int:
    """Memory of one pass, with a mask of its own."""
    hidden, inner = int(config.hidden_size), int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    return tokens * (hidden * _BYTES_PER_HIDDEN + inner * 12) + 8 * tokens**2


def _check_memory(name: str, config: Any, device: torch.device) -> None:
    """Raise a ConfigError where the reference does not fit into memory, before its weights are read."""
    memory = available_memory()
    if device.type != "cpu" or memory is None:
        return
    stored = sum(path.stat().st_size for path in set(stored_tensors(name).values()))
    dtype = getattr(config, "dtype", None) or torch.float32
    size = (
        stored
        * 4
        // max(1, torch.empty(0, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32).element_size())
    )
    if size > memory:
        raise ConfigError(
            f"model {name!r} takes {size / 1e9:.1f} GB in float32, and {memory / 1e9:.1f} GB are free: the reference "
            "needs its weights once"
        )


def lay_out(certificate: Certificate) -> Iterator[str]:
    """The certificate as text, line by line."""
    yield certificate.sentence
    yield ""
    off = f"{certificate.single:.1e} nats off"
    yield f"asked: {certificate.served_by}; by its prompts of one token it computes in {certificate.dtype} ({off})"
    yield ""
    rows: list[Sequence[str]] = [("tokens", "positions", "noise", "off as claimed", "worst", "nearest other", "off")]
    for row in certificate.lengths:
        numbers = (
            f"{row.length}",
            f"{row.positions}",
            f"{row.noise:.1e}",
            f"{row.claimed:.1e}",
            f"{row.claimed_worst:.1e}",
        )
        rows.append(
            (
                *numbers,
                row.other,
                "not tried" if row.other_difference != row.other_difference else f"{row.other_difference:.1e}",
            )
        )
    yield from _table(rows, right=5)
    yield ""
    yield "candidates (differences in nats; ln of how much likelier the best one is):"
    rows = [("off", "worst", "ln ratio", "", "candidate")]
    for one in certificate.candidates:
        rows.append(
            (
                f"{one.difference:.1e}",
                f"{one.worst:.1e}",
                f"{one.log_ratio:.3g}",
                one.state,
                ", or ".join((one.name, *one.also)),
            )
        )
    yield from _table(rows, right=3)
    for note in certificate.notes:
        yield f"note: {note}"


def _table(rows: Sequence[Sequence[str]], right: int) -> Iterator[str]:
    """Columns of equal width; the first `right` of them flush right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.rjust(width) if at < right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield f"  {'  '.join(cells)}".rstrip()
