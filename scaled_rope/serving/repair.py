"""`scaled-rope repair`: a config.json that says what it was meant to say, where `inspect` finds that it does not.

Only what a config says about RoPE is changed, one key at a time and with the reason. Where a config can be read in two
ways, the choice is asked for. The result is inspected again: one with an error left is not written. Weights are not
touched.
"""

from __future__ import annotations

import argparse
import copy
import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError, is_number, unknown
from scaled_rope.files import write_atomic
from scaled_rope.flags.serving import check_repair_arguments, parse_assumptions
from scaled_rope.scaling.formulas import attention_factor_of
from scaled_rope.scaling.hf_config import (
    FAMILY_THETA,
    NATIVE,
    NESTED_FAMILIES,
    PRIMARY_LAYER_TYPE,
    SOFTMAX_MSCALE_FAMILIES,
    comparable,
    nested_types,
    unread_keys,
    usual_name,
)
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.checks_keys import has_no_effect, misspelt_keys, owners_of
from scaled_rope.serving.checks_lengths import (
    length_other_than_factor_times_original,
    undeclared_extended_length,
    unsaid_original_length,
)
from scaled_rope.serving.checks_notes import remarks_of_the_reader
from scaled_rope.serving.checks_transformers import rope_type_that_transformers_has_not
from scaled_rope.serving.config_facts import RELEASED_TYPES, ConfigFacts, known_keys, read_facts
from scaled_rope.serving.config_file import config_as_dictionary, read_config_file
from scaled_rope.serving.inspect_config import inspect
from scaled_rope.serving.inspect_report import Inspection
from scaled_rope.serving.rotary_module import shares_one_table


class _ABSENT:
    """Stands for a key that is not there. A class, so that copies keep its identity."""


_L, _CONTEXT = "original_max_position_embeddings", "max_position_embeddings"


@dataclass(frozen=True)
class Change:
    """One key of a config that was mended."""

    key: str
    """With the keys that lead to it, joined by dots."""
    before: Any
    after: Any
    reason: str
    """Why, as a clause to go on with."""

    def __str__(self) -> str:
        before, after = (("-" if value is _ABSENT else _shown(value)) for value in (self.before, self.after))
        return f"{self.key}: {before} -> {after}  ({self.reason})"

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON; a value that was or is not there is left out."""
        values = {"key": self.key, "before": self.before, "after": self.after, "reason": self.reason}
        return {name: value for name, value in values.items() if value is not _ABSENT}


@dataclass(frozen=True)
class Repair:
    """A mended config."""

    config: dict[str, Any]
    changes: tuple[Change, ...]
    """In the order in which they were made; empty when there was nothing to mend."""
    report: Inspection
    """The report of `inspect` on the result."""


@dataclass
class _Draft:
    """A config while it is mended."""

    config: dict[str, Any]
    assume: Mapping[str, str]
    """Choices that were made, field -> value."""
    changes: list[Change] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Fields of `assume` that were asked for."""
    open: dict[str, str] = field(default_factory=dict)
    """Fields that must be chosen, with what there is to choose from."""
    read: tuple[int, ConfigFacts] | None = None
    """The facts after so many changes."""

    def facts(self) -> ConfigFacts:
        """The config as it is now."""
        if self.read is None or self.read[0] != len(self.changes):
            self.read = len(self.changes), read_facts(copy.deepcopy(self.config))
        return self.read[1]

    def text(self, facts: ConfigFacts) -> tuple[dict[str, Any], str]:
        """The text part, to be changed in place, and the keys that lead to it with a dot at the end."""
        part, prefix = self.config, ""
        for name in facts.path:
            if not isinstance(part.get(name), dict):
                break
            part, prefix = part[name], f"{prefix}{name}."
        return part, prefix

    def entry(self, facts: ConfigFacts) -> tuple[dict[str, Any], str] | None:
        """The RoPE dictionary of the layers that see the whole context, and the keys that lead to it; None without."""
        text, prefix = self.text(facts)
        name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
        rope = text.get(name)
        if not isinstance(rope, dict):
            return None
        prefix += f"{name}."
        nested = nested_types(rope)
        if not nested:
            return rope, prefix
        kind = PRIMARY_LAYER_TYPE if PRIMARY_LAYER_TYPE in nested else nested[0]
        return rope[kind], f"{prefix}{kind}."

    def set(self, place: dict[str, Any], prefix: str, key: str, value: Any, reason: str) -> None:
        before = place.get(key, _ABSENT)
        if before is _ABSENT or before != value:
            place[key] = value
            self.changes.append(Change(f"{prefix}{key}", copy.deepcopy(before), copy.deepcopy(value), reason))

    def delete(self, place: dict[str, Any], prefix: str, key: str, reason: str) -> None:
        self.changes.append(Change(f"{prefix}{key}", place.pop(key), _ABSENT, reason))

    def choose(self, name: str, options: Mapping[str, str]) -> str | None:
        """The choice that was made of a field; None when it is still to be made.

        options: value -> what it means. "NUMBER" stands for any number.
        """
        self.used.add(name)
        if name not in self.assume:
            self.open[name] = " or ".join(f"--assume {name}={value} ({meaning})" for value, meaning in options.items())
            return None
        value = self.assume[name]
        if value not in options and not (_number(value) is not None and "NUMBER" in options):
            raise unknown(f"value of --assume {name}:", value, options)
        return value


