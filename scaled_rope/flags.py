"""Flags of the evaluators and of `scaled-rope`, and the checks that need nothing but the flags.

Nothing here imports torch or transformers, which takes seconds: a mistyped flag or path is reported at once.

Knows nothing of torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from scaled_rope.checkpoint import check_local
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.recipes import read_recipe
from scaled_rope.results import check_writable, package_version, portable_model
from scaled_rope.scaling.record import check_spec
from scaled_rope.scaling.registry import METHODS
from scaled_rope.scaling.spec import Spec
from scaled_rope.texts.corpora import CORPORA, STANDIN
from scaled_rope.texts.documents import (
    PACKED_FILE,
    SAVED_FILES,
    check_feature,
    check_split,
    check_there,
    expanded,
    suffix_of,
)
from scaled_rope.texts.token_documents import TokenSource, is_tokenized

# Names that belong to modules which import torch; `tests/test_flags.py` holds the two to each other.
ATTENTIONS = (
    "auto", "flash_attention_2", "flash_attention_3", "flash_attention_4", "sdpa", "sdpa_blocked", "blockwise",
    "flex_attention", "eager",
)  # fmt: skip
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
KERNELS = ("auto", "torch", "triton", "none")
TARGETS = ("transformers", "vllm", "sglang", "llama.cpp", "mlx", "exllamav3", "ollama", "trl", "verl")
EXPORT_FILES = {"ollama": "Modelfile", "trl": "trl.yaml", "verl": "verl.yaml"}
"""The file that `scaled-rope export` writes beside config.json, by target."""
KV_DTYPES = ("auto", "bfloat16", "float16", "fp8")
PROTOCOLS = ("auto", "openai", "sglang", "llama.cpp")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = ("fp32", "bf16", "fp16", "half")
H100_TFLOPS = 989.0
"""Dense bfloat16 rate of an H100 SXM in 10^12 FLOP/s."""


# -------------------------------------------------------------------------------------------------------- evaluators


# Released flags that no longer do anything, and why.
NO_EFFECT = {
    "--custom-model": "code is never taken from a checkpoint",
    "--custom-model-together": "code is never taken from a checkpoint",
    "--custom-model-mistral": "code is never taken from a checkpoint",
    "--gpt-neox-max-length": "positions are not limited by the configuration",
    "--max-position-embeddings": "positions are not limited by the configuration",
    "--no-use-cache": "evaluators keep no cache",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say which checkpoints to read and under which scalings, the released scripts' flags included."""
    group = parser.add_argument_group("models and scalings", "every model is read under every scaling")
    add = group.add_argument
    add("-m", "--model", action="append", metavar="NAME", help="directory or hub name; repeatable (default: embedded)")
    add(
        "--scaling",
        action="append",
        metavar="SPEC",
        help="[dynamic-]METHOD[:FACTOR][,FIELD=VALUE...], default (unscaled) or checkpoint[:FACTOR]; repeatable",
    )
    for method in ("yarn", "linear", "ntk", "part-ntk", "dynamic-ntk"):
        spec = f"{method}:{{}}".format
        add(f"--{method}", dest="scaling", action="append", type=spec, metavar="S", help=f"--scaling {method}:S")
    add(
        "--rerope",
        dest="scaling",
        action="append",
        type="rerope,window={}".format,
        metavar="W",
        help="window of ReRoPE",
    )
    for method in ("dynamic-linear", "dynamic-part-ntk", "dynamic-yarn"):
        add(f"--{method}", dest="scaling", action="append_const", const=method, help=f"--scaling {method}")
    add("--method", dest="scaling", action="append", metavar="NAME", help="--scaling NAME, with the flags that follow")
    add("--window", type=int, metavar="W", help="tokens seen at their own distance, of methods that have a window")
    add("--group", type=int, metavar="G", help="positions that count as one, of self-extend")
    add("--chunk", type=int, metavar="S", help="tokens per chunk, of dual-chunk")
    add("--k", type=float, metavar="K", help="tokens that count as one beyond the window, of leaky-rerope")
    add("--logn", action="store_const", const="true", help="log-length factor of queries, of rerope and leaky-rerope")
    add("--layers", metavar="TYPE", help="scale only the layers of this type (full_attention)")
    add("--drop-layers", type=_indices, metavar="I,J,...", help="layers, from 0, that work without rotary embedding")
    add("--factor", metavar="S", help="factor of every scaling that names none, the checkpoint's own included")
    add("--finetuned", action="store_true", help="dynamic scalings start from the checkpoint's own factor")
    add("--original-max-position-embeddings", type=int, metavar="N", help="trained context, if the checkpoint is wrong")
    add("--dtype", default="auto", help="float32, bfloat16, float16 or auto (bfloat16 on a GPU)")
    add("--device", help="torch device (default: the first GPU, else cpu; of several processes each has its own)")
    add(
        "--device-map",
        metavar="MAP",
        help=f"split models over GPUs, CPU and disk: {', '.join(DEVICE_MAPS)}, or a .json file of parts and devices",
    )
    add("--max-memory", metavar="D=SIZE,...", help="most memory for --device-map, as 0=20GiB,cpu=64GiB")
    add("--offload-folder", metavar="DIR", help="weights of --device-map that fit nowhere else")
    add("--attention", default="auto", help=f"one of: {', '.join(ATTENTIONS)}")
    add("--flash-attention", dest="attention", action="store_const", const="flash_attention_2", help=argparse.SUPPRESS)
    add("--kernel", default="auto", help=f"rotary kernel, one of: {', '.join(KERNELS)}")
    add("--sliding-window-attention", type=int, metavar="N", help="attention window in tokens, where a model has one")
    add("--adapter", metavar="PATH", help="LoRA adapter, merged into the weights")
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--load-in-8bit", action="store_true")
    bits.add_argument("--load-in-4bit", action="store_true")
    for flag in NO_EFFECT:
        takes_value = flag.endswith(("length", "embeddings"))
        add(flag, dest="no_effect", nargs=1 if takes_value else 0, action=_Remember, help=argparse.SUPPRESS)


