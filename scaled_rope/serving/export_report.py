"""The result of `export` for a scaling and a target, and its layout."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.gguf import GgufRope
from scaled_rope.serving.targets.common import TOLERANCE


@dataclass(frozen=True)
class Comparison:
    """A target's numbers against ours, for one sequence length."""

    length: int
    max_relative_difference: float
    """Over all frequencies: |theirs - ours| / ours."""
    worst_dimension: int
    attention_factor: float
    ours: float
    """Our attention factor."""
    layer_type: str = ""
    """The layers that these are the numbers of; empty for all."""

    @property
    def attention_difference(self) -> float:
        """Theirs - ours."""
        return self.attention_factor - self.ours

    @property
    def matches(self) -> bool:
        """Whether both count as the same, see `TOLERANCE`."""
        return self.max_relative_difference <= TOLERANCE and abs(self.attention_difference) <= TOLERANCE * self.ours


@dataclass(frozen=True)
class ExportReport:
    """The settings for a target, and the numbers that it computes from them."""

    scaling: RopeScaling
    target: str
    """Name and version."""
    status: str
    """"exact"; "unknown": exact if the target's class for this family passes everything on, which is not known;
    "partial": at some lengths only; "refused": at none, or there are no words for it."""
    reason: str = ""
    """Why it was refused, one line."""
    config: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    command: str = ""
    gguf: GgufRope | None = None
    converts: bool = False
    """Whether a GGUF that is converted from `config` holds what `gguf` says; else it must be written into a copy."""
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    """Files to put beside config.json: name -> text."""
    basis: str = ""
    """Which release the words and the arithmetic are from, and whether that was run."""
    config_place: str = "in config.json"
    """The place of `config` on the command line, in words; not part of `to_dict`."""

    @property
    def exit_code(self) -> int:
        """0: exact; 1: the numbers differ, or it is not known whether; 2: refused."""
        return {"exact": 0, "refused": 2}.get(self.status, 1)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        values = dataclasses.asdict(self) | {"scaling": self.scaling.to_dict(), "label": self.scaling.label}
        del values["config_place"]
        values["comparisons"] = [
            dataclasses.asdict(c) | {"attention_difference": c.attention_difference, "matches": c.matches}
            for c in self.comparisons
        ]
        return values

    def __str__(self) -> str:
        if self.status == "refused":
            return f"{self.scaling.label} for {self.target}: refused: {self.reason}"
        status = self.status if self.status != "unknown" else "unknown for this class of model, see the notes"
        lines = [f"{self.scaling.label} for {self.target}: {status}", "", "run:", f"  {self.command}", ""]
        lines += [f"{self.config_place}:", *_lay_out_config(self.config), ""]
        for name, text in self.files.items():
            lines += [f"{name}:", *(f"  {line}" for line in text.splitlines()), ""]
        if self.gguf is not None:
            lines += ["in the GGUF:", f"  {self.gguf}", ""]
        lines += [f"what {self.target} makes of it, against ours:"] if self.comparisons else ["not compared with ours"]
        for comparison in self.comparisons:
            lines += _lay_out_comparison(comparison)
        if self.basis:
            lines += ["", f"basis: {self.basis}"]
        return "\n".join([*lines, *(["", "notes:"] if self.notes else []), *(f"  - {note}" for note in self.notes)])


def _lay_out_comparison(c: Comparison) -> list[str]:
    layers = f", {c.layer_type} layers" if c.layer_type else ""
    return [
        f"  up to {c.length} tokens{layers}: {'same' if c.matches else 'DIFFERENT'}",
        f"    frequencies       off by at most {c.max_relative_difference:.1e} (relative; dimension "
        f"{c.worst_dimension})",
        f"    attention factor  {c.attention_factor:.6g}, ours {c.ours:.6g} ({c.attention_difference:+.1e})",
    ]


def _lay_out_config(config: Mapping[str, Any]) -> list[str]:
    """JSON to be copied, one key per line also in `rope_parameters`."""
    text = json.dumps(config, indent=2)
    # A list of frequencies stays on one line.
    text = re.sub(r"\[[^\[\]]*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    return [f"  {line}" for line in text.splitlines()]
