"""The states of the random generators of Python, NumPy and torch, in memory and as plain JSON in a saved state."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic

_DEVICES = ("cuda", "xpu")


def _devices() -> dict[str, Any]:
    found = {name: getattr(torch, name, None) for name in _DEVICES}
    return {name: module for name, module in found.items() if module is not None and module.is_available()}


class RandomState:
    """A snapshot of the generators of this process, of GPUs that of its current one; `restore` sets them back."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._torch = torch.get_rng_state()
        self._devices = {name: [module.get_rng_state()] for name, module in _devices().items()}

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        for name, states in self._devices.items():
            if (module := _devices().get(name)) is not None:
                # States of earlier versions hold those of all devices of the machine that saved them.
                place = 0 if len(states) == 1 else _place(module)
                if place < len(states):
                    module.set_rng_state(states[place])

    def save(self, path: Path) -> None:
        """Write it as JSON: whole numbers, and bytes as hexadecimal digits."""
        version, values, gauss = self._python
        kind, keys, place, has_gauss, kept_gauss = self._numpy
        record = {
            "python": [version, list(values), gauss],
            "numpy": [kind, keys.tolist(), int(place), int(has_gauss), float(kept_gauss)],
            "torch": _hexadecimal(self._torch),
            **{name: [_hexadecimal(state) for state in states] for name, states in self._devices.items()},
        }
        write_atomic(path, json.dumps(record) + "\n")

    @classmethod
    def load(cls, path: Path) -> RandomState:
        """Read it again.

        Raises:
            ConfigError: the file does not hold one.
        """
        state = cls.__new__(cls)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            version, values, gauss = record["python"]
            state._python = version, tuple(values), gauss
            kind, keys, *rest = record["numpy"]
            state._numpy = kind, np.array(keys, dtype=np.uint32), *rest
            state._torch = _tensor(record["torch"])
            state._devices = {name: [_tensor(text) for text in record[name]] for name in _DEVICES if name in record}
            random.Random().setstate(state._python)  # what does not fit is refused here, before anything is set
            np.random.RandomState().set_state(state._numpy)
            torch.Generator().set_state(state._torch)
        except (OSError, AttributeError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} does not hold the states of random generators") from error
        return state


def _place(module: Any) -> int:
    """The number of this process's device on its machine, which it may see as its only one."""
    rank = os.environ.get("LOCAL_RANK", "")
    alone = module.device_count() == 1 and rank.isdecimal()
    return int(rank) if alone else int(module.current_device())


def _hexadecimal(state: torch.Tensor) -> str:
    return bytes(state.tolist()).hex()


def _tensor(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8, device="cpu")