def check_model_arguments(args: argparse.Namespace) -> None:
    """Refuse mistakes in an evaluator's flags that show in names and paths alone."""
    for name in args.model or ():
        check_local(name)
    _check_recorded("-m", args.model or (), portable_model, "folder")
    for spec in requested_specs(args):
        check_spec(spec)
    if args.device_map is not None and not args.device_map.endswith(".json") and args.device_map not in DEVICE_MAPS:
        raise unknown("device-map", args.device_map, [*DEVICE_MAPS, "a .json file"])
    if args.kernel not in KERNELS:
        raise unknown("kernel", args.kernel, KERNELS)
    check_loading(args)
    if (output := getattr(args, "output", None)) is not None and Path(output).is_dir():
        raise ConfigError(f"--output {output} is a folder; name a file for the rows")
    for name in ("output", "output_file", "heatmap"):
        if (path := getattr(args, name, None)) is not None:
            check_writable(path)


def _check_recorded(flag: str, names: Sequence[str], recorded: Callable[[str], str], what: str) -> None:
    """Refuse two names of one flag that rows would record alike: reports took one for a newer state of the other.

    Args:
        recorded: what rows record of a name.
        what: what can be renamed.

    Raises:
        ConfigError: two such names.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(recorded(name), name)
        if other != name and os.path.realpath(other) != os.path.realpath(name):
            raise ConfigError(
                f"{flag} {other} and {flag} {name} are both recorded as {recorded(name)!r}; rename a {what}"
            )


_GPU_FILES = ("/dev/nvidia*", "/dev/nvgpu*", "/dev/nvhost*", "/dev/dxg", "/dev/kfd")
"""Device files, one of which is there where torch can find a GPU on Linux: of NVIDIA's drivers (the second and third on
Jetson boards), of Windows' subsystem for Linux, and of AMD's driver, whose GPUs torch calls "cuda" too."""


def _check_numbers_and_device(args: argparse.Namespace) -> None:
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
    _check_numbers_and_device(args)
    if args.adapter and not (Path(args.adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter {args.adapter!r} holds no adapter_config.json")


PARAMETERS = ("window", "group", "chunk", "k", "logn")
"""Parameters of methods that have flags of their own."""


def requested_specs(args: argparse.Namespace) -> list[str]:
    """The scalings that the flags ask for, with `--factor`, `--finetuned` and parameters written into them.

    Raises:
        ConfigError: a text that is no scaling; one of these flags where it is for none of the scalings.
    """
    specs = []
    unused = {name for name in PARAMETERS if getattr(args, name) is not None}
    without_effect = {
        "factor": "a scaling that takes a factor and names none, none of these does",
        "finetuned": "a dynamic scaling that names no factor, none of these is one",
    }
    without_effect = {name: why for name, why in without_effect.items() if getattr(args, name)}
    for text in args.scaling or ["checkpoint"]:
        spec = Spec.parse(text)
        if spec.factor is None and spec.method not in ("default", "none"):
            without_effect.pop("factor", None)
            if spec.method.startswith("dynamic-"):  # it starts from the factor, as --finetuned says, also from --factor
                without_effect.pop("finetuned", None)
            if args.factor is not None:
                spec = replace(spec, factor=args.factor)
            elif args.finetuned and spec.method.startswith("dynamic-"):
                spec = replace(spec, factor="checkpoint")
        row = METHODS.get(spec.method)
        for name in (f.name for f in dataclasses.fields(row.params_type)) if row and row.params_type else ():
            if name in PARAMETERS and name not in dict(spec.fields) and getattr(args, name) is not None:
                spec = replace(spec, fields=(*spec.fields, (name, str(getattr(args, name)))))
                unused.discard(name)
        specs.append(str(spec))
    if unused:
        raise ConfigError(f"flag --{min(unused)}: is for a scaling that takes {min(unused)}, none of these does")
    for name, why in without_effect.items():
        raise ConfigError(f"flag --{name}: is for {why}")
    return list(dict.fromkeys(specs))


class _Remember(argparse.Action):
    """Collect the names of the flags that were given, whatever their values."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), option])


