"""Flags of the evaluators: models and scalings, texts, lengths, output, and a server in place of weights."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from scaled_rope.checkpoint import check_local
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.files import check_writable
from scaled_rope.flags.shared import (
    ATTENTIONS,
    DEVICE_MAPS,
    KERNELS,
    Unsaid,
    check_folder,
    check_least,
    check_loading,
    check_positive,
    parse_lengths,
    said,
)
from scaled_rope.provenance import portable_model
from scaled_rope.scaling.registry import METHODS
from scaled_rope.scaling.resolve import check_spec
from scaled_rope.scaling.spec import Spec
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
    add(
        "--drop-layers",
        type=_indices,
        metavar="I,J,...",
        help="layers, from 0, that work without rotary embedding",
    )
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
    check_positive(args, "server_timeout", 1e6, "seconds")
    if len(args.model or ()) != 1:
        raise ConfigError(f"--server {args.server} takes one -m, with the config and tokenizer of its model")
    unlike = {"dtype": "auto", "attention": "auto", "kernel": "auto"}
    for name in (*_OF_THE_SERVER, *unlike):
        value = getattr(args, name, None)
        if value not in (None, False, unlike.get(name)):
            raise ConfigError(f"--{name.replace('_', '-')} has no effect with --server, which decides that by itself")
    if getattr(args, "restrict_tokens", False):
        raise ConfigError("--restrict-tokens cannot be asked of a server; say --restrict-tokens false with --server")


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
