"""What a model's RoPE scaling is, number by number, and what is wrong with it: `scaled-rope inspect`.

Two views of a config are compared: the dictionary that its author wrote, and what transformers makes of it. Where they
part, or where a config that works means something else than it seems to, there is a `Finding` with a remedy. No weights
are needed; `check_model` looks at a loaded model.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scaled_rope.checkpoint import no_config
from scaled_rope.errors import ConfigError, is_number, is_positive_whole
from scaled_rope.flags import check_inspect_arguments
from scaled_rope.patching.families import ADAPTERS, layers_without_rope
from scaled_rope.patching.loading import load_model
from scaled_rope.report.drawing import check_format
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import (
    CUSTOM_ROPE_TYPE,
    NATIVE,
    PRIMARY_LAYER_TYPE,
    RECORD_KEY,
    SOFTMAX_MSCALE_FAMILIES,
    ConfigNote,
    attention_keys,
    config_head_dim,
    has_rope,
    nested_types,
    split_config,
)
from scaled_rope.scaling.record import LayerPlan, RopeScaling, native_type, resolve_scaling
from scaled_rope.scaling.registry import METHODS
from scaled_rope.serving.inspect_model import check_model
from scaled_rope.serving.inspect_report import (
    LEVELS,
    Dimension,
    Finding,
    Inspection,
    Level,
    Number,
    describe_difference,
    one_line,
    quiet,
)
from scaled_rope.serving.scaling_plots import plot_scaling, regimes_of


def inspect(
    source: str | Path | Mapping[str, Any] | Any,
    layer_type: str | None = None,
    scaling: str | None = None,
    length: int | None = None,
) -> Inspection:
    """Read a config and judge it.

    Args:
        source: a model's folder, a config.json, a hub name, a config as a dictionary or as an object of transformers.
        layer_type: which layers, where the scaling differs between layer types; default: the full-attention ones.
        scaling: report on the model under this scaling instead of its own, see `loading.resolve_scaling`.
        length: tokens of the sequence that the table is for, where the frequencies depend on it. Default: the longest
            that the config allows, at least twice L.

    Raises:
        ConfigError: nothing there, not a config, an unknown layer type or spec. What is wrong inside the config is a
            finding.
    """
    raw = read_config_file(source) if isinstance(source, str | Path) else _as_dictionary(source)
    name = str(source) if isinstance(source, str | Path) else type(source).__name__
    return _Examination(raw, name, layer_type, scaling, length).report()


# ------------------------------------------------------------------------------------------------------------- reading


def read_config_file(source: str | Path) -> dict[str, Any]:
    """The config.json of a folder, of a path or of a hub name, as its author wrote it.

    Raises:
        ConfigError: nothing there, not JSON, not a dictionary, or a hub that cannot be reached.
    """
    path = Path(source)
    if not str(source):
        raise ConfigError("model '': must be a folder, a config.json or a hub name")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise no_config(str(source))
        path = path / "config.json"
    if path.is_file():
        return _parse(path)
    name = str(source)
    # A hub name is OWNER/NAME; a folder here that is called like the owner speaks for a local path.
    if path.is_absolute() or len(path.parts) != 2 or path.suffix == ".json" or Path(path.parts[0]).is_dir():
        hint = "" if "/" in name or path.suffix else ", and a hub name is OWNER/NAME"
        raise ConfigError(f"model {name!r} does not exist{hint}")
    with quiet():
        try:
            raw, _ = transformers.PreTrainedConfig.get_config_dict(name)
        except Exception as error:  # the hub client has a dozen types for "no such thing" and "no network"
            raise ConfigError(
                f"model {name!r} is no folder or file here, and not on the hub: {one_line(error)}"
            ) from error
    if not raw:
        raise ConfigError(f"model {name!r} is no folder or file here, and not on the hub")
    return {str(key): value for key, value in raw.items() if key != "_commit_hash"}


def _parse(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        data = file.read(_MAX_CONFIG_BYTES + 1)
    if data.startswith(b"GGUF"):
        raise ConfigError(
            f"model {str(path)!r} is a GGUF file; inspect reads config.json: name that of the model it was made from"
        )
    if len(data) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"config {str(path)!r} is larger than {_MAX_CONFIG_BYTES >> 20} MiB, which no config.json is")
    try:
        raw = json.loads(data)
    except UnicodeDecodeError as error:
        raise ConfigError(f"config {str(path)!r} is not JSON, and not text") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config {str(path)!r} is not JSON: {one_line(error)}") from error
    if not isinstance(raw, dict):
        kind = "null" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"config {str(path)!r} holds {kind}: must be a dictionary")
    return raw


def _as_dictionary(source: Any) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return {str(key): value for key, value in source.items()}
    if hasattr(source, "to_dict"):
        return dict(source.to_dict())
    raise ConfigError(f"config of type {type(source).__name__}: must be a model's config, a dictionary or a path")


def _build(raw: Mapping[str, Any]) -> tuple[Any, str]:
    """The config object that transformers makes of a dictionary, text part only, and why it makes none."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        return None, ""
    own = copy.deepcopy(dict(raw))
    for values in (own, own.get("text_config")):
        if isinstance(values, dict) and CUSTOM_ROPE_TYPE in str(values.get("rope_parameters")):
            # Its numbers are ours to read; the rest of the config is of interest.
            del values["rope_parameters"]
    with quiet():
        try:
            config = transformers.CONFIG_MAPPING[model_type].from_dict(own).get_text_config()
            return (config, "") if isinstance(config, transformers.PreTrainedConfig) else (None, "no text config")
        except Exception as error:  # a config class raises whatever its checks raise, some wrapped in a headline
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            return None, reason.strip().removeprefix("ValueError: ").rstrip(".")


