"""The settings with which other programs run a scaling, and the numbers that they compute then.

Each program has its own words for a scaling and its own arithmetic. `export` finds words for a target, computes what
the target computes from them, and compares that with `compute_rope`: only words that give our numbers are called exact.
For transformers the target itself is run; the others are restated here in plain float64 Python, each at one version.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from scaled_rope.checkpoint import raw_config
from scaled_rope.errors import ConfigError, check_name, unknown
from scaled_rope.files import scratch_path, write_atomic
from scaled_rope.flags.serving import check_export_arguments
from scaled_rope.scaling.dialects import older_keys
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import (
    RECORD_KEY,
    SOFTMAX_MSCALE_FAMILIES,
    has_rope,
    head_dim_of,
    nested_types,
    primary_type,
    read_by_attention,
)
from scaled_rope.scaling.known_lengths import DUAL_CHUNK_KEY, dual_chunks
from scaled_rope.scaling.record import LayerPlan, RopeScaling, RopeSettings
from scaled_rope.scaling.registry import METHODS
from scaled_rope.scaling.resolve import resolve_scaling, with_primary
from scaled_rope.serving.checks_lengths import shortening
from scaled_rope.serving.config_facts import text_part
from scaled_rope.serving.config_remarks import config_remarks, load_readable
from scaled_rope.serving.export_report import Comparison, ExportReport
from scaled_rope.serving.gguf import GgufRope, add_rope, held_scaling
from scaled_rope.serving.rotary_module import shares_one_table
from scaled_rope.serving.targets.common import (
    TOLERANCE,
    Expressed,
    Restated,
    ServedModel,
    Target,
    build_patched,
    config_of,
    native_keys,
    nest,
    without_older,
)
from scaled_rope.serving.targets.hf import numbers_in_transformers
from scaled_rope.serving.targets.registry import TARGETS

_SAID_BY_EXPORT = ("sliding-window", "not-native", "shortened")
"""Findings about a config.json that a report has in its own words, or mends."""

_CONVERTED = ("llama.cpp", "ollama")
"""Targets that read no config.json but a file that is converted from one."""


def served_length(scaling: RopeScaling, config: Any, flag: str = "--length") -> int:
    """N where nothing is said: factor times L; without a factor, or where it is the least that the scaling is for, what
    the checkpoint claims.

    flag: where a caller may say it.

    Raises:
        ConfigError: neither says one.
    """
    claimed = int(getattr(config, "max_position_embeddings", None) or 0)
    extended = scaling.max_position_embeddings or 0
    if not claimed and not extended:
        raise ConfigError(f"{flag} is needed: the config of this {config.model_type!r} model says no length")
    settings = RopeSettings(config)
    if scaling.factor > 1 and scaling != settings.scaling:
        return extended
    if scaling.factor > 1 and METHODS[scaling.method].factor_times_original == "length" and extended:
        return settings.reach or extended
    return max(claimed, extended)


def export(
    scaling: RopeScaling | str,
    config: Any,
    target: Target | str,
    length: int | None = None,
    raw: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Say `scaling` in the words of `target` and compare the numbers that it makes of the printed texts with ours.

    Args:
        scaling: a record, or a spec relative to what the config carries.
        config: the model's config, an object of transformers; of a composite one the text part is scaled.
        target: a `Target` or a name in `TARGETS`.
        length: the longest sequence to serve, in tokens; None: see `served_length`.
        raw: the config.json that `config` was read from; None: what `config` says.

    Of several ways to say it the first one is taken whose numbers are ours at every length, or else the nearest.

    Raises:
        ConfigError: an unknown target, or a scaling that does not fit the model. What the target cannot express is no
            error but a report with status "refused".
    """
    if isinstance(target, str):
        if target not in TARGETS:
            raise unknown("target", target, TARGETS)
        target = TARGETS[target]
    request = _request(scaling, config, length, raw)
    name = f"{target.title} {target.version}"
    reason = _no_words(request, target)
    if nested_types(request.carried) and not reason:
        return _per_layer_type(request, target, name)
    best, failure = (None, "") if reason else _nearest_words(request, target)
    reason = reason or failure
    if best is None:
        return ExportReport(request.scaling, name, "refused", reason or f"no words for {request.scaling.label!r}")
    if not any(c.matches for c in best[1]):  # words that it takes, and computes something else from
        reason = f"{_difference(best[1][0], target)}{'; in other words: ' if reason else ''}{reason}"
        return ExportReport(request.scaling, name, "refused", reason, comparisons=best[1])
    words, comparisons = best
    matches = [c.matches for c in comparisons]
    return ExportReport(
        scaling=request.scaling,
        target=name,
        status=_status(matches, target.known(request) and not _in_chunks(request, target)),
        config=nest(words.config | _record(request, words.config), request.written_path),
        flags=words.flags,
        command=target.command.format(flags=shlex.join(words.flags)).strip(),
        gguf=words.gguf,
        converts=words.converts,
        notes=(*_notes(request, target, words), *words.notes),
        comparisons=comparisons,
        files=dict(words.files),
        basis=target.basis,
        config_place=target.config_place,
    )


