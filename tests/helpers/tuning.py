"""The grid of the tests of the search."""

from __future__ import annotations

from scaled_rope.flags import parse_grid

GRID = parse_grid("1.0:1.5:0.05")
