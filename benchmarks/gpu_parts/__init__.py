"""The parts of `benchmarks/gpu.py`.

A module per part, each with `measure(clock)`, which yields rows; what they share is in `timing`, `rows` and `models`.
`rotary_cases` is shared by the two rotary parts, and `interpret` is what `--interpret` runs. All of them import torch,
so the entry script imports them only when it is to measure.
"""
