"""Does it fit? Memory of serving a model: `scaled-rope plan --serve MODEL --length N --gpu-memory G`.

Weights, the key/value cache of one sequence, and how many sequences fit beside each other, from the config alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from scaled_rope.checkpoint import raw_config
from scaled_rope.errors import ConfigError, is_positive_whole, type_and_line
from scaled_rope.flags.serving import check_plan_arguments
from scaled_rope.patching.loading import auto_class, build_unscaled
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import RopeScaling, RopeSettings
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.checks_lengths import shortening
from scaled_rope.serving.config_remarks import config_remarks, load_readable
from scaled_rope.serving.export import served_length

GB = 1e9
_USED = 0.9
"""The share of a GPU's memory that vLLM takes unless told otherwise (`--gpu-memory-utilization`)."""
_BLOCK = 16
"""Tokens of a block of the cache; a sequence takes whole ones."""
_CHUNK = 8192
"""Tokens that go through the model at once in a prefill."""
_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "fp8": 1}
_FULL, _WINDOWED = ("full_attention", "global_attention"), ("sliding_attention", "local_attention")
_CHUNKED = "chunked_attention"


@dataclass(frozen=True)
class ServePlan:
    """Memory on each of the GPUs, in bytes."""

    model: str
    scaling: str
    length: int
    gpus: int
    gpu_memory: float
    weights: float
    activations: float
    """Of a prefill of 8192 tokens at once, roughly."""
    per_token: float
    """Cache of one token in the layers that keep all tokens."""
    per_sequence: float
    """Cache of one sequence of `length` tokens, windows considered."""
    layers: dict[str, int]
    """Kind of layer -> how many."""
    kv_dtype: str
    notes: tuple[str, ...] = ()

    @property
    def room(self) -> float:
        """The memory that is left for caches."""
        return self.gpu_memory * _USED - self.weights - self.activations

    @property
    def sequences(self) -> int:
        """How many sequences of that length fit beside each other."""
        return max(0, math.floor(self.room / self.per_sequence))

    @property
    def exit_code(self) -> int:
        """0 where at least one sequence fits, else 1."""
        return 0 if self.sequences else 1

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self) | {"room": self.room, "sequences": self.sequences}

    def lay_out(self) -> Iterator[str]:
        """The plan as text, line by line."""
        fits = f"{self.sequences} sequences of {self.length} tokens fit" if self.sequences else "no sequence fits"
        on = f"{self.gpus} GPU{'s' if self.gpus > 1 else ''} of {self.gpu_memory / GB:g} GB"
        yield f"{self.model}, {self.scaling}: {fits} on {on}"
        yield ""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.layers.items())
        rows = (
            ("weights", self.weights, "per GPU"),
            ("activations", self.activations, f"a prefill of {_CHUNK} tokens at once, roughly"),
            ("left for caches", self.room, f"of {_USED:.0%} of the memory"),
            ("cache per sequence", self.per_sequence, f"{self.length} tokens in {self.kv_dtype}; layers: {kinds}"),
            ("cache per token", self.per_token, "in layers that keep all tokens"),
        )
        for name, size, text in rows:
            shown = f"{size / GB:.3f} GB" if size >= 1e6 or size < 0 else f"{size / 1e3:.1f} kB"
            yield f"  {name:<20}{shown:>12}  {text}"
        yield from (f"note: {note}" for note in self.notes)


def plan_serving(
    config: Any,
    scaling: RopeScaling | str = "checkpoint",
    length: int | None = None,
    gpu_memory: float = 80 * GB,
    gpus: int = 1,
    kv_dtype: str = "auto",
    name: str = "model",
) -> ServePlan:
    """Memory of serving sequences of `length` tokens.

    Args:
        config: of the model, an object of transformers.
        scaling: a record, or a spec relative to what the config carries.
        length: in tokens; None: what the scaling is for.
        gpu_memory: of each GPU, in bytes.
        gpus: among which heads and weights are shared out (tensor parallel).
        kv_dtype: "auto", "bfloat16", "float16" or "fp8".

    Raises:
        ConfigError: layers whose cache is not known, or heads that cannot be shared out.
    """
    text = text_config(config)
    settings = RopeSettings(text)
    if isinstance(scaling, str):
        RopeScaling.from_config(text)  # says its remarks
        scaling = resolve_scaling(scaling, settings.scaling)
    length = length or served_length(scaling, text)
    heads = _whole(text, "num_attention_heads")
    if heads % gpus:
        raise ConfigError(f"--gpus {gpus} is not allowed; {heads} attention heads must be shared out evenly")
    notes = []
    if shorter := shortening(scaling, settings.scaling, _whole(text, "max_position_embeddings", 0), settings.reach):
        notes.append(shorter)
    if scaling.beyond_tables:
        notes.append(f"no server computes this scaling, which {scaling.beyond_tables}: see scaled-rope export")
    extended = settings.length_for(scaling) or _whole(text, "max_position_embeddings", length)
    if length > extended and not scaling.dynamic:
        notes.append(f"{length} tokens are beyond the {extended} that {scaling.label} is for")
    size, wide = _BYTES[kv_dtype], _wide(text)
    per_token_layer = _per_token(text, gpus) * size
    kinds = _kinds(text)
    window = int(getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None) or 0)
    blocks = math.ceil(length / _BLOCK) * _BLOCK
    # A window that begins inside of a block keeps one block more.
    short = min(blocks, (math.ceil(window / _BLOCK) + 1) * _BLOCK) if window else blocks
    tokens = kinds["full"] * blocks + kinds["window"] * short
    hidden = _whole(text, "hidden_size")
    inner = _whole(text, "intermediate_size", 4 * hidden)
    weights = _parameters(config) * 2 / gpus
    if getattr(config, "quantization_config", None) is not None:
        notes.append("the checkpoint is quantised: its weights take less than is said here")
    return ServePlan(
        model=name,
        scaling=scaling.label,
        length=length,
        gpus=gpus,
        gpu_memory=gpu_memory,
        weights=weights,
        activations=min(_CHUNK, length) * (4 * hidden + 3 * inner / gpus) * 2,
        per_token=per_token_layer * kinds["full"],
        per_sequence=per_token_layer * tokens,
        layers={kind: count for kind, count in kinds.items() if count},
        kv_dtype={"auto": "bfloat16"}.get(kv_dtype, kv_dtype) + (" (compressed, MLA)" if wide else ""),
        notes=tuple(notes),
    )


