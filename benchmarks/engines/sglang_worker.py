"""A process that computes logits with SGLang's own tables of angles; see transformers_worker.py, whose protocol it has.

SGLang's server does not run here. Its rotary modules compute their tables on a CPU too: the model is one of
transformers, and SGLang's `get_rope`, called as its class for Llama calls it, gives the cosines and sines. What SGLang
imports and is not installed, kernels for GPUs above all, is an empty module; none takes part in a table.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import transformers


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every module that SGLang imports and no other finder knows, with whatever is taken from it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame is not None and "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        asks = "" if frame is None else frame.f_globals.get("__name__", "")
        if not asks.startswith("sglang.") or name.startswith("sglang."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return Nothing(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class Nothing(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Tables(torch.nn.Module):
    """The rotary module of a Llama of transformers, with the table of SGLang's."""

    def __init__(self, config: Any, rope: Any) -> None:
        super().__init__()
        parameters = dict(config.rope_parameters)
        module = rope(
            config.head_dim,
            rotary_dim=config.head_dim,
            max_position=config.max_position_embeddings,
            base=parameters.get("rope_theta", 10000),
            is_neox_style=True,
            rope_scaling=parameters,
        )
        self.original = getattr(module, "original_max_position_embeddings", None)
        self.both = getattr(module, "long_short_cos_sin_cache", None)
        self.table = module.cos_sin_cache if self.both is None else self.both

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.both is not None and bool((position_ids > self.original).any()):  # LongRoPE: the long list lies behind
            position_ids = position_ids + self.original
        cos, sin = self.table[position_ids].chunk(2, dim=-1)
        return torch.cat((cos, cos), -1).to(x.dtype), torch.cat((sin, sin), -1).to(x.dtype)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.meta_path.append(Absent())
    rope = importlib.import_module("sglang.srt.layers.rotary_embedding").get_rope
    transformers.utils.logging.set_verbosity_error()
    model: Any = None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "logits.npy"
        for line in sys.stdin:
            asked = json.loads(line)
            if "load" in asked:
                model = transformers.AutoModelForCausalLM.from_pretrained(asked["load"], dtype=torch.float32).eval()
                model.model.rotary_emb = Tables(model.config, rope)
                answer = asked["load"]
            else:
                with torch.inference_mode():
                    np.save(path, model(torch.tensor([asked["ids"]]), use_cache=False).logits[0].numpy())
                answer = str(path)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
