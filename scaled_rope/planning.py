"""What a training run will need before it is started: the model it trains, built without weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from scaled_rope.errors import ConfigError
from scaled_rope.loading import load_config
from scaled_rope.recipes import Recipe, starts_from
from scaled_rope.training import install_scaling

ARCHITECTURES = Path(__file__).resolve().parents[1] / "data" / "architectures.json"
"""What the config.json of the recipes' base models says, so that planning needs no network."""


def base_config(recipe: Recipe) -> Any:
    """The configuration of the model that a recipe starts from.

    A model that another recipe has yet to make is what that recipe would make.

    Raises:
        ConfigError: the model is neither here, nor in `ARCHITECTURES`, nor on the hub.
    """
    from transformers import AutoConfig

    if recipe.init is not None:
        fields = dict(recipe.init)
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    name = str(recipe.model)
    if not Path(name).is_dir():
        known = json.loads(ARCHITECTURES.read_text(encoding="utf-8"))
        if name in known:
            fields = dict(known[name])
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        if (before := starts_from(recipe)) is not None:
            return copy.deepcopy(meta_model(before).config)
    return load_config(name)


def meta_model(recipe: Recipe) -> Any:
    """The model of a recipe with its scaling installed, on the meta device: shapes and frequencies, no weights.

    Raises:
        ConfigError: what `base_config` and `install_scaling` raise, or an `init` that is no model.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(base_config(recipe), dtype=torch.float32)
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"model of recipe {recipe.name!r} cannot be built: {str(error).splitlines()[0]}") from None
    install_scaling(model, recipe)
    return model
