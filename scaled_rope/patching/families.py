"""Model families: one row per known model type, and detection of others by their rotary module."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from scaled_rope.errors import ConfigError, type_and_line, unknown
from scaled_rope.patching.base_model import (
    AXES,
    attention_factor_of,
    buffer_name,
    frequencies_of,
    on_cpu,
    tables_of_text,
)
from scaled_rope.patching.rotary import Layout
from scaled_rope.scaling.hf_config import nested_types


@dataclass(frozen=True)
class Adapter:
    """The properties that differ between model families. The defaults are the common layout: one rotary module
    `rotary_emb` on the base model, called as rotary_emb(x, position_ids), that returns (cos, sin) over the rotated
    dimensions."""

    layout: Layout = "halves"
    float32_tables: bool = False
    """Whether attention takes float32 tables whatever the model's dtype."""
    per_layer_type: bool = False
    """Whether the rotary module is called with a layer type, and `rope_parameters` is nested by layer type."""
    partial_rotary: bool = False
    """Whether attention can rotate a part of each head only."""
    layers: str = "layers"
    """Name of the list of decoder layers on the base model."""
    alibi: str = ""
    """The config field that is true when the model uses ALiBi and its rotary module is idle."""
    rope_flags: str = ""
    """The config field that holds, layer by layer, whether the layer uses RoPE."""
    rope_layer_type: str = ""
    """The only layer type that uses RoPE; empty when all do."""
    rope_window: str = ""
    """The config field that, when null, makes all layers use RoPE in spite of `rope_layer_type`."""
    axes: bool = False
    """Whether the rotary module takes positions along several axes, for images and video (multimodal RoPE)."""
    own_tables: bool = False
    """Whether the tables have a form of the family's own (complex numbers, another order). Then the family's module
    computes them, from the frequencies of the scaling."""


_PARTIAL = Adapter(partial_rotary=True)
# With a sliding window, EXAONE's layers of full attention have no RoPE.
_EXAONE = Adapter(rope_layer_type="sliding_attention", rope_window="sliding_window")
ADAPTERS: dict[str, Adapter] = {
    "afmoe": Adapter(rope_layer_type="sliding_attention"),
    "cohere": Adapter(layout="interleaved"),
    "cohere2": Adapter(layout="interleaved", rope_layer_type="sliding_attention"),
    "exaone4": _EXAONE,
    "exaone_moe": _EXAONE,
    "falcon": Adapter(layers="h", alibi="alibi"),
    "gemma": Adapter(),
    "gemma2": Adapter(),
    "gemma3_text": Adapter(per_layer_type=True),
    "gpt_neox": _PARTIAL,
    "gpt_oss": Adapter(layout="half"),
    "llama": Adapter(),
    "mistral": Adapter(),
    "mixtral": Adapter(),
    "olmo": Adapter(float32_tables=True),
    "olmo2": Adapter(float32_tables=True),
    "olmo3": Adapter(float32_tables=True, per_layer_type=True),
    "phi": _PARTIAL,
    "phi3": _PARTIAL,
    "qwen2": Adapter(),
    "qwen2_moe": Adapter(),
    "qwen3": Adapter(),
    "qwen3_moe": Adapter(),
    "smollm3": Adapter(rope_flags="no_rope_layers"),
    "stablelm": _PARTIAL,
}
"""Supported families by `config.model_type`. Others are recognised by what their rotary module returns."""


_WITHOUT_ROPE = {"kolibri1": _EXAONE, "llama4_text": Adapter(rope_flags="no_rope_layers")}
"""Families that are recognised by their rotary module, some of whose layers have no RoPE. Only that is read here."""


UNSCALED = {"molmo2_text": "rotary_emb_unscaled"}
"""Model type -> path of a second rotary module, for layers that the family leaves unscaled whatever its config says."""


