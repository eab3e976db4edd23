"""The grid of the tests of the search, and a sweep over random windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tqdm import tqdm

from scaled_rope.flags.search import parse_grid
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.measurement import RowStore, Score, ScoredWindow, Sweep

GRID = parse_grid("1.0:1.5:0.05")
LENGTH = 32
IDENTITY: Row = {"model_fingerprint": "m", "dtype": "float32", "data": {"name": "random"}}


def sweep(path: Path, score: Score, windows: int = 6, length: int = LENGTH) -> Sweep:
    """Over random windows of 8·`length` tokens."""
    rng = np.random.default_rng(0)
    pieces = [ScoredWindow(i, 0, rng.integers(0, 500, 8 * length)) for i in range(windows)]
    return Sweep(RowStore(path, {"seed": 0}, tqdm(disable=True)), pieces, length, IDENTITY, score)


def start(factor: float, length: int = LENGTH) -> RopeScaling:
    """YaRN with the paper's constants."""
    return RopeScaling("yarn", factor, original_max_position_embeddings=length)
