"""Training: the loop, batches, the model that is trained, engines, states that resume, memory and time planned.

A run carries out a recipe (`scaled_rope.recipes`); everything in step k follows from the recipe and from k.
Knows nothing of methods and of how results are judged.
"""
