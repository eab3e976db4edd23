"""Flags of `scaled-rope` inspect, repair, export, certify and plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from scaled_rope.checkpoint import check_local
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.files import check_writable
from scaled_rope.flags.shared import (
    check_folder,
    check_least,
    check_length,
    check_numbers_and_device,
    check_positive,
    parse_lengths,
)
from scaled_rope.recipes.files import read_recipe
from scaled_rope.scaling.resolve import check_spec

TARGETS = ("transformers", "vllm", "sglang", "llama.cpp", "mlx", "exllamav3", "ollama", "trl", "verl")
EXPORT_FILES = {"ollama": "Modelfile", "trl": "trl.yaml", "verl": "verl.yaml"}
"""The file that `scaled-rope export` writes beside config.json, by target."""
KV_DTYPES = ("auto", "bfloat16", "float16", "fp8")
PROTOCOLS = ("auto", "openai", "sglang", "llama.cpp")
H100_TFLOPS = 989.0
"""Dense bfloat16 rate of an H100 SXM in 10^12 FLOP/s."""


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope inspect`."""
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CONFIG", help="folder, config.json or hub name")
    add("--layer-type", metavar="TYPE", help="which layers, where layer types differ (default: full_attention)")
    add("--scaling", metavar="SPEC", help="report on the model under another scaling, e.g. yarn:8")
    add("--length", type=int, metavar="TOKENS", help="sequence length of the table, for length-dependent scalings")
    add("--full", action="store_true", help="show every dimension")
    add("--plot", metavar="FILE", help="draw wavelength against dimension; .svg or .png")
    add("--weights", action="store_true", help="load the model too, and check what it computes")
    add("--json", action="store_true", help="print a JSON object")


def check_inspect_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope inspect` cannot do."""
    check_length(args)
    if args.scaling is not None:
        check_spec(args.scaling)
    if args.model and not Path(args.model).is_file():  # any file, which `inspect` reads itself
        check_local(args.model)


def add_repair_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope repair`."""
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CONFIG", help="folder, config.json or hub name")
    add("--output", metavar="DIR", help="write the mended config.json there (default: only show what would change)")
    add("--assume", action="append", metavar="FIELD=VALUE", help="a choice between two readings; repeatable")
    add("--json", action="store_true", help="print a JSON object")


def check_repair_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope repair` cannot do, and an output that would replace a config."""
    parse_assumptions(args.assume)
    if args.model and not Path(args.model).is_file():  # any file, which `repair` reads itself
        check_local(args.model)
    if not args.output:
        return
    check_folder(args.output)
    folder = Path(args.output)
    if (folder / "config.json").exists():
        raise ConfigError(f"--output {folder} has a config.json; choose another folder")


