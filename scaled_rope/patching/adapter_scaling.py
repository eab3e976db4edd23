"""The scaling that a LoRA adapter was trained under, in a file beside its weights: PEFT saves no config of models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.patching.patch import patched_plan, patched_scaling
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings

FILE = "scaled_rope.json"


def save_adapter_scaling(model: nn.Module, folder: str | Path) -> None:
    """Write the scaling that a model computes with into the folder of an adapter that was trained in it.

    To `load_model` and the evaluators that is then the checkpoint's own scaling, in place of the base's.

    Args:
        model: with the adapter or without.
        folder: that holds `adapter_config.json`.

    Raises:
        ConfigError: no such folder.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ConfigError(f"folder {str(folder)!r} holds no adapter_config.json, so no adapter")
    scaling, plan = patched_scaling(model), patched_plan(model)
    if scaling is None:
        settings = RopeSettings(model.config)
        scaling, plan = settings.scaling, settings.plan
    layers = {name: one.to_dict() for name, one in plan.layers.items()}
    record = {"scaling": scaling.to_dict(), "layers": layers, "drop_layers": list(plan.drop_layers)}
    write_atomic(Path(folder) / FILE, json.dumps(record, indent=2) + "\n")


def adapter_scaling(folder: str | Path) -> tuple[RopeScaling, LayerPlan] | None:
    """The scaling of an adapter and the differences between its layers; None where nothing says it.

    Raises:
        ConfigError: a file that cannot be read.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
        layers = {str(name): RopeScaling.from_dict(one) for name, one in record.get("layers", {}).items()}
        plan = LayerPlan(layers, tuple(map(int, record.get("drop_layers", ()))))
        return RopeScaling.from_dict(record["scaling"]), plan
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"adapter {str(folder)!r}: its {FILE} cannot be read: {error}") from error
