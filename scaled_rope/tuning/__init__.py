"""The search for the attention factor and the ramp that fit a model: its curves, statistics and figures.

Nothing is trained; a model is read under many scalings.
Knows nothing of training and of other programs.
"""