def _shown(value: Any) -> str:
    """A value as JSON, with long lists by their length."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"[{len(value)} values]"
    return json.dumps(value, ensure_ascii=False, default=str)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _tidy(value: float) -> float | int:
    """A whole number without its point."""
    return int(value) if value == int(value) else value


# --------------------------------------------------------------------------------------------------------- the repairs


def _rename_misspelt_keys(draft: _Draft, facts: ConfigFacts) -> None:
    text, prefix = draft.text(facts)
    for in_text, key, meant in list(misspelt_keys(facts)):
        place, before = (text, prefix) if in_text else (draft.config, "")
        value = place[key]
        draft.delete(place, before, key, "nothing reads it")
        draft.set(place, before, meant, value, f"the key that {key!r} was meant for")


def _move_into_the_text_part(draft: _Draft, facts: ConfigFacts) -> None:
    """Keys of a composite config beside its text part."""
    text, prefix = draft.text(facts)
    for key, where in unread_keys(facts.raw, facts.path).items():
        if not has_no_effect(facts, key):
            continue
        outer, outer_prefix = _holder(draft.config, facts.path, key)
        value, name = copy.deepcopy(outer[key]), where.rpartition(".")[2]
        inner = _said_inside(text, key)
        if inner is not None and comparable(inner) != comparable(value):
            chosen = draft.choose(key, {"outer": f"what stands outside of {name}", "inner": f"what {name} says"})
            if chosen is None:
                continue
            value = value if chosen == "outer" else None
        elif inner is not None:
            value = None
        draft.delete(outer, outer_prefix, key, f"nobody reads it outside of {where}")
        if value is None:
            continue
        if key == "rope_theta":
            _set_theta(draft, facts, value, "where it is read")
        else:
            # Where the text part has a dictionary of its own, which says no scaling, it goes into that.
            place = next((one for one in ("rope_parameters", "rope_scaling") if text.get(one)), key)
            draft.set(text, prefix, place, _merged(text.get(place), value), "where it is read")


def _holder(config: dict[str, Any], path: Sequence[str], key: str) -> tuple[dict[str, Any], str]:
    """The innermost part on the way to the text part that has a key."""
    part, prefix, found = config, "", (config, "")
    for name in path:
        if part.get(key):
            found = part, prefix
        part, prefix = part[name], f"{prefix}{name}."
    return found


def _said_inside(text: Mapping[str, Any], key: str) -> Any:
    """The text part's own words on the same matter; None where it has none, or no scaling."""
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    if key == "rope_theta":
        inside = rope.get("rope_theta") if isinstance(rope, Mapping) else None
        return text.get("rope_theta") if inside is None else inside
    unscaled = isinstance(rope, Mapping) and usual_name(rope.get("rope_type", rope.get("type", "default"))) == "default"
    return None if not rope or (unscaled and not nested_types(rope)) else rope


def _merged(inner: Any, outer: Any) -> Any:
    """A RoPE dictionary together with the base, the share and the axes of the unscaled one that it replaces."""
    if not isinstance(inner, Mapping) or not isinstance(outer, Mapping) or nested_types(outer):
        return outer
    named = {name: value for name, value in outer.items() if name != "type"}
    named["rope_type"] = outer.get("rope_type", outer.get("type", "default"))
    return {name: value for name, value in inner.items() if name not in ("rope_type", "type")} | named


