"""Attention temperature in a model of transformers: queries are multiplied before attention gets them.

Where an attention module asks transformers' attention interface for its backend, it gets a function that multiplies the
queries first (`scaling.temperature`). Keys are cached as they always are, so that a cache stays right as the text
grows. Positions are those of the running pass (`pass_hooks`); where activation checkpointing runs a layer again after
it, those that the layer was given. Methods that change attention multiply by themselves (`attention.regions`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from scaled_rope.attention.interface import AttentionCall, AttentionFunction, attention_function
from scaled_rope.errors import ConfigError
from scaled_rope.patching.families import layers_without_rope
from scaled_rope.patching.forward_pass import current_pass, row_lengths
from scaled_rope.patching.rebind import APPLY, INTERFACE, bound, callers, rebind
from scaled_rope.patching.rotary_kernel import users_of_tables
from scaled_rope.scaling.hf_config import own_temperature
from scaled_rope.scaling.record import LayerPlan, RopeScaling
from scaled_rope.scaling.temperature import compute_temperature, follows_position


def check_temperature(base: nn.Module, scaling: RopeScaling, plan: LayerPlan, softmax: bool) -> None:
    """Raise an error for an attention temperature that `install_temperature` could not bring to this model.

    softmax: whether the family takes a temperature into its softmax scale.

    Raises:
        ConfigError: the family has a temperature of its own, its attention cannot be reached, or the temperature is for
            layers that the model does not have.
    """
    kinds = {each.attention_temperature: each for each in _scalings(scaling, plan) if each.attention_temperature}
    for kind in kinds:
        config: Any = base.config
        said = f"attention_temperature={kind!r}: cannot be used with this {config.model_type} model, "
        if own := own_temperature(config):
            raise ConfigError(f"{said}which multiplies queries itself ({own})")
        if softmax:
            raise ConfigError(f"{said}whose softmax scale has a temperature already (mscale_all_dim)")
        if kind == "llama4" and not any(of.attention_temperature == kind for of in _by_layer(base, scaling, plan)):
            raise ConfigError(f"{said}all of whose layers have rotary embedding; it acts in those without one only")
        reached = callers(base, INTERFACE)
        others = [module for module in {*users_of_tables(base), *callers(base, APPLY)} if module not in reached]
        if others or not reached:
            which = type(others[0]).__name__ if others else "its attention"
            raise ConfigError(f"{said}because {which} does not use transformers' attention interface")
        layers = range(config.num_hidden_layers)
        if numberless := [module for module in reached if getattr(module, "layer_idx", None) not in layers]:
            raise ConfigError(f"{said}because {type(numberless[0]).__name__} does not know its layer")


def install_temperature(base: nn.Module, scaling: RopeScaling, plan: LayerPlan) -> list[nn.Module]:
    """Make attention modules of a base model multiply their queries, each as the scaling of its layer says.

    To be called after whatever else binds the attention interface. `Passes.positional` must be set where
    `needs_positions` says so.

    Returns:
        The modules that do so now, for `remove_temperature`.
    """
    if scaling.changes_attention or not any(each.attention_temperature for each in _scalings(scaling, plan)):
        return []
    by_layer = _by_layer(base, scaling, plan)
    found = []
    for module in callers(base, INTERFACE):
        index: Any = module.layer_idx
        own = by_layer[index]
        if own.attention_temperature is not None:
            rebind(module, INTERFACE, _Tempered(bound(module, INTERFACE), own))
            found.append(module)
    return found


def remove_temperature(modules: Iterable[nn.Module]) -> None:
    """Undo `install_temperature`, and any other binding of the attention interface."""
    for module in modules:
        rebind(module, INTERFACE, None)


def needs_positions(scalings: Iterable[RopeScaling]) -> bool:
    """Whether the temperature of any of these scalings differs between the queries or rows of a pass."""
    return any(_differs(each) and not each.changes_attention for each in scalings)


def _differs(scaling: RopeScaling) -> bool:
    return follows_position(scaling) or (scaling.attention_temperature is not None and scaling.dynamic)


def _scalings(scaling: RopeScaling, plan: LayerPlan) -> list[RopeScaling]:
    return list(plan.layers.values()) or [scaling]


def _by_layer(base: nn.Module, scaling: RopeScaling, plan: LayerPlan) -> list[RopeScaling]:
    """The scaling of each layer; without a temperature where that of the layer's scaling does not act in it."""
    config: Any = base.config
    without = {*layers_without_rope(config), *plan.drop_layers}
    found = []
    for index in range(config.num_hidden_layers):
        own = plan.layers[config.layer_types[index]] if plan.layers else scaling
        rotates = index not in without and own.method != "drope"
        if own.attention_temperature == "llama4" and rotates:
            own = replace(own, attention_temperature=None, temperature_slope=None)
        found.append(own)
    return found


