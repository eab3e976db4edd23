"""Follow the tables of cos and sin from a model's rotary modules to its layers, before anything is replaced.

A model may hold a rotary module that it never asks, or one more under another name, and a patch of the wrong one would
change nothing. So the base model's own forward pass is run once with stand-ins: rotary modules that return tables with
a number of their own in every place, and layers that only note what they are given. No weights are read, so it works
for models that are on the meta device, sharded or offloaded, and it takes milliseconds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedModel

from scaled_rope.errors import ConfigError, type_and_line
from scaled_rope.patching.base_model import Place, has_values, on_cpu

_TABLES = ("position_embeddings", "freqs_cis")
"""Names of the arguments by which layers are given tables."""
_TOKENS = 2


@dataclass
class TableUse:
    """Which layers of a base model get their tables from which rotary module."""

    fed: dict[str, set[str]] = field(default_factory=dict)
    """Path of a rotary module -> paths of the layers that are given its tables, or that hold it."""
    elsewhere: set[str] = field(default_factory=set)
    """Paths of layers that are given tables of another origin."""
    reached: set[str] = field(default_factory=set)
    """Paths of the layers that were called."""


def used_places(base: PreTrainedModel, places: list[Place]) -> list[Place]:
    """Return those of the rotary modules whose tables reach the layers of a base model.

    Raises:
        ConfigError: no layer gets its tables from any of them, or some layer gets tables from elsewhere as well.
    """
    use = follow_tables(base, places)
    if use.elsewhere:
        raise ConfigError(
            f"architecture {base.config.model_type!r}: {sorted(use.elsewhere)[0]} takes its angles from elsewhere than "
            f"{' and '.join(place.path for place in places)}"
        )
    used = [place for place in places if use.fed.get(place.path)]
    if not used:
        raise ConfigError(
            f"architecture {base.config.model_type!r}: no layer takes its angles from "
            f"{' or '.join(place.path for place in places)}"
        )
    return used


def follow_tables(base: PreTrainedModel, places: list[Place]) -> TableUse:
    """Run the base model's forward pass with stand-ins, and note which layer is given whose tables.

    Raises:
        ConfigError: the pass fails before it reaches a layer.
    """
    lists = _lists_of_layers(base)
    inside = {
        place.path: {name for name, layer in _layers(lists) if place.path.startswith(f"{name}.")} for place in places
    }
    failure: Exception | None = None
    for as_tuple in (False, True):
        for inputs in _inputs(base):
            use = TableUse({path: set(layers) for path, layers in inside.items()})
            left = {name for name, _ in _layers(lists)}
            try:
                # Without modes: a caller may be tracing a pass, with tensors that hold no numbers. A default device
                # that a caller has set is no such mode, and may be another than the CPU.
                with (
                    _disable_current_modes(),
                    torch.device("cpu"),
                    torch.no_grad(),
                    _stand_ins(base, places, lists, use, left, as_tuple),
                ):
                    # The class's own function, without hooks and whatever a library has put around it.
                    type(base).forward(base, **inputs(), use_cache=False)
                return use
            except _AllReached:
                return use
            except Exception as error:
                failure = failure or error
    if any(inside.values()):
        return TableUse(inside)  # each layer has a rotary module of its own
    assert failure is not None
    raise ConfigError(
        f"architecture {base.config.model_type!r}: the way of its tables to the layers cannot be followed, "
        f"{type_and_line(failure)}"
    )


def _lists_of_layers(base: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The lists of decoder layers in a base model, by path: the outermost of which a member is one."""
    found: list[tuple[str, nn.ModuleList]] = []

    def collect(parent: nn.Module, path: str) -> None:
        for name, child in parent.named_children():
            if isinstance(child, PreTrainedModel) and child.base_model is child:
                continue
            if isinstance(child, nn.ModuleList) and any(_is_layer(member) for member in child):
                found.append((path + name, child))
            else:
                collect(child, f"{path}{name}.")

    collect(base, "")
    return found


def _layers(lists: list[tuple[str, nn.ModuleList]]) -> Iterator[tuple[str, nn.Module]]:
    for path, layers in lists:
        for index, layer in enumerate(layers):
            yield f"{path}.{index}", layer


