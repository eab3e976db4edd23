"""Peak memory of a training step, found by running it on fake tensors and counting every storage while it lives.

No weights, data or device are needed, so a laptop can do this for a 70B model. Memory that an operator uses internally
while it runs is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scaled_rope.scaling.hf_config import text_config


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operators have made and that are still alive; `peak` is the most at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peaks = [0]
        """The most at once in each phase."""
        self._known: dict[int, weakref.ReferenceType[Any]] = {}

    @property
    def peak(self) -> int:
        return max(self.peaks)

    def next_phase(self) -> None:
        self.peaks.append(self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return made

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor that was there before."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = weakref.ref(storage)

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None and known() is not None:
            return

        def gone(_: Any) -> None:
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peaks[-1] = max(self.peaks[-1], self.live)


@dataclass(frozen=True)
class Trace:
    """Bytes of one pass besides weights (and gradients, if they existed before).

    peaks: the most at once in each phase: the forward pass and the backward pass. With layers given the latter is
        three: loss and last layer, the layers between, the first layer and what follows.
    kept: what remains between forward and backward pass.
    """

    peaks: tuple[int, ...]
    kept: int

    @property
    def peak(self) -> int:
        return max(self.peaks)

    def with_layers(self, layers: int, other: Trace, others: int, wanted: int) -> Trace:
        """The trace of a model with `wanted` layers that are all alike, from this one with `layers` and another.

        Each layer keeps the same bytes after its forward pass and adds the same gradients in its backward pass. So the
        phases at the ends grow by the same bytes with each layer, and no layer between them holds more than the larger
        of the two.
        """

        def line(mine: int, theirs: int) -> int:
            return mine + (theirs - mine) * (wanted - layers) // (others - layers)

        mine, theirs = ((*trace.peaks[:2], trace.peaks[-1]) for trace in (self, other))
        return Trace(tuple(map(line, mine, theirs)), line(self.kept, other.kept))


def to_cpu(model: nn.Module) -> None:
    """Give a model from the meta device empty tensors on the CPU, ties kept; under a fake tensor mode they are fake.

    `Module.to_empty` cannot do this to fake tensors.
    """
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
                held[name] = made[id(tensor)]  # type: ignore[assignment]


@contextlib.contextmanager
def _causal_without_mask() -> Iterator[None]:
    """Make attention causal by a flag. For fake tensors transformers would make a mask of length squared."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks

    masks["sdpa"] = lambda *_, **__: None
    try:
        yield
    finally:
        del masks["sdpa"]


def layers_alike(model: nn.Module) -> tuple[nn.Module, str] | None:
    """The owner and name of a causal model's list of layers, if they are all alike: modules, and shapes of weights."""
    decoder = model.get_decoder()  # type: ignore[operator]
    count = text_config(decoder.config).num_hidden_layers
    lists = [
        name for name, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(lists) != 1:
        return None

    def kind(layer: nn.Module) -> Any:
        weights = [(name, one.shape, one.dtype, one.requires_grad) for name, one in layer.named_parameters()]
        return weights, [(name, type(module)) for name, module in layer.named_modules()]

    kinds = [kind(layer) for layer in getattr(decoder, lists[0])]
    return (decoder, lists[0]) if all(one == kinds[0] for one in kinds) else None


def _mark_phases(layers: nn.ModuleList, counter: LiveBytes) -> list[Any]:
    """Begin a phase when the last layer's backward pass is done, and another when only the first one's is left."""

    def mark(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: counter.next_phase())

    return [layers[index].register_forward_hook(mark) for index in (-2, 0)]


def trace_pass(
    module: Any, batch: int, length: int, autocast: bool, accumulating: bool, layers: nn.ModuleList | None = None
) -> Trace:
    """Trace forward and backward pass of a training module over [batch, length] tokens, under one fake tensor mode.

    Args:
        module: computes the loss of a fake model, as `SummedLoss` does.
        autocast: compute in bfloat16 from float32 weights.
        accumulating: gradients of an earlier pass exist already.
        layers: the model's layers, at least three, to tell the phases apart.
    """
    ids = torch.zeros(batch, length, dtype=torch.long)
    weights = torch.ones(batch, length)
    counter = LiveBytes()
    for tensor in [*module.parameters(), *module.buffers(), ids, weights]:
        counter.ignore(tensor)
    if accumulating:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
                counter.ignore(parameter.grad)
    half = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    window = getattr(module.config, "sliding_window", None)
    masked = window is not None and window < length and module.config._attn_implementation != "sdpa"
    hooks = [] if layers is None else _mark_phases(layers, counter)
    with contextlib.nullcontext() if masked else _causal_without_mask(), counter:
        with half:
            loss = module(ids, ids, weights)
        kept = counter.live
        counter.next_phase()
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Trace(tuple(counter.peaks), kept)
