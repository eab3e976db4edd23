"""Write the table of packages in docs/architecture.md from the packages' own docstrings.

python docs/packages.py            # writes the table
python docs/packages.py --check    # exit code 1 when the page has another one
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from scaled_rope.command_line import run_cli
from scaled_rope.report.page_blocks import only_check

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- packages: python docs/packages.py -->\n", "<!-- end of packages -->\n"


def table() -> str:
    """One row per package and top-level module, in the order in which they may import each other."""
    lines = ["| | holds | knows nothing of |", "|---|---|---|"]
    for level in order():
        for name in level:
            path = ROOT / "scaled_rope" / name
            init = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            source = init.read_text(encoding="utf-8")
            # A docstring that is also the text of --help has the sentence below it, as a comment.
            beside = " ".join(re.findall(r"^# (Knows nothing of .*)$", source, re.MULTILINE))
            text = " ".join(f"{ast.get_docstring(ast.parse(source)) or ''} {beside}".split())
            holds, _, unknown = text.partition("Knows nothing of ")
            shown = f"`{name}/`" if path.is_dir() else f"`{name}.py`"
            first = re.split(r"(?<=[.!?]) ", holds.strip())[0].rstrip(".")
            lines.append(f"| {shown} | {first} | {unknown.rstrip('. ')} |")
    return "\n".join(lines) + "\n"


def order() -> list[tuple[str, ...]]:
    """The levels of packages, low to high, as `tests/test_import_order.py` holds the imports to them."""
    source = (ROOT / "tests" / "test_import_order.py").read_text(encoding="utf-8")
    text = re.search(r'^ORDER = """\n(.*?)"""', source, re.MULTILINE | re.DOTALL)
    assert text is not None
    return [tuple(level.split()) for level in text[1].replace("\n", " ").split("|")]


def page_with_table(page: str) -> str:
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    assert found and ended, f"{PAGE} has no place for the table"
    return before + BEGIN + table() + END + after


def main() -> int:
    check = only_check("docs/packages.py", __doc__)
    page = PAGE.read_text(encoding="utf-8")
    wanted = page_with_table(page)
    if check:
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
