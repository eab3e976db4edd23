"""Inspecting a model's RoPE scaling, and saying it in the words of other programs.

Holds the checks of configs and of loaded models, the repair of configs, figures of scalings, the targets of an export,
and GGUF files.
Knows nothing of training, evaluation and tuning.
"""

from scaled_rope.versions import check_versions

check_versions("torch", "transformers")  # before an import that would fail in many lines
