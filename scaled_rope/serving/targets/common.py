"""Pieces that the programs share: the model to serve, and the settings that several of them take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.dialects import OLDER_KEYS, older_keys
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import RECORD_KEY, read_by_attention
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.gguf import GgufRope
from scaled_rope.serving.targets.arithmetic import powers

TOLERANCE = 1e-5
"""Largest relative difference of a frequency, and of the attention factor, that counts as the same number: float32
arithmetic done in another order differs by about 1e-6, another rounding of the ramp's ends by 1e-2 and more."""
STILL = 1e30
"""The divisor that stands for a frequency of 0. It leaves no more than 1e-23 of a turn over a million tokens, and
float32 still holds its product with any base in use."""
_ROPE_KEYS_ELSEWHERE = (*OLDER_KEYS, RECORD_KEY)
"""Top-level keys of a config.json that say something about RoPE beside `rope_parameters`, which replaces them."""


@dataclass(frozen=True)
class ServedModel:
    """The model and the scaling to serve."""

    scaling: RopeScaling
    config: Any
    """The model's (text) config, an object of transformers."""
    head_dim: int
    length: int
    """N, the longest sequence in tokens."""
    path: tuple[str, ...] = ()
    """The fields that lead from the whole config to the text part; empty where that is the whole."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The whole config.json as written; empty: what `config` says."""

    @property
    def model_type(self) -> str:
        """That of the text part."""
        return str(getattr(self.config, "model_type", None))

    @property
    def whole_type(self) -> str:
        """The model_type of the whole config: that of the text part, except in composite models."""
        return str(self.raw.get("model_type")) if self.path else self.model_type

    @property
    def written_path(self) -> tuple[str, ...]:
        """`path` as far as config.json has it: older files keep the text part on the top level."""
        part: Any = self.raw
        for depth, name in enumerate(self.path):
            if not isinstance(part.get(name), Mapping):
                return self.path[:depth]
            part = part[name]
        return self.path

    @property
    def dim(self) -> int:
        """D, the rotated dimensions per head."""
        return self.scaling.rotary_dim(self.head_dim)

    @property
    def carried(self) -> dict[str, Any]:
        """`rope_parameters` as transformers reads them from the checkpoint."""
        return dict(getattr(self.config, "rope_parameters", None) or {})


@dataclass(frozen=True)
class Expressed:
    """A scaling in the words of a target."""

    given: dict[str, Any]
    """All that the target's arithmetic depends on; `Target.restate` reads it."""
    config: dict[str, Any]
    """Keys to put into the text part of config.json."""
    flags: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """Limits of these settings, one sentence each."""
    gguf: GgufRope | None = None
    """Keys that the GGUF itself must hold, where flags are not enough."""
    converts: bool = False
    """Whether a GGUF that is converted from `config` holds them."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Other files to write beside config.json: name -> text."""


class Restated(NamedTuple):
    """The numbers that a target computes."""

    inv_freq: Sequence[float]
    """[D/2], radians per position."""
    attention_factor: float
    rows: int | None = None
    """Positions that its table holds and that it cannot go beyond; None: as many as asked for."""


@dataclass(frozen=True)
class Target:
    """A program that serves models."""

    name: str
    title: str
    version: str
    express: Callable[[ServedModel], Iterator[Expressed]]
    """Ways to say it, the plainest first."""
    read: Callable[[ServedModel, Expressed], Iterator[dict[str, Any]]]
    """The keys that the target reads from the printed texts, in place of `Expressed.given`: one per way to tell it."""
    restate: Callable[[ServedModel, Expressed, int], Restated]
    """(request, words, sequence length in tokens) -> what the target computes for it."""
    command: str
    """How its command line begins; {flags} is what we add."""
    known: Callable[[ServedModel], bool] = lambda request: True
    """Whether what its class for a family passes on to the rotary embedding is known."""
    older: str = ""
    """Releases that ignore `rope_parameters`; empty when none does."""
    static: str = ""
    """Why the target cannot follow the length of a sequence; empty when it can."""
    config_place: str = "in config.json"
    """The place of keys of config.json on the command line, in words."""
    basis: str = ""
    """Which release its words and arithmetic were read from, and whether that was run, in one sentence."""
    package: str = ""
    """The distribution that installs it, whose version is held against `package_version`."""
    package_version: str = ""


# Words ---------------------------------------------------------------------------------------------------------------
def native_keys(request: ServedModel) -> dict[str, Any] | None:
    """`rope_parameters` in the words of transformers, or None."""
    if not request.scaling.is_native(request.head_dim):
        return None
    return _with_kept(request, request.scaling.to_config(head_dim=request.head_dim))