# ---------------------------------------------------------------------------------------------------- judging a config


_TOP_LEVEL = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
_SHARED_KEYS = ("rope_type", "type", "finetuned", "rope_theta", "partial_rotary_factor")
_RELEASED_TYPES = ("dynamic-yarn", "dynamic-linear", "ntk-by-parts")
_PHI3_TYPES = ("default", "longrope")
"""What Phi-3's config class accepts."""
_MAX_HEAD_DIM = 65536
"""No model has heads so wide; a number beyond it is a slip, and a table that long would only fill the memory."""
_MAX_CONFIG_BYTES = 16 << 20
"""Somebody who names a file of weights should not wait until it has been read."""
_FOREIGN = {  # what other programs call it, or have in addition: (neutral value, what to write instead)
    "attn_factor": (1.0, "vLLM multiplies 0.1·ln(s) + 1 by it; write their product as attention_factor"),
    "extrapolation_factor": (1.0, "vLLM and this package read it; in a spec: yarn:S,extrapolation_factor=X"),
    "apply_yarn_scaling": (True, "vLLM's switch for the attention factor; write attention_factor=1.0 to switch it off"),
    "yarn_attn_factor": (1.0, "llama.cpp's word; write attention_factor"),
    "yarn_ext_factor": (1.0, "llama.cpp's word; in a spec: yarn:S,extrapolation_factor=X"),
    "alpha": (None, "the base grows as theta·alpha^(D/(D-2)): write that as rope_theta, or use the spec ntk:ALPHA"),
}
_TRAINED_WITH_THEIRS = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "gemma3_text", "gpt_oss", "ministral3", "mistral4", "olmo3"),
)
"""Families whose published models were trained with the scaling in their configs."""
_CHANGES_SHORT_PROMPTS = ("linear", "ntk", "ntk-by-parts", "part-ntk", "yarn", "ntk-mixed")
_UNREADABLE = (ConfigError, ArithmeticError, AttributeError, KeyError, TypeError, ValueError)
"""What reading a config raises when it holds types that no reader expects, such as a list for a number."""
_REMEDIES = {
    "both-dialects": "Keep one of them: rope_parameters for transformers 5, rope_scaling for older programs.",
    "flat-parameters": 'Nest it: "rope_parameters": {"full_attention": {...}, "sliding_attention": {...}}.',
    "nested-truncate": "transformers looks for truncate beside the layer types, not inside one; move it there.",
    "two-values": "Delete the one that is ignored, after making sure that it is the wrong one.",
    "no-theta": "Write rope_theta, from the model's card or its code.",
    "family-theta": "Write rope_theta, so that no program needs to know the family.",
    "no-original": "Write original_max_position_embeddings, the length of pre-training, into the RoPE dictionary.",
    "dynamic-original": "Set max_position_embeddings to the length of pre-training.",
    "mistral-constants": "Write beta_fast=128, beta_slow=2 and the attention_factor into the config; "
    "`scaled-rope export` prints it.",
    "mistral-llama-constants": "Write the constants that the model was trained with; if those are Llama's, write "
    "beta_fast=32 and beta_slow=1.",
    "other-name": "Write it under the name that the family has for it, or delete it.",
    "dynamic-factor": "Write finetuned: true if the model was trained with that factor; otherwise delete the factor.",
    "lone-mscale": "Write both, or better the attention_factor that you mean: they only count as a ratio.",
    "stale-record": f"Delete {RECORD_KEY} from the config, or write rope_parameters back.",
}
_NOTE_LEVELS: dict[str, Level] = {"flat-parameters": "error"}


