"""Give one object other methods than its class has, and let its copies and pickles keep them.

Caches get methods that keep track of what they hold (`cache_owners`), configs one that lets them be saved
(`saved_config`). The object's class is exchanged for a subclass of the same name, so `isinstance` goes on to work.
"""

from __future__ import annotations

import functools
from typing import Any


def exchange_class(instance: Any, methods: type[Any]) -> None:
    """Put the methods of a class in front of an object's own; once, however often it is called.

    methods: a class at the top of a module, without state of its own.
    """
    if not isinstance(instance, methods):
        family: Any = type(instance)
        mixin: Any = methods
        instance.__class__ = _subclass(family, mixin)


@functools.cache
def _subclass(family: Any, methods: Any) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        return _revive, (family, methods, vars(self).copy())

    return type(family.__name__, (methods, family), {"__reduce_ex__": reduce})


def _revive(family: Any, methods: Any, state: dict[str, Any]) -> Any:
    """A copied or unpickled object."""
    instance = object.__new__(_subclass(family, methods))
    vars(instance).update(state)
    return instance
