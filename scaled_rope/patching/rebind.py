"""Replace, for one module only, a global of its source file that its `forward` looks up by name.

Families of transformers call `apply_rotary_pos_emb` by that name. Assigning to the name in their source file would
change every model of the process. Here one module gets a copy of its forward whose globals differ in that name alone,
so two models of a class may differ, and layers of one model too. Several names may be rebound in one module. The copy
has the globals of the source file as they were: later assignments to them do not reach it.

A forward may be decorated (transformers 5.24 does so to rename arguments); its decorators are then copied as well.

The copy is bound when it is looked up, by a descriptor in a subclass that takes the place of the module's class: so a
copy of the module, deep or shallow (the replicas of nn.DataParallel are shallow), computes with its own weights.
Activation checkpointing, engines and hooks call it as they call any forward; torch.compile traces through it; state
dicts do not contain it. A pickle of the module would lose it, and is refused. Where the module has an attribute
`forward` already, or accelerate's `_old_forward`, the copy is put there and bound to the module, as that one was.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from scaled_rope.errors import ConfigError

_RECORD = "_scaled_rope_rebound"
_OFFLOADED = "_old_forward"
"""The attribute in which accelerate keeps the forward of a module whose weights it moves around."""


@dataclass(frozen=True)
class _Rebound:
    """A record of the names that were rebound in a module. It is replaced and never changed, since shallow copies of
    the module share it."""

    before: Any
    """The module's own attribute `forward` before; None when it had only that of its class."""
    functions: dict[str, Any] = field(default_factory=dict)
    """Global name -> the object in its place."""
    forward: Any = None
    """The copy of the forward of the module's class, a function; None where the copy is an attribute of the module."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rebound:
        return _Rebound(copy.deepcopy(self.before, memo), copy.deepcopy(self.functions, memo), self.forward)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be pickled, and so its module: an unpickled one would have the forward of its class again.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a model whose attention a patch has changed cannot be pickled, it would lose that; use save_pretrained, "
            "and load_model to read it"
        )


def calls(module: nn.Module, name: str) -> bool:
    """Whether the module's forward looks up the global `name`."""
    function = _function(module)
    return function is not None and name in function.__code__.co_names and name in function.__globals__


def globals_of(module: nn.Module) -> list[str]:
    """The global names that the module's forward looks up."""
    function = _function(module)
    names = () if function is None else function.__code__.co_names
    return [name for name in names if function is not None and name in function.__globals__]


def callers(root: nn.Module, name: str) -> list[nn.Module]:
    """The modules in `root` whose forward looks up the global `name`, in the order of `root.modules()`."""
    return [module for module in root.modules() if calls(module, name)]


def bound(module: nn.Module, name: str) -> Any:
    """Return the object that the module's forward now finds under the global `name`.

    Raises:
        ConfigError: the forward looks up no such name.
    """
    function = _function(module)
    if function is None or not calls(module, name):
        raise ConfigError(f"{type(module).__name__}: its forward calls no {name}")
    return function.__globals__[name]


def original(module: nn.Module, name: str) -> Any:
    """Return the object that the module's forward would find under `name` if nothing had been rebound.

    Raises:
        ConfigError: the forward looks up no such name.
    """
    record: _Rebound | None = vars(module).get(_RECORD)
    if record is None or name not in record.functions:
        return bound(module, name)
    forward = record.before if record.before is not None else type(module).forward
    globals_: dict[str, Any] = inspect.unwrap(getattr(forward, "__func__", forward)).__globals__
    return globals_[name]


def is_rebound(module: nn.Module, name: str) -> bool:
    """Whether the module's forward, as it is now, finds another object under the global `name` than its source file
    has."""
    return calls(module, name) and bound(module, name) is not original(module, name)


def rebind(module: nn.Module, name: str, function: Any) -> Any:
    """Make the module's forward, and nothing else, find `function` under the global `name`.

    Args:
        function: a function or any other object; None: again the one in the source file. A module in which nothing is
            rebound any more is as it was at first.

    Returns:
        The object that an earlier `rebind` of this name had put there, so that it can be restored; None without one.

    Raises:
        ConfigError: the forward looks up no such name.
    """
    if not calls(module, name):
        raise ConfigError(f"{type(module).__name__}: its forward calls no {name}")
    record: _Rebound | None = vars(module).get(_RECORD)
    if record is None:
        if function is None:
            return None
        record = _Rebound(vars(module).get(_slot(module)))
    functions = dict(record.functions)
    former = functions.pop(name, None)
    if function is not None:
        functions[name] = function
    _install(module, replace(record, functions=functions))
    return former