def _indices(text: str) -> list[int]:
    """Layers' indices from the command line."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{text!r} is not allowed; indices of layers, as 3,7") from None


class Unsaid(str):
    """The type of a default, which tells it apart from the same word given by the user."""


def said(word: str) -> str | None:
    """The value of a flag whose default is `Unsaid`; None where it was not given."""
    return None if isinstance(word, Unsaid) else word


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for the documents that perplexities are measured on."""
    add = parser.add_argument_group("text").add_argument
    add("-d", "--dataset", action="append", type=expanded, metavar="NAME",
        help="texts, or a packed set (see above); repeatable")  # fmt: skip
    add("--tokenized", action="append", type=expanded, metavar="NAME",
        help="a tokenized set (column input_ids); repeatable")  # fmt: skip
    add("-s", "--subset", metavar="NAME", help="configuration of a hub dataset")
    add("-f", "--feature", default="text", help="field that holds the text (default %(default)s)")
    add("--split", default=Unsaid("test"), help="split of a hub dataset, or a saved one (default %(default)s)")
    add("--dataset-min-tokens", type=int, metavar="N", help="documents must have N tokens")
    add("--samples", type=int, metavar="N", help="the first N documents that are long enough (default: all)")
    add("--windows", type=int, metavar="N", help="truncate N windows per document, evenly spaced (default: its start)")
    add("--prefill-chunk", type=int, metavar="N", help="positions that go through the model at once (default: all)")


def check_text_arguments(args: argparse.Namespace) -> None:
    """Refuse mistakes in the flags of `add_text_arguments` that show in names and numbers alone.

    Raises:
        ConfigError: such a mistake, a split beside files of others, a field of texts that have none, an output that is
            one of the texts, or two texts that rows would record under one name.
    """
    if bool(args.dataset) == bool(args.tokenized):
        raise ConfigError("give either --dataset or --tokenized")
    check_least(args, samples=1, windows=1, dataset_min_tokens=1, prefill_chunk=1)
    for name in args.dataset or ():
        check_there(name)
    for name in args.dataset or args.tokenized:
        check_split(name, said(args.split))
    check_feature(args.dataset or args.tokenized, args.feature, tokenized=bool(args.tokenized))
    check_output_apart(args, [*(args.dataset or ()), *(args.tokenized or ())])
    for flag, names in (("-d", args.dataset), ("--tokenized", args.tokenized)):
        _check_recorded(flag, names or (), lambda name: TokenSource(name).title, "file or folder")


def check_output_apart(args: argparse.Namespace, texts: Sequence[str]) -> None:
    """Refuse an output that is one of the texts that are read, or would be read as a file of one that is a folder.

    Raises:
        ConfigError: such an output, which would be written over or into the text.
    """
    for flag in ("output", "output_file"):
        path = getattr(args, flag, None)
        if path is None:
            continue
        place = Path(os.path.realpath(path))
        for text in texts:
            read = Path(os.path.realpath(text))
            if place == read or (read.is_dir() and place.is_relative_to(read) and _is_read(place, read)):
                raise ConfigError(f"--{flag.replace('_', '-')} {path} is of dataset {text}; name another file")


def _is_read(place: Path, folder: Path) -> bool:
    """Whether a file belongs, by its name, to what is read of a folder of texts or of tokens."""
    if is_tokenized(str(folder)):
        of_tokens = place.suffix in (".bin", ".arrow") or place.name in (PACKED_FILE, *SAVED_FILES, "state.json")
        return of_tokens and place.exists()
    hidden = any(part.startswith(".") for part in place.relative_to(folder).parts)
    return bool(suffix_of(place)) and not hidden