def _set_theta(draft: _Draft, facts: ConfigFacts, value: Any, reason: str) -> None:
    text, prefix = draft.text(facts)
    rope = text.get("rope_parameters")
    if not text.get("rope_scaling") and isinstance(rope, dict) and not nested_types(rope):
        draft.set(rope, f"{prefix}rope_parameters.", "rope_theta", value, reason)
        if "rope_theta" in text:
            draft.delete(text, prefix, "rope_theta", "its value stands in rope_parameters")
    else:
        draft.set(text, prefix, "rope_theta", value, reason)


def _choose_a_dialect(draft: _Draft, facts: ConfigFacts) -> None:
    """rope_scaling and rope_parameters that disagree, or the first dropping the base that the second says."""
    text, prefix = draft.text(facts)
    older, newer = text.get("rope_scaling"), text.get("rope_parameters")
    if not isinstance(older, dict) or not isinstance(newer, dict) or not older or not newer or nested_types(newer):
        return
    theta = newer.get("rope_theta")
    dropped = theta is not None and older.get("rope_theta") is None and text.get("rope_theta") is None
    if comparable(older) == comparable(newer) and not dropped:
        return
    unscaled = [usual_name(one.get("rope_type", one.get("type", "default"))) == "default" for one in (older, newer)]
    if comparable(older) == comparable(newer) or unscaled == [False, True]:
        chosen: str | None = "rope_scaling"
    elif unscaled == [True, False]:
        chosen = "rope_parameters"
    else:
        said = {name: _shown(text[name]) for name in ("rope_scaling", "rope_parameters")}
        chosen = draft.choose("dialect", said)
    if chosen is None:
        return
    value = dict(newer)
    if chosen == "rope_scaling":
        value = _merged(newer if unscaled[1] else {} if theta is None else {"rope_theta": theta}, older)
    draft.delete(text, prefix, "rope_scaling", "two dictionaries that disagree; transformers reads this one alone")
    draft.set(text, prefix, "rope_parameters", value, f"what {chosen} says, with the base")


def _correct_the_type(draft: _Draft, facts: ConfigFacts) -> None:
    """Names of a rope_type that the family does not know, and two names at once."""
    found = draft.entry(facts)
    if found is None:
        return
    entry, prefix = found
    older, newer = entry.get("type"), entry.get("rope_type")
    if older is not None and newer is not None and usual_name(older) not in ("default", usual_name(newer)):
        chosen = draft.choose("rope_type", {str(newer): "what programs read", str(older): "the key type"})
        if chosen is None:
            return
        draft.set(entry, prefix, "rope_type", chosen, "two names for the type")
        draft.delete(entry, prefix, "type", "two names for the type")
    elif older is not None and newer is None and facts.model_type in NESTED_FAMILIES and older != "default":
        draft.delete(entry, prefix, "type", f"{facts.model_type} reads rope_type alone")
        draft.set(entry, prefix, "rope_type", usual_name(older), "what type says")
    written = str(newer or older).strip()
    names = {name.lower(): name for name in (*NATIVE, *RELEASED_TYPES)}
    folded = written.lower().replace("_", "-")
    near = [names[folded]] if folded in names else difflib.get_close_matches(folded, NATIVE, n=2)
    near = [str(usual_name(folded))] if usual_name(folded) != folded else near
    if near and str(facts.read_error).startswith("unknown rope_type"):
        chosen = near[0] if len(near) == 1 else draft.choose("rope_type", dict.fromkeys(near, "the nearest name"))
        if chosen is None:
            return
        draft.set(entry, prefix, "rope_type", chosen, f"no program knows the name {written!r}")
        if older is not None:
            draft.delete(entry, prefix, "type", "no program knows the name")
    if any(finding.level == "error" for finding in rope_type_that_transformers_has_not(draft.facts())):
        for key in ("rope_type", "type"):
            if key in entry:
                draft.set(entry, prefix, key, usual_name(entry[key]), "an older name, which this family does not know")


_TOP_NUMBERS = ("max_position_embeddings", _L, "rope_theta", "partial_rotary_factor", "rope_local_base_freq")
_NO_NUMBERS = ("rope_type", "type")


