"""Make lm-eval's own command line know the model type "scaled-rope".

lm-eval 0.4.13 has a registry of model types but looks for no entry points of other packages. It imports torch, and
torch calls the entry points of the group "torch.backends"; setup.py declares `install` as one. `install` loads neither
lm-eval nor anything of this package: the types are registered when lm-eval's registry is imported, as names of a class
that is imported when a model is made. TORCH_DEVICE_BACKEND_AUTOLOAD=0 in the environment turns it off.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

NAMES = ("scaled-rope", "scaled_rope")
"""The names of the model type."""

_REGISTRY = "lm_eval.api.registry"
_CLASS = "scaled_rope.evaluation.lm_eval_model:ScaledRopeLM"


def register(registry: Any) -> None:
    """Add the model type to the module of lm-eval's registry, where it is not there yet."""
    for name in NAMES:
        if name not in registry.model_registry:
            registry.model_registry.register(name, target=_CLASS)


class _Finder:
    """An entry of `sys.meta_path` that finds lm-eval's registry where it is, and registers the model type in it."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                run(module)
                if hasattr(module, "model_registry"):  # of other versions of lm-eval, nothing is assumed
                    register(module)

            loader.exec_module = exec_module
        return spec


def install() -> None:
    """Register the model type in lm-eval, now or as soon as lm-eval is imported."""
    if (registry := sys.modules.get(_REGISTRY)) is not None:
        register(registry)
    elif not any(entry is _Finder for entry in sys.meta_path):
        finder: Any = _Finder
        sys.meta_path.insert(0, finder)