def adapter_of(config: Any, rotary: nn.Module | None = None) -> Adapter:
    """Return the adapter of a family, by its name or, given its rotary module, by the tables that this returns.

    Raises:
        ConfigError: the family is not recognised, or the model does not use its rotary module.
    """
    adapter = ADAPTERS.get(config.model_type)
    if adapter is None:
        if rotary is None:
            raise unknown("architecture", config.model_type, ADAPTERS)
        adapter = detect_adapter(config, rotary)
    if adapter.alibi and getattr(config, adapter.alibi, False):
        raise ConfigError(f"architecture {config.model_type!r} with {adapter.alibi}=true uses no rotary embedding")
    return adapter


def detect_adapter(config: Any, rotary: nn.Module) -> Adapter:
    """Return the adapter that fits the tables of a rotary module of transformers.

    Raises:
        ConfigError: none does, with the reason: its tables cannot be computed from other frequencies, or they cannot be
            looked at.
    """
    name, refused = type(rotary).__name__, f"architecture {config.model_type!r}:"
    if not isinstance(getattr(config, "rope_parameters", None), dict):
        raise ConfigError(
            f"{refused} its config has no rope_parameters, so {name} takes its angles from elsewhere, and cannot be "
            "scaled"
        )
    if "RotaryEmbedding" not in name:
        raise ConfigError(f"{refused} {name} is by its name no rotary module of transformers, and so not known")
    if list(inspect.signature(rotary.forward).parameters)[:2] != ["x", "position_ids"]:
        raise ConfigError(f"{refused} {name} is not called with positions, so what to scale in it is not known")
    try:
        # A copy: a module that remembers the longest length seen must not remember the probe's.
        with _disable_current_modes():
            probe = on_cpu(rotary)
    except Exception as error:  # whatever the family's code raises
        raise ConfigError(
            f"{refused} no copy of {name} can be made, to look at its tables ({type_and_line(error)})"
        ) from error
    with _disable_current_modes(), torch.device("cpu"):  # whatever the default device is
        adapter = _fitting(config, rotary, probe)
    if adapter is None:
        raise ConfigError(
            f"{refused} the tables of {name} do not follow from position times frequency, so other frequencies cannot "
            "be put in"
        )
    return adapter


def _fitting(config: Any, rotary: nn.Module, probe: Any) -> Adapter | None:
    types = table_types(config, rotary)
    names: list[str | None] = [*types] or [None]
    # Learned factors of frequencies (Mistral Large 4) are the family's own to apply.
    learned = next(rotary.parameters(), None) is not None
    found = {None if learned else _probe(probe, name) for name in names}
    if len(found) == 1 and (only := found.pop()) is not None:
        return only
    if all(_turns_by_frequency(probe, name) for name in names):
        return Adapter(own_tables=True, per_layer_type=bool(types), partial_rotary=True)
    return None


def table_types(config: Any, rotary: nn.Module) -> list[str]:
    """The types of layers for which a family's rotary module has tables of their own; empty when all share one."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    return [name for name in nested_types(rope) if hasattr(rotary, buffer_name("inv_freq", name))]


def _probe(rotary: Any, layer_type: str | None) -> Adapter | None:
    """Return the adapter that fits a rotary module's tables at positions 0, 1 and 3, or None."""
    more = () if layer_type is None else (layer_type,)
    if frequencies_of(rotary, layer_type) is None:
        return None
    x = torch.zeros(2, 1, 1, dtype=torch.bfloat16)
    positions = torch.tensor([[0, 1, 3]])
    try:
        cos, sin = tables_of_text(rotary, x, positions, *more)
    except Exception:
        return None  # whatever it wants, it is not the common layout
    if not isinstance(cos, Tensor) or not isinstance(sin, Tensor):
        return None
    # Read again after the call, which may have replaced frequencies that a longer text left behind.
    inv_freq = getattr(rotary, buffer_name("inv_freq", layer_type))
    angles = positions[..., None].float() * inv_freq.float()
    scale = attention_factor_of(rotary, layer_type)
    layouts: dict[Layout, Callable[[Tensor], Tensor]] = {
        "halves": lambda table: torch.cat((table, table), dim=-1),
        "interleaved": lambda table: table.repeat_interleave(2, dim=-1),
        "half": lambda table: table,
    }
    for layout, lay_out in layouts.items():
        wanted = lay_out(angles.cos() * scale), lay_out(angles.sin() * scale)
        # 0.02: the module rounds its tables to bfloat16, by up to 0.002 of `scale`.
        if all(
            table.shape == right.shape and torch.allclose(table.float(), right, rtol=0, atol=0.02 * scale)
            for table, right in zip((cos, sin), wanted, strict=True)
        ):
            return Adapter(
                layout=layout,
                float32_tables=cos.dtype == torch.float32,
                per_layer_type=layer_type is not None,
                # Whether a part of each head is rotated shows in the table's width, see `_check_width`.
                partial_rotary=True,
                axes=_takes_axes(rotary, x, positions, more),
            )
    return None