def bound_elsewhere(root: nn.Module) -> nn.Module | None:
    """The first module in `root` that would call the rebound forward of another module, whose shallow copy it is; None
    when there is none."""
    for module in root.modules():
        if _RECORD in vars(module):
            for name in ("forward", _OFFLOADED):
                own = vars(module).get(name)
                if own is not None and getattr(own, "__self__", module) is not module:
                    return module
    return None


def _install(module: nn.Module, record: _Rebound) -> None:
    original = record.before if record.before is not None else types.MethodType(type(module).forward, module)
    slot = _slot(module)
    if not record.functions:
        delattr(module, _RECORD)
        if record.before is None and slot == "forward":
            vars(module).pop(slot, None)
        else:
            setattr(module, slot, original)
        first, *others = type(module).__bases__
        if first is _LooksUp:  # else FSDP2 has put a class of its own before ours, which then changes nothing
            module.__class__ = others[0]
        return
    wrapped: Any = original.__func__
    function = inspect.unwrap(wrapped)
    # Without a __name__ torch.compile looks names up in this dictionary and not in the source file of that name.
    names = {key: value for key, value in function.__globals__.items() if key != "__name__"} | record.functions
    # Its own code object too: torch.compile caches by code object, and expects one dictionary of globals for each.
    other = types.FunctionType(function.__code__.replace(), names, None, function.__defaults__, function.__closure__)
    functools.update_wrapper(other, function)
    other.__kwdefaults__ = function.__kwdefaults__
    del other.__dict__["__wrapped__"]  # it replaces the original instead of wrapping it
    forward = _wrapped_as(wrapped, other)
    late = record.before is None
    setattr(module, _RECORD, replace(record, forward=forward if late else None))
    if slot in vars(module) or not late:
        setattr(module, slot, types.MethodType(forward, module))
    if late and not isinstance(module, _LooksUp):
        family: Any = type(module)
        module.__class__ = _looking_up(family)


class _Forward:
    """Descriptor: the rebound forward of the module that is asked, bound to it. Asked of a class, the family's."""

    def __get__(self, module: Any, owner: Any) -> Any:
        record: _Rebound | None = None if module is None else vars(module).get(_RECORD)
        if record is not None and record.forward is not None:
            return types.FunctionType.__get__(record.forward, module)  # torch.compile traces this, not MethodType
        of_family: Any = super(_LooksUp, owner if module is None else module)
        return of_family.forward


class _LooksUp:
    """Comes before the class of a module in which names are rebound."""

    forward = _Forward()

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        first, *others = type(self).__bases__
        return (_blank, (others[0],), *reduced[2:]) if first is _LooksUp else reduced


@functools.cache
def _looking_up(family: Any) -> Any:
    """The subclass of a class of modules that looks its forward up when it is called; of the same name."""
    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__doc__": family.__doc__}
    return type(family.__name__, (_LooksUp, family), names)


def _blank(family: Any) -> Any:
    """An empty module, for copies to fill."""
    return object.__new__(_looking_up(family))


def _wrapped_as(wrapped: types.FunctionType, inner: types.FunctionType) -> types.FunctionType:
    """Return `inner` inside copies of the decorators around the innermost function of `wrapped`."""
    if not hasattr(wrapped, "__wrapped__"):
        return inner
    new, cells = _wrapped_as(wrapped.__wrapped__, inner), wrapped.__closure__ or ()
    closure = tuple(types.CellType(new) if cell.cell_contents is wrapped.__wrapped__ else cell for cell in cells)
    other = types.FunctionType(wrapped.__code__, wrapped.__globals__, None, wrapped.__defaults__, closure)
    functools.update_wrapper(other, new)
    other.__kwdefaults__ = wrapped.__kwdefaults__
    return other


def _calls_wrapped(function: Any) -> bool:
    """Whether each decorator around a function is a plain function that keeps what it calls in its closure, as those
    made with `functools.wraps` do, so that a copy can be made that calls something else."""
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        cells = function.__closure__ or () if isinstance(function, types.FunctionType) else ()
        if not any(cell.cell_contents is inner for cell in cells):
            return False
        function = inner
    return isinstance(function, types.FunctionType)


def _slot(module: nn.Module) -> str:
    return _OFFLOADED if _OFFLOADED in vars(module) else "forward"


def _function(module: nn.Module) -> types.FunctionType | None:
    """The plain function behind the module's forward, inside any decorators; None where there is none that could be
    replaced."""
    forward = getattr(module, _slot(module), None)
    function = getattr(forward, "__func__", None)
    return inspect.unwrap(function) if function is not None and _calls_wrapped(function) else None


APPLY = "apply_rotary_pos_emb"
"""The name of the function that attention modules call as fn(q, k, cos, sin, unsqueeze_dim=1)."""
INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""The name of the registry that attention modules ask for backends, as INTERFACE.get_interface(name, default)."""
