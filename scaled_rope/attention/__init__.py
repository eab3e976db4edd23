"""Attention implementations of our own, and which implementation can run where and for which family.

Those that change what attention sees (ReRoPE and its like) are lists of regions, computed by one loop.
Knows nothing of how a model is patched.
"""

from scaled_rope.versions import check_versions

check_versions("torch", "transformers")  # before an import that would fail in many lines
