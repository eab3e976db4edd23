"""`scaled-rope inspect`: a model's RoPE scaling number by number, and the faults in it.

Two views of a config are compared: the dictionary that its author wrote, and what transformers makes of it. Where they
part, or where a config that works means something else than it seems to, there is a `Finding` with a remedy. No weights
are needed; `check_model` looks at a loaded model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from scaled_rope.errors import ConfigError, type_and_line
from scaled_rope.flags.serving import check_inspect_arguments
from scaled_rope.patching.loading import load_model
from scaled_rope.report.drawing import check_format
from scaled_rope.serving.checks import run_checks
from scaled_rope.serving.config_facts import read_facts
from scaled_rope.serving.config_file import config_as_dictionary, read_config_file
from scaled_rope.serving.config_numbers import lengths_in_effect, native_rope_type, numbers_in_effect
from scaled_rope.serving.inspect_model import check_model
from scaled_rope.serving.inspect_report import Finding, Inspection, quiet
from scaled_rope.serving.scaling_plots import plot_scaling


def inspect(
    source: str | Path | Mapping[str, Any] | Any,
    layer_type: str | None = None,
    scaling: str | None = None,
    length: int | None = None,
) -> Inspection:
    """Read a config and judge it.

    Args:
        source: a model's folder, a config.json, a hub name, a config as a dictionary or as an object of transformers.
        layer_type: which layers, where the scaling differs between layer types; default: the full-attention ones.
        scaling: report on the model under this scaling instead of its own, see `resolve.resolve_scaling`.
        length: tokens of the sequence that the table is for, where the frequencies depend on it. Default: the longest
            that the config allows, at least twice L.

    Raises:
        ConfigError: nothing there, not a config, an unknown layer type or spec. What is wrong inside the config is a
            finding.
    """
    raw = read_config_file(source) if isinstance(source, str | Path) else config_as_dictionary(source)
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    facts = read_facts(raw, name, layer_type, scaling, length)
    findings = run_checks(facts)
    codes = {finding.code for finding in findings}
    return Inspection(
        source=name,
        model_type=facts.model_type,
        scaling=facts.scaling,
        head_dim=facts.head_dim,
        numbers=tuple(numbers_in_effect(facts, codes)),
        layers=facts.layers,
        without_rope=facts.without_rope,
        lengths=lengths_in_effect(facts, codes),
        native=native_rope_type(facts),
        dimensions=facts.dimensions,
        findings=findings,
    )


# --------------------------------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope inspect`: 1 when there is an error among the findings, else 0.

    Raises:
        ConfigError: bad input.
    """
    check_inspect_arguments(args)
    if args.plot:
        check_format(Path(args.plot))
    report = inspect(args.model, args.layer_type, args.scaling, args.length)
    if args.weights:
        model, refusal = _load(args.model)
        findings = list(report.findings)
        if refusal is not None:
            findings.append(_refused(refusal, "not-native" in report.codes))
        findings += check_model(model)
        report = dataclasses.replace(report, findings=tuple(dict.fromkeys(findings)))
    if args.plot:
        if report.scaling is None or report.head_dim is None or not report.dimensions:
            raise ConfigError(f"plot {args.plot!r}: there are no frequencies to draw, see the findings without --plot")
        title = f"{args.model}: {report.scaling.label}"
        plot_scaling(report.scaling, report.head_dim, Path(args.plot), title, report.lengths["shown"])
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print(report.text(args.full))
        if args.plot:
            print(f"wrote {args.plot}")
    return report.exit_code


def _load(name: str) -> tuple[nn.Module, Exception | None]:
    """The model as transformers itself loads it; where it refuses, as we load it, and the refusal."""
    path = Path(name)
    folder = str(path.parent) if path.is_file() else name
    with quiet():
        try:
            model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # its own errors are many; load_model says in one line what is wrong with a file
            return load_model(folder), error
    return model, None


def _refused(error: Exception, by_design: bool) -> Finding:
    """The finding that transformers does not load a model. by_design: whether its config says a scaling that
    transformers has no words for."""
    return Finding(
        "transformers-refuses",
        "info" if by_design else "error",
        f"transformers {transformers.__version__} does not load this model ({type_and_line(error).rstrip('.')}); the "
        "weights were looked at as scaled_rope.load_model loads them.",
        "" if by_design else "Load it with scaled_rope.load_model.",
    )
