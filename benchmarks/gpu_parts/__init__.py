"""The parts of `benchmarks/gpu.py`.

A module per part, each with `measure(clock)`, which yields rows; shared code is in `timing`, `rows` and `models`.
`rotary_cases` is shared by the two rotary parts, and `--interpret` runs `interpret`. All of them import torch, so the
entry script imports them only when it is going to measure.
"""
