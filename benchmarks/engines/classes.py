"""Which keys each model class of an engine passes on to its rotary embedding, read from the engine's own source.

    pip download --no-deps --only-binary :all: sglang==0.5.23 -d wheels
    python benchmarks/engines/classes.py sglang 0.5.23 wheels/sglang-0.5.23-*.whl
    python benchmarks/engines/classes.py vllm 0.33.0 wheels/vllm-0.33.0-*.whl

writes the engine's entry of data/engine_classes.json. Nothing of the engine is imported or run: its model files are
parsed, and the arguments of their calls of `get_rope` are read. For each architecture the entry says "all" (the
dictionary is passed on as the config has it), "base" (only rope_theta), "whole base" (that, cut to a whole number), or
"unknown" with what stands there instead. What differs between two calls of one class is "unknown".
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.files import write_atomic

PLACES = {"vllm": "vllm/model_executor/models/", "sglang": "sglang/srt/models/"}
DICTIONARIES = ("rope_parameters", "rope_scaling")


def read_sources(path: Path, folder: str) -> dict[str, str]:
    """The model files of a wheel or of an unpacked one: name of the module -> text.

    Raises:
        ConfigError: it holds none.
    """
    found: dict[str, str] = {}
    if path.is_dir():
        for file in sorted((path / folder).glob("*.py")):
            found[file.stem] = file.read_text(encoding="utf-8")
    elif path.is_file():
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.startswith(folder) and name.endswith(".py") and "/" not in name[len(folder) :]:
                    found[name[len(folder) : -3]] = wheel.read(name).decode()
    if not found:
        raise ConfigError(f"{path} holds no {folder}*.py")
    return found


class Sources:
    """The model files of an engine, parsed."""

    def __init__(self, texts: dict[str, str]) -> None:
        self.trees = {name: ast.parse(text) for name, text in texts.items()}
        self.classes = {
            name: {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
            for name, tree in self.trees.items()
        }
        self.imported = {name: dict(self._imports(tree)) for name, tree in self.trees.items()}

    def _imports(self, tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
        """Names that a file takes from other model files: local name -> (module, name)."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = node.module.rpartition(".")[2]
                if module in self.trees and (node.level or ".models." in node.module):
                    for alias in node.names:
                        yield alias.asname or alias.name, (module, alias.name)

    def passed_by(self, module: str, name: str) -> set[str]:
        """The words for all that the attention classes pass on to which a class leads; see the module's docstring.

        A class leads to those whose names its body says, and to its bases.
        """
        found: set[str] = set()
        open_, seen = [(module, name)], set()
        while open_:
            place = open_.pop()
            if place in seen:
                continue
            seen.add(place)
            home, of = place
            node = self.classes.get(home, {}).get(of)
            if node is None:
                if of in self.imported.get(home, {}):
                    open_.append(self.imported[home][of])
                continue
            found |= set(self._calls(home, node))
            for one in ast.walk(node):
                if isinstance(one, ast.Name):
                    open_.append((home, one.id))
        return found

    def _calls(self, module: str, node: ast.ClassDef) -> Iterator[str]:
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and _called(call) in ("get_rope", "get_rope_wrapper"):
                yield _passed(call, node)


def _called(call: ast.Call) -> str:
    return getattr(call.func, "id", None) or getattr(call.func, "attr", "")


def _passed(call: ast.Call, within: ast.ClassDef) -> str:
    """The word for all that one call passes on."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    if None in named:
        return f"unknown: {ast.unparse(call)}"
    value = next((named[name] for name in DICTIONARIES if name in named), None)
    if value is None and len(call.args) > 4:
        value = call.args[4]
    if value is not None and not (isinstance(value, ast.Constant) and value.value is None):
        text = ast.unparse(value)
        return "all" if _is_the_configs(value, within, 0) else f"unknown: {text}"
    base = named.get("base") or (call.args[3] if len(call.args) > 3 else None)
    if base is None:
        return "unknown: no base"
    text = ast.unparse(base)
    return "whole base" if text.startswith("int(") else "base"


def _is_the_configs(value: ast.expr, within: ast.ClassDef, depth: int) -> bool:
    """Whether an expression is the dictionary of the config, untouched."""
    text = ast.unparse(value)
    if isinstance(value, ast.Attribute) and value.attr in DICTIONARIES and "config" in ast.unparse(value.value):
        return True
    if text.startswith("getattr(") and any(f"'{name}'" in text for name in DICTIONARIES):
        return True
    target = value.id if isinstance(value, ast.Name) else text
    if depth > 3 or not (isinstance(value, ast.Name) or text.startswith("self.")):
        return False
    assigned = []
    for node in ast.walk(within):
        if isinstance(node, ast.Assign) and any(ast.unparse(one) == target for one in node.targets):
            assigned.append(node.value)
        elif isinstance(node, ast.Assign | ast.AugAssign):  # a key of it is set
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(one, ast.Subscript) and ast.unparse(one.value) == target for one in targets):
                return False
    parameters = {one.arg for node in ast.walk(within) if isinstance(node, ast.FunctionDef) for one in node.args.args}
    if not assigned:  # handed in under this name, by a layer that is looked at as well
        return target in DICTIONARIES and target in parameters
    return all(_is_the_configs(one, within, depth + 1) for one in assigned)


def architectures(engine: str, sources: Sources) -> dict[str, tuple[str, str]]:
    """Names of architectures as config.json has them -> (module, class)."""
    if engine == "vllm":
        registry = sources.trees["registry"]
        rows: dict[str, tuple[str, str]] = {}
        for node in ast.walk(registry):
            if not isinstance(node, ast.Dict):
                continue
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                    pair = [one.value for one in value.elts if isinstance(one, ast.Constant)]
                    if len(pair) == 2 and all(isinstance(one, str) for one in pair):
                        rows[str(key.value)] = (str(pair[0]), str(pair[1]))
        return rows
    rows = {}
    for module, tree in sources.trees.items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(ast.unparse(one) == "EntryClass" for one in node.targets):
                for one in node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]:
                    rows[ast.unparse(one)] = (module, ast.unparse(one))
    return rows


def read_engine(engine: str, path: Path) -> dict[str, str]:
    """Architecture -> what its class passes on."""
    sources = Sources(read_sources(path, PLACES[engine]))
    found = {}
    for name, (module, of) in sorted(architectures(engine, sources).items()):
        ways = sources.passed_by(module, of)
        if len(ways) == 1:
            found[name] = ways.pop()
        elif ways:
            found[name] = "unknown: " + " | ".join(sorted(way.removeprefix("unknown: ") for way in ways))
    return found


def main() -> int:
    parser = Parser("benchmarks/engines/classes.py", __doc__)
    parser.add_argument("engine", help=", ".join(PLACES))
    parser.add_argument("version")
    parser.add_argument("source", type=Path, help="wheel, or the folder that one was unpacked into")
    parser.add_argument("--output", type=Path, default=ROOT / "data" / "engine_classes.json", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine not in PLACES:
        raise unknown("engine", args.engine, PLACES)
    known = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    known[args.engine] = {"version": args.version, "passes": read_engine(args.engine, args.source)}
    write_atomic(args.output, json.dumps(known, indent=1, sort_keys=True) + "\n")
    ways = list(known[args.engine]["passes"].values())
    kinds = ("all", "base", "whole base", "unknown")
    counts = {kind: sum(one.partition(":")[0] == kind for one in ways) for kind in kinds}
    print(f"{args.engine} {args.version}: {len(ways)} classes, {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