def _write_numbers_as_numbers(draft: _Draft, facts: ConfigFacts) -> None:
    """Numbers, and truth values, that are written as text."""
    text, prefix = draft.text(facts)
    places = [(text, prefix, [name for name in _TOP_NUMBERS if name in text])]
    for name in ("rope_scaling", "rope_parameters"):
        rope = text.get(name)
        if isinstance(rope, dict):
            places.append((rope, f"{prefix}{name}.", [key for key in rope if key not in _NO_NUMBERS]))
            places += [(rope[kind], f"{prefix}{name}.{kind}.", list(rope[kind])) for kind in nested_types(rope)]
    for place, before, keys in places:
        for key in keys:
            value = _of_text(place[key])
            if value is not None and key not in _NO_NUMBERS:
                draft.set(place, before, key, value, "it was written as text")


def _of_text(value: Any) -> float | int | bool | None:
    """The number or truth value that a text spells; None for anything else."""
    if not isinstance(value, str):
        return None
    if value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    number = _number(value)
    if number is None:
        return None
    return int(number) if value.strip().lstrip("+-").isdecimal() else number


def _nest_per_layer_type(draft: _Draft, facts: ConfigFacts) -> None:
    """Flat rope_parameters of a family that has one dictionary per layer type and drops flat ones."""
    text, prefix = draft.text(facts)
    rope = text.get("rope_parameters")
    if facts.model_type not in NESTED_FAMILIES or text.get("rope_scaling") or not isinstance(rope, dict) or not rope:
        return
    nested = nested_types(rope)
    beside = {key: value for key, value in rope.items() if key not in nested and key != "truncate"}
    if nested and "truncate" in rope.get(PRIMARY_LAYER_TYPE, {}) and "truncate" not in rope:
        value = rope[PRIMARY_LAYER_TYPE]["truncate"]
        draft.delete(
            rope[PRIMARY_LAYER_TYPE], f"{prefix}rope_parameters.{PRIMARY_LAYER_TYPE}.", "truncate", "not read here"
        )
        draft.set(rope, f"{prefix}rope_parameters.", "truncate", value, "read beside the layer types")
    if nested or not beside:
        return
    thetas: Any = FAMILY_THETA[str(facts.model_type)]
    thetas = thetas if isinstance(thetas, dict) else dict.fromkeys((PRIMARY_LAYER_TYPE, "sliding_attention"), thetas)
    full = {"rope_theta": text.get("rope_theta") or thetas[PRIMARY_LAYER_TYPE]} | beside
    local = text.get("rope_local_base_freq") or thetas["sliding_attention"]
    value = {PRIMARY_LAYER_TYPE: full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
    value |= {"truncate": rope["truncate"]} if "truncate" in rope else {}
    draft.set(text, prefix, "rope_parameters", value, f"{facts.model_type} drops a flat dictionary")


def _flatten_for_one_table(draft: _Draft, facts: ConfigFacts) -> None:
    """Entries per layer type of a family whose layers share one table: transformers reads none of them."""
    text, prefix = draft.text(facts)
    place = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    rope = text.get(place)
    if not isinstance(rope, dict) or facts.built is None or facts.model_type in NESTED_FAMILIES:
        return
    entries = {name: rope[name] for name in nested_types(rope)}
    if not entries or not shares_one_table(facts.built):
        return
    beside = {key: value for key, value in rope.items() if key not in entries and key not in ("rope_type", "type")}
    flat = {name: beside | entry for name, entry in entries.items()}
    first = next(iter(flat))
    of_layers = set(facts.layer_types) or set(entries)
    if of_layers <= {first} or (of_layers <= set(flat) and all(flat[name] == flat[first] for name in of_layers)):
        chosen: str | None = first
    elif len(of_layers) == 1 and of_layers <= set(flat):
        chosen = next(iter(of_layers))
    else:
        chosen = draft.choose(place, {name: f"{_shown(entry)} for all layers" for name, entry in flat.items()})
    if chosen is not None:
        draft.set(text, prefix, place, flat[chosen], f"all layers of {facts.model_type} models share one table")


def _correct_keys(draft: _Draft, facts: ConfigFacts) -> None:
    """Keys that the rope_type does not have: misspelt ones, those of another type, and those that say nothing."""
    found = draft.entry(facts)
    known = known_keys(facts)
    if found is None or known is None:
        return
    entry, prefix = found
    for key, value in facts.ignored.items():
        if key not in entry or key in _MEANT_AS_FACTOR or (key == "attn_factor" and value != 1):
            continue  # `_choose_the_attention_factor`
        if key in _NEUTRAL:
            if value == _NEUTRAL[key]:
                draft.delete(entry, prefix, key, "this value changes nothing")
            continue
        owners = owners_of(key)
        meant = _nearest(key, known - set(entry))
        if meant is not None and not owners:
            draft.delete(entry, prefix, key, "nothing reads it")
            draft.set(entry, prefix, meant, value, f"the key that {key!r} was meant for")
            continue
        own = str(usual_name(facts.rope_type))
        options = {own: f"then {key} goes"} | {name: f"the type that has {key}" for name in owners if name != own}
        chosen = draft.choose("rope_type", options) if owners else own
        if chosen == own:
            draft.delete(entry, prefix, key, f"rope_type {own!r} has no such key, so it has no effect")
        elif chosen is not None:
            draft.set(entry, prefix, "rope_type", chosen, f"the type that {key} belongs to")
            if "type" in entry:
                draft.delete(entry, prefix, "type", "rope_type says it")


_NEUTRAL = {"extrapolation_factor": 1.0, "apply_yarn_scaling": True, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0}
_NEUTRAL["attn_factor"] = 1.0
_MEANT_AS_FACTOR = ("short_mscale", "long_mscale")


def _nearest(key: str, known: set[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.8)), None)