@dataclass(frozen=True)
class _Tempered:
    """Stands in for transformers' registry of attention backends in one attention module."""

    functions: Any
    """The registry that stood there before."""
    scaling: RopeScaling

    def get_interface(self, name: str, default: AttentionFunction) -> AttentionFunction:
        return self._after_factor(self.functions.get_interface(name, default))

    def __getitem__(self, name: str) -> AttentionFunction:
        return self._after_factor(self.functions[name])

    def _after_factor(self, backend: AttentionFunction) -> AttentionFunction:
        @attention_function
        def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
            return replace(call, query=_multiplied(call, self.scaling)).handed_to(backend)

        if not _differs(self.scaling):
            return attend
        # The running pass is a context variable, which torch.compile cannot trace.
        function: AttentionFunction = torch.compiler.disable(attend)  # type: ignore[no-untyped-call]
        return function


def _multiplied(call: AttentionCall, scaling: RopeScaling) -> Tensor:
    """The queries [B, H, Q, D] of a call times their temperature, rounded once."""
    if call.may_see_later_keys:
        raise ConfigError(
            f"attention_temperature={scaling.attention_temperature!r}: {type(call.module).__name__} attends to keys "
            "that come after the query, and how many a query sees is not known"
        )
    query = call.query
    exact = torch.promote_types(query.dtype, torch.float32)
    if not _differs(scaling):
        factor = compute_temperature(scaling, torch.zeros(1, device=query.device))[0]
        return (query.to(exact) * factor.to(exact)).to(query.dtype)
    factor = _factors(call, scaling).to(query.device, exact)[:, None, :, None]
    return (query.to(exact) * factor).to(query.dtype)


def _factors(call: AttentionCall, scaling: RopeScaling) -> Tensor:
    """The temperatures [B or 1, Q] of the queries of a call, made once for layers that share them."""
    window = call.options.get("sliding_window")
    current = current_pass()
    if current is None or current.positions is None:
        return compute_temperature(scaling, _given_positions(call, scaling), window=window)
    key = (scaling, window)
    if key not in current.temperatures:
        seq_len = row_lengths(current.positions) if scaling.dynamic else None
        current.temperatures[key] = compute_temperature(scaling, current.positions, seq_len, window)
    found: Tensor = current.temperatures[key]
    return found


def _given_positions(call: AttentionCall, scaling: RopeScaling) -> Tensor:
    """Positions [B or 1, Q] that a layer was given, where no pass is running: in a backward pass."""
    positions = call.options.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 3:
        positions = positions[0]  # the axes are alike: the pass has been let through
    if scaling.dynamic or not isinstance(positions, Tensor) or positions.shape[-1] != call.query.shape[2]:
        raise ConfigError(
            f"attention_temperature={scaling.attention_temperature!r}: {type(call.module).__name__} runs outside of a "
            "pass of its model and is not told its positions; switch activation checkpointing off"
        )
    return positions