def check_losses_folder(path: str | None) -> None:
    """Refuse a `--save-nll` in which no file can be made.

    Raises:
        ConfigError: it is a file, or a place where no folder can be made.
    """
    if path is None:
        return
    check_folder(path, "--save-nll")
    if not Path(path).exists():
        check_writable(path)


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for context lengths, output and progress."""
    add = parser.add_argument_group("lengths and output").add_argument
    add("--lengths", metavar="L1,L2,...", help="context lengths in tokens, instead of the next three")
    add("--min-tokens", type=int, default=256, metavar="N", help="shortest context (default %(default)s)")
    add("--max-tokens", type=int, default=8192, metavar="N", help="longest context (default %(default)s)")
    add("--tokens-step", type=int, metavar="N", help="distance between contexts (default: each doubles the one before)")
    add("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: about 16k tokens' worth)")
    add("--output", default="out/eval/rows.jsonl", metavar="FILE", help="rows are appended here (default %(default)s)")
    add("--retry-oom", action="store_true", help="measure again what did not fit into memory in an earlier run")
    add("--output-file", metavar="CSV", help="also write a table: a line of lengths, then a line per model")
    add("--hide-progress", action="store_true")


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of evaluators that can ask a server."""
    group = parser.add_argument_group("a model behind a server", "-m has its config and tokenizer")
    add = group.add_argument
    add("--server", metavar="URL", help="completions API to ask, as http://host:8000/v1; its key: OPENAI_API_KEY")
    add("--served-name", metavar="NAME", help="the model's name there (default: the only one)")
    add("--server-timeout", type=float, metavar="S", help="seconds to wait for an answer (default: 600)")


_OF_THE_SERVER = ("scaling", "layers", "drop_layers", "factor", "device", "device_map", "adapter", "load_in_8bit",
                  "load_in_4bit", "sliding_window_attention", "prefill_chunk", "shared_prefill",
                  "uncached")  # fmt: skip


def check_server_arguments(args: argparse.Namespace) -> None:
    """Refuse flags that do not go with the server that is named, or with none.

    Raises:
        ConfigError: such a flag.
    """
    if args.server is None:
        for name in ("served_name", "server_timeout"):
            if getattr(args, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} goes with --server")
        return
    _check_positive(args, "server_timeout", 1e6, "seconds")
    if len(args.model or ()) != 1:
        raise ConfigError(f"--server {args.server} takes one -m, with the config and tokenizer of its model")
    unlike = {"dtype": "auto", "attention": "auto", "kernel": "auto"}
    for name in (*_OF_THE_SERVER, *unlike):
        value = getattr(args, name, None)
        if value not in (None, False, unlike.get(name)):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with --server, which decides that by itself")
    if getattr(args, "restrict_tokens", False):
        raise ConfigError("--restrict-tokens cannot be asked of a server; say --restrict-tokens false with --server")


def parse_lengths(text: str) -> list[int]:
    """The numbers of a --lengths flag, as they stand. Raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--lengths {text!r} is not allowed; whole numbers, separated by commas") from None


def context_lengths(args: argparse.Namespace) -> list[int]:
    """The context lengths that the flags ask for, ascending.

    Raises:
        ConfigError: not whole numbers of at least 2 tokens, or an empty range.
    """
    check_least(args, batch_size=1)
    if args.lengths is not None:
        lengths = sorted(set(parse_lengths(args.lengths)))
    else:
        low, high, step = args.min_tokens, args.max_tokens, args.tokens_step
        if low > high or low < 2:
            raise ConfigError(
                f"--min-tokens {low} with --max-tokens {high} is not allowed; 2 <= min-tokens <= max-tokens"
            )
        check_least(args, tokens_step=1)
        if step is None:
            lengths = [low << doublings for doublings in range((high // low).bit_length())]
            lengths = sorted({*lengths, high})
        else:
            lengths = list(range(low, high + 1, step))
    if lengths[0] < 2:
        raise ConfigError(
            f"--lengths {lengths[0]} is not allowed; at least 2 tokens, the first of which has no context"
        )
    return lengths


def batch_size(args: argparse.Namespace, length: int) -> int:
    """Sequences per forward pass of `length` tokens."""
    return int(args.batch_size) if args.batch_size else max(1, 16384 // length)


# ------------------------------------------------------------------------------------------------------- scaled-rope


def _check_length(args: argparse.Namespace) -> None:
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


def _check_positive(args: argparse.Namespace, name: str, most: float, unit: str) -> None:
    """Refuse a flag's number that is not above 0 and at most `most`; infinity and NaN are not."""
    if (value := getattr(args, name)) is not None and not 0 < value <= most:
        raise ConfigError(f"--{name.replace('_', '-')} {value:g} is not allowed; above 0, at most {most:g} {unit}")


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
    _check_length(args)
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
    _check_length(args)
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
    _check_positive(args, "server_timeout", 1e6, "seconds")
    if args.lengths is not None and (lengths := parse_lengths(args.lengths)) and min(lengths) < 2:
        raise ConfigError(f"--lengths {min(lengths)} is not allowed; at least 2 tokens")
    if args.text is not None and not Path(args.text).is_file():
        raise ConfigError(f"--text {args.text} is no file")
    _check_numbers_and_device(args)
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
    _check_positive(args, "gpu_memory", 1e6, "GB")
    _check_positive(args, "peak_tflops", 1e9, "TFLOP/s")
    if args.utilisation is not None and not 0 < args.utilisation <= 1:
        raise ConfigError(f"--utilisation {args.utilisation} is not allowed; above 0, at most 1")
    if args.serve is None:
        read_recipe(args.recipe)
        return
    _check_length(args)
    check_spec(args.scaling)
    if args.kv_dtype not in KV_DTYPES:
        raise unknown("kv-dtype", args.kv_dtype, KV_DTYPES)
    check_local(args.serve)