def _choose_the_attention_factor(draft: _Draft, facts: ConfigFacts) -> None:
    """Keys that some programs read as an attention factor and others do not."""
    found, own = draft.entry(facts), facts.own
    if found is None or own is None or own.method not in ("yarn", "longrope"):
        return
    entry, prefix = found
    ours = own.static_attention_factor
    default = attention_factor_of(math.log(own.factor), 1.0)
    attn = entry.get("attn_factor")
    if own.method == "yarn" and attn is not None and is_number(attn) and attn != 1:
        product = default * attn
        if entry.get("attention_factor") is not None and math.isclose(product, ours, rel_tol=1e-5):
            return
        meanings = {f"{product:.6g}": "as SGLang and vLLM 0.11 have it", f"{ours:.6g}": "as transformers and vLLM 0.33"}
        chosen = draft.choose("attention_factor", meanings | {"NUMBER": "another"})
        if chosen is None:
            return
        exact = {f"{product:.6g}": product, f"{ours:.6g}": ours}
        value = exact.get(chosen, float(chosen))
        draft.set(
            entry, prefix, "attention_factor", _rounded(value), "the whole factor, for programs that read this key"
        )
        if math.isclose(value, default, rel_tol=1e-6):
            draft.delete(entry, prefix, "attn_factor", "a multiplier of the default factor, which counts")
        else:
            draft.set(entry, prefix, "attn_factor", value / default, "its quotient by 0.1·ln(s) + 1, for SGLang")
        return
    mscales = [entry.get(name) for name in _MEANT_AS_FACTOR]
    if own.method == "longrope" and facts.ignored.keys() & set(_MEANT_AS_FACTOR) and mscales[0] == mscales[1]:
        meanings = {f"{mscales[0]:.6g}": "as vLLM and SGLang have it", f"{ours:.6g}": "as transformers has it"}
        chosen = draft.choose("attention_factor", meanings)
        if chosen is not None:
            value = mscales[0] if chosen == f"{mscales[0]:.6g}" else ours
            for name in ("attention_factor", *_MEANT_AS_FACTOR):
                draft.set(entry, prefix, name, value, "programs differ in which of the three they read")


def _rounded(value: float) -> float:
    """Without the rounding error of a product: 1.0 for 0.9999999999999999."""
    near = float(f"{value:.6g}")
    return near if math.isclose(value, near, rel_tol=1e-9) else value


