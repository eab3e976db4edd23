"""Models that are split over devices: the placement that is asked for, and where a split model takes its inputs.

accelerate's hooks move the inputs of each part to its device. Weights that are offloaded to the CPU or to disk are on
the meta device until their part is used, so that a model has no device of its own.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaled_rope.errors import ConfigError, unknown

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""Placements that accelerate computes from the free memory."""


@dataclass(frozen=True)
class Placement:
    """How a model is split.

    Attributes:
        device_map: one of `DEVICE_MAPS`, or the device of each part by its name.
        max_memory: the most memory by device: "20GiB" of GPU 0 or of "cpu"; None: what is free.
        offload_folder: folder for weights that fit nowhere else.
    """

    device_map: str | Mapping[str, int | str]
    max_memory: Mapping[int | str, str] | None = None
    offload_folder: str | None = None

    @classmethod
    def parse(
        cls, device_map: str | None, max_memory: str | None = None, offload_folder: str | None = None
    ) -> Placement | None:
        """Read the values of flags; None where a model is not to be split.

        Args:
            device_map: one of `DEVICE_MAPS`, or a JSON file with an object of parts and devices.
            max_memory: "0=20GiB,cpu=64GiB".

        Raises:
            ConfigError: another value, or one that is for a split model only.
        """
        if device_map is None:
            for name, value in (("max-memory", max_memory), ("offload-folder", offload_folder)):
                if value is not None:
                    raise ConfigError(f"--{name} {value} goes with --device-map")
            return None
        chosen: str | dict[str, int | str] = device_map
        if device_map.endswith(".json"):
            chosen = _read_map(device_map)
        elif device_map not in DEVICE_MAPS:
            raise unknown("device-map", device_map, [*DEVICE_MAPS, "a .json file"])
        if offload_folder is not None and Path(offload_folder).is_file():
            raise ConfigError(f"--offload-folder {offload_folder} is a file; name a folder")
        return cls(chosen, None if max_memory is None else _read_memory(max_memory), offload_folder)

    def options(self) -> dict[str, Any]:
        """The arguments of `from_pretrained`.

        Raises:
            ConfigError: accelerate is missing.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise ConfigError("a device map needs accelerate: pip install 'scaled-rope[train]'")
        found: dict[str, Any] = {"device_map": self.device_map}
        if self.max_memory is not None:
            found["max_memory"] = dict(self.max_memory)
        if self.offload_folder is not None:
            found["offload_folder"] = self.offload_folder
        return found


def _read_map(path: str) -> dict[str, int | str]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--device-map {path} cannot be read: {error}") from None
    if not isinstance(found, dict) or not found or not all(isinstance(one, int | str) for one in found.values()):
        raise ConfigError(f'--device-map {path} must hold an object of parts and devices, such as {{"lm_head": 1}}')
    return found


def _read_memory(text: str) -> dict[int | str, str]:
    found: dict[int | str, str] = {}
    for part in text.split(","):
        device, equals, size = part.partition("=")
        if not equals or not size or not (device.isdecimal() or device == "cpu"):
            raise ConfigError(f"--max-memory {text} is not allowed; DEVICE=SIZE, as 0=20GiB,1=20GiB,cpu=64GiB")
        found[int(device) if device.isdecimal() else device] = size
    return found


def input_device(model: Any) -> torch.device:
    """The device on which a model takes token ids: that of its embedding, or to which the embedding's weights are
    brought when they are used."""
    embedding: nn.Module = model.get_input_embeddings()
    hook: Any = getattr(embedding, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        place = getattr(one, "execution_device", None)
        if place is not None:
            return _device(place)
    weight: Any = next(embedding.parameters(), None)
    device: torch.device = model.device if weight is None else weight.device
    return device


def computing_devices(model: Any) -> tuple[torch.device, ...]:
    """The devices on which a model computes: of a split one all of its GPUs, to which parts on the CPU or on disk are
    brought when they are used."""
    places = (getattr(model, "hf_device_map", None) or {}).values()
    gpus = {device for place in places if place != "disk" and (device := _device(place)).type == "cuda"}
    return tuple(sorted(gpus, key=str)) or (input_device(model),)


def _device(place: Any) -> torch.device:
    """A device as accelerate names it, where a number is a GPU."""
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of a model are on no device until they are used."""
    return any(weight.is_meta for weight in model.parameters())
