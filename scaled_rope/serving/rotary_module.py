"""The rotary module that a family has in the installed transformers, built from a config alone, and its numbers.

A family's own module is what counts: some read keys of their own (`alpha`, `short_mscale`), others take the rotated
dimensions from elsewhere than the common formulas. No model is built and no weights are needed.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import sys
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from scaled_rope.patching.base_model import attention_factor_of, frequencies_of
from scaled_rope.scaling.hf_config import has_rope
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
    if not type(config).__module__.startswith("transformers.models.") or not has_rope(config):
        return None
    module = _modeling_module(config)
    found = [each for name, each in vars(module).items() if _takes_config(name, each)] if module is not None else []
    # One class for several configs is annotated with one of them; then the one that is called like the config.
    chosen = [each for each in found if _annotation(each) == type(config).__name__] or found
    if not chosen:
        return None
    best: type[nn.Module] = max(chosen, key=lambda each: (_shared(each, type(config)), -len(each.__name__)))
    return best


def _modeling_module(config: Any) -> Any:
    """The module with the models of a config's class; None where there is none, or it needs another package."""
    with quiet():
        try:
            return importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
        except ImportError:
            pass
        try:  # a family that uses the models of another
            return sys.modules[transformers.AutoModel._model_mapping[type(config)].__module__]
        except (ImportError, KeyError):
            return None


def _shared(one: type, other: type) -> int:
    """The length of the common beginning of two classes' names."""
    return len(os.path.commonprefix([one.__name__, other.__name__]))


def rotates_images(config: Any) -> bool:
    """Whether the rotary module of a config's class is for the patches of an image: it is not called with positions."""
    kind = rotary_class(config)
    return kind is not None and "position_ids" not in inspect.signature(kind.forward).parameters


def _takes_config(name: str, value: Any) -> bool:
    """Whether a name of a modeling module is a rotary module that is built from a config."""
    if not isinstance(value, type) or not issubclass(value, nn.Module) or "Rotary" not in name or "Vision" in name:
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


def shares_one_table(config: Any) -> bool:
    """Whether the family's rotary module holds one table for all layers, whatever `config` says; False where it is not
    known."""
    flat = copy.deepcopy(config)
    try:
        flat.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
        rotary = build_rotary_module(flat)
        return rotary is not None and rotary_numbers(rotary) is not None
    except Exception:  # a family that wants an entry per layer type
        return False


def rotary_numbers(rotary: Any, layer_type: str | None = None, length: int | None = None) -> RotaryNumbers | None:
    """The numbers of a rotary module of transformers; None where it holds none under the usual names.

    layer_type: which of its tables, where it has one per layer type.
    length: after a sequence of so many tokens; its forward pass is where it follows the length.
    """
    factor = _measured_factor(rotary, length or 2, (layer_type,) if layer_type else ())
    inv_freq = frequencies_of(rotary, layer_type)
    if inv_freq is None:
        return None
    inv_freq = inv_freq.detach().float()
    if hasattr(rotary, "mrope_section"):  # ERNIE 4.5 VL holds them in the order of the axes
        inv_freq = inv_freq.sort(descending=True).values
    said = attention_factor_of(rotary, layer_type)
    # What is measured is rounded to float32.
    return RotaryNumbers(inv_freq, said if factor is None or abs(factor - said) < 1e-5 * said else factor)


def _measured_factor(rotary: Any, length: int, more: tuple[str, ...]) -> float | None:
    """√(cos² + sin²) of the last of `length` positions; None where the module returns something else than tables.

    Phi-3.5-MoE multiplies its tables by another number than `attention_scaling`.
    """
    try:
        with torch.device("cpu"):  # whatever the default device is
            tables = rotary(torch.zeros(1), torch.tensor([[length - 1]]), *more)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        return None  # called in another way
    if not isinstance(tables, tuple) or len(tables) != 2 or not all(isinstance(table, Tensor) for table in tables):
        return None
    return float((tables[0].double() ** 2 + tables[1].double() ** 2).sqrt().max())