def _pair_mscales(draft: _Draft, facts: ConfigFacts) -> None:
    """One of mscale and mscale_all_dim without the other."""
    found, own = draft.entry(facts), facts.own
    if found is None or own is None or not any(note.code == "lone-mscale" for note in facts.notes):
        return
    entry, prefix = found
    given = "mscale" if entry.get("mscale") else "mscale_all_dim"
    if given == "mscale_all_dim" and facts.model_type in SOFTMAX_MSCALE_FAMILIES:
        value = entry[given]
        meant = {
            f"{value}": "as published: only the softmax scale changes",
            "0": "cos and sin get 0.1·ln(s) + 1 as well",
        }
        chosen = draft.choose("mscale", meant)
        if chosen == "0":
            draft.set(
                entry, prefix, "attention_factor", own.static_attention_factor, "what programs compute without mscale"
            )
        elif chosen is not None:
            draft.set(entry, prefix, "mscale", value, "without it cos and sin are multiplied as well")
        return
    log_factor = math.log(own.factor)
    ours, meant_factor = own.static_attention_factor, attention_factor_of(log_factor, float(entry[given]))
    options = {f"{ours:.6g}": "what programs compute", f"{meant_factor:.6g}": f"0.1·{given}·ln(s) + 1"}
    chosen = draft.choose("attention_factor", options | {"NUMBER": "another"})
    if chosen is None:
        return
    value = {f"{ours:.6g}": ours, f"{meant_factor:.6g}": meant_factor}.get(chosen, float(chosen))
    draft.set(entry, prefix, "attention_factor", _rounded(value), f"programs ignore {given} alone")
    draft.delete(entry, prefix, given, "without the other mscale it has no effect")


def _write_mistral_constants(draft: _Draft, facts: ConfigFacts) -> None:
    """A released Yarn-Mistral model, whose constants are in its own code alone."""
    found, own = draft.entry(facts), facts.own
    if found is None or own is None or not any(note.code == "mistral-constants" for note in facts.notes):
        return
    entry, prefix = found
    reason = "a constant of the code that was released with the model, which other programs do not know"
    draft.set(entry, prefix, "beta_fast", own.beta_fast, reason)
    draft.set(entry, prefix, "beta_slow", own.beta_slow, reason)
    draft.set(entry, prefix, "attention_factor", own.static_attention_factor, reason)


def _choose_the_theta(draft: _Draft, facts: ConfigFacts) -> None:
    """A base on the top level and another one in the RoPE dictionary."""
    text, prefix = draft.text(facts)
    found = draft.entry(facts)
    if found is None or facts.nested:
        return
    inside, outside = found[0].get("rope_theta"), text.get("rope_theta")
    if not is_number(inside) or not is_number(outside) or inside == outside:
        return
    meanings = {f"{inside:g}": "in the dictionary, which counts today", f"{outside:g}": "on the top level"}
    chosen = draft.choose("rope_theta", meanings)
    if chosen is not None:
        value = inside if chosen == f"{inside:g}" else outside
        draft.set(found[0], found[1], "rope_theta", value, "two bases")
        draft.set(text, prefix, "rope_theta", value, "two bases")


def _say_the_original_length(draft: _Draft, facts: ConfigFacts) -> None:
    """L, where programs would take max_position_embeddings for it."""
    found, own, context = draft.entry(facts), facts.own, facts.context
    if found is None or own is None or context is None:
        return
    codes = {finding.code for finding in (*remarks_of_the_reader(facts), *unsaid_original_length(facts))}
    if not codes & {"no-original", "factor-twice", "unknown-original"}:
        return
    if facts.original_is_written or own.factor <= 1:
        return
    value = context
    if "factor-twice" in codes or _L in draft.assume:
        options = {f"{context / own.factor:.0f}": f"then {context} is the extended length", f"{context}": "trained so"}
        chosen = draft.choose(_L, options | {"NUMBER": "another"})
        if chosen is None:
            return
        number = float(chosen)
        if number < 1 or number % 1:
            raise ConfigError(f"--assume {_L}={chosen}: must be a whole number of tokens, at least 1")
        value = int(number)
    elif "no-original" not in codes:
        return
    draft.set(found[0], found[1], _L, value, "without it programs take max_position_embeddings for it")


