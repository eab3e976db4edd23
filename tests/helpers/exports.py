"""Configs for `scaled-rope export`, and the command."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig

from scaled_rope.command_line import Parser
from scaled_rope.flags import serving
from scaled_rope.serving import export as module
from scaled_rope.serving.export_report import ExportReport

HEAD_DIM = 16


def make_config(**overrides: Any) -> LlamaConfig:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 61,
        "max_position_embeddings": 512,
    }
    return LlamaConfig(**(settings | overrides))


def flags_of(report: ExportReport) -> dict[str, str]:
    return dict(zip(report.flags[::2], report.flags[1::2], strict=True))


def command_line(*arguments: str) -> tuple[argparse.Namespace, Callable[[], int]]:
    parser = Parser("scaled-rope export")
    serving.add_export_arguments(parser)
    args = parser.parse_args(arguments)
    return args, lambda: module.run(args)
