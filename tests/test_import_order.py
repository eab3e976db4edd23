"""Which package may import which: one order, no circles, and nothing hidden in functions."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from scaled_rope.scaling.registry import METHODS
from tests.helpers import ROOT

PACKAGE = ROOT / "scaled_rope"

# Low to high. A module may import what stands further left, and the modules of its own package.
ORDER = """
bundled blake3_numpy errors | versions files | content_hash provenance | results command_line progress | scaling
| kernels | recipes | checkpoint | attention | patching | texts | flags | training | evaluation | report
| integrations tuning | serving | certificate advice | cli
"""
LEVELS = {name: level for level, names in enumerate(ORDER.replace("\n", " ").split("|")) for name in names.split()}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(module: str) -> set[str]:
    """The modules of the package that a module imports, in functions and for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            while name not in MODULES and "." in name:
                name = name.rpartition(".")[0]
            if name in MODULES and name != "scaled_rope":
                found.add(name)
    return found - {module}


@functools.cache
def _all_imports() -> dict[str, set[str]]:
    return {module: _imports(module) for module in MODULES}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_room_has_a_level() -> None:
    assert {_room(module) for module in MODULES} - {"", "__main__"} == set(LEVELS)


@pytest.mark.parametrize("module", sorted(module for module in MODULES if _room(module) in LEVELS))
def test_imports_point_down(module: str) -> None:
    mine = LEVELS[_room(module)]
    up = {
        other
        for other in _all_imports()[module]
        if _room(other) != _room(module) and LEVELS[_room(other)] >= mine
    }  # fmt: skip
    assert not up, f"{module} imports {sorted(up)}, which stand above it or beside it in ORDER"


def test_no_circles() -> None:
    left = {module: set(others) for module, others in _all_imports().items()}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"these import each other: {sorted(left)}"


def test_every_method_of_the_registry_is_found() -> None:
    for name, row in METHODS.items():
        assert callable(row.fn), name
        module, _, function = row.function.partition(":")
        assert getattr(importlib.import_module(f"scaled_rope.{module}"), function) is row.fn


def test_methods_are_named_read_and_refused_without_torch() -> None:
    program = (
        "import sys; from scaled_rope import METHODS, ConfigError, RopeScaling\n"
        "base = RopeScaling('default', original_max_position_embeddings=4096)\n"
        "RopeScaling.from_spec('rerope,window=512', base); RopeScaling.from_spec('yarn:8,ramp=rotations', base)\n"
        "for wrong in ('yan:8', 'yarn:8,bet=3', 'rerope,window=5000', 'longrope:8'):\n"
        "    try: RopeScaling.from_spec(wrong, base)\n"
        "    except ConfigError: pass\n"
        "    else: sys.exit(wrong)\n"
        "sys.exit('torch' in sys.modules or len(METHODS) < 10)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=60).returncode == 0


def test_the_table_of_packages_is_that_of_their_docstrings() -> None:
    done = subprocess.run([sys.executable, "docs/packages.py", "--check"], cwd=ROOT, timeout=60)
    assert done.returncode == 0, "run python docs/packages.py"
