"""Where the modules of the former flat layout are now.

`import scaled_rope.patch` raises an ImportError that says where the module is now, and `python -m scaled_rope.corpora`,
which recipes of old runs contain, runs its successor.

Knows nothing of what is in them.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

_PACKAGE = __name__.rpartition(".")[0]

MOVED: dict[str, tuple[str, ...]] = {
    "backends": ("attention.backends",),
    "benchmarks_data": ("texts.benchmarks",),
    "caches": ("patching.cache_owners",),
    "checkpoints": ("texts.fetched_models",),
    "choice": ("evaluation.choice_prompts",),
    "config": ("scaling.record", "scaling.registry", "scaling.spec", "scaling.hf_config"),
    "corpora": ("texts.corpora", "texts.archives", "texts.documents", "texts.hub"),
    "costs": ("training.costs",),
    "data": ("texts.packed", "texts.packing", "texts.documents", "training.batches"),
    "dialects": ("scaling.hf_config", "errors", "scaling.record"),
    "doctor": (
        "serving.inspect_config",
        "serving.inspect_report",
        "serving.inspect_model",
        "serving.checks",
        "serving.config_facts",
        "serving.config_file",
        "serving.config_numbers",
    ),
    "engine": ("training.engine",),
    "evaluation": ("evaluation.runner", "results", "evaluation.formatting", "evaluation.memory_meter"),
    "export": (
        "serving.export",
        "serving.export_report",
        "serving.targets.registry",
        "serving.targets.common",
        "serving.targets.arithmetic",
        "serving.targets.vllm",
        "serving.targets.sglang",
        "serving.targets.llama_cpp",
        "serving.targets.hf",
    ),
    "figures": ("report.figures",),
    "formulas": ("scaling.formulas",),
    "fused": ("patching.rotary_kernel", "patching.rebind"),
    "generation": ("evaluation.decoding",),
    "gguf_files": ("serving.gguf",),
    "harness": ("evaluation.lm_eval_tasks", "evaluation.continuations", "evaluation.lm_eval_model"),
    "heatmap": ("report.heatmap",),
    "late": ("patching.deferred_rotation", "patching.rebind"),
    "loading": ("patching.loading", "checkpoint", "evaluation.jobs", "scaling.record", "scaling.frequencies"),
    "loss": ("patching.loss",),
    "memory": ("training.traced_memory",),
    "methods": ("scaling.frequencies", "attention.methods", "scaling.registry", "scaling.parameters"),
    "mini": ("benchmarks.paper_mini_report",),
    "page": ("report.html",),
    "paper": ("report.paper",),
    "passes": ("patching.pass_hooks",),
    "passkey": ("evaluation.passkey_prompts", "checkpoint"),
    "patch": (
        "patching.patch",
        "patching.families",
        "patching.saved_config",
        "patching.patch_request",
        "patching.layer_tables",
        "patching.base_model",
    ),
    "planning": ("training.planning",),
    "plots": ("serving.scaling_plots", "report.drawing"),
    "rebind": ("patching.rebind",),
    "relocated": ("patching.region_attention",),
    "requests": ("evaluation.saved_questions",),
    "retrieval": ("evaluation.passkey_context", "evaluation.statistics"),
    "rotary": ("patching.rotary", "patching.forward_pass"),
    "series": ("report.tables",),
    "states": ("training.run_state",),
    "tokenizing": ("texts.tokenizing",),
    "tracking": ("training.tracking",),
    "training": ("training.loop", "training.batches", "training.model"),
    "tune": ("tuning.search", "scaling.record", "tuning.curves", "tuning.figures"),
    "windows": ("evaluation.windows",),
}
"""Former module -> its successor, then modules that took over parts; all inside `scaled_rope` except `benchmarks.…`."""


def where(name: str) -> str:
    """One line that says where a module is now."""
    heir, *parts = (each if each.startswith("benchmarks.") else f"{_PACKAGE}.{each}" for each in MOVED[name])
    more = f", and parts of it {', '.join(parts)}" if parts else ""
    return f"{_PACKAGE}.{name} is now {heir}{more}"


def attributes_of(name: str) -> Callable[[str], Any]:
    """Make a `__getattr__` for a package that has the name of a former module.

    For names that were in the module, it raises an ImportError that says where they are now. Other names are ordinary
    missing attributes.
    """

    def __getattr__(attribute: str) -> Any:
        if not attribute.startswith("__"):
            heirs = [importlib.import_module(f"{_PACKAGE}.{heir}") for heir in MOVED[name]]
            having = [heir for heir in heirs if attribute in vars(heir)]
            # Heirs import from each other; a function or class knows where it was defined.
            having.sort(key=lambda heir: getattr(vars(heir)[attribute], "__module__", heir.__name__) != heir.__name__)
            if having:
                raise ImportError(f"{_PACKAGE}.{name}.{attribute} is now {having[0].__name__}.{attribute}")
        raise AttributeError(f"module '{_PACKAGE}.{name}' has no attribute {attribute!r}")

    return __getattr__


class _Heir:
    """The loader of a moved module. An import raises an error that says where the module is now; `python -m`, which
    asks for code, gets that of its successor."""

    def __init__(self, name: str) -> None:
        self._name = name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        raise ImportError(where(self._name), name=module.__name__)

    def get_code(self, fullname: str) -> types.CodeType:
        if MOVED[self._name][0].startswith("benchmarks."):  # not in the package
            return compile(f"raise SystemExit({where(self._name)!r})", fullname, "exec")
        heir = f"{_PACKAGE}.{MOVED[self._name][0]}"
        return compile(f"import runpy; runpy.run_module({heir!r}, run_name='__main__', alter_sys=True)", heir, "exec")


class _Finder:
    """A finder for the end of `sys.meta_path`, after those that find existing modules."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != _PACKAGE or name not in MOVED:
            return None
        loader: Any = _Heir(name)
        return importlib.machinery.ModuleSpec(fullname, loader)


def install_finder() -> None:
    """Make imports of moved modules say where the modules are now."""
    finder: Any = _Finder
    if finder not in sys.meta_path:
        sys.meta_path.append(finder)