def _with_kept(request: ServedModel, rope: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with what the family's attention reads in them.

    Raises:
        ConfigError: that is L, and these words have another.
    """
    kept = read_by_attention(request.carried)
    if request.model_type == "phimoe" and rope["rope_type"] != "default":  # its tables are multiplied by these
        factor = rope.get("attention_factor", 1.0)
        rope = {**rope, "short_mscale": factor, "long_mscale": factor}
    for name in kept.keys() & rope.keys():
        if kept[name] != rope[name]:
            raise ConfigError(f"{name}={rope[name]}: the attention of this model reads {kept[name]} there")
    return kept | rope


def divisors(scaling: RopeScaling, head_dim: int, length: int) -> list[float]:
    """The divisors [D/2] of the model's own frequencies b^(-2d/D), for sequences of `length` tokens."""
    inv_freq, _ = compute_rope(scaling, head_dim, length)
    own = powers(scaling.rope_theta, scaling.rotary_dim(head_dim))
    # Nine digits give a float32 back exactly.
    return [float(f"{a / b:.9g}") if b > 0 else STILL for a, b in zip(own, inv_freq.tolist(), strict=True)]


def table_of(request: ServedModel) -> dict[str, Any]:
    """`rope_parameters` that spell out every frequency: LongRoPE with one list of divisors for all lengths.

    L is set to N, because the programs differ in where they change from the short list to the long one.
    """
    scaling = request.scaling
    table = divisors(scaling, request.head_dim, request.length)
    _, attention_factor = compute_rope(scaling, request.head_dim, request.length)
    values: dict[str, Any] = {"rope_type": "longrope", "rope_theta": scaling.rope_theta, "factor": 1.0}
    values["original_max_position_embeddings"] = request.length
    if scaling.partial_rotary_factor != 1.0:
        values["partial_rotary_factor"] = scaling.partial_rotary_factor
    values |= {"short_factor": table, "long_factor": table, "attention_factor": attention_factor}
    return _with_kept(request, values)


_TABLE_NOTE = "the frequencies are spelled out under the name longrope; keep the original config.json for training"
LONG_LIST_NOTE = "prompts of up to L tokens get the long list too, where LongRoPE has a short one"


def table_notes(request: ServedModel) -> tuple[str, ...]:
    """Notes about `table_of`."""
    return (_TABLE_NOTE, LONG_LIST_NOTE) if request.scaling.is_length_dependent else (_TABLE_NOTE,)


def config_of(request: ServedModel, rope: dict[str, Any], context: int) -> dict[str, Any]:
    """The keys of config.json around `rope_parameters`."""
    config: dict[str, Any] = {"rope_parameters": rope, "max_position_embeddings": context}
    if getattr(request.config, "head_dim", request.head_dim) is None:  # transformers computes with the null
        config["head_dim"] = request.head_dim
    # Phi-3 and its like keep L on the top level, where it wins.
    if getattr(request.config, "original_max_position_embeddings", None) is not None:
        config["original_max_position_embeddings"] = rope.get("original_max_position_embeddings", context)
    return config


def with_older(request: ServedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a text part, in the older dialect too where every program reads the same numbers from both."""
    keys, _ = older_keys({**config, "model_type": request.model_type})
    return dict(config) | keys


def without_older(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys in the newer dialect alone, for texts that only newer programs get."""
    return {name: value for name, value in config.items() if name not in OLDER_KEYS}


def rope_in_file(part: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE dictionary that transformers 5 makes of a text part: where both dialects are there, the older counts."""
    rope = dict(part.get("rope_scaling") or rope_in(part))
    for name in OLDER_KEYS[1:]:
        if name in part:
            rope.setdefault(name, part[name])
    return rope


def build_patched(config: Mapping[str, Any], patch: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """A config.json with the keys of `patch`, and without older keys that would contradict them.

    path: where the text part is; `patch` says the keys of that part.
    """
    kept = {key: value for key, value in config.items() if key not in _ROPE_KEYS_ELSEWHERE}
    if not path:
        return kept | dict(patch)
    if "rope_parameters" in kept:  # outside of the text part nobody reads it, or refuses it
        del kept["rope_parameters"]
    return kept | {path[0]: build_patched(config[path[0]], patch, path[1:])}


def nest(values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A dictionary that holds `values` at a path."""
    nested = dict(values)
    for name in reversed(path):
        nested = {name: nested}
    return nested


def at_path(values: Any, path: tuple[str, ...]) -> dict[str, Any]:
    """The dictionary at a path inside another; an empty one where there is none."""
    for name in path:
        values = values.get(name) if isinstance(values, Mapping) else None
    return dict(values) if isinstance(values, Mapping) else {}


def rope_in(part: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` where a target reads them. Raises ConfigError where they are not there."""
    if not isinstance(part.get("rope_parameters"), Mapping):
        raise ConfigError("the printed settings hold no rope_parameters where it reads them")
    return dict(part["rope_parameters"])