class _Examination:
    """One config on the table: what was written, what transformers makes of it, and findings as they turn up."""

    def __init__(
        self, raw: dict[str, Any], source: str, layer_type: str | None, spec: str | None, length: int | None
    ) -> None:
        self.raw, self.source, self.spec = raw, source, spec
        self.findings: list[Finding] = []
        self.text: dict[str, Any]
        self.rope: dict[str, Any]
        try:
            self.text, self.rope = split_config(raw)
        except ConfigError as error:
            # A RoPE dictionary that is none: the rest can still be looked at.
            self.text, self.rope = {k: v for k, v in raw.items() if k not in ("rope_parameters", "rope_scaling")}, {}
            self.find("bad-value", "error", f"{error}.", "Write a dictionary, or null for no scaling.")
        # Where the text part is nested, so is its RoPE; the rest of the raw dictionary is about the whole model.
        self.object, self.refusal = _build(raw)
        kind = self.text.get("model_type") or getattr(self.object, "model_type", None)
        self.model_type: str | None = kind if isinstance(kind, str) else None
        if self.model_type is None and not self.rope and not self.text.keys() & _TOP_LEVEL and not self.findings:
            raise ConfigError(f"config {source!r} says nothing about a model: no model_type, no key of RoPE")
        self.complete = self._completed()
        self.layer_type = self._checked_layer_type(layer_type)
        self.own: RopeScaling | None = None
        self.notes: list[ConfigNote] = []
        self.ignored: dict[str, Any] = {}
        self.asked_length = length

    def find(self, code: str, level: Level, text: str, remedy: str = "") -> None:
        self.findings.append(Finding(code, level, text, remedy))

    def _found(self, *codes: str) -> bool:
        return any(finding.code in codes for finding in self.findings)

    def report(self) -> Inspection:
        self._check_names()
        self._check_family()
        self._read()
        scaling = self.own
        if self.own is not None:
            if self.spec is not None:
                scaling = resolve_scaling(self.spec, self.own)
            else:
                self._check_lengths(self.own)
        head_dim = self._head_dim()
        dimensions: tuple[Dimension, ...] = ()
        shown = None
        if scaling is not None:
            self._check_effect(scaling)
            shown = self._shown_length(scaling)
            dimensions = self._dimensions(scaling, head_dim, shown)
        if self.own is not None and self.spec is None:
            self._check_against_transformers(self.own)
        self._check_origin()
        order = {level: place for place, level in enumerate(LEVELS)}
        return Inspection(
            source=self.source,
            model_type=self.model_type,
            scaling=scaling,
            head_dim=head_dim,
            numbers=tuple(self._numbers(scaling, head_dim, shown)) if scaling is not None else (),
            layers=self._layers(),
            without_rope=tuple(self._without_rope()),
            lengths=self._lengths(scaling, shown),
            native=self._native(scaling, head_dim),
            dimensions=dimensions,
            findings=tuple(sorted(dict.fromkeys(self.findings), key=lambda finding: order[finding.level])),
        )

    # ---- the two views

    def _completed(self) -> dict[str, Any]:
        """The text part as written, with the sizes that the config class fills in."""
        names = ["max_position_embeddings", "original_max_position_embeddings", "sliding_window"]
        names += ["head_dim", "qk_rope_head_dim", "hidden_size", "num_attention_heads"]
        names += ["layer_types", "num_hidden_layers", "model_type"]
        filled = {name: getattr(self.object, name, None) for name in names} if self.object is not None else {}
        written = {name: value for name, value in self.text.items() if value is not None}
        return {name: value for name, value in filled.items() if value is not None} | written

    def _checked_layer_type(self, layer_type: str | None) -> str | None:
        """Raises ConfigError for a layer type that the model does not have."""
        known = list(dict.fromkeys([*nested_types(self.rope), *(self._layer_types())]))
        if layer_type is not None and layer_type not in known:
            if not known:
                raise ConfigError(f"layer_type={layer_type!r}: this config tells no layer types apart")
            raise ConfigError(f"layer_type={layer_type!r}: must be one of {', '.join(known)}")
        return layer_type

    def _layer_types(self) -> list[str]:
        types = self.complete.get("layer_types")
        return [kind for kind in types if isinstance(kind, str)] if isinstance(types, list | tuple) else []

    def _entry(self) -> dict[str, Any]:
        """The RoPE dictionary of the layers in question, as written."""
        if not nested_types(self.rope):
            return self.rope
        entry = self.rope.get(self.layer_type or PRIMARY_LAYER_TYPE)
        return dict(entry) if isinstance(entry, Mapping) else {}

    def _rope_type(self) -> Any:
        entry = self._entry()
        return entry.get("rope_type", entry.get("type", "default"))

    def _without(self, names: Sequence[str]) -> dict[str, Any]:
        """The completed config without some keys of its RoPE dictionary."""
        config = copy.deepcopy(self.complete)
        for place in ("rope_scaling", "rope_parameters"):
            rope = config.get(place)
            if isinstance(rope, dict):
                for part in (rope, *(rope[name] for name in nested_types(rope))):
                    for name in names:
                        part.pop(name, None)
        if not self.text:  # a RoPE dictionary without a model
            config = {key: value for key, value in self.rope.items() if key not in names}
        return config

    def _read(self) -> None:
        """The scaling that the config means, or findings that say why it means none."""
        self.ignored = self._check_keys()
        config = self._without(list(self.ignored))
        try:
            self.own, self.notes = RopeScaling.read_config(config, self.layer_type)
        except ConfigError as error:
            self._report_error(str(error))
        except _UNREADABLE as error:
            self.find(
                "bad-value", "error", f"The config cannot be read: {one_line(error)}.", "Correct the types in it."
            )
        for note in self.notes:
            self._add_note(note)

    def _report_error(self, message: str) -> None:
        text = message if message.endswith((".", "?")) else f"{message}."
        if message.startswith("unknown rope_type"):
            self.find("unknown-type", "error", text, "Write a rope_type that the program at hand knows.")
        elif message.startswith("factor is missing"):
            self.find("no-factor", "error", text, "Write factor = extended length / original length.")
        else:
            self.find("bad-value", "error", text, "Correct the value.")

    def _add_note(self, note: ConfigNote) -> None:
        level: Level = _NOTE_LEVELS.get(note.code, note.level)
        text = note.text
        if note.code == "no-original":
            self._judge_missing_original(note)
            return
        twice = self.model_type in SOFTMAX_MSCALE_FAMILIES and note.text.startswith("mscale_all_dim")
        if note.code == "lone-mscale" and twice:
            self.find(
                "mscale-twice",
                "warning",
                "mscale_all_dim without mscale: the model's attention multiplies the softmax scale by its square, and "
                "cos and sin get 0.1·ln(s) + 1 on top, because only the ratio of both mscales cancels that.",
                "Write mscale as well, equal to mscale_all_dim, as the published models have it.",
            )
            return
        if note.code == "both-dialects":
            one, other = self.text.get("rope_scaling"), self.text.get("rope_parameters")
            same = _comparable(one) == _comparable(other)
            level = "info" if same else "warning"
            text += "; they say the same" if same else f"; they disagree: {_differences(one, other)}"
        if note.code == "mistral-constants":
            text += self._against_vanilla()
        self.find(note.code, level, f"{text}.", _REMEDIES.get(note.code, ""))

    # ---- checks

    def _check_names(self) -> None:
        """Keys on the top level that look like ones that count."""
        known = set(_TOP_LEVEL)
        if self.object is not None:
            known |= {f.name for f in dataclasses.fields(self.object)}
        for place in (self.raw, self.text) if self.text is not self.raw else (self.raw,):
            for key, value in place.items():
                if key in known or value is None:
                    continue
                near = difflib.get_close_matches(key, _TOP_LEVEL, n=1, cutoff=0.87)
                if near and near[0] not in place:
                    self.find(
                        "misspelt-key",
                        "error",
                        f"{key!r} is no key that anything reads, so what it says has no effect.",
                        f"Probably meant: {near[0]!r}.",
                    )

    def _check_family(self) -> None:
        """Whether there is anything to scale."""
        if self.object is None or has_rope(self.object):
            return
        said = sorted({*self.text} & {"rope_scaling", "rope_parameters", "rope_theta"})
        text = f"transformers takes no RoPE parameters for models of type {self.model_type!r}: "
        if said:
            text += f"{' and '.join(said)} {'has' if len(said) == 1 else 'have'} no effect."
            self.find("no-rope", "error", text, "Delete it; a scaling of RoPE does nothing for this model.")
        else:
            text += "most likely it has no rotary embedding, and then nothing in this report applies."
            self.find("no-rope", "warning", text)

    def _check_keys(self) -> dict[str, Any]:
        """Keys of the RoPE dictionary that its rope_type does not have; transformers goes on without them."""
        rope_type = self._rope_type()
        rope_type = "longrope" if rope_type == "su" else rope_type
        entry = self._entry()
        if not isinstance(rope_type, str) or rope_type not in (*NATIVE, *_RELEASED_TYPES):
            return {}
        own = NATIVE[
            "linear" if rope_type == "dynamic-linear" else "yarn" if rope_type in _RELEASED_TYPES else rope_type
        ]
        known = {*own.keys, *_SHARED_KEYS, "original_max_position_embeddings", *attention_keys(self.model_type)}
        ignored: dict[str, Any] = {}
        for key, value in entry.items():
            if key in known or isinstance(value, Mapping) or key == "mrope_section":
                continue
            if nested_types(self.rope) and key == "truncate":
                continue  # read_config says what becomes of it
            ignored[key] = value
            owners = [name for name, native in NATIVE.items() if key in native.keys]
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            level: Level = "error"
            if key in _FOREIGN:
                neutral, remedy = _FOREIGN[key]
                level = "info" if value == neutral else "error"
                remedy = f"Delete it; {remedy}." if level == "error" else "Delete it: this value changes nothing."
                code = "foreign-key"
            elif owners:
                code, remedy = "unknown-key", f"It belongs to rope_type {' or '.join(map(repr, owners))}."
            else:
                code = "unknown-key"
                remedy = (
                    f"Probably meant: {near[0]!r}."
                    if near
                    else f"Keys of this rope_type: {', '.join(sorted(own.keys))}."
                )
            text = (
                f"{key}={_short(value)} is no key of rope_type {rope_type!r}: transformers logs a line and ignores it."
            )
            self.find(code, level, text, remedy)
        return ignored

    def _judge_missing_original(self, note: ConfigNote) -> None:
        """Without L, transformers takes max_position_embeddings for it; often that is L' already."""
        context = self._context() or 0
        factor = self.own.factor if self.own is not None else 1.0
        assumed = context / factor if factor > 1 else 0.0
        # The lengths that models are pre-trained with are powers of two; extended ones start at 16384.
        if assumed >= 512 and math.log2(assumed).is_integer() and context >= 16384:
            self.find(
                "factor-twice",
                "warning",
                f"original_max_position_embeddings is missing, so max_position_embeddings={context} is taken for it "
                f"and the scaling leads to {factor * context:.0f} tokens. If {context} is the extended length already, "
                f"the factor counts twice, and the original length is {assumed:.0f}.",
                f"Write original_max_position_embeddings: {assumed:.0f} or {context}.",
            )
        else:
            self.find(note.code, note.level, f"{note.text}.", _REMEDIES[note.code])

    def _check_lengths(self, own: RopeScaling) -> None:
        """factor, L and max_position_embeddings must go together. For llama3 the factor is no ratio of lengths."""
        context, original = self._context(), own.original_max_position_embeddings
        if own.method in ("linear", "ntk") and own.factor > 1 and not self._original_is_written() and context:
            self.find(
                "unknown-original",
                "info",
                f"The config does not say the original length. max_position_embeddings={context} is taken for it, but "
                f"by another habit that is the extended length, and the original one {context / own.factor:.0f}; the "
                "frequencies are the same.",
                "Write original_max_position_embeddings, for programs and people that need it.",
            )
            return
        by_length = METHODS[own.method].needs_original and own.method not in ("llama3", "dynamic-ntk")
        if not by_length or own.factor <= 1 or context is None or original is None:
            return
        extended = own.factor * original
        if abs(context - extended) <= 1e-3 * extended or not self._original_is_written():
            return
        if context == original:
            self.find(
                "undeclared-length",
                "warning",
                f"max_position_embeddings={context} is still the original length, although the factor {own.factor:g} "
                f"leads to {extended:.0f}: programs that take their limit from it stop at {context}. Or {context} is "
                "the extended length, and then the factor counts twice.",
                f"Write max_position_embeddings={extended:.0f}, or correct original_max_position_embeddings.",
            )
            return
        meaning = "below" if context < extended else "above"
        self.find(
            "length-mismatch",
            "warning",
            f"factor {own.factor:g} times original_max_position_embeddings={original} is {extended:.0f}, "
            f"max_position_embeddings={context} is {meaning} that. transformers only logs it and scales by the factor; "
            "programs that take their limit from max_position_embeddings "
            + ("stop early." if context < extended else "go where the scaling does not reach."),
            f"Write max_position_embeddings={extended:.0f}, or the factor {context / original:g} if the model was "
            "trained so.",
        )

    def _original_is_written(self) -> bool:
        return any(
            place.get("original_max_position_embeddings") is not None for place in (self._entry(), self.complete)
        )

    def _check_against_transformers(self, own: RopeScaling) -> None:
        """What transformers does with the same config."""
        rope_type = self._rope_type()
        if self._is_phi3_rewrite(rope_type):
            return
        if self.refusal:
            if self._found("bad-value"):
                return  # the same in other words
            self.find(
                "transformers-refuses",
                "error",
                f"transformers {transformers.__version__} does not accept this config: {self.refusal}.",
                "Use a scaling that the family has, or load it with scaled_rope.load_model.",
            )
            return
        written, other = self.text.get("rope_parameters"), self.text.get("rope_scaling")
        if other and isinstance(written, Mapping) and not nested_types(written) and isinstance(other, Mapping):
            theta = written.get("rope_theta")
            if theta is not None and other.get("rope_theta") is None and self.text.get("rope_theta") is None:
                self.find(
                    "theta-dropped",
                    "error",
                    f"rope_theta={theta!r} is in rope_parameters only, and rope_scaling replaces all of "
                    f"rope_parameters: {own.rope_theta:g} is used.",
                    "Move the scaling into rope_parameters, beside rope_theta, and delete rope_scaling.",
                )
        if rope_type == CUSTOM_ROPE_TYPE:
            self.find(
                "not-native",
                "info",
                f"rope_type {CUSTOM_ROPE_TYPE!r} is this package's own: other programs refuse to build the model.",
                "Load it with scaled_rope.load_model; `scaled-rope export` looks for words for other programs.",
            )
        elif rope_type in _RELEASED_TYPES:
            self.find(
                "not-native",
                "warning",
                f"rope_type {rope_type!r} is known to the code that was released with YaRN and to this package; "
                "transformers cannot build the model.",
                "`scaled-rope export` looks for words for the program at hand.",
            )
        elif not self._found("mistral-constants", "stale-record"):
            difference = self._against_vanilla()
            if difference:
                self.find(
                    "computes-otherwise",
                    "error",
                    f"transformers {transformers.__version__} computes other numbers from this config than it "
                    f"says{difference}.",
                    "Load it with scaled_rope.load_model, or write what is meant in other words "
                    "(`scaled-rope export`).",
                )

    def _is_phi3_rewrite(self, rope_type: Any) -> bool:
        if self.model_type != "phi3" or rope_type in (*_PHI3_TYPES, "su", CUSTOM_ROPE_TYPE):
            return False
        said = (
            "is rewritten to 'longrope' by the config class of Phi-3, which then misses its lists of factors"
            if rope_type == "yarn"
            else "is refused by the config class of Phi-3, which takes 'default' and 'longrope' only"
        )
        self.find(
            "phi3-rewritten" if rope_type == "yarn" else "phi3-refused",
            "error",
            f"rope_type {rope_type!r} {said}.",
            'Leave the scaling out of the config and patch the loaded model: patch_model(model, "yarn:8").',
        )
        return True

    def _against_vanilla(self) -> str:
        """How transformers' numbers differ from ours, in words to go on with; empty when they don't."""
        head_dim = self._head_dim()
        if self.own is None or self.object is None or head_dim is None:
            return ""
        try:
            with quiet():
                theirs, their_factor = _vanilla(self.object, self.layer_type)
            ours, our_factor = compute_rope(self.own.of_frequencies, head_dim)
        except Exception:  # not comparable: another finding says why, or the family computes by itself
            return ""
        return describe_difference(theirs, their_factor, ours, our_factor, "transformers", "meant")

    def _check_effect(self, scaling: RopeScaling) -> None:
        """What the scaling does in use."""
        self._check_dependence(scaling)
        factor = scaling.factor
        finetuned = bool(self._entry().get("finetuned")) and self.spec is None
        trained = self.model_type in _TRAINED_WITH_THEIRS and self.spec is None
        changes = scaling.method in _CHANGES_SHORT_PROMPTS and factor > 1 and not scaling.dynamic
        if changes and not finetuned and not trained:
            self.find(
                "static-scaling",
                "info",
                f"{scaling.label} is in effect at every length: a model that was not fine-tuned with it does worse on "
                f"prompts that fit the original length than without it.",
                f'Use "dynamic-{scaling.method}", or serve short prompts from an unscaled endpoint; nothing to do if '
                "the model was trained with it.",
            )
        self._check_reach(scaling)
        if self.raw.get("alibi") is True and self.model_type == "falcon":
            self.find(
                "alibi",
                "error" if scaling.method != "default" else "info",
                "alibi=true: the model has no rotary embedding, and what the config says about RoPE has no effect.",
                "Remove the scaling; for longer contexts ALiBi has to be changed, not RoPE."
                if scaling.method != "default"
                else "",
            )
        entry = self._entry()
        if self.model_type in SOFTMAX_MSCALE_FAMILIES and entry.get("mscale") and entry.get("mscale_all_dim"):
            s = math.log(max(factor, 1.0))
            value = (0.1 * float(entry["mscale_all_dim"]) * s + 1) ** 2 if is_number(entry["mscale_all_dim"]) else 1
            self.find(
                "mscale-softmax",
                "info",
                f"Models of type {self.model_type} multiply the softmax scale by (0.1·mscale_all_dim·ln s + 1)² = "
                f"{value:.4g} in their attention; the attention factor of cos and sin here is only the ratio of both "
                "mscales. That scale is fixed when the model is built.",
                "To change the scaling edit config.json: patch_model refuses to leave that scale behind.",
            )

    def _check_dependence(self, scaling: RopeScaling) -> None:
        if scaling.method == "dynamic-ntk":
            self.find(
                "dynamic-cache",
                "warning",
                "The base grows with the sequence, but transformers and most servers cache keys that are rotated "
                "already: cached and new keys then disagree, and what the model says depends on earlier inputs.",
                "Use a static scaling for generation, or load with scaled_rope.load_model, which caches keys "
                "before rotation.",
            )
        elif scaling.dynamic:
            self.find(
                "dynamic-cache",
                "info",
                f"{scaling.label}: frequencies depend on the length of each sequence, so keys must be cached before "
                "rotation. This package does so; other programs do not run this scaling.",
                "Nothing to do here; for servers, export a static scaling for one length.",
            )
        elif scaling.method == "longrope":
            self.find(
                "longrope-switch",
                "info",
                f"longrope changes its table at {scaling.original_max_position_embeddings} tokens: within one "
                "generation that crosses it, keys cached before are rotated by the other one.",
                "Decide by the final length: prompt and new tokens together.",
            )

    def _check_reach(self, scaling: RopeScaling) -> None:
        """Whether layers see as far as the scaling reaches."""
        window, types = self._window(), self._layer_types()
        extended = scaling.max_position_embeddings if scaling.method != "llama3" else None
        context = extended or self._context()
        slides = not types or set(types) == {"sliding_attention"}
        if window is not None and context is not None and window < context and slides:
            self.find(
                "sliding-window",
                "warning" if scaling.method != "default" and scaling.factor > 1 else "info",
                f"Every layer looks back {window} tokens only, the context is {context}: what is further back reaches "
                "a token through other layers or not at all.",
                "The Yarn-Mistral models were trained and evaluated with the window as wide as the context: set "
                f"sliding_window to {context} or null.",
            )
        without = self._without_rope()
        total = self.complete.get("num_hidden_layers") or len(types)
        if without:
            adapter = ADAPTERS.get(str(self.model_type))
            only_near = adapter is not None and bool(adapter.rope_layer_type) and scaling.factor > 1
            why = "they were dropped" if self._dropped() else "by design"
            text = f"{len(without)} of {total} layers use no rotary embedding, {why}; a scaling leaves them alone."
            if only_near:
                text += f" Those that use it look back {window} tokens only, so a scaling has nothing to extend."
            remedy = "Leave RoPE unscaled." if only_near else ""
            self.find("layers-without-rope", "warning" if only_near else "info", text, remedy)

    def _check_origin(self) -> None:
        """Where the config comes from."""
        if self._entry().get("finetuned") is True:
            self.find(
                "finetuned",
                "info",
                "finetuned=true is read by the code that was released with YaRN: a dynamic scaling then starts at the "
                "factor instead of 1. Static ones are the same with and without; transformers logs a line.",
            )
        code = self.raw.get("auto_map")
        names = sorted({str(value) for value in code.values()}) if isinstance(code, Mapping) else []
        known = self.model_type is not None and self.model_type in transformers.CONFIG_MAPPING
        if names:
            self.find(
                "remote-code",
                "info" if known else "warning",
                f"auto_map names code in the checkpoint ({', '.join(names)}). It is never run here; with "
                "trust_remote_code=True it would replace the model's classes, rotary embedding included. "
                + (f"Read as model_type {self.model_type!r} of transformers." if known else "Nothing else knows it."),
                "Leave trust_remote_code off." if known else "Compare with the code what this report says.",
            )
        elif self.model_type is not None and not known:
            self.find(
                "unknown-family",
                "warning",
                f"transformers {transformers.__version__} does not know model_type {self.model_type!r}: this report is "
                "from the config's keys alone.",
                "Compare with the model's code what this report says.",
            )

    # ---- the numbers

    def _head_dim(self) -> int | None:
        # The first is the rotated part of DeepSeek's heads.
        sizes = [_whole(self.complete.get(name)) for name in ("qk_rope_head_dim", "head_dim")]
        size = next((size for size in sizes if size is not None), None) or config_head_dim(self.complete)
        return size if size is not None and size <= _MAX_HEAD_DIM else None

    def _window(self) -> int | None:
        used = self.complete.get("use_sliding_window", True) is not False
        return _whole(self.complete.get("sliding_window")) if used else None

    def _context(self) -> int | None:
        return _whole(self.complete.get("max_position_embeddings"))

    def _without_rope(self) -> list[int]:
        own = layers_without_rope(self.object) if self.object is not None else []
        return sorted({*own, *self._dropped()})

    def _dropped(self) -> tuple[int, ...]:
        """Layers that `patch_model` left without RoPE."""
        try:
            return LayerPlan.from_config(self.complete).drop_layers
        except _UNREADABLE:
            return ()  # `_read` says why

    def _layers(self) -> dict[str, RopeScaling]:
        """The scaling of each layer type, where there is more than one."""
        config = self._without(list(self.ignored))
        record = self.complete.get(RECORD_KEY)
        by_record = record.get("layers") if isinstance(record, Mapping) else None
        types = list(dict.fromkeys(self._layer_types()))
        own = self.model_type in ADAPTERS and ADAPTERS[self.model_type].per_layer_type
        if not own and not nested_types(self.rope) and not isinstance(by_record, Mapping):
            return {}
        found = {}
        for name in types or nested_types(self.rope):
            try:
                found[name] = RopeScaling.read_config(config, name)[0]
            except _UNREADABLE as error:
                if self.own is not None:
                    self.find("bad-value", "error", f"layer type {name!r}: {one_line(error)}.", "Correct the value.")
        return found if len(found) > 1 else {}

    def _native(self, scaling: RopeScaling | None, head_dim: int | None) -> str | None:
        if scaling is None:
            return None
        name = native_type(scaling, head_dim)
        return name if self.model_type != "phi3" or name in _PHI3_TYPES else None

    def _shown_length(self, scaling: RopeScaling) -> int | None:
        """The sequence length that the table of a length-dependent scaling is for."""
        original = scaling.original_max_position_embeddings
        if not scaling.is_length_dependent or original is None:
            return None
        if self.asked_length is not None:
            return self.asked_length
        longest = max(scaling.max_position_embeddings or 0, self._context() or 0)
        return longest if longest > original else 2 * original

    def _dimensions(self, scaling: RopeScaling, head_dim: int | None, length: int | None) -> tuple[Dimension, ...]:
        if head_dim is None:
            return ()
        try:
            theta = compute_rope(RopeScaling.from_spec("default", scaling), head_dim)[0].double().tolist()
            scaled = compute_rope(scaling.of_frequencies, head_dim, length)[0].double().tolist()
        except ConfigError as error:
            self.find("bad-value", "error", f"{error}.", "Correct the value, or head_dim.")
            return ()
        names = regimes_of(scaling, head_dim, length)
        original = scaling.original_max_position_embeddings
        return tuple(
            Dimension(
                index=index,
                wavelength=2 * math.pi / a,
                rotations=None if original is None else original * a / (2 * math.pi),
                theta=a,
                scaled=b,
                divisor=a / b if b else None,
                regime=name,
            )
            for index, (a, b, name) in enumerate(zip(theta, scaled, names, strict=True))
        )

    def _lengths(self, scaling: RopeScaling | None, shown: int | None) -> dict[str, int | None]:
        extends = scaling is not None and scaling.factor > 1 and scaling.method != "llama3"
        extends = extends and not self._found("unknown-original")
        return {
            "original": scaling.original_max_position_embeddings if scaling is not None else None,
            "extended": scaling.max_position_embeddings if extends and scaling is not None else None,
            "max_position_embeddings": self._context(),
            "sliding_window": self._window(),
            "shown": shown,
        }

    def _numbers(self, scaling: RopeScaling, head_dim: int | None, shown: int | None) -> Iterator[Number]:
        """Every value in effect, and where it is from."""
        written = {**self.text, **self._entry()}

        def origin(name: str, *others: str) -> str:
            return "config" if any(written.get(key) is not None for key in (name, *others)) else "default"

        row = METHODS[scaling.method]
        yield Number("method", scaling.method, f"{row.summary} ({row.source})")
        if self.layer_type or nested_types(self.rope):
            yield Number("layer type", self.layer_type or PRIMARY_LAYER_TYPE)
        if self.spec is None and self._entry():
            yield Number("rope_type", self._rope_type(), "config")
        if "factor" in row.fields and not (row.factor_optional and scaling.factor == 1):
            where = "spec" if self.spec else "config" if written.get("factor") is not None else "derived"
            yield Number("factor", scaling.factor, where)
        original = scaling.original_max_position_embeddings
        said = "config" if self._original_is_written() else "from max_position_embeddings"
        said += ", may be the extended length" if self._found("unknown-original", "factor-twice") else ""
        yield Number("original_max_position_embeddings", original, said if original is not None else "not said")
        yield Number("rope_theta", scaling.rope_theta, origin("rope_theta", "rotary_emb_base"))
        if head_dim is not None:
            yield Number("head_dim", head_dim, "config" if self.text.get("head_dim") else "derived")
            try:
                dim: int | None = scaling.rotary_dim(head_dim)
            except ConfigError:
                dim = None  # `_dimensions` reports it
            yield Number("partial_rotary_factor", scaling.partial_rotary_factor, origin("partial_rotary_factor"))
            yield Number("rotated dimensions", dim, "derived")
        yield Number(
            "dynamic", scaling.dynamic or row.length_dependent, "" if not shown else f"shown at {shown} tokens"
        )
        if scaling.resonance:
            yield Number("resonance", True, "wavelengths are whole numbers")
        if "ramp" in row.fields:
            fast, slow = scaling.ramp_bounds
            yield Number("beta_fast", fast, "default" if scaling.beta_fast is None else "set")
            yield Number("beta_slow", slow, "default" if scaling.beta_slow is None else "set")
            yield Number("ramp", scaling.ramp or "dimension", "default" if scaling.ramp is None else "set")
            if scaling.ramp != "rotations":
                yield Number(
                    "truncate", scaling.truncate is not False, "default" if scaling.truncate is None else "set"
                )
            share = scaling.extrapolation_factor
            yield Number("extrapolation_factor", 1.0 if share is None else share, "default" if share is None else "set")
        if "mscale" in row.fields and scaling.attention_factor is None:
            yield Number("mscale", 1.0 if scaling.mscale is None else scaling.mscale, "in 0.1·mscale·ln(s) + 1")
        if row.params_type is not None:
            for f in dataclasses.fields(row.params_type):
                yield Number(
                    f.name, getattr(scaling.method_params, f.name), "set" if f.name in scaling.params else "default"
                )
        attention = scaling.static_attention_factor
        if scaling.dynamic and head_dim is not None:
            attention = compute_rope(scaling, head_dim, shown)[1]
        source = "set" if scaling.attention_factor is not None else "derived"
        yield Number("attention factor √(1/t)", attention, f"{source}; t = {1 / attention**2:.4g}")
        if self.spec is None:
            yield Number("finetuned", bool(self._entry().get("finetuned")), origin("finetuned"))


