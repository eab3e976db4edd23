"""Checks of a loaded model's rotary modules against its config."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaled_rope.errors import ConfigError
from scaled_rope.patching.base_model import attention_factor_of, buffer_name
from scaled_rope.patching.families import ADAPTERS
from scaled_rope.patching.patch import lost_part, patched_plan, patched_scaling
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import config_head_dim, nested_types, text_config
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.inspect_report import Finding, describe_difference, quiet


def check_model(model: nn.Module) -> list[Finding]:
    """Compare what a loaded model computes with what its config says.

    Finds configs that were edited after loading, patches of which a part was undone, frequencies that lost float32,
    dynamic modules that remember longer inputs, and models whose own code differs from their config. Models without a
    rotary module give no findings.
    """
    findings: list[Finding] = []
    for base, rotary in _rotary_modules(model):
        findings += _check_rotary(model, base, rotary)
    if lost := lost_part(model, of_modules=True):
        installed = patched_scaling(model)
        assert installed is not None
        findings.append(
            Finding(
                "patch-undone",
                "error",
                f"The model was patched with {installed.label} and lost a part of that: {lost}.",
                "Call patch_model again, after whatever else changes the model.",
            )
        )
    return list(dict.fromkeys(findings))


# ----------------------------------------------------------------------------------------------------- judging a model


def _rotary_modules(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(module that holds it, rotary module) for every rotary module of text in a model."""
    for parent in model.modules():
        config: Any = vars(parent).get("config")
        rotary = parent._modules.get("rotary_emb")
        if rotary is None or config is None or not hasattr(config, "get_text_config"):
            continue
        if text_config(config) is config and hasattr(config, "rope_parameters"):
            yield parent, rotary


def _check_rotary(model: nn.Module, base: Any, rotary: Any) -> Iterator[Finding]:
    config = base.config
    adapter = ADAPTERS.get(config.model_type)
    if adapter is not None and adapter.alibi and getattr(config, adapter.alibi, False):
        yield Finding("alibi", "info", f"{adapter.alibi}=true: the model has a rotary module that it does not use.")
        return
    with_theta = _has_theta(getattr(config, "rope_parameters", None))
    if not with_theta:
        yield Finding(
            "no-live-theta",
            "error",
            "config.rope_parameters has no rope_theta: transformers cannot build a model from it, and other readers "
            "fall back to a base that is not the model's.",
            "Assign the whole dictionary, rope_theta included.",
        )
    yield from _check_dtype(config, rotary)
    installed = patched_scaling(model)
    if installed is not None:
        yield from _check_patched(model, config, installed)
    elif with_theta:
        yield from _check_vanilla(config, rotary)


def _has_theta(rope: Any) -> bool:
    """Whether every part of `rope_parameters` says its base."""
    parts = [rope[name] for name in nested_types(rope)] if isinstance(rope, Mapping) and nested_types(rope) else [rope]
    return all(isinstance(part, Mapping) and part.get("rope_theta") is not None for part in parts)


def _check_dtype(config: Any, rotary: Any) -> Iterator[Finding]:
    """Frequencies outside float32: wrong by a constant share, so the angle is off by more the further a token is."""
    for name, value in list(rotary.named_buffers()):
        if not name.endswith("inv_freq") or "original" in name or value.dtype in (torch.float32, torch.float64):
            continue
        if value.is_meta:
            continue
        context = int(getattr(config, "max_position_embeddings", 0) or 0)
        exact = _fresh_buffer(config, rotary, name)
        if exact is None or exact.shape != value.shape:
            continue
        phase = float((value.double().cpu() - exact.double()).abs().max()) * context
        yield Finding(
            "frequencies-cast",
            "error",
            f"{name} is {str(value.dtype).removeprefix('torch.')}: at position {context} angles are off by up to "
            f"{phase:.3g} radians.",
            "Load with from_pretrained(dtype=...), which leaves frequencies in float32, instead of .to(), .half() or "
            ".bfloat16(); or patch the model, whose frequencies then stay in float32.",
        )


def _fresh(config: Any, rotary: Any) -> Any:
    """The same kind of rotary module, built from the config as it is now; None when that cannot be built."""
    with quiet():
        try:
            return type(rotary)(config=copy.deepcopy(config))
        except Exception:  # whatever the model's code raises for a config that it cannot use
            return None


def _fresh_buffer(config: Any, rotary: Any, name: str) -> Tensor | None:
    fresh = _fresh(config, rotary)
    value = getattr(fresh, name, None)
    return value if isinstance(value, Tensor) else None