_LARGEST_GRID = 200


def parse_grid(text: str, name: str = "grid", least: int = 1, zero: bool = False) -> tuple[float, ...]:
    """Read "1.0:1.5:0.05" (start, end, step; the end included) or "1,1.1,1.25": positive numbers, ascending.

    Args:
        name: the name of the grid in error messages.
        least: the least number of different values.
        zero: whether 0 is allowed, as a value and not as a step.

    Raises:
        ConfigError: not numbers, not positive, an empty or endless range, too few values.
    """
    form = "START:END:STEP or numbers separated by commas"
    try:
        numbers = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        raise ConfigError(f"{name} {text!r} is not allowed; {form}") from None
    if not all(math.isfinite(number) and (number > 0 or (zero and number == 0)) for number in numbers):
        raise ConfigError(f"{name} {text!r} is not allowed; finite numbers {'at least' if zero else 'above'} 0")
    if ":" in text:
        if len(numbers) != 3 or numbers[1] < numbers[0] or numbers[2] == 0:
            raise ConfigError(f"{name} {text!r} is not allowed; {form}, START at most END")
        start, end, step = numbers
        count = math.floor((end - start) / step + 1e-9) + 1  # 1e-9: 0.5 / 0.05 is 9.999…
        if count > _LARGEST_GRID:
            raise ConfigError(f"{name} {text!r} is not allowed; {count} values, at most {_LARGEST_GRID}")
        numbers = [round(start + index * step, 10) for index in range(count)]
    values = tuple(sorted(set(numbers)))
    if len(values) < least:
        raise ConfigError(f"{name} {text!r} is not allowed; at least {least} different values")
    return values


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope tune`."""
    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", metavar="NAME", help="directory or hub name (default: embedded)")
    _add_loading_arguments(add)
    add = parser.add_argument_group("text").add_argument
    add("-d", "--dataset", type=expanded, metavar="PATH",
        help="file of text, JSON or Parquet, folder, hub name, packed set or corpus")  # fmt: skip
    _add_text_fields(add)
    add("--windows", type=int, default=1, metavar="N", help="windows per document, evenly spaced (default: its start)")
    add = parser.add_argument_group("search").add_argument
    add("--constants", action="store_true",
        help="search beta_fast, beta_slow and √(1/t) together, by loss and retrieval: try this first")  # fmt: skip
    add("--slope", metavar="METHOD",
        help="search the slope of this method's attention temperature in place of √(1/t)")  # fmt: skip
    add("--temperature", metavar="KIND", help="the temperature whose slope --slope searches (default constant)")
    add("--factors", metavar="S1,S2,...", help="factors s (default 2,4,8; with --constants 8)")
    add("--grid", metavar="GRID",
        help="√(1/t): START:END:STEP or a list (default 1.0:1.5:0.05; with --constants from s; "
        "with --slope slopes, 0:0.5:0.05)")  # fmt: skip
    add("--beta-fast", metavar="GRID", help="also search beta_fast, for example 16,32,64 (with --constants from L)")
    add("--beta-slow", metavar="GRID", help="also search beta_slow, for example 1,2 (with --constants from L)")
    add("--prompts", type=int, metavar="N",
        help="with --constants: prompts to ask at each length, 0 to go by loss alone (default 8)")  # fmt: skip
    add("--fields", metavar="F=V,...", help="what else to set in every scaling, for example ramp=rotations")
    add("--seed", type=int, default=0, help="of the bootstrap and of prompts (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="out/tune", metavar="DIR", help="rows, figures and best.json (default %(default)s)")
    add("--json", action="store_true", help="print best.json in place of the tables")
    add("--hide-progress", action="store_true")


def _add_loading_arguments(add: Callable[..., object]) -> None:
    """The flags with which `scaled-rope tune`, `search` and `advise` load a model."""
    add("--original-max-position-embeddings", type=int, metavar="N", help="trained context, if the checkpoint is wrong")
    add("--dtype", default="auto", help="float32, bfloat16, float16 or auto (bfloat16 on a GPU)")
    add("--device", help="torch device (default: the first GPU, else cpu)")
    add("--attention", default="auto", help=f"one of: {', '.join(ATTENTIONS)}")
    add("--adapter", metavar="PATH", help="LoRA adapter, merged into the weights")


def _add_text_fields(add: Callable[..., object]) -> None:
    """The flags of these commands that say which part of a data set is read."""
    add("-f", "--feature", default="text", help="field that holds the text (default %(default)s)")
    add("--split", default=Unsaid("test"), help="split of a hub dataset, or a saved one (default %(default)s)")
    add("--documents", type=int, metavar="N", help="the first N documents that are long enough (default: all)")


ADVICE_TEXT = "books"
"""The corpus that `scaled-rope advise` reads where no text is named."""


def _add_model_and_text(parser: argparse.ArgumentParser) -> Callable[..., argparse.Action]:
    """The model, the length and the text of a command that tries scalings without training; returns what adds to the
    group of the text."""
    add = parser.add_argument_group("model").add_argument
    add("model", metavar="MODEL", help="folder or hub name of a model with its weights")
    add("--target", type=int, required=True, metavar="N", help="the length to reach, in tokens")
    _add_loading_arguments(add)
    add = parser.add_argument_group("text").add_argument
    add("-d", "--dataset", default=ADVICE_TEXT, type=expanded, metavar="PATH",
        help="file of text, JSON or Parquet, folder, hub name, packed set or corpus (default %(default)s)")  # fmt: skip
    _add_text_fields(add)
    return add


def _check_text(args: argparse.Namespace) -> None:
    """Refuse a text that is not there, a split beside files of others, and a field of a text that has none."""
    check_there(args.dataset)
    is_corpus = args.dataset in CORPORA and not Path(args.dataset).exists()
    name = STANDIN + args.dataset if is_corpus else args.dataset
    check_split(name, said(args.split))
    check_feature([name], args.feature)


def _check_output_text_and_model(args: argparse.Namespace, file: str) -> None:
    """Refuse a folder in which `file` cannot be written, a text or a model that is not there."""
    check_folder(args.output)
    check_writable(Path(args.output) / file)
    _check_text(args)
    if args.model is not None:
        check_local(args.model)


def add_advise_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope advise`."""
    add = _add_model_and_text(parser)
    add("--windows", type=int, default=8, metavar="N",
        help="the most windows per document (default %(default)s)")  # fmt: skip
    add = parser.add_argument_group("search").add_argument
    add("--minutes", type=float, default=20.0, metavar="M", help="time to keep to (default %(default)g)")
    add("--scaling", action="append", metavar="SPEC", help="try this one as well, before the others; repeatable")
    add("--only", action="store_true", help="try those of --scaling and no others")
    add("--no-retrieval", action="store_true", help="go by perplexity alone")
    add("--seed", type=int, default=0, help="of windows and prompts (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="out/advice", metavar="DIR",
        help="rows, advice.json, advice.html and recipe.yaml (default %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print advice.json in place of the words")
    add("--hide-progress", action="store_true")


def check_advise_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope advise` cannot do, as far as numbers, names and paths show it."""
    check_least(args, target=2, documents=1, windows=1, seed=0)
    _check_positive(args, "minutes", 1e6, "minutes")
    check_loading(args)
    for spec in args.scaling or ():
        check_spec(spec)
    if args.only and not args.scaling:
        raise ConfigError("--only is not allowed without --scaling, which names what to try")
    _check_output_text_and_model(args, "rows.jsonl")


