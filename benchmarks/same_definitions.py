"""Hold the definitions of two commits against each other: what was only moved must be the same code.

    python benchmarks/same_definitions.py 9fa6686 HEAD

Every function, class and constant at the top of a module of `scaled_rope/` at the first commit is looked for at the
second: in the module itself or in one that `scaled_rope/moved.py` names as its heir, under its name or the one that
`RENAMED` gives it. The syntax trees are compared without imports and docstrings; names in the tables count as the same.
What differs is listed with its first differing line, and the exit code is 1 when anything does.
"""

from __future__ import annotations

import argparse
import ast
import copy
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.moved import MOVED

RENAMED = {
    "checkpoint": {"_first_line": "first_line", "_reading": "reading", "_unscaled": "without_custom_rope"},
    "evaluation.lm_eval_tasks": {"Request": "Continuation"},
    "kernels.rotary_triton": {"_angle_tables": "angle_tables"},
    "patching.cache_owners": {"Note": "CacheContents", "Patch": "CacheOwner"},
    "patching.deferred_rotation": {"install": "defer_rotation", "uninstall": "rotate_before_cache"},
    "patching.families": {"_check_softmax_scale": "check_softmax_scale", "_rope_layer_type": "rope_layer_type"},
    "patching.patch": {  # names that it imported others by
        "install_regions": "install_region_attention",
        "uninstall_regions": "remove_region_attention",
    },
    "patching.region_attention": {"install": "install_region_attention", "uninstall": "remove_region_attention"},
    "patching.rotary_kernel": {"install": "bind_rotation", "uninstall": "unbind_rotation"},
    "patching.saved_config": {
        "_ABSENT": "ABSENT",
        "_CONFIG_FIELDS": "CONFIG_FIELDS",
        "_config_fields": "config_fields",
        "_detach_config": "detach_config",
        "_let_save": "let_save",
        "_write_config": "write_config",
    },
    "report.drawing": {"_GREY": "GREY", "_INK": "INK", "_LINES": "LINES"},
    "report.html": {"Part": "PageSection"},
    "report.paper": {"Run": "PaperRun"},
    "report.tables": {"Results": "ReportRows"},
    "scaling.hf_config": {
        "_FAMILY_PARTIAL": "FAMILY_PARTIAL",
        "_FAMILY_SCALING": "FAMILY_SCALING",
        "_FAMILY_THETA": "FAMILY_THETA",
        "_NESTED_FAMILIES": "NESTED_FAMILIES",
        "Note": "ConfigNote",
    },
    "serving.gguf": {"read_rope": "read_gguf_rope"},
    "serving.inspect_report": {
        "_LEVELS": "LEVELS",
        "_difference": "describe_difference",
        "_line": "one_line",
        "_quiet": "quiet",
        "Report": "Inspection",
    },
    "serving.scaling_plots": {"write_figures": "write_scaling_figures"},
    "serving.targets.common": {
        "_LONG_LIST_NOTE": "LONG_LIST_NOTE",
        "_blend": "blend",
        "_config": "config_of",
        "_correction_range": "correction_range",
        "_mscale_pair": "mscale_pair",
        "_native": "native_keys",
        "_patched": "build_patched",
        "_powers": "powers",
        "_restate_llama3": "restate_llama3",
        "_restate_longrope": "restate_longrope",
        "_restate_servers_yarn": "restate_servers_yarn",
        "_table": "table_of",
        "_table_notes": "table_notes",
        "_yarn_attention": "yarn_attention",
        "Request": "ServedModel",
    },
    "serving.targets.hf": {"_express_transformers": "express", "_restate_transformers": "restate"},
    "serving.targets.llama_cpp": {"_express_llama_cpp": "express", "_restate_llama_cpp": "restate"},
    "serving.targets.sglang": {"_express_sglang": "express", "_restate_sglang": "restate"},
    "serving.targets.vllm": {"_express_vllm": "express", "_restate_vllm": "restate"},
    "texts.benchmarks": {"Source": "BenchmarkFiles"},
    "texts.fetched_models": {"Checkpoint": "FetchedModel"},
    "texts.documents": {"_import_datasets": "import_datasets", "_is_local": "is_local", "Source": "TextSource"},
    "texts.tokenizing": {"Part": "DocumentPart"},
    "tuning.curves": {"_BLUE": "BLUE", "_DRAWS": "DRAWS", "_GREY": "GREY", "_ORANGE": "ORANGE"},
    "tuning.figures": {"write_figures": "write_tuning_figures"},
    "tuning.search": {"Window": "ScoredWindow"},
}
"""Old name -> new name, of definitions that other modules began to import, or whose name two classes had."""
PARTS_OF_WHAT_STAYED = {
    "errors": ("command_line",),
    "flags": ("checkpoint",),
    "kernels.decode": ("kernels.decode_triton",),
}
MODULE_NAMES = {old: heirs[0].rpartition(".")[2] for old, heirs in MOVED.items()}
"""Old name of a module -> its new one, for modules that code uses by name, as in `late.begin(...)`."""


