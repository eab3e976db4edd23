"""Devices that are not there: `stand_in:0`, `stand_in:1`, … Their tensors hold numbers in the memory of the CPU, and an
operation whose tensors are on two of them is refused, as it is on two GPUs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "stand_in"


@functools.cache
def register() -> None:
    """Make torch know the name; once per process."""
    _setup_privateuseone_for_python_backend(NAME)
    # torch 2.11 then asks it at each gradient checkpoint, also of tensors on the CPU, in all tests that follow.
    module = getattr(torch, NAME)
    if not hasattr(module, "get_amp_supported_dtype"):
        module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    # Likewise where torch's own tests of operators keep the random state.
    if not hasattr(module, "get_rng_state"):
        module.get_rng_state, module.set_rng_state = torch.get_rng_state, lambda state: None


class Placed(torch.Tensor):
    """A tensor on a device that is not there."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device) -> Placed:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=device,
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({self.inner!r}, {self.device})"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    placed = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Placed)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    devices = {one.device for one in placed}
    plain = [
        one for one in tree_leaves((args, kwargs))
        if isinstance(one, torch.Tensor) and not isinstance(one, Placed) and one.dim() > 0
    ]  # fmt: skip
    indexes = func in (torch.ops.aten.index.Tensor, torch.ops.aten._index_put_impl_.default)
    if not copies and (len(devices) > 1 or (devices and plain and not indexes)):
        found = sorted({str(one.device) for one in [*placed, *plain]})
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {func}")
    args, kwargs = tree_map_only(Placed, lambda one: one.inner, (args, kwargs))
    on_cpu = functools.partial(_on_cpu, found := [])
    args, kwargs = tree_map_only(torch.device, on_cpu, (args, kwargs))  # by position too
    if found:
        wanted = found[0]
    result = func(*args, **kwargs)
    if func is torch.ops.aten.copy_.default:
        return placed[0] if placed else result
    device = wanted if wanted is not None else next(iter(devices), None)
    if device is None or device.type != NAME:
        return result
    if device.index is None:
        device = torch.device(NAME, 0)
    schema = func._schema
    if schema.is_mutable and placed and isinstance(result, torch.Tensor):
        return placed[0]
    return tree_map_only(torch.Tensor, lambda one: Placed(one, device), result)


def _on_cpu(found: list[torch.device], device: torch.device) -> torch.device:
    if device.type != NAME:
        return device
    found.append(device)
    return torch.device("cpu")


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Data(TorchFunctionMode):
    """`torch.tensor` of plain data goes past the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is torch.Tensor.tolist and isinstance(args[0], Placed):
            return args[0].inner.tolist()
        return func(*args, **kwargs)


@contextlib.contextmanager
def stand_in_devices() -> Iterator[None]:
    """Within this context, tensors can be made on stand-ins."""
    register()
    with _Data(), _Operations():
        yield


def split_over_stand_ins(model: Any) -> None:
    """Put the first half of a model's layers, with the embedding, on one stand-in and the rest on another, with the
    hooks of accelerate that move inputs; within `stand_in_devices`."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    layers = model.model.layers
    parts = {model.model.embed_tokens: 0, model.model.norm: 1, model.lm_head: 1}
    parts |= {layer: int(index >= len(layers) // 2) for index, layer in enumerate(layers)}
    for part, place in parts.items():
        device = torch.device(NAME, place)
        for module in part.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:  # a plain attribute, since a parameter must be a tensor of torch's own
                    del module._parameters[name]
                    module.__dict__[name] = Placed(weight.data, device)
        add_hook_to_module(part, AlignDevicesHook(device, skip_keys=model._skip_keys_device_placement))
