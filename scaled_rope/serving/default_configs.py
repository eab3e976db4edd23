"""Whether `inspect` and transformers agree on the config that a family's class makes when it is told nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from scaled_rope.errors import ConfigError, first_line
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import nested_types
from scaled_rope.serving.config_facts import build_text_config
from scaled_rope.serving.inspect_config import inspect
from scaled_rope.serving.inspect_report import Inspection, describe_difference
from scaled_rope.serving.rotary_module import RotaryNumbers, build_rotary_module, rotary_numbers

Verdict = Literal["same", "no RoPE of text", "not compared", "differs", "refused"]


@dataclass(frozen=True)
class DefaultFinding:
    """The verdict on what `inspect` reads from a config, against the family's own rotary module."""

    verdict: Verdict
    """"same": every frequency and the attention factor, in all layer types that the module has tables of; "no RoPE of
    text": there is nothing to compare; "not compared": the family has no rotary module of the usual kind; "refused":
    `inspect` reads no scaling from it and says why."""
    detail: str = ""
    """One line: the difference, or the reason."""


def inspect_default(config: Any) -> DefaultFinding:
    """Inspect a config object of transformers and compare the numbers with the family's own rotary module."""
    report = _inspected(config, None)
    if isinstance(report, DefaultFinding):
        return report
    text = build_text_config(config.to_dict())[0]
    try:
        rotary = None if text is None else build_rotary_module(text)
    except Exception as error:  # whatever the family's code raises: some defaults make no model
        return DefaultFinding("not compared", f"transformers builds no rotary module of it: {first_line(error)}")
    if rotary is None:
        return DefaultFinding("not compared", f"no rotary module for {type(text).__name__} was found")
    types: list[str | None] = [*nested_types(text.rope_parameters or {})] or [None]
    tables = {name: numbers for name in types if (numbers := rotary_numbers(rotary, name)) is not None}
    if not tables:
        return DefaultFinding("not compared", f"{type(rotary).__name__} holds no frequencies under the usual names")
    for name, numbers in tables.items():
        own = _inspected(config, name)
        if isinstance(own, DefaultFinding):
            return own
        if difference := _difference(own, numbers):
            return DefaultFinding("differs", f"{name or 'all layers'}{difference}")
    return DefaultFinding("same")


def _inspected(config: Any, layer_type: str | None) -> Inspection | DefaultFinding:
    """The report on layers of a type, where it says frequencies."""
    try:
        report = inspect(config, layer_type)
    except ConfigError as error:
        return DefaultFinding("refused", str(error))
    if {"no-rope", "no-context"} & set(report.codes):
        return DefaultFinding("no RoPE of text")
    if report.scaling is not None and report.dimensions:
        return report
    errors = [finding.text for finding in report.findings if finding.level == "error"]
    return DefaultFinding("refused", errors[0] if errors else "no head_dim")


def _difference(report: Inspection, numbers: RotaryNumbers) -> str:
    """How a report's numbers differ from those of a rotary module; empty when they do not."""
    assert report.scaling is not None and report.head_dim is not None  # `_inspected` made sure
    ours = torch.tensor([dimension.scaled for dimension in report.dimensions])
    factor = compute_rope(report.scaling, report.head_dim)[1]
    return describe_difference(numbers.inv_freq, numbers.attention_factor, ours, factor, "transformers", "inspected")
