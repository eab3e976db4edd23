"""A process that holds models of plain transformers and gives their logits; `run.py` starts it.

    python benchmarks/engines/transformers_worker.py

It imports nothing of this project. Each line of its input is a JSON object: {"load": FOLDER, "dtype": …} loads a
checkpoint, {"ids": […]} is answered with the name of a file that holds the logits of these token ids, float32 [T, V].
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers


def load(folder: str, dtype: str) -> Any:
    word = "dtype" if int(transformers.__version__.partition(".")[0]) > 4 else "torch_dtype"
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **{word: getattr(torch, dtype)}).eval()


def main() -> None:
    transformers.utils.logging.set_verbosity_error()
    model: Any = None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.npy"
        for line in sys.stdin:
            asked = json.loads(line)
            if "load" in asked:
                model = load(asked["load"], asked["dtype"])
                print(json.dumps(asked["load"]), flush=True)
                continue
            with torch.inference_mode():
                logits = model(torch.tensor([asked["ids"]]), use_cache=False).logits[0]
            np.save(path, logits.float().numpy())
            print(json.dumps(str(path)), flush=True)


if __name__ == "__main__":
    main()
