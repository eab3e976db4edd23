"""Searches for the scaling that fits a model: YaRN's constants, a divisor per pair, DPE's groups; statistics.

Nothing is trained; a model is read under many scalings.
Knows nothing of training and of other programs.
"""