def _record(request: ServedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """Our record to go beside keys that would be read back as another scaling, such as NTK-aware as a larger base.

    Nothing where these keys are no form of the record (a table of frequencies): it would count as out of date.
    """
    chunks = {DUAL_CHUNK_KEY: getattr(request.config, DUAL_CHUNK_KEY, None)}
    said = {"model_type": request.model_type, "head_dim": request.head_dim, **chunks, **config}
    record = {RECORD_KEY: request.scaling.to_dict()}
    try:
        if RopeSettings(said).scaling == request.scaling:
            return {}
        if RopeSettings(said | record).scaling != request.scaling:
            return {}
    except ConfigError:  # keys for one program alone
        return {}
    return record


def _difference(comparison: Comparison, target: Target) -> str:
    """Say in words what a target would compute instead."""
    off = []
    if comparison.max_relative_difference > TOLERANCE:
        worst = f"dimension {comparison.worst_dimension}"
        off.append(f"frequencies up to {100 * comparison.max_relative_difference:.3g}% off ({worst})")
    if abs(comparison.attention_difference) > TOLERANCE * comparison.ours:
        off.append(f"the attention factor {comparison.attention_factor:.6g} instead of {comparison.ours:.6g}")
    return f"from what can be told it, {target.title} computes {' and '.join(off)}"


def _status(matches: Sequence[bool], known: bool) -> str:
    """Of numbers that are ours at some length at least."""
    if not all(matches):
        return "partial"
    return "exact" if known else "unknown"


def _request(scaling: RopeScaling | str, whole: Any, length: int | None, raw: Mapping[str, Any] | None) -> ServedModel:
    """Raises ConfigError for a model without RoPE, a bad spec or length."""
    config, path = text_part(whole)
    if not has_rope(config):
        raise ConfigError(f"transformers takes no RoPE parameters for model_type {config.model_type!r}")
    if isinstance(scaling, str):  # remarks on a config.json are for the caller who has it
        if raw is None:
            RopeScaling.from_config(config)  # says its remarks
        scaling = resolve_scaling(scaling, RopeSettings(config).scaling)
    if length is not None and length < 1:
        raise ConfigError(f"length={length}: must be a positive number of tokens")
    raw = whole.to_dict() if raw is None else raw
    return ServedModel(scaling, config, head_dim_of(config), length or served_length(scaling, config), path, raw)


def _nearest_words(request: ServedModel, target: Target) -> tuple[tuple[Expressed, tuple[Comparison, ...]] | None, str]:
    """The words of a target whose numbers are ours at most lengths, and the first reason why others cannot be said."""
    best: tuple[Expressed, tuple[Comparison, ...]] | None = None
    reason = ""
    try:
        for words in target.express(request):
            try:
                comparisons = tuple(_worst(request, target, words))
            except ConfigError as error:
                reason = reason or str(error)
                continue
            if best is None or sum(c.matches for c in comparisons) > sum(c.matches for c in best[1]):
                best = words, comparisons
            if all(c.matches for c in comparisons):
                break
    except ConfigError as error:
        reason = reason or str(error)
    return best, reason


def _no_words(request: ServedModel, target: Target) -> str:
    """Why no words of the target can do it, or nothing."""
    scaling = request.scaling
    if target.name == "vllm" and _chunks(request) and scaling.method != "default":
        return (
            f"vLLM (its source at 07b12f1b; {target.version} was not read for this) takes its own rotary embedding for "
            f"attention in chunks wherever the config has {DUAL_CHUNK_KEY}, whatever the type of rope_parameters, and "
            f"flags do not clear that key: delete it from config.json for {scaling.label!r}"
        )
    if scaling.beyond_tables:
        return f"{scaling.method!r} {scaling.beyond_tables}; no server computes it: use patch_model of this package"
    nested = nested_types(request.carried)
    if nested and shares_one_table(request.config):
        return (
            f"the config has entries per layer type ({', '.join(nested)}), and all layers of {request.model_type!r} "
            "models share one table: `scaled-rope repair` writes the entry that is meant"
        )
    plan = LayerPlan.from_config(request.config)
    if plan.drop_layers:
        dropped = ", ".join(map(str, plan.drop_layers))
        return (
            f"layers {dropped} of this checkpoint have no rotary embedding, which no server can be told: use load_model"
        )
    if not nested and len(set(map(repr, plan.layers.values()))) > 1:
        return (
            f"layers of type {', '.join(plan.layers)} of this checkpoint have scalings of their own, which no server "
            "can be told: use load_model"
        )
    model_type, carried = request.config.model_type, request.carried
    softmax = carried.get("mscale_all_dim") if carried.get("rope_type") != "default" else None
    if softmax and model_type in SOFTMAX_MSCALE_FAMILIES:
        return (
            f"the attention of {model_type} models takes a softmax scale from mscale_all_dim={softmax!r} as well, "
            "which words for a scaling would drop: save the model that patch_model made instead, whose scale follows"
        )
    if scaling.dynamic:
        static = target.static or "it has no words for it: use patch_model of this package"
        if target.static:
            static += f"; serve the static form for the length you need, --scaling {scaling.method}:FACTOR"
        return f"{scaling.label!r} follows the length of each sequence, but {static}"
    if scaling.method == "dynamic-ntk" and target.static:
        return (
            f"{scaling.label!r} follows the length of each sequence, but {target.static}; serve NTK-aware scaling "
            "for the length you need, --scaling ntk:FACTOR"
        )
    return ""


def _per_layer_type(request: ServedModel, target: Target, name: str) -> ExportReport:
    """The report on a family with a table per layer type: transformers builds each of them, others are not restated.

    Only the layers of the primary type are scaled, as by `patch_model`.
    """
    scaling, carried = request.scaling, LayerPlan.from_config(request.config).layers
    wanted = with_primary(carried, scaling)
    as_it_is = wanted == carried
    types = RopeSettings(request.config).layer_types  # small models may have layers of one type alone
    present = {kind: one for kind, one in wanted.items() if kind in types} or wanted
    if target.name != "transformers" and not as_it_is:
        reason = (
            f"the config has a scaling per layer type, for which {target.title} has no words here: write it by "
            "`scaled-rope export --for transformers`, or save the model that patch_model made, and serve that folder"
        )
        return ExportReport(scaling, name, "refused", reason)
    if target.name in _CONVERTED:
        reason = "the config has a scaling per layer type, and what its converter makes of that was not read"
        return ExportReport(scaling, name, "refused", reason)
    rope, raw = request.carried, dict(request.raw)
    words = Expressed({}, config_of(request, rope, request.length))
    if not as_it_is:
        entry = native_keys(request)
        if entry is None:
            reason = f"it has no words for {scaling.label!r} per layer type: use load_model of this package"
            return ExportReport(scaling, name, "refused", reason)
        kind = primary_type(nested_types(rope))
        words = Expressed({}, config_of(request, {**rope, kind: read_by_attention(rope[kind]) | entry}, request.length))
        raw = build_patched(raw, words.config, request.written_path)
    try:
        comparisons = tuple(_compare_layers(request, raw, present))
    except ConfigError as error:
        return ExportReport(scaling, name, "refused", f"{error}; use load_model of this package")
    off = next((one for one in comparisons if not one.matches), None)
    if off is not None:
        reason = f"in {off.layer_type} layers, {_difference(off, TARGETS['transformers'])}"
        return ExportReport(scaling, name, "refused", reason, comparisons=comparisons)
    notes, in_transformers = [], target.name == "transformers"
    if as_it_is:
        notes.append("serve this folder as it is: its config.json says this scaling, layer type by layer type")
    if in_transformers:
        notes += _notes(request, target, words)
    else:
        notes.append(
            f"numbers not compared for {target.title}, whose reading of a scaling per layer type is not restated here; "
            f"transformers {transformers.__version__} computes ours in layers of each type ({', '.join(present)}). "
            "Check a running server with scaled-rope certify"
        )
    return ExportReport(
        scaling=scaling,
        target=name,
        status="exact" if in_transformers else "unknown",
        config=nest(words.config | _record(request, words.config), request.written_path),
        command=target.command.format(flags="").strip(),
        notes=tuple(notes),
        comparisons=comparisons if in_transformers else (),
        basis=target.basis if in_transformers else "",
        config_place=target.config_place if in_transformers else "in config.json",
    )


def _compare_layers(
    request: ServedModel, raw: dict[str, Any], layers: Mapping[str, RopeScaling]
) -> Iterator[Comparison]:
    """Compare what transformers computes from a whole config.json, in layers of each type, with ours.

    Raises:
        ConfigError: it cannot build the model, or has other tables.
    """
    for layer_type, scaling in layers.items():
        for length in _lengths(scaling, request.length, static=False):
            theirs = Restated(*numbers_in_transformers(request, raw, length, layer_type))
            yield replace(_against(scaling, request.head_dim, length, theirs), layer_type=layer_type)


def _notes(request: ServedModel, target: Target, words: Expressed) -> list[str]:
    """Notes that hold for every target."""
    scaling, notes = request.scaling, []
    if target.static and scaling.method != "default" and scaling.factor > 1 and not scaling.is_length_dependent:
        notes.append(f"{target.title} scales short prompts as well: it computes one table for all lengths")
    context = int(getattr(request.config, "max_position_embeddings", None) or 0)
    settings = RopeSettings(request.config)
    if shorter := shortening(scaling, settings.scaling, context, settings.reach):
        notes.append(shorter)
    made_for = settings.length_for(scaling)
    if made_for is not None and request.length > made_for and not scaling.is_length_dependent:
        note = f"length={request.length} is beyond the {made_for} tokens that {scaling.label!r} is for"
        if METHODS[scaling.method].factor_times_original == "length":
            reaches = request.length / (scaling.original_max_position_embeddings or made_for)
            note += f"; a factor of {reaches:.4g} reaches it"
        notes.append(note)
    if not target.static and scaling.is_length_dependent:
        notes.append(
            "exact for one pass over a sequence; cached keys keep the rotation of the length they were made at"
        )
    if not target.known(request):
        notes.append(
            f"unknown for this class: the numbers are those of {target.title}'s rotary embedding, but what its code "
            f"for {request.whole_type!r} passes on to it is not known; compare the outputs before you rely on it"
        )
    if _in_chunks(request, target):
        if target.name == "vllm":
            does = f"vLLM (its source at 07b12f1b) computes Dual Chunk Attention where the config has {DUAL_CHUNK_KEY}"
        else:
            does = f"what {target.title} makes of {DUAL_CHUNK_KEY} is not known"
        notes.append(f"{does}: the numbers here are those of plain RoPE")
    if other := _installed_otherwise(target):
        notes.append(other)
    if target.older and scaling.method != "default":
        notes.append(_older_note(request, target, words))
    window = getattr(request.config, "sliding_window", None)
    if window is not None and window < request.length:
        notes.append(f"sliding_window={window} of the config is shorter than {request.length} tokens")
    return notes


def _chunks(request: ServedModel) -> Mapping[str, Any]:
    return dual_chunks(getattr(request.config, DUAL_CHUNK_KEY, None))


def _in_chunks(request: ServedModel, target: Target) -> bool:
    """Whether the config asks for attention in chunks, and the program may do it. transformers does not."""
    return target.name != "transformers" and bool(_chunks(request))


def _installed_otherwise(target: Target) -> str:
    """A warning where another release of the program is installed than the one that is restated, or nothing."""
    if not target.package:
        return ""
    try:
        installed = importlib.metadata.version(target.package)
    except importlib.metadata.PackageNotFoundError:
        return ""
    if installed == target.package_version:
        return ""
    return (
        f"{target.package} {installed} is installed here, and this is about {target.package_version}: "
        "check a running server with scaled-rope certify"
    )


def _older_note(request: ServedModel, target: Target, words: Expressed) -> str:
    """A sentence on releases that do not know `rope_parameters`, and on whether they are served as well."""
    ignored = f"{target.older} and older read rope_scaling and rope_theta instead, and ignore rope_parameters"
    keys, reason = older_keys({**without_older(words.config), "model_type": request.model_type})
    if not keys:
        return f"{ignored}; they are not written as well: {reason}"
    return f"{ignored}; config.json has them as well{', the flags do not' if words.flags else ''}"


def _worst(request: ServedModel, target: Target, words: Expressed) -> Iterator[Comparison]:
    """For every length the worst of what the target computes from each text that it is told by.

    Raises:
        ConfigError: it reads nothing from one of them, or refuses it.
    """
    readings = [_compare(request, target, replace(words, given=given)) for given in target.read(request, words)]
    for same_length in zip(*readings, strict=True):
        yield max(same_length, key=lambda c: (not c.matches, c.max_relative_difference))


def _compare(request: ServedModel, target: Target, words: Expressed) -> Iterator[Comparison]:
    """The target's numbers against ours, at every length where ours may differ."""
    for length in _lengths(request.scaling, request.length, bool(target.static)):
        theirs = target.restate(request, words, length)
        if theirs.rows is not None and theirs.rows < request.length:
            raise ConfigError(f"length={request.length}: its table of these words ends at {theirs.rows} positions")
        yield _against(request.scaling, request.head_dim, length, theirs)


def _lengths(scaling: RopeScaling, length: int, static: bool) -> list[int]:
    """Sequence lengths at which our numbers may differ, up to `length` and, unless `static`, beyond it."""
    lengths = {length}
    if scaling.is_length_dependent:
        original = int(scaling.original_max_position_embeddings or length)
        lengths |= {min(original, length)} | (set() if static else {2 * original})
    return sorted(lengths)


def _against(scaling: RopeScaling, head_dim: int, length: int, theirs: Restated) -> Comparison:
    """A target's numbers for one length against ours."""
    ours, factor = compute_rope(scaling, head_dim, length)
    if len(theirs.inv_freq) != len(ours):
        raise ConfigError(f"it makes {len(theirs.inv_freq)} frequencies of it, and the scaling has {len(ours)}")
    # Below 1e-12 (a turn in 6e12 tokens) a frequency is 0 for all purposes.
    off = [abs(a - b) / max(b, 1e-12) for a, b in zip(theirs.inv_freq, ours.tolist(), strict=True)]
    worst = max(range(len(off)), key=off.__getitem__)
    return Comparison(length, off[worst], worst, theirs.attention_factor, factor)


# The command ---------------------------------------------------------------------------------------------------------
def run(args: argparse.Namespace) -> int:
    """Carry out `scaled-rope export`: 0 when the target's numbers are ours, 1 when they differ, 2 when it has no words.

    Raises:
        ConfigError: bad input; a scaling that the target has no words for (with --json that is printed instead).
    """
    check_export_arguments(args)
    path = Path(args.model)
    name = str(path.parent) if path.name == "config.json" and path.is_file() else args.model
    config, raw = load_readable(name, args.model), raw_config(name)
    remarks = config_remarks(raw, args.model, args.scaling, without=_SAID_BY_EXPORT, length=args.length)
    report = export(args.scaling, config, args.target, args.length, raw)
    report = dataclasses.replace(report, notes=(*remarks, *report.notes))
    if report.gguf is not None and not args.gguf and not report.converts and report.exit_code != 2:
        reason = (
            f"it has no flags for {report.scaling.label!r}, only a tensor in the GGUF: "
            "name a GGUF of the model with --gguf FILE --output DIR"
        )
        report = dataclasses.replace(report, status="refused", reason=reason)
    if args.gguf and report.gguf is None and report.exit_code != 2:
        report = _with_copy(report, args.gguf)
    written = []
    if args.output and report.exit_code != 2:
        check_name(args.output, "--output")
        written = _write(Path(args.output), raw, report, args.gguf)
    if args.json:
        print(json.dumps(report.to_dict() | {"written": [str(file) for file in written]}, indent=1))
    elif report.status == "refused":
        raise ConfigError(f"{report.target}: {report.reason}")
    else:
        print(report)
        for file in written:
            print(f"wrote {file}")
    return report.exit_code


def _with_copy(report: ExportReport, gguf: str) -> ExportReport:
    """The report for a GGUF of which flags say the whole scaling: a copy without the one that the file holds.

    Raises:
        ConfigError: it holds none, so that no copy is needed; not a GGUF.
    """
    held = held_scaling(gguf)
    if not held:
        raise ConfigError(
            f"flag --gguf is not needed: llama.cpp has words for {report.scaling.label!r}, and {gguf} holds no scaling"
        )
    note = f"{gguf} holds a scaling ({', '.join(held)}), which flags would come on top of: the copy is without it"
    return dataclasses.replace(report, gguf=GgufRope(), notes=(*report.notes, note))


def _write(folder: Path, raw: Mapping[str, Any], report: ExportReport, gguf: str | None) -> list[Path]:
    """Write config.json and, given one, the GGUF; both get their names when both are whole. Returns their paths."""
    place = folder.absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        staged = scratch_path(place, "partial")
        try:
            if gguf is not None and report.gguf is not None:
                add_rope(gguf, staged / Path(gguf).name, report.gguf)
            path: tuple[str, ...] = ()
            patch = report.config
            while "rope_parameters" not in patch:  # the text part of a composite config
                (name, patch) = next(iter(patch.items()))
                path = (*path, name)
            write_atomic(staged / "config.json", json.dumps(build_patched(raw, patch, path), indent=2) + "\n")
            for name, text in report.files.items():
                write_atomic(staged / name, text if gguf is None else text.replace("MODEL.gguf", Path(gguf).name))
            written = [folder / file.name for file in sorted(staged.iterdir())]
            if not place.exists():
                os.rename(staged, place)
            else:
                for file in staged.iterdir():
                    os.replace(file, place / file.name)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # gone already where it was renamed
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"--output {folder} cannot be written to: {error.strerror}") from error
    return written