SEARCH_STRATEGIES = ("evolution", "cma-es", "coordinate", "grid")
"""Ways in which `scaled-rope search` searches; the first is LongRoPE's."""
FITNESSES = ("both", "perplexity", "needles")
WITHIN = ("unscaled", "same")


EVOLUTION: dict[str, float] = {
    "population": 64, "rounds": 40, "mutants": 16, "crossed": 16, "parents": 32, "mutation_rate": 0.3,
}  # fmt: skip
"""Numbers of evolution, the first strategy of `scaled-rope search`, by default."""
SEARCH_PROMPTS = 3
"""Prompts per length of `scaled-rope search`, by default."""


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `scaled-rope search`."""
    add = _add_model_and_text(parser)
    add("--windows", type=int, default=5, metavar="N", help="windows that a candidate reads (default %(default)s)")
    add("--prompts", type=int, metavar="N",
        help=f"hidden facts that it is asked for at each length beyond L (default {SEARCH_PROMPTS})")  # fmt: skip
    add("--held-back", type=int, default=4, metavar="N",
        help="windows, and prompts per length, that only judge the best (default %(default)s)")  # fmt: skip
    add = parser.add_argument_group("search").add_argument
    add("--strategy", default=SEARCH_STRATEGIES[0], metavar="NAME",
        help="evolution (LongRoPE's, of divisors), or of YaRN's few numbers cma-es, coordinate or grid")  # fmt: skip
    add("--fitness", default=FITNESSES[0], metavar="NAME",
        help="perplexity (loss beyond L), needles (loss of answers) or both, their sum (default)")  # fmt: skip
    add("--evaluations", type=int, metavar="N", help="the most candidates (default: as many as evolution has, 1344)")
    add("--start", action="append", metavar="SPEC",
        help="evolution begins with its divisors too, besides PI, NTK and YaRN; repeatable")  # fmt: skip
    add("--attention-factor", default="longrope", metavar="F",
        help="of evolution's candidates: longrope (√(1 + ln s / ln L)), a number, or search")  # fmt: skip
    add("--within", default=WITHIN[0], metavar="NAME",
        help="texts of up to L tokens are read unscaled (default), or with the same divisors")  # fmt: skip
    for name, said in (
        ("population", "candidates of the first round"),
        ("rounds", "rounds after the first"),
        ("mutants", "mutants per round"),
        ("crossed", "crossed candidates per round"),
        ("parents", "the best so far, from which these are made"),
    ):
        add(f"--{name}", type=int, default=EVOLUTION[name], metavar="N",
            help=f"evolution: {said} (default %(default)s)")  # fmt: skip
    add("--mutation-rate", type=float, default=EVOLUTION["mutation_rate"], metavar="P",
        help="evolution: probability that a mutant's divisor is drawn anew (default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the search, its windows and prompts (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--output", default="out/search", metavar="DIR",
        help="trace.jsonl, best.json and pictures (default %(default)s)")  # fmt: skip
    add("--json", action="store_true", help="print best.json in place of the tables")
    add("--hide-progress", action="store_true")


def search_attention(text: str) -> float | None:
    """The attention factor that `--attention-factor` gives by number; None for a name.

    Raises:
        ConfigError: neither a number above 0 nor a name.
    """
    if text in ("longrope", "search"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"--attention-factor {text} is not allowed; longrope, search or a number above 0")
    return value


def search_prompts(args: argparse.Namespace) -> int:
    """The prompts of each length that a candidate of `scaled-rope search` is asked: 0 where it goes by loss alone."""
    if args.fitness == "perplexity":
        return 0
    return SEARCH_PROMPTS if args.prompts is None else int(args.prompts)


def check_search_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope search` cannot do, as far as numbers, names and paths show it."""
    check_least(args, target=2, documents=1, windows=0, prompts=0, held_back=0, evaluations=1, seed=0)
    check_least(args, population=2, rounds=0, mutants=0, crossed=0, parents=1)
    if args.strategy not in SEARCH_STRATEGIES:
        raise unknown("strategy", args.strategy, SEARCH_STRATEGIES)
    if args.fitness not in FITNESSES:
        raise unknown("fitness", args.fitness, FITNESSES)
    if args.within not in WITHIN:
        raise unknown("within", args.within, WITHIN)
    if args.windows == 0 and args.fitness != "needles":
        raise ConfigError(f"--windows 0 is not allowed with --fitness {args.fitness}; at least 1")
    if args.fitness == "perplexity" and args.prompts not in (None, 0):
        raise ConfigError(f"--prompts {args.prompts} is not allowed with --fitness perplexity, which asks none")
    if args.prompts == 0 and args.fitness != "perplexity":
        raise ConfigError(f"--prompts 0 is not allowed with --fitness {args.fitness}; at least 1")
    if not 0 < args.mutation_rate <= 1:
        raise ConfigError(f"--mutation-rate {args.mutation_rate:g} is not allowed; above 0, at most 1")
    search_attention(args.attention_factor)
    if args.strategy != SEARCH_STRATEGIES[0]:
        for name, usual in (("start", None), ("attention_factor", "longrope"), *EVOLUTION.items()):
            if getattr(args, name) != usual:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is not allowed with --strategy {args.strategy}: it is for evolution"
                )
    for spec in args.start or ():
        check_spec(spec)
    check_loading(args)
    _check_output_text_and_model(args, "trace.jsonl")


