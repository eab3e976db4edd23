"""The arguments of lm-eval's model type "scaled-rope": which are refused, and what lm-eval's own words mean here.

Needs no lm-eval: what its "hf" model takes is handed in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from scaled_rope.checkpoint import check_local, reading
from scaled_rope.errors import ConfigError, is_positive_whole, suggestion
from scaled_rope.patching.device_maps import Placement
from scaled_rope.scaling.hf_config import text_config

_SAFETENSORS = "weights are read from safetensors files only"

NOT_HERE = {
    "softmax_dtype": "log-probabilities are computed in float32",
    "mixed_precision_dtype": "the whole model has one dtype, see dtype",
    "logits_cache": "equal inputs share a forward pass in any case",
    "max_batch_size": "batch_size=auto is about 16k tokens' worth; or give a number",
    "use_fast_tokenizer": "transformers chooses",
    "delta": "add the weights first",
    "autogptq": _SAFETENSORS,
    "gptqmodel": _SAFETENSORS,
    "gguf_file": _SAFETENSORS,
    "tp_plan": "layers are split over devices by parallelize, not within",
}
"""Arguments of lm-eval's "hf" that are allowed at their defaults only, and why."""

_DOWNLOADED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
"""The files of a hub repository that a checkpoint and its tokenizer consist of."""


def refuse_unknown(more: Mapping[str, Any], known: Iterable[str], defaults: Mapping[str, Any]) -> None:
    """Refuse arguments that have no effect.

    Args:
        more: the arguments besides `known`, with their values.
        known: the names of those that have an effect.
        defaults: the defaults of lm-eval's "hf".

    Raises:
        ConfigError: a name that is not known, with the nearest ones; or one of `NOT_HERE` with another value than
            lm-eval's default.
    """
    names = sorted(known)
    for name, value in more.items():
        if name in NOT_HERE and (value is None or (name in defaults and value == defaults[name])):
            continue
        if name in NOT_HERE:
            raise ConfigError(f"model argument {name}={value!r} has no effect under scaled-rope: {NOT_HERE[name]}")
        raise ConfigError(
            f"unknown model argument {name}={value!r}; {suggestion(name, names)}known: {', '.join(names)}"
        )


def one_of_two(ours: str, value: Any, theirs: str, other: Any, default: Any = None) -> Any:
    """The value of an argument that has two names.

    Raises:
        ConfigError: both names are given, with different values.
    """
    if other is None or other == value:
        return value
    if value != default:
        raise ConfigError(f"model arguments {ours}={value!r} and {theirs}={other!r} mean the same; give one of them")
    return other


def check_backend(backend: str) -> None:
    """Raise a ConfigError for a kind of model that has no scaling."""
    if backend not in ("default", "causal"):
        raise ConfigError(f"model argument backend={backend!r}: must be 'default' or 'causal'")


def placement_of(
    parallelize: Any, max_memory_per_gpu: Any = None, max_cpu_memory: Any = None, offload_folder: str | None = None
) -> Placement | None:
    """How a model is split over devices, as lm-eval's "hf" splits it; None: it is not.

    Args:
        parallelize: whether it is. On a machine with one GPU or none that takes a limit of memory.
        max_memory_per_gpu, max_cpu_memory: size, such as "20GiB". Without the latter nothing is left to the CPU where
            there are GPUs.
        offload_folder: folder for weights that fit nowhere else.

    Raises:
        ConfigError: a limit without `parallelize`; several processes, which would share the GPUs.
    """
    limits = {"max_memory_per_gpu": max_memory_per_gpu, "max_cpu_memory": max_cpu_memory}
    given = {name: value for name, value in limits.items() if value is not None}
    if not parallelize:
        for name, value in given.items():
            raise ConfigError(f"model argument {name}={value!r}: goes with parallelize=True")
        return None
    gpus = torch.cuda.device_count()
    if (count := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(f"model argument parallelize={parallelize!r}: is for one process, not {count}")
    if gpus < 2 and not given:
        return None
    memory: dict[int | str, str] | None = None
    if max_memory_per_gpu is not None:
        memory = {gpu: str(max_memory_per_gpu) for gpu in range(gpus)}
    elif gpus:
        memory = {gpu: str(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(gpus)}
    if max_cpu_memory is not None:
        memory = {**(memory or {}), "cpu": str(max_cpu_memory)}
    return Placement("auto", memory, offload_folder)


def rows_per_pass(batch_size: Any) -> int | None:
    """Sequences per forward pass; None for "auto", also with the number of trials that lm-eval allows behind it.

    Raises:
        ConfigError: neither a number of at least 1 nor "auto".
    """
    text = "auto" if batch_size is None else str(batch_size)
    if text.partition(":")[0] == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"model argument batch_size={batch_size!r}: must be a number of at least 1, or 'auto'")
    return int(text)


def longest_prompt(max_length: Any, default: int) -> int:
    """The longest prompt in tokens; `default` for None.

    Raises:
        ConfigError: no whole number of at least 2.
    """
    if max_length is None:
        return default
    if not is_positive_whole(max_length) or max_length < 2:
        raise ConfigError(f"model argument max_length={max_length!r}: must be a whole number of at least 2 tokens")
    return int(max_length)


def dtype_name(dtype: Any, config: Any) -> str:
    """The name of a dtype; "auto" is that in the checkpoint's config, as for lm-eval's "hf", or else float32."""
    if dtype is None or dtype == "auto":
        dtype = getattr(text_config(config), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    return str(dtype).removeprefix("torch.")


def at_revision(name: str, revision: str | None, subfolder: str = "") -> str:
    """The folder of a model of the hub at a revision, which is downloaded if need be; its name for "main".

    Args:
        name: folder or hub name.
        revision: branch, tag or commit of a hub repository.
        subfolder: the folder inside of it.

    Raises:
        ConfigError: a folder of this disk at a revision; a revision or a subfolder that does not exist.
    """
    revision = "main" if revision is None else str(revision)
    if Path(name).is_dir():
        if revision != "main":
            raise ConfigError(f"model argument revision={revision!r}: {name!r} is a folder, which has no revisions")
        return _inside(Path(name), subfolder) if subfolder else name
    if revision == "main" and not subfolder:
        return name
    check_local(name)
    import huggingface_hub

    with reading("model", name):
        folder = huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_patterns(subfolder))
    return _inside(Path(folder), subfolder) if subfolder else folder


def _patterns(subfolder: str) -> list[str]:
    return [f"{subfolder}/{pattern}" for pattern in _DOWNLOADED] if subfolder else _DOWNLOADED


def _inside(folder: Path, subfolder: str) -> str:
    if not (folder / subfolder).is_dir():
        raise ConfigError(f"model argument subfolder={subfolder!r}: there is no such folder in {str(folder)!r}")
    return str(folder / subfolder)
