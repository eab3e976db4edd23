"""A process that holds models of MLX and gives their logits; see transformers_worker.py, whose protocol it has."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    mx = importlib.import_module("mlx.core")  # not in this project's environment
    load_model = importlib.import_module("mlx_lm.utils").load_model
    model: Any = None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.npy"
        for line in sys.stdin:
            asked = json.loads(line)
            if "load" in asked:
                model, _ = load_model(Path(asked["load"]))
                model.set_dtype(getattr(mx, asked["dtype"]))
                print(json.dumps(asked["load"]), flush=True)
                continue
            logits = model(mx.array([asked["ids"]]))[0].astype(mx.float32)
            np.save(path, np.array(logits))
            print(json.dumps(str(path)), flush=True)


if __name__ == "__main__":
    main()
