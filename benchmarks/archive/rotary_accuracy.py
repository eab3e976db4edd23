"""How far off cos and sin are at high positions: float32 products, and 64-bit fractions of a turn.

    python benchmarks/archive/rotary_accuracy.py

The reference is exact: positions and frequencies as fractions, reduced modulo a π of 60 digits, then float64. The
first way is how rotary modules make their tables; the second is that of `apply_rotary_from_frequencies`, in its twin.
"""

from __future__ import annotations

import math
import random
import sys
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from scaled_rope.kernels import frequency_phases
from scaled_rope.kernels.rotary import tables_from_phases

HEAD_DIM, THETA, SAMPLES = 128, 10000.0, 200
LENGTHS = (2**12, 2**17, 2**20, 2**24)
PI = Fraction("3.14159265358979323846264338327950288419716939937510582097494")


def exact_angles(positions: list[int], inv_freq: torch.Tensor) -> torch.Tensor:
    """Angles [positions, R/2] in [0, 2π), float64."""
    turns = [[position * Fraction(f) / (2 * PI) % 1 for f in inv_freq.tolist()] for position in positions]
    return torch.tensor([[float(turn * 2 * PI) for turn in row] for row in turns], dtype=torch.float64)


def errors(length: int) -> tuple[float, float]:
    """Largest error of cos and sin in the last eighth of `length` positions: by products, and by fractions."""
    generator = random.Random(0)
    positions = [length - 1 - generator.randrange(length // 8) for _ in range(SAMPLES)]
    half = HEAD_DIM // 2
    inv_freq = torch.tensor([THETA ** (-i / half) for i in range(half)], dtype=torch.float64)
    angles = exact_angles(positions, inv_freq)
    given = torch.tensor(positions)
    product = given[:, None].float() * inv_freq.float()
    ways = (product.cos(), product.sin()), tables_from_phases(frequency_phases(inv_freq), given, 1.0)
    first, second = (
        max(float((cos.double() - angles.cos()).abs().max()), float((sin.double() - angles.sin()).abs().max()))
        for cos, sin in ways
    )
    return first, second


def main() -> None:
    assert abs(float(PI) - math.pi) < 1e-15
    print("positions up to | float32 products | fractions of a turn")
    for length in LENGTHS:
        first, second = errors(length)
        print(f"{length:,} | {first:.1e} | {second:.1e}")


if __name__ == "__main__":
    main()
