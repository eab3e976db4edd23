"""Flags that several commands have, and the checks of numbers, names, devices and folders."""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Callable
from pathlib import Path

from scaled_rope.errors import ConfigError, unknown
from scaled_rope.provenance import package_version

# Names that belong to modules which import torch; `tests/flags/test_flags.py` holds the two to each other.
ATTENTIONS = (
    "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "sdpa_blocked", "blockwise",
    "flex_attention", "eager",
)  # fmt: skip
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
KERNELS = ("auto", "torch", "triton", "none")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = ("fp32", "bf16", "fp16", "half")
_GPU_FILES = ("/dev/nvidia*", "/dev/nvgpu*", "/dev/nvhost*", "/dev/dxg", "/dev/kfd")
"""Device files, one of which is there where torch can find a GPU on Linux: of NVIDIA's drivers (the second and third on
Jetson boards), of Windows' subsystem for Linux, and of AMD's driver, whose GPUs torch calls "cuda" too."""


def check_numbers_and_device(args: argparse.Namespace) -> None:
    """Refuse an unknown dtype, and a GPU where there is none; a device that is there is for torch to judge.

    Raises:
        ConfigError: either of these.
    """
    if args.dtype not in (*DTYPES, *DTYPE_ALIASES):
        raise unknown("dtype", args.dtype, DTYPES)
    if args.device is None or args.device.partition(":")[0] != "cuda":
        return
    version = package_version("torch") or ""
    if version.endswith("+cpu"):
        raise ConfigError(f"device {args.device!r} cannot be used: torch {version} is built without CUDA")
    if sys.platform == "linux" and not any(glob.glob(pattern) for pattern in _GPU_FILES):
        raise ConfigError(f"device {args.device!r} cannot be used: there is no GPU here ({', '.join(_GPU_FILES)})")


def check_loading(args: argparse.Namespace) -> None:
    """Refuse what no model can be loaded with: an attention implementation, dtype, GPU or adapter that is not there.

    Raises:
        ConfigError: one of these.
    """
    if args.attention not in ATTENTIONS:
        raise unknown("attention", args.attention, ATTENTIONS)
    check_numbers_and_device(args)
    if args.adapter and not (Path(args.adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {args.adapter!r} holds no adapter_config.json")


class Unsaid(str):
    """The type of a default, which tells it apart from the same word given by the user."""


def said(word: str) -> str | None:
    """The value of a flag whose default is `Unsaid`; None where it was not given."""
    return None if isinstance(word, Unsaid) else word


def parse_lengths(text: str) -> list[int]:
    """The numbers of a --lengths flag, as they stand. Raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--lengths {text!r} is not allowed; whole numbers, separated by commas") from None


def check_length(args: argparse.Namespace) -> None:
    if args.length is not None and not 1 <= args.length < 2**31:
        raise ConfigError(f"--length {args.length} is not allowed; at least 1 token, below 2^31")


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Refuse a number that is below the least one of its flag; flags that were not given are left out.

    Raises:
        ConfigError: such a number.
    """
    for name, number in least.items():
        if (value := getattr(args, name)) is not None and value < number:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is not allowed; at least {number}")


def check_folder(path: str | Path, flag: str = "--output") -> None:
    """Refuse a file in the place of the folder that a flag names.

    Raises:
        ConfigError: there is one.
    """
    if Path(path).exists() and not Path(path).is_dir():
        raise ConfigError(f"{flag} {path} is a file; name a folder")


def check_positive(args: argparse.Namespace, name: str, most: float, unit: str) -> None:
    """Refuse a flag's number that is not above 0 and at most `most`; infinity and NaN are not."""
    if (value := getattr(args, name)) is not None and not 0 < value <= most:
        raise ConfigError(f"--{name.replace('_', '-')} {value:g} is not allowed; above 0, at most {most:g} {unit}")


def add_loading_arguments(add: Callable[..., object]) -> None:
    """The flags with which `scaled-rope tune`, `search` and `advise` load a model."""
    add("--original-max-position-embeddings", type=int, metavar="N", help="trained context, if the checkpoint is wrong")
    add("--dtype", default="auto", help="float32, bfloat16, float16 or auto (bfloat16 on a GPU)")
    add("--device", help="torch device (default: the first GPU, else cpu)")
    add("--attention", default="auto", help=f"one of: {', '.join(ATTENTIONS)}")
    add("--adapter", metavar="PATH", help="LoRA adapter, merged into the weights")
