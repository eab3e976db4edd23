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
    """Write the scaling that a model computes with beside each adapter that was trained in it and saved in a folder.

    To `load_model` and the evaluators that is then the checkpoint's own scaling, in place of the base's.

    Args:
        model: with its adapters; also without, where the folder is that of one.
        folder: that holds `adapter_config.json`, or a folder with one for each adapter that has a name, as PEFT saves
            them.

    Raises:
        ConfigError: no such folder.
    """
    folders = saved_adapters(model, folder)
    if not folders:
        names = [name for name in adapter_names(model) if name != "default"]
        named = f", nor in {', '.join(names)}" if names else ""
        raise ConfigError(f"folder {str(folder)!r} holds no adapter_config.json{named}, so no adapter")
    scaling, plan = patched_scaling(model), patched_plan(model)
    if scaling is None:
        settings = RopeSettings(model.config)
        scaling, plan = settings.scaling, settings.plan
    layers = {name: one.to_dict() for name, one in plan.layers.items()}
    record = {"scaling": scaling.to_dict(), "layers": layers, "drop_layers": list(plan.drop_layers)}
    for each in folders:
        write_atomic(each / FILE, json.dumps(record, indent=2) + "\n")


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters that PEFT put into a model, "default" where none was given."""
    return list(getattr(model, "peft_config", None) or {})


def saved_adapters(model: nn.Module, folder: str | Path) -> list[Path]:
    """The folders of adapters in the folder that a model was saved to: itself, or those named as its adapters are."""
    places = [Path(folder), *(Path(folder) / name for name in adapter_names(model))]
    return [place for place in places if (place / "adapter_config.json").is_file()]


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