TUNED = ("attention_factor", "mscale", "factor", "dynamic")
"""Fields of a scaling that `scaled-rope tune` sets itself."""
LEAST_TRIALS = 3
"""The least windows, and prompts per length, of a search for constants: one to search, two to judge."""


def tune_specs(args: argparse.Namespace) -> list[str]:
    """The scaling that the search begins with, for each factor.

    Raises:
        ConfigError: factors that are no positive numbers, or fields that the search sets itself.
    """
    fields = f",{args.fields}" if args.fields else ""
    if args.slope is not None:
        return _slope_specs(args, fields)
    tuned = (*TUNED, "beta_fast", "beta_slow") if args.constants else TUNED
    for name, _ in Spec.parse(f"yarn{fields}").fields:
        if name in tuned:
            raise ConfigError(f"fields {args.fields!r} is not allowed; {', '.join(tuned)} are what the search sets")
    factors = parse_grid(args.factors or ("8" if args.constants else "2,4,8"), "factors")
    if args.constants and factors[0] <= 1:
        raise ConfigError(
            f"factors {args.factors!r} is not allowed; with --constants above 1, where there is a loss beyond L"
        )
    return [f"yarn:{factor!r}{fields}" for factor in factors]


def _slope_specs(args: argparse.Namespace, fields: str) -> list[str]:
    """`tune_specs` of a search for a slope."""
    tuned = ("factor", "attention_temperature", "temperature_slope", "dynamic")
    for name, _ in Spec.parse(f"yarn{fields}").fields:
        if name in tuned:
            raise ConfigError(f"fields {args.fields!r} is not allowed; {', '.join(tuned)} are what the search sets")
    kind = args.temperature or "constant"
    factors = parse_grid(args.factors or "2,4,8", "factors")
    if factors[0] <= 1:
        raise ConfigError(f"factors {args.factors!r} is not allowed; with --slope above 1, where a temperature acts")
    more = f",attention_temperature={kind},temperature_slope=0{fields}"
    return [f"{args.slope}:{factor!r}{more}" for factor in factors]


