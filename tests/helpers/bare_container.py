"""A container with little more than torch and transformers, in which the scripts for a lent GPU must run."""

from __future__ import annotations

import importlib.metadata
import os
import re
from pathlib import Path

from packaging.requirements import Requirement

from tests.helpers import ROOT

NEEDED = ("torch", "triton", "transformers", "accelerate", "einops", "matplotlib")
"""What the scripts say that they need. What these depend on is there as well."""


def _name(text: str) -> str:
    return re.sub(r"[-_.]+", "-", text).lower()


def absent() -> list[str]:
    """Top-level modules of this environment that come with none of the packages that are needed."""
    there: set[str] = set()
    left = list(NEEDED)
    while left:
        name = _name(left.pop())
        if name in there:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # a wheel of torch for other machines brings more
            continue
        there.add(name)
        asked = (Requirement(text) for text in required)
        left += [one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    owners = importlib.metadata.packages_distributions()
    return sorted(
        module
        for module, names in owners.items()
        if module != "scaled_rope" and there.isdisjoint(map(_name, names))
    )  # fmt: skip


def variables(folder: Path) -> dict[str, str]:
    """The PYTHONPATH that hides from a program what is absent, by a file that is written to the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(f"""
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {set(absent())} else find(name, path, target)
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
""")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), str(ROOT), os.environ.get("PYTHONPATH")]))}
