"""The rotary module that a family has in the installed transformers, built from a config alone, and its numbers.

A family's own module is what counts: some read keys of their own (`alpha`, `short_mscale`), others take the rotated
dimensions from elsewhere than the common formulas. No model is built and no weights are needed.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scaled_rope.serving.inspect_report import quiet


class RotaryNumbers(NamedTuple):
    """The numbers of a rotary module."""

    inv_freq: Tensor
    """[D/2], radians per position."""
    attention_factor: float


def rotary_class(config: Any) -> type[nn.Module] | None:
    """The class of the rotary module that the models of a config's class use; None where there is none to be found.

    config: the text part of a model's config, an object of transformers.
    """
    place = type(config).__module__
    if not place.startswith("transformers.models."):
        return None
    with quiet():
        try:
            module = importlib.import_module(place.replace(".configuration_", ".modeling_"))
        except ImportError:  # a family without modeling code of its own, or that needs another package
            return None
    found = [each for name, each in vars(module).items() if _takes_config(name, each)]
    named = [each for each in found if _annotation(each) == type(config).__name__]
    # One class for several configs is annotated with one of them.
    chosen = named or [each for each in found if "Vision" not in each.__name__]
    return chosen[0] if len(chosen) == 1 else None


def _takes_config(name: str, value: Any) -> bool:
    """Whether a name of a modeling module is a rotary module that is built from a config."""
    if not isinstance(value, type) or not issubclass(value, nn.Module) or "Rotary" not in name:
        return False
    return "config" in inspect.signature(value.__init__).parameters


def _annotation(kind: type[nn.Module]) -> str:
    said = inspect.signature(kind.__init__).parameters["config"].annotation
    return said if isinstance(said, str) else str(getattr(said, "__name__", ""))


def build_rotary_module(config: Any) -> nn.Module | None:
    """The family's rotary module as it is when a model is built from a config; None where no class can be found.

    Raises:
        Exception: whatever the family's code raises for a config that it cannot use.
    """
    kind = rotary_class(config)
    if kind is None:
        return None
    with quiet(), torch.device("cpu"):
        return kind(config=copy.deepcopy(config))


def rotary_numbers(rotary: Any, layer_type: str | None = None, length: int | None = None) -> RotaryNumbers | None:
    """The numbers of a rotary module of transformers; None where it holds none under the usual names.

    layer_type: which of its tables, where it has one per layer type.
    length: run it on a sequence of so many tokens before; its forward pass is where it follows the length.
    """
    prefix, more = (f"{layer_type}_", (layer_type,)) if layer_type else ("", ())
    if length is not None:
        rotary(torch.zeros(1), torch.tensor([[length - 1]]), *more)
    inv_freq = getattr(rotary, f"{prefix}inv_freq", None)
    if not isinstance(inv_freq, Tensor) or inv_freq.dim() != 1:
        return None
    return RotaryNumbers(inv_freq.detach().float(), float(getattr(rotary, f"{prefix}attention_scaling", 1.0)))