def _whole(value: Any) -> int | None:
    return int(value) if is_positive_whole(value) else None


def _comparable(rope: Any) -> Any:
    if not isinstance(rope, Mapping):
        return rope
    values = {key: value for key, value in rope.items() if key not in ("type", "rope_type", "rope_theta")}
    return values | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}


def _differences(one: Any, other: Any) -> str:
    a, b = _comparable(one), _comparable(other)
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        return f"{_short(one)} and {_short(other)}"
    names = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
    return ", ".join(f"{name} {_short(a.get(name))} and {_short(b.get(name))}" for name in names)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _vanilla(config: Any, layer_type: str | None) -> tuple[Tensor, float]:
    """What transformers computes from a config object: frequencies [D/2] and attention factor, at no length."""
    rope = config.rope_parameters
    nested = nested_types(rope)
    layer_type = (layer_type or PRIMARY_LAYER_TYPE) if nested else None
    entry = rope[layer_type] if nested else rope
    if entry["rope_type"] != "default":
        inv_freq, factor = ROPE_INIT_FUNCTIONS[entry["rope_type"]](config, torch.device("cpu"), layer_type=layer_type)
        return inv_freq, float(factor)
    partial = entry.get("partial_rotary_factor", 1.0)
    plain = RopeScaling("default", rope_theta=float(entry["rope_theta"]), partial_rotary_factor=partial)
    head_dim = config_head_dim(config)
    if head_dim is None:
        raise ConfigError("head_dim is not known")
    return compute_rope(plain, head_dim)


