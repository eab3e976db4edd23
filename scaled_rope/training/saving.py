"""Write the model that was trained: adapters merged, in the dtype of the recipe, in one rename."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaled_rope.checkpoint import load_tokenizer, open_checkpoint
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.patching.adapter_scaling import save_adapter_scaling
from scaled_rope.patching.loading import load_model, merge_adapter
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.dialects import write_both_dialects
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.training.model import install_scaling


def make_whole(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Replace the parameters of a model, which hold shards, by the whole ones in `state`, to merge adapters into them.

    The engine that sharded the model must not run it again after this.
    """
    whole: dict[int, nn.Parameter] = {}  # by identity, so that tied parameters stay tied
    for place, module in model.named_modules(remove_duplicate=False):
        for leaf, shard in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(shard) not in whole:
                whole[id(shard)] = nn.Parameter(state[f"{place}.{leaf}"], requires_grad=False)
            setattr(module, leaf, whole[id(shard)])


def save_model(
    model: Any,
    state: dict[str, torch.Tensor],
    recipe: Recipe,
    output: Path,
    records: Callable[[Path], None],
    chat_template: str | None = None,
) -> None:
    """Write checkpoint and tokenizer to `output` in one rename; adapters are merged, and also kept in `adapter/`.

    Parameters get the recipe's dtype. Buffers, and parameters that the architecture keeps in float32, stay as they are.

    records: writes the other files of the folder.
    chat_template: the one that the model was trained on, in place of the tokenizer's own.

    If a weight has grown beyond what that dtype holds, the model is saved in float32, with a warning.
    """
    staged = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    try:
        _write_model(model, state, recipe, staged, chat_template)
        records(staged)
        shutil.rmtree(output, ignore_errors=True)
        os.rename(staged, output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)  # gone already after a success


def _write_model(
    model: Any, state: dict[str, torch.Tensor], recipe: Recipe, staged: Path, chat_template: str | None
) -> None:
    """`save_model` without the records, under the name that the folder has until it is whole."""
    dtype = recipe.save_dtype or recipe.compute_dtype
    if recipe.lora:
        model.save_pretrained(staged / "adapter", state_dict=state)
        save_adapter_scaling(model, staged / "adapter")
        if recipe.quantization is None:
            model = model.merge_and_unload()
        else:  # merged into the weights as they were, since merging into 4 bits would round the adapters away
            model = merged_unquantised(recipe, str(staged / "adapter"))
        state = model.state_dict()
    names: dict[int, str] = {}  # first name of each weight: FSDP gathers a tied one once for every name
    for name, weight in model.named_parameters(remove_duplicate=False):
        state[name] = state[names.setdefault(id(weight), name)]
    cast: dict[int, torch.Tensor] = {}  # by address, so that tied weights stay one tensor and are written once
    own = _kept_precise(model, dtype)
    if (lost := _too_large({name: value for name, value in state.items() if name not in own}, dtype)) is not None:
        print(f"warning: save_dtype {dtype!r} was not used: {lost}; saved in float32", file=sys.stderr, flush=True)
        dtype = "float32"
    for name, value in state.items():
        wanted = value if name in own else value.to(getattr(torch, dtype))
        state[name] = cast.setdefault(value.data_ptr(), wanted.contiguous())
    text_config(model.config).use_cache = True
    model.save_pretrained(staged, state_dict=state)
    _record_dtype(staged / "config.json", dtype)
    write_both_dialects(staged)
    tokenizer = load_tokenizer(recipe.tokenizer or str(recipe.model))
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if (length := getattr(text_config(model.config), "max_position_embeddings", None)) is not None:
        tokenizer.model_max_length = length  # programs cut texts there, and the model's own may be the shorter one
    tokenizer.save_pretrained(staged)


def check_save_dtype(model: Any, recipe: Recipe) -> None:
    """Refuse a dtype to save in that cannot hold the weights as they are before training.

    Raises:
        ConfigError: a weight has a number that would become infinite.
    """
    dtype = recipe.save_dtype or recipe.compute_dtype
    own = _kept_precise(model, dtype)
    if lost := _too_large({name: value for name, value in model.named_parameters() if name not in own}, dtype):
        raise ConfigError(f"save_dtype = {dtype!r} is not allowed: {lost}; save_dtype: float32")


def _too_large(weights: Mapping[str, torch.Tensor], dtype: str) -> str | None:
    """Which finite number of which weight would become infinite in a dtype, in words; None if none would."""
    if dtype != "float16":  # the others have the range of float32
        return None
    largest = torch.finfo(torch.float16).max
    for name, weight in weights.items():
        if not weight.is_floating_point() or weight.is_meta:
            continue
        lost = weight.isfinite() & ~weight.to(getattr(torch, dtype)).isfinite()
        if lost.any():
            return (
                f"weight {name} has {weight[lost].abs().max().item():g}, and the largest number of {dtype} is"
                f" {largest:g}"
            )
    return None


def _record_dtype(file: Path, dtype: str) -> None:
    """Have a saved config say `dtype`, its nested configs too: transformers writes that of the weights in memory."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part is config or "dtype" in part:
            part["dtype"] = dtype
    write_atomic(file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _kept_precise(model: Any, dtype: str) -> set[str]:
    """Names in a model's state that are not rounded to `dtype`: transformers loads them in float32 in any case."""
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == "float16":
        patterns += getattr(model, "_keep_in_fp32_modules", None) or ()
    names = {name for name, _ in model.named_buffers()}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if any(re.search(rf"(^|\.){pattern}($|\.)", name) for pattern in patterns):
            names.add(name)
    return names


def merged_unquantised(recipe: Recipe, adapter: str) -> Any:
    """The recipe's model on the CPU, an adapter merged into the weights as the checkpoint has them."""
    checkpoint = open_checkpoint(str(recipe.model))
    dtype = recipe.save_dtype or recipe.compute_dtype
    # In float16 a number that is too large for it would be infinite already, and nobody could tell.
    model = load_model(checkpoint, dtype="float32" if dtype == "float16" else dtype, device="cpu")
    install_scaling(model, recipe, checkpoint.settings)
    return merge_adapter(model, adapter)