def _takes_axes(rotary: Any, x: Tensor, positions: Tensor, more: tuple[str, ...]) -> bool:
    """Whether a rotary module takes positions along several axes (multimodal RoPE): [axes, B, T] instead of [B, T]."""
    for count in AXES:
        try:
            cos, _ = rotary(x, positions.expand(count, 2, -1), *more)
        except Exception:
            continue
        if cos.dim() == 3:  # the axes have gone into one table
            return True
    return False


def _turns_by_frequency(rotary: Any, layer_type: str | None) -> bool:
    """Whether a rotary module's tables follow from position times frequency, as those of any rotation do.

    Then twice the frequencies give the tables of twice the positions, and the module can compute with any others.
    """
    more = () if layer_type is None else (layer_type,)
    inv_freq = frequencies_of(rotary, layer_type)
    if inv_freq is None:
        return False
    x, positions = torch.zeros(1, 1, 1), torch.tensor([[0, 1, 3]])
    trial = copy.deepcopy(rotary)
    try:
        once, twice = (flat_tables(tables_of_text(trial, x, positions * times, *more)) for times in (1, 2))
        setattr(trial, buffer_name("inv_freq", layer_type), inv_freq * 2)
        doubled = flat_tables(tables_of_text(trial, x, positions, *more))
    except Exception:
        return False
    return not torch.equal(once, twice) and torch.allclose(doubled, twice, rtol=0, atol=1e-5)


def flat_tables(tables: Any) -> Tensor:
    """The numbers of tables in one row: of a pair of cos and sin, or of complex numbers."""
    parts = [tables] if isinstance(tables, Tensor) else list(tables)
    return torch.cat([(torch.view_as_real(part) if part.is_complex() else part).flatten().float() for part in parts])


def layers_without_rope(config: Any) -> list[int]:
    """Indices of the layers that have no rotary embedding in a family's own design."""
    adapter = ADAPTERS.get(config.model_type) or _WITHOUT_ROPE.get(config.model_type, Adapter())
    if adapter.rope_flags:
        return [index for index, used in enumerate(getattr(config, adapter.rope_flags) or ()) if not used]
    if rotated := rope_layer_type(config, adapter):
        return [index for index, kind in enumerate(config.layer_types or ()) if kind != rotated]
    return []


def rotating_layers(config: Any) -> tuple[int, ...] | None:
    """Indices of the layers that have rotary embedding in a family's own design; None for a family without a row in
    `ADAPTERS`, of which it is not known."""
    if config.model_type not in ADAPTERS:
        return None
    without = set(layers_without_rope(config))
    return tuple(index for index in range(config.num_hidden_layers) if index not in without)


def rope_layer_type(config: Any, adapter: Adapter) -> str:
    """The only layer type that uses RoPE in this model; empty when all do."""
    everywhere = adapter.rope_window and getattr(config, adapter.rope_window, None) is None
    return "" if everywhere else adapter.rope_layer_type
