"""Find the part of a model that computes hidden states, and the rotary modules in it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.hf_config import text_config

ROTARY = "rotary_emb"
"""The name of the rotary module on the base model, in most families."""


_HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)
"""Where PyTorch keeps the hooks of a module that run with its passes."""


@dataclass(frozen=True)
class Place:
    """Where a rotary module hangs in a base model."""

    path: str
    """Dotted path from the base model: "rotary_emb", "layers.0.self_attn.rotary_emb"."""
    module: nn.Module
    """The module as it was before any patch."""

    def put(self, base: nn.Module, module: nn.Module) -> None:
        """Hang another module there."""
        owner, _, name = self.path.rpartition(".")
        setattr(base.get_submodule(owner), name, module)

    def exchange(self, base: nn.Module, module: nn.Module) -> None:
        """Hang another module there that does the work of the present one, with the hooks that others put on that."""
        present = vars(self.current(base))
        # The dictionaries themselves, in which the handles of the hooks look for them.
        vars(module).update({name: value for name, value in present.items() if name in _HOOKS})
        self.put(base, module)

    def current(self, base: nn.Module) -> nn.Module:
        """The module that hangs there now."""
        return base.get_submodule(self.path)


def base_model(model: nn.Module) -> PreTrainedModel:
    """Return the part of `model` that computes hidden states, inside any wrapper; in a multimodal model, that for text.

    Raises:
        ConfigError: there is no such part with RoPE, or there are several.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model of type {type(model).__name__}: must be a model of transformers")
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if not parts:
        raise ConfigError(f"model of type {type(model).__name__}: contains no model of transformers")
    bases = [part for part in parts if part.base_model is part]
    with_rotary = [base for base in bases if rotary_places(base)]
    if not with_rotary:
        raise ConfigError(f"architecture {text_config(parts[0].config).model_type!r}: {_why_no_rotary(parts[0])}")
    # By identity, since a part for images is a model too, and may have a config of the same class.
    whole, wanted = set(parts[0].modules()), text_config(parts[0].config)
    candidates = [base for base in with_rotary if base.config is wanted and base in whole]
    others = [base for base in with_rotary if base not in whole]
    if others or not candidates:
        candidates = [base for base in with_rotary if text_config(base.config) is base.config]
    if len(candidates) != 1:
        names = ", ".join(str(base.config.model_type) for base in candidates or with_rotary)
        raise ConfigError(f"model of type {type(model).__name__}: contains several models with RoPE ({names})")
    return candidates[0]


def _why_no_rotary(model: PreTrainedModel) -> str:
    kind = getattr(text_config(model.config), "position_embedding_type", "rope")
    if kind != "rope":
        return f"position_embedding_type={kind!r} means no rotary embedding, so there is nothing to scale"
    for module in model.modules():
        function = inspect.unwrap(type(module).forward)
        code = getattr(function, "__code__", None)
        if code is not None and any("rotary" in name for name in code.co_names):
            return (
                f"{type(module).__name__} makes its angles itself, without a rotary module that holds frequencies; to "
                "scale it, its code would have to be changed"
            )
    return "has no rotary module, so there is nothing to scale"


def rotary_places(base: nn.Module) -> list[Place]:
    """The rotary modules of a base model, in the order of its modules; not those of models inside it.

    Recognised by what they hold: frequencies, under the names that transformers gives them.
    """
    found: list[Place] = []
    _collect(base, "", found)
    return found


def _collect(parent: nn.Module, path: str, found: list[Place]) -> None:
    for name, child in parent.named_children():
        if isinstance(child, PreTrainedModel) and child.base_model is child:
            continue  # an encoder of images, a decoder of sound
        if _is_rotary(child) or (not path and name == ROTARY):
            found.append(Place(path + name, child))
        else:
            _collect(child, f"{path}{name}.", found)


def _is_rotary(module: nn.Module) -> bool:
    if "RotaryEmbedding" not in type(module).__name__:
        return False
    return hasattr(module, "inv_freq") or any(name.endswith("_inv_freq") for name, _ in module.named_buffers())


def buffer_name(name: str, layer_type: str | None) -> str:
    """The name of something that a rotary module of transformers holds, such as "inv_freq": with the layer type in
    front, where each type has tables of its own."""
    return f"{layer_type}_{name}" if layer_type else name


def frequencies_of(rotary: nn.Module, layer_type: str | None) -> Tensor | None:
    """The frequencies [D/2] in a rotary module of transformers; None where it holds none under the usual name."""
    inv_freq = getattr(rotary, buffer_name("inv_freq", layer_type), None)
    return inv_freq if isinstance(inv_freq, Tensor) and inv_freq.dim() == 1 else None


def attention_factor_of(rotary: nn.Module, layer_type: str | None) -> float:
    """The multiplier of cos and sin that a rotary module of transformers holds; 1 where it holds none."""
    factor: Any = getattr(rotary, buffer_name("attention_scaling", layer_type), 1.0)
    return float(factor)


def device_of(rotary: nn.Module) -> torch.device:
    """The device that holds the frequencies of a rotary module, of a family or ours."""
    buffer = next(rotary.buffers(), None)
    inv_freq: Any = buffer if buffer is not None else rotary.inv_freq
    device: torch.device = inv_freq.device
    return device


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers: not on the meta device, and not a stand-in with which a pass is traced."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def on_cpu(rotary: nn.Module) -> Any:
    """A copy of a family's rotary module on the CPU, also of one that holds no numbers yet.

    A copy, because a module that remembers the longest length seen must not remember a trial's.
    """
    if not all(map(has_values, rotary.buffers())):
        config: Any = getattr(rotary, "config", None)
        with torch.device("cpu"):
            return type(rotary)(config=copy.deepcopy(config))
    return copy.deepcopy(rotary).to("cpu")


AXES = (3, 4, 2)
"""Numbers of axes that positions have in multimodal RoPE: time, height and width; HunYuan-VL has one more."""


def tables_of_text(rotary: Any, x: Tensor, position_ids: Tensor, *more: str) -> Any:
    """The tables of a family's rotary module for the positions [B, T] of a text, all axes of which are alike.

    In older releases (5.17) modules with several axes take positions of all axes only, [axes, B, T].
    """
    try:
        return rotary(x, position_ids, *more)
    except Exception as error:
        for count in AXES:
            with contextlib.suppress(Exception):
                return rotary(x, position_ids.expand(count, *position_ids.shape), *more)
        raise error