def _is_layer(module: nn.Module) -> bool:
    takes_tables = any(name in inspect.signature(module.forward).parameters for name in _TABLES)
    return takes_tables or any("Attention" in type(part).__name__ for part in module.modules())


def _inputs(base: PreTrainedModel) -> list[Callable[[], dict[str, Any]]]:
    """Makers of inputs for the base model: embeddings, which need no weights, or else token ids where weights are."""
    embedding: Any = base.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    width = int(getattr(embedding, "embedding_dim", 0) or base.config.hidden_size)
    device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
    ids = torch.zeros(1, _TOKENS, dtype=torch.long, device="cpu")
    return [
        lambda: {"inputs_embeds": torch.zeros(1, _TOKENS, width, device="cpu")},
        lambda: {"input_ids": ids.to(device)},
    ]


class StandIn(nn.Module):
    """A module in the place of another, whose attributes it shows."""

    def __init__(self, original: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        vars(self)["original"] = original  # not a submodule
        vars(self)["function"] = function

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["original"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["function"](*args, **kwargs)


class _AllReached(Exception):
    """Every layer has been called: what comes after them needs weights, and tells nothing."""


@contextmanager
def _stand_ins(
    base: PreTrainedModel,
    places: list[Place],
    lists: list[tuple[str, nn.ModuleList]],
    use: TableUse,
    left: set[str],
    as_tuple: bool,
) -> Iterator[None]:
    """Within this context, rotary modules and layers are stand-ins. left: the layers that have not been called yet."""
    numbers = {place.path: float(3 + 2 * index) for index, place in enumerate(places)}  # exact in any dtype
    before = [(layers, dict(layers._modules)) for _, layers in lists]
    try:
        for place in places:
            if not any(place.path.startswith(f"{path}.") for path, _ in lists):
                place.put(base, StandIn(place.module, _constant_tables(place.module, numbers[place.path])))
        for path, layers in lists:
            for index, layer in enumerate(layers):
                layers._modules[str(index)] = StandIn(layer, _noting(f"{path}.{index}", numbers, use, left, as_tuple))
        yield
    finally:
        for layers, modules in before:
            layers._modules.update(modules)
        for place in places:
            place.put(base, place.module)


def _constant_tables(rotary: nn.Module, number: float) -> Callable[..., Any]:
    copied = on_cpu(rotary)
    copied._forward_hooks.clear()
    copied._forward_pre_hooks.clear()

    def forward(x: Tensor, position_ids: Tensor, *more: Any, **options: Any) -> Any:
        like = torch.zeros(1, 1, 1, dtype=x.dtype, device="cpu")
        return _filled(copied(like, position_ids.to("cpu"), *more, **options), number)

    return forward


def _filled(tables: Any, number: float) -> Any:
    if isinstance(tables, Tensor):
        return torch.full_like(tables, number)
    return type(tables)(_filled(table, number) for table in tables)


def _noting(path: str, numbers: dict[str, float], use: TableUse, left: set[str], as_tuple: bool) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        use.reached.add(path)
        left.discard(path)
        origins = {number: place for place, number in numbers.items()}
        given = [_number_of(table) for table in _tensors([kwargs.get(name) for name in _TABLES])]
        if any(number not in origins for number in given):
            use.elsewhere.add(path)
        for number in map(_number_of, _tensors([args, kwargs])):
            if number in origins:
                use.fed.setdefault(origins[number], set()).add(path)
        if not left:
            raise _AllReached
        hidden = args[0] if args else kwargs.get("hidden_states")
        return (hidden, None) if as_tuple else hidden

    return forward


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)


def _number_of(table: Tensor) -> float:
    """The number that stands in every place of a table; NaN where they differ, or where it isn't a table."""
    if not has_values(table) or table.numel() == 0 or not (table.is_floating_point() or table.is_complex()):
        return math.nan
    values = table.real if table.is_complex() else table
    first = values.flatten()[0]
    return float(first) if bool((values == first).all()) else math.nan