def _check_patched(model: nn.Module, config: Any, installed: RopeScaling) -> Iterator[Finding]:
    plan = patched_plan(model)
    try:
        said = RopeScaling.read_config(config)[0]
    except ConfigError as error:
        yield Finding("bad-value", "error", f"{error}.", "Patch the model again, which writes the config.")
        return
    if said != installed and not plan.layers:
        yield Finding(
            "edited-after-load",
            "error",
            f"The model computes {installed.label}, its config says {said.label} by now: an edit of the config does "
            "not reach a model that is loaded.",
            "Call patch_model again with what you want.",
        )


@dataclass(frozen=True)
class _Tables:
    """The frequencies and the attention factor of a rotary module of transformers for one layer type."""

    layer_type: str | None
    """None where all layers share it."""
    rope_type: str
    live: Tensor
    """Frequencies [D/2] as the module was built."""
    live_factor: float
    """Its attention factor."""
    current: Tensor
    """Frequencies [D/2] that the last input left behind."""
    now: Tensor
    """Frequencies [D/2] of a module that is built now."""
    now_factor: float

    @property
    def where(self) -> str:
        """The layers in question, to go on with in a sentence; empty for all."""
        return f" in {self.layer_type} layers" if self.layer_type else ""


def _check_vanilla(config: Any, rotary: Any) -> Iterator[Finding]:
    """A module of transformers: what it holds, what it would hold if built now, and what the config means."""
    fresh = _fresh(config, rotary)
    if fresh is None:
        yield Finding(
            "edited-after-load",
            "error",
            "The config says something by now that transformers cannot build the model from; the model computes what "
            "it was loaded with.",
            "Use patch_model, or correct the config.",
        )
        return
    layer_types: list[str | None] = [*nested_types(config.rope_parameters)] or [None]
    found = [_tables_of(config, rotary, fresh, layer_type) for layer_type in layer_types]
    if not any(found):  # entries of a family whose layers share one table
        found = [_tables_of(config, rotary, fresh, None)]
    for tables in found:
        if tables is None:
            continue
        edited = list(_check_edited(tables))
        if edited:
            yield from edited
            continue
        yield from _check_memory(tables)
        yield from _check_meaning(config, tables)


def _tables_of(config: Any, rotary: Any, fresh: Any, layer_type: str | None) -> _Tables | None:
    """None where the module has no frequencies of its own to look at."""
    current = getattr(rotary, buffer_name("inv_freq", layer_type), None)
    live = getattr(rotary, buffer_name("original_inv_freq", layer_type), current)
    now = getattr(fresh, buffer_name("inv_freq", layer_type), None)
    if not isinstance(live, Tensor) or not isinstance(now, Tensor) or live.is_meta:
        return None
    rope = config.rope_parameters
    return _Tables(
        layer_type=layer_type,
        rope_type=(rope[layer_type] if layer_type else rope).get("rope_type", "default"),
        live=live,
        live_factor=attention_factor_of(rotary, layer_type),
        current=getattr(rotary, buffer_name("inv_freq", layer_type)),
        now=now,
        now_factor=attention_factor_of(fresh, layer_type),
    )


def _check_edited(tables: _Tables) -> Iterator[Finding]:
    """Whether the module is the one that the config describes; `_check_dtype` reports frequencies in low precision."""
    if tables.live.dtype not in (torch.float32, torch.float64):
        return
    difference = describe_difference(
        tables.live, tables.live_factor, tables.now, tables.now_factor, "the model", "by the config"
    )
    if difference:
        yield Finding(
            "edited-after-load",
            "error",
            f"The model does not compute what its config says{tables.where}{difference}. An edit of the config does "
            "not reach a model that is loaded.",
            "Use patch_model, or edit config.json and load again.",
        )


def _check_memory(tables: _Tables) -> Iterator[Finding]:
    """Whether the module still holds the frequencies of a longer input."""
    if tables.rope_type not in ("dynamic", "longrope"):
        return
    if describe_difference(tables.current.to(tables.live.dtype), 1, tables.live, 1, "", ""):
        yield Finding(
            "dynamic-state",
            "warning",
            f"The frequencies{tables.where} are those of an earlier, longer input: the next one is computed with them "
            "until it resets them.",
            "Load with scaled_rope.load_model, whose rotary module has no memory.",
        )


def _check_meaning(config: Any, tables: _Tables) -> Iterator[Finding]:
    """Whether the model's code makes of the config what it means."""
    try:
        meant = RopeScaling.read_config(config, tables.layer_type)[0]
        head_dim = config_head_dim(config)
        if head_dim is None:
            return
        ours, our_factor = compute_rope(meant.of_frequencies, head_dim)
    except ConfigError as error:
        yield Finding("bad-value", "error", f"{error}.", "Correct the value.")
        return
    difference = describe_difference(tables.now, tables.now_factor, ours, our_factor, "the model", "meant")
    if difference:
        yield Finding(
            "computes-otherwise",
            "error",
            f"The model's code makes something else of its config than the config means{tables.where}{difference}.",
            "Use patch_model: it computes what is meant.",
        )
