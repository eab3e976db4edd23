"""The manifest of a saved state: what each of its files is, so that a state proves itself before it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaled_rope.content_hash import content_hash, record_hash
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic

NAME = "state.json"
"""The file of a state that holds its facts and its manifest; it is written last."""


def state_files(folder: Path) -> list[str]:
    """Paths of a state's files, relative to its folder, without `NAME`."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found if path != folder / NAME)


def entries(folder: Path, names: list[str]) -> dict[str, list[Any]]:
    """Path -> [size in bytes, hash] of files of a state."""
    return {name: [(folder / name).stat().st_size, content_hash(folder / name)] for name in names}


def write_manifest(folder: Path, facts: Mapping[str, Any], files: Mapping[str, list[Any]]) -> None:
    """Write facts and manifest, sealed by a hash of both."""
    record = {**facts, "files": dict(sorted(files.items()))}
    write_atomic(folder / NAME, json.dumps(record | {"seal": record_hash(record)}, indent=1) + "\n")


def read_facts(folder: Path, field: str) -> dict[str, Any]:
    """Step, number of ranks and engine of a state that was named by `field`, and "files" where it has a manifest.

    Raises:
        ConfigError: it is none, or its record was changed.
    """
    try:
        record = json.loads((folder / NAME).read_text(encoding="utf-8"))
        facts: dict[str, Any] = record | {"step": int(record["step"]), "ranks": int(record["ranks"])}
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise ConfigError(f"{field} {folder} is no saved state; a folder checkpoints/step-N") from None
    if "seal" in record or "files" in record:  # both or, in states of earlier versions, neither
        seal = record.pop("seal", None)
        if seal != record_hash(record):
            raise ConfigError(f"{field} {folder} is damaged: {NAME} was changed after it was written")
    return facts


def fault(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The fault of a state; None for none. States of earlier versions have no manifest and pass.

    part, parts: of several processes, each can read every `parts`-th file only.
    """
    try:
        facts = read_facts(folder, "state")
    except ConfigError as error:
        return str(error).partition(f"{folder} ")[2]
    wanted = facts.get("files")
    if wanted is None:
        return None
    if folder.name.startswith("step-") and folder.name != f"step-{facts['step']:06d}":
        return f"is named {folder.name} and holds step {facts['step']}"
    found = state_files(folder)
    for name in sorted(wanted.keys() - set(found)):
        return f"is damaged: {name} is missing"
    for name in sorted(set(found) - wanted.keys()):
        return f"is damaged: {name} was not there when it was saved"
    for name in found[part::parts]:
        size, digest = wanted[name]
        if (now := (folder / name).stat().st_size) != size:
            return f"is damaged: {name} has {now} bytes, it was saved with {size}"
        if content_hash(folder / name) != digest:
            return f"is damaged: the content of {name} changed after it was saved"
    return None
