"""How a scaling gets into a model of transformers: families, rotary modules, hooks, caches, the config that is saved.

Loading a model and its loss per token are here too, since both depend on what a patch does to a forward pass.
Knows nothing of formulas, data sets, training and evaluation.
"""

from scaled_rope.versions import check_versions

check_versions("torch", "transformers")  # before an import that would fail in many lines