# --------------------------------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope inspect`: 1 when there is an error among the findings, else 0.

    Raises:
        ConfigError: bad input.
    """
    check_inspect_arguments(args)
    if args.plot:
        check_format(Path(args.plot))
    report = inspect(args.model, args.layer_type, args.scaling, args.length)
    if args.weights:
        findings = [*report.findings, *check_model(_load(args.model))]
        report = dataclasses.replace(report, findings=tuple(dict.fromkeys(findings)))
    if args.plot:
        if report.scaling is None or report.head_dim is None or not report.dimensions:
            raise ConfigError(f"plot {args.plot!r}: there are no frequencies to draw, see the findings without --plot")
        title = f"{args.model}: {report.scaling.label}"
        plot_scaling(report.scaling, report.head_dim, Path(args.plot), title, report.lengths["shown"])
    if args.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        print(report.text(args.full))
        if args.plot:
            print(f"wrote {args.plot}")
    return report.exit_code


def _load(name: str) -> nn.Module:
    """The model as transformers itself loads it; where it cannot, as we do."""
    path = Path(name)
    folder = str(path.parent) if path.is_file() else name
    with quiet():
        try:
            model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, trust_remote_code=False
            )
        except Exception:  # its own errors are many; load_model says what is wrong in one line
            model = load_model(folder)
    return model
