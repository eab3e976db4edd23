"""Longer context for models with rotary position embeddings: YaRN and its relatives.

from scaled_rope import RopeScaling, patch_model, unpatch_model

scaling = RopeScaling("yarn", factor=16.0, original_max_position_embeddings=4096)
report = patch_model(model, scaling)
"""

from scaled_rope.config import LayerPlan, RopeScaling
from scaled_rope.errors import ConfigError
from scaled_rope.loading import load_model
from scaled_rope.methods import METHODS, compute_rope
from scaled_rope.patch import PatchReport, patch_model, unpatch_model

__all__ = [
    "METHODS",
    "ConfigError",
    "LayerPlan",
    "PatchReport",
    "RopeScaling",
    "compute_rope",
    "load_model",
    "patch_model",
    "unpatch_model",
]
__version__ = "0.1.0"
