"""What travels to the GPU machine: packed, grouped into calls, and held against the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.smollm2_32k_bundle import MANIFEST, PATHS_IN_A_CALL, WEIGHTS, assemble, complete, grouped, sha256
from scaled_rope.errors import ConfigError

ROOM = 2**18


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle of 600 kB of weights that do not compress and a few files; the weights are in `made`."""
    (tmp_path / "made").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, 600_000, dtype=np.uint8)
    (tmp_path / "made" / WEIGHTS).write_bytes(noise.tobytes())
    for name in ("train/tokens.bin", "train/meta.json", "model/config.json"):
        (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bundle" / name).write_text(name)
    complete(tmp_path / "bundle", tmp_path / "made" / WEIGHTS, ROOM, commit="c")
    return tmp_path / "bundle"


def test_the_model_is_the_same_to_the_bit(bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert manifest["commit"] == "c"
    named = {name for call in manifest["calls"] for name in call}
    assert {"train", "model", "pieces/00", "pieces/01"} <= named
    for call in manifest["calls"]:
        files = [path for name in (MANIFEST, *call) for path in [bundle / name, *(bundle / name).glob("*")]]
        assert sum(path.stat().st_size for path in files if path.is_file()) <= ROOM
    assemble(bundle, tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == (tmp_path / "made" / WEIGHTS).read_bytes()
    assert (tmp_path / "model" / "config.json").is_file()
    assemble(bundle, tmp_path / "model")  # it is there
    (tmp_path / "model" / WEIGHTS).write_bytes(b"other")
    with pytest.raises(ConfigError, match="is not what .* was made from"):
        assemble(bundle, tmp_path / "model")


def test_nothing_is_packed_twice(bundle: Path, tmp_path: Path) -> None:
    before, part = (bundle / MANIFEST).read_text(), bundle / "pieces" / "00" / "000.xz"
    written = part.stat().st_mtime_ns
    complete(bundle, tmp_path / "made" / WEIGHTS, ROOM, commit="c")
    assert (bundle / MANIFEST).read_text() == before and part.stat().st_mtime_ns == written
    complete(bundle, tmp_path / "made" / WEIGHTS, 2 * ROOM, commit="c")  # other room, other pieces
    assert part.stat().st_mtime_ns != written and (bundle / MANIFEST).read_text() != before
    (tmp_path / "made" / WEIGHTS).write_bytes(b"other weights")
    complete(bundle, tmp_path / "made" / WEIGHTS, 2 * ROOM, commit="c")
    assert [path.name for path in (bundle / "pieces").rglob("*.xz")] == ["000.xz"]


def test_what_did_not_arrive_whole_is_refused(bundle: Path, tmp_path: Path) -> None:
    part = bundle / "pieces" / "01" / sorted(path.name for path in (bundle / "pieces" / "01").iterdir())[0]
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match=f"{part.name} is truncated or altered"):
        assemble(bundle, tmp_path / "model")
    part.unlink()
    with pytest.raises(ConfigError, match=f"{part.name} is missing; bring it"):
        assemble(bundle, tmp_path / "model")
    part.write_bytes(whole)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["weights"]["sha256"] = sha256(part)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="do not make up the weights"):
        assemble(bundle, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (bundle / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"make it with smollm2_32k_prepare\.py"):
        assemble(bundle, tmp_path / "model")


def test_calls_have_room() -> None:
    assert grouped({"a": 6, "b": 5, "c": 4, "d": 1}, 10) == [["a", "c"], ["b", "d"]]
    many = grouped({f"{index:02d}": 1 for index in range(10)}, 100)
    assert [len(call) for call in many] == [PATHS_IN_A_CALL, 3]
    with pytest.raises(ConfigError, match=r"a has .* MiB; a call has room for"):
        grouped({"a": 11}, 10)