def _one_of_each() -> dict[str, str]:
    """Name -> one name that stands for all its old and new names."""
    groups: list[set[str]] = []
    for old, new in [pair for names in RENAMED.values() for pair in names.items()] + list(MODULE_NAMES.items()):
        touching = [group for group in groups if group & {old, new}]
        groups = [group for group in groups if group not in touching] + [{old, new}.union(*touching)]
    return {name: min(group) for group in groups for name in group}


CANONICAL = _one_of_each()

Definitions = dict[tuple[str, str], ast.stmt]


def at_commit(commit: str) -> Definitions:
    """Every top-level definition of the package at a commit, by (module, name)."""
    listed = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", commit, "scaled_rope", "benchmarks"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    found: Definitions = {}
    for path in listed:
        if path.endswith(".py") and (path.startswith("scaled_rope") or "report" in path):
            text = subprocess.run(
                ["git", "show", f"{commit}:{path}"], capture_output=True, text=True, check=True
            ).stdout
            module = path.removesuffix(".py").removeprefix("scaled_rope/").replace("/", ".")
            found.update({(module, name): node for name, node in definitions(ast.parse(text))})
    return found


def definitions(tree: ast.Module) -> list[tuple[str, ast.stmt]]:
    """Names and statements at the top of a module, those under `if TYPE_CHECKING` included; imports are none."""
    found: list[tuple[str, ast.stmt]] = []
    for node in tree.body:
        body = node.body if isinstance(node, ast.If) else [node]
        for each in body:
            if isinstance(each, ast.FunctionDef | ast.ClassDef):
                found.append((each.name, each))
            elif isinstance(each, ast.Assign | ast.AnnAssign):
                targets = each.targets if isinstance(each, ast.Assign) else [each.target]
                found += [(n.id, each) for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return found


class Plain(ast.NodeTransformer):
    """Reduces a definition to the parts that are compared, with one name for old and new."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = CANONICAL.get(node.id, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        # `module.name` and `name` are the same thing before and after a move.
        if isinstance(node.value, ast.Name) and node.value.id in MODULES:
            return self.visit_Name(ast.Name(node.attr, node.ctx))
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = CANONICAL.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.name = CANONICAL.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if isinstance(node.value, str):
            node.value = re.sub(r"\bscaled_rope(?:\.\w+)*\.(\w+)", lambda m: CANONICAL.get(m[1], m[1]), node.value)
        return node


MODULES = {*MODULE_NAMES, *MODULE_NAMES.values(), "curves", "hf", "llama_cpp", "sglang", "vllm", "archives"}


def plain(node: ast.stmt) -> str:
    """A definition as text that is equal for equal code."""
    return ast.unparse(Plain().visit(copy.deepcopy(node))) or "pass"


def heirs_of(module: str) -> list[str]:
    """The modules that may now contain the definitions of a former module."""
    return [module, *MOVED.get(module, ()), *PARTS_OF_WHAT_STAYED.get(module, ())]


def main() -> int:
    parser = Parser("python benchmarks/same_definitions.py", __doc__)
    parser.add_argument("before", help="commit")
    parser.add_argument("after", help="commit")
    args = parser.parse_args()
    return compare(args)


def compare(args: argparse.Namespace) -> int:
    """Print the differences; return 1 when there are any."""
    before, after = at_commit(args.before), at_commit(args.after)
    same, differing = 0, []
    for (module, name), node in before.items():
        text = plain(node)
        texts = {
            heir: plain(after[heir, new])
            for heir in heirs_of(module)
            for new in (RENAMED.get(heir, {}).get(name, name), name)
            if (heir, new) in after
        }
        if text in texts.values():
            same += 1
        elif not texts:
            differing.append(f"{module}.{name}: not found")
        else:
            (heir, other), *_ = texts.items()
            lines = [(a, b) for a, b in zip(text.splitlines(), other.splitlines(), strict=False) if a != b]
            differing.append(f"{module}.{name} -> {heir}: {lines[0] if lines else 'one is longer'}")
    print(f"{len(before)} definitions at {args.before}: {same} are the same at {args.after}, {len(differing)} are not")
    for line in differing:
        print(f"  {line}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
