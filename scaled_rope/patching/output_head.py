"""The factors, the soft cap and the cut that a model applies around its output projection.

Families have a dozen names for these in their configs, so no name is trusted: the model's own forward pass is run once
with stand-ins that hand it hidden states and logits that are known, and what it makes of them is measured. No weights
are read.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from scaled_rope.errors import ConfigError
from scaled_rope.patching.effect import StandIn
from scaled_rope.scaling.hf_config import text_config


@dataclass(frozen=True)
class OutputHead:
    """logits = cap·tanh(scale·z / cap), z the projection of hidden states times `hidden_scale`."""

    hidden_scale: float = 1.0
    scale: float = 1.0
    cap: float | None = None
    """None: no soft cap."""
    width: int | None = None
    """The number of logits that are kept, where the projection is padded to more; None: all."""
    followed: bool = True
    """Whether the numbers above say all of it. Otherwise, as where another layer comes before the projection, the
    model's own forward pass computes its logits, see `own_logits`."""

    def after(self, logits: Tensor) -> Tensor:
        """Logits [..., V], float32, from the output of the projection."""
        if self.width is not None:
            logits = logits[..., : self.width]
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


_KNOWN: weakref.WeakKeyDictionary[nn.Module, OutputHead] = weakref.WeakKeyDictionary()


def output_head(model: PreTrainedModel) -> OutputHead:
    """Measure what a causal language model does around its output projection; once for each model."""
    if model not in _KNOWN:
        # A caller may be tracing a pass, with tensors that hold no numbers, or have set another default device.
        with _disable_current_modes(), torch.device("cpu"):
            _KNOWN[model] = _measure(model)
    return _KNOWN[model]


def _measure(model: PreTrainedModel) -> OutputHead:
    head: Any = model.get_output_embeddings()
    vocabulary = int(head.weight.shape[0]) if _is_whole(head) else int(text_config(model.config).vocab_size)
    # Small numbers show the factor, large ones the cap, and those between that nothing else happens.
    given = torch.linspace(-1, 1, vocabulary) * 10.0 ** (torch.arange(vocabulary) % 7 - 3)
    hidden = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 0.25, 2.0])[None, None]
    seen: list[Tensor] = []
    try:
        with torch.no_grad(), _known_values(model, head, hidden, given, seen):
            # The class's own function, without hooks and whatever a library has put around it.
            output = type(model).forward(model, input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False)
        logits = output.logits.flatten().double()
        ratio = seen[0].flatten().double() / hidden.flatten().double()
    except Exception:  # another layer before the projection, which wants hidden states of its own size
        return OutputHead(followed=False)
    found = _fit(logits, given.double(), float(ratio[0]))
    if found is None or not torch.allclose(ratio, ratio[:1], rtol=1e-5, atol=0):
        return OutputHead(followed=False)
    return found


def own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Float32 logits [..., V] of `hidden` [..., H], by the model's own forward pass around given hidden states."""
    states = hidden.reshape(1, -1, hidden.shape[-1])
    ids = torch.zeros(states.shape[:2], dtype=torch.long, device=hidden.device)
    with _known_values(model, None, states, None, []):
        output = type(model).forward(model, input_ids=ids, use_cache=False)
    logits: Tensor = output.logits.float()
    return logits.reshape(*hidden.shape[:-1], -1)


def without_adapters(model: Any) -> Any:
    """The model that adapters were added to, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal language model that computes hidden states.

    Raises:
        ConfigError: there is none.
    """
    found: Any = model.base_model
    if found is not model:
        return found
    # Llama 4 and its like give their class a prefix under which they hold nothing.
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    if not parts:
        raise ConfigError(f"model {type(model).__name__} holds no part that computes hidden states")
    return parts[-1]


def _fit(logits: Tensor, given: Tensor, hidden_scale: float) -> OutputHead | None:
    """The numbers with which the logits [V'] follow from the given ones [V]; None where they do not."""
    width = len(logits)
    given = given[:width]
    small = (given.abs() > 0) & (given.abs() < 1e-3)
    scale = float((logits[small] / given[small]).median())
    largest = float(logits.abs().max())
    head = OutputHead(_exact(hidden_scale), _exact(scale), None)
    if not torch.allclose(head.after(given), logits, rtol=1e-4, atol=1e-5):
        head = OutputHead(_exact(hidden_scale), _exact(scale), _exact(largest))
        if not torch.allclose(head.after(given), logits, rtol=1e-3, atol=1e-4):
            return None
    return head


def _exact(number: float) -> float:
    """The number of few digits, or one over it, that was meant by one computed in float32."""
    for digits in range(1, 7):
        for candidate in (float(f"{number:.{digits}g}"), 1 / float(f"{1 / number:.{digits}g}")):
            if math.isclose(candidate, number, rel_tol=3e-7):
                return candidate
    return number


def _is_whole(head: Any) -> bool:
    weight = getattr(head, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and weight.shape[0] > 0


@contextlib.contextmanager
def _known_values(
    model: PreTrainedModel, head: Any, hidden: Tensor, given: Tensor | None, seen: list[Tensor]
) -> Iterator[None]:
    """Within this context, the base model returns `hidden`, and the projection `given`, unless `head` is None."""

    def project(states: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(states)
        assert given is not None
        return given.expand(*states.shape[:-1], -1)

    base = decoder_of(model)
    stand_ins = {id(base): StandIn(base, lambda *_, **__: _Output(hidden))}
    if head is not None:
        stand_ins[id(head)] = StandIn(head, project)
    changed = []
    try:
        for parent in model.modules():
            for name, child in list(parent._modules.items()):
                if id(child) in stand_ins and parent not in stand_ins.values():
                    parent._modules[name] = stand_ins[id(child)]
                    changed.append((parent, name, child))
        yield
    finally:
        for parent, name, child in changed:
            parent._modules[name] = child


class _Output:
    """The output of a base model: the hidden states, and None under every other name."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, default)
