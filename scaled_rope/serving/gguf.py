"""GGUF files that hold a scaling: written from a checkpoint, or copied from a GGUF with other rotary frequencies.

GGUF is llama.cpp's file format. Its Llama architecture reads one tensor of rotary divisors, by which any static scaling
can be stored. The `gguf` package is needed (pip install gguf) and imported on use.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from einops import rearrange

from scaled_rope.checkpoint import load_config
from scaled_rope.errors import ConfigError, first_line
from scaled_rope.files import scratch_path
from scaled_rope.scaling.hf_config import head_dim_of

Array = npt.NDArray[Any]

ROPE_TENSOR = "rope_freqs.weight"
"""llama.cpp's tensor [D/2]: what each frequency b^(-2d/D) is divided by."""
_ROPE_TENSORS = (ROPE_TENSOR, "rope_factors_long.weight", "rope_factors_short.weight")
"""All tensors of divisors; llama.cpp reads those for which `rope.scaling.type` is, and refuses a file with others."""
_SCALING_KEYS = ("rope.scaling.", "rope.scale_linear")
"""How keys of a scaling begin, after the architecture."""

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TENSORS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class GgufRope:
    """The RoPE settings of a GGUF."""

    metadata: dict[str, Any] = field(default_factory=dict)
    """Keys with their architecture, for example "llama.rope.freq_base"; numbers, texts, truth values."""
    divisors: tuple[float, ...] | None = None
    """`ROPE_TENSOR`, or None when there is none."""

    def __str__(self) -> str:
        parts = [f"{key}={f'{v:.9g}' if isinstance(v, float) else v}" for key, v in self.metadata.items()]
        if self.divisors is not None:
            parts.append(f"tensor {ROPE_TENSOR} of {len(self.divisors)} divisors")
        return ", ".join(parts) or "no rope.scaling keys and no divisors"


def interleave(weight: Array, heads: int) -> Array:
    """Rows of a query or key projection [heads·D, hidden], as llama.cpp rotates them.

    transformers turns dimension i together with i + D/2, llama.cpp 2i with 2i + 1.
    """
    rows: Array = weight[_interleaving(len(weight), heads)]
    return rows


def _interleaving(rows: int, heads: int) -> Array:
    """Where each row comes from: the two halves of every head, one row of each in turn."""
    places: Array = rearrange(np.arange(rows), "(head half i) -> (head i half)", head=heads, half=2)
    return places


def write_checkpoint(folder: str | Path, path: str | Path, rope: GgufRope) -> None:
    """Write a Llama or Mistral checkpoint as a float32 GGUF whose rotary part is `rope`.

    Args:
        folder: a local checkpoint with safetensors and a byte-level BPE tokenizer.json.
        path: the file to write.
        rope: metadata (the base is the config's when not given) and divisors.

    Raises:
        ConfigError: another architecture, or a file that is missing.
    """
    gguf = _gguf()
    config = load_config(str(folder))
    if config.model_type not in ("llama", "mistral"):
        raise ConfigError(
            f"model_type={config.model_type!r}: only llama and mistral checkpoints can be written as GGUF"
        )
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    metadata = _llama_metadata(config, Path(folder).name) | rope.metadata
    with _writing(path) as scratch:
        writer = gguf.GGUFWriter(str(scratch), "llama")
        for key, value in metadata.items():
            _add(writer, key, value)
        _add_tokenizer(writer, Path(folder), config)
        for name, tensor in _weights(Path(folder)):
            target = _tensor_name(name)
            kind = target.split(".")[-2]
            array = interleave(tensor, heads[kind]) if kind in heads else tensor
            writer.add_tensor(target, np.ascontiguousarray(array))
        if rope.divisors is not None:
            writer.add_tensor(ROPE_TENSOR, np.asarray(rope.divisors, dtype=np.float32))
        _finish(writer)


