"""Which scaling suits a model and a length: candidates, a search that keeps a budget, the verdict in words, a page.

Nothing is trained; the model is read under each candidate, patched in place.
Knows nothing of how a model is trained.
"""

from scaled_rope.versions import check_versions

check_versions("torch", "transformers")  # before an import that would fail in many lines