def parse_assumptions(texts: list[str] | None) -> dict[str, str]:
    """The choices of --assume by field. Raises ConfigError for a text that is none, or two of a field."""
    chosen: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"--assume {text!r} is not allowed; write FIELD=VALUE")
        if chosen.get(name, value) != value:
            raise ConfigError(f"--assume {name} is given twice: {chosen[name]} and {value}")
        chosen[name] = value
    return chosen


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope export`."""
    add = parser.add_argument
    add("model", help="folder, its config.json, or hub name")
    add("--for", dest="target", required=True, metavar="TARGET", help=", ".join(TARGETS))
    add("--scaling", default="checkpoint", metavar="SPEC", help='default: what the checkpoint carries; e.g. "yarn:8"')
    add("--length", type=int, metavar="TOKENS", help="longest sequence to serve; default: factor times original length")
    add("--json", action="store_true", help="print a JSON object")
    add("--output", metavar="DIR", help="write the patched config.json there (with --gguf: the GGUF)")
    add("--force", action="store_true", help="replace what an earlier export has left in --output")
    add(
        "--gguf",
        metavar="FILE",
        help="llama.cpp, ollama: a GGUF of the model; a copy that holds the scaling goes to --output",
    )


def check_export_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope export` cannot do, and an output that would replace existing files."""
    if args.target not in TARGETS:
        raise unknown("target", args.target, TARGETS)
    check_length(args)
    if args.scaling is not None:
        check_spec(args.scaling)
    if args.gguf and (args.target not in ("llama.cpp", "ollama") or not args.output):
        raise ConfigError("flag --gguf goes with --for llama.cpp or ollama, and --output DIR")
    if args.force and not args.output:
        raise ConfigError("flag --force goes with --output DIR")
    path = Path(args.model)
    check_local(str(path.parent) if path.name == "config.json" and path.is_file() else args.model)
    if args.output:
        _check_export_output(Path(args.output), args.gguf, args.force, EXPORT_FILES.get(args.target))


def _check_export_output(folder: Path, gguf: str | None, force: bool, beside: str | None) -> None:
    """Refuse an output that would replace existing files.

    Raises:
        ConfigError: a file in the folder's place; without `force` a file that would be replaced; with it the GGUF that
            the copy is made from.
    """
    check_folder(folder)
    files = [folder / "config.json", *([] if gguf is None else [folder / Path(gguf).name])]
    if gguf is not None and files[1].exists() and Path(gguf).exists() and files[1].samefile(gguf):
        raise ConfigError(f"--output {folder} is not allowed with --gguf {gguf}, which it would overwrite")
    files += [] if beside is None else [folder / beside]
    there = next((file for file in files if file.exists()), None)
    if there is not None and not force:
        raise ConfigError(f"--output {folder} has a {there.name}; replace it with --force, or choose another folder")


def add_certify_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope certify`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub name of the model that is served, with its weights")
    add("--server", required=True, metavar="URL", help="as http://127.0.0.1:8000/v1; its key: OPENAI_API_KEY")
    add("--served-name", "--name", metavar="NAME", help="the model's name there (default: the only one)")
    add("--scaling", default="checkpoint", metavar="SPEC", help="what it is to run (default: what the checkpoint says)")
    add("--lengths", metavar="L1,L2,...", help="prompts in tokens (default: up to and around L, and to the target)")
    add("--text", metavar="FILE", help="text of the prompts (default: Python's own documentation)")
    add("--protocol", default="auto", metavar="NAME", help=f"{', '.join(PROTOCOLS)} (default: by what the server says)")
    add(
        "--dtype",
        default="auto",
        help="in which the server computes: float32, bfloat16 or float16 (default: found out)",
    )
    add("--server-timeout", type=float, default=600.0, metavar="S", help="seconds to wait for an answer (default 600)")
    add("--device", help="torch device of the reference (default: the first GPU, else cpu)")
    add("--html", metavar="FILE", help="write a page with the differences by position")
    add("--json", action="store_true", help="print a JSON object")


def check_certify_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope certify` cannot do, as far as the flags show it."""
    check_spec(args.scaling)
    if args.protocol not in PROTOCOLS:
        raise unknown("protocol", args.protocol, PROTOCOLS)
    check_positive(args, "server_timeout", 1e6, "seconds")
    if args.lengths is not None and (lengths := parse_lengths(args.lengths)) and min(lengths) < 2:
        raise ConfigError(f"--lengths {min(lengths)} is not allowed; at least 2 tokens")
    if args.text is not None and not Path(args.text).is_file():
        raise ConfigError(f"--text {args.text} is no file")
    check_numbers_and_device(args)
    if args.html is not None:
        if Path(args.html).is_dir():
            raise ConfigError(f"--html {args.html} is a folder; name a file")
        check_writable(args.html)
    check_local(args.model)


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope plan`."""
    add = parser.add_argument
    add("recipe", nargs="?", help="name in configs/ or path of a YAML file")
    add("--serve", metavar="MODEL", help="in place of a recipe: plan to serve this model (folder or hub name)")
    add("--scaling", default="checkpoint", metavar="SPEC", help="with --serve: default what the checkpoint carries")
    add("--length", type=int, metavar="TOKENS", help="with --serve: of a sequence (default: what the scaling is for)")
    add("--kv-dtype", default="auto", metavar="D", help=f"with --serve, of the cache: {', '.join(KV_DTYPES)}")
    add("--gpus", type=int, metavar="N", help="ranks (default 8; with --serve 1)")
    add("--gpu-memory", type=float, default=80.0, metavar="GB", help="of each (default %(default)s)")
    add("--peak-tflops", type=float, metavar="T",
        help=f"of a recipe: dense bf16 rate of one GPU (default {H100_TFLOPS}: H100 SXM)")  # fmt: skip
    add("--utilisation", type=float, metavar="SHARE", help="of a recipe: model FLOPs over peak (default 0.4)")
    add("--json", action="store_true", help="print a JSON object")


def check_plan_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope plan` cannot do."""
    if (args.recipe is None) == (args.serve is None):
        raise ConfigError("give a recipe, or --serve MODEL")
    if args.serve is None:
        args.gpus = 8 if args.gpus is None else args.gpus
        args.peak_tflops = H100_TFLOPS if args.peak_tflops is None else args.peak_tflops
        args.utilisation = 0.4 if args.utilisation is None else args.utilisation
        for name, default in (("scaling", "checkpoint"), ("length", None), ("kv_dtype", "auto")):
            if getattr(args, name) != default:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} goes with --serve")
    else:
        for name in ("peak_tflops", "utilisation"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name):g} goes with a recipe")
    check_least(args, gpus=1)
    check_positive(args, "gpu_memory", 1e6, "GB")
    check_positive(args, "peak_tflops", 1e9, "TFLOP/s")
    if args.utilisation is not None and not 0 < args.utilisation <= 1:
        raise ConfigError(f"--utilisation {args.utilisation} is not allowed; above 0, at most 1")
    if args.serve is None:
        read_recipe(args.recipe)
        return
    check_length(args)
    check_spec(args.scaling)
    if args.kv_dtype not in KV_DTYPES:
        raise unknown("kv-dtype", args.kv_dtype, KV_DTYPES)
    check_local(args.serve)