def _llama_metadata(config: Any, name: str) -> dict[str, Any]:
    """Keys and values for a model's config, its rotary base included."""
    head_dim = head_dim_of(config)
    return {
        "general.name": name,
        "general.file_type": 0,  # float32 throughout
        "llama.block_count": config.num_hidden_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.vocab_size": config.vocab_size,
        "llama.rope.dimension_count": head_dim,
        "llama.rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def add_rope(source: str | Path, path: str | Path, rope: GgufRope) -> None:
    """Copy a GGUF, of any quantisation, with another rotary part. Weights and all other metadata are as they were.

    Of the source's own scaling nothing is left: neither `rope.scaling` keys that `rope` does not say, nor divisors.

    Raises:
        ConfigError: not a GGUF, one part of several, big-endian, no model, or of a model with other heads; both paths
            are the same file.
    """
    gguf = _gguf()
    source, path = Path(source), Path(path)
    if not source.is_file():
        raise ConfigError(f"GGUF {str(source)!r} does not exist")
    if path.exists() and path.samefile(source):
        raise ConfigError(f"GGUF {str(path)!r} would overwrite the file it is made from")
    reader = _read(source)
    if "general.architecture" not in reader.fields:
        raise ConfigError(f"GGUF {str(source)!r} does not say its architecture: key general.architecture is missing")
    with _copying(source):
        architecture = str(reader.fields["general.architecture"].contents())
    for key in rope.metadata:
        if not key.startswith(f"{architecture}."):
            raise ConfigError(f"GGUF {str(source)!r} is of architecture {architecture!r}, but the scaling says {key}")
    _check_model(reader, source, architecture, rope)
    left = ("GGUF.", "split.", *(f"{architecture}.{name}" for name in _SCALING_KEYS))
    with _copying(source), _writing(path) as scratch:
        writer = gguf.GGUFWriter(str(scratch), architecture)
        writer.data_alignment = reader.alignment
        for name, entry in reader.fields.items():
            if name.startswith(left) or name == "general.architecture" or name in rope.metadata:
                continue
            item = entry.types[-1] if entry.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=item)
        for key, value in rope.metadata.items():
            _add(writer, key, value)
        for tensor in reader.tensors:
            if tensor.name not in _ROPE_TENSORS:
                writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        if rope.divisors is not None:
            writer.add_tensor(ROPE_TENSOR, np.asarray(rope.divisors, dtype=np.float32))
        _finish(writer)


def _check_model(reader: Any, source: Path, architecture: str, rope: GgufRope) -> None:
    """Refuse what would be copied into a file that llama.cpp cannot load, or that computes something else."""
    with _copying(source):
        said = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("tokenizer.")}
    kind = said.get("general.type", "model")
    if kind != "model":
        raise ConfigError(f"GGUF {str(source)!r} has general.type {kind!r}: must be 'model', which is what rotates")
    if reader.byte_order == "S":
        raise ConfigError(f"GGUF {str(source)!r} is in big-endian byte order: only little-endian files are copied")
    if not any(tensor.name not in _ROPE_TENSORS for tensor in reader.tensors):
        raise ConfigError(f"GGUF {str(source)!r} holds no weights: name one of a whole model")
    rotated = _rotated_dims(said, architecture)
    if rope.divisors is not None and rotated not in (None, 2 * len(rope.divisors)):
        raise ConfigError(
            f"GGUF {str(source)!r} rotates {rotated} dimensions of a head, but the scaling is for "
            f"{2 * len(rope.divisors)}: name a GGUF of the same model"
        )


def _rotated_dims(said: Mapping[str, Any], architecture: str) -> int | None:
    """The dimensions of a head that llama.cpp rotates, by the metadata of a GGUF; None where that does not say it."""
    count, length, width, heads = (
        said.get(f"{architecture}.{name}")
        for name in ("rope.dimension_count", "attention.key_length", "embedding_length", "attention.head_count")
    )
    for told in (count, length):
        if isinstance(told, int):
            return told
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None


def held_scaling(path: str | Path) -> list[str]:
    """The keys and tensors of a GGUF by which it scales, whatever flags say.

    Raises:
        ConfigError: there is none, not a GGUF, or one part of several.
    """
    if not Path(path).is_file():
        raise ConfigError(f"GGUF {str(path)!r} does not exist")
    reader = _read(Path(path))
    keys = [name for name in reader.fields if name.partition(".")[2].startswith(_SCALING_KEYS)]
    return keys + [f"tensor {tensor.name}" for tensor in reader.tensors if tensor.name in _ROPE_TENSORS]


def read_gguf_rope(path: str | Path) -> GgufRope:
    """The RoPE settings of a GGUF.

    Raises:
        ConfigError: not a GGUF, or one part of several.
    """
    reader = _read(Path(path))
    metadata = {name: entry.contents() for name, entry in reader.fields.items() if ".rope." in name}
    divisors = [tensor.data for tensor in reader.tensors if tensor.name == ROPE_TENSOR]
    return GgufRope(metadata, tuple(divisors[0].tolist()) if divisors else None)


def _read(path: Path) -> Any:
    """A reader of a GGUF, whose counts were held against the size of the file before.

    Raises:
        ConfigError: it is none, damaged, or one part of several.
    """
    gguf = _gguf()
    try:
        check_counts(path)
        reader = gguf.GGUFReader(str(path))
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
    except Exception as error:  # the reader raises whatever its parsing stumbles over
        raise ConfigError(f"GGUF {str(path)!r} cannot be read: {error}") from error
    if parts not in (0, 1):  # 0: the parts were merged
        raise ConfigError(
            f"GGUF {str(path)!r} is one of {parts} parts (split.count): must be a whole model; "
            "llama-gguf-split --merge FIRST_PART OUTPUT joins them"
        )
    return reader


