"""Override methods of a single object, also in its copies and pickles.

Caches get methods that keep track of what they hold (`cache_owners`), configs one that lets them be saved
(`saved_config`). The object's class is exchanged for a subclass of the same name, so `isinstance` still works.
"""

from __future__ import annotations

import functools
from typing import Any


def exchange_class(instance: Any, methods: type[Any]) -> None:
    """Let the methods of a class override those of an object. A second call changes nothing.

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
    """Make a copied or unpickled object."""
    instance = object.__new__(_subclass(family, methods))
    vars(instance).update(state)
    return instance
