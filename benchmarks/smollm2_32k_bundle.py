"""The files that travel to the machine with the GPU: weights packed into pieces, all else as it is, a manifest.

A machine that is lent for minutes takes a limited amount in one call, so files are grouped into calls, and what arrived
is held against the manifest before anything is computed. The weights come from a 4-bit file, so their bfloat16 numbers
are few; xz makes about half of them without loss, and the model that is put together is the same to the bit. Nothing
else than Python is needed to unpack them.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic

WEIGHTS = "model.safetensors"
MANIFEST = "manifest.json"
CALL_BYTES = 64 * 2**20
"""The most that one call carries, the checkout included."""
PATHS_IN_A_CALL = 7
"""The manifest is an eighth."""
MANIFEST_BYTES = 2**16
"""Room that is left for it."""
_SLICE = 16 * 2**20  # bytes of weights that are packed together: unpacked by as many threads as there are


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pack_weights(weights: Path, folder: Path, room: int) -> list[str]:
    """Pack a file into numbered folders of at most `room` bytes; return the parts' names below `folder`, in order.

    What else is in the folder is deleted.

    Raises:
        ConfigError: a part that is larger than `room`.
    """
    staged = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    names, number, used = [], 0, 0
    size = min(_SLICE, room - room // 16)  # what cannot be packed grows a little
    with weights.open("rb") as file:
        while part := file.read(size):
            packed = lzma.compress(part, preset=1)
            if len(packed) > room:
                raise ConfigError(f"room {room} is not allowed; a part of {weights.name} takes {len(packed)} bytes")
            if used + len(packed) > room:
                number, used = number + 1, 0
            used += len(packed)
            names.append(f"{number:02d}/{len(names):03d}.xz")
            write_atomic(staged / names[-1], packed)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(staged, folder)
    return names


def grouped(sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Group paths into calls of at most `room` bytes and 7 paths, the largest first.

    Raises:
        ConfigError: a path that is larger than that.
    """
    calls: list[list[str]] = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if size > room:
            raise ConfigError(f"{name} has {size / 2**20:.1f} MiB; a call has room for {room / 2**20:.1f}")
        for call in calls:
            if len(call) < PATHS_IN_A_CALL and sum(sizes[one] for one in call) + size <= room:
                call.append(name)
                break
        else:
            calls.append([name])
    return calls


def complete(bundle: Path, weights: Path, room: int, **facts: Any) -> list[list[str]]:
    """Pack the weights into a bundle that holds everything else, and write the manifest; return the calls.

    Parts that were made from the same weights for the same room are kept. `facts` stand in the manifest too.

    Raises:
        ConfigError: something in the bundle is larger than a call.
    """
    inside = room - MANIFEST_BYTES
    made = {"sha256": sha256(weights), "room": room}
    try:
        before = json.loads((bundle / MANIFEST).read_text())["weights"]
        parts = before["parts"] if {name: before[name] for name in made} == made else []
    except (OSError, ValueError, KeyError, TypeError):
        parts = []
    if not parts or not all((bundle / name).is_file() for name in parts):
        parts = [f"pieces/{name}" for name in pack_weights(weights, bundle / "pieces", inside)]
    sizes: dict[str, int] = {}
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in bundle.rglob("*") if path.is_file() and path != bundle / MANIFEST):
        files[str(path.relative_to(bundle))] = {"sha256": sha256(path), "bytes": path.stat().st_size}
        # A packed set, or a folder of pieces, is carried as one path.
        name = str((path.parent if path.parent != bundle else path).relative_to(bundle))
        sizes[name] = sizes.get(name, 0) + path.stat().st_size
    calls = grouped(sizes, inside)
    manifest = {**facts, "weights": made | {"parts": parts}, "files": files, "calls": calls}
    write_atomic(bundle / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return calls


def check_arrived(bundle: Path) -> dict[str, Any]:
    """The manifest, after every file was held against it.

    Raises:
        ConfigError: no manifest, or a file that is missing or differs.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise ConfigError(f"{path} is not there; make it with smollm2_32k_prepare.py")
    manifest: dict[str, Any] = json.loads(path.read_text())
    missing = [name for name in manifest["files"] if not (bundle / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{bundle / missing[0]}{more} is missing; bring it from where smollm2_32k_prepare.py ran")
    with ThreadPoolExecutor() as pool:
        for name, found in zip(
            manifest["files"], pool.map(lambda n: sha256(bundle / n), manifest["files"]), strict=True
        ):
            if found != manifest["files"][name]["sha256"]:
                raise ConfigError(f"{bundle / name} is truncated or altered; bring it anew")
    return manifest


def assemble(bundle: Path, model: Path) -> None:
    """Hold what arrived against the manifest, and put the model together if it is missing.

    Raises:
        ConfigError: as `check_arrived`; parts that do not make up the weights; a model with other weights.
    """
    manifest = check_arrived(bundle)
    wanted = manifest["weights"]["sha256"]
    if model.exists():
        if sha256(model / WEIGHTS) != wanted:
            raise ConfigError(f"{model / WEIGHTS} is not what {bundle / MANIFEST} was made from; remove one of them")
        return
    staged = model.with_name(f".{model.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(bundle / "model", staged)
    digest = hashlib.sha256()
    with (staged / WEIGHTS).open("wb") as whole, ThreadPoolExecutor() as pool:
        for part in _unpacked(pool, [bundle / name for name in manifest["weights"]["parts"]]):
            digest.update(part)
            whole.write(part)
    if digest.hexdigest() != wanted:
        raise ConfigError(f"the parts in {bundle} do not make up the weights; bring them anew")
    os.rename(staged, model)


def _unpacked(pool: ThreadPoolExecutor, paths: Sequence[Path]) -> Iterable[bytes]:
    return pool.map(lambda path: lzma.decompress(path.read_bytes()), paths)
