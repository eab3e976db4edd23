"""Tensors that the backward pass needs, kept in CPU memory until then."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def offloaded_activations() -> Iterator[None]:
    """Within this context, tensors that autograd saves, except weights, stay in CPU memory until they are needed.

    On a GPU they are copied on a stream of their own, both ways, while the model goes on computing. The backward pass
    asks for them in the reverse order, so with each one the one before it sets out.
    """
    kept: list[weakref.ref[_Offloaded]] = []

    def pack(tensor: torch.Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or not _is_on_accelerator(tensor):
            return tensor
        offloaded = _Offloaded(tensor, len(kept))
        kept.append(weakref.ref(offloaded))
        return offloaded

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        offloaded: _Offloaded = packed
        found = offloaded.back()
        before = kept[offloaded.index - 1]() if offloaded.index else None
        if before is not None:
            before.set_out()
        return found

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _Offloaded:
    """A tensor in CPU memory, and its copy on the way back."""

    def __init__(self, tensor: torch.Tensor, index: int) -> None:
        self.device, self.index = tensor.device, index
        self.host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self.coming: torch.Tensor | None = None
        with _copying(self.device) as stream:
            self.host.copy_(tensor, non_blocking=True)
            if stream is not None:
                tensor.record_stream(stream)  # its memory must not be used again before the copy is made

    def set_out(self) -> None:
        """Begin to copy it back, unless that has begun."""
        if self.coming is None:
            with _copying(self.device):
                self.coming = self.host.to(self.device, non_blocking=True)

    def back(self) -> torch.Tensor:
        """The tensor on its device, for whatever comes next on the current stream."""
        self.set_out()
        found, self.coming = self.coming, None
        assert found is not None
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(_copy_stream(self.device))
            found.record_stream(current)
        return found


@contextlib.contextmanager
def _copying(device: torch.device) -> Iterator[Any]:
    """Make copies on a stream of their own, behind what is queued so far; yields the stream, None without a GPU."""
    if device.type != "cuda":
        yield None
        return
    stream = _copy_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _is_on_accelerator(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "cpu"
