"""Context parallelism: ranks that share one sequence by ring attention (arXiv 2310.01889), PyTorch's, under FSDP2.

Every tensor along the sequence is cut into 2N stretches, and rank r of N gets stretches r and 2N - 1 - r, so that under
a causal mask all ranks have as much to do. Queries stay; keys and values go from rank to rank. So a rank's tokens are
not neighbours: targets are shifted and positions counted on the whole sequence, before it is cut.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scaled_rope.attention.backends import FLASH_HEAD_DIM, attention_dropout, has_window
from scaled_rope.errors import ConfigError
from scaled_rope.patching.output_head import decoder_of
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.scaling.hf_config import config_head_dim, text_config
from scaled_rope.scaling.record import RopeScaling


def check_context_parallel(recipe: Recipe, config: Any, scaling: RopeScaling, attention: str) -> None:
    """Raise an error for settings that would go wrong, or crash, with `recipe.context_parallel` ranks to a sequence.

    What the recipe alone shows is refused by `Recipe`, and what the layers show by `check_shared_layers`.

    Args:
        config: of the model.
        attention: the attention implementation that the model was built with.

    Raises:
        ConfigError: a scaling that depends on the length, changes attention or has an attention temperature; windows
            and other attention that is not causal over everything; another implementation than sdpa; heads that its
            flash kernel does not take; dropout of attention.
    """
    if recipe.context_parallel == 1:
        return
    head, text = f"context_parallel {recipe.context_parallel} is not allowed with", text_config(config)
    if scaling.is_length_dependent:
        raise ConfigError(f"{head} {scaling.label}: no rank sees the length of the sequence")
    if scaling.beyond_tables:
        why = "its attention" if scaling.changes_attention else "its attention_temperature"
        raise ConfigError(f"{head} {scaling.label}: {why} needs the whole sequence")
    others = {str(kind) for kind in getattr(text, "layer_types", None) or ()} - {"full_attention"}
    if others or has_window(text):
        raise ConfigError(
            f"{head} layers of type {', '.join(sorted(others)) or 'sliding_attention'}: ring attention is causal over"
            f" the whole sequence"
        )
    if attention != "sdpa":
        raise ConfigError(f"{head} attention {attention!r}: {text.model_type} models need another than PyTorch's sdpa")
    keys, values = head_dims(text)
    if keys != values or keys > FLASH_HEAD_DIM:
        raise ConfigError(
            f"{head} head_dim {keys} of keys and {values} of values: its kernel takes one of at most {FLASH_HEAD_DIM}"
            f" for both"
        )
    if dropout := attention_dropout(text):
        raise ConfigError(f"{head} {dropout}: in the backward pass ring attention would draw other numbers")


def head_dims(text: Any) -> tuple[int, int]:
    """Dimensions of a head's keys and of its values, from the config of a model of text."""
    if (rotated := getattr(text, "qk_rope_head_dim", None)) is not None:  # multi-head latent attention
        keys = int(rotated + text.qk_nope_head_dim)
    else:
        keys = config_head_dim(text) or text.hidden_size // text.num_attention_heads
    return keys, int(getattr(text, "v_head_dim", None) or keys)


def check_shared_layers(recipe: Recipe, model: nn.Module) -> None:
    """Raise an error for a model in which tokens of a sequence that ranks share meet elsewhere than in attention.

    Raises:
        ConfigError: a layer with a convolution; with ring attention also one without `self_attn`, where accelerate
            leaves out masks.
    """
    name = "context_parallel" if recipe.context_parallel > 1 else "sequence_parallel"
    if getattr(recipe, name) == 1:
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    decoder: Any = decoder_of(base)
    head = f"{name} {getattr(recipe, name)} is not possible for {base.config.model_type} models:"
    for layer in decoder.layers if name == "context_parallel" else ():
        if not hasattr(layer, "self_attn"):
            raise ConfigError(f"{head} a layer of them has no module self_attn")
    if any(isinstance(module, nn.Conv1d) for module in decoder.modules()):
        raise ConfigError(f"{head} a layer of them has a convolution along the sequence")


def check_machine(recipe: Recipe) -> None:
    """Raise an error where a launcher or a GPU does not suit `recipe.context_parallel`; called before accelerate.

    Raises:
        ConfigError: no FSDP, float32 on a GPU, or sizes in accelerate's own config.
    """
    for name in ("CP", "SP", "TP"):
        given = os.environ.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1")
        if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true" and given != "1":
            raise ConfigError(
                f"accelerate's parallelism_config_{name.lower()}_size {given} is not allowed; the recipe's"
                f" context_parallel or sequence_parallel says how many ranks share a sequence"
            )
    size = recipe.context_parallel
    if size == 1:
        return
    if os.environ.get("ACCELERATE_USE_FSDP", "false") != "true":
        raise ConfigError(
            f"context_parallel {size} needs FSDP2, since accelerate has ring attention under it only:"
            f" accelerate launch --config_file configs/accelerate/fsdp2.yaml"
        )
    if torch.cuda.is_available() and recipe.compute_dtype != "bfloat16":
        raise ConfigError(
            f"context_parallel {size} is not allowed with precision: {recipe.precision} on a GPU, where flash attention"
            f" takes half precision only"
        )


def ring_parallelism(recipe: Recipe, ranks: int) -> Any:
    """accelerate's `ParallelismConfig`: weights are in shards over all ranks, `context_parallel` neighbours share rows.

    Keys and values are passed on, so that no rank holds those of the whole sequence; accelerate's default gathers them.
    """
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.utils import TorchContextParallelConfig

    size = recipe.context_parallel
    handler = TorchContextParallelConfig(cp_comm_strategy="alltoall")
    return ParallelismConfig(cp_size=size, dp_shard_size=ranks // size, cp_handler=handler)


@contextlib.contextmanager
def ring_attention(accelerator: Any, tensors: Mapping[str, torch.Tensor], ranks: int) -> Iterator[dict[str, Any]]:
    """Yield this rank's part [B, T / ranks] of tensors [B, T]; within this context sdpa is ring attention over them.

    The backward pass has to be inside too. Only the flash kernel is let through: PyTorch's ring attention knows no
    plain formulas, and the numbers that its other kernels keep for the backward pass have other shapes.

    Args:
        tensors: whole on every rank that shares them; T is a multiple of 2 * ranks, or PyTorch would silently cut them
            in another way. position_ids are among them.
        ranks: N; 1 yields the tensors as they are.
    """
    if ranks == 1:
        yield dict(tensors)
        return
    assert "position_ids" in tensors and all(tensor.shape[1] % (2 * ranks) == 0 for tensor in tensors.values())
    mine = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    parts = list(mine.values())  # cut in place
    sharing = accelerator.maybe_context_parallel(
        buffers=parts, buffer_seq_dims=[1] * len(parts), no_restore_buffers=set(parts)
    )
    with sharing, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield mine