def tune_grid(args: argparse.Namespace) -> tuple[float, ...] | None:
    """The attention factors, or slopes, to try; None for those that `--constants` chooses.

    Raises:
        ConfigError: no positive numbers, or too few.
    """
    if args.constants:
        return parse_grid(args.grid) if args.grid else None
    if args.slope is not None:
        return parse_grid(args.grid or "0:0.5:0.05", least=3, zero=True)
    return parse_grid(args.grid or "1.0:1.5:0.05", least=3)


def check_tune_arguments(args: argparse.Namespace) -> None:
    """Refuse what `scaled-rope tune` cannot do, as far as numbers, names and paths show it."""
    if args.dataset is None:
        raise ConfigError(f"give --dataset: a path, a hub name or a corpus ({', '.join(CORPORA)})")
    check_least(args, documents=1, windows=1, seed=0)
    check_loading(args)
    if args.prompts is not None and not args.constants:
        raise ConfigError(f"--prompts {args.prompts} is not allowed without --constants, which asks them")
    if args.prompts is not None and args.prompts != 0 and args.prompts < LEAST_TRIALS:
        raise ConfigError(
            f"--prompts {args.prompts} is not allowed; 0, or at least {LEAST_TRIALS}: one to search and two to judge"
        )
    if args.temperature is not None and args.slope is None:
        raise ConfigError(f"--temperature {args.temperature} is not allowed without --slope, which searches its slope")
    if args.slope is not None:
        for name in ("constants", "beta_fast", "beta_slow"):
            if getattr(args, name):
                raise ConfigError(
                    f"--{name.replace('_', '-')} is not allowed with --slope, which searches a slope alone"
                )
    for spec in tune_specs(args):
        check_spec(spec)
    tune_grid(args)
    for name in ("beta_fast", "beta_slow"):
        if getattr(args, name):
            parse_grid(getattr(args, name), name.replace("_", "-"))
    _check_output_text_and_model(args, "rows.jsonl")
