"""Searches for the scaling that fits a model: YaRN's constants, or a divisor per pair; statistics and figures.

Nothing is trained; a model is read under many scalings.
Knows nothing of training and of other programs.
"""