def _wide(text: Any) -> bool:
    """Whether attention keeps one compressed vector per token (MLA)."""
    return is_positive_whole(getattr(text, "kv_lora_rank", None))


def _per_token(text: Any, gpus: int) -> int:
    """Numbers per token and layer on each GPU."""
    if _wide(text):  # every GPU holds the whole of it
        return int(text.kv_lora_rank) + int(text.qk_rope_head_dim)
    heads = _whole(text, "num_attention_heads")
    width = _whole(text, "head_dim", 0) or _whole(text, "hidden_size") // heads
    return 2 * width * max(1, math.ceil(_key_heads(text, heads) / gpus))


def _key_heads(text: Any, heads: int) -> int:
    """Heads of keys and values. transformers' cache of a Falcon with the new architecture repeats them for all heads,
    servers do not.

    Raises:
        ConfigError: the config says them under another name.
    """
    if (found := _whole(text, "num_key_value_heads", 0)) > 0:
        return found
    one = bool(getattr(text, "multi_query", False)) and not getattr(text, "new_decoder_architecture", False)
    if one or (found := _whole(text, "num_kv_heads", 0)) > 0:
        return 1 if one else found
    for name, value in vars(text).items():
        if is_positive_whole(value) and any(part in name for part in ("kv_", "_kv", "key_value", "query_group")):
            if "head" in name or "group" in name:
                raise ConfigError(f"num_key_value_heads is missing; whether {name}={value} means it is not known")
    return heads


def _whole(text: Any, name: str, default: int | None = None) -> int:
    """A whole number of a config.

    Raises:
        ConfigError: it is missing and there is no default, or it differs between layers.
    """
    try:
        value: Any = getattr(text, name, None)
    except Exception as error:  # transformers' own for settings that differ between layers
        raise ConfigError(
            f"{name} differs between the layers of this {text.model_type!r} model: its cache is not known"
        ) from error
    if isinstance(value, list | tuple) and len(set(value)) == 1:
        value = value[0]
    if value is None and default is not None:
        return default
    if not is_positive_whole(value):
        raise ConfigError(
            f"{name}={value!r}: must be a whole number for the cache of this {text.model_type!r} model to be known"
        )
    return int(value)


def _kinds(text: Any) -> Counter[str]:
    """How many layers keep all tokens, and how many those of a window.

    Raises:
        ConfigError: layers of another kind, whose state is not that of attention.
    """
    layers = int(text.num_hidden_layers)
    own = layers - int(getattr(text, "num_kv_shared_layers", None) or 0)  # the last layers read caches of others
    types = list(getattr(text, "layer_types", None) or ())[:own]
    if not types:
        used = getattr(text, "use_sliding_window", True) is not False and getattr(text, "sliding_window", None)
        return Counter({"window" if used else "full": own})
    found: Counter[str] = Counter()
    for kind in types:
        if kind not in (*_FULL, *_WINDOWED, _CHUNKED):
            raise ConfigError(f"layer_types holds {kind!r}: only the caches of full and sliding attention are known")
        found["full" if kind in _FULL else "window"] += 1
    return found


def _parameters(config: Any) -> int:
    """Weights of the model, counted on the meta device; tied ones once. The scaling is left out: it has none."""
    config = copy.deepcopy(config)
    build_unscaled(config)
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except (TypeError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(
            f"model_type {config.model_type!r}: cannot be built: {type_and_line(error)}; see scaled-rope inspect"
        ) from error
    return sum(value.numel() for value in model.parameters())


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope plan --serve`: 0 where a sequence fits, 1 where none does.

    Raises:
        ConfigError: bad input.
    """
    check_plan_arguments(args)
    config = load_readable(args.serve, args.serve)
    memory, gpus = args.gpu_memory * GB, args.gpus or 1
    remarks = config_remarks(
        raw_config(args.serve), args.serve, args.scaling, without=("shortened",), length=args.length
    )
    scaling = resolve_scaling(args.scaling, RopeSettings(config).scaling)
    plan = plan_serving(config, scaling, args.length, memory, gpus, args.kv_dtype, args.serve)
    plan = replace(plan, notes=(*remarks, *plan.notes))
    print(json.dumps(plan.to_dict(), indent=1) if args.json else "\n".join(plan.lay_out()))
    return plan.exit_code