@contextmanager
def _copying(source: Path) -> Iterator[None]:
    """Report what the gguf package raises over the content of a file that it could parse as one line."""
    try:
        yield
    except (OSError, ConfigError):
        raise
    except Exception as error:  # unrelated types, over texts that are no UTF-8 and arrays of mixed items
        raise ConfigError(f"GGUF {str(source)!r} cannot be copied: {first_line(error)}") from error


_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by its type in a GGUF; a string (8) and an array (9) say their own length."""
_STRING, _ARRAY = 8, 9


def check_counts(path: Path) -> None:
    """Raise a ValueError unless all that a GGUF's header says to be in the file has room there.

    The reader of the gguf package makes a list as long as an array is said to be, before it looks where the file ends.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        order = "<" if int.from_bytes(data[4:6], "little") else ">"
        place = 8

        def number(form: str, what: str) -> int:
            nonlocal place
            if place + struct.calcsize(form) > len(data):
                raise ValueError(f"the file ends within {what}")
            (value,) = struct.unpack_from(order + form, data, place)
            place += struct.calcsize(form)
            return int(value)

        def skip(count: int, size: int, what: str) -> None:
            nonlocal place
            if count * size > len(data) - place:
                raise ValueError(
                    f"{what} is said to have {count} items, and the file ends {len(data) - place} bytes later"
                )
            place += count * size

        def value(kind: int, what: str) -> None:
            if kind == _STRING:
                skip(number("Q", what), 1, what)
            elif kind == _ARRAY:
                item, count = number("I", what), number("Q", what)
                if item in _SIZES:
                    skip(count, _SIZES[item], what)
                    return
                if item != _STRING:
                    raise ValueError(f"{what} has items of type {item}")
                if count * 8 > len(data) - place:
                    skip(count, 8, what)
                for _ in range(count):
                    value(_STRING, what)
            elif kind in _SIZES:
                skip(1, _SIZES[kind], what)
            else:
                raise ValueError(f"{what} has type {kind}")

        tensors, keys = number("Q", "the count of tensors"), number("Q", "the count of keys")
        for what, count, least in (("the header's keys", keys, 13), ("the header's tensors", tensors, 24)):
            if count * least > len(data):
                raise ValueError(f"{what} are said to be {count}, and the file has {len(data)} bytes")
        for _ in range(keys):
            length = number("Q", "a key")
            name = data[place : place + min(length, 100)].decode("utf-8", errors="replace")
            skip(length, 1, "a key")
            value(number("I", f"key {name!r}"), f"key {name!r}")


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError("GGUF files need a package: pip install gguf") from error


@contextmanager
def _writing(path: str | Path) -> Iterator[Path]:
    """A scratch path beside `path` that takes its place when all went well."""
    path = Path(path)
    scratch = scratch_path(path, "tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)


def _add_tokenizer(writer: Any, folder: Path, config: Any) -> None:
    """A byte-level BPE's vocabulary and merges. llama.cpp calls single digits followed by GPT-2's split "smollm"."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"model {str(folder)!r} holds no tokenizer.json")
    tokenizer: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise ConfigError(f"tokenizer {str(path)!r} is {model.get('type')!r}; only byte-level BPE can be written")
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    by_id = {number: text for text, number in model["vocab"].items()} | special
    normal, control, unused = 1, 3, 5  # llama.cpp's token types
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    types = [control if n in special else normal if n in by_id else unused for n in range(config.vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(config, name, None) is not None:
            _add(writer, f"tokenizer.ggml.{name}", getattr(config, name))
    writer.add_add_bos_token(False)


def _weights(folder: Path) -> Iterator[tuple[str, Array]]:
    """Names and float32 arrays of every weight in the safetensors of a folder."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model {str(folder)!r} holds no safetensors")
    for file in files:
        for name, tensor in load_file(file).items():
            yield name, tensor.float().numpy()


def _tensor_name(name: str) -> str:
    """llama.cpp's name for a weight of transformers' Llama."""
    stem, _, kind = name.rpartition(".")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{kind}"
    parts = stem.split(".", 3)
    if parts[:2] == ["model", "layers"] and parts[3] in _LAYER_TENSORS:
        return f"blk.{parts[2]}.{_LAYER_TENSORS[parts[3]]}.{kind}"
    raise ConfigError(f"weight {name!r} has no place in a GGUF of architecture llama")