def _declare_the_length(draft: _Draft, facts: ConfigFacts) -> None:
    """A max_position_embeddings other than factor times L."""
    own, context = facts.own, facts.context
    if own is None or context is None:
        return
    if not [*undeclared_extended_length(facts), *length_other_than_factor_times_original(facts)]:
        return
    text, prefix = draft.text(facts)
    extended = own.max_position_embeddings or 0
    if context < extended:
        draft.set(text, prefix, _CONTEXT, extended, "factor times the original length; programs stop there")
        return
    found, ratio = draft.entry(facts), context / (own.original_max_position_embeddings or 1)
    options = {f"{own.factor:g}": f"then {_CONTEXT} is {extended}", f"{ratio:g}": f"for {context} tokens"}
    chosen = draft.choose("factor", options)
    if chosen is None or found is None:
        return
    if chosen == f"{own.factor:g}":
        draft.set(text, prefix, _CONTEXT, extended, "factor times the original length; beyond it nothing is scaled")
    else:
        draft.set(found[0], found[1], "factor", _tidy(ratio), f"{_CONTEXT} over the original length")


_REPAIRS: tuple[Callable[[_Draft, ConfigFacts], None], ...] = (
    _rename_misspelt_keys,
    _write_numbers_as_numbers,
    _move_into_the_text_part,
    _choose_a_dialect,
    _flatten_for_one_table,
    _correct_the_type,
    _nest_per_layer_type,
    _correct_keys,
    _choose_the_theta,
    _write_mistral_constants,
    _choose_the_attention_factor,
    _pair_mscales,
    _say_the_original_length,
    _declare_the_length,
)
"""In an order in which each sees what the ones before have put right."""


def repair(source: str | Path | Mapping[str, Any], assume: Mapping[str, str] | None = None) -> Repair:
    """Mend what a config says about RoPE.

    Args:
        source: a model's folder, a config.json, a hub name or a config as a dictionary; left as it is.
        assume: choices between two readings, field -> value.

    Raises:
        ConfigError: nothing there; a choice that is to be made, or that nobody asks for; an error that is left.
    """
    raw = read_config_file(source) if isinstance(source, str | Path) else config_as_dictionary(source)
    draft = _Draft(copy.deepcopy(raw), dict(assume or {}))
    for step in _REPAIRS:
        step(draft, draft.facts())
    if draft.open:
        raise ConfigError(f"two readings: choose {'; and '.join(draft.open.values())}")
    for name in draft.assume:
        if name not in draft.used:
            raise ConfigError(f"--assume {name}={draft.assume[name]}: nothing in this config leaves {name} open")
    report = inspect(draft.config)
    errors = [finding for finding in report.findings if finding.level == "error"]
    if errors:
        left = "; ".join(f"[{finding.code}] {finding.text} {finding.remedy}".strip() for finding in errors)
        raise ConfigError(f"this cannot be mended without knowing the model: {left}")
    return Repair(draft.config, tuple(draft.changes), report)


# --------------------------------------------------------------------------------------------------------- the command


def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope repair`: 0 when the config is whole, or was mended.

    Raises:
        ConfigError: bad input, a choice that is to be made, an error that cannot be mended.
    """
    check_repair_arguments(args)
    result = repair(args.model, parse_assumptions(args.assume))
    written = None
    if result.changes and args.output:
        written = Path(args.output) / "config.json"
        _write(written, result.config)
    if args.json:
        print(json.dumps(_as_json(result, written), indent=1))
    else:
        print("\n".join(_lay_out(args.model, result, written)))
    return 0


def _write(path: Path, config: Mapping[str, Any]) -> None:
    """Write a config that appears only when it is complete."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"--output {path.parent} cannot be written to: {error.strerror}") from error


def _as_json(result: Repair, written: Path | None) -> dict[str, Any]:
    return {
        "changes": [change.to_dict() for change in result.changes],
        "config": result.config,
        "findings": result.report.to_dict()["findings"],
        "written": None if written is None else str(written),
    }


def _lay_out(name: str, result: Repair, written: Path | None) -> Iterator[str]:
    label = _label(result.report.scaling)
    if not result.changes:
        yield f"{name}: nothing to mend, it says {label}; nothing was written"
    else:
        count = len(result.changes)
        yield f"{name}: {count} change{'s' if count > 1 else ''}, it says {label} now"
        for change in result.changes:
            yield f"  {change}"
    warnings = [finding for finding in result.report.findings if finding.level == "warning"]
    if warnings:
        yield "left as they are, see inspect:"
        for finding in warnings:
            yield f"  [{finding.code}] {finding.text}"
    if result.changes and written is None:
        yield "nothing was written: --output DIR writes DIR/config.json"
    elif written is not None:
        yield f"wrote {written}"


def _label(scaling: RopeScaling | None) -> str:
    return "no scaling" if scaling is None else scaling.label
