"""Where models of transformers take and return a key/value cache, and how it is emptied, from one release to the next.

The argument is `cache` since 5.24, `past_key_values` before.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

NAMES = ("cache", "past_key_values")


def cache_name(module: nn.Module) -> str:
    """The name of the argument by which a model or layer takes a cache."""
    return NAMES[0] if NAMES[0] in inspect.signature(module.forward).parameters else NAMES[1]


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the bound arguments of a forward pass, under whatever name; None without one."""
    given = {**arguments, **arguments.get("kwargs", {})}
    caches = [value for value in given.values() if isinstance(value, Cache)]
    like_caches = [given[name] for name in NAMES if hasattr(given.get(name), "get_seq_length")]
    return next(iter([*caches, *like_caches]), None)


def unknown_cache(arguments: Mapping[str, Any]) -> Any:
    """The object among the bound arguments of a forward pass that takes a cache's place and does not say how many
    tokens it holds, as that of continuous batching; None without one."""
    given = {**arguments, **arguments.get("kwargs", {})}
    found = [given[name] for name in NAMES if given.get(name) is not None]
    return next((one for one in found if not isinstance(one, Cache) and not hasattr(one, "get_seq_length")), None)


def returned_cache(output: Any) -> Any:
    """The cache in the output of a forward pass, a `ModelOutput` or a tuple; None without one."""
    if isinstance(output, tuple):
        return next((each for each in output if isinstance(each, Cache)), None)
    names = output.keys() if hasattr(output, "keys") else ()  # asking for an old name makes transformers warn
    name = next((name for name in NAMES if name in names), None)
    return None if name is None else output[name]


def empty(cache: Any) -> None:
    """Make a cache hold no tokens, in place."""
    cache.reset()
    # Before 5.18 reset() sets the keys of layers that grow to 0 and keeps them: new tokens would come behind those.
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, DynamicLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False
